//! Plans the stages of a wired file, producers first: schemas flow from stage to stage, each component checks
//! its configuration against what arrives, and the engine's graph is put together. A stage that is refused may declare
//! all the same what it emits: then those behind it are planned. A stage whose inputs are not known checks what it can
//! without them. An operator that does not name its inputs itself cannot tell them apart: it is planned with one, which
//! all of them make.

use std::collections::HashMap;

use afferent_engine::component::{Input, OperatorBuild, OperatorPlan, Output, PlanContext};
use afferent_engine::graph::{Graph, Inlet, Node as GraphNode, Port, Role};
use afferent_engine::registry::{PlanError, Registry};
use afferent_engine::rejected;
use arrow::datatypes::SchemaRef;

use crate::diagnostic::{Diagnostic, Diagnostics};
use crate::document::{Kind, word_at};
use crate::guarantee::{self, PathGuarantee, Stranded};
use crate::plan::{Part, Plan, PlannedInput, PlannedStage, fingerprint};
use crate::shape::code_of;
use crate::spec::{Envelope, StageKind};
use crate::stage::{File, Stage};
use crate::wiring::{Feed, Wiring};
use crate::{fan_in, suggest};

/// Plans what can be planned; a plan comes out only when nothing at all is wrong.
pub(crate) fn plan(
    file: &File<'_>,
    wiring: &Wiring,
    registry: &Registry,
    context: &PlanContext,
    text: &str,
    diagnostics: &mut Diagnostics,
) -> Option<Plan> {
    let mut planner = Planner { file, registry, context, text, diagnostics, known: Vec::new(), places: HashMap::new() };
    for index in &wiring.order {
        planner.stage(*index, wiring.feeds[*index].as_deref());
    }
    for index in (0..file.stages.len()).filter(|index| !wiring.order.contains(index)) {
        planner.stage(index, None);
    }
    let Planner { known, places, diagnostics, .. } = planner;
    if diagnostics.has_errors() {
        return None;
    }
    let (mut planned, mut nodes) = (Vec::new(), Vec::new());
    for Known { name, component, inputs, outputs, runs } in known {
        let (part, node) = runs?;
        nodes.push(node);
        planned.push(PlannedStage { name, component, inputs, outputs: outputs?, part });
    }
    unused_outputs(file, &planned, &places, diagnostics);
    let envelope = file.envelope.as_ref()?;
    let guarantees = guarantee::paths(&planned);
    compare(envelope, file, &guarantees, text, diagnostics);
    refuse_stranded(file, &planned, diagnostics);
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
    known: Vec<Known>,
    /// From the index of a stage in the file to its index among those that are known.
    places: HashMap<usize, usize>,
}

/// A stage, as far as it could be planned.
struct Known {
    name: String,
    component: String,
    /// Empty where one of them is not known.
    inputs: Vec<PlannedInput>,
    /// `None` where a fault keeps them in the dark.
    outputs: Option<Vec<Output>>,
    /// `None` where something is wrong with it.
    runs: Option<(Part, GraphNode)>,
}

/// What became of planning a component: what it emits, and the running part unless it was refused.
struct Outcome {
    outputs: Vec<Output>,
    runs: Option<(Part, Role)>,
}

/// A component that was refused.
struct Refused {
    error: PlanError,
    /// What it emits all the same.
    declared: Option<Vec<Output>>,
}

impl Planner<'_, '_> {
    /// `feeds` is `None` where they could not be settled.
    fn stage(&mut self, index: usize, feeds: Option<&[Feed]>) {
        let file = self.file;
        let stage = &file.stages[index];
        // Of a stage with a fault it cannot be known whether it names its inputs itself.
        let feeds = feeds.filter(|_| stage.sound || stage.kind == StageKind::Source);
        let inputs = feeds.and_then(|feeds| Some((feeds, self.inputs(stage, feeds)?)));
        let component = stage.component_name().to_owned();
        let mut known =
            Known { name: stage.name().to_owned(), component: component.clone(), inputs: Vec::new(), outputs: None, runs: None };
        match inputs {
            // What is wrong with its shape has been told, and nothing could stand in for it.
            _ if stage.config.is_null() => {}
            None => self.check(stage),
            Some((feeds, inputs)) => {
                let outcome = self.component(stage, feeds, &inputs);
                let runs = outcome.as_ref().is_some_and(|outcome| outcome.runs.is_some());
                if runs && inputs.is_empty() && stage.kind != StageKind::Source {
                    let message = format!("nothing feeds `{}`", stage.name());
                    let help = format!("name a stage in its `{component}`");
                    self.diagnostics.push(Diagnostic::error("missing-input", stage.pair.key_span, message).help(help));
                }
                if let Some(Outcome { outputs, runs }) = outcome {
                    known.outputs = Some(outputs);
                    known.runs = runs.map(|(part, role)| (part, node(stage, role, &inputs)));
                }
                known.inputs = inputs;
            }
        }
        self.places.insert(index, self.known.len());
        self.known.push(known);
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
            let known = &self.known[from];
            let found = match (&known.outputs, feed.output.as_deref()) {
                (_, Some("rejected")) => Ok((Port::Rejected, rejected::schema())),
                (Some(outputs), output) => port(&known.name, outputs, output),
                (None, _) => {
                    complete = false;
                    continue;
                }
            };
            match found {
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

    /// Plans the component; `None` where it is not known what it emits.
    fn component(&mut self, stage: &Stage<'_>, feeds: &[Feed], arriving: &[PlannedInput]) -> Option<Outcome> {
        let inputs: Vec<Input> =
            arriving.iter().map(|input| Input { name: input.name.clone(), schema: SchemaRef::clone(&input.schema) }).collect();
        let context = self.context_of(stage);
        let name = stage.component_name();
        let planned = match stage.kind {
            StageKind::Source => {
                let entry = self.registry.sources.get(name)?;
                let planned = (entry.plan)(&stage.config, &context).map(|plan| {
                    let outputs = vec![Output { name: String::new(), schema: plan.schema }];
                    let part =
                        Part::Source { replay: plan.replay, bounded: plan.bounded, in_flight: plan.in_flight, moves: plan.moves };
                    Outcome { outputs, runs: Some((part, Role::Source(plan.build))) }
                });
                planned.map_err(|error| Refused { error, declared: (entry.declares)(&stage.config, &inputs) })
            }
            StageKind::Operator => {
                let planned = self.operator(stage, feeds, &inputs, &context)?;
                planned.map(|plan| {
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
                    Outcome { outputs: plan.outputs, runs: Some((part, Role::Operator { build: plan.build, parallelism })) }
                })
            }
            StageKind::Sink => {
                let planned = (self.registry.sinks.get(name)?.plan)(&stage.config, &inputs, &context).map(|plan| {
                    let part = Part::Sink { delivery: plan.delivery, commit_interval: plan.commit_interval };
                    let role = Role::Sink { build: plan.build, commit_interval: plan.commit_interval };
                    Outcome { outputs: Vec::new(), runs: Some((part, role)) }
                });
                planned.map_err(|error| Refused { error, declared: None })
            }
        };
        match planned {
            Ok(outcome) => Some(outcome),
            Err(Refused { error, declared }) => {
                self.tell(stage, arriving, error);
                Some(Outcome { outputs: declared?, runs: None })
            }
        }
    }

    fn context_of(&self, stage: &Stage<'_>) -> PlanContext {
        let mut context = self.context.clone();
        context.pipeline = self.file.envelope.as_ref().map(|envelope| envelope.name.clone()).unwrap_or_default();
        context.stage = stage.name().to_owned();
        context
    }

    /// Tells what is wrong with a stage whatever arrives.
    fn check(&mut self, stage: &Stage<'_>) {
        let (registry, name) = (self.registry, stage.component_name());
        let check = match stage.kind {
            StageKind::Source => registry.sources.get(name).map(|entry| entry.check),
            StageKind::Operator => registry.operators.get(name).map(|entry| entry.check),
            StageKind::Sink => registry.sinks.get(name).map(|entry| entry.check),
        };
        if let Some(Err(error)) = check.map(|check| check(&stage.config, &self.context_of(stage))) {
            self.tell(stage, &[], error);
        }
    }

    /// Plans an operator: over the inputs that it names itself, else over the one that all of them make.
    fn operator(
        &mut self,
        stage: &Stage<'_>,
        feeds: &[Feed],
        inputs: &[Input],
        context: &PlanContext,
    ) -> Option<Result<OperatorPlan, Refused>> {
        let registry = self.registry;
        let entry = registry.operators.get(stage.component_name())?;
        let plan = |inputs: &[Input]| {
            let refused = |error| Refused { error, declared: (entry.declares)(&stage.config, inputs) };
            (entry.plan)(&stage.config, inputs, context).map_err(refused)
        };
        if (entry.named_inputs)(&stage.config).is_some() {
            return Some(plan(inputs));
        }
        let stream = match fan_in::one_stream(inputs) {
            Ok(stream) => stream,
            Err(difference) => {
                let span = feeds.get(difference.input).map_or(stage.pair.key_span, |feed| feed.span);
                let message = format!("the inputs of `{}` are not alike: {}", stage.name(), difference.what);
                let help =
                    "an operator takes one stream: put `sql` stages in front of it that select the same columns, in the same \
                            order and of the same types"
                        .to_owned();
                self.diagnostics.push(Diagnostic::error("different-schemas", span, message).help(help));
                self.check(stage);
                return None;
            }
        };
        let planned = plan(stream.as_slice()).map(|mut plan| {
            if let Some(stream) = &stream {
                plan.build = fan_in::under(&stream.schema, inputs, plan.build);
            }
            plan
        });
        Some(planned)
    }

    /// Turns what a component says into diagnostics.
    fn tell(&mut self, stage: &Stage<'_>, inputs: &[PlannedInput], error: PlanError) {
        let Some(pair) = stage.component else { return };
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
                    let left_out = (problem.code == "unknown-column").then(|| self.left_out(&problem.message, inputs)).flatten();
                    let help = match (left_out, problem.help) {
                        (Some(left_out), Some(help)) => Some(format!("{left_out}; {help}")),
                        (left_out, help) => left_out.or(help),
                    };
                    self.diagnostics.push(Diagnostic::error(problem.code, span, problem.message).help(help));
                }
            }
        }
    }

    /// Of a column that is missing here although it reaches the stage in front: that it ends there, and what to do if
    /// that stage says itself what it keeps. The column is what the message has in backticks.
    fn left_out(&self, message: &str, inputs: &[PlannedInput]) -> Option<String> {
        let words = || message.split('`').skip(1).step_by(2).map(|word| word.rsplit('.').next().unwrap_or(word));
        inputs.iter().find_map(|input| {
            let from = &self.known[input.from];
            let ends = |column: &&str| {
                let reaches = from.inputs.iter().any(|above| above.schema.column_with_name(column).is_some());
                reaches && input.schema.column_with_name(column).is_none()
            };
            let column = words().find(ends)?;
            let entry = self.registry.operators.get(from.component.as_str());
            let keeps = entry.is_some_and(|entry| entry.schema.as_value().pointer("/properties/keep").is_some());
            let help = format!("`{}` does not hand `{column}` on", from.name);
            Some(if keeps { format!("{help}: add it to its `keep`") } else { help })
        })
    }
}

/// The stage as a node of the engine's graph.
fn node(stage: &Stage<'_>, role: Role, inputs: &[PlannedInput]) -> GraphNode {
    let inlets =
        inputs.iter().map(|input| Inlet { from: input.from, port: input.port, queue: input.queue, overflow: input.overflow });
    let written = stage.component.map(|pair| pair.value.to_value()).unwrap_or_default();
    let component = stage.component_name().to_owned();
    let fingerprint = fingerprint(&component, &written);
    GraphNode { name: stage.name().to_owned(), component, role, inputs: inlets.collect(), fingerprint }
}

/// The output that an input names, with its schema; or what is wrong with the name.
fn port(stage: &str, outputs: &[Output], output: Option<&str>) -> Result<(Port, SchemaRef), (String, Option<String>)> {
    let named: Vec<&str> = outputs.iter().map(|output| output.name.as_str()).filter(|name| !name.is_empty()).collect();
    let found = match output {
        Some(wanted) => outputs.iter().position(|output| output.name == wanted),
        None => outputs.iter().position(|output| output.name.is_empty()).or_else(|| (outputs.len() == 1).then_some(0)),
    };
    if let Some((number, output)) = found.and_then(|number| Some((number, outputs.get(number)?))) {
        return Ok((Port::Output(number), SchemaRef::clone(&output.schema)));
    }
    let known: Vec<String> = named.iter().map(|name| format!("{stage}.{name}")).collect();
    let known = suggest::list(known.iter().map(String::as_str));
    match output {
        Some(wanted) if named.is_empty() => {
            let message = format!("`{stage}` has no output `{wanted}`");
            Err((message, Some(format!("write `{stage}`, or `{stage}.rejected` for the rows that it could not process"))))
        }
        Some(wanted) => {
            let help = suggest::closest(wanted, named).map(|name| format!("did you mean `{stage}.{name}`?"));
            Err((format!("`{stage}` has no output `{wanted}`"), help.or_else(|| Some(format!("known are {known}")))))
        }
        None => Err((format!("which output of `{stage}` is meant must be written"), Some(format!("known are {known}")))),
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

/// Refuses operators that hold rows behind a source whose parts may move to another process.
fn refuse_stranded(file: &File<'_>, planned: &[PlannedStage], diagnostics: &mut Diagnostics) {
    for Stranded { operator, source, help } in guarantee::stranded(planned) {
        let Some(stage) = file.stages.iter().find(|stage| stage.name() == operator) else { continue };
        let span = stage.component.map_or(stage.pair.key_span, |pair| pair.key_span);
        let message = format!(
            "`{operator}` holds rows or counts between batches, and what `{source}` reads may move to another process: half \
             of them would be left in either"
        );
        let help = format!("`{source}` must keep what it reads: {help}");
        diagnostics.push(Diagnostic::error("state-behind-group", span, message).help(help));
    }
}

/// Refuses a pipeline that declares more than it can keep: each reason once, with all paths that it stands in the way of.
fn compare(envelope: &Envelope, file: &File<'_>, guarantees: &[PathGuarantee], text: &str, diagnostics: &mut Diagnostics) {
    let Some(declared) = envelope.delivery else { return };
    let Some(pair) = file.root.get("delivery") else { return };
    let mut reasons: Vec<(&str, Vec<&PathGuarantee>)> = Vec::new();
    for path in guarantees.iter().filter(|path| path.guarantee < declared) {
        for reason in &path.reasons {
            match reasons.iter_mut().find(|(known, _)| *known == reason.as_str()) {
                Some((_, paths)) => paths.push(path),
                None => reasons.push((reason.as_str(), vec![path])),
            }
        }
    }
    let best = guarantees.iter().map(|path| path.guarantee).min().unwrap_or(declared);
    for (reason, paths) in reasons {
        let message = format!("`{}` cannot be kept {}: {reason}", declared.word(), between(&paths));
        let help = format!("declare `delivery: {}`, or change what stands in the way", best.word());
        diagnostics.push(Diagnostic::error("guarantee-not-kept", pair.locate("").span(text), message).help(help));
    }
}

/// Paths in words, those of one source together.
fn between(paths: &[&PathGuarantee]) -> String {
    let mut sources: Vec<(&str, Vec<&str>)> = Vec::new();
    for path in paths {
        match sources.iter_mut().find(|(source, _)| *source == path.source.as_str()) {
            Some((_, sinks)) => sinks.push(path.sink.as_str()),
            None => sources.push((path.source.as_str(), vec![path.sink.as_str()])),
        }
    }
    let told = sources.into_iter().map(|(source, sinks)| format!("from `{source}` to {}", suggest::list(sinks)));
    told.collect::<Vec<_>>().join(", ")
}
