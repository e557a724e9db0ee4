//! Tests of the whole house, in one binary because linking is slow. They drive the built command, real
//! brokers, real models and clients that we did not write; a missing tool is a failure, never a skip.

#![expect(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, reason = "a test that cannot go on fails")]

mod architecture;
mod brokers;
mod command;
mod conformance;
mod crash;
mod crash_kafka;
mod examples;
mod generated;
mod golden;
mod lint;
mod logs;
mod malformed;
mod secured;
mod tools;
