//! Kafka -> decode -> encode -> Kafka: the command with that pipeline, against the same written by hand on bare rdkafka
//! with arrow-json's reader and writer. `main` runs the comparison and, in a process of its own, the rival. The
//! invariants: both sides read the same topic in a new group, decode and encode the same schema, produce with the
//! same settings (idempotent, `acks=all`), and commit offsets every 50 ms, when the brokers have confirmed what was
//! made of the records before them; every run's output is read back and holds every id once.
//!
//! The observer asks for the output topic's high watermarks; the rate is that from the first message it sees to the
//! last. What the command does besides: a header with an event id on every record, and an epoch stored before offsets
//! are committed.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::process::exit;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow::json::{LineDelimitedWriter, ReaderBuilder};
use rdkafka::client::ClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::Message;
use rdkafka::producer::{BaseRecord, DeliveryResult, Producer, ProducerContext, ThreadedProducer};
use rdkafka::{Offset, TopicPartitionList};
use serde::Deserialize;

use crate::Options;
use crate::pairs::{Run, Side, compare, progress};
use crate::process::{Process, wait_until, watch};
use crate::servers::{Kafka, afferent, rival as rival_command, scratch};

/// Messages of a run, unless `--rows` says otherwise.
const ROWS: u64 = 200_000;
/// Of both topics.
const PARTITIONS: i32 = 2;
/// The topic that both sides read.
const INPUT: &str = "readings";
/// Rows in a batch at most; the default of our source.
const BATCH_ROWS: usize = 1024;
/// Between two commits of offsets; the pace of our Kafka sink.
const COMMIT_EVERY: Duration = Duration::from_millis(50);
/// How long Kafka may take to answer a question.
const QUESTION: Duration = Duration::from_secs(10);
/// How long nothing may come before a run has failed.
const PATIENCE: Duration = Duration::from_secs(30);

/// Runs the comparison.
///
/// # Errors
/// When Kafka or a side does not run, or a side loses, invents or repeats a message.
pub fn run(options: &Options) -> Result<()> {
    let rows = options.rows.unwrap_or(ROWS);
    let kafka = Kafka::start(PARTITIONS.unsigned_abs())?;
    let address = kafka.address();
    let setup: ThreadedProducer<Confirm> = producer(&address).create_with_context(Confirm).context("making a producer")?;
    make_topic(&setup, INPUT)?;
    progress(format!("kafka: writing {rows} messages"));
    preload(&setup, rows)?;
    let observer: BaseConsumer = client(&address).create().context("making a consumer")?;
    let mut number = 0;
    compare("Kafka -> decode -> encode -> Kafka, 200-byte JSON", "rdkafka and arrow-json", options.rounds, |side, _| {
        number += 1;
        let output = format!("output-{number}");
        make_topic(&setup, &output)?;
        let folder = scratch()?;
        let log = folder.path().join("log");
        let mut process = match side {
            Side::Ours => {
                let pipeline = folder.path().join("peers-kafka.yaml");
                fs::write(&pipeline, pipeline_text(&address, &output)).context("writing the pipeline")?;
                Process::start("afferent", afferent("run", folder.path())?.arg("--no-live").arg(&pipeline), &log)?
            }
            Side::Rival => {
                let topic = output.as_str();
                Process::start("the rival", rival_command("rival-kafka")?.args([address.as_str(), INPUT, topic, topic]), &log)?
            }
        };
        let measured = measure(&mut process, &kafka, &observer, &output, rows)?;
        match side {
            Side::Ours => process.stop()?,
            // It ends by no signal but this.
            Side::Rival => drop(process),
        }
        check_ids(&address, &output, rows)?;
        Ok(measured)
    })
}

fn pipeline_text(address: &str, output: &str) -> String {
    let columns: Vec<String> = schema()
        .fields()
        .iter()
        .map(|field| {
            let kind = match field.data_type() {
                DataType::Int64 => "int64",
                DataType::Float32 => "float32",
                _ => "utf8",
            };
            format!("{}: {kind}", field.name())
        })
        .collect();
    format!(
        "name: peers-kafka\n\
         sources:\n  messages:\n    kafka:\n      brokers: [\"{address}\"]\n      topics: [{INPUT}]\n      group: {output}\n\
         \x20     batch_rows: {BATCH_ROWS}\n\
         operators:\n  rows:\n    decode: {{ format: json, schema: {{ {} }} }}\n  texts:\n    encode: {{ format: json }}\n\
         sinks:\n  out:\n    kafka: {{ brokers: [\"{address}\"], topic: {output} }}\n",
        columns.join(", ")
    )
}

/// The columns of a message.
fn schema() -> SchemaRef {
    let mut fields = vec![Field::new("reading", DataType::Int64, true)];
    fields.extend((1..=9).map(|number| Field::new(format!("s{number}"), DataType::Float32, true)));
    fields.push(Field::new("device", DataType::Utf8, true));
    fields.push(Field::new("unit", DataType::Utf8, true));
    Arc::new(Schema::new(fields))
}

/// A message of about 200 bytes: nine sensor values and two texts.
fn message(id: u64, random: &mut fastrand::Rng) -> String {
    let values: String = (1..=9).map(|number| format!("\"s{number}\":{:.3},", random.f64() * 100.0)).collect();
    format!("{{\"reading\":{id},{values}\"device\":\"shuttle-{}\",\"unit\":\"bar per second\"}}", id % 40)
}

fn client(address: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", address);
    config
}

/// The settings of our sink.
fn producer(address: &str) -> ClientConfig {
    let mut config = client(address);
    config.set("enable.idempotence", "true").set("acks", "all").set("message.timeout.ms", "0");
    config.set("queue.buffering.max.messages", "100000").set("queue.buffering.max.kbytes", "65536");
    config
}

/// Names the topic to the broker, which makes it, and waits until its partitions can be written.
fn make_topic(setup: &ThreadedProducer<Confirm>, topic: &str) -> Result<()> {
    wait_until(&format!("Kafka has made the topic {topic}"), Duration::from_secs(30), || {
        let metadata = setup.client().fetch_metadata(Some(topic), QUESTION).context("asking Kafka for a topic")?;
        Ok(metadata.topics().iter().any(|found| {
            let ready = |partition: &rdkafka::metadata::MetadataPartition| partition.error().is_none() && partition.leader() >= 0;
            found.error().is_none() && !found.partitions().is_empty() && found.partitions().iter().all(ready)
        }))
    })
}

fn preload(setup: &ThreadedProducer<Confirm>, rows: u64) -> Result<()> {
    let mut random = fastrand::Rng::with_seed(1);
    let open = Arc::default();
    for id in 0..rows {
        let partition = i32::try_from(id % u64::from(PARTITIONS.unsigned_abs())).unwrap_or(0);
        send(setup, INPUT, Some(partition), message(id, &mut random).as_bytes(), &open)?;
    }
    setup.flush(Duration::from_secs(60)).context("writing the input")
}

/// Hands a record to the producer, and waits while its queue is full.
fn send(
    producer: &ThreadedProducer<Confirm>,
    topic: &str,
    partition: Option<i32>,
    payload: &[u8],
    open: &Arc<AtomicU64>,
) -> Result<()> {
    open.fetch_add(1, Ordering::Relaxed);
    let mut record: BaseRecord<'_, [u8], [u8], Arc<AtomicU64>> =
        BaseRecord::with_opaque_to(topic, Arc::clone(open)).payload(payload);
    record.partition = partition;
    loop {
        match producer.send(record) {
            Ok(()) => return Ok(()),
            Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), refused)) => {
                record = refused;
                thread::sleep(Duration::from_millis(1));
            }
            Err((cause, _)) => return Err(cause).context("handing a record to the producer"),
        }
    }
}

/// Watches the output from its first message to its last.
fn measure(process: &mut Process, kafka: &Kafka, observer: &BaseConsumer, output: &str, rows: u64) -> Result<Run> {
    let mut first = 0;
    wait_until("the first message comes out", PATIENCE, || {
        process.must_run()?;
        first = written(observer, output)?;
        Ok(first > 0)
    })?;
    let (began, cpu, server) = (Instant::now(), process.cpu()?, kafka.process.cpu()?);
    let watched = watch(process, began, rows, PATIENCE, || written(observer, output))?;
    let (cpu, server) = (process.cpu()?.saturating_sub(cpu), kafka.process.cpu()?.saturating_sub(server));
    ensure!(first < rows, "all {rows} messages came at once; give a greater --rows");
    Ok(Run { rows: watched.rows - first, wall: watched.wall, cpu, server })
}

/// Messages in a topic: nothing is ever deleted from it, and no transaction puts markers into it.
fn written(observer: &BaseConsumer, topic: &str) -> Result<u64> {
    let mut sum = 0;
    for partition in 0..PARTITIONS {
        let (_, high) = observer
            .fetch_watermarks(topic, partition, QUESTION)
            .with_context(|| format!("asking for the end of {topic}/{partition}"))?;
        sum += u64::try_from(high).unwrap_or(0);
    }
    Ok(sum)
}

/// What is compared of a message that came out.
#[derive(Deserialize)]
struct Id {
    reading: u64,
}

/// Reads the whole output: every id must be there, once.
fn check_ids(address: &str, output: &str, rows: u64) -> Result<()> {
    let reader: BaseConsumer =
        client(address).set("group.id", format!("check-{output}")).set("enable.auto.commit", "false").create()?;
    let mut partitions = TopicPartitionList::new();
    for partition in 0..PARTITIONS {
        partitions.add_partition_offset(output, partition, Offset::Beginning)?;
    }
    reader.assign(&partitions)?;
    let mut times = vec![0_u8; usize::try_from(rows)?];
    for read in 0..rows {
        let Some(message) = reader.poll(QUESTION) else { bail!("only {read} of {rows} messages can be read from {output}") };
        let message = message.context("reading the output back")?;
        let id: Id = serde_json::from_slice(message.payload().unwrap_or_default())
            .with_context(|| format!("a message of {output} is not what was expected"))?;
        match usize::try_from(id.reading).ok().and_then(|id| times.get_mut(id)) {
            Some(times) => *times = times.saturating_add(1),
            None => bail!("{output} holds the id {}, which nobody sent", id.reading),
        }
    }
    let wrong = times.iter().filter(|times| **times != 1).count();
    ensure!(wrong == 0, "{wrong} of {rows} ids are not exactly once in {output}");
    Ok(())
}

/// Told by librdkafka what the brokers said: counts down what is open of the record's epoch.
#[derive(Clone, Copy)]
struct Confirm;

impl ClientContext for Confirm {}

impl ProducerContext for Confirm {
    type DeliveryOpaque = Arc<AtomicU64>;

    fn delivery(&self, result: &DeliveryResult<'_>, open: Arc<AtomicU64>) {
        if let Err((cause, _)) = result {
            progress(format!("kafka did not take a record: {cause}"));
            exit(1);
        }
        open.fetch_sub(1, Ordering::Release);
    }
}

/// What was read between two commits.
struct Epoch {
    began: Instant,
    /// Records made of it that the brokers have not confirmed.
    open: Arc<AtomicU64>,
    /// The next offset of each partition.
    next: BTreeMap<i32, i64>,
}

impl Epoch {
    fn begin() -> Self {
        Self { began: Instant::now(), open: Arc::default(), next: BTreeMap::new() }
    }
}

/// The loop as one writes it by hand: `rival-kafka BROKERS INPUT OUTPUT GROUP`. Runs until it is killed.
///
/// # Errors
/// When Kafka fails, or a message is not JSON.
pub fn rival(arguments: &[String]) -> Result<()> {
    let [brokers, input, output, group] = arguments else { bail!("usage: rival-kafka BROKERS INPUT OUTPUT GROUP") };
    let mut settings = client(brokers);
    // The settings of our source.
    settings.set("group.id", group).set("auto.offset.reset", "earliest");
    settings.set("enable.auto.commit", "false").set("enable.auto.offset.store", "false");
    settings.set("queued.min.messages", "10000").set("queued.max.messages.kbytes", "16384");
    let consumer: BaseConsumer = settings.create().context("making a consumer")?;
    let producer: ThreadedProducer<Confirm> = producer(brokers).create_with_context(Confirm).context("making a producer")?;
    consumer.subscribe(&[input.as_str()])?;
    let mut reader = ReaderBuilder::new(schema()).with_batch_size(BATCH_ROWS).build_decoder()?;
    let mut epoch = Epoch::begin();
    let mut waiting: VecDeque<Epoch> = VecDeque::new();
    loop {
        let mut rows = 0;
        while rows < BATCH_ROWS {
            let wait = if rows == 0 { Duration::from_millis(10) } else { Duration::ZERO };
            let Some(message) = consumer.poll(wait) else { break };
            let message = message.context("reading a record")?;
            let payload = message.payload().unwrap_or_default();
            ensure!(reader.decode(payload)? == payload.len(), "a message was not read to its end");
            epoch.next.insert(message.partition(), message.offset() + 1);
            rows += 1;
        }
        if let Some(batch) = reader.flush()? {
            forward(&producer, output, &batch, &epoch.open)?;
        }
        if epoch.began.elapsed() >= COMMIT_EVERY {
            waiting.push_back(std::mem::replace(&mut epoch, Epoch::begin()));
        }
        while let Some(first) = waiting.front()
            && first.open.load(Ordering::Acquire) == 0
        {
            commit(&consumer, input, first)?;
            waiting.pop_front();
        }
    }
}

/// Encodes the rows and hands each line to the producer.
fn forward(producer: &ThreadedProducer<Confirm>, output: &str, batch: &RecordBatch, open: &Arc<AtomicU64>) -> Result<()> {
    let mut writer = LineDelimitedWriter::new(Vec::with_capacity(batch.num_rows() * 256));
    writer.write(batch)?;
    writer.finish()?;
    for line in writer.into_inner().split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        send(producer, output, None, line, open)?;
    }
    Ok(())
}

fn commit(consumer: &BaseConsumer, input: &str, epoch: &Epoch) -> Result<()> {
    if epoch.next.is_empty() {
        return Ok(());
    }
    let mut offsets = TopicPartitionList::new();
    for (partition, next) in &epoch.next {
        offsets.add_partition_offset(input, *partition, Offset::Offset(*next))?;
    }
    consumer.commit(&offsets, CommitMode::Async).context("committing offsets")
}
