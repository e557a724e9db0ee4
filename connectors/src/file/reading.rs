//! The running `file` source: reads the files of a list one after another, a chunk ahead, on blocking threads, and
//! hands rows over when they are due. The engine calls it. The invariant: what a run yields from a position is what
//! an unbroken run would have yielded there, rejected lines included, and no row is behind the position before it
//! was handed over.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use afferent_engine::rejected::Given;
use afferent_engine::{Batch, Error, Position, Pulled, Rejected, Result, Source};
use afferent_formats::{FileFormat, FileReader, FileRows, FormatError, ReadOptions};
use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use glob::{MatchOptions, Pattern, glob_with};
use serde::{Deserialize, Serialize};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::sleep_until;

use super::pace::{EventTimes, Schedule};

/// What is read and how, as planning has settled it.
pub struct Input {
    /// The folder where relative patterns start.
    pub base: PathBuf,
    /// The pattern as written.
    pub pattern: String,
    /// The format of every file.
    pub format: FileFormat,
    /// The schema of every batch.
    pub schema: SchemaRef,
    /// How files are read.
    pub options: ReadOptions,
    /// Most rows in one batch.
    pub batch_rows: usize,
    /// The factor by which rows come faster than they were recorded, and the index of the column that says when
    /// they were.
    pub pace: Option<(f64, usize)>,
}

/// One file of the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its path as seen from the folder where the pattern starts: the same wherever the process was started.
    pub name: String,
    /// Its path as seen from here.
    pub path: PathBuf,
}

/// The files that match a pattern, sorted by path. A `*` does not match names that begin with a dot.
///
/// # Errors
/// In words: the text is no pattern, or a folder cannot be listed.
pub fn list(base: &Path, pattern: &str) -> std::result::Result<Vec<Found>, String> {
    let base = base.strip_prefix(".").unwrap_or(base);
    let whole = if Path::new(pattern).is_absolute() || base.as_os_str().is_empty() {
        pattern.to_owned()
    } else {
        format!("{}/{pattern}", Pattern::escape(base.to_string_lossy().trim_end_matches('/')))
    };
    let options = MatchOptions { require_literal_leading_dot: true, ..MatchOptions::new() };
    let paths = glob_with(&whole, options).map_err(|error| format!("`{pattern}` is no pattern of file names: {error}"))?;
    let mut files = Vec::new();
    for path in paths {
        let path = path.map_err(|error| format!("cannot list the files of `{pattern}`: {error}"))?;
        if path.is_file() {
            let name = path.strip_prefix(base).unwrap_or(&path).to_string_lossy().into_owned();
            files.push(Found { name, path });
        }
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

/// Where the source stands.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Place {
    /// Name of the file.
    file: String,
    /// Its place in the list.
    index: usize,
    /// Number of the row (in text files the line) from which reading goes on.
    row: u64,
    /// How many good rows from there on have been handed over already. Only a paced source stops within a chunk;
    /// the chunk's rejected lines then follow with its last rows.
    taken: u64,
}

impl Place {
    /// Checks that the file still stands where it stood.
    fn check(&self, files: &[Found], pattern: &str) -> Result<()> {
        let changed = match files.iter().position(|file| file.name == self.file) {
            Some(index) if index == self.index => return Ok(()),
            Some(_) => "other files stand ahead of it now".to_owned(),
            None => format!("`{pattern}` does not match it any more"),
        };
        Err(Error::fatal(format!(
            "cannot go on reading at row {} of {}: {changed}; put the files back as they were, or start over with --fresh",
            self.row, self.file
        )))
    }
}

/// Reads the files one after another. Blocking.
struct Chunks {
    input: Arc<Input>,
    files: Arc<[Found]>,
    /// The file being read, and its next row.
    index: usize,
    row: u64,
    reader: Option<FileReader>,
}

/// Some rows of one file.
struct Chunk {
    /// The file's place in the list.
    index: usize,
    rows: FileRows,
}

impl Chunks {
    /// The next chunk, or `None` behind the last file. May be called again after an error.
    fn next(&mut self) -> Result<Option<Chunk>> {
        while let Some(file) = self.files.get(self.index) {
            match read(&self.input, &file.path, &mut self.reader, self.row) {
                Ok(Some(rows)) => {
                    self.row = rows.next_row;
                    return Ok(Some(Chunk { index: self.index, rows }));
                }
                Ok(None) => {
                    self.reader = None;
                    self.index += 1;
                    self.row = 0;
                }
                Err(error) => {
                    // Opened anew the next time: nobody knows where within a line it stands.
                    self.reader = None;
                    return Err(failure(error).context(format!("reading {} from row {}", file.path.display(), self.row)));
                }
            }
        }
        Ok(None)
    }
}

fn read(
    input: &Input,
    path: &Path,
    reader: &mut Option<FileReader>,
    row: u64,
) -> std::result::Result<Option<FileRows>, FormatError> {
    let reader = match reader {
        Some(reader) => reader,
        None => {
            let schema = Some(Arc::clone(&input.schema));
            reader.insert(FileReader::open_with(path, input.format, schema, input.batch_rows, row, input.options)?)
        }
    };
    reader.next_batch()
}

/// The disk may answer the next time; a file that is gone or is not what it should be stays so.
fn failure(error: FormatError) -> Error {
    use std::io::ErrorKind::{NotFound, PermissionDenied};
    let passing = matches!(&error, FormatError::File { source, .. } if !matches!(source.kind(), NotFound | PermissionDenied));
    if passing { Error::retry(error) } else { Error::fatal(error) }
}

/// A read that is under way; gives the reader back with what it read.
type Reading = JoinHandle<(Chunks, Result<Option<Chunk>>)>;

fn start(mut chunks: Chunks) -> Reading {
    spawn_blocking(move || {
        let chunk = chunks.next();
        (chunks, chunk)
    })
}

/// A chunk that is being handed over.
struct Pending {
    rows: FileRows,
    /// Of a paced source.
    times: Option<EventTimes>,
    /// How many of its rows are gone.
    emitted: usize,
}

/// The running source.
pub struct FileSource {
    input: Arc<Input>,
    files: Arc<[Found]>,
    place: Place,
    /// Good rows that were handed over before the restart and are yet to be passed over.
    skip: u64,
    schedule: Option<Schedule>,
    /// At rest; while a read is under way it is with that.
    chunks: Option<Chunks>,
    /// Kept here and not in the future of `next`, which may be dropped at any time.
    reading: Option<Reading>,
    pending: Option<Pending>,
}

impl FileSource {
    /// A source that has not been opened.
    pub fn new(input: Arc<Input>) -> Self {
        Self {
            input,
            files: Arc::new([]),
            place: Place::default(),
            skip: 0,
            schedule: None,
            chunks: None,
            reading: None,
            pending: None,
        }
    }

    /// Waits for the next chunk and has the one after it read meanwhile.
    async fn read(&mut self) -> Result<Option<Chunk>> {
        if let Some(chunks) = self.chunks.take() {
            self.reading = Some(start(chunks));
        }
        let Some(reading) = &mut self.reading else {
            return Err(Error::fatal("the file source is not open"));
        };
        let joined = reading.await;
        self.reading = None;
        let (chunks, chunk) = joined.map_err(Error::fatal)?;
        if matches!(chunk, Ok(Some(_))) {
            self.reading = Some(start(chunks));
        } else {
            self.chunks = Some(chunks);
        }
        chunk
    }

    /// Makes ready what has been read.
    fn take_up(&mut self, Chunk { index, rows }: Chunk) -> Result<()> {
        if index != self.place.index {
            self.skip = 0;
        }
        let times = match self.input.pace {
            Some((_, column)) => Some(EventTimes::of(rows.batch.column(column))?),
            None => None,
        };
        let skipped = usize::try_from(self.skip).unwrap_or(usize::MAX).min(rows.batch.num_rows());
        self.skip -= skipped as u64;
        self.place = Place { file: self.files[index].name.clone(), index, row: rows.first_row, taken: skipped as u64 };
        self.pending = Some(Pending { rows, times, emitted: skipped });
        Ok(())
    }

    /// Hands over the rows of the chunk up to `until`, with its last one the rejected lines.
    fn emit(&mut self, until: usize) -> Option<Pulled> {
        let pending = self.pending.as_mut()?;
        let count = until - pending.emitted;
        let batch = (count > 0).then(|| Batch::new(pending.rows.batch.slice(pending.emitted, count)));
        pending.emitted = until;
        if until < pending.rows.batch.num_rows() {
            self.place.taken += count as u64;
            return batch.map(Pulled::Batch);
        }
        let FileRows { next_row, rejected, .. } = self.pending.take()?.rows;
        self.place.row = next_row;
        self.place.taken = self.skip;
        // The header is a line, too. (Where quoted cells span lines, these are numbers of records.)
        let first_line = if self.input.format == FileFormat::Csv && self.input.options.csv.header { 2 } else { 1 };
        let rejected: Vec<Rejected> = rejected
            .into_iter()
            .map(|line| Rejected {
                code: line.fault.code(),
                reason: line.reason,
                position: format!("{}:{}", self.place.file, line.row + first_line),
                given: Given::Bytes(line.bytes),
            })
            .collect();
        match (batch, rejected.is_empty()) {
            (Some(batch), true) => Some(Pulled::Batch(batch)),
            (Some(batch), false) => Some(Pulled::Mixed(batch, rejected)),
            (None, false) => Some(Pulled::Rejected(rejected)),
            (None, true) => None,
        }
    }
}

#[async_trait]
impl Source for FileSource {
    async fn open(&mut self, from: Option<&Position>) -> Result<()> {
        let from = from.map(Position::read::<Place>).transpose()?;
        let input = Arc::clone(&self.input);
        let listed = spawn_blocking(move || list(&input.base, &input.pattern)).await.map_err(Error::fatal)?;
        self.files = listed.map_err(Error::fatal)?.into();
        self.place = match (from, self.files.first()) {
            (Some(place), _) => place,
            (None, Some(file)) => Place { file: file.name.clone(), ..Place::default() },
            (None, None) => return Err(Error::fatal(format!("no file matches `{}` any more", self.input.pattern))),
        };
        self.place.check(&self.files, &self.input.pattern)?;
        self.skip = self.place.taken;
        self.schedule = self.input.pace.map(|(factor, _)| Schedule::new(factor));
        self.chunks = Some(Chunks {
            input: Arc::clone(&self.input),
            files: Arc::clone(&self.files),
            index: self.place.index,
            row: self.place.row,
            reader: None,
        });
        self.reading = None;
        self.pending = None;
        Ok(())
    }

    async fn next(&mut self) -> Result<Pulled> {
        loop {
            let Some(pending) = &self.pending else {
                let Some(chunk) = self.read().await? else {
                    return Ok(Pulled::End);
                };
                self.take_up(chunk)?;
                continue;
            };
            let rows = pending.rows.batch.num_rows();
            let until = match (&mut self.schedule, &pending.times) {
                (Some(schedule), Some(times)) if pending.emitted < rows => {
                    sleep_until(schedule.due(times, pending.emitted)).await;
                    // At least the row that was waited for, however the timer rounds.
                    schedule.due_until(times, pending.emitted).max(pending.emitted + 1)
                }
                _ => rows,
            };
            if let Some(pulled) = self.emit(until) {
                return Ok(pulled);
            }
        }
    }

    fn position(&self) -> Position {
        Position::of(&self.place)
    }

    async fn commit(&mut self, _: &Position) -> Result<()> {
        Ok(())
    }

    async fn close(&mut self) {
        self.chunks = None;
        self.reading = None;
        self.pending = None;
    }
}
