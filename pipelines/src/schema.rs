//! One JSON Schema (draft 2020-12) for whole pipeline files, put together from the envelope and every
//! component's own. Editors read it, and a test holds it against the lint: what is unknown or of the wrong
//! type is refused by both.

use afferent_engine::registry::Registry;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use crate::references::allow_references;
use crate::spec::{Envelope, StageKind};

/// The schema of the top level: the envelope, and sections about which it only says that they are maps.
pub(crate) fn envelope() -> Value {
    let mut schema = SchemaSettings::draft2020_12().into_generator().into_root_schema_for::<Envelope>().to_value();
    for kind in StageKind::ALL {
        let mut section =
            json!({ "type": "object", "description": format!("The {}: from stage name to stage.", kind.section()) });
        if kind != StageKind::Operator {
            section["minProperties"] = json!(1);
            if let Some(required) = schema["required"].as_array_mut() {
                required.push(json!(kind.section()));
            }
        }
        schema["properties"][kind.section()] = section;
    }
    schema
}

/// The JSON Schema of pipeline files with the components of `registry`, keys in order.
pub fn pipeline_schema(registry: &Registry) -> Value {
    let mut definitions = Map::new();
    let mut schema = envelope();
    hoist(&mut schema, "pipeline", &mut definitions);
    for kind in StageKind::ALL {
        let stage = stage(kind, registry, &mut definitions);
        definitions.insert(kind.word().to_owned(), stage);
        let section = &mut schema["properties"][kind.section()];
        section["additionalProperties"] = json!({ "$ref": format!("#/$defs/{}", kind.word()) });
        section["propertyNames"] = json!({ "pattern": "^[A-Za-z_][A-Za-z0-9_-]*$" });
    }
    schema["title"] = json!("Afferent pipeline");
    schema["$defs"] = Value::Object(definitions);
    allow_references(&mut schema);
    canonical(&schema)
}

/// One stage: the reserved keys, and exactly one of the components.
fn stage(kind: StageKind, registry: &Registry, definitions: &mut Map<String, Value>) -> Value {
    let mut stage = kind.reserved();
    hoist(&mut stage, kind.word(), definitions);
    let components = kind.components(registry);
    let mut properties = stage["properties"].as_object().cloned().unwrap_or_default();
    for component in &components {
        let name = format!("{}.{}", kind.word(), component.name);
        let mut schema = component.schema.as_value().clone();
        hoist(&mut schema, &name, definitions);
        definitions.insert(name.clone(), schema);
        properties.insert(component.name.to_owned(), json!({ "$ref": format!("#/$defs/{name}") }));
    }
    let choices: Vec<Value> = components.iter().map(|component| json!({ "required": [component.name] })).collect();
    let mut schema = json!({
        "type": "object",
        "description": format!("{}: one component, and the engine's own keys beside it.", capitalised(kind.with_article())),
        "properties": properties,
        "additionalProperties": false,
    });
    if !choices.is_empty() {
        schema["oneOf"] = Value::Array(choices);
    }
    schema
}

/// For the beginning of a sentence.
fn capitalised(words: &str) -> String {
    let mut letters = words.chars();
    letters.next().map_or_else(String::new, |first| format!("{}{}", first.to_uppercase(), letters.as_str()))
}

/// Moves the definitions of a root schema to the common ones under `owner`, and its references with them.
fn hoist(schema: &mut Value, owner: &str, definitions: &mut Map<String, Value>) {
    refer(schema, owner);
    let Some(object) = schema.as_object_mut() else { return };
    object.remove("$schema");
    if let Some(Value::Object(own)) = object.remove("$defs") {
        definitions.extend(own.into_iter().map(|(name, definition)| (format!("{owner}.{name}"), definition)));
    }
    if owner == "pipeline" {
        object.insert("$schema".to_owned(), json!("https://json-schema.org/draft/2020-12/schema"));
    }
}

fn refer(schema: &mut Value, owner: &str) {
    match schema {
        Value::Object(object) => {
            for (key, value) in object.iter_mut() {
                match value {
                    Value::String(target) if key == "$ref" => {
                        if target.as_str() == "#" {
                            *target = format!("#/$defs/{owner}");
                        } else if let Some(name) = target.strip_prefix("#/$defs/") {
                            *target = format!("#/$defs/{owner}.{name}");
                        }
                    }
                    value => refer(value, owner),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| refer(item, owner)),
        _ => {}
    }
}

/// The same value with the keys of every map in order, whatever order the JSON library keeps.
pub fn canonical(value: &Value) -> Value {
    match value {
        Value::Object(object) => {
            let mut entries: Vec<(&String, &Value)> = object.iter().collect();
            entries.sort_by_key(|(key, _)| *key);
            Value::Object(entries.into_iter().map(|(key, value)| (key.clone(), canonical(value))).collect())
        }
        Value::Array(items) => items.iter().map(canonical).collect(),
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fakes::registry;

    fn accepts(pipeline: &Value) -> bool {
        jsonschema::validator_for(&pipeline_schema(&registry())).unwrap().is_valid(pipeline)
    }

    #[test]
    fn a_pipeline_is_accepted_and_what_is_unknown_in_it_is_not() {
        let good = json!({
            "name": "p", "delivery": "at_least_once", "commit_interval": "50ms",
            "sources": { "a": { "memory": { "columns": ["id"] } } },
            "operators": { "b": { "pass": { "limit": 3, "linger": "5ms" }, "inputs": ["a"], "queue": { "rows": 5 }, "overflow": "drop_oldest" } },
            "sinks": { "c": { "memory": {} } },
        });
        assert!(accepts(&good));
        for (pointer, value) in [
            ("/name", json!("No Spaces")),
            ("/delivery", json!("twice")),
            ("/commit_interval", json!("soon")),
            ("/sources", json!({})),
            ("/sources/a", json!({})),
            ("/sources/a", json!({ "nothing": {} })),
            ("/sources/a", json!({ "memory": { "columns": ["id"] }, "inputs": ["b"] })),
            ("/operators/b/pass/limit", json!("three")),
            ("/operators/b", json!({ "pass": {}, "split": {} })),
            ("/operators/b/queue/rows", json!(0)),
            ("/sinks/c/memory", json!({ "unknown": 1 })),
        ] {
            let mut bad = good.clone();
            *bad.pointer_mut(pointer).unwrap() = value.clone();
            assert!(!accepts(&bad), "{pointer} = {value}");
        }
    }

    #[test]
    fn the_schema_is_the_same_each_time_and_all_its_references_lead_somewhere() {
        let schema = pipeline_schema(&registry());
        let of = |kind: &str| schema["$defs"][kind]["description"].as_str().unwrap_or_default().to_owned();
        assert!(of("source").starts_with("A source: ") && of("operator").starts_with("An operator: "), "{}", of("operator"));
        assert_eq!(schema.to_string(), pipeline_schema(&registry()).to_string());
        fn check(node: &Value, root: &Value) {
            if let Some(target) = node.get("$ref").and_then(Value::as_str) {
                assert!(root.pointer(target.trim_start_matches('#')).is_some(), "{target}");
            }
            match node {
                Value::Object(map) => map.values().for_each(|value| check(value, root)),
                Value::Array(items) => items.iter().for_each(|value| check(value, root)),
                _ => {}
            }
        }
        check(&schema, &schema);
    }
}
