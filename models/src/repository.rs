//! The model repository on disk: `<root>/<name>/<version>/model.onnx`, with an optional `config.pbtxt` and
//! label files beside the version directories. Runtimes and planners load through it. A model is read once,
//! into memory: what was loaded stays the same whatever happens to the files afterwards.
//!
//! Layout: `docs/user_guide/model_repository.md` of triton-inference-server/server.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use crate::config::{ModelConfig, VersionPolicy};
use crate::pbtxt::ConfigError;

/// A version of a model, read into memory.
#[derive(Clone)]
pub struct ModelFile {
    /// Name of the model.
    pub name: String,
    /// Its version.
    pub version: u64,
    /// The ONNX file. Weights in files of their own are not supported.
    pub bytes: Arc<[u8]>,
    /// Its `config.pbtxt`, or the defaults.
    pub config: ModelConfig,
    /// Labels by output name: the label of class `i` is the one at `i`.
    pub labels: HashMap<String, Vec<String>>,
    /// The directory of the model.
    pub directory: PathBuf,
}

/// Without the bytes, which have no place in a log line.
impl fmt::Debug for ModelFile {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("ModelFile")
            .field("name", &self.name)
            .field("version", &self.version)
            .field("directory", &self.directory)
            .finish_non_exhaustive()
    }
}

/// Why a model could not be read from the repository.
#[derive(Debug, thiserror::Error)]
pub enum RepositoryError {
    /// The name cannot be a directory.
    #[error("`{name}` is no model name: a name is one directory below the repository")]
    InvalidName {
        /// What was asked for.
        name: String,
    },
    /// No root has the model.
    #[error("no model `{name}` in {looked}; {found}; its file goes to `{}`", .place.display())]
    Unknown {
        /// What was asked for.
        name: String,
        /// The roots.
        looked: String,
        /// The models that are there.
        found: String,
        /// Where the file of a first version would be found.
        place: PathBuf,
    },
    /// The model has no such version, or none that its policy allows.
    #[error("no version {wanted} of the model `{name}` in `{}`; {found}", .directory.display())]
    UnknownVersion {
        /// The model.
        name: String,
        /// What was asked for.
        wanted: String,
        /// Where it was looked for.
        directory: PathBuf,
        /// The versions that are there.
        found: String,
    },
    /// The version has a directory, and no model in it.
    #[error(
        "version {version} of the model `{name}` has no file: put the ONNX model at `{}`, or name the file in \
         `default_model_filename` of its config.pbtxt",
        .path.display()
    )]
    NoFile {
        /// The model.
        name: String,
        /// Its version.
        version: u64,
        /// Where the file should be.
        path: PathBuf,
    },
    /// The model is for another backend.
    #[error("the model `{name}` is for `{asked}`, and only onnxruntime models are served")]
    UnsupportedBackend {
        /// The model.
        name: String,
        /// The backend or platform in its `config.pbtxt`.
        asked: String,
    },
    /// The model has another name than its directory.
    #[error("`{}` names the model `{declared}`, but its directory is `{name}`", .path.display())]
    NameMismatch {
        /// The `config.pbtxt`.
        path: PathBuf,
        /// The name in it.
        declared: String,
        /// The name of the directory.
        name: String,
    },
    /// A file name in the `config.pbtxt` leads out of the model's directory.
    #[error("`{}` names the file `{file}`, which is not in the model's directory", .path.display())]
    OutsideFile {
        /// The `config.pbtxt`.
        path: PathBuf,
        /// The file name in it.
        file: String,
    },
    /// The `config.pbtxt` cannot be understood.
    #[error("`{}`, {error}", .path.display())]
    Config {
        /// The `config.pbtxt`.
        path: PathBuf,
        /// What is wrong in it, and where.
        error: ConfigError,
    },
    /// A file or directory cannot be read.
    #[error("reading `{}`: {error}", .path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
}

/// Directories with models. The first that has a model of a name is the one that counts.
#[derive(Debug, Clone)]
pub struct Repository {
    roots: Vec<PathBuf>,
}

impl Repository {
    /// A repository over these directories; they need not exist.
    pub fn new(roots: Vec<PathBuf>) -> Repository {
        Repository { roots }
    }

    /// The directories.
    pub fn roots(&self) -> &[PathBuf] {
        &self.roots
    }

    /// Names of the models that have a version, in order. Directories that cannot be read have none.
    pub fn names(&self) -> Vec<String> {
        let mut names = BTreeSet::new();
        for root in &self.roots {
            for (name, directory) in subdirectories(root).unwrap_or_default() {
                if versions(&directory).is_ok_and(|versions| !versions.is_empty()) {
                    names.insert(name);
                }
            }
        }
        names.into_iter().collect()
    }

    /// Reads a model. Without a version the newest that the model's policy serves is taken; a version that is
    /// asked for is taken whatever the policy says.
    pub fn load(&self, name: &str, version: Option<u64>) -> Result<ModelFile, RepositoryError> {
        if !is_plain_name(name) {
            return Err(RepositoryError::InvalidName { name: name.into() });
        }
        let directory = self
            .roots
            .iter()
            .map(|root| root.join(name))
            .find(|directory| directory.is_dir())
            .ok_or_else(|| self.unknown(name))?;
        let config = read_config(name, &directory)?;
        let version = choose_version(name, &directory, &config.version_policy, version)?;

        let file_name = config.default_model_filename.as_deref().unwrap_or("model.onnx");
        let path = inside(&directory, &directory.join(version.to_string()), file_name)?;
        let bytes = match read(&path) {
            Err(RepositoryError::Read { path, error }) if error.kind() == io::ErrorKind::NotFound => {
                return Err(RepositoryError::NoFile { name: name.into(), version, path });
            }
            other => other?,
        };

        let mut labels = HashMap::new();
        for output in &config.outputs {
            if let Some(file_name) = &output.label_filename {
                labels.insert(output.name.clone(), read_labels(&inside(&directory, &directory, file_name)?)?);
            }
        }
        Ok(ModelFile { name: name.into(), version, bytes: bytes.into(), config, labels, directory })
    }

    fn unknown(&self, name: &str) -> RepositoryError {
        let looked: Vec<String> = self.roots.iter().map(|root| format!("`{}`", root.display())).collect();
        let names = self.names();
        RepositoryError::Unknown {
            name: name.into(),
            looked: if looked.is_empty() { "an empty list of repositories".into() } else { looked.join(" or ") },
            found: if names.is_empty() { "no models were found".into() } else { format!("found: {}", names.join(", ")) },
            place: self.roots.first().cloned().unwrap_or_default().join(name).join("1/model.onnx"),
        }
    }
}

/// Whether a path is one file or directory name, and no way elsewhere.
fn is_plain_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!(components.next(), Some(Component::Normal(first)) if first == name) && components.next().is_none()
}

/// A file that a `config.pbtxt` names, below `base`.
fn inside(directory: &Path, base: &Path, file: &str) -> Result<PathBuf, RepositoryError> {
    let below = Path::new(file).components().all(|component| matches!(component, Component::Normal(_)));
    if below {
        Ok(base.join(file))
    } else {
        Err(RepositoryError::OutsideFile { path: directory.join("config.pbtxt"), file: file.into() })
    }
}

fn read(path: &Path) -> Result<Vec<u8>, RepositoryError> {
    fs::read(path).map_err(|error| RepositoryError::Read { path: path.into(), error })
}

fn read_text(path: &Path) -> Result<String, RepositoryError> {
    fs::read_to_string(path).map_err(|error| RepositoryError::Read { path: path.into(), error })
}

fn read_config(name: &str, directory: &Path) -> Result<ModelConfig, RepositoryError> {
    let path = directory.join("config.pbtxt");
    if !path.exists() {
        return Ok(ModelConfig::default());
    }
    let config = ModelConfig::parse(&read_text(&path)?).map_err(|error| RepositoryError::Config { path: path.clone(), error })?;
    if let Some(declared) = config.name.clone().filter(|declared| declared != name) {
        return Err(RepositoryError::NameMismatch { path, declared, name: name.into() });
    }
    let foreign = [(&config.backend, "onnxruntime"), (&config.platform, "onnxruntime_onnx")]
        .into_iter()
        .find_map(|(asked, served)| asked.as_deref().filter(|&asked| asked != served));
    if let Some(asked) = foreign {
        return Err(RepositoryError::UnsupportedBackend { name: name.into(), asked: asked.into() });
    }
    Ok(config)
}

/// One label a line; empty lines at the end are no labels.
fn read_labels(path: &Path) -> Result<Vec<String>, RepositoryError> {
    let text = read_text(path)?;
    Ok(text.trim_end().lines().map(|label| label.trim().to_owned()).collect())
}

fn choose_version(name: &str, directory: &Path, policy: &VersionPolicy, asked: Option<u64>) -> Result<u64, RepositoryError> {
    let present = versions(directory).map_err(|error| RepositoryError::Read { path: directory.into(), error })?;
    let chosen = match asked {
        Some(version) => Some(version).filter(|version| present.contains(version)),
        None => policy.select(&present).last().copied(),
    };
    chosen.ok_or_else(|| {
        let found: Vec<String> = present.iter().map(u64::to_string).collect();
        RepositoryError::UnknownVersion {
            name: name.into(),
            wanted: match (asked, policy) {
                (Some(version), _) => version.to_string(),
                (None, VersionPolicy::Specific(versions)) => {
                    let versions: Vec<String> = versions.iter().map(u64::to_string).collect();
                    versions.join(" or ")
                }
                (None, _) => "directory (such as 1/)".into(),
            },
            directory: directory.into(),
            found: if found.is_empty() { "there are none".into() } else { format!("found: {}", found.join(", ")) },
        }
    })
}

/// Directories named by a whole number from 1 up; as in Triton, others and those with leading zeros are not
/// versions.
fn versions(directory: &Path) -> io::Result<BTreeSet<u64>> {
    let versions = subdirectories(directory)?.into_iter().filter_map(|(name, _)| {
        let version: u64 = name.parse().ok()?;
        (version > 0 && version.to_string() == name).then_some(version)
    });
    Ok(versions.collect())
}

/// Names and paths of the directories in a directory. Names that are not Unicode are passed over.
fn subdirectories(directory: &Path) -> io::Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        if let Some(name) = name
            && path.is_dir()
        {
            found.push((name.to_owned(), path));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    fn place(root: &TempDir, path: &str, bytes: &[u8]) {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    fn repository(roots: &[&TempDir]) -> Repository {
        Repository::new(roots.iter().map(|root| root.path().to_owned()).collect())
    }

    #[test]
    fn the_newest_version_is_the_default_by_number_not_by_name() {
        let root = TempDir::new().unwrap();
        for (version, bytes) in [("9", b"nine "), ("10", b"ten  "), ("011", b"zero "), ("v2", b"words")] {
            place(&root, &format!("m/{version}/model.onnx"), bytes);
        }
        let repository = repository(&[&root]);
        let newest = repository.load("m", None).unwrap();
        assert_eq!((newest.version, &newest.bytes[..]), (10, &b"ten  "[..]));
        assert_eq!(newest.directory, root.path().join("m"));
        assert_eq!(newest.config, ModelConfig::default());
        assert_eq!(&repository.load("m", Some(9)).unwrap().bytes[..], b"nine ");
        let error = repository.load("m", Some(11)).unwrap_err().to_string();
        assert!(error.starts_with("no version 11 of the model `m` in `"), "{error}");
        assert!(error.ends_with("found: 9, 10"), "{error}");
    }

    #[test]
    fn the_policy_decides_unless_a_version_is_asked_for() {
        let root = TempDir::new().unwrap();
        for version in 1..=3 {
            place(&root, &format!("m/{version}/model.onnx"), b"x");
        }
        place(&root, "m/config.pbtxt", b"version_policy { specific { versions: [1, 2, 7] } }");
        let repository = repository(&[&root]);
        assert_eq!(repository.load("m", None).unwrap().version, 2);
        assert_eq!(repository.load("m", Some(3)).unwrap().version, 3);
    }

    #[test]
    fn an_unknown_model_is_answered_with_what_is_there() {
        let (first, second) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        place(&first, "shuttle/1/model.onnx", b"x");
        place(&second, "exercise/1/model.onnx", b"x");
        place(&second, "empty/readme", b"x");
        let error = repository(&[&first, &second]).load("shutle", None).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "no model `shutle` in `{}` or `{}`; found: exercise, shuttle; its file goes to `{}/shutle/1/model.onnx`",
                first.path().display(),
                second.path().display(),
                first.path().display()
            )
        );
        let gone = Repository::new(vec![first.path().join("gone")]);
        let error = gone.load("m", None).unwrap_err().to_string();
        assert!(error.contains("; no models were found; its file goes to `"), "{error}");
    }

    #[test]
    fn the_first_root_counts() {
        let (first, second) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        place(&first, "m/1/model.onnx", b"first");
        place(&second, "m/2/model.onnx", b"second");
        let repository = repository(&[&first, &second]);
        assert_eq!(&repository.load("m", None).unwrap().bytes[..], b"first");
        assert_eq!(repository.names(), ["m"]);
    }

    #[test]
    fn labels_and_another_file_name_are_read() {
        let root = TempDir::new().unwrap();
        place(&root, "m/1/net.onnx", b"net");
        place(&root, "m/labels.txt", b"walk\r\n run \n\nsit\n\n");
        place(
            &root,
            "m/config.pbtxt",
            br#"default_model_filename: "net.onnx" output { name: "y" label_filename: "labels.txt" }"#,
        );
        let file = repository(&[&root]).load("m", None).unwrap();
        assert_eq!(&file.bytes[..], b"net");
        assert_eq!(file.labels["y"], ["walk", "run", "", "sit"]);
    }

    #[test]
    fn nothing_outside_the_repository_is_read() {
        let root = TempDir::new().unwrap();
        place(&root, "secret/1/model.onnx", b"x");
        place(&root, "models/m/1/model.onnx", b"x");
        let repository = Repository::new(vec![root.path().join("models")]);
        for name in ["../secret", "/secret", "", ".", "..", "m/1", "m/"] {
            let error = repository.load(name, None).unwrap_err();
            assert!(matches!(error, RepositoryError::InvalidName { .. }), "{name}: {error}");
        }
        for file in ["../../../secret/1/model.onnx", "/etc/passwd"] {
            let config = format!("default_model_filename: \"{file}\"");
            place(&root, "models/m/config.pbtxt", config.as_bytes());
            let error = repository.load("m", None).unwrap_err();
            assert!(matches!(error, RepositoryError::OutsideFile { .. }), "{error}");
        }
    }

    #[test]
    fn a_config_that_cannot_be_right_is_refused() {
        let root = TempDir::new().unwrap();
        place(&root, "m/1/model.onnx", b"x");
        let error = |config: &str| {
            place(&root, "m/config.pbtxt", config.as_bytes());
            repository(&[&root]).load("m", None).unwrap_err().to_string()
        };
        let path = root.path().join("m/config.pbtxt");
        assert_eq!(error("name: \"n\""), format!("`{}` names the model `n`, but its directory is `m`", path.display()));
        assert_eq!(
            error("platform: \"tensorrt_plan\""),
            "the model `m` is for `tensorrt_plan`, and only onnxruntime models are served"
        );
        assert_eq!(error("name:\n}"), format!("`{}`, line 2, column 1: expected a value for `name`, found `}}`", path.display()));
    }

    #[test]
    fn a_version_without_its_file_is_named() {
        let root = TempDir::new().unwrap();
        fs::create_dir_all(root.path().join("m/1")).unwrap();
        let error = repository(&[&root]).load("m", None).unwrap_err().to_string();
        let path = root.path().join("m/1/model.onnx");
        let told = format!("version 1 of the model `m` has no file: put the ONNX model at `{}`, or name", path.display());
        assert!(error.starts_with(&told), "{error}");
    }
}
