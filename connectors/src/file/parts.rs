//! A folder with one part for every epoch that has rows: the `file` sink for Parquet and Arrow. The engine calls it.
//! The invariant: a name without a leading dot is a complete part of a stored epoch. Rows go to `.part-open-RUN.tmp`;
//! `prepare` completes and syncs it as `.part-EPOCH.EXT.tmp`; `finish` takes the dot away. Each start of the pipeline
//! writes under names of its own (an epoch's number holds the start, too), since a write of the last one may still be
//! under way on its thread.

use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use afferent_engine::durable::StorageFull;
use afferent_engine::{Batch, Epoch, Error, Prepared, Rejected, Result, Sink, durable};
use afferent_formats::{FileFormat, FileWriter, FormatError};
use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;

use super::format::extension;

/// Every part is a file of its own: seconds keep their number bearable.
pub const COMMIT_INTERVAL: Duration = Duration::from_secs(1);

type Writer = FileWriter<BufWriter<File>>;

/// The parts that are complete and not yet visible. All of them and not only the epoch's own: of several stored
/// epochs the engine shows a restarted sink the newest only.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Ready {
    /// Their final names.
    parts: Vec<String>,
}

/// The running sink.
pub struct Parts {
    folder: PathBuf,
    /// The part that is being written.
    open: PathBuf,
    format: FileFormat,
    schema: SchemaRef,
    /// Made with the first row of an epoch.
    writer: Option<Box<Writer>>,
    /// Prepared and not finished, in the order of their epochs.
    ready: Vec<String>,
}

impl Parts {
    /// A sink for batches of `schema` into a folder, for start number `run` of the pipeline.
    pub fn new(folder: PathBuf, run: u32, format: FileFormat, schema: SchemaRef) -> Self {
        let open = folder.join(format!(".part-open-{run}.tmp"));
        Self { folder, open, format, schema, writer: None, ready: Vec::new() }
    }

    /// Makes parts visible; those that are already, or that a reader has since taken away, are passed over.
    async fn show(&mut self, parts: Vec<String>) -> Result<()> {
        let folder = self.folder.clone();
        let shown = parts.clone();
        let done = spawn_blocking(move || shown.iter().try_for_each(|part| show(&folder, part)));
        done.await.map_err(Error::fatal)?.map_err(Error::retry)?;
        self.ready.retain(|part| !parts.contains(part));
        Ok(())
    }
}

/// The name of a part while it is not visible.
fn hidden(part: &str) -> String {
    format!(".{part}.tmp")
}

fn show(folder: &Path, part: &str) -> io::Result<()> {
    match durable::rename(&folder.join(hidden(part)), &folder.join(part)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Removes what was being written or prepared when the last run ended, except what its last epoch holds.
fn clear(folder: &Path, keep: &[String]) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let ours = name.starts_with(".part-") && name.ends_with(".tmp");
        if ours && !keep.iter().any(|part| hidden(part) == name) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn parts_of(prepared: &Prepared) -> Result<Vec<String>> {
    let ready: Ready = serde_json::from_value(prepared.clone())
        .map_err(|error| Error::fatal(error).context(format!("reading which parts are prepared from {prepared}")))?;
    Ok(ready.parts)
}

/// Fatal: half a batch may be in the part, so that the whole epoch is written again. Of a full disk the engine learns as
/// such, since it waits for space as long as it takes.
fn failed(what: &str, path: &Path, error: impl std::error::Error + Send + Sync + 'static) -> Error {
    if durable::is_full(&error) {
        return Error::fatal(StorageFull::new(path, io::ErrorKind::StorageFull.into()));
    }
    Error::fatal(error).context(format!("{what} {}", path.display()))
}

fn create(open: &Path, format: FileFormat, schema: SchemaRef) -> Result<Box<Writer>> {
    let file = File::create(open).map_err(|error| failed("creating", open, error))?;
    let writer = FileWriter::create(BufWriter::new(file), format, schema);
    writer.map(Box::new).map_err(|error| failed("writing", open, error))
}

/// Completes the open part and gives it its hidden name; durable when it returns.
fn complete(open: &Path, writer: Writer, hidden: &Path) -> Result<()> {
    let output = writer.finish().map_err(|error: FormatError| failed("completing", open, error))?;
    durable::sync(output.get_ref(), open);
    durable::rename(open, hidden).map_err(|error| failed("renaming", open, error))
}

#[async_trait]
impl Sink for Parts {
    async fn open(&mut self, last: Option<(Epoch, &Prepared)>) -> Result<()> {
        let parts = last.map(|(_, prepared)| parts_of(prepared)).transpose()?.unwrap_or_default();
        let (folder, keep) = (self.folder.clone(), parts.clone());
        let cleared = spawn_blocking(move || durable::create_dir(&folder).and_then(|()| clear(&folder, &keep)));
        cleared.await.map_err(Error::fatal)?.map_err(|error| failed("clearing unfinished parts in", &self.folder, error))?;
        self.writer = None;
        self.ready.clear();
        self.show(parts).await
    }

    async fn write(&mut self, _: usize, batch: Batch) -> Result<Vec<Rejected>> {
        if batch.rows() == 0 {
            return Ok(Vec::new());
        }
        let (open, format, schema) = (self.open.clone(), self.format, Arc::clone(&self.schema));
        let writer = self.writer.take();
        // Compression takes time that others on this thread do not have.
        let written = spawn_blocking(move || -> Result<Box<Writer>> {
            let mut writer = match writer {
                Some(writer) => writer,
                None => create(&open, format, schema)?,
            };
            writer.write(batch.records()).map_err(|error| failed("writing", &open, error))?;
            Ok(writer)
        });
        self.writer = Some(written.await.map_err(Error::fatal)??);
        Ok(Vec::new())
    }

    async fn prepare(&mut self, epoch: Epoch) -> Result<(Prepared, Vec<Rejected>)> {
        if let Some(writer) = self.writer.take() {
            let part = format!("part-{:020}.{}", epoch.as_u64(), extension(self.format));
            let (open, hidden) = (self.open.clone(), self.folder.join(hidden(&part)));
            spawn_blocking(move || complete(&open, *writer, &hidden)).await.map_err(Error::fatal)??;
            self.ready.push(part);
        }
        let prepared = serde_json::to_value(Ready { parts: self.ready.clone() }).map_err(Error::fatal)?;
        Ok((prepared, Vec::new()))
    }

    async fn finish(&mut self, _: Epoch, prepared: &Prepared) -> Result<()> {
        let parts = parts_of(prepared)?;
        self.show(parts).await
    }

    fn commit_interval(&self) -> Duration {
        COMMIT_INTERVAL
    }
}

#[cfg(test)]
mod tests {
    use afferent_formats::FileReader;
    use arrow::array::{ArrayRef, AsArray, Int64Array, RecordBatch};
    use arrow::datatypes::{DataType, Field, Int64Type, Schema};
    use tempfile::TempDir;

    use super::*;

    fn sink(dir: &TempDir) -> Parts {
        of_run(dir, 1)
    }

    fn of_run(dir: &TempDir, run: u32) -> Parts {
        let schema = Arc::new(Schema::new(vec![Field::new("n", DataType::Int64, false)]));
        Parts::new(dir.path().join("out"), run, FileFormat::Parquet, schema)
    }

    async fn write(sink: &mut Parts, numbers: &[i64]) {
        let column = Arc::new(Int64Array::from(numbers.to_vec())) as ArrayRef;
        let batch = RecordBatch::try_from_iter([("n", column)]).unwrap();
        assert!(sink.write(0, Batch::new(batch)).await.unwrap().is_empty());
    }

    fn epoch(number: u64) -> Epoch {
        Epoch::from_u64(number)
    }

    fn names(dir: &TempDir) -> Vec<String> {
        let entries = fs::read_dir(dir.path().join("out")).unwrap();
        let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// The rows of all visible parts, in the order of their names.
    fn rows(dir: &TempDir) -> Vec<i64> {
        let mut rows = Vec::new();
        for name in names(dir).iter().filter(|name| !name.starts_with('.')) {
            let path = dir.path().join("out").join(name);
            let mut reader = FileReader::open(&path, FileFormat::Parquet, None, 1024, 0).unwrap();
            while let Some(read) = reader.next_batch().unwrap() {
                rows.extend(read.batch.column(0).as_primitive::<Int64Type>().values().iter());
            }
        }
        rows
    }

    #[tokio::test]
    async fn a_part_is_seen_when_its_epoch_is_stored_and_empty_epochs_make_none() {
        let dir = tempfile::tempdir().unwrap();
        let mut sink = sink(&dir);
        sink.open(None).await.unwrap();
        write(&mut sink, &[1, 2]).await;
        write(&mut sink, &[]).await;
        write(&mut sink, &[3]).await;
        let first = sink.prepare(epoch(1)).await.unwrap().0;
        assert_eq!(names(&dir), [".part-00000000000000000001.parquet.tmp"]);
        write(&mut sink, &[4]).await;
        sink.finish(epoch(1), &first).await.unwrap();
        assert_eq!(rows(&dir), [1, 2, 3]);
        let second = sink.prepare(epoch(2)).await.unwrap().0;
        let third = sink.prepare(epoch(3)).await.unwrap().0;
        sink.finish(epoch(2), &second).await.unwrap();
        sink.finish(epoch(3), &third).await.unwrap();
        assert_eq!(rows(&dir), [1, 2, 3, 4]);
        assert_eq!(names(&dir).len(), 2);
    }

    #[tokio::test]
    async fn a_restart_finishes_what_was_stored_and_removes_the_rest() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = sink(&dir);
        first.open(None).await.unwrap();
        let mut prepared = Vec::new();
        for number in 1..=3 {
            write(&mut first, &[number]).await;
            prepared.push(first.prepare(epoch(number as u64)).await.unwrap().0);
        }
        write(&mut first, &[4]).await;
        drop(first);
        assert_eq!(names(&dir).len(), 4);

        // Epochs 1 and 2 were stored, none was finished.
        for _ in 0..2 {
            let mut second = sink(&dir);
            second.open(Some((epoch(2), &prepared[1]))).await.unwrap();
            assert_eq!(rows(&dir), [1, 2]);
            assert_eq!(names(&dir).len(), 2);
            write(&mut second, &[9]).await;
        }

        // A reader has taken a part away since; it does not come back, and nothing else in its place.
        fs::remove_file(dir.path().join("out/part-00000000000000000001.parquet")).unwrap();
        let mut third = sink(&dir);
        third.open(Some((epoch(2), &prepared[1]))).await.unwrap();
        assert_eq!(rows(&dir), [2]);
        write(&mut third, &[5]).await;
        let stored = third.prepare(epoch(4)).await.unwrap().0;
        third.finish(epoch(4), &stored).await.unwrap();
        assert_eq!(rows(&dir), [2, 5]);
    }

    #[tokio::test]
    async fn files_of_others_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("out")).unwrap();
        for name in ["notes.txt", ".hidden", "part-7.parquet.tmp"] {
            fs::write(dir.path().join("out").join(name), "").unwrap();
        }
        sink(&dir).open(None).await.unwrap();
        assert_eq!(names(&dir), [".hidden", "notes.txt", "part-7.parquet.tmp"]);
    }

    #[tokio::test]
    async fn a_write_of_the_last_start_that_is_still_under_way_disturbs_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut last = of_run(&dir, 1);
        last.open(None).await.unwrap();
        write(&mut last, &[1]).await;

        let mut sink = of_run(&dir, 2);
        sink.open(None).await.unwrap();
        assert_eq!(names(&dir), Vec::<String>::new(), "what another start has left is cleared");
        write(&mut sink, &[2]).await;
        // Torn down, and not yet at its end: it begins a part, and completes it.
        last.writer = None;
        write(&mut last, &[1, 1, 1]).await;
        last.prepare(epoch(1)).await.unwrap();

        write(&mut sink, &[3]).await;
        let stored = sink.prepare(epoch(2)).await.unwrap().0;
        sink.finish(epoch(2), &stored).await.unwrap();
        assert_eq!(rows(&dir), [2, 3]);
        of_run(&dir, 3).open(Some((epoch(2), &stored))).await.unwrap();
        assert_eq!(names(&dir), ["part-00000000000000000002.parquet"]);
    }

    #[tokio::test]
    async fn a_full_disk_is_told_as_such() {
        let dir = tempfile::tempdir().unwrap();
        let mut sink = sink(&dir);
        sink.open(None).await.unwrap();
        // Every write to it fails for want of space.
        sink.open = PathBuf::from("/dev/full");
        write(&mut sink, &[1]).await;
        let error = sink.prepare(epoch(1)).await.unwrap_err();
        assert!(durable::is_full(&error), "{error}");
        assert!(error.to_string().starts_with("no space left on /dev/full"), "{error}");
    }
}
