//! What is generated from the components' structs and committed: the JSON Schema that editors read and the
//! reference page. Both must be current, the schema valid, and every example in them a thing that works.

use std::path::PathBuf;

use afferent_engine::registry::Registry;
use jsonschema::Validator;
use serde_json::{Value, json};

use crate::tools::{afferent, root, succeed};

#[test]
fn the_committed_schema_is_the_commands() {
    is_current("docs/pipeline.schema.json", &[]);
}

#[test]
fn the_committed_reference_is_the_commands() {
    is_current("docs/reference.md", &["--format", "reference"]);
}

fn is_current(committed: &str, options: &[&str]) {
    let output = succeed(afferent().arg("schema").args(options));
    let now = String::from_utf8(output.stdout).unwrap();
    let then = std::fs::read_to_string(root().join(committed)).unwrap_or_default();
    // Not assert_eq!: it would print both, thousands of lines each.
    if let Some((line, difference)) = first_difference(&now, &then) {
        panic!("{committed} is not current from line {line} on ({difference}); `make generated` mends it");
    }
}

/// Number and words of the first line that is not the same.
fn first_difference(now: &str, then: &str) -> Option<(usize, String)> {
    let (mut now, mut then) = (now.split('\n'), then.split('\n'));
    let mut line = 1;
    loop {
        match (now.next(), then.next()) {
            (None, None) => return None,
            (now, then) if now == then => line += 1,
            (now, then) => {
                return Some((line, format!("committed {:?}, now {:?}", then.unwrap_or_default(), now.unwrap_or_default())));
            }
        }
    }
}

#[test]
fn the_first_difference_is_found() {
    assert_eq!(first_difference("a\nb\n", "a\nb\n"), None);
    assert_eq!(first_difference("a\nb\n", "a\nc\n").unwrap().0, 2);
    assert_eq!(first_difference("a\n", "a\nb\n").unwrap().0, 2);
    assert_eq!(first_difference("a\n", "").unwrap().0, 1);
}

#[test]
fn the_schema_is_itself_valid() {
    let schema = schema();
    assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
    if let Err(error) = jsonschema::meta::validate(&schema) {
        panic!("{} at {}", error, error.instance_path());
    }
}

#[test]
fn the_schema_accepts_every_shipped_pipeline_as_it_is_written() {
    let validator = validator();
    let mut accepted = 0;
    for file in shipped() {
        let text = std::fs::read_to_string(&file).unwrap();
        let faults = faults(&validator, &yaml(&text));
        assert!(faults.is_empty(), "{}: {faults:#?}", file.display());
        accepted += 1;
    }
    assert!(accepted >= 3, "only {accepted} pipelines");
}

#[test]
fn the_schema_accepts_the_example_of_every_component() {
    let validator = validator();
    let mut registry = Registry::new();
    afferent_connectors::register(&mut registry);
    afferent_operators::register(&mut registry);
    let (source, sink) = (json!({ "a": { "generate": { "columns": { "id": "sequence" } } } }), json!({ "z": { "discard": {} } }));
    let sources = registry.sources.values().map(|entry| ("sources", entry.name, entry.example));
    let operators = registry.operators.values().map(|entry| ("operators", entry.name, entry.example));
    let sinks = registry.sinks.values().map(|entry| ("sinks", entry.name, entry.example));
    let examples: Vec<_> = sources.chain(operators).chain(sinks).collect();
    assert!(examples.len() >= 18, "only {} components", examples.len());
    for (section, name, example) in examples {
        let mut pipeline = json!({ "name": "p", "sources": source, "operators": {}, "sinks": sink });
        pipeline[section]["example"] = yaml(example);
        let faults = faults(&validator, &pipeline);
        assert!(faults.is_empty(), "{section}, {name}: {faults:#?}\n{example}");
    }
}

/// The pipelines under `examples` and `tests/pipelines`: all of them are sound.
fn shipped() -> Vec<PathBuf> {
    ["examples", "tests/pipelines"].into_iter().flat_map(pipelines_in).collect()
}

/// The YAML files in the folders of a folder of the repository.
pub fn pipelines_in(folder: &str) -> Vec<PathBuf> {
    let inside = |path: PathBuf| std::fs::read_dir(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut files = Vec::new();
    for entry in inside(root().join(folder)) {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(inside(path).map(|entry| entry.unwrap().path()));
        }
    }
    files.retain(|file| file.extension().is_some_and(|ending| ending == "yaml"));
    assert!(!files.is_empty(), "no pipelines in {folder}");
    files.sort();
    files
}

/// The schema as the command prints it.
fn schema() -> Value {
    serde_json::from_slice(&succeed(afferent().arg("schema")).stdout).unwrap()
}

/// What editors judge pipeline files with.
pub fn validator() -> Validator {
    jsonschema::draft202012::new(&schema()).unwrap()
}

/// YAML as an editor reads it.
pub fn yaml(text: &str) -> Value {
    serde_saphyr::from_str(text).unwrap_or_else(|e| panic!("{e}\n{text}"))
}

/// Every fault of a pipeline with its place.
pub fn faults(validator: &Validator, pipeline: &Value) -> Vec<String> {
    validator.iter_errors(pipeline).map(|error| format!("{}: {error}", error.instance_path())).collect()
}
