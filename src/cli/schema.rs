//! `afferent schema`: the JSON Schema of pipeline files, and the reference page, both from the components'
//! own structs.

use std::process::ExitCode;

use clap::{Args, ValueEnum};

use super::print;
use crate::catalog;

/// Print the JSON Schema of pipeline files, for editors.
#[derive(Args)]
#[command(after_help = "Examples:
  afferent schema > pipeline.schema.json
  afferent schema --format reference > docs/reference.md

In a pipeline file, the first line then tells the editor:
  # yaml-language-server: $schema=pipeline.schema.json")]
pub struct SchemaCommand {
    /// JSON Schema, or the reference page in Markdown
    #[arg(long, default_value = "json-schema")]
    format: Format,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    JsonSchema,
    Reference,
}

impl SchemaCommand {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let registry = catalog::registry();
        print(&match self.format {
            Format::JsonSchema => format!("{}\n", serde_json::to_string_pretty(&afferent_pipelines::pipeline_schema(&registry))?),
            Format::Reference => afferent_pipelines::reference(&registry),
        })?;
        Ok(ExitCode::SUCCESS)
    }
}
