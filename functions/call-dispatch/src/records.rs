//! Truth from the carrier: yesterday's call records of each account, page by page, against what we wrote down.

use crate::{Dispatch, dial::SealedAccount};
use chrono::{DateTime, NaiveDate, TimeDelta, Utc};
use serde::Deserialize;
use serde_json::{Value, json};
use shared::{
    Result,
    telephony::api::{self, Span},
    trigger::Invocation,
};
use std::time::{Duration, Instant};

/// Beyond the day at both ends: some carriers keep time in a zone of the account's, and calls cross midnight.
const MARGIN_HOURS: i64 = 14;
/// Time that a page and its keeping need.
const RESERVE: Duration = Duration::from_secs(15);

/// An account whose records of a day are wanted, from a page on.
#[derive(Deserialize)]
struct Check {
    day: NaiveDate,
    next_page: Option<String>,
    #[serde(flatten)]
    account: SealedAccount,
}

#[derive(Deserialize)]
struct Kept {
    done: bool,
    #[serde(default)]
    differences: u64,
    #[serde(default)]
    corrected: u64,
}

/// Fetches and compares for as long as the invocation lasts; the next one goes on at the page where this one stopped. A carrier that is
/// away is asked again by the next.
pub async fn run(dispatch: &Dispatch, invocation: &Invocation) -> Result<Value> {
    let (mut pages, mut days, mut differences) = (0, 0, 0);
    while time_is_left(invocation) {
        let claimed: Option<Check> = dispatch.supabase.call("claim_carrier_check", &json!({ "v": 1 })).await?;
        let Some(mut check) = claimed else { break };
        while time_is_left(invocation) {
            let kept = match page(dispatch, &mut check).await {
                Ok(kept) => kept,
                Err(error) => {
                    tracing::error!(carrier_account_id = %check.account.carrier_account_id, error = %error, "the records could not be read");
                    break;
                }
            };
            pages += 1;
            if kept.done {
                days += 1;
                differences += kept.differences;
                if kept.differences > 0 {
                    let account = check.account.carrier_account_id;
                    tracing::error!(carrier_account_id = %account, day = %check.day, differences = kept.differences, corrected = kept.corrected, "the carrier's records differ from ours");
                }
                break;
            }
        }
    }
    Ok(json!({ "pages": pages, "days": days, "differences": differences }))
}

fn time_is_left(invocation: &Invocation) -> bool {
    invocation.deadline.saturating_duration_since(Instant::now()) > RESERVE
}

async fn page(dispatch: &Dispatch, check: &mut Check) -> Result<Kept> {
    let secrets = dispatch.secrets.get().await?;
    let (carrier, account) = check.account.open(dispatch, &secrets)?;
    let midnight = check.day.and_time(chrono::NaiveTime::MIN).and_utc();
    let margin = TimeDelta::hours(MARGIN_HOURS);
    let span = Span { since: midnight - margin, until: midnight + TimeDelta::days(1) + margin };
    let page = api::records(carrier, &dispatch.http, &account, &span, check.next_page.as_deref()).await?;
    let page = page.unwrap_or_default();
    let records: Vec<Value> = page
        .calls
        .iter()
        .map(|call| {
            let started: Option<DateTime<Utc>> = call.started_at.as_deref().and_then(|at| at.parse().ok());
            json!({
                "provider_call_id": call.provider_call_id, "started_at": started, "bill_duration_seconds": call.bill_duration_seconds,
                "cost_micros": call.cost_micros, "cost_currency": call.cost_currency,
            })
        })
        .collect();
    let request = json!({
        "v": 1, "carrier_account_id": check.account.carrier_account_id, "day": check.day, "records": records, "next_page": page.next,
    });
    check.next_page = page.next;
    dispatch.supabase.call("store_carrier_records", &request).await
}
