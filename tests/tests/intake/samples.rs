//! Requests as AWS hands them over, recorded: what is verified is the configured origin with the raw path and query.

use anyhow::{Context, Result};
use local::parts::folder;
use serde_json::{Value, json};
use shared::seal::Sealer;
use tests::{Stack, events, scene, supervisor_binary};
use uuid::Uuid;

/// A sample, the account that it is for, what that account signs with, and the number that is called.
const SAMPLES: [(&str, &str, &str, &str, &str); 2] = [
    (
        "http_api_plivo_inbound",
        "plivo",
        "00000000-0000-4000-9460-000000000001",
        "cGxpdm8tc2FtcGxlLXRva2Vu",
        "+14155550100",
    ),
    (
        "function_url_twilio_inbound",
        "twilio",
        "00000000-0000-4000-9460-000000000002",
        "8a1f0c2b9d7e6f5a4b3c2d1e0f9a8b7c",
        "+14155550101",
    ),
];

fn sample(name: &str) -> Result<Value> {
    let path = folder::workspace()?.join(format!("tests/fixtures/events/{name}.json"));
    Ok(serde_json::from_str(&std::fs::read_to_string(&path).with_context(|| path.display().to_string())?)?)
}

/// What is changed on the way, and whether the request is still the carrier's.
fn changes() -> Vec<(&'static str, Value, bool)> {
    vec![
        ("/headers/host", json!("evil.example.com"), true),
        ("/headers/x-forwarded-proto", json!("gopher"), true),
        ("/requestContext/domainName", json!("evil.example.com"), true),
        ("/requestContext/stage", json!("prod"), true),
        ("/queryStringParameters", json!({}), true),
        ("/rawQueryString", json!("b=3"), false),
        ("/body", json!("Q2FsbFNpZD14"), false),
        ("/isBase64Encoded", json!(false), false),
    ]
}

#[tokio::test]
async fn a_sample_is_verified_and_answered_whatever_the_proxy_says() -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    let tenant = scene::sign_up(&stack, "Acme Homes").await?;
    let intake = stack.intake()?;
    for (name, carrier, account, secret, number) in SAMPLES {
        let account: Uuid = account.parse()?;
        let sealed = Sealer::new(&stack.keys.secrets()?.seal_keys)?.seal(secret, &account.to_string())?;
        stack
            .sql
            .execute(
                "insert into public.carrier_accounts (id, provider, account_sid, credentials_sealed, api_base) \
                 values ($1, $2::text::public.carrier_provider, $3, $4, 'https://carrier.example.com')",
                &[&account, &carrier, &name, &sealed],
            )
            .await?;
        stack
            .sql
            .execute(
                "insert into public.caller_numbers (organization_id, carrier_account_id, phone_number) values ($1, $2, $3)",
                &[&tenant.id, &account, &number],
            )
            .await?;
        let event = sample(name)?;
        let answer = events::invoke(&intake, event.clone()).await?;
        let body = answer["body"].as_str().unwrap_or_default();
        assert!(answer["statusCode"] == 200 && body.contains("wss://voice.example.com/stream/"), "{name}: {answer}");
        for (pointer, value, is_good) in changes() {
            let mut changed = event.clone();
            *changed.pointer_mut(pointer).with_context(|| format!("{name} has no {pointer}"))? = value;
            let answer = events::invoke(&intake, changed).await?;
            assert_eq!(answer["statusCode"] == 200, is_good, "{name} {pointer}: {answer}");
        }
    }
    let calls =
        "select string_agg(caller_number || ' ' || status, ', ') from public.call_logs where direction = 'inbound'";
    assert_eq!(stack.value(calls).await?, "+14155550111 ringing, +14155550111 ringing", "each call is taken down once");
    Ok(())
}
