//! What becomes of events while the database, or the queue too, is away.

use super::*;

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
    let answer = events::invoke_within(&intake, batch, std::time::Duration::from_secs(2)).await?;
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

#[tokio::test]
async fn an_answered_callee_waits_for_no_database() -> Result<()> {
    let (stack, campaign, calls) = calls(3).await?;
    let limit = std::time::Duration::from_millis(1_000);
    let known = stack.intake()?;
    assert_eq!(campaign.carrier.ring(&calls[0])?.send(&known).await?.status, 200);
    // Silent, for a process that knows the account and for one that does not; then gone.
    stack.proxy.make(Trouble::Delay(std::time::Duration::from_secs(30)));
    for (what, intake, call) in [("known", known, &calls[0]), ("unknown", stack.intake()?, &calls[1])] {
        let begun = std::time::Instant::now();
        let answer = campaign.carrier.answer(call)?.send(&intake).await?;
        let took = begun.elapsed();
        println!("{what}, silent database: {took:?}");
        assert_connects(&answer, call, &stack)?;
        assert!(took < limit, "{what}: {took:?}");
    }
    stack.postgrest.kill().await?;
    stack.proxy.make(Trouble::None);
    let begun = std::time::Instant::now();
    assert_connects(&campaign.carrier.answer(&calls[2])?.send(&stack.intake()?).await?, &calls[2], &stack)?;
    println!("no database: {:?}", begun.elapsed());
    assert!(begun.elapsed() < limit);
    stack.postgrest.restart().await?;
    assert_eq!(stack.intake_queue.deliver(&stack.intake()?).await?.failed, 0);
    let answered = stack.value("select count(*) from public.call_logs where answered_at is not null").await?;
    assert_eq!(answered, "3", "the answers waited on the queue");
    Ok(())
}
