//! The reconciler: attempts that fell silent are asked for at the carrier, and what it says goes the way of a callback.

use crate::{Dispatch, dial};
use chrono::{DateTime, TimeDelta, Utc};
use serde::Deserialize;
use serde_json::{Value, json};
use shared::{
    Result,
    queue::{IntakeMessage, Outgoing, VERSION},
    telephony::{CallReport, CallStatus, Lookup, Outcome},
    trigger::Invocation,
};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Attempts a tick.
const LIMIT: u32 = 50;
/// After this long, a call that the carrier does not know of was never made.
const LOST_AFTER_SECONDS: i64 = 600;

/// By how much the carrier's clock may be behind ours.
const CLOCK_DIFFERENCE_SECONDS: i64 = 30;

#[derive(Deserialize)]
struct Claimed {
    attempts: Vec<Silent>,
}

/// An attempt whose lease ran out.
#[derive(Deserialize)]
struct Silent {
    attempt_id: Uuid,
    organization_id: Uuid,
    carrier_account_id: Uuid,
    account_sid: String,
    #[serde(alias = "auth_token_sealed")]
    credentials_sealed: String,
    api_base: String,
    provider_call_id: Option<String>,
    from: String,
    to: String,
    age_seconds: i64,
}

/// Asks for what fell silent: one request to the database, one or two to the carrier an attempt. Returns how many were asked for and
/// how many had news.
pub async fn run(dispatch: &Dispatch, invocation: &Invocation) -> Result<Value> {
    let claimed: Claimed = dispatch.supabase.call("reconcile_calls", &json!({ "v": 1, "limit": LIMIT })).await?;
    let mut news = Vec::new();
    for silent in &claimed.attempts {
        // What is left over is claimed again when its lease runs out.
        if invocation.deadline.saturating_duration_since(Instant::now()) < Duration::from_secs(12) {
            break;
        }
        match ask(dispatch, silent).await {
            Ok(Some(call)) => news.push(message(silent, call)?),
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(attempt_id = %silent.attempt_id, error = %error, "the carrier could not be asked")
            }
        }
    }
    if !news.is_empty() {
        let refused = dispatch.queues.send(&dispatch.config, "intake", &news).await?;
        tracing::info!(asked = claimed.attempts.len(), news = news.len(), unsent = refused.len(), "reconciled");
    }
    Ok(json!({ "asked": claimed.attempts.len(), "news": news.len() }))
}

async fn ask(dispatch: &Dispatch, silent: &Silent) -> Result<Option<CallReport>> {
    let secrets = dispatch.secrets.get().await?;
    let account = dial::account(
        dispatch,
        &secrets,
        &silent.carrier_account_id,
        &silent.account_sid,
        &silent.credentials_sealed,
        &silent.api_base,
    )?;
    let found = account
        .look_up(&dispatch.http, silent.provider_call_id.as_deref(), &silent.from, &silent.to)
        .await
        .map_err(shared::Error::unavailable)?;
    Ok(match found {
        Lookup::Live(call) | Lookup::Ended(call) if is_this(silent, &call, Utc::now()) => Some(call),
        Lookup::Live(_) | Lookup::Ended(_) | Lookup::NotFound if silent.age_seconds < LOST_AFTER_SECONDS => None,
        _ => Some(CallReport {
            provider_call_id: silent.provider_call_id.clone(),
            status: Some(CallStatus::Ended),
            outcome: Some(Outcome::Lost),
            ..CallReport::default()
        }),
    })
}

/// Whether a call that was found by its numbers is the attempt's: an earlier call to the same callee is not. By its id it always is.
fn is_this(silent: &Silent, call: &CallReport, now: DateTime<Utc>) -> bool {
    let since = now - TimeDelta::seconds(silent.age_seconds + CLOCK_DIFFERENCE_SECONDS);
    let started = call.started_at.as_deref().and_then(|at| DateTime::parse_from_rfc3339(at).ok());
    silent.provider_call_id.is_some() || started.is_some_and(|at| at >= since)
}

fn message(silent: &Silent, call: CallReport) -> Result<Outgoing> {
    let state = call.outcome.map_or_else(|| json!(call.status), |outcome| json!(outcome));
    let report = IntakeMessage::Report {
        v: VERSION,
        source_id: silent.carrier_account_id,
        attempt_id: silent.attempt_id,
        dedupe_key: format!("{}|{}", silent.attempt_id, state.as_str().unwrap_or("unknown")),
        call: Box::new(call),
    };
    Ok(Outgoing { group: silent.organization_id.to_string(), body: report.to_json()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_earlier_call_to_the_same_callee_is_not_this_attempt() {
        let now = Utc::now();
        let silent = |provider_call_id: Option<&str>| Silent {
            attempt_id: Uuid::nil(),
            organization_id: Uuid::nil(),
            carrier_account_id: Uuid::nil(),
            account_sid: String::new(),
            credentials_sealed: String::new(),
            api_base: String::new(),
            provider_call_id: provider_call_id.map(str::to_owned),
            from: String::new(),
            to: String::new(),
            age_seconds: 60,
        };
        let call = |seconds_ago: i64| CallReport {
            started_at: Some((now - TimeDelta::seconds(seconds_ago)).to_rfc3339()),
            ..CallReport::default()
        };
        assert!(is_this(&silent(None), &call(55), now));
        assert!(!is_this(&silent(None), &call(3_600), now));
        assert!(!is_this(&silent(None), &CallReport::default(), now), "a time without a zone proves nothing");
        assert!(is_this(&silent(Some("u")), &call(3_600), now));
    }
}
