//! The loop around a sink: writes, prepares epochs at barriers, finishes them when they are stored.
//! Nothing ever passes a batch that the peer has not taken.

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use super::inputs::Arrival;
use super::{Inputs, Loop, Outbox, Passed, Rejects, Report, SinkCommand, Stop, failed};
use crate::backoff::Backoff;
use crate::batch::{Batch, Element};
use crate::error::{Class, Error};
use crate::metrics::{Latency, StageMetrics};
use crate::position::Epoch;
use crate::rejected::Rejected;
use crate::sink::{Prepared, Sink};

/// A sink with its loop.
pub(crate) struct SinkStage {
    pub(crate) name: String,
    pub(crate) sink: Box<dyn Sink>,
    pub(crate) restored: Option<(Epoch, Prepared)>,
    pub(crate) commands: mpsc::Receiver<SinkCommand>,
    pub(crate) inputs: Inputs,
    pub(crate) outbox: Outbox,
    pub(crate) rejects: Rejects,
    pub(crate) metrics: StageMetrics,
    pub(crate) latency: Latency,
    pub(crate) context: Loop,
}

/// Calls the sink until it succeeds, waiting in between; other classes end the loop or reject.
macro_rules! retry {
    ($stage:ident, $what:literal, $call:expr) => {{
        let mut backoff = Backoff::for_calls($stage.context.seed);
        loop {
            match $call.await {
                Ok(value) => break Ok(value),
                Err(error) => match $stage.class_of(&error) {
                    Class::Retry => {
                        let wait = backoff.next();
                        $stage.metrics.retries.inc();
                        tracing::warn!(%error, tries = backoff.tries(), concat!($what, " failed; will try again in {:?}"), wait);
                        sleep(wait).await;
                    }
                    _ => break Err(error),
                },
            }
        }
    }};
}

impl SinkStage {
    pub(crate) async fn run(mut self) -> Result<(), Stop> {
        let restored = self.restored.take();
        let last = restored.as_ref().map(|(epoch, prepared)| (*epoch, prepared));
        retry!(self, "opening", self.sink.open(last)).map_err(|e| failed(&self.name, e))?;
        let mut ended = false;
        loop {
            tokio::select! {
                biased;
                command = self.commands.recv() => match command {
                    None => return Err(Stop::TornDown),
                    Some(SinkCommand::Close) => break,
                    Some(SinkCommand::Finish(epoch, prepared)) => {
                        retry!(self, "finishing an epoch", self.sink.finish(epoch, &prepared)).map_err(|e| failed(&self.name, e))?;
                    }
                },
                arrival = self.inputs.next() => match arrival {
                    None => return Err(Stop::TornDown),
                    Some(Arrival::Batch(input, batch)) => self.write(input, batch).await?,
                    Some(Arrival::Barrier(epoch)) => self.prepare(epoch, std::mem::take(&mut ended)).await?,
                    // A barrier follows, and at it rows may still be refused: what reads them must not have ended.
                    Some(Arrival::End) => ended = true,
                },
            }
        }
        retry!(self, "closing", self.sink.close()).map_err(|e| failed(&self.name, e))
    }

    async fn write(&mut self, input: usize, batch: Batch) -> Result<(), Stop> {
        let (rows, ingest) = (batch.rows() as u64, batch.ingest());
        self.metrics.rows_in.inc_by(rows);
        self.metrics.bytes_in.inc_by(batch.bytes() as u64);
        self.metrics.batches_in.inc();
        let began = std::time::Instant::now();
        let rejected = match retry!(self, "writing", self.sink.write(input, batch.clone())) {
            Ok(rejected) => rejected,
            Err(error) if error.class() == Class::Reject => {
                Rejected::rows(batch.records(), 0..batch.rows(), "refused", &error.to_string())
            }
            Err(error) => return Err(failed(&self.name, error)),
        };
        self.metrics.process.inc_by(began.elapsed().as_secs_f64());
        self.latency.record(Instant::now().saturating_duration_since(ingest), rows);
        if self.rejects.take(rejected, &self.context, &mut self.outbox).map_err(|e| failed(&self.name, e))? {
            self.context.report(Report::Full).await?;
        }
        Ok(self.outbox.flush().await?)
    }

    /// Prepares an epoch; with `ended` the first one after the end of all inputs.
    async fn prepare(&mut self, epoch: Epoch, ended: bool) -> Result<(), Stop> {
        let prepared = retry!(self, "preparing an epoch", self.sink.prepare(epoch));
        let (prepared, rejected) = prepared.map_err(|e| failed(&self.name, e))?;
        // A barrier is passing: asking for another would be too late.
        self.rejects.take(rejected, &self.context, &mut self.outbox).map_err(|e| failed(&self.name, e))?;
        if ended {
            self.outbox.broadcast(&Element::End);
        }
        let rejected = self.rejects.at_barrier(&self.context).map_err(|e| failed(&self.name, e))?;
        let passed =
            Passed { sink: Some((self.name.clone(), prepared)), rejected: rejected.into_iter().collect(), ..Passed::default() };
        self.context.report(Report::Passed(epoch, Box::new(passed))).await?;
        self.outbox.broadcast(&Element::Barrier(epoch));
        Ok(self.outbox.flush().await?)
    }

    fn class_of(&self, error: &Error) -> Class {
        self.metrics.errors(error.class()).inc();
        error.class()
    }
}
