//! Who may tell us something. A source is a file here and a line in [`SOURCES`]; carriers, whose URLs we give out, are beside it.

pub mod agent;
pub mod agents;
pub mod carriers;
pub mod elevenlabs;
pub mod leads;
pub mod razorpay;
pub mod retell;
pub mod shopify;
pub mod stripe;
pub mod vapi;
pub mod wire;
pub mod woocommerce;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use shared::{Error, Result, http::Request};
use uuid::Uuid;

/// Every source that is not a carrier: `POST <name>/<source id>`.
pub static SOURCES: &[&dyn Source] = &[
    &agent::Agent,
    &elevenlabs::ElevenLabs,
    &razorpay::Razorpay,
    &retell::Retell,
    &shopify::Shopify,
    &stripe::Stripe,
    &vapi::Vapi,
    &woocommerce::WooCommerce,
];

/// The source of this name.
pub fn find(name: &str) -> Option<&'static dyn Source> {
    SOURCES.iter().copied().find(|source| source.name() == name)
}

/// Bytes of an event at most: the buffer carries it, base64, in one SQS message of at most 1 MiB.
pub const EVENT_LIMIT: usize = 512 * 1024;

/// What a provider's file answers. Nothing here reads a clock, a database or the network, and nothing may panic.
pub trait Source: Sync {
    /// Its name: in the path, in `webhook_sources.provider` and with every stored event.
    fn name(&self) -> &'static str;

    /// The headers that verification and reading need, in lower case.
    fn signed_headers(&self) -> &'static [&'static str];

    /// Whether a header is kept when a request is buffered; once it is `verified`, what is itself a secret need not be.
    fn keeps(&self, header: &str, _verified: bool) -> bool {
        self.signed_headers().contains(&header)
    }

    /// Whether this is what the sender asks when it is set up, unsigned and about nothing: it is answered 200, and nothing is kept.
    fn is_greeting(&self, _request: &Request) -> bool {
        false
    }

    /// Whether the request was signed with a secret of the source, in constant time, at `now_ms` (unix milliseconds).
    fn verify(&self, source: &OpenSource, request: &Request, now_ms: i64) -> bool;

    /// Bytes of a request at most. Beyond [`EVENT_LIMIT`] there may be nothing but what [`Source::set_aside`] takes out.
    fn body_limit(&self) -> usize {
        EVENT_LIMIT
    }

    /// Sound that a verified request carries, and its body without it: the sound goes to Storage, and neither into a row nor on a queue.
    /// The call that [`Source::read`] finds in what is left takes it as its recording.
    fn set_aside(&self, _request: &Request) -> Option<Sound> {
        None
    }

    /// What a verified request tells. An error, or no event at all, is kept as ignored: it is authentic, and we do not understand it.
    fn read(&self, source: &OpenSource, request: &Request) -> Result<Vec<Event>>;

    /// What the sender wants to read in a 2xx answer; nothing when it reads none.
    fn reply(&self, _source: &OpenSource, _request: &Request) -> Option<Value> {
        None
    }

    /// Checks what a user configures. Error 422 that names the setting.
    fn check_settings(&self, settings: &Value) -> Result<()> {
        match settings.as_object() {
            Some(settings) if settings.is_empty() => Ok(()),
            _ => Err(invalid_settings("this source has no settings")),
        }
    }

    /// Checks a secret that a user enters. Error 422.
    fn check_secret(&self, _secret: &str) -> Result<()> {
        Ok(())
    }

    /// A new secret, where it is ours to choose.
    fn new_secret(&self) -> Option<String> {
        None
    }
}

/// 422 for settings that the provider has not.
pub fn invalid_settings(message: impl Into<String>) -> Error {
    Error::new(http::StatusCode::UNPROCESSABLE_ENTITY, "invalid_settings", message).at("settings")
}

/// Sound, and what is left of the body that carried it.
pub struct Sound {
    /// The sound.
    pub audio: Bytes,
    /// The body, which tells of the sound and does not hold it.
    pub rest: Bytes,
}

/// A source with its secrets opened. It has no `Debug`: a log line must not show it.
#[derive(Clone)]
pub struct OpenSource {
    /// Its id: in the path, and the associated data of its sealed secrets.
    pub id: Uuid,
    /// The name of the provider that it belongs to.
    pub provider: String,
    /// Whose it is; `None` is the platform's own.
    pub organization_id: Option<Uuid>,
    /// The store it is for.
    pub store_id: Option<Uuid>,
    /// What the provider was configured with.
    pub settings: Value,
    /// Every secret that is valid now, newest first.
    pub secrets: Vec<String>,
}

impl OpenSource {
    /// The secrets as keys.
    pub fn keys(&self) -> impl Iterator<Item = &[u8]> {
        self.secrets.iter().map(String::as_bytes)
    }

    /// A setting that is text.
    pub fn setting(&self, name: &str) -> Option<&str> {
        self.settings.get(name)?.as_str()
    }
}

/// One event of a request, as `apply_event` takes it.
#[derive(Debug, Clone, Serialize)]
pub struct Event {
    /// The provider's name of it.
    pub kind: String,
    /// The same event again has the same key.
    pub dedupe_key: String,
    /// The attempt, for callbacks whose URL names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attempt_id: Option<Uuid>,
    /// What it means.
    pub payload: Payload,
    /// Words of the provider that map to none of ours: kept as they came, counted and shown.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unmapped: Vec<Unmapped>,
    /// Why it means nothing to us.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

impl Event {
    /// An event with nothing unmapped.
    pub fn new(kind: impl Into<String>, dedupe_key: impl Into<String>, payload: Payload) -> Self {
        let (kind, dedupe_key) = (kind.into(), dedupe_key.into());
        Self { kind, dedupe_key, attempt_id: None, payload, unmapped: Vec::new(), note: None }
    }

    /// What is authentic and not understood, known again by its body.
    pub fn ignored(kind: impl Into<String>, body: &[u8], note: impl Into<String>) -> Self {
        Self { note: Some(note.into()), ..Self::new(kind, digest(body), Payload::Nothing) }
    }
}

/// A word of the provider that maps to none of ours.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Unmapped {
    /// Where it stands.
    pub field: &'static str,
    /// The word.
    pub value: String,
}

/// What an event means: each type is applied by one database function.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Payload {
    /// Nothing to us.
    Nothing,
    /// News of a call, from a carrier: `private.apply_call_event`.
    Call(Box<shared::telephony::CallReport>),
    /// What a voice agent tells of a call: `private.apply_agent_event`.
    Agent(Box<agents::AgentReport>),
    /// News of a store: `private.apply_store_event`.
    Store(Value),
    /// News of a payment: `private.apply_payment_event`.
    Payment(Value),
}

/// The key of an event that has no id of its own.
pub fn digest(body: &[u8]) -> String {
    format!("sha256|{}", hex::encode(Sha256::digest(body)))
}

/// The `apply_event` request of these events.
pub fn apply_request(source: &str, source_id: Uuid, request: &Request, events: &[Event]) -> Value {
    json!({
        "v": 1,
        "source": source,
        "source_id": source_id,
        "verified": true,
        "headers": shared::http::storable_headers(&request.headers),
        "body": String::from_utf8_lossy(&request.body),
        "events": events,
    })
}

/// Takes the NUL characters out: PostgreSQL's text has none, and one of them would keep a whole event from being stored.
pub fn without_nul(value: Value) -> Value {
    const INSTEAD: &str = "\u{fffd}";
    match value {
        Value::String(text) if text.contains('\0') => Value::String(text.replace('\0', INSTEAD)),
        Value::Array(items) => items.into_iter().map(without_nul).collect(),
        Value::Object(map) => {
            map.into_iter().map(|(key, value)| (key.replace('\0', INSTEAD), without_nul(value))).collect()
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_once_each_and_fit_a_path() {
        for (index, source) in SOURCES.iter().enumerate() {
            let name = source.name();
            assert!(
                name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_'),
                "{name}"
            );
            assert!(SOURCES[..index].iter().all(|other| other.name() != name), "{name} is there twice");
            assert!(!["nudge", "sources", "leads", "plivo", "twilio", "telnyx", "vonage"].contains(&name), "{name}");
        }
    }

    #[test]
    fn nul_goes_wherever_it_stands() {
        let value = json!({ "a\0": ["x\0y", { "b": "\0" }], "c": 1 });
        assert_eq!(without_nul(value), json!({ "a\u{fffd}": ["x\u{fffd}y", { "b": "\u{fffd}" }], "c": 1 }));
    }
}
