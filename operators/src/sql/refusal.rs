//! What SQL may not say in a stream, found in the parsed text before it is planned. Called by `sql` and `route`; the
//! invariant: what passes here looks at one row of one input at a time, and gives the same answer on replay.

use std::ops::ControlFlow;

use afferent_engine::component::Problem;
use datafusion::execution::context::SessionState;
use datafusion::logical_expr::Volatility;
use datafusion::sql::sqlparser::ast::{
    Distinct, Expr, Function, GroupByExpr, Query, Select, SetExpr, SetOperator, Spanned, TableFactor, Visit, Visitor,
};
use datafusion::sql::sqlparser::keywords::Keyword;

use super::place;

const CODE: &str = "refused-sql";

const ROW_WISE: &str = "`sql` sees one row at a time; what is over many rows is for a `window` stage ahead of it, or for \
                        the table that the results go to";
const ONE_INPUT: &str = "`sql` takes one input: write FROM and one stage";
const NO_ORDER: &str = "a stream has no end to be sorted or counted up to; do it when reading the results, with \
                        `afferent sql`";
const TWO_STAGES: &str = "make a stage of the inner select, and name that stage in FROM";

/// Everything in a query that is refused, in the order of the text.
pub(super) fn of_query(session: &SessionState, query: &Query, text: &str, path: &str) -> Vec<Problem> {
    let mut found = Found { text, path, problems: Vec::new() };
    let walk_into = found.query(query);
    let mut problems = found.problems;
    if walk_into {
        problems.extend(walk(session, query, 1, text, path));
    }
    problems.sort_by_key(|problem| problem.offset);
    problems
}

/// Everything in a single expression that is refused.
pub(super) fn of_expression(session: &SessionState, expr: &Expr, text: &str, path: &str) -> Vec<Problem> {
    walk(session, expr, 0, text, path)
}

/// A plan that came out other than row-wise although nothing in the text was refused.
pub(super) fn of_plan(what: &str, path: &str) -> Problem {
    Problem::new(CODE, path, format!("{what} is not row-wise")).help(ROW_WISE).at(0)
}

/// Something other than one SELECT.
pub(super) fn of_statement(what: &str, at: usize, path: &str) -> Problem {
    Problem::new(CODE, path, format!("{what} is no SELECT of rows"))
        .help("write one statement: SELECT ... FROM ... WHERE ...")
        .at(at)
}

struct Found<'a> {
    text: &'a str,
    path: &'a str,
    problems: Vec<Problem>,
}

impl Found<'_> {
    fn refuse(&mut self, what: &str, help: &str, at: Option<usize>) {
        let told = format!("{what} cannot be used in a stream");
        self.problems.push(Problem::new(CODE, self.path, told).help(help).at(at.unwrap_or(0)));
    }

    /// Refuses a clause at its keyword, which stands at or behind byte `from`.
    fn clause(&mut self, there: bool, words: &[Keyword], from: usize, help: &str) {
        if !there {
            return;
        }
        let at = place::keyword(self.text, from, words);
        let what = words.first().map_or(String::new(), |word| match word {
            Keyword::ORDER | Keyword::GROUP | Keyword::CLUSTER | Keyword::DISTRIBUTE | Keyword::SORT => {
                format!("{word:?} BY")
            }
            _ => format!("{word:?}"),
        });
        self.refuse(&what, help, at);
    }

    /// The clauses of a query; false when its expressions need no look any more.
    fn query(&mut self, query: &Query) -> bool {
        if let Some(with) = &query.with {
            let at = place::byte_of(self.text, with.with_token.0.span.start);
            self.refuse("WITH", TWO_STAGES, at);
            return false;
        }
        let select = match query.body.as_ref() {
            SetExpr::Select(select) => select,
            SetExpr::SetOperation { op, .. } => {
                let word = match op {
                    SetOperator::Union => Keyword::UNION,
                    SetOperator::Intersect => Keyword::INTERSECT,
                    SetOperator::Except => Keyword::EXCEPT,
                    SetOperator::Minus => Keyword::MINUS,
                };
                self.clause(true, &[word], 0, "to bring streams together, give a stage several `inputs`");
                return false;
            }
            SetExpr::Query(_) => {
                self.refuse("a select in parentheses", "leave the parentheses out", Some(0));
                return false;
            }
            _ => {
                self.problems.push(of_statement("this", 0, self.path));
                return false;
            }
        };
        let from = self.select(select);
        self.clause(query.order_by.is_some(), &[Keyword::ORDER], from, NO_ORDER);
        self.clause(query.limit_clause.is_some(), &[Keyword::LIMIT, Keyword::OFFSET], from, NO_ORDER);
        self.clause(query.fetch.is_some(), &[Keyword::FETCH], from, NO_ORDER);
        self.clause(!query.locks.is_empty(), &[Keyword::FOR], from, "leave it out");
        self.clause(query.for_clause.is_some(), &[Keyword::FOR], from, "leave it out");
        self.clause(query.settings.is_some(), &[Keyword::SETTINGS], from, "leave it out");
        self.clause(query.format_clause.is_some(), &[Keyword::FORMAT], from, "leave it out");
        if !query.pipe_operators.is_empty() {
            self.refuse("a pipe operator", "write SELECT ... FROM ... WHERE ...", Some(0));
        }
        true
    }

    /// The clauses of a select; gives the byte where FROM stands.
    fn select(&mut self, select: &Select) -> usize {
        let distinct = !matches!(select.distinct, None | Some(Distinct::All));
        self.clause(distinct, &[Keyword::DISTINCT], 0, ROW_WISE);
        self.clause(select.top.is_some(), &[Keyword::TOP], 0, NO_ORDER);
        self.clause(select.into.is_some(), &[Keyword::INTO], 0, "rows go to the stages behind this one");
        let from = place::keyword(self.text, 0, &[Keyword::FROM]).unwrap_or(0);
        self.tables(select, from);
        let laterals = !select.lateral_views.is_empty();
        self.clause(laterals, &[Keyword::LATERAL], from, ROW_WISE);
        self.clause(select.prewhere.is_some(), &[Keyword::PREWHERE], from, "write WHERE");
        self.clause(!select.connect_by.is_empty(), &[Keyword::CONNECT, Keyword::START], from, ROW_WISE);
        let grouped = match &select.group_by {
            GroupByExpr::All(_) => true,
            GroupByExpr::Expressions(by, with) => !by.is_empty() || !with.is_empty(),
        };
        self.clause(grouped, &[Keyword::GROUP], from, ROW_WISE);
        self.clause(!select.cluster_by.is_empty(), &[Keyword::CLUSTER], from, NO_ORDER);
        self.clause(!select.distribute_by.is_empty(), &[Keyword::DISTRIBUTE], from, NO_ORDER);
        self.clause(!select.sort_by.is_empty(), &[Keyword::SORT], from, NO_ORDER);
        self.clause(select.having.is_some(), &[Keyword::HAVING], from, ROW_WISE);
        self.clause(!select.named_window.is_empty(), &[Keyword::WINDOW], from, ROW_WISE);
        self.clause(select.qualify.is_some(), &[Keyword::QUALIFY], from, ROW_WISE);
        from
    }

    fn tables(&mut self, select: &Select, from: usize) {
        const JOINS: [Keyword; 13] = [
            Keyword::JOIN,
            Keyword::INNER,
            Keyword::LEFT,
            Keyword::RIGHT,
            Keyword::FULL,
            Keyword::CROSS,
            Keyword::NATURAL,
            Keyword::SEMI,
            Keyword::ANTI,
            Keyword::ASOF,
            Keyword::OUTER,
            Keyword::GLOBAL,
            Keyword::STRAIGHT_JOIN,
        ];
        let Some(first) = select.from.first() else {
            self.refuse("a select without FROM", ONE_INPUT, Some(0));
            return;
        };
        self.clause(!first.joins.is_empty(), &JOINS, from, ONE_INPUT);
        if let Some(second) = select.from.get(1) {
            let at = place::byte_of(self.text, second.relation.span().start);
            self.refuse("a second table (a join)", ONE_INPUT, at.or(Some(from)));
        }
        let at = place::byte_of(self.text, first.relation.span().start).or(Some(from));
        match &first.relation {
            TableFactor::Table {
                args: None,
                with_hints,
                version: None,
                with_ordinality: false,
                partitions,
                json_path: None,
                sample: None,
                index_hints,
                ..
            } if with_hints.is_empty() && partitions.is_empty() && index_hints.is_empty() => {}
            TableFactor::Table { args: Some(_), .. } => {
                self.refuse("a table function", ONE_INPUT, at);
            }
            TableFactor::Table { .. } => self.refuse("a modifier of a table", ONE_INPUT, at),
            // The walk through the expressions finds the select within, and its place.
            TableFactor::Derived { .. } => {}
            _ => self.refuse("what stands behind FROM", ONE_INPUT, at),
        }
    }
}

/// Looks through all expressions; selects nested deeper than `selects` are refused.
fn walk(session: &SessionState, node: &impl Visit, selects: usize, text: &str, path: &str) -> Vec<Problem> {
    let found = Found { text, path, problems: Vec::new() };
    let mut walk = Walk { session, selects, depth: 0, found };
    let _: ControlFlow<()> = node.visit(&mut walk);
    walk.found.problems
}

struct Walk<'a> {
    session: &'a SessionState,
    /// Selects that may be nested.
    selects: usize,
    /// Selects around the node at hand.
    depth: usize,
    found: Found<'a>,
}

impl Walk<'_> {
    fn function(&mut self, function: &Function) {
        let [name] = function.name.0.as_slice() else {
            return;
        };
        let Some(name) = name.as_ident() else {
            return;
        };
        let at = place::byte_of(self.found.text, name.span.start);
        let lower = name.value.to_lowercase();
        let scalar = self.session.scalar_functions().get(&lower);
        let windowed = self.session.window_functions().contains_key(&lower);
        if function.over.is_some() || (windowed && scalar.is_none()) {
            self.found.refuse(&format!("the window function `{lower}`"), ROW_WISE, at);
        } else if lower == "unnest" {
            let help = "it makes several rows of one; let `decode` read arrays of records as rows";
            self.found.refuse("`unnest`", help, at);
        } else if scalar.is_none() && self.session.aggregate_functions().contains_key(&lower) {
            self.found.refuse(&format!("the aggregate function `{lower}`"), ROW_WISE, at);
        } else {
            match scalar.map(|f| f.signature().volatility) {
                Some(Volatility::Stable) => {
                    let help = "time in a stream is in its columns: use the event time, or `keep: [timestamp]` at `decode`";
                    self.found.refuse(&format!("the clock (`{lower}`)"), help, at);
                }
                Some(Volatility::Volatile) => {
                    let help = "rows that come again after a restart must get the same values: take them from the columns";
                    self.found.refuse(&format!("the function `{lower}`, which gives another value at each call,"), help, at);
                }
                Some(Volatility::Immutable) | None => {}
            }
        }
    }
}

impl Visitor for Walk<'_> {
    type Break = ();

    fn pre_visit_query(&mut self, query: &Query) -> ControlFlow<()> {
        if self.depth == self.selects {
            let at = place::byte_of(self.found.text, query.span().start);
            self.found.refuse("a subquery", TWO_STAGES, at);
        }
        self.depth += 1;
        ControlFlow::Continue(())
    }

    fn post_visit_query(&mut self, _: &Query) -> ControlFlow<()> {
        self.depth -= 1;
        ControlFlow::Continue(())
    }

    fn pre_visit_expr(&mut self, expr: &Expr) -> ControlFlow<()> {
        // What stands in a refused select need not be told, too.
        if let (Expr::Function(function), true) = (expr, self.depth <= self.selects) {
            self.function(function);
        }
        ControlFlow::Continue(())
    }
}
