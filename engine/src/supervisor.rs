//! Runs a pipeline to its end: takes up the last stored epoch, assembles, watches, and after a failure
//! begins again from the last epoch, with backoff; a full disk it waits out. Moves rejected rows to the dead-letter
//! table meanwhile.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arrow::array::RecordBatch;
use arrow::compute::concat_batches;
use arrow::ipc::reader::StreamReader;
use async_trait::async_trait;
use tokio::runtime::Handle;
use tokio::sync::{Mutex, Notify, mpsc};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::assembly::{Assembly, Runtimes};
use crate::backoff::Backoff;
use crate::checkpoint::Checkpoints;
use crate::durable;
use crate::epoch::{Blocking, Coordinator, Ending, Pacing};
use crate::error::{Error, Result};
use crate::graph::{Graph, Role};
use crate::metrics::Metrics;
use crate::position::Epoch;
use crate::rejected;
use crate::sabotage::Planted;
use crate::stage::{HELD_REJECTS, HELD_REJECTS_SIMULATED, Loop, Report, Stop};

mod opening;

pub use opening::Opening;

/// Room for reports: stages wait when the coordinator is busy storing, and none is ever lost.
const REPORTS: usize = 256;
/// Rejected rows moved at once; bounds the memory of the move.
const MOVED_BYTES: usize = 16 * 1024 * 1024;
/// Restarts in a row without one committed epoch after which the pipeline is given up.
const FUTILE_RESTARTS: u32 = 8;
/// A run that lasted this long was not futile, even if an idle stream gave it nothing to commit.
const LONG_LIFE: Duration = Duration::from_secs(60);
/// How often dead letters are moved at most: each move is a commit of the table.
const MOVE_EVERY: Duration = Duration::from_secs(1);

/// Where rejected rows end up. It remembers the newest number appended, so that a move repeated after a
/// crash doubles nothing.
#[async_trait]
pub trait DeadLetters: Send {
    /// The newest number that was appended for this origin (a pipeline's checkpoint store); 0 when none was.
    ///
    /// # Errors
    /// `Retry`: the rows stay in the checkpoint store and are offered again.
    async fn newest(&mut self, origin: &str) -> Result<u64>;

    /// Appends rows in the schema of [`rejected::schema`], durable on return; `number` grows.
    ///
    /// # Errors
    /// `Retry`: the rows stay in the checkpoint store and are offered again.
    async fn append(&mut self, origin: &str, number: u64, rows: RecordBatch) -> Result<()>;
}

/// Passes dead letters on, and counts the rows that have arrived there.
pub struct CountedDeadLetters {
    table: Arc<Mutex<dyn DeadLetters>>,
    rows: Arc<AtomicU64>,
}

impl CountedDeadLetters {
    /// In front of `table`, with the counter: rows appended since.
    pub fn new(table: Arc<Mutex<dyn DeadLetters>>) -> (Self, Arc<AtomicU64>) {
        let rows: Arc<AtomicU64> = Arc::default();
        (Self { table, rows: Arc::clone(&rows) }, rows)
    }
}

#[async_trait]
impl DeadLetters for CountedDeadLetters {
    async fn newest(&mut self, origin: &str) -> Result<u64> {
        self.table.lock().await.newest(origin).await
    }

    async fn append(&mut self, origin: &str, number: u64, rows: RecordBatch) -> Result<()> {
        let count = rows.num_rows() as u64;
        self.table.lock().await.append(origin, number, rows).await?;
        self.rows.fetch_add(count, Ordering::Relaxed);
        Ok(())
    }
}

/// What to do about state that the pipeline, as it is now, cannot take over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Restore {
    /// Refuse to start and say which stages.
    #[default]
    Strict,
    /// Forget what belongs to changed or removed stages.
    AllowNonRestored,
    /// Forget everything.
    Fresh,
}

/// How to run a pipeline.
pub struct Options {
    /// Its checkpoint store.
    pub store: Arc<Checkpoints>,
    /// Components write below this folder.
    pub data_dir: PathBuf,
    /// Where everything is measured.
    pub metrics: Metrics,
    /// Where tasks run.
    pub runtimes: Runtimes,
    /// Cancelled to stop in an orderly way: what has come in is processed and committed.
    pub drain: CancellationToken,
    /// How long that may take before the run is ended without it.
    pub drain_limit: Duration,
    /// Where rejects go; without it they stay in the checkpoint store.
    pub dead_letters: Option<Arc<Mutex<dyn DeadLetters>>>,
    /// What to do about a changed pipeline.
    pub restore: Restore,
    /// Seed of all jitter; the same seed, graph and clock give the same run.
    pub seed: u64,
    /// Faults planted by a test.
    pub planted: Planted,
    /// Call the store in place instead of on a blocking thread: for runs on virtual time. Limits that only bound memory
    /// are then so small that few rows reach them.
    pub virtual_time: bool,
}

/// Why a pipeline could not be run to its end.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Stored state belongs to a pipeline that has changed since.
    #[error("the pipeline has changed since its state was stored: {}", .0.join("; "))]
    Changed(Vec<String>),
    /// Every source had been read to its end before.
    #[error("input already read")]
    AlreadyRead,
    /// It failed again and again without committing anything.
    #[error("{error} (given up after {restarts} restarts without progress)")]
    Failed {
        /// The last error.
        error: Error,
        /// How often it was restarted.
        restarts: u32,
    },
    /// The checkpoint store or the assembly failed before anything ran.
    #[error(transparent)]
    Engine(#[from] Error),
    /// It was asked to stop and did not come to a clean cut in time.
    #[error("not drained within {}", humantime::format_duration(*.0))]
    DrainLimit(Duration),
}

/// Runs the pipeline until its sources end, it is drained, or it fails for good.
///
/// # Errors
/// See [`RunError`]. Nothing that was not durable has been acknowledged in any case.
pub async fn run(graph: &Graph, options: &Options) -> std::result::Result<Ending, RunError> {
    adopt(graph, options)?;
    let already_read = already_read(graph, options)?;
    let limit = async {
        options.drain.cancelled().await;
        sleep(options.drain_limit).await;
    };
    tokio::select! {
        biased;
        // Also when there is nothing left to read: the sinks may have to finish the last epoch after a crash.
        ended = supervise(graph, options) => match ended {
            Ok(_) if already_read => Err(RunError::AlreadyRead),
            ended => ended,
        },
        () = limit => Err(RunError::DrainLimit(options.drain_limit)),
    }
}

async fn supervise(graph: &Graph, options: &Options) -> std::result::Result<Ending, RunError> {
    let metrics = options.metrics.pipeline(&graph.name);
    let new_backoff = || Backoff::new(Duration::from_millis(100), Duration::from_secs(10), options.seed);
    let (mut backoff, mut without_space) = (new_backoff(), new_backoff());
    loop {
        let (committed_before, began) = (metrics.epochs.get(), Instant::now());
        let error = match attempt(graph, options).await {
            Ok(ending) => {
                if let Err(error) = move_dead_letters(graph, options).await {
                    tracing::warn!(%error, "moving dead letters failed; they stay in the checkpoint store until the next start");
                }
                return Ok(ending);
            }
            Err(error) => error,
        };
        if metrics.epochs.get() > committed_before || began.elapsed() > LONG_LIFE {
            backoff.reset();
            without_space.reset();
        }
        let restarts = backoff.tries();
        let full = durable::is_full(&error);
        if (restarts >= FUTILE_RESTARTS && !full) || options.drain.is_cancelled() {
            return Err(RunError::Failed { error, restarts });
        }
        let wait = if full { without_space.next() } else { backoff.next() };
        if full {
            // No fault of the pipeline's: it is never given up for that, and goes on from its last epoch.
            tracing::error!(pipeline = %graph.name, "{error}: will try again in {wait:?}");
        } else {
            tracing::error!(pipeline = %graph.name, %error, "the pipeline failed; restarting from its last epoch in {wait:?}");
        }
        metrics.restarts.inc();
        tokio::select! {
            biased;
            () = sleep(wait) => {}
            () = options.drain.cancelled() => return Err(RunError::Failed { error, restarts }),
        }
    }
}

/// Whether the newest epoch remembers every source as ended.
fn already_read(graph: &Graph, options: &Options) -> Result<bool> {
    let restored = options.store.restored()?;
    let sources: Vec<&str> = graph.nodes.iter().filter(|node| node.inputs.is_empty()).map(|node| node.name.as_str()).collect();
    Ok(!sources.is_empty() && sources.iter().all(|source| restored.sources.get(*source).is_some_and(|mark| mark.ended)))
}

/// Compares what is stored with the pipeline as it is now, and forgets what may be forgotten.
fn adopt(graph: &Graph, options: &Options) -> std::result::Result<(), RunError> {
    let stored = options.store.fingerprints()?;
    let mut forget = Vec::new();
    let mut changes = Vec::new();
    for stage in options.store.stages()? {
        let now = graph.nodes.iter().find(|node| node.name == stage);
        let change = match (now, stored.get(&stage)) {
            (None, Some(_)) => format!("stage `{stage}` is gone"),
            // It left earlier, which was told then.
            (None, None) => continue,
            (Some(node), Some(fingerprint)) if *fingerprint != node.fingerprint => match node.role {
                Role::Source(_) => {
                    format!("the configuration of source `{stage}` is another, and its stored position belongs to the old one")
                }
                _ => format!("the configuration of stage `{stage}` is another"),
            },
            _ if options.restore == Restore::Fresh => String::new(),
            _ => continue,
        };
        changes.push(change);
        forget.push(stage);
    }
    if options.restore == Restore::Strict && !changes.is_empty() {
        return Err(RunError::Changed(changes));
    }
    let fingerprints: Vec<(String, u64)> = graph.nodes.iter().map(|node| (node.name.clone(), node.fingerprint)).collect();
    Ok(options.store.adopt(&forget, &fingerprints)?)
}

/// One run of all tasks, from the last stored epoch to the end or to the first failure.
async fn attempt(graph: &Graph, options: &Options) -> Result<Ending> {
    let blocking = if options.virtual_time { Blocking::Virtual } else { Blocking::Pool };
    let begun = blocking.call(&options.store, |store| Ok((store.start()?, store.restored()?)));
    let (run, restored) = begun.await?;
    let (reports, inbox) = mpsc::channel::<Report>(REPORTS);
    let context = Loop {
        pipeline: graph.name.as_str().into(),
        reports,
        seed: options.seed ^ u64::from(run),
        planted: options.planted,
        wall: if options.virtual_time { 0 } else { wall_clock_ms() },
        started: Instant::now(),
        held_rejects: if options.virtual_time { HELD_REJECTS_SIMULATED } else { HELD_REJECTS },
    };
    let assembly = Assembly {
        graph,
        store: &options.store,
        restored,
        metrics: &options.metrics,
        data_dir: options.data_dir.clone(),
        runtimes: &options.runtimes,
        run,
        context,
    };
    let assembled = assembly.spawn()?;
    let mut tasks = assembled.tasks;
    let rejects_stored = Arc::new(Notify::new());
    let coordinator = Coordinator {
        pipeline: graph.name.clone(),
        store: Arc::clone(&options.store),
        blocking,
        pace: graph.pace(),
        sources: assembled.sources,
        sinks: assembled.sinks,
        tasks: assembled.participants,
        metrics: options.metrics.pipeline(&graph.name),
        rejects_stored: Arc::clone(&rejects_stored),
        state: Pacing::from(Epoch::start(run)),
    };
    // What an earlier run left behind is moved first.
    rejects_stored.notify_one();
    let mover = async {
        loop {
            rejects_stored.notified().await;
            if let Err(error) = move_dead_letters(graph, options).await {
                tracing::warn!(%error, "moving dead letters failed; they stay in the checkpoint store for now");
                rejects_stored.notify_one();
            }
            sleep(MOVE_EVERY).await;
        }
    };
    let coordination = coordinator.run(inbox, options.drain.clone());
    tokio::pin!(mover, coordination);
    let mut ending = None;
    let result = loop {
        tokio::select! {
            biased;
            ended = &mut coordination, if ending.is_none() => match ended {
                Ok(ended) => ending = Some(ended),
                // A stage that failed is the better explanation of a coordinator that cannot go on.
                Err(error) => break Err(first_failure(&mut tasks).await.unwrap_or(error)),
            },
            joined = tasks.join_next() => match (joined, ending) {
                (None, Some(ending)) => return Ok(ending),
                (None, None) => break Err(Error::fatal("every stage ended before the last epoch was committed")),
                (Some(joined), _) => if let Some(error) = failure(joined) { break Err(error) },
            },
            () = &mut mover => {}
        }
    };
    tasks.shutdown().await;
    result
}

/// The error of the first task that failed, among those that have ended or end within a moment.
async fn first_failure(tasks: &mut tokio::task::JoinSet<std::result::Result<(), Stop>>) -> Option<Error> {
    let find = async {
        while let Some(joined) = tasks.join_next().await {
            if let Some(error) = failure(joined) {
                return Some(error);
            }
        }
        None
    };
    timeout(Duration::from_millis(100), find).await.ok().flatten()
}

fn failure(joined: std::result::Result<std::result::Result<(), Stop>, tokio::task::JoinError>) -> Option<Error> {
    match joined {
        Ok(Ok(()) | Err(Stop::TornDown)) => None,
        // It says what is full, and is known by its cause, which words around it would hide.
        Ok(Err(Stop::Failed { error, .. })) if durable::is_full(&error) => Some(error),
        Ok(Err(Stop::Failed { stage, error })) => Some(error.context(format!("stage {stage}"))),
        Err(join) if join.is_panic() => Some(Error::fatal(format!("a stage panicked: {join}"))),
        Err(_) => None,
    }
}

/// Moves all stored rejects to the dead-letter table.
async fn move_dead_letters(graph: &Graph, options: &Options) -> Result<()> {
    let Some(table) = &options.dead_letters else { return Ok(()) };
    let origin = format!("{}/{:x}", graph.name, options.store.identity());
    let (store, table) = (Arc::clone(&options.store), Arc::clone(table));
    if options.virtual_time {
        return move_rejected(&origin, &store, &table).await;
    }
    // It reads, encodes and syncs: not on a thread that serves sockets.
    let runtime = Handle::current();
    spawn_blocking(move || runtime.block_on(move_rejected(&origin, &store, &table))).await.map_err(Error::fatal)?
}

/// Two of these may run at once, one of them left over from an earlier attempt: what is in the table is looked up under
/// its lock, and moved no second time.
async fn move_rejected(origin: &str, store: &Checkpoints, table: &Mutex<dyn DeadLetters>) -> Result<()> {
    loop {
        let mut waiting = store.rejected(MOVED_BYTES)?;
        let Some((last, _)) = waiting.last() else { return Ok(()) };
        let last = *last;
        let mut table = table.lock().await;
        let newest = table.newest(origin).await?;
        waiting.retain(|(number, _)| *number > newest);
        let mut rows = Vec::new();
        for (_, stream) in &waiting {
            let reader = StreamReader::try_new(stream.as_slice(), None).map_err(Error::fatal)?;
            for batch in reader {
                rows.push(batch.map_err(Error::fatal)?);
            }
        }
        let rows = concat_batches(&rejected::schema(), &rows).map_err(Error::fatal)?;
        if rows.num_rows() > 0 {
            table.append(origin, last, rows).await?;
        }
        store.forget_rejected(last)?;
    }
}

fn wall_clock_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use std::thread::{self, ThreadId};

    use arrow::ipc::writer::StreamWriter;

    use super::*;
    use crate::checkpoint::Record;
    use crate::rejected::{Given, Rejected};
    use crate::testing::disk::Disk;

    /// Remembers which thread an append ran on.
    struct Watched(Arc<std::sync::Mutex<Vec<ThreadId>>>);

    #[async_trait]
    impl DeadLetters for Watched {
        async fn newest(&mut self, _: &str) -> Result<u64> {
            Ok(0)
        }

        async fn append(&mut self, _: &str, _: u64, rows: RecordBatch) -> Result<()> {
            assert_eq!(rows.num_rows(), 1);
            self.0.lock().unwrap().push(thread::current().id());
            Ok(())
        }
    }

    /// Moves one reject, and tells whether that happened on the calling thread.
    async fn moves_on_this_thread(virtual_time: bool) -> bool {
        let row = Rejected { code: "c", reason: "r".into(), position: "p".into(), given: Given::Bytes(vec![1]) };
        let rows = rejected::to_batch("p", "s", 0, &[row]).unwrap();
        let mut stream = StreamWriter::try_new(Vec::new(), &rows.schema()).unwrap();
        stream.write(&rows).unwrap();
        let record = Record { rejected: vec![stream.into_inner().unwrap()], ..Record::default() };
        let store = Arc::new(Checkpoints::with_backend(Disk::new().backend()).unwrap());
        store.store(Epoch::start(1), &record).unwrap();
        let threads: Arc<std::sync::Mutex<Vec<ThreadId>>> = Arc::default();
        let (counted, count) = CountedDeadLetters::new(Arc::new(Mutex::new(Watched(Arc::clone(&threads)))));
        let graph = Graph { name: "p".into(), nodes: Vec::new(), commit_interval: None };
        let options = Options {
            store,
            data_dir: PathBuf::new(),
            metrics: Metrics::new().unwrap(),
            runtimes: Runtimes::current(),
            drain: CancellationToken::new(),
            drain_limit: Duration::ZERO,
            dead_letters: Some(Arc::new(Mutex::new(counted))),
            restore: Restore::Strict,
            seed: 0,
            planted: Planted::default(),
            virtual_time,
        };
        move_dead_letters(&graph, &options).await.unwrap();
        assert!(options.store.rejected(1).unwrap().is_empty());
        assert_eq!(count.load(Ordering::Relaxed), 1);
        let threads = threads.lock().unwrap();
        assert_eq!(threads.len(), 1);
        threads[0] == thread::current().id()
    }

    #[tokio::test]
    async fn dead_letters_are_moved_on_a_thread_that_may_block() {
        assert!(!moves_on_this_thread(false).await);
        assert!(moves_on_this_thread(true).await, "on virtual time there is one thread");
    }
}
