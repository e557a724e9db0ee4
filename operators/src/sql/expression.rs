//! Planning and evaluating single expressions with DataFusion, and its errors told as problems. Called by `sql` and
//! `route`; the invariant: a row whose evaluation fails is rejected alone, whatever batch it came in.

use std::sync::Arc;

use afferent_engine::Rejected;
use afferent_engine::component::Problem;
use arrow::array::{Array, AsArray, BooleanArray, RecordBatch};
use arrow::compute::prep_null_mask_filter;
use arrow::datatypes::{DataType, SchemaRef};
use datafusion::common::{DFSchema, DataFusionError, SchemaError};
use datafusion::execution::context::{SessionConfig, SessionContext, SessionState};
use datafusion::physical_expr::PhysicalExpr;
use datafusion::sql::parser::DFParserBuilder;
use datafusion::sql::sqlparser::ast::{ExprWithAlias, Ident, Spanned};
use datafusion::sql::sqlparser::parser::ParserError;

use super::{place, refusal};
use crate::columns;

/// A session with DataFusion's functions, set up for planning: it notes places, and texts are `utf8` as everywhere
/// here (not views).
pub(crate) fn session() -> SessionContext {
    let mut config = SessionConfig::new();
    let parser = &mut config.options_mut().sql_parser;
    parser.collect_spans = true;
    parser.map_string_types_to_utf8view = false;
    SessionContext::new_with_config(config)
}

/// A boolean expression over the columns of a batch.
#[derive(Clone, Debug)]
pub(crate) struct Condition(Arc<dyn PhysicalExpr>);

impl Condition {
    /// What is wrong with the text of a condition whatever the columns are.
    pub(crate) fn check(session: &SessionState, text: &str, path: &str) -> Vec<Problem> {
        parse(session, text, path).err().unwrap_or_default()
    }

    /// Plans the text of a condition; problems are at `path`.
    pub(crate) fn plan(session: &SessionState, text: &str, schema: &SchemaRef, path: &str) -> Result<Self, Vec<Problem>> {
        let told = |error: DataFusionError| problems(&error, text, path);
        let parsed = parse(session, text, path)?;
        let start = place::byte_of(text, parsed.expr.span().start).unwrap_or(0);
        let columns = DFSchema::try_from(schema.clone()).map_err(told)?;
        let planned = session
            .create_logical_expr_from_sql_expr(parsed, &columns)
            .and_then(|expr| session.create_physical_expr(expr, &columns))
            .map_err(told)?;
        let data_type = planned.data_type(schema).map_err(told)?;
        if data_type != DataType::Boolean {
            let told = format!("a condition must be true or false, and this is {data_type}");
            return Err(vec![
                Problem::new("wrong-type", path, told).help("compare it with something, as in `temperature > 80`").at(start),
            ]);
        }
        Ok(Self(planned))
    }

    pub(super) fn new(planned: Arc<dyn PhysicalExpr>) -> Self {
        Self(planned)
    }

    /// For each row whether the condition holds; null counts as no.
    pub(crate) fn mask(&self, rows: &RecordBatch) -> Result<BooleanArray, DataFusionError> {
        let mask = self.0.evaluate(rows)?.into_array(rows.num_rows())?;
        let Some(mask) = mask.as_boolean_opt() else {
            let told = format!("a condition gave {} instead of true or false", mask.data_type());
            return Err(DataFusionError::Execution(told));
        };
        Ok(match mask.nulls() {
            Some(_) => prep_null_mask_filter(mask),
            None => mask.clone(),
        })
    }
}

fn parse(session: &SessionState, text: &str, path: &str) -> Result<ExprWithAlias, Vec<Problem>> {
    let parser = DFParserBuilder::new(text).build();
    let parsed = parser.and_then(|mut parser| parser.parse_into_expr());
    let parsed = parsed.map_err(|error| problems(&error, text, path))?;
    if let Some(alias) = &parsed.alias {
        return Err(vec![alias_problem(alias, text, path)]);
    }
    let refused = refusal::of_expression(session, &parsed.expr, text, path);
    if refused.is_empty() { Ok(parsed) } else { Err(refused) }
}

fn alias_problem(alias: &Ident, text: &str, path: &str) -> Problem {
    let told = format!("a condition has no name, and this one is called `{}`", alias.value);
    let problem = Problem::new("invalid-sql", path, told).help("leave the name out");
    match place::byte_of(text, alias.span.start) {
        Some(at) => problem.at(at),
        None => problem,
    }
}

/// Gives `work` all rows; where it fails, halves of them, down to the single rows that are at fault, which are
/// rejected. `work` must have no effect when it fails. Order is kept.
pub(crate) fn sift(
    rows: &RecordBatch,
    work: &mut dyn FnMut(&RecordBatch) -> Result<(), DataFusionError>,
    rejected: &mut Vec<Rejected>,
) {
    let Err(cause) = work(rows) else {
        return;
    };
    if rows.num_rows() <= 1 {
        let reason = format!("cannot evaluate the expression for this row: {}", cause.strip_backtrace());
        rejected.extend(Rejected::rows(rows, 0..rows.num_rows(), "evaluation", &reason));
        return;
    }
    let half = rows.num_rows() / 2;
    sift(&rows.slice(0, half), work, rejected);
    sift(&rows.slice(half, rows.num_rows() - half), work, rejected);
}

/// Everything that DataFusion found wrong with `text`, at its places.
pub(crate) fn problems(error: &DataFusionError, text: &str, path: &str) -> Vec<Problem> {
    error.iter().map(|error| problem(error, text, path)).collect()
}

fn problem(error: &DataFusionError, text: &str, path: &str) -> Problem {
    let span = error.diagnostic().and_then(|diagnostic| diagnostic.span);
    let mut at = span.and_then(|span| place::byte(text, span.start.line, span.start.column));
    let mut problem = match error.find_root() {
        DataFusionError::SchemaError(cause, _) => match cause.as_ref() {
            SchemaError::FieldNotFound { field, valid_fields } => {
                let span = field.spans.first();
                at = at.or_else(|| span.and_then(|span| place::byte(text, span.start.line, span.start.column)));
                let known: Vec<&str> = valid_fields.iter().map(|column| column.name()).collect();
                let mut help = columns::one_of(field.name(), &known, "columns");
                if known.iter().any(|known| known.to_lowercase() == *field.name()) {
                    help.push_str("; a name with capitals needs double quotes");
                }
                let told = format!("unknown column `{}`", field.flat_name());
                Problem::new("unknown-column", path, told).help(help)
            }
            other => invalid(&other.to_string(), path),
        },
        DataFusionError::SQL(cause, _) => {
            let told = match cause.as_ref() {
                ParserError::TokenizerError(told) | ParserError::ParserError(told) => told.clone(),
                ParserError::RecursionLimitExceeded => "nested too deeply".to_owned(),
            };
            // The end of the text is a place, too, and the parser does not number it.
            at = at.or(place::byte_in_message(text, &told)).or(Some(text.trim_end().len()));
            let told = told.split(" at Line: ").next().unwrap_or(&told);
            Problem::new("invalid-sql", path, format!("cannot parse the SQL: {}", lower(told)))
        }
        other => invalid(&other.message(), path),
    };
    problem.offset = at;
    problem
}

/// DataFusion's first line says what is wrong, the others what to do.
fn invalid(told: &str, path: &str) -> Problem {
    let (first, rest) = told.split_once('\n').unwrap_or((told, ""));
    let problem = Problem::new("invalid-sql", path, format!("cannot plan the SQL: {}", lower(first)));
    if rest.trim().is_empty() { problem } else { problem.help(lower(&rest.replace('\n', "; "))) }
}

fn lower(told: &str) -> String {
    let told = told.trim().trim_end_matches('.');
    let mut characters = told.chars();
    match characters.next() {
        Some(first) => first.to_lowercase().chain(characters).collect(),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::{ArrayRef, Int32Array};

    use super::*;

    fn rows() -> RecordBatch {
        let a: ArrayRef = Arc::new(Int32Array::from(vec![Some(4), Some(0), None, Some(2)]));
        RecordBatch::try_from_iter([("a", a)]).unwrap()
    }

    fn plan(text: &str) -> Result<Condition, Vec<Problem>> {
        Condition::plan(&session().state(), text, &rows().schema(), "/if")
    }

    #[test]
    fn null_counts_as_no() {
        let mask = plan("a > 1").unwrap().mask(&rows()).unwrap();
        assert_eq!(mask, BooleanArray::from(vec![true, false, false, true]));
    }

    #[test]
    fn only_rows_at_fault_are_rejected() {
        let condition = plan("8 / a > 1").unwrap();
        let (mut masks, mut rejected) = (Vec::new(), Vec::new());
        let mut work = |rows: &RecordBatch| -> Result<(), DataFusionError> {
            masks.extend(condition.mask(rows)?.iter().flatten());
            Ok(())
        };
        sift(&rows(), &mut work, &mut rejected);
        assert_eq!(masks, [true, false, true]);
        assert_eq!(rejected.len(), 1);
        assert_eq!(rejected[0].code, "evaluation");
        assert_eq!(rejected[0].given, afferent_engine::Given::Row("{\"a\":0}".into()));
    }

    #[test]
    fn problems_have_a_place_and_help() {
        let told = |text: &str| {
            let problem = plan(text).unwrap_err().remove(0);
            assert_eq!(problem.path, "/if");
            (problem.code, problem.offset)
        };
        assert_eq!(told("a > 1 and\n bb > 2"), ("unknown-column", Some(11)));
        assert_eq!(told("a > "), ("invalid-sql", Some(3)));
        assert_eq!(told("a > > 1"), ("invalid-sql", Some(4)));
        assert_eq!(told("a > 1 b c"), ("invalid-sql", Some(6)));
        assert_eq!(told("a > 1 as b"), ("invalid-sql", Some(9)));
        assert_eq!(told("a + 1").0, "wrong-type");
        assert_eq!(told("a > max(a)"), ("refused-sql", Some(4)));
        assert_eq!(told("a > (select 1)"), ("refused-sql", Some(5)));
        assert_eq!(told("nosuch(a)").0, "invalid-sql");
    }
}
