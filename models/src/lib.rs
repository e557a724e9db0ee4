//! Models: a repository in Triton's layout, and ONNX inference on two backends behind one trait.
//! Operators and the gateway call it. It deals in tensors: it knows nothing of batches, pipelines or
//! protocols, so that both callers share one model.
//!
//! ```text
//! Repository::load(name, version) -> ModelFile      bytes read once, config.pbtxt, labels
//! Runtime::discover(data_dir)     -> Runtime        ONNX Runtime where it is found, else tract
//! Runtime::load(&ModelFile)       -> Arc<dyn Model> checked against config.pbtxt
//! Model::run(&[(name, Tensor)])   -> Vec<Tensor>    in the order of Signature::outputs
//! ```
//!
//! A [`Runtime`] is a value that is made once and cloned: ONNX Runtime allows one environment in a process.

mod backend;
mod config;
mod discovery;
mod onnx;
mod onnxruntime;
mod pbtxt;
mod repository;
mod signature;
mod tensor;
mod tract;

pub use backend::{InferenceError, LazyRuntime, LoadError, Model, Runtime, RuntimeError};
pub use config::{ConfigMismatch, ModelConfig, TensorConfig, VersionPolicy};
pub use pbtxt::ConfigError;
pub use repository::{ModelFile, Repository, RepositoryError};
pub use signature::{Dim, Signature, TensorSpec};
pub use tensor::{DataType, Element, Tensor, TensorError};
