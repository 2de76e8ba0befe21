//! Voice agents: their recorded deliveries, signed as each provider signs.

use crate::{Stack, events::HttpEvent, scene::Tenant};
use anyhow::{Context, Result, ensure};
use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use shared::{
    mac::{Hash, hmac},
    standard_webhooks,
};
use std::{fs, path::PathBuf};
use uuid::Uuid;
use webhook_intake::Intake;

/// A source of one of the providers, as its organization made it.
#[derive(Debug, Clone)]
pub struct AgentSource {
    /// Its provider.
    pub provider: &'static str,
    /// Its id.
    pub id: Uuid,
    /// Its secret.
    pub secret: String,
    /// What it was configured with.
    pub settings: Value,
}

/// Makes a source through the handler, as an owner does.
pub async fn connect(
    stack: &Stack,
    intake: &Intake,
    tenant: &Tenant,
    provider: &'static str,
    settings: Value,
) -> Result<AgentSource> {
    let secret = match provider {
        "agent" => None,
        _ => Some(format!("key_{}", Uuid::new_v4().simple())),
    };
    let asked =
        json!({ "provider": provider, "name": format!("Our {provider}"), "secret": secret, "settings": settings });
    let answer =
        HttpEvent::post("/functions/v1/webhook-intake/sources").bearer(tenant.jwt()).json(&asked)?.send(intake).await?;
    ensure!(answer.status == 201, "POST sources: {} {}", answer.status, answer.body);
    let made = answer.json();
    let id: Uuid = made["id"].as_str().context("a source without an id")?.parse()?;
    ensure!(made["url"] == format!("{}{}", stack.config.public_origin, path(provider, id)), "{made}");
    let secret = secret.or_else(|| made["secret"].as_str().map(str::to_owned)).context("a source without a secret")?;
    Ok(AgentSource { provider, id, secret, settings })
}

/// The path of a source's deliveries.
pub fn path(provider: &str, id: Uuid) -> String {
    format!("/functions/v1/webhook-intake/{provider}/{id}")
}

/// A recorded delivery, for one attempt and one conversation of the agent.
pub fn recorded(provider: &str, name: &str, attempt: Uuid, call: &str) -> Result<String> {
    let file = local::parts::folder::workspace()?.join(format!("tests/fixtures/intake/{provider}/{name}.json"));
    let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
    let soon = (chrono::Utc::now() + chrono::Duration::days(2)).format("%Y-%m-%dT12:00:00Z").to_string();
    let text = text.replace("ATTEMPT_ID", &attempt.to_string()).replace("CARRIER_CALL_ID", &format!("carrier-{call}"));
    // Providers send it in one line.
    let value: Value = serde_json::from_str(&text.replace("CALL_ID", call).replace("IN_TWO_DAYS", &soon))?;
    Ok(value.to_string())
}

/// The names of a provider's recorded deliveries.
pub fn names(provider: &str) -> Result<Vec<String>> {
    let folder: PathBuf = local::parts::folder::workspace()?.join(format!("tests/fixtures/intake/{provider}"));
    let mut names: Vec<String> = fs::read_dir(&folder)?
        .flatten()
        .filter_map(|entry| Some(entry.file_name().to_string_lossy().strip_suffix(".json")?.to_owned()))
        .collect();
    names.sort();
    ensure!(!names.is_empty(), "{} is empty", folder.display());
    Ok(names)
}

impl AgentSource {
    /// A delivery with this body, signed now.
    pub fn deliver(&self, body: &str) -> HttpEvent {
        self.deliver_at(body, chrono::Utc::now().timestamp_millis())
    }

    /// As [`AgentSource::deliver`], signed at a time in unix milliseconds.
    pub fn deliver_at(&self, body: &str, at_ms: i64) -> HttpEvent {
        let event = HttpEvent::post(&path(self.provider, self.id))
            .header("content-type", "application/json")
            .body(body.as_bytes());
        self.signatures(body.as_bytes(), at_ms)
            .into_iter()
            .fold(event, |event, (name, value)| event.header(&name, value))
    }

    /// The headers that sign a body.
    pub fn signatures(&self, body: &[u8], at_ms: i64) -> Vec<(String, String)> {
        let seconds = (at_ms / 1000).to_string();
        let hex_of = |key: &str, parts: &[&[u8]]| hex::encode(hmac(Hash::Sha256, key.as_bytes(), parts));
        let header = |name: &str, value: String| (name.to_owned(), value);
        match self.provider {
            "retell" => {
                let digest = hex_of(&self.secret, &[body, at_ms.to_string().as_bytes()]);
                vec![header("x-retell-signature", format!("v={at_ms},d={digest}"))]
            }
            "elevenlabs" => {
                let digest = hex_of(&self.secret, &[seconds.as_bytes(), b".", body]);
                vec![header("elevenlabs-signature", format!("t={seconds},v0={digest}"))]
            }
            "agent" => {
                let id = format!("msg_{}", hex::encode(&hmac(Hash::Sha256, b"id", &[body])[..12]));
                let signature = standard_webhooks::sign(&self.secret, &id, at_ms / 1000, body).unwrap_or_default();
                vec![
                    header("webhook-id", id),
                    header("webhook-timestamp", seconds),
                    header("webhook-signature", signature),
                ]
            }
            _ => self.vapi(body, &seconds),
        }
    }

    fn vapi(&self, body: &[u8], seconds: &str) -> Vec<(String, String)> {
        let header = |name: &str, value: String| (name.to_owned(), value);
        match self.settings["auth"].as_str() {
            Some("bearer") => vec![header("authorization", format!("Bearer {}", self.secret))],
            Some("secret") => vec![header("x-vapi-secret", self.secret.clone())],
            _ if self.settings["signature_encoding"] == "base64" => {
                let mac = hmac(Hash::Sha512, self.secret.as_bytes(), &[body]);
                vec![header("x-acme-signature", format!("sha512={}", STANDARD.encode(mac)))]
            }
            _ => {
                let mac = hmac(Hash::Sha256, self.secret.as_bytes(), &[seconds.as_bytes(), b".", body]);
                vec![header("x-signature", hex::encode(mac)), header("x-timestamp", seconds.to_owned())]
            }
        }
    }
}
