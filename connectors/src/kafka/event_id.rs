//! The id that the `kafka` sink gives each record in the header `afferent-event-id`, by which a reader tells a
//! record that was written twice. Two promises: the same row written again after a crash has the same id, as far
//! as the pipeline repeats itself; and two different rows never have the same one, since a reader that drops
//! "duplicates" would lose data by that.
//!
//! - Rows that still say where they come from (`topic`, `partition` and `offset`): `topic/partition@offset-checksum`.
//! - Other rows: `pipeline/stage#number-checksum`, where the number counts the rows that this sink has ever
//!   written. It is stored with each epoch, so after a crash the count goes on where the stored epoch ended and
//!   the repeated rows get their old numbers. A hash of the payload alone would not do: sensors repeat themselves.
//!
//! The checksum (CRC-32C of key and payload) tells rows apart that got the same number because a pipeline of several
//! inputs did not repeat itself in the same order, or that an operator made of one source record.

use std::fmt::Write as _;

use afferent_engine::message;
use arrow::array::RecordBatch;

/// The header's name.
pub(super) const HEADER: &str = "afferent-event-id";

/// Makes the ids of one sink's records.
pub(super) struct EventIds {
    /// Names pipeline and stage.
    pub origin: String,
    /// The rows say where they come from.
    pub positioned: bool,
}

impl EventIds {
    /// Writes the id of row `row` into `id`, which is emptied first; `number` is the row's place among all that the
    /// sink has written.
    pub(super) fn write(
        &self,
        id: &mut String,
        batch: &RecordBatch,
        row: usize,
        number: u64,
        key: Option<&[u8]>,
        payload: &[u8],
    ) {
        id.clear();
        let checksum = crc32c::crc32c_append(crc32c::crc32c(key.unwrap_or_default()), payload);
        // Writing into a string cannot fail.
        let _ = if self.positioned {
            write!(id, "{}-{checksum:08x}", message::position_of(batch, row))
        } else {
            write!(id, "{}#{number}-{checksum:08x}", self.origin)
        };
    }
}

/// Whether rows of this schema say where they come from.
pub(super) fn positioned(schema: &arrow::datatypes::SchemaRef) -> bool {
    [message::TOPIC, message::PARTITION, message::OFFSET]
        .iter()
        .zip(["Utf8", "Int32", "Int64"])
        .all(|(name, data_type)| schema.field_with_name(name).is_ok_and(|field| field.data_type().to_string() == data_type))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, Int32Array, Int64Array, StringArray};

    use super::*;

    fn rows() -> RecordBatch {
        RecordBatch::try_from_iter([
            ("topic", Arc::new(StringArray::from(vec!["t", "t"])) as ArrayRef),
            ("partition", Arc::new(Int32Array::from(vec![1, 1])) as ArrayRef),
            ("offset", Arc::new(Int64Array::from(vec![7, 8])) as ArrayRef),
        ])
        .unwrap()
    }

    fn id(row: usize, positioned: bool, number: u64, payload: &[u8]) -> String {
        let mut id = String::from("old");
        EventIds { origin: "p/s".into(), positioned }.write(&mut id, &rows(), row, number, None, payload);
        id
    }

    #[test]
    fn the_same_row_has_the_same_id_and_another_row_another() {
        assert_eq!(id(0, false, 3, b"x"), id(0, false, 3, b"x"));
        assert_ne!(id(0, false, 3, b"x"), id(0, false, 4, b"x"), "a sensor may say the same twice");
        assert_ne!(id(0, false, 3, b"x"), id(0, false, 3, b"y"));
        assert!(id(0, false, 3, b"x").starts_with("p/s#3-"));
    }

    #[test]
    fn a_row_that_knows_its_source_is_named_after_it_whatever_its_number() {
        assert!(positioned(&rows().schema()));
        assert_eq!(id(1, true, 3, b"x"), id(1, true, 9, b"x"));
        assert!(id(1, true, 3, b"x").starts_with("t/1@8-"));
        assert_ne!(id(0, true, 3, b"x"), id(1, true, 3, b"x"));
        let other = RecordBatch::try_from_iter([("offset", Arc::new(Int64Array::from(vec![1])) as ArrayRef)]).unwrap();
        assert!(!positioned(&other.schema()));
    }

    #[test]
    fn the_checksum_covers_key_and_payload() {
        let batch = rows();
        let (mut one, mut other) = (String::new(), String::new());
        let ids = EventIds { origin: "p/s".into(), positioned: false };
        ids.write(&mut one, &batch, 0, 1, Some(b"a"), b"x");
        ids.write(&mut other, &batch, 0, 1, Some(b"b"), b"x");
        assert_ne!(one, other);
    }
}
