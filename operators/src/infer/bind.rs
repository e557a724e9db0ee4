//! Fits columns to one input of a model, at planning: names to columns, types to the element type, and the shape that
//! the columns give together to the shape that the model wants. Invariant: for every row that passes the checks of
//! `gather`, a [`Binding`] gives exactly the elements of the model's shape.

use std::fmt::Write as _;

use afferent_engine::component::Problem;
use afferent_models::{DataType as TensorType, Dim, TensorSpec};
use arrow::datatypes::{DataType, Schema};

use super::config::Stack;
use super::element::converts;
use crate::columns;

/// One input of the model with the columns that fill it.
#[derive(Debug, PartialEq)]
pub(super) struct Binding {
    /// Name of the input.
    pub(super) input: String,
    /// Its element type.
    pub(super) data_type: TensorType,
    /// The columns, in the order in which they are stacked.
    pub(super) columns: Vec<Column>,
    /// Axes of one row: the model's without the batch.
    pub(super) row_shape: Vec<usize>,
    /// Elements that each column gives for a row.
    pub(super) each: usize,
    /// How the columns' elements lie in a row.
    pub(super) layout: Layout,
}

/// A column of the input.
#[derive(Debug, PartialEq)]
pub(super) struct Column {
    /// Its index.
    pub(super) index: usize,
    /// Its name.
    pub(super) name: String,
    /// Items that its lists must have, where the schema does not fix that.
    pub(super) list_length: Option<usize>,
}

/// How the elements of several columns lie in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// One column after the other.
    Blocks,
    /// The first element of each column, then the second of each.
    Interleaved,
}

impl Binding {
    /// Elements of one row.
    pub(super) fn row_len(&self) -> usize {
        self.each * self.columns.len()
    }

    /// Whether the column of that index is a list that the model takes in.
    pub(super) fn takes_list(&self, index: usize, schema: &Schema) -> bool {
        self.columns.iter().any(|column| column.index == index) && schema.field(index).data_type().is_nested()
    }
}

/// Where the axis of the columns goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Arrangement {
    /// There is no such axis: one column.
    Plain,
    First,
    Last,
}

impl Arrangement {
    /// The shape of a row of `count` columns with these axes each.
    fn shape(self, axes: &[Dim], count: usize) -> Vec<Dim> {
        let columns = Dim::Fixed(count);
        match self {
            Arrangement::Plain => axes.to_vec(),
            Arrangement::First => [&[columns][..], axes].concat(),
            Arrangement::Last => [axes, &[columns][..]].concat(),
        }
    }

    fn stack(self) -> Option<Stack> {
        match self {
            Arrangement::Plain => None,
            Arrangement::First => Some(Stack::First),
            Arrangement::Last => Some(Stack::Last),
        }
    }
}

/// A name as a part of a JSON pointer.
pub(super) fn escaped(name: &str) -> String {
    name.replace('~', "~0").replace('/', "~1")
}

/// Binds the columns of these names to an input.
///
/// # Errors
/// Every problem that can be told from what is found so far: names and types first, then shapes.
pub(super) fn bind(spec: &TensorSpec, names: &[String], stack: Option<Stack>, schema: &Schema) -> Result<Binding, Vec<Problem>> {
    let place = format!("/inputs/{}", escaped(&spec.name));
    let Some((_, inner)) = spec.shape.split_first() else {
        let message = format!("the model's input {spec} has no axis for the rows, or the file does not declare its axes");
        return Err(vec![
            Problem::new("wrong-tensor-shape", place, message)
                .help("export the model with the axes of its inputs, the first for the batch"),
        ]);
    };
    if names.is_empty() {
        return Err(vec![Problem::new("missing-input", place, format!("no column is given for the input {spec}"))]);
    }
    let (columns, axes) = find(spec, names, schema, &place)?;
    let axes = common_axes(spec, names, &axes, &place)?;
    let arrangement = arrange(spec, inner, &axes, names.len(), stack, &place)?;

    let given = arrangement.shape(&axes, names.len());
    let row_shape: Option<Vec<usize>> = inner.iter().zip(&given).map(|pair| fixed(*pair.0).or(fixed(*pair.1))).collect();
    let Some(row_shape) = row_shape.filter(|shape| !shape.contains(&0)) else {
        let message = format!("{}, which leaves open how long a row is, and so do these columns", wants(spec));
        return Err(vec![
            Problem::new("wrong-tensor-shape", place, message)
                .help("declare the columns as fixed_size_list, so that every row is as long"),
        ]);
    };
    let of_column = match arrangement {
        Arrangement::Plain => &row_shape[..],
        Arrangement::First => &row_shape[1..],
        Arrangement::Last => &row_shape[..row_shape.len() - 1],
    };
    let each = of_column.iter().product();
    let is_list = |index: usize| matches!(schema.field(index).data_type(), DataType::List(_));
    let columns = columns.into_iter().zip(names).map(|(index, name)| Column {
        index,
        name: name.clone(),
        list_length: if is_list(index) { of_column.first().copied() } else { None },
    });
    Ok(Binding {
        input: spec.name.clone(),
        data_type: spec.data_type,
        columns: columns.collect(),
        layout: if arrangement == Arrangement::Last { Layout::Interleaved } else { Layout::Blocks },
        each,
        row_shape,
    })
}

/// Index and axes of each column.
type Found = (Vec<usize>, Vec<Vec<Dim>>);

/// The columns of an input, if all exist and have values that become elements of it.
fn find(spec: &TensorSpec, names: &[String], schema: &Schema, place: &str) -> Result<Found, Vec<Problem>> {
    let mut problems = Vec::new();
    let (mut indices, mut all_axes) = (Vec::new(), Vec::new());
    for (at, name) in names.iter().enumerate() {
        let place = format!("{place}/{at}");
        let index = match columns::find(schema, name, &place) {
            Ok(index) => index,
            Err(problem) => {
                problems.push(problem);
                continue;
            }
        };
        let (axes, values) = axes(schema.field(index).data_type());
        if !converts(values, spec.data_type) {
            let message = format!("`{}` wants {}; the column `{name}` holds {values}", spec.name, spec.data_type);
            let help = match spec.data_type {
                TensorType::Bytes => "models with byte strings are not supported: export the model with numbers".to_owned(),
                wanted => format!("cast it with `sql` first; what becomes {wanted} by itself loses no more than precision"),
            };
            problems.push(Problem::new("wrong-tensor-type", place, message).help(help));
            continue;
        }
        indices.push(index);
        all_axes.push(axes);
    }
    if problems.is_empty() { Ok((indices, all_axes)) } else { Err(problems) }
}

/// The axes of one row of a column, outermost first, and the type of the values in it. Lists of any length are
/// understood as the outermost axis only.
fn axes(data_type: &DataType) -> (Vec<Dim>, &DataType) {
    let (mut axes, mut values) = (Vec::new(), data_type);
    loop {
        match values {
            DataType::FixedSizeList(item, size) => {
                axes.push(Dim::Fixed(usize::try_from(*size).unwrap_or(0)));
                values = item.data_type();
            }
            DataType::List(item) if axes.is_empty() => {
                axes.push(Dim::Any);
                values = item.data_type();
            }
            _ => return (axes, values),
        }
    }
}

/// The axes that all columns share: those of fixed length count where others leave it open.
fn common_axes(spec: &TensorSpec, names: &[String], all: &[Vec<Dim>], place: &str) -> Result<Vec<Dim>, Vec<Problem>> {
    let Some((first, others)) = all.split_first() else { return Ok(Vec::new()) };
    let mut common = first.clone();
    for (at, axes) in (1..).zip(others) {
        if axes.len() != common.len() || !axes.iter().zip(&common).all(|(a, b)| agree(*a, *b)) {
            let message = format!(
                "the columns of `{}` differ in shape: a row of `{}` is {}, of `{}` {}",
                spec.name,
                names[0],
                shape(&common),
                names[at],
                shape(axes)
            );
            return Err(vec![Problem::new("wrong-tensor-shape", format!("{place}/{at}"), message)]);
        }
        for (common, other) in common.iter_mut().zip(axes) {
            if *common == Dim::Any {
                *common = *other;
            }
        }
    }
    Ok(common)
}

/// The one arrangement that fits the model.
fn arrange(
    spec: &TensorSpec,
    inner: &[Dim],
    axes: &[Dim],
    count: usize,
    stack: Option<Stack>,
    place: &str,
) -> Result<Arrangement, Vec<Problem>> {
    // With one column or with scalars the arrangements differ in shape at most, never in the order of the elements.
    let possible: &[Arrangement] = match (count, axes) {
        (1, _) => &[Arrangement::Plain, Arrangement::First, Arrangement::Last],
        (_, []) => &[Arrangement::Last],
        _ => &[Arrangement::First, Arrangement::Last],
    };
    let fits = |arrangement: &&Arrangement| {
        let given = arrangement.shape(axes, count);
        given.len() == inner.len() && given.iter().zip(inner).all(|(a, b)| agree(*a, *b))
    };
    let choice = count > 1 && !axes.is_empty();
    let fitting: Vec<Arrangement> = possible.iter().filter(fits).copied().collect();
    let chosen: Vec<Arrangement> =
        fitting.iter().copied().filter(|of| !choice || stack.is_none() || of.stack() == stack).collect();
    match chosen.as_slice() {
        [_, _, ..] if choice => {
            let message = format!("{}; these {count} columns fit with `stack: first` and with `stack: last`", wants(spec));
            Err(vec![
                Problem::new("ambiguous-stack", place, message).help(
                    "write `stack: first` if the model's first axis after the batch counts the columns, `stack: last` if its last does",
                ),
            ])
        }
        [arrangement, ..] => Ok(*arrangement),
        [] => {
            let mut message = wants(spec);
            let _ = write!(message, "; {} ", if count == 1 { "this column gives" } else { "these columns give" });
            let shown: Vec<String> = possible
                .iter()
                .filter(
                    |of| if choice { stack.is_none() || of.stack() == stack } else { count > 1 || **of == Arrangement::Plain },
                )
                .map(|of| {
                    let given = [vec![Dim::Any], of.shape(axes, count)].concat();
                    let how = match of {
                        Arrangement::First if choice && stack.is_none() => " with `stack: first`",
                        Arrangement::Last if choice && stack.is_none() => " with `stack: last`",
                        _ => "",
                    };
                    format!("{}{}{how}", spec.data_type, shape(&given))
                })
                .collect();
            message.push_str(&shown.join(" or "));
            let problem = Problem::new("wrong-tensor-shape", place, message);
            Err(vec![match fitting.first().and_then(|of| of.stack()) {
                Some(other) => problem.help(format!("they fit with `stack: {}`", other.name())),
                None => problem.help("name other columns, or cut them to the model's shape with `window` or `sql`"),
            }])
        }
    }
}

/// `window wants FP32[?,100,6]`
fn wants(spec: &TensorSpec) -> String {
    format!("{} wants {}{}", spec.name, spec.data_type, shape(&spec.shape))
}

/// `[?,100,6]`
pub(super) fn shape(dims: &[Dim]) -> String {
    let dims: Vec<String> = dims.iter().map(Dim::to_string).collect();
    format!("[{}]", dims.join(","))
}

/// Whether two extents can be the same.
fn agree(a: Dim, b: Dim) -> bool {
    fixed(a).is_none_or(|extent| b.accepts(extent))
}

/// The extent, if it is fixed.
pub(super) fn fixed(dim: Dim) -> Option<usize> {
    match dim {
        Dim::Fixed(extent) => Some(extent),
        Dim::Any => None,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::datatypes::Field;

    use super::*;

    fn vector(item: DataType, size: i32) -> DataType {
        DataType::FixedSizeList(Arc::new(Field::new("item", item, true)), size)
    }

    fn list(item: DataType) -> DataType {
        DataType::List(Arc::new(Field::new("item", item, true)))
    }

    fn spec(shape: &[usize]) -> TensorSpec {
        // 0 stands for an open extent.
        let shape = shape.iter().map(|&extent| if extent == 0 { Dim::Any } else { Dim::Fixed(extent) }).collect();
        TensorSpec { name: "x".into(), data_type: TensorType::Fp32, shape }
    }

    fn try_bind(shape: &[usize], types: &[DataType], stack: Option<Stack>) -> Result<Binding, Vec<Problem>> {
        let names: Vec<String> = (0..types.len()).map(|column| format!("c{column}")).collect();
        let fields: Vec<Field> = names.iter().zip(types).map(|(name, of)| Field::new(name, of.clone(), true)).collect();
        bind(&spec(shape), &names, stack, &Schema::new(fields))
    }

    fn bound(shape: &[usize], types: &[DataType], stack: Option<Stack>) -> (Vec<usize>, usize, Layout) {
        let binding = try_bind(shape, types, stack).unwrap();
        (binding.row_shape, binding.each, binding.layout)
    }

    fn problem(shape: &[usize], types: &[DataType], stack: Option<Stack>) -> Problem {
        let mut problems = try_bind(shape, types, stack).unwrap_err();
        assert_eq!(problems.len(), 1, "{problems:?}");
        problems.remove(0)
    }

    #[test]
    fn every_shape_that_columns_can_give_is_bound() {
        use DataType::{Float32, Float64, Int64};
        let series = || vector(Float32, 100);
        assert_eq!(bound(&[0], &[Float32], None), (vec![], 1, Layout::Blocks));
        assert_eq!(bound(&[0, 1], &[Int64], None), (vec![1], 1, Layout::Blocks));
        assert_eq!(bound(&[0, 3], &[Float32, Float64, Int64], None), (vec![3], 1, Layout::Interleaved));
        assert_eq!(bound(&[0, 100], &[series()], None), (vec![100], 100, Layout::Blocks));
        assert_eq!(bound(&[0, 100, 1], &[series()], None).0, [100, 1]);
        assert_eq!(bound(&[0, 1, 100], &[series()], Some(Stack::Last)).0, [1, 100]);
        assert_eq!(bound(&[0, 100, 2], &[series(), series()], None), (vec![100, 2], 100, Layout::Interleaved));
        assert_eq!(bound(&[0, 2, 100], &[series(), series()], None), (vec![2, 100], 100, Layout::Blocks));
        assert_eq!(bound(&[0, 100, 6], &[vector(vector(Float32, 6), 100)], None), (vec![100, 6], 600, Layout::Blocks));
        assert_eq!(bound(&[0, 0, 2], &[series(), series()], None), (vec![100, 2], 100, Layout::Interleaved));
        assert_eq!(bound(&[0, 2, 2], &[vector(Float32, 2), vector(Float32, 2)], Some(Stack::First)).2, Layout::Blocks);
    }

    #[test]
    fn lists_are_held_to_the_length_that_the_model_wants() {
        let lists = [list(DataType::Float64), list(DataType::Float64)];
        let binding = try_bind(&[0, 100, 2], &lists, Some(Stack::Last)).unwrap();
        assert_eq!(binding.columns[1].list_length, Some(100));
        assert_eq!(try_bind(&[0, 2, 100], &lists, Some(Stack::First)).unwrap().columns[0].list_length, Some(100));
        let open = problem(&[0, 0], &[list(DataType::Float32)], None);
        assert_eq!(open.message, "x wants FP32[?,?], which leaves open how long a row is, and so do these columns");
        let mixed = [vector(DataType::Float32, 5), list(DataType::Float32)];
        assert_eq!(try_bind(&[0, 0, 2], &mixed, Some(Stack::Last)).unwrap().columns[1].list_length, Some(5));
    }

    #[test]
    fn when_both_ways_of_stacking_fit_it_asks() {
        let square = [vector(DataType::Float32, 2), vector(DataType::Float32, 2)];
        let problem = problem(&[0, 2, 2], &square, None);
        assert_eq!((problem.code, problem.path.as_str()), ("ambiguous-stack", "/inputs/x"));
        assert_eq!(try_bind(&[0, 2, 2], &square, Some(Stack::Last)).unwrap().layout, Layout::Interleaved);
    }

    #[test]
    fn a_wrong_shape_shows_both_sides() {
        let six = vec![vector(DataType::Float32, 100); 6];
        let stacked = problem(&[0, 100, 6], &six, Some(Stack::First));
        assert_eq!(stacked.code, "wrong-tensor-shape");
        assert_eq!(stacked.message, "x wants FP32[?,100,6]; these columns give FP32[?,6,100]");
        assert_eq!(stacked.help.as_deref(), Some("they fit with `stack: last`"));
        let either = problem(&[0, 128, 6], &six, None).message;
        assert_eq!(
            either,
            "x wants FP32[?,128,6]; these columns give FP32[?,6,100] with `stack: first` or FP32[?,100,6] with `stack: last`"
        );
        let scalars = problem(&[0, 9], &vec![DataType::Float32; 8], None).message;
        assert_eq!(scalars, "x wants FP32[?,9]; these columns give FP32[?,8]");
        let one = problem(&[0, 9], &[DataType::Float32], None).message;
        assert_eq!(one, "x wants FP32[?,9]; this column gives FP32[?]");
        let uneven = problem(&[0, 4, 2], &[vector(DataType::Float32, 4), vector(DataType::Float32, 5)], None);
        assert_eq!(uneven.path, "/inputs/x/1");
        assert_eq!(uneven.message, "the columns of `x` differ in shape: a row of `c0` is [4], of `c1` [5]");
    }

    #[test]
    fn names_and_types_are_told_each_at_its_place() {
        let schema = Schema::new(vec![Field::new("ax", DataType::Float32, true), Field::new("site", DataType::Utf8, true)]);
        let names = ["ax", "site", "ayy"].map(str::to_owned);
        let problems = bind(&spec(&[0, 3]), &names, None, &schema).unwrap_err();
        let told: Vec<(&str, &str)> = problems.iter().map(|problem| (problem.code, problem.path.as_str())).collect();
        assert_eq!(told, [("wrong-tensor-type", "/inputs/x/1"), ("unknown-column", "/inputs/x/2")]);
        assert_eq!(problems[0].message, "`x` wants FP32; the column `site` holds Utf8");
        assert!(bind(&spec(&[]), &names, None, &schema).unwrap_err()[0].message.contains("no axis for the rows"));
    }
}
