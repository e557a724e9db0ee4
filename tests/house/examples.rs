//! The examples, checked, run and compared: on both model backends with plain Python over the raw files, over
//! real brokers, and with a language model that fails, babbles or hangs. The invariant: what a README under
//! `examples/` promises is what happens.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::tools::{Kafka, Mosquitto, Running, Scratch, afferent, free_port, python, root, succeed, told, wait_until};

/// Windows in the recording, and those of them that the model gives a probability below 0.6.
const WINDOWS: i64 = 1539;
const DOUBTFUL: i64 = 81;
/// Shuttle readings, and those above the threshold.
const READINGS: i64 = 24_549;
const ANOMALIES: usize = 1936;

const LIMIT: Duration = Duration::from_secs(120);

#[test]
fn every_example_is_sound_without_any_preparation() {
    let mut checked = 0;
    for folder in std::fs::read_dir(root().join("examples")).unwrap() {
        for file in std::fs::read_dir(folder.unwrap().path()).unwrap() {
            let file = file.unwrap().path();
            if file.extension().is_some_and(|extension| extension == "yaml") {
                let told = told(&succeed(afferent().arg("check").arg(&file)));
                assert!(told.contains(": sound") && !told.contains("warning"), "{told}");
                checked += 1;
            }
        }
    }
    assert!(checked >= 4, "{checked} examples found");
}

#[test]
fn exercises_on_onnxruntime_are_those_of_python() {
    exercises_are_those_of_python("onnxruntime");
}

#[test]
fn exercises_on_tract_are_those_of_python() {
    exercises_are_those_of_python("tract");
}

#[test]
fn shuttle_scores_on_onnxruntime_are_those_of_python() {
    shuttle_scores_are_those_of_python("onnxruntime");
}

#[test]
fn shuttle_scores_on_tract_are_those_of_python() {
    shuttle_scores_are_those_of_python("tract");
}

#[test]
fn every_window_arrives_over_mqtt() {
    let (broker, scratch) = (Mosquitto::start(""), Scratch::new());
    let watch = scratch.start("watch", &[&example("exercise-watch/watch.yaml")], |command| {
        command.env("MQTT_URL", broker.url());
    });
    wait_until("the watch is subscribed", LIMIT, || scratch.log("watch").contains("mqtt connected and subscribed"));
    play_devices(&broker);
    wait_until("every window is there", LIMIT, || count(&scratch, "exercises") >= WINDOWS);
    watch.drain();
    equal_exercises(&scratch);
}

/// The README's own command, at full speed and on a free port: nothing that a device sends comes before the watch listens.
#[test]
fn the_command_of_the_readme_with_the_embedded_broker_gives_every_window() {
    let readme = std::fs::read_to_string(example("exercise-watch/README.md")).unwrap();
    let command = readme.lines().find(|line| line.contains(" run --with-broker")).unwrap();
    let (setting, arguments) = command.split_once(" afferent run ").unwrap();
    assert_eq!(setting, "PACE=10x", "{command}");
    let (scratch, address) = (Scratch::new(), format!("127.0.0.1:{}", free_port()));
    let log = std::fs::File::create(scratch.path("run.log")).unwrap();
    let mut run = scratch.afferent("run");
    run.current_dir(root()).env("PACE", "max").env("MQTT_URL", format!("mqtt://{address}"));
    run.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    let mut arguments = arguments.split(' ');
    while let Some(argument) = arguments.next() {
        match argument {
            "--with-broker" => run.arg(format!("--with-broker={address}")),
            // Until everything is there, however slow the machine.
            "--for" => {
                arguments.next();
                run.args(["--for", "600s"])
            }
            _ => run.arg(argument),
        };
    }
    let running = Running(run.spawn().unwrap());
    wait_until("every window is there", LIMIT * 2, || {
        let log = scratch.log("run");
        assert!(!log.contains("not open after"), "{log}");
        count(&scratch, "exercises") >= WINDOWS
    });
    running.drain();
    let log = scratch.log("run");
    assert!(log.contains("exercise-devices: ended") && log.contains("exercise-watch: drained"), "{log}");
    equal_exercises(&scratch);
}

#[test]
fn doubtful_windows_are_explained_over_mqtt() {
    let (broker, scratch, model) = (Mosquitto::start(""), Scratch::new(), LanguageModel::start(&[]));
    let watch = scratch.start("watch", &[&example("exercise-watch/watch-llm.yaml")], |command| {
        command.env("MQTT_URL", broker.url()).env("LLM_URL", model.url());
    });
    wait_until("the watch is subscribed", LIMIT, || scratch.log("watch").contains("mqtt connected and subscribed"));
    play_devices(&broker);
    wait_until("every window is there", LIMIT, || count(&scratch, "exercises") >= WINDOWS);
    wait_until("every answer is there", LIMIT, || count(&scratch, "explanations") >= DOUBTFUL);
    watch.drain();
    equal_exercises(&scratch);
    // The mock answers with the question: so it is seen that each answer stands in its own row.
    let strange = "select count(*) from explanations where p >= 0.6 or llm_error is not null or attention is null
                   or strpos(summary, concat('\"', exercise, '\"')) = 0 or strpos(summary, cast(ts as varchar)) = 0";
    assert_eq!(scratch.number(strange), 0, "{}", scratch.sql("select * from explanations"));
    assert_eq!(scratch.number("select count(*) from explanations"), DOUBTFUL);
}

#[test]
fn a_failing_language_model_stops_no_row() {
    // Every third request fails: most rows get their answer at a further attempt.
    let (scratch, model) = (Scratch::new(), LanguageModel::start(&["--fail-every", "3"]));
    explain_recording(&scratch, &model);
    let told = "(llm_error is null) = (summary is not null) and (llm_error is null) = (attention is not null)
                and (llm_error is null or strpos(llm_error, '500') > 0)";
    assert_eq!(scratch.number(&format!("select count(*) from explanations where {told}")), DOUBTFUL);
    assert!(scratch.number("select count(*) from explanations where llm_error is null") > 0);
    let requests = model.stats();
    assert_eq!(requests["failed"].as_i64().unwrap(), requests["requests"].as_i64().unwrap() / 3);
    assert!(requests["requests"].as_i64().unwrap() > DOUBTFUL, "there was no further attempt: {requests}");
}

#[test]
fn a_refusing_language_model_stops_no_row() {
    let (scratch, model) = (Scratch::new(), LanguageModel::start(&["--status", "401"]));
    explain_recording(&scratch, &model);
    let refused =
        "select count(*) from explanations where summary is null and attention is null and strpos(llm_error, '401') > 0";
    assert_eq!(scratch.number(refused), DOUBTFUL);
    assert_eq!(model.stats()["requests"].as_i64(), Some(DOUBTFUL), "a refusal is final");
}

#[test]
fn an_answer_that_is_no_json_is_an_error_of_its_row() {
    let (scratch, model) = (Scratch::new(), LanguageModel::start(&["--bad-json-every", "5"]));
    explain_recording(&scratch, &model);
    let answered = "select count(*) from explanations where llm_error is null and summary is not null";
    let broken = "select count(*) from explanations where strpos(llm_error, 'does not fit') > 0 and summary is null";
    assert_eq!((scratch.number(answered), scratch.number(broken)), (DOUBTFUL - DOUBTFUL / 5, DOUBTFUL / 5));
}

#[test]
fn a_hanging_language_model_holds_its_barrier_back_and_nothing_else() {
    let (scratch, hanging, port) = (Scratch::new(), LanguageModel::start(&["--delay-ms", "3600000"]), free_port());
    let pipeline = scratch.write("watch-llm.yaml", on_recording("exercise-watch/watch-llm.yaml"));
    let mut running = scratch.start("hanging", &[&pipeline], |command| {
        command.arg(format!("--metrics-listen=127.0.0.1:{port}")).args(models("exercise-watch"));
        command.env("LLM_URL", hanging.url()).env("LLM_DEADLINE", "1h");
    });
    let rows_into = |stage: &str| {
        let name = format!("afferent_rows_total{{direction=\"in\",pipeline=\"exercise-watch-llm\",stage=\"{stage}\"}} ");
        let metrics = get(port, "/metrics");
        metrics.lines().find_map(|line| line.strip_prefix(&name)?.trim().parse::<i64>().ok())
    };
    wait_until("the other branch has every window", LIMIT, || rows_into("results") == Some(WINDOWS));
    wait_until("questions are asked", LIMIT, || hanging.stats()["in_flight"].as_i64() > Some(0));
    assert_eq!(rows_into("explanations"), Some(0));
    running.kill();

    // Had a barrier passed rows that wait for an answer, they would be missing now.
    let model = LanguageModel::start(&[]);
    explain_recording(&scratch, &model);
    assert_eq!(scratch.number("select count(*) from explanations where summary is not null"), DOUBTFUL);
}

#[test]
fn shuttle_anomalies_arrive_in_kafka_as_json() {
    let (kafka, scratch) = (Kafka::start(), Scratch::new());
    let pipeline = example("shuttle-anomaly/anomalies.yaml");
    succeed(scratch.afferent("run").arg(pipeline).env("KAFKA_BROKERS", kafka.address()));
    assert_eq!(count(&scratch, "shuttle_scores"), READINGS);

    let consumed = succeed(python("consume.py").args([kafka.address().as_str(), "shuttle-anomalies", &ANOMALIES.to_string()]));
    let records: Vec<Value> =
        String::from_utf8(consumed.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(records.len(), ANOMALIES);
    let events: BTreeSet<&str> = records.iter().map(|record| record["headers"]["afferent-event-id"].as_str().unwrap()).collect();
    assert_eq!(events.len(), ANOMALIES, "every record has an event id of its own");
    let mut csv = "reading,score\n".to_owned();
    for record in &records {
        let alert: Value = serde_json::from_str(record["value"].as_str().unwrap()).unwrap();
        assert!(alert["anomaly"].is_boolean(), "{alert}");
        csv.push_str(&format!("{},{}\n", alert["reading"], alert["score"]));
    }
    let csv = scratch.write("anomalies.csv", csv);
    succeed(python("equality_shuttle.py").arg("--anomalies").arg(csv));
}

fn exercises_are_those_of_python(backend: &str) {
    let scratch = Scratch::new();
    let pipeline = scratch.write("watch.yaml", on_recording("exercise-watch/watch.yaml"));
    run_on(backend, scratch.afferent("run").arg(pipeline).args(models("exercise-watch")));
    equal_exercises(&scratch);
}

fn shuttle_scores_are_those_of_python(backend: &str) {
    let scratch = Scratch::new();
    let text = std::fs::read_to_string(example("shuttle-anomaly/anomalies.yaml")).unwrap();
    let text = text.replace("data/shuttle.parquet", example("shuttle-anomaly/data/shuttle.parquet").to_str().unwrap());
    let (stages, sinks) = text.split_once("  alerts:").unwrap();
    let (_, scores) = sinks.split_once("  scores:").unwrap();
    let tables = format!("{stages}  alerts:\n    inputs: [anomalies]\n    table: {{ name: anomalies }}\n  scores:{scores}");
    let pipeline = scratch.write("anomalies.yaml", tables);
    run_on(backend, scratch.afferent("run").arg(pipeline).args(models("shuttle-anomaly")));
    let scores = scratch.write("scores.csv", scratch.sql("select reading, score from shuttle_scores"));
    succeed(python("equality_shuttle.py").arg(scores));
    let anomalies = scratch.write("anomalies.csv", scratch.sql("select reading, score from anomalies"));
    succeed(python("equality_shuttle.py").arg("--anomalies").arg(anomalies));
}

/// Runs a pipeline on one of the model backends, and sees that it was that one.
fn run_on(backend: &str, command: &mut Command) {
    let told = told(&succeed(command.env("AFFERENT_MODEL_BACKEND", backend)));
    assert_eq!(told.contains("models run on ONNX Runtime"), backend == "onnxruntime", "{told}");
}

/// Every window of the recording is in the table once, with Python's label and score.
fn equal_exercises(scratch: &Scratch) {
    let results = scratch.write("results.csv", scratch.sql("select device, ts, exercise, p from exercises"));
    succeed(python("equality_exercise.py").arg(results));
}

/// Publishes the whole recording as the devices would, at full speed.
fn play_devices(broker: &Mosquitto) {
    let devices = example("exercise-watch/devices.yaml");
    succeed(Scratch::new().afferent("run").arg(devices).env("MQTT_URL", broker.url()).env("PACE", "max"));
}

/// Runs `watch-llm.yaml` over the recording to its end; all windows and all doubtful ones are there once.
fn explain_recording(scratch: &Scratch, model: &LanguageModel) {
    let pipeline = scratch.write("watch-llm.yaml", on_recording("exercise-watch/watch-llm.yaml"));
    let mut command = scratch.afferent("run");
    succeed(command.arg(pipeline).args(models("exercise-watch")).env("LLM_URL", model.url()).env("LLM_DEADLINE", "1h"));
    equal_exercises(scratch);
    assert_eq!(scratch.number("select count(*) from explanations"), DOUBTFUL);
    assert_eq!(scratch.number("select count(distinct concat(device, cast(ts as varchar))) from explanations"), DOUBTFUL);
}

fn example(path: &str) -> PathBuf {
    root().join("examples").join(path)
}

fn models(folder: &str) -> [PathBuf; 2] {
    ["--models".into(), example(folder).join("models")]
}

/// A pipeline of the exercise example with the recording itself in place of broker and decoding.
fn on_recording(path: &str) -> String {
    let text = std::fs::read_to_string(example(path)).unwrap();
    let (head, rest) = text.split_once("sources:").unwrap();
    let (_, stages) = rest.split_once("  frames:").unwrap();
    let folder = example("exercise-watch");
    let stages = stages.replace("prompts/", &format!("{}/", folder.join("prompts").display()));
    let recording = folder.join("data/exercises.parquet");
    let source = format!("  recording:\n    file: {{ path: {}, event_time: ts }}\n", recording.display());
    format!("{head}sources:\n{source}operators:\n  frames:{stages}")
}

/// The rows of a table that may not be there yet.
fn count(scratch: &Scratch, table: &str) -> i64 {
    let query = format!("select count(*) from {table}");
    let output = scratch.afferent("sql").args(["--format", "csv", "-c", &query]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().nth(1).map_or(0, |number| number.parse().unwrap())
}

/// The body that a local HTTP server answers with.
fn get(port: u16, path: &str) -> String {
    let Ok(mut connection) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) else { return String::new() };
    write!(connection, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
    let mut response = String::new();
    connection.read_to_string(&mut response).unwrap();
    response.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default()
}

/// `tests/python/llm_mock.py`, stopped when dropped.
struct LanguageModel {
    port: u16,
    _process: Running,
}

impl LanguageModel {
    fn start(options: &[&str]) -> Self {
        let mut process = Running(python("llm_mock.py").arg("0").args(options).stdout(Stdio::piped()).spawn().unwrap());
        let mut line = String::new();
        BufReader::new(process.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let port = line.trim().strip_prefix("listening on ").unwrap_or_else(|| panic!("the mock says {line:?}"));
        Self { port: port.parse().unwrap(), _process: process }
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}/v1", self.port)
    }

    fn stats(&self) -> Value {
        serde_json::from_str(&get(self.port, "/stats")).unwrap()
    }
}
