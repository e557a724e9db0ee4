//! The author's side of a component: one configuration struct that says its name, documents itself, and
//! plans. Planning does everything short of I/O: it fixes the schemas and yields the function that
//! builds the running part, which the engine calls again at every restart.

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arrow::datatypes::SchemaRef;
use prometheus::IntCounter;
use schemars::JsonSchema;
use serde::de::DeserializeOwned;

use crate::error::Result;
use crate::metrics::StageMetrics;
use crate::operator::{AsyncOperator, Operator};
use crate::sink::Sink;
use crate::source::Source;

/// Something wrong with a configuration, found while planning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Stable code, such as `unknown-column`.
    pub code: &'static str,
    /// Where in the component's own configuration, as a JSON pointer (`/topics/0`; empty: the whole).
    pub path: String,
    /// What is wrong, lower case, no full stop.
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
    /// Byte offset within the text at `path` (a position in an SQL text, say).
    pub offset: Option<usize>,
}

impl Problem {
    /// A problem at `path`.
    pub fn new(code: &'static str, path: impl Into<String>, message: impl Into<String>) -> Self {
        Self { code, path: path.into(), message: message.into(), help: None, offset: None }
    }

    /// With a suggestion.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// At this byte of the text at `path`.
    #[must_use]
    pub fn at(mut self, offset: usize) -> Self {
        self.offset = Some(offset);
        self
    }
}

/// What planning returns: the plan, or every problem found.
pub type Planned<T> = std::result::Result<T, Vec<Problem>>;

/// What planning may look at. No connection is opened while planning.
#[derive(Clone, Default)]
pub struct PlanContext {
    /// The pipeline's name.
    pub pipeline: String,
    /// The stage's name.
    pub stage: String,
    /// The folder of the pipeline file; relative paths in configurations start here.
    pub base: PathBuf,
    /// The data directory.
    pub data_dir: PathBuf,
    /// What components of one kind share.
    pub services: Services,
}

/// Shared things by their type, at most one of each.
#[derive(Clone, Default)]
pub struct Services(HashMap<TypeId, Arc<dyn Any + Send + Sync>>);

impl PlanContext {
    /// For pipelines whose relative paths start at `base`, with their data below `data_dir`.
    pub fn at(base: impl Into<PathBuf>, data_dir: impl Into<PathBuf>) -> Self {
        Self { base: base.into(), data_dir: data_dir.into(), ..Self::default() }
    }

    /// Adds something that components of one kind share (the model repository, say).
    pub fn provide<T: Send + Sync + 'static>(&mut self, service: Arc<T>) {
        self.services.0.insert(TypeId::of::<T>(), service);
    }

    /// The shared thing of that type, when the process has one.
    pub fn service<T: Send + Sync + 'static>(&self) -> Option<Arc<T>> {
        Arc::downcast(Arc::clone(self.services.0.get(&TypeId::of::<T>())?)).ok()
    }

    /// A path of the configuration, as seen from the pipeline file's folder.
    pub fn path(&self, written: impl AsRef<Path>) -> PathBuf {
        self.base.join(written)
    }
}

/// What a component may use when it is built to run.
#[derive(Clone)]
pub struct BuildContext {
    /// The pipeline's name.
    pub pipeline: String,
    /// The stage's name.
    pub stage: String,
    /// The data directory; a component writes only below it.
    pub data_dir: PathBuf,
    /// Which start of the pipeline on this data directory it is, from 1.
    pub run: u32,
    /// The stage's metrics; components use [`BuildContext::dropped`] only.
    pub metrics: StageMetrics,
}

impl BuildContext {
    /// The counter of rows that this stage drops for `reason`: every drop has a name and a counter.
    pub fn dropped(&self, reason: &str) -> IntCounter {
        self.metrics.dropped(reason)
    }
}

/// Builds the running part of a component.
pub type Build<T> = Arc<dyn Fn(&BuildContext) -> Result<T> + Send + Sync>;

/// What happens to rows that were emitted but not committed when the process dies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Replay {
    /// The source goes back to a stored position and yields the very same rows.
    Exact,
    /// The peer sends what was not acknowledged again, perhaps twice; the text says on what condition.
    Redelivered(String),
    /// They are gone; the text says why.
    Lost(String),
}

/// What a sink makes of an epoch that is written twice because of a crash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// The second time has no effect: committed with the epoch, or recognised and dropped.
    Once,
    /// Rows may be there twice; the text says how a reader tells.
    AtLeastOnce(String),
    /// Rows may be missing; the text says why.
    AtMostOnce(String),
}

/// A planned source.
pub struct SourcePlan {
    /// What it emits.
    pub schema: SchemaRef,
    /// What a crash means.
    pub replay: Replay,
    /// True when it ends by itself.
    pub bounded: bool,
    /// A cap that the peer sets on unacknowledged messages, with its reason; for the rate warning of `check`.
    pub in_flight: Option<(u64, String)>,
    /// Given where a part of what it reads may move to another process while it runs, which would leave half of what
    /// an operator holds in either: what to write in its configuration so that it does not. Such a source is refused
    /// in front of operators that hold rows.
    pub moves: Option<String>,
    /// Makes it.
    pub build: Build<Box<dyn Source>>,
}

/// One input of a stage as the planner sees it.
#[derive(Clone, Debug)]
pub struct Input {
    /// The name of the stage (or `stage.output`) that feeds it.
    pub name: String,
    /// What arrives.
    pub schema: SchemaRef,
}

/// One named output of an operator.
#[derive(Clone, Debug)]
pub struct Output {
    /// Empty for the default output.
    pub name: String,
    /// What leaves.
    pub schema: SchemaRef,
}

/// How an operator runs.
#[derive(Clone)]
pub enum OperatorBuild {
    /// On a compute thread, one batch at a time; cheap runs of these are fused into one task.
    Compute {
        /// Makes one instance.
        build: Build<Box<dyn Operator>>,
        /// Keeps rows back or counts: it takes part in checkpoints and cannot run in parallel.
        stateful: bool,
        /// Worth a task of its own.
        heavy: bool,
    },
    /// Overlapping calls to someone else.
    Async(Build<Arc<dyn AsyncOperator>>),
}

/// A planned operator.
pub struct OperatorPlan {
    /// What it emits; the first is the default output.
    pub outputs: Vec<Output>,
    /// How it runs.
    pub build: OperatorBuild,
}

impl OperatorPlan {
    /// One default output, cheap and stateless.
    pub fn stateless(schema: SchemaRef, build: Build<Box<dyn Operator>>) -> Self {
        Self {
            outputs: vec![Output { name: String::new(), schema }],
            build: OperatorBuild::Compute { build, stateful: false, heavy: false },
        }
    }
}

/// A planned sink.
pub struct SinkPlan {
    /// What a crash means for its readers.
    pub delivery: Delivery,
    /// How far apart its epochs should be at least; told by `check` where it would limit a source's rate.
    pub commit_interval: Duration,
    /// Makes it.
    pub build: Build<Box<dyn Sink>>,
}

/// A source's configuration: its doc comments are the reference, its fields the JSON Schema.
pub trait SourceConfig: DeserializeOwned + JsonSchema + Send + Sync + 'static {
    /// The word in the YAML: a noun, the protocol.
    const NAME: &'static str;
    /// A stage as one would write it, in YAML; parsed and planned by a test.
    const EXAMPLE: &'static str;

    /// What it emits, as far as the configuration says so although `plan` refuses it: what stands behind the source
    /// is planned over that, so that all problems of a file are told at once.
    fn declares(&self) -> Option<SchemaRef> {
        None
    }

    /// Checks what serde cannot, and plans.
    ///
    /// # Errors
    /// Every problem found, each with its place.
    fn plan(self, context: &PlanContext) -> Planned<SourcePlan>;
}

/// An operator's configuration.
pub trait OperatorConfig: DeserializeOwned + JsonSchema + Send + Sync + 'static {
    /// The word in the YAML: a verb.
    const NAME: &'static str;
    /// A stage as one would write it, in YAML.
    const EXAMPLE: &'static str;

    /// The inputs, where the configuration itself names them (the FROM clause of `sql`) and so can tell them apart;
    /// empty where its text cannot be read, which `plan` then tells. An operator that names none takes one stream:
    /// however many stages feed it, the planner makes one input of them, and refuses inputs that are not alike.
    fn inputs(&self) -> Option<Vec<String>> {
        None
    }

    /// What is wrong with it whatever arrives: addresses, names, files, the syntax of texts. Asked in place of `plan`
    /// where the inputs are not known because of a fault further up; `plan` tells all of it too.
    fn check(&self, _context: &PlanContext) -> Vec<Problem> {
        Vec::new()
    }

    /// What it emits over these inputs, as far as the configuration says so although `plan` refuses it: what stands
    /// behind it is planned over that. Only what mending the faults will not change.
    fn declares(&self, _inputs: &[Input]) -> Option<Vec<Output>> {
        None
    }

    /// Checks what serde cannot against the schemas that arrive, and plans.
    ///
    /// # Errors
    /// Every problem found, each with its place.
    fn plan(self, inputs: &[Input], context: &PlanContext) -> Planned<OperatorPlan>;
}

/// A sink's configuration.
pub trait SinkConfig: DeserializeOwned + JsonSchema + Send + Sync + 'static {
    /// The word in the YAML: a noun, the protocol.
    const NAME: &'static str;
    /// A stage as one would write it, in YAML.
    const EXAMPLE: &'static str;

    /// What is wrong with it whatever arrives: addresses, names, files, the syntax of texts. Asked in place of `plan`
    /// where the inputs are not known because of a fault further up; `plan` tells all of it too.
    fn check(&self, _context: &PlanContext) -> Vec<Problem> {
        Vec::new()
    }

    /// Checks what serde cannot against the schemas that arrive, and plans.
    ///
    /// # Errors
    /// Every problem found, each with its place.
    fn plan(self, inputs: &[Input], context: &PlanContext) -> Planned<SinkPlan>;
}
