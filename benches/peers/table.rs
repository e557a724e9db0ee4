//! Whether a table's commits stay cheap: made-up rows into a `table` sink that commits to Delta as fast as it can, and the
//! time that its commits take, early and late. Run by `main`; there is no rival, the table is compared with its own
//! youth. The invariant: only what lies on the disk is looked at, from outside the measured process.
//!
//! Of each commit two times are told. *Written*: from the birth of its data file to its log entry, by the file system's
//! clock, whose steps may be some milliseconds; what a plain commit costs. *Apart*: from the entry of the one before to
//! its own, with everything that comes between them and with the log checkpoints and compactions that are done in
//! their name; a commit begins with a stored epoch, every 20 ms, so that this is never less. What that pace hides, the
//! CPU time of the whole process for each commit shows.

use std::fs;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::Options;
use crate::pairs::{Spread, say};
use crate::process::{Process, wait_until};
use crate::servers::{afferent, scratch};

/// Commits to look at, unless `--rows` says otherwise.
const COMMITS: u64 = 2010;
/// What is called early: the tenth commit and its neighbours.
const EARLY: RangeInclusive<usize> = 5..=15;
/// How many of the last ones are called late.
const LATE: usize = 21;
/// How often the log is looked at. It keeps the last hundred versions, which are more than two seconds' worth.
const LOOK: Duration = Duration::from_millis(50);
/// How long no commit may come before the run has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// 2,000 rows a second, some 40 in each epoch; `commit_bytes` makes a commit of each, as soon as the one before is done.
const PIPELINE: &str = "\
name: peers-table
sources:
  rows:
    generate: { rate: 2000, batch_rows: 40, columns: { id: sequence, at: now, value: { uniform: [0, 1] } } }
sinks:
  kept:
    table: { name: commits, commit_every: 10s, commit_bytes: 1B }
";

/// Runs the measurement; `--rows` is the number of commits.
///
/// # Errors
/// When the command does not run, or the table's log is not what is expected.
pub fn run(options: &Options) -> Result<()> {
    let commits = usize::try_from(options.rows.unwrap_or(COMMITS)).context("counting commits")?;
    ensure!(commits > *EARLY.end() + LATE, "early and late commits need at least {} of them", EARLY.end() + LATE + 1);
    let folder = scratch()?;
    let pipeline = folder.path().join("peers-table.yaml");
    fs::write(&pipeline, PIPELINE).context("writing the pipeline")?;
    let mut process =
        Process::start("afferent", afferent("run", folder.path())?.arg("--no-live").arg(&pipeline), &folder.path().join("log"))?;
    let seen = watch(&mut process, &folder.path().join("data/tables/commits"), commits)?;
    let resident = process.usage()?.resident;
    process.stop()?;

    let tenth = commits.div_ceil(10);
    say("\nDelta commits: times in ms, median (greatest); CPU in ms a commit, with all that is done between them");
    say(format!("{:<12} {:>18} {:>18} {:>12} {:>8}", "commits", "written", "apart", "apart, mean", "CPU"));
    for from in (1..=commits).step_by(tenth) {
        line(&seen, from, (from + tenth - 1).min(commits));
    }
    line(&seen, *EARLY.start(), *EARLY.end());
    line(&seen, commits + 1 - LATE, commits);
    let (early, late) = (numbered(&seen, *EARLY.start(), *EARLY.end()), numbered(&seen, commits + 1 - LATE, commits));
    say(format!(
        "ratio of the medians of the last two lines: written {:.2}, apart {:.2} (aim: at most 2)",
        spread(late, |commit| commit.written).median / spread(early, |commit| commit.written).median,
        spread(late, |commit| commit.apart).median / spread(early, |commit| commit.apart).median
    ));
    let growth = cpu_each(&seen, commits + 1 - tenth, commits) / cpu_each(&seen, 1, tenth);
    say(format!("CPU a commit, last tenth to first: {growth:.2}; {} MiB resident at the end", resident >> 20));
    Ok(())
}

/// What was seen of a commit.
#[derive(Clone, Copy, Debug)]
struct Commit {
    /// From the birth of its data file to its log entry, in milliseconds.
    written: f64,
    /// From the entry of the commit before to its own, in milliseconds.
    apart: f64,
    /// CPU time of the process, in milliseconds, when the entry was seen.
    cpu: f64,
}

/// The commits with these numbers, from 1, as far as there are some.
fn numbered(seen: &[Commit], from: usize, to: usize) -> &[Commit] {
    seen.get(from.saturating_sub(1)..to.min(seen.len())).unwrap_or_default()
}

/// CPU milliseconds for each of these commits but the first.
fn cpu_each(seen: &[Commit], from: usize, to: usize) -> f64 {
    match numbered(seen, from, to) {
        [first, .., last] => (last.cpu - first.cpu) / (to - from) as f64,
        _ => f64::NAN,
    }
}

fn spread(commits: &[Commit], time: fn(&Commit) -> f64) -> Spread {
    Spread::of(commits.iter().map(time))
}

fn line(seen: &[Commit], from: usize, to: usize) {
    let commits = numbered(seen, from, to);
    let shown = |spread: Spread| format!("{:.1} ({:.1})", spread.median, spread.greatest);
    let mean = commits.iter().map(|commit| commit.apart).sum::<f64>() / (commits.len() as f64).max(1.0);
    say(format!(
        "{:<12} {:>18} {:>18} {mean:>12.1} {:>8.2}",
        format!("{from}..{to}"),
        shown(spread(commits, |commit| commit.written)),
        shown(spread(commits, |commit| commit.apart)),
        cpu_each(seen, from, to)
    ));
}

/// Follows the table's log until it has had that many commits of rows.
fn watch(process: &mut Process, table: &Path, commits: usize) -> Result<Vec<Commit>> {
    wait_until("the table is made", PATIENCE, || {
        process.must_run()?;
        Ok(entry(table, 0).exists())
    })?;
    let mut seen = Vec::with_capacity(commits);
    let (mut before, mut version, mut heard) = (modified(&entry(table, 0))?, 1, Instant::now());
    while seen.len() < commits {
        let path = entry(table, version);
        if !path.exists() {
            process.must_run()?;
            ensure!(heard.elapsed() < PATIENCE, "no commit for {PATIENCE:?} after {} of {commits}", seen.len());
            thread::sleep(LOOK);
            continue;
        }
        heard = Instant::now();
        if let Some(data) = added(&path)? {
            let data = table.join(data);
            let born = fs::metadata(&data).and_then(|metadata| metadata.created());
            let born = born.with_context(|| format!("asking for the birth of {}", data.display()))?;
            let at = modified(&path)?;
            seen.push(Commit { written: millis(born, at), apart: millis(before, at), cpu: process.cpu()?.as_secs_f64() * 1e3 });
            before = at;
        }
        version += 1;
    }
    Ok(seen)
}

fn entry(table: &Path, version: u64) -> PathBuf {
    table.join("_delta_log").join(format!("{version:020}.json"))
}

fn modified(path: &Path) -> Result<SystemTime> {
    fs::metadata(path).and_then(|metadata| metadata.modified()).with_context(|| format!("looking at {}", path.display()))
}

/// A coarse clock may put the later before the earlier by a step: that is no time.
fn millis(from: SystemTime, to: SystemTime) -> f64 {
    to.duration_since(from).unwrap_or_default().as_secs_f64() * 1e3
}

/// The data file of a log entry that is a commit of rows; compactions say that no data has changed.
fn added(path: &Path) -> Result<Option<String>> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    for line in text.lines() {
        let action: Value = serde_json::from_str(line).with_context(|| format!("reading {}", path.display()))?;
        let add = &action["add"];
        if add["dataChange"] == Value::Bool(true) {
            return Ok(add["path"].as_str().map(str::to_owned));
        }
    }
    Ok(None)
}
