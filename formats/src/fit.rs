//! Brings batches that already have types under a declared schema: columns are selected by name and cast where
//! that loses nothing but precision. Called by the Arrow IPC codec and the readers of columnar files. The
//! invariant: a cast that would cut a fraction, overflow, or read text as a number is refused, never made.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, RecordBatchOptions, StructArray, new_null_array};
use arrow::compute::{CastOptions, cast_with_options};
use arrow::datatypes::{DataType, Field, Fields, Float32Type, Schema, SchemaRef};

use crate::payload::{Fault, Missing, Policy, Reason, Unknown};
use crate::schema::type_name;

/// Whether batches of schema `from` can be had as batches of `to`; what depends on the values is left to [`fit`].
///
/// # Errors
/// Which column stands in the way, and why.
pub(crate) fn check(from: &Schema, to: &Schema, policy: Policy) -> Result<(), Reason> {
    check_fields(from.fields(), to.fields(), policy)
}

fn check_fields(from: &Fields, to: &Fields, policy: Policy) -> Result<(), Reason> {
    for field in to {
        match from.find(field.name()) {
            Some((_, found)) => match (found.data_type(), field.data_type()) {
                (DataType::Struct(from), DataType::Struct(to)) => {
                    check_fields(from, to, policy).map_err(|reason| reason.within(format_args!("column '{}'", field.name())))?
                }
                (from, to) if from == to || holds(to, from) => {}
                (from, to) => {
                    let told = format!("column '{}' is {}, declared as {}", field.name(), type_name(from), type_name(to));
                    return Err(Reason::new(Fault::WrongType, told));
                }
            },
            None if !field.is_nullable() || policy.missing == Missing::Reject => {
                return Err(Reason::new(Fault::MissingField, format!("missing column '{}'", field.name())));
            }
            None => {}
        }
    }
    match from.iter().find(|found| to.find(found.name()).is_none()) {
        Some(extra) if policy.unknown == Unknown::Reject => {
            Err(Reason::new(Fault::UnknownField, format!("column '{}' is not declared", extra.name())))
        }
        _ => Ok(()),
    }
}

/// The batch with the columns of `schema`.
///
/// # Errors
/// Which column stands in the way, and why.
pub(crate) fn fit(batch: &RecordBatch, schema: &SchemaRef, policy: Policy) -> Result<RecordBatch, Reason> {
    let found = batch.schema();
    check(&found, schema, policy)?;
    let column = |field: &Arc<Field>| match batch.column_by_name(field.name()) {
        Some(array) => fit_array(array, field),
        None => Ok(new_null_array(field.data_type(), batch.num_rows())),
    };
    let columns = schema.fields().iter().map(column).collect::<Result<_, _>>()?;
    let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
    // The types are right by now: all that can still be refused is a null in a required column.
    RecordBatch::try_new_with_options(schema.clone(), columns, &options)
        .map_err(|error| Reason::new(Fault::MissingField, error.to_string()))
}

fn fit_array(array: &ArrayRef, field: &Field) -> Result<ArrayRef, Reason> {
    let fitted: ArrayRef = match (array.data_type(), field.data_type()) {
        (from, to) if from == to => array.clone(),
        (DataType::Struct(_), DataType::Struct(fields)) => {
            let from = array.as_struct();
            let child = |field: &Arc<Field>| match from.column_by_name(field.name()) {
                Some(child) => fit_array(child, field),
                None => Ok(new_null_array(field.data_type(), from.len())),
            };
            let children = fields.iter().map(child).collect::<Result<_, _>>()?;
            let nulls = from.nulls().cloned();
            Arc::new(
                StructArray::try_new(fields.clone(), children, nulls)
                    .map_err(|error| Reason::new(Fault::MissingField, format!("column '{}': {error}", field.name())))?,
            )
        }
        (_, to) => {
            let options = CastOptions { safe: false, ..CastOptions::default() };
            let out_of_range = |told: String| Reason::new(Fault::OutOfRange, told);
            let cast = cast_with_options(array, to, &options)
                .map_err(|error| out_of_range(format!("column '{}': {error}", field.name())))?;
            if *to == DataType::Float32 && overflowed(array, &cast) {
                return Err(out_of_range(format!("column '{}': a value is out of range for float32", field.name())));
            }
            cast
        }
    };
    Ok(fitted)
}

/// Whether narrowing made an infinity of a finite number.
fn overflowed(from: &ArrayRef, to: &ArrayRef) -> bool {
    let narrow = to.as_primitive::<Float32Type>();
    let Some(wide) = from.as_primitive_opt::<arrow::datatypes::Float64Type>() else {
        return false;
    };
    let mut pairs = wide.iter().zip(narrow.iter());
    pairs.any(|pair| matches!(pair, (Some(wide), Some(narrow)) if narrow.is_infinite() && wide.is_finite()))
}

/// Whether values of type `from` are values of type `to`, range and precision aside.
fn holds(to: &DataType, from: &DataType) -> bool {
    use DataType::*;
    let inner = |to: &Field, from: &Field| to.data_type() == from.data_type() || holds(to.data_type(), from.data_type());
    match (from, to) {
        (Null, _) => true,
        (Dictionary(_, values), to) => **values == *to || holds(to, values),
        (from, to) if from.is_integer() => to.is_integer() || to.is_floating(),
        (from, to) if from.is_floating() => to.is_floating(),
        (Decimal32(..) | Decimal64(..) | Decimal128(..) | Decimal256(..), to) => to.is_floating(),
        (Utf8 | LargeUtf8 | Utf8View, Utf8) => true,
        (Binary | LargeBinary | BinaryView | FixedSizeBinary(_), Binary) => true,
        (Date32 | Date64, Date32) | (Timestamp(..), Timestamp(..)) => true,
        (List(from) | LargeList(from) | FixedSizeList(from, _), List(to)) => inner(to, from),
        (List(from) | LargeList(from), FixedSizeList(to, _)) => inner(to, from),
        (FixedSizeList(from, a), FixedSizeList(to, b)) => a == b && inner(to, from),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::{Float64Array, Int64Array, LargeStringArray, TimestampMillisecondArray};

    use super::*;
    use crate::schema::Declaration;

    fn schema(text: &str) -> SchemaRef {
        serde_json::from_str::<Declaration>(text).unwrap().to_arrow()
    }

    fn batch() -> RecordBatch {
        let inner = StructArray::from(vec![(
            Arc::new(Field::new("x", DataType::Int64, true)),
            Arc::new(Int64Array::from(vec![1, 2])) as ArrayRef,
        )]);
        RecordBatch::try_from_iter([
            ("i", Arc::new(Int64Array::from(vec![1, 300])) as ArrayRef),
            ("f", Arc::new(Float64Array::from(vec![1.5, 1e39])) as ArrayRef),
            ("s", Arc::new(LargeStringArray::from(vec!["a", "b"])) as ArrayRef),
            ("t", Arc::new(TimestampMillisecondArray::from(vec![1, 2])) as ArrayRef),
            ("p", Arc::new(inner) as ArrayRef),
        ])
        .unwrap()
    }

    #[test]
    fn selects_reorders_and_casts() {
        let declared =
            schema(r#"{"s":"utf8","p":{"struct":{"new":"utf8","x":"int32"}},"i":"float32","t":"timestamp_us","gone":"int8"}"#);
        let fitted = fit(&batch(), &declared, Policy::default()).unwrap();
        assert_eq!(fitted.schema(), declared);
        assert_eq!(fitted.column(0).as_string::<i32>().value(1), "b");
        let x = fitted.column(1).as_struct().column(1).clone();
        assert_eq!(x.as_primitive::<arrow::datatypes::Int32Type>().values(), &[1, 2]);
        let t = fitted.column(3).as_primitive::<arrow::datatypes::TimestampMicrosecondType>();
        assert_eq!(t.values(), &[1_000, 2_000]);
        assert_eq!(fitted.column(4).null_count(), 2);
    }

    #[test]
    fn refuses_what_would_bend_a_value() {
        use Fault::*;
        for (declared, fault, reason) in [
            (r#"{"i":"int8"}"#, OutOfRange, "column 'i'"),
            (r#"{"f":"int64"}"#, WrongType, "column 'f' is float64, declared as int64"),
            (r#"{"f":"float32"}"#, OutOfRange, "out of range for float32"),
            (r#"{"s":"int64"}"#, WrongType, "declared as int64"),
            (r#"{"i":"utf8"}"#, WrongType, "declared as utf8"),
            (r#"{"gone":"int8!"}"#, MissingField, "missing column 'gone'"),
            (r#"{"p":{"struct":{"x":"utf8"}}}"#, WrongType, "column 'p': column 'x' is int64"),
        ] {
            let error = fit(&batch(), &schema(declared), Policy::default()).unwrap_err();
            assert!(error.fault == fault && error.text.contains(reason), "{declared}: {error:?}");
        }
        let strict = Policy { unknown: Unknown::Reject, ..Policy::default() };
        let error = fit(&batch(), &schema(r#"{"i":"int64"}"#), strict).unwrap_err();
        assert_eq!(error, Reason::new(UnknownField, "column 'f' is not declared"));
    }
}
