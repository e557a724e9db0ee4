//! What a model gives, as columns: the values as they are, or the best class of each row with its score. Planned with
//! the rest of `infer` and called for every answer of the model. Invariant: the arrays have exactly the types of the
//! planned fields, one value a row.

use std::collections::BTreeMap;
use std::sync::Arc;

use afferent_engine::component::Problem;
use afferent_engine::{Error, Result};
use afferent_models::{DataType as TensorType, Dim, Signature, Tensor, TensorSpec};
use arrow::array::{
    ArrayRef, ArrowNativeTypeOp, BooleanArray, FixedSizeListArray, Int64Array, ListArray, PrimitiveArray, StringArray,
};
use arrow::buffer::{OffsetBuffer, ScalarBuffer};
use arrow::datatypes::{ArrowPrimitiveType, DataType, Field, FieldRef};

use super::bind::{escaped, fixed, shape};
use super::config::OutputConfig;
use super::element::{arrow_type, with_number};
use super::server::Served;
use crate::columns;

/// One output of the model with the columns that come of it.
#[derive(Debug)]
pub(super) struct OutputPlan {
    /// Its number in the signature.
    position: usize,
    /// `probabilities: FP32[?,7]`
    spec: TensorSpec,
    row: Row,
    /// What becomes a column, in order.
    columns: Vec<Wanted>,
}

/// The values of one row.
#[derive(Debug)]
enum Row {
    /// One value: `[N]` and `[N,1]`.
    Scalar,
    /// So many along each axis.
    Fixed(Vec<usize>),
    /// One axis, as long as each call makes it.
    Open,
}

#[derive(Debug)]
enum Wanted {
    /// The values; the type of the column.
    Values(DataType),
    /// The label of the best class.
    Label(Arc<[String]>),
    /// The number of the best class.
    LabelIndex,
    /// The value of the best class.
    Score,
}

/// A column that the model adds, with its place in the configuration.
#[derive(Debug)]
pub(super) struct Added {
    /// The column.
    pub(super) field: Field,
    /// JSON pointer to where it is named.
    pub(super) place: String,
}

/// Plans the outputs that are configured, all of them as they are if none is. In the order of the signature.
///
/// # Errors
/// Every problem found.
pub(super) fn plan(
    served: &Served,
    outputs: &BTreeMap<String, OutputConfig>,
) -> std::result::Result<(Vec<OutputPlan>, Vec<Added>), Vec<Problem>> {
    let signature = served.model.signature();
    let mut problems = unknown(signature, outputs);
    let (mut plans, mut added) = (Vec::new(), Vec::new());
    for (position, spec) in signature.outputs.iter().enumerate() {
        let as_it_is;
        let wanted = if outputs.is_empty() {
            as_it_is = OutputConfig { column: Some(spec.name.clone()), ..OutputConfig::default() };
            &as_it_is
        } else if let Some(wanted) = outputs.get(&spec.name) {
            wanted
        } else {
            continue;
        };
        match plan_one(position, spec, wanted, served, outputs.is_empty()) {
            Ok((plan, fields)) => {
                plans.push(plan);
                added.extend(fields);
            }
            Err(problem) => problems.push(problem),
        }
    }
    if problems.is_empty() { Ok((plans, added)) } else { Err(problems) }
}

fn unknown(signature: &Signature, outputs: &BTreeMap<String, OutputConfig>) -> Vec<Problem> {
    let missing = outputs.keys().filter(|name| signature.output(name).is_none());
    missing
        .map(|name| {
            let known: Vec<&str> = signature.outputs.iter().map(|spec| spec.name.as_str()).collect();
            Problem::new("unknown-output", format!("/outputs/{}", escaped(name)), format!("the model has no output `{name}`"))
                .help(columns::one_of(name, &known, "outputs"))
        })
        .collect()
}

fn plan_one(
    position: usize,
    spec: &TensorSpec,
    wanted: &OutputConfig,
    served: &Served,
    by_default: bool,
) -> std::result::Result<(OutputPlan, Vec<Added>), Problem> {
    let place = if by_default { "/outputs".to_owned() } else { format!("/outputs/{}", escaped(&spec.name)) };
    let Some(value) = arrow_type(spec.data_type) else {
        return Err(Problem::new(
            "wrong-tensor-type",
            place,
            format!("the output {spec} holds byte strings, which are not supported"),
        )
        .help("name the other outputs under `outputs`, and leave this one out"));
    };
    let Some((_, inner)) = spec.shape.split_first() else {
        let message = format!("the output {spec} has no axis for the rows, or the file does not declare its axes");
        return Err(Problem::new("wrong-tensor-shape", place, message).help("export the model with the axes of its outputs"));
    };
    let extents: Option<Vec<usize>> = inner.iter().map(|dim| fixed(*dim)).collect();
    let row = match (extents, inner) {
        (Some(extents), _) if extents.iter().all(|extent| *extent == 1) && extents.len() < 2 => Row::Scalar,
        (Some(extents), _) if !extents.contains(&0) => Row::Fixed(extents),
        (None, [Dim::Any]) => Row::Open,
        _ => {
            let message = format!("the output {spec} leaves open more than its first two axes, so that no column type holds it");
            return Err(Problem::new("wrong-tensor-shape", place, message).help("export the model with fixed extents"));
        }
    };

    let (mut columns, mut added) = (Vec::new(), Vec::new());
    let mut add = |key: &str, name: &str, data_type: DataType, nullable: bool| {
        let place = if by_default { place.clone() } else { format!("{place}/{key}") };
        added.push(Added { field: Field::new(name, data_type, nullable), place });
    };
    let of_classes = [&wanted.label, &wanted.label_index, &wanted.score].into_iter().any(Option::is_some);
    if of_classes && (inner.len() != 1 || spec.data_type == TensorType::Bool) {
        let message = format!(
            "a best class needs numbers with one axis of classes, {} is {}{}",
            spec.name,
            spec.data_type,
            shape(&spec.shape)
        );
        return Err(Problem::new("wrong-tensor-shape", place, message).help("write `column: NAME` for the values as they are"));
    }
    if let Some(name) = &wanted.label {
        columns.push(Wanted::Label(labels(spec, inner, served, &place)?));
        add("label", name, DataType::Utf8, true);
    }
    if let Some(name) = &wanted.label_index {
        columns.push(Wanted::LabelIndex);
        add("label_index", name, DataType::Int64, true);
    }
    if let Some(name) = &wanted.score {
        columns.push(Wanted::Score);
        add("score", name, value.clone(), true);
    }
    if let Some(name) = &wanted.column {
        let data_type = row.column_type(value);
        columns.push(Wanted::Values(data_type.clone()));
        add("column", name, data_type, false);
    }
    if columns.is_empty() {
        return Err(Problem::new("missing-output", place, format!("nothing is to be made of the output {spec}"))
            .help("write `column: NAME`, or `label: NAME` and `score: NAME`, or leave the output out"));
    }
    Ok((OutputPlan { position, spec: spec.clone(), row, columns }, added))
}

/// The labels of an output, one for each class.
fn labels(spec: &TensorSpec, inner: &[Dim], served: &Served, place: &str) -> std::result::Result<Arc<[String]>, Problem> {
    let place = format!("{place}/label");
    let Some(labels) = served.labels.get(&spec.name) else {
        return Err(Problem::new(
            "missing-labels",
            place,
            format!("the model `{}` has no labels for `{}`", served.name, spec.name),
        )
        .help(
            "put a file with one label a line beside config.pbtxt and name it there as label_filename of the output, \
             or write `label_index: NAME` for the number of the class",
        ));
    };
    match inner.first().copied().and_then(fixed) {
        Some(classes) if classes != labels.len() => {
            let message = format!("`{}` has {classes} classes, the label file has {} labels", spec.name, labels.len());
            Err(Problem::new("missing-labels", place, message)
                .help("give the label file one line for each class, in their order"))
        }
        _ => Ok(Arc::clone(labels)),
    }
}

impl Row {
    fn column_type(&self, value: DataType) -> DataType {
        match self {
            Row::Scalar => value,
            Row::Fixed(extents) => {
                extents.iter().rev().fold(value, |item, extent| DataType::FixedSizeList(items(item), as_size(*extent)))
            }
            Row::Open => DataType::List(items(value)),
        }
    }
}

/// The field of the items in a list.
fn items(data_type: DataType) -> FieldRef {
    Arc::new(Field::new("item", data_type, true))
}

/// Planning keeps extents within what a tensor can hold.
fn as_size(extent: usize) -> i32 {
    i32::try_from(extent).unwrap_or(i32::MAX)
}

impl OutputPlan {
    /// The columns of this output for the first `rows` rows of an answer of the model.
    ///
    /// # Errors
    /// Fatal when the model gives something else than its file says.
    pub(super) fn columns(&self, answer: &[Tensor], rows: usize) -> Result<Vec<ArrayRef>> {
        let Some(tensor) = answer.get(self.position) else {
            return Err(Error::fatal(format!("the model gave {} outputs, `{}` is not among them", answer.len(), self.spec.name)));
        };
        let len = self.row_len(tensor, rows)?;
        let best = self.columns.iter().any(|column| !matches!(column, Wanted::Values(_)));
        let best = if best { best_of(tensor, rows, len)? } else { Vec::new() };
        self.columns
            .iter()
            .map(|column| -> Result<ArrayRef> {
                match column {
                    Wanted::Values(data_type) => listed(values(tensor, rows * len)?, data_type, rows, len),
                    Wanted::Label(labels) => named(&best, labels, &self.spec),
                    Wanted::LabelIndex => Ok(Arc::new(
                        best.iter().map(|class| class.and_then(|class| i64::try_from(class).ok())).collect::<Int64Array>(),
                    )),
                    Wanted::Score => score(tensor, &best, len),
                }
            })
            .collect()
    }

    /// Values of one row, if the tensor has the planned shape.
    fn row_len(&self, tensor: &Tensor, rows: usize) -> Result<usize> {
        let fits = match (&self.row, tensor.shape().split_first()) {
            (_, None) => false,
            (_, Some((batch, _))) if *batch < rows => false,
            (Row::Scalar, Some((_, inner))) => inner.iter().product::<usize>() == 1,
            (Row::Fixed(extents), Some((_, inner))) => inner == extents.as_slice(),
            (Row::Open, Some((_, inner))) => inner.len() == 1,
        };
        if !fits || tensor.data_type() != self.spec.data_type {
            return Err(Error::fatal(format!("the model gave {tensor} for {rows} rows, its file says {}", self.spec)));
        }
        Ok(tensor.shape()[1..].iter().product())
    }
}

/// The first `count` elements of a tensor, without a copy where Arrow has the same layout.
fn values(tensor: &Tensor, count: usize) -> Result<ArrayRef> {
    with_number!(
        tensor.data_type(),
        Number => Ok(Arc::new(PrimitiveArray::<Number>::new(ScalarBuffer::new(tensor.data().clone(), 0, count), None))),
        match tensor.bools() {
            Some(bools) => Ok(Arc::new(bools.take(count).map(Some).collect::<BooleanArray>())),
            None => Err(Error::fatal(format!("{tensor} cannot become a column"))),
        }
    )
}

/// Values in lists as `data_type` has them: `rows` rows of `len` values.
fn listed(values: ArrayRef, data_type: &DataType, rows: usize, len: usize) -> Result<ArrayRef> {
    match data_type {
        DataType::FixedSizeList(item, size) => {
            let values = listed(values, item.data_type(), rows, len)?;
            Ok(Arc::new(FixedSizeListArray::try_new(Arc::clone(item), *size, values, None).map_err(Error::fatal)?))
        }
        DataType::List(item) => {
            let offsets = OffsetBuffer::<i32>::from_lengths(std::iter::repeat_n(len, rows));
            Ok(Arc::new(ListArray::try_new(Arc::clone(item), offsets, values, None).map_err(Error::fatal)?))
        }
        _ => Ok(values),
    }
}

/// For each row the class with the greatest value, the first of equals; none when every value is NaN.
fn best_of(tensor: &Tensor, rows: usize, len: usize) -> Result<Vec<Option<usize>>> {
    with_number!(
        tensor.data_type(),
        Number => Ok(greatest(tensor.data().typed_data::<<Number as ArrowPrimitiveType>::Native>(), rows, len)),
        Err(Error::fatal(format!("{tensor} has no greatest value")))
    )
}

fn greatest<V: ArrowNativeTypeOp>(values: &[V], rows: usize, len: usize) -> Vec<Option<usize>> {
    if len == 0 {
        return vec![None; rows];
    }
    let of_row = |row: &[V]| {
        let mut best: Option<(usize, V)> = None;
        for (class, &value) in row.iter().enumerate() {
            // NaN has no order, not even with itself.
            let is_number = value.partial_cmp(&value).is_some();
            if is_number && best.is_none_or(|(_, best)| value > best) {
                best = Some((class, value));
            }
        }
        best.map(|(class, _)| class)
    };
    values.chunks_exact(len).take(rows).map(of_row).collect()
}

fn named(best: &[Option<usize>], labels: &[String], spec: &TensorSpec) -> Result<ArrayRef> {
    if let Some(class) = best.iter().flatten().find(|class| **class >= labels.len()) {
        return Err(Error::fatal(format!("the best class of {spec} is number {class}, and there are {} labels", labels.len())));
    }
    Ok(Arc::new(best.iter().map(|class| class.map(|class| labels[class].as_str())).collect::<StringArray>()))
}

fn score(tensor: &Tensor, best: &[Option<usize>], len: usize) -> Result<ArrayRef> {
    with_number!(
        tensor.data_type(),
        Number => {
            let values = tensor.data().typed_data::<<Number as ArrowPrimitiveType>::Native>();
            let scores = best.iter().enumerate().map(|(row, class)| class.map(|class| values[row * len + class]));
            Ok(Arc::new(scores.collect::<PrimitiveArray<Number>>()))
        },
        Err(Error::fatal(format!("{tensor} has no score")))
    )
}

#[cfg(test)]
mod tests {
    use afferent_models::{InferenceError, Model};
    use arrow::array::{Array, AsArray};
    use arrow::datatypes::{Float32Type, Int64Type};

    use super::*;

    /// A model that is only looked at.
    struct Silent(Signature);

    impl Model for Silent {
        fn signature(&self) -> &Signature {
            &self.0
        }

        fn run(&self, _: &[(&str, Tensor)]) -> std::result::Result<Vec<Tensor>, InferenceError> {
            Ok(Vec::new())
        }

        fn backend(&self) -> &'static str {
            "none"
        }
    }

    fn served(data_type: TensorType, inner: &[Dim], labels: &[&str]) -> Served {
        let shape = [&[Dim::Any][..], inner].concat();
        let outputs = vec![TensorSpec { name: "y".into(), data_type, shape }];
        let labels: Vec<String> = labels.iter().map(|label| (*label).to_owned()).collect();
        let labels: BTreeMap<String, Arc<[String]>> =
            if labels.is_empty() { BTreeMap::new() } else { BTreeMap::from([("y".to_owned(), labels.into())]) };
        let model = Arc::new(Silent(Signature { inputs: Vec::new(), outputs }));
        Served { name: "m".into(), version: 1, labels: labels.into_iter().collect(), max_batch: None, model }
    }

    fn output(config: &str) -> BTreeMap<String, OutputConfig> {
        BTreeMap::from([("y".to_owned(), serde_json::from_str(config).unwrap())])
    }

    fn columns(served: &Served, config: &str, tensor: Tensor, rows: usize) -> Vec<ArrayRef> {
        let (plans, added) = plan(served, &output(config)).unwrap();
        let columns = plans[0].columns(&[tensor], rows).unwrap();
        assert_eq!(columns.len(), added.len());
        for (column, added) in columns.iter().zip(&added) {
            assert_eq!(column.data_type(), added.field.data_type());
            assert_eq!(column.len(), rows);
        }
        columns
    }

    fn problem(served: &Served, config: &str) -> Problem {
        plan(served, &output(config)).unwrap_err().remove(0)
    }

    #[test]
    fn the_best_class_is_named_and_scored() {
        let served = served(TensorType::Fp32, &[Dim::Fixed(3)], &["a", "b", "c"]);
        let nan = f32::NAN;
        let tensor = Tensor::from_vec(vec![4, 3], vec![0.1, 0.7, 0.2, 0.5, 0.5, 0.0, nan, 0.2, nan, nan, nan, nan]).unwrap();
        let columns = columns(&served, r#"{"label":"class","label_index":"i","score":"p"}"#, tensor, 4);
        let labels: Vec<Option<&str>> = columns[0].as_string::<i32>().iter().collect();
        assert_eq!(labels, [Some("b"), Some("a"), Some("b"), None]);
        let indices: Vec<Option<i64>> = columns[1].as_primitive::<Int64Type>().iter().collect();
        assert_eq!(indices, [Some(1), Some(0), Some(1), None]);
        let scores: Vec<Option<f32>> = columns[2].as_primitive::<Float32Type>().iter().collect();
        assert_eq!(scores, [Some(0.7), Some(0.5), Some(0.2), None]);
    }

    #[test]
    fn values_keep_their_shape() {
        let scalar = served(TensorType::Fp32, &[Dim::Fixed(1)], &[]);
        let one = columns(&scalar, r#"{"column":"v"}"#, Tensor::from_vec(vec![3, 1], vec![1_f32, 2., 3.]).unwrap(), 2);
        assert_eq!(one[0].as_primitive::<Float32Type>().values(), &[1., 2.]);
        let nested = served(TensorType::Int64, &[Dim::Fixed(2), Dim::Fixed(3)], &[]);
        let many = columns(&nested, r#"{"column":"v"}"#, Tensor::from_vec(vec![2, 2, 3], (0..12_i64).collect()).unwrap(), 2);
        let second = many[0].as_fixed_size_list().value(1);
        let last = second.as_fixed_size_list().value(1);
        assert_eq!(last.as_primitive::<Int64Type>().values(), &[9, 10, 11]);
        let open = served(TensorType::Fp32, &[Dim::Any], &[]);
        let listed = columns(&open, r#"{"column":"v"}"#, Tensor::from_vec(vec![2, 2], vec![1_f32, 2., 3., 4.]).unwrap(), 2);
        assert_eq!(listed[0].as_list::<i32>().value(1).as_primitive::<Float32Type>().values(), &[3., 4.]);
        let flags = served(TensorType::Bool, &[], &[]);
        let flags = columns(&flags, r#"{"column":"v"}"#, Tensor::from_bools(vec![2], [true, false]).unwrap(), 2);
        assert!(flags[0].as_boolean().value(0));
    }

    #[test]
    fn what_cannot_be_is_told_at_planning() {
        let plain = served(TensorType::Fp32, &[Dim::Fixed(3)], &[]);
        let unlabelled = problem(&plain, r#"{"label":"class"}"#);
        assert_eq!((unlabelled.code, unlabelled.path.as_str()), ("missing-labels", "/outputs/y/label"));
        assert!(unlabelled.help.unwrap().contains("label_filename"));
        let few = problem(&served(TensorType::Fp32, &[Dim::Fixed(3)], &["a", "b"]), r#"{"label":"class"}"#);
        assert_eq!(few.message, "`y` has 3 classes, the label file has 2 labels");
        assert_eq!(problem(&served(TensorType::Fp32, &[], &[]), r#"{"score":"p"}"#).code, "wrong-tensor-shape");
        assert_eq!(problem(&served(TensorType::Bytes, &[], &[]), r#"{"column":"v"}"#).code, "wrong-tensor-type");
        assert_eq!(
            problem(&served(TensorType::Fp32, &[Dim::Any, Dim::Any], &[]), r#"{"column":"v"}"#).code,
            "wrong-tensor-shape"
        );
        assert_eq!(problem(&plain, "{}").code, "missing-output");
        let other = BTreeMap::from([("yy".to_owned(), OutputConfig::default())]);
        assert_eq!(plan(&plain, &other).unwrap_err()[0].code, "unknown-output");
        let all = plan(&plain, &BTreeMap::new()).unwrap().1;
        assert_eq!(all[0].field.name(), "y");
    }

    #[test]
    fn an_answer_of_another_shape_is_not_taken() {
        let served = served(TensorType::Fp32, &[Dim::Fixed(3)], &[]);
        let (plans, _) = plan(&served, &BTreeMap::new()).unwrap();
        let short = Tensor::from_vec(vec![2, 2], vec![0_f32; 4]).unwrap();
        let error = plans[0].columns(&[short], 2).unwrap_err();
        assert_eq!(error.to_string(), "the model gave FP32[2,2] for 2 rows, its file says y: FP32[?,3]");
    }
}
