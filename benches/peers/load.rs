//! The load over MQTT: readings of the shuttle as JSON messages of 200 bytes, who publishes them and who listens to
//! results. All of it runs in the bench's own process and is the same for both sides. The invariant: what is published
//! is acknowledged by the broker before a function here returns, so that the broker has it.

use std::fs;
use std::ops::Range;
use std::path::Path;
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};
use rumqttc::{AsyncClient, Event, EventLoop, MqttOptions, NetworkOptions, Packet, Publish, QoS};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::oneshot;
use tokio::time::{MissedTickBehavior, interval};

use crate::process::Process;
use crate::servers;

/// Bytes of a message.
const MESSAGE: usize = 200;
/// Devices that the readings are spread over.
const DEVICES: u64 = 10;
/// The device of the last reading of a backlog. Its result comes behind all others.
pub const LAST: &str = "last";
/// How long the listener may take to subscribe.
const SUBSCRIBE: Duration = Duration::from_secs(10);

/// Real readings of nine sensors, as JSON text.
pub struct Readings(Vec<String>);

impl Readings {
    /// Reads those of the example, by Afferent itself: from its Parquet file to JSON lines.
    ///
    /// # Errors
    /// When that fails.
    pub fn load() -> Result<Readings> {
        let folder = servers::scratch()?;
        let source = crate::consumer::root().join("examples/shuttle-anomaly/data/shuttle.parquet");
        let text = format!(
            "name: readings\nsources:\n  readings:\n    file: {{ path: \"{}\" }}\nsinks:\n  lines:\n    file: {{ path: lines.jsonl }}\n",
            source.display()
        );
        let pipeline = folder.path().join("readings.yaml");
        fs::write(&pipeline, text).with_context(|| format!("writing {}", pipeline.display()))?;
        let mut command = servers::afferent("run", folder.path())?;
        let mut process = Process::start("afferent", command.arg(&pipeline), &folder.path().join("log"))?;
        let status = process.ended(Duration::from_secs(120))?;
        if !status.success() {
            bail!("reading {} ended with {status}: {}", source.display(), process.log());
        }
        Readings::from_lines(&folder.path().join("lines.jsonl"))
    }

    fn from_lines(path: &Path) -> Result<Readings> {
        let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        let sensors = |line: &str| {
            let (begin, end) = (line.find("\"s1\"")?, line.find(",\"anomaly\"")?);
            line.get(begin..end).map(str::to_owned)
        };
        let readings: Option<Vec<String>> = text.lines().map(sensors).collect();
        let readings = readings.with_context(|| format!("{} is not as expected: {:?}", path.display(), text.lines().next()))?;
        if readings.is_empty() {
            bail!("{} is empty", path.display());
        }
        Ok(Readings(readings))
    }

    /// The message number `id`: 200 bytes unless the reading is longer.
    fn message(&self, id: u64, device: &str, stamp: i64) -> Vec<u8> {
        let sensors = usize::try_from(id).ok().and_then(|id| self.0.get(id % self.0.len())).map_or("", String::as_str);
        let mut text = format!("{{\"id\":{id},\"device\":\"{device}\",\"stamp\":{stamp},{sensors},\"note\":\"");
        while text.len() < MESSAGE - 2 {
            text.push('.');
        }
        text.push_str("\"}");
        text.into_bytes()
    }
}

/// Nanoseconds since 1970.
pub fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

fn runtime() -> Result<Runtime> {
    Builder::new_current_thread().enable_all().build().context("starting a runtime")
}

fn connect(port: u16, client_id: &str) -> (AsyncClient, EventLoop) {
    let mut options = MqttOptions::new(client_id, "127.0.0.1", port);
    options.set_keep_alive(Duration::from_secs(60)).set_inflight(1000);
    let (client, mut link) = AsyncClient::new(options, 1000);
    let mut network = NetworkOptions::new();
    network.set_tcp_nodelay(true);
    link.set_network_options(network);
    (client, link)
}

async fn send(client: &AsyncClient, readings: &Readings, id: u64, device: &str) -> Result<()> {
    let topic = format!("plant/{device}/reading");
    let sent = client.publish(topic, QoS::AtLeastOnce, false, readings.message(id, device, now())).await;
    sent.map_err(|error| anyhow!("publishing reading {id}: {error}"))
}

/// Returns when the broker has acknowledged `count` messages.
async fn settle(mut link: EventLoop, count: u64) -> Result<()> {
    let mut settled = 0;
    while settled < count {
        let event = link.poll().await.map_err(|error| anyhow!("publishing readings: {error}"))?;
        if let Event::Incoming(Packet::PubAck(_)) = event {
            settled += 1;
        }
    }
    Ok(())
}

fn device(id: u64) -> String {
    format!("shuttle-{}", id % DEVICES)
}

/// Publishes the readings `ids` at QoS 1, as fast as the broker takes them; the last of them is of the device [`LAST`]
/// when `mark` says so.
///
/// # Errors
/// When the connection breaks.
pub fn publish(port: u16, readings: &Readings, ids: Range<u64>, mark: bool) -> Result<()> {
    runtime()?.block_on(async {
        let (client, link) = connect(port, "peers-publisher");
        let count = ids.end - ids.start;
        let feed = async {
            for id in ids.clone() {
                if mark && id + 1 == ids.end {
                    send(&client, readings, id, LAST).await?;
                } else {
                    send(&client, readings, id, &device(id)).await?;
                }
            }
            Ok::<(), anyhow::Error>(())
        };
        tokio::try_join!(feed, settle(link, count)).map(|_| ())
    })
}

/// Publishes the readings 0 to `count` at QoS 1, `rate` a second in steps of a millisecond, and says how long it took.
///
/// # Errors
/// When the connection breaks.
pub fn publish_paced(port: u16, readings: &Readings, count: u64, rate: u64) -> Result<Duration> {
    let began = Instant::now();
    runtime()?.block_on(async {
        let (client, link) = connect(port, "peers-publisher");
        let feed = async {
            let mut timer = interval(Duration::from_millis(1));
            timer.set_missed_tick_behavior(MissedTickBehavior::Skip);
            let start = Instant::now();
            let mut sent = 0;
            while sent < count {
                timer.tick().await;
                let due = (start.elapsed().as_secs_f64() * rate as f64) as u64;
                while sent < due.min(count) {
                    send(&client, readings, sent, &device(sent)).await?;
                    sent += 1;
                }
            }
            Ok::<(), anyhow::Error>(())
        };
        tokio::try_join!(feed, settle(link, count)).map(|_| ())
    })?;
    Ok(began.elapsed())
}

/// A subscription with a thread of its own, which ends when this is dropped.
pub struct Listener {
    /// Its drop tells the thread to end.
    _stop: oneshot::Sender<()>,
}

impl Listener {
    /// Subscribes to `filter` and calls `on` with every message; returns when the broker has confirmed the
    /// subscription.
    ///
    /// # Errors
    /// When it does not within 10 s.
    pub fn start(port: u16, filter: &str, qos: u8, mut on: impl FnMut(&Publish) + Send + 'static) -> Result<Listener> {
        let (stop, stopped) = oneshot::channel::<()>();
        let (told, ready) = sync_channel::<()>(1);
        let filter = filter.to_owned();
        let runtime = runtime()?;
        let listening = async move {
            let (client, mut link) = connect(port, "peers-listener");
            let qos = if qos == 0 { QoS::AtMostOnce } else { QoS::AtLeastOnce };
            if client.subscribe(filter, qos).await.is_err() {
                return;
            }
            // A connection that breaks is seen by whoever waits for messages in vain.
            while let Ok(event) = link.poll().await {
                match event {
                    Event::Incoming(Packet::Publish(message)) => on(&message),
                    Event::Incoming(Packet::SubAck(_)) => {
                        let _ = told.send(());
                    }
                    _ => {}
                }
            }
        };
        thread::spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    () = listening => {}
                    _ = stopped => {}
                }
            });
        });
        ready.recv_timeout(SUBSCRIBE).context("waiting for the broker to confirm a subscription")?;
        Ok(Listener { _stop: stop })
    }
}
