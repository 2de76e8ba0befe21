//! Razorpay, as much of it as we ask: razorpay.com/docs/api.

use super::{Asked, Books, Entry, Reaction};
use serde_json::{Value, json};

/// Key id and key secret.
pub const KEY: (&str, &str) = ("rzp_test_book", "hushed");

type Said = (u16, Value);

/// A notice is given so long before a debit, in seconds.
const NOTICE: i64 = 24 * 3_600;

fn error(status: u16, reason: &str) -> Said {
    (
        status,
        json!({ "error": { "code": "BAD_REQUEST_ERROR", "description": reason, "reason": reason, "metadata": {} } }),
    )
}

fn refused(description: &str) -> Said {
    (
        400,
        json!({ "error": { "code": "BAD_REQUEST_ERROR", "description": description, "reason": "input_validation_failed" } }),
    )
}

/// Answers a request.
pub fn handle(books: &mut Books, asked: &Asked) -> Said {
    match (asked.method.as_str(), asked.segments().as_slice()) {
        ("POST", ["v1", "orders"]) => create_order(books, asked),
        ("GET", ["v1", "orders"]) => list(books, "order", "items", |one| {
            asked.query.get("receipt").is_none_or(|receipt| one["receipt"] == json!(receipt))
        }),
        ("GET", ["v1", "orders", id, "payments"]) => {
            list(books, "payment", "items", |one| one["order_id"] == json!(id))
        }
        ("POST", ["v1", "payments", "create", "recurring"]) => charge(books, &asked.json),
        ("GET", ["v1", "payments", id]) => show(books, "payment", id),
        ("POST", ["v1", "payments", id, "refund"]) => refund(books, asked, id),
        ("GET", ["v1", "payments", id, "refunds"]) => {
            list(books, "refund", "items", |one| one["payment_id"] == json!(id))
        }
        ("GET", ["v1", "refunds", id]) => show(books, "refund", id),
        ("POST", ["v1", "payment_links"]) => create_link(books, &asked.json),
        ("GET", ["v1", "payment_links"]) => list(books, "link", "payment_links", |one| {
            asked.query.get("reference_id").is_none_or(|reference| one["reference_id"] == json!(reference))
        }),
        ("GET", ["v1", "payment_links", id]) => show(books, "link", id),
        ("POST", ["v1", "payment_links", id, "cancel"]) => cancel(books, id),
        ("POST", ["v1", "subscription_registration", "auth_links"]) => register(books, &asked.json),
        ("DELETE", ["v1", "customers", _, "tokens", id]) => {
            let gone = json!({ "entity": { "id": id, "method": "upi" } });
            event(books, "token.cancelled", json!({ "token": gone }));
            (200, json!({ "deleted": true }))
        }
        _ => error(404, "not_found"),
    }
}

fn show(books: &mut Books, kind: &'static str, id: &str) -> Said {
    books.one(kind, id).map_or_else(|| error(400, "id_does_not_exist"), |found| (200, found.clone()))
}

fn list(books: &Books, kind: &'static str, name: &str, wanted: impl Fn(&Value) -> bool) -> Said {
    let found: Vec<&Value> = books.all(kind).iter().rev().filter(|one| wanted(one)).collect();
    (200, json!({ "entity": "collection", "count": found.len(), name: found }))
}

fn event(books: &mut Books, name: &str, payload: Value) {
    let created = chrono::Utc::now().timestamp();
    books.events.push(json!({ "entity": "event", "event": name, "created_at": created, "payload": payload }));
}

fn entry(books: &mut Books, id: &Value, notes: &Value, amount: i64, currency: &Value) {
    books.entries.push(Entry {
        id: id.as_str().unwrap_or_default().to_owned(),
        invoice: notes["invoice_id"].as_str().unwrap_or_default().to_owned(),
        amount,
        currency: currency.as_str().unwrap_or_default().to_owned(),
    });
}

fn create_order(books: &mut Books, asked: &Asked) -> Said {
    let given = &asked.json;
    if given["amount"].as_i64().is_none_or(|amount| amount < 100) || !given["currency"].is_string() {
        return refused("The amount must be at least INR 1.00");
    }
    if given["receipt"].as_str().is_some_and(|receipt| receipt.len() > 40) {
        return refused("The receipt may not be greater than 40 characters.");
    }
    // The gateway lives in business time here: what lies ahead of its real clock lies ahead of that.
    let debit = given["notification"]["payment_after"].as_i64();
    let ahead = debit.map(|debit| debit - chrono::Utc::now().timestamp());
    if ahead.is_some_and(|ahead| ahead < NOTICE) {
        return refused("payment_after must be at least 24 hours from now");
    }
    let id = books.id("order");
    let order = json!({
        "id": id, "entity": "order", "amount": given["amount"], "currency": given["currency"], "receipt": given["receipt"],
        "status": "created", "notes": given["notes"], "attempts": 0, "debit_at": ahead.map(|ahead| books.now() + ahead),
    });
    (200, books.keep("order", order))
}

fn charge(books: &mut Books, given: &Value) -> Said {
    let (order_id, token) =
        (given["order_id"].as_str().unwrap_or_default(), given["token"].as_str().unwrap_or_default());
    let Some(order) = books.one("order", order_id).map(|found| found.clone()) else { return refused("no such order") };
    if order["amount"] != given["amount"] || given["recurring"] != true || given["email"].is_null() {
        return refused("the payment is not the order's");
    }
    if order["status"] == "paid" {
        return refused("Payment already done for this order.");
    }
    match order["debit_at"].as_i64() {
        Some(at) if books.now() + 5 < at => books.faults.push(format!("{order_id} is debited before its time")),
        None => books.faults.push(format!("{order_id} is debited without a notice")),
        Some(_) => {}
    }
    let ist = chrono::DateTime::from_timestamp(books.now() + 19_800, 0).unwrap_or_default().format("%H:%M").to_string();
    if token.starts_with("token_upi")
        && (("10:00".."13:00").contains(&ist.as_str()) || ("17:00".."21:30").contains(&ist.as_str()))
    {
        books.faults.push(format!("{order_id} is debited at {ist}, in a peak hour"));
    }
    if given["amount"].as_i64() > Some(1_500_000) {
        books.faults.push(format!("{order_id} is debited above the limit"));
    }
    let id = books.id("pay");
    let mut payment = json!({
        "id": id, "entity": "payment", "amount": given["amount"], "currency": given["currency"], "order_id": order_id,
        "status": "created", "notes": given["notes"], "token_id": token, "error_code": null, "error_reason": null,
        "error_description": null,
    });
    let reaction = books.reaction(token);
    if reaction != Reaction::Slow {
        decide(books, &mut payment, reaction);
    }
    books.keep("payment", payment.clone());
    if let Reaction::Decline(reason) = reaction {
        let metadata = json!({ "payment_id": id, "order_id": order_id });
        return (
            400,
            json!({ "error": { "code": "BAD_REQUEST_ERROR", "description": "declined", "reason": reason, "metadata": metadata } }),
        );
    }
    (200, json!({ "razorpay_payment_id": id, "razorpay_order_id": order_id, "razorpay_signature": "signature" }))
}

fn decide(books: &mut Books, payment: &mut Value, reaction: Reaction) {
    if let Reaction::Decline(reason) = reaction {
        payment["status"] = json!("failed");
        payment["error_code"] = json!("BAD_REQUEST_ERROR");
        payment["error_reason"] = json!(reason);
        payment["error_description"] = json!("declined");
        event(books, "payment.failed", json!({ "payment": { "entity": payment } }));
        return;
    }
    payment["status"] = json!("captured");
    let order_id = payment["order_id"].as_str().unwrap_or_default().to_owned();
    if let Some(order) = books.one("order", &order_id) {
        order["status"] = json!("paid");
    }
    entry(
        books,
        &payment["id"],
        &payment["notes"],
        payment["amount"].as_i64().unwrap_or_default(),
        &payment["currency"],
    );
    event(books, "payment.captured", json!({ "payment": { "entity": payment } }));
}

/// Decides every payment that is not decided.
pub fn settle(books: &mut Books, reaction: Reaction) {
    let waiting: Vec<Value> = books.all("payment").iter().filter(|one| one["status"] == "created").cloned().collect();
    for mut payment in waiting {
        decide(books, &mut payment, reaction);
        let id = payment["id"].as_str().unwrap_or_default().to_owned();
        if let Some(kept) = books.one("payment", &id) {
            *kept = payment;
        }
    }
}

fn create_link(books: &mut Books, given: &Value) -> Said {
    if given["amount"].as_i64().is_none_or(|amount| amount < 100) {
        return refused("amount must be at least INR 1.00");
    }
    if books.all("link").iter().any(|link| link["reference_id"] == given["reference_id"]) {
        return (
            400,
            json!({ "error": { "code": "BAD_REQUEST_ERROR", "description": "payment link with given reference_id already exists" } }),
        );
    }
    let id = books.id("plink");
    let link = json!({
        "id": id, "amount": given["amount"], "amount_paid": 0, "currency": given["currency"], "reference_id": given["reference_id"],
        "status": "created", "notes": given["notes"], "expire_by": given["expire_by"], "short_url": format!("https://rzp.io/i/{id}"),
        "payments": null, "order_id": null,
    });
    (200, books.keep("link", link))
}

fn cancel(books: &mut Books, id: &str) -> Said {
    match books.one("link", id) {
        Some(link) if link["status"] == "created" => {
            link["status"] = json!("cancelled");
            (200, link.clone())
        }
        _ => refused("the payment link cannot be cancelled"),
    }
}

fn register(books: &mut Books, given: &Value) -> Said {
    let (id, customer) = (books.id("inv"), books.id("cust"));
    let registration = json!({
        "id": id, "customer_id": customer, "short_url": format!("https://rzp.io/i/{id}"), "status": "issued",
        "expire_by": given["expire_by"], "method": given["subscription_registration"]["method"],
    });
    (200, books.keep("registration", registration))
}

/// Somebody pays on a link's page, or agrees to a mandate.
pub fn visit(books: &mut Books, url: &str) -> Option<()> {
    if let Some(agreed) = books.all("registration").iter().find(|one| one["short_url"] == url).cloned() {
        let token =
            json!({ "id": books.id("token_upi"), "method": "upi", "customer_id": agreed["customer_id"], "notes": [] });
        event(books, "token.confirmed", json!({ "token": { "entity": token } }));
        return Some(());
    }
    let mut link = books.all("link").iter().find(|one| one["short_url"] == url && one["status"] == "created")?.clone();
    let (id, order) = (books.id("pay"), books.id("order"));
    // A link's payment has notes of its own, and those are empty.
    let payment = json!({
        "id": id, "entity": "payment", "amount": link["amount"], "currency": link["currency"], "order_id": order,
        "status": "captured", "notes": [], "error_code": null, "error_reason": null, "error_description": null,
    });
    link["status"] = json!("paid");
    link["amount_paid"] = link["amount"].clone();
    link["order_id"] = json!(order);
    link["payments"] = json!([{ "payment_id": id, "amount": link["amount"], "status": "captured" }]);
    entry(books, &json!(id), &link["notes"], link["amount"].as_i64()?, &link["currency"]);
    books.keep("payment", payment.clone());
    event(books, "payment.captured", json!({ "payment": { "entity": payment } }));
    event(
        books,
        "payment_link.paid",
        json!({ "payment_link": { "entity": link }, "order": { "entity": { "id": order, "notes": [] } }, "payment": { "entity": payment } }),
    );
    let kept = link["id"].as_str()?.to_owned();
    *books.one("link", &kept)? = link;
    Some(())
}

fn refund(books: &mut Books, asked: &Asked, id: &str) -> Said {
    let Some(key) = asked.header("x-refund-idempotency").map(str::to_owned) else {
        return refused("a key is asked for");
    };
    if let Some((body, status, said)) = books.answers.get(&key) {
        return if *body == asked.body { (*status, said.clone()) } else { refused("another request had this key") };
    }
    let Some(payment) = books.one("payment", id).map(|found| found.clone()) else {
        return error(400, "id_does_not_exist");
    };
    let amount = asked.json["amount"].as_i64().unwrap_or_default();
    let back: i64 = books
        .all("refund")
        .iter()
        .filter(|one| one["payment_id"] == json!(id))
        .filter_map(|one| one["amount"].as_i64())
        .sum();
    if payment["status"] != "captured" || amount <= 0 || Some(back + amount) > payment["amount"].as_i64() {
        return refused("The total refund amount is greater than the refund payment amount");
    }
    let refund_id = books.id("rfnd");
    let refund = json!({
        "id": refund_id, "entity": "refund", "amount": amount, "currency": payment["currency"], "payment_id": id,
        "receipt": asked.json["receipt"], "notes": asked.json["notes"], "status": "processed",
    });
    entry(books, &json!(refund_id), &asked.json["notes"], -amount, &payment["currency"]);
    event(books, "refund.processed", json!({ "refund": { "entity": refund }, "payment": { "entity": payment } }));
    books.answers.insert(key, (asked.body.clone(), 200, refund.clone()));
    (200, books.keep("refund", refund))
}
