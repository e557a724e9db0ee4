//! The loop around a source: pulls, emits, lets barriers go and passes on what has become durable. It
//! serves commands also while it waits for the peer or for room behind it.

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::{Loop, Outbox, Passed, Rejects, Report, SourceCommand, Stop, failed};
use crate::backoff::Backoff;
use crate::batch::{Batch, Element};
use crate::checkpoint::SourceMark;
use crate::error::{Class, Error};
use crate::metrics::StageMetrics;
use crate::position::Position;
use crate::rejected::Rejected;
use crate::source::{Pulled, Source};

/// A source with its loop.
pub(crate) struct SourceStage {
    pub(crate) name: String,
    pub(crate) source: Box<dyn Source>,
    pub(crate) restored: Option<SourceMark>,
    pub(crate) commands: mpsc::Receiver<SourceCommand>,
    pub(crate) outbox: Outbox,
    /// Edges on the default output.
    pub(crate) edges: Vec<usize>,
    pub(crate) rejects: Rejects,
    pub(crate) metrics: StageMetrics,
    pub(crate) context: Loop,
}

/// Where the loop stands.
struct Progress {
    /// What a barrier would store.
    mark: SourceMark,
    /// Emitted since the last barrier.
    uncommitted: bool,
    /// Already asked for a barrier since the last one.
    urgent: bool,
    draining: bool,
    /// Held until the next barrier.
    held: bool,
    /// After an error: pull again then.
    retry_at: Option<Instant>,
}

impl SourceStage {
    pub(crate) async fn run(mut self) -> Result<(), Stop> {
        let mark = self.restored.take().unwrap_or(SourceMark { position: None, ended: false });
        let mut progress = Progress { mark, uncommitted: false, urgent: false, draining: false, held: false, retry_at: None };
        let mut backoff = Backoff::for_calls(self.context.seed);
        let ended_before = progress.mark.ended;
        let mut opened = ended_before;
        if ended_before {
            self.outbox.broadcast(&Element::End);
            self.context.report(Report::Ended).await?;
        }
        loop {
            let pulling = self.outbox.is_empty()
                && !progress.mark.ended
                && !progress.draining
                && !progress.held
                && progress.retry_at.is_none();
            let pulled = tokio::select! {
                biased;
                command = self.commands.recv() => {
                    match command {
                        None => return Err(Stop::TornDown),
                        Some(SourceCommand::Close) => break,
                        Some(SourceCommand::Drain) => progress.draining = true,
                        Some(SourceCommand::Hold) => progress.held = true,
                        Some(SourceCommand::Barrier(epoch)) => self.barrier(epoch, &mut progress).await?,
                        Some(SourceCommand::Commit(position)) => {
                            // A source that is not open, or never will be, has nothing to acknowledge.
                            if opened && !ended_before {
                                self.commit(&position).await?;
                            }
                        }
                    }
                    continue;
                }
                sent = self.outbox.flush(), if !self.outbox.is_empty() => {
                    sent?;
                    continue;
                }
                () = sleep_until(progress.retry_at.unwrap_or_else(Instant::now)), if progress.retry_at.is_some() => {
                    progress.retry_at = None;
                    continue;
                }
                result = open_then_next(&mut *self.source, &mut opened, progress.mark.position.as_ref()), if pulling => result,
            };
            match pulled {
                Ok(pulled) => {
                    backoff.reset();
                    if let Some(pulled) = pulled {
                        self.emit(pulled, &mut progress).await?;
                    } else {
                        // Opened: this is where it stands until the first pull.
                        progress.mark.position = Some(self.source.position());
                    }
                }
                Err(error) => progress.retry_at = Some(self.wait_after(error, &mut backoff)?),
            }
        }
        if !ended_before {
            self.source.close().await;
        }
        Ok(())
    }

    async fn emit(&mut self, pulled: Pulled, progress: &mut Progress) -> Result<(), Stop> {
        let (batch, rejected) = match pulled {
            Pulled::Batch(batch) => (Some(batch), Vec::new()),
            Pulled::Rejected(rejected) => (None, rejected),
            Pulled::Mixed(batch, rejected) => (Some(batch), rejected),
            Pulled::End => {
                progress.mark = SourceMark { position: Some(self.source.position()), ended: true };
                self.outbox.broadcast(&Element::End);
                return self.context.report(Report::Ended).await;
            }
        };
        let since = batch.as_ref().map_or_else(Instant::now, Batch::ingest);
        progress.mark.position = Some(self.source.position());
        let full = self.hand_on(batch, rejected)?;
        if !progress.uncommitted {
            progress.uncommitted = true;
            self.context.report(Report::Uncommitted(since)).await?;
        }
        if full {
            self.context.report(Report::Full).await?;
        }
        if !progress.urgent && self.source.window_full() {
            progress.urgent = true;
            self.context.report(Report::Urgent).await?;
        }
        if self.context.planted.early_ack {
            self.commit(&self.source.position()).await?;
        }
        Ok(())
    }

    /// Queues what was pulled for sending. Returns true when so many rejects are held that a barrier
    /// should come soon.
    fn hand_on(&mut self, batch: Option<Batch>, rejected: Vec<Rejected>) -> Result<bool, Stop> {
        if let Some(batch) = batch.filter(|batch| batch.rows() > 0) {
            self.metrics.rows_out.inc_by(batch.rows() as u64);
            self.metrics.bytes_out.inc_by(batch.bytes() as u64);
            self.metrics.batches_out.inc();
            for edge in &self.edges {
                self.outbox.push(*edge, Element::Batch(batch.clone()));
            }
        }
        self.rejects.take(rejected, &self.context, &mut self.outbox).map_err(|e| failed(&self.name, e))
    }

    async fn barrier(&mut self, epoch: crate::Epoch, progress: &mut Progress) -> Result<(), Stop> {
        self.outbox.broadcast(&Element::Barrier(epoch));
        progress.uncommitted = false;
        progress.urgent = false;
        progress.held = false;
        let rejected = self.rejects.at_barrier(&self.context).map_err(|e| failed(&self.name, e))?;
        let passed = Passed {
            source: Some((self.name.clone(), progress.mark.clone())),
            rejected: rejected.into_iter().collect(),
            ..Passed::default()
        };
        self.context.report(Report::Passed(epoch, Box::new(passed))).await
    }

    /// Tells the peer. A commit that fails is not repeated: the next one covers it, and not committing
    /// is always safe.
    async fn commit(&mut self, position: &Position) -> Result<(), Stop> {
        match self.source.commit(position).await {
            Ok(()) => Ok(()),
            Err(error) => {
                self.metrics.errors(error.class()).inc();
                if error.class() == Class::Fatal {
                    return Err(failed(&self.name, error));
                }
                tracing::warn!(%error, "committing failed; the next commit covers it");
                Ok(())
            }
        }
    }

    fn wait_after(&mut self, error: Error, backoff: &mut Backoff) -> Result<Instant, Stop> {
        self.metrics.errors(error.class()).inc();
        match error.class() {
            Class::Retry => {
                let wait = backoff.next();
                self.metrics.retries.inc();
                tracing::warn!(%error, tries = backoff.tries(), "will try again in {wait:?}");
                Ok(Instant::now() + wait)
            }
            Class::Reject | Class::Fatal => Err(failed(&self.name, error)),
        }
    }
}

/// Opens the source at the first call (`None`), pulls at every later one. Opening may be dropped and
/// begun again like pulling: nothing has been handed out yet.
async fn open_then_next(source: &mut dyn Source, opened: &mut bool, from: Option<&Position>) -> crate::Result<Option<Pulled>> {
    if *opened {
        return source.next().await.map(Some);
    }
    source.open(from).await?;
    *opened = true;
    Ok(None)
}
