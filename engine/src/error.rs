//! The one runtime error of the house. A component says *what class* of trouble it met; only the stage
//! loop acts on the class, so that retry, reject and restart behave alike for every component.

use std::fmt;

/// What the stage loop does about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The same call may succeed later: it is repeated with backoff and jitter.
    Retry,
    /// The rows are at fault, not the pipeline: they leave through the `rejected` output.
    Reject,
    /// This run of the pipeline cannot go on: the supervisor restarts it from its last stored epoch.
    Fatal,
}

impl Class {
    /// The word used in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Class::Retry => "retry",
            Class::Reject => "reject",
            Class::Fatal => "fatal",
        }
    }
}

/// An error with its class. `?` on a foreign error does not compile without choosing a class: on purpose.
#[derive(Debug)]
pub struct Error {
    class: Class,
    source: Box<dyn std::error::Error + Send + Sync>,
}

/// What runtime calls return.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Worth another try.
    pub fn retry(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self { class: Class::Retry, source: source.into() }
    }

    /// These rows can never succeed.
    pub fn reject(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self { class: Class::Reject, source: source.into() }
    }

    /// Nothing here can go on.
    pub fn fatal(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self { class: Class::Fatal, source: source.into() }
    }

    /// The class that the stage loop acts on.
    pub fn class(&self) -> Class {
        self.class
    }

    /// What it was made of.
    pub(crate) fn cause(&self) -> &(dyn std::error::Error + 'static) {
        &*self.source
    }

    /// The same error, told as part of a larger attempt: `context: cause`.
    #[must_use]
    pub fn context(self, context: impl fmt::Display) -> Self {
        Self { class: self.class, source: Box::new(Told { attempt: context.to_string(), cause: self.source }) }
    }
}

/// A cause, told as part of a larger attempt. Keeps the cause itself: it may be one that is acted upon.
#[derive(Debug)]
struct Told {
    attempt: String,
    cause: Box<dyn std::error::Error + Send + Sync>,
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.attempt)
    }
}

impl std::error::Error for Told {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&*self.cause)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.source)?;
        let mut cause = self.source.source();
        while let Some(next) = cause {
            write!(f, ": {next}")?;
            cause = next.source();
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.source()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn context_keeps_the_class_and_the_cause() {
        let error = Error::retry("connection refused").context("connecting to mqtt://localhost:1883");
        assert_eq!(error.class(), Class::Retry);
        assert_eq!(error.to_string(), "connecting to mqtt://localhost:1883: connection refused");
    }

    #[test]
    fn a_full_disk_is_recognised_however_often_it_is_told() {
        let cause = std::io::Error::from(std::io::ErrorKind::StorageFull);
        let error = Error::fatal(cause).context("writing a part").context("stage out");
        assert!(crate::durable::is_full(&error));
        assert!(!crate::durable::is_full(&Error::fatal("full").context("stage out")));
    }
}
