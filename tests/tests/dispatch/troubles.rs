//! Lost answers, lost messages, a carrier or a database that is away: nobody is dialled twice, and nobody is forgotten.

use super::*;

#[tokio::test]
async fn a_carrier_that_cannot_be_reached_was_not_asked() -> Result<()> {
    let (stack, campaign) = running(1).await?;
    let nowhere = format!("http://127.0.0.1:{}", local::parts::postgres::free_port()?);
    stack.sql.execute("update public.carrier_accounts set api_base = $1", &[&nowhere]).await?;
    assert!(campaign.dial(&stack).await?.is_empty());
    let attempt = attempts(&stack, &phones(1, 1)[0]).await?.remove(0);
    assert_eq!((&attempt["call_status"], &attempt["dialled"]), (&json!("carrier_transient"), &json!(false)));
    assert_eq!(waiting(&stack, &phones(1, 1)[0]).await?.0, "queued", "it is tried again");
    Ok(())
}

#[tokio::test]
async fn without_a_database_a_batch_comes_again_and_nobody_is_dialled() -> Result<()> {
    let (stack, campaign) = running(3).await?;
    release(&campaign.dispatch).await?;
    let messages = stack.dial_queue.receive().await?;
    stack.postgrest.kill().await?;
    let answer = events::invoke_within(&campaign.dispatch, queues::batch(&messages), Duration::from_secs(2)).await?;
    assert_eq!(answer["batchItemFailures"].as_array().map(Vec::len), Some(3));
    assert_eq!(campaign.carrier.creates().len(), 0);
    stack.postgrest.restart().await?;
    assert!(hand_over(&campaign.dispatch, &messages).await?.is_empty());
    assert_eq!(campaign.carrier.creates().len(), 3);
    Ok(())
}

#[tokio::test]
async fn a_lost_answer_is_asked_for_again_and_each_is_dialled_once() -> Result<()> {
    let (stack, campaign) = running(4).await?;
    release(&campaign.dispatch).await?;
    let messages = stack.dial_queue.receive().await?;
    stack.proxy.make(Trouble::LoseNextAnswer("/rpc/begin_dials"));
    assert!(hand_over(&campaign.dispatch, &messages).await?.is_empty());
    assert_eq!(campaign.carrier.creates().len(), 4, "the attempts had begun, and were not lost");
    assert_eq!(stack.value("select count(*) from public.call_logs where status = 'queued'").await?, "4");
    Ok(())
}

#[tokio::test]
async fn an_outcome_that_could_not_be_recorded_comes_by_callback() -> Result<()> {
    let (stack, campaign) = running(1).await?;
    release(&campaign.dispatch).await?;
    let messages = stack.dial_queue.receive().await?;
    stack.proxy.make(Trouble::Refuse("/rpc/record_dials"));
    let answer = events::invoke_within(&campaign.dispatch, queues::batch(&messages), Duration::from_secs(3)).await?;
    assert_eq!(answer["batchItemFailures"], json!([]), "it was dialled: its message must not come again");
    let call = campaign.carrier.creates().remove(0);
    let before = attempts(&stack, &call.to).await?.remove(0);
    assert_eq!((&before["status"], &before["call_sid"]), (&json!("submitting"), &Value::Null));
    stack.proxy.make(Trouble::None);
    assert_eq!(campaign.carrier.ring(&call)?.send(&stack.intake()?).await?.status, 200);
    let after = attempts(&stack, &call.to).await?.remove(0);
    assert_eq!((&after["status"], &after["call_sid"]), (&json!("ringing"), &json!(call.call_uuid)));
    Ok(())
}

#[tokio::test]
async fn what_the_queue_did_not_take_is_sent_again_as_the_same_attempt() -> Result<()> {
    let (stack, campaign) = running(2).await?;
    let mut config = stack.config.clone();
    config.queues.insert("dial".to_owned(), format!("{}-gone", stack.dial_queue.url));
    let cut_off = Dispatch::with_secrets(config, shared::supabase::http_client()?, stack.secrets()?);
    assert_eq!(release(&cut_off).await?, json!({ "sent": 0, "unsent": 2 }));
    let attempts = "select string_agg(id::text, ',' order by id) from public.call_logs";
    let first = stack.value(attempts).await?;
    assert_eq!(release(&campaign.dispatch).await?["sent"], 0, "the first to have them may still be at it");
    stack.sql.batch_execute("update public.call_logs set lease_until = now() - interval '1 second'").await?;
    assert_eq!(release(&campaign.dispatch).await?["sent"], 2);
    assert_eq!(stack.value(attempts).await?, first);
    stack.dial_queue.deliver(&campaign.dispatch).await?;
    assert_eq!(campaign.carrier.creates().len(), 2);
    Ok(())
}

#[tokio::test]
async fn what_may_have_been_dialled_is_asked_about_and_never_dialled_again() -> Result<()> {
    let (stack, campaign) = running(2).await?;
    let (phones, intake) = (phones(1, 2), stack.intake()?);
    for phone in &phones {
        campaign.carrier.react(phone, Reaction::CutOff);
    }
    let calls = campaign.dial(&stack).await?;
    // Of the first the carrier has a record; of the second it knows nothing.
    let known = calls.iter().find(|call| call.to == phones[0]).context("not dialled")?;
    let now = chrono::Utc::now();
    let time = |seconds| (now + chrono::TimeDelta::seconds(seconds)).format("%Y-%m-%d %H:%M:%S+00:00").to_string();
    campaign.carrier.keep_record(json!({
        "call_uuid": known.call_uuid, "from_number": known.from.trim_start_matches('+'), "to_number": known.to.trim_start_matches('+'),
        "initiation_time": time(0), "answer_time": time(1), "end_time": time(31), "call_duration": 30, "bill_duration": 30, "billed_duration": 60,
        "total_amount": "0.0037", "call_state": "ANSWER", "hangup_cause_code": 4000, "hangup_cause_name": "Normal Hangup",
    }));
    assert_eq!(events::job(&campaign.dispatch, "reconcile").await?["asked"], 0, "their time is not up yet");
    stack.sql.batch_execute("update public.call_logs set lease_until = now() - interval '1 second'").await?;
    assert_eq!(events::job(&campaign.dispatch, "reconcile").await?, json!({ "asked": 2, "news": 1 }));
    assert_eq!(stack.intake_queue.deliver(&intake).await?.failed, 0);
    let (first, second) =
        (attempts(&stack, &phones[0]).await?.remove(0), attempts(&stack, &phones[1]).await?.remove(0));
    assert_eq!(
        ["status", "call_status", "call_sid", "bill_duration_seconds"].map(|key| first[key].clone()),
        [json!("ended"), json!("answered"), json!(known.call_uuid), json!(60)]
    );
    assert_eq!(second["status"], "submission_unknown", "it may still come");

    // Ten minutes later it was never made, as far as anybody knows; it counts as dialled all the same.
    stack
        .sql
        .batch_execute("update public.call_logs set begun_at = now() - interval '11 minutes', lease_until = now() - interval '1 second' where status <> 'ended'")
        .await?;
    assert_eq!(events::job(&campaign.dispatch, "reconcile").await?, json!({ "asked": 1, "news": 1 }));
    stack.intake_queue.deliver(&intake).await?;
    let second = attempts(&stack, &phones[1]).await?.remove(0);
    assert_eq!(
        ["status", "call_status", "dialled"].map(|key| second[key].clone()),
        [json!("ended"), json!("lost"), json!(true)]
    );
    assert_eq!(campaign.carrier.creates().len(), 2);
    Ok(())
}
