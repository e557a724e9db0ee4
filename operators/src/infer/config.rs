//! What an author writes for `infer`, and its planning: the model is read, its inputs are bound to columns, and the
//! schema that leaves is fixed, all before the first row.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::Arc;

use afferent_engine::component::{
    BuildContext, Input, OperatorBuild, OperatorConfig, OperatorPlan, Output, PlanContext, Planned, Problem,
};
use afferent_engine::operator::Operator;
use afferent_models::{Signature, TensorSpec};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::bind::{self, Binding, escaped};
use super::operator::{Calls, Infer, Plan};
use super::outputs;
use super::server::{ModelServer, Served};
use crate::columns;

/// Runs a model over the rows and adds what it gives as columns. Inputs are bound by name and checked against the
/// model file before anything runs: one scalar column fills an input `[N]` or `[N,1]`, several fill `[N,k]`; a list
/// column fills `[N,k]`; several list columns fill `[N,t,c]`, see `stack`. Numbers become floats, float64 becomes
/// float32 and narrow integers become wide ones by themselves; everything else needs a cast.
///
/// Rows with a null in an input are rejected, as are lists of a length that the model does not take.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub struct InferConfig {
    /// Name of the model: a folder in a model repository.
    pub model: String,
    /// Version of the model; without it the newest that the model's policy serves.
    #[serde(default)]
    pub version: Option<u64>,
    /// For each input of the model the columns that fill it, in order.
    pub inputs: BTreeMap<String, Vec<String>>,
    /// Where the axis of several list columns goes: `first` after the batch, or `last`. Needed only where both fit.
    #[serde(default)]
    pub stack: Option<Stack>,
    /// For each output of the model that is wanted the columns that come of it. Without it every output becomes a
    /// column of its own name.
    #[serde(default)]
    pub outputs: BTreeMap<String, OutputConfig>,
    /// What happens to rows with NaN or an infinity in an input.
    #[serde(default)]
    pub nan: NanPolicy,
    /// Rows that one call of the model holds at most; `max_batch_size` in its config.pbtxt may say less.
    #[serde(default = "default_max_batch")]
    pub max_batch: NonZeroUsize,
    /// Input columns that are kept. Without it all are, except the lists that the model takes in.
    #[serde(default)]
    pub keep: Option<Vec<String>>,
    /// Name of a column for the version of the model that made the row (int64); without it there is none.
    #[serde(default)]
    pub version_column: Option<String>,
}

/// Where the axis of several columns goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Stack {
    /// `[N,c,t]`: the columns are the axis after the batch.
    First,
    /// `[N,t,c]`: the columns are the last axis.
    Last,
}

impl Stack {
    /// The word in the YAML.
    pub fn name(self) -> &'static str {
        match self {
            Stack::First => "first",
            Stack::Last => "last",
        }
    }
}

/// What happens to rows with NaN or an infinity in an input.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum NanPolicy {
    /// The row is rejected.
    #[default]
    Reject,
    /// The model sees it.
    Pass,
    /// The model sees 0 in its place.
    Zero,
}

/// The columns that come of one output; at least one is named.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub struct OutputConfig {
    /// Name of a column for the values as they are: scalars for an output `[N]` or `[N,1]`, else lists.
    #[serde(default)]
    pub column: Option<String>,
    /// Name of a column for the label of the class with the greatest value (utf8), from the model's label file.
    #[serde(default)]
    pub label: Option<String>,
    /// Name of a column for the number of that class, from 0 (int64).
    #[serde(default)]
    pub label_index: Option<String>,
    /// Name of a column for that greatest value.
    #[serde(default)]
    pub score: Option<String>,
}

fn default_max_batch() -> NonZeroUsize {
    const ROWS: NonZeroUsize = match NonZeroUsize::new(1024) {
        Some(rows) => rows,
        None => NonZeroUsize::MIN,
    };
    ROWS
}

impl OperatorConfig for InferConfig {
    const NAME: &'static str = "infer";
    const EXAMPLE: &'static str = "infer: { model: exercise, inputs: { window: [ax, ay, az, wx, wy, wz] }, stack: last, \
        outputs: { probabilities: { label: exercise, score: p } } }";

    fn check(&self, context: &PlanContext) -> Vec<Problem> {
        let served = match self.served(context) {
            Ok(served) => served,
            Err(problem) => return vec![problem],
        };
        let signature = served.model.signature();
        let mut problems = self.unknown_inputs(signature);
        problems.extend(signature.inputs.iter().filter_map(|spec| self.without_columns(spec)));
        problems.extend(self.calls(&served).err().into_iter().flatten());
        problems.extend(outputs::plan(&served, &self.outputs).err().into_iter().flatten());
        problems
    }

    fn plan(self, inputs: &[Input], context: &PlanContext) -> Planned<OperatorPlan> {
        let schema = &columns::only(inputs, Self::NAME)?.schema;
        let served = self.served(context).map_err(|problem| vec![problem])?;

        let mut problems = Vec::new();
        let bindings = settle(self.bind(served.model.signature(), schema), &mut problems);
        let calls = settle(self.calls(&served), &mut problems);
        let added = settle(outputs::plan(&served, &self.outputs), &mut problems);
        let kept = settle(self.kept(schema, bindings.as_deref().unwrap_or_default()), &mut problems);
        let (Some(bindings), Some(calls), Some((outputs, added)), Some(kept)) = (bindings, calls, added, kept) else {
            return Err(problems);
        };

        let mut fields: Vec<Field> = kept.iter().map(|index| schema.field(*index).clone()).collect();
        let version =
            self.version_column.as_ref().map(|name| (Field::new(name, DataType::Int64, false), "/version_column".to_owned()));
        for (field, place) in added.into_iter().map(|added| (added.field, added.place)).chain(version) {
            if fields.iter().any(|known| known.name() == field.name()) {
                let message = format!("there would be two columns `{}`", field.name());
                problems.push(
                    Problem::new("duplicate-column", place, message)
                        .help("give it another name, or leave the other out with `keep`"),
                );
            }
            fields.push(field);
        }
        if !problems.is_empty() {
            return Err(problems);
        }

        let schema: SchemaRef = Arc::new(Schema::new(fields));
        let plan = Plan {
            served,
            bindings,
            outputs,
            kept,
            calls,
            nan: self.nan,
            with_version: self.version_column.is_some(),
            schema: Arc::clone(&schema),
        };
        let plan = Arc::new(plan);
        Ok(OperatorPlan {
            outputs: vec![Output { name: String::new(), schema }],
            build: OperatorBuild::Compute {
                build: Arc::new(move |_: &BuildContext| Ok(Box::new(Infer::new(Arc::clone(&plan))) as Box<dyn Operator>)),
                stateful: false,
                heavy: true,
            },
        })
    }
}

/// The value, or its problems among the others.
fn settle<T>(planned: Planned<T>, problems: &mut Vec<Problem>) -> Option<T> {
    match planned {
        Ok(value) => Some(value),
        Err(found) => {
            problems.extend(found);
            None
        }
    }
}

impl InferConfig {
    fn served(&self, context: &PlanContext) -> std::result::Result<Arc<Served>, Problem> {
        let none = || Problem::new("missing-model", "/model", "no model repository is set up in this process");
        context.service::<ModelServer>().ok_or_else(none)?.load(&self.model, self.version)
    }

    /// Names under `inputs` that the model does not know.
    fn unknown_inputs(&self, signature: &Signature) -> Vec<Problem> {
        let known: Vec<&str> = signature.inputs.iter().map(|spec| spec.name.as_str()).collect();
        let unknown = self.inputs.keys().filter(|name| signature.input(name).is_none());
        let problem = |name: &String| {
            let message = format!("the model `{}` has no input `{name}`", self.model);
            Problem::new("unknown-input", format!("/inputs/{}", escaped(name)), message)
                .help(columns::one_of(name, &known, "inputs"))
        };
        unknown.map(problem).collect()
    }

    fn without_columns(&self, spec: &TensorSpec) -> Option<Problem> {
        (!self.inputs.contains_key(&spec.name)).then(|| {
            Problem::new("missing-input", "/inputs", format!("the model's input {spec} has no columns"))
                .help(format!("add `{}: [COLUMN]` for it", spec.name))
        })
    }

    /// Every input of the model with its columns.
    fn bind(&self, signature: &Signature, schema: &Schema) -> Planned<Vec<Binding>> {
        let mut problems = self.unknown_inputs(signature);
        let mut bindings = Vec::with_capacity(signature.inputs.len());
        for spec in &signature.inputs {
            problems.extend(self.without_columns(spec));
            match self.inputs.get(&spec.name).map(|names| bind::bind(spec, names, self.stack, schema)) {
                Some(Ok(binding)) => bindings.push(binding),
                Some(Err(found)) => problems.extend(found),
                None => {}
            }
        }
        if problems.is_empty() { Ok(bindings) } else { Err(problems) }
    }

    /// How many rows a call holds: a fixed number where the model says so, else as many as come, up to the limit.
    fn calls(&self, served: &Served) -> Planned<Calls> {
        let signature = served.model.signature();
        let batches = signature.inputs.iter().filter_map(|spec| spec.shape.first().copied().and_then(bind::fixed));
        let batches: Vec<usize> = batches.collect();
        match batches.split_first() {
            None => Ok(Calls::UpTo(served.max_batch.map_or(self.max_batch.get(), |rows| rows.min(self.max_batch.get())))),
            Some((rows, others)) if *rows > 0 && others.iter().all(|other| other == rows) => Ok(Calls::Exactly(*rows)),
            Some(_) => {
                let message = format!("the first axes of the inputs of the model `{}` are no batch: {signature}", self.model);
                Err(vec![
                    Problem::new("wrong-tensor-shape", "/model", message)
                        .help("export it with the same first axis on every input, best an open one"),
                ])
            }
        }
    }

    /// Indices of the input columns that are kept.
    fn kept(&self, schema: &Schema, bindings: &[Binding]) -> Planned<Vec<usize>> {
        let Some(keep) = &self.keep else {
            let taken = |index: &usize| bindings.iter().any(|binding| binding.takes_list(*index, schema));
            return Ok((0..schema.fields().len()).filter(|index| !taken(index)).collect());
        };
        let (mut kept, mut problems) = (Vec::with_capacity(keep.len()), Vec::new());
        for (at, name) in keep.iter().enumerate() {
            let place = format!("/keep/{at}");
            match columns::find(schema, name, &place) {
                Ok(index) if kept.contains(&index) => {
                    problems.push(Problem::new("duplicate-column", place, format!("the column `{name}` is kept twice")));
                }
                Ok(index) => kept.push(index),
                Err(problem) => problems.push(problem),
            }
        }
        if problems.is_empty() { Ok(kept) } else { Err(problems) }
    }
}
