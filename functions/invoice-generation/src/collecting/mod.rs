//! Collecting: what the database wants of the payment gateways is asked for once, and what they say is written down. The row is there
//! before the gateway hears of it; what was asked and not answered is looked up before anything is sent again.

mod ask;
mod razorpay;
mod stripe;
mod wire;

use crate::Invoicing;
use ask::{Ask, Outcome};
use serde::Deserialize;
use serde_json::{Value, json};
use shared::{
    Error, Result,
    metrics::{self, Metric},
    seal::Sealer,
    secrets::Secrets,
    trigger::Invocation,
};
use std::time::{Duration, Instant};
use tokio::{task::JoinSet, time::timeout};
use uuid::Uuid;
use wire::Wire;

/// Requests that are at the gateways at once.
const BATCH: usize = 8;
/// How long one of them may take, with all that is looked at before.
const LIMIT: Duration = Duration::from_secs(25);
/// What has to be left of an invocation for another batch: its longest request, and what is written down of it.
const ROOM: Duration = Duration::from_secs(32);

#[derive(Deserialize)]
struct Claimed {
    requests: Vec<Ask>,
    more: bool,
}

/// Does what is due, a batch after the other, while there is time: one request to the database before and one after each batch.
pub async fn run(invoicing: &Invoicing, invocation: &Invocation) -> Result<Value> {
    let (mut asked, mut unknown) = (0, 0);
    loop {
        let claimed: Claimed = invoicing.supabase.call("claim_collections", &json!({ "v": 1, "limit": BATCH })).await?;
        let more = claimed.more;
        let outcomes = perform(invoicing, claimed.requests).await?;
        asked += outcomes.len();
        unknown += outcomes.iter().filter(|(_, outcome)| outcome.outcome == "unknown").count();
        if !outcomes.is_empty() {
            record(invoicing, &outcomes, invocation.wait_until()).await?;
        }
        if !more || invocation.deadline.saturating_duration_since(Instant::now()) < ROOM {
            metrics::count(Metric::PaymentsAsked, asked);
            metrics::count(Metric::PaymentsUnknown, unknown);
            tracing::info!(asked, unknown, more, "payments collected");
            return Ok(json!({ "asked": asked, "unknown": unknown, "more": more }));
        }
    }
}

/// Does one thing now, for whoever waits for it. None where somebody else is at it, or it is not its time.
pub async fn run_one(invoicing: &Invoicing, id: Uuid, invocation: &Invocation) -> Result<Option<Value>> {
    let claimed: Claimed = invoicing.supabase.call("claim_collections", &json!({ "v": 1, "id": id })).await?;
    let outcomes = perform(invoicing, claimed.requests).await?;
    let Some((_, outcome)) = outcomes.first() else { return Ok(None) };
    record(invoicing, &outcomes, invocation.wait_until()).await?;
    Ok(Some(json!(outcome)))
}

async fn record(invoicing: &Invoicing, outcomes: &[(Ask, Outcome)], until: Instant) -> Result<()> {
    let results: Vec<Value> = outcomes
        .iter()
        .map(|(ask, outcome)| {
            let mut result = json!(outcome);
            result["id"] = json!(ask.id);
            result["submission"] = json!(ask.submission);
            result
        })
        .collect();
    // The same twice changes nothing, so that it is said until the database has it; if it never has, the rows are looked up.
    let request = json!({ "v": 1, "results": results });
    let _: Value = invoicing.supabase.call_until("record_collections", &request, until).await?;
    Ok(())
}

async fn perform(invoicing: &Invoicing, asks: Vec<Ask>) -> Result<Vec<(Ask, Outcome)>> {
    if asks.is_empty() {
        return Ok(Vec::new());
    }
    let secrets = invoicing.secrets.get().await?;
    let mut running = JoinSet::new();
    for ask in asks {
        let (http, secrets, is_local) = (invoicing.http.clone(), secrets.clone(), invoicing.is_local);
        running.spawn(async move {
            let outcome = match timeout(LIMIT, one(&http, &secrets, is_local, &ask)).await {
                Ok(Ok(outcome)) => outcome,
                // Nothing was sent: the account is to be mended, and the request waits for it.
                Ok(Err(error)) => {
                    tracing::error!(request_id = %ask.id, gateway = ask.gateway, %error, "the gateway cannot be asked");
                    Outcome::coded("deferred", error.code)
                }
                Err(_) => Outcome::coded("unknown", "timeout"),
            };
            let (kind, code) = (ask.kind, outcome.code.as_deref());
            match outcome.outcome {
                "unknown" | "refused" => {
                    tracing::warn!(request_id = %ask.id, gateway = ask.gateway, ?kind, outcome = outcome.outcome, code, "asked")
                }
                other => tracing::debug!(request_id = %ask.id, ?kind, outcome = other, code, "asked"),
            }
            (ask, outcome)
        });
    }
    Ok(running.join_all().await)
}

async fn one(http: &reqwest::Client, secrets: &Secrets, is_local: bool, ask: &Ask) -> Result<Outcome> {
    let account = &ask.account;
    let opened = Sealer::new(&secrets.seal_keys)?.open(&account.credentials_sealed, &account.id.to_string())?;
    let secret = |name: &str| wire::secret(&opened, name);
    match ask.gateway.as_str() {
        "stripe" => {
            let credentials = (secret("secret_key")?, String::new());
            let wire = Wire::new(http, &account.api_base, stripe::HOSTS, credentials, is_local)?;
            Ok(stripe::perform(&wire, ask).await)
        }
        "razorpay" => {
            let credentials = (secret("key_id")?, secret("key_secret")?);
            let wire = Wire::new(http, &account.api_base, razorpay::HOSTS, credentials, is_local)?;
            Ok(razorpay::perform(&wire, ask).await)
        }
        other => Err(Error::internal(format!("there is no gateway {other} here"))),
    }
}
