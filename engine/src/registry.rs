//! The list of components a process knows: a plain value, filled in one place (`src/catalog.rs`) and
//! passed to whoever needs it. Typed for authors, erased for the planner.

use std::collections::BTreeMap;

use schemars::{Schema, generate::SchemaSettings};
use serde_json::Value;

use crate::component::{
    Input, OperatorConfig, OperatorPlan, Output, PlanContext, Problem, SinkConfig, SinkPlan, SourceConfig, SourcePlan,
};

/// Why a configuration could not be planned.
#[derive(Debug)]
pub enum PlanError {
    /// The text does not fit the struct; serde's words and where it stopped.
    Shape {
        /// JSON pointer within the configuration.
        path: String,
        /// What serde said.
        message: String,
    },
    /// It fits, and is wrong.
    Problems(Vec<Problem>),
}

type PlanSource = fn(&Value, &PlanContext) -> Result<SourcePlan, PlanError>;
type PlanOperator = fn(&Value, &[Input], &PlanContext) -> Result<OperatorPlan, PlanError>;
type PlanSink = fn(&Value, &[Input], &PlanContext) -> Result<SinkPlan, PlanError>;
type Check = fn(&Value, &PlanContext) -> Result<(), PlanError>;
type NamedInputs = fn(&Value) -> Option<Vec<String>>;
type Declares = fn(&Value, &[Input]) -> Option<Vec<Output>>;

/// One known component.
pub struct Entry<P> {
    /// The word in the YAML.
    pub name: &'static str,
    /// A stage as one would write it.
    pub example: &'static str,
    /// The JSON Schema of its configuration, doc comments included.
    pub schema: Schema,
    /// Plans a configuration.
    pub plan: P,
    /// Tells what is wrong with a configuration whatever arrives, where it cannot be planned for want of inputs.
    pub check: Check,
    /// What it emits although it cannot be planned, as far as that is known (of sources and operators).
    pub declares: Declares,
    /// The inputs that the configuration itself names, if it does (operators only).
    pub named_inputs: NamedInputs,
}

impl<P> Entry<P> {
    /// The first sentence of its documentation.
    pub fn summary(&self) -> String {
        let text = self.schema.get("description").and_then(Value::as_str).unwrap_or_default();
        let paragraph = text.split("\n\n").next().unwrap_or_default().replace('\n', " ");
        paragraph.split_once(". ").map_or(paragraph.clone(), |(first, _)| format!("{first}."))
    }
}

/// All known components, by kind and name.
#[derive(Default)]
pub struct Registry {
    /// Sources by name.
    pub sources: BTreeMap<&'static str, Entry<PlanSource>>,
    /// Operators by name.
    pub operators: BTreeMap<&'static str, Entry<PlanOperator>>,
    /// Sinks by name.
    pub sinks: BTreeMap<&'static str, Entry<PlanSink>>,
}

impl Registry {
    /// Knows nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes a source known.
    pub fn source<C: SourceConfig>(&mut self) {
        let plan: PlanSource = |value, context| read::<C>(value)?.plan(context).map_err(PlanError::Problems);
        // It has no inputs to wait for.
        let check: Check = |value, context| read::<C>(value)?.plan(context).map(drop).map_err(PlanError::Problems);
        let declares: Declares = |value, _| {
            let schema = read::<C>(value).ok()?.declares()?;
            Some(vec![Output { name: String::new(), schema }])
        };
        self.sources.insert(C::NAME, entry::<C, _>(C::NAME, C::EXAMPLE, plan, check, declares, |_| None));
    }

    /// Makes an operator known.
    pub fn operator<C: OperatorConfig>(&mut self) {
        let plan: PlanOperator = |value, inputs, context| read::<C>(value)?.plan(inputs, context).map_err(PlanError::Problems);
        let check: Check = |value, context| told(read::<C>(value)?.check(context));
        let declares: Declares = |value, inputs| read::<C>(value).ok()?.declares(inputs);
        let named_inputs: NamedInputs = |value| read::<C>(value).ok()?.inputs();
        self.operators.insert(C::NAME, entry::<C, _>(C::NAME, C::EXAMPLE, plan, check, declares, named_inputs));
    }

    /// Makes a sink known.
    pub fn sink<C: SinkConfig>(&mut self) {
        let plan: PlanSink = |value, inputs, context| read::<C>(value)?.plan(inputs, context).map_err(PlanError::Problems);
        let check: Check = |value, context| told(read::<C>(value)?.check(context));
        self.sinks.insert(C::NAME, entry::<C, _>(C::NAME, C::EXAMPLE, plan, check, |_, _| None, |_| None));
    }
}

fn entry<C: schemars::JsonSchema, P>(
    name: &'static str,
    example: &'static str,
    plan: P,
    check: Check,
    declares: Declares,
    named_inputs: NamedInputs,
) -> Entry<P> {
    Entry { name, example, schema: schema_of::<C>(), plan, check, declares, named_inputs }
}

fn told(problems: Vec<Problem>) -> Result<(), PlanError> {
    if problems.is_empty() { Ok(()) } else { Err(PlanError::Problems(problems)) }
}

fn read<C: serde::de::DeserializeOwned>(value: &Value) -> Result<C, PlanError> {
    serde_path_to_error::deserialize(value)
        .map_err(|e| PlanError::Shape { path: pointer(e.path()), message: e.inner().to_string() })
}

fn pointer(path: &serde_path_to_error::Path) -> String {
    use serde_path_to_error::Segment;
    let mut pointer = String::new();
    for segment in path {
        match segment {
            Segment::Seq { index } => pointer.push_str(&format!("/{index}")),
            Segment::Map { key } => pointer.push_str(&format!("/{key}")),
            Segment::Enum { variant } => pointer.push_str(&format!("/{variant}")),
            Segment::Unknown => {}
        }
    }
    pointer
}

fn schema_of<C: schemars::JsonSchema>() -> Schema {
    SchemaSettings::draft2020_12().into_generator().into_root_schema_for::<C>()
}
