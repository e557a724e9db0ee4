//! The running `infer` operator: rows that the model cannot take leave as rejects, the others go through it in calls
//! of the size it likes, and its answers become columns beside the kept ones. Holds no state, so that several
//! instances may share one model.

use std::ops::Range;
use std::sync::Arc;

use afferent_engine::batch::Batch;
use afferent_engine::operator::{Operator, Outputs};
use afferent_engine::{Error, Rejected, Result};
use afferent_models::{InferenceError, Tensor};
use arrow::array::{Array, ArrayRef, BooleanArray, Int64Array, RecordBatch, RecordBatchOptions};
use arrow::buffer::{Buffer, MutableBuffer};
use arrow::compute::{concat, filter_record_batch};
use arrow::datatypes::SchemaRef;

use super::bind::Binding;
use super::config::NanPolicy;
use super::gather::{Gathered, Unfit};
use super::outputs::OutputPlan;
use super::server::Served;

/// What planning found out.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) served: Arc<Served>,
    /// One for each input of the model.
    pub(super) bindings: Vec<Binding>,
    pub(super) outputs: Vec<OutputPlan>,
    /// Indices of the input columns that are kept.
    pub(super) kept: Vec<usize>,
    pub(super) calls: Calls,
    pub(super) nan: NanPolicy,
    /// Whether the last column is the version of the model.
    pub(super) with_version: bool,
    /// What leaves.
    pub(super) schema: SchemaRef,
}

/// Rows that a call of the model holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Calls {
    /// Any number up to this.
    UpTo(usize),
    /// This many; a shorter rest is filled up with zeros, whose answers are dropped.
    Exactly(usize),
}

impl Calls {
    fn rows(self) -> usize {
        match self {
            Calls::UpTo(rows) | Calls::Exactly(rows) => rows,
        }
    }
}

/// What the model said so far, in the order of the rows.
#[derive(Default)]
struct Answers {
    /// For each call the columns of all outputs.
    parts: Vec<Vec<ArrayRef>>,
    /// Rows on which the model fails, with what it said.
    failed: Vec<(usize, String)>,
}

/// The operator.
pub(super) struct Infer {
    plan: Arc<Plan>,
}

impl Operator for Infer {
    fn process(&mut self, _input: usize, batch: Batch, outputs: &mut Outputs) -> Result<()> {
        let mut records = batch.records().clone();
        let tensors = loop {
            if records.num_rows() == 0 {
                return Ok(());
            }
            match self.gather(&records)? {
                Ok(tensors) => break tensors,
                Err(unfit) => {
                    outputs.reject(Rejected::rows(&records, unfit.rows.iter().copied(), unfit.code, &unfit.reason));
                    records = without(&records, &unfit.rows)?;
                }
            }
        };
        let mut answers = Answers::default();
        let rows = records.num_rows();
        for start in (0..rows).step_by(self.plan.calls.rows()) {
            self.score(&tensors, start..rows.min(start + self.plan.calls.rows()), &mut answers)?;
        }
        if !answers.failed.is_empty() {
            for (row, reason) in &answers.failed {
                outputs.reject(Rejected::rows(&records, [*row], "not_scored", reason));
            }
            let failed: Vec<usize> = answers.failed.iter().map(|(row, _)| *row).collect();
            records = without(&records, &failed)?;
        }
        if records.num_rows() > 0 {
            outputs.emit(batch.derive(self.assemble(&records, &answers.parts)?));
        }
        Ok(())
    }
}

impl Infer {
    /// An operator of this plan.
    pub(super) fn new(plan: Arc<Plan>) -> Self {
        Self { plan }
    }

    /// The elements of every input, for all rows; or rows that have to go first.
    fn gather(&self, records: &RecordBatch) -> Result<std::result::Result<Vec<Buffer>, Unfit>> {
        let mut inputs = Vec::with_capacity(self.plan.bindings.len());
        for binding in &self.plan.bindings {
            match binding.gather(records, self.plan.nan)? {
                Gathered::Elements(elements) => inputs.push(elements),
                Gathered::Unfit(unfit) => return Ok(Err(unfit)),
            }
        }
        Ok(Ok(inputs))
    }

    /// One call of the model. If it fails on these rows and not on zeros, then a row is at fault: the half without it
    /// passes, and the row is found by halving.
    fn score(&self, inputs: &[Buffer], rows: Range<usize>, answers: &mut Answers) -> Result<()> {
        match self.call(inputs, rows.clone())? {
            Ok(columns) => {
                answers.parts.push(columns);
                Ok(())
            }
            Err(error) if self.call(&self.zeros(), 0..1)?.is_err() => Err(self.fatal(error)),
            Err(error) => self.halve(inputs, rows, error, answers),
        }
    }

    fn halve(&self, inputs: &[Buffer], rows: Range<usize>, error: InferenceError, answers: &mut Answers) -> Result<()> {
        if rows.len() == 1 {
            answers.failed.push((rows.start, format!("the model `{}`: {error}", self.plan.served.name)));
            return Ok(());
        }
        let middle = rows.start + rows.len() / 2;
        for half in [rows.start..middle, middle..rows.end] {
            match self.call(inputs, half.clone())? {
                Ok(columns) => answers.parts.push(columns),
                Err(error) => self.halve(inputs, half, error, answers)?,
            }
        }
        Ok(())
    }

    /// One row of zeros for every input.
    fn zeros(&self) -> Vec<Buffer> {
        self.plan.bindings.iter().map(|binding| MutableBuffer::from_len_zeroed(row_bytes(binding)).into()).collect()
    }

    /// The columns of all outputs for these rows, or why the backend did not run.
    fn call(&self, inputs: &[Buffer], rows: Range<usize>) -> Result<std::result::Result<Vec<ArrayRef>, InferenceError>> {
        let batch = match self.plan.calls {
            Calls::UpTo(_) => rows.len(),
            Calls::Exactly(batch) => batch,
        };
        let tensors = self.plan.bindings.iter().zip(inputs).map(|(binding, elements)| {
            let row = row_bytes(binding);
            let mut data = elements.slice_with_length(rows.start * row, rows.len() * row);
            if batch > rows.len() {
                let mut padded = MutableBuffer::from_len_zeroed(batch * row);
                padded.as_slice_mut()[..data.len()].copy_from_slice(&data);
                data = padded.into();
            }
            let shape = [&[batch][..], &binding.row_shape].concat();
            Tensor::from_buffer(binding.data_type, shape, data)
                .map(|tensor| (binding.input.as_str(), tensor))
                .map_err(Error::fatal)
        });
        let tensors: Vec<(&str, Tensor)> = tensors.collect::<Result<_>>()?;
        let answer = match self.plan.served.model.run(&tensors) {
            Ok(answer) => answer,
            Err(error @ InferenceError::Backend { .. }) => return Ok(Err(error)),
            Err(error) => return Err(self.fatal(error)),
        };
        let mut columns = Vec::new();
        for output in &self.plan.outputs {
            columns.extend(output.columns(&answer, rows.len())?);
        }
        Ok(Ok(columns))
    }

    fn fatal(&self, error: InferenceError) -> Error {
        Error::fatal(error)
            .context(format!("running version {} of the model `{}`", self.plan.served.version, self.plan.served.name))
    }

    /// The rows that leave: kept columns, what the model said, its version.
    fn assemble(&self, records: &RecordBatch, parts: &[Vec<ArrayRef>]) -> Result<RecordBatch> {
        let mut columns: Vec<ArrayRef> = self.plan.kept.iter().map(|index| records.column(*index).clone()).collect();
        if let [only] = parts {
            columns.extend(only.iter().cloned());
        } else if let Some(first) = parts.first() {
            for column in 0..first.len() {
                let arrays: Vec<&dyn Array> = parts.iter().map(|part| part[column].as_ref()).collect();
                columns.push(concat(&arrays).map_err(Error::fatal)?);
            }
        }
        if self.plan.with_version {
            let version = i64::try_from(self.plan.served.version).unwrap_or(i64::MAX);
            columns.push(Arc::new(Int64Array::from(vec![version; records.num_rows()])));
        }
        let options = RecordBatchOptions::new().with_row_count(Some(records.num_rows()));
        RecordBatch::try_new_with_options(Arc::clone(&self.plan.schema), columns, &options).map_err(Error::fatal)
    }
}

/// Bytes of one row of an input.
fn row_bytes(binding: &Binding) -> usize {
    binding.row_len() * binding.data_type.size().unwrap_or(0)
}

/// The batch without these rows, which are in order.
fn without(records: &RecordBatch, rows: &[usize]) -> Result<RecordBatch> {
    let mut keep = vec![true; records.num_rows()];
    for row in rows {
        keep[*row] = false;
    }
    filter_record_batch(records, &BooleanArray::from(keep)).map_err(Error::fatal)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use afferent_engine::component::{BuildContext, Input, OperatorBuild, OperatorConfig, OperatorPlan, PlanContext, Problem};
    use afferent_models::{LazyRuntime, Repository, Runtime};
    use arrow::array::{AsArray, FixedSizeListArray, Float32Array, Int32Array, StringArray};
    use arrow::datatypes::{DataType, Float32Type, Int64Type, Schema};

    use super::super::{InferConfig, ModelServer};
    use super::*;
    use crate::testing::{build, rows};

    const WINDOW: &str = r#""inputs":{"window":["ax","ay","az","wx","wy","wz"]}"#;

    fn context() -> PlanContext {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
        let examples = |folder: &str| root.join(folder).join("models");
        let repository = Repository::new(vec![examples("exercise-watch"), examples("shuttle-anomaly")]);
        let mut context = PlanContext::default();
        context.provide(Arc::new(ModelServer::new(repository, LazyRuntime::ready(Runtime::tract()))));
        context
    }

    fn plan(text: &str, schema: &SchemaRef) -> std::result::Result<OperatorPlan, Vec<Problem>> {
        let config: InferConfig = serde_json::from_str(text).unwrap();
        config.plan(&[Input { name: "frames".into(), schema: Arc::clone(schema) }], &context())
    }

    fn problems(text: &str, schema: &Schema) -> Vec<(&'static str, String, String)> {
        let found = plan(text, &Arc::new(schema.clone())).err().unwrap();
        found.into_iter().map(|problem| (problem.code, problem.path, problem.message)).collect()
    }

    fn run(text: &str, records: &RecordBatch) -> Outputs {
        let plan = plan(text, &records.schema()).unwrap();
        let mut outputs = Outputs::new();
        build(&plan).0.process(0, Batch::new(records.clone()), &mut outputs).unwrap();
        if let Some(left) = rows(&outputs, 0) {
            assert_eq!(left.schema(), plan.outputs[0].schema);
        }
        outputs
    }

    /// Any numbers that differ from row to row, from axis to axis and over time.
    fn sample(row: usize, axis: usize, time: usize) -> f32 {
        ((row * 31 + axis * 7 + time * 3) % 23) as f32 / 11.5 - 1.0
    }

    fn windows(count: usize) -> RecordBatch {
        let device: ArrayRef = Arc::new(StringArray::from_iter_values((0..count).map(|row| format!("watch-{row}"))));
        let axes = ["ax", "ay", "az", "wx", "wy", "wz"].into_iter().enumerate().map(|(axis, name)| {
            let series = (0..count).map(|row| Some((0..100).map(move |time| Some(sample(row, axis, time)))));
            (name, Arc::new(FixedSizeListArray::from_iter_primitive::<Float32Type, _, _>(series, 100)) as ArrayRef)
        });
        RecordBatch::try_from_iter(std::iter::once(("device", device)).chain(axes)).unwrap()
    }

    #[test]
    fn the_example_scores_windows_as_the_model_itself_does() {
        let records = windows(3);
        let text = format!(
            r#"{{"model":"exercise",{WINDOW},"stack":"last","outputs":{{"probabilities":{{"label":"exercise","score":"p"}}}}}}"#
        );
        let left = rows(&run(&text, &records), 0).unwrap();
        let names: Vec<String> = left.schema().fields().iter().map(|field| field.name().clone()).collect();
        assert_eq!(names, ["device", "exercise", "p"]);

        let served = context().service::<ModelServer>().unwrap().load("exercise", None).unwrap();
        let window = |row: usize| (0..100).flat_map(move |time| (0..6).map(move |axis| sample(row, axis, time)));
        let tensor = Tensor::from_vec(vec![3, 100, 6], (0..3).flat_map(window).collect::<Vec<f32>>()).unwrap();
        let answer = served.model.run(&[("window", tensor)]).unwrap();
        for (row, probabilities) in answer[0].as_f32().unwrap().chunks(7).enumerate() {
            let best = (0..7).max_by(|a, b| probabilities[*a].total_cmp(&probabilities[*b])).unwrap();
            assert_eq!(left.column(1).as_string::<i32>().value(row), served.labels["probabilities"][best]);
            assert!((left.column(2).as_primitive::<Float32Type>().value(row) - probabilities[best]).abs() < 1e-5);
        }
    }

    #[test]
    fn many_small_calls_give_what_one_gives() {
        let records = windows(7);
        let at_once = rows(&run(&format!(r#"{{"model":"exercise",{WINDOW}}}"#), &records), 0).unwrap();
        let in_twos = rows(
            &run(&format!(r#"{{"model":"exercise",{WINDOW},"max_batch":2,"version_column":"v","keep":["ax"]}}"#), &records),
            0,
        )
        .unwrap();
        assert_eq!(in_twos.schema().field(1).data_type(), at_once.schema().field(1).data_type());
        let flat = |column: &ArrayRef| column.as_fixed_size_list().values().as_primitive::<Float32Type>().values().to_vec();
        for (a, b) in flat(at_once.column(1)).iter().zip(flat(in_twos.column(1))) {
            assert!((a - b).abs() < 1e-5);
        }
        assert_eq!(in_twos.column(0), records.column(1));
        assert_eq!(in_twos.column(2).as_primitive::<Int64Type>().values(), &[1; 7]);
    }

    fn readings() -> RecordBatch {
        let column = |at: usize| {
            let values = (0..5).map(|row| Some((row * 3 + at as i32) * 5)).collect::<Int32Array>();
            (format!("r{at}"), Arc::new(values) as ArrayRef)
        };
        RecordBatch::try_from_iter((0..8).map(column).chain([("r8".to_owned(), last_reading())])).unwrap()
    }

    fn last_reading() -> ArrayRef {
        Arc::new(Float32Array::from(vec![Some(1.), None, Some(f32::NAN), Some(4.), Some(f32::INFINITY)]))
    }

    const READINGS: &str = r#""inputs":{"readings":["r0","r1","r2","r3","r4","r5","r6","r7","r8"]}"#;

    #[test]
    fn rows_that_the_model_cannot_take_leave_as_rejects_and_the_rest_is_scored() {
        let outputs =
            run(&format!(r#"{{"model":"shuttle",{READINGS},"outputs":{{"score":{{"column":"error"}}}}}}"#), &readings());
        let codes: Vec<&str> = outputs.rejected().iter().map(|rejected| rejected.code).collect();
        assert_eq!(codes, ["null_input", "nan_input", "nan_input"]);
        let left = rows(&outputs, 0).unwrap();
        assert_eq!((left.num_rows(), left.num_columns()), (2, 10));
        let alone = rows(&run(&format!(r#"{{"model":"shuttle",{READINGS}}}"#), &readings().slice(3, 1)), 0).unwrap();
        let scores = left.column(9).as_primitive::<Float32Type>();
        let score = alone.column(9).as_primitive::<Float32Type>().value(0);
        assert!((scores.value(1) - score).abs() <= 1e-5 * score.abs(), "{scores:?} {score}");
        assert!(scores.value(0) != scores.value(1));

        let zeroed = run(&format!(r#"{{"model":"shuttle",{READINGS},"nan":"zero"}}"#), &readings());
        assert_eq!((zeroed.rejected().len(), rows(&zeroed, 0).unwrap().num_rows()), (1, 4));
    }

    #[test]
    fn what_does_not_fit_the_model_is_told_at_planning() {
        let schema = windows(1).schema();
        let told = |text: &str| problems(text, &schema);
        let stacked = told(&format!(r#"{{"model":"exercise",{WINDOW},"stack":"first"}}"#));
        let message = "window wants FP32[?,100,6]; these columns give FP32[?,6,100]".to_owned();
        assert_eq!(stacked, [("wrong-tensor-shape", "/inputs/window".to_owned(), message)]);
        let several =
            told(r#"{"model":"exercise","inputs":{"windw":["ax"]},"outputs":{"p":{"column":"x"}},"keep":["device","dvice"]}"#);
        let codes: Vec<(&str, &str)> = several.iter().map(|(code, path, _)| (*code, path.as_str())).collect();
        let expected = [
            ("unknown-input", "/inputs/windw"),
            ("missing-input", "/inputs"),
            ("unknown-output", "/outputs/p"),
            ("unknown-column", "/keep/1"),
        ];
        assert_eq!(codes, expected);
        assert_eq!(told(r#"{"model":"exercice","inputs":{}}"#)[0].0, "missing-model");
        let clash =
            format!(r#"{{"model":"exercise",{WINDOW},"outputs":{{"probabilities":{{"label":"device","score":"device"}}}}}}"#);
        let places: Vec<String> = told(&clash).into_iter().map(|(_, path, _)| path).collect();
        assert_eq!(places, ["/outputs/probabilities/label", "/outputs/probabilities/score"]);
        let config: InferConfig = serde_json::from_str(r#"{"model":"exercise","inputs":{}}"#).unwrap();
        let without_server = config.plan(&[Input { name: "i".into(), schema }], &PlanContext::default()).err().unwrap();
        assert_eq!(without_server[0].code, "missing-model");
    }

    /// A model that fails on calls with a negative number among them, or on all.
    struct Fragile {
        signature: afferent_models::Signature,
        broken: bool,
        calls: Mutex<Vec<usize>>,
    }

    impl afferent_models::Model for Fragile {
        fn signature(&self) -> &afferent_models::Signature {
            &self.signature
        }

        fn run(&self, inputs: &[(&str, Tensor)]) -> std::result::Result<Vec<Tensor>, InferenceError> {
            let input = &inputs[0].1;
            self.calls.lock().unwrap().push(input.len());
            let values = input.as_f32().unwrap();
            if self.broken || values.iter().any(|value| *value < 0.0) {
                return Err(InferenceError::Backend { backend: "none", message: "out of range".into() });
            }
            Ok(vec![Tensor::from_vec(vec![input.len()], values.iter().map(|value| value * 2.0).collect()).unwrap()])
        }

        fn backend(&self) -> &'static str {
            "none"
        }
    }

    fn fragile(broken: bool, calls: Calls) -> (Infer, Arc<Fragile>, SchemaRef) {
        use afferent_models::{DataType as TensorType, Dim, Signature, TensorSpec};
        let spec = |name: &str| TensorSpec { name: name.into(), data_type: TensorType::Fp32, shape: vec![Dim::Any] };
        let signature = Signature { inputs: vec![spec("x")], outputs: vec![spec("y")] };
        let model = Arc::new(Fragile { signature, broken, calls: Mutex::default() });
        let served =
            Served { name: "fragile".into(), version: 1, labels: Default::default(), max_batch: None, model: model.clone() };
        let input = Arc::new(Schema::new(vec![arrow::datatypes::Field::new("a", DataType::Float32, true)]));
        let binding = super::super::bind::bind(&spec("x"), &["a".to_owned()], None, &input).unwrap();
        let (outputs, added) = super::super::outputs::plan(&served, &Default::default()).unwrap();
        let schema: SchemaRef = Arc::new(Schema::new(added.into_iter().map(|added| added.field).collect::<Vec<_>>()));
        let plan = Plan {
            served: Arc::new(served),
            bindings: vec![binding],
            outputs,
            kept: Vec::new(),
            calls,
            nan: NanPolicy::Reject,
            with_version: false,
            schema,
        };
        (Infer::new(Arc::new(plan)), model, input)
    }

    #[test]
    fn a_row_on_which_the_model_fails_is_found_and_rejected() {
        let (mut infer, _, schema) = fragile(false, Calls::UpTo(5));
        let values = Float32Array::from(vec![1., 2., -3., 4., 5., 6., 7., -8., 9.]);
        let records = RecordBatch::try_new(schema, vec![Arc::new(values)]).unwrap();
        let mut outputs = Outputs::new();
        infer.process(0, Batch::new(records), &mut outputs).unwrap();
        let left = rows(&outputs, 0).unwrap();
        assert_eq!(left.column(0).as_primitive::<Float32Type>().values(), &[2., 4., 8., 10., 12., 14., 18.]);
        assert_eq!(outputs.rejected().len(), 2);
        assert_eq!(outputs.rejected()[0].code, "not_scored");
        assert_eq!(outputs.rejected()[0].reason, "the model `fragile`: none failed: out of range");
    }

    #[test]
    fn a_model_that_does_not_run_at_all_is_no_fault_of_the_rows() {
        let (mut infer, model, schema) = fragile(true, Calls::UpTo(5));
        let records = RecordBatch::try_new(schema, vec![Arc::new(Float32Array::from(vec![1., 2.]))]).unwrap();
        let mut outputs = Outputs::new();
        let error = infer.process(0, Batch::new(records), &mut outputs).unwrap_err();
        assert_eq!(error.class(), afferent_engine::Class::Fatal);
        assert_eq!(error.to_string(), "running version 1 of the model `fragile`: none failed: out of range");
        assert_eq!(*model.calls.lock().unwrap(), [2, 1]);
    }

    #[test]
    fn a_model_with_a_batch_of_its_own_is_called_with_that() {
        let (mut infer, model, schema) = fragile(false, Calls::Exactly(4));
        let records = RecordBatch::try_new(schema, vec![Arc::new(Float32Array::from(vec![1., 2., 3., 4., 5., 6.]))]).unwrap();
        let mut outputs = Outputs::new();
        infer.process(0, Batch::new(records), &mut outputs).unwrap();
        let left = rows(&outputs, 0).unwrap();
        assert_eq!(left.column(0).as_primitive::<Float32Type>().values(), &[2., 4., 6., 8., 10., 12.]);
        assert_eq!(*model.calls.lock().unwrap(), [4, 4]);
    }

    #[test]
    fn several_instances_share_one_model() {
        let plan = plan(&format!(r#"{{"model":"shuttle",{READINGS}}}"#), &readings().schema()).unwrap();
        let OperatorBuild::Compute { stateful, heavy, .. } = &plan.build else { panic!("infer is no call to others") };
        assert_eq!((*stateful, *heavy), (false, true));
        let _: (Box<dyn Operator>, BuildContext) = build(&plan);
        build(&plan);
    }
}
