//! From a [`Graph`] to running tasks: makes the edges, builds the components, fuses linear runs of cheap
//! operators into chains and spawns one task for each source, chain, concurrent operator and sink.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tracing::{Instrument, Span};

use crate::checkpoint::{Checkpoints, Restored};
use crate::component::{BuildContext, OperatorBuild};
use crate::edge::{Receiver, Sender, edge};
use crate::epoch::COMMANDS;
use crate::error::{Error, Result};
use crate::graph::{Graph, Node, Port, Role};
use crate::metrics::{Metrics, StageMetrics};
use crate::stage::{
    Callee, Chain, Inputs, Link, Loop, Ordered, Outbox, Rejects, SinkCommand, SinkStage, SourceCommand, SourceStage, Stop,
};

/// Where tasks run. Operators compute, so they never run on the threads that serve sockets.
#[derive(Clone, Debug)]
pub struct Runtimes {
    /// Sources, sinks and waiting.
    pub io: Handle,
    /// Operators.
    pub compute: Handle,
}

impl Runtimes {
    /// Everything on the current runtime: tests, the simulation, small machines.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn current() -> Self {
        Self { io: Handle::current(), compute: Handle::current() }
    }
}

/// The tasks of a pipeline and the channels to them.
pub(crate) struct Assembled {
    pub(crate) tasks: JoinSet<std::result::Result<(), Stop>>,
    pub(crate) sources: Vec<(String, mpsc::Sender<SourceCommand>)>,
    pub(crate) sinks: Vec<(String, mpsc::Sender<SinkCommand>)>,
    /// How many tasks take part in an epoch.
    pub(crate) participants: usize,
}

/// What assembly needs besides the graph.
pub(crate) struct Assembly<'a> {
    pub(crate) graph: &'a Graph,
    pub(crate) store: &'a Checkpoints,
    pub(crate) restored: Restored,
    pub(crate) metrics: &'a Metrics,
    pub(crate) data_dir: PathBuf,
    pub(crate) runtimes: &'a Runtimes,
    pub(crate) run: u32,
    pub(crate) context: Loop,
}

/// The edges that belong to one stage.
#[derive(Default)]
struct Wiring {
    receivers: Vec<Receiver>,
    senders: Vec<Sender>,
    /// Index into `senders` by port.
    ports: BTreeMap<usize, Vec<usize>>,
    rejected: Vec<usize>,
}

impl Wiring {
    fn outputs(&self) -> Vec<Vec<usize>> {
        let count = self.ports.keys().last().map_or(0, |last| last + 1);
        (0..count).map(|port| self.ports.get(&port).cloned().unwrap_or_default()).collect()
    }
}

/// What every log line of a task bears. Of the highest level, so that it is there whichever level is logged; entered
/// once for each poll of the task, never for a row.
fn stage_span(pipeline: &str, stage: &str) -> Span {
    tracing::error_span!("stage", %pipeline, %stage)
}

/// For every stage the first stage of the chain it runs in; a stage that is not fused stands for itself.
///
/// A stage joins the chain of the one before when both are cheap synchronous operators of one instance and the edge
/// between them is the only one on either side; the rejected output does not count, it is not data.
pub(crate) fn fusion(graph: &Graph) -> Vec<usize> {
    let consumers = |of: usize| {
        graph
            .nodes
            .iter()
            .flat_map(|node| &node.inputs)
            .filter(move |inlet| inlet.from == of && inlet.port != Port::Rejected)
            .count()
    };
    let cheap =
        |node: &Node| matches!(&node.role, Role::Operator { build: OperatorBuild::Compute { heavy: false, .. }, parallelism: 1 });
    let mut heads: Vec<usize> = Vec::with_capacity(graph.nodes.len());
    for (index, node) in graph.nodes.iter().enumerate() {
        let joins = match node.inputs.as_slice() {
            [only] => {
                only.port == Port::Output(0)
                    && only.overflow == crate::graph::Overflow::Block
                    && cheap(node)
                    && cheap(&graph.nodes[only.from])
                    && consumers(only.from) == 1
            }
            _ => false,
        };
        heads.push(if joins { heads[node.inputs[0].from] } else { index });
    }
    heads
}

impl Assembly<'_> {
    /// Builds everything, then spawns everything: a component that cannot be built leaves nothing running.
    pub(crate) fn spawn(mut self) -> Result<Assembled> {
        let heads = fusion(self.graph);
        let mut wirings = self.wire(&heads);
        let mut assembled = Assembled { tasks: JoinSet::new(), sources: Vec::new(), sinks: Vec::new(), participants: 0 };
        let mut ready: Vec<(Handle, futures::future::BoxFuture<'static, std::result::Result<(), Stop>>)> = Vec::new();
        let (io, compute) = (self.runtimes.io.clone(), self.runtimes.compute.clone());
        let graph = self.graph;
        for (index, node) in graph.nodes.iter().enumerate() {
            if heads[index] != index {
                continue;
            }
            let metrics = self.metrics.stage(&graph.name, &node.name);
            let span = stage_span(&graph.name, &node.name);
            match &node.role {
                Role::Source(build) => {
                    let wiring = std::mem::take(&mut wirings[index]);
                    let (sender, commands) = mpsc::channel(COMMANDS);
                    assembled.sources.push((node.name.clone(), sender));
                    let edges = wiring.outputs().into_iter().next().unwrap_or_default();
                    let stage = SourceStage {
                        name: node.name.clone(),
                        source: build(&self.build_context(node, &metrics))
                            .map_err(|e| e.context(format!("stage {}", node.name)))?,
                        restored: self.restored.sources.remove(&node.name),
                        commands,
                        edges,
                        rejects: Rejects::new(&node.name, wiring.rejected, metrics.clone()),
                        outbox: Outbox::new(wiring.senders, metrics.send_wait.clone()),
                        metrics,
                        context: self.context.clone(),
                    };
                    ready.push((io.clone(), Box::pin(stage.run().instrument(span))));
                }
                Role::Sink { build, .. } => {
                    let wiring = std::mem::take(&mut wirings[index]);
                    let (sender, commands) = mpsc::channel(COMMANDS);
                    assembled.sinks.push((node.name.clone(), sender));
                    let restored = self
                        .restored
                        .sinks
                        .remove(&node.name)
                        .zip(self.restored.epoch)
                        .map(|(prepared, epoch)| (epoch, prepared));
                    let stage = SinkStage {
                        name: node.name.clone(),
                        sink: build(&self.build_context(node, &metrics))
                            .map_err(|e| e.context(format!("stage {}", node.name)))?,
                        restored,
                        commands,
                        inputs: Inputs::new(wiring.receivers, self.context.planted.overtaking_barrier),
                        rejects: Rejects::new(&node.name, wiring.rejected, metrics.clone()),
                        outbox: Outbox::new(wiring.senders, metrics.send_wait.clone()),
                        latency: self.metrics.latency(&graph.name, &node.name),
                        metrics,
                        context: self.context.clone(),
                    };
                    ready.push((io.clone(), Box::pin(stage.run().instrument(span))));
                }
                Role::Operator { build: OperatorBuild::Compute { .. }, parallelism: 1 } => {
                    let chain = self.chain(index, &heads, &mut wirings)?;
                    let names: Vec<&str> = chain.links.iter().map(|link| link.name.as_str()).collect();
                    let span = stage_span(&graph.name, &names.join("+"));
                    ready.push((compute.clone(), Box::pin(chain.run().instrument(span))));
                }
                Role::Operator { build, parallelism } => {
                    let wiring = std::mem::take(&mut wirings[index]);
                    let context = self.build_context(node, &metrics);
                    let (callee, concurrency, handle) = self.callee(node, build, *parallelism, &context)?;
                    let edges = wiring.outputs();
                    let stage = Ordered {
                        name: node.name.clone(),
                        callee,
                        concurrency,
                        handle,
                        edges,
                        rejects: Rejects::new(&node.name, wiring.rejected, metrics.clone()),
                        inputs: Inputs::new(wiring.receivers, self.context.planted.overtaking_barrier),
                        outbox: Outbox::new(wiring.senders, metrics.send_wait.clone()),
                        metrics,
                        context: self.context.clone(),
                    };
                    ready.push((io.clone(), Box::pin(stage.run().instrument(span))));
                }
            }
        }
        assembled.participants = ready.len();
        for (handle, task) in ready {
            assembled.tasks.spawn_on(task, &handle);
        }
        Ok(assembled)
    }

    /// Makes the edges between tasks; inside a chain there are none.
    fn wire(&self, heads: &[usize]) -> Vec<Wiring> {
        let mut wirings: Vec<Wiring> = self.graph.nodes.iter().map(|_| Wiring::default()).collect();
        for (index, node) in self.graph.nodes.iter().enumerate() {
            if heads[index] != index {
                continue;
            }
            let metrics = self.metrics.stage(&self.graph.name, &node.name);
            for inlet in &node.inputs {
                let (sender, receiver) = edge(inlet.queue, inlet.overflow, &metrics);
                // All senders of a chain belong to its one task; they are kept with its head.
                let head = heads[inlet.from];
                let number = wirings[head].senders.len();
                wirings[head].senders.push(sender);
                match inlet.port {
                    Port::Output(port) => wirings[inlet.from].ports.entry(port).or_default().push(number),
                    Port::Rejected => wirings[inlet.from].rejected.push(number),
                }
                wirings[index].receivers.push(receiver);
            }
        }
        wirings
    }

    fn chain(&self, head: usize, heads: &[usize], wirings: &mut [Wiring]) -> Result<Chain> {
        let members: Vec<usize> = (0..heads.len()).filter(|index| heads[*index] == head).collect();
        let receivers = std::mem::take(&mut wirings[head].receivers);
        let senders = std::mem::take(&mut wirings[head].senders);
        let send_wait = self.metrics.stage(&self.graph.name, &self.graph.nodes[head].name).send_wait;
        let mut links = Vec::with_capacity(members.len());
        for index in members {
            let node = &self.graph.nodes[index];
            let Role::Operator { build: OperatorBuild::Compute { build, stateful, .. }, .. } = &node.role else {
                return Err(Error::fatal(format!("stage {} cannot run in a chain", node.name)));
            };
            let metrics = self.metrics.stage(&self.graph.name, &node.name);
            let mut operator =
                build(&self.build_context(node, &metrics)).map_err(|e| e.context(format!("stage {}", node.name)))?;
            if *stateful {
                let state = self.store.state(&node.name)?;
                if !state.is_empty() {
                    operator.restore(state).map_err(|e| e.context(format!("restoring stage {}", node.name)))?;
                }
            }
            links.push(Link {
                name: node.name.clone(),
                operator,
                stateful: *stateful,
                edges: wirings[index].outputs(),
                rejects: Rejects::new(&node.name, std::mem::take(&mut wirings[index].rejected), metrics.clone()),
                metrics,
            });
        }
        Ok(Chain {
            links,
            inputs: Inputs::new(receivers, self.context.planted.overtaking_barrier),
            outbox: Outbox::new(senders, send_wait),
            context: self.context.clone(),
            scratch: Default::default(),
        })
    }

    fn callee(
        &self,
        node: &Node,
        build: &OperatorBuild,
        parallelism: usize,
        context: &BuildContext,
    ) -> Result<(Callee, usize, Handle)> {
        let named = |e: Error| e.context(format!("stage {}", node.name));
        match build {
            OperatorBuild::Async(build) => {
                let operator = build(context).map_err(named)?;
                let concurrency = operator.concurrency().max(1);
                Ok((Callee::Async(operator), concurrency, self.runtimes.io.clone()))
            }
            OperatorBuild::Compute { stateful: true, .. } => {
                Err(Error::fatal(format!("stage {} holds state and cannot run in parallel", node.name)))
            }
            OperatorBuild::Compute { build, .. } => {
                let instances = (0..parallelism).map(|_| build(context)).collect::<Result<Vec<_>>>().map_err(named)?;
                Ok((Callee::Pool(Arc::new(Mutex::new(instances))), parallelism, self.runtimes.compute.clone()))
            }
        }
    }

    fn build_context(&self, node: &Node, metrics: &StageMetrics) -> BuildContext {
        BuildContext {
            pipeline: self.graph.name.clone(),
            stage: node.name.clone(),
            data_dir: self.data_dir.clone(),
            run: self.run,
            metrics: metrics.clone(),
        }
    }
}
