//! The three consumers that do the same work: Afferent with a pipeline, the rival in Rust and the rival in Python. Each
//! subscribes to `plant/+/reading`, decodes JSON, scores with the shuttle autoencoder, publishes to `results/DEVICE` and
//! writes JSON lines to a file. The invariant: started with the same [`Job`], all three give the same results.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::process::{Process, wait_until};
use crate::servers::{self, Mosquitto};

/// How long a consumer may take to subscribe.
const START: Duration = Duration::from_secs(60);

/// Who consumes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// `afferent run`.
    Afferent,
    /// This program as `rival-mqtt`.
    Rust {
        /// Worker threads; 1 runs everything on one.
        threads: usize,
        /// Encodes for each sink and not once for both.
        encode_twice: bool,
    },
    /// `rival.py`.
    Python,
}

/// What is to be done.
#[derive(Clone, Copy, Debug)]
pub struct Job {
    /// The quality of service of the subscription, 0 or 1.
    pub qos_in: u8,
    /// The quality of service of the results, 0 or 1.
    pub qos_out: u8,
    /// Rows in a batch at most. The rival in Rust takes 1,024 at most whatever is said here.
    pub batch: usize,
}

/// A consumer at work, in a folder of its own.
pub struct Consumer {
    /// The process.
    pub process: Process,
    /// The JSON lines that it writes.
    pub output: PathBuf,
    _folder: TempDir,
}

impl Consumer {
    /// Starts it and waits until it has subscribed.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(who: Who, job: &Job, broker: &Mosquitto) -> Result<Consumer> {
        let folder = servers::scratch()?;
        let output = folder.path().join("results.jsonl");
        let (name, ready, mut command) = match who {
            Who::Afferent => ("afferent", "mqtt connected and subscribed", afferent(job, broker, folder.path())?),
            Who::Rust { threads, encode_twice } => {
                let mut command = servers::rival("rival-mqtt")?;
                command.arg(broker.port.to_string()).args([job.qos_in.to_string(), job.qos_out.to_string()]);
                command.args([&model(), &output]).arg(threads.to_string()).arg(if encode_twice { "2" } else { "1" });
                ("the rival in Rust", "ready", command)
            }
            Who::Python => {
                let mut command = Command::new(servers::python()?);
                command.arg(root().join("benches/peers/rival.py")).arg(broker.port.to_string());
                command.args([job.qos_in.to_string(), job.qos_out.to_string()]).args([&model(), &output]);
                command.arg(job.batch.to_string());
                ("the rival in Python", "ready", command)
            }
        };
        let mut process = Process::start(name, &mut command, &folder.path().join("log"))?;
        wait_until(&format!("{name} has subscribed"), START, || {
            process.must_run()?;
            Ok(process.log().contains(ready))
        })?;
        Ok(Consumer { process, output, _folder: folder })
    }
}

/// The repository's root.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The repository of the models.
pub fn models() -> PathBuf {
    root().join("examples/shuttle-anomaly/models")
}

fn model() -> PathBuf {
    models().join("shuttle/1/model.onnx")
}

fn afferent(job: &Job, broker: &Mosquitto, folder: &Path) -> Result<Command> {
    let word = |qos: u8| if qos == 0 { "at_most_once" } else { "at_least_once" };
    let (url, qos_in, qos_out, batch) = (broker.url(), word(job.qos_in), word(job.qos_out), job.batch);
    // `overload: block`: what the broker has waiting at QoS 0 is not to be dropped here.
    let text = format!(
        r#"name: peers
sources:
  readings:
    mqtt: {{ url: "{url}", topics: ["plant/+/reading"], qos: {qos_in}, protocol: v3_1_1, batch_rows: {batch}, overload: block }}
operators:
  decoded:
    decode:
      format: json
      schema:
        {{ id: int64, device: utf8, stamp: int64, s1: float32, s2: float32, s3: float32, s4: float32, s5: float32, s6: float32, s7: float32, s8: float32, s9: float32 }}
  scored:
    infer:
      model: shuttle
      inputs: {{ readings: [s1, s2, s3, s4, s5, s6, s7, s8, s9] }}
      outputs: {{ score: {{ column: score }} }}
      keep: [id, device, stamp]
sinks:
  results:
    inputs: [scored]
    mqtt: {{ url: "{url}", topic: "results/{{device}}", qos: {qos_out}, protocol: v3_1_1, format: json }}
  log:
    inputs: [scored]
    file: {{ path: results.jsonl }}
"#
    );
    let pipeline = folder.join("peers.yaml");
    fs::write(&pipeline, text).with_context(|| format!("writing {}", pipeline.display()))?;
    let mut command = servers::afferent("run", folder)?;
    command.arg("--models").arg(models()).arg(&pipeline);
    Ok(command)
}
