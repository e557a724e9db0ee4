//! The ONNX Runtime backend: the library loaded at run time, and models as pools of sessions. The runtime
//! makes it; callers see only the `Model` trait. Invariant: a session is used by one thread at a time, which
//! the `ort` crate demands, because parts of ONNX Runtime are not thread-safe within a session.

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use arrow::buffer::Buffer;
use ort::environment::Environment;
use ort::logging::LogLevel;
use ort::session::{Session, SessionInputValue};
use ort::value::{DynValue, Outlet, PrimitiveTensorElementType, TensorElementType, TensorRef, ValueType};

use crate::backend::{InferenceError, Model, bind};
use crate::signature::{Dim, Signature, TensorSpec};
use crate::tensor::{DataType, Element, Tensor, TensorError};

/// Name of this backend.
pub(crate) const NAME: &str = "onnxruntime";

/// Why the library is not usable.
pub(crate) enum OpenError {
    /// It does not load, or is too old.
    Load(String),
    /// It loads and does not start.
    Start(String),
}

/// The library, loaded and started.
#[derive(Clone)]
pub(crate) struct Library {
    environment: Environment,
    path: PathBuf,
}

impl Library {
    /// Loads and starts ONNX Runtime. The `ort` crate allows this once in a process: afterwards it keeps the
    /// library that it has and refuses to start it again.
    pub(crate) fn open(path: &Path) -> Result<Library, OpenError> {
        // `ort` would look for a relative path beside the executable first; whoever set it meant the working
        // directory. A bare name that is no file here is for the dynamic loader.
        let path = match path.canonicalize() {
            Ok(found) => found,
            Err(_) => path.to_owned(),
        };
        let builder = ort::init_from(&path).map_err(|error| OpenError::Load(error.to_string()))?;
        let environment = builder
            .with_name("afferent")
            .with_telemetry(false)
            .with_logger(Arc::new(|level: LogLevel, _: &str, _: &str, location: &str, message: &str| match level {
                LogLevel::Fatal | LogLevel::Error => tracing::error!(location, "{message}"),
                LogLevel::Warning => tracing::warn!(location, "{message}"),
                LogLevel::Info => tracing::debug!(location, "{message}"),
                LogLevel::Verbose => tracing::trace!(location, "{message}"),
            }))
            .build()
            .map_err(|error| OpenError::Start(format!("{error}; a process that uses ONNX Runtime shares one `Runtime`")))?;
        // With a logger of one's own everything is logged, which costs time on every run.
        environment.set_log_level(LogLevel::Warning);
        Ok(Library { environment, path })
    }

    /// The file that was loaded.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

/// A model as a pool of sessions, each with one thread: the one that calls. As many calls run at once as
/// there are cores; further ones wait. A session holds its own copy of the weights, so the pool grows only
/// when calls really overlap.
pub(crate) struct OnnxRuntimeModel {
    signature: Signature,
    environment: Environment,
    bytes: Arc<[u8]>,
    pool: Mutex<Pool>,
    returned: Condvar,
    limit: usize,
}

struct Pool {
    idle: Vec<Session>,
    /// Sessions that are idle or in use.
    open: usize,
}

impl OnnxRuntimeModel {
    /// Opens a first session, which also proves that the file is good.
    pub(crate) fn load(library: &Library, bytes: &Arc<[u8]>) -> Result<OnnxRuntimeModel, String> {
        let environment = library.environment.clone();
        let session = open_session(&environment, bytes).map_err(|error| error.to_string())?;
        let signature = Signature { inputs: specs(session.inputs(), "input")?, outputs: specs(session.outputs(), "output")? };
        Ok(OnnxRuntimeModel {
            signature,
            environment,
            bytes: Arc::clone(bytes),
            pool: Mutex::new(Pool { idle: vec![session], open: 1 }),
            returned: Condvar::new(),
            limit: thread::available_parallelism().map_or(1, usize::from),
        })
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        // The lock is held only to push, pop and count: a panic elsewhere leaves nothing half done.
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for an idle session, or for the right to open another.
    fn slot(&self) -> Slot<'_> {
        let mut pool = self.pool();
        loop {
            if let Some(session) = pool.idle.pop() {
                return Slot { model: self, session: Some(session) };
            }
            if pool.open < self.limit {
                pool.open += 1;
                return Slot { model: self, session: None };
            }
            pool = self.returned.wait(pool).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// One call's share of the pool. Dropping it gives the session back, or the right to open one.
struct Slot<'a> {
    model: &'a OnnxRuntimeModel,
    session: Option<Session>,
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        let mut pool = self.model.pool();
        match self.session.take() {
            Some(session) => pool.idle.push(session),
            None => pool.open -= 1,
        }
        drop(pool);
        self.model.returned.notify_one();
    }
}

impl Model for OnnxRuntimeModel {
    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn run(&self, inputs: &[(&str, Tensor)]) -> Result<Vec<Tensor>, InferenceError> {
        let mut values = Vec::with_capacity(inputs.len());
        for (spec, tensor) in self.signature.inputs.iter().zip(bind(&self.signature, inputs)?) {
            values.push((spec.name.as_str(), input(tensor)?));
        }
        let mut slot = self.slot();
        let session = match slot.session.take() {
            Some(session) => session,
            None => open_session(&self.environment, &self.bytes).map_err(failed)?,
        };
        let session = slot.session.insert(session);
        let outputs = session.run(values).map_err(failed)?;
        self.signature.outputs.iter().zip(outputs.values()).map(|(spec, value)| output(spec, &value)).collect()
    }

    fn backend(&self) -> &'static str {
        NAME
    }
}

fn open_session(environment: &Environment, bytes: &[u8]) -> ort::Result<Session> {
    let mut builder = Session::builder(environment)?.with_intra_threads(1)?.with_log_level(LogLevel::Warning)?;
    builder.commit_from_memory(bytes)
}

fn failed(error: impl Display) -> InferenceError {
    InferenceError::Backend { backend: NAME, message: error.to_string() }
}

fn specs(outlets: &[Outlet], side: &str) -> Result<Vec<TensorSpec>, String> {
    outlets
        .iter()
        .map(|outlet| {
            let name = outlet.name();
            let ValueType::Tensor { ty, shape, .. } = outlet.dtype() else {
                return Err(format!(
                    "the {side} `{name}` is a {}, not a tensor (for scikit-learn, export with zipmap off)",
                    outlet.dtype()
                ));
            };
            let data_type =
                data_type(*ty).ok_or_else(|| format!("the {side} `{name}` has the element type {ty}, which is not supported"))?;
            let shape = shape.iter().map(|&extent| usize::try_from(extent).map_or(Dim::Any, Dim::Fixed)).collect();
            Ok(TensorSpec { name: name.to_owned(), data_type, shape })
        })
        .collect()
}

fn data_type(element: TensorElementType) -> Option<DataType> {
    match element {
        TensorElementType::Float32 => Some(DataType::Fp32),
        TensorElementType::Float64 => Some(DataType::Fp64),
        TensorElementType::Int8 => Some(DataType::Int8),
        TensorElementType::Int16 => Some(DataType::Int16),
        TensorElementType::Int32 => Some(DataType::Int32),
        TensorElementType::Int64 => Some(DataType::Int64),
        TensorElementType::Uint8 => Some(DataType::Uint8),
        TensorElementType::Uint16 => Some(DataType::Uint16),
        TensorElementType::Uint32 => Some(DataType::Uint32),
        TensorElementType::Uint64 => Some(DataType::Uint64),
        TensorElementType::Bool => Some(DataType::Bool),
        TensorElementType::String => Some(DataType::Bytes),
        _ => None,
    }
}

/// The tensor as ONNX Runtime takes it: borrowed, except truth values, which are copied.
fn input(tensor: &Tensor) -> Result<SessionInputValue<'_>, InferenceError> {
    match tensor.data_type() {
        DataType::Fp32 => borrowed::<f32>(tensor),
        DataType::Fp64 => borrowed::<f64>(tensor),
        DataType::Int8 => borrowed::<i8>(tensor),
        DataType::Int16 => borrowed::<i16>(tensor),
        DataType::Int32 => borrowed::<i32>(tensor),
        DataType::Int64 => borrowed::<i64>(tensor),
        DataType::Uint8 => borrowed::<u8>(tensor),
        DataType::Uint16 => borrowed::<u16>(tensor),
        DataType::Uint32 => borrowed::<u32>(tensor),
        DataType::Uint64 => borrowed::<u64>(tensor),
        DataType::Bool => {
            let values: Vec<bool> = tensor.bools().into_iter().flatten().collect();
            let value = ort::value::Tensor::<bool>::from_array((tensor.shape().to_vec(), values)).map_err(failed)?;
            Ok(value.into())
        }
        DataType::Bytes => Err(failed("BYTES tensors are not supported")),
    }
}

fn borrowed<'a, T: Element + PrimitiveTensorElementType>(tensor: &'a Tensor) -> Result<SessionInputValue<'a>, InferenceError> {
    let values: &'a [T] = tensor.as_slice().ok_or_else(|| failed(format!("{tensor} is not of type {}", T::DATA_TYPE)))?;
    let view: TensorRef<'a, T> = TensorRef::from_array_view((tensor.shape(), values)).map_err(failed)?;
    Ok(view.into())
}

/// Copies an output out of ONNX Runtime's memory.
fn output(spec: &TensorSpec, value: &DynValue) -> Result<Tensor, InferenceError> {
    match spec.data_type {
        DataType::Fp32 => copied::<f32>(spec, value),
        DataType::Fp64 => copied::<f64>(spec, value),
        DataType::Int8 => copied::<i8>(spec, value),
        DataType::Int16 => copied::<i16>(spec, value),
        DataType::Int32 => copied::<i32>(spec, value),
        DataType::Int64 => copied::<i64>(spec, value),
        DataType::Uint8 => copied::<u8>(spec, value),
        DataType::Uint16 => copied::<u16>(spec, value),
        DataType::Uint32 => copied::<u32>(spec, value),
        DataType::Uint64 => copied::<u64>(spec, value),
        DataType::Bool => {
            let (shape, values) = value.try_extract_tensor::<bool>().map_err(failed)?;
            Tensor::from_bools(extents(shape), values.iter().copied()).map_err(|error| unreadable(spec, error))
        }
        DataType::Bytes => Err(unreadable(spec, TensorError::Unsupported { data_type: DataType::Bytes })),
    }
}

fn copied<T: Element + PrimitiveTensorElementType>(spec: &TensorSpec, value: &DynValue) -> Result<Tensor, InferenceError> {
    let (shape, values) = value.try_extract_tensor::<T>().map_err(failed)?;
    let data = Buffer::from_slice_ref::<T, _>(values);
    Tensor::from_buffer(T::DATA_TYPE, extents(shape), data).map_err(|error| unreadable(spec, error))
}

/// The shape of a value that exists: no extent is negative.
fn extents(shape: &[i64]) -> Vec<usize> {
    shape.iter().map(|&extent| usize::try_from(extent).unwrap_or(0)).collect()
}

fn unreadable(spec: &TensorSpec, error: TensorError) -> InferenceError {
    InferenceError::Output { output: spec.name.clone(), error }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn element_types_map_one_to_one() {
        let elements = [
            TensorElementType::Float32,
            TensorElementType::Float64,
            TensorElementType::Int8,
            TensorElementType::Int16,
            TensorElementType::Int32,
            TensorElementType::Int64,
            TensorElementType::Uint8,
            TensorElementType::Uint16,
            TensorElementType::Uint32,
            TensorElementType::Uint64,
            TensorElementType::Bool,
            TensorElementType::String,
        ];
        assert_eq!(elements.map(data_type), DataType::ALL.map(Some));
        assert_eq!(data_type(TensorElementType::Float16), None);
    }

    #[test]
    fn a_session_pool_may_be_shared() {
        fn shared<T: Send + Sync>() {}
        shared::<OnnxRuntimeModel>();
    }
}
