//! What the log says, as text and as JSON. The invariant: every line of a stage bears the names of its pipeline and of
//! itself, whichever level is logged and whoever writes the line.

use std::time::Duration;

use serde_json::Value;

use crate::tools::{Scratch, succeed, wait_until};

/// The sink tells at its end how many rows it has discarded.
const COUNTED: &str = "name: counted
sources:
  ticks: { generate: { rows: 10, columns: { id: sequence } } }
sinks:
  out: { discard: {} }
";

/// The sink never opens, which the engine tells.
const STUCK: &str = "name: stuck
sources:
  ticks: { generate: { rate: 10, columns: { id: sequence } } }
sinks:
  nowhere: { mqtt: { url: \"mqtt://127.0.0.1:1\", topic: a, format: json } }
";

/// Pipeline and stage of each line that has these words.
fn named(log: &str, words: &str) -> Vec<(String, String)> {
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let with_words = lines.filter(|line| line["fields"]["message"].as_str().is_some_and(|told| told.contains(words)));
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    with_words.map(|line| (text(&line["spans"][0]["pipeline"]), text(&line["spans"][0]["stage"]))).collect()
}

#[test]
fn every_line_of_a_stage_names_it_and_its_pipeline() {
    let scratch = Scratch::new();
    let pipeline = scratch.write("counted.yaml", COUNTED);
    let output = succeed(scratch.afferent("run").args(["--log-format", "json"]).arg(&pipeline));
    let log = String::from_utf8_lossy(&output.stderr);
    assert_eq!(named(&log, "rows counted"), [("counted".to_owned(), "out".to_owned())], "{log}");
    for line in log.lines().filter(|line| line.starts_with('{')) {
        assert!(serde_json::from_str::<Value>(line).is_ok(), "{line}");
    }

    let output = succeed(scratch.afferent("run").args(["--fresh"]).arg(&pipeline));
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(log.contains("stage{pipeline=counted stage=out}: rows counted"), "{log}");
}

#[test]
fn warnings_name_their_stage_also_where_nothing_less_is_logged() {
    let scratch = Scratch::new();
    let pipeline = scratch.write("stuck.yaml", STUCK);
    let mut running = scratch.start("stuck", &[&pipeline], |command| {
        command.args(["--log-format", "json"]).env("AFFERENT_LOG", "warn");
    });
    wait_until("it says that it tries again", Duration::from_secs(30), || {
        !named(&scratch.log("stuck"), "will try again").is_empty()
    });
    running.kill();
    let named = named(&scratch.log("stuck"), "will try again");
    assert!(named.iter().all(|(pipeline, stage)| pipeline == "stuck" && stage == "nowhere"), "{named:?}");
}
