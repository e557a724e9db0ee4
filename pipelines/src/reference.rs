//! The reference page, written from the same schemas that check a file: the envelope, the keys beside a
//! component, and every component with its options. The same registry gives the same text.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write};

use afferent_engine::registry::Registry;
use serde_json::Value;

use crate::schema;
use crate::spec::StageKind;

/// How far options within options are listed.
const MAX_DEPTH: usize = 4;

/// The reference of pipeline files as Markdown, a newline at the end.
pub fn reference(registry: &Registry) -> String {
    let mut page = String::new();
    // Writing to a string cannot fail.
    let _infallible = write_page(registry, &mut page);
    page
}

fn write_page(registry: &Registry, page: &mut String) -> fmt::Result {
    writeln!(page, "# Reference of pipeline files\n")?;
    writeln!(page, "Generated from the configuration structs: change those, not this page.\n")?;
    writeln!(
        page,
        "A pipeline file is one YAML map. A stage is a name with one component; the engine's own keys stand beside it."
    )?;
    writeln!(page, "`${{VARIABLE}}`, `${{VARIABLE:-default}}` and `${{file:/path}}` may stand in any text.\n")?;
    writeln!(page, "## The file\n")?;
    write_options(&schema::envelope(), page)?;
    for kind in StageKind::ALL {
        let reserved = kind.reserved();
        if reserved["properties"].as_object().is_some_and(|properties| !properties.is_empty()) {
            writeln!(page, "## Keys of every {}\n", kind.word())?;
            write_options(&reserved, page)?;
        }
    }
    for kind in StageKind::ALL {
        let title = kind.section();
        writeln!(page, "## {}{}\n", title[..1].to_uppercase(), &title[1..])?;
        for component in kind.components(registry) {
            writeln!(page, "### `{}` ({})\n", component.name, kind.word())?;
            if let Some(text) = component.schema.get("description").and_then(Value::as_str) {
                writeln!(page, "{text}\n")?;
            }
            writeln!(page, "```yaml\n{}\n```\n", component.example.trim_end())?;
            write_options(component.schema.as_value(), page)?;
        }
    }
    write_shared_types(registry, page)?;
    while page.ends_with("\n\n") {
        page.pop();
    }
    Ok(())
}

/// The types that contain themselves: told once, by name, since they could be unfolded without end.
fn write_shared_types(registry: &Registry, page: &mut String) -> fmt::Result {
    let mut shared: BTreeMap<String, (Value, Value)> = BTreeMap::new();
    for kind in StageKind::ALL {
        for component in kind.components(registry) {
            let root = component.schema.as_value();
            for (name, definition) in root.get("$defs").and_then(Value::as_object).into_iter().flatten() {
                if contains_itself(name, root) {
                    shared.entry(name.clone()).or_insert_with(|| (definition.clone(), root.clone()));
                }
            }
        }
    }
    if !shared.is_empty() {
        writeln!(page, "## Shared types\n")?;
    }
    for (name, (definition, root)) in &shared {
        writeln!(page, "### {name}\n")?;
        if let Some(text) = definition.get("description").and_then(Value::as_str) {
            writeln!(page, "{text}\n")?;
        }
        writeln!(page, "Its value: {}.\n", told(definition, root))?;
        let mut rows = Vec::new();
        for choice in choices(definition) {
            options(choice, root, "", 0, &mut rows);
        }
        if !rows.is_empty() {
            write_rows(rows, page)?;
        }
    }
    Ok(())
}

/// Whether the definition of that name leads to itself.
fn contains_itself(name: &str, root: &Value) -> bool {
    fn names(schema: &Value, found: &mut BTreeSet<String>) {
        match schema {
            Value::Object(object) => {
                found.extend(object.get("$ref").and_then(Value::as_str).and_then(definition_name).map(str::to_owned));
                object.values().for_each(|inner| names(inner, found));
            }
            Value::Array(items) => items.iter().for_each(|inner| names(inner, found)),
            _ => {}
        }
    }
    let (mut seen, mut open) = (BTreeSet::new(), vec![name.to_owned()]);
    while let Some(next) = open.pop() {
        let mut found = BTreeSet::new();
        names(&root["$defs"][&next], &mut found);
        if found.contains(name) {
            return true;
        }
        open.extend(found.into_iter().filter(|found| seen.insert(found.clone())));
    }
    false
}

fn definition_name(target: &str) -> Option<&str> {
    target.strip_prefix("#/$defs/")
}

fn write_options(root: &Value, page: &mut String) -> fmt::Result {
    let mut rows = Vec::new();
    nested(root, root, "", 0, &mut rows);
    if rows.is_empty() {
        return match type_of(root, root) {
            kind if kind == "map" => writeln!(page, "No options.\n"),
            kind => writeln!(page, "Its value: {kind}.\n"),
        };
    }
    write_rows(rows, page)
}

fn write_rows(rows: Vec<Row>, page: &mut String) -> fmt::Result {
    writeln!(page, "| option | type | default | meaning |\n|---|---|---|---|")?;
    for Row { name, kind, default, meaning } in rows {
        writeln!(page, "| `{name}` | {kind} | {default} | {meaning} |")?;
    }
    writeln!(page)
}

struct Row {
    name: String,
    kind: String,
    default: String,
    meaning: String,
}

/// The options of an object, required ones first, each followed by the options within it.
fn options(object: &Value, root: &Value, prefix: &str, depth: usize, rows: &mut Vec<Row>) {
    let Some(properties) = object.get("properties").and_then(Value::as_object) else { return };
    let required =
        |name: &str| object.get("required").and_then(Value::as_array).is_some_and(|names| names.iter().any(|n| n == name));
    let mut names: Vec<&String> = properties.keys().collect();
    names.sort_by_key(|name| (!required(name), *name));
    for name in names {
        let property = &properties[name];
        let path = format!("{prefix}{name}");
        let default = match property.get("default") {
            _ if required(name) => "required".to_owned(),
            None | Some(Value::Null) => String::new(),
            Some(Value::String(text)) if text.is_empty() => String::new(),
            Some(Value::String(text)) => format!("`{text}`"),
            Some(value) => format!("`{}`", schema::canonical(value)),
        };
        let meaning = property.get("description").or_else(|| resolve(property, root).get("description"));
        let meaning = cell(meaning.and_then(Value::as_str).unwrap_or_default());
        rows.push(Row { name: path.clone(), kind: type_of(property, root), default, meaning });
        if depth < MAX_DEPTH {
            nested(property, root, &path, depth + 1, rows);
        }
    }
}

/// The options within a value, whatever it is: of a map, of a list's items, of each shape it may have.
fn nested(schema: &Value, root: &Value, path: &str, depth: usize, rows: &mut Vec<Row>) {
    if shared_name(schema, root).is_some() {
        return;
    }
    let schema = resolve(schema, root);
    let prefix = if path.is_empty() { String::new() } else { format!("{path}.") };
    options(schema, root, &prefix, depth, rows);
    if let Some(items) = schema.get("items") {
        nested(items, root, &format!("{path}[]"), depth, rows);
    }
    if let Some(values) = schema.get("additionalProperties").filter(|values| values.is_object()) {
        nested(values, root, &format!("{prefix}<name>"), depth, rows);
    }
    for choice in choices(schema) {
        nested(choice, root, path, depth, rows);
    }
}

/// Follows a reference to the definition it names.
fn resolve<'v>(schema: &'v Value, root: &'v Value) -> &'v Value {
    let target = schema.get("$ref").and_then(Value::as_str).and_then(|target| target.strip_prefix('#'));
    target.and_then(|pointer| root.pointer(pointer)).unwrap_or(schema)
}

fn choices(schema: &Value) -> impl Iterator<Item = &Value> {
    ["oneOf", "anyOf"].into_iter().filter_map(move |key| schema.get(key)).filter_map(Value::as_array).flatten()
}

/// The type of a value in words; what may be null is told without it.
fn type_of(schema: &Value, root: &Value) -> String {
    if let Some(name @ ("Interval" | "ByteSize" | "Secret")) =
        schema.get("$ref").and_then(Value::as_str).and_then(|target| target.rsplit('/').next())
    {
        return match name {
            "Interval" => "length of time",
            "ByteSize" => "size",
            _ => "secret",
        }
        .to_owned();
    }
    if let Some(name) = shared_name(schema, root) {
        return format!("[{name}](#{})", name.to_lowercase());
    }
    told(resolve(schema, root), root)
}

/// The name of the type that this refers to, if it is told in a section of its own.
fn shared_name<'v>(schema: &'v Value, root: &Value) -> Option<&'v str> {
    let name = schema.get("$ref").and_then(Value::as_str).and_then(definition_name)?;
    contains_itself(name, root).then_some(name)
}

/// The type of a value that is no reference, in words.
fn told(schema: &Value, root: &Value) -> String {
    let mut kinds: Vec<String> = choices(schema).map(|choice| type_of(choice, root)).filter(|kind| kind != "nothing").collect();
    if let Some(word) = schema.get("const") {
        kinds.push(format!("`{}`", word.as_str().map_or_else(|| word.to_string(), str::to_owned)));
    } else if let Some(words) = schema.get("enum").and_then(Value::as_array) {
        kinds.extend(words.iter().filter_map(Value::as_str).map(|word| format!("`{word}`")));
    } else if kinds.is_empty() {
        let types: Vec<&str> = match schema.get("type") {
            Some(Value::String(one)) => vec![one.as_str()],
            Some(Value::Array(several)) => several.iter().filter_map(Value::as_str).filter(|kind| *kind != "null").collect(),
            _ => Vec::new(),
        };
        kinds.extend(types.iter().map(|kind| simple(kind, schema, root)));
    }
    kinds.dedup();
    if kinds.is_empty() { "anything".to_owned() } else { kinds.join(" or ") }
}

fn simple(kind: &str, schema: &Value, root: &Value) -> String {
    match kind {
        "integer" => "whole number".to_owned(),
        "number" => "number".to_owned(),
        "boolean" => "`true` or `false`".to_owned(),
        "null" => "nothing".to_owned(),
        "array" => format!("list of {}", schema.get("items").map_or("anything".to_owned(), |items| type_of(items, root))),
        "object" => match schema.get("additionalProperties").filter(|values| values.is_object()) {
            Some(values) => format!("map of {}", type_of(values, root)),
            None => "map".to_owned(),
        },
        _ => "text".to_owned(),
    }
}

/// A description as the cell of a table.
fn cell(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fakes::registry;

    #[test]
    fn the_page_lists_every_component_and_option() {
        let page = reference(&registry());
        for part in [
            "## The file\n",
            "| `name` | text | required | The pipeline's name: in metrics, logs, checkpoints and tables. |",
            "| `commit_interval` | length of time |  | The least time between two commits.",
            "| `delivery` | `at_most_once` or `at_least_once` or `exactly_once` |",
            "## Keys of every operator\n",
            "| `queue.rows` | whole number | `8192` | Rows. |",
            "| `queue.bytes` | size |",
            "| `overflow` | `block` or `drop_oldest` or `drop_newest` | `block` |",
            "### `memory` (source)\n\nRows from memory. It ends when they have all been read.\n\n```yaml\nmemory: { columns: [id, text] }\n```\n",
            "| `columns` | list of text | required | The columns, all of them text. |",
            "| `password` | secret |  |",
            "| `linger` | length of time | `5ms` | How long to wait. |",
            "### `query` (operator)\n",
            "Its value: text.\n",
            "### `split` (operator)\n",
            "No options.\n",
        ] {
            assert!(page.contains(part), "{part:?} is not in\n{page}");
        }
        assert!(!page.contains("## Keys of every source"));
        assert!(page.ends_with("|\n") && page == reference(&registry()));
    }
}
