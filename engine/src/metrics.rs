//! What the engine measures at its edges, once, for every component. Names follow Prometheus:
//! `afferent_<what>_<unit>`, base units, `_total` for counters. `docs/metrics.md` lists them.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hdrhistogram::Histogram as Hdr;
use prometheus::core::{Collector, Desc};
use prometheus::proto::{LabelPair, Metric, MetricFamily, MetricType, Quantile, Summary};
use prometheus::{
    Counter, CounterVec, Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts,
    Registry, TextEncoder,
};

/// The quantiles of end-to-end latency that are shown.
const QUANTILES: [f64; 4] = [0.5, 0.9, 0.99, 0.999];

/// All metrics of a process: a plain value, passed to whoever measures or shows. Cloning shares it.
#[derive(Clone)]
pub struct Metrics {
    registry: Registry,
    families: Arc<Families>,
}

struct Families {
    rows: IntCounterVec,
    bytes: IntCounterVec,
    batches: IntCounterVec,
    process: CounterVec,
    queue_rows: GaugeVec,
    queue_bytes: GaugeVec,
    queue_fill: GaugeVec,
    send_wait: CounterVec,
    rejected: IntCounterVec,
    dropped: IntCounterVec,
    errors: IntCounterVec,
    retries: IntCounterVec,
    uncommitted_age: GaugeVec,
    epoch_duration: HistogramVec,
    epochs: IntCounterVec,
    restarts: IntCounterVec,
    latency: LatencyCollector,
}

impl Metrics {
    /// A fresh set, all zero.
    ///
    /// # Errors
    /// When two metrics have one name, which would be a fault of this function.
    pub fn new() -> Result<Self, prometheus::Error> {
        const STAGE: &[&str] = &["pipeline", "stage"];
        const PIPELINE: &[&str] = &["pipeline"];
        const DIRECTED: &[&str] = &["pipeline", "stage", "direction"];
        const REASONED: &[&str] = &["pipeline", "stage", "reason"];
        const CLASSED: &[&str] = &["pipeline", "stage", "class"];
        // An epoch is an fsync or more: from a fast disk's millisecond to a sink that is down for a minute.
        let epoch_buckets = prometheus::exponential_buckets(0.001, 2.0, 17)?;
        let families = Families {
            rows: IntCounterVec::new(
                Opts::new("afferent_rows_total", "Rows that entered (in) or left (out) a stage."),
                DIRECTED,
            )?,
            bytes: IntCounterVec::new(
                Opts::new("afferent_bytes_total", "Bytes of Arrow data that entered (in) or left (out) a stage."),
                DIRECTED,
            )?,
            batches: IntCounterVec::new(
                Opts::new("afferent_batches_total", "Batches that entered (in) or left (out) a stage."),
                DIRECTED,
            )?,
            process: CounterVec::new(Opts::new("afferent_process_seconds_total", "Time spent in the stage's own code."), STAGE)?,
            queue_rows: GaugeVec::new(Opts::new("afferent_queue_rows", "Rows waiting in front of a stage."), STAGE)?,
            queue_bytes: GaugeVec::new(Opts::new("afferent_queue_bytes", "Bytes waiting in front of a stage."), STAGE)?,
            queue_fill: GaugeVec::new(
                Opts::new("afferent_queue_fill_ratio", "Fill of the fullest queue in front of a stage, 0 to 1."),
                STAGE,
            )?,
            send_wait: CounterVec::new(
                Opts::new("afferent_send_wait_seconds_total", "Time a stage waited for room behind it: backpressure."),
                STAGE,
            )?,
            rejected: IntCounterVec::new(
                Opts::new("afferent_rejected_rows_total", "Rows that a stage could not process, by reason."),
                REASONED,
            )?,
            dropped: IntCounterVec::new(
                Opts::new("afferent_dropped_rows_total", "Rows that a stage dropped by a declared policy, by reason."),
                REASONED,
            )?,
            errors: IntCounterVec::new(Opts::new("afferent_errors_total", "Errors of a stage, by class."), CLASSED)?,
            retries: IntCounterVec::new(Opts::new("afferent_retries_total", "Calls of a stage that were repeated."), STAGE)?,
            uncommitted_age: GaugeVec::new(
                Opts::new("afferent_uncommitted_age_seconds", "Age of the oldest row that is not yet durable."),
                PIPELINE,
            )?,
            epoch_duration: HistogramVec::new(
                HistogramOpts::new("afferent_epoch_duration_seconds", "From an epoch's barrier to its commit.")
                    .buckets(epoch_buckets),
                PIPELINE,
            )?,
            epochs: IntCounterVec::new(Opts::new("afferent_epochs_total", "Epochs that were committed."), PIPELINE)?,
            restarts: IntCounterVec::new(
                Opts::new("afferent_restarts_total", "Restarts of a pipeline from its last epoch."),
                PIPELINE,
            )?,
            latency: LatencyCollector::new()?,
        };
        let registry = Registry::new();
        let collectors: [Box<dyn Collector>; 17] = [
            Box::new(families.rows.clone()),
            Box::new(families.bytes.clone()),
            Box::new(families.batches.clone()),
            Box::new(families.process.clone()),
            Box::new(families.queue_rows.clone()),
            Box::new(families.queue_bytes.clone()),
            Box::new(families.queue_fill.clone()),
            Box::new(families.send_wait.clone()),
            Box::new(families.rejected.clone()),
            Box::new(families.dropped.clone()),
            Box::new(families.errors.clone()),
            Box::new(families.retries.clone()),
            Box::new(families.uncommitted_age.clone()),
            Box::new(families.epoch_duration.clone()),
            Box::new(families.epochs.clone()),
            Box::new(families.restarts.clone()),
            Box::new(families.latency.clone()),
        ];
        for collector in collectors {
            registry.register(collector)?;
        }
        Ok(Self { registry, families: Arc::new(families) })
    }

    /// The metrics of one stage.
    pub fn stage(&self, pipeline: &str, stage: &str) -> StageMetrics {
        let f = &self.families;
        let of = [pipeline, stage];
        let (incoming, outgoing) = ([pipeline, stage, "in"], [pipeline, stage, "out"]);
        StageMetrics {
            families: Arc::clone(f),
            pipeline: pipeline.into(),
            stage: stage.into(),
            rows_in: f.rows.with_label_values(&incoming),
            rows_out: f.rows.with_label_values(&outgoing),
            bytes_in: f.bytes.with_label_values(&incoming),
            bytes_out: f.bytes.with_label_values(&outgoing),
            batches_in: f.batches.with_label_values(&incoming),
            batches_out: f.batches.with_label_values(&outgoing),
            process: f.process.with_label_values(&of),
            queue_rows: f.queue_rows.with_label_values(&of),
            queue_bytes: f.queue_bytes.with_label_values(&of),
            queue_fill: f.queue_fill.with_label_values(&of),
            fills: Arc::default(),
            send_wait: f.send_wait.with_label_values(&of),
            retries: f.retries.with_label_values(&of),
        }
    }

    /// The metrics of one pipeline as a whole.
    pub fn pipeline(&self, pipeline: &str) -> PipelineMetrics {
        let f = &self.families;
        PipelineMetrics {
            uncommitted_age: f.uncommitted_age.with_label_values(&[pipeline]),
            epoch_duration: f.epoch_duration.with_label_values(&[pipeline]),
            epochs: f.epochs.with_label_values(&[pipeline]),
            restarts: f.restarts.with_label_values(&[pipeline]),
        }
    }

    /// End-to-end latency of one sink.
    pub fn latency(&self, pipeline: &str, stage: &str) -> Latency {
        self.families.latency.of(pipeline, stage)
    }

    /// Everything, as Prometheus text (version 0.0.4).
    pub fn render(&self) -> String {
        let mut text = Vec::new();
        match TextEncoder::new().encode(&self.registry.gather(), &mut text) {
            Ok(()) => String::from_utf8_lossy(&text).into_owned(),
            Err(cause) => format!("# metrics cannot be written: {cause}\n"),
        }
    }
}

/// The metrics of one stage: handles, so that an update is one atomic addition.
#[derive(Clone)]
pub struct StageMetrics {
    families: Arc<Families>,
    pipeline: Arc<str>,
    stage: Arc<str>,
    /// Rows in.
    pub rows_in: IntCounter,
    /// Rows out.
    pub rows_out: IntCounter,
    /// Bytes in.
    pub bytes_in: IntCounter,
    /// Bytes out.
    pub bytes_out: IntCounter,
    /// Batches in.
    pub batches_in: IntCounter,
    /// Batches out.
    pub batches_out: IntCounter,
    /// Seconds in the stage's own code.
    pub process: Counter,
    /// Rows waiting in front.
    pub queue_rows: Gauge,
    /// Bytes waiting in front.
    pub queue_bytes: Gauge,
    /// Fill of the fullest queue in front.
    pub queue_fill: Gauge,
    /// Fill of each queue in front.
    fills: Arc<Mutex<Vec<f64>>>,
    /// Seconds waited for room behind.
    pub send_wait: Counter,
    /// Repeated calls.
    pub retries: IntCounter,
}

impl StageMetrics {
    /// One more queue in front of the stage.
    pub(crate) fn queue(&self) -> QueueFill {
        let mut fills = self.fills.lock().unwrap_or_else(PoisonError::into_inner);
        fills.push(0.0);
        QueueFill { gauge: self.queue_fill.clone(), fills: Arc::clone(&self.fills), at: fills.len() - 1 }
    }

    /// Rows rejected for `reason`.
    pub fn rejected(&self, reason: &str) -> IntCounter {
        self.families.rejected.with_label_values(&[&*self.pipeline, &*self.stage, reason])
    }

    /// Rows dropped for `reason`.
    pub fn dropped(&self, reason: &str) -> IntCounter {
        self.families.dropped.with_label_values(&[&*self.pipeline, &*self.stage, reason])
    }

    /// Errors of `class`.
    pub fn errors(&self, class: crate::Class) -> IntCounter {
        self.families.errors.with_label_values(&[&*self.pipeline, &*self.stage, class.as_str()])
    }
}

/// The fill of one of the queues in front of a stage; the stage's gauge shows the fullest.
pub(crate) struct QueueFill {
    gauge: Gauge,
    fills: Arc<Mutex<Vec<f64>>>,
    at: usize,
}

impl QueueFill {
    /// This queue is now so full, 0 to 1.
    pub(crate) fn set(&self, fill: f64) {
        // The gauge is set under the lock: else it could keep what another queue has meanwhile left behind.
        let mut fills = self.fills.lock().unwrap_or_else(PoisonError::into_inner);
        fills[self.at] = fill;
        self.gauge.set(fills.iter().copied().fold(0.0, f64::max));
    }
}

/// The metrics of one pipeline as a whole.
#[derive(Clone)]
pub struct PipelineMetrics {
    /// Age of the oldest row that is not durable, in seconds.
    pub uncommitted_age: Gauge,
    /// From barrier to commit, in seconds.
    pub epoch_duration: Histogram,
    /// Epochs committed.
    pub epochs: IntCounter,
    /// Restarts from the last epoch.
    pub restarts: IntCounter,
}

/// End-to-end latency of one sink, from ingest to written: an HDR histogram of microseconds up to an
/// hour with three significant digits.
#[derive(Clone)]
pub struct Latency(Arc<Mutex<Recorded>>);

struct Recorded {
    histogram: Hdr<u64>,
    seconds: f64,
}

impl Latency {
    fn like(template: &Hdr<u64>) -> Self {
        Self(Arc::new(Mutex::new(Recorded { histogram: Hdr::new_from(template), seconds: 0.0 })))
    }

    /// Adds `rows` rows that took this long.
    pub fn record(&self, latency: Duration, rows: u64) {
        let mut recorded = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX).max(1);
        recorded.histogram.saturating_record_n(micros, rows);
        recorded.seconds += latency.as_secs_f64() * rows as f64;
    }

    /// The latency that this share of the rows stayed below; zero when there were none.
    pub fn quantile(&self, quantile: f64) -> Duration {
        let recorded = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Duration::from_micros(recorded.histogram.value_at_quantile(quantile))
    }

    fn summary(&self) -> Summary {
        let recorded = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut summary = Summary::default();
        summary.set_sample_count(recorded.histogram.len());
        summary.set_sample_sum(recorded.seconds);
        let quantiles = QUANTILES.map(|q| {
            let mut quantile = Quantile::default();
            quantile.set_quantile(q);
            quantile.set_value(recorded.histogram.value_at_quantile(q) as f64 / 1e6);
            quantile
        });
        summary.set_quantile(quantiles.to_vec());
        summary
    }
}

/// The sinks' latencies as one Prometheus summary; the prometheus crate has no summary of its own.
#[derive(Clone)]
struct LatencyCollector {
    desc: Desc,
    template: Hdr<u64>,
    sinks: Arc<Mutex<Vec<(String, String, Latency)>>>,
}

impl LatencyCollector {
    fn new() -> Result<Self, prometheus::Error> {
        let labels = vec!["pipeline".to_owned(), "stage".to_owned()];
        let help = "From a row's entry into the process to its being written by a sink.".to_owned();
        let desc = Desc::new("afferent_latency_seconds".to_owned(), help, labels, Default::default())?;
        let template = Hdr::new_with_bounds(1, 3_600_000_000, 3).map_err(|e| prometheus::Error::Msg(e.to_string()))?;
        Ok(Self { desc, template, sinks: Arc::default() })
    }

    fn of(&self, pipeline: &str, stage: &str) -> Latency {
        let mut sinks = self.sinks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((.., latency)) = sinks.iter().find(|(p, s, _)| p == pipeline && s == stage) {
            return latency.clone();
        }
        let latency = Latency::like(&self.template);
        sinks.push((pipeline.to_owned(), stage.to_owned(), latency.clone()));
        latency
    }
}

impl Collector for LatencyCollector {
    fn desc(&self) -> Vec<&Desc> {
        vec![&self.desc]
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let sinks = self.sinks.lock().unwrap_or_else(PoisonError::into_inner);
        let metrics: Vec<Metric> = sinks
            .iter()
            .map(|(pipeline, stage, latency)| {
                let labels = [("pipeline", pipeline), ("stage", stage)].map(|(name, value)| {
                    let mut label = LabelPair::default();
                    label.set_name(name.to_owned());
                    label.set_value(value.clone());
                    label
                });
                let mut metric = Metric::default();
                metric.set_label(labels.to_vec());
                metric.set_summary(latency.summary());
                metric
            })
            .collect();
        if metrics.is_empty() {
            return Vec::new();
        }
        let mut family = MetricFamily::default();
        family.set_name(self.desc.fq_name.clone());
        family.set_help(self.desc.help.clone());
        family.set_field_type(MetricType::SUMMARY);
        family.set_metric(metrics);
        vec![family]
    }
}
