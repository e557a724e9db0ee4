//! Splits text into records and cells of CSV (RFC 4180), strictly: a stray quote is an error, not a guess. Used by the
//! CSV codec, the reader of CSV files and schema inference.

/// One record, split into cells.
#[derive(Debug, Default)]
pub(crate) struct Record {
    text: String,
    ends: Vec<usize>,
    quoted: Vec<bool>,
}

/// Why no record could be split off.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Flaw {
    /// A quoted cell has no end; more lines could bring it.
    Unterminated,
    /// No continuation could mend it.
    Malformed(&'static str),
}

impl Flaw {
    pub(crate) fn reason(&self) -> String {
        match self {
            Flaw::Unterminated => "a quoted cell without an end".to_owned(),
            Flaw::Malformed(reason) => (*reason).to_owned(),
        }
    }
}

impl Record {
    /// Splits the first record off `input` and gives what follows it.
    pub(crate) fn split<'a>(&mut self, input: &'a str, delimiter: u8) -> Result<&'a str, Flaw> {
        self.text.clear();
        self.ends.clear();
        self.quoted.clear();
        let bytes = input.as_bytes();
        let mut at = 0;
        loop {
            let quoted = bytes.get(at) == Some(&b'"');
            at = if quoted { self.quoted_cell(input, at + 1)? } else { self.plain_cell(input, at, delimiter)? };
            self.ends.push(self.text.len());
            self.quoted.push(quoted);
            match bytes.get(at) {
                None => return Ok(""),
                Some(b'\n') => return Ok(&input[at + 1..]),
                Some(byte) if *byte == delimiter => at += 1,
                Some(_) => return Err(Flaw::Malformed("text after a closing quote")),
            }
        }
    }

    /// Reads on from behind an opening quote; gives the place of the delimiter or line end.
    fn quoted_cell(&mut self, input: &str, mut at: usize) -> Result<usize, Flaw> {
        let bytes = input.as_bytes();
        loop {
            let length = bytes[at..].iter().position(|byte| *byte == b'"');
            let end = at + length.ok_or(Flaw::Unterminated)?;
            self.text.push_str(&input[at..end]);
            at = end + 1;
            match (bytes.get(at), bytes.get(at + 1)) {
                (Some(b'"'), _) => {
                    self.text.push('"');
                    at += 1;
                }
                (Some(b'\r'), None | Some(b'\n')) => return Ok(at + 1),
                _ => return Ok(at),
            }
        }
    }

    fn plain_cell(&mut self, input: &str, at: usize, delimiter: u8) -> Result<usize, Flaw> {
        let bytes = input.as_bytes();
        let stop = |byte: &u8| matches!(*byte, b'\n' | b'"' | 0) || *byte == delimiter;
        let length = bytes[at..].iter().position(stop);
        let end = length.map_or(bytes.len(), |length| at + length);
        match bytes.get(end) {
            Some(b'"') => return Err(Flaw::Malformed("a quote within an unquoted cell")),
            Some(0) => return Err(Flaw::Malformed("a NUL byte")),
            _ => {}
        }
        let mut cell = &input[at..end];
        if bytes.get(end) != Some(&delimiter) {
            cell = cell.strip_suffix('\r').unwrap_or(cell);
        }
        self.text.push_str(cell);
        Ok(end)
    }

    /// The cells in order; an unquoted empty one is `None`.
    pub(crate) fn cells(&self) -> impl Iterator<Item = Option<&str>> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        let text = self.text.as_str();
        let cells = starts.zip(&self.ends).zip(&self.quoted);
        cells.map(move |((start, end), quoted)| (*quoted || *end > start).then(|| &text[start..*end]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_as_rfc_4180_says() {
        let mut record = Record::default();
        let rest = record.split("a,\"b \"\"c\"\",\nd\",,\"\"\r\nnext", b',').unwrap();
        let cells: Vec<_> = record.cells().collect();
        assert_eq!(cells, [Some("a"), Some("b \"c\",\nd"), None, Some("")]);
        assert_eq!(rest, "next");
        assert_eq!(record.split("é;ü\r\n", b';'), Ok(""));
        assert_eq!(record.cells().collect::<Vec<_>>(), [Some("é"), Some("ü")]);
        assert_eq!(record.split("\"a", b','), Err(Flaw::Unterminated));
        assert!(matches!(record.split("a\"b", b','), Err(Flaw::Malformed(_))));
        assert!(matches!(record.split("\"a\"b", b','), Err(Flaw::Malformed(_))));
        assert!(matches!(record.split("a\0b", b','), Err(Flaw::Malformed(_))));
    }
}
