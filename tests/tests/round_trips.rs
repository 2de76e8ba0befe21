//! Requests to PostgREST, counted at a proxy in front of it: one a webhook, a release and a tick, two a batch of dials. The look-up of a
//! carrier account is cached, and counted apart.

use anyhow::Result;
use serde_json::json;
use tests::{
    Stack,
    callbacks::{TALKED, callback_url},
    carrier::signed_callback,
    events::{self, HttpEvent},
    queues::hand_over,
    scene::{self, campaign_action, phones},
    supervisor_binary,
};

const LOOK_UP: &str = "/rpc/open_source";

#[tokio::test]
async fn one_request_a_webhook() -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    let campaign = scene::running_campaign(&stack, &phones(1, 2)).await?;
    let (calls, intake, secrets) = (campaign.dial(&stack).await?, stack.intake()?, stack.keys.secrets()?);
    stack.proxy.take();
    for (place, call) in calls.iter().enumerate() {
        let carrier = &campaign.carrier;
        for event in [
            carrier.ring(call)?,
            carrier.answer(call)?,
            carrier.recording(call, &secrets)?,
            carrier.hangup(call, &TALKED)?,
        ] {
            assert_eq!(event.send(&intake).await?.status, 200);
        }
        let mut paths = stack.proxy.take_paths();
        let look_ups = paths.extract_if(.., |path| path == LOOK_UP).count();
        assert_eq!(look_ups, usize::from(place == 0), "the account is looked up once, for all events");
        assert_eq!(paths, ["/rpc/apply_event"; 4]);
    }
    let repeated = campaign.carrier.hangup(&calls[0], &TALKED)?;
    repeated.send(&intake).await?;
    assert_eq!(stack.proxy.take_paths(), ["/rpc/apply_event"], "a duplicate too");
    Ok(())
}

#[tokio::test]
async fn no_request_for_what_the_url_or_the_size_refuses() -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    let campaign = scene::running_campaign(&stack, &phones(1, 1)).await?;
    let (call, intake) = (campaign.dial(&stack).await?.remove(0), stack.intake()?);
    stack.proxy.take();
    let hangup = callback_url(shared::telephony::CallbackEvent::Hangup, "not-a-token");
    let large = "x".repeat(512 * 1024);
    for event in [
        signed_callback(&campaign.carrier.auth_token, &hangup, &[("CallUUID", "x")])?,
        signed_callback(&campaign.carrier.auth_token, &call.hangup_url, &[("CallUUID", &large)])?,
        HttpEvent::new("OPTIONS", "/functions/v1/webhook-intake/plivo/ring/x"),
        HttpEvent::post("/functions/v1/webhook-intake/nothing"),
        HttpEvent::post("/functions/v1/webhook-intake/nudge"),
    ] {
        event.send(&intake).await?;
    }
    assert_eq!(stack.proxy.take_paths(), [""; 0]);
    Ok(())
}

#[tokio::test]
async fn one_request_a_release_and_two_a_batch_of_dials() -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    let campaign = scene::running_campaign(&stack, &phones(1, 14)).await?;
    stack.proxy.take();
    assert_eq!(events::job(&campaign.dispatch, "release").await?["sent"], 14);
    assert_eq!(stack.proxy.take_paths(), ["/rpc/release_calls"]);
    for expected in [10, 4] {
        let messages = stack.dial_queue.receive().await?;
        assert_eq!(messages.len(), expected);
        assert!(hand_over(&campaign.dispatch, &messages).await?.is_empty());
        assert_eq!(stack.proxy.take_paths(), ["/rpc/begin_dials", "/rpc/record_dials"]);
        assert!(hand_over(&campaign.dispatch, &messages).await?.is_empty());
        assert_eq!(stack.proxy.take_paths(), ["/rpc/begin_dials"], "nothing was begun, so there is nothing to record");
    }
    assert_eq!(campaign.carrier.creates().len(), 14);
    assert_eq!(events::job(&campaign.dispatch, "release").await?["sent"], 0);
    assert_eq!(stack.proxy.take_paths(), ["/rpc/release_calls"]);
    Ok(())
}

#[tokio::test]
async fn one_request_a_tick() -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    let campaign = scene::running_campaign(&stack, &phones(1, 3)).await?;
    campaign.dial(&stack).await?;
    stack.sql.batch_execute("update public.call_logs set lease_until = now() - interval '1 second'").await?;
    stack.proxy.take();
    assert_eq!(events::job(&campaign.dispatch, "reconcile").await?["asked"], 3);
    assert_eq!(stack.proxy.take_paths(), ["/rpc/reconcile_calls"]);
    events::job(&stack.intake()?, "sweep").await?;
    assert_eq!(stack.proxy.take_paths(), ["/rpc/sweep_events"]);
    stack.set_clock("2026-12-24T00:05:00+05:30").await?;
    assert_eq!(events::job(&stack.invoicing()?, "close_periods").await?["closed"], 1);
    assert_eq!(stack.proxy.take_paths(), ["/rpc/close_periods"]);
    Ok(())
}

#[tokio::test]
async fn one_request_a_buffered_event() -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    let campaign = scene::running_campaign(&stack, &phones(1, 3)).await?;
    let (calls, intake) = (campaign.dial(&stack).await?, stack.intake()?);
    campaign.carrier.ring(&calls[0])?.send(&intake).await?;
    stack.postgrest.kill().await?;
    for call in &calls {
        assert_eq!(campaign.carrier.hangup(call, &TALKED)?.send(&intake).await?.status, 202);
    }
    stack.postgrest.restart().await?;
    stack.proxy.take();
    assert_eq!(stack.intake_queue.deliver(&intake).await?.messages, 3);
    assert_eq!(stack.proxy.take_paths(), ["/rpc/apply_event"; 3]);
    Ok(())
}

#[tokio::test]
async fn one_request_for_what_a_user_asks() -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    let campaign = scene::running_campaign(&stack, &phones(1, 2)).await?;
    let (tenant, metering, invoicing) = (&campaign.tenant, stack.metering()?, stack.invoicing()?);
    let key = scene::create_api_key(&stack, tenant).await?;
    stack.proxy.take();
    for (action, function) in
        [("pause", "pause_campaign"), ("resume", "resume_campaign"), ("cancel", "cancel_campaign")]
    {
        assert_eq!(campaign_action(tenant, campaign.id, action).send(&campaign.dispatch).await?.status, 200);
        assert_eq!(stack.proxy.take_paths(), [format!("/rpc/{function}")]);
    }
    HttpEvent::get(&format!("/functions/v1/call-dispatch/campaigns/{}", campaign.id))
        .bearer(tenant.jwt())
        .send(&campaign.dispatch)
        .await?;
    assert_eq!(stack.proxy.take_paths(), ["/rpc/get_campaign"]);
    HttpEvent::get("/functions/v1/usage-metering/usage").bearer(tenant.jwt()).send(&metering).await?;
    assert_eq!(stack.proxy.take_paths(), ["/rpc/get_usage_overview"]);
    let events: Vec<_> = (0..50)
        .map(|n| json!({ "id": n.to_string(), "source": "crm", "type": "sms_messages", "data": { "quantity": 1 } }))
        .collect();
    let posted = HttpEvent::post("/functions/v1/usage-metering/usage/events")
        .bearer(&key)
        .json(&events)?
        .send(&metering)
        .await?;
    assert_eq!(posted.status, 200, "{}", posted.body);
    assert_eq!(stack.proxy.take_paths(), ["/rpc/record_usage"]);
    HttpEvent::get("/functions/v1/invoice-generation/invoices").bearer(tenant.jwt()).send(&invoicing).await?;
    HttpEvent::get(&format!("/functions/v1/invoice-generation/invoices/{}", uuid::Uuid::new_v4()))
        .bearer(tenant.jwt())
        .send(&invoicing)
        .await?;
    assert_eq!(stack.proxy.take_paths(), ["/invoices", "/rpc/get_invoice"]);
    Ok(())
}
