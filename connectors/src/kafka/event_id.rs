//! The id that the `kafka` sink gives each record in the header `afferent-event-id`, by which a reader tells a
//! record that was written twice. Two promises: the same row written again after a crash has the same id, as far
//! as the pipeline repeats itself; and two different rows never have the same one, since a reader that drops
//! "duplicates" would lose data by that.
//!
//! - Rows that still say where they come from (`topic`, `partition` and `offset`): `topic/partition@offset-checksum`.
//!   A row that an operator made (`encode`) has the columns, and an offset of -1.
//! - Other rows: `pipeline/stage#number-checksum`, where the number counts the rows that this sink has ever
//!   written. It is stored with each epoch, so after a crash the count goes on where the stored epoch ended and
//!   the repeated rows get their old numbers. A hash of the payload alone would not do: sensors repeat themselves.
//!
//! The checksum (CRC-32C of key and payload) tells rows apart that got the same number because a pipeline of several
//! inputs did not repeat itself in the same order, or that an operator made of one source record.

use std::fmt::Write as _;

use afferent_engine::message;
use arrow::array::{Array, AsArray, Int32Array, Int64Array, RecordBatch, StringArray};
use arrow::datatypes::{Int32Type, Int64Type};

/// The header's name.
pub(super) const HEADER: &str = "afferent-event-id";

/// Makes the ids of one batch's records.
pub(super) struct EventIds<'a> {
    /// Names pipeline and stage.
    origin: &'a str,
    sources: Option<Sources<'a>>,
}

/// The columns that say where rows come from.
struct Sources<'a> {
    topics: &'a StringArray,
    partitions: &'a Int32Array,
    offsets: &'a Int64Array,
}

impl<'a> EventIds<'a> {
    /// For the rows of `batch`, written by the sink that `origin` names.
    pub(super) fn of(origin: &'a str, batch: &'a RecordBatch) -> Self {
        let column = |name| batch.column_by_name(name);
        let sources = || {
            Some(Sources {
                topics: column(message::TOPIC)?.as_string_opt::<i32>()?,
                partitions: column(message::PARTITION)?.as_primitive_opt::<Int32Type>()?,
                offsets: column(message::OFFSET)?.as_primitive_opt::<Int64Type>()?,
            })
        };
        Self { origin, sources: sources() }
    }

    /// Writes the id of row `row` into `id`, which is emptied first; `number` is the row's place among all that the
    /// sink has written.
    pub(super) fn write(&self, id: &mut String, row: usize, number: u64, key: Option<&[u8]>, payload: &[u8]) {
        id.clear();
        let checksum = crc32c::crc32c_append(crc32c::crc32c(key.unwrap_or_default()), payload);
        // Writing into a string cannot fail.
        let _ = match self.sources.as_ref().and_then(|sources| sources.of(row)) {
            Some((topic, partition, offset)) => write!(id, "{topic}/{partition}@{offset}-{checksum:08x}"),
            None => write!(id, "{}#{number}-{checksum:08x}", self.origin),
        };
    }
}

impl Sources<'_> {
    /// Topic, partition and offset of a row that has come from somewhere.
    fn of(&self, row: usize) -> Option<(&str, i32, i64)> {
        let known = self.topics.is_valid(row) && self.partitions.is_valid(row) && self.offsets.is_valid(row);
        let offset = self.offsets.value(row);
        (known && offset >= 0).then(|| (self.topics.value(row), self.partitions.value(row), offset))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::ArrayRef;

    use super::*;

    /// Two rows of a source, and one that an operator has made.
    fn sourced() -> RecordBatch {
        RecordBatch::try_from_iter([
            ("topic", Arc::new(StringArray::from(vec!["t", "t", ""])) as ArrayRef),
            ("partition", Arc::new(Int32Array::from(vec![1, 1, 0])) as ArrayRef),
            ("offset", Arc::new(Int64Array::from(vec![7, 8, -1])) as ArrayRef),
        ])
        .unwrap()
    }

    fn unsourced() -> RecordBatch {
        RecordBatch::try_from_iter([("offset", Arc::new(Int64Array::from(vec![1])) as ArrayRef)]).unwrap()
    }

    fn id(batch: &RecordBatch, row: usize, number: u64, payload: &[u8]) -> String {
        let mut id = String::from("old");
        EventIds::of("p/s", batch).write(&mut id, row, number, None, payload);
        id
    }

    #[test]
    fn the_same_row_has_the_same_id_and_another_row_another() {
        let rows = unsourced();
        assert_eq!(id(&rows, 0, 3, b"x"), id(&rows, 0, 3, b"x"));
        assert_ne!(id(&rows, 0, 3, b"x"), id(&rows, 0, 4, b"x"), "a sensor may say the same twice");
        assert_ne!(id(&rows, 0, 3, b"x"), id(&rows, 0, 3, b"y"));
        assert!(id(&rows, 0, 3, b"x").starts_with("p/s#3-"));
    }

    #[test]
    fn a_row_that_knows_its_source_is_named_after_it_whatever_its_number() {
        let rows = sourced();
        assert_eq!(id(&rows, 1, 3, b"x"), id(&rows, 1, 9, b"x"));
        assert!(id(&rows, 1, 3, b"x").starts_with("t/1@8-"));
        assert_ne!(id(&rows, 0, 3, b"x"), id(&rows, 1, 3, b"x"));
    }

    #[test]
    fn a_row_that_an_operator_made_is_named_after_its_number() {
        let rows = sourced();
        assert_ne!(id(&rows, 2, 3, b"x"), id(&rows, 2, 4, b"x"), "equal payloads are different rows");
        assert!(id(&rows, 2, 3, b"x").starts_with("p/s#3-"));
    }

    #[test]
    fn the_checksum_covers_key_and_payload() {
        let batch = unsourced();
        let (mut one, mut other) = (String::new(), String::new());
        let ids = EventIds::of("p/s", &batch);
        ids.write(&mut one, 0, 1, Some(b"a"), b"x");
        ids.write(&mut other, 0, 1, Some(b"b"), b"x");
        assert_ne!(one, other);
    }
}
