//! Where something stands in an SQL text, in bytes. Called by everything here that reports a problem; the invariant:
//! an offset is on a character boundary of the text.

use datafusion::sql::sqlparser::dialect::GenericDialect;
use datafusion::sql::sqlparser::keywords::Keyword;
use datafusion::sql::sqlparser::tokenizer::{Location, Token, Tokenizer};

/// The byte at a line and column, both counted in characters from 1. None for places that the parser did not note.
pub(super) fn byte(text: &str, line: u64, column: u64) -> Option<usize> {
    if line == 0 || column == 0 {
        return None;
    }
    let mut start = 0;
    for _ in 1..line {
        start += text[start..].find('\n')? + 1;
    }
    let before = usize::try_from(column - 1).ok()?;
    let characters = text[start..].char_indices().map(|(at, _)| start + at);
    characters.chain([text.len()]).nth(before)
}

/// The byte at which a node of the parsed text begins.
pub(super) fn byte_of(text: &str, location: Location) -> Option<usize> {
    byte(text, location.line, location.column)
}

/// The place that the parser names at the end of an error message, as ` at Line: 1, Column: 8`.
pub(super) fn byte_in_message(text: &str, message: &str) -> Option<usize> {
    let (_, place) = message.rsplit_once(" at Line: ")?;
    let (line, column) = place.split_once(", Column: ")?;
    byte(text, line.trim().parse().ok()?, column.trim().parse().ok()?)
}

/// The first of some keywords that stands outside of all parentheses at or behind byte `from`. Clauses such as GROUP
/// BY carry no place in the parsed text, only their contents do.
pub(super) fn keyword(text: &str, from: usize, words: &[Keyword]) -> Option<usize> {
    find(text, from, |token| match token {
        Token::Word(word) => word.quote_style.is_none() && words.contains(&word.keyword),
        _ => false,
    })
}

/// What follows the first semicolon.
pub(super) fn second_statement(text: &str) -> Option<usize> {
    let semicolon = find(text, 0, |token| *token == Token::SemiColon)?;
    find(text, semicolon + 1, |token| !matches!(token, Token::Whitespace(_) | Token::SemiColon))
}

fn find(text: &str, from: usize, wanted: impl Fn(&Token) -> bool) -> Option<usize> {
    let tokens = Tokenizer::new(&GenericDialect {}, text).tokenize_with_location().ok()?;
    let mut depth = 0_usize;
    for token in tokens {
        match token.token {
            Token::LParen => depth += 1,
            Token::RParen => depth = depth.saturating_sub(1),
            _ => {}
        }
        let Some(at) = byte_of(text, token.span.start) else {
            continue;
        };
        if depth == 0 && at >= from && wanted(&token.token) {
            return Some(at);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_and_columns_are_counted_in_characters() {
        let text = "select 'é',\n  x from t";
        assert_eq!(byte(text, 1, 11), text.find(','));
        assert_eq!(byte(text, 2, 3), text.find('x'));
        assert_eq!(byte(text, 2, 11), Some(text.len()));
        assert_eq!(byte(text, 0, 0), None);
        assert_eq!(byte(text, 9, 1), None);
        assert_eq!(byte_in_message(text, "expected: y at Line: 2, Column: 3"), text.find('x'));
    }

    #[test]
    fn a_keyword_within_parentheses_or_quotes_is_passed_over() {
        let text = "select \"group\", (select 1 group by x), 'group' from t group by y";
        assert_eq!(keyword(text, 0, &[Keyword::GROUP]), text.rfind("group"));
        assert_eq!(keyword(text, 0, &[Keyword::LIMIT]), None);
        assert_eq!(second_statement("select 1; ; select 2"), Some(12));
        assert_eq!(second_statement("select 1;"), None);
    }
}
