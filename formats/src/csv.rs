//! CSV messages and lines (RFC 4180): a payload is one or more records, each a row. Called through
//! [`crate::Decoder`] and [`crate::Encoder`], and by the reader and writer of CSV files. An unquoted empty cell is
//! null and `""` is empty text, both ways; nested columns are JSON within a cell.

use std::borrow::Cow;
use std::fmt::Write as _;

use arrow::array::{Array, BinaryArray, RecordBatch};
use arrow::buffer::{Buffer, OffsetBuffer, ScalarBuffer};
use arrow::datatypes::{DataType, SchemaRef};
use arrow::json::writer::{EncoderOptions, NullableEncoder, make_encoder};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::FormatError;
use crate::payload::{Decoded, Fault, Limits, Missing, Policy, Reason, Unknown};
use crate::record::{Flaw, Record};
use crate::rows::Rows;

/// How CSV is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CsvOptions {
    /// Whether the first record (of each message, or of a file) names the columns. Without one, cells belong to
    /// the declared columns in order.
    pub header: bool,
    /// The character between cells, one of ASCII.
    pub delimiter: char,
}

impl Default for CsvOptions {
    fn default() -> Self {
        Self { header: false, delimiter: ',' }
    }
}

impl CsvOptions {
    /// The delimiter as a byte.
    pub(crate) fn delimiter(self) -> Result<u8, FormatError> {
        match u8::try_from(self.delimiter) {
            Ok(byte) if byte.is_ascii() && !matches!(byte, b'"' | b'\n' | b'\r' | 0) => Ok(byte),
            _ => Err(FormatError::Csv(format!(
                "delimiter {:?} is not a single ASCII character other than a quote or a line end",
                self.delimiter
            ))),
        }
    }
}

/// Splits records and puts their cells into the declared columns.
pub(crate) struct RecordReader {
    delimiter: u8,
    record: Record,
    /// The column of each cell, as a header gave it; `None` in it is a column that is not declared.
    places: Option<Vec<Option<usize>>>,
}

impl RecordReader {
    pub(crate) fn new(options: CsvOptions) -> Result<Self, FormatError> {
        Ok(Self { delimiter: options.delimiter()?, record: Record::default(), places: None })
    }

    /// Splits the first record off `input`, without using it.
    pub(crate) fn split<'a>(&mut self, input: &'a str) -> Result<&'a str, Flaw> {
        self.record.split(input, self.delimiter)
    }

    /// Takes the record that was split off last as the header of those that follow.
    pub(crate) fn take_header(&mut self, rows: &Rows, policy: Policy) -> Result<(), Reason> {
        let mut places = Vec::new();
        for (number, name) in self.record.cells().enumerate() {
            // Spreadsheets begin a file with a byte order mark.
            let name = name.unwrap_or_default();
            let name = if number == 0 { name.trim_start_matches('\u{feff}') } else { name };
            let place = rows.position(name.trim());
            if place.is_some() && places.contains(&place) {
                return Err(format!("the header names column '{name}' twice").into());
            }
            if place.is_none() && policy.unknown == Unknown::Reject {
                let told = format!("the header names '{name}', which is not declared");
                return Err(Reason::new(Fault::UnknownField, told));
            }
            places.push(place);
        }
        for (index, field) in rows.schema().fields().iter().enumerate() {
            let needed = policy.missing == Missing::Reject || !field.is_nullable();
            if needed && !places.contains(&Some(index)) {
                let told = format!("the header lacks column '{}'", field.name());
                return Err(Reason::new(Fault::MissingField, told));
            }
        }
        self.places = Some(places);
        Ok(())
    }

    /// Appends the record that was split off last.
    pub(crate) fn push(&self, rows: &mut Rows) -> Result<(), Reason> {
        let columns = rows.schema().fields().len();
        let place = |cell: usize| match &self.places {
            Some(places) => places.get(cell).copied().flatten(),
            None => (cell < columns).then_some(cell),
        };
        let cells = self.record.cells().enumerate();
        rows.push_cells(cells.map(|(cell, text)| (place(cell), text)))
    }
}

/// Whether a blank line is skipped: for a single column it is a null.
pub(crate) fn skips_blank(schema: &SchemaRef) -> bool {
    schema.fields().len() > 1
}

/// Reads CSV messages into rows of a declared schema.
pub struct CsvDecoder {
    rows: Rows,
    reader: RecordReader,
    header: bool,
    policy: Policy,
    limits: Limits,
}

impl CsvDecoder {
    /// A decoder for `schema`.
    ///
    /// # Errors
    /// [`FormatError::UnsupportedType`] for a type that cannot be declared, [`FormatError::Csv`] for a delimiter
    /// that is none.
    pub fn new(schema: SchemaRef, options: CsvOptions, policy: Policy, limits: Limits) -> Result<Self, FormatError> {
        Ok(Self {
            rows: Rows::new(schema, policy, "csv")?,
            reader: RecordReader::new(options)?,
            header: options.header,
            policy,
            limits,
        })
    }

    /// The declared schema, which every batch has.
    pub fn schema(&self) -> &SchemaRef {
        self.rows.schema()
    }

    /// Decodes each payload for itself; one with a bad record is rejected whole.
    ///
    /// # Errors
    /// Only if Arrow refuses the finished batch.
    pub fn decode(&mut self, payloads: &BinaryArray) -> Result<Decoded, FormatError> {
        let Self { rows, reader, header, policy, limits } = self;
        rows.decode(payloads, *limits, |rows, payload| {
            let mut rest =
                std::str::from_utf8(payload).map_err(|error| format!("invalid UTF-8 at byte {}", error.valid_up_to()))?;
            if rest.trim().is_empty() {
                return Err(Reason::new(Fault::Malformed, "empty payload"));
            }
            if *header {
                rest = reader.split(rest).map_err(|flaw| flaw.reason())?;
                reader.take_header(rows, *policy)?;
            }
            let skip_blank = skips_blank(rows.schema());
            while !rest.is_empty() {
                let line_end = if rest.starts_with("\r\n") { 2 } else { 1 };
                if skip_blank && (rest.starts_with('\n') || line_end == 2) {
                    rest = &rest[line_end..];
                    continue;
                }
                rest = reader.split(rest).map_err(|flaw| flaw.reason())?;
                reader.push(rows)?;
            }
            Ok(())
        })
    }
}

/// Writes each row as one record, without a line end; with a header, each payload begins with it.
pub struct CsvEncoder {
    header: Vec<u8>,
    delimiter: u8,
    json: EncoderOptions,
}

impl CsvEncoder {
    /// An encoder for batches of `schema`.
    ///
    /// # Errors
    /// [`FormatError::Csv`] for a delimiter that is none, [`FormatError::Arrow`] for a type without a text form.
    pub fn new(schema: &SchemaRef, options: CsvOptions) -> Result<Self, FormatError> {
        let delimiter = options.delimiter()?;
        let mut header = Vec::new();
        if options.header {
            for (index, field) in schema.fields().iter().enumerate() {
                if index > 0 {
                    header.push(delimiter);
                }
                push_cell(&mut header, field.name(), delimiter);
            }
            header.push(b'\n');
        }
        let encoder =
            Self { header, delimiter, json: EncoderOptions::default().with_timestamp_format(NAIVE_TIMESTAMP.to_owned()) };
        encoder.encode(&RecordBatch::new_empty(schema.clone()))?;
        Ok(encoder)
    }

    /// The header line with its end, empty without one.
    pub(crate) fn header(&self) -> &[u8] {
        &self.header
    }

    /// One payload per row, in order.
    ///
    /// # Errors
    /// [`FormatError::TooLarge`] past 2 GiB.
    pub fn encode(&self, batch: &RecordBatch) -> Result<BinaryArray, FormatError> {
        let (bytes, ends) = self.encode_rows(batch, &self.header, b"")?;
        let offsets = OffsetBuffer::new(ScalarBuffer::from(ends));
        Ok(BinaryArray::try_new(offsets, Buffer::from_vec(bytes), None)?)
    }

    /// All rows in one run of bytes, each between `begin` and `end`; and where each ends, after a leading 0.
    pub(crate) fn encode_rows(&self, batch: &RecordBatch, begin: &[u8], end: &[u8]) -> Result<(Vec<u8>, Vec<i32>), FormatError> {
        let rows = batch.num_rows();
        let schema = batch.schema();
        let format = FormatOptions::new().with_display_error(true).with_timestamp_format(Some(NAIVE_TIMESTAMP));
        let mut columns = Vec::with_capacity(batch.num_columns());
        for (field, array) in schema.fields().iter().zip(batch.columns()) {
            columns.push(match field.data_type() {
                DataType::List(_)
                | DataType::LargeList(_)
                | DataType::FixedSizeList(..)
                | DataType::Struct(_)
                | DataType::Map(..) => Cells::Json(array, make_encoder(field, array.as_ref(), &self.json)?),
                _ => Cells::Text(array, ArrayFormatter::try_new(array.as_ref(), &format)?),
            });
        }
        let mut bytes = Vec::with_capacity(rows * 32);
        let mut ends = Vec::with_capacity(rows + 1);
        ends.push(0);
        let (mut text, mut json) = (String::new(), Vec::new());
        for row in 0..rows {
            bytes.extend_from_slice(begin);
            for (index, column) in columns.iter_mut().enumerate() {
                if index > 0 {
                    bytes.push(self.delimiter);
                }
                if let Some(cell) = column.cell(row, &mut text, &mut json) {
                    push_cell(&mut bytes, &cell, self.delimiter);
                }
            }
            bytes.extend_from_slice(end);
            let end = i32::try_from(bytes.len()).map_err(|_| FormatError::TooLarge { rows })?;
            ends.push(end);
        }
        Ok((bytes, ends))
    }
}

/// Times without a zone are taken as UTC wherever they are read, so they are written with `Z`.
const NAIVE_TIMESTAMP: &str = "%Y-%m-%dT%H:%M:%S%.fZ";

/// The cells of one column.
enum Cells<'a> {
    Text(&'a dyn Array, ArrayFormatter<'a>),
    Json(&'a dyn Array, NullableEncoder<'a>),
}

impl Cells<'_> {
    /// The text of a cell, written over one of the buffers; `None` for null.
    fn cell<'b>(&mut self, row: usize, text: &'b mut String, json: &'b mut Vec<u8>) -> Option<Cow<'b, str>> {
        match self {
            Cells::Text(array, _) | Cells::Json(array, _) if array.is_null(row) => None,
            Cells::Text(_, formatter) => {
                text.clear();
                // Writing to a string cannot fail, and unprintable values are printed as such.
                let _ = write!(text, "{}", formatter.value(row));
                Some(Cow::Borrowed(text))
            }
            Cells::Json(_, encoder) => {
                json.clear();
                encoder.encode(row, json);
                Some(String::from_utf8_lossy(json))
            }
        }
    }
}

fn push_cell(out: &mut Vec<u8>, cell: &str, delimiter: u8) {
    let special = |byte: u8| byte == delimiter || matches!(byte, b'"' | b'\n' | b'\r' | 0);
    if !cell.is_empty() && !cell.bytes().any(special) {
        out.extend_from_slice(cell.as_bytes());
        return;
    }
    out.push(b'"');
    for byte in cell.bytes() {
        if byte == b'"' {
            out.push(b'"');
        }
        out.push(byte);
    }
    out.push(b'"');
}

#[cfg(test)]
mod tests {
    use arrow::array::AsArray;
    use arrow::datatypes::{Float32Type, Int32Type};

    use super::*;
    use crate::schema::Declaration;

    fn schema(text: &str) -> SchemaRef {
        serde_json::from_str::<Declaration>(text).unwrap().to_arrow()
    }

    fn decode(text: &str, options: CsvOptions, policy: Policy, payloads: &[&str]) -> Decoded {
        let mut decoder = CsvDecoder::new(schema(text), options, policy, Limits::default()).unwrap();
        decoder.decode(&BinaryArray::from_iter_values(payloads)).unwrap()
    }

    fn codes(decoded: &Decoded) -> Vec<&str> {
        decoded.rejected.iter().map(|r| r.fault.code()).collect()
    }

    fn reasons(decoded: &Decoded) -> Vec<&str> {
        decoded.rejected.iter().map(|r| r.reason.as_str()).collect()
    }

    const WITH_HEADER: CsvOptions = CsvOptions { header: true, delimiter: ',' };

    #[test]
    fn bad_payloads_leave_their_neighbours_alone() {
        let bad = ["", "\n", "1,x", "1,1e39", "1,\"2", "1,\"2\"3", "300000000000,1", "1.5,1", "a\0,1"];
        let good: Vec<String> = (0..1_000).map(|n| format!("{n},{n}.5,row")).collect();
        let mut payloads: Vec<&str> = good.iter().map(String::as_str).collect();
        for (index, text) in bad.iter().enumerate() {
            payloads[3 + index * 101] = text;
        }
        let declared = r#"{"n":"int32","f":"float32","s":"utf8"}"#;
        let decoded = decode(declared, CsvOptions::default(), Policy::default(), &payloads);
        let rejected: Vec<usize> = decoded.rejected.iter().map(|r| r.payload as usize).collect();
        let expected: Vec<usize> = (0..bad.len()).map(|index| 3 + index * 101).collect();
        assert_eq!(rejected, expected, "{:?}", reasons(&decoded));
        let (no_csv, wrong, wide) = ("malformed", "wrong_type", "out_of_range");
        assert_eq!(codes(&decoded), [no_csv, no_csv, wrong, wide, no_csv, no_csv, wide, wrong, no_csv]);
        for (row, origin) in decoded.origin.iter().enumerate() {
            let n = decoded.batch.column(0).as_primitive::<Int32Type>().value(row);
            assert_eq!(n as u32, *origin);
        }
        let reasons = reasons(&decoded);
        assert_eq!(reasons[0], "empty payload");
        assert_eq!(reasons[2], "field 'f': expected float32, found 'x'");
        assert_eq!(reasons[3], "field 'f': 1e39 is out of range for float32");
        assert_eq!(reasons[4], "a quoted cell without an end");
        assert_eq!(reasons[6], "field 'n': 300000000000 is out of range for int32");
        assert_eq!(reasons[8], "a NUL byte");
    }

    #[test]
    fn many_records_are_taken_or_rejected_together() {
        let declared = r#"{"n":"int32","s":"utf8"}"#;
        let payloads = ["1,a\n2,b\r\n\n3,c\n", "4,a\nx,b\n5,c"];
        let decoded = decode(declared, CsvOptions::default(), Policy::default(), &payloads);
        assert_eq!(decoded.batch.column(0).as_primitive::<Int32Type>().values(), &[1, 2, 3]);
        assert_eq!(decoded.origin, [0, 0, 0]);
        assert_eq!(decoded.rejected[0].payload, 1);
    }

    #[test]
    fn a_header_places_the_cells() {
        let declared = r#"{"n":"int32","s":"utf8"}"#;
        let payloads = ["\u{feff}s,extra,n\nx,1,2\n", "s\ny", "n,n\n1,2", "n,s"];
        let decoded = decode(declared, WITH_HEADER, Policy::default(), &payloads);
        assert_eq!(decoded.origin, [0, 1]);
        assert_eq!(decoded.batch.column(0).as_primitive::<Int32Type>().value(0), 2);
        assert_eq!(decoded.batch.column(1).as_string::<i32>().value(1), "y");
        assert_eq!(reasons(&decoded), ["the header names column 'n' twice"]);

        let strict = Policy { missing: Missing::Reject, unknown: Unknown::Reject, ..Policy::default() };
        let decoded = decode(declared, WITH_HEADER, strict, &payloads[..2]);
        assert_eq!(codes(&decoded), ["unknown_field", "missing_field"]);
        let reasons = reasons(&decoded);
        assert!(reasons[0].contains("'extra', which is not declared"), "{reasons:?}");
        assert!(reasons[1].contains("lacks column 'n'"), "{reasons:?}");
    }

    #[test]
    fn short_and_long_records_follow_the_policy() {
        let declared = r#"{"n":"int32","s":"utf8"}"#;
        let payloads = ["1", "1,a,b"];
        let lenient = decode(declared, CsvOptions::default(), Policy::default(), &payloads);
        assert_eq!(lenient.origin, [0, 1]);
        let strict = Policy { missing: Missing::Reject, unknown: Unknown::Reject, ..Policy::default() };
        let held = decode(declared, CsvOptions::default(), strict, &payloads);
        assert_eq!(reasons(&held), ["missing field 's'", "cell 3 belongs to no declared column"]);
        assert_eq!(codes(&held), ["missing_field", "unknown_field"]);
        let nested = decode(r#"{"l":{"list":"int8"}}"#, CsvOptions::default(), Policy::default(), &["[300]", "[1"]);
        assert_eq!(codes(&nested), ["out_of_range", "wrong_type"]);
        let required = decode(r#"{"n":"int32!"}"#, CsvOptions::default(), Policy::default(), &["\"\""]);
        assert_eq!(reasons(&required), ["field 'n': expected int32, found ''"]);
    }

    #[test]
    fn every_type_comes_back() {
        let declared = r#"{"b":"boolean","i":"int64","u":"uint64","f":"float32","g":"float64","s":"utf8",
            "h":"binary","d":"date","t":"timestamp_us","l":{"list":"utf8"},"p":{"struct":{"x":"int32"}}}"#;
        let payloads = [
            "true,-9223372036854775808,18446744073709551615,0.1,1e-300,\"a\"\",\n\",00ff,2024-02-29,\
             2024-02-29T01:02:03.000004Z,\"[\"\"x,y\"\",null]\",\"{\"\"x\"\":1}\"",
            ",,,NaN,-inf,\"\",,,,,",
        ];
        for options in [CsvOptions::default(), WITH_HEADER] {
            let decoded = decode(declared, CsvOptions::default(), Policy::default(), &payloads);
            assert!(decoded.rejected.is_empty(), "{:?}", decoded.rejected);
            assert!(decoded.batch.column(3).as_primitive::<Float32Type>().value(1).is_nan());
            let encoder = CsvEncoder::new(&schema(declared), options).unwrap();
            let encoded = encoder.encode(&decoded.batch).unwrap();
            let texts: Vec<&str> = encoded.iter().flatten().map(|b| std::str::from_utf8(b).unwrap()).collect();
            let again = decode(declared, options, Policy::default(), &texts);
            assert!(again.rejected.is_empty(), "{:?} {texts:?}", again.rejected);
            // NaN differs from itself: compare all columns but that one.
            let others = [0, 1, 2, 4, 5, 6, 7, 8, 9, 10];
            let (a, b) = (decoded.batch.project(&others), again.batch.project(&others));
            assert_eq!(a.unwrap(), b.unwrap());
        }
    }

    #[test]
    fn a_delimiter_must_be_one() {
        for delimiter in ['"', '\n', 'é', '\0'] {
            let options = CsvOptions { header: false, delimiter };
            let encoder = CsvEncoder::new(&schema(r#"{"n":"int32"}"#), options);
            assert!(matches!(encoder.err(), Some(FormatError::Csv(_))), "{delimiter:?}");
        }
    }
}
