//! Through the handler: units held for an event to come, and the page of usage by a link.

use super::{FUNCTION, browser};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use shared::signed_link;
use tests::{
    Stack,
    events::{HttpEvent, job},
    scene,
    stack::PUBLIC_ORIGIN,
    supervisor_binary,
};
use uuid::Uuid;

#[tokio::test]
async fn units_are_held_settled_by_their_event_given_back_and_over_by_themselves() -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    stack.set_clock(scene::TUESDAY_TEN).await?;
    let tenant = scene::sign_up(&stack, "Acme Homes").await?;
    stack
        .sql
        .batch_execute(&format!(
            "insert into public.subscription_plans (id, slug, name) values ('00000000-0000-4000-a000-000000000001', 'test-held', 'Held');
             insert into public.plan_prices (id, plan_id, version, base_minor)
             values ('00000000-0000-4000-b000-000000000001', '00000000-0000-4000-a000-000000000001', 1, 0);
             insert into public.plan_price_meters (plan_price_id, meter_key, included_units, limit_units, hard)
             values ('00000000-0000-4000-b000-000000000001', 'agent_tokens', 100, 100, true);
             select private.subscribe_organization('{}', 'test-held', 'active', private.clock_now())",
            tenant.id
        ))
        .await?;
    let metering = stack.metering()?;
    let key = scene::create_api_key(&stack, &tenant).await?;
    let post = async |path: &str, body: Value| {
        HttpEvent::post(&format!("{FUNCTION}/usage/{path}")).bearer(&key).json(&body)?.send(&metering).await
    };
    let asked = |id: &str, quantity: i64| json!({ "source": "crm", "id": id, "type": "agent_tokens", "quantity": quantity, "seconds": 60 });
    let reserved = "select coalesce(sum(reserved), 0)::text from public.usage_logs where feature_key = 'agent_tokens'";

    let held = post("holds", asked("a", 60)).await?;
    assert_eq!((held.status, &held.json()["status"]), (200, &json!("held")), "{}", held.body);
    post("holds", asked("b", 41)).await?.assert_error_at(402, "quota_exhausted", "quantity");
    post("holds", asked("a", 59)).await?.assert_error_at(409, "idempotency_conflict", "id");
    post("holds", json!({ "source": "crm", "id": "c", "type": "pigeons", "quantity": 1 })).await?.assert_error_at(
        422,
        "unknown_type",
        "type",
    );
    post("holds", asked("x\0y", 1)).await?.assert_error_at(422, "invalid_id", "id");
    HttpEvent::post(&format!("{FUNCTION}/usage/holds"))
        .json(&asked("a", 1))?
        .send(&metering)
        .await?
        .assert_error(401, "unauthorized");
    assert_eq!(stack.value(reserved).await?, "60");

    let event =
        json!({ "specversion": "1.0", "id": "a", "source": "crm", "type": "agent_tokens", "data": { "quantity": 25 } });
    assert_eq!(post("events", event).await?.json()["status"], "stored");
    assert_eq!(stack.value(reserved).await?, "0");
    post("holds", asked("a", 1)).await?.assert_error_at(409, "already_counted", "id");

    assert_eq!(post("holds", asked("b", 75)).await?.status, 200);
    for released in [true, false] {
        assert_eq!(
            post("holds/release", json!({ "source": "crm", "id": "b" })).await?.json(),
            json!({ "released": released })
        );
    }
    assert_eq!(post("holds", asked("d", 75)).await?.status, 200);
    assert_eq!(job(&metering, "expire_holds").await?, json!({ "expired": 0 }));
    stack.set_clock("2026-11-24T10:05:00+05:30").await?;
    assert_eq!(job(&metering, "expire_holds").await?, json!({ "expired": 1 }));
    assert_eq!(stack.value(reserved).await?, "0");
    Ok(())
}

#[tokio::test]
async fn a_link_opens_the_page_of_usage_in_a_browser_for_a_quarter_of_an_hour() -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    stack.set_clock(scene::TUESDAY_TEN).await?;
    let tenant = scene::sign_up(&stack, "Acme Homes").await?;
    let other = scene::sign_up(&stack, "Other Ltd").await?;
    let metering = stack.metering()?;
    let key = scene::create_api_key(&stack, &tenant).await?;
    let event = json!({ "id": "a", "source": "crm", "type": "agent_tokens", "data": { "quantity": 1_234 } });
    HttpEvent::post(&format!("{FUNCTION}/usage/events")).bearer(&key).json(&event)?.send(&metering).await?;

    let link = HttpEvent::post(&format!("{FUNCTION}/usage/link"));
    link.send(&metering).await?.assert_error(401, "unauthorized");
    let made = link.bearer(tenant.jwt()).send(&metering).await?;
    assert_eq!(made.status, 200, "{}", made.body);
    let made = made.json();
    let path = made["url"].as_str().and_then(|url| url.strip_prefix(PUBLIC_ORIGIN)).context("an address of ours")?;
    let left = chrono::DateTime::parse_from_rfc3339(made["expires_at"].as_str().context("an end")?)?.timestamp();
    assert!((1..=900).contains(&(left - chrono::Utc::now().timestamp())), "in real time, whatever business time is");

    // No header says who asks, as no browser does.
    let opened = HttpEvent::get(path).send(&metering).await?;
    assert_eq!(opened.status, 200, "{}", opened.body);
    assert!(opened.body.contains("1,234 tokens"), "{}", opened.body);
    assert_eq!(opened.headers["referrer-policy"], "no-referrer");
    let page = HttpEvent::get(&format!("{FUNCTION}/usage.html")).bearer(tenant.jwt()).send(&metering).await?;
    assert_eq!(opened.body, page.body, "what its user sees");
    browser::assert_fits(&opened.body).await?;

    let token = path.split_once("?t=").context("a token")?.1;
    let tampered = format!("{}{}", if token.starts_with('A') { 'B' } else { 'A' }, &token[1..]);
    for changed in [
        path.replace(&tenant.id.to_string(), &other.id.to_string()),
        path.replace(&tenant.id.to_string(), &Uuid::new_v4().to_string()),
        path.replace(token, &tampered),
        path.replace(token, ""),
    ] {
        HttpEvent::get(&changed).send(&metering).await?.assert_error_at(403, "bad_token", "t");
    }
    let keys = stack.keys.secrets()?.callback_keys;
    let now = chrono::Utc::now().timestamp();
    let id: Uuid = tenant.id.to_string().parse()?;
    for (purpose, end, code) in [("usage.html", now - 1, "link_expired"), ("invoices.html", now + 60, "bad_token")] {
        let signed = signed_link::sign(&keys, purpose, id, end).context("a key")?;
        HttpEvent::get(&path.replace(token, &signed)).send(&metering).await?.assert_error_at(403, code, "t");
    }
    Ok(())
}
