//! Golden pipelines: `tests/pipelines/CASE` holds a pipeline, its input and what it must write. Each case runs
//! three ways: straight, killed three times and resumed, and with queues of one row. The invariant: all three
//! give the expected rows exactly, dead letters included. `UPDATE=1` writes what is expected anew.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::tools::{Scratch, root, succeed, told, wait_until};

/// Crashes before a case may run to its end.
const KILLS: usize = 3;
/// Latest instant of a crash after the start; the input of every case lasts 3 s, so that each is midway.
const LATEST_KILL_MS: u64 = 600;
/// What is stored of a reject, without the time of its rejection.
const DEAD_LETTERS: &str = "select stage, position, code, reason, encode(bytes, 'hex') as bytes, row from dead_letters \
                            order by stage, position, row";

macro_rules! cases {
    ($($case:ident),* $(,)?) => {
        const CASES: &[&str] = &[$(stringify!($case)),*];

        $(
            #[test]
            fn $case() {
                golden(stringify!($case));
            }
        )*
    };
}

cases! {
    batch, dead_letters, decode, fan_in, infer, parallel, pass, rejected, route, route_all, sql, window, window_emit,
}

#[test]
fn every_folder_is_a_case() {
    let mut folders: Vec<String> =
        std::fs::read_dir(folder("")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    folders.sort();
    assert_eq!(folders, CASES);
}

fn golden(case: &str) {
    let straight = prepare(case, str::to_owned);
    finish(&straight, case);
    let found = written(&straight, case);
    if std::env::var_os("UPDATE").is_some() {
        for (name, text) in &found {
            std::fs::write(folder(case).join(name), text).unwrap();
        }
    }
    let expected = expected(case);
    assert!(!expected.is_empty(), "{case} expects nothing; write it with UPDATE=1 and look at it");
    compare(&expected, &found, case, "straight");

    let tiny = prepare(case, with_tiny_queues);
    finish(&tiny, case);
    compare(&expected, &written(&tiny, case), case, "with queues of one row");

    let killed = prepare(case, str::to_owned);
    let kills: Vec<u64> = (0..KILLS).map(|_| fastrand::u64(..LATEST_KILL_MS)).collect();
    for (number, after) in kills.iter().enumerate() {
        let log = format!("killed-{number}");
        let mut running = killed.start(&log, &[Path::new("pipeline.yaml")], |command| {
            command.args(models()).env("PACE", "realtime");
        });
        wait_until("the checkpoint store is open", Duration::from_secs(60), || {
            assert!(running.is_running(), "{case} ended before the crash:\n{}", killed.log(&log));
            killed.data_dir().join("pipelines").exists()
        });
        std::thread::sleep(Duration::from_millis(*after));
        assert!(running.is_running(), "{case} ended before the crash:\n{}", killed.log(&log));
        running.kill();
    }
    finish(&killed, case);
    compare(&expected, &written(&killed, case), case, &format!("killed after {kills:?} ms and resumed"));
}

/// The folder of a case.
fn folder(case: &str) -> PathBuf {
    root().join("tests/pipelines").join(case)
}

/// A copy of the case to run in, with its pipeline changed by `change`.
fn prepare(case: &str, change: impl Fn(&str) -> String) -> Scratch {
    let scratch = Scratch::new();
    for entry in std::fs::read_dir(folder(case)).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if name == "pipeline.yaml" {
            scratch.write(&name, change(&std::fs::read_to_string(entry.path()).unwrap()));
        } else if name.starts_with("input") {
            std::fs::copy(entry.path(), scratch.path(&name)).unwrap();
        }
    }
    scratch
}

/// The pipeline with a queue of one row in front of every stage. Relies on the cases' layout: sections at the
/// left margin, each stage's name on a line of its own, two spaces in.
fn with_tiny_queues(pipeline: &str) -> String {
    let (mut text, mut section, mut stages) = (String::new(), "", 0);
    for line in pipeline.lines() {
        text.push_str(line);
        text.push('\n');
        let name = line.trim_start();
        match line.len() - name.len() {
            0 => section = line,
            2 if name.ends_with(':') && matches!(section, "operators:" | "sinks:") => {
                text.push_str("    queue: { rows: 1 }\n");
                stages += 1;
            }
            _ => {}
        }
    }
    assert!(stages > 0, "no stage found in\n{pipeline}");
    text
}

fn models() -> [PathBuf; 2] {
    ["--models".into(), root().join("examples/shuttle-anomaly/models")]
}

/// Runs a case to the end of its input.
fn finish(scratch: &Scratch, case: &str) {
    let mut command: Command = scratch.afferent("run");
    let output = succeed(command.args(models()).arg("pipeline.yaml").env("PACE", "max"));
    assert!(told(&output).contains("ended, all input read and committed"), "{case}: {}", told(&output));
}

/// What a run has written, by the name of the file that says what it should be.
fn written(scratch: &Scratch, case: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(scratch.path("")).unwrap() {
        let entry = entry.unwrap();
        if let Some(rest) = entry.file_name().to_str().unwrap().strip_prefix("out") {
            let text = std::fs::read_to_string(entry.path()).unwrap();
            found.insert(format!("expected{rest}"), in_order(case, text));
        }
    }
    if scratch.data_dir().join("tables/dead_letters").exists() {
        let output = succeed(scratch.afferent("sql").args(["--format", "json", "-c", DEAD_LETTERS]));
        found.insert("expected.dead-letters.jsonl".to_owned(), String::from_utf8(output.stdout).unwrap());
    }
    found
}

/// Where several stages feed a sink, the order of each is kept and not that between them: their rows are put
/// together by the first column, which says where they come from.
fn in_order(case: &str, text: String) -> String {
    if case != "fan_in" {
        return text;
    }
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_by_key(|line| line.split(',').next());
    lines.iter().map(|line| format!("{line}\n")).collect()
}

fn expected(case: &str) -> BTreeMap<String, String> {
    let entries = std::fs::read_dir(folder(case)).unwrap().map(Result::unwrap);
    let named = entries.map(|entry| (entry.file_name().into_string().unwrap(), entry.path()));
    named
        .filter(|(name, _)| name.starts_with("expected"))
        .map(|(name, path)| (name, std::fs::read_to_string(path).unwrap()))
        .collect()
}

fn compare(expected: &BTreeMap<String, String>, found: &BTreeMap<String, String>, case: &str, how: &str) {
    let files = |results: &BTreeMap<String, String>| results.keys().cloned().collect::<Vec<_>>();
    assert_eq!(files(expected), files(found), "{case}, {how}: the files written");
    for (name, wanted) in expected {
        let got = &found[name];
        if wanted == got {
            continue;
        }
        let (mut wanted_lines, mut got_lines) = (wanted.lines(), got.lines());
        for line in 1.. {
            let (a, b) = (wanted_lines.next(), got_lines.next());
            assert!(
                a == b && a.is_some(),
                "{case}, {how}: {name}, line {line} of {}:\n  expected {}\n  found    {}",
                wanted.lines().count(),
                a.unwrap_or("nothing more"),
                b.unwrap_or("nothing more")
            );
        }
    }
}
