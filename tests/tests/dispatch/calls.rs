//! Single calls and manual retries under a user's own token.

use super::*;

async fn lead(stack: &Stack, phone: &str) -> Result<String> {
    stack.value(&format!("select id from public.leads where phone = '{phone}'")).await
}

fn place(campaign: &Campaign, lead: &str) -> Result<HttpEvent> {
    HttpEvent::post("/functions/v1/call-dispatch/calls")
        .bearer(campaign.tenant.jwt())
        .json(&json!({ "campaign_id": campaign.id, "lead_id": lead }))
}

#[tokio::test]
async fn a_single_call_is_made_though_its_campaign_is_paused_and_names_the_gate_that_is_shut() -> Result<()> {
    let (stack, campaign) = running(2).await?;
    campaign_action(&campaign.tenant, campaign.id, "pause").send(&campaign.dispatch).await?;
    let phone = &phones(1, 2)[0];
    let lead = lead(&stack, phone).await?;
    let placed = place(&campaign, &lead)?.send(&campaign.dispatch).await?;
    assert_eq!((placed.status, &placed.json()["status"]), (202, &json!("created")), "{}", placed.body);
    stack.dial_queue.deliver(&campaign.dispatch).await?;
    let call = campaign.carrier.creates().pop().context("not dialled")?;
    assert_eq!((&call.to, campaign.carrier.creates().len()), (phone, 1));
    assert_eq!(json!(token_of(&call, &stack.keys.secrets()?)?.attempt_id), placed.json()["attempt_id"]);

    let again = place(&campaign, &lead)?.send(&campaign.dispatch).await?;
    again.assert_error_at(422, "call_refused", "lead_id");
    assert_eq!(again.json()["details"]["reason"], "number_in_call", "{}", again.body);
    campaign.carrier.hangup(&call, &TALKED)?.send(&stack.intake()?).await?;
    let soon = place(&campaign, &lead)?.send(&campaign.dispatch).await?;
    assert_eq!(soon.json()["details"]["reason"], "min_gap", "{}", soon.body);
    assert!(soon.json()["details"]["next_at"].is_string(), "{}", soon.body);

    let stranger = scene::sign_up(&stack, "Other Ltd").await?;
    let theirs = HttpEvent::post("/functions/v1/call-dispatch/calls").bearer(stranger.jwt());
    theirs
        .json(&json!({ "campaign_id": campaign.id, "lead_id": lead }))?
        .send(&campaign.dispatch)
        .await?
        .assert_error_at(404, "campaign_not_found", "campaign_id");
    let nobody = HttpEvent::post("/functions/v1/call-dispatch/calls").bearer(campaign.tenant.jwt()).json(&json!({}))?;
    nobody.send(&campaign.dispatch).await?.assert_error_at(400, "malformed_request", "body");
    Ok(())
}

#[tokio::test]
async fn a_failed_call_is_retried_by_hand_and_one_that_was_answered_is_not() -> Result<()> {
    let (stack, campaign) = running(2).await?;
    campaign.carrier.react(&phones(1, 2)[1], Reaction::Refuse(400, "to number is invalid"));
    campaign.dial(&stack).await?;
    let retry = async |phone: &str| {
        let id = attempts(&stack, phone).await?.pop().context("not called")?["id"].clone();
        let path = format!("/functions/v1/call-dispatch/calls/{}/retry", id.as_str().unwrap_or_default());
        HttpEvent::post(&path).bearer(campaign.tenant.jwt()).send(&campaign.dispatch).await
    };
    retry(&phones(1, 2)[0]).await?.assert_error_at(409, "invalid_transition", "call_id");
    assert_eq!(waiting(&stack, &phones(1, 2)[1]).await?.0, "failed");
    let retried = retry(&phones(1, 2)[1]).await?;
    assert_eq!((retried.status, &retried.json()["status"]), (202, &json!("queued")), "{}", retried.body);
    campaign.carrier.react(&phones(1, 2)[1], Reaction::Accept);
    let called = campaign.dial(&stack).await?;
    assert_eq!(callees(&called), BTreeSet::from([phones(1, 2)[1].clone()]));
    Ok(())
}

#[tokio::test]
async fn a_scheduled_campaign_starts_on_its_date() -> Result<()> {
    let (stack, running) = running(1).await?;
    let later =
        scene::create_campaign(&running.dispatch, &running.tenant, json!({ "start_date": "2026-11-25" })).await?;
    let scheduled = campaign_action(&running.tenant, later, "schedule").send(&running.dispatch).await?;
    assert_eq!((scheduled.status, &scheduled.json()["status"]), (200, &json!("scheduled")), "{}", scheduled.body);
    campaign_action(&running.tenant, running.id, "pause").send(&running.dispatch).await?;
    assert_eq!(running.dial(&stack).await?.len(), 0);
    stack.set_clock("2026-11-25T10:00:00+05:30").await?;
    assert_eq!(running.dial(&stack).await?.len(), 1);
    Ok(())
}
