//! The `generate` source: made-up rows for tests, demos and benches. The engine calls it. The invariant: a row
//! depends on the seed and on its own number only, so that a run that is resumed yields what an unbroken one
//! would have (a column of the kind `now` excepted: it tells when the row was made).

use std::borrow::Cow;
use std::f64::consts::TAU;
use std::fmt;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use afferent_engine::component::{BuildContext, PlanContext, Planned, Problem, Replay, SourceConfig, SourcePlan};
use afferent_engine::config::Interval;
use afferent_engine::{Batch, Error, Position, Pulled, Result, Source};
use arrow::array::{ArrayRef, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMillisecondArray};
use arrow::compute::kernels::cast_utils::string_to_timestamp_nanos;
use arrow::datatypes::{DataType, Field, Schema as ArrowSchema, SchemaRef, TimeUnit};
use async_trait::async_trait;
use fastrand::Rng;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use tokio::time::{Duration, Instant, sleep_until};

/// Longest sleep between two rows; keeps instants representable at absurdly low rates.
const LONGEST_WAIT: Duration = Duration::from_secs(365 * 24 * 3600);

/// Makes up rows, for tests and demos. Every value follows from the seed and the row's number, so that a run that
/// is resumed yields the very rows that an unbroken one would have.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub struct GenerateConfig {
    /// How many rows in all. Without it the source never ends.
    rows: Option<u64>,
    /// Rows per second. Without it as many as the pipeline takes.
    rate: Option<f64>,
    /// The columns by name, each with what fills it.
    columns: Columns,
    /// Another seed gives other random values.
    #[serde(default)]
    seed: u64,
    /// Most rows in one batch.
    #[serde(default = "default_batch_rows")]
    batch_rows: NonZeroUsize,
}

fn default_batch_rows() -> NonZeroUsize {
    NonZeroUsize::MIN.saturating_add(1023)
}

/// Named columns in their order; at least one.
#[derive(Clone, Debug)]
struct Columns(Vec<(String, Column)>);

/// What fills a column.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(rename = "GeneratedColumn")]
enum Column {
    /// The number of the row, from 0 (int64).
    Sequence,
    /// When the row is made (timestamp_ms); the one kind that is not the same again after a restart.
    Now,
    /// A clock that goes on by a fixed step from row to row (timestamp_ms).
    Time(Time),
    /// Always the same text (utf8).
    Constant(String),
    /// One of several texts, at random (utf8).
    Choice(Vec<String>),
    /// Evenly spread between the first number and the second (float64).
    Uniform(f64, f64),
    /// Normally distributed with this mean and standard deviation (float64).
    Normal(f64, f64),
    /// A sine wave (float64).
    Sine(Sine),
}

/// A clock that goes on by a fixed step from row to row.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
#[schemars(rename = "GeneratedTime")]
struct Time {
    /// The time of row 0.
    start: Start,
    /// What each row adds.
    step: Interval,
}

/// A sine wave.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
#[schemars(rename = "GeneratedSine")]
struct Sine {
    /// Rows in one wave.
    period: f64,
    /// Height of the crest above zero.
    amplitude: f64,
}

/// An instant, in nanoseconds since 1970, UTC.
#[derive(Clone, Copy, Debug)]
struct Start(i64);

impl<'de> Deserialize<'de> for Start {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        string_to_timestamp_nanos(&text)
            .map(Start)
            .map_err(|_| de::Error::custom(format!("`{text}` is not a time; write for example 2026-01-01T00:00:00Z")))
    }
}

impl JsonSchema for Start {
    fn schema_name() -> Cow<'static, str> {
        "Instant".into()
    }

    fn schema_id() -> Cow<'static, str> {
        concat!(module_path!(), "::Start").into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "description": "A time: `2026-01-01T00:00:00Z`. Without a zone it is UTC.",
            "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}"
        })
    }
}

impl<'de> Deserialize<'de> for Columns {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Named;
        impl<'de> Visitor<'de> for Named {
            type Value = Columns;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from column names to what fills them, e.g. { id: sequence, value: { uniform: [0, 1] } }")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Columns, A::Error> {
                let mut columns: Vec<(String, Column)> = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if columns.iter().any(|(known, _)| *known == name) {
                        return Err(de::Error::custom(format_args!("column '{name}' is written twice")));
                    }
                    columns.push((name, map.next_value()?));
                }
                if columns.is_empty() {
                    return Err(de::Error::custom("a source needs at least one column"));
                }
                Ok(Columns(columns))
            }
        }
        deserializer.deserialize_map(Named)
    }
}

impl JsonSchema for Columns {
    fn schema_name() -> Cow<'static, str> {
        "GeneratedColumns".into()
    }

    fn schema_id() -> Cow<'static, str> {
        concat!(module_path!(), "::Columns").into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let column = generator.subschema_for::<Column>();
        json_schema!({
            "description": "Column names and what fills them, in order.",
            "type": "object",
            "minProperties": 1,
            "additionalProperties": column
        })
    }
}

impl Column {
    fn data_type(&self) -> DataType {
        match self {
            Column::Sequence => DataType::Int64,
            Column::Now | Column::Time(_) => DataType::Timestamp(TimeUnit::Millisecond, Some("UTC".into())),
            Column::Constant(_) | Column::Choice(_) => DataType::Utf8,
            Column::Uniform(..) | Column::Normal(..) | Column::Sine(_) => DataType::Float64,
        }
    }

    /// What is wrong with it: the key it is about, the fault and the remedy.
    fn fault(&self) -> Option<(&'static str, &'static str, &'static str)> {
        match self {
            Column::Choice(of) if of.is_empty() => Some(("choice", "there is nothing to choose from", "write at least one text")),
            Column::Uniform(low, high) if low > high => {
                Some(("uniform", "the first number is above the second", "write [low, high]"))
            }
            Column::Normal(_, deviation) if *deviation < 0.0 => {
                Some(("normal", "the standard deviation is negative", "write [mean, standard deviation]"))
            }
            Column::Sine(Sine { period, .. }) if *period <= 0.0 => {
                Some(("sine/period", "a wave has more than zero rows", "write the number of rows in one wave"))
            }
            _ => None,
        }
    }

    /// The column's values in these rows.
    fn values(&self, rows: Range<u64>, seed: u64) -> ArrayRef {
        let random = |row: u64| Rng::with_seed(scatter(seed ^ row));
        match self {
            Column::Sequence => Arc::new(Int64Array::from_iter_values(rows.map(|row| row as i64))),
            Column::Now => {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64);
                Arc::new(TimestampMillisecondArray::from_iter_values(rows.map(|_| now)).with_timezone("UTC"))
            }
            Column::Time(time) => {
                Arc::new(TimestampMillisecondArray::from_iter_values(rows.map(|row| time.millis(row))).with_timezone("UTC"))
            }
            Column::Constant(text) => Arc::new(StringArray::from_iter_values(rows.map(|_| text))),
            Column::Choice(of) => Arc::new(StringArray::from_iter_values(rows.map(|row| &of[random(row).usize(0..of.len())]))),
            Column::Uniform(low, high) => {
                Arc::new(Float64Array::from_iter_values(rows.map(|row| low + (high - low) * random(row).f64())))
            }
            Column::Normal(mean, deviation) => {
                Arc::new(Float64Array::from_iter_values(rows.map(|row| mean + deviation * standard_normal(&mut random(row)))))
            }
            Column::Sine(Sine { period, amplitude }) => {
                Arc::new(Float64Array::from_iter_values(rows.map(|row| amplitude * (TAU * (row as f64 / period).fract()).sin())))
            }
        }
    }
}

impl Time {
    /// The time of a row, in milliseconds since 1970.
    fn millis(&self, row: u64) -> i64 {
        let since = (self.step.0.as_nanos() as i128).saturating_mul(i128::from(row));
        let nanos = i128::from(self.start.0).saturating_add(since);
        nanos.div_euclid(1_000_000) as i64
    }
}

/// Spreads the bits of a number over the whole of it, so that neighbours become unlike: the finaliser of SplitMix64
/// (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
fn scatter(number: u64) -> u64 {
    let z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A number of the standard normal distribution, by the Box-Muller transform.
fn standard_normal(random: &mut Rng) -> f64 {
    let radius = (-2.0 * (1.0 - random.f64()).ln()).sqrt();
    radius * (TAU * random.f64()).cos()
}

impl SourceConfig for GenerateConfig {
    const NAME: &'static str = "generate";
    const EXAMPLE: &'static str = "generate: { rows: 1000, rate: 100, columns: { id: sequence, \
        device: { choice: [a, b] }, value: { normal: [20, 0.5] }, ts: { time: { start: \"2026-01-01T00:00:00Z\", step: 20ms } } } }";

    fn plan(self, _: &PlanContext) -> Planned<SourcePlan> {
        let mut problems = Vec::new();
        if let Some(rate) = self.rate.filter(|rate| !rate.is_finite() || *rate <= 0.0) {
            let problem = Problem::new("bad-value", "/rate", format!("{rate} rows per second is not a rate"));
            problems.push(problem.help("write a number above 0, or leave it out for as many as the pipeline takes"));
        }
        for (name, column) in &self.columns.0 {
            if let Some((key, fault, remedy)) = column.fault() {
                let name = name.replace('~', "~0").replace('/', "~1");
                problems.push(Problem::new("bad-value", format!("/columns/{name}/{key}"), fault).help(remedy));
            }
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        let field = |(name, column): &(String, Column)| Field::new(name, column.data_type(), false);
        let schema = Arc::new(ArrowSchema::new(self.columns.0.iter().map(field).collect::<Vec<_>>()));
        let (rows, plan) = (self.rows, Arc::new((self, Arc::clone(&schema))));
        Ok(SourcePlan {
            schema,
            replay: Replay::Exact,
            bounded: rows.is_some(),
            in_flight: None,
            moves: None,
            build: Arc::new(move |_: &BuildContext| -> Result<Box<dyn Source>> {
                let (config, schema) = (plan.0.clone(), Arc::clone(&plan.1));
                Ok(Box::new(Generate { config, schema, next: 0, anchor: None }))
            }),
        })
    }
}

/// The running source.
struct Generate {
    config: GenerateConfig,
    schema: SchemaRef,
    /// Number of the row that comes next.
    next: u64,
    /// When the first row of this run was due, and its number.
    anchor: Option<(Instant, u64)>,
}

/// Where the source stands.
#[derive(Serialize, Deserialize)]
struct Row {
    row: u64,
}

impl Generate {
    /// Waits until the next row is due and tells how many are by then: at least one.
    async fn due(&mut self, rate: f64) -> u64 {
        let (start, first) = *self.anchor.get_or_insert_with(|| (Instant::now(), self.next));
        let made = self.next - first;
        let until_due = Duration::try_from_secs_f64(made as f64 / rate).unwrap_or(LONGEST_WAIT).min(LONGEST_WAIT);
        sleep_until(start + until_due).await;
        let due = (start.elapsed().as_secs_f64() * rate) as u64;
        // The rounding of a product must not say that the row is not due after all.
        due.saturating_add(1).saturating_sub(made).max(1)
    }
}

#[async_trait]
impl Source for Generate {
    async fn open(&mut self, from: Option<&Position>) -> Result<()> {
        self.next = from.map(Position::read::<Row>).transpose()?.map_or(0, |position| position.row);
        self.anchor = None;
        Ok(())
    }

    async fn next(&mut self) -> Result<Pulled> {
        let left = self.config.rows.map_or(u64::MAX, |rows| rows.saturating_sub(self.next));
        if left == 0 {
            return Ok(Pulled::End);
        }
        let due = match self.config.rate {
            Some(rate) => self.due(rate).await,
            None => {
                tokio::task::coop::consume_budget().await;
                u64::MAX
            }
        };
        let rows = self.next..self.next + due.min(left).min(self.config.batch_rows.get() as u64);
        let seed_of = |index: usize| scatter(scatter(self.config.seed).wrapping_add(index as u64));
        let columns = self
            .config
            .columns
            .0
            .iter()
            .enumerate()
            .map(|(index, (_, column))| column.values(rows.clone(), seed_of(index)))
            .collect();
        let batch = RecordBatch::try_new(Arc::clone(&self.schema), columns).map_err(Error::fatal)?;
        self.next = rows.end;
        Ok(Pulled::Batch(Batch::new(batch)))
    }

    fn position(&self) -> Position {
        Position::of(&Row { row: self.next })
    }

    async fn commit(&mut self, _: &Position) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use afferent_engine::metrics::Metrics;
    use arrow::array::AsArray;
    use arrow::compute::concat_batches;
    use arrow::datatypes::{Float64Type, Int64Type, TimestampMillisecondType};

    use super::*;

    const COLUMNS: &str = r#"{"id":"sequence","device":{"choice":["a","b"]},"u":{"uniform":[10.0,20.0]},
        "n":{"normal":[5,2]},"s":{"sine":{"period":100,"amplitude":3}},"c":{"constant":"x"},
        "ts":{"time":{"start":"2026-01-01T00:00:00Z","step":"20ms"}}}"#;

    fn plan(options: &str, columns: &str) -> Planned<SourcePlan> {
        let config: GenerateConfig = serde_json::from_str(&format!("{{{options}\"columns\":{columns}}}")).unwrap();
        config.plan(&PlanContext::default())
    }

    fn source(options: &str, columns: &str) -> Box<dyn Source> {
        let context = BuildContext {
            pipeline: "p".into(),
            stage: "s".into(),
            data_dir: ".".into(),
            run: 1,
            metrics: Metrics::new().unwrap().stage("p", "s"),
        };
        let plan = plan(options, columns).unwrap_or_else(|problems| panic!("{problems:?}"));
        (plan.build)(&context).unwrap()
    }

    async fn drain(source: &mut dyn Source) -> Vec<RecordBatch> {
        let mut batches = Vec::new();
        loop {
            match source.next().await.unwrap() {
                Pulled::Batch(batch) => batches.push(batch.into_records()),
                Pulled::End => return batches,
                other => panic!("{other:?}"),
            }
        }
    }

    #[tokio::test]
    async fn a_resumed_run_yields_the_rows_of_an_unbroken_one() {
        let mut whole = source("\"rows\":3000,", COLUMNS);
        whole.open(None).await.unwrap();
        let whole = drain(&mut *whole).await;
        assert_eq!(whole.iter().map(RecordBatch::num_rows).collect::<Vec<_>>(), [1024, 1024, 952]);
        let schema = whole[0].schema();
        let whole = concat_batches(&schema, &whole).unwrap();

        let options = "\"rows\":3000,\"batch_rows\":7,";
        let mut first = source(options, COLUMNS);
        first.open(None).await.unwrap();
        let mut parts = Vec::new();
        for _ in 0..50 {
            let Pulled::Batch(batch) = first.next().await.unwrap() else { panic!("ended early") };
            parts.push(batch.into_records());
        }
        let mut second = source(options, COLUMNS);
        second.open(Some(&first.position())).await.unwrap();
        parts.extend(drain(&mut *second).await);
        assert_eq!(concat_batches(&schema, &parts).unwrap(), whole);
    }

    #[tokio::test]
    async fn values_are_what_their_kind_says() {
        let mut source = source("\"rows\":10000,\"batch_rows\":10000,", COLUMNS);
        source.open(None).await.unwrap();
        let rows = drain(&mut *source).await.remove(0);
        assert_eq!(rows.column(0).as_primitive::<Int64Type>().value(9_999), 9_999);
        let devices: Vec<&str> = rows.column(1).as_string::<i32>().iter().flatten().collect();
        let share = devices.iter().filter(|device| **device == "a").count();
        assert!((4_700..5_300).contains(&share), "{share}");
        let uniform = rows.column(2).as_primitive::<Float64Type>().values().to_vec();
        assert!(uniform.iter().all(|value| (10.0..20.0).contains(value)));
        let normal = rows.column(3).as_primitive::<Float64Type>().values().to_vec();
        let mean = normal.iter().sum::<f64>() / 1e4;
        let variance = normal.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / 1e4;
        assert!((mean - 5.0).abs() < 0.1 && (variance - 4.0).abs() < 0.3, "{mean} {variance}");
        let (mean_u, mean_n) = (uniform.iter().sum::<f64>() / 1e4, mean);
        let together = uniform.iter().zip(&normal).map(|(u, n)| (u - mean_u) * (n - mean_n)).sum::<f64>() / 1e4;
        assert!(together.abs() < 0.3, "columns hang together: covariance {together}");
        let sine = rows.column(4).as_primitive::<Float64Type>();
        assert!((sine.value(25) - 3.0).abs() < 1e-9 && sine.value(100).abs() < 1e-9);
        assert_eq!(rows.column(5).as_string::<i32>().value(77), "x");
        let times = rows.column(6).as_primitive::<TimestampMillisecondType>();
        assert_eq!(times.value(0), 1_767_225_600_000);
        assert_eq!(times.value(50), 1_767_225_601_000);
    }

    #[tokio::test]
    async fn another_seed_gives_other_values() {
        let columns = r#"{"u":{"uniform":[0,1]}}"#;
        let mut values = Vec::new();
        for options in ["\"rows\":5,", "\"rows\":5,\"seed\":1,"] {
            let mut source = source(options, columns);
            source.open(None).await.unwrap();
            values.push(drain(&mut *source).await.remove(0));
        }
        assert_ne!(values[0], values[1]);
    }

    #[tokio::test(start_paused = true)]
    async fn keeps_its_rate_and_catches_up_after_a_pause() {
        let mut source = source("\"rows\":40,\"rate\":10,", r#"{"id":"sequence"}"#);
        source.open(None).await.unwrap();
        let start = Instant::now();
        for _ in 0..11 {
            let Pulled::Batch(batch) = source.next().await.unwrap() else { panic!("ended early") };
            assert_eq!(batch.rows(), 1);
        }
        let second = start.elapsed();
        assert!(second >= Duration::from_secs(1) && second < Duration::from_millis(1_020), "{second:?}");
        tokio::time::advance(Duration::from_secs(2)).await;
        let Pulled::Batch(batch) = source.next().await.unwrap() else { panic!("ended early") };
        assert!((19..=20).contains(&batch.rows()), "{}", batch.rows());
        let rest: usize = drain(&mut *source).await.iter().map(RecordBatch::num_rows).sum();
        assert_eq!(11 + batch.rows() + rest, 40);
    }

    #[test]
    fn faults_are_found_while_planning_each_in_its_place() {
        let columns = r#"{"a/b":{"choice":[]},"u":{"uniform":[2,1]},"s":{"sine":{"period":0,"amplitude":1}}}"#;
        let problems = plan("\"rate\":0,", columns).err().unwrap();
        let places: Vec<&str> = problems.iter().map(|problem| problem.path.as_str()).collect();
        assert_eq!(places, ["/rate", "/columns/a~1b/choice", "/columns/u/uniform", "/columns/s/sine/period"]);
    }

    #[test]
    fn the_example_is_read_and_what_is_not_known_is_refused() {
        let stage: std::collections::BTreeMap<String, GenerateConfig> = serde_saphyr::from_str(GenerateConfig::EXAMPLE).unwrap();
        let plan = stage["generate"].clone().plan(&PlanContext::default()).map_err(|p| format!("{p:?}")).unwrap();
        let names: Vec<&str> = plan.schema.fields().iter().map(|field| field.name().as_str()).collect();
        assert_eq!(names, ["id", "device", "value", "ts"]);
        assert!(plan.bounded);
        for columns in
            ["{}", r#"{"a":"sequnce"}"#, r#"{"a":{"sine":{"period":1,"amplitude":1,"phase":0}}}"#, r#"{"a":{"uniform":[1]}}"#]
        {
            let text = format!("{{\"columns\":{columns}}}");
            assert!(serde_json::from_str::<GenerateConfig>(&text).is_err(), "{columns}");
        }
        assert!(serde_json::from_str::<GenerateConfig>(r#"{"columns":{"a":"sequence"},"row":1}"#).is_err());
    }
}
