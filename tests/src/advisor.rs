//! Supabase's own advisor, over a database of a test's own.

use crate::Database;
use anyhow::{Context, Result, ensure};
use local::parts::{install, postgres::Role, progress::Progress};
use serde::Deserialize;
use std::{env, path::Path, process::Stdio};
use tokio::process::Command;

/// What a fresh database cannot pass: nothing has used an index yet.
const NOT_JUDGED: &str = "unused_index";
/// Everything that it has to say, to be read by a program.
const ARGUMENTS: &str = "db advisors --type all --level info --fail-on none --output-format json --agent no";

/// Something that the advisor has against a schema.
#[derive(Debug, Deserialize)]
pub struct Finding {
    /// The lint, as `rls_disabled_in_public`.
    pub name: String,
    /// `INFO`, `WARN` or `ERROR`.
    pub level: String,
    /// What it is about.
    pub detail: String,
}

#[derive(Deserialize)]
struct Advice {
    results: Vec<Finding>,
}

/// Runs every lint over a test's database; what was found, whatever its level.
pub async fn findings(database: &Database) -> Result<Vec<Finding>> {
    // The lints ask what the API exposes; on Supabase the platform has set it.
    let admin = database.connect(Role::Admin).await?;
    admin.batch_execute(&format!("alter database \"{}\" set pgrst.db_schemas = 'public'", database.name)).await?;
    findings_at(database.url(Role::Owner), &database.attached.folder).await
}

/// As [`findings`], of any database; it is only read. The CLI keeps its notes in `home`.
pub async fn findings_at(url: &str, home: &Path) -> Result<Vec<Finding>> {
    let cli = install::supabase_cli(&Progress::hidden()).await?;
    let output = Command::new(cli)
        .args(ARGUMENTS.split(' '))
        .arg(format!("--remote={url}"))
        .current_dir(home)
        .env_clear()
        .envs([("HOME", home), ("XDG_CONFIG_HOME", home), ("SUPABASE_HOME", home)])
        .env("PATH", env::var_os("PATH").unwrap_or_default())
        .envs([("DO_NOT_TRACK", "1"), ("SUPABASE_TELEMETRY_DISABLED", "1"), ("CI", "1"), ("NO_COLOR", "1")])
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "the advisor did not run: {text}{}", String::from_utf8_lossy(&output.stderr));
    let Advice { mut results } = serde_json::from_str(&text).with_context(|| format!("the advisor said: {text}"))?;
    results.retain(|finding| finding.name != NOT_JUDGED);
    Ok(results)
}
