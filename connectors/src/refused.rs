//! Rows that a peer refuses only after `write` has returned: a broker answers later than the sink hands over.
//! They are returned by the next `write`; those found while an epoch is prepared travel in what the sink
//! prepared for it, so that they are stored with the epoch and not lost by a crash in between.

use std::sync::{Mutex, PoisonError};

use afferent_engine::rejected::{Given, Rejected};
use serde::{Deserialize, Serialize};

/// Codes that late refusals can have; what is read back becomes one of these.
const CODES: [&str; 4] = ["refused", "too_large", "undeliverable", "invalid_record"];

/// Refused rows that have not been returned yet.
#[derive(Default)]
pub(crate) struct Refusals(Mutex<Vec<Rejected>>);

impl Refusals {
    /// Adds one.
    pub(crate) fn push(&self, rejected: Rejected) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(rejected);
    }

    /// Adds those that an earlier run had prepared and not returned.
    pub(crate) fn restore(&self, stored: Vec<Refused>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend(stored.into_iter().map(Refused::into_rejected));
    }

    /// Takes all.
    pub(crate) fn take(&self) -> Vec<Rejected> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A copy that can be stored; they stay until [`Refusals::take`].
    pub(crate) fn stored(&self) -> Vec<Refused> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().map(Refused::from).collect()
    }
}

/// A refused row as it is stored with an epoch.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Refused {
    code: String,
    reason: String,
    position: String,
    row: Option<String>,
    text: Option<String>,
    hex: Option<String>,
}

impl From<&Rejected> for Refused {
    fn from(rejected: &Rejected) -> Self {
        let (mut row, mut text, mut hex) = (None, None, None);
        match &rejected.given {
            Given::Row(given) => row = Some(given.clone()),
            Given::Bytes(bytes) => match std::str::from_utf8(bytes) {
                Ok(given) => text = Some(given.to_owned()),
                Err(_) => hex = Some(bytes.iter().map(|byte| format!("{byte:02x}")).collect()),
            },
        }
        Self {
            code: rejected.code.to_owned(),
            reason: rejected.reason.clone(),
            position: rejected.position.clone(),
            row,
            text,
            hex,
        }
    }
}

impl Refused {
    fn into_rejected(self) -> Rejected {
        let code = CODES.into_iter().find(|code| *code == self.code).unwrap_or(CODES[0]);
        let given = match (self.row, self.text, self.hex) {
            (Some(row), ..) => Given::Row(row),
            (None, Some(text), _) => Given::Bytes(text.into_bytes()),
            (None, None, hex) => Given::Bytes(from_hex(&hex.unwrap_or_default())),
        };
        Rejected { code, reason: self.reason, position: self.position, given }
    }
}

fn from_hex(hex: &str) -> Vec<u8> {
    let digit = |byte: u8| char::from(byte).to_digit(16).map_or(0, |digit| digit as u8);
    hex.as_bytes().chunks_exact(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_refused_survives_being_stored() {
        let refusals = Refusals::default();
        let given = [Given::Bytes(vec![0xff, 0x00, 0x7f]), Given::Bytes(b"{}".to_vec()), Given::Row("{\"n\":1}".into())];
        for given in given.clone() {
            refusals.push(Rejected { code: "too_large", reason: "too large".into(), position: "t/0@1".into(), given });
        }
        let json = serde_json::to_value(refusals.stored()).unwrap();
        let restored = Refusals::default();
        restored.restore(serde_json::from_value(json).unwrap());
        let rows = restored.take();
        assert_eq!(rows, refusals.take());
        assert!(rows.iter().all(|row| row.code == "too_large"));
        assert!(restored.take().is_empty());
    }
}
