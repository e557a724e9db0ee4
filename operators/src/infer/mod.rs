//! The `infer` operator: columns in, a model's answer as columns out. `config` is what an author writes and how it is
//! planned, `bind` fits columns to the model's inputs, `gather` makes tensors of them at run time, `outputs` makes
//! columns of what the model gives, `server` shares models among stages.

mod bind;
mod config;
mod element;
mod gather;
mod operator;
mod outputs;
mod server;

pub use config::{InferConfig, NanPolicy, OutputConfig, Stack};
pub use server::{ModelServer, Served};
