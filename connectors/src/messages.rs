//! Rows of the message schema under construction: what every message source (MQTT, Kafka) fills, message by
//! message, and emits as one batch. The columns and their order are those of `afferent_engine::message`.

use std::sync::Arc;

use afferent_engine::{Error, Result, message};
use arrow::array::{
    ArrayRef, BinaryBuilder, Int32Builder, Int64Builder, MapBuilder, RecordBatch, StringBuilder, TimestampMillisecondBuilder,
};
use arrow::datatypes::SchemaRef;

/// One message on its way into a batch; everything is borrowed from the client library.
pub(crate) struct Message<'a> {
    /// The bytes.
    pub payload: &'a [u8],
    /// The key, where the protocol has one.
    pub key: Option<&'a [u8]>,
    /// The topic.
    pub topic: &'a str,
    /// Milliseconds since 1970, UTC.
    pub timestamp: i64,
    /// 0 where the protocol has none.
    pub partition: i32,
    /// Its number within the partition.
    pub offset: i64,
}

/// A batch that grows.
pub(crate) struct Messages {
    schema: SchemaRef,
    payload: BinaryBuilder,
    key: BinaryBuilder,
    topic: StringBuilder,
    timestamp: TimestampMillisecondBuilder,
    headers: MapBuilder<StringBuilder, BinaryBuilder>,
    partition: Int32Builder,
    offset: Int64Builder,
    captures: Vec<StringBuilder>,
    rows: usize,
    bytes: usize,
}

impl Messages {
    /// No rows yet; `schema` is one that [`message::schema`] made, with `captures` columns behind the fixed ones.
    pub(crate) fn new(schema: SchemaRef, captures: usize) -> Self {
        Self {
            schema,
            payload: BinaryBuilder::new(),
            key: BinaryBuilder::new(),
            topic: StringBuilder::new(),
            timestamp: TimestampMillisecondBuilder::new().with_timezone("UTC"),
            headers: MapBuilder::new(None, StringBuilder::new(), BinaryBuilder::new()),
            partition: Int32Builder::new(),
            offset: Int64Builder::new(),
            captures: (0..captures).map(|_| StringBuilder::new()).collect(),
            rows: 0,
            bytes: 0,
        }
    }

    /// Rows so far.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Bytes of payloads and keys so far.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Adds a row. `headers` is empty for a message without any (the column is null then); `captured` has a value
    /// for each capture column.
    ///
    /// # Errors
    /// Fatal when Arrow refuses the headers, which would be a fault of this function.
    pub(crate) fn push<'h>(
        &mut self,
        message: &Message<'_>,
        headers: impl Iterator<Item = (&'h str, Option<&'h [u8]>)>,
        captured: &[&str],
    ) -> Result<()> {
        self.payload.append_value(message.payload);
        self.key.append_option(message.key);
        self.topic.append_value(message.topic);
        self.timestamp.append_value(message.timestamp);
        self.partition.append_value(message.partition);
        self.offset.append_value(message.offset);
        let mut any = false;
        for (name, value) in headers {
            any = true;
            self.headers.keys().append_value(name);
            self.headers.values().append_option(value);
        }
        self.headers.append(any).map_err(Error::fatal)?;
        for (column, value) in self.captures.iter_mut().zip(captured) {
            column.append_value(value);
        }
        self.rows += 1;
        self.bytes += message.payload.len() + message.key.map_or(0, <[u8]>::len);
        Ok(())
    }

    /// Hands the rows over and starts anew.
    ///
    /// # Errors
    /// Fatal when Arrow refuses the columns, which would be a fault of this type.
    pub(crate) fn finish(&mut self) -> Result<RecordBatch> {
        self.rows = 0;
        self.bytes = 0;
        let mut columns: Vec<ArrayRef> = vec![
            Arc::new(self.payload.finish()),
            Arc::new(self.key.finish()),
            Arc::new(self.topic.finish()),
            Arc::new(self.timestamp.finish()),
            Arc::new(self.headers.finish()),
            Arc::new(self.partition.finish()),
            Arc::new(self.offset.finish()),
        ];
        for capture in &mut self.captures {
            columns.push(Arc::new(capture.finish()));
        }
        RecordBatch::try_new(Arc::clone(&self.schema), columns)
            .map_err(|e| Error::fatal(e).context("building a batch of messages"))
    }
}

/// Whether a schema has the message columns that a sink needs to pass messages on unchanged.
pub(crate) fn is_message_schema(schema: &SchemaRef) -> bool {
    schema.field_with_name(message::PAYLOAD).is_ok_and(|field| *field.data_type() == arrow::datatypes::DataType::Binary)
}

#[cfg(test)]
mod tests {
    use arrow::array::{Array, AsArray};

    use super::*;

    fn plain<'a>(payload: &'a [u8], offset: i64) -> Message<'a> {
        Message { payload, key: None, topic: "plant/a", timestamp: 1_000, partition: 0, offset }
    }

    #[test]
    fn a_batch_has_the_schema_of_the_engine_with_and_without_headers() {
        let schema = message::schema(&["site".to_owned()]);
        let mut messages = Messages::new(Arc::clone(&schema), 1);
        messages.push(&plain(b"one", 1), std::iter::empty(), &["a"]).unwrap();
        messages.push(&plain(b"two", 2), [("k", Some(b"v".as_slice())), ("n", None)].into_iter(), &["a"]).unwrap();
        assert_eq!((messages.rows(), messages.bytes()), (2, 6));
        let batch = messages.finish().unwrap();
        assert_eq!(batch.schema(), schema);
        let headers = batch.column_by_name(message::HEADERS).unwrap();
        assert!(headers.is_null(0) && !headers.is_null(1));
        assert_eq!(headers.as_map().value(1).len(), 2);
        assert_eq!(batch.column_by_name("site").unwrap().as_string::<i32>().value(1), "a");
        assert_eq!(message::position_of(&batch, 1), "plant/a/0@2");

        messages.push(&plain(b"three", 3), std::iter::empty(), &["b"]).unwrap();
        assert_eq!(messages.finish().unwrap().num_rows(), 1);
    }
}
