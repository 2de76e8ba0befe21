//! `X-Plivo-Signature-V3`: HMAC-SHA256 over the URL, its sorted query, the sorted body parameters and a nonce.

use base64::{Engine, engine::general_purpose::STANDARD};
use hmac::{Hmac, KeyInit, Mac};
use http::{HeaderMap, Method};
use sha2::Sha256;
use subtle::{Choice, ConstantTimeEq};

const SIGNATURE: &str = "x-plivo-signature-v3";
const MAIN_ACCOUNT_SIGNATURE: &str = "x-plivo-signature-ma-v3";
const NONCE: &str = "x-plivo-signature-v3-nonce";

/// Verifies a request that Plivo made to `url` (as dialled: origin, raw path, raw query), with the decoded pairs of its form body.
///
/// Either the account's (or subaccount's) own signature or the main account's will do, made with any of the tokens that are valid
/// now; each header is a comma list while a token rotates. The deprecated V2, which covers neither query nor body, is never accepted.
pub fn verify(tokens: &[String], method: &Method, url: &str, form: &[(String, String)], headers: &HeaderMap) -> bool {
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let nonce = header(NONCE);
    if nonce.is_empty() {
        return false;
    }
    let Some(signed) = signed_text(method, url, form, nonce) else { return false };
    let mut matched = Choice::from(0);
    for token in tokens {
        let Some(expected) = sign(token, &signed) else { continue };
        for name in [SIGNATURE, MAIN_ACCOUNT_SIGNATURE] {
            // The SDKs split on the comma and do not trim.
            for given in header(name).split(',') {
                matched |= given.as_bytes().ct_eq(expected.as_bytes());
            }
        }
    }
    bool::from(matched)
}

fn sign(token: &str, signed: &str) -> Option<String> {
    let mut mac = Hmac::<Sha256>::new_from_slice(token.as_bytes()).ok()?;
    mac.update(signed.as_bytes());
    Some(STANDARD.encode(mac.finalize().into_bytes()))
}

/// The text that is signed; `None` where the URL has no scheme or host.
fn signed_text(method: &Method, url: &str, form: &[(String, String)], nonce: &str) -> Option<String> {
    let url = url.split('#').next().unwrap_or(url);
    let (base, query) = url.split_once('?').unwrap_or((url, ""));
    // The path stays as it was dialled; a URL without scheme and host was not dialled by anyone.
    base.split_once("://").filter(|(_, rest)| !rest.is_empty())?;
    let mut query: Vec<(String, String)> = form_urlencoded::parse(query.as_bytes()).into_owned().collect();
    query.sort();
    let mut body: Vec<(String, String)> = if method == Method::POST { form.to_vec() } else { Vec::new() };
    body.sort();

    let mut text = base.to_owned();
    if !query.is_empty() || !body.is_empty() {
        // A question mark also where there is no query: the prose says a dot, every SDK and the servers say this.
        text.push('?');
        let pairs: Vec<String> = query.iter().map(|(name, value)| format!("{name}={value}")).collect();
        text.push_str(&pairs.join("&"));
    }
    if !query.is_empty() && !body.is_empty() {
        text.push('.');
    }
    for (name, value) in &body {
        text.push_str(name);
        text.push_str(value);
    }
    text.push('.');
    text.push_str(nonce);
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{HeaderName, HeaderValue};
    use proptest::prelude::*;
    use serde_json::Value;

    const VECTORS: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/vectors/plivo.json"));

    fn text<'v>(vector: &'v Value, key: &str) -> &'v str {
        vector[key].as_str().unwrap_or_default()
    }

    fn verdict(vector: &Value) -> bool {
        let headers: HeaderMap = vector["headers"]
            .as_object()
            .unwrap()
            .iter()
            .map(|(name, value)| {
                (HeaderName::try_from(name).unwrap(), HeaderValue::from_str(value.as_str().unwrap()).unwrap())
            })
            .collect();
        let form: Vec<_> = form_urlencoded::parse(text(vector, "body").as_bytes()).into_owned().collect();
        let method: Method = text(vector, "method").parse().unwrap();
        verify(&[text(vector, "secret").to_owned()], &method, text(vector, "url"), &form, &headers)
    }

    #[test]
    fn the_sdks_verdicts_are_ours() {
        let vectors: Vec<Value> = serde_json::from_str(VECTORS).unwrap();
        let v3 = vectors.iter().filter(|v| text(v, "header_under_test").ends_with("-V3"));
        let mut seen = 0;
        for vector in v3 {
            assert_eq!(Value::from(verdict(vector)), vector["valid"], "{}", text(vector, "id"));
            seen += 1;
        }
        assert!(seen >= 25, "only {seen} vectors were read");
    }

    #[test]
    fn v2_alone_is_refused() {
        let vectors: Vec<Value> = serde_json::from_str(VECTORS).unwrap();
        let v2 = vectors.iter().find(|v| text(v, "id") == "plivo-v2-post").unwrap();
        assert!(!verdict(v2));
    }

    #[test]
    fn a_subaccount_s_call_passes_by_the_main_account_s_signature() {
        let vectors: Vec<Value> = serde_json::from_str(VECTORS).unwrap();
        let subaccount = vectors.iter().find(|v| text(v, "id") == "plivo-v3-subaccount-own").unwrap();
        let mut by_main = subaccount.clone();
        by_main["secret"] = vectors[0]["secret"].clone();
        assert!(verdict(&by_main));
    }

    fn signed_request() -> (Vec<String>, String, Vec<(String, String)>, HeaderMap) {
        let url = "https://api.example.com/functions/v1/webhook-intake/plivo/hangup/t?b=2&a=1".to_owned();
        let form: Vec<(String, String)> = [("CallUUID", "u"), ("BillDuration", "60"), ("Event", "Hangup")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .to_vec();
        let signed = signed_text(&Method::POST, &url, &form, "nonce1").unwrap();
        let mut headers = HeaderMap::new();
        headers.insert(NONCE, HeaderValue::from_static("nonce1"));
        headers.insert(SIGNATURE, sign("token", &signed).unwrap().parse().unwrap());
        (vec!["token".to_owned()], url, form, headers)
    }

    proptest! {
        #[test]
        fn parameters_may_arrive_in_any_order(order in Just(vec![0usize, 1, 2]).prop_shuffle()) {
            let (tokens, url, form, headers) = signed_request();
            let shuffled: Vec<_> = order.into_iter().map(|i| form[i].clone()).collect();
            prop_assert!(verify(&tokens, &Method::POST, &url, &shuffled, &headers));
        }

        #[test]
        fn a_changed_value_url_or_nonce_is_refused(which in 0usize..5, at in 0usize..60, bit in 0u8..7) {
            let (tokens, mut url, mut form, mut headers) = signed_request();
            let flip = |text: &str| {
                let mut bytes = text.as_bytes().to_vec();
                let at = at % bytes.len();
                bytes[at] ^= 1 << bit;
                String::from_utf8(bytes).ok()
            };
            let changed = match which {
                0 => flip(&url).map(|text| url = text),
                1..=3 => flip(&form[which - 1].1).map(|text| form[which - 1].1 = text),
                _ => flip("nonce1").and_then(|text| HeaderValue::from_str(&text).ok()).map(|value| { headers.insert(NONCE, value); }),
            };
            // A fragment is not signed, and a plus sign in a query reads as a space: neither changes what the request means.
            prop_assume!(changed.is_some() && !url.contains('#') && !url.contains('+'));
            prop_assert!(!verify(&tokens, &Method::POST, &url, &form, &headers));
        }
    }
}
