//! Declares a schema from samples, for `afferent infer-schema`: the author then reads and edits it. Never used while a
//! pipeline runs. The types are the widest that the samples call for, and every column may be null; a field
//! whose samples contradict each other becomes `utf8`.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::de::{self, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::column::{is_date, is_timestamp};
use crate::csv::CsvOptions;
use crate::error::FormatError;
use crate::files::{FileFormat, FileReader, ReadOptions};
use crate::record::{Flaw, Record};
use crate::schema::{Declaration, FieldType, Kind, Scalar};

/// How much of a file is looked at.
const SAMPLE_BYTES: u64 = 4 << 20;

/// The schema of JSON messages, each an object or an array of objects; what is neither is passed over. Fields come
/// in the order in which they first appear.
///
/// # Errors
/// [`FormatError::Infer`] if no sample has a field.
pub fn infer_json<'a>(samples: impl IntoIterator<Item = &'a [u8]>) -> Result<Declaration, FormatError> {
    let mut all = Guess::Nothing;
    let (mut seen, mut last_error) = (0_usize, None);
    for sample in samples {
        seen += 1;
        match serde_json::from_slice::<Guess>(sample) {
            Ok(fields @ Guess::Fields(_)) => all = all.merge(fields),
            Ok(Guess::List(items)) if matches!(*items, Guess::Fields(_)) => all = all.merge(*items),
            Ok(_) => last_error = Some("neither an object nor an array of objects".to_owned()),
            Err(error) => last_error = Some(format!("not JSON: {error}")),
        }
    }
    match all {
        Guess::Fields(fields) if !fields.is_empty() => Ok(declare(fields)),
        _ => Err(FormatError::Infer(match last_error {
            None if seen == 0 => "the sample is empty".to_owned(),
            None => format!("no field in any of the {seen} samples"),
            Some(error) => format!("no field in any of the {seen} samples; the last of them: {error}"),
        })),
    }
}

/// The schema of CSV text. Without a header the columns are called `column_1`, `column_2` and so on.
///
/// # Errors
/// [`FormatError::Infer`] if there is no record, [`FormatError::Csv`] for a delimiter that is none.
pub fn infer_csv(sample: &[u8], options: CsvOptions) -> Result<Declaration, FormatError> {
    let delimiter = options.delimiter()?;
    let text = match std::str::from_utf8(sample) {
        Ok(text) => text,
        // A sample may end within a character.
        Err(error) if error.error_len().is_none() => std::str::from_utf8(&sample[..error.valid_up_to()]).unwrap_or_default(),
        Err(error) => {
            let place = error.valid_up_to();
            return Err(FormatError::Infer(format!("invalid UTF-8 at byte {place}")));
        }
    };
    let mut rest = text.trim_start_matches('\u{feff}');
    let mut record = Record::default();
    let mut columns: Vec<(String, Guess)> = Vec::new();
    let mut is_header = options.header;
    while !rest.is_empty() {
        rest = match record.split(rest, delimiter) {
            Ok(rest) => rest,
            Err(Flaw::Unterminated) => break,
            // Passing over the line is what reading will do.
            Err(Flaw::Malformed(_)) => {
                rest = rest.split_once('\n').map_or("", |(_, rest)| rest);
                continue;
            }
        };
        for (index, cell) in record.cells().enumerate() {
            if index == columns.len() {
                columns.push((format!("column_{}", index + 1), Guess::Nothing));
            }
            let (name, guess) = &mut columns[index];
            match cell {
                Some(cell) if is_header => cell.trim().clone_into(name),
                Some(cell) => *guess = std::mem::take(guess).merge(Guess::of_text(cell)),
                None => {}
            }
        }
        is_header = false;
    }
    if columns.is_empty() {
        return Err(FormatError::Infer("the sample has no record".to_owned()));
    }
    Ok(declare(columns))
}

/// The schema of a file: of text from its first 4 MiB, of columnar files their own.
///
/// # Errors
/// As for [`infer_json`] and [`infer_csv`]; [`FormatError::UnsupportedType`] for a column that cannot be declared.
pub fn infer_file(path: &Path, format: FileFormat) -> Result<Declaration, FormatError> {
    match format {
        FileFormat::JsonLines => {
            let sample = read_sample(path)?;
            let lines = sample.split(|byte| *byte == b'\n');
            infer_json(lines.filter(|line| !line.trim_ascii().is_empty()))
        }
        FileFormat::Csv => infer_csv(&read_sample(path)?, ReadOptions::default().csv),
        FileFormat::Parquet | FileFormat::Arrow => {
            let reader = FileReader::open(path, format, None, 1, 0)?;
            Declaration::from_arrow(reader.schema())
        }
    }
}

/// The beginning of a file, up to a line's end if there is more.
fn read_sample(path: &Path) -> Result<Vec<u8>, FormatError> {
    let mut sample = Vec::new();
    let read = File::open(path).and_then(|file| file.take(SAMPLE_BYTES).read_to_end(&mut sample));
    read.map_err(|source| FormatError::File { action: "read", path: path.to_owned(), source })?;
    if sample.len() as u64 == SAMPLE_BYTES
        && let Some(end) = sample.iter().rposition(|byte| *byte == b'\n')
    {
        sample.truncate(end + 1);
    }
    Ok(sample)
}

fn declare(columns: Vec<(String, Guess)>) -> Declaration {
    let column = |(name, guess): (String, Guess)| (name, guess.declare());
    Declaration(columns.into_iter().map(column).collect())
}

/// What the samples of a field have in common.
#[derive(Debug, Clone, PartialEq, Default)]
enum Guess {
    /// Only nulls so far.
    #[default]
    Nothing,
    Boolean,
    Integer,
    Float,
    Date,
    Timestamp,
    Text,
    List(Box<Guess>),
    Fields(Vec<(String, Guess)>),
}

impl Guess {
    fn of_text(text: &str) -> Self {
        if text.eq_ignore_ascii_case("true") || text.eq_ignore_ascii_case("false") {
            Self::Boolean
        } else if text.parse::<i64>().is_ok() {
            Self::Integer
        } else if text.parse::<f64>().is_ok() {
            Self::Float
        } else {
            Self::of_string(text)
        }
    }

    fn of_string(text: &str) -> Self {
        if is_date(text) {
            Self::Date
        } else if is_timestamp(text) {
            Self::Timestamp
        } else {
            Self::Text
        }
    }

    /// The narrowest that holds both.
    fn merge(self, other: Self) -> Self {
        use Guess::{Date, Fields, Float, Integer, List, Nothing, Text, Timestamp};
        match (self, other) {
            (Nothing, known) | (known, Nothing) => known,
            (Integer, Float) | (Float, Integer) => Float,
            (Date, Timestamp) | (Timestamp, Date) => Timestamp,
            (List(a), List(b)) => List(Box::new(a.merge(*b))),
            (Fields(mut a), Fields(b)) => {
                for (name, guess) in b {
                    match a.iter_mut().find(|(known, _)| *known == name) {
                        Some((_, known)) => *known = std::mem::take(known).merge(guess),
                        None => a.push((name, guess)),
                    }
                }
                Fields(a)
            }
            (a, b) if a == b => a,
            _ => Text,
        }
    }

    fn declare(self) -> FieldType {
        let scalar = match self {
            Self::Boolean => Scalar::Boolean,
            Self::Integer => Scalar::Int64,
            Self::Float => Scalar::Float64,
            Self::Date => Scalar::Date,
            Self::Timestamp => Scalar::TimestampUs,
            Self::List(item) => return FieldType::nullable(Kind::List(Box::new(item.declare()))),
            Self::Fields(fields) if !fields.is_empty() => {
                return FieldType::nullable(Kind::Struct(declare(fields)));
            }
            Self::Nothing | Self::Text | Self::Fields(_) => Scalar::Utf8,
        };
        FieldType::scalar(scalar)
    }
}

impl<'de> Deserialize<'de> for Guess {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Value;
        impl<'de> Visitor<'de> for Value {
            type Value = Guess;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value")
            }

            fn visit_unit<E: de::Error>(self) -> Result<Guess, E> {
                Ok(Guess::Nothing)
            }

            fn visit_bool<E: de::Error>(self, _: bool) -> Result<Guess, E> {
                Ok(Guess::Boolean)
            }

            fn visit_i64<E: de::Error>(self, _: i64) -> Result<Guess, E> {
                Ok(Guess::Integer)
            }

            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Guess, E> {
                let fits = i64::try_from(value).is_ok();
                Ok(if fits { Guess::Integer } else { Guess::Float })
            }

            fn visit_f64<E: de::Error>(self, _: f64) -> Result<Guess, E> {
                Ok(Guess::Float)
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Guess, E> {
                Ok(Guess::of_string(text))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Guess, A::Error> {
                let mut items = Guess::Nothing;
                while let Some(item) = seq.next_element::<Guess>()? {
                    items = items.merge(item);
                }
                Ok(Guess::List(Box::new(items)))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Guess, A::Error> {
                let mut fields = Guess::Fields(Vec::new());
                while let Some(field) = map.next_entry::<String, Guess>()? {
                    fields = fields.merge(Guess::Fields(vec![field]));
                }
                Ok(fields)
            }
        }
        deserializer.deserialize_any(Value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(samples: &[&str]) -> String {
        let samples = samples.iter().map(|sample| sample.as_bytes());
        match infer_json(samples) {
            Ok(declared) => declared.to_string(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn json_keeps_order_and_widens() {
        assert_eq!(
            json(&[
                r#"{"ts":"2024-02-29T01:02:03Z","z":1,"a":null,"ok":true,"tags":[],"pos":{"lat":1}}"#,
                r#"[{"z":1.5,"tags":["x"],"pos":{"lon":2.5},"new":"2024-02-29"},{"z":3,"a":"b"}]"#,
            ]),
            "{ ts: timestamp_us, z: float64, a: utf8, ok: boolean, tags: { list: utf8 }, \
             pos: { struct: { lat: int64, lon: float64 } }, new: date }"
        );
    }

    #[test]
    fn contradictions_become_text() {
        assert_eq!(json(&[r#"{"a":1}"#, r#"{"a":"x"}"#]), "{ a: utf8 }");
        assert_eq!(json(&[r#"{"a":"2024-02-29"}"#, r#"{"a":"soon"}"#]), "{ a: utf8 }");
        assert_eq!(json(&[r#"{"a":18446744073709551615}"#, r#"{"a":-1}"#]), "{ a: float64 }");
    }

    #[test]
    fn bad_samples_are_passed_over_unless_all_are() {
        assert_eq!(json(&["{", r#"{"a":1}"#, "[1]"]), "{ a: int64 }");
        let error = json(&["{}", "{\"a\":"]);
        assert!(error.contains("no field in any of the 2 samples; the last of them: not JSON: EOF"), "{error}");
        assert_eq!(json(&[]), "cannot infer a schema: the sample is empty");
    }

    #[test]
    fn csv_names_columns_by_header_or_number() {
        let text = b"t,n, f ,s,e\n2024-02-29 01:02:03,1,1,x,\n\"2024-02-29T00:00:00Z\",2,1.5,\"1\n2\",\n\"cut";
        let header = ReadOptions::default().csv;
        assert_eq!(
            infer_csv(text, header).unwrap().to_string(),
            "{ t: timestamp_us, \"n\": int64, f: float64, s: utf8, e: utf8 }"
        );
        let declared = infer_csv(b"true,1\nfalse,2,3\n", CsvOptions::default()).unwrap();
        assert_eq!(declared.to_string(), "{ column_1: boolean, column_2: int64, column_3: int64 }");
        assert!(infer_csv(b"", header).is_err());
    }

    #[test]
    fn files_are_read_by_their_format() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lines");
        std::fs::write(&path, "{\"a\":1}\n\nbad\n{\"b\":true}\n").unwrap();
        let declared = infer_file(&path, FileFormat::JsonLines).unwrap();
        assert_eq!(declared.to_string(), "{ a: int64, b: boolean }");

        let path = dir.path().join("parquet");
        let file = File::create(&path).unwrap();
        let schema = declared.to_arrow();
        let writer = crate::FileWriter::create(file, FileFormat::Parquet, schema).unwrap();
        writer.finish().unwrap();
        assert_eq!(infer_file(&path, FileFormat::Parquet).unwrap(), declared);
        assert!(infer_file(&dir.path().join("none"), FileFormat::Csv).is_err());
    }
}
