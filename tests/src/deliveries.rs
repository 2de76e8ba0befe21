//! What each carrier sends, as it was recorded, signed as that carrier signs: for a call of one's own choice.
//!
//! The signatures are made here by other code than verifies them, so that a mistake in one is not repeated in the other.

use crate::{Stack, events::HttpEvent, stack::PUBLIC_ORIGIN};
use anyhow::{Context, Result, bail};
use base64::{Engine, engine::general_purpose::STANDARD};
use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use ed25519_dalek::{Signer, SigningKey};
use hmac::{Hmac, KeyInit, Mac};
use local::parts::folder;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use sha1::Sha1;
use sha2::{Digest, Sha256};
use shared::{
    seal::Sealer,
    telephony::{CallbackEvent, token::CallbackToken},
};
use std::collections::BTreeSet;
use uuid::Uuid;

/// The carriers that there are.
pub const CARRIERS: [&str; 4] = ["plivo", "twilio", "telnyx", "vonage"];
/// The application of Vonage's account.
const APPLICATION: &str = "aaaaaaaa-bbbb-cccc-dddd-0123456789ab";

/// A recorded delivery. In its texts `{call}`, `{from}`, `{+from}`, `{to}` and `{+to}` stand for the call's own, and `{iso:-37}` and
/// `{rfc2822:-37}` for a time so many seconds from now.
#[derive(Debug, Clone, Deserialize)]
pub struct Delivery {
    /// What it is.
    pub name: String,
    /// The event of the URL that it goes to.
    pub event: String,
    /// Whether it belongs to the life of an answered call, told in this order.
    pub life: bool,
    /// The parameters of a form.
    #[serde(default)]
    pub form: Option<Map<String, Value>>,
    /// A JSON body.
    #[serde(default)]
    pub json: Option<Value>,
    /// What the call's row says afterwards.
    pub expect: Map<String, Value>,
}

/// The recorded deliveries of a carrier.
pub fn recorded(carrier: &str) -> Result<Vec<Delivery>> {
    let path = folder::workspace()?.join(format!("tests/fixtures/deliveries/{carrier}.json"));
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    serde_json::from_str(&text).with_context(|| path.display().to_string())
}

/// An account with a carrier, in the database, and what it signs with.
#[derive(Debug, Clone)]
pub struct Account {
    /// The carrier.
    pub carrier: &'static str,
    /// Its row.
    pub id: Uuid,
    secret: String,
}

/// A call that the carrier knows by `sid` and we by `attempt`.
#[derive(Debug, Clone)]
pub struct Call {
    /// The attempt; none for a call to one of our numbers.
    pub attempt: Option<Uuid>,
    /// The carrier's id of it.
    pub sid: String,
    /// Caller, E.164, or anonymous.
    pub from: String,
    /// Callee, E.164.
    pub to: String,
}

impl Call {
    /// A text with this call's own in its places, at a moment.
    fn fill(&self, text: &str, now: DateTime<Utc>) -> String {
        let mut filled = text
            .replace("{call}", &self.sid)
            .replace("{+from}", &self.from)
            .replace("{+to}", &self.to)
            .replace("{from}", self.from.trim_start_matches('+'))
            .replace("{to}", self.to.trim_start_matches('+'));
        for kind in ["iso", "rfc2822"] {
            while let Some((before, rest)) = filled.split_once(&format!("{{{kind}:")) {
                let (seconds, after) = rest.split_once('}').unwrap_or((rest, ""));
                let at = now + TimeDelta::seconds(seconds.parse().unwrap_or_default());
                let at = if kind == "iso" { at.to_rfc3339_opts(SecondsFormat::Micros, true) } else { at.to_rfc2822() };
                filled = format!("{before}{at}{after}");
            }
        }
        filled
    }

    /// A value with this call's own in the places of all its texts, at one moment.
    pub fn fill_all(&self, value: &Value) -> Value {
        self.fill_at(value, Utc::now())
    }

    fn fill_at(&self, value: &Value, now: DateTime<Utc>) -> Value {
        match value {
            Value::String(text) => Value::String(self.fill(text, now)),
            Value::Array(items) => items.iter().map(|item| self.fill_at(item, now)).collect(),
            Value::Object(map) => map.iter().map(|(key, value)| (key.clone(), self.fill_at(value, now))).collect(),
            other => other.clone(),
        }
    }
}

impl Account {
    /// An account that is in no database.
    pub fn new(carrier: &'static str) -> Self {
        Self { carrier, id: Uuid::new_v4(), secret: Uuid::new_v4().simple().to_string() }
    }

    /// An account of the platform's with a carrier.
    pub async fn create(stack: &Stack, carrier: &'static str) -> Result<Self> {
        let account = Self::new(carrier);
        let id = account.id;
        let sealed = Sealer::new(&stack.keys.secrets()?.seal_keys)?.seal(&account.credentials(), &id.to_string())?;
        stack
            .sql
            .execute(
                "insert into public.carrier_accounts (id, provider, account_sid, credentials_sealed, api_base) \
                 values ($1, $2::text::public.carrier_provider, $3, $4, 'https://carrier.example.com')",
                &[&id, &carrier, &id.simple().to_string(), &sealed],
            )
            .await?;
        Ok(account)
    }

    /// What is sealed for it.
    pub fn credentials(&self) -> String {
        match self.carrier {
            "telnyx" => {
                json!({ "public_key": STANDARD.encode(self.telnyx_key().verifying_key().as_bytes()), "api_key": "k" })
            }
            "vonage" => json!({ "signature_secret": self.secret, "application_id": APPLICATION }),
            _ => json!({ "auth_token": self.secret }),
        }
        .to_string()
    }

    fn telnyx_key(&self) -> SigningKey {
        SigningKey::from_bytes(&Sha256::digest(&self.secret).into())
    }

    /// An attempt that this carrier was asked to dial and has told nothing of yet, of a new tenant's.
    pub async fn dialled(&self, stack: &Stack, organization: Uuid, number: u32) -> Result<Call> {
        let (from, to) = ("+14155550111".to_owned(), format!("+1415{number:07}"));
        let row = stack
            .sql
            .query_one(
                "insert into public.call_logs (
                   organization_id, carrier_account_id, caller_number, callee_number, status, dialled, record_call, begun_at, created_at,
                   submitted_at, lease_until, not_after
                 )
                 values (
                   $1, $2, $3, $4, 'queued', true, true, now() - interval '90 seconds', private.clock_now() - interval '90 seconds',
                   private.clock_now() - interval '89 seconds', now() + interval '5 minutes', now() + interval '5 minutes'
                 )
                 returning id",
                &[&organization, &self.id, &from, &to],
            )
            .await?;
        Ok(Call { attempt: Some(row.get(0)), sid: Uuid::new_v4().to_string(), from, to })
    }

    /// The path of a callback: with a token of the call's attempt, or for calls to us the account's.
    pub fn path(&self, stack: &Stack, call: &Call, event: &str) -> Result<String> {
        let last = match call.attempt {
            None => self.id.to_string(),
            Some(attempt) => {
                let token = CallbackToken {
                    attempt_id: attempt,
                    carrier_account_id: self.id,
                    record: true,
                    not_after: Utc::now().timestamp() + 600,
                    agent_id: Uuid::nil(),
                };
                let event: CallbackEvent = event.parse().map_err(|()| anyhow::anyhow!("there is no event {event}"))?;
                token.encode(&stack.keys.secrets()?.callback_keys, self.carrier, event).context("no key")?
            }
        };
        Ok(format!("/functions/v1/webhook-intake/{}/{event}/{last}", self.carrier))
    }

    /// A recorded delivery for a call, signed.
    pub fn deliver(&self, stack: &Stack, call: &Call, delivery: &Delivery) -> Result<HttpEvent> {
        self.send(&self.path(stack, call, &delivery.event)?, call, delivery)
    }

    /// A recorded delivery to any path, signed.
    pub fn send(&self, path: &str, call: &Call, delivery: &Delivery) -> Result<HttpEvent> {
        if let Some(form) = &delivery.form {
            let now = Utc::now();
            let text = |value: &Value| call.fill(value.as_str().unwrap_or_default(), now);
            let pairs: Vec<(String, String)> = form.iter().map(|(name, value)| (name.clone(), text(value))).collect();
            let body = form_urlencoded::Serializer::new(String::new()).extend_pairs(&pairs).finish();
            return self.signed(path, "application/x-www-form-urlencoded", &body);
        }
        let body = call.fill_all(delivery.json.as_ref().context("a delivery without a body")?);
        self.signed(path, "application/json", &body.to_string())
    }

    /// A request to `path` with this body, signed as the carrier signs.
    pub fn signed(&self, path: &str, content_type: &str, body: &str) -> Result<HttpEvent> {
        let event = HttpEvent::post(path).header("content-type", content_type).body(body);
        let url = format!("{PUBLIC_ORIGIN}{path}");
        let form: Vec<(String, String)> = match content_type {
            "application/json" => Vec::new(),
            _ => form_urlencoded::parse(body.as_bytes()).into_owned().collect(),
        };
        let now = Utc::now().timestamp();
        Ok(match self.carrier {
            "plivo" => local::carrier::sign_callback(&self.secret, &url, &form, &local::carrier::nonce())
                .into_iter()
                .fold(event, |event, (name, value)| event.header(name, value)),
            "twilio" => {
                let pairs: BTreeSet<_> = form.into_iter().collect();
                let text = pairs.into_iter().fold(url, |text, (name, value)| text + &name + &value);
                let mut mac = Hmac::<Sha1>::new_from_slice(self.secret.as_bytes())?;
                mac.update(text.as_bytes());
                event.header("x-twilio-signature", STANDARD.encode(mac.finalize().into_bytes()))
            }
            "telnyx" => {
                let signature = self.telnyx_key().sign(format!("{now}|{body}").as_bytes());
                event
                    .header("telnyx-timestamp", now.to_string())
                    .header("telnyx-signature-ed25519", STANDARD.encode(signature.to_bytes()))
            }
            "vonage" => {
                let claims = json!({
                    "iat": now, "jti": Uuid::new_v4(), "iss": "Vonage", "application_id": APPLICATION,
                    "payload_hash": hex::encode(Sha256::digest(body)),
                });
                let key = jsonwebtoken::EncodingKey::from_secret(self.secret.as_bytes());
                event.bearer(&jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key)?)
            }
            other => bail!("there is no carrier {other}"),
        })
    }
}
