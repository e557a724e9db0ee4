//! Writes whole files of rows. Called by the `file` sink, which gives the open file and makes it durable afterwards; this
//! only fills it. Nothing is complete before [`FileWriter::finish`].

use std::io::{BufWriter, Write};

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use arrow::ipc::writer::FileWriter as IpcWriter;
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;

use crate::csv::{CsvEncoder, CsvOptions};
use crate::error::FormatError;
use crate::files::FileFormat;
use crate::json_encoder::{JsonEncoder, check_schema};

/// Writes batches of one schema to `W`, mostly a [`File`](std::fs::File).
///
/// JSON lines leave nulls out, CSV begins with a header, Parquet is compressed with Snappy, Arrow is the IPC file form.
pub struct FileWriter<W: Write + Send> {
    schema: SchemaRef,
    form: Form<W>,
}

enum Form<W: Write + Send> {
    JsonLines(JsonEncoder, W),
    Csv(CsvEncoder, W),
    Parquet(Box<ArrowWriter<W>>),
    Arrow(Box<IpcWriter<BufWriter<W>>>),
}

impl<W: Write + Send> FileWriter<W> {
    /// A writer for batches of `schema`; writes what stands at the beginning of a file.
    ///
    /// # Errors
    /// [`FormatError::Arrow`] or [`FormatError::Parquet`] if the format cannot carry a type of the schema, and what
    /// writing gives.
    pub fn create(mut output: W, format: FileFormat, schema: SchemaRef) -> Result<Self, FormatError> {
        let form = match format {
            FileFormat::JsonLines => Form::JsonLines(JsonEncoder::new(&schema, false)?, output),
            FileFormat::Csv => {
                let options = CsvOptions { header: true, ..CsvOptions::default() };
                let encoder = CsvEncoder::new(&schema, options)?;
                output.write_all(encoder.header())?;
                Form::Csv(encoder, output)
            }
            FileFormat::Parquet => {
                let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
                let writer = ArrowWriter::try_new(output, schema.clone(), Some(properties))?;
                Form::Parquet(Box::new(writer))
            }
            FileFormat::Arrow => Form::Arrow(Box::new(IpcWriter::try_new_buffered(output, &schema)?)),
        };
        Ok(Self { schema, form })
    }

    /// Appends a batch. Parquet holds rows in memory until a row group is full.
    ///
    /// # Errors
    /// [`FormatError::OtherSchema`] if the batch has other columns, and what writing gives.
    pub fn write(&mut self, batch: &RecordBatch) -> Result<(), FormatError> {
        check_schema(&self.schema, batch)?;
        match &mut self.form {
            Form::JsonLines(encoder, output) => {
                output.write_all(&encoder.encode_rows(batch, b"\n")?.0)?;
            }
            Form::Csv(encoder, output) => {
                output.write_all(&encoder.encode_rows(batch, b"", b"\n")?.0)?;
            }
            Form::Parquet(writer) => writer.write(batch)?,
            Form::Arrow(writer) => writer.write(batch)?,
        }
        Ok(())
    }

    /// Bytes that are held in memory until they can be written.
    pub fn buffered_bytes(&self) -> usize {
        match &self.form {
            Form::Parquet(writer) => writer.memory_size(),
            _ => 0,
        }
    }

    /// Writes what stands at the end of a file and gives the output back, to be synced.
    ///
    /// # Errors
    /// What writing gives.
    pub fn finish(self) -> Result<W, FormatError> {
        let mut output = match self.form {
            Form::JsonLines(_, output) | Form::Csv(_, output) => output,
            Form::Parquet(writer) => writer.into_inner()?,
            Form::Arrow(writer) => {
                let buffered = writer.into_inner()?;
                buffered.into_inner().map_err(|error| error.into_error())?
            }
        };
        output.flush()?;
        Ok(output)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, Int32Array};

    use super::*;

    fn batch() -> RecordBatch {
        let column = Arc::new(Int32Array::from(vec![Some(1), None])) as ArrayRef;
        let text = Arc::new(arrow::array::StringArray::from(vec!["a", "b,c"])) as ArrayRef;
        RecordBatch::try_from_iter_with_nullable([("n", column, true), ("s,t", text, true)]).unwrap()
    }

    #[test]
    fn text_files_are_what_other_programs_expect() {
        for (format, expected) in [
            (FileFormat::JsonLines, "{\"n\":1,\"s,t\":\"a\"}\n{\"s,t\":\"b,c\"}\n"),
            (FileFormat::Csv, "n,\"s,t\"\n1,a\n,\"b,c\"\n"),
        ] {
            let mut writer = FileWriter::create(Vec::new(), format, batch().schema()).unwrap();
            writer.write(&batch()).unwrap();
            assert_eq!(String::from_utf8(writer.finish().unwrap()).unwrap(), expected);
        }
    }

    #[test]
    fn another_schema_is_refused_before_anything_is_written() {
        for format in [FileFormat::JsonLines, FileFormat::Parquet] {
            let mut writer = FileWriter::create(Vec::new(), format, batch().schema()).unwrap();
            let other = batch().project(&[1]).unwrap();
            assert!(matches!(writer.write(&other), Err(FormatError::OtherSchema { .. })));
        }
    }
}
