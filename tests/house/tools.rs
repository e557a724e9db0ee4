//! What the tests stand on: scratch folders, the command, brokers started on free ports and stopped again,
//! and Python from the tests' own environment.

use std::io::Write;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// The repository's root.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Where `scripts/setup` puts what is not part of the repository.
pub fn cache() -> PathBuf {
    match std::env::var_os("AFFERENT_CACHE") {
        Some(cache) => cache.into(),
        None => Path::new(&std::env::var_os("HOME").expect("HOME is set")).join(".cache/afferent"),
    }
}

/// A port that nobody listens on just now.
pub fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

/// Waits until `ready` says so; fails the test with `what` after `limit`.
pub fn wait_until(what: &str, limit: Duration, mut ready: impl FnMut() -> bool) {
    let began = Instant::now();
    while !ready() {
        assert!(began.elapsed() < limit, "waited {limit:?} in vain until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A folder of its own for one test, with a data directory in it.
pub struct Scratch(TempDir);

impl Scratch {
    pub fn new() -> Self {
        Self(tempfile::Builder::new().prefix("afferent-test-").tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn data_dir(&self) -> PathBuf {
        self.path("data")
    }

    /// Writes a file and returns its path.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        path
    }

    /// The command with this folder as working directory and its data directory.
    pub fn afferent(&self, verb: &str) -> Command {
        let mut command = afferent();
        command.arg(verb).arg("--data-dir").arg(self.data_dir()).current_dir(self.0.path());
        command
    }

    /// Runs pipelines to their end; fails the test when that fails.
    pub fn run(&self, files: &[&Path]) -> Output {
        succeed(self.afferent("run").args(files))
    }

    /// The rows of a query as CSV, header first.
    pub fn sql(&self, query: &str) -> String {
        let output = succeed(self.afferent("sql").args(["--format", "csv", "-c", query]));
        String::from_utf8(output.stdout).unwrap()
    }

    /// The one number that a query yields.
    pub fn number(&self, query: &str) -> i64 {
        let csv = self.sql(query);
        csv.lines().nth(1).unwrap_or_else(|| panic!("no row: {csv}")).parse().unwrap_or_else(|_| panic!("no number: {csv}"))
    }

    /// A running `afferent run`, killed when dropped; its log is `name.log` in this folder.
    pub fn start(&self, name: &str, files: &[&Path], configure: impl FnOnce(&mut Command)) -> Running {
        let log = std::fs::File::options().create(true).append(true).open(self.path(&format!("{name}.log"))).unwrap();
        let mut command = self.afferent("run");
        command.args(files).stdout(log.try_clone().unwrap()).stderr(log).stdin(Stdio::null());
        configure(&mut command);
        Running(command.spawn().unwrap())
    }

    /// The log of a running command.
    pub fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(&format!("{name}.log"))).unwrap_or_default()
    }
}

/// The command under test.
pub fn afferent() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_afferent"));
    command.env("AFFERENT_LOG", "info,delta_kernel=warn,deltalake_core=error,parquet=error").env_remove("AFFERENT_SABOTAGE");
    // The tests' ONNX Runtime: the one of the Python package, found as a user's would be.
    command.env("VIRTUAL_ENV", cache().join("venv"));
    command
}

/// Runs a command that must succeed.
pub fn succeed(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?} ended with {}\n{}", output.status, told(&output));
    output
}

/// Both outputs as text.
pub fn told(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Python with the tests' packages.
pub fn python(script: &str) -> Command {
    let program = cache().join("venv/bin/python");
    assert!(program.exists(), "{} is missing: run scripts/setup test", program.display());
    let mut command = Command::new(program);
    command.arg(root().join("tests/python").join(script));
    command
}

/// A child process that is killed when dropped.
pub struct Running(pub Child);

impl Running {
    pub fn signal(&self, signal: &str) {
        succeed(Command::new("kill").args([signal, &self.0.id().to_string()]));
    }

    /// Ends it at once, as a crash would.
    pub fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    /// SIGTERM, then waits; fails the test unless it exits with 0.
    pub fn drain(mut self) {
        self.signal("-TERM");
        let status = wait_for_exit(&mut self.0, Duration::from_secs(60));
        assert!(status.success(), "draining ended with {status}");
    }

    /// Waits for it to end by itself.
    pub fn finish(mut self, limit: Duration) {
        let status = wait_for_exit(&mut self.0, limit);
        assert!(status.success(), "it ended with {status}");
    }

    pub fn is_running(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

fn wait_for_exit(child: &mut Child, limit: Duration) -> std::process::ExitStatus {
    let mut status = None;
    wait_until("the process ends", limit, || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    status.unwrap()
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// mosquitto on a free port, with whatever the test adds to its configuration.
pub struct Mosquitto {
    pub port: u16,
    _process: Running,
    _folder: TempDir,
}

impl Mosquitto {
    pub fn start(extra: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = free_port();
        let config = folder.path().join("mosquitto.conf");
        // In-memory: the broker is not what is tested, and it is never killed here. Queues are unlimited so
        // that what waits while the engine is down is not the broker's loss.
        let text =
            format!("listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\nmax_queued_messages 0\n{extra}\n");
        std::fs::write(&config, text).unwrap();
        let process =
            Command::new("/usr/sbin/mosquitto").arg("-c").arg(&config).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let process = Running(process.expect("mosquitto is installed (scripts/setup test)"));
        wait_until("mosquitto listens", Duration::from_secs(10), || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok());
        Self { port, _process: process, _folder: folder }
    }

    pub fn url(&self) -> String {
        format!("mqtt://127.0.0.1:{}", self.port)
    }

    /// mosquitto_pub with one message a line of `lines`.
    pub fn publish_lines(&self, topic: &str, lines: &str) {
        let mut child = Command::new("mosquitto_pub")
            .args(["-h", "127.0.0.1", "-p", &self.port.to_string(), "-t", topic, "-q", "1", "-l"])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
        assert!(child.wait().unwrap().success());
    }

    /// mosquitto_pub with the content of a file as one message.
    pub fn publish_file(&self, topic: &str, file: &Path) {
        let port = self.port.to_string();
        succeed(Command::new("mosquitto_pub").args(["-h", "127.0.0.1", "-p", &port, "-t", topic, "-q", "1", "-f"]).arg(file));
    }
}

/// Apache Kafka in KRaft mode on a free port, one broker.
pub struct Kafka {
    pub port: u16,
    _process: Running,
    _folder: TempDir,
}

impl Kafka {
    pub fn start() -> Self {
        Self::launch("PLAINTEXT", "", &[])
    }

    /// One that speaks TLS only and asks for user and password, by `PLAIN` or `SCRAM-SHA-512`.
    pub fn start_secured(certificates: &Certificates, user: &str, password: &str) -> Self {
        let module = "org.apache.kafka.common.security";
        let extra = format!(
            "sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-512\nsasl.mechanism.inter.broker.protocol=PLAIN\n\
             listener.name.sasl_ssl.plain.sasl.jaas.config={module}.plain.PlainLoginModule required username=\"broker\" \
             password=\"brokers-own\" user_broker=\"brokers-own\" user_{user}=\"{password}\";\n\
             listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config={module}.scram.ScramLoginModule required;\n\
             ssl.keystore.type=PEM\nssl.keystore.location={}\nssl.truststore.type=PEM\nssl.truststore.location={}\n",
            certificates.path("server-keystore.pem").display(),
            certificates.path("ca.pem").display()
        );
        Self::launch("SASL_SSL", &extra, &["--add-scram", &format!("SCRAM-SHA-512=[name={user},password={password}]")])
    }

    fn launch(protocol: &str, extra: &str, formatting: &[&str]) -> Self {
        let jars = cache().join("kafka");
        assert!(jars.exists(), "{} is missing: run scripts/setup test", jars.display());
        let classpath = format!("{}/*", jars.display());
        let folder = tempfile::tempdir().unwrap();
        let (port, controller) = (free_port(), free_port());
        let logs = folder.path().join("logs");
        let config = folder.path().join("server.properties");
        let text = format!(
            "process.roles=broker,controller\nnode.id=1\ncontroller.quorum.voters=1@127.0.0.1:{controller}\n\
             listeners={protocol}://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}\n\
             advertised.listeners={protocol}://127.0.0.1:{port}\ncontroller.listener.names=CONTROLLER\n\
             inter.broker.listener.name={protocol}\n\
             listener.security.protocol.map={protocol}:{protocol},CONTROLLER:PLAINTEXT\nlog.dirs={}\n\
             offsets.topic.replication.factor=1\noffsets.topic.num.partitions=2\ntransaction.state.log.replication.factor=1\n\
             transaction.state.log.min.isr=1\ngroup.initial.rebalance.delay.ms=0\nnum.partitions=2\nauto.create.topics.enable=true\n{extra}",
            logs.display()
        );
        std::fs::write(&config, text).unwrap();
        let java = |class: &str| {
            let mut command = Command::new("java");
            command.args(["-Xmx512m", "-cp", &classpath, class]).stdout(Stdio::null()).stderr(Stdio::null());
            command
        };
        let format = ["format", "-t", "MkU3OEVBNTcwNTJENDM2Qg", "-c"];
        succeed(java("kafka.tools.StorageTool").args(format).arg(&config).args(formatting));
        let process = Running(java("kafka.Kafka").arg(&config).spawn().expect("java is installed (scripts/setup test)"));
        wait_until("Kafka listens", Duration::from_secs(60), || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok());
        Self { port, _process: process, _folder: folder }
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }
}

/// Certificates of a test's own, made by the `openssl` command: `ca.pem`, which signed `server.pem` for 127.0.0.1 and
/// `device.pem` (with their `.key`), and `other.pem`, another authority, which signed nothing.
pub struct Certificates(TempDir);

impl Certificates {
    pub fn make() -> Self {
        let made = Self(tempfile::tempdir().unwrap());
        let openssl = |line: &str| {
            succeed(Command::new("openssl").args(line.split(' ')).current_dir(made.0.path()));
        };
        let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
        for authority in ["ca", "other"] {
            openssl(&format!(
                "req -x509 {key} -days 2 -subj /CN={authority} -keyout {authority}.key -out {authority}.pem \
                 -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign"
            ));
        }
        let extensions = "subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n";
        std::fs::write(made.path("extensions"), extensions).unwrap();
        for name in ["server", "device"] {
            openssl(&format!("req {key} -subj /CN={name} -keyout {name}.key -out {name}.csr"));
            openssl(&format!(
                "x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile extensions -out {name}.pem"
            ));
        }
        // Kafka wants key and certificate in one file.
        let read = |name: &str| std::fs::read_to_string(made.path(name)).unwrap();
        std::fs::write(made.path("server-keystore.pem"), read("server.key") + &read("server.pem")).unwrap();
        made
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}
