//! What it costs to believe nobody: signed hang-ups through the handler of `webhook-intake`, against a handler that sends the same
//! request to the same database function and looks at nothing. Same PostgREST, same connections, in turns.
//!
//! Each handler's work is done by one thread, so that its processor time is that thread's; the key gateway has threads of its own, and
//! PostgREST and PostgreSQL are processes of their own.

use crate::figures::Times;
use anyhow::{Context, Result, ensure};
use local::{
    carrier::{nonce, sign_callback},
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
use serde_json::{Value, json};
use shared::{
    config::Config,
    http::{self as web, Request, Response},
    seal::Sealer,
    secrets::{SecretStore, Secrets},
    supabase::Supabase,
    telephony::{CallbackEvent, token::CallbackToken},
    trigger::{self, Function, Invocation},
};
use std::{
    fs,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::task::JoinSet;
use uuid::Uuid;
use webhook_intake::{Intake, sources::carriers::Callback};

/// Where carriers believe us to be.
const PUBLIC_ORIGIN: &str = "https://calls.example.com";
/// What the carrier signs with.
const AUTH_TOKEN: &str = "a token of forty characters, as Plivo has";
/// Connections of PostgREST.
const POOL: u32 = 4;
/// Organizations whose calls end: those of one end one after the other, since they count into the same usage.
const ORGANIZATIONS: i32 = 64;
/// How long an event may take.
const LIMIT: Duration = Duration::from_secs(30);

/// How it is measured.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Hang-ups of each kind in a round.
    #[arg(long, default_value_t = 400)]
    events: usize,
    /// Rounds, after one that is not counted.
    #[arg(long, default_value_t = 10)]
    rounds: usize,
    /// Events under way at once.
    #[arg(long, default_value_t = 4)]
    at_once: usize,
}

/// The handler that only forwards: the body is the database's request.
struct Forward(Supabase);

impl Function for Forward {
    async fn http(&self, request: Request, _: &Invocation) -> shared::Result<Response> {
        let body: Box<serde_json::value::RawValue> = serde_json::from_slice(&request.body)?;
        let answer: Value = self.0.call_within("apply_event", &body, LIMIT).await?;
        web::json(&answer)
    }
}

/// A call that has not ended.
struct Leg {
    attempt: Uuid,
    callee: String,
}

/// Everything that a hang-up is made of.
struct World {
    config: Config,
    secrets: Secrets,
    account: Uuid,
}

impl World {
    /// The end of a call, signed, as API Gateway hands it over.
    fn hang_up(&self, leg: &Leg) -> Result<Value> {
        let token = CallbackToken {
            attempt_id: leg.attempt,
            carrier_account_id: self.account,
            record: false,
            not_after: chrono::Utc::now().timestamp() + 3_600,
            agent_id: Uuid::nil(),
        };
        let token = token.encode(&self.secrets.callback_keys, "plivo", CallbackEvent::Hangup).context("no key")?;
        let path = format!("/functions/v1/webhook-intake/plivo/hangup/{token}");
        let call = Uuid::new_v4().to_string();
        let form = [
            ("CallUUID", &*call),
            ("CallStatus", "completed"),
            ("Direction", "outbound"),
            ("Event", "Hangup"),
            ("From", "918000000000"),
            ("To", leg.callee.trim_start_matches('+')),
            ("Duration", "37"),
            ("BillDuration", "60"),
            ("BillRate", "0.0037"),
            ("TotalCost", "0.0037"),
            ("HangupCauseCode", "4000"),
            ("HangupCauseName", "Normal Hangup"),
            ("HangupSource", "Callee"),
            ("StartTime", "2026-11-24 10:00:00"),
            ("AnswerTime", "2026-11-24 10:00:05"),
            ("EndTime", "2026-11-24 10:00:42"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
        let body = form_urlencoded::Serializer::new(String::new()).extend_pairs(&form).finish();
        let mut headers = json!({ "content-type": "application/x-www-form-urlencoded", "host": "api.example.com" });
        for (name, value) in sign_callback(AUTH_TOKEN, &format!("{PUBLIC_ORIGIN}{path}"), &form, &nonce()) {
            headers[name.to_ascii_lowercase()] = json!(value);
        }
        Ok(payload(&path, &headers, &body))
    }

    /// The same, as what `webhook-intake` would ask of the database.
    fn forwarded(&self, leg: &Leg) -> Result<Value> {
        let signed = self.hang_up(leg)?;
        let path = signed["rawPath"].as_str().context("no path")?;
        let callback = Callback::of("plivo", "hangup", path.rsplit('/').next().unwrap_or_default())?;
        let headers = signed["headers"].as_object().context("no headers")?;
        let request = Request {
            method: "POST".parse()?,
            path: path.to_owned(),
            query: String::new(),
            headers: headers
                .iter()
                .map(|(name, value)| Ok((name.parse()?, value.as_str().unwrap_or_default().parse()?)))
                .collect::<Result<_>>()?,
            body: signed["body"].as_str().unwrap_or_default().to_owned().into(),
        };
        let event = callback.event_of(self.account, Some(leg.attempt), &request);
        Ok(payload("/", &json!({ "content-type": "application/json" }), &event.to_string()))
    }
}

/// A request as API Gateway hands it over.
pub fn payload(path: &str, headers: &Value, body: &str) -> Value {
    json!({
        "version": "2.0", "routeKey": "ANY /functions/v1/{proxy+}", "rawPath": path, "rawQueryString": "", "headers": headers,
        "requestContext": {
            "accountId": "000000000000", "apiId": "api", "domainName": "api.example.com", "domainPrefix": "api",
            "http": { "method": "POST", "path": path, "protocol": "HTTP/1.1", "sourceIp": "192.0.2.1", "userAgent": "bench" },
            "requestId": "request", "routeKey": "ANY /functions/v1/{proxy+}", "stage": "$default",
            "time": "24/Nov/2026:04:30:00 +0000", "timeEpoch": 1_795_494_600_000_i64,
        },
        "body": body, "isBase64Encoded": false,
    })
}

/// What one round took: by the clock, and of the thread's processor.
struct Took {
    time: Duration,
    cpu: Duration,
}

/// The processor time that this thread has used.
fn thread_cpu() -> Result<Duration> {
    let text = fs::read_to_string("/proc/thread-self/schedstat").context("the kernel counts no processor time here")?;
    Ok(Duration::from_nanos(text.split(' ').next().unwrap_or_default().parse()?))
}

/// Sends events through a function, so many at once; each has to change its row.
async fn send<F: Function>(function: &Arc<F>, events: Vec<Value>, at_once: usize) -> Result<Took> {
    let events = Arc::new(Mutex::new(events));
    let (began, cpu) = (Instant::now(), thread_cpu()?);
    let mut senders: JoinSet<Result<()>> = JoinSet::new();
    for _ in 0..at_once {
        let (function, events) = (Arc::clone(function), Arc::clone(&events));
        senders.spawn(async move {
            loop {
                let next = events.lock().unwrap_or_else(PoisonError::into_inner).pop();
                let Some(event) = next else { return Ok(()) };
                let answer = trigger::handle(&*function, event, &Invocation::with_limit("bench", LIMIT)).await?;
                let body = answer["body"].as_str().unwrap_or_default();
                ensure!(answer["statusCode"] == 200 && body.contains("\"applied\""), "an event was answered {answer}");
            }
        });
    }
    while let Some(done) = senders.join_next().await {
        done??;
    }
    Ok(Took { time: began.elapsed(), cpu: thread_cpu()?.saturating_sub(cpu) })
}

/// All rounds, on a thread of their own: whole handler and forwarder, in turns.
fn rounds(world: &World, legs: Vec<Leg>, options: &Options) -> Result<Vec<(Took, Took)>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (http, secrets) = (shared::supabase::http_client()?, SecretStore::fixed(world.secrets.clone()));
        let forward = Supabase::new(&world.config, http.clone(), secrets.clone());
        let forward = Arc::new(Forward(forward));
        let intake = Arc::new(Intake::with_secrets(world.config.clone(), http, secrets));
        let mut legs = legs.into_iter();
        let mut took = Vec::new();
        for round in 0..=options.rounds {
            let signed: Result<Vec<Value>> =
                legs.by_ref().take(options.events).map(|leg| world.hang_up(&leg)).collect();
            let bare: Result<Vec<Value>> =
                legs.by_ref().take(options.events).map(|leg| world.forwarded(&leg)).collect();
            let (signed, bare) = (signed?, bare?);
            // Whoever comes second finds the tables a little longer: in turns.
            let pair = if round % 2 == 0 {
                let whole = send(&intake, signed, options.at_once).await?;
                (whole, send(&forward, bare, options.at_once).await?)
            } else {
                let forwarded = send(&forward, bare, options.at_once).await?;
                (send(&intake, signed, options.at_once).await?, forwarded)
            };
            // The first fills caches and plans.
            if round > 0 {
                took.push(pair);
            }
        }
        Ok(took)
    })
}

/// Measures and prints.
pub async fn run(options: Options) -> Result<()> {
    let progress = Progress::visible();
    let server = Server::find(&progress).await?;
    let (binary, cli) = (install::postgrest(&progress).await?, install::supabase_cli(&progress).await?);
    let run = RunFolder::create()?;
    let logs = run.path().to_path_buf();
    let postgres = Postgres::start(&server, &run, &logs, &PostgresOptions::default()).await?;
    let owner = postgres.url(Role::Owner, DATABASE);
    supabase::push_migrations(&cli, &owner, run.path(), &logs).await?;
    supabase::seed(&owner).await?;
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
            ("PUBLIC_ORIGIN", PUBLIC_ORIGIN),
            ("SECRET_ARN", "not asked for in process"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned())),
    )?;
    let world = World { config, secrets: keys.secrets()?, account: Uuid::new_v4() };
    let admin = postgres.connect(Role::Admin, DATABASE).await?;
    let sealed = Sealer::new(&world.secrets.seal_keys)?.seal(AUTH_TOKEN, &world.account.to_string())?;
    admin
        .execute(
            "insert into public.carrier_accounts (id, provider, account_sid, credentials_sealed, api_base)
             values ($1, 'plivo', 'bench', $2, 'https://carrier.example.com')",
            &[&world.account, &sealed],
        )
        .await?;
    let count = options.events * 2 * (options.rounds + 1);
    let legs: Vec<Leg> = admin
        .query(
            "with organizations as (
               insert into public.organizations (name) select 'Bench ' || number from generate_series(1, $3::integer) as number returning id
             ), organization as (select id, row_number() over (order by id) - 1 as nth from organizations)
             insert into public.call_logs (organization_id, carrier_account_id, caller_number, callee_number, status, dialled, submitted_at)
             select organization.id, $1, '+918000000000', '+9199' || lpad(number::text, 8, '0'), 'initiated', true, private.clock_now()
             from generate_series(1, $2::integer) as number
             join organization on organization.nth = number % $3::integer
             returning id, callee_number",
            &[&world.account, &i32::try_from(count)?, &ORGANIZATIONS],
        )
        .await?
        .iter()
        .map(|row| Leg { attempt: row.get(0), callee: row.get(1) })
        .collect();
    admin.batch_execute("vacuum analyze").await?;
    println!(
        "PostgreSQL {}, {} rounds of {} hang-ups each way, {} at once",
        server.version, options.rounds, options.events, options.at_once
    );
    let events = options.events as f64;
    let took = tokio::task::spawn_blocking(move || rounds(&world, legs, &options)).await??;
    print(&took, events);
    postgrest.stop().await?;
    postgres.stop().await
}

fn print(took: &[(Took, Took)], events: f64) {
    let ratios = |ratio: fn(&(Took, Took)) -> f64| {
        let mut all: Vec<f64> = took.iter().map(ratio).collect();
        all.sort_by(f64::total_cmp);
        (all.get(all.len() / 2).copied().unwrap_or(f64::NAN), all)
    };
    for (name, of) in
        [("whole handler", (|pair| &pair.0) as fn(&(Took, Took)) -> &Took), ("only forwards", |pair| &pair.1)]
    {
        let (mut times, mut cpu) = (Times::default(), Times::default());
        for pair in took {
            times.push(of(pair).time);
            cpu.push(of(pair).cpu);
        }
        let (rate, cpu) = (events * 1_000.0 / times.median(), cpu.median() * 1_000.0 / events);
        println!("  {name}  {rate:7.0} events a second  {cpu:6.0} µs of processor time an event");
    }
    let (throughput, all) = ratios(|pair| pair.1.time.as_secs_f64() / pair.0.time.as_secs_f64());
    let (cpu, _) = ratios(|pair| pair.0.cpu.as_secs_f64() / pair.1.cpu.as_secs_f64());
    let (least, most) = (all.first().copied().unwrap_or(f64::NAN), all.last().copied().unwrap_or(f64::NAN));
    println!(
        "  throughput, whole to forwarding: {throughput:.3} (rounds from {least:.3} to {most:.3}); processor time: {cpu:.2}"
    );
}
