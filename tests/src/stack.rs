//! A database with all that a function needs around it, for functions that are called in process.

use crate::{Database, Proxy, queues::Queue};
use anyhow::{Context, Result, ensure};
use call_dispatch::Dispatch;
use event_delivery::Delivery;
use http::StatusCode;
use invoice_generation::Invoicing;
use local::parts::{
    gateway::{Gateway, Listening},
    install,
    keys::Keys,
    postgres::Role,
    postgrest::{Postgrest, PostgrestOptions},
    progress::Progress,
};
use serde_json::Value;
use shared::{config::Config, secrets::SecretStore, supabase};
use std::path::Path;
use tokio_postgres::Client;
use usage_metering::Metering;
use webhook_intake::Intake;

/// Where carriers believe us to be: signatures are made over it, and nothing is sent to it.
pub const PUBLIC_ORIGIN: &str = "https://calls.example.com";
/// The voice agent's websocket.
pub const AGENT_ORIGIN: &str = "wss://voice.example.com";
/// Connections of a test's PostgREST.
const POOL: u32 = 8;

/// A stack of one test: PostgREST of its own on a database of its own, a counting proxy in front of it, the key gateway in front of
/// that, and queues of its own.
pub struct Stack {
    /// What functions are told by their environment.
    pub config: Config,
    /// The keys of this stack.
    pub keys: Keys,
    /// Counts what reaches PostgREST.
    pub proxy: Proxy,
    /// PostgREST, to be killed and started again.
    pub postgrest: Postgrest,
    /// The queue of calls to make.
    pub dial_queue: Queue,
    /// The queue of events that the database could not take.
    pub intake_queue: Queue,
    /// The queue of recordings to copy.
    pub recording_queue: Queue,
    /// The queue of events to deliver.
    pub event_queue: Queue,
    /// The queue of events for who is slow.
    pub slow_event_queue: Queue,
    /// The owner's connection to the database.
    pub sql: Client,
    /// The database.
    pub database: Database,
    /// Where Storage keeps its objects.
    pub storage: std::path::PathBuf,
    _gateway: Gateway,
    http: reqwest::Client,
}

impl Stack {
    /// Starts one. `supervisor` is [`crate::supervisor_binary`].
    pub async fn start(supervisor: &Path) -> Result<Self> {
        Self::start_with_pool(supervisor, POOL).await
    }

    /// As [`Stack::start`], with so many connections from PostgREST to the database.
    pub async fn start_with_pool(supervisor: &Path, pool: u32) -> Result<Self> {
        let database = Database::migrated(supervisor).await?;
        let binary = install::postgrest(&Progress::hidden()).await?;
        let listening = Listening::bind(None).await?;
        let keys = Keys::generate(&listening.origin_text())?;
        let options = PostgrestOptions { binary, database_url: database.url(Role::Authenticator).to_owned(), pool };
        let folder = &database.attached.folder;
        let (postgrest, dial_queue, intake_queue, recording_queue, event_queue, slow_event_queue, sql) = tokio::try_join!(
            Postgrest::start(&options, &keys, folder, folder),
            Queue::create(&database.attached, "dial"),
            Queue::create(&database.attached, "intake"),
            Queue::create(&database.attached, "recording"),
            Queue::create(&database.attached, "event"),
            Queue::create(&database.attached, "event-slow"),
            database.connect(Role::Owner),
        )?;
        let proxy = Proxy::start(postgrest.url.clone()).await?;
        let origin = listening.origin_text();
        let storage = folder.join(format!("storage-{}", uuid::Uuid::new_v4().simple()));
        let gateway = listening.with_storage(storage.clone()).serve(keys.clone(), proxy.url.clone(), None)?;
        let config = Config::from_vars(
            [
                ("SUPABASE_URL", origin.as_str()),
                ("SUPABASE_PUBLISHABLE_KEY", &keys.publishable_key),
                ("PUBLIC_ORIGIN", PUBLIC_ORIGIN),
                ("SECRET_ARN", "not asked for in process"),
                ("DIAL_QUEUE_URL", &dial_queue.url),
                ("INTAKE_QUEUE_URL", &intake_queue.url),
                ("RECORDING_QUEUE_URL", &recording_queue.url),
                ("EVENT_QUEUE_URL", &event_queue.url),
                ("EVENT_SLOW_QUEUE_URL", &slow_event_queue.url),
                ("AGENT_ORIGINS", &serde_json::json!({ "default": AGENT_ORIGIN }).to_string()),
            ]
            .map(|(name, value)| (name.to_owned(), value.to_owned())),
        )?;
        Ok(Self {
            config,
            keys,
            proxy,
            postgrest,
            dial_queue,
            intake_queue,
            recording_queue,
            event_queue,
            slow_event_queue,
            sql,
            database,
            storage,
            _gateway: gateway,
            http: supabase::http_client()?,
        })
    }

    /// The stack's secret, as functions in process are given it.
    pub fn secrets(&self) -> Result<SecretStore> {
        Ok(SecretStore::fixed(self.keys.secrets()?))
    }

    /// A `webhook-intake` that has not seen an event yet.
    pub fn intake(&self) -> Result<Intake> {
        self.intake_of(self.config.clone())
    }

    /// As [`Stack::intake`], with another configuration.
    pub fn intake_of(&self, config: Config) -> Result<Intake> {
        Ok(Intake::with_secrets(config, self.http.clone(), self.secrets()?))
    }

    /// A `call-dispatch` that has not seen an event yet.
    pub fn dispatch(&self) -> Result<Dispatch> {
        Ok(Dispatch::with_secrets(self.config.clone(), self.http.clone(), self.secrets()?))
    }

    /// A `usage-metering` that has not seen an event yet.
    pub fn metering(&self) -> Result<Metering> {
        Ok(Metering::with_secrets(self.config.clone(), self.http.clone(), self.secrets()?))
    }

    /// An `event-delivery` that has not seen an event yet.
    pub fn delivery(&self) -> Result<Delivery> {
        Ok(Delivery::with_secrets(self.config.clone(), self.http.clone(), self.secrets()?)?)
    }

    /// An `invoice-generation` that has not seen an event yet.
    pub fn invoicing(&self) -> Result<Invoicing> {
        Ok(Invoicing::with_secrets(self.config.clone(), self.http.clone(), self.secrets()?))
    }

    /// Asks `/rest/v1` under a user's token, as a browser does; the status and what came.
    pub async fn rest(&self, jwt: &str, method: &str, path: &str, body: Option<&Value>) -> Result<(StatusCode, Value)> {
        let url = format!("{}/rest/v1/{path}", self.config.supabase_url.as_str().trim_end_matches('/'));
        let mut request = self
            .http
            .request(method.parse()?, url)
            .header("apikey", &self.config.publishable_key)
            .header("prefer", "return=representation")
            .bearer_auth(jwt);
        if let Some(body) = body {
            request = request.json(body);
        }
        let answer = request.send().await?;
        let status = answer.status();
        let text = answer.text().await?;
        Ok((status, serde_json::from_str(&text).unwrap_or(Value::Null)))
    }

    /// Calls a database function under a user's token; fails with what PostgREST answered.
    pub async fn rpc(&self, jwt: &str, function: &str, arguments: &Value) -> Result<Value> {
        let (status, body) = self.rest(jwt, "POST", &format!("rpc/{function}"), Some(arguments)).await?;
        ensure!(status.is_success(), "{function}: {status} {body}");
        Ok(body)
    }

    /// Sets business time, which then runs on; RFC 3339.
    pub async fn set_clock(&self, time: &str) -> Result<()> {
        self.sql
            .batch_execute(&format!(
                "insert into private.clock_offset (shift) values (timestamptz '{time}' - now())
                 on conflict (single) do update set shift = excluded.shift"
            ))
            .await
            .context("the clock")
    }

    /// A single value from the database, as text; null is the empty text.
    pub async fn value(&self, sql: &str) -> Result<String> {
        let column = crate::database::first_column(&self.sql, sql).await?;
        Ok(column.into_iter().next().unwrap_or_default())
    }
}
