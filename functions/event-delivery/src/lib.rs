//! What we tell the customer's own systems: events from the outbox, signed, sent until they have them.
//!
//! The database decides what is due to whom and records what became of it; here an event becomes a request to an address that
//! somebody else wrote down, and so one that may point anywhere.

pub mod address;
mod deliver;
mod endpoints;
mod sender;

pub use sender::Sender;

use http::Method;
use serde_json::Value;
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
use std::sync::Arc;

/// The function, with its clients built once.
pub struct Delivery {
    config: Config,
    secrets: SecretStore,
    supabase: Supabase,
    queues: Queues,
    sender: Arc<Sender>,
}

impl Delivery {
    /// Builds the clients; the stack's secret is fetched at the first event.
    pub fn new(config: Config) -> Result<Self> {
        let http = supabase::http_client()?;
        let secrets = SecretStore::new(http.clone(), config.secret_arn.clone());
        Self::with_secrets(config, http, secrets)
    }

    /// As [`Delivery::new`], with an HTTP client for our own services and secrets of the caller's.
    pub fn with_secrets(config: Config, http: reqwest::Client, secrets: SecretStore) -> Result<Self> {
        let sender = Arc::new(Sender::new(config.is_local())?);
        let supabase = Supabase::new(&config, http, secrets.clone());
        Ok(Self { config, secrets, supabase, queues: Queues::default(), sender })
    }

    /// With another sender: one whose names resolve as a test wants.
    #[must_use]
    pub fn sending_with(mut self, sender: Sender) -> Self {
        self.sender = Arc::new(sender);
        self
    }

    /// The database's word that there is something to tell. Its body says nothing that matters.
    async fn nudge(&self, request: &Request, invocation: &Invocation) -> Result<Response> {
        let secrets = self.secrets.get().await?;
        let now = chrono::Utc::now().timestamp();
        standard_webhooks::verify(&secrets.nudge_keys, &request.headers, &request.body, now)
            .map_err(|_| Error::bad_signature())?;
        web::json(&deliver::release(self, invocation).await?)
    }
}

impl Function for Delivery {
    async fn http(&self, request: Request, invocation: &Invocation) -> Result<Response> {
        let segments = request.segments();
        match (&request.method, segments.as_slice()) {
            (&Method::POST, ["nudge"]) => self.nudge(&request, invocation).await,
            (_, ["endpoints", ..]) => endpoints::route(self, &request, &segments[1..]).await,
            (_, ["deliveries", ..]) => endpoints::deliveries(self, &request, &segments[1..]).await,
            (_, ["nudge"]) => Err(Error::method_not_allowed(&request.method)),
            _ => Err(Error::not_found("there is no such route")),
        }
    }

    async fn messages(&self, batch: Vec<Message>, invocation: &Invocation) -> Vec<String> {
        deliver::batch(self, batch, invocation).await
    }

    async fn job(&self, job: &str, invocation: &Invocation) -> Result<Value> {
        match job {
            "deliver" => deliver::release(self, invocation).await,
            _ => Err(Error::internal(format!("there is no job {job} here"))),
        }
    }
}
