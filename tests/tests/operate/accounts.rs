//! Accounts that an operator enters: sealed for their row, used as they are, and sealed anew when a key is to go.

use anyhow::Result;
use local::{
    operate::accounts::{Accounts, With, run},
    parts::{folder::RunFolder, postgres::Role},
};
use serde_json::{Value, json};
use shared::{seal::Sealer, secrets::NumberedKey};
use std::fs;
use tests::{Stack, events::HttpEvent, scene, supervisor_binary};
use uuid::Uuid;

#[tokio::test]
async fn what_is_entered_is_sealed_for_its_row_and_anew_under_the_next_key() -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    let tenant = scene::sign_up(&stack, "Acme Homes").await?;
    let folder = RunFolder::create()?;
    let file = folder.path().join("secret.json");
    fs::write(&file, stack.keys.secret_json())?;
    let with = || With::of(&file, stack.database.url(Role::Owner));

    let carrier = |number: Option<&str>, caller| Accounts::AddCarrier {
        provider: "plivo".to_owned(),
        sid: "MA1".to_owned(),
        api_base: "https://api.plivo.com".parse().unwrap(),
        organization: None,
        number: number.map(str::to_owned),
        caller,
        with: with(),
    };
    assert!(run(&carrier(None, None), &b""[..]).await.is_err(), "no credentials");
    assert!(run(&carrier(Some("+918044440001"), None), &b"token"[..]).await.is_err(), "a number of nobody's");
    assert_eq!(stack.value("select count(*) from public.carrier_accounts").await?, "0", "nothing is half done");
    let said = run(&carrier(Some("+918044440001"), Some(tenant.id)), &b"the token\n"[..]).await?;
    assert!(said.contains("/plivo/inbound/") && !said.contains("the token"), "{said}");
    let gateway = Accounts::AddGateway {
        gateway: "razorpay".to_owned(),
        api_base: "https://api.razorpay.com".parse()?,
        return_url: None,
        currency: vec!["INR".to_owned()],
        with: with(),
    };
    run(&gateway, &br#"{"key_id":"rzp","key_secret":"s"}"#[..]).await?;
    run(&Accounts::AddSource { provider: "razorpay".to_owned(), with: with() }, &b"hook"[..]).await?;
    let endpoint = HttpEvent::post("/functions/v1/event-delivery/endpoints")
        .bearer(tenant.jwt())
        .json(&json!({ "url": "https://example.com/hooks" }))?
        .send(&stack.delivery()?)
        .await?;
    assert_eq!(endpoint.status, 201, "{}", endpoint.body);

    let opened = async |keys: &[NumberedKey]| -> Result<Vec<String>> {
        let sealer = Sealer::new(keys)?;
        let rows = "select id, credentials_sealed from public.carrier_accounts
            union all select id, credentials_sealed from private.payment_accounts
            union all select endpoint_id, secret_sealed from private.webhook_endpoint_secrets
            union all select id, secrets_sealed[1] from public.webhook_sources";
        let mut texts = Vec::new();
        for row in stack.sql.query(rows, &[]).await? {
            texts.push(sealer.open(row.get(1), &row.get::<_, Uuid>(0).to_string())?);
        }
        Ok(texts)
    };
    let old = stack.keys.secrets()?.seal_keys;
    let before = opened(&old).await?;
    assert_eq!((before.len(), before[0].as_str(), before[3].as_str()), (4, "the token", "hook"));

    let mut secret: Value = serde_json::from_str(&stack.keys.secret_json())?;
    let next = json!({ "id": 200, "key": "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=" });
    secret["seal_keys"].as_array_mut().unwrap().insert(0, next.clone());
    fs::write(&file, secret.to_string())?;
    run(&Accounts::Reseal { dry_run: true, with: with() }, &b""[..]).await?;
    assert_eq!(opened(&old).await?, before, "a dry run");
    let said = run(&Accounts::Reseal { dry_run: false, with: with() }, &b""[..]).await?;
    assert_eq!(said.lines().filter(|line| line.ends_with(" 1")).count(), 4, "{said}");
    let new = [NumberedKey { id: 200, key: vec![1; 32] }];
    assert_eq!(opened(&new).await?, before, "the old key may go");
    assert!(opened(&old).await.is_err());
    let again = run(&Accounts::Reseal { dry_run: false, with: with() }, &b""[..]).await?;
    assert!(again.lines().skip(1).all(|line| line.ends_with(" 0")), "{again}");
    Ok(())
}
