//! The `kafka` source: records as rows of the message schema, read as a member of a consumer group or from the
//! partitions that are written down. The engine pulls; a thread polls the consumer. The invariant: the group's
//! committed offset never passes a record whose rows are not durable, and nothing is committed for a partition that
//! is not ours.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use afferent_engine::component::{BuildContext, PlanContext, Planned, Problem, Replay, SourceConfig, SourcePlan};
use afferent_engine::config::ByteSize;
use afferent_engine::{Error, Position, Pulled, Result, Source, message};
use arrow::compute::kernels::cast_utils::string_to_timestamp_nanos;
use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use prometheus::IntCounter;
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use schemars::JsonSchema;
use serde::Deserialize;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tracing::warn;

use super::config::with_brokers;
use super::consumer::{Beginning, Chunk, Group, Reader, Shared};
use super::member::Member;
use super::ownership::{Offsets, Reset};
use super::partitions::Partitions;
use super::reach::reach;

/// Batches that wait for the engine at most.
const WAITING: usize = 2;
/// How long the last commit and leaving the group may take.
const GOODBYE: Duration = Duration::from_secs(15);
/// The option of librdkafka that names a member of the group.
const INSTANCE: &str = "group.instance.id";

with_brokers! {
    /// Reads records from Kafka topics. Each record is a row: `payload`, `key`, `topic`, `timestamp`, `headers`, `partition`
    /// and `offset`; a record without a value (a tombstone) has an empty payload.
    ///
    /// The source joins a consumer group, so that identical processes divide the partitions among them. It is known
    /// there by a name that it keeps in the data directory (`group.instance.id`), so that after a crash it has its
    /// partitions back at once. What such a source reads cannot go to a stage that holds rows (`window`, `batch`),
    /// because partitions may move to another process at any time: for that, say which ones with `partitions`.
    ///
    /// In each partition it goes on where the pipeline's last stored epoch stands or where the group stands, whichever is
    /// further; where neither is known, `start` says. When the partition does not hold that offset (its records were
    /// deleted before they were read, or the topic was made anew) the pipeline fails, unless
    /// `options: { auto.offset.reset: earliest }` (or `latest`) says where to go on; this is logged, and the records
    /// that are skipped are counted.
    pub struct KafkaSourceConfig {
        /// The topics to read.
        topics: Vec<String>,
        /// The consumer group; by default `afferent-<pipeline>`.
        #[serde(default)]
        group: Option<String>,
        /// Which partitions are read. `group`: those that the group gives this process. `all`: all that the topics have
        /// when the source opens, for a single process; a list: these of each topic, for one of several processes with
        /// a list of its own each. The last two take no part in the group but commit their offsets to it, so no other
        /// process may be a member of it.
        #[serde(default)]
        partitions: Partitions,
        /// Where to begin in a partition for which neither the pipeline nor the group knows an offset.
        #[serde(default)]
        start: Start,
        /// End when every partition has been read to its end, instead of waiting for more; for one topic only.
        #[serde(default)]
        stop_at_end: bool,
        /// How many bytes are fetched ahead of the pipeline, at most.
        #[serde(default = "buffer_bytes")]
        buffer_bytes: ByteSize,
        /// Most rows in one batch.
        #[serde(default = "batch_rows")]
        batch_rows: u32,
    }
}

/// Where to begin in a partition of which nothing is known.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Start {
    /// At its first record.
    #[default]
    Earliest,
    /// Behind its last record.
    Latest,
    /// Nowhere: the group must have a committed offset, or the pipeline fails.
    Committed,
    /// At the first record that is not older than this, such as `2026-01-31T12:00:00Z`.
    Timestamp(String),
}

fn buffer_bytes() -> ByteSize {
    ByteSize::mib(16)
}

fn batch_rows() -> u32 {
    1024
}

impl Start {
    fn beginning(&self) -> std::result::Result<Beginning, Problem> {
        Ok(match self {
            Self::Earliest => Beginning::Earliest,
            Self::Latest => Beginning::Latest,
            Self::Committed => Beginning::Committed,
            Self::Timestamp(text) => match string_to_timestamp_nanos(text) {
                Ok(nanos) if nanos >= 0 => Beginning::Timestamp(nanos / 1_000_000),
                _ => {
                    return Err(Problem::new("bad-value", "/start/timestamp", format!("`{text}` is not a time since 1970"))
                        .help("write for example 2026-01-31T12:00:00Z"));
                }
            },
        })
    }
}

impl SourceConfig for KafkaSourceConfig {
    const NAME: &'static str = "kafka";
    const EXAMPLE: &'static str = "kafka: { brokers: [\"localhost:9092\"], topics: [readings], start: earliest }";

    fn declares(&self) -> Option<SchemaRef> {
        Some(message::schema(&[]))
    }

    fn plan(self, context: &PlanContext) -> Planned<SourcePlan> {
        let group = self.group.clone().unwrap_or_else(|| format!("afferent-{}", context.pipeline));
        let own = [
            ("group.id", group),
            ("enable.auto.commit", "false".to_owned()),
            ("enable.auto.offset.store", "false".to_owned()),
            ("enable.partition.eof", self.stop_at_end.to_string()),
            // A position whose records were deleted is an error, not a silent jump.
            ("auto.offset.reset", "error".to_owned()),
            ("queued.min.messages", "10000".to_owned()),
            ("queued.max.messages.kbytes", (self.buffer_bytes.0 / 1024).clamp(1, 2_097_151).to_string()),
            ("client.id", format!("afferent-{}-{}", context.pipeline, context.stage)),
        ];
        let mut cluster = self.cluster();
        let mut problems = cluster.check(&own, context);
        if self.topics.is_empty() {
            problems.push(Problem::new("no-topics", "/topics", "there is no topic to read").help("write for example [readings]"));
        }
        for (number, topic) in self.topics.iter().enumerate() {
            let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
            if topic.is_empty() || topic.len() > 249 || !topic.chars().all(legal) {
                problems.push(
                    Problem::new(
                        "topic-name",
                        format!("/topics/{number}"),
                        format!("`{topic}` is not the name of a Kafka topic"),
                    )
                    .help("letters, digits, `.`, `_` and `-`, up to 249 of them"),
                );
            }
        }
        if self.stop_at_end && self.topics.len() > 1 {
            problems.push(
                Problem::new(
                    "stop-at-end",
                    "/stop_at_end",
                    "the client library does not say which topic has ended, so it must be a single one",
                )
                .help("make it one source for each topic"),
            );
        }
        if self.batch_rows == 0 {
            problems.push(Problem::new("bad-value", "/batch_rows", "it must be at least 1"));
        }
        let beginning = self.start.beginning().map_err(|found| problems.push(found));
        let (Ok(beginning), true) = (beginning, problems.is_empty()) else { return Err(problems) };
        let schema = message::schema(&[]);
        let row_schema = Arc::clone(&schema);
        Ok(SourcePlan {
            schema,
            replay: Replay::Exact,
            bounded: self.stop_at_end,
            in_flight: None,
            moves: (self.partitions == Partitions::Group).then(|| {
                "write `partitions: all` there if one process reads the topics, else the partitions of each process, \
                 such as `partitions: [0, 1]`"
                    .to_owned()
            }),
            build: Arc::new(move |context: &BuildContext| {
                // Who reads to the end leaves for good: a name would keep the partitions from the others meanwhile.
                let named = self.partitions == Partitions::Group && !self.stop_at_end;
                Ok(Box::new(KafkaSource {
                    config: cluster.client(&own)?,
                    member: named.then(|| Member::of(context)),
                    partitions: self.partitions.clone(),
                    unread: context.dropped("offset_reset"),
                    topics: self.topics.clone(),
                    beginning,
                    batch_rows: self.batch_rows as usize,
                    stop_at_end: self.stop_at_end,
                    schema: Arc::clone(&row_schema),
                    probe: None,
                    running: None,
                    ended: false,
                }) as Box<dyn Source>)
            }),
        })
    }
}

struct Running {
    shared: Arc<Shared>,
    chunks: mpsc::Receiver<Chunk>,
    done: oneshot::Receiver<()>,
}

struct KafkaSource {
    config: ClientConfig,
    /// Who we are in the group, if that is to be known.
    member: Option<Member>,
    unread: IntCounter,
    topics: Vec<String>,
    partitions: Partitions,
    beginning: Beginning,
    batch_rows: usize,
    stop_at_end: bool,
    schema: SchemaRef,
    probe: Option<JoinHandle<Result<()>>>,
    running: Option<Running>,
    ended: bool,
}

impl KafkaSource {
    fn start(&mut self, stored: Offsets) -> Result<()> {
        let shared = Arc::new(Shared::new(stored));
        let group = Group {
            shared: Arc::clone(&shared),
            beginning: self.beginning,
            reset: Reset::of(self.config.get("auto.offset.reset")),
            unread: self.unread.clone(),
        };
        let mut config = self.config.clone();
        if let Some(member) = &self.member
            && config.get(INSTANCE).is_none()
        {
            config.set(INSTANCE, member.name()?);
        }
        let consumer: BaseConsumer<Group> =
            config.create_with_context(group).map_err(|e| Error::fatal(e).context("making a kafka consumer"))?;
        if self.partitions == Partitions::Group {
            let topics: Vec<&str> = self.topics.iter().map(String::as_str).collect();
            consumer.subscribe(&topics).map_err(|e| Error::fatal(e).context(format!("subscribing to {topics:?}")))?;
        }
        let (sender, chunks) = mpsc::channel(WAITING);
        let (done_sender, done) = oneshot::channel();
        let reader = Reader {
            consumer,
            shared: Arc::clone(&shared),
            chunks: sender,
            topics: self.topics.clone(),
            partitions: self.partitions.clone(),
            schema: Arc::clone(&self.schema),
            batch_rows: self.batch_rows,
            stop_at_end: self.stop_at_end,
        };
        let run = move || {
            reader.run();
            // Nobody may be waiting any more.
            let _ = done_sender.send(());
        };
        let span = tracing::Span::current();
        thread::Builder::new()
            .name("kafka-consumer".to_owned())
            .spawn(move || span.in_scope(run))
            .map_err(|e| Error::retry(e).context("starting a kafka consumer's thread"))?;
        self.running = Some(Running { shared, chunks, done });
        Ok(())
    }
}

#[async_trait]
impl Source for KafkaSource {
    async fn open(&mut self, from: Option<&Position>) -> Result<()> {
        let stored: Offsets = from.map_or_else(|| Ok(Offsets::default()), Position::read)?;
        // The question outlives this future, which the engine may drop and make again at any time.
        let probe = self.probe.get_or_insert_with(|| {
            let (mut config, topics) = (self.config.clone(), self.topics.clone());
            // Without a group it neither joins one nor closes slowly.
            config.remove("group.id");
            config.remove(INSTANCE);
            let span = tracing::Span::current();
            tokio::task::spawn_blocking(move || span.in_scope(|| reach(&config, &topics)))
        });
        let reached = probe.await;
        self.probe = None;
        reached.map_err(Error::fatal)??;
        if self.running.is_none() {
            self.start(stored)?;
        }
        Ok(())
    }

    async fn next(&mut self) -> Result<Pulled> {
        let Some(running) = &mut self.running else { return Err(Error::fatal("the kafka source was used before it was opened")) };
        if self.ended {
            return Ok(Pulled::End);
        }
        // Nothing is awaited behind this line, so that a dropped future has taken nothing.
        let chunk = running.chunks.recv().await;
        let upto = match &chunk {
            Some(Chunk::Rows(_, upto)) => Some(upto),
            _ => None,
        };
        running.shared.pulled(upto);
        match chunk {
            Some(Chunk::Rows(batch, _)) => Ok(Pulled::Batch(batch)),
            Some(Chunk::End) => {
                self.ended = true;
                Ok(Pulled::End)
            }
            Some(Chunk::Failed(error)) => Err(error),
            None => Err(Error::fatal("the kafka consumer's thread has ended")),
        }
    }

    fn position(&self) -> Position {
        Position::of(&self.running.as_ref().map_or_else(Offsets::default, |running| running.shared.position()))
    }

    async fn commit(&mut self, position: &Position) -> Result<()> {
        if let Some(running) = &self.running {
            running.shared.durable(&position.read()?);
        }
        Ok(())
    }

    async fn close(&mut self) {
        if let Some(Running { shared, chunks, done }) = self.running.take() {
            shared.close();
            drop(chunks);
            if tokio::time::timeout(GOODBYE, done).await.is_err() {
                warn!("the kafka consumer did not leave its group in time; the group notices by itself");
            }
        }
    }
}

impl Drop for KafkaSource {
    fn drop(&mut self) {
        if let Some(running) = &self.running {
            running.shared.close();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn planned(json: &str) -> Planned<SourcePlan> {
        serde_json::from_str::<KafkaSourceConfig>(json).unwrap().plan(&PlanContext::default())
    }

    fn problems(json: &str) -> Vec<String> {
        planned(json).err().unwrap_or_default().into_iter().map(|problem| problem.path).collect()
    }

    #[test]
    fn the_example_is_planned() {
        let mut stage: BTreeMap<String, KafkaSourceConfig> = serde_saphyr::from_str(KafkaSourceConfig::EXAMPLE).unwrap();
        let plan = stage.remove("kafka").unwrap().plan(&PlanContext::default()).map_err(|p| format!("{p:?}")).unwrap();
        assert_eq!(plan.schema, message::schema(&[]));
        assert_eq!(plan.replay, Replay::Exact);
        assert!(!plan.bounded);
    }

    #[test]
    fn only_the_partitions_of_a_group_may_move() {
        let moves = |partitions: &str| {
            let json = format!(r#"{{"brokers":["h:1"],"topics":["a"]{partitions}}}"#);
            planned(&json).map_err(|p| format!("{p:?}")).unwrap().moves
        };
        assert!(moves("").is_some_and(|help| help.contains("`partitions: all`")));
        assert!(moves(r#","partitions":"group","stop_at_end":true"#).is_some());
        assert_eq!(moves(r#","partitions":"all""#), None);
        assert_eq!(moves(r#","partitions":[0,3]"#), None);
        assert!(serde_json::from_str::<KafkaSourceConfig>(r#"{"brokers":["h:1"],"topics":["a"],"partitions":[]}"#).is_err());
    }

    #[test]
    fn beginnings_are_read() {
        let start = |json: &str| serde_json::from_str::<Start>(json).unwrap().beginning();
        assert_eq!(start("\"latest\""), Ok(Beginning::Latest));
        assert_eq!(start("{\"timestamp\":\"1970-01-01T00:00:05Z\"}"), Ok(Beginning::Timestamp(5_000)));
        assert_eq!(start("{\"timestamp\":\"yesterday\"}").err().map(|p| p.path), Some("/start/timestamp".to_owned()));
        assert!(serde_json::from_str::<Start>("\"begin\"").is_err());
    }

    #[test]
    fn every_wrong_setting_is_told_at_once() {
        let found =
            problems(r#"{"brokers":[],"topics":["a b","c"],"stop_at_end":true,"batch_rows":0,"start":{"timestamp":"x"}}"#);
        assert_eq!(found, ["/brokers", "/topics/0", "/stop_at_end", "/batch_rows", "/start/timestamp"]);
        assert_eq!(problems(r#"{"brokers":["h:1"],"topics":["a"],"options":{"group.id":"g"}}"#), ["/options/group.id"]);
        assert!(planned(r#"{"brokers":["h:1"],"topics":["a"],"stop_at_end":true}"#).is_ok_and(|plan| plan.bounded));
        assert!(serde_json::from_str::<KafkaSourceConfig>(r#"{"brokers":["h:1"],"topic":"a"}"#).is_err());
    }
}
