//! The frames that a tail consists of: a header with checksums and, as payload, rows as a self-describing
//! Arrow IPC stream. The tail writes and walks them. Invariant: a frame is read back whole and unchanged or
//! not at all; what is not a whole frame is reported with its offset and never guessed at.
//!
//! Header, little-endian, 32 bytes: magic u32, version u16, kind u16, epoch u64, rows u32, payload length
//! u32, CRC-32C of the 24 bytes so far, CRC-32C of the payload.

use std::io::{self, Read};

use arrow::array::RecordBatch;
use arrow::error::ArrowError;
use arrow::ipc::reader::StreamReader;
use arrow::ipc::writer::StreamWriter;

/// Bytes of a header.
pub const HEADER: usize = 32;
/// Largest payload; a header that claims more is not believed.
pub const MAX_PAYLOAD: usize = 1 << 30;

const MAGIC: u32 = u32::from_le_bytes(*b"aftf");
const VERSION: u16 = 1;
/// Where the header's own checksum stands; it covers what is before it.
const HEADER_CRC: usize = 24;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Rows that complete their epoch.
    Rows,
    /// Rows of the epoch of the next [`Kind::Rows`] frame, written ahead of its barrier; carries epoch 0.
    Ahead,
    /// The text that says who writes this segment; the first frame of one.
    Owner,
}

impl Kind {
    fn code(self) -> u16 {
        match self {
            Kind::Rows => 0,
            Kind::Ahead => 1,
            Kind::Owner => 2,
        }
    }

    fn of(code: u16) -> Option<Self> {
        [Kind::Rows, Kind::Ahead, Kind::Owner].into_iter().find(|kind| kind.code() == code)
    }
}

/// A whole frame with sound checksums.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it is.
    pub kind: Kind,
    /// The epoch that it completes.
    pub epoch: u64,
    /// Number of rows.
    pub rows: u32,
    /// Arrow IPC stream, or the owner's name.
    pub payload: Vec<u8>,
}

impl Frame {
    /// Its rows.
    ///
    /// # Errors
    /// A payload that is no Arrow IPC stream or holds another number of rows than the header says.
    pub fn batches(&self) -> Result<Vec<RecordBatch>, ArrowError> {
        let batches: Vec<RecordBatch> = StreamReader::try_new(self.payload.as_slice(), None)?.collect::<Result<_, _>>()?;
        let rows: usize = batches.iter().map(RecordBatch::num_rows).sum();
        if rows as u64 != u64::from(self.rows) {
            return Err(ArrowError::IpcError(format!("the frame says {} rows and holds {rows}", self.rows)));
        }
        Ok(batches)
    }
}

/// Appends a frame of rows, which must not be empty of batches: the first gives the schema.
///
/// # Errors
/// More than [`MAX_PAYLOAD`] bytes, or types that Arrow IPC cannot carry. `buffer` is then as it was.
pub fn push_rows(buffer: &mut Vec<u8>, kind: Kind, epoch: u64, batches: &[RecordBatch]) -> Result<(), ArrowError> {
    let start = buffer.len();
    let pushed = write_rows(buffer, kind, epoch, batches);
    if pushed.is_err() {
        buffer.truncate(start);
    }
    pushed
}

fn write_rows(buffer: &mut Vec<u8>, kind: Kind, epoch: u64, batches: &[RecordBatch]) -> Result<(), ArrowError> {
    let Some(first) = batches.first() else {
        return Err(ArrowError::InvalidArgumentError("a frame of no batches".into()));
    };
    let start = buffer.len();
    buffer.resize(start + HEADER, 0);
    let mut writer = StreamWriter::try_new(&mut *buffer, &first.schema())?;
    for batch in batches {
        writer.write(batch)?;
    }
    writer.finish()?;
    drop(writer);
    let rows: usize = batches.iter().map(RecordBatch::num_rows).sum();
    seal(&mut buffer[start..], kind, epoch, rows)
}

/// Appends the frame that names the writer of a segment.
///
/// # Errors
/// A name of more than [`MAX_PAYLOAD`] bytes.
pub fn push_owner(buffer: &mut Vec<u8>, owner: &str) -> Result<(), ArrowError> {
    let start = buffer.len();
    buffer.resize(start + HEADER, 0);
    buffer.extend_from_slice(owner.as_bytes());
    seal(&mut buffer[start..], Kind::Owner, 0, 0)
}

/// Fills in the header of a frame whose payload is in place.
fn seal(frame: &mut [u8], kind: Kind, epoch: u64, rows: usize) -> Result<(), ArrowError> {
    let (header, payload) = frame.split_at_mut(HEADER);
    let (Ok(rows), Ok(length)) = (u32::try_from(rows), u32::try_from(payload.len())) else {
        return Err(too_large(payload.len()));
    };
    if payload.len() > MAX_PAYLOAD {
        return Err(too_large(payload.len()));
    }
    header[0..4].copy_from_slice(&MAGIC.to_le_bytes());
    header[4..6].copy_from_slice(&VERSION.to_le_bytes());
    header[6..8].copy_from_slice(&kind.code().to_le_bytes());
    header[8..16].copy_from_slice(&epoch.to_le_bytes());
    header[16..20].copy_from_slice(&rows.to_le_bytes());
    header[20..24].copy_from_slice(&length.to_le_bytes());
    let crc = crc32c::crc32c(&header[..HEADER_CRC]);
    header[24..28].copy_from_slice(&crc.to_le_bytes());
    header[28..32].copy_from_slice(&crc32c::crc32c(payload).to_le_bytes());
    Ok(())
}

fn too_large(bytes: usize) -> ArrowError {
    ArrowError::InvalidArgumentError(format!("{bytes} bytes in one frame, more than {MAX_PAYLOAD}"))
}

/// What comes next in a run of frames.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// A frame.
    Frame(Frame),
    /// The end, right behind a whole frame.
    End,
    /// From `offset` on there is no whole frame: a write that a crash cut short, one that is still going on,
    /// or damage.
    Torn {
        /// Where the last whole frame ends.
        offset: u64,
        /// What is wrong there.
        why: &'static str,
    },
}

/// Walks frames. Once torn, always torn: what follows damage is not looked at.
#[derive(Debug)]
pub struct Decoder<R> {
    input: R,
    offset: u64,
    length: u64,
    torn: Option<&'static str>,
}

impl<R: Read> Decoder<R> {
    /// Over the first `length` bytes of `input`.
    pub fn new(input: R, length: u64) -> Self {
        Self { input, offset: 0, length, torn: None }
    }

    /// The next frame.
    ///
    /// # Errors
    /// What the system says when it cannot read.
    pub fn step(&mut self) -> io::Result<Next> {
        if let Some(why) = self.torn {
            return Ok(Next::Torn { offset: self.offset, why });
        }
        let left = self.length - self.offset;
        if left == 0 {
            return Ok(Next::End);
        }
        if left < HEADER as u64 {
            return Ok(self.tear("the header is cut short"));
        }
        let mut header = [0; HEADER];
        if !self.fill(&mut header)? {
            return Ok(self.tear("the header is cut short"));
        }
        if u32_at(&header, 0) != MAGIC {
            return Ok(self.tear("no frame begins here"));
        }
        if u32_at(&header, HEADER_CRC) != crc32c::crc32c(&header[..HEADER_CRC]) {
            return Ok(self.tear("the header's checksum is wrong"));
        }
        if u16_at(&header, 4) != VERSION {
            return Ok(self.tear("the frame is of another version"));
        }
        let Some(kind) = Kind::of(u16_at(&header, 6)) else {
            return Ok(self.tear("the frame is of an unknown kind"));
        };
        let length = u32_at(&header, 20) as usize;
        // Bounded before anything is allocated: by what a frame may hold, and by what is there.
        if length > MAX_PAYLOAD || length as u64 > left - HEADER as u64 {
            return Ok(self.tear("the payload is cut short"));
        }
        let mut payload = vec![0; length];
        if !self.fill(&mut payload)? {
            return Ok(self.tear("the payload is cut short"));
        }
        if u32_at(&header, 28) != crc32c::crc32c(&payload) {
            return Ok(self.tear("the payload's checksum is wrong"));
        }
        self.offset += (HEADER + length) as u64;
        let mut epoch = [0; 8];
        epoch.copy_from_slice(&header[8..16]);
        Ok(Next::Frame(Frame { kind, epoch: u64::from_le_bytes(epoch), rows: u32_at(&header, 16), payload }))
    }

    /// Whether as much was there.
    fn fill(&mut self, buffer: &mut [u8]) -> io::Result<bool> {
        match self.input.read_exact(buffer) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(e) => Err(e),
        }
    }

    fn tear(&mut self, why: &'static str) -> Next {
        self.torn = Some(why);
        Next::Torn { offset: self.offset, why }
    }
}

fn u32_at(bytes: &[u8; HEADER], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u16_at(bytes: &[u8; HEADER], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, Int64Array};

    use super::*;

    fn rows(values: &[i64]) -> RecordBatch {
        RecordBatch::try_from_iter([("n", Arc::new(Int64Array::from(values.to_vec())) as ArrayRef)]).unwrap()
    }

    /// Five frames, and where each begins.
    fn five() -> (Vec<u8>, Vec<usize>) {
        let mut bytes = Vec::new();
        let mut starts = vec![0];
        push_owner(&mut bytes, "me").unwrap();
        for epoch in 1..5 {
            starts.push(bytes.len());
            push_rows(&mut bytes, Kind::Rows, epoch, &[rows(&[epoch as i64]), rows(&[7, 8])]).unwrap();
        }
        (bytes, starts)
    }

    /// The epochs of all whole frames, and how the walk ends.
    fn walk(bytes: &[u8]) -> (Vec<u64>, Next) {
        let mut decoder = Decoder::new(bytes, bytes.len() as u64);
        let mut epochs = Vec::new();
        loop {
            match decoder.step().unwrap() {
                Next::Frame(frame) => epochs.push(frame.epoch),
                end => return (epochs, end),
            }
        }
    }

    #[test]
    fn frames_come_back_as_they_were() {
        let (bytes, starts) = five();
        assert_eq!(walk(&bytes), (vec![0, 1, 2, 3, 4], Next::End));
        let mut decoder = Decoder::new(&bytes[starts[2]..], (bytes.len() - starts[2]) as u64);
        let Next::Frame(frame) = decoder.step().unwrap() else { panic!("no frame") };
        assert_eq!((frame.kind, frame.rows), (Kind::Rows, 3));
        assert_eq!(frame.batches().unwrap(), [rows(&[2]), rows(&[7, 8])]);
        let lying = Frame { rows: 2, ..frame };
        assert!(lying.batches().unwrap_err().to_string().contains("says 2 rows"));
    }

    #[test]
    fn a_cut_at_every_byte_of_the_last_three_frames_loses_only_what_it_cuts() {
        let (bytes, starts) = five();
        for cut in starts[2]..bytes.len() {
            let whole = starts.iter().filter(|start| **start <= cut).count() - 1;
            let (epochs, end) = walk(&bytes[..cut]);
            assert_eq!(epochs.len(), whole, "cut at {cut}");
            if starts.contains(&cut) {
                assert_eq!(end, Next::End, "cut at {cut}");
            } else {
                assert!(matches!(end, Next::Torn { offset, .. } if offset == starts[whole] as u64), "cut at {cut}");
            }
        }
    }

    #[test]
    fn zeros_behind_the_frames_are_no_frames() {
        let (mut bytes, _) = five();
        let end = bytes.len();
        bytes.resize(end + 4096, 0);
        assert!(matches!(walk(&bytes), (epochs, Next::Torn { offset, .. }) if epochs.len() == 5 && offset == end as u64));
    }

    #[test]
    fn a_flipped_bit_anywhere_in_a_frame_is_noticed() {
        let (bytes, starts) = five();
        for at in starts[3]..starts[4] {
            for bit in 0..8 {
                let mut damaged = bytes.clone();
                damaged[at] ^= 1 << bit;
                let (epochs, end) = walk(&damaged);
                assert_eq!(epochs, [0, 1, 2], "bit {bit} of byte {at}");
                assert!(matches!(end, Next::Torn { offset, .. } if offset == starts[3] as u64), "bit {bit} of byte {at}");
            }
        }
    }

    #[test]
    fn a_length_beyond_the_file_allocates_nothing() {
        let mut bytes = Vec::new();
        push_owner(&mut bytes, "me").unwrap();
        bytes[20..24].copy_from_slice(&u32::MAX.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..HEADER_CRC]);
        bytes[24..28].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(walk(&bytes).1, Next::Torn { offset: 0, why: "the payload is cut short" });
    }

    #[test]
    fn a_failed_push_leaves_the_buffer_as_it_was() {
        let mut bytes = vec![1, 2, 3];
        assert!(push_rows(&mut bytes, Kind::Rows, 1, &[]).is_err());
        assert_eq!(bytes, [1, 2, 3]);
    }
}
