//! Child processes and what the kernel says of them. Every comparison starts both sides through here, so that CPU time,
//! memory and context switches are read alike. The invariant: a process that was started here is ended here, by its
//! own id, at the latest when its [`Process`] is dropped.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Ticks a second in `/proc/PID/stat`: Linux's `USER_HZ`, 100 on every machine that Rust's standard library knows.
const TICKS_PER_SECOND: u64 = 100;
/// How often the observer looks at the output.
pub const LOOK: Duration = Duration::from_millis(5);
/// How long a process may take to end after SIGTERM.
const GOODBYE: Duration = Duration::from_secs(60);
/// How much of a log is shown when a process fails, in bytes.
const SHOWN: usize = 4000;

/// What the kernel counts of a process.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// CPU time of all its threads, also of those that have ended, in user and in kernel mode. In steps of 10 ms.
    pub cpu: Duration,
    /// Resident memory now, in bytes.
    pub resident: u64,
    /// Most resident memory so far, in bytes.
    pub peak: u64,
    /// Context switches because a thread waited, over the threads that live now.
    pub voluntary: u64,
    /// Context switches because the time was up, over the threads that live now.
    pub involuntary: u64,
    /// Threads that live now.
    pub threads: u64,
}

/// A running child process. It is killed when dropped.
pub struct Process {
    name: String,
    child: Child,
    log: Option<PathBuf>,
}

impl Process {
    /// Starts `command` with no input; what it writes to standard output and standard error goes to `log`, which is made
    /// anew.
    ///
    /// # Errors
    /// When the log cannot be made or the program not be started.
    pub fn start(name: &str, command: &mut Command, log: &Path) -> Result<Process> {
        let output = File::create(log).with_context(|| format!("making {}", log.display()))?;
        let errors = output.try_clone().context("sharing a log file")?;
        command.stdin(Stdio::null()).stdout(output).stderr(errors);
        let child = command.spawn().with_context(|| format!("starting {name}: {command:?}"))?;
        Ok(Process { name: name.to_owned(), child, log: Some(log.to_owned()) })
    }

    /// Starts `command` with its input and both outputs closed off.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn start_silent(name: &str, command: &mut Command) -> Result<Process> {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().with_context(|| format!("starting {name}: {command:?}"))?;
        Ok(Process { name: name.to_owned(), child, log: None })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has written so far; empty for a silent process.
    pub fn log(&self) -> String {
        let bytes = self.log.as_ref().and_then(|log| fs::read(log).ok()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// What the kernel counts of it now.
    ///
    /// # Errors
    /// When it has ended.
    pub fn usage(&self) -> Result<Usage> {
        usage(self.id()).with_context(|| format!("reading what {} has used; its log ends with:\n{}", self.name, self.log_end()))
    }

    /// CPU time of all its threads so far.
    ///
    /// # Errors
    /// When it has ended.
    pub fn cpu(&self) -> Result<Duration> {
        cpu(self.id()).with_context(|| format!("reading the CPU time of {}; its log ends with:\n{}", self.name, self.log_end()))
    }

    /// Fails with the end of its log when it has ended.
    ///
    /// # Errors
    /// When it has ended, with whatever status.
    pub fn must_run(&mut self) -> Result<()> {
        match self.child.try_wait().with_context(|| format!("looking after {}", self.name))? {
            None => Ok(()),
            Some(status) => bail!("{} ended with {status}; its log ends with:\n{}", self.name, self.log_end()),
        }
    }

    /// Sends a signal by its name, such as `TERM`.
    ///
    /// # Errors
    /// When it has ended.
    pub fn signal(&self, signal: &str) -> Result<()> {
        let status =
            Command::new("kill").arg(format!("-{signal}")).arg(self.id().to_string()).status().context("running kill")?;
        if !status.success() {
            bail!("sending {signal} to {} failed", self.name);
        }
        Ok(())
    }

    /// Stops all its threads where they are (SIGSTOP) and returns when the kernel says that they stand.
    ///
    /// # Errors
    /// When it has ended, or does not stop within 5 s.
    pub fn pause(&mut self) -> Result<()> {
        self.signal("STOP")?;
        let id = self.id();
        wait_until(&format!("{} stands still", self.name), Duration::from_secs(5), || {
            Ok(fs::read_to_string(format!("/proc/{id}/stat"))?
                .rsplit(')')
                .next()
                .is_some_and(|rest| rest.trim_start().starts_with('T')))
        })
    }

    /// Lets it go on after [`Process::pause`].
    ///
    /// # Errors
    /// When it has ended.
    pub fn resume(&self) -> Result<()> {
        self.signal("CONT")
    }

    /// Asks it to end (SIGTERM) and waits for that.
    ///
    /// # Errors
    /// When it ends with a failure, or not within a minute; it is killed then.
    pub fn stop(mut self) -> Result<()> {
        self.signal("TERM")?;
        let status = self.ended(GOODBYE)?;
        if !status.success() {
            bail!("{} ended with {status}; its log ends with:\n{}", self.name, self.log_end());
        }
        Ok(())
    }

    /// Waits until it ends by itself.
    ///
    /// # Errors
    /// When it has not ended within `limit`.
    pub fn ended(&mut self, limit: Duration) -> Result<ExitStatus> {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().with_context(|| format!("waiting for {}", self.name))? {
                return Ok(status);
            }
            if began.elapsed() > limit {
                bail!("{} has not ended within {limit:?}; its log ends with:\n{}", self.name, self.log_end());
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    fn log_end(&self) -> String {
        let log = self.log();
        let start = (log.len().saturating_sub(SHOWN)..=log.len()).find(|&at| log.is_char_boundary(at)).unwrap_or(0);
        log.get(start..).unwrap_or_default().to_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail for a process that has ended and was waited for, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// CPU time of the process `id`, of all its threads.
///
/// # Errors
/// When there is no such process.
pub fn cpu(id: u32) -> Result<Duration> {
    let path = format!("/proc/{id}/stat");
    let stat = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    cpu_of(&stat).with_context(|| format!("{path} does not look as proc(5) says: {stat}"))
}

/// `utime` and `stime` are fields 14 and 15; the name in field 2 stands in brackets and may have spaces and brackets in
/// it.
fn cpu_of(stat: &str) -> Option<Duration> {
    let mut fields = stat.rsplit(')').next()?.split_whitespace();
    let user: u64 = fields.nth(11)?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(Duration::from_millis((user + system) * 1000 / TICKS_PER_SECOND))
}

/// What the kernel counts of the process `id`.
///
/// # Errors
/// When there is no such process.
pub fn usage(id: u32) -> Result<Usage> {
    let path = format!("/proc/{id}/status");
    let status = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let kibibytes = |key: &str| number(&status, key).unwrap_or(0) * 1024;
    let mut usage = Usage { cpu: cpu(id)?, resident: kibibytes("VmRSS"), peak: kibibytes("VmHWM"), ..Usage::default() };
    let tasks = format!("/proc/{id}/task");
    for task in fs::read_dir(&tasks).with_context(|| format!("reading {tasks}"))? {
        // A thread that ends meanwhile is gone with its counts.
        let Ok(status) = task.and_then(|task| fs::read_to_string(task.path().join("status"))) else { continue };
        usage.threads += 1;
        usage.voluntary += number(&status, "voluntary_ctxt_switches").unwrap_or(0);
        usage.involuntary += number(&status, "nonvoluntary_ctxt_switches").unwrap_or(0);
    }
    Ok(usage)
}

/// The number behind `key:` in a status file.
fn number(status: &str, key: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Waits until `ready` says so, looking every 5 ms.
///
/// # Errors
/// Those of `ready`, and when `limit` has passed.
pub fn wait_until(what: &str, limit: Duration, mut ready: impl FnMut() -> Result<bool>) -> Result<()> {
    let began = Instant::now();
    while !ready()? {
        if began.elapsed() > limit {
            bail!("waited {limit:?} in vain until {what}");
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Counts the lines of a file that grows. It need not be there yet.
pub struct Lines {
    path: PathBuf,
    file: Option<File>,
    buffer: Vec<u8>,
    count: u64,
}

impl Lines {
    /// An observer of `path`; nothing is read yet.
    pub fn of(path: &Path) -> Lines {
        Lines { path: path.to_owned(), file: None, buffer: vec![0; 1 << 20], count: 0 }
    }

    /// Reads what has come and says how many lines there are in all.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn count(&mut self) -> Result<u64> {
        if self.file.is_none() {
            match File::open(&self.path) {
                Ok(file) => self.file = Some(file),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
                Err(error) => return Err(error).with_context(|| format!("opening {}", self.path.display())),
            }
        }
        if let Some(file) = &mut self.file {
            loop {
                let read = file.read(&mut self.buffer).with_context(|| format!("reading {}", self.path.display()))?;
                if read == 0 {
                    break;
                }
                let chunk = self.buffer.get(..read).unwrap_or_default();
                self.count += chunk.iter().map(|&byte| u64::from(byte == b'\n')).sum::<u64>();
            }
        }
        Ok(self.count)
    }
}

/// What came of watching an output until it was complete.
#[derive(Clone, Copy, Debug)]
pub struct Watched {
    /// Rows that came.
    pub rows: u64,
    /// Time from `began` until the last of them was seen.
    pub wall: Duration,
}

/// Looks every [`LOOK`] at how many rows have come, by `count`, until there are `expected`.
///
/// # Errors
/// Those of `count`; when `process` ends before; when no further row comes for `patience`.
pub fn watch(
    process: &mut Process,
    began: Instant,
    expected: u64,
    patience: Duration,
    mut count: impl FnMut() -> Result<u64>,
) -> Result<Watched> {
    let (mut seen, mut changed) = (0, began);
    loop {
        let now = count()?;
        if now != seen {
            (seen, changed) = (now, Instant::now());
        }
        if seen >= expected {
            return Ok(Watched { rows: seen, wall: changed - began });
        }
        process.must_run()?;
        if changed.elapsed() > patience {
            bail!(
                "{seen} of {expected} rows came, and no further one for {patience:?}; the log ends with:\n{}",
                process.log_end()
            );
        }
        thread::sleep(LOOK);
    }
}
