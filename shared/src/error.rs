//! One error for every function, in PostgREST's own shape, so that a client needs one way to read them.

use http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// The result of everything that can fail in a function.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, as the caller is told it: `{"code","message","details","hint"}` under a status.
///
/// `code` is snake_case and stable; `details.field` names the offending field where there is one. A message never carries a
/// secret, a full phone number or a transcript.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{status} {code}: {message}")]
pub struct Error {
    /// The HTTP status that the caller gets.
    pub status: StatusCode,
    /// Stable, snake_case name of the error.
    pub code: String,
    /// One sentence for a person.
    pub message: String,
    /// The field of the request that is at fault.
    pub field: Option<String>,
    /// What the caller can do about it.
    pub hint: Option<String>,
    /// Seconds after which the same request may succeed.
    pub retry_after_seconds: Option<u32>,
    /// Which gate a call was refused by.
    pub gate: Option<Box<Gate>>,
}

/// A gate that does not let a call through.
#[derive(Debug, Clone, Deserialize)]
pub struct Gate {
    /// Its name, as the database has it.
    pub reason: String,
    /// When it opens, if it does by itself.
    #[serde(default)]
    pub next_at: Option<String>,
}

/// The wire form, in both directions: ours to clients, PostgREST's to us.
#[derive(Debug, Default, Deserialize, Serialize)]
struct Wire {
    #[serde(default)]
    code: Option<String>,
    #[serde(default)]
    message: Option<String>,
    #[serde(default)]
    details: Option<Value>,
    #[serde(default)]
    hint: Option<String>,
}

impl Error {
    /// An error with this status, code and message.
    pub fn new(status: StatusCode, code: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            status,
            code: code.into(),
            message: message.into(),
            field: None,
            hint: None,
            retry_after_seconds: None,
            gate: None,
        }
    }

    /// 400: the request is malformed at `field`.
    pub fn malformed(field: &str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "malformed_request", message).at(field)
    }

    /// 401: no token, or one that is not understood.
    pub fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "unauthorized", message)
    }

    /// 403: the signature does not match. Says nothing of why.
    pub fn bad_signature() -> Self {
        Self::new(StatusCode::FORBIDDEN, "bad_signature", "the request's signature does not match")
    }

    /// 404: there is no such thing, or it is not the caller's.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", message)
    }

    /// 405: the path exists, the method does not.
    pub fn method_not_allowed(method: &http::Method) -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", format!("{method} is not offered here"))
    }

    /// 413: the body is over `limit` bytes.
    pub fn too_large(limit: usize) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", format!("the body may have at most {limit} bytes"))
            .at("body")
    }

    /// 500: a fault of ours. The message is for the log; the caller is told only the code.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message)
    }

    /// 503: the database or another part is away; the same request may succeed later.
    pub fn unavailable(message: impl Into<String>) -> Self {
        let mut error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "database_unavailable", message);
        error.retry_after_seconds = Some(5);
        error
    }

    /// The carrier did not answer, or not with what it documents.
    pub fn carrier_unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_GATEWAY, "carrier_unavailable", message)
    }

    /// Names the field at fault.
    pub fn at(mut self, field: &str) -> Self {
        self.field = Some(field.to_owned());
        self
    }

    /// Says what the caller can do.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Whether the same request may succeed later, unchanged.
    pub fn is_retryable(&self) -> bool {
        self.status.is_server_error() || self.status == StatusCode::TOO_MANY_REQUESTS
    }

    /// Reads an error answer of PostgREST.
    ///
    /// Its pool timeout (`PGRST003`), lost connections (`PGRST000..002`) and PostgreSQL's statement timeout (`57014`),
    /// shutdown and connection classes mean "later", whatever status they came with. What PostgreSQL says in its own words is dropped:
    /// it quotes the row or the value that it refuses, and its own log has it.
    pub fn from_postgrest(status: StatusCode, body: &[u8], retry_after: Option<u32>) -> Self {
        let wire: Wire = serde_json::from_slice(body).unwrap_or_default();
        let code = wire.code.unwrap_or_default();
        let later = matches!(
            code.as_str(),
            "PGRST000" | "PGRST001" | "PGRST002" | "PGRST003" | "57014" | "55P03" | "40001" | "40P01"
        ) || code.starts_with("08")
            || code.starts_with("57P")
            || code.starts_with("53");
        if later || status.is_server_error() {
            let mut error = Self::unavailable(format!("the database answered {status} {code}"));
            error.retry_after_seconds = retry_after.or(error.retry_after_seconds);
            return error;
        }
        let quotes = quotes_data(&code);
        let code = match (status, code.as_str()) {
            (StatusCode::UNAUTHORIZED, c) if c.is_empty() || c.starts_with("PGRST3") => "invalid_token".to_owned(),
            (StatusCode::FORBIDDEN | StatusCode::UNAUTHORIZED, "42501") => "permission_denied".to_owned(),
            (_, "22P02") => "malformed_request".to_owned(),
            (_, "PGRST116") => "not_found".to_owned(),
            (_, "") => "database_error".to_owned(),
            (_, other) => other.to_owned(),
        };
        // PostgREST knows details as text alone; other texts than our objects are PostgreSQL's own words.
        let details = match wire.details {
            Some(Value::String(text)) => serde_json::from_str(&text).unwrap_or_default(),
            other => other.unwrap_or_default(),
        };
        let field = details["field"].as_str().map(str::to_owned);
        let gate = serde_json::from_value(details).ok().filter(|_| code == "call_refused").map(Box::new);
        Self {
            status,
            code,
            message: wire.message.filter(|_| !quotes).unwrap_or_else(|| "the database refused the request".to_owned()),
            field,
            hint: wire.hint.filter(|_| !quotes),
            retry_after_seconds: retry_after,
            gate,
        }
    }

    /// What the caller's program reads: the field at fault, of too many requests when to come again, of a call the gate that is shut.
    fn details(&self) -> Option<Value> {
        let mut details = serde_json::Map::new();
        if let Some(field) = &self.field {
            details.insert("field".to_owned(), json!(field));
        }
        if let Some(seconds) = self.retry_after_seconds.filter(|_| self.status == StatusCode::TOO_MANY_REQUESTS) {
            details.insert("retry_after".to_owned(), json!(seconds));
        }
        if let Some(gate) = &self.gate {
            details.insert("reason".to_owned(), json!(gate.reason));
            details.insert("next_at".to_owned(), json!(gate.next_at));
        }
        (!details.is_empty()).then_some(Value::Object(details))
    }

    /// The body that the caller gets.
    pub fn body(&self) -> Value {
        let message = if self.status == StatusCode::INTERNAL_SERVER_ERROR {
            "something went wrong on our side; the log has it under the request id"
        } else {
            &self.message
        };
        json!({
            "code": self.code,
            "message": message,
            "details": self.details(),
            "hint": self.hint,
        })
    }
}

/// Whether an error with this code may quote data: PostgreSQL's own have five signs, and those of class 42 name tables and functions
/// alone. Our codes are words, and say what we wrote.
fn quotes_data(code: &str) -> bool {
    code.len() == 5 && !code.starts_with("42") && code.bytes().all(|b| b.is_ascii_digit() || b.is_ascii_uppercase())
}

impl From<serde_json::Error> for Error {
    fn from(error: serde_json::Error) -> Self {
        Self::malformed("body", format!("the JSON is not what this route takes: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_raised_in_sql_reaches_the_caller() {
        let body = br#"{"code":"invalid_transition","message":"it runs already","details":"{\"field\":\"campaign_id\"}","hint":null}"#;
        let error = Error::from_postgrest(StatusCode::CONFLICT, body, None);
        assert_eq!(error.status, StatusCode::CONFLICT);
        assert_eq!(error.body()["details"]["field"], "campaign_id");
        assert!(!error.is_retryable());
    }

    #[test]
    fn the_gate_that_refused_a_call_reaches_the_caller() {
        let body = br#"{"code":"call_refused","message":"no","details":"{\"field\":\"lead_id\",\"reason\":\"min_gap\",\"next_at\":null}"}"#;
        let error = Error::from_postgrest(StatusCode::UNPROCESSABLE_ENTITY, body, None);
        assert_eq!(error.body()["details"], json!({ "field": "lead_id", "reason": "min_gap", "next_at": null }));
    }

    #[test]
    fn a_pool_timeout_or_a_statement_timeout_means_later() {
        for (status, code) in [(504, "PGRST003"), (500, "57014"), (503, "PGRST002"), (400, "40P01")] {
            let body = format!(r#"{{"code":"{code}","message":"m"}}"#);
            let status = StatusCode::from_u16(status).unwrap();
            assert!(Error::from_postgrest(status, body.as_bytes(), None).is_retryable(), "{code}");
        }
    }

    #[test]
    fn what_postgresql_quotes_reaches_nobody() {
        for code in ["23505", "23514", "22P02", "P0001"] {
            let body =
                format!(r#"{{"code":"{code}","message":"no room for +919812345678","hint":"Asha","details":"Asha"}}"#);
            let error = Error::from_postgrest(StatusCode::BAD_REQUEST, body.as_bytes(), None);
            let told = format!("{error} {error:?} {}", error.body());
            assert!(!told.contains("98123") && !told.contains("Asha"), "{told}");
        }
        let body = br#"{"code":"42501","message":"permission denied for table leads"}"#;
        assert!(Error::from_postgrest(StatusCode::FORBIDDEN, body, None).to_string().ends_with("for table leads"));
    }

    #[test]
    fn an_expired_token_is_invalid_token() {
        let body = br#"{"code":"PGRST301","details":null,"hint":null,"message":"JWT expired"}"#;
        let error = Error::from_postgrest(StatusCode::UNAUTHORIZED, body, None);
        assert_eq!((error.status, error.code.as_str()), (StatusCode::UNAUTHORIZED, "invalid_token"));
    }

    #[test]
    fn an_internal_error_does_not_tell_its_cause() {
        let body = Error::internal("connection string postgres://u:p@h").body();
        assert!(!body.to_string().contains("postgres://"));
    }
}
