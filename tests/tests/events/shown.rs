//! What a receiver sees, with the libraries that receivers have, and what the documentation says it will.

use super::*;
use local::parts::{
    folder::{self, RunFolder},
    install,
    progress::Progress,
};
use serde_json::{Map, Value};
use std::fs;
use tests::{callbacks::TALKED, programs, scene::campaign_action};
use tokio::process::Command;

/// The schema of every event, by topic.
fn schemas() -> Result<Map<String, Value>> {
    fs::read_dir(folder::workspace()?.join("docs/events"))?
        .map(|file| {
            let path = file?.path();
            let topic = path.file_stem().context("a file without a name")?.to_string_lossy().into_owned();
            Ok((topic, serde_json::from_slice(&fs::read(&path)?)?))
        })
        .collect()
}

/// Runs the receiver's program over what was received.
async fn receive(received: &[Value]) -> Result<Value> {
    let folder = RunFolder::create()?;
    std::os::unix::fs::symlink(
        install::webhook_verifiers(&Progress::hidden()).await?,
        folder.path().join("node_modules"),
    )?;
    let program = folder.path().join("webhooks.mjs");
    fs::copy(folder::workspace()?.join("tests/clients/webhooks.mjs"), &program)?;
    let given = folder.path().join("received.json");
    fs::write(&given, json!({ "received": received, "schemas": schemas()? }).to_string())?;
    let output = Command::new("node").arg(&program).env("RECEIVED", &given).kill_on_drop(true).output().await?;
    ensure!(output.status.success(), "the receiver failed: {}", String::from_utf8_lossy(&output.stderr));
    programs::last_json(&String::from_utf8_lossy(&output.stdout))
}

#[tokio::test]
async fn the_unmodified_verifiers_take_every_event_and_no_other() -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    let receiver = Receiver::start().await?;
    let delivery = hasty(&stack)?;
    let campaign = scene::running_campaign(&stack, &phones(1, 3)).await?;
    let tenant = &campaign.tenant;
    let (id, secret) = listen(&delivery, tenant, &receiver.url("ok"), &[]).await?;
    for action in ["pause", "resume"] {
        ensure!(campaign_action(tenant, campaign.id, action).send(&campaign.dispatch).await?.status == 200, "{action}");
    }
    for call in campaign.dial(&stack).await? {
        campaign.carrier.ring(&call)?.send(&stack.intake()?).await?;
        campaign.carrier.hangup(&call, &TALKED)?.send(&stack.intake()?).await?;
    }
    scene::import_leads(&stack, tenant, &phones(11, 2)).await?;
    stack
        .sql
        .batch_execute(&format!(
            "update public.leads set do_not_call = true where organization_id = '{org}' and phone = '+919800000011';
             update public.call_logs set ai_analysis = '{{\"intent\": \"visit\"}}', summary = 's', sentiment_score = 0.5
             where organization_id = '{org}';
             with store as (
               insert into public.stores (organization_id, name, domain, platform) values ('{org}', 'Shop', 'shop.example.com', 'shopify')
               returning id
             ),
             placed as (
               insert into public.orders (
                 organization_id, store_id, external_id, subtotal_price_minor, total_price_minor, currency_code, order_date)
               select '{org}', id, '1001', 500, 500, 'INR', now() from store
             )
             insert into public.conversations (organization_id, store_id, conversation_key, channel)
             select '{org}', id, 'k', 'chat' from store;
             update public.orders set payment_status = 'paid' where organization_id = '{org}';
             update public.orders set status = 'cancelled' where organization_id = '{org}';
             update public.conversations set status = 'escalated', escalation_reason = 'asked for a person' where organization_id = '{org}'",
            org = tenant.id
        ))
        .await?;
    scene::buy_plan(&stack, tenant, 60).await?;
    pass(&stack, "40 days").await?;
    events::job(&stack.invoicing()?, "close_periods").await?;
    // Nobody pays.
    pass(&stack, "20 days").await?;
    events::job(&stack.invoicing()?, "close_periods").await?;
    let answer = HttpEvent::post(&format!("{ENDPOINTS}/{id}/test")).bearer(tenant.jwt()).send(&delivery).await?;
    ensure!(answer.status == 200, "{}", answer.body);
    deliver(&stack, &delivery).await?;
    let mut received: Vec<Value> = receiver
        .all()
        .iter()
        .map(|one| json!({ "secret": secret, "body": one.body, "headers": one.headers }))
        .collect();

    // While a rotation lasts, both secrets verify; what was sent before it, only the old one.
    let before = received.len();
    let rotated = HttpEvent::post(&format!("{ENDPOINTS}/{id}/rotate")).bearer(tenant.jwt()).send(&delivery).await?;
    let new_secret = rotated.json()["secret"].clone();
    assert_ne!(new_secret, json!(secret));
    scene::import_leads(&stack, tenant, &phones(21, 2)).await?;
    deliver(&stack, &delivery).await?;
    for one in &receiver.all()[before..] {
        for secret in [&json!(secret), &new_secret] {
            received.push(json!({ "secret": secret, "body": one.body, "headers": one.headers }));
        }
    }
    let said = receive(&received).await?;
    let all = json!(received.len());
    assert_eq!((&said["wrong"], &said["valid"]), (&json!([]), &all), "{said:#}");
    assert_eq!((&said["verified"], &said["forged"]), (&json!(received.len() * 2), &json!(0)), "{said:#}");
    let topics: BTreeSet<&str> =
        said["topics"].as_object().into_iter().flatten().map(|(topic, _)| topic.as_str()).collect();
    for topic in [
        "call.started",
        "call.answered",
        "call.ended",
        "call.analyzed",
        "lead.created",
        "lead.opted_out",
        "campaign.paused",
        "campaign.resumed",
        "campaign.completed",
        "order.created",
        "order.updated",
        "order.cancelled",
        "conversation.escalated",
        "subscription.created",
        "subscription.changed",
        "subscription.cancelled",
        "invoice.finalized",
        "invoice.past_due",
        "endpoint.test",
    ] {
        assert!(topics.contains(topic), "{topic} is not among {topics:?}");
    }
    // Of each object the sequence rises, without a gap where everything is listened to.
    let sequences =
        "select count(*) from (select sequence - row_number() over (partition by object order by sequence) as gap
        from private.outbox where sequence is not null) as told where gap <> 0";
    assert_eq!(stack.value(sequences).await?, "0");
    let order = "select string_agg(topic, ' ' order by sequence) from private.outbox where topic like 'call.%' group by object limit 1";
    assert_eq!(stack.value(order).await?, "call.started call.answered call.ended call.analyzed");
    Ok(())
}

#[tokio::test]
async fn every_event_is_documented_with_a_schema_of_its_version_and_no_other_is() -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    let (schemas, page) = (schemas()?, fs::read_to_string(folder::workspace()?.join("docs/events.md"))?);
    let admin = stack.database.connect(local::parts::postgres::Role::Admin).await?;
    let known = admin.query("select topic, version, description from private.event_types", &[]).await?;
    assert_eq!(known.len(), schemas.len());
    for row in known {
        let (topic, version, description): (String, i16, String) = (row.get(0), row.get(1), row.get(2));
        let schema = schemas.get(&topic).with_context(|| format!("{topic} has no schema"))?;
        assert_eq!(schema["properties"]["version"]["const"], json!(version), "{topic}");
        assert_eq!(schema["properties"]["type"]["const"], json!(topic));
        assert!(
            page.contains(&format!("| [`{topic}`](events/{topic}.json) | {description} |")),
            "{topic} is not on the page"
        );
    }
    Ok(())
}
