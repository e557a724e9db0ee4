//! The `table` sink and what reads its tables: Delta Lake with an fsynced tail in front of it. The sink
//! writes rows to the tail at every barrier and moves whole epochs into Delta in the background; SQL
//! reads both. Invariant: a row of a stored epoch is in the tail or in Delta, and a reader sees it once.
//!
//! Below the data directory, `tables/<name>/` is the Delta table, which any engine reads, and
//! `tails/<name>/` is its tail, which only Afferent reads.

mod commit;
mod config;
mod dead_letters;
mod delta;
mod frame;
mod reader;
mod schema;
mod sink;
mod store;
mod tail;

pub use config::TableConfig;
pub use dead_letters::{DEAD_LETTERS, DeadLetterTable};
pub use reader::{TableSnapshot, names, register_all, snapshot};
