//! The words between the stage loops and the epoch coordinator: commands one way, reports the other, and why
//! a loop ended.

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::checkpoint::SourceMark;
use crate::edge::Disconnected;
use crate::error::Error;
use crate::operator::StateDelta;
use crate::position::{Epoch, Position};
use crate::sabotage::Planted;
use crate::sink::Prepared;

/// What the coordinator asks of a source.
#[derive(Debug)]
pub(crate) enum SourceCommand {
    /// Let this barrier go behind what has been emitted.
    Barrier(Epoch),
    /// Everything up to this position is durable.
    Commit(Position),
    /// Pull nothing until the next barrier.
    Hold,
    /// Pull no more; barriers and commits still follow.
    Drain,
    /// The last epoch is done.
    Close,
}

/// What the coordinator asks of a sink.
#[derive(Debug)]
pub(crate) enum SinkCommand {
    /// The epoch is stored.
    Finish(Epoch, Prepared),
    /// The last epoch is done.
    Close,
}

/// What a stage tells the coordinator.
#[derive(Debug)]
pub(crate) enum Report {
    /// A source has emitted something since its last barrier; its earliest row came in then.
    Uncommitted(Instant),
    /// A barrier should go at once: the peer's window is full.
    Urgent,
    /// A barrier should go at once, and until it does nothing more should come in: so many rejected rows are held.
    Full,
    /// A source has read its input to the end.
    Ended,
    /// A task has passed a barrier.
    Passed(Epoch, Box<Passed>),
}

/// What a task hands over when a barrier passes it.
#[derive(Debug, Default)]
pub(crate) struct Passed {
    pub(crate) source: Option<(String, SourceMark)>,
    pub(crate) deltas: Vec<(String, StateDelta)>,
    pub(crate) sink: Option<(String, Prepared)>,
    pub(crate) rejected: Vec<Vec<u8>>,
}

/// What every stage loop has at hand.
#[derive(Clone)]
pub(crate) struct Loop {
    pub(crate) pipeline: Arc<str>,
    pub(crate) reports: mpsc::Sender<Report>,
    /// Seed of the jitter of retries; from the clock in production, fixed in the simulation.
    pub(crate) seed: u64,
    pub(crate) planted: Planted,
    /// Milliseconds since 1970 at `started`; rejects are stamped with it plus the time since.
    pub(crate) wall: i64,
    pub(crate) started: Instant,
    /// How many bytes of rejects a stage holds before it asks for a barrier.
    pub(crate) held_rejects: usize,
}

impl Loop {
    /// Sends a report; only fails when the pipeline is being torn down.
    pub(crate) async fn report(&self, report: Report) -> Result<(), Stop> {
        self.reports.send(report).await.map_err(|_| Stop::TornDown)
    }

    /// Now, in milliseconds since 1970, on the clock of the run (virtual in the simulation).
    pub(crate) fn now_ms(&self) -> i64 {
        self.wall + i64::try_from(self.started.elapsed().as_millis()).unwrap_or(i64::MAX)
    }
}

/// Why a stage loop ended before its time.
#[derive(Debug)]
pub(crate) enum Stop {
    /// Someone else failed or the run was stopped: nothing to say.
    TornDown,
    /// This stage failed.
    Failed {
        /// Which one.
        stage: String,
        /// Why.
        error: Error,
    },
}

impl From<Disconnected> for Stop {
    fn from(_: Disconnected) -> Self {
        Stop::TornDown
    }
}

/// Ends a stage with an error that names it.
pub(crate) fn failed(stage: &str, error: Error) -> Stop {
    Stop::Failed { stage: stage.to_owned(), error }
}
