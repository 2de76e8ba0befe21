//! From a due lead to a call at the carrier: released, queued, dialled once.

mod agent;
mod calls;
mod campaigns;
mod carriers;
mod never_twice;
mod nudges;
mod records;
mod troubles;

use anyhow::{Context, Result};
use call_dispatch::Dispatch;
use serde_json::{Value, json};
use shared::standard_webhooks;
use std::{collections::BTreeSet, time::Duration};
use tests::{
    Fingerprint, Stack,
    callbacks::{TALKED, token_of},
    carrier::{Create, Reaction},
    events::{self, HttpEvent},
    proxy::Trouble,
    queues::{self, hand_over},
    scene::{self, Campaign, campaign_action, phones},
    supervisor_binary,
};
use uuid::Uuid;

async fn running(count: u32) -> Result<(Stack, Campaign)> {
    let stack = Stack::start(supervisor_binary!()).await?;
    let campaign = scene::running_campaign(&stack, &phones(1, count)).await?;
    Ok((stack, campaign))
}

/// What the database says of the attempts at a number, oldest first.
async fn attempts(stack: &Stack, phone: &str) -> Result<Vec<Value>> {
    let rows = stack
        .sql
        .query(
            "select to_jsonb(log) from public.call_logs as log where callee_number = $1 order by attempt_no",
            &[&phone],
        )
        .await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// The queue's row for a number: status, attempts that counted, and seconds until it is due.
async fn waiting(stack: &Stack, phone: &str) -> Result<(String, i16, f64)> {
    let row = stack
        .sql
        .query_one(
            "select q.status::text, q.attempt_count, extract(epoch from q.next_retry_at - private.clock_now())::float8
             from public.call_queue as q join public.leads as l on l.id = q.lead_id where l.phone = $1",
            &[&phone],
        )
        .await?;
    Ok((row.get(0), row.get(1), row.get(2)))
}

async fn release(dispatch: &Dispatch) -> Result<Value> {
    events::job(dispatch, "release").await
}

fn callees(creates: &[Create]) -> BTreeSet<String> {
    creates.iter().map(|create| create.to.clone()).collect()
}

#[tokio::test]
async fn what_is_due_is_released_queued_and_dialled() -> Result<()> {
    let (stack, campaign) = running(12).await?;
    assert_eq!(release(&campaign.dispatch).await?, json!({ "sent": 12, "unsent": 0 }));
    assert_eq!(stack.dial_queue.waiting().await?, 12);
    assert_eq!(campaign.carrier.creates().len(), 0, "the carrier hears of nothing before it is written down");
    assert_eq!(stack.value("select count(*) from public.call_logs where status = 'created'").await?, "12");

    let delivered = stack.dial_queue.deliver(&campaign.dispatch).await?;
    assert_eq!((delivered.messages, delivered.failed), (12, 0));
    let creates = campaign.carrier.creates();
    assert_eq!(callees(&creates), phones(1, 12).into_iter().collect());
    let secrets = stack.keys.secrets()?;
    for create in &creates {
        let rows = attempts(&stack, &create.to).await?;
        let token = token_of(create, &secrets)?;
        assert_eq!(rows.len(), 1);
        assert_eq!(rows[0]["id"], json!(token.attempt_id));
        assert_eq!((&rows[0]["status"], &rows[0]["call_sid"]), (&json!("queued"), &json!(create.call_uuid)));
        assert_eq!((&rows[0]["dialled"], rows[0]["submitted_at"].is_string()), (&json!(true), true));
        for url in [&create.ring_url, &create.answer_url, &create.hangup_url] {
            assert!(
                url.starts_with("https://calls.example.com/functions/v1/webhook-intake/plivo/") && !url.contains('?'),
                "{url}"
            );
        }
        assert_eq!(token.carrier_account_id, campaign.account);
    }
    assert_eq!(release(&campaign.dispatch).await?, json!({ "sent": 0, "unsent": 0 }), "nobody is due twice");
    Ok(())
}

#[tokio::test]
async fn the_same_message_again_dials_nobody_again() -> Result<()> {
    let (stack, campaign) = running(3).await?;
    release(&campaign.dispatch).await?;
    let messages = stack.dial_queue.receive().await?;
    assert_eq!(messages.len(), 3);
    assert!(hand_over(&campaign.dispatch, &messages).await?.is_empty());
    // While it is under way, when it is known to the carrier, and when it is over.
    assert!(hand_over(&stack.dispatch()?, &messages).await?.is_empty());
    for call in campaign.carrier.creates() {
        campaign.carrier.hangup(&call, &TALKED)?.send(&stack.intake()?).await?;
    }
    assert!(hand_over(&campaign.dispatch, &messages).await?.is_empty());
    assert_eq!(campaign.carrier.creates().len(), 3);
    Ok(())
}

#[tokio::test]
async fn two_handlers_with_the_same_batch_at_once_make_one_call_each() -> Result<()> {
    let (stack, campaign) = running(8).await?;
    for phone in phones(1, 8) {
        campaign.carrier.react(&phone, Reaction::AcceptAfter(Duration::from_millis(200)));
    }
    release(&campaign.dispatch).await?;
    let messages = stack.dial_queue.receive().await?;
    let handlers = [stack.dispatch()?, stack.dispatch()?, stack.dispatch()?];
    for failed in futures::future::join_all(handlers.iter().map(|handler| hand_over(handler, &messages))).await {
        assert!(failed?.is_empty());
    }
    let creates = campaign.carrier.creates();
    assert_eq!((creates.len(), callees(&creates).len()), (8, 8));
    Ok(())
}

#[tokio::test]
async fn two_releases_at_once_hand_each_attempt_out_once() -> Result<()> {
    let (stack, campaign) = running(30).await?;
    let (one, other) = (stack.dispatch()?, stack.dispatch()?);
    let (one, other) = tokio::join!(release(&one), release(&other));
    let sent = one?["sent"].as_u64().unwrap_or_default() + other?["sent"].as_u64().unwrap_or_default();
    assert_eq!(sent, 30);
    assert_eq!(
        stack.value("select count(*) || ' ' || count(distinct callee_number) from public.call_logs").await?,
        "30 30"
    );
    stack.dial_queue.deliver(&campaign.dispatch).await?;
    assert_eq!(campaign.carrier.creates().len(), 30);
    Ok(())
}

#[tokio::test]
async fn each_answer_of_the_carrier_has_its_outcome() -> Result<()> {
    let (stack, campaign) = running(5).await?;
    let phones = phones(1, 5);
    for (phone, reaction) in phones.iter().zip([
        Reaction::Accept,
        Reaction::Refuse(400, "to number is invalid"),
        Reaction::Refuse(401, "no"),
        Reaction::Defer(300),
        Reaction::CutOff,
    ]) {
        campaign.carrier.react(phone, reaction);
    }
    campaign.dial(&stack).await?;
    let mut rows = Vec::new();
    for phone in &phones {
        let attempts = attempts(&stack, phone).await?;
        assert_eq!(attempts.len(), 1, "{phone}");
        rows.push(
            ["status", "call_status", "dialled", "call_sid", "hangup_cause_code"].map(|key| attempts[0][key].clone()),
        );
    }
    let accepted =
        campaign.carrier.creates().into_iter().find(|create| create.to == phones[0]).context("not dialled")?;
    let null = Value::Null;
    assert_eq!(rows[0], [json!("queued"), null.clone(), json!(true), json!(accepted.call_uuid), null.clone()]);
    assert_eq!(rows[1], [json!("ended"), json!("invalid_number"), json!(false), null.clone(), json!("400")]);
    assert_eq!(rows[2], [json!("ended"), json!("config"), json!(false), null.clone(), json!("401")]);
    assert_eq!(rows[3], [json!("ended"), json!("capacity"), json!(false), null.clone(), json!("429")]);
    assert_eq!(rows[4], [json!("submission_unknown"), null.clone(), json!(true), null.clone(), null]);

    let (status, counted, due) = waiting(&stack, &phones[3]).await?;
    assert_eq!((status.as_str(), counted), ("queued", 0), "want of capacity is no attempt");
    assert!((240.0..=360.0).contains(&due), "due in {due} s, as the carrier said");
    for phone in &phones[1..3] {
        assert_eq!(waiting(&stack, phone).await?.0, "failed", "{phone}");
    }
    // What may have been dialled keeps its place, and is not dialled again: neither by its message nor by a release.
    assert_eq!(waiting(&stack, &phones[4]).await?.0, "processing");
    campaign.dial(&stack).await?;
    assert_eq!(campaign.carrier.creates().len(), 5);
    Ok(())
}

#[tokio::test]
async fn a_host_that_is_no_carrier_gets_no_credentials() -> Result<()> {
    let (stack, campaign) = running(1).await?;
    stack
        .sql
        .batch_execute("update public.carrier_accounts set api_base = 'https://api.plivo.com.example.net'")
        .await?;
    campaign.dial(&stack).await?;
    let attempt = attempts(&stack, &phones(1, 1)[0]).await?.remove(0);
    assert_eq!((&attempt["call_status"], &attempt["dialled"]), (&json!("config"), &json!(false)));
    Ok(())
}

#[tokio::test]
async fn a_message_that_is_none_of_ours_fails_alone() -> Result<()> {
    let (stack, campaign) = running(2).await?;
    release(&campaign.dispatch).await?;
    for junk in ["{", r#"{"v":1,"kind":"event","organization_id":"o","id":"x"}"#] {
        stack.dial_queue.send(junk).await?;
    }
    let messages = stack.dial_queue.receive().await?;
    assert_eq!(messages.len(), 4);
    let junk: BTreeSet<_> = messages
        .iter()
        .filter(|message| !message.body().unwrap_or_default().contains("\"dial\""))
        .filter_map(|message| message.message_id())
        .collect();
    let failed = hand_over(&campaign.dispatch, &messages).await?;
    assert_eq!(failed.iter().map(String::as_str).collect::<BTreeSet<_>>(), junk);
    assert_eq!(campaign.carrier.creates().len(), 2);
    Ok(())
}

#[tokio::test]
async fn a_job_or_route_that_is_not_there_is_an_error() -> Result<()> {
    let (stack, campaign) = running(1).await?;
    assert!(events::job(&campaign.dispatch, "nothing").await.is_err());
    let stray = HttpEvent::post("/functions/v1/call-dispatch/nothing").send(&campaign.dispatch).await?;
    stray.assert_error(404, "not_found");
    drop(stack);
    Ok(())
}
