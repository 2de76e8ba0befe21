//! Child processes that never outlive us.
//!
//! Each runs in a process group of its own, so that Ctrl-C on the terminal reaches only us and we stop the rest in order. On Linux the
//! kernel signals a child when the thread that made it ends; one thread makes them all and lives as long as this process, so that the
//! signal means that we died, however that came about. Elsewhere a child is killed when its [`Process`] is dropped.

use anyhow::{Context, Result, bail};
use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::{OnceLock, mpsc},
    thread,
    time::Duration,
};
use tokio::process::{Child, ChildStdout};

/// How much of a log an error quotes, in bytes.
const QUOTED: u64 = 4_000;

/// An account of this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    /// Its user id.
    pub uid: u32,
    /// Its main group.
    pub gid: u32,
}

impl User {
    /// Whether this process is root.
    #[allow(unsafe_code)]
    pub fn we_are_root() -> bool {
        // SAFETY: geteuid takes nothing, changes nothing and cannot fail.
        unsafe { libc::geteuid() == 0 }
    }

    /// The account by its name in /etc/passwd.
    pub fn named(name: &str) -> Option<Self> {
        let accounts = fs::read_to_string("/etc/passwd").ok()?;
        accounts.lines().find_map(|line| {
            let mut fields = line.split(':');
            if fields.next() != Some(name) {
                return None;
            }
            let uid = fields.nth(1)?.parse().ok()?;
            let gid = fields.next()?.parse().ok()?;
            Some(Self { uid, gid })
        })
    }
}

/// A child process to be.
#[derive(Debug, Clone)]
pub struct Command {
    program: OsString,
    args: Vec<OsString>,
    envs: Vec<(OsString, OsString)>,
    clear: bool,
    folder: Option<PathBuf>,
    log: Option<PathBuf>,
    user: Option<User>,
    pipe_stdout: bool,
    death_signal: i32,
}

impl Command {
    /// `program` by path or by name on the PATH.
    pub fn new(program: impl Into<OsString>) -> Self {
        Self {
            program: program.into(),
            args: Vec::new(),
            envs: Vec::new(),
            clear: false,
            folder: None,
            log: None,
            user: None,
            pipe_stdout: false,
            death_signal: libc::SIGKILL,
        }
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Adds arguments.
    pub fn args<A: Into<OsString>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Sets a variable of its environment.
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.envs.push((name.into(), value.into()));
        self
    }

    /// Sets variables of its environment.
    pub fn envs<N: Into<OsString>, V: Into<OsString>>(mut self, envs: impl IntoIterator<Item = (N, V)>) -> Self {
        self.envs.extend(envs.into_iter().map(|(name, value)| (name.into(), value.into())));
        self
    }

    /// Gives it nothing of our own environment.
    pub fn clear_env(mut self) -> Self {
        self.clear = true;
        self
    }

    /// The folder it starts in.
    pub fn folder(mut self, folder: impl Into<PathBuf>) -> Self {
        self.folder = Some(folder.into());
        self
    }

    /// The file that its output is appended to; without one it goes nowhere.
    pub fn log(mut self, log: impl Into<PathBuf>) -> Self {
        self.log = Some(log.into());
        self
    }

    /// The account it runs as; only root can choose.
    pub fn user(mut self, user: Option<User>) -> Self {
        self.user = user;
        self
    }

    /// Keeps its standard output for [`Process::take_stdout`].
    pub fn pipe_stdout(mut self) -> Self {
        self.pipe_stdout = true;
        self
    }

    /// The signal it gets when we die (Linux); SIGKILL unless it has something to put in order.
    pub fn death_signal(mut self, signal: i32) -> Self {
        self.death_signal = signal;
        self
    }

    /// Starts it.
    pub async fn spawn(self) -> Result<Process> {
        let name = Path::new(&self.program).file_name().unwrap_or(&self.program).to_string_lossy().into_owned();
        let runtime = tokio::runtime::Handle::current();
        let (answer, answered) = tokio::sync::oneshot::channel();
        let log = self.log.clone();
        let job = move || {
            let _inside = runtime.enter();
            // The receiver is gone when the caller was cancelled; the child is then killed as it is dropped.
            let _cancelled = answer.send(self.prepare().and_then(|mut command| command.spawn()));
        };
        spawner().send(Box::new(job)).map_err(|_| anyhow::anyhow!("the thread that starts processes has died"))?;
        let child = answered.await?.with_context(|| format!("cannot start {name}"))?;
        let id = child.id().with_context(|| format!("{name} ended as it started"))?;
        Ok(Process { child, id, name, log })
    }

    /// Runs it to its end; fails with the end of its log when it fails.
    pub async fn run(self) -> Result<()> {
        let mut process = self.spawn().await?;
        let status = process.wait().await?;
        if !status.success() {
            bail!("{} failed ({status}){}", process.name, process.quote_log());
        }
        Ok(())
    }

    fn prepare(&self) -> io::Result<tokio::process::Command> {
        let mut command = tokio::process::Command::new(&self.program);
        command.args(&self.args).stdin(Stdio::null()).process_group(0).kill_on_drop(true);
        if self.clear {
            command.env_clear();
        }
        command.envs(self.envs.iter().map(|(name, value)| (name, value)));
        if let Some(folder) = &self.folder {
            command.current_dir(folder);
        }
        match &self.log {
            Some(path) => {
                let log = File::options().create(true).append(true).open(path)?;
                command.stdout(log.try_clone()?).stderr(log);
            }
            None => {
                command.stdout(Stdio::null()).stderr(Stdio::null());
            }
        }
        if self.pipe_stdout {
            command.stdout(Stdio::piped());
        }
        if let Some(user) = self.user {
            // With a user id the standard library also drops all further groups.
            command.uid(user.uid).gid(user.gid);
        }
        die_with_us(&mut command, self.death_signal);
        Ok(command)
    }
}

/// A running child process, killed with its process group when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    id: u32,
    name: String,
    log: Option<PathBuf>,
}

impl Process {
    /// Its process id.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Its standard output, once, when [`Command::pipe_stdout`] asked for it.
    pub fn take_stdout(&mut self) -> Option<ChildStdout> {
        self.child.stdout.take()
    }

    /// Whether it has not ended yet.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for its end. May be cancelled and asked again.
    pub async fn wait(&mut self) -> Result<ExitStatus> {
        self.child.wait().await.with_context(|| format!("cannot wait for {}", self.name))
    }

    /// Sends a signal to it alone; nothing when it has ended.
    pub fn signal(&self, signal: i32) {
        if self.child.id().is_some() {
            send(self.id.cast_signed(), signal);
        }
    }

    /// Asks it to end with `signal`, kills it when it has not within `grace`, and kills what it left in its group.
    pub async fn stop(mut self, signal: i32, grace: Duration) -> Result<()> {
        self.signal(signal);
        if tokio::time::timeout(grace, self.child.wait()).await.is_err() {
            self.signal(libc::SIGKILL);
            self.child.wait().await?;
        }
        send(-self.id.cast_signed(), libc::SIGKILL);
        Ok(())
    }

    /// Kills it and its group at once, and waits until it is gone.
    pub async fn kill(self) -> Result<()> {
        self.stop(libc::SIGKILL, Duration::from_secs(5)).await
    }

    /// The end of its log, to put behind an error; empty without a log.
    pub fn quote_log(&self) -> String {
        self.log.as_deref().map(quote).unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.child.id().is_some() {
            send(-self.id.cast_signed(), libc::SIGKILL);
        }
    }
}

/// The end of a log file and where it is, as a piece of an error message.
pub fn quote(log: &Path) -> String {
    let mut text = String::new();
    if let Ok(mut file) = File::open(log) {
        let length = file.metadata().map_or(0, |meta| meta.len());
        let _short = file.seek(SeekFrom::Start(length.saturating_sub(QUOTED)));
        let mut bytes = Vec::new();
        let _partial = file.read_to_end(&mut bytes);
        text = String::from_utf8_lossy(&bytes).trim_end().to_owned();
    }
    format!("; the end of {}:\n{text}", log.display())
}

type Job = Box<dyn FnOnce() + Send>;

fn spawner() -> &'static mpsc::Sender<Job> {
    static SPAWNER: OnceLock<mpsc::Sender<Job>> = OnceLock::new();
    SPAWNER.get_or_init(|| {
        let (sender, jobs) = mpsc::channel::<Job>();
        thread::spawn(move || jobs.into_iter().for_each(|job| job()));
        sender
    })
}

#[cfg(target_os = "linux")]
#[allow(unsafe_code)]
fn die_with_us(command: &mut tokio::process::Command, signal: i32) {
    let us = std::process::id().cast_signed();
    // SAFETY: between fork and exec only these two system calls are made, both async-signal-safe, and nothing is allocated. They come
    // after the change of user, which would clear the setting.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, signal) != 0 {
                return Err(io::Error::last_os_error());
            }
            // We may have died before the setting took hold.
            if libc::getppid() != us {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            Ok(())
        });
    }
}

#[cfg(not(target_os = "linux"))]
fn die_with_us(_command: &mut tokio::process::Command, _signal: i32) {}

/// Kills a process of ours by its id; false for one that is gone.
pub(in crate::parts) fn kill(id: u32) -> bool {
    // 0 and 1 are not ours, and would be more than one process.
    id > 1 && send(id.cast_signed(), libc::SIGKILL)
}

#[allow(unsafe_code)]
fn send(target: i32, signal: i32) -> bool {
    // SAFETY: kill reads two integers; a target that is gone is an error that is of no interest here.
    unsafe { libc::kill(target, signal) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_failed_command_tells_the_end_of_its_log() {
        let folder = crate::parts::folder::RunFolder::create().unwrap();
        let log = folder.path().join("log");
        let error = Command::new("sh").args(["-c", "echo out of paper >&2; exit 3"]).log(&log).run().await.unwrap_err();
        let text = format!("{error:#}");
        assert!(text.contains("out of paper") && text.contains("sh failed"), "{text}");
    }

    #[tokio::test]
    async fn a_stopped_process_takes_its_children_along() {
        let folder = crate::parts::folder::RunFolder::create().unwrap();
        let pid_file = folder.path().join("pid");
        let script = format!("sleep 60 & echo $! > {}; wait", pid_file.display());
        let process = Command::new("sh").args(["-c", &script]).spawn().await.unwrap();
        let child = loop {
            match fs::read_to_string(&pid_file).map(|text| text.trim().parse::<i32>()) {
                Ok(Ok(pid)) => break pid,
                _ => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        };
        process.stop(libc::SIGTERM, Duration::from_secs(5)).await.unwrap();
        for _ in 0..200 {
            // A zombie still waits for whoever adopted it, and is gone all the same.
            let state = fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
            if state.is_empty() || state.contains(") Z ") {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the child of a stopped process still runs");
    }
}
