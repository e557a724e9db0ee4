//! Makes a tensor of the columns of a batch, as a [`Binding`] says. The `infer` operator calls it for every batch. One
//! column of the model's own type is shared without a copy; everything else costs one pass over the values. Rows that
//! cannot be part of a tensor are named, and the caller takes them out and asks again.

use afferent_engine::{Error, Result};
use afferent_models::DataType as TensorType;
use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::buffer::Buffer;
use arrow::compute::cast;
use arrow::datatypes::{ArrowNativeType, ArrowPrimitiveType, DataType, Float32Type, Float64Type};

use super::bind::{Binding, Column, Layout};
use super::config::NanPolicy;
use super::element::{arrow_type, with_number};

/// Groups of values that are woven at a time: few enough to stay in the first-level cache.
const TILE: usize = 512;

/// What can be had of a batch.
pub(super) enum Gathered {
    /// The elements of all rows, row-major.
    Elements(Buffer),
    /// Rows that have to go first.
    Unfit(Unfit),
}

/// Rows that cannot be part of a tensor, for one reason.
#[derive(Debug)]
pub(super) struct Unfit {
    /// Their numbers, in order, each once; never empty.
    pub(super) rows: Vec<usize>,
    /// For the metric.
    pub(super) code: &'static str,
    /// For people.
    pub(super) reason: String,
}

impl Binding {
    /// The elements of this input for every row of the batch.
    ///
    /// # Errors
    /// Fatal when the columns are not of the types that were planned.
    pub(super) fn gather(&self, records: &RecordBatch, nan: NanPolicy) -> Result<Gathered> {
        let mut leaves = Vec::with_capacity(self.columns.len());
        for column in &self.columns {
            match self.leaf(column, records)? {
                Ok(leaf) => leaves.push(leaf),
                Err(unfit) => return Ok(Gathered::Unfit(unfit)),
            }
        }
        let elements = self.weave(&leaves);
        Ok(match self.data_type {
            TensorType::Fp32 => self.check::<Float32Type>(elements, nan, f32::is_finite),
            TensorType::Fp64 => self.check::<Float64Type>(elements, nan, f64::is_finite),
            _ => Gathered::Elements(elements),
        })
    }

    /// The values of all rows of a column, in the type of the input and without any list around them.
    fn leaf(&self, column: &Column, records: &RecordBatch) -> Result<std::result::Result<ArrayRef, Unfit>> {
        let rows = records.num_rows();
        let mut values = match records.columns().get(column.index) {
            Some(values) => values.clone(),
            None => return Err(Error::fatal(format!("the batch has no column `{}` at index {}", column.name, column.index))),
        };
        let mut each = 1;
        loop {
            if let Some(unfit) = nulls(&values, each, &column.name) {
                return Ok(Err(unfit));
            }
            values = match values.data_type() {
                DataType::FixedSizeList(_, size) => {
                    each *= usize::try_from(*size).unwrap_or(0);
                    values.as_fixed_size_list().values().slice(0, rows * each)
                }
                DataType::List(_) => {
                    let wanted = column.list_length.unwrap_or(0);
                    let offsets = values.as_list::<i32>().value_offsets();
                    let long = |pair: &[i32]| pair[1].as_usize() - pair[0].as_usize();
                    let odd: Vec<usize> = (0..rows).filter(|row| long(&offsets[*row..*row + 2]) != wanted).collect();
                    if let Some(first) = odd.first() {
                        let reason = format!(
                            "a list in the column `{}` has {} items, `{}` wants {wanted}",
                            column.name,
                            long(&offsets[*first..*first + 2]),
                            self.input
                        );
                        return Ok(Err(Unfit { rows: odd, code: "wrong_length", reason }));
                    }
                    each *= wanted;
                    values.as_list::<i32>().values().slice(offsets[0].as_usize(), rows * each)
                }
                _ => break,
            };
        }
        let wanted =
            arrow_type(self.data_type).ok_or_else(|| Error::fatal(format!("{} tensors are not supported", self.data_type)))?;
        if *values.data_type() != wanted {
            values = cast(&values, &wanted)
                .map_err(|error| Error::fatal(error).context(format!("casting the column `{}`", column.name)))?;
        }
        if each != self.each {
            return Err(Error::fatal(format!(
                "the column `{}` gives {each} values a row, {} were planned",
                column.name, self.each
            )));
        }
        Ok(Ok(values))
    }

    /// The columns' values in the order of the tensor.
    fn weave(&self, leaves: &[ArrayRef]) -> Buffer {
        with_number!(
            self.data_type,
            Number => numbers::<Number>(leaves, self.each, self.layout),
            {
                let bytes: Vec<Vec<u8>> =
                    leaves.iter().map(|leaf| leaf.as_boolean().values().iter().map(u8::from).collect()).collect();
                let columns: Vec<&[u8]> = bytes.iter().map(Vec::as_slice).collect();
                Buffer::from_vec(woven(&columns, self.each, self.layout))
            }
        )
    }

    /// What is done about NaN and infinities.
    fn check<T: ArrowPrimitiveType>(&self, elements: Buffer, nan: NanPolicy, finite: impl Fn(T::Native) -> bool) -> Gathered {
        let values: &[T::Native] = elements.typed_data();
        // Without a branch in the loop, so that it is vectorised: nearly always all is well.
        if nan == NanPolicy::Pass || values.iter().fold(true, |all, value| all & finite(*value)) {
            return Gathered::Elements(elements);
        }
        if nan == NanPolicy::Zero {
            let zero = T::Native::default();
            let values: Vec<T::Native> = values.iter().map(|value| if finite(*value) { *value } else { zero }).collect();
            return Gathered::Elements(Buffer::from_vec(values));
        }
        let rows = values.chunks(self.row_len().max(1)).enumerate();
        let rows = rows.filter(|(_, row)| !row.iter().all(|value| finite(*value))).map(|(row, _)| row).collect();
        let reason = format!("NaN or an infinity in the model's input `{}`", self.input);
        Gathered::Unfit(Unfit { rows, code: "nan_input", reason })
    }
}

/// Rows with a null among their values, of which each row has `each`.
fn nulls(values: &ArrayRef, each: usize, column: &str) -> Option<Unfit> {
    if values.null_count() == 0 {
        return None;
    }
    let mut rows: Vec<usize> = (0..values.len()).filter(|at| values.is_null(*at)).map(|at| at / each.max(1)).collect();
    rows.dedup();
    let reason =
        if each == 1 { format!("the column `{column}` is null") } else { format!("a value in the column `{column}` is null") };
    Some(Unfit { rows, code: "null_input", reason })
}

fn numbers<T: ArrowPrimitiveType>(leaves: &[ArrayRef], each: usize, layout: Layout) -> Buffer {
    if let [only] = leaves {
        return only.as_primitive::<T>().values().clone().into_inner();
    }
    let columns: Vec<&[T::Native]> = leaves.iter().map(|leaf| &leaf.as_primitive::<T>().values()[..]).collect();
    Buffer::from_vec(woven(&columns, each, layout))
}

/// The values of several columns, each with `each` for a row, in the order of the layout.
fn woven<V: Copy + Default>(columns: &[&[V]], each: usize, layout: Layout) -> Vec<V> {
    let width = columns.len();
    let mut woven = vec![V::default(); columns.iter().map(|column| column.len()).sum()];
    match layout {
        Layout::Blocks => {
            for (row, block) in woven.chunks_exact_mut(width * each).enumerate() {
                for (part, column) in block.chunks_exact_mut(each).zip(columns) {
                    part.copy_from_slice(&column[row * each..(row + 1) * each]);
                }
            }
        }
        Layout::Interleaved => {
            for (tile, block) in woven.chunks_mut(width * TILE).enumerate() {
                for (at, column) in columns.iter().enumerate() {
                    let groups = block.chunks_exact_mut(width);
                    for (group, value) in groups.zip(&column[tile * TILE..]) {
                        group[at] = *value;
                    }
                }
            }
        }
    }
    woven
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use afferent_models::{Dim, TensorSpec};
    use arrow::array::{BooleanArray, FixedSizeListArray, Float32Array, Float64Array, Int32Array, ListArray};

    use super::super::bind::bind;
    use super::super::config::Stack;
    use super::*;

    fn batch(columns: Vec<ArrayRef>) -> RecordBatch {
        let names = ["a", "b", "c"].map(str::to_owned);
        RecordBatch::try_from_iter_with_nullable(names.into_iter().zip(columns).map(|(name, column)| (name, column, true)))
            .unwrap()
    }

    fn binding(records: &RecordBatch, data_type: TensorType, shape: &[usize], stack: Option<Stack>) -> Binding {
        let shape = std::iter::once(Dim::Any).chain(shape.iter().map(|extent| Dim::Fixed(*extent))).collect();
        let names: Vec<String> = records.schema().fields().iter().map(|field| field.name().clone()).collect();
        bind(&TensorSpec { name: "x".into(), data_type, shape }, &names, stack, &records.schema()).unwrap()
    }

    fn elements(gathered: Gathered) -> Vec<f32> {
        match gathered {
            Gathered::Elements(elements) => elements.typed_data::<f32>().to_vec(),
            Gathered::Unfit(unfit) => panic!("{unfit:?}"),
        }
    }

    fn unfit(gathered: Gathered) -> Unfit {
        match gathered {
            Gathered::Elements(_) => panic!("all rows were taken"),
            Gathered::Unfit(unfit) => unfit,
        }
    }

    fn vectors(rows: &[[f32; 3]]) -> ArrayRef {
        let rows = rows.iter().map(|row| Some(row.map(Some)));
        Arc::new(FixedSizeListArray::from_iter_primitive::<Float32Type, _, _>(rows, 3))
    }

    #[test]
    fn one_column_of_the_right_type_is_shared() {
        let records = batch(vec![vectors(&[[1., 2., 3.], [4., 5., 6.], [7., 8., 9.]])]).slice(1, 2);
        let Gathered::Elements(shared) =
            binding(&records, TensorType::Fp32, &[3], None).gather(&records, NanPolicy::Reject).unwrap()
        else {
            panic!("a row is refused");
        };
        let values = records.column(0).as_fixed_size_list().values().as_primitive::<Float32Type>().values().inner().clone();
        assert_eq!(shared.as_ptr(), values.as_ptr());
        assert_eq!(shared.typed_data::<f32>(), [4., 5., 6., 7., 8., 9.]);
    }

    #[test]
    fn columns_are_stacked_first_and_last() {
        let records = batch(vec![vectors(&[[1., 2., 3.], [4., 5., 6.]]), vectors(&[[-1., -2., -3.], [-4., -5., -6.]])]);
        let last = binding(&records, TensorType::Fp32, &[3, 2], None).gather(&records, NanPolicy::Reject).unwrap();
        assert_eq!(elements(last), [1., -1., 2., -2., 3., -3., 4., -4., 5., -5., 6., -6.]);
        let first = binding(&records, TensorType::Fp32, &[2, 3], None).gather(&records, NanPolicy::Reject).unwrap();
        assert_eq!(elements(first), [1., 2., 3., -1., -2., -3., 4., 5., 6., -4., -5., -6.]);
    }

    #[test]
    fn more_rows_than_a_tile_are_woven_alike() {
        let rows = TILE * 2 + 7;
        let numbers = |from: usize| (0..rows).map(|row| (from + row) as f32).collect::<Vec<_>>();
        let records = batch(vec![Arc::new(Float32Array::from(numbers(0))), Arc::new(Float32Array::from(numbers(10_000)))]);
        let woven = elements(binding(&records, TensorType::Fp32, &[2], None).gather(&records, NanPolicy::Reject).unwrap());
        for (row, pair) in woven.chunks(2).enumerate() {
            assert_eq!(pair, [row as f32, (10_000 + row) as f32]);
        }
    }

    #[test]
    fn scalars_of_several_types_become_floats() {
        let records = batch(vec![
            Arc::new(Int32Array::from(vec![1, 2])),
            Arc::new(Float64Array::from(vec![0.5, 0.25])),
            Arc::new(Float32Array::from(vec![3., 4.])),
        ]);
        let gathered = binding(&records, TensorType::Fp32, &[3], None).gather(&records, NanPolicy::Reject).unwrap();
        assert_eq!(elements(gathered), [1., 0.5, 3., 2., 0.25, 4.]);
        let flags = batch(vec![Arc::new(BooleanArray::from(vec![true, false])), Arc::new(BooleanArray::from(vec![false, true]))]);
        let Gathered::Elements(bytes) = binding(&flags, TensorType::Bool, &[2], None).gather(&flags, NanPolicy::Reject).unwrap()
        else {
            panic!("a row is refused");
        };
        assert_eq!(bytes.as_slice(), [1, 0, 0, 1]);
    }

    #[test]
    fn rows_with_a_null_are_named_wherever_it_is() {
        let scalars = batch(vec![Arc::new(Float32Array::from(vec![Some(1.), None, Some(3.), None]))]);
        let named = unfit(binding(&scalars, TensorType::Fp32, &[], None).gather(&scalars, NanPolicy::Pass).unwrap());
        assert_eq!((named.rows, named.code, named.reason.as_str()), (vec![1, 3], "null_input", "the column `a` is null"));

        let rows = [Some(vec![Some(1.0_f32), Some(2.)]), Some(vec![None, None]), Some(vec![Some(3.), Some(4.)])];
        let inner: ArrayRef = Arc::new(FixedSizeListArray::from_iter_primitive::<Float32Type, _, _>(rows, 2));
        let records = batch(vec![inner]).slice(1, 2);
        let named = unfit(binding(&records, TensorType::Fp32, &[2], None).gather(&records, NanPolicy::Pass).unwrap());
        assert_eq!((named.rows, named.reason.as_str()), (vec![0], "a value in the column `a` is null"));
    }

    #[test]
    fn lists_of_another_length_are_named() {
        let rows = [Some(vec![Some(1.0_f64), Some(2.)]), Some(vec![Some(3.)]), Some(vec![Some(4.), Some(5.)])];
        let lists: ArrayRef = Arc::new(ListArray::from_iter_primitive::<Float64Type, _, _>(rows));
        let records = batch(vec![lists]);
        let binding = binding(&records, TensorType::Fp32, &[2], None);
        let named = unfit(binding.gather(&records, NanPolicy::Reject).unwrap());
        assert_eq!((named.rows, named.code), (vec![1], "wrong_length"));
        assert_eq!(named.reason, "a list in the column `a` has 1 items, `x` wants 2");
        let good = records.slice(2, 1);
        assert_eq!(elements(binding.gather(&good, NanPolicy::Reject).unwrap()), [4., 5.]);
    }

    #[test]
    fn nan_is_refused_passed_or_zeroed() {
        // The last is finite as a float64 and infinite as a float32.
        let records = batch(vec![Arc::new(Float64Array::from(vec![1., f64::NAN, f64::INFINITY, 1e300]))]);
        let binding = binding(&records, TensorType::Fp32, &[], None);
        let named = unfit(binding.gather(&records, NanPolicy::Reject).unwrap());
        assert_eq!((named.rows, named.code), (vec![1, 2, 3], "nan_input"));
        assert_eq!(elements(binding.gather(&records, NanPolicy::Zero).unwrap()), [1., 0., 0., 0.]);
        assert!(elements(binding.gather(&records, NanPolicy::Pass).unwrap())[1].is_nan());
    }
}
