//! What the outside world tells us: carriers' callbacks, verified, kept and applied once.
//!
//! One pipeline for all sources: raw body bounded and read once → source resolved from the path → verified in constant time →
//! one database call that stores the raw event under its dedupe key and applies it, in one transaction. When the database does not
//! take it, the event goes to a queue and is drained later; when the queue refuses too, the sender gets 503 and sends again.

mod accounts;
mod buffer;
mod pipeline;
mod sources;

use accounts::Accounts;
use http::Method;
use serde_json::{Value, json};
use shared::{
    Error, Result,
    config::Config,
    http::{self as web, Request, Response},
    queue::Queues,
    secrets::SecretStore,
    standard_webhooks,
    supabase::{self, Supabase},
    trigger::{Function, Invocation, Message},
};

/// Events that one sweep applies again at most.
const SWEEP_LIMIT: u32 = 200;

/// The function, with its clients built once.
pub struct Intake {
    config: Config,
    secrets: SecretStore,
    supabase: Supabase,
    queues: Queues,
    accounts: Accounts,
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
        let supabase = Supabase::new(&config, http, secrets.clone());
        Self { config, secrets, supabase, queues: Queues::default(), accounts: Accounts::default() }
    }

    /// Applies again what failed to apply, when it is due.
    async fn sweep(&self) -> Result<Value> {
        self.supabase.call("sweep_events", &json!({ "v": 1, "limit": SWEEP_LIMIT })).await
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
    // The buffer carries the raw body, base64, in one SQS message of at most 1 MiB.
    const BODY_LIMIT: usize = 512 * 1024;

    async fn http(&self, request: Request, _: &Invocation) -> Result<Response> {
        let segments = request.segments();
        match (&request.method, segments.as_slice()) {
            (&Method::POST, ["nudge"]) => self.nudge(&request).await,
            (&Method::POST, [carrier, event, token]) => {
                let callback = sources::carriers::Callback::of(carrier, event, token)?;
                pipeline::receive(self, &callback, &request).await
            }
            (_, ["nudge"] | [_, _, _]) => Err(Error::method_not_allowed(&request.method)),
            _ => Err(Error::not_found("there is no such source")),
        }
    }

    async fn messages(&self, batch: Vec<Message>, invocation: &Invocation) -> Vec<String> {
        buffer::drain(self, batch, invocation).await
    }

    async fn job(&self, job: &str, _: &Invocation) -> Result<Value> {
        match job {
            "sweep" => self.sweep().await,
            _ => Err(Error::internal(format!("there is no job {job} here"))),
        }
    }
}
