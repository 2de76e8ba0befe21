//! `X-Twilio-Signature`: HMAC over the URL as it was dialled and the sorted form parameters.

use crate::telephony::carrier::{Credentials, Signed};
use base64::{Engine, engine::general_purpose::STANDARD};
use hmac::{Hmac, KeyInit, Mac};
use sha1::Sha1;
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use subtle::{Choice, ConstantTimeEq};

pub(super) const SIGNATURE: &str = "x-twilio-signature";
pub(super) const SETTINGS: &str = "x-twilio-webhooks-signature-settings";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Algorithm {
    Sha1,
    Sha256,
}

impl Algorithm {
    fn of(name: &str) -> Option<Self> {
        match name.trim().to_ascii_uppercase().as_str() {
            "HMAC_SHA1" => Some(Self::Sha1),
            "HMAC_SHA256" => Some(Self::Sha256),
            _ => None,
        }
    }

    fn sign(self, key: &str, text: &str) -> Option<String> {
        Some(match self {
            Self::Sha1 => {
                let mut mac = Hmac::<Sha1>::new_from_slice(key.as_bytes()).ok()?;
                mac.update(text.as_bytes());
                STANDARD.encode(mac.finalize().into_bytes())
            }
            Self::Sha256 => {
                let mut mac = Hmac::<Sha256>::new_from_slice(key.as_bytes()).ok()?;
                mac.update(text.as_bytes());
                STANDARD.encode(mac.finalize().into_bytes())
            }
        })
    }
}

/// Verifies a request that Twilio made.
///
/// The account's configuration, not the request, says how it is signed: with a shared key nothing but that key under that algorithm
/// is accepted, and without one nothing but the auth token under SHA-1. A request cannot talk us into the weaker way.
pub fn verify(credentials: &Credentials, signed: &Signed<'_>) -> bool {
    let given = signed.header(SIGNATURE);
    let settings = signed.header(SETTINGS);
    let (algorithm, keys) = match credentials.group("shared_key") {
        Some(shared) => {
            let Some(algorithm) = shared.get("algorithm").and_then(Algorithm::of) else { return false };
            let says = |name: &str| {
                settings
                    .split(',')
                    .find_map(|item| item.trim().strip_prefix(name)?.trim_start().strip_prefix('='))
                    .map(str::trim)
            };
            let is_the_key = shared.get("id").is_none_or(|id| says("key") == Some(id));
            if says("algorithm").and_then(Algorithm::of) != Some(algorithm) || !is_the_key {
                return false;
            }
            (algorithm, [shared.get("key").map(str::to_owned), None])
        }
        None if settings.is_empty() => (
            Algorithm::Sha1,
            ["auth_token", "previous_auth_token"].map(|name| credentials.get(name).map(str::to_owned)),
        ),
        None => return false,
    };
    let Some(parameters) = parameters(signed) else { return false };
    let mut matched = Choice::from(0);
    for key in keys.iter().flatten() {
        for url in urls(signed.url) {
            if let Some(expected) = algorithm.sign(key, &(url + &parameters)) {
                matched |= given.as_bytes().ct_eq(expected.as_bytes());
            }
        }
    }
    bool::from(matched)
}

/// What is signed after the URL: nothing where the URL itself carries the body's hash. `None` for a body that nothing binds.
fn parameters(signed: &Signed<'_>) -> Option<String> {
    if signed.is_form() {
        // Of a name that comes several times each value counts once.
        let pairs: BTreeSet<(String, String)> = signed.form().into_iter().collect();
        return Some(pairs.into_iter().map(|(name, value)| name + &value).collect());
    }
    let url = signed.url.split('#').next().unwrap_or_default();
    let query = url.split_once('?').map_or("", |(_, query)| query);
    let hash = form_urlencoded::parse(query.as_bytes()).find(|(name, _)| name == "bodySHA256").map(|(_, value)| value);
    let bound = match hash {
        Some(hash) => bool::from(hex::encode(Sha256::digest(signed.body)).as_bytes().ct_eq(hash.as_bytes())),
        None => signed.body.is_empty(),
    };
    bound.then(String::new)
}

/// The URL with and without its port: which of the two Twilio signed is not the same everywhere. A fragment, with which a URL may
/// have been registered, is not sent.
fn urls(url: &str) -> Vec<String> {
    let url = url.split('#').next().unwrap_or_default();
    let Some((scheme, rest)) = url.split_once("://") else { return vec![url.to_owned()] };
    let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    let (user, host) = authority.rsplit_once('@').map_or(("", authority), |(user, host)| (user, host));
    let user = if user.is_empty() { String::new() } else { format!("{user}@") };
    let port =
        host.rsplit_once(':').filter(|(_, port)| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()));
    let default = if scheme.eq_ignore_ascii_case("https") || scheme.eq_ignore_ascii_case("wss") { "443" } else { "80" };
    let (host, port) = port.unwrap_or((host, default));
    vec![format!("{scheme}://{user}{host}{path}"), format!("{scheme}://{user}{host}:{port}{path}")]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telephony::carrier::vectors::{self, Case};
    use proptest::prelude::*;
    use serde_json::{Value, json};

    const VECTORS: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/vectors/twilio.json"));
    const FORM: &str = "application/x-www-form-urlencoded";

    /// The account that a vector assumes: a request that names its key was made for one that is configured so.
    fn configured(vector: &Value) -> Credentials {
        let secret = vectors::text(vector, "secret");
        let has_settings = vector["headers"].as_object().unwrap().contains_key("X-Twilio-Webhooks-Signature-Settings");
        let account = match has_settings {
            true => json!({ "shared_key": { "key": secret, "algorithm": vector["algorithm"] } }),
            false => json!({ "auth_token": secret }),
        };
        Credentials::read(&account.to_string())
    }

    #[test]
    fn the_sdks_verdicts_are_ours() {
        let vectors = vectors::read(VECTORS);
        for vector in &vectors {
            let verdict = verify(&configured(vector), &Case::of(vector).signed());
            assert_eq!(json!(verdict), vector["valid"], "{}", vector["id"]);
        }
        assert!(vectors.len() >= 20, "only {} vectors were read", vectors.len());
    }

    #[test]
    fn no_request_chooses_a_weaker_way_than_the_account_s() {
        let vector = vectors::find(VECTORS, "twilio-sharedkey-sha1");
        let case = Case::of(&vector);
        let account = |account: Value| Credentials::read(&account.to_string());
        let secret = vectors::text(&vector, "secret");
        let shared = |algorithm: &str| {
            account(json!({ "auth_token": secret, "shared_key": { "key": secret, "algorithm": algorithm } }))
        };
        assert!(verify(&shared("HMAC_SHA1"), &case.signed()));
        assert!(!verify(&shared("HMAC_SHA256"), &case.signed()));
        assert!(!verify(&shared("HMAC_MD5"), &case.signed()));
        assert!(!verify(&account(json!({ "auth_token": secret })), &case.signed()), "a shared key is no auth token");

        let mut legacy = case.clone();
        legacy.headers.remove(SETTINGS);
        assert!(verify(&account(json!({ "auth_token": secret })), &legacy.signed()));
        assert!(
            !verify(&shared("HMAC_SHA1"), &legacy.signed()),
            "an account with a shared key takes no other signature"
        );

        let named = |id: &str| account(json!({ "shared_key": { "key": secret, "algorithm": "HMAC_SHA1", "id": id } }));
        assert!(verify(&named("webhooks_sharedkey_01J9ZC7M3K5Q"), &case.signed()));
        assert!(!verify(&named("webhooks_sharedkey_other"), &case.signed()));
    }

    #[test]
    fn the_token_before_the_last_is_good_for_as_long_as_it_is_kept() {
        let vector = vectors::find(VECTORS, "twilio-post-status");
        let secret = vectors::text(&vector, "secret");
        let account = |name: &str| Credentials::read(&json!({ "auth_token": "next", name: secret }).to_string());
        assert!(verify(&account("previous_auth_token"), &Case::of(&vector).signed()));
        assert!(!verify(&account("primary"), &Case::of(&vector).signed()));
    }

    #[test]
    fn the_port_is_tried_both_ways_and_nothing_else_changes() {
        assert_eq!(urls("https://h/p?a=b:1"), ["https://h/p?a=b:1", "https://h:443/p?a=b:1"]);
        assert_eq!(urls("http://u:p@h:8080?x#rc=3"), ["http://u:p@h?x", "http://u:p@h:8080?x"]);
        assert_eq!(urls("wss://[::1]:9/s"), ["wss://[::1]/s", "wss://[::1]:9/s"]);
    }

    #[test]
    fn a_body_that_nothing_binds_is_refused() {
        let url = "https://api.example.com/x";
        let mut case = Case::post(url, "application/json", "");
        case.set(SIGNATURE, &Algorithm::Sha1.sign("token", url).unwrap());
        assert!(verify(&Credentials::read("token"), &case.signed()));
        case.body = b"{}".to_vec();
        assert!(!verify(&Credentials::read("token"), &case.signed()));
    }

    fn signed_case(body: &str, content_type: &str) -> Case {
        let mut url = "https://api.example.com/functions/v1/webhook-intake/twilio/status/t?b=2&a=1".to_owned();
        if content_type != FORM {
            url.push_str(&format!("&bodySHA256={}", hex::encode(Sha256::digest(body))));
        }
        let mut case = Case::post(&url, content_type, body);
        let text = url + &parameters(&case.signed()).unwrap();
        case.set(SIGNATURE, &Algorithm::Sha1.sign("token", &text).unwrap());
        case
    }

    proptest! {
        #[test]
        fn parameters_may_arrive_in_any_order(order in Just(vec!["CallSid=CA1", "Digits=", "b=2", "b=1"]).prop_shuffle()) {
            let mut case = signed_case("CallSid=CA1&Digits=&b=2&b=1", FORM);
            case.body = order.join("&").into_bytes();
            prop_assert!(verify(&Credentials::read("token"), &case.signed()));
        }

        #[test]
        fn any_flipped_bit_is_refused(json in any::<bool>(), part in 0usize..3, at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let good = if json { signed_case(r#"{"a":1}"#, "application/json") } else { signed_case("CallSid=CA1&Digits=", FORM) };
            let mut case = good.clone();
            let changed = match part {
                0 => case.flip_url(at, bit),
                1 => case.flip_body(at, bit),
                _ => case.flip_header(SIGNATURE, at, bit),
            };
            // A body may be written in more than one way, and a fragment is not signed.
            let same = |case: &Case| (parameters(&case.signed()), urls(&case.url));
            prop_assume!(changed && (part == 2 || same(&case) != same(&good)));
            prop_assert!(!verify(&Credentials::read("token"), &case.signed()));
        }
    }
}
