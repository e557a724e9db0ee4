//! Protobuf text format, as much of it as `config.pbtxt` files use, read into a tree. `config` reads the
//! tree. Lists are flattened into repeated fields, which is what they mean; unknown names are kept, since
//! only the reader knows which matter.
//!
//! Format: "Text Format Language Specification", protobuf.dev.

use std::iter::Peekable;
use std::str::Chars;

/// Messages nested deeper than this are refused: a hostile file must not exhaust the stack.
const MAX_DEPTH: usize = 64;

/// What is wrong in a `config.pbtxt`, and where; lines and columns count from 1.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {message}")]
pub struct ConfigError {
    /// Line of the file.
    pub line: usize,
    /// Character of the line.
    pub column: usize,
    /// What was expected and what was found.
    pub message: String,
}

/// A place in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Position {
    line: usize,
    column: usize,
}

impl Position {
    /// An error at this place.
    pub(crate) fn error(self, message: impl Into<String>) -> ConfigError {
        ConfigError { line: self.line, column: self.column, message: message.into() }
    }
}

/// The value of a field.
#[derive(Debug, PartialEq)]
pub(crate) enum Value {
    /// Number, truth value or enum word.
    Word(String),
    /// Quoted text, escapes resolved.
    Text(String),
    /// Nested fields.
    Message(Message),
}

/// One occurrence of a field.
#[derive(Debug, PartialEq)]
pub(crate) struct Field {
    pub(crate) name: String,
    pub(crate) value: Value,
    pub(crate) position: Position,
}

/// Fields in the order of the file.
#[derive(Debug, PartialEq, Default)]
pub(crate) struct Message {
    fields: Vec<Field>,
}

impl Message {
    /// Every occurrence of a repeated field.
    pub(crate) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Field> {
        self.fields.iter().filter(move |field| field.name == name)
    }

    /// A singular field: the last occurrence counts.
    pub(crate) fn last<'a>(&'a self, name: &'a str) -> Option<&'a Field> {
        self.all(name).last()
    }
}

/// Reads a whole file.
pub(crate) fn parse(text: &str) -> Result<Message, ConfigError> {
    let mut parser = Parser { rest: text.chars().peekable(), position: Position { line: 1, column: 1 } };
    parser.message(None, 0)
}

struct Parser<'a> {
    rest: Peekable<Chars<'a>>,
    position: Position,
}

impl Parser<'_> {
    fn peek(&mut self) -> Option<char> {
        self.rest.peek().copied()
    }

    fn next(&mut self) -> Option<char> {
        let character = self.rest.next()?;
        if character == '\n' {
            self.position = Position { line: self.position.line + 1, column: 1 };
        } else {
            self.position.column += 1;
        }
        Some(character)
    }

    /// Takes the character if it is the next one.
    fn take(&mut self, wanted: char) -> bool {
        let found = self.peek() == Some(wanted);
        if found {
            self.next();
        }
        found
    }

    fn skip_space(&mut self) {
        while let Some(character) = self.peek() {
            if character == '#' {
                while self.peek().is_some_and(|character| character != '\n') {
                    self.next();
                }
            } else if character.is_whitespace() {
                self.next();
            } else {
                return;
            }
        }
    }

    fn word(&mut self, accepts: impl Fn(char) -> bool) -> String {
        let mut word = String::new();
        while let Some(character) = self.peek().filter(|&character| accepts(character)) {
            word.push(character);
            self.next();
        }
        word
    }

    fn found(&mut self) -> String {
        match self.peek() {
            Some(character) => format!("found `{character}`"),
            None => "the file ends".to_owned(),
        }
    }

    /// Fields up to the closing bracket, or to the end of the file.
    fn message(&mut self, closing: Option<char>, depth: usize) -> Result<Message, ConfigError> {
        let opened = self.position;
        if depth > MAX_DEPTH {
            return Err(opened.error(format!("more than {MAX_DEPTH} nested messages")));
        }
        let mut message = Message::default();
        loop {
            self.skip_space();
            match (self.peek(), closing) {
                (None, None) => return Ok(message),
                (None, Some(bracket)) => {
                    return Err(opened.error(format!("this message is not closed by `{bracket}`")));
                }
                (Some(character), Some(bracket)) if character == bracket => {
                    self.next();
                    return Ok(message);
                }
                _ => self.field(&mut message, depth)?,
            }
            self.skip_space();
            if !self.take(',') {
                self.take(';');
            }
        }
    }

    fn field(&mut self, message: &mut Message, depth: usize) -> Result<(), ConfigError> {
        let position = self.position;
        let name = self.word(|character| character.is_ascii_alphanumeric() || character == '_');
        if name.is_empty() {
            let found = self.found();
            return Err(position.error(format!("expected a field name, {found}")));
        }
        self.skip_space();
        let colon = self.take(':');
        self.skip_space();
        match self.peek() {
            Some('[') => self.list(&name, message, depth),
            Some('{' | '<') => self.push(name, message, depth),
            _ if colon => self.push(name, message, depth),
            _ => {
                let found = self.found();
                Err(self.position.error(format!("expected `:` or `{{` after `{name}`, {found}")))
            }
        }
    }

    fn list(&mut self, name: &str, message: &mut Message, depth: usize) -> Result<(), ConfigError> {
        let opened = self.position;
        self.next();
        loop {
            self.skip_space();
            if self.take(']') {
                return Ok(());
            }
            if self.peek().is_none() {
                return Err(opened.error(format!("the list of `{name}` is not closed by `]`")));
            }
            self.push(name.to_owned(), message, depth)?;
            self.skip_space();
            if !self.take(',') && self.peek().is_some_and(|character| character != ']') {
                let found = self.found();
                return Err(self.position.error(format!("expected `,` or `]` in the list of `{name}`, {found}")));
            }
        }
    }

    fn push(&mut self, name: String, message: &mut Message, depth: usize) -> Result<(), ConfigError> {
        let position = self.position;
        let value = match self.peek() {
            Some('{') => {
                self.next();
                Value::Message(self.message(Some('}'), depth + 1)?)
            }
            Some('<') => {
                self.next();
                Value::Message(self.message(Some('>'), depth + 1)?)
            }
            Some('"' | '\'') => Value::Text(self.text()?),
            _ => {
                let word = self.word(|character| character.is_ascii_alphanumeric() || matches!(character, '_' | '.' | '+' | '-'));
                if word.is_empty() {
                    let found = self.found();
                    return Err(position.error(format!("expected a value for `{name}`, {found}")));
                }
                Value::Word(word)
            }
        };
        message.fields.push(Field { name, value, position });
        Ok(())
    }

    /// Quoted text; neighbouring pieces are one text.
    fn text(&mut self) -> Result<String, ConfigError> {
        let mut text = String::new();
        while let Some(quote @ ('"' | '\'')) = self.peek() {
            let opened = self.position;
            self.next();
            loop {
                let position = self.position;
                match self.next() {
                    Some(character) if character == quote => break,
                    None | Some('\n') => {
                        return Err(opened.error(format!("this text is not closed by `{quote}`")));
                    }
                    Some('\\') => text.push(match self.next() {
                        Some('n') => '\n',
                        Some('t') => '\t',
                        Some('r') => '\r',
                        Some(character @ ('\\' | '"' | '\'')) => character,
                        Some(character) => {
                            return Err(position.error(format!("the escape `\\{character}` is not supported")));
                        }
                        None => {
                            return Err(opened.error(format!("this text is not closed by `{quote}`")));
                        }
                    }),
                    Some(character) => text.push(character),
                }
            }
            self.skip_space();
        }
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(message: &Message, name: &str) -> Vec<String> {
        message
            .all(name)
            .map(|field| match &field.value {
                Value::Word(word) | Value::Text(word) => word.clone(),
                Value::Message(_) => "{}".to_owned(),
            })
            .collect()
    }

    #[test]
    fn every_form_of_a_field_is_read() {
        let message = parse(
            "# a comment\nname: \"an\" 'omaly' # another\nmax_batch_size: 32;\nrate: -1.5e3,\n\
             dims: [ 1, -1 ,3 ] dims: 4\nnested { a: true } nested: { a: false } angle < b: 1 >\n\
             many [ { c: 1 }, { c: 2 } ] empty: []\nquoted: 'tab\\t\"q\\''",
        )
        .unwrap();
        assert_eq!(words(&message, "name"), ["anomaly"]);
        assert_eq!(words(&message, "max_batch_size"), ["32"]);
        assert_eq!(words(&message, "rate"), ["-1.5e3"]);
        assert_eq!(words(&message, "dims"), ["1", "-1", "3", "4"]);
        assert_eq!(words(&message, "quoted"), ["tab\t\"q'"]);
        assert_eq!(message.all("many").count(), 2);
        assert_eq!(message.all("empty").count(), 0);
        let nested: Vec<_> = message
            .all("nested")
            .map(|field| match &field.value {
                Value::Message(nested) => words(nested, "a"),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(nested, [["true"], ["false"]]);
        let last = message.last("dims").unwrap();
        assert_eq!(last.position, Position { line: 5, column: 26 });
    }

    #[test]
    fn errors_say_where() {
        let error = |text: &str| parse(text).unwrap_err().to_string();
        assert_eq!(error("name \"x\""), "line 1, column 6: expected `:` or `{` after `name`, found `\"`");
        assert_eq!(error("a: 1\n  b:\n"), "line 3, column 1: expected a value for `b`, the file ends");
        assert_eq!(error("a: 1\ninput {\n  b: 2"), "line 2, column 8: this message is not closed by `}`");
        assert_eq!(error("dims: [1 2]"), "line 1, column 10: expected `,` or `]` in the list of `dims`, found `2`");
        assert_eq!(error("dims: [1,"), "line 1, column 7: the list of `dims` is not closed by `]`");
        assert_eq!(error("name: \"x\ny\""), "line 1, column 7: this text is not closed by `\"`");
        assert_eq!(error("} a: 1"), "line 1, column 1: expected a field name, found `}`");
    }

    #[test]
    fn deep_nesting_is_refused() {
        let text = "a {".repeat(100_000);
        assert!(parse(&text).unwrap_err().message.starts_with("more than 64 nested"));
    }
}
