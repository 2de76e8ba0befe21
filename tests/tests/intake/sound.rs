//! Sound that comes with an event, up to what Lambda takes: in Storage, and neither in a row nor on a queue.

use super::{agents::Scene, *};
use base64::{Engine, engine::general_purpose::STANDARD};
use std::fs;
use tests::agents::recorded;

/// A call's sound, larger than any event may be.
fn sound(bytes: usize) -> Vec<u8> {
    let mut sound = local::carrier::mp3(600);
    sound.resize(bytes, 0);
    sound
}

/// A delivery of it, about the first call, of which the conversation is known.
async fn delivery(scene: &Scene, sound: &[u8]) -> Result<String> {
    scene
        .asked(0, "update public.call_logs set agent_call_id = 'conv_x' where id = $ATTEMPT returning 'bound'")
        .await?;
    let mut body: Value = serde_json::from_str(&recorded("elevenlabs", "post_call_audio", scene.attempt(0)?, "x")?)?;
    body["data"]["full_audio"] = STANDARD.encode(sound).into();
    Ok(body.to_string())
}

const COPY: &str =
    "select copy.state || ' ' || copy.bytes || ' ' || (copy.path = log.recording_url) || ' ' || split_part(copy.path, '/', 1)
     from public.call_logs as log join private.recordings as copy on copy.attempt_id = log.id where log.id = $ATTEMPT";

#[tokio::test]
async fn what_an_agent_sends_along_is_heard_by_those_who_may() -> Result<()> {
    let scene = Scene::set(1).await?;
    let sound = sound(4_300_000);
    let body = delivery(&scene, &sound).await?;
    let source = scene.source("elevenlabs");
    let answer = source.deliver(&body).send(&scene.intake).await?;
    assert_eq!((answer.status, answer.json()), (200, json!({ "result": "applied" })));
    let tenant = scene.campaign.tenant.id;
    assert_eq!(scene.asked(0, COPY).await?, format!("copied {} true {tenant}", sound.len()));
    let kept = "select length(body) < 1000 and length(payload::text) < 1000 from private.webhook_events";
    assert_eq!(scene.stack.value(kept).await?, "t", "the row holds no sound");

    let link = format!("/functions/v1/webhook-intake/calls/{}/recording", scene.attempt(0)?);
    let link = HttpEvent::post(&link).bearer(scene.campaign.tenant.jwt()).send(&scene.intake).await?.json();
    let heard = reqwest::get(link["url"].as_str().unwrap_or_default()).await?.bytes().await?;
    assert!(heard == sound, "{} of {} bytes are heard", heard.len(), sound.len());

    // Again: the second object is nobody's, and goes.
    assert_eq!(source.deliver(&body).send(&scene.intake).await?.json(), json!({ "result": "duplicate" }));
    assert_eq!(scene.stack.value("select count(*) from private.storage_deletions").await?, "1");
    scene.stack.sql.batch_execute("update private.storage_deletions set next_try_at = now()").await?;
    assert_eq!(events::job(&scene.intake, "sweep").await?["deleted"], 1);
    assert_eq!(reqwest::get(link["url"].as_str().unwrap_or_default()).await?.status().as_u16(), 200);

    // Sound alone may be so large, and of one source alone.
    let long = recorded("elevenlabs", "post_call_transcription", scene.attempt(0)?, "x")?
        .replace("Thursday", &"Thursday ".repeat(70_000));
    source.deliver(&long).send(&scene.intake).await?.assert_error(413, "body_too_large");
    scene.source("retell").deliver(&body).send(&scene.intake).await?.assert_error(413, "body_too_large");
    let over = delivery(&scene, &vec![b'x'; 4_800_000]).await?;
    source.deliver(&over).send(&scene.intake).await?.assert_error(413, "body_too_large");
    // What only says that it is sound is kept as an event.
    let page = delivery(&scene, b"<html>").await?;
    assert_eq!(source.deliver(&page).send(&scene.intake).await?.status, 200);
    assert_eq!(scene.asked(0, COPY).await?, format!("copied {} true {tenant}", sound.len()));
    Ok(())
}

#[tokio::test]
async fn sound_waits_in_storage_while_the_database_is_away() -> Result<()> {
    let scene = Scene::set(1).await?;
    let sound = sound(1_000_000);
    let body = delivery(&scene, &sound).await?;
    let source = scene.source("elevenlabs");
    // The source is known from an earlier event.
    scene.tell("elevenlabs", "answering_machine_detection", 0).await?;
    scene.stack.postgrest.kill().await?;
    let answer = source.deliver(&body).send(&scene.intake).await?;
    assert_eq!((answer.status, answer.json()), (202, json!({ "result": "buffered" })));
    // A process that cannot tell whose it is takes nothing of this size from anybody.
    source.deliver(&body).send(&scene.stack.intake()?).await?.assert_error(503, "database_unavailable");
    scene.stack.postgrest.restart().await?;
    let messages = scene.stack.intake_queue.receive().await?;
    assert_eq!(messages.len(), 1);
    let message = messages[0].body().unwrap_or_default();
    assert!(message.len() < 4096, "a message of {} bytes", message.len());
    for _ in 0..2 {
        // The queue may deliver twice.
        assert_eq!(tests::queues::hand_over(&scene.intake, &messages).await?, [""; 0]);
        let tenant = scene.campaign.tenant.id;
        assert_eq!(scene.asked(0, COPY).await?, format!("copied {} true {tenant}", sound.len()));
        assert_eq!(scene.stack.value("select count(*) from private.storage_deletions").await?, "0");
    }
    Ok(())
}

#[tokio::test]
async fn when_storage_is_away_too_the_sender_comes_again() -> Result<()> {
    let scene = Scene::set(1).await?;
    let body = delivery(&scene, &sound(1_000_000)).await?;
    let folder = scene.stack.storage.clone();
    drop(fs::remove_dir_all(&folder));
    fs::write(&folder, "no folder")?;
    let source = scene.source("elevenlabs");
    source.deliver(&body).send(&scene.intake).await?.assert_error(503, "database_unavailable");
    assert_eq!(
        scene.stack.value("select count(*) from private.webhook_event_keys").await?,
        "0",
        "nothing was acknowledged"
    );
    fs::remove_file(&folder)?;
    assert_eq!(source.deliver(&body).send(&scene.intake).await?.json(), json!({ "result": "applied" }));
    Ok(())
}

#[tokio::test]
async fn nobody_is_heard_who_did_not_agree_or_was_erased() -> Result<()> {
    let scene = Scene::set(1).await?;
    let body = delivery(&scene, &sound(1_000)).await?;
    scene.stack.sql.batch_execute("update public.call_logs set record_call = false").await?;
    assert_eq!(scene.source("elevenlabs").deliver(&body).send(&scene.intake).await?.status, 200);
    assert_eq!(scene.stack.value("select count(*) from private.recordings").await?, "0");
    assert_eq!(events::job(&scene.intake, "sweep").await?["deleted"], 1, "its object goes at once");

    scene.stack.sql.batch_execute("update public.call_logs set record_call = true").await?;
    let hangup = scene.campaign.carrier.hangup(&scene.calls[0], &TALKED)?;
    assert_eq!(hangup.send(&scene.intake).await?.status, 200);
    let phone = scene.stack.value("select callee_number from public.call_logs").await?;
    scene.stack.rpc(scene.campaign.tenant.jwt(), "erase_person", &json!({ "phone": phone })).await?;
    let body = delivery(&scene, &sound(2_000)).await?;
    assert_eq!(scene.source("elevenlabs").deliver(&body).send(&scene.intake).await?.status, 200);
    assert_eq!(events::job(&scene.intake, "sweep").await?["deleted"], 1);
    assert_eq!(scene.stack.value("select count(*) from private.recordings where path is not null").await?, "0");
    Ok(())
}
