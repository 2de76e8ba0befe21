//! Carriers' callbacks: `POST <carrier>/<event>/<token>`.

use http::{HeaderMap, Method};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use shared::{
    Error, Result,
    http::{Request, storable_headers},
    secrets::Secrets,
    telephony::{
        CallStatus, CallbackEvent,
        plivo::{self, answer::Stream},
        token::CallbackToken,
    },
};

/// A callback as its path names it; the token is not verified yet.
#[derive(Debug, Clone)]
pub struct Callback {
    /// The carrier's name.
    pub carrier: &'static str,
    /// Which event the URL was made for.
    pub event: CallbackEvent,
    token: String,
}

impl Callback {
    /// Resolves the path. Error 404 for a carrier or event that is not served.
    pub fn of(carrier: &str, event: &str, token: &str) -> Result<Self> {
        if carrier != plivo::NAME {
            return Err(Error::not_found("there is no such carrier").at("carrier"));
        }
        let event = event.parse().map_err(|()| Error::not_found("the carrier has no such event").at("event"))?;
        Ok(Self { carrier: plivo::NAME, event, token: token.to_owned() })
    }

    /// Verifies the token in the path. Error 403 when it was not made with a key of ours for this carrier and event.
    pub fn open(&self, secrets: &Secrets) -> Result<CallbackToken> {
        CallbackToken::decode(&self.token, &secrets.callback_keys, self.carrier, self.event).ok_or_else(|| {
            let mut error = Error::bad_signature().at("token");
            error.code = "bad_token".to_owned();
            error.message = "the callback URL's token is not one that was given out".to_owned();
            error
        })
    }

    /// Whether the carrier's own signature over the request is right.
    pub fn is_signed(&self, auth_token: String, origin: &str, request: &Request) -> bool {
        let query = if request.query.is_empty() { String::new() } else { format!("?{}", request.query) };
        let url = format!("{origin}{}{query}", request.path);
        plivo::signature::verify(&[auth_token], &request.method, &url, &request.form(), &request.headers)
    }

    /// The `apply_event` request of a verified callback. What names no call has `call: null` and is kept as ignored.
    pub fn event_of(
        &self,
        token: &CallbackToken,
        headers: &HeaderMap,
        form: &[(String, String)],
        body: &[u8],
    ) -> Value {
        let parsed = plivo::callback::parse(self.event, form);
        let dedupe_key = match &parsed {
            Some(callback) => callback.dedupe_key.clone(),
            None => format!("sha256|{}", hex::encode(Sha256::digest(body))),
        };
        json!({
            "v": 1,
            "source": self.carrier,
            "source_id": token.carrier_account_id,
            "kind": self.event.as_str(),
            "attempt_id": token.attempt_id,
            "dedupe_key": dedupe_key,
            "verified": true,
            "headers": storable_headers(headers),
            "body": String::from_utf8_lossy(body),
            "call": parsed.map(|callback| callback.report),
        })
    }

    /// The document for an answered call, from the URL alone: the agent's stream, or a hang-up when the call may no longer go on,
    /// no agent is configured, or the "answer" is the news that it ended.
    pub fn answer_document(
        &self,
        token: &CallbackToken,
        form: &[(String, String)],
        secrets: &Secrets,
        config: &shared::config::Config,
        now: i64,
    ) -> String {
        let ended = plivo::callback::parse(self.event, form)
            .is_some_and(|callback| callback.report.status == Some(CallStatus::Ended));
        if ended {
            return plivo::answer::nothing();
        }
        let agent_id = token.agent_id.to_string();
        let Some(agent) = config.agent_origin(&agent_id).filter(|_| now <= token.not_after) else {
            return plivo::answer::hangup();
        };
        let recording = token
            .record
            .then(|| token.encode(&secrets.callback_keys, self.carrier, CallbackEvent::Recording))
            .flatten()
            .map(|token| {
                format!("{}/functions/v1/webhook-intake/{}/recording/{token}", config.public_origin, self.carrier)
            });
        let url = format!("{}/stream/{}/{}", agent.trim_end_matches('/'), token.attempt_id, self.token);
        plivo::answer::connect(&Stream { url: &url, recording_callback: recording.as_deref() })
    }
}

/// Headers that a verification needs again when a buffered request is drained.
pub const SIGNED_HEADERS: [&str; 4] =
    ["content-type", "x-plivo-signature-v3", "x-plivo-signature-ma-v3", "x-plivo-signature-v3-nonce"];

/// Only POST carries the parameters in the signed body.
pub const METHOD: Method = Method::POST;

#[cfg(test)]
mod tests {
    use super::*;
    use shared::{config::Config, secrets::NumberedKey};
    use uuid::Uuid;

    fn secrets() -> Secrets {
        Secrets {
            supabase_secret_key: String::new(),
            callback_keys: vec![NumberedKey { id: 1, key: vec![7; 32] }],
            seal_keys: vec![],
            nudge_keys: vec![],
        }
    }

    fn config(agents: &str) -> Config {
        Config::from_vars(
            [
                ("SUPABASE_URL", "https://p.supabase.co"),
                ("SUPABASE_PUBLISHABLE_KEY", "k"),
                ("PUBLIC_ORIGIN", "https://api.example.com"),
                ("SECRET_ARN", "arn"),
                ("AGENT_ORIGINS", agents),
            ]
            .map(|(k, v)| (k.to_owned(), v.to_owned())),
        )
        .unwrap()
    }

    fn document(record: bool, now: i64, agents: &str, event: &str) -> String {
        let token = CallbackToken {
            attempt_id: Uuid::from_u128(1),
            carrier_account_id: Uuid::from_u128(2),
            record,
            not_after: 100,
            agent_id: Uuid::from_u128(3),
        };
        let text = token.encode(&secrets().callback_keys, "plivo", CallbackEvent::Answer).unwrap();
        let form = vec![("CallUUID".to_owned(), "u".to_owned()), ("Event".to_owned(), event.to_owned())];
        Callback::of("plivo", "answer", &text).unwrap().answer_document(&token, &form, &secrets(), &config(agents), now)
    }

    const AGENT: &str = r#"{"default":"wss://voice.example.com"}"#;

    #[test]
    fn an_answer_connects_the_agent_and_records_only_where_it_may() {
        let recorded = document(true, 100, AGENT, "StartApp");
        assert!(recorded.contains("wss://voice.example.com/stream/00000000-0000-0000-0000-000000000001/"));
        assert!(recorded.contains("/webhook-intake/plivo/recording/"));
        assert!(!document(false, 100, AGENT, "StartApp").contains("<Record"));
    }

    #[test]
    fn an_answer_too_late_or_without_an_agent_hangs_up() {
        assert!(document(true, 101, AGENT, "StartApp").contains("<Hangup/>"));
        assert!(document(true, 100, "{}", "StartApp").contains("<Hangup/>"));
    }

    #[test]
    fn a_hangup_sent_to_the_answer_url_gets_no_stream() {
        assert_eq!(document(true, 100, AGENT, "Hangup"), "<Response/>");
    }

    #[test]
    fn what_is_not_served_is_404() {
        for (carrier, event) in [("plivoo", "ring"), ("plivo", "rang")] {
            assert_eq!(Callback::of(carrier, event, "t").unwrap_err().status, 404);
        }
    }
}
