//! Calls to our numbers: whose they are, what they hear, and what is kept of them.

use anyhow::Result;
use serde_json::{Value, json};
use shared::telephony::CallbackEvent;
use tests::{
    Stack,
    deliveries::{Account, CARRIERS, Call, Delivery, recorded},
    events::HttpEvent,
    scene::{self, Tenant},
    supervisor_binary,
};
use uuid::Uuid;
use webhook_intake::Intake;

const NUMBER: &str = "+14155550100";

struct Scene {
    stack: Stack,
    tenant: Tenant,
    intake: Intake,
    account: Account,
    store: Uuid,
}

/// A store whose number rings on an account with this carrier.
async fn store(carrier: &'static str) -> Result<Scene> {
    let stack = Stack::start(supervisor_binary!()).await?;
    let tenant = scene::sign_up(&stack, "Acme Homes").await?;
    let account = Account::create(&stack, carrier).await?;
    let store = "insert into public.stores (organization_id, name, domain, platform) values ($1, 'Shop', 'shop.example.com', 'shopify') returning id";
    let store: Uuid = stack.sql.query_one(store, &[&tenant.id]).await?.get(0);
    stack
        .sql
        .execute(
            "insert into public.store_phone_numbers (organization_id, store_id, carrier_account_id, phone_number) values ($1, $2, $3, $4)",
            &[&tenant.id, &store, &account.id, &NUMBER],
        )
        .await?;
    let intake = stack.intake()?;
    Ok(Scene { stack, tenant, intake, account, store })
}

fn call(from: &str, to: &str) -> Call {
    Call { attempt: None, sid: Uuid::new_v4().to_string(), from: from.to_owned(), to: to.to_owned() }
}

/// The request for a document.
fn asks(carrier: &str) -> Delivery {
    let (form, json) = match carrier {
        "plivo" => (
            json!({ "CallUUID": "{call}", "Event": "StartApp", "CallStatus": "ringing", "Direction": "inbound", "From": "{from}", "To": "{to}" }),
            None,
        ),
        "vonage" => (
            Value::Null,
            Some(json!({ "uuid": "{call}", "conversation_uuid": "CON-{call}", "from": "{from}", "to": "{to}" })),
        ),
        // TeXML speaks as TwiML does.
        _ => (
            json!({ "CallSid": "{call}", "CallStatus": "ringing", "Direction": "inbound", "From": "{+from}", "To": "{+to}" }),
            None,
        ),
    };
    Delivery {
        name: "asks".to_owned(),
        event: "inbound".to_owned(),
        life: false,
        form: form.as_object().cloned(),
        json,
        expect: Default::default(),
    }
}

/// The end, sent to the account's URL, as carriers do that have but one.
fn end(carrier: &str) -> Result<Delivery> {
    let named = if carrier == "telnyx" || carrier == "plivo" { "hangup" } else { "completed" };
    let mut end = recorded(carrier)?
        .into_iter()
        .find(|delivery| delivery.name == named)
        .unwrap_or_else(|| panic!("{carrier} has no {named}"));
    end.event = "inbound".to_owned();
    Ok(end)
}

impl Scene {
    fn send(&self, call: &Call, delivery: &Delivery) -> Result<HttpEvent> {
        self.account.deliver(&self.stack, call, delivery)
    }

    async fn rows(&self) -> Result<String> {
        self.stack
            .value(
                "select string_agg(concat_ws(' ', log.direction, log.caller_number, log.callee_number, log.status, log.call_status, call.status, call.from_phone), ', ' order by log.id)
                 from public.call_logs as log left join public.calls as call on call.call_log_id = log.id",
            )
            .await
    }
}

async fn a_call_to_a_store(carrier: &'static str) -> Result<()> {
    let scene = store(carrier).await?;
    let call = call("+14155550111", NUMBER);
    let asked = scene.send(&call, &asks(carrier))?;
    let answer = asked.send(&scene.intake).await?;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let attempt = scene.stack.value("select id from public.call_logs").await?;
    assert!(answer.body.contains(&format!("wss://voice.example.com/stream/{attempt}/")), "{}", answer.body);
    assert_eq!(scene.rows().await?, format!("inbound +14155550111 {NUMBER} ringing ringing +14155550111"));
    assert_eq!(
        asked.send(&scene.intake).await?.body.matches(&attempt).count(),
        answer.body.matches(&attempt).count(),
        "again, the same call"
    );

    // The document's own callback says that the agent hears the caller.
    let (_, rest) = answer
        .body
        .split_once(&format!("/functions/v1/webhook-intake/{carrier}/stream/"))
        .expect("a callback for the stream");
    let token: String = rest.chars().take_while(|c| c.is_ascii_alphanumeric() || "._-".contains(*c)).collect();
    let path = format!("/functions/v1/webhook-intake/{carrier}/{}/{token}", CallbackEvent::Stream.as_str());
    let began = recorded(carrier)?.into_iter().find(|delivery| delivery.name == "stream started").expect("it begins");
    let answer = scene.account.send(&path, &call, &began)?.send(&scene.intake).await?;
    assert_eq!((answer.status, &answer.json()["result"]), (200, &json!("applied")), "{}", answer.body);
    assert_eq!(scene.stack.value("select stream_status from public.call_logs").await?, "started");

    let answer = scene.send(&call, &end(carrier)?)?.send(&scene.intake).await?;
    assert_eq!((answer.status, &answer.json()["result"]), (200, &json!("applied")), "{}", answer.body);
    assert_eq!(scene.rows().await?, format!("inbound +14155550111 {NUMBER} ended answered completed +14155550111"));
    let of = format!(
        "select (organization_id = '{}' and store_id = '{}')::text from public.calls",
        scene.tenant.id, scene.store
    );
    assert_eq!(scene.stack.value(&of).await?, "true");
    Ok(())
}

#[tokio::test]
async fn a_store_is_called_over_plivo() -> Result<()> {
    a_call_to_a_store("plivo").await
}

#[tokio::test]
async fn a_store_is_called_over_twilio() -> Result<()> {
    a_call_to_a_store("twilio").await
}

#[tokio::test]
async fn a_store_is_called_over_telnyx() -> Result<()> {
    a_call_to_a_store("telnyx").await
}

#[tokio::test]
async fn a_store_is_called_over_vonage() -> Result<()> {
    a_call_to_a_store("vonage").await
}

#[tokio::test]
async fn an_end_that_comes_first_opens_the_call_and_nothing_is_connected_any_more() -> Result<()> {
    let scene = store("twilio").await?;
    let call = call("anonymous", NUMBER);
    scene.send(&call, &end("twilio")?)?.send(&scene.intake).await?;
    let answer = scene.send(&call, &asks("twilio"))?.send(&scene.intake).await?;
    assert!(answer.body.contains("<Say>Sorry") && answer.body.contains("<Hangup />"), "{}", answer.body);
    assert_eq!(scene.rows().await?, format!("inbound anonymous {NUMBER} ended answered completed anonymous"));
    Ok(())
}

#[tokio::test]
async fn a_number_that_is_nobody_s_hears_so_and_is_kept() -> Result<()> {
    let scene = store("plivo").await?;
    let answer = scene.send(&call("+14155550111", "+14155559999"), &asks("plivo"))?.send(&scene.intake).await?;
    assert_eq!(answer.status, 200);
    assert!(answer.body.contains("<Speak>Sorry") && answer.body.contains("<Hangup/>"), "{}", answer.body);
    assert_eq!(scene.rows().await?, "");
    let kept = "select source || ' ' || kind || ' ' || status || ' ' || error from private.webhook_events";
    assert_eq!(scene.stack.value(kept).await?, "plivo inbound orphan unknown_number");
    Ok(())
}

#[tokio::test]
async fn a_call_that_is_not_the_carrier_s_is_refused() -> Result<()> {
    for carrier in CARRIERS {
        let scene = store(carrier).await?;
        let stranger = Account::create(&scene.stack, carrier).await?;
        let call = call("+14155550111", NUMBER);
        let path = scene.account.path(&scene.stack, &call, "inbound")?;
        stranger.send(&path, &call, &asks(carrier))?.send(&scene.intake).await?.assert_error(403, "bad_signature");
        let nobody = path.replace(&scene.account.id.to_string(), "nobody");
        scene
            .account
            .send(&nobody, &call, &asks(carrier))?
            .send(&scene.intake)
            .await?
            .assert_error(403, "bad_signature");
        assert_eq!(scene.stack.value("select count(*) from private.webhook_events").await?, "0");
    }
    Ok(())
}

#[tokio::test]
async fn a_call_is_answered_and_kept_while_the_database_is_away() -> Result<()> {
    let scene = store("plivo").await?;
    let call = call("+14155550111", NUMBER);
    // The account's secret is known, the number's owner is not.
    scene.send(&call, &end("plivo")?)?.send(&scene.intake).await?;
    scene.stack.postgrest.kill().await?;
    let other = self::call("+14155550112", NUMBER);
    let answer = scene.send(&other, &asks("plivo"))?.send(&scene.intake).await?;
    assert!(answer.status == 200 && answer.body.contains("<Speak>Sorry"), "{}", answer.body);
    scene.stack.postgrest.restart().await?;
    scene.stack.intake_queue.deliver(&scene.intake).await?;
    assert_eq!(
        scene.stack.value(&format!("select status from public.call_logs where call_sid = '{}'", other.sid)).await?,
        "ringing"
    );
    Ok(())
}
