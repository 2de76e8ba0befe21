//! How a payment gateway is spoken to, whichever it is: only at its own hosts, once, and with a limit of time. Nothing here sends twice.
//!
//! A connection that fails is told apart from an answer that does not come: the first proves that nobody was charged, the second proves
//! nothing.

use http::{Method, StatusCode};
use serde::Deserialize;
use serde_json::Value;
use shared::{Error, Result};
use std::{fmt, time::Duration};
use url::Url;

/// How long a gateway may take for one request. A bank takes its time, and what comes later is unknown, not refused.
const READ_TIMEOUT: Duration = Duration::from_secs(15);

/// An account at a gateway, opened for one request.
pub struct Wire<'a> {
    http: &'a reqwest::Client,
    base: Url,
    user: String,
    password: String,
}

impl fmt::Debug for Wire<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Wire({})", self.base)
    }
}

/// What is sent along.
pub enum Payload {
    /// Nothing.
    Nothing,
    /// A form, as Stripe takes it.
    Form(Vec<(String, String)>),
    /// JSON, as Razorpay takes it.
    Json(Value),
}

/// What a gateway answered.
#[derive(Debug)]
pub struct Reply {
    /// The status.
    pub status: StatusCode,
    /// The body; null where it is no JSON or broke off.
    pub body: Value,
}

/// Why there is no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Silence {
    /// Not a byte was sent.
    NotSent,
    /// It may have been done.
    Unknown(&'static str),
}

impl<'a> Wire<'a> {
    /// A wire to `api_base`, unless that is a host which must not be asked: one of `hosts` over TLS is, and loopback where `local`.
    pub fn new(
        http: &'a reqwest::Client,
        api_base: &str,
        hosts: &[&str],
        credentials: (String, String),
        local: bool,
    ) -> Result<Self> {
        let base = Url::parse(api_base).map_err(|_| Error::internal("the account's api_base is no URL"))?;
        let is_plain = base.username().is_empty() && base.password().is_none();
        let is_allowed = match (base.scheme(), base.host_str()) {
            ("https", Some(host)) => is_plain && base.port().is_none() && hosts.contains(&host),
            ("http", Some("127.0.0.1" | "localhost" | "[::1]")) => local,
            _ => false,
        };
        if !is_allowed {
            return Err(Error::internal("the account's api_base is not a host that may be asked for money"));
        }
        let (user, password) = credentials;
        Ok(Self { http, base, user, password })
    }

    /// Sends one request, once.
    pub async fn send(
        &self,
        method: Method,
        path: &[&str],
        query: &[(&str, String)],
        key: Option<(&'static str, String)>,
        payload: Payload,
    ) -> std::result::Result<Reply, Silence> {
        let mut url = self.base.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(path);
        }
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        let mut request =
            self.http.request(method, url).timeout(READ_TIMEOUT).basic_auth(&self.user, Some(&self.password));
        if let Some((name, value)) = key {
            request = request.header(name, value);
        }
        request = match payload {
            Payload::Nothing => request,
            Payload::Form(form) => request.form(&form),
            Payload::Json(json) => request.json(&json),
        };
        let answer = match request.send().await {
            Ok(answer) => answer,
            Err(error) if error.is_connect() || error.is_builder() => return Err(Silence::NotSent),
            Err(error) => return Err(Silence::Unknown(broken(&error))),
        };
        let status = answer.status();
        let body = match answer.bytes().await {
            Ok(body) => serde_json::from_slice(&body).unwrap_or_default(),
            Err(_) if status.is_client_error() => Value::Null,
            Err(error) => return Err(Silence::Unknown(broken(&error))),
        };
        Ok(Reply { status, body })
    }

    /// What is at a path.
    pub async fn get(&self, path: &[&str], query: &[(&str, String)]) -> std::result::Result<Reply, Silence> {
        self.send(Method::GET, path, query, None, Payload::Nothing).await
    }
}

fn broken(error: &reqwest::Error) -> &'static str {
    if error.is_timeout() { "timeout" } else { "broken_answer" }
}

/// One secret of an account, as its sealed JSON names it.
pub fn secret(credentials: &str, name: &str) -> Result<String> {
    #[derive(Deserialize)]
    #[serde(transparent)]
    struct Secrets(std::collections::BTreeMap<String, String>);
    let Secrets(mut secrets) = serde_json::from_str(credentials)
        .map_err(|_| Error::internal("the account's credentials are no JSON object"))?;
    secrets.remove(name).ok_or_else(|| Error::internal(format!("the account's credentials have no {name}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_gateway_s_own_hosts_are_asked_for_money() {
        let http = shared::supabase::http_client().unwrap();
        let allowed = |url: &str, local| {
            Wire::new(&http, url, &["api.stripe.com"], ("sk".to_owned(), String::new()), local).is_ok()
        };
        assert!(allowed("https://api.stripe.com", false));
        assert!(allowed("http://127.0.0.1:4000", true));
        for url in [
            "http://127.0.0.1:4000",
            "http://api.stripe.com",
            "https://api.stripe.com:444",
            "https://x@api.stripe.com",
            "https://api.stripe.com.evil.example",
            "https://169.254.169.254",
            "nonsense",
        ] {
            assert!(!allowed(url, false), "{url}");
        }
    }
}
