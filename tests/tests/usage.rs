//! What is counted: events of an organization's own systems, each once, and what a user reads of it.

use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use tests::{
    Fingerprint, Stack,
    callbacks::{BUSY, TALKED},
    events::{Answer, HttpEvent},
    proxy::Trouble,
    scene::{self, Tenant},
    supervisor_binary,
};
use usage_metering::Metering;

const EVENTS: &str = "/functions/v1/usage-metering/usage/events";
const USAGE: &str = "/functions/v1/usage-metering/usage";

struct Stand {
    stack: Stack,
    metering: Metering,
    tenant: Tenant,
    key: String,
}

async fn stand() -> Result<Stand> {
    let stack = Stack::start(supervisor_binary!()).await?;
    stack.set_clock(scene::TUESDAY_TEN).await?;
    let tenant = scene::sign_up(&stack, "Acme Homes").await?;
    let key = scene::create_api_key(&stack, &tenant).await?;
    Ok(Stand { metering: stack.metering()?, stack, tenant, key })
}

fn event(id: &str, quantity: i64) -> Value {
    json!({ "specversion": "1.0", "id": id, "source": "crm", "type": "sms_messages", "data": { "quantity": quantity } })
}

impl Stand {
    async fn post(&self, body: &Value) -> Result<Answer> {
        HttpEvent::post(EVENTS).bearer(&self.key).json(body)?.send(&self.metering).await
    }

    /// What was used of a meter, as the tenant's owner reads it; none where the meter is not there.
    async fn used(&self, tenant: &Tenant, meter: &str) -> Result<Option<i64>> {
        let answer = HttpEvent::get(USAGE).bearer(tenant.jwt()).send(&self.metering).await?;
        assert_eq!(answer.status, 200, "{}", answer.body);
        let usage = answer.json();
        assert_eq!(usage["organization_id"], json!(tenant.id));
        let meters = usage["meters"].as_array().context("meters")?;
        Ok(meters.iter().find(|counted| counted["meter"] == meter).and_then(|counted| counted["used"].as_i64()))
    }
}

/// The status of each event of a batch.
fn statuses(answer: &Answer) -> Result<Vec<String>> {
    assert_eq!(answer.status, 200, "{}", answer.body);
    let results = answer.json()["results"].as_array().context("results")?.clone();
    Ok(results.iter().filter_map(|result| result["status"].as_str().map(str::to_owned)).collect())
}

#[tokio::test]
async fn an_event_counts_once_however_often_it_is_sent() -> Result<()> {
    let stand = stand().await?;
    let batch = json!([event("a", 3), event("b", 4)]);
    assert_eq!(statuses(&stand.post(&batch).await?)?, ["stored", "stored"]);
    assert_eq!(stand.used(&stand.tenant, "sms_messages").await?, Some(7));
    let before = Fingerprint::of(&stand.stack.sql).await?;
    assert_eq!(statuses(&stand.post(&batch).await?)?, ["duplicate", "duplicate"]);
    before.assert_same(&Fingerprint::of(&stand.stack.sql).await?);
    Ok(())
}

#[tokio::test]
async fn each_event_of_a_batch_is_judged_alone() -> Result<()> {
    let stand = stand().await?;
    stand.post(&event("old", 1)).await?;
    let timed = |id: &str, time: &str| {
        let mut timed = event(id, 1);
        timed["time"] = json!(time);
        timed
    };
    let mut unknown = event("unknown", 1);
    unknown["type"] = json!("pigeons");
    let mut calls = event("calls", 1);
    calls["type"] = json!("call_seconds");
    let batch = json!([
        event("new", 2),
        event("old", 1),
        event("old", 9),
        event("new", 2),
        unknown,
        calls,
        event("none", 0),
        event("negative", -1),
        timed("early", "2026-11-20T10:00:00+05:30"),
        timed("late", "2031-01-01T00:00:00Z"),
        timed("never", "yesterday"),
        7,
    ]);
    let answer = stand.post(&batch).await?;
    assert_eq!(
        statuses(&answer)?,
        [
            "stored",
            "duplicate",
            "conflict",
            "duplicate",
            "rejected",
            "rejected",
            "rejected",
            "rejected",
            "stored",
            "rejected",
            "rejected",
            "rejected"
        ]
    );
    let codes: Vec<Value> =
        answer.json()["results"].as_array().into_iter().flatten().map(|result| result["code"].clone()).collect();
    let code = |place: usize| codes[place].as_str().unwrap_or_default().to_owned();
    assert_eq!(
        [2, 4, 5, 6, 7, 9, 10].map(code),
        [
            "idempotency_conflict",
            "unknown_type",
            "reserved_type",
            "invalid_quantity",
            "invalid_quantity",
            "time_in_future",
            "invalid_time"
        ]
    );
    // The early one counts in the days before this period.
    assert_eq!(stand.used(&stand.tenant, "sms_messages").await?, Some(1 + 2));
    Ok(())
}

#[tokio::test]
async fn a_single_event_is_answered_as_what_it_is() -> Result<()> {
    let stand = stand().await?;
    assert_eq!(stand.post(&event("a", 3)).await?.json(), json!({ "id": "a", "status": "stored" }));
    assert_eq!(stand.post(&event("a", 3)).await?.json(), json!({ "id": "a", "status": "duplicate" }));
    stand.post(&event("a", 4)).await?.assert_error_at(409, "idempotency_conflict", "id");
    let mut half = event("b", 1);
    half["data"]["quantity"] = json!(1.5);
    stand.post(&half).await?.assert_error_at(422, "invalid_quantity", "data.quantity");
    assert_eq!(stand.used(&stand.tenant, "sms_messages").await?, Some(3));
    Ok(())
}

#[tokio::test]
async fn the_same_event_from_many_senders_at_once_counts_once() -> Result<()> {
    let stand = stand().await?;
    // In opposite orders, so that two batches want the same rows the other way round.
    let forth: Vec<Value> = (0..20).map(|n| event(&format!("e{n}"), 1)).collect();
    let back: Vec<Value> = forth.iter().rev().cloned().collect();
    let bodies: Vec<Value> = (0..10).map(|n| json!(if n % 2 == 0 { &forth } else { &back })).collect();
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    for answer in futures::future::join_all(bodies.iter().map(|body| stand.post(body))).await {
        for status in statuses(&answer?)? {
            *seen.entry(status).or_default() += 1;
        }
    }
    assert_eq!(seen, BTreeMap::from([("stored".to_owned(), 20), ("duplicate".to_owned(), 180)]));
    assert_eq!(stand.used(&stand.tenant, "sms_messages").await?, Some(20));
    Ok(())
}

#[tokio::test]
async fn a_lost_answer_counts_nothing_twice() -> Result<()> {
    let stand = stand().await?;
    stand.stack.proxy.make(Trouble::LoseNextAnswer("/rpc/record_usage"));
    let answer = stand.post(&json!([event("a", 3)])).await?;
    assert!(["stored", "duplicate"].contains(&statuses(&answer)?[0].as_str()));
    assert_eq!(stand.used(&stand.tenant, "sms_messages").await?, Some(3));
    Ok(())
}

#[tokio::test]
async fn without_a_database_the_sender_is_told_to_come_again() -> Result<()> {
    let stand = stand().await?;
    stand.stack.postgrest.kill().await?;
    let request = HttpEvent::post(EVENTS).bearer(&stand.key).json(&json!([event("a", 3)]))?;
    let answer =
        tests::events::invoke_within(&stand.metering, request.payload(), std::time::Duration::from_secs(1)).await?;
    assert_eq!(answer["statusCode"], 503);
    stand.stack.postgrest.restart().await?;
    assert_eq!(statuses(&request.send(&stand.metering).await?)?, ["stored"]);
    assert_eq!(stand.used(&stand.tenant, "sms_messages").await?, Some(3));
    Ok(())
}

#[tokio::test]
async fn a_key_that_is_not_one_is_401_and_stores_nothing() -> Result<()> {
    let stand = stand().await?;
    let revoked = scene::create_api_key(&stand.stack, &stand.tenant).await?;
    stand
        .stack
        .sql
        .execute("update public.api_keys set revoked_at = now() where prefix = $1", &[&&revoked[..12]])
        .await?;
    let mut guessed = stand.key.clone();
    guessed.replace_range(20..21, if &stand.key[20..21] == "0" { "1" } else { "0" });
    let before = Fingerprint::of(&stand.stack.sql).await?;
    for (what, key) in [("revoked", &revoked), ("guessed", &guessed), ("a user's token", &stand.tenant.owner.jwt)] {
        let answer = HttpEvent::post(EVENTS).bearer(key).json(&event("a", 1))?.send(&stand.metering).await?;
        println!("{what}: {}", answer.body);
        answer.assert_error(401, "invalid_api_key");
    }
    HttpEvent::post(EVENTS).json(&event("a", 1))?.send(&stand.metering).await?.assert_error_at(
        401,
        "unauthorized",
        "authorization",
    );
    before.assert_same(&Fingerprint::of(&stand.stack.sql).await?);
    let answer = HttpEvent::post(EVENTS)
        .header("x-api-key", stand.key.clone())
        .json(&event("a", 1))?
        .send(&stand.metering)
        .await?;
    assert_eq!(answer.status, 200, "either header will do: {}", answer.body);
    Ok(())
}

#[tokio::test]
async fn a_key_without_the_scope_is_403() -> Result<()> {
    let stand = stand().await?;
    stand.stack.sql.batch_execute("update public.api_keys set scopes = array['other']").await?;
    let before = Fingerprint::of(&stand.stack.sql).await?;
    stand.post(&event("a", 1)).await?.assert_error(403, "missing_scope");
    before.assert_same(&Fingerprint::of(&stand.stack.sql).await?);
    Ok(())
}

#[tokio::test]
async fn what_is_no_event_says_so() -> Result<()> {
    let stand = stand().await?;
    let before = Fingerprint::of(&stand.stack.sql).await?;
    let raw =
        |body: &str| HttpEvent::post(EVENTS).bearer(&stand.key).header("content-type", "application/json").body(body);
    for body in ["{", "7", "[]", ""] {
        let answer = raw(body).send(&stand.metering).await?;
        println!("{body:?}: {} {}", answer.status, answer.body);
        if !body.is_empty() {
            answer.assert_error_at(400, "malformed_request", "body");
        }
        assert!((400..500).contains(&answer.status));
    }
    let many: Vec<Value> = (0..1_001).map(|n| event(&format!("e{n}"), 1)).collect();
    stand.post(&json!(many)).await?.assert_error_at(413, "too_many_events", "body");
    raw(&" ".repeat(1024 * 1024 + 1)).send(&stand.metering).await?.assert_error_at(413, "body_too_large", "body");
    HttpEvent::new("PUT", EVENTS).send(&stand.metering).await?.assert_error(405, "method_not_allowed");
    before.assert_same(&Fingerprint::of(&stand.stack.sql).await?);
    Ok(())
}

#[tokio::test]
async fn usage_is_the_caller_s_own() -> Result<()> {
    let stand = stand().await?;
    let other = scene::sign_up(&stand.stack, "Other Ltd").await?;
    stand.post(&event("a", 3)).await?;
    assert_eq!(stand.used(&stand.tenant, "sms_messages").await?, Some(3));
    assert_eq!(stand.used(&other, "sms_messages").await?, None);
    assert_eq!(stand.used(&other, "ai_calls").await?, Some(0), "its own plan's meters are there");
    // The same source and id are another event for another organization.
    let key = scene::create_api_key(&stand.stack, &other).await?;
    let answer = HttpEvent::post(EVENTS).bearer(&key).json(&event("a", 5))?.send(&stand.metering).await?;
    assert_eq!(answer.json()["status"], "stored");
    assert_eq!(
        (stand.used(&stand.tenant, "sms_messages").await?, stand.used(&other, "sms_messages").await?),
        (Some(3), Some(5))
    );

    HttpEvent::get(USAGE).send(&stand.metering).await?.assert_error_at(401, "unauthorized", "authorization");
    HttpEvent::get(USAGE).bearer(&stand.key).send(&stand.metering).await?.assert_error(401, "invalid_token");
    let mut expired = stand.stack.keys.user_claims(other.owner.id, &other.owner.email);
    expired.exp -= 2 * 24 * 3_600;
    HttpEvent::get(USAGE)
        .bearer(&stand.stack.keys.sign(&expired)?)
        .send(&stand.metering)
        .await?
        .assert_error(401, "invalid_token");
    Ok(())
}

#[tokio::test]
async fn a_call_counts_with_its_seconds_when_it_ends() -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    let campaign = scene::running_campaign(&stack, &scene::phones(1, 3)).await?;
    let metering = stack.metering()?;
    let usage = async || -> Result<Vec<Value>> {
        let answer = HttpEvent::get(USAGE).bearer(campaign.tenant.jwt()).send(&metering).await?;
        let meters = answer.json()["meters"].as_array().cloned().context("meters")?;
        Ok(meters
            .iter()
            .filter(|meter| ["ai_calls", "call_seconds"].contains(&meter["meter"].as_str().unwrap_or_default()))
            .cloned()
            .collect())
    };
    let figures = |usage: &[Value]| -> Vec<(i64, i64)> {
        usage
            .iter()
            .map(|meter| (meter["used"].as_i64().unwrap_or(-1), meter["reserved"].as_i64().unwrap_or(-1)))
            .collect()
    };
    let calls = campaign.dial(&stack).await?;
    assert_eq!(figures(&usage().await?), [(0, 3), (0, 0)], "a place in the plan is held for each call under way");
    let intake = stack.intake()?;
    for (call, ending) in calls.iter().zip([TALKED, TALKED, BUSY]) {
        campaign.carrier.hangup(call, &ending)?.send(&intake).await?;
    }
    let usage = usage().await?;
    assert_eq!(figures(&usage), [(2, 0), (120, 0)], "two that were talked on, a minute each");
    assert_eq!(
        (&usage[0]["included"], &usage[0]["limit"], &usage[0]["overage"]),
        (&json!(50), &json!(50), &json!(0)),
        "the Free plan"
    );
    Ok(())
}

#[tokio::test]
async fn a_hard_limit_stops_the_dialling() -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    let campaign = scene::running_campaign(&stack, &scene::phones(1, 60)).await?;
    let calls = campaign.dial(&stack).await?;
    assert_eq!(calls.len(), 50, "Free is hard at its fifty calls");
    let read =
        HttpEvent::get(&format!("/functions/v1/call-dispatch/campaigns/{}", campaign.id)).bearer(campaign.tenant.jwt());
    let shown = read.send(&campaign.dispatch).await?.json();
    assert_eq!(shown["waiting"], json!({ "quota_exhausted": 10 }), "{shown:#}");
    // A line that was busy gives its place back.
    campaign.carrier.hangup(&calls[0], &BUSY)?.send(&stack.intake()?).await?;
    stack.set_clock("2026-11-24T10:30:00+05:30").await?;
    assert_eq!(campaign.dial(&stack).await?.len(), 1);
    Ok(())
}
