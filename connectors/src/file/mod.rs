//! The `file` source and the `file` sink: JSON lines, CSV, Parquet and Arrow IPC. A source reads the files that a
//! pattern matches, one after another; a sink appends lines to one file, or fills a folder with one part per epoch.

mod append;
mod format;
mod pace;
mod parts;
mod reading;
mod sink;
mod source;

pub use sink::FileSinkConfig;
pub use source::FileSourceConfig;
