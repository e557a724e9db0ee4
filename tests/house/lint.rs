//! Bad pipeline files, each with the very text that `afferent check` says about it: `tests/lint/<case>.yaml`
//! and `<case>.txt`. `UPDATE=1` writes the texts anew; read them as a stranger would before committing them.
//! What is unknown or of the wrong type the JSON Schema must refuse as well, so that editors know it, too.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::generated::{faults, pipelines_in, validator, yaml};
use crate::tools::{Scratch, afferent, root, succeed, told};

/// What the cases are about, and the codes that each must show; a new text cannot lose them.
const CASES: [(&str, &[&str]); 20] = [
    ("ambiguous-input", &["ambiguous-input"]),
    ("cycle", &["cycle"]),
    ("different-schemas", &["different-schemas", "duplicate-input"]),
    ("duplicate-key", &["duplicate-key"]),
    ("guarantee-not-kept", &["guarantee-not-kept"]),
    ("missing-input", &["missing-input"]),
    ("missing-model", &["missing-model"]),
    ("missing-variable", &["missing-variable"]),
    (
        "problems-in-every-stage",
        &[
            "bad-item",
            "bad-step",
            "bad-value",
            "broker-url",
            "invalid-name",
            "invalid-value",
            "missing-file",
            "missing-model",
            "qos-2",
            "refused-sql",
            "topic-template",
            "unknown-column",
        ],
    ),
    ("refused-sql", &["invalid-sql", "refused-sql"]),
    ("several-problems", &["invalid-value", "missing-key", "unknown-key", "unknown-stage", "wrong-type"]),
    ("state-behind-group", &["state-behind-group"]),
    ("syntax-error", &["syntax"]),
    ("topic-captures", &["topic-captures", "topic-pattern"]),
    ("unknown-column", &["unknown-column"]),
    ("unknown-component", &["unknown-component"]),
    ("unknown-key", &["unknown-key"]),
    ("unknown-stage", &["unknown-output", "unknown-stage"]),
    ("wrong-tensor-shape", &["wrong-tensor-shape", "wrong-tensor-type"]),
    ("wrong-type", &["wrong-type"]),
];

/// The codes of what the JSON Schema can know, too.
const KNOWN_TO_THE_SCHEMA: [&str; 3] = ["unknown-component", "unknown-key", "wrong-type"];

#[test]
fn every_case_is_told_in_these_very_words() {
    let update = std::env::var_os("UPDATE").is_some();
    let mut wrong = Vec::new();
    for (case, _) in CASES {
        // A name without folders, so that the text is the same wherever the repository lies.
        let output = check(&folder()).arg(format!("{case}.yaml")).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{case}: {}", told(&output));
        assert!(output.stderr.is_empty(), "{case}: {}", String::from_utf8_lossy(&output.stderr));
        let now = String::from_utf8(output.stdout).unwrap();
        let file = folder().join(format!("{case}.txt"));
        if update {
            std::fs::write(&file, now).unwrap();
        } else if std::fs::read_to_string(&file).unwrap_or_default() != now {
            wrong.push(format!("--- {case}, now\n{now}"));
        }
    }
    assert!(wrong.is_empty(), "UPDATE=1 writes these texts, if they are better:\n{}", wrong.join("\n"));
}

#[test]
fn every_case_is_listed_and_shows_what_it_is_about() {
    let listed: BTreeSet<String> = CASES.iter().flat_map(|(case, _)| [format!("{case}.yaml"), format!("{case}.txt")]).collect();
    let there: BTreeSet<String> = std::fs::read_dir(folder())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| name.ends_with(".yaml") || name.ends_with(".txt"))
        .collect();
    assert_eq!(there, listed);
    let files: Vec<PathBuf> = CASES.iter().map(|(case, _)| PathBuf::from(format!("{case}.yaml"))).collect();
    let found = codes(&folder(), &files);
    for (case, wanted) in CASES {
        let shown = &found[&format!("{case}.yaml")];
        for code in wanted {
            assert!(shown.contains(*code), "{case} does not show {code}, only {shown:?}");
        }
    }
}

#[test]
fn every_refused_clause_is_told_at_its_own_place() {
    let output = check(&folder()).args(["--format", "json", "refused-sql.yaml"]).output().unwrap();
    let findings: Value = serde_json::from_slice(&output.stdout).unwrap();
    let text = std::fs::read_to_string(folder().join("refused-sql.yaml")).unwrap();
    let marked: Vec<&str> = findings.as_array().unwrap().iter().map(|finding| marked(finding, &text)).collect();
    for clause in ["avg", "group", "order", "limit", "join", "row_number", "distinct", "now"] {
        assert!(marked.contains(&clause), "{clause} is not marked, only {marked:?}");
    }
}

/// The text at the place of a finding.
fn marked<'t>(finding: &Value, text: &'t str) -> &'t str {
    let end = |which: &str| usize::try_from(finding["span"][which].as_u64().unwrap()).unwrap();
    &text[end("start")..end("end")]
}

#[test]
fn what_the_cases_show_the_schema_refuses_too() {
    let validator = validator();
    let files: Vec<PathBuf> = CASES.iter().map(|(case, _)| PathBuf::from(format!("{case}.yaml"))).collect();
    let mut refused = 0;
    for (file, codes) in codes(&folder(), &files) {
        if codes.iter().any(|code| KNOWN_TO_THE_SCHEMA.contains(&code.as_str())) {
            let text = std::fs::read_to_string(folder().join(&file)).unwrap();
            assert!(!faults(&validator, &yaml(&text)).is_empty(), "{file} shows {codes:?}, and the schema accepts it");
            refused += 1;
        }
    }
    assert!(refused >= 4, "only {refused} cases");
}

/// Nothing is wrong with it.
const SOUND: &str = r#"name: sound
description: Nothing is wrong with it.
commit_interval: 50ms
sources:
  messages:
    mqtt: { url: "mqtt://localhost:1883", topics: ["plant/{device}"], qos: at_least_once, max_payload: 1MiB }
operators:
  readings:
    decode: { format: json, schema: { ts: timestamp_ms, values: { list: float32 } }, event_time: ts, keep: [device] }
    queue: { rows: 100, bytes: 1MiB }
    overflow: block
  frames:
    window: { by: [device], rows: 10, select: [device, max(ts) as ts] }
    inputs: [readings]
sinks:
  out:
    table: { name: frames, commit_every: 5s }
"#;

/// One fault at a time in the sound pipeline: what is replaced, by what, and the code.
const FAULTS: [(&str, &str, &str); 24] = [
    // What is unknown.
    ("description:", "descripton:", "unknown-key"),
    ("qos:", "qualitiy:", "unknown-key"),
    ("queue: { rows:", "queue: { row:", "unknown-key"),
    ("overflow: block", "overflows: block", "unknown-key"),
    ("{ list: float32 }", "{ list: float32, size: 3 }", "unknown-key"),
    ("{ name: frames,", "{ name: frames, mode: append,", "unknown-key"),
    ("sinks:", "sources_too: {}\nsinks:", "unknown-key"),
    ("    mqtt: {", "    mqqt: {", "unknown-component"),
    ("    window: {", "    frame: {", "unknown-component"),
    ("    table: {", "    window: {", "unknown-component"),
    // What is of the wrong type.
    ("description: Nothing is wrong with it.", "description: [a, b]", "wrong-type"),
    ("url: \"mqtt://localhost:1883\"", "url: 1883", "wrong-type"),
    ("topics: [\"plant/{device}\"]", "topics: \"plant/{device}\"", "wrong-type"),
    ("by: [device]", "by: device", "wrong-type"),
    ("rows: 10,", "rows: \"10\",", "wrong-type"),
    ("rows: 10,", "rows: 1.5,", "wrong-type"),
    ("rows: 100,", "rows: many,", "wrong-type"),
    ("event_time: ts", "event_time: true", "wrong-type"),
    ("inputs: [readings]", "inputs: readings", "wrong-type"),
    // Values that no such key can have.
    ("qos: at_least_once", "qos: twice", "invalid-value"),
    ("50ms", "soon", "invalid-value"),
    ("ts: timestamp_ms,", "ts: time,", "invalid-value"),
    ("overflow: block", "overflow: drop", "invalid-value"),
    ("rows: 10,", "rows: 0,", "invalid-value"),
];

#[test]
fn one_fault_at_a_time_lint_and_schema_agree() {
    let validator = validator();
    assert_eq!(faults(&validator, &yaml(SOUND)), Vec::<String>::new());
    let scratch = Scratch::new();
    let mut files = vec![scratch.write("sound.yaml", SOUND)];
    for (number, (from, to, _)) in FAULTS.iter().enumerate() {
        assert_eq!(SOUND.matches(from).count(), 1, "{from:?} stands once in the sound file");
        files.push(scratch.write(&format!("{number}.yaml"), SOUND.replace(from, to)));
    }
    let found = codes(&scratch.path(""), &files);
    assert_eq!(found[&files[0].display().to_string()], BTreeSet::new());
    for ((from, to, code), file) in FAULTS.iter().zip(&files[1..]) {
        let told = &found[&file.display().to_string()];
        assert_eq!(told, &BTreeSet::from([code.to_string()]), "{from} -> {to}");
        let text = std::fs::read_to_string(file).unwrap();
        assert!(!faults(&validator, &yaml(&text)).is_empty(), "{from} -> {to}: the schema accepts it");
    }
}

#[test]
fn what_is_shipped_is_sound() {
    // That the schema accepts them too is told in `generated`.
    succeed(check(root()).args(pipelines_in("examples")));
    let models = root().join("examples/shuttle-anomaly/models");
    succeed(check(root()).arg("--models").arg(models).args(pipelines_in("tests/pipelines")));
}

fn folder() -> PathBuf {
    root().join("tests/lint")
}

/// The check, in a folder, with nothing from outside that it could find: no data directory, no variables.
fn check(folder: &Path) -> Command {
    let mut command = afferent();
    command.arg("check").current_dir(folder).env("AFFERENT_DATA_DIR", "/nonexistent/afferent");
    command
}

/// The codes of all findings by file, also of files without any.
fn codes(folder: &Path, files: &[PathBuf]) -> BTreeMap<String, BTreeSet<String>> {
    let output = check(folder).args(["--format", "json"]).args(files).output().unwrap();
    let findings: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", told(&output)));
    let mut found: BTreeMap<String, BTreeSet<String>> =
        files.iter().map(|file| (file.display().to_string(), BTreeSet::new())).collect();
    for finding in findings {
        let word = |key: &str| finding[key].as_str().unwrap().to_owned();
        found.get_mut(&word("file")).expect("findings are of these files").insert(word("code"));
    }
    found
}
