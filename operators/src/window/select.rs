//! The items of `select`: a key column, or a function over the rows of a window, each parsed and typed. Called while
//! planning; the invariant: an item that passes here has a type, a name and one column it reads.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field};
use datafusion::sql::parser::DFParserBuilder;
use datafusion::sql::sqlparser::ast::{Expr, Function as Call, FunctionArg, FunctionArgExpr, FunctionArguments, Ident};

use crate::columns;
use crate::sql::problems;

/// What is made of a column's values within a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Function {
    /// All values, in order, as a list.
    ArrayAgg,
    /// The mean of what is not null, as float64.
    Avg,
    /// How many are not null.
    Count,
    /// The value of the first row.
    First,
    /// The value of the last row.
    Last,
    /// The largest of what is not null; NaN is larger than every number.
    Max,
    /// The smallest of what is not null.
    Min,
    /// The sum of what is not null: int64, uint64 or float64. Null where it passes 64 bits.
    Sum,
}

static FUNCTIONS: [(&str, Function); 8] = [
    ("array_agg", Function::ArrayAgg),
    ("avg", Function::Avg),
    ("count", Function::Count),
    ("first", Function::First),
    ("last", Function::Last),
    ("max", Function::Max),
    ("min", Function::Min),
    ("sum", Function::Sum),
];

/// An item as it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Item {
    /// The name of the column that leaves.
    pub(super) name: String,
    pub(super) what: What,
}

/// What an item asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// A key column.
    Key(String),
    /// `count(*)`.
    Rows,
    /// A function over a column.
    Of(Function, String),
}

/// What is wrong with an item, and what to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mistake {
    pub(super) told: String,
    pub(super) help: String,
}

impl Item {
    /// Reads `column`, `function(column) as name` or `count(*) as name`.
    pub(super) fn parse(text: &str) -> Result<Self, Mistake> {
        let parser = DFParserBuilder::new(text).build();
        let parsed = parser.and_then(|mut parser| parser.parse_into_expr());
        let parsed = parsed.map_err(|error| {
            let told = problems(&error, text, "").pop().map_or(String::new(), |first| first.message);
            mistake(format!("in `{text}`: {told}"))
        })?;
        let alias = parsed.alias.map(|alias| alias.value);
        let (what, name) = match parsed.expr {
            Expr::Identifier(Ident { value, .. }) => (What::Key(value.clone()), value),
            Expr::Function(call) => function(call, text)?,
            _ => return Err(mistake(format!("`{text}` is neither a key column nor a function of one column"))),
        };
        Ok(Self { name: alias.unwrap_or(name), what })
    }
}

fn mistake(told: String) -> Mistake {
    let known: Vec<String> = FUNCTIONS.iter().map(|(name, _)| format!("`{name}(column)`")).collect();
    let help = format!("an item is a column of `by`, `count(*)`, or one of {}", known.join(", "));
    Mistake { told, help }
}

/// The function of a call and its name without an alias.
fn function(call: Call, text: &str) -> Result<(What, String), Mistake> {
    let plain = call.over.is_none()
        && call.filter.is_none()
        && call.null_treatment.is_none()
        && call.within_group.is_empty()
        && matches!(call.parameters, FunctionArguments::None);
    let name = call.name.to_string();
    let args = match call.args {
        FunctionArguments::List(list) if plain && list.duplicate_treatment.is_none() && list.clauses.is_empty() => list.args,
        _ => {
            return Err(mistake(format!("`{text}` has more to it than a function of one column")));
        }
    };
    let lower = name.to_lowercase();
    let Some((known, function)) = FUNCTIONS.iter().find(|(known, _)| *known == lower) else {
        let names: Vec<&str> = FUNCTIONS.iter().map(|(name, _)| *name).collect();
        return Err(Mistake {
            told: format!("unknown window function `{name}`"),
            help: columns::one_of(&lower, &names, "functions"),
        });
    };
    match args.as_slice() {
        [FunctionArg::Unnamed(FunctionArgExpr::Wildcard)] if *function == Function::Count => {
            Ok((What::Rows, "count(*)".to_owned()))
        }
        [FunctionArg::Unnamed(FunctionArgExpr::Expr(Expr::Identifier(column)))] => {
            let name = format!("{known}({})", column.value);
            Ok((What::Of(*function, column.value.clone()), name))
        }
        _ => {
            let mut mistake = mistake(format!("`{name}` in `{text}` must be over one column"));
            mistake.help = "compute what it should be over in a `sql` stage ahead".to_owned();
            Err(mistake)
        }
    }
}

impl Function {
    /// The column that leaves, named `name`; `size` is the number of rows where all windows have as many.
    pub(super) fn field(self, name: &str, column: &Field, size: Option<i32>) -> Result<Field, Mistake> {
        let of = column.data_type();
        let wrong = |wanted: &str| Mistake {
            told: format!("{} is over {wanted}, and column `{}` is {of}", self.name(), column.name()),
            help: "cast the column in a `sql` stage ahead, or leave the item out".to_owned(),
        };
        let field = match self {
            Function::ArrayAgg => {
                let item = Arc::new(Field::new("item", of.clone(), column.is_nullable()));
                let list = match size {
                    Some(size) => DataType::FixedSizeList(item, size),
                    None => DataType::List(item),
                };
                Field::new(name, list, false)
            }
            Function::Count => Field::new(name, DataType::Int64, false),
            Function::First | Function::Last => column.clone().with_name(name),
            Function::Min | Function::Max if is_ordered(of) => column.clone().with_name(name),
            Function::Min | Function::Max => {
                return Err(wrong("numbers, times, texts, bytes and booleans"));
            }
            Function::Avg | Function::Sum if !is_number(of) => return Err(wrong("integers and floats")),
            Function::Avg => Field::new(name, DataType::Float64, column.is_nullable()),
            Function::Sum if of.is_signed_integer() => Field::new(name, DataType::Int64, true),
            Function::Sum if of.is_unsigned_integer() => Field::new(name, DataType::UInt64, true),
            Function::Sum => Field::new(name, DataType::Float64, column.is_nullable()),
        };
        Ok(field)
    }

    fn name(self) -> &'static str {
        FUNCTIONS.iter().find(|(_, function)| *function == self).map_or("?", |(name, _)| *name)
    }
}

fn is_number(data_type: &DataType) -> bool {
    data_type.is_integer() || data_type.is_floating()
}

fn is_ordered(data_type: &DataType) -> bool {
    is_number(data_type)
        || data_type.is_temporal()
        || matches!(
            data_type,
            DataType::Boolean
                | DataType::Utf8
                | DataType::LargeUtf8
                | DataType::Binary
                | DataType::LargeBinary
                | DataType::Decimal128(..)
                | DataType::Decimal256(..)
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(name: &str, what: What) -> Result<Item, Mistake> {
        Ok(Item { name: name.to_owned(), what })
    }

    #[test]
    fn columns_and_functions_are_read() {
        let of = |function, column: &str| What::Of(function, column.to_owned());
        assert_eq!(Item::parse("device"), item("device", What::Key("device".to_owned())));
        assert_eq!(Item::parse("device as d"), item("d", What::Key("device".to_owned())));
        assert_eq!(Item::parse("count(*) as n"), item("n", What::Rows));
        assert_eq!(Item::parse("MAX(ts) as ts"), item("ts", of(Function::Max, "ts")));
        assert_eq!(Item::parse("first(\"a b\")"), item("first(a b)", of(Function::First, "a b")));
        assert_eq!(Item::parse("array_agg(ax)"), item("array_agg(ax)", of(Function::ArrayAgg, "ax")));
    }

    #[test]
    fn what_a_window_cannot_compute_is_a_mistake() {
        for (text, told) in [
            ("ax + 1", "neither"),
            ("max(ax + 1)", "must be over one column"),
            ("max(*)", "must be over one column"),
            ("max(distinct ax)", "more to it"),
            ("sum(ax) over ()", "more to it"),
            ("summ(ax)", "unknown window function"),
            ("max(ax", "cannot parse the SQL"),
        ] {
            let mistake = Item::parse(text).unwrap_err();
            assert!(mistake.told.contains(told), "{text}: {mistake:?}");
        }
        assert!(Item::parse("summ(ax)").unwrap_err().help.contains("did you mean `sum`?"));
    }

    #[test]
    fn fields_have_the_types_that_are_documented() {
        let ax = Field::new("ax", DataType::Float32, true);
        let n = Field::new("n", DataType::Int32, false);
        let text = Field::new("t", DataType::Utf8, false);
        let field = |function: Function, of: &Field, size| function.field("x", of, size).unwrap();
        let item = Arc::new(Field::new("item", DataType::Float32, true));
        assert_eq!(field(Function::ArrayAgg, &ax, Some(8)).data_type(), &DataType::FixedSizeList(item.clone(), 8));
        assert_eq!(field(Function::ArrayAgg, &ax, None).data_type(), &DataType::List(item));
        assert_eq!(field(Function::Avg, &n, None), Field::new("x", DataType::Float64, false));
        assert_eq!(field(Function::Sum, &n, None), Field::new("x", DataType::Int64, true));
        assert_eq!(field(Function::Max, &text, None), Field::new("x", DataType::Utf8, false));
        assert!(Function::Avg.field("x", &text, None).is_err());
    }
}
