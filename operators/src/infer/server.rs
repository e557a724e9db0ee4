//! The models of a pipeline: one repository, and every model loaded once, so that several stages share a session. The
//! runtime is that of the whole process. `src/catalog.rs` provides it to planning; `infer` takes models from it.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use afferent_engine::component::Problem;
use afferent_models::{LazyRuntime, Model, ModelFile, Repository, RepositoryError};

use crate::columns;

/// A model that is loaded.
pub struct Served {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: u64,
    /// Labels by output name: the label of class `i` is the one at `i`.
    pub labels: HashMap<String, Arc<[String]>>,
    /// Rows that one call may hold, where its `config.pbtxt` says so.
    pub max_batch: Option<usize>,
    /// What runs it.
    pub model: Arc<dyn Model>,
}

/// Without the weights, which have no place in a log line.
impl fmt::Debug for Served {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Served").field("name", &self.name).field("version", &self.version).finish_non_exhaustive()
    }
}

/// Where `infer` gets its models; one a pipeline.
pub struct ModelServer {
    repository: Repository,
    runtime: Arc<LazyRuntime>,
    loaded: Mutex<HashMap<(String, u64), Arc<Served>>>,
}

impl ModelServer {
    /// Serves the models of a repository; none is loaded yet.
    pub fn new(repository: Repository, runtime: Arc<LazyRuntime>) -> Self {
        Self { repository, runtime, loaded: Mutex::default() }
    }

    /// Where the models are.
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// The model, loaded if it is not yet: of the version asked for, else the newest that its policy serves.
    ///
    /// # Errors
    /// A problem of a stage that has `model` and `version` in its configuration.
    pub fn load(&self, name: &str, version: Option<u64>) -> Result<Arc<Served>, Problem> {
        let file = self.repository.load(name, version).map_err(|error| self.problem(error))?;
        // Loaded under the lock: two stages with one model must not load it twice.
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (file.name.clone(), file.version);
        if let Some(served) = loaded.get(&key) {
            return Ok(Arc::clone(served));
        }
        let unusable = |told: String| Problem::new("unreadable-model", "/model", told);
        let runtime = self.runtime.get().map_err(|error| unusable(error.to_string()))?;
        let model = runtime.load(&file).map_err(|error| unusable(error.to_string()))?;
        let served = Arc::new(served(file, model));
        loaded.insert(key, Arc::clone(&served));
        Ok(served)
    }

    fn problem(&self, error: RepositoryError) -> Problem {
        match error {
            RepositoryError::Unknown { name, looked, place, .. } => {
                let names = self.repository.names();
                let known: Vec<&str> = names.iter().map(String::as_str).collect();
                let help = columns::one_of(&name, &known, "models");
                Problem::new("missing-model", "/model", format!("no model `{name}` in {looked}")).help(format!(
                    "{help}; put its ONNX file at `{}`, or name the folder of your models with `--models`",
                    place.display()
                ))
            }
            RepositoryError::UnknownVersion { name, wanted, directory, found, .. } => Problem::new(
                "missing-model",
                "/version",
                format!("no version {wanted} of the model `{name}` in `{}`", directory.display()),
            )
            .help(found),
            other => Problem::new("unreadable-model", "/model", other.to_string()),
        }
    }
}

fn served(file: ModelFile, model: Arc<dyn Model>) -> Served {
    Served {
        max_batch: usize::try_from(file.config.max_batch_size).ok().filter(|rows| *rows > 0),
        labels: file.labels.into_iter().map(|(output, labels)| (output, labels.into())).collect(),
        name: file.name,
        version: file.version,
        model,
    }
}

#[cfg(test)]
mod tests {
    use afferent_models::Runtime;

    use super::*;

    fn server() -> ModelServer {
        let models = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/shuttle-anomaly/models");
        ModelServer::new(Repository::new(vec![models.into()]), LazyRuntime::ready(Runtime::tract()))
    }

    #[test]
    fn a_model_is_loaded_once() {
        let server = server();
        let first = server.load("shuttle", None).unwrap();
        let second = server.load("shuttle", Some(1)).unwrap();
        assert!(Arc::ptr_eq(&first, &second));
        assert_eq!((first.version, first.max_batch), (1, Some(4096)));
    }

    #[test]
    fn what_is_missing_is_told_with_what_is_there() {
        let problem = server().load("shutle", None).unwrap_err();
        assert_eq!((problem.code, problem.path.as_str()), ("missing-model", "/model"));
        assert!(problem.message.contains("shuttle-anomaly/models"), "{}", problem.message);
        assert!(problem.help.unwrap().starts_with("did you mean `shuttle`?"));
        let problem = server().load("shuttle", Some(7)).unwrap_err();
        assert_eq!((problem.code, problem.path.as_str()), ("missing-model", "/version"));
        assert_eq!(problem.help.as_deref(), Some("found: 1"));
    }
}
