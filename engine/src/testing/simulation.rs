//! The seeded simulation: a random graph, random faults, crashes and restarts on virtual time, through
//! the very code that `run` uses; the world judges the outcome. Same seed, same log.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::disk::Disk;
use super::stages::{Faults, MemoryAsync, MemoryDeadLetters, MemoryOperator, MemorySink, MemorySource, Verb, path_behind};
use super::world::{Held, Kind, Row, Sender, World};
use crate::assembly::Runtimes;
use crate::checkpoint::Checkpoints;
use crate::component::OperatorBuild;
use crate::error::{Error, Result};
use crate::graph::{Graph, Inlet, Node, Overflow, Port, QueueLimit, Role};
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
}

/// What a stage of the random graph is.
#[derive(Clone, Copy, Debug)]
enum Shape {
    Source { rows: i64, kind: Kind, window: i64, pull: i64 },
    Sync(Verb),
    Parallel(usize),
    Async(usize),
    Sink,
}

/// A random graph before it is built: shapes with their inputs (stage, output).
struct Sketch {
    shapes: Vec<Shape>,
    inputs: Vec<Vec<(usize, usize)>>,
    queue: QueueLimit,
    pace: Duration,
}

impl Sketch {
    fn draw(random: &mut fastrand::Rng) -> Self {
        let mut sketch = Sketch {
            shapes: Vec::new(),
            inputs: Vec::new(),
            queue: QueueLimit { rows: random.usize(1..40), bytes: 1 << 20 },
            pace: Duration::from_micros(random.u64(200..20_000)),
        };
        // Open ends: (stage, output) that nobody reads yet.
        let mut open: Vec<(usize, usize)> = Vec::new();
        for _ in 0..random.usize(1..=3) {
            let kind = if random.bool() { Kind::Replayable } else { Kind::Redelivering };
            let window = if kind == Kind::Redelivering && random.bool() { random.i64(3..25) } else { 0 };
            open.push((
                sketch.add(Shape::Source { rows: random.i64(0..200), kind, window, pull: random.i64(1..12) }, Vec::new()),
                0,
            ));
        }
        for _ in 0..random.usize(0..7) {
            let shape = match random.u32(0..8) {
                0 | 1 => Shape::Sync(Verb::Pass),
                2 => Shape::Sync(Verb::Split),
                3 | 4 => Shape::Sync(Verb::Hold(random.usize(2..9))),
                5 => Shape::Sync(Verb::Reject(random.i64(2..9))),
                6 => Shape::Parallel(random.usize(2..5)),
                _ => Shape::Async(random.usize(1..6)),
            };
            let mut inputs = vec![open[random.usize(0..open.len())]];
            if random.u32(0..3) == 0 {
                // A fan-in; of the same output twice it would be the same rows twice, which no edge of a
                // real graph is.
                let other = open[random.usize(0..open.len())];
                if other != inputs[0] {
                    inputs.push(other);
                }
            }
            let fan_out = random.u32(0..3) == 0;
            if !fan_out {
                open.retain(|end| !inputs.contains(end));
            }
            let outputs = if matches!(shape, Shape::Sync(Verb::Split)) { 2 } else { 1 };
            let stage = sketch.add(shape, inputs);
            open.extend((0..outputs).map(|output| (stage, output)));
        }
        // A sink for every open end; some share one, and some ends nobody reads.
        let mut shared: Vec<(usize, usize)> = Vec::new();
        let count = open.len();
        for (number, end) in open.into_iter().enumerate() {
            match random.u32(0..5) {
                0 => shared.push(end),
                1 if number + 1 < count => {}
                _ => {
                    sketch.add(Shape::Sink, vec![end]);
                }
            }
        }
        if !shared.is_empty() {
            sketch.add(Shape::Sink, shared);
        }
        sketch
    }

    fn add(&mut self, shape: Shape, inputs: Vec<(usize, usize)>) -> usize {
        self.shapes.push(shape);
        self.inputs.push(inputs);
        self.shapes.len() - 1
    }

    /// The world as it is before the first start, with what must come of every row.
    fn world(&self) -> World {
        let world = World::default();
        let mut state = world.lock();
        state.began = Some(Instant::now());
        state.holds_rows = self.shapes.iter().any(|shape| matches!(shape, Shape::Sync(Verb::Hold(_))));
        for (index, shape) in self.shapes.iter().enumerate() {
            match *shape {
                Shape::Source { rows, kind, .. } => {
                    debug_assert_eq!(index, state.senders.len(), "sources come first");
                    state.senders.push(Sender { kind, rows, acknowledged: 0, sent: 0 });
                }
                Shape::Sink => {
                    state.sinks.push(Held::default());
                    state.expected.push(std::collections::BTreeSet::new());
                }
                _ => {}
            }
        }
        for (source, shape) in self.shapes.iter().enumerate() {
            if let Shape::Source { rows, .. } = *shape {
                for id in 0..rows {
                    self.trace(source, 0, Row { source: source as i64, id, path: 1 }, &mut state);
                }
            }
        }
        drop(state);
        world
    }

    /// Follows one row from an output to everything that must come of it.
    fn trace(&self, stage: usize, output: usize, row: Row, state: &mut super::world::State) {
        for (reader, inputs) in self.inputs.iter().enumerate() {
            if !inputs.contains(&(stage, output)) {
                continue;
            }
            let walked = Row { path: path_behind(row.path, reader), ..row };
            match self.shapes[reader] {
                Shape::Sink => {
                    let sink = self.sink_number(reader);
                    state.expected[sink].insert(row);
                }
                Shape::Sync(verb) => match verb.apply(walked) {
                    Some((output, leaving)) => self.trace(reader, output, leaving, state),
                    None => {
                        state.expected_dead.insert(walked);
                    }
                },
                Shape::Parallel(_) | Shape::Async(_) => self.trace(reader, 0, walked, state),
                Shape::Source { .. } => {}
            }
        }
    }

    fn sink_number(&self, stage: usize) -> usize {
        self.shapes[..stage].iter().filter(|shape| matches!(shape, Shape::Sink)).count()
    }

    fn graph(&self, world: &World, faults: Faults, seed: u64) -> Graph {
        let nodes = self.shapes.iter().enumerate().map(|(stage, shape)| {
            let random = move |run: u32| fastrand::Rng::with_seed(seed ^ (stage as u64) << 32 ^ u64::from(run));
            let world = world.clone();
            let role = match *shape {
                Shape::Source { window, pull, .. } => Role::Source(Arc::new(move |context| {
                    let random = random(context.run);
                    Ok(Box::new(MemorySource { index: stage, world: world.clone(), next: 0, pull, window, faults, random }))
                })),
                Shape::Sync(verb) => Role::Operator {
                    build: OperatorBuild::Compute {
                        build: operator(stage, verb, faults, random),
                        stateful: matches!(verb, Verb::Hold(_)),
                        heavy: false,
                    },
                    parallelism: 1,
                },
                Shape::Parallel(instances) => Role::Operator {
                    build: OperatorBuild::Compute {
                        build: operator(stage, Verb::Pass, faults, random),
                        stateful: false,
                        heavy: false,
                    },
                    parallelism: instances,
                },
                Shape::Async(concurrency) => Role::Operator {
                    build: OperatorBuild::Async(Arc::new(move |context| {
                        Ok(Arc::new(MemoryAsync { stage, concurrency, faults, seed: random(context.run).u64(..) }))
                    })),
                    parallelism: 1,
                },
                Shape::Sink => {
                    let index = self.sink_number(stage);
                    Role::Sink {
                        build: Arc::new(move |context| {
                            Ok(Box::new(MemorySink {
                                index,
                                world: world.clone(),
                                buffer: Vec::new(),
                                faults,
                                random: random(context.run),
                            }))
                        }),
                        commit_interval: self.pace,
                    }
                }
            };
            let inputs = self.inputs[stage].iter().map(|(from, output)| Inlet {
                from: *from,
                port: Port::Output(*output),
                queue: self.queue,
                overflow: Overflow::Block,
            });
            Node {
                name: format!("stage{stage}"),
                component: format!("{shape:?}"),
                role,
                inputs: inputs.collect(),
                fingerprint: stage as u64,
            }
        });
        Graph { name: "simulated".into(), nodes: nodes.collect(), commit_interval: None }
    }
}

fn operator(
    stage: usize,
    verb: Verb,
    faults: Faults,
    random: impl Fn(u32) -> fastrand::Rng + Send + Sync + 'static,
) -> crate::component::Build<Box<dyn crate::Operator>> {
    Arc::new(move |context| {
        Ok(Box::new(MemoryOperator {
            stage,
            verb,
            faults,
            random: random(context.run),
            held: Default::default(),
            changed: Default::default(),
        }))
    })
}

/// Lives one pipeline from its first start to its end, with all that this seed has in store for it.
///
/// # Errors
/// When the simulation itself cannot be set up.
pub fn simulate(seed: u64, planted: Planted) -> Result<Outcome> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().map_err(Error::fatal)?;
    runtime.block_on(live(seed, planted))
}

async fn live(seed: u64, planted: Planted) -> Result<Outcome> {
    let mut random = fastrand::Rng::with_seed(seed);
    let sketch = Sketch::draw(&mut random);
    let world = sketch.world();
    let faults =
        Faults { retry: random.u32(0..60), fatal: random.u32(0..8), panic: random.u32(0..3), delay: random.u64(0..3_000) };
    let newest = Arc::new(AtomicU64::new(0));
    let mut disk = Disk::new();
    let mut crashes_left = random.usize(0..5);
    let mut crashes = 0;
    let mut lives = 0;
    loop {
        lives += 1;
        // Bad luck ends sometime, so that the last life can reach the end.
        let faults = if lives > 12 { Faults { retry: 0, fatal: 0, panic: 0, ..faults } } else { faults };
        let graph = sketch.graph(&world, faults, seed);
        let drain = CancellationToken::new();
        let options = Options {
            store: Arc::new(Checkpoints::with_backend(disk.backend())?),
            data_dir: Default::default(),
            metrics: Metrics::new().map_err(Error::fatal)?,
            runtimes: Runtimes::current(),
            drain: drain.clone(),
            drain_limit: Duration::from_secs(600),
            dead_letters: Some(Arc::new(Mutex::new(MemoryDeadLetters { world: world.clone(), newest: Arc::clone(&newest) }))),
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
                tokio::time::sleep(after).await;
                drain.cancel();
            });
        }
        let ended = timeout(limit, run(&graph, &options)).await;
        match ended {
            Ok(Ok(crate::Ending::Ended) | Err(RunError::AlreadyRead)) => break,
            Ok(Ok(crate::Ending::Drained)) => world.lock().note("drained"),
            Ok(Err(RunError::DrainLimit(_))) => {
                world.lock().violations.push("deadlock: not drained within ten minutes of virtual time".into());
                break;
            }
            // Given up, like a process that ends with an error: someone starts it again.
            Ok(Err(error)) => world.lock().note(format_args!("given up: {error}")),
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
    let held: Vec<usize> = state.sinks.iter().map(|sink| sink.visible.len()).collect();
    state.note(format_args!("end: {held:?}"));
    Ok(Outcome { violations: state.judge(), log: std::mem::take(&mut state.log), crashes })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seeds() -> std::ops::Range<u64> {
        let first = std::env::var("AFFERENT_SEED").ok().and_then(|seed| seed.parse().ok());
        first.map_or(0..500, |seed| seed..seed + 1)
    }

    #[test]
    fn five_hundred_seeds_lose_nothing_invent_nothing_and_keep_order() {
        let mut crashes = 0;
        for seed in seeds() {
            let outcome = simulate(seed, Planted::default()).unwrap();
            assert!(
                outcome.violations.is_empty(),
                "seed {seed}: {:#?}\n(AFFERENT_SEED={seed} runs it alone)\n{}",
                outcome.violations,
                tail(&outcome.log)
            );
            crashes += outcome.crashes;
        }
        assert!(seeds().count() == 1 || crashes > 300, "only {crashes} crashes: the simulation is too tame");
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
