//! `afferent infer-schema`: samples a file and writes the declaration that a pipeline needs.

use std::path::PathBuf;
use std::process::ExitCode;

use afferent_formats::{FileFormat, FormatError, infer_file};
use anyhow::{Context, bail};
use clap::Args;

use super::print;

/// Sample a file and write the schema declaration for it.
#[derive(Args)]
#[command(after_help = "Examples:
  afferent infer-schema readings.jsonl
  afferent infer-schema --format csv export.txt")]
pub struct InferSchema {
    /// JSON lines, CSV, Parquet or Arrow IPC file
    file: PathBuf,
    /// json_lines, csv, parquet or arrow [default: by the file's ending]
    #[arg(long)]
    format: Option<String>,
}

impl InferSchema {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let by_ending = self.file.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
        let format = match self.format.as_deref().unwrap_or(by_ending) {
            "json_lines" | "jsonl" | "ndjson" | "json" => FileFormat::JsonLines,
            "csv" | "tsv" => FileFormat::Csv,
            "parquet" => FileFormat::Parquet,
            "arrow" | "arrows" | "ipc" | "feather" => FileFormat::Arrow,
            "" => bail!(
                "{} has no ending that tells the format; say --format json_lines, csv, parquet or arrow",
                self.file.display()
            ),
            other => bail!("`{other}` is no known format; say --format json_lines, csv, parquet or arrow"),
        };
        let declaration = match infer_file(&self.file, format) {
            Ok(declaration) => declaration,
            // That names the file already.
            Err(error @ FormatError::File { .. }) => return Err(error.into()),
            Err(error) => {
                return Err(error).with_context(|| format!("sampling {} as {}", self.file.display(), format.name()));
            }
        };
        print(&format!("schema: {declaration}\n"))?;
        Ok(ExitCode::SUCCESS)
    }
}
