//! What flows along an edge. A [`Batch`] is an Arrow record batch with the instant its earliest row
//! entered the process; an [`Element`] is a batch or one of the marks that travel in line with the data.

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use tokio::time::Instant;

use crate::position::Epoch;

/// Rows on their way through the graph. Cloning copies no data.
#[derive(Clone, Debug)]
pub struct Batch {
    records: RecordBatch,
    ingest: Instant,
    bytes: usize,
}

impl Batch {
    /// Rows that entered the process just now.
    pub fn new(records: RecordBatch) -> Self {
        Self::since(records, Instant::now())
    }

    /// Rows whose earliest ancestor entered the process at `ingest`.
    pub fn since(records: RecordBatch, ingest: Instant) -> Self {
        let bytes = buffered_bytes(&records);
        Self { records, ingest, bytes }
    }

    /// Other rows made from this batch: same ingest instant.
    #[must_use]
    pub fn derive(&self, records: RecordBatch) -> Self {
        Self::since(records, self.ingest)
    }

    /// The rows.
    pub fn records(&self) -> &RecordBatch {
        &self.records
    }

    /// The rows, by value.
    pub fn into_records(self) -> RecordBatch {
        self.records
    }

    /// Their schema.
    pub fn schema(&self) -> SchemaRef {
        self.records.schema()
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.records.num_rows()
    }

    /// Bytes that the rows occupy; computed once, when the batch is made.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// When the earliest row entered the process; end-to-end latency counts from here.
    pub fn ingest(&self) -> Instant {
        self.ingest
    }
}

/// Bytes of the rows themselves. A slice of a large batch counts as its share of the rows, not as the
/// whole allocation that it keeps alive: limits would otherwise stop a stream of small slices.
fn buffered_bytes(records: &RecordBatch) -> usize {
    records
        .columns()
        .iter()
        .map(|column| {
            let data = column.to_data();
            data.get_slice_memory_size().unwrap_or_else(|_| column.get_array_memory_size())
        })
        .sum()
}

/// One element of an edge. Order on an edge is never changed.
#[derive(Clone, Debug)]
pub enum Element {
    /// Rows.
    Batch(Batch),
    /// Everything ahead of this mark belongs to the epoch or an earlier one.
    Barrier(Epoch),
    /// No rows follow. Barriers still do: an ended input goes on taking part in every epoch.
    End,
}
