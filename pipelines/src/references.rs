//! `${VARIABLE}` in the JSON Schema: a reference may stand for any single value, so what is not free text
//! anyway must accept it too, or editors would mark sound files as wrong.

use serde_json::{Map, Value, json};

/// Words that describe and do not constrain: they stay outside when a schema gets its alternative.
const DESCRIBING: [&str; 3] = ["title", "description", "default"];

/// Makes every schema of a single value that is not free text accept a reference.
pub(crate) fn allow_references(schema: &mut Value) {
    let Some(object) = schema.as_object_mut() else { return };
    for key in ["properties", "$defs"] {
        if let Some(Value::Object(named)) = object.get_mut(key) {
            named.values_mut().for_each(allow_references);
        }
    }
    for key in ["items", "additionalProperties"] {
        if let Some(inner) = object.get_mut(key) {
            allow_references(inner);
        }
    }
    if let Some(Value::Array(items)) = object.get_mut("prefixItems") {
        items.iter_mut().for_each(allow_references);
    }
    for key in ["oneOf", "anyOf"] {
        if let Some(Value::Array(choices)) = object.get_mut(key) {
            // Not into the single values among the choices: a reference would fit several of a `oneOf`.
            choices.iter_mut().filter(|choice| !is_single(choice)).for_each(allow_references);
        }
    }
    if is_single(schema) {
        let Some(object) = schema.as_object_mut() else { return };
        let (outside, inside): (Map<_, _>, Map<_, _>) =
            std::mem::take(object).into_iter().partition(|(key, _)| DESCRIBING.contains(&key.as_str()));
        *object = outside;
        object.insert("anyOf".to_owned(), json!([inside, { "type": "string", "pattern": "\\$\\{.+\\}" }]));
    }
}

/// A number, a truth value, or a text that is not free.
fn is_single(schema: &Value) -> bool {
    let Some(object) = schema.as_object() else { return false };
    let named = |word: &str| match object.get("type") {
        Some(Value::String(name)) => name == word,
        Some(Value::Array(names)) => names.iter().any(|name| name == word),
        _ => false,
    };
    let narrowed = ["pattern", "enum", "const", "format"].iter().any(|key| object.contains_key(*key));
    if ["integer", "number", "boolean"].iter().any(|word| named(word)) || (named("string") && narrowed) {
        return true;
    }
    if !object.contains_key("type") && (object.contains_key("const") || object.contains_key("enum")) {
        return true;
    }
    ["oneOf", "anyOf"].iter().filter_map(|key| object.get(*key)?.as_array()).flatten().any(is_single)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_stands_for_a_number_and_not_for_a_map() {
        let mut schema = json!({
            "type": "object", "additionalProperties": false,
            "properties": { "rows": { "type": "integer", "description": "How many." }, "by": { "type": "array", "items": { "type": "string" } } }
        });
        allow_references(&mut schema);
        let accepts = |value: Value| jsonschema::validator_for(&schema).unwrap().is_valid(&value);
        assert!(accepts(json!({ "rows": 3 })) && accepts(json!({ "rows": "${ROWS}" })));
        assert!(!accepts(json!({ "rows": "many" })) && !accepts(json!({ "by": "${BY}" })));
        assert_eq!(schema["properties"]["rows"]["description"], "How many.");
    }
}
