//! Rows under construction: the columns of a schema, grown row by row by the JSON and CSV codecs and by the readers
//! of text files. The invariant: a payload adds whole rows to every column, or nothing.

use arrow::array::{Array, BinaryArray, RecordBatch, RecordBatchOptions};
use arrow::datatypes::{FieldRef, SchemaRef};
use serde::de::MapAccess;

use crate::column::Column;
use crate::error::FormatError;
use crate::json_value::{Noted, fill_missing, read_fields};
use crate::payload::{Decoded, Fault, Limits, Policy, Reason, Rejected, Unknown, bounded};

pub(crate) struct Rows {
    schema: SchemaRef,
    columns: Vec<Column>,
    policy: Policy,
    len: usize,
}

impl Rows {
    /// No rows yet; `place` names the format if a column's type cannot be read from it.
    pub(crate) fn new(schema: SchemaRef, policy: Policy, place: &'static str) -> Result<Self, FormatError> {
        let column = |field: &FieldRef| {
            Column::new(field).map_err(|data_type| FormatError::UnsupportedType {
                place,
                column: field.name().clone(),
                data_type,
            })
        };
        let columns = schema.fields().iter().map(column).collect::<Result<_, _>>()?;
        Ok(Self { schema, columns, policy, len: 0 })
    }

    pub(crate) fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Index of the column of that name.
    pub(crate) fn position(&self, name: &str) -> Option<usize> {
        self.columns.iter().position(|column| column.name() == name)
    }

    /// Appends one row from a JSON object.
    pub(crate) fn push_object<'de, A: MapAccess<'de>>(&mut self, map: A, noted: &Noted) -> Result<(), A::Error> {
        read_fields(&mut self.columns, self.len, self.policy, noted, map)?;
        self.len += 1;
        Ok(())
    }

    /// Appends one row from cells, each with the column it belongs to (`None`: not declared) and its text (`None`: an
    /// empty cell, which is a null).
    pub(crate) fn push_cells<'a>(&mut self, cells: impl Iterator<Item = (Option<usize>, Option<&'a str>)>) -> Result<(), Reason> {
        for (number, (place, text)) in cells.enumerate() {
            let Some(column) = place.and_then(|place| self.columns.get_mut(place)) else {
                if self.policy.unknown == Unknown::Reject {
                    let told = format!("cell {} belongs to no declared column", number + 1);
                    return Err(Reason::new(Fault::UnknownField, told));
                }
                continue;
            };
            match text {
                Some(text) => column
                    .push_text(text, self.policy)
                    .map_err(|reason| reason.within(format_args!("field '{}'", column.name())))?,
                None if column.is_required() => {
                    let told = format!("field '{}': empty, but required", column.name());
                    return Err(Reason::new(Fault::MissingField, told));
                }
                None => column.push_null(),
            }
        }
        fill_missing(&mut self.columns, self.len, self.policy)?;
        self.len += 1;
        Ok(())
    }

    /// Undoes everything after row `len`, half a row included.
    pub(crate) fn truncate(&mut self, len: usize) {
        for column in &mut self.columns {
            column.truncate(len);
        }
        self.len = len;
    }

    /// Hands over the rows and starts anew.
    pub(crate) fn finish(&mut self) -> Result<RecordBatch, FormatError> {
        let options = RecordBatchOptions::new().with_row_count(Some(self.len));
        self.len = 0;
        // Every column is finished even if one fails, so that the next batch starts empty.
        let arrays: Vec<_> = self.columns.iter_mut().map(Column::finish).collect();
        let arrays = arrays.into_iter().collect::<Result<_, _>>()?;
        Ok(RecordBatch::try_new_with_options(self.schema.clone(), arrays, &options)?)
    }

    /// Decodes payloads one by one with `push`, which appends the rows of one or says why not.
    pub(crate) fn decode(
        &mut self,
        payloads: &BinaryArray,
        limits: Limits,
        mut push: impl FnMut(&mut Self, &[u8]) -> Result<(), Reason>,
    ) -> Result<Decoded, FormatError> {
        let mut origin = Vec::with_capacity(payloads.len());
        let mut rejected = Vec::new();
        for (payload, bytes) in (0_u32..).zip(payloads.iter()) {
            let before = self.len;
            match check_payload(bytes, limits).and_then(|bytes| push(self, bytes)) {
                Ok(()) => origin.extend(std::iter::repeat_n(payload, self.len - before)),
                Err(reason) => {
                    self.truncate(before);
                    rejected.push(Rejected { payload, fault: reason.fault, reason: bounded(reason.text) });
                }
            }
        }
        Ok(Decoded { batch: self.finish()?, origin, rejected })
    }
}

/// What holds for payloads of every format, before one is looked into.
pub(crate) fn check_payload(payload: Option<&[u8]>, limits: Limits) -> Result<&[u8], Reason> {
    match payload {
        None => Err(Reason::new(Fault::Malformed, "no payload (null)")),
        Some([]) => Err(Reason::new(Fault::Malformed, "empty payload")),
        Some(bytes) if bytes.len() > limits.max_payload => {
            Err(format!("payload of {} bytes is over the limit of {}", bytes.len(), limits.max_payload).into())
        }
        Some(bytes) => Ok(bytes),
    }
}
