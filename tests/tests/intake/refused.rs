//! What nobody may have sent, what is not understood and what is too large.

use super::*;
use anyhow::Context;
use shared::telephony::token::CallbackToken;
use tests::{callbacks::callback_url, carrier::signed_callback};
use uuid::Uuid;

/// Sends what nobody may have made, and fails unless it is 403 and nothing whatever has changed.
async fn assert_refused(
    stack: &Stack,
    intake: &Intake,
    what: &str,
    event: &HttpEvent,
    code: &str,
    field: &str,
) -> Result<()> {
    let before = Fingerprint::of(&stack.sql).await?;
    let answer = event.send(intake).await?;
    println!("{what}: {} {}", answer.status, answer.body);
    answer.assert_error_at(403, code, field);
    before.assert_same(&Fingerprint::of(&stack.sql).await?);
    assert_eq!(stack.intake_queue.waiting().await?, 0, "{what}: nothing is buffered");
    Ok(())
}

#[tokio::test]
async fn a_bad_signature_is_403_and_leaves_no_row_anywhere() -> Result<()> {
    let (stack, campaign, calls) = calls(1).await?;
    let (intake, call) = (stack.intake()?, &calls[0]);
    let good = campaign.carrier.hangup(call, &TALKED)?;
    let url = call.hangup_url.as_str();
    let form = [("CallUUID", "x"), ("Event", "Hangup"), ("BillDuration", "60")];
    let changed_body = good
        .clone()
        .form(&[("CallUUID".to_owned(), call.call_uuid.to_string()), ("BillDuration".to_owned(), "6000".to_owned())]);
    let elsewhere =
        signed_callback(&campaign.carrier.auth_token, &url.replace("https://calls.", "https://evil."), &form)?;
    for (what, event) in [
        ("a changed body", changed_body),
        ("another account's token", signed_callback("not the token", url, &form)?),
        ("a signature over another host", elsewhere),
        ("no signature", good.clone().header("x-plivo-signature-v3", "").header("x-plivo-signature-ma-v3", "")),
        ("no nonce", good.clone().header("x-plivo-signature-v3-nonce", "")),
        ("another nonce", good.clone().header("x-plivo-signature-v3-nonce", "12345678901234567890")),
        ("junk", good.clone().header("x-plivo-signature-v3", "AAAA").header("x-plivo-signature-ma-v3", "AAAA")),
    ] {
        assert_refused(&stack, &intake, what, &event, "bad_signature", "x-plivo-signature-v3").await?;
    }
    assert_eq!(good.send(&intake).await?.status, 200, "the right one is still taken");
    Ok(())
}

#[tokio::test]
async fn a_tampered_token_is_403_and_leaves_no_row_anywhere() -> Result<()> {
    let (stack, campaign, calls) = calls(1).await?;
    let (intake, call, secrets) = (stack.intake()?, &calls[0], stack.keys.secrets()?);
    let token = token_of(call, &secrets)?;
    let sign =
        |url: &str| signed_callback(&campaign.carrier.auth_token, url, &[("CallUUID", "x"), ("Event", "Hangup")]);
    let good = token.encode(&secrets.callback_keys, "plivo", CallbackEvent::Hangup).context("no key")?;
    let mut flipped = good.clone().into_bytes();
    flipped[10] = if flipped[10] == b'A' { b'B' } else { b'A' };
    let mut foreign = secrets.callback_keys.clone();
    foreign[0].key = vec![9; 32];
    let others = token.encode(&foreign, "plivo", CallbackEvent::Hangup).context("no key")?;
    let of_ring = token.encode(&secrets.callback_keys, "plivo", CallbackEvent::Ring).context("no key")?;
    for (what, token) in [
        ("a changed token", String::from_utf8(flipped)?),
        ("a token of another key", others),
        ("a token for another event", of_ring),
        ("half a token", good[..good.len() / 2].to_owned()),
        ("no token", "x".to_owned()),
    ] {
        assert_refused(
            &stack,
            &intake,
            what,
            &sign(&callback_url(CallbackEvent::Hangup, &token))?,
            "bad_token",
            "token",
        )
        .await?;
    }
    Ok(())
}

/// Fails unless nothing changed but the events that are kept.
async fn assert_only_kept(stack: &Stack, before: &Fingerprint) -> Result<()> {
    let changed = before.changed(&Fingerprint::of(&stack.sql).await?);
    assert!(!changed.is_empty(), "it is kept");
    assert!(changed.iter().all(|table| table.starts_with("private.webhook_event")), "{changed:?}");
    Ok(())
}

#[tokio::test]
async fn an_unknown_attempt_is_kept_and_changes_no_business_row() -> Result<()> {
    let (stack, campaign, calls) = calls(1).await?;
    let (intake, secrets) = (stack.intake()?, stack.keys.secrets()?);
    let stranger = CallbackToken { attempt_id: Uuid::now_v7(), ..token_of(&calls[0], &secrets)? };
    let token = stranger.encode(&secrets.callback_keys, "plivo", CallbackEvent::Hangup).context("no key")?;
    let event = signed_callback(
        &campaign.carrier.auth_token,
        &callback_url(CallbackEvent::Hangup, &token),
        &[("CallUUID", "stranger"), ("CallStatus", "completed"), ("Event", "Hangup"), ("BillDuration", "60")],
    )?;
    let before = Fingerprint::of(&stack.sql).await?;
    let answer = event.send(&intake).await?;
    answer.assert_error_at(202, "unknown_attempt", "attempt_id");
    assert_eq!(answer.json()["result"], "orphan");
    assert_only_kept(&stack, &before).await?;
    assert_eq!(
        stack.value("select status || ' ' || error from private.webhook_events").await?,
        "orphan unknown_attempt"
    );
    Ok(())
}

#[tokio::test]
async fn a_second_call_for_one_attempt_is_told_to_a_person_and_changes_no_business_row() -> Result<()> {
    let (stack, campaign, calls) = calls(1).await?;
    let intake = stack.intake()?;
    assert_eq!(campaign.carrier.ring(&calls[0])?.send(&intake).await?.status, 200);
    let before = Fingerprint::of(&stack.sql).await?;
    let twin = Create { call_uuid: Uuid::new_v4(), ..calls[0].clone() };
    let answer = campaign.carrier.hangup(&twin, &TALKED)?.send(&intake).await?;
    answer.assert_error_at(202, "unknown_attempt", "attempt_id");
    let changed = before.changed(&Fingerprint::of(&stack.sql).await?);
    assert!(
        changed.iter().all(|table| table.starts_with("private.webhook_event") || table == "private.outbox"),
        "{changed:?}"
    );
    let alarm = stack
        .value("select payload ->> 'provider_call_id' from private.outbox where topic = 'alarm.duplicate_dial'")
        .await?;
    assert_eq!(alarm, twin.call_uuid.to_string());
    Ok(())
}

#[tokio::test]
async fn a_signed_form_that_names_no_call_is_kept_as_ignored() -> Result<()> {
    let (stack, campaign, calls) = calls(1).await?;
    let before = Fingerprint::of(&stack.sql).await?;
    let event = signed_callback(&campaign.carrier.auth_token, &calls[0].hangup_url, &[("Nothing", "of use")])?;
    let answer = event.send(&stack.intake()?).await?;
    assert_eq!((answer.status, answer.json()), (200, json!({ "result": "ignored" })));
    assert_only_kept(&stack, &before).await
}

#[tokio::test]
async fn a_body_over_the_limit_is_413_and_leaves_no_row_anywhere() -> Result<()> {
    let (stack, campaign, calls) = calls(1).await?;
    let intake = stack.intake()?;
    let before = Fingerprint::of(&stack.sql).await?;
    let large = "x".repeat(512 * 1024);
    let event =
        signed_callback(&campaign.carrier.auth_token, &calls[0].hangup_url, &[("CallUUID", "x"), ("Large", &large)])?;
    let answer = event.send(&intake).await?;
    answer.assert_error_at(413, "body_too_large", "body");
    before.assert_same(&Fingerprint::of(&stack.sql).await?);
    let fitting = "x".repeat(512 * 1024 - 200);
    let event = signed_callback(&campaign.carrier.auth_token, &calls[0].hangup_url, &[("Large", &fitting)])?;
    assert_eq!(event.send(&intake).await?.status, 200, "what is within the limit is taken");
    Ok(())
}

#[tokio::test]
async fn a_body_that_is_not_what_its_event_says_is_400() -> Result<()> {
    let (stack, campaign, calls) = calls(1).await?;
    let before = Fingerprint::of(&stack.sql).await?;
    let mut payload = campaign.carrier.hangup(&calls[0], &TALKED)?.payload();
    payload["body"] = json!("%%% not base64");
    let answer = events::invoke(&stack.intake()?, payload).await?;
    let body: Value = serde_json::from_str(answer["body"].as_str().unwrap_or_default())?;
    assert_eq!(
        (&answer["statusCode"], &body["code"], &body["details"]["field"]),
        (&json!(400), &json!("malformed_request"), &json!("body"))
    );
    before.assert_same(&Fingerprint::of(&stack.sql).await?);
    Ok(())
}

#[tokio::test]
async fn what_is_not_served_is_told_apart() -> Result<()> {
    let (stack, campaign, calls) = calls(1).await?;
    let (intake, token) = (
        stack.intake()?,
        calls[0].ring_url.split('#').next().and_then(|url| url.rsplit('/').next()).unwrap_or_default(),
    );
    let base = "/functions/v1/webhook-intake";
    let send = async |method: &'static str, path: &str| HttpEvent::new(method, path).send(&intake).await;
    send("POST", &format!("{base}/pigeon/ring/{token}")).await?.assert_error_at(404, "not_found", "carrier");
    send("POST", &format!("{base}/plivo/sneeze/{token}")).await?.assert_error_at(404, "not_found", "event");
    send("POST", &format!("{base}/nothing")).await?.assert_error(404, "not_found");
    send("GET", &format!("{base}/plivo/ring/{token}")).await?.assert_error(405, "method_not_allowed");
    let preflight = send("OPTIONS", &format!("{base}/plivo/ring/{token}")).await?;
    assert_eq!((preflight.status, &preflight.headers["access-control-allow-origin"]), (204, &json!("*")));
    drop(campaign);
    Ok(())
}
