//! What tests of pipelines stand on: a disk that loses power, memory stages with faults, and the seeded
//! simulation. They drive the same stage, epoch and checkpoint code as a real run.

pub mod conformance;
pub mod disk;
pub mod simulation;
mod sketch;
pub mod stages;
pub mod world;
