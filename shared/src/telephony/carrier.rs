//! What a carrier is to the rest of Trunkline: whose signature it is, what a callback says, and what a call is told to do.
//!
//! Each carrier is a folder beside this file and a line in [`ALL`]. Everything here is pure: no I/O, no clock, no panic.

use super::{CallReport, CallbackEvent, api::Api, plivo, telnyx, twilio, vonage};
use http::{HeaderMap, Method};
use serde_json::{Map, Value};
use std::fmt;

/// The carriers, one a line.
pub const ALL: [&dyn Carrier; 4] = [&plivo::Plivo, &twilio::Twilio, &telnyx::Telnyx, &vonage::Vonage];

/// The carrier of a name, as paths, tokens and tables have it.
pub fn by_name(name: &str) -> Option<&'static dyn Carrier> {
    ALL.into_iter().find(|carrier| carrier.name() == name)
}

/// A carrier's protocol: its callbacks and documents, and its [`Api`].
pub trait Carrier: Api + Sync + fmt::Debug {
    /// The name in paths, tokens and tables.
    fn name(&self) -> &'static str;

    /// The headers, in lower case, that a verification needs: they are kept when a request is buffered.
    fn signed_headers(&self) -> &'static [&'static str];

    /// Whether the request was signed with any of the secrets that are valid now. `now` is in Unix seconds.
    fn verify(&self, credentials: &Credentials, signed: &Signed<'_>, now: i64) -> bool;

    /// Reads a callback that came to the URL of `event`. `None` when it is none: it names neither a call nor anything known.
    fn parse(&self, event: CallbackEvent, body: &[u8]) -> Option<Callback>;

    /// Writes the document that tells a call what to do.
    fn answer(&self, answer: &Answer<'_>) -> Document;
}

/// A carrier account's secrets, opened: a JSON object whose keys each carrier names, or a bare auth token.
#[derive(Clone)]
pub struct Credentials(Map<String, Value>);

impl Credentials {
    /// Reads what was sealed.
    pub fn read(opened: &str) -> Self {
        match serde_json::from_str(opened) {
            Ok(Value::Object(map)) => Self(map),
            _ => Self(Map::from_iter([("auth_token".to_owned(), Value::from(opened))])),
        }
    }

    /// A secret; `None` where there is none, or it is empty: an empty key would sign for anybody.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).and_then(Value::as_str).filter(|secret| !secret.is_empty())
    }

    /// A group of settings, as Twilio's `shared_key`; `None` where there is none.
    pub fn group(&self, name: &str) -> Option<Self> {
        match self.0.get(name)? {
            Value::Object(map) => Some(Self(map.clone())),
            _ => None,
        }
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// What a signature is made over.
#[derive(Debug, Clone, Copy)]
pub struct Signed<'a> {
    /// The method.
    pub method: &'a Method,
    /// The URL as the carrier dialled it: configured origin, raw path, raw query.
    pub url: &'a str,
    /// The headers.
    pub headers: &'a HeaderMap,
    /// The raw body.
    pub body: &'a [u8],
}

impl Signed<'_> {
    /// A header as text; empty where there is none.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// Whether the body is a form.
    pub fn is_form(&self) -> bool {
        let content_type = self.header("content-type").split(';').next().unwrap_or_default();
        content_type.trim().eq_ignore_ascii_case("application/x-www-form-urlencoded")
    }

    /// The decoded pairs of a form body in the order they came.
    pub fn form(&self) -> Vec<(String, String)> {
        form_urlencoded::parse(self.body).into_owned().collect()
    }
}

/// What a callback tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Callback {
    /// The key under which a repeated delivery is known: what it is about, not its signature.
    pub dedupe_key: String,
    /// What it tells of the call.
    pub report: CallReport,
    /// Whether the carrier wants a document for an answer, and not only a 2xx.
    pub wants_document: bool,
}

/// What a call is told to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer<'a> {
    /// Talk to the voice agent.
    Connect(Connect<'a>),
    /// Talk to a person.
    Dial(Dial<'a>),
    /// Hear that the call cannot be taken, and hang up.
    Sorry,
    /// Hang up.
    Hangup,
    /// Do not even answer.
    Reject(Rejection),
    /// Nothing: the acknowledgement of a callback that wants no document.
    Nothing,
}

/// Said before a hang-up that the caller did not expect.
pub const SORRY: &str = "Sorry, we cannot take your call right now. Please try again later.";

/// The voice agent that a call is connected to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Connect<'a> {
    /// `wss://` URL of the voice agent, at most 2,048 characters, without a query: Twilio strips it.
    pub url: &'a str,
    /// Names and values that the agent gets beside the URL; no secrets, carriers log them.
    pub parameters: &'a [(&'a str, &'a str)],
    /// Where the stream's steps are reported.
    pub stream_callback: Option<&'a str>,
    /// Where the recording is reported; `None` when the call is not recorded.
    pub recording_callback: Option<&'a str>,
    /// What is asked for when the stream is over, where the carrier asks.
    pub after: Option<&'a str>,
}

/// A person whom a call is transferred to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dial<'a> {
    /// E.164.
    pub to: &'a str,
    /// Shown to the person, E.164.
    pub caller_id: &'a str,
    /// Seconds of ringing at most.
    pub timeout: u32,
    /// Seconds of talk at most.
    pub time_limit: u32,
    /// Told how the transfer ended.
    pub action: Option<&'a str>,
    /// Told each step of the person's leg.
    pub leg_callback: Option<&'a str>,
    /// Where the recording of the two is reported; `None` when it is not recorded.
    pub recording_callback: Option<&'a str>,
}

/// Why a call is not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rejection {
    /// We do not want it.
    Rejected,
    /// The line is busy.
    Busy,
}

impl Rejection {
    /// The carriers' word.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Rejected => "rejected",
            Self::Busy => "busy",
        }
    }
}

/// A document and its content type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// `Content-Type`.
    pub content_type: &'static str,
    /// The body.
    pub body: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_carrier_is_found_by_its_name() {
        for carrier in ALL {
            assert_eq!(by_name(carrier.name()).map(Carrier::name), Some(carrier.name()));
        }
        assert!(by_name("plivoo").is_none());
    }

    #[test]
    fn a_bare_secret_is_an_auth_token_and_none_is_shown() {
        let bare = Credentials::read("s3cret");
        assert_eq!((bare.get("auth_token"), bare.get("main_auth_token")), (Some("s3cret"), None));
        let object = Credentials::read(r#"{"auth_token":"s3cret","main_auth_token":""}"#);
        assert_eq!((object.get("auth_token"), object.get("main_auth_token")), (Some("s3cret"), None));
        // A token of digits is JSON too, and still a token.
        assert_eq!(Credentials::read("12345").get("auth_token"), Some("12345"));
        assert!(!format!("{object:?}").contains("s3cret"));
    }

    #[test]
    fn text_never_becomes_markup() {
        let url = "wss://x/<Hangup/>&\"'";
        for carrier in ALL {
            let document = carrier.answer(&Answer::Connect(Connect { url, ..Connect::default() })).body;
            assert!(!document.contains("<Hangup/>") || carrier.name() == "vonage", "{document}");
        }
    }

    #[test]
    fn a_call_that_is_hung_up_hears_no_agent() {
        for carrier in ALL {
            for answer in [Answer::Hangup, Answer::Sorry, Answer::Nothing, Answer::Reject(Rejection::Busy)] {
                let document = carrier.answer(&answer);
                assert!(!document.body.contains("tream") && !document.body.contains("connect"), "{document:?}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
        #[test]
        fn no_body_panics_any_parser(which in 0usize..4, event in 0usize..CallbackEvent::ALL.len(), body in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = ALL[which].parse(CallbackEvent::ALL[event], &body);
        }

        #[test]
        fn no_request_panics_any_verifier(
            which in 0usize..4, url in ".{0,60}", body in prop::collection::vec(any::<u8>(), 0..60),
            secret in ".{1,40}", signature in "[ -~]{0,80}", now in any::<i64>(), timestamp in "[0-9a-z+-]{0,20}",
        ) {
            let mut headers = HeaderMap::new();
            for name in ALL[which].signed_headers() {
                let value = if name.contains("timestamp") { &timestamp } else { &signature };
                if let Ok(value) = http::HeaderValue::from_str(value) {
                    headers.insert(*name, value);
                }
            }
            let credentials = Credentials(["auth_token", "public_key", "signature_secret"].map(|name| (name.to_owned(), Value::from(secret.clone()))).into_iter().collect());
            let signed = Signed { method: &Method::POST, url: &url, headers: &headers, body: &body };
            prop_assert!(!ALL[which].verify(&credentials, &signed, now));
        }
    }
}

/// Requests of test vectors, and how they are tampered with.
#[cfg(test)]
pub(super) mod vectors {
    use super::Signed;
    use http::{HeaderMap, HeaderName, HeaderValue, Method};
    use proptest::sample::Index;
    use serde_json::Value;

    pub fn read(file: &str) -> Vec<Value> {
        serde_json::from_str(file).unwrap()
    }

    pub fn find(file: &str, id: &str) -> Value {
        read(file).into_iter().find(|vector| vector["id"] == id).unwrap()
    }

    pub fn text<'v>(vector: &'v Value, key: &str) -> &'v str {
        vector[key].as_str().unwrap_or_default()
    }

    #[derive(Debug, Clone)]
    pub struct Case {
        pub method: Method,
        pub url: String,
        pub headers: HeaderMap,
        pub body: Vec<u8>,
    }

    impl Case {
        pub fn of(vector: &Value) -> Self {
            let headers = vector["headers"].as_object().unwrap().iter();
            let headers = headers.map(|(name, value)| {
                (HeaderName::try_from(name).unwrap(), HeaderValue::from_str(value.as_str().unwrap()).unwrap())
            });
            Self {
                method: text(vector, "method").parse().unwrap(),
                url: text(vector, "url").to_owned(),
                headers: headers.collect(),
                body: text(vector, "body").as_bytes().to_vec(),
            }
        }

        pub fn post(url: &str, content_type: &str, body: &str) -> Self {
            let mut case = Self {
                method: Method::POST,
                url: url.to_owned(),
                headers: HeaderMap::new(),
                body: body.as_bytes().to_vec(),
            };
            case.set("content-type", content_type);
            case
        }

        pub fn set(&mut self, name: &'static str, value: &str) {
            self.headers.insert(name, value.parse().unwrap());
        }

        pub fn signed(&self) -> Signed<'_> {
            Signed { method: &self.method, url: &self.url, headers: &self.headers, body: &self.body }
        }

        /// Flips a bit; false where the result is no URL that could arrive.
        pub fn flip_url(&mut self, at: Index, bit: u8) -> bool {
            let mut bytes = self.url.clone().into_bytes();
            flip(&mut bytes, at, bit);
            match String::from_utf8(bytes) {
                Ok(url) => self.url = url,
                Err(_) => return false,
            }
            true
        }

        pub fn flip_body(&mut self, at: Index, bit: u8) -> bool {
            flip(&mut self.body, at, bit);
            true
        }

        /// Flips a bit; false where the result is no header that could arrive.
        pub fn flip_header(&mut self, name: &'static str, at: Index, bit: u8) -> bool {
            let mut bytes = self.headers[name].as_bytes().to_vec();
            flip(&mut bytes, at, bit);
            match HeaderValue::from_bytes(&bytes) {
                Ok(value) => self.headers.insert(name, value).is_some(),
                Err(_) => false,
            }
        }
    }

    fn flip(bytes: &mut [u8], at: Index, bit: u8) {
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
    }
}
