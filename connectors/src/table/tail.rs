//! The tail of a table: rows of whole epochs in segment files, fsynced before they are acknowledged, until
//! Delta has them. The sink writes one; the Delta commit and the reader read it. Invariant: up to a mark
//! that [`Tail::sync`] returned, every frame survives a power cut; what is behind the newest stored mark is
//! cut off at recovery, at exactly that length.
//!
//! Segments are `tail-<n>.frames`, `n` growing. Each begins with a frame that names its writer, and ends
//! with an epoch: no epoch spans two segments.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use afferent_engine::{Error, Result, durable};
use arrow::array::RecordBatch;
use serde::{Deserialize, Serialize};

use super::frame::{self, Decoder, Frame, Kind, Next};

/// Bytes that the frame buffer keeps between epochs.
const KEEP_BUFFER: usize = 1 << 20;

/// A point in a tail: this many bytes of this segment, and all earlier segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TailMark {
    /// Number of the segment.
    pub segment: u64,
    /// Bytes of it.
    pub length: u64,
}

/// The writing end. All calls block on the disk.
#[derive(Debug)]
pub struct Tail {
    dir: PathBuf,
    owner: String,
    current: Option<Segment>,
    next: u64,
    buffer: Vec<u8>,
}

/// The segment that is being written.
#[derive(Debug)]
struct Segment {
    number: u64,
    path: PathBuf,
    file: File,
    /// Bytes of whole frames.
    length: u64,
    begun: Instant,
    /// Rows of an epoch that is not complete are in it.
    open_epoch: bool,
}

impl Tail {
    /// Takes over what a crash left. With a mark: everything up to it is there and sound, everything behind
    /// it is removed. Without: the tail is emptied. New rows go to a new segment.
    ///
    /// # Errors
    /// Fatal when rows in front of the mark are missing or damaged; names file and offset.
    pub fn recover(dir: &Path, owner: &str, mark: Option<TailMark>) -> Result<Self> {
        durable::create_dir(dir).map_err(|e| failed("creating", dir, &e))?;
        let numbers = segments(dir)?;
        let last = numbers.last().copied().unwrap_or(0).max(mark.map_or(0, |mark| mark.segment));
        for number in numbers.iter().filter(|number| mark.is_none_or(|mark| **number > mark.segment)) {
            remove(&segment_path(dir, *number))?;
        }
        if let Some(mark) = mark {
            truncate(&segment_path(dir, mark.segment), mark.length)?;
            for epoch in Epochs::stored(dir, mark)? {
                epoch?;
            }
        }
        durable::sync_dir(dir);
        Ok(Self { dir: dir.to_owned(), owner: owner.to_owned(), current: None, next: last + 1, buffer: Vec::new() })
    }

    /// Writes rows that complete `epoch`. Not durable before [`Tail::sync`].
    ///
    /// # Errors
    /// Retry when the disk refuses (full, say): the tail is then as it was before the call.
    pub fn append(&mut self, epoch: u64, batches: &[RecordBatch]) -> Result<()> {
        self.write(Kind::Rows, epoch, batches)
    }

    /// Writes rows of the epoch that the next [`Tail::append`] completes, so that memory stays bounded.
    ///
    /// # Errors
    /// As [`Tail::append`].
    pub fn append_ahead(&mut self, batches: &[RecordBatch]) -> Result<()> {
        self.write(Kind::Ahead, 0, batches)
    }

    /// Makes everything that was appended durable, or ends the process.
    pub fn sync(&self) -> Option<TailMark> {
        let segment = self.current.as_ref()?;
        durable::sync(&segment.file, &segment.path);
        Some(TailMark { segment: segment.number, length: segment.length })
    }

    /// Ends the current segment; the next rows begin a new one. Only between epochs.
    pub fn rotate(&mut self) {
        if !self.in_epoch() {
            self.current = None;
        }
    }

    /// Whether rows were written ahead of their epoch's end.
    pub fn in_epoch(&self) -> bool {
        self.current.as_ref().is_some_and(|segment| segment.open_epoch)
    }

    /// Bytes of the current segment, and for how long it has been written.
    pub fn current(&self) -> (u64, Duration) {
        self.current.as_ref().map_or((0, Duration::ZERO), |segment| (segment.length, segment.begun.elapsed()))
    }

    fn write(&mut self, kind: Kind, epoch: u64, batches: &[RecordBatch]) -> Result<()> {
        self.buffer.clear();
        frame::push_rows(&mut self.buffer, kind, epoch, batches)
            .map_err(|e| Error::fatal(format!("encoding rows for {}: {e}", self.dir.display())))?;
        let segment = match &mut self.current {
            Some(segment) => segment,
            None => {
                let number = self.next;
                let created = Segment::create(&self.dir, number, &self.owner);
                // The number of a segment that failed is used again, unless its file could not be taken away.
                if created.is_ok() || segment_path(&self.dir, number).exists() {
                    self.next += 1;
                }
                self.current.insert(created?)
            }
        };
        segment.write(&self.buffer)?;
        segment.open_epoch = kind == Kind::Ahead;
        self.buffer.shrink_to(KEEP_BUFFER);
        Ok(())
    }
}

impl Segment {
    fn create(dir: &Path, number: u64, owner: &str) -> Result<Self> {
        let path = segment_path(dir, number);
        let file = OpenOptions::new().append(true).create_new(true).open(&path).map_err(|e| failed("creating", &path, &e))?;
        durable::sync_dir(dir);
        let mut header = Vec::new();
        frame::push_owner(&mut header, owner).map_err(Error::fatal)?;
        Self { number, path, file, length: 0, begun: Instant::now(), open_epoch: false }.headed(&header)
    }

    /// With its first frame; without it (the disk is full) there is to be no segment, either.
    fn headed(mut self, header: &[u8]) -> Result<Self> {
        match self.write(header) {
            Ok(()) => Ok(self),
            Err(error) => {
                if let Err(cause) = remove(&self.path) {
                    tracing::warn!(%cause, "an unfinished segment stays; it holds no rows");
                }
                Err(error)
            }
        }
    }

    /// Whole or not at all.
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        if let Err(cause) = self.file.write_all(bytes) {
            let error = failed(&format!("writing {} bytes to", bytes.len()), &self.path, &cause);
            // What was written in part would hide everything behind it.
            return match self.file.set_len(self.length) {
                Ok(()) => Err(error),
                Err(e) => Err(Error::fatal(format!("{error}; cutting it back to {} bytes: {e}", self.length))),
            };
        }
        self.length += bytes.len() as u64;
        Ok(())
    }
}

/// Removes segments up to this one; only when Delta has their rows for good.
///
/// # Errors
/// Retry, with the path.
pub fn remove_through(dir: &Path, segment: u64) -> Result<()> {
    for number in segments(dir)?.into_iter().filter(|number| *number <= segment) {
        remove(&segment_path(dir, number))?;
    }
    Ok(())
}

/// One epoch of a tail.
#[derive(Debug)]
pub struct TailEpoch {
    /// Who wrote it.
    pub owner: Arc<str>,
    /// Its number.
    pub epoch: u64,
    frames: Vec<Frame>,
    path: PathBuf,
}

impl TailEpoch {
    /// Its rows.
    ///
    /// # Errors
    /// Fatal when a sound frame holds no readable rows.
    pub fn batches(&self) -> Result<Vec<RecordBatch>> {
        let mut batches = Vec::new();
        for frame in &self.frames {
            let read = frame
                .batches()
                .map_err(|e| Error::fatal(format!("reading epoch {} of {}: {e}", self.epoch, self.path.display())))?;
            batches.extend(read.into_iter().filter(|batch| batch.num_rows() > 0));
        }
        Ok(batches)
    }
}

/// Reads a tail epoch by epoch, in order, one in memory at a time.
#[derive(Debug)]
pub struct Epochs {
    dir: PathBuf,
    numbers: std::vec::IntoIter<u64>,
    through: Option<TailMark>,
    reading: Option<Reading>,
}

/// The segment that is being read.
#[derive(Debug)]
struct Reading {
    path: PathBuf,
    decoder: Decoder<BufReader<File>>,
    owner: Arc<str>,
    frames: Vec<Frame>,
}

impl Epochs {
    /// Everything up to `mark`. Anything missing or damaged in front of it is an error.
    ///
    /// # Errors
    /// Retry when the folder cannot be read.
    pub fn stored(dir: &Path, mark: TailMark) -> Result<Self> {
        let numbers: Vec<u64> = segments(dir)?.into_iter().filter(|number| *number <= mark.segment).collect();
        if numbers.last() != Some(&mark.segment) {
            return Err(missing(&segment_path(dir, mark.segment), &mark));
        }
        Ok(Self { dir: dir.to_owned(), numbers: numbers.into_iter(), through: Some(mark), reading: None })
    }

    /// What another process can see right now: whole epochs, up to a torn end of each segment; segments that
    /// vanish meanwhile are left out, since Delta has their rows.
    ///
    /// # Errors
    /// Retry when the folder cannot be read.
    pub fn visible(dir: &Path) -> Result<Self> {
        Ok(Self { dir: dir.to_owned(), numbers: segments(dir)?.into_iter(), through: None, reading: None })
    }

    fn advance(&mut self) -> Result<Option<TailEpoch>> {
        loop {
            let Some(reading) = &mut self.reading else {
                let Some(number) = self.numbers.next() else { return Ok(None) };
                self.reading = self.open(number)?;
                continue;
            };
            match reading.decoder.step().map_err(|e| failed("reading", &reading.path, &e))? {
                Next::Frame(frame) => match frame.kind {
                    Kind::Owner => reading.owner = String::from_utf8_lossy(&frame.payload).into(),
                    Kind::Ahead => reading.frames.push(frame),
                    Kind::Rows => {
                        let epoch = frame.epoch;
                        reading.frames.push(frame);
                        let frames = std::mem::take(&mut reading.frames);
                        let (owner, path) = (Arc::clone(&reading.owner), reading.path.clone());
                        return Ok(Some(TailEpoch { owner, epoch, frames, path }));
                    }
                },
                Next::Torn { offset, why } if self.through.is_some() => {
                    let path = reading.path.display();
                    return Err(Error::fatal(format!("{path} is damaged at offset {offset}: {why}; stored rows are lost")));
                }
                Next::End if self.through.is_some() && !reading.frames.is_empty() => {
                    let path = reading.path.display();
                    return Err(Error::fatal(format!("{path} ends within an epoch; stored rows are lost")));
                }
                Next::Torn { .. } | Next::End => self.reading = None,
            }
        }
    }

    fn open(&self, number: u64) -> Result<Option<Reading>> {
        let path = segment_path(&self.dir, number);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound && self.through.is_none() => return Ok(None),
            Err(e) => return Err(failed("opening", &path, &e)),
        };
        let there = file.metadata().map_err(|e| failed("reading", &path, &e))?.len();
        let length = match self.through {
            Some(mark) if mark.segment == number && there < mark.length => return Err(missing(&path, &mark)),
            Some(mark) if mark.segment == number => mark.length,
            _ => there,
        };
        let decoder = Decoder::new(BufReader::with_capacity(1 << 18, file), length);
        Ok(Some(Reading { path, decoder, owner: "".into(), frames: Vec::new() }))
    }
}

impl Iterator for Epochs {
    type Item = Result<TailEpoch>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = self.advance().transpose();
        if matches!(next, Some(Err(_))) {
            // An error is told once; a caller that goes on regardless comes to an end.
            self.reading = None;
            self.numbers = Vec::new().into_iter();
        }
        next
    }
}

/// The numbers of the segments in a folder, in order; none when there is no folder.
fn segments(dir: &Path) -> Result<Vec<u64>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(failed("listing", dir, &e)),
    };
    let mut numbers = Vec::new();
    for entry in entries {
        let name = entry.map_err(|e| failed("listing", dir, &e))?.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("tail-")?.strip_suffix(".frames")?.parse::<u64>().ok());
        if let Some(number) = number {
            numbers.push(number);
        }
    }
    numbers.sort_unstable();
    Ok(numbers)
}

fn segment_path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("tail-{number}.frames"))
}

fn truncate(path: &Path, length: u64) -> Result<()> {
    let file = OpenOptions::new().write(true).open(path).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => Error::fatal(format!("{} is missing; stored rows are lost", path.display())),
        _ => failed("opening", path, &e),
    })?;
    let there = file.metadata().map_err(|e| failed("reading", path, &e))?.len();
    if there < length {
        let path = path.display();
        return Err(Error::fatal(format!("{path} has {there} bytes of {length}; stored rows are lost")));
    }
    file.set_len(length).map_err(|e| failed("truncating", path, &e))?;
    durable::sync(&file, path);
    Ok(())
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("removing", path, &e)),
        _ => Ok(()),
    }
}

fn missing(path: &Path, mark: &TailMark) -> Error {
    Error::fatal(format!("{} does not have the {} bytes that were stored; rows are lost", path.display(), mark.length))
}

/// Trouble with the disk may pass (space is made, a mount comes back).
fn failed(what: &str, path: &Path, cause: &io::Error) -> Error {
    Error::retry(format!("{what} {}: {cause}", path.display()))
}

#[cfg(test)]
mod tests {
    use afferent_engine::Class;
    use arrow::array::{ArrayRef, AsArray, Int64Array};
    use arrow::datatypes::Int64Type;

    use super::*;

    fn rows(values: &[i64]) -> RecordBatch {
        RecordBatch::try_from_iter([("n", Arc::new(Int64Array::from(values.to_vec())) as ArrayRef)]).unwrap()
    }

    fn values(epochs: Epochs) -> Vec<(u64, Vec<i64>)> {
        epochs
            .map(|epoch| {
                let epoch = epoch.unwrap();
                assert_eq!(&*epoch.owner, "me");
                let batches = epoch.batches().unwrap();
                let values = batches.iter().flat_map(|b| b.column(0).as_primitive::<Int64Type>().values().to_vec());
                (epoch.epoch, values.collect())
            })
            .collect()
    }

    /// Epochs 1 to 3 in one segment, 4 and 5 in a second; the mark behind each.
    fn written(dir: &Path) -> Vec<TailMark> {
        let mut tail = Tail::recover(dir, "me", None).unwrap();
        assert_eq!(tail.sync(), None);
        (1..=5)
            .map(|epoch| {
                if epoch == 4 {
                    tail.rotate();
                }
                tail.append(epoch, &[rows(&[epoch as i64 * 10]), rows(&[epoch as i64 * 10 + 1])]).unwrap();
                tail.sync().unwrap()
            })
            .collect()
    }

    fn expected(epochs: impl IntoIterator<Item = u64>) -> Vec<(u64, Vec<i64>)> {
        epochs.into_iter().map(|e| (e, vec![e as i64 * 10, e as i64 * 10 + 1])).collect()
    }

    #[test]
    fn recovery_cuts_at_exactly_the_mark() {
        for last in 1..=5 {
            let dir = tempfile::tempdir().unwrap();
            let marks = written(dir.path());
            assert_eq!(values(Epochs::visible(dir.path()).unwrap()), expected(1..=5));
            let mark = marks[last - 1];
            let mut tail = Tail::recover(dir.path(), "me", Some(mark)).unwrap();
            assert_eq!(std::fs::metadata(segment_path(dir.path(), mark.segment)).unwrap().len(), mark.length);
            assert_eq!(values(Epochs::visible(dir.path()).unwrap()), expected(1..=last as u64));
            tail.append(9, &[rows(&[90]), rows(&[91])]).unwrap();
            let mark = tail.sync().unwrap();
            assert_eq!(values(Epochs::stored(dir.path(), mark).unwrap()), expected((1..=last as u64).chain([9])));
        }
    }

    #[test]
    fn a_crash_during_recovery_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let marks = written(dir.path());
        for _ in 0..3 {
            Tail::recover(dir.path(), "me", Some(marks[1])).unwrap();
            assert_eq!(values(Epochs::visible(dir.path()).unwrap()), expected(1..=2));
        }
    }

    #[test]
    fn without_a_mark_nothing_is_left() {
        let dir = tempfile::tempdir().unwrap();
        written(dir.path());
        Tail::recover(dir.path(), "me", None).unwrap();
        assert_eq!(segments(dir.path()).unwrap(), Vec::<u64>::new());
    }

    #[test]
    fn missing_and_damaged_rows_in_front_of_the_mark_are_fatal() {
        let dir = tempfile::tempdir().unwrap();
        let marks = written(dir.path());
        let first = segment_path(dir.path(), marks[0].segment);
        let mut bytes = std::fs::read(&first).unwrap();
        bytes[marks[0].length as usize + 50] ^= 1;
        std::fs::write(&first, &bytes).unwrap();
        let error = Tail::recover(dir.path(), "me", Some(marks[4])).unwrap_err();
        assert_eq!(error.class(), Class::Fatal);
        assert!(error.to_string().contains(&format!("at offset {}", marks[0].length)), "{error}");

        let longer = TailMark { length: marks[4].length + 1, ..marks[4] };
        assert_eq!(Tail::recover(dir.path(), "me", Some(longer)).unwrap_err().class(), Class::Fatal);
        std::fs::remove_file(segment_path(dir.path(), marks[4].segment)).unwrap();
        assert_eq!(Tail::recover(dir.path(), "me", Some(marks[4])).unwrap_err().class(), Class::Fatal);
    }

    #[test]
    fn rows_written_ahead_belong_to_the_epoch_that_follows() {
        let dir = tempfile::tempdir().unwrap();
        let mut tail = Tail::recover(dir.path(), "me", None).unwrap();
        tail.append_ahead(&[rows(&[1])]).unwrap();
        assert!(tail.in_epoch());
        assert!(values(Epochs::visible(dir.path()).unwrap()).is_empty());
        tail.rotate();
        tail.append_ahead(&[rows(&[2])]).unwrap();
        tail.append(7, &[RecordBatch::new_empty(rows(&[]).schema())]).unwrap();
        assert!(!tail.in_epoch());
        assert_eq!(values(Epochs::stored(dir.path(), tail.sync().unwrap()).unwrap()), [(7, vec![1, 2])]);
    }

    #[test]
    fn a_reader_stops_at_a_write_that_is_still_going_on() {
        let dir = tempfile::tempdir().unwrap();
        let marks = written(dir.path());
        let path = segment_path(dir.path(), marks[4].segment);
        let bytes = std::fs::read(&path).unwrap();
        for cut in marks[3].length..marks[4].length {
            std::fs::write(&path, &bytes[..cut as usize]).unwrap();
            assert_eq!(values(Epochs::visible(dir.path()).unwrap()), expected(1..=4), "cut at {cut}");
        }
    }

    #[test]
    fn segments_are_removed_up_to_one() {
        let dir = tempfile::tempdir().unwrap();
        let marks = written(dir.path());
        remove_through(dir.path(), marks[0].segment).unwrap();
        assert_eq!(values(Epochs::visible(dir.path()).unwrap()), expected(4..=5));
        assert_eq!(segments(&dir.path().join("nothing")).unwrap(), Vec::<u64>::new());
    }

    #[test]
    fn a_segment_that_cannot_be_begun_leaves_no_file_and_burns_no_number() {
        let dir = tempfile::tempdir().unwrap();
        let path = segment_path(dir.path(), 1);
        std::fs::write(&path, "").unwrap();
        // Open for reading only: a write fails, as it does on a full disk.
        let file = File::open(&path).unwrap();
        let segment = Segment { number: 1, path: path.clone(), file, length: 0, begun: Instant::now(), open_epoch: false };
        segment.headed(b"header").unwrap_err();
        assert!(!path.exists());

        let mut tail = Tail::recover(dir.path(), "me", None).unwrap();
        std::fs::remove_dir(dir.path()).unwrap();
        for _ in 0..3 {
            assert_eq!(tail.append(1, &[rows(&[10, 11])]).unwrap_err().class(), Class::Retry);
        }
        std::fs::create_dir(dir.path()).unwrap();
        tail.append(1, &[rows(&[10, 11])]).unwrap();
        assert_eq!(segments(dir.path()).unwrap(), [1]);
        assert_eq!(values(Epochs::stored(dir.path(), tail.sync().unwrap()).unwrap()), expected([1]));
    }
}
