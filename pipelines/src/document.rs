//! YAML text as a tree in which every key and value knows its place. The lint reads it; nothing else
//! parses pipeline files. The tree holds plain data only: no anchors, aliases, merges, tags or second
//! documents, each refused with its place, and bounded in size and depth.

use granit_parser::{Event, Parser, ScalarStyle, StrInput, StructureStyle};
use serde::Serialize;
use serde_json::{Map, Number, Value};

use crate::diagnostic::{Diagnostic, Diagnostics};

/// Largest file that is read. A pipeline is written by hand; more is a mistake or an attack.
pub const MAX_BYTES: usize = 1024 * 1024;
/// Deepest nesting that is read; the reader recurses, so more would cost stack.
pub const MAX_DEPTH: usize = 64;

/// A stretch of the file, in bytes; the end is exclusive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Span {
    /// First byte.
    pub start: usize,
    /// Behind the last byte.
    pub end: usize,
}

/// One YAML value.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// Where it stands. Of a block collection: from its first child to its last.
    pub span: Span,
    /// What it is.
    pub kind: Kind,
}

/// What a YAML value is.
#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    /// One value.
    Scalar(Scalar),
    /// A list.
    Seq(Vec<Node>),
    /// A map, in the order of the file; keys are unique.
    Map(Vec<Pair>),
}

/// A scalar.
#[derive(Clone, Debug, PartialEq)]
pub struct Scalar {
    /// Its text after YAML's unescaping.
    pub text: String,
    /// How it is written: only plain ones are numbers, booleans or null.
    pub style: ScalarStyle,
}

/// One entry of a map.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    /// The key.
    pub key: String,
    /// Where the key stands.
    pub key_span: Span,
    /// The value.
    pub value: Node,
}

/// Where a JSON pointer leads.
#[derive(Clone, Copy, Debug)]
pub struct Place<'n> {
    /// The key (of a list item: the item itself).
    pub key: Span,
    /// The value.
    pub node: &'n Node,
}

impl Place<'_> {
    /// The place to mark: the value where it is written on one line, else its key.
    pub fn span(&self, text: &str) -> Span {
        let written = text.get(self.node.span.start..self.node.span.end).unwrap_or_default();
        match self.node.kind {
            Kind::Scalar(_) if !written.is_empty() && !written.contains('\n') => self.node.span,
            _ => self.key_span(text),
        }
    }

    /// The key, as far as it is on one line.
    pub fn key_span(&self, text: &str) -> Span {
        first_line(self.key, text)
    }
}

impl Node {
    /// The entries of a map; none of anything else.
    pub fn pairs(&self) -> &[Pair] {
        match &self.kind {
            Kind::Map(pairs) => pairs,
            _ => &[],
        }
    }

    /// The entry of a map under that key.
    pub fn get(&self, key: &str) -> Option<&Pair> {
        self.pairs().iter().find(|pair| pair.key == key)
    }

    /// As JSON, references left as they are written.
    pub fn to_value(&self) -> Value {
        match &self.kind {
            Kind::Scalar(scalar) => scalar.typed(),
            Kind::Seq(items) => items.iter().map(Node::to_value).collect(),
            Kind::Map(pairs) => {
                Value::Object(pairs.iter().map(|pair| (pair.key.clone(), pair.value.to_value())).collect::<Map<_, _>>())
            }
        }
    }
}

impl Scalar {
    /// As JSON: a plain scalar by the rules of YAML 1.2's core schema, any other as a string.
    pub fn typed(&self) -> Value {
        self.typed_as(&self.text)
    }

    /// As JSON, as if `text` had been written in its place.
    pub fn typed_as(&self, text: &str) -> Value {
        if self.style != ScalarStyle::Plain {
            return Value::String(text.to_owned());
        }
        match text {
            "" | "~" | "null" | "Null" | "NULL" => Value::Null,
            "true" | "True" | "TRUE" => Value::Bool(true),
            "false" | "False" | "FALSE" => Value::Bool(false),
            _ => number(text).map_or_else(|| Value::String(text.to_owned()), Value::Number),
        }
    }
}

fn number(text: &str) -> Option<Number> {
    if let Some(hex) = text.strip_prefix("0x") {
        return u64::from_str_radix(hex, 16).ok().map(Number::from);
    }
    if let Some(octal) = text.strip_prefix("0o") {
        return u64::from_str_radix(octal, 8).ok().map(Number::from);
    }
    let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
    if !unsigned.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return None;
    }
    if let Ok(number) = text.parse::<i64>() {
        return Some(Number::from(number));
    }
    if let Ok(number) = text.parse::<u64>() {
        return Some(Number::from(number));
    }
    text.parse::<f64>().ok().and_then(Number::from_f64)
}

impl Pair {
    /// Where `pointer` leads from the value of this entry; see [`locate`].
    pub fn locate(&self, pointer: &str) -> Place<'_> {
        locate(Place { key: self.key_span, node: &self.value }, pointer)
    }
}

/// Where `pointer` leads from `place`; the nearest ancestor where it leads nowhere.
pub fn locate<'n>(mut place: Place<'n>, pointer: &str) -> Place<'n> {
    for token in pointer.split('/').skip(1) {
        let token = token.replace("~1", "/").replace("~0", "~");
        let next = match &place.node.kind {
            Kind::Map(pairs) => {
                pairs.iter().find(|pair| pair.key == token).map(|pair| Place { key: pair.key_span, node: &pair.value })
            }
            Kind::Seq(items) => {
                token.parse::<usize>().ok().and_then(|index| items.get(index)).map(|item| Place { key: item.span, node: item })
            }
            Kind::Scalar(_) => None,
        };
        match next {
            Some(next) => place = next,
            None => break,
        }
    }
    place
}

/// The word at byte `offset` of a scalar's text, as a place in the file. `None` when the node is no scalar
/// or the offset lies outside.
pub fn word_at(text: &str, node: &Node, offset: usize) -> Option<Span> {
    let Kind::Scalar(scalar) = &node.kind else { return None };
    let start = source_offset(text, node.span, scalar, offset)?;
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let rest = text.get(start..node.span.end)?;
    let word: usize = rest.chars().take_while(|c| is_word(*c)).map(char::len_utf8).sum();
    let length = if word > 0 { word } else { rest.chars().next().map_or(0, char::len_utf8) };
    Some(Span { start, end: start + length })
}

/// Walks a scalar's text and its source side by side, over quotes, escapes, folding and indentation.
fn source_offset(text: &str, span: Span, scalar: &Scalar, offset: usize) -> Option<usize> {
    let source = text.get(..span.end)?;
    let mut at = span.start;
    match scalar.style {
        ScalarStyle::Plain => {}
        ScalarStyle::SingleQuoted | ScalarStyle::DoubleQuoted => at += 1,
        // The header (`|`, `>-`) ends with its line.
        ScalarStyle::Literal | ScalarStyle::Folded => {
            if source.get(at..)?.starts_with(['|', '>']) {
                at += source.get(at..)?.find('\n')? + 1;
            }
        }
    }
    for (index, wanted) in scalar.text.char_indices() {
        let found = loop {
            let rest = source.get(at..)?;
            let next = rest.chars().next()?;
            if scalar.style == ScalarStyle::DoubleQuoted && next == '\\' {
                let escape = rest.chars().nth(1)?;
                if escape == '\n' || escape == '\r' {
                    at += 1;
                    continue;
                }
                let digits = match escape {
                    'x' => 2,
                    'u' => 4,
                    'U' => 8,
                    _ => 0,
                };
                at += 1 + escape.len_utf8() + digits;
                break at - 1 - escape.len_utf8() - digits;
            }
            if scalar.style == ScalarStyle::SingleQuoted && next == '\'' {
                at += 2;
                break at - 2;
            }
            if next == wanted || (next.is_whitespace() && wanted.is_whitespace()) {
                at += next.len_utf8();
                break at - next.len_utf8();
            }
            if !next.is_whitespace() {
                return None;
            }
            at += next.len_utf8();
        };
        if index >= offset {
            return Some(found);
        }
    }
    (offset == scalar.text.len()).then_some(at)
}

/// Line and column of a byte, both from 1; the column counts characters.
pub fn line_column(text: &str, offset: usize) -> (usize, usize) {
    let mut end = offset.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let before = &text[..end];
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

fn first_line(span: Span, text: &str) -> Span {
    let written = text.get(span.start..span.end).unwrap_or_default();
    let end = written.find('\n').map_or(span.end, |newline| span.start + written[..newline].trim_end().len());
    Span { start: span.start, end }
}

/// Parses one YAML document. Everything wrong goes to `diagnostics`; `None` when there is no tree to go
/// on with.
pub fn parse(text: &str, diagnostics: &mut Diagnostics) -> Option<Node> {
    if text.len() > MAX_BYTES {
        let message = format!("the file has {} bytes; a pipeline file may have at most {MAX_BYTES}", text.len());
        diagnostics.push(Diagnostic::error("too-large", Span::default(), message));
        return None;
    }
    let options = granit_parser::options! { emit_comments: false, emit_unresolved_aliases: true };
    let parser = Parser::new_from_str_with_options(text, options);
    Reader { text, parser, diagnostics }.document().ok()
}

/// Reading cannot go on; the reason has been told.
struct Stop;

struct Reader<'t, 'd> {
    text: &'t str,
    parser: Parser<'t, StrInput<'t>>,
    diagnostics: &'d mut Diagnostics,
}

impl<'t> Reader<'t, '_> {
    fn document(&mut self) -> Result<Node, Stop> {
        let mut root = None;
        loop {
            let (event, span) = self.next()?;
            match event {
                Event::StreamStart | Event::DocumentEnd => {}
                Event::DocumentStart(..) if root.is_some() => {
                    self.refuse(span, "a second document", "put each pipeline into a file of its own");
                    return Err(Stop);
                }
                Event::DocumentStart(..) => {}
                Event::StreamEnd => break,
                event => root = Some(self.node(event, span, 0)?),
            }
        }
        root.ok_or_else(|| {
            self.diagnostics.push(Diagnostic::error("syntax", Span::default(), "the file holds no pipeline"));
            Stop
        })
    }

    fn next(&mut self) -> Result<(Event<'t>, Span), Stop> {
        match self.parser.next_event() {
            Some(Ok((event, span))) => {
                let range = span.byte_range().unwrap_or_default();
                Ok((event, Span { start: range.start, end: range.end }))
            }
            Some(Err(error)) => {
                let marker = error.marker();
                let nth = || self.text.char_indices().nth(marker.index()).map_or(self.text.len(), |(at, _)| at);
                let start = marker.byte_offset().unwrap_or_else(nth);
                self.diagnostics.push(Diagnostic::error(
                    "syntax",
                    Span { start, end: start + 1 },
                    format!("not valid YAML: {}", error.info()),
                ));
                Err(Stop)
            }
            None => Err(Stop),
        }
    }

    fn node(&mut self, event: Event<'t>, span: Span, depth: usize) -> Result<Node, Stop> {
        if depth > MAX_DEPTH {
            self.diagnostics.push(Diagnostic::error("too-deep", span, format!("nested deeper than {MAX_DEPTH} levels")));
            return Err(Stop);
        }
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                self.plain_data(anchor, tag.is_some(), span);
                Ok(self.scalar(text.into_owned(), style, span))
            }
            Event::SequenceStart(style, anchor, tag) => {
                self.plain_data(anchor, tag.is_some(), span);
                let mut items = Vec::new();
                let end = loop {
                    let (event, at) = self.next()?;
                    if event == Event::SequenceEnd {
                        break at.end;
                    }
                    items.push(self.node(event, at, depth + 1)?);
                };
                let last = items.last().map_or(span.end, |item: &Node| item.span.end);
                Ok(Node { span: collection(style, span, end, last), kind: Kind::Seq(items) })
            }
            Event::MappingStart(style, anchor, tag) => {
                self.plain_data(anchor, tag.is_some(), span);
                let mut pairs = Vec::new();
                let end = loop {
                    let (event, at) = self.next()?;
                    if event == Event::MappingEnd {
                        break at.end;
                    }
                    self.pair(event, at, depth, &mut pairs)?;
                };
                let last = pairs.last().map_or(span.end, |pair| pair.value.span.end);
                Ok(Node { span: collection(style, span, end, last), kind: Kind::Map(pairs) })
            }
            Event::Alias(_) | Event::UnresolvedAlias(_) => {
                self.refuse(span, "an alias", "write the value out where it is used");
                Err(Stop)
            }
            _ => Err(Stop),
        }
    }

    fn pair(&mut self, event: Event<'t>, at: Span, depth: usize, pairs: &mut Vec<Pair>) -> Result<(), Stop> {
        let key = self.node(event, at, depth + 1)?;
        let (event, span) = self.next()?;
        let mut value = self.node(event, span, depth + 1)?;
        let Kind::Scalar(scalar) = &key.kind else {
            self.refuse(first_line(key.span, self.text), "a list or a map as a key", "write a word");
            return Err(Stop);
        };
        if value.span.start == value.span.end && matches!(value.kind, Kind::Scalar(_)) {
            // A key without a value: what the parser tells as its place may be on a later line.
            value.span = Span { start: key.span.end, end: key.span.end };
        }
        let key_span = key.span;
        if scalar.style == ScalarStyle::Plain && scalar.text == "<<" {
            self.refuse(key_span, "a merge key", "write the keys out where they are used");
            return Ok(());
        }
        if let Some(first) = pairs.iter().find(|pair| pair.key == scalar.text) {
            let (line, _) = line_column(self.text, first.key_span.start);
            let message = format!("the key `{}` is written twice", scalar.text);
            self.diagnostics
                .push(Diagnostic::error("duplicate-key", key_span, message).help(format!("it is first written on line {line}")));
            return Ok(());
        }
        pairs.push(Pair { key: scalar.text.clone(), key_span, value });
        Ok(())
    }

    fn scalar(&self, text: String, style: ScalarStyle, mut span: Span) -> Node {
        if style == ScalarStyle::Plain {
            let written = self.text.get(span.start..span.end).unwrap_or_default().trim_end();
            // What is left out comes as `~`, in the place of what stands next to it.
            let left_out = text == "~" && written != "~";
            span.end = if left_out { span.start } else { span.start + written.len() };
        }
        Node { span, kind: Kind::Scalar(Scalar { text, style }) }
    }

    fn plain_data(&mut self, anchor: usize, tagged: bool, span: Span) {
        if anchor != 0 {
            self.refuse(first_line(span, self.text), "an anchor", "write the value out where it is used");
        }
        if tagged {
            self.refuse(first_line(span, self.text), "a tag", "leave it out; put a text in quotes");
        }
    }

    fn refuse(&mut self, span: Span, what: &str, help: &str) {
        let message = format!("{what} is not supported in a pipeline file");
        self.diagnostics.push(Diagnostic::error("unsupported-yaml", span, message).help(help.to_owned()));
    }
}

fn collection(style: StructureStyle, start: Span, end: usize, last: usize) -> Span {
    let end = match style {
        StructureStyle::Flow => end,
        StructureStyle::Block => last,
    };
    Span { start: start.start, end: end.max(start.start) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn tree(text: &str) -> Node {
        let mut diagnostics = Diagnostics::new();
        let root = parse(text, &mut diagnostics);
        assert!(!diagnostics.has_errors(), "{diagnostics:?}");
        root.unwrap()
    }

    fn refused(text: &str) -> Vec<(&'static str, usize, usize)> {
        let mut diagnostics = Diagnostics::new();
        parse(text, &mut diagnostics);
        diagnostics.finish(text, "f").iter().map(|d| (d.code, d.line, d.column)).collect()
    }

    fn slice(text: &str, span: Span) -> &str {
        &text[span.start..span.end]
    }

    #[test]
    fn plain_scalars_are_typed_and_quoted_ones_are_text() {
        let root = tree(
            "a: 1\nb: -2.5\nc: true\nd:\ne: \"1\"\nf: 1.2.3\ng: 0x10\nh: yes\ni: 2024-01-02\nj: [1e3, ~]\nk: 18446744073709551615\n",
        );
        let wanted = json!({"a": 1, "b": -2.5, "c": true, "d": null, "e": "1", "f": "1.2.3", "g": 16, "h": "yes", "i": "2024-01-02",
            "j": [1000.0, null], "k": 18446744073709551615u64});
        assert_eq!(root.to_value(), wanted);
    }

    #[test]
    fn keys_and_values_know_their_place() {
        let text = "a:\n  b: { c: [x, \"y z\"] }\n  d: word  # said\ne:\nf: 1\n";
        let root = tree(text);
        let a = root.get("a").unwrap();
        assert_eq!(slice(text, a.key_span), "a");
        assert_eq!(slice(text, a.locate("/b/c/1").span(text)), "\"y z\"");
        assert_eq!(slice(text, a.locate("/b/c").span(text)), "c");
        assert_eq!(slice(text, a.locate("/d").span(text)), "word");
        assert_eq!(slice(text, a.locate("/d/nowhere").span(text)), "word");
        assert_eq!(slice(text, a.locate("/nowhere").span(text)), "a");
        assert_eq!(slice(text, root.get("e").unwrap().locate("").span(text)), "e");
        assert_eq!(line_column(text, a.locate("/d").span(text).start), (3, 6));
    }

    #[test]
    fn an_offset_is_followed_into_every_kind_of_scalar() {
        for text in [
            "q: select wrong from t\n",
            "q: 'select wrong from ''t'''\n",
            "q: \"select wrong from t\"\n",
            "q: \"\\tselect wrong \\\n  from t\"\n",
            "q: |\n    select\n      wrong from t\n",
            "q: >-\n  select\n  wrong from t\n",
            "q: select\n  wrong from t\n",
        ] {
            let root = tree(text);
            let node = &root.get("q").unwrap().value;
            let Kind::Scalar(scalar) = &node.kind else { panic!("no scalar") };
            let offset = scalar.text.find("wrong").unwrap();
            assert_eq!(slice(text, word_at(text, node, offset).unwrap()), "wrong", "in {text:?}");
        }
    }

    #[test]
    fn what_is_refused_is_named_with_its_place() {
        assert_eq!(refused("a: 1\nb: 2\na: 3\n"), [("duplicate-key", 3, 1)]);
        assert_eq!(refused("a: &x 1\n")[0].0, "unsupported-yaml");
        assert_eq!(refused("a: &x 1\nb: *x\n").last(), Some(&("unsupported-yaml", 2, 4)));
        assert_eq!(refused("b: *x\n"), [("unsupported-yaml", 1, 4)]);
        assert_eq!(refused("<<: 1\n"), [("unsupported-yaml", 1, 1)]);
        assert_eq!(refused("a: !!str 1\n")[0].0, "unsupported-yaml");
        assert_eq!(refused("a: 1\n---\nb: 1\n"), [("unsupported-yaml", 2, 1)]);
        assert_eq!(refused("a: [1\nb: 2\n")[0].0, "syntax");
        assert_eq!(refused("")[0].0, "syntax");
        assert_eq!(refused(&format!("a: {}{}\n", "[".repeat(70), "]".repeat(70)))[0].0, "too-deep");
        assert_eq!(refused(&"a".repeat(MAX_BYTES + 1)), [("too-large", 1, 1)]);
    }
}
