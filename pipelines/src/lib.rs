//! From YAML text to a checked, runnable plan.
//!
//! [`check`] takes the text of a pipeline file and the list of known components, and gives back either a
//! [`Plan`] or everything that is wrong with the file, each with its place and a suggestion. It opens no
//! connection and never fails. JSON Schema, reference page and drawings come from the same structs.
//!
//! The way of a file: [`document`] (a tree with places) -> stages and shapes -> wiring -> planning (schemas
//! flow from stage to stage) -> [`guarantee`] -> [`Plan`]. This crate knows no component by name.

pub mod diagnostic;
pub mod document;
pub mod explain;
#[cfg(test)]
mod fakes;
mod fan_in;
pub mod guarantee;
mod lint;
pub mod plan;
mod planner;
mod reference;
mod references;
mod schema;
mod shape;
pub mod spec;
mod stage;
mod suggest;
mod types;
mod variables;
mod wiring;

pub use diagnostic::{Diagnostic, Severity, render};
pub use lint::check;
pub use plan::Plan;
pub use reference::reference;
pub use schema::pipeline_schema;
