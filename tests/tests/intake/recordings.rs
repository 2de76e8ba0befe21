//! Recordings: copied from the carrier to our storage, and from there to those who may listen.

use super::*;
use anyhow::Context;
use tests::{
    callbacks::recording_url,
    carrier::signed_callback,
    media::{MediaHost, SECONDS},
};
use uuid::Uuid;

/// Calls of a carrier whose recordings are at a host that is its own API.
async fn recorded(count: u32) -> Result<(Stack, Campaign, Vec<Create>, MediaHost)> {
    let (stack, campaign, calls) = calls(count).await?;
    let media = MediaHost::start().await?;
    let base = media.url.as_str().trim_end_matches('/');
    stack
        .sql
        .execute("update public.carrier_accounts set api_base = $1 where id = $2", &[&base, &campaign.account])
        .await?;
    Ok((stack, campaign, calls, media))
}

/// The carrier tells where a call's recording is.
fn told(stack: &Stack, campaign: &Campaign, call: &Create, url: &str) -> Result<HttpEvent> {
    let uuid = call.call_uuid.to_string();
    let form =
        [("CallUUID", uuid.as_str()), ("RecordUrl", url), ("RecordingID", uuid.as_str()), ("RecordingDuration", "37")];
    signed_callback(&campaign.carrier.auth_token, &recording_url(call, &stack.keys.secrets()?)?, &form)
}

fn attempt(stack: &Stack, call: &Create) -> Result<Uuid> {
    Ok(token_of(call, &stack.keys.secrets()?)?.attempt_id)
}

/// A call's recording in words: its state, why, and whether it is due.
async fn state(stack: &Stack, call: &Create) -> Result<String> {
    let attempt = attempt(stack, call)?;
    stack
        .value(&format!(
            "select concat_ws(' ', state, reason, case when next_try_at > now() then 'later' when next_try_at is not null then 'due' end)
             from private.recordings where attempt_id = '{attempt}'"
        ))
        .await
}

fn link(call: Uuid, jwt: &str) -> HttpEvent {
    HttpEvent::post(&format!("/functions/v1/webhook-intake/calls/{call}/recording")).bearer(jwt)
}

#[tokio::test]
async fn a_recording_is_copied_and_heard_by_those_who_may() -> Result<()> {
    let (stack, campaign, calls, media) = recorded(1).await?;
    let (intake, call) = (stack.intake()?, &calls[0]);
    let attempt = attempt(&stack, call)?;
    assert_eq!(told(&stack, &campaign, call, &media.recording("good"))?.send(&intake).await?.status, 200);
    link(attempt, campaign.tenant.jwt()).send(&intake).await?.assert_error(409, "recording_not_ready");

    // The message is a nudge; it may come twice.
    let messages = stack.recording_queue.receive().await?;
    assert_eq!(messages.len(), 1);
    for _ in 0..2 {
        assert_eq!(tests::queues::hand_over(&intake, &messages).await?, [""; 0]);
    }
    let asked = media.take();
    assert_eq!(asked.len(), 1, "{asked:?}");
    let credentials = asked[0].authorization.clone().context("the carrier's API is told who asks")?;
    assert!(credentials.starts_with("Basic "), "{credentials}");
    let path = stack.value(&format!("select recording_url from public.call_logs where id = '{attempt}'")).await?;
    assert_eq!(path, format!("{}/{attempt}.mp3", campaign.tenant.id));
    let sound = local::carrier::mp3(SECONDS);
    let kept = stack.value("select state || ' ' || bytes || ' ' || content_type from private.recordings").await?;
    assert_eq!(kept, format!("copied {} audio/mpeg", sound.len()));

    let answer = link(attempt, campaign.tenant.jwt()).send(&intake).await?;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let url = answer.json()["url"].as_str().context("a link")?.to_owned();
    let heard = reqwest::get(&url).await?;
    assert_eq!((heard.status().as_u16(), &heard.headers()["content-type"]), (200, &"audio/mpeg".parse()?));
    assert_eq!(heard.bytes().await?, sound);
    let guessed = reqwest::get(url.replace("token=", "token=x")).await?;
    assert!(guessed.status().is_client_error(), "{}", guessed.status());

    // Nobody else.
    let stranger = scene::sign_up(&stack, "Elsewhere").await?;
    link(attempt, stranger.jwt()).send(&intake).await?.assert_error(404, "recording_not_found");
    let path = format!("/functions/v1/webhook-intake/calls/{attempt}/recording");
    HttpEvent::post(&path).send(&intake).await?.assert_error(401, "unauthorized");
    link(attempt, &stack.keys.secret_key)
        .send(&intake)
        .await
        .map(|answer| assert!(answer.status >= 400, "{}", answer.body))
}

#[tokio::test]
async fn what_cannot_be_copied_is_tried_again_and_what_must_not_be_is_refused() -> Result<()> {
    let (stack, campaign, calls, media) = recorded(8).await?;
    let intake = stack.intake()?;
    let other = MediaHost::start().await?;
    for (call, (name, expected)) in calls.iter().zip([
        ("page", "pending content_type later"),
        ("gone", "pending status 404 later"),
        ("empty", "pending empty later"),
        ("broken", "pending"),
        ("huge", "refused too_large"),
        ("moved to another of its hosts", "copied"),
        ("moved elsewhere", "refused host"),
        ("elsewhere", "refused host"),
    ]) {
        let url = match name {
            "moved to another of its hosts" => {
                media.move_to(&other.recording("good"));
                media.recording("moved")
            }
            "moved elsewhere" => {
                media.move_to("https://evil.example/x.mp3");
                media.recording("moved")
            }
            "elsewhere" => "http://169.254.169.254/latest/meta-data".to_owned(),
            name => media.recording(name),
        };
        assert_eq!(told(&stack, &campaign, call, &url)?.send(&intake).await?.status, 200, "{name}");
        let delivered = stack.recording_queue.deliver(&intake).await?;
        assert_eq!((delivered.messages, delivered.failed), (1, 0), "{name}: the table is the queue of record");
        let found = state(&stack, call).await?;
        assert!(found.starts_with(expected), "{name}: {found}");
    }
    assert_eq!(
        other.take().iter().map(|asked| &asked.authorization).collect::<Vec<_>>(),
        [&None],
        "credentials stay with the API"
    );
    let shown = stack.value("select string_agg(coalesce(reason, ''), ' ') from private.recordings").await?;
    assert!(!shown.contains("http"), "a reason names no URL: {shown}");
    let alarms = stack.value("select count(*) from private.outbox where topic = 'alarm.recording_refused'").await?;
    assert_eq!(alarms, "3");
    Ok(())
}

#[tokio::test]
async fn without_consent_nothing_is_copied() -> Result<()> {
    let (stack, campaign, calls, media) = recorded(1).await?;
    let intake = stack.intake()?;
    stack.sql.batch_execute("update public.call_logs set record_call = false").await?;
    assert_eq!(told(&stack, &campaign, &calls[0], &media.recording("good"))?.send(&intake).await?.status, 200);
    assert_eq!(stack.recording_queue.waiting().await?, 0);
    assert_eq!(state(&stack, &calls[0]).await?, "refused no_consent");
    assert_eq!(media.take(), []);
    let attempt = attempt(&stack, &calls[0])?;
    link(attempt, campaign.tenant.jwt()).send(&intake).await?.assert_error(404, "recording_not_found");
    Ok(())
}

#[tokio::test]
async fn a_nudge_that_was_lost_is_sent_again_by_the_sweep() -> Result<()> {
    let (stack, campaign, calls, media) = recorded(1).await?;
    let mut config = stack.config.clone();
    config.queues.insert("recording".to_owned(), format!("{}-gone", stack.recording_queue.url));
    let answer = told(&stack, &campaign, &calls[0], &media.recording("good"))?.send(&stack.intake_of(config)?).await?;
    assert_eq!((answer.status, answer.json()), (200, json!({ "result": "applied" })));
    let intake = stack.intake()?;
    events::job(&intake, "sweep").await?;
    assert_eq!(stack.recording_queue.waiting().await?, 0, "its own message may still be on the way");
    stack.sql.batch_execute("update private.recordings set next_try_at = now() - interval '2 minutes'").await?;
    assert_eq!(events::job(&intake, "sweep").await?["recordings"], 1);
    assert_eq!(stack.recording_queue.deliver(&intake).await?.messages, 1);
    assert_eq!(state(&stack, &calls[0]).await?, "copied");
    Ok(())
}

#[tokio::test]
async fn an_erased_person_s_recording_is_deleted() -> Result<()> {
    let (stack, campaign, calls, media) = recorded(1).await?;
    let intake = stack.intake()?;
    assert_eq!(campaign.carrier.hangup(&calls[0], &TALKED)?.send(&intake).await?.status, 200);
    assert_eq!(told(&stack, &campaign, &calls[0], &media.recording("good"))?.send(&intake).await?.status, 200);
    stack.recording_queue.deliver(&intake).await?;
    let attempt = attempt(&stack, &calls[0])?;
    let answer = link(attempt, campaign.tenant.jwt()).send(&intake).await?;
    let url = answer.json()["url"].as_str().context("a link")?.to_owned();
    assert_eq!(reqwest::get(&url).await?.status().as_u16(), 200);

    let phone = stack.value("select callee_number from public.call_logs").await?;
    let erased = stack.rpc(campaign.tenant.jwt(), "erase_person", &json!({ "phone": phone })).await?;
    assert_eq!(erased["erased"], true, "{erased}");
    assert_eq!(events::job(&intake, "sweep").await?["deleted"], 1);
    assert!(reqwest::get(&url).await?.status().is_client_error(), "the link opens nothing any more");
    assert_eq!(stack.value("select count(*) from private.storage_deletions").await?, "0");
    link(attempt, campaign.tenant.jwt()).send(&intake).await?.assert_error(404, "recording_not_found");
    Ok(())
}
