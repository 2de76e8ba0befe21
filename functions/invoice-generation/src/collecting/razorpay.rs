//! Razorpay: JSON both ways, key id and key secret as name and password.
//!
//! Facts: razorpay.com/docs/api (orders, payments/create/recurring, payment links, refunds with `X-Refund-Idempotency`,
//! subscription_registration/auth_links, tokens, errors). Only refunds know a key by which a request is known again. A charge is tied to an
//! order, which is paid once at most and found by its `receipt`; a link is found by its `reference_id`, of which there is one.

use super::{
    ask::{Action, Ask, Kind, Outcome, text},
    wire::{Payload, Reply, Silence, Wire},
};
use http::{Method, StatusCode};
use serde_json::{Value, json};

/// Hosts that may be asked.
pub const HOSTS: &[&str] = &["api.razorpay.com"];

/// Earlier orders of an invoice that are looked at before it is charged again.
const EARLIER: usize = 4;

/// Does it.
pub async fn perform(wire: &Wire<'_>, ask: &Ask) -> Outcome {
    match (ask.action, ask.kind) {
        (Action::Notify, _) => match order(wire, ask).await {
            Ok(order) => Outcome { order_ref: Some(order), ..Outcome::of("notified") },
            Err(outcome) => outcome,
        },
        (Action::Submit, Kind::Charge) => charge(wire, ask).await,
        (Action::Submit, Kind::Link) => link(wire, ask).await,
        (Action::Submit, Kind::Setup) => register(wire, ask).await,
        (Action::Submit, Kind::Refund) => refund(wire, ask).await,
        (Action::Cancel, Kind::Link) => cancel(wire, ask).await,
        (_, Kind::Charge) => find_charge(wire, ask).await,
        (_, Kind::Link) => find_link(wire, ask).await,
        (_, Kind::Setup) => Outcome::coded("unknown", "not_asked"),
        (_, Kind::Refund) => find_refund(wire, ask).await,
        (_, Kind::Revoke) => forget(wire, ask).await,
    }
}

fn error(reply: &Reply) -> Option<&str> {
    let error = &reply.body["error"];
    error["reason"].as_str().filter(|reason| *reason != "NA").or(error["code"].as_str())
}

async fn post(wire: &Wire<'_>, path: &[&str], body: Value) -> Result<Reply, Silence> {
    wire.send(Method::POST, path, &[], None, Payload::Json(without_nulls(body))).await
}

fn without_nulls(mut body: Value) -> Value {
    if let Some(fields) = body.as_object_mut() {
        fields.retain(|_, value| !value.is_null());
        fields.values_mut().for_each(|value| *value = without_nulls(value.take()));
    }
    body
}

fn notes(ask: &Ask) -> Value {
    json!({ "request_id": ask.key(), "invoice_id": ask.invoice_id, "organization_id": ask.organization_id })
}

fn payer(ask: &Ask) -> Value {
    json!({ "name": ask.name, "email": ask.email, "contact": ask.contact })
}

async fn list(wire: &Wire<'_>, path: &[&str], query: &[(&str, String)], name: &str) -> Result<Vec<Value>, Outcome> {
    match wire.get(path, query).await {
        Ok(reply) if reply.status.is_success() => Ok(reply.body[name].as_array().cloned().unwrap_or_default()),
        answer => Err(Outcome::not_looked_up(answer)),
    }
}

/// The orders that were made for this request: more than one only where an answer was lost.
async fn orders(wire: &Wire<'_>, ask: &Ask) -> Result<Vec<String>, Outcome> {
    let found = list(wire, &["v1", "orders"], &[("receipt", ask.receipt())], "items").await?;
    let mut ids: Vec<String> =
        found.iter().filter(|order| order["receipt"] == ask.receipt()).filter_map(|order| text(&order["id"])).collect();
    if let Some(known) = &ask.order_ref
        && !ids.contains(known)
    {
        ids.push(known.clone());
    }
    Ok(ids)
}

/// The order of this request, made where there is none. It has the gateway tell the holder of the debit.
async fn order(wire: &Wire<'_>, ask: &Ask) -> Result<String, Outcome> {
    if let Some(known) = orders(wire, ask).await?.into_iter().next() {
        return Ok(known);
    }
    let notification =
        (ask.action == Action::Notify).then(|| json!({ "token_id": ask.token, "payment_after": ask.debit_at }));
    let body = json!({
        "amount": ask.amount(), "currency": ask.currency(), "receipt": ask.receipt(), "payment_capture": true,
        "notification": notification, "notes": notes(ask),
    });
    match post(wire, &["v1", "orders"], body).await {
        Ok(reply) if reply.status.is_success() => {
            text(&reply.body["id"]).ok_or_else(|| Outcome::coded("deferred", "unreadable_answer"))
        }
        Ok(reply) => Err(match Outcome::of_status(&reply, error(&reply)) {
            // An order charges nobody: whatever became of it, it is looked for the next time.
            outcome if outcome.outcome == "unknown" => Outcome { outcome: "deferred", ..outcome },
            outcome => outcome,
        }),
        Err(_) => Err(Outcome::coded("deferred", "no_order")),
    }
}

/// What the payments of an order come to; none where there is no payment.
async fn paid_by(wire: &Wire<'_>, order: &str) -> Result<Option<Outcome>, Outcome> {
    let payments = list(wire, &["v1", "orders", order, "payments"], &[], "items").await?;
    let outcomes: Vec<Outcome> = payments.iter().map(payment).collect();
    let first = |wanted: &str| outcomes.iter().find(|one| one.outcome == wanted).cloned();
    let told = first("paid").or_else(|| first("accepted")).or_else(|| outcomes.first().cloned());
    Ok(told.map(|outcome| Outcome { order_ref: Some(order.to_owned()), ..outcome }))
}

/// What a payment says.
fn payment(found: &Value) -> Outcome {
    let id = text(&found["id"]);
    match found["status"].as_str() {
        Some("captured" | "refunded") => Outcome {
            reference: id.clone(),
            payment_id: id,
            amount_minor: found["amount"].as_i64(),
            currency: text(&found["currency"]),
            ..Outcome::of("paid")
        },
        Some("created" | "pending" | "authorized") => Outcome { reference: id, ..Outcome::of("accepted") },
        Some("failed") => Outcome {
            reference: id.clone(),
            payment_id: id,
            message: text(&found["error_description"]),
            ..Outcome::coded(
                "declined",
                text(&found["error_reason"]).or(text(&found["error_code"])).as_deref().unwrap_or("failed"),
            )
        },
        _ => Outcome::coded("unknown", "unreadable_answer"),
    }
}

async fn charge(wire: &Wire<'_>, ask: &Ask) -> Outcome {
    match charged(wire, ask).await {
        Ok(outcome) | Err(outcome) => outcome,
    }
}

async fn charged(wire: &Wire<'_>, ask: &Ask) -> Result<Outcome, Outcome> {
    let (Some(customer), Some(token)) = (&ask.customer_id, &ask.token) else {
        return Ok(Outcome::coded("declined", "token_not_found"));
    };
    // A payment that failed may be authorised late: money for the same invoice that came after all is taken, and not asked for again.
    for earlier in ask.earlier_orders.iter().take(EARLIER) {
        match paid_by(wire, earlier).await.map_err(not_sent)? {
            Some(outcome) if outcome.outcome == "paid" => return Ok(outcome),
            Some(outcome) if outcome.outcome == "accepted" => return Ok(Outcome::coded("deferred", "earlier_order")),
            _ => {}
        }
    }
    let order = order(wire, ask).await.map_err(not_sent)?;
    let known = orders(wire, ask).await.map_err(not_sent)?;
    for order in &known {
        match paid_by(wire, order).await.map_err(not_sent)? {
            Some(outcome) if outcome.outcome != "declined" => return Ok(outcome),
            _ => {}
        }
    }
    let body = json!({
        "email": ask.email, "contact": ask.contact, "amount": ask.amount(), "currency": ask.currency(), "order_id": order,
        "customer_id": customer, "token": token, "recurring": true, "description": ask.description(), "notes": notes(ask),
    });
    let outcome = match post(wire, &["v1", "payments", "create", "recurring"], body).await {
        Ok(reply) if reply.status.is_success() => match text(&reply.body["razorpay_payment_id"]) {
            Some(id) => Outcome { reference: Some(id), ..Outcome::of("accepted") },
            None => Outcome::coded("unknown", "unreadable_answer"),
        },
        Ok(reply) if reply.status == StatusCode::BAD_REQUEST => declined(&reply),
        Ok(reply) => Outcome::of_status(&reply, error(&reply)),
        Err(silence) => Outcome::of_silence(silence),
    };
    Ok(Outcome { order_ref: Some(order), ..outcome })
}

/// Before the charge itself is sent, nothing has been asked for that could have been done.
fn not_sent(outcome: Outcome) -> Outcome {
    if outcome.outcome == "unknown" { Outcome { outcome: "deferred", ..outcome } } else { outcome }
}

/// A refusal that is about the payer; what is about our request is ours to mend.
fn declined(reply: &Reply) -> Outcome {
    let failure = &reply.body["error"];
    let id = text(&failure["metadata"]["payment_id"]);
    let reason = error(reply).unwrap_or("BAD_REQUEST_ERROR");
    if id.is_none() && matches!(reason, "BAD_REQUEST_ERROR" | "input_validation_failed") {
        return Outcome::of_status(reply, Some(reason));
    }
    Outcome {
        reference: id.clone(),
        payment_id: id,
        message: text(&failure["description"]),
        ..Outcome::coded("declined", reason)
    }
}

async fn find_charge(wire: &Wire<'_>, ask: &Ask) -> Outcome {
    if let Some(id) = &ask.reference {
        return match wire.get(&["v1", "payments", id], &[]).await {
            Ok(reply) if reply.status.is_success() => payment(&reply.body),
            answer => Outcome::not_looked_up(answer),
        };
    }
    let known = match orders(wire, ask).await {
        Ok(known) => known,
        Err(outcome) => return outcome,
    };
    for order in &known {
        match paid_by(wire, order).await {
            Ok(Some(outcome)) => return outcome,
            Ok(None) => {}
            Err(outcome) => return outcome,
        }
    }
    Outcome::of("not_found")
}

async fn link(wire: &Wire<'_>, ask: &Ask) -> Outcome {
    let back = ask.account.return_url.clone();
    let body = json!({
        "amount": ask.amount(), "currency": ask.currency(), "accept_partial": false, "reference_id": ask.receipt(),
        "description": ask.description(), "expire_by": ask.expires_at, "customer": payer(ask), "notes": notes(ask),
        "notify": { "sms": false, "email": false }, "reminder_enable": false,
        "callback_method": back.as_ref().map(|_| "get"), "callback_url": back,
    });
    match post(wire, &["v1", "payment_links"], body).await {
        Ok(reply) if reply.status.is_success() => linked(&reply.body),
        // There is one with this reference: it was made before.
        Ok(reply) if reply.status == StatusCode::BAD_REQUEST => match find_link(wire, ask).await {
            outcome if outcome.outcome == "not_found" => Outcome::of_status(&reply, error(&reply)),
            outcome => outcome,
        },
        Ok(reply) => Outcome::of_status(&reply, error(&reply)),
        Err(silence) => Outcome::of_silence(silence),
    }
}

/// What a payment link says.
fn linked(found: &Value) -> Outcome {
    let reference = text(&found["id"]);
    match found["status"].as_str() {
        Some("created" | "partially_paid") => Outcome {
            reference,
            url: text(&found["short_url"]),
            expires_at: found["expire_by"].as_i64().filter(|at| *at > 0),
            ..Outcome::of("accepted")
        },
        Some("paid") => Outcome {
            reference,
            order_ref: text(&found["order_id"]),
            payment_id: text(&found["payments"][0]["payment_id"]),
            amount_minor: found["amount_paid"].as_i64(),
            currency: text(&found["currency"]),
            ..Outcome::of("paid")
        },
        Some("cancelled" | "expired") => Outcome { reference, ..Outcome::of("cancelled") },
        _ => Outcome::coded("unknown", "unreadable_answer"),
    }
}

async fn find_link(wire: &Wire<'_>, ask: &Ask) -> Outcome {
    if let Some(id) = &ask.reference {
        return match wire.get(&["v1", "payment_links", id], &[]).await {
            Ok(reply) if reply.status.is_success() => linked(&reply.body),
            answer => Outcome::not_looked_up(answer),
        };
    }
    match list(wire, &["v1", "payment_links"], &[("reference_id", ask.receipt())], "payment_links").await {
        Ok(found) => {
            let ours = found.iter().find(|link| link["reference_id"] == ask.receipt());
            ours.map_or_else(|| Outcome::of("not_found"), linked)
        }
        Err(outcome) => outcome,
    }
}

async fn cancel(wire: &Wire<'_>, ask: &Ask) -> Outcome {
    let Some(id) = &ask.reference else { return find_link(wire, ask).await };
    match post(wire, &["v1", "payment_links", id, "cancel"], json!({})).await {
        Ok(reply) if reply.status.is_success() => Outcome::of("cancelled"),
        Ok(reply) if reply.status.is_client_error() => find_link(wire, ask).await,
        answer => Outcome::not_looked_up(answer),
    }
}

async fn register(wire: &Wire<'_>, ask: &Ask) -> Outcome {
    let method = ask.method.as_deref().unwrap_or("card");
    // A card or a UPI account proves itself by a payment of one rupee, a bank by nothing.
    let amount = if method == "emandate" { 0 } else { 100 };
    let body = json!({
        "customer": payer(ask), "type": "link", "amount": amount, "currency": ask.currency(),
        "description": "Automatic payment of invoices", "receipt": ask.receipt(), "notes": notes(ask),
        "email_notify": false, "sms_notify": false, "expire_by": ask.expires_at,
        "subscription_registration": { "method": method, "max_amount": ask.mandate_limit },
    });
    match post(wire, &["v1", "subscription_registration", "auth_links"], body).await {
        Ok(reply) if reply.status.is_success() => Outcome {
            reference: text(&reply.body["id"]),
            url: text(&reply.body["short_url"]),
            customer_id: text(&reply.body["customer_id"]),
            expires_at: reply.body["expire_by"].as_i64(),
            ..Outcome::of("accepted")
        },
        Ok(reply) => Outcome::of_status(&reply, error(&reply)),
        Err(silence) => Outcome::of_silence(silence),
    }
}

async fn refund(wire: &Wire<'_>, ask: &Ask) -> Outcome {
    let payment = ask.refund_of.clone().unwrap_or_default();
    let body = json!({ "amount": ask.amount(), "speed": "normal", "receipt": ask.receipt(), "notes": notes(ask) });
    let key = ("x-refund-idempotency", ask.key());
    let path = ["v1", "payments", &payment, "refund"];
    match wire.send(Method::POST, &path, &[], Some(key), Payload::Json(body)).await {
        Ok(reply) if reply.status.is_success() => refunded(&reply.body),
        Ok(reply) => Outcome::of_status(&reply, error(&reply)),
        Err(silence) => Outcome::of_silence(silence),
    }
}

/// What a refund says.
fn refunded(found: &Value) -> Outcome {
    let reference = text(&found["id"]);
    match found["status"].as_str() {
        Some("processed") => Outcome { reference, ..Outcome::of("processed") },
        Some("pending" | "created") => Outcome { reference, ..Outcome::of("accepted") },
        Some("failed") => Outcome { reference, ..Outcome::coded("refused", "refund_failed") },
        _ => Outcome::coded("unknown", "unreadable_answer"),
    }
}

async fn find_refund(wire: &Wire<'_>, ask: &Ask) -> Outcome {
    if let Some(id) = &ask.reference {
        return match wire.get(&["v1", "refunds", id], &[]).await {
            Ok(reply) if reply.status.is_success() => refunded(&reply.body),
            answer => Outcome::not_looked_up(answer),
        };
    }
    let payment = ask.refund_of.clone().unwrap_or_default();
    match list(wire, &["v1", "payments", &payment, "refunds"], &[("count", "100".to_owned())], "items").await {
        Ok(found) => {
            let ours = found.iter().find(|refund| refund["receipt"] == ask.receipt());
            ours.map_or_else(|| Outcome::of("not_found"), refunded)
        }
        Err(outcome) => outcome,
    }
}

async fn forget(wire: &Wire<'_>, ask: &Ask) -> Outcome {
    let (customer, token) = (ask.customer_id.clone().unwrap_or_default(), ask.token.clone().unwrap_or_default());
    let path = ["v1", "customers", &customer, "tokens", &token];
    match wire.send(Method::DELETE, &path, &[], None, Payload::Nothing).await {
        Ok(reply) if reply.status.is_success() || matches!(reply.status.as_u16(), 400 | 404) => Outcome::of("accepted"),
        Ok(reply) => Outcome::of_status(&reply, error(&reply)),
        Err(silence) => Outcome::of_silence(silence),
    }
}
