//! The `window` operator: functions over the last rows of each key. The invariant: what leaves depends on the rows
//! and their order alone, not on how they were cut into batches or where a checkpoint fell.

mod aggregate;
mod config;
mod held;
mod operator;
mod select;

pub use config::{Incomplete, WindowConfig};
