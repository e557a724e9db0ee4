//! The command as its users meet it: help, exit codes, what each verb prints, one process a data directory,
//! changed pipelines, signals and metrics. Nothing here needs a broker.

mod sql;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use crate::tools::{Running, Scratch, afferent, root, succeed, told, wait_until};

const VERBS: [&str; 9] = ["run", "check", "explain", "sql", "list", "schema", "infer-schema", "broker", "demo"];

/// 100 rows, gathered by two, into a table of 50.
const PAIRS: &str = "name: pairs
sources:
  ticks: { generate: { rows: 100, columns: { id: sequence } } }
operators:
  twos: { window: { rows: 2, select: [max(id) as id, count(*) as n] } }
sinks:
  out: { table: { name: pairs } }
";

/// Rows at a steady rate into a file, for some seconds.
const TICKING: &str = "name: ticking
sources:
  ticks: { generate: { rows: 2000, rate: 500, columns: { id: sequence } } }
sinks:
  out: { file: { path: out.jsonl } }
";

/// A sink that never opens, and a stage that rejects every key but the first.
const STUCK: &str = "name: stuck
sources:
  ticks: { generate: { rate: 500, columns: { id: sequence, device: { choice: [a, b] } } } }
operators:
  lasts: { window: { by: [device], rows: 5, select: [device, max(id) as id], max_keys: 1 } }
sinks:
  nowhere: { mqtt: { url: \"mqtt://127.0.0.1:1\", topic: \"a/{device}\", format: json } }
";

/// A window that is never full holds rows from the first batch on: state that a change would lose.
const HOLDING: &str = "name: holding
sources:
  ticks: { generate: { rate: 500, columns: { id: sequence } } }
operators:
  frames: { window: { rows: 100000, select: [max(id) as id] } }
sinks:
  out: { discard: {} }
";

#[test]
fn every_verb_explains_itself_with_examples() {
    let all = stdout(afferent().arg("--help"));
    for verb in VERBS {
        assert!(all.contains(&format!("\n  {verb} ")), "{verb} is not in\n{all}");
        let help = stdout(afferent().args([verb, "--help"]));
        let (_, examples) = help.split_once("Examples:\n").unwrap_or_else(|| panic!("no examples:\n{help}"));
        assert!(examples.contains(&format!("  afferent {verb}")), "{help}");
    }
    assert!(stdout(afferent().arg("--version")).starts_with("afferent "));
}

#[test]
fn the_exit_code_is_2_for_wrong_usage() {
    let wrong: [&[&str]; 6] =
        [&[], &["nothing"], &["run"], &["check"], &["run", "--for", "soon", "a.yaml"], &["check", "--colour", "a.yaml"]];
    for arguments in wrong {
        let output = afferent().args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", told(&output));
        assert!(
            String::from_utf8_lossy(&output.stderr).contains("--help") || told(&output).contains("Usage"),
            "{arguments:?}: {}",
            told(&output)
        );
    }
}

#[test]
fn a_bad_file_does_not_run() {
    let scratch = Scratch::new();
    let bad = scratch.write("bad.yaml", PAIRS.replace("window:", "windo:").replace("table:", "tabel:"));
    for verb in ["run", "check", "explain"] {
        let output = scratch.afferent(verb).arg(&bad).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{verb}: {}", told(&output));
        let text = told(&output);
        for part in ["error[unknown-component]", "bad.yaml:5:11", "did you mean `window`?", "did you mean `table`?"] {
            assert!(text.contains(part), "{verb}: {part:?} is not in\n{text}");
        }
    }
    assert!(!scratch.data_dir().exists(), "a pipeline that does not run leaves nothing behind");
}

#[test]
fn a_missing_file_is_told_by_its_name() {
    for verb in ["run", "check", "explain", "infer-schema"] {
        let text = fails(afferent().args([verb, "no-such-file.jsonl"]));
        assert!(text.contains("no-such-file.jsonl: No such file or directory"), "{text}");
        assert_eq!(text.matches("No such file").count(), 1, "each cause once: {text}");
    }
}

#[test]
fn a_missing_file_does_not_hide_the_problems_of_the_others() {
    let scratch = Scratch::new();
    let bad = scratch.write("bad.yaml", PAIRS.replace("window:", "windo:"));
    for verb in ["run", "check"] {
        let output = scratch.afferent(verb).arg("no-such-file.yaml").arg(&bad).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{verb}: {}", told(&output));
        let text = told(&output);
        assert!(text.contains("no-such-file.yaml") && text.contains("did you mean `window`?"), "{verb}: {text}");
    }
}

#[test]
fn colours_are_decided_by_where_the_findings_go() {
    let scratch = Scratch::new();
    scratch.write("bad.yaml", PAIRS.replace("window:", "windo:"));
    // `script` gives the command a terminal; a pipe takes only its standard output away from that.
    let shown = |line: &str, no_color: Option<&str>| {
        let program = env!("CARGO_BIN_EXE_afferent");
        let mut script = Command::new("script");
        script.args(["-qec", &line.replace("afferent", program), "/dev/null"]).current_dir(scratch.path(""));
        script.stdin(Stdio::null()).env_remove("NO_COLOR").envs(no_color.map(|value| ("NO_COLOR", value)));
        let output = script.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.contains("did you mean `window`?"), "{line}: {}", told(&output));
        text.contains('\u{1b}')
    };
    assert!(shown("afferent check bad.yaml", None));
    assert!(!shown("afferent check bad.yaml | cat", None));
    assert!(!shown("afferent check bad.yaml", Some("1")));
    assert!(shown("afferent explain bad.yaml | cat", None), "explain tells its findings on standard error");
}

#[test]
fn check_tells_the_guarantee_of_each_path_and_what_caps_the_rate() {
    let text = stdout(afferent().arg("check").arg(root().join("examples/exercise-watch/watch.yaml")));
    assert!(text.contains("watch.yaml: sound"), "{text}");
    assert!(text.contains("imu -> results: at_least_once (the source may send rows twice"), "{text}");
    assert!(text.contains("note: `imu` gets at most 1024 messages ahead of their acknowledgement"), "{text}");
}

#[test]
fn explain_draws_text_and_mermaid() {
    let scratch = Scratch::new();
    let file = scratch.write("pairs.yaml", PAIRS);
    let text = stdout(afferent().arg("explain").arg(&file));
    for line in [
        "pipeline pairs",
        "source ticks: generate (ends by itself)",
        "  -> id: int64!",
        "operator twos: window (stateful)",
        "  -> id: int64!, n: int64!",
        "sink out: table",
        "  ticks -> out: exactly_once",
    ] {
        assert!(text.lines().any(|shown| shown.starts_with(line)), "{line:?} is not in\n{text}");
    }
    let drawing = stdout(afferent().args(["explain", "--format", "mermaid"]).arg(&file));
    assert!(drawing.starts_with("flowchart "), "{drawing}");
    assert_eq!(drawing.matches("-->").count(), 2, "{drawing}");
    for name in ["ticks", "twos", "out"] {
        assert!(drawing.contains(name), "{name} is not in\n{drawing}");
    }
}

#[test]
fn list_shows_all_components_or_one() {
    let all = stdout(afferent().arg("list"));
    for name in ["sources", "mqtt", "operators", "window", "sinks", "table"] {
        assert!(all.contains(name), "{name} is not in\n{all}");
    }
    let mqtt = stdout(afferent().args(["list", "mqtt"]));
    for part in ["source mqtt: ", "sink mqtt: ", "mqtt: { url:", "  topics: ", "[default: "] {
        assert!(mqtt.contains(part), "{part:?} is not in\n{mqtt}");
    }
    let text = fails(afferent().args(["list", "nothing"]));
    assert!(text.contains("no component is called `nothing`; there are batch, decode, "), "{text}");
}

#[test]
fn whoever_stops_reading_gets_no_complaint() {
    let mut child = afferent().arg("schema").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut first = [0; 10];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{}", told(&output));
}

#[test]
fn infer_schema_writes_a_declaration_that_works() {
    let scratch = Scratch::new();
    let rows =
        scratch.write("rows.jsonl", "{\"ts\":\"2026-01-01T00:00:00Z\",\"a\":1,\"b\":1.5,\"c\":\"x\",\"d\":[1]}\n{\"a\":2}\n");
    let table = scratch.write("rows.csv", "a,b,c\n1,1.5,x\n2,,y\n");
    let of_rows = stdout(afferent().arg("infer-schema").arg(&rows));
    let types = "a: int64, b: float64, c: utf8";
    assert!(of_rows.starts_with("schema: { ") && of_rows.contains(types), "{of_rows}");
    assert!(of_rows.contains("ts: timestamp") && of_rows.contains("d: { list: int64 }"), "{of_rows}");
    let of_table = stdout(afferent().arg("infer-schema").arg(&table));
    assert_eq!(of_table, format!("schema: {{ {types} }}\n"));
    // As a user would, pasted into a pipeline.
    for (name, declaration) in [("rows.jsonl", of_rows), ("rows.csv", of_table)] {
        let text = format!(
            "name: pasted\nsources:\n  rows:\n    file:\n      path: {name}\n      {declaration}sinks:\n  out: {{ stdout: {{ format: json_lines }} }}\n"
        );
        let shown = stdout(scratch.afferent("run").arg("--fresh").arg(scratch.write("pasted.yaml", text)));
        assert_eq!(shown.lines().count(), 2, "{shown}");
        assert!(shown.contains("\"b\":1.5"), "{shown}");
    }
    scratch.write("rows.txt", "a,b\n1,2\n");
    let text = fails(afferent().arg("infer-schema").arg(scratch.path("rows.txt")));
    assert!(text.contains("say --format"), "{text}");
    succeed(afferent().args(["infer-schema", "--format", "csv"]).arg(scratch.path("rows.txt")));
}

#[test]
fn a_bounded_pipeline_is_read_once_until_fresh() {
    let scratch = Scratch::new();
    let file = scratch.write("pairs.yaml", PAIRS);
    let text = told(&scratch.run(&[&file]));
    assert!(text.contains("pairs: ended, all input read and committed"), "{text}");
    let text = told(&scratch.run(&[&file]));
    assert!(text.contains("pairs: input already read; --fresh starts over"), "{text}");
    assert_eq!(scratch.number("select count(*) from pairs"), 50);
    succeed(scratch.afferent("run").arg("--fresh").arg(&file));
    assert_eq!(scratch.number("select count(*) from pairs"), 100, "rows already in tables stay");
}

#[test]
fn the_last_line_names_what_was_rejected_or_dropped() {
    let scratch = Scratch::new();
    let rows: String = (0..15).map(|id| format!("{{\"id\":{id}}}\n")).collect();
    scratch.write("rows.jsonl", rows + "{\"id\":\"x\"}\n");
    let text = "name: losing\nsources:\n  rows: { file: { path: rows.jsonl, schema: { id: int64 } } }\noperators:\n  \
                w: { window: { rows: 10, select: [max(id) as id] } }\nsinks:\n  out: { discard: {} }\n";
    let told = told(&scratch.run(&[&scratch.write("losing.yaml", text)]));
    let last = "losing: ended, all input read and committed; 1 row in dead_letters, 5 rows dropped (w: incomplete_window)";
    assert_eq!(told.lines().last(), Some(last), "{told}");
    assert_eq!(scratch.number("select count(*) from dead_letters"), 1);
}

#[test]
fn a_pipeline_whose_source_does_not_open_holds_the_next_one_up_for_some_seconds_only() {
    let scratch = Scratch::new();
    let listening = "name: listening\nsources:\n  nobody: { mqtt: { url: \"mqtt://127.0.0.1:1\", topics: [a] } }\n\
                     sinks:\n  out: { discard: {} }\n";
    let files = [scratch.write("listening.yaml", listening), scratch.write("pairs.yaml", PAIRS)];
    let running = scratch.start("run", &[&files[0], &files[1]], |_| {});
    let told = "its sources are not open after 5s; starting `pairs` all the same";
    wait_until("it goes on", Duration::from_secs(20), || scratch.log("run").contains(told));
    wait_until("the second has run", Duration::from_secs(20), || {
        let ended = scratch.data_dir().join("tables/pairs/_delta_log/00000000000000000000.json").exists();
        ended && scratch.number("select count(*) from pairs") == 50
    });
    running.drain();
    assert!(scratch.log("run").contains("listening: drained"), "{}", scratch.log("run"));
}

#[test]
fn a_data_directory_belongs_to_one_process() {
    let scratch = Scratch::new();
    let (first, second) = (scratch.write("stuck.yaml", HOLDING), scratch.write("pairs.yaml", PAIRS));
    let running = scratch.start("first", &[&first], |_| {});
    wait_until("the first has the lock", Duration::from_secs(10), || scratch.data_dir().join("pipelines").exists());
    let text = fails(scratch.afferent("run").arg(&second));
    assert!(text.contains("is in use by another process") && text.contains("--data-dir"), "{text}");
    running.drain();
    // The lock goes with its holder.
    scratch.run(&[&second]);
}

#[test]
fn a_file_is_no_data_directory() {
    let scratch = Scratch::new();
    let pairs = scratch.write("pairs.yaml", PAIRS);
    scratch.write("data", "");
    let text = fails(scratch.afferent("run").arg(&pairs));
    assert!(text.contains("is a file; choose another with --data-dir"), "{text}");
    let text = fails(scratch.afferent("sql").args(["-c", "show tables"]));
    assert!(text.contains("there is no data directory"), "{text}");
}

#[test]
fn a_demo_that_is_interrupted_shows_what_came_of_it() {
    let scratch = Scratch::new();
    let log = std::fs::File::create(scratch.path("demo.log")).unwrap();
    let mut command = afferent();
    command.args(["demo", "--seconds", "120", "--data-dir"]).arg(scratch.data_dir()).current_dir(root());
    command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
    // A group of its own: Ctrl-C reaches every process of a terminal's group.
    let mut running = Running(command.process_group(0).spawn().unwrap());
    wait_until("the first windows are there", Duration::from_secs(60), || {
        scratch.data_dir().join("tables/exercises/_delta_log/00000000000000000000.json").exists()
            && scratch.number("select count(*) from exercises") > 0
    });
    let group = format!("-{}", running.0.id());
    succeed(Command::new("kill").args(["-INT", "--", &group]));
    let status = exit(&mut running);
    let log = scratch.log("demo");
    assert!(status.success(), "{log}");
    // With the meaning of the model's labels.
    assert!(log.contains("| meaning") && log.contains("| forward elevation"), "{log}");
}

#[test]
fn two_pipelines_of_one_name_do_not_run_together() {
    let scratch = Scratch::new();
    let (one, two) = (scratch.write("one.yaml", PAIRS), scratch.write("two.yaml", PAIRS));
    let text = fails(scratch.afferent("run").args([&one, &two]));
    assert!(text.contains("two of these files are named `pairs`"), "{text}");
}

#[test]
fn a_changed_pipeline_is_refused_until_one_says_what_becomes_of_its_state() {
    for flag in ["--allow-non-restored-state", "--fresh"] {
        let scratch = Scratch::new();
        let file = scratch.write("holding.yaml", HOLDING);
        let a_while = |arguments: &[&str]| {
            let mut command = scratch.afferent("run");
            command.args(arguments).args(["--for", "500ms"]).arg(&file);
            command
        };
        succeed(&mut a_while(&[]));
        scratch.write("holding.yaml", HOLDING.replace("100000", "200000"));
        let text = fails(&mut a_while(&[]));
        assert!(text.contains("the configuration of stage `frames` is another"), "{text}");
        assert!(text.contains("--allow-non-restored-state") && text.contains("--fresh"), "{text}");
        succeed(&mut a_while(&[flag]));
        // From then on it is the pipeline.
        succeed(&mut a_while(&[]));
        scratch.write("holding.yaml", HOLDING.replace("frames:", "windows:").replace("100000", "200000"));
        let text = fails(&mut a_while(&[]));
        assert!(text.contains("stage `frames` is gone"), "{text}");
    }
}

#[test]
fn a_comment_or_a_description_changes_nothing() {
    let scratch = Scratch::new();
    let file = scratch.write("holding.yaml", HOLDING);
    succeed(scratch.afferent("run").args(["--for", "300ms"]).arg(&file));
    let told_apart = HOLDING.replace("sources:", "description: For later.\nsources: # where it begins");
    scratch.write("holding.yaml", told_apart);
    succeed(scratch.afferent("run").args(["--for", "300ms"]).arg(&file));
}

#[test]
fn a_signal_drains_and_the_next_start_goes_on() {
    let scratch = Scratch::new();
    let file = scratch.write("ticking.yaml", TICKING);
    let written = || std::fs::read_to_string(scratch.path("out.jsonl")).unwrap_or_default();
    for (number, signal) in ["-TERM", "-INT"].into_iter().enumerate() {
        let before = written().lines().count();
        let mut running = scratch.start(&format!("run{number}"), &[&file], |_| {});
        wait_until("some rows are there", Duration::from_secs(20), || written().lines().count() > before + 20);
        running.signal(signal);
        assert!(exit(&mut running).success(), "{}", scratch.log(&format!("run{number}")));
        assert!(scratch.log(&format!("run{number}")).contains("ticking: drained"), "{}", scratch.log(&format!("run{number}")));
    }
    assert!(written().lines().count() < 2000, "it was stopped on the way");
    let text = told(&scratch.run(&[&file]));
    assert!(text.contains("ticking: ended"), "{text}");
    let mut ids: Vec<u64> = written().lines().map(|line| number_in(line, "{\"id\":")).collect();
    ids.sort_unstable();
    assert_eq!(ids, (0..2000).collect::<Vec<u64>>(), "every id once");
}

/// The number behind a prefix, up to the closing brace.
fn number_in(line: &str, prefix: &str) -> u64 {
    let digits = line.strip_prefix(prefix).and_then(|rest| rest.strip_suffix('}'));
    digits.and_then(|digits| digits.parse().ok()).unwrap_or_else(|| panic!("no number in {line:?}"))
}

#[test]
fn a_second_signal_stops_at_once() {
    let scratch = Scratch::new();
    let mut running = scratch.start("stuck", &[&scratch.write("stuck.yaml", STUCK)], |_| {});
    wait_until("it runs", Duration::from_secs(10), || scratch.log("stuck").contains("connection lost"));
    running.signal("-TERM");
    wait_until("it drains", Duration::from_secs(10), || scratch.log("stuck").contains("draining; once more to stop at once"));
    assert!(running.is_running(), "a sink that cannot write keeps it from draining");
    running.signal("-TERM");
    assert_eq!(exit(&mut running).code(), Some(1));
    let log = scratch.log("stuck");
    assert!(log.contains("stopped at once; what was not committed will be processed at the next start"), "{log}");
}

#[test]
fn draining_has_a_limit() {
    let scratch = Scratch::new();
    let file = scratch.write("stuck.yaml", STUCK);
    let text = fails(scratch.afferent("run").args(["--for", "200ms", "--drain-limit", "500ms"]).arg(file));
    assert!(text.contains("not drained within 500ms"), "{text}");
}

#[test]
fn metrics_are_served_as_prometheus_wants_them() {
    let scratch = Scratch::new();
    let file = scratch.write("stuck.yaml", STUCK.replace("sinks:", "sinks:\n  kept: { inputs: [lasts], discard: {} }"));
    let mut running = scratch.start("stuck", &[&file], |command| {
        command.args(["--metrics-listen", "127.0.0.1:0"]);
    });
    let port = || {
        let log = scratch.log("stuck");
        let (_, rest) = log.split_once("metrics at http://127.0.0.1:")?;
        rest.split_once("/metrics")?.0.parse::<u16>().ok()
    };
    wait_until("it says where", Duration::from_secs(10), || port().is_some());
    let port = port().unwrap();
    let mut metrics = String::new();
    // Not all at once: a name with a label is there from its first count on. The age of what is not committed
    // must grow while nothing moves: that is when somebody looks at it.
    let soon = [
        ("afferent_rejected_rows_total{pipeline=\"stuck\",reason=\"too_many_keys\",stage=\"lasts\"}", 0.0),
        ("afferent_errors_total{class=\"retry\",pipeline=\"stuck\",stage=\"nowhere\"}", 0.0),
        ("afferent_rows_total{direction=\"in\",pipeline=\"stuck\",stage=\"kept\"}", 0.0),
        ("afferent_uncommitted_age_seconds{pipeline=\"stuck\"}", 1.5),
    ];
    wait_until("rows are rejected, kept, retried and grow old", Duration::from_secs(20), || {
        metrics = get(port, "/metrics");
        soon.iter().all(|(name, least)| value(&metrics, name).is_some_and(|value| value > *least))
    });
    for name in [
        "afferent_rows_total{direction=\"out\",pipeline=\"stuck\",stage=\"ticks\"}",
        "afferent_bytes_total{direction=\"out\",pipeline=\"stuck\",stage=\"ticks\"}",
        "afferent_batches_total{direction=\"out\",pipeline=\"stuck\",stage=\"ticks\"}",
        "afferent_process_seconds_total{pipeline=\"stuck\",stage=\"lasts\"}",
        "afferent_queue_rows{pipeline=\"stuck\",stage=\"lasts\"}",
        "afferent_queue_bytes{pipeline=\"stuck\",stage=\"lasts\"}",
        "afferent_queue_fill_ratio{pipeline=\"stuck\",stage=\"lasts\"}",
        "afferent_send_wait_seconds_total{pipeline=\"stuck\",stage=\"ticks\"}",
        "afferent_retries_total{pipeline=\"stuck\",stage=\"nowhere\"}",
        "afferent_epoch_duration_seconds_bucket{pipeline=\"stuck\",le=\"+Inf\"}",
        "afferent_restarts_total{pipeline=\"stuck\"}",
        "afferent_latency_seconds{pipeline=\"stuck\",stage=\"kept\",quantile=\"0.5\"}",
        "afferent_latency_seconds{pipeline=\"stuck\",stage=\"kept\",quantile=\"0.99\"}",
        "afferent_latency_seconds_count{pipeline=\"stuck\",stage=\"kept\"}",
    ] {
        assert!(metrics.contains(name), "{name} is not in\n{metrics}");
    }
    // What cannot be written is not committed.
    assert_eq!(value(&metrics, "afferent_epochs_total{pipeline=\"stuck\"}"), Some(0.0), "{metrics}");
    promtool(&metrics);
    running.kill();
}

/// The value of a metric, if it is there.
fn value(metrics: &str, name: &str) -> Option<f64> {
    metrics.lines().find_map(|line| line.strip_prefix(name))?.trim().parse().ok()
}

/// What a plain GET brings; HTTP/1.0, so that the answer ends with the connection.
fn get(port: u16, path: &str) -> String {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n").as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no HTTP: {answer:?}"));
    assert!(head.starts_with("HTTP/1.0 200") || head.starts_with("HTTP/1.1 200"), "{head}");
    assert!(head.to_lowercase().contains("content-type: text/plain; version=0.0.4"), "{head}");
    body.to_owned()
}

/// Prometheus' own check, which must have nothing to say.
fn promtool(metrics: &str) {
    let mut child = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool is installed (scripts/setup test)");
    child.stdin.take().unwrap().write_all(metrics.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && told(&output).is_empty(), "{}", told(&output));
}

#[test]
fn the_metrics_listener_is_off_by_default_and_says_when_it_cannot_listen() {
    let scratch = Scratch::new();
    let file = scratch.write("pairs.yaml", PAIRS);
    let text = told(&scratch.run(&[&file]));
    assert!(!text.contains("metrics at"), "{text}");
    let taken = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let text = fails(scratch.afferent("run").args(["--metrics-listen", &address]).arg(&file));
    assert!(text.contains(&address) && text.contains("Address already in use"), "{text}");
}

#[test]
fn logs_are_lines_of_json_when_asked_for() {
    let scratch = Scratch::new();
    let file = scratch.write("pairs.yaml", PAIRS);
    let output = succeed(scratch.afferent("run").args(["--log-format", "json"]).arg(&file));
    let text = String::from_utf8(output.stderr).unwrap();
    let (logged, said): (Vec<&str>, Vec<&str>) = text.lines().partition(|line| line.starts_with('{'));
    assert!(!logged.is_empty(), "{text}");
    for line in logged {
        let event: serde_json::Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        assert!(event["timestamp"].is_string() && event["level"].is_string(), "{line}");
    }
    assert_eq!(said, ["pairs: ended, all input read and committed"]);
    assert!(!text.contains('\u{1b}'), "no colours where no terminal is: {text:?}");
}

/// What a command that must succeed prints.
fn stdout(command: &mut Command) -> String {
    String::from_utf8(succeed(command).stdout).unwrap()
}

/// What a command says that must fail with exit code 1.
fn fails(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{command:?}\n{}", told(&output));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("error"), "{text}");
    text
}

/// Waits for the end of a process that has been told to end.
fn exit(running: &mut Running) -> ExitStatus {
    let mut status = None;
    wait_until("it ends", Duration::from_secs(30), || {
        status = running.0.try_wait().unwrap();
        status.is_some()
    });
    status.unwrap()
}

/// A table sink over a paced source that keeps everything in the tail.
fn ticking(scratch: &Scratch, commit_every: &str) -> std::path::PathBuf {
    scratch.write(
        "ticks.yaml",
        format!(
            "name: ticks\nsources:\n  ticks:\n    generate: {{ rate: 2000, columns: {{ id: sequence }} }}\n\
             sinks:\n  out:\n    table: {{ name: ticks, commit_every: {commit_every} }}\n"
        ),
    )
}

#[test]
fn neither_fresh_nor_a_changed_sink_takes_rows_that_were_committed() {
    for flag in ["--fresh", "--allow-non-restored-state"] {
        let scratch = Scratch::new();
        let pipeline = ticking(&scratch, "1h");
        let mut running = scratch.start("run", &[&pipeline], |_| {});
        wait_until("rows are there", Duration::from_secs(20), || {
            scratch.data_dir().join("tails/ticks").exists() && scratch.number("select count(*) from ticks") > 1000
        });
        running.kill();
        let before = scratch.number("select count(distinct id) from ticks");
        // Another sink, as far as stored state is concerned.
        let pipeline = ticking(&scratch, "2h");
        succeed(scratch.afferent("run").args([flag, "--for", "1s"]).arg(&pipeline));
        let after = scratch.number("select count(distinct id) from ticks");
        let lowest = scratch.number("select min(id) from ticks");
        // What was visible and not stored yet may be made anew; what was stored stays.
        assert!(after + 200 >= before && lowest == 0, "{flag}: {before} ids before, {after} after, the lowest is {lowest}");
    }
}

#[test]
fn what_is_attached_to_a_sinks_rejects_does_not_hold_the_pipeline_up() {
    let scratch = Scratch::new();
    let pipeline = scratch.write(
        "p.yaml",
        "name: p\nsources:\n  numbers:\n    generate: { rows: 50, columns: { id: sequence } }\n\
         sinks:\n  out:\n    file: { path: out.jsonl }\n  refused:\n    inputs: [out.rejected]\n    file: { path: refused.jsonl }\n",
    );
    scratch.run(&[&pipeline]);
    assert_eq!(std::fs::read_to_string(scratch.path("out.jsonl")).unwrap().lines().count(), 50);
}

#[test]
fn an_output_that_nobody_reads_does_not_leak_into_the_next_stage() {
    let scratch = Scratch::new();
    let pipeline = scratch.write(
        "p.yaml",
        "name: p\nsources:\n  numbers:\n    generate: { rows: 20, columns: { id: sequence } }\n\
         operators:\n  first:\n    route: { outputs: { big: \"id >= 10\" } }\n  second:\n    sql: select id from first\n\
         sinks:\n  out:\n    file: { path: out.jsonl }\n",
    );
    scratch.run(&[&pipeline]);
    assert_eq!(std::fs::read_to_string(scratch.path("out.jsonl")).unwrap().lines().count(), 10);
}
