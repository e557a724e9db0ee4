//! The brokers of the comparisons: mosquitto and Apache Kafka, started on free ports with everything in a folder that
//! goes with them. Both are [`Process`]es, so that their CPU time is read like that of the two sides.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::process::{Process, wait_until};

/// Messages that mosquitto sends to one client without its acknowledgement.
pub const IN_FLIGHT: usize = 1000;

/// Where `scripts/setup test` puts what is not part of the repository.
pub fn cache() -> PathBuf {
    match env::var_os("AFFERENT_CACHE") {
        Some(cache) => cache.into(),
        None => Path::new(&env::var_os("HOME").unwrap_or_else(|| OsString::from("/root"))).join(".cache/afferent"),
    }
}

/// Python with the packages of the tests.
///
/// # Errors
/// When it is not there.
pub fn python() -> Result<PathBuf> {
    let program = cache().join("venv/bin/python");
    if !program.exists() {
        bail!("{} is missing: run scripts/setup test", program.display());
    }
    Ok(program)
}

/// The ONNX Runtime library of that Python, for both sides of a comparison.
///
/// # Errors
/// When it is not there.
pub fn onnxruntime() -> Result<PathBuf> {
    let lib = cache().join("venv/lib");
    let pythons = fs::read_dir(&lib).with_context(|| format!("reading {}: run scripts/setup test", lib.display()))?;
    for python in pythons.flatten() {
        let Ok(files) = fs::read_dir(python.path().join("site-packages/onnxruntime/capi")) else { continue };
        for file in files.flatten() {
            if file.file_name().to_string_lossy().starts_with("libonnxruntime.so") {
                return Ok(file.path());
            }
        }
    }
    bail!("no libonnxruntime.so below {}: run scripts/setup test", lib.display())
}

/// The command under test, with the ONNX Runtime of [`onnxruntime`]; `verb` is its subcommand, and the data directory is
/// `data` in `folder`, which is also the working directory.
///
/// # Errors
/// When there is no ONNX Runtime.
pub fn afferent(verb: &str, folder: &Path) -> Result<Command> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_afferent"));
    command.arg(verb).arg("--data-dir").arg(folder.join("data")).current_dir(folder);
    command.env("ORT_DYLIB_PATH", onnxruntime()?).env_remove("AFFERENT_SABOTAGE").env_remove("AFFERENT_LOG");
    Ok(command)
}

/// This very program as one of the rivals: `name` is `rival-mqtt` or `rival-kafka`.
///
/// # Errors
/// When the system does not say where this program is.
pub fn rival(name: &str) -> Result<Command> {
    let mut command = Command::new(env::current_exe().context("asking where this program is")?);
    command.arg(name).env("ORT_DYLIB_PATH", onnxruntime()?);
    Ok(command)
}

/// A folder on the disk that the build uses (a temporary file system would make every fsync free), removed when dropped.
///
/// # Errors
/// When it cannot be made.
pub fn scratch() -> Result<TempDir> {
    let below = Path::new(env!("CARGO_TARGET_TMPDIR"));
    fs::create_dir_all(below).with_context(|| format!("making {}", below.display()))?;
    tempfile::Builder::new().prefix("peers-").tempdir_in(below).with_context(|| format!("making a folder in {}", below.display()))
}

/// A port that nobody listens on just now.
///
/// # Errors
/// When the system gives none.
pub fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("asking for a free port")?;
    Ok(listener.local_addr().context("asking for a free port")?.port())
}

fn listens(port: u16) -> bool {
    TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok()
}

/// mosquitto in memory, with queues without a limit.
pub struct Mosquitto {
    /// Where it listens, on 127.0.0.1.
    pub port: u16,
    /// The process, for its CPU time.
    pub process: Process,
    _folder: TempDir,
}

impl Mosquitto {
    /// Starts it and waits until it listens.
    ///
    /// # Errors
    /// When it is not installed or does not start.
    pub fn start() -> Result<Mosquitto> {
        let folder = scratch()?;
        let port = free_port()?;
        let config = folder.path().join("mosquitto.conf");
        let text = format!(
            "listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\nlog_dest none\nsys_interval 0\n\
             max_inflight_messages {IN_FLIGHT}\nmax_queued_messages 0\nqueue_qos0_messages true\nset_tcp_nodelay true\n"
        );
        fs::write(&config, text).with_context(|| format!("writing {}", config.display()))?;
        let mut command = Command::new("/usr/sbin/mosquitto");
        command.arg("-c").arg(&config);
        let process = Process::start_silent("mosquitto (scripts/setup test installs it)", &mut command)?;
        wait_until("mosquitto listens", Duration::from_secs(10), || Ok(listens(port)))?;
        Ok(Mosquitto { port, process, _folder: folder })
    }

    /// Its address as pipelines write it.
    pub fn url(&self) -> String {
        format!("mqtt://127.0.0.1:{}", self.port)
    }
}

/// Apache Kafka in KRaft mode, one broker with its logs on the disk.
pub struct Kafka {
    /// Where it listens, on 127.0.0.1.
    pub port: u16,
    /// The process, for its CPU time.
    pub process: Process,
    _folder: TempDir,
}

impl Kafka {
    /// Starts it and waits until it listens. Topics come into being when they are named, with `partitions` each.
    ///
    /// # Errors
    /// When Java or Kafka is not installed, or it does not start.
    pub fn start(partitions: u32) -> Result<Kafka> {
        let jars = cache().join("kafka");
        if !jars.exists() {
            bail!("{} is missing: run scripts/setup test", jars.display());
        }
        let classpath = format!("{}/*", jars.display());
        let folder = scratch()?;
        let (port, controller) = (free_port()?, free_port()?);
        let config = folder.path().join("server.properties");
        let text = format!(
            "process.roles=broker,controller\nnode.id=1\ncontroller.quorum.voters=1@127.0.0.1:{controller}\n\
             listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}\n\
             advertised.listeners=PLAINTEXT://127.0.0.1:{port}\ncontroller.listener.names=CONTROLLER\n\
             listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT\nlog.dirs={}\n\
             offsets.topic.replication.factor=1\noffsets.topic.num.partitions=2\ntransaction.state.log.replication.factor=1\n\
             transaction.state.log.min.isr=1\ngroup.initial.rebalance.delay.ms=0\nnum.partitions={partitions}\n\
             auto.create.topics.enable=true\n",
            folder.path().join("logs").display()
        );
        fs::write(&config, text).with_context(|| format!("writing {}", config.display()))?;
        let java = |class: &str| {
            let mut command = Command::new("java");
            command.args(["-Xmx512m", "-cp", &classpath, class]);
            command
        };
        let mut format = Process::start(
            "Kafka's format (scripts/setup test installs Java)",
            java("kafka.tools.StorageTool").args(["format", "-t", "MkU3OEVBNTcwNTJENDM2Qg", "-c"]).arg(&config),
            &folder.path().join("format.log"),
        )?;
        let status = format.ended(Duration::from_secs(60))?;
        if !status.success() {
            bail!("formatting Kafka's storage ended with {status}: {}", format.log());
        }
        let process = Process::start("Kafka", java("kafka.Kafka").arg(&config), &folder.path().join("kafka.log"))?;
        wait_until("Kafka listens", Duration::from_secs(60), || Ok(listens(port)))?;
        Ok(Kafka { port, process, _folder: folder })
    }

    /// Its address as clients take it.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }
}
