//! JSON messages: one object is one row, an array of objects many. Called through [`crate::Decoder`] and
//! [`crate::Encoder`], and line by line by the reader of JSON lines. A payload must be exactly one strictly valid JSON
//! value; two objects in a row or half an object never reach into a neighbour.
//!
//! Binary columns are pairs of hexadecimal digits. Timestamps are integers in the unit of the column, counted from
//! 1970-01-01 UTC, or ISO 8601 text; dates are integers in days or ISO 8601 text.

use std::fmt;

use arrow::array::BinaryArray;
use arrow::datatypes::SchemaRef;
use serde::Deserializer;
use serde::de::{DeserializeSeed, Error, IgnoredAny, MapAccess, SeqAccess, Unexpected, Visitor};

use crate::error::FormatError;
use crate::json_value::Noted;
use crate::payload::{Decoded, Fault, Limits, Policy, Reason};
use crate::rows::Rows;

/// Reads JSON messages into rows of a declared schema.
pub struct JsonDecoder {
    rows: Rows,
    limits: Limits,
}

impl JsonDecoder {
    /// A decoder for `schema`, whose types are those that a [`Declaration`](crate::Declaration) can name.
    ///
    /// # Errors
    /// [`FormatError::UnsupportedType`] for any other type.
    pub fn new(schema: SchemaRef, policy: Policy, limits: Limits) -> Result<Self, FormatError> {
        Ok(Self { rows: Rows::new(schema, policy, "json")?, limits })
    }

    /// The declared schema, which every batch has.
    pub fn schema(&self) -> &SchemaRef {
        self.rows.schema()
    }

    /// Decodes each payload for itself.
    ///
    /// # Errors
    /// Only if Arrow refuses the finished batch; bad payloads are in [`Decoded::rejected`].
    pub fn decode(&mut self, payloads: &BinaryArray) -> Result<Decoded, FormatError> {
        let depth = self.limits.depth;
        self.rows.decode(payloads, self.limits, |rows, payload| push_json(rows, payload, depth, Shape::ObjectOrArray))
    }
}

/// What a JSON text may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shape {
    /// One row.
    Object,
    /// One row, or any number.
    ObjectOrArray,
}

/// Appends the rows of one JSON text. After an error `rows` must be cut back to where it was.
pub(crate) fn push_json(rows: &mut Rows, payload: &[u8], depth: usize, shape: Shape) -> Result<(), Reason> {
    if payload.trim_ascii().is_empty() {
        return Err(Reason::new(Fault::Malformed, "empty payload"));
    }
    let text =
        std::str::from_utf8(payload).map_err(|error| format!("not JSON: invalid UTF-8 at byte {}", error.valid_up_to()))?;
    check_depth(payload, depth)?;
    let mut json = serde_json::Deserializer::from_str(text);
    let noted = Noted::default();
    let read = Records { rows, shape, noted: &noted }.deserialize(&mut json).and_then(|()| json.end());
    read.map_err(|error| reason(text, &error, &noted))
}

/// Why a text gives no row. Whether it is JSON at all is asked once more, without columns: a fault of syntax within
/// a field comes wrapped in the field's name and reads like one of the value.
fn reason(text: &str, error: &serde_json::Error, noted: &Noted) -> Reason {
    if let Err(syntax) = serde_json::from_str::<IgnoredAny>(text) {
        return format!("not JSON: {syntax}").into();
    }
    let told = error.to_string();
    // What the parser finds by itself in well-formed text is half a character in `\u` notation, or a number that is
    // beyond all floats: its kind is not to be had otherwise once it is wrapped in the name of a field.
    let beyond = || if told.contains("number out of range") { Fault::OutOfRange } else { Fault::Malformed };
    Reason::new(noted.fault().unwrap_or_else(beyond), told)
}

/// Refuses nesting beyond `limit` before anything follows it.
fn check_depth(payload: &[u8], limit: usize) -> Result<(), String> {
    let opens = |byte: &u8| matches!(byte, b'[' | b'{');
    // Counting costs a fraction of a nanosecond a byte and settles nearly every message.
    if payload.len() <= limit || payload.iter().filter(|byte| opens(byte)).count() <= limit {
        return Ok(());
    }
    let (mut depth, mut in_text, mut escaped) = (0_usize, false, false);
    for byte in payload {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_text => escaped = true,
            b'"' => in_text = !in_text,
            _ if in_text => {}
            b'[' | b'{' => {
                depth += 1;
                if depth > limit {
                    return Err(format!("nested more than {limit} levels deep"));
                }
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    Ok(())
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Shape::Object => "an object",
            Shape::ObjectOrArray => "an object or an array of objects",
        })
    }
}

/// Reads one value of the given shape into rows.
struct Records<'a> {
    rows: &'a mut Rows,
    shape: Shape,
    noted: &'a Noted,
}

impl<'de> DeserializeSeed<'de> for Records<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Records<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.shape)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<(), E> {
        Err(self.noted.wrong_type(self.shape, Unexpected::Bool(value)))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<(), E> {
        Err(self.noted.wrong_type(self.shape, Unexpected::Signed(value)))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<(), E> {
        Err(self.noted.wrong_type(self.shape, Unexpected::Unsigned(value)))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<(), E> {
        Err(self.noted.wrong_type(self.shape, Unexpected::Float(value)))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<(), E> {
        Err(self.noted.wrong_type(self.shape, Unexpected::Str(value)))
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        Err(self.noted.wrong_type(self.shape, Unexpected::Unit))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<(), A::Error> {
        self.rows.push_object(map, self.noted)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        if self.shape == Shape::Object {
            return Err(self.noted.wrong_type(self.shape, Unexpected::Seq));
        }
        loop {
            let item = Records { rows: &mut *self.rows, shape: Shape::Object, noted: self.noted };
            if seq.next_element_seed(item)?.is_none() {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{Array, AsArray};
    use arrow::datatypes::{
        DataType, Field, Float32Type, Float64Type, Int32Type, Int64Type, Schema, TimestampMillisecondType, UInt32Type,
    };

    use super::*;
    use crate::json_encoder::JsonEncoder;
    use crate::payload::{Missing, Rejected, Unknown};
    use crate::schema::Declaration;

    fn schema(text: &str) -> SchemaRef {
        serde_json::from_str::<Declaration>(text).unwrap().to_arrow()
    }

    fn decode_with(schema: &SchemaRef, policy: Policy, payloads: &[&[u8]]) -> Decoded {
        let mut decoder = JsonDecoder::new(schema.clone(), policy, Limits::default()).unwrap();
        decoder.decode(&BinaryArray::from_iter_values(payloads)).unwrap()
    }

    fn decode(text: &str, payloads: &[&str]) -> Decoded {
        let payloads: Vec<&[u8]> = payloads.iter().map(|p| p.as_bytes()).collect();
        decode_with(&schema(text), Policy::default(), &payloads)
    }

    /// The only reason for which the only payload is rejected.
    fn reason(declared: &str, payload: &str) -> String {
        let decoded = decode(declared, &[payload]);
        assert_eq!(decoded.batch.num_rows(), 0, "{payload} was taken");
        let [Rejected { payload: 0, reason, .. }] = decoded.rejected.as_slice() else {
            panic!("{payload}: {:?}", decoded.rejected);
        };
        reason.clone()
    }

    #[test]
    fn bad_payloads_of_every_kind_leave_their_neighbours_alone() {
        let bomb = format!("{{\"n\":{}", "[".repeat(100_000));
        let deep = format!("{{\"x\":{}1{}}}", "[".repeat(64), "]".repeat(64));
        let bad: [(&[u8], &str); 20] = [
            (b"", "empty payload"),
            (b" \r\n\t", "empty payload"),
            (b"{\"n\":1,\"s\":\"a", "not JSON: EOF while parsing a string"),
            (b"{\"n\":1", "not JSON: EOF while parsing an object"),
            (b"2}", "not JSON: trailing characters"),
            (b"{\"n\":1}{\"n\":2}", "not JSON: trailing characters"),
            (b"{\"n\":1}\n{\"n\":2}", "not JSON: trailing characters"),
            (b"\xff\xfe\x00\x01", "not JSON: invalid UTF-8 at byte 0"),
            (b"{\"n\":1,\"s\":\"\xc3\"}", "not JSON: invalid UTF-8 at byte 12"),
            (b"{\"n\":1}\0", "not JSON: trailing characters"),
            (b"{\"s\":\"a\0b\"}", "not JSON: control character"),
            (bomb.as_bytes(), "nested more than 64"),
            (deep.as_bytes(), "nested more than 64"),
            (b"{\"n\":300000000000}", "out of range for int32"),
            (b"{\"n\":1.7}", "expected int32"),
            (b"{\"n\":\"12\"}", "field 'n': expected int32, found string \"12\""),
            (b"{\"f\":1e39}", "out of range for float32"),
            (b"{\"n\":1,,\"s\":\"a\"}", "not JSON: key must be a string"),
            (b"null", "expected an object or an array of objects, found null"),
            (b"[{\"n\":1},{\"n\":true}]", "expected int32"),
        ];
        let good: Vec<String> = (0..1_000).map(|n| format!("{{\"n\":{n},\"s\":\"row {n}\",\"f\":{n}.5}}")).collect();
        let mut payloads: Vec<&[u8]> = good.iter().map(|text| text.as_bytes()).collect();
        for (index, (bytes, _)) in bad.iter().enumerate() {
            payloads[7 + index * 49] = bytes;
        }
        let declared = schema(r#"{"n":"int32","s":"utf8","f":"float32"}"#);
        let decoded = decode_with(&declared, Policy::default(), &payloads);

        assert_eq!(decoded.rejected.len(), bad.len());
        for (index, (rejected, (_, reason))) in decoded.rejected.iter().zip(&bad).enumerate() {
            assert_eq!(rejected.payload as usize, 7 + index * 49);
            assert!(rejected.reason.contains(reason), "{index}: {rejected:?}");
            assert_eq!(rejected.reason.starts_with("not JSON"), reason.starts_with("not JSON"), "{index}: {rejected:?}");
            assert!(rejected.reason.len() < 500);
        }
        assert_eq!(decoded.batch.num_rows(), 1_000 - bad.len());
        assert_eq!(decoded.origin.len(), decoded.batch.num_rows());
        assert!(decoded.origin.is_sorted());
        for (row, origin) in decoded.origin.iter().enumerate() {
            let n = decoded.batch.column(0).as_primitive::<Int32Type>().value(row);
            assert_eq!(n as u32, *origin);
            let s = decoded.batch.column(1).as_string::<i32>().value(row);
            assert_eq!(s, format!("row {n}"));
            let f = decoded.batch.column(2).as_primitive::<Float32Type>().value(row);
            assert_eq!(f, n as f32 + 0.5);
        }
    }

    #[test]
    fn every_kind_of_fault_has_its_code() {
        let declared = schema(
            r#"{"n":"int32!","f":"float64","t":"timestamp_ms","v":{"fixed_size_list":{"item":"int8","size":1}},
                "p":{"struct":{"x":"int8!"}}}"#,
        );
        let strict = Policy { unknown: Unknown::Reject, ..Policy::default() };
        for (payload, code) in [
            ("", "malformed"),
            ("{\"n\":", "malformed"),
            ("{\"n\":x}", "malformed"),
            (r#"{"n":1}{}"#, "malformed"),
            (r#"{"n":"a","f":}"#, "malformed"),
            (r#"{"n":1,"n":1}"#, "malformed"),
            (r#"{"f":1}"#, "missing_field"),
            (r#"{"n":null}"#, "missing_field"),
            (r#"{"n":1,"p":{}}"#, "missing_field"),
            (r#"{"n":1,"z":1}"#, "unknown_field"),
            (r#"{"n":1,"p":{"x":1,"z":1}}"#, "unknown_field"),
            (r#"{"n":"unknown field"}"#, "wrong_type"),
            (r#"{"n":1.5}"#, "wrong_type"),
            (r#"{"n":1,"t":"yesterday"}"#, "wrong_type"),
            (r#"{"n":1,"v":[1,2]}"#, "wrong_type"),
            (r#"{"n":1,"v":[]}"#, "wrong_type"),
            ("7", "wrong_type"),
            ("[[]]", "wrong_type"),
            (r#"{"n":3000000000}"#, "out_of_range"),
            (r#"{"n":1,"v":[300]}"#, "out_of_range"),
            (r#"{"n":1,"f":1e999}"#, "out_of_range"),
        ] {
            let decoded = decode_with(&declared, strict, &[payload.as_bytes()]);
            assert_eq!(decoded.rejected.len(), 1, "{payload} was taken");
            let rejected = &decoded.rejected[0];
            assert_eq!(rejected.fault.code(), code, "{payload}: {}", rejected.reason);
        }
    }

    #[test]
    fn half_an_object_is_not_completed_by_the_next() {
        let decoded = decode(r#"{"n":"int32","s":"utf8"}"#, &[r#"{"n":1,"#, r#""s":"x"}"#, r#"{"n":2}"#]);
        let payloads: Vec<u32> = decoded.rejected.iter().map(|r| r.payload).collect();
        assert_eq!(payloads, [0, 1]);
        assert_eq!(decoded.origin, [2]);
        assert_eq!(decoded.batch.column(0).as_primitive::<Int32Type>().values(), &[2]);
    }

    #[test]
    fn an_array_is_taken_or_rejected_whole() {
        let decoded =
            decode(r#"{"n":"int32"}"#, &[r#"[{"n":1},{"n":2}]"#, r#"[{"n":3},{"n":"x"},{"n":4}]"#, "[]", r#"{"n":5}"#, "[[]]"]);
        assert_eq!(decoded.batch.column(0).as_primitive::<Int32Type>().values(), &[1, 2, 5]);
        assert_eq!(decoded.origin, [0, 0, 3]);
        let payloads: Vec<u32> = decoded.rejected.iter().map(|r| r.payload).collect();
        assert_eq!(payloads, [1, 4]);
        assert!(decoded.rejected[1].reason.contains("expected an object"));
    }

    #[test]
    fn a_failed_row_leaves_nothing_at_any_depth() {
        let declared = r#"{"l":{"list":{"list":"int8"}},"v":{"fixed_size_list":{"item":"float32","size":2}},
            "p":{"struct":{"a":{"list":"utf8"},"b":"int32!"}},"last":"int32"}"#;
        let good = r#"{"l":[[1,2],[],null],"v":[1,2],"p":{"a":["x","y"],"b":1},"last":1}"#;
        let bad = r#"{"l":[[1,2],[3]],"v":[5,6],"p":{"a":["z"],"b":2},"last":"no"}"#;
        let inner = r#"{"l":[[1,2],[3,400]],"v":[5,6]}"#;
        let mid = r#"{"v":[5,6],"p":{"a":["z",1],"b":2}}"#;
        let alone = decode(declared, &[good, "{}", good]);
        let among = decode(declared, &[bad, good, inner, mid, "{}", bad, good, mid]);
        assert!(alone.rejected.is_empty());
        assert_eq!(alone.batch, among.batch);
        assert_eq!(among.origin, [1, 4, 6]);
        assert_eq!(among.rejected.len(), 5);
    }

    #[test]
    fn reasons_name_the_field_and_the_place() {
        let declared = r#"{"p":{"struct":{"lat":"float64!"}},"v":{"fixed_size_list":{"item":"float32","size":2}},
            "r":"int8!","h":"binary","d":"date","t":"timestamp_ms","b":"boolean"}"#;
        for (payload, expected) in [
            (r#"{"r":1,"p":{"lat":"x"}}"#, "field 'p': field 'lat': expected float64, found string \"x\""),
            (r#"{"r":1,"p":{}}"#, "field 'p': missing field 'lat'"),
            (r#"{"r":1,"p":{"lat":null}}"#, "null in a required field"),
            (r#"{"r":null}"#, "field 'r': null in a required field"),
            ("{}", "missing field 'r'"),
            (r#"{"r":1,"r":2}"#, "field 'r' twice"),
            (r#"{"r":1,"v":[1]}"#, "1 items instead of 2"),
            (r#"{"r":1,"v":[1,2,3]}"#, "more than 2 items"),
            (r#"{"r":1,"v":1}"#, "expected { fixed_size_list"),
            (r#"{"r":[1]}"#, "field 'r': expected int8, found a list"),
            ("7", "expected an object or an array of objects, found integer `7`"),
            (r#"["x"]"#, "expected an object, found string \"x\""),
            (r#"{"r":1,"h":"abc"}"#, "hexadecimal"),
            (r#"{"r":1,"d":"2024-02-30"}"#, "not an ISO 8601 date"),
            (r#"{"r":1,"t":"yesterday"}"#, "not an ISO 8601 timestamp"),
            (r#"{"r":1,"t":"2024-01-01T00:00:00é"}"#, "not an ISO 8601 timestamp"),
            (r#"{"r":1,"t":1.5}"#, "expected timestamp_ms"),
            (r#"{"r":1,"b":1}"#, "expected boolean"),
            (r#"{"r":1,"b":{}}"#, "field 'b': expected boolean, found an object"),
        ] {
            let reason = reason(declared, payload);
            assert!(reason.contains(expected), "{payload}: {reason}");
        }
        assert!(reason(declared, r#"{"r":"x"}"#).contains("at line 1 column"));
    }

    #[test]
    fn times_are_numbers_in_the_unit_or_text() {
        let decoded = decode(
            r#"{"t":"timestamp_ms","d":"date"}"#,
            &[
                r#"{"t":1700000000123,"d":19675}"#,
                r#"{"t":"2023-11-14T22:13:20.123Z","d":"2023-11-14"}"#,
                r#"{"t":"2023-11-14T23:13:20.123+01:00"}"#,
                r#"{"t":1700000000123.0}"#,
            ],
        );
        assert!(decoded.rejected.is_empty(), "{:?}", decoded.rejected);
        let times = decoded.batch.column(0).as_primitive::<TimestampMillisecondType>();
        assert_eq!(times.values(), &[1_700_000_000_123; 4]);
        let days = decoded.batch.column(1).as_primitive::<arrow::datatypes::Date32Type>();
        assert_eq!((days.value(0), days.value(1)), (19_675, 19_675));
    }

    #[test]
    fn policies_are_kept() {
        let declared = schema(r#"{"a":"int32","p":{"struct":{"x":"int32"}}}"#);
        let strict = Policy { missing: Missing::Reject, unknown: Unknown::Reject, ..Policy::default() };
        let payloads: [&[u8]; 5] = [
            br#"{"a":1,"p":{"x":1}}"#,
            br#"{"a":1}"#,
            br#"{"a":null,"p":null}"#,
            br#"{"a":1,"p":{"x":1},"z":[{"deep":"e\u0301"}]}"#,
            br#"{"a":1,"p":{"x":1,"y":2}}"#,
        ];
        let lenient = decode_with(&declared, Policy::default(), &payloads);
        assert!(lenient.rejected.is_empty(), "{:?}", lenient.rejected);
        assert_eq!(lenient.batch.column(1).null_count(), 2);
        let held = decode_with(&declared, strict, &payloads);
        assert_eq!(held.origin, [0, 2]);
        let reasons: Vec<&str> = held.rejected.iter().map(|r| r.reason.as_str()).collect();
        assert!(reasons[0].contains("missing field 'p'"), "{reasons:?}");
        assert!(reasons[1].contains("unknown field 'z'"), "{reasons:?}");
        assert!(reasons[2].contains("unknown field 'y'"), "{reasons:?}");
    }

    #[test]
    fn limits_nulls_and_large_integers() {
        let declared = schema(r#"{"u":"uint64","i":"int64","f":"float64"}"#);
        let limits = Limits { max_payload: 64, depth: 4 };
        let mut decoder = JsonDecoder::new(declared, Policy::default(), limits).unwrap();
        let long = format!("{{\"i\":1{}}}", " ".repeat(64));
        let payloads: [Option<&[u8]>; 7] = [
            None,
            Some(long.as_bytes()),
            Some(br#"{"u":18446744073709551615,"i":-9223372036854775808,"f":0.1}"#),
            Some(br#"{"i":9223372036854775808}"#),
            Some(br#"{"u":-1}"#),
            Some(br#"{"z":[[[[1]]]]}"#),
            Some(br#"{"z":"[[[[[[","i":5}"#),
        ];
        let payloads = BinaryArray::from_opt_vec(payloads.to_vec());
        let decoded = decoder.decode(&payloads).unwrap();
        assert_eq!(decoded.origin, [2, 6]);
        let reasons: Vec<&str> = decoded.rejected.iter().map(|r| r.reason.as_str()).collect();
        assert_eq!(reasons[0], "no payload (null)");
        assert!(reasons[1].contains("over the limit of 64"), "{reasons:?}");
        assert!(reasons[2].contains("out of range for int64"), "{reasons:?}");
        assert!(reasons[3].contains("out of range for uint64"), "{reasons:?}");
        assert!(reasons[4].contains("more than 4 levels"), "{reasons:?}");
        let u = decoded.batch.column(0).as_primitive::<arrow::datatypes::UInt64Type>();
        assert_eq!(u.value(0), u64::MAX);
        assert_eq!(decoded.batch.column(1).as_primitive::<Int64Type>().value(0), i64::MIN);
        assert_eq!(decoded.batch.column(2).as_primitive::<Float64Type>().value(0), 0.1);
    }

    #[test]
    fn a_type_that_cannot_be_declared_is_refused() {
        let time = DataType::Time64(arrow::datatypes::TimeUnit::Nanosecond);
        let schema = Arc::new(Schema::new(vec![Field::new("t", time, true)]));
        let error = JsonDecoder::new(schema, Policy::default(), Limits::default()).err().unwrap();
        assert!(error.to_string().contains("column 't'"), "{error}");
    }

    #[test]
    fn every_type_comes_back() {
        let declared = r#"{"b":"boolean","i8":"int8","i16":"int16","i32":"int32","i64":"int64","u8":"uint8",
            "u16":"uint16","u32":"uint32","u64":"uint64","f32":"float32","f64":"float64","s":"utf8","h":"binary",
            "d":"date","ts":"timestamp_s","tm":"timestamp_ms","tu":"timestamp_us","tn":"timestamp_ns",
            "l":{"list":{"struct":{"x":"int32","y":{"list":"utf8"}}}},
            "v":{"fixed_size_list":{"item":"float32","size":3}},"p":{"struct":{"lat":"float64","when":"timestamp_us"}}}"#;
        let row = r#"{"b":true,"i8":-128,"i16":-32768,"i32":-2147483648,"i64":-9223372036854775808,"u8":255,
            "u16":65535,"u32":4294967295,"u64":18446744073709551615,"f32":3.4028235e38,
            "f64":2.2250738585072014e-308,"s":"a\"\\\n\u0000é😀","h":"00ff7f","d":"1969-12-31",
            "ts":"2024-02-29T23:59:59Z","tm":1700000000123,"tu":-1,"tn":"2024-01-01T00:00:00.123456789Z",
            "l":[{"x":1,"y":["p",null]},null,{}],"v":[0.1,null,-0.0],"p":{"lat":0.30000000000000004,"when":1}}"#;
        let decoded = decode(declared, &[row, "{}", row]);
        assert!(decoded.rejected.is_empty(), "{:?}", decoded.rejected);
        assert_eq!(decoded.batch.column(16).null_count(), 1);
        for explicit_nulls in [false, true] {
            let encoder = JsonEncoder::new(&schema(declared), explicit_nulls).unwrap();
            let payloads = encoder.encode(&decoded.batch).unwrap();
            assert_eq!(payloads.len(), 3);
            assert_eq!(payloads.value(1) == b"{}", !explicit_nulls);
            let mut decoder = JsonDecoder::new(schema(declared), Policy::default(), Limits::default()).unwrap();
            let again = decoder.decode(&payloads).unwrap();
            assert!(again.rejected.is_empty(), "{:?}", again.rejected);
            assert_eq!(again.batch, decoded.batch);
        }
    }

    #[test]
    fn a_decoder_starts_anew_after_each_batch() {
        let declared = schema(r#"{"l":{"list":"uint32"},"s":"utf8"}"#);
        let mut decoder = JsonDecoder::new(declared, Policy::default(), Limits::default()).unwrap();
        for n in 0..3 {
            let payload = format!("{{\"l\":[{n},{n}],\"s\":\"{n}\"}}");
            let payloads = BinaryArray::from_iter_values([payload.as_bytes(), &b"x"[..]]);
            let decoded = decoder.decode(&payloads).unwrap();
            assert_eq!((decoded.batch.num_rows(), decoded.rejected.len()), (1, 1));
            let list = decoded.batch.column(0).as_list::<i32>().value(0);
            assert_eq!(list.as_primitive::<UInt32Type>().values(), &[n, n]);
        }
        let empty = decoder.decode(&BinaryArray::from_iter_values(Vec::<&[u8]>::new())).unwrap();
        assert_eq!(empty.batch.num_rows(), 0);
    }
}
