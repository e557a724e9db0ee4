//! The `sql` operator: a row-wise SELECT, planned once and evaluated batch by batch. The engine calls it. The
//! invariant: the schema that planning promised is that of every batch that leaves.

use std::sync::Arc;

use afferent_engine::component::{BuildContext, Input, OperatorConfig, OperatorPlan, PlanContext, Planned, Problem};
use afferent_engine::{Batch, Error, Operator, Outputs, Result};
use arrow::array::{ArrayRef, RecordBatch, RecordBatchOptions};
use arrow::compute::{cast, concat_batches, filter_record_batch};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use datafusion::common::{DataFusionError, TableReference};
use datafusion::datasource::empty::EmptyTable;
use datafusion::execution::context::{SessionContext, SessionState};
use datafusion::logical_expr::{Expr, LogicalPlan};
use datafusion::physical_expr::PhysicalExpr;
use datafusion::sql::parser::{DFParserBuilder, Statement};
use datafusion::sql::sqlparser::ast::{
    Ident, ObjectName, Query, SetExpr, Statement as SqlStatement, TableAlias, TableFactor, visit_relations,
};
use futures::FutureExt;
use schemars::JsonSchema;
use serde::Deserialize;

use super::expression::{Condition, problems, session, sift};
use super::{place, refusal};
use crate::columns;

/// The whole configuration is the text.
const PATH: &str = "";

/// Computes new columns and filters rows by a SELECT over the stage in its FROM clause. It is row-wise: expressions,
/// functions and WHERE. Aggregates, DISTINCT, ORDER BY, LIMIT, joins, window functions and subqueries are refused
/// while planning. A row for which an expression fails (a division by zero, say) is rejected alone.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct SqlConfig(String);

impl OperatorConfig for SqlConfig {
    const NAME: &'static str = "sql";
    const EXAMPLE: &'static str = "sql: \"select device, p * 100 as percent from scored where p > 0.9\"";

    fn inputs(&self) -> Option<Vec<String>> {
        // Of a text that cannot be read nothing is named; `plan` says what is wrong with it.
        let Ok(query) = parse(&self.0) else { return Some(Vec::new()) };
        let hidden: Vec<&str> =
            query.with.iter().flat_map(|with| &with.cte_tables).map(|cte| cte.alias.name.value.as_str()).collect();
        let mut names: Vec<String> = Vec::new();
        let _: std::ops::ControlFlow<()> = visit_relations(&*query, |relation| {
            let name = stage_name(relation);
            if !names.contains(&name) && !hidden.contains(&name.as_str()) {
                names.push(name);
            }
            std::ops::ControlFlow::Continue(())
        });
        Some(names)
    }

    fn check(&self, _: &PlanContext) -> Vec<Problem> {
        match parse(&self.0) {
            Ok(query) => refusal::of_query(&session().state(), &query, &self.0, PATH),
            Err(problems) => problems,
        }
    }

    fn plan(self, inputs: &[Input], _: &PlanContext) -> Planned<OperatorPlan> {
        let select = Select::plan(&self.0, inputs)?;
        let schema = select.schema.clone();
        let build = move |_: &BuildContext| -> Result<Box<dyn Operator>> { Ok(Box::new(select.clone())) };
        Ok(OperatorPlan::stateless(schema, Arc::new(build)))
    }
}

/// The stage (or `stage.output`) that a table name means.
fn stage_name(table: &ObjectName) -> String {
    let parts = table.0.iter().filter_map(|part| part.as_ident());
    let parts: Vec<&str> = parts.map(|ident| ident.value.as_str()).collect();
    parts.join(".")
}

/// The one query of a text.
fn parse(text: &str) -> std::result::Result<Box<Query>, Vec<Problem>> {
    let parser = DFParserBuilder::new(text).build();
    let statements = parser.and_then(|mut parser| parser.parse_statements());
    let mut statements = statements.map_err(|error| problems(&error, text, PATH))?;
    let Some(statement) = statements.pop_front() else {
        return Err(vec![refusal::of_statement("an empty text", 0, PATH)]);
    };
    if !statements.is_empty() {
        let at = place::second_statement(text).unwrap_or(0);
        return Err(vec![refusal::of_statement("a second statement", at, PATH)]);
    }
    match statement {
        Statement::Statement(statement) => match *statement {
            SqlStatement::Query(query) => Ok(query),
            _ => Err(vec![refusal::of_statement("this", 0, PATH)]),
        },
        _ => Err(vec![refusal::of_statement("this", 0, PATH)]),
    }
}

/// One step over a batch.
#[derive(Clone, Debug)]
enum Step {
    Filter(Condition),
    Project(Vec<Arc<dyn PhysicalExpr>>, SchemaRef),
}

#[derive(Clone, Debug)]
struct Select {
    steps: Vec<Step>,
    schema: SchemaRef,
}

impl Select {
    fn plan(text: &str, inputs: &[Input]) -> std::result::Result<Self, Vec<Problem>> {
        let told = |error: DataFusionError| problems(&error, text, PATH);
        let mut query = parse(text)?;
        let session = session();
        let state = session.state();
        let refused = refusal::of_query(&state, &query, text, PATH);
        if !refused.is_empty() {
            return Err(refused);
        }
        let input = table(&mut query, inputs, text)?;
        register(&session, input).map_err(told)?;
        let statement = Statement::Statement(Box::new(SqlStatement::Query(query)));
        // The tables are in memory, so that nothing is waited for.
        let planned = session.state().statement_to_plan(statement).now_or_never();
        let Some(planned) = planned else {
            return Err(vec![Problem::new("invalid-sql", PATH, "cannot plan the SQL without waiting")]);
        };
        let planned = planned.map_err(told)?;
        let mut steps = Vec::new();
        add_steps(&state, &planned, &mut steps).map_err(|trouble| match trouble {
            Trouble::Refused(what) => vec![refusal::of_plan(&what, PATH)],
            Trouble::Failed(error) => told(error),
        })?;
        let schema = steps.iter().rev().find_map(|step| match step {
            Step::Project(_, schema) => Some(schema.clone()),
            Step::Filter(_) => None,
        });
        let schema = schema.unwrap_or_else(|| input.schema.clone());
        if schema.fields().is_empty() {
            let told = "the select has no columns";
            return Err(vec![Problem::new("invalid-sql", PATH, told).help("write `*` for all columns").at(0)]);
        }
        Ok(Self { steps, schema })
    }

    fn run(&self, rows: &RecordBatch) -> std::result::Result<RecordBatch, DataFusionError> {
        let mut rows = rows.clone();
        for step in &self.steps {
            rows = match step {
                // Expressions are not evaluated over nothing: a constant division by zero would fail there.
                _ if rows.num_rows() == 0 => return Ok(RecordBatch::new_empty(self.schema.clone())),
                Step::Filter(condition) => {
                    let mask = condition.mask(&rows)?;
                    if mask.true_count() == rows.num_rows() {
                        continue;
                    }
                    filter_record_batch(&rows, &mask)?
                }
                Step::Project(exprs, schema) => project(&rows, exprs, schema)?,
            };
        }
        Ok(rows)
    }
}

fn project(
    rows: &RecordBatch,
    exprs: &[Arc<dyn PhysicalExpr>],
    schema: &SchemaRef,
) -> std::result::Result<RecordBatch, DataFusionError> {
    let columns = exprs.iter().zip(schema.fields()).map(|(expr, field)| {
        let column: ArrayRef = expr.evaluate(rows)?.into_array(rows.num_rows())?;
        if column.data_type() == field.data_type() {
            return Ok(column);
        }
        Ok(cast(&column, field.data_type())?)
    });
    let columns = columns.collect::<std::result::Result<Vec<_>, DataFusionError>>()?;
    let options = RecordBatchOptions::new().with_row_count(Some(rows.num_rows()));
    Ok(RecordBatch::try_new_with_options(schema.clone(), columns, &options)?)
}

/// The input that FROM names. The name in the query is made one plain identifier, whatever stands in it.
fn table<'a>(query: &mut Query, inputs: &'a [Input], text: &str) -> std::result::Result<&'a Input, Vec<Problem>> {
    let table = match &mut *query.body {
        SetExpr::Select(select) => select.from.first_mut().map(|from| &mut from.relation),
        _ => None,
    };
    let Some(TableFactor::Table { name, alias, .. }) = table else {
        return Err(vec![refusal::of_plan("this query", PATH)]);
    };
    let wanted = stage_name(name);
    let idents: Vec<Ident> = name.0.iter().filter_map(|part| part.as_ident().cloned()).collect();
    let Some(input) = inputs.iter().find(|input| input.name == wanted) else {
        let known: Vec<&str> = inputs.iter().map(|input| input.name.as_str()).collect();
        let at = idents.first().and_then(|ident| place::byte_of(text, ident.span.start));
        let problem = Problem::new("unknown-input", PATH, format!("no input is called `{wanted}`"))
            .help(columns::one_of(&wanted, &known, "inputs"));
        return Err(vec![problem.at(at.unwrap_or(0))]);
    };
    if alias.is_none() {
        // Of `stage.output`, columns can be called `output.column`.
        *alias = idents.into_iter().next_back().map(|name| TableAlias { explicit: true, name, columns: Vec::new(), at: None });
    }
    *name = ObjectName::from(Ident::with_quote('"', wanted));
    Ok(input)
}

fn register(session: &SessionContext, input: &Input) -> std::result::Result<(), DataFusionError> {
    let table = Arc::new(EmptyTable::new(input.schema.clone()));
    session.register_table(TableReference::bare(input.name.clone()), table)?;
    Ok(())
}

/// Why a plan has no steps.
enum Trouble {
    Refused(String),
    Failed(DataFusionError),
}

impl From<DataFusionError> for Trouble {
    fn from(error: DataFusionError) -> Self {
        Self::Failed(error)
    }
}

fn add_steps(state: &SessionState, plan: &LogicalPlan, steps: &mut Vec<Step>) -> std::result::Result<(), Trouble> {
    match plan {
        LogicalPlan::TableScan(scan) if scan.projection.is_none() && scan.filters.is_empty() && scan.fetch.is_none() => Ok(()),
        LogicalPlan::SubqueryAlias(alias) => add_steps(state, &alias.input, steps),
        LogicalPlan::Filter(filter) => {
            add_steps(state, &filter.input, steps)?;
            let predicate = physical(state, &filter.predicate, &filter.input)?;
            steps.push(Step::Filter(Condition::new(predicate)));
            Ok(())
        }
        LogicalPlan::Projection(projection) => {
            add_steps(state, &projection.input, steps)?;
            let from = projection.input.schema().as_arrow();
            let (mut exprs, mut fields) = (Vec::new(), Vec::new());
            for (expr, named) in projection.expr.iter().zip(projection.schema.fields()) {
                let expr = physical(state, expr, &projection.input)?;
                let data_type = stored(expr.data_type(from)?);
                fields.push(Field::new(named.name(), data_type, expr.nullable(from)?));
                exprs.push(expr);
            }
            steps.push(Step::Project(exprs, Arc::new(Schema::new(fields))));
            Ok(())
        }
        other => {
            let told = other.display().to_string();
            Err(Trouble::Refused(told.split(':').next().unwrap_or("this plan").to_owned()))
        }
    }
}

fn physical(
    state: &SessionState,
    expr: &Expr,
    input: &LogicalPlan,
) -> std::result::Result<Arc<dyn PhysicalExpr>, DataFusionError> {
    state.create_physical_expr(expr.clone(), input.schema())
}

/// The type in which a column leaves: some functions give views, which nothing behind this stage expects.
fn stored(data_type: DataType) -> DataType {
    match data_type {
        DataType::Utf8View => DataType::Utf8,
        DataType::BinaryView => DataType::Binary,
        other => other,
    }
}

impl Operator for Select {
    fn process(&mut self, _: usize, batch: Batch, outputs: &mut Outputs) -> Result<()> {
        let (mut selected, mut rejected) = (Vec::new(), Vec::new());
        let mut work = |rows: &RecordBatch| -> std::result::Result<(), DataFusionError> {
            selected.push(self.run(rows)?);
            Ok(())
        };
        sift(batch.records(), &mut work, &mut rejected);
        outputs.reject(rejected);
        let rows = match selected.as_slice() {
            [rows] => rows.clone(),
            several => concat_batches(&self.schema, several).map_err(Error::fatal)?,
        };
        outputs.emit(batch.derive(rows));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::{AsArray, Float64Array, Int32Array, StringArray};
    use arrow::datatypes::Float64Type;

    use super::*;
    use crate::testing;

    fn rows() -> RecordBatch {
        let device: ArrayRef = Arc::new(StringArray::from(vec!["a", "b", "c", "d"]));
        let p: ArrayRef = Arc::new(Float64Array::from(vec![Some(0.5), Some(0.25), None, Some(0.75)]));
        let n: ArrayRef = Arc::new(Int32Array::from(vec![1, 0, 2, 4]));
        let big: ArrayRef = Arc::new(Int32Array::from(vec![1, 2, 3, 4]));
        let columns = [("device", device, false), ("p", p, true), ("n", n, false), ("Big", big, false)];
        RecordBatch::try_from_iter_with_nullable(columns).unwrap()
    }

    fn run(sql: &str) -> Outputs {
        testing::run::<SqlConfig>(&serde_json::to_string(sql).unwrap(), rows())
    }

    fn problems_of(sql: &str) -> Vec<Problem> {
        testing::problems::<SqlConfig>(&serde_json::to_string(sql).unwrap(), &rows().schema())
    }

    #[test]
    fn columns_are_computed_and_rows_filtered() {
        let outputs = run("select device, p * 100 as percent, upper(i.device) as u from input as i where p > 0.3");
        let got = testing::rows(&outputs, 0).unwrap();
        let schema = got.schema();
        let fields: Vec<_> = schema.fields().iter().map(|f| (f.name().as_str(), f.is_nullable())).collect();
        assert_eq!(fields[..2], [("device", false), ("percent", true)]);
        assert_eq!(fields[2].0, "u");
        assert_eq!(schema.field(2).data_type(), &DataType::Utf8);
        assert_eq!(got.column(1).as_primitive::<Float64Type>().values(), &[50.0, 75.0]);
        assert_eq!(got.column(2).as_string::<i32>().value(1), "D");
    }

    #[test]
    fn a_star_gives_all_columns() {
        let outputs = run("select * from input");
        let got = testing::rows(&outputs, 0).unwrap();
        assert_eq!(got.columns(), rows().columns());
    }

    #[test]
    fn a_row_that_fails_is_rejected_alone() {
        let outputs = run("select device, 8 / n as q from input where device <> 'a'");
        let got = testing::rows(&outputs, 0).unwrap();
        let devices: Vec<_> = got.column(0).as_string::<i32>().iter().flatten().collect();
        assert_eq!(devices, ["c", "d"]);
        assert_eq!(outputs.rejected().len(), 1);
        assert!(outputs.rejected()[0].reason.to_lowercase().contains("divide by zero"));
    }

    #[test]
    fn what_is_not_row_wise_is_refused_where_it_stands() {
        for (sql, clause) in [
            ("select distinct device from input", "distinct"),
            ("select device from input order by p", "order"),
            ("select device from input\n limit 3", "limit"),
            ("select device from input offset 3", "offset"),
            ("select device from input group by device", "group"),
            ("select device from input having p > 1", "having"),
            ("select left(device, 1) from input left join input as o on true", "left join"),
            ("select device from input join other on true", "join"),
            ("select device from input, other", "other"),
            ("select device, 'é', max(p) from input", "max"),
            ("select count(*) from input", "count"),
            ("select row_number() over (order by p) as r from input", "row_number"),
            ("select sum(p) over () as r from input", "sum"),
            ("select device from input union all select device from input", "union"),
            ("select device from input except select device from input", "except"),
            ("with x as (select 1) select device from input", "with"),
            ("select device from (select device from input) as x", "select device from input)"),
            ("select device from input where p > (select 1)", "select 1"),
            ("select device from input where exists (select 1)", "select 1"),
            ("select device from input where p in (select 1)", "select 1"),
            ("select device from generate_series(1, 3)", "generate_series"),
            ("select device, now() as t from input", "now"),
            ("select device, round(random() * 10) as r from input", "random"),
            ("select device from input where uuid() > 'a'", "uuid"),
            ("select 1 as one", "select"),
            ("delete from input", "delete"),
            ("select device from input; select 1", "select 1"),
        ] {
            let found = problems_of(sql);
            assert_eq!(found[0].code, "refused-sql", "{sql}: {found:?}");
            assert_eq!(found[0].offset, sql.find(clause), "{sql}: {found:?}");
            assert!(found[0].help.is_some(), "{sql}");
        }
    }

    #[test]
    fn every_refused_clause_of_a_text_is_told() {
        let sql = "select distinct max(p) from input group by device limit 1";
        let places: Vec<_> = problems_of(sql).iter().map(|p| p.offset.unwrap()).collect();
        let expected = ["distinct", "max", "group", "limit"].map(|clause| sql.find(clause).unwrap());
        assert_eq!(places, expected);
    }

    #[test]
    fn unknown_names_have_a_place_and_a_suggestion() {
        let found = problems_of("select device,\n devcie as x from input");
        assert_eq!((found[0].code, found[0].offset), ("unknown-column", Some(16)));
        assert!(found[0].help.as_ref().unwrap().contains("did you mean `device`?"));
        let found = problems_of("select Big from input");
        assert!(found[0].help.as_ref().unwrap().contains("double quotes"), "{found:?}");
        let found = problems_of("select device from inptu");
        assert_eq!((found[0].code, found[0].offset), ("unknown-input", Some(19)));
        let found = problems_of("select device frm input where");
        assert_eq!(found[0].code, "invalid-sql");
        assert_eq!(problems_of("select nosuch(p) as x from input")[0].code, "invalid-sql");
    }

    #[test]
    fn inputs_are_the_names_behind_from() {
        let inputs = |sql: &str| SqlConfig(sql.to_owned()).inputs();
        assert_eq!(inputs("select 1 as x from scored"), Some(vec!["scored".to_owned()]));
        assert_eq!(inputs("select 1 as x from \"my-stage\""), Some(vec!["my-stage".to_owned()]));
        assert_eq!(inputs("select hot.x from routed.hot where x > 1"), Some(vec!["routed.hot".to_owned()]));
        let both = Some(vec!["a".to_owned(), "b".to_owned()]);
        assert_eq!(inputs("select 1 from a join b on true"), both);
        // Whatever the text is, it is the text that names the inputs: no other stage is meant.
        assert_eq!(inputs("select 1"), Some(Vec::new()));
        assert_eq!(inputs("select )"), Some(Vec::new()));
    }

    #[test]
    fn what_names_no_input_is_told_without_one() {
        let codes = |sql: &str| Select::plan(sql, &[]).unwrap_err().iter().map(|problem| problem.code).collect::<Vec<_>>();
        assert_eq!(codes("select p,, q from input"), ["invalid-sql"]);
        assert_eq!(codes("select 1 as one"), ["refused-sql"]);
        assert_eq!(codes(""), ["refused-sql"]);
    }

    #[test]
    fn a_named_output_is_a_table() {
        let input = Input { name: "routed.hot".to_owned(), schema: rows().schema() };
        let select = Select::plan("select hot.p, device from routed.hot where hot.p > 0.6", &[input]).unwrap();
        assert_eq!(select.run(&rows()).unwrap().num_rows(), 1);
    }
}
