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
