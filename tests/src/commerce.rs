//! Shops and payment gateways: their sources, and their recorded deliveries, signed as each platform signs.

use crate::{Stack, events::HttpEvent, scene::Tenant};
use anyhow::{Context, Result};
use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::json;
use shared::{
    mac::{self, Hash},
    seal::Sealer,
};
use std::fs;
use uuid::Uuid;

/// What every source of these tests signs with.
pub const SECRET: &str = "hush & hush";
/// The organization's store at Shopify, as Shopify knows it.
pub const SHOP: &str = "near.myshopify.com";

/// A body as it was delivered, byte for byte.
pub fn delivery(provider: &str, name: &str) -> Result<Vec<u8>> {
    let path = local::parts::folder::workspace()?.join(format!("tests/fixtures/intake/{provider}/{name}.json"));
    fs::read(&path).with_context(|| path.display().to_string())
}

/// The HMAC-SHA256 of a body under [`SECRET`].
pub fn hmac(parts: &[&[u8]]) -> Vec<u8> {
    mac::hmac(Hash::Sha256, SECRET.as_bytes(), parts)
}

/// A source with [`SECRET`], and its store where it is an organization's.
pub async fn source(stack: &Stack, provider: &str, store: Option<(&Tenant, &str, &str)>) -> Result<Uuid> {
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

/// The path of a source's deliveries.
pub fn path(provider: &str, source: Uuid) -> String {
    format!("/functions/v1/webhook-intake/{provider}/{source}")
}

/// A delivery of Shopify's, signed.
pub fn shopify(source: Uuid, topic: &str, body: &[u8]) -> HttpEvent {
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
pub fn woocommerce(source: Uuid, topic: &str, body: &[u8]) -> HttpEvent {
    HttpEvent::post(&path("woocommerce", source))
        .header("content-type", "application/json")
        .header("x-wc-webhook-topic", topic)
        .header("x-wc-webhook-source", "https://woo.example.com/")
        .header("x-wc-webhook-delivery-id", Uuid::new_v4().simple().to_string())
        .header("x-wc-webhook-signature", STANDARD.encode(hmac(&[body])))
        .body(body)
}

/// An event of Stripe's, signed at `time`.
pub fn stripe_at(source: Uuid, body: &[u8], time: i64) -> HttpEvent {
    let signature = hex::encode(hmac(&[time.to_string().as_bytes(), b".", body]));
    HttpEvent::post(&path("stripe", source))
        .header("content-type", "application/json")
        .header("stripe-signature", format!("t={time},v1={signature},v0=00"))
        .body(body)
}

/// An event of Stripe's, signed now.
pub fn stripe(source: Uuid, body: &[u8]) -> HttpEvent {
    stripe_at(source, body, chrono::Utc::now().timestamp())
}

/// An event of Razorpay's, signed.
pub fn razorpay(source: Uuid, body: &[u8]) -> HttpEvent {
    HttpEvent::post(&path("razorpay", source))
        .header("content-type", "application/json")
        .header("x-razorpay-event-id", Uuid::new_v4().simple().to_string())
        .header("x-razorpay-signature", hex::encode(hmac(&[body])))
        .body(body)
}
