//! `afferent demo`: the main job on recorded input, for about a minute: simulated watches publish over MQTT
//! to the embedded broker, windows go through a model into a table, and SQL shows what came of it.

use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};
use clap::Args;

use super::{FAILED, print};

/// Shown at the end, over what the demo has just written.
const QUERY: &str = "select device, exercise, count(*) as windows, round(avg(p), 3) as mean_p \
                     from exercises group by device, exercise order by device, windows desc";

/// See it work: simulated devices, a model, tables and SQL, for about a minute.
#[derive(Args)]
#[command(after_help = "Examples:
  afferent demo
  afferent demo --seconds 20")]
pub struct Demo {
    /// The example to run
    #[arg(long, value_name = "DIR", default_value = "examples/exercise-watch")]
    example: PathBuf,
    /// How long
    #[arg(long, default_value = "60")]
    seconds: u64,
    /// Where the demo writes; made anew at each run
    #[arg(long, value_name = "DIR", default_value = ".afferent/demo")]
    data_dir: PathBuf,
}

impl Demo {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let pipelines = ["devices.yaml", "watch.yaml"].map(|file| self.example.join(file));
        if let Some(missing) = pipelines.iter().find(|file| !file.exists()) {
            bail!("{} is not there; run the demo in the project's folder, or say --example DIR", missing.display());
        }
        if self.data_dir.exists() {
            std::fs::remove_dir_all(&self.data_dir).with_context(|| format!("clearing {}", self.data_dir.display()))?;
        }
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let program = std::env::current_exe()?;
        print(&format!(
            "Three watches replay recorded exercises at ten times their speed over MQTT; a 1D-CNN names the exercise\n\
             every 50 readings; the results go to a Delta Lake table. For {} seconds, Ctrl-C ends it sooner.\n\n",
            self.seconds
        ))?;
        let ran = Command::new(&program)
            .arg("run")
            .args(&pipelines)
            .arg(format!("--with-broker=127.0.0.1:{port}"))
            .arg(format!("--for={}s", self.seconds))
            .arg("--data-dir")
            .arg(&self.data_dir)
            .env("MQTT_URL", format!("mqtt://127.0.0.1:{port}"))
            .env("PACE", "10x")
            .status()?;
        if !ran.success() {
            return Ok(ExitCode::from(FAILED));
        }
        print(&format!("\n$ afferent sql --data-dir {} -c \"{QUERY}\"\n", self.data_dir.display()))?;
        let asked = Command::new(&program)
            .args(["sql", "--format", "table", "--data-dir"])
            .arg(&self.data_dir)
            .args(["-c", QUERY])
            .status()?;
        Ok(if asked.success() { ExitCode::SUCCESS } else { ExitCode::from(FAILED) })
    }
}
