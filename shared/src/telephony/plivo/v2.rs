//! `X-Plivo-Signature-V2`, which Plivo still sends and has deprecated: HMAC-SHA256 over origin and path and a nonce.
//!
//! It covers neither query nor body, so it proves that Plivo once called this path and nothing of what it says: no handler takes an
//! event by it. It is here to tell somebody who sees only V2 what their account sends.

use crate::mac::{self, Encoding, Hash};
use http::HeaderMap;

/// Whether a V2 signature over `url` is right, made with any of the tokens, by the account or the main account.
pub fn verify(tokens: &[String], url: &str, headers: &HeaderMap) -> bool {
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let nonce = header("x-plivo-signature-v2-nonce");
    let base = url.split(['?', '#']).next().unwrap_or_default();
    if nonce.is_empty() || base.split_once("://").is_none_or(|(_, rest)| rest.is_empty()) {
        return false;
    }
    ["x-plivo-signature-v2", "x-plivo-signature-ma-v2"].iter().fold(false, |matched, name| {
        let keys = tokens.iter().map(String::as_bytes);
        let parts = [base.as_bytes(), nonce.as_bytes()];
        matched | mac::is_signed(Hash::Sha256, Encoding::Base64, keys, &parts, header(name))
    })
}
