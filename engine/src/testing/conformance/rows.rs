//! Rows made comparable: what conformance compares batches by. The invariant: two rows are equal when every value
//! is, numbers of a model within the bound that differing batch sizes explain.

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Float64Type, SchemaRef};
use arrow::util::display::{ArrayFormatter, FormatOptions};

use super::Broken;
use crate::batch::Batch;

/// A model's numbers differ in the last digits with the number of rows in a call: the bound within which scores count as equal.
const TOLERANCE: f64 = 1e-5;

pub(super) fn honest(batch: &Batch, declared: &SchemaRef, who: &str) -> Result<(), Broken> {
    let found = batch.schema();
    if found == *declared { Ok(()) } else { Err(format!("{who} {found:?}, and {declared:?} is declared")) }
}

/// Every row as a batch of its own.
pub(super) fn single_rows(batches: &[RecordBatch]) -> Vec<RecordBatch> {
    batches.iter().flat_map(|batch| (0..batch.num_rows()).map(|row| batch.slice(row, 1))).collect()
}

/// One value, made comparable.
#[derive(Clone, Debug)]
pub(super) enum Cell {
    Number(f64),
    Text(String),
}

impl PartialEq for Cell {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Cell::Number(a), Cell::Number(b)) => {
                a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= TOLERANCE * a.abs().max(1.0)
            }
            (Cell::Text(a), Cell::Text(b)) => a == b,
            _ => false,
        }
    }
}

pub(super) type Row = Vec<Cell>;

pub(super) fn rows_of(batch: &RecordBatch) -> Result<Vec<Row>, Broken> {
    let options = FormatOptions::new().with_null("<null>");
    let mut rows: Vec<Row> = vec![Vec::new(); batch.num_rows()];
    for column in batch.columns() {
        if column.data_type().is_floating() {
            let numbers = cast(column, &DataType::Float64).map_err(|e| format!("comparing numbers: {e}"))?;
            let numbers = numbers.as_primitive::<Float64Type>();
            for (at, row) in rows.iter_mut().enumerate() {
                let null = || Cell::Text("<null>".to_owned());
                row.push(if numbers.is_null(at) { null() } else { Cell::Number(numbers.value(at)) });
            }
        } else {
            let texts = ArrayFormatter::try_new(column.as_ref(), &options).map_err(|e| format!("comparing values: {e}"))?;
            for (at, row) in rows.iter_mut().enumerate() {
                row.push(Cell::Text(texts.value(at).to_string()));
            }
        }
    }
    Ok(rows)
}

pub(super) fn same_rows(expected: &[Row], found: &[Row], when: &str) -> Result<(), Broken> {
    let most = expected.len().max(found.len());
    match (0..most).find(|at| expected.get(*at) != found.get(*at)) {
        None => Ok(()),
        Some(at) => Err(format!(
            "{when}: row {at} is {:?} instead of {:?} ({} rows instead of {})",
            found.get(at),
            expected.get(at),
            found.len(),
            expected.len()
        )),
    }
}
