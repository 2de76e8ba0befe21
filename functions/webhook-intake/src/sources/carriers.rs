//! Carriers' callbacks: `POST <carrier>/<event>/<token>`, and calls to our numbers: `POST <carrier>/inbound/<account>`.

use super::{Event, OpenSource, Payload, Unmapped, apply_request, digest};
use serde_json::Value;
use shared::{
    Error, Result,
    config::Config,
    http::Request,
    secrets::Secrets,
    telephony::{
        CallStatus, CallbackEvent,
        carrier::{self, Answer, Carrier, Connect, Credentials, Document, Signed},
        stream_token,
        token::CallbackToken,
    },
};
use uuid::Uuid;

/// How long after a call to us came in its documents may be fetched.
const INBOUND_SECONDS: i64 = 600;

/// A callback as its path names it; the token is not verified yet.
#[derive(Debug, Clone)]
pub struct Callback {
    /// The carrier.
    pub carrier: &'static dyn Carrier,
    /// Which event the URL was made for.
    pub event: CallbackEvent,
    token: String,
}

impl Callback {
    /// Resolves the path. Error 404 for a carrier or event that is not served.
    pub fn of(carrier: &str, event: &str, token: &str) -> Result<Self> {
        let carrier =
            carrier::by_name(carrier).ok_or_else(|| Error::not_found("there is no such carrier").at("carrier"))?;
        let event = event.parse().map_err(|()| Error::not_found("the carrier has no such event").at("event"))?;
        Ok(Self { carrier, event, token: token.to_owned() })
    }

    /// The account of a URL for calls to us, which has no token: the carrier's signature says enough.
    pub fn account(&self) -> Result<Uuid> {
        self.token.parse().map_err(|_| Error::bad_signature().at("account"))
    }

    /// Verifies the token in the path. Error 403 when it was not made with a key of ours for this carrier and event.
    pub fn open(&self, secrets: &Secrets) -> Result<CallbackToken> {
        CallbackToken::decode(&self.token, &secrets.callback_keys, self.carrier.name(), self.event).ok_or_else(|| {
            let mut error = Error::bad_signature().at("token");
            error.code = "bad_token".to_owned();
            error.message = "the callback URL's token is not one that was given out".to_owned();
            error
        })
    }

    /// Whether the carrier's own signature over the request is right, at `now` in unix seconds. The URL is the configured one with the
    /// raw path and query: what a proxy says of the host is not asked.
    pub fn is_signed(&self, account: &OpenSource, origin: &str, request: &Request, now: i64) -> bool {
        let query = if request.query.is_empty() { String::new() } else { format!("?{}", request.query) };
        let url = format!("{origin}{}{query}", request.path);
        let signed = Signed { method: &request.method, url: &url, headers: &request.headers, body: &request.body };
        account.secrets.iter().any(|opened| self.carrier.verify(&Credentials::read(opened), &signed, now))
    }

    /// The `apply_event` request of a verified callback. What names no call is kept as ignored.
    pub fn event_of(&self, account: Uuid, attempt: Option<Uuid>, request: &Request) -> Value {
        let event = match self.carrier.parse(self.event, &request.body) {
            Some(mut callback) => {
                let unmapped = callback.report.unmapped.take();
                let mut event =
                    Event::new(self.event.as_str(), callback.dedupe_key, Payload::Call(Box::new(callback.report)));
                event.unmapped.extend(unmapped.map(|(field, value)| Unmapped { field, value }));
                event
            }
            None => Event {
                note: Some("it names no call".to_owned()),
                ..Event::new(self.event.as_str(), digest(&request.body), Payload::Call(Box::default()))
            },
        };
        apply_request(self.carrier.name(), account, request, &[Event { attempt_id: attempt, ..event }])
    }

    /// Whether the carrier wants a document for an answer.
    pub fn wants_document(&self, request: &Request) -> bool {
        self.carrier.parse(self.event, &request.body).is_some_and(|callback| callback.wants_document)
    }

    /// The document for an answered call, from the URL alone: the agent's stream, or a hang-up when the call may no longer go on,
    /// no agent is configured, or the "answer" is the news that it ended.
    pub fn answer_document(
        &self,
        token: &CallbackToken,
        request: &Request,
        secrets: &Secrets,
        config: &Config,
        now: i64,
    ) -> Document {
        let told = self.carrier.parse(self.event, &request.body);
        if told.is_some_and(|callback| callback.report.status == Some(CallStatus::Ended)) {
            return self.carrier.answer(&Answer::Nothing);
        }
        self.connect(token, secrets, config, now)
    }

    /// The document for a call to us that was taken down as this attempt.
    pub fn inbound_document(&self, opened: &Opened, secrets: &Secrets, config: &Config, now: i64) -> Document {
        let token = CallbackToken {
            attempt_id: opened.attempt_id,
            carrier_account_id: opened.carrier_account_id,
            record: opened.record,
            not_after: now + INBOUND_SECONDS,
            agent_id: opened.agent_id.unwrap_or_default(),
        };
        if secrets.callback_keys.is_empty() {
            return self.sorry();
        }
        self.connect(&token, secrets, config, now)
    }

    /// The document for a call to us that cannot be taken.
    pub fn sorry(&self) -> Document {
        self.carrier.answer(&Answer::Sorry)
    }

    /// The document for a callback that wants none.
    pub fn nothing(&self) -> Document {
        self.carrier.answer(&Answer::Nothing)
    }

    fn connect(&self, token: &CallbackToken, secrets: &Secrets, config: &Config, now: i64) -> Document {
        let agent_id = token.agent_id.to_string();
        let until = now + stream_token::GOOD_FOR_SECONDS;
        let stream = stream_token::sign(&secrets.callback_keys, token.agent_id, token.attempt_id, until);
        let origin = config.agent_origin(&agent_id).filter(|_| now <= token.not_after);
        let Some((agent, stream)) = origin.zip(stream) else {
            return self.carrier.answer(&Answer::Hangup);
        };
        let callback = |event: CallbackEvent| {
            let token = token.encode(&secrets.callback_keys, self.carrier.name(), event)?;
            let (origin, carrier) = (&config.public_origin, self.carrier.name());
            Some(format!("{origin}/functions/v1/webhook-intake/{carrier}/{}/{token}", event.as_str()))
        };
        let url = format!("{}/stream/{}/{stream}", agent.trim_end_matches('/'), token.attempt_id);
        let stream_callback = callback(CallbackEvent::Stream);
        let recording_callback = token.record.then(|| callback(CallbackEvent::Recording)).flatten();
        self.carrier.answer(&Answer::Connect(Connect {
            url: &url,
            stream_callback: stream_callback.as_deref(),
            recording_callback: recording_callback.as_deref(),
            ..Connect::default()
        }))
    }
}

/// What `open_inbound_call` says of a call to one of our numbers.
#[derive(Debug, Clone, serde::Deserialize)]
pub struct Opened {
    /// The leg's row.
    pub attempt_id: Uuid,
    /// The account that it came in on.
    pub carrier_account_id: Uuid,
    /// The voice agent that takes it; none is the default one.
    #[serde(default)]
    pub agent_id: Option<Uuid>,
    /// Whether it may be recorded.
    #[serde(default)]
    pub record: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use http::{HeaderMap, Method};
    use shared::secrets::NumberedKey;

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

    fn request(body: &str) -> Request {
        Request {
            method: Method::POST,
            path: String::new(),
            query: String::new(),
            headers: HeaderMap::new(),
            body: Bytes::copy_from_slice(body.as_bytes()),
        }
    }

    fn token(record: bool) -> CallbackToken {
        CallbackToken {
            attempt_id: Uuid::from_u128(1),
            carrier_account_id: Uuid::from_u128(2),
            record,
            not_after: 100,
            agent_id: Uuid::from_u128(3),
        }
    }

    fn document(carrier: &str, record: bool, now: i64, agents: &str, body: &str) -> String {
        let token = token(record);
        let text = token.encode(&secrets().callback_keys, carrier, CallbackEvent::Answer).unwrap();
        let callback = Callback::of(carrier, "answer", &text).unwrap();
        callback.answer_document(&token, &request(body), &secrets(), &config(agents), now).body
    }

    const AGENT: &str = r#"{"default":"wss://voice.example.com"}"#;
    /// Each carrier's answer, the news that the call ended in its place, and how it is hung up.
    const CARRIERS: [(&str, &str, &str, &str); 4] = [
        ("plivo", "CallUUID=u&Event=StartApp", "CallUUID=u&Event=Hangup", "<Hangup/>"),
        ("twilio", "CallSid=u&CallStatus=in-progress", "CallSid=u&CallStatus=completed", "<Hangup />"),
        ("telnyx", "CallSid=u&CallStatus=in-progress", "CallSid=u&CallStatus=completed", "<Hangup />"),
        ("vonage", r#"{"uuid":"u","from":"1"}"#, r#"{"uuid":"u","status":"completed"}"#, "[]"),
    ];

    #[test]
    fn an_answer_connects_the_agent_and_its_callbacks() {
        for (carrier, answer, _, _) in CARRIERS {
            let document = document(carrier, true, 100, AGENT, answer);
            assert!(
                document.contains("wss://voice.example.com/stream/00000000-0000-0000-0000-000000000001/"),
                "{document}"
            );
            assert!(document.contains(&format!("/webhook-intake/{carrier}/stream/")), "{document}");
            let (_, rest) = document.split_once("/stream/00000000-0000-0000-0000-000000000001/").unwrap();
            let stream = rest.split(['<', '"']).next().unwrap();
            let until = stream_token::read(&secrets().callback_keys, Uuid::from_u128(1), stream);
            assert_eq!(until, Some(100 + stream_token::GOOD_FOR_SECONDS), "{document}");
        }
    }

    #[test]
    fn a_call_is_recorded_only_where_it_may() {
        for (carrier, answer, ..) in CARRIERS.into_iter().filter(|(carrier, ..)| ["plivo", "vonage"].contains(carrier))
        {
            let recording = format!("/webhook-intake/{carrier}/recording/");
            assert!(document(carrier, true, 100, AGENT, answer).contains(&recording), "{carrier}");
            assert!(!document(carrier, false, 100, AGENT, answer).contains(&recording), "{carrier}");
        }
    }

    #[test]
    fn an_answer_too_late_or_without_an_agent_hangs_up() {
        for (carrier, answer, _, hangup) in CARRIERS {
            for (now, agents) in [(101, AGENT), (100, "{}")] {
                let document = document(carrier, true, now, agents, answer);
                assert!(document.contains(hangup) && !document.contains("wss://"), "{document}");
            }
        }
    }

    #[test]
    fn a_hangup_sent_to_the_answer_url_gets_no_stream() {
        for (carrier, _, ended, _) in CARRIERS {
            let document = document(carrier, true, 100, AGENT, ended);
            assert!(!document.contains("wss://"), "{document}");
        }
        assert_eq!(document("plivo", true, 100, AGENT, "CallUUID=u&Event=Hangup"), "<Response/>");
    }

    #[test]
    fn a_call_to_us_gets_callbacks_of_its_own() {
        let opened = Opened {
            attempt_id: Uuid::from_u128(9),
            carrier_account_id: Uuid::from_u128(2),
            agent_id: None,
            record: true,
        };
        for (carrier, ..) in CARRIERS {
            let callback = Callback::of(carrier, "inbound", "00000000-0000-0000-0000-000000000002").unwrap();
            assert_eq!(callback.account().unwrap(), Uuid::from_u128(2));
            let document = callback.inbound_document(&opened, &secrets(), &config(AGENT), 1_000).body;
            let (_, rest) = document.split_once(&format!("/webhook-intake/{carrier}/stream/")).unwrap();
            let text = &rest[..rest.find(|c: char| !(c.is_ascii_alphanumeric() || "._-".contains(c))).unwrap()];
            let token = CallbackToken::decode(text, &secrets().callback_keys, carrier, CallbackEvent::Stream).unwrap();
            assert_eq!((token.attempt_id, token.not_after), (Uuid::from_u128(9), 1_600));
        }
    }

    #[test]
    fn what_has_no_name_is_told_beside_the_call() {
        let callback = Callback::of("plivo", "hangup", "t").unwrap();
        let event = callback.event_of(
            Uuid::nil(),
            None,
            &request("CallUUID=u&CallStatus=failed&HangupCauseCode=4242&Event=Hangup"),
        );
        let event = &event["events"][0];
        assert_eq!(event["unmapped"], serde_json::json!([{ "field": "HangupCauseCode", "value": "4242" }]));
        assert_eq!((&event["payload"]["type"], &event["payload"]["outcome"]), (&"call".into(), &"failed".into()));
    }

    #[test]
    fn what_is_not_served_is_404() {
        for (carrier, event) in [("plivoo", "ring"), ("plivo", "rang")] {
            assert_eq!(Callback::of(carrier, event, "t").unwrap_err().status, 404);
        }
    }
}
