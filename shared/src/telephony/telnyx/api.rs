//! Telnyx's Call Control: dial, look up, list, hang up.
//!
//! A call carries its agent and its recording from the start, since Call Control asks for no document. The attempt is the key of the
//! command, so that the same request again within a minute is one call; and it is in the call's state, by which a list knows it.

use super::Telnyx;
use crate::{
    Error, Result,
    telephony::{
        CallReport, CallStatus, CallbackEvent, DialOutcome, Lookup, Outcome,
        api::{Account, Api, ApiRequest, Authorization, Create, Page, Payload, Reply, Span, Wanted},
        e164,
        fields::{json_count, owned, rfc3339, text},
    },
};
use base64::{Engine, engine::general_purpose::STANDARD};
use chrono::{DateTime, SecondsFormat, Utc};
use http::Method;
use serde_json::{Value, json};
use uuid::Uuid;

/// Calls of a list that are looked through.
const PAGE: &str = "250";
/// Detail records a page at most.
const RECORDS: &str = "50";

fn authorization(account: &Account) -> Result<Authorization> {
    Ok(Authorization::Bearer(account.secret("api_key")?.to_owned()))
}

/// The application that calls are made with; an account that has only one is named by it.
fn connection(account: &Account) -> &str {
    account.credentials.get("connection_id").unwrap_or(&account.sid)
}

fn client_state(attempt_id: Uuid) -> String {
    STANDARD.encode(attempt_id.to_string())
}

impl Api for Telnyx {
    fn hosts(&self) -> &'static [&'static str] {
        &["api.telnyx.com"]
    }

    fn create(&self, account: &Account, call: &Create<'_>) -> Result<ApiRequest> {
        let stream_url = call.stream_url.ok_or_else(|| Error::internal("there is no agent to take the call"))?;
        let mut body = json!({
            "connection_id": connection(account),
            "from": call.from,
            "to": call.to,
            "command_id": call.attempt_id,
            "client_state": client_state(call.attempt_id),
            "webhook_url": call.callback(CallbackEvent::Status)?,
            "webhook_url_method": "POST",
            "timeout_secs": call.ring_timeout.clamp(5, 600),
            "time_limit_secs": call.time_limit.clamp(30, 14_400),
            "answering_machine_detection": "detect",
            "stream_url": stream_url,
            "stream_track": "inbound_track",
            "stream_bidirectional_mode": "rtp",
            "stream_bidirectional_codec": "PCMU",
        });
        if call.record {
            body["record"] = json!("record-from-answer");
            body["record_channels"] = json!("dual");
            body["record_format"] = json!("mp3");
        }
        Ok(ApiRequest {
            method: Method::POST,
            url: account.url(&["v2", "calls"])?,
            authorization: authorization(account)?,
            payload: Payload::Json(body),
        })
    }

    fn created(&self, body: &Value) -> Option<String> {
        body.pointer("/data/call_control_id")?.as_str().map(str::to_owned)
    }

    fn refusal(&self, reply: &Reply) -> DialOutcome {
        let json = reply.json();
        let errors = json["errors"].as_array().map(Vec::as_slice).unwrap_or_default();
        let says = |error: &Value, words: &str| {
            ["title", "detail"].iter().any(|name| error[name].as_str().is_some_and(|text| text.contains(words)))
        };
        let is_about_callee =
            |error: &Value| error.pointer("/source/pointer").and_then(Value::as_str).is_some_and(|at| at == "/to");
        let code = errors.first().and_then(|error| error["code"].as_str());
        let status = reply.status.as_u16();
        match (status, code) {
            (403, _) if errors.iter().any(|error| says(error, "channel limit exceeded")) => reply.deferred(30, "D1"),
            (400 | 422, Some(code)) if errors.iter().any(is_about_callee) => {
                reply.refused(Outcome::InvalidNumber, code)
            }
            (400..=405 | 409 | 422, Some(code)) => reply.refused(Outcome::Config, code),
            _ => reply.by_status(),
        }
    }

    fn hang_up(&self, account: &Account, call_id: &str) -> Result<ApiRequest> {
        Ok(ApiRequest {
            method: Method::POST,
            url: account.url(&["v2", "calls", call_id, "actions", "hangup"])?,
            authorization: authorization(account)?,
            payload: Payload::Json(json!({})),
        })
    }

    /// 90018: the call has already ended.
    fn is_over(&self, reply: &Reply) -> bool {
        reply.json().pointer("/errors/0/code").and_then(Value::as_str) == Some("90018")
    }

    /// Calls that are over are not listed: those are known by their webhooks alone.
    fn look_up(&self, account: &Account, wanted: &Wanted<'_>) -> Result<Vec<ApiRequest>> {
        let asked = match wanted.provider_call_id {
            Some(call_id) => account.url(&["v2", "calls", call_id])?,
            None => {
                let mut list = account.url(&["v2", "connections", connection(account), "active_calls"])?;
                list.query_pairs_mut().append_pair("page[limit]", PAGE);
                list
            }
        };
        Ok(vec![ApiRequest::get(asked, authorization(account)?)])
    }

    /// The records of Call Control. Others tell of the same calls at the carriers behind it, each with the price of its own part.
    fn records(&self, account: &Account, span: &Span, next_page: Option<&str>) -> Result<Option<ApiRequest>> {
        let time = |at: DateTime<Utc>| at.to_rfc3339_opts(SecondsFormat::Secs, true);
        let mut list = account.url(&["v2", "detail_records"])?;
        list.query_pairs_mut()
            .append_pair("filter[record_type]", "call-control")
            .append_pair("filter[started_at][gte]", &time(span.since))
            .append_pair("filter[started_at][lt]", &time(span.until))
            .append_pair("sort", "started_at")
            .append_pair("page[number]", next_page.unwrap_or("1"))
            .append_pair("page[size]", RECORDS);
        Ok(Some(ApiRequest::get(list, authorization(account)?)))
    }

    fn recorded(&self, body: &Value) -> Option<Page> {
        let listed = body["data"].as_array()?;
        let (page, pages) =
            (body.pointer("/meta/page_number")?.as_u64()?, body.pointer("/meta/total_pages")?.as_u64()?);
        let more = !listed.is_empty() && page < pages;
        Some(Page { calls: listed.iter().map(record).collect(), next: more.then(|| (page + 1).to_string()) })
    }

    fn found(&self, wanted: &Wanted<'_>, body: &Value) -> Option<Lookup> {
        if wanted.provider_call_id.is_none() {
            let state = client_state(wanted.attempt_id);
            let is_wanted = |call: &&Value| call["client_state"].as_str() == Some(&state);
            let call = body["data"].as_array()?.iter().find(is_wanted)?;
            return Some(Lookup::Live(CallReport {
                provider_call_id: owned(call, "/call_control_id"),
                status: Some(CallStatus::Initiated),
                ..CallReport::default()
            }));
        }
        let call = body.get("data")?;
        let ended_at = text(call, "/end_time").and_then(rfc3339);
        let seconds = json_count(call, "/call_duration");
        let report = CallReport {
            provider_call_id: owned(call, "/call_control_id"),
            status: Some(if ended_at.is_some() { CallStatus::Ended } else { CallStatus::Initiated }),
            started_at: text(call, "/start_time").and_then(rfc3339),
            ..CallReport::default()
        };
        // A call that was only just asked for is not "alive" either: it is over when it has an end.
        let Some(ended_at) = ended_at else { return Some(Lookup::Live(report)) };
        let talked = seconds.is_some_and(|seconds| seconds > 0);
        Some(Lookup::Ended(CallReport {
            outcome: Some(if talked { Outcome::Answered } else { Outcome::Failed }),
            duration_seconds: seconds,
            // What is billed is told elsewhere, and stands where it was told before.
            bill_talk: true,
            ended_at: Some(ended_at),
            ..report
        }))
    }
}

/// A detail record. Its price is not taken: it is that of one part of the call, where `call.cost` tells the whole.
fn record(record: &Value) -> CallReport {
    let seconds = |name: &str| json_count(record, name).filter(|seconds| *seconds >= 0);
    CallReport {
        provider_call_id: owned(record, "/call_control_id").or_else(|| owned(record, "/telnyx_call_control_id")),
        status: Some(CallStatus::Ended),
        duration_seconds: seconds("/call_sec"),
        bill_duration_seconds: seconds("/billed_sec").or_else(|| seconds("/call_sec")),
        started_at: text(record, "/started_at").and_then(rfc3339),
        ended_at: text(record, "/finished_at").and_then(rfc3339),
        from: text(record, "/cli").and_then(e164),
        to: text(record, "/cld").and_then(e164),
        ..CallReport::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telephony::{
        api::replies::{is_deferred, is_refused, the_rest_is_unknown},
        carrier::Credentials,
    };

    fn body(code: &str, title: &str, pointer: &str) -> String {
        json!({ "errors": [{ "code": code, "title": title, "source": { "pointer": pointer } }] }).to_string()
    }

    #[test]
    fn each_documented_error_has_its_outcome() {
        is_deferred("telnyx", 403, &body("10010", "User channel limit exceeded D1", ""), 30, "D1");
        is_deferred("telnyx", 429, &body("10011", "Too many requests", ""), 5, "429");
        is_refused("telnyx", 403, &body("10010", "Authorization failed", ""), Outcome::Config, "10010");
        is_refused("telnyx", 401, &body("10009", "Authentication failed", ""), Outcome::Config, "10009");
        is_refused("telnyx", 402, &body("20100", "Insufficient funds", ""), Outcome::Config, "20100");
        is_refused("telnyx", 422, &body("10016", "Invalid number", "/to"), Outcome::InvalidNumber, "10016");
        is_refused("telnyx", 422, &body("10016", "Invalid number", "/from"), Outcome::Config, "10016");
        is_refused("telnyx", 422, "", Outcome::Config, "422");
        the_rest_is_unknown("telnyx", &body("10010", "User channel limit exceeded D1", ""));
    }

    #[test]
    fn the_attempt_is_what_a_list_knows_a_call_by() {
        let attempt_id = Uuid::from_u128(7);
        let wanted = Wanted { attempt_id, provider_call_id: None, from: "", to: "", since: Utc::now(), others: &[] };
        let list = |state: String| json!({ "data": [{ "call_control_id": "v3:a", "client_state": state }] });
        let found = Telnyx.found(&wanted, &list(client_state(attempt_id)));
        assert!(matches!(found, Some(Lookup::Live(call)) if call.provider_call_id.as_deref() == Some("v3:a")));
        assert_eq!(Telnyx.found(&wanted, &list(client_state(Uuid::nil()))), None);
    }

    #[test]
    fn a_call_is_over_when_it_has_an_end() {
        let wanted = Wanted {
            attempt_id: Uuid::nil(),
            provider_call_id: Some("v3:a"),
            from: "",
            to: "",
            since: Utc::now(),
            others: &[],
        };
        let call = |end: Value| json!({ "data": { "call_control_id": "v3:a", "is_alive": false, "end_time": end, "call_duration": 12 } });
        assert!(matches!(Telnyx.found(&wanted, &call(Value::Null)), Some(Lookup::Live(_))));
        let Some(Lookup::Ended(report)) = Telnyx.found(&wanted, &call(json!("2026-09-21T13:33:20.000000Z"))) else {
            panic!("not over")
        };
        assert_eq!((report.outcome, report.duration_seconds), (Some(Outcome::Answered), Some(12)));
        assert_eq!((report.bill_duration_seconds, report.bill_talk), (None, true));
    }

    #[test]
    fn records_are_read_page_by_page_with_the_seconds_of_the_bill() {
        let credentials = Credentials::read(r#"{"api_key":"KEY"}"#);
        let account = Account::new(&Telnyx, "app", credentials, "https://api.telnyx.com", false).unwrap();
        let at = |text: &str| text.parse::<DateTime<Utc>>().unwrap();
        let span = Span { since: at("2026-09-20T10:00:00Z"), until: at("2026-09-22T14:00:00Z") };
        let asked = |page| Telnyx.records(&account, &span, page).unwrap().unwrap().url;
        let query: Vec<(String, String)> = asked(None).query_pairs().into_owned().collect();
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(
            query,
            [
                pair("filter[record_type]", "call-control"),
                pair("filter[started_at][gte]", "2026-09-20T10:00:00Z"),
                pair("filter[started_at][lt]", "2026-09-22T14:00:00Z"),
                pair("sort", "started_at"),
                pair("page[number]", "1"),
                pair("page[size]", "50"),
            ]
        );
        assert!(asked(Some("2")).query().unwrap().contains("page%5Bnumber%5D=2"));

        let record = |id: &str| {
            json!({
                "record_type": "call-control", "call_control_id": id, "cli": "+14155550111", "cld": "+14155550100", "call_sec": 37,
                "billed_sec": 60, "cost": "0.002", "currency": "USD", "started_at": "2026-09-21T13:32:43Z",
                "finished_at": "2026-09-21T13:33:20Z",
            })
        };
        let page = |number: u64| {
            let body = json!({ "data": [record("v3:a")], "meta": { "page_number": number, "total_pages": 2, "total_results": 51 } });
            Telnyx.recorded(&body).unwrap()
        };
        let first = page(1);
        assert_eq!((first.next.as_deref(), page(2).next), (Some("2"), None));
        let call = &first.calls[0];
        assert_eq!((call.provider_call_id.as_deref(), call.bill_duration_seconds), (Some("v3:a"), Some(60)));
        assert_eq!((call.started_at.as_deref(), call.cost_micros), (Some("2026-09-21T13:32:43Z"), None));
        assert!(Telnyx.recorded(&json!({ "errors": [] })).is_none());
    }
}
