//! One request to somebody else's address: signed, bounded in time and in what is read, and only where it may go.

use crate::address::{self, NotPublic, PublicOnly, System};
use http::{HeaderMap, StatusCode, header};
use reqwest::dns::Resolve;
use serde::Serialize;
use shared::{Result, standard_webhooks, supabase};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// How long an endpoint has to answer in all.
const TIMEOUT: Duration = Duration::from_secs(15);
/// How long it has to take the connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How much of an answer is read.
const READ_LIMIT: usize = 4 * 1024;
/// Longer than this nobody is waited for.
const DAY_SECONDS: u64 = 86_400;
/// How much of it is kept.
const KEPT: usize = 1_000;

/// Sends events, to public addresses alone.
pub struct Sender {
    client: reqwest::Client,
    timeout: Duration,
    local: bool,
}

/// What is sent.
pub struct Letter<'a> {
    /// The event's id, the same at every attempt.
    pub id: &'a str,
    /// Where to.
    pub url: &'a str,
    /// The event.
    pub body: String,
    /// What it is signed with: the current secret, and while a rotation lasts the one before.
    pub secrets: &'a [String],
}

/// What came of an attempt.
#[derive(Debug, Default, Serialize)]
pub struct Outcome {
    /// The answer's status, if there was an answer.
    pub status: Option<u16>,
    /// Why there was none, or why it does not do.
    pub error: Option<String>,
    /// The beginning of the answer's body.
    pub body: Option<String>,
    /// How long it took.
    pub duration_ms: u64,
    /// When the endpoint wants to be asked again at the earliest.
    pub retry_after_seconds: Option<u64>,
}

impl Sender {
    /// A sender that asks the system's resolver. `local`: an address of this machine that is spelled out may be reached.
    pub fn new(local: bool) -> Result<Self> {
        Self::resolving_with(Arc::new(System), TIMEOUT, local)
    }

    /// A sender with another resolver and another patience. What the resolver finds is checked all the same.
    pub fn resolving_with(resolver: Arc<dyn Resolve>, timeout: Duration, local: bool) -> Result<Self> {
        let client = supabase::http_client_with(|builder| {
            builder
                .dns_resolver(Arc::new(PublicOnly(resolver)))
                .connect_timeout(CONNECT_TIMEOUT.min(timeout))
                .timeout(timeout)
                // A proxy would resolve the name once more, and nobody would check what it found.
                .no_proxy()
                // A connection that stays open costs the endpoint's owner more than a new one costs us.
                .pool_idle_timeout(Duration::from_secs(20))
                .pool_max_idle_per_host(4)
        })?;
        Ok(Self { client, timeout, local })
    }

    /// How long a request may take.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Whether an address of this machine may be reached.
    pub fn is_local(&self) -> bool {
        self.local
    }

    /// Sends it once. Whatever happens is an outcome.
    pub async fn send(&self, letter: Letter<'_>) -> Outcome {
        let begun = Instant::now();
        let mut outcome =
            self.exchange(letter).await.unwrap_or_else(|error| Outcome { error: Some(error), ..Outcome::default() });
        outcome.duration_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        outcome
    }

    async fn exchange(&self, letter: Letter<'_>) -> Result<Outcome, String> {
        let url = address::read_url(letter.url, self.local).map_err(|error| error.message)?;
        // Real time, as a receiver's clock shows it.
        let now = chrono::Utc::now().timestamp();
        let signatures: Vec<_> = letter
            .secrets
            .iter()
            .filter_map(|secret| standard_webhooks::sign(secret, letter.id, now, letter.body.as_bytes()))
            .collect();
        if signatures.is_empty() {
            return Err("the endpoint has no secret to sign with".to_owned());
        }
        let mut answer = self
            .client
            .post(url)
            .header(header::CONTENT_TYPE, "application/json")
            .header("webhook-id", letter.id)
            .header("webhook-timestamp", now)
            .header("webhook-signature", signatures.join(" "))
            .body(letter.body)
            .send()
            .await
            .map_err(|error| describe(&error))?;
        let status = answer.status();
        let retry_after_seconds = retry_after(answer.headers());
        let mut body = Vec::new();
        // An answer that breaks off, or never ends, is one: its status was there.
        while body.len() < READ_LIMIT {
            match answer.chunk().await {
                Ok(Some(chunk)) => body.extend_from_slice(&chunk[..chunk.len().min(READ_LIMIT - body.len())]),
                Ok(None) | Err(_) => break,
            }
        }
        let error = match status {
            status if status.is_success() => None,
            status if status.is_redirection() => Some("redirects are not followed".to_owned()),
            StatusCode::GONE => Some("the endpoint says that it is gone".to_owned()),
            status => Some(format!("the endpoint answered {}", status.as_u16())),
        };
        Ok(Outcome { status: Some(status.as_u16()), error, body: excerpt(&body), duration_ms: 0, retry_after_seconds })
    }
}

/// The beginning of a body as text; the database's text knows no zero byte.
fn excerpt(body: &[u8]) -> Option<String> {
    let text: String = String::from_utf8_lossy(body).chars().filter(|c| *c != '\0').take(KEPT).collect();
    (!text.is_empty()).then_some(text)
}

/// `Retry-After`, in seconds from now: a number, or a date. More than a day is a day.
fn retry_after(headers: &HeaderMap) -> Option<u64> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    let wanted = text.parse().ok().or_else(|| {
        let at = chrono::DateTime::parse_from_rfc2822(text).ok()?;
        u64::try_from((at.with_timezone(&chrono::Utc) - chrono::Utc::now()).num_seconds()).ok()
    });
    wanted.map(|seconds: u64| seconds.min(DAY_SECONDS))
}

/// What the endpoint's owner is told of a request that was not answered.
fn describe(error: &reqwest::Error) -> String {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(cause) = source {
        if cause.is::<NotPublic>() {
            return NotPublic.to_string();
        }
        source = cause.source();
    }
    match error {
        error if error.is_timeout() => "the endpoint did not answer in time",
        error if error.is_connect() => "no connection could be made",
        _ => "the connection broke off",
    }
    .to_owned()
}

#[cfg(test)]
mod tests;
