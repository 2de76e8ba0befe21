//! Stripe: events of the platform's own account, `Stripe-Signature: t=…,v1=…` over `t.body`.
//!
//! Facts: docs.stripe.com/webhooks (signature, tolerance of five minutes, several `v1` while a secret is rolled), docs.stripe.com/api
//! (events, payment intents, charges, refunds, checkout sessions, setup intents, payment methods, disputes),
//! docs.stripe.com/currencies (zero-decimal and special currencies).

use super::{
    Event, OpenSource, Payload, Source,
    wire::{self, Exact, Told, instant, is_hex_hmac, own_id, text},
};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Map, Value, json, value::RawValue};
use shared::{Result, http::Request};

/// The source.
pub struct Stripe;

const SIGNATURE: &str = "stripe-signature";

impl Source for Stripe {
    fn name(&self) -> &'static str {
        "stripe"
    }

    fn signed_headers(&self) -> &'static [&'static str] {
        &[SIGNATURE]
    }

    fn verify(&self, source: &OpenSource, request: &Request, now_ms: i64) -> bool {
        let Some(header) = request.header(SIGNATURE) else { return false };
        verify(&source.secrets, header, &request.body, now_ms.div_euclid(1000))
    }

    fn read(&self, _: &OpenSource, request: &Request) -> Result<Vec<Event>> {
        Ok(match read(&request.body) {
            Some((id, kind, told)) => vec![told.event(&kind, id, Payload::Payment)],
            None => vec![Event::ignored("unreadable", &request.body, "this is no event of Stripe's")],
        })
    }
}

/// Seconds by which a signature's time may differ from now, either way.
pub const TOLERANCE_SECONDS: i64 = 300;

/// Whether a `Stripe-Signature` is right for a body at `now`, under any of the secrets.
pub fn verify(secrets: &[String], header: &str, body: &[u8], now: i64) -> bool {
    let mut time = None;
    let mut given = Vec::new();
    for part in header.split(',') {
        match part.split_once('=') {
            Some(("t", value)) if time.is_none() => time = Some(value),
            Some(("v1", value)) => given.push(value),
            _ => {}
        }
    }
    let Some(time) = time.filter(|time| !time.is_empty() && time.bytes().all(|digit| digit.is_ascii_digit())) else {
        return false;
    };
    let Ok(seconds) = time.parse::<i64>() else { return false };
    if now.saturating_sub(seconds).saturating_abs() > TOLERANCE_SECONDS {
        return false;
    }
    let parts: [&[u8]; 3] = [time.as_bytes(), b".", body];
    given
        .iter()
        .fold(false, |matched, given| matched | is_hex_hmac(secrets.iter().map(String::as_bytes), &parts, given))
}

#[derive(Deserialize)]
struct Wire {
    id: Exact,
    #[serde(rename = "type")]
    kind: Exact,
    created: Option<Exact>,
    data: Data,
}

#[derive(Deserialize)]
struct Data {
    object: Box<RawValue>,
}

/// An object, or only its id.
#[derive(Deserialize)]
#[serde(untagged)]
enum Reference {
    Id(String),
    Object { id: String },
}

impl Reference {
    fn id(&self) -> &str {
        match self {
            Self::Id(id) | Self::Object { id } => id,
        }
    }
}

fn id_of(reference: &Option<Reference>) -> Option<&str> {
    reference.as_ref().map(Reference::id)
}

type Metadata = Option<Map<String, Value>>;

fn meta<'m>(metadata: &'m Metadata, key: &str) -> Option<&'m str> {
    metadata.as_ref()?.get(key)?.as_str()
}

#[derive(Deserialize)]
struct Failure {
    code: Option<Exact>,
    decline_code: Option<Exact>,
    message: Option<Exact>,
}

#[derive(Deserialize)]
struct PaymentIntent {
    id: Exact,
    amount: i64,
    amount_received: Option<i64>,
    currency: Exact,
    last_payment_error: Option<Failure>,
    cancellation_reason: Option<Exact>,
    metadata: Metadata,
}

#[derive(Deserialize)]
struct Session {
    id: Exact,
    mode: Option<Exact>,
    amount_total: Option<i64>,
    currency: Option<Exact>,
    payment_status: Option<Exact>,
    payment_intent: Option<Reference>,
    client_reference_id: Option<Exact>,
    metadata: Metadata,
}

#[derive(Deserialize)]
struct Refund {
    id: Exact,
    amount: i64,
    currency: Exact,
    status: Option<Exact>,
    payment_intent: Option<Reference>,
    charge: Option<Reference>,
}

#[derive(Deserialize)]
struct Charge {
    amount_refunded: i64,
    currency: Exact,
    payment_intent: Option<Reference>,
    id: Exact,
    refunds: Option<RefundList>,
}

#[derive(Deserialize)]
struct RefundList {
    data: Vec<Refund>,
}

#[derive(Deserialize)]
struct Dispute {
    id: Exact,
    amount: i64,
    currency: Exact,
    status: Option<Exact>,
    reason: Option<Exact>,
    payment_intent: Option<Reference>,
    charge: Option<Reference>,
}

#[derive(Deserialize)]
struct SetupIntent {
    payment_method: Option<Value>,
    customer: Option<Reference>,
    metadata: Metadata,
}

#[derive(Deserialize)]
struct PaymentMethod {
    id: Exact,
    #[serde(rename = "type")]
    kind: Option<Exact>,
    customer: Option<Reference>,
    card: Option<Card>,
    metadata: Metadata,
}

#[derive(Deserialize)]
struct Card {
    brand: Option<Exact>,
    last4: Option<Exact>,
    exp_month: Option<i64>,
    exp_year: Option<i64>,
}

/// An event: its id, its type, and what it says. None for a body that is no event.
pub fn read(body: &[u8]) -> Option<(String, String, Told)> {
    let event: Wire = serde_json::from_slice(body).ok()?;
    let (id, kind) = (event.id.text()?.to_owned(), event.kind.text()?.to_owned());
    let at = event.created.as_ref().and_then(Exact::integer).and_then(instant);
    let object = event.data.object.get();
    let mut told = match kind.as_str() {
        "payment_intent.succeeded" => of(object, |intent| payment(&intent, "captured")),
        "payment_intent.amount_capturable_updated" => of(object, |intent| payment(&intent, "authorized")),
        "payment_intent.processing" => of(object, |intent| payment(&intent, "pending")),
        "payment_intent.payment_failed" | "payment_intent.canceled" => of(object, |intent| payment(&intent, "failed")),
        "checkout.session.completed"
        | "checkout.session.async_payment_succeeded"
        | "checkout.session.async_payment_failed" => {
            let failed = kind.ends_with("failed");
            of(object, |session| checkout(&session, failed))
        }
        "checkout.session.expired" => of(object, |session: Session| {
            Told::of(json!({ "event": "order_expired", "request": { "order_id": session.id.text() } }))
        }),
        "refund.created" | "refund.updated" | "refund.failed" | "charge.refund.updated" => {
            of(object, |refund: Refund| refunds(&[refund], None))
        }
        "charge.refunded" => of(object, charge_refunded),
        "setup_intent.succeeded" => of(object, setup),
        "payment_method.attached" | "payment_method.updated" | "payment_method.automatically_updated" => {
            of(object, |found| method(&found, None, None))
        }
        "payment_method.detached" => of(object, |found: PaymentMethod| {
            Told::of(json!({ "event": "method_removed", "request": { "payment_method_id": found.id.text() } }))
        }),
        dispute if dispute.starts_with("charge.dispute.") => of(object, disputed),
        _ => Told::nothing("unknown_type"),
    };
    if let Some(Value::Object(request)) = told.payload.as_mut().and_then(|payload| payload.get_mut("request")) {
        request.insert("occurred_at".to_owned(), json!(at));
    }
    Some((id, kind, told))
}

fn of<T: DeserializeOwned>(object: &str, then: impl FnOnce(T) -> Told) -> Told {
    wire::read(object.as_bytes(), then)
}

/// An amount in the minor unit of ISO 4217. Stripe's own differs for three currencies.
fn minor(amount: i64, currency: &Exact) -> Option<(i64, String)> {
    let currency = currency.text()?.to_ascii_uppercase();
    let amount = match currency.as_str() {
        // Two decimals at Stripe, none by ISO 4217.
        "ISK" | "UGX" => (amount % 100 == 0).then_some(amount / 100)?,
        // None at Stripe, two by ISO 4217.
        "MGA" => amount.checked_mul(100)?,
        _ => amount,
    };
    Some((amount, currency))
}

fn invoice(metadata: &Metadata) -> Option<String> {
    own_id(meta(metadata, "invoice_id"))
}

fn payment(intent: &PaymentIntent, status: &str) -> Told {
    let amount = match (status, intent.amount_received) {
        ("captured", Some(received)) if received > 0 => received,
        _ => intent.amount,
    };
    let Some((amount, currency)) = minor(amount, &intent.currency) else { return Told::nothing("no_such_amount") };
    let error = intent.last_payment_error.as_ref().filter(|_| status == "failed");
    let failure = match error {
        Some(error) => Some(json!({
            "code": text(&error.decline_code).or(text(&error.code)), "message": text(&error.message),
        })),
        None if status == "failed" => Some(json!({ "code": text(&intent.cancellation_reason).unwrap_or("canceled") })),
        None => None,
    };
    Told::of(json!({
        "event": "payment",
        "request": {
            "payment_id": intent.id.text(),
            "order_id": intent.id.text(),
            "invoice_id": invoice(&intent.metadata),
            "status": status,
            "amount_minor": amount,
            "currency": currency,
            "failure": failure,
        },
    }))
}

fn checkout(session: &Session, failed: bool) -> Told {
    if text(&session.mode).is_some_and(|mode| mode != "payment") {
        // A subscription of Stripe's own, or a card without a payment: the latter comes as a setup intent.
        return Told::nothing("not_a_payment");
    }
    let status = match text(&session.payment_status) {
        _ if failed => "failed",
        Some("paid") => "captured",
        Some("unpaid") => "pending",
        _ => return Told::nothing("no_payment_required"),
    };
    let (Some(payment), Some(amount), Some(currency)) =
        (id_of(&session.payment_intent), session.amount_total, session.currency.as_ref())
    else {
        return Told::nothing("no_payment");
    };
    let Some((amount, currency)) = minor(amount, currency) else { return Told::nothing("no_such_amount") };
    Told::of(json!({
        "event": "payment",
        "request": {
            "payment_id": payment,
            "order_id": session.id.text(),
            "invoice_id": invoice(&session.metadata).or_else(|| own_id(text(&session.client_reference_id))),
            "status": status,
            "amount_minor": amount,
            "currency": currency,
        },
    }))
}

fn refund_status(word: &str) -> Option<&'static str> {
    Some(match word {
        "pending" | "requires_action" => "pending",
        "succeeded" => "processed",
        "failed" | "canceled" => "failed",
        _ => return None,
    })
}

fn refunds(list: &[Refund], charge: Option<(&str, i64)>) -> Told {
    let mut unmapped = Vec::new();
    let requests: Vec<Value> = list
        .iter()
        .filter_map(|refund| {
            let word = text(&refund.status).unwrap_or("pending");
            let Some(status) = refund_status(word) else {
                unmapped.push(("refund_status", word.to_owned()));
                return None;
            };
            let (amount, currency) = minor(refund.amount, &refund.currency)?;
            Some(json!({
                "refund_id": refund.id.text(),
                "payment_id": id_of(&refund.payment_intent).or(id_of(&refund.charge))?,
                "status": status,
                "amount_minor": amount,
                "currency": currency,
            }))
        })
        .collect();
    if requests.is_empty() && charge.is_none() {
        return Told { unmapped, ..Told::nothing("no_refund") };
    }
    let payload = json!({
        "event": "refunds",
        "requests": requests,
        "payment_id": charge.map(|(payment, _)| payment),
        "refunded_minor": charge.map(|(_, amount)| amount),
    });
    Told { payload: Some(payload), unmapped, note: None }
}

fn charge_refunded(charge: Charge) -> Told {
    let Some((amount, _)) = minor(charge.amount_refunded, &charge.currency) else {
        return Told::nothing("no_such_amount");
    };
    let payment = id_of(&charge.payment_intent).or(charge.id.text()).unwrap_or_default();
    let list = charge.refunds.as_ref().map(|list| list.data.as_slice()).unwrap_or_default();
    refunds(list, Some((payment, amount)))
}

fn disputed(dispute: Dispute) -> Told {
    let (Some((amount, currency)), Some(payment)) =
        (minor(dispute.amount, &dispute.currency), id_of(&dispute.payment_intent).or(id_of(&dispute.charge)))
    else {
        return Told::nothing("no_payment");
    };
    Told::of(json!({
        "event": "dispute",
        "request": {
            "dispute_id": dispute.id.text(),
            "payment_id": payment,
            "amount_minor": amount,
            "currency": currency,
            "status": text(&dispute.status).unwrap_or("unknown"),
            "reason": text(&dispute.reason),
        },
    }))
}

fn setup(setup: SetupIntent) -> Told {
    let organization = own_id(meta(&setup.metadata, "organization_id"));
    let customer = id_of(&setup.customer);
    match setup.payment_method {
        Some(Value::String(id)) => Told::of(json!({
            "event": "method",
            "request": {
                "payment_method_id": id, "type": "stripe", "customer_id": customer, "organization_id": organization,
            },
        })),
        Some(expanded) => match serde_json::from_value(expanded) {
            Ok(found) => method(&found, organization, customer),
            Err(_) => Told::nothing("unreadable: payment_method"),
        },
        None => Told::nothing("no_payment_method"),
    }
}

fn method(method: &PaymentMethod, organization: Option<String>, customer: Option<&str>) -> Told {
    let card = method.card.as_ref();
    let last4 = card.and_then(|card| text(&card.last4));
    let kind = match text(&method.kind) {
        // A card is told apart by its digits, or it is not told apart.
        Some("card") if last4.is_some() => "card",
        Some("upi") => "upi",
        Some("us_bank_account" | "sepa_debit" | "bacs_debit" | "au_becs_debit" | "acss_debit" | "customer_balance") => {
            "bank_transfer"
        }
        _ => "stripe",
    };
    let expiry = card.and_then(|card| card.exp_month.zip(card.exp_year));
    Told::of(json!({
        "event": "method",
        "request": {
            "payment_method_id": method.id.text(),
            "type": kind,
            "customer_id": id_of(&method.customer).or(customer),
            "organization_id": own_id(meta(&method.metadata, "organization_id")).or(organization),
            "last4": last4,
            "brand": card.and_then(|card| text(&card.brand)),
            "expiry_month": expiry.map(|(month, _)| month),
            "expiry_year": expiry.map(|(_, year)| year),
        },
    }))
}
