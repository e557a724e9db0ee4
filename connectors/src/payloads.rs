//! What a message sink sends for a row: the `payload` column as it is, or the row encoded in a format. Shared by
//! the `mqtt` and `kafka` sinks; planning decides which, so that a row never meets a surprise.

use afferent_engine::component::Problem;
use afferent_engine::{Error, Result, message};
use afferent_formats::{Encoder, Format};
use arrow::array::{Array, BinaryArray, RecordBatch};
use arrow::datatypes::{DataType, SchemaRef};

use crate::messages::is_message_schema;

/// Makes the bytes of each row's message.
pub(crate) enum Payloads {
    /// The column that holds them already.
    Column(usize),
    /// One message a row, JSON or CSV.
    Rows(Encoder),
    /// One message a row, each an Arrow IPC stream of one row.
    Streams(Encoder),
}

impl Payloads {
    /// Decides how rows of `schema` become messages. Without a format the rows must have a binary `payload`
    /// column, as those of message sources and of `encode` have.
    pub(crate) fn plan(format: Option<Format>, schema: &SchemaRef) -> std::result::Result<Self, Problem> {
        let Some(format) = format else {
            if is_message_schema(schema)
                && let Ok(column) = schema.index_of(message::PAYLOAD)
            {
                return Ok(Self::Column(column));
            }
            return Err(Problem::new("missing-format", "", "the input has no binary column `payload`, so a format is needed")
                .help("add `format: json` (or csv, arrow), or put an `encode` stage in front"));
        };
        let encoder = Encoder::new(format, SchemaRef::clone(schema)).map_err(|e| {
            Problem::new("unsupported-type", "/format", e.to_string())
                .help("leave the column out with `sql`, or choose another format")
        })?;
        Ok(match format {
            Format::Arrow => Self::Streams(encoder),
            Format::Json | Format::Csv => Self::Rows(encoder),
        })
    }

    /// The bytes of each row's message, in order; null where the row's own `payload` is null.
    ///
    /// # Errors
    /// Fatal when the batch does not have the planned schema, or is too large to encode.
    pub(crate) fn of(&self, batch: &RecordBatch) -> Result<BinaryArray> {
        let payloads = match self {
            Self::Column(column) => batch.column(*column).as_any().downcast_ref::<BinaryArray>().cloned().ok_or_else(|| {
                Error::fatal(format!("column `payload` is {}, not {}", batch.column(*column).data_type(), DataType::Binary))
            })?,
            Self::Rows(encoder) => encoder.encode(batch).map_err(Error::fatal)?.payloads,
            Self::Streams(encoder) => {
                let mut streams = Vec::with_capacity(batch.num_rows());
                for row in 0..batch.num_rows() {
                    streams.push(encoder.encode(&batch.slice(row, 1)).map_err(Error::fatal)?.payloads);
                }
                let bytes: Vec<&[u8]> =
                    streams.iter().filter(|stream| !stream.is_empty()).map(|stream| stream.value(0)).collect();
                BinaryArray::from_vec(bytes)
            }
        };
        if payloads.len() != batch.num_rows() {
            return Err(Error::fatal(format!("{} rows were encoded as {} messages", batch.num_rows(), payloads.len())));
        }
        Ok(payloads)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, Int32Array};

    use super::*;

    fn typed() -> RecordBatch {
        RecordBatch::try_from_iter([("n", Arc::new(Int32Array::from(vec![1, 2])) as ArrayRef)]).unwrap()
    }

    #[test]
    fn typed_rows_need_a_format_and_then_give_one_message_each() {
        let batch = typed();
        assert_eq!(Payloads::plan(None, &batch.schema()).err().map(|p| p.code), Some("missing-format"));
        let json = Payloads::plan(Some(Format::Json), &batch.schema()).unwrap().of(&batch).unwrap();
        assert_eq!(json.value(1), br#"{"n":2}"#);
        let arrow = Payloads::plan(Some(Format::Arrow), &batch.schema()).unwrap().of(&batch).unwrap();
        assert_eq!(arrow.len(), 2);
    }

    #[test]
    fn messages_pass_unchanged() {
        let bytes = BinaryArray::from_vec(vec![b"\xff\x00".as_slice(), b"".as_slice()]);
        let batch = RecordBatch::try_from_iter([(message::PAYLOAD, Arc::new(bytes) as ArrayRef)]).unwrap();
        let sent = Payloads::plan(None, &batch.schema()).unwrap().of(&batch).unwrap();
        assert_eq!(sent.value(0), b"\xff\x00");
    }
}
