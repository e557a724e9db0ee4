//! What `run` shows while it runs: on a terminal a live view of every stage (rows a second, queue fill,
//! latency, uncommitted age), otherwise a log line every ten seconds. Both read the metrics and nothing else, and both
//! name what was rejected or dropped, as the last line of a run does.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::time::{Duration, Instant};

use afferent_engine::graph::Role;
use afferent_engine::metrics::{Latency, Metrics, PipelineMetrics, StageMetrics};
use afferent_pipelines::Plan;
use indicatif::{MultiProgress, ProgressBar, ProgressFinish, ProgressStyle};
use tracing_subscriber::fmt::writer::BoxMakeWriter;

/// How often the view is drawn.
const DRAW_EVERY: Duration = Duration::from_millis(500);
/// How often a log line tells the same without a terminal.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// The view.
pub struct Live {
    screen: Option<MultiProgress>,
    metrics: Metrics,
    pipelines: Vec<ShownPipeline>,
}

struct ShownPipeline {
    name: String,
    metrics: PipelineMetrics,
    head: Option<ProgressBar>,
    stages: Vec<ShownStage>,
}

struct ShownStage {
    name: String,
    metrics: StageMetrics,
    /// Rows are counted where they leave, for sinks where they enter.
    sink: Option<Latency>,
    bar: Option<ProgressBar>,
    rows: u64,
}

impl Live {
    /// A view on the terminal, or log lines.
    pub fn new(terminal: bool, metrics: Metrics) -> Self {
        Self { screen: terminal.then(MultiProgress::new), metrics, pipelines: Vec::new() }
    }

    /// Where log lines go so that they do not tear the view.
    pub fn writer(&self) -> BoxMakeWriter {
        match &self.screen {
            Some(screen) => {
                let screen = screen.clone();
                BoxMakeWriter::new(move || AboveView { screen: screen.clone(), line: Vec::new() })
            }
            None => BoxMakeWriter::new(io::stderr),
        }
    }

    /// Shows this pipeline, too.
    pub fn add(&mut self, plan: &Plan) {
        let metrics = &self.metrics;
        let bar = |style: &str| {
            let screen = self.screen.as_ref()?;
            let style = ProgressStyle::with_template(style).ok()?.progress_chars("█▉▊▋▌▍▎▏ ");
            // Left as it is when the pipelines have ended: by default a bar takes itself off the screen.
            let bar = ProgressBar::new(1000).with_style(style).with_finish(ProgressFinish::Abandon);
            Some(screen.add(bar))
        };
        let head = bar("{msg}");
        let stages = plan.graph.nodes.iter().map(|node| ShownStage {
            name: node.name.clone(),
            metrics: metrics.stage(&plan.name, &node.name),
            sink: matches!(node.role, Role::Sink { .. }).then(|| metrics.latency(&plan.name, &node.name)),
            bar: bar("  {prefix:<18} {msg:>52}  queue {bar:12}"),
            rows: 0,
        });
        let stages = stages.collect();
        self.pipelines.push(ShownPipeline { name: plan.name.clone(), metrics: metrics.pipeline(&plan.name), head, stages });
    }

    /// Draws until dropped.
    pub async fn show(mut self) {
        let every = if self.screen.is_some() { DRAW_EVERY } else { LOG_EVERY };
        let mut last = Instant::now();
        loop {
            tokio::time::sleep(every).await;
            let elapsed = last.elapsed().as_secs_f64();
            last = Instant::now();
            let text = self.metrics.render();
            for pipeline in &mut self.pipelines {
                pipeline.draw(elapsed, &text);
            }
        }
    }
}

impl ShownPipeline {
    fn draw(&mut self, elapsed: f64, metrics: &str) {
        let mut head = format!(
            "{}  uncommitted {}  epochs {}  restarts {}",
            self.name,
            time(Duration::from_secs_f64(self.metrics.uncommitted_age.get().max(0.0))),
            self.metrics.epochs.get(),
            self.metrics.restarts.get()
        );
        for (word, counted) in [("rejected", rejected(metrics, &self.name)), ("dropped", dropped(metrics, &self.name))] {
            if !counted.is_empty() {
                head.push_str(&format!("  {word} {counted}"));
            }
        }
        let mut line = Vec::new();
        for stage in &mut self.stages {
            let told = stage.tell(elapsed);
            match &stage.bar {
                Some(bar) => {
                    bar.set_prefix(stage.name.clone());
                    bar.set_position((stage.metrics.queue_fill.get() * 1000.0) as u64);
                    bar.set_message(told);
                }
                None => line.push(format!("{} {}", stage.name, told)),
            }
        }
        match &self.head {
            Some(bar) => bar.set_message(head),
            None => tracing::info!("{head}: {}", line.join("; ")),
        }
    }
}

impl ShownStage {
    fn tell(&mut self, elapsed: f64) -> String {
        let rows = if self.sink.is_some() { self.metrics.rows_in.get() } else { self.metrics.rows_out.get() };
        let rate = (rows - self.rows.min(rows)) as f64 / elapsed.max(1e-3);
        self.rows = rows;
        let latency = match &self.sink {
            Some(latency) => format!("  p50 {} p99 {}", time(latency.quantile(0.5)), time(latency.quantile(0.99))),
            None => String::new(),
        };
        format!("{rate:.0} rows/s  {rows} rows{latency}")
    }
}

/// Rows that took another way than to a sink, by `stage: reason`; none with zero.
#[derive(Debug, Default, PartialEq)]
pub struct Counted(BTreeMap<String, u64>);

impl Counted {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many there are.
    pub fn rows(&self) -> u64 {
        self.0.values().sum()
    }

    /// Where and why; with numbers when that is more than one.
    pub fn reasons(&self) -> String {
        let one = self.0.len() == 1;
        let told = self.0.iter().map(|(reason, rows)| if one { reason.clone() } else { format!("{reason} {rows}") });
        told.collect::<Vec<_>>().join(", ")
    }
}

impl fmt::Display for Counted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.rows(), self.reasons())
    }
}

/// The rows of a pipeline that its stages could not process; `metrics` is Prometheus text.
pub fn rejected(metrics: &str, pipeline: &str) -> Counted {
    counted(metrics, "afferent_rejected_rows_total", pipeline)
}

/// The rows of a pipeline that were dropped by a declared policy; `metrics` is Prometheus text. What came to a `discard`
/// sink is not among them: that is where it was to go.
pub fn dropped(metrics: &str, pipeline: &str) -> Counted {
    let mut counted = counted(metrics, "afferent_dropped_rows_total", pipeline);
    counted.0.retain(|reason, _| !reason.ends_with(": discard"));
    counted
}

/// Prometheus writes labels in the order of their names: pipeline, reason, stage.
fn counted(metrics: &str, family: &str, pipeline: &str) -> Counted {
    let begin = format!("{family}{{pipeline=\"{pipeline}\",reason=\"");
    let counts = metrics.lines().filter_map(|line| {
        let (reason, rest) = line.strip_prefix(&begin)?.split_once("\",stage=\"")?;
        let (stage, rows) = rest.split_once("\"} ")?;
        Some((format!("{stage}: {reason}"), rows.parse::<u64>().ok()?))
    });
    Counted(counts.filter(|(_, rows)| *rows > 0).collect())
}

/// A length of time in about three digits.
fn time(duration: Duration) -> String {
    match duration.as_secs_f64() {
        s if s >= 1.0 => format!("{s:.1} s"),
        s if s >= 1e-3 => format!("{:.1} ms", s * 1e3),
        s => format!("{:.0} us", s * 1e6),
    }
}

/// Writes one log event above the view.
struct AboveView {
    screen: MultiProgress,
    line: Vec<u8>,
}

impl io::Write for AboveView {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.line.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for AboveView {
    fn drop(&mut self) {
        let text = String::from_utf8_lossy(&self.line);
        // The view is a convenience: when the terminal is gone, so is the line.
        let _ = self.screen.println(text.trim_end());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_rejected_or_dropped_is_named_where_there_is_any() {
        let metrics = Metrics::new().unwrap();
        let frames = metrics.stage("p", "frames");
        frames.dropped("incomplete_window").inc_by(5);
        frames.dropped("overflow");
        metrics.stage("p", "nowhere").dropped("discard").inc_by(100);
        metrics.stage("other", "frames").dropped("overflow").inc_by(7);
        let text = metrics.render();
        assert!(rejected(&text, "p").is_empty());
        assert_eq!(dropped(&text, "p").to_string(), "5 (frames: incomplete_window)");
        frames.dropped("overflow").inc();
        metrics.stage("p", "readings").rejected("malformed").inc_by(2);
        let text = metrics.render();
        assert_eq!(dropped(&text, "p").to_string(), "6 (frames: incomplete_window 5, frames: overflow 1)");
        assert_eq!((rejected(&text, "p").rows(), rejected(&text, "p").reasons()), (2, "readings: malformed".to_owned()));
    }
}
