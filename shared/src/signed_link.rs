//! A link that a browser can follow without a JWT: it says until when it is good, and is signed for one thing alone.
//!
//! `base64url(version, key id, not_after)` + `.` + `base64url(16 bytes of HMAC-SHA256 over that, the purpose and the id)`, with the
//! stack's callback keys: two are valid at once. The purpose keeps a link to one form of a document from opening another, and from
//! being a callback's token.

use crate::{Error, Result, secrets::NumberedKey};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit, Mac};
use http::StatusCode;
use sha2::Sha256;
use subtle::ConstantTimeEq;
use uuid::Uuid;

const VERSION: u8 = 1;
const PAYLOAD_BYTES: usize = 1 + 1 + 8;
const MAC_BYTES: usize = 16;

/// Signs a link to `id` for `purpose` (`invoices.pdf`), good until `not_after` (Unix seconds, real time). `None` without a key.
pub fn sign(keys: &[NumberedKey], purpose: &str, id: Uuid, not_after: i64) -> Option<String> {
    let key = keys.first()?;
    let mut payload = vec![VERSION, key.id];
    payload.extend(not_after.to_be_bytes());
    let mac = mac(&key.key, &payload, purpose, id)?;
    Some(format!("{}.{}", URL_SAFE_NO_PAD.encode(&payload), URL_SAFE_NO_PAD.encode(mac)))
}

/// Lets a link pass. Errors: 403 `bad_token` for one that was not signed for this, `link_expired` for one that was and is over.
pub fn verify(keys: &[NumberedKey], purpose: &str, id: Uuid, token: &str, now: i64) -> Result<()> {
    let not_after = read(keys, purpose, id, token).ok_or_else(|| {
        Error::new(StatusCode::FORBIDDEN, "bad_token", "the link is not one that was given out").at("t")
    })?;
    if now > not_after {
        let error = Error::new(StatusCode::FORBIDDEN, "link_expired", "the link is no longer good").at("t");
        return Err(error.hint("Ask for a new one where you found it."));
    }
    Ok(())
}

fn read(keys: &[NumberedKey], purpose: &str, id: Uuid, token: &str) -> Option<i64> {
    let (payload, signature) = token.split_once('.')?;
    let payload = URL_SAFE_NO_PAD.decode(payload).ok()?;
    let signature = URL_SAFE_NO_PAD.decode(signature).ok()?;
    if payload.len() != PAYLOAD_BYTES || payload[0] != VERSION {
        return None;
    }
    let key = keys.iter().find(|key| key.id == payload[1])?;
    let expected = mac(&key.key, &payload, purpose, id)?;
    bool::from(expected.ct_eq(&signature)).then(|| i64::from_be_bytes(payload[2..10].try_into().unwrap_or_default()))
}

fn mac(key: &[u8], payload: &[u8], purpose: &str, id: Uuid) -> Option<[u8; MAC_BYTES]> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).ok()?;
    // What comes before the purpose has a fixed length, so that no two inputs run together.
    mac.update(b"signed-link\0");
    mac.update(payload);
    mac.update(id.as_bytes());
    mac.update(purpose.as_bytes());
    mac.finalize().into_bytes()[..MAC_BYTES].try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ID: Uuid = Uuid::from_u128(7);
    const END: i64 = 1_790_000_000;

    fn key(id: u8) -> NumberedKey {
        NumberedKey { id, key: vec![id; 32] }
    }

    fn code(keys: &[NumberedKey], purpose: &str, id: Uuid, token: &str, now: i64) -> Option<String> {
        verify(keys, purpose, id, token, now).err().map(|error| error.code)
    }

    #[test]
    fn it_opens_what_it_was_signed_for_until_its_end() {
        let token = sign(&[key(1)], "invoices.pdf", ID, END).unwrap();
        let keys = [key(2), key(1)];
        assert_eq!(code(&keys, "invoices.pdf", ID, &token, END), None);
        assert_eq!(code(&keys, "invoices.pdf", ID, &token, END + 1).as_deref(), Some("link_expired"));
        assert_eq!(code(&keys, "invoices.html", ID, &token, END).as_deref(), Some("bad_token"));
        assert_eq!(code(&keys, "invoices.pdf", Uuid::from_u128(8), &token, END).as_deref(), Some("bad_token"));
        assert_eq!(code(&[key(2)], "invoices.pdf", ID, &token, END).as_deref(), Some("bad_token"));
        assert_eq!(sign(&[], "invoices.pdf", ID, END), None);
    }

    proptest! {
        #[test]
        fn any_changed_character_is_refused(at in 0usize..36, to in "[A-Za-z0-9_-]") {
            let token = sign(&[key(1)], "invoices.pdf", ID, END).unwrap();
            let mut changed = token.clone();
            changed.replace_range(at..=at, &to);
            prop_assume!(changed != token);
            prop_assert!(verify(&[key(1)], "invoices.pdf", ID, &changed, END).is_err());
        }

        #[test]
        fn junk_is_refused_and_never_panics(junk in ".{0,80}") {
            prop_assert!(verify(&[key(1)], "invoices.pdf", ID, &junk, END).is_err());
        }
    }
}
