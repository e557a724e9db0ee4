//! Start to ready, memory and wake-ups without traffic, and the size of the binary. Called by `main.rs`. Ready is the
//! moment when the log says that the broker has confirmed the subscription. The invariant: every start has a data
//! directory of its own, as a first start has.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::Options;
use crate::consumer::models;
use crate::pairs::{Spread, progress, say};
use crate::process::Process;
use crate::servers::{self, Mosquitto};

/// Starts that are measured.
const STARTS: usize = 20;
/// How long one may take.
const LIMIT: Duration = Duration::from_secs(60);
/// Seconds without traffic, before memory is read and again while wake-ups are counted.
const IDLE: u64 = 10;

/// Measures and prints.
///
/// # Errors
/// When the broker or `afferent` fails.
pub fn run(_: &Options) -> Result<()> {
    let broker = Mosquitto::start()?;
    let mut times = Vec::with_capacity(STARTS);
    for start in 0..STARTS {
        let folder = servers::scratch()?;
        let (process, time) = ready(&broker, folder.path())?;
        process.stop()?;
        progress(format!("start {} of {STARTS}: {:.1} ms", start + 1, time.as_secs_f64() * 1e3));
        times.push(time.as_secs_f64() * 1e3);
    }
    let spread = Spread::of(times);
    say(format!(
        "\nstart to subscribed, {STARTS} times: median {:.0} ms ({:.0}..{:.0})",
        spread.median, spread.least, spread.greatest
    ));

    let folder = servers::scratch()?;
    let (process, _) = ready(&broker, folder.path())?;
    progress(format!("{} s without traffic", 2 * IDLE));
    thread::sleep(Duration::from_secs(IDLE));
    let before = process.usage()?;
    thread::sleep(Duration::from_secs(IDLE));
    let after = process.usage()?;
    let second = |count: u64| count as f64 / IDLE as f64;
    say(format!(
        "idle: {:.1} MB resident, {:.1} MB at most, {} threads",
        after.resident as f64 / 1e6,
        after.peak as f64 / 1e6,
        after.threads
    ));
    say(format!(
        "idle: {:.1} wake-ups/s (voluntary context switches), {:.1} involuntary/s, {:.2} ms CPU/s",
        second(after.voluntary.saturating_sub(before.voluntary)),
        second(after.involuntary.saturating_sub(before.involuntary)),
        (after.cpu.saturating_sub(before.cpu)).as_secs_f64() * 1e3 / IDLE as f64
    ));
    process.stop()?;

    let binary = Path::new(env!("CARGO_BIN_EXE_afferent"));
    let size = fs::metadata(binary).with_context(|| format!("looking at {}", binary.display()))?.len();
    say(format!("binary: {:.1} MB", size as f64 / 1e6));
    Ok(())
}

/// Starts the pipeline, and says how long it took until it had subscribed.
fn ready(broker: &Mosquitto, folder: &Path) -> Result<(Process, Duration)> {
    let pipeline = pipeline(broker, folder)?;
    let log = folder.join("log");
    let mut command = servers::afferent("run", folder)?;
    command.arg("--models").arg(models()).arg(&pipeline);
    let began = Instant::now();
    let mut process = Process::start("afferent", &mut command, &log)?;
    while !process.log().contains("mqtt connected and subscribed") {
        process.must_run()?;
        if began.elapsed() > LIMIT {
            bail!("afferent has not subscribed within {LIMIT:?}; its log is:\n{}", process.log());
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok((process, began.elapsed()))
}

fn pipeline(broker: &Mosquitto, folder: &Path) -> Result<PathBuf> {
    let text = format!(
        r#"name: start
sources:
  readings:
    mqtt: {{ url: "{}", topics: ["plant/+/reading"] }}
operators:
  decoded:
    decode:
      format: json
      schema: {{ s1: float32, s2: float32, s3: float32, s4: float32, s5: float32, s6: float32, s7: float32, s8: float32, s9: float32 }}
  scored:
    infer: {{ model: shuttle, inputs: {{ readings: [s1, s2, s3, s4, s5, s6, s7, s8, s9] }} }}
sinks:
  printed:
    stdout: {{ format: json_lines }}
"#,
        broker.url()
    );
    let path = folder.join("start.yaml");
    fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    Ok(path)
}
