//! Plivo's request signatures, made from the carrier's side.
//!
//! Written apart from the verifier in `shared`, so that a mistake in one is not repeated in the other: both are proved against
//! signatures that Plivo's own SDKs made (`tests/vectors/plivo.json`).

use base64::{Engine, engine::general_purpose::STANDARD};
use hmac::{Hmac, KeyInit, Mac};
use rand::Rng;
use sha2::Sha256;

/// Name and value pairs of a form or a query, decoded.
pub type Pairs = Vec<(String, String)>;

/// What V3 signs. `url` is what is requested, its fragment is ignored; `form` is the decoded body of a POST and empty for a GET.
///
/// Path and host stay as they are written; the query is decoded and sorted. A body follows `?` when there is no query and `.` when
/// there is one, which Plivo's prose has wrong and its SDKs have right.
pub fn text_v3(url: &str, form: &[(String, String)], nonce: &str) -> String {
    let (base, query) = split(url);
    let mut query: Pairs = form_urlencoded::parse(query.as_bytes()).into_owned().collect();
    let mut form = form.to_vec();
    query.sort();
    form.sort();

    let mut text = base.to_owned();
    if !query.is_empty() || !form.is_empty() {
        text.push('?');
    }
    text.push_str(&query.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join("&"));
    if !query.is_empty() && !form.is_empty() {
        text.push('.');
    }
    for (name, value) in &form {
        text.push_str(name);
        text.push_str(value);
    }
    text.push('.');
    text.push_str(nonce);
    text
}

/// What V2 signs: neither the query nor the body, which is why nobody should trust it. Sent because Plivo still sends it.
pub fn text_v2(url: &str, nonce: &str) -> String {
    format!("{}{nonce}", split(url).0)
}

/// Base64 of the HMAC-SHA256 of `text` under an account's auth token.
pub fn sign(auth_token: &str, text: &str) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(auth_token.as_bytes())
        .unwrap_or_else(|_| unreachable!("HMAC takes keys of any length"));
    mac.update(text.as_bytes());
    STANDARD.encode(mac.finalize().into_bytes())
}

/// A fresh nonce: twenty digits.
pub fn nonce() -> String {
    let mut rng = rand::rng();
    (0..20).map(|_| char::from(b'0' + rng.random_range(0..10_u8))).collect()
}

/// The headers of one callback. A call of a main account carries the same token in both V3 headers.
pub fn headers(auth_token: &str, url: &str, form: &[(String, String)], nonce: &str) -> [(&'static str, String); 6] {
    let v3 = sign(auth_token, &text_v3(url, form, nonce));
    let v2 = sign(auth_token, &text_v2(url, nonce));
    [
        ("X-Plivo-Signature-V3", v3.clone()),
        ("X-Plivo-Signature-Ma-V3", v3),
        ("X-Plivo-Signature-V3-Nonce", nonce.to_owned()),
        ("X-Plivo-Signature-V2", v2.clone()),
        ("X-Plivo-Signature-Ma-V2", v2),
        ("X-Plivo-Signature-V2-Nonce", nonce.to_owned()),
    ]
}

/// The URL up to its query, and the query, both raw.
fn split(url: &str) -> (&str, &str) {
    let url = url.split_once('#').map_or(url, |(url, _)| url);
    url.split_once('?').unwrap_or((url, ""))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use std::collections::BTreeMap;

    #[derive(Deserialize)]
    struct Vector {
        id: String,
        url: String,
        method: String,
        headers: BTreeMap<String, String>,
        body: String,
        secret: String,
        header_under_test: String,
        string_to_sign: Option<String>,
        valid: bool,
    }

    fn vectors() -> Vec<Vector> {
        serde_json::from_str(include_str!("../../../tests/vectors/plivo.json")).unwrap()
    }

    /// Every vector but those about how a *verifier* may go wrong: those are judged below.
    #[test]
    fn signs_as_the_official_sdks_do() {
        let mut judged = 0;
        for vector in vectors().iter().filter(|vector| vector.header_under_test == "X-Plivo-Signature-V3") {
            let nonce = &vector.headers["X-Plivo-Signature-V3-Nonce"];
            let form: Pairs = match vector.method.as_str() {
                "POST" => form_urlencoded::parse(vector.body.as_bytes()).into_owned().collect(),
                _ => Pairs::new(),
            };
            // The weakness of V3: two bodies with one text. The vector's own text is that of the other body.
            let text = text_v3(&vector.url, &form, nonce);
            let ours = sign(&vector.secret, &text);
            let theirs = vector.headers.get("X-Plivo-Signature-V3").map(String::as_str).unwrap_or_default();
            assert_eq!(theirs.split(',').any(|item| item == ours), vector.valid, "{}: {text}", vector.id);
            if let (true, Some(wanted)) = (vector.valid, &vector.string_to_sign) {
                assert_eq!(&text, wanted, "{}", vector.id);
            }
            judged += 1;
        }
        assert!(judged >= 24, "only {judged} vectors");
    }

    #[test]
    fn signs_v2_without_query_and_body() {
        let vectors = vectors();
        let vector = vectors.iter().find(|vector| vector.id == "plivo-v2-post").unwrap();
        let nonce = &vector.headers["X-Plivo-Signature-V2-Nonce"];
        assert_eq!(sign(&vector.secret, &text_v2(&vector.url, nonce)), vector.headers["X-Plivo-Signature-V2"]);
    }

    #[test]
    fn the_fragment_is_not_signed_and_nonces_are_fresh() {
        assert_eq!(text_v3("https://h/p#rc=3&rp=5xx", &[], "1"), "https://h/p.1");
        assert_eq!(text_v3("https://h/p?", &[], "1"), "https://h/p.1");
        assert_eq!(nonce().len(), 20);
        assert_ne!(nonce(), nonce());
    }
}
