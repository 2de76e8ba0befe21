//! The one secret of a stack: a JSON object in AWS Secrets Manager, fetched when first needed and again when it is five minutes old,
//! so that a rotation needs no deploy.
//!
//! One signed request (`secretsmanager.GetSecretValue`) with the client that the function has anyway: the service's own SDK would
//! add a second HTTP stack to functions that need none.

use crate::{Error, Result};
use aws_sigv4::{
    http_request::{SignableBody, SignableRequest, SigningSettings, sign},
    sign::v4,
};
use base64::{Engine, engine::general_purpose::STANDARD};
use serde::{Deserialize, Deserializer, de::Error as _};
use std::{
    env,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};
use tokio::sync::Mutex;

/// How old a fetched secret may be before it is fetched again.
const MAX_AGE: Duration = Duration::from_secs(300);

/// A key with the id that goes in front of what it made, so that two can be valid at once.
#[derive(Clone, Deserialize)]
pub struct NumberedKey {
    /// 0 to 255, unique among the keys of its kind.
    pub id: u8,
    /// The key itself; base64 in the JSON.
    #[serde(deserialize_with = "from_base64")]
    pub key: Vec<u8>,
}

/// What the secret holds. In every list the first is current and the others are still accepted.
#[derive(Clone, Deserialize)]
pub struct Secrets {
    /// `sb_secret_…`: sent as `apikey`, never as a bearer token.
    pub supabase_secret_key: String,
    /// Sign the callback URLs that carriers are given.
    pub callback_keys: Vec<NumberedKey>,
    /// Seal carrier accounts' secrets.
    pub seal_keys: Vec<NumberedKey>,
    /// `whsec_…`: sign the nudges of Supabase's database webhooks.
    pub nudge_keys: Vec<String>,
}

fn from_base64<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    let text = String::deserialize(deserializer)?;
    STANDARD.decode(text).map_err(D::Error::custom)
}

/// Where the secret comes from.
#[derive(Clone)]
enum Source {
    SecretsManager { http: reqwest::Client, arn: String },
    Fixed,
}

/// Gives the stack's secret, cached.
#[derive(Clone)]
pub struct SecretStore {
    source: Source,
    cached: Arc<Mutex<Option<Fetched>>>,
}

/// The secret and when it was fetched.
type Fetched = (Instant, Arc<Secrets>);

impl SecretStore {
    /// Fetches `arn` with `http` when first asked.
    pub fn new(http: reqwest::Client, arn: impl Into<String>) -> Self {
        let source = Source::SecretsManager { http, arn: arn.into() };
        Self { source, cached: Arc::default() }
    }

    /// Always gives `secrets`: for a function called in process.
    pub fn fixed(secrets: Secrets) -> Self {
        Self { source: Source::Fixed, cached: Arc::new(Mutex::new(Some((Instant::now(), Arc::new(secrets))))) }
    }

    /// The secret, at most five minutes old. When it cannot be fetched again, the one at hand serves on: losing Secrets Manager
    /// must not stop calls. Error 503 when there is none yet.
    pub async fn get(&self) -> Result<Arc<Secrets>> {
        let mut cached = self.cached.lock().await;
        let (http, arn) = match (&self.source, &*cached) {
            (Source::Fixed, Some((_, secrets))) => return Ok(secrets.clone()),
            (Source::SecretsManager { .. }, Some((at, secrets))) if at.elapsed() < MAX_AGE => {
                return Ok(secrets.clone());
            }
            (Source::SecretsManager { http, arn }, _) => (http, arn),
            (Source::Fixed, None) => return Err(Error::internal("no secret was given")),
        };
        match (fetch(http, arn).await, &mut *cached) {
            (Ok(secrets), slot) => {
                let secrets = Arc::new(secrets);
                *slot = Some((Instant::now(), secrets.clone()));
                Ok(secrets)
            }
            (Err(error), Some((at, secrets))) => {
                tracing::warn!(error = %error, "the stack's secret could not be refreshed; the last one serves on");
                *at = Instant::now();
                Ok(secrets.clone())
            }
            (Err(error), None) => Err(error),
        }
    }
}

async fn fetch(http: &reqwest::Client, arn: &str) -> Result<Secrets> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Answer {
        secret_string: String,
    }
    let region = env::var("AWS_REGION").unwrap_or_else(|_| "us-east-1".to_owned());
    let endpoint =
        env::var("AWS_ENDPOINT_URL").unwrap_or_else(|_| format!("https://secretsmanager.{region}.amazonaws.com"));
    let endpoint = format!("{}/", endpoint.trim_end_matches('/'));
    let body = serde_json::json!({ "SecretId": arn }).to_string();
    let request = http
        .post(&endpoint)
        .header("content-type", "application/x-amz-json-1.1")
        .header("x-amz-target", "secretsmanager.GetSecretValue")
        .timeout(Duration::from_secs(5));
    let request = signed(request.build().map_err(away)?, &region, body)?;
    let answer = http.execute(request).await.map_err(away)?;
    let status = answer.status();
    if !status.is_success() {
        return Err(Error::unavailable(format!("Secrets Manager answered {status}")));
    }
    let answer: Answer = answer.json().await.map_err(away)?;
    serde_json::from_str(&answer.secret_string)
        .map_err(|error| Error::internal(format!("the stack's secret has not the documented shape: {error}")))
}

/// Signs with the credentials that Lambda puts in the environment (Signature Version 4).
fn signed(mut request: reqwest::Request, region: &str, body: String) -> Result<reqwest::Request> {
    let failed = |what: &str| Error::internal(format!("signing the request to Secrets Manager failed: {what}"));
    let variable = |name: &str| env::var(name).map_err(|_| failed(name));
    let identity = aws_credential_types::Credentials::new(
        variable("AWS_ACCESS_KEY_ID")?,
        variable("AWS_SECRET_ACCESS_KEY")?,
        env::var("AWS_SESSION_TOKEN").ok(),
        None,
        "environment",
    )
    .into();
    let parameters = v4::SigningParams::builder()
        .identity(&identity)
        .region(region)
        .name("secretsmanager")
        .time(SystemTime::now())
        .settings(SigningSettings::default())
        .build()
        .map_err(|_| failed("parameters"))?
        .into();
    let url = request.url().to_string();
    let headers = request.headers().iter().filter_map(|(name, value)| Some((name.as_str(), value.to_str().ok()?)));
    let signable = SignableRequest::new("POST", &url, headers, SignableBody::Bytes(body.as_bytes()))
        .map_err(|_| failed("request"))?;
    let (instructions, _) = sign(signable, &parameters).map_err(|_| failed("signature"))?.into_parts();
    for (name, value) in instructions.headers() {
        let name = http::HeaderName::from_bytes(name.as_bytes()).map_err(|_| failed("header"))?;
        request.headers_mut().insert(name, value.parse().map_err(|_| failed("header"))?);
    }
    *request.body_mut() = Some(body.into());
    Ok(request)
}

fn away(error: reqwest::Error) -> Error {
    Error::unavailable(format!("Secrets Manager does not answer: {}", error.without_url()))
}
