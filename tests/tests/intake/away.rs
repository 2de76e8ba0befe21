//! What becomes of events while the database, or the queue too, is away.

use super::*;
use std::time::{Duration, Instant};
use tests::{callbacks::recording_url, carrier::signed_callback, events::Answer, proxy::Trouble};

#[tokio::test]
async fn without_a_database_an_event_waits_on_the_queue_and_is_applied_once() -> Result<()> {
    let (stack, campaign, calls) = calls(2).await?;
    let intake = stack.intake()?;
    // Its account's secret is known from an earlier event.
    assert_eq!(campaign.carrier.ring(&calls[0])?.send(&intake).await?.status, 200);
    let hangup = campaign.carrier.hangup(&calls[0], &TALKED)?;
    stack.postgrest.kill().await?;
    let answer = hangup.send(&intake).await?;
    assert_eq!((answer.status, answer.json()), (202, json!({ "result": "buffered" })));
    assert_eq!(stack.intake_queue.waiting().await?, 1);
    assert!(!is_over(&stack, &calls[0]).await?);

    stack.postgrest.restart().await?;
    let messages = stack.intake_queue.receive().await?;
    assert_eq!(tests::queues::hand_over(&intake, &messages).await?, [""; 0]);
    assert!(is_over(&stack, &calls[0]).await?);
    // The queue may deliver twice, and the carrier sends again what it got no answer for in time.
    let before = Fingerprint::of(&stack.sql).await?;
    assert_eq!(tests::queues::hand_over(&intake, &messages).await?, [""; 0]);
    assert_eq!(hangup.send(&intake).await?.json(), json!({ "result": "duplicate" }));
    before.assert_same(&Fingerprint::of(&stack.sql).await?);
    Ok(())
}

#[tokio::test]
async fn a_message_stays_on_the_queue_while_the_database_is_away() -> Result<()> {
    let (stack, campaign, calls) = calls(1).await?;
    let intake = stack.intake()?;
    stack.postgrest.kill().await?;
    assert_eq!(campaign.carrier.hangup(&calls[0], &TALKED)?.send(&intake).await?.status, 202);
    let messages = stack.intake_queue.receive().await?;
    let batch = tests::queues::batch(&messages);
    let answer = events::invoke_within(&intake, batch, Duration::from_secs(2)).await?;
    assert_eq!(answer["batchItemFailures"], json!([{ "itemIdentifier": messages[0].message_id() }]));
    Ok(())
}

#[tokio::test]
async fn an_event_that_could_not_be_verified_is_verified_when_it_is_drained() -> Result<()> {
    let (stack, campaign, calls) = calls(2).await?;
    // A process that has never seen the account: it cannot tell a right signature from a wrong one while the database is away.
    let intake = stack.intake()?;
    stack.postgrest.kill().await?;
    let forged = signed_callback(
        "not the token",
        &calls[1].hangup_url,
        &[("CallUUID", "x"), ("Event", "Hangup"), ("BillDuration", "60")],
    )?;
    for event in [campaign.carrier.hangup(&calls[0], &TALKED)?, forged] {
        let answer = event.send(&intake).await?;
        assert_eq!((answer.status, answer.json()), (202, json!({ "result": "buffered" })));
    }
    stack.postgrest.restart().await?;
    let delivered = stack.intake_queue.deliver(&intake).await?;
    assert_eq!((delivered.messages, delivered.failed), (2, 0));
    assert!(is_over(&stack, &calls[0]).await?);
    assert!(!is_over(&stack, &calls[1]).await?);
    let kept = stack.value("select string_agg(attempt_id::text, ',') from private.webhook_events").await?;
    assert_eq!(
        kept,
        token_of(&calls[0], &stack.keys.secrets()?)?.attempt_id.to_string(),
        "the forged one leaves no row"
    );
    Ok(())
}

#[tokio::test]
async fn without_database_and_queue_the_carrier_is_told_to_come_again() -> Result<()> {
    let (stack, campaign, calls) = calls(1).await?;
    let mut config = stack.config.clone();
    config.queues.insert("intake".to_owned(), format!("{}-gone", stack.intake_queue.url));
    let intake = stack.intake_of(config)?;
    stack.postgrest.kill().await?;
    let answer = campaign.carrier.hangup(&calls[0], &TALKED)?.send(&intake).await?;
    answer.assert_error(503, "database_unavailable");
    assert!(answer.headers.contains_key("retry-after"), "{:?}", answer.headers);
    stack.postgrest.restart().await?;
    assert_eq!(campaign.carrier.hangup(&calls[0], &TALKED)?.send(&intake).await?.status, 200);
    assert!(is_over(&stack, &calls[0]).await?);
    Ok(())
}

/// What the URL alone makes of an answered call.
fn assert_connects(answer: &Answer, call: &Create, stack: &Stack) -> Result<()> {
    let secrets = stack.keys.secrets()?;
    let attempt = token_of(call, &secrets)?.attempt_id;
    assert_eq!(
        (answer.status, answer.headers["content-type"].as_str()),
        (200, Some("application/xml")),
        "{}",
        answer.body
    );
    assert!(answer.body.contains(&format!("wss://voice.example.com/stream/{attempt}/")), "{}", answer.body);
    assert!(answer.body.contains(&format!("callbackUrl=\"{}\"", recording_url(call, &secrets)?)), "{}", answer.body);
    Ok(())
}

/// A quarter of a second is what database and queue may take together; the rest is for a machine that does other things, and is less than
/// an event that is not a hint may take.
const CONNECTED_WITHIN: Duration = Duration::from_millis(1_500);

async fn connect(intake: &Intake, stack: &Stack, campaign: &Campaign, call: &Create) -> Result<()> {
    let begun = Instant::now();
    let answer = campaign.carrier.answer(call)?.send(intake).await?;
    let took = begun.elapsed();
    println!("connected after {took:?}");
    assert_connects(&answer, call, stack)?;
    assert!(took < CONNECTED_WITHIN, "{took:?}");
    Ok(())
}

#[tokio::test]
async fn an_answered_callee_waits_for_no_database() -> Result<()> {
    let (stack, campaign, calls) = calls(1).await?;
    let (known, call) = (stack.intake()?, &calls[0]);
    connect(&known, &stack, &campaign, call).await?;
    // A silent database, for a process that knows the account and for one that does not; then none at all.
    stack.proxy.make(Trouble::Delay(Duration::from_secs(30)));
    connect(&known, &stack, &campaign, call).await?;
    connect(&stack.intake()?, &stack, &campaign, call).await?;
    stack.proxy.make(Trouble::None);
    stack.postgrest.kill().await?;
    connect(&known, &stack, &campaign, call).await?;
    connect(&stack.intake()?, &stack, &campaign, call).await
}

#[tokio::test]
async fn an_answer_that_the_database_did_not_take_waits_on_the_queue() -> Result<()> {
    let (stack, campaign, calls) = calls(1).await?;
    let (intake, event) = (stack.intake()?, campaign.carrier.answer(&calls[0])?);
    stack.postgrest.kill().await?;
    // It is a hint: a process that has never used the queue may not get it there in time.
    for _ in 0..50 {
        assert_connects(&event.send(&intake).await?, &calls[0], &stack)?;
        if stack.intake_queue.waiting().await? > 0 {
            break;
        }
    }
    stack.postgrest.restart().await?;
    assert_eq!(stack.intake_queue.deliver(&intake).await?.failed, 0);
    assert_eq!(stack.value("select count(*) from public.call_logs where answered_at is not null").await?, "1");
    Ok(())
}
