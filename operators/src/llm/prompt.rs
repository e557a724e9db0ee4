//! The question of a row: a template whose variables are columns. Planned by `llm` and rendered for every batch.
//! Invariant: every variable of the template is a column, so that no question goes out with a gap in it.

use std::collections::BTreeSet;
use std::sync::Arc;

use afferent_engine::component::Problem;
use afferent_engine::{Error, Result};
use afferent_formats::JsonEncoder;
use arrow::array::RecordBatch;
use arrow::datatypes::{Schema, SchemaRef};
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, UndefinedBehavior};

use crate::columns;

/// The name under which the environment knows the template.
const TEMPLATE: &str = "prompt";

/// A template that is bound to the columns of a schema. Cloning shares it.
#[derive(Clone)]
pub(super) struct Prompt {
    inner: Arc<Inner>,
}

struct Inner {
    environment: Environment<'static>,
    /// Indices of the columns that it uses.
    columns: Vec<usize>,
    encoder: JsonEncoder,
}

/// An environment that knows the template, and the variables in it.
fn read(name: &str, text: String) -> std::result::Result<(Environment<'static>, BTreeSet<String>), Vec<Problem>> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    // A question is no web page, whatever the file is called.
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    let wrong = |error: &minijinja::Error| {
        let line = error.line().map_or(String::new(), |line| format!(" in line {line}"));
        let cause = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
        vec![Problem::new("bad-template", "/prompt", format!("the template of `{name}` is wrong{line}: {cause}"))]
    };
    environment.add_template_owned(TEMPLATE, text).map_err(|error| wrong(&error))?;
    let used = match environment.get_template(TEMPLATE) {
        Ok(template) => template.undeclared_variables(false).into_iter().collect(),
        Err(error) => return Err(wrong(&error)),
    };
    Ok((environment, used))
}

impl Prompt {
    /// Whether a template can be read, whatever the columns are.
    ///
    /// # Errors
    /// A problem at `/prompt`: the syntax.
    pub(super) fn check(name: &str, text: String) -> std::result::Result<(), Vec<Problem>> {
        read(name, text).map(drop)
    }

    /// Reads a template; `name` is what its author calls it.
    ///
    /// # Errors
    /// Problems at `/prompt`: the syntax, variables that are no columns, columns that cannot be written in a text.
    pub(super) fn new(name: &str, text: String, schema: &SchemaRef) -> std::result::Result<Self, Vec<Problem>> {
        let (environment, used) = read(name, text)?;
        let functions: BTreeSet<&str> = environment.globals().map(|(name, _)| name).collect();
        let (mut indices, mut problems) = (Vec::new(), Vec::new());
        for variable in &used {
            match columns::find(schema, variable, "/prompt") {
                Ok(index) => indices.push(index),
                Err(_) if functions.contains(variable.as_str()) => {}
                Err(mut problem) => {
                    problem.message = format!("the template of `{name}` uses `{variable}`, which is no column");
                    problems.push(problem);
                }
            }
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        let used: Vec<_> = indices.iter().map(|index| schema.field(*index).clone()).collect();
        let encoder = JsonEncoder::new(&Arc::new(Schema::new(used)), true)
            .map_err(|error| vec![Problem::new("unsupported-type", "/prompt", format!("a column of the prompt: {error}"))])?;
        Ok(Self { inner: Arc::new(Inner { environment, columns: indices, encoder }) })
    }

    /// The question of every row, or what is wrong with it.
    ///
    /// # Errors
    /// Fatal when the batch is not of the schema that was planned.
    pub(super) fn render(&self, records: &RecordBatch) -> Result<Vec<std::result::Result<String, String>>> {
        let inner = &*self.inner;
        let template = inner.environment.get_template(TEMPLATE).map_err(|error| Error::fatal(error.to_string()))?;
        let used = records.project(&inner.columns).map_err(Error::fatal)?;
        let rows = inner.encoder.encode(&used).map_err(Error::fatal)?;
        rows.iter()
            .map(|row| -> Result<std::result::Result<String, String>> {
                let row: serde_json::Value = serde_json::from_slice(row.unwrap_or_default()).map_err(Error::fatal)?;
                Ok(template.render(Serde(row)).map_err(|error| format!("rendering the prompt: {error}")))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::{ArrayRef, Float32Array, Int64Array, StringArray, TimestampMillisecondArray};

    use super::*;

    fn records() -> RecordBatch {
        RecordBatch::try_from_iter([
            ("device", Arc::new(StringArray::from(vec!["<pump> & \"valve\"", "fan"])) as ArrayRef),
            ("p", Arc::new(Float32Array::from(vec![0.93, 0.5]))),
            ("n", Arc::new(Int64Array::from(vec![Some(3), None]))),
            ("ts", Arc::new(TimestampMillisecondArray::from(vec![0, 1]).with_timezone("UTC"))),
        ])
        .unwrap()
    }

    fn render(template: &str) -> Vec<std::result::Result<String, String>> {
        Prompt::new("note.html", template.to_owned(), &records().schema()).unwrap().render(&records()).unwrap()
    }

    #[test]
    fn columns_are_written_as_people_write_them() {
        let questions = render("{{ device }}: {{ p }}, {{ n }} at {{ ts }}{% if p > 0.9 %}!{% endif %}");
        assert_eq!(questions[0].as_deref(), Ok("<pump> & \"valve\": 0.93, 3 at 1970-01-01T00:00:00Z!"));
        assert!(questions[1].as_deref().unwrap().starts_with("fan: 0.5, None at "), "{questions:?}");
    }

    #[test]
    fn a_template_without_columns_asks_every_row_alike() {
        assert_eq!(render("{% for i in range(2) %}{{ i }}{% endfor %}?"), [Ok("01?".to_owned()), Ok("01?".to_owned())]);
    }

    #[test]
    fn a_variable_that_is_no_column_is_refused_at_planning() {
        let problems = |template: &str| Prompt::new("note.txt", template.to_owned(), &records().schema()).err().unwrap();
        let found = problems("{{ devise }} {{ n }} {{ temperature.max }}");
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].message, "the template of `note.txt` uses `devise`, which is no column");
        assert!(found[0].help.as_deref().unwrap().contains("did you mean `device`?"));
        let broken = problems("line one\n{{ device ");
        assert_eq!(broken[0].code, "bad-template");
        assert!(broken[0].message.contains("in line 2"), "{}", broken[0].message);
    }

    #[test]
    fn a_row_that_cannot_be_rendered_is_told_alone() {
        let questions = render("{{ 6 // n }}");
        assert_eq!(questions[0].as_deref(), Ok("2"));
        assert!(questions[1].as_deref().unwrap_err().starts_with("rendering the prompt: "), "{questions:?}");
    }
}
