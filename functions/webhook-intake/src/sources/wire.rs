//! What shops, gateways and forms send has in common: JSON whose numbers are texts, and HMAC-SHA256 over the raw body.

use super::{Event, Payload, Unmapped};
use base64::{Engine, engine::general_purpose::STANDARD};
use serde::{Deserialize, Deserializer, de::Error as _};
use serde_json::{Value, value::RawValue};
use shared::mac::{self, Hash};

/// A scalar as it is written: the text of a string, or the digits of a number, of which no number type may hold all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exact(pub String);

impl<'de> Deserialize<'de> for Exact {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = Box::<RawValue>::deserialize(deserializer)?;
        let text = raw.get();
        match text.as_bytes().first() {
            Some(b'"') => serde_json::from_str(text).map(Self).map_err(D::Error::custom),
            Some(b'-' | b'0'..=b'9' | b't' | b'f') => Ok(Self(text.to_owned())),
            _ => Err(D::Error::custom("a text or a number is expected")),
        }
    }
}

impl Exact {
    /// The text, unless it is blank.
    pub fn text(&self) -> Option<&str> {
        Some(self.0.trim()).filter(|text| !text.is_empty())
    }

    /// A plain decimal number, which SQL reads exactly. None for anything else, also for an exponent, which no amount has.
    pub fn decimal(&self) -> Option<&str> {
        let text = self.text()?;
        let unsigned = text.strip_prefix('-').unwrap_or(text);
        let (whole, fraction) = unsigned.split_once('.').unwrap_or((unsigned, "0"));
        let digits = |part: &str, most| {
            (1..=most).contains(&part.len()) && part.bytes().all(|character| character.is_ascii_digit())
        };
        (digits(whole, 15) && digits(fraction, 20)).then_some(text)
    }

    /// A whole number.
    pub fn integer(&self) -> Option<i64> {
        self.text()?.parse().ok()
    }
}

/// What an event of a shop or a gateway says, in the words of the database.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Told {
    /// What it changes; none for what means nothing to us.
    pub payload: Option<Value>,
    /// Words of the sender that map to none of ours: the field, and the word.
    pub unmapped: Vec<(&'static str, String)>,
    /// Why it means nothing to us.
    pub note: Option<String>,
}

impl Told {
    /// What changes something.
    pub fn of(payload: Value) -> Self {
        Self { payload: Some(payload), ..Self::default() }
    }

    /// What is kept, and means nothing to us.
    pub fn nothing(note: impl Into<String>) -> Self {
        Self { note: Some(note.into()), ..Self::default() }
    }

    /// Adds to what it changes, if it changes anything.
    pub fn and(mut self, key: &str, value: Value) -> Self {
        if let Some(Value::Object(payload)) = &mut self.payload {
            payload.insert(key.to_owned(), value);
        }
        self
    }

    /// The event, with its payload as `payload` has it.
    pub fn event(self, kind: &str, dedupe_key: String, payload: fn(Value) -> Payload) -> Event {
        let mut event = Event::new(kind, dedupe_key, self.payload.map_or(Payload::Nothing, payload));
        event.unmapped = self.unmapped.into_iter().map(|(field, value)| Unmapped { field, value }).collect();
        event.note = self.note;
        event
    }
}

/// Reads a body; what has another shape than it is documented to have is kept and said, and changes nothing.
pub fn read<T: serde::de::DeserializeOwned>(body: &[u8], then: impl FnOnce(T) -> Told) -> Told {
    match serde_json::from_slice(body) {
        Ok(read) => then(read),
        // The position tells what is wrong; the words of the error may quote the body, and are not kept.
        Err(error) => Told::nothing(format!("unreadable: line {} column {}", error.line(), error.column())),
    }
}

/// The text of an optional scalar, unless it is blank.
pub fn text(field: &Option<Exact>) -> Option<&str> {
    field.as_ref()?.text()
}

/// The decimal of an optional scalar.
pub fn decimal(field: &Option<Exact>) -> Option<&str> {
    field.as_ref()?.decimal()
}

/// Whether a header is the base64 of the parts' HMAC-SHA256 under any of the keys. All are tried, in constant time.
pub fn is_base64_hmac<'k>(keys: impl IntoIterator<Item = &'k [u8]>, parts: &[&[u8]], given: &str) -> bool {
    is_spelled(keys, parts, given, |mac| STANDARD.encode(mac))
}

/// As [`is_base64_hmac`], in lower-case hexadecimal digits.
pub fn is_hex_hmac<'k>(keys: impl IntoIterator<Item = &'k [u8]>, parts: &[&[u8]], given: &str) -> bool {
    is_spelled(keys, parts, given, |mac| hex::encode(mac))
}

// The texts are compared, not what they decode to: one signature has one spelling.
fn is_spelled<'k>(
    keys: impl IntoIterator<Item = &'k [u8]>,
    parts: &[&[u8]],
    given: &str,
    spell: impl Fn(&[u8]) -> String,
) -> bool {
    keys.into_iter().filter(|key| !key.is_empty()).fold(false, |matched, key| {
        matched | mac::same(spell(&mac::hmac(Hash::Sha256, key, parts)).as_bytes(), given.as_bytes())
    })
}

/// An RFC 3339 time of unix seconds.
pub fn instant(seconds: i64) -> Option<String> {
    chrono::DateTime::from_timestamp(seconds, 0).map(|at| at.to_rfc3339_opts(chrono::SecondsFormat::Secs, true))
}

/// A UUID in its usual spelling, which is how an id of ours comes back from others.
pub fn own_id(text: Option<&str>) -> Option<String> {
    let id = uuid::Uuid::try_parse(text?.trim()).ok()?;
    Some(id.hyphenated().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct Wire {
        id: Exact,
        #[serde(default)]
        amount: Option<Exact>,
    }

    #[test]
    fn a_number_keeps_all_its_digits() {
        let wire: Wire = serde_json::from_str(r#"{"id":123456789012345678901234567890,"amount":1.0}"#).unwrap();
        assert_eq!(wire.id.0, "123456789012345678901234567890");
        assert_eq!(decimal(&wire.amount), Some("1.0"));
        let wire: Wire = serde_json::from_str(r#"{"id":"gid:\/\/x\u0026y","amount":null}"#).unwrap();
        assert_eq!((wire.id.0.as_str(), wire.amount), ("gid://x&y", None));
        assert!(serde_json::from_str::<Wire>(r#"{"id":[1]}"#).is_err());
    }

    #[test]
    fn only_a_plain_decimal_is_an_amount() {
        for good in ["0", "12.50", "-3.1", "000.1", "123456789012345"] {
            assert_eq!(Exact(good.into()).decimal(), Some(good));
        }
        for bad in ["", "1e5", "1.", ".5", "1,5", "NaN", "+1", "--1", "1234567890123456", "1.2.3", "٣"] {
            assert_eq!(Exact(bad.into()).decimal(), None, "{bad}");
        }
    }

    #[test]
    fn every_key_is_tried_and_an_empty_one_matches_nothing() {
        let keys = |names: &[&'static str]| names.iter().map(|name| name.as_bytes()).collect::<Vec<_>>();
        let mac = STANDARD.encode(mac::hmac(Hash::Sha256, b"new", &[b"body"]));
        assert!(is_base64_hmac(keys(&["new", "old"]), &[b"body"], &mac));
        assert!(is_base64_hmac(keys(&["old", "new"]), &[b"bo", b"dy"], &mac));
        assert!(!is_base64_hmac(keys(&["old"]), &[b"body"], &mac));
        let empty = STANDARD.encode(mac::hmac(Hash::Sha256, b"", &[b"body"]));
        assert!(!is_base64_hmac(keys(&[""]), &[b"body"], &empty));
        let hex = hex::encode(mac::hmac(Hash::Sha256, b"new", &[b"body"]));
        assert!(is_hex_hmac(keys(&["new"]), &[b"body"], &hex));
        assert!(!is_hex_hmac(keys(&["new"]), &[b"body"], &hex.to_uppercase()));
    }
}
