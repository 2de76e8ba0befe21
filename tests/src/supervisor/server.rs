//! The supervisor's side.

use super::{
    Answer, Ask, Rendezvous, is_alive,
    template::{BARE, Templates},
};
use anyhow::{Context, Result};
use local::parts::{
    folder::RunFolder,
    install,
    postgres::{Postgres, PostgresOptions, Role, Server},
    progress::Progress,
    sqs::Sqs,
};
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    net::{UnixListener, UnixStream, unix::OwnedReadHalf},
    sync::OnceCell,
    time::{MissedTickBehavior, interval, sleep},
};

/// How long it waits for another test when the last has gone.
const GRACE: Duration = Duration::from_secs(5);
/// How often it looks who is still there.
const LOOK: Duration = Duration::from_millis(100);
/// Connections that the tests of a machine with many cores may hold together.
const MAX_CONNECTIONS: u32 = 600;

/// Serves the tests of a run, until there are none. `binary` is this program as the tests know it.
pub fn serve(binary: &Path) -> Result<()> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(async { Supervisor::start(binary)?.run().await })
}

struct Supervisor {
    place: Rendezvous,
    listener: UnixListener,
    shared: Arc<Shared>,
}

struct Shared {
    logs: PathBuf,
    postgres: OnceCell<Postgres>,
    templates: Templates,
    sqs: OnceCell<Sqs>,
    /// Tests that are connected.
    present: AtomicUsize,
    /// Numbers databases and folders.
    next: AtomicU32,
    /// Everybody who ever ran tests here.
    parents: Mutex<Vec<u32>>,
    /// Last, so that it is removed when the servers that write into it are gone.
    run: RunFolder,
}

impl Supervisor {
    fn start(binary: &Path) -> Result<Self> {
        let place = Rendezvous::beside(binary);
        let run = RunFolder::create()?;
        let logs = run.subfolder("logs", 0o700)?;
        let socket = run.path().join("supervisor.sock");
        let listener = UnixListener::bind(&socket).with_context(|| format!("cannot listen at {}", socket.display()))?;
        fs::write(&place.state, socket.to_string_lossy().as_bytes())?;
        // The test that started us reads this one line and then closes its end.
        std::io::stdout().write_all(b"ready\n")?;
        std::io::stdout().flush()?;
        let shared = Shared {
            run,
            logs,
            postgres: OnceCell::new(),
            templates: Templates::default(),
            sqs: OnceCell::new(),
            present: AtomicUsize::new(0),
            next: AtomicU32::new(0),
            parents: Mutex::default(),
        };
        Ok(Self { place, listener, shared: Arc::new(shared) })
    }

    async fn run(self) -> Result<()> {
        let mut look = interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut alone_since = Instant::now();
        loop {
            tokio::select! {
                accepted = self.listener.accept() => {
                    let (stream, _) = accepted?;
                    self.shared.present.fetch_add(1, Ordering::Relaxed);
                    let shared = Arc::clone(&self.shared);
                    tokio::spawn(async move {
                        if let Err(error) = shared.attend(stream).await {
                            eprintln!("a test was left: {error:#}");
                        }
                        shared.present.fetch_sub(1, Ordering::Relaxed);
                    });
                }
                _ = look.tick() => {
                    if self.shared.present.load(Ordering::Relaxed) > 0 {
                        alone_since = Instant::now();
                    } else if (alone_since.elapsed() > GRACE || self.shared.run_is_over()) && self.may_end()? {
                        break;
                    }
                }
            }
        }
        drop(self.listener);
        self.shared.stop().await
    }

    /// Whether nobody is attaching at this moment; then nobody will find us any more.
    fn may_end(&self) -> Result<bool> {
        let lock = File::options().create(true).truncate(false).write(true).open(&self.place.lock)?;
        if lock.try_lock().is_err() {
            return Ok(false);
        }
        let _gone = fs::remove_file(&self.place.state);
        Ok(true)
    }
}

impl Shared {
    /// Whether everybody who ran tests here is gone.
    fn run_is_over(&self) -> bool {
        let parents = self.parents.lock().unwrap_or_else(PoisonError::into_inner);
        !parents.is_empty() && parents.iter().all(|parent| !is_alive(*parent))
    }

    /// Serves one test until it closes its connection or its parent is gone, then takes back what it got.
    async fn attend(&self, stream: UnixStream) -> Result<()> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let folder = self.run.subfolder(&format!("test-{number}"), 0o700)?;
        let mut databases = Vec::new();
        let served = self.converse(stream, number, &folder, &mut databases).await;
        for database in databases {
            if let Some(postgres) = self.postgres.get() {
                postgres.drop_database(&database).await?;
            }
        }
        fs::remove_dir_all(&folder)?;
        served
    }

    async fn converse(
        &self,
        stream: UnixStream,
        number: u32,
        folder: &Path,
        databases: &mut Vec<String>,
    ) -> Result<()> {
        let (reader, mut writer) = stream.into_split();
        let mut lines = BufReader::new(reader).lines();
        let mut parent = None;
        while let Some(line) = next_line(&mut lines, parent).await? {
            let answer = match serde_json::from_str(&line)? {
                Ask::Attach { parent: theirs } => {
                    parent = Some(theirs);
                    self.parents.lock().unwrap_or_else(PoisonError::into_inner).push(theirs);
                    Answer::Attached { folder: folder.to_path_buf() }
                }
                Ask::Database { migrated } => {
                    let name = format!("test_{number}_{}", databases.len());
                    databases.push(name.clone());
                    match self.database(&name, migrated).await {
                        Ok(urls) => Answer::Database { name, urls },
                        Err(error) => Answer::Failed { why: format!("{error:#}") },
                    }
                }
                Ask::Queues => match self.queues().await {
                    Ok((url, environment)) => Answer::Queues { url, environment },
                    Err(error) => Answer::Failed { why: format!("{error:#}") },
                },
            };
            writer.write_all(format!("{}\n", serde_json::to_string(&answer)?).as_bytes()).await?;
        }
        Ok(())
    }

    async fn postgres(&self) -> Result<&Postgres> {
        self.postgres
            .get_or_try_init(|| async {
                let server = Server::find(&Progress::visible()).await?;
                let options = PostgresOptions { max_connections: MAX_CONNECTIONS, ..PostgresOptions::default() };
                Postgres::start(&server, &self.run, &self.logs, &options).await
            })
            .await
    }

    async fn database(&self, name: &str, migrated: bool) -> Result<BTreeMap<String, String>> {
        let postgres = self.postgres().await?;
        let template =
            if migrated { self.templates.current(postgres, &self.run, &self.logs).await? } else { BARE.to_owned() };
        postgres.clone_database(&template, name).await?;
        let roles = [Role::Admin, Role::Owner, Role::Authenticator, Role::AuthAdmin];
        Ok(roles.map(|role| (role.name().to_owned(), postgres.url(role, name))).into())
    }

    async fn queues(&self) -> Result<(String, BTreeMap<String, String>)> {
        let sqs = self
            .sqs
            .get_or_try_init(|| async {
                let installed = install::ministack(&Progress::visible()).await?;
                Sqs::start(&installed, self.run.path(), &self.logs).await
            })
            .await?;
        let environment = sqs.environment().map(|(name, value)| (name.to_owned(), value));
        Ok((sqs.url.to_string(), environment.into()))
    }

    /// Ends the servers, in order as far as that goes: whoever still uses them keeps them from nothing.
    async fn stop(self: Arc<Self>) -> Result<()> {
        let Some(shared) = Arc::into_inner(self) else { return Ok(()) };
        if let Some(sqs) = shared.sqs.into_inner() {
            sqs.stop().await?;
        }
        if let Some(postgres) = shared.postgres.into_inner() {
            postgres.stop().await?;
        }
        Ok(())
    }
}

/// The next line of a test; none when it has closed, or when the process that runs it is gone.
async fn next_line(lines: &mut Lines<BufReader<OwnedReadHalf>>, parent: Option<u32>) -> Result<Option<String>> {
    loop {
        tokio::select! {
            line = lines.next_line() => return Ok(line?),
            () = sleep(LOOK) => if parent.is_some_and(|parent| !is_alive(parent)) { return Ok(None) },
        }
    }
}
