//! The types that every component's configuration is written in: units live in types, and secrets in a
//! type that cannot be printed.

use std::fmt;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A length of time with its unit: `50ms`, `5s`, `24h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Interval(pub Duration);

impl Interval {
    /// In milliseconds.
    pub const fn millis(ms: u64) -> Self {
        Self(Duration::from_millis(ms))
    }

    /// In seconds.
    pub const fn secs(s: u64) -> Self {
        Self(Duration::from_secs(s))
    }
}

impl fmt::Display for Interval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(self.0).fmt(f)
    }
}

impl Serialize for Interval {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&humantime::format_duration(self.0).to_string().replace(' ', ""))
    }
}

impl<'de> Deserialize<'de> for Interval {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        humantime::parse_duration(&text)
            .map(Interval)
            .map_err(|e| de::Error::custom(format!("`{text}` is not a length of time ({e}); write for example 50ms, 5s or 24h")))
    }
}

impl JsonSchema for Interval {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Interval".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "description": "A length of time with its unit: `50ms`, `5s`, `24h`.",
            "pattern": "^\\s*([0-9]+\\s*(ns|nsec|us|usec|ms|msec|s|sec|second|seconds|m|min|minute|minutes|h|hr|hour|hours|d|day|days|w|week|weeks)\\s*)+$"
        })
    }
}

/// A number of bytes with its unit: `512B`, `64KiB`, `16MiB`, `10GB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

impl ByteSize {
    /// In units of 1,024 bytes.
    pub const fn kib(n: u64) -> Self {
        Self(n * 1024)
    }

    /// In units of 1,048,576 bytes.
    pub const fn mib(n: u64) -> Self {
        Self(n * 1024 * 1024)
    }

    /// As an index type; saturates on 32-bit machines.
    pub fn as_usize(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        bytesize::ByteSize(self.0).display().iec().fmt(f)
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.to_string().replace(' ', ""))
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let size: bytesize::ByteSize = text
            .parse()
            .map_err(|_| de::Error::custom(format!("`{text}` is not a size; write for example 64KiB, 16MiB or 10GB")))?;
        Ok(Self(size.0))
    }
}

impl JsonSchema for ByteSize {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "ByteSize".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "description": "A number of bytes with its unit: `512B`, `64KiB`, `16MiB`, `10GB`.",
            "pattern": "^\\s*[0-9]+(\\.[0-9]+)?\\s*([kKmMgGtT]i?)?[bB]?\\s*$"
        })
    }
}

/// A password, a token or a key. Written as `${VARIABLE}` or `${file:/path}`, resolved when the component
/// is built, and never printed.
#[derive(Clone, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// From the text of the configuration.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The secret itself, its references resolved.
    ///
    /// # Errors
    /// Says which variable or file is missing; never what is in it.
    pub fn reveal(&self) -> Result<String, UnresolvedReference> {
        resolve(&self.0)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str("***")
    }
}

/// A `${...}` that leads nowhere.
#[derive(Debug, thiserror::Error)]
pub enum UnresolvedReference {
    /// No such environment variable.
    #[error("the environment variable {0} is not set")]
    Variable(String),
    /// No such file, or not readable as text.
    #[error("the file {path} cannot be read: {cause}")]
    File {
        /// The path as written.
        path: String,
        /// What the system said.
        cause: std::io::Error,
    },
    /// `${` without `}`.
    #[error("`${{` without a closing brace")]
    Unclosed,
}

/// Resolves `${VARIABLE}`, `${VARIABLE:-default}` and `${file:/path}` (trailing newline cut) in a text.
///
/// # Errors
/// See [`UnresolvedReference`].
pub fn resolve(text: &str) -> Result<String, UnresolvedReference> {
    let mut resolved = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find("${") {
        resolved.push_str(&rest[..start]);
        let inner = &rest[start + 2..];
        let end = inner.find('}').ok_or(UnresolvedReference::Unclosed)?;
        let reference = &inner[..end];
        if let Some(path) = reference.strip_prefix("file:") {
            let content =
                std::fs::read_to_string(path).map_err(|cause| UnresolvedReference::File { path: path.to_owned(), cause })?;
            resolved.push_str(content.trim_end_matches(['\n', '\r']));
        } else {
            let (name, default) = match reference.split_once(":-") {
                Some((name, default)) => (name, Some(default)),
                None => (reference, None),
            };
            match (std::env::var(name), default) {
                (Ok(value), _) => resolved.push_str(&value),
                (Err(_), Some(default)) => resolved.push_str(default),
                (Err(_), None) => return Err(UnresolvedReference::Variable(name.to_owned())),
            }
        }
        rest = &inner[end + 1..];
    }
    resolved.push_str(rest);
    Ok(resolved)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_read_and_written() {
        let interval: Interval = serde_json::from_str("\"1m 30s\"").unwrap();
        assert_eq!(interval.0, Duration::from_secs(90));
        assert_eq!(serde_json::to_string(&interval).unwrap(), "\"1m30s\"");
        let size: ByteSize = serde_json::from_str("\"64KiB\"").unwrap();
        assert_eq!(size.0, 65536);
        assert!(serde_json::from_str::<Interval>("\"soon\"").unwrap_err().to_string().contains("50ms"));
        assert!(serde_json::from_str::<ByteSize>("\"big\"").unwrap_err().to_string().contains("64KiB"));
    }

    #[test]
    fn a_secret_never_prints() {
        let secret = Secret::new("hunter2");
        assert!(!format!("{secret:?}").contains("hunter2"));
        assert!(!serde_json::to_string(&secret).unwrap().contains("hunter2"));
        assert_eq!(secret.reveal().unwrap(), "hunter2");
    }

    #[test]
    fn references_are_resolved_or_named() {
        assert_eq!(resolve("a${NO_SUCH_VARIABLE_HERE:-b}c").unwrap(), "abc");
        assert!(resolve("${NO_SUCH_VARIABLE_HERE}").unwrap_err().to_string().contains("NO_SUCH_VARIABLE_HERE"));
        assert!(resolve("${oops").is_err());
    }
}
