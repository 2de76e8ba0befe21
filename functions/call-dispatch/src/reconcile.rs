//! The reconciler: attempts that fell silent are asked for at the carrier, and what it says goes the way of a callback.

use crate::{Dispatch, dial::SealedAccount};
use chrono::{TimeDelta, Utc};
use serde::Deserialize;
use serde_json::{Value, json};
use shared::{
    Result,
    metrics::{self, Metric},
    queue::{IntakeMessage, Outgoing, VERSION},
    telephony::{
        CallReport, CallStatus, Lookup, Outcome,
        api::{self, Wanted},
    },
    trigger::Invocation,
};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Attempts a tick.
const LIMIT: u32 = 50;
/// After this long, a call that the carrier does not know of was never made.
const LOST_AFTER_SECONDS: i64 = 600;
/// After this long, a person has to look at a call that nobody can ask for.
const STUCK_AFTER_SECONDS: i64 = 1_800;

/// By how much the carrier's clock may be behind ours.
const CLOCK_DIFFERENCE_SECONDS: i64 = 30;

#[derive(Deserialize)]
struct Claimed {
    attempts: Vec<Silent>,
    /// Calls that go on though the socket of their agent is gone.
    #[serde(default)]
    agentless: Vec<Value>,
}

/// An attempt whose lease ran out.
#[derive(Deserialize)]
struct Silent {
    attempt_id: Uuid,
    organization_id: Uuid,
    #[serde(flatten)]
    account: SealedAccount,
    provider_call_id: Option<String>,
    from: String,
    to: String,
    /// Of one that has `ended` only its seconds are not known.
    #[serde(default)]
    status: String,
    age_seconds: i64,
    /// The carrier's ids of other calls to that number.
    #[serde(default)]
    others: Vec<String>,
}

/// Asks for what fell silent: one request to the database, one or two to the carrier an attempt. Returns how many were asked for and
/// how many had news.
pub async fn run(dispatch: &Dispatch, invocation: &Invocation) -> Result<Value> {
    let claimed: Claimed = dispatch.supabase.call("reconcile_calls", &json!({ "v": 1, "limit": LIMIT })).await?;
    metrics::count(Metric::AttemptsSilent, claimed.attempts.len());
    for call in &claimed.agentless {
        tracing::warn!(attempt_id = call["attempt_id"].as_str(), "a call goes on without its agent");
    }
    let mut news = Vec::new();
    let mut stuck = 0;
    for silent in &claimed.attempts {
        let is_old = silent.age_seconds >= STUCK_AFTER_SECONDS && silent.status != "ended";
        // What is left over is claimed again when its lease runs out.
        if invocation.deadline.saturating_duration_since(Instant::now()) < Duration::from_secs(12) {
            stuck += usize::from(is_old);
            continue;
        }
        match ask(dispatch, silent).await {
            Ok(Some(call)) => news.push(message(silent, call)?),
            Ok(None) => {}
            Err(error) => {
                stuck += usize::from(is_old);
                tracing::warn!(attempt_id = %silent.attempt_id, error = %error, "the carrier could not be asked")
            }
        }
    }
    metrics::count(Metric::AttemptsStuck, stuck);
    if !news.is_empty() {
        let refused = dispatch.queues.send(&dispatch.config, "intake", &news).await?;
        tracing::info!(asked = claimed.attempts.len(), news = news.len(), unsent = refused.len(), "reconciled");
    }
    Ok(json!({ "asked": claimed.attempts.len(), "news": news.len() }))
}

async fn ask(dispatch: &Dispatch, silent: &Silent) -> Result<Option<CallReport>> {
    let secrets = dispatch.secrets.get().await?;
    let (carrier, account) = silent.account.open(dispatch, &secrets)?;
    let wanted = Wanted {
        attempt_id: silent.attempt_id,
        provider_call_id: silent.provider_call_id.as_deref(),
        from: &silent.from,
        to: &silent.to,
        since: Utc::now() - TimeDelta::seconds(silent.age_seconds + CLOCK_DIFFERENCE_SECONDS),
        others: &silent.others,
    };
    Ok(match api::look_up(carrier, &dispatch.http, &account, &wanted).await? {
        Lookup::Live(call) | Lookup::Ended(call) => Some(call),
        // That it was is known.
        Lookup::NotFound if silent.status == "ended" => None,
        Lookup::NotFound if silent.age_seconds < LOST_AFTER_SECONDS => None,
        Lookup::NotFound => Some(CallReport {
            provider_call_id: silent.provider_call_id.clone(),
            status: Some(CallStatus::Ended),
            outcome: Some(Outcome::Lost),
            ..CallReport::default()
        }),
    })
}

fn message(silent: &Silent, call: CallReport) -> Result<Outgoing> {
    let state = call.outcome.map_or_else(|| json!(call.status), |outcome| json!(outcome));
    let report = IntakeMessage::Report {
        v: VERSION,
        source_id: silent.account.carrier_account_id,
        attempt_id: silent.attempt_id,
        dedupe_key: format!("{}|{}", silent.attempt_id, state.as_str().unwrap_or("unknown")),
        call: Box::new(call),
    };
    Ok(Outgoing { group: silent.organization_id.to_string(), body: report.to_json()? })
}
