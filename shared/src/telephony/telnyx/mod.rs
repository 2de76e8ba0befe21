//! Telnyx: Ed25519 signatures, callbacks of Call Control (JSON) and of TeXML (forms), and TeXML documents.
//!
//! Numbers are to be bound to a TeXML application, so that the answer to a call to us is a document. Calls of ours are made by Call
//! Control, which knows a request that comes twice, and carry their agent with them.

pub mod api;
pub mod callback;
pub mod signature;

use super::{
    CallbackEvent,
    carrier::{Answer, Callback, Carrier, Credentials, Document, Signed},
    twilio::answer::{self, Dialect},
};

/// The name in paths, tokens and tables.
pub const NAME: &str = "telnyx";

/// Telnyx. Credentials: `public_key`, `previous_public_key` while it is changed, `api_key`, and `connection_id` where the account is not
/// named by it.
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
