//! The drain of a backlog: how fast a consumer works off what the broker has waiting for it. Called by the comparisons
//! over MQTT. The invariant: no run counts unless every reading came out, once, with the score that it had in the
//! first run.
//!
//! The consumer subscribes and works off a few readings, so that it is warm. Then it is stopped where it stands
//! (SIGSTOP), the broker is given the backlog, and the consumer goes on (SIGCONT): from that moment until the last row
//! is in the file and its result has come over MQTT the time is taken. This way the publisher takes no CPU from either
//! side, and a subscription at QoS 0, for which a broker keeps nothing while the client is away, is measured alike.

use std::fs;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::consumer::{Consumer, Job, Who};
use crate::load::{self, LAST, Listener, Readings};
use crate::pairs::Run;
use crate::process::{Lines, watch};
use crate::servers::Mosquitto;

/// Readings before the measured ones.
const WARM: u64 = 2000;
/// How long nothing may come before a run is given up.
const PATIENCE: Duration = Duration::from_secs(20);
/// Pause before and after what is measured: the last commit and the last acknowledgements count, too.
const SETTLE: Duration = Duration::from_millis(300);
/// By how much two scores of one reading may differ, for scores up to 1; in proportion above.
const TOLERANCE: f64 = 1e-5;

/// The scores of the first run, which all others must have.
#[derive(Default)]
pub struct Scores(Vec<f64>);

/// A row of the output.
#[derive(Deserialize)]
pub struct Scored {
    /// Number of the reading.
    pub id: u64,
    /// When it was published, in nanoseconds since 1970.
    pub stamp: i64,
    /// What the model says.
    pub score: f64,
}

/// Gives a consumer a backlog of `rows` readings and measures how it works it off.
///
/// # Errors
/// When the broker or the consumer fails, or the output is not right.
pub fn drain(who: Who, job: &Job, readings: &Readings, rows: u64, scores: &mut Scores) -> Result<Run> {
    let broker = Mosquitto::start()?;
    let mut consumer = Consumer::start(who, job, &broker)?;
    let done = Arc::new(OnceLock::new());
    let seen = Arc::clone(&done);
    let _listener = Listener::start(broker.port, &format!("results/{LAST}"), 1, move |_| {
        let _ = seen.set(());
    })?;
    let mut lines = Lines::of(&consumer.output);
    let began = Instant::now();
    load::publish(broker.port, readings, 0..WARM, false)?;
    watch(&mut consumer.process, began, WARM, PATIENCE, || lines.count())?;
    thread::sleep(SETTLE);

    consumer.process.pause()?;
    load::publish(broker.port, readings, WARM..WARM + rows, true)?;
    thread::sleep(SETTLE);
    let (cpu, server) = (consumer.process.cpu()?, broker.process.cpu()?);
    let began = Instant::now();
    consumer.process.resume()?;
    let watched = watch(&mut consumer.process, began, WARM + rows, PATIENCE, || {
        let count = lines.count()?;
        // Complete is what is in the file and at the broker.
        Ok(if done.get().is_none() { count.min(WARM + rows - 1) } else { count })
    })?;
    thread::sleep(SETTLE);
    let run = Run { rows, wall: watched.wall, cpu: consumer.process.cpu()? - cpu, server: broker.process.cpu()? - server };
    scores.verify(&consumer.output, WARM + rows).with_context(|| format!("checking the output of {who:?}"))?;
    Ok(run)
}

impl Scores {
    /// Every reading of 0 to `count` is there once, with its score.
    fn verify(&mut self, output: &Path, count: u64) -> Result<()> {
        let text = fs::read_to_string(output).with_context(|| format!("reading {}", output.display()))?;
        let mut found = vec![f64::NAN; usize::try_from(count).context("counting rows")?];
        for line in text.lines() {
            let row: Scored = serde_json::from_str(line).with_context(|| format!("reading `{line}`"))?;
            let Some(score) = usize::try_from(row.id).ok().and_then(|id| found.get_mut(id)) else {
                bail!("reading {} was never published", row.id);
            };
            if !score.is_nan() {
                bail!("reading {} came twice", row.id);
            }
            *score = row.score;
        }
        if let Some(lost) = found.iter().position(|score| score.is_nan()) {
            bail!("reading {lost} is lost");
        }
        for (id, (score, first)) in found.iter().zip(&self.0).enumerate() {
            if (score - first).abs() > TOLERANCE * first.abs().max(1.0) {
                bail!("the score of reading {id} is {score}, and was {first} in the first run");
            }
        }
        if self.0.len() < found.len() {
            self.0 = found;
        }
        Ok(())
    }
}
