//! The world outside a simulated pipeline: what the senders have sent and had acknowledged, what the
//! sinks hold, and the log of it all. It survives the pipeline's crashes, and it is the oracle.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arrow::array::{ArrayRef, AsArray, Int64Array, RecordBatch};
use arrow::datatypes::{DataType, Field, Int64Type, Schema, SchemaRef};
use tokio::time::Instant;

/// One row of the simulation: its source, its number there, and the path it took through the graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Row {
    /// Index of the source.
    pub source: i64,
    /// Number of the row in that source, from 0.
    pub id: i64,
    /// Hash of the stages it went through.
    pub path: i64,
}

/// The schema of simulated rows.
pub fn schema() -> SchemaRef {
    Arc::new(Schema::new(["source", "id", "path"].map(|name| Field::new(name, DataType::Int64, false)).to_vec()))
}

/// Rows as a record batch.
pub fn to_batch(rows: &[Row]) -> RecordBatch {
    let column = |of: fn(&Row) -> i64| Arc::new(Int64Array::from_iter_values(rows.iter().map(of))) as ArrayRef;
    let columns = vec![column(|row| row.source), column(|row| row.id), column(|row| row.path)];
    RecordBatch::try_new(schema(), columns).unwrap_or_else(|_| RecordBatch::new_empty(schema()))
}

/// A record batch as rows; also one of rejected rows, which say what they are in their position.
pub fn to_rows(batch: &RecordBatch) -> Vec<Row> {
    if let Some(positions) = batch.column_by_name("position").and_then(|column| column.as_string_opt::<i32>()) {
        return positions.iter().flatten().filter_map(from_position).collect();
    }
    let column = |at: usize| batch.column(at).as_primitive::<Int64Type>().values();
    (0..batch.num_rows()).map(|i| Row { source: column(0)[i], id: column(1)[i], path: column(2)[i] }).collect()
}

/// What the position of a rejected row says.
pub fn to_position(row: Row) -> String {
    format!("{},{},{}", row.source, row.id, row.path)
}

fn from_position(position: &str) -> Option<Row> {
    let mut numbers = position.split(',').map(str::parse::<i64>);
    match [numbers.next()?, numbers.next()?, numbers.next()?] {
        [Ok(source), Ok(id), Ok(path)] => Some(Row { source, id, path }),
        _ => None,
    }
}

/// How a source behaves after a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Goes back to the stored position (Kafka, files).
    Replayable,
    /// Sends again what was not acknowledged (MQTT).
    Redelivering,
}

/// What the world knows of one source.
#[derive(Debug)]
pub struct Sender {
    /// How it behaves after a crash.
    pub kind: Kind,
    /// How many rows it has in all.
    pub rows: i64,
    /// Rows before this one are acknowledged.
    pub acknowledged: i64,
    /// Rows before this one were handed to the pipeline at least once.
    pub sent: i64,
    /// It has been read to its end at least once.
    pub ended: bool,
    /// How many rows were under way at most: handed over by one start of the pipeline and not acknowledged.
    pub most_under_way: i64,
}

/// What one sink holds.
#[derive(Debug, Default)]
pub struct Held {
    /// What readers see, in order.
    pub visible: Vec<Row>,
    /// What is durable but not yet visible, by epoch.
    pub prepared: BTreeMap<u64, Vec<Row>>,
    /// It takes nothing from then to then, since the clock's start.
    pub down: Option<(Duration, Duration)>,
}

/// The world.
#[derive(Debug, Default)]
pub struct State {
    /// Sources by index.
    pub senders: Vec<Sender>,
    /// Sinks by index.
    pub sinks: Vec<Held>,
    /// Rows that ended in the dead-letter table, and how often.
    pub dead: BTreeMap<Row, usize>,
    /// Rows that were sent but not acknowledged when the pipeline connected anew, and how often.
    pub repeatable: BTreeMap<(i64, i64), usize>,
    /// For each sink the rows it must end up with. Filled by the simulation.
    pub expected: Vec<BTreeSet<Row>>,
    /// Rows that must end up in the dead-letter table.
    pub expected_dead: BTreeSet<Row>,
    /// True when some stage keeps rows back: then a row may be committed while it is only in a checkpoint.
    pub holds_rows: bool,
    /// Since when the disk of the checkpoint store is full.
    pub full_since: Option<Instant>,
    /// How often each kind of fault has occurred.
    pub faults: BTreeMap<&'static str, usize>,
    /// What went wrong, as soon as it is seen.
    pub violations: Vec<String>,
    /// Everything that happened, with its virtual time.
    pub log: String,
    /// Start of the simulation's clock.
    pub began: Option<Instant>,
}

/// The shared world.
#[derive(Clone, Debug, Default)]
pub struct World(Arc<Mutex<State>>);

impl World {
    /// Looks at it, or changes it.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Adds a line to the log.
    pub fn note(&mut self, line: impl std::fmt::Display) {
        let at = self.began.map_or(0, |began| began.elapsed().as_micros());
        let _ = writeln!(self.log, "{at:>10} {line}");
    }

    /// A fault of this kind occurs.
    pub fn struck(&mut self, fault: &'static str) {
        *self.faults.entry(fault).or_default() += 1;
    }

    /// Whether a sink takes nothing just now.
    pub fn is_down(&self, sink: usize) -> bool {
        let now = self.began.map_or(Duration::ZERO, |began| began.elapsed());
        self.sinks[sink].down.is_some_and(|(from, to)| from <= now && now < to)
    }

    /// The pipeline acknowledges everything of `source` before row `position`.
    pub fn acknowledge(&mut self, source: usize, position: i64) {
        self.note(format_args!("ack source {source} before {position}"));
        if !self.holds_rows {
            let from = self.senders[source].acknowledged;
            let missing = self.first_not_durable(source as i64, from, position);
            if let Some(row) = missing {
                self.violations.push(format!("committed ahead of durable: {row:?} acknowledged before it was durable"));
            }
        }
        // What was stored in time may be acknowledged a little later.
        if self.full_since.is_some_and(|since| since.elapsed() > Duration::from_secs(1)) {
            self.violations.push(format!("source {source}: acknowledged {position} while nothing could be stored"));
        }
        let sender = &mut self.senders[source];
        if position > sender.sent {
            self.violations.push(format!("source {source}: acknowledged {position}, but only {} were sent", sender.sent));
        }
        sender.acknowledged = sender.acknowledged.max(position);
    }

    fn first_not_durable(&self, source: i64, from: i64, to: i64) -> Option<Row> {
        for (sink, expected) in self.expected.iter().enumerate() {
            let held = &self.sinks[sink];
            let durable: BTreeSet<&Row> = held.visible.iter().chain(held.prepared.values().flatten()).collect();
            let wanted = expected.iter().filter(|row| row.source == source && row.id >= from && row.id < to);
            for row in wanted {
                if !durable.contains(row) {
                    return Some(*row);
                }
            }
        }
        None
    }

    /// A pipeline connects anew: what was sent and not acknowledged will come again.
    pub fn connected(&mut self, source: usize) {
        for id in self.senders[source].acknowledged..self.senders[source].sent {
            *self.repeatable.entry((source as i64, id)).or_default() += 1;
        }
    }

    /// What the end state violates, if anything.
    pub fn judge(&self) -> Vec<String> {
        let mut violations = self.violations.clone();
        for (sink, expected) in self.expected.iter().enumerate() {
            self.judge_sink(sink, expected, &mut violations);
        }
        for row in &self.expected_dead {
            if !self.dead.contains_key(row) {
                violations.push(format!("lost: rejected {row:?} is not in the dead letters"));
            }
        }
        for (row, count) in &self.dead {
            if !self.expected_dead.contains(row) {
                violations.push(format!("invented: dead letter {row:?}"));
            }
            self.judge_count(row, *count, "dead letters", &mut violations);
        }
        violations
    }

    fn judge_sink(&self, sink: usize, expected: &BTreeSet<Row>, violations: &mut Vec<String>) {
        let held = &self.sinks[sink];
        if held.prepared.values().any(|rows| !rows.is_empty()) {
            violations.push(format!("sink {sink}: prepared rows were never finished"));
        }
        let mut counts: BTreeMap<Row, usize> = BTreeMap::new();
        let mut newest: BTreeMap<(i64, i64), i64> = BTreeMap::new();
        for row in &held.visible {
            let count = counts.entry(*row).or_default();
            *count += 1;
            if *count > 1 {
                continue;
            }
            let newest = newest.entry((row.source, row.path)).or_insert(-1);
            if row.id < *newest {
                violations.push(format!("reordered: sink {sink} got {row:?} after number {newest}"));
            }
            *newest = (*newest).max(row.id);
        }
        for row in expected {
            if !counts.contains_key(row) {
                violations.push(format!("lost: sink {sink} never got {row:?}"));
            }
        }
        for (row, count) in &counts {
            if !expected.contains(row) {
                violations.push(format!("invented: sink {sink} got {row:?}"));
            }
            self.judge_count(row, *count, &format!("sink {sink}"), violations);
        }
    }

    /// A row may be there once, and once more for each restart that caught it unacknowledged; of a
    /// replayable source exactly once.
    fn judge_count(&self, row: &Row, count: usize, place: &str, violations: &mut Vec<String>) {
        let sender = &self.senders[row.source as usize];
        let repeats = match sender.kind {
            Kind::Replayable => 0,
            Kind::Redelivering => self.repeatable.get(&(row.source, row.id)).copied().unwrap_or(0),
        };
        if count > 1 + repeats {
            violations.push(format!("duplicated: {place} has {row:?} {count} times, {} allowed", 1 + repeats));
        }
    }
}
