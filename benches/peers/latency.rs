//! Latency: from the publisher's stamp to the result read over MQTT, at half of full load, of Afferent and of the rival in
//! Rust. Called by `main.rs`. Publisher and reader are this process, so that both ends have one clock. The invariant: the
//! first two seconds do not count, and every reading must come back or the run fails.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use hdrhistogram::Histogram;

use crate::Options;
use crate::consumer::{Consumer, Job, Who};
use crate::drain::Scored;
use crate::load::{self, Listener, Readings};
use crate::mqtt::ROWS;
use crate::pairs::{progress, say};
use crate::process::watch;
use crate::servers::Mosquitto;

/// Seconds before those that count.
const WARM_SECONDS: u64 = 2;
/// How long the last results may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// What has come back.
struct Returned {
    histogram: Histogram<u64>,
    count: u64,
}

/// Counts results, and takes the latency of those from reading `warm` on.
struct Reader {
    returned: Arc<Mutex<Returned>>,
    _listener: Listener,
}

impl Reader {
    fn start(broker: &Mosquitto, qos: u8, warm: u64) -> Result<Reader> {
        let histogram = Histogram::new(3).map_err(|error| anyhow!("making a histogram: {error}"))?;
        let returned = Arc::new(Mutex::new(Returned { histogram, count: 0 }));
        let shared = Arc::clone(&returned);
        let listener = Listener::start(broker.port, "results/#", qos, move |message| {
            let now = load::now();
            let Ok(scored) = serde_json::from_slice::<Scored>(&message.payload) else { return };
            let mut returned = shared.lock().unwrap_or_else(PoisonError::into_inner);
            returned.count += 1;
            if scored.id >= warm {
                // A histogram that grows by itself takes every value.
                let _ = returned.histogram.record(u64::try_from(now - scored.stamp).unwrap_or(0));
            }
        })?;
        Ok(Reader { returned, _listener: listener })
    }

    fn count(&self) -> u64 {
        self.returned.lock().unwrap_or_else(PoisonError::into_inner).count
    }

    /// Waits until `count` results have come; gives up when none comes for [`PATIENCE`].
    fn wait(&self, consumer: &mut Consumer, count: u64) -> Result<()> {
        watch(&mut consumer.process, Instant::now(), count, PATIENCE, || Ok(self.count())).map(|_| ())
    }
}

/// Measures results at QoS 0 and 1, of both sides; inputs are at QoS 1 in all.
///
/// # Errors
/// When a broker or a side fails, or a result is missing.
pub fn run(options: &Options) -> Result<()> {
    let readings = Readings::load()?;
    let job = |qos_out: u8| Job { qos_in: 1, qos_out, batch: 1024 };
    let rate = match options.rate {
        Some(rate) => rate,
        None => {
            let rows = options.rows.unwrap_or(ROWS);
            let full = full_load(&job(1), &readings, rows)?;
            say(format!("full load: {full:.0}/s (afferent, QoS 1, {rows} readings published as fast as the broker takes them)"));
            (full / 2.0) as u64
        }
    };
    if rate == 0 || options.seconds == 0 {
        bail!("at {rate}/s for {} s there is nothing to measure", options.seconds);
    }
    let rust = Who::Rust { threads: options.rival_threads, encode_twice: options.encode_twice };
    say(format!("\nlatency at {rate}/s for {} s, publisher's stamp to result read over MQTT, in ms", options.seconds));
    say(format!("{:<24}{:>9}{:>9}{:>9}{:>9}{:>9}", "", "p50", "p90", "p99", "p99.9", "max"));
    for qos_out in [0, 1] {
        for (name, who) in [("afferent", Who::Afferent), ("rust loop", rust)] {
            progress(format!("{name}, results at QoS {qos_out}"));
            let histogram = measure(who, &job(qos_out), &readings, rate, options.seconds)?;
            let milliseconds = |nanoseconds: u64| nanoseconds as f64 / 1e6;
            let mut line = format!("{:<24}", format!("{name}, results QoS {qos_out}"));
            for quantile in [0.5, 0.9, 0.99, 0.999] {
                line.push_str(&format!("{:>9.2}", milliseconds(histogram.value_at_quantile(quantile))));
            }
            say(format!("{line}{:>9.2}", milliseconds(histogram.max())));
        }
    }
    Ok(())
}

/// Results a second at most, while publisher, broker, consumer and reader share the machine as they do when the latency
/// is taken.
fn full_load(job: &Job, readings: &Readings, rows: u64) -> Result<f64> {
    let broker = Mosquitto::start()?;
    let mut consumer = Consumer::start(Who::Afferent, job, &broker)?;
    let reader = Reader::start(&broker, job.qos_out, 0)?;
    let began = Instant::now();
    load::publish(broker.port, readings, 0..rows, false)?;
    reader.wait(&mut consumer, rows)?;
    Ok(rows as f64 / began.elapsed().as_secs_f64())
}

fn measure(who: Who, job: &Job, readings: &Readings, rate: u64, seconds: u64) -> Result<Histogram<u64>> {
    let broker = Mosquitto::start()?;
    let mut consumer = Consumer::start(who, job, &broker)?;
    let reader = Reader::start(&broker, job.qos_out, rate * WARM_SECONDS)?;
    let count = rate * (WARM_SECONDS + seconds);
    let took = load::publish_paced(broker.port, readings, count, rate)?;
    if took.as_secs_f64() > 1.02 * (WARM_SECONDS + seconds) as f64 {
        progress(format!("note: publishing took {took:.1?}, so the rate was {:.0}/s", count as f64 / took.as_secs_f64()));
    }
    reader.wait(&mut consumer, count)?;
    let returned = reader.returned.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(returned.histogram.clone())
}
