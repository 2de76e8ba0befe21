//! The invoice run: whole batches a transaction, as the function asks for them, against one transaction an invoice; the same database
//! function, the same data, the same number of runners. And the preview of an invoice, through the handler, as a user asks for it.

use crate::{figures::Times, intake::payload};
use anyhow::{Result, ensure};
use invoice_generation::Invoicing;
use local::{
    parts::{
        folder::RunFolder,
        gateway::Listening,
        install,
        keys::Keys,
        postgres::{Postgres, PostgresOptions, Role, Server},
        postgrest::{Postgrest, PostgrestOptions},
        progress::Progress,
        supabase,
    },
    stack::DATABASE,
};
use serde_json::json;
use shared::{
    config::Config,
    secrets::SecretStore,
    trigger::{self, Invocation},
};
use std::{
    path::Path,
    time::{Duration, Instant},
};
use tokio::task::JoinSet;
use uuid::Uuid;

/// When the periods are over.
const AFTER: &str = "2026-02-01 00:05+05:30";
/// What 10,000 invoices may take, in seconds.
const LIMIT: f64 = 4.0;
/// How long a request may take.
const REQUEST_LIMIT: Duration = Duration::from_secs(30);
/// During the period.
const DURING: &str = "2026-01-20 12:00+05:30";
/// How many times one transaction an invoice has to be slower.
const TIMES: f64 = 15.0;
/// How much slower each invoice of a larger run may be than of the smallest one, and still count as linear.
const SLOWER: f64 = 1.25;
/// What a preview may take at the 99th percentile.
const PREVIEW_LIMIT: Duration = Duration::from_millis(50);
/// Previews that are asked for, one after the other.
const PREVIEWS: usize = 1_000;
/// Connections of PostgREST.
const POOL: u32 = 4;
const PREVIEW_PATH: &str = "/functions/v1/invoice-generation/invoices/preview";

/// Organizations with one subscription each, on a plan with a base price and overage, that used it every day of January.
const DATA: &str = "
    set session_replication_role = replica;
    insert into public.subscription_plans (id, slug, name) values ('00000000-0000-4000-a000-0000000000b1', 'bench', 'Bench');
    insert into public.plan_prices (id, plan_id, version, base_minor)
    values ('00000000-0000-4000-b000-0000000000b1', '00000000-0000-4000-a000-0000000000b1', 1, 699900);
    insert into public.plan_price_meters (plan_price_id, meter_key, included_units, overage_price_minor, overage_unit)
    values ('00000000-0000-4000-b000-0000000000b1', 'ai_calls', -1, null, 1), ('00000000-0000-4000-b000-0000000000b1', 'call_seconds', 90000, 600, 60);
    create temporary table customer as select gen_random_uuid() as id, n from generate_series(1, $ORGANIZATIONS) as n;
    insert into public.organizations (id, name, timezone, country_code, state_code)
    select id, 'Organization ' || n, 'Asia/Kolkata', 'IN', case n % 2 when 0 then 'KA' else 'MH' end from customer;
    insert into public.subscriptions (
      organization_id, plan_id, plan_price_id, status, billing_cycle, timezone, anchor_on, current_period_start, current_period_end, next_invoice_at
    )
    select
      id, '00000000-0000-4000-a000-0000000000b1', '00000000-0000-4000-b000-0000000000b1', 'active', 'monthly', 'Asia/Kolkata', '2026-01-01',
      '2026-01-01 00:00+05:30', '2026-02-01 00:00+05:30', '2026-02-01 00:00+05:30'
    from customer;
    insert into public.usage_days (organization_id, meter_key, day, quantity, events)
    select id, meter, day::date, case meter when 'ai_calls' then 20 else 1000 + n % 4000 end, 20
    from customer, unnest(array['ai_calls', 'call_seconds']) as meter, generate_series(timestamp '2026-01-01', '2026-01-31', '1 day') as day;
    insert into public.usage_logs (organization_id, feature_key, usage_count, period_start, period_end)
    select organization_id, meter_key, sum(quantity)::bigint, '2026-01-01', '2026-02-01' from public.usage_days group by organization_id, meter_key;
    set session_replication_role = origin";

/// How it is measured.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Organizations, and so invoices; every number gives a database of its own.
    #[arg(long, value_delimiter = ',', default_values_t = [10_000, 100_000])]
    organizations: Vec<usize>,
    /// Subscriptions of one transaction; the function asks for 1,000.
    #[arg(long, default_value_t = 1_000)]
    batch: usize,
    /// Invoices that are made one by one.
    #[arg(long, default_value_t = 1_000)]
    singles: usize,
    /// Who runs at once.
    #[arg(long, default_value_t = 2)]
    runners: usize,
}

/// Measures and prints.
pub async fn run(options: &Options) -> Result<()> {
    let progress = Progress::visible();
    let server = Server::find(&progress).await?;
    let cli = install::supabase_cli(&progress).await?;
    let run = RunFolder::create()?;
    let logs = run.path().to_path_buf();
    let postgres = Postgres::start(&server, &run, &logs, &PostgresOptions::default()).await?;
    let owner = postgres.url(Role::Owner, DATABASE);
    supabase::push_migrations(&cli, &owner, run.path(), &logs).await?;
    supabase::seed(&owner).await?;
    println!(
        "PostgreSQL {}, {} runners, {} subscriptions a transaction",
        server.version, options.runners, options.batch
    );
    let mut smallest = None;
    for &organizations in &options.organizations {
        let (many, one) = (format!("many_{organizations}"), format!("one_{organizations}"));
        postgres.clone_database(DATABASE, &many).await?;
        let admin = postgres.connect(Role::Admin, &many).await?;
        admin.batch_execute(&DATA.replace("$ORGANIZATIONS", &organizations.to_string())).await?;
        admin.batch_execute("vacuum analyze").await?;
        drop(admin);
        postgres.clone_database(&many, &one).await?;

        let singles = options.singles.min(organizations);
        let (by_one, slow) = close(&postgres, &one, options.runners, 1, singles).await?;
        let (by_many, quick) = close(&postgres, &many, options.runners, options.batch, organizations).await?;
        ensure!(by_many == organizations, "{by_many} invoices of {organizations} were made");
        check(&postgres, &many, organizations).await?;
        let rate = |count: usize, time: Duration| count as f64 / time.as_secs_f64();
        let (many_rate, one_rate) = (rate(by_many, quick), rate(by_one, slow));
        println!("  {organizations} invoices: {many_rate:.0} a second, one by one {one_rate:.0}");
        verdict("seconds", quick.as_secs_f64(), LIMIT * organizations as f64 / 10_000.0, false);
        verdict("times as fast as one by one", many_rate / one_rate, TIMES, true);
        let each = quick.as_secs_f64() / organizations as f64;
        let smallest = *smallest.get_or_insert(each);
        verdict("times the smallest run's time for each", each / smallest, SLOWER, false);
        if organizations == options.organizations[0] {
            preview(&postgres, &one, run.path()).await?;
        }
        for database in [many, one] {
            postgres.drop_database(&database).await?;
        }
    }
    postgres.stop().await
}

/// Says a figure, what it may be, and whether it is.
fn verdict(name: &str, figure: f64, limit: f64, at_least: bool) {
    let (word, holds) = if at_least { ("at least", figure >= limit) } else { ("at most", figure <= limit) };
    println!("    {figure:9.2} {name}, {word} {limit:.2}: {}", if holds { "held" } else { "MISSED" });
}

/// Previews of the period under way, of one organization after the other, through the handler.
async fn preview(postgres: &Postgres, database: &str, folder: &Path) -> Result<()> {
    let admin = postgres.connect(Role::Admin, database).await?;
    admin
        .batch_execute(&format!("insert into private.clock_offset (shift) values (timestamptz '{DURING}' - now())"))
        .await?;
    let users = admin
        .query(
            "with customer as (
               select own.organization_id, gen_random_uuid() as id
               from public.subscriptions as own
               where own.current_period_start = '2026-01-01 00:00+05:30'
               limit $1
             ),
             account as (
               insert into auth.users (id, email) select customer.id, customer.id || '@example.com' from customer returning id
             )
             select customer.id, customer.organization_id from customer join account using (id)",
            &[&i64::try_from(PREVIEWS)?],
        )
        .await?;
    for user in &users {
        admin
            .execute(
                "update public.profiles set organization_id = $2, system_role = 'owner' where id = $1",
                &[&user.get::<_, Uuid>(0), &user.get::<_, Uuid>(1)],
            )
            .await?;
    }
    let listening = Listening::bind(None).await?;
    let origin = listening.origin_text();
    let keys = Keys::generate(&origin)?;
    let binary = install::postgrest(&Progress::visible()).await?;
    let postgrest = PostgrestOptions { binary, database_url: postgres.url(Role::Authenticator, database), pool: POOL };
    let postgrest = Postgrest::start(&postgrest, &keys, folder, folder).await?;
    let gateway = listening.serve(keys.clone(), postgrest.url.clone(), None)?;
    let config = Config::from_vars(
        [
            ("SUPABASE_URL", origin.as_str()),
            ("SUPABASE_PUBLISHABLE_KEY", &keys.publishable_key),
            ("PUBLIC_ORIGIN", "https://api.example.com"),
            ("SECRET_ARN", "not asked for in process"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned())),
    )?;
    let http = shared::supabase::http_client()?;
    let invoicing = Invoicing::with_secrets(config, http, SecretStore::fixed(keys.secrets()?));
    let mut times = Times::default();
    for user in &users {
        let jwt = keys.user_jwt(user.get(0), "bench@example.com")?;
        let headers = json!({ "content-type": "application/json", "authorization": format!("Bearer {jwt}") });
        let request = payload(PREVIEW_PATH, &headers, "{}");
        let began = Instant::now();
        let answer = trigger::handle(&invoicing, request, &Invocation::with_limit("bench", REQUEST_LIMIT)).await?;
        times.push(began.elapsed());
        let body = answer["body"].as_str().unwrap_or_default();
        ensure!(answer["statusCode"] == 200 && body.contains("\"preview\""), "a preview was answered {answer}");
    }
    println!("  {} previews through the handler: median {:.1} ms", users.len(), times.median());
    verdict("ms at the 99th percentile", times.percentile(99), PREVIEW_LIMIT.as_secs_f64() * 1_000.0, false);
    drop(gateway);
    postgrest.stop().await
}

/// Closes periods until nothing is left, or at least so many are; how many invoices that made, and how long it took.
async fn close(
    postgres: &Postgres,
    database: &str,
    runners: usize,
    batch: usize,
    wanted: usize,
) -> Result<(usize, Duration)> {
    let mut ready = Vec::new();
    for _ in 0..runners {
        ready.push(postgres.connect(Role::Owner, database).await?);
    }
    let ask = format!(
        "select jsonb_array_length(answer -> 'invoices') from private.close_periods('{{\"v\": 1, \"limit\": {batch}}}', '{AFTER}') as answer"
    );
    let share = wanted.div_ceil(runners);
    let began = Instant::now();
    let mut running = JoinSet::new();
    for client in ready {
        let ask = ask.clone();
        running.spawn(async move {
            let mut made = 0;
            loop {
                let invoices: i32 = client.query_one(&ask, &[]).await?.get(0);
                made += invoices as usize;
                if invoices == 0 || batch == 1 && made >= share {
                    return anyhow::Ok(made);
                }
            }
        });
    }
    let mut made = 0;
    while let Some(runner) = running.join_next().await {
        made += runner??;
    }
    Ok((made, began.elapsed()))
}

/// What was made is whole: one invoice each, numbered without a gap.
async fn check(postgres: &Postgres, database: &str, organizations: usize) -> Result<()> {
    let client = postgres.connect(Role::Owner, database).await?;
    let row = client
        .query_one(
            "select count(*), count(distinct subscription_id), count(distinct invoice_number), max(last_number)::bigint
             from public.invoices, private.invoice_series where status = 'open'",
            &[],
        )
        .await?;
    for column in 0..4 {
        let count: i64 = row.get(column);
        ensure!(usize::try_from(count)? == organizations, "column {column}: {count} of {organizations}");
    }
    Ok(())
}
