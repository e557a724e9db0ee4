//! From the pipeline's Arrow types to those of Delta Lake, and batches from one to the other. The planner
//! asks for the mapping, the sink, the Delta commit and the reader convert by it. Invariant: what the
//! mapping accepts is converted without loss, but for timestamps finer than a microsecond, which are cut.
//!
//! | Arrow | in the table |
//! |---|---|
//! | bool, int8 to int64, float32, float64, utf8, binary, date32, decimal128 | the same |
//! | uint8, uint16, uint32 | int16, int32, int64: Delta has no unsigned integers |
//! | uint64 | decimal(20, 0) |
//! | float16 | float32 |
//! | large and view texts and bytes, fixed-size binary | utf8, binary |
//! | date64 | date32 |
//! | timestamp with a time zone | timestamp in microseconds, UTC: the same instant |
//! | timestamp without | timestamp in microseconds without a time zone |
//! | list, large list, fixed-size list, struct, map | list, struct, map of mapped types |
//! | dictionary | its values |
//! | null, time, duration, interval, union, run-end encoded | refused |
//!
//! Every column may be null, so that a later version of the pipeline may leave one out.

use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch, RecordBatchOptions, new_null_array};
use arrow::compute::{CastOptions, cast_with_options};
use arrow::datatypes::{DataType, Field, FieldRef, Schema, SchemaRef, TimeUnit};
use arrow::error::ArrowError;

/// Characters that a column name of a Delta table must not contain.
const FORBIDDEN: &[char] = &[' ', ',', ';', '{', '}', '(', ')', '\n', '\t', '='];

/// Why a schema cannot be a table's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SchemaError {
    /// A type that Delta Lake lacks.
    #[error("column `{column}` is of type {data_type}, which a table cannot hold")]
    Type {
        /// The column, with its parents.
        column: String,
        /// The Arrow type.
        data_type: DataType,
    },
    /// A name that Delta Lake refuses.
    #[error("column name `{0}` contains a space or one of ,;{{}}()=, which a table does not allow")]
    Name(String),
    /// Two names that are one to Delta Lake.
    #[error("the columns `{0}` and `{1}` differ only in case, which a table does not tell apart")]
    Case(String, String),
    /// No columns.
    #[error("there is no column to store")]
    Empty,
}

/// The table's schema for rows of `schema`.
///
/// # Errors
/// Every column that cannot be stored.
pub fn mapped(schema: &Schema) -> Result<SchemaRef, Vec<SchemaError>> {
    let mut errors = Vec::new();
    let mut fields: Vec<Field> = Vec::with_capacity(schema.fields().len());
    if schema.fields().is_empty() {
        errors.push(SchemaError::Empty);
    }
    for field in schema.fields() {
        if field.name().is_empty() || field.name().contains(FORBIDDEN) {
            errors.push(SchemaError::Name(field.name().clone()));
        }
        if let Some(twin) = fields.iter().find(|other| other.name().eq_ignore_ascii_case(field.name())) {
            errors.push(SchemaError::Case(twin.name().clone(), field.name().clone()));
        }
        match mapped_type(field.name(), field.data_type()) {
            Ok(data_type) => fields.push(Field::new(field.name(), data_type, true)),
            Err(error) => errors.push(error),
        }
    }
    if errors.is_empty() { Ok(Arc::new(Schema::new(fields))) } else { Err(errors) }
}

fn mapped_type(column: &str, data_type: &DataType) -> Result<DataType, SchemaError> {
    let list_of = |item: &FieldRef| -> Result<DataType, SchemaError> {
        let data_type = mapped_type(&format!("{column}.element"), item.data_type())?;
        Ok(DataType::List(Arc::new(Field::new("element", data_type, true))))
    };
    Ok(match data_type {
        DataType::Boolean
        | DataType::Int8
        | DataType::Int16
        | DataType::Int32
        | DataType::Int64
        | DataType::Float32
        | DataType::Float64
        | DataType::Utf8
        | DataType::Binary
        | DataType::Date32 => data_type.clone(),
        DataType::Decimal128(_, scale) if *scale >= 0 => data_type.clone(),
        DataType::UInt8 => DataType::Int16,
        DataType::UInt16 => DataType::Int32,
        DataType::UInt32 => DataType::Int64,
        DataType::UInt64 => DataType::Decimal128(20, 0),
        DataType::Float16 => DataType::Float32,
        DataType::LargeUtf8 | DataType::Utf8View => DataType::Utf8,
        DataType::LargeBinary | DataType::BinaryView | DataType::FixedSizeBinary(_) => DataType::Binary,
        DataType::Date64 => DataType::Date32,
        DataType::Timestamp(_, Some(_)) => DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
        DataType::Timestamp(_, None) => DataType::Timestamp(TimeUnit::Microsecond, None),
        DataType::List(field) | DataType::LargeList(field) | DataType::FixedSizeList(field, _) => list_of(field)?,
        DataType::Struct(fields) => {
            let fields: Vec<Field> = fields
                .iter()
                .map(|field| {
                    let data_type = mapped_type(&format!("{column}.{}", field.name()), field.data_type())?;
                    Ok(Field::new(field.name(), data_type, true))
                })
                .collect::<Result<_, SchemaError>>()?;
            DataType::Struct(fields.into())
        }
        DataType::Map(entries, false) => match entries.data_type() {
            DataType::Struct(pair) if pair.len() == 2 => {
                let key = mapped_type(&format!("{column}.key"), pair[0].data_type())?;
                let value = mapped_type(&format!("{column}.value"), pair[1].data_type())?;
                let pair = vec![Field::new("key", key, false), Field::new("value", value, true)];
                DataType::Map(Arc::new(Field::new("key_value", DataType::Struct(pair.into()), false)), false)
            }
            _ => return Err(SchemaError::Type { column: column.to_owned(), data_type: data_type.clone() }),
        },
        DataType::Dictionary(_, values) => mapped_type(column, values)?,
        _ => return Err(SchemaError::Type { column: column.to_owned(), data_type: data_type.clone() }),
    })
}

/// The rows of `batch` in exactly the schema `schema`: columns by name, converted where the type differs,
/// null where the batch has none. Columns that the schema lacks are dropped.
///
/// # Errors
/// A value that the type cannot hold: nothing becomes null silently.
pub fn conform(batch: &RecordBatch, schema: &SchemaRef) -> Result<RecordBatch, ArrowError> {
    if batch.schema_ref() == schema {
        return Ok(batch.clone());
    }
    let options = CastOptions { safe: false, ..CastOptions::default() };
    let columns: Vec<ArrayRef> = schema
        .fields()
        .iter()
        .map(|field| match batch.column_by_name(field.name()) {
            Some(column) if column.data_type() == field.data_type() => Ok(Arc::clone(column)),
            Some(column) => cast_with_options(column, field.data_type(), &options)
                .map_err(|e| ArrowError::CastError(format!("column `{}`: {e}", field.name()))),
            None => Ok(new_null_array(field.data_type(), batch.num_rows())),
        })
        .collect::<Result<_, ArrowError>>()?;
    let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
    RecordBatch::try_new_with_options(Arc::clone(schema), columns, &options)
}

#[cfg(test)]
mod tests {
    use arrow::array::{
        AsArray, FixedSizeListArray, Float32Array, Int64Array, StringArray, TimestampMillisecondArray, TimestampSecondArray,
        UInt64Array,
    };
    use arrow::datatypes::{Decimal128Type, Float32Type, TimestampMicrosecondType};

    use super::*;

    fn micros(zone: Option<&str>) -> DataType {
        DataType::Timestamp(TimeUnit::Microsecond, zone.map(Into::into))
    }

    #[test]
    fn every_type_of_the_table_is_mapped_as_documented() {
        let cases = [
            (DataType::UInt8, DataType::Int16),
            (DataType::UInt16, DataType::Int32),
            (DataType::UInt32, DataType::Int64),
            (DataType::UInt64, DataType::Decimal128(20, 0)),
            (DataType::Float16, DataType::Float32),
            (DataType::LargeUtf8, DataType::Utf8),
            (DataType::Utf8View, DataType::Utf8),
            (DataType::FixedSizeBinary(4), DataType::Binary),
            (DataType::Date64, DataType::Date32),
            (DataType::Timestamp(TimeUnit::Nanosecond, Some("+02:00".into())), micros(Some("UTC"))),
            (DataType::Timestamp(TimeUnit::Second, None), micros(None)),
            (DataType::Dictionary(Box::new(DataType::Int32), Box::new(DataType::LargeUtf8)), DataType::Utf8),
        ];
        for (from, to) in cases {
            let schema = mapped(&Schema::new(vec![Field::new("c", from.clone(), false)])).unwrap();
            assert_eq!(schema.field(0), &Field::new("c", to, true), "{from}");
        }
        for refused in [DataType::Null, DataType::Time64(TimeUnit::Microsecond), DataType::Duration(TimeUnit::Second)] {
            let list = DataType::List(Arc::new(Field::new("item", refused.clone(), true)));
            let errors = mapped(&Schema::new(vec![Field::new("c", refused.clone(), true), Field::new("l", list, true)]));
            let errors = errors.unwrap_err();
            assert_eq!(errors.len(), 2, "{refused}");
            assert!(errors[1].to_string().contains("`l.element`"), "{}", errors[1]);
        }
    }

    #[test]
    fn names_that_a_table_refuses_are_named() {
        let schema = Schema::new(vec![
            Field::new("a b", DataType::Int32, true),
            Field::new("x", DataType::Int32, true),
            Field::new("X", DataType::Int32, true),
        ]);
        let errors = mapped(&schema).unwrap_err();
        assert_eq!(errors, [SchemaError::Name("a b".into()), SchemaError::Case("x".into(), "X".into())]);
        assert_eq!(mapped(&Schema::empty()).unwrap_err(), [SchemaError::Empty]);
    }

    #[test]
    fn rows_are_converted_without_loss() {
        let item = Arc::new(Field::new("item", DataType::Float32, true));
        let values = Arc::new(Float32Array::from(vec![1.0, 2.0, 3.0, 4.0]));
        let batch = RecordBatch::try_from_iter([
            ("u", Arc::new(UInt64Array::from(vec![u64::MAX, 0])) as ArrayRef),
            ("ts", Arc::new(TimestampMillisecondArray::from(vec![1_700_000_000_123, -1]).with_timezone("UTC")) as ArrayRef),
            ("xs", Arc::new(FixedSizeListArray::new(item, 2, values, None)) as ArrayRef),
        ])
        .unwrap();
        let schema = mapped(&batch.schema()).unwrap();
        let stored = conform(&batch, &schema).unwrap();
        assert_eq!(stored.schema(), schema);
        assert_eq!(stored.column(0).as_primitive::<Decimal128Type>().value(0), i128::from(u64::MAX));
        assert_eq!(stored.column(1).as_primitive::<TimestampMicrosecondType>().values(), &[1_700_000_000_123_000, -1000]);
        assert_eq!(stored.column(2).as_list::<i32>().value(1).as_primitive::<Float32Type>().values(), &[3.0, 4.0]);
    }

    #[test]
    fn what_does_not_fit_is_an_error_and_not_a_null() {
        let batch =
            RecordBatch::try_from_iter([("ts", Arc::new(TimestampSecondArray::from(vec![i64::MAX])) as ArrayRef)]).unwrap();
        let schema = mapped(&batch.schema()).unwrap();
        assert!(conform(&batch, &schema).unwrap_err().to_string().contains("column `ts`"));
    }

    #[test]
    fn columns_are_matched_by_name_and_missing_ones_are_null() {
        let batch = RecordBatch::try_from_iter([
            ("gone", Arc::new(Int64Array::from(vec![9])) as ArrayRef),
            ("b", Arc::new(StringArray::from(vec!["x"])) as ArrayRef),
        ])
        .unwrap();
        let schema: SchemaRef =
            Arc::new(Schema::new(vec![Field::new("a", DataType::Int64, true), Field::new("b", DataType::Utf8, true)]));
        let stored = conform(&batch, &schema).unwrap();
        assert!(stored.column(0).is_null(0));
        assert_eq!(stored.column(1).as_string::<i32>().value(0), "x");
    }
}
