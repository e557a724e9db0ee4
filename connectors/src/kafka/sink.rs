//! The `kafka` sink: one record for each row, by an idempotent producer. The engine writes; librdkafka batches and
//! sends in its own threads. The invariant: `prepare` returns when the brokers have confirmed every record, on all
//! replicas in sync (`acks=all`), or have refused it for good.
//!
//! librdkafka repeats what fails for a reason that passes, without limit and without changing the order
//! (`message.timeout.ms=0`, `enable.idempotence`); so a record that comes back has failed for good. When the record
//! itself is at fault it is rejected; anything else ends this run of the pipeline, which begins again at its
//! last stored epoch.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use afferent_engine::component::{BuildContext, Delivery, Input, PlanContext, Planned, Problem, SinkConfig, SinkPlan};
use afferent_engine::config::ByteSize;
use afferent_engine::{Batch, Epoch, Error, Given, Prepared, Rejected, Result, Sink, message};
use afferent_formats::Format;
use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::datatypes::DataType;
use arrow::util::display::{ArrayFormatter, FormatOptions};
use async_trait::async_trait;
use rdkafka::ClientConfig;
use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, Headers, Message as _, OwnedHeaders};
use rdkafka::producer::{BaseRecord, DeliveryResult, Producer, ProducerContext, ThreadedProducer};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tracing::debug;

use super::config::{Cluster, with_brokers};
use super::event_id::{self, EventIds};
use super::reach::{Trouble, ask, log_line};
use crate::payloads::Payloads;
use crate::refused::Refusals;
use crate::topic::suggestion;

/// Records in the producer's queue at most.
const MOST_RECORDS: &str = "100000";
/// How long `prepare` waits before it tells the engine that it is still waiting.
const PATIENCE: Duration = Duration::from_secs(30);
/// A missed wake-up costs no more than this.
const RECHECK: Duration = Duration::from_millis(100);

with_brokers! {
    /// Writes each row as a record to a Kafka topic. An epoch is stored when the brokers have confirmed every record
    /// of it. Each record has a header `afferent-event-id`, by which a reader tells a record that was written
    /// again after a crash: the source position of the row where it is known, else a number that counts the rows
    /// of this sink, each with a checksum of key and payload.
    pub struct KafkaSinkConfig {
        /// The topic to write to.
        topic: String,
        /// The column that is the record's key: text, binary, integer or boolean. Without it the key is that of the
        /// message where the input has a binary column `key`, else records have none.
        #[serde(default)]
        key: Option<String>,
        /// Columns that become headers of the record, as text. A null makes a header without a value.
        #[serde(default)]
        headers: Vec<String>,
        /// How a row becomes a record. Without it the input must have a binary column `payload`, which is sent.
        #[serde(default)]
        format: Option<Format>,
        /// How many bytes of records may wait for the brokers.
        #[serde(default = "buffer_bytes")]
        buffer_bytes: ByteSize,
    }
}

fn buffer_bytes() -> ByteSize {
    ByteSize::mib(64)
}

impl SinkConfig for KafkaSinkConfig {
    const NAME: &'static str = "kafka";
    const EXAMPLE: &'static str = "kafka: { brokers: [\"localhost:9092\"], topic: alerts, key: device, format: json }";

    fn check(&self, context: &PlanContext) -> Vec<Problem> {
        self.checked(context).2
    }

    fn plan(self, inputs: &[Input], context: &PlanContext) -> Planned<SinkPlan> {
        let (cluster, own, mut problems) = self.checked(context);
        let mut routes = Vec::new();
        for input in inputs {
            match self.route(input) {
                Ok(route) => routes.push(route),
                Err(found) => problems.extend(found),
            }
        }
        problems.dedup();
        if !problems.is_empty() {
            return Err(problems);
        }
        let routes: Arc<[Route]> = routes.into();
        Ok(SinkPlan {
            delivery: Delivery::AtLeastOnce(format!("readers tell duplicates by the header {}", event_id::HEADER)),
            commit_interval: Duration::from_millis(50),
            build: Arc::new(move |context: &BuildContext| {
                Ok(Box::new(KafkaSink {
                    cluster: cluster.clone(),
                    own: own.clone(),
                    topic: self.topic.clone(),
                    origin: format!("{}/{}", context.pipeline, context.stage),
                    routes: Arc::clone(&routes),
                    reports: Arc::default(),
                    written: 0,
                    handed_over: 0,
                    producer: None,
                }) as Box<dyn Sink>)
            }),
        })
    }
}

impl KafkaSinkConfig {
    /// The cluster, the options that are set for it, and what is wrong with the settings whatever arrives.
    fn checked(&self, context: &PlanContext) -> (Cluster, [(&'static str, String); 6], Vec<Problem>) {
        let own = [
            ("enable.idempotence", "true".to_owned()),
            ("acks", "all".to_owned()),
            ("message.timeout.ms", "0".to_owned()),
            ("queue.buffering.max.messages", MOST_RECORDS.to_owned()),
            ("queue.buffering.max.kbytes", (self.buffer_bytes.0 / 1024).clamp(1, 2_147_483_647).to_string()),
            ("client.id", format!("afferent-{}-{}", context.pipeline, context.stage)),
        ];
        let mut cluster = self.cluster();
        let mut problems = cluster.check(&own, context);
        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if self.topic.is_empty() || self.topic.len() > 249 || !self.topic.chars().all(legal) {
            problems.push(
                Problem::new("topic-name", "/topic", format!("`{}` is not the name of a Kafka topic", self.topic))
                    .help("letters, digits, `.`, `_` and `-`, up to 249 of them"),
            );
        }
        (cluster, own, problems)
    }

    fn route(&self, input: &Input) -> Planned<Route> {
        let schema = &input.schema;
        let mut problems = Vec::new();
        let mut index_of = |name: &str, path: String| match schema.index_of(name) {
            Ok(index) if has_text(schema.field(index).data_type()) => Some(index),
            Ok(index) => {
                let message = format!("column `{name}` is {}, which is no key or header", schema.field(index).data_type());
                problems.push(Problem::new("wrong-type", path, message).help("use a text, binary, integer or boolean column"));
                None
            }
            Err(_) => {
                problems.push(
                    Problem::new("unknown-column", path, format!("there is no column `{name}`")).help(suggestion(name, schema)),
                );
                None
            }
        };
        let key = match &self.key {
            Some(name) => index_of(name, "/key".to_owned()),
            None => schema.index_of(message::KEY).ok().filter(|index| *schema.field(*index).data_type() == DataType::Binary),
        };
        let headers: Vec<(String, usize)> = self
            .headers
            .iter()
            .enumerate()
            .filter_map(|(number, name)| index_of(name, format!("/headers/{number}")).map(|index| (name.clone(), index)))
            .collect();
        let payloads = Payloads::plan(self.format, schema).map_err(|found| problems.push(found));
        match payloads {
            Ok(payloads) if problems.is_empty() => Ok(Route { payloads, key, headers }),
            _ => Err(problems),
        }
    }
}

fn has_text(data_type: &DataType) -> bool {
    data_type.is_integer()
        || matches!(data_type, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View | DataType::Boolean | DataType::Binary)
}

/// How rows of one input become records.
struct Route {
    payloads: Payloads,
    key: Option<usize>,
    headers: Vec<(String, usize)>,
}

/// The bytes of each row's key or header: binary and text as they are, other types as text.
struct Texts {
    column: ArrayRef,
    formatted: Option<Vec<String>>,
}

impl Texts {
    fn of(column: &ArrayRef) -> Result<Self> {
        let formatted = match column.data_type() {
            DataType::Binary | DataType::Utf8 => None,
            _ => {
                let formatter = ArrayFormatter::try_new(column.as_ref(), &FormatOptions::default()).map_err(Error::fatal)?;
                Some((0..column.len()).map(|row| formatter.value(row).to_string()).collect())
            }
        };
        Ok(Self { column: Arc::clone(column), formatted })
    }

    fn get(&self, row: usize) -> Option<&[u8]> {
        if self.column.is_null(row) {
            return None;
        }
        match &self.formatted {
            Some(texts) => texts.get(row).map(String::as_bytes),
            None => match self.column.as_binary_opt::<i32>() {
                Some(bytes) => Some(bytes.value(row)),
                None => self.column.as_string_opt::<i32>().map(|texts| texts.value(row).as_bytes()),
            },
        }
    }
}

/// What the brokers have said, told by librdkafka's thread.
#[derive(Default)]
struct Reports {
    settled: AtomicU64,
    changed: Notify,
    refusals: Refusals,
    failure: Mutex<Option<String>>,
    trouble: Trouble,
}

impl Reports {
    /// Fatal, when a record has failed for a reason that is not its own.
    fn check(&self) -> Result<()> {
        match &*self.failure.lock().unwrap_or_else(PoisonError::into_inner) {
            None => Ok(()),
            Some(cause) => Err(Error::fatal(cause.clone())),
        }
    }
}

/// Answers librdkafka's callbacks.
struct Confirm(Arc<Reports>);

impl ClientContext for Confirm {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, line: &str) {
        log_line(level, facility, line);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.0.trouble.told(&error, reason);
    }
}

impl ProducerContext for Confirm {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if let Err((error, record)) = result {
            match record_at_fault(error) {
                Some(code) => {
                    let id = record.headers().and_then(|headers| {
                        let found = headers.iter().find(|header| header.key == event_id::HEADER)?;
                        found.value.map(|value| String::from_utf8_lossy(value).into_owned())
                    });
                    self.0.refusals.push(Rejected {
                        code,
                        reason: format!("kafka refused the record: {error}"),
                        position: id.unwrap_or_default(),
                        given: Given::Bytes(record.payload().unwrap_or_default().to_vec()),
                    });
                }
                None if is_purge(error) => debug!("a record was dropped with its producer"),
                None => {
                    let mut failure = self.0.failure.lock().unwrap_or_else(PoisonError::into_inner);
                    failure.get_or_insert_with(|| format!("kafka did not take a record for `{}`: {error}", record.topic()));
                }
            }
        }
        self.0.settled.fetch_add(1, Ordering::Release);
        self.0.changed.notify_one();
    }
}

/// The code under which a record is rejected, if the error is its own fault.
fn record_at_fault(error: &KafkaError) -> Option<&'static str> {
    match error {
        KafkaError::MessageProduction(RDKafkaErrorCode::MessageSizeTooLarge | RDKafkaErrorCode::InvalidMessageSize) => {
            Some("too_large")
        }
        KafkaError::MessageProduction(RDKafkaErrorCode::InvalidRecord | RDKafkaErrorCode::InvalidMessage) => {
            Some("invalid_record")
        }
        _ => None,
    }
}

fn is_purge(error: &KafkaError) -> bool {
    matches!(error, KafkaError::MessageProduction(RDKafkaErrorCode::PurgeQueue | RDKafkaErrorCode::PurgeInflight))
}

struct KafkaSink {
    cluster: Cluster,
    own: [(&'static str, String); 6],
    topic: String,
    origin: String,
    routes: Arc<[Route]>,
    reports: Arc<Reports>,
    /// Rows that this sink has ever written: what the event ids count.
    written: u64,
    /// Records that the producer has taken in this run.
    handed_over: u64,
    producer: Option<ThreadedProducer<Confirm>>,
}

/// What is stored with an epoch.
#[derive(Default, Serialize, Deserialize)]
struct Stored {
    /// Rows written up to the epoch.
    written: u64,
}

impl KafkaSink {
    /// Hands one record to the producer, waiting while its queue is full. Returns the reason if it is at fault.
    async fn send(&mut self, record: &Outgoing<'_>) -> Result<Option<(&'static str, String)>> {
        loop {
            self.reports.check()?;
            let Some(producer) = &self.producer else { return Err(Error::fatal("the kafka sink was used before it was opened")) };
            // The producer takes the headers only with the record, so each attempt has its own.
            match produce(producer, &self.topic, record) {
                Ok(()) => {
                    self.handed_over += 1;
                    return Ok(None);
                }
                Err(KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull)) => {
                    let _ = tokio::time::timeout(RECHECK, self.reports.changed.notified()).await;
                }
                Err(error) => match record_at_fault(&error) {
                    Some(code) => return Ok(Some((code, format!("kafka refused the record: {error}")))),
                    None => return Err(Error::fatal(error).context(format!("producing to `{}`", self.topic))),
                },
            }
        }
    }
}

/// A record before it is handed over.
struct Outgoing<'a> {
    key: Option<&'a [u8]>,
    payload: Option<&'a [u8]>,
    id: &'a str,
    headers: Vec<(&'a str, Option<&'a [u8]>)>,
}

fn produce(producer: &ThreadedProducer<Confirm>, topic: &str, outgoing: &Outgoing<'_>) -> std::result::Result<(), KafkaError> {
    let mut headers = OwnedHeaders::new_with_capacity(outgoing.headers.len() + 1);
    headers = headers.insert(Header { key: event_id::HEADER, value: Some(outgoing.id) });
    for (key, value) in &outgoing.headers {
        headers = headers.insert(Header { key, value: *value });
    }
    let mut record: BaseRecord<'_, [u8], [u8]> = BaseRecord::to(topic).headers(headers);
    record.key = outgoing.key;
    record.payload = outgoing.payload;
    producer.send(record).map_err(|(error, _)| error)
}

#[async_trait]
impl Sink for KafkaSink {
    async fn open(&mut self, last: Option<(Epoch, &Prepared)>) -> Result<()> {
        if self.producer.is_some() {
            return Ok(());
        }
        let stored = match last {
            None => Stored::default(),
            Some((epoch, prepared)) => serde_json::from_value(prepared.clone())
                .map_err(|e| Error::fatal(e).context(format!("reading what was prepared for epoch {epoch}")))?,
        };
        let config = self.cluster.client(&self.own)?;
        let (reports, topic) = (Arc::clone(&self.reports), self.topic.clone());
        let producer = tokio::task::spawn_blocking(move || connect(&config, reports, &topic)).await.map_err(Error::fatal)??;
        self.written = stored.written;
        self.producer = Some(producer);
        Ok(())
    }

    async fn write(&mut self, input: usize, batch: Batch) -> Result<Vec<Rejected>> {
        let routes = Arc::clone(&self.routes);
        let route = routes.get(input).ok_or_else(|| Error::fatal(format!("there is no input number {input}")))?;
        let records: RecordBatch = batch.into_records();
        let payloads = route.payloads.of(&records)?;
        let keys = route.key.map(|index| Texts::of(records.column(index))).transpose()?;
        let columns = route.headers.iter().map(|(_, index)| Texts::of(records.column(*index))).collect::<Result<Vec<_>>>()?;
        let origin = self.origin.clone();
        let ids = EventIds::of(&origin, &records);
        let mut rejected = Vec::new();
        let mut id = String::new();
        for row in 0..records.num_rows() {
            let key = keys.as_ref().and_then(|keys| keys.get(row));
            let payload = (!payloads.is_null(row)).then(|| payloads.value(row));
            let number = self.written + row as u64;
            ids.write(&mut id, row, number, key, payload.unwrap_or_default());
            let headers =
                route.headers.iter().zip(&columns).map(|((name, _), column)| (name.as_str(), column.get(row))).collect();
            let outgoing = Outgoing { key, payload, id: &id, headers };
            if let Some((code, reason)) = self.send(&outgoing).await? {
                rejected.extend(Rejected::rows(&records, [row], code, &reason));
            }
        }
        // Only now: a batch that is written again must get the same numbers.
        self.written += records.num_rows() as u64;
        rejected.extend(self.reports.refusals.take());
        Ok(rejected)
    }

    async fn prepare(&mut self, _: Epoch) -> Result<(Prepared, Vec<Rejected>)> {
        let confirmed = async {
            while self.reports.settled.load(Ordering::Acquire) < self.handed_over {
                let _ = tokio::time::timeout(RECHECK, self.reports.changed.notified()).await;
            }
        };
        let in_time = tokio::time::timeout(PATIENCE, confirmed).await.is_ok();
        self.reports.check()?;
        if !in_time {
            let open = self.handed_over - self.reports.settled.load(Ordering::Acquire);
            return Err(Error::retry(format!("the brokers have not confirmed {open} records for {PATIENCE:?}")));
        }
        let prepared = serde_json::to_value(Stored { written: self.written }).map_err(Error::fatal)?;
        Ok((prepared, self.reports.refusals.take()))
    }

    async fn finish(&mut self, _: Epoch, _: &Prepared) -> Result<()> {
        Ok(())
    }

    async fn close(&mut self) -> Result<()> {
        if let Some(producer) = self.producer.take() {
            // Joins the polling thread, which may take a moment.
            tokio::task::spawn_blocking(move || drop(producer)).await.map_err(Error::fatal)?;
        }
        Ok(())
    }
}

/// Makes the producer and asks for the topic, so that an unreachable broker is told when the pipeline starts.
fn connect(config: &ClientConfig, reports: Arc<Reports>, topic: &str) -> Result<ThreadedProducer<Confirm>> {
    let producer: ThreadedProducer<Confirm> = config
        .create_with_context(Confirm(Arc::clone(&reports)))
        .map_err(|e| Error::fatal(e).context("making a kafka producer"))?;
    // The producer has a thread that hears of trouble.
    ask(producer.client(), topic, &reports.trouble, || {})?;
    Ok(producer)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use arrow::array::{Int32Array, StringArray};
    use arrow::datatypes::{Field, Schema, SchemaRef};

    use super::*;

    fn typed() -> SchemaRef {
        Arc::new(Schema::new(vec![
            Field::new("device", DataType::Utf8, false),
            Field::new("line", DataType::Int32, true),
            Field::new("score", DataType::Float32, true),
        ]))
    }

    fn inputs(schema: SchemaRef) -> Vec<Input> {
        vec![Input { name: "scored".into(), schema }]
    }

    fn planned(json: &str, schema: SchemaRef) -> Planned<SinkPlan> {
        serde_json::from_str::<KafkaSinkConfig>(json).unwrap().plan(&inputs(schema), &PlanContext::default())
    }

    fn problems(json: &str) -> Vec<String> {
        planned(json, typed()).err().unwrap_or_default().into_iter().map(|problem| problem.path).collect()
    }

    #[test]
    fn the_example_is_planned() {
        let mut stage: BTreeMap<String, KafkaSinkConfig> = serde_saphyr::from_str(KafkaSinkConfig::EXAMPLE).unwrap();
        let plan =
            stage.remove("kafka").unwrap().plan(&inputs(typed()), &PlanContext::default()).map_err(|p| format!("{p:?}")).unwrap();
        assert!(matches!(plan.delivery, Delivery::AtLeastOnce(text) if text.contains("afferent-event-id")));
    }

    #[test]
    fn columns_are_checked_against_the_rows() {
        let base = r#""brokers":["h:1"],"topic":"t","format":"json""#;
        assert!(planned(&format!(r#"{{{base},"key":"device","headers":["line"]}}"#), typed()).is_ok());
        assert_eq!(
            problems(&format!(r#"{{{base},"key":"devise","headers":["score","x"]}}"#)),
            ["/key", "/headers/0", "/headers/1"]
        );
        assert_eq!(problems(r#"{"brokers":["h:1"],"topic":"a b"}"#), ["/topic", ""]);
        assert_eq!(problems(&format!(r#"{{{base},"options":{{"acks":"0"}}}}"#)), ["/options/acks"]);
        assert!(planned(r#"{"brokers":["h:1"],"topic":"t"}"#, message::schema(&[])).is_ok());
    }

    #[test]
    fn only_a_record_at_fault_is_rejected() {
        assert_eq!(record_at_fault(&KafkaError::MessageProduction(RDKafkaErrorCode::MessageSizeTooLarge)), Some("too_large"));
        assert_eq!(record_at_fault(&KafkaError::MessageProduction(RDKafkaErrorCode::TopicAuthorizationFailed)), None);
        assert!(is_purge(&KafkaError::MessageProduction(RDKafkaErrorCode::PurgeQueue)));
    }

    #[test]
    fn keys_and_headers_are_bytes_or_text() {
        let text = Texts::of(&(Arc::new(StringArray::from(vec![Some("m1"), None])) as ArrayRef)).unwrap();
        assert_eq!((text.get(0), text.get(1)), (Some(b"m1".as_slice()), None));
        let number = Texts::of(&(Arc::new(Int32Array::from(vec![Some(-7), None])) as ArrayRef)).unwrap();
        assert_eq!((number.get(0), number.get(1)), (Some(b"-7".as_slice()), None));
    }
}
