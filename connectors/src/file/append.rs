//! Lines appended to one file: the `file` sink for JSON lines and CSV. The engine calls it. The invariant: the length
//! of the file is part of every epoch, so that a restart cuts off what no epoch holds. Before the first epoch is
//! stored, a file beside it (`.NAME.start`) remembers the length that the file had at the beginning.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use afferent_engine::durable::StorageFull;
use afferent_engine::{Batch, Epoch, Error, Prepared, Rejected, Result, Sink, durable};
use afferent_formats::{CsvOptions, Encoder, FileFormat};
use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;

/// A sync of a file that has grown a little is cheap.
pub const COMMIT_INTERVAL: Duration = Duration::from_millis(50);

/// Bytes that are collected before they are given to the system.
const BUFFER: usize = 256 << 10;

/// What an epoch holds of the file.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Written {
    /// The file as the pipeline names it.
    path: String,
    /// Its length in bytes.
    length: u64,
}

/// The running sink.
pub struct Append {
    /// The file as the pipeline names it, and as seen from here.
    written: String,
    path: PathBuf,
    encoder: Encoder,
    /// The first line of a file that is empty.
    header: Vec<u8>,
    file: Option<Arc<File>>,
    /// Bytes in the file; what stands behind them is of a write that failed half-way.
    length: u64,
    /// How many of them are on the disk.
    synced: u64,
    buffer: Vec<u8>,
    /// Whether the file that remembers the beginning is there.
    remembered: bool,
}

/// A file opened and cut to its length.
struct Opened {
    file: File,
    length: u64,
    /// The last line of what was there before has no end.
    unfinished: bool,
    remembered: bool,
}

impl Append {
    /// A sink for batches of `schema`; `written` is the path as the pipeline names it.
    ///
    /// # Errors
    /// Fatal when the format cannot hold the schema, which planning has ruled out.
    pub fn new(written: String, path: PathBuf, format: FileFormat, schema: SchemaRef) -> Result<Self> {
        let (encoder, header) = match format {
            FileFormat::Csv => {
                let names = header(&schema).map_err(Error::fatal)?;
                (Encoder::csv(schema, CsvOptions { header: false, ..CsvOptions::default() }), names)
            }
            _ => (Encoder::json(schema, false), Vec::new()),
        };
        Ok(Self {
            written,
            path,
            encoder: encoder.map_err(Error::fatal)?,
            header,
            file: None,
            length: 0,
            synced: 0,
            buffer: Vec::new(),
            remembered: false,
        })
    }

    /// Gives what is in the buffer to the system. After an error it is all still there, and written again to the same
    /// place.
    fn flush(&mut self) -> Result<Arc<File>> {
        let file = self.file.clone().ok_or_else(|| Error::fatal("the file sink is not open"))?;
        if !self.buffer.is_empty() {
            let mut output: &File = &file;
            output
                .seek(SeekFrom::Start(self.length))
                .and_then(|_| output.write_all(&self.buffer))
                .map_err(|error| Error::retry(error).context(format!("writing {}", self.path.display())))?;
            self.length += self.buffer.len() as u64;
            self.buffer.clear();
        }
        Ok(file)
    }
}

/// The line that names the columns.
fn header(schema: &SchemaRef) -> std::result::Result<Vec<u8>, afferent_formats::FormatError> {
    afferent_formats::FileWriter::create(Vec::<u8>::new(), FileFormat::Csv, Arc::clone(schema))?.finish()
}

/// Where the length at the beginning is remembered.
fn start_of(path: &Path) -> PathBuf {
    let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    path.with_file_name(format!(".{name}.start"))
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Opens the file and cuts off what neither an epoch holds nor was there at the beginning.
fn open(path: &Path, stored: Option<u64>) -> Result<Opened> {
    let failed = |error: io::Error| match durable::is_full(&error) {
        true => Error::fatal(StorageFull::new(path, error)),
        false => Error::fatal(error).context(format!("opening {}", path.display())),
    };
    durable::create_dir(folder_of(path)).map_err(failed)?;
    let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(failed)?;
    durable::sync_dir(folder_of(path));
    let found = file.metadata().map_err(failed)?.len();
    let start = start_of(path);
    let remembered = match fs::read_to_string(&start) {
        Ok(text) => text.trim().parse::<u64>().ok(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(failed(error)),
    };
    if stored.is_some() && remembered.is_some() {
        // A crash came between the first stored epoch and the removal of the mark from before it.
        fs::remove_file(&start).map_err(failed)?;
        durable::sync_dir(folder_of(path));
    }
    let length = match (stored, remembered) {
        (Some(length), _) => length,
        // The last run came to an end before its first epoch.
        (None, Some(length)) => length.min(found),
        (None, None) => {
            remember(&start, found).map_err(failed)?;
            found
        }
    };
    if found < length {
        return Err(Error::fatal(format!(
            "{} has {found} bytes where the last durable point of the pipeline has {length}; somebody else has changed it. \
             Put it back, or give the sink another path",
            path.display()
        )));
    }
    if found > length {
        file.set_len(length).map_err(failed)?;
        durable::sync(&file, path);
    }
    let mut unfinished = false;
    if stored.is_none() && length > 0 {
        let mut last = [0];
        file.seek(SeekFrom::Start(length - 1)).and_then(|_| file.read_exact(&mut last)).map_err(failed)?;
        unfinished = last != *b"\n";
    }
    Ok(Opened { file, length, unfinished, remembered: stored.is_none() })
}

fn remember(start: &Path, length: u64) -> io::Result<()> {
    let temporary = start.with_extension("start.tmp");
    let mut file = File::create(&temporary)?;
    writeln!(file, "{length}")?;
    durable::sync(&file, &temporary);
    durable::rename(&temporary, start)
}

#[async_trait]
impl Sink for Append {
    async fn open(&mut self, last: Option<(Epoch, &Prepared)>) -> Result<()> {
        let stored = match last {
            None => None,
            Some((epoch, prepared)) => {
                let stored: Written = serde_json::from_value(prepared.clone()).map_err(|error| {
                    Error::fatal(error).context(format!("reading what epoch {epoch} holds of {}", self.written))
                })?;
                // What was written under another path stays as it is there; this is another file.
                (stored.path == self.written).then_some(stored.length)
            }
        };
        let path = self.path.clone();
        let opened = spawn_blocking(move || open(&path, stored)).await.map_err(Error::fatal)??;
        self.file = Some(Arc::new(opened.file));
        self.length = opened.length;
        self.synced = opened.length;
        self.remembered = opened.remembered;
        self.buffer.clear();
        if opened.unfinished {
            self.buffer.push(b'\n');
        }
        Ok(())
    }

    async fn write(&mut self, _: usize, batch: Batch) -> Result<Vec<Rejected>> {
        // Before the batch and not after it: a batch whose write is repeated must not be in the buffer already.
        if self.buffer.len() >= BUFFER {
            self.flush()?;
        }
        let encoded = self.encoder.encode(batch.records()).map_err(Error::fatal)?;
        if self.length == 0 && self.buffer.is_empty() && batch.rows() > 0 {
            self.buffer.extend_from_slice(&self.header);
        }
        for line in encoded.payloads.iter().flatten() {
            self.buffer.extend_from_slice(line);
            self.buffer.push(b'\n');
        }
        Ok(Vec::new())
    }

    async fn prepare(&mut self, _: Epoch) -> Result<(Prepared, Vec<Rejected>)> {
        let file = self.flush()?;
        if self.synced != self.length {
            let path = self.path.clone();
            spawn_blocking(move || durable::sync(&file, &path)).await.map_err(Error::fatal)?;
            self.synced = self.length;
        }
        let prepared = serde_json::to_value(Written { path: self.written.clone(), length: self.length }).map_err(Error::fatal)?;
        Ok((prepared, Vec::new()))
    }

    async fn finish(&mut self, _: Epoch, _: &Prepared) -> Result<()> {
        if self.remembered {
            let start = start_of(&self.path);
            let removed = spawn_blocking(move || match fs::remove_file(&start) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => {
                    durable::sync_dir(folder_of(&start));
                    Ok(())
                }
            });
            removed.await.map_err(Error::fatal)?.map_err(Error::retry)?;
            self.remembered = false;
        }
        Ok(())
    }

    fn commit_interval(&self) -> Duration {
        COMMIT_INTERVAL
    }

    async fn close(&mut self) -> Result<()> {
        self.file = None;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::{ArrayRef, Int64Array, RecordBatch};
    use arrow::datatypes::{DataType, Field, Schema};
    use tempfile::TempDir;

    use super::*;

    fn sink(dir: &TempDir, format: FileFormat) -> Append {
        let schema = Arc::new(Schema::new(vec![Field::new("n", DataType::Int64, false)]));
        Append::new("out/a".into(), dir.path().join("out/a"), format, schema).unwrap()
    }

    fn content(dir: &TempDir) -> String {
        fs::read_to_string(dir.path().join("out/a")).unwrap()
    }

    async fn write(sink: &mut Append, numbers: &[i64]) {
        let column = Arc::new(Int64Array::from(numbers.to_vec())) as ArrayRef;
        let batch = RecordBatch::try_from_iter([("n", column)]).unwrap();
        assert!(sink.write(0, Batch::new(batch)).await.unwrap().is_empty());
    }

    fn epoch(number: u64) -> Epoch {
        Epoch::from_u64(number)
    }

    #[tokio::test]
    async fn a_restart_takes_back_what_no_epoch_holds() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = sink(&dir, FileFormat::JsonLines);
        first.open(None).await.unwrap();
        write(&mut first, &[1, 2]).await;
        let stored = first.prepare(epoch(1)).await.unwrap().0;
        first.finish(epoch(1), &stored).await.unwrap();
        write(&mut first, &[3]).await;
        first.prepare(epoch(2)).await.unwrap();
        assert_eq!(content(&dir), "{\"n\":1}\n{\"n\":2}\n{\"n\":3}\n");

        let mut second = sink(&dir, FileFormat::JsonLines);
        second.open(Some((epoch(1), &stored))).await.unwrap();
        assert_eq!(content(&dir), "{\"n\":1}\n{\"n\":2}\n");
        write(&mut second, &[4]).await;
        second.prepare(epoch(3)).await.unwrap();
        assert_eq!(content(&dir), "{\"n\":1}\n{\"n\":2}\n{\"n\":4}\n");
    }

    #[tokio::test]
    async fn what_was_there_stays_also_when_the_first_epoch_is_never_stored() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("out")).unwrap();
        fs::write(dir.path().join("out/a"), "before").unwrap();
        for _ in 0..3 {
            let mut crashed = sink(&dir, FileFormat::JsonLines);
            crashed.open(None).await.unwrap();
            write(&mut crashed, &[1]).await;
            crashed.prepare(epoch(1)).await.unwrap();
            assert_eq!(content(&dir), "before\n{\"n\":1}\n");
        }
        let mut sound = sink(&dir, FileFormat::JsonLines);
        sound.open(None).await.unwrap();
        write(&mut sound, &[2]).await;
        let stored = sound.prepare(epoch(1)).await.unwrap().0;
        sound.finish(epoch(1), &stored).await.unwrap();
        assert_eq!(fs::read_dir(dir.path().join("out")).unwrap().count(), 1, "the start is forgotten with the first epoch");

        let mut fresh = sink(&dir, FileFormat::JsonLines);
        fresh.open(None).await.unwrap();
        write(&mut fresh, &[3]).await;
        fresh.prepare(epoch(1)).await.unwrap();
        assert_eq!(content(&dir), "before\n{\"n\":2}\n{\"n\":3}\n", "a fresh start appends");
    }

    #[tokio::test]
    async fn csv_has_one_header_however_often_it_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let mut stored = None;
        for (number, numbers) in [(1, &[][..]), (2, &[1, 2][..]), (3, &[3][..])] {
            let mut sink = sink(&dir, FileFormat::Csv);
            sink.open(stored.as_ref().map(|stored| (epoch(number - 1), stored))).await.unwrap();
            write(&mut sink, numbers).await;
            stored = Some(sink.prepare(epoch(number)).await.unwrap().0);
        }
        assert_eq!(content(&dir), "n\n1\n2\n3\n");
    }

    #[tokio::test]
    async fn more_than_the_buffer_holds_is_written_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let mut sink = sink(&dir, FileFormat::Csv);
        sink.open(None).await.unwrap();
        let numbers: Vec<i64> = (0..100_000).collect();
        for part in numbers.chunks(1_000) {
            write(&mut sink, part).await;
        }
        assert!(!content(&dir).is_empty(), "memory is bounded within an epoch, too");
        let prepared = sink.prepare(epoch(1)).await.unwrap().0;
        let content = content(&dir);
        assert_eq!(prepared, serde_json::json!({ "path": "out/a", "length": content.len() }));
        let read: Vec<i64> = content.lines().skip(1).map(|line| line.parse().unwrap()).collect();
        assert_eq!(read, numbers);
    }

    #[tokio::test]
    async fn a_file_that_somebody_cut_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = sink(&dir, FileFormat::JsonLines);
        first.open(None).await.unwrap();
        write(&mut first, &[1]).await;
        let stored = first.prepare(epoch(1)).await.unwrap().0;
        fs::write(dir.path().join("out/a"), "").unwrap();
        let error = sink(&dir, FileFormat::JsonLines).open(Some((epoch(1), &stored))).await.unwrap_err();
        assert!(error.to_string().contains("has 0 bytes where the last durable point of the pipeline has 8"), "{error}");
    }
}
