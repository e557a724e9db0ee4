//! What can go wrong with a codec or a file as a whole; every public function of this crate gives it. A bad
//! payload or line is no error: it is rejected with a reason and the rest flows. Invariant: an error tells what was
//! attempted and leaves the cause to its source, so that whoever prints the chain prints each cause once.

use std::path::PathBuf;

use arrow::datatypes::DataType;
use arrow::error::ArrowError;
use parquet::errors::ParquetError;

/// An error of a whole codec or file, never of a single payload or line.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// A column's type has no representation in the format, or none in a declaration.
    #[error("column '{column}' has type {data_type}, which {place} cannot hold")]
    UnsupportedType {
        /// What cannot hold it, e.g. `json`.
        place: &'static str,
        /// The column's name.
        column: String,
        /// Its Arrow type.
        data_type: DataType,
    },
    /// The batch does not have the schema that the encoder or writer was made for.
    #[error("cannot encode a batch with columns ({found}) as one with columns ({declared})")]
    OtherSchema {
        /// Columns of the batch.
        found: String,
        /// Columns of the encoder.
        declared: String,
    },
    /// JSON lines and CSV say nothing of types.
    #[error("cannot read {path} as {format} without a schema; `afferent infer-schema` writes one")]
    SchemaRequired {
        /// The file.
        path: PathBuf,
        /// Its format.
        format: &'static str,
    },
    /// A columnar file does not have the declared columns.
    #[error("cannot read {path} under the declared schema: {reason}")]
    SchemaMismatch {
        /// The file.
        path: PathBuf,
        /// Which column, and why.
        reason: String,
    },
    /// The CSV options make no sense, or the header does not.
    #[error("cannot use csv: {0}")]
    Csv(String),
    /// A sample holds nothing from which a schema follows.
    #[error("cannot infer a schema: {0}")]
    Infer(String),
    /// The encoded batch would pass 2 GiB, the limit of Arrow's 32-bit offsets.
    #[error("cannot encode a batch of {rows} rows: it would pass 2 GiB; send smaller batches")]
    TooLarge {
        /// Rows of the batch.
        rows: usize,
    },
    /// The operating system said no.
    #[error("cannot {action} {path}")]
    File {
        /// What was attempted, e.g. `open`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// Writing the encoded bytes failed.
    #[error("cannot write encoded rows")]
    Write(#[from] std::io::Error),
    /// Arrow refused a batch.
    #[error(transparent)]
    Arrow(#[from] ArrowError),
    /// Parquet refused a file.
    #[error(transparent)]
    Parquet(#[from] ParquetError),
}

#[cfg(test)]
mod tests {
    use std::error::Error;
    use std::{io, iter};

    use super::*;

    #[test]
    fn a_chain_tells_each_cause_once_and_keeps_the_system_s() {
        let gone = || io::Error::other("gone");
        let file = FormatError::File { action: "open", path: "a.csv".into(), source: gone() };
        let bad = ParquetError::General("bad footer".to_owned());
        for (error, told) in [
            (file, "cannot open a.csv: gone"),
            (FormatError::from(gone()), "cannot write encoded rows: gone"),
            (FormatError::from(bad), "Parquet error: bad footer"),
        ] {
            let first: &dyn Error = &error;
            let chain: Vec<String> = iter::successors(Some(first), |&error| error.source()).map(ToString::to_string).collect();
            assert_eq!(chain.join(": "), told);
        }
        let written = FormatError::from(ParquetError::from(gone()));
        assert!(written.source().is_some_and(|cause| cause.is::<io::Error>()), "a full disk is known by its cause");
    }
}
