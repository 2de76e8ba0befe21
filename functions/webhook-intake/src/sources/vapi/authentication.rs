//! How a Vapi server proves itself: by HMAC, with the parts that its plan names, by a bearer token, or by the older secret header.
//!
//! The settings have the names of Vapi's own plan in snake case. `auth` chooses: `hmac` (when there is none), `bearer` or `secret`.

use crate::sources::{OpenSource, invalid_settings};
use base64::{Engine, engine::general_purpose::STANDARD};
use serde::Deserialize;
use serde_json::Value;
use shared::{
    Result,
    http::Request,
    mac::{self, Encoding, Hash},
};

/// The settings that this file reads.
pub const SETTINGS: [&str; 12] = [
    "auth",
    "algorithm",
    "signature_header",
    "timestamp_header",
    "message_id_header",
    "signature_prefix",
    "include_timestamp",
    "payload_format",
    "signature_encoding",
    "secret_is_base64",
    "url",
    "tolerance_seconds",
];

#[derive(Deserialize)]
#[serde(default)]
struct Plan {
    auth: Auth,
    algorithm: Algorithm,
    signature_header: String,
    timestamp_header: String,
    message_id_header: String,
    signature_prefix: String,
    include_timestamp: bool,
    payload_format: Option<String>,
    signature_encoding: Written,
    secret_is_base64: bool,
    url: String,
    tolerance_seconds: u32,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            auth: Auth::Hmac,
            algorithm: Algorithm::Sha256,
            signature_header: "x-signature".to_owned(),
            timestamp_header: "x-timestamp".to_owned(),
            message_id_header: "x-message-id".to_owned(),
            signature_prefix: String::new(),
            include_timestamp: true,
            payload_format: None,
            signature_encoding: Written::Hex,
            secret_is_base64: false,
            url: String::new(),
            tolerance_seconds: 300,
        }
    }
}

#[derive(Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Auth {
    Hmac,
    Bearer,
    Secret,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Algorithm {
    Sha1,
    Sha256,
    Sha512,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Written {
    Hex,
    Base64,
}

/// Checks the settings of a source. Error 422.
pub fn check(settings: &Value) -> Result<()> {
    let plan: Plan = serde_json::from_value(settings.clone()).map_err(|error| invalid_settings(error.to_string()))?;
    for header in [&plan.signature_header, &plan.timestamp_header, &plan.message_id_header] {
        if header.parse::<http::HeaderName>().is_err() {
            return Err(invalid_settings(format!("{header:?} is no header's name")));
        }
    }
    let format = plan.format();
    if !format.contains("{body}") {
        return Err(invalid_settings(
            "a signature that does not cover the body proves nothing: payload_format needs {body}",
        ));
    }
    if format.contains("{url}") && plan.url.is_empty() {
        return Err(invalid_settings("payload_format names {url}: set url as it is configured there"));
    }
    Ok(())
}

/// Whether the request proves itself as the settings say; settings that cannot be read prove nothing.
pub fn verify(source: &OpenSource, request: &Request, now_ms: i64) -> bool {
    let Ok(plan) = serde_json::from_value::<Plan>(source.settings.clone()) else { return false };
    match plan.auth {
        Auth::Hmac => plan.is_signed(source, request, now_ms).unwrap_or(false),
        Auth::Bearer => {
            let sent = request.header("authorization").and_then(|header| header.strip_prefix("Bearer "));
            sent.is_some_and(|sent| is_secret(source, sent))
        }
        Auth::Secret => request.header("x-vapi-secret").is_some_and(|sent| is_secret(source, sent)),
    }
}

fn is_secret(source: &OpenSource, sent: &str) -> bool {
    source.keys().fold(false, |matched, secret| matched | mac::same(secret, sent.as_bytes()))
}

impl Plan {
    fn format(&self) -> &str {
        let usual = if self.include_timestamp { "{timestamp}.{body}" } else { "{body}" };
        self.payload_format.as_deref().unwrap_or(usual)
    }

    fn is_signed(&self, source: &OpenSource, request: &Request, now_ms: i64) -> Option<bool> {
        let signature = request.header(&self.signature_header)?.strip_prefix(&self.signature_prefix)?;
        let format = self.format();
        if !format.contains("{body}") {
            return None;
        }
        let timestamp = if format.contains("{timestamp}") {
            let written = request.header(&self.timestamp_header)?;
            let sent: i64 = written.parse().ok()?;
            // Seconds or milliseconds: they are a thousand years apart.
            let sent_ms = if sent.unsigned_abs() < 100_000_000_000 { sent.saturating_mul(1000) } else { sent };
            if now_ms.saturating_sub(sent_ms).saturating_abs() > i64::from(self.tolerance_seconds) * 1000 {
                return None;
            }
            written
        } else {
            ""
        };
        let id = request.header(&self.message_id_header).unwrap_or_default();
        let payload = self.payload(format, timestamp, id, request);
        let (hash, encoding) = (self.hash(), self.encoding());
        let keys: Vec<Vec<u8>> = source
            .keys()
            .filter_map(|key| if self.secret_is_base64 { STANDARD.decode(key).ok() } else { Some(key.to_vec()) })
            .collect();
        Some(mac::is_signed(hash, encoding, keys.iter().map(Vec::as_slice), &[&payload], signature))
    }

    fn hash(&self) -> Hash {
        match self.algorithm {
            Algorithm::Sha1 => Hash::Sha1,
            Algorithm::Sha256 => Hash::Sha256,
            Algorithm::Sha512 => Hash::Sha512,
        }
    }

    fn encoding(&self) -> Encoding {
        match self.signature_encoding {
            Written::Hex => Encoding::Hex,
            Written::Base64 => Encoding::Base64,
        }
    }

    /// The bytes that are signed: the format with its placeholders filled, the body as it came.
    fn payload(&self, format: &str, timestamp: &str, id: &str, request: &Request) -> Vec<u8> {
        let mut payload = Vec::with_capacity(request.body.len() + format.len() + 64);
        let mut rest = format;
        while let Some(start) = rest.find('{') {
            payload.extend_from_slice(&rest.as_bytes()[..start]);
            rest = &rest[start..];
            let known: [(&str, &[u8]); 6] = [
                ("{body}", &request.body),
                ("{timestamp}", timestamp.as_bytes()),
                ("{method}", request.method.as_str().as_bytes()),
                ("{url}", self.url.as_bytes()),
                ("{svix-id}", id.as_bytes()),
                ("{", b"{"),
            ];
            if let Some((name, value)) = known.iter().find(|(name, _)| rest.starts_with(name)) {
                payload.extend_from_slice(value);
                rest = &rest[name.len()..];
            }
        }
        payload.extend_from_slice(rest.as_bytes());
        payload
    }
}
