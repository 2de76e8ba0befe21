//! HMACs as webhooks carry them, compared in constant time.

use base64::{Engine, engine::general_purpose::STANDARD};
use hmac::{Hmac, KeyInit, Mac};
use sha1::Sha1;
use sha2::{Sha256, Sha512};
use subtle::ConstantTimeEq;

/// The hash below an HMAC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hash {
    /// SHA-1, for those who still sign so.
    Sha1,
    /// SHA-256.
    Sha256,
    /// SHA-512.
    Sha512,
}

/// How a signature is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// Hexadecimal, of either case.
    Hex,
    /// Base64 with padding.
    Base64,
}

/// The HMAC of `parts`, one after the other, under `key`.
pub fn hmac(hash: Hash, key: &[u8], parts: &[&[u8]]) -> Vec<u8> {
    fn run<M: Mac + KeyInit>(key: &[u8], parts: &[&[u8]]) -> Vec<u8> {
        // An HMAC takes a key of any length.
        let Ok(mut mac) = <M as KeyInit>::new_from_slice(key) else { return Vec::new() };
        parts.iter().for_each(|part| mac.update(part));
        mac.finalize().into_bytes().to_vec()
    }
    match hash {
        Hash::Sha1 => run::<Hmac<Sha1>>(key, parts),
        Hash::Sha256 => run::<Hmac<Sha256>>(key, parts),
        Hash::Sha512 => run::<Hmac<Sha512>>(key, parts),
    }
}

/// Whether two byte strings are the same, in a time that does not tell where they differ.
pub fn same(one: &[u8], other: &[u8]) -> bool {
    !one.is_empty() && bool::from(one.ct_eq(other))
}

/// Whether `written` is the HMAC of `parts` under any of `keys`. All keys are tried, so that the time tells nothing of which it was; an
/// empty key never matches.
pub fn is_signed<'k>(
    hash: Hash,
    encoding: Encoding,
    keys: impl IntoIterator<Item = &'k [u8]>,
    parts: &[&[u8]],
    written: &str,
) -> bool {
    let signature = match encoding {
        Encoding::Hex => hex::decode(written).ok(),
        Encoding::Base64 => STANDARD.decode(written).ok(),
    };
    let Some(signature) = signature else { return false };
    keys.into_iter().fold(false, |matched, key| matched | (!key.is_empty() & same(&hmac(hash, key, parts), &signature)))
}

#[cfg(test)]
mod tests {
    use super::*;

    // RFC 2202 case 2 and RFC 4231 case 2.
    const KEY: &[u8] = b"Jefe";
    const PARTS: [&[u8]; 2] = [b"what do ya want ", b"for nothing?"];

    #[test]
    fn the_examples_of_the_standards() {
        assert_eq!(hex::encode(hmac(Hash::Sha1, KEY, &PARTS)), "effcdf6ae5eb2fa2d27416d5f184df9c259a7c79");
        assert_eq!(
            hex::encode(hmac(Hash::Sha256, KEY, &PARTS)),
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
        );
        assert!(hex::encode(hmac(Hash::Sha512, KEY, &PARTS)).starts_with("164b7a7bfcf819e2e395fbe73b56e0a3"));
    }

    #[test]
    fn any_key_will_do_in_either_writing_and_nothing_else() {
        let keys: [&[u8]; 2] = [b"other", KEY];
        let mac = hmac(Hash::Sha256, KEY, &PARTS);
        let hex = hex::encode_upper(&mac);
        assert!(is_signed(Hash::Sha256, Encoding::Hex, keys, &PARTS, &hex));
        assert!(is_signed(Hash::Sha256, Encoding::Base64, keys, &PARTS, &STANDARD.encode(&mac)));
        assert!(!is_signed(Hash::Sha1, Encoding::Hex, keys, &PARTS, &hex));
        assert!(!is_signed(Hash::Sha256, Encoding::Hex, [&b"other"[..]], &PARTS, &hex));
        for junk in ["", "zz", &hex[..62]] {
            assert!(!is_signed(Hash::Sha256, Encoding::Hex, keys, &PARTS, junk), "{junk}");
        }
    }

    #[test]
    fn an_empty_key_matches_nothing() {
        let signature = hex::encode(hmac(Hash::Sha256, b"", &PARTS));
        assert!(!is_signed(Hash::Sha256, Encoding::Hex, [&b""[..]], &PARTS, &signature));
    }
}
