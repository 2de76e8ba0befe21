//! What users do with their endpoints.

use super::*;

async fn ask(delivery: &Delivery, tenant: &Tenant, request: HttpEvent) -> Result<serde_json::Value> {
    let answer = request.bearer(tenant.jwt()).send(delivery).await?;
    ensure!(answer.status < 300, "{} {}", answer.status, answer.body);
    Ok(answer.json())
}

#[tokio::test]
async fn an_endpoint_s_secret_is_shown_once_and_what_was_sent_is_shown_always() -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    stack.set_clock(TUESDAY_TEN).await?;
    let (receiver, delivery) = (Receiver::start().await?, hasty(&stack)?);
    let (tenant, other) = (scene::sign_up(&stack, "One").await?, scene::sign_up(&stack, "Two").await?);
    let (id, secret) = listen(&delivery, &tenant, &receiver.url("ok"), &["lead.created", "campaign.*"]).await?;
    assert!(secret.starts_with("whsec_"));
    let one = format!("{ENDPOINTS}/{id}");

    let shown = ask(&delivery, &tenant, HttpEvent::get(&one)).await?;
    let list = ask(&delivery, &tenant, HttpEvent::get(ENDPOINTS)).await?;
    assert_eq!(list, json!([shown]));
    assert_eq!((&shown["url"], &shown["enabled"]), (&json!(receiver.url("ok")), &json!(true)));
    assert!(!shown.to_string().contains("whsec_") && !shown.to_string().contains("v1."), "{shown}");
    let kept = stack.value("select string_agg(secret_sealed, ' ') from private.webhook_endpoint_secrets").await;
    assert!(!kept.is_ok_and(|kept| kept.contains(&secret)), "a secret is at rest sealed");

    let changed = HttpEvent::new("PATCH", &one).json(&json!({ "description": "The CRM" }))?;
    let changed = ask(&delivery, &tenant, changed).await?;
    assert_eq!(
        (&changed["description"], &changed["events"]),
        (&json!("The CRM"), &json!(["lead.created", "campaign.*"]))
    );

    let test = ask(&delivery, &tenant, HttpEvent::post(&format!("{one}/test"))).await?;
    deliver(&stack, &delivery).await?;
    assert_eq!(receiver.ids("ok"), [test["event_id"].as_str().unwrap_or_default().to_owned()].into());
    let log = ask(&delivery, &tenant, HttpEvent::get(&format!("{one}/deliveries?status=delivered&limit=5"))).await?;
    assert_eq!((&log[0]["id"], &log[0]["response_status"]), (&test["delivery_id"], &json!(200)));
    assert_eq!((&log[0]["response_body"], log.as_array().map(Vec::len)), (&json!("thank you"), Some(1)));
    let delivery_path =
        format!("/functions/v1/event-delivery/deliveries/{}", log[0]["id"].as_str().unwrap_or_default());
    let line = ask(&delivery, &tenant, HttpEvent::get(&delivery_path)).await?;
    assert_eq!(line["request"], receiver.all()[0].event());

    ask(&delivery, &tenant, HttpEvent::post(&format!("{delivery_path}/replay"))).await?;
    deliver(&stack, &delivery).await?;
    assert_eq!((receiver.count("ok"), receiver.ids("ok").len()), (2, 1), "the same event, again");

    ask(&delivery, &tenant, HttpEvent::post(&format!("{one}/disable"))).await?;
    scene::import_leads(&stack, &tenant, &phones(1, 3)).await?;
    deliver(&stack, &delivery).await?;
    assert_eq!(receiver.count("ok"), 2, "nothing goes to what is switched off");
    let again = HttpEvent::post(&format!("{one}/test")).bearer(tenant.jwt()).send(&delivery).await?;
    again.assert_error_at(409, "endpoint_disabled", "endpoint_id");
    ask(&delivery, &tenant, HttpEvent::post(&format!("{one}/enable"))).await?;
    let range = HttpEvent::post(&format!("{one}/replay")).json(&json!({ "since": "2026-11-24T00:00:00Z" }))?;
    assert_eq!(ask(&delivery, &tenant, range).await?, json!({ "replayed": 3 }));
    deliver(&stack, &delivery).await?;
    assert_eq!(receiver.ids("ok").len(), 4, "what was missed is sent by a replay");

    // Nobody else's.
    for request in [
        HttpEvent::get(&one),
        HttpEvent::new("DELETE", &one),
        HttpEvent::post(&format!("{one}/rotate")),
        HttpEvent::post(&format!("{one}/test")),
        HttpEvent::get(&delivery_path),
        HttpEvent::post(&format!("{delivery_path}/replay")),
    ] {
        assert_eq!(request.clone().bearer(other.jwt()).send(&delivery).await?.status, 404, "{request:?}");
        assert_eq!(request.clone().send(&delivery).await?.status, 401, "{request:?}");
    }
    let theirs = HttpEvent::get(&format!("{one}/deliveries")).bearer(other.jwt()).send(&delivery).await?;
    assert_eq!(theirs.json(), json!([]));
    assert_eq!(ask(&delivery, &tenant, HttpEvent::new("DELETE", &one)).await?["deleted"], json!(true));
    assert_eq!(ask(&delivery, &tenant, HttpEvent::get(ENDPOINTS)).await?, json!([]));
    Ok(())
}

#[tokio::test]
async fn an_endpoint_that_points_inside_is_refused_at_once() -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    let tenant = scene::sign_up(&stack, "One").await?;
    let delivery = hasty(&stack)?;
    for url in [
        "http://hooks.example.com/",
        "https://10.0.0.1/",
        "https://169.254.169.254/latest/meta-data/",
        "https://[::ffff:10.0.0.1]/",
        "https://user:secret@hooks.example.com/",
        "http://localhost:3000/",
        "nonsense",
    ] {
        let request = HttpEvent::post(ENDPOINTS).bearer(tenant.jwt()).json(&json!({ "url": url }))?;
        request.send(&delivery).await?.assert_error_at(422, "invalid_url", "url");
    }
    let request = HttpEvent::post(ENDPOINTS).bearer(tenant.jwt());
    let request = request.json(&json!({ "url": "https://hooks.example.com/", "events": ["alarm.*"] }))?;
    request.send(&delivery).await?.assert_error_at(422, "unknown_event", "events");
    let request = HttpEvent::new("PUT", ENDPOINTS).bearer(tenant.jwt()).send(&delivery).await?;
    request.assert_error(405, "method_not_allowed");
    Ok(())
}
