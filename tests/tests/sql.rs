//! The database by itself: its own tests in `supabase/tests`, and what is promised of its sources.
//!
//! With `DATABASE_URL` set, the tests judge that database instead of a fresh one, and leave it as it was.

use anyhow::{Context, Result, ensure};
use local::parts::{
    folder::{self, RunFolder},
    postgres::{self, Role},
    supabase,
};
use std::{
    env, fs,
    path::{Path, PathBuf},
};
use tests::{Database, Fingerprint, advisor, pgtap, supervisor_binary, tap};
use tokio_postgres::Client;

/// Files of a folder of `supabase/` that end so, in order.
fn sources(folder: &str, end: &str) -> Result<Vec<PathBuf>> {
    let folder = folder::workspace()?.join("supabase").join(folder);
    let mut files: Vec<PathBuf> = fs::read_dir(&folder)
        .with_context(|| folder.display().to_string())?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.to_string_lossy().ends_with(end))
        .collect();
    files.sort();
    ensure!(!files.is_empty(), "there is no *{end} in {}", folder.display());
    Ok(files)
}

async fn judge(client: &Client, files: &[PathBuf]) -> Result<()> {
    let mut failed = 0;
    for file in files {
        let report = pgtap::run_file(client, file).await?;
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        println!("{} {name}: {report}", if report.passed() { "passed" } else { "FAILED" });
        failed += usize::from(!report.passed());
    }
    ensure!(failed == 0, "{failed} of {} files failed; see above", files.len());
    Ok(())
}

#[tokio::test]
async fn every_test_of_the_database_passes() -> Result<()> {
    let files = sources("tests", ".test.sql")?;
    if let Ok(url) = env::var("DATABASE_URL") {
        println!("judging the database that DATABASE_URL names");
        return judge(&postgres::connect(&url).await?, &files).await;
    }
    let database = Database::migrated(supervisor_binary!()).await?;
    let client = database.connect(Role::Owner).await?;
    // Once and for all files, since this database ends with the test.
    client.batch_execute("begin").await?;
    pgtap::install(&client).await?;
    client.batch_execute("commit").await?;
    judge(&client, &files).await
}

async fn run_text(client: &Client, folder: &Path, sql: &str) -> Result<tap::Report> {
    let file = folder.join("made.test.sql");
    fs::write(&file, sql)?;
    pgtap::run_file(client, &file).await
}

#[tokio::test]
async fn judging_a_database_leaves_it_as_it_was() -> Result<()> {
    let database = Database::migrated(supervisor_binary!()).await?;
    let client = database.connect(Role::Owner).await?;
    let schemas = "select string_agg(nspname || coalesce(nspacl::text, ''), ',' order by nspname) from pg_namespace where nspname !~ 'temp'";
    let before = (Fingerprint::of(&client).await?, tests::database::first_column(&client, schemas).await?);
    let report = run_text(
        &client,
        &database.attached.folder,
        "begin; select plan(1); insert into private.clock_offset (shift) values ('1 day'); select pass('made'); select * from finish(); rollback;",
    )
    .await?;
    assert!(report.passed(), "{report}");
    before.0.assert_same(&Fingerprint::of(&client).await?);
    assert_eq!(before.1, tests::database::first_column(&client, schemas).await?);
    Ok(())
}

#[tokio::test]
async fn a_file_that_stops_early_runs_nothing_or_fails_is_found_out() -> Result<()> {
    let database = Database::migrated(supervisor_binary!()).await?;
    let client = database.connect(Role::Owner).await?;
    let folder = &database.attached.folder;
    for (sql, told) in [
        ("select plan(2); select pass('a'); select 1 / 0; select pass('b');", "division by zero"),
        ("select plan(2); select pass('a'); select * from finish();", "planned 2 tests but ran 1"),
        ("select plan(1); select is(3, 4, 'adds up'); select * from finish();", "have: 3"),
        ("select 1;", "no plan"),
    ] {
        let report = run_text(&client, folder, sql).await?;
        assert!(!report.passed() && report.to_string().contains(told), "{sql}: {report}");
    }
    assert!(run_text(&client, folder, "select plan(1); select pass('a');\ncommit;").await.is_err());
    Ok(())
}

#[tokio::test]
async fn the_seed_a_second_time_changes_nothing() -> Result<()> {
    let database = Database::migrated(supervisor_binary!()).await?;
    let client = database.connect(Role::Owner).await?;
    let plans = tests::database::first_column(&client, "select slug from public.subscription_plans").await?;
    assert!(!plans.is_empty(), "the first time it was applied");
    let before = Fingerprint::of(&client).await?;
    supabase::seed(database.url(Role::Owner)).await?;
    before.assert_same(&Fingerprint::of(&client).await?);
    Ok(())
}

#[tokio::test]
async fn the_advisor_has_nothing_to_say() -> Result<()> {
    let found = match env::var("DATABASE_URL") {
        Ok(url) => advisor::findings_at(&url, RunFolder::create()?.path()).await?,
        Err(_) => advisor::findings(&Database::migrated(supervisor_binary!()).await?).await?,
    };
    assert!(found.is_empty(), "{found:#?}");
    Ok(())
}

#[tokio::test]
async fn the_advisor_would_have_seen_a_table_without_walls() -> Result<()> {
    let database = Database::migrated(supervisor_binary!()).await?;
    database
        .connect(Role::Owner)
        .await?
        .batch_execute("create table public.open_door (id uuid primary key); grant select on public.open_door to anon")
        .await?;
    let found = advisor::findings(&database).await?;
    assert!(found.iter().any(|finding| finding.name == "rls_disabled_in_public"), "{found:#?}");
    Ok(())
}
