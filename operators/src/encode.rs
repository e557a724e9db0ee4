//! The `encode` operator: typed rows to messages, ready for a sink that sends messages. The engine calls it. The
//! invariant: what leaves has the message schema, and every row is in exactly one payload or rejected.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use afferent_engine::component::{BuildContext, Input, OperatorConfig, OperatorPlan, Output, PlanContext, Planned, Problem};
use afferent_engine::message;
use afferent_engine::{Batch, Error, Operator, Outputs, Rejected, Result};
use afferent_formats::{Encoder, Format};
use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Int32Array, Int64Array, RecordBatch, StringArray, StringBuilder,
    TimestampMillisecondArray, UInt64Array, new_null_array,
};
use arrow::compute::{can_cast_types, cast, filter_record_batch, take};
use arrow::datatypes::{DataType, Schema, SchemaRef, TimeUnit, TimestampMillisecondType};
use arrow::error::ArrowError;
use schemars::JsonSchema;
use serde::Deserialize;

use crate::columns;

/// The offset of a message that has not been written to any log yet.
const NO_OFFSET: i64 = -1;

/// Writes each row as the payload of a message. All columns go into the payload; a message has no headers, partition
/// 0 and offset -1, since no log has given it a place yet.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub struct EncodeConfig {
    /// What the payloads are: `json` and `csv` give one message a row, `arrow` one message a batch.
    pub format: Format,
    /// The column whose value is the key of the message; none without it. What is not binary is written as text.
    pub key: Option<String>,
    /// The topic, with columns in braces: `alerts/{site}/{device}`. A row with a null there is rejected.
    #[serde(default)]
    pub topic: String,
    /// The column that is the time of the message; the time of encoding without it, and where it is null.
    pub timestamp: Option<String>,
}

impl OperatorConfig for EncodeConfig {
    const NAME: &'static str = "encode";
    const EXAMPLE: &'static str = "encode: { format: json, key: device, topic: \"alerts/{device}\" }";

    fn check(&self, _: &PlanContext) -> Vec<Problem> {
        let mut problems = Vec::new();
        Template::parse(&self.topic, &Schema::empty(), &mut problems);
        // Which columns there are is not known here.
        problems.retain(|problem| problem.code == "bad-template");
        problems
    }

    fn declares(&self, _: &[Input]) -> Option<Vec<Output>> {
        Some(vec![Output { name: String::new(), schema: message::schema(&[]) }])
    }

    fn plan(self, inputs: &[Input], _: &PlanContext) -> Planned<OperatorPlan> {
        let input = columns::only(inputs, Self::NAME)?;
        let schema = &input.schema;
        let mut problems = Vec::new();
        let topic = Template::parse(&self.topic, schema, &mut problems);
        let key = column(schema, self.key.as_deref(), "/key", as_text_or_bytes, &mut problems);
        let timestamp = column(
            schema,
            self.timestamp.as_deref(),
            "/timestamp",
            |data_type| matches!(data_type, DataType::Timestamp(..)),
            &mut problems,
        );
        if self.format == Format::Arrow {
            let per_row = [("/key", key.is_some()), ("/topic", !topic.columns().is_empty()), ("/timestamp", timestamp.is_some())];
            for (path, _) in per_row.into_iter().filter(|(_, set)| *set) {
                let told = "arrow puts a whole batch into one message, which cannot take this from a row";
                problems.push(Problem::new("not-per-row", path, told).help("leave it out, or encode as json or csv"));
            }
        }
        if let Err(cause) = Encoder::new(self.format, schema.clone()) {
            problems.push(Problem::new("unsupported-type", "/format", cause.to_string()));
        }
        if !problems.is_empty() {
            return Err(problems);
        }

        let (format, rows) = (self.format, schema.clone());
        let build = move |_: &BuildContext| -> Result<Box<dyn Operator>> {
            Ok(Box::new(Encode {
                encoder: Encoder::new(format, rows.clone()).map_err(Error::fatal)?,
                schema: message::schema(&[]),
                key,
                topic: topic.clone(),
                timestamp,
            }))
        };
        Ok(OperatorPlan::stateless(message::schema(&[]), Arc::new(build)))
    }
}

fn as_text_or_bytes(data_type: &DataType) -> bool {
    matches!(data_type, DataType::Binary) || can_cast_types(data_type, &DataType::Utf8)
}

/// The index of a column that the configuration names, if it does and the column's type will do.
fn column(
    schema: &Schema,
    name: Option<&str>,
    path: &str,
    fits: fn(&DataType) -> bool,
    problems: &mut Vec<Problem>,
) -> Option<usize> {
    let found = columns::find(schema, name?, path).and_then(|index| {
        let field = schema.field(index);
        if fits(field.data_type()) {
            return Ok(index);
        }
        let told = format!("column `{}` is {}, which cannot be used here", field.name(), field.data_type());
        Err(Problem::new("wrong-type", path, told))
    });
    found.map_err(|problem| problems.push(problem)).ok()
}

/// A topic with columns in braces.
#[derive(Clone, Debug, PartialEq)]
struct Template(Vec<Part>);

#[derive(Clone, Debug, PartialEq)]
enum Part {
    Text(String),
    Column(usize),
}

impl Template {
    fn parse(text: &str, schema: &Schema, problems: &mut Vec<Problem>) -> Self {
        const PATH: &str = "/topic";
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some(open) = rest.find('{') {
            let at = text.len() - rest.len() + open;
            let Some(length) = rest[open..].find('}') else {
                let told = format!("the brace in `{text}` is not closed");
                problems.push(Problem::new("bad-template", PATH, told).help("write a column as `{name}`").at(at));
                return Self(parts);
            };
            parts.push(Part::Text(rest[..open].to_owned()));
            let name = &rest[open + 1..open + length];
            let before = problems.len();
            let found = column(schema, Some(name), PATH, as_text_or_bytes, problems);
            parts.extend(found.map(Part::Column));
            problems[before..].iter_mut().for_each(|problem| problem.offset = Some(at + 1));
            rest = &rest[open + length + 1..];
        }
        parts.push(Part::Text(rest.to_owned()));
        parts.retain(|part| *part != Part::Text(String::new()));
        Self(parts)
    }

    fn columns(&self) -> Vec<usize> {
        let column = |part: &Part| match part {
            Part::Column(index) => Some(*index),
            Part::Text(_) => None,
        };
        self.0.iter().filter_map(column).collect()
    }

    /// The text of each row; no row may have a null in a column of the template.
    fn fill(&self, rows: &RecordBatch) -> std::result::Result<StringArray, ArrowError> {
        let texts = self.columns().into_iter().map(|at| cast(rows.column(at), &DataType::Utf8));
        let texts = texts.collect::<std::result::Result<Vec<ArrayRef>, _>>()?;
        let mut filled = StringBuilder::with_capacity(rows.num_rows(), 0);
        let mut line = String::new();
        for row in 0..rows.num_rows() {
            line.clear();
            let mut texts = texts.iter();
            for part in &self.0 {
                match part {
                    Part::Text(text) => line.push_str(text),
                    Part::Column(_) => line.extend(texts.next().map(|c| c.as_string::<i32>().value(row))),
                }
            }
            filled.append_value(&line);
        }
        Ok(filled.finish())
    }
}

struct Encode {
    encoder: Encoder,
    schema: SchemaRef,
    key: Option<usize>,
    topic: Template,
    timestamp: Option<usize>,
}

impl Encode {
    /// The rows whose topic is whole; the others are rejected.
    fn addressed(&self, rows: &RecordBatch, outputs: &mut Outputs) -> Result<RecordBatch> {
        let columns = self.topic.columns();
        let nulls: Vec<_> = columns.iter().filter_map(|at| rows.column(*at).logical_nulls()).collect();
        let whole = |row: usize| nulls.iter().all(|nulls| nulls.is_valid(row));
        if nulls.iter().all(|nulls| nulls.null_count() == 0) {
            return Ok(rows.clone());
        }
        let mask: BooleanArray = (0..rows.num_rows()).map(|row| Some(whole(row))).collect();
        let kept = filter_record_batch(rows, &mask).map_err(Error::fatal)?;
        let lost = (0..rows.num_rows()).filter(|row| !whole(*row));
        let reason = "cannot make the topic of the message: a column in it is null";
        outputs.reject(Rejected::rows(rows, lost, "null_in_topic", reason));
        Ok(kept)
    }

    fn messages(&self, rows: &RecordBatch) -> Result<RecordBatch> {
        let encoded = self.encoder.encode(rows).map_err(Error::reject)?;
        let n = encoded.payloads.len();
        let per_row = [self.key(rows), self.topic(rows), self.timestamp(rows)];
        // With one message a row these are the columns as they are; else the first row of each message speaks for it.
        let first =
            (n != rows.num_rows()).then(|| UInt64Array::from_iter_values(encoded.rows.iter().map(|rows| rows.start as u64)));
        let mut columns: Vec<ArrayRef> = vec![Arc::new(encoded.payloads)];
        for column in per_row {
            let column = column.map_err(Error::reject)?;
            columns.push(match &first {
                Some(first) => take(&column, first, None).map_err(Error::fatal)?,
                None => column,
            });
        }
        columns.push(new_null_array(&message::headers_type(), n));
        columns.push(Arc::new(Int32Array::from_value(0, n)));
        columns.push(Arc::new(Int64Array::from_value(NO_OFFSET, n)));
        RecordBatch::try_new(self.schema.clone(), columns).map_err(Error::fatal)
    }

    fn key(&self, rows: &RecordBatch) -> std::result::Result<ArrayRef, ArrowError> {
        let Some(at) = self.key else {
            return Ok(new_null_array(&DataType::Binary, rows.num_rows()));
        };
        let column = rows.column(at);
        if column.data_type() == &DataType::Binary {
            return Ok(column.clone());
        }
        cast(&cast(column, &DataType::Utf8)?, &DataType::Binary)
    }

    fn topic(&self, rows: &RecordBatch) -> std::result::Result<ArrayRef, ArrowError> {
        Ok(Arc::new(self.topic.fill(rows)?))
    }

    fn timestamp(&self, rows: &RecordBatch) -> std::result::Result<ArrayRef, ArrowError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now = i64::try_from(now.as_millis()).unwrap_or(i64::MAX);
        let times = match self.timestamp {
            None => TimestampMillisecondArray::from_value(now, rows.num_rows()),
            Some(at) => {
                let column = rows.column(at);
                let zone = match column.data_type() {
                    DataType::Timestamp(_, zone) => zone.clone(),
                    _ => None,
                };
                let millis = cast(column, &DataType::Timestamp(TimeUnit::Millisecond, zone))?;
                let millis = millis.as_primitive::<TimestampMillisecondType>();
                TimestampMillisecondArray::from_iter_values(millis.iter().map(|time| time.unwrap_or(now)))
            }
        };
        Ok(Arc::new(times.with_timezone("UTC")))
    }
}

impl Operator for Encode {
    fn process(&mut self, _: usize, batch: Batch, outputs: &mut Outputs) -> Result<()> {
        let rows = self.addressed(batch.records(), outputs)?;
        if rows.num_rows() > 0 {
            outputs.emit(batch.derive(self.messages(&rows)?));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::TimestampSecondArray;

    use super::*;
    use crate::testing;

    fn rows() -> RecordBatch {
        let device: ArrayRef = Arc::new(StringArray::from(vec![Some("a"), None, Some("c")]));
        let level: ArrayRef = Arc::new(Int32Array::from(vec![1, 2, 3]));
        let ts: ArrayRef = Arc::new(TimestampSecondArray::from(vec![Some(5), Some(6), None]));
        let columns = [("device", device, true), ("level", level, false), ("ts", ts, true)];
        RecordBatch::try_from_iter_with_nullable(columns).unwrap()
    }

    #[test]
    fn each_row_is_a_message_with_key_topic_and_time() {
        let text = r#"{"format":"json","key":"level","topic":"x/{device}/{level}!","timestamp":"ts"}"#;
        let outputs = testing::run::<EncodeConfig>(text, rows());
        let messages = testing::rows(&outputs, 0).unwrap();
        assert_eq!(messages.schema(), message::schema(&[]));
        let topics: Vec<_> = messages.column(2).as_string::<i32>().iter().flatten().collect();
        assert_eq!(topics, ["x/a/1!", "x/c/3!"]);
        let keys: Vec<_> = messages.column(1).as_binary::<i32>().iter().flatten().collect();
        assert_eq!(keys, [b"1", b"3"]);
        let times = messages.column(3).as_primitive::<TimestampMillisecondType>();
        assert_eq!(times.value(0), 5_000);
        assert!(times.value(1) > 5_000);
        let payload = messages.column(0).as_binary::<i32>().value(0);
        assert!(payload.starts_with(br#"{"device":"a","level":1"#), "{payload:?}");

        let rejected = outputs.rejected();
        assert_eq!(rejected.len(), 1);
        assert_eq!(rejected[0].code, "null_in_topic");
    }

    #[test]
    fn an_arrow_message_holds_the_batch() {
        let outputs = testing::run::<EncodeConfig>(r#"{"format":"arrow","topic":"all"}"#, rows());
        let messages = testing::rows(&outputs, 0).unwrap();
        assert_eq!(messages.num_rows(), 1);
        assert_eq!(messages.column(2).as_string::<i32>().value(0), "all");
        assert!(messages.column(1).is_null(0));
    }

    #[test]
    fn every_problem_is_told_with_its_place() {
        let text = r#"{"format":"json","key":"devise","topic":"x/{lvl}/{device","timestamp":"level"}"#;
        let found = testing::problems::<EncodeConfig>(text, &rows().schema());
        let places: Vec<_> = found.iter().map(|p| (p.code, p.path.as_str(), p.offset)).collect();
        assert_eq!(
            places,
            [
                ("unknown-column", "/topic", Some(3)),
                ("bad-template", "/topic", Some(8)),
                ("unknown-column", "/key", None),
                ("wrong-type", "/timestamp", None),
            ]
        );
        let config: EncodeConfig = serde_json::from_str(text).unwrap();
        let found = config.check(&PlanContext::default());
        assert_eq!(found.iter().map(|p| (p.code, p.offset)).collect::<Vec<_>>(), [("bad-template", Some(8))]);
        let text = r#"{"format":"arrow","topic":"x/{device}"}"#;
        assert_eq!(testing::problems::<EncodeConfig>(text, &rows().schema())[0].code, "not-per-row");
    }
}
