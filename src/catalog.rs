//! The one place that knows every component: fills the registry and provides what components share.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use afferent_engine::component::PlanContext;
use afferent_engine::registry::Registry;
use afferent_models::Repository;
use afferent_operators::ModelServer;

/// Every source, operator and sink.
pub fn registry() -> Registry {
    let mut registry = Registry::new();
    afferent_connectors::register(&mut registry);
    afferent_operators::register(&mut registry);
    registry
}

/// Where models are looked for: the folder asked for, else `models` beside the pipeline, then in the
/// working directory.
pub fn model_roots(pipeline: &Path, asked: Option<&Path>) -> Vec<PathBuf> {
    match asked {
        Some(folder) => vec![folder.to_owned()],
        None => vec![folder_of(pipeline).join("models"), PathBuf::from("models")],
    }
}

/// What planning this pipeline file may look at.
pub fn plan_context(pipeline: &Path, data_dir: &Path, models: Option<&Path>) -> PlanContext {
    let mut context = PlanContext { base: folder_of(pipeline), data_dir: data_dir.to_owned(), ..PlanContext::default() };
    context.provide(Arc::new(ModelServer::discovering(Repository::new(model_roots(pipeline, models)), data_dir)));
    context
}

/// The folder of a file, `.` for a bare name.
pub fn folder_of(file: &Path) -> PathBuf {
    match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}
