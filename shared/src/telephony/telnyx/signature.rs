//! `Telnyx-Signature-Ed25519`: over the timestamp and the raw body. The URL is not signed.

use crate::telephony::carrier::{Credentials, Signed};
use base64::{Engine, engine::general_purpose::STANDARD};
use ed25519_dalek::{Signature, VerifyingKey};

pub(super) const SIGNATURE: &str = "telnyx-signature-ed25519";
pub(super) const TIMESTAMP: &str = "telnyx-timestamp";
/// How far its clock and ours may be apart, either way.
const TOLERANCE_SECONDS: u64 = 300;

/// Verifies a request that Telnyx made, with either of the public keys that are valid now.
pub fn verify(credentials: &Credentials, signed: &Signed<'_>, now: i64) -> bool {
    let timestamp = signed.header(TIMESTAMP);
    if timestamp.is_empty() || !timestamp.bytes().all(|byte| byte.is_ascii_digit()) {
        return false;
    }
    let Ok(at) = timestamp.parse::<i64>() else { return false };
    if now.abs_diff(at) > TOLERANCE_SECONDS {
        return false;
    }
    let Some(signature) = decoded::<64>(signed.header(SIGNATURE)) else { return false };
    let signature = Signature::from_bytes(&signature);
    let text = [timestamp.as_bytes(), b"|", signed.body].concat();
    ["public_key", "previous_public_key"]
        .into_iter()
        .filter_map(|name| VerifyingKey::from_bytes(&decoded(credentials.get(name)?)?).ok())
        // Strictly: neither a weak key nor a second encoding of a signature.
        .any(|key| key.verify_strict(&text, &signature).is_ok())
}

/// Standard, padded base64 of so many bytes.
fn decoded<const N: usize>(text: &str) -> Option<[u8; N]> {
    STANDARD.decode(text).ok()?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telephony::carrier::vectors::{self, Case};
    use ed25519_dalek::{Signer, SigningKey};
    use proptest::prelude::*;
    use serde_json::json;

    const VECTORS: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/vectors/telnyx.json"));
    const NOW: i64 = 1_790_000_000;

    fn account(public_key: &str) -> Credentials {
        Credentials::read(&json!({ "public_key": public_key }).to_string())
    }

    #[test]
    fn the_sdks_verdicts_are_ours() {
        let vectors = vectors::read(VECTORS);
        for vector in &vectors {
            let credentials = account(vectors::text(vector, "secret"));
            let verdict = verify(&credentials, &Case::of(vector).signed(), vector["now_unix"].as_i64().unwrap());
            assert_eq!(json!(verdict), vector["valid"], "{}", vector["id"]);
        }
        assert!(vectors.len() >= 12, "only {} vectors were read", vectors.len());
    }

    fn signed_case(at: i64) -> (Credentials, Case) {
        let key = SigningKey::from_bytes(&[7; 32]);
        let body = r#"{"data":{"event_type":"call.answered"}}"#;
        let mut case = Case::post("https://api.example.com/x", "application/json", body);
        case.set(TIMESTAMP, &at.to_string());
        case.set(SIGNATURE, &STANDARD.encode(key.sign(format!("{at}|{body}").as_bytes()).to_bytes()));
        (account(&STANDARD.encode(key.verifying_key().as_bytes())), case)
    }

    #[test]
    fn five_minutes_are_allowed_either_way_and_not_a_second_more() {
        for (at, good) in [(NOW, true), (NOW - 300, true), (NOW + 300, true), (NOW - 301, false), (NOW + 301, false)] {
            let (credentials, case) = signed_case(at);
            assert_eq!(verify(&credentials, &case.signed(), NOW), good, "{}", at - NOW);
        }
    }

    #[test]
    fn the_key_before_the_last_is_good_for_as_long_as_it_is_kept() {
        let (credentials, case) = signed_case(NOW);
        let old = credentials.get("public_key").unwrap();
        let next = STANDARD.encode(SigningKey::from_bytes(&[8; 32]).verifying_key().as_bytes());
        let rotated = Credentials::read(&json!({ "public_key": next, "previous_public_key": old }).to_string());
        assert!(verify(&rotated, &case.signed(), NOW));
        assert!(!verify(&account(&next), &case.signed(), NOW));
    }

    proptest! {
        #[test]
        fn any_flipped_bit_is_refused(part in 0usize..3, at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let (credentials, mut case) = signed_case(NOW);
            let changed = match part {
                0 => case.flip_body(at, bit),
                1 => case.flip_header(TIMESTAMP, at, bit),
                _ => case.flip_header(SIGNATURE, at, bit),
            };
            prop_assume!(changed);
            prop_assert!(!verify(&credentials, &case.signed(), NOW));
        }
    }
}
