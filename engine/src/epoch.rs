//! The epoch coordinator of a running pipeline: decides when a barrier is due, collects what the stages
//! hand over as it passes, stores the epoch in one transaction, and only then lets sinks finish and
//! sources commit.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{Instrument, Span};

use crate::checkpoint::{Checkpoints, Record};
use crate::error::{Error, Result};
use crate::metrics::PipelineMetrics;
use crate::position::Epoch;
use crate::stage::{Passed, Report, SinkCommand, SourceCommand};

/// Epochs that may be under way at once. More only helps while an fsync takes longer than the commit
/// interval, and every one more widens what a crash repeats.
pub(crate) const EPOCHS_IN_FLIGHT: usize = 4;
/// Room for commands to one stage: a barrier, a commit and a hold for each epoch in flight, drain and close. The
/// coordinator never waits for a stage, so this must never fill up.
pub(crate) const COMMANDS: usize = 3 * EPOCHS_IN_FLIGHT + 8;

/// How often the age of uncommitted rows is measured while nothing else happens.
const MEASURE_EVERY: Duration = Duration::from_secs(1);

/// Where calls of the checkpoint store run: on a thread that may block, or on virtual time (simulation).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Blocking {
    Pool,
    Virtual,
}

impl Blocking {
    /// Calls the store. A call that nobody waits for any more goes on all the same; the store refuses what comes late.
    pub(crate) async fn call<T: Send + 'static>(
        self,
        store: &Arc<Checkpoints>,
        work: impl FnOnce(&Checkpoints) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let store = Arc::clone(store);
        let called = match (self, store.delay()) {
            (Blocking::Pool, _) => {
                let span = Span::current();
                tokio::task::spawn_blocking(move || span.in_scope(|| work(&store)))
            }
            (Blocking::Virtual, delay) if delay.is_zero() => return work(&store),
            (Blocking::Virtual, delay) => tokio::spawn(async move {
                sleep(delay).await;
                work(&store)
            }),
        };
        called.await.map_err(Error::fatal)?
    }
}

/// An epoch on its way through the graph.
struct InFlight {
    epoch: Epoch,
    began: Instant,
    /// Ingest of the earliest row it covers, when it covers any.
    since: Option<Instant>,
    missing: usize,
    record: Record,
}

/// The coordinator.
pub(crate) struct Coordinator {
    /// Name of the pipeline, for the log.
    pub(crate) pipeline: String,
    pub(crate) store: Arc<Checkpoints>,
    pub(crate) blocking: Blocking,
    pub(crate) pace: Duration,
    pub(crate) sources: Vec<(String, mpsc::Sender<SourceCommand>)>,
    pub(crate) sinks: Vec<(String, mpsc::Sender<SinkCommand>)>,
    /// Number of tasks that hand over something at each barrier.
    pub(crate) tasks: usize,
    pub(crate) metrics: PipelineMetrics,
    /// Told whenever an epoch with rejects was stored.
    pub(crate) rejects_stored: Arc<tokio::sync::Notify>,
    pub(crate) state: Pacing,
}

/// What the coordinator knows of the stream between two reports.
pub(crate) struct Pacing {
    last: Epoch,
    in_flight: VecDeque<InFlight>,
    /// Ingest of the earliest row that no barrier covers yet.
    uncommitted: Option<Instant>,
    urgent: bool,
    /// Sources were told to hold until the next barrier.
    held: bool,
    last_barrier: Option<Instant>,
    ended: usize,
    draining: bool,
    /// The last barrier has gone: nothing follows it.
    last_sent: bool,
}

impl Pacing {
    pub(crate) fn from(start: Epoch) -> Self {
        Self {
            last: start,
            in_flight: VecDeque::new(),
            uncommitted: None,
            urgent: false,
            held: false,
            last_barrier: None,
            ended: 0,
            draining: false,
            last_sent: false,
        }
    }
}

/// Why a run came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Every source has read its input to the end.
    Ended,
    /// Asked to stop; everything that had come in was processed and committed.
    Drained,
}

impl Coordinator {
    /// Runs until the last epoch is committed, then closes the stages.
    pub(crate) async fn run(
        mut self,
        mut reports: mpsc::Receiver<Report>,
        drain: tokio_util::sync::CancellationToken,
    ) -> Result<Ending> {
        loop {
            self.measure_age();
            if self.state.last_sent && self.state.in_flight.is_empty() {
                break;
            }
            let due = self.due();
            tokio::select! {
                biased;
                report = reports.recv() => match report {
                    Some(report) => self.take(report).await?,
                    None => return Err(Error::fatal("every stage is gone")),
                },
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => self.begin_epoch()?,
                // Nothing comes from a stage that waits for its peer, and the age grows all the same.
                () = sleep_until(Instant::now() + MEASURE_EVERY), if self.oldest().is_some() => {}
                () = drain.cancelled(), if !self.state.draining => {
                    self.state.draining = true;
                    for (name, source) in &self.sources {
                        command(name, source, SourceCommand::Drain)?;
                    }
                }
            }
        }
        for (name, source) in &self.sources {
            command(name, source, SourceCommand::Close)?;
        }
        for (name, sink) in &self.sinks {
            command(name, sink, SinkCommand::Close)?;
        }
        Ok(if self.all_ended() { Ending::Ended } else { Ending::Drained })
    }

    fn all_ended(&self) -> bool {
        self.state.ended == self.sources.len()
    }

    /// When the next barrier should go, if one is wanted.
    fn due(&self) -> Option<Instant> {
        let state = &self.state;
        if state.last_sent {
            return None;
        }
        let now = Instant::now();
        if state.draining || self.all_ended() {
            return Some(now);
        }
        if state.in_flight.len() >= EPOCHS_IN_FLIGHT {
            return None;
        }
        if state.urgent {
            // One urgent epoch at a time: while it is under way, what arrives gathers for the next.
            return state.in_flight.is_empty().then_some(now);
        }
        state.uncommitted.map(|_| state.last_barrier.map_or(now + self.pace, |last| last + self.pace).max(now))
    }

    fn begin_epoch(&mut self) -> Result<()> {
        let state = &mut self.state;
        state.last_sent = state.draining || state.ended == self.sources.len();
        state.last = state.last.next();
        let epoch = state.last;
        state.in_flight.push_back(InFlight {
            epoch,
            began: Instant::now(),
            since: state.uncommitted.take(),
            missing: self.tasks,
            record: Record::default(),
        });
        state.urgent = false;
        state.held = false;
        state.last_barrier = Some(Instant::now());
        for (name, source) in &self.sources {
            command(name, source, SourceCommand::Barrier(epoch))?;
        }
        Ok(())
    }

    async fn take(&mut self, report: Report) -> Result<()> {
        match report {
            Report::Uncommitted(since) => {
                let earliest = self.state.uncommitted.map_or(since, |earlier| earlier.min(since));
                self.state.uncommitted = Some(earliest);
            }
            Report::Urgent => {
                self.state.urgent = true;
                self.state.uncommitted.get_or_insert_with(Instant::now);
            }
            Report::Full => {
                self.state.urgent = true;
                self.state.uncommitted.get_or_insert_with(Instant::now);
                // An epoch that a stuck sink holds up keeps the next one from beginning: without this, rows that are
                // rejected before they reach that sink would gather without bound.
                if !self.state.in_flight.is_empty() && !std::mem::replace(&mut self.state.held, true) {
                    for (name, source) in &self.sources {
                        command(name, source, SourceCommand::Hold)?;
                    }
                }
            }
            Report::Ended => self.state.ended += 1,
            Report::Passed(epoch, passed) => {
                self.gather(epoch, *passed)?;
                while self.state.in_flight.front().is_some_and(|first| first.missing == 0) {
                    self.commit_first().await?;
                }
            }
        }
        Ok(())
    }

    fn gather(&mut self, epoch: Epoch, passed: Passed) -> Result<()> {
        let Some(in_flight) = self.state.in_flight.iter_mut().find(|in_flight| in_flight.epoch == epoch) else {
            return Err(Error::fatal(format!("a stage passed epoch {epoch}, which is not under way")));
        };
        in_flight.missing =
            in_flight.missing.checked_sub(1).ok_or_else(|| Error::fatal(format!("epoch {epoch} was passed too often")))?;
        let record = &mut in_flight.record;
        record.sources.extend(passed.source);
        record.sinks.extend(passed.sink);
        record.deltas.extend(passed.deltas);
        record.rejected.extend(passed.rejected);
        Ok(())
    }

    /// Commits the oldest epoch, which every task has passed.
    async fn commit_first(&mut self) -> Result<()> {
        let Some(first) = self.state.in_flight.pop_front() else { return Ok(()) };
        let span = tracing::debug_span!("epoch", pipeline = %self.pipeline, epoch = %first.epoch);
        self.commit(first).instrument(span).await
    }

    /// Stores an epoch, then tells the stages.
    async fn commit(&mut self, first: InFlight) -> Result<()> {
        let (epoch, record) = (first.epoch, first.record);
        let stored = move |store: &Checkpoints| store.store(epoch, &record).map(|()| record);
        let record = self.blocking.call(&self.store, stored).await?;
        if !record.rejected.is_empty() {
            self.rejects_stored.notify_one();
        }
        for (stage, prepared) in record.sinks {
            if let Some((name, sink)) = self.sinks.iter().find(|(name, _)| *name == stage) {
                command(name, sink, SinkCommand::Finish(epoch, prepared))?;
            }
        }
        for (stage, mark) in record.sources {
            if let (Some((name, source)), Some(position)) = (self.sources.iter().find(|(name, _)| *name == stage), mark.position)
            {
                command(name, source, SourceCommand::Commit(position))?;
            }
        }
        self.metrics.epochs.inc();
        self.metrics.epoch_duration.observe(first.began.elapsed().as_secs_f64());
        tracing::debug!(duration_ms = first.began.elapsed().as_millis() as u64, "epoch committed");
        Ok(())
    }

    /// Ingest of the earliest row that is not durable.
    fn oldest(&self) -> Option<Instant> {
        self.state.in_flight.iter().filter_map(|in_flight| in_flight.since).chain(self.state.uncommitted).min()
    }

    fn measure_age(&self) {
        self.metrics.uncommitted_age.set(self.oldest().map_or(0.0, |since| since.elapsed().as_secs_f64()));
    }
}

/// Sends a command without ever waiting. A full channel would mean that a stage has not looked at its
/// commands for several epochs, which the number of epochs in flight makes impossible.
fn command<T>(stage: &str, channel: &mpsc::Sender<T>, command: T) -> Result<()> {
    channel.try_send(command).map_err(|e| match e {
        mpsc::error::TrySendError::Full(_) => Error::fatal(format!("stage {stage} does not take its commands")),
        mpsc::error::TrySendError::Closed(_) => Error::fatal(format!("stage {stage} is gone")),
    })
}
