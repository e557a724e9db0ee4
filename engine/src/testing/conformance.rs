//! What every component keeps, as functions that any planned one can be put through: `tests/house/conformance.rs` does
//! so with every entry of the registry, authors of components elsewhere may do the same. Each returns the rule that
//! is broken, in words. The invariant: only what the traits promise is asked for, in the order in which the engine
//! calls.

mod rows;
mod sink;

use std::collections::BTreeMap;
use std::time::Duration;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use futures::FutureExt;
use futures::future::join_all;
use tokio::time::{sleep, timeout};

use self::rows::{Cell, Row, honest, rows_of, same_rows, single_rows};
pub use self::sink::sink;
use crate::batch::Batch;
use crate::component::{BuildContext, OperatorBuild, OperatorPlan, Output, SourcePlan};
use crate::error::Class;
use crate::message;
use crate::operator::{AsyncOperator, Operator, Outputs, StateDelta};
use crate::position::Position;
use crate::rejected::Rejected;
use crate::source::{Pulled, Source};

/// Longest wait for one call.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two attempts at what may succeed later.
const PAUSE: Duration = Duration::from_millis(100);
/// Attempts at one call.
const TRIES: usize = 100;
/// Times that a pull is dropped before it is let through.
const INTERRUPTIONS: usize = 3;
/// How long nothing must come from a peer that has nothing left to send.
const QUIET: Duration = Duration::from_millis(500);
/// What is broken, in words.
type Broken = String;

/// A bounded source whose rows are the same each time: honest schema, `next` loses nothing when it is dropped, a new
/// instance goes on at every position, the end stays the end, and a late commit does no harm. Rows are compared in
/// order, within each partition where there are any.
///
/// # Errors
/// The rule that is broken.
pub async fn source(plan: &SourcePlan, context: &BuildContext) -> Result<(), Broken> {
    let mut first = open_source(plan, context, None).await?;
    let whole = read(&mut *first, &plan.schema, false, |_| false).await?;
    if whole.rows.is_empty() {
        return Err("it yields no row, so that nothing can be shown".to_owned());
    }
    if !matches!(pull(&mut *first, false).await?, Pulled::End) {
        return Err("after its end it yields something".to_owned());
    }
    let end = stored(&first.position())?;
    first.close().await;

    let mut interrupted = open_source(plan, context, None).await?;
    let found = read(&mut *interrupted, &plan.schema, true, |_| false).await?;
    interrupted.close().await;
    whole.same(&found, &plan.schema, "when pulls are dropped and repeated")?;

    let mut cuts = vec![0, 1, whole.pulls / 2, whole.pulls.saturating_sub(1)];
    cuts.sort_unstable();
    cuts.dedup();
    for pulls in cuts {
        let mut before = open_source(plan, context, None).await?;
        let mut found = read(&mut *before, &plan.schema, true, |read| read.pulls >= pulls).await?;
        let position = stored(&before.position())?;
        before.close().await;
        let mut after = open_source(plan, context, Some(&position)).await?;
        let rest = read(&mut *after, &plan.schema, false, |_| false).await?;
        after.close().await;
        found.rows.extend(rest.rows);
        found.rejected.extend(rest.rejected);
        whole.same(&found, &plan.schema, &format!("when it goes on at {} after {pulls} pulls", position.0))?;
    }

    // Last, since a peer that keeps positions itself remembers what was committed.
    let mut committed = open_source(plan, context, None).await?;
    read(&mut *committed, &plan.schema, false, |read| read.pulls >= 1).await?;
    let early = committed.position();
    read(&mut *committed, &plan.schema, false, |_| false).await?;
    let late = committed.position();
    for position in [&late, &early] {
        committed.commit(position).await.map_err(|e| format!("committing {}: {e}", position.0))?;
    }
    if committed.position() != late || !matches!(pull(&mut *committed, false).await?, Pulled::End) {
        return Err("committing an old position moves it".to_owned());
    }
    committed.close().await;

    let mut done = open_source(plan, context, Some(&end)).await?;
    if !matches!(pull(&mut *done, false).await?, Pulled::End) {
        return Err(format!("opened at its end, {}, it yields something", end.0));
    }
    done.close().await;
    Ok(())
}

/// A source whose peer sends what was not acknowledged again: honest schema, `next` loses nothing when it is dropped,
/// a crash before a commit brings every payload again in order, and what is committed does not come again. `send` is
/// called once the source is there, and makes the peer send `rows` messages that may all be unacknowledged at once.
///
/// # Errors
/// The rule that is broken.
pub async fn redelivering_source(
    plan: &SourcePlan,
    context: &BuildContext,
    rows: usize,
    send: impl FnOnce(),
) -> Result<(), Broken> {
    let payload = plan.schema.index_of(message::PAYLOAD).map_err(|e| format!("no payload to tell messages by: {e}"))?;
    let payloads = |read: &Read| read.rows.iter().map(|row| row[payload].clone()).collect::<Vec<Cell>>();
    let mut first = open_source(plan, context, None).await?;
    send();
    let sent = read(&mut *first, &plan.schema, true, |read| read.rows.len() >= rows).await?;
    if sent.rows.len() != rows {
        return Err(format!("{} messages arrive where {rows} were sent", sent.rows.len()));
    }
    // As a crash would end it.
    drop(first);

    let mut second = open_source(plan, &later(context), None).await?;
    let again = read(&mut *second, &plan.schema, true, |read| read.rows.len() >= rows).await?;
    if payloads(&sent) != payloads(&again) {
        return Err(format!("not the same messages after a crash: {:?}, then {:?}", payloads(&sent), payloads(&again)));
    }
    let position = second.position();
    second.commit(&position).await.map_err(|e| format!("committing {}: {e}", position.0))?;
    second.close().await;

    let mut third = open_source(plan, &later(&later(context)), None).await?;
    if let Ok(pulled) = timeout(QUIET, third.next()).await {
        return Err(format!("what was committed comes again: {pulled:?}"));
    }
    third.close().await;
    Ok(())
}

/// An operator with one input: the declared schemas at every output, the same rows however the input is split into
/// batches, and the same from a restored snapshot; a snapshot of what has not changed is empty.
///
/// # Errors
/// The rule that is broken.
pub fn operator(plan: &OperatorPlan, context: &BuildContext, inputs: &[RecordBatch]) -> Result<(), Broken> {
    let OperatorBuild::Compute { build, stateful, .. } = &plan.build else {
        return Err("it is asynchronous: see `async_operator`".to_owned());
    };
    let build = || build(context).map_err(|e| format!("building: {e}"));
    let mut whole = Emitted::of(plan);
    let mut at_once = build()?;
    for batch in inputs {
        whole.process(&mut *at_once, batch)?;
    }
    whole.finish(&mut *at_once)?;
    if whole.is_empty() {
        return Err("nothing leaves it, so that nothing can be shown".to_owned());
    }

    let rows = single_rows(inputs);
    let mut split = Emitted::of(plan);
    let mut row_by_row = build()?;
    for row in &rows {
        split.process(&mut *row_by_row, row)?;
        let delta = snapshot(&mut *row_by_row)?;
        if !stateful && !delta.is_empty() {
            return Err("it is planned as stateless and has state".to_owned());
        }
    }
    split.finish(&mut *row_by_row)?;
    whole.same(&split, "row by row, with a snapshot after each")?;

    for cut in [0, rows.len() / 4, rows.len() / 2, rows.len() * 3 / 4, rows.len()] {
        let mut found = Emitted::of(plan);
        let mut state = BTreeMap::new();
        let mut before = build()?;
        for (number, row) in rows[..cut].iter().enumerate() {
            found.process(&mut *before, row)?;
            // Barriers fall between batches at irregular distances.
            if number % 3 == 0 || number + 1 == cut {
                let delta = snapshot(&mut *before)?;
                for key in delta.deletes {
                    state.remove(&key);
                }
                state.extend(delta.puts);
            }
        }
        let mut after = build()?;
        after.restore(state.into_iter().collect()).map_err(|e| format!("restoring after {cut} rows: {e}"))?;
        if !after.snapshot().map_err(|e| format!("snapshot: {e}"))?.is_empty() {
            return Err(format!("restored after {cut} rows, its first snapshot says that something has changed"));
        }
        for row in &rows[cut..] {
            found.process(&mut *after, row)?;
        }
        found.finish(&mut *after)?;
        whole.same(&found, &format!("restored after {cut} rows"))?;
    }
    Ok(())
}

/// An asynchronous operator: the declared schemas, and the same rows whether calls hold many rows or one, overlap, or
/// come after a call that was dropped midway.
///
/// # Errors
/// The rule that is broken.
pub async fn async_operator(plan: &OperatorPlan, context: &BuildContext, inputs: &[RecordBatch]) -> Result<(), Broken> {
    let OperatorBuild::Async(build) = &plan.build else {
        return Err("it is not asynchronous: see `operator`".to_owned());
    };
    let operator = build(context).map_err(|e| format!("building: {e}"))?;
    if operator.concurrency() == 0 {
        return Err("it allows no call at all".to_owned());
    }
    let mut whole = Emitted::of(plan);
    for batch in inputs {
        whole.call(&*operator, std::slice::from_ref(batch)).await?;
    }
    if whole.is_empty() {
        return Err("nothing leaves it, so that nothing can be shown".to_owned());
    }
    let rows = single_rows(inputs);
    let mut split = Emitted::of(plan);
    for row in &rows {
        split.call(&*operator, std::slice::from_ref(row)).await?;
    }
    whole.same(&split, "row by row")?;
    let mut overlapping = Emitted::of(plan);
    for some in rows.chunks(operator.concurrency()) {
        // A call that is dropped must not disturb those that follow.
        let _ = operator.call(Batch::new(some[0].clone())).now_or_never();
        overlapping.call(&*operator, some).await?;
    }
    whole.same(&overlapping, "with overlapping calls")
}

/// The next start of the pipeline on the same data directory.
fn later(context: &BuildContext) -> BuildContext {
    BuildContext { run: context.run + 1, ..context.clone() }
}

fn endless(what: &str) -> Broken {
    format!("{what} does not come to its end within {PATIENCE:?}")
}

/// A position as it comes back from the checkpoint store.
fn stored(position: &Position) -> Result<Position, Broken> {
    let text = serde_json::to_string(position).map_err(|e| format!("storing a position: {e}"))?;
    serde_json::from_str(&text).map_err(|e| format!("reading the position {text}: {e}"))
}

async fn open_source(plan: &SourcePlan, context: &BuildContext, from: Option<&Position>) -> Result<Box<dyn Source>, Broken> {
    let mut source = (plan.build)(context).map_err(|e| format!("building: {e}"))?;
    for _ in 0..TRIES {
        match timeout(PATIENCE, source.open(from)).await.map_err(|_| endless("opening"))? {
            Ok(()) => return Ok(source),
            Err(error) if error.class() == Class::Retry => sleep(PAUSE).await,
            Err(error) => return Err(format!("opening at {from:?}: {error}")),
        }
    }
    Err(format!("opening at {from:?} fails {TRIES} times"))
}

/// The next pull; with `interrupted`, after some that were dropped at their first wait or a moment later.
async fn pull(source: &mut dyn Source, interrupted: bool) -> Result<Pulled, Broken> {
    let interruptions = if interrupted { INTERRUPTIONS } else { 0 };
    for _ in 0..TRIES {
        match next(source, interruptions).await.ok_or_else(|| endless("a pull"))? {
            Ok(pulled) => return Ok(pulled),
            Err(error) if error.class() == Class::Retry => sleep(PAUSE).await,
            Err(error) => return Err(format!("pulling: {error}")),
        }
    }
    Err(format!("pulling fails {TRIES} times"))
}

async fn next(source: &mut dyn Source, interruptions: usize) -> Option<crate::Result<Pulled>> {
    for _ in 0..interruptions {
        if let Some(pulled) = source.next().now_or_never() {
            return Some(pulled);
        }
        if let Ok(pulled) = timeout(Duration::from_millis(1), source.next()).await {
            return Some(pulled);
        }
    }
    timeout(PATIENCE, source.next()).await.ok()
}

/// Pulls to the end, or until `enough` says so.
async fn read(
    source: &mut dyn Source,
    schema: &SchemaRef,
    interrupted: bool,
    enough: impl Fn(&Read) -> bool,
) -> Result<Read, Broken> {
    let mut read = Read::default();
    while !enough(&read) {
        let (batch, rejected) = match pull(source, interrupted).await? {
            Pulled::Batch(batch) => (Some(batch), Vec::new()),
            Pulled::Mixed(batch, rejected) => (Some(batch), rejected),
            Pulled::Rejected(rejected) => (None, rejected),
            Pulled::End => break,
        };
        if let Some(batch) = batch {
            honest(&batch, schema, "it emits")?;
            read.rows.extend(rows_of(batch.records())?);
        }
        read.rejected.extend(rejected);
        read.pulls += 1;
    }
    Ok(read)
}

/// What a source has yielded.
#[derive(Default)]
struct Read {
    rows: Vec<Row>,
    rejected: Vec<Rejected>,
    pulls: usize,
}

impl Read {
    fn same(&self, found: &Read, schema: &SchemaRef, when: &str) -> Result<(), Broken> {
        same_rows(&by_partition(&self.rows, schema), &by_partition(&found.rows, schema), when)?;
        if self.rejected != found.rejected {
            return Err(format!("{when}: other rows are rejected: {:?} instead of {:?}", found.rejected, self.rejected));
        }
        Ok(())
    }
}

/// Rows of one partition behind each other: there is no order between partitions.
fn by_partition(rows: &[Row], schema: &SchemaRef) -> Vec<Row> {
    let mut rows = rows.to_vec();
    if let Ok(at) = schema.index_of(message::PARTITION) {
        rows.sort_by_key(|row| format!("{:?}", row[at]));
    }
    rows
}

/// What an operator has handed on.
struct Emitted<'a> {
    declared: &'a [Output],
    rows: Vec<Vec<Row>>,
    rejected: Vec<Rejected>,
}

impl<'a> Emitted<'a> {
    fn of(plan: &'a OperatorPlan) -> Self {
        Self { declared: &plan.outputs, rows: vec![Vec::new(); plan.outputs.len()], rejected: Vec::new() }
    }

    fn is_empty(&self) -> bool {
        self.rows.iter().all(Vec::is_empty)
    }

    fn process(&mut self, operator: &mut dyn Operator, batch: &RecordBatch) -> Result<(), Broken> {
        let mut outputs = Outputs::new();
        let result = operator.process(0, Batch::new(batch.clone()), &mut outputs);
        self.settle(result.map(|()| outputs), batch)
    }

    fn finish(&mut self, operator: &mut dyn Operator) -> Result<(), Broken> {
        let mut outputs = Outputs::new();
        operator.finish(&mut outputs).map_err(|e| format!("finishing: {e}"))?;
        self.take(outputs)
    }

    /// Calls with all of these at once; results are taken in order.
    async fn call(&mut self, operator: &dyn AsyncOperator, batches: &[RecordBatch]) -> Result<(), Broken> {
        let calls = join_all(batches.iter().map(|batch| operator.call(Batch::new(batch.clone()))));
        let results = timeout(PATIENCE, calls).await.map_err(|_| endless("a call"))?;
        for (result, batch) in results.into_iter().zip(batches) {
            self.settle(result, batch)?;
        }
        Ok(())
    }

    fn settle(&mut self, result: crate::Result<Outputs>, batch: &RecordBatch) -> Result<(), Broken> {
        match result {
            Ok(outputs) => self.take(outputs),
            Err(error) if error.class() == Class::Reject => {
                self.rejected.extend(Rejected::rows(batch, 0..batch.num_rows(), "rejected", &error.to_string()));
                Ok(())
            }
            Err(error) => Err(format!("processing: {error}")),
        }
    }

    fn take(&mut self, outputs: Outputs) -> Result<(), Broken> {
        let (batches, rejected) = outputs.into_parts();
        for (port, batch) in batches {
            let Some(declared) = self.declared.get(port) else {
                return Err(format!("it emits to output {port} of {}", self.declared.len()));
            };
            honest(&batch, &declared.schema, &format!("output `{}` emits", declared.name))?;
            self.rows[port].extend(rows_of(batch.records())?);
        }
        self.rejected.extend(rejected);
        Ok(())
    }

    fn same(&self, found: &Emitted, when: &str) -> Result<(), Broken> {
        for ((expected, rows), output) in self.rows.iter().zip(&found.rows).zip(self.declared) {
            same_rows(expected, rows, &format!("{when}, output `{}`", output.name))?;
        }
        // The words may name the row within its batch; what is rejected, and as what, may not differ.
        let kinds = |emitted: &Emitted| {
            let rejected = emitted.rejected.iter();
            rejected.map(|rejected| (rejected.code, rejected.position.clone(), rejected.given.clone())).collect::<Vec<_>>()
        };
        if kinds(self) != kinds(found) {
            return Err(format!("{when}: other rows are rejected: {:?} instead of {:?}", found.rejected, self.rejected));
        }
        Ok(())
    }
}

/// A snapshot, and the proof that it is not taken twice.
fn snapshot(operator: &mut dyn Operator) -> Result<StateDelta, Broken> {
    let delta = operator.snapshot().map_err(|e| format!("snapshot: {e}"))?;
    let unchanged = operator.snapshot().map_err(|e| format!("snapshot: {e}"))?;
    if !unchanged.is_empty() {
        return Err(format!("a snapshot right after another is not empty: {unchanged:?}"));
    }
    Ok(delta)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, AsArray, Int64Array};

    use super::*;
    use crate::component::Build;
    use crate::metrics::Metrics;
    use crate::operator::State;

    fn numbers(values: &[i64]) -> RecordBatch {
        RecordBatch::try_from_iter([("n", Arc::new(Int64Array::from(values.to_vec())) as ArrayRef)]).unwrap()
    }

    fn context() -> BuildContext {
        let metrics = Metrics::new().unwrap().stage("p", "s");
        BuildContext { pipeline: "p".into(), stage: "s".into(), data_dir: std::path::PathBuf::new(), run: 1, metrics }
    }

    /// Adds up what has come; at its worst it forgets to write down or depends on the batches.
    struct Sum {
        sum: i64,
        changed: bool,
        forgets: bool,
        per_batch: bool,
    }

    impl Operator for Sum {
        fn process(&mut self, _: usize, batch: Batch, outputs: &mut Outputs) -> crate::Result<()> {
            let values = batch.records().column(0).as_primitive::<arrow::datatypes::Int64Type>().values().to_vec();
            let mut sums = Vec::new();
            for value in values {
                self.sum += value;
                sums.push(self.sum);
            }
            if self.per_batch {
                sums.truncate(1);
            }
            self.changed = true;
            outputs.emit(batch.derive(numbers(&sums)));
            Ok(())
        }

        fn snapshot(&mut self) -> crate::Result<StateDelta> {
            let write = std::mem::take(&mut self.changed) && !self.forgets;
            let puts = if write { vec![(b"sum".to_vec(), self.sum.to_be_bytes().to_vec())] } else { Vec::new() };
            Ok(StateDelta { puts, deletes: Vec::new() })
        }

        fn restore(&mut self, state: State) -> crate::Result<()> {
            for (_, value) in state {
                self.sum = i64::from_be_bytes(value.try_into().unwrap());
            }
            Ok(())
        }
    }

    fn checked(forgets: bool, per_batch: bool, stateful: bool) -> Result<(), String> {
        let build: Build<Box<dyn Operator>> = Arc::new(move |_: &BuildContext| {
            Ok(Box::new(Sum { sum: 0, changed: false, forgets, per_batch }) as Box<dyn Operator>)
        });
        let plan = OperatorPlan {
            outputs: vec![Output { name: String::new(), schema: numbers(&[]).schema() }],
            build: OperatorBuild::Compute { build, stateful, heavy: false },
        };
        operator(&plan, &context(), &[numbers(&[1, 2, 3]), numbers(&[4, 5])])
    }

    #[test]
    fn an_honest_operator_passes_and_others_do_not() {
        checked(false, false, true).unwrap();
        assert!(checked(true, false, true).unwrap_err().contains("restored after"));
        assert!(checked(false, true, true).unwrap_err().contains("row by row"));
        assert!(checked(false, false, false).unwrap_err().contains("stateless"));
    }
}
