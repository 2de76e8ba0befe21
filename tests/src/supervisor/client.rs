//! The side of a test.

use super::{Answer, Ask, Rendezvous};
use anyhow::{Context, Result, bail};
use std::{
    collections::BTreeMap,
    fs::{self, File, TryLockError},
    io::{BufRead, BufReader as StdBufReader},
    os::unix::process::{CommandExt, parent_id},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Once,
    thread,
    time::Duration,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::Mutex,
    time::sleep,
};

/// How often a test looks whether it may attach, and whether its parent is still there.
const LOOK: Duration = Duration::from_millis(50);

/// A test's connection to the supervisor; what the test was given is taken back when this is dropped.
#[derive(Debug)]
pub struct Attached {
    /// A folder of the test's own, removed with the connection.
    pub folder: PathBuf,
    line: Mutex<(BufReader<OwnedReadHalf>, OwnedWriteHalf)>,
}

impl Attached {
    /// Attaches to the run's supervisor, starting it when there is none.
    pub async fn attach(binary: &Path) -> Result<Self> {
        end_with_parent();
        let place = Rendezvous::beside(binary);
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&place.lock)
            .with_context(|| format!("cannot write {}", place.lock.display()))?;
        loop {
            match lock.try_lock() {
                Ok(()) => break,
                // Another test is starting the supervisor, which may take as long as installing its parts.
                Err(TryLockError::WouldBlock) => sleep(LOOK).await,
                Err(TryLockError::Error(error)) => return Err(error.into()),
            }
        }
        // Held until the supervisor has counted us in: it does not end meanwhile.
        let stream = match connect(&place).await {
            Ok(stream) => stream,
            Err(_) => {
                start(binary, &place)?;
                connect(&place).await?
            }
        };
        let (reader, writer) = stream.into_split();
        let mut attached = Self { folder: PathBuf::new(), line: Mutex::new((BufReader::new(reader), writer)) };
        match attached.ask(&Ask::Attach { parent: parent_id() }).await? {
            Answer::Attached { folder } => attached.folder = folder,
            other => bail!("the supervisor answered {other:?}"),
        }
        Ok(attached)
    }

    /// A new database: a clone of the template, or, without `migrated`, one that has only what Supabase adds. Its name, and its URLs by
    /// role.
    pub async fn database(&self, migrated: bool) -> Result<(String, BTreeMap<String, String>)> {
        match self.ask(&Ask::Database { migrated }).await? {
            Answer::Database { name, urls } => Ok((name, urls)),
            other => bail!("the supervisor answered {other:?}"),
        }
    }

    /// The queue server: its endpoint, and the environment that AWS's clients find it by.
    pub async fn queues(&self) -> Result<(String, BTreeMap<String, String>)> {
        match self.ask(&Ask::Queues).await? {
            Answer::Queues { url, environment } => Ok((url, environment)),
            other => bail!("the supervisor answered {other:?}"),
        }
    }

    async fn ask(&self, ask: &Ask) -> Result<Answer> {
        let mut line = self.line.lock().await;
        let (reader, writer) = &mut *line;
        writer
            .write_all(format!("{}\n", serde_json::to_string(ask)?).as_bytes())
            .await
            .context("the supervisor is gone")?;
        let mut answer = String::new();
        reader.read_line(&mut answer).await.context("the supervisor is gone")?;
        match serde_json::from_str(&answer).with_context(|| format!("the supervisor said {answer:?}"))? {
            Answer::Failed { why } => bail!("{why}"),
            other => Ok(other),
        }
    }
}

async fn connect(place: &Rendezvous) -> Result<UnixStream> {
    let socket = fs::read_to_string(&place.state)?;
    UnixStream::connect(socket.trim()).await.with_context(|| format!("no supervisor at {socket}"))
}

fn start(binary: &Path, place: &Rendezvous) -> Result<()> {
    let log = File::create(&place.log)?;
    let mut child = Command::new(binary)
        .arg(binary)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // Not ours: a test runner waits until everybody has closed a test's output.
        .stderr(log)
        // Ctrl-C on the terminal reaches the runner and us; it then sees us go, and ends in order.
        .process_group(0)
        .spawn()
        .with_context(|| format!("cannot start {}", binary.display()))?;
    let mut ready = String::new();
    if let Some(output) = child.stdout.take() {
        StdBufReader::new(output).read_line(&mut ready)?;
    }
    if ready.trim() != "ready" {
        bail!("the supervisor did not start: {}", fs::read_to_string(&place.log).unwrap_or_default());
    }
    // It lives on; when it ends before us, somebody has to take note, or it stays as a zombie.
    thread::spawn(move || child.wait());
    Ok(())
}

/// Ends this process when whoever runs the tests is gone: a killed run would otherwise leave its tests running.
fn end_with_parent() {
    static WATCH: Once = Once::new();
    WATCH.call_once(|| {
        let parent = parent_id();
        thread::spawn(move || {
            while parent_id() == parent {
                thread::sleep(LOOK);
            }
            std::process::exit(1);
        });
    });
}
