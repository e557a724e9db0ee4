//! The schema shared by everything that carries opaque messages (MQTT, Kafka, lines of a file): what
//! such a source emits, `decode` reads and `encode` makes. Captured topic levels are further columns.

use std::sync::Arc;

use arrow::array::{AsArray, RecordBatch};
use arrow::datatypes::{DataType, Field, Int32Type, Int64Type, Schema, SchemaRef, TimeUnit};

/// The bytes of the message: binary, never null.
pub const PAYLOAD: &str = "payload";
/// The key of the message, or null: binary.
pub const KEY: &str = "key";
/// The topic it came from: utf8.
pub const TOPIC: &str = "topic";
/// When the sender or the broker says it was made, else when it arrived: timestamp in ms, UTC.
pub const TIMESTAMP: &str = "timestamp";
/// Headers, or MQTT user properties: map of utf8 to binary, or null.
pub const HEADERS: &str = "headers";
/// The partition it came from: int32 (0 where the protocol has none).
pub const PARTITION: &str = "partition";
/// Its number within the partition: int64.
pub const OFFSET: &str = "offset";

/// The columns that every message source emits, in order.
pub const COLUMNS: [&str; 7] = [PAYLOAD, KEY, TOPIC, TIMESTAMP, HEADERS, PARTITION, OFFSET];

/// The type of the `headers` column.
pub fn headers_type() -> DataType {
    let entry = Field::new(
        "entries",
        DataType::Struct(vec![Field::new("keys", DataType::Utf8, false), Field::new("values", DataType::Binary, true)].into()),
        false,
    );
    DataType::Map(Arc::new(entry), false)
}

/// The message schema, with one utf8 column for each captured topic level behind the fixed ones.
pub fn schema(captures: &[String]) -> SchemaRef {
    let mut fields = vec![
        Field::new(PAYLOAD, DataType::Binary, false),
        Field::new(KEY, DataType::Binary, true),
        Field::new(TOPIC, DataType::Utf8, false),
        Field::new(TIMESTAMP, DataType::Timestamp(TimeUnit::Millisecond, Some("UTC".into())), false),
        Field::new(HEADERS, headers_type(), true),
        Field::new(PARTITION, DataType::Int32, false),
        Field::new(OFFSET, DataType::Int64, false),
    ];
    fields.extend(captures.iter().map(|name| Field::new(name, DataType::Utf8, false)));
    Arc::new(Schema::new(fields))
}

/// Where row `row` came from: `topic/partition@offset`, or what of that the batch still has; empty else.
pub fn position_of(batch: &RecordBatch, row: usize) -> String {
    let Some(offset) = batch.column_by_name(OFFSET).and_then(|c| c.as_primitive_opt::<Int64Type>()) else {
        return String::new();
    };
    let topic = batch.column_by_name(TOPIC).and_then(|c| c.as_string_opt::<i32>()).map_or("", |c| c.value(row));
    let partition = batch.column_by_name(PARTITION).and_then(|c| c.as_primitive_opt::<Int32Type>()).map_or(0, |c| c.value(row));
    format!("{topic}/{partition}@{}", offset.value(row))
}

/// The payload of row `row`, where the batch has one.
pub fn payload_of(batch: &RecordBatch, row: usize) -> Option<&[u8]> {
    batch.column_by_name(PAYLOAD).and_then(|c| c.as_binary_opt::<i32>()).map(|c| c.value(row))
}
