//! Nothing lost, first proof: the process is killed at random times under load, and loses power. The tests
//! over MQTT have controls: a process with the promise broken on purpose must fail them. Those over files and Kafka
//! have none yet: sources that replay are not hurt by the early acknowledgement that is planted here.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::tools::{Kafka, Mosquitto, Running, Scratch, python, root, succeed, told, wait_until};

/// A publisher that writes down what the broker has acknowledged.
struct Publisher {
    child: Child,
    acked: PathBuf,
}

impl Publisher {
    fn start(scratch: &Scratch, broker: &Mosquitto, rate: u32) -> Self {
        let acked = scratch.path("acked");
        let mut command = python("publisher.py");
        command.args([&broker.port.to_string(), "plant/a/reading", &rate.to_string()]).arg(&acked);
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        Self { child, acked }
    }

    /// Stops publishing and returns the ids that the broker has acknowledged.
    fn stop(mut self) -> BTreeSet<i64> {
        drop(self.child.stdin.take());
        let output = self.child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", told(&output));
        std::fs::read_to_string(&self.acked).unwrap().lines().map(|id| id.parse().unwrap()).collect()
    }
}

/// How often each id is in a table.
fn counts(scratch: &Scratch, table: &str) -> BTreeMap<i64, i64> {
    let csv = scratch.sql(&format!("select id, count(*) as n from {table} group by id"));
    csv.lines()
        .skip(1)
        .map(|line| line.split_once(',').unwrap())
        .map(|(id, n)| (id.parse().unwrap(), n.parse().unwrap()))
        .collect()
}

fn mqtt_to_table(scratch: &Scratch, broker: &Mosquitto) -> PathBuf {
    let text = format!(
        "name: kill\nsources:\n  readings:\n    mqtt: {{ url: \"{}\", topics: [\"plant/{{site}}/reading\"], protocol: v3_1_1 }}\n\
         operators:\n  decoded:\n    decode: {{ format: json, schema: {{ id: int64 }} }}\nsinks:\n  out:\n    table: {{ name: readings }}\n",
        broker.url()
    );
    scratch.write("kill.yaml", text)
}

/// Kills the pipeline `rounds` times, each 50 to 1,500 ms after its start, while `configure` may break it.
fn kill_loop(scratch: &Scratch, pipeline: &Path, rounds: usize, seed: u64, configure: impl Fn(&mut Command)) {
    let mut random = fastrand::Rng::with_seed(seed);
    println!("seed {seed}");
    for _ in 0..rounds {
        let mut running = scratch.start("run", &[pipeline], &configure);
        std::thread::sleep(Duration::from_millis(random.u64(50..1500)));
        assert!(running.is_running(), "it ended by itself:\n{}", scratch.log("run"));
        running.kill();
    }
}

/// Runs rounds of kill -9 under load from MQTT to a table. Returns the acknowledged ids and how often each id arrived.
fn mqtt_under_kills(rounds: usize, sabotage: Option<&str>) -> (BTreeSet<i64>, BTreeMap<i64, i64>, usize) {
    let broker = Mosquitto::start("");
    let scratch = Scratch::new();
    let pipeline = mqtt_to_table(&scratch, &broker);
    let configure = |command: &mut Command| {
        if let Some(fault) = sabotage {
            command.env("AFFERENT_SABOTAGE", fault);
        }
    };
    // The session must exist before the first message, or the broker has nobody to keep it for.
    let first = scratch.start("run", &[&pipeline], configure);
    wait_until("the session exists", Duration::from_secs(20), || scratch.log("run").contains("subscribed"));
    drop(first);
    let publisher = Publisher::start(&scratch, &broker, 2000);
    kill_loop(&scratch, &pipeline, rounds, 20_26_11, configure);
    let acked = publisher.stop();
    let last = scratch.start("run", &[&pipeline], configure);
    // Drained when the count has not changed for two seconds.
    let (mut before, mut quiet) = (-1, 0);
    wait_until("the queue is drained", Duration::from_secs(120), || {
        std::thread::sleep(Duration::from_millis(500));
        let now = scratch.number("select count(*) from readings");
        quiet = if now == before { quiet + 1 } else { 0 };
        before = now;
        quiet >= 4
    });
    last.drain();
    (acked, counts(&scratch, "readings"), rounds)
}

/// mosquitto's default: so many messages are in flight to one client.
const IN_FLIGHT: i64 = 20;

#[test]
fn kill_9_between_mqtt_and_a_table_loses_nothing_that_the_broker_acknowledged() {
    let (acked, arrived, rounds) = mqtt_under_kills(30, None);
    assert!(acked.len() > 2000, "only {} messages: the test is too tame", acked.len());
    let lost: Vec<_> = acked.iter().filter(|id| !arrived.contains_key(id)).take(10).collect();
    assert!(lost.is_empty(), "lost, among others: {lost:?}");
    let highest = acked.last().unwrap();
    assert!(arrived.keys().all(|id| *id >= 0 && id <= highest), "rows that nobody published");
    let doubled: i64 = arrived.values().map(|n| n - 1).sum();
    let allowed = IN_FLIGHT * (rounds as i64 + 2);
    assert!(doubled <= allowed, "{doubled} duplicates, {allowed} allowed");
    println!("acknowledged {}, arrived {}, doubled {doubled} (allowed {allowed}), kills {rounds}", acked.len(), arrived.len());
}

#[test]
fn a_build_that_acknowledges_at_pick_up_loses_under_kill_9() {
    let (acked, arrived, _) = mqtt_under_kills(12, Some("early_ack"));
    let lost = acked.iter().filter(|id| !arrived.contains_key(id)).count();
    assert!(lost > 0, "the control lost nothing: the test above proves nothing");
}

#[test]
fn kill_9_between_a_file_and_a_table_keeps_each_row_once() {
    let scratch = Scratch::new();
    let rows = 6000;
    let lines: String =
        (0..rows).map(|id| format!("{{\"id\":{id},\"ts\":\"2026-01-01T00:00:{:02}.{:03}Z\"}}\n", id / 1000, id % 1000)).collect();
    scratch.write("rows.jsonl", lines);
    let pipeline = scratch.write(
        "file.yaml",
        "name: file\nsources:\n  rows:\n    file: { path: rows.jsonl, schema: { id: int64, ts: timestamp_ms }, event_time: ts, pace: realtime }\n\
         sinks:\n  out:\n    table: { name: readings }\n",
    );
    let mut random = fastrand::Rng::with_seed(7);
    for _ in 0..8 {
        let mut running = scratch.start("run", &[&pipeline], |_| {});
        std::thread::sleep(Duration::from_millis(random.u64(50..700)));
        running.kill();
    }
    scratch.start("run", &[&pipeline], |_| {}).finish(Duration::from_secs(60));
    let arrived = counts(&scratch, "readings");
    assert_eq!(arrived.len(), rows, "rows in the table");
    assert!(arrived.values().all(|n| *n == 1), "some rows are there more than once");
}

/// Numbered messages into a topic, by a client that is not ours.
fn fill_topic(kafka: &Kafka, topic: &str, rows: usize) {
    succeed(python("kafka_client.py").args(["produce", &kafka.address(), topic, &rows.to_string()]));
}

/// Ids in a topic, in the order in which they are read, by a client that is not ours.
fn read_topic(kafka: &Kafka, topic: &str) -> Vec<i64> {
    let output = succeed(python("kafka_client.py").args(["consume", &kafka.address(), topic]));
    String::from_utf8(output.stdout).unwrap().lines().map(|id| id.parse().unwrap()).collect()
}

#[test]
fn kill_9_between_kafka_and_a_table_and_kafka_and_kafka() {
    let kafka = Kafka::start();
    let scratch = Scratch::new();
    let rows = 40_000;
    fill_topic(&kafka, "in", rows);
    let source = format!("kafka: {{ brokers: [\"{}\"], topics: [in], start: earliest }}", kafka.address());
    let decode = "decode: { format: json, schema: { id: int64 } }";
    let text = format!(
        "name: to-table\nsources:\n  messages:\n    {source}\noperators:\n  decoded:\n    {decode}\nsinks:\n  out:\n    table: {{ name: readings }}\n"
    );
    let to_table = scratch.write("to-table.yaml", text);
    let text = format!(
        "name: to-kafka\nsources:\n  messages:\n    {source}\noperators:\n  decoded:\n    {decode}\nsinks:\n  out:\n    \
         kafka: {{ brokers: [\"{}\"], topic: out, format: json }}\n",
        kafka.address()
    );
    let to_kafka = scratch.write("to-kafka.yaml", text);
    let mut random = fastrand::Rng::with_seed(11);
    for _ in 0..6 {
        let mut running = scratch.start("run", &[&to_table, &to_kafka], |_| {});
        std::thread::sleep(Duration::from_millis(random.u64(200..2500)));
        running.kill();
    }
    let running = scratch.start("run", &[&to_table, &to_kafka], |_| {});
    let mut copied = 0;
    wait_until("everything has arrived", Duration::from_secs(120), || {
        copied = read_topic(&kafka, "out").into_iter().collect::<BTreeSet<_>>().len();
        copied == rows && scratch.number("select count(*) from readings") >= rows as i64
    });
    running.drain();
    let arrived = counts(&scratch, "readings");
    assert_eq!(arrived.len(), rows);
    assert!(arrived.values().all(|n| *n == 1), "Kafka to table: some rows are there more than once");
    println!("Kafka to Kafka: {} messages for {rows} rows", read_topic(&kafka, "out").len());
}

/// Files and directories that hold what was acknowledged must be synced before the PUBACK leaves.
#[test]
fn tail_and_checkpoint_are_synced_before_the_puback() {
    let broker = Mosquitto::start("");
    let scratch = Scratch::new();
    let pipeline = mqtt_to_table(&scratch, &broker);
    let trace = scratch.path("trace");
    let mut command = Command::new("strace");
    command
        .args(["-f", "-yy", "-s", "64", "-e", "trace=fsync,fdatasync,sendto,write,writev,sendmsg", "-o"])
        .arg(&trace)
        .arg(env!("CARGO_BIN_EXE_afferent"))
        .args(["run", "--data-dir"])
        .arg(scratch.data_dir())
        .arg(&pipeline)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(scratch.path("run.log")).unwrap());
    let running = Running(command.spawn().unwrap());
    wait_until("it has subscribed", Duration::from_secs(60), || scratch.log("run").contains("subscribed"));
    broker.publish_lines("plant/a/reading", "{\"id\": 1}\n");
    wait_until("the row is there", Duration::from_secs(30), || {
        scratch.data_dir().join("tails/readings").exists() && scratch.number("select count(*) from readings") == 1
    });
    std::thread::sleep(Duration::from_millis(500));
    // strace passes the signal on; SIGTERM to it would only detach.
    let child = succeed(Command::new("pgrep").args(["-P", &running.0.id().to_string()]));
    succeed(Command::new("kill").args(["-TERM", String::from_utf8(child.stdout).unwrap().trim()]));
    running.finish(Duration::from_secs(60));
    let text = std::fs::read_to_string(&trace).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let is_sync = |line: &str| line.contains("fsync(") || line.contains("fdatasync(");
    // A PUBACK is 0x40, length 2, packet id.
    let puback = lines.iter().position(|line| line.contains("\"@\\2\\0") && line.contains("TCP:")).expect("a PUBACK was sent");
    let synced = |path: &str| lines[..puback].iter().any(|line| is_sync(line) && line.contains(path));
    for path in
        ["/data/tails/readings/", "/data/tails/readings>", "/data/pipelines/kill/checkpoint.redb", "/data/pipelines/kill>"]
    {
        assert!(
            synced(path),
            "{path} was not synced before the PUBACK:\n{}",
            lines[..puback].iter().filter(|l| is_sync(l)).copied().collect::<Vec<_>>().join("\n")
        );
    }
    // What Delta commits at the drain is synced, too, with its directory.
    assert!(
        lines.iter().any(|line| is_sync(line) && line.contains("_delta_log>")),
        "the directory of Delta's log was never synced"
    );
}

/// A disk whose power is cut: see tests/tools/powercut.
struct Disk(PathBuf);

impl Disk {
    fn up(folder: PathBuf) -> Self {
        let disk = Self(folder);
        disk.powercut(&["up"], &["192"]);
        disk
    }

    fn powercut(&self, verb: &[&str], rest: &[&str]) {
        succeed(Command::new(root().join("tests/tools/powercut")).args(verb).arg(&self.0).args(rest));
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new(root().join("tests/tools/powercut")).arg("down").arg(&self.0).output();
    }
}

/// Cuts the power `cuts` times under load; returns how many acknowledged rows were missing after a boot.
fn missing_after_cuts(cuts: usize, sabotage: Option<&str>) -> usize {
    let scratch = Scratch::new();
    let log = scratch.path("mosquitto.log");
    let broker = Mosquitto::start(&format!("user root\nlog_type all\nlog_dest file {}", log.display()));
    let disk = Disk::up(scratch.path("disk"));
    let pipeline = mqtt_to_table(&scratch, &broker);
    let mut command = crate::tools::afferent();
    command.args(["run", "--data-dir"]).arg(disk.0.join("disk/data")).arg(&pipeline);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(std::fs::File::create(scratch.path("run.log")).unwrap());
    if let Some(fault) = sabotage {
        command.env("AFFERENT_SABOTAGE", fault);
    }
    let running = Running(command.spawn().unwrap());
    wait_until("it has subscribed", Duration::from_secs(20), || scratch.log("run").contains("subscribed"));
    let mut random = fastrand::Rng::with_seed(5);
    let (mut missing, mut sent, mut acked) = (0, 0, 0);
    for cut in 0..cuts {
        let lines: String = (sent..sent + 200).map(|id| format!("{{\"id\": {id}}}\n")).collect();
        sent += 200;
        broker.publish_lines("plant/a/reading", &lines);
        std::thread::sleep(Duration::from_millis(random.u64(0..60)));
        // Counted before the cut: what is acknowledged by now must survive it.
        acked = acknowledged(&log);
        let name = format!("cut{cut}");
        disk.powercut(&["cut"], &[&name]);
        disk.powercut(&["boot"], &[&name]);
        let data = disk.0.join(&name).join("data");
        let output = crate::tools::afferent()
            .args(["sql", "--format", "csv", "--data-dir"])
            .arg(&data)
            .args(["-c", "select distinct id from readings"])
            .output()
            .unwrap();
        let there: BTreeSet<i64> = String::from_utf8_lossy(&output.stdout).lines().filter_map(|line| line.parse().ok()).collect();
        missing += (0..acked).filter(|id| !there.contains(id)).count();
        disk.powercut(&["halt"], &[&name]);
    }
    drop(running);
    assert!(acked > 200, "only {acked} acknowledged: the test is too tame");
    missing
}

/// How many messages the engine has acknowledged, as the broker logs it; acknowledgements come in order.
fn acknowledged(log: &Path) -> i64 {
    let log = std::fs::read_to_string(log).unwrap();
    log.lines().filter(|line| line.contains("Received PUBACK from afferent-kill-readings")).count() as i64
}

#[test]
fn a_power_cut_takes_nothing_that_was_acknowledged() {
    assert_eq!(missing_after_cuts(20, None), 0, "acknowledged rows were missing after a power cut");
}

#[test]
fn without_fsync_a_power_cut_takes_acknowledged_rows() {
    assert!(missing_after_cuts(6, Some("no_fsync")) > 0, "the control lost nothing: the test above proves nothing");
}
