//! Files of text lines as bounded sources of rows: JSON lines and CSV. Used by [`crate::FileReader`]. Every line (of
//! CSV every record, which quotes may stretch over lines) has a number, whether it gives a row, is blank or is
//! rejected; the number alone is the position from which reading resumes.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use arrow::datatypes::SchemaRef;

use crate::csv::{CsvOptions, RecordReader, skips_blank};
use crate::error::FormatError;
use crate::files::{FileRows, RejectedRow};
use crate::json::{Shape, push_json};
use crate::payload::{Limits, Policy, Reason, bounded};
use crate::record::Flaw;
use crate::rows::Rows;

/// Longer lines are rejected.
const MAX_LINE: usize = 16 << 20;
/// What a rejected line that is too long leaves of its bytes.
const KEPT_OF_TOO_LONG: usize = 64 << 10;
/// A batch ends early when its lines have this many bytes.
const MAX_BATCH_BYTES: usize = 32 << 20;
/// How far a quote that is never closed may lead before its line is given up and the next ones are read again.
const MAX_JOINED_LINES: usize = 256;
const MAX_JOINED_BYTES: usize = 64 << 10;

/// Reads rows from lines.
pub(crate) struct LinesReader {
    path: PathBuf,
    lines: Lines,
    parser: Parser,
    rows: Rows,
    batch_rows: u64,
    next_row: u64,
    /// The line or record that was read last.
    line: Vec<u8>,
}

enum Parser {
    Json,
    Csv(RecordReader),
}

impl LinesReader {
    /// Opens JSON lines, or CSV if its options are given, and passes over the first `skip_rows` lines.
    pub(crate) fn open(
        path: &Path,
        csv: Option<CsvOptions>,
        schema: SchemaRef,
        policy: Policy,
        batch_rows: usize,
        skip_rows: u64,
    ) -> Result<Self, FormatError> {
        let file = File::open(path).map_err(|source| FormatError::File { action: "open", path: path.to_owned(), source })?;
        let (place, parser) = match csv {
            None => ("json_lines", Parser::Json),
            Some(options) => ("csv", Parser::Csv(RecordReader::new(options)?)),
        };
        let mut reader = Self {
            path: path.to_owned(),
            lines: Lines { input: BufReader::with_capacity(256 << 10, file), ahead: VecDeque::new() },
            parser,
            rows: Rows::new(schema, policy, place)?,
            batch_rows: u64::try_from(batch_rows.max(1)).unwrap_or(u64::MAX),
            next_row: 0,
            line: Vec::new(),
        };
        if csv.is_some_and(|options| options.header) {
            reader.read_header(policy)?;
        }
        while reader.next_row < skip_rows && reader.pull()? != Pulled::End {
            reader.next_row += 1;
        }
        Ok(reader)
    }

    pub(crate) fn schema(&self) -> &SchemaRef {
        self.rows.schema()
    }

    /// The next rows, or `None` at the end. A batch may be empty where all its lines were rejected or blank.
    pub(crate) fn next_batch(&mut self) -> Result<Option<FileRows>, FormatError> {
        let first_row = self.next_row;
        let mut rejected = Vec::new();
        let mut bytes = 0;
        while self.next_row - first_row < self.batch_rows && bytes < MAX_BATCH_BYTES {
            let before = self.rows.len();
            let outcome = match self.pull()? {
                Pulled::End => break,
                Pulled::TooLong(length) => Err(format!("a line of {length} bytes, over the limit of {MAX_LINE}").into()),
                Pulled::Line => self.parse(),
            };
            if let Err(reason) = outcome {
                self.rows.truncate(before);
                let Reason { fault, text } = reason;
                rejected.push(RejectedRow { row: self.next_row, fault, reason: bounded(text), bytes: self.line.clone() });
            }
            bytes += self.line.len();
            self.next_row += 1;
        }
        if self.next_row == first_row {
            return Ok(None);
        }
        Ok(Some(FileRows { first_row, next_row: self.next_row, batch: self.rows.finish()?, rejected }))
    }

    fn read_header(&mut self, policy: Policy) -> Result<(), FormatError> {
        let pulled = self.pull()?;
        let Parser::Csv(reader) = &mut self.parser else {
            return Ok(());
        };
        let taken = match pulled {
            Pulled::End => Ok(()),
            Pulled::TooLong(length) => Err(format!("a header of {length} bytes").into()),
            Pulled::Line => split_line(reader, &self.line).and_then(|()| reader.take_header(&self.rows, policy)),
        };
        taken.map_err(|reason| FormatError::Csv(format!("{}: {}", self.path.display(), reason.text)))
    }

    /// Reads the next line, or record of CSV, into `self.line`.
    fn pull(&mut self) -> Result<Pulled, FormatError> {
        let pulled = self.lines.read(&mut self.line).and_then(|pulled| {
            if let (Pulled::Line, Parser::Csv(reader)) = (&pulled, &mut self.parser) {
                self.lines.complete(&mut self.line, reader)?;
            }
            Ok(pulled)
        });
        pulled.map_err(|source| FormatError::File { action: "read", path: self.path.clone(), source })
    }

    fn parse(&mut self) -> Result<(), Reason> {
        let blank = self.line.trim_ascii().is_empty();
        match &mut self.parser {
            Parser::Json if blank => Ok(()),
            Parser::Json => {
                let depth = Limits::default().depth;
                push_json(&mut self.rows, &self.line, depth, Shape::Object)
            }
            Parser::Csv(_) if blank && skips_blank(self.rows.schema()) => Ok(()),
            Parser::Csv(reader) => {
                split_line(reader, &self.line)?;
                reader.push(&mut self.rows)
            }
        }
    }
}

fn split_line(reader: &mut RecordReader, line: &[u8]) -> Result<(), Reason> {
    let text = std::str::from_utf8(line).map_err(|error| format!("invalid UTF-8 at byte {}", error.valid_up_to()))?;
    reader.split(text).map(|_| ()).map_err(|flaw| flaw.reason().into())
}

/// What became of an attempt to read a line.
#[derive(Debug, PartialEq, Eq)]
enum Pulled {
    /// The file is at its end.
    End,
    /// A line, without its line feed.
    Line,
    /// The beginning of a line of so many bytes; the rest was passed over.
    TooLong(usize),
}

struct Lines {
    input: BufReader<File>,
    /// Lines that were read in search of a closing quote and are yet to be given.
    ahead: VecDeque<(Vec<u8>, Pulled)>,
}

impl Lines {
    fn read(&mut self, line: &mut Vec<u8>) -> io::Result<Pulled> {
        if let Some((ahead, pulled)) = self.ahead.pop_front() {
            *line = ahead;
            return Ok(pulled);
        }
        line.clear();
        let limit = MAX_LINE as u64 + 1;
        let length = self.input.by_ref().take(limit).read_until(b'\n', line)?;
        if length == 0 {
            return Ok(Pulled::End);
        }
        if line.last() == Some(&b'\n') {
            line.pop();
        } else if length > MAX_LINE {
            let passed = self.input.skip_until(b'\n')?;
            line.truncate(KEPT_OF_TOO_LONG);
            return Ok(Pulled::TooLong(length + passed));
        }
        Ok(Pulled::Line)
    }

    /// Appends the following lines to one that ends within quotes, if that makes a record of it; otherwise leaves all
    /// lines as they were, so that a stray quote costs its own line and no other.
    fn complete(&mut self, line: &mut Vec<u8>, reader: &mut RecordReader) -> io::Result<()> {
        let first = line.len();
        let mut joined: Vec<(Vec<u8>, Pulled)> = Vec::new();
        loop {
            let open = match std::str::from_utf8(line).map(|text| reader.split(text).map(|_| ())) {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(Flaw::Unterminated)) => joined.len() < MAX_JOINED_LINES && line.len() < MAX_JOINED_BYTES,
                Ok(Err(Flaw::Malformed(_))) | Err(_) => false,
            };
            let mut next = Vec::new();
            let pulled = if open { self.read(&mut next)? } else { Pulled::End };
            match pulled {
                Pulled::Line => {
                    line.push(b'\n');
                    line.extend_from_slice(&next);
                    joined.push((next, Pulled::Line));
                }
                Pulled::End | Pulled::TooLong(_) => {
                    line.truncate(first);
                    if pulled != Pulled::End {
                        joined.push((next, pulled));
                    }
                    for given_back in joined.into_iter().rev() {
                        self.ahead.push_front(given_back);
                    }
                    return Ok(());
                }
            }
        }
    }
}
