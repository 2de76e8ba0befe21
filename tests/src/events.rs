//! Events as AWS makes them, and functions called with them in process.

use anyhow::{Context, Result};
use base64::{Engine, engine::general_purpose::STANDARD};
use serde::Serialize;
use serde_json::{Map, Value, json};
use shared::trigger::{self, Function, Invocation};
use std::time::Duration;

/// What Lambda gives a function in process: `template.yaml` gives none more than a minute.
const LIMIT: Duration = Duration::from_secs(30);

/// A request, as the HTTP API hands it to a function.
#[derive(Debug, Clone)]
pub struct HttpEvent {
    method: &'static str,
    path: String,
    query: String,
    headers: Map<String, Value>,
    body: Vec<u8>,
}

impl HttpEvent {
    /// A request without a body.
    pub fn new(method: &'static str, path: &str) -> Self {
        let (path, query) = path.split_once('?').unwrap_or((path, ""));
        Self { method, path: path.to_owned(), query: query.to_owned(), headers: Map::new(), body: Vec::new() }
    }

    /// A GET.
    pub fn get(path: &str) -> Self {
        Self::new("GET", path)
    }

    /// A POST.
    pub fn post(path: &str) -> Self {
        Self::new("POST", path)
    }

    /// Adds a header; HTTP API v2 writes names in lower case.
    pub fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.insert(name.to_ascii_lowercase(), Value::String(value.into()));
        self
    }

    /// Signs in.
    pub fn bearer(self, jwt: &str) -> Self {
        self.header("authorization", format!("Bearer {jwt}"))
    }

    /// A body of bytes.
    pub fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }

    /// A JSON body.
    pub fn json(self, body: &impl Serialize) -> Result<Self> {
        Ok(self.header("content-type", "application/json").body(serde_json::to_vec(body)?))
    }

    /// A form body.
    pub fn form(self, pairs: &[(String, String)]) -> Self {
        let body = form_urlencoded::Serializer::new(String::new()).extend_pairs(pairs).finish();
        self.header("content-type", "application/x-www-form-urlencoded").body(body)
    }

    /// The body as it is sent, before an event makes base64 of it.
    pub fn sent_body(&self) -> &[u8] {
        &self.body
    }

    /// The event. A body that is not JSON or text comes in base64, as API Gateway does it.
    pub fn payload(&self) -> Value {
        let content_type = self.headers.get("content-type").and_then(Value::as_str).unwrap_or_default();
        let text = (content_type.starts_with("application/json") || content_type.starts_with("text/"))
            .then(|| String::from_utf8(self.body.clone()).ok())
            .flatten();
        let (body, base64) = match text {
            Some(text) => (text, false),
            None => (STANDARD.encode(&self.body), true),
        };
        json!({
            "version": "2.0",
            "routeKey": "ANY /functions/v1/{proxy+}",
            "rawPath": self.path,
            "rawQueryString": self.query,
            "headers": self.headers,
            "requestContext": {
                "accountId": "000000000000", "apiId": "api", "domainName": "api.example.com", "domainPrefix": "api",
                "http": {
                    "method": self.method, "path": self.path, "protocol": "HTTP/1.1", "sourceIp": "192.0.2.1", "userAgent": "test",
                },
                "requestId": "request", "routeKey": "ANY /functions/v1/{proxy+}", "stage": "$default",
                "time": "24/Nov/2026:04:30:00 +0000", "timeEpoch": 1_795_494_600_000_i64,
            },
            "body": if self.body.is_empty() { Value::Null } else { Value::String(body) },
            "isBase64Encoded": base64 && !self.body.is_empty(),
        })
    }

    /// Sends it to a function.
    pub async fn send(&self, function: &impl Function) -> Result<Answer> {
        let answer = invoke(function, self.payload()).await?;
        Ok(Answer {
            status: answer["statusCode"]
                .as_u64()
                .and_then(|status| status.try_into().ok())
                .context("an answer without a status")?,
            headers: answer["headers"].as_object().cloned().unwrap_or_default(),
            body: answer["body"].as_str().unwrap_or_default().to_owned(),
        })
    }
}

/// What a function answers to a request.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// Its headers, names in lower case.
    pub headers: Map<String, Value>,
    /// Its body.
    pub body: String,
}

impl Answer {
    /// The body as JSON; null where it is none.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_default()
    }

    /// Fails unless it is an error of this status and code, in the shape that every error has.
    #[track_caller]
    pub fn assert_error(&self, status: u16, code: &str) {
        let body = self.json();
        assert_eq!((self.status, body["code"].as_str()), (status, Some(code)), "{}", self.body);
        assert!(
            body["message"].as_str().is_some_and(|message| !message.is_empty()),
            "an error says what is wrong: {}",
            self.body
        );
        for key in ["details", "hint"] {
            assert!(body.get(key).is_some(), "an error has {key}: {}", self.body);
        }
        let content_type = self.headers.get("content-type").and_then(Value::as_str).unwrap_or_default();
        assert!(content_type.starts_with("application/json"), "{content_type}");
    }

    /// Fails unless it is an error that names this field.
    #[track_caller]
    pub fn assert_error_at(&self, status: u16, code: &str, field: &str) {
        self.assert_error(status, code);
        assert_eq!(self.json()["details"]["field"], field, "{}", self.body);
    }
}

/// Invokes a function with any event.
pub async fn invoke(function: &impl Function, payload: Value) -> Result<Value> {
    invoke_within(function, payload, LIMIT).await
}

/// Invokes a function that has only so long.
pub async fn invoke_within(function: &impl Function, payload: Value, limit: Duration) -> Result<Value> {
    Ok(trigger::handle(function, payload, &Invocation::with_limit("test", limit)).await?)
}

/// Runs the job of a schedule.
pub async fn job(function: &impl Function, name: &str) -> Result<Value> {
    invoke(function, json!({ "job": name })).await
}
