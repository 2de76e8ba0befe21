//! The database's word that there is work.

use super::*;

/// A nudge as the database sends it, or as somebody pretends to.
fn nudge(key: &str, at: i64, body: &str) -> Result<HttpEvent> {
    let signature = standard_webhooks::sign(key, "msg_1", at, body.as_bytes()).context("no key")?;
    Ok(HttpEvent::post("/functions/v1/call-dispatch/nudge")
        .header("content-type", "application/json")
        .header("webhook-id", "msg_1")
        .header("webhook-timestamp", at.to_string())
        .header("webhook-signature", signature)
        .body(body))
}

#[tokio::test]
async fn a_nudge_releases_only_when_it_is_signed() -> Result<()> {
    let (stack, campaign) = running(2).await?;
    let (key, now, body) = (stack.keys.nudge_key(), chrono::Utc::now().timestamp(), r#"{"type": "nudge"}"#);
    let another = "whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
    let before = Fingerprint::of(&stack.sql).await?;
    for forged in [
        nudge(another, now, body)?,
        nudge(key, now - 301, body)?,
        nudge(key, now, body)?.body(r#"{"type": "other"}"#),
        nudge(key, now, body)?.header("webhook-id", "msg_2"),
        HttpEvent::post("/functions/v1/call-dispatch/nudge"),
    ] {
        forged.send(&campaign.dispatch).await?.assert_error(403, "bad_signature");
    }
    before.assert_same(&Fingerprint::of(&stack.sql).await?);
    let answer = nudge(key, now, body)?.send(&campaign.dispatch).await?;
    assert_eq!((answer.status, answer.json()), (200, json!({ "sent": 2, "unsent": 0 })));
    Ok(())
}

#[tokio::test]
async fn the_database_s_own_nudge_is_one_that_is_taken() -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    let admin = stack.database.connect(local::parts::postgres::Role::Admin).await?;
    for (name, value) in [
        ("trunkline_functions_url", "https://calls.example.com/functions/v1"),
        ("trunkline_nudge_key", stack.keys.nudge_key()),
    ] {
        admin.execute("select vault.create_secret($1, $2)", &[&value, &name]).await?;
    }
    let campaign = scene::running_campaign(&stack, &phones(1, 2)).await?;
    let row = admin
        .query_one("select url, headers, convert_from(body, 'utf8') from net.http_request_queue", &[])
        .await
        .context("one request a transaction")?;
    let (url, headers, body): (String, Value, String) = (row.get(0), row.get(1), row.get(2));
    assert_eq!(url, "https://calls.example.com/functions/v1/call-dispatch/nudge");
    let mut event = HttpEvent::post("/functions/v1/call-dispatch/nudge").body(body);
    for (name, value) in headers.as_object().into_iter().flatten() {
        event = event.header(name, value.as_str().unwrap_or_default());
    }
    let answer = event.send(&campaign.dispatch).await?;
    assert_eq!((answer.status, answer.json()), (200, json!({ "sent": 2, "unsent": 0 })), "{headers}");
    Ok(())
}

#[tokio::test]
async fn a_nudge_takes_what_the_pace_has_now_and_the_schedule_waits_for_the_rest() -> Result<()> {
    let (stack, campaign) = running(5).await?;
    stack.sql.batch_execute("update public.carrier_accounts set max_calls_per_second = 2").await?;
    let (key, now, body) = (stack.keys.nudge_key(), chrono::Utc::now().timestamp(), r#"{"type": "nudge"}"#);
    let nudged = nudge(key, now, body)?.send(&campaign.dispatch).await?;
    assert_eq!(
        (nudged.status, nudged.json()),
        (200, json!({ "sent": 2, "unsent": 0 })),
        "a second's worth, and it waits for none"
    );
    // No second passes for the account, however slow the machine is.
    stack
        .sql
        .batch_execute("update private.carrier_pace set tokens = 0, refilled_at = now() + interval '1 hour'")
        .await?;
    let again = nudge(key, now, body)?.send(&campaign.dispatch).await?;
    assert_eq!(again.json(), json!({ "sent": 0, "unsent": 0 }));
    stack.sql.batch_execute("update private.carrier_pace set refilled_at = now()").await?;
    assert_eq!(
        release(&campaign.dispatch).await?,
        json!({ "sent": 3, "unsent": 0 }),
        "the schedule goes on until all are on their way"
    );
    Ok(())
}
