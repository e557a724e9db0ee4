//! Rows as JSON, one object each, with Arrow's own encoder. Called through [`crate::Encoder`] and by the writer of JSON
//! lines. What it writes, [`crate::JsonDecoder`] reads back to the same batch, NaN and infinities excepted.

use std::sync::Arc;

use arrow::array::{BinaryArray, RecordBatch, StructArray};
use arrow::buffer::{Buffer, OffsetBuffer, ScalarBuffer};
use arrow::datatypes::{Field, Schema, SchemaRef};
use arrow::json::writer::{EncoderOptions, make_encoder};

use crate::error::FormatError;

/// Writes each row as one JSON object.
///
/// Timestamps become ISO 8601 text (UTC with `Z`), binary hexadecimal digits, and NaN and infinities null.
pub struct JsonEncoder {
    options: EncoderOptions,
}

impl JsonEncoder {
    /// An encoder for batches of `schema`. Nulls are left out unless `explicit_nulls` is set.
    ///
    /// # Errors
    /// [`FormatError::Arrow`] if JSON has no form for a type of the schema.
    pub fn new(schema: &SchemaRef, explicit_nulls: bool) -> Result<Self, FormatError> {
        let encoder = Self {
            options: EncoderOptions::default()
                .with_explicit_nulls(explicit_nulls)
                // Without a zone Arrow would write no `Z`; we take such times as UTC wherever they are read.
                .with_timestamp_format("%Y-%m-%dT%H:%M:%S%.fZ".to_owned()),
        };
        encoder.encode(&RecordBatch::new_empty(schema.clone()))?;
        Ok(encoder)
    }

    /// One payload per row, in order.
    ///
    /// # Errors
    /// [`FormatError::TooLarge`] past 2 GiB; [`FormatError::Arrow`] for a type without a JSON form.
    pub fn encode(&self, batch: &RecordBatch) -> Result<BinaryArray, FormatError> {
        let (bytes, ends) = self.encode_rows(batch, b"")?;
        let offsets = OffsetBuffer::new(ScalarBuffer::from(ends));
        Ok(BinaryArray::try_new(offsets, Buffer::from_vec(bytes), None)?)
    }

    /// All rows in one run of bytes, each followed by `end`; and where each ends, after a leading 0.
    pub(crate) fn encode_rows(&self, batch: &RecordBatch, end: &[u8]) -> Result<(Vec<u8>, Vec<i32>), FormatError> {
        let rows = batch.num_rows();
        let field = Arc::new(Field::new_struct("", batch.schema().fields().clone(), false));
        let array = StructArray::from(batch.clone());
        let mut encoder = make_encoder(&field, &array, &self.options)?;
        let mut bytes = Vec::with_capacity(rows * 64);
        let mut ends = Vec::with_capacity(rows + 1);
        ends.push(0);
        for row in 0..rows {
            encoder.encode(row, &mut bytes);
            bytes.extend_from_slice(end);
            let end = i32::try_from(bytes.len()).map_err(|_| FormatError::TooLarge { rows })?;
            ends.push(end);
        }
        Ok((bytes, ends))
    }
}

/// Refuses a batch that has not the columns for which an encoder was made.
pub(crate) fn check_schema(declared: &Schema, batch: &RecordBatch) -> Result<(), FormatError> {
    let found = batch.schema();
    let same = declared.fields().len() == found.fields().len()
        && declared.fields().iter().zip(found.fields()).all(|(a, b)| a.name() == b.name() && a.data_type() == b.data_type());
    if same {
        return Ok(());
    }
    let columns = |schema: &Schema| {
        let column = |field: &Arc<Field>| format!("{} {}", field.name(), field.data_type());
        schema.fields().iter().map(column).collect::<Vec<_>>().join(", ")
    };
    Err(FormatError::OtherSchema { found: columns(&found), declared: columns(declared) })
}

#[cfg(test)]
mod tests {
    use arrow::array::{ArrayRef, BooleanArray, Float64Array, TimestampMillisecondArray};

    use super::*;

    #[test]
    fn encodes_as_others_read_it() {
        let times = TimestampMillisecondArray::from(vec![1_700_000_000_123, 0]);
        let batch = RecordBatch::try_from_iter([
            ("t", Arc::new(times.clone().with_timezone("UTC")) as ArrayRef),
            ("n", Arc::new(times) as ArrayRef),
            ("f", Arc::new(Float64Array::from(vec![Some(f64::NAN), None])) as ArrayRef),
            ("b", Arc::new(BooleanArray::from(vec![true, false])) as ArrayRef),
        ])
        .unwrap();
        let encoder = JsonEncoder::new(&batch.schema(), true).unwrap();
        let payloads = encoder.encode(&batch).unwrap();
        let text = std::str::from_utf8(payloads.value(0)).unwrap();
        assert_eq!(text, r#"{"t":"2023-11-14T22:13:20.123Z","n":"2023-11-14T22:13:20.123Z","f":null,"b":true}"#);
        let text = std::str::from_utf8(payloads.value(1)).unwrap();
        assert!(text.starts_with(r#"{"t":"1970-01-01T00:00:00Z","n":"1970-01-01T00:00:00Z""#), "{text}");
    }
}
