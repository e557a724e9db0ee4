//! What message decoders are told and what they give: policy and limits in, rows and rejected payloads out.
//! Shared by all codecs. Every payload ends up in exactly one place: in `origin` (once a row) or in `rejected`;
//! only one that validly holds no rows (`[]`, a CSV header alone) is in neither.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use arrow::array::{BinaryArray, RecordBatch};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

/// What happens to a record that lacks a declared field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Missing {
    /// The column is null in that row. A required column still rejects.
    #[default]
    Null,
    /// The record is rejected. An explicit null is not missing.
    Reject,
}

impl<'de> Deserialize<'de> for Missing {
    /// By hand because an unquoted `null` is a null in YAML, and no text.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Word;
        impl Visitor<'_> for Word {
            type Value = Missing;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("null or reject")
            }

            fn visit_unit<E: de::Error>(self) -> Result<Missing, E> {
                Ok(Missing::Null)
            }

            fn visit_none<E: de::Error>(self) -> Result<Missing, E> {
                Ok(Missing::Null)
            }

            fn visit_str<E: de::Error>(self, word: &str) -> Result<Missing, E> {
                match word {
                    "null" => Ok(Missing::Null),
                    "reject" => Ok(Missing::Reject),
                    _ => Err(E::unknown_variant(word, &["null", "reject"])),
                }
            }
        }
        deserializer.deserialize_any(Word)
    }
}

impl JsonSchema for Missing {
    fn schema_name() -> Cow<'static, str> {
        "Missing".into()
    }

    fn schema_id() -> Cow<'static, str> {
        concat!(module_path!(), "::Missing").into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "What happens to a record that lacks a declared field: the column is null in that row \
                            (a required column still rejects), or the record is rejected.",
            "enum": ["null", "reject", null]
        })
    }
}

/// What happens to a record with a field that the schema does not declare.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Unknown {
    /// The field is left out.
    #[default]
    Ignore,
    /// The record is rejected.
    Reject,
}

/// What happens to bytes that are not of the format, and to values that are not of the declared type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Malformed {
    /// The payload leaves through the rejected output, with the reason.
    #[default]
    Reject,
}

/// How strictly records are held to the declared schema.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// A declared field is absent: `null` (default) or `reject`.
    pub missing: Missing,
    /// A field is present that is not declared: `ignore` (default) or `reject`.
    pub unknown: Unknown,
    /// The payload cannot be read, or a value has the wrong type: `reject`.
    pub malformed: Malformed,
}

/// How much one payload may ask of the decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of one payload; longer ones are rejected unread.
    pub max_payload: usize,
    /// Levels of nested objects and arrays in JSON; 127 is the most that has an effect.
    pub depth: usize,
}

impl Default for Limits {
    /// 16 MiB and 64 levels.
    fn default() -> Self {
        Self { max_payload: 16 << 20, depth: 64 }
    }
}

/// Rows made from payloads.
#[derive(Debug, Clone)]
pub struct Decoded {
    /// The rows of all good payloads, in the order of the payloads.
    pub batch: RecordBatch,
    /// For each row of `batch` the index of the payload that it came from.
    pub origin: Vec<u32>,
    /// The payloads that gave no rows because something is wrong with them, in order.
    pub rejected: Vec<Rejected>,
}

/// A payload that could not be taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejected {
    /// Index of the payload in the array that was decoded.
    pub payload: u32,
    /// What kind of thing is wrong with it.
    pub fault: Fault,
    /// Why, in at most a few hundred bytes.
    pub reason: String,
}

/// The kinds of things that can be wrong with a payload or a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    /// It is not of the format at all, or goes beyond a limit of the decoder.
    Malformed,
    /// A declared field is absent that may not be, or null where it is required.
    MissingField,
    /// A field is there that is not declared, and may not be.
    UnknownField,
    /// A value is of another type than declared.
    WrongType,
    /// A value is of the declared kind and does not fit into the type.
    OutOfRange,
}

impl Fault {
    /// The word for it in metrics and dead letters.
    pub fn code(self) -> &'static str {
        match self {
            Fault::Malformed => "malformed",
            Fault::MissingField => "missing_field",
            Fault::UnknownField => "unknown_field",
            Fault::WrongType => "wrong_type",
            Fault::OutOfRange => "out_of_range",
        }
    }
}

/// Why a payload or a line is not taken. Plain text becomes one of [`Fault::Malformed`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reason {
    pub(crate) fault: Fault,
    pub(crate) text: String,
}

impl Reason {
    pub(crate) fn new(fault: Fault, text: impl Into<String>) -> Self {
        Self { fault, text: text.into() }
    }

    /// The same with the name of what it is about in front.
    pub(crate) fn within(self, place: impl std::fmt::Display) -> Self {
        Self { text: format!("{place}: {}", self.text), ..self }
    }
}

impl From<String> for Reason {
    fn from(text: String) -> Self {
        Self { fault: Fault::Malformed, text }
    }
}

/// Payloads made from rows.
#[derive(Debug, Clone)]
pub struct Encoded {
    /// The payloads; none is null.
    pub payloads: BinaryArray,
    /// For each payload the rows of the batch that it holds.
    pub rows: Vec<Range<usize>>,
}

/// Cuts a reason that quotes its input to a length that can be logged and stored.
pub(crate) fn bounded(mut reason: String) -> String {
    const LONGEST: usize = 400;
    if reason.len() > LONGEST {
        // The end of a parser's message says where: keep both ends.
        let head = reason.floor_char_boundary(LONGEST - 80);
        let tail = reason.floor_char_boundary(reason.len() - 60);
        reason.replace_range(head..tail, " ... ");
    }
    reason
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_takes_a_bare_null_and_the_word() {
        for (text, expected) in [("null", Missing::Null), ("\"null\"", Missing::Null), ("\"reject\"", Missing::Reject)] {
            assert_eq!(serde_json::from_str::<Missing>(text).unwrap(), expected);
        }
        let error = serde_json::from_str::<Policy>(r#"{"missing":"drop"}"#).unwrap_err();
        assert!(error.to_string().contains("`null` or `reject`"), "{error}");
        assert!(serde_json::from_str::<Policy>(r#"{"mising":"null"}"#).is_err());
    }

    #[test]
    fn long_reasons_keep_both_ends() {
        let cut = bounded(format!("head{}tail", "é".repeat(5_000)));
        assert!(cut.len() < 500 && cut.starts_with("head") && cut.ends_with("tail"));
        assert_eq!(bounded("short".into()), "short");
    }
}
