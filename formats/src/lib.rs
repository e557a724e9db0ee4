//! Bytes to Arrow record batches and back, under a declared schema. Called by the `decode` and `encode`
//! operators and by connectors that read or write whole files; it knows neither stages nor protocols.
//!
//! Two ways in and out:
//!
//! - *messages*: [`Decoder`] and [`Encoder`], one payload of bytes at a time (JSON, CSV, Arrow IPC);
//! - *files*: [`FileReader`] and [`FileWriter`], bounded and resumable by row (JSON lines, CSV, Parquet, Arrow).
//!
//! Three promises hold everywhere:
//!
//! - a payload or line is taken whole or rejected whole, with a reason, and never disturbs its neighbours;
//! - nothing is guessed per batch: the schema is declared ([`Declaration`]) or that of the file;
//! - no value is bent to fit: a fraction is not cut to an integer, an overflow does not become infinity,
//!   text is not read as a number in a format that has numbers.
//!
//! *Why JSON is not read with `arrow-json`.* Its decoder works on whole batches and gives up at the first bad
//! record, so one bad message in a thousand would have the other 999 decoded twice; it takes `{"a":1,,}`, cuts
//! 1.7 to 1 for an integer column, turns 1e39 into infinity for a float32, and describes a wrong value
//! by recursion without a bound. Here `serde_json` parses (strictly, once) and each value goes straight into
//! the vector of its column, which is cut back to the row before when a payload turns out bad. Encoding does
//! use `arrow-json`.

mod arrow_ipc;
mod codec;
mod column;
mod columnar;
mod csv;
mod error;
mod file_writer;
mod files;
mod fit;
mod infer;
mod json;
mod json_encoder;
mod json_value;
mod lines;
mod payload;
mod record;
mod rows;
mod schema;
mod schema_text;

pub use arrow_ipc::{ArrowDecoder, ArrowEncoder};
pub use codec::{Decoder, Encoder, Format};
pub use csv::{CsvDecoder, CsvEncoder, CsvOptions};
pub use error::FormatError;
pub use file_writer::FileWriter;
pub use files::{FileFormat, FileReader, FileRows, ReadOptions, RejectedRow};
pub use infer::{infer_csv, infer_file, infer_json};
pub use json::JsonDecoder;
pub use json_encoder::JsonEncoder;
pub use payload::{Decoded, Encoded, Fault, Limits, Malformed, Missing, Policy, Rejected, Unknown};
pub use schema::{Declaration, FieldType, Kind, Scalar};
