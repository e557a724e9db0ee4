//! A stage whose calls overlap: an asynchronous operator, or several instances of a stateless one. Results
//! leave in the order of their inputs. A barrier waits for the calls ahead of it, and new calls are
//! admitted behind it meanwhile: what they yield waits, bounded by the concurrency.

use std::sync::{Arc, Mutex, PoisonError};

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::{FuturesOrdered, FuturesUnordered};
use tokio::runtime::Handle;
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;

use super::inputs::Arrival;
use super::{Inputs, Loop, Outbox, Passed, Rejects, Report, Stop, failed};
use crate::backoff::Backoff;
use crate::batch::{Batch, Element};
use crate::error::{Class, Error, Result};
use crate::metrics::StageMetrics;
use crate::operator::{AsyncOperator, Operator, Outputs};
use crate::position::Epoch;
use crate::rejected::Rejected;

/// What is called.
#[derive(Clone)]
pub(crate) enum Callee {
    /// Waits for someone else.
    Async(Arc<dyn AsyncOperator>),
    /// One of several instances of a synchronous operator; as many as calls may overlap.
    Pool(Arc<Mutex<Vec<Box<dyn Operator>>>>),
}

/// The stage with its loop.
pub(crate) struct Ordered {
    pub(crate) name: String,
    pub(crate) callee: Callee,
    pub(crate) concurrency: usize,
    /// Where calls run.
    pub(crate) handle: Handle,
    pub(crate) edges: Vec<Vec<usize>>,
    pub(crate) rejects: Rejects,
    pub(crate) inputs: Inputs,
    pub(crate) outbox: Outbox,
    pub(crate) metrics: StageMetrics,
    pub(crate) context: Loop,
}

/// One thing that leaves, in order.
enum Leaving {
    Outputs(std::result::Result<Outputs, Stop>),
    Barrier(Epoch),
    End,
}

/// Things under way. The planted fault lets them leave as they finish instead of as they came.
enum UnderWay {
    Ordered(FuturesOrdered<BoxFuture<'static, Leaving>>),
    Unordered(FuturesUnordered<BoxFuture<'static, Leaving>>),
}

impl UnderWay {
    fn push(&mut self, future: BoxFuture<'static, Leaving>) {
        match self {
            UnderWay::Ordered(all) => all.push_back(future),
            UnderWay::Unordered(all) => all.push(future),
        }
    }

    fn is_empty(&self) -> bool {
        match self {
            UnderWay::Ordered(all) => all.is_empty(),
            UnderWay::Unordered(all) => all.is_empty(),
        }
    }

    async fn next(&mut self) -> Option<Leaving> {
        match self {
            UnderWay::Ordered(all) => all.next().await,
            UnderWay::Unordered(all) => all.next().await,
        }
    }
}

impl Ordered {
    pub(crate) async fn run(mut self) -> std::result::Result<(), Stop> {
        let mut calls = 0;
        let mut under_way = if self.context.planted.reordering {
            UnderWay::Unordered(FuturesUnordered::new())
        } else {
            UnderWay::Ordered(FuturesOrdered::new())
        };
        loop {
            tokio::select! {
                biased;
                Some(leaving) = under_way.next(), if !under_way.is_empty() => match leaving {
                    Leaving::Outputs(outputs) => {
                        calls -= 1;
                        self.emit(outputs?).await?;
                    }
                    Leaving::Barrier(epoch) => self.barrier(epoch).await?,
                    Leaving::End => {
                        self.outbox.broadcast(&Element::End);
                        self.outbox.flush().await?;
                    }
                },
                arrival = self.inputs.next(), if calls < self.concurrency => match arrival {
                    None => return Ok(()),
                    Some(Arrival::Batch(_, batch)) => {
                        calls += 1;
                        under_way.push(self.call(batch));
                    }
                    Some(Arrival::Barrier(epoch)) => under_way.push(Box::pin(async move { Leaving::Barrier(epoch) })),
                    Some(Arrival::End) => under_way.push(Box::pin(async { Leaving::End })),
                },
            }
        }
    }

    /// Starts a call as a task of its own, so that it goes on while this stage waits for room behind it.
    fn call(&self, batch: Batch) -> BoxFuture<'static, Leaving> {
        self.metrics.rows_in.inc_by(batch.rows() as u64);
        self.metrics.bytes_in.inc_by(batch.bytes() as u64);
        self.metrics.batches_in.inc();
        let (callee, metrics, name, seed) = (self.callee.clone(), self.metrics.clone(), self.name.clone(), self.context.seed);
        let calling = async move {
            let mut backoff = Backoff::for_calls(seed);
            loop {
                let began = std::time::Instant::now();
                let result = call_once(&callee, batch.clone()).await;
                metrics.process.inc_by(began.elapsed().as_secs_f64());
                let error = match result {
                    Ok(outputs) => return Ok(outputs),
                    Err(error) => error,
                };
                metrics.errors(error.class()).inc();
                match error.class() {
                    Class::Fatal => return Err(failed(&name, error)),
                    Class::Reject => {
                        let mut outputs = Outputs::new();
                        outputs.reject(Rejected::rows(batch.records(), 0..batch.rows(), "refused", &error.to_string()));
                        return Ok(outputs);
                    }
                    Class::Retry => {
                        let wait = backoff.next();
                        metrics.retries.inc();
                        tracing::warn!(%error, tries = backoff.tries(), "will try again in {wait:?}");
                        sleep(wait).await;
                    }
                }
            }
        };
        let task = self.handle.spawn(calling.in_current_span());
        let (task, name) = (AbortOnDropHandle::new(task), self.name.clone());
        Box::pin(async move {
            Leaving::Outputs(match task.await {
                Ok(outputs) => outputs,
                Err(join) => Err(failed(&name, Error::fatal(format!("a call ended abruptly: {join}")))),
            })
        })
    }

    async fn emit(&mut self, outputs: Outputs) -> std::result::Result<(), Stop> {
        let (batches, rejected) = outputs.into_parts();
        if self.rejects.take(rejected, &self.context, &mut self.outbox).map_err(|e| failed(&self.name, e))? {
            self.context.report(Report::Full).await?;
        }
        for (port, batch) in batches {
            self.metrics.rows_out.inc_by(batch.rows() as u64);
            self.metrics.bytes_out.inc_by(batch.bytes() as u64);
            self.metrics.batches_out.inc();
            let edges = self.edges.get(port).map_or(&[][..], Vec::as_slice);
            if edges.is_empty() {
                self.metrics.dropped("unconnected_output").inc_by(batch.rows() as u64);
            }
            for edge in edges {
                self.outbox.push(*edge, Element::Batch(batch.clone()));
            }
        }
        Ok(self.outbox.flush().await?)
    }

    async fn barrier(&mut self, epoch: Epoch) -> std::result::Result<(), Stop> {
        let rejected = self.rejects.at_barrier(&self.context).map_err(|e| failed(&self.name, e))?;
        let passed = Passed { rejected: rejected.into_iter().collect(), ..Passed::default() };
        self.context.report(Report::Passed(epoch, Box::new(passed))).await?;
        self.outbox.broadcast(&Element::Barrier(epoch));
        Ok(self.outbox.flush().await?)
    }
}

async fn call_once(callee: &Callee, batch: Batch) -> Result<Outputs> {
    match callee {
        Callee::Async(operator) => operator.call(batch).await,
        Callee::Pool(pool) => {
            let taken = pool.lock().unwrap_or_else(PoisonError::into_inner).pop();
            // There are as many instances as calls; one is only missing after a panic took it along.
            let Some(mut operator) = taken else { return Err(Error::fatal("no instance is left, an earlier call panicked")) };
            let mut outputs = Outputs::new();
            let result = operator.process(0, batch, &mut outputs);
            pool.lock().unwrap_or_else(PoisonError::into_inner).push(operator);
            result.map(|()| outputs)
        }
    }
}
