//! The token that an agent's websocket is opened with: the call it is for, signed, so that an agent server knows who is there without
//! asking anybody.
//!
//! `v1.<key id>.<not after, Unix seconds>.<agent id>.<base64url of 16 bytes of HMAC-SHA256>`, in the path after the attempt. The MAC is
//! over what is before it, a full stop and the attempt, as text, under a key of the agent's own: HMAC-SHA256 of `stream-key:<agent id>`
//! under the stack's callback key. An agent server is given that key and no other: it can check the tokens of its own calls, and make up
//! neither another agent's nor a carrier's callback.

use crate::{
    mac::{Hash, hmac, same},
    secrets::NumberedKey,
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use uuid::Uuid;

/// Seconds after the answer in which the socket is opened; a carrier tries three times.
pub const GOOD_FOR_SECONDS: i64 = 120;
const MAC_BYTES: usize = 16;

/// The key that an agent's server is given. For calls that name no agent, `agent` is the nil UUID.
pub fn agent_key(callback_key: &[u8], agent: Uuid) -> Vec<u8> {
    hmac(Hash::Sha256, callback_key, &[b"stream-key:", agent.to_string().as_bytes()])
}

/// The token for one call, under the current (first) key. `None` when there is no key.
pub fn sign(callback_keys: &[NumberedKey], agent: Uuid, attempt: Uuid, not_after: i64) -> Option<String> {
    let key = callback_keys.first()?;
    let head = format!("v1.{}.{not_after}.{agent}", key.id);
    let mac = URL_SAFE_NO_PAD.encode(mac(&agent_key(&key.key, agent), &head, attempt));
    Some(format!("{head}.{mac}"))
}

/// Until when a token is good that was made for this attempt with any of the keys; `None` for any other.
pub fn read(callback_keys: &[NumberedKey], attempt: Uuid, token: &str) -> Option<i64> {
    let mut parts = token.split('.').skip(1);
    let id: u8 = parts.next()?.parse().ok()?;
    let agent = parts.nth(1)?.parse().ok()?;
    let key = callback_keys.iter().find(|key| key.id == id)?;
    verify(&agent_key(&key.key, agent), attempt, token)
}

/// What an agent server does, in whatever language: until when a token for this attempt is good, by the agent's own key.
pub fn verify(agent_key: &[u8], attempt: Uuid, token: &str) -> Option<i64> {
    let (head, written) = token.rsplit_once('.')?;
    let written = URL_SAFE_NO_PAD.decode(written).ok()?;
    let not_after = head.strip_prefix("v1.")?.split('.').nth(1)?.parse().ok()?;
    same(&mac(agent_key, head, attempt), &written).then_some(not_after)
}

fn mac(agent_key: &[u8], head: &str, attempt: Uuid) -> Vec<u8> {
    let mut mac = hmac(Hash::Sha256, agent_key, &[head.as_bytes(), b".", attempt.to_string().as_bytes()]);
    mac.truncate(MAC_BYTES);
    mac
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const AGENT: Uuid = Uuid::from_u128(3);
    const CALL: Uuid = Uuid::from_u128(1);

    fn keys(ids: &[u8]) -> Vec<NumberedKey> {
        ids.iter().map(|id| NumberedKey { id: *id, key: vec![*id; 32] }).collect()
    }

    #[test]
    fn it_is_good_for_its_agent_and_call_only_and_under_two_keys_at_once() {
        let token = sign(&keys(&[1]), AGENT, CALL, 1_790_000_000).unwrap();
        assert_eq!(read(&keys(&[2, 1]), CALL, &token), Some(1_790_000_000));
        assert_eq!(read(&keys(&[2]), CALL, &token), None);
        assert_eq!(read(&keys(&[1]), AGENT, &token), None);
        let other = token.replace(&AGENT.to_string(), &CALL.to_string());
        assert_eq!(read(&keys(&[1]), CALL, &other), None);
        assert_eq!(verify(&agent_key(&[1; 32], CALL), CALL, &token), None);
        assert_eq!(verify(&agent_key(&[1; 32], AGENT), CALL, &token), Some(1_790_000_000));
        assert_eq!(sign(&[], AGENT, CALL, 0), None);
    }

    #[test]
    fn the_example_of_the_documents_is_one() {
        let page = include_str!("../../../docs/providers.md");
        let key = hex::encode(agent_key(&[1; 32], AGENT));
        let token = sign(&keys(&[1]), AGENT, CALL, 1_790_000_000).unwrap();
        for told in [key, token, AGENT.to_string(), CALL.to_string()] {
            assert!(page.contains(&told), "{told}");
        }
    }

    proptest! {
        #[test]
        fn any_other_byte_is_refused(at in 0usize..78, byte in 33u8..127) {
            let token = sign(&keys(&[1]), AGENT, CALL, 1_790_000_000).unwrap();
            let mut bytes = token.clone().into_bytes();
            let at = at % bytes.len();
            bytes[at] = byte;
            let changed = String::from_utf8(bytes).unwrap();
            prop_assume!(changed != token);
            prop_assert_eq!(read(&keys(&[1]), CALL, &changed), None);
        }

        #[test]
        fn junk_is_refused_and_never_panics(junk in ".{0,80}") {
            prop_assert_eq!(read(&keys(&[1]), CALL, &junk), None);
        }
    }
}
