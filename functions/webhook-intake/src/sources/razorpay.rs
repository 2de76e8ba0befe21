//! Razorpay: events of the platform's own account, `X-Razorpay-Signature` = hex(HMAC-SHA256(secret, raw body)).
//!
//! Facts: razorpay.com/docs/webhooks (signature, `x-razorpay-event-id`, no order of delivery), its payloads of payments, orders,
//! refunds, disputes and tokens. Amounts are in the currency's smallest unit; `notes` is an array when there are none.

use super::{
    Event, OpenSource, Payload, Source,
    wire::{self, Exact, Told, instant, own_id, text},
};
use serde::Deserialize;
use serde_json::{Value, json};
use shared::{Result, http::Request};

/// The source.
pub struct Razorpay;

const SIGNATURE: &str = "x-razorpay-signature";
const EVENT_ID: &str = "x-razorpay-event-id";

impl Source for Razorpay {
    fn name(&self) -> &'static str {
        "razorpay"
    }

    fn signed_headers(&self) -> &'static [&'static str] {
        &[SIGNATURE, EVENT_ID]
    }

    fn verify(&self, source: &OpenSource, request: &Request, _: i64) -> bool {
        let given = request.header(SIGNATURE).unwrap_or_default();
        wire::is_hex_hmac(source.keys(), &[&request.body], given)
    }

    fn read(&self, _: &OpenSource, request: &Request) -> Result<Vec<Event>> {
        let Some((kind, told)) = read(&request.body) else {
            return Ok(vec![Event::ignored("unreadable", &request.body, "this is no event of Razorpay's")]);
        };
        let id = request
            .header(EVENT_ID)
            .filter(|id| !id.is_empty())
            .map_or_else(|| super::digest(&request.body), str::to_owned);
        Ok(vec![told.event(&kind, id, Payload::Payment)])
    }
}

#[derive(Deserialize)]
struct Wire {
    event: Exact,
    created_at: Option<Exact>,
    payload: Entities,
}

#[derive(Deserialize)]
struct Entities {
    payment: Option<Entity<Payment>>,
    order: Option<Entity<Order>>,
    refund: Option<Entity<Refund>>,
    dispute: Option<Entity<Dispute>>,
    token: Option<Entity<Token>>,
    payment_link: Option<Entity<Link>>,
}

#[derive(Deserialize)]
struct Entity<T> {
    entity: T,
}

#[derive(Deserialize)]
struct Payment {
    id: Exact,
    amount: i64,
    currency: Exact,
    order_id: Option<Exact>,
    error_code: Option<Exact>,
    error_description: Option<Exact>,
    error_reason: Option<Exact>,
    notes: Option<Value>,
}

#[derive(Deserialize)]
struct Link {
    notes: Option<Value>,
}

#[derive(Deserialize)]
struct Order {
    id: Exact,
    notes: Option<Value>,
}

#[derive(Deserialize)]
struct Refund {
    id: Exact,
    amount: i64,
    currency: Exact,
    payment_id: Exact,
    status: Option<Exact>,
}

#[derive(Deserialize)]
struct Dispute {
    id: Exact,
    payment_id: Exact,
    amount: i64,
    currency: Exact,
    status: Option<Exact>,
    reason_code: Option<Exact>,
}

#[derive(Deserialize)]
struct Token {
    id: Exact,
    method: Option<Exact>,
    customer_id: Option<Exact>,
    card: Option<Card>,
    notes: Option<Value>,
}

#[derive(Deserialize)]
struct Card {
    last4: Option<Exact>,
    network: Option<Exact>,
    expiry_month: Option<Exact>,
    expiry_year: Option<Exact>,
}

/// An event: its name and what it says. None for a body that is no event.
pub fn read(body: &[u8]) -> Option<(String, Told)> {
    #[derive(Deserialize)]
    struct Name {
        event: Exact,
    }
    let name: Name = serde_json::from_slice(body).ok()?;
    let kind = name.event.text()?.to_owned();
    Some((kind, wire::read(body, |event: Wire| told(&event))))
}

fn told(event: &Wire) -> Told {
    let at = event.created_at.as_ref().and_then(Exact::integer).and_then(instant);
    let at = at.as_deref();
    let payload = &event.payload;
    match event.event.text().unwrap_or_default() {
        "payment.authorized" => payment(payload, "authorized", at),
        "payment.captured" | "order.paid" | "payment_link.paid" => payment(payload, "captured", at),
        "payment.failed" => payment(payload, "failed", at),
        // What happened is in the refund, not in the payment that stands beside it.
        "refund.created" | "refund.speed_changed" => refund(payload, None),
        "refund.processed" => refund(payload, Some("processed")),
        "refund.failed" => refund(payload, Some("failed")),
        "token.confirmed" => token(payload),
        "token.cancelled" | "token.rejected" | "token.expired" => match &payload.token {
            Some(token) => Told::of(json!({
                "event": "method_removed", "request": { "payment_method_id": token.entity.id.text() },
            })),
            None => Told::nothing("no_token"),
        },
        name if name.starts_with("payment.dispute.") => dispute(payload, at),
        _ => Told::nothing("unknown_event"),
    }
}

fn note<'n>(notes: &'n Option<Value>, key: &str) -> Option<&'n str> {
    notes.as_ref()?.get(key)?.as_str()
}

fn payment(payload: &Entities, status: &str, at: Option<&str>) -> Told {
    let Some(payment) = payload.payment.as_ref().map(|entity| &entity.entity) else {
        return Told::nothing("no_payment");
    };
    let order = payload.order.as_ref().map(|entity| &entity.entity);
    let invoice = own_id(note(&payment.notes, "invoice_id"))
        .or_else(|| own_id(order.and_then(|order| note(&order.notes, "invoice_id"))))
        // The payment of a link has not the link's notes, and comes with the link's own event.
        .or_else(|| own_id(payload.payment_link.as_ref().and_then(|link| note(&link.entity.notes, "invoice_id"))));
    let failure = (status == "failed").then(|| {
        json!({
            "code": text(&payment.error_reason).or(text(&payment.error_code)), "message": text(&payment.error_description),
        })
    });
    Told::of(json!({
        "event": "payment",
        "request": {
            "payment_id": payment.id.text(),
            "order_id": text(&payment.order_id).or(order.and_then(|order| order.id.text())),
            "invoice_id": invoice,
            "status": status,
            "amount_minor": payment.amount,
            "currency": payment.currency.text().map(str::to_ascii_uppercase),
            "occurred_at": at,
            "failure": failure,
        },
    }))
}

fn refund(payload: &Entities, status: Option<&str>) -> Told {
    let Some(refund) = payload.refund.as_ref().map(|entity| &entity.entity) else { return Told::nothing("no_refund") };
    let word = text(&refund.status);
    let status = match (status, word) {
        (Some(status), _) => status,
        (None, Some("processed")) => "processed",
        (None, Some("failed")) => "failed",
        (None, None | Some("pending" | "created")) => "pending",
        (None, Some(other)) => {
            return Told { unmapped: vec![("refund_status", other.to_owned())], ..Told::nothing("unknown_status") };
        }
    };
    Told::of(json!({
        "event": "refunds",
        "requests": [{
            "refund_id": refund.id.text(),
            "payment_id": refund.payment_id.text(),
            "status": status,
            "amount_minor": refund.amount,
            "currency": refund.currency.text().map(str::to_ascii_uppercase),
        }],
    }))
}

fn dispute(payload: &Entities, at: Option<&str>) -> Told {
    let Some(dispute) = payload.dispute.as_ref().map(|entity| &entity.entity) else {
        return Told::nothing("no_dispute");
    };
    Told::of(json!({
        "event": "dispute",
        "request": {
            "dispute_id": dispute.id.text(),
            "payment_id": dispute.payment_id.text(),
            "amount_minor": dispute.amount,
            "currency": dispute.currency.text().map(str::to_ascii_uppercase),
            "status": text(&dispute.status).unwrap_or("unknown"),
            "reason": text(&dispute.reason_code),
            "occurred_at": at,
        },
    }))
}

fn token(payload: &Entities) -> Told {
    let Some(token) = payload.token.as_ref().map(|entity| &entity.entity) else { return Told::nothing("no_token") };
    let card = token.card.as_ref();
    let last4 = card.and_then(|card| text(&card.last4)).filter(|digits| digits.len() == 4);
    let kind = match text(&token.method) {
        Some("card") if last4.is_some() => "card",
        Some("upi") => "upi",
        Some("emandate" | "nach" | "netbanking") => "bank_transfer",
        _ => "razorpay",
    };
    let number = |field: fn(&Card) -> &Option<Exact>| card.and_then(|card| field(card).as_ref()?.integer());
    let expiry = number(|card| &card.expiry_month).zip(number(|card| &card.expiry_year));
    Told::of(json!({
        "event": "method",
        "request": {
            "payment_method_id": token.id.text(),
            "type": kind,
            "customer_id": text(&token.customer_id),
            "organization_id": own_id(note(&token.notes, "organization_id")),
            "last4": last4,
            "brand": card.and_then(|card| text(&card.network)),
            "expiry_month": expiry.map(|(month, _)| month),
            "expiry_year": expiry.map(|(_, year)| year),
        },
    }))
}
