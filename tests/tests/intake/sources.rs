//! Sources that are no carriers: who makes them, whose word is taken, and what becomes of a delivery that cannot be verified now.

use super::*;
use tests::{
    agents::{self, AgentSource, recorded},
    proxy::Trouble,
};
use uuid::Uuid;

/// A tenant with a source of this provider, and one call of theirs.
async fn connected(provider: &'static str) -> Result<(Stack, Campaign, Uuid, AgentSource, Intake)> {
    let (stack, campaign, calls) = calls(1).await?;
    let intake = stack.intake()?;
    let source = agents::connect(&stack, &intake, &campaign.tenant, provider, json!({})).await?;
    let attempt = token_of(&calls[0], &stack.keys.secrets()?)?.attempt_id;
    Ok((stack, campaign, attempt, source, intake))
}

fn rotate(source: &AgentSource, jwt: &str, asked: &Value) -> Result<HttpEvent> {
    HttpEvent::post(&format!("/functions/v1/webhook-intake/sources/{}/secrets", source.id)).bearer(jwt).json(asked)
}

#[tokio::test]
async fn who_may_not_sign_is_refused_and_leaves_no_row() -> Result<()> {
    let (stack, _campaign, attempt, source, intake) = connected("retell").await?;
    let body = recorded("retell", "call_started", attempt, "c")?;
    let stranger = AgentSource { secret: "not the key".to_owned(), ..source.clone() };
    let hour_ago = chrono::Utc::now().timestamp_millis() - 3_600_000;
    let before = Fingerprint::of(&stack.sql).await?;
    for (what, event, status, code) in [
        ("another key", stranger.deliver(&body), 403, "bad_signature"),
        ("an old one", source.deliver_at(&body, hour_ago), 403, "bad_signature"),
        ("no signature", source.deliver(&body).header("x-retell-signature", ""), 403, "bad_signature"),
        (
            "no such source",
            HttpEvent::post(&agents::path("retell", Uuid::new_v4())).body(body.as_bytes()),
            404,
            "not_found",
        ),
        (
            "another provider's",
            HttpEvent::post(&agents::path("vapi", source.id)).body(body.as_bytes()),
            404,
            "not_found",
        ),
        ("no provider", HttpEvent::post(&agents::path("nobody", source.id)).body(body.as_bytes()), 404, "not_found"),
        ("no id", HttpEvent::post("/functions/v1/webhook-intake/retell/x").body(body.as_bytes()), 404, "not_found"),
        ("a GET", HttpEvent::get(&agents::path("retell", source.id)), 405, "method_not_allowed"),
    ] {
        let answer = event.send(&intake).await?;
        println!("{what}: {} {}", answer.status, answer.body);
        answer.assert_error(status, code);
    }
    before.assert_same(&Fingerprint::of(&stack.sql).await?);
    assert_eq!(stack.intake_queue.waiting().await?, 0);
    assert_eq!(source.deliver(&body).send(&intake).await?.json(), json!({ "result": "applied" }));
    assert_eq!(source.deliver(&body).send(&intake).await?.json(), json!({ "result": "duplicate" }));
    Ok(())
}

#[tokio::test]
async fn what_is_authentic_and_not_understood_is_kept_as_ignored() -> Result<()> {
    let (stack, _campaign, _, source, intake) = connected("retell").await?;
    for (body, kind) in [
        ("{not json", "unreadable"),
        (r#"{"event":"call_levitated"}"#, "unknown"),
        (r#"{"a\u0000":"\u0000"}"#, "unknown"),
        ("\0", "unreadable"),
    ] {
        assert_eq!(source.deliver(body).send(&intake).await?.json(), json!({ "result": "ignored" }), "{body}");
        let kept = stack.value("select kind || ' ' || (length(error) > 5) || ' ' || (organization_id is not null) from private.webhook_events order by id desc limit 1").await?;
        assert_eq!(kept, format!("{kind} true true"), "{body}");
    }
    assert_eq!(
        stack.value("select field || ' ' || value || ' ' || seen from private.unmapped_values").await?,
        "event call_levitated 1"
    );
    Ok(())
}

#[tokio::test]
async fn one_delivery_is_one_request() -> Result<()> {
    let (stack, _campaign, attempt, source, intake) = connected("agent").await?;
    let told = |name: &str| recorded("agent", name, attempt, "c");
    source.deliver(&told("started")?).send(&intake).await?;
    stack.proxy.take();
    source.deliver(&told("ended")?).send(&intake).await?;
    assert_eq!(stack.proxy.take_paths(), ["/rpc/apply_event"]);
    Ok(())
}

#[tokio::test]
async fn without_its_secret_a_delivery_is_verified_when_it_is_drained_by_the_time_at_which_it_came() -> Result<()> {
    for provider in ["retell", "vapi"] {
        let (stack, _campaign, attempt, source, _) = connected(provider).await?;
        // A process that has never seen the source.
        let intake = stack.intake()?;
        let (name, kept) = if provider == "retell" {
            ("call_ended", "customer_ended")
        } else {
            ("status-update-ended", "customer_ended")
        };
        let body = recorded(provider, name, attempt, "c")?;
        let stranger = AgentSource { secret: "not the key".to_owned(), ..source.clone() };
        stack.postgrest.kill().await?;
        for event in [source.deliver(&body), stranger.deliver(&body.replace("hangup", "hungup"))] {
            let answer = event.send(&intake).await?;
            assert_eq!((answer.status, answer.json()), (202, json!({ "result": "buffered" })), "{provider}");
        }
        stack.postgrest.restart().await?;
        let delivered = stack.intake_queue.deliver(&intake).await?;
        assert_eq!((delivered.messages, delivered.failed), (2, 0), "{provider}");
        assert_eq!(stack.value("select disconnect_reason from public.call_logs").await?, kept, "{provider}");
        assert_eq!(
            stack.value("select count(*) from private.webhook_events").await?,
            "1",
            "the forged one leaves no row"
        );
        assert_eq!(source.deliver(&body).send(&intake).await?.json(), json!({ "result": "duplicate" }));
    }
    Ok(())
}

#[tokio::test]
async fn a_verified_delivery_waits_on_the_queue_while_the_database_takes_nothing() -> Result<()> {
    let (stack, _campaign, attempt, source, intake) = connected("agent").await?;
    source.deliver(&recorded("agent", "started", attempt, "c")?).send(&intake).await?;
    for (trouble, name) in [
        (Trouble::Delay(std::time::Duration::from_secs(30)), "ended"),
        (Trouble::Refuse("/rpc/apply_event"), "analyzed"),
    ] {
        stack.proxy.make(trouble);
        let answer = source.deliver(&recorded("agent", name, attempt, "c")?).send(&intake).await?;
        assert_eq!((answer.status, answer.json()), (202, json!({ "result": "buffered" })), "{name}");
    }
    stack.proxy.make(Trouble::None);
    assert_eq!(stack.intake_queue.deliver(&intake).await?.failed, 0);
    assert_eq!(
        stack.value("select summary || ' ' || disconnect_reason from public.call_logs").await?,
        "Short and friendly. silence"
    );
    Ok(())
}

#[tokio::test]
async fn a_rotated_secret_holds_on_as_long_as_it_is_told() -> Result<()> {
    let (stack, campaign, attempt, old, _) = connected("retell").await?;
    let jwt = campaign.tenant.jwt();
    let mut number = 0;
    let mut told = |source: &AgentSource| -> Result<HttpEvent> {
        number += 1;
        Ok(source.deliver(
            &recorded("retell", "call_started", attempt, "c")?.replace("agent_asha", &format!("agent_{number}")),
        ))
    };
    let new = AgentSource { secret: "the new key".to_owned(), ..old.clone() };
    let asked = json!({ "secret": new.secret, "keep_previous_seconds": 3600 });
    let answer = rotate(&old, jwt, &asked)?.send(&stack.intake()?).await?;
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert!(!answer.body.contains("the new key") && !answer.body.contains("sealed"), "{}", answer.body);
    let intake = stack.intake()?;
    for source in [&old, &new] {
        assert_eq!(told(source)?.send(&intake).await?.status, 200);
    }
    // A second rotation at once: of three secrets the newest alone is left.
    let newest = AgentSource { secret: "the newest key".to_owned(), ..old.clone() };
    rotate(&old, jwt, &json!({ "secret": newest.secret, "keep_previous_seconds": 0 }))?.send(&intake).await?;
    let intake = stack.intake()?;
    for (source, status) in [(&old, 403), (&new, 403), (&newest, 200)] {
        assert_eq!(told(source)?.send(&intake).await?.status, status);
    }
    // What is due to end is judged by the time, not by the cache alone.
    stack.sql.batch_execute("update public.webhook_sources set secrets_sealed = secrets_sealed || secrets_sealed, previous_until = now() - interval '1 second'").await?;
    let opened = stack.value("select private.open_source(jsonb_build_object('source_id', id), now()) -> 'secrets_sealed' from public.webhook_sources").await?;
    assert_eq!(serde_json::from_str::<Vec<String>>(&opened)?.len(), 1);
    Ok(())
}

#[tokio::test]
async fn a_source_that_is_turned_off_changes_nothing_even_where_it_is_remembered() -> Result<()> {
    let (stack, campaign, attempt, source, intake) = connected("agent").await?;
    source.deliver(&recorded("agent", "started", attempt, "c")?).send(&intake).await?;
    stack
        .rpc(campaign.tenant.jwt(), "set_webhook_source_active", &json!({ "source_id": source.id, "is_active": false }))
        .await?;
    let answer = source.deliver(&recorded("agent", "ended", attempt, "c")?).send(&intake).await?;
    assert_eq!((answer.status, &answer.json()["result"]), (202, &json!("orphan")));
    assert_eq!(
        stack.value("select error from private.webhook_events where status = 'orphan'").await?,
        "unknown_source"
    );
    let answer = source.deliver(&recorded("agent", "analyzed", attempt, "c")?).send(&stack.intake()?).await?;
    answer.assert_error(404, "not_found");
    Ok(())
}

#[tokio::test]
async fn who_may_make_a_source() -> Result<()> {
    let (stack, campaign, _, source, intake) = connected("agent").await?;
    assert!(source.secret.starts_with("whsec_") && source.secret.len() > 30);
    let stored = stack.value("select to_jsonb(s)::text || coalesce((select jsonb_agg(a.metadata)::text from public.audit_logs as a), '') from public.webhook_sources as s").await?;
    assert!(!stored.contains(&source.secret[6..]), "the secret is in the row or in the audit log");
    let create = |asked: Value| HttpEvent::post("/functions/v1/webhook-intake/sources").json(&asked);
    let owner = campaign.tenant.jwt();
    create(json!({ "provider": "agent" }))?.send(&intake).await?.assert_error(401, "unauthorized");
    for (asked, status, code, field) in [
        (json!({ "provider": "nobody" }), 422, "unknown_provider", "provider"),
        (json!({ "provider": "retell" }), 422, "invalid_secret", "secret"),
        (json!({ "provider": "retell", "secret": "" }), 422, "invalid_secret", "secret"),
        (json!({ "provider": "agent", "secret": "short" }), 422, "invalid_secret", "secret"),
        (json!({ "provider": "retell", "secret": "k", "settings": { "odd": 1 } }), 422, "invalid_settings", "settings"),
        (
            json!({ "provider": "retell", "secret": "k", "settings": { "tools": { "x": "explode" } } }),
            422,
            "invalid_settings",
            "settings",
        ),
        (
            json!({ "provider": "vapi", "secret": "k", "settings": { "payload_format": "{timestamp}" } }),
            422,
            "invalid_settings",
            "settings",
        ),
        (
            json!({ "provider": "vapi", "secret": "k", "settings": { "signature_header": "no header" } }),
            422,
            "invalid_settings",
            "settings",
        ),
        (json!({ "provider": "retell", "secret": "k", "store_id": Uuid::new_v4() }), 422, "unknown_store", "store_id"),
    ] {
        let answer = create(asked.clone())?.bearer(owner).send(&intake).await?;
        println!("{asked}: {} {}", answer.status, answer.body);
        answer.assert_error_at(status, code, field);
    }
    let stranger = scene::sign_up(&stack, "Others").await?;
    rotate(&source, stranger.jwt(), &json!({}))?.send(&intake).await?.assert_error(404, "not_found");
    let (status, seen) = stack.rest(stranger.jwt(), "GET", "webhook_sources?select=id", None).await?;
    assert_eq!((status.as_u16(), seen), (200, json!([])));
    let (status, _) = stack.rest(owner, "GET", "webhook_sources?select=secrets_sealed", None).await?;
    assert_eq!(status, 403, "no user reads a secret, not even sealed");
    Ok(())
}
