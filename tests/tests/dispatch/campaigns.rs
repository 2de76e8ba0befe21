//! Campaigns under a user's own token, and who is turned away.

use super::*;

#[tokio::test]
async fn a_paused_campaign_dials_nobody_and_a_resumed_one_does() -> Result<()> {
    let (stack, campaign) = running(3).await?;
    let act = async |action| campaign_action(&campaign.tenant, campaign.id, action).send(&campaign.dispatch).await;
    release(&campaign.dispatch).await?;
    let paused = act("pause").await?;
    assert_eq!((paused.status, &paused.json()["status"]), (200, &json!("paused")));
    // Three are on the queue already: they are not begun.
    stack.dial_queue.deliver(&campaign.dispatch).await?;
    assert_eq!((campaign.carrier.creates().len(), release(&campaign.dispatch).await?["sent"].clone()), (0, json!(0)));
    assert_eq!(
        stack.value("select string_agg(distinct call_status || ' ' || dialled, ',') from public.call_logs").await?,
        "cancelled false"
    );
    assert_eq!(
        stack.value("select string_agg(distinct status || ' ' || attempt_count, ',') from public.call_queue").await?,
        "queued 0"
    );
    act("pause").await?.assert_error(409, "invalid_transition");

    assert_eq!(act("resume").await?.json()["status"], "running");
    assert_eq!(campaign.dial(&stack).await?.len(), 3);
    act("start").await?.assert_error_at(409, "invalid_transition", "status");
    Ok(())
}

#[tokio::test]
async fn a_cancelled_campaign_is_over_but_for_the_calls_under_way() -> Result<()> {
    let (stack, campaign) = running(2).await?;
    campaign.carrier.react(&phones(1, 2)[1], Reaction::Defer(60));
    let call =
        campaign.dial(&stack).await?.into_iter().find(|call| call.to == phones(1, 2)[0]).context("not dialled")?;
    let cancelled = campaign_action(&campaign.tenant, campaign.id, "cancel").send(&campaign.dispatch).await?;
    assert_eq!((cancelled.status, &cancelled.json()["status"]), (200, &json!("cancelled")));
    assert_eq!(cancelled.json()["counts"]["skipped"], 1, "{}", cancelled.body);
    campaign.carrier.hangup(&call, &TALKED)?.send(&stack.intake()?).await?;
    let after =
        HttpEvent::get(&format!("/functions/v1/call-dispatch/campaigns/{}", campaign.id)).bearer(campaign.tenant.jwt());
    let after = after.send(&campaign.dispatch).await?.json();
    assert_eq!((&after["counts"]["called"], &after["open_leads"]), (&json!(1), &json!(0)), "{after:#}");
    stack.set_clock("2026-11-24T15:00:00+05:30").await?;
    assert_eq!(release(&campaign.dispatch).await?["sent"], 0);
    for action in ["start", "pause", "resume", "cancel"] {
        let refused = campaign_action(&campaign.tenant, campaign.id, action).send(&campaign.dispatch).await?;
        refused.assert_error_at(409, "invalid_transition", "status");
    }
    Ok(())
}

#[tokio::test]
async fn another_organization_s_campaign_is_not_there() -> Result<()> {
    let (stack, campaign) = running(2).await?;
    let stranger = scene::sign_up(&stack, "Other Ltd").await?;
    let before = Fingerprint::of(&stack.sql).await?;
    for action in ["start", "pause", "resume", "cancel"] {
        let answer = campaign_action(&stranger, campaign.id, action).send(&campaign.dispatch).await?;
        answer.assert_error_at(404, "campaign_not_found", "campaign_id");
        let unknown = campaign_action(&stranger, Uuid::new_v4(), action).send(&campaign.dispatch).await?;
        assert_eq!(unknown.body, answer.body, "nobody can tell it from one that does not exist");
    }
    let read = HttpEvent::get(&format!("/functions/v1/call-dispatch/campaigns/{}", campaign.id)).bearer(stranger.jwt());
    read.send(&campaign.dispatch).await?.assert_error_at(404, "campaign_not_found", "campaign_id");
    before.assert_same(&Fingerprint::of(&stack.sql).await?);
    Ok(())
}

#[tokio::test]
async fn a_token_that_is_expired_missing_or_nobody_s_is_401() -> Result<()> {
    let (stack, campaign) = running(1).await?;
    let path = format!("/functions/v1/call-dispatch/campaigns/{}/pause", campaign.id);
    let mut expired = stack.keys.user_claims(campaign.tenant.owner.id, &campaign.tenant.owner.email);
    (expired.iat, expired.exp) = (expired.iat - 7_200, expired.exp - 2 * 24 * 3_600);
    let foreign = local::parts::keys::Keys::generate("http://127.0.0.1:1")?
        .user_jwt(campaign.tenant.owner.id, "a@example.com")?;
    let before = Fingerprint::of(&stack.sql).await?;
    for (what, token) in
        [("expired", stack.keys.sign(&expired)?), ("another issuer's", foreign), ("junk", "a.b.c".to_owned())]
    {
        let answer = HttpEvent::post(&path).bearer(&token).send(&campaign.dispatch).await?;
        println!("{what}: {}", answer.body);
        answer.assert_error(401, "invalid_token");
    }
    for token in [None, Some(stack.keys.publishable_key.clone()), Some(stack.keys.secret_key.clone())] {
        let request = HttpEvent::post(&path);
        let request = token.iter().fold(request, |request, token| request.bearer(token));
        request.send(&campaign.dispatch).await?.assert_error_at(401, "unauthorized", "authorization");
    }
    before.assert_same(&Fingerprint::of(&stack.sql).await?);
    Ok(())
}

#[tokio::test]
async fn a_request_that_is_malformed_says_where() -> Result<()> {
    let (stack, campaign) = running(1).await?;
    let before = Fingerprint::of(&stack.sql).await?;
    let post = |path: &str| {
        HttpEvent::post(&format!("/functions/v1/call-dispatch/campaigns{path}")).bearer(campaign.tenant.jwt())
    };
    let send = async |event: HttpEvent| event.send(&campaign.dispatch).await;
    send(post("/not-a-uuid/start")).await?.assert_error_at(400, "malformed_request", "campaign_id");
    send(post("").header("content-type", "application/json").body("{\"name\":")).await?.assert_error_at(
        400,
        "malformed_request",
        "body",
    );
    send(post("").json(&json!({ "settings": {} }))?).await?.assert_error_at(400, "malformed_request", "body");
    send(post("").json(&json!({ "name": "" }))?).await?.assert_error_at(422, "invalid_name", "name");
    let zone = json!({ "name": "x", "settings": { "timezone": "Mars/Olympus" } });
    send(post("").json(&zone)?).await?.assert_error_at(422, "invalid_timezone", "timezone");
    send(post(&format!("/{}/sneeze", campaign.id))).await?.assert_error_at(404, "not_found", "action");
    send(post("").header("content-type", "application/json").body(vec![b' '; 1024 * 1024 + 1])).await?.assert_error_at(
        413,
        "body_too_large",
        "body",
    );
    send(
        HttpEvent::new("DELETE", &format!("/functions/v1/call-dispatch/campaigns/{}", campaign.id))
            .bearer(campaign.tenant.jwt()),
    )
    .await?
    .assert_error(405, "method_not_allowed");
    before.assert_same(&Fingerprint::of(&stack.sql).await?);
    Ok(())
}
