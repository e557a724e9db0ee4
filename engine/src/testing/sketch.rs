//! The graph of a simulated pipeline: drawn by chance, with what must come of every row, and built from memory
//! stages. The simulation draws one for each seed. The invariant: producers come before consumers, and sources first.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::stages::{
    Faults, MemoryAsync, MemoryOperator, MemorySink, MemorySource, Opening, Refusal, Verb, path_behind, turned_away,
};
use super::world::{Held, Kind, Row, Sender, State, World};
use crate::component::{Build, OperatorBuild};
use crate::graph::{Graph, Inlet, Node, Overflow, Port, QueueLimit, Role};

/// What a stage of the random graph is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Shape {
    Source { rows: i64, kind: Kind, window: i64, pull: i64 },
    Sync(Verb),
    Parallel(usize),
    Async(usize),
    Sink(Refusal),
}

/// What one reads: this output of that stage.
pub(super) type End = (usize, Port);

/// A random graph before it is built: shapes with their inputs.
pub(super) struct Sketch {
    pub(super) shapes: Vec<Shape>,
    pub(super) inputs: Vec<Vec<End>>,
    pub(super) queue: QueueLimit,
    pub(super) pace: Duration,
}

impl Sketch {
    pub(super) fn draw(random: &mut fastrand::Rng) -> Self {
        let mut sketch = Sketch {
            shapes: Vec::new(),
            inputs: Vec::new(),
            queue: QueueLimit { rows: random.usize(1..40), bytes: 1 << 20 },
            pace: Duration::from_micros(random.u64(200..20_000)),
        };
        // Ends that nobody reads yet.
        let mut open: Vec<End> = Vec::new();
        for _ in 0..random.usize(1..=3) {
            let kind = if random.bool() { Kind::Replayable } else { Kind::Redelivering };
            let window = if kind == Kind::Redelivering && random.bool() { random.i64(3..25) } else { 0 };
            let source = Shape::Source { rows: random.i64(0..200), kind, window, pull: random.i64(1..12) };
            open.push((sketch.add(source, Vec::new()), Port::Output(0)));
        }
        for _ in 0..random.usize(0..7) {
            let shape = match random.u32(0..8) {
                0 | 1 => Shape::Sync(Verb::Pass),
                2 => Shape::Sync(Verb::Split),
                3 | 4 => Shape::Sync(Verb::Hold(random.usize(2..9))),
                5 => Shape::Sync(Verb::Reject(random.i64(1..9))),
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
            let rejects = matches!(shape, Shape::Sync(Verb::Reject(_))) && random.bool();
            let stage = sketch.add(shape, inputs);
            open.extend((0..outputs).map(|output| (stage, Port::Output(output))));
            if rejects {
                open.push((stage, Port::Rejected));
            }
        }
        // A sink for every open end; some share one, and some ends nobody reads.
        let mut shared: Vec<End> = Vec::new();
        let mut refused: Vec<End> = Vec::new();
        let count = open.len();
        for (number, end) in open.into_iter().enumerate() {
            match random.u32(0..5) {
                0 => shared.push(end),
                1 if number + 1 < count => {}
                _ => refused.extend(sketch.add_sink(random, vec![end])),
            }
        }
        if !shared.is_empty() {
            refused.extend(sketch.add_sink(random, shared));
        }
        // What sinks refuse goes on, too.
        for end in refused {
            let end = match random.u32(0..4) {
                0 => end,
                1 => (sketch.add(Shape::Async(random.usize(1..6)), vec![end]), Port::Output(0)),
                _ => (sketch.add(Shape::Sync(Verb::Hold(random.usize(2..9))), vec![end]), Port::Output(0)),
            };
            sketch.add(Shape::Sink(Refusal::Never), vec![end]);
        }
        sketch
    }

    /// Adds a sink; gives back the end of what it refuses, where that is to be read.
    fn add_sink(&mut self, random: &mut fastrand::Rng, inputs: Vec<End>) -> Option<End> {
        let refusal = match random.u32(0..6) {
            0 => Refusal::AtWrite(random.i64(1..6)),
            1 | 2 => Refusal::AtPrepare(random.i64(1..6)),
            _ => Refusal::Never,
        };
        let sink = self.add(Shape::Sink(refusal), inputs);
        (refusal != Refusal::Never && random.bool()).then_some((sink, Port::Rejected))
    }

    fn add(&mut self, shape: Shape, inputs: Vec<End>) -> usize {
        self.shapes.push(shape);
        self.inputs.push(inputs);
        self.shapes.len() - 1
    }

    /// The world as it is before the first start, with what must come of every row.
    pub(super) fn world(&self) -> World {
        let world = World::default();
        let mut state = world.lock();
        state.began = Some(Instant::now());
        state.holds_rows = self.shapes.iter().any(|shape| matches!(shape, Shape::Sync(Verb::Hold(_))));
        for (index, shape) in self.shapes.iter().enumerate() {
            match *shape {
                Shape::Source { rows, kind, .. } => {
                    debug_assert_eq!(index, state.senders.len(), "sources come first");
                    state.senders.push(Sender { kind, rows, acknowledged: 0, sent: 0, ended: false, most_under_way: 0 });
                }
                Shape::Sink(_) => {
                    state.sinks.push(Held::default());
                    state.expected.push(BTreeSet::new());
                }
                _ => {}
            }
        }
        for (source, shape) in self.shapes.iter().enumerate() {
            if let Shape::Source { rows, .. } = *shape {
                for id in 0..rows {
                    self.trace((source, Port::Output(0)), Row { source: source as i64, id, path: 1 }, &mut state);
                }
            }
        }
        drop(state);
        world
    }

    /// Follows one row from an output to everything that must come of it.
    fn trace(&self, end: End, row: Row, state: &mut State) {
        let readers = self.inputs.iter().enumerate().filter(|(_, inputs)| inputs.contains(&end)).map(|(reader, _)| reader);
        let readers: Vec<usize> = readers.collect();
        if end.1 == Port::Rejected && readers.is_empty() {
            state.expected_dead.insert(row);
        }
        for reader in readers {
            let walked = Row { path: path_behind(row.path, reader), ..row };
            match self.shapes[reader] {
                Shape::Sink(refusal) if refusal.refuses(row) => self.trace((reader, Port::Rejected), turned_away(row), state),
                Shape::Sink(_) => {
                    let sink = self.sink_number(reader);
                    state.expected[sink].insert(row);
                }
                Shape::Sync(verb) => {
                    let (port, leaving) = verb.apply(walked);
                    self.trace((reader, port), leaving, state);
                }
                Shape::Parallel(_) | Shape::Async(_) => self.trace((reader, Port::Output(0)), walked, state),
                Shape::Source { .. } => {}
            }
        }
    }

    pub(super) fn sinks(&self) -> usize {
        self.sink_number(self.shapes.len())
    }

    fn sink_number(&self, stage: usize) -> usize {
        self.shapes[..stage].iter().filter(|shape| matches!(shape, Shape::Sink(_))).count()
    }

    pub(super) fn graph(&self, world: &World, faults: Faults, seed: u64) -> Graph {
        let nodes = self.shapes.iter().enumerate().map(|(stage, shape)| {
            let random = move |run: u32| fastrand::Rng::with_seed(seed ^ (stage as u64) << 32 ^ u64::from(run));
            let world = world.clone();
            let role = match *shape {
                Shape::Source { window, pull, .. } => Role::Source(Arc::new(move |context| {
                    let random = random(context.run);
                    let (world, opening) = (world.clone(), Opening::default());
                    Ok(Box::new(MemorySource { index: stage, world, next: 0, pull, window, opening, faults, random }))
                })),
                Shape::Sync(verb) => Role::Operator {
                    build: OperatorBuild::Compute {
                        build: operator(stage, verb, world, faults, random),
                        stateful: matches!(verb, Verb::Hold(_)),
                        heavy: false,
                    },
                    parallelism: 1,
                },
                Shape::Parallel(instances) => Role::Operator {
                    build: OperatorBuild::Compute {
                        build: operator(stage, Verb::Pass, world, faults, random),
                        stateful: false,
                        heavy: false,
                    },
                    parallelism: instances,
                },
                Shape::Async(concurrency) => Role::Operator {
                    build: OperatorBuild::Async(Arc::new(move |context| {
                        let seed = random(context.run).u64(..);
                        Ok(Arc::new(MemoryAsync { stage, concurrency, world: world.clone(), faults, seed }))
                    })),
                    parallelism: 1,
                },
                Shape::Sink(refusal) => {
                    let index = self.sink_number(stage);
                    Role::Sink {
                        build: Arc::new(move |context| {
                            Ok(Box::new(MemorySink {
                                index,
                                world: world.clone(),
                                refusal,
                                opening: Opening::default(),
                                buffer: Vec::new(),
                                faults,
                                random: random(context.run),
                            }))
                        }),
                        commit_interval: self.pace,
                    }
                }
            };
            let inputs = self.inputs[stage].iter().map(|(from, port)| Inlet {
                from: *from,
                port: *port,
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
    world: World,
    faults: Faults,
    random: impl Fn(u32) -> fastrand::Rng + Send + Sync + 'static,
) -> Build<Box<dyn crate::Operator>> {
    Arc::new(move |context| {
        Ok(Box::new(MemoryOperator {
            stage,
            verb,
            world: world.clone(),
            faults,
            random: random(context.run),
            held: Default::default(),
            changed: Default::default(),
        }))
    })
}
