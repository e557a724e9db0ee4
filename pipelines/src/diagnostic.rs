//! What is wrong with a pipeline file, as data: code, place, words, suggestion. The lint makes them, the
//! command shows them as text in the style of rustc or as JSON. A diagnostic is never an error type: a file
//! may have many, and all are told at once.

use annotate_snippets::{AnnotationKind, Level, Renderer, Snippet};
use serde::Serialize;

use crate::document::{Span, line_column};

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// The pipeline does not run.
    Error,
    /// It runs, but probably not as meant.
    Warning,
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Diagnostic {
    /// Stable code, such as `unknown-key`.
    pub code: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// What is wrong, lower case, no full stop.
    pub message: String,
    /// The file as it was named by the caller.
    pub file: String,
    /// The place, in bytes of the file.
    pub span: Span,
    /// Line of its first character, from 1.
    pub line: usize,
    /// Column of its first character, from 1, in characters.
    pub column: usize,
    /// What to do about it.
    pub help: Option<String>,
    /// A few words under the marked place.
    pub label: Option<String>,
}

impl Diagnostic {
    /// An error at `span`; file, line and column are filled in by [`Diagnostics::finish`].
    pub fn error(code: &'static str, span: Span, message: impl Into<String>) -> Self {
        Self {
            code,
            severity: Severity::Error,
            message: message.into(),
            file: String::new(),
            span,
            line: 0,
            column: 0,
            help: None,
            label: None,
        }
    }

    /// A warning at `span`.
    pub fn warning(code: &'static str, span: Span, message: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, ..Self::error(code, span, message) }
    }

    /// With a suggestion, if there is one.
    #[must_use]
    pub fn help(mut self, help: impl Into<Option<String>>) -> Self {
        self.help = help.into();
        self
    }

    /// With words under the marked place.
    #[must_use]
    pub fn label(mut self, label: impl Into<String>) -> Self {
        self.label = Some(label.into());
        self
    }
}

/// The findings of one file, as they come.
#[derive(Debug, Default)]
pub struct Diagnostics {
    found: Vec<Diagnostic>,
}

impl Diagnostics {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// One more.
    pub fn push(&mut self, diagnostic: Diagnostic) {
        self.found.push(diagnostic);
    }

    /// Whether one of them keeps the pipeline from running.
    pub fn has_errors(&self) -> bool {
        self.found.iter().any(|d| d.severity == Severity::Error)
    }

    /// All of them in the order of the file, each once, with file, line and column.
    pub fn finish(mut self, text: &str, file: &str) -> Vec<Diagnostic> {
        for diagnostic in &mut self.found {
            (diagnostic.line, diagnostic.column) = line_column(text, diagnostic.span.start);
            file.clone_into(&mut diagnostic.file);
        }
        self.found.sort_by(|a, b| (a.span.start, a.span.end, a.code).cmp(&(b.span.start, b.span.end, b.code)));
        self.found.dedup();
        self.found
    }
}

/// Diagnostics of one file as text in the style of rustc, a blank line between them, a newline at the end.
/// `text` is what the file holds; `styled` adds colours.
pub fn render(diagnostics: &[Diagnostic], text: &str, styled: bool) -> String {
    let renderer = if styled { Renderer::styled() } else { Renderer::plain() };
    let mut rendered = String::new();
    for (number, diagnostic) in diagnostics.iter().enumerate() {
        if number > 0 {
            rendered.push('\n');
        }
        let level = match diagnostic.severity {
            Severity::Error => Level::ERROR,
            Severity::Warning => Level::WARNING,
        };
        let span = clamped(diagnostic.span, text);
        let annotation = AnnotationKind::Primary.span(span.start..span.end).label(diagnostic.label.as_deref());
        let snippet = Snippet::source(text).path(diagnostic.file.as_str()).annotation(annotation);
        let mut group = level.primary_title(diagnostic.message.as_str()).id(diagnostic.code).element(snippet);
        if let Some(help) = &diagnostic.help {
            group = group.element(Level::HELP.message(help.as_str()));
        }
        rendered.push_str(&renderer.render(&[group]));
        rendered.push('\n');
    }
    rendered
}

/// The span within the text and on character boundaries: the renderer panics otherwise.
fn clamped(span: Span, text: &str) -> Span {
    let boundary = |mut at: usize| {
        at = at.min(text.len());
        while !text.is_char_boundary(at) {
            at -= 1;
        }
        at
    };
    let start = boundary(span.start);
    Span { start, end: boundary(span.end).max(start) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_diagnostic_shows_code_place_snippet_and_help() {
        let text = "name: x\nsuorces: {}\n";
        let mut found = Diagnostics::new();
        found.push(
            Diagnostic::error("unknown-key", Span { start: 8, end: 15 }, "unknown key `suorces`")
                .help("did you mean `sources`?".to_owned()),
        );
        let found = found.finish(text, "p.yaml");
        assert_eq!((found[0].line, found[0].column), (2, 1));
        let shown = render(&found, text, false);
        for part in [
            "error[unknown-key]: unknown key `suorces`",
            "p.yaml:2:1",
            "2 | suorces: {}",
            "^^^^^^^",
            "help: did you mean `sources`?",
        ] {
            assert!(shown.contains(part), "{part:?} is not in\n{shown}");
        }
    }

    #[test]
    fn they_come_in_the_order_of_the_file_and_once() {
        let text = "a\nä b\n";
        let mut found = Diagnostics::new();
        let late = Diagnostic::warning("b", Span { start: 5, end: 6 }, "late");
        found.push(late.clone());
        found.push(late);
        found.push(Diagnostic::error("a", Span { start: 0, end: 1 }, "early"));
        assert!(found.has_errors());
        let found = found.finish(text, "f");
        let places: Vec<_> = found.iter().map(|d| (d.code, d.line, d.column)).collect();
        assert_eq!(places, [("a", 1, 1), ("b", 2, 3)]);
    }

    #[test]
    fn a_place_behind_the_end_of_the_file_is_shown_and_json_has_the_fields() {
        let found = [Diagnostic::error("syntax", Span { start: 90, end: 99 }, "unfinished")];
        assert!(render(&found, "a: [", false).contains("unfinished"));
        assert!(render(&found, "", true).contains("unfinished"));
        let json = serde_json::to_value(&found[0]).unwrap();
        assert_eq!(json["severity"], "error");
        assert_eq!(json["span"]["start"], 90);
    }
}
