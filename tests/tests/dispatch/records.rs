//! Truth from the carrier, and the sockets of agents.

use super::*;
use chrono::{TimeDelta, Utc};
use shared::telephony::stream_token;

#[tokio::test]
async fn a_day_s_records_are_fetched_page_by_page_and_what_differs_is_corrected() -> Result<()> {
    let (stack, campaign) = running(1).await?;
    let call = campaign.dial(&stack).await?.pop().context("not dialled")?;
    campaign.carrier.hangup(&call, &TALKED)?.send(&stack.intake()?).await?;
    let day = (Utc::now() - TimeDelta::hours(4)).date_naive().pred_opt().context("a day before")?;
    let time = |at: &str| format!("{day} {at}+00:00");
    stack.sql.batch_execute(&format!("update public.call_logs set begun_at = '{}'", time("12:00:00"))).await?;
    let record = |id: &str, seconds: i64| {
        json!({
            "call_uuid": id, "from_number": "1", "to_number": "2", "initiation_time": time("12:00:00"), "answer_time": time("12:00:01"),
            "end_time": time("12:05:00"), "call_duration": seconds, "bill_duration": seconds, "call_state": "ANSWER",
        })
    };
    campaign.carrier.keep_record(record(&call.call_uuid.to_string(), 240));
    for stranger in 0..20 {
        campaign.carrier.keep_record(record(&format!("stranger-{stranger}"), 60));
    }
    assert_eq!(
        events::job(&campaign.dispatch, "records").await?,
        json!({ "pages": 2, "days": 1, "differences": 21 }),
        "the twenty-first record is on the second page"
    );
    assert_eq!(stack.value("select bill_duration_seconds from public.call_logs").await?, "240");
    assert_eq!(
        stack
            .value("select string_agg(told, ', ' order by told) from (select kind || ' ' || count(*) from private.carrier_differences group by kind) as counted (told)")
            .await?,
        "call_without_attempt 20, other_seconds 1"
    );
    assert_eq!(events::job(&campaign.dispatch, "records").await?["pages"], 0, "a day is compared once");
    Ok(())
}

#[tokio::test]
async fn an_agent_s_socket_is_opened_by_its_token_once_and_forgotten() -> Result<()> {
    let (stack, campaign) = running(1).await?;
    let call = campaign.dial(&stack).await?.pop().context("not dialled")?;
    let secrets = stack.keys.secrets()?;
    let token = token_of(&call, &secrets)?;
    let (intake, now) = (stack.intake()?, Utc::now().timestamp());
    let good =
        |until| stream_token::sign(&secrets.callback_keys, token.agent_id, token.attempt_id, until).unwrap_or_default();
    let tell = async |stream: &str, action: &str, id: &str| {
        let path = format!("/functions/v1/webhook-intake/streams/{}/{stream}/{action}", token.attempt_id);
        HttpEvent::post(&path).json(&json!({ "connection_id": id }))?.send(&intake).await
    };
    let stream = good(now + 60);
    tell(&good(now - 1), "open", "a").await?.assert_error_at(403, "bad_token", "token");
    tell(&format!("{}x", good(now + 60)), "open", "a").await?.assert_error_at(403, "bad_token", "token");
    assert_eq!(tell(&stream, "open", "a").await?.status, 200);
    assert_eq!(
        stack.value("select kind || ' ' || (call_log_id is not null) from public.websocket_sessions").await?,
        "agent true"
    );
    tell(&stream, "open", "b").await?.assert_error(409, "already_connected");
    assert_eq!(tell(&good(now - 1), "ping", "a").await?.json(), json!({ "gone": false }), "it may outlive its token");
    assert_eq!(tell(&stream, "ping", "b").await?.json(), json!({ "gone": true }));
    let transfer = async |stream: &str, to: &str| {
        let path = format!("/functions/v1/webhook-intake/streams/{}/{stream}/transfer", token.attempt_id);
        HttpEvent::post(&path).json(&json!({ "to": to }))?.send(&intake).await
    };
    let verdict = transfer(&stream, "+918044445555").await?.json();
    assert_eq!(verdict, json!({ "allowed": true, "reason": null }));
    let verdict = transfer(&stream, "+19005550100").await?.json();
    assert_eq!(verdict, json!({ "allowed": false, "reason": "destination_blocked" }));
    transfer(&format!("{stream}x"), "+918044445555").await?.assert_error_at(403, "bad_token", "token");
    stack.sql.batch_execute("update public.websocket_sessions set last_ping_at = now() - interval '2 minutes'").await?;
    events::job(&campaign.dispatch, "reconcile").await?;
    assert_eq!(tell(&stream, "ping", "a").await?.json(), json!({ "gone": true }), "silent for too long");
    assert_eq!(tell(&stream, "close", "a").await?.status, 200);
    Ok(())
}
