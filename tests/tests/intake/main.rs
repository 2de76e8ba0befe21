//! Carriers' callbacks: verified, kept, and applied once, in whatever order they come.

mod agents;
mod away;
mod deliveries;
mod inbound;
mod properties;
mod recordings;
mod refused;
mod samples;
mod silence;
mod sound;
mod sources;
mod storm;

use anyhow::Result;
use serde_json::{Value, json};
use shared::telephony::CallbackEvent;
use tests::{
    Fingerprint, Stack,
    callbacks::{self, TALKED, token_of},
    carrier::{CarrierStub, Create},
    events::{self, HttpEvent},
    scene::{self, Campaign},
    supervisor_binary,
};
use webhook_intake::Intake;

/// A campaign with so many calls that the carrier has taken and told nothing of yet.
async fn calls(count: u32) -> Result<(Stack, Campaign, Vec<Create>)> {
    let stack = Stack::start(supervisor_binary!()).await?;
    let campaign = scene::running_campaign(&stack, &scene::phones(1, count)).await?;
    let calls = campaign.dial(&stack).await?;
    assert_eq!(calls.len(), count as usize);
    Ok((stack, campaign, calls))
}

/// The events of an answered and recorded call.
const LIFE: [CallbackEvent; 4] =
    [CallbackEvent::Ring, CallbackEvent::Answer, CallbackEvent::Recording, CallbackEvent::Hangup];

/// These events, signed.
fn life(stack: &Stack, carrier: &CarrierStub, call: &Create) -> Result<[HttpEvent; 4]> {
    let secrets = stack.keys.secrets()?;
    Ok([carrier.ring(call)?, carrier.answer(call)?, carrier.recording(call, &secrets)?, carrier.hangup(call, &TALKED)?])
}

/// Sends an event until the database has it. An answer is only a hint, which a busy database or queue may let pass; carriers send again.
async fn tell(stack: &Stack, intake: &Intake, call: &Create, event: &HttpEvent, kind: CallbackEvent) -> Result<()> {
    let attempt = token_of(call, &stack.keys.secrets()?)?.attempt_id;
    for _ in 0..50 {
        let answer = event.send(intake).await?;
        assert_eq!(answer.status, 200, "{}", answer.body);
        stack.intake_queue.deliver(intake).await?;
        let kept = "select 1 from private.webhook_events where attempt_id = $1 and kind = $2";
        if !stack.sql.query(kept, &[&attempt, &kind.as_str()]).await?.is_empty() {
            return Ok(());
        }
    }
    panic!("the database never took a {}", kind.as_str())
}

/// Everything that the events of a call decide, of its own row and of those that follow it. Times differ from call to call: of them
/// counts whether they are there, and their order.
async fn outcome(stack: &Stack, call: &Create) -> Result<Value> {
    let attempt = token_of(call, &stack.keys.secrets()?)?.attempt_id;
    let row = stack
        .sql
        .query_one(
            "select to_jsonb(log) - array['id', 'lead_id', 'queue_id', 'callee_number', 'caller_number', 'call_sid', 'recording_url',
                 'created_at', 'submitted_at', 'ringing_at', 'answered_at', 'ended_at', 'updated_at', 'begun_at', 'not_after', 'lease_token']
               || jsonb_build_object(
                 'bound', log.call_sid = $2,
                 'recorded', log.recording_url = 'https://media.plivo.com/' || $2 || '.mp3',
                 'times', array[log.submitted_at is not null, log.ringing_at is not null, log.answered_at is not null, log.ended_at is not null],
                 'in_order', log.submitted_at <= log.ringing_at and log.ringing_at <= log.answered_at and log.answered_at <= log.ended_at,
                 'queue', (select to_jsonb(q) - array['id', 'lead_id', 'created_at', 'updated_at', 'next_retry_at'] from public.call_queue as q where q.id = log.queue_id),
                 'member', (select m.status || ' ' || m.attempt_count from public.campaign_leads as m where m.campaign_id = log.campaign_id and m.lead_id = log.lead_id),
                 'lead', (select l.call_status || ' ' || (l.call_log_id = log.id) || ' ' || (l.last_contacted_at = log.ended_at) from public.leads as l where l.id = log.lead_id),
                 'usage', (select jsonb_object_agg(u.meter_key, u.quantity) from private.usage_events as u where u.source = 'call' and u.key = log.id::text)
               )
             from public.call_logs as log where log.id = $1",
            &[&attempt, &call.call_uuid.to_string()],
        )
        .await?;
    Ok(row.get(0))
}

/// All orders of `0..n`.
fn orders(n: usize) -> Vec<Vec<usize>> {
    if n == 0 {
        return vec![Vec::new()];
    }
    orders(n - 1)
        .into_iter()
        .flat_map(|order| {
            (0..n).map(move |place| {
                let mut longer = order.clone();
                longer.insert(place, n - 1);
                longer
            })
        })
        .collect()
}

fn assert_is_an_answered_call(outcome: &Value) {
    let expected = json!({
        "status": "ended", "call_status": "answered", "duration": 37, "bill_duration_seconds": 60, "carrier_cost_micros": 3700,
        "carrier_cost_currency": "USD", "hangup_cause_code": "4000", "hangup_cause_name": "Normal Hangup", "hangup_source": "Callee",
        "recording_id": "rec-1", "recording_seconds": 37, "bound": true, "recorded": true, "lease_until": null,
        "member": "called 1", "lead": "answered true true", "usage": { "ai_calls": 1, "call_seconds": 60 },
    });
    for (key, value) in expected.as_object().into_iter().flatten() {
        assert_eq!(&outcome[key], value, "{key} of {outcome:#}");
    }
    assert_eq!(outcome["queue"]["status"], "completed", "{outcome:#}");
}

#[tokio::test]
async fn callbacks_in_any_order_and_twice_end_in_the_same_row() -> Result<()> {
    let orders = orders(4);
    let (stack, campaign, calls) = calls(orders.len().try_into()?).await?;
    let intake = stack.intake()?;
    let mut outcomes = Vec::new();
    for (order, call) in orders.iter().zip(&calls) {
        let life = life(&stack, &campaign.carrier, call)?;
        // Each comes a second time, after later ones.
        for event in [0, 1, 0, 2, 1, 3, 2, 3].map(|step| order[step]) {
            tell(&stack, &intake, call, &life[event], LIFE[event]).await?;
        }
        outcomes.push(outcome(&stack, call).await?);
    }
    assert_is_an_answered_call(&outcomes[0]);
    for (order, outcome) in orders.iter().zip(&outcomes) {
        assert_eq!(outcome, &outcomes[0], "order {order:?} ends in another row than {:?}", orders[0]);
    }
    let campaign = stack.value("select to_jsonb(c) - array['id'] from public.campaigns as c").await?;
    let campaign: Value = serde_json::from_str(&campaign)?;
    let counters = ["status", "open_leads", "total_calls", "answered_calls"].map(|key| campaign[key].clone());
    assert_eq!(counters, [json!("completed"), json!(0), json!(24), json!(24)], "{campaign:#}");
    let kept = stack.value("select count(*) from private.webhook_events").await?;
    assert_eq!(kept, "96", "each event is kept once");
    Ok(())
}

#[tokio::test]
async fn callbacks_all_at_once_end_in_that_row_too() -> Result<()> {
    let (stack, campaign, calls) = calls(8).await?;
    let intake = stack.intake()?;
    let mut events = Vec::new();
    for call in &calls {
        let life = life(&stack, &campaign.carrier, call)?;
        events.extend(life.clone());
        events.extend(life);
    }
    let answers = futures::future::join_all(events.iter().map(|event| event.send(&intake))).await;
    for answer in answers {
        let answer = answer?;
        assert_eq!(answer.status, 200, "{}", answer.body);
    }
    // Under such a load an answer, only a hint, may have gone to the queue, or nowhere.
    stack.intake_queue.deliver(&intake).await?;
    for call in &calls {
        assert_is_an_answered_call(&outcome(&stack, call).await?);
    }
    let kept = "select count(*) from private.webhook_events where kind <> 'answer'";
    assert_eq!(stack.value(kept).await?, "24", "each is kept once");
    assert_eq!(stack.value("select status || ' ' || total_calls from public.campaigns").await?, "completed 8");
    Ok(())
}

#[tokio::test]
async fn a_second_delivery_says_that_it_is_one() -> Result<()> {
    let (stack, campaign, calls) = calls(1).await?;
    let intake = stack.intake()?;
    let hangup = campaign.carrier.hangup(&calls[0], &TALKED)?;
    assert_eq!(hangup.send(&intake).await?.json(), json!({ "result": "applied" }));
    let before = Fingerprint::of(&stack.sql).await?;
    assert_eq!(hangup.send(&intake).await?.json(), json!({ "result": "duplicate" }));
    before.assert_same(&Fingerprint::of(&stack.sql).await?);
    Ok(())
}

#[tokio::test]
async fn an_event_is_kept_as_it_came_without_its_signature() -> Result<()> {
    let (stack, campaign, calls) = calls(1).await?;
    let answer = campaign.carrier.hangup(&calls[0], &TALKED)?.send(&stack.intake()?).await?;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let row = stack
        .sql
        .query_one("select body, headers::text, kind, source, source_id from private.webhook_events", &[])
        .await?;
    let (body, headers): (String, String) = (row.get(0), row.get(1));
    assert!(body.contains("HangupCauseCode=4000") && body.contains(&calls[0].call_uuid.to_string()), "{body}");
    assert!(headers.contains("content-type") && !headers.to_lowercase().contains("signature-v3\""), "{headers}");
    assert_eq!((row.get::<_, String>(2).as_str(), row.get::<_, String>(3).as_str()), ("hangup", "plivo"));
    assert_eq!(row.get::<_, String>(4), campaign.account.to_string());
    Ok(())
}

/// Which call of a carrier the database knows to be over.
async fn is_over(stack: &Stack, call: &Create) -> Result<bool> {
    Ok(stack.value(&format!("select status from public.call_logs where call_sid = '{}'", call.call_uuid)).await?
        == "ended")
}

#[tokio::test]
async fn an_answer_is_applied_like_any_event() -> Result<()> {
    let (stack, campaign, calls) = calls(1).await?;
    let (intake, event) = (stack.intake()?, campaign.carrier.answer(&calls[0])?);
    tell(&stack, &intake, &calls[0], &event, CallbackEvent::Answer).await?;
    let applied = stack.value("select status || ' ' || (answered_at is not null) from public.call_logs").await?;
    assert_eq!(applied, "in_progress true");
    Ok(())
}

#[tokio::test]
async fn what_an_ending_means_for_the_lead() -> Result<()> {
    // After a busy line a quarter of an hour would do, but an hour lies between two dials to one number.
    let endings = [
        (callbacks::BUSY, "busy", "queued", Some("60 minutes")),
        (callbacks::NO_ANSWER, "no_answer", "queued", Some("2 hours")),
        (callbacks::REJECTED, "rejected", "queued", Some("1 day")),
        (callbacks::INVALID, "invalid_number", "failed", None),
        (TALKED, "answered", "completed", None),
    ];
    let (stack, campaign, calls) = calls(endings.len().try_into()?).await?;
    stack.sql.batch_execute("update private.platform_dialling set retry_jitter = 0").await?;
    let intake = stack.intake()?;
    for ((ending, outcome, queue, wait), call) in endings.iter().zip(&calls) {
        assert_eq!(
            campaign.carrier.hangup(call, ending)?.send(&intake).await?.json(),
            json!({ "result": "applied" }),
            "{outcome}"
        );
        let wait = wait.unwrap_or("0");
        let found = stack
            .value(&format!(
                "select log.call_status || ' ' || q.status || ' ' || q.attempt_count || ' ' || case
                   when q.status <> 'queued' then 'over'
                   when q.next_retry_at - log.ended_at - interval '{wait}' between interval '0' and interval '1 minute' then 'waits'
                   else 'waits until ' || q.next_retry_at end
                 from public.call_logs as log join public.call_queue as q on q.id = log.queue_id where log.call_sid = '{}'",
                call.call_uuid
            ))
            .await?;
        assert_eq!(found, format!("{outcome} {queue} 1 {}", if *queue == "queued" { "waits" } else { "over" }));
    }
    Ok(())
}

#[tokio::test]
async fn an_event_that_fails_to_apply_is_kept_and_swept() -> Result<()> {
    let (stack, campaign, calls) = calls(1).await?;
    let intake = stack.intake()?;
    stack
        .sql
        .batch_execute(
            "create function private.break() returns trigger language plpgsql as $$ begin raise 'out of paper'; end $$;
             create trigger break before update on public.leads for each row execute function private.break()",
        )
        .await?;
    let answer = campaign.carrier.hangup(&calls[0], &TALKED)?.send(&intake).await?;
    assert_eq!((answer.status, answer.json()), (200, json!({ "result": "failed" })));
    assert!(!is_over(&stack, &calls[0]).await?);
    assert!(stack.value("select error from private.webhook_events").await?.contains("out of paper"));

    stack.sql.batch_execute("drop trigger break on public.leads").await?;
    assert_eq!(events::job(&intake, "sweep").await?["applied"], 0, "it is not due yet");
    stack.sql.batch_execute("update private.webhook_events set next_try_at = now()").await?;
    assert_eq!(events::job(&intake, "sweep").await?, json!({ "applied": 1, "failed": 0, "dead": 0 }));
    assert!(is_over(&stack, &calls[0]).await?);
    assert_eq!(stack.value("select status || ' ' || tries from private.webhook_events").await?, "applied 2");
    Ok(())
}
