//! Arrow IPC messages: a payload is one IPC stream (schema and batches), decoded and checked by column name against
//! the declared schema. Called through [`crate::Decoder`] and [`crate::Encoder`]. Nothing that a payload claims about
//! sizes is believed before it is compared with the payload's own length, since a failed allocation
//! cannot be caught.

use std::panic::{AssertUnwindSafe, catch_unwind};

use arrow::array::{BinaryArray, RecordBatch};
use arrow::buffer::Buffer;
use arrow::compute::concat_batches;
use arrow::datatypes::SchemaRef;
use arrow::ipc::reader::StreamDecoder;
use arrow::ipc::root_as_message;
use arrow::ipc::writer::StreamWriter;

use crate::error::FormatError;
use crate::fit::fit;
use crate::payload::{Decoded, Fault, Limits, Policy, Reason, Rejected, bounded};
use crate::rows::check_payload;

/// Reads Arrow IPC streams into rows of a declared schema.
pub struct ArrowDecoder {
    schema: SchemaRef,
    policy: Policy,
    limits: Limits,
}

impl ArrowDecoder {
    /// A decoder for `schema`, of any types.
    pub fn new(schema: SchemaRef, policy: Policy, limits: Limits) -> Self {
        Self { schema, policy, limits }
    }

    /// The declared schema, which every batch has.
    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// Decodes each payload for itself.
    ///
    /// # Errors
    /// Only if Arrow cannot join the batches; bad payloads are in [`Decoded::rejected`].
    pub fn decode(&mut self, payloads: &BinaryArray) -> Result<Decoded, FormatError> {
        let (mut batches, mut origin, mut rejected) = (Vec::new(), Vec::new(), Vec::new());
        for (payload, bytes) in (0_u32..).zip(payloads.iter()) {
            let read = check_payload(bytes, self.limits).and_then(|bytes| self.read(bytes));
            match read {
                Ok(read) => {
                    for batch in read {
                        origin.extend(std::iter::repeat_n(payload, batch.num_rows()));
                        batches.push(batch);
                    }
                }
                Err(reason) => {
                    rejected.push(Rejected { payload, fault: reason.fault, reason: bounded(reason.text) });
                }
            }
        }
        Ok(Decoded { batch: concat_batches(&self.schema, &batches)?, origin, rejected })
    }

    fn read(&self, payload: &[u8]) -> Result<Vec<RecordBatch>, Reason> {
        // The copy is aligned, which a place within a batch of payloads is not.
        let buffer = Buffer::from(payload);
        check_framing(&buffer)?;
        // Arrow's reader slices buffers by offsets that the payload states and panics where they lie outside.
        let read = catch_unwind(AssertUnwindSafe(|| self.read_stream(buffer)));
        read.unwrap_or_else(|_| Err(Reason::new(Fault::Malformed, "inconsistent arrow ipc stream")))
    }

    fn read_stream(&self, mut buffer: Buffer) -> Result<Vec<RecordBatch>, Reason> {
        // No encoding needs less than a bit for a row; a null column of 2^60 rows would be free until it is cast.
        let most_rows = buffer.len().saturating_mul(8);
        let mut decoder = StreamDecoder::new();
        let (mut batches, mut rows) = (Vec::new(), 0_usize);
        while let Some(batch) = decoder.decode(&mut buffer).map_err(|error| error.to_string())? {
            rows = rows.saturating_add(batch.num_rows());
            if rows > most_rows {
                return Err(format!("{rows} rows in fewer bytes than they can take").into());
            }
            batches.push(fit(&batch, &self.schema, self.policy)?);
        }
        decoder.finish().map_err(|error| error.to_string())?;
        match decoder.schema() {
            Some(_) => Ok(batches),
            None => Err(Reason::new(Fault::Malformed, "no schema in the arrow ipc stream")),
        }
    }
}

/// Walks over the messages of a stream: each must lie within the payload, and none may be compressed, since
/// the uncompressed size is allocated as stated.
///
/// The layout is that of <https://arrow.apache.org/docs/format/Columnar.html#encapsulated-message-format>.
fn check_framing(stream: &[u8]) -> Result<(), String> {
    const CONTINUATION: u32 = u32::MAX;
    let truncated = || "truncated arrow ipc stream".to_owned();
    let mut rest = stream;
    while !rest.is_empty() {
        let mut size = take_u32(&mut rest).ok_or_else(truncated)?;
        if size == CONTINUATION {
            size = take_u32(&mut rest).ok_or_else(truncated)?;
        }
        if size == 0 {
            let nothing_follows = rest.is_empty();
            return nothing_follows.then_some(()).ok_or_else(|| "bytes after the end of the arrow ipc stream".to_owned());
        }
        let size = usize::try_from(size).map_err(|error| error.to_string())?;
        let (metadata, after) = rest.split_at_checked(size).ok_or_else(truncated)?;
        let message = root_as_message(metadata).map_err(|error| format!("not arrow ipc: {error}"))?;
        let body = usize::try_from(message.bodyLength()).map_err(|_| "a message body of negative length".to_owned())?;
        (_, rest) = after.split_at_checked(body).ok_or_else(truncated)?;
        let dictionary = message.header_as_dictionary_batch();
        let batch = message.header_as_record_batch().or_else(|| dictionary.and_then(|dictionary| dictionary.data()));
        if batch.is_some_and(|batch| batch.compression().is_some()) {
            return Err("compressed arrow ipc; send it uncompressed".to_owned());
        }
    }
    Ok(())
}

fn take_u32(rest: &mut &[u8]) -> Option<u32> {
    let (bytes, after) = rest.split_first_chunk::<4>()?;
    *rest = after;
    Some(u32::from_le_bytes(*bytes))
}

/// Writes a batch as one Arrow IPC stream.
pub struct ArrowEncoder {
    schema: SchemaRef,
}

impl ArrowEncoder {
    /// An encoder for batches of `schema`.
    pub fn new(schema: SchemaRef) -> Self {
        Self { schema }
    }

    /// One payload that holds the schema and all rows; none for a batch without rows.
    ///
    /// # Errors
    /// [`FormatError::Arrow`] for a type that IPC does not carry.
    pub fn encode(&self, batch: &RecordBatch) -> Result<BinaryArray, FormatError> {
        if batch.num_rows() == 0 {
            return Ok(BinaryArray::from_iter_values(std::iter::empty::<&[u8]>()));
        }
        let mut writer = StreamWriter::try_new(Vec::new(), &self.schema)?;
        writer.write(batch)?;
        Ok(BinaryArray::from_iter_values([writer.into_inner()?]))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{Array, ArrayRef, AsArray, Int64Array, StringArray};
    use arrow::datatypes::Int64Type;

    use super::*;

    fn batch(from: i64) -> RecordBatch {
        let text = |n: i64| format!("row {n}");
        RecordBatch::try_from_iter_with_nullable([
            ("n", Arc::new(Int64Array::from_iter_values(from..from + 3)) as ArrayRef, true),
            ("s", Arc::new(StringArray::from_iter_values((from..from + 3).map(text))) as ArrayRef, true),
        ])
        .unwrap()
    }

    fn stream(batches: &[RecordBatch]) -> Vec<u8> {
        let mut writer = StreamWriter::try_new(Vec::new(), &batches[0].schema()).unwrap();
        for batch in batches {
            writer.write(batch).unwrap();
        }
        writer.into_inner().unwrap()
    }

    fn decoder() -> ArrowDecoder {
        ArrowDecoder::new(batch(0).schema(), Policy::default(), Limits::default())
    }

    #[test]
    fn streams_of_several_batches_keep_their_origin() {
        let payloads = [stream(&[batch(0), batch(3)]), b"junk".to_vec(), stream(&[batch(6)])];
        let decoded = decoder().decode(&BinaryArray::from_iter_values(&payloads)).unwrap();
        assert_eq!(decoded.origin, [0, 0, 0, 0, 0, 0, 2, 2, 2]);
        let n = decoded.batch.column(0).as_primitive::<Int64Type>();
        assert_eq!(n.values(), &[0, 1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(decoded.rejected.len(), 1);
        assert_eq!(decoded.rejected[0].payload, 1);
    }

    #[test]
    fn no_truncation_and_no_changed_byte_disturbs_the_neighbours() {
        let good = stream(&[batch(0)]);
        let mut payloads: Vec<Vec<u8>> = Vec::new();
        for end in 0..good.len() {
            payloads.push(good[..end].to_vec());
        }
        for at in 0..good.len() {
            for value in [0x00, 0x7f, 0xff] {
                let mut changed = good.clone();
                changed[at] = value;
                payloads.push(changed);
            }
        }
        payloads.push([good.clone(), b"more".to_vec()].concat());
        let last = payloads.len() as u32;
        payloads.push(good.clone());
        let decoded = decoder().decode(&BinaryArray::from_iter_values(&payloads)).unwrap();
        let cut = |payload: u32| decoded.rejected.iter().any(|r| r.payload == payload);
        assert!(cut(0) && cut(3) && cut(9) && cut(last - 1));
        assert!(!cut(last));
        let rows = decoded.batch.num_rows();
        let tail = decoded.batch.slice(rows - 3, 3);
        assert_eq!(tail, batch(0));
    }

    #[test]
    fn claims_of_size_are_not_believed() {
        let huge = [0xff, 0xff, 0xff, 0xff, 0xf0, 0xff, 0xff, 0x7f, 1, 2, 3, 4];
        let decoded = decoder().decode(&BinaryArray::from_iter_values([&huge[..]])).unwrap();
        assert_eq!(decoded.rejected[0].reason, "truncated arrow ipc stream");
    }

    #[test]
    fn other_columns_are_rejected_with_their_name() {
        let other = RecordBatch::try_from_iter([("s", batch(0).column(0).clone())]).unwrap();
        let decoded = decoder().decode(&BinaryArray::from_iter_values([stream(&[other])])).unwrap();
        assert_eq!(decoded.rejected[0].fault.code(), "wrong_type");
        let reason = &decoded.rejected[0].reason;
        assert_eq!(reason, "column 's' is int64, declared as utf8");
    }

    #[test]
    fn a_batch_comes_back() {
        let encoder = ArrowEncoder::new(batch(0).schema());
        let payloads = encoder.encode(&batch(0)).unwrap();
        assert_eq!(payloads.len(), 1);
        let decoded = decoder().decode(&payloads).unwrap();
        assert_eq!(decoded.batch, batch(0));
        assert_eq!(encoder.encode(&batch(0).slice(0, 0)).unwrap().len(), 0);
    }
}
