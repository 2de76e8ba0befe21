//! `X-Plivo-Signature-V3`: HMAC-SHA256 over the URL, its sorted query, the sorted body parameters and a nonce.

use crate::telephony::carrier::{Credentials, Signed};
use base64::{Engine, engine::general_purpose::STANDARD};
use hmac::{Hmac, KeyInit, Mac};
use http::Method;
use sha2::Sha256;
use subtle::{Choice, ConstantTimeEq};

pub(super) const SIGNATURE: &str = "x-plivo-signature-v3";
pub(super) const MAIN_ACCOUNT_SIGNATURE: &str = "x-plivo-signature-ma-v3";
pub(super) const NONCE: &str = "x-plivo-signature-v3-nonce";

/// Verifies a request that Plivo made.
///
/// Either the account's (or subaccount's) own signature or the main account's will do; each header is a comma list while a token
/// rotates. The deprecated V2, which covers neither query nor body, is never accepted.
pub fn verify(credentials: &Credentials, signed: &Signed<'_>) -> bool {
    let nonce = signed.header(NONCE);
    if nonce.is_empty() {
        return false;
    }
    let form = if signed.method == Method::POST { signed.form() } else { Vec::new() };
    let Some(text) = signed_text(signed.url, form, nonce) else { return false };
    let mut matched = Choice::from(0);
    // Where the main account's own token is known, it alone makes that signature; a single token may be either's.
    let own = credentials.get("auth_token");
    let main = credentials.get("main_auth_token").or(own);
    for (name, token) in [(SIGNATURE, own), (MAIN_ACCOUNT_SIGNATURE, main)] {
        let Some(expected) = token.and_then(|token| sign(token, &text)) else { continue };
        // The SDKs split on the comma and do not trim.
        for given in signed.header(name).split(',') {
            matched |= given.as_bytes().ct_eq(expected.as_bytes());
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
fn signed_text(url: &str, mut body: Vec<(String, String)>, nonce: &str) -> Option<String> {
    let url = url.split('#').next().unwrap_or(url);
    let (base, query) = url.split_once('?').unwrap_or((url, ""));
    // The path stays as it was dialled; a URL without scheme and host was not dialled by anyone.
    base.split_once("://").filter(|(_, rest)| !rest.is_empty())?;
    let mut query: Vec<(String, String)> = form_urlencoded::parse(query.as_bytes()).into_owned().collect();
    query.sort();
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
    use crate::telephony::carrier::vectors::{self, Case};
    use proptest::prelude::*;
    use serde_json::json;

    const VECTORS: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/vectors/plivo.json"));

    fn verdict(case: &Case, credentials: &str) -> bool {
        verify(&Credentials::read(credentials), &case.signed())
    }

    #[test]
    fn the_sdks_verdicts_are_ours() {
        let v3 = vectors::read(VECTORS).into_iter().filter(|v| vectors::text(v, "header_under_test").ends_with("-V3"));
        let mut seen = 0;
        for vector in v3 {
            let case = Case::of(&vector);
            assert_eq!(json!(verdict(&case, vectors::text(&vector, "secret"))), vector["valid"], "{}", vector["id"]);
            seen += 1;
        }
        assert!(seen >= 25, "only {seen} vectors were read");
    }

    #[test]
    fn v2_alone_is_refused() {
        let vector = vectors::find(VECTORS, "plivo-v2-post");
        assert!(!verdict(&Case::of(&vector), vectors::text(&vector, "secret")));
    }

    #[test]
    fn a_subaccount_s_call_passes_by_either_signature_and_not_by_one_in_the_other_s_place() {
        let vector = vectors::find(VECTORS, "plivo-v3-subaccount-own");
        let main = vectors::find(VECTORS, "plivo-v3-post-query");
        let (own, main) = (vectors::text(&vector, "secret"), vectors::text(&main, "secret"));
        let case = Case::of(&vector);
        assert!(verdict(&case, own));
        assert!(verdict(&case, main));
        assert!(verdict(&case, &json!({ "auth_token": own, "main_auth_token": main }).to_string()));
        assert!(verdict(&case, &json!({ "auth_token": own, "main_auth_token": "rotated" }).to_string()));
        assert!(verdict(&case, &json!({ "auth_token": "rotated", "main_auth_token": main }).to_string()));
        assert!(!verdict(&case, &json!({ "auth_token": "rotated", "main_auth_token": own }).to_string()));
        assert!(!verdict(&case, "{}"));
    }

    /// A request whose signature is right.
    fn signed_case() -> Case {
        let url = "https://api.example.com/functions/v1/webhook-intake/plivo/hangup/t?b=2&a=1".to_owned();
        let mut case = Case::post(&url, "application/x-www-form-urlencoded", "CallUUID=u&BillDuration=60&Event=Hangup");
        let text = signed_text(&url, case.signed().form(), "nonce1").unwrap();
        case.set(NONCE, "nonce1");
        case.set(SIGNATURE, &sign("token", &text).unwrap());
        case
    }

    #[test]
    fn the_case_of_the_properties_is_good() {
        assert!(verdict(&signed_case(), "token"));
    }

    proptest! {
        #[test]
        fn parameters_may_arrive_in_any_order(order in Just(vec!["CallUUID=u", "BillDuration=60", "Event=Hangup"]).prop_shuffle()) {
            let mut case = signed_case();
            case.body = order.join("&").into_bytes();
            prop_assert!(verdict(&case, "token"));
        }

        #[test]
        fn any_flipped_bit_is_refused(part in 0usize..4, at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let mut case = signed_case();
            let changed = match part {
                0 => case.flip_url(at, bit),
                1 => case.flip_body(at, bit),
                2 => case.flip_header(NONCE, at, bit),
                _ => case.flip_header(SIGNATURE, at, bit),
            };
            // A fragment is not signed, and a query may be written in more than one way.
            let same = |case: &Case| signed_text(&case.url, case.signed().form(), "n");
            prop_assume!(changed && (part > 1 || same(&case) != same(&signed_case())));
            prop_assert!(!verdict(&case, "token"));
        }
    }
}
