//! Names for points in a stream: [`Epoch`] numbers the cuts through the whole graph, [`Position`] says
//! where one source stood at such a cut.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The number of a cut through the graph. Never reused: the upper half counts the starts of the
/// pipeline on this data directory, the lower half the cuts since that start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Epoch(u64);

impl Epoch {
    /// The point before the first cut of start number `start` (from 1).
    pub fn start(start: u32) -> Self {
        Self(u64::from(start) << 32)
    }

    /// The cut after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }

    /// As one number, growing with time; for stores that keep a version.
    pub fn as_u64(self) -> u64 {
        self.0
    }

    /// Back from [`Epoch::as_u64`].
    pub fn from_u64(number: u64) -> Self {
        Self(number)
    }

    /// Which start of the pipeline it belongs to.
    pub fn run(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0 >> 32, self.0 & 0xffff_ffff)
    }
}

/// Where a source stands. Its meaning belongs to the source; the engine stores it and hands it back.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Position(pub serde_json::Value);

impl Position {
    /// From anything that serialises.
    pub fn of(value: &impl Serialize) -> Self {
        Self(serde_json::to_value(value).unwrap_or(serde_json::Value::Null))
    }

    /// Reads it back as the source's own type.
    ///
    /// # Errors
    /// Fatal when the stored position is not of that type.
    pub fn read<T: serde::de::DeserializeOwned>(&self) -> crate::Result<T> {
        serde_json::from_value(self.0.clone())
            .map_err(|e| crate::Error::fatal(format!("stored position {} is not readable: {e}", self.0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_start_comes_after_every_epoch_of_an_earlier_one() {
        let mut earlier = Epoch::start(1);
        for _ in 0..1000 {
            earlier = earlier.next();
        }
        assert!(Epoch::start(2) > earlier);
        assert_eq!(earlier.to_string(), "1.1000");
        assert_eq!(earlier.run(), 1);
    }
}
