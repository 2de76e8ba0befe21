//! What is billed: closes ended billing periods, and gives organizations their invoices and credit notes as JSON, page and PDF, and in
//! the forms that an accountant needs; takes what they want of their subscription; and has the payment gateways
//! collect what is due.
//!
//! The database closes a period and makes its invoice in one transaction; here is only who asks it to, and how a document looks.

mod collecting;
mod document;
mod documents;
mod export;
mod payments;
mod run;
mod subscriptions;

use documents::Shelf;

use http::Method;
use serde_json::Value;
use shared::{
    Error, Result,
    config::Config,
    http::{self as web, Request, Response},
    secrets::SecretStore,
    standard_webhooks,
    supabase::{self, Supabase},
    trigger::{Function, Invocation},
};

/// The function, with its clients built once.
pub struct Invoicing {
    secrets: SecretStore,
    supabase: Supabase,
    public_origin: String,
    /// Payment gateways are reached with the same client: it follows no redirect and repeats nothing.
    http: reqwest::Client,
    is_local: bool,
}

impl Invoicing {
    /// Builds the clients; the stack's secret is fetched at the first event that needs it.
    pub fn new(config: Config) -> Result<Self> {
        let http = supabase::http_client()?;
        let secrets = SecretStore::new(http.clone(), config.secret_arn.clone());
        Ok(Self::with_secrets(config, http, secrets))
    }

    /// As [`Invoicing::new`], with an HTTP client and secrets of the caller's.
    pub fn with_secrets(config: Config, http: reqwest::Client, secrets: SecretStore) -> Self {
        let supabase = Supabase::new(&config, http.clone(), secrets.clone());
        let is_local = config.is_local();
        Self { secrets, supabase, public_origin: config.public_origin, http, is_local }
    }

    /// Supabase's database webhook: "look now". Its body says nothing that matters.
    async fn nudge(&self, request: &Request, invocation: &Invocation) -> Result<Response> {
        let secrets = self.secrets.get().await?;
        let now = chrono::Utc::now().timestamp();
        standard_webhooks::verify(&secrets.nudge_keys, &request.headers, &request.body, now)
            .map_err(|_| Error::bad_signature())?;
        web::json(&run::close_periods(&self.supabase, invocation).await?)
    }
}

impl Function for Invoicing {
    async fn http(&self, request: Request, invocation: &Invocation) -> Result<Response> {
        let segments = request.segments();
        match (&request.method, segments.as_slice()) {
            (&Method::GET, ["invoices"]) => documents::list(self, &request, Shelf::Invoices).await,
            (&Method::GET, ["credit-notes"]) => documents::list(self, &request, Shelf::CreditNotes).await,
            (&Method::GET, ["invoices", "export.csv"]) => export::csv(self, &request, "export_invoices").await,
            (&Method::GET, ["invoices", "lines.csv"]) => export::csv(self, &request, "export_invoice_lines").await,
            (&Method::GET, ["invoices", "payments.csv"]) => export::csv(self, &request, "export_payments").await,
            (&Method::GET, ["invoices", "gstr1.json"]) => export::gstr1(self, &request).await,
            (&Method::GET, ["invoices", id, "lines", line, "calls.csv"]) => {
                export::calls(self, &request, id, line).await
            }
            (&Method::POST, ["invoices", "preview"]) => documents::preview(self, &request).await,
            (&Method::POST, ["invoices", id, "link"]) => documents::link(self, &request, Shelf::Invoices, id).await,
            (&Method::POST, ["invoices", id, "payment-link"]) => payments::link(self, &request, id, invocation).await,
            (&Method::POST, ["invoices", id, "collect"]) => payments::collect(self, &request, id, invocation).await,
            (&Method::GET, ["payment-methods"]) => payments::list(self, &request).await,
            (&Method::POST, ["payment-methods"]) => payments::save(self, &request, invocation).await,
            (&Method::DELETE, ["payment-methods", id]) => payments::forget(self, &request, id, invocation).await,
            (&Method::POST, ["credit-notes", id, "link"]) => {
                documents::link(self, &request, Shelf::CreditNotes, id).await
            }
            (&Method::GET, ["invoices", name]) => documents::show(self, &request, Shelf::Invoices, name).await,
            (&Method::GET, ["credit-notes", name]) => documents::show(self, &request, Shelf::CreditNotes, name).await,
            (&Method::GET, ["subscriptions"]) => subscriptions::show(self, &request).await,
            (&Method::POST, ["subscriptions", action]) => subscriptions::act(self, &request, action).await,
            (&Method::POST, ["nudge"]) => self.nudge(&request, invocation).await,
            (
                _,
                ["invoices" | "credit-notes"]
                | ["invoices" | "credit-notes", _]
                | ["invoices" | "credit-notes", _, "link"]
                | ["invoices", _, "lines", _, "calls.csv"]
                | ["invoices", _, "payment-link" | "collect"]
                | ["payment-methods"]
                | ["payment-methods", _]
                | ["subscriptions"]
                | ["subscriptions", "change" | "cancel" | "pause" | "resume" | "coupon"]
                | ["nudge"],
            ) => Err(Error::method_not_allowed(&request.method)),
            _ => Err(Error::not_found("there is no such route")),
        }
    }

    async fn job(&self, job: &str, invocation: &Invocation) -> Result<Value> {
        match job {
            "close_periods" => run::close_periods(&self.supabase, invocation).await,
            "collect" => collecting::run(self, invocation).await,
            _ => Err(Error::internal(format!("there is no job {job} here"))),
        }
    }
}
