//! The configuration of the `table` sink. The planner checks it here, without any I/O: the name, and
//! whether a Delta table can hold the columns that arrive.

use std::sync::Arc;
use std::time::Duration;

use afferent_engine::component::{BuildContext, Delivery, Input, PlanContext, Planned, Problem, SinkConfig, SinkPlan};
use afferent_engine::config::{ByteSize, Interval};
use afferent_engine::{Result, Sink};
use arrow::datatypes::SchemaRef;
use schemars::JsonSchema;
use serde::Deserialize;

use super::dead_letters::DEAD_LETTERS;
use super::schema::{SchemaError, mapped};
use super::sink::{Settings, TableSink};

/// How far apart barriers should be: one fsync of the tail each, a few milliseconds on a plain disk.
const COMMIT_INTERVAL: Duration = Duration::from_millis(20);

/// Stores rows in a Delta Lake table below the data directory, each once.
///
/// Rows are durable and visible to `afferent sql` with every epoch; other engines see them after the next
/// commit to Delta. A table that exists is appended to, also after `--fresh`. A later version of the
/// pipeline may bring further columns and may leave columns out; it cannot change a column's type.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub struct TableConfig {
    /// The table's name, in lower-case letters, digits and underscores. One sink writes a table at a time.
    pub name: String,
    /// How long rows wait at most for their commit to Delta, where engines other than Afferent see them.
    #[serde(default = "commit_every")]
    pub commit_every: Interval,
    /// How many bytes wait at most for their commit to Delta.
    #[serde(default = "commit_bytes")]
    pub commit_bytes: ByteSize,
}

fn commit_every() -> Interval {
    Interval::secs(5)
}

fn commit_bytes() -> ByteSize {
    ByteSize::mib(64)
}

impl SinkConfig for TableConfig {
    const NAME: &'static str = "table";
    const EXAMPLE: &'static str = "table: { name: bearing_scores, commit_every: 5s }";

    fn check(&self, _: &PlanContext) -> Vec<Problem> {
        let mut problems = Vec::new();
        if let Err(problem) = check_name(&self.name) {
            problems.push(problem);
        }
        if self.commit_bytes.0 == 0 {
            problems.push(
                Problem::new("out-of-range", "/commit_bytes", "`commit_bytes` is 0")
                    .help("write for example 64MiB, or leave it out"),
            );
        }
        problems
    }

    fn plan(self, inputs: &[Input], context: &PlanContext) -> Planned<SinkPlan> {
        let mut problems = self.check(context);
        match common_schema(inputs) {
            Ok(schema) if problems.is_empty() => Ok(self.planned(schema)),
            Ok(_) => Err(problems),
            Err(more) => {
                problems.extend(more);
                Err(problems)
            }
        }
    }
}

impl TableConfig {
    fn planned(self, schema: SchemaRef) -> SinkPlan {
        SinkPlan {
            delivery: Delivery::Once,
            commit_interval: COMMIT_INTERVAL,
            build: Arc::new(move |context: &BuildContext| -> Result<Box<dyn Sink>> {
                let settings = Settings {
                    name: self.name.clone(),
                    data_dir: context.data_dir.clone(),
                    writer: format!("{}/{}", context.pipeline, context.stage),
                    schema: Arc::clone(&schema),
                    commit_every: self.commit_every.0,
                    commit_bytes: self.commit_bytes.0,
                    commit_interval: COMMIT_INTERVAL,
                };
                Ok(Box::new(TableSink::new(settings)))
            }),
        }
    }
}

fn check_name(name: &str) -> std::result::Result<(), Problem> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    if name.is_empty() || !name.chars().all(allowed) {
        let help = "use lower-case letters, digits and underscores, for example bearing_scores";
        return Err(Problem::new("invalid-name", "/name", format!("`{name}` cannot be the name of a table")).help(help));
    }
    if name == DEAD_LETTERS {
        let help = "read rejected rows from it, and write results to a table of another name";
        let message = format!("the table `{name}` belongs to the engine, which keeps rejected rows in it");
        return Err(Problem::new("reserved-name", "/name", message).help(help));
    }
    Ok(())
}

/// The table's schema, which all inputs must agree on.
fn common_schema(inputs: &[Input]) -> Planned<SchemaRef> {
    let Some((first, others)) = inputs.split_first() else {
        return Err(vec![Problem::new("missing-input", "", "there is no input to store")]);
    };
    let schema = mapped(&first.schema).map_err(|errors| errors.iter().map(problem).collect::<Vec<_>>())?;
    for other in others {
        if mapped(&other.schema).as_ref() != Ok(&schema) {
            let message = format!("the inputs `{}` and `{}` have different columns", first.name, other.name);
            let help = "give each its own table, or select the same columns in the same order with `sql`";
            return Err(vec![Problem::new("different-schemas", "", message).help(help)]);
        }
    }
    Ok(schema)
}

fn problem(error: &SchemaError) -> Problem {
    let problem = Problem::new("unsupported-column", "", error.to_string());
    match error {
        SchemaError::Type { column, .. } => {
            let column = column.split('.').next().unwrap_or(column);
            problem.help(format!("cast it before, for example `cast({column} as text) as {column}` in `sql`"))
        }
        SchemaError::Name(_) | SchemaError::Case(..) => problem.help("rename it with `as` in `sql`"),
        SchemaError::Empty => problem,
    }
}

#[cfg(test)]
mod tests {
    use arrow::datatypes::{DataType, Field, Schema, TimeUnit};

    use super::*;

    fn input(name: &str, data_type: DataType) -> Input {
        Input { name: name.into(), schema: Arc::new(Schema::new(vec![Field::new("c", data_type, true)])) }
    }

    fn config(text: serde_json::Value) -> TableConfig {
        serde_json::from_value(text).unwrap()
    }

    fn problems(config: TableConfig, inputs: &[Input]) -> Vec<Problem> {
        config.plan(inputs, &PlanContext::default()).err().unwrap()
    }

    #[test]
    fn defaults_are_those_documented() {
        let config = config(serde_json::json!({"name": "t"}));
        assert_eq!((config.commit_every, config.commit_bytes), (Interval::secs(5), ByteSize::mib(64)));
        assert!(serde_json::from_value::<TableConfig>(serde_json::json!({"name": "t", "nmae": 1})).is_err());
        let plan = config.plan(&[input("a", DataType::Int64)], &PlanContext::default()).ok().unwrap();
        assert_eq!(plan.delivery, Delivery::Once);
        assert_eq!(plan.commit_interval, Duration::from_millis(20));
    }

    #[test]
    fn names_are_checked() {
        for name in ["", "Scores", "a b", "../x", "dead_letters"] {
            let problems = problems(config(serde_json::json!({"name": name})), &[input("a", DataType::Int64)]);
            assert_eq!(problems.len(), 1, "{name}");
            assert_eq!(problems[0].path, "/name");
        }
    }

    #[test]
    fn the_name_and_the_limits_are_checked_without_inputs() {
        let found = config(serde_json::json!({"name": "X-Y", "commit_bytes": "0B"})).check(&PlanContext::default());
        assert_eq!(found.iter().map(|p| p.path.as_str()).collect::<Vec<_>>(), ["/name", "/commit_bytes"]);
        assert!(config(serde_json::json!({"name": "x_y"})).check(&PlanContext::default()).is_empty());
    }

    #[test]
    fn columns_and_inputs_are_checked_together_with_the_name() {
        let found = problems(config(serde_json::json!({"name": "T"})), &[input("a", DataType::Time32(TimeUnit::Second))]);
        assert_eq!(found.iter().map(|p| p.code).collect::<Vec<_>>(), ["invalid-name", "unsupported-column"]);
        assert!(found[1].help.as_ref().unwrap().contains("cast(c as text)"));
        let inputs = [input("a", DataType::Int64), input("b", DataType::Utf8)];
        assert_eq!(problems(config(serde_json::json!({"name": "t"})), &inputs)[0].code, "different-schemas");
        assert_eq!(problems(config(serde_json::json!({"name": "t"})), &[])[0].code, "missing-input");
    }
}
