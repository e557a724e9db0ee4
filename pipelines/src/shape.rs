//! Whether a value has the shape that its JSON Schema asks for: every fault at once, each with its JSON
//! pointer, in words for people. The lint runs it over the envelope, the reserved keys and each component's
//! configuration before serde, which would stop at the first fault.

use jsonschema::error::{TypeKind, ValidationError, ValidationErrorKind};
use jsonschema::types::JsonType;
use serde_json::Value;

use crate::suggest;
use crate::variables::is_secret;

/// Words that a message names; of more, the help does.
const FEW: usize = 4;

/// One fault of shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// `unknown-key`, `wrong-type`, `missing-key` or `invalid-value`.
    pub code: &'static str,
    /// Where, as a JSON pointer into the value.
    pub pointer: String,
    /// Whether the key there is at fault and not the value.
    pub at_key: bool,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
}

/// Every fault of `value` under `schema`; `whole` is what to call the value itself.
pub fn faults(schema: &Value, value: &Value, whole: &str) -> Vec<Fault> {
    // A schema that does not compile is a fault of a component, not of the file: serde still judges.
    let Ok(validator) = jsonschema::validator_for(schema) else { return Vec::new() };
    let mut faults = Vec::new();
    for error in validator.iter_errors(value) {
        Judge { schema, value, whole }.tell(&error, &mut faults);
    }
    // A word of the wrong type fails both as a type and as one of a list.
    let mut told: Vec<(&'static str, String)> = Vec::new();
    faults.retain(|fault| {
        let key = (fault.code, fault.pointer.clone());
        let first = !told.contains(&key) || fault.code == "missing-key";
        told.push(key);
        first
    });
    faults
}

/// The code for what serde says when the schema found nothing.
pub fn code_of(message: &str) -> &'static str {
    match message {
        m if m.starts_with("unknown field") => "unknown-key",
        m if m.starts_with("missing field") => "missing-key",
        m if m.starts_with("invalid type") => "wrong-type",
        _ => "invalid-value",
    }
}

struct Judge<'a> {
    schema: &'a Value,
    value: &'a Value,
    whole: &'a str,
}

impl Judge<'_> {
    fn tell(&self, error: &ValidationError<'_>, faults: &mut Vec<Fault>) {
        use ValidationErrorKind as K;
        let pointer = error.instance_path().as_str();
        let value: &Value = error.instance();
        let name = self.name(pointer);
        match error.kind() {
            K::AdditionalProperties { unexpected } => {
                let known = self.properties(error);
                faults.extend(unexpected.iter().map(|key| unknown_key(pointer, key, &known)));
            }
            // Of a map that may have no keys at all, the place is told but not the key.
            K::FalseSchema => match self.value.pointer(pointer).and_then(Value::as_object) {
                Some(object) => faults.extend(object.keys().map(|key| unknown_key(pointer, key, &[]))),
                None => {
                    let (parent, key) = pointer.rsplit_once('/').unwrap_or(("", pointer));
                    faults.push(unknown_key(parent, key, &[]));
                }
            },
            K::Required { property } => {
                let missing = property.as_str().unwrap_or_default();
                let help = self.description(error, &format!("properties/{}", escaped(missing)));
                faults.push(Fault {
                    code: "missing-key",
                    pointer: pointer.to_owned(),
                    at_key: true,
                    message: format!("{name} needs the key `{missing}`"),
                    help: help.map(|text| format!("`{missing}`: {text}")),
                });
            }
            K::MinProperties { .. } => faults.push(fault("missing-key", pointer, format!("{name} must not be empty"), None)),
            K::Type { kind } => {
                let wanted = match kind {
                    TypeKind::Single(one) => vec![*one],
                    TypeKind::Multiple(several) => several.into_iter().collect(),
                };
                let mut fault = wrong_type(pointer, &name, value, &wanted, &[]);
                if wanted.contains(&JsonType::Object) && (value.is_null() || fault.help.is_none()) {
                    fault.help = Some(self.as_map(error, value));
                }
                faults.push(fault);
            }
            K::Enum { options } => {
                faults.push(not_one_of(pointer, &name, value, options.as_array().map(Vec::as_slice).unwrap_or_default()))
            }
            K::Constant { expected_value } => {
                faults.push(not_one_of(pointer, &name, value, std::slice::from_ref(&**expected_value)))
            }
            K::AnyOf { context } | K::OneOfNotValid { context } => self.tell_best(pointer, &name, value, context, faults),
            K::Pattern { .. } => {
                let message = format!("{name} cannot be {}", shown(pointer, value));
                faults.push(fault("invalid-value", pointer, message, self.description(error, "")));
            }
            K::Minimum { limit } => faults.push(out_of_range(pointer, &name, value, &format!("at least {limit}"))),
            K::Maximum { limit } => faults.push(out_of_range(pointer, &name, value, &format!("at most {limit}"))),
            K::ExclusiveMinimum { limit } => faults.push(out_of_range(pointer, &name, value, &format!("more than {limit}"))),
            K::ExclusiveMaximum { limit } => faults.push(out_of_range(pointer, &name, value, &format!("less than {limit}"))),
            K::MinItems { limit } => {
                faults.push(fault("invalid-value", pointer, format!("{name} needs at least {limit} items"), None))
            }
            K::MaxItems { limit } => {
                faults.push(fault("invalid-value", pointer, format!("{name} may have at most {limit} items"), None))
            }
            K::PropertyNames { error } => {
                let key = error.instance().as_str().unwrap_or_default();
                let message = format!("`{key}` cannot be a key of {name}");
                faults.push(Fault {
                    at_key: true,
                    ..fault("invalid-value", &format!("{pointer}/{}", escaped(key)), message, None)
                });
            }
            _ => faults.push(fault("invalid-value", pointer, format!("{name} is not right: {}", error.masked()), None)),
        }
    }

    /// Of several shapes that all do not fit, tells what is wrong with the nearest one.
    fn tell_best(
        &self,
        pointer: &str,
        name: &str,
        value: &Value,
        context: &[Vec<ValidationError<'static>>],
        faults: &mut Vec<Fault>,
    ) {
        let mut branches = Vec::new();
        splice(pointer, context, &mut branches);
        // A branch that only fails further down is what was meant; so is the only one of the right type.
        let here = |error: &ValidationError<'static>| error.instance_path().as_str() == pointer;
        let deep = branches.iter().copied().find(|branch| !branch.is_empty() && !branch.iter().any(here));
        let mut typed =
            branches.iter().copied().filter(|branch| !branch.iter().any(|error| here(error) && of_another_type(error.kind())));
        let only = match (typed.next(), typed.next()) {
            (Some(only), None) => Some(only),
            _ => None,
        };
        if let Some(branch) = deep.or(only) {
            branch.iter().for_each(|error| self.tell(error, faults));
            return;
        }
        let (mut types, mut words, mut keys) = (Vec::new(), Vec::new(), Vec::new());
        for error in branches.iter().copied().flatten() {
            match error.kind() {
                ValidationErrorKind::Type { kind: TypeKind::Single(one) } => types.push(*one),
                ValidationErrorKind::Type { kind: TypeKind::Multiple(several) } => types.extend(several),
                ValidationErrorKind::Enum { options } => words.extend(options.as_array().into_iter().flatten().cloned()),
                ValidationErrorKind::Constant { expected_value } => words.push(Value::clone(expected_value)),
                ValidationErrorKind::Required { property } => keys.extend(property.as_str()),
                _ => {}
            }
        }
        // The type of a listed word says less than the word.
        types.retain(|one| *one != JsonType::Null && (words.is_empty() || *one != JsonType::String));
        words.retain(|word| !word.is_null());
        match value {
            Value::Object(object) if !keys.is_empty() => match object.keys().find(|key| !keys.contains(&key.as_str())) {
                Some(key) => faults.push(unknown_key(pointer, key, &keys)),
                None => {
                    faults.push(fault("invalid-value", pointer, format!("{name} takes one of {}", suggest::list(keys)), None))
                }
            },
            Value::String(_) if !words.is_empty() => faults.push(not_one_of(pointer, name, value, &words)),
            _ if types.is_empty() && words.is_empty() => {
                faults.push(fault("invalid-value", pointer, format!("{name} cannot be {}", shown(pointer, value)), None));
            }
            _ => faults.push(wrong_type(pointer, name, value, &types, &words)),
        }
    }

    /// How to write the map that is asked for instead of `value`.
    fn as_map(&self, error: &ValidationError<'_>, value: &Value) -> String {
        let known = self.properties(error);
        let required = self.holder(error).and_then(|holder| holder.get("required")?.get(0)?.as_str());
        match (required, known.first().copied()) {
            (None, _) if value.is_null() => "write `{}` for a map without keys".to_owned(),
            (Some(first), _) | (None, Some(first)) => {
                format!("write `{{ {first}: ... }}`; known keys are {}", suggest::list(known))
            }
            (None, None) => "write `{ NAME: ... }`".to_owned(),
        }
    }

    /// What to call the value at `pointer`: its key, with the index of a list item.
    fn name(&self, pointer: &str) -> String {
        let mut index = String::new();
        for token in pointer.rsplit('/').filter(|token| !token.is_empty()) {
            if token.bytes().all(|b| b.is_ascii_digit()) {
                index.insert_str(0, &format!("[{token}]"));
            } else {
                return format!("`{}{index}`", token.replace("~1", "/").replace("~0", "~"));
            }
        }
        format!("`{}{index}`", self.whole)
    }

    /// The schema that holds the keyword which failed.
    fn holder(&self, error: &ValidationError<'_>) -> Option<&Value> {
        let (holder, _) = error.schema_path().as_str().rsplit_once('/')?;
        self.schema.pointer(holder)
    }

    fn properties(&self, error: &ValidationError<'_>) -> Vec<&str> {
        let properties = self.holder(error).and_then(|holder| holder.get("properties")).and_then(Value::as_object);
        properties.into_iter().flat_map(|properties| properties.keys().map(String::as_str)).collect()
    }

    /// The description below the schema whose keyword failed, its first paragraph on one line.
    fn description(&self, error: &ValidationError<'_>, below: &str) -> Option<String> {
        let holder = self.holder(error)?;
        let place = if below.is_empty() { holder } else { holder.pointer(&format!("/{below}"))? };
        let text = place.get("description")?.as_str()?;
        Some(text.split("\n\n").next()?.replace('\n', " ").trim_end_matches('.').to_owned())
    }
}

/// The branches of a choice, with choices inside of it (an enum that may be null, say) opened up.
fn splice<'e>(pointer: &str, context: &'e [Vec<ValidationError<'static>>], branches: &mut Vec<&'e [ValidationError<'static>]>) {
    for branch in context {
        match branch.as_slice() {
            [only] if only.instance_path().as_str() == pointer => match only.kind() {
                ValidationErrorKind::AnyOf { context } | ValidationErrorKind::OneOfNotValid { context } => {
                    splice(pointer, context, branches)
                }
                _ => branches.push(branch),
            },
            _ => branches.push(branch),
        }
    }
}

fn of_another_type(kind: &ValidationErrorKind) -> bool {
    matches!(kind, ValidationErrorKind::Type { .. } | ValidationErrorKind::Enum { .. } | ValidationErrorKind::Constant { .. })
}

fn fault(code: &'static str, pointer: &str, message: String, help: Option<String>) -> Fault {
    Fault { code, pointer: pointer.to_owned(), at_key: false, message, help }
}

fn unknown_key(pointer: &str, key: &str, known: &[&str]) -> Fault {
    let help = suggest::instead_of(key, known);
    Fault {
        code: "unknown-key",
        pointer: format!("{pointer}/{}", escaped(key)),
        at_key: true,
        message: format!("unknown key `{key}`"),
        help,
    }
}

fn wrong_type(pointer: &str, name: &str, value: &Value, wanted: &[JsonType], words: &[Value]) -> Fault {
    let mut kinds: Vec<String> = Vec::new();
    for kind in wanted.iter().filter(|kind| **kind != JsonType::Null).map(|kind| in_words(*kind)) {
        if !kinds.iter().any(|known| known == kind) {
            kinds.push(kind.to_owned());
        }
    }
    let words: Vec<&str> = words.iter().filter_map(Value::as_str).collect();
    let many = words.len() > FEW;
    if many {
        kinds.push("a known word".to_owned());
    } else {
        kinds.extend(words.iter().map(|word| format!("`{word}`")));
    }
    let numeric = wanted.contains(&JsonType::Integer) || wanted.contains(&JsonType::Number);
    let help = match value {
        Value::String(text) if numeric && text.parse::<f64>().is_ok() => Some("leave out the quotes".to_owned()),
        Value::Number(_) | Value::Bool(_) if wanted.contains(&JsonType::String) => Some("put it in quotes".to_owned()),
        Value::Null if wanted.contains(&JsonType::Object) => Some("write `{}` for a map without keys".to_owned()),
        Value::String(text) if wanted.contains(&JsonType::Array) && !is_secret(last(pointer)) => {
            Some(format!("write `[{text}]`"))
        }
        _ if many => Some(format!("known are {}", suggest::all(&words))),
        _ => None,
    };
    fault("wrong-type", pointer, format!("{name} must be {}, not {}", kinds.join(" or "), shown(pointer, value)), help)
}

fn not_one_of(pointer: &str, name: &str, value: &Value, options: &[Value]) -> Fault {
    let words: Vec<&str> = options.iter().filter_map(Value::as_str).collect();
    let message = format!("{name} cannot be {}", shown(pointer, value));
    match value.as_str() {
        Some(text) => fault("invalid-value", pointer, message, suggest::instead_of(text, &words)),
        None => fault("wrong-type", pointer, message, Some(format!("known are {}", suggest::all(&words)))),
    }
}

fn out_of_range(pointer: &str, name: &str, value: &Value, bound: &str) -> Fault {
    fault("invalid-value", pointer, format!("{name} must be {bound}, not {}", shown(pointer, value)), None)
}

fn in_words(kind: JsonType) -> &'static str {
    match kind {
        JsonType::Array => "a list",
        JsonType::Boolean => "true or false",
        JsonType::Integer => "a whole number",
        JsonType::Null => "nothing",
        JsonType::Number => "a number",
        JsonType::Object => "a map",
        JsonType::String => "a text",
    }
}

/// A value in words; the values of secrets are not told.
fn shown(pointer: &str, value: &Value) -> String {
    match value {
        Value::Null => "nothing".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "a map".to_owned(),
        Value::String(_) | Value::Number(_) if is_secret(last(pointer)) => "the given value".to_owned(),
        Value::Bool(value) => format!("`{value}`"),
        Value::Number(value) => format!("the number {value}"),
        Value::String(text) if text.chars().count() > 40 => "this text".to_owned(),
        Value::String(text) => format!("`{text}`"),
    }
}

fn last(pointer: &str) -> &str {
    pointer.rsplit('/').next().unwrap_or_default()
}

fn escaped(token: &str) -> String {
    token.replace('~', "~0").replace('/', "~1")
}

#[cfg(test)]
mod tests {
    use schemars::JsonSchema;
    use serde_json::json;

    use super::*;

    /// How.
    #[derive(JsonSchema)]
    #[serde(rename_all = "snake_case")]
    #[expect(dead_code, reason = "only its schema is used")]
    enum Mode {
        Fast,
        Careful,
    }

    #[derive(JsonSchema)]
    #[serde(rename_all = "snake_case", deny_unknown_fields)]
    #[expect(dead_code, reason = "only its schema is used")]
    enum Format {
        /// Text.
        Csv { separator: String },
        /// Objects.
        Json { depth: u8 },
        /// Bytes.
        Raw,
    }

    #[derive(JsonSchema)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only its schema is used")]
    struct Config {
        /// Where to.
        url: String,
        rows: u32,
        mode: Option<Mode>,
        format: Option<Format>,
        linger: Option<afferent_engine::config::Interval>,
        password: Option<String>,
        topics: Option<Vec<String>>,
    }

    fn judge(value: Value) -> Vec<(&'static str, String, String)> {
        let schema = schemars::schema_for!(Config).to_value();
        let mut faults: Vec<_> = faults(&schema, &value, "c")
            .into_iter()
            .map(|f| (f.code, f.pointer, format!("{} / {}", f.message, f.help.unwrap_or_default())))
            .collect();
        faults.sort();
        faults
    }

    #[test]
    fn what_fits_has_no_faults() {
        let fits =
            json!({"url": "u", "rows": 1, "mode": "fast", "format": {"csv": {"separator": ","}}, "linger": "5s", "topics": []});
        assert_eq!(judge(fits), []);
        assert_eq!(judge(json!({"url": "u", "rows": 1, "format": "raw", "mode": null})), []);
    }

    #[test]
    fn all_faults_of_a_value_are_found_at_once() {
        let found = judge(json!({"uri": "u", "rows": "ten", "mode": "fats", "linger": "soon"}));
        let codes: Vec<_> = found.iter().map(|(code, pointer, _)| (*code, pointer.as_str())).collect();
        assert_eq!(
            codes,
            [
                ("invalid-value", "/linger"),
                ("invalid-value", "/mode"),
                ("missing-key", ""),
                ("unknown-key", "/uri"),
                ("wrong-type", "/rows")
            ]
        );
        assert!(found[0].2.contains("`soon`"), "{found:?}");
        assert!(found[1].2.contains("did you mean `fast`?"), "{found:?}");
        assert!(found[2].2.contains("`c` needs the key `url`") && found[2].2.contains("Where to"), "{found:?}");
        assert!(found[3].2.contains("did you mean `url`?"), "{found:?}");
        assert!(found[4].2.contains("`rows` must be a whole number, not `ten`"), "{found:?}");
    }

    #[test]
    fn a_map_that_is_none_is_told_with_its_keys() {
        let told = |value: Value| {
            let schema = schemars::schema_for!(Config).to_value();
            faults(&schema, &value, "c").remove(0).help.unwrap_or_default()
        };
        assert!(told(json!(3)).starts_with("write `{ url: ... }`; known keys are `"), "{}", told(json!(3)));
        assert_eq!(told(Value::Null), told(json!(3)));
        let found = faults(&json!({"type": "object"}), &Value::Null, "c");
        assert_eq!(found[0].help.as_deref(), Some("write `{}` for a map without keys"));
        let found = faults(&json!({"type": "object"}), &json!([1]), "c");
        assert_eq!(found[0].help.as_deref(), Some("write `{ NAME: ... }`"));
    }

    #[test]
    fn a_long_list_of_words_is_told_as_help() {
        let schema = json!({"oneOf": [{"type": "string", "enum": ["a1", "b2", "c3", "d4", "e5"]}, {"type": "object"}]});
        let found = faults(&schema, &json!(5), "c");
        assert_eq!(found[0].message, "`c` must be a map or a known word, not the number 5");
        assert!(found[0].help.as_deref().unwrap_or_default().ends_with("`d4`, `e5`"), "{found:?}");
    }

    #[test]
    fn the_nearest_of_several_shapes_is_judged() {
        let of = |format: Value| judge(json!({"url": "u", "rows": 1, "format": format}));
        assert_eq!(of(json!({"csv": {"separator": 1}}))[0].1, "/format/csv/separator");
        assert_eq!(of(json!({"csv": {"separator": ",", "x": 1}}))[0].1, "/format/csv/x");
        let unknown = of(json!({"cvs": {"separator": ","}}));
        assert_eq!((unknown[0].0, unknown[0].1.as_str()), ("unknown-key", "/format/cvs"));
        assert!(unknown[0].2.contains("did you mean `csv`?"), "{unknown:?}");
        assert_eq!(of(json!(7))[0].0, "wrong-type");
    }

    #[test]
    fn wrong_types_suggest_and_secrets_are_not_shown() {
        let found = judge(json!({"url": 5, "rows": "7", "password": 99, "topics": "a"}));
        let text = format!("{found:?}");
        assert!(
            text.contains("put it in quotes") && text.contains("leave out the quotes") && text.contains("write `[a]`"),
            "{text}"
        );
        assert!(!text.contains("99"), "{text}");
        assert!(judge(json!({"url": "u", "rows": -1}))[0].2.contains("at least 0"));
        assert!(judge(json!({"url": "u", "rows": 1, "topics": ["a", 2]}))[0].2.contains("`topics[1]`"));
        assert_eq!(judge(Value::Null)[0].0, "wrong-type");
    }
}
