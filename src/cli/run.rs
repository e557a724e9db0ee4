//! `afferent run`: runs pipelines until their input ends or a signal drains them.

use std::fs::File;
use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use afferent_connectors::table::DeadLetterTable;
use afferent_engine::checkpoint::Checkpoints;
use afferent_engine::config::Interval;
use afferent_engine::durable;
use afferent_engine::metrics::Metrics;
use afferent_engine::sabotage::Planted;
use afferent_engine::supervisor::{self, CountedDeadLetters, DeadLetters, Opening, Options, Restore, RunError};
use afferent_engine::{Ending, Runtimes};
use afferent_pipelines::Plan;
use anyhow::{Context, bail};
use clap::Args;
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::files::Checked;
use super::{FAILED, Places, colours, print};
use crate::catalog::{self, Shared};
use crate::live::{self, Counted, Live};
use crate::logging::{self, LogFormat};
use crate::{broker, metrics_listener};

/// How long the next pipeline waits for the sources of the one before. A broker on the network answers within it; one
/// that is not there must not keep the others from working.
const OPENING_LIMIT: Duration = Duration::from_secs(5);

/// Run pipelines until their input ends or Ctrl-C drains them.
#[derive(Args)]
#[command(after_help = "Ctrl-C or SIGTERM drains: nothing more is taken in, what has come in is processed and
committed, and positions are kept for the next start. A second Ctrl-C stops at once.

Several pipelines start in the order of their files, each when the sources of the one before
are open: name who listens before who sends.

Exit code: 0 ended or drained, 1 failed, 2 wrong usage.

Examples:
  afferent run pipeline.yaml
  afferent run --with-broker --metrics-listen 127.0.0.1:9100 watch.yaml devices.yaml
  afferent run --fresh pipeline.yaml")]
pub struct Run {
    /// Pipeline files; each runs on its own, all in this process, started in this order
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    #[command(flatten)]
    places: Places,
    /// Forget positions and state, and start over; rows already in tables stay
    #[arg(long)]
    fresh: bool,
    /// Go on although stages have changed, without their stored state; a changed source begins again
    #[arg(long, conflicts_with = "fresh")]
    allow_non_restored_state: bool,
    /// Start the embedded MQTT broker, too (in memory only; for trials)
    #[arg(long, value_name = "ADDRESS", num_args = 0..=1, default_missing_value = "127.0.0.1:1883")]
    with_broker: Option<SocketAddr>,
    /// Serve Prometheus metrics at http://ADDRESS/metrics
    #[arg(long, value_name = "ADDRESS")]
    metrics_listen: Option<SocketAddr>,
    /// Drain after this long, such as 60s
    #[arg(long = "for", value_name = "TIME", value_parser = interval)]
    run_for: Option<Duration>,
    /// How long draining may take
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = interval)]
    drain_limit: Duration,
    /// Log lines instead of the live view on a terminal
    #[arg(long)]
    no_live: bool,
    /// How log lines look
    #[arg(long, default_value = "text")]
    log_format: LogFormat,
}

fn interval(text: &str) -> Result<Duration, String> {
    serde_json::from_value::<Interval>(serde_json::Value::String(text.to_owned()))
        .map(|interval| interval.0)
        .map_err(|e| e.to_string())
}

impl Run {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let shared = self.places.shared();
        let Some(plans) = self.plans(&shared)? else { return Ok(ExitCode::from(FAILED)) };
        let metrics = Metrics::new()?;
        // A sink that prints on the same terminal would tear the view.
        let prints = std::io::stdout().is_terminal()
            && plans.iter().flat_map(|plan| &plan.graph.nodes).any(|node| node.component == "stdout");
        let wanted = !self.no_live && !prints && self.log_format == LogFormat::Text;
        let live = Live::new(wanted && std::io::stderr().is_terminal(), metrics.clone());
        logging::start(self.log_format, live.writer());
        shared.log_model_runtime();
        let _lock = lock(&self.places.data.data_dir)?;
        let (io, compute) = runtimes()?;
        let runtimes = Runtimes { io: io.handle().clone(), compute: compute.handle().clone() };
        let code = io.block_on(self.all(plans, runtimes, &metrics, live));
        // Tasks that hang in a client library must not keep an ended process alive.
        io.shutdown_timeout(Duration::from_secs(1));
        compute.shutdown_timeout(Duration::from_secs(1));
        code
    }

    /// Checks all files; `None` after printing what is wrong.
    fn plans(&self, shared: &Shared) -> anyhow::Result<Option<Vec<Plan>>> {
        let registry = catalog::registry();
        let mut plans: Vec<Plan> = Vec::new();
        let mut sound = true;
        for file in &self.files {
            let checked = match Checked::read(file, &registry, shared) {
                Ok(checked) => checked,
                Err(error) => {
                    eprintln!("error: {error:#}");
                    sound = false;
                    continue;
                }
            };
            eprint!("{}", checked.report(colours(&std::io::stderr())));
            match checked.plan {
                Some(plan) if plans.iter().any(|other| other.name == plan.name) => {
                    bail!("two of these files are named `{}`; a name stands for one set of checkpoints", plan.name)
                }
                Some(plan) => plans.push(plan),
                None => sound = false,
            }
        }
        Ok(sound.then_some(plans))
    }

    async fn all(&self, plans: Vec<Plan>, runtimes: Runtimes, metrics: &Metrics, mut live: Live) -> anyhow::Result<ExitCode> {
        if let Some(address) = self.with_broker {
            let bound = broker::start(address).await?;
            tracing::info!("the embedded broker serves mqtt://{bound}, in memory only");
        }
        if let Some(address) = self.metrics_listen {
            let bound = metrics_listener::start(address, metrics.clone()).await?;
            tracing::info!("metrics at http://{bound}/metrics");
        }
        let drain = CancellationToken::new();
        self.watch_signals(drain.clone())?;
        let table: Arc<Mutex<dyn DeadLetters>> = Arc::new(Mutex::new(DeadLetterTable::new(&self.places.data.data_dir)));
        let mut pipelines = Vec::new();
        for mut plan in plans {
            for path in &plan.guarantees {
                tracing::info!(pipeline = %plan.name, "{} -> {}: {}", path.source, path.sink, path.guarantee.word());
            }
            live.add(&plan);
            let (dead_letters, tabled) = CountedDeadLetters::new(Arc::clone(&table));
            let options = Options {
                store: Arc::new(Checkpoints::open(&self.checkpoints(&plan.name))?),
                data_dir: self.places.data.data_dir.clone(),
                metrics: metrics.clone(),
                runtimes: runtimes.clone(),
                drain: drain.clone(),
                drain_limit: self.drain_limit,
                dead_letters: Some(Arc::new(Mutex::new(dead_letters))),
                restore: self.restore(),
                seed: u64::from(std::process::id()),
                planted: Planted::from_env(),
                virtual_time: false,
            };
            let opening = Opening::watch(&mut plan.graph, &options)?;
            pipelines.push(Pipeline { plan, options, opening, tabled });
        }
        let showing = tokio::spawn(live.show());
        let mut running = JoinSet::new();
        let mut pipelines = pipelines.into_iter().peekable();
        while let Some(Pipeline { plan, options, opening, tabled }) = pipelines.next() {
            let (name, over) = (plan.name.clone(), CancellationToken::new());
            let ending = over.clone().drop_guard();
            running.spawn(async move {
                let _ending = ending;
                let ended = supervisor::run(&plan.graph, &options).await;
                (plan.name, ended, tabled.load(Ordering::Relaxed))
            });
            let Some(next) = pipelines.peek() else { break };
            tokio::select! {
                () = opening.complete() => {}
                () = over.cancelled() => {}
                () = drain.cancelled() => {}
                () = sleep(OPENING_LIMIT) => tracing::warn!(
                    pipeline = %name,
                    "its sources are not open after {OPENING_LIMIT:?}; starting `{}` all the same",
                    next.plan.name
                ),
            }
        }
        let mut code = ExitCode::SUCCESS;
        let mut endings = Vec::new();
        while let Some(joined) = running.join_next().await {
            let (name, ended, tabled) = joined.context("a pipeline ended abruptly")?;
            let aside = aside(tabled, &live::dropped(&metrics.render(), &name));
            endings.push(self.tell(&name, ended, &aside, &mut code));
        }
        showing.abort();
        // The live view leaves its last picture; what it came to goes below.
        let _ = showing.await;
        for ending in endings {
            eprintln!("{ending}");
        }
        Ok(code)
    }

    /// The last line of a pipeline; `aside` is what did not arrive at a sink.
    fn tell(&self, name: &str, ended: Result<Ending, RunError>, aside: &str, code: &mut ExitCode) -> String {
        match ended {
            Ok(Ending::Ended) => format!("{name}: ended, all input read and committed{aside}"),
            Ok(Ending::Drained) => {
                format!("{name}: drained, everything taken in is committed{aside}; run again to go on")
            }
            Err(RunError::AlreadyRead) => format!("{name}: input already read; --fresh starts over"),
            Err(error) => {
                *code = ExitCode::from(FAILED);
                match error {
                    RunError::Changed(_) => format!(
                        "error: {name}: {error}\n  --allow-non-restored-state goes on without the state of those stages; a changed source begins again as at its first start\n  --fresh starts over"
                    ),
                    RunError::DrainLimit(_) => {
                        format!("error: {name}: {error}; what was not committed will be processed at the next start")
                    }
                    _ => format!("error: {name}: {error}"),
                }
            }
        }
    }

    fn restore(&self) -> Restore {
        match (self.fresh, self.allow_non_restored_state) {
            (true, _) => Restore::Fresh,
            (_, true) => Restore::AllowNonRestored,
            _ => Restore::Strict,
        }
    }

    fn checkpoints(&self, pipeline: &str) -> PathBuf {
        self.places.data.data_dir.join("pipelines").join(pipeline).join("checkpoint.redb")
    }

    /// First signal (or the end of `--for`): drain. Second signal: stop at once.
    fn watch_signals(&self, drain: CancellationToken) -> anyhow::Result<()> {
        let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        let run_for = self.run_for;
        tokio::spawn(async move {
            let mut signalled = false;
            tokio::select! {
                _ = interrupt.recv() => signalled = true,
                _ = terminate.recv() => signalled = true,
                () = async { match run_for { Some(time) => tokio::time::sleep(time).await, None => std::future::pending().await } } => {}
            }
            if signalled {
                tracing::info!("draining; once more to stop at once");
            }
            drain.cancel();
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            let _ = print("");
            eprintln!("stopped at once; what was not committed will be processed at the next start");
            std::process::exit(i32::from(FAILED));
        });
        Ok(())
    }
}

/// A pipeline that is ready to be started.
struct Pipeline {
    plan: Plan,
    options: Options,
    opening: Opening,
    /// Rows that went to the dead-letter table.
    tabled: Arc<AtomicU64>,
}

/// What the last line says of rows that took another way than to a sink; nothing when there are none.
fn aside(tabled: u64, dropped: &Counted) -> String {
    let rows = |count: u64| if count == 1 { "1 row".to_owned() } else { format!("{count} rows") };
    let mut told = Vec::new();
    if tabled > 0 {
        told.push(format!("{} in dead_letters", rows(tabled)));
    }
    if !dropped.is_empty() {
        told.push(format!("{} dropped ({})", rows(dropped.rows()), dropped.reasons()));
    }
    if told.is_empty() { String::new() } else { format!("; {}", told.join(", ")) }
}

/// One thread serves sockets and waits, the others compute.
fn runtimes() -> anyhow::Result<(Runtime, Runtime)> {
    let io = Builder::new_multi_thread().worker_threads(1).thread_name("io").enable_all().build()?;
    let compute = Builder::new_multi_thread().thread_name("compute").enable_all().build()?;
    Ok((io, compute))
}

/// The data directory belongs to one process; the lock goes with it.
fn lock(data_dir: &Path) -> anyhow::Result<File> {
    if data_dir.exists() && !data_dir.is_dir() {
        bail!("the data directory {} is a file; choose another with --data-dir", data_dir.display());
    }
    durable::create_dir(data_dir).with_context(|| format!("making the data directory {}", data_dir.display()))?;
    let path = data_dir.join("lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("opening {}", path.display()))?;
    if file.try_lock().is_err() {
        bail!(
            "the data directory {} is in use by another process; stop it, or choose another with --data-dir",
            data_dir.display()
        );
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_names_what_did_not_arrive() {
        let metrics = Metrics::new().unwrap();
        let told = |tabled| aside(tabled, &live::dropped(&metrics.render(), "p"));
        assert_eq!(told(0), "");
        assert_eq!(told(1), "; 1 row in dead_letters");
        metrics.stage("p", "w").dropped("incomplete_window").inc_by(5);
        assert_eq!(told(2), "; 2 rows in dead_letters, 5 rows dropped (w: incomplete_window)");
    }
}
