//! Vonage: webhooks signed by a JWT, callbacks, and NCCO documents.

pub mod answer;
pub mod api;
pub mod callback;
pub mod signature;
pub mod token;

use super::{
    CallbackEvent,
    carrier::{Answer, Callback, Carrier, Credentials, Document, Signed},
};

/// The name in paths, tokens and tables.
pub const NAME: &str = "vonage";

/// Vonage. Credentials: `signature_secret`, `previous_signature_secret` while it is changed, `application_id`, `private_key`, `api_key`.
#[derive(Debug)]
pub struct Vonage;

impl Carrier for Vonage {
    fn name(&self) -> &'static str {
        NAME
    }

    fn signed_headers(&self) -> &'static [&'static str] {
        &["content-type", "authorization"]
    }

    fn verify(&self, credentials: &Credentials, signed: &Signed<'_>, now: i64) -> bool {
        signature::verify(credentials, signed, now)
    }

    fn parse(&self, event: CallbackEvent, body: &[u8]) -> Option<Callback> {
        callback::parse(event, body)
    }

    fn answer(&self, answer: &Answer<'_>) -> Document {
        Document { content_type: "application/json; charset=utf-8", body: answer::write(answer) }
    }
}
