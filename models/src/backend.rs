//! Running models: the trait that both backends implement, and the runtime that chooses between them.
//! Operators, planners and the gateway hold a [`Runtime`] and the models it loads. Invariant: a model that was
//! asked to run on one backend never runs silently on another.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use crate::config::ConfigMismatch;
use crate::discovery::Search;
use crate::onnxruntime::{self, Library, OnnxRuntimeModel, OpenError};
use crate::repository::ModelFile;
use crate::signature::Signature;
use crate::tensor::{Tensor, TensorError};
use crate::tract::{self, TractModel};

/// A loaded model. Safe to run from many threads at once; a call occupies the thread it is made on.
pub trait Model: Send + Sync {
    /// What the model takes and gives.
    fn signature(&self) -> &Signature;

    /// Runs the model. Every input of the signature is given once, by name and in any order; the outputs come
    /// in the order of the signature.
    fn run(&self, inputs: &[(&str, Tensor)]) -> Result<Vec<Tensor>, InferenceError>;

    /// The backend that runs it: `onnxruntime` or `tract`.
    fn backend(&self) -> &'static str;
}

/// Why a call to a model failed. All but [`Backend`](InferenceError::Backend) are mistakes of the caller.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InferenceError {
    /// An input that the model does not have.
    #[error("the model has no input `{input}`; its signature is {signature}")]
    UnknownInput {
        /// The name that was given.
        input: String,
        /// The model's signature.
        signature: String,
    },
    /// An input that was not given.
    #[error("the input {input} was not given")]
    MissingInput {
        /// The input, with type and shape.
        input: String,
    },
    /// An input that was given twice.
    #[error("the input `{input}` was given more than once")]
    RepeatedInput {
        /// The name that was given.
        input: String,
    },
    /// An input of the wrong type or shape.
    #[error("the model takes {input}, but was given {given}")]
    InputMismatch {
        /// The input, with type and shape.
        input: String,
        /// Type and shape of what was given.
        given: String,
    },
    /// The backend gave something that is no tensor of ours.
    #[error("the output `{output}` cannot be read: {error}")]
    Output {
        /// Name of the output.
        output: String,
        /// What is wrong with it.
        error: TensorError,
    },
    /// The backend failed.
    #[error("{backend} failed: {message}")]
    Backend {
        /// `onnxruntime` or `tract`.
        backend: &'static str,
        /// What it said.
        message: String,
    },
}

/// Why a model file is not a model that can run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// The backend does not take the file.
    #[error("loading version {version} of the model `{model}` with {backend}: {message}")]
    Backend {
        /// The model.
        model: String,
        /// Its version.
        version: u64,
        /// `onnxruntime` or `tract`.
        backend: &'static str,
        /// What is wrong, with a suggestion where there is one.
        message: String,
    },
    /// The `config.pbtxt` contradicts the file.
    #[error("version {version} of the model `{model}`: {mismatch}")]
    Config {
        /// The model.
        model: String,
        /// Its version.
        version: u64,
        /// The contradiction.
        mismatch: Box<ConfigMismatch>,
    },
    /// There is no backend to load it with.
    #[error("{0}")]
    Runtime(String),
}

/// Why no backend could be chosen.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RuntimeError {
    /// `AFFERENT_MODEL_BACKEND` has a value that means nothing.
    #[error("AFFERENT_MODEL_BACKEND is `{value}`; it must be `onnxruntime` or `tract`")]
    UnknownBackend {
        /// The value.
        value: String,
    },
    /// `ORT_DYLIB_PATH` names a library that does not load.
    #[error(
        "loading ONNX Runtime from ORT_DYLIB_PATH=`{}`: {reason}; point it to libonnxruntime 1.{minimum} or newer, \
         or unset it",
        .path.display(),
        minimum = ort::MINOR_VERSION
    )]
    Library {
        /// The value of `ORT_DYLIB_PATH`.
        path: PathBuf,
        /// What the loader said.
        reason: String,
    },
    /// `AFFERENT_MODEL_BACKEND` asks for ONNX Runtime and there is none.
    #[error("AFFERENT_MODEL_BACKEND asks for onnxruntime, but it is not in {places}{failures}; {}", INSTALL)]
    NotFound {
        /// Where it was looked for.
        places: String,
        /// What was found and did not load.
        failures: String,
    },
    /// The library loads and does not start, or was started by another [`Runtime`] of this process.
    #[error("starting ONNX Runtime from `{}`: {reason}", .path.display())]
    Start {
        /// The library.
        path: PathBuf,
        /// What it said.
        reason: String,
    },
}

/// How one gets ONNX Runtime.
const INSTALL: &str =
    "get it with `pip install onnxruntime` in a virtual environment, or set ORT_DYLIB_PATH to the path of libonnxruntime.so";

/// The backend that loads models. Cheap to clone; make one and pass it on, because ONNX Runtime can be
/// started only once in a process.
#[derive(Clone)]
pub struct Runtime {
    engine: Engine,
    notice: Option<String>,
}

#[derive(Clone)]
enum Engine {
    OnnxRuntime(Library),
    Tract,
}

impl Runtime {
    /// Chooses the backend by what is installed: ONNX Runtime from `ORT_DYLIB_PATH`, from `lib/` of the data
    /// directory, from an installed `onnxruntime` Python package or from the system; tract when there is
    /// none, and then [`notice`](Runtime::notice) says how to get it. `AFFERENT_MODEL_BACKEND=tract` takes
    /// tract at once, `=onnxruntime` takes nothing else.
    ///
    /// # Errors
    /// What is asked for by a variable and cannot be had is an error, never replaced by something else. A
    /// second call in a process that has started ONNX Runtime fails: clone the first runtime.
    pub fn discover(data_dir: &Path) -> Result<Runtime, RuntimeError> {
        Runtime::from_search(&Search::from_environment(data_dir))
    }

    /// The pure-Rust backend, whatever is installed.
    pub fn tract() -> Runtime {
        Runtime { engine: Engine::Tract, notice: None }
    }

    fn from_search(search: &Search) -> Result<Runtime, RuntimeError> {
        let required = match search.backend.as_deref() {
            Some("tract") => return Ok(Runtime::tract()),
            Some("onnxruntime") => true,
            None => false,
            Some(value) => {
                return Err(RuntimeError::UnknownBackend { value: value.into() });
            }
        };
        if let Some(path) = &search.library {
            return match Library::open(path) {
                Ok(library) => Ok(Runtime::with_library(library)),
                Err(OpenError::Load(reason)) => Err(RuntimeError::Library { path: path.clone(), reason }),
                Err(OpenError::Start(reason)) => Err(RuntimeError::Start { path: path.clone(), reason }),
            };
        }
        let mut failures = String::new();
        for path in search.candidates() {
            match Library::open(&path) {
                Ok(library) => return Ok(Runtime::with_library(library)),
                Err(OpenError::Start(reason)) => return Err(RuntimeError::Start { path, reason }),
                Err(OpenError::Load(reason)) => {
                    tracing::debug!(path = %path.display(), reason = %reason, "not a usable ONNX Runtime");
                    // A bare name is only a question to the loader; that it found nothing is no news.
                    if path.components().nth(1).is_some() {
                        failures.push_str("; ");
                        failures.push_str(&reason);
                    }
                }
            }
        }
        let places = search.places();
        if required {
            return Err(RuntimeError::NotFound { places, failures });
        }
        Ok(Runtime {
            engine: Engine::Tract,
            notice: Some(format!(
                "ONNX Runtime is not in {places}{failures}; models run on tract, which is slower and knows fewer \
                 operators; {INSTALL}"
            )),
        })
    }

    fn with_library(library: Library) -> Runtime {
        Runtime { engine: Engine::OnnxRuntime(library), notice: None }
    }

    /// The backend that models are loaded with: `onnxruntime` or `tract`.
    pub fn backend(&self) -> &'static str {
        match self.engine {
            Engine::OnnxRuntime(_) => onnxruntime::NAME,
            Engine::Tract => tract::NAME,
        }
    }

    /// The ONNX Runtime library that was loaded.
    pub fn library(&self) -> Option<&Path> {
        match &self.engine {
            Engine::OnnxRuntime(library) => Some(library.path()),
            Engine::Tract => None,
        }
    }

    /// What the user should be told once: that ONNX Runtime was not found, and how to get it.
    pub fn notice(&self) -> Option<&str> {
        self.notice.as_deref()
    }

    /// Loads a model and checks its `config.pbtxt` against it.
    pub fn load(&self, file: &ModelFile) -> Result<Arc<dyn Model>, LoadError> {
        let loaded: Result<Arc<dyn Model>, String> = match &self.engine {
            Engine::OnnxRuntime(library) => {
                OnnxRuntimeModel::load(library, &file.bytes).map(|model| Arc::new(model) as Arc<dyn Model>)
            }
            Engine::Tract => TractModel::load(&file.bytes).map(|model| Arc::new(model) as Arc<dyn Model>),
        };
        let model = loaded.map_err(|message| LoadError::Backend {
            model: file.name.clone(),
            version: file.version,
            backend: self.backend(),
            message,
        })?;
        file.config.check(model.signature()).map_err(|mismatch| LoadError::Config {
            model: file.name.clone(),
            version: file.version,
            mismatch: Box::new(mismatch),
        })?;
        Ok(model)
    }
}

impl fmt::Debug for Runtime {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Runtime").field("backend", &self.backend()).field("library", &self.library()).finish()
    }
}

/// The tensors in the order of the signature's inputs, each of the declared type and shape.
pub(crate) fn bind<'a>(signature: &Signature, inputs: &'a [(&str, Tensor)]) -> Result<Vec<&'a Tensor>, InferenceError> {
    if let Some((input, _)) = inputs.iter().find(|(name, _)| signature.input(name).is_none()) {
        return Err(InferenceError::UnknownInput { input: (*input).into(), signature: signature.to_string() });
    }
    signature
        .inputs
        .iter()
        .map(|spec| {
            let mut given = inputs.iter().filter(|(name, _)| *name == spec.name);
            let Some((_, tensor)) = given.next() else {
                return Err(InferenceError::MissingInput { input: spec.to_string() });
            };
            if given.next().is_some() {
                return Err(InferenceError::RepeatedInput { input: spec.name.clone() });
            }
            if !spec.accepts(tensor) {
                return Err(InferenceError::InputMismatch { input: spec.to_string(), given: tensor.to_string() });
            }
            Ok(tensor)
        })
        .collect()
}

/// A runtime that is looked for at first use: most pipelines need none, and looking may ask Python. One in a process,
/// since ONNX Runtime allows one environment only.
pub struct LazyRuntime {
    data_dir: PathBuf,
    found: OnceLock<Result<Runtime, String>>,
}

impl LazyRuntime {
    /// Will be looked for as [`Runtime::discover`] does.
    pub fn discovering(data_dir: &Path) -> Arc<Self> {
        Arc::new(Self { data_dir: data_dir.to_owned(), found: OnceLock::new() })
    }

    /// This one.
    pub fn ready(runtime: Runtime) -> Arc<Self> {
        Arc::new(Self { data_dir: PathBuf::new(), found: OnceLock::from(Ok(runtime)) })
    }

    /// The runtime, if it was needed so far and there is one.
    pub fn found(&self) -> Option<&Runtime> {
        self.found.get()?.as_ref().ok()
    }

    /// The runtime, looked for at the first call.
    ///
    /// # Errors
    /// As [`Runtime::discover`], each time.
    pub fn get(&self) -> Result<&Runtime, LoadError> {
        let found = self.found.get_or_init(|| Runtime::discover(&self.data_dir).map_err(|error| error.to_string()));
        found.as_ref().map_err(|told| LoadError::Runtime(told.clone()))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::TempDir;

    use super::*;
    use crate::repository::Repository;
    use crate::signature::{Dim, TensorSpec};
    use crate::tensor::DataType;

    fn signature() -> Signature {
        let spec = |name: &str| TensorSpec { name: name.into(), data_type: DataType::Fp32, shape: vec![Dim::Any, Dim::Fixed(2)] };
        Signature { inputs: vec![spec("a"), spec("b")], outputs: vec![] }
    }

    fn rows(rows: usize) -> Tensor {
        Tensor::from_vec(vec![rows, 2], vec![0.0_f32; rows * 2]).unwrap()
    }

    #[test]
    fn inputs_are_bound_by_name() {
        let inputs = [("b", rows(2)), ("a", rows(1))];
        let bound = bind(&signature(), &inputs).unwrap();
        assert_eq!(bound, [&inputs[1].1, &inputs[0].1]);
    }

    #[test]
    fn wrong_inputs_are_named() {
        let error = |inputs: &[(&str, Tensor)]| bind(&signature(), inputs).unwrap_err().to_string();
        assert_eq!(
            error(&[("a", rows(1)), ("c", rows(1))]),
            "the model has no input `c`; its signature is (a: FP32[?,2], b: FP32[?,2]) -> ()"
        );
        assert_eq!(error(&[("a", rows(1))]), "the input b: FP32[?,2] was not given");
        assert_eq!(error(&[("a", rows(1)), ("b", rows(1)), ("a", rows(1))]), "the input `a` was given more than once");
        let long = Tensor::from_vec(vec![1, 3], vec![0.0_f32; 3]).unwrap();
        assert_eq!(error(&[("a", long), ("b", rows(1))]), "the model takes a: FP32[?,2], but was given FP32[1,3]");
    }

    #[test]
    fn without_a_library_tract_runs_and_says_so() {
        let data_dir = TempDir::new().unwrap();
        let search = Search { data_dir: data_dir.path().into(), ..Search::default() };
        let runtime = Runtime::from_search(&search).unwrap();
        assert_eq!((runtime.backend(), runtime.library()), ("tract", None));
        let notice = runtime.notice().unwrap();
        assert!(notice.contains("pip install onnxruntime"), "{notice}");
        assert!(notice.contains("ORT_DYLIB_PATH"), "{notice}");
        assert_eq!(Runtime::tract().notice(), None);
    }

    #[test]
    fn a_library_that_does_not_load_is_named_and_passed_over() {
        let data_dir = TempDir::new().unwrap();
        let lib = data_dir.path().join("lib");
        fs::create_dir(&lib).unwrap();
        let name = format!("{}onnxruntime{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
        let broken = lib.join(name);
        fs::write(&broken, b"not a library").unwrap();
        let search = Search { data_dir: data_dir.path().into(), ..Search::default() };
        let runtime = Runtime::from_search(&search).unwrap();
        let notice = runtime.notice().unwrap();
        assert!(notice.contains(broken.to_str().unwrap()), "{notice}");
        let required = Search { backend: Some("onnxruntime".into()), ..search };
        let error = Runtime::from_search(&required).unwrap_err();
        assert!(matches!(error, RuntimeError::NotFound { .. }), "{error}");
    }

    #[test]
    fn a_broken_explicit_path_is_an_error() {
        let search = Search { library: Some("/no/such/libonnxruntime.so".into()), ..Search::default() };
        let error = Runtime::from_search(&search).unwrap_err();
        assert!(matches!(error, RuntimeError::Library { .. }));
        let text = error.to_string();
        assert!(text.starts_with("loading ONNX Runtime from ORT_DYLIB_PATH=`/no/such/libonnxruntime.so`: "), "{text}");
    }

    #[test]
    fn a_variable_chooses_the_backend() {
        let with = |backend: &str| {
            Runtime::from_search(&Search {
                backend: Some(backend.into()),
                library: Some("/no/such/libonnxruntime.so".into()),
                ..Search::default()
            })
        };
        let runtime = with("tract").unwrap();
        assert_eq!((runtime.backend(), runtime.notice()), ("tract", None));
        assert_eq!(
            with("torch").unwrap_err().to_string(),
            "AFFERENT_MODEL_BACKEND is `torch`; it must be `onnxruntime` or `tract`"
        );
    }

    fn example(folder: &str, name: &str) -> (ModelFile, Arc<dyn Model>) {
        let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples").join(folder).join("models");
        let file = Repository::new(vec![models]).load(name, None).unwrap();
        let model = Runtime::tract().load(&file).unwrap();
        (file, model)
    }

    #[test]
    fn tract_scores_the_shuttle_example_row_by_row_and_at_once_alike() {
        let (_, model) = example("shuttle-anomaly", "shuttle");
        assert_eq!(model.signature().to_string(), "(readings: FP32[?,9]) -> (score: FP32[?])");
        let rows: Vec<Vec<f32>> = (0..3_u8).map(|row| (0..9_u8).map(|column| f32::from(row * 20 + column)).collect()).collect();
        let scores = |rows: &[Vec<f32>]| {
            let readings = Tensor::from_vec(vec![rows.len(), 9], rows.concat()).unwrap();
            let outputs = model.run(&[("readings", readings)]).unwrap();
            outputs[0].as_f32().unwrap().to_vec()
        };
        let at_once = scores(&rows);
        assert_eq!(at_once.len(), 3);
        assert!(at_once[0] != at_once[1], "{at_once:?}");
        for (row, score) in rows.iter().zip(&at_once) {
            let alone = scores(std::slice::from_ref(row));
            assert!((alone[0] - score).abs() <= 1e-5 * score.abs(), "{alone:?} {score}");
        }
    }

    #[test]
    fn tract_gives_a_probability_to_every_label_of_the_exercise_example() {
        let (file, model) = example("exercise-watch", "exercise");
        let windows = Tensor::from_vec(vec![2, 100, 6], vec![0.5_f32; 1200]).unwrap();
        let outputs = model.run(&[("window", windows)]).unwrap();
        assert_eq!(outputs[0].shape(), [2, file.labels["probabilities"].len()]);
        for row in outputs[0].as_f32().unwrap().chunks(7) {
            assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-5, "{row:?}");
        }
    }
}
