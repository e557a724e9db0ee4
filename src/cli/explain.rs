//! `afferent explain`: draws the planned graph.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};

use super::files::Checked;
use super::{FAILED, Places, colours, print};
use crate::catalog;

/// Draw the planned graph with its schemas and guarantees.
#[derive(Args)]
#[command(after_help = "Examples:
  afferent explain pipeline.yaml
  afferent explain --format mermaid pipeline.yaml > graph.mmd")]
pub struct Explain {
    /// Pipeline file
    file: PathBuf,
    /// Text for a terminal, or a Mermaid flowchart
    #[arg(long, default_value = "text")]
    format: Format,
    #[command(flatten)]
    places: Places,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    Text,
    Mermaid,
}

impl Explain {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let checked = Checked::read(&self.file, &catalog::registry(), &self.places.shared())?;
        eprint!("{}", checked.report(colours(&std::io::stderr())));
        let Some(plan) = &checked.plan else { return Ok(ExitCode::from(FAILED)) };
        print(&match self.format {
            Format::Text => afferent_pipelines::explain::text(plan),
            Format::Mermaid => afferent_pipelines::explain::mermaid(plan),
        })?;
        Ok(ExitCode::SUCCESS)
    }
}
