//! The database that every test's is cloned from.

use anyhow::{Context, Result};
use local::parts::{
    folder::{self, RunFolder},
    install,
    postgres::{Postgres, Role},
    progress::Progress,
    supabase,
};
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};
use tokio::sync::Mutex;

/// Database of the cluster that has what Supabase adds and nothing of ours.
pub const BARE: &str = "postgres";

/// Templates by name, each made once, whether that went well or not: a migration that fails, fails every test at once.
#[derive(Default)]
pub struct Templates {
    made: Mutex<BTreeMap<String, Result<(), String>>>,
}

impl Templates {
    /// The name of the template of `supabase/` and `local/sql` as they are now, after making it if it was not there.
    pub async fn current(&self, postgres: &Postgres, run: &RunFolder, logs: &Path) -> Result<String> {
        let name = format!("template_{}", &sources_hash()?[..16]);
        let mut made = self.made.lock().await;
        if !made.contains_key(&name) {
            let result = make(postgres, &name, run, logs).await;
            made.insert(name.clone(), result.map_err(|error| format!("{error:#}")));
        }
        match &made[&name] {
            Ok(()) => Ok(name),
            Err(why) => Err(anyhow::anyhow!("{why}")),
        }
    }
}

/// Applies the migrations as they are applied to a hosted project: by Supabase's CLI, as the role `postgres`.
async fn make(postgres: &Postgres, name: &str, run: &RunFolder, logs: &Path) -> Result<()> {
    let cli = install::supabase_cli(&Progress::visible()).await?;
    postgres.clone_database(BARE, name).await?;
    let owner = postgres.url(Role::Owner, name);
    supabase::push_migrations(&cli, &owner, run.path(), logs).await?;
    supabase::seed(&owner).await?;
    let admin = postgres.connect(Role::Admin, "template1").await?;
    // Somebody who is connected to a template keeps it from being cloned.
    admin.batch_execute(&format!("alter database \"{name}\" with is_template true allow_connections false")).await?;
    Ok(())
}

/// A hash over everything that decides what the template holds.
fn sources_hash() -> Result<String> {
    let root = folder::workspace()?;
    let mut hash = Sha256::new();
    for folder in ["supabase", "local/sql"] {
        let mut files = Vec::new();
        collect(&root.join(folder), &mut files)?;
        files.sort();
        for file in files {
            hash.update(file.strip_prefix(&root)?.to_string_lossy().as_bytes());
            hash.update([0]);
            hash.update(fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?);
            hash.update([0]);
        }
    }
    Ok(hex::encode(hash.finalize()))
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        // Tests do not change what they test, and the CLI's notes are nobody's source.
        if name.starts_with('.') || path.ends_with("supabase/tests") {
            continue;
        }
        if path.is_dir() {
            collect(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}
