//! What a hop between stages costs: memory source -> n pass-through operators -> null sink, through the real
//! stage loops, against the same calls in a plain loop. Prints nanoseconds a hop, fused and queued, for large
//! batches and for batches of one row; both sides in one run, so that their ratio means something.
//!
//! `cargo bench -p afferent-engine --bench hop`

#![expect(clippy::expect_used, clippy::print_stdout, reason = "a benchmark prints, and ends when it cannot go on")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use afferent_engine::checkpoint::Checkpoints;
use afferent_engine::component::OperatorBuild;
use afferent_engine::graph::{Graph, Inlet, Node, Overflow, Port, QueueLimit, Role};
use afferent_engine::metrics::Metrics;
use afferent_engine::sabotage::Planted;
use afferent_engine::supervisor::{Options, Restore, run};
use afferent_engine::testing::disk::Disk;
use afferent_engine::{Batch, Epoch, Operator, Outputs, Position, Prepared, Pulled, Rejected, Result, Runtimes, Sink, Source};
use arrow::array::{ArrayRef, Float64Array, Int64Array, RecordBatch};
use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

struct Batches {
    batch: RecordBatch,
    left: u64,
}

#[async_trait]
impl Source for Batches {
    async fn open(&mut self, _: Option<&Position>) -> Result<()> {
        Ok(())
    }
    async fn next(&mut self) -> Result<Pulled> {
        if self.left == 0 {
            return Ok(Pulled::End);
        }
        self.left -= 1;
        Ok(Pulled::Batch(Batch::new(self.batch.clone())))
    }
    fn position(&self) -> Position {
        Position::of(&self.left)
    }
    async fn commit(&mut self, _: &Position) -> Result<()> {
        Ok(())
    }
}

struct Pass;

impl Operator for Pass {
    fn process(&mut self, _: usize, batch: Batch, outputs: &mut Outputs) -> Result<()> {
        outputs.emit(batch);
        Ok(())
    }
}

struct Null;

#[async_trait]
impl Sink for Null {
    async fn open(&mut self, _: Option<(Epoch, &Prepared)>) -> Result<()> {
        Ok(())
    }
    async fn write(&mut self, _: usize, _: Batch) -> Result<Vec<Rejected>> {
        Ok(Vec::new())
    }
    async fn prepare(&mut self, _: Epoch) -> Result<(Prepared, Vec<Rejected>)> {
        Ok((Prepared::Null, Vec::new()))
    }
    async fn finish(&mut self, _: Epoch, _: &Prepared) -> Result<()> {
        Ok(())
    }
}

fn batch(rows: i64) -> RecordBatch {
    RecordBatch::try_from_iter([
        ("id", Arc::new(Int64Array::from_iter_values(0..rows)) as ArrayRef),
        ("value", Arc::new(Float64Array::from_iter_values((0..rows).map(|n| n as f64)))),
    ])
    .expect("columns of one length")
}

fn graph(batch: &RecordBatch, count: u64, operators: usize, fused: bool) -> Graph {
    let inlet = |from| vec![Inlet { from, port: Port::Output(0), queue: QueueLimit::default(), overflow: Overflow::Block }];
    let records = batch.clone();
    let source = Role::Source(Arc::new(move |_| Ok(Box::new(Batches { batch: records.clone(), left: count }))));
    let mut nodes =
        vec![Node { name: "source".into(), component: "bench".into(), role: source, inputs: Vec::new(), fingerprint: 0 }];
    for number in 0..operators {
        let build = OperatorBuild::Compute { build: Arc::new(|_| Ok(Box::new(Pass))), stateful: false, heavy: !fused };
        let role = Role::Operator { build, parallelism: 1 };
        nodes.push(Node {
            name: format!("pass{number}"),
            component: "bench".into(),
            role,
            inputs: inlet(number),
            fingerprint: 0,
        });
    }
    let role = Role::Sink { build: Arc::new(|_| Ok(Box::new(Null))), commit_interval: Duration::from_millis(50) };
    nodes.push(Node { name: "sink".into(), component: "bench".into(), role, inputs: inlet(operators), fingerprint: 0 });
    Graph { name: "bench".into(), nodes, commit_interval: None }
}

/// Seconds that the pipeline takes for `count` batches.
fn through_engine(runtime: &tokio::runtime::Runtime, batch: &RecordBatch, count: u64, operators: usize, fused: bool) -> f64 {
    let graph = graph(batch, count, operators, fused);
    runtime.block_on(async {
        let options = Options {
            store: Arc::new(Checkpoints::with_backend(Disk::new().backend()).expect("a store in memory")),
            data_dir: Default::default(),
            metrics: Metrics::new().expect("metrics"),
            runtimes: Runtimes::current(),
            drain: CancellationToken::new(),
            drain_limit: Duration::from_secs(60),
            dead_letters: None,
            restore: Restore::Strict,
            seed: 0,
            planted: Planted::default(),
            virtual_time: false,
        };
        let began = Instant::now();
        run(&graph, &options).await.expect("the pipeline ends");
        began.elapsed().as_secs_f64()
    })
}

/// The same calls without an engine.
fn plain_loop(batch: &RecordBatch, count: u64, operators: usize) -> f64 {
    let mut passes: Vec<Pass> = (0..operators).map(|_| Pass).collect();
    let mut outputs = Outputs::new();
    let began = Instant::now();
    for _ in 0..count {
        let mut current = Batch::new(batch.clone());
        for pass in &mut passes {
            pass.process(0, current, &mut outputs).expect("passes");
            current = outputs.batches()[0].1.clone();
            outputs.clear();
        }
        std::hint::black_box(&current);
    }
    began.elapsed().as_secs_f64()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    const COUNT: u64 = 100_000;
    const RUNS: usize = 7;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    println!("median of {RUNS} runs of {COUNT} batches; a hop is the difference between 3 operators and none, divided by 3");
    for rows in [1, 1024] {
        let batch = batch(rows);
        let hop = |fused| {
            let runs = (0..RUNS).map(|_| {
                let without = through_engine(&runtime, &batch, COUNT, 0, fused);
                let with = through_engine(&runtime, &batch, COUNT, 3, fused);
                // A fused chain brings one queue of its own along, which is not a fused hop: measured against one operator.
                let one = through_engine(&runtime, &batch, COUNT, 1, fused);
                let hops = if fused { (with - one) / 2.0 } else { (with - without) / 3.0 };
                hops / COUNT as f64 * 1e9
            });
            median(runs.collect())
        };
        let plain = median((0..RUNS).map(|_| plain_loop(&batch, COUNT, 3) / 3.0 / COUNT as f64 * 1e9).collect());
        println!(
            "batches of {rows:>4} rows: fused hop {:>6.0} ns, queued hop {:>6.0} ns, plain call {plain:>6.0} ns",
            hop(true),
            hop(false)
        );
    }
}
