//! The `batch` operator: gathers rows into batches of one size. The engine calls it. The invariant: every row leaves
//! once, in the order of arrival, and what is held is state.

use std::num::NonZeroU32;
use std::sync::Arc;

use afferent_engine::component::{
    BuildContext, Input, OperatorBuild, OperatorConfig, OperatorPlan, Output, PlanContext, Planned,
};
use afferent_engine::{Batch, Error, Operator, Outputs, Result, State, StateDelta};
use arrow::array::RecordBatch;
use arrow::compute::concat_batches;
use arrow::datatypes::SchemaRef;
use schemars::JsonSchema;
use serde::Deserialize;
use tokio::time::Instant;

use crate::columns;
use crate::state;

/// The one key of this stage's state.
const HELD: &[u8] = b"held";

/// Gathers rows into batches of a fixed size. A larger batch that arrives is cut. Rows that do not fill a batch yet
/// are held: they are part of every checkpoint, and leave when the batch is full or the input ends. Nothing else
/// makes them leave, so that a quiet input keeps up to `rows` - 1 rows waiting.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub struct BatchConfig {
    /// Rows of each batch; only the last one may have fewer.
    pub rows: NonZeroU32,
}

impl OperatorConfig for BatchConfig {
    const NAME: &'static str = "batch";
    const EXAMPLE: &'static str = "batch: { rows: 256 }";

    fn plan(self, inputs: &[Input], _: &PlanContext) -> Planned<OperatorPlan> {
        let schema = columns::only(inputs, Self::NAME)?.schema.clone();
        let rows = self.rows.get() as usize;
        let output = Output { name: String::new(), schema: schema.clone() };
        let build = move |_: &BuildContext| -> Result<Box<dyn Operator>> { Ok(Box::new(Gather::new(schema.clone(), rows))) };
        Ok(OperatorPlan {
            outputs: vec![output],
            build: OperatorBuild::Compute { build: Arc::new(build), stateful: true, heavy: false },
        })
    }
}

struct Gather {
    schema: SchemaRef,
    size: usize,
    held: Vec<RecordBatch>,
    held_rows: usize,
    /// When the earliest held row entered the process.
    since: Option<Instant>,
    changed: bool,
    /// Whether the stored state has held rows.
    stored: bool,
}

impl Gather {
    fn new(schema: SchemaRef, size: usize) -> Self {
        Self { schema, size, held: Vec::new(), held_rows: 0, since: None, changed: false, stored: false }
    }

    fn gathered(&self, last: Option<&RecordBatch>) -> Result<RecordBatch> {
        // The rows are at fault only in being too many for 32-bit offsets; repeating cannot help.
        concat_batches(&self.schema, self.held.iter().chain(last)).map_err(Error::fatal)
    }

    fn clear(&mut self) {
        self.held.clear();
        self.held_rows = 0;
        self.since = None;
    }
}

impl Operator for Gather {
    fn process(&mut self, _: usize, batch: Batch, outputs: &mut Outputs) -> Result<()> {
        let rows = batch.records();
        let mut start = 0;
        if self.held_rows > 0 && self.held_rows + rows.num_rows() >= self.size {
            start = self.size - self.held_rows;
            let full = self.gathered(Some(&rows.slice(0, start)))?;
            let since = self.since.map_or(batch.ingest(), |since| since.min(batch.ingest()));
            outputs.emit(Batch::since(full, since));
            self.clear();
        }
        while rows.num_rows() - start >= self.size {
            outputs.emit(batch.derive(rows.slice(start, self.size)));
            start += self.size;
        }
        if start < rows.num_rows() {
            self.held.push(rows.slice(start, rows.num_rows() - start));
            self.held_rows += rows.num_rows() - start;
            self.since = Some(self.since.map_or(batch.ingest(), |since| since.min(batch.ingest())));
        }
        self.changed = true;
        Ok(())
    }

    fn finish(&mut self, outputs: &mut Outputs) -> Result<()> {
        let rows = self.gathered(None)?;
        outputs.emit(match self.since {
            Some(since) => Batch::since(rows, since),
            None => Batch::new(rows),
        });
        self.changed |= self.held_rows > 0;
        self.clear();
        Ok(())
    }

    fn snapshot(&mut self) -> Result<StateDelta> {
        let mut delta = StateDelta::default();
        if !std::mem::take(&mut self.changed) {
            return Ok(delta);
        }
        if self.held_rows > 0 {
            // Kept in one piece from here on: a quiet input must not gather its pieces anew at every barrier.
            let rows = self.gathered(None)?;
            let mut value = Vec::new();
            state::write(&rows, &mut value)?;
            self.held = vec![rows];
            self.stored = true;
            delta.puts.push((HELD.to_vec(), value));
        } else if std::mem::take(&mut self.stored) {
            delta.deletes.push(HELD.to_vec());
        }
        Ok(delta)
    }

    fn restore(&mut self, state: State) -> Result<()> {
        for (key, value) in state {
            if key != HELD {
                return Err(Error::fatal(format!("the stored state of a batch stage has an unknown key {key:?}")));
            }
            let rows = state::read(&self.schema, &value)?;
            self.held_rows = rows.num_rows();
            self.since = (self.held_rows > 0).then(Instant::now);
            self.held = vec![rows];
            self.stored = true;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::{ArrayRef, AsArray, Int32Array};
    use arrow::datatypes::Int32Type;

    use super::*;

    fn numbers(range: std::ops::Range<i32>) -> RecordBatch {
        let column: ArrayRef = Arc::new(Int32Array::from_iter_values(range));
        RecordBatch::try_from_iter([("n", column)]).unwrap()
    }

    fn sizes_and_rows(outputs: &Outputs) -> (Vec<usize>, Vec<i32>) {
        let batches = || outputs.batches().iter().map(|(_, batch)| batch.records());
        let rows = batches().flat_map(|b| b.column(0).as_primitive::<Int32Type>().values().to_vec());
        (batches().map(RecordBatch::num_rows).collect(), rows.collect())
    }

    #[test]
    fn batches_have_the_size_and_the_order_is_kept_over_a_restart() {
        let schema = numbers(0..0).schema();
        let mut outputs = Outputs::new();
        let mut first = Gather::new(schema.clone(), 4);
        for cut in [0..1, 1..3, 3..13] {
            first.process(0, Batch::new(numbers(cut)), &mut outputs).unwrap();
        }
        let stored = first.snapshot().unwrap();
        assert_eq!(stored.puts.len(), 1);
        assert!(first.snapshot().unwrap().is_empty());

        let mut second = Gather::new(schema, 4);
        second.restore(stored.puts).unwrap();
        second.process(0, Batch::new(numbers(13..18)), &mut outputs).unwrap();
        second.finish(&mut outputs).unwrap();
        let (sizes, rows) = sizes_and_rows(&outputs);
        assert_eq!(sizes, [4, 4, 4, 4, 2]);
        assert_eq!(rows, (0..18).collect::<Vec<_>>());
        assert_eq!(second.snapshot().unwrap().deletes, [HELD.to_vec()]);
        let mut after = Outputs::new();
        second.finish(&mut after).unwrap();
        assert!(after.batches().is_empty());
    }

    #[test]
    fn no_size_and_an_unknown_key_are_refused() {
        assert!(serde_json::from_str::<BatchConfig>(r#"{"rows":0}"#).is_err());
        assert!(serde_json::from_str::<BatchConfig>(r#"{"rows":1,"linger":"10ms"}"#).is_err());
    }
}
