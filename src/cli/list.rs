//! `afferent list`: the components, each with its first sentence, or one with its example and options.

use std::collections::BTreeSet;
use std::process::ExitCode;

use afferent_engine::registry::{Entry, Registry};
use anyhow::bail;
use clap::Args;

use super::print;
use crate::catalog;

/// List the components, or show one with its options.
#[derive(Args)]
#[command(after_help = "Examples:
  afferent list
  afferent list mqtt")]
pub struct List {
    /// A component's name
    component: Option<String>,
}

impl List {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let registry = catalog::registry();
        let text = match &self.component {
            None => overview(&registry),
            Some(name) => {
                let found = [
                    registry.sources.get(name.as_str()).map(|entry| details("source", entry)),
                    registry.operators.get(name.as_str()).map(|entry| details("operator", entry)),
                    registry.sinks.get(name.as_str()).map(|entry| details("sink", entry)),
                ];
                let text: String = found.into_iter().flatten().collect();
                if text.is_empty() {
                    bail!("no component is called `{name}`; there are {}", names(&registry));
                }
                text
            }
        };
        print(&text)?;
        Ok(ExitCode::SUCCESS)
    }
}

fn names(registry: &Registry) -> String {
    let sources = registry.sources.keys().copied();
    let names: BTreeSet<&str> = sources.chain(registry.operators.keys().copied()).chain(registry.sinks.keys().copied()).collect();
    names.into_iter().collect::<Vec<_>>().join(", ")
}

fn overview(registry: &Registry) -> String {
    let mut text = String::new();
    section(&mut text, "sources", registry.sources.values().map(|entry| (entry.name, entry.summary())));
    section(&mut text, "operators", registry.operators.values().map(|entry| (entry.name, entry.summary())));
    section(&mut text, "sinks", registry.sinks.values().map(|entry| (entry.name, entry.summary())));
    text
}

fn section(text: &mut String, title: &str, entries: impl Iterator<Item = (&'static str, String)>) {
    text.push_str(&format!("{title}\n"));
    for (name, summary) in entries {
        text.push_str(&format!("  {name:<10} {summary}\n"));
    }
}

fn details<P>(kind: &str, entry: &Entry<P>) -> String {
    let mut text = format!("{kind} {}: {}\n\n  {}\n\n", entry.name, entry.summary(), entry.example.trim().replace('\n', "\n  "));
    let properties = entry.schema.get("properties").and_then(serde_json::Value::as_object);
    for (name, property) in properties.into_iter().flatten() {
        let meaning = property.get("description").and_then(serde_json::Value::as_str).unwrap_or_default().replace('\n', " ");
        let default = property.get("default").map(|value| format!(" [default: {value}]")).unwrap_or_default();
        text.push_str(&format!("  {name}: {meaning}{default}\n"));
    }
    text.push('\n');
    text
}
