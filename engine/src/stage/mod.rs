//! The stage loops: one task a stage (or a fused chain of stages). They move elements from edge to edge,
//! act on error classes, align barriers and report to the epoch coordinator. Components are called
//! from here and from nowhere else. Each task runs in a span that carries the names of pipeline and stage, so that log
//! lines need not.

mod chain;
mod inputs;
mod ordered;
mod outbox;
mod rejects;
mod report;
mod sink;
mod source;

pub(crate) use chain::{Chain, Link};
pub(crate) use inputs::Inputs;
pub(crate) use ordered::{Callee, Ordered};
pub(crate) use outbox::Outbox;
pub(crate) use rejects::{HELD_REJECTS, HELD_REJECTS_SIMULATED, Rejects};
pub(crate) use report::{Loop, Passed, Report, SinkCommand, SourceCommand, Stop, failed};
pub(crate) use sink::SinkStage;
pub(crate) use source::SourceStage;
