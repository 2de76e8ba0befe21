//! Twilio: signatures (SHA-1, and shared keys), callbacks and TwiML, as twilio-python 9.13 and twilio-node 6.2 have them.

pub mod answer;
pub mod api;
pub mod callback;
pub mod signature;

use super::{
    CallbackEvent,
    carrier::{Answer, Callback, Carrier, Credentials, Document, Signed},
};

/// The name in paths, tokens and tables.
pub const NAME: &str = "twilio";

/// Twilio. Credentials: `auth_token`, `previous_auth_token` while the primary token is changed, and `shared_key`
/// (`key`, `algorithm`, `id`) where the account signs with one: then nothing else is accepted. Calls are made with `api_key` and
/// `api_secret`, or else with the token.
#[derive(Debug)]
pub struct Twilio;

impl Carrier for Twilio {
    fn name(&self) -> &'static str {
        NAME
    }

    fn signed_headers(&self) -> &'static [&'static str] {
        &["content-type", signature::SIGNATURE, signature::SETTINGS]
    }

    fn verify(&self, credentials: &Credentials, signed: &Signed<'_>, _: i64) -> bool {
        signature::verify(credentials, signed)
    }

    fn parse(&self, event: CallbackEvent, body: &[u8]) -> Option<Callback> {
        callback::parse(event, body)
    }

    fn answer(&self, answer: &Answer<'_>) -> Document {
        Document { content_type: "text/xml", body: answer::write(answer, answer::Dialect::TwiMl) }
    }
}
