//! The ways to install the schema give the same database, lose nothing, and the files made from it are not stale.

use anyhow::{Context, Result, ensure};
use local::{
    parts::{folder, install, postgres::Role, progress::Progress},
    schema,
};
use std::{fs, process::Stdio};
use tests::{Database, supervisor_binary};
use tokio::process::Command;
use tokio_postgres::Client;

async fn apply_schemas(client: &Client) -> Result<()> {
    for file in schema::files()? {
        client.batch_execute(&file.sql).await.with_context(|| file.name.clone())?;
    }
    Ok(())
}

/// What it takes to make the catalog of `from` that of `to`, by Supabase's own comparison.
async fn difference(from: &Database, to: &Database) -> Result<String> {
    let cli = install::supabase_cli(&Progress::hidden()).await?;
    let home = &from.attached.folder;
    let output = Command::new(cli)
        .args(["db", "diff", "--use-pg-delta", "--strict-coverage"])
        .args(["--from", from.url(Role::Owner), "--to", to.url(Role::Owner)])
        .current_dir(home)
        .env_clear()
        .envs([("HOME", home), ("XDG_CONFIG_HOME", home), ("SUPABASE_HOME", home)])
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .envs([("DO_NOT_TRACK", "1"), ("CI", "1"), ("NO_COLOR", "1"), ("PGSSLMODE", "disable")])
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "the comparison did not run: {text}{}", String::from_utf8_lossy(&output.stderr));
    let statements = |line: &&str| !line.trim().is_empty() && !line.starts_with(['│', '▲', '◇', '└', '┌', '●', '-']);
    Ok(text
        .lines()
        .filter(statements)
        .filter(|line| !line.contains("No schema changes"))
        .collect::<Vec<_>>()
        .join("\n"))
}

#[tokio::test]
async fn the_migrations_and_the_schemas_give_the_same_catalog() -> Result<()> {
    let migrated = Database::migrated(supervisor_binary!()).await?;
    let declared = Database::bare(supervisor_binary!()).await?;
    apply_schemas(&declared.connect(Role::Owner).await?).await?;
    assert_eq!(difference(&migrated, &declared).await?, "");

    declared.connect(Role::Owner).await?.batch_execute("alter table public.leads add column forgotten text").await?;
    assert!(difference(&migrated, &declared).await?.contains("forgotten"), "the comparison sees nothing");
    Ok(())
}

#[tokio::test]
async fn the_master_schema_is_the_schemas_and_may_be_pasted_twice() -> Result<()> {
    let master = fs::read_to_string(folder::workspace()?.join("supabase/master_schema.sql"))?;
    let migrated = Database::migrated(supervisor_binary!()).await?;
    let pasted = Database::bare(supervisor_binary!()).await?;
    let client = pasted.connect(Role::Owner).await?;
    client.batch_execute(&master).await.context("the first time")?;
    client.batch_execute(&master).await.context("the second time")?;
    // All but the comment by which it knows itself.
    client.batch_execute("comment on schema private is null").await?;
    migrated.connect(Role::Owner).await?.batch_execute("comment on schema private is null").await?;
    assert_eq!(difference(&migrated, &pasted).await?, "");
    Ok(())
}

#[tokio::test]
async fn the_master_schema_refuses_a_project_that_has_such_tables_and_names_them() -> Result<()> {
    let master = fs::read_to_string(folder::workspace()?.join("supabase/master_schema.sql"))?;
    let database = Database::bare(supervisor_binary!()).await?;
    let client = database.connect(Role::Owner).await?;
    client.batch_execute("create table public.orders (id int); create table public.leads (id int)").await?;
    let refused = client.batch_execute(&master).await.expect_err("it was applied");
    let told = refused.as_db_error().map_or_else(String::new, |error| error.message().to_owned());
    assert!(told.contains("leads, orders"), "{told}");
    let tables = client.query_one("select count(*) from pg_tables where schemaname = 'public'", &[]).await?;
    assert_eq!(tables.get::<_, i64>(0), 2, "something was left behind");
    Ok(())
}

/// Columns that have another name now: the beginning of the tables' names, the old one, the new one.
const RENAMED: &[(&str, &str, &str)] = &[
    ("private__webhook_events", "call", "payload"),
    ("public__carrier_accounts", "auth_token_sealed", "credentials_sealed"),
];

#[tokio::test]
async fn a_database_of_the_first_migration_with_data_in_it_loses_nothing() -> Result<()> {
    let database = Database::bare(supervisor_binary!()).await?;
    let owner = database.connect(Role::Owner).await?;
    let mut migrations: Vec<_> =
        fs::read_dir(folder::workspace()?.join("supabase/migrations"))?.flatten().map(|entry| entry.path()).collect();
    migrations.sort();
    ensure!(migrations.len() > 1, "there is nothing to migrate to");
    owner.batch_execute(&fs::read_to_string(&migrations[0])?).await?;
    // The seed of today says what the tables of that time did not hold.
    owner.batch_execute(include_str!("../fixtures/first_seed.sql")).await.context("the seed of that time")?;
    let mut admin = database.connect(Role::Admin).await?;
    let amount = schema::data::Amount { seed: 3, organizations: 3, leads: 60, calls: 200 };
    schema::data::generate(&mut admin, amount).await?;

    admin
        .batch_execute(
            "create schema before;
             do $$
             declare name text;
             begin
               for name in select format('%I.%I', schemaname, tablename) from pg_tables where schemaname in ('public', 'private') loop
                 execute format('create table before.%I as select * from %s', replace(name, '.', '__'), name);
               end loop;
             end $$",
        )
        .await?;
    for migration in &migrations[1..] {
        owner.batch_execute(&fs::read_to_string(migration)?).await.with_context(|| migration.display().to_string())?;
    }
    for (table, column, now) in RENAMED {
        // A partitioned table's partitions have them too.
        admin
            .batch_execute(&format!(
                "do $$ declare name text; begin
                   for name in select tablename from pg_tables where schemaname = 'before' and tablename like '{table}%' loop
                     execute format('alter table before.%I rename column {column} to {now}', name);
                   end loop;
                 end $$"
            ))
            .await?;
    }
    let lost = "select tablename::text, (xpath('/row/n/text()', query_to_xml(format(
                    'select count(*) as n from (select * from before.%I except select %s from %s) as lost',
                    tablename,
                    (select string_agg(format('%I', attname), ', ' order by attnum) from pg_attribute
                     where attrelid = format('before.%I', tablename)::regclass and attnum > 0),
                    replace(tablename, '__', '.')), false, true, '')))[1]::text::bigint
                from pg_tables where schemaname = 'before'
                  and not exists (select from pg_attribute as a join pg_type as t on t.oid = a.atttypid
                                  where a.attrelid = format('before.%I', tablename)::regclass and a.attnum > 0 and t.typname = 'json')";
    let rows = admin.query(lost, &[]).await?;
    assert!(rows.len() > 20, "only {} tables were compared", rows.len());
    let missing: Vec<String> = rows
        .iter()
        .filter(|row| row.get::<_, i64>(1) > 0)
        .map(|row| format!("{}: {}", row.get::<_, String>(0), row.get::<_, i64>(1)))
        .collect();
    assert_eq!(missing, Vec::<String>::new());
    let calls = admin.query_one("select count(*) from before.public__call_logs", &[]).await?;
    assert_eq!(calls.get::<_, i64>(0), 200, "there was nothing to lose");
    Ok(())
}

#[tokio::test]
async fn the_generated_data_is_the_same_for_the_same_seed() -> Result<()> {
    let mut worlds = Vec::new();
    for seed in [5, 5, 6] {
        let database = Database::migrated(supervisor_binary!()).await?;
        let mut admin = database.connect(Role::Admin).await?;
        let amount = schema::data::Amount { seed, organizations: 2, leads: 30, calls: 100 };
        schema::data::generate(&mut admin, amount).await?;
        let digest = "select md5(string_agg(md5(l.phone || l.name || l.status), '' order by l.id))
                        || (select md5(string_agg(c.callee_number || c.call_status || coalesce(c.duration, 0), '' order by c.call_sid)) from public.call_logs c)
                      from public.leads l";
        worlds.push(admin.query_one(digest, &[]).await?.get::<_, String>(0));
    }
    assert_eq!(worlds[0], worlds[1]);
    assert_ne!(worlds[0], worlds[2]);
    Ok(())
}

#[tokio::test]
async fn what_is_generated_from_the_schema_is_not_stale() -> Result<()> {
    let workspace = folder::workspace()?;
    let files = schema::files()?;
    let database = Database::migrated(supervisor_binary!()).await?;
    let client = database.connect(Role::Owner).await?;
    let cli = install::supabase_cli(&Progress::hidden()).await?;
    let made = [
        ("supabase/master_schema.sql", schema::master::render(&files)),
        ("docs/schema.md", schema::docs::render(&client, &files).await?),
        ("supabase/types.ts", schema::types::render(&cli, database.url(Role::Owner), &database.attached.folder).await?),
    ];
    for (name, now) in made {
        let committed = fs::read_to_string(workspace.join(name))?;
        assert!(committed == now, "{name} is stale: run `cargo run -p local -- generate`");
    }
    Ok(())
}
