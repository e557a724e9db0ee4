//! Where rows go. A sink makes an epoch durable in its own way and says so; the engine stores what the
//! sink prepared together with the positions and the state, in one transaction.

use std::time::Duration;

use async_trait::async_trait;

use crate::batch::Batch;
use crate::error::Result;
use crate::position::Epoch;
use crate::rejected::Rejected;

/// What a sink needs to finish (or, after a crash, to find again) an epoch it has prepared. Its meaning
/// belongs to the sink; stored with the epoch.
pub type Prepared = serde_json::Value;

/// A sink. The life of one: `open`, then `write` again and again, `prepare` at each barrier, and
/// `finish` once the epoch is stored. Later rows may be written before an earlier epoch is finished.
#[async_trait]
pub trait Sink: Send {
    /// Connects. `last` is what this sink prepared for the newest stored epoch. That epoch and all before
    /// it are stored: finish each that is not finished yet (a crash may have come in between, so it must be
    /// idempotent) and undo whatever was written or prepared after it.
    ///
    /// # Errors
    /// `Retry` is repeated with backoff by the engine; `Fatal` ends this run of the pipeline.
    async fn open(&mut self, last: Option<(Epoch, &Prepared)>) -> Result<()>;

    /// Takes rows from input number `input`. Returns the rows that the peer will never take.
    ///
    /// # Errors
    /// `Retry`: the same batch is written again with backoff, and nothing passes it. `Reject`: all its
    /// rows are rejected. `Fatal`: restart.
    async fn write(&mut self, input: usize, batch: Batch) -> Result<Vec<Rejected>>;

    /// Makes everything written so far durable, or prepares it so that `finish` cannot fail for good. Returns
    /// what finishing needs, and the rows that the peer turned out never to take.
    ///
    /// # Errors
    /// As `write`; the epoch is not stored before this succeeds.
    async fn prepare(&mut self, epoch: Epoch) -> Result<(Prepared, Vec<Rejected>)>;

    /// The epoch is stored: make what was prepared visible.
    ///
    /// # Errors
    /// As `write`.
    async fn finish(&mut self, epoch: Epoch, prepared: &Prepared) -> Result<()>;

    /// How far apart barriers should be for this sink, at least, to work well.
    fn commit_interval(&self) -> Duration {
        Duration::from_millis(50)
    }

    /// Lets go of the peer after the last epoch.
    ///
    /// # Errors
    /// As `write`.
    async fn close(&mut self) -> Result<()> {
        Ok(())
    }
}
