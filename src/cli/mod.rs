//! The command line: the verbs with their options, and what they have in common.

mod broker;
mod check;
mod command;
mod demo;
mod explain;
mod files;
mod infer_schema;
mod list;
mod run;
mod schema;
mod sql;

pub use command::{Cli, DataDir, FAILED, Places, colours, print};
