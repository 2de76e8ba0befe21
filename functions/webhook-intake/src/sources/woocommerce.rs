//! WooCommerce: webhooks of a shop, signed with the secret that the webhook was made with, over the raw body.
//!
//! Facts: WooCommerce's REST API v3 (webhooks, orders, products, customers): developer.woocommerce.com/docs/apis/rest-api; the
//! delivery's headers and its unsigned ping are those of `WC_Webhook`.

use super::{
    Event, OpenSource, Payload, Source,
    shopify::{check_shop_settings, order_status, sum},
    wire::{self, Exact, Told, decimal, text},
};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use shared::{Error, Result, http::Request};

/// The source.
pub struct WooCommerce;

const SIGNATURE: &str = "x-wc-webhook-signature";
const TOPIC: &str = "x-wc-webhook-topic";
const DELIVERY: &str = "x-wc-webhook-delivery-id";
const SHOP: &str = "x-wc-webhook-source";

impl Source for WooCommerce {
    fn name(&self) -> &'static str {
        "woocommerce"
    }

    fn signed_headers(&self) -> &'static [&'static str] {
        &[SIGNATURE, TOPIC, DELIVERY, SHOP]
    }

    fn is_greeting(&self, request: &Request) -> bool {
        request.header(SIGNATURE).is_none() && is_ping(&request.body)
    }

    fn verify(&self, source: &OpenSource, request: &Request, _: i64) -> bool {
        let given = request.header(SIGNATURE).unwrap_or_default();
        wire::is_base64_hmac(source.keys(), &[&request.body], given)
    }

    fn read(&self, _: &OpenSource, request: &Request) -> Result<Vec<Event>> {
        let topic = request
            .header(TOPIC)
            .filter(|topic| !topic.is_empty())
            .ok_or_else(|| Error::malformed(TOPIC, "the header is missing"))?;
        let id = request
            .header(DELIVERY)
            .filter(|id| !id.is_empty())
            .map_or_else(|| super::digest(&request.body), str::to_owned);
        let told = read(topic, request.header(SHOP), &request.body);
        Ok(vec![told.event(topic, format!("{id}|{topic}"), Payload::Store)])
    }

    fn check_settings(&self, settings: &Value) -> Result<()> {
        check_shop_settings(settings)
    }
}

#[derive(Deserialize)]
struct Person {
    first_name: Option<Exact>,
    last_name: Option<Exact>,
    email: Option<Exact>,
    phone: Option<Exact>,
}

#[derive(Deserialize)]
struct Order {
    id: Exact,
    number: Option<Exact>,
    status: Option<Exact>,
    currency: Option<Exact>,
    date_created_gmt: Option<Exact>,
    date_modified_gmt: Option<Exact>,
    date_paid_gmt: Option<Exact>,
    date_completed_gmt: Option<Exact>,
    discount_total: Option<Exact>,
    shipping_total: Option<Exact>,
    total: Option<Exact>,
    total_tax: Option<Exact>,
    customer_id: Option<Exact>,
    customer_note: Option<Exact>,
    billing: Option<Value>,
    shipping: Option<Value>,
    shipping_lines: Option<Vec<ShippingLine>>,
    line_items: Option<Vec<Line>>,
    refunds: Option<Vec<Refund>>,
}

#[derive(Deserialize)]
struct ShippingLine {
    method_title: Option<Exact>,
}

#[derive(Deserialize)]
struct Line {
    id: Exact,
    name: Option<Exact>,
    product_id: Option<Exact>,
    variation_id: Option<Exact>,
    quantity: Option<Exact>,
    total: Option<Exact>,
    sku: Option<Exact>,
    price: Option<Exact>,
    meta_data: Option<Vec<Meta>>,
}

#[derive(Deserialize)]
struct Meta {
    key: Option<Exact>,
    value: Option<Value>,
}

#[derive(Deserialize)]
struct Refund {
    id: Exact,
    total: Option<Exact>,
}

#[derive(Deserialize)]
struct Product {
    id: Exact,
    name: Option<Exact>,
    slug: Option<Exact>,
    status: Option<Exact>,
    catalog_visibility: Option<Exact>,
    description: Option<Exact>,
    sku: Option<Exact>,
    price: Option<Exact>,
    regular_price: Option<Exact>,
    manage_stock: Option<Value>,
    stock_quantity: Option<Exact>,
    stock_status: Option<Exact>,
    weight: Option<Exact>,
    date_created_gmt: Option<Exact>,
    date_modified_gmt: Option<Exact>,
    categories: Option<Vec<Named>>,
    tags: Option<Vec<Named>>,
    images: Option<Vec<Image>>,
}

#[derive(Deserialize)]
struct Named {
    name: Option<Exact>,
}

#[derive(Deserialize)]
struct Image {
    id: Exact,
    src: Option<Exact>,
    alt: Option<Exact>,
}

#[derive(Deserialize)]
struct Customer {
    id: Exact,
    email: Option<Exact>,
    first_name: Option<Exact>,
    last_name: Option<Exact>,
    date_created_gmt: Option<Exact>,
    date_modified_gmt: Option<Exact>,
    billing: Option<Person>,
}

#[derive(Deserialize)]
struct Deleted {
    id: Exact,
}

/// Whether a request is the ping that a shop sends when a webhook is made: it is unsigned, and names nothing but the webhook.
pub fn is_ping(body: &[u8]) -> bool {
    body.strip_prefix(b"webhook_id=")
        .is_some_and(|id| (1..=20).contains(&id.len()) && id.iter().all(u8::is_ascii_digit))
}

/// The host of the shop that the `X-WC-Webhook-Source` header names.
pub fn shop(source: &str) -> Option<String> {
    let rest = source.trim().split_once("://").map_or(source.trim(), |(_, rest)| rest);
    let host = rest.split(['/', '?', '#']).next()?.split(':').next()?;
    (!host.is_empty()).then(|| host.to_ascii_lowercase())
}

/// What a body says under its topic.
pub fn read(topic: &str, source: Option<&str>, body: &[u8]) -> Told {
    let told = match topic {
        "order.created" | "order.updated" | "order.restored" => wire::read(body, order),
        "order.deleted" => wire::read(body, |deleted| gone("order_deleted", &deleted)),
        "product.created" | "product.updated" | "product.restored" => wire::read(body, product),
        "product.deleted" => wire::read(body, |deleted| gone("product_deleted", &deleted)),
        "customer.created" | "customer.updated" => wire::read(body, customer),
        "customer.deleted" => wire::read(body, |deleted| gone("customer_deleted", &deleted)),
        _ => Told::nothing("unknown_topic"),
    };
    told.and("shop", json!(source.and_then(shop))).and("restored", json!(topic.ends_with(".restored")))
}

fn gone(event: &str, deleted: &Deleted) -> Told {
    match deleted.id.text() {
        Some(id) => Told::of(json!({ "event": event, "external_id": id })),
        None => Told::nothing("incomplete_deletion"),
    }
}

/// WordPress writes times of UTC without saying so.
fn gmt(field: &Option<Exact>) -> Option<String> {
    let time = text(field)?;
    Some(if time.ends_with('Z') || time.len() > 19 { time.to_owned() } else { format!("{time}Z") })
}

fn order(order: Order) -> Told {
    let version = gmt(&order.date_modified_gmt).or_else(|| gmt(&order.date_created_gmt));
    let (Some(id), Some(version), Some(total)) = (order.id.text(), version, decimal(&order.total)) else {
        return Told::nothing("incomplete_order");
    };
    let is_paid = text(&order.date_paid_gmt).is_some();
    let paid = |otherwise| if is_paid { "paid" } else { otherwise };
    let word = text(&order.status).unwrap_or_default();
    let refunds = order.refunds.unwrap_or_default();
    let mut unmapped = Vec::new();
    let (cancelled, mut payment, fulfillment) = match word {
        "pending" | "on-hold" | "checkout-draft" | "auto-draft" => (false, Some(paid("pending")), Some("unfulfilled")),
        "processing" => (false, Some(paid("pending")), Some("unfulfilled")),
        "completed" => (false, Some("paid"), Some("fulfilled")),
        "cancelled" | "trash" => (true, Some(paid("cancelled")), Some("unfulfilled")),
        "refunded" => (false, Some("refunded"), None),
        "failed" => (false, Some("failed"), Some("unfulfilled")),
        other => {
            // A shop may have states of its own.
            unmapped.push(("order_status", other.to_owned()));
            (false, None, None)
        }
    };
    if payment == Some("paid") && !refunds.is_empty() {
        payment = Some("partially_refunded");
    }
    let (status, rank) = order_status(cancelled, payment, fulfillment, word == "completed");
    let status = if unmapped.is_empty() { Some(status) } else { None };
    let billing: Option<Person> = order.billing.clone().and_then(|person| serde_json::from_value(person).ok());
    let billed = |field: fn(&Person) -> &Option<Exact>| {
        billing.as_ref().and_then(|person| text(field(person))).map(str::to_owned)
    };
    let lines: Vec<Value> =
        order.line_items.unwrap_or_default().into_iter().map(|item| line(item, fulfillment)).collect();
    let amounts: Vec<&str> = lines.iter().filter_map(|line| line["total"].as_str()).collect();
    let refunds: Vec<Value> = refunds
        .iter()
        .filter_map(|refund| {
            let amount = decimal(&refund.total)?;
            Some(json!({ "external_id": refund.id.text()?, "amount": amount.trim_start_matches('-') }))
        })
        .collect();
    let payload = json!({
        "event": "order",
        "version_at": version,
        "rank": rank,
        "order": {
            "external_id": id,
            "order_number": text(&order.number),
            // Nought is a guest.
            "customer_external_id": text(&order.customer_id).filter(|id| *id != "0"),
            "customer_email": billed(|person| &person.email),
            "customer_phone": billed(|person| &person.phone),
            "customer_first_name": billed(|person| &person.first_name),
            "customer_last_name": billed(|person| &person.last_name),
            "currency": text(&order.currency),
            "subtotal": sum(&amounts),
            "tax": decimal(&order.total_tax),
            "shipping": decimal(&order.shipping_total),
            "discounts": decimal(&order.discount_total),
            "total": total,
            "status": status,
            "payment_status": payment,
            "fulfillment_status": fulfillment,
            "shipping_address": order.shipping,
            "billing_address": order.billing,
            "shipping_method": order.shipping_lines.iter().flatten().find_map(|line| text(&line.method_title)),
            "ordered_at": gmt(&order.date_created_gmt),
            "shipped_at": gmt(&order.date_completed_gmt),
            "delivered_at": gmt(&order.date_completed_gmt),
            "cancelled_at": cancelled.then_some(&version),
            "customer_notes": text(&order.customer_note),
            "lines": lines,
            "refunds": refunds,
            "platform": { "status": word },
        },
    });
    Told { payload: Some(payload), unmapped, note: None }
}

fn line(line: Line, fulfillment: Option<&str>) -> Value {
    let quantity = line.quantity.as_ref().and_then(Exact::integer).and_then(|count| i32::try_from(count).ok());
    let properties: Map<String, Value> = line
        .meta_data
        .unwrap_or_default()
        .into_iter()
        .filter_map(|meta| {
            // What begins with an underscore is the shop's own.
            let key = meta.key.as_ref().and_then(Exact::text).filter(|key| !key.starts_with('_'))?.to_owned();
            Some((key, meta.value.unwrap_or_default()))
        })
        .collect();
    json!({
        "external_id": line.id.text(),
        "external_product_id": text(&line.product_id).filter(|id| *id != "0"),
        "external_variant_id": text(&line.variation_id).filter(|id| *id != "0"),
        "title": text(&line.name),
        "sku": text(&line.sku),
        "price": decimal(&line.price),
        "total": decimal(&line.total),
        "quantity": quantity,
        "properties": properties,
        "fulfillment_status": fulfillment,
        "fulfilled_quantity": if fulfillment == Some("fulfilled") { quantity } else { Some(0) },
    })
}

fn product(product: Product) -> Told {
    let version = gmt(&product.date_modified_gmt).or_else(|| gmt(&product.date_created_gmt));
    let (Some(id), Some(version)) = (product.id.text(), version) else { return Told::nothing("incomplete_product") };
    let mut unmapped = Vec::new();
    let word = text(&product.status).unwrap_or_default();
    let status = match word {
        "publish" | "private" => Some("active"),
        "draft" | "pending" | "future" | "auto-draft" => Some("draft"),
        "trash" => Some("archived"),
        other => {
            unmapped.push(("product_status", other.to_owned()));
            None
        }
    };
    let stock = text(&product.stock_status);
    let availability = match stock {
        None | Some("instock") => Some("in_stock"),
        Some("outofstock") => Some("out_of_stock"),
        Some("onbackorder") => Some("backorder"),
        Some(other) => {
            unmapped.push(("stock_status", other.to_owned()));
            None
        }
    };
    let names = |list: &Option<Vec<Named>>| -> Vec<String> {
        list.iter().flatten().filter_map(|item| text(&item.name)).map(str::to_owned).collect()
    };
    let images: Vec<Value> = product
        .images
        .iter()
        .flatten()
        .enumerate()
        .map(|(place, image)| {
            json!({ "external_id": image.id.text(), "url": text(&image.src), "alt_text": text(&image.alt), "position": place })
        })
        .collect();
    let payload = json!({
        "event": "product",
        "version_at": version,
        "product": {
            "external_id": id,
            "title": text(&product.name),
            "description": text(&product.description),
            "handle": text(&product.slug),
            "product_type": names(&product.categories).first(),
            "tags": names(&product.tags),
            "price": decimal(&product.price),
            "compare_at_price": decimal(&product.regular_price).filter(|regular| Some(*regular) != decimal(&product.price)),
            "sku": text(&product.sku),
            "inventory_quantity": product.stock_quantity.as_ref().and_then(Exact::integer),
            "inventory_tracked": product.manage_stock == Some(Value::Bool(true)),
            "availability": availability,
            "weight": decimal(&product.weight),
            "status": status,
            "is_published": word == "publish" && text(&product.catalog_visibility) != Some("hidden"),
            "published_at": gmt(&product.date_created_gmt).filter(|_| word == "publish"),
            "images": images,
            "platform": { "status": word, "stock_status": stock },
        },
    });
    Told { payload: Some(payload), unmapped, note: None }
}

fn customer(customer: Customer) -> Told {
    let version = gmt(&customer.date_modified_gmt).or_else(|| gmt(&customer.date_created_gmt));
    let (Some(id), Some(version)) = (customer.id.text(), version) else { return Told::nothing("incomplete_customer") };
    let billing = customer.billing.as_ref();
    Told::of(json!({
        "event": "customer",
        "version_at": version,
        "customer": {
            "external_id": id,
            "email": text(&customer.email).or(billing.and_then(|person| text(&person.email))),
            "phone": billing.and_then(|person| text(&person.phone)),
            "first_name": text(&customer.first_name).or(billing.and_then(|person| text(&person.first_name))),
            "last_name": text(&customer.last_name).or(billing.and_then(|person| text(&person.last_name))),
            "platform": {},
        },
    }))
}
