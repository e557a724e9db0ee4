//! The words of a pipeline file that belong to the engine: the envelope, and the keys that stand beside a
//! stage's component. Like a component's configuration, these structs are the only truth: schema, reference
//! and lint read them.

use std::num::NonZeroU32;

use afferent_engine::config::{ByteSize, Interval};
use afferent_engine::graph;
use afferent_engine::registry::Registry;
use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, Schema};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What a path from a source to a sink gives, from weak to strong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Guarantee {
    /// Rows may be missing.
    AtMostOnce,
    /// No row is missing; after a crash some may be there twice.
    AtLeastOnce,
    /// Every row is there, and once.
    ExactlyOnce,
}

impl Guarantee {
    /// The word in the YAML.
    pub fn word(self) -> &'static str {
        match self {
            Guarantee::AtMostOnce => "at_most_once",
            Guarantee::AtLeastOnce => "at_least_once",
            Guarantee::ExactlyOnce => "exactly_once",
        }
    }
}

/// A pipeline: where rows come from, what is done with them, and where they go.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Envelope {
    /// The pipeline's name: in metrics, logs, checkpoints and tables.
    #[schemars(extend("pattern" = "^[a-z0-9_-]+$"))]
    pub name: String,
    /// What it is for, in words.
    #[serde(default)]
    pub description: String,
    /// The guarantee that every path must keep; a pipeline that cannot keep it is refused. Undeclared, the
    /// guarantee of each path is computed and reported.
    #[serde(default)]
    pub delivery: Option<Guarantee>,
    /// The least time between two commits. By default what the slowest sink asks for; longer means fewer and
    /// larger commits, and more work to repeat after a crash.
    #[serde(default)]
    pub commit_interval: Option<Interval>,
}

/// How much may wait in front of a stage, for each of its inputs. Both limits apply.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Queue {
    /// Rows.
    #[serde(default = "default_rows")]
    pub rows: NonZeroU32,
    /// Bytes.
    #[serde(default = "default_bytes")]
    pub bytes: ByteSize,
}

// Both agree with `QueueLimit::default()`; a test keeps them so.
fn default_rows() -> NonZeroU32 {
    NonZeroU32::MIN.saturating_add(8191)
}

fn default_bytes() -> ByteSize {
    ByteSize::mib(16)
}

impl Default for Queue {
    fn default() -> Self {
        Self { rows: default_rows(), bytes: default_bytes() }
    }
}

impl From<Queue> for graph::QueueLimit {
    fn from(queue: Queue) -> Self {
        Self { rows: usize::try_from(queue.rows.get()).unwrap_or(usize::MAX), bytes: queue.bytes.as_usize() }
    }
}

/// What happens when a queue is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Overflow {
    /// The stage in front waits.
    #[default]
    Block,
    /// The oldest waiting batches are dropped, and counted.
    DropOldest,
    /// The arriving batch is dropped, and counted.
    DropNewest,
}

impl From<Overflow> for graph::Overflow {
    fn from(overflow: Overflow) -> Self {
        match overflow {
            Overflow::Block => graph::Overflow::Block,
            Overflow::DropOldest => graph::Overflow::DropOldest,
            Overflow::DropNewest => graph::Overflow::DropNewest,
        }
    }
}

/// The keys beside a source's component: none.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SourceKeys {}

/// The keys beside an operator's component.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OperatorKeys {
    /// The stages that feed it: `stage`, `stage.output`, or `stage.rejected` for the rows that a stage could
    /// not process. By default the operator above, or the only source; `sql` names its input in its FROM clause.
    /// Several must have the same columns; their rows come in any order, those of each in their own.
    #[serde(default)]
    pub inputs: Vec<String>,
    /// How much may wait in front of it, for each of its inputs.
    #[serde(default)]
    pub queue: Queue,
    /// What happens when such a queue is full.
    #[serde(default)]
    pub overflow: Overflow,
    /// Number of instances that share the work; above 1 only where nothing is held between batches. The order
    /// of rows is kept.
    #[serde(default = "default_parallelism")]
    pub parallelism: NonZeroU32,
}

fn default_parallelism() -> NonZeroU32 {
    NonZeroU32::MIN
}

/// The keys beside a sink's component.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SinkKeys {
    /// The stages that feed it: `stage`, `stage.output`, or `stage.rejected` for the rows that a stage could
    /// not process. By default the last operator, or the only source.
    #[serde(default)]
    pub inputs: Vec<String>,
    /// How much may wait in front of it, for each of its inputs.
    #[serde(default)]
    pub queue: Queue,
    /// What happens when such a queue is full.
    #[serde(default)]
    pub overflow: Overflow,
}

/// Which kind of stage it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StageKind {
    /// Produces rows.
    Source,
    /// Transforms rows.
    Operator,
    /// Consumes rows.
    Sink,
}

/// What the registry says about a component, for whoever does not plan it.
#[derive(Clone, Debug)]
pub struct Component<'r> {
    /// The word in the YAML.
    pub name: &'static str,
    /// A stage body as one would write it.
    pub example: &'static str,
    /// The first sentence of its documentation.
    pub summary: String,
    /// The JSON Schema of its configuration.
    pub schema: &'r Schema,
}

impl StageKind {
    /// In the order of the file.
    pub const ALL: [StageKind; 3] = [StageKind::Source, StageKind::Operator, StageKind::Sink];

    /// For sentences.
    pub fn word(self) -> &'static str {
        match self {
            StageKind::Source => "source",
            StageKind::Operator => "operator",
            StageKind::Sink => "sink",
        }
    }

    /// The word with its article, for sentences.
    pub fn with_article(self) -> &'static str {
        match self {
            StageKind::Source => "a source",
            StageKind::Operator => "an operator",
            StageKind::Sink => "a sink",
        }
    }

    /// The word for several, which is also the key of the section in a pipeline file.
    pub fn section(self) -> &'static str {
        match self {
            StageKind::Source => "sources",
            StageKind::Operator => "operators",
            StageKind::Sink => "sinks",
        }
    }

    /// The JSON Schema of the keys beside the component.
    pub fn reserved(self) -> Value {
        let generator = SchemaSettings::draft2020_12().into_generator();
        let schema = match self {
            StageKind::Source => generator.into_root_schema_for::<SourceKeys>(),
            StageKind::Operator => generator.into_root_schema_for::<OperatorKeys>(),
            StageKind::Sink => generator.into_root_schema_for::<SinkKeys>(),
        };
        schema.to_value()
    }

    /// Every known component of this kind, by name.
    pub fn components(self, registry: &Registry) -> Vec<Component<'_>> {
        macro_rules! described {
            ($entries:expr) => {
                $entries
                    .values()
                    .map(|entry| Component {
                        name: entry.name,
                        example: entry.example,
                        summary: entry.summary(),
                        schema: &entry.schema,
                    })
                    .collect()
            };
        }
        match self {
            StageKind::Source => described!(registry.sources),
            StageKind::Operator => described!(registry.operators),
            StageKind::Sink => described!(registry.sinks),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_queue_by_default_is_the_engines() {
        assert_eq!(graph::QueueLimit::from(Queue::default()), graph::QueueLimit::default());
        let partly: Queue = serde_json::from_str("{\"rows\": 5}").unwrap();
        assert_eq!(graph::QueueLimit::from(partly).bytes, graph::QueueLimit::default().bytes);
    }

    #[test]
    fn guarantees_are_ordered_and_called_what_they_are_written() {
        assert!(Guarantee::AtMostOnce < Guarantee::AtLeastOnce && Guarantee::AtLeastOnce < Guarantee::ExactlyOnce);
        for guarantee in [Guarantee::AtMostOnce, Guarantee::AtLeastOnce, Guarantee::ExactlyOnce] {
            assert_eq!(serde_json::to_value(guarantee).unwrap(), guarantee.word());
        }
    }
}
