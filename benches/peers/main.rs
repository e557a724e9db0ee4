//! Afferent against its peers: whole processes, side by side, on the same input. Run by `cargo bench --bench peers`, and
//! by itself as a rival: `peers rival-NAME ARGUMENTS` is a hand-written loop in Rust that is measured like `afferent`.
//! The invariant: both sides are child processes and are measured by the same observer; nothing asserts on timing.
//!
//! How a comparison is written: a module with `pub fn run(options: &Options) -> anyhow::Result<()>`, which starts a server
//! ([`servers`]), gives both sides to [`pairs::compare`] and measures each with [`process`]; and, where the rival is
//! written in Rust, `pub fn rival(arguments: &[String]) -> anyhow::Result<()>`, which is called in a process of its
//! own (started by [`servers::rival`]) and runs until SIGTERM or until its work is done.

mod consumer;
mod drain;
mod kafka;
mod latency;
mod load;
mod mqtt;
mod mqtt_rival;
mod pairs;
mod process;
mod servers;
mod start;
mod table;

use clap::{Args, Parser, Subcommand};

/// Afferent against its peers, process against process.
///
/// Both sides run as child processes on the same input, in the order A B B A; the tables show rates, CPU microseconds a
/// row and the ratio of each pair. scripts/setup test installs what is needed. See benches/README.md.
#[derive(Parser)]
#[command(name = "peers")]
struct Peers {
    #[command(subcommand)]
    what: What,
    #[command(flatten)]
    options: Options,
    /// Given by cargo.
    #[arg(long = "bench", hide = true, global = true)]
    _bench: bool,
}

/// What every comparison is told.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Messages or rows of one run; each comparison has a default
    #[arg(long, global = true)]
    pub rows: Option<u64>,
    /// Pairs to measure
    #[arg(long, global = true, default_value_t = 5)]
    pub rounds: usize,
    /// latency: messages a second; by default half of what the pipeline takes at full load
    #[arg(long, global = true)]
    pub rate: Option<u64>,
    /// latency: seconds to measure
    #[arg(long, global = true, default_value_t = 20)]
    pub seconds: u64,
    /// mqtt: only the comparisons whose title has this text in it, such as `QoS 1` or `Python`
    #[arg(long, global = true, value_name = "TEXT")]
    pub only: Option<String>,
    /// mqtt: worker threads of the rival in Rust; 1 runs all of it on one thread
    #[arg(long, global = true, default_value_t = 1)]
    pub rival_threads: usize,
    /// mqtt: the rival in Rust encodes for each sink, as Afferent does, instead of once for both
    #[arg(long, global = true)]
    pub encode_twice: bool,
}

#[derive(Subcommand)]
enum What {
    /// MQTT -> decode -> infer -> MQTT and file, against a loop in Rust and a loop in Python
    Mqtt,
    /// Kafka -> decode -> encode -> Kafka, against bare rdkafka and arrow-json
    Kafka,
    /// Whether commits to a Delta Lake table stay cheap: late ones against early ones
    Table,
    /// From the publisher's stamp to the result read over MQTT, at half of full load
    Latency,
    /// Start to ready, memory and wake-ups when idle, size of the binary
    Start,
}

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.split_first() {
        Some((name, rest)) if name == "rival-mqtt" => return mqtt_rival::rival(rest),
        Some((name, rest)) if name == "rival-kafka" => return kafka::rival(rest),
        _ => {}
    }
    let peers = Peers::parse();
    match peers.what {
        What::Mqtt => mqtt::run(&peers.options),
        What::Kafka => kafka::run(&peers.options),
        What::Table => table::run(&peers.options),
        What::Latency => latency::run(&peers.options),
        What::Start => start::run(&peers.options),
    }
}
