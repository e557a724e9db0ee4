//! How a [`Declaration`] is written: read from and written to YAML (or anything of serde), shown on one line, and
//! described by a JSON Schema for editors. Reading back what was written gives the same declaration.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::schema::{Declaration, FieldType, Kind, SCALARS};

/// What other systems call our types; no spelling distance leads from one to the other.
static ALIASES: [(&str, &str); 16] = [
    ("string", "utf8"),
    ("str", "utf8"),
    ("text", "utf8"),
    ("varchar", "utf8"),
    ("int", "int64"),
    ("integer", "int64"),
    ("long", "int64"),
    ("bigint", "int64"),
    ("float", "float32"),
    ("real", "float32"),
    ("double", "float64"),
    ("number", "float64"),
    ("bool", "boolean"),
    ("bytes", "binary"),
    ("datetime", "timestamp_ms"),
    ("timestamp", "timestamp_ms"),
];

static NESTED_KEYS: [&str; 4] = ["list", "fixed_size_list", "struct", "required"];

fn parse_scalar(text: &str) -> Result<FieldType, String> {
    let (name, required) = match text.strip_suffix('!') {
        Some(name) => (name, true),
        None => (text, false),
    };
    if let Some((_, scalar)) = SCALARS.iter().find(|(known, _)| *known == name) {
        return Ok(FieldType { kind: Kind::Scalar(*scalar), required });
    }
    let hint = match nearest_type(name) {
        Some(near) => format!("did you mean '{near}'? "),
        None => String::new(),
    };
    let known: Vec<&str> = SCALARS.iter().map(|(name, _)| *name).collect();
    Err(format!(
        "unknown type '{text}': {hint}known types are {}, {{ list: TYPE }}, \
         {{ fixed_size_list: {{ item: TYPE, size: N }} }} and {{ struct: {{ NAME: TYPE }} }}",
        known.join(", ")
    ))
}

fn nearest_type(name: &str) -> Option<&'static str> {
    let lower = name.to_ascii_lowercase();
    if let Some((_, ours)) = ALIASES.iter().find(|(alias, _)| *alias == lower) {
        return Some(*ours);
    }
    let distance = |known: &str| strsim::osa_distance(&lower, known);
    let near = SCALARS.iter().map(|(known, _)| *known);
    near.min_by_key(|known| distance(known)).filter(|known| distance(known) <= 2)
}

impl<'de> Deserialize<'de> for Declaration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Columns;
        impl<'de> Visitor<'de> for Columns {
            type Value = Declaration;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from column names to types, e.g. { ts: timestamp_ms, ax: float32 }")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Declaration, A::Error> {
                let mut columns: Vec<(String, FieldType)> = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name.is_empty() {
                        return Err(de::Error::custom("a column has an empty name"));
                    }
                    if columns.iter().any(|(known, _)| *known == name) {
                        return Err(de::Error::custom(format_args!("column '{name}' is declared twice")));
                    }
                    columns.push((name, map.next_value()?));
                }
                if columns.is_empty() {
                    return Err(de::Error::custom("a schema needs at least one column"));
                }
                Ok(Declaration(columns))
            }
        }
        deserializer.deserialize_map(Columns)
    }
}

impl<'de> Deserialize<'de> for FieldType {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Type;
        impl<'de> Visitor<'de> for Type {
            type Value = FieldType;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "a type: a name such as float32 or utf8, { list: TYPE }, \
                     { fixed_size_list: { item: TYPE, size: N } } or { struct: { NAME: TYPE } }",
                )
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<FieldType, E> {
                parse_scalar(text).map_err(E::custom)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<FieldType, A::Error> {
                let mut kind = None;
                let mut required = false;
                while let Some(key) = map.next_key::<String>()? {
                    let read = match key.as_str() {
                        "list" => Kind::List(Box::new(map.next_value()?)),
                        "fixed_size_list" => {
                            let FixedSize { item, size } = map.next_value()?;
                            if size == 0 {
                                return Err(de::Error::custom("a fixed_size_list needs a size of at least 1"));
                            }
                            Kind::FixedSizeList { item: Box::new(item), size }
                        }
                        "struct" => Kind::Struct(map.next_value()?),
                        "required" => {
                            required = map.next_value()?;
                            continue;
                        }
                        _ => return Err(de::Error::unknown_field(&key, &NESTED_KEYS)),
                    };
                    if kind.replace(read).is_some() {
                        return Err(de::Error::custom("a type is one of list, fixed_size_list and struct, not several"));
                    }
                }
                let Some(kind) = kind else {
                    return Err(de::Error::custom("a nested type needs one of list, fixed_size_list and struct"));
                };
                Ok(FieldType { kind, required })
            }
        }
        deserializer.deserialize_any(Type)
    }
}

/// Items of the same number in every row.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FixedSize {
    item: FieldType,
    size: u16,
}

impl Serialize for Declaration {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, of)| (name, of)))
    }
}

impl Serialize for FieldType {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Fixed<'a> {
            item: &'a FieldType,
            size: u16,
        }
        match &self.kind {
            Kind::Scalar(_) => serializer.collect_str(self),
            Kind::List(item) => nested(serializer, "list", item, self.required),
            Kind::FixedSizeList { item, size } => {
                let fixed = Fixed { item, size: *size };
                nested(serializer, "fixed_size_list", &fixed, self.required)
            }
            Kind::Struct(fields) => nested(serializer, "struct", fields, self.required),
        }
    }
}

fn nested<S: Serializer, T: Serialize>(serializer: S, key: &'static str, value: &T, required: bool) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(None)?;
    map.serialize_entry(key, value)?;
    if required {
        map.serialize_entry("required", &true)?;
    }
    map.end()
}

impl fmt::Display for Declaration {
    /// On one line, in YAML's flow style.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("{ ")?;
        for (index, (name, of)) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}{}: {of}", quoted(name))?;
        }
        f.write_str(" }")
    }
}

impl fmt::Display for FieldType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let required = if self.required { ", required: true" } else { "" };
        match &self.kind {
            Kind::Scalar(scalar) => {
                write!(f, "{}{}", scalar.name(), if self.required { "!" } else { "" })
            }
            Kind::List(item) => write!(f, "{{ list: {item}{required} }}"),
            Kind::FixedSizeList { item, size } => {
                write!(f, "{{ fixed_size_list: {{ item: {item}, size: {size} }}{required} }}")
            }
            Kind::Struct(fields) => write!(f, "{{ struct: {fields}{required} }}"),
        }
    }
}

/// A column name as YAML takes it for text: plain where that is safe, else in quotes.
fn quoted(name: &str) -> Cow<'_, str> {
    const WORDS: [&str; 9] = ["y", "n", "yes", "no", "on", "off", "true", "false", "null"];
    let plain = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        && !WORDS.iter().any(|word| word.eq_ignore_ascii_case(name));
    if plain {
        Cow::Borrowed(name)
    } else {
        // A JSON string is a YAML string.
        Cow::Owned(serde_json::Value::from(name).to_string())
    }
}

impl JsonSchema for Declaration {
    fn schema_name() -> Cow<'static, str> {
        "SchemaDeclaration".into()
    }

    fn schema_id() -> Cow<'static, str> {
        concat!(module_path!(), "::Declaration").into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let field_type = generator.subschema_for::<FieldType>();
        json_schema!({
            "description": "Column names and their types, in order.",
            "type": "object",
            "minProperties": 1,
            "propertyNames": { "minLength": 1 },
            "additionalProperties": field_type
        })
    }
}

impl JsonSchema for FieldType {
    fn schema_name() -> Cow<'static, str> {
        "FieldType".into()
    }

    fn schema_id() -> Cow<'static, str> {
        concat!(module_path!(), "::FieldType").into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let item = generator.subschema_for::<FieldType>();
        let fields = generator.subschema_for::<Declaration>();
        let nullable = SCALARS.iter().map(|(name, _)| (*name).to_owned());
        let required = SCALARS.iter().map(|(name, _)| format!("{name}!"));
        let names: Vec<String> = nullable.chain(required).collect();
        json_schema!({
            "description": "A type. Null is allowed unless the name ends in '!', or 'required: true' stands \
                            beside a nested type.",
            "oneOf": [
                { "type": "string", "enum": names },
                {
                    "type": "object",
                    "properties": { "list": item, "required": { "type": "boolean" } },
                    "required": ["list"],
                    "additionalProperties": false
                },
                {
                    "type": "object",
                    "properties": {
                        "fixed_size_list": {
                            "type": "object",
                            "properties": {
                                "item": item,
                                "size": { "type": "integer", "minimum": 1, "maximum": 65535 }
                            },
                            "required": ["item", "size"],
                            "additionalProperties": false
                        },
                        "required": { "type": "boolean" }
                    },
                    "required": ["fixed_size_list"],
                    "additionalProperties": false
                },
                {
                    "type": "object",
                    "properties": { "struct": fields, "required": { "type": "boolean" } },
                    "required": ["struct"],
                    "additionalProperties": false
                }
            ]
        })
    }
}
