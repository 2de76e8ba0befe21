//! `Authorization: Bearer <JWT>`, HS256 under the account's signature secret.
//!
//! Vonage's SDKs check the token alone. Here the body's hash, the issuer, the application and the age count too: without them a token
//! would carry any body, from any application, for ever. Written by hand, since a JWT library takes the time from the machine and
//! brings along every algorithm that must not be accepted.

use crate::telephony::carrier::{Credentials, Signed};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit, Mac};
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

/// How far its clock and ours may be apart, either way.
const TOLERANCE_SECONDS: u64 = 300;

#[derive(Deserialize)]
struct Header {
    alg: String,
    #[serde(default)]
    crit: Option<Value>,
}

#[derive(Deserialize)]
struct Claims {
    iss: String,
    iat: i64,
    #[serde(default)]
    exp: Option<i64>,
    #[serde(default)]
    nbf: Option<i64>,
    #[serde(default)]
    payload_hash: Option<String>,
    #[serde(default)]
    application_id: Option<String>,
}

/// Verifies a request that Vonage made for the account's application.
pub fn verify(credentials: &Credentials, signed: &Signed<'_>, now: i64) -> bool {
    let Some((scheme, token)) = signed.header("authorization").split_once(' ') else { return false };
    if !scheme.eq_ignore_ascii_case("bearer") {
        return false;
    }
    let Some((text, signature)) = token.trim().rsplit_once('.') else { return false };
    let Ok(signature) = URL_SAFE_NO_PAD.decode(signature) else { return false };
    let mut matched = Choice::from(0);
    for name in ["signature_secret", "previous_signature_secret"] {
        let Some(mut mac) =
            credentials.get(name).and_then(|secret| Hmac::<Sha256>::new_from_slice(secret.as_bytes()).ok())
        else {
            continue;
        };
        mac.update(text.as_bytes());
        matched |= mac.finalize().into_bytes().as_slice().ct_eq(&signature);
    }
    let Some((header, claims)) = text.split_once('.') else { return false };
    let (Some(header), Some(claims)) = (part::<Header>(header), part::<Claims>(claims)) else { return false };
    bool::from(matched)
        && header.alg == "HS256"
        && header.crit.is_none()
        && is_for_us(&claims, credentials, signed.body, now)
}

fn is_for_us(claims: &Claims, credentials: &Credentials, body: &[u8], now: i64) -> bool {
    let is_fresh = now.abs_diff(claims.iat) <= TOLERANCE_SECONDS
        && claims.exp.is_none_or(|expires| now < expires)
        && claims.nbf.is_none_or(|begins| begins <= now);
    let is_bound = match claims.payload_hash.as_deref() {
        Some(hash) => {
            bool::from(hex::encode(Sha256::digest(body)).as_bytes().ct_eq(hash.to_ascii_lowercase().as_bytes()))
        }
        None => body.is_empty(),
    };
    // An account without an application has nothing that a webhook could be about.
    let is_ours = credentials.get("application_id").is_some()
        && credentials.get("application_id") == claims.application_id.as_deref();
    claims.iss == "Vonage" && is_fresh && is_bound && is_ours
}

fn part<T: for<'de> Deserialize<'de>>(encoded: &str) -> Option<T> {
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(encoded).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telephony::carrier::vectors::{self, Case};
    use proptest::prelude::*;
    use serde_json::json;

    const VECTORS: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/vectors/vonage.json"));
    const APPLICATION: &str = "aaaaaaaa-bbbb-cccc-dddd-0123456789ab";
    const NOW: i64 = 1_790_000_000;

    fn account(secret: &str) -> Credentials {
        Credentials::read(&json!({ "signature_secret": secret, "application_id": APPLICATION }).to_string())
    }

    #[test]
    fn the_policy_s_verdicts_are_ours() {
        let vectors = vectors::read(VECTORS);
        for vector in &vectors {
            let credentials = account(vectors::text(vector, "secret"));
            let verdict = verify(&credentials, &Case::of(vector).signed(), vector["now_unix"].as_i64().unwrap());
            assert_eq!(json!(verdict), vector["valid"], "{}", vector["id"]);
        }
        assert!(vectors.len() >= 10, "only {} vectors were read", vectors.len());
    }

    fn signed_case(header: Value, claims: Value, body: &str) -> Case {
        let text =
            format!("{}.{}", URL_SAFE_NO_PAD.encode(header.to_string()), URL_SAFE_NO_PAD.encode(claims.to_string()));
        let mut mac = Hmac::<Sha256>::new_from_slice(b"secret").unwrap();
        mac.update(text.as_bytes());
        let mut case = Case::post("https://api.example.com/x", "application/json", body);
        case.set("authorization", &format!("Bearer {text}.{}", URL_SAFE_NO_PAD.encode(mac.finalize().into_bytes())));
        case
    }

    const BODY: &str = r#"{"uuid":"u","status":"ringing"}"#;

    fn claims() -> Value {
        json!({ "iss": "Vonage", "iat": NOW, "jti": "j", "application_id": APPLICATION, "payload_hash": hex::encode(Sha256::digest(BODY)) })
    }

    #[test]
    fn each_claim_counts() {
        let judge =
            |header: Value, claims: Value| verify(&account("secret"), &signed_case(header, claims, BODY).signed(), NOW);
        let hs256 = json!({ "alg": "HS256", "typ": "JWT" });
        assert!(judge(hs256.clone(), claims()));
        let changed = |key: &str, value: Value| {
            let mut claims = claims();
            claims[key] = value;
            claims
        };
        for (key, value) in [
            ("iss", json!("vonage")),
            ("iat", json!(NOW - 301)),
            ("iat", json!(NOW + 301)),
            ("iat", json!("1790000000")),
            ("exp", json!(NOW)),
            ("nbf", json!(NOW + 1)),
            ("application_id", json!("another")),
            ("application_id", Value::Null),
            ("payload_hash", Value::Null),
            ("payload_hash", json!("00")),
        ] {
            assert!(!judge(hs256.clone(), changed(key, value.clone())), "{key} {value}");
        }
        assert!(judge(hs256, changed("iat", json!(NOW - 300))));
        for header in
            [json!({ "alg": "none" }), json!({ "alg": "RS256" }), json!({ "alg": "HS256", "crit": ["x"] }), json!({})]
        {
            assert!(!judge(header.clone(), claims()), "{header}");
        }
        let nameless = Credentials::read(r#"{"signature_secret":"secret"}"#);
        assert!(!verify(&nameless, &signed_case(json!({ "alg": "HS256" }), claims(), BODY).signed(), NOW));
    }

    proptest! {
        #[test]
        fn any_flipped_bit_is_refused(part in 0usize..2, at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let mut case = signed_case(json!({ "alg": "HS256" }), claims(), BODY);
            let good = case.clone();
            let changed = match part {
                0 => case.flip_body(at, bit),
                _ => case.flip_header("authorization", at, bit),
            };
            // The scheme's case says nothing.
            let scheme = |case: &Case| case.signed().header("authorization").to_ascii_lowercase().split_at(7.min(case.signed().header("authorization").len())).0.to_owned();
            let token = |case: &Case| case.signed().header("authorization").get(7..).unwrap_or_default().to_owned();
            prop_assume!(changed && (part == 0 || scheme(&case) != scheme(&good) || token(&case) != token(&good)));
            prop_assert!(!verify(&account("secret"), &case.signed(), NOW));
        }
    }
}
