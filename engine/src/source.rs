//! Where rows come from. The engine owns the loop: it pulls batches, decides when a barrier is due,
//! applies backpressure by not pulling, and tells the source what has become durable.

use async_trait::async_trait;

use crate::batch::Batch;
use crate::error::Result;
use crate::position::Position;
use crate::rejected::Rejected;

/// What one pull yields.
#[derive(Debug)]
pub enum Pulled {
    /// Rows that have arrived.
    Batch(Batch),
    /// Messages that no batch can hold (too large, unreadable); they go where rejects go.
    Rejected(Vec<Rejected>),
    /// Both, from the same stretch of input.
    Mixed(Batch, Vec<Rejected>),
    /// A bounded input has been read to its end. Not an error.
    End,
}

/// A source of rows. The life of one: `open`, then `next` again and again, with `commit` in between.
#[async_trait]
pub trait Source: Send {
    /// Connects and stands at `from`: the position stored with the last epoch, or the configured
    /// beginning. Called once.
    ///
    /// # Errors
    /// `Retry` is repeated with backoff by the engine; `Fatal` ends this run of the pipeline.
    async fn open(&mut self, from: Option<&Position>) -> Result<()>;

    /// Waits until something has arrived, then returns whatever has, up to the source's own row and
    /// byte limit. Must be cancel-safe: the engine drops the future to deliver a command, and calls
    /// again; nothing may be lost by that.
    ///
    /// # Errors
    /// `Retry` is repeated with backoff; `Reject` is not meaningful here (return [`Pulled::Rejected`]).
    async fn next(&mut self) -> Result<Pulled>;

    /// Just behind the last row that `next` returned.
    fn position(&self) -> Position;

    /// Everything up to `position` is durable: acknowledge it to the peer. Called in order, possibly
    /// late, and with a position from before a reconnect; then it must not acknowledge on the new
    /// connection what it received on the old one.
    ///
    /// # Errors
    /// `Retry` and `Fatal` as elsewhere; not committing is always safe, only repeated work.
    async fn commit(&mut self, position: &Position) -> Result<()>;

    /// True when the peer sends no more until something is acknowledged: the engine then lets a
    /// barrier go at once instead of waiting for the commit interval.
    fn window_full(&self) -> bool {
        false
    }

    /// Lets go of the peer in an orderly way, after the last commit.
    async fn close(&mut self) {}
}
