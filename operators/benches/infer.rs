//! What the `infer` operator costs beside raw `ort` calls on the same rows: the tensor made of the same Arrow columns
//! by a plain loop, the answer copied into an Arrow column, the session with the same options and threads. Pairs that
//! take turns; prints the ratio of their rates. ONNX Runtime allows one environment in a process, so that the raw side
//! is a child of this one, idle until it is asked; both check that they compute the same.
//!
//! `VIRTUAL_ENV=~/.cache/afferent/venv cargo bench -p afferent-operators --bench infer` (or `ORT_DYLIB_PATH`)

#![expect(clippy::expect_used, clippy::print_stdout, reason = "a benchmark prints, and ends when it cannot go on")]

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use afferent_engine::component::{BuildContext, Input, OperatorBuild, OperatorConfig, PlanContext};
use afferent_engine::metrics::Metrics;
use afferent_engine::{Batch, Operator, Outputs};
use afferent_models::{LazyRuntime, Repository, Runtime};
use afferent_operators::{InferConfig, ModelServer};
use arrow::array::{Array, ArrayRef, AsArray, FixedSizeListArray, Float32Array, Int64Array, RecordBatch};
use arrow::datatypes::{DataType, Field, Float32Type, Schema, SchemaRef};
use ort::environment::Environment;
use ort::logging::LogLevel;
use ort::session::Session;
use ort::value::TensorRef;

/// The argument that makes this program the raw side; the library and the case follow.
const RAW: &str = "--raw";
const RUNS: usize = 15;
/// How long one side of a pair measures, in seconds.
const MEASURED: f64 = 0.15;

/// A model and the rows for it.
#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    /// Below `examples/`.
    models: &'static str,
    config: &'static str,
    /// Name of the model's input.
    input: &'static str,
    /// The columns that fill it.
    columns: &'static [&'static str],
    /// Values that each of these columns has in a row: numbers where it is 1, else lists.
    each: usize,
    /// Values in a row of the answer: a number where it is 1, else a list.
    answer: usize,
}

const CASES: [Case; 2] = [
    Case {
        name: "shuttle",
        models: "shuttle-anomaly/models",
        config: r#"{"model":"shuttle","inputs":{"readings":["s1","s2","s3","s4","s5","s6","s7","s8","s9"]},
            "outputs":{"score":{"column":"answer"}}}"#,
        input: "readings",
        columns: &["s1", "s2", "s3", "s4", "s5", "s6", "s7", "s8", "s9"],
        each: 1,
        answer: 1,
    },
    Case {
        name: "exercise",
        models: "exercise-watch/models",
        config: r#"{"model":"exercise","inputs":{"window":["ax","ay","az","wx","wy","wz"]},"stack":"last",
            "outputs":{"probabilities":{"column":"answer"}}}"#,
        input: "window",
        columns: &["ax", "ay", "az", "wx", "wy", "wz"],
        each: 100,
        answer: 7,
    },
];

impl Case {
    fn models(&self) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples").join(self.models)
    }

    /// The same rows in both processes: a number that the model does not see, and what it sees.
    fn rows(&self, rows: usize) -> RecordBatch {
        let mut random = fastrand::Rng::with_seed(1);
        let id: ArrayRef = Arc::new(Int64Array::from_iter_values(0..rows as i64));
        let columns = self.columns.iter().map(|name| {
            let values: Float32Array = (0..rows * self.each).map(|_| Some(random.f32() * 2.0 - 1.0)).collect();
            (*name, lists(values, self.each))
        });
        RecordBatch::try_from_iter(std::iter::once(("id", id)).chain(columns)).expect("columns of one length")
    }
}

/// Values as they are, or by `each` in a list.
fn lists(values: Float32Array, each: usize) -> ArrayRef {
    if each == 1 {
        return Arc::new(values);
    }
    let item = Arc::new(Field::new("item", DataType::Float32, true));
    let each = i32::try_from(each).expect("a short list");
    Arc::new(FixedSizeListArray::try_new(item, each, Arc::new(values), None).expect("lists of one length"))
}

/// What both sides compute, in one number: the sum of the last column.
fn checksum(records: &RecordBatch) -> f64 {
    let last = records.columns().last().expect("there are columns");
    let values = match last.data_type() {
        DataType::FixedSizeList(..) => last.as_fixed_size_list().values(),
        _ => last,
    };
    values.as_primitive::<Float32Type>().values().iter().map(|value| f64::from(*value)).sum()
}

/// The operator as the engine would build it.
fn operator(runtime: &Runtime, case: &Case, schema: SchemaRef) -> Box<dyn Operator> {
    let config: InferConfig = serde_json::from_str(case.config).expect("a configuration");
    let mut context = PlanContext::default();
    let repository = Repository::new(vec![case.models()]);
    context.provide(Arc::new(ModelServer::new(repository, LazyRuntime::ready(runtime.clone()))));
    let plan = config.plan(&[Input { name: "rows".to_owned(), schema }], &context).expect("the configuration is sound");
    let OperatorBuild::Compute { build, .. } = plan.build else { unreachable!("infer computes") };
    let context = BuildContext {
        pipeline: "bench".to_owned(),
        stage: "infer".to_owned(),
        data_dir: PathBuf::new(),
        run: 1,
        metrics: Metrics::new().expect("metrics").stage("bench", "infer"),
    };
    build(&context).expect("the operator is built")
}

/// Seconds for that many batches, and what came out of the last.
fn through_operator(operator: &mut dyn Operator, records: &RecordBatch, repeats: usize) -> (f64, f64) {
    let mut outputs = Outputs::new();
    let began = Instant::now();
    for _ in 0..repeats {
        outputs.clear();
        operator.process(0, Batch::new(records.clone()), &mut outputs).expect("processed");
        assert_eq!(outputs.batches().len(), 1, "every row is scored");
    }
    let seconds = began.elapsed().as_secs_f64();
    (seconds, checksum(outputs.batches()[0].1.records()))
}

/// What one writes by hand, with everything that need not be done for each batch done before.
struct ByHand {
    session: Session,
    case: Case,
    schema: SchemaRef,
}

impl ByHand {
    fn open(environment: &Environment, case: Case, schema: &SchemaRef) -> ort::Result<Self> {
        let file = case.models().join(case.name).join("1/model.onnx");
        let session =
            Session::builder(environment)?.with_intra_threads(1)?.with_log_level(LogLevel::Warning)?.commit_from_file(file)?;
        // What the model takes in as lists is not kept, as the operator does.
        let kept = if case.each == 1 { schema.fields().len() } else { 1 };
        let mut fields: Vec<Field> = schema.fields().iter().take(kept).map(|field| field.as_ref().clone()).collect();
        let answer = lists(Float32Array::from(vec![0.0; case.answer]), case.answer);
        fields.push(Field::new("answer", answer.data_type().clone(), false));
        Ok(Self { session, case, schema: Arc::new(Schema::new(fields)) })
    }

    fn score(&mut self, records: &RecordBatch) -> ort::Result<RecordBatch> {
        let (rows, each, width) = (records.num_rows(), self.case.each, self.case.columns.len());
        let columns: Vec<&[f32]> = records.columns()[1..]
            .iter()
            .map(|column| match column.data_type() {
                DataType::FixedSizeList(..) => column.as_fixed_size_list().values(),
                _ => column,
            })
            .map(|values| &values.as_primitive::<Float32Type>().values()[..])
            .collect();
        let mut elements = Vec::with_capacity(rows * each * width);
        for at in 0..rows * each {
            for column in &columns {
                elements.push(column[at]);
            }
        }
        let kept = self.schema.fields().len() - 1;
        let mut left = records.columns()[..kept].to_vec();
        let tensor = if each == 1 {
            TensorRef::from_array_view(([rows, width], elements.as_slice()))?
        } else {
            TensorRef::from_array_view(([rows, each, width], elements.as_slice()))?
        };
        let outputs = self.session.run(ort::inputs![self.case.input => tensor])?;
        let (_, values) = outputs[0].try_extract_tensor::<f32>()?;
        left.push(lists(Float32Array::from(values.to_vec()), self.case.answer));
        Ok(RecordBatch::try_new(Arc::clone(&self.schema), left).expect("the columns of the schema"))
    }
}

/// The raw side: for every line `rows repeats` it answers `seconds checksum`, until its input ends.
fn raw(library: &str, case: Case) {
    let builder = ort::init_from(library).expect("the library loads");
    let environment = builder.with_name("raw").with_telemetry(false).build().expect("the library starts");
    let mut by_hand = ByHand::open(&environment, case, &case.rows(1).schema()).expect("the model loads");
    for line in std::io::stdin().lock().lines() {
        let line = line.expect("a line");
        let (rows, repeats) = line.split_once(' ').expect("two numbers");
        let records = case.rows(rows.parse().expect("a number of rows"));
        let repeats: usize = repeats.parse().expect("a number of repeats");
        let mut answer = by_hand.score(&records).expect("scored");
        let began = Instant::now();
        for _ in 0..repeats {
            answer = by_hand.score(&records).expect("scored");
        }
        println!("{} {}", began.elapsed().as_secs_f64(), checksum(&answer));
    }
}

/// The raw side, as seen from here.
struct Peer {
    child: Child,
    asked: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Peer {
    fn start(library: &Path, case: &Case) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.arg(RAW).arg(library).arg(case.name);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the raw side starts");
        let asked = child.stdin.take().expect("its input is piped");
        let answers = BufReader::new(child.stdout.take().expect("its output is piped"));
        Self { child, asked, answers }
    }

    /// Seconds for that many batches, and what came out of the last.
    fn measure(&mut self, rows: usize, repeats: usize) -> (f64, f64) {
        writeln!(self.asked, "{rows} {repeats}").expect("the raw side listens");
        let mut answer = String::new();
        self.answers.read_line(&mut answer).expect("the raw side answers");
        let (seconds, checksum) = answer.trim_end().split_once(' ').expect("two numbers");
        (seconds.parse().expect("seconds"), checksum.parse().expect("a checksum"))
    }

    fn end(mut self) {
        drop(self.asked);
        self.child.wait().expect("the raw side ends");
    }
}

fn sorted(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    values
}

fn compare(runtime: &Runtime, library: &Path, case: Case) {
    let mut peer = Peer::start(library, &case);
    for rows in [32, 256, 1024] {
        let records = case.rows(rows);
        let mut operator = operator(runtime, &case, records.schema());
        // Warm, and as long on both sides as is worth measuring.
        let (one, own) = through_operator(operator.as_mut(), &records, 20);
        let (_, theirs) = peer.measure(rows, 20);
        assert!((own - theirs).abs() <= 1e-5 * own.abs().max(1.0), "the same rows give {own} here and {theirs} there");
        let repeats = (MEASURED / (one / 20.0)).ceil().max(1.0) as usize;
        let (mut own, mut theirs, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for run in 0..RUNS {
            // Whoever comes second finds a warmer processor: they take turns in that, too.
            let (us, them) = if run % 2 == 0 {
                let us = through_operator(operator.as_mut(), &records, repeats).0;
                (us, peer.measure(rows, repeats).0)
            } else {
                let them = peer.measure(rows, repeats).0;
                (through_operator(operator.as_mut(), &records, repeats).0, them)
            };
            own.push(us);
            theirs.push(them);
            ratios.push(them / us);
        }
        let per_batch = |seconds: Vec<f64>| sorted(seconds)[RUNS / 2] / repeats as f64 * 1e6;
        let ratios = sorted(ratios);
        println!(
            "{:>8}, batches of {rows:>4}: infer {:>8.1} us, raw ort {:>8.1} us a batch; ratio of rates {:.3} ({:.3}..{:.3})",
            case.name,
            per_batch(own),
            per_batch(theirs),
            ratios[RUNS / 2],
            ratios[0],
            ratios[RUNS - 1]
        );
    }
    peer.end();
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [word, library, name] = arguments.as_slice()
        && word == RAW
    {
        let case = CASES.into_iter().find(|case| case.name == name).expect("a known case");
        return raw(library, case);
    }
    let runtime = Runtime::discover(Path::new(".afferent")).expect("a runtime");
    let Some(library) = runtime.library() else {
        println!("nothing measured: {}", runtime.notice().unwrap_or("AFFERENT_MODEL_BACKEND asks for tract"));
        std::process::exit(1);
    };
    println!("median (least..most) of {RUNS} pairs; ONNX Runtime from {}", library.display());
    for case in CASES {
        compare(&runtime, library, case);
    }
}
