//! `afferent broker`: the embedded MQTT broker on its own.

use std::net::SocketAddr;
use std::process::ExitCode;

use clap::Args;

use super::print;
use crate::broker;
use crate::logging::{self, LogFormat};

/// Start the embedded MQTT broker for trials.
#[derive(Args)]
#[command(after_help = "It keeps messages in memory only: what it holds is gone when it stops. For devices that
matter, run mosquitto or another broker that stores.

Examples:
  afferent broker
  afferent broker --listen 0.0.0.0:1884")]
pub struct Broker {
    /// Where to listen, for MQTT 3.1.1 and 5
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:1883")]
    listen: SocketAddr,
}

impl Broker {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        logging::start(LogFormat::Text, tracing_subscriber::fmt::writer::BoxMakeWriter::new(std::io::stderr));
        tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(async {
            let bound = broker::start(self.listen).await?;
            print(&format!("mqtt://{bound} serves MQTT 3.1.1 and 5; messages are kept in memory only; Ctrl-C stops it\n"))?;
            tokio::signal::ctrl_c().await?;
            Ok(ExitCode::SUCCESS)
        })
    }
}
