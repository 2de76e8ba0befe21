//! The token in a callback URL: which attempt it is for, signed, so that an answer needs no database and nobody can make one up.
//!
//! `base64url(version, key id, attempt, carrier account, flags, not_after, agent)` + `.` + `base64url(16 bytes of HMAC-SHA256 over
//! that plus carrier and event)`. It stands in the path, never in a query: carriers differ in how they sign queries.

use super::CallbackEvent;
use crate::secrets::NumberedKey;
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use subtle::ConstantTimeEq;
use uuid::Uuid;

const VERSION: u8 = 1;
const PAYLOAD_BYTES: usize = 1 + 1 + 16 + 16 + 1 + 8 + 16;
const MAC_BYTES: usize = 16;
const RECORD: u8 = 0b0000_0001;

/// What a callback URL says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallbackToken {
    /// The attempt: `call_logs.id`.
    pub attempt_id: Uuid,
    /// The carrier account that the call was made with.
    pub carrier_account_id: Uuid,
    /// Whether the call may be recorded.
    pub record: bool,
    /// Unix seconds, real time: an answer after it is a hang-up.
    pub not_after: i64,
    /// The voice agent that takes the call.
    pub agent_id: Uuid,
}

impl CallbackToken {
    /// Writes the token for one event at one carrier, with the current (first) key. `None` when there is no key.
    pub fn encode(&self, keys: &[NumberedKey], carrier: &str, event: CallbackEvent) -> Option<String> {
        let key = keys.first()?;
        let mut payload = Vec::with_capacity(PAYLOAD_BYTES);
        payload.extend([VERSION, key.id]);
        payload.extend(self.attempt_id.as_bytes());
        payload.extend(self.carrier_account_id.as_bytes());
        payload.push(if self.record { RECORD } else { 0 });
        payload.extend(self.not_after.to_be_bytes());
        payload.extend(self.agent_id.as_bytes());
        let mac = mac(&key.key, &payload, carrier, event)?;
        Some(format!("{}.{}", URL_SAFE_NO_PAD.encode(&payload), URL_SAFE_NO_PAD.encode(mac)))
    }

    /// Reads a token; `None` for one that was not made with any of the keys for this carrier and event.
    pub fn decode(token: &str, keys: &[NumberedKey], carrier: &str, event: CallbackEvent) -> Option<Self> {
        let (payload, signature) = token.split_once('.')?;
        let payload = URL_SAFE_NO_PAD.decode(payload).ok()?;
        let signature = URL_SAFE_NO_PAD.decode(signature).ok()?;
        if payload.len() != PAYLOAD_BYTES || payload[0] != VERSION {
            return None;
        }
        let key = keys.iter().find(|key| key.id == payload[1])?;
        let expected = mac(&key.key, &payload, carrier, event)?;
        if !bool::from(expected.ct_eq(&signature)) {
            return None;
        }
        Some(Self {
            attempt_id: Uuid::from_slice(&payload[2..18]).ok()?,
            carrier_account_id: Uuid::from_slice(&payload[18..34]).ok()?,
            record: payload[34] & RECORD != 0,
            not_after: i64::from_be_bytes(payload[35..43].try_into().ok()?),
            agent_id: Uuid::from_slice(&payload[43..59]).ok()?,
        })
    }
}

fn mac(key: &[u8], payload: &[u8], carrier: &str, event: CallbackEvent) -> Option<[u8; MAC_BYTES]> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).ok()?;
    mac.update(payload);
    // Lengths are fixed or the byte zero ends them, so that no two inputs run together.
    mac.update(carrier.as_bytes());
    mac.update(&[0]);
    mac.update(event.as_str().as_bytes());
    mac.finalize().into_bytes()[..MAC_BYTES].try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(id: u8) -> NumberedKey {
        NumberedKey { id, key: vec![id; 32] }
    }

    fn token() -> CallbackToken {
        CallbackToken {
            attempt_id: Uuid::from_u128(1),
            carrier_account_id: Uuid::from_u128(2),
            record: true,
            not_after: 1_790_000_000,
            agent_id: Uuid::from_u128(3),
        }
    }

    #[test]
    fn it_is_short_and_safe_in_a_path() {
        let text = token().encode(&[key(1)], "plivo", CallbackEvent::Hangup).unwrap();
        assert!(text.len() <= 128, "{}", text.len());
        assert!(text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)));
    }

    #[test]
    fn it_is_good_for_its_carrier_and_event_only() {
        let keys = [key(1)];
        let text = token().encode(&keys, "plivo", CallbackEvent::Hangup).unwrap();
        assert_eq!(CallbackToken::decode(&text, &keys, "plivo", CallbackEvent::Hangup), Some(token()));
        assert_eq!(CallbackToken::decode(&text, &keys, "plivo", CallbackEvent::Ring), None);
        assert_eq!(CallbackToken::decode(&text, &keys, "twilio", CallbackEvent::Hangup), None);
    }

    #[test]
    fn two_keys_are_valid_at_once() {
        let text = token().encode(&[key(1)], "plivo", CallbackEvent::Ring).unwrap();
        assert!(CallbackToken::decode(&text, &[key(2), key(1)], "plivo", CallbackEvent::Ring).is_some());
        assert!(CallbackToken::decode(&text, &[key(2)], "plivo", CallbackEvent::Ring).is_none());
    }

    proptest! {
        #[test]
        fn any_flipped_bit_is_refused(bit in 0usize..8 * 60) {
            let keys = [key(1)];
            let text = token().encode(&keys, "plivo", CallbackEvent::Ring).unwrap();
            let mut bytes = text.into_bytes();
            let at = (bit / 8) % bytes.len();
            bytes[at] ^= 1 << (bit % 8);
            if let Ok(changed) = String::from_utf8(bytes) {
                prop_assert_eq!(CallbackToken::decode(&changed, &keys, "plivo", CallbackEvent::Ring), None);
            }
        }

        #[test]
        fn junk_is_refused_and_never_panics(junk in ".{0,200}") {
            prop_assert_eq!(CallbackToken::decode(&junk, &[key(1)], "plivo", CallbackEvent::Ring), None);
        }
    }
}
