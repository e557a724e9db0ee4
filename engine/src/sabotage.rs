//! Faults planted on purpose, so that the tests can show that they would be noticed: a crash test that
//! also passes with the fsyncs taken out proves nothing. Debug builds read `AFFERENT_SABOTAGE`; release
//! builds contain none of it.

/// No fsync at all.
pub const NO_FSYNC: &str = "no_fsync";
/// Sources acknowledge what they pick up, before it is durable.
pub const EARLY_ACK: &str = "early_ack";

/// Whether this fault is planted in this process.
pub fn is(fault: &str) -> bool {
    cfg!(debug_assertions) && std::env::var_os("AFFERENT_SABOTAGE").is_some_and(|planted| planted == fault)
}

/// The faults planted in the engine's own loops, for one run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Planted {
    /// Sources commit what they emit, at once.
    pub early_ack: bool,
    /// A barrier does not wait for the other inputs.
    pub overtaking_barrier: bool,
    /// State changes are not stored.
    pub lost_delta: bool,
    /// Overlapping calls leave as they finish.
    pub reordering: bool,
}

impl Planted {
    /// What the environment asks for; nothing in release builds.
    pub fn from_env() -> Self {
        Self { early_ack: is(EARLY_ACK), ..Self::default() }
    }
}
