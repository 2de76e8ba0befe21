//! What the outside world tells us: what carriers and other sources send, verified, kept and applied once.
//!
//! One pipeline for all sources: raw body bounded and read once → source resolved from the path → verified in constant time →
//! one database call that stores the raw event under its dedupe key and applies it, in one transaction. When the database does not
//! take it, the event goes to a queue and is drained later; when the queue refuses too, the sender gets 503 and sends again.

mod accounts;
mod buffer;
mod callbacks;
mod manage;
mod pipeline;
mod recordings;
mod sound;
pub mod sources;
mod streams;

use accounts::Accounts;
use http::Method;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use shared::{
    Error, Result,
    config::Config,
    http::{self as web, Request, Response},
    queue::Queues,
    secrets::SecretStore,
    standard_webhooks,
    storage::Storage,
    supabase::{self, Supabase},
    trigger::{Function, Invocation, Message},
};
use std::time::{Duration, Instant};

/// Events that one sweep applies again at most.
const SWEEP_LIMIT: u32 = 200;
/// What one step of retention may take: no other is begun with less left.
const RETENTION_STEP: Duration = Duration::from_secs(10);

/// The function, with its clients built once.
pub struct Intake {
    config: Config,
    secrets: SecretStore,
    supabase: Supabase,
    queues: Queues,
    accounts: Accounts,
    storage: Storage,
    http: reqwest::Client,
}

impl Intake {
    /// Builds the clients; the stack's secret is fetched at the first event.
    pub fn new(config: Config) -> Result<Self> {
        let http = supabase::http_client()?;
        let secrets = SecretStore::new(http.clone(), config.secret_arn.clone());
        Ok(Self::with_secrets(config, http, secrets))
    }

    /// As [`Intake::new`], with an HTTP client and secrets of the caller's.
    pub fn with_secrets(config: Config, http: reqwest::Client, secrets: SecretStore) -> Self {
        let supabase = Supabase::new(&config, http.clone(), secrets.clone());
        let storage = Storage::new(&config, http.clone(), secrets.clone());
        Self { config, secrets, supabase, queues: Queues::default(), accounts: Accounts::default(), storage, http }
    }

    /// Applies again what failed to apply, when it is due, and puts recordings on the queue again that nobody copied.
    async fn sweep(&self) -> Result<Value> {
        #[derive(Deserialize)]
        struct Swept {
            #[serde(flatten)]
            events: Map<String, Value>,
            #[serde(default)]
            recordings: Vec<recordings::Waiting>,
            #[serde(default)]
            deletions: u64,
        }
        let mut swept: Swept = self.supabase.call("sweep_events", &json!({ "v": 1, "limit": SWEEP_LIMIT })).await?;
        if !swept.recordings.is_empty() {
            recordings::announce(self, &swept.recordings).await;
            swept.events.insert("recordings".to_owned(), json!(swept.recordings.len()));
        }
        if swept.deletions > 0 {
            // Storage may be away; what was swept is swept, and the objects are due again.
            match recordings::delete_erased(self).await {
                Ok(gone) => drop(swept.events.insert("deleted".to_owned(), json!(gone))),
                Err(error) => tracing::error!(error = %error, "recordings of erased persons could not be deleted"),
            }
        }
        Ok(Value::Object(swept.events))
    }

    /// Drops what is past its time, and tells a person of rows that no month's partition took.
    async fn retention(&self, invocation: &Invocation) -> Result<Value> {
        let mut done: Value = self.supabase.call("apply_retention", &json!({ "v": 1 })).await?;
        // What goes out is many rows: so many at a time, and what is left when time is short at the next run.
        while done["more"] == true && invocation.deadline.saturating_duration_since(Instant::now()) > RETENTION_STEP {
            done = self.supabase.call("apply_retention", &json!({ "v": 1 })).await?;
        }
        if done["unplaced"].as_object().is_some_and(|unplaced| !unplaced.is_empty()) {
            tracing::error!(unplaced = %done["unplaced"], "rows are in a default partition: no month's partition took them");
        }
        Ok(done)
    }

    async fn nudge(&self, request: &Request) -> Result<Response> {
        let secrets = self.secrets.get().await?;
        let now = chrono::Utc::now().timestamp();
        standard_webhooks::verify(&secrets.nudge_keys, &request.headers, &request.body, now)
            .map_err(|_| Error::bad_signature())?;
        web::json(&self.sweep().await?)
    }
}

impl Function for Intake {
    // What Lambda takes, for the sources that send sound along; the others have their own, smaller limit.
    const BODY_LIMIT: usize = 6 * 1024 * 1024;

    async fn http(&self, request: Request, _: &Invocation) -> Result<Response> {
        let segments = request.segments();
        request.bounded(match segments.as_slice() {
            [name, _] => sources::find(name).map_or(sources::EVENT_LIMIT, |source| source.body_limit()),
            _ => sources::EVENT_LIMIT,
        })?;
        match (&request.method, segments.as_slice()) {
            (&Method::POST, ["nudge"]) => self.nudge(&request).await,
            (&Method::POST, ["leads"]) => sources::leads::receive(self, &request).await,
            (&Method::POST, ["sources"]) => manage::create(self, &request).await,
            (&Method::POST, ["sources", id, "secrets"]) => manage::rotate(self, id, &request).await,
            (&Method::POST, ["calls", id, "recording"]) => recordings::link(self, id, &request).await,
            (_, ["streams", ..]) => streams::route(self, &request, &segments[1..]).await,
            (&Method::POST, [carrier, event, token]) => {
                let callback = sources::carriers::Callback::of(carrier, event, token)?;
                callbacks::receive(self, &callback, &request).await
            }
            (&Method::POST, [name, id]) => match sources::find(name).zip(id.parse().ok()) {
                Some((source, id)) => pipeline::receive(self, source, id, &request).await,
                None => Err(Error::not_found("there is no such source")),
            },
            (_, ["nudge" | "leads" | "sources"] | [_, _] | [_, _, _]) => {
                Err(Error::method_not_allowed(&request.method))
            }
            _ => Err(Error::not_found("there is no such source")),
        }
    }

    async fn messages(&self, batch: Vec<Message>, invocation: &Invocation) -> Vec<String> {
        let (recordings, events): (Vec<_>, Vec<_>) = batch.into_iter().partition(recordings::is_about_one);
        let mut again = recordings::copy(self, recordings, invocation).await;
        again.extend(buffer::drain(self, events, invocation).await);
        again
    }

    async fn job(&self, job: &str, invocation: &Invocation) -> Result<Value> {
        match job {
            "sweep" => self.sweep().await,
            "retention" => self.retention(invocation).await,
            _ => Err(Error::internal(format!("there is no job {job} here"))),
        }
    }
}
