//! Without a database: any flipped bit is refused, and no body makes a parser panic.

use super::*;
use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use proptest::prelude::*;
use shared::http::Request;
use webhook_intake::sources::{self, OpenSource, Source};

const NOW: i64 = 1_795_500_000;

fn open(provider: &str) -> OpenSource {
    OpenSource {
        id: Uuid::nil(),
        provider: provider.to_owned(),
        organization_id: None,
        store_id: None,
        settings: json!({}),
        secrets: vec!["newer".to_owned(), SECRET.to_owned()],
    }
}

fn request(headers: &[(&'static str, String)], body: &[u8]) -> Request {
    Request {
        method: Method::POST,
        path: String::new(),
        query: String::new(),
        headers: headers
            .iter()
            .filter_map(|(name, value)| {
                Some((HeaderName::from_static(name), HeaderValue::from_bytes(value.as_bytes()).ok()?))
            })
            .collect::<HeaderMap>(),
        body: Bytes::copy_from_slice(body),
    }
}

/// The header of a right signature.
fn signature(provider: &str, body: &[u8]) -> (&'static str, String) {
    match provider {
        "shopify" => ("x-shopify-hmac-sha256", STANDARD.encode(hmac(&[body]))),
        "woocommerce" => ("x-wc-webhook-signature", STANDARD.encode(hmac(&[body]))),
        "razorpay" => ("x-razorpay-signature", hex::encode(hmac(&[body]))),
        _ => {
            let signed = hex::encode(hmac(&[NOW.to_string().as_bytes(), b".", body]));
            ("stripe-signature", format!("t={NOW},v1={signed}"))
        }
    }
}

const PROVIDERS: [&str; 4] = ["shopify", "woocommerce", "stripe", "razorpay"];

fn source_of(provider: &str) -> &'static dyn Source {
    sources::find(provider).expect("the table has it")
}

fn is_right(provider: &str, header: &(&'static str, String), body: &[u8]) -> bool {
    source_of(provider).verify(&open(provider), &request(std::slice::from_ref(header), body), NOW * 1000)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn any_flipped_bit_of_body_or_signature_is_refused(body in proptest::collection::vec(any::<u8>(), 1..300), place in any::<prop::sample::Index>(), bit in 0..7_u32) {
        for provider in PROVIDERS {
            let header = signature(provider, &body);
            prop_assert!(is_right(provider, &header, &body), "{provider}");
            let mut other = body.clone();
            other[place.index(body.len())] ^= 1 << bit;
            prop_assert!(!is_right(provider, &header, &other), "{provider}: body");
            let mut flipped = header.1.clone().into_bytes();
            let at = place.index(flipped.len());
            flipped[at] ^= 1 << bit;
            let flipped = String::from_utf8(flipped).expect("seven bits are ASCII");
            prop_assert!(!is_right(provider, &(header.0, flipped.clone()), &body), "{provider}: {} became {flipped}", header.1);
            let cut = header.1[..at].to_owned();
            prop_assert!(!is_right(provider, &(header.0, cut), &body), "{provider}: cut");
        }
    }

    #[test]
    fn no_bytes_make_a_parser_panic(body in proptest::collection::vec(any::<u8>(), 0..400), topic in "[a-z/._]{0,24}") {
        read_all(&topic, &body);
    }

    #[test]
    fn no_json_makes_a_parser_panic(body in json_value(), place in any::<prop::sample::Index>()) {
        let (provider, topics) = TOPICS[place.index(TOPICS.len())];
        for topic in topics {
            // Something of any shape, in the place of each part of a delivery that is read.
            let whole = delivery(provider, &topic.replace(['/', '.'], "_")).expect("a fixture");
            let mut value: Value = serde_json::from_slice(&whole).expect("JSON");
            spoil(&mut value, &body, place.index(40));
            read_all(topic, &serde_json::to_vec(&value).expect("JSON"));
        }
        read_all(topics[0], body.to_string().as_bytes());
    }
}

const TOPICS: [(&str, &[&str]); 4] = [
    ("shopify", &["orders/cancelled", "products/create", "customers/create", "refunds/create", "customers/redact"]),
    ("woocommerce", &["order.created", "product.created", "customer.created"]),
    (
        "stripe",
        &["payment_intent.succeeded", "charge.refunded", "checkout.session.completed", "setup_intent.succeeded"],
    ),
    ("razorpay", &["payment.captured", "refund.processed", "token.confirmed"]),
];

/// Puts `with` in the place of the `nth` value of a JSON value.
fn spoil(value: &mut Value, with: &Value, mut nth: usize) {
    let mut waiting = vec![value];
    while let Some(next) = waiting.pop() {
        if nth == 0 {
            *next = with.clone();
            return;
        }
        nth -= 1;
        match next {
            Value::Array(items) => waiting.extend(items),
            Value::Object(map) => waiting.extend(map.iter_mut().map(|(_, value)| value)),
            _ => {}
        }
    }
}

fn json_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,20}".prop_map(Value::from),
        Just(json!("-99999999999999999999.999")),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::hash_map("[a-z_]{1,12}", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

/// Every parser reads it, and whatever it makes of it can be sent.
fn read_all(topic: &str, body: &[u8]) {
    let headers = [
        ("x-shopify-topic", topic.to_owned()),
        ("x-shopify-shop-domain", SHOP.to_owned()),
        ("x-wc-webhook-topic", topic.to_owned()),
        ("x-wc-webhook-source", format!("https://{topic}")),
    ];
    let request = request(&headers, body);
    for provider in PROVIDERS {
        if let Ok(events) = source_of(provider).read(&open(provider), &request) {
            let sent = serde_json::to_value(&events).expect("events are JSON");
            assert!(sent.as_array().is_some_and(|events| events.len() == 1), "{provider}: {sent}");
        }
    }
}

#[test]
fn what_is_beyond_any_number_type_keeps_its_digits() -> Result<()> {
    let body = String::from_utf8(delivery("shopify", "orders_create")?)?
        .replace("820982911946154508", "123456789012345678901234567890")
        .replace(r#""total_price":"1298.00""#, r#""total_price":90071992547409.93"#);
    let headers = [("x-shopify-topic", "orders/create".to_owned()), ("x-shopify-shop-domain", SHOP.to_owned())];
    let events = source_of("shopify")
        .read(&open("shopify"), &request(&headers, body.as_bytes()))
        .map_err(|e| anyhow::anyhow!("{e}"))?;
    let event = serde_json::to_value(&events[0])?;
    assert_eq!(event["payload"]["type"], "store");
    assert_eq!(event["payload"]["order"]["external_id"], "123456789012345678901234567890");
    assert_eq!(event["payload"]["order"]["total"], "90071992547409.93");
    Ok(())
}

#[test]
fn several_signatures_of_stripe_s_and_only_its_own_scheme() {
    let body = b"{}";
    let (name, right) = signature("stripe", body);
    let mac = right.split_once("v1=").map(|(_, mac)| mac.to_owned()).unwrap_or_default();
    let zero = "0".repeat(64);
    for (header, is_signed) in [
        (format!("t={NOW},v1={zero},v1={mac}"), true),
        (format!("t={NOW},v1={mac},v1={zero},v0={zero}"), true),
        (format!("v1={mac},t={NOW}"), true),
        (format!("t={NOW},v0={mac}"), false),
        (format!("v1={mac}"), false),
        (format!("t={NOW}"), false),
        (format!("t=,v1={mac}"), false),
        (format!("t=+{NOW},v1={mac}"), false),
        (format!("t={NOW}.0,v1={mac}"), false),
        (format!("t=99999999999999999999,v1={mac}"), false),
        (String::new(), false),
    ] {
        assert_eq!(is_right("stripe", &(name, header.clone()), body), is_signed, "{header}");
    }
}
