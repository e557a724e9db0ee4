//! What transforms rows. An [`Operator`] is synchronous and may hold state; an [`AsyncOperator`] waits
//! for others (a language model, a lookup service) and holds none. Neither knows of acknowledgement.

use futures::future::BoxFuture;

use crate::batch::Batch;
use crate::error::Result;
use crate::rejected::Rejected;

/// What one call of an operator hands on.
#[derive(Debug, Default)]
pub struct Outputs {
    pub(crate) batches: Vec<(usize, Batch)>,
    pub(crate) rejected: Vec<Rejected>,
}

impl Outputs {
    /// Empty.
    pub fn new() -> Self {
        Self::default()
    }

    /// Hands rows to the default output. Empty batches are left out.
    pub fn emit(&mut self, batch: Batch) {
        self.emit_to(0, batch);
    }

    /// Hands rows to output number `port`, in the order of the plan's outputs.
    pub fn emit_to(&mut self, port: usize, batch: Batch) {
        if batch.rows() > 0 {
            self.batches.push((port, batch));
        }
    }

    /// Rows that cannot be processed, with the reason.
    pub fn reject(&mut self, rejected: impl IntoIterator<Item = Rejected>) {
        self.rejected.extend(rejected);
    }

    /// Forgets everything; the memory stays.
    pub fn clear(&mut self) {
        self.batches.clear();
        self.rejected.clear();
    }

    /// What has been emitted so far, as (port, batch).
    pub fn batches(&self) -> &[(usize, Batch)] {
        &self.batches
    }

    /// What has been rejected so far.
    pub fn rejected(&self) -> &[Rejected] {
        &self.rejected
    }

    /// The parts: batches by port, and rejects.
    pub fn into_parts(self) -> (Vec<(usize, Batch)>, Vec<Rejected>) {
        (self.batches, self.rejected)
    }
}

/// What changed in a stage's state since the last barrier: single keys, so that a fast epoch costs what
/// changed and not what is held.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StateDelta {
    /// Keys with their new values.
    pub puts: Vec<(Vec<u8>, Vec<u8>)>,
    /// Keys that are gone.
    pub deletes: Vec<Vec<u8>>,
}

impl StateDelta {
    /// Nothing changed.
    pub fn is_empty(&self) -> bool {
        self.puts.is_empty() && self.deletes.is_empty()
    }
}

/// A stage's whole state, as stored with the last epoch: keys in order.
pub type State = Vec<(Vec<u8>, Vec<u8>)>;

/// A synchronous transform. Runs on a compute thread, one batch at a time.
pub trait Operator: Send {
    /// Transforms one batch from input number `input`. Must leave the state as it was when it returns
    /// an error: the engine may call again with the same batch.
    ///
    /// # Errors
    /// `Reject` turns the whole batch into rejects; single rows are rejected through `outputs`.
    fn process(&mut self, input: usize, batch: Batch, outputs: &mut Outputs) -> Result<()>;

    /// All inputs have ended: hand over what is still held, or drop it and count it.
    ///
    /// # Errors
    /// As `process`.
    fn finish(&mut self, _outputs: &mut Outputs) -> Result<()> {
        Ok(())
    }

    /// What changed since the last call. Called at every barrier.
    ///
    /// # Errors
    /// Fatal when the state cannot be written down.
    fn snapshot(&mut self) -> Result<StateDelta> {
        Ok(StateDelta::default())
    }

    /// Takes up the state of the last stored epoch. Called at most once, before the first batch.
    ///
    /// # Errors
    /// Fatal when the state cannot be read.
    fn restore(&mut self, _state: State) -> Result<()> {
        Ok(())
    }
}

/// A transform that waits for someone else. Holds no state, so that calls may overlap; the engine keeps
/// the order of results, and keeps admitting work across a barrier.
pub trait AsyncOperator: Send + Sync {
    /// Starts the work on one batch.
    fn call(&self, batch: Batch) -> BoxFuture<'static, Result<Outputs>>;

    /// How many calls may be under way at once.
    fn concurrency(&self) -> usize;
}
