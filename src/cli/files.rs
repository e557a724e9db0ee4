//! Pipeline files on the command line: read, checked, and their findings shown.

use std::path::{Path, PathBuf};

use afferent_engine::registry::Registry;
use afferent_pipelines::{Diagnostic, Plan, render};
use anyhow::Context;

use crate::catalog::Shared;

/// What came of one file.
pub struct Checked {
    /// The file as it was named.
    pub path: PathBuf,
    /// Its text.
    pub text: String,
    /// The plan, when there is no error.
    pub plan: Option<Plan>,
    /// All findings, in the order of their places.
    pub diagnostics: Vec<Diagnostic>,
}

impl Checked {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// When it cannot be read; what is wrong inside it is in the findings.
    pub fn read(path: &Path, registry: &Registry, shared: &Shared) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        let context = shared.plan_context(path);
        let (plan, diagnostics) = afferent_pipelines::check(&text, &path.display().to_string(), registry, &context);
        Ok(Self { path: path.to_owned(), text, plan, diagnostics })
    }

    /// The findings as text; `colours` for a stream that a person looks at.
    pub fn report(&self, colours: bool) -> String {
        render(&self.diagnostics, &self.text, colours)
    }
}
