//! Events out: from what happens to the customer's own system, whatever that does.

mod crowd;
mod endpoints;
mod shown;

use anyhow::{Context, Result, ensure};
use event_delivery::{Delivery, Sender};
use serde_json::json;
use std::{collections::BTreeSet, sync::Arc, time::Duration};
use tests::{
    Stack,
    events::{self, HttpEvent},
    queues::{batch, hand_over},
    receiver::Receiver,
    scene::{self, TUESDAY_TEN, Tenant, phones},
    supervisor_binary,
};
use uuid::Uuid;

const ENDPOINTS: &str = "/functions/v1/event-delivery/endpoints";
/// How long endpoints have to answer here: one that hangs costs a test no more.
const PATIENCE: Duration = Duration::from_millis(250);

/// The system's resolver, as the deliverer's own.
struct Names;

impl reqwest::dns::Resolve for Names {
    fn resolve(&self, name: reqwest::dns::Name) -> reqwest::dns::Resolving {
        Box::pin(async move {
            let found: Vec<_> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            Ok(Box::new(found.into_iter()) as reqwest::dns::Addrs)
        })
    }
}

/// A deliverer that is not patient.
fn hasty(stack: &Stack) -> Result<Delivery> {
    Ok(stack.delivery()?.sending_with(Sender::resolving_with(Arc::new(Names), PATIENCE, true)?))
}

/// `POST endpoints`: its id and its secret.
async fn listen(delivery: &Delivery, tenant: &Tenant, url: &str, topics: &[&str]) -> Result<(Uuid, String)> {
    let request = HttpEvent::post(ENDPOINTS).bearer(tenant.jwt()).json(&json!({ "url": url, "events": topics }))?;
    let answer = request.send(delivery).await?;
    ensure!(answer.status == 201, "POST endpoints: {} {}", answer.status, answer.body);
    let made = answer.json();
    let text = |name: &str| made[name].as_str().map(str::to_owned).with_context(|| format!("no {name}"));
    Ok((text("id")?.parse()?, text("secret")?))
}

/// Claims, sends and records until nothing is due.
async fn deliver(stack: &Stack, delivery: &Delivery) -> Result<usize> {
    let mut messages = 0;
    loop {
        let claimed = events::job(delivery, "deliver").await?;
        ensure!(claimed["unsent"] == 0, "{claimed}");
        let delivered = stack.event_queue.deliver(delivery).await?;
        let slowly = stack.slow_event_queue.deliver(delivery).await?;
        ensure!(delivered.failed + slowly.failed == 0, "{delivered:?} {slowly:?}");
        messages += delivered.messages + slowly.messages;
        if claimed["sent"] == 0 && delivered.messages + slowly.messages == 0 {
            return Ok(messages);
        }
    }
}

/// Sets business time forward.
async fn pass(stack: &Stack, interval: &str) -> Result<()> {
    let sql = format!("update private.clock_offset set shift = shift + interval '{interval}'");
    Ok(stack.sql.batch_execute(&sql).await?)
}

/// The ids of a tenant's events, by topic.
async fn told(stack: &Stack, tenant: &Tenant, topic: &str) -> Result<BTreeSet<String>> {
    let rows = stack
        .sql
        .query(
            "select id::text from private.outbox where organization_id = $1 and topic like $2",
            &[&tenant.id, &topic],
        )
        .await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

#[tokio::test]
async fn every_healthy_endpoint_has_every_event_whatever_the_others_do() -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    stack.set_clock(TUESDAY_TEN).await?;
    let receiver = Receiver::start().await?;
    let delivery = hasty(&stack)?;
    let behaviours = ["ok-1", "ok-2", "ok-3", "half", "hang", "redirect"];
    let mut tenants = Vec::new();
    for name in ["One", "Two"] {
        let tenant = scene::sign_up(&stack, name).await?;
        for behaviour in behaviours {
            listen(&delivery, &tenant, &receiver.url(&format!("{behaviour}-{name}")), &["lead.*"]).await?;
        }
        scene::import_leads(&stack, &tenant, &phones(if name == "One" { 1 } else { 101 }, 25)).await?;
        tenants.push((name, tenant));
    }
    deliver(&stack, &delivery).await?;
    for (name, tenant) in &tenants {
        let events = told(&stack, tenant, "lead.created").await?;
        assert_eq!(events.len(), 25);
        for healthy in &behaviours[..3] {
            assert_eq!(receiver.ids(&format!("{healthy}-{name}")), events, "{healthy} of {name}");
        }
    }
    // Who failed is tried again when it is due. Business time runs on meanwhile, so that the first wait may be over by itself.
    for wait in ["7 seconds", "7 minutes", "40 minutes"] {
        let late = "select count(*) from public.event_deliveries where status = 'failed' and not next_attempt_at - last_attempt_at
            between (array['5 s', '5 min', '30 min', '2 h'])[attempts]::interval and (array['6 s', '6 min', '36 min', '144 min'])[attempts]::interval";
        assert_eq!(stack.value(late).await?, "0", "the schedule, before {wait}");
        pass(&stack, wait).await?;
        deliver(&stack, &delivery).await?;
    }
    for (name, _) in &tenants {
        assert_eq!(receiver.count(&format!("redirect-{name}")), 4 * 25, "as often as the log says");
    }
    let left = stack
        .sql
        .query(
            "select split_part(endpoint.url, '/', 4), delivery.status, min(delivery.attempts), max(delivery.attempts), count(*),
               bool_and(coalesce(delivery.next_attempt_at - delivery.last_attempt_at between '2 hours' and '2 hours 24 minutes', true))
             from public.event_deliveries as delivery join public.webhook_endpoints as endpoint on endpoint.id = delivery.endpoint_id
             group by 1, 2 order by 1, 2",
            &[],
        )
        .await?;
    for row in &left {
        let (name, status, least, most): (String, String, i32, i32) = (row.get(0), row.get(1), row.get(2), row.get(3));
        let expected = match name.split('-').next().unwrap_or_default() {
            "ok" => ("delivered", 1, 1),
            "half" => ("delivered", 1, 2),
            _ => ("failed", 4, 4),
        };
        assert_eq!((status.as_str(), least, most), expected, "{name}");
        assert_eq!((row.get::<_, i64>(4), row.get::<_, bool>(5)), (25, true), "{name}");
    }
    assert_eq!(left.len(), 12);
    assert_eq!(receiver.count("trap"), 0, "a redirect is followed by nobody");
    Ok(())
}

#[tokio::test]
async fn handlers_that_die_while_delivering_lose_nothing_and_repeat_under_the_same_id() -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    stack.set_clock(TUESDAY_TEN).await?;
    let receiver = Receiver::start().await?;
    let delivery = Arc::new(hasty(&stack)?);
    let tenant = scene::sign_up(&stack, "One").await?;
    listen(&delivery, &tenant, &receiver.url("ok"), &["lead.created"]).await?;
    scene::import_leads(&stack, &tenant, &phones(1, 30)).await?;
    for kill_after in [1, 4, 9, 10] {
        events::job(&*delivery, "deliver").await?;
        let (messages, before) = (stack.event_queue.receive().await?, receiver.count("ok"));
        ensure!(messages.len() == 10, "{} messages", messages.len());
        let (handler, payload) = (Arc::clone(&delivery), batch(&messages));
        let dying = tokio::spawn(async move { events::invoke(&*handler, payload).await });
        while receiver.count("ok") < before + kill_after && !dying.is_finished() {
            tokio::task::yield_now().await;
        }
        dying.abort();
        let _killed = dying.await;
        // The leases lapse.
        let lapse = "update public.event_deliveries set lease_until = now() - interval '1 second' where lease_until is not null";
        stack.sql.batch_execute(lapse).await?;
    }
    deliver(&stack, &delivery).await?;
    let events = told(&stack, &tenant, "lead.created").await?;
    assert_eq!((events.len(), receiver.ids("ok")), (30, events));
    let undelivered = stack.value("select count(*) from public.event_deliveries where status <> 'delivered'").await?;
    assert_eq!(undelivered, "0");
    for received in receiver.all() {
        assert_eq!(received.event()["id"], received.id());
    }
    Ok(())
}

#[tokio::test]
async fn what_was_sent_and_not_recorded_is_sent_again() -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    stack.set_clock(TUESDAY_TEN).await?;
    let (receiver, delivery) = (Receiver::start().await?, hasty(&stack)?);
    let tenant = scene::sign_up(&stack, "One").await?;
    listen(&delivery, &tenant, &receiver.url("ok"), &["lead.created"]).await?;
    scene::import_leads(&stack, &tenant, &phones(1, 5)).await?;
    events::job(&delivery, "deliver").await?;
    let messages = stack.event_queue.receive().await?;
    stack.sql.batch_execute("alter function public.record_deliveries(jsonb) rename to not_there").await?;
    stack.sql.batch_execute("notify pgrst, 'reload schema'").await?;
    assert!(hand_over(&delivery, &messages).await?.is_empty());
    stack.sql.batch_execute("alter function public.not_there(jsonb) rename to record_deliveries").await?;
    stack.sql.batch_execute("notify pgrst, 'reload schema'").await?;
    assert_eq!((receiver.count("ok"), receiver.ids("ok").len()), (5, 5));
    assert_eq!(deliver(&stack, &hasty(&stack)?).await?, 0, "somebody else's while the lease lasts");
    stack.sql.batch_execute("update public.event_deliveries set lease_until = now() - interval '1 second'").await?;
    deliver(&stack, &hasty(&stack)?).await?;
    assert_eq!((receiver.count("ok"), receiver.ids("ok").len()), (10, 5), "twice, under the same ids");
    let bodies: BTreeSet<String> = receiver.all().into_iter().map(|received| received.body).collect();
    assert_eq!(bodies.len(), 5, "and with the same bytes");
    Ok(())
}

#[tokio::test]
async fn a_batch_is_two_requests_and_a_retry_waits_as_long_as_the_endpoint_asks() -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    stack.set_clock(TUESDAY_TEN).await?;
    let (receiver, delivery) = (Receiver::start().await?, hasty(&stack)?);
    let tenant = scene::sign_up(&stack, "One").await?;
    for name in ["busy", "gone", "ok"] {
        listen(&delivery, &tenant, &receiver.url(name), &["lead.created"]).await?;
    }
    scene::import_leads(&stack, &tenant, &phones(1, 1)).await?;
    stack.proxy.take();
    events::job(&delivery, "deliver").await?;
    assert_eq!(stack.proxy.take_paths(), ["/rpc/claim_deliveries"]);
    let delivered = stack.event_queue.deliver(&delivery).await?;
    assert_eq!((delivered.messages, delivered.failed), (3, 0));
    assert_eq!(stack.proxy.take_paths(), ["/rpc/begin_deliveries", "/rpc/record_deliveries"]);
    let wait =
        "select (next_attempt_at - last_attempt_at)::text from public.event_deliveries where response_status = 503";
    assert_eq!(stack.value(wait).await?, "01:00:00");
    let gone = "select disabled_reason from public.webhook_endpoints where url like '%/gone'";
    assert_eq!(stack.value(gone).await?, "gone");
    // The other endpoints listen to leads alone; the owner finds it on record.
    let audited = "select metadata ->> 'reason' from public.audit_logs where action = 'webhook_endpoint.disabled'";
    assert_eq!(stack.value(audited).await?, "gone");
    Ok(())
}

#[tokio::test]
async fn a_message_that_is_none_of_ours_stays_for_a_person_to_see() -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    for body in [
        "junk",
        r#"{"v":9,"kind":"event","organization_id":"o","id":"i","not_after":null}"#,
        r#"{"v":1,"kind":"dial"}"#,
    ] {
        stack.event_queue.send(body).await?;
    }
    let delivered = stack.event_queue.deliver(&stack.delivery()?).await?;
    assert_eq!((delivered.messages, delivered.failed), (3, 3));
    Ok(())
}

#[tokio::test]
async fn a_nudge_is_taken_only_when_it_is_signed() -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    let unsigned = HttpEvent::post("/functions/v1/event-delivery/nudge").body("{}").send(&stack.delivery()?).await?;
    unsigned.assert_error(403, "bad_signature");
    let (now, key) = (chrono::Utc::now().timestamp(), stack.keys.nudge_key());
    let signature = shared::standard_webhooks::sign(key, "m", now, b"{}").context("no key")?;
    let signed = HttpEvent::post("/functions/v1/event-delivery/nudge")
        .header("webhook-id", "m")
        .header("webhook-timestamp", now.to_string())
        .header("webhook-signature", signature)
        .body("{}")
        .send(&stack.delivery()?)
        .await?;
    assert_eq!((signed.status, signed.json()), (200, json!({ "sent": 0, "unsent": 0 })));
    Ok(())
}
