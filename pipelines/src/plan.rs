//! A checked pipeline: what `explain` draws, what `check` reports on, and the engine's graph, ready to run.
//! The lint makes it; only a pipeline without a single error becomes one.

use std::time::Duration;

use afferent_engine::component::{Delivery, Output, Replay};
use afferent_engine::graph::{Graph, Overflow, Port, QueueLimit};
use arrow::datatypes::SchemaRef;
use serde_json::Value;

use crate::guarantee::PathGuarantee;
use crate::schema::canonical;
use crate::spec::{Guarantee, StageKind};

/// A checked pipeline.
#[derive(Clone)]
pub struct Plan {
    /// The pipeline's name.
    pub name: String,
    /// What it is for.
    pub description: String,
    /// The stages, producers before consumers; the same order as in `graph`.
    pub stages: Vec<PlannedStage>,
    /// What the engine runs.
    pub graph: Graph,
    /// What each path from a source to a sink gives.
    pub guarantees: Vec<PathGuarantee>,
    /// What the file asks of every path; kept.
    pub delivery: Option<Guarantee>,
    /// What is worth knowing and not wrong, such as a cap on a source's rate.
    pub notes: Vec<String>,
}

/// One stage of a plan.
#[derive(Clone, Debug)]
pub struct PlannedStage {
    /// Its name.
    pub name: String,
    /// The component's word.
    pub component: String,
    /// What feeds it; empty for sources.
    pub inputs: Vec<PlannedInput>,
    /// What it emits, the default output first; empty for sinks.
    pub outputs: Vec<Output>,
    /// What belongs to its kind.
    pub part: Part,
}

/// One input of a planned stage.
#[derive(Clone, Debug)]
pub struct PlannedInput {
    /// As it is written: `stage`, `stage.output` or `stage.rejected`.
    pub name: String,
    /// Index of the producing stage in the plan.
    pub from: usize,
    /// Which of its outputs.
    pub port: Port,
    /// What arrives.
    pub schema: SchemaRef,
    /// How much may wait.
    pub queue: QueueLimit,
    /// What a full queue does.
    pub overflow: Overflow,
}

/// What belongs to one kind of stage.
#[derive(Clone, Debug)]
pub enum Part {
    /// Produces rows.
    Source {
        /// What a crash means.
        replay: Replay,
        /// Whether it ends by itself.
        bounded: bool,
        /// How many messages its peer sends ahead of their acknowledgement, and why.
        in_flight: Option<(u64, String)>,
        /// How to keep parts of it from moving to another process, where they may.
        moves: Option<String>,
    },
    /// Transforms rows.
    Operator {
        /// Number of instances.
        parallelism: usize,
        /// Whether it holds something between batches.
        stateful: bool,
        /// Whether it waits for others.
        asynchronous: bool,
    },
    /// Consumes rows.
    Sink {
        /// What a crash means for its readers.
        delivery: Delivery,
        /// The least time between commits that it asks for.
        commit_interval: Duration,
    },
}

impl PlannedStage {
    /// Which kind of stage it is.
    pub fn kind(&self) -> StageKind {
        match self.part {
            Part::Source { .. } => StageKind::Source,
            Part::Operator { .. } => StageKind::Operator,
            Part::Sink { .. } => StageKind::Sink,
        }
    }
}

/// Changes when stored state or positions of a stage would mean something else: 64-bit FNV-1a over the
/// component's name and its configuration as it is written, keys in order and references unresolved, so that
/// it is the same in every build and a rotated password does not change it.
pub fn fingerprint(component: &str, written: &Value) -> u64 {
    const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    let text = format!("{component}\0{}", canonical(written));
    text.bytes().fold(OFFSET, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(PRIME))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_fingerprint_is_stable_and_ignores_the_order_of_keys() {
        let one = fingerprint("window", &json!({"rows": 1, "by": ["a"]}));
        assert_eq!(one, fingerprint("window", &json!({"by": ["a"], "rows": 1})));
        assert_ne!(one, fingerprint("window", &json!({"by": ["a"], "rows": 2})));
        assert_ne!(one, fingerprint("windows", &json!({"by": ["a"], "rows": 1})));
        // The published test vector of FNV-1a for "a", followed by what stands between name and configuration.
        let after_a = 0xaf63_dc4c_8601_ec8c_u64;
        let with_null = "\0null".bytes().fold(after_a, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        assert_eq!(fingerprint("a", &Value::Null), with_null);
    }
}
