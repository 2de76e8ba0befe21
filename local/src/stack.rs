//! All parts together: a Trunkline that a client cannot tell from a deployed one.

mod users;

pub use users::{CarrierAccount, Organization, User, create_user};

use crate::parts::{
    build,
    clock::{Clock, ClockOptions},
    folder::{self, RunFolder},
    gateway::{Gateway, Listening},
    install,
    keys::Keys,
    lambda::{Functions, Invoker, LambdaOptions},
    poller::{MessageCounts, MessageFaults, Poller},
    postgres::{Postgres, PostgresOptions, Role, Server},
    postgrest::{Postgrest, PostgrestOptions},
    progress::Progress,
    relay::Relay,
    sqs::{self, Sqs},
    supabase,
    template::Template,
};
use anyhow::{Context, Result};
use chrono::{DateTime, Days, TimeDelta, Timelike, Utc};
use serde_json::json;
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};
use url::Url;

/// The database of a stack, named as on Supabase.
pub const DATABASE: &str = "postgres";
/// How far India's clocks are ahead of UTC.
const KOLKATA: TimeDelta = TimeDelta::minutes(330);
/// How many runs' logs are kept.
const LOGS_KEPT: usize = 10;

/// How a stack is started.
#[derive(Debug, Clone)]
pub struct StackOptions {
    /// Port of the origin on 127.0.0.1; any free one when none.
    pub port: Option<u16>,
    /// Where the gateway finds PostgREST, when that is not the stack's own: a proxy, say. The stack's own runs all the same.
    pub postgrest_url: Option<Url>,
    /// Processes a function.
    pub workers: usize,
    /// Connections of PostgREST to the database at most.
    pub pool: u32,
    /// Whether schedules and queues run by themselves. Tests that drive a function by hand turn it off.
    pub automatic: bool,
    /// How many times faster than `template.yaml` says schedules fire; at least 1. Business time is not sped up by it.
    pub speed: f64,
    /// How many things due a jump of the business clock gathers; see [`ClockOptions::gather`].
    pub gather: u32,
    /// The folder of the functions' binaries; built first when none.
    pub binaries: Option<PathBuf>,
    /// How the database server is set up.
    pub postgres: PostgresOptions,
    /// Websocket origins of voice agents, by agent id or `default`.
    pub agent_origins: BTreeMap<String, String>,
    /// Where logs go; a new folder below `.trunkline/logs` when none.
    pub log_dir: Option<PathBuf>,
    /// How the queues are worse than they should be.
    pub message_faults: MessageFaults,
    /// What the functions log, as a `tracing` filter.
    pub log_level: String,
    /// Where the start is shown.
    pub progress: Progress,
}

impl Default for StackOptions {
    fn default() -> Self {
        Self {
            port: None,
            postgrest_url: None,
            workers: 2,
            pool: 20,
            automatic: true,
            speed: 1.0,
            gather: 1,
            binaries: None,
            postgres: PostgresOptions::default(),
            agent_origins: BTreeMap::from([("default".to_owned(), "wss://voice.example.com".to_owned())]),
            log_dir: None,
            message_faults: MessageFaults::default(),
            log_level: "info".to_owned(),
            progress: Progress::hidden(),
        }
    }
}

/// A running stack. Dropping it kills every process it started; [`Stack::stop`] ends them in order.
pub struct Stack {
    /// The origin that clients use: `/rest/v1`, `/functions/v1`.
    pub origin: Url,
    /// The stack's own PostgREST, without the gateway in front.
    pub postgrest_url: Url,
    /// The database, as role `postgres`.
    pub database_url: String,
    /// The database, as the superuser.
    pub admin_database_url: String,
    /// Endpoint of SQS and Secrets Manager.
    pub sqs_url: Url,
    /// The queues' URLs by their logical id in `template.yaml`.
    pub queue_urls: BTreeMap<String, String>,
    /// The run's keys.
    pub keys: Keys,
    /// Where every part's log is.
    pub log_dir: PathBuf,
    /// What `template.yaml` says.
    pub template: Template,
    /// The database server.
    pub postgres: Postgres,
    /// PostgREST, to kill and start again.
    pub postgrest: Postgrest,
    /// The functions' processes.
    pub functions: Functions,
    /// Schedules and business time.
    pub clock: Clock,
    gateway: Gateway,
    relay: Relay,
    poller: Option<Poller>,
    sqs: Sqs,
    rest_is_ours: bool,
    http: reqwest::Client,
    _run: RunFolder,
}

impl Stack {
    /// Installs what is missing, builds the functions and starts everything.
    pub async fn start(options: StackOptions) -> Result<Self> {
        let log_dir = match &options.log_dir {
            Some(folder) => folder.clone(),
            None => new_log_folder()?,
        };
        fs::create_dir_all(&log_dir).with_context(|| format!("cannot make {}", log_dir.display()))?;
        log_to(&log_dir.join("stack.log"))?;
        let run = RunFolder::create()?;
        let template = Template::load(&folder::workspace()?.join("template.yaml"))?;
        let listening = Listening::bind(options.port).await?;
        let keys = Keys::generate(&listening.origin_text())?;
        let packages: Vec<String> = template.functions.iter().map(|function| function.package.clone()).collect();

        let (database, queues, binaries) = tokio::try_join!(
            start_database(&options, &keys, &listening, &run, &log_dir),
            start_queues(&options, &keys, &template, &run, &log_dir),
            async {
                match &options.binaries {
                    Some(folder) => Ok(folder.clone()),
                    None => build::functions(&packages, &options.progress, &log_dir).await,
                }
            },
        )?;
        let (postgres, postgrest) = database;
        let (sqs, queue_urls, secret_arn) = queues;

        let step = options.progress.step("Stack");
        step.say("starting the functions");
        let mut environment = BTreeMap::from([
            ("SUPABASE_URL".to_owned(), listening.origin_text()),
            ("SUPABASE_PUBLISHABLE_KEY".to_owned(), keys.publishable_key.clone()),
            ("PUBLIC_ORIGIN".to_owned(), listening.origin_text()),
            ("SECRET_ARN".to_owned(), secret_arn),
            ("AGENT_ORIGINS".to_owned(), json!(options.agent_origins).to_string()),
            ("LOG_LEVEL".to_owned(), options.log_level.clone()),
        ]);
        environment.extend(sqs.environment().map(|(name, value)| (name.to_owned(), value)));
        environment.extend(queue_urls.iter().map(|(id, url)| (queue_variable(id), url.clone())));
        let lambda = LambdaOptions { binaries, environment, workers: options.workers, log_dir: log_dir.clone() };
        let functions = Functions::start(&template, lambda).await?;
        let admin_database_url = postgres.url(Role::Admin, DATABASE);
        let relay = Relay::start(admin_database_url.clone()).await?;
        let poller = Poller::start(&template, &sqs.client(), &queue_urls, &functions, options.message_faults)?;
        let clock = ClockOptions {
            database_url: admin_database_url.clone(),
            speed: options.speed,
            backlog: poller.backlog(),
            gather: options.gather,
        };
        let clock = Clock::start(&template, functions.invoker(), clock).await?;
        let poller = if options.automatic {
            Some(poller)
        } else {
            // The clock stays to be set, and to fire what a test wants fired.
            poller.stop().await;
            clock.stop().await;
            None
        };
        let origin = listening.origin().clone();
        let rest = options.postgrest_url.clone().unwrap_or_else(|| postgrest.url.clone());
        let gateway =
            listening.with_storage(run.path().join("storage")).serve(keys.clone(), rest, Some(functions.handler()))?;
        step.done(format!("at {origin}"));
        Ok(Self {
            postgrest_url: postgrest.url.clone(),
            database_url: postgres.url(Role::Owner, DATABASE),
            admin_database_url,
            sqs_url: sqs.url.clone(),
            origin,
            queue_urls,
            keys,
            log_dir,
            template,
            postgres,
            postgrest,
            functions,
            clock,
            gateway,
            relay,
            poller,
            sqs,
            rest_is_ours: options.postgrest_url.is_none(),
            http: crate::parts::http_client()?,
            _run: run,
        })
    }

    /// Ends everything: what asks before what answers, the database last.
    pub async fn stop(self) -> Result<()> {
        self.clock.stop().await;
        self.relay.stop().await;
        if let Some(poller) = self.poller {
            poller.stop().await;
        }
        self.gateway.stop().await;
        self.functions.stop().await;
        let (postgrest, sqs) = tokio::join!(self.postgrest.stop(), self.sqs.stop());
        let postgres = self.postgres.stop().await;
        postgrest.and(sqs).and(postgres)
    }

    /// What time it is for the business: the real time plus the clock's shift.
    pub fn business_now(&self) -> DateTime<Utc> {
        self.clock.business_now()
    }

    /// Moves the clock to ten in the morning in Kolkata when it is an hour there at which nobody may be called; else leaves it.
    pub async fn open_for_calls(&self) -> Result<()> {
        match next_opening(self.business_now()) {
            Some(morning) => self.clock.start_at(morning).await,
            None => Ok(()),
        }
    }

    /// The origin without a slash at its end.
    pub fn origin_text(&self) -> &str {
        self.origin.as_str().trim_end_matches('/')
    }

    /// `<origin>/rest/v1`.
    pub fn rest_url(&self) -> String {
        format!("{}rest/v1", self.origin)
    }

    /// `<origin>/functions/v1`.
    pub fn functions_url(&self) -> String {
        format!("{}functions/v1", self.origin)
    }

    /// What invokes the functions directly, as SQS and schedules do.
    pub fn invoker(&self) -> Invoker {
        self.functions.invoker()
    }

    /// How often the queues were worse than they should be; nothing where they do not run by themselves.
    pub fn message_counts(&self) -> MessageCounts {
        self.poller.as_ref().map(Poller::counts).unwrap_or_default()
    }

    /// A client of the queues.
    pub fn sqs(&self) -> aws_sdk_sqs::Client {
        sqs::client(&self.sqs_url)
    }

    /// A connection to the stack's database.
    pub async fn connect(&self, role: Role) -> Result<tokio_postgres::Client> {
        self.postgres.connect(role, DATABASE).await
    }
}

async fn start_database(
    options: &StackOptions,
    keys: &Keys,
    listening: &Listening,
    run: &RunFolder,
    logs: &Path,
) -> Result<(Postgres, Postgrest)> {
    let progress = &options.progress;
    let (server, cli, binary) =
        tokio::try_join!(Server::find(progress), install::supabase_cli(progress), install::postgrest(progress))?;

    let step = progress.step("PostgreSQL");
    step.say(format!("{} starting", server.version));
    let postgres = Postgres::start(&server, run, logs, &options.postgres).await?;
    step.done(format!("{} on port {}", postgres.version, postgres.port));

    let step = progress.step("Migrations");
    step.say("supabase db push");
    let owner = postgres.url(Role::Owner, DATABASE);
    supabase::push_migrations(&cli, &owner, run.path(), logs).await?;
    supabase::seed(&owner).await?;
    let functions_url = format!("{}/functions/v1", listening.origin_text());
    let admin = postgres.connect(Role::Admin, DATABASE).await?;
    for (name, value) in
        [("trunkline_functions_url", functions_url.as_str()), ("trunkline_nudge_key", keys.nudge_key())]
    {
        admin.execute("select vault.create_secret($1, $2)", &[&value, &name]).await?;
    }
    step.done("applied");

    let step = progress.step("PostgREST");
    step.say("starting");
    let settings =
        PostgrestOptions { binary, database_url: postgres.url(Role::Authenticator, DATABASE), pool: options.pool };
    let postgrest = Postgrest::start(&settings, keys, run.path(), logs).await?;
    step.done(format!("at {}", postgrest.url));
    Ok((postgres, postgrest))
}

async fn start_queues(
    options: &StackOptions,
    keys: &Keys,
    template: &Template,
    run: &RunFolder,
    logs: &Path,
) -> Result<(Sqs, BTreeMap<String, String>, String)> {
    let installed = install::ministack(&options.progress).await?;
    let step = options.progress.step("SQS");
    step.say("starting");
    let sqs = Sqs::start(&installed, run.path(), logs).await?;
    let queue_urls = sqs.create_queues(template).await?;
    let secret_arn = sqs.create_secret("trunkline", &keys.secret_json()).await?;
    step.done(format!("{} queues at {}", queue_urls.len(), sqs.url));
    Ok((sqs, queue_urls, secret_arn))
}

/// Writes what the parts themselves log to a file, unless this process logs elsewhere already.
fn log_to(path: &Path) -> Result<()> {
    let file = fs::File::options().create(true).append(true).open(path)?;
    let _elsewhere = tracing_subscriber::fmt()
        .with_env_filter("info,local=debug")
        .with_ansi(false)
        .with_writer(std::sync::Mutex::new(file))
        .try_init();
    Ok(())
}

/// The next ten o'clock in Kolkata, when calls are not allowed there now or soon will not be.
fn next_opening(now: DateTime<Utc>) -> Option<DateTime<Utc>> {
    let local = now.naive_utc() + KOLKATA;
    if (9..19).contains(&local.hour()) {
        return None;
    }
    let day = if local.hour() < 9 { local.date() } else { local.date() + Days::new(1) };
    Some((day.and_hms_opt(10, 0, 0)? - KOLKATA).and_utc())
}

/// `DialQueue` becomes `DIAL_QUEUE_URL`.
fn queue_variable(logical_id: &str) -> String {
    let mut name = String::new();
    for letter in logical_id.chars() {
        if letter.is_ascii_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(letter.to_ascii_uppercase());
    }
    name + "_URL"
}

/// A folder for this run's logs, where they can be read after it; the oldest ended runs' go.
fn new_log_folder() -> Result<PathBuf> {
    let name = format!("{}-{}", chrono::Local::now().format("%Y%m%d-%H%M%S"), std::process::id());
    let all = folder::parts()?.join("logs");
    let folder = all.join(&name);
    if fs::create_dir_all(&folder).is_err() {
        // The checkout is somebody else's, and all its parts are installed.
        let elsewhere = std::env::temp_dir().join(format!("trunkline-logs-{name}"));
        fs::create_dir_all(&elsewhere).with_context(|| format!("cannot make {}", elsewhere.display()))?;
        return Ok(elsewhere);
    }
    let mut earlier: Vec<PathBuf> = fs::read_dir(&all)?.flatten().map(|entry| entry.path()).collect();
    earlier.sort();
    let surplus = earlier.len().saturating_sub(LOGS_KEPT);
    for old in earlier.into_iter().filter(|folder| !is_of_a_live_run(folder)).take(surplus) {
        let _others = fs::remove_dir_all(old);
    }
    Ok(folder)
}

/// Whether the process that a log folder is named after still runs. Where that cannot be told, it does not.
fn is_of_a_live_run(folder: &Path) -> bool {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    name.rsplit('-').next().is_some_and(|process| Path::new("/proc").join(process).is_dir())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn at_night_the_next_opening_is_ten_in_the_morning() {
        let at = |text: &str| text.parse::<DateTime<Utc>>().unwrap();
        assert_eq!(next_opening(at("2026-11-22T04:30:00Z")), None);
        assert_eq!(next_opening(at("2026-11-22T02:00:00Z")), Some(at("2026-11-22T04:30:00Z")));
        assert_eq!(next_opening(at("2026-11-22T15:00:00Z")), Some(at("2026-11-23T04:30:00Z")));
    }

    #[test]
    fn a_queue_has_the_variable_that_functions_read() {
        assert_eq!(queue_variable("DialQueue"), "DIAL_QUEUE_URL");
        assert_eq!(queue_variable("IntakeDeadQueue"), "INTAKE_DEAD_QUEUE_URL");
    }
}
