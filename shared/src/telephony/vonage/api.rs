//! Vonage's Voice API: create, look up, list, hang up.

use super::{Vonage, callback::outcome, token::token};
use crate::{
    Result,
    telephony::{
        CallReport, CallStatus, CallbackEvent, DialOutcome, Lookup, Outcome,
        api::{Account, Api, ApiRequest, Authorization, Create, Page, Payload, Reply, Span, Wanted},
        e164,
        fields::{json_count, owned, rfc3339, text},
        micros,
    },
};
use chrono::{DateTime, SecondsFormat, Utc};
use http::Method;
use serde_json::{Value, json};

/// Calls a page, at most.
const PAGE: u32 = 100;
/// Pages that are looked through for a call: at three new ones a second, those of a minute and a half.
const PAGES: u32 = 3;

fn authorization(account: &Account) -> Result<Authorization> {
    Ok(Authorization::Bearer(token(account.secret("application_id")?, account.secret("private_key")?)?))
}

impl Api for Vonage {
    fn hosts(&self) -> &'static [&'static str] {
        &["api.nexmo.com", "api-us-1.nexmo.com", "api-us-2.nexmo.com", "api-eu-1.nexmo.com", "api-ap-1.nexmo.com"]
    }

    fn create(&self, account: &Account, call: &Create<'_>) -> Result<ApiRequest> {
        // Numbers have no plus sign there.
        let phone = |number: &str| json!({ "type": "phone", "number": number.trim_start_matches('+') });
        let body = json!({
            "to": [phone(call.to)],
            "from": phone(call.from),
            "answer_url": [call.callback(CallbackEvent::Answer)?],
            // The query of a GET would not be signed.
            "answer_method": "POST",
            "event_url": [call.callback(CallbackEvent::Status)?],
            "event_method": "POST",
            "machine_detection": "continue",
            "length_timer": call.time_limit.clamp(1, 86_400),
            "ringing_timer": call.ring_timeout.clamp(1, 120),
        });
        Ok(ApiRequest {
            method: Method::POST,
            url: account.url(&["v1", "calls"])?,
            authorization: authorization(account)?,
            payload: Payload::Json(body),
        })
    }

    fn created(&self, body: &Value) -> Option<String> {
        body["uuid"].as_str().map(str::to_owned)
    }

    fn refusal(&self, reply: &Reply) -> DialOutcome {
        let json = reply.json();
        let is_to = |name: &str| name == "to" || name.starts_with("to.") || name.starts_with("to[");
        // A list of names and reasons, or an object of them.
        let is_about_callee = match &json["invalid_parameters"] {
            Value::Array(list) => list.iter().any(|item| item["name"].as_str().is_some_and(is_to)),
            Value::Object(object) => object.keys().any(|name| is_to(name)),
            _ => false,
        };
        match reply.status.as_u16() {
            code @ (400 | 422) if is_about_callee => reply.refused(Outcome::InvalidNumber, code),
            // Three new calls a second.
            429 => reply.deferred(1, 429),
            _ => reply.by_status(),
        }
    }

    fn hang_up(&self, account: &Account, call_id: &str) -> Result<ApiRequest> {
        Ok(ApiRequest {
            method: Method::PUT,
            url: account.url(&["v1", "calls", call_id])?,
            authorization: authorization(account)?,
            payload: Payload::Json(json!({ "action": "hangup" })),
        })
    }

    /// A list is of all that were made since, whoever was called: the wanted one is among the first, however many came after it.
    fn look_up(&self, account: &Account, wanted: &Wanted<'_>) -> Result<Vec<ApiRequest>> {
        if let Some(call_id) = wanted.provider_call_id {
            return Ok(vec![ApiRequest::get(account.url(&["v1", "calls", call_id])?, authorization(account)?)]);
        }
        let page = |page: u32| {
            let mut list = account.url(&["v1", "calls"])?;
            list.query_pairs_mut()
                .append_pair("date_start", &wanted.since.to_rfc3339_opts(SecondsFormat::Secs, true))
                .append_pair("order", "asc")
                .append_pair("page_size", &PAGE.to_string())
                .append_pair("record_index", &(page * PAGE).to_string());
            Ok(ApiRequest::get(list, authorization(account)?))
        };
        (0..PAGES).map(page).collect()
    }

    fn records(&self, account: &Account, span: &Span, next_page: Option<&str>) -> Result<Option<ApiRequest>> {
        let time = |at: DateTime<Utc>| at.to_rfc3339_opts(SecondsFormat::Secs, true);
        let mut list = account.url(&["v1", "calls"])?;
        list.query_pairs_mut()
            .append_pair("date_start", &time(span.since))
            .append_pair("date_end", &time(span.until))
            .append_pair("order", "asc")
            .append_pair("page_size", &PAGE.to_string())
            .append_pair("record_index", next_page.unwrap_or("0"));
        Ok(Some(ApiRequest::get(list, authorization(account)?)))
    }

    fn recorded(&self, body: &Value) -> Option<Page> {
        let listed = body.pointer("/_embedded/calls")?.as_array()?;
        let next = body["record_index"].as_u64().unwrap_or(0) + listed.len() as u64;
        let more = !listed.is_empty() && next < body["count"].as_u64()?;
        Some(Page { calls: listed.iter().filter_map(report).collect(), next: more.then(|| next.to_string()) })
    }

    fn found(&self, wanted: &Wanted<'_>, body: &Value) -> Option<Lookup> {
        let report = match wanted.provider_call_id {
            Some(_) => report(body)?,
            None => body
                .pointer("/_embedded/calls")?
                .as_array()?
                .iter()
                .filter_map(report)
                // Of two the later: an earlier call to somebody is another attempt's.
                .rfind(|call| call.from == e164(wanted.from) && call.to == e164(wanted.to) && wanted.is(call))?,
        };
        Some(if report.status == Some(CallStatus::Ended) { Lookup::Ended(report) } else { Lookup::Live(report) })
    }
}

/// A call as Vonage keeps it. Its start is that of the ringing, or of the talk.
fn report(call: &Value) -> Option<CallReport> {
    let given = text(call, "/status")?;
    let status = match given {
        "ringing" => CallStatus::Ringing,
        "answered" | "machine" | "human" => CallStatus::InProgress,
        "completed" | "busy" | "cancelled" | "failed" | "rejected" | "timeout" | "unanswered" => CallStatus::Ended,
        _ => CallStatus::Initiated,
    };
    let number = |name: &str| {
        ["number", "0/number"].iter().find_map(|path| text(call, &format!("/{name}/{path}"))).and_then(e164)
    };
    let ended = status == CallStatus::Ended;
    let seconds = json_count(call, "/duration").filter(|_| ended);
    let started_at = text(call, "/start_time").and_then(rfc3339);
    let cost_micros = text(call, "/price").and_then(micros).filter(|cost| ended && *cost >= 0);
    Some(CallReport {
        provider_call_id: owned(call, "/uuid"),
        status: Some(status),
        outcome: ended.then(|| outcome(given, None)),
        cause_name: (ended && given != "completed").then(|| given.to_owned()),
        duration_seconds: seconds,
        bill_duration_seconds: seconds,
        cost_micros,
        cost_currency: cost_micros.map(|_| "EUR".to_owned()),
        answered_at: started_at.clone().filter(|_| seconds.is_some_and(|seconds| seconds > 0)),
        started_at,
        ended_at: text(call, "/end_time").and_then(rfc3339).filter(|_| ended),
        from: number("from"),
        to: number("to"),
        ..CallReport::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telephony::api::replies::{is_deferred, is_refused, the_rest_is_unknown};
    use chrono::{DateTime, Utc};
    use uuid::Uuid;

    #[test]
    fn each_documented_error_has_its_outcome() {
        is_deferred("vonage", 429, "", 1, "429");
        for to in [
            json!({ "invalid_parameters": [{ "name": "to[0].number", "reason": "r" }] }),
            json!({ "invalid_parameters": { "to": "r" } }),
        ] {
            is_refused("vonage", 400, &to.to_string(), Outcome::InvalidNumber, "400");
        }
        for other in ["", r#"{"invalid_parameters":[{"name":"from"}]}"#, r#"{"invalid_parameters":{"token":"r"}}"#] {
            is_refused("vonage", 400, other, Outcome::Config, "400");
        }
        for status in [401, 402, 403, 404] {
            is_refused("vonage", status, "", Outcome::Config, &status.to_string());
        }
        the_rest_is_unknown("vonage", r#"{"invalid_parameters":{"to":"r"}}"#);
    }

    #[test]
    fn a_list_holds_other_calls_too() {
        let since: DateTime<Utc> = "2026-09-21T13:00:00Z".parse().unwrap();
        let wanted = Wanted {
            attempt_id: Uuid::nil(),
            provider_call_id: None,
            from: "+14155550111",
            to: "+14155550100",
            since,
            others: &[],
        };
        let call = |uuid: &str, to: &str, at: &str| {
            json!({
                "uuid": uuid, "status": "completed", "to": { "type": "phone", "number": to },
                "from": { "type": "phone", "number": "14155550111" }, "start_time": at, "end_time": at,
                "duration": "60", "price": "0.01", "rate": "0.01",
            })
        };
        let calls = json!({ "_embedded": { "calls": [
            call("a", "14155550199", "2026-09-21T13:33:20.000Z"),
            call("b", "14155550100", "2026-09-21T12:33:20.000Z"),
            call("c", "14155550100", "2026-09-21T13:33:20.000Z"),
        ] } });
        let Some(Lookup::Ended(report)) = Vonage.found(&wanted, &calls) else { panic!("not found") };
        assert_eq!((report.provider_call_id.as_deref(), report.cost_micros), (Some("c"), Some(10_000)));
        let twice = json!({ "_embedded": { "calls": [
            call("c", "14155550100", "2026-09-21T13:33:20.000Z"), call("d", "14155550100", "2026-09-21T13:33:50.000Z"),
        ] } });
        let Some(Lookup::Ended(later)) = Vonage.found(&wanted, &twice) else { panic!("not found") };
        assert_eq!(later.provider_call_id.as_deref(), Some("d"));
    }
}
