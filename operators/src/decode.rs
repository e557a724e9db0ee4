//! The `decode` operator: payloads to typed rows under a declared schema. The engine calls it behind a source of
//! messages. The invariant: every payload becomes rows or a reject with its bytes, and disturbs no other.

use std::sync::Arc;

use afferent_engine::component::{BuildContext, Input, OperatorConfig, OperatorPlan, Output, PlanContext, Planned, Problem};
use afferent_engine::message;
use afferent_engine::{Batch, Error, Given, Operator, Outputs, Rejected, Result};
use afferent_formats::{Declaration, Decoded, Decoder, Format, FormatError, Limits, Malformed, Missing, Policy, Unknown};
use arrow::array::{ArrayRef, AsArray, RecordBatch, RecordBatchOptions, UInt32Array};
use arrow::compute::take_arrays;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::columns;

/// Reads the `payload` of messages into typed columns. Levels captured from the topic, and every other column that is
/// not part of the message itself, are carried along ahead of them. A payload that cannot be read, or has a value of
/// another type, leaves through `rejected` with its bytes; its neighbours are not touched by that.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub struct DecodeConfig {
    /// What the payloads are: `json` (an object, or an array of objects), `csv` (records without a header) or `arrow`
    /// (an IPC stream).
    pub format: Format,
    /// The columns and their types, in order.
    pub schema: Declaration,
    /// The column that says when something happened; a timestamp.
    pub event_time: Option<String>,
    /// A declared field that a record lacks: `null` makes the column null (unless it is required), `reject` rejects.
    #[serde(default)]
    pub missing: Missing,
    /// A field that is not declared: `ignore` leaves it out, `reject` rejects the record.
    #[serde(default)]
    pub unknown: Unknown,
    /// Columns of the message to carry along, such as `topic` or `timestamp`.
    #[serde(default)]
    pub keep: Vec<String>,
}

impl DecodeConfig {
    /// Which input columns are carried along, in the order of the input.
    fn carried(&self, input: &Schema, problems: &mut Vec<Problem>) -> Vec<usize> {
        for (index, name) in self.keep.iter().enumerate() {
            let path = format!("/keep/{index}");
            match columns::find(input, name, &path) {
                Err(problem) => problems.push(problem),
                Ok(_) if self.keep[..index].contains(name) => problems
                    .push(Problem::new("duplicate-column", path, format!("column `{name}` is named twice")).help("name it once")),
                Ok(_) => {}
            }
        }
        let kept = |name: &String| self.keep.contains(name) || !message::COLUMNS.contains(&name.as_str());
        let fields = input.fields().iter().enumerate();
        fields.filter(|(_, field)| kept(field.name())).map(|(index, _)| index).collect()
    }

    fn decoder(&self, declared: &SchemaRef) -> std::result::Result<Decoder, FormatError> {
        let policy = Policy { missing: self.missing, unknown: self.unknown, malformed: Malformed::Reject };
        // How large a payload may be is the source's business: what it let through is decoded.
        let limits = Limits { max_payload: usize::MAX, ..Limits::default() };
        Decoder::new(self.format, declared.clone(), policy, limits)
    }

    fn check_event_time(&self, declared: &Schema, problems: &mut Vec<Problem>) {
        let Some(name) = &self.event_time else {
            return;
        };
        match columns::find(declared, name, "/event_time") {
            Err(problem) => problems.push(problem),
            Ok(index) => {
                let data_type = declared.field(index).data_type();
                if !matches!(data_type, DataType::Timestamp(..)) {
                    problems.push(
                        Problem::new(
                            "wrong-type",
                            "/event_time",
                            format!("the event time `{name}` is declared as {data_type}, which is no timestamp"),
                        )
                        .help(format!("declare it as `{name}: timestamp_ms`")),
                    );
                }
            }
        }
    }
}

impl OperatorConfig for DecodeConfig {
    const NAME: &'static str = "decode";
    const EXAMPLE: &'static str = "decode: { format: json, schema: { ts: timestamp_ms, ax: float32 }, event_time: ts }";

    fn check(&self, _: &PlanContext) -> Vec<Problem> {
        let (declared, mut problems) = (self.schema.to_arrow(), Vec::new());
        self.check_event_time(&declared, &mut problems);
        if let Err(cause) = self.decoder(&declared) {
            problems.push(Problem::new("unsupported-type", "/schema", cause.to_string()));
        }
        problems
    }

    fn declares(&self, inputs: &[Input]) -> Option<Vec<Output>> {
        let [input] = inputs else { return None };
        let (declared, mut problems) = (self.schema.to_arrow(), Vec::new());
        let carried = self.carried(&input.schema, &mut problems);
        let twice = carried.iter().any(|at| declared.column_with_name(input.schema.field(*at).name()).is_some());
        let known = problems.is_empty() && !twice && is_messages(&input.schema);
        known.then(|| vec![Output { name: String::new(), schema: together(&input.schema, &carried, &declared) }])
    }

    fn plan(self, inputs: &[Input], context: &PlanContext) -> Planned<OperatorPlan> {
        let input = columns::only(inputs, Self::NAME)?;
        let mut problems = self.check(context);
        if !is_messages(&input.schema) {
            let told = format!("`{}` has no binary column `payload` to decode", input.name);
            problems.push(Problem::new("not-messages", "", told).help(
                "put `decode` directly behind a source of messages (`mqtt`, `kafka`); files and tables give typed rows \
                 already",
            ));
        }
        let declared = self.schema.to_arrow();
        let carried = self.carried(&input.schema, &mut problems);
        for field in declared.fields() {
            if carried.iter().any(|at| input.schema.field(*at).name() == field.name()) {
                let path = format!("/schema/{}", field.name().replace('~', "~0").replace('/', "~1"));
                let told = format!("column `{}` is declared, and carried along from `{}` too", field.name(), input.name);
                problems.push(
                    Problem::new("duplicate-column", path, told)
                        .help("rename the captured topic level, or take the field out of the schema"),
                );
            }
        }
        let payload = input.schema.index_of(message::PAYLOAD).ok();
        let (Some(payload), true) = (payload, problems.is_empty()) else {
            return Err(problems);
        };

        let schema = together(&input.schema, &carried, &declared);
        let output = schema.clone();
        let build = move |_: &BuildContext| -> Result<Box<dyn Operator>> {
            Ok(Box::new(Decode {
                decoder: self.decoder(&declared).map_err(Error::fatal)?,
                payload,
                carried: carried.clone(),
                schema: output.clone(),
            }))
        };
        Ok(OperatorPlan::stateless(schema, Arc::new(build)))
    }
}

fn is_messages(input: &Schema) -> bool {
    input.field_with_name(message::PAYLOAD).is_ok_and(|payload| payload.data_type() == &DataType::Binary)
}

/// What leaves: the columns that are carried along, and those that are declared.
fn together(input: &Schema, carried: &[usize], declared: &Schema) -> SchemaRef {
    let ahead = carried.iter().map(|at| Arc::new(input.field(*at).clone()));
    let fields: Vec<Arc<Field>> = ahead.chain(declared.fields().iter().cloned()).collect();
    Arc::new(Schema::new(fields))
}

struct Decode {
    decoder: Decoder,
    payload: usize,
    carried: Vec<usize>,
    schema: SchemaRef,
}

impl Decode {
    /// The decoded rows with the columns that are carried along, once for each row that a payload gave.
    fn rows(&self, messages: &RecordBatch, decoded: &Decoded) -> Result<RecordBatch> {
        let mut columns: Vec<ArrayRef> = self.carried.iter().map(|at| messages.column(*at).clone()).collect();
        // Most often each payload gave one row: then nothing needs to be copied.
        let origin = &decoded.origin;
        let one_each = origin.len() == messages.num_rows() && origin.iter().zip(0..).all(|(payload, row)| *payload == row);
        if !one_each && !columns.is_empty() {
            let origin = UInt32Array::from(origin.clone());
            columns = take_arrays(&columns, &origin, None).map_err(Error::reject)?;
        }
        columns.extend(decoded.batch.columns().iter().cloned());
        let options = RecordBatchOptions::new().with_row_count(Some(decoded.batch.num_rows()));
        RecordBatch::try_new_with_options(self.schema.clone(), columns, &options).map_err(Error::fatal)
    }
}

impl Operator for Decode {
    fn process(&mut self, _: usize, batch: Batch, outputs: &mut Outputs) -> Result<()> {
        let messages = batch.records();
        let Some(payloads) = messages.column(self.payload).as_binary_opt::<i32>() else {
            return Err(Error::fatal("the payload column of a batch is not binary"));
        };
        let decoded = self.decoder.decode(payloads).map_err(Error::reject)?;
        outputs.emit(batch.derive(self.rows(messages, &decoded)?));
        outputs.reject(decoded.rejected.into_iter().map(|rejected| {
            let row = rejected.payload as usize;
            Rejected {
                code: rejected.fault.code(),
                reason: rejected.reason,
                position: message::position_of(messages, row),
                given: Given::Bytes(message::payload_of(messages, row).unwrap_or_default().to_vec()),
            }
        }));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::{BinaryArray, Int32Array, Int64Array, StringArray, TimestampMillisecondArray, new_null_array};
    use arrow::datatypes::Float32Type;

    use super::*;
    use crate::testing;

    fn messages(payloads: &[&[u8]]) -> RecordBatch {
        let n = payloads.len();
        let columns: Vec<ArrayRef> = vec![
            Arc::new(BinaryArray::from_iter_values(payloads)),
            new_null_array(&DataType::Binary, n),
            Arc::new(StringArray::from(vec!["plant/a/vibration"; n])),
            Arc::new(TimestampMillisecondArray::from(vec![7; n]).with_timezone("UTC")),
            new_null_array(&message::headers_type(), n),
            Arc::new(Int32Array::from(vec![0; n])),
            Arc::new(Int64Array::from_iter_values(100..100 + n as i64)),
            Arc::new(StringArray::from_iter_values((0..n).map(|i| format!("d{i}")))),
        ];
        RecordBatch::try_new(message::schema(&["device".to_owned()]), columns).unwrap()
    }

    #[test]
    fn bad_payloads_leave_with_their_bytes_and_the_rest_flows() {
        let text = r#"{"format":"json","schema":{"ax":"float32"},"keep":["topic"]}"#;
        let payloads: [&[u8]; 7] = [
            br#"{"ax":0.5}"#,
            b"{broken",
            br#"[{"ax":1.5},{"ax":2.5}]"#,
            b"",
            br#"{"ax":"text"}"#,
            &[0xff, 0x00],
            br#"{"ax":3.5,"more":1}"#,
        ];
        let outputs = testing::run::<DecodeConfig>(text, messages(&payloads));

        let rows = testing::rows(&outputs, 0).unwrap();
        let names: Vec<_> = rows.schema().fields().iter().map(|f| f.name().clone()).collect();
        assert_eq!(names, ["topic", "device", "ax"]);
        let devices: Vec<_> = rows.column(1).as_string::<i32>().iter().flatten().collect();
        assert_eq!(devices, ["d0", "d2", "d2", "d6"]);
        assert_eq!(rows.column(2).as_primitive::<Float32Type>().values(), &[0.5, 1.5, 2.5, 3.5]);

        let rejected = outputs.rejected();
        let positions: Vec<_> = rejected.iter().map(|r| r.position.as_str()).collect();
        assert_eq!(positions, [101, 103, 104, 105].map(|at| format!("plant/a/vibration/0@{at}")));
        assert!(rejected.iter().all(|r| !r.reason.is_empty()));
        let codes: Vec<_> = rejected.iter().map(|r| r.code).collect();
        assert_eq!(codes, ["malformed", "malformed", "wrong_type", "malformed"]);
        assert_eq!(rejected[0].given, Given::Bytes(b"{broken".to_vec()));
        assert_eq!(rejected[3].given, Given::Bytes(vec![0xff, 0x00]));
    }

    #[test]
    fn planning_gives_the_schema() {
        let text = r#"{"format":"json","schema":{"ts":"timestamp_ms","ax":"float32"},"event_time":"ts"}"#;
        let schema = message::schema(&["device".to_owned()]);
        let plan = testing::plan::<DecodeConfig>(text, &schema).ok().unwrap();
        let names: Vec<_> = plan.outputs[0].schema.fields().iter().map(|f| f.name().clone()).collect();
        assert_eq!(names, ["device", "ts", "ax"]);
    }

    #[test]
    fn a_faulty_event_time_hides_no_column() {
        let config = |keep: &str| -> DecodeConfig {
            let text = format!(r#"{{"format":"json","schema":{{"ts":"timestamp_ms"}},"event_time":"time","keep":["{keep}"]}}"#);
            serde_json::from_str(&text).unwrap()
        };
        let input = Input { name: "input".into(), schema: message::schema(&["device".to_owned()]) };
        let declared = config("topic").declares(std::slice::from_ref(&input)).unwrap();
        let names: Vec<_> = declared[0].schema.fields().iter().map(|field| field.name().clone()).collect();
        assert_eq!(names, ["topic", "device", "ts"]);
        assert!(config("topick").declares(&[input]).is_none());
        let found = config("topic").check(&PlanContext::default());
        assert_eq!(found.iter().map(|p| p.path.as_str()).collect::<Vec<_>>(), ["/event_time"]);
    }

    #[test]
    fn every_problem_is_told_with_its_place() {
        let text = r#"{"format":"json","schema":{"ts":"int64","device":"utf8"},"event_time":"ts",
            "keep":["topick","topic","topic"]}"#;
        let found = testing::problems::<DecodeConfig>(text, &message::schema(&["device".to_owned()]));
        let places: Vec<_> = found.iter().map(|p| (p.code, p.path.as_str())).collect();
        assert_eq!(
            places,
            [
                ("wrong-type", "/event_time"),
                ("unknown-column", "/keep/0"),
                ("duplicate-column", "/keep/2"),
                ("duplicate-column", "/schema/device"),
            ]
        );
        assert!(found[1].help.as_ref().unwrap().contains("did you mean `topic`?"));

        let typed = Arc::new(Schema::new(vec![Field::new("ax", DataType::Float32, true)]));
        let text = r#"{"format":"json","schema":{"ts":"timestamp_ms"}}"#;
        let found = testing::problems::<DecodeConfig>(text, &typed);
        assert_eq!(found[0].code, "not-messages");
        let text = r#"{"format":"json","schema":{"ts":"timestamp_ms"},"event_time":"tss"}"#;
        let found = testing::problems::<DecodeConfig>(text, &message::schema(&[]));
        assert_eq!(found[0].path, "/event_time");
    }
}
