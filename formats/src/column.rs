//! One growing column: values are appended one by one from JSON or text, and the column can be cut back to an
//! earlier length. Used by [`Rows`](crate::rows::Rows). The invariant: between rows all columns are equally long,
//! and cutting back to a row's start undoes all that a half-read row left behind, at every level of nesting.

use std::mem;
use std::sync::Arc;

use arrow::array::timezone::Tz;
use arrow::array::types::*;
use arrow::array::{
    ArrayRef, BinaryArray, BooleanArray, BooleanBufferBuilder, FixedSizeListArray, ListArray, PrimitiveArray, StringArray,
    StructArray,
};
use arrow::buffer::{BooleanBuffer, Buffer, NullBuffer, OffsetBuffer, ScalarBuffer};
use arrow::compute::kernels::cast_utils::{Parser, string_to_datetime};
use arrow::datatypes::{DataType, FieldRef, TimeUnit};
use arrow::error::ArrowError;
use serde::de::DeserializeSeed;

use crate::json_value::{Noted, Slot};
use crate::payload::{Fault, Policy, Reason};
use crate::schema::type_name;

/// A column under construction.
pub(crate) struct Column {
    field: FieldRef,
    /// Which rows are not null; its length is the column's.
    valid: BooleanBufferBuilder,
    values: Values,
}

pub(crate) enum Values {
    Boolean(Vec<bool>),
    Int8(Vec<i8>),
    Int16(Vec<i16>),
    Int32(Vec<i32>),
    Int64(Vec<i64>),
    UInt8(Vec<u8>),
    UInt16(Vec<u16>),
    UInt32(Vec<u32>),
    UInt64(Vec<u64>),
    Float32(Vec<f32>),
    Float64(Vec<f64>),
    Utf8(Bytes),
    Binary(Bytes),
    Date(Vec<i32>),
    Timestamp(TimeUnit, Vec<i64>),
    /// Ends of the lists within the items, after a leading 0.
    List(Vec<i32>, Box<Column>),
    FixedSizeList(usize, Box<Column>),
    Struct(Vec<Column>),
}

/// Values of varying length, with their ends after a leading 0.
pub(crate) struct Bytes {
    offsets: Vec<i32>,
    bytes: Vec<u8>,
}

impl Bytes {
    fn push(&mut self, value: &[u8]) -> Result<(), Refusal> {
        let end = i32::try_from(self.bytes.len() + value.len())
            .map_err(|_| because(Fault::OutOfRange, "the batch holds more than 2 GiB of text in one column"))?;
        self.bytes.extend_from_slice(value);
        self.offsets.push(end);
        Ok(())
    }

    fn truncate(&mut self, len: usize) {
        self.offsets.truncate(len + 1);
        self.bytes.truncate(last(&self.offsets));
    }
}

/// Why a column does not take a value.
#[derive(Debug, PartialEq)]
pub(crate) enum Refusal {
    /// It is of another type.
    Type,
    /// It is of the type and does not fit.
    Range,
    /// For the reason given.
    Because(Reason),
}

fn because(fault: Fault, text: impl Into<String>) -> Refusal {
    Refusal::Because(Reason::new(fault, text))
}

impl Column {
    /// An empty column, or the data type (of this field or one within) that cannot be built value by value.
    pub(crate) fn new(field: &FieldRef) -> Result<Self, DataType> {
        let bytes = || Bytes { offsets: vec![0], bytes: Vec::new() };
        let values = match field.data_type() {
            DataType::Boolean => Values::Boolean(Vec::new()),
            DataType::Int8 => Values::Int8(Vec::new()),
            DataType::Int16 => Values::Int16(Vec::new()),
            DataType::Int32 => Values::Int32(Vec::new()),
            DataType::Int64 => Values::Int64(Vec::new()),
            DataType::UInt8 => Values::UInt8(Vec::new()),
            DataType::UInt16 => Values::UInt16(Vec::new()),
            DataType::UInt32 => Values::UInt32(Vec::new()),
            DataType::UInt64 => Values::UInt64(Vec::new()),
            DataType::Float32 => Values::Float32(Vec::new()),
            DataType::Float64 => Values::Float64(Vec::new()),
            DataType::Utf8 => Values::Utf8(bytes()),
            DataType::Binary => Values::Binary(bytes()),
            DataType::Date32 => Values::Date(Vec::new()),
            DataType::Timestamp(unit, _) => Values::Timestamp(*unit, Vec::new()),
            DataType::List(item) => Values::List(vec![0], Box::new(Column::new(item)?)),
            DataType::FixedSizeList(item, size) => {
                let size = usize::try_from(*size).ok().filter(|size| *size > 0);
                let size = size.ok_or_else(|| field.data_type().clone())?;
                Values::FixedSizeList(size, Box::new(Column::new(item)?))
            }
            DataType::Struct(fields) if !fields.is_empty() => {
                Values::Struct(fields.iter().map(Column::new).collect::<Result<_, _>>()?)
            }
            other => return Err(other.clone()),
        };
        Ok(Self { field: field.clone(), valid: BooleanBufferBuilder::new(0), values })
    }

    pub(crate) fn name(&self) -> &str {
        self.field.name()
    }

    pub(crate) fn len(&self) -> usize {
        self.valid.len()
    }

    /// The nested columns, to be filled before [`Column::complete`].
    pub(crate) fn values_mut(&mut self) -> &mut Values {
        &mut self.values
    }

    /// Counts a nested value whose parts have been appended.
    pub(crate) fn complete(&mut self) {
        self.valid.append(true);
    }

    pub(crate) fn is_required(&self) -> bool {
        !self.field.is_nullable()
    }

    pub(crate) fn type_name(&self) -> String {
        type_name(self.field.data_type())
    }

    /// Appends a null. Values beneath a null are nulls too, whether or not they are required.
    pub(crate) fn push_null(&mut self) {
        self.valid.append(false);
        match &mut self.values {
            Values::Boolean(values) => values.push(false),
            Values::Int8(values) => values.push(0),
            Values::Int16(values) => values.push(0),
            Values::Int32(values) | Values::Date(values) => values.push(0),
            Values::Int64(values) | Values::Timestamp(_, values) => values.push(0),
            Values::UInt8(values) => values.push(0),
            Values::UInt16(values) => values.push(0),
            Values::UInt32(values) => values.push(0),
            Values::UInt64(values) => values.push(0),
            Values::Float32(values) => values.push(0.0),
            Values::Float64(values) => values.push(0.0),
            Values::Utf8(bytes) | Values::Binary(bytes) => bytes.offsets.push(end(&bytes.offsets)),
            Values::List(offsets, _) => offsets.push(end(offsets)),
            Values::FixedSizeList(size, item) => (0..*size).for_each(|_| item.push_null()),
            Values::Struct(fields) => fields.iter_mut().for_each(Column::push_null),
        }
    }

    /// Cuts the column back to `len` rows, whatever state a failed row left it in.
    pub(crate) fn truncate(&mut self, len: usize) {
        self.valid.truncate(len);
        match &mut self.values {
            Values::Boolean(values) => values.truncate(len),
            Values::Int8(values) => values.truncate(len),
            Values::Int16(values) => values.truncate(len),
            Values::Int32(values) | Values::Date(values) => values.truncate(len),
            Values::Int64(values) | Values::Timestamp(_, values) => values.truncate(len),
            Values::UInt8(values) => values.truncate(len),
            Values::UInt16(values) => values.truncate(len),
            Values::UInt32(values) => values.truncate(len),
            Values::UInt64(values) => values.truncate(len),
            Values::Float32(values) => values.truncate(len),
            Values::Float64(values) => values.truncate(len),
            Values::Utf8(bytes) | Values::Binary(bytes) => bytes.truncate(len),
            Values::List(offsets, item) => {
                offsets.truncate(len + 1);
                item.truncate(last(offsets));
            }
            Values::FixedSizeList(size, item) => item.truncate(len * *size),
            Values::Struct(fields) => fields.iter_mut().for_each(|field| field.truncate(len)),
        }
    }

    pub(crate) fn push_bool(&mut self, value: bool) -> Result<(), Refusal> {
        let Values::Boolean(values) = &mut self.values else {
            return Err(Refusal::Type);
        };
        values.push(value);
        self.valid.append(true);
        Ok(())
    }

    pub(crate) fn push_integer(&mut self, value: i128) -> Result<(), Refusal> {
        fn push<T: TryFrom<i128>>(values: &mut Vec<T>, value: i128) -> Result<(), Refusal> {
            values.push(T::try_from(value).map_err(|_| Refusal::Range)?);
            Ok(())
        }
        match &mut self.values {
            Values::Int8(values) => push(values, value)?,
            Values::Int16(values) => push(values, value)?,
            Values::Int32(values) | Values::Date(values) => push(values, value)?,
            Values::Int64(values) | Values::Timestamp(_, values) => push(values, value)?,
            Values::UInt8(values) => push(values, value)?,
            Values::UInt16(values) => push(values, value)?,
            Values::UInt32(values) => push(values, value)?,
            Values::UInt64(values) => push(values, value)?,
            Values::Float32(_) | Values::Float64(_) => return self.push_float(value as f64),
            _ => return Err(Refusal::Type),
        }
        self.valid.append(true);
        Ok(())
    }

    pub(crate) fn push_float(&mut self, value: f64) -> Result<(), Refusal> {
        match &mut self.values {
            Values::Float32(values) => {
                let narrow = value as f32;
                if narrow.is_infinite() && value.is_finite() {
                    return Err(Refusal::Range);
                }
                values.push(narrow);
            }
            Values::Float64(values) => values.push(value),
            Values::Boolean(_) | Values::Utf8(_) | Values::Binary(_) => return Err(Refusal::Type),
            Values::List(..) | Values::FixedSizeList(..) | Values::Struct(_) => {
                return Err(Refusal::Type);
            }
            // An integer may be written 3.0; 2^63 is exact in a float and bounds the cast.
            _ if value.fract() == 0.0 && value.abs() <= 9_223_372_036_854_775_808.0 => {
                return self.push_integer(value as i128);
            }
            _ if value.fract() == 0.0 => return Err(Refusal::Range),
            _ => return Err(Refusal::Type),
        }
        self.valid.append(true);
        Ok(())
    }

    pub(crate) fn push_str(&mut self, text: &str) -> Result<(), Refusal> {
        match &mut self.values {
            Values::Utf8(bytes) => bytes.push(text.as_bytes())?,
            Values::Binary(bytes) => {
                let decoded = from_hex(text).ok_or_else(|| because(Fault::WrongType, "expected pairs of hexadecimal digits"))?;
                bytes.push(&decoded)?;
            }
            Values::Date(values) => values.push(parse_date(text)?),
            Values::Timestamp(unit, values) => values.push(parse_timestamp(text, *unit)?),
            _ => return Err(Refusal::Type),
        }
        self.valid.append(true);
        Ok(())
    }

    /// Appends a cell of a format in which everything is text; nested values are JSON within the cell.
    ///
    /// # Errors
    /// The reason, without the column's name.
    pub(crate) fn push_text(&mut self, text: &str, policy: Policy) -> Result<(), Reason> {
        let refused = match &self.values {
            Values::Boolean(_) if text.eq_ignore_ascii_case("true") => self.push_bool(true),
            Values::Boolean(_) if text.eq_ignore_ascii_case("false") => self.push_bool(false),
            Values::Boolean(_) => Err(Refusal::Type),
            Values::Utf8(_) | Values::Binary(_) => self.push_str(text),
            Values::Date(_) | Values::Timestamp(..) => match text.parse::<i64>() {
                Ok(value) => self.push_integer(i128::from(value)),
                Err(_) => self.push_str(text),
            },
            Values::Float32(_) | Values::Float64(_) => match text.parse::<f64>() {
                // `inf` may be written out; digits that lead there overflowed.
                Ok(value) if value.is_infinite() && text.bytes().any(|b| b.is_ascii_digit()) => Err(Refusal::Range),
                Ok(value) => self.push_float(value),
                Err(_) => Err(Refusal::Type),
            },
            Values::List(..) | Values::FixedSizeList(..) | Values::Struct(_) => {
                let mut json = serde_json::Deserializer::from_str(text);
                let noted = Noted::default();
                let slot = Slot { column: &mut *self, policy, noted: &noted };
                let read = slot.deserialize(&mut json).and_then(|()| json.end());
                // A cell that is no JSON is a cell of another type; the record around it was well-formed.
                read.map_err(|error| because(noted.fault().unwrap_or(Fault::WrongType), error.to_string()))
            }
            _ => match text.parse::<i128>() {
                Ok(value) => self.push_integer(value),
                Err(_) => Err(Refusal::Type),
            },
        };
        refused.map_err(|refusal| match refusal {
            Refusal::Type => Reason::new(Fault::WrongType, format!("expected {}, found '{text}'", self.type_name())),
            Refusal::Range => Reason::new(Fault::OutOfRange, format!("{text} is out of range for {}", self.type_name())),
            Refusal::Because(reason) => reason,
        })
    }

    /// Hands over the column as an array and starts anew, with room for as much again.
    pub(crate) fn finish(&mut self) -> Result<ArrayRef, ArrowError> {
        let valid = NullBuffer::new(self.valid.finish());
        let nulls = (valid.null_count() > 0).then_some(valid);
        macro_rules! primitive {
            ($type:ty, $values:expr) => {{
                let values = ScalarBuffer::from(fresh($values));
                let array = PrimitiveArray::<$type>::try_new(values, nulls)?;
                Arc::new(array.with_data_type(self.field.data_type().clone()))
            }};
        }
        let array: ArrayRef = match &mut self.values {
            Values::Boolean(values) => {
                let values = BooleanBuffer::from(mem::take(values));
                Arc::new(BooleanArray::new(values, nulls))
            }
            Values::Int8(values) => primitive!(Int8Type, values),
            Values::Int16(values) => primitive!(Int16Type, values),
            Values::Int32(values) => primitive!(Int32Type, values),
            Values::Int64(values) => primitive!(Int64Type, values),
            Values::UInt8(values) => primitive!(UInt8Type, values),
            Values::UInt16(values) => primitive!(UInt16Type, values),
            Values::UInt32(values) => primitive!(UInt32Type, values),
            Values::UInt64(values) => primitive!(UInt64Type, values),
            Values::Float32(values) => primitive!(Float32Type, values),
            Values::Float64(values) => primitive!(Float64Type, values),
            Values::Date(values) => primitive!(Date32Type, values),
            Values::Timestamp(unit, values) => match unit {
                TimeUnit::Second => primitive!(TimestampSecondType, values),
                TimeUnit::Millisecond => primitive!(TimestampMillisecondType, values),
                TimeUnit::Microsecond => primitive!(TimestampMicrosecondType, values),
                TimeUnit::Nanosecond => primitive!(TimestampNanosecondType, values),
            },
            Values::Utf8(bytes) => {
                let (offsets, bytes) = (fresh_offsets(&mut bytes.offsets), fresh(&mut bytes.bytes));
                Arc::new(StringArray::try_new(offsets, Buffer::from_vec(bytes), nulls)?)
            }
            Values::Binary(bytes) => {
                let (offsets, bytes) = (fresh_offsets(&mut bytes.offsets), fresh(&mut bytes.bytes));
                Arc::new(BinaryArray::try_new(offsets, Buffer::from_vec(bytes), nulls)?)
            }
            Values::List(offsets, item) => {
                let field = item.field.clone();
                let (offsets, items) = (fresh_offsets(offsets), item.finish()?);
                Arc::new(ListArray::try_new(field, offsets, items, nulls)?)
            }
            Values::FixedSizeList(size, item) => {
                let field = item.field.clone();
                let size =
                    i32::try_from(*size).map_err(|_| ArrowError::InvalidArgumentError(format!("a list of {size} items")))?;
                Arc::new(FixedSizeListArray::try_new(field, size, item.finish()?, nulls)?)
            }
            Values::Struct(columns) => {
                let fields = columns.iter().map(|column| column.field.clone()).collect();
                let arrays = columns.iter_mut().map(Column::finish).collect::<Result<_, _>>()?;
                Arc::new(StructArray::try_new(fields, arrays, nulls)?)
            }
        };
        Ok(array)
    }
}

/// The values so far, leaving an empty vector of the same capacity: the next batch is likely as large.
fn fresh<T>(values: &mut Vec<T>) -> Vec<T> {
    let empty = Vec::with_capacity(values.len());
    mem::replace(values, empty)
}

fn fresh_offsets(offsets: &mut Vec<i32>) -> OffsetBuffer<i32> {
    let full = fresh(offsets);
    offsets.push(0);
    OffsetBuffer::new(ScalarBuffer::from(full))
}

fn end(offsets: &[i32]) -> i32 {
    offsets.last().copied().unwrap_or_default()
}

fn last(offsets: &[i32]) -> usize {
    usize::try_from(end(offsets)).unwrap_or_default()
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    if !digits.len().is_multiple_of(2) {
        return None;
    }
    let digit = |byte: u8| char::from(byte).to_digit(16);
    digits.chunks_exact(2).map(|pair| u8::try_from(digit(pair[0])? * 16 + digit(pair[1])?).ok()).collect()
}

fn parse_date(text: &str) -> Result<i32, Refusal> {
    // Arrow's parsers step through bytes; text beyond ASCII is no date and could be cut within a character.
    let days = text.is_ascii().then(|| Date32Type::parse(text)).flatten();
    days.ok_or_else(|| because(Fault::WrongType, format!("'{text}' is not an ISO 8601 date")))
}

/// A time without a zone is taken as UTC; digits finer than the unit are cut off.
fn parse_timestamp(text: &str, unit: TimeUnit) -> Result<i64, Refusal> {
    let parse = || {
        let utc: Tz = "+00:00".parse().ok()?;
        let time = string_to_datetime(&utc, text).ok()?;
        match unit {
            TimeUnit::Second => Some(time.timestamp()),
            TimeUnit::Millisecond => Some(time.timestamp_millis()),
            TimeUnit::Microsecond => Some(time.timestamp_micros()),
            TimeUnit::Nanosecond => time.timestamp_nanos_opt(),
        }
    };
    let time = text.is_ascii().then(parse).flatten();
    time.ok_or_else(|| because(Fault::WrongType, format!("'{text}' is not an ISO 8601 timestamp in range")))
}

/// Whether text is a date such as 2024-02-29.
pub(crate) fn is_date(text: &str) -> bool {
    text.len() == 10 && parse_date(text).is_ok()
}

/// Whether text is a date and a time of day.
pub(crate) fn is_timestamp(text: &str) -> bool {
    text.len() > 10 && parse_timestamp(text, TimeUnit::Microsecond).is_ok()
}
