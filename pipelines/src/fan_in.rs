//! Several inputs of an operator that takes one stream: they must have the same columns, and are one input to it.
//! The planner asks for every operator that does not name its inputs itself. The invariant: whatever input a
//! batch comes from, the operator sees it under the one schema that it was planned with.

use std::pin::Pin;
use std::sync::Arc;

use afferent_engine::component::{BuildContext, Input, OperatorBuild};
use afferent_engine::{AsyncOperator, Batch, Error, Operator, Outputs, Result, State, StateDelta};
use arrow::array::{RecordBatch, RecordBatchOptions};
use arrow::datatypes::{Field, Schema, SchemaRef};

use crate::types;

/// Why inputs are not one stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Difference {
    /// Number of the first input that is other than input 0.
    pub input: usize,
    /// The first column in which it is, in words.
    pub what: String,
}

/// The one input that several make, under the name of the first; a column may be null where it may be in one of
/// them. None of none.
pub(crate) fn one_stream(inputs: &[Input]) -> std::result::Result<Option<Input>, Difference> {
    let Some((first, others)) = inputs.split_first() else { return Ok(None) };
    let mut fields: Vec<Field> = first.schema.fields().iter().map(|field| field.as_ref().clone()).collect();
    for (number, other) in (1..).zip(others) {
        if let Some(what) = difference(first, other) {
            return Err(Difference { input: number, what });
        }
        for (field, another) in fields.iter_mut().zip(other.schema.fields()) {
            field.set_nullable(field.is_nullable() || another.is_nullable());
        }
    }
    let alike = others.iter().all(|other| other.schema.fields() == first.schema.fields());
    let schema = if alike { SchemaRef::clone(&first.schema) } else { Arc::new(Schema::new(fields)) };
    Ok(Some(Input { name: first.name.clone(), schema }))
}

/// The first column in which two inputs differ by name or type.
fn difference(one: &Input, other: &Input) -> Option<String> {
    let (left, right) = (one.schema.fields(), other.schema.fields());
    for (number, (a, b)) in (1..).zip(left.iter().zip(right)) {
        if a.name() != b.name() {
            return Some(format!("column {number} is `{}` in `{}` and `{}` in `{}`", a.name(), one.name, b.name(), other.name));
        }
        if a.data_type() != b.data_type() {
            let (mut a_type, mut b_type) = (types::name(a.data_type()), types::name(b.data_type()));
            if a_type == b_type {
                // They differ in what no declaration says, such as the name of a list's items.
                (a_type, b_type) = (a.data_type().to_string(), b.data_type().to_string());
            }
            return Some(format!("the column `{}` is {a_type} in `{}` and {b_type} in `{}`", a.name(), one.name, other.name));
        }
    }
    let only = |column: &Field, here: &Input, there: &Input| {
        format!("`{}` has the column `{}`, and `{}` has not", here.name, column.name(), there.name)
    };
    match (left.get(right.len()), right.get(left.len())) {
        (Some(column), _) => Some(only(column, one, other)),
        (None, Some(column)) => Some(only(column, other, one)),
        (None, None) => None,
    }
}

/// The operator behind `build`, to which batches of all `inputs` come under `schema`.
pub(crate) fn under(schema: &SchemaRef, inputs: &[Input], build: OperatorBuild) -> OperatorBuild {
    if inputs.iter().all(|input| input.schema.fields() == schema.fields()) {
        return build;
    }
    let schema = SchemaRef::clone(schema);
    match build {
        OperatorBuild::Compute { build, stateful, heavy } => {
            let build = move |context: &BuildContext| -> Result<Box<dyn Operator>> {
                Ok(Box::new(Under { schema: SchemaRef::clone(&schema), operator: build(context)? }))
            };
            OperatorBuild::Compute { build: Arc::new(build), stateful, heavy }
        }
        OperatorBuild::Async(build) => {
            let build = move |context: &BuildContext| -> Result<Arc<dyn AsyncOperator>> {
                Ok(Arc::new(Under { schema: SchemaRef::clone(&schema), operator: build(context)? }))
            };
            OperatorBuild::Async(Arc::new(build))
        }
    }
}

/// An operator behind inputs that differ in what may be null.
struct Under<O> {
    schema: SchemaRef,
    operator: O,
}

impl<O> Under<O> {
    fn put(&self, batch: &Batch) -> Result<Batch> {
        let records = batch.records();
        let options = RecordBatchOptions::new().with_row_count(Some(records.num_rows()));
        let columns = records.columns().to_vec();
        let records = RecordBatch::try_new_with_options(SchemaRef::clone(&self.schema), columns, &options);
        Ok(batch.derive(records.map_err(Error::fatal)?))
    }
}

impl Operator for Under<Box<dyn Operator>> {
    fn process(&mut self, _: usize, batch: Batch, outputs: &mut Outputs) -> Result<()> {
        let batch = self.put(&batch)?;
        self.operator.process(0, batch, outputs)
    }

    fn finish(&mut self, outputs: &mut Outputs) -> Result<()> {
        self.operator.finish(outputs)
    }

    fn snapshot(&mut self) -> Result<StateDelta> {
        self.operator.snapshot()
    }

    fn restore(&mut self, state: State) -> Result<()> {
        self.operator.restore(state)
    }
}

impl AsyncOperator for Under<Arc<dyn AsyncOperator>> {
    fn call(&self, batch: Batch) -> Pin<Box<dyn Future<Output = Result<Outputs>> + Send>> {
        match self.put(&batch) {
            Ok(batch) => self.operator.call(batch),
            Err(error) => Box::pin(async move { Err(error) }),
        }
    }

    fn concurrency(&self) -> usize {
        self.operator.concurrency()
    }
}

#[cfg(test)]
mod tests {
    use afferent_engine::metrics::Metrics;
    use arrow::array::{ArrayRef, Int64Array};
    use arrow::datatypes::DataType;

    use super::*;

    fn input(name: &str, columns: &[(&str, DataType, bool)]) -> Input {
        let fields: Vec<Field> = columns.iter().map(|(name, of, nullable)| Field::new(*name, of.clone(), *nullable)).collect();
        Input { name: name.to_owned(), schema: Arc::new(Schema::new(fields)) }
    }

    #[test]
    fn the_same_columns_are_one_stream() {
        assert!(one_stream(&[]).unwrap().is_none());
        let a = input("a", &[("n", DataType::Int64, false)]);
        let same = input("same", &[("n", DataType::Int64, false)]);
        let stream = one_stream(&[a.clone(), same]).unwrap().unwrap();
        assert_eq!((stream.name.as_str(), stream.schema), ("a", a.schema));
    }

    #[test]
    fn the_first_column_that_differs_is_told() {
        let whole = input("a", &[("n", DataType::Int64, true), ("v", DataType::Float64, true)]);
        for (columns, what) in [
            (vec![("m", DataType::Int64, true), ("w", DataType::Utf8, true)], "column 1 is `n` in `a` and `m` in `b`"),
            (
                vec![("n", DataType::Int64, true), ("v", DataType::Float32, true)],
                "the column `v` is float64 in `a` and float32 in `b`",
            ),
            (vec![("n", DataType::Int64, true)], "`a` has the column `v`, and `b` has not"),
            (
                vec![("n", DataType::Int64, true), ("v", DataType::Float64, true), ("x", DataType::Utf8, true)],
                "`b` has the column `x`, and `a` has not",
            ),
        ] {
            let found = one_stream(&[whole.clone(), whole.clone(), input("b", &columns)]).unwrap_err();
            assert_eq!((found.input, found.what.as_str()), (2, what));
        }
        let items = |name: &str| DataType::List(Arc::new(Field::new(name, DataType::Int8, true)));
        let (one, other) = (input("a", &[("l", items("item"), true)]), input("b", &[("l", items("element"), true)]));
        assert!(one_stream(&[one, other]).unwrap_err().what.contains("element"));
    }

    /// Hands batches on as they come.
    struct Same;

    impl Operator for Same {
        fn process(&mut self, input: usize, batch: Batch, outputs: &mut Outputs) -> Result<()> {
            assert_eq!(input, 0);
            outputs.emit(batch);
            Ok(())
        }
    }

    #[test]
    fn a_column_may_be_null_where_one_input_allows_it_and_every_batch_says_so() {
        let inputs = [input("a", &[("n", DataType::Int64, false)]), input("b", &[("n", DataType::Int64, true)])];
        let stream = one_stream(&inputs).unwrap().unwrap();
        assert!(stream.schema.field(0).is_nullable());
        let build: afferent_engine::component::Build<Box<dyn Operator>> =
            Arc::new(|_| -> Result<Box<dyn Operator>> { Ok(Box::new(Same)) });
        let build = under(&stream.schema, &inputs, OperatorBuild::Compute { build, stateful: true, heavy: false });
        let OperatorBuild::Compute { build, stateful: true, heavy: false } = build else { panic!("another kind") };
        let context = BuildContext {
            pipeline: "p".into(),
            stage: "s".into(),
            data_dir: std::path::PathBuf::new(),
            run: 1,
            metrics: Metrics::new().unwrap().stage("p", "s"),
        };
        let mut operator = build(&context).unwrap();
        let mut outputs = Outputs::new();
        for (number, input) in inputs.iter().enumerate() {
            let column: ArrayRef = Arc::new(Int64Array::from(vec![7]));
            let records = RecordBatch::try_new(SchemaRef::clone(&input.schema), vec![column]).unwrap();
            operator.process(number, Batch::new(records), &mut outputs).unwrap();
        }
        assert_eq!(outputs.batches().len(), 2);
        assert!(outputs.batches().iter().all(|(_, batch)| batch.schema() == stream.schema));
    }
}
