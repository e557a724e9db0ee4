//! `${VARIABLE}` and `${file:...}` in a pipeline file, resolved before planning so that a missing one is
//! told with its place. Secrets stay as they are written: their own type resolves them when the component is
//! built, and no plan, error or fingerprint ever holds one.

use afferent_engine::config;
use serde_json::{Map, Value};

use crate::diagnostic::{Diagnostic, Diagnostics};
use crate::document::{Kind, Node, Place, word_at};

/// Words that a key ends in when its value is a secret.
const SECRET: [&str; 8] = ["password", "passphrase", "token", "secret", "api_key", "private_key", "access_key", "credentials"];

/// Whether the value under this key is a secret.
pub fn is_secret(key: &str) -> bool {
    let key = key.to_lowercase();
    SECRET.iter().any(|word| key.strip_suffix(word).is_some_and(|before| before.is_empty() || before.ends_with(['_', '-', '.'])))
}

/// The value of `node` with every reference resolved but those of secrets. A plain scalar gets its type
/// after that, so that `rows: ${ROWS}` is a number. `None` when one leads nowhere, which is told.
pub fn resolved(node: &Node, key: &str, text: &str, diagnostics: &mut Diagnostics) -> Option<Value> {
    match &node.kind {
        Kind::Scalar(scalar) if !scalar.text.contains("${") || is_secret(key) => Some(scalar.typed()),
        Kind::Scalar(scalar) => match config::resolve(&scalar.text) {
            Ok(value) => Some(scalar.typed_as(&value)),
            Err(cause) => {
                let whole = Place { key: node.span, node }.span(text);
                let span = scalar.text.find("${").and_then(|at| word_at(text, node, at + 2)).unwrap_or(whole);
                let help = "set it, or give a default: `${NAME:-default}`".to_owned();
                diagnostics.push(Diagnostic::error("missing-variable", span, cause.to_string()).help(help));
                None
            }
        },
        // No short cut at the first missing one: all are to be told.
        Kind::Seq(items) => {
            let items: Vec<_> = items.iter().map(|item| resolved(item, key, text, diagnostics)).collect();
            items.into_iter().collect::<Option<Vec<_>>>().map(Value::Array)
        }
        Kind::Map(pairs) => {
            let entries: Vec<_> =
                pairs.iter().map(|pair| Some((pair.key.clone(), resolved(&pair.value, &pair.key, text, diagnostics)?))).collect();
            entries.into_iter().collect::<Option<Map<_, _>>>().map(Value::Object)
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::document::parse;

    #[test]
    fn references_are_resolved_and_typed_and_secrets_left_alone() {
        let text = "rows: ${AFFERENT_NO_SUCH:-12}\nname: \"${AFFERENT_NO_SUCH:-12}\"\npassword: ${AFFERENT_NO_SUCH}\nmax_tokens: ${AFFERENT_NO_SUCH:-9}\n";
        let mut diagnostics = Diagnostics::new();
        let root = parse(text, &mut diagnostics).unwrap();
        let value = resolved(&root, "", text, &mut diagnostics).unwrap();
        assert_eq!(value, json!({"rows": 12, "name": "12", "password": "${AFFERENT_NO_SUCH}", "max_tokens": 9}));
    }

    #[test]
    fn every_missing_variable_is_told_at_its_place() {
        let text = "a: [x, \"y ${AFFERENT_NO_SUCH}\"]\nb: ${AFFERENT_NONE_EITHER}\n";
        let mut diagnostics = Diagnostics::new();
        let root = parse(text, &mut diagnostics).unwrap();
        assert_eq!(resolved(&root, "", text, &mut diagnostics), None);
        let found = diagnostics.finish(text, "f");
        let places: Vec<_> = found.iter().map(|d| (d.code, d.line, d.column)).collect();
        assert_eq!(places, [("missing-variable", 1, 13), ("missing-variable", 2, 6)]);
        assert!(found[0].message.contains("AFFERENT_NO_SUCH"));
    }

    #[test]
    fn secrets_are_told_by_the_key() {
        assert!(is_secret("password") && is_secret("sasl_password") && is_secret("API_KEY"));
        assert!(!is_secret("max_tokens") && !is_secret("tokenizer") && !is_secret("topic"));
    }
}
