//! The configuration of `window` and its planning. Called by the registry; the invariant: every item of `select` has
//! a column among those that are held, and a field of the output.

use std::num::NonZeroU32;
use std::sync::Arc;

use afferent_engine::component::{
    BuildContext, Input, OperatorBuild, OperatorConfig, OperatorPlan, Output, PlanContext, Planned, Problem,
};
use afferent_engine::{Operator, Result};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow::row::{RowConverter, SortField};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::held::Rhythm;
use super::operator::{Column, Shape, Window};
use super::select::{Item, What};
use crate::columns;

/// Puts the last rows of each key into one row: lists of them, or functions over them. Every `step` rows of a key,
/// once there are `rows` of it, one row leaves; rows leave in the order in which their windows are full. What is held
/// is part of every checkpoint. The latency of an output row counts from the input row that completed its window.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub struct WindowConfig {
    /// Columns that make the key; without any, all rows have one key.
    #[serde(default)]
    pub by: Vec<String>,
    /// Rows of a window.
    pub rows: NonZeroU32,
    /// Rows from one window of a key to its next, at most `rows`; `rows` without it, so that windows do not overlap.
    pub step: Option<NonZeroU32>,
    /// The columns that leave: a column of `by`, `count(*)`, or a function of one column, each with a name if need
    /// be: `max(ts) as ts`. Functions: `array_agg` (a list in the order of arrival; of fixed size where incomplete
    /// windows are dropped), `first`, `last`, `min`, `max`, `sum` (of integers int64 or uint64, null where it does not
    /// fit; else float64), `avg` (float64), `count`. Nulls are left out except by `array_agg`, `first` and `last`.
    pub select: Vec<String>,
    /// What becomes of the rows that a key holds when the input ends.
    #[serde(default)]
    pub incomplete: Incomplete,
    /// Keys that may hold rows at once; rows of further keys are rejected.
    #[serde(default = "max_keys")]
    pub max_keys: NonZeroU32,
}

/// What becomes of windows that are not full at the end of the input.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Incomplete {
    /// Rows that were in no window are dropped and counted as `incomplete_window`.
    #[default]
    Drop,
    /// Keys with rows that were in no window give one more, shorter window; in the order of the keys.
    Emit,
}

fn max_keys() -> NonZeroU32 {
    NonZeroU32::MIN.saturating_add(99_999)
}

impl OperatorConfig for WindowConfig {
    const NAME: &'static str = "window";
    const EXAMPLE: &'static str = "window: { by: [device], rows: 100, step: 50, select: [\"device\", \"max(ts) as ts\", \
                                   \"array_agg(ax) as ax\"] }";

    fn check(&self, _: &PlanContext) -> Vec<Problem> {
        let mut problems = Vec::new();
        self.rhythm(&mut problems);
        problems.extend(self.nothing_selected());
        problems.extend(self.select.iter().enumerate().filter_map(|(index, text)| item(text, &format!("/select/{index}")).err()));
        problems
    }

    fn plan(self, inputs: &[Input], _: &PlanContext) -> Planned<OperatorPlan> {
        let input = &columns::only(inputs, Self::NAME)?.schema;
        let mut problems = Vec::new();
        let rhythm = self.rhythm(&mut problems);
        let mut held = self.key_columns(input, &mut problems);
        let keys = held.len();
        let (output, fields) = self.columns(input, &mut held, &mut problems);
        if held.is_empty() && !input.fields().is_empty() {
            // Only rows are counted; a batch without columns could not be held.
            held.push(0);
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        let held_fields: Vec<Arc<Field>> = held.iter().map(|at| input.fields()[*at].clone()).collect();
        let schema: SchemaRef = Arc::new(Schema::new(fields));
        let shape = Shape {
            rhythm,
            keys,
            held,
            held_schema: Arc::new(Schema::new(held_fields)),
            output,
            schema: schema.clone(),
            incomplete: self.incomplete,
        };
        let build = move |context: &BuildContext| -> Result<Box<dyn Operator>> {
            Ok(Box::new(Window::new(shape.clone(), context.clone())?))
        };
        Ok(OperatorPlan {
            outputs: vec![Output { name: String::new(), schema }],
            build: OperatorBuild::Compute { build: Arc::new(build), stateful: true, heavy: false },
        })
    }
}

fn item(text: &str, path: &str) -> std::result::Result<Item, Problem> {
    Item::parse(text).map_err(|mistake| Problem::new("bad-item", path, mistake.told).help(mistake.help))
}

impl WindowConfig {
    fn rhythm(&self, problems: &mut Vec<Problem>) -> Rhythm {
        let (rows, step) = (self.rows.get(), self.step.unwrap_or(self.rows).get());
        if step > rows {
            let told = format!("a step of {step} rows would pass over rows between windows of {rows}");
            problems.push(
                Problem::new("bad-step", "/step", told)
                    .help(format!("write a step of at most {rows}, or leave it out for windows that do not overlap")),
            );
        }
        if i32::try_from(rows).is_err() {
            problems.push(
                Problem::new("too-large", "/rows", format!("a window of {rows} rows is too large"))
                    .help(format!("write at most {}", i32::MAX)),
            );
        }
        Rhythm { rows: rows as usize, step: step as usize, max_keys: self.max_keys.get() as usize }
    }

    fn nothing_selected(&self) -> Option<Problem> {
        self.select.is_empty().then(|| {
            Problem::new("nothing-selected", "/select", "a window without columns")
                .help("select at least one, for example \"count(*) as n\"")
        })
    }

    fn key_columns(&self, input: &Schema, problems: &mut Vec<Problem>) -> Vec<usize> {
        let mut found = Vec::new();
        for (index, name) in self.by.iter().enumerate() {
            let path = format!("/by/{index}");
            match columns::find(input, name, &path) {
                Err(problem) => problems.push(problem),
                Ok(at) if found.contains(&at) => problems
                    .push(Problem::new("duplicate-column", path, format!("column `{name}` is named twice")).help("name it once")),
                Ok(at) => {
                    let data_type = input.field(at).data_type();
                    if RowConverter::supports_fields(&[SortField::new(data_type.clone())]) {
                        found.push(at);
                    } else {
                        let told = format!("column `{name}` is {data_type}, which cannot be a key");
                        problems.push(Problem::new("wrong-type", path, told));
                    }
                }
            }
        }
        found
    }

    /// What leaves. Columns that functions read are added to those that are held.
    fn columns(&self, input: &Schema, held: &mut Vec<usize>, problems: &mut Vec<Problem>) -> (Vec<Column>, Vec<Field>) {
        problems.extend(self.nothing_selected());
        let (mut output, mut fields): (Vec<Column>, Vec<Field>) = (Vec::new(), Vec::new());
        for (index, text) in self.select.iter().enumerate() {
            let path = format!("/select/{index}");
            match self.column(text, input, held, &path) {
                Err(problem) => problems.push(problem),
                Ok((_, field)) if fields.iter().any(|known| known.name() == field.name()) => {
                    let told = format!("two columns would be called `{}`", field.name());
                    problems.push(Problem::new("duplicate-column", path, told).help("give one of them another name with `as`"));
                }
                Ok((column, field)) => {
                    output.push(column);
                    fields.push(field);
                }
            }
        }
        (output, fields)
    }

    fn column(
        &self,
        text: &str,
        input: &Schema,
        held: &mut Vec<usize>,
        path: &str,
    ) -> std::result::Result<(Column, Field), Problem> {
        let Item { name, what } = item(text, path)?;
        match what {
            What::Rows => Ok((Column::Rows, Field::new(name, DataType::Int64, false))),
            What::Key(column) => {
                let at = columns::find(input, &column, path)?;
                if !self.by.contains(&column) {
                    let told = format!("column `{column}` is not in `by`, so a window has many values of it");
                    return Err(Problem::new("not-a-key", path, told)
                        .help(format!("write `last({column}) as {column}`, or add it to `by`")));
                }
                let place = hold(held, at);
                Ok((Column::Key(place), input.field(at).clone().with_name(name)))
            }
            What::Of(function, column) => {
                let at = columns::find(input, &column, path)?;
                let field = function
                    .field(&name, input.field(at), self.list_size())
                    .map_err(|mistake| Problem::new("wrong-type", path, mistake.told).help(mistake.help))?;
                Ok((Column::Of(function, hold(held, at)), field))
            }
        }
    }

    /// Rows of every window, where all have as many.
    fn list_size(&self) -> Option<i32> {
        match self.incomplete {
            Incomplete::Drop => i32::try_from(self.rows.get()).ok(),
            Incomplete::Emit => None,
        }
    }
}

/// Where an input column is among those that are held.
fn hold(held: &mut Vec<usize>, column: usize) -> usize {
    held.iter().position(|at| *at == column).unwrap_or_else(|| {
        held.push(column);
        held.len() - 1
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    fn schema() -> SchemaRef {
        Arc::new(Schema::new(vec![
            Field::new("device", DataType::Utf8, false),
            Field::new("ax", DataType::Float32, true),
            Field::new("tags", DataType::new_list(DataType::Utf8, true), true),
        ]))
    }

    #[test]
    fn the_schema_has_lists_of_fixed_size_unless_windows_may_be_short() {
        let plan = |incomplete: &str| {
            let text = format!(
                r#"{{"by":["device"],"rows":4,"select":["device as d","array_agg(ax) as ax","count(*)"],
                    "incomplete":"{incomplete}"}}"#
            );
            testing::plan::<WindowConfig>(&text, &schema()).ok().unwrap().outputs[0].schema.clone()
        };
        let item = Arc::new(Field::new("item", DataType::Float32, true));
        let fixed = plan("drop");
        let names: Vec<_> = fixed.fields().iter().map(|field| field.name().as_str()).collect();
        assert_eq!(names, ["d", "ax", "count(*)"]);
        assert_eq!(fixed.field(1).data_type(), &DataType::FixedSizeList(item.clone(), 4));
        assert_eq!(plan("emit").field(1).data_type(), &DataType::List(item));
    }

    #[test]
    fn what_needs_no_columns_is_checked_without_inputs() {
        let text = r#"{"by":["nobody"],"rows":2,"step":5,"select":["nothing","median(ax)","last(ax)"]}"#;
        let config: WindowConfig = serde_json::from_str(text).unwrap();
        let found = config.check(&PlanContext::default());
        assert_eq!(found.iter().map(|p| p.path.as_str()).collect::<Vec<_>>(), ["/step", "/select/1"]);
    }

    #[test]
    fn every_problem_is_told_with_its_place() {
        let text = r#"{"by":["devcie","device","device"],"rows":4,"step":5,
            "select":["ax","max(ay) as ay","avg(device) as d","device","device","ax + 1","max(tags) as t"]}"#;
        let found = testing::problems::<WindowConfig>(text, &schema());
        let places: Vec<_> = found.iter().map(|p| (p.code, p.path.as_str())).collect();
        assert_eq!(
            places,
            [
                ("bad-step", "/step"),
                ("unknown-column", "/by/0"),
                ("duplicate-column", "/by/2"),
                ("not-a-key", "/select/0"),
                ("unknown-column", "/select/1"),
                ("wrong-type", "/select/2"),
                ("duplicate-column", "/select/4"),
                ("bad-item", "/select/5"),
                ("wrong-type", "/select/6"),
            ]
        );
        assert!(found.iter().all(|problem| problem.help.is_some()), "{found:?}");
        let empty = testing::problems::<WindowConfig>(r#"{"rows":1,"select":[]}"#, &schema());
        assert_eq!(empty[0].code, "nothing-selected");
        assert!(serde_json::from_str::<WindowConfig>(r#"{"rows":0,"select":["count(*)"]}"#).is_err());
    }

    #[test]
    fn the_default_limit_of_keys_is_what_is_documented() {
        assert_eq!(max_keys().get(), 100_000);
    }
}
