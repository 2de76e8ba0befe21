//! What we say to the phone network: releases due calls, dials them once, and asks the carrier about those that fell silent.
//!
//! The database decides who may be called and records it before the carrier hears of it; here a decision becomes a request to the
//! carrier, and its answer one of four outcomes.

mod calls;
mod campaigns;
mod dial;
mod reconcile;
mod records;
mod release;
mod restored;

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

/// The function, with its clients built once.
pub struct Dispatch {
    config: Config,
    secrets: SecretStore,
    supabase: Supabase,
    queues: Queues,
    /// Carriers are reached with the same client: it follows no redirect and repeats nothing.
    http: reqwest::Client,
}

impl Dispatch {
    /// Builds the clients; the stack's secret is fetched at the first event.
    pub fn new(config: Config) -> Result<Self> {
        let http = supabase::http_client()?;
        let secrets = SecretStore::new(http.clone(), config.secret_arn.clone());
        Ok(Self::with_secrets(config, http, secrets))
    }

    /// As [`Dispatch::new`], with an HTTP client and secrets of the caller's.
    pub fn with_secrets(config: Config, http: reqwest::Client, secrets: SecretStore) -> Self {
        let supabase = Supabase::new(&config, http.clone(), secrets.clone());
        Self { config, secrets, supabase, queues: Queues::default(), http }
    }

    /// Supabase's database webhook: "look now". Its body says nothing that matters.
    async fn nudge(&self, request: &Request, invocation: &Invocation) -> Result<Response> {
        let secrets = self.secrets.get().await?;
        let now = chrono::Utc::now().timestamp();
        standard_webhooks::verify(&secrets.nudge_keys, &request.headers, &request.body, now)
            .map_err(|_| Error::bad_signature())?;
        web::json(&release::run(self, invocation, false).await?)
    }
}

impl Function for Dispatch {
    async fn http(&self, request: Request, invocation: &Invocation) -> Result<Response> {
        let segments = request.segments();
        match (&request.method, segments.as_slice()) {
            (&Method::POST, ["nudge"]) => self.nudge(&request, invocation).await,
            (_, ["campaigns", ..]) => campaigns::route(self, &request, &segments[1..]).await,
            (_, ["calls", ..]) => calls::route(self, &request, &segments[1..]).await,
            (_, ["nudge"]) => Err(Error::method_not_allowed(&request.method)),
            _ => Err(Error::not_found("there is no such route")),
        }
    }

    async fn messages(&self, batch: Vec<Message>, invocation: &Invocation) -> Vec<String> {
        dial::batch(self, batch, invocation).await
    }

    async fn job(&self, job: &str, invocation: &Invocation) -> Result<Value> {
        match job {
            "release" => release::run(self, invocation, true).await,
            "reconcile" => reconcile::run(self, invocation).await,
            "records" => {
                restored::run(self, invocation).await?;
                records::run(self, invocation).await
            }
            _ => Err(Error::internal(format!("there is no job {job} here"))),
        }
    }
}
