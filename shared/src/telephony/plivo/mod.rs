//! Plivo: signature V3, callbacks, answer documents and the call API.
//!
//! Where Plivo's prose and its official SDKs disagree, the SDKs are followed (plivo-python 4.63, plivo-node 4.79).

pub mod answer;
pub mod api;
pub mod callback;
pub mod signature;
pub mod v2;

use super::{
    CallbackEvent,
    carrier::{Answer, Callback, Carrier, Credentials, Document, Signed},
};

/// The name in paths, tokens and tables.
pub const NAME: &str = "plivo";

/// Plivo. Credentials: `auth_token` of the account or subaccount, `main_auth_token` of the main account where it is another.
#[derive(Debug)]
pub struct Plivo;

impl Carrier for Plivo {
    fn name(&self) -> &'static str {
        NAME
    }

    fn signed_headers(&self) -> &'static [&'static str] {
        &["content-type", signature::SIGNATURE, signature::MAIN_ACCOUNT_SIGNATURE, signature::NONCE]
    }

    fn verify(&self, credentials: &Credentials, signed: &Signed<'_>, _: i64) -> bool {
        signature::verify(credentials, signed)
    }

    fn parse(&self, event: CallbackEvent, body: &[u8]) -> Option<Callback> {
        callback::parse(event, body)
    }

    fn answer(&self, answer: &Answer<'_>) -> Document {
        Document { content_type: "application/xml", body: answer::write(answer) }
    }
}
