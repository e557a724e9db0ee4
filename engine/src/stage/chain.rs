//! One or more synchronous operators fused into a task: a batch runs through all of them without a queue
//! in between. The last one's outputs leave through edges; every link may have rejects of its own.

use std::collections::VecDeque;

use tokio::time::sleep;

use super::inputs::Arrival;
use super::{Inputs, Loop, Outbox, Passed, Rejects, Report, Stop, failed};
use crate::backoff::Backoff;
use crate::batch::{Batch, Element};
use crate::error::{Class, Error};
use crate::metrics::StageMetrics;
use crate::operator::{Operator, Outputs};
use crate::position::Epoch;
use crate::rejected::Rejected;

/// One operator of a chain.
pub(crate) struct Link {
    pub(crate) name: String,
    pub(crate) operator: Box<dyn Operator>,
    pub(crate) stateful: bool,
    /// Edges by output; for all but the last link empty, output 0 leads to the next link.
    pub(crate) edges: Vec<Vec<usize>>,
    pub(crate) rejects: Rejects,
    pub(crate) metrics: StageMetrics,
}

/// A chain with its loop.
pub(crate) struct Chain {
    pub(crate) links: Vec<Link>,
    pub(crate) inputs: Inputs,
    pub(crate) outbox: Outbox,
    pub(crate) context: Loop,
    pub(crate) scratch: Scratch,
}

/// Buffers that live as long as the chain, so that a batch of one row allocates nothing here.
#[derive(Default)]
pub(crate) struct Scratch {
    /// Batches on their way: link, input of that link, rows. The front is processed first; what a link emits goes in
    /// front of what was there, which keeps the order.
    work: VecDeque<(usize, usize, Batch)>,
    outputs: Outputs,
}

impl Chain {
    pub(crate) async fn run(mut self) -> Result<(), Stop> {
        while let Some(arrival) = self.inputs.next().await {
            match arrival {
                Arrival::Batch(input, batch) => {
                    self.scratch.work.push_back((0, input, batch));
                    self.work().await?;
                }
                Arrival::Barrier(epoch) => self.barrier(epoch).await?,
                Arrival::End => self.finish().await?,
            }
        }
        Ok(())
    }

    /// Processes until no batch is on its way.
    async fn work(&mut self) -> Result<(), Stop> {
        let mut backoff: Option<Backoff> = None;
        while let Some((at, input, batch)) = self.scratch.work.pop_front() {
            match self.process(at, input, batch.clone()) {
                Ok(()) => backoff = None,
                Err(error) => {
                    let link = &self.links[at];
                    link.metrics.errors(error.class()).inc();
                    match error.class() {
                        Class::Fatal => return Err(failed(&link.name, error)),
                        Class::Reject => {
                            // All of the batch is rejected: what the call has said of it before does not count.
                            self.scratch.outputs.clear();
                            let rejected = Rejected::rows(batch.records(), 0..batch.rows(), "refused", &error.to_string());
                            self.scratch.outputs.reject(rejected);
                        }
                        Class::Retry => {
                            let backoff = backoff.get_or_insert_with(|| Backoff::for_calls(self.context.seed));
                            let wait = backoff.next();
                            link.metrics.retries.inc();
                            tracing::warn!(stage = %link.name, %error, tries = backoff.tries(), "will try again in {wait:?}");
                            self.scratch.outputs.clear();
                            self.scratch.work.push_front((at, input, batch));
                            sleep(wait).await;
                            continue;
                        }
                    }
                }
            }
            self.hand_on(at).await?;
        }
        Ok(())
    }

    /// Calls one operator and measures it.
    fn process(&mut self, at: usize, input: usize, batch: Batch) -> Result<(), Error> {
        let link = &mut self.links[at];
        link.metrics.rows_in.inc_by(batch.rows() as u64);
        link.metrics.bytes_in.inc_by(batch.bytes() as u64);
        link.metrics.batches_in.inc();
        let began = std::time::Instant::now();
        let result = link.operator.process(input, batch, &mut self.scratch.outputs);
        link.metrics.process.inc_by(began.elapsed().as_secs_f64());
        result
    }

    /// Sends what link `at` has emitted to the next link or into the edges.
    async fn hand_on(&mut self, at: usize) -> Result<(), Stop> {
        let last = at + 1 == self.links.len();
        let link = &mut self.links[at];
        if !self.scratch.outputs.rejected.is_empty() {
            let rejected = std::mem::take(&mut self.scratch.outputs.rejected);
            if link.rejects.take(rejected, &self.context, &mut self.outbox).map_err(|e| failed(&link.name, e))? {
                self.context.report(Report::Full).await?;
            }
        }
        for (_, batch) in &self.scratch.outputs.batches {
            link.metrics.rows_out.inc_by(batch.rows() as u64);
            link.metrics.bytes_out.inc_by(batch.bytes() as u64);
            link.metrics.batches_out.inc();
        }
        if last {
            for (port, batch) in self.scratch.outputs.batches.drain(..) {
                let edges = link.edges.get(port).map_or(&[][..], Vec::as_slice);
                if edges.is_empty() {
                    link.metrics.dropped("unconnected_output").inc_by(batch.rows() as u64);
                }
                for edge in edges {
                    self.outbox.push(*edge, Element::Batch(batch.clone()));
                }
            }
        } else {
            for (port, batch) in self.scratch.outputs.batches.drain(..).rev() {
                if port == 0 {
                    self.scratch.work.push_front((at + 1, 0, batch));
                } else {
                    link.metrics.dropped("unconnected_output").inc_by(batch.rows() as u64);
                }
            }
        }
        Ok(self.outbox.flush().await?)
    }

    async fn barrier(&mut self, epoch: Epoch) -> Result<(), Stop> {
        let mut passed = Passed::default();
        for link in &mut self.links {
            if link.stateful {
                let delta = link.operator.snapshot().map_err(|e| failed(&link.name, e))?;
                if !delta.is_empty() && !self.context.planted.lost_delta {
                    passed.deltas.push((link.name.clone(), delta));
                }
            }
            passed.rejected.extend(link.rejects.at_barrier(&self.context).map_err(|e| failed(&link.name, e))?);
        }
        self.context.report(Report::Passed(epoch, Box::new(passed))).await?;
        self.outbox.broadcast(&Element::Barrier(epoch));
        Ok(self.outbox.flush().await?)
    }

    /// All inputs have ended: each link in turn hands over what it holds, and the rest of the chain
    /// processes that before the next link is asked.
    async fn finish(&mut self) -> Result<(), Stop> {
        for at in 0..self.links.len() {
            let link = &mut self.links[at];
            link.operator.finish(&mut self.scratch.outputs).map_err(|e| failed(&link.name, e))?;
            self.hand_on(at).await?;
            self.work().await?;
        }
        self.outbox.broadcast(&Element::End);
        Ok(self.outbox.flush().await?)
    }
}
