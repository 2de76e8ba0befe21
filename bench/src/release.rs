//! What a release costs when ten thousand, a million or ten million leads are due: rows looked at, and time, for each call released.

use crate::figures::Times;
use anyhow::{Context, Result, ensure};
use local::{
    parts::{
        folder::RunFolder,
        install,
        postgres::{Postgres, PostgresOptions, Role, Server},
        progress::Progress,
        supabase,
    },
    stack::DATABASE,
};
use std::time::Instant;
use tokio_postgres::Client;

/// Organizations that the leads are spread over; the first has half of them.
const ORGANIZATIONS: i32 = 10;
/// Calls a release.
const CALLS: i64 = 100;
/// Releases that are not counted, so that the connection has its plans.
const WARM_UP: usize = 5;
/// How many times dearer a release may be at the largest size than at the smallest.
const LIMIT: f64 = 1.3;

const FILL: &str = include_str!("../sql/release.sql");
const RELEASE: &str =
    "select jsonb_array_length(public.release_calls(jsonb_build_object('v', 1, 'limit', $1::bigint)) -> 'attempts')";
/// The calls are over at once, so that there is room for the next.
const END: &str = "update public.call_logs set status = 'ended', call_status = 'expired', ended_at = private.clock_now() where status <> 'ended'";
const LOOKED_AT: &str = "select sum(seq_tup_read + coalesce(idx_tup_fetch, 0))::bigint from pg_stat_user_tables";
const MOST: &str = "select string_agg(name, ', ') from (
    select relname || ' (' || seq_tup_read || ' in sequence, ' || coalesce(idx_tup_fetch, 0) || ' by index)' as name
    from pg_stat_user_tables order by seq_tup_read + coalesce(idx_tup_fetch, 0) desc limit 3) as busiest";

/// How it is measured.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Leads that are due; every number gives a database of its own.
    #[arg(long, value_delimiter = ',', default_values_t = [10_000, 1_000_000])]
    rows: Vec<i32>,
    /// Ten million as well, which take a while to make.
    #[arg(long)]
    full: bool,
    /// Releases of a hundred calls.
    #[arg(long, default_value_t = 40)]
    rounds: usize,
}

/// Measures and prints.
pub async fn run(mut options: Options) -> Result<()> {
    if options.full {
        options.rows.push(10_000_000);
    }
    let progress = Progress::visible();
    let server = Server::find(&progress).await?;
    let cli = install::supabase_cli(&progress).await?;
    let run = RunFolder::create()?;
    let logs = run.path().to_path_buf();
    let postgres = Postgres::start(&server, &run, &logs, &PostgresOptions::default()).await?;
    let owner = postgres.url(Role::Owner, DATABASE);
    supabase::push_migrations(&cli, &owner, run.path(), &logs).await?;
    supabase::seed(&owner).await?;
    println!("PostgreSQL {}, {} releases of {CALLS} calls, medians", server.version, options.rounds);
    let mut first: Option<(f64, f64)> = None;
    for rows in &options.rows {
        let database = format!("of_{rows}");
        postgres.clone_database(DATABASE, &database).await?;
        let admin = postgres.connect(Role::Admin, &database).await?;
        admin.batch_execute(FILL).await.context("bench/sql/release.sql")?;
        admin.execute("select pg_temp.fill($1, $2)", &[&ORGANIZATIONS, rows]).await.context("the leads")?;
        admin.batch_execute("vacuum analyze").await?;
        // What filling it read is not of interest.
        admin.batch_execute("select pg_stat_reset()").await?;
        let (looked_at, took) = measure(&admin, options.rounds).await?;
        let most = admin.query_one(MOST, &[]).await?.get::<_, String>(0);
        let (rows_one, took_one) = *first.get_or_insert((looked_at, took.median()));
        let (by_rows, by_time) = (looked_at / rows_one, took.median() / took_one);
        println!(
            "  {rows:>10} due  {looked_at:8.1} rows and {:7.3} ms a call  {by_rows:.2} and {by_time:.2} times the first, at most {LIMIT:.1}{}",
            took.median() / CALLS as f64,
            if by_rows > LIMIT || by_time > LIMIT { "  MISSED" } else { "" },
        );
        println!("              most of them in {most}");
        drop(admin);
        postgres.drop_database(&database).await?;
    }
    postgres.stop().await
}

/// Rows looked at for a call, and the time of each release.
async fn measure(admin: &Client, rounds: usize) -> Result<(f64, Times)> {
    let looked_at = async || -> Result<i64> {
        // Said at the end of the transaction, and not a second later.
        admin.query_one("select pg_stat_force_next_flush()", &[]).await?;
        Ok(admin.query_one(LOOKED_AT, &[]).await?.get(0))
    };
    let (mut rows, mut times) = (0, Times::default());
    for round in 0..WARM_UP + rounds {
        let before = looked_at().await?;
        let began = Instant::now();
        let released: i32 = admin.query_one(RELEASE, &[&CALLS]).await?.get(0);
        let took = began.elapsed();
        ensure!(i64::from(released) == CALLS, "{released} calls were released, not {CALLS}");
        if round >= WARM_UP {
            rows += looked_at().await? - before;
            times.push(took);
        }
        admin.batch_execute(END).await?;
    }
    Ok((rows as f64 / (rounds as f64 * CALLS as f64), times))
}
