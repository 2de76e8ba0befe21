//! What is generated from `supabase/schemas/` and the catalog it makes: `master_schema.sql`, `docs/schema.md`, `supabase/types.ts`.
//!
//! Each is a committed file; a test generates it again and fails where the committed one is stale.

pub mod data;
pub mod docs;
pub mod master;
pub mod types;

use crate::parts::folder;
use anyhow::{Context, Result};
use std::{fs, path::PathBuf};

/// A numbered file of `supabase/schemas/`: one domain.
#[derive(Debug, Clone)]
pub struct SchemaFile {
    /// Its name, like `04_crm.sql`.
    pub name: String,
    /// Its text.
    pub sql: String,
}

/// The numbered files, in file order.
pub fn files() -> Result<Vec<SchemaFile>> {
    let folder = folder::workspace()?.join("supabase/schemas");
    let mut paths: Vec<PathBuf> = fs::read_dir(&folder)
        .with_context(|| format!("cannot read {}", folder.display()))?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "sql"))
        .collect();
    paths.sort();
    paths
        .iter()
        .map(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            Ok(SchemaFile { name, sql: fs::read_to_string(path)? })
        })
        .collect()
}

/// The versions of the migrations, in their order: what stands before the first underscore of a file's name.
pub fn migrations() -> Result<Vec<String>> {
    let folder = folder::workspace()?.join("supabase/migrations");
    let mut versions: Vec<String> = fs::read_dir(&folder)
        .with_context(|| format!("cannot read {}", folder.display()))?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".sql")?.split('_').next().map(str::to_owned))
        .collect();
    versions.sort();
    Ok(versions)
}

/// The tables that a file makes, like `public.leads`, in its order.
pub fn tables_of(sql: &str) -> Vec<String> {
    sql.lines()
        .filter_map(|line| line.strip_prefix("create table "))
        .filter_map(|rest| rest.trim_start_matches("if not exists ").split([' ', '(']).next())
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_found_guarded_or_not() {
        let sql = "create table public.a (\n  id uuid\n);\ncreate table if not exists private.b (x int);\n-- create table c\n";
        assert_eq!(tables_of(sql), ["public.a", "private.b"]);
    }
}
