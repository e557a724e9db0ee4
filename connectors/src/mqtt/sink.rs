//! The `mqtt` sink: one message for each row, on a topic made from the row. The engine writes; a task keeps the
//! connection and publishes. The invariant: `prepare` returns when the broker has acknowledged every message
//! (at QoS 0: when every message has gone out).

use std::sync::Arc;
use std::time::Duration;

use afferent_engine::component::{BuildContext, Delivery, Input, PlanContext, Planned, Problem, SinkConfig, SinkPlan};
use afferent_engine::config::ByteSize;
use afferent_engine::{Batch, Epoch, Error, Prepared, Rejected, Result, Sink};
use afferent_formats::Format;
use arrow::array::{Array, RecordBatch};
use async_trait::async_trait;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tracing::{Instrument, warn};

use super::config::{Connection, Qos, refuse_exactly_once, with_connection};
use super::publisher::{Outgoing, Publisher, Settled};
use super::subscriber::Standing;
use crate::payloads::Payloads;
use crate::refused::Refusals;
use crate::topic::Template;

/// Bytes of messages in flight at most; one message alone may be larger.
const MOST_BYTES: u64 = 32 * 1024 * 1024;
/// How long `prepare` waits before it tells the engine that it is still waiting.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long the goodbye may take.
const GOODBYE: Duration = Duration::from_secs(5);
/// What a PUBLISH takes beside topic and payload, at most: header, lengths, packet id, no properties.
const PACKET_OVERHEAD: usize = 16;

with_connection! {
    /// Publishes each row as a message to an MQTT broker. An epoch is stored when the broker has acknowledged every
    /// message of it.
    pub struct MqttSinkConfig {
        /// The topic, with `{column}` for what differs from row to row: `results/{device}/label`. The column is a text,
        /// an integer or a boolean; a row whose value is null, empty or has `/`, `+` or `#` in it is rejected.
        topic: String,
        /// How messages are delivered to the broker.
        #[serde(default)]
        qos: Qos,
        /// The broker keeps the last message of each topic for those who subscribe later.
        #[serde(default)]
        retain: bool,
        /// How a row becomes a message. Without it the input must have a binary column `payload`, which is sent.
        #[serde(default)]
        format: Option<Format>,
        /// The longest payload; rows that need a longer one are rejected.
        #[serde(default = "max_payload")]
        max_payload: ByteSize,
        /// How many messages may be on their way without the broker's acknowledgement.
        #[serde(default = "in_flight")]
        in_flight: u16,
    }
}

fn max_payload() -> ByteSize {
    ByteSize::mib(16)
}

fn in_flight() -> u16 {
    1024
}

impl SinkConfig for MqttSinkConfig {
    const NAME: &'static str = "mqtt";
    const EXAMPLE: &'static str = "mqtt: { url: \"mqtt://localhost:1883\", topic: \"results/{device}/label\", format: json }";

    fn check(&self, context: &PlanContext) -> Vec<Problem> {
        self.checked(context).1
    }

    fn plan(self, inputs: &[Input], context: &PlanContext) -> Planned<SinkPlan> {
        let (connection, mut problems) = self.checked(context);
        let mut routes = Vec::new();
        for input in inputs {
            let mut found = Vec::new();
            let template = Template::parse(&self.topic, &input.schema, "/topic").map_err(|more| found.extend(more));
            let payloads = Payloads::plan(self.format, &input.schema).map_err(|one| found.push(one));
            if let (Ok(template), Ok(payloads)) = (template, payloads) {
                routes.push(Route { template, payloads });
            }
            // Several inputs may have the same problem, and the text of the topic has been looked at already.
            for problem in found {
                if !problems.contains(&problem) {
                    problems.push(problem);
                }
            }
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        let delivery = match self.qos {
            Qos::AtMostOnce => Delivery::AtMostOnce("messages at QoS 0 are not acknowledged by the broker".to_owned()),
            _ => Delivery::AtLeastOnce(
                "the broker acknowledges every message, and may get one twice when a connection breaks; a reader tells by what is in it"
                    .to_owned(),
            ),
        };
        let routes: Arc<[Route]> = routes.into();
        Ok(SinkPlan {
            delivery,
            commit_interval: Duration::from_millis(50),
            build: Arc::new(move |_: &BuildContext| {
                let sink = MqttSink {
                    connection: connection.clone(),
                    qos: self.qos,
                    retain: self.retain,
                    in_flight: self.in_flight,
                    max_payload: self.max_payload.as_usize(),
                    routes: Arc::clone(&routes),
                    refusals: Arc::default(),
                    sent: Settled::default(),
                    running: None,
                };
                Ok(Box::new(sink) as Box<dyn Sink>)
            }),
        })
    }
}

impl MqttSinkConfig {
    /// The connection, and what is wrong with the settings whatever arrives.
    fn checked(&self, context: &PlanContext) -> (Connection, Vec<Problem>) {
        let mut connection = self.connection();
        let mut problems = connection.check(context);
        problems.extend(refuse_exactly_once(self.qos));
        if self.in_flight == 0 {
            problems.push(Problem::new("bad-value", "/in_flight", "it must be at least 1"));
        }
        if self.max_payload.0 == 0 || self.max_payload > ByteSize::mib(256) {
            problems.push(Problem::new(
                "bad-value",
                "/max_payload",
                format!("{} is not between 1B and 256MiB, which the protocol carries", self.max_payload),
            ));
        }
        problems.extend(Template::check(&self.topic, "/topic"));
        (connection, problems)
    }
}

/// How rows of one input become messages.
struct Route {
    template: Template,
    payloads: Payloads,
}

struct Running {
    messages: mpsc::Sender<Outgoing>,
    settled: watch::Receiver<Settled>,
    standing: watch::Receiver<Standing>,
    largest_packet: watch::Receiver<u32>,
    task: JoinHandle<()>,
}

struct MqttSink {
    connection: Connection,
    qos: Qos,
    retain: bool,
    in_flight: u16,
    max_payload: usize,
    routes: Arc<[Route]>,
    refusals: Arc<Refusals>,
    sent: Settled,
    running: Option<Running>,
}

impl MqttSink {
    fn start(&self) -> Result<Running> {
        // The broker need not remember us: what it has not acknowledged is remembered here.
        let dial = self.connection.dial(None, 16, self.in_flight)?;
        let (messages, outbox) = mpsc::channel(usize::from(self.in_flight));
        let (settled_sender, settled) = watch::channel(Settled::default());
        let (standing_sender, standing) = watch::channel(Standing::default());
        let (largest_sender, largest_packet) = watch::channel(0);
        let publisher = Publisher {
            dial,
            qos: self.qos,
            retain: self.retain,
            messages: outbox,
            settled: settled_sender,
            standing: standing_sender,
            largest_packet: largest_sender,
            refusals: Arc::clone(&self.refusals),
        };
        Ok(Running { messages, settled, standing, largest_packet, task: tokio::spawn(publisher.run().in_current_span()) })
    }

    fn running(&mut self) -> Result<&mut Running> {
        self.running.as_mut().ok_or_else(|| Error::fatal("the mqtt sink was used before it was opened"))
    }

    /// Why this row cannot be sent, if it cannot.
    fn too_large(&self, topic: &str, payload: &[u8], largest_packet: u32) -> Option<String> {
        if payload.len() > self.max_payload {
            return Some(format!("a payload of {} bytes is over `max_payload`, {} bytes", payload.len(), self.max_payload));
        }
        // A packet that the broker has said it will not take would break the connection, again and again.
        let packet = payload.len() + topic.len() + PACKET_OVERHEAD;
        (largest_packet > 0 && packet > largest_packet as usize)
            .then(|| format!("a packet of {packet} bytes is over what the broker takes, {largest_packet} bytes"))
    }
}

#[async_trait]
impl Sink for MqttSink {
    async fn open(&mut self, _: Option<(Epoch, &Prepared)>) -> Result<()> {
        if self.running.is_none() {
            self.running = Some(self.start()?);
        }
        let running = self.running()?;
        loop {
            running.standing.changed().await.map_err(|_| Error::fatal("the mqtt connection task has ended"))?;
            match running.standing.borrow_and_update().clone() {
                Standing::Waiting => {}
                Standing::Up => return Ok(()),
                Standing::Down { cause, refused: true, .. } => return Err(Error::fatal(cause)),
                Standing::Down { cause, refused: false, .. } => return Err(Error::retry(cause)),
            }
        }
    }

    async fn write(&mut self, input: usize, batch: Batch) -> Result<Vec<Rejected>> {
        let routes = Arc::clone(&self.routes);
        let route = routes.get(input).ok_or_else(|| Error::fatal(format!("there is no input number {input}")))?;
        let records: Arc<RecordBatch> = Arc::new(batch.into_records());
        let payloads = route.payloads.of(&records)?;
        let largest_packet = *self.running()?.largest_packet.borrow();
        let mut rejected = Vec::new();
        let mut outgoing = Vec::with_capacity(records.num_rows());
        // Topics borrow the batch and cannot be held while waiting, so all messages are made first.
        {
            let topics = route.template.over(&records)?;
            let mut topic = String::new();
            for row in 0..records.num_rows() {
                if let Err(reason) = topics.write(row, &mut topic) {
                    rejected.extend(Rejected::rows(&records, [row], "invalid_topic", &reason));
                    continue;
                }
                let payload: &[u8] = if payloads.is_null(row) { &[] } else { payloads.value(row) };
                if let Some(reason) = self.too_large(&topic, payload, largest_packet) {
                    rejected.extend(Rejected::rows(&records, [row], "too_large", &reason));
                    continue;
                }
                outgoing.push(Outgoing { topic: topic.clone(), payload: payload.to_vec(), batch: Arc::clone(&records), row });
            }
        }
        let mut sent = self.sent;
        let running = self.running()?;
        let mut result = Ok(());
        for message in outgoing {
            let bytes = message.bytes();
            // Bounded in bytes here, in messages by the channel and by the task.
            let room = running
                .settled
                .wait_for(|settled| sent.bytes == settled.bytes || sent.bytes - settled.bytes + bytes <= MOST_BYTES)
                .await
                .is_ok();
            if !room || running.messages.send(message).await.is_err() {
                result = Err(Error::fatal("the mqtt connection task has ended"));
                break;
            }
            sent.messages += 1;
            sent.bytes += bytes;
        }
        self.sent = sent;
        result?;
        rejected.extend(self.refusals.take());
        Ok(rejected)
    }

    async fn prepare(&mut self, _: Epoch) -> Result<(Prepared, Vec<Rejected>)> {
        let sent = self.sent;
        let running = self.running()?;
        let settled = running.settled.wait_for(|settled| settled.messages >= sent.messages);
        let waited = tokio::time::timeout(PATIENCE, settled).await.map(|done| done.map(|_| ()));
        match waited {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Err(Error::fatal("the mqtt connection task has ended")),
            Err(_) => {
                let open = sent.messages - running.settled.borrow().messages;
                return Err(Error::retry(format!("the broker has not acknowledged {open} messages for {PATIENCE:?}")));
            }
        }
        Ok((Prepared::Null, self.refusals.take()))
    }

    async fn finish(&mut self, _: Epoch, _: &Prepared) -> Result<()> {
        Ok(())
    }

    async fn close(&mut self) -> Result<()> {
        if let Some(Running { messages, mut task, .. }) = self.running.take() {
            // The end of the channel is the request to say goodbye.
            drop(messages);
            if tokio::time::timeout(GOODBYE, &mut task).await.is_err() {
                warn!("the mqtt broker did not take our goodbye in time");
                task.abort();
            }
        }
        Ok(())
    }
}

impl Drop for MqttSink {
    fn drop(&mut self) {
        if let Some(running) = &self.running {
            running.task.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use arrow::datatypes::{DataType, Field, Schema};

    use super::*;

    fn inputs(column: &str) -> Vec<Input> {
        let schema = Schema::new(vec![Field::new(column, DataType::Utf8, false), Field::new("score", DataType::Float32, true)]);
        vec![Input { name: "scored".into(), schema: Arc::new(schema) }]
    }

    fn planned(json: &str, inputs: &[Input]) -> Planned<SinkPlan> {
        serde_json::from_str::<MqttSinkConfig>(json).unwrap().plan(inputs, &PlanContext::default())
    }

    fn problems(json: &str) -> Vec<String> {
        planned(json, &inputs("device")).err().unwrap_or_default().into_iter().map(|problem| problem.path).collect()
    }

    #[test]
    fn what_needs_no_columns_is_checked_without_inputs() {
        let text = r#"{"url":"http://x","topic":"a/#/{device}","qos":"exactly_once"}"#;
        let config: MqttSinkConfig = serde_json::from_str(text).unwrap();
        let paths: Vec<_> = config.check(&PlanContext::default()).into_iter().map(|problem| problem.path).collect();
        assert_eq!(paths, ["/url", "/qos", "/topic"]);
        // With inputs it is told once, and what they lack besides.
        assert_eq!(problems(text), ["/url", "/qos", "/topic", ""]);
    }

    #[test]
    fn the_example_is_planned() {
        let mut stage: BTreeMap<String, MqttSinkConfig> = serde_saphyr::from_str(MqttSinkConfig::EXAMPLE).unwrap();
        let plan =
            stage.remove("mqtt").unwrap().plan(&inputs("device"), &PlanContext::default()).map_err(|p| format!("{p:?}")).unwrap();
        assert!(matches!(plan.delivery, Delivery::AtLeastOnce(_)));
    }

    #[test]
    fn topic_and_format_are_checked_against_the_rows() {
        assert_eq!(problems(r#"{"url":"mqtt://h","topic":"r/{devise}","format":"json"}"#), ["/topic"]);
        assert_eq!(problems(r#"{"url":"mqtt://h","topic":"r/{device}"}"#), [""]);
        assert_eq!(
            problems(r#"{"url":"mqtt://h","topic":"r","format":"json","qos":"exactly_once","in_flight":0}"#),
            ["/qos", "/in_flight"]
        );
        assert!(serde_json::from_str::<MqttSinkConfig>(r#"{"url":"mqtt://h","topic":"r","topics":[]}"#).is_err());
    }

    #[test]
    fn at_qos_0_the_sink_promises_no_more_than_it_keeps() {
        let plan = planned(r#"{"url":"mqtt://h","topic":"r","format":"csv","qos":"at_most_once"}"#, &inputs("device"))
            .map_err(|p| format!("{p:?}"))
            .unwrap();
        assert!(matches!(plan.delivery, Delivery::AtMostOnce(_)));
    }
}
