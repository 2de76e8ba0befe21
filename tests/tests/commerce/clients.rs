//! The providers' own libraries as clients: what they sign is accepted, and what they call wrong is refused.

use super::*;
use anyhow::ensure;
use local::parts::{
    folder::{self, RunFolder},
    install,
    progress::Progress,
};
use std::fs;
use tests::agents;
use tokio::process::Command;

async fn run(settings: &Value) -> Result<Value> {
    folder::require_program("node", "to run the client")?;
    let modules = install::signature_clients(&Progress::hidden()).await?;
    let folder = RunFolder::create()?;
    // A module is looked for beside the program that wants it.
    std::os::unix::fs::symlink(modules, folder.path().join("node_modules"))?;
    let program = folder.path().join("signatures.mjs");
    fs::copy(folder::workspace()?.join("tests/clients/signatures.mjs"), &program)?;
    let output = Command::new("node")
        .arg(&program)
        .env("TRUNKLINE", settings.to_string())
        .env_remove("NODE_OPTIONS")
        .kill_on_drop(true)
        .output()
        .await?;
    ensure!(output.status.success(), "the client failed: {}", String::from_utf8_lossy(&output.stderr));
    tests::programs::last_json(&String::from_utf8_lossy(&output.stdout))
}

#[tokio::test]
async fn what_the_official_libraries_sign_is_accepted() -> Result<()> {
    let stand = Stand::start().await?;
    let text = |provider: &str, name: &str| -> Result<String> { Ok(String::from_utf8(delivery(provider, name)?)?) };
    let shop_body = text("shopify", "orders_create")?.replace("Ring twice", "Zweimal läuten, 二度");
    let stripe_body = text("stripe", "payment_intent_succeeded")?;
    let razorpay_body = text("razorpay", "payment_captured")?;
    let right = hex::encode(hmac(&[razorpay_body.as_bytes()]));
    let wrong = hex::encode(hmac(&[razorpay_body.as_bytes(), b" "]));
    // An agent of one's own speaks Standard Webhooks: its deliveries as we would sign them, whole and with something changed.
    let agent = agents::connect(&stand.stack, &stand.intake, &stand.tenant, "agent", json!({})).await?;
    let said_by_agent = agents::recorded("agent", "started", Uuid::new_v4(), "standard")?
        .replace("started\"", "started\",\"say\":\"हाँ\"");
    let ours: serde_json::Map<String, Value> = agent
        .signatures(said_by_agent.as_bytes(), chrono::Utc::now().timestamp_millis())
        .into_iter()
        .map(|(name, value)| (name, json!(value)))
        .collect();
    let mut renamed = ours.clone();
    renamed.insert("webhook-id".to_owned(), json!("msg_another"));
    let said = run(&json!({
        "secret": SECRET,
        "standard": { "secret": agent.secret, "id": "msg_of_the_library", "body": said_by_agent, "signed": [
            { "headers": ours, "body": said_by_agent },
            { "headers": renamed, "body": said_by_agent },
            { "headers": ours, "body": format!("{said_by_agent} ") },
        ] },
        "bodies": { "shopify": shop_body, "stripe": stripe_body },
        "signed": { "razorpay": [
            { "body": razorpay_body, "signature": right }, { "body": razorpay_body, "signature": wrong },
        ] },
    }))
    .await?;
    let text = |name: &str| said[name].as_str().unwrap_or_default().to_owned();
    let event = shopify(stand.shopify, "orders/create", shop_body.as_bytes());
    stand.expect(&event.header("x-shopify-hmac-sha256", text("shopify")), "applied").await?;
    assert_eq!(stand.value("select customer_notes from public.orders").await?, "Zweimal läuten, 二度");
    let event = stripe(stand.stripe, stripe_body.as_bytes()).header("stripe-signature", text("stripe"));
    let answer = event.send(&stand.intake).await?;
    assert_eq!((answer.status, result(&answer)), (202, json!("orphan")), "{}", answer.body);

    assert_eq!(said["razorpay"], json!([true, false]));
    for (signature, status) in [(right, 202), (wrong, 403)] {
        let event = razorpay(stand.razorpay, razorpay_body.as_bytes()).header("x-razorpay-signature", signature);
        assert_eq!(event.send(&stand.intake).await?.status, status);
    }
    let standard = &said["standard"];
    assert_eq!(standard["verified"], json!([true, false, false]), "what we sign");
    let signed = |body: &str| {
        let event = HttpEvent::post(&agents::path("agent", agent.id))
            .header("content-type", "application/json")
            .header("webhook-id", "msg_of_the_library")
            .body(body);
        ["timestamp", "signature"].into_iter().fold(event, |event, name| {
            event.header(&format!("webhook-{name}"), standard[name].as_str().unwrap_or_default())
        })
    };
    let answer = signed(&said_by_agent).send(&stand.intake).await?;
    assert_eq!((answer.status, result(&answer)), (202, json!("orphan")), "what it signs: {}", answer.body);
    assert_eq!(signed(&format!("{said_by_agent} ")).send(&stand.intake).await?.status, 403);
    Ok(())
}
