//! Standard Webhooks 1.0.0: `webhook-id`, `webhook-timestamp`, `webhook-signature` over `id.timestamp.body`.
//!
//! Source: the specification at standardwebhooks.com; the tolerance of five minutes both ways is that of its libraries.

use base64::{Engine, engine::general_purpose::STANDARD};
use chacha20poly1305::aead::Generate;
use hmac::{Hmac, KeyInit, Mac};
use http::HeaderMap;
use sha2::Sha256;
use subtle::ConstantTimeEq;

/// Seconds by which a timestamp may differ from now, either way.
pub const TOLERANCE_SECONDS: i64 = 300;

/// Why a delivery was refused. For logs; the sender is told only that the signature is bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A header is missing or not text.
    #[error("missing header")]
    MissingHeader,
    /// The timestamp is not a number, or too far from now.
    #[error("timestamp outside the tolerance")]
    Timestamp,
    /// No signature matches any secret.
    #[error("no signature matches")]
    NoMatch,
}

/// Verifies a delivery against every currently valid secret (`whsec_` + base64), at `now` in unix seconds.
///
/// Returns the message's id, its idempotency key.
pub fn verify<'h>(secrets: &[String], headers: &'h HeaderMap, body: &[u8], now: i64) -> Result<&'h str, Refusal> {
    let header = |name: &str| headers.get(name).and_then(|v| v.to_str().ok()).ok_or(Refusal::MissingHeader);
    let id = header("webhook-id")?;
    let timestamp = header("webhook-timestamp")?;
    let signatures = header("webhook-signature")?;
    let seconds: i64 = timestamp.parse().map_err(|_| Refusal::Timestamp)?;
    if now.saturating_sub(seconds).saturating_abs() > TOLERANCE_SECONDS {
        return Err(Refusal::Timestamp);
    }
    let mut matched = subtle::Choice::from(0);
    for secret in secrets {
        let Some(expected) = sign(secret, id, seconds, body) else { continue };
        for signature in signatures.split(' ') {
            matched |= signature.as_bytes().ct_eq(expected.as_bytes());
        }
    }
    if bool::from(matched) { Ok(id) } else { Err(Refusal::NoMatch) }
}

/// A new secret: `whsec_` and 32 random bytes.
pub fn new_secret() -> String {
    format!("whsec_{}", STANDARD.encode(chacha20poly1305::Key::generate()))
}

/// The `v1,<base64>` signature of a message; `None` when the secret is not `whsec_` + base64.
pub fn sign(secret: &str, id: &str, timestamp: i64, body: &[u8]) -> Option<String> {
    let key = STANDARD.decode(secret.strip_prefix("whsec_").unwrap_or(secret)).ok()?;
    let mut mac = Hmac::<Sha256>::new_from_slice(&key).ok()?;
    mac.update(format!("{id}.{timestamp}.").as_bytes());
    mac.update(body);
    Some(format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes())))
}

#[cfg(test)]
mod tests {
    use super::*;

    // The example of the specification's reference libraries.
    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    const ID: &str = "msg_p5jXN8AQM9LWM0D4loKWxJek";
    const AT: i64 = 1_614_265_330;
    const BODY: &[u8] = br#"{"test": 2432232314}"#;

    fn headers(signature: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert("webhook-id", ID.parse().unwrap());
        headers.insert("webhook-timestamp", AT.to_string().parse().unwrap());
        headers.insert("webhook-signature", signature.parse().unwrap());
        headers
    }

    #[test]
    fn the_reference_signature_is_ours() {
        assert_eq!(sign(SECRET, ID, AT, BODY).unwrap(), "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn a_new_secret_signs_and_is_never_the_same() {
        let (one, other) = (new_secret(), new_secret());
        assert_ne!(one, other);
        assert_eq!(STANDARD.decode(one.strip_prefix("whsec_").unwrap()).unwrap().len(), 32);
        let signed = headers(&sign(&one, ID, AT, BODY).unwrap());
        assert_eq!(verify(&[one], &signed, BODY, AT), Ok(ID));
        assert_eq!(verify(&[other], &signed, BODY, AT), Err(Refusal::NoMatch));
    }

    #[test]
    fn any_of_several_signatures_and_secrets_will_do() {
        let good = sign(SECRET, ID, AT, BODY).unwrap();
        let secrets = ["whsec_AAAA".to_owned(), SECRET.to_owned()];
        let headers = headers(&format!("v1,AAAA v2,x {good}"));
        assert_eq!(verify(&secrets, &headers, BODY, AT), Ok(ID));
        assert_eq!(verify(&secrets[..1], &headers, BODY, AT), Err(Refusal::NoMatch));
        assert_eq!(verify(&secrets, &headers, b"{}", AT), Err(Refusal::NoMatch));
    }

    #[test]
    fn the_clock_may_differ_by_five_minutes_and_no_more() {
        let headers = headers(&sign(SECRET, ID, AT, BODY).unwrap());
        let secrets = [SECRET.to_owned()];
        for (now, ok) in [(AT + 300, true), (AT - 300, true), (AT + 301, false), (AT - 301, false)] {
            assert_eq!(verify(&secrets, &headers, BODY, now).is_ok(), ok, "{now}");
        }
    }

    #[test]
    fn a_missing_header_is_refused() {
        assert_eq!(verify(&[SECRET.to_owned()], &HeaderMap::new(), BODY, AT), Err(Refusal::MissingHeader));
    }
}
