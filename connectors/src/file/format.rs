//! The formats of files as pipeline authors name them. Used by the `file` source and sink while planning. The
//! invariant: what an extension says never outweighs what the author wrote.

use std::path::Path;

use afferent_formats::{CsvOptions, FileFormat};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The extensions that tell a format, for messages.
pub const EXTENSIONS: &str = ".jsonl, .ndjson, .csv, .parquet, .arrow, .arrows, .ipc or .feather";

/// The format that a file's extension tells. `.json` tells none: such a file is mostly one document, not lines.
pub fn by_extension(path: &Path) -> Option<FileFormat> {
    let extension = path.extension()?.to_str()?.to_ascii_lowercase();
    match extension.as_str() {
        "jsonl" | "ndjson" => Some(FileFormat::JsonLines),
        "csv" => Some(FileFormat::Csv),
        "parquet" => Some(FileFormat::Parquet),
        "arrow" | "arrows" | "ipc" | "feather" => Some(FileFormat::Arrow),
        _ => None,
    }
}

/// The extension of files of a format, without the dot.
pub fn extension(format: FileFormat) -> &'static str {
    match format {
        FileFormat::JsonLines => "jsonl",
        FileFormat::Csv => "csv",
        FileFormat::Parquet => "parquet",
        FileFormat::Arrow => "arrow",
    }
}

/// How CSV files are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "snake_case")]
pub struct CsvLayout {
    /// Whether the first line names the columns. Without it, cells belong to the declared columns in order.
    pub header: bool,
    /// The character between cells, one of ASCII.
    pub delimiter: char,
}

impl Default for CsvLayout {
    fn default() -> Self {
        Self { header: true, delimiter: ',' }
    }
}

impl From<CsvLayout> for CsvOptions {
    fn from(layout: CsvLayout) -> Self {
        Self { header: layout.header, delimiter: layout.delimiter }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extensions_lead_back() {
        for format in [FileFormat::JsonLines, FileFormat::Csv, FileFormat::Parquet, FileFormat::Arrow] {
            assert_eq!(by_extension(&Path::new("x").with_extension(extension(format))), Some(format));
        }
        assert_eq!(by_extension(Path::new("data/*.CSV")), Some(FileFormat::Csv));
        for none in ["a.json", "a", "csv", "data/*", "out/"] {
            assert_eq!(by_extension(Path::new(none)), None, "{none}");
        }
    }

    #[test]
    fn a_header_is_expected_unless_it_is_denied() {
        let layout: CsvLayout = serde_json::from_str(r#"{"delimiter":";"}"#).unwrap();
        assert_eq!(CsvOptions::from(layout), CsvOptions { header: true, delimiter: ';' });
        assert!(serde_json::from_str::<CsvLayout>(r#"{"delimeter":";"}"#).is_err());
    }
}
