//! Plivo's call API: create, look up, list, hang up. Never retried: creating a call is not idempotent, and Plivo has no key for it.

use crate::telephony::{CallReport, CallStatus, DialOutcome, Lookup, Outcome, e164, micros, plivo::callback};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use std::time::Duration;
use url::Url;

/// The hosts that may be asked to dial; loopback besides, on a stack that itself runs on loopback.
const ALLOWED_HOSTS: [&str; 1] = ["api.plivo.com"];
/// How long Plivo may take to answer a create: what comes later is unknown, not refused.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// An account at Plivo, opened for one request.
#[derive(Clone)]
pub struct Account {
    /// Auth id.
    pub auth_id: String,
    /// Auth token.
    pub auth_token: String,
    /// Origin of the API, as `https://api.plivo.com`.
    pub api_base: Url,
}

/// A call to make.
#[derive(Debug, Clone, Serialize)]
pub struct Create {
    /// Caller, E.164.
    pub from: String,
    /// Callee, E.164.
    pub to: String,
    /// Fetched when the call is answered.
    pub answer_url: String,
    /// Told when it rings.
    pub ring_url: String,
    /// Told when it is over. Always set: it would default to `answer_url`.
    pub hangup_url: String,
    /// Seconds of ringing, 20 at least.
    pub ring_timeout: u32,
    /// Seconds of talk at most.
    pub time_limit: u32,
    /// `true` in the background, reported with the hang-up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub machine_detection: Option<&'static str>,
}

/// Whether `api_base` may be called: an allowed host over TLS, or loopback where `local`.
pub fn is_allowed(api_base: &Url, local: bool) -> bool {
    match (api_base.scheme(), api_base.host_str()) {
        ("https", Some(host)) if ALLOWED_HOSTS.contains(&host) => true,
        ("http", Some("127.0.0.1" | "localhost" | "[::1]")) => local,
        _ => false,
    }
}

impl Account {
    fn url(&self, path: &str) -> String {
        let base = self.api_base.as_str().trim_end_matches('/');
        format!("{base}/v1/Account/{}/Call/{path}", self.auth_id)
    }

    /// Asks for a call, once. `http` must not follow redirects or retry.
    ///
    /// Accepted is a 2xx with the id. Refused is a failure to connect, before any byte was sent, or a 4xx that Plivo documents: the
    /// line was not seized. Deferred is 429, and India's concurrency limit (403). Everything else may have been dialled.
    pub async fn create(&self, http: &reqwest::Client, call: &Create) -> DialOutcome {
        #[derive(Deserialize)]
        struct Created {
            request_uuid: String,
        }
        let sent = http
            .post(self.url(""))
            .basic_auth(&self.auth_id, Some(&self.auth_token))
            .timeout(READ_TIMEOUT)
            .json(call)
            .send()
            .await;
        let answer = match sent {
            Ok(answer) => answer,
            Err(error) if error.is_connect() || error.is_builder() => {
                return DialOutcome::Refused { reason: Outcome::CarrierTransient, code: "connect".to_owned() };
            }
            Err(error) => {
                let code = if error.is_timeout() { "timeout" } else { "broken_answer" };
                return DialOutcome::Unknown { code: code.to_owned() };
            }
        };
        let status = answer.status();
        let retry_after = answer.headers().get("retry-after").and_then(|value| value.to_str().ok()?.parse().ok());
        let Ok(body) = answer.bytes().await else {
            return if status.is_client_error() {
                refusal(status, "", retry_after)
            } else {
                DialOutcome::Unknown { code: "broken_answer".to_owned() }
            };
        };
        if status.is_success() {
            return match serde_json::from_slice::<Created>(&body) {
                Ok(created) => DialOutcome::Accepted { provider_call_id: created.request_uuid },
                Err(_) => DialOutcome::Unknown { code: "unreadable_answer".to_owned() },
            };
        }
        refusal(status, &String::from_utf8_lossy(&body), retry_after)
    }

    /// What Plivo knows of a call: live first, then its record. Where no id was ever learnt, the calls from `from` to `to` are listed,
    /// and the newest is taken. An error is the status or what was seen instead.
    pub async fn look_up(
        &self,
        http: &reqwest::Client,
        call_id: Option<&str>,
        from: &str,
        to: &str,
    ) -> Result<Lookup, String> {
        let digits = |number: &str| number.trim_start_matches('+').to_owned();
        let Some(call_id) = call_id else {
            let query = [
                ("from_number", digits(from)),
                ("to_number", digits(to)),
                ("limit", "1".to_owned()),
                ("offset", "0".to_owned()),
            ];
            let Some(list) = self.get::<List>(http, "", &query).await? else { return Ok(Lookup::NotFound) };
            return Ok(match list.objects.into_iter().next() {
                None => Lookup::NotFound,
                Some(record) if record.end_time.is_some() => Lookup::Ended(record.report()),
                Some(record) => Lookup::Live(record.report()),
            });
        };
        let path = format!("{call_id}/");
        let live = [("status", "live".to_owned())];
        if let Some(live) = self.get::<LiveCall>(http, &path, &live).await? {
            let status = match live.call_status.as_deref() {
                Some("in-progress") => CallStatus::InProgress,
                _ => CallStatus::Ringing,
            };
            return Ok(Lookup::Live(CallReport {
                provider_call_id: Some(call_id.to_owned()),
                status: Some(status),
                ..CallReport::default()
            }));
        }
        Ok(match self.get::<Record>(http, &path, &[]).await? {
            Some(record) => Lookup::Ended(record.report()),
            None => Lookup::NotFound,
        })
    }

    /// Ends a live call; a call that is over already is no error.
    pub async fn hang_up(&self, http: &reqwest::Client, call_id: &str) -> Result<(), String> {
        let sent = http
            .delete(self.url(&format!("{call_id}/")))
            .basic_auth(&self.auth_id, Some(&self.auth_token))
            .send()
            .await
            .map_err(|error| error.without_url().to_string())?;
        match sent.status() {
            status if status.is_success() || status == StatusCode::NOT_FOUND => Ok(()),
            status => Err(status.to_string()),
        }
    }

    async fn get<T: serde::de::DeserializeOwned>(
        &self,
        http: &reqwest::Client,
        path: &str,
        query: &[(&str, String)],
    ) -> Result<Option<T>, String> {
        let answer = http
            .get(self.url(path))
            .basic_auth(&self.auth_id, Some(&self.auth_token))
            .query(query)
            .send()
            .await
            .map_err(|error| error.without_url().to_string())?;
        match answer.status() {
            StatusCode::NOT_FOUND => Ok(None),
            status if status.is_success() => {
                answer.json().await.map(Some).map_err(|error| error.without_url().to_string())
            }
            status => Err(status.to_string()),
        }
    }
}

/// What a refusal means, by Plivo's documented errors.
fn refusal(status: StatusCode, body: &str, retry_after: Option<u32>) -> DialOutcome {
    let code = status.as_u16().to_string();
    let body = body.to_ascii_lowercase();
    match status.as_u16() {
        429 => DialOutcome::Deferred { retry_after_seconds: retry_after.unwrap_or(5), code },
        403 if body.contains("concurrency") => {
            DialOutcome::Deferred { retry_after_seconds: retry_after.unwrap_or(30), code: "5030".to_owned() }
        }
        400 if body.contains("invalid") && (body.contains("to number") || body.contains("destination")) => {
            DialOutcome::Refused { reason: Outcome::InvalidNumber, code }
        }
        400 | 401 | 402 | 403 | 404 | 405 | 409 | 422 => DialOutcome::Refused { reason: Outcome::Config, code },
        _ => DialOutcome::Unknown { code },
    }
}

#[derive(Deserialize)]
struct LiveCall {
    call_status: Option<String>,
}

#[derive(Deserialize)]
struct List {
    #[serde(default)]
    objects: Vec<Record>,
}

/// A call detail record. Its times carry the account's offset; a time without one is not used.
#[derive(Deserialize)]
struct Record {
    call_uuid: String,
    #[serde(default)]
    from_number: Option<String>,
    #[serde(default)]
    to_number: Option<String>,
    #[serde(default)]
    initiation_time: Option<String>,
    #[serde(default)]
    answer_time: Option<String>,
    #[serde(default)]
    end_time: Option<String>,
    #[serde(default)]
    call_duration: Option<i64>,
    #[serde(default)]
    bill_duration: Option<i64>,
    #[serde(default)]
    total_amount: Option<String>,
    #[serde(default)]
    call_state: Option<String>,
    #[serde(default)]
    hangup_cause_code: Option<i64>,
    #[serde(default)]
    hangup_cause_name: Option<String>,
    #[serde(default)]
    hangup_source: Option<String>,
}

impl Record {
    fn report(self) -> CallReport {
        let code = self.hangup_cause_code.map(|code| code.to_string());
        let bill = self.bill_duration.filter(|seconds| *seconds >= 0);
        let ended = self.end_time.is_some();
        let outcome = callback::outcome(
            self.call_state.as_deref().unwrap_or(if bill.unwrap_or(0) > 0 { "completed" } else { "" }),
            code.as_deref(),
            false,
            bill.or(self.call_duration).unwrap_or(0),
        );
        let cost_micros = self.total_amount.as_deref().and_then(micros);
        CallReport {
            provider_call_id: Some(self.call_uuid),
            status: Some(if ended { CallStatus::Ended } else { CallStatus::Ringing }),
            outcome: ended.then_some(outcome),
            cause_code: code,
            cause_name: self.hangup_cause_name,
            cause_source: self.hangup_source,
            duration_seconds: self.call_duration,
            bill_duration_seconds: bill,
            cost_micros,
            cost_currency: cost_micros.map(|_| "USD".to_owned()),
            started_at: self.initiation_time.as_deref().and_then(instant),
            answered_at: self.answer_time.as_deref().and_then(instant),
            ended_at: self.end_time.as_deref().and_then(instant),
            from: self.from_number.as_deref().and_then(e164),
            to: self.to_number.as_deref().and_then(e164),
            ..CallReport::default()
        }
    }
}

/// `2026-10-01 15:00:12+05:30` as RFC 3339; `None` without an offset.
fn instant(text: &str) -> Option<String> {
    chrono::DateTime::parse_from_str(text, "%Y-%m-%d %H:%M:%S%.f%:z")
        .or_else(|_| chrono::DateTime::parse_from_rfc3339(text))
        .ok()
        .map(|instant| instant.to_rfc3339())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_allowed_hosts_are_asked_to_dial() {
        let allowed = |url: &str, local| is_allowed(&Url::parse(url).unwrap(), local);
        assert!(allowed("https://api.plivo.com", false));
        assert!(!allowed("http://api.plivo.com", false));
        assert!(!allowed("https://api.plivo.com.evil.example", true));
        assert!(allowed("http://127.0.0.1:9000", true));
        assert!(!allowed("http://127.0.0.1:9000", false));
        assert!(!allowed("http://169.254.169.254", true));
    }

    #[test]
    fn a_documented_refusal_proves_that_no_line_was_seized_and_nothing_else_does() {
        let of = |status: u16, body: &str| refusal(StatusCode::from_u16(status).unwrap(), body, None);
        assert!(matches!(of(429, ""), DialOutcome::Deferred { retry_after_seconds: 5, .. }));
        assert!(matches!(of(403, r#"{"error":"Concurrency Limit Breached"}"#), DialOutcome::Deferred { .. }));
        assert!(matches!(of(403, "barred"), DialOutcome::Refused { reason: Outcome::Config, .. }));
        assert!(matches!(
            of(400, r#"{"error":"to number is invalid"}"#),
            DialOutcome::Refused { reason: Outcome::InvalidNumber, .. }
        ));
        assert!(matches!(of(401, ""), DialOutcome::Refused { .. }));
        for status in [500, 502, 503, 504, 302, 418] {
            assert!(matches!(of(status, ""), DialOutcome::Unknown { .. }), "{status}");
        }
    }

    #[test]
    fn a_record_s_time_needs_its_offset() {
        assert_eq!(instant("2026-10-01 15:00:12+05:30").as_deref(), Some("2026-10-01T15:00:12+05:30"));
        assert_eq!(instant("2026-10-01 15:00:12"), None);
    }
}
