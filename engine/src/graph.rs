//! A planned pipeline, ready to run: stages in topological order and the edges between them. Whoever
//! makes one (the planner from YAML, an embedder, a test) has already settled names and schemas.

use std::time::Duration;

use crate::component::{Build, OperatorBuild};
use crate::sink::Sink;
use crate::source::Source;

/// How much an edge holds. Both limits apply; a batch larger than its edge enters an empty edge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueLimit {
    /// Rows.
    pub rows: usize,
    /// Bytes.
    pub bytes: usize,
}

impl Default for QueueLimit {
    /// 8,192 rows and 16 MiB: some batches of a thousand rows, one or two camera frames. Larger edges only add
    /// latency once the consumer is the bottleneck.
    fn default() -> Self {
        Self { rows: 8192, bytes: 16 * 1024 * 1024 }
    }
}

/// What a full edge does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Overflow {
    /// The producer waits: backpressure.
    #[default]
    Block,
    /// The oldest waiting batches make room; counted.
    DropOldest,
    /// The arriving batch is dropped; counted.
    DropNewest,
}

/// Which of a stage's outputs an edge carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    /// Output number, 0 is the default one.
    Output(usize),
    /// The rejected rows, in the schema of [`crate::rejected::schema`].
    Rejected,
}

/// One input of a stage.
#[derive(Clone, Debug)]
pub struct Inlet {
    /// Index of the producing stage; always smaller than the consumer's own.
    pub from: usize,
    /// Which of its outputs.
    pub port: Port,
    /// How much may wait.
    pub queue: QueueLimit,
    /// What a full edge does.
    pub overflow: Overflow,
}

/// What a stage does.
#[derive(Clone)]
pub enum Role {
    /// Produces rows.
    Source(Build<Box<dyn Source>>),
    /// Transforms rows.
    Operator {
        /// How it runs.
        build: OperatorBuild,
        /// Number of instances; above 1 only for stateless ones. Order is kept.
        parallelism: usize,
    },
    /// Consumes rows.
    Sink {
        /// Makes it.
        build: Build<Box<dyn Sink>>,
        /// The least spacing of barriers that it asks for.
        commit_interval: Duration,
    },
}

/// One stage.
#[derive(Clone)]
pub struct Node {
    /// Unique in the graph.
    pub name: String,
    /// The component's word, for people.
    pub component: String,
    /// What it does.
    pub role: Role,
    /// What feeds it; empty for sources.
    pub inputs: Vec<Inlet>,
    /// Changes when stored state or positions of this stage would mean something else.
    pub fingerprint: u64,
}

/// A whole pipeline.
#[derive(Clone)]
pub struct Graph {
    /// The pipeline's name.
    pub name: String,
    /// The stages, producers before consumers.
    pub nodes: Vec<Node>,
    /// The least spacing of barriers; `None`: what the slowest sink asks for.
    pub commit_interval: Option<Duration>,
}

impl Graph {
    /// The spacing of barriers that is in force.
    pub fn pace(&self) -> Duration {
        self.commit_interval.unwrap_or_else(|| {
            let asked = self.nodes.iter().filter_map(|node| match &node.role {
                Role::Sink { commit_interval, .. } => Some(*commit_interval),
                _ => None,
            });
            asked.max().unwrap_or(Duration::from_millis(50))
        })
    }
}
