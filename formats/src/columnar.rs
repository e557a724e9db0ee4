//! Files that have a schema of their own as bounded sources of rows: Parquet, Arrow IPC files and streams. Used by
//! [`crate::FileReader`]. The schema is checked when the file is opened; only what depends on values (an overflow in
//! a cast) can fail later.

use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::{Path, PathBuf};

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use arrow::error::ArrowError;
use arrow::ipc::reader::{FileReader, StreamReader};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use crate::error::FormatError;
use crate::files::FileRows;
use crate::fit::{check, fit};
use crate::payload::Policy;

/// Reads rows from a columnar file.
pub(crate) struct ColumnsReader {
    path: PathBuf,
    batches: Batches,
    schema: SchemaRef,
    policy: Policy,
    batch_rows: usize,
    next_row: u64,
    /// Rows still to pass over, for formats that cannot seek to a row.
    skip: u64,
    /// What is left of a batch larger than `batch_rows`.
    rest: Option<RecordBatch>,
}

type Batches = Box<dyn Iterator<Item = Result<RecordBatch, ArrowError>> + Send>;

impl ColumnsReader {
    /// Opens a Parquet file and seeks to a row.
    pub(crate) fn open_parquet(
        path: &Path,
        declared: Option<SchemaRef>,
        policy: Policy,
        batch_rows: usize,
        skip_rows: u64,
    ) -> Result<Self, FormatError> {
        let batch_rows = batch_rows.max(1);
        let mut builder = ParquetRecordBatchReaderBuilder::try_new(open(path)?)?;
        let found = builder.schema().clone();
        let total = u64::try_from(builder.metadata().file_metadata().num_rows()).unwrap_or(0);
        let skipped = skip_rows.min(total);
        if let Some(declared) = &declared {
            let wanted = found.fields().iter().enumerate();
            let wanted = wanted.filter(|(_, field)| declared.fields().find(field.name()).is_some());
            let mask = ProjectionMask::roots(builder.parquet_schema(), wanted.map(|(index, _)| index));
            builder = builder.with_projection(mask);
        }
        let reader = builder.with_batch_size(batch_rows).with_offset(usize::try_from(skipped).unwrap_or(usize::MAX)).build()?;
        let mut reader = Self::new(path, Box::new(reader), &found, declared, policy, batch_rows)?;
        reader.next_row = skipped;
        Ok(reader)
    }

    /// Opens an Arrow IPC file or stream and passes over rows.
    pub(crate) fn open_arrow(
        path: &Path,
        declared: Option<SchemaRef>,
        policy: Policy,
        batch_rows: usize,
        skip_rows: u64,
    ) -> Result<Self, FormatError> {
        let mut input = BufReader::new(open(path)?);
        // Both bear the same name in practice; the file form starts with this.
        const FILE_MAGIC: &[u8] = b"ARROW1";
        let mut magic = Vec::new();
        let begin = input.by_ref().take(FILE_MAGIC.len() as u64).read_to_end(&mut magic);
        begin.and_then(|_| input.rewind()).map_err(|source| FormatError::File {
            action: "read",
            path: path.to_owned(),
            source,
        })?;
        let (batches, found): (Batches, SchemaRef) = if magic == FILE_MAGIC {
            let reader = FileReader::try_new(input, None)?;
            let found = reader.schema();
            (Box::new(reader), found)
        } else {
            let reader = StreamReader::try_new(input, None)?;
            let found = reader.schema();
            (Box::new(reader), found)
        };
        let mut reader = Self::new(path, batches, &found, declared, policy, batch_rows.max(1))?;
        reader.skip = skip_rows;
        Ok(reader)
    }

    fn new(
        path: &Path,
        batches: Batches,
        found: &SchemaRef,
        declared: Option<SchemaRef>,
        policy: Policy,
        batch_rows: usize,
    ) -> Result<Self, FormatError> {
        let schema = declared.unwrap_or_else(|| found.clone());
        check(found, &schema, policy)
            .map_err(|reason| FormatError::SchemaMismatch { path: path.to_owned(), reason: reason.text })?;
        Ok(Self {
            path: path.to_owned(),
            batches,
            schema,
            policy: Policy {
                // Columns that are not declared were judged above and may be projected away by now.
                unknown: crate::payload::Unknown::Ignore,
                ..policy
            },
            batch_rows,
            next_row: 0,
            skip: 0,
            rest: None,
        })
    }

    pub(crate) fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// The next rows, at least one, or `None` at the end.
    pub(crate) fn next_batch(&mut self) -> Result<Option<FileRows>, FormatError> {
        loop {
            let batch = match self.rest.take() {
                Some(batch) => batch,
                None => match self.batches.next() {
                    None => return Ok(None),
                    Some(batch) => fit(&batch?, &self.schema, self.policy)
                        .map_err(|reason| FormatError::SchemaMismatch { path: self.path.clone(), reason: reason.text })?,
                },
            };
            let rows = batch.num_rows();
            let skipped = usize::try_from(self.skip).unwrap_or(usize::MAX).min(rows);
            self.skip -= skipped as u64;
            self.next_row += skipped as u64;
            if skipped == rows {
                continue;
            }
            let taken = (rows - skipped).min(self.batch_rows);
            if skipped + taken < rows {
                self.rest = Some(batch.slice(skipped + taken, rows - skipped - taken));
            }
            let first_row = self.next_row;
            self.next_row += taken as u64;
            return Ok(Some(FileRows {
                first_row,
                next_row: self.next_row,
                batch: batch.slice(skipped, taken),
                rejected: Vec::new(),
            }));
        }
    }
}

fn open(path: &Path) -> Result<File, FormatError> {
    File::open(path).map_err(|source| FormatError::File { action: "open", path: path.to_owned(), source })
}
