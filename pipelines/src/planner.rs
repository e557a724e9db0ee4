//! Plans the stages of a wired file, producers first: schemas flow from stage to stage, each component checks
//! its configuration against what arrives, and the engine's graph is put together. A stage whose input
//! could not be planned is passed over in silence: its turn comes when the first fault is mended.

use std::collections::HashMap;

use afferent_engine::component::{Input, OperatorBuild, Output, PlanContext};
use afferent_engine::graph::{Graph, Inlet, Node as GraphNode, Port, Role};
use afferent_engine::registry::{PlanError, Registry};
use afferent_engine::rejected;
use arrow::datatypes::SchemaRef;

use crate::diagnostic::{Diagnostic, Diagnostics};
use crate::document::{Kind, word_at};
use crate::guarantee::{self, PathGuarantee};
use crate::plan::{Part, Plan, PlannedInput, PlannedStage, fingerprint};
use crate::shape::code_of;
use crate::spec::{Envelope, StageKind};
use crate::stage::{File, Stage};
use crate::suggest;
use crate::wiring::{Feed, Wiring};

/// Plans what can be planned; a plan comes out only when nothing at all is wrong.
pub(crate) fn plan(
    file: &File<'_>,
    wiring: &Wiring,
    registry: &Registry,
    context: &PlanContext,
    text: &str,
    diagnostics: &mut Diagnostics,
) -> Option<Plan> {
    let mut planner =
        Planner { file, registry, context, text, diagnostics, planned: Vec::new(), nodes: Vec::new(), places: HashMap::new() };
    for index in &wiring.order {
        if let Some(feeds) = &wiring.feeds[*index] {
            planner.stage(*index, feeds);
        }
    }
    let Planner { planned, nodes, places, diagnostics, .. } = planner;
    if diagnostics.has_errors() {
        return None;
    }
    unused_outputs(file, &planned, &places, diagnostics);
    let envelope = file.envelope.as_ref()?;
    let guarantees = guarantee::paths(&planned);
    compare(envelope, file, &guarantees, text, diagnostics);
    if diagnostics.has_errors() {
        return None;
    }
    let graph =
        Graph { name: envelope.name.clone(), nodes, commit_interval: envelope.commit_interval.map(|interval| interval.0) };
    let notes = planned.iter().filter_map(|stage| match &stage.part {
        Part::Source { in_flight: Some((window, why)), .. } => {
            Some(guarantee::rate_note(&stage.name, *window, why, graph.pace()))
        }
        _ => None,
    });
    let notes = notes.collect();
    let (name, description) = (envelope.name.clone(), envelope.description.clone());
    Some(Plan { name, description, stages: planned, graph, guarantees, delivery: envelope.delivery, notes })
}

struct Planner<'a, 'd> {
    file: &'a File<'d>,
    registry: &'a Registry,
    context: &'a PlanContext,
    text: &'a str,
    diagnostics: &'a mut Diagnostics,
    planned: Vec<PlannedStage>,
    nodes: Vec<GraphNode>,
    /// From the index of a stage in the file to its index in the plan.
    places: HashMap<usize, usize>,
}

impl Planner<'_, '_> {
    fn stage(&mut self, index: usize, feeds: &[Feed]) {
        let file = self.file;
        let stage = &file.stages[index];
        if !stage.sound {
            return;
        }
        let Some(inputs) = self.inputs(stage, feeds) else { return };
        let arriving: Vec<Input> =
            inputs.iter().map(|input| Input { name: input.name.clone(), schema: SchemaRef::clone(&input.schema) }).collect();
        let Some((part, outputs, role)) = self.component(stage, &arriving) else { return };
        if inputs.is_empty() && stage.kind != StageKind::Source {
            let message = format!("nothing feeds `{}`", stage.name());
            self.diagnostics.push(Diagnostic::error("missing-input", stage.pair.key_span, message));
            return;
        }
        let inlets =
            inputs.iter().map(|input| Inlet { from: input.from, port: input.port, queue: input.queue, overflow: input.overflow });
        let written = stage.component.map(|pair| pair.value.to_value()).unwrap_or_default();
        let component = stage.component_name().to_owned();
        self.nodes.push(GraphNode {
            name: stage.name().to_owned(),
            component: component.clone(),
            role,
            inputs: inlets.collect(),
            fingerprint: fingerprint(&component, &written),
        });
        self.places.insert(index, self.planned.len());
        self.planned.push(PlannedStage { name: stage.name().to_owned(), component, inputs, outputs, part });
    }

    /// The inputs with their schemas; `None` when one of them is not there.
    fn inputs(&mut self, stage: &Stage<'_>, feeds: &[Feed]) -> Option<Vec<PlannedInput>> {
        let mut inputs = Vec::new();
        let mut complete = true;
        for feed in feeds {
            let Some(from) = self.places.get(&feed.from).copied() else {
                complete = false;
                continue;
            };
            match port(&self.planned[from], feed.output.as_deref()) {
                Ok((port, schema)) => inputs.push(PlannedInput {
                    name: feed.name.clone(),
                    from,
                    port,
                    schema,
                    queue: stage.keys.queue.into(),
                    overflow: stage.keys.overflow.into(),
                }),
                Err((message, help)) => {
                    self.diagnostics.push(Diagnostic::error("unknown-output", feed.span, message).help(help));
                    complete = false;
                }
            }
        }
        complete.then_some(inputs)
    }

    fn component(&mut self, stage: &Stage<'_>, inputs: &[Input]) -> Option<(Part, Vec<Output>, Role)> {
        let mut context = self.context.clone();
        context.pipeline = self.file.envelope.as_ref().map(|envelope| envelope.name.clone()).unwrap_or_default();
        context.stage = stage.name().to_owned();
        let name = stage.component_name();
        match stage.kind {
            StageKind::Source => match (self.registry.sources.get(name)?.plan)(&stage.config, &context) {
                Ok(plan) => {
                    let outputs = vec![Output { name: String::new(), schema: plan.schema }];
                    let part = Part::Source { replay: plan.replay, bounded: plan.bounded, in_flight: plan.in_flight };
                    Some((part, outputs, Role::Source(plan.build)))
                }
                Err(error) => self.tell(stage, error),
            },
            StageKind::Operator => match (self.registry.operators.get(name)?.plan)(&stage.config, inputs, &context) {
                Ok(plan) => {
                    let parallelism = usize::try_from(stage.keys.parallelism.get()).unwrap_or(usize::MAX);
                    let (stateful, asynchronous) = match &plan.build {
                        OperatorBuild::Compute { stateful, .. } => (*stateful, false),
                        OperatorBuild::Async(_) => (false, true),
                    };
                    let refusal = match (stateful, asynchronous) {
                        (true, _) => Some("it holds rows or counts between batches"),
                        (_, true) => Some("it has a concurrency of its own"),
                        _ => None,
                    };
                    if let Some(why) = refusal.filter(|_| parallelism > 1) {
                        let span = stage.pair.locate("/parallelism").span(self.text);
                        let message = format!("`{}` cannot run in parallel: {why}", stage.name());
                        let help = "leave `parallelism` out".to_owned();
                        self.diagnostics.push(Diagnostic::error("refused-parallelism", span, message).help(help));
                    }
                    let part = Part::Operator { parallelism, stateful, asynchronous };
                    Some((part, plan.outputs, Role::Operator { build: plan.build, parallelism }))
                }
                Err(error) => self.tell(stage, error),
            },
            StageKind::Sink => match (self.registry.sinks.get(name)?.plan)(&stage.config, inputs, &context) {
                Ok(plan) => {
                    let part = Part::Sink { delivery: plan.delivery, commit_interval: plan.commit_interval };
                    Some((part, Vec::new(), Role::Sink { build: plan.build, commit_interval: plan.commit_interval }))
                }
                Err(error) => self.tell(stage, error),
            },
        }
    }

    /// Turns what a component says into diagnostics; always `None`.
    fn tell<T>(&mut self, stage: &Stage<'_>, error: PlanError) -> Option<T> {
        let pair = stage.component?;
        match error {
            PlanError::Shape { path, message } => {
                let span = pair.locate(&path).span(self.text);
                self.diagnostics.push(Diagnostic::error(code_of(&message), span, message));
            }
            PlanError::Problems(problems) => {
                for problem in problems {
                    let place = pair.locate(&problem.path);
                    // An offset counts in the resolved text: with a reference in it, only the whole can be marked.
                    let as_written = !matches!(&place.node.kind, Kind::Scalar(scalar) if scalar.text.contains("${"));
                    let offset = problem.offset.filter(|_| as_written);
                    let inside = offset.and_then(|offset| word_at(self.text, place.node, offset));
                    let span = inside.unwrap_or_else(|| place.span(self.text));
                    self.diagnostics.push(Diagnostic::error(problem.code, span, problem.message).help(problem.help));
                }
            }
        }
        None
    }
}

/// The output that an input names, with its schema; or what is wrong with the name.
fn port(stage: &PlannedStage, output: Option<&str>) -> Result<(Port, SchemaRef), (String, Option<String>)> {
    let named: Vec<&str> = stage.outputs.iter().map(|output| output.name.as_str()).filter(|name| !name.is_empty()).collect();
    let found = match output {
        Some("rejected") => return Ok((Port::Rejected, rejected::schema())),
        Some(wanted) => stage.outputs.iter().position(|output| output.name == wanted),
        None => {
            stage.outputs.iter().position(|output| output.name.is_empty()).or_else(|| (stage.outputs.len() == 1).then_some(0))
        }
    };
    if let Some((number, output)) = found.and_then(|number| Some((number, stage.outputs.get(number)?))) {
        return Ok((Port::Output(number), SchemaRef::clone(&output.schema)));
    }
    let known: Vec<String> = named.iter().map(|name| format!("{}.{name}", stage.name)).collect();
    let known = suggest::list(known.iter().map(String::as_str));
    match output {
        Some(wanted) if named.is_empty() => {
            let message = format!("`{}` has no output `{wanted}`", stage.name);
            Err((message, Some(format!("write `{0}`, or `{0}.rejected` for the rows that it could not process", stage.name))))
        }
        Some(wanted) => {
            let help = suggest::closest(wanted, named).map(|name| format!("did you mean `{}.{name}`?", stage.name));
            Err((format!("`{}` has no output `{wanted}`", stage.name), help.or_else(|| Some(format!("known are {known}")))))
        }
        None => Err((format!("which output of `{}` is meant must be written", stage.name), Some(format!("known are {known}")))),
    }
}

fn unused_outputs(file: &File<'_>, planned: &[PlannedStage], places: &HashMap<usize, usize>, diagnostics: &mut Diagnostics) {
    let read = |from: usize, number: usize| {
        planned.iter().flat_map(|stage| &stage.inputs).any(|input| input.from == from && input.port == Port::Output(number))
    };
    for (index, stage) in file.stages.iter().enumerate() {
        let Some(place) = places.get(&index).copied() else { continue };
        for (number, output) in planned[place].outputs.iter().enumerate() {
            if read(place, number) {
                continue;
            }
            let (what, name) = match output.name.as_str() {
                "" => (format!("`{}`", stage.name()), stage.name().to_owned()),
                name => (format!("the output `{name}` of `{}`", stage.name()), format!("{}.{name}", stage.name())),
            };
            let message = format!("nobody reads {what}: its rows are thrown away");
            let help = format!("add a sink with `inputs: [{name}]`, or take it out");
            diagnostics.push(Diagnostic::warning("unused-output", stage.pair.key_span, message).help(help));
        }
    }
}

/// Refuses a pipeline that declares more than it can keep.
fn compare(envelope: &Envelope, file: &File<'_>, guarantees: &[PathGuarantee], text: &str, diagnostics: &mut Diagnostics) {
    let Some(declared) = envelope.delivery else { return };
    let Some(pair) = file.root.get("delivery") else { return };
    for path in guarantees.iter().filter(|path| path.guarantee < declared) {
        let message = format!(
            "`{}` cannot be kept from `{}` to `{}`: that is {}, since {}",
            declared.word(),
            path.source,
            path.sink,
            path.guarantee.word(),
            path.reasons.join("; ")
        );
        let help = format!("declare `delivery: {}`, or change what stands in the way", path.guarantee.word());
        diagnostics.push(Diagnostic::error("guarantee-not-kept", pair.locate("").span(text), message).help(help));
    }
}
