//! The rejected rows of one stage: sent to the `rejected` output where something is attached to it,
//! else kept until the next barrier and stored with the epoch.

use std::collections::HashMap;

use arrow::ipc::writer::StreamWriter;
use prometheus::IntCounter;

use super::{Loop, Outbox};
use crate::batch::{Batch, Element};
use crate::error::{Error, Result};
use crate::metrics::StageMetrics;
use crate::rejected::{self, Rejected};

/// How many bytes of rejects may wait for a barrier before the stage asks for one: a few of the largest
/// messages that sources accept by default.
pub(crate) const HELD_REJECTS: usize = 32 * 1024 * 1024;
/// The same on virtual time: so few that a simulated stage reaches it.
pub(crate) const HELD_REJECTS_SIMULATED: usize = 1024;

/// The rejects of a stage.
pub(crate) struct Rejects {
    stage: String,
    edges: Vec<usize>,
    held: Vec<Rejected>,
    held_bytes: usize,
    metrics: StageMetrics,
    counters: HashMap<&'static str, IntCounter>,
}

impl Rejects {
    /// `edges`: the edges attached to the stage's `rejected` output.
    pub(crate) fn new(stage: &str, edges: Vec<usize>, metrics: StageMetrics) -> Self {
        Self { stage: stage.to_owned(), edges, held: Vec::new(), held_bytes: 0, metrics, counters: HashMap::new() }
    }

    /// Takes rejected rows in. Returns true when so much is held that a barrier should come soon.
    pub(crate) fn take(&mut self, rejected: Vec<Rejected>, context: &Loop, outbox: &mut Outbox) -> Result<bool> {
        if rejected.is_empty() {
            return Ok(false);
        }
        for reject in &rejected {
            let metrics = &self.metrics;
            self.counters.entry(reject.code).or_insert_with(|| metrics.rejected(reject.code)).inc();
        }
        if self.edges.is_empty() {
            let before = self.held_bytes;
            self.held_bytes += rejected.iter().map(Rejected::bytes).sum::<usize>();
            self.held.extend(rejected);
            return Ok(before < context.held_rejects && self.held_bytes >= context.held_rejects);
        }
        let rows = rejected::to_batch(&context.pipeline, &self.stage, context.now_ms(), &rejected)?;
        for edge in &self.edges {
            outbox.push(*edge, Element::Batch(Batch::new(rows.clone())));
        }
        Ok(false)
    }

    /// What is held, as an Arrow IPC stream for the checkpoint store.
    pub(crate) fn at_barrier(&mut self, context: &Loop) -> Result<Option<Vec<u8>>> {
        if self.held.is_empty() {
            return Ok(None);
        }
        let rows = rejected::to_batch(&context.pipeline, &self.stage, context.now_ms(), &self.held)?;
        self.held.clear();
        self.held_bytes = 0;
        let mut stream = StreamWriter::try_new(Vec::new(), &rows.schema()).map_err(Error::fatal)?;
        stream.write(&rows).map_err(Error::fatal)?;
        stream.into_inner().map(Some).map_err(Error::fatal)
    }
}
