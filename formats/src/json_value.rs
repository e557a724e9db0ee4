//! From JSON values into growing columns. Used by [`Rows`](crate::rows::Rows) for whole records, and by columns for
//! nested values written as text. A value that does not fit its column is an error that names the field; what it left
//! behind is cut off by whoever asked.

use std::cell::Cell;
use std::fmt;

use serde::Deserializer;
use serde::de::{self, DeserializeSeed, Error as _, IgnoredAny, MapAccess, SeqAccess, Unexpected, Visitor};

use crate::column::{Column, Refusal, Values};
use crate::payload::{Fault, Missing, Policy, Reason, Unknown};

/// The fault that ended the reading of a value: an error of serde carries nothing but words.
#[derive(Default)]
pub(crate) struct Noted(Cell<Option<Fault>>);

impl Noted {
    /// The fault, unless the parser itself found it.
    pub(crate) fn fault(&self) -> Option<Fault> {
        self.0.get()
    }

    /// An error, whose fault is noted.
    fn error<E: de::Error>(&self, fault: Fault, told: impl fmt::Display) -> E {
        self.0.set(Some(fault));
        E::custom(told)
    }

    /// A value of another kind than `expected`, in the words of every codec: `expected int32, found ...`.
    pub(crate) fn wrong_type<E: de::Error>(&self, expected: impl fmt::Display, found: Unexpected<'_>) -> E {
        let fault = Fault::WrongType;
        match found {
            Unexpected::Seq => self.error(fault, format_args!("expected {expected}, found a list")),
            Unexpected::Map => self.error(fault, format_args!("expected {expected}, found an object")),
            Unexpected::Unit => self.error(fault, format_args!("expected {expected}, found null")),
            found => self.error(fault, format_args!("expected {expected}, found {found}")),
        }
    }
}

/// Reads one JSON value into a column.
pub(crate) struct Slot<'a> {
    pub(crate) column: &'a mut Column,
    pub(crate) policy: Policy,
    pub(crate) noted: &'a Noted,
}

impl Slot<'_> {
    fn check<E: de::Error>(&self, outcome: Result<(), Refusal>, found: Unexpected<'_>) -> Result<(), E> {
        outcome.map_err(|refusal| match refusal {
            Refusal::Type => self.noted.wrong_type(self.column.type_name(), found),
            Refusal::Range => {
                self.noted.error(Fault::OutOfRange, format_args!("{found} is out of range for {}", self.column.type_name()))
            }
            Refusal::Because(reason) => self.noted.error(reason.fault, reason.text),
        })
    }
}

impl<'de> DeserializeSeed<'de> for Slot<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Slot<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.column.type_name())
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<(), E> {
        let outcome = self.column.push_bool(value);
        self.check(outcome, Unexpected::Bool(value))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<(), E> {
        let outcome = self.column.push_integer(i128::from(value));
        self.check(outcome, Unexpected::Signed(value))
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<(), E> {
        let outcome = self.column.push_integer(i128::from(value));
        self.check(outcome, Unexpected::Unsigned(value))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<(), E> {
        let outcome = self.column.push_float(value);
        self.check(outcome, Unexpected::Float(value))
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<(), E> {
        let outcome = self.column.push_str(value);
        self.check(outcome, Unexpected::Str(value))
    }

    fn visit_unit<E: de::Error>(self) -> Result<(), E> {
        if self.column.is_required() {
            return Err(self.noted.error(Fault::MissingField, "null in a required field"));
        }
        self.column.push_null();
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        let Slot { column, policy, noted } = self;
        match column.values_mut() {
            Values::List(offsets, item) => {
                while seq.next_element_seed(Slot { column: &mut *item, policy, noted })?.is_some() {}
                let end = i32::try_from(item.len());
                offsets.push(end.map_err(|_| noted.error::<A::Error>(Fault::OutOfRange, "the batch holds 2^31 list items"))?);
            }
            Values::FixedSizeList(size, item) => {
                let start = item.len();
                while seq.next_element_seed(Slot { column: &mut *item, policy, noted })?.is_some() {
                    if item.len() - start > *size {
                        return Err(noted.error(Fault::WrongType, format_args!("more than {size} items")));
                    }
                }
                let found = item.len() - start;
                if found != *size {
                    return Err(noted.error(Fault::WrongType, format_args!("{found} items instead of {size}")));
                }
            }
            _ => {
                return Err(noted.wrong_type(column.type_name(), Unexpected::Seq));
            }
        }
        column.complete();
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<(), A::Error> {
        let Slot { column, policy, noted } = self;
        let row = column.len();
        match column.values_mut() {
            Values::Struct(fields) => read_fields(fields, row, policy, noted, map)?,
            _ => {
                return Err(noted.wrong_type(column.type_name(), Unexpected::Map));
            }
        }
        column.complete();
        Ok(())
    }
}

/// Reads a JSON object into columns that are all `row` long; afterwards all are one longer, or it is an error.
pub(crate) fn read_fields<'de, A: MapAccess<'de>>(
    columns: &mut [Column],
    row: usize,
    policy: Policy,
    noted: &Noted,
    mut map: A,
) -> Result<(), A::Error> {
    let mut likely = 0;
    while let Some(found) = map.next_key_seed(Key { columns: &*columns, likely, policy, noted })? {
        let Some(index) = found else {
            map.next_value::<IgnoredAny>()?;
            continue;
        };
        likely = index + 1;
        let column = &mut columns[index];
        if column.len() > row {
            return Err(noted.error(Fault::Malformed, format_args!("field '{}' twice", column.name())));
        }
        let slot = Slot { column: &mut *column, policy, noted };
        if let Err(error) = map.next_value_seed(slot) {
            return Err(A::Error::custom(format_args!("field '{}': {error}", column.name())));
        }
    }
    fill_missing(columns, row, policy).map_err(|reason| noted.error(reason.fault, reason.text))
}

/// Appends nulls to the columns that got no value in this row, if that is allowed.
pub(crate) fn fill_missing(columns: &mut [Column], row: usize, policy: Policy) -> Result<(), Reason> {
    for column in columns.iter_mut().filter(|column| column.len() == row) {
        if column.is_required() || policy.missing == Missing::Reject {
            return Err(Reason::new(Fault::MissingField, format!("missing field '{}'", column.name())));
        }
        column.push_null();
    }
    Ok(())
}

/// Finds the column of a key: the index, or nothing for a field that is not declared.
struct Key<'a> {
    columns: &'a [Column],
    /// Keys mostly come in the declared order; looking there first makes wide records linear.
    likely: usize,
    policy: Policy,
    noted: &'a Noted,
}

impl<'de> DeserializeSeed<'de> for Key<'_> {
    type Value = Option<usize>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Key<'_> {
    type Value = Option<usize>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a field name")
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<Self::Value, E> {
        if self.columns.get(self.likely).is_some_and(|column| column.name() == name) {
            return Ok(Some(self.likely));
        }
        let found = self.columns.iter().position(|column| column.name() == name);
        if found.is_none() && self.policy.unknown == Unknown::Reject {
            return Err(self.noted.error(Fault::UnknownField, format_args!("unknown field '{name}'")));
        }
        Ok(found)
    }
}
