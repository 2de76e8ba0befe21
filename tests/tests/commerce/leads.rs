//! `POST leads`.

use super::*;

const LEADS: &str = "/functions/v1/webhook-intake/leads";

async fn key(stand: &Stand, scope: &str) -> Result<String> {
    let made =
        stand.stack.rpc(stand.tenant.jwt(), "create_api_key", &json!({ "name": "CRM", "scopes": [scope] })).await?;
    Ok(made["key"].as_str().context("a key")?.to_owned())
}

async fn form(stand: &Stand, rate: u32) -> Result<Uuid> {
    let form = json!({
        "name": "Site", "consent_text": "You may call me", "consent_scopes": ["call_service"], "rate_per_minute": rate,
        "fields": [{ "name": "name", "required": true }, { "name": "phone", "required": true }, { "name": "budget" }],
    });
    let (status, made) = stand.stack.rest(stand.tenant.jwt(), "POST", "lead_forms?select=id", Some(&form)).await?;
    assert!(status.is_success(), "{status} {made}");
    Ok(made[0]["id"].as_str().context("a form")?.parse()?)
}

#[tokio::test]
async fn a_system_s_leads_come_in_with_an_outcome_each() -> Result<()> {
    let stand = Stand::start().await?;
    let key = key(&stand, "lead.write").await?;
    let one = HttpEvent::post(LEADS)
        .header("x-api-key", &key)
        .json(&json!({ "name": "Asha", "phone": "98123 45678", "fields": { "budget": 5 } }))?;
    let answer = one.send(&stand.intake).await?;
    assert_eq!((answer.status, &answer.json()["status"]), (201, &json!("created")), "{}", answer.body);
    stand.stack.proxy.take();
    let answer = one.send(&stand.intake).await?;
    assert_eq!((answer.status, &answer.json()["status"]), (200, &json!("updated")), "{}", answer.body);
    assert_eq!(stand.stack.proxy.take().len(), 1, "one request to the database");
    let lead = "select concat_ws('|', l.name, l.phone, l.source, s.name, l.raw_data) from public.leads as l join public.pipeline_stages as s on s.id = l.stage_id";
    assert_eq!(stand.value(lead).await?, r#"Asha|+919812345678|api|New Lead|{"budget": 5}"#);
    assert_eq!(stand.value("select count(*) from private.outbox where topic = 'lead.created'").await?, "1");

    let batch = HttpEvent::post(LEADS).bearer(&key).json(&json!([
        { "phone": "+14155550100" }, { "phone": "none" }, 7, { "phone": "9812345678", "project_id": Uuid::new_v4() },
    ]))?;
    let answer = batch.send(&stand.intake).await?.json();
    let outcomes: Vec<&str> = answer["results"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|one| one["code"].as_str().or(one["status"].as_str()))
        .collect();
    assert_eq!(outcomes, ["created", "invalid_phone", "invalid_lead", "unknown_project"]);

    let refused = HttpEvent::post(LEADS).bearer(&key).json(&json!({ "phone": "none" }))?.send(&stand.intake).await?;
    refused.assert_error_at(422, "invalid_phone", "phone");
    Ok(())
}

#[tokio::test]
async fn a_request_with_an_idempotency_key_is_taken_once() -> Result<()> {
    let stand = Stand::start().await?;
    let key = key(&stand, "lead.write").await?;
    let event = |phone: &str| {
        HttpEvent::post(LEADS).bearer(&key).header("idempotency-key", "k1").json(&json!([{ "phone": phone }]))
    };
    let first = event("9812345678")?.send(&stand.intake).await?.json();
    let again = event("9812345678")?.send(&stand.intake).await?.json();
    assert_eq!((&first["results"], &again["replayed"]), (&again["results"], &json!(true)));
    event("9812345679")?.send(&stand.intake).await?.assert_error_at(409, "idempotency_conflict", "idempotency-key");
    assert_eq!(stand.value("select count(*) from public.leads").await?, "1");
    Ok(())
}

#[tokio::test]
async fn who_may_not_send_leads_sends_none() -> Result<()> {
    let stand = Stand::start().await?;
    let other = key(&stand, "usage.write").await?;
    let lead = json!({ "phone": "9812345678" });
    let bare = HttpEvent::post(LEADS).json(&lead)?;
    bare.send(&stand.intake).await?.assert_error(401, "unauthorized");
    bare.clone().header("x-api-key", "tlk_nonsense").send(&stand.intake).await?.assert_error(401, "invalid_api_key");
    let unknown = format!("tlk_00000000_{}", "0".repeat(40));
    bare.clone().header("x-api-key", unknown).send(&stand.intake).await?.assert_error(401, "invalid_api_key");
    bare.clone().header("x-api-key", other).send(&stand.intake).await?.assert_error(403, "missing_scope");
    let nowhere = HttpEvent::post(LEADS).json(&json!({ "form_id": Uuid::new_v4(), "phone": "9812345678" }))?;
    nowhere.send(&stand.intake).await?.assert_error_at(404, "form_not_found", "form_id");
    assert_eq!(stand.value("select count(*) from public.leads").await?, "0");
    Ok(())
}

#[tokio::test]
async fn a_public_form_takes_what_it_asks_and_says_nothing_of_who_is_known() -> Result<()> {
    let stand = Stand::start().await?;
    let form = form(&stand, 30).await?;
    let submit = |phone: &str, extra: &[(&str, &str)]| {
        let mut pairs = vec![
            ("form_id".to_owned(), form.to_string()),
            ("name".to_owned(), "Kim".to_owned()),
            ("phone".to_owned(), phone.to_owned()),
        ];
        pairs.extend(extra.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        HttpEvent::post(LEADS).form(&pairs)
    };
    let first = submit("98000 00001", &[("budget", "5"), ("status", "converted")]).send(&stand.intake).await?;
    let again = submit("98000 00001", &[]).send(&stand.intake).await?;
    assert_eq!((first.status, &first.body), (200, &again.body));
    assert_eq!(first.headers["access-control-allow-origin"], "*");
    assert_eq!(
        stand.value("select concat_ws('|', name, phone, source, status, raw_data) from public.leads").await?,
        r#"Kim|+919800000001|form|new|{"budget": "5"}"#
    );
    assert_eq!(
        stand.value("select scope || ': ' || consent_text || ' ' || source from public.consents").await?,
        "call_service: You may call me form"
    );

    let machine = submit("98000 00002", &[("_hp", "http://spam.example")]).send(&stand.intake).await?;
    assert_eq!((machine.status, &machine.body), (200, &first.body), "a machine learns nothing");
    assert_eq!(stand.value("select count(*) from public.leads").await?, "1", "and leaves nothing");
    let blank = HttpEvent::post(&format!("{LEADS}?form_id={form}")).json(&json!({ "phone": "9800000003" }))?;
    blank.send(&stand.intake).await?.assert_error_at(422, "missing_field", "name");
    let preflight = HttpEvent::new("OPTIONS", LEADS).send(&stand.intake).await?;
    assert_eq!((preflight.status, &preflight.headers["access-control-allow-origin"]), (204, &json!("*")));
    Ok(())
}

#[tokio::test]
async fn more_than_a_form_takes_is_429_and_says_when_to_come_again() -> Result<()> {
    let stand = Stand::start().await?;
    let form = form(&stand, 3).await?;
    let mut statuses = Vec::new();
    for number in 0..4 {
        let lead = json!({ "form_id": form, "name": "Kim", "phone": format!("98000000{number:02}") });
        let answer = HttpEvent::post(LEADS).json(&lead)?.send(&stand.intake).await?;
        statuses.push(answer.status);
        if answer.status == 429 {
            answer.assert_error(429, "rate_limited");
            let wait = answer.json()["details"]["retry_after"].as_u64().context("retry_after")?;
            assert!((1..=60).contains(&wait), "{wait}");
            let header = answer.headers["retry-after"].as_str().map(str::to_owned).unwrap_or_default();
            assert_eq!(header, wait.to_string());
        }
    }
    assert_eq!(statuses, [200, 200, 200, 429]);
    assert_eq!(stand.value("select count(*) from public.leads").await?, "3");
    Ok(())
}
