//! A few components that plan and never run, for the tests of this crate: a source, a sink and operators with
//! options of every shape.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use afferent_engine::component::{
    Delivery, Input, OperatorBuild, OperatorConfig, OperatorPlan, Output, PlanContext, Planned, Problem, Replay, SinkConfig,
    SinkPlan, SourceConfig, SourcePlan,
};
use afferent_engine::config::{Interval, Secret};
use afferent_engine::registry::Registry;
use afferent_engine::{Error, Operator, Result, Sink, Source};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Knows the fakes.
pub(crate) fn registry() -> Registry {
    let mut registry = Registry::new();
    registry.source::<MemorySource>();
    registry.operator::<Pass>();
    registry.operator::<Split>();
    registry.operator::<Narrow>();
    registry.operator::<Query>();
    registry.sink::<MemorySink>();
    registry
}

fn schema(columns: &[String]) -> SchemaRef {
    Arc::new(Schema::new(columns.iter().map(|name| Field::new(name, DataType::Utf8, false)).collect::<Vec<_>>()))
}

fn stateless(stateful: bool) -> OperatorBuild {
    OperatorBuild::Compute {
        build: Arc::new(|_| -> Result<Box<dyn Operator>> { Err(Error::fatal("never built")) }),
        stateful,
        heavy: false,
    }
}

/// What a crash means to the source.
#[derive(Clone, Copy, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Keeps {
    /// All rows.
    #[default]
    Exact,
    /// Nothing.
    Lost,
}

/// Rows from memory. It ends when they have all been read.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct MemorySource {
    /// The columns, all of them text.
    columns: Vec<String>,
    /// What a crash means.
    #[serde(default)]
    keeps: Keeps,
    /// How many messages come ahead of their acknowledgement.
    #[serde(default)]
    in_flight: Option<u64>,
    /// Whether it is refused, although its columns are known.
    #[serde(default)]
    broken: bool,
    /// Asked for by nobody.
    #[serde(default)]
    password: Option<Secret>,
}

impl SourceConfig for MemorySource {
    const NAME: &'static str = "memory";
    const EXAMPLE: &'static str = "memory: { columns: [id, text] }";

    fn declares(&self) -> Option<SchemaRef> {
        Some(schema(&self.columns))
    }

    fn plan(self, _: &PlanContext) -> Planned<SourcePlan> {
        if self.broken {
            return Err(vec![Problem::new("broken", "/broken", "it is broken")]);
        }
        let _only_its_shape_matters = &self.password;
        Ok(SourcePlan {
            schema: schema(&self.columns),
            replay: match self.keeps {
                Keeps::Exact => Replay::Exact,
                Keeps::Lost => Replay::Lost("memory forgets".into()),
            },
            bounded: true,
            in_flight: self.in_flight.map(|window| (window, "window of the memory".into())),
            moves: None,
            build: Arc::new(|_| -> Result<Box<dyn Source>> { Err(Error::fatal("never built")) }),
        })
    }
}

/// Hands rows on as they are.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Pass {
    /// A column that must be there.
    #[serde(default)]
    expects: Option<String>,
    /// How many at most.
    #[serde(default = "ten")]
    limit: NonZeroU32,
    /// How long to wait.
    #[serde(default = "soon")]
    linger: Interval,
    /// Whether it keeps rows back.
    #[serde(default)]
    stateful: bool,
}

fn ten() -> NonZeroU32 {
    NonZeroU32::new(10).unwrap()
}

fn soon() -> Interval {
    Interval::millis(5)
}

impl OperatorConfig for Pass {
    const NAME: &'static str = "pass";
    const EXAMPLE: &'static str = "pass: { expects: id }";

    fn check(&self, _: &PlanContext) -> Vec<Problem> {
        let too_many = || Problem::new("too-many", "/limit", "100 at most");
        (self.limit.get() > 100).then(too_many).into_iter().collect()
    }

    fn plan(self, inputs: &[Input], context: &PlanContext) -> Planned<OperatorPlan> {
        let _only_its_shape_matters = self.linger;
        let mut problems = self.check(context);
        let schema = inputs.first().map(|input| SchemaRef::clone(&input.schema)).unwrap_or_else(|| Arc::new(Schema::empty()));
        if let Some(column) = self.expects
            && schema.column_with_name(&column).is_none()
        {
            problems.push(
                Problem::new("unknown-column", "/expects", format!("there is no column `{column}`")).help("look at the source"),
            );
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        Ok(OperatorPlan { outputs: vec![Output { name: String::new(), schema }], build: stateless(self.stateful) })
    }
}

/// Rows to two named outputs.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Split {}

impl OperatorConfig for Split {
    const NAME: &'static str = "split";
    const EXAMPLE: &'static str = "split: {}";

    fn plan(self, inputs: &[Input], _: &PlanContext) -> Planned<OperatorPlan> {
        let schema = SchemaRef::clone(&inputs[0].schema);
        let outputs = ["hot", "cold"].map(|name| Output { name: name.into(), schema: SchemaRef::clone(&schema) });
        Ok(OperatorPlan { outputs: outputs.into(), build: stateless(false) })
    }
}

/// Hands only the first column on, and those that it is to keep.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Narrow {
    /// Further columns.
    #[serde(default)]
    keep: Vec<String>,
}

impl OperatorConfig for Narrow {
    const NAME: &'static str = "narrow";
    const EXAMPLE: &'static str = "narrow: { keep: [text] }";

    fn plan(self, inputs: &[Input], _: &PlanContext) -> Planned<OperatorPlan> {
        let names = inputs[0].schema.fields().iter().map(|field| field.name().clone());
        let kept: Vec<String> =
            names.enumerate().filter(|(at, name)| *at == 0 || self.keep.contains(name)).map(|(_, name)| name).collect();
        Ok(OperatorPlan { outputs: vec![Output { name: String::new(), schema: schema(&kept) }], build: stateless(false) })
    }
}

/// `<column> from <stage>`: names its input itself.
#[derive(Deserialize, JsonSchema)]
#[serde(transparent)]
pub(crate) struct Query(String);

impl OperatorConfig for Query {
    const NAME: &'static str = "query";
    const EXAMPLE: &'static str = "query: id from source";

    fn inputs(&self) -> Option<Vec<String>> {
        Some(self.0.split_once(" from ").map(|(_, stage)| vec![stage.trim().to_owned()]).unwrap_or_default())
    }

    fn plan(self, inputs: &[Input], _: &PlanContext) -> Planned<OperatorPlan> {
        let Some((column, _)) = self.0.split_once(" from ") else {
            return Err(vec![Problem::new("sql", "", "expected `from`").at(self.0.len())]);
        };
        let schema = SchemaRef::clone(&inputs[0].schema);
        if schema.column_with_name(column.trim()).is_none() {
            let at = self.0.find(column.trim()).unwrap_or(0);
            return Err(vec![Problem::new("unknown-column", "", format!("there is no column `{}`", column.trim())).at(at)]);
        }
        Ok(OperatorPlan { outputs: vec![Output { name: String::new(), schema }], build: stateless(false) })
    }
}

/// Rows into memory.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct MemorySink {
    /// Whether rows may be there twice.
    #[serde(default)]
    twice: bool,
}

impl SinkConfig for MemorySink {
    const NAME: &'static str = "memory";
    const EXAMPLE: &'static str = "memory: {}";

    fn plan(self, _: &[Input], _: &PlanContext) -> Planned<SinkPlan> {
        Ok(SinkPlan {
            delivery: if self.twice { Delivery::AtLeastOnce("compare the ids".into()) } else { Delivery::Once },
            commit_interval: Duration::from_millis(50),
            build: Arc::new(|_| -> Result<Box<dyn Sink>> { Err(Error::fatal("never built")) }),
        })
    }
}
