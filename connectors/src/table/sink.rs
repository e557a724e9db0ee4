//! The running `table` sink. Rows are buffered, written to the tail and fsynced at each barrier; whole stored
//! epochs go to Delta in the background, which never holds a barrier up. Invariant: what is prepared is
//! fsynced, and every row of a stored epoch is in the tail or in Delta.
//!
//! What it prepares is a [`Mark`]: how far the tail reached, and under which transaction id its rows go to
//! Delta. After a crash the tail is cut at the mark, and what Delta already has of it is skipped.
//!
//! A start without a mark (`--fresh`, or a crash before the first stored epoch) appends to the table that is
//! there: the rows of its own tail, which no stored epoch claims, are dropped, and a transaction id that
//! Delta has not seen is taken, so that epoch numbers may begin anew. Rows that another stage left in the
//! tail are never dropped: the start is refused.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use afferent_engine::{Batch, Epoch, Error, Prepared, Rejected, Result, Sink};
use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tracing::Instrument;

use super::commit::{Committed, Mark, Stored, commit, commit_when_due};
use super::delta::{Delta, tail_dir};
use super::schema::conform;
use super::tail::{Epochs, Tail, TailMark, remove_through};

/// Rows that wait for their barrier in memory; more are written to the tail ahead of it.
const BUFFER_BYTES: usize = 8 << 20;

/// What the sink is made with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The table's name.
    pub name: String,
    /// The data directory.
    pub data_dir: PathBuf,
    /// Who writes: `pipeline/stage`.
    pub writer: String,
    /// The table's columns, as [`super::schema::mapped`] gives them.
    pub schema: SchemaRef,
    /// Time between commits to Delta.
    pub commit_every: Duration,
    /// Bytes between commits to Delta.
    pub commit_bytes: u64,
    /// Time between barriers.
    pub commit_interval: Duration,
}

/// The sink, open or not.
pub struct TableSink {
    settings: Settings,
    rows: Vec<RecordBatch>,
    bytes: usize,
    open: Option<Open>,
}

/// What there is between `open` and `close`.
struct Open {
    /// Locked only on blocking threads, and for one call.
    tail: Arc<Mutex<Tail>>,
    /// Rows of the running epoch are in the tail already.
    ahead: bool,
    delta: Arc<tokio::sync::Mutex<Delta>>,
    dir: PathBuf,
    /// Of the newest prepared epoch.
    prepared: Mark,
    /// Bytes of rows written to the tail since the start.
    bytes: u64,
    stored: watch::Sender<Stored>,
    committed: Committed,
    committing: Option<JoinHandle<Result<Committed>>>,
    /// The last commit failed: the next one does not wait.
    overdue: bool,
}

impl TableSink {
    /// Not open yet.
    pub fn new(settings: Settings) -> Self {
        Self { settings, rows: Vec::new(), bytes: 0, open: None }
    }

    fn opened(&mut self) -> Result<&mut Open> {
        self.open.as_mut().ok_or_else(|| Error::fatal(format!("the table `{}` is not open", self.settings.name)))
    }

    /// Writes the buffered rows to the tail. With an epoch: completes it, syncs, and tells where it ends;
    /// nothing for an epoch without rows.
    async fn spill(&mut self, epoch: Option<u64>) -> Result<Option<TailMark>> {
        let mut rows = self.rows.clone();
        let (every, enough) = (self.settings.commit_every, self.settings.commit_bytes);
        let empty = RecordBatch::new_empty(Arc::clone(&self.settings.schema));
        let open = self.opened()?;
        if rows.is_empty() {
            if !open.ahead {
                return Ok(None);
            }
            rows.push(empty);
        }
        // The lock of the table is held as long as this runs, also when nobody waits for it any more: whoever takes
        // over must not recover the tail under a write.
        let (tail, held) = (Arc::clone(&open.tail), Arc::clone(&open.delta));
        let mark = blocking(move || {
            let _held = held;
            // A panic may have left half a frame behind: recovery removes it.
            let mut tail = tail.lock().map_err(|_| Error::fatal("a write to the tail did not come to its end"))?;
            let (length, age) = tail.current();
            if length >= enough || age >= every {
                tail.rotate();
            }
            match epoch {
                None => tail.append_ahead(&rows).map(|()| None),
                Some(epoch) => tail.append(epoch, &rows).map(|()| tail.sync()),
            }
        })
        .await?;
        self.rows.clear();
        let bytes = std::mem::take(&mut self.bytes);
        let open = self.opened()?;
        open.bytes += bytes as u64;
        open.ahead = epoch.is_none();
        Ok(mark)
    }
}

#[async_trait]
impl Sink for TableSink {
    async fn open(&mut self, last: Option<(Epoch, &Prepared)>) -> Result<()> {
        self.rows.clear();
        self.bytes = 0;
        if let Some(Open { stored, committing: Some(committing), .. }) = self.open.take() {
            // It may be in the middle of a commit. What became of that, Delta's log tells.
            drop(stored);
            let _ = committing.await;
        }
        let last = last.map(|(epoch, prepared)| read(epoch, prepared)).transpose()?;
        let settings = &self.settings;
        let dir = tail_dir(&settings.data_dir, &settings.name);
        let mut delta = Delta::open(&settings.data_dir, &settings.name, &settings.schema).await?;
        let mark = match last {
            Some(mark) => mark,
            None => Mark { app: unused_app(&mut delta, &settings.writer).await?, epoch: 0, tail: None },
        };
        check_leftovers(&mut delta, &settings.name, &dir, &mark).await?;
        let epoch = delta.version_of(&mark.app).await?;
        // What Delta has needs no tail: all that is left there then came after the mark.
        let keep = mark.tail.filter(|_| mark.epoch > epoch);
        let (folder, app) = (dir.clone(), mark.app.clone());
        let (tail, delta) = blocking(move || Ok((Tail::recover(&folder, &app, keep)?, delta))).await?;
        let stored = Stored { mark: mark.clone(), bytes: 0, closing: false };
        let mut open = Open {
            tail: Arc::new(Mutex::new(tail)),
            ahead: false,
            delta: Arc::new(tokio::sync::Mutex::new(delta)),
            dir,
            prepared: mark,
            bytes: 0,
            stored: watch::Sender::new(stored),
            committed: Committed { epoch, bytes: 0 },
            committing: None,
            overdue: false,
        };
        open.start_commit(settings);
        self.open = Some(open);
        Ok(())
    }

    async fn write(&mut self, _input: usize, batch: Batch) -> Result<Vec<Rejected>> {
        if batch.rows() == 0 {
            return Ok(Vec::new());
        }
        let rows = conform(batch.records(), &self.settings.schema)
            .map_err(|e| Error::reject(format!("converting for the table `{}`: {e}", self.settings.name)))?;
        // First, so that a failure leaves this batch out and a second try does not write it twice.
        if self.bytes >= BUFFER_BYTES {
            self.spill(None).await?;
        }
        self.bytes += batch.bytes();
        self.rows.push(rows);
        Ok(Vec::new())
    }

    async fn prepare(&mut self, epoch: Epoch) -> Result<(Prepared, Vec<Rejected>)> {
        if self.opened()?.prepared.epoch > epoch.as_u64() {
            return Err(Error::fatal(format!("preparing epoch {epoch} of the table after a later one")));
        }
        let mark = self.spill(Some(epoch.as_u64())).await?;
        let open = self.opened()?;
        if mark.is_some() {
            open.prepared.epoch = epoch.as_u64();
            open.prepared.tail = mark;
        }
        Ok((serde_json::to_value(&open.prepared).map_err(Error::fatal)?, Vec::new()))
    }

    async fn finish(&mut self, epoch: Epoch, prepared: &Prepared) -> Result<()> {
        let mark = read(epoch, prepared)?;
        let open = self.opened()?;
        let bytes = open.bytes;
        open.stored.send_if_modified(|stored| {
            let newer = mark.epoch > stored.mark.epoch;
            if newer {
                stored.mark = mark;
                stored.bytes = bytes;
            }
            newer
        });
        if open.committing.as_ref().is_some_and(JoinHandle::is_finished) {
            open.reap().await?;
        }
        if let Some(open) = &mut self.open {
            open.start_commit(&self.settings);
        }
        Ok(())
    }

    fn commit_interval(&self) -> Duration {
        self.settings.commit_interval
    }

    async fn close(&mut self) -> Result<()> {
        let Some(open) = &mut self.open else { return Ok(()) };
        open.stored.send_modify(|stored| stored.closing = true);
        open.reap().await?;
        let stored = open.stored.borrow().mark.clone();
        if stored.epoch > open.committed.epoch {
            open.committed.epoch = commit(Arc::clone(&open.delta), open.dir.clone(), stored.clone()).await?;
        }
        // Nothing is prepared beyond what Delta has: the tail has served.
        if let Some(end) = stored.tail.filter(|_| stored == open.prepared && !open.ahead) {
            let dir = open.dir.clone();
            blocking(move || remove_through(&dir, end.segment)).await?;
        }
        self.open = None;
        Ok(())
    }
}

impl Open {
    /// Starts the background commit, unless one is under way or there is nothing to commit.
    fn start_commit(&mut self, settings: &Settings) {
        if self.committing.is_some() || self.stored.borrow().mark.epoch <= self.committed.epoch {
            return;
        }
        let wait = if std::mem::take(&mut self.overdue) { Duration::ZERO } else { settings.commit_every };
        let limit = self.committed.bytes.saturating_add(settings.commit_bytes);
        let due = commit_when_due(Arc::clone(&self.delta), self.dir.clone(), self.stored.subscribe(), wait, limit);
        self.committing = Some(tokio::spawn(due.in_current_span()));
    }

    /// Waits for the background commit, if there is one, and takes its result.
    async fn reap(&mut self) -> Result<()> {
        let Some(committing) = &mut self.committing else { return Ok(()) };
        let result = committing.await;
        self.committing = None;
        match result.map_err(Error::fatal).flatten() {
            Ok(committed) => {
                self.committed = committed;
                Ok(())
            }
            Err(error) => {
                self.overdue = true;
                Err(error)
            }
        }
    }
}

/// A transaction id of this writer that Delta has not seen.
async fn unused_app(delta: &mut Delta, writer: &str) -> Result<String> {
    let mut generation = 1_u64;
    loop {
        let app = format!("afferent/{writer}/{generation}");
        if delta.version_of(&app).await? == 0 {
            return Ok(app);
        }
        generation += 1;
    }
}

/// Refuses to drop rows of another stage, and says what of an earlier start of this one is dropped.
async fn check_leftovers(delta: &mut Delta, table: &str, dir: &Path, mark: &Mark) -> Result<()> {
    let folder = dir.to_owned();
    let newest = blocking(move || {
        let mut newest: BTreeMap<Arc<str>, u64> = BTreeMap::new();
        for epoch in Epochs::visible(&folder)? {
            let epoch = epoch?;
            newest.insert(epoch.owner, epoch.epoch);
        }
        Ok(newest)
    })
    .await?;
    for (app, epoch) in newest {
        let ours = *app == *mark.app;
        if (ours && mark.epoch > 0) || epoch <= delta.version_of(&app).await? {
            continue;
        }
        if writer_of(&app) != writer_of(&mark.app) {
            let dir = dir.display();
            return Err(Error::fatal(format!(
                "the tail of the table `{table}` holds rows of `{}` that are not in Delta yet; run that pipeline once, \
                 which moves them, or delete {dir} to drop them",
                writer_of(&app)
            )));
        }
        tracing::warn!(table, %app, epoch, "dropping rows of the tail that no stored epoch of this start claims");
    }
    Ok(())
}

/// `afferent/pipeline/stage` of `afferent/pipeline/stage/generation`.
fn writer_of(app: &str) -> &str {
    app.rsplit_once('/').map_or(app, |(writer, _)| writer)
}

fn read(epoch: Epoch, prepared: &Prepared) -> Result<Mark> {
    serde_json::from_value(prepared.clone())
        .map_err(|e| Error::fatal(format!("what the table sink prepared for epoch {epoch} is not readable: {prepared}: {e}")))
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(Error::fatal)?
}

#[cfg(test)]
mod tests {
    use afferent_engine::Class;
    use arrow::array::{ArrayRef, AsArray, Int64Array};
    use arrow::datatypes::{DataType, Field, Int64Type, Schema};
    use tempfile::TempDir;

    use super::super::commit::{append_stored, remove_committed};
    use super::super::reader;
    use super::*;

    fn settings(dir: &Path) -> Settings {
        Settings {
            name: "t".into(),
            data_dir: dir.to_owned(),
            writer: "p/s".into(),
            schema: Arc::new(Schema::new(vec![Field::new("n", DataType::Int64, true)])),
            commit_every: Duration::from_secs(3600),
            commit_bytes: u64::MAX,
            commit_interval: Duration::from_millis(20),
        }
    }

    fn rows(values: &[i64]) -> Batch {
        Batch::new(RecordBatch::try_from_iter([("n", Arc::new(Int64Array::from(values.to_vec())) as ArrayRef)]).unwrap())
    }

    /// What a reader sees, in order of value.
    async fn seen(dir: &Path) -> Vec<i64> {
        let context = datafusion::prelude::SessionContext::new();
        assert_eq!(reader::register_all(&context, dir).await.unwrap(), ["t"]);
        let batches = context.sql("select n from t order by n").await.unwrap().collect().await.unwrap();
        batches.iter().flat_map(|batch| batch.column(0).as_primitive::<Int64Type>().values().to_vec()).collect()
    }

    fn epoch(number: u64) -> Epoch {
        Epoch::from_u64((1 << 32) + number)
    }

    fn values_of(number: u64) -> [i64; 2] {
        [number as i64 * 10, number as i64 * 10 + 1]
    }

    /// Two batches, so that an epoch that is written in part would be noticed.
    async fn write(sink: &mut TableSink, number: u64) {
        for value in values_of(number) {
            assert!(sink.write(0, rows(&[value])).await.unwrap().is_empty());
        }
    }

    fn copy(from: &Path) -> TempDir {
        fn into(from: &Path, to: &Path) {
            for entry in std::fs::read_dir(from).unwrap() {
                let entry = entry.unwrap();
                let target = to.join(entry.file_name());
                if entry.file_type().unwrap().is_dir() {
                    std::fs::create_dir(&target).unwrap();
                    into(&entry.path(), &target);
                } else {
                    std::fs::copy(entry.path(), target).unwrap();
                }
            }
        }
        let dir = tempfile::tempdir().unwrap();
        into(from, dir.path());
        dir
    }

    /// A crash: what is on the disk, and the newest epoch that the engine has stored.
    struct Crash {
        at: String,
        disk: TempDir,
        last: Option<(u64, Prepared)>,
    }

    const EPOCHS: u64 = 4;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_crash_between_any_two_steps_neither_loses_nor_doubles_rows() {
        let dir = tempfile::tempdir().unwrap();
        let mut sink = TableSink::new(settings(dir.path()));
        sink.open(None).await.unwrap();
        let mut last = None;
        let mut crashes = Vec::new();
        let mut crash = |at: String, last: &Option<(u64, Prepared)>| {
            crashes.push(Crash { at, disk: copy(dir.path()), last: last.clone() });
        };
        for number in 1..=EPOCHS {
            if number == 4 {
                sink.opened().unwrap().tail.lock().unwrap().rotate();
            }
            write(&mut sink, number).await;
            if number == 3 {
                sink.spill(None).await.unwrap();
                crash(format!("{number} spilled"), &last);
            }
            let prepared = sink.prepare(epoch(number)).await.unwrap().0;
            crash(format!("{number} prepared"), &last);
            last = Some((number, prepared.clone()));
            crash(format!("{number} stored"), &last);
            sink.finish(epoch(number), &prepared).await.unwrap();
            if number % 2 == 0 {
                let open = sink.opened().unwrap();
                let mark = open.stored.borrow().mark.clone();
                append_stored(&mut *open.delta.lock().await, &open.dir, &mark).await.unwrap();
                crash(format!("{number} committed"), &last);
                remove_committed(&open.dir, &mark).unwrap();
                crash(format!("{number} removed"), &last);
            }
        }
        sink.close().await.unwrap();
        crash("closed".into(), &last);
        drop(sink);

        let expected: Vec<i64> = (1..=EPOCHS).flat_map(values_of).collect();
        for Crash { at, disk, last } in crashes {
            let stored = last.as_ref().map_or(0, |(number, _)| *number);
            let mut sink = TableSink::new(settings(disk.path()));
            // The first restart crashes, too, right after recovery.
            for _ in 0..2 {
                sink.open(last.as_ref().map(|(number, prepared)| (epoch(*number), prepared))).await.unwrap();
                let kept: Vec<i64> = (1..=stored).flat_map(values_of).collect();
                assert_eq!(seen(disk.path()).await, kept, "recovered from: {at}");
            }
            for number in stored + 1..=EPOCHS {
                write(&mut sink, number).await;
                let prepared = sink.prepare(epoch(number + 100)).await.unwrap().0;
                sink.finish(epoch(number + 100), &prepared).await.unwrap();
            }
            assert_eq!(seen(disk.path()).await, expected, "replayed after: {at}");
            sink.close().await.unwrap();
            assert_eq!(seen(disk.path()).await, expected, "closed after: {at}");
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn readers_see_each_row_once_while_commits_happen() {
        let dir = tempfile::tempdir().unwrap();
        let mut sink = TableSink::new(Settings { commit_every: Duration::ZERO, ..settings(dir.path()) });
        sink.open(None).await.unwrap();
        let mut expected = Vec::new();
        for number in 1..=12 {
            write(&mut sink, number).await;
            let prepared = sink.prepare(epoch(number)).await.unwrap().0;
            sink.finish(epoch(number), &prepared).await.unwrap();
            expected.extend(values_of(number));
            assert_eq!(seen(dir.path()).await, expected, "after epoch {number}");
        }
        sink.close().await.unwrap();
        assert_eq!(seen(dir.path()).await, expected);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn an_epoch_without_rows_repeats_the_mark_and_touches_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut sink = TableSink::new(settings(dir.path()));
        sink.open(None).await.unwrap();
        write(&mut sink, 1).await;
        let first = sink.prepare(epoch(1)).await.unwrap().0;
        let before = copy(dir.path());
        assert_eq!(sink.prepare(epoch(2)).await.unwrap().0, first);
        let tails = |dir: &Path| std::fs::read_dir(tail_dir(dir, "t")).unwrap().count();
        assert_eq!(tails(dir.path()), tails(before.path()));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_fresh_start_appends_under_a_new_transaction_id() {
        let dir = tempfile::tempdir().unwrap();
        for _ in 0..2 {
            let mut sink = TableSink::new(settings(dir.path()));
            sink.open(None).await.unwrap();
            write(&mut sink, 1).await;
            let prepared = sink.prepare(epoch(1)).await.unwrap().0;
            sink.finish(epoch(1), &prepared).await.unwrap();
            sink.close().await.unwrap();
        }
        assert_eq!(seen(dir.path()).await, [10, 10, 11, 11]);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn rows_that_another_stage_left_are_not_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let mut sink = TableSink::new(settings(dir.path()));
        sink.open(None).await.unwrap();
        write(&mut sink, 1).await;
        let prepared = sink.prepare(epoch(1)).await.unwrap().0;
        drop(sink);
        let mut other = TableSink::new(Settings { writer: "q/s".into(), ..settings(dir.path()) });
        let error = other.open(None).await.unwrap_err();
        assert_eq!(error.class(), Class::Fatal);
        assert!(error.to_string().contains("`afferent/p/s`"), "{error}");
        let mut sink = TableSink::new(settings(dir.path()));
        sink.open(Some((epoch(1), &prepared))).await.unwrap();
        sink.close().await.unwrap();
        drop(sink);
        other.open(None).await.unwrap();
        assert_eq!(seen(dir.path()).await, values_of(1));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn the_second_try_after_a_crash_in_open_needs_the_first_to_be_gone() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = TableSink::new(settings(dir.path()));
        first.open(None).await.unwrap();
        let mut second = TableSink::new(settings(dir.path()));
        assert_eq!(second.open(None).await.unwrap_err().class(), Class::Retry);
        drop(first);
        second.open(None).await.unwrap();
    }
}
