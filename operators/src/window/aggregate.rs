//! One column of windows: a function over the rows of each. Called by the operator with the rows of all windows one
//! behind the other; the invariant: one value for each window, in their order.

use std::cmp::Ordering;
use std::ops::Range;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, FixedSizeListArray, Float64Array, Int64Array, ListArray, PrimitiveArray, UInt64Array,
    make_comparator,
};
use arrow::buffer::{OffsetBuffer, ScalarBuffer};
use arrow::compute::{SortOptions, cast, sum, sum_checked, take};
use arrow::datatypes::{ArrowNumericType, DataType, Field, Float64Type, Int64Type, UInt64Type};
use arrow::error::ArrowError;

use super::select::Function;

/// Where each window lies within the rows of all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Windows {
    /// Ends, the first window starting at 0 and each other where the one before it ends.
    ends: Vec<usize>,
}

impl Windows {
    /// One more window, of `rows` rows (at least one).
    pub(super) fn push(&mut self, rows: usize) {
        self.ends.push(self.ends.last().copied().unwrap_or(0) + rows);
    }

    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    fn iter(&self) -> impl Iterator<Item = Range<usize>> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, end)| start..*end)
    }

    /// The number of rows of each window.
    pub(super) fn rows(&self) -> ArrayRef {
        Arc::new(Int64Array::from_iter_values(self.iter().map(|rows| rows.len() as i64)))
    }
}

/// The function's value for each window. `values` are those of the rows of all windows, `field` is what leaves.
pub(super) fn compute(function: Function, field: &Field, values: &ArrayRef, windows: &Windows) -> Result<ArrayRef, ArrowError> {
    match function {
        Function::ArrayAgg => lists(field, values, windows),
        Function::Avg => {
            let values = cast(values, &DataType::Float64)?;
            let values = values.as_primitive::<Float64Type>();
            Ok(Arc::new(each(values, windows, |rows| {
                let count = rows.len() - rows.null_count();
                sum(rows).map(|sum| sum / count as f64)
            })))
        }
        Function::Count => {
            let count = |rows: Range<usize>| rows.len() - values.slice(rows.start, rows.len()).logical_null_count();
            Ok(Arc::new(Int64Array::from_iter_values(windows.iter().map(|rows| count(rows) as i64))))
        }
        Function::First => at(values, windows.iter().map(|rows| rows.start)),
        Function::Last => at(values, windows.iter().map(|rows| rows.end - 1)),
        Function::Max => extreme(values, windows, Ordering::Greater),
        Function::Min => extreme(values, windows, Ordering::Less),
        Function::Sum => {
            let values = cast(values, field.data_type())?;
            Ok(match field.data_type() {
                DataType::Int64 => whole_sum(values.as_primitive::<Int64Type>(), windows),
                DataType::UInt64 => whole_sum(values.as_primitive::<UInt64Type>(), windows),
                _ => {
                    let sums: Float64Array = each(values.as_primitive::<Float64Type>(), windows, sum);
                    Arc::new(sums)
                }
            })
        }
    }
}

/// The value of each window's last row.
pub(super) fn last(values: &ArrayRef, windows: &Windows) -> Result<ArrayRef, ArrowError> {
    at(values, windows.iter().map(|rows| rows.end - 1))
}

fn at(values: &ArrayRef, rows: impl Iterator<Item = usize>) -> Result<ArrayRef, ArrowError> {
    take(values, &UInt64Array::from_iter_values(rows.map(|row| row as u64)), None)
}

/// The rows of all windows are already the items of all lists.
fn lists(field: &Field, values: &ArrayRef, windows: &Windows) -> Result<ArrayRef, ArrowError> {
    match field.data_type() {
        DataType::FixedSizeList(item, size) => {
            Ok(Arc::new(FixedSizeListArray::try_new(item.clone(), *size, values.clone(), None)?))
        }
        DataType::List(item) => {
            let ends = std::iter::once(&0).chain(&windows.ends).map(|end| i32::try_from(*end));
            let ends = ends
                .collect::<Result<Vec<i32>, _>>()
                .map_err(|_| ArrowError::ComputeError("the windows of one batch have more than 2^31 rows".to_owned()))?;
            let offsets = OffsetBuffer::new(ScalarBuffer::from(ends));
            Ok(Arc::new(ListArray::try_new(item.clone(), offsets, values.clone(), None)?))
        }
        other => Err(ArrowError::ComputeError(format!("array_agg cannot give {other}"))),
    }
}

fn each<T: ArrowNumericType>(
    values: &PrimitiveArray<T>,
    windows: &Windows,
    value: impl Fn(&PrimitiveArray<T>) -> Option<T::Native>,
) -> PrimitiveArray<T> {
    windows.iter().map(|rows| value(&values.slice(rows.start, rows.len()))).collect()
}

/// Sums of integers; null where one passes 64 bits, rather than a wrong number.
fn whole_sum<T: ArrowNumericType>(values: &PrimitiveArray<T>, windows: &Windows) -> ArrayRef {
    let sums: PrimitiveArray<T> = each(values, windows, |rows| sum_checked(rows).ok().flatten());
    Arc::new(sums)
}

/// The value of each window that is `wanted` compared with all others, nulls left out.
fn extreme(values: &ArrayRef, windows: &Windows, wanted: Ordering) -> Result<ArrayRef, ArrowError> {
    let compare = make_comparator(values, values, SortOptions::default())?;
    let nulls = values.logical_nulls();
    let valid = |row: &usize| nulls.as_ref().is_none_or(|nulls| nulls.is_valid(*row));
    let better = |best, row| if compare(row, best) == wanted { row } else { best };
    let best: UInt64Array = windows.iter().map(|rows| rows.filter(valid).reduce(better).map(|row| row as u64)).collect();
    take(values, &best, None)
}

#[cfg(test)]
mod tests {
    use arrow::array::{Float32Array, Int32Array, StringArray};

    use super::*;

    fn windows(rows: &[usize]) -> Windows {
        let mut windows = Windows::default();
        rows.iter().for_each(|rows| windows.push(*rows));
        windows
    }

    fn run(function: Function, column: (&str, ArrayRef), rows: &[usize], size: Option<i32>) -> ArrayRef {
        let field = Field::new(column.0, column.1.data_type().clone(), true);
        let field = function.field("x", &field, size).unwrap();
        let result = compute(function, &field, &column.1, &windows(rows)).unwrap();
        assert_eq!(result.data_type(), field.data_type());
        assert_eq!(result.len(), rows.len());
        result
    }

    #[test]
    fn functions_leave_nulls_out() {
        let n = || {
            let values = vec![Some(3), None, Some(-1), None, None, Some(7)];
            ("n", Arc::new(Int32Array::from(values)) as ArrayRef)
        };
        let cut = [3, 2, 1];
        let ints = |function| {
            let values = run(function, n(), &cut, None);
            cast(&values, &DataType::Int64).unwrap().as_primitive::<Int64Type>().iter().collect::<Vec<_>>()
        };
        assert_eq!(ints(Function::Max), [Some(3), None, Some(7)]);
        assert_eq!(ints(Function::Min), [Some(-1), None, Some(7)]);
        assert_eq!(ints(Function::Sum), [Some(2), None, Some(7)]);
        assert_eq!(ints(Function::Count), [Some(2), Some(0), Some(1)]);
        assert_eq!(ints(Function::First), [Some(3), None, Some(7)]);
        assert_eq!(ints(Function::Last), [Some(-1), None, Some(7)]);
        let avg = run(Function::Avg, n(), &cut, None);
        let avg: Vec<_> = avg.as_primitive::<Float64Type>().iter().collect();
        assert_eq!(avg, [Some(1.0), None, Some(7.0)]);
        let lists = run(Function::ArrayAgg, n(), &cut, None);
        assert_eq!(lists.as_list::<i32>().value(1).null_count(), 2);
        assert_eq!(windows(&cut).rows().as_primitive::<Int64Type>().values(), &[3, 2, 1]);
    }

    #[test]
    fn texts_are_ordered_and_nan_is_the_largest() {
        let texts = ("t", Arc::new(StringArray::from(vec!["b", "a", "c"])) as ArrayRef);
        assert_eq!(run(Function::Min, texts, &[3], None).as_string::<i32>().value(0), "a");
        let floats = ("f", Arc::new(Float32Array::from(vec![1.0, f32::NAN])) as ArrayRef);
        let largest = run(Function::Max, floats, &[2], None);
        assert!(largest.as_primitive::<arrow::datatypes::Float32Type>().value(0).is_nan());
    }

    #[test]
    fn a_sum_past_64_bits_is_null() {
        let large = ("n", Arc::new(Int64Array::from(vec![i64::MAX, 1, 2, 3])) as ArrayRef);
        let sums = run(Function::Sum, large, &[2, 2], None);
        let sums: Vec<_> = sums.as_primitive::<Int64Type>().iter().collect();
        assert_eq!(sums, [None, Some(5)]);
    }

    #[test]
    fn equal_windows_make_lists_of_fixed_size() {
        let values = ("n", Arc::new(Int32Array::from(vec![1, 2, 2, 3])) as ArrayRef);
        let lists = run(Function::ArrayAgg, values, &[2, 2], Some(2));
        let second = lists.as_fixed_size_list().value(1);
        assert_eq!(second.as_ref(), &Int32Array::from(vec![2, 3]) as &dyn Array);
    }
}
