//! Applies `supabase/` to a database, with Supabase's own CLI.

use crate::parts::{folder, postgres, process::Command};
use anyhow::{Context, Result};
use std::{fs, path::Path};

/// Applies all migrations that the database does not have yet, as `supabase db push` does to a hosted project.
///
/// `url` is that of the role `postgres`. The CLI works in a copy below `scratch`, so that it writes nothing into the checkout and runs at
/// once do not meet; its output is in `supabase.log` in `logs`.
pub async fn push_migrations(cli: &Path, url: &str, scratch: &Path, logs: &Path) -> Result<()> {
    let source = folder::workspace()?.join("supabase");
    let project = scratch.join("supabase-push");
    let target = project.join("supabase");
    fs::create_dir_all(&target)?;
    folder::copy_all(&source.join("migrations"), &target.join("migrations"))?;
    let config = source.join("config.toml");
    if config.is_file() {
        fs::copy(config, target.join("config.toml"))?;
    }
    let home = scratch.join("supabase-home");
    fs::create_dir_all(&home)?;
    Command::new(cli)
        .args(["db", "push", "--yes", "--skip-vault", "--output-format", "text", "--agent", "no"])
        .arg("--workdir")
        .arg(&project)
        .arg(format!("--remote={url}"))
        .folder(&project)
        .clear_env()
        // Nothing of the user's own Supabase account is read, and nothing is reported to anybody.
        .env("HOME", &home)
        .env("XDG_CONFIG_HOME", &home)
        .env("SUPABASE_HOME", &home)
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .envs(
            ["DO_NOT_TRACK", "SUPABASE_TELEMETRY_DISABLED", "SUPABASE_NO_UPDATE_NOTIFIER", "SUPABASE_NO_KEYRING"]
                .map(|name| (name, "1")),
        )
        .envs([("CI", "1"), ("NO_COLOR", "1"), ("PGSSLMODE", "disable")])
        .log(logs.join("supabase.log"))
        .run()
        .await
        .context("supabase db push")
}

/// Runs `supabase/seed.sql`, where there is one, as the role of the URL.
pub async fn seed(url: &str) -> Result<()> {
    let seed = folder::workspace()?.join("supabase/seed.sql");
    if !seed.is_file() {
        return Ok(());
    }
    let sql = fs::read_to_string(&seed)?;
    let client = postgres::connect(url).await?;
    client.batch_execute(&sql).await.context("supabase/seed.sql does not apply")
}
