//! Every registered component through the engine's conformance suite, against real brokers and real models. The
//! invariant: a component without a case here fails the test that walks the registry.

use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::process::{Command, Stdio};
use std::sync::Arc;

use afferent_engine::component::{BuildContext, Input, OperatorBuild, OperatorPlan, PlanContext, SinkPlan, SourcePlan};
use afferent_engine::metrics::Metrics;
use afferent_engine::registry::Registry;
use afferent_engine::testing::conformance;
use afferent_engine::{Batch, Outputs, Pulled};
use afferent_models::{LazyRuntime, Repository};
use afferent_operators::ModelServer;
use arrow::array::{
    ArrayRef, AsArray, Float32Array, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMillisecondArray,
};
use arrow::datatypes::Int64Type;
use datafusion::prelude::SessionContext;
use serde_json::{Value, json};

use crate::tools::{Kafka, Mosquitto, Running, Scratch, python, root, succeed};

/// Rows of a case; few enough that mosquitto sends all of them without an acknowledgement.
const ROWS: i64 = 18;

#[tokio::test(flavor = "multi_thread")]
async fn every_source_conforms() {
    let case = Case::new();
    for name in case.registry.sources.keys().copied() {
        match name {
            "file" => case.file_source().await,
            "generate" => case.generate_source().await,
            "kafka" => case.kafka().await,
            "mqtt" => case.mqtt_source().await,
            other => panic!("the source `{other}` has no case here"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_operator_conforms() {
    let case = Case::new();
    let features: Vec<String> = (1..=9).map(|number| format!("s{number}")).collect();
    let decoded = json!({"ts": "timestamp_ms", "n": "int64!", "device": "utf8", "value": "float64"});
    for name in case.registry.operators.keys().copied() {
        match name {
            "batch" => case.operator(name, json!({"rows": 4})),
            "decode" => {
                let inputs = case.encoded();
                let config = json!({"format": "json", "schema": decoded, "keep": ["topic"], "event_time": "ts"});
                case.operator_over(name, config, &inputs);
            }
            "encode" => case.operator(name, encoding()),
            "infer" => case.operator(
                name,
                json!({"model": "shuttle", "inputs": {"readings": features}, "outputs": {"score": {"column": "score"}}}),
            ),
            "llm" => case.llm().await,
            "route" => case.operator(name, json!({"outputs": {"hot": "value > 40", "odd": "n % 2 = 1"}})),
            "sql" => {
                case.operator(name, json!("select n, upper(device) as device, 100 / (n % 5) as share from input where n > 1"))
            }
            "window" => {
                for incomplete in ["drop", "emit"] {
                    let select = ["device", "max(ts) as ts", "array_agg(n) as n", "avg(value) as mean"];
                    case.operator(
                        name,
                        json!({"by": ["device"], "rows": 4, "step": 3, "select": select, "incomplete": incomplete}),
                    );
                }
            }
            other => panic!("the operator `{other}` has no case here"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_sink_conforms() {
    let case = Case::new();
    for name in case.registry.sinks.keys().copied() {
        match name {
            "discard" | "stdout" => case.sink(name, json!({})).await,
            "file" => case.file_sink().await,
            // Together with its source: one broker, and the one reads what the other wrote.
            "kafka" => {}
            "mqtt" => case.mqtt_sink().await,
            "table" => case.table().await,
            other => panic!("the sink `{other}` has no case here"),
        }
    }
}

/// Readings numbered from `numbers.start`, of three devices.
fn readings(numbers: Range<i64>) -> RecordBatch {
    let all = || numbers.clone();
    let times = TimestampMillisecondArray::from_iter_values(all().map(|n| 1_767_225_600_000 + n * 20)).with_timezone("UTC");
    let mut columns: Vec<(String, ArrayRef)> = vec![
        ("ts".to_owned(), Arc::new(times) as ArrayRef),
        ("n".to_owned(), Arc::new(Int64Array::from_iter_values(all())) as ArrayRef),
        ("device".to_owned(), Arc::new(StringArray::from_iter_values(all().map(|n| format!("d{}", n % 3)))) as ArrayRef),
        ("value".to_owned(), Arc::new(Float64Array::from_iter_values(all().map(|n| (n * 7 % 80) as f64 + 0.5))) as ArrayRef),
    ];
    for feature in 1..=9 {
        let values = Float32Array::from_iter_values(all().map(|n| ((n * feature) % 90) as f32));
        columns.push((format!("s{feature}"), Arc::new(values) as ArrayRef));
    }
    RecordBatch::try_from_iter(columns).unwrap()
}

/// All rows of a case, in batches of unequal length.
fn batches() -> Vec<RecordBatch> {
    vec![readings(0..5), readings(5..6), readings(6..ROWS)]
}

fn encoding() -> Value {
    json!({"format": "json", "key": "device", "topic": "plant/{device}", "timestamp": "ts"})
}

fn in_order(mut numbers: Vec<i64>) -> Vec<i64> {
    numbers.sort_unstable();
    numbers
}

/// The registry, and a folder to work in.
struct Case {
    registry: Registry,
    scratch: Scratch,
    planning: PlanContext,
}

impl Case {
    fn new() -> Self {
        let mut registry = Registry::new();
        afferent_connectors::register(&mut registry);
        afferent_operators::register(&mut registry);
        let scratch = Scratch::new();
        let mut planning = PlanContext::at(scratch.path(""), scratch.data_dir());
        planning.pipeline = "conformance".to_owned();
        planning.stage = "stage".to_owned();
        let repository = Repository::new(vec![root().join("examples/shuttle-anomaly/models")]);
        planning.provide(Arc::new(ModelServer::new(repository, LazyRuntime::discovering(&scratch.data_dir()))));
        Self { registry, scratch, planning }
    }

    fn context(&self) -> BuildContext {
        let metrics = Metrics::new().unwrap().stage("conformance", "stage");
        let (pipeline, stage) = (self.planning.pipeline.clone(), self.planning.stage.clone());
        BuildContext { pipeline, stage, data_dir: self.scratch.data_dir(), run: 1, metrics }
    }

    fn source_plan(&self, name: &str, config: Value) -> SourcePlan {
        (self.registry.sources[name].plan)(&config, &self.planning).unwrap_or_else(|e| panic!("{name} {config}: {e:?}"))
    }

    fn operator_plan(&self, name: &str, config: &Value, input: &RecordBatch) -> OperatorPlan {
        let inputs = [Input { name: "input".to_owned(), schema: input.schema() }];
        (self.registry.operators[name].plan)(config, &inputs, &self.planning).unwrap_or_else(|e| panic!("{name} {config}: {e:?}"))
    }

    fn sink_plan(&self, name: &str, config: &Value) -> SinkPlan {
        let inputs = [Input { name: "input".to_owned(), schema: readings(0..0).schema() }];
        (self.registry.sinks[name].plan)(config, &inputs, &self.planning).unwrap_or_else(|e| panic!("{name} {config}: {e:?}"))
    }

    async fn source(&self, name: &str, config: Value) {
        let plan = self.source_plan(name, config.clone());
        conformance::source(&plan, &self.context()).await.unwrap_or_else(|broken| panic!("{name} {config}: {broken}"));
    }

    fn operator(&self, name: &str, config: Value) {
        self.operator_over(name, config, &batches());
    }

    fn operator_over(&self, name: &str, config: Value, inputs: &[RecordBatch]) {
        let plan = self.operator_plan(name, &config, &inputs[0]);
        conformance::operator(&plan, &self.context(), inputs).unwrap_or_else(|broken| panic!("{name} {config}: {broken}"));
    }

    async fn sink(&self, name: &str, config: Value) {
        let plan = self.sink_plan(name, &config);
        let kept = conformance::sink(&plan, &self.context(), &batches()).await;
        kept.unwrap_or_else(|broken| panic!("{name} {config}: {broken}"));
    }

    /// Every batch that a bounded source yields.
    async fn drained(&self, name: &str, config: Value) -> Vec<RecordBatch> {
        let mut source = (self.source_plan(name, config).build)(&self.context()).unwrap();
        source.open(None).await.unwrap();
        let mut batches = Vec::new();
        loop {
            match source.next().await.unwrap() {
                Pulled::Batch(batch) => batches.push(batch.into_records()),
                Pulled::End => break,
                other => panic!("{name} yields {other:?}"),
            }
        }
        source.close().await;
        batches
    }

    /// The readings as messages.
    fn encoded(&self) -> Vec<RecordBatch> {
        let plan = self.operator_plan("encode", &encoding(), &readings(0..0));
        let OperatorBuild::Compute { build, .. } = &plan.build else { panic!("`encode` waits for nobody") };
        let mut encode = build(&self.context()).unwrap();
        let mut outputs = Outputs::new();
        for batch in batches() {
            encode.process(0, Batch::new(batch), &mut outputs).unwrap();
        }
        outputs.batches().iter().map(|(_, batch)| batch.records().clone()).collect()
    }

    async fn file_source(&self) {
        let lines: String = (0..ROWS).map(|n| if n == 7 { "{\"n\":\n".to_owned() } else { format!("{{\"n\":{n}}}\n") }).collect();
        self.scratch.write("in/a.jsonl", &lines);
        self.scratch.write("in/b.jsonl", "{\"n\":100}\n{\"n\":101}\n");
        let cells: String = (0..ROWS).map(|n| format!("{n},d{}\n", n % 3)).collect();
        self.scratch.write("in/a.csv", format!("n,device\n{cells}"));
        self.source("file", json!({"path": "in/*.jsonl", "schema": {"n": "int64"}, "batch_rows": 4})).await;
        self.source("file", json!({"path": "in/a.csv", "schema": {"n": "int64", "device": "utf8"}, "batch_rows": 4})).await;
    }

    async fn generate_source(&self) {
        let time = json!({"time": {"start": "2026-01-01T00:00:00Z", "step": "20ms"}});
        let columns = json!({"n": "sequence", "value": {"normal": [20, 0.5]}, "ts": time});
        self.source("generate", json!({"rows": 40, "batch_rows": 7, "columns": columns})).await;
        self.source("generate", json!({"rows": 20, "rate": 500, "batch_rows": 7, "columns": columns})).await;
    }

    /// The sink, and then the source over what the sink wrote.
    async fn kafka(&self) {
        let kafka = Kafka::start();
        let brokers = json!([kafka.address()]);
        self.sink("kafka", json!({"brokers": brokers, "topic": "readings", "key": "device", "format": "json"})).await;
        let reading = |group: &str| {
            let topics = ["readings"];
            json!({"brokers": brokers, "topics": topics, "group": group, "stop_at_end": true, "batch_rows": 4})
        };
        self.source("kafka", reading("suite")).await;
        let mut numbers = Vec::new();
        for batch in self.drained("kafka", reading("content")).await {
            for payload in batch.column_by_name("payload").unwrap().as_binary::<i32>().iter().flatten() {
                let row: Value = serde_json::from_slice(payload).unwrap();
                numbers.push(row["n"].as_i64().unwrap());
            }
        }
        // At least once: what was written and belonged to no epoch may be there.
        let mut numbers = in_order(numbers);
        numbers.dedup();
        assert_eq!(numbers, (0..ROWS).collect::<Vec<i64>>());
    }

    async fn mqtt_source(&self) {
        let broker = Mosquitto::start("");
        for protocol in ["v5", "v3_1_1"] {
            let topic = format!("plant/{{device}}/{protocol}");
            let plan = self.source_plan(
                "mqtt",
                json!({"url": broker.url(), "topics": [topic], "protocol": protocol, "client_id": format!("suite-{protocol}")}),
            );
            let lines: String = (0..ROWS).map(|n| format!("{{\"n\":{n}}}\n")).collect();
            let send = || broker.publish_lines(&format!("plant/d1/{protocol}"), &lines);
            let kept = conformance::redelivering_source(&plan, &self.context(), ROWS as usize, send).await;
            kept.unwrap_or_else(|broken| panic!("mqtt {protocol}: {broken}"));
        }
    }

    async fn mqtt_sink(&self) {
        let broker = Mosquitto::start("max_inflight_messages 1000");
        self.sink("mqtt", json!({"url": broker.url(), "topic": "results/{n}", "format": "json", "retain": true})).await;
        let (port, count) = (broker.port.to_string(), ROWS.to_string());
        let mut listen = Command::new("mosquitto_sub");
        listen.args(["-h", "127.0.0.1", "-p", &port, "-t", "results/#", "-C", &count, "-W", "20"]);
        let heard = String::from_utf8(succeed(&mut listen).stdout).unwrap();
        let number = |line: &str| serde_json::from_str::<Value>(line).unwrap()["n"].as_i64().unwrap();
        assert_eq!(in_order(heard.lines().map(number).collect()), (0..ROWS).collect::<Vec<i64>>());
    }

    async fn llm(&self) {
        let mut mock = Running(python("llm_mock.py").arg("0").stdout(Stdio::piped()).spawn().unwrap());
        let mut line = String::new();
        BufReader::new(mock.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let port = line.trim().strip_prefix("listening on ").unwrap_or_else(|| panic!("the mock says {line:?}"));
        let config = json!({
            "url": format!("http://127.0.0.1:{port}/v1"),
            "model": "mock",
            "prompt": {"template": "Sensor {{ device }} reads {{ n }}."},
            "output": {"summary": "utf8", "urgency": "int64"},
        });
        let plan = self.operator_plan("llm", &config, &readings(0..0));
        let kept = conformance::async_operator(&plan, &self.context(), &batches()).await;
        kept.unwrap_or_else(|broken| panic!("llm: {broken}"));
    }

    async fn file_sink(&self) {
        let all: Vec<i64> = (0..ROWS).collect();
        self.sink("file", json!({"path": "out.jsonl"})).await;
        let read = self.drained("file", json!({"path": "out.jsonl", "schema": {"n": "int64"}})).await;
        assert_eq!(numbers(&read), all, "appended lines: each row once and in order");
        self.sink("file", json!({"path": "parts/", "format": "parquet"})).await;
        let read = self.drained("file", json!({"path": "parts/*.parquet"})).await;
        assert_eq!(numbers(&read), all, "parts: each row once and in order");
    }

    async fn table(&self) {
        self.sink("table", json!({"name": "readings"})).await;
        let session = SessionContext::new();
        let snapshot = afferent_connectors::table::snapshot(&self.scratch.data_dir(), "readings").await.unwrap();
        let provider = snapshot.into_provider(&session).unwrap();
        let read = session.read_table(provider).unwrap().collect().await.unwrap();
        assert_eq!(in_order(numbers(&read)), (0..ROWS).collect::<Vec<i64>>(), "each row once");
    }
}

/// The column `n`.
fn numbers(batches: &[RecordBatch]) -> Vec<i64> {
    let column = |batch: &RecordBatch| batch.column_by_name("n").unwrap().as_primitive::<Int64Type>().values().to_vec();
    batches.iter().flat_map(column).collect()
}
