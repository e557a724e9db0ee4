//! The seeded simulation: a random graph, random faults, crashes and restarts on virtual time, through
//! the very code that `run` uses; the world judges the outcome. Same seed, same log.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::disk::Disk;
use super::sketch::Sketch;
use super::stages::{Faults, MemoryDeadLetters};
use super::world::World;
use crate::assembly::Runtimes;
use crate::checkpoint::Checkpoints;
use crate::durable;
use crate::error::{Error, Result};
use crate::metrics::Metrics;
use crate::sabotage::Planted;
use crate::supervisor::{Options, Restore, RunError, run};

/// Virtual time after which a run that has not ended counts as a deadlock.
const DEADLOCK: Duration = Duration::from_secs(3600);

/// What one simulated life of a pipeline came to.
#[derive(Debug)]
pub struct Outcome {
    /// What was violated; empty when all is well.
    pub violations: Vec<String>,
    /// Everything that happened.
    pub log: String,
    /// How often the process died.
    pub crashes: usize,
    /// How often each kind of fault occurred.
    pub faults: BTreeMap<&'static str, usize>,
    /// For each source, how many rows were under way at most.
    pub most_under_way: Vec<i64>,
}

/// What a seed has in store for a pipeline, besides its shape.
struct Fate {
    faults: Faults,
    /// How often the process dies or is told to drain.
    crashes: usize,
    /// For each sink, when its peer is down.
    down: Vec<Option<(Duration, Duration)>>,
    /// When the disk of the checkpoint store is full, and for how long.
    full: Option<(Duration, Duration)>,
    /// Calls of the checkpoint store take up to this many microseconds; 0: no time.
    store_delay: u64,
}

impl Fate {
    /// Nothing goes wrong.
    #[cfg(test)]
    fn kind(sinks: usize) -> Self {
        Self { faults: Faults::default(), crashes: 0, down: vec![None; sinks], full: None, store_delay: 0 }
    }

    fn draw(random: &mut fastrand::Rng, sinks: usize) -> Self {
        let faults = Faults {
            retry: random.u32(0..60),
            fatal: random.u32(0..8),
            panic: random.u32(0..3),
            slow_open: if random.u32(0..3) == 0 { 200 } else { 0 },
            dead_letters: random.u32(0..300),
            delay: random.u64(0..3_000),
        };
        let mut period = |one_in: u32, after: u64, longest: u64| {
            let (after, lasts) = (Duration::from_micros(random.u64(0..after)), Duration::from_millis(random.u64(1..longest)));
            (random.u32(0..one_in) == 0).then_some((after, lasts))
        };
        let down = (0..sinks).map(|_| period(5, 100_000, 20_000).map(|(after, lasts)| (after, after + lasts))).collect();
        let full = period(4, 50_000, 60_000);
        let store_delay = if random.u32(0..3) == 0 { random.u64(1..50_000) } else { 0 };
        Self { faults, crashes: random.usize(0..5), down, full, store_delay }
    }
}

/// Lives one pipeline from its first start to its end, with all that this seed has in store for it.
///
/// # Errors
/// When the simulation itself cannot be set up.
pub fn simulate(seed: u64, planted: Planted) -> Result<Outcome> {
    let mut random = fastrand::Rng::with_seed(seed);
    let sketch = Sketch::draw(&mut random);
    let fate = Fate::draw(&mut random, sketch.sinks());
    on_virtual_time(live(&sketch, &fate, random, seed, planted))
}

fn on_virtual_time(life: impl Future<Output = Result<Outcome>>) -> Result<Outcome> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().map_err(Error::fatal)?;
    runtime.block_on(life)
}

/// Lets the disk be full for a while.
fn fill(disk: Disk, world: World, (after, lasts): (Duration, Duration)) {
    tokio::spawn(async move {
        for (wait, full) in [(after, true), (lasts, false)] {
            sleep(wait).await;
            disk.fill(full);
            let mut world = world.lock();
            world.full_since = full.then(Instant::now);
            world.note(if full { "the disk is full" } else { "the disk has space again" });
        }
    });
}

/// The checkpoint store on this disk, perhaps a slow one.
fn store(disk: &Disk, world: &World, store_delay: u64, seed: u64) -> Result<Checkpoints> {
    let store = Checkpoints::with_backend(disk.backend())?;
    if store_delay == 0 {
        return Ok(store);
    }
    let (random, world) = (std::sync::Mutex::new(fastrand::Rng::with_seed(seed)), world.clone());
    Ok(store.dawdling(move || {
        let mut random = random.lock().unwrap_or_else(PoisonError::into_inner);
        if random.bool() {
            return Duration::ZERO;
        }
        world.lock().struck("slow store");
        Duration::from_micros(random.u64(1..=store_delay))
    }))
}

async fn live(sketch: &Sketch, fate: &Fate, mut random: fastrand::Rng, seed: u64, planted: Planted) -> Result<Outcome> {
    let world = sketch.world();
    for (sink, down) in world.lock().sinks.iter_mut().zip(&fate.down) {
        sink.down = *down;
    }
    let newest = Arc::new(AtomicU64::new(0));
    let mut disk = Disk::new();
    if let Some(period) = fate.full {
        fill(disk.clone(), world.clone(), period);
    }
    let mut crashes_left = fate.crashes;
    let mut crashes = 0;
    let mut lives = 0;
    loop {
        let store = match store(&disk, &world, fate.store_delay, random.u64(..)) {
            Ok(store) => Arc::new(store),
            Err(error) if durable::is_full(&error) => {
                // Someone tries it again.
                world.lock().note(error);
                sleep(Duration::from_secs(1)).await;
                continue;
            }
            Err(error) => return Err(error),
        };
        lives += 1;
        // Bad luck ends sometime, so that the last life can reach the end.
        let faults =
            if lives > 12 { Faults { retry: 0, fatal: 0, panic: 0, dead_letters: 0, ..fate.faults } } else { fate.faults };
        let dead_letters = MemoryDeadLetters { world: world.clone(), newest: Arc::clone(&newest), faults, random: random.fork() };
        let graph = sketch.graph(&world, faults, seed);
        let drain = CancellationToken::new();
        let options = Options {
            store,
            data_dir: Default::default(),
            metrics: Metrics::new().map_err(Error::fatal)?,
            runtimes: Runtimes::current(),
            drain: drain.clone(),
            drain_limit: Duration::from_secs(600),
            dead_letters: Some(Arc::new(Mutex::new(dead_letters))),
            restore: Restore::Strict,
            seed,
            planted,
            virtual_time: true,
        };
        let limit = if crashes_left > 0 { Duration::from_micros(random.u64(100..200_000)) } else { DEADLOCK };
        if crashes_left > 0 && random.u32(0..3) == 0 {
            // Someone asks it to stop: before it has begun, while it opens, or in the middle.
            let (drain, after) = (drain.clone(), Duration::from_micros(random.u64(0..50_000)));
            tokio::spawn(async move {
                sleep(after).await;
                drain.cancel();
            });
        }
        let ended = timeout(limit, run(&graph, &options)).await;
        match ended {
            Ok(Ok(crate::Ending::Ended) | Err(RunError::AlreadyRead)) => {
                if options.store.rejected(1).is_ok_and(|left| left.is_empty()) {
                    break;
                }
                // They are moved at the next start.
                world.lock().note("ended with dead letters left");
                sleep(Duration::from_secs(1)).await;
            }
            Ok(Ok(crate::Ending::Drained)) => world.lock().note("drained"),
            Ok(Err(RunError::DrainLimit(_))) => {
                world.lock().violations.push("deadlock: not drained within ten minutes of virtual time".into());
                break;
            }
            Ok(Err(RunError::Failed { error, .. })) if durable::is_full(&error) && !drain.is_cancelled() => {
                world.lock().violations.push(format!("given up: {error}"));
                break;
            }
            // Given up, like a process that ends with an error: someone starts it again.
            Ok(Err(error)) => {
                world.lock().note(format_args!("given up: {error}"));
                sleep(Duration::from_secs(1)).await;
            }
            Err(_) if crashes_left == 0 => {
                world.lock().violations.push("deadlock: no end within an hour of virtual time".into());
                break;
            }
            Err(_) => {}
        }
        crashes_left = crashes_left.saturating_sub(1);
        crashes += 1;
        drop(options);
        disk = disk.after_power_cut();
        world.lock().note("crash");
    }
    let mut state = world.lock();
    if disk.refusals() > 0 {
        *state.faults.entry("storage full").or_default() += disk.refusals();
    }
    let held: Vec<usize> = state.sinks.iter().map(|sink| sink.visible.len()).collect();
    state.note(format_args!("end: {held:?}"));
    Ok(Outcome {
        violations: state.judge(),
        log: std::mem::take(&mut state.log),
        crashes,
        faults: std::mem::take(&mut state.faults),
        most_under_way: state.senders.iter().map(|sender| sender.most_under_way).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::super::sketch::{End, Shape};
    use super::super::stages::{Refusal, Verb};
    use super::super::world::Kind;
    use super::*;
    use crate::graph::{Port, QueueLimit};

    fn seeds() -> std::ops::Range<u64> {
        let first = std::env::var("AFFERENT_SEED").ok().and_then(|seed| seed.parse().ok());
        first.map_or(0..500, |seed| seed..seed + 1)
    }

    #[test]
    fn five_hundred_seeds_lose_nothing_invent_nothing_and_keep_order() {
        let mut crashes = 0;
        let mut faults: BTreeMap<&str, usize> = BTreeMap::new();
        for seed in seeds() {
            let outcome = simulate(seed, Planted::default()).unwrap();
            assert!(
                outcome.violations.is_empty(),
                "seed {seed}: {:#?}\n(AFFERENT_SEED={seed} runs it alone)\n{}",
                outcome.violations,
                tail(&outcome.log)
            );
            crashes += outcome.crashes;
            for (fault, count) in outcome.faults {
                *faults.entry(fault).or_default() += count;
            }
        }
        if seeds().count() == 1 {
            return;
        }
        assert!(crashes > 300, "only {crashes} crashes: the simulation is too tame");
        for fault in FAULTS {
            assert!(faults.contains_key(fault), "`{fault}` never occurred, only {faults:?}");
        }
    }

    /// What must occur within the seeds of CI.
    const FAULTS: [&str; 13] = [
        "retry",
        "fatal",
        "panic",
        "slow open",
        "slow store",
        "sink down",
        "storage full",
        "dead letters refused",
        "dead letters taken, and not said so",
        "refused at write",
        "refused in prepare",
        "refused in prepare at the end of input",
        "rejected edge",
    ];

    fn source(rows: i64) -> Shape {
        Shape::Source { rows, kind: Kind::Replayable, window: 0, pull: 10 }
    }

    /// A graph without chance in it, and what became of it.
    fn lived(stages: Vec<(Shape, Vec<End>)>, fate: impl FnOnce(Fate) -> Fate) -> Outcome {
        let (shapes, inputs): (Vec<_>, Vec<_>) = stages.into_iter().unzip();
        let queue = QueueLimit { rows: 40, bytes: 1 << 20 };
        let sketch = Sketch { shapes, inputs, queue, pace: Duration::from_millis(1) };
        let fate = fate(Fate::kind(sketch.sinks()));
        on_virtual_time(live(&sketch, &fate, fastrand::Rng::with_seed(1), 1, Planted::default())).unwrap()
    }

    #[test]
    fn rejects_do_not_gather_without_bound_while_a_sink_is_down() {
        // One row of the second source keeps an epoch from its end; all rows of the first are rejected meanwhile.
        let stages = vec![
            (source(30_000), vec![]),
            (source(1), vec![]),
            (Shape::Sync(Verb::Reject(1)), vec![(0, Port::Output(0))]),
            (Shape::Sink(Refusal::Never), vec![(1, Port::Output(0)), (2, Port::Output(0))]),
        ];
        let down = Some((Duration::ZERO, Duration::from_secs(5)));
        let outcome = lived(stages, |fate| Fate { down: vec![down], ..fate });
        assert_eq!(outcome.violations, Vec::<String>::new());
        assert!(outcome.faults["sink down"] > 0);
        assert!(outcome.most_under_way[0] < 6_000, "{} rows were under way", outcome.most_under_way[0]);
    }

    #[test]
    fn what_a_sink_refuses_at_the_last_barrier_is_not_too_late_for_those_who_read_it() {
        let stages = vec![
            (source(20), vec![]),
            (Shape::Sink(Refusal::AtPrepare(1)), vec![(0, Port::Output(0))]),
            (Shape::Sync(Verb::Hold(7)), vec![(1, Port::Rejected)]),
            (Shape::Sink(Refusal::Never), vec![(2, Port::Output(0))]),
        ];
        let outcome = lived(stages, |fate| fate);
        assert_eq!(outcome.violations, Vec::<String>::new());
        assert!(outcome.faults["refused in prepare at the end of input"] > 0);
    }

    #[test]
    fn a_disk_that_is_full_for_long_is_waited_for() {
        let stages = vec![(source(2_000), vec![]), (Shape::Sink(Refusal::Never), vec![(0, Port::Output(0))])];
        // Longer than restarts without progress are allowed to go on for.
        let outcome = lived(stages, |fate| Fate {
            full: Some((Duration::from_millis(2), Duration::from_secs(600))),
            faults: Faults { delay: 2_000, ..fate.faults },
            ..fate
        });
        assert_eq!(outcome.violations, Vec::<String>::new());
        assert!(outcome.faults["storage full"] > 10, "{:?}", outcome.faults);
        assert_eq!(outcome.crashes, 0, "{}", tail(&outcome.log));
    }

    #[test]
    fn the_same_seed_writes_the_same_log() {
        for seed in 0..40 {
            let (first, second) = (simulate(seed, Planted::default()).unwrap(), simulate(seed, Planted::default()).unwrap());
            assert_eq!(first.log, second.log, "seed {seed}");
        }
    }

    /// A planted fault must be found within the seeds of CI, or the simulation proves nothing.
    fn found(planted: Planted, sign: &str) {
        let caught = (0..500).find(|seed| {
            let outcome = simulate(*seed, planted).unwrap();
            outcome.violations.iter().any(|violation| violation.starts_with(sign))
        });
        assert!(caught.is_some(), "{planted:?} was not noticed as `{sign}` in 500 seeds");
    }

    #[test]
    fn an_early_acknowledgement_is_found() {
        found(Planted { early_ack: true, ..Planted::default() }, "committed ahead of durable");
        found(Planted { early_ack: true, ..Planted::default() }, "lost");
    }

    #[test]
    fn an_overtaking_barrier_is_found() {
        found(Planted { overtaking_barrier: true, ..Planted::default() }, "lost");
    }

    #[test]
    fn a_lost_state_delta_is_found() {
        found(Planted { lost_delta: true, ..Planted::default() }, "lost");
    }

    #[test]
    fn a_reordering_is_found() {
        found(Planted { reordering: true, ..Planted::default() }, "reordered");
    }

    fn tail(log: &str) -> String {
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }
}
