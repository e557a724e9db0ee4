//! How long to wait before the next try: exponential with full jitter, so that many who failed together
//! do not come back together.

use std::time::Duration;

/// The waits between tries.
#[derive(Debug)]
pub(crate) struct Backoff {
    base: Duration,
    cap: Duration,
    tries: u32,
    random: fastrand::Rng,
}

impl Backoff {
    /// Between half and the whole of `base`, doubling up to `cap`.
    pub(crate) fn new(base: Duration, cap: Duration, seed: u64) -> Self {
        Self { base, cap, tries: 0, random: fastrand::Rng::with_seed(seed) }
    }

    /// For calls of a stage: 50 ms doubling to 10 s.
    pub(crate) fn for_calls(seed: u64) -> Self {
        Self::new(Duration::from_millis(50), Duration::from_secs(10), seed)
    }

    /// The next wait, in whole milliseconds: people read it.
    pub(crate) fn next(&mut self) -> Duration {
        let ceiling = self.base.saturating_mul(1_u32.checked_shl(self.tries).unwrap_or(u32::MAX)).min(self.cap);
        self.tries = self.tries.saturating_add(1).min(30);
        let wait = ceiling.mul_f64(0.5 + self.random.f64() / 2.0);
        Duration::from_millis(u64::try_from(wait.as_millis()).unwrap_or(u64::MAX))
    }

    /// It worked: start small next time.
    pub(crate) fn reset(&mut self) {
        self.tries = 0;
    }

    /// How often it has failed in a row.
    pub(crate) fn tries(&self) -> u32 {
        self.tries
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_the_cap_and_start_again_after_success() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1), 7);
        let waits: Vec<Duration> = (0..20).map(|_| backoff.next()).collect();
        assert!(waits[0] <= Duration::from_millis(100) && waits[0] >= Duration::from_millis(50));
        assert!(waits.iter().all(|wait| *wait <= Duration::from_secs(1)));
        assert!(waits[19] >= Duration::from_millis(500));
        backoff.reset();
        assert!(backoff.next() <= Duration::from_millis(100));
    }
}
