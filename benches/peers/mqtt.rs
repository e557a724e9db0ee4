//! MQTT -> decode -> infer -> MQTT and file, against a loop in Rust and a loop in Python. Called by `main.rs`. What is
//! measured is the drain of a backlog, see `drain.rs`. The invariant: both sides of a pair do the same [`Job`].

use anyhow::{Result, bail};

use crate::Options;
use crate::consumer::{Job, Who};
use crate::drain::{Scores, drain};
use crate::load::Readings;
use crate::pairs::{Side, compare, progress};

/// Readings of one run.
pub const ROWS: u64 = 100_000;

/// Measures all comparisons, or those whose title has the text of `--only` in it.
///
/// # Errors
/// When a broker or a side fails, or the results are not right.
pub fn run(options: &Options) -> Result<()> {
    let rows = options.rows.unwrap_or(ROWS);
    if rows == 0 {
        bail!("--rows 0 leaves nothing to measure");
    }
    let rust = Who::Rust { threads: options.rival_threads, encode_twice: options.encode_twice };
    let readings = Readings::load()?;
    let mut scores = Scores::default();
    for (title, rival, name, qos, batch) in [
        ("MQTT QoS 0, loop in Rust", rust, "rust loop", 0, 1024),
        ("MQTT QoS 1, loop in Rust", rust, "rust loop", 1, 1024),
        ("MQTT QoS 0 batch 256, loop in Python", Who::Python, "python loop", 0, 256),
        ("MQTT QoS 1 batch 256, loop in Python", Who::Python, "python loop", 1, 256),
    ] {
        if !options.only.as_deref().is_none_or(|only| title.contains(only)) {
            continue;
        }
        progress(format!("{title}: {rows} readings a run"));
        let job = Job { qos_in: qos, qos_out: qos, batch };
        compare(title, name, options.rounds, |side, _| {
            let who = if side == Side::Ours { Who::Afferent } else { rival };
            drain(who, &job, &readings, rows, &mut scores)
        })?;
    }
    Ok(())
}
