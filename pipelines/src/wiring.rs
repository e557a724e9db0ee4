//! Who feeds whom: resolves the inputs of every stage, written, named in a FROM clause or by default, and
//! orders the stages so that producers come before consumers. Cycles are told and taken out, so that the
//! rest can still be planned.

use afferent_engine::registry::Registry;

use crate::diagnostic::{Diagnostic, Diagnostics};
use crate::document::{Kind, Node, Span, word_at};
use crate::spec::StageKind;
use crate::stage::{Reference, Stage};
use crate::suggest;

/// One input of a stage.
#[derive(Clone, Debug)]
pub(crate) struct Feed {
    /// Index of the producing stage in the file.
    pub from: usize,
    /// The output behind the dot, where one is written.
    pub output: Option<String>,
    /// As it is written.
    pub name: String,
    /// Where it is written; by default the consuming stage's name.
    pub span: Span,
}

/// The shape of the graph.
pub(crate) struct Wiring {
    /// The inputs of each stage; `None` where they could not be settled.
    pub feeds: Vec<Option<Vec<Feed>>>,
    /// The stages, producers before consumers; those of a cycle are left out.
    pub order: Vec<usize>,
}

pub(crate) fn wire(stages: &[Stage<'_>], registry: &Registry, text: &str, diagnostics: &mut Diagnostics) -> Wiring {
    let mut feeds: Vec<Option<Vec<Feed>>> = Vec::new();
    for index in 0..stages.len() {
        feeds.push(Wirer { stages, registry, text, diagnostics: &mut *diagnostics }.feeds(index));
    }
    let order = order(stages, &mut feeds, diagnostics);
    Wiring { feeds, order }
}

struct Wirer<'a, 'd> {
    stages: &'a [Stage<'d>],
    registry: &'a Registry,
    text: &'a str,
    diagnostics: &'a mut Diagnostics,
}

impl<'a> Wirer<'a, '_> {
    /// The stages that could feed stage `index`.
    fn others(&self, index: usize) -> Vec<&'a str> {
        let stages: &'a [Stage<'_>] = self.stages;
        stages
            .iter()
            .enumerate()
            .filter(|(i, stage)| *i != index && stage.kind != StageKind::Sink)
            .map(|(_, stage)| stage.name())
            .collect()
    }

    fn feeds(&mut self, index: usize) -> Option<Vec<Feed>> {
        let stages = self.stages;
        let stage = &stages[index];
        if stage.kind == StageKind::Source {
            return Some(Vec::new());
        }
        match (self.named(stage), &stage.inputs) {
            (Some(named), Some(_)) => {
                let span = stage.pair.locate("/inputs").key_span(self.text);
                let message = format!("`inputs` cannot be written beside `{}`", stage.component_name());
                let help = "the configuration names the inputs itself; leave `inputs` out".to_owned();
                self.diagnostics.push(Diagnostic::error("conflicting-inputs", span, message).help(help));
                // What its own text says is planned all the same, so that all of its problems are told at once.
                self.resolve(index, &named)
            }
            (Some(named), None) => self.resolve(index, &named),
            (None, Some(written)) if written.is_empty() => {
                let span = stage.pair.locate("/inputs").key_span(self.text);
                let help = format!("write one or more of {} in `inputs`", suggest::list(self.others(index)));
                let message = format!("nothing feeds `{}`", stage.name());
                self.diagnostics.push(Diagnostic::error("missing-input", span, message).help(help));
                None
            }
            (None, Some(written)) => self.resolve(index, written),
            (None, None) => self.default(index).map(|feed| vec![feed]),
        }
    }

    /// The inputs that the configuration itself names, each with its place in the text.
    fn named(&self, stage: &Stage<'_>) -> Option<Vec<Reference>> {
        if stage.kind != StageKind::Operator || !stage.sound {
            return None;
        }
        let component = stage.component?;
        let entry = self.registry.operators.get(component.key.as_str())?;
        let names = (entry.named_inputs)(&stage.config)?;
        let otherwise = component.locate("").span(self.text);
        let place = |name: String| {
            let span = find_word(&component.value, &name, self.text).unwrap_or(otherwise);
            Reference { name, span }
        };
        Some(names.into_iter().map(place).collect())
    }

    fn resolve(&mut self, index: usize, references: &[Reference]) -> Option<Vec<Feed>> {
        // No short cut at the first wrong one: all are to be told.
        let feeds: Vec<Option<Feed>> = references.iter().map(|reference| self.reference(index, reference)).collect();
        let mut sound = true;
        for (number, reference) in references.iter().enumerate() {
            if references[..number].iter().any(|earlier| earlier.name == reference.name) {
                let message = format!("`{}` feeds `{}` twice", reference.name, self.stages[index].name());
                let help = "each of its rows would come twice; name it once".to_owned();
                self.diagnostics.push(Diagnostic::error("duplicate-input", reference.span, message).help(help));
                sound = false;
            }
        }
        feeds.into_iter().collect::<Option<Vec<Feed>>>().filter(|_| sound)
    }

    fn reference(&mut self, index: usize, reference: &Reference) -> Option<Feed> {
        let (name, output) = match reference.name.split_once('.') {
            Some((name, output)) => (name, Some(output)),
            None => (reference.name.as_str(), None),
        };
        let Some(from) = self.stages.iter().position(|stage| stage.name() == name) else {
            let others = self.others(index);
            let message = format!("there is no stage `{name}`");
            self.diagnostics
                .push(Diagnostic::error("unknown-stage", reference.span, message).help(suggest::instead_of(name, &others)));
            return None;
        };
        if self.stages[from].kind == StageKind::Sink && output != Some("rejected") {
            let message = format!("the sink `{name}` hands nothing on");
            let help = format!("`{name}.rejected` are the rows that it could not write");
            self.diagnostics.push(Diagnostic::error("unknown-output", reference.span, message).help(help));
            return None;
        }
        Some(Feed { from, output: output.map(str::to_owned), name: reference.name.clone(), span: reference.span })
    }

    /// The stage above: the operator before it, or the only source.
    fn default(&mut self, index: usize) -> Option<Feed> {
        let stages = self.stages;
        let stage = &stages[index];
        let sources: Vec<usize> = (0..stages.len()).filter(|i| stages[*i].kind == StageKind::Source).collect();
        let before = (0..index).rfind(|i| stages[*i].kind == StageKind::Operator);
        if sources.len() > 1 {
            // Whether a stage with a fault names its inputs itself cannot be known.
            if stage.sound {
                let candidates = self.others(index);
                let message = format!("which stage feeds `{}` must be written: there are several sources", stage.name());
                let help = format!("add `inputs: [...]` with one or more of {}", suggest::list(candidates));
                let span = stage.pair.key_span;
                self.diagnostics.push(Diagnostic::error("ambiguous-input", span, message).help(help));
            }
            return None;
        }
        // Without any source that has been told already.
        let from = before.or(sources.first().copied())?;
        Some(Feed { from, output: None, name: stages[from].name().to_owned(), span: stage.pair.key_span })
    }
}

/// Where a word stands alone in one of the texts below `node`.
fn find_word(node: &Node, word: &str, text: &str) -> Option<Span> {
    match &node.kind {
        Kind::Scalar(scalar) => {
            let is_word = |c: char| c.is_alphanumeric() || c == '_';
            let alone = |at: &usize| {
                let (before, after) = (&scalar.text[..*at], &scalar.text[at + word.len()..]);
                !before.ends_with(is_word) && !after.starts_with(is_word)
            };
            let at = scalar.text.match_indices(word).map(|(at, _)| at).filter(alone).last()?;
            word_at(text, node, at)
        }
        Kind::Seq(items) => items.iter().find_map(|item| find_word(item, word, text)),
        Kind::Map(pairs) => pairs.iter().find_map(|pair| find_word(&pair.value, word, text)),
    }
}

/// Producers before consumers, otherwise in the order of the file. Stages of a cycle lose their inputs.
fn order(stages: &[Stage<'_>], feeds: &mut [Option<Vec<Feed>>], diagnostics: &mut Diagnostics) -> Vec<usize> {
    let mut order = Vec::new();
    let mut left: Vec<usize> = (0..stages.len()).collect();
    while !left.is_empty() {
        let waits = |index: usize| feeds[index].iter().flatten().any(|feed| left.contains(&feed.from));
        match left.iter().position(|index| !waits(*index)) {
            Some(ready) => order.push(left.remove(ready)),
            None => {
                let cycle = cycle(feeds, &left);
                tell_cycle(stages, feeds, &cycle, diagnostics);
                for index in &cycle {
                    feeds[*index] = None;
                }
                left.retain(|index| !cycle.contains(index));
            }
        }
    }
    order
}

/// A cycle among stages that all wait for one another, in the direction of the data, from the first one.
fn cycle(feeds: &[Option<Vec<Feed>>], left: &[usize]) -> Vec<usize> {
    let mut walked: Vec<usize> = Vec::new();
    let mut at = left[0];
    while !walked.contains(&at) {
        walked.push(at);
        let before = feeds[at].iter().flatten().map(|feed| feed.from).find(|from| left.contains(from));
        match before {
            Some(before) => at = before,
            None => break,
        }
    }
    let start = walked.iter().position(|index| *index == at).unwrap_or(0);
    let mut cycle = walked.split_off(start);
    cycle.reverse();
    let first = cycle.iter().enumerate().min_by_key(|(_, index)| **index).map_or(0, |(place, _)| place);
    cycle.rotate_left(first);
    cycle
}

fn tell_cycle(stages: &[Stage<'_>], feeds: &[Option<Vec<Feed>>], cycle: &[usize], diagnostics: &mut Diagnostics) {
    let Some(first) = cycle.first() else { return };
    let mut path: Vec<&str> = cycle.iter().map(|index| stages[*index].name()).collect();
    path.push(stages[*first].name());
    let span = feeds[*first]
        .iter()
        .flatten()
        .find(|feed| cycle.contains(&feed.from))
        .map_or(stages[*first].pair.key_span, |feed| feed.span);
    let message = format!("these stages feed each other in a circle: {}", path.join(" -> "));
    diagnostics.push(Diagnostic::error("cycle", span, message).help("rows flow one way, from sources to sinks".to_owned()));
}
