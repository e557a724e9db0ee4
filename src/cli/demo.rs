//! `afferent demo`: the main job on recorded input, for about a minute: simulated watches publish over MQTT
//! to the embedded broker, windows go through a model into a table, and SQL shows what came of it.

use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::{FAILED, print};

/// Shown at the end, over what the demo has just written; with the exercises' names, since the model knows short ones.
const QUERY: &str = "select device, exercise, meaning, count(*) as windows, round(avg(p), 3) as mean_p
from exercises left join (values
  ('PEN', 'pendulum'), ('ABD', 'abduction'), ('FEL', 'forward elevation'), ('IR', 'internal rotation'),
  ('ER', 'external rotation'), ('TRAP', 'lower trapezius row'), ('ROW', 'bent over row')
) as names (code, meaning) on exercise = code
group by device, exercise, meaning order by device, windows desc";

/// A file in every directory that the demo has made: no other one is cleared.
const MARK: &str = "made-by-demo";

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
        // Who listens before who sends: the broker keeps nothing for nobody.
        let pipelines = ["watch.yaml", "devices.yaml"].map(|file| self.example.join(file));
        if let Some(missing) = pipelines.iter().find(|file| !file.exists()) {
            bail!("{} is not there; run the demo in the project's folder, or say --example DIR", missing.display());
        }
        make_anew(&self.data_dir)?;
        // Ctrl-C reaches both processes: the pipelines drain, and this one stays to show what came of it.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let _entered = runtime.enter();
        let _caught = signal(SignalKind::interrupt())?;
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

/// An empty directory in place of what an earlier demo left there.
fn make_anew(dir: &Path) -> anyhow::Result<()> {
    let ours = dir.join(MARK).exists() || dir.ends_with(".afferent/demo");
    let holds_something = dir.exists() && std::fs::read_dir(dir).map_or(true, |mut entries| entries.next().is_some());
    if holds_something {
        if !ours {
            bail!("{} holds something that the demo has not made; choose another with --data-dir", dir.display());
        }
        std::fs::remove_dir_all(dir).with_context(|| format!("clearing {}", dir.display()))?;
    }
    std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    std::fs::write(dir.join(MARK), "").with_context(|| format!("writing to {}", dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_demo_has_made_is_cleared() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path().join("data");
        for _ in 0..2 {
            make_anew(&dir).unwrap();
            std::fs::create_dir(dir.join("tables")).unwrap();
        }
        std::fs::remove_file(dir.join(MARK)).unwrap();
        let refused = make_anew(&dir).unwrap_err().to_string();
        assert!(refused.contains("holds something that the demo has not made"), "{refused}");
        assert!(dir.join("tables").exists());
    }
}
