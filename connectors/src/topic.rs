//! MQTT topics as configurations write them: *patterns* of a source, which subscribe and capture levels
//! (`plant/{site}/{device}/vibration`), and *templates* of a sink, which name a topic for each row
//! (`results/{device}/label`). Everything that can be wrong with either is found while planning.
//!
//! A pattern is an MQTT topic filter in which a level may be `{name}`: it matches any one level, as `+` does, and
//! becomes a column of that name. `#` stands for all remaining levels. `$share/<group>/` in front makes a
//! shared subscription, with which identical processes divide a stream.

use std::fmt::Write as _;

use afferent_engine::component::Problem;
use afferent_engine::{Error, Result, message};
use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::{DataType, SchemaRef};
use arrow::util::display::{ArrayFormatter, FormatOptions};

/// The longest topic that the protocol can carry, in bytes.
const LONGEST_TOPIC: usize = 65_535;

/// All patterns of one source; they capture the same names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Patterns {
    captures: Vec<String>,
    patterns: Vec<Pattern>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Pattern {
    filter: String,
    levels: Vec<Level>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Level {
    Literal(String),
    Any,
    /// Index into the captures of all patterns.
    Capture(usize),
    Rest,
}

impl Patterns {
    /// Reads the patterns of a source; `path` is the JSON pointer of the list.
    ///
    /// # Errors
    /// Every problem of every pattern: wildcards that do not stand alone, levels behind `#`, names that are no
    /// column names, and patterns that capture other names than the first one does.
    pub fn parse(written: &[String], path: &str) -> std::result::Result<Self, Vec<Problem>> {
        let mut problems = Vec::new();
        if written.is_empty() {
            problems.push(
                Problem::new("no-topics", path, "there is no topic to subscribe to")
                    .help("write for example [\"plant/+/vibration\"]"),
            );
        }
        let mut captures: Option<Vec<String>> = None;
        let mut patterns = Vec::new();
        for (number, text) in written.iter().enumerate() {
            let place = format!("{path}/{number}");
            let (pattern, names) = match parse_pattern(text, &place) {
                Ok(parsed) => parsed,
                Err(problem) => {
                    problems.push(problem);
                    continue;
                }
            };
            let Some(first) = captures.as_ref() else {
                captures = Some(names);
                patterns.push(pattern);
                continue;
            };
            if same_names(first, &names) {
                patterns.push(renumber(pattern, &names, first));
            } else {
                problems.push(
                    Problem::new(
                        "topic-captures",
                        place,
                        format!("`{text}` captures {}, the first topic captures {}", list(&names), list(first)),
                    )
                    .help("all topics of a source fill the same columns: capture the same names, or make it two sources"),
                );
            }
        }
        if problems.is_empty() { Ok(Self { captures: captures.unwrap_or_default(), patterns }) } else { Err(problems) }
    }

    /// The captured names, in the order of the first pattern: the columns behind those of the message schema.
    pub fn captures(&self) -> &[String] {
        &self.captures
    }

    /// What to subscribe to.
    pub fn filters(&self) -> impl Iterator<Item = &str> {
        self.patterns.iter().map(|pattern| pattern.filter.as_str())
    }

    /// Matches a topic and fills `captured` with one level for each of [`Patterns::captures`]; false (and nothing
    /// captured) when no pattern matches.
    pub fn capture<'t>(&self, topic: &'t str, captured: &mut Vec<&'t str>) -> bool {
        self.patterns.iter().any(|pattern| {
            captured.clear();
            captured.resize(self.captures.len(), "");
            let matched = pattern.matches(topic, captured);
            if !matched {
                captured.clear();
            }
            matched
        })
    }
}

impl Pattern {
    fn matches<'t>(&self, topic: &'t str, captured: &mut [&'t str]) -> bool {
        // Wildcards do not match the broker's own topics (`$SYS/...`) at the first level [MQTT-4.7.2-1].
        if topic.starts_with('$') && !matches!(self.levels.first(), Some(Level::Literal(_))) {
            return false;
        }
        let mut levels = topic.split('/');
        for level in &self.levels {
            // `a/#` matches `a` as well, so the end of the topic is no mismatch here.
            if *level == Level::Rest {
                return true;
            }
            let Some(found) = levels.next() else { return false };
            match level {
                Level::Literal(expected) if expected != found => return false,
                Level::Capture(index) => {
                    if let Some(place) = captured.get_mut(*index) {
                        *place = found;
                    }
                }
                Level::Literal(_) | Level::Any | Level::Rest => {}
            }
        }
        levels.next().is_none()
    }
}

fn parse_pattern(text: &str, path: &str) -> std::result::Result<(Pattern, Vec<String>), Problem> {
    let problem = |message: String| Problem::new("topic-pattern", path, message);
    if text.is_empty() || text.contains('\0') || text.len() > LONGEST_TOPIC {
        return Err(problem(format!(
            "`{}` is not a topic: it is empty, too long or holds a zero byte",
            text.replace('\0', "\\0")
        )));
    }
    let (prefix, body) = match text.strip_prefix("$share/") {
        None => (String::new(), text),
        Some(rest) => match rest.split_once('/') {
            Some((group, body)) if !group.is_empty() && !body.is_empty() && !group.contains(['+', '#', '{']) => {
                (format!("$share/{group}/"), body)
            }
            _ => return Err(problem(format!("`{text}` is not a shared subscription")).help("write `$share/<group>/<topic>`")),
        },
    };
    let (mut levels, mut names, mut filter) = (Vec::new(), Vec::new(), prefix);
    let count = body.split('/').count();
    for (number, level) in body.split('/').enumerate() {
        if number > 0 {
            filter.push('/');
        }
        if level == "#" {
            if number + 1 < count {
                return Err(
                    problem(format!("`#` must be the last level of `{text}`")).help("use `+` or `{name}` for a single level")
                );
            }
            filter.push('#');
            levels.push(Level::Rest);
        } else if level == "+" {
            filter.push('+');
            levels.push(Level::Any);
        } else if let Some(name) = level.strip_prefix('{').and_then(|rest| rest.strip_suffix('}')) {
            check_name(name, text, path, &names)?;
            filter.push('+');
            levels.push(Level::Capture(names.len()));
            names.push(name.to_owned());
        } else if level.contains(['+', '#', '{', '}']) {
            return Err(problem(format!("`{level}` in `{text}` mixes text and a wildcard"))
                .help("a level is text, `+`, `#` or `{name}`; take a part of a level with `sql` behind the source"));
        } else {
            filter.push_str(level);
            levels.push(Level::Literal(level.to_owned()));
        }
    }
    Ok((Pattern { filter, levels }, names))
}

fn check_name(name: &str, text: &str, path: &str, taken: &[String]) -> std::result::Result<(), Problem> {
    let letter = |c: char| c.is_ascii_alphabetic() || c == '_';
    if !name.starts_with(letter) || !name.chars().all(|c| letter(c) || c.is_ascii_digit()) {
        return Err(Problem::new("topic-pattern", path, format!("`{{{name}}}` in `{text}` is no column name"))
            .help("letters, digits and `_`, not beginning with a digit"));
    }
    if message::COLUMNS.contains(&name) {
        return Err(Problem::new("topic-pattern", path, format!("`{{{name}}}` in `{text}` is a column that every message has"))
            .help(format!("choose another name, such as `{name}_level`")));
    }
    if taken.iter().any(|other| other == name) {
        return Err(
            Problem::new("topic-pattern", path, format!("`{text}` captures `{name}` twice")).help("give each level its own name")
        );
    }
    Ok(())
}

fn same_names(one: &[String], other: &[String]) -> bool {
    one.len() == other.len() && one.iter().all(|name| other.contains(name))
}

/// Captures numbered as in the first pattern, whatever the order of levels here.
fn renumber(pattern: Pattern, names: &[String], first: &[String]) -> Pattern {
    let index_of = |index: usize| names.get(index).and_then(|name| first.iter().position(|other| other == name)).unwrap_or(index);
    let levels = pattern
        .levels
        .into_iter()
        .map(|level| match level {
            Level::Capture(index) => Level::Capture(index_of(index)),
            other => other,
        })
        .collect();
    Pattern { filter: pattern.filter, levels }
}

fn list(names: &[String]) -> String {
    if names.is_empty() {
        "nothing".to_owned()
    } else {
        names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
    }
}

/// The topic of each row, from text and columns: `results/{device}/label`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    parts: Vec<Part>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    Column { index: usize, name: String },
}

impl Template {
    /// What is wrong with a template whatever the columns are: no topic may have wildcards, or be empty.
    pub fn check(text: &str, path: &str) -> Option<Problem> {
        (text.is_empty() || text.contains(['+', '#', '\0'])).then(|| {
            Problem::new(
                "topic-template",
                path,
                format!("`{}` is not a topic that can be published to", text.replace('\0', "\\0")),
            )
            .help("a topic has no `+` or `#`; write `{column}` for what differs from row to row")
        })
    }

    /// Reads a template against the schema of the rows; `path` is its JSON pointer.
    ///
    /// # Errors
    /// Every problem: wildcards, braces that do not close, unknown columns, columns that have no place in a topic.
    pub fn parse(text: &str, schema: &SchemaRef, path: &str) -> std::result::Result<Self, Vec<Problem>> {
        let mut problems = Vec::from_iter(Self::check(text, path));
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some(start) = rest.find(['{', '}']) {
            let (before, from) = rest.split_at(start);
            if !before.is_empty() {
                parts.push(Part::Text(before.to_owned()));
            }
            let Some((name, behind)) = from.strip_prefix('{').and_then(|inner| inner.split_once('}')) else {
                problems.push(
                    Problem::new("topic-template", path, format!("a brace in `{text}` has no partner"))
                        .at(text.len() - from.len()),
                );
                rest = "";
                break;
            };
            match column(name, schema) {
                Ok(index) => parts.push(Part::Column { index, name: name.to_owned() }),
                Err((message, help)) => {
                    // Behind the brace: the name is what is marked.
                    let place = text.len() - from.len() + 1;
                    problems.push(Problem::new("unknown-column", path, message).help(help).at(place));
                }
            }
            rest = behind;
        }
        if !rest.is_empty() {
            parts.push(Part::Text(rest.to_owned()));
        }
        if problems.is_empty() { Ok(Self { parts }) } else { Err(problems) }
    }

    /// The template over the columns of one batch.
    ///
    /// # Errors
    /// Fatal when the batch does not have the planned columns.
    pub fn over<'b>(&'b self, batch: &'b RecordBatch) -> Result<Topics<'b>> {
        let parts = self
            .parts
            .iter()
            .map(|part| match part {
                Part::Text(text) => Ok(Bound::Text(text)),
                Part::Column { index, name } => {
                    let column = batch
                        .columns()
                        .get(*index)
                        .ok_or_else(|| Error::fatal(format!("no column `{name}` in the batch")))?
                        .as_ref();
                    let formatter = ArrayFormatter::try_new(column, &FormatOptions::default()).map_err(Error::fatal)?;
                    Ok(Bound::Column { name, column, formatter })
                }
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Topics { parts })
    }
}

fn column(name: &str, schema: &SchemaRef) -> std::result::Result<usize, (String, String)> {
    if name.is_empty() {
        return Err(("`{}` in a topic names no column".to_owned(), suggestion(name, schema)));
    }
    let Ok(index) = schema.index_of(name) else {
        return Err((format!("the topic names column `{name}`, which the input does not have"), suggestion(name, schema)));
    };
    let data_type = schema.field(index).data_type();
    let fits = data_type.is_integer()
        || matches!(data_type, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View | DataType::Boolean);
    if fits {
        Ok(index)
    } else {
        Err((
            format!("column `{name}` is {data_type}, which has no place in a topic"),
            "use a text, integer or boolean column".to_owned(),
        ))
    }
}

/// The column that was probably meant, else all that there are.
pub(crate) fn suggestion(name: &str, schema: &SchemaRef) -> String {
    let near = schema
        .fields()
        .iter()
        .map(|field| field.name())
        .max_by(|a, b| strsim::jaro_winkler(a, name).total_cmp(&strsim::jaro_winkler(b, name)));
    match near {
        Some(near) if strsim::jaro_winkler(near, name) > 0.8 => format!("did you mean `{near}`?"),
        Some(_) => {
            format!("columns: {}", schema.fields().iter().map(|field| field.name().as_str()).collect::<Vec<_>>().join(", "))
        }
        None => "the input has no columns".to_owned(),
    }
}

/// A template over the columns of one batch.
pub struct Topics<'b> {
    parts: Vec<Bound<'b>>,
}

enum Bound<'b> {
    Text(&'b str),
    Column { name: &'b str, column: &'b dyn Array, formatter: ArrayFormatter<'b> },
}

impl Topics<'_> {
    /// Writes the topic of row `row` into `topic`, which is emptied first.
    ///
    /// # Errors
    /// Why this row has no topic: a null, an empty value, or a value with `/`, `+`, `#` or a zero byte in it,
    /// with which a row could choose a topic that the template does not describe.
    pub fn write(&self, row: usize, topic: &mut String) -> std::result::Result<(), String> {
        topic.clear();
        for part in &self.parts {
            match part {
                Bound::Text(text) => topic.push_str(text),
                Bound::Column { name, column, .. } if column.is_null(row) => {
                    return Err(format!("column `{name}` of the topic is null"));
                }
                Bound::Column { name, column, formatter } => {
                    let start = topic.len();
                    match column.as_string_opt::<i32>() {
                        Some(text) => topic.push_str(text.value(row)),
                        None => write!(topic, "{}", formatter.value(row))
                            .map_err(|_| format!("column `{name}` cannot be written into a topic"))?,
                    }
                    let value = &topic[start..];
                    if value.is_empty() || value.contains(['/', '+', '#', '\0']) {
                        return Err(format!("column `{name}` of the topic is {value:?}, which is empty or holds one of / + #"));
                    }
                }
            }
        }
        if topic.len() > LONGEST_TOPIC {
            return Err(format!("the topic has {} bytes, the protocol carries {LONGEST_TOPIC}", topic.len()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, Float32Array, Int32Array, StringArray};

    use super::*;

    fn patterns(written: &[&str]) -> std::result::Result<Patterns, Vec<Problem>> {
        Patterns::parse(&written.iter().map(|&text| text.to_owned()).collect::<Vec<_>>(), "/topics")
    }

    fn captured<'t>(patterns: &Patterns, topic: &'t str) -> Option<Vec<&'t str>> {
        let mut captured = vec!["left over"];
        patterns.capture(topic, &mut captured).then_some(captured)
    }

    #[test]
    fn levels_are_captured_and_subscribed_with_a_wildcard() {
        let patterns = patterns(&["plant/{site}/{device}/vibration"]).unwrap();
        assert_eq!(patterns.filters().collect::<Vec<_>>(), ["plant/+/+/vibration"]);
        assert_eq!(patterns.captures(), ["site", "device"]);
        assert_eq!(captured(&patterns, "plant/north/m1/vibration"), Some(vec!["north", "m1"]));
        assert_eq!(captured(&patterns, "plant/north//vibration"), Some(vec!["north", ""]));
        for other in ["plant/north/vibration", "plant/north/m1/vibration/x", "plan/north/m1/vibration", "plant/north/m1"] {
            assert_eq!(captured(&patterns, other), None, "{other}");
        }
    }

    #[test]
    fn wildcards_match_as_the_protocol_says() {
        let all = patterns(&["#"]).unwrap();
        assert!(captured(&all, "a/b").is_some() && captured(&all, "a").is_some());
        assert!(captured(&all, "$SYS/uptime").is_none());
        assert!(captured(&patterns(&["+/uptime"]).unwrap(), "$SYS/uptime").is_none());
        assert!(captured(&patterns(&["$SYS/uptime"]).unwrap(), "$SYS/uptime").is_some());
        let parent = patterns(&["a/#"]).unwrap();
        assert!(captured(&parent, "a").is_some() && captured(&parent, "a/b/c").is_some() && captured(&parent, "ab").is_none());
        assert!(captured(&patterns(&["+"]).unwrap(), "/a").is_none());
        assert!(captured(&patterns(&["/+"]).unwrap(), "/a").is_some());
    }

    #[test]
    fn patterns_in_another_order_fill_the_same_columns() {
        let patterns = patterns(&["a/{site}/{device}", "b/{device}/{site}"]).unwrap();
        assert_eq!(captured(&patterns, "a/s/d"), Some(vec!["s", "d"]));
        assert_eq!(captured(&patterns, "b/d/s"), Some(vec!["s", "d"]));
    }

    #[test]
    fn a_shared_subscription_keeps_its_group_and_matches_without_it() {
        let patterns = patterns(&["$share/afferent/plant/{site}"]).unwrap();
        assert_eq!(patterns.filters().next(), Some("$share/afferent/plant/+"));
        assert_eq!(captured(&patterns, "plant/north"), Some(vec!["north"]));
    }

    #[test]
    fn every_wrong_pattern_is_told_with_its_place() {
        let problems =
            patterns(&["a/{x}", "a/#/b", "a/b+", "a/{payload}", "a/{1}", "a/{x}/{x}", "", "a/{y}", "$share/g"]).unwrap_err();
        let places: Vec<&str> = problems.iter().map(|problem| problem.path.as_str()).collect();
        assert_eq!(
            places,
            ["/topics/1", "/topics/2", "/topics/3", "/topics/4", "/topics/5", "/topics/6", "/topics/7", "/topics/8"]
        );
        assert_eq!(problems[6].code, "topic-captures");
        assert!(problems[6].message.contains("`y`") && problems[6].message.contains("`x`"));
        assert_eq!(patterns(&[]).unwrap_err()[0].code, "no-topics");
    }

    fn rows() -> RecordBatch {
        RecordBatch::try_from_iter([
            ("device", Arc::new(StringArray::from(vec![Some("m1"), None, Some("a/b"), Some("")])) as ArrayRef),
            ("line", Arc::new(Int32Array::from(vec![7, 8, 9, 10])) as ArrayRef),
            ("score", Arc::new(Float32Array::from(vec![0.5; 4])) as ArrayRef),
        ])
        .unwrap()
    }

    #[test]
    fn a_template_names_the_topic_of_each_row() {
        let batch = rows();
        let template = Template::parse("results/{device}/line-{line}", &batch.schema(), "/topic").unwrap();
        let topics = template.over(&batch).unwrap();
        let mut topic = String::from("old");
        topics.write(0, &mut topic).unwrap();
        assert_eq!(topic, "results/m1/line-7");
        for row in 1..4 {
            assert!(topics.write(row, &mut topic).unwrap_err().contains("device"), "row {row}");
        }
    }

    #[test]
    fn a_wrong_template_is_told_while_planning() {
        let schema = rows().schema();
        let problems = |text: &str| Template::parse(text, &schema, "/topic").unwrap_err();
        let unknown = problems("results/{devise}");
        assert_eq!((unknown[0].code, unknown[0].offset), ("unknown-column", Some(9)), "the name is marked, not the brace");
        assert_eq!(unknown[0].message, "the topic names column `devise`, which the input does not have");
        assert_eq!(unknown[0].help.as_deref(), Some("did you mean `device`?"));
        assert_eq!(problems("r/{}")[0].message, "`{}` in a topic names no column");
        assert!(problems("r/{score}")[0].message.contains("Float32"));
        assert_eq!(problems("r/+")[0].code, "topic-template");
        assert_eq!(problems("r/{device")[0].offset, Some(2));
        assert_eq!(problems("r/device}")[0].code, "topic-template");
        assert_eq!(problems("{x}/{y}").len(), 2);
    }
}
