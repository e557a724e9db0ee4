//! The thread that owns a source's Kafka consumer: polls it, turns records into batches, commits what has become
//! durable, and answers the group's rebalances, or takes the partitions that are written down. It is a thread
//! because librdkafka calls back from within a poll, and a rebalance may have to ask brokers or wait for the
//! pipeline, which must not happen on an I/O thread.
//!
//! *When the source is not pulled* the thread holds one finished batch and waits for room. After a moment it pauses
//! the partitions and goes on polling, so that the consumer stays a member of its group however long a sink is
//! down; what librdkafka has fetched ahead is bounded by `buffer_bytes`.
//!
//! *When partitions are taken away* the thread waits, within a deadline, until everything that was handed to the
//! engine from them is durable, and commits that: the next owner goes on behind it. For partitions that were lost
//! (we were silent for too long) nothing is waited for and nothing committed, for they are somebody else's already.

use std::collections::BTreeSet;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use afferent_engine::{Batch, Error, Result};
use arrow::datatypes::SchemaRef;
use prometheus::IntCounter;
use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext, RebalanceProtocol};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Headers};
use rdkafka::types::RDKafkaRespErr;
use rdkafka::{Message as _, Offset, TopicPartitionList};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::ownership::{Offsets, Ownership, Reset};
use super::partitions::Partitions;
use super::reach::{judge, log_line};
use crate::messages::{Message, Messages};

/// How long one poll waits; commits and the end of the thread wait as long at most.
const POLL: Duration = Duration::from_millis(50);
/// How long a full hand-over is waited for before the partitions are paused.
const BEFORE_PAUSE: Duration = Duration::from_secs(1);
/// How long a question to the brokers may take.
const QUESTION: Duration = Duration::from_secs(10);
/// How long the group waits for us to finish what we have of partitions that are taken away. Well below
/// `max.poll.interval.ms` (5 minutes), within which a member must answer.
const DRAIN: Duration = Duration::from_secs(10);
/// How long partitions are waited for before it is told.
const BEFORE_TELLING: Duration = Duration::from_secs(5);
/// Bytes after which a batch is handed on.
const BATCH_BYTES: usize = 4 * 1024 * 1024;

/// Where to begin in a partition for which neither a stored epoch nor the group knows an offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Beginning {
    Earliest,
    Latest,
    /// Milliseconds since 1970, UTC.
    Timestamp(i64),
    /// There must be a committed offset.
    Committed,
}

/// What the thread hands to the source.
pub(super) enum Chunk {
    /// Records, and the next offsets behind them.
    Rows(Batch, Offsets),
    /// Every partition was read to its end.
    End,
    /// The consumer cannot go on.
    Failed(Error),
}

/// What thread, callbacks and source share.
#[derive(Default)]
pub(super) struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    ownership: Ownership,
    closing: bool,
    /// Rises with every revocation: rows that were not handed over by then are read again by the next owner.
    revocations: u64,
    failure: Option<Error>,
    /// Partitions went away under rows on their way: nothing may be committed any more in this run.
    fenced: bool,
}

impl Shared {
    pub(super) fn new(stored: Offsets) -> Self {
        let state = State { ownership: Ownership::resuming(stored), ..State::default() };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Just behind the last row that the source has pulled.
    pub(super) fn position(&self) -> Offsets {
        self.state().ownership.position()
    }

    /// The engine has stored an epoch with this position.
    pub(super) fn durable(&self, position: &Offsets) {
        self.state().ownership.durable(position);
        self.changed.notify_all();
    }

    /// The source has taken a chunk, with rows up to these offsets if it has any: there is room again.
    pub(super) fn pulled(&self, upto: Option<&Offsets>) {
        // Under the lock, or the thread could look for room before this and begin to wait after it.
        let mut state = self.state();
        if let Some(upto) = upto {
            state.ownership.pulled(upto);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// The thread is to end.
    pub(super) fn close(&self) {
        self.state().closing = true;
        self.changed.notify_all();
    }
}

/// Answers librdkafka's callbacks, on the thread.
pub(super) struct Group {
    pub shared: Arc<Shared>,
    pub beginning: Beginning,
    /// What to do when a partition does not hold the offset at which it should begin.
    pub reset: Reset,
    /// Records that nobody will read because of that.
    pub unread: IntCounter,
}

impl ClientContext for Group {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, line: &str) {
        log_line(level, facility, line);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        // The poll that found it returns it as well, and there it is judged.
        debug!(%error, reason, "kafka client reports an error");
    }
}

impl ConsumerContext for Group {
    fn rebalance(&self, consumer: &BaseConsumer<Self>, what: RDKafkaRespErr, partitions: &mut TopicPartitionList) {
        let incremental = matches!(consumer.rebalance_protocol(), RebalanceProtocol::Cooperative);
        let answered = if what == RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS {
            self.assign(consumer, partitions, incremental)
        } else {
            self.revoke(consumer, partitions);
            if incremental { consumer.incremental_unassign(partitions) } else { consumer.unassign() }
        };
        if let Err(cause) = answered {
            self.fail(Error::fatal(cause).context("answering a rebalance"));
        }
    }

    fn commit_callback(&self, result: KafkaResult<()>, offsets: &TopicPartitionList) {
        match result {
            // Not committing is always safe: the same records are read again.
            Err(KafkaError::ConsumerCommit(RDKafkaErrorCode::NoOffset)) | Ok(()) => {}
            Err(cause) => warn!(%cause, partitions = offsets.count(), "kafka did not take a commit"),
        }
    }
}

impl Group {
    fn fail(&self, error: Error) {
        self.shared.state().failure.get_or_insert(error);
    }

    fn assign(&self, consumer: &BaseConsumer<Self>, partitions: &TopicPartitionList, incremental: bool) -> KafkaResult<()> {
        // An explicit offset for every partition: were it left to the library, a partition read from its end
        // would have no position until its first record, and what came during a crash would be skipped.
        let begin = self.look_up(consumer, partitions).unwrap_or_else(|error| {
            self.fail(error.context("finding out where to begin"));
            Offsets::default()
        });
        let mut list = TopicPartitionList::new();
        for (topic, partition, next) in begin.iter() {
            list.add_partition_offset(topic, partition, Offset::Offset(next))?;
        }
        info!(partitions = list.count(), "kafka partitions assigned");
        self.shared.state().ownership.assign(&begin);
        if incremental { consumer.incremental_assign(&list) } else { consumer.assign(&list) }
    }

    /// Where to begin in each of these partitions: at the further of our own position and what the group has
    /// committed, else where the configuration says.
    fn look_up(&self, consumer: &BaseConsumer<Self>, partitions: &TopicPartitionList) -> Result<Offsets> {
        let mut begin = Offsets::default();
        if partitions.count() == 0 {
            return Ok(begin);
        }
        let mut asked = TopicPartitionList::with_capacity(partitions.count());
        for element in partitions.elements() {
            asked.add_partition(element.topic(), element.partition());
        }
        let committed = consumer.committed_offsets(asked, QUESTION).map_err(Error::fatal)?;
        let mut fresh = TopicPartitionList::new();
        for element in committed.elements() {
            element.error().map_err(Error::fatal)?;
            let (topic, partition) = (element.topic(), element.partition());
            let group = match element.offset() {
                Offset::Offset(next) => Some(next),
                _ => None,
            };
            let next = self.shared.state().ownership.beginning(topic, partition, group);
            match next {
                Some(next) => begin.set(topic, partition, self.held(consumer, topic, partition, next)?),
                None => {
                    fresh.add_partition(topic, partition);
                }
            }
        }
        if fresh.count() > 0 {
            self.configured(consumer, fresh, &mut begin)?;
        }
        Ok(begin)
    }

    /// An offset that the partition holds: `next`, or what `auto.offset.reset` makes of it.
    fn held(&self, consumer: &BaseConsumer<Self>, topic: &str, partition: i32, next: i64) -> Result<i64> {
        let (low, high) = consumer.fetch_watermarks(topic, partition, QUESTION).map_err(Error::fatal)?;
        let (begin, unread) = self
            .reset
            .apply(next, low, high)
            .map_err(|cause| Error::fatal(cause).context(format!("partition {partition} of `{topic}`")))?;
        if begin != next {
            warn!(
                topic,
                partition,
                position = next,
                begin,
                unread,
                "a kafka partition does not hold our position; it is read from elsewhere"
            );
            self.unread.inc_by(unread);
        }
        Ok(begin)
    }

    /// Where to begin in partitions of which nothing is known, as the configuration says.
    fn configured(&self, consumer: &BaseConsumer<Self>, mut fresh: TopicPartitionList, begin: &mut Offsets) -> Result<()> {
        if let Beginning::Timestamp(time) = self.beginning {
            fresh.set_all_offsets(Offset::Offset(time)).map_err(Error::fatal)?;
            fresh = consumer.offsets_for_times(fresh, QUESTION).map_err(Error::fatal)?;
        }
        for element in fresh.elements() {
            let (topic, partition) = (element.topic(), element.partition());
            let next = match (self.beginning, element.offset()) {
                (Beginning::Timestamp(_), Offset::Offset(next)) => next,
                (Beginning::Earliest, _) => consumer.fetch_watermarks(topic, partition, QUESTION).map_err(Error::fatal)?.0,
                // No record is as young as the timestamp: all that come are.
                (Beginning::Latest | Beginning::Timestamp(_), _) => {
                    consumer.fetch_watermarks(topic, partition, QUESTION).map_err(Error::fatal)?.1
                }
                (Beginning::Committed, _) => {
                    return Err(Error::fatal(format!(
                        "the group has no committed offset for {topic}/{partition}, and `start` is `committed`"
                    )));
                }
            };
            begin.set(topic, partition, next);
        }
        Ok(())
    }

    fn revoke(&self, consumer: &BaseConsumer<Self>, partitions: &TopicPartitionList) {
        let lost = consumer.assignment_lost();
        let mut state = self.shared.state();
        let mut late = false;
        if !lost {
            let deadline = std::time::Instant::now() + DRAIN;
            while !state.closing && state.failure.is_none() && !state.ownership.drained() {
                let Some(left) = deadline.checked_duration_since(std::time::Instant::now()) else {
                    late = true;
                    break;
                };
                state = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            }
            let news = state.ownership.take_committable();
            drop(state);
            commit(consumer, &news, CommitMode::Sync);
            state = self.shared.state();
        }
        if (lost || late) && !state.closing && state.ownership.has_delivered() {
            // What is on its way would become durable here, and the next owner reads it as well.
            state.fenced = true;
            state.revocations += 1;
            let told = "kafka took partitions away before their records were durable; going back to the last epoch";
            state.failure.get_or_insert(Error::fatal(told));
            return;
        }
        for element in partitions.elements() {
            state.ownership.revoke(element.topic(), element.partition());
        }
        state.revocations += 1;
        info!(partitions = partitions.count(), lost, "kafka partitions revoked");
    }
}

/// Tells Kafka; a commit that fails is logged and no error.
fn commit(consumer: &BaseConsumer<Group>, offsets: &Offsets, mode: CommitMode) {
    if offsets.is_empty() {
        return;
    }
    let mut list = TopicPartitionList::with_capacity(offsets.len());
    for (topic, partition, next) in offsets.iter() {
        if let Err(cause) = list.add_partition_offset(topic, partition, Offset::Offset(next)) {
            warn!(topic, partition, next, %cause, "an offset cannot be committed");
        }
    }
    match consumer.commit(&list, mode) {
        Ok(()) | Err(KafkaError::ConsumerCommit(RDKafkaErrorCode::NoOffset)) => {}
        Err(cause) => warn!(%cause, "kafka did not take a commit"),
    }
}

/// The thread's own state.
pub(super) struct Reader {
    pub consumer: BaseConsumer<Group>,
    pub shared: Arc<Shared>,
    pub chunks: mpsc::Sender<Chunk>,
    pub topics: Vec<String>,
    pub partitions: Partitions,
    pub schema: SchemaRef,
    pub batch_rows: usize,
    pub stop_at_end: bool,
}

/// Records that were read and not handed over yet.
struct Gathered {
    rows: Messages,
    upto: Offsets,
    ingest: Option<Instant>,
    /// Partitions that were read to their end.
    ended: BTreeSet<i32>,
    /// Revocations that these rows have seen.
    revocations: u64,
}

impl Reader {
    /// Runs until it is told to close, or the source is gone.
    pub(super) fn run(self) {
        let mut gathered = Gathered {
            rows: Messages::new(Arc::clone(&self.schema), 0),
            upto: Offsets::default(),
            ingest: None,
            ended: BTreeSet::new(),
            revocations: 0,
        };
        let mut ended = false;
        if let Err(error) = self.take_partitions() {
            self.fail_later(error);
        }
        let mut waiting = Some(Instant::now());
        while !self.closing() && !self.chunks.is_closed() {
            self.commit_news(CommitMode::Async);
            if waiting.is_some_and(|since| since.elapsed() >= BEFORE_TELLING) {
                waiting = None;
                self.tell_waiting();
            }
            let step = self.gather(&mut gathered).and_then(|()| self.hand_over(&mut gathered));
            if let Err(error) = step {
                self.send(Chunk::Failed(error), &mut gathered);
                break;
            }
            if self.stop_at_end && !ended && self.at_end(&gathered) {
                ended = self.send(Chunk::End, &mut gathered);
            }
        }
        self.commit_news(CommitMode::Sync);
        // Dropping the consumer leaves the group; the callback of that must not wait for anybody any more.
        self.shared.close();
        debug!("kafka consumer closes");
    }

    /// Takes the partitions that are written down, each from where it is to begin; those of a group come by themselves.
    /// Asks brokers.
    fn take_partitions(&self) -> Result<()> {
        if self.partitions == Partitions::Group {
            return Ok(());
        }
        let mut list = TopicPartitionList::new();
        for topic in &self.topics {
            let told = self.consumer.fetch_metadata(Some(topic.as_str()), QUESTION).map_err(Error::fatal)?;
            let present: BTreeSet<i32> =
                told.topics().iter().flat_map(|topic| topic.partitions()).map(|partition| partition.id()).collect();
            for partition in self.partitions.of(topic, &present)? {
                list.add_partition(topic, partition);
            }
        }
        let taken = self.consumer.context().assign(&self.consumer, &list, false);
        taken.map_err(|cause| Error::fatal(cause).context("taking the partitions that are written down"))
    }

    /// Says so when the group has not given us anything yet.
    fn tell_waiting(&self) {
        if !self.shared.state().ownership.assigned {
            warn!(
                topics = ?self.topics,
                "waiting for the group's partitions: they are still with a member that has them, or whose session has not ended"
            );
        }
    }

    fn closing(&self) -> bool {
        self.shared.state().closing
    }

    fn commit_news(&self, mode: CommitMode) {
        let mut state = self.shared.state();
        if state.fenced {
            return;
        }
        let news = state.ownership.take_committable();
        drop(state);
        commit(&self.consumer, &news, mode);
    }

    fn at_end(&self, gathered: &Gathered) -> bool {
        let state = self.shared.state();
        // Rows that are still to be handed over come before the end.
        let all_sent = gathered.rows.rows() == 0 && state.ownership.assigned && !state.ownership.owned().is_empty();
        all_sent && state.ownership.owned().iter().all(|(_, partition, _)| gathered.ended.contains(&partition))
    }

    /// Waits for a record, then takes what is there, up to the limits of a batch.
    fn gather(&self, gathered: &mut Gathered) -> Result<()> {
        let mut wait = POLL;
        while gathered.rows.rows() < self.batch_rows && gathered.rows.bytes() < BATCH_BYTES && self.poll(gathered, wait)? {
            wait = Duration::ZERO;
        }
        Ok(())
    }

    /// One poll; false when nothing came.
    fn poll(&self, gathered: &mut Gathered, wait: Duration) -> Result<bool> {
        let polled = self.consumer.poll(wait);
        self.after_callbacks(gathered)?;
        match polled {
            None => return Ok(false),
            Some(Ok(record)) => {
                gathered.ended.remove(&record.partition());
                add(&record, gathered)?;
            }
            Some(Err(KafkaError::PartitionEOF(partition))) => {
                gathered.ended.insert(partition);
            }
            Some(Err(error)) => judge(error)?,
        }
        Ok(true)
    }

    /// A poll may have run callbacks: what they found out is dealt with here.
    fn after_callbacks(&self, gathered: &mut Gathered) -> Result<()> {
        let (failure, revocations) = {
            let mut state = self.shared.state();
            (state.failure.take(), state.revocations)
        };
        if gathered.revocations != revocations {
            gathered.revocations = revocations;
            // With the default (eager) protocol all partitions were taken away, and those that come back begin
            // behind the last row that was handed over.
            gathered.rows.finish()?;
            gathered.upto = Offsets::default();
            gathered.ended.clear();
            gathered.ingest = None;
        }
        failure.map_or(Ok(()), Err)
    }

    fn hand_over(&self, gathered: &mut Gathered) -> Result<()> {
        if gathered.rows.rows() == 0 {
            return Ok(());
        }
        let batch = Batch::since(gathered.rows.finish()?, gathered.ingest.take().unwrap_or_else(Instant::now));
        let upto = std::mem::take(&mut gathered.upto);
        self.send(Chunk::Rows(batch, upto), gathered);
        Ok(())
    }

    /// Waits for room and hands the chunk over; false when it was not. Meanwhile the consumer goes on being polled
    /// with its partitions paused; what it still yields is gathered for the next chunk.
    fn send(&self, chunk: Chunk, gathered: &mut Gathered) -> bool {
        let made = gathered.revocations;
        let began = Instant::now();
        let mut paused = false;
        let permit = loop {
            {
                let state = self.shared.state();
                match self.chunks.try_reserve() {
                    Ok(permit) => break permit,
                    Err(TrySendError::Full(())) if !state.closing => {
                        drop(self.shared.changed.wait_timeout(state, POLL).unwrap_or_else(PoisonError::into_inner));
                    }
                    // The rows are not missed: they are not committed.
                    Err(_) => return false,
                }
            }
            if began.elapsed() < BEFORE_PAUSE {
                continue;
            }
            // After a rebalance the new partitions are not paused yet; pausing twice does no harm.
            match self.consumer.assignment().and_then(|assigned| self.consumer.pause(&assigned)) {
                Ok(()) => paused = true,
                Err(cause) => debug!(%cause, "kafka partitions cannot be paused"),
            }
            self.commit_news(CommitMode::Async);
            if let Err(error) = self.poll(gathered, Duration::ZERO) {
                self.fail_later(error);
            }
        };
        if paused && let Err(cause) = self.consumer.assignment().and_then(|assigned| self.consumer.resume(&assigned)) {
            self.fail_later(Error::fatal(cause).context("resuming kafka partitions"));
        }
        // Rows of partitions that were taken away while they waited here are read by the next owner.
        if made != gathered.revocations && !matches!(chunk, Chunk::Failed(_)) {
            return false;
        }
        if let Chunk::Rows(_, upto) = &chunk {
            self.shared.state().ownership.delivered(upto);
        }
        permit.send(chunk);
        true
    }

    fn fail_later(&self, error: Error) {
        self.shared.state().failure.get_or_insert(error);
    }
}

fn add(record: &BorrowedMessage<'_>, gathered: &mut Gathered) -> Result<()> {
    let message = Message {
        payload: record.payload().unwrap_or_default(),
        key: record.key(),
        topic: record.topic(),
        timestamp: record.timestamp().to_millis().unwrap_or_default(),
        partition: record.partition(),
        offset: record.offset(),
    };
    match record.headers() {
        None => gathered.rows.push(&message, std::iter::empty(), &[])?,
        Some(headers) => gathered.rows.push(&message, headers.iter().map(|header| (header.key, header.value)), &[])?,
    }
    gathered.upto.set(record.topic(), record.partition(), record.offset() + 1);
    gathered.ingest.get_or_insert_with(Instant::now);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_position_is_the_stored_one_until_there_is_news() {
        let mut stored = Offsets::default();
        stored.set("t", 0, 9);
        let shared = Shared::new(stored.clone());
        assert_eq!(shared.position(), stored);
        let mut begin = Offsets::default();
        begin.set("t", 1, 4);
        shared.state().ownership.assign(&begin);
        assert_eq!((shared.position().get("t", 0), shared.position().get("t", 1)), (Some(9), Some(4)));
        begin.set("t", 1, 6);
        shared.pulled(None);
        shared.pulled(Some(&begin));
        assert_eq!((shared.position().get("t", 0), shared.position().get("t", 1)), (Some(9), Some(6)));
    }
}
