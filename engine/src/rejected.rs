//! Rows that a stage cannot process. They are data, not errors: they carry what the stage was given, so
//! that nothing is lost, and end in the `rejected` output or in the dead-letter table.

use std::sync::Arc;

use arrow::array::{ArrayRef, BinaryBuilder, RecordBatch, StringBuilder, TimestampMillisecondBuilder};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};
use arrow::json::writer::{JsonArray, WriterBuilder};

use crate::error::{Error, Result};

/// One rejected row.
#[derive(Clone, Debug, PartialEq)]
pub struct Rejected {
    /// A short constant word for the metric's label: `malformed`, `too_large`, `wrong_type` ...
    pub code: &'static str,
    /// For people: what was attempted and why it cannot be.
    pub reason: String,
    /// Where it came from, as the source tells positions; empty when no longer known.
    pub position: String,
    /// What the stage was given.
    pub given: Given,
}

/// What a stage was given.
#[derive(Clone, Debug, PartialEq)]
pub enum Given {
    /// The original bytes of a message.
    Bytes(Vec<u8>),
    /// A typed row, as a JSON object.
    Row(String),
}

impl Rejected {
    /// Bytes held; dead letters count against limits like everything else.
    pub fn bytes(&self) -> usize {
        self.reason.len()
            + self.position.len()
            + match &self.given {
                Given::Bytes(bytes) => bytes.len(),
                Given::Row(row) => row.len(),
            }
    }

    /// Rows `rows` of a batch, rejected for one reason.
    pub fn rows(batch: &RecordBatch, rows: impl IntoIterator<Item = usize>, code: &'static str, reason: &str) -> Vec<Rejected> {
        rows.into_iter()
            .map(|row| Rejected {
                code,
                reason: reason.to_owned(),
                position: crate::message::position_of(batch, row),
                given: match crate::message::payload_of(batch, row) {
                    Some(bytes) => Given::Bytes(bytes.to_vec()),
                    None => Given::Row(row_as_json(&batch.slice(row, 1))),
                },
            })
            .collect()
    }
}

/// One row as a JSON object; what cannot be written as JSON is told in words instead.
fn row_as_json(row: &RecordBatch) -> String {
    let mut writer = WriterBuilder::new().with_explicit_nulls(true).build::<_, JsonArray>(Vec::new());
    let written = writer.write(row).and_then(|()| writer.finish());
    let text = match written {
        Ok(()) => String::from_utf8_lossy(&writer.into_inner()).into_owned(),
        Err(e) => return format!("{{\"unprintable\":{:?}}}", e.to_string()),
    };
    text.trim_start_matches('[').trim_end_matches(']').to_owned()
}

/// The schema of the `rejected` output and of the dead-letter table.
pub fn schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("pipeline", DataType::Utf8, false),
        Field::new("stage", DataType::Utf8, false),
        Field::new("time", DataType::Timestamp(TimeUnit::Millisecond, Some("UTC".into())), false),
        Field::new("position", DataType::Utf8, false),
        Field::new("code", DataType::Utf8, false),
        Field::new("reason", DataType::Utf8, false),
        Field::new("bytes", DataType::Binary, true),
        Field::new("row", DataType::Utf8, true),
    ]))
}

/// Rejects as rows of that schema. `time` is in milliseconds since 1970, UTC.
///
/// # Errors
/// Fatal when Arrow refuses the columns, which would be a fault of this function.
pub fn to_batch(pipeline: &str, stage: &str, time: i64, rejected: &[Rejected]) -> Result<RecordBatch> {
    let (mut pipelines, mut stages) = (StringBuilder::new(), StringBuilder::new());
    let mut times = TimestampMillisecondBuilder::new().with_timezone("UTC");
    let (mut positions, mut codes, mut reasons) = (StringBuilder::new(), StringBuilder::new(), StringBuilder::new());
    let (mut bytes, mut rows) = (BinaryBuilder::new(), StringBuilder::new());
    for reject in rejected {
        pipelines.append_value(pipeline);
        stages.append_value(stage);
        times.append_value(time);
        positions.append_value(&reject.position);
        codes.append_value(reject.code);
        reasons.append_value(&reject.reason);
        match &reject.given {
            Given::Bytes(given) => {
                bytes.append_value(given);
                rows.append_null();
            }
            Given::Row(given) => {
                bytes.append_null();
                rows.append_value(given);
            }
        }
    }
    let columns: Vec<ArrayRef> = vec![
        Arc::new(pipelines.finish()),
        Arc::new(stages.finish()),
        Arc::new(times.finish()),
        Arc::new(positions.finish()),
        Arc::new(codes.finish()),
        Arc::new(reasons.finish()),
        Arc::new(bytes.finish()),
        Arc::new(rows.finish()),
    ];
    RecordBatch::try_new(schema(), columns).map_err(Error::fatal)
}

#[cfg(test)]
mod tests {
    use arrow::array::{AsArray, Int32Array};

    use super::*;

    #[test]
    fn a_typed_row_is_kept_as_json_and_bytes_as_bytes() {
        let batch = RecordBatch::try_from_iter([("n", Arc::new(Int32Array::from(vec![Some(1), None])) as ArrayRef)]).unwrap();
        let mut rejected = Rejected::rows(&batch, [1], "null", "n is null");
        assert_eq!(rejected[0].given, Given::Row("{\"n\":null}".into()));
        rejected.push(Rejected {
            code: "malformed",
            reason: "not JSON".into(),
            position: "t@3".into(),
            given: Given::Bytes(vec![0xff, 0]),
        });
        let table = to_batch("p", "s", 7, &rejected).unwrap();
        assert_eq!(table.column(6).as_binary::<i32>().value(1), [0xff, 0]);
        assert!(table.column(6).is_null(0) && table.column(7).is_null(1));
    }
}
