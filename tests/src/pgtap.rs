//! pgTAP in a database, whichever way it can be had, and the files that use it.

use crate::{database::first_column, tap::Report};
use anyhow::{Context, Result, bail, ensure};
use futures::{StreamExt, pin_mut};
use local::parts::{folder, process};
use std::{
    fs,
    path::{Path, PathBuf},
};
use tokio_postgres::{Client, SimpleQueryMessage};

/// Where pgTAP's functions are; the files of tests have it on their search path.
const SCHEMA: &str = "tap";

/// Makes pgTAP available in the schema `tap`, in the transaction that the connection is in. Where it is there already, it stays.
pub async fn install(client: &Client) -> Result<()> {
    client.batch_execute(&format!("create schema if not exists {SCHEMA}")).await?;
    let present = format!("select 1 where to_regprocedure('{SCHEMA}.plan(integer)') is not null");
    let available = "select 1 from pg_available_extensions where name = 'pgtap'";
    if first_column(client, &present).await?.is_empty() {
        if first_column(client, available).await?.is_empty() {
            let sql = fs::read_to_string(plain_sql(client).await?)?;
            client.batch_execute(&format!("set local search_path = {SCHEMA}")).await?;
            client.batch_execute(&sql).await.context("pgTAP's plain SQL does not apply")?;
        } else {
            client.batch_execute(&format!("create extension if not exists pgtap with schema {SCHEMA}")).await?;
        }
    }
    // Tests act as users too.
    client
        .batch_execute(&format!(
            "grant usage on schema {SCHEMA} to public; grant execute on all functions in schema {SCHEMA} to public; \
             set local search_path = public, extensions, {SCHEMA}"
        ))
        .await?;
    Ok(())
}

/// pgTAP without its extension, for a server that does not ship it: of another server of the machine, else from Debian's package,
/// unpacked and not installed.
async fn plain_sql(client: &Client) -> Result<PathBuf> {
    let parts = folder::parts()?.join("pgtap");
    if let Some(sql) = find_sql(Path::new("/usr/share/postgresql")).or_else(|| find_sql(&parts)) {
        return Ok(sql);
    }
    let version = first_column(client, "show server_version").await?.into_iter().next().unwrap_or_default();
    let advice = format!(
        "the server (PostgreSQL {version}) does not ship pgTAP: install postgresql-15-pgtap, or set DATABASE_URL to one that has it"
    );
    let scratch = folder::parts()?.join(format!("pgtap.{}", std::process::id()));
    fs::create_dir_all(&scratch)?;
    // Any major version's package will do: the SQL is the same for all.
    let script = "name=$(apt-cache pkgnames postgresql- | grep -E '^postgresql-[0-9]+-pgtap$' | sort -V | tail -n 1) && \
                  apt-get download \"$name\" && dpkg -x ./*.deb .";
    let unpacked =
        process::Command::new("sh").args(["-c", script]).folder(&scratch).log(scratch.join("log")).run().await;
    let unpacked = unpacked.context(advice.clone()).and_then(|()| {
        ensure!(find_sql(&scratch).is_some(), advice);
        // Another test may have been faster.
        if !parts.exists() {
            let _theirs = fs::rename(&scratch, &parts);
        }
        Ok(())
    });
    let _moved = fs::remove_dir_all(&scratch);
    unpacked?;
    find_sql(&parts).context("pgTAP was unpacked and is not there")
}

/// The newest whole version below a folder: `pgtap--1.2.0.sql`, not a step from one to another.
fn find_sql(folder: &Path) -> Option<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).ok()?.flatten() {
            let path = entry.path();
            let name = entry.file_name().to_string_lossy().into_owned();
            if path.is_dir() {
                folders.push(path);
            } else if name.starts_with("pgtap--") && name.matches("--").count() == 1 && name.ends_with(".sql") {
                found.push(path);
            }
        }
    }
    found.sort();
    found.pop()
}

/// The project's own files of tests, in order.
pub fn files() -> Result<Vec<PathBuf>> {
    let folder = folder::workspace()?.join("supabase/tests");
    let mut files: Vec<PathBuf> = fs::read_dir(&folder)
        .with_context(|| folder.display().to_string())?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.to_string_lossy().ends_with(".test.sql"))
        .collect();
    files.sort();
    ensure!(!files.is_empty(), "there is no test in {}", folder.display());
    Ok(files)
}

/// Runs files and says how each did; fails unless all passed.
pub async fn judge(client: &Client, files: &[PathBuf]) -> Result<()> {
    let mut failed = 0;
    for file in files {
        let report = run_file(client, file).await?;
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        println!("{} {name}: {report}", if report.passed() { "passed" } else { "FAILED" });
        failed += usize::from(!report.passed());
    }
    ensure!(failed == 0, "{failed} of {} files failed; see above", files.len());
    Ok(())
}

/// Has pgTAP for many files, in a database that ends with the test.
pub async fn install_for_good(client: &Client) -> Result<()> {
    client.batch_execute("begin").await?;
    install(client).await?;
    client.batch_execute("commit").await?;
    Ok(())
}

/// Runs one file in a transaction that is rolled back, pgTAP included: it leaves the database as it was.
pub async fn run_file(client: &Client, path: &Path) -> Result<Report> {
    let sql = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    if sql.lines().any(|line| line.trim_start().to_ascii_lowercase().starts_with("commit")) {
        bail!("{} commits: a test leaves nothing behind", path.display());
    }
    client.batch_execute("begin").await?;
    let report = match install(client).await {
        // The file's own `begin` is then only a warning, and its `rollback` ends all.
        Ok(()) => Ok(run(client, &sql).await?),
        Err(error) => Err(error),
    };
    client.batch_execute("rollback").await?;
    report
}

/// Runs statements and reads what they return, up to the one that fails.
async fn run(client: &Client, sql: &str) -> Result<Report> {
    let mut report = Report::default();
    let messages = client.simple_query_raw(sql).await?;
    pin_mut!(messages);
    while let Some(message) = messages.next().await {
        match message {
            Ok(SimpleQueryMessage::Row(row)) => report.read(row.get(0).unwrap_or_default()),
            Ok(_) => {}
            Err(error) => {
                let told = error.as_db_error().map_or_else(
                    || error.to_string(),
                    |error| {
                        let detail = error.detail().map(|detail| format!(" ({detail})")).unwrap_or_default();
                        let place = error.where_().map(|place| format!("\n      at {place}")).unwrap_or_default();
                        format!("{} {}{detail}{place}", error.code().code(), error.message())
                    },
                );
                report.stopped = Some(told);
            }
        }
    }
    Ok(report)
}
