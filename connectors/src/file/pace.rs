//! How fast recorded rows are emitted: all at once, or as they were recorded, or some times faster. Used by the
//! `file` source. The invariant: a row is never due before the rows ahead of it, and the distance of two due
//! instants is the distance of their event times divided by the factor, counted from the first row of this run.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use afferent_engine::Error;
use arrow::array::{Array, ArrayRef, AsArray, Int64Array};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Int64Type, TimeUnit};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use tokio::time::Instant;

/// Longest wait for one row; keeps instants representable when event times jump by centuries.
const LONGEST_WAIT: Duration = Duration::from_secs(365 * 24 * 3600);

/// How fast rows are emitted: `max`, `realtime`, or a factor such as `10x`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Pace {
    /// As fast as the pipeline takes them.
    #[default]
    Max,
    /// As many times faster than they were recorded; above 0, and 1 for `realtime`.
    Times(f64),
}

impl fmt::Display for Pace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Pace::Max => f.write_str("max"),
            Pace::Times(1.0) => f.write_str("realtime"),
            Pace::Times(factor) => write!(f, "{factor}x"),
        }
    }
}

impl Serialize for Pace {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Pace {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse(&text)
            .ok_or_else(|| de::Error::custom(format!("`{text}` is not a pace; write max, realtime or a factor such as 10x")))
    }
}

fn parse(text: &str) -> Option<Pace> {
    match text {
        "max" => Some(Pace::Max),
        "realtime" => Some(Pace::Times(1.0)),
        _ => {
            let digits = text.strip_suffix('x')?;
            // Narrower than Rust's own syntax of numbers, and the same as the JSON Schema's pattern.
            let (whole, fraction) = digits.split_once('.').unwrap_or((digits, "0"));
            let number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
            let factor: f64 = (number(whole) && number(fraction)).then(|| digits.parse().ok())??;
            (factor > 0.0).then_some(Pace::Times(factor))
        }
    }
}

impl JsonSchema for Pace {
    fn schema_name() -> Cow<'static, str> {
        "Pace".into()
    }

    fn schema_id() -> Cow<'static, str> {
        concat!(module_path!(), "::Pace").into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "description": "How fast recorded rows are emitted: `max`, `realtime`, or a factor such as `10x` or `0.5x`.",
            "pattern": "^(max|realtime|([0-9]*[1-9][0-9]*(\\.[0-9]+)?|[0-9]+\\.[0-9]*[1-9][0-9]*)x)$"
        })
    }
}

/// The event times of one batch.
pub struct EventTimes {
    /// Counted in `unit` since 1970.
    values: Int64Array,
    /// Seconds.
    unit: f64,
}

impl EventTimes {
    /// Reads a timestamp column.
    ///
    /// # Errors
    /// Fatal when it is no timestamp column, which planning has ruled out.
    pub fn of(column: &ArrayRef) -> afferent_engine::Result<Self> {
        let unit = match column.data_type() {
            DataType::Timestamp(TimeUnit::Second, _) => 1.0,
            DataType::Timestamp(TimeUnit::Millisecond, _) => 1e-3,
            DataType::Timestamp(TimeUnit::Microsecond, _) => 1e-6,
            DataType::Timestamp(TimeUnit::Nanosecond, _) => 1e-9,
            other => return Err(Error::fatal(format!("cannot pace rows by a column of type {other}: it is no timestamp"))),
        };
        let values = cast(column, &DataType::Int64).map_err(Error::fatal)?;
        Ok(Self { values: values.as_primitive::<Int64Type>().clone(), unit })
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    fn get(&self, row: usize) -> Option<i64> {
        self.values.is_valid(row).then(|| self.values.value(row))
    }
}

/// Says when rows are due. The first row that it sees is due at once; a row without an event time is due with
/// the row ahead of it.
pub struct Schedule {
    factor: f64,
    /// When the first row was due, and its event time.
    anchor: Option<(Instant, i64)>,
}

impl Schedule {
    /// A schedule that runs `factor` times faster than the recording.
    pub fn new(factor: f64) -> Self {
        Self { factor, anchor: None }
    }

    /// When row `row` is due, were it not for the rows ahead of it.
    pub fn due(&mut self, times: &EventTimes, row: usize) -> Instant {
        let now = Instant::now();
        let Some(time) = times.get(row) else { return now };
        let (start, first) = *self.anchor.get_or_insert((now, time));
        let recorded = time.saturating_sub(first).max(0) as f64 * times.unit;
        start + Duration::try_from_secs_f64(recorded / self.factor).unwrap_or(LONGEST_WAIT).min(LONGEST_WAIT)
    }

    /// One past the last row, from `row` on, that is due by now without a gap.
    pub fn due_until(&mut self, times: &EventTimes, mut row: usize) -> usize {
        let now = Instant::now();
        while row < times.len() && self.due(times, row) <= now {
            row += 1;
        }
        row
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::TimestampMillisecondArray;
    use tokio::time::advance;

    use super::*;

    fn read(text: &str) -> Option<Pace> {
        serde_json::from_value(serde_json::Value::from(text)).ok()
    }

    #[test]
    fn words_and_factors() {
        assert_eq!(read("max"), Some(Pace::Max));
        assert_eq!(read("realtime"), Some(Pace::Times(1.0)));
        assert_eq!(read("10x"), Some(Pace::Times(10.0)));
        assert_eq!(read("0.5x"), Some(Pace::Times(0.5)));
        for wrong in ["", "x", "0x", "0.0x", "-1x", "1e3x", "infx", ".5x", "5.x", "10", "fast", "10X"] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
        assert!(serde_json::from_str::<Pace>("10").is_err());
        for pace in [Pace::Max, Pace::Times(1.0), Pace::Times(2.5)] {
            assert_eq!(read(&pace.to_string()), Some(pace));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn distances_shrink_by_the_factor() {
        let column: ArrayRef =
            Arc::new(TimestampMillisecondArray::from(vec![Some(5_000), Some(6_000), None, Some(5_500), Some(9_000)]));
        let times = EventTimes::of(&column).unwrap();
        let mut schedule = Schedule::new(10.0);
        assert_eq!(schedule.due_until(&times, 0), 1, "only the first row is due at the start");
        let start = Instant::now();
        assert_eq!(schedule.due(&times, 1) - start, Duration::from_millis(100));
        advance(Duration::from_millis(99)).await;
        assert_eq!(schedule.due_until(&times, 1), 1);
        advance(Duration::from_millis(1)).await;
        assert_eq!(schedule.due_until(&times, 1), 4, "no time and an earlier time are due with the row ahead");
        assert_eq!(schedule.due(&times, 4) - start, Duration::from_millis(400));
    }

    #[test]
    fn only_timestamps_pace() {
        let column: ArrayRef = Arc::new(Int64Array::from(vec![1]));
        assert!(EventTimes::of(&column).is_err());
    }
}
