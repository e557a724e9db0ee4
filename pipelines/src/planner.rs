//! Plans the stages of a wired file, producers first: schemas flow from stage to stage, each component checks
//! its configuration against what arrives, and the engine's graph is put together. A stage whose input
//! could not be planned is passed over in silence: its turn comes when the first fault is mended. An operator that
//! does not name its inputs itself cannot tell them apart: it is planned with one, which all of them make.

use std::collections::HashMap;

use afferent_engine::component::{Input, OperatorBuild, OperatorPlan, Output, PlanContext};
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
        let Some((part, outputs, role)) = self.component(stage, feeds, &inputs) else { return };
        if inputs.is_empty() && stage.kind != StageKind::Source {
            let message = format!("nothing feeds `{}`", stage.name());
            let help = format!("name a stage in its `{}`", stage.component_name());
            self.diagnostics.push(Diagnostic::error("missing-input", stage.pair.key_span, message).help(help));
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

    fn component(&mut self, stage: &Stage<'_>, feeds: &[Feed], arriving: &[PlannedInput]) -> Option<(Part, Vec<Output>, Role)> {
        let inputs: Vec<Input> =
            arriving.iter().map(|input| Input { name: input.name.clone(), schema: SchemaRef::clone(&input.schema) }).collect();
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
                Err(error) => self.tell(stage, arriving, error),
            },
            StageKind::Operator => match self.operator(stage, feeds, &inputs, &context)? {
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
                Err(error) => self.tell(stage, arriving, error),
            },
            StageKind::Sink => match (self.registry.sinks.get(name)?.plan)(&stage.config, &inputs, &context) {
                Ok(plan) => {
                    let part = Part::Sink { delivery: plan.delivery, commit_interval: plan.commit_interval };
                    Some((part, Vec::new(), Role::Sink { build: plan.build, commit_interval: plan.commit_interval }))
                }
                Err(error) => self.tell(stage, arriving, error),
            },
        }
    }

    /// Plans an operator: over the inputs that it names itself, else over the one that all of them make.
    fn operator(
        &mut self,
        stage: &Stage<'_>,
        feeds: &[Feed],
        inputs: &[Input],
        context: &PlanContext,
    ) -> Option<Result<OperatorPlan, PlanError>> {
        let registry = self.registry;
        let entry = registry.operators.get(stage.component_name())?;
        if (entry.named_inputs)(&stage.config).is_some() {
            return Some((entry.plan)(&stage.config, inputs, context));
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
                return None;
            }
        };
        let planned = (entry.plan)(&stage.config, stream.as_slice(), context).map(|mut plan| {
            if let Some(stream) = &stream {
                plan.build = fan_in::under(&stream.schema, inputs, plan.build);
            }
            plan
        });
        Some(planned)
    }

    /// Turns what a component says into diagnostics; always `None`.
    fn tell<T>(&mut self, stage: &Stage<'_>, inputs: &[PlannedInput], error: PlanError) -> Option<T> {
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
                    let left_out = (problem.code == "unknown-column").then(|| self.left_out(&problem.message, inputs)).flatten();
                    let help = match (left_out, problem.help) {
                        (Some(left_out), Some(help)) => Some(format!("{left_out}; {help}")),
                        (left_out, help) => left_out.or(help),
                    };
                    self.diagnostics.push(Diagnostic::error(problem.code, span, problem.message).help(help));
                }
            }
        }
        None
    }

    /// Of a column that is missing here although it reaches the stage in front: that it ends there, and what to do if
    /// that stage says itself what it keeps. The column is what the message has in backticks.
    fn left_out(&self, message: &str, inputs: &[PlannedInput]) -> Option<String> {
        let words = || message.split('`').skip(1).step_by(2).map(|word| word.rsplit('.').next().unwrap_or(word));
        inputs.iter().find_map(|input| {
            let from = &self.planned[input.from];
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
