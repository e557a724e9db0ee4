//! The `route` operator: rows to named outputs by conditions. The engine calls it. The invariant: every row leaves
//! through at least one output, through exactly one unless `mode` is `all`, or is rejected; order is kept in each.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use afferent_engine::component::{
    BuildContext, Input, OperatorBuild, OperatorConfig, OperatorPlan, Output, PlanContext, Planned, Problem,
};
use afferent_engine::{Batch, Error, Operator, Outputs, Result};
use arrow::array::{BooleanArray, RecordBatch};
use arrow::compute::{concat_batches, filter_record_batch, not, or};
use arrow::datatypes::SchemaRef;
use datafusion::common::DataFusionError;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::columns;
use crate::sql::{Condition, session, sift};

/// Sends rows to named outputs by SQL conditions over their columns. A stage reads an output as `STAGE.OUTPUT`; rows
/// for which no condition holds leave through the stage's own name. A row for which a condition fails (a division by
/// zero, say) is rejected alone; a null counts as no.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub struct RouteConfig {
    /// Names of outputs and their conditions, such as `hot: "temperature > 80"`, in order.
    pub outputs: Conditions,
    /// What becomes of a row for which several conditions hold.
    #[serde(default)]
    pub mode: Mode,
}

/// What becomes of a row for which several conditions hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// It leaves through the first of these outputs; later conditions are not asked.
    #[default]
    First,
    /// It leaves through each of these outputs.
    All,
}

/// Output names and their conditions, in the order in which they are written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conditions(Vec<(String, String)>);

impl<'de> Deserialize<'de> for Conditions {
    /// By hand because the order counts, and a map of the standard library has none.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Named;
        impl<'de> Visitor<'de> for Named {
            type Value = Conditions;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from output names to conditions, e.g. { hot: \"temperature > 80\" }")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Conditions, A::Error> {
                let mut outputs: Vec<(String, String)> = Vec::new();
                while let Some((name, condition)) = map.next_entry::<String, String>()? {
                    if outputs.iter().any(|(known, _)| *known == name) {
                        return Err(de::Error::custom(format_args!("output `{name}` is written twice")));
                    }
                    outputs.push((name, condition));
                }
                if outputs.is_empty() {
                    return Err(de::Error::custom("a route needs at least one output"));
                }
                Ok(Conditions(outputs))
            }
        }
        deserializer.deserialize_map(Named)
    }
}

impl JsonSchema for Conditions {
    fn schema_name() -> Cow<'static, str> {
        "RouteConditions".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "Names of outputs and their conditions, in order.",
            "type": "object",
            "minProperties": 1,
            "additionalProperties": { "type": "string" }
        })
    }
}

impl OperatorConfig for RouteConfig {
    const NAME: &'static str = "route";
    const EXAMPLE: &'static str = "route: { outputs: { hot: \"temperature > 80\", faulty: \"status <> 'ok'\" } }";

    fn check(&self, _: &PlanContext) -> Vec<Problem> {
        let state = session().state();
        let of_each = self.outputs.0.iter().flat_map(|(name, text)| {
            let path = path_of(name);
            bad_name(name).into_iter().chain(Condition::check(&state, text, &path))
        });
        of_each.collect()
    }

    fn declares(&self, inputs: &[Input]) -> Option<Vec<Output>> {
        let [input] = inputs else { return None };
        let names = std::iter::once(String::new()).chain(self.outputs.0.iter().map(|(name, _)| name.clone()));
        Some(names.map(|name| Output { name, schema: input.schema.clone() }).collect())
    }

    fn plan(self, inputs: &[Input], _: &PlanContext) -> Planned<OperatorPlan> {
        let schema = columns::only(inputs, Self::NAME)?.schema.clone();
        let state = session().state();
        let (mut problems, mut conditions, mut names) = (Vec::new(), Vec::new(), vec![String::new()]);
        for (name, text) in self.outputs.0 {
            problems.extend(bad_name(&name));
            match Condition::plan(&state, &text, &schema, &path_of(&name)) {
                Ok(condition) => conditions.push(condition),
                Err(found) => problems.extend(found),
            }
            names.push(name);
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        let outputs = names.into_iter().map(|name| Output { name, schema: schema.clone() }).collect();
        let route = Route { conditions, mode: self.mode, schema };
        let build = move |_: &BuildContext| -> Result<Box<dyn Operator>> { Ok(Box::new(route.clone())) };
        Ok(OperatorPlan { outputs, build: OperatorBuild::Compute { build: Arc::new(build), stateful: false, heavy: false } })
    }
}

fn path_of(output: &str) -> String {
    format!("/outputs/{}", output.replace('~', "~0").replace('/', "~1"))
}

fn bad_name(output: &str) -> Option<Problem> {
    (output.is_empty() || output.contains(['.', '/'])).then(|| {
        Problem::new("bad-name", path_of(output), format!("`{output}` cannot be the name of an output"))
            .help("a stage reads it as `STAGE.OUTPUT`: write a word without dots and slashes")
    })
}

#[derive(Clone)]
struct Route {
    conditions: Vec<Condition>,
    mode: Mode,
    schema: SchemaRef,
}

impl Route {
    /// The rows of each output, the default first.
    fn divide(&self, rows: &RecordBatch) -> std::result::Result<Vec<RecordBatch>, DataFusionError> {
        match self.mode {
            Mode::First => self.to_first(rows),
            Mode::All => self.to_all(rows),
        }
    }

    fn to_first(&self, rows: &RecordBatch) -> std::result::Result<Vec<RecordBatch>, DataFusionError> {
        let mut rest = rows.clone();
        let mut divided = vec![RecordBatch::new_empty(self.schema.clone())];
        for condition in &self.conditions {
            let nothing = || RecordBatch::new_empty(self.schema.clone());
            if rest.num_rows() == 0 {
                divided.push(nothing());
                continue;
            }
            let mask = condition.mask(&rest)?;
            let hits = mask.true_count();
            if hits == 0 {
                divided.push(nothing());
            } else if hits == rest.num_rows() {
                divided.push(std::mem::replace(&mut rest, nothing()));
            } else {
                divided.push(filter_record_batch(&rest, &mask)?);
                rest = filter_record_batch(&rest, &not(&mask)?)?;
            }
        }
        divided[0] = rest;
        Ok(divided)
    }

    fn to_all(&self, rows: &RecordBatch) -> std::result::Result<Vec<RecordBatch>, DataFusionError> {
        let mut any = BooleanArray::from(vec![false; rows.num_rows()]);
        let mut divided = vec![RecordBatch::new_empty(self.schema.clone())];
        for condition in &self.conditions {
            let mask = condition.mask(rows)?;
            divided.push(filter_record_batch(rows, &mask)?);
            any = or(&any, &mask)?;
        }
        divided[0] = filter_record_batch(rows, &not(&any)?)?;
        Ok(divided)
    }
}

impl Operator for Route {
    fn process(&mut self, _: usize, batch: Batch, outputs: &mut Outputs) -> Result<()> {
        let mut ports: Vec<Vec<RecordBatch>> = vec![Vec::new(); self.conditions.len() + 1];
        let mut rejected = Vec::new();
        let mut work = |rows: &RecordBatch| -> std::result::Result<(), DataFusionError> {
            for (port, rows) in ports.iter_mut().zip(self.divide(rows)?) {
                if rows.num_rows() > 0 {
                    port.push(rows);
                }
            }
            Ok(())
        };
        sift(batch.records(), &mut work, &mut rejected);
        for (port, parts) in ports.iter().enumerate() {
            let rows = match parts.as_slice() {
                [] => continue,
                [rows] => rows.clone(),
                several => concat_batches(&self.schema, several).map_err(Error::fatal)?,
            };
            outputs.emit_to(port, batch.derive(rows));
        }
        outputs.reject(rejected);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::{ArrayRef, AsArray, Int32Array};
    use arrow::datatypes::Int32Type;

    use super::*;
    use crate::testing;

    fn rows(numbers: Vec<Option<i32>>) -> RecordBatch {
        let n: ArrayRef = Arc::new(Int32Array::from(numbers));
        RecordBatch::try_from_iter_with_nullable([("n", n, true)]).unwrap()
    }

    fn numbers(outputs: &Outputs, port: usize) -> Vec<Option<i32>> {
        let Some(rows) = testing::rows(outputs, port) else {
            return Vec::new();
        };
        rows.column(0).as_primitive::<Int32Type>().iter().collect()
    }

    #[test]
    fn first_divides_the_rows_completely_and_keeps_their_order() {
        let mut random = fastrand::Rng::with_seed(7);
        let given: Vec<_> = (0..500).map(|_| (random.u8(..) > 20).then(|| random.i32(0..30))).collect();
        let text = r#"{"outputs":{"small":"n < 10","even":"n % 2 = 0","small_again":"n < 10"}}"#;
        let outputs = testing::run::<RouteConfig>(text, rows(given.clone()));
        let expected =
            |wanted: fn(i32) -> bool| -> Vec<Option<i32>> { given.iter().copied().filter(|n| n.is_some_and(wanted)).collect() };
        assert_eq!(numbers(&outputs, 1), expected(|n| n < 10));
        assert_eq!(numbers(&outputs, 2), expected(|n| n >= 10 && n % 2 == 0));
        assert!(numbers(&outputs, 3).is_empty());
        let rest = |n: &Option<i32>| n.is_none_or(|n| n >= 10 && n % 2 == 1);
        let rest: Vec<_> = given.iter().copied().filter(rest).collect();
        assert_eq!(numbers(&outputs, 0), rest);
        let ports: Vec<_> = outputs.batches().iter().map(|(port, _)| *port).collect();
        assert_eq!(ports, [0, 1, 2]);
    }

    #[test]
    fn all_sends_a_row_to_each_output_whose_condition_holds() {
        let text = r#"{"outputs":{"a":"n > 1","b":"n > 2"},"mode":"all"}"#;
        let outputs = testing::run::<RouteConfig>(text, rows(vec![Some(1), Some(2), None, Some(3)]));
        assert_eq!(numbers(&outputs, 0), [Some(1), None]);
        assert_eq!(numbers(&outputs, 1), [Some(2), Some(3)]);
        assert_eq!(numbers(&outputs, 2), [Some(3)]);
    }

    #[test]
    fn a_row_whose_condition_fails_is_rejected_alone() {
        let text = r#"{"outputs":{"zero_first":"n = 7","big":"8 / n > 1"}}"#;
        let outputs = testing::run::<RouteConfig>(text, rows(vec![Some(0), Some(7), Some(2), Some(9)]));
        assert_eq!(numbers(&outputs, 0), [Some(9)]);
        assert_eq!(numbers(&outputs, 1), [Some(7)]);
        assert_eq!(numbers(&outputs, 2), [Some(2)]);
        assert_eq!(outputs.rejected().len(), 1);
    }

    #[test]
    fn outputs_stand_in_the_order_written_behind_the_default() {
        let text = r#"{"outputs":{"z":"n > 1","a":"n > 2"}}"#;
        let plan = testing::plan::<RouteConfig>(text, &rows(vec![]).schema()).ok().unwrap();
        let names: Vec<_> = plan.outputs.iter().map(|output| output.name.as_str()).collect();
        assert_eq!(names, ["", "z", "a"]);
    }

    #[test]
    fn every_problem_is_told_with_its_place() {
        let text = r#"{"outputs":{"a":"m > 1","b.c":"n > 1","d":"n + 1","e":"n > max(n)"}}"#;
        let found = testing::problems::<RouteConfig>(text, &rows(vec![]).schema());
        let places: Vec<_> = found.iter().map(|p| (p.code, p.path.as_str(), p.offset)).collect();
        assert_eq!(
            places,
            [
                ("unknown-column", "/outputs/a", Some(0)),
                ("bad-name", "/outputs/b.c", None),
                ("wrong-type", "/outputs/d", Some(0)),
                ("refused-sql", "/outputs/e", Some(4)),
            ]
        );
        let config: RouteConfig = serde_json::from_str(text).unwrap();
        let paths: Vec<_> = config.check(&PlanContext::default()).into_iter().map(|p| p.path).collect();
        assert_eq!(paths, ["/outputs/b.c", "/outputs/e"]);
        for text in [r#"{"outputs":{}}"#, r#"{"outputs":{"a":"n > 1","a":"n > 2"}}"#] {
            assert!(serde_json::from_str::<RouteConfig>(text).is_err(), "{text}");
        }
    }
}
