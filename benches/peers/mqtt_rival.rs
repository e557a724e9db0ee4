//! The rival in Rust over MQTT: what a good engineer writes in an afternoon for this one job, with rumqttc, Arrow's JSON
//! and ort. It runs in a process of its own, started by `consumer.rs`, until it is killed. The invariant is the one that
//! Afferent keeps: an input at QoS 1 is acknowledged only after its result's PUBACK has come and the file is on the disk.
//!
//! Two tasks keep the two connections, one loop does the work: it takes whatever has arrived (up to 1,024 messages),
//! scores it as one batch, publishes, and appends to the file. Every 50 ms, or when half of the broker's window is
//! unacknowledged, it commits, while the next batches go on. A broken connection ends the process: a supervisor
//! would start it again, and the broker's session sends again what was not acknowledged.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use arrow::array::{ArrayRef, AsArray, Float32Array, RecordBatch};
use arrow::datatypes::{DataType, Field, Float32Type, Schema, SchemaRef};
use arrow::json::reader::Decoder;
use arrow::json::{LineDelimitedWriter, ReaderBuilder};
use ort::environment::Environment;
use ort::logging::LogLevel;
use ort::session::{Session, SessionInputValue};
use ort::value::TensorRef;
use rumqttc::{AsyncClient, Event, EventLoop, MqttOptions, NetworkOptions, Outgoing, Packet, Publish, QoS};
use tokio::runtime::Builder;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::{MissedTickBehavior, interval};

use crate::pairs::progress;
use crate::servers::IN_FLIGHT;

/// Messages in one batch at most: Afferent's default.
const MOST_ROWS: usize = 1024;
/// Messages that wait here at most; more than the broker's window, so that at QoS 1 the connection is always read.
const INBOX: usize = 2048;
/// The least time between two commits: what Afferent's `mqtt` and `file` sinks ask for.
const COMMIT_EVERY: Duration = Duration::from_millis(50);
/// Sensors of a reading.
const SENSORS: usize = 9;

/// What it is told on the command line.
struct Setup {
    port: u16,
    qos_in: QoS,
    qos_out: QoS,
    model: PathBuf,
    output: PathBuf,
    threads: usize,
    encode_twice: bool,
}

impl Setup {
    fn parse(arguments: &[String]) -> Result<Setup> {
        let [port, qos_in, qos_out, model, output, threads, encodings] = arguments else {
            bail!("rival-mqtt takes PORT QOS_IN QOS_OUT MODEL OUTPUT THREADS ENCODINGS, and got {arguments:?}");
        };
        let qos = |text: &str| match text {
            "0" => Ok(QoS::AtMostOnce),
            "1" => Ok(QoS::AtLeastOnce),
            other => Err(anyhow!("the quality of service is `{other}`; write 0 or 1")),
        };
        Ok(Setup {
            port: port.parse().with_context(|| format!("reading the port `{port}`"))?,
            qos_in: qos(qos_in)?,
            qos_out: qos(qos_out)?,
            model: model.into(),
            output: output.into(),
            threads: threads.parse().with_context(|| format!("reading the number of threads `{threads}`"))?,
            encode_twice: encodings == "2",
        })
    }

    fn connect(&self, client_id: &str, keep_session: bool) -> (AsyncClient, EventLoop) {
        let mut options = MqttOptions::new(client_id, "127.0.0.1", self.port);
        let window = u16::try_from(IN_FLIGHT).unwrap_or(u16::MAX);
        options.set_keep_alive(Duration::from_secs(30)).set_clean_session(!keep_session).set_manual_acks(true);
        options.set_inflight(window);
        let (client, mut link) = AsyncClient::new(options, INBOX);
        let mut network = NetworkOptions::new();
        network.set_tcp_nodelay(true);
        link.set_network_options(network);
        (client, link)
    }
}

/// Runs until it is killed or a connection breaks. `arguments` are positional, see `consumer.rs`.
///
/// # Errors
/// When an argument is wrong, a message cannot be read, or a connection breaks.
pub fn rival(arguments: &[String]) -> Result<()> {
    let setup = Setup::parse(arguments)?;
    let runtime = match setup.threads {
        0 | 1 => Builder::new_current_thread().enable_all().build(),
        threads => Builder::new_multi_thread().worker_threads(threads).enable_all().build(),
    };
    runtime.context("starting the runtime")?.block_on(work(&setup))
}

async fn work(setup: &Setup) -> Result<()> {
    let mut scorer = Scorer::open(&setup.model)?;
    let file = File::options().create(true).append(true).open(&setup.output);
    let file = Arc::new(file.with_context(|| format!("opening {}", setup.output.display()))?);

    let mut links: JoinSet<Result<()>> = JoinSet::new();
    let (arrivals, mut inbox) = mpsc::channel(INBOX);
    let (settled, confirmed) = watch::channel(0_u64);
    let (subscriber, incoming) = setup.connect("rival-in", setup.qos_in == QoS::AtLeastOnce);
    let (publisher, outgoing) = setup.connect("rival-out", false);
    links.spawn(confirm(outgoing, settled, setup.qos_out));
    subscriber.subscribe("plant/+/reading", setup.qos_in).await.map_err(|error| anyhow!("subscribing: {error}"))?;
    links.spawn(receive(incoming, arrivals));

    let mut batch: Vec<Publish> = Vec::with_capacity(MOST_ROWS);
    // Of an acknowledgement only the packet's id is needed, not its payload.
    let mut unacknowledged: Vec<Publish> = Vec::new();
    let mut commits: JoinSet<Result<()>> = JoinSet::new();
    let (mut published, mut dirty, mut due) = (0_u64, false, false);
    let mut timer = interval(COMMIT_EVERY);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            taken = inbox.recv_many(&mut batch, MOST_ROWS) => {
                if taken == 0 {
                    bail!("the connection that receives has ended");
                }
                let results = scorer.score(&batch)?;
                let lines = encode(&results)?;
                let devices = results.column(1).as_string::<i32>();
                for (device, line) in devices.iter().zip(lines.split(|&byte| byte == b'\n')) {
                    let topic = format!("results/{}", device.unwrap_or_default());
                    let sent = publisher.publish(topic, setup.qos_out, false, line).await;
                    sent.map_err(|error| anyhow!("publishing: {error}"))?;
                }
                published += results.num_rows() as u64;
                let lines = if setup.encode_twice { encode(&results)? } else { lines };
                let mut output: &File = &file;
                output.write_all(&lines).context("writing the results")?;
                dirty = true;
                if setup.qos_in == QoS::AtLeastOnce {
                    unacknowledged.extend(batch.drain(..).map(|message| Publish {
                        pkid: message.pkid,
                        ..Publish::new("", message.qos, Vec::new())
                    }));
                }
                batch.clear();
            }
            Some(done) = commits.join_next(), if !commits.is_empty() => {
                done.context("a commit ended abruptly")??;
            }
            _ = timer.tick() => due = true,
            Some(ended) = links.join_next() => {
                ended.context("a connection's task ended abruptly")??;
                bail!("a connection has ended");
            }
        }
        if commits.is_empty() && dirty && (due || unacknowledged.len() >= IN_FLIGHT / 2) {
            // In a task of its own: the client's channel is smaller than a broker's window may be, and only gets
            // empty as long as this loop takes what arrives.
            let (inputs, subscriber) = (std::mem::take(&mut unacknowledged), subscriber.clone());
            let durable = commit(Arc::clone(&file), confirmed.clone(), published);
            commits.spawn(async move {
                durable.await?;
                for message in inputs {
                    subscriber.ack(&message).await.map_err(|error| anyhow!("acknowledging: {error}"))?;
                }
                Ok(())
            });
            (dirty, due) = (false, false);
        }
    }
}

/// Reads the connection that receives. A full inbox means that it is not read, which only happens at QoS 0.
async fn receive(mut link: EventLoop, arrivals: mpsc::Sender<Publish>) -> Result<()> {
    loop {
        match link.poll().await.map_err(|error| anyhow!("receiving: {error}"))? {
            Event::Incoming(Packet::Publish(message)) => {
                let sent = arrivals.send(message).await;
                if sent.is_err() {
                    return Ok(());
                }
            }
            Event::Incoming(Packet::SubAck(_)) => progress("ready"),
            _ => {}
        }
    }
}

/// Keeps the connection that publishes, and counts what has arrived at the broker (at QoS 0: what has gone out).
async fn confirm(mut link: EventLoop, settled: watch::Sender<u64>, qos: QoS) -> Result<()> {
    let mut count = 0;
    loop {
        match link.poll().await.map_err(|error| anyhow!("publishing: {error}"))? {
            Event::Incoming(Packet::PubAck(_)) => count += 1,
            Event::Outgoing(Outgoing::Publish(_)) if qos == QoS::AtMostOnce => count += 1,
            _ => continue,
        }
        settled.send_replace(count);
    }
}

/// Returns when the file is on the disk and the broker has the first `published` results.
async fn commit(file: Arc<File>, mut confirmed: watch::Receiver<u64>, published: u64) -> Result<()> {
    #[expect(clippy::disallowed_methods, reason = "this loop stands for one that does not know the engine")]
    let synced = spawn_blocking(move || file.sync_data());
    confirmed.wait_for(|count| *count >= published).await.context("the connection that publishes has ended")?;
    synced.await.context("a sync ended abruptly")?.context("syncing the results")
}

/// The rows as JSON, one line each.
fn encode(results: &RecordBatch) -> Result<Vec<u8>> {
    let mut lines = Vec::with_capacity(results.num_rows() * 96);
    let mut writer = LineDelimitedWriter::new(&mut lines);
    writer.write(results).context("encoding results")?;
    writer.finish().context("encoding results")?;
    Ok(lines)
}

/// Messages to scores.
struct Scorer {
    decoder: Decoder,
    session: Session,
    _environment: Environment,
    values: Vec<f32>,
    schema: SchemaRef,
}

impl Scorer {
    fn open(model: &Path) -> Result<Scorer> {
        let head = [
            Field::new("id", DataType::Int64, false),
            Field::new("device", DataType::Utf8, false),
            Field::new("stamp", DataType::Int64, false),
        ];
        let sensors = (1..=SENSORS).map(|sensor| Field::new(format!("s{sensor}"), DataType::Float32, false));
        let readings = Schema::new(head.iter().cloned().chain(sensors).collect::<Vec<_>>());
        let score = Field::new("score", DataType::Float32, false);
        let results = Schema::new(head.into_iter().chain([score]).collect::<Vec<_>>());
        let decoder = ReaderBuilder::new(Arc::new(readings)).with_batch_size(MOST_ROWS).build_decoder();

        let library = std::env::var_os("ORT_DYLIB_PATH").context("ORT_DYLIB_PATH does not name an ONNX Runtime")?;
        let builder = ort::init_from(&library).map_err(|error| anyhow!("loading {}: {error}", library.display()))?;
        let environment = builder.with_name("rival").with_telemetry(false).build();
        let environment = environment.map_err(|error| anyhow!("starting ONNX Runtime: {error}"))?;
        environment.set_log_level(LogLevel::Warning);
        let bytes = std::fs::read(model).with_context(|| format!("reading {}", model.display()))?;
        let session = session(&environment, &bytes).map_err(|error| anyhow!("opening {}: {error}", model.display()))?;
        Ok(Scorer {
            decoder: decoder.context("making the decoder")?,
            session,
            _environment: environment,
            values: Vec::new(),
            schema: Arc::new(results),
        })
    }

    fn score(&mut self, messages: &[Publish]) -> Result<RecordBatch> {
        for message in messages {
            let taken = self.decoder.decode(&message.payload).context("decoding a message")?;
            if taken != message.payload.len() {
                bail!("{} bytes of a message on `{}` are more than one reading", message.payload.len() - taken, message.topic);
            }
        }
        let readings = self.decoder.flush().context("decoding messages")?.context("the messages hold no reading")?;
        let (head, sensors) = readings.columns().split_at(readings.num_columns() - SENSORS);
        self.values.clear();
        self.values.resize(readings.num_rows() * SENSORS, 0.0);
        for (number, column) in sensors.iter().enumerate() {
            let column = column.as_primitive::<Float32Type>().values().iter();
            for (cell, value) in self.values.iter_mut().skip(number).step_by(SENSORS).zip(column) {
                *cell = *value;
            }
        }
        let scores =
            infer(&mut self.session, readings.num_rows(), &self.values).map_err(|error| anyhow!("running the model: {error}"))?;
        let scores: ArrayRef = Arc::new(Float32Array::from(scores));
        let columns = head.iter().cloned().chain([scores]).collect();
        RecordBatch::try_new(Arc::clone(&self.schema), columns).context("putting results together")
    }
}

fn session(environment: &Environment, model: &[u8]) -> ort::Result<Session> {
    let mut builder = Session::builder(environment)?.with_intra_threads(1)?;
    builder.commit_from_memory(model)
}

fn infer(session: &mut Session, rows: usize, values: &[f32]) -> ort::Result<Vec<f32>> {
    let readings: TensorRef<'_, f32> = TensorRef::from_array_view(([rows, SENSORS], values))?;
    let inputs: Vec<(&str, SessionInputValue<'_>)> = vec![("readings", readings.into())];
    let outputs = session.run(inputs)?;
    let (_, scores) = outputs["score"].try_extract_tensor::<f32>()?;
    Ok(scores.to_vec())
}
