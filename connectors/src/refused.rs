//! Rows that a peer refuses only after `write` has returned: a broker answers later than the sink hands over.
//! They are returned by the next `write`, or by the `prepare` that has waited for every answer.

use std::sync::{Mutex, PoisonError};

use afferent_engine::Rejected;

/// Refused rows that have not been returned yet.
#[derive(Default)]
pub(crate) struct Refusals(Mutex<Vec<Rejected>>);

impl Refusals {
    /// Adds one.
    pub(crate) fn push(&self, rejected: Rejected) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(rejected);
    }

    /// Takes all.
    pub(crate) fn take(&self) -> Vec<Rejected> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
