//! Interleaved pairs: a comparison measures its two sides in the order A B B A A B ..., so that what drifts on the machine
//! meets both, and prints the median of the pairs' ratios with the least and the greatest. Nothing is asserted here:
//! whoever reads judges.

use std::fmt::Display;
use std::io::Write;
use std::time::Duration;

use anyhow::{Result, bail};

/// Which side is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Afferent.
    Ours,
    /// What it is compared with.
    Rival,
}

/// One measured run of one side.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// Rows or messages that came out.
    pub rows: u64,
    /// The time they took.
    pub wall: Duration,
    /// CPU time of the measured process in that time.
    pub cpu: Duration,
    /// CPU time of the broker in that time; zero where there is none.
    pub server: Duration,
}

impl Run {
    /// Rows a second.
    pub fn rate(&self) -> f64 {
        self.rows as f64 / self.wall.as_secs_f64().max(1e-9)
    }

    /// CPU microseconds of the measured process for each row.
    pub fn cpu_micros(&self) -> f64 {
        self.cpu.as_secs_f64() * 1e6 / (self.rows as f64).max(1.0)
    }

    /// CPU microseconds of the broker for each row.
    pub fn server_micros(&self) -> f64 {
        self.server.as_secs_f64() * 1e6 / (self.rows as f64).max(1.0)
    }
}

/// Median, least and greatest of some numbers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Spread {
    /// The one in the middle, or the mean of the two.
    pub median: f64,
    /// The least.
    pub least: f64,
    /// The greatest.
    pub greatest: f64,
}

impl Spread {
    /// Of the numbers given; zeros when there are none.
    pub fn of(numbers: impl IntoIterator<Item = f64>) -> Spread {
        let mut numbers: Vec<f64> = numbers.into_iter().collect();
        numbers.sort_by(f64::total_cmp);
        let (Some(&least), Some(&greatest)) = (numbers.first(), numbers.last()) else { return Spread::default() };
        let upper = numbers.get(numbers.len() / 2).copied().unwrap_or(greatest);
        let lower = numbers.get((numbers.len() - 1) / 2).copied().unwrap_or(least);
        Spread { median: (lower + upper) / 2.0, least, greatest }
    }
}

/// Measures `rounds` pairs and prints the table. `rival` names the other side; `measure` runs one side once, and is given
/// the number of the round, from 0.
///
/// # Errors
/// Those of `measure`.
pub fn compare(title: &str, rival: &str, rounds: usize, mut measure: impl FnMut(Side, usize) -> Result<Run>) -> Result<()> {
    if rounds == 0 {
        bail!("nothing is measured in 0 rounds; give --rounds at least 1");
    }
    let mut pairs = Vec::with_capacity(rounds);
    for round in 0..rounds {
        let first = if round % 2 == 0 { Side::Ours } else { Side::Rival };
        let second = if round % 2 == 0 { Side::Rival } else { Side::Ours };
        let (a, b) = (measure(first, round)?, measure(second, round)?);
        let (ours, theirs) = if first == Side::Ours { (a, b) } else { (b, a) };
        progress(format!(
            "{title}: round {} of {rounds}: afferent {:.0}/s {:.1} us, {rival} {:.0}/s {:.1} us",
            round + 1,
            ours.rate(),
            ours.cpu_micros(),
            theirs.rate(),
            theirs.cpu_micros()
        ));
        pairs.push((ours, theirs));
    }
    let spread = |number: &dyn Fn(&(Run, Run)) -> f64| Spread::of(pairs.iter().map(number));
    say(format!(
        "\n{title}: {} rows a run, {rounds} pairs; medians (least..greatest)",
        pairs.first().map_or(0, |pair| pair.0.rows)
    ));
    say(format!("{:<24} {:>28} {:>26} {:>26}", "", "rows/s", "CPU us/row", "broker's CPU us/row"));
    for (name, rate, cpu, server) in [
        ("afferent", spread(&|pair| pair.0.rate()), spread(&|pair| pair.0.cpu_micros()), spread(&|pair| pair.0.server_micros())),
        (rival, spread(&|pair| pair.1.rate()), spread(&|pair| pair.1.cpu_micros()), spread(&|pair| pair.1.server_micros())),
    ] {
        say(format!("{name:<24} {:>28} {:>26} {:>26}", shown(rate, 0), shown(cpu, 2), shown(server, 2)));
    }
    let ratio = |ours: f64, theirs: f64| if theirs > 0.0 { ours / theirs } else { f64::NAN };
    let rate = spread(&|pair| ratio(pair.0.rate(), pair.1.rate()));
    let cpu = spread(&|pair| ratio(pair.0.cpu_micros(), pair.1.cpu_micros()));
    let server = spread(&|pair| ratio(pair.0.server_micros(), pair.1.server_micros()));
    say(format!("{:<24} {:>28} {:>26} {:>26}", "ratio of the pairs", shown(rate, 3), shown(cpu, 3), shown(server, 3)));
    Ok(())
}

fn shown(spread: Spread, digits: usize) -> String {
    format!("{:.digits$} ({:.digits$}..{:.digits$})", spread.median, spread.least, spread.greatest)
}

/// A line of a result, on standard output.
pub fn say(line: impl Display) {
    // Who closes standard output does not want the results.
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// A line that says how far things are, on standard error.
pub fn progress(line: impl Display) {
    let _ = writeln!(std::io::stderr(), "{line}");
}
