//! Stripe: forms in, JSON out, the secret key as the user's name, and an `Idempotency-Key` on every POST, under which the same answer
//! comes for a day and more.
//!
//! Facts: docs.stripe.com/api (payment intents, checkout sessions, refunds, payment methods, idempotent requests, errors),
//! docs.stripe.com/payments/save-and-reuse (off-session), docs.stripe.com/currencies. What was asked and not answered is found by our id
//! in its metadata: in the lists, which show at once what was made, and not by the search, which does not.

use super::{
    ask::{Action, Ask, Kind, Outcome, text},
    wire::{Payload, Reply, Silence, Wire},
};
use http::{Method, StatusCode};
use serde_json::Value;

/// Hosts that may be asked.
pub const HOSTS: &[&str] = &["api.stripe.com"];

/// Pages of a list that are looked through for one request.
const PAGES: usize = 10;

type Form = Vec<(String, String)>;

/// Does it.
pub async fn perform(wire: &Wire<'_>, ask: &Ask) -> Outcome {
    match (ask.action, ask.kind) {
        // It tells the holder itself, and holds the debit until then.
        (Action::Notify, _) => Outcome::of("notified"),
        (Action::Submit, Kind::Charge) => charge(wire, ask).await,
        (Action::Submit, Kind::Link | Kind::Setup) => page(wire, ask).await,
        (Action::Submit, Kind::Refund) => refund(wire, ask).await,
        (Action::Submit, Kind::Revoke) => detach(wire, ask).await,
        (Action::Cancel, Kind::Link) => expire(wire, ask).await,
        (_, Kind::Charge) => find(wire, ask, "payment_intents", charge_query(ask), intent).await,
        (_, Kind::Link | Kind::Setup) => find(wire, ask, "checkout/sessions", Vec::new(), session).await,
        (_, Kind::Refund) => find(wire, ask, "refunds", refund_query(ask), refunded).await,
        (_, Kind::Revoke) => detach(wire, ask).await,
    }
}

async fn post(wire: &Wire<'_>, ask: &Ask, path: &[&str], form: Form) -> Result<Reply, Silence> {
    // A page that was not found after all is another page, good from now on: under its first key it would be the same request changed.
    let key = match ask.kind {
        Kind::Link | Kind::Setup => format!("{}-{}", ask.key(), ask.submission),
        _ => ask.key(),
    };
    let key = ("idempotency-key", key);
    wire.send(Method::POST, path, &[], Some(key), Payload::Form(form)).await
}

fn error(reply: &Reply) -> Option<&str> {
    let error = &reply.body["error"];
    error["decline_code"].as_str().or(error["code"].as_str()).or(error["type"].as_str())
}

/// Stripe's own smallest unit: for three currencies it is not that of ISO 4217.
fn to_stripe(amount: i64, currency: &str) -> i64 {
    match currency {
        "ISK" | "UGX" => amount * 100,
        "MGA" => amount / 100,
        _ => amount,
    }
}

fn from_stripe(amount: &Value, currency: &Value) -> (Option<i64>, Option<String>) {
    let currency = currency.as_str().unwrap_or_default().to_ascii_uppercase();
    let amount = amount.as_i64().map(|amount| match currency.as_str() {
        "ISK" | "UGX" => amount / 100,
        "MGA" => amount * 100,
        _ => amount,
    });
    (amount, Some(currency))
}

fn metadata(form: &mut Form, prefix: &str, ask: &Ask) {
    let mut put = |name: &str, value: String| form.push((format!("{prefix}[{name}]"), value));
    put("request_id", ask.key());
    put("organization_id", ask.organization_id.to_string());
    if let Some(invoice) = ask.invoice_id {
        put("invoice_id", invoice.to_string());
    }
}

fn fields(pairs: &[(&str, &str)]) -> Form {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

async fn charge(wire: &Wire<'_>, ask: &Ask) -> Outcome {
    let (Some(customer), Some(token)) = (&ask.customer_id, &ask.token) else {
        return Outcome::coded("declined", "resource_missing");
    };
    let mut form = fields(&[
        ("amount", &to_stripe(ask.amount(), ask.currency()).to_string()),
        ("currency", &ask.currency().to_ascii_lowercase()),
        ("customer", customer),
        ("payment_method", token),
        ("off_session", "true"),
        ("confirm", "true"),
        ("description", &ask.description()),
    ]);
    metadata(&mut form, "metadata", ask);
    match post(wire, ask, &["v1", "payment_intents"], form).await {
        Ok(reply) if reply.status.is_success() => intent(&reply.body),
        Ok(reply) if reply.status == StatusCode::PAYMENT_REQUIRED => declined(&reply),
        // The method is not there any more, or not this customer's.
        Ok(reply) if reply.body["error"]["param"] == "payment_method" => declined(&reply),
        Ok(reply) => Outcome::of_status(&reply, error(&reply)),
        Err(silence) => Outcome::of_silence(silence),
    }
}

fn declined(reply: &Reply) -> Outcome {
    let failure = &reply.body["error"];
    let id = text(&failure["payment_intent"]["id"]);
    Outcome {
        reference: id.clone(),
        payment_id: id,
        message: text(&failure["message"]),
        ..Outcome::coded("declined", error(reply).unwrap_or("card_error"))
    }
}

/// What a payment intent says.
fn intent(found: &Value) -> Outcome {
    let id = text(&found["id"]);
    match found["status"].as_str() {
        Some("succeeded") => {
            let (amount_minor, currency) = from_stripe(&found["amount_received"], &found["currency"]);
            Outcome { reference: id.clone(), payment_id: id, amount_minor, currency, ..Outcome::of("paid") }
        }
        Some("processing" | "requires_capture") => Outcome { reference: id, ..Outcome::of("accepted") },
        // Its holder would have to take part, and is not there.
        Some("requires_action" | "requires_confirmation") => {
            Outcome { reference: id.clone(), payment_id: id, ..Outcome::coded("declined", "authentication_required") }
        }
        Some("requires_payment_method" | "canceled") => {
            let failure = &found["last_payment_error"];
            let code = text(&failure["decline_code"]).or(text(&failure["code"]));
            Outcome {
                reference: id.clone(),
                payment_id: id,
                message: text(&failure["message"]),
                ..Outcome::coded("declined", code.as_deref().unwrap_or("canceled"))
            }
        }
        _ => Outcome::coded("unknown", "unreadable_answer"),
    }
}

fn charge_query(ask: &Ask) -> Vec<(&'static str, String)> {
    vec![("customer", ask.customer_id.clone().unwrap_or_default())]
}

async fn page(wire: &Wire<'_>, ask: &Ask) -> Outcome {
    let currency = ask.currency().to_ascii_lowercase();
    let amount = to_stripe(ask.amount(), ask.currency()).to_string();
    let description = ask.description();
    let invoice = ask.invoice_id.map(|id| id.to_string()).unwrap_or_default();
    let back = ask.account.return_url.clone().unwrap_or_default();
    let expires = ask.expires_at.to_string();
    let mut form = if ask.kind == Kind::Setup {
        fields(&[("mode", "setup"), ("currency", &currency), ("customer_creation", "always"), ("success_url", &back)])
    } else {
        fields(&[
            ("mode", "payment"),
            ("success_url", &back),
            ("expires_at", &expires),
            ("client_reference_id", &invoice),
            ("line_items[0][quantity]", "1"),
            ("line_items[0][price_data][currency]", &currency),
            ("line_items[0][price_data][unit_amount]", &amount),
            ("line_items[0][price_data][product_data][name]", &description),
        ])
    };
    if let Some(email) = &ask.email {
        form.push(("customer_email".to_owned(), email.clone()));
    }
    metadata(&mut form, "metadata", ask);
    let inner = if ask.kind == Kind::Setup { "setup_intent_data[metadata]" } else { "payment_intent_data[metadata]" };
    metadata(&mut form, inner, ask);
    match post(wire, ask, &["v1", "checkout", "sessions"], form).await {
        Ok(reply) if reply.status.is_success() => session(&reply.body),
        Ok(reply) => Outcome::of_status(&reply, error(&reply)),
        Err(silence) => Outcome::of_silence(silence),
    }
}

/// What a checkout session says.
fn session(found: &Value) -> Outcome {
    let reference = text(&found["id"]);
    let open = Outcome {
        reference: reference.clone(),
        url: text(&found["url"]),
        expires_at: found["expires_at"].as_i64(),
        ..Outcome::of("accepted")
    };
    match (found["status"].as_str(), found["payment_status"].as_str()) {
        (Some("expired"), _) => Outcome { reference, ..Outcome::of("cancelled") },
        (_, Some("paid")) => {
            let (amount_minor, currency) = from_stripe(&found["amount_total"], &found["currency"]);
            let intent = &found["payment_intent"];
            let payment_id = text(intent).or(text(&intent["id"]));
            Outcome { reference, payment_id, amount_minor, currency, ..Outcome::of("paid") }
        }
        (Some("open" | "complete"), _) => open,
        _ => Outcome::coded("unknown", "unreadable_answer"),
    }
}

async fn expire(wire: &Wire<'_>, ask: &Ask) -> Outcome {
    let Some(id) = &ask.reference else { return find(wire, ask, "checkout/sessions", Vec::new(), session).await };
    // To expire it twice is an error and no harm: a key would keep the first answer, which may be old news.
    let path = ["v1", "checkout", "sessions", id, "expire"];
    match wire.send(Method::POST, &path, &[], None, Payload::Form(Form::new())).await {
        Ok(reply) if reply.status.is_success() => Outcome::of("cancelled"),
        // Somebody paid, or it was over already: it says which.
        Ok(reply) if reply.status.is_client_error() => find(wire, ask, "checkout/sessions", Vec::new(), session).await,
        answer => Outcome::not_looked_up(answer),
    }
}

async fn refund(wire: &Wire<'_>, ask: &Ask) -> Outcome {
    let payment = ask.refund_of.clone().unwrap_or_default();
    let mut form = fields(&[
        ("payment_intent", &payment),
        ("amount", &to_stripe(ask.amount(), ask.currency()).to_string()),
        ("reason", "requested_by_customer"),
    ]);
    metadata(&mut form, "metadata", ask);
    match post(wire, ask, &["v1", "refunds"], form).await {
        Ok(reply) if reply.status.is_success() => refunded(&reply.body),
        Ok(reply) => Outcome::of_status(&reply, error(&reply)),
        Err(silence) => Outcome::of_silence(silence),
    }
}

fn refund_query(ask: &Ask) -> Vec<(&'static str, String)> {
    vec![("payment_intent", ask.refund_of.clone().unwrap_or_default())]
}

/// What a refund says.
fn refunded(found: &Value) -> Outcome {
    let reference = text(&found["id"]);
    match found["status"].as_str() {
        Some("succeeded") => Outcome { reference, ..Outcome::of("processed") },
        Some("pending" | "requires_action") => Outcome { reference, ..Outcome::of("accepted") },
        Some("failed" | "canceled") => Outcome {
            reference,
            ..Outcome::coded("refused", text(&found["failure_reason"]).as_deref().unwrap_or("refund_failed"))
        },
        _ => Outcome::coded("unknown", "unreadable_answer"),
    }
}

async fn detach(wire: &Wire<'_>, ask: &Ask) -> Outcome {
    let token = ask.token.clone().unwrap_or_default();
    match post(wire, ask, &["v1", "payment_methods", &token, "detach"], Form::new()).await {
        // Detached before, by whomever.
        Ok(reply) if reply.status.is_success() || matches!(reply.status.as_u16(), 400 | 404) => Outcome::of("accepted"),
        Ok(reply) => Outcome::of_status(&reply, error(&reply)),
        Err(silence) => Outcome::of_silence(silence),
    }
}

/// Asks for one object by its id, or where that was never learnt, for the one in a list that has our id in it.
async fn find(
    wire: &Wire<'_>,
    ask: &Ask,
    list: &str,
    narrowed: Vec<(&'static str, String)>,
    read: fn(&Value) -> Outcome,
) -> Outcome {
    let mut path = vec!["v1"];
    path.extend(list.split('/'));
    if let Some(id) = &ask.reference {
        path.push(id);
        return match wire.get(&path, &[]).await {
            Ok(reply) if reply.status.is_success() => read(&reply.body),
            answer => Outcome::not_looked_up(answer),
        };
    }
    let mut query = narrowed;
    query.push(("created[gte]", ask.since.to_string()));
    query.push(("limit", "100".to_owned()));
    let mut after: Option<String> = None;
    for _ in 0..PAGES {
        let mut asked = query.clone();
        asked.extend(after.take().map(|id| ("starting_after", id)));
        let reply = match wire.get(&path, &asked).await {
            Ok(reply) if reply.status.is_success() => reply,
            answer => return Outcome::not_looked_up(answer),
        };
        let found = reply.body["data"].as_array().cloned().unwrap_or_default();
        if let Some(ours) = found.iter().find(|one| one["metadata"]["request_id"] == ask.key()) {
            return read(ours);
        }
        after = found.last().and_then(|last| text(&last["id"]));
        if reply.body["has_more"] != true || after.is_none() {
            return Outcome::of("not_found");
        }
    }
    Outcome::coded("unknown", "too_many")
}
