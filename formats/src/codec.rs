//! The message formats behind one decoder and one encoder. Called by the `decode` and `encode` operators and by the
//! sinks that have a `format`. Adding a format is a variant here and a module.

use arrow::array::{Array, BinaryArray, RecordBatch};
use arrow::datatypes::SchemaRef;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::arrow_ipc::{ArrowDecoder, ArrowEncoder};
use crate::csv::{CsvDecoder, CsvEncoder, CsvOptions};
use crate::error::FormatError;
use crate::json::JsonDecoder;
use crate::json_encoder::{JsonEncoder, check_schema};
use crate::payload::{Decoded, Encoded, Limits, Policy};

/// The format of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// One JSON object a row, or an array of objects.
    Json,
    /// One or more CSV records, each a row.
    Csv,
    /// An Arrow IPC stream.
    Arrow,
}

/// Reads messages of one format into rows of a declared schema.
pub enum Decoder {
    /// Reads JSON.
    Json(JsonDecoder),
    /// Reads CSV.
    Csv(CsvDecoder),
    /// Reads Arrow IPC.
    Arrow(ArrowDecoder),
}

impl Decoder {
    /// A decoder with the format's default options; for others make a [`CsvDecoder`] and wrap it.
    ///
    /// # Errors
    /// [`FormatError::UnsupportedType`] if the format cannot carry a type of the schema.
    pub fn new(format: Format, schema: SchemaRef, policy: Policy, limits: Limits) -> Result<Self, FormatError> {
        Ok(match format {
            Format::Json => Self::Json(JsonDecoder::new(schema, policy, limits)?),
            Format::Csv => Self::Csv(CsvDecoder::new(schema, CsvOptions::default(), policy, limits)?),
            Format::Arrow => Self::Arrow(ArrowDecoder::new(schema, policy, limits)),
        })
    }

    /// The declared schema, which every batch has.
    pub fn schema(&self) -> &SchemaRef {
        match self {
            Self::Json(decoder) => decoder.schema(),
            Self::Csv(decoder) => decoder.schema(),
            Self::Arrow(decoder) => decoder.schema(),
        }
    }

    /// Decodes each payload for itself: good ones become rows, bad ones are rejected with a reason.
    ///
    /// # Errors
    /// Only if Arrow refuses the batch as a whole, never because of a bad payload.
    pub fn decode(&mut self, payloads: &BinaryArray) -> Result<Decoded, FormatError> {
        match self {
            Self::Json(decoder) => decoder.decode(payloads),
            Self::Csv(decoder) => decoder.decode(payloads),
            Self::Arrow(decoder) => decoder.decode(payloads),
        }
    }
}

/// Writes rows as messages of one format.
pub struct Encoder {
    schema: SchemaRef,
    form: Form,
}

enum Form {
    Json(JsonEncoder),
    Csv(CsvEncoder),
    Arrow(ArrowEncoder),
}

impl Encoder {
    /// An encoder with the format's default options: JSON leaves nulls out, CSV has commas and no header.
    ///
    /// # Errors
    /// [`FormatError::Arrow`] if the format cannot carry a type of the schema.
    pub fn new(format: Format, schema: SchemaRef) -> Result<Self, FormatError> {
        match format {
            Format::Json => Self::json(schema, false),
            Format::Csv => Self::csv(schema, CsvOptions::default()),
            Format::Arrow => Ok(Self { form: Form::Arrow(ArrowEncoder::new(schema.clone())), schema }),
        }
    }

    /// A JSON encoder that writes nulls out if `explicit_nulls` is set.
    ///
    /// # Errors
    /// As for [`Encoder::new`].
    pub fn json(schema: SchemaRef, explicit_nulls: bool) -> Result<Self, FormatError> {
        Ok(Self { form: Form::Json(JsonEncoder::new(&schema, explicit_nulls)?), schema })
    }

    /// A CSV encoder with the given layout.
    ///
    /// # Errors
    /// As for [`Encoder::new`], and [`FormatError::Csv`] for a delimiter that is none.
    pub fn csv(schema: SchemaRef, options: CsvOptions) -> Result<Self, FormatError> {
        Ok(Self { form: Form::Csv(CsvEncoder::new(&schema, options)?), schema })
    }

    /// Encodes a batch: JSON and CSV give one payload a row, Arrow one for all rows.
    ///
    /// # Errors
    /// [`FormatError::OtherSchema`] if the batch has other columns, [`FormatError::TooLarge`] past 2 GiB.
    pub fn encode(&self, batch: &RecordBatch) -> Result<Encoded, FormatError> {
        check_schema(&self.schema, batch)?;
        let payloads = match &self.form {
            Form::Json(encoder) => encoder.encode(batch)?,
            Form::Csv(encoder) => encoder.encode(batch)?,
            Form::Arrow(encoder) => encoder.encode(batch)?,
        };
        let rows = if matches!(self.form, Form::Arrow(_)) {
            (0..payloads.len()).map(|_| 0..batch.num_rows()).collect()
        } else {
            (0..payloads.len()).map(|row| row..row + 1).collect()
        };
        Ok(Encoded { payloads, rows })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, Int32Array};

    use super::*;

    #[test]
    fn every_format_brings_a_batch_back_and_says_which_rows_went_where() {
        let numbers = Arc::new(Int32Array::from(vec![Some(1), None, Some(3)])) as ArrayRef;
        let flags = Arc::new(Int32Array::from(vec![4, 5, 6])) as ArrayRef;
        let batch = RecordBatch::try_from_iter_with_nullable([("a", numbers, true), ("b", flags, true)]).unwrap();
        for name in ["json", "csv", "arrow"] {
            let format: Format = serde_json::from_str(&format!("\"{name}\"")).unwrap();
            let encoder = Encoder::new(format, batch.schema()).unwrap();
            let encoded = encoder.encode(&batch).unwrap();
            let rows: Vec<usize> = encoded.rows.iter().cloned().flatten().collect();
            assert_eq!(rows, [0, 1, 2], "{name}");
            assert_eq!(encoded.rows.len(), encoded.payloads.len());
            let mut decoder = Decoder::new(format, batch.schema(), Policy::default(), Limits::default()).unwrap();
            let decoded = decoder.decode(&encoded.payloads).unwrap();
            assert_eq!(decoded.batch, batch, "{name}");
            assert_eq!(decoder.schema(), &batch.schema());

            let other = batch.project(&[0]).unwrap();
            let error = encoder.encode(&other).err().unwrap();
            assert!(error.to_string().contains("a Int32, b Int32"), "{error}");
        }
    }
}
