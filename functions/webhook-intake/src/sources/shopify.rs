//! Shopify: webhooks of an app, signed with its client secret over the raw body.
//!
//! Facts: shopify.dev/docs/apps/build/webhooks (headers, HMAC, topics) and the REST Admin API's shapes of order, product, customer,
//! refund and shop; shopify.dev/docs/apps/build/privacy-law-compliance for the three privacy topics.

use super::{
    Event, OpenSource, Payload, Source, invalid_settings,
    wire::{self, Exact, Told, decimal, text},
};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use shared::{Error, Result, http::Request};

/// The source.
pub struct Shopify;

const SIGNATURE: &str = "x-shopify-hmac-sha256";
const TOPIC: &str = "x-shopify-topic";
const SHOP: &str = "x-shopify-shop-domain";
const WEBHOOK_ID: &str = "x-shopify-webhook-id";
const EVENT_ID: &str = "x-shopify-event-id";
const API_VERSION: &str = "x-shopify-api-version";

impl Source for Shopify {
    fn name(&self) -> &'static str {
        "shopify"
    }

    fn signed_headers(&self) -> &'static [&'static str] {
        &[SIGNATURE, TOPIC, SHOP, WEBHOOK_ID, EVENT_ID, API_VERSION]
    }

    fn verify(&self, source: &OpenSource, request: &Request, _: i64) -> bool {
        let given = request.header(SIGNATURE).unwrap_or_default();
        wire::is_base64_hmac(source.keys(), &[&request.body], given)
    }

    fn read(&self, _: &OpenSource, request: &Request) -> Result<Vec<Event>> {
        let header = |name: &'static str| {
            request
                .header(name)
                .filter(|value| !value.is_empty())
                .ok_or_else(|| Error::malformed(name, "the header is missing"))
        };
        let headers = Headers {
            topic: header(TOPIC)?,
            shop: header(SHOP)?,
            api_version: request.header(API_VERSION),
            event_id: request.header(EVENT_ID),
        };
        // The topic is part of the key: a body that is sent once more under another one is another event.
        let id = header(WEBHOOK_ID).map_or_else(|_| super::digest(&request.body), str::to_owned);
        let key = format!("{id}|{}", headers.topic);
        Ok(vec![read(&headers, &request.body).event(headers.topic, key, Payload::Store)])
    }

    fn check_settings(&self, settings: &Value) -> Result<()> {
        check_shop_settings(settings)
    }
}

/// A shop's only setting: the name under which its platform knows it, where that is not the store's domain.
pub fn check_shop_settings(settings: &Value) -> Result<()> {
    let settings = settings.as_object().ok_or_else(|| invalid_settings("settings are an object"))?;
    for (name, value) in settings {
        let is_host = value.as_str().is_some_and(|host| {
            (1..=255).contains(&host.len())
                && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-'))
        });
        if name != "shop_domain" || !is_host {
            return Err(invalid_settings(
                "the only setting is shop_domain, the host name by which the platform knows the shop",
            ));
        }
    }
    Ok(())
}

/// Headers that say what an event is.
pub struct Headers<'r> {
    /// `orders/create`.
    pub topic: &'r str,
    /// The shop's `…myshopify.com`.
    pub shop: &'r str,
    /// As `2026-10`.
    pub api_version: Option<&'r str>,
    /// One a change in the shop, whatever events follow from it.
    pub event_id: Option<&'r str>,
}

#[derive(Deserialize)]
struct Amount {
    amount: Option<Exact>,
}

#[derive(Deserialize)]
struct MoneySet {
    shop_money: Option<Amount>,
}

impl MoneySet {
    fn decimal(&self) -> Option<&str> {
        decimal(&self.shop_money.as_ref()?.amount)
    }
}

#[derive(Deserialize)]
struct Order {
    id: Exact,
    name: Option<Exact>,
    order_number: Option<Exact>,
    email: Option<Exact>,
    contact_email: Option<Exact>,
    phone: Option<Exact>,
    currency: Option<Exact>,
    financial_status: Option<Exact>,
    fulfillment_status: Option<Exact>,
    cancelled_at: Option<Exact>,
    cancel_reason: Option<Exact>,
    processed_at: Option<Exact>,
    created_at: Option<Exact>,
    updated_at: Option<Exact>,
    subtotal_price: Option<Exact>,
    total_tax: Option<Exact>,
    total_discounts: Option<Exact>,
    total_price: Option<Exact>,
    total_shipping_price_set: Option<MoneySet>,
    shipping_lines: Option<Vec<ShippingLine>>,
    customer: Option<Customer>,
    shipping_address: Option<Value>,
    billing_address: Option<Value>,
    note: Option<Exact>,
    line_items: Option<Vec<Line>>,
    fulfillments: Option<Vec<Fulfillment>>,
    refunds: Option<Vec<Refund>>,
}

#[derive(Deserialize)]
struct ShippingLine {
    title: Option<Exact>,
}

#[derive(Deserialize)]
struct Line {
    id: Exact,
    product_id: Option<Exact>,
    variant_id: Option<Exact>,
    title: Option<Exact>,
    name: Option<Exact>,
    variant_title: Option<Exact>,
    sku: Option<Exact>,
    price: Option<Exact>,
    quantity: Option<Exact>,
    total_discount: Option<Exact>,
    discount_allocations: Option<Vec<Amount>>,
    fulfillment_status: Option<Exact>,
    fulfillable_quantity: Option<Exact>,
    properties: Option<Vec<Property>>,
}

#[derive(Deserialize)]
struct Property {
    name: Option<Exact>,
    value: Option<Value>,
}

#[derive(Deserialize)]
struct Fulfillment {
    status: Option<Exact>,
    shipment_status: Option<Exact>,
    created_at: Option<Exact>,
    updated_at: Option<Exact>,
    tracking_number: Option<Exact>,
    tracking_url: Option<Exact>,
}

#[derive(Deserialize)]
struct Refund {
    id: Exact,
    order_id: Option<Exact>,
    transactions: Option<Vec<Transaction>>,
}

#[derive(Deserialize)]
struct Transaction {
    kind: Option<Exact>,
    status: Option<Exact>,
    amount: Option<Exact>,
}

#[derive(Deserialize)]
struct Consent {
    state: Option<Exact>,
}

#[derive(Deserialize)]
struct Customer {
    id: Exact,
    email: Option<Exact>,
    phone: Option<Exact>,
    first_name: Option<Exact>,
    last_name: Option<Exact>,
    accepts_marketing: Option<bool>,
    email_marketing_consent: Option<Consent>,
    locale: Option<Exact>,
    state: Option<Exact>,
    tags: Option<Exact>,
    updated_at: Option<Exact>,
    created_at: Option<Exact>,
}

#[derive(Deserialize)]
struct Product {
    id: Exact,
    title: Option<Exact>,
    body_html: Option<Exact>,
    vendor: Option<Exact>,
    product_type: Option<Exact>,
    handle: Option<Exact>,
    status: Option<Exact>,
    tags: Option<Exact>,
    published_at: Option<Exact>,
    updated_at: Option<Exact>,
    variants: Option<Vec<Variant>>,
    images: Option<Vec<Image>>,
}

#[derive(Deserialize)]
struct Variant {
    id: Exact,
    price: Option<Exact>,
    compare_at_price: Option<Exact>,
    sku: Option<Exact>,
    barcode: Option<Exact>,
    position: Option<Exact>,
    inventory_quantity: Option<Exact>,
    inventory_management: Option<Exact>,
    inventory_policy: Option<Exact>,
    weight: Option<Exact>,
    weight_unit: Option<Exact>,
}

#[derive(Deserialize)]
struct Image {
    id: Exact,
    src: Option<Exact>,
    alt: Option<Exact>,
    position: Option<Exact>,
}

#[derive(Deserialize)]
struct Shop {
    domain: Option<Exact>,
    myshopify_domain: Option<Exact>,
}

#[derive(Deserialize)]
struct Privacy {
    shop_domain: Option<Exact>,
    customer: Option<PrivacyCustomer>,
    orders_to_redact: Option<Vec<Exact>>,
    orders_requested: Option<Vec<Exact>>,
    data_request: Option<PrivacyRequest>,
}

#[derive(Deserialize)]
struct PrivacyCustomer {
    id: Exact,
    email: Option<Exact>,
    phone: Option<Exact>,
}

#[derive(Deserialize)]
struct PrivacyRequest {
    id: Exact,
}

#[derive(Deserialize)]
struct Deleted {
    id: Exact,
    created_at: Option<Exact>,
    title: Option<Exact>,
    line_items: Option<Value>,
}

/// What a body says under its topic.
pub fn read(headers: &Headers<'_>, body: &[u8]) -> Told {
    let told = match headers.topic {
        "orders/create"
        | "orders/updated"
        | "orders/paid"
        | "orders/cancelled"
        | "orders/fulfilled"
        | "orders/partially_fulfilled" => wire::read(body, order),
        "orders/delete" => wire::read(body, |deleted| gone("order_deleted", deleted)),
        "refunds/create" => wire::read(body, refund),
        "products/create" | "products/update" => wire::read(body, product),
        "products/delete" => wire::read(body, |deleted| gone("product_deleted", deleted)),
        "customers/create" | "customers/update" | "customers/enable" | "customers/disable" => {
            wire::read(body, customer)
        }
        "customers/delete" => wire::read(body, |deleted| gone("customer_deleted", deleted)),
        "app/uninstalled" => wire::read(body, |shop: Shop| {
            Told::of(json!({ "event": "uninstalled", "signed_shops": texts([&shop.myshopify_domain, &shop.domain]) }))
        }),
        "customers/data_request" => wire::read(body, |wish| privacy("data_request", wish)),
        "customers/redact" => wire::read(body, |wish| privacy("customer_redact", wish)),
        "shop/redact" => wire::read(body, |wish| privacy("shop_redact", wish)),
        _ => Told::nothing("unknown_topic"),
    };
    addressed(told, headers)
}

/// Adds whose event it is.
fn addressed(mut told: Told, headers: &Headers<'_>) -> Told {
    if let Some(Value::Object(payload)) = &mut told.payload {
        payload.insert("shop".to_owned(), json!(headers.shop));
        payload.insert("event_id".to_owned(), json!(headers.event_id));
        for part in ["order", "product", "customer"] {
            if let Some(Value::Object(platform)) = payload.get_mut(part).and_then(|part| part.get_mut("platform")) {
                platform.insert("api_version".to_owned(), json!(headers.api_version));
            }
        }
    }
    told
}

fn texts<const N: usize>(fields: [&Option<Exact>; N]) -> Vec<&str> {
    fields.into_iter().filter_map(text).collect()
}

/// A deletion names the object and no more. The topic is not signed: the body of another topic must not pass for one.
fn gone(event: &str, deleted: Deleted) -> Told {
    match deleted.id.text() {
        Some(id) if deleted.created_at.is_none() && deleted.title.is_none() && deleted.line_items.is_none() => {
            Told::of(json!({ "event": event, "external_id": id }))
        }
        _ => Told::nothing("not_a_deletion"),
    }
}

fn privacy(event: &str, wish: Privacy) -> Told {
    let Some(shop) = text(&wish.shop_domain) else { return Told::nothing("no_shop_domain") };
    let orders = wish.orders_to_redact.or(wish.orders_requested).unwrap_or_default();
    let customer = wish.customer.as_ref();
    if event != "shop_redact" && customer.is_none() {
        return Told::nothing("no_customer");
    }
    Told::of(json!({
        "event": event,
        "signed_shops": [shop],
        "request_id": wish.data_request.as_ref().and_then(|request| request.id.text()),
        "customer": customer.map(|customer| json!({
            "external_id": customer.id.text(), "email": text(&customer.email), "phone": text(&customer.phone),
        })),
        "order_external_ids": orders.iter().filter_map(Exact::text).collect::<Vec<_>>(),
    }))
}

/// `financial_status` in our words; an unknown one is none.
fn payment_status(word: &str) -> Option<&'static str> {
    Some(match word {
        "pending" | "authorized" | "unpaid" => "pending",
        "partially_paid" => "partially_paid",
        "paid" => "paid",
        "partially_refunded" => "partially_refunded",
        "refunded" => "refunded",
        "voided" => "cancelled",
        "expired" => "failed",
        _ => return None,
    })
}

/// `fulfillment_status` of an order in our words; none yet is unfulfilled.
fn fulfillment_status(word: Option<&str>) -> Option<&'static str> {
    Some(match word {
        None
        | Some(
            "unfulfilled" | "unshipped" | "scheduled" | "on_hold" | "open" | "pending_fulfillment" | "request_declined",
        ) => "unfulfilled",
        Some("partial" | "partially_fulfilled" | "in_progress") => "partial",
        Some("fulfilled" | "shipped") => "fulfilled",
        Some("restocked") => "restocked",
        Some(_) => return None,
    })
}

/// `fulfillment_status` of a line.
fn line_status(word: Option<&str>) -> Option<&'static str> {
    match word {
        // A gift card or a service, which nobody ships.
        Some("not_eligible") => Some("unfulfilled"),
        Some("removed") => Some("cancelled"),
        other => fulfillment_status(other),
    }
}

/// An order's status by all that is known of it, and how far on that is.
pub fn order_status(
    cancelled: bool,
    payment: Option<&str>,
    fulfillment: Option<&str>,
    delivered: bool,
) -> (&'static str, u8) {
    let (status, place) = match (payment, fulfillment) {
        _ if cancelled => ("cancelled", 7),
        (Some("refunded"), _) => ("refunded", 6),
        (_, Some("restocked")) => ("returned", 5),
        (_, Some("fulfilled")) if delivered => ("delivered", 4),
        (_, Some("fulfilled")) => ("shipped", 3),
        (_, Some("partial")) => ("processing", 2),
        (Some("paid" | "partially_paid" | "partially_refunded"), _) => ("confirmed", 1),
        _ => ("pending", 0),
    };
    let paid = match payment {
        Some("cancelled") => 6,
        Some("refunded") => 5,
        Some("partially_refunded") => 4,
        Some("paid") => 3,
        Some("partially_paid") => 2,
        Some("failed") => 1,
        _ => 0,
    };
    (status, place * 10 + paid)
}

fn order(order: Order) -> Told {
    let (Some(id), Some(updated), Some(total)) =
        (order.id.text(), text(&order.updated_at), decimal(&order.total_price))
    else {
        return Told::nothing("incomplete_order");
    };
    let mut unmapped = Vec::new();
    let financial = text(&order.financial_status);
    let payment = financial.and_then(payment_status);
    if let (Some(word), None) = (financial, payment) {
        unmapped.push(("financial_status", word.to_owned()));
    }
    let shipped_word = text(&order.fulfillment_status);
    let fulfillment = fulfillment_status(shipped_word);
    if let (Some(word), None) = (shipped_word, fulfillment) {
        unmapped.push(("fulfillment_status", word.to_owned()));
    }
    let fulfillments = order.fulfillments.unwrap_or_default();
    let sent: Vec<&Fulfillment> = fulfillments
        .iter()
        .filter(|one| !matches!(text(&one.status), Some("cancelled" | "error" | "failure")))
        .collect();
    let delivered = !sent.is_empty() && sent.iter().all(|one| text(&one.shipment_status) == Some("delivered"));
    let (status, rank) = order_status(text(&order.cancelled_at).is_some(), payment, fulfillment, delivered);
    let customer = order.customer.as_ref();
    let of_customer = |field: fn(&Customer) -> &Option<Exact>| customer.and_then(|customer| text(field(customer)));
    let of_address = |name: &str| {
        let address = order.shipping_address.as_ref().or(order.billing_address.as_ref())?;
        address.get(name)?.as_str().map(str::trim).filter(|text| !text.is_empty())
    };
    let lines: Vec<Value> =
        order.line_items.unwrap_or_default().into_iter().map(|item| line(item, &mut unmapped)).collect();
    let refunds: Vec<Value> = order
        .refunds
        .unwrap_or_default()
        .iter()
        .flat_map(parts_of)
        .map(|(id, amount)| json!({ "external_id": id, "amount": amount }))
        .collect();
    let shipping = order.total_shipping_price_set.as_ref().and_then(MoneySet::decimal);
    let payload = json!({
        "event": "order",
        "version_at": updated,
        "rank": rank,
        "order": {
            "external_id": id,
            "order_number": text(&order.name).or(text(&order.order_number)),
            "customer_external_id": of_customer_id(customer),
            "customer_email": text(&order.email).or(text(&order.contact_email)).or(of_customer(|c| &c.email)),
            "customer_phone": text(&order.phone).or(of_customer(|c| &c.phone)).or(of_address("phone")),
            "customer_first_name": of_customer(|c| &c.first_name).or(of_address("first_name")),
            "customer_last_name": of_customer(|c| &c.last_name).or(of_address("last_name")),
            "currency": text(&order.currency),
            "subtotal": decimal(&order.subtotal_price),
            "tax": decimal(&order.total_tax),
            "shipping": shipping,
            "discounts": decimal(&order.total_discounts),
            "total": total,
            "status": status,
            "payment_status": payment,
            "fulfillment_status": fulfillment,
            "shipping_address": order.shipping_address.clone(),
            "billing_address": order.billing_address.clone(),
            "shipping_method": order.shipping_lines.iter().flatten().find_map(|line| text(&line.title)),
            "tracking_number": sent.iter().rev().find_map(|one| text(&one.tracking_number)),
            "tracking_url": sent.iter().rev().find_map(|one| text(&one.tracking_url)),
            "ordered_at": text(&order.processed_at).or(text(&order.created_at)),
            "shipped_at": sent.first().and_then(|one| text(&one.created_at)),
            "delivered_at": delivered.then(|| sent.last().and_then(|one| text(&one.updated_at))).flatten(),
            "cancelled_at": text(&order.cancelled_at),
            "customer_notes": text(&order.note),
            "lines": lines,
            "refunds": refunds,
            "platform": {
                "financial_status": financial, "fulfillment_status": shipped_word, "cancel_reason": text(&order.cancel_reason),
            },
        },
    });
    Told { payload: Some(payload), unmapped, note: None }
}

fn of_customer_id(customer: Option<&Customer>) -> Option<&str> {
    customer.and_then(|customer| customer.id.text())
}

fn line(line: Line, unmapped: &mut Vec<(&'static str, String)>) -> Value {
    let word = text(&line.fulfillment_status);
    let status = line_status(word);
    if let (Some(word), None) = (word, status) {
        unmapped.push(("line_fulfillment_status", word.to_owned()));
    }
    let quantity = line.quantity.as_ref().and_then(Exact::integer).and_then(|count| i32::try_from(count).ok());
    let open = line.fulfillable_quantity.as_ref().and_then(Exact::integer).and_then(|count| i32::try_from(count).ok());
    let fulfilled = match status {
        Some("fulfilled") => quantity,
        Some("partial") => quantity.zip(open).map(|(all, open)| all.saturating_sub(open)),
        _ => None,
    };
    // What is taken off may be of the line alone or the line's share of the order's, and the allocations have both.
    let discounts: Vec<&str> =
        line.discount_allocations.iter().flatten().filter_map(|part| decimal(&part.amount)).collect();
    let discount = match discounts.as_slice() {
        [] => decimal(&line.total_discount).map(str::to_owned),
        parts => sum(parts),
    };
    let properties: Map<String, Value> = line
        .properties
        .unwrap_or_default()
        .into_iter()
        .filter_map(|property| {
            let name = property.name.as_ref().and_then(Exact::text)?.to_owned();
            Some((name, property.value.unwrap_or_default()))
        })
        .collect();
    json!({
        "external_id": line.id.text(),
        "external_product_id": text(&line.product_id),
        "external_variant_id": text(&line.variant_id),
        "title": text(&line.title).or(text(&line.name)),
        "variant_title": text(&line.variant_title),
        "sku": text(&line.sku),
        "price": decimal(&line.price),
        "discount": discount,
        "quantity": quantity,
        "properties": properties,
        "fulfillment_status": status,
        "fulfilled_quantity": fulfilled,
    })
}

/// The sum of decimals, exactly. None when it is more than any amount is.
pub fn sum(parts: &[&str]) -> Option<String> {
    const PLACES: usize = 20;
    let mut total: i128 = 0;
    for part in parts {
        let (sign, unsigned) = part.strip_prefix('-').map_or((1, *part), |rest| (-1, rest));
        let (whole, fraction) = unsigned.split_once('.').unwrap_or((unsigned, ""));
        let scaled: i128 = format!("{whole}{fraction:0<PLACES$}").parse().ok()?;
        total = total.checked_add(sign * scaled)?;
    }
    let digits = format!("{:0>1$}", total.unsigned_abs(), PLACES + 1);
    let (whole, fraction) = digits.split_at(digits.len() - PLACES);
    let fraction = fraction.trim_end_matches('0');
    let minus = if total < 0 { "-" } else { "" };
    Some(if fraction.is_empty() { format!("{minus}{whole}") } else { format!("{minus}{whole}.{fraction}") })
}

/// What went back with a refund: its successful refund transactions together.
fn parts_of(refund: &Refund) -> Option<(String, String)> {
    let amounts: Vec<&str> = refund
        .transactions
        .iter()
        .flatten()
        .filter(|one| text(&one.kind) == Some("refund") && matches!(text(&one.status), None | Some("success")))
        .filter_map(|one| decimal(&one.amount))
        .collect();
    if amounts.is_empty() {
        return None;
    }
    Some((refund.id.text()?.to_owned(), sum(&amounts)?))
}

fn refund(refund: Refund) -> Told {
    match (text(&refund.order_id), parts_of(&refund)) {
        (Some(order), Some((id, amount))) => Told::of(json!({
            "event": "refund", "order_external_id": order, "refund": { "external_id": id, "amount": amount },
        })),
        // Goods taken back without money.
        (Some(_), None) => Told::nothing("no_money_refunded"),
        (None, _) => Told::nothing("incomplete_refund"),
    }
}

fn tags(field: &Option<Exact>) -> Vec<&str> {
    text(field).unwrap_or_default().split(',').map(str::trim).filter(|tag| !tag.is_empty()).collect()
}

fn customer(customer: Customer) -> Told {
    let version = text(&customer.updated_at).or(text(&customer.created_at));
    let (Some(id), Some(version)) = (customer.id.text(), version) else { return Told::nothing("incomplete_customer") };
    let consented = customer.email_marketing_consent.as_ref().map(|consent| text(&consent.state) == Some("subscribed"));
    Told::of(json!({
        "event": "customer",
        "version_at": version,
        "customer": {
            "external_id": id,
            "email": text(&customer.email),
            "phone": text(&customer.phone),
            "first_name": text(&customer.first_name),
            "last_name": text(&customer.last_name),
            "accepts_marketing": consented.or(customer.accepts_marketing),
            "language": text(&customer.locale),
            "tags": tags(&customer.tags),
            "platform": { "state": text(&customer.state) },
        },
    }))
}

fn product_status(word: &str) -> Option<&'static str> {
    Some(match word {
        "active" | "unlisted" => "active",
        "draft" => "draft",
        "archived" => "archived",
        _ => return None,
    })
}

fn product(product: Product) -> Told {
    let (Some(id), Some(updated)) = (product.id.text(), text(&product.updated_at)) else {
        return Told::nothing("incomplete_product");
    };
    let mut unmapped = Vec::new();
    let word = text(&product.status);
    let status = word.and_then(product_status);
    if let (Some(word), None) = (word, status) {
        unmapped.push(("product_status", word.to_owned()));
    }
    let mut variants = product.variants.unwrap_or_default();
    variants.sort_by_key(|variant| variant.position.as_ref().and_then(Exact::integer).unwrap_or(i64::MAX));
    let first = variants.first();
    let tracked: Vec<&Variant> =
        variants.iter().filter(|variant| text(&variant.inventory_management).is_some()).collect();
    let stock = |variant: &&Variant| variant.inventory_quantity.as_ref().and_then(Exact::integer).unwrap_or(0);
    let quantity = tracked.iter().map(stock).fold(0, i64::saturating_add);
    let sells_on = tracked.iter().any(|variant| text(&variant.inventory_policy) == Some("continue"));
    let is_counted = !variants.is_empty() && variants.len() == tracked.len();
    let availability = match (is_counted, quantity, sells_on) {
        // A variant that nobody counts can always be had.
        (false, _, _) | (true, 1.., _) => "in_stock",
        (true, _, true) => "backorder",
        (true, _, false) => "out_of_stock",
    };
    let images: Vec<Value> = product
        .images
        .iter()
        .flatten()
        .map(|image| {
            let position = image.position.as_ref().and_then(Exact::integer).and_then(|place| i32::try_from(place).ok());
            json!({ "external_id": image.id.text(), "url": text(&image.src), "alt_text": text(&image.alt), "position": position })
        })
        .collect();
    let of_first = |field: fn(&Variant) -> &Option<Exact>| first.and_then(|variant| text(field(variant)));
    let amount_of_first = |field: fn(&Variant) -> &Option<Exact>| first.and_then(|variant| decimal(field(variant)));
    let payload = json!({
        "event": "product",
        "version_at": updated,
        "product": {
            "external_id": id,
            "external_variant_id": first.and_then(|variant| variant.id.text()),
            "title": text(&product.title),
            "description": text(&product.body_html),
            "handle": text(&product.handle),
            "product_type": text(&product.product_type),
            "vendor": text(&product.vendor),
            "tags": tags(&product.tags),
            "price": amount_of_first(|variant| &variant.price),
            "compare_at_price": amount_of_first(|variant| &variant.compare_at_price),
            "sku": of_first(|variant| &variant.sku),
            "barcode": of_first(|variant| &variant.barcode),
            "inventory_quantity": quantity,
            "inventory_tracked": !tracked.is_empty(),
            "availability": availability,
            "weight": amount_of_first(|variant| &variant.weight),
            "weight_unit": of_first(|variant| &variant.weight_unit).filter(|unit| ["g", "kg", "oz", "lb"].contains(unit)),
            "status": status,
            "is_published": text(&product.published_at).is_some(),
            "published_at": text(&product.published_at),
            "images": images,
            "platform": { "inventory_quantity": quantity, "variants": variants.len(), "status": word },
        },
    });
    Told { payload: Some(payload), unmapped, note: None }
}
