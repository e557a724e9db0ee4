//! Where the ONNX Runtime library may be. The runtime asks it once, at start. Invariant: nothing is loaded
//! here, and Python is asked only after the places that cost nothing have been tried, with a deadline.

use std::env;
use std::env::consts::{DLL_PREFIX, DLL_SUFFIX};
use std::fs;
use std::io::Read;
use std::iter;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// How long Python may take to say where its package is.
const PYTHON_DEADLINE: Duration = Duration::from_secs(3);

/// Prints the directory of the `onnxruntime` package without importing it. The working directory is taken off
/// the path: a folder there that happens to have the name is not the package.
const FIND_PACKAGE: &str = "import sys; sys.path[:] = [p for p in sys.path if p]; \
    import importlib.util as u; s = u.find_spec('onnxruntime'); \
    print(s.submodule_search_locations[0] if s and s.submodule_search_locations else '')";

/// The places to look in, as a value, so that tests need no environment of their own.
#[derive(Debug, Clone, Default)]
pub(crate) struct Search {
    /// `AFFERENT_MODEL_BACKEND`: `tract` or `onnxruntime`.
    pub(crate) backend: Option<String>,
    /// `ORT_DYLIB_PATH`: this library and no other.
    pub(crate) library: Option<PathBuf>,
    /// Data directory; the library may be in `lib/` below it.
    pub(crate) data_dir: PathBuf,
    /// `VIRTUAL_ENV`: an active Python environment.
    pub(crate) virtual_env: Option<PathBuf>,
    /// Python interpreter to ask for its package.
    pub(crate) python: Option<PathBuf>,
    /// Library directories of the system.
    pub(crate) system: Vec<PathBuf>,
    /// Whether to leave it to the dynamic loader (`LD_LIBRARY_PATH`, `ld.so.conf`) at the end.
    pub(crate) loader: bool,
}

impl Search {
    /// The places that this process's environment names.
    pub(crate) fn from_environment(data_dir: &Path) -> Search {
        let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty());
        let system = ["/usr/local/lib", "/usr/lib64", "/usr/lib"]
            .into_iter()
            .map(PathBuf::from)
            .chain([PathBuf::from(format!("/usr/lib/{}-linux-gnu", env::consts::ARCH))]);
        Search {
            backend: set("AFFERENT_MODEL_BACKEND").map(|value| value.to_string_lossy().into_owned()),
            library: set("ORT_DYLIB_PATH").map(PathBuf::from),
            data_dir: data_dir.into(),
            virtual_env: set("VIRTUAL_ENV").map(PathBuf::from),
            python: Some("python3".into()),
            system: system.collect(),
            loader: true,
        }
    }

    /// Libraries to try, in order. Each place is looked at only when those before it had none that loads.
    pub(crate) fn candidates(&self) -> impl Iterator<Item = PathBuf> {
        let nearby = iter::once(self.data_dir.join("lib")).chain(self.virtual_env_packages());
        let python = iter::once_with(|| self.python_package()).flatten();
        let system = self.system.iter().cloned();
        let by_name = self.loader.then(|| PathBuf::from(format!("{DLL_PREFIX}onnxruntime{DLL_SUFFIX}")));
        nearby.chain(python).chain(system).flat_map(|directory| libraries_in(&directory)).chain(by_name)
    }

    /// The places in words, for a message.
    pub(crate) fn places(&self) -> String {
        format!(
            "`{}`, an installed onnxruntime Python package or the library paths of the system",
            self.data_dir.join("lib").display()
        )
    }

    fn virtual_env_packages(&self) -> Vec<PathBuf> {
        let Some(root) = &self.virtual_env else {
            return Vec::new();
        };
        let mut packages: Vec<PathBuf> = entries(&root.join("lib"))
            .into_iter()
            .filter(|(name, _)| name.starts_with("python3"))
            .map(|(_, path)| path.join("site-packages/onnxruntime/capi"))
            .collect();
        packages.sort();
        packages
    }

    fn python_package(&self) -> Option<PathBuf> {
        let mut child = Command::new(self.python.as_ref()?)
            .args(["-c", FIND_PACKAGE])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let deadline = Instant::now() + PYTHON_DEADLINE;
        loop {
            match child.try_wait() {
                Ok(Some(status)) if status.success() => break,
                Ok(None) if Instant::now() < deadline => thread::sleep(Duration::from_millis(10)),
                _ => {
                    // Kill fails on a child that has ended by itself, which is what is wanted anyway.
                    let _ = child.kill();
                    let _ = child.wait();
                    return None;
                }
            }
        }
        let mut answer = String::new();
        child.stdout.take()?.read_to_string(&mut answer).ok()?;
        let package = answer.trim_end_matches(['\r', '\n']);
        (!package.is_empty()).then(|| Path::new(package).join("capi"))
    }
}

/// The ONNX Runtime libraries in a directory, newest first; none if the directory cannot be read.
fn libraries_in(directory: &Path) -> Vec<PathBuf> {
    let mut libraries: Vec<(Vec<u64>, PathBuf)> =
        entries(directory).into_iter().filter(|(name, _)| is_library(name)).map(|(name, path)| (numbers(&name), path)).collect();
    libraries.sort();
    libraries.into_iter().rev().map(|(_, path)| path).collect()
}

/// Whether a file name is the library's: `libonnxruntime.so`, `libonnxruntime.so.1.31.1`,
/// `libonnxruntime.1.31.1.dylib`, `onnxruntime.dll`; not `libonnxruntime_providers_shared.so`.
fn is_library(name: &str) -> bool {
    let Some(rest) = name.strip_prefix(DLL_PREFIX).and_then(|rest| rest.strip_prefix("onnxruntime")) else {
        return false;
    };
    let Some(version) = rest.strip_prefix(DLL_SUFFIX).or_else(|| rest.strip_suffix(DLL_SUFFIX)) else {
        return false;
    };
    version.chars().all(|character| character == '.' || character.is_ascii_digit())
}

/// The numbers in a file name, so that 1.10 comes after 1.9.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|character: char| !character.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}

fn entries(directory: &Path) -> Vec<(String, PathBuf)> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    entries.flatten().filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path()))).collect()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use tempfile::TempDir;

    use super::*;

    #[test]
    fn only_the_library_itself_is_taken() {
        for name in ["libonnxruntime.so", "libonnxruntime.so.1", "libonnxruntime.so.1.31.1"] {
            assert!(is_library(name), "{name}");
        }
        for name in ["libonnxruntime_providers_shared.so", "libonnxruntime.so.1.31.1.sig", "libonnx.so", "onnxruntime.so"] {
            assert!(!is_library(name), "{name}");
        }
    }

    #[test]
    fn the_data_directory_comes_before_the_environment_and_newer_before_older() {
        let root = TempDir::new().unwrap();
        let capi = "venv/lib/python3.11/site-packages/onnxruntime/capi";
        let files = [
            ("data/lib", "libonnxruntime.so.1.9.0"),
            ("data/lib", "libonnxruntime.so.1.31.1"),
            ("data/lib", "libonnxruntime_providers_shared.so"),
            (capi, "libonnxruntime.so.1.20.0"),
            ("system", "libonnxruntime.so"),
        ]
        .map(|(directory, file)| root.path().join(directory).join(file));
        for directory in ["data/lib", capi, "system"] {
            fs::create_dir_all(root.path().join(directory)).unwrap();
        }
        for file in &files {
            fs::write(file, b"").unwrap();
        }
        let search = Search {
            data_dir: root.path().join("data"),
            virtual_env: Some(root.path().join("venv")),
            system: vec![root.path().join("gone"), root.path().join("system")],
            loader: true,
            ..Search::default()
        };
        let found: Vec<PathBuf> = search.candidates().collect();
        let by_name = PathBuf::from("libonnxruntime.so");
        assert_eq!(found.iter().collect::<Vec<_>>(), [&files[1], &files[0], &files[3], &files[4], &by_name]);
    }

    #[test]
    fn an_interpreter_that_fails_or_is_absent_is_no_error() {
        for python in ["/bin/false", "/no/such/interpreter"] {
            let search = Search { python: Some(python.into()), ..Search::default() };
            assert_eq!(search.candidates().count(), 0, "{python}");
        }
    }
}
