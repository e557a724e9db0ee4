//! The vocabulary and the runtime of Afferent.
//!
//! A pipeline is a graph of stages; Arrow batches flow one way, source -> operators -> sink, over bounded
//! edges; an epoch commits only when everything that came of it is durable. This crate knows no protocol,
//! no YAML, no SQL and no ONNX: it takes a [`graph::Graph`], so that embedders and tests build one in Rust.

mod assembly;
mod backoff;
pub mod batch;
pub mod checkpoint;
pub mod component;
pub mod config;
pub mod durable;
mod edge;
mod epoch;
pub mod error;
pub mod graph;
pub mod message;
pub mod metrics;
pub mod operator;
pub mod position;
pub mod registry;
pub mod rejected;
pub mod sabotage;
pub mod sink;
pub mod source;
mod stage;
pub mod supervisor;
pub mod testing;

pub use assembly::Runtimes;
pub use batch::{Batch, Element};
pub use epoch::Ending;
pub use error::{Class, Error, Result};
pub use operator::{AsyncOperator, Operator, Outputs, State, StateDelta};
pub use position::{Epoch, Position};
pub use rejected::{Given, Rejected};
pub use sink::{Prepared, Sink};
pub use source::{Pulled, Source};
