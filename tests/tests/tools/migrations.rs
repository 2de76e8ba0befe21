//! Squawk over the migrations: what would hold up, or lose, a database that is in use.

use anyhow::{Context, Result};
use local::parts::{
    folder::{self, RunFolder},
    install,
    progress::Progress,
};
use serde::Deserialize;
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};
use tokio::process::Command;

/// What is left as it is in migrations that have landed and so never change. A later one says it in place.
#[rustfmt::skip]
const LANDED: &[(&str, &str, &str)] = &[
    ("20261122000000_initial.sql", "require-lock-timeout", "it makes all that it touches: nobody holds a lock on it"),
    ("20261122000000_initial.sql", "require-statement-timeout", "it makes all that it touches: nobody waits for it"),
    ("20261122010000_seed_systems.sql", "require-lock-timeout", "it was written before the first release: no installation was in use"),
    ("20261122010000_seed_systems.sql", "require-statement-timeout", "as above"),
    ("20261122010000_seed_systems.sql", "identifier-too-long", "two names of policies, which are cut: 20261124000400 gives them names that fit"),
    ("20261122010000_seed_systems.sql", "constraint-missing-not-valid", "the tables were empty: a scan of nothing"),
    ("20261122010000_seed_systems.sql", "adding-foreign-key-constraint", "the column was made in the same statement: nothing refers yet"),
    ("20261122010000_seed_systems.sql", "disallowed-unique-constraint", "stages are few: a pipeline has a handful"),
    ("20261122010000_seed_systems.sql", "ban-drop-constraint", "a credit note may settle an invoice too: the next statement adds the wider check"),
    ("20261122010000_seed_systems.sql", "require-concurrent-index-creation", "the column was made just before: no row is in the index"),
    ("20261122010000_seed_systems.sql", "require-concurrent-index-deletion", "the unique constraint of the next statement takes its place"),
];

#[derive(Debug, Deserialize)]
struct Finding {
    file: String,
    line: u32,
    rule_name: String,
    message: String,
}

async fn squawk(files: &[PathBuf]) -> Result<Vec<Finding>> {
    let output = Command::new(install::squawk(&Progress::hidden()).await?)
        .arg("--config")
        .arg(folder::workspace()?.join("supabase/.squawk.toml"))
        .args(["--reporter", "json"])
        .args(files)
        .kill_on_drop(true)
        .output()
        .await?;
    let told = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(&told)
        .with_context(|| format!("Squawk said: {told}{}", String::from_utf8_lossy(&output.stderr)))
}

fn name(path: &str) -> &str {
    Path::new(path).file_name().and_then(|name| name.to_str()).unwrap_or(path)
}

fn migrations() -> Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> =
        fs::read_dir(folder::workspace()?.join("supabase/migrations"))?.flatten().map(|entry| entry.path()).collect();
    files.sort();
    Ok(files)
}

#[tokio::test]
async fn no_migration_holds_up_a_database_in_use_without_a_reason() -> Result<()> {
    let mut unused: BTreeSet<(&str, &str)> = LANDED.iter().map(|(file, rule, _)| (*file, *rule)).collect();
    let mut wrong = Vec::new();
    for finding in squawk(&migrations()?).await? {
        let (file, rule) = (name(&finding.file), finding.rule_name.as_str());
        if let Some((file, rule, _)) = LANDED.iter().find(|landed| (landed.0, landed.1) == (file, rule)) {
            unused.remove(&(*file, *rule));
        } else {
            wrong.push(format!("{file}:{} {rule}: {}", finding.line, finding.message));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(unused.is_empty(), "these exceptions except nothing: {unused:?}");
    Ok(())
}

#[test]
fn every_exception_in_a_migration_has_its_reason_above_it() -> Result<()> {
    for file in migrations()? {
        let sql = fs::read_to_string(&file)?;
        let mut above = "";
        for (index, line) in sql.lines().enumerate() {
            if line.contains("squawk-ignore") {
                let reason = above.trim().strip_prefix("--").is_some_and(|text| !text.contains("squawk-ignore"));
                assert!(reason, "{}:{}: why?", file.display(), index + 1);
            }
            above = line;
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_migration_that_would_is_found() -> Result<()> {
    let folder = RunFolder::create()?;
    let file = folder.path().join("20990101000000_careless.sql");
    fs::write(
        &file,
        "create index idx_leads_score on public.leads (score);\nalter table public.leads drop column notes;\n",
    )?;
    let found: BTreeSet<String> = squawk(&[file]).await?.into_iter().map(|finding| finding.rule_name).collect();
    for rule in ["require-concurrent-index-creation", "ban-drop-column", "require-lock-timeout"] {
        assert!(found.contains(rule), "{rule} is not among {found:?}");
    }
    Ok(())
}
