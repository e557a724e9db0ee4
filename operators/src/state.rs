//! Held rows as bytes for the checkpoint: an Arrow IPC stream of one batch. Called by the operators that keep rows
//! back (`batch`, `window`); the invariant: what was written under a schema is read back under it or not at all.

use afferent_engine::{Error, Result};
use arrow::array::RecordBatch;
use arrow::compute::concat_batches;
use arrow::datatypes::SchemaRef;
use arrow::ipc::reader::StreamReader;
use arrow::ipc::writer::StreamWriter;

/// Appends the rows to `bytes`.
///
/// # Errors
/// Fatal when Arrow cannot write them.
pub(crate) fn write(rows: &RecordBatch, bytes: &mut Vec<u8>) -> Result<()> {
    let mut writer = StreamWriter::try_new(bytes, rows.schema_ref()).map_err(Error::fatal)?;
    writer.write(rows).map_err(Error::fatal)?;
    writer.finish().map_err(Error::fatal)
}

/// Reads what [`write`] wrote.
///
/// # Errors
/// Fatal when the bytes are no such rows, or rows of other columns.
pub(crate) fn read(schema: &SchemaRef, bytes: &[u8]) -> Result<RecordBatch> {
    let unreadable = |cause: arrow::error::ArrowError| Error::fatal(cause).context("cannot read the held rows of a checkpoint");
    let reader = StreamReader::try_new(bytes, None).map_err(unreadable)?;
    if reader.schema().fields() != schema.fields() {
        return Err(Error::fatal(format!(
            "cannot take up held rows with columns ({}) where columns ({}) are held",
            names(&reader.schema()),
            names(schema)
        )));
    }
    let batches = reader.collect::<std::result::Result<Vec<_>, _>>().map_err(unreadable)?;
    concat_batches(schema, &batches).map_err(unreadable)
}

fn names(schema: &SchemaRef) -> String {
    let column = |field: &arrow::datatypes::FieldRef| format!("{} {}", field.name(), field.data_type());
    let columns: Vec<String> = schema.fields().iter().map(column).collect();
    columns.join(", ")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, Int32Array, StringArray};

    use super::*;

    #[test]
    fn a_slice_comes_back_as_it_was_and_other_columns_are_refused() {
        let texts: ArrayRef = Arc::new(StringArray::from(vec!["a", "bb", "ccc", "dddd"]));
        let rows = RecordBatch::try_from_iter([("t", texts)]).unwrap().slice(1, 2);
        let mut bytes = vec![7];
        write(&rows, &mut bytes).unwrap();
        assert_eq!(read(&rows.schema(), &bytes[1..]).unwrap(), rows);

        let numbers: ArrayRef = Arc::new(Int32Array::from(vec![1]));
        let other = RecordBatch::try_from_iter([("t", numbers)]).unwrap();
        let error = read(&other.schema(), &bytes[1..]).unwrap_err();
        assert!(error.to_string().contains("t Int32"), "{error}");
        assert!(read(&rows.schema(), &bytes[1..20]).is_err());
    }
}
