//! From the YAML tree to the envelope and its stages: takes a stage's reserved keys off, finds the one key
//! that names the component, and checks the shape of all. The first step of the lint; a stage with a fault
//! stays in the list as unsound, so that references to it are still understood.

use afferent_engine::registry::Registry;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::diagnostic::{Diagnostic, Diagnostics};
use crate::document::{Kind, Node, Pair, Place, Span, locate};
use crate::shape::{self, Fault};
use crate::spec::{Component, Envelope, OperatorKeys, StageKind};
use crate::variables::resolved;
use crate::{schema, suggest};

/// One input as it is written.
#[derive(Clone, Debug)]
pub(crate) struct Reference {
    pub name: String,
    pub span: Span,
}

/// One stage of the file.
pub(crate) struct Stage<'d> {
    pub kind: StageKind,
    /// The name and the whole body.
    pub pair: &'d Pair,
    /// The key that names the component, with its configuration.
    pub component: Option<&'d Pair>,
    /// The configuration with its references resolved. In that of an unsound stage defaults stand in for values at fault;
    /// null where they cannot.
    pub config: Value,
    /// The inputs, where they are written.
    pub inputs: Option<Vec<Reference>>,
    /// The engine's own keys.
    pub keys: OperatorKeys,
    /// Whether it can be planned so far.
    pub sound: bool,
}

impl Stage<'_> {
    pub fn name(&self) -> &str {
        &self.pair.key
    }

    /// The word of the component; empty when there is none.
    pub fn component_name(&self) -> &str {
        self.component.map_or("", |pair| &pair.key)
    }
}

/// What a pipeline file says.
pub(crate) struct File<'d> {
    pub envelope: Option<Envelope>,
    pub root: &'d Node,
    pub stages: Vec<Stage<'d>>,
}

/// Reads all of it; what is wrong goes to `diagnostics`.
pub(crate) fn read<'d>(root: &'d Node, text: &str, registry: &Registry, diagnostics: &mut Diagnostics) -> File<'d> {
    let top = Place { key: Span::default(), node: root };
    let envelope = envelope(root, top, text, diagnostics);
    let mut stages: Vec<Stage<'d>> = Vec::new();
    for kind in StageKind::ALL {
        let components = kind.components(registry);
        for pair in root.get(kind.section()).map(|section| section.value.pairs()).unwrap_or_default() {
            let mut reader = Reader { kind, registry, components: &components, text, diagnostics: &mut *diagnostics };
            let mut stage = reader.stage(pair);
            if let Some(first) = stages.iter().find(|other| other.name() == pair.key) {
                let message = format!("the name `{}` is taken", pair.key);
                let help = format!("{} has it; every stage of a pipeline needs a name of its own", first.kind.with_article());
                diagnostics.push(Diagnostic::error("duplicate-stage", pair.key_span, message).help(help));
                stage.sound = false;
            }
            stages.push(stage);
        }
    }
    File { envelope, root, stages }
}

fn envelope(root: &Node, top: Place<'_>, text: &str, diagnostics: &mut Diagnostics) -> Option<Envelope> {
    let sections: Vec<&str> = StageKind::ALL.iter().map(|kind| kind.section()).collect();
    let mut whole = Map::new();
    let mut own = Map::new();
    let mut complete = true;
    for pair in root.pairs() {
        if sections.contains(&pair.key.as_str()) {
            whole.insert(pair.key.clone(), pair.value.to_value());
        } else if let Some(value) = resolved(&pair.value, &pair.key, text, diagnostics) {
            whole.insert(pair.key.clone(), value.clone());
            own.insert(pair.key.clone(), value);
        } else {
            complete = false;
        }
    }
    let whole = match root.kind {
        Kind::Map(_) => Value::Object(whole),
        _ => root.to_value(),
    };
    let mut faults = shape::faults(&schema::envelope(), &whole, "the pipeline");
    if !complete {
        // What could not be resolved is there all the same.
        faults.retain(|fault| fault.code != "missing-key");
    }
    let sound = complete && faults.is_empty();
    tell(faults, top, text, diagnostics);
    if !sound {
        return None;
    }
    match deserialized(&Value::Object(own)) {
        Ok(envelope) => Some(envelope),
        Err(fault) => {
            tell(vec![fault], top, text, diagnostics);
            None
        }
    }
}

/// Turns faults below `top` into diagnostics.
fn tell(faults: Vec<Fault>, top: Place<'_>, text: &str, diagnostics: &mut Diagnostics) {
    for fault in faults {
        let place = locate(top, &fault.pointer);
        let span = if fault.at_key { place.key_span(text) } else { place.span(text) };
        diagnostics.push(Diagnostic::error(fault.code, span, fault.message).help(fault.help));
    }
}

fn deserialized<T: DeserializeOwned>(value: &Value) -> Result<T, Fault> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let message = error.inner().to_string();
        let pointer: String = error.path().iter().map(|segment| format!("/{segment}").replace(['[', ']'], "")).collect();
        Fault { code: shape::code_of(&message), pointer, at_key: false, message, help: None }
    })
}

/// Whether a word may name a stage: it stands in SQL, in metrics and in `stage.output`.
fn is_stage_name(name: &str) -> bool {
    let mut letters = name.chars();
    letters.next().is_some_and(|first| first.is_ascii_alphabetic() || first == '_')
        && letters.all(|letter| letter.is_ascii_alphanumeric() || letter == '_' || letter == '-')
}

struct Reader<'a> {
    kind: StageKind,
    registry: &'a Registry,
    components: &'a [Component<'a>],
    text: &'a str,
    diagnostics: &'a mut Diagnostics,
}

impl Reader<'_> {
    fn stage<'d>(&mut self, pair: &'d Pair) -> Stage<'d> {
        let mut stage =
            Stage { kind: self.kind, pair, component: None, config: Value::Null, inputs: None, keys: no_keys(), sound: true };
        if !is_stage_name(&pair.key) {
            let message = format!("`{}` cannot be the name of a stage", pair.key);
            let help = "begin with a letter, go on with letters, digits, `_` and `-`".to_owned();
            self.error(&mut stage, Diagnostic::error("invalid-name", pair.key_span, message).help(help));
        }
        if !matches!(pair.value.kind, Kind::Map(_)) {
            let span = pair.locate("").span(self.text);
            let help = self.components.first().map(|component| format!("write for example `{}`", component.example));
            let message = format!("the {} `{}` must be a map with a component", self.kind.word(), pair.key);
            self.error(&mut stage, Diagnostic::error("wrong-type", span, message).help(help));
            return stage;
        }
        let reserved = self.kind.reserved();
        let words: Vec<&str> = reserved
            .get("properties")
            .and_then(Value::as_object)
            .into_iter()
            .flat_map(|map| map.keys().map(String::as_str))
            .collect();
        self.find_component(&mut stage, &words);
        self.read_keys(&mut stage, &reserved, &words);
        self.read_config(&mut stage);
        stage
    }

    /// The one key that is no reserved word names the component.
    fn find_component<'d>(&mut self, stage: &mut Stage<'d>, words: &[&str]) {
        let names: Vec<&str> = self.components.iter().map(|component| component.name).collect();
        let strange: Vec<&'d Pair> = stage.pair.value.pairs().iter().filter(|pair| !words.contains(&pair.key.as_str())).collect();
        stage.component = strange.iter().copied().find(|pair| names.contains(&pair.key.as_str()));
        for pair in strange.iter().copied() {
            let key = pair.key.as_str();
            if stage.component.is_some_and(|component| component.key_span == pair.key_span) {
                continue;
            }
            let like_reserved =
                suggest::closest(key, words.iter().copied()).is_some() && suggest::closest(key, names.iter().copied()).is_none();
            let diagnostic = match stage.component {
                Some(component) if names.contains(&key) => {
                    let message = format!("a stage has one component, and this one has `{}` already", component.key);
                    Diagnostic::error("several-components", pair.key_span, message).help("make it a stage of its own".to_owned())
                }
                Some(_) => Diagnostic::error("unknown-key", pair.key_span, format!("unknown key `{key}`"))
                    .help(suggest::instead_of(key, words)),
                None if like_reserved => Diagnostic::error("unknown-key", pair.key_span, format!("unknown key `{key}`"))
                    .help(suggest::instead_of(key, words)),
                None => Diagnostic::error("unknown-component", pair.key_span, format!("unknown {} `{key}`", self.kind.word()))
                    .help(self.other_kind(key).or_else(|| suggest::instead_of(key, &names))),
            };
            self.error(stage, diagnostic);
        }
        if strange.is_empty() {
            let message = format!("the {} `{}` has no component", self.kind.word(), stage.pair.key);
            self.error(
                stage,
                Diagnostic::error("missing-component", stage.pair.key_span, message)
                    .help(format!("known are {}", suggest::list(names))),
            );
        }
    }

    /// Where a component can be used that is none of this kind.
    fn other_kind(&self, name: &str) -> Option<String> {
        let knows = |kind: &StageKind| kind.components(self.registry).iter().any(|component| component.name == name);
        let sections: Vec<&str> = StageKind::ALL.into_iter().filter(knows).map(StageKind::section).collect();
        (!sections.is_empty()).then(|| format!("`{name}` can be used under {} only", suggest::list(sections)))
    }

    fn read_keys(&mut self, stage: &mut Stage<'_>, reserved: &Value, words: &[&str]) {
        let mut beside = Map::new();
        for pair in stage.pair.value.pairs().iter().filter(|pair| words.contains(&pair.key.as_str())) {
            match resolved(&pair.value, &pair.key, self.text, self.diagnostics) {
                Some(value) => drop(beside.insert(pair.key.clone(), value)),
                None => stage.sound = false,
            }
        }
        let beside = Value::Object(beside);
        let mut faults = shape::faults(reserved, &beside, &stage.pair.key);
        if faults.is_empty() {
            match deserialized(&beside) {
                Ok(keys) => stage.keys = keys,
                Err(fault) => faults.push(fault),
            }
        }
        stage.sound &= faults.is_empty();
        tell(faults, stage.pair.locate(""), self.text, self.diagnostics);
        stage.inputs = match stage.pair.value.get("inputs").map(|pair| &pair.value.kind) {
            Some(Kind::Seq(items)) if stage.kind != StageKind::Source => Some(items.iter().filter_map(reference).collect()),
            _ => None,
        };
    }

    fn read_config(&mut self, stage: &mut Stage<'_>) {
        let Some(pair) = stage.component else { return };
        let Some(component) = self.components.iter().find(|component| component.name == pair.key) else { return };
        let Some(value) = resolved(&pair.value, &pair.key, self.text, self.diagnostics) else {
            stage.sound = false;
            return;
        };
        let faults = shape::faults(component.schema.as_value(), &value, &pair.key);
        if faults.is_empty() {
            stage.config = value;
        } else {
            stage.sound = false;
            stage.config = with_defaults(component.schema.as_value(), value, &faults).unwrap_or_default();
            tell(faults, pair.locate(""), self.text, self.diagnostics);
        }
    }

    fn error(&mut self, stage: &mut Stage<'_>, diagnostic: Diagnostic) {
        stage.sound = false;
        self.diagnostics.push(diagnostic);
    }
}

/// A configuration without the values at fault, where all of their keys have a default: what else is wrong with it can
/// be told all the same. A key whose absence has a meaning of its own, or that is unknown, cannot be left out: problems
/// that only follow from that would be told.
fn with_defaults(schema: &Value, mut value: Value, faults: &[Fault]) -> Option<Value> {
    for fault in faults {
        let key = fault.pointer.strip_prefix('/')?.split('/').next()?.replace("~1", "/").replace("~0", "~");
        let default = schema.get("properties")?.get(&key)?.get("default")?;
        if default.is_null() {
            return None;
        }
        value.as_object_mut()?.remove(&key);
    }
    Some(value)
}

fn reference(item: &Node) -> Option<Reference> {
    match &item.kind {
        Kind::Scalar(scalar) => Some(Reference { name: scalar.text.clone(), span: item.span }),
        _ => None,
    }
}

fn no_keys() -> OperatorKeys {
    OperatorKeys {
        inputs: Vec::new(),
        queue: Default::default(),
        overflow: Default::default(),
        parallelism: std::num::NonZeroU32::MIN,
    }
}
