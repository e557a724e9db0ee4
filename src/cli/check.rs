//! `afferent check`: every problem of pipeline files at once, without a broker and without running.

use std::path::PathBuf;
use std::process::ExitCode;

use afferent_pipelines::Severity;
use clap::{Args, ValueEnum};

use super::files::Checked;
use super::{FAILED, Places, colours, print};
use crate::catalog;

/// Find every problem of pipeline files without running them.
#[derive(Args)]
#[command(after_help = "Exit code: 0 sound, 1 problems found, 2 wrong usage.

Examples:
  afferent check pipeline.yaml
  afferent check --format json examples/*/*.yaml")]
pub struct Check {
    /// Pipeline files
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// How findings are printed
    #[arg(long, default_value = "text")]
    format: Format,
    #[command(flatten)]
    places: Places,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Format {
    Text,
    Json,
}

impl Check {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let (registry, shared) = (catalog::registry(), self.places.shared());
        let mut failed = false;
        let mut findings = Vec::new();
        for file in &self.files {
            let checked = match Checked::read(file, &registry, &shared) {
                Ok(checked) => checked,
                // The other files are looked at all the same.
                Err(error) => {
                    eprintln!("error: {error:#}");
                    failed = true;
                    continue;
                }
            };
            failed |= checked.plan.is_none();
            match self.format {
                Format::Json => findings.extend(checked.diagnostics),
                Format::Text => print(&told(&checked))?,
            }
        }
        if self.format == Format::Json {
            print(&format!("{}\n", serde_json::to_string_pretty(&findings)?))?;
        }
        Ok(if failed { ExitCode::from(FAILED) } else { ExitCode::SUCCESS })
    }
}

fn told(checked: &Checked) -> String {
    let mut text = checked.report(colours(&std::io::stdout()));
    let errors = checked.diagnostics.iter().filter(|finding| finding.severity == Severity::Error).count();
    match &checked.plan {
        Some(plan) => {
            text.push_str(&format!("{}: sound\n", checked.path.display()));
            for path in &plan.guarantees {
                text.push_str(&format!(
                    "  {} -> {}: {} ({})\n",
                    path.source,
                    path.sink,
                    path.guarantee.word(),
                    path.reasons.join("; ")
                ));
            }
            for note in &plan.notes {
                text.push_str(&format!("  note: {note}\n"));
            }
        }
        None => text.push_str(&format!("{}: {errors} problem{}\n", checked.path.display(), if errors == 1 { "" } else { "s" })),
    }
    text
}
