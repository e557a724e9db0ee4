//! Whole files as bounded, resumable sources of rows. Called by the `file` source and by `infer-schema`'s callers who
//! then read. The invariant: rows are numbered from 0 in file order, and a reader opened with `skip_rows` gives
//! exactly what the first would have given from there on.

use std::path::Path;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::columnar::ColumnsReader;
use crate::csv::CsvOptions;
use crate::error::FormatError;
use crate::lines::LinesReader;
use crate::payload::{Fault, Policy};

/// The format of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FileFormat {
    /// One JSON object a line; needs a schema.
    JsonLines,
    /// CSV with a header; needs a schema.
    Csv,
    /// Apache Parquet.
    Parquet,
    /// Arrow IPC, as a file or as a stream.
    Arrow,
}

impl FileFormat {
    /// The name as written in a pipeline.
    pub fn name(self) -> &'static str {
        match self {
            Self::JsonLines => "json_lines",
            Self::Csv => "csv",
            Self::Parquet => "parquet",
            Self::Arrow => "arrow",
        }
    }
}

/// How a file is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadOptions {
    /// How strictly rows are held to the declared schema.
    pub policy: Policy,
    /// The layout of CSV.
    pub csv: CsvOptions,
}

impl Default for ReadOptions {
    /// The default policy, and CSV with a header and commas.
    fn default() -> Self {
        Self { policy: Policy::default(), csv: CsvOptions { header: true, ..CsvOptions::default() } }
    }
}

/// A run of consecutive rows of a file.
#[derive(Debug, Clone)]
pub struct FileRows {
    /// Number of the first row that was looked at, from 0. In text files each line (in CSV each record) counts,
    /// blank and rejected ones too, a CSV header does not.
    pub first_row: u64,
    /// Number of the row after the last one looked at: resume with this as `skip_rows`.
    pub next_row: u64,
    /// The good rows; there may be none.
    pub batch: RecordBatch,
    /// The bad ones, in order.
    pub rejected: Vec<RejectedRow>,
}

/// A line that could not be taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RejectedRow {
    /// Its number, from 0.
    pub row: u64,
    /// What kind of thing is wrong with it.
    pub fault: Fault,
    /// Why.
    pub reason: String,
    /// The line without its end; of one over 16 MiB the first 64 KiB.
    pub bytes: Vec<u8>,
}

/// Reads a file batch by batch.
pub struct FileReader(Inner);

enum Inner {
    Lines(Box<LinesReader>),
    Columns(Box<ColumnsReader>),
}

impl FileReader {
    /// Opens a file with the default [`ReadOptions`]; batches have at most `batch_rows` rows, and the first `skip_rows`
    /// are passed over. Text formats need `declared`; columnar ones are checked, selected and cast by
    /// column name if it is given.
    ///
    /// # Errors
    /// [`FormatError::SchemaRequired`], [`FormatError::SchemaMismatch`], and what opening and reading gives.
    pub fn open(
        path: &Path,
        format: FileFormat,
        declared: Option<SchemaRef>,
        batch_rows: usize,
        skip_rows: u64,
    ) -> Result<Self, FormatError> {
        Self::open_with(path, format, declared, batch_rows, skip_rows, ReadOptions::default())
    }

    /// As [`FileReader::open`], with options.
    ///
    /// # Errors
    /// As for [`FileReader::open`], and [`FormatError::Csv`] for options or a header that do not fit.
    pub fn open_with(
        path: &Path,
        format: FileFormat,
        declared: Option<SchemaRef>,
        batch_rows: usize,
        skip_rows: u64,
        options: ReadOptions,
    ) -> Result<Self, FormatError> {
        let ReadOptions { policy, csv } = options;
        let lines = |csv, declared: Option<SchemaRef>| {
            let schema = declared.ok_or_else(|| FormatError::SchemaRequired { path: path.to_owned(), format: format.name() })?;
            let reader = LinesReader::open(path, csv, schema, policy, batch_rows, skip_rows)?;
            Ok(Inner::Lines(Box::new(reader)))
        };
        let columns = |reader| Inner::Columns(Box::new(reader));
        let inner: Result<Inner, FormatError> = match format {
            FileFormat::JsonLines => lines(None, declared),
            FileFormat::Csv => lines(Some(csv), declared),
            FileFormat::Parquet => ColumnsReader::open_parquet(path, declared, policy, batch_rows, skip_rows).map(columns),
            FileFormat::Arrow => ColumnsReader::open_arrow(path, declared, policy, batch_rows, skip_rows).map(columns),
        };
        inner.map(Self)
    }

    /// The schema of every batch: the declared one, or the file's.
    pub fn schema(&self) -> &SchemaRef {
        match &self.0 {
            Inner::Lines(reader) => reader.schema(),
            Inner::Columns(reader) => reader.schema(),
        }
    }

    /// The next rows, or `None` at the end of the file.
    ///
    /// # Errors
    /// What reading gives; [`FormatError::SchemaMismatch`] if a value of a columnar file overflows its declared type.
    pub fn next_batch(&mut self) -> Result<Option<FileRows>, FormatError> {
        match &mut self.0 {
            Inner::Lines(reader) => reader.next_batch(),
            Inner::Columns(reader) => reader.next_batch(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::path::PathBuf;

    use arrow::array::{Array, AsArray};
    use arrow::compute::concat_batches;
    use arrow::datatypes::Int64Type;
    use tempfile::TempDir;

    use super::*;
    use crate::file_writer::FileWriter;
    use crate::schema::Declaration;

    const FORMATS: [FileFormat; 4] = [FileFormat::JsonLines, FileFormat::Csv, FileFormat::Parquet, FileFormat::Arrow];

    fn schema(text: &str) -> SchemaRef {
        serde_json::from_str::<Declaration>(text).unwrap().to_arrow()
    }

    fn file(bytes: &[u8]) -> (TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows");
        fs::write(&path, bytes).unwrap();
        (dir, path)
    }

    fn drain(mut reader: FileReader) -> Vec<FileRows> {
        std::iter::from_fn(|| reader.next_batch().unwrap()).collect()
    }

    fn numbers(rows: &FileRows) -> Vec<i64> {
        rows.batch.column(0).as_primitive::<Int64Type>().values().to_vec()
    }

    #[test]
    fn bad_lines_are_rejected_with_bytes_and_number_from_wherever_reading_starts() {
        let mut text: Vec<u8> = Vec::new();
        for n in 0..40 {
            match n {
                7 => text.extend(b"{\"n\":7\n"),
                8 => text.extend(b"\xff\xfe\0\n"),
                20 => text.extend(b"[{\"n\":1}]\r\n"),
                30 => text.extend(b"  \n"),
                39 => text.extend(b"{\"n\":1.5}"),
                _ => text.extend(format!("{{\"n\":{n}}}\r\n").bytes()),
            }
        }
        let (_dir, path) = file(&text);
        for (start, size) in [(0, 1), (0, 7), (8, 100), (21, 3), (39, 5), (40, 5), (90, 5)] {
            let declared = Some(schema(r#"{"n":"int64"}"#));
            let reader = FileReader::open(&path, FileFormat::JsonLines, declared, size, start).unwrap();
            let all = drain(reader);
            let good: Vec<i64> = all.iter().flat_map(numbers).collect();
            let expected: Vec<i64> = (start as i64..40).filter(|n| ![7, 8, 20, 30, 39].contains(n)).collect();
            assert_eq!(good, expected);
            let bad: Vec<_> = all.iter().flat_map(|rows| rows.rejected.clone()).collect();
            let lines: Vec<u64> = bad.iter().map(|row| row.row).collect();
            let expected: Vec<u64> = [7, 8, 20, 39].into_iter().filter(|n| *n >= start).collect();
            assert_eq!(lines, expected);
            if start == 0 {
                assert_eq!(bad[0].bytes, b"{\"n\":7");
                assert!(bad[0].reason.starts_with("not JSON: EOF"), "{bad:?}");
                assert_eq!(bad[1].bytes, b"\xff\xfe\0");
                assert!(bad[2].reason.contains("expected an object"), "{bad:?}");
            }
            for pair in all.windows(2) {
                assert_eq!(pair[0].next_row, pair[1].first_row);
            }
            if let Some(last) = all.last() {
                assert_eq!(last.next_row, 40);
            }
        }
    }

    #[test]
    fn a_line_without_end_is_bounded_and_the_next_one_read() {
        let mut text = b"{\"n\":1}\n{\"n\":\"".to_vec();
        text.resize(text.len() + (17 << 20), b'x');
        text.extend(b"\"}\n{\"n\":3}\n");
        let (_dir, path) = file(&text);
        let declared = Some(schema(r#"{"n":"int64"}"#));
        let reader = FileReader::open(&path, FileFormat::JsonLines, declared, 10, 0).unwrap();
        let all = drain(reader);
        assert_eq!(all.len(), 1);
        assert_eq!(numbers(&all[0]), [1, 3]);
        let [rejected] = all[0].rejected.as_slice() else {
            panic!("{} rejected", all[0].rejected.len());
        };
        assert_eq!((rejected.row, rejected.bytes.len()), (1, 64 << 10));
        let length = text.len() - 8 - 8;
        assert!(rejected.reason.contains(&length.to_string()), "{}", rejected.reason);
    }

    #[test]
    fn csv_quotes_span_lines_and_a_stray_quote_costs_one_line() {
        let text = "n,s\n1,\"a\nb\"\n2,\"stray\n3,c\n4,\"d\"\n\n5,\"e\n\n\"\nx,y\n6,\"end";
        let (_dir, path) = file(text.as_bytes());
        let declared = schema(r#"{"s":"utf8","n":"int64"}"#);
        for start in 0..9 {
            let reader = FileReader::open(&path, FileFormat::Csv, Some(declared.clone()), 2, start).unwrap();
            let all = drain(reader);
            let got: Vec<(String, i64)> = all
                .iter()
                .flat_map(|rows| {
                    let s = rows.batch.column(0).as_string::<i32>();
                    let n = rows.batch.column(1).as_primitive::<Int64Type>();
                    (0..rows.batch.num_rows()).map(move |row| (s.value(row).to_owned(), n.value(row)))
                })
                .collect();
            // Records: 0 is 1, 1 is the stray, 2 is 3, 3 is 4, 4 is blank, 5 is 5, 6 is x, 7 is 6.
            let records = [(0, "a\nb", 1), (2, "c", 3), (3, "d", 4), (5, "e\n\n", 5)];
            let expected: Vec<(String, i64)> =
                records.iter().filter(|(record, _, _)| *record >= start).map(|(_, s, n)| ((*s).to_owned(), *n)).collect();
            assert_eq!(got, expected, "from {start}");
            let rejected: Vec<(u64, Vec<u8>)> =
                all.iter().flat_map(|rows| rows.rejected.iter().map(|r| (r.row, r.bytes.clone()))).collect();
            let bad: [(u64, &[u8]); 3] = [(1, b"2,\"stray"), (6, b"x,y"), (7, b"6,\"end")];
            let expected: Vec<(u64, Vec<u8>)> =
                bad.iter().filter(|(record, _)| *record >= start).map(|(record, bytes)| (*record, bytes.to_vec())).collect();
            assert_eq!(rejected, expected, "from {start}");
        }
    }

    #[test]
    fn every_format_comes_back_and_resumes_at_any_row() {
        let declared =
            schema(r#"{"n":"int64","s":"utf8","t":"timestamp_us","l":{"list":"float32"},"p":{"struct":{"x":"int8"}}}"#);
        let lines: Vec<String> =
            (0..25).map(|n| format!(r#"{{"n":{n},"s":"a,\"{n}\n","t":{n},"l":[{n}.5,null],"p":{{"x":{n}}}}}"#)).collect();
        let (dir, path) = file(lines.join("\n").as_bytes());
        let whole = FileReader::open(&path, FileFormat::JsonLines, Some(declared.clone()), 100, 0);
        let whole = drain(whole.unwrap()).remove(0);
        assert!(whole.rejected.is_empty(), "{:?}", whole.rejected);
        for format in FORMATS {
            let path = dir.path().join(format.name());
            let file = File::create(&path).unwrap();
            let mut writer = FileWriter::create(file, format, declared.clone()).unwrap();
            writer.write(&whole.batch.slice(0, 10)).unwrap();
            writer.write(&whole.batch.slice(10, 15)).unwrap();
            writer.finish().unwrap().sync_all().unwrap();
            for skip in [0, 1, 9, 10, 24, 25, 60] {
                let reader = FileReader::open(&path, format, Some(declared.clone()), 4, skip as u64);
                let all = drain(reader.unwrap());
                assert!(all.iter().all(|rows| rows.batch.num_rows() <= 4 && rows.rejected.is_empty()));
                let got = concat_batches(&declared, all.iter().map(|rows| &rows.batch)).unwrap();
                let from = skip.min(25);
                assert_eq!(got, whole.batch.slice(from, 25 - from), "{} from {skip}", format.name());
                if let (Some(first), Some(last)) = (all.first(), all.last()) {
                    assert_eq!((first.first_row, last.next_row), (skip as u64, 25));
                }
            }
        }
    }

    #[test]
    fn columnar_files_are_selected_and_checked_when_opened() {
        let dir = tempfile::tempdir().unwrap();
        let written = schema(r#"{"n":"int64","s":"utf8","f":"float64"}"#);
        let (_lines, path) = file(b"{\"n\":1,\"s\":\"a\",\"f\":0.5}");
        let rows = FileReader::open(&path, FileFormat::JsonLines, Some(written.clone()), 9, 0);
        let batch = drain(rows.unwrap()).remove(0).batch;
        for format in [FileFormat::Parquet, FileFormat::Arrow] {
            let path = dir.path().join(format.name());
            let file = File::create(&path).unwrap();
            let mut writer = FileWriter::create(file, format, written.clone()).unwrap();
            writer.write(&batch).unwrap();
            writer.finish().unwrap();

            let undeclared = FileReader::open(&path, format, None, 9, 0).unwrap();
            assert_eq!(undeclared.schema().fields(), written.fields());
            let narrower = schema(r#"{"f":"float32","gone":"utf8","n":"int16"}"#);
            let reader = FileReader::open(&path, format, Some(narrower.clone()), 9, 0).unwrap();
            let rows = drain(reader).remove(0);
            assert_eq!(rows.batch.schema(), narrower);
            assert_eq!(rows.batch.column(1).null_count(), 1);

            let wrong = schema(r#"{"s":"int64"}"#);
            let error = FileReader::open(&path, format, Some(wrong), 9, 0).err().unwrap();
            assert!(error.to_string().contains("column 's' is utf8, declared as int64"), "{error}");
        }
    }

    #[test]
    fn what_cannot_be_opened_says_why() {
        let (_dir, path) = file(b"a,b\n1,2\n");
        let error = FileReader::open(&path, FileFormat::Csv, None, 9, 0).err().unwrap();
        assert!(error.to_string().contains("as csv without a schema"), "{error}");
        let required = Some(schema(r#"{"c":"int64!"}"#));
        let error = FileReader::open(&path, FileFormat::Csv, required, 9, 0).err().unwrap();
        assert!(error.to_string().contains("the header lacks column 'c'"), "{error}");
        for format in [FileFormat::Parquet, FileFormat::Arrow] {
            assert!(FileReader::open(&path, format, None, 9, 0).is_err());
        }
        let missing = path.with_extension("missing");
        let error = FileReader::open(&missing, FileFormat::Parquet, None, 9, 0).err().unwrap();
        assert!(error.to_string().starts_with("cannot open"), "{error}");
    }
}
