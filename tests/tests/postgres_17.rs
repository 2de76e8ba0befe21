//! PostgreSQL 17, which new Supabase projects have, whatever server the other tests found.

use anyhow::{Context, Result, ensure};
use local::parts::{
    folder::{self, RunFolder},
    install,
    postgres::{Postgres, PostgresOptions, Role, Server},
    progress::Progress,
    supabase,
};
use std::fs;
use tests::pgtap;

#[tokio::test]
async fn the_schema_its_tests_and_the_pasted_file_hold_on_postgres_17() -> Result<()> {
    let progress = Progress::visible();
    let (server, run) = (Server::embedded_17(&progress).await?, RunFolder::create()?);
    ensure!(server.major == 17, "this is PostgreSQL {}", server.version);
    let logs = run.subfolder("logs", 0o700)?;
    let postgres = Postgres::start(&server, &run, &logs, &PostgresOptions::default()).await?;

    for name in ["migrated", "pasted"] {
        postgres.clone_database("postgres", name).await?;
    }
    let url = postgres.url(Role::Owner, "migrated");
    supabase::push_migrations(&install::supabase_cli(&progress).await?, &url, run.path(), &logs).await?;
    let pasted = postgres.connect(Role::Owner, "pasted").await?;
    let master = fs::read_to_string(folder::workspace()?.join("supabase/master_schema.sql"))?;
    for time in ["the first time", "the second time"] {
        pasted.batch_execute(&master).await.context(time)?;
    }
    // The pasted one has the same catalog as the migrated one, which is tested elsewhere: what it holds is judged once.
    for name in ["migrated", "pasted"] {
        supabase::seed(&postgres.url(Role::Owner, name)).await.context(name)?;
    }
    let client = postgres.connect(Role::Owner, "migrated").await?;
    pgtap::install_for_good(&client).await?;
    pgtap::judge(&client, &pgtap::files()?).await?;
    postgres.stop().await
}
