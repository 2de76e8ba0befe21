//! The real PostgREST, set up as Supabase sets it up.

use crate::parts::{
    keys::Keys,
    postgres::free_port,
    process::{Command, Process},
};
use anyhow::{Context, Result, bail};
use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use tokio::{sync::Mutex, time::sleep};
use url::Url;

/// How long it may take to have read the schema.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How often a start is tried on other ports.
const PORT_TRIES: usize = 5;

/// How a PostgREST is set up.
#[derive(Debug, Clone)]
pub struct PostgrestOptions {
    /// The binary, from [`crate::parts::install::postgrest`].
    pub binary: PathBuf,
    /// The database, as `authenticator`.
    pub database_url: String,
    /// Connections at most.
    pub pool: u32,
}

/// A running PostgREST. It can be killed and started again on its port, as the demo does to show that nothing is lost.
#[derive(Debug)]
pub struct Postgrest {
    /// Its root, without `/rest/v1`: where the gateway, or a proxy, sends what it is asked.
    pub url: Url,
    admin_port: u16,
    command: Command,
    process: Mutex<Option<Process>>,
}

impl Postgrest {
    /// Starts it and waits until it has read the schema. `folder` gets the public keys it verifies with, `logs` its `postgrest.log`.
    pub async fn start(options: &PostgrestOptions, keys: &Keys, folder: &Path, logs: &Path) -> Result<Self> {
        let key_set = folder.join("postgrest-jwks.json");
        fs::write(&key_set, keys.postgrest_jwks().to_string())?;
        let mut last = None;
        for _ in 0..PORT_TRIES {
            let (port, admin_port) = (free_port()?, free_port()?);
            let command = command(options, &key_set, port, admin_port).folder(folder).log(logs.join("postgrest.log"));
            let url = Url::parse(&format!("http://127.0.0.1:{port}/"))?;
            let postgrest = Self { url, admin_port, command, process: Mutex::new(None) };
            match postgrest.restart().await {
                Ok(()) => return Ok(postgrest),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| anyhow::anyhow!("PostgREST was not started")))
    }

    /// Kills it, as a crash would; requests are refused until [`Self::restart`].
    pub async fn kill(&self) -> Result<()> {
        match self.process.lock().await.take() {
            Some(process) => process.kill().await,
            None => Ok(()),
        }
    }

    /// Starts it again on the same port after [`Self::kill`] and waits until it is ready.
    pub async fn restart(&self) -> Result<()> {
        let mut held = self.process.lock().await;
        if let Some(process) = held.take() {
            process.kill().await?;
        }
        let mut process = self.command.clone().spawn().await?;
        let ready = format!("http://127.0.0.1:{}/ready", self.admin_port);
        let client = crate::parts::http_client()?;
        let begun = Instant::now();
        loop {
            if !process.is_running() {
                bail!("PostgREST ended as it started{}", process.quote_log());
            }
            if client.get(&ready).send().await.is_ok_and(|response| response.status().is_success()) {
                break;
            }
            if begun.elapsed() > START_LIMIT {
                bail!("PostgREST is not ready{}", process.quote_log());
            }
            sleep(Duration::from_millis(10)).await;
        }
        *held = Some(process);
        Ok(())
    }

    /// Stops it.
    pub async fn stop(self) -> Result<()> {
        match self.process.into_inner() {
            Some(process) => {
                process.stop(libc::SIGTERM, Duration::from_secs(2)).await.context("PostgREST does not stop")
            }
            None => Ok(()),
        }
    }
}

fn command(options: &PostgrestOptions, key_set: &Path, port: u16, admin_port: u16) -> Command {
    Command::new(&options.binary).clear_env().envs([
        ("PGRST_DB_URI", options.database_url.clone()),
        ("PGRST_DB_SCHEMAS", "public".to_owned()),
        ("PGRST_DB_EXTRA_SEARCH_PATH", "public,extensions".to_owned()),
        ("PGRST_DB_ANON_ROLE", "anon".to_owned()),
        ("PGRST_DB_POOL", options.pool.to_string()),
        ("PGRST_DB_MAX_ROWS", "1000".to_owned()),
        // Back at once after the database was away, rather than after the default of up to 32 s.
        ("PGRST_DB_POOL_AUTOMATIC_RECOVERY", "true".to_owned()),
        ("PGRST_JWT_SECRET", format!("@{}", key_set.display())),
        ("PGRST_JWT_AUD", "authenticated".to_owned()),
        // The gateway's tokens and a user's come many times: each signature is checked once in this time.
        ("PGRST_JWT_CACHE_MAX_LIFETIME", "300".to_owned()),
        ("PGRST_SERVER_HOST", "127.0.0.1".to_owned()),
        ("PGRST_SERVER_PORT", port.to_string()),
        ("PGRST_ADMIN_SERVER_PORT", admin_port.to_string()),
        ("PGRST_LOG_LEVEL", "warn".to_owned()),
    ])
}
