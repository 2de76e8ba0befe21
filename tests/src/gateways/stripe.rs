//! Stripe, as much of it as we ask: docs.stripe.com/api.

use super::{Asked, Books, Entry, Reaction};
use serde_json::{Value, json};

/// The secret key.
pub const KEY: &str = "sk_test_book";

type Said = (u16, Value);

fn error(status: u16, kind: &str, code: &str) -> Said {
    (status, json!({ "error": { "type": kind, "code": code, "message": code } }))
}

/// Answers a request: the same again under a key that is known, an error where it is another one.
pub fn handle(books: &mut Books, asked: &Asked) -> Said {
    let Some(key) = asked.header("idempotency-key").map(str::to_owned) else { return does(books, asked) };
    if let Some((body, status, said)) = books.answers.get(&key) {
        return if *body == asked.body {
            (*status, said.clone())
        } else {
            error(400, "idempotency_error", "idempotency_key_in_use")
        };
    }
    let (status, said) = does(books, asked);
    books.answers.insert(key, (asked.body.clone(), status, said.clone()));
    (status, said)
}

fn does(books: &mut Books, asked: &Asked) -> Said {
    match (asked.method.as_str(), asked.segments().as_slice()) {
        ("POST", ["v1", "payment_intents"]) => create_intent(books, asked),
        ("GET", ["v1", "payment_intents"]) => list(books, "intent", asked, "customer"),
        ("GET", ["v1", "payment_intents", id]) => show(books, "intent", id),
        ("POST", ["v1", "checkout", "sessions"]) => create_session(books, asked),
        ("GET", ["v1", "checkout", "sessions"]) => list(books, "session", asked, "customer"),
        ("GET", ["v1", "checkout", "sessions", id]) => show(books, "session", id),
        ("POST", ["v1", "checkout", "sessions", id, "expire"]) => expire(books, id),
        ("POST", ["v1", "refunds"]) => create_refund(books, asked),
        ("GET", ["v1", "refunds"]) => list(books, "refund", asked, "payment_intent"),
        ("GET", ["v1", "refunds", id]) => show(books, "refund", id),
        ("POST", ["v1", "payment_methods", id, "detach"]) => detach(books, id),
        _ => error(404, "invalid_request_error", "resource_missing"),
    }
}

fn show(books: &mut Books, kind: &'static str, id: &str) -> Said {
    match books.one(kind, id) {
        Some(found) => (200, found.clone()),
        None => error(404, "invalid_request_error", "resource_missing"),
    }
}

/// The newest first, two a page whatever is asked, so that pages are turned.
fn list(books: &Books, kind: &'static str, asked: &Asked, narrowed: &str) -> Said {
    let since: i64 = asked.query.get("created[gte]").and_then(|text| text.parse().ok()).unwrap_or(0);
    let mut found: Vec<Value> = books.all(kind).iter().rev().cloned().collect();
    found.retain(|one| {
        one["created"].as_i64() >= Some(since)
            && asked.query.get(narrowed).is_none_or(|wanted| one[narrowed] == json!(wanted))
    });
    if let Some(after) = asked.query.get("starting_after") {
        let place = found.iter().position(|one| one["id"] == json!(after)).map_or(found.len(), |place| place + 1);
        found.drain(..place);
    }
    let has_more = found.len() > 2;
    found.truncate(2);
    (200, json!({ "object": "list", "data": found, "has_more": has_more }))
}

fn metadata(asked: &Asked, prefix: &str) -> Value {
    let inner = |name: &str| Some(name.strip_prefix(prefix)?.strip_prefix('[')?.strip_suffix(']')?.to_owned());
    asked.form.iter().filter_map(|(name, value)| Some((inner(name)?, json!(value)))).collect()
}

fn event(books: &mut Books, kind: &str, object: &Value) {
    let id = books.id("evt");
    let created = chrono::Utc::now().timestamp();
    books
        .events
        .push(json!({ "id": id, "object": "event", "type": kind, "created": created, "data": { "object": object } }));
}

fn entry(books: &mut Books, id: &str, metadata: &Value, amount: i64, currency: &str) {
    books.entries.push(Entry {
        id: id.to_owned(),
        invoice: metadata["invoice_id"].as_str().unwrap_or_default().to_owned(),
        amount,
        currency: currency.to_ascii_uppercase(),
    });
}

/// What is documented for an off-session payment; Stripe refuses a parameter that it does not know.
const OFF_SESSION: &[&str] =
    &["amount", "currency", "customer", "payment_method", "off_session", "confirm", "description"];

fn create_intent(books: &mut Books, asked: &Asked) -> Said {
    let of = |name: &str| asked.form.get(name).cloned().unwrap_or_default();
    if asked.form.keys().any(|name| !name.starts_with("metadata[") && !OFF_SESSION.contains(&name.as_str())) {
        return error(400, "invalid_request_error", "parameter_unknown");
    }
    let (Ok(amount), currency) = (of("amount").parse::<i64>(), of("currency")) else {
        return error(400, "invalid_request_error", "parameter_invalid_integer");
    };
    let id = books.id("pi");
    let mut intent = json!({
        "id": id, "object": "payment_intent", "amount": amount, "amount_received": 0, "currency": currency, "customer": of("customer"),
        "payment_method": of("payment_method"), "status": "processing", "created": chrono::Utc::now().timestamp(),
        "metadata": metadata(asked, "metadata"), "last_payment_error": null,
    });
    match books.reaction(&of("payment_method")) {
        Reaction::Slow => {
            books.keep("intent", intent.clone());
            event(books, "payment_intent.processing", &intent);
            (200, intent)
        }
        decided => {
            decide(books, &mut intent, decided);
            books.keep("intent", intent.clone());
            if intent["status"] == "succeeded" {
                return (200, intent);
            }
            let mut failure = intent["last_payment_error"].clone();
            failure["payment_intent"] = intent;
            (402, json!({ "error": failure }))
        }
    }
}

fn decide(books: &mut Books, intent: &mut Value, reaction: Reaction) {
    if let Reaction::Decline(code) = reaction {
        let (code, decline) = if code == "authentication_required" { (code, code) } else { ("card_declined", code) };
        intent["status"] = json!("requires_payment_method");
        intent["last_payment_error"] = json!({ "type": "card_error", "code": code, "decline_code": decline, "message": "Your card was declined." });
        event(books, "payment_intent.payment_failed", intent);
        return;
    }
    intent["status"] = json!("succeeded");
    intent["amount_received"] = intent["amount"].clone();
    let (id, currency) = (intent["id"].clone(), intent["currency"].clone());
    entry(
        books,
        id.as_str().unwrap_or_default(),
        &intent["metadata"].clone(),
        intent["amount"].as_i64().unwrap_or_default(),
        currency.as_str().unwrap_or_default(),
    );
    event(books, "payment_intent.succeeded", intent);
}

/// Decides every payment that is being processed.
pub fn settle(books: &mut Books, reaction: Reaction) {
    let waiting: Vec<Value> = books.all("intent").iter().filter(|one| one["status"] == "processing").cloned().collect();
    for mut intent in waiting {
        decide(books, &mut intent, reaction);
        let id = intent["id"].as_str().unwrap_or_default().to_owned();
        if let Some(kept) = books.one("intent", &id) {
            *kept = intent;
        }
    }
}

fn create_session(books: &mut Books, asked: &Asked) -> Said {
    let of = |name: &str| asked.form.get(name).cloned();
    let mode = of("mode").unwrap_or_default();
    if of("success_url").is_none_or(|url| url.is_empty()) {
        return error(400, "invalid_request_error", "parameter_missing");
    }
    let now = chrono::Utc::now().timestamp();
    let expires: i64 = of("expires_at").and_then(|text| text.parse().ok()).unwrap_or(now + 86_400);
    if !(1_800..=86_400).contains(&(expires - now)) {
        return error(400, "invalid_request_error", "parameter_invalid");
    }
    let amount: Option<i64> = of("line_items[0][price_data][unit_amount]").and_then(|text| text.parse().ok());
    let id = books.id("cs");
    let session = json!({
        "id": id, "object": "checkout.session", "mode": mode, "status": "open", "created": now, "expires_at": expires,
        "payment_status": if mode == "setup" { "no_payment_required" } else { "unpaid" }, "amount_total": amount,
        "currency": of("currency").or(of("line_items[0][price_data][currency]")), "payment_intent": null,
        "client_reference_id": of("client_reference_id"), "metadata": metadata(asked, "metadata"),
        "url": format!("https://checkout.stripe.com/c/pay/{id}"),
        "inner": metadata(asked, if mode == "setup" { "setup_intent_data[metadata]" } else { "payment_intent_data[metadata]" }),
    });
    (200, books.keep("session", session))
}

fn expire(books: &mut Books, id: &str) -> Said {
    match books.one("session", id) {
        Some(session) if session["status"] == "open" => {
            session["status"] = json!("expired");
            let expired = session.clone();
            event(books, "checkout.session.expired", &expired);
            (200, expired)
        }
        Some(_) => error(400, "invalid_request_error", "session_not_open"),
        None => error(404, "invalid_request_error", "resource_missing"),
    }
}

/// Somebody pays on a session's page, or has a card saved.
pub fn visit(books: &mut Books, url: &str) -> Option<()> {
    let mut session = books.all("session").iter().find(|one| one["url"] == url && one["status"] == "open")?.clone();
    session["status"] = json!("complete");
    if session["mode"] == "setup" {
        let (method, customer) = (books.id("pm"), books.id("cus"));
        let setup = json!({ "id": books.id("seti"), "payment_method": method, "customer": customer, "metadata": session["inner"] });
        event(books, "setup_intent.succeeded", &setup);
        let attached = json!({
            "id": method, "type": "card", "customer": customer, "metadata": {},
            "card": { "brand": "visa", "last4": "4242", "exp_month": 8, "exp_year": 2035 },
        });
        event(books, "payment_method.attached", &attached);
    } else {
        let id = books.id("pi");
        let mut intent = json!({
            "id": id, "object": "payment_intent", "amount": session["amount_total"], "amount_received": 0,
            "currency": session["currency"], "customer": null, "status": "processing", "created": session["created"],
            "metadata": session["inner"], "last_payment_error": null,
        });
        decide(books, &mut intent, Reaction::Approve);
        books.keep("intent", intent);
        session["payment_intent"] = json!(id);
        session["payment_status"] = json!("paid");
        event(books, "checkout.session.completed", &session);
    }
    let id = session["id"].as_str()?.to_owned();
    *books.one("session", &id)? = session;
    Some(())
}

fn create_refund(books: &mut Books, asked: &Asked) -> Said {
    let of = |name: &str| asked.form.get(name).cloned().unwrap_or_default();
    let Some(intent) = books.one("intent", &of("payment_intent")).map(|found| found.clone()) else {
        return error(404, "invalid_request_error", "resource_missing");
    };
    let back: i64 = books
        .all("refund")
        .iter()
        .filter(|one| one["payment_intent"] == intent["id"])
        .filter_map(|one| one["amount"].as_i64())
        .sum();
    let amount: i64 = of("amount").parse().unwrap_or_default();
    if amount <= 0 || Some(back + amount) > intent["amount_received"].as_i64() {
        return error(400, "invalid_request_error", "charge_already_refunded");
    }
    let id = books.id("re");
    let refund = json!({
        "id": id, "object": "refund", "amount": amount, "currency": intent["currency"], "payment_intent": intent["id"],
        "status": "succeeded", "created": chrono::Utc::now().timestamp(), "metadata": metadata(asked, "metadata"),
    });
    entry(books, &id, &intent["metadata"], -amount, intent["currency"].as_str().unwrap_or_default());
    event(books, "refund.created", &refund);
    (200, books.keep("refund", refund))
}

fn detach(books: &mut Books, id: &str) -> Said {
    let gone = json!({ "id": id, "type": "card", "customer": null });
    event(books, "payment_method.detached", &gone);
    (200, gone)
}
