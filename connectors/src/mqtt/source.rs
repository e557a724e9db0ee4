//! The `mqtt` source: rows of the message schema, with captured topic levels as columns. The engine pulls; a task
//! keeps the connection. The invariant: a message is acknowledged (PUBACK) when everything that came of it is
//! durable, in the order of arrival, and only on the connection on which it came.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use afferent_engine::component::{BuildContext, PlanContext, Planned, Problem, Replay, SourceConfig, SourcePlan};
use afferent_engine::config::{ByteSize, Interval};
use afferent_engine::{Batch, Error, Given, Position, Pulled, Rejected, Result, Source, message};
use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::{Instrument, info, warn};

use super::ack::{Mark, USUAL_WINDOW};
use super::config::{Protocol, Qos, refuse_exactly_once, with_connection};
use super::inbox::{Inbox, Window};
use super::subscriber::{Command, Standing, Subscriber};
use crate::messages::{Message, Messages};
use crate::topic::Patterns;

/// Bytes after which a batch is handed on.
const BATCH_BYTES: usize = 4 * 1024 * 1024;
/// How long the last acknowledgements and the goodbye may take.
const GOODBYE: Duration = Duration::from_secs(5);

with_connection! {
    /// Reads messages from an MQTT broker. Each message is a row: `payload`, `key` (always null), `topic`, `timestamp`
    /// (of its arrival), `headers` (the user properties of MQTT 5), `partition` (always 0) and `offset` (a number
    /// that grows from message to message, across restarts too), and a text column for each level that the topic
    /// patterns capture.
    ///
    /// At QoS 1 a message is acknowledged when everything that came of it is durable, and the broker sends it
    /// again when the pipeline stops before. For that it keeps a session under the client id, as long as
    /// `session_expiry` says and its own limits on queued messages allow.
    pub struct MqttSourceConfig {
        /// Topics to subscribe to: text, `+` for any level, `#` for all remaining ones, and `{name}` for a level that
        /// becomes a column. All topics of a source capture the same names.
        topics: Vec<String>,
        /// How messages are delivered to us.
        #[serde(default)]
        qos: Qos,
        /// How long the broker keeps our session while we are away (MQTT 5; in 3.1.1 the broker decides).
        #[serde(default = "session_expiry")]
        session_expiry: Interval,
        /// How many messages may wait here, and how many the broker may send without our acknowledgement (MQTT 5).
        #[serde(default = "receive_maximum")]
        receive_maximum: u16,
        /// The longest payload; longer messages are rejected, with their bytes.
        #[serde(default = "max_payload")]
        max_payload: ByteSize,
        /// How many bytes of messages may wait here for the pipeline.
        #[serde(default = "buffer_bytes")]
        buffer_bytes: ByteSize,
        /// Most rows in one batch.
        #[serde(default = "batch_rows")]
        batch_rows: u32,
        /// What happens to messages at QoS 0 when the pipeline is behind; each that is dropped is counted
        /// under the reason `qos0_overload`.
        #[serde(default)]
        overload: Overload,
    }
}

/// What gives way when messages at QoS 0 arrive faster than the pipeline takes them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Overload {
    /// The connection is not read; the broker decides what to drop, and may close it.
    Block,
    /// The message that has waited longest is dropped.
    DropOldest,
    /// The message that has just arrived is dropped.
    #[default]
    DropNewest,
}

fn session_expiry() -> Interval {
    Interval::secs(24 * 3600)
}

fn receive_maximum() -> u16 {
    1024
}

fn max_payload() -> ByteSize {
    ByteSize::mib(16)
}

fn buffer_bytes() -> ByteSize {
    ByteSize::mib(32)
}

fn batch_rows() -> u32 {
    1024
}

/// Milliseconds since 1970, UTC.
pub(super) fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

impl SourceConfig for MqttSourceConfig {
    const NAME: &'static str = "mqtt";
    const EXAMPLE: &'static str =
        "mqtt: { url: \"mqtt://localhost:1883\", topics: [\"plant/{site}/{device}/vibration\"], qos: at_least_once }";

    fn declares(&self) -> Option<SchemaRef> {
        let patterns = Patterns::parse(&self.topics, "/topics").ok()?;
        Some(message::schema(patterns.captures()))
    }

    fn plan(self, context: &PlanContext) -> Planned<SourcePlan> {
        let mut connection = self.connection();
        let mut problems = connection.check(context);
        problems.extend(refuse_exactly_once(self.qos));
        for (number, path) in [(u64::from(self.receive_maximum), "/receive_maximum"), (u64::from(self.batch_rows), "/batch_rows")]
        {
            if number == 0 {
                problems.push(Problem::new("bad-value", path, "it must be at least 1"));
            }
        }
        if self.max_payload.0 == 0 || self.max_payload > ByteSize::mib(256) {
            problems.push(Problem::new(
                "bad-value",
                "/max_payload",
                format!("{} is not between 1B and 256MiB, which the protocol carries", self.max_payload),
            ));
        }
        let patterns = Patterns::parse(&self.topics, "/topics").map_err(|found| problems.extend(found)).unwrap_or_default();
        if !problems.is_empty() {
            return Err(problems);
        }
        let kept = self.qos != Qos::AtMostOnce;
        let in_flight = match (kept, self.protocol) {
            (false, _) => None,
            (true, Protocol::V311) => Some((
                USUAL_WINDOW as u64,
                "mosquitto sends 20 unacknowledged messages by default (`max_inflight_messages`)".to_owned(),
            )),
            (true, Protocol::V5) => {
                Some((u64::from(self.receive_maximum), "`receive_maximum` of this source; the broker may send fewer".to_owned()))
            }
        };
        let replay = if kept {
            Replay::Redelivered(
                "the broker redelivers what was not acknowledged, as long as its session and queue last".to_owned(),
            )
        } else {
            Replay::Lost("messages at QoS 0 are not acknowledged, so the broker forgets what it has sent".to_owned())
        };
        let schema = message::schema(patterns.captures());
        let row_schema = Arc::clone(&schema);
        Ok(SourcePlan {
            schema,
            replay,
            bounded: false,
            in_flight,
            moves: None,
            build: Arc::new(move |context: &BuildContext| {
                let dial = connection.dial(kept.then_some(self.session_expiry.0), self.receive_maximum, 1)?;
                let inbox = Arc::new(Inbox::new(usize::from(self.receive_maximum), self.buffer_bytes.as_usize()));
                let (commands, orders) = watch::channel(Command::default());
                let (standing, reports) = watch::channel(Standing::default());
                let subscriber = Subscriber {
                    dial,
                    filters: patterns.filters().map(str::to_owned).collect(),
                    qos: self.qos,
                    overload: self.overload,
                    inbox: Arc::clone(&inbox),
                    commands: orders,
                    standing,
                    dropped: context.dropped("qos0_overload"),
                    session_expected: context.run > 1,
                    subscribed: false,
                    // No two messages of a data directory get the same number: it begins with the clock, with
                    // room for a million messages a second, and stays below 2^53.
                    sequence: u64::try_from(now()).unwrap_or_default() << 10,
                };
                Ok(Box::new(MqttSource {
                    subscriber: Some(subscriber),
                    task: None,
                    inbox,
                    commands,
                    reports,
                    messages: Messages::new(Arc::clone(&row_schema), patterns.captures().len()),
                    patterns: patterns.clone(),
                    max_payload: self.max_payload.as_usize(),
                    batch_rows: self.batch_rows as usize,
                    acknowledges: kept,
                    emitted: Mark::default(),
                    committed: Mark::default(),
                    window: Window::default(),
                }) as Box<dyn Source>)
            }),
        })
    }
}

struct MqttSource {
    /// Until the first `open`.
    subscriber: Option<Subscriber>,
    task: Option<JoinHandle<()>>,
    inbox: Arc<Inbox>,
    commands: watch::Sender<Command>,
    reports: watch::Receiver<Standing>,
    messages: Messages,
    patterns: Patterns,
    max_payload: usize,
    batch_rows: usize,
    acknowledges: bool,
    emitted: Mark,
    committed: Mark,
    window: Window,
}

#[async_trait]
impl Source for MqttSource {
    async fn open(&mut self, from: Option<&Position>) -> Result<()> {
        if let Some(subscriber) = self.subscriber.take() {
            if let Some(Position(position)) = from {
                info!(%position, "an mqtt source cannot go back; the broker sends again what was not acknowledged");
            }
            self.task = Some(tokio::spawn(subscriber.run().in_current_span()));
        }
        // The task goes on trying whatever becomes of this call; a second call waits for its next report.
        loop {
            self.reports.changed().await.map_err(|_| Error::fatal("the mqtt connection task has ended"))?;
            match self.reports.borrow_and_update().clone() {
                Standing::Waiting => {}
                Standing::Up => return Ok(()),
                Standing::Down { cause, refused: true, .. } => return Err(Error::fatal(cause)),
                Standing::Down { cause, refused: false, .. } => return Err(Error::retry(cause)),
            }
        }
    }

    async fn next(&mut self) -> Result<Pulled> {
        // Nothing is awaited behind this line, so that a dropped future has taken nothing.
        let (arrivals, window) = self.inbox.take(self.batch_rows, BATCH_BYTES).await.map_err(Error::fatal)?;
        self.window = window;
        let ingest = arrivals.first().map_or_else(Instant::now, |arrival| arrival.ingest);
        let mut rejected = Vec::new();
        for arrival in &arrivals {
            self.emitted = arrival.mark;
            let payload = arrival.message.payload();
            let topic = arrival.message.topic();
            let reject = |code: &'static str, reason: String| Rejected {
                code,
                reason,
                position: format!("{topic}/0@{}", arrival.mark.sequence),
                given: Given::Bytes(payload.to_vec()),
            };
            if payload.len() > self.max_payload {
                rejected.push(reject(
                    "too_large",
                    format!("a payload of {} bytes is over `max_payload`, {}", payload.len(), self.max_payload),
                ));
                continue;
            }
            let mut captured = Vec::new();
            if !self.patterns.capture(&topic, &mut captured) {
                // A kept session still has the subscriptions of earlier configurations.
                rejected.push(reject(
                    "unexpected_topic",
                    format!("topic `{topic}` matches none of `topics`; the session may have an older subscription"),
                ));
                continue;
            }
            let message = Message {
                payload,
                key: None,
                topic: &topic,
                timestamp: arrival.time,
                partition: 0,
                offset: i64::try_from(arrival.mark.sequence).unwrap_or(i64::MAX),
            };
            let headers = arrival.message.headers().iter().map(|(name, value)| (name.as_str(), Some(value.as_bytes())));
            self.messages.push(&message, headers, &captured)?;
        }
        if self.messages.rows() == 0 {
            return Ok(Pulled::Rejected(rejected));
        }
        let batch = Batch::since(self.messages.finish()?, ingest);
        Ok(if rejected.is_empty() { Pulled::Batch(batch) } else { Pulled::Mixed(batch, rejected) })
    }

    fn position(&self) -> Position {
        Position::of(&self.emitted)
    }

    async fn commit(&mut self, position: &Position) -> Result<()> {
        let durable: Mark = position.read()?;
        if durable.sequence > self.emitted.sequence {
            // A position of an earlier process, from before the clock was set back: it says nothing of the messages of
            // this one.
            return Ok(());
        }
        self.committed = self.committed.max(durable);
        self.commands.send_modify(|command| command.durable = Some(durable));
        Ok(())
    }

    fn window_full(&self) -> bool {
        let since = self.committed.sequence.max(self.window.since.sequence);
        let open = self.emitted.sequence.saturating_sub(since);
        self.acknowledges && self.window.size > 0 && open >= self.window.size as u64
    }

    async fn close(&mut self) {
        self.commands.send_modify(|command| command.close = true);
        if let Some(mut task) = self.task.take()
            && tokio::time::timeout(GOODBYE, &mut task).await.is_err()
        {
            warn!("the mqtt broker did not take our goodbye in time; it will send the last messages again");
            task.abort();
        }
    }
}

impl Drop for MqttSource {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::client;
    use super::super::inbox::Arrival;
    use super::*;
    use arrow::array::{AsArray, RecordBatch};
    use arrow::datatypes::Int64Type;

    fn planned(json: &str) -> Planned<SourcePlan> {
        serde_json::from_str::<MqttSourceConfig>(json).unwrap().plan(&PlanContext::default())
    }

    fn problems(json: &str) -> Vec<String> {
        planned(json).err().unwrap_or_default().into_iter().map(|problem| problem.path).collect()
    }

    #[test]
    fn the_example_is_planned() {
        let mut stage: BTreeMap<String, MqttSourceConfig> = serde_saphyr::from_str(MqttSourceConfig::EXAMPLE).unwrap();
        let plan = stage.remove("mqtt").unwrap().plan(&PlanContext::default()).map_err(|p| format!("{p:?}")).unwrap();
        let names: Vec<&str> = plan.schema.fields().iter().map(|field| field.name().as_str()).collect();
        assert_eq!(names, ["payload", "key", "topic", "timestamp", "headers", "partition", "offset", "site", "device"]);
        assert!(matches!(plan.replay, Replay::Redelivered(_)));
        assert_eq!(plan.in_flight.map(|(count, _)| count), Some(1024));
        assert!(!plan.bounded);
    }

    #[test]
    fn guarantees_follow_from_the_quality_of_service() {
        let plan = planned(r##"{"url":"mqtt://h","topics":["#"],"qos":"at_most_once"}"##).map_err(|p| format!("{p:?}")).unwrap();
        assert!(matches!(plan.replay, Replay::Lost(_)) && plan.in_flight.is_none());
        let plan = planned(r##"{"url":"mqtt://h","topics":["#"],"protocol":"v3_1_1"}"##).map_err(|p| format!("{p:?}")).unwrap();
        assert_eq!(plan.in_flight.map(|(count, _)| count), Some(20));
        assert_eq!(problems(r##"{"url":"mqtt://h","topics":["#"],"qos":"exactly_once"}"##), ["/qos"]);
    }

    #[test]
    fn every_wrong_setting_is_told_at_once() {
        let found = problems(r#"{"url":"h","topics":["a/#/b"],"receive_maximum":0,"batch_rows":0,"max_payload":"1GiB"}"#);
        assert_eq!(found, ["/url", "/receive_maximum", "/batch_rows", "/max_payload", "/topics/0"]);
        for unknown in [
            r#"{"url":"mqtt://h","topics":["a"],"topic":"b"}"#,
            r#"{"topics":["a"]}"#,
            r#"{"url":"mqtt://h","topics":["a"],"overload":"spill"}"#,
        ] {
            assert!(serde_json::from_str::<MqttSourceConfig>(unknown).is_err(), "{unknown}");
        }
    }

    fn source(patterns: &[&str]) -> MqttSource {
        let patterns = Patterns::parse(&patterns.iter().map(|&p| p.to_owned()).collect::<Vec<_>>(), "").unwrap();
        MqttSource {
            subscriber: None,
            task: None,
            inbox: Arc::new(Inbox::new(100, 1_000_000)),
            commands: watch::channel(Command::default()).0,
            reports: watch::channel(Standing::default()).1,
            messages: Messages::new(message::schema(patterns.captures()), patterns.captures().len()),
            patterns,
            max_payload: 10,
            batch_rows: 100,
            acknowledges: true,
            emitted: Mark::default(),
            committed: Mark::default(),
            window: Window::default(),
        }
    }

    fn put(source: &MqttSource, sequence: u64, topic: &str, payload: &[u8], window: usize) {
        let message = client::Message::V311(rumqttc::Publish::new(topic, rumqttc::QoS::AtLeastOnce, payload));
        let arrival = Arrival { message, mark: Mark { connection: 1, sequence }, kept: true, time: 5, ingest: Instant::now() };
        source.inbox.put(arrival, Window { size: window, since: Mark { connection: 1, sequence: 0 } });
    }

    fn offsets(batch: &RecordBatch) -> Vec<i64> {
        batch.column_by_name("offset").unwrap().as_primitive::<Int64Type>().values().to_vec()
    }

    #[tokio::test]
    async fn what_has_arrived_is_one_batch_and_what_does_not_fit_is_rejected_with_its_bytes() {
        let mut source = source(&["a/{x}"]);
        put(&source, 1, "a/one", b"1", 20);
        put(&source, 2, "a/two", b"much too long", 20);
        put(&source, 3, "b", b"old", 20);
        put(&source, 4, "a/four", b"4", 20);
        let Pulled::Mixed(batch, rejected) = source.next().await.unwrap() else { panic!("rows and rejects") };
        assert_eq!(offsets(batch.records()), [1, 4]);
        assert_eq!(batch.records().column_by_name("x").unwrap().as_string::<i32>().value(1), "four");
        assert_eq!(
            rejected.iter().map(|r| (r.code, r.position.as_str())).collect::<Vec<_>>(),
            [("too_large", "a/two/0@2"), ("unexpected_topic", "b/0@3")]
        );
        assert_eq!(rejected[0].given, Given::Bytes(b"much too long".to_vec()));
        assert_eq!(source.position(), Position::of(&Mark { connection: 1, sequence: 4 }));
    }

    #[tokio::test]
    async fn the_window_is_full_until_enough_is_committed() {
        let mut source = source(&["#"]);
        let orders = source.commands.subscribe();
        for sequence in 1..=3 {
            put(&source, sequence, "t", b"x", 3);
        }
        assert!(!source.window_full());
        source.next().await.unwrap();
        assert!(source.window_full());
        let position = Position::of(&Mark { connection: 1, sequence: 2 });
        source.commit(&position).await.unwrap();
        assert!(!source.window_full());
        assert_eq!(orders.borrow().durable, Some(Mark { connection: 1, sequence: 2 }));
    }

    #[tokio::test]
    async fn a_connection_task_that_ended_is_an_error_and_not_a_silence() {
        let mut source = source(&["#"]);
        source.inbox.end("gone".into());
        assert_eq!(source.next().await.unwrap_err().class(), afferent_engine::Class::Fatal);
    }
}
