//! The shape of the house: which package may know which, and what holds for every source file. The arrows
//! are those of `docs/architecture.md`; a new one is drawn there first, then here.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::tools::{root, succeed};

/// (who knows, whom it knows). The command knows all, and nobody knows the command.
const ARROWS: [(&str, &str); 6] = [
    ("connectors", "engine"),
    ("connectors", "formats"),
    ("operators", "engine"),
    ("operators", "formats"),
    ("operators", "models"),
    ("pipelines", "engine"),
];

const ROOMS: [&str; 6] = ["engine", "formats", "models", "connectors", "operators", "pipelines"];

/// Where Rust lives.
const FOLDERS: [&str; 9] = ["src", "engine", "formats", "models", "connectors", "operators", "pipelines", "tests", "benches"];

/// A file past this many lines is two ideas.
const MOST_LINES: usize = 600;

#[test]
fn the_packages_know_each_other_as_drawn() {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output =
        succeed(Command::new(cargo).args(["metadata", "--format-version", "1", "--no-deps", "--offline"]).current_dir(root()));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let mut found = BTreeSet::new();
    let mut rooms = BTreeSet::new();
    for package in metadata["packages"].as_array().unwrap() {
        let room = room(&package["name"]).expect("every package is of this house");
        rooms.insert(room.clone());
        // Dependencies of tests and build scripts count, too: they are arrows as well.
        for dependency in package["dependencies"].as_array().unwrap() {
            if let Some(known) = room_of_path(dependency) {
                found.insert((room.clone(), known));
            }
        }
    }
    let mut drawn: BTreeSet<(String, String)> = ARROWS.iter().map(|(who, whom)| (who.to_string(), whom.to_string())).collect();
    drawn.extend(ROOMS.iter().map(|room| (String::from("src"), room.to_string())));
    assert_eq!(found, drawn, "(who knows, whom it knows)");
    let mut all: BTreeSet<String> = ROOMS.iter().map(|room| room.to_string()).collect();
    all.insert("src".to_owned());
    assert_eq!(rooms, all, "the packages of the workspace");
}

/// `afferent-engine` lives in `engine`, `afferent` in `src`.
fn room(name: &Value) -> Option<String> {
    match name.as_str()?.strip_prefix("afferent")? {
        "" => Some("src".to_owned()),
        rest => Some(rest.strip_prefix('-')?.to_owned()),
    }
}

/// The room of a dependency that has a path, so that another name would not hide it.
fn room_of_path(dependency: &Value) -> Option<String> {
    dependency["path"].as_str().map(|path| {
        let path = Path::new(path);
        if path == root() { "src".to_owned() } else { path.file_name().unwrap().to_string_lossy().into_owned() }
    })
}

#[test]
fn every_file_says_first_what_it_is() {
    let mut silent = Vec::new();
    for file in rust_files() {
        let text = std::fs::read_to_string(&file).unwrap();
        let paragraph: Vec<&str> = text.lines().map_while(|line| line.strip_prefix("//! ")).collect();
        let paragraph = paragraph.join(" ");
        if paragraph.split_whitespace().count() < 5 || !paragraph.ends_with('.') {
            silent.push(file);
        }
    }
    assert!(silent.is_empty(), "these begin without a `//!` paragraph that ends with a full stop: {silent:#?}");
}

#[test]
fn no_file_is_longer_than_one_idea() {
    let long: Vec<(PathBuf, usize)> = rust_files()
        .into_iter()
        .filter(|file| !file.starts_with(root().join("tests")))
        .map(|file| (file.clone(), std::fs::read_to_string(file).unwrap().lines().count()))
        .filter(|(_, lines)| *lines > MOST_LINES)
        .collect();
    assert!(long.is_empty(), "these have more than {MOST_LINES} lines: {long:#?}");
}

#[test]
fn a_mod_rs_only_declares() {
    let mut working = Vec::new();
    for file in rust_files().into_iter().filter(|file| file.file_name().is_some_and(|name| name == "mod.rs")) {
        let text = std::fs::read_to_string(&file).unwrap();
        let declared = text.lines().take_while(|line| line.trim() != "#[cfg(test)]");
        for (number, line) in declared.enumerate().filter(|(_, line)| is_function(line)) {
            working.push(format!("{}:{}: {}", file.display(), number + 1, line.trim()));
        }
    }
    assert!(working.is_empty(), "these functions belong into files of their own: {working:#?}");
}

/// Whether a line begins a function: `fn` behind nothing but `pub` and the like. A function type
/// (`fn(&Value)`) and a comment do not.
fn is_function(line: &str) -> bool {
    let ahead = ["pub", "pub(crate)", "pub(super)", "async", "const", "unsafe"];
    line.split_whitespace().find(|word| !ahead.contains(word)) == Some("fn")
}

#[test]
fn functions_are_told_from_what_looks_like_them() {
    for line in ["fn a() {}", "    pub(crate) async fn report(&self) {", "pub const fn b() -> u8 {"] {
        assert!(is_function(line), "{line}");
    }
    for line in ["/// fn in a comment", "type Plan = fn(&Value) -> u8;", "mod fn_like;", "", "use std::fs;"] {
        assert!(!is_function(line), "{line}");
    }
}

#[test]
fn every_example_tells_editors_its_schema() {
    let mut examples = 0;
    for file in files_below(&root().join("examples"), "yaml") {
        let text = std::fs::read_to_string(&file).unwrap();
        let first = text.lines().next().unwrap_or_default();
        let schema = first.strip_prefix("# yaml-language-server: $schema=");
        let schema = schema.unwrap_or_else(|| panic!("{} begins with {first:?}, no modeline", file.display()));
        let schema = file.parent().unwrap().join(schema).canonicalize();
        let schema = schema.unwrap_or_else(|e| panic!("the schema of {}: {e}", file.display()));
        assert_eq!(schema, root().join("docs/pipeline.schema.json").canonicalize().unwrap(), "{}", file.display());
        examples += 1;
    }
    assert!(examples >= 3, "only {examples} examples");
}

fn rust_files() -> Vec<PathBuf> {
    let files: Vec<PathBuf> = FOLDERS.iter().flat_map(|folder| files_below(&root().join(folder), "rs")).collect();
    assert!(files.len() > 100, "only {} source files: is the root right?", files.len());
    files
}

/// All files below a folder whose name ends so, in order.
fn files_below(folder: &Path, ending: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|found| found == ending) {
                files.push(path);
            }
        }
    }
    files.sort();
    files
}
