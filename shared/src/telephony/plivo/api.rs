//! Plivo's call API: create, look up, list, hang up.

use crate::{
    Result,
    telephony::{
        CallReport, CallStatus, CallbackEvent, DialOutcome, Lookup, Outcome,
        api::{Account, Api, ApiRequest, Authorization, Create, Page, Payload, Reply, Span, Wanted},
        e164, micros,
        plivo::{Plivo, callback},
    },
};
use http::Method;
use serde::Deserialize;
use serde_json::{Value, json};
use url::Url;

fn authorization(account: &Account) -> Result<Authorization> {
    Ok(Authorization::Basic(account.sid.clone(), account.secret("auth_token")?.to_owned()))
}

fn url(account: &Account, path: &[&str]) -> Result<Url> {
    let path: Vec<&str> = ["v1", "Account", &account.sid, "Call"].iter().chain(path).chain(&[""]).copied().collect();
    account.url(&path)
}

impl Api for Plivo {
    fn hosts(&self) -> &'static [&'static str] {
        &["api.plivo.com"]
    }

    /// By default it does not try again what we answer with 5xx.
    fn retries(&self) -> &'static str {
        "#rc=3&rp=ct,rt,5xx&rt=5000"
    }

    fn create(&self, account: &Account, call: &Create<'_>) -> Result<ApiRequest> {
        let body = json!({
            "from": call.from,
            "to": call.to,
            "answer_url": call.callback(CallbackEvent::Answer)?,
            "ring_url": call.callback(CallbackEvent::Ring)?,
            // It would default to `answer_url`.
            "hangup_url": call.callback(CallbackEvent::Hangup)?,
            "ring_timeout": call.ring_timeout,
            "time_limit": call.time_limit,
            // In the background, and reported with the hang-up.
            "machine_detection": "true",
        });
        Ok(ApiRequest {
            method: Method::POST,
            url: url(account, &[])?,
            authorization: authorization(account)?,
            payload: Payload::Json(body),
        })
    }

    fn created(&self, body: &Value) -> Option<String> {
        body["request_uuid"].as_str().map(str::to_owned)
    }

    fn refusal(&self, reply: &Reply) -> DialOutcome {
        let body = String::from_utf8_lossy(&reply.body).to_ascii_lowercase();
        match reply.status.as_u16() {
            // India's limit, which is hard: what is beyond it is not queued.
            403 if body.contains("concurrency") => reply.deferred(30, 5_030),
            400 if body.contains("invalid") && (body.contains("to number") || body.contains("destination")) => {
                reply.refused(Outcome::InvalidNumber, 400)
            }
            _ => reply.by_status(),
        }
    }

    fn hang_up(&self, account: &Account, call_id: &str) -> Result<ApiRequest> {
        Ok(ApiRequest {
            method: Method::DELETE,
            url: url(account, &[call_id])?,
            authorization: authorization(account)?,
            payload: Payload::Nothing,
        })
    }

    /// A live call is not in the records yet, and one that is over not among the live ones.
    fn look_up(&self, account: &Account, wanted: &Wanted<'_>) -> Result<Vec<ApiRequest>> {
        let get = |url| Ok::<_, crate::Error>(ApiRequest::get(url, authorization(account)?));
        let Some(call_id) = wanted.provider_call_id else {
            let mut list = url(account, &[])?;
            list.query_pairs_mut()
                .append_pair("from_number", wanted.from.trim_start_matches('+'))
                .append_pair("to_number", wanted.to.trim_start_matches('+'))
                .append_pair("limit", "1")
                .append_pair("offset", "0");
            return Ok(vec![get(list)?]);
        };
        let record = url(account, &[call_id])?;
        let mut live = record.clone();
        live.set_query(Some("status=live"));
        Ok(vec![get(live)?, get(record)?])
    }

    fn records(&self, account: &Account, span: &Span, next_page: Option<&str>) -> Result<Option<ApiRequest>> {
        let time = |at: chrono::DateTime<chrono::Utc>| at.format("%Y-%m-%d %H:%M:%S").to_string();
        let mut list = url(account, &[])?;
        list.query_pairs_mut()
            .append_pair("end_time__gte", &time(span.since))
            .append_pair("end_time__lt", &time(span.until))
            .append_pair("limit", &PAGE.to_string())
            .append_pair("offset", next_page.unwrap_or("0"));
        Ok(Some(ApiRequest::get(list, authorization(account)?)))
    }

    fn recorded(&self, body: &Value) -> Option<Page> {
        let calls =
            body["objects"].as_array()?.iter().filter_map(|call| Some(Record::deserialize(call).ok()?.report()));
        let next = body["meta"]["next"].as_str().and(body["meta"]["offset"].as_u64()).map(|at| (at + PAGE).to_string());
        Some(Page { calls: calls.collect(), next })
    }

    fn found(&self, wanted: &Wanted<'_>, body: &Value) -> Option<Lookup> {
        if let (Some(call_id), Some(status)) = (wanted.provider_call_id, body["call_status"].as_str()) {
            let status = if status == "in-progress" { CallStatus::InProgress } else { CallStatus::Ringing };
            return Some(Lookup::Live(CallReport {
                provider_call_id: Some(call_id.to_owned()),
                status: Some(status),
                ..CallReport::default()
            }));
        }
        let record = if wanted.provider_call_id.is_some() { body } else { body.pointer("/objects/0")? };
        let record = Record::deserialize(record).ok()?;
        let ended = record.end_time.is_some();
        let report = record.report();
        wanted.is(&report).then_some(if ended { Lookup::Ended(report) } else { Lookup::Live(report) })
    }
}

/// As many records as a page may have.
const PAGE: u64 = 20;

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
    /// How long was talked.
    #[serde(default)]
    bill_duration: Option<i64>,
    /// The same in whole pulses: what is charged, and what the hang-up's `BillDuration` says.
    #[serde(default)]
    billed_duration: Option<i64>,
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
        let bill = self.billed_duration.or(self.bill_duration).filter(|seconds| *seconds >= 0);
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
    use crate::telephony::api::replies::{is_deferred, is_refused, the_rest_is_unknown};

    #[test]
    fn a_documented_refusal_proves_that_no_line_was_seized_and_nothing_else_does() {
        is_deferred("plivo", 429, "", 5, "429");
        is_deferred("plivo", 403, r#"{"error":"Concurrency Limit Breached"}"#, 30, "5030");
        is_refused("plivo", 403, "barred", Outcome::Config, "403");
        is_refused("plivo", 400, r#"{"error":"to number is invalid"}"#, Outcome::InvalidNumber, "400");
        for status in [400, 401, 402, 403, 404, 405, 409, 422] {
            is_refused("plivo", status, "", Outcome::Config, &status.to_string());
        }
        the_rest_is_unknown("plivo", r#"{"error":"Concurrency Limit Breached"}"#);
    }

    #[test]
    fn a_record_s_time_needs_its_offset() {
        assert_eq!(instant("2026-10-01 15:00:12+05:30").as_deref(), Some("2026-10-01T15:00:12+05:30"));
        assert_eq!(instant("2026-10-01 15:00:12"), None);
    }
}
