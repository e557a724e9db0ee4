//! Stages of the simulation: memory sources and sinks, and operators that pass, split, hold, reject and
//! dawdle, all with faults drawn from a seed. The world counts the faults that occur.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arrow::array::RecordBatch;
use async_trait::async_trait;
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::time::{Instant, sleep, sleep_until};

use super::world::{Row, World, to_batch, to_position, to_rows};
use crate::batch::Batch;
use crate::error::{Error, Result};
use crate::graph::Port;
use crate::operator::{AsyncOperator, Operator, Outputs, State, StateDelta};
use crate::position::{Epoch, Position};
use crate::rejected::{Given, Rejected};
use crate::sink::{Prepared, Sink};
use crate::source::{Pulled, Source};
use crate::supervisor::DeadLetters;

/// How often things go wrong, in parts of a thousand per call.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// A call fails and may be repeated.
    pub retry: u32,
    /// A call fails for good: the pipeline restarts.
    pub fatal: u32,
    /// A stage panics.
    pub panic: u32,
    /// Opening takes up to some seconds.
    pub slow_open: u32,
    /// A call of the dead-letter table fails.
    pub dead_letters: u32,
    /// A call takes this long at most, in virtual microseconds.
    pub delay: u64,
}

impl Faults {
    fn strike(&self, world: &World, random: &mut fastrand::Rng, what: &str) -> Result<()> {
        let dice = random.u32(0..1000);
        if dice < self.retry {
            world.lock().struck("retry");
            return Err(Error::retry(format!("{what}: try again")));
        }
        if dice < self.retry + self.fatal {
            world.lock().struck("fatal");
            return Err(Error::fatal(format!("{what}: broken")));
        }
        let panics = dice < self.retry + self.fatal + self.panic;
        if panics {
            world.lock().struck("panic");
        }
        assert!(!panics, "{what}: planted panic");
        Ok(())
    }

    async fn dawdle(&self, random: &mut fastrand::Rng) {
        if self.delay > 0 && random.bool() {
            sleep(Duration::from_micros(random.u64(0..self.delay))).await;
        }
    }
}

/// When that which opens is open. Kept while opening is interrupted and begun again.
#[derive(Debug, Default)]
pub struct Opening(Option<Instant>);

impl Opening {
    async fn wait(&mut self, faults: &Faults, world: &World, random: &mut fastrand::Rng) {
        let open_at = *self.0.get_or_insert_with(|| {
            let slow = random.u32(0..1000) < faults.slow_open;
            if slow {
                world.lock().struck("slow open");
            }
            Instant::now() + Duration::from_millis(if slow { random.u64(1..3_000) } else { 0 })
        });
        if open_at > Instant::now() {
            sleep_until(open_at).await;
        }
    }
}

/// A source of numbered rows.
pub struct MemorySource {
    /// Its index in the world.
    pub index: usize,
    /// The world.
    pub world: World,
    /// Where it stands.
    pub next: i64,
    /// At most this many rows a pull.
    pub pull: i64,
    /// At most this many unacknowledged, like a broker's in-flight window; 0: no limit.
    pub window: i64,
    /// Whether it is open yet.
    pub opening: Opening,
    /// What goes wrong.
    pub faults: Faults,
    /// Where chance comes from.
    pub random: fastrand::Rng,
}

#[async_trait]
impl Source for MemorySource {
    async fn open(&mut self, from: Option<&Position>) -> Result<()> {
        self.opening.wait(&self.faults, &self.world, &mut self.random).await;
        self.faults.strike(&self.world, &mut self.random, "opening the source")?;
        let acknowledged = self.world.lock().senders[self.index].acknowledged;
        self.next = match (self.world.lock().senders[self.index].kind, from) {
            (super::world::Kind::Redelivering, _) => acknowledged,
            (super::world::Kind::Replayable, Some(position)) => position.read()?,
            (super::world::Kind::Replayable, None) => 0,
        };
        let mut world = self.world.lock();
        world.connected(self.index);
        world.note(format_args!("open source {} at {}", self.index, self.next));
        Ok(())
    }

    async fn next(&mut self) -> Result<Pulled> {
        self.faults.dawdle(&mut self.random).await;
        self.faults.strike(&self.world, &mut self.random, "pulling")?;
        let (rows, acknowledged) = {
            let mut world = self.world.lock();
            let sender = &mut world.senders[self.index];
            sender.ended |= self.next >= sender.rows;
            (sender.rows, sender.acknowledged)
        };
        if self.next >= rows {
            return Ok(Pulled::End);
        }
        let room = if self.window > 0 { acknowledged + self.window - self.next } else { i64::MAX };
        if room <= 0 {
            // The broker sends no more until something is acknowledged, and that interrupts this call.
            return std::future::pending().await;
        }
        let count = self.random.i64(1..=self.pull).min(rows - self.next).min(room);
        let pulled: Vec<Row> = (self.next..self.next + count).map(|id| Row { source: self.index as i64, id, path: 1 }).collect();
        self.next += count;
        let mut world = self.world.lock();
        let sender = &mut world.senders[self.index];
        sender.sent = sender.sent.max(self.next);
        sender.most_under_way = sender.most_under_way.max(self.next - sender.acknowledged);
        world.note(format_args!("source {} sends before {}", self.index, self.next));
        Ok(Pulled::Batch(Batch::new(to_batch(&pulled))))
    }

    fn position(&self) -> Position {
        Position::of(&self.next)
    }

    async fn commit(&mut self, position: &Position) -> Result<()> {
        self.world.lock().acknowledge(self.index, position.read()?);
        Ok(())
    }

    fn window_full(&self) -> bool {
        self.window > 0 && self.next - self.world.lock().senders[self.index].acknowledged >= self.window
    }
}

/// The path of a row behind stage number `stage`.
pub fn path_behind(path: i64, stage: usize) -> i64 {
    path.wrapping_mul(1_000_003).wrapping_add(stage as i64 + 7)
}

/// A row as it leaves by a `rejected` output: on a path of its own, since order between the outputs is not promised.
pub fn turned_away(row: Row) -> Row {
    Row { path: path_behind(row.path, 500), ..row }
}

fn reject(row: Row) -> Rejected {
    Rejected {
        code: "planted",
        reason: "every so many-th".into(),
        position: to_position(turned_away(row)),
        given: Given::Row("{}".into()),
    }
}

/// The rows of a batch that has arrived.
fn arrived(batch: &RecordBatch, world: &World) -> Vec<Row> {
    if batch.column_by_name("reason").is_some() {
        world.lock().struck("rejected edge");
    }
    to_rows(batch)
}

fn walked(batch: &RecordBatch, world: &World, stage: usize) -> Vec<Row> {
    arrived(batch, world).into_iter().map(|row| Row { path: path_behind(row.path, stage), ..row }).collect()
}

/// What a simulated operator does with a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Passes it on.
    Pass,
    /// Even rows to output 0, odd rows to output 1.
    Split,
    /// Keeps rows back until it has this many of a source, then passes them on together.
    Hold(usize),
    /// Rejects every so many-th row.
    Reject(i64),
}

impl Verb {
    /// The output that a row takes, and the row as it leaves. The outputs of a split are different paths: where they
    /// meet again, order between them is not promised.
    pub fn apply(self, row: Row) -> (Port, Row) {
        match self {
            Verb::Reject(every) if row.id % every == 0 => (Port::Rejected, turned_away(row)),
            Verb::Pass | Verb::Hold(_) | Verb::Reject(_) => (Port::Output(0), row),
            Verb::Split => {
                let output = (row.id % 2) as usize;
                (Port::Output(output), Row { path: path_behind(row.path, output), ..row })
            }
        }
    }
}

/// A synchronous operator.
pub struct MemoryOperator {
    /// Its index in the graph.
    pub stage: usize,
    /// What it does.
    pub verb: Verb,
    /// The world.
    pub world: World,
    /// What goes wrong.
    pub faults: Faults,
    /// Where chance comes from.
    pub random: fastrand::Rng,
    /// Rows kept back, by source.
    pub held: BTreeMap<i64, Vec<Row>>,
    /// Sources whose held rows have changed since the last barrier.
    pub changed: std::collections::BTreeSet<i64>,
}

impl Operator for MemoryOperator {
    fn process(&mut self, _: usize, batch: Batch, outputs: &mut Outputs) -> Result<()> {
        self.faults.strike(&self.world, &mut self.random, "an operator")?;
        let rows = walked(batch.records(), &self.world, self.stage);
        if let Verb::Hold(size) = self.verb {
            for row in rows {
                let held = self.held.entry(row.source).or_default();
                held.push(row);
                self.changed.insert(row.source);
                if held.len() == size {
                    outputs.emit(batch.derive(to_batch(&std::mem::take(held))));
                }
            }
            return Ok(());
        }
        let mut by_output: BTreeMap<usize, Vec<Row>> = BTreeMap::new();
        for row in rows {
            match self.verb.apply(row) {
                (Port::Output(output), row) => by_output.entry(output).or_default().push(row),
                (Port::Rejected, _) => outputs.reject([reject(row)]),
            }
        }
        for (output, rows) in by_output {
            outputs.emit_to(output, batch.derive(to_batch(&rows)));
        }
        Ok(())
    }

    fn finish(&mut self, outputs: &mut Outputs) -> Result<()> {
        for (source, rows) in std::mem::take(&mut self.held) {
            self.changed.insert(source);
            outputs.emit(Batch::new(to_batch(&rows)));
        }
        Ok(())
    }

    fn snapshot(&mut self) -> Result<StateDelta> {
        let mut delta = StateDelta::default();
        for source in std::mem::take(&mut self.changed) {
            let key = source.to_be_bytes().to_vec();
            match self.held.get(&source).filter(|rows| !rows.is_empty()) {
                Some(rows) => {
                    let values = rows.iter().flat_map(|row| [row.source, row.id, row.path]).flat_map(i64::to_le_bytes);
                    delta.puts.push((key, values.collect()));
                }
                None => delta.deletes.push(key),
            }
        }
        Ok(delta)
    }

    fn restore(&mut self, state: State) -> Result<()> {
        for (_, value) in state {
            let numbers: Vec<i64> = value.as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect();
            for row in numbers.chunks_exact(3) {
                self.held.entry(row[0]).or_default().push(Row { source: row[0], id: row[1], path: row[2] });
            }
        }
        Ok(())
    }
}

/// An asynchronous operator that takes its time: how long depends on the rows, so that later calls
/// overtake earlier ones.
pub struct MemoryAsync {
    /// Its index in the graph.
    pub stage: usize,
    /// Overlapping calls.
    pub concurrency: usize,
    /// The world.
    pub world: World,
    /// What goes wrong.
    pub faults: Faults,
    /// Where chance comes from.
    pub seed: u64,
}

impl AsyncOperator for MemoryAsync {
    fn call(&self, batch: Batch) -> BoxFuture<'static, Result<Outputs>> {
        let first = to_rows(batch.records()).first().map_or(0, |row| row.id);
        // With the time in it, so that a call that is repeated does not fail for ever.
        let now = self.world.lock().began.map_or(0, |began| began.elapsed().as_nanos() as u64);
        let mut random = fastrand::Rng::with_seed(self.seed ^ (first as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ now);
        let (stage, faults, world) = (self.stage, self.faults, self.world.clone());
        async move {
            sleep(Duration::from_micros(random.u64(0..faults.delay.max(1) * 4))).await;
            faults.strike(&world, &mut random, "a call")?;
            let mut outputs = Outputs::new();
            outputs.emit(batch.derive(to_batch(&walked(batch.records(), &world, stage))));
            Ok(outputs)
        }
        .boxed()
    }

    fn concurrency(&self) -> usize {
        self.concurrency
    }
}

/// Which rows a simulated sink never takes, and when it says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It takes all.
    Never,
    /// Every so many-th, as it is written.
    AtWrite(i64),
    /// Every so many-th, when the epoch is prepared.
    AtPrepare(i64),
}

impl Refusal {
    /// Whether it never takes this row.
    pub fn refuses(self, row: Row) -> bool {
        match self {
            Refusal::Never => false,
            Refusal::AtWrite(every) | Refusal::AtPrepare(every) => row.id % every == 0,
        }
    }
}

/// A transactional sink.
pub struct MemorySink {
    /// Its index among the sinks of the world.
    pub index: usize,
    /// The world.
    pub world: World,
    /// What it does not take.
    pub refusal: Refusal,
    /// Whether it is open yet.
    pub opening: Opening,
    /// Written and not yet prepared: gone with the process.
    pub buffer: Vec<Row>,
    /// What goes wrong.
    pub faults: Faults,
    /// Where chance comes from.
    pub random: fastrand::Rng,
}

impl MemorySink {
    async fn strike(&mut self, what: &str) -> Result<()> {
        self.faults.dawdle(&mut self.random).await;
        let mut world = self.world.lock();
        if world.is_down(self.index) {
            world.struck("sink down");
            return Err(Error::retry(format!("{what}: the peer is down")));
        }
        drop(world);
        self.faults.strike(&self.world, &mut self.random, what)
    }

    /// Takes those rows out of `rows` that it never takes.
    fn refuse(&self, rows: &mut Vec<Row>) -> Vec<Rejected> {
        let refused: Vec<Rejected> = rows.iter().filter(|row| self.refusal.refuses(**row)).map(|row| reject(*row)).collect();
        rows.retain(|row| !self.refusal.refuses(*row));
        refused
    }
}

#[async_trait]
impl Sink for MemorySink {
    async fn open(&mut self, last: Option<(Epoch, &Prepared)>) -> Result<()> {
        self.opening.wait(&self.faults, &self.world, &mut self.random).await;
        self.faults.strike(&self.world, &mut self.random, "opening the sink")?;
        let through = last.map_or(0, |(epoch, _)| epoch.as_u64());
        let mut world = self.world.lock();
        let held = &mut world.sinks[self.index];
        let undone = held.prepared.split_off(&(through + 1));
        for rows in std::mem::take(&mut held.prepared).into_values() {
            held.visible.extend(rows);
        }
        world.note(format_args!("open sink {} after {through:x}, undone {}", self.index, undone.len()));
        Ok(())
    }

    async fn write(&mut self, _: usize, batch: Batch) -> Result<Vec<Rejected>> {
        self.strike("writing").await?;
        let mut rows = arrived(batch.records(), &self.world);
        let mut refused = Vec::new();
        if matches!(self.refusal, Refusal::AtWrite(_)) {
            refused = self.refuse(&mut rows);
        }
        if !refused.is_empty() {
            self.world.lock().struck("refused at write");
        }
        self.buffer.extend(rows);
        Ok(refused)
    }

    async fn prepare(&mut self, epoch: Epoch) -> Result<(Prepared, Vec<Rejected>)> {
        self.strike("preparing").await?;
        let mut rows = std::mem::take(&mut self.buffer);
        // What is refused at the write is not in the buffer.
        let refused = self.refuse(&mut rows);
        let mut world = self.world.lock();
        if !refused.is_empty() {
            let at_the_end = world.senders.iter().all(|sender| sender.ended);
            world.struck(if at_the_end { "refused in prepare at the end of input" } else { "refused in prepare" });
        }
        world.note(format_args!("sink {} prepares {epoch}: {} rows", self.index, rows.len()));
        world.sinks[self.index].prepared.insert(epoch.as_u64(), rows);
        Ok((Prepared::Null, refused))
    }

    async fn finish(&mut self, epoch: Epoch, _: &Prepared) -> Result<()> {
        self.strike("finishing").await?;
        let mut world = self.world.lock();
        let held = &mut world.sinks[self.index];
        if let Some(rows) = held.prepared.remove(&epoch.as_u64()) {
            held.visible.extend(rows);
        }
        world.note(format_args!("sink {} finishes {epoch}", self.index));
        Ok(())
    }
}

/// A dead-letter table in the world.
pub struct MemoryDeadLetters {
    /// The world.
    pub world: World,
    /// The newest number taken; survives crashes by living in the world's `Arc`.
    pub newest: Arc<AtomicU64>,
    /// What goes wrong.
    pub faults: Faults,
    /// Where chance comes from.
    pub random: fastrand::Rng,
}

impl MemoryDeadLetters {
    fn fails(&mut self, fault: &'static str) -> Result<()> {
        if self.random.u32(0..1000) >= self.faults.dead_letters {
            return Ok(());
        }
        self.world.lock().struck(fault);
        Err(Error::retry(fault))
    }
}

#[async_trait]
impl DeadLetters for MemoryDeadLetters {
    async fn newest(&mut self, _: &str) -> Result<u64> {
        self.faults.dawdle(&mut self.random).await;
        Ok(self.newest.load(Ordering::SeqCst))
    }

    async fn append(&mut self, _: &str, number: u64, rows: RecordBatch) -> Result<()> {
        self.faults.dawdle(&mut self.random).await;
        self.fails("dead letters refused")?;
        self.newest.store(number, Ordering::SeqCst);
        for row in to_rows(&rows) {
            *self.world.lock().dead.entry(row).or_default() += 1;
        }
        self.fails("dead letters taken, and not said so")
    }
}
