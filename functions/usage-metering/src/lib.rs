//! What is counted: usage events that organizations' own systems report, and what an organization has used.
//!
//! Calls are not counted here: the database counts each one in the transaction that ends it.

mod credit;
mod holds;
mod ingest;
mod link;
mod page;
mod reconcile;
mod usage;

use http::Method;
use serde_json::{Value, json};
use shared::{
    Error, Result,
    config::Config,
    http::{self as web, Request, Response},
    secrets::SecretStore,
    standard_webhooks,
    supabase::{self, Supabase},
    trigger::{Function, Invocation, Message},
};

/// The function, with its clients built once.
pub struct Metering {
    secrets: SecretStore,
    supabase: Supabase,
    public_origin: String,
}

impl Metering {
    /// Builds the clients; the stack's secret is fetched at the first event that needs it.
    pub fn new(config: Config) -> Result<Self> {
        let http = supabase::http_client()?;
        let secrets = SecretStore::new(http.clone(), config.secret_arn.clone());
        Ok(Self::with_secrets(config, http, secrets))
    }

    /// As [`Metering::new`], with an HTTP client and secrets of the caller's.
    pub fn with_secrets(config: Config, http: reqwest::Client, secrets: SecretStore) -> Self {
        let supabase = Supabase::new(&config, http, secrets.clone());
        Self { secrets, supabase, public_origin: config.public_origin }
    }

    /// Every function takes a nudge; this one keeps no work that could be due.
    async fn nudge(&self, request: &Request) -> Result<Response> {
        let secrets = self.secrets.get().await?;
        let now = chrono::Utc::now().timestamp();
        standard_webhooks::verify(&secrets.nudge_keys, &request.headers, &request.body, now)
            .map_err(|_| Error::bad_signature())?;
        web::json(&json!({ "due": 0 }))
    }
}

impl Function for Metering {
    async fn http(&self, request: Request, invocation: &Invocation) -> Result<Response> {
        let segments = request.segments();
        match (&request.method, segments.as_slice()) {
            (&Method::POST, ["usage", "events"]) => ingest::receive(self, &request, invocation).await,
            (&Method::POST, ["usage", "holds"]) => holds::hold(self, &request, invocation).await,
            (&Method::POST, ["usage", "holds", "release"]) => holds::release(self, &request, invocation).await,
            (&Method::POST, ["usage", "link"]) => link::make(self, &request).await,
            (&Method::GET, ["usage"]) => usage::current(self, &request).await,
            (&Method::GET, ["usage.html"]) => usage::page(self, &request).await,
            (&Method::GET, ["usage", "daily"]) => usage::daily(self, &request, false).await,
            (&Method::GET, ["usage", "daily.csv"]) => usage::daily(self, &request, true).await,
            (&Method::POST, ["nudge"]) => self.nudge(&request).await,
            (
                _,
                ["usage", "events" | "holds" | "link" | "daily" | "daily.csv"]
                | ["usage", "holds", "release"]
                | ["usage" | "usage.html"]
                | ["nudge"],
            ) => Err(Error::method_not_allowed(&request.method)),
            (&Method::GET, ["usage", name]) if name.ends_with(".html") => link::open(self, &request, name).await,
            _ => Err(Error::not_found("there is no such route")),
        }
    }

    async fn messages(&self, batch: Vec<Message>, invocation: &Invocation) -> Vec<String> {
        ingest::drain(self, batch, invocation).await
    }

    async fn job(&self, job: &str, invocation: &Invocation) -> Result<Value> {
        match job {
            "renew_credit" => credit::renew(self, invocation).await,
            "expire_holds" => holds::expire(self, invocation).await,
            "reconcile_usage" => reconcile::run(self, invocation).await,
            _ => Err(Error::internal(format!("there is no job {job} here"))),
        }
    }
}
