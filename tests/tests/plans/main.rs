//! Every hot query finds its rows by an index, reads no large table as a whole, and touches as many rows as it returns: judged by the
//! plans that PostgreSQL ran, on a database of many organizations, as the role that asks in production.

mod queries;

use anyhow::{Context, Result, ensure};
use local::{parts::postgres::Role, schema::data};
use tests::{
    Database,
    plans::{HotQuery, Recorder},
    scene::TUESDAY_TEN,
    supervisor_binary,
};

/// As a fresh connection plans what functions do, and as one that has been used a few times does.
const MODES: [&str; 2] = ["force_custom_plan", "force_generic_plan"];

async fn filled() -> Result<(Database, Recorder)> {
    let database = Database::migrated(supervisor_binary!()).await?;
    let mut admin = database.connect(Role::Admin).await?;
    let clock = format!("insert into private.clock_offset (shift) values (timestamptz '{TUESDAY_TEN}' - now())");
    admin.batch_execute(&clock).await?;
    let amount = data::Amount { seed: 1, organizations: 200, leads: 10_000, calls: 30_000 };
    data::generate(&mut admin, amount).await?;
    admin.batch_execute(include_str!("../../fixtures/plans.sql")).await.context("fixtures/plans.sql")?;
    // An index-only scan depends on it, and autovacuum would have done it.
    admin.batch_execute("vacuum analyze").await?;
    let recorder = Recorder::open(database.url(Role::Admin)).await?;
    Ok((database, recorder))
}

/// Judges a query in a transaction of its own.
async fn judge(recorder: &Recorder, query: &HotQuery, mode: &str, drop: &str) -> Result<Vec<String>> {
    recorder.client.batch_execute("begin").await?;
    let complaints = recorder.complaints(query, mode, drop).await;
    recorder.client.batch_execute("rollback").await?;
    complaints
}

#[tokio::test]
async fn every_hot_query_touches_what_it_returns_and_misses_an_index_that_is_gone() -> Result<()> {
    let (_database, recorder) = filled().await?;
    let mut wrong = Vec::new();
    for query in queries::ALL {
        for mode in MODES {
            let complaints = judge(&recorder, query, mode, "").await?;
            wrong.extend(complaints.iter().map(|complaint| format!("{}, {mode}: {complaint}", query.name)));
        }
        // A judge that finds nothing wrong without the index would find nothing wrong with any plan.
        for group in query.indexes {
            let mut drop = String::new();
            for name in *group {
                drop.push_str(&recorder.drop_index(name).await?);
            }
            let complaints = judge(&recorder, query, MODES[1], &drop).await?;
            if complaints.is_empty() {
                wrong.push(format!("{}: no complaint without {group:?}", query.name));
            }
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// Policies ask once a statement who asks: `(select private.org_with('…'))` is run before the rows are, and a plan may still be parallel.
#[tokio::test]
async fn no_policy_asks_row_by_row() -> Result<()> {
    let database = Database::migrated(supervisor_binary!()).await?;
    let client = database.connect(Role::Admin).await?;
    let by_row = client
        .query(
            r"with policy as (
               select polrelid::regclass || ': ' || polname as name,
                 coalesce(pg_get_expr(polqual, polrelid), '') || ' ' || coalesce(pg_get_expr(polwithcheck, polrelid), '') as expression
               from pg_policy
             )
             select name || ' ' || expression from policy
             -- Whether a role's permissions are the user's own is a question about the row.
             where replace(regexp_replace(expression, '\( SELECT (private|auth)\.\w+\([^()]*\) AS \w+\)', '', 'g'),
                 'private.auth_covers(permissions)', '') ~ '(private|auth)\.'
             union all
             select oid::regprocedure || ' is not stable and parallel safe' from pg_proc
             where pronamespace = 'private'::regnamespace and (provolatile <> 's' or proparallel <> 's')
               and exists (select from policy where expression ~ ('private\.' || proname || '\('))",
            &[],
        )
        .await?;
    let by_row: Vec<String> = by_row.iter().map(|row| row.get(0)).collect();
    ensure!(by_row.is_empty(), "{}", by_row.join("\n"));
    Ok(())
}
