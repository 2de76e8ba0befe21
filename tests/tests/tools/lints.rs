//! Supabase's lints, from the two programs that have them besides its CLI (tests/tests/sql.rs), and those that none of them has.

use anyhow::{Context, Result};
use local::parts::{install, postgres::Role, progress::Progress};
use serde_json::{Value, json};
use std::fs;
use tests::{Database, lints, supervisor_binary};
use tokio::process::Command;

/// The schemas that the API exposes.
const EXPOSED: &[&str] = &["public"];

/// What `dblint` finds, as `rule: message`.
async fn dblint(database: &Database) -> Result<Vec<String>> {
    let admin = database.connect(Role::Admin).await?;
    admin.batch_execute(&format!("alter database \"{}\" set pgrst.db_schemas = 'public'", database.name)).await?;
    let settings = json!({
        "db": { "connectionString": database.url(Role::Owner) },
        // A fresh database cannot pass it: nothing has used an index yet.
        "splinter": { "rules": { "performance": { "unusedIndex": "off" } } },
    });
    let home = &database.attached.folder;
    fs::write(home.join("postgres-language-server.jsonc"), settings.to_string())?;
    let output = Command::new(install::language_server(&Progress::hidden()).await?)
        .args(["dblint", "--max-diagnostics=none", "--reporter=json", "--config-path"])
        .arg(home)
        .current_dir(home)
        .env("HOME", home)
        .env("XDG_CACHE_HOME", home)
        .env_remove("DATABASE_URL")
        .kill_on_drop(true)
        .output()
        .await?;
    let (told, besides) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_str(told.trim()).with_context(|| format!("dblint said: {told}{besides}"))?;
    let diagnostics = report["diagnostics"].as_array().with_context(|| format!("dblint said: {report}"))?;
    Ok(diagnostics.iter().map(|it| format!("{}: {}", it["category"], it["message"])).collect())
}

#[tokio::test]
async fn the_language_servers_lints_have_nothing_to_say() -> Result<()> {
    let database = Database::migrated(supervisor_binary!()).await?;
    assert_eq!(dblint(&database).await?, Vec::<String>::new());
    database
        .connect(Role::Owner)
        .await?
        .batch_execute("create table public.open_door (id uuid primary key); grant select on public.open_door to anon")
        .await?;
    let found = dblint(&database).await?;
    assert!(found.iter().any(|finding| finding.contains("rlsDisabledInPublic")), "{found:?}");
    Ok(())
}

#[tokio::test]
async fn the_lints_that_no_program_has_yet_have_nothing_to_say() -> Result<()> {
    let database = Database::migrated(supervisor_binary!()).await?;
    let admin = database.connect(Role::Admin).await?;
    assert_eq!(lints::findings(&admin, EXPOSED).await?, Vec::<String>::new());

    for (lint, violation) in [
        (
            "0025",
            "create schema storage; create table storage.buckets (id text, public boolean);
             create table storage.objects (bucket_id text, name text); insert into storage.buckets values ('avatars', true);
             create policy \"Everybody lists\" on storage.objects for select to anon using (bucket_id = 'avatars')",
        ),
        // The extension itself is not to be had here: one of its name is what the lints look for.
        ("0026", "set allow_system_table_mods = on; update pg_extension set extname = 'pg_graphql' where extname = 'uuid-ossp'"),
        ("0027", "set allow_system_table_mods = on; update pg_extension set extname = 'pg_graphql' where extname = 'uuid-ossp'"),
        (
            "0028",
            "create function public.back_door() returns integer language sql security definer set search_path = '' as 'select 1';
             revoke all on function public.back_door() from public; grant execute on function public.back_door() to anon",
        ),
        (
            "0029",
            "create function public.side_door() returns integer language sql security definer set search_path = '' as 'select 1';
             revoke all on function public.side_door() from public; grant execute on function public.side_door() to authenticated",
        ),
    ] {
        admin.batch_execute(&format!("begin; {violation}")).await.with_context(|| lint.to_owned())?;
        let found = lints::findings(&admin, EXPOSED).await?;
        admin.batch_execute("rollback; reset allow_system_table_mods").await?;
        assert!(found.iter().any(|finding| finding.starts_with(lint)), "{lint} was not seen: {found:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_bucket_that_only_its_owners_list_is_no_finding() -> Result<()> {
    let database = Database::bare(supervisor_binary!()).await?;
    let admin = database.connect(Role::Admin).await?;
    admin
        .batch_execute(
            "create schema storage; create table storage.buckets (id text, public boolean);
             create table storage.objects (bucket_id text, name text, owner_id text);
             insert into storage.buckets values ('avatars', true), ('recordings', false);
             create policy \"Their own\" on storage.objects for select to authenticated
               using (bucket_id = 'avatars' and owner_id = auth.uid()::text);
             create policy \"Another bucket\" on storage.objects for select to anon using (bucket_id = 'recordings')",
        )
        .await?;
    assert_eq!(lints::findings(&admin, EXPOSED).await?, Vec::<String>::new());
    Ok(())
}
