//! After a backup was restored: the calls that carriers made since, which the database does not know, are written down before anybody is
//! called again. Does nothing while no restore is open.

use crate::{Dispatch, dial::SealedAccount};
use chrono::{DateTime, TimeDelta, Utc};
use serde::Deserialize;
use serde_json::{Value, json};
use shared::{
    Error, Result,
    telephony::api::{self, Span},
    trigger::Invocation,
};
use std::time::{Duration, Instant};

/// Before the backup, because some carriers keep time in a zone of the account's; a call that is known is left as it is.
const MARGIN_HOURS: i64 = 14;
/// Time that a page and its keeping need.
const RESERVE: Duration = Duration::from_secs(15);

/// An account whose calls are wanted, from a page on.
#[derive(Deserialize)]
struct Wanted {
    since: DateTime<Utc>,
    until: DateTime<Utc>,
    next_page: Option<String>,
    #[serde(flatten)]
    account: SealedAccount,
}

#[derive(Deserialize)]
struct Booked {
    booked: u64,
    done: bool,
}

/// Reads and books for as long as the invocation lasts. Returns how many calls were booked.
pub async fn run(dispatch: &Dispatch, invocation: &Invocation) -> Result<u64> {
    let mut booked = 0;
    while time_is_left(invocation) {
        let claimed: Option<Wanted> = dispatch.supabase.call("claim_restore_page", &json!({ "v": 1 })).await?;
        let Some(mut wanted) = claimed else { break };
        while time_is_left(invocation) {
            match page(dispatch, &mut wanted).await {
                Ok(page) => {
                    booked += page.booked;
                    if page.done {
                        break;
                    }
                }
                Err(error) => {
                    let account = wanted.account.carrier_account_id;
                    tracing::error!(carrier_account_id = %account, error = %error, "calls since the backup could not be read");
                    break;
                }
            }
        }
    }
    if booked > 0 {
        tracing::warn!(booked, "calls since the backup were written down");
    }
    Ok(booked)
}

fn time_is_left(invocation: &Invocation) -> bool {
    invocation.deadline.saturating_duration_since(Instant::now()) > RESERVE
}

async fn page(dispatch: &Dispatch, wanted: &mut Wanted) -> Result<Booked> {
    let secrets = dispatch.secrets.get().await?;
    let (carrier, account) = wanted.account.open(dispatch, &secrets)?;
    let margin = TimeDelta::hours(MARGIN_HOURS);
    let span = Span { since: wanted.since - margin, until: wanted.until + margin };
    let page = api::records(carrier, &dispatch.http, &account, &span, wanted.next_page.as_deref()).await?;
    let page = page.ok_or_else(|| Error::internal("this carrier's records are not read"))?;
    let calls: Vec<Value> = page
        .calls
        .iter()
        .map(|call| {
            let time = |at: &Option<String>| at.as_deref().and_then(|at| at.parse::<DateTime<Utc>>().ok());
            json!({
                "provider_call_id": call.provider_call_id, "from": call.from, "to": call.to, "outcome": call.outcome,
                "started_at": time(&call.started_at), "answered_at": time(&call.answered_at), "ended_at": time(&call.ended_at),
                "duration_seconds": call.duration_seconds, "bill_duration_seconds": call.bill_duration_seconds,
                "cost_micros": call.cost_micros, "cost_currency": call.cost_currency,
            })
        })
        .collect();
    let request = json!({
        "v": 1, "carrier_account_id": wanted.account.carrier_account_id, "calls": calls, "next_page": page.next,
    });
    wanted.next_page = page.next;
    dispatch.supabase.call("book_calls", &request).await
}
