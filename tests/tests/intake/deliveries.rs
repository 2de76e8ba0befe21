//! Each carrier's recorded deliveries, one by one and in every order, through the handler's own code.

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tests::{
    Stack,
    deliveries::{Account, CARRIERS, Call, Delivery, recorded},
    scene, supervisor_binary,
};
use uuid::Uuid;
use webhook_intake::Intake;

/// Each event is told until the database has it: an answer is only a hint, which a busy database or queue may let pass.
async fn tell(stack: &Stack, intake: &Intake, account: &Account, call: &Call, delivery: &Delivery) -> Result<()> {
    let event = account.deliver(stack, call, delivery)?;
    let kept = "select count(*) from private.webhook_events where attempt_id = $1 and kind = $2";
    for _ in 0..50 {
        let answer = event.send(intake).await?;
        assert_eq!(answer.status, 200, "{} {}: {}", account.carrier, delivery.name, answer.body);
        if stack.sql.query_one(kept, &[&call.attempt, &delivery.event]).await?.get::<_, i64>(0) > 0 {
            return Ok(());
        }
        stack.intake_queue.deliver(intake).await?;
    }
    panic!("the database never took {}", delivery.name)
}

async fn row(stack: &Stack, attempt: Option<Uuid>) -> Result<Value> {
    Ok(stack
        .sql
        .query_one("select to_jsonb(log) from public.call_logs as log where log.id = $1", &[&attempt])
        .await?
        .get(0))
}

#[tokio::test]
async fn each_delivery_changes_the_row_that_it_names() -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    let tenant = scene::sign_up(&stack, "Acme Homes").await?;
    let intake = stack.intake()?;
    let mut number = 2_000_000;
    for carrier in CARRIERS {
        let account = Account::create(&stack, carrier).await?;
        for delivery in recorded(carrier)? {
            number += 1;
            let call = account.dialled(&stack, tenant.id, number).await?;
            tell(&stack, &intake, &account, &call, &delivery).await?;
            let row = row(&stack, call.attempt).await?;
            for (column, expected) in &delivery.expect {
                assert_eq!(row[column], call.fill_all(expected), "{carrier} {}: {column}", delivery.name);
            }
            assert!(row.get("id").is_some_and(|_| delivery.expect.keys().all(|column| row.get(column).is_some())));
        }
    }
    // What has no name of ours is counted, each under the organization whose call it was.
    let unmapped = stack.value("select string_agg(source || ' ' || field || '=' || value, ', ' order by source, field) from private.unmapped_values").await?;
    assert_eq!(
        unmapped,
        "plivo HangupCauseCode=4242, telnyx hangup_cause=solar_flare, twilio CallStatus=evaporated, vonage status=evaporated"
    );
    let failed = stack.value("select coalesce(string_agg(kind || ' ' || error, ', '), 'none') from private.webhook_events where status in ('failed', 'dead', 'orphan')").await?;
    assert_eq!(failed, "none");
    Ok(())
}

/// Orders of `0..n`, so many of them, each different; all where there are no more.
fn orders(n: usize, most: usize) -> Vec<Vec<usize>> {
    let mut all = vec![Vec::new()];
    for next in 0..n {
        all = all
            .into_iter()
            .flat_map(|order: Vec<usize>| {
                (0..=order.len()).map(move |place| {
                    let mut longer = order.clone();
                    longer.insert(place, next);
                    longer
                })
            })
            .collect();
    }
    let step = all.len().div_ceil(most);
    all.into_iter().step_by(step).collect()
}

/// What a call came to. Times differ from call to call: of them counts whether they are there, and their order.
async fn outcome(stack: &Stack, call: &Call) -> Result<Value> {
    let row = stack
        .sql
        .query_one(
            "select to_jsonb(log) - array['id', 'callee_number', 'call_sid', 'recording_url', 'recording_id', 'stream_id', 'begun_at', 'not_after',
                 'created_at', 'submitted_at', 'ringing_at', 'answered_at', 'ended_at', 'updated_at', 'duration', 'bill_duration_seconds']
               || jsonb_build_object(
                 'bound', log.call_sid = $2, 'recorded', log.recording_url is not null and log.recording_id is not null,
                 'streamed', log.stream_id is not null,
                 -- Where we measure the talk ourselves, a second lies between one call and the next.
                 'seconds', array[log.duration between 36 and 38, log.bill_duration_seconds between 36 and 60],
                 'times', array[log.submitted_at is not null, log.ringing_at is not null, log.answered_at is not null, log.ended_at is not null],
                 'in_order', log.submitted_at <= coalesce(log.ringing_at, log.answered_at) and coalesce(log.ringing_at, log.answered_at) <= log.answered_at
                    and log.answered_at <= log.ended_at,
                 'metered', (select jsonb_object_agg(u.meter_key, u.quantity between 1 and 60) from private.usage_events as u where u.source = 'call' and u.key = log.id::text),
                 'ended', (select count(*) from private.outbox as told where told.topic = 'call.ended' and told.key = log.id::text)
               )
             from public.call_logs as log where log.id = $1",
            &[&call.attempt, &call.sid],
        )
        .await?;
    Ok(row.get(0))
}

async fn any_order_ends_in_the_same_row(carrier: &'static str) -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    let tenant = scene::sign_up(&stack, "Acme Homes").await?;
    let intake = stack.intake()?;
    let account = Account::create(&stack, carrier).await?;
    let life: Vec<Delivery> = recorded(carrier)?.into_iter().filter(|delivery| delivery.life).collect();
    assert!(life.len() >= 5, "{carrier} has a life of {} events", life.len());
    let mut first = None;
    for (number, order) in (3_000_000..).zip(orders(life.len(), 60)) {
        let call = account.dialled(&stack, tenant.id, number).await?;
        for (place, step) in order.iter().enumerate() {
            tell(&stack, &intake, &account, &call, &life[*step]).await?;
            // Each comes a second time, after the one that follows it.
            let again = order[place.saturating_sub(1)];
            account.deliver(&stack, &call, &life[again])?.send(&intake).await?;
        }
        let came_to = outcome(&stack, &call).await?;
        let first = first.get_or_insert_with(|| came_to.clone());
        assert_eq!(&came_to, first, "{carrier}: {:?}", order.iter().map(|step| &life[*step].name).collect::<Vec<_>>());
    }
    let first = first.context("no order")?;
    for (key, value) in [
        ("status", json!("ended")),
        ("call_status", json!("answered")),
        ("bound", json!(true)),
        ("recorded", json!(true)),
        ("seconds", json!([true, true])),
        ("in_order", json!(true)),
        ("metered", json!({ "ai_calls": true, "call_seconds": true })),
        ("ended", json!(1)),
    ] {
        assert_eq!(first[key], value, "{carrier}: {key} of {first:#}");
    }
    Ok(())
}

#[tokio::test]
async fn plivo_s_events_in_any_order_and_twice() -> Result<()> {
    any_order_ends_in_the_same_row("plivo").await
}

#[tokio::test]
async fn twilio_s_events_in_any_order_and_twice() -> Result<()> {
    any_order_ends_in_the_same_row("twilio").await
}

#[tokio::test]
async fn telnyx_s_events_in_any_order_and_twice() -> Result<()> {
    any_order_ends_in_the_same_row("telnyx").await
}

#[tokio::test]
async fn vonage_s_events_in_any_order_and_twice() -> Result<()> {
    any_order_ends_in_the_same_row("vonage").await
}
