//! How fast usage is counted: through the database's function against the limit of the machine, through the real handler, one event at a
//! time; how fast a month is read day by day with all of it there; and how fast a quota is held for ten thousand organizations.
//!
//! The limit is the same rows in the same transactions put into the tables of events and of keys, and nothing else: no key is looked for,
//! no day and no counter is kept.

use crate::{figures::Times, intake::payload};
use anyhow::{Context, Result, ensure};
use chrono::{DateTime, TimeDelta, Utc};
use local::{
    parts::{
        folder::RunFolder,
        gateway::Listening,
        install,
        keys::Keys,
        postgres::{self, Postgres, PostgresOptions, Role, Server},
        postgrest::{Postgrest, PostgrestOptions},
        progress::Progress,
        supabase,
    },
    stack::DATABASE,
};
use serde_json::{Value, json};
use shared::{
    config::Config,
    secrets::SecretStore,
    trigger::{self, Invocation},
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::task::JoinSet;
use tokio_postgres::{Client, Statement};
use usage_metering::Metering;
use uuid::Uuid;

/// Events of one transaction, and of one request: as many as there may be.
const BATCH: usize = 1_000;
/// Connections of PostgREST.
const POOL: u32 = 4;
/// How long a request may take.
const LIMIT: Duration = Duration::from_secs(30);
/// Since when the organizations are subscribed, and when it is now.
const SINCE: &str = "2026-11-01T10:00:00+05:30";
const NOW: &str = "2026-11-24T10:00:00+05:30";
const NOW_DAY: i64 = 24;
/// Whose key it is: of the first organization.
const API_KEY: &str = "tlk_be9c0001_0000000000000000000000000000000000000000";
/// Where the limit is measured.
const LIMIT_DATABASES: [&str; 2] = ["limit_before", "limit_after"];
const PATH: &str = "/functions/v1/usage-metering/usage/events";

/// How it is measured: in full unless it is said otherwise.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// A first look of about a minute: what is measured for long, or over much, is measured for less. Its verdicts are not the targets'.
    #[arg(long)]
    short: bool,
    /// How long events are counted through the database's function; ten minutes in full.
    #[arg(long)]
    seconds: Option<u64>,
    /// How long the limit is measured, before it and after it; a minute in full.
    #[arg(long)]
    limit_seconds: Option<u64>,
    /// How long events go through the handler; a minute in full.
    #[arg(long)]
    handler_seconds: Option<u64>,
    /// Connections that count at once.
    #[arg(long, default_value_t = 4)]
    clients: usize,
    /// Organizations whose events are counted.
    #[arg(long, default_value_t = 64)]
    organizations: usize,
    /// Organizations that hold units; ten thousand in full.
    #[arg(long)]
    holders: Option<usize>,
    /// Single events, readings of a month, and reservations of each client; two thousand in full.
    #[arg(long)]
    singles: Option<usize>,
}

/// What of the options depends on whether all of it is measured.
struct Form {
    counting: Duration,
    limit: Duration,
    handler: Duration,
    holders: usize,
    singles: usize,
}

impl Options {
    fn form(&self) -> Form {
        let of = |said: Option<u64>, full: u64, short: u64| said.unwrap_or(if self.short { short } else { full });
        let many =
            |said: Option<usize>, full: usize, short: usize| said.unwrap_or(if self.short { short } else { full });
        Form {
            counting: Duration::from_secs(of(self.seconds, 600, 20)),
            limit: Duration::from_secs(of(self.limit_seconds, 60, 10)),
            handler: Duration::from_secs(of(self.handler_seconds, 60, 10)),
            holders: many(self.holders, 10_000, 1_000),
            singles: many(self.singles, 2_000, 400),
        }
    }
}

/// Who counts what next: every batch has keys of its own, in ascending order, as ids made by time have.
struct Stream {
    organizations: Vec<Uuid>,
    next: AtomicU64,
    now: DateTime<Utc>,
}

/// A thousand events of one organization.
struct Batch {
    organization: Uuid,
    first: u64,
    now: DateTime<Utc>,
}

impl Stream {
    fn batch(&self) -> Batch {
        let first = self.next.fetch_add(BATCH as u64, Ordering::Relaxed);
        let organization = self.organizations[(first / BATCH as u64) as usize % self.organizations.len()];
        Batch { organization, first, now: self.now }
    }
}

impl Batch {
    fn key(&self, nth: usize) -> String {
        format!("{:020}", self.first + nth as u64)
    }

    /// Of the hour before, a second apart at least.
    fn time(&self, nth: usize) -> DateTime<Utc> {
        self.now - TimeDelta::seconds(3_600 - (self.first as i64 / 1_000 + nth as i64) % 3_600)
    }

    fn quantity(nth: usize) -> i64 {
        1 + (nth % 9) as i64
    }

    fn event(&self, nth: usize) -> Value {
        json!({
            "specversion": "1.0", "id": self.key(nth), "source": "bench", "type": "agent_tokens",
            "time": self.time(nth).to_rfc3339_opts(chrono::SecondsFormat::Secs, true), "corrects": null,
            "quantity": Self::quantity(nth), "value": null,
        })
    }

    fn events(&self) -> Vec<Value> {
        (0..BATCH).map(|nth| self.event(nth)).collect()
    }
}

/// What a connection does with a batch.
#[derive(Clone, Copy)]
enum Way {
    /// `record_usage`, with all that counting is.
    Counted,
    /// The rows alone.
    Plain,
}

impl Way {
    fn sql(self) -> &'static str {
        match self {
            Self::Counted => "select private.record_usage($1, $2) #>> '{results,0,status}'",
            Self::Plain => {
                "with known as (
                   insert into private.usage_keys (organization_id, source, key, body_hash, meter_key, occurred_at, quantity)
                   select $1, 'bench', event.key, event.hash, 'agent_tokens', event.occurred_at, event.quantity
                   from unnest($2::text[], $3::bytea[], $4::timestamptz[], $5::bigint[]) as event (key, hash, occurred_at, quantity)
                 )
                 insert into private.usage_events (id, organization_id, meter_key, source, key, quantity, occurred_at, day, recorded_at)
                 select gen_random_uuid(), $1, 'agent_tokens', 'bench', event.key, event.quantity, event.occurred_at, event.occurred_at::date, $6
                 from unnest($2::text[], $3::bytea[], $4::timestamptz[], $5::bigint[]) as event (key, hash, occurred_at, quantity)"
            }
        }
    }

    async fn send(self, client: &Client, statement: &Statement, batch: &Batch) -> Result<()> {
        match self {
            Self::Counted => {
                let request = json!({ "v": 1, "organization_id": batch.organization, "events": batch.events() });
                let status: String = client.query_one(statement, &[&request, &batch.now]).await?.get(0);
                ensure!(status == "stored", "an event was {status}");
            }
            Self::Plain => {
                let keys: Vec<String> = (0..BATCH).map(|nth| batch.key(nth)).collect();
                let hashes: Vec<Vec<u8>> = keys.iter().map(|key| key.as_bytes()[4..].to_vec()).collect();
                let times: Vec<DateTime<Utc>> = (0..BATCH).map(|nth| batch.time(nth)).collect();
                let quantities: Vec<i64> = (0..BATCH).map(Batch::quantity).collect();
                client
                    .execute(statement, &[&batch.organization, &keys, &hashes, &times, &quantities, &batch.now])
                    .await?;
            }
        }
        Ok(())
    }
}

/// Events a second: over all of a run, its first minute and its last, or tenth where it is shorter than ten.
struct Rate {
    all: f64,
    first: f64,
    last: f64,
}

impl Rate {
    /// From when each batch was done.
    fn of(mut done: Vec<Duration>) -> Self {
        done.sort_unstable();
        let whole = done.last().map_or(f64::NAN, Duration::as_secs_f64);
        let part = |from: f64, to: f64| {
            let batches = done.iter().filter(|at| (from..to).contains(&at.as_secs_f64())).count();
            (batches * BATCH) as f64 / (to - from)
        };
        let minute = (whole / 10.0).min(60.0);
        Self { all: part(0.0, whole), first: part(0.0, minute), last: part(whole - minute, whole) }
    }
}

/// Sends batches over so many connections for so long.
async fn storm(url: &str, way: Way, stream: &Arc<Stream>, clients: usize, time: Duration) -> Result<Rate> {
    let began = Instant::now();
    let mut senders: JoinSet<Result<Vec<Duration>>> = JoinSet::new();
    for _ in 0..clients {
        let client = postgres::connect(url).await?;
        let stream = Arc::clone(stream);
        senders.spawn(async move {
            let statement = client.prepare(way.sql()).await?;
            let mut done = Vec::new();
            while began.elapsed() < time {
                way.send(&client, &statement, &stream.batch()).await?;
                done.push(began.elapsed());
            }
            Ok(done)
        });
    }
    let mut done = Vec::new();
    while let Some(sender) = senders.join_next().await {
        done.extend(sender??);
    }
    Ok(Rate::of(done))
}

/// Sends batches through the handler of `usage-metering` for so long, each of a request.
async fn through_handler(
    metering: &Arc<Metering>,
    stream: &Arc<Stream>,
    clients: usize,
    time: Duration,
) -> Result<Rate> {
    let began = Instant::now();
    let mut senders: JoinSet<Result<Vec<Duration>>> = JoinSet::new();
    for _ in 0..clients {
        let (metering, stream) = (Arc::clone(metering), Arc::clone(stream));
        senders.spawn(async move {
            let mut done = Vec::new();
            while began.elapsed() < time {
                let batch = stream.batch();
                let events: Vec<Value> = (0..BATCH)
                    .map(|nth| {
                        json!({
                            "specversion": "1.0", "id": batch.key(nth), "source": "bench", "type": "agent_tokens",
                            "time": batch.time(nth).to_rfc3339_opts(chrono::SecondsFormat::Secs, true),
                            "data": { "quantity": Batch::quantity(nth) },
                        })
                    })
                    .collect();
                let headers =
                    json!({ "content-type": "application/json", "authorization": format!("Bearer {API_KEY}") });
                let request = payload(PATH, &headers, &json!(events).to_string());
                let answer = trigger::handle(&*metering, request, &Invocation::with_limit("bench", LIMIT)).await?;
                let body = answer["body"].as_str().unwrap_or_default();
                ensure!(
                    answer["statusCode"] == 200 && body.contains("\"stored\"") && !body.contains("rejected"),
                    "a batch was answered {answer}"
                );
                done.push(began.elapsed());
            }
            Ok(done)
        });
    }
    let mut done = Vec::new();
    while let Some(sender) = senders.join_next().await {
        done.extend(sender??);
    }
    Ok(Rate::of(done))
}

fn told(name: &str, rate: &Rate) {
    println!(
        "  {name:42}  {:8.0} events a second, first minute {:8.0}, last minute {:8.0}",
        rate.all, rate.first, rate.last
    );
}

/// What became of each target.
#[derive(Default)]
struct Verdicts {
    met: usize,
    missed: Vec<String>,
}

impl Verdicts {
    fn at_least(&mut self, name: &str, figure: f64, target: f64, unit: &str) {
        self.judge(name, figure, "at least", target, unit, figure >= target);
    }

    fn at_most(&mut self, name: &str, figure: f64, target: f64, unit: &str) {
        self.judge(name, figure, "at most", target, unit, figure <= target);
    }

    fn judge(&mut self, name: &str, figure: f64, word: &str, target: f64, unit: &str, is_met: bool) {
        let unit = if unit.is_empty() { String::new() } else { format!(" {unit}") };
        let verdict = if is_met { "met" } else { "MISSED" };
        println!("  {name:42}  {figure:10.2}{unit}, {word} {target}{unit}: {verdict}");
        if is_met {
            self.met += 1;
        } else {
            self.missed.push(name.to_owned());
        }
    }

    fn say(&self, is_whole: bool) {
        let all = self.met + self.missed.len();
        println!("\n{} of {all} targets met{}", self.met, if is_whole { "" } else { ", in the short form" });
        for name in &self.missed {
            println!("  MISSED: {name}");
        }
    }
}

/// Measures and prints.
pub async fn run(options: Options) -> Result<()> {
    let (form, mut verdicts) = (options.form(), Verdicts::default());
    let progress = Progress::visible();
    let server = Server::find(&progress).await?;
    let (binary, cli) = (install::postgrest(&progress).await?, install::supabase_cli(&progress).await?);
    let run = RunFolder::create()?;
    let logs = run.path().to_path_buf();
    let settings = [("shared_buffers", "2GB"), ("max_wal_size", "8GB"), ("wal_compression", "on")];
    let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
    let postgres_options = PostgresOptions { durable: true, max_connections: 100, settings };
    let postgres = Postgres::start(&server, &run, &logs, &postgres_options).await?;
    let owner = postgres.url(Role::Owner, DATABASE);
    supabase::push_migrations(&cli, &owner, run.path(), &logs).await?;
    supabase::seed(&owner).await?;
    // What is measured to know the limit is thrown away with its database. Nobody may be connected to what is cloned.
    for database in LIMIT_DATABASES {
        postgres.clone_database(DATABASE, database).await?;
    }
    let admin = postgres.connect(Role::Admin, DATABASE).await?;
    let (organizations, user) = people(&admin, &options, &form).await?;
    let stream = Arc::new(Stream { organizations, next: AtomicU64::new(0), now: NOW.parse()? });
    println!(
        "PostgreSQL {}, durable, batches of {BATCH}, {} connections, {} organizations",
        server.version, options.clients, options.organizations
    );

    println!("\nCounting, {} s", form.counting.as_secs());
    let before = limit(&postgres, &stream, &options, LIMIT_DATABASES[0], form.limit).await?;
    told("limit, before", &before);
    let counted = storm(&owner, Way::Counted, &stream, options.clients, form.counting).await?;
    told("record_usage", &counted);
    let after = limit(&postgres, &stream, &options, LIMIT_DATABASES[1], form.limit).await?;
    told("limit, after", &after);
    verdicts.at_least("record_usage, a second", counted.all, 40_000.0, "events");
    verdicts.at_least("last minute of the first", counted.last / counted.first, 0.7, "");
    verdicts.at_least("of the limit", counted.all / f64::midpoint(before.all, after.all), 0.3, "");
    let wrong: i64 = admin.query_one("select count(*) from private.check_usage()", &[]).await?.get(0);
    ensure!(wrong == 0, "events, keys, days and counters disagree {wrong} times");

    let listening = Listening::bind(None).await?;
    let origin = listening.origin_text();
    let keys = Keys::generate(&origin)?;
    let postgrest = PostgrestOptions { binary, database_url: postgres.url(Role::Authenticator, DATABASE), pool: POOL };
    let postgrest = Postgrest::start(&postgrest, &keys, run.path(), &logs).await?;
    let _gateway = listening.serve(keys.clone(), postgrest.url.clone(), None)?;
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
    let metering = Arc::new(Metering::with_secrets(config, http, SecretStore::fixed(keys.secrets()?)));
    let handled = through_handler(&metering, &stream, options.clients, form.handler).await?;
    told("through the handler", &handled);
    verdicts.at_least("through the handler, a second", handled.all, 10_000.0, "events");

    println!("\nOne at a time");
    let client = postgres.connect(Role::Owner, DATABASE).await?;
    single(&client, &stream, form.singles, &mut verdicts).await?;
    month(&postgres, &stream, user, form.singles, &mut verdicts).await?;
    reserve(&postgres, options.clients, form.singles, &mut verdicts).await?;
    verdicts.say(!options.short);
    postgrest.stop().await?;
    postgres.stop().await
}

/// The limit of the machine, in a database of its own that has the same tables.
async fn limit(
    postgres: &Postgres,
    stream: &Arc<Stream>,
    options: &Options,
    database: &str,
    time: Duration,
) -> Result<Rate> {
    let url = postgres.url(Role::Owner, database);
    let rate = storm(&url, Way::Plain, stream, options.clients, time).await;
    postgres.drop_database(database).await?;
    rate
}

/// Organizations with their subscriptions, a key of the first, and a user who reads its usage.
async fn people(admin: &Client, options: &Options, form: &Form) -> Result<(Vec<Uuid>, Uuid)> {
    admin
        .execute(
            "insert into private.clock_offset (shift) values ($1::text::timestamptz - now())
             on conflict (single) do update set shift = excluded.shift",
            &[&NOW],
        )
        .await?;
    let count = i32::try_from(options.organizations.max(form.holders))?;
    let made = admin
        .query(
            "with made as (
               insert into public.organizations (name, timezone, country_code)
               select 'Bench ' || number, 'Asia/Kolkata', 'IN' from generate_series(1, $1) as number
               returning id
             )
             select made.id, private.subscribe_organization(made.id, 'free', 'active', $2::text::timestamptz) from made",
            &[&count, &SINCE],
        )
        .await?;
    let organizations: Vec<Uuid> = made.iter().take(options.organizations).map(|row| row.get(0)).collect();
    let first = organizations.first().context("no organization")?;
    admin
        .execute(
            "insert into public.api_keys (organization_id, name, prefix, sha256, scopes)
             values ($1, 'bench', left($2::text, 12), sha256(convert_to($2, 'UTF8')), array['usage.write'])",
            &[first, &API_KEY],
        )
        .await?;
    let user = Uuid::new_v4();
    admin.execute("insert into auth.users (id, email) values ($1, 'bench@example.com')", &[&user]).await?;
    admin
        .execute(
            "update public.profiles set organization_id = $2, system_role = 'owner' where id = $1",
            &[&user, first],
        )
        .await?;
    admin.batch_execute("vacuum analyze").await?;
    Ok((organizations, user))
}

/// One event a transaction, by one who does nothing else.
async fn single(client: &Client, stream: &Stream, count: usize, verdicts: &mut Verdicts) -> Result<()> {
    let statement = client.prepare(Way::Counted.sql()).await?;
    let mut times = Times::default();
    for nth in 0..count {
        let batch = stream.batch();
        let request = json!({ "v": 1, "organization_id": batch.organization, "events": [batch.event(nth % BATCH)] });
        let began = Instant::now();
        let status: String = client.query_one(&statement, &[&request, &batch.now]).await?.get(0);
        times.push(began.elapsed());
        ensure!(status == "stored", "an event was {status}");
    }
    println!("  {:42}  {:10.2} ms", "a single event, median", times.median());
    verdicts.at_most("a single event, p99", times.percentile(99), 10.0, "ms");
    Ok(())
}

/// A month day by day, as a user reads it.
async fn month(postgres: &Postgres, stream: &Stream, user: Uuid, count: usize, verdicts: &mut Verdicts) -> Result<()> {
    let client = postgres.connect(Role::Owner, DATABASE).await?;
    // What was counted so far is of one day; the month that is read has something on each.
    let statement = client.prepare(Way::Counted.sql()).await?;
    for day in 1..=NOW_DAY {
        let mut batch = stream.batch();
        batch.organization = stream.organizations[0];
        batch.now -= TimeDelta::days(NOW_DAY - day);
        Way::Counted.send(&client, &statement, &batch).await?;
    }
    let events: i64 = client.query_one("select sum(events)::bigint from public.usage_days", &[]).await?.get(0);
    let claims = json!({ "sub": user, "role": "authenticated" }).to_string();
    client.execute("select set_config('request.jwt.claims', $1, false)", &[&claims]).await?;
    client.batch_execute("set role authenticated").await?;
    let statement = client
        .prepare("select jsonb_array_length(public.get_usage_daily('2026-11-01', '2026-11-30') -> 'days')")
        .await?;
    let mut times = Times::default();
    for _ in 0..count {
        let began = Instant::now();
        let days: i32 = client.query_one(&statement, &[]).await?.get(0);
        times.push(began.elapsed());
        ensure!(i64::from(days) == NOW_DAY, "{days} days are read");
    }
    let name = format!("a month by day of {:.1} million events, p99", events as f64 / 1e6);
    verdicts.at_most(&name, times.percentile(99), 10.0, "ms");
    Ok(())
}

/// Units held by many at once, of ten thousand organizations.
async fn reserve(postgres: &Postgres, clients: usize, each: usize, verdicts: &mut Verdicts) -> Result<()> {
    let client = postgres.connect(Role::Owner, DATABASE).await?;
    let holders: Vec<Uuid> =
        client.query("select id from public.organizations", &[]).await?.iter().map(|row| row.get(0)).collect();
    let holders = Arc::new(holders);
    let now: DateTime<Utc> = NOW.parse()?;
    let mut senders: JoinSet<Result<Vec<Duration>>> = JoinSet::new();
    let began = Instant::now();
    for nth in 0..clients {
        let (client, holders) = (postgres.connect(Role::Owner, DATABASE).await?, Arc::clone(&holders));
        senders.spawn(async move {
            let statement = client.prepare("select private.reserve_usage($1, 'ai_calls', 1, $2)").await?;
            let mut times = Vec::new();
            for round in 0..each {
                // Over all of them, in an order that is none.
                let holder = holders[(round * 7_919 + nth * 104_729) % holders.len()];
                let began = Instant::now();
                client.query_one(&statement, &[&holder, &now]).await?;
                times.push(began.elapsed());
            }
            Ok(times)
        });
    }
    let mut times = Times::default();
    let mut count = 0;
    while let Some(sender) = senders.join_next().await {
        for time in sender?? {
            times.push(time);
            count += 1;
        }
    }
    let rate = f64::from(count) / began.elapsed().as_secs_f64();
    println!("  {:42}  {rate:8.0} a second, of {} organizations", "units held", holders.len());
    println!("  {:42}  {:10.2} ms", "a unit held, median", times.median());
    verdicts.at_most("a unit held, p99", times.percentile(99), 5.0, "ms");
    Ok(())
}
