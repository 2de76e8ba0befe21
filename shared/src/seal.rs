//! Secrets of carrier accounts at rest: XChaCha20-Poly1305 under a key of the stack's secret, with the key's id in front.
//!
//! A sealed text is `v1.<key id>.<base64url(nonce ‖ ciphertext ‖ tag)>`. The associated data binds it to its row, so that a sealed
//! secret copied to another account does not open. Two keys may be valid at once; the first seals.

use crate::{Error, Result, secrets::NumberedKey};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use chacha20poly1305::{
    XChaCha20Poly1305, XNonce,
    aead::{Aead, Generate, KeyInit, Payload},
};

const NONCE_BYTES: usize = 24;

/// Seals and opens with the keys of the stack.
#[derive(Clone)]
pub struct Sealer {
    ciphers: Vec<(u8, XChaCha20Poly1305)>,
}

impl Sealer {
    /// Keys of 32 bytes; the first seals, all open. Error 500 when a key has another length or there is none.
    pub fn new(keys: &[NumberedKey]) -> Result<Self> {
        let ciphers = keys
            .iter()
            .map(|key| {
                let cipher = XChaCha20Poly1305::new_from_slice(&key.key)
                    .map_err(|_| Error::internal(format!("seal key {} has not 32 bytes", key.id)))?;
                Ok((key.id, cipher))
            })
            .collect::<Result<Vec<_>>>()?;
        if ciphers.is_empty() {
            return Err(Error::internal("the stack's secret has no seal key"));
        }
        Ok(Self { ciphers })
    }

    /// Seals `plaintext` for the row that `aad` names (a carrier account's id).
    pub fn seal(&self, plaintext: &str, aad: &str) -> Result<String> {
        let (id, cipher) = &self.ciphers[0];
        let nonce = XNonce::generate();
        let payload = Payload { msg: plaintext.as_bytes(), aad: aad.as_bytes() };
        let sealed = cipher.encrypt(&nonce, payload).map_err(|_| Error::internal("sealing failed"))?;
        let mut bytes = nonce.to_vec();
        bytes.extend(sealed);
        Ok(format!("v1.{id}.{}", URL_SAFE_NO_PAD.encode(bytes)))
    }

    /// Opens what [`Sealer::seal`] made for the same `aad`; error 500 for anything else.
    pub fn open(&self, sealed: &str, aad: &str) -> Result<String> {
        let unreadable = || Error::internal("a sealed secret cannot be opened: wrong key, wrong row or not sealed");
        let (id, encoded) = sealed.strip_prefix("v1.").and_then(|rest| rest.split_once('.')).ok_or_else(unreadable)?;
        let id: u8 = id.parse().map_err(|_| unreadable())?;
        let (_, cipher) = self.ciphers.iter().find(|(key_id, _)| *key_id == id).ok_or_else(unreadable)?;
        let bytes = URL_SAFE_NO_PAD.decode(encoded).map_err(|_| unreadable())?;
        let (nonce, ciphertext) = bytes.split_at_checked(NONCE_BYTES).ok_or_else(unreadable)?;
        let nonce = XNonce::try_from(nonce).map_err(|_| unreadable())?;
        let payload = Payload { msg: ciphertext, aad: aad.as_bytes() };
        let plaintext = cipher.decrypt(&nonce, payload).map_err(|_| unreadable())?;
        String::from_utf8(plaintext).map_err(|_| unreadable())
    }
}

/// A new secret for Standard Webhooks: `whsec_` and 24 random bytes, what its specification asks at least.
pub fn new_webhook_secret() -> String {
    format!("whsec_{}", base64::engine::general_purpose::STANDARD.encode(XNonce::generate()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(id: u8) -> NumberedKey {
        NumberedKey { id, key: vec![id; 32] }
    }

    #[test]
    fn what_was_sealed_opens_for_the_same_row_only() {
        let sealer = Sealer::new(&[key(2), key(1)]).unwrap();
        let sealed = sealer.seal("token", "account-a").unwrap();
        assert!(sealed.starts_with("v1.2."));
        assert_eq!(sealer.open(&sealed, "account-a").unwrap(), "token");
        assert!(sealer.open(&sealed, "account-b").is_err());
        assert!(!sealed.contains("token"));
    }

    #[test]
    fn the_old_key_still_opens_and_a_removed_one_does_not() {
        let sealed = Sealer::new(&[key(1)]).unwrap().seal("token", "a").unwrap();
        assert_eq!(Sealer::new(&[key(2), key(1)]).unwrap().open(&sealed, "a").unwrap(), "token");
        assert!(Sealer::new(&[key(2)]).unwrap().open(&sealed, "a").is_err());
    }

    #[test]
    fn junk_is_an_error_and_never_a_panic() {
        let sealer = Sealer::new(&[key(1)]).unwrap();
        for junk in ["", "v1", "v1.1", "v1.1.", "v1.1.AAAA", "v1.999.AAAA", "v2.1.AAAA", "v1.1.!!!"] {
            assert!(sealer.open(junk, "a").is_err(), "{junk}");
        }
    }
}
