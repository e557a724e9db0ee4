//! The one place that knows every component: fills the registry and provides what components share.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use afferent_engine::component::PlanContext;
use afferent_engine::registry::Registry;
use afferent_models::{LazyRuntime, Repository};
use afferent_operators::ModelServer;

/// Every source, operator and sink.
pub fn registry() -> Registry {
    let mut registry = Registry::new();
    afferent_connectors::register(&mut registry);
    afferent_operators::register(&mut registry);
    registry
}

/// Where models are looked for: the folder asked for, else `models` beside the pipeline, then in the
/// working directory; once if that is the same.
fn model_roots(pipeline: &Path, asked: Option<&Path>) -> Vec<PathBuf> {
    match (asked, folder_of(pipeline)) {
        (Some(folder), _) => vec![folder.to_owned()],
        (None, beside) if beside == Path::new(".") => vec![PathBuf::from("models")],
        (None, beside) => vec![beside.join("models"), PathBuf::from("models")],
    }
}

/// What all pipelines of a process share, and where their files are.
pub struct Shared {
    data_dir: PathBuf,
    models: Option<PathBuf>,
    runtime: Arc<LazyRuntime>,
}

impl Shared {
    /// For pipelines with their data below `data_dir`; `models` is the repository asked for, if any.
    pub fn new(data_dir: &Path, models: Option<&Path>) -> Self {
        let runtime = LazyRuntime::discovering(data_dir);
        Self { data_dir: data_dir.to_owned(), models: models.map(Path::to_owned), runtime }
    }

    /// Says in the log what models run on, once planning has needed that; of the fallback also how to get the faster
    /// one.
    pub fn log_model_runtime(&self) {
        let Some(runtime) = self.runtime.found() else { return };
        match (runtime.notice(), runtime.library()) {
            (Some(notice), _) => tracing::warn!("{notice}"),
            (None, Some(library)) => tracing::info!(library = %library.display(), "models run on ONNX Runtime"),
            (None, None) => tracing::info!("models run on {}", runtime.backend()),
        }
    }

    /// What planning this pipeline file may look at.
    pub fn plan_context(&self, pipeline: &Path) -> PlanContext {
        let mut context = PlanContext::at(folder_of(pipeline), &self.data_dir);
        let repository = Repository::new(model_roots(pipeline, self.models.as_deref()));
        context.provide(Arc::new(ModelServer::new(repository, Arc::clone(&self.runtime))));
        context
    }
}

/// The folder of a file, `.` for a bare name.
fn folder_of(file: &Path) -> PathBuf {
    match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_looked_for_beside_the_pipeline_and_here_and_nowhere_twice() {
        let roots = |pipeline: &str, asked: Option<&str>| model_roots(Path::new(pipeline), asked.map(Path::new));
        assert_eq!(roots("a/p.yaml", None), [Path::new("a/models"), Path::new("models")]);
        assert_eq!(roots("p.yaml", None), [Path::new("models")]);
        assert_eq!(roots("./p.yaml", None), [Path::new("models")]);
        assert_eq!(roots("a/p.yaml", Some("m")), [Path::new("m")]);
    }
}
