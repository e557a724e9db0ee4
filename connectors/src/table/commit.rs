//! From the tail to Delta: the background commit of a table's stored epochs. The sink starts one at a time
//! and looks at its result when it is done. Invariant: only epochs that the engine has stored are moved, a
//! second time moves nothing, and a segment of the tail is removed only when Delta has its rows for good.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use afferent_engine::{Error, Result};
use arrow::array::RecordBatch;
use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex, watch};

use super::delta::Delta;
use super::tail::{Epochs, TailMark, remove_through};

/// How far the rows of an epoch, and of all before it, reach. What the sink prepares.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mark {
    /// Transaction id under which they go to Delta.
    pub app: String,
    /// The newest epoch that has rows; 0 when none has.
    pub epoch: u64,
    /// Where its rows end in the tail; none when no epoch has rows.
    pub tail: Option<TailMark>,
}

/// What is stored, and may be committed.
#[derive(Clone, Debug)]
pub struct Stored {
    /// Of the newest stored epoch.
    pub mark: Mark,
    /// Bytes of rows written since the start.
    pub bytes: u64,
    /// The sink closes: no use in waiting for more.
    pub closing: bool,
}

/// What Delta has.
#[derive(Clone, Copy, Debug, Default)]
pub struct Committed {
    /// The newest epoch.
    pub epoch: u64,
    /// [`Stored::bytes`] at that epoch.
    pub bytes: u64,
}

/// Waits until `wait` has passed or `limit` bytes are stored, then commits what is stored. Nothing, when the
/// sink goes away before: its successor finds everything in the tail.
///
/// # Errors
/// As [`commit`].
pub async fn commit_when_due(
    delta: Arc<Mutex<Delta>>,
    dir: PathBuf,
    mut stored: watch::Receiver<Stored>,
    wait: Duration,
    limit: u64,
) -> Result<Committed> {
    let due = tokio::select! {
        () = tokio::time::sleep(wait) => true,
        due = async { stored.wait_for(|stored| stored.closing || stored.bytes >= limit).await.is_ok() } => due,
    };
    if !due {
        return Ok(Committed::default());
    }
    let Stored { mark, bytes, .. } = stored.borrow().clone();
    let epoch = commit(delta, dir, mark).await?;
    Ok(Committed { epoch, bytes })
}

/// Moves everything up to `mark` that Delta does not have from the tail to Delta, and keeps the table small.
/// Returns the mark's epoch.
///
/// # Errors
/// Retry for trouble with the disk; fatal when stored rows are damaged.
pub async fn commit(delta: Arc<Mutex<Delta>>, dir: PathBuf, mark: Mark) -> Result<u64> {
    let runtime = tokio::runtime::Handle::current();
    // Parquet is encoded on the thread that polls: not on one that serves sockets.
    let span = tracing::Span::current();
    let committed = tokio::task::spawn_blocking(move || {
        let _entered = span.enter();
        runtime.block_on(async move {
            let mut delta = delta.lock().await;
            append_stored(&mut delta, &dir, &mark).await?;
            remove_committed(&dir, &mark)?;
            if let Err(cause) = delta.maintain().await {
                tracing::warn!(%cause, "the table could not be tidied; trying again with a later commit");
            }
            Ok::<u64, Error>(mark.epoch)
        })
    });
    committed.await.map_err(Error::fatal)?
}

/// One Delta commit of all epochs up to `mark` that Delta lacks.
pub(super) async fn append_stored(delta: &mut Delta, dir: &Path, mark: &Mark) -> Result<()> {
    let had = delta.version_of(&mark.app).await?;
    if let Some(end) = mark.tail.filter(|_| had < mark.epoch) {
        delta.append(&mark.app, mark.epoch, new_rows(Epochs::stored(dir, end)?, had)).await?;
    }
    Ok(())
}

/// Removes the segments before the mark's; that one is still being written.
pub(super) fn remove_committed(dir: &Path, mark: &Mark) -> Result<()> {
    mark.tail.map_or(Ok(()), |end| remove_through(dir, end.segment.saturating_sub(1)))
}

/// The rows of all epochs after `had`, in order.
fn new_rows(epochs: Epochs, had: u64) -> impl Iterator<Item = Result<RecordBatch>> + Send {
    epochs.filter(move |epoch| !matches!(epoch, Ok(epoch) if epoch.epoch <= had)).flat_map(|epoch| {
        match epoch.and_then(|epoch| epoch.batches()) {
            Ok(batches) => batches.into_iter().map(Ok).collect::<Vec<_>>(),
            Err(error) => vec![Err(error)],
        }
    })
}
