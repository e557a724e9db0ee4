//! The running `window` operator: rows in, completed windows out. The engine calls it. The invariant: a call that
//! fails leaves what is held as it was.

use afferent_engine::component::BuildContext;
use afferent_engine::{Batch, Error, Operator, Outputs, Rejected, Result, State, StateDelta};
use arrow::array::{ArrayRef, RecordBatch};
use arrow::datatypes::SchemaRef;
use arrow::error::ArrowError;
use arrow::row::{RowConverter, Rows, SortField};

use super::aggregate::{Windows, compute, last};
use super::config::Incomplete;
use super::held::{Held, Pushed, Rhythm};
use super::select::Function;

/// What planning fixed.
#[derive(Clone, Debug)]
pub(super) struct Shape {
    pub(super) rhythm: Rhythm,
    /// How many of the held columns, the first ones, make the key.
    pub(super) keys: usize,
    /// Columns of the input that are held.
    pub(super) held: Vec<usize>,
    pub(super) held_schema: SchemaRef,
    /// What leaves, in the order of `schema`.
    pub(super) output: Vec<Column>,
    pub(super) schema: SchemaRef,
    pub(super) incomplete: Incomplete,
}

/// One column that leaves, over a held column.
#[derive(Clone, Copy, Debug)]
pub(super) enum Column {
    /// The key's own value.
    Key(usize),
    /// The number of rows.
    Rows,
    /// A function.
    Of(Function, usize),
}

/// The running operator.
pub(super) struct Window {
    shape: Shape,
    /// None where all rows have one key.
    converter: Option<RowConverter>,
    held: Held,
    context: BuildContext,
}

impl Window {
    pub(super) fn new(shape: Shape, context: BuildContext) -> Result<Self> {
        let key_fields = &shape.held_schema.fields()[..shape.keys];
        let converter = if key_fields.is_empty() {
            None
        } else {
            let fields = key_fields.iter().map(|field| SortField::new(field.data_type().clone()));
            Some(RowConverter::new(fields.collect()).map_err(Error::fatal)?)
        };
        let held = Held::new(shape.held_schema.clone(), shape.rhythm);
        Ok(Self { shape, converter, held, context })
    }

    fn output(&self, places: &[(usize, usize)], windows: &Windows) -> std::result::Result<RecordBatch, ArrowError> {
        let rows = self.held.gather(places)?;
        let column = |(column, field): (&Column, &arrow::datatypes::FieldRef)| match column {
            Column::Key(at) => last(rows.column(*at), windows),
            Column::Rows => Ok(windows.rows()),
            Column::Of(function, at) => compute(*function, field, rows.column(*at), windows),
        };
        let columns = self.shape.output.iter().zip(self.shape.schema.fields()).map(column);
        let columns = columns.collect::<std::result::Result<Vec<ArrayRef>, _>>()?;
        RecordBatch::try_new(self.shape.schema.clone(), columns)
    }

    fn keys(&self, rows: &RecordBatch) -> Result<Option<Rows>> {
        let keys = self.converter.as_ref().map(|converter| converter.convert_columns(&rows.columns()[..self.shape.keys]));
        keys.transpose().map_err(Error::fatal)
    }

    fn completed(&self, pushed: &Pushed) -> std::result::Result<Option<RecordBatch>, ArrowError> {
        if pushed.windows.len() == 0 {
            return Ok(None);
        }
        self.output(&pushed.places, &pushed.windows).map(Some)
    }
}

impl Operator for Window {
    fn process(&mut self, _: usize, batch: Batch, outputs: &mut Outputs) -> Result<()> {
        let rows = batch.records().project(&self.shape.held).map_err(Error::fatal)?;
        let keys = self.keys(&rows)?;
        let key_of = |row| keys.as_ref().map_or(b"".as_slice(), |keys| keys.row(row).data());
        let mut pushed = self.held.push(rows, key_of).map_err(Error::fatal)?;
        let completed = match self.completed(&pushed) {
            Ok(completed) => completed,
            Err(cause) => {
                self.held.undo(pushed);
                return Err(Error::fatal(cause).context("cannot compute the windows of a batch"));
            }
        };
        let refused = std::mem::take(&mut pushed.refused);
        self.held.keep(pushed);
        if let Some(completed) = completed {
            outputs.emit(batch.derive(completed));
        }
        if !refused.is_empty() {
            let reason =
                format!("cannot hold rows of one more key: {} keys are held already (max_keys)", self.shape.rhythm.max_keys);
            outputs.reject(Rejected::rows(batch.records(), refused, "too_many_keys", &reason));
        }
        Ok(())
    }

    fn finish(&mut self, outputs: &mut Outputs) -> Result<()> {
        let (mut places, mut windows, mut unseen_rows) = (Vec::new(), Windows::default(), 0);
        for (held, unseen) in self.held.incomplete() {
            unseen_rows += unseen;
            if unseen > 0 && self.shape.incomplete == Incomplete::Emit {
                places.extend_from_slice(held);
                windows.push(held.len());
            }
        }
        match self.shape.incomplete {
            Incomplete::Emit if windows.len() > 0 => {
                let rows = self.output(&places, &windows).map_err(Error::fatal)?;
                outputs.emit(Batch::new(rows));
            }
            Incomplete::Emit => {}
            Incomplete::Drop => self.context.dropped("incomplete_window").inc_by(unseen_rows as u64),
        }
        // So that a start after the end has nothing to finish again.
        self.held.clear();
        Ok(())
    }

    fn snapshot(&mut self) -> Result<StateDelta> {
        self.held.snapshot()
    }

    fn restore(&mut self, state: State) -> Result<()> {
        let (converter, keys) = (&self.converter, self.shape.keys);
        self.held.restore(state, |rows| {
            let Some(converter) = converter else {
                return Ok(Box::default());
            };
            let first = rows.slice(0, 1);
            let key = converter.convert_columns(&first.columns()[..keys]).map_err(Error::fatal)?;
            Ok(key.row(0).data().into())
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use arrow::array::{AsArray, Int32Array, Int64Array, StringArray};
    use arrow::datatypes::{Float64Type, Int32Type, Int64Type};

    use super::*;
    use crate::testing;
    use crate::window::WindowConfig;

    /// A reading: device, a number that may be null, and its place in the input.
    type Reading = (u8, Option<i32>, i64);

    fn readings(random: &mut fastrand::Rng, count: i64, devices: u8) -> Vec<Reading> {
        let value = |random: &mut fastrand::Rng| random.bool().then(|| random.i32(-50..50));
        (0..count).map(|at| (random.u8(0..devices), value(random), at)).collect()
    }

    fn batch(readings: &[Reading]) -> RecordBatch {
        let devices = StringArray::from_iter_values(readings.iter().map(|r| format!("d{}", r.0)));
        let values: Int32Array = readings.iter().map(|r| r.1).collect();
        let places = Int64Array::from_iter_values(readings.iter().map(|r| r.2));
        let columns: [(&str, ArrayRef, bool); 3] =
            [("device", Arc::new(devices), false), ("ax", Arc::new(values), true), ("ts", Arc::new(places), false)];
        RecordBatch::try_from_iter_with_nullable(columns).unwrap()
    }

    /// What leaves for one window, as values.
    #[derive(Clone, Debug, PartialEq)]
    struct Row {
        device: String,
        list: Vec<Option<i32>>,
        rows: i64,
        count: i64,
        sum: Option<i64>,
        avg: Option<f64>,
        min: Option<i32>,
        max: Option<i32>,
        first: Option<i32>,
        last_ts: i64,
    }

    const SELECT: &str = r#"["device","array_agg(ax) as list","count(*) as rows","count(ax) as count","sum(ax) as sum",
        "avg(ax) as avg","min(ax) as min","max(ax) as max","first(ax) as first","last(ts) as ts"]"#;

    fn config(rows: usize, step: usize, incomplete: &str) -> String {
        format!(r#"{{"by":["device"],"rows":{rows},"step":{step},"select":{SELECT},"incomplete":"{incomplete}"}}"#)
    }

    fn row(window: &[Reading]) -> Row {
        let values: Vec<i32> = window.iter().filter_map(|r| r.1).collect();
        let sum: i64 = values.iter().map(|value| i64::from(*value)).sum();
        let any = !values.is_empty();
        Row {
            device: format!("d{}", window[0].0),
            list: window.iter().map(|r| r.1).collect(),
            rows: window.len() as i64,
            count: values.len() as i64,
            sum: any.then_some(sum),
            avg: any.then(|| sum as f64 / values.len() as f64),
            min: values.iter().min().copied(),
            max: values.iter().max().copied(),
            first: window[0].1,
            last_ts: window[window.len() - 1].2,
        }
    }

    /// The same, one row of input at a time. Also the number of rows that were in no window.
    fn reference(readings: &[Reading], rows: usize, step: usize, incomplete: &str) -> (Vec<Row>, usize) {
        let mut keys: BTreeMap<u8, Vec<Reading>> = BTreeMap::new();
        let mut out = Vec::new();
        for reading in readings {
            let all = keys.entry(reading.0).or_default();
            all.push(*reading);
            if all.len() >= rows && (all.len() - rows).is_multiple_of(step) {
                out.push(row(&all[all.len() - rows..]));
            }
        }
        let mut unseen = 0;
        for all in keys.values() {
            let windows = if all.len() >= rows { 1 + (all.len() - rows) / step } else { 0 };
            let seen = if windows == 0 { 0 } else { rows + (windows - 1) * step };
            unseen += all.len() - seen;
            if incomplete == "emit" && all.len() > seen {
                out.push(row(&all[windows * step..]));
            }
        }
        (out, unseen)
    }

    fn rows_of(outputs: &Outputs) -> Vec<Row> {
        let Some(all) = testing::rows(outputs, 0) else {
            return Vec::new();
        };
        let column = |name: &str| all.column_by_name(name).unwrap().clone();
        let ints = |name: &str| column(name).as_primitive::<Int32Type>().iter().collect::<Vec<_>>();
        let longs = |name: &str| column(name).as_primitive::<Int64Type>().iter().collect::<Vec<_>>();
        let averages: Vec<_> = column("avg").as_primitive::<Float64Type>().iter().collect();
        let (devices, lists) = (column("device"), column("list"));
        let (min, max, first) = (ints("min"), ints("max"), ints("first"));
        let (rows, count, sum, ts) = (longs("rows"), longs("count"), longs("sum"), longs("ts"));
        let list = |at: usize| match lists.as_fixed_size_list_opt() {
            Some(lists) => lists.value(at),
            None => lists.as_list::<i32>().value(at),
        };
        (0..all.num_rows())
            .map(|at| Row {
                device: devices.as_string::<i32>().value(at).to_owned(),
                list: list(at).as_primitive::<Int32Type>().iter().collect(),
                rows: rows[at].unwrap(),
                count: count[at].unwrap(),
                sum: sum[at],
                avg: averages[at],
                min: min[at],
                max: max[at],
                first: first[at],
                last_ts: ts[at].unwrap(),
            })
            .collect()
    }

    /// Runs with the input cut at random, and stopped and taken up again from its state at random.
    fn run(random: &mut fastrand::Rng, text: &str, readings: &[Reading], restarts: bool) -> (Vec<Row>, u64) {
        let plan = testing::plan::<WindowConfig>(text, &batch(&[]).schema()).ok().unwrap();
        let (mut operator, mut context) = testing::build(&plan);
        let mut stored: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
        let mut outputs = Outputs::new();
        let mut rest = readings;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(random.usize(1..=rest.len().min(40)));
            operator.process(0, Batch::new(batch(now)), &mut outputs).unwrap();
            rest = later;
            if restarts && random.u8(..) < 60 {
                let delta = operator.snapshot().unwrap();
                delta.deletes.iter().for_each(|key| drop(stored.remove(key)));
                stored.extend(delta.puts);
                if random.bool() {
                    (operator, context) = testing::build(&plan);
                    operator.restore(stored.clone().into_iter().collect()).unwrap();
                }
            }
        }
        operator.finish(&mut outputs).unwrap();
        let delta = operator.snapshot().unwrap();
        delta.deletes.iter().for_each(|key| drop(stored.remove(key)));
        assert!(delta.puts.is_empty() && stored.is_empty(), "the state is gone after the end");
        (rows_of(&outputs), context.dropped("incomplete_window").get())
    }

    #[test]
    fn windows_equal_those_of_a_row_by_row_reference_for_every_cut_and_restart() {
        for seed in 0..60 {
            let mut random = fastrand::Rng::with_seed(seed);
            let rows = random.usize(1..12);
            let step = random.usize(1..=rows);
            let incomplete = if random.bool() { "emit" } else { "drop" };
            let count = random.i64(0..400);
            let devices = random.u8(1..9);
            let given = readings(&mut random, count, devices);
            let (expected, unseen) = reference(&given, rows, step, incomplete);
            let text = config(rows, step, incomplete);
            for restarts in [false, true] {
                let (got, dropped) = run(&mut random, &text, &given, restarts);
                assert_eq!(got, expected, "seed {seed}, rows {rows}, step {step}, {incomplete}");
                let expected_drops = if incomplete == "drop" { unseen as u64 } else { 0 };
                assert_eq!(dropped, expected_drops, "seed {seed}, rows {rows}, step {step}");
            }
        }
    }

    #[test]
    fn without_keys_all_rows_are_one_sequence() {
        let given: Vec<Reading> = (0..5).map(|at| (at as u8, Some(1), at)).collect();
        let outputs = testing::run::<WindowConfig>(r#"{"rows":2,"select":["count(*) as n"]}"#, batch(&given));
        let rows = testing::rows(&outputs, 0).unwrap();
        assert_eq!(rows.column(0).as_primitive::<Int64Type>().values(), &[2, 2]);
    }

    #[test]
    fn rows_of_too_many_keys_are_rejected() {
        let given: Vec<Reading> = [0, 1, 2, 0, 1].into_iter().zip(0..).map(|(d, at)| (d, None, at)).collect();
        let text = r#"{"by":["device"],"rows":2,"select":["device"],"max_keys":2}"#;
        let outputs = testing::run::<WindowConfig>(text, batch(&given));
        let rows = testing::rows(&outputs, 0).unwrap();
        let devices: Vec<_> = rows.column(0).as_string::<i32>().iter().flatten().collect();
        assert_eq!(devices, ["d0", "d1"]);
        assert_eq!(outputs.rejected().len(), 1);
        assert_eq!(outputs.rejected()[0].code, "too_many_keys");
    }

    #[test]
    fn null_is_a_key_like_any_other() {
        let given = batch(&[(0, Some(1), 0), (1, None, 1), (2, None, 2), (3, Some(1), 3)]);
        let text = r#"{"by":["ax"],"rows":2,"select":["ax","last(ts) as ts"]}"#;
        let rows = testing::rows(&testing::run::<WindowConfig>(text, given), 0).unwrap();
        let keys: Vec<_> = rows.column(0).as_primitive::<Int32Type>().iter().collect();
        assert_eq!(keys, [None, Some(1)]);
        assert_eq!(rows.column(1).as_primitive::<Int64Type>().values(), &[2, 3]);
    }
}
