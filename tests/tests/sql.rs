//! The database by itself: its own tests in `supabase/tests`, and what is promised of its sources.
//!
//! With `DATABASE_URL` set, the tests judge that database instead of a fresh one, and leave it as it was.

use anyhow::Result;
use local::parts::{
    folder::RunFolder,
    postgres::{self, Role},
    supabase,
};
use std::{
    env, fs,
    path::{Path, PathBuf},
};
use tests::{Database, Fingerprint, advisor, pgtap, required, supervisor_binary, tap};
use tokio::process::Command;
use tokio_postgres::Client;

#[tokio::test]
async fn every_test_of_the_database_passes() -> Result<()> {
    let files = pgtap::files()?;
    if let Ok(url) = env::var("DATABASE_URL") {
        println!("judging the database that DATABASE_URL names");
        return pgtap::judge(&postgres::connect(&url).await?, &files).await;
    }
    let database = Database::migrated(supervisor_binary!()).await?;
    let client = database.connect(Role::Owner).await?;
    pgtap::install_for_good(&client).await?;
    pgtap::judge(&client, &files).await
}

/// What `supabase test db` does, which itself wants Docker: pgTAP in the schema `extensions`, and `pg_prove` over the folder.
#[tokio::test]
async fn the_tests_of_the_database_run_as_supabase_runs_them() -> Result<()> {
    let found = Command::new("pg_prove").arg("--version").output().await;
    if found.is_err() || Command::new("psql").arg("--version").output().await.is_err() {
        return required::missing("pg_prove", "Install libtap-parser-sourcehandler-pgtap-perl and postgresql-client.");
    }
    let database = Database::migrated(supervisor_binary!()).await?;
    let client = database.connect(Role::Owner).await?;
    if client.query_opt("select from pg_available_extensions where name = 'pgtap'", &[]).await?.is_none() {
        return required::missing("pgTAP", "Install postgresql-15-pgtap for the server that the tests use.");
    }
    client.batch_execute("create extension if not exists pgtap with schema extensions").await?;
    let prove = async |files: &[PathBuf]| -> Result<(bool, String)> {
        let output = Command::new("pg_prove")
            .args(["--dbname", database.url(Role::Owner)])
            .args(files)
            .env("PGOPTIONS", "-c client_min_messages=warning")
            .kill_on_drop(true)
            .output()
            .await?;
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        Ok((output.status.success(), said))
    };
    let before = Fingerprint::of(&client).await?;
    let (passed, said) = prove(&pgtap::files()?).await?;
    assert!(passed && said.contains("Result: PASS"), "{said}");
    before.assert_same(&Fingerprint::of(&client).await?);

    let file = database.attached.folder.join("wrong.test.sql");
    fs::write(&file, "begin; select plan(1); select is(3, 4, 'adds up'); select * from finish(); rollback;")?;
    let (passed, said) = prove(&[file]).await?;
    assert!(!passed && said.contains("adds up"), "{said}");
    Ok(())
}

#[test]
fn every_test_of_the_database_plans_finishes_and_leaves_nothing() -> Result<()> {
    for file in pgtap::files()? {
        let sql = fs::read_to_string(&file)?.to_ascii_lowercase();
        let statements: Vec<&str> =
            sql.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("--")).collect();
        let ends = (statements.first().copied(), statements.last().copied());
        assert_eq!(ends, (Some("begin;"), Some("rollback;")), "{}", file.display());
        for part in ["select plan(", "from finish();"] {
            assert!(sql.contains(part), "{}: {part}", file.display());
        }
    }
    Ok(())
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
