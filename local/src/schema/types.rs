//! `supabase/types.ts`: the exposed schema in TypeScript, as Supabase's own CLI writes it.

use anyhow::{Result, ensure};
use std::{env, path::Path, process::Stdio};
use tokio::process::Command;

/// Asks the CLI for the types of the database at `url` (role `postgres`); it keeps its notes in `home`.
pub async fn render(cli: &Path, url: &str, home: &Path) -> Result<String> {
    let output = Command::new(cli)
        .args(["gen", "types", "typescript", "--schema", "public"])
        .arg(format!("--remote={url}"))
        .current_dir(home)
        .env_clear()
        .envs([("HOME", home), ("XDG_CONFIG_HOME", home), ("SUPABASE_HOME", home)])
        .env("PATH", env::var_os("PATH").unwrap_or_default())
        .envs([("DO_NOT_TRACK", "1"), ("SUPABASE_TELEMETRY_DISABLED", "1"), ("CI", "1"), ("NO_COLOR", "1")])
        // Without it the CLI remarks on the missing TLS, and does so in what it prints.
        .env("PGSSLMODE", "disable")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await?;
    let text = String::from_utf8(output.stdout)?.trim_start().to_owned();
    ensure!(
        output.status.success() && text.starts_with("export type") && text.contains("export type Database"),
        "supabase gen types: {}{}",
        text.lines().next().unwrap_or_default(),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(text)
}
