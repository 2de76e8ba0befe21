//! Shops, payment gateways and those who send leads: each recorded delivery changes the row that it names, in whatever order it comes,
//! however often, and only when it is signed.

mod clients;
mod gateways;
mod leads;
mod shops;
mod signatures;

use anyhow::{Context, Result};
use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use shared::{
    mac::{self, Hash},
    seal::Sealer,
};
use std::fs;
use tests::{
    Stack,
    events::{Answer, HttpEvent},
    scene::{self, Tenant},
    supervisor_binary,
};
use uuid::Uuid;
use webhook_intake::Intake;

/// What every source of these tests signs with.
const SECRET: &str = "hush & hush";
/// The organization's store at Shopify, as Shopify knows it.
const SHOP: &str = "near.myshopify.com";

/// A body as it was delivered, byte for byte.
fn delivery(provider: &str, name: &str) -> Result<Vec<u8>> {
    let path = local::parts::folder::workspace()?.join(format!("tests/fixtures/intake/{provider}/{name}.json"));
    fs::read(&path).with_context(|| path.display().to_string())
}

/// The HMAC-SHA256 of a body under [`SECRET`].
fn hmac(parts: &[&[u8]]) -> Vec<u8> {
    mac::hmac(Hash::Sha256, SECRET.as_bytes(), parts)
}

/// A stack with an organization that has a shop at Shopify and one at WooCommerce, and the sources of the platform.
struct Stand {
    stack: Stack,
    intake: Intake,
    tenant: Tenant,
    shopify: Uuid,
    woocommerce: Uuid,
    stripe: Uuid,
    razorpay: Uuid,
}

impl Stand {
    async fn start() -> Result<Self> {
        let stack = Stack::start(supervisor_binary!()).await?;
        let tenant = scene::sign_up(&stack, "Near").await?;
        // Erasing is another part's; where that part is not there, nothing is written down elsewhere.
        stack
            .sql
            .batch_execute(
                "do $$ begin if to_regprocedure('private.erase(jsonb,timestamptz)') is null then
                   create function private.erase(request jsonb, at timestamptz) returns jsonb language sql as 'select ''{}''::jsonb';
                 end if; end $$",
            )
            .await?;
        let shopify = source(&stack, "shopify", Some((&tenant, "shop.example.com", "INR"))).await?;
        let woocommerce = source(&stack, "woocommerce", Some((&tenant, "woo.example.com", "JPY"))).await?;
        let stripe = source(&stack, "stripe", None).await?;
        let razorpay = source(&stack, "razorpay", None).await?;
        let intake = stack.intake()?;
        Ok(Self { stack, intake, tenant, shopify, woocommerce, stripe, razorpay })
    }

    /// A value from the database, as text.
    async fn value(&self, sql: &str) -> Result<String> {
        self.stack.value(sql).await
    }

    /// Sends an event and fails unless it ends so.
    async fn expect(&self, event: &HttpEvent, result: &str) -> Result<()> {
        let answer = event.send(&self.intake).await?;
        let error =
            self.value("select coalesce(error, '') from private.webhook_events order by id desc limit 1").await?;
        assert_eq!(answer.json()["result"], result, "{} {} {error}", answer.status, answer.body);
        Ok(())
    }

    /// Applies again what failed, as if its time had come.
    async fn sweep(&self) -> Result<()> {
        self.stack
            .sql
            .batch_execute("update private.webhook_events set next_try_at = now() where status = 'failed'")
            .await?;
        tests::events::job(&self.intake, "sweep").await?;
        Ok(())
    }
}

/// A source with [`SECRET`], and its store where it is an organization's.
async fn source(stack: &Stack, provider: &str, store: Option<(&Tenant, &str, &str)>) -> Result<Uuid> {
    let id = Uuid::new_v4();
    let sealed = Sealer::new(&stack.keys.secrets()?.seal_keys)?.seal(SECRET, &id.to_string())?;
    let (organization, store_id) = match store {
        Some((tenant, domain, currency)) => {
            let store = Uuid::new_v4();
            stack
                .sql
                .execute(
                    "insert into public.stores (id, organization_id, name, domain, platform, currency_code, status) \
                     values ($1, $2, $3, $3, $4::text::public.store_platform, $5, 'connected')",
                    &[&store, &tenant.id, &domain, &provider, &currency],
                )
                .await?;
            (Some(tenant.id), Some(store))
        }
        None => (None, None),
    };
    let settings = if provider == "shopify" { json!({ "shop_domain": SHOP }) } else { json!({}) };
    stack
        .sql
        .execute(
            "insert into public.webhook_sources (id, organization_id, store_id, provider, name, secrets_sealed, settings) \
             values ($1, $2, $3, $4, $4, array[$5], $6)",
            &[&id, &organization, &store_id, &provider, &sealed, &settings],
        )
        .await?;
    Ok(id)
}

fn path(provider: &str, source: Uuid) -> String {
    format!("/functions/v1/webhook-intake/{provider}/{source}")
}

/// A delivery of Shopify's, signed.
fn shopify(source: Uuid, topic: &str, body: &[u8]) -> HttpEvent {
    HttpEvent::post(&path("shopify", source))
        .header("content-type", "application/json")
        .header("x-shopify-topic", topic)
        .header("x-shopify-shop-domain", SHOP)
        .header("x-shopify-api-version", "2026-10")
        .header("x-shopify-webhook-id", Uuid::new_v4().to_string())
        .header("x-shopify-event-id", Uuid::new_v4().to_string())
        .header("x-shopify-hmac-sha256", STANDARD.encode(hmac(&[body])))
        .body(body)
}

/// A delivery of WooCommerce's, signed.
fn woocommerce(source: Uuid, topic: &str, body: &[u8]) -> HttpEvent {
    HttpEvent::post(&path("woocommerce", source))
        .header("content-type", "application/json")
        .header("x-wc-webhook-topic", topic)
        .header("x-wc-webhook-source", "https://woo.example.com/")
        .header("x-wc-webhook-delivery-id", Uuid::new_v4().simple().to_string())
        .header("x-wc-webhook-signature", STANDARD.encode(hmac(&[body])))
        .body(body)
}

/// An event of Stripe's, signed at `time`.
fn stripe_at(source: Uuid, body: &[u8], time: i64) -> HttpEvent {
    let signature = hex::encode(hmac(&[time.to_string().as_bytes(), b".", body]));
    HttpEvent::post(&path("stripe", source))
        .header("content-type", "application/json")
        .header("stripe-signature", format!("t={time},v1={signature},v0=00"))
        .body(body)
}

/// An event of Stripe's, signed now.
fn stripe(source: Uuid, body: &[u8]) -> HttpEvent {
    stripe_at(source, body, chrono::Utc::now().timestamp())
}

/// An event of Razorpay's, signed.
fn razorpay(source: Uuid, body: &[u8]) -> HttpEvent {
    HttpEvent::post(&path("razorpay", source))
        .header("content-type", "application/json")
        .header("x-razorpay-event-id", Uuid::new_v4().simple().to_string())
        .header("x-razorpay-signature", hex::encode(hmac(&[body])))
        .body(body)
}

/// All orders of `0..n`.
fn orders(n: usize) -> Vec<Vec<usize>> {
    if n == 0 {
        return vec![Vec::new()];
    }
    let shorter = orders(n - 1);
    shorter
        .into_iter()
        .flat_map(|order| {
            (0..n).map(move |place| {
                let mut longer = order.clone();
                longer.insert(place, n - 1);
                longer
            })
        })
        .collect()
}

fn result(answer: &Answer) -> Value {
    answer.json()["result"].clone()
}
