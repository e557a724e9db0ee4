//! Nothing lost, first proof: the process is killed at random times under load, and loses power. The tests
//! over MQTT have controls: a process with the promise broken on purpose must fail them. The one over files has none:
//! a source that is told nothing is not hurt by the early acknowledgement that is planted here. Kafka: `crash_kafka`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::tools::{Mosquitto, Running, Scratch, python, root, succeed, told, wait_until};

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

/// A system call, as strace tells it.
struct Call {
    /// Lines of the trace: where it began, and where it was done.
    began: usize,
    done: usize,
    text: String,
}

impl Call {
    fn syncs(&self, path: &str) -> bool {
        let sync = self.text.starts_with("fsync(") || self.text.starts_with("fdatasync(");
        sync && self.text.contains(path) && self.text.ends_with("= 0")
    }
}

/// The calls of a trace made with `-f`, in the order in which they began; one that another thread's line has cut in two
/// is put together.
fn calls(trace: &str) -> Vec<Call> {
    let mut calls: Vec<Call> = Vec::new();
    let mut cut: BTreeMap<&str, usize> = BTreeMap::new();
    for (number, line) in trace.lines().enumerate() {
        // The last line may be on its way.
        let Some((thread, told)) = line.split_once(' ') else { continue };
        let told = told.trim_start();
        if let Some(begun) = told.strip_suffix("<unfinished ...>") {
            cut.insert(thread, calls.len());
            calls.push(Call { began: number, done: usize::MAX, text: begun.to_owned() });
        } else if told.starts_with("<... ") {
            let (Some(call), Some((_, rest))) = (cut.remove(thread), told.split_once(" resumed>")) else { continue };
            calls[call].done = number;
            calls[call].text.push_str(rest);
        } else {
            calls.push(Call { began: number, done: number, text: told.to_owned() });
        }
    }
    calls
}

/// The process that strace has started.
fn traced(strace: &Running) -> String {
    let child = succeed(Command::new("pgrep").args(["-P", &strace.0.id().to_string()]));
    String::from_utf8(child.stdout).unwrap().trim().to_owned()
}

/// Files and directories that hold what is acknowledged are synced between the message and its PUBACK.
#[test]
fn tail_and_checkpoint_are_synced_before_the_puback_and_delta_at_the_drain() {
    let broker = Mosquitto::start("");
    let scratch = Scratch::new();
    let pipeline = mqtt_to_table(&scratch, &broker);
    let trace = scratch.path("trace");
    let mut command = Command::new("strace");
    let traced_calls = "trace=fsync,fdatasync,read,readv,recvfrom,recvmsg,sendto,write,writev,sendmsg";
    command
        .args(["-f", "-yy", "-s", "64", "-e", traced_calls, "-o"])
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
    // A PUBACK is 0x40, length 2, packet id.
    let is_puback = |call: &Call| call.text.contains("\"@\\2\\0") && call.text.contains("TCP:");
    wait_until("the PUBACK was sent", Duration::from_secs(30), || {
        calls(&std::fs::read_to_string(&trace).unwrap()).iter().any(is_puback)
    });
    // strace passes the signal on; SIGTERM to it would only detach.
    succeed(Command::new("kill").args(["-TERM", &traced(&running)]));
    running.finish(Duration::from_secs(60));
    let text = std::fs::read_to_string(&trace).unwrap();
    let calls = calls(&text);
    let syncs = || text.lines().filter(|line| line.contains("sync")).collect::<Vec<_>>().join("\n");
    let read = calls
        .iter()
        .find(|call| call.text.starts_with("re") && call.text.contains("TCP:") && call.text.contains("plant/a/reading"));
    let puback = calls.iter().find(|call| is_puback(call)).unwrap();
    // Each is done before the next begins.
    let mut after = read.expect("the message was read").done;
    for path in ["/data/tails/readings/", "/data/pipelines/kill/checkpoint.redb"] {
        let sync = calls.iter().find(|call| call.began > after && call.done < puback.began && call.syncs(path));
        after = sync.unwrap_or_else(|| panic!("{path} was not synced between message and PUBACK:\n{}", syncs())).done;
    }
    // The folders have them already when the message comes, or at the latest before the PUBACK.
    for path in ["/data/tails/readings>", "/data/pipelines/kill>"] {
        assert!(
            calls.iter().any(|call| call.done < puback.began && call.syncs(path)),
            "{path} was not synced before the PUBACK:\n{}",
            syncs()
        );
    }
    // What Delta commits at the drain: the rows, then the commit that names them, each with its folder.
    after = puback.done;
    for path in [".parquet>", "/data/tables/readings>", ".json>", "/data/tables/readings/_delta_log>"] {
        let sync = calls.iter().find(|call| call.began > after && call.syncs(path));
        after = sync.unwrap_or_else(|| panic!("{path} was not synced in its turn at the drain:\n{}", syncs())).done;
    }
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

/// What is taken away from the engine whose power is cut.
#[derive(Clone, Copy, PartialEq)]
enum Without {
    Nothing,
    /// Every sync of the tail and of folders.
    Fsync,
    /// The syncs of the checkpoint store alone: strace answers them, and they never reach the disk.
    CheckpointSync,
}

/// Cuts the power `cuts` times under load; returns how many acknowledged rows were missing after a boot. They are
/// counted when the pipeline has run on the booted disk: until then the tail also shows rows that no stored epoch
/// claims, which recovery drops.
fn missing_after_cuts(cuts: usize, without: Without) -> usize {
    let scratch = Scratch::new();
    let log = scratch.path("mosquitto.log");
    let broker = Mosquitto::start(&format!("user root\nlog_type all\nlog_dest file {}", log.display()));
    let disk = Disk::up(scratch.path("disk"));
    let pipeline = mqtt_to_table(&scratch, &broker);
    let engine = crate::tools::afferent();
    let data = disk.0.join("disk/data");
    let mut command = match without {
        Without::CheckpointSync => {
            let mut strace = Command::new("strace");
            strace.args(["-f", "--seccomp-bpf", "-o", "/dev/null", "-P"]).arg(data.join("pipelines/kill/checkpoint.redb"));
            strace.args(["-e", "trace=fsync,fdatasync", "-e", "inject=fsync,fdatasync:retval=0"]).arg(engine.get_program());
            strace
        }
        Without::Nothing | Without::Fsync => engine,
    };
    command.args(["run", "--data-dir"]).arg(&data).arg(&pipeline);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(std::fs::File::create(scratch.path("run.log")).unwrap());
    if without == Without::Fsync {
        command.env("AFFERENT_SABOTAGE", "no_fsync");
    }
    let mut running = Running(command.spawn().unwrap());
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
        missing += missing_after_recovery(&disk.0.join(&name).join("data"), &pipeline, acked, without);
        disk.powercut(&["halt"], &[&name]);
    }
    if without == Without::CheckpointSync {
        // Without strace it would live on, and keep the disk.
        succeed(Command::new("kill").args(["-KILL", &traced(&running)]));
        wait_until("it has let go of the disk", Duration::from_secs(20), || !running.is_running());
    }
    drop(running);
    assert!(acked > 200, "only {acked} acknowledged: the test is too tame");
    missing
}

/// Lets the pipeline recover on a booted disk, and counts which of the ids below `acked` are not there.
fn missing_after_recovery(data: &Path, pipeline: &Path, acked: i64, without: Without) -> usize {
    // Away from the network, so that nothing comes from the broker, nor goes to it under the live one's name.
    let mut command = Command::new("unshare");
    command.arg("--net").arg(crate::tools::afferent().get_program());
    let recovered = command.args(["run", "--for", "200ms", "--data-dir"]).arg(data).arg(pipeline).output().unwrap();
    if !recovered.status.success() {
        assert!(without != Without::Nothing, "it does not start after a power cut:\n{}", told(&recovered));
        return usize::try_from(acked).unwrap();
    }
    let mut command = crate::tools::afferent();
    command.args(["sql", "--format", "csv", "--data-dir"]).arg(data);
    let output = command.args(["-c", "select distinct id from readings"]).output().unwrap();
    let there: BTreeSet<i64> = String::from_utf8_lossy(&output.stdout).lines().filter_map(|line| line.parse().ok()).collect();
    (0..acked).filter(|id| !there.contains(id)).count()
}

/// How many messages the engine has acknowledged, as the broker logs it; acknowledgements come in order.
fn acknowledged(log: &Path) -> i64 {
    let log = std::fs::read_to_string(log).unwrap();
    log.lines().filter(|line| line.contains("Received PUBACK from afferent-kill-readings")).count() as i64
}

#[test]
fn a_power_cut_takes_nothing_that_was_acknowledged() {
    assert_eq!(missing_after_cuts(20, Without::Nothing), 0, "acknowledged rows were missing after a power cut");
}

#[test]
fn without_fsync_a_power_cut_takes_acknowledged_rows() {
    assert!(missing_after_cuts(6, Without::Fsync) > 0, "the control lost nothing: the test above proves nothing");
}

#[test]
fn without_the_sync_of_the_checkpoint_a_power_cut_takes_acknowledged_rows() {
    let missing = missing_after_cuts(6, Without::CheckpointSync);
    assert!(missing > 0, "the control lost nothing: a checkpoint that is never synced would go unseen");
}
