//! Telnyx: Ed25519 signatures, callbacks of Call Control (JSON) and of TeXML (forms), and TeXML documents.
//!
//! An answer is a document, so that a call that comes too late is hung up without the database: numbers and calls are to be bound to a
//! TeXML application. Call Control's events are understood besides.

pub mod callback;
pub mod signature;

use super::{
    CallbackEvent,
    carrier::{Answer, Callback, Carrier, Credentials, Document, Signed},
    twilio::answer::{self, Dialect},
};

/// The name in paths, tokens and tables.
pub const NAME: &str = "telnyx";

/// Telnyx. Credentials: `public_key`, `previous_public_key` while it is changed, and `api_key`.
#[derive(Debug)]
pub struct Telnyx;

impl Carrier for Telnyx {
    fn name(&self) -> &'static str {
        NAME
    }

    fn signed_headers(&self) -> &'static [&'static str] {
        &["content-type", signature::SIGNATURE, signature::TIMESTAMP]
    }

    fn verify(&self, credentials: &Credentials, signed: &Signed<'_>, now: i64) -> bool {
        signature::verify(credentials, signed, now)
    }

    fn parse(&self, event: CallbackEvent, body: &[u8]) -> Option<Callback> {
        callback::parse(event, body)
    }

    fn answer(&self, answer: &Answer<'_>) -> Document {
        Document { content_type: "application/xml", body: answer::write(answer, Dialect::TeXml) }
    }
}
