//! The project's binaries, run as a person runs them.

use anyhow::{Context, Result, ensure};
use local::parts::{
    folder,
    process::{Command, Process, quote},
};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    process::ChildStdout,
    time::{sleep, timeout},
};

/// How long processes may take to be gone when whoever started them is.
const GONE_WITHIN: Duration = Duration::from_secs(10);

/// Builds every binary of the workspace: `cargo test` itself builds only those of the package under test. The folder that they are in.
pub async fn build(supervisor: &Path) -> Result<PathBuf> {
    let binaries = supervisor.parent().context("a binary without a folder")?;
    let log = binaries.join(format!("e2e-build-{}.log", std::process::id()));
    let release = if binaries.ends_with("release") { vec!["--release"] } else { vec![] };
    let built = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["build", "--workspace", "--bins"])
        .args(release)
        .folder(folder::workspace()?)
        // What cargo told this test about its own package would have build scripts that look at it run again.
        .clear_env()
        .envs(env::vars_os().filter(|(name, _)| !is_of_this_package(&name.to_string_lossy())))
        .log(&log)
        .run()
        .await;
    let _old = fs::remove_file(&log);
    built.map(|()| binaries.to_path_buf())
}

fn is_of_this_package(name: &str) -> bool {
    ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_", "NEXTEST"]
        .iter()
        .any(|prefix| name.starts_with(prefix))
        || ["CARGO_PRIMARY_PACKAGE", "LD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH", "OUT_DIR"].contains(&name)
}

/// A running program; it is killed, and all that it started, when this is dropped or this process ends.
pub struct Program {
    process: Process,
    output: BufReader<ChildStdout>,
    log: PathBuf,
}

impl Program {
    /// Starts one. What it says to a person goes to a file of its own in `logs`.
    pub async fn start(binary: &Path, args: &[&str], logs: &Path) -> Result<Self> {
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let name = binary.file_name().unwrap_or_default().to_string_lossy();
        let log = logs.join(format!("{name}-{}.log", STARTED.fetch_add(1, Ordering::Relaxed)));
        let mut process = Command::new(binary).args(args.iter().copied()).pipe_stdout().log(&log).spawn().await?;
        let output = BufReader::new(process.take_stdout().context("a program without output")?);
        Ok(Self { process, output, log })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// The next line that it writes.
    pub async fn line(&mut self, within: Duration) -> Result<String> {
        let mut line = String::new();
        let read = timeout(within, self.output.read_line(&mut line)).await;
        ensure!(matches!(read, Ok(Ok(1..))), "nothing was said within {within:?}{}", quote(&self.log));
        Ok(line.trim_end().to_owned())
    }

    /// Waits until it has told a person something.
    pub async fn has_said(&mut self, text: &str, within: Duration) -> Result<()> {
        let begun = Instant::now();
        while !fs::read_to_string(&self.log).unwrap_or_default().contains(text) {
            ensure!(begun.elapsed() < within, "{text:?} was not said within {within:?}{}", quote(&self.log));
            ensure!(self.process.is_running(), "it ended before it said {text:?}{}", quote(&self.log));
            sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Waits for its end; its exit code, and what it wrote since the last line that was read.
    pub async fn end(&mut self, within: Duration) -> Result<(Option<i32>, String)> {
        let mut text = String::new();
        let ended = timeout(within, async {
            self.output.read_to_string(&mut text).await?;
            self.process.wait().await
        });
        let status = ended.await.with_context(|| format!("it did not end within {within:?}{}", quote(&self.log)))??;
        Ok((status.code(), text))
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: i32) {
        self.process.signal(signal);
    }

    /// What it told a person last, for an error.
    pub fn quote(&self) -> String {
        quote(&self.log)
    }
}

/// The last line of a text as JSON.
pub fn last_json(text: &str) -> Result<Value> {
    let line = text.trim_end().lines().last().context("nothing was written")?;
    serde_json::from_str(line).with_context(|| format!("the last line is no JSON: {line}"))
}

/// A process and all below it, as the kernel sees them now (Linux).
pub fn family(root: u32) -> BTreeSet<u32> {
    let mut children: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        // "pid (name) state ppid …", and the name may hold anything.
        let parent = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse().ok());
        children.entry(parent.unwrap_or(0)).or_default().push(pid);
    }
    let (mut family, mut next) = (BTreeSet::from([root]), vec![root]);
    while let Some(pid) = next.pop() {
        for child in children.get(&pid).into_iter().flatten() {
            if family.insert(*child) {
                next.push(*child);
            }
        }
    }
    family
}

/// The names of a process and those below it, for an error or an expectation.
pub fn names(pids: &BTreeSet<u32>) -> Vec<String> {
    let name = |pid: &u32| fs::read_to_string(format!("/proc/{pid}/comm")).ok().map(|name| name.trim().to_owned());
    pids.iter().filter_map(name).collect()
}

/// Waits until none of these processes is there any more; a zombie is gone.
pub async fn all_gone(pids: &BTreeSet<u32>) -> Result<()> {
    let begun = Instant::now();
    loop {
        let left: BTreeSet<u32> = pids.iter().copied().filter(|pid| crate::supervisor::is_alive(*pid)).collect();
        if left.is_empty() {
            return Ok(());
        }
        ensure!(
            begun.elapsed() < GONE_WITHIN,
            "these are still there after {GONE_WITHIN:?}: {left:?} {:?}",
            names(&left)
        );
        sleep(Duration::from_millis(20)).await;
    }
}
