//! What a language model says, as typed columns: one JSON object a row, held to the declared schema as strictly as a
//! message from a device. Called by `llm` for every batch. Invariant: a row has either all its columns or a reason.

use std::sync::Arc;

use afferent_engine::{Error, Result};
use afferent_formats::{Declaration, FieldType, FormatError, JsonDecoder, Kind, Limits, Missing, Policy, Scalar};
use arrow::array::{ArrayRef, BinaryArray, UInt32Array};
use arrow::compute::take;
use arrow::datatypes::SchemaRef;
use serde_json::{Map, Value, json};

/// What of a bad answer is quoted in the error column.
const QUOTED: usize = 120;

/// The declared form of answers. Cloning shares it.
#[derive(Clone)]
pub(super) struct Answer {
    schema: SchemaRef,
}

impl Answer {
    /// Answers with these columns.
    ///
    /// # Errors
    /// A type that JSON cannot be read into.
    pub(super) fn new(declared: &Declaration) -> std::result::Result<Self, FormatError> {
        let answer = Self { schema: declared.to_arrow() };
        answer.decoder()?;
        Ok(answer)
    }

    fn decoder(&self) -> std::result::Result<JsonDecoder, FormatError> {
        let policy = Policy { missing: Missing::Reject, ..Policy::default() };
        JsonDecoder::new(Arc::clone(&self.schema), policy, Limits::default())
    }

    /// The JSON Schema that a provider is given. It asks for a value in every field, and nothing else.
    pub(super) fn json_schema(&self, declared: &Declaration) -> Value {
        object_schema(declared)
    }

    /// The declared columns for these answers, null where there is none; and the reasons of those.
    ///
    /// # Errors
    /// Fatal when Arrow refuses columns of the planned schema.
    pub(super) fn columns(
        &self,
        answers: Vec<std::result::Result<String, String>>,
    ) -> Result<(Vec<ArrayRef>, Vec<Option<String>>)> {
        let mut reasons: Vec<Option<String>> = vec![None; answers.len()];
        let (mut objects, mut rows) = (Vec::new(), Vec::new());
        for (row, answer) in answers.iter().enumerate() {
            match answer.as_ref().map_err(Clone::clone).and_then(|text| object_in(text)) {
                Ok(object) => {
                    objects.push(object.as_bytes());
                    rows.push(row);
                }
                Err(reason) => reasons[row] = Some(reason),
            }
        }
        let decoded = self.decoder().and_then(|mut decoder| decoder.decode(&BinaryArray::from_iter_values(&objects)));
        let decoded = decoded.map_err(Error::fatal)?;
        let mut places: Vec<Option<u32>> = vec![None; answers.len()];
        for (place, origin) in (0_u32..).zip(&decoded.origin) {
            places[rows[*origin as usize]] = Some(place);
        }
        for rejected in decoded.rejected {
            let at = rejected.payload as usize;
            let quoted = quote(&String::from_utf8_lossy(objects[at]));
            reasons[rows[at]] = Some(format!("the answer does not fit: {}; it is {quoted}", rejected.reason));
        }
        let places = UInt32Array::from(places);
        let columns = decoded.batch.columns().iter().map(|column| take(column, &places, None).map_err(Error::fatal));
        Ok((columns.collect::<Result<_>>()?, reasons))
    }
}

/// The JSON object in a text: the text itself, or what stands between fences.
fn object_in(text: &str) -> std::result::Result<&str, String> {
    let text = text.trim();
    let inside = match text.split_once("```") {
        Some((_, fenced)) if !text.starts_with('{') => {
            // The rest of the line is the name of the language.
            let (_, fenced) = fenced.split_once('\n').unwrap_or(("", fenced));
            fenced.rsplit_once("```").map_or(fenced, |(inside, _)| inside).trim()
        }
        _ => text,
    };
    if inside.starts_with('{') { Ok(inside) } else { Err(format!("the answer is no JSON object: {}", quote(text))) }
}

/// The beginning of a text, in quotation marks.
pub(super) fn quote(text: &str) -> String {
    match text.char_indices().nth(QUOTED) {
        Some((end, _)) => format!("{:?}...", &text[..end]),
        None => format!("{text:?}"),
    }
}

fn object_schema(declared: &Declaration) -> Value {
    let properties: Map<String, Value> = declared.0.iter().map(|(name, of)| (name.clone(), value_schema(of))).collect();
    let required: Vec<&str> = declared.0.iter().map(|(name, _)| name.as_str()).collect();
    json!({ "type": "object", "properties": properties, "required": required, "additionalProperties": false })
}

fn value_schema(of: &FieldType) -> Value {
    let integer = |least: i64, most: i64| json!({ "type": "integer", "minimum": least, "maximum": most });
    match &of.kind {
        Kind::Scalar(scalar) => match scalar {
            Scalar::Boolean => json!({ "type": "boolean" }),
            Scalar::Int8 => integer(i8::MIN.into(), i8::MAX.into()),
            Scalar::Int16 => integer(i16::MIN.into(), i16::MAX.into()),
            Scalar::Int32 => integer(i32::MIN.into(), i32::MAX.into()),
            Scalar::UInt8 => integer(0, u8::MAX.into()),
            Scalar::UInt16 => integer(0, u16::MAX.into()),
            Scalar::UInt32 => integer(0, u32::MAX.into()),
            Scalar::UInt64 => json!({ "type": "integer", "minimum": 0 }),
            Scalar::Int64 => json!({ "type": "integer" }),
            Scalar::Float32 | Scalar::Float64 => json!({ "type": "number" }),
            Scalar::Utf8 => json!({ "type": "string" }),
            Scalar::Binary => json!({ "type": "string", "pattern": "^([0-9a-fA-F]{2})*$" }),
            Scalar::Date => json!({ "type": "string", "format": "date" }),
            Scalar::TimestampS | Scalar::TimestampMs | Scalar::TimestampUs | Scalar::TimestampNs => {
                json!({ "type": "string", "format": "date-time" })
            }
        },
        Kind::List(item) => json!({ "type": "array", "items": value_schema(item) }),
        Kind::FixedSizeList { item, size } => {
            json!({ "type": "array", "items": value_schema(item), "minItems": size, "maxItems": size })
        }
        Kind::Struct(fields) => object_schema(fields),
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::{Array, AsArray};
    use arrow::datatypes::Int8Type;

    use super::*;

    fn declared() -> Declaration {
        serde_json::from_str(r#"{"summary":"utf8!","urgency":"int8"}"#).unwrap()
    }

    fn columns(answers: &[&str]) -> (Vec<ArrayRef>, Vec<Option<String>>) {
        let answers = answers.iter().map(|text| Ok((*text).to_owned())).collect();
        Answer::new(&declared()).unwrap().columns(answers).unwrap()
    }

    #[test]
    fn good_answers_fill_their_rows_and_bad_ones_say_why() {
        let mut answers: Vec<std::result::Result<String, String>> = [
            r#"{"summary":"hot","urgency":7}"#,
            r#"{"summary":"hot"}"#,
            r#"{"summary":"hot","urgency":"7"}"#,
            r#"{"summary":"hot","urgency":300}"#,
            r#"{"summary":null,"urgency":1}"#,
            "I think it is hot.",
            r#"{"summary":"cold","urgency":null,"more":1}"#,
            r#"{"summary":"hot","urg"#,
        ]
        .map(|text| Ok(text.to_owned()))
        .to_vec();
        answers.push(Err("no answer within 30s".to_owned()));
        let (columns, reasons) = Answer::new(&declared()).unwrap().columns(answers).unwrap();
        let good: Vec<usize> = (0..9).filter(|row| reasons[*row].is_none()).collect();
        assert_eq!(good, [0, 6]);
        let summaries = columns[0].as_string::<i32>();
        assert_eq!((summaries.value(0), summaries.value(6), summaries.null_count()), ("hot", "cold", 7));
        let urgencies = columns[1].as_primitive::<Int8Type>();
        assert_eq!((urgencies.value(0), urgencies.is_null(6), urgencies.null_count()), (7, true, 8));
        let reason = |row: usize| reasons[row].as_deref().unwrap();
        assert!(reason(1).starts_with("the answer does not fit: ") && reason(1).contains("urgency"), "{}", reason(1));
        assert_eq!(reason(5), "the answer is no JSON object: \"I think it is hot.\"");
        assert_eq!(reason(8), "no answer within 30s");
    }

    #[test]
    fn an_object_between_fences_is_found() {
        let object = r#"{"summary":"use ``` here","urgency":1}"#;
        for text in [
            object.to_owned(),
            format!("```json\n{object}\n```"),
            format!("Here it is:\n```\n{object}\n```\nBye"),
            format!(" {object}\n"),
        ] {
            let (columns, reasons) = columns(&[&text]);
            assert_eq!(reasons, [None], "{text}");
            assert_eq!(columns[0].as_string::<i32>().value(0), "use ``` here");
        }
        let (_, reasons) = columns(&["```json\n[1]\n```"]);
        assert!(reasons[0].is_some());
        let (columns, _) = columns(&[]);
        assert_eq!(columns[0].len(), 0);
    }

    #[test]
    fn the_provider_is_told_the_declared_form() {
        let declared: Declaration =
            serde_json::from_str(r#"{"urgency":"int8","tags":{"list":"utf8"},"at":{"struct":{"x":"float64"}}}"#).unwrap();
        let schema = Answer::new(&declared).unwrap().json_schema(&declared);
        assert_eq!(schema["properties"]["urgency"], json!({ "type": "integer", "minimum": -128, "maximum": 127 }));
        assert_eq!(schema["properties"]["tags"]["items"]["type"], "string");
        assert_eq!(schema["properties"]["at"]["required"], json!(["x"]));
        assert_eq!((&schema["additionalProperties"], schema["required"].as_array().unwrap().len()), (&json!(false), 3));
    }

    #[test]
    fn a_long_answer_is_quoted_from_its_beginning() {
        assert_eq!(quote("short"), "\"short\"");
        assert_eq!(quote(&"é".repeat(500)).chars().count(), QUOTED + 5);
    }
}
