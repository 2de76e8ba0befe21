//! Twilio's Calls API: create, look up, list, hang up.

use super::{Twilio, callback::outcome};
use crate::{
    Result,
    telephony::{
        CallReport, CallStatus, CallbackEvent, DialOutcome, Lookup, Outcome,
        api::{Account, Api, ApiRequest, Authorization, Create, Page, Payload, Reply, Span, Wanted},
        e164,
        fields::{json_count, owned, rfc2822, text},
        micros,
    },
};
use chrono::{DateTime, SecondsFormat, TimeDelta};
use http::Method;
use serde_json::Value;

/// The steps that are told. Each is a parameter of its own: in one, parted by spaces, they leave calls at their first step.
const STEPS: [&str; 4] = ["initiated", "ringing", "answered", "completed"];

/// An API key where the account has one, and else its own token.
fn authorization(account: &Account) -> Result<Authorization> {
    let key = account.credentials.get("api_key").zip(account.credentials.get("api_secret"));
    let (name, password) = match key {
        Some(pair) => pair,
        None => (account.sid.as_str(), account.secret("auth_token")?),
    };
    Ok(Authorization::Basic(name.to_owned(), password.to_owned()))
}

fn url(account: &Account, path: &[&str]) -> Result<url::Url> {
    let path: Vec<&str> = ["2010-04-01", "Accounts", &account.sid].iter().chain(path).copied().collect();
    account.url(&path)
}

impl Api for Twilio {
    fn hosts(&self) -> &'static [&'static str] {
        &["api.twilio.com"]
    }

    /// By default it tries again only when it could not connect.
    fn retries(&self) -> &'static str {
        "#rc=3&rp=ct,rt,5xx"
    }

    fn create(&self, account: &Account, call: &Create<'_>) -> Result<ApiRequest> {
        let mut form = vec![
            ("To", call.to.to_owned()),
            ("From", call.from.to_owned()),
            ("Url", call.callback(CallbackEvent::Answer)?.to_owned()),
            ("StatusCallback", call.callback(CallbackEvent::Status)?.to_owned()),
            ("Timeout", call.ring_timeout.min(600).to_string()),
            ("TimeLimit", call.time_limit.to_string()),
            // In the background: the agent does not wait for it.
            ("MachineDetection", "Enable".to_owned()),
            ("AsyncAmd", "true".to_owned()),
            ("AsyncAmdStatusCallback", call.callback(CallbackEvent::Machine)?.to_owned()),
        ];
        form.extend(STEPS.map(|step| ("StatusCallbackEvent", step.to_owned())));
        if call.record {
            // The document that connects the agent cannot ask for it.
            form.extend([
                ("Record", "true".to_owned()),
                ("RecordingChannels", "dual".to_owned()),
                ("RecordingStatusCallback", call.callback(CallbackEvent::Recording)?.to_owned()),
            ]);
        }
        Ok(ApiRequest {
            method: Method::POST,
            url: url(account, &["Calls.json"])?,
            authorization: authorization(account)?,
            payload: Payload::Form(form),
        })
    }

    fn created(&self, body: &Value) -> Option<String> {
        body["sid"].as_str().map(str::to_owned)
    }

    fn refusal(&self, reply: &Reply) -> DialOutcome {
        let code = reply.json()["code"].as_i64();
        match (reply.status.as_u16(), code) {
            // "Not processed, safe to retry."
            (429, code) => reply.deferred(5, code.unwrap_or(429)),
            (400..=499, Some(code @ 20_429)) => reply.deferred(5, code),
            (400..=499, Some(code @ 10_004)) => reply.deferred(30, code),
            (400 | 404, Some(code @ (13_224 | 21_211 | 21_214 | 21_217))) => {
                reply.refused(Outcome::InvalidNumber, code)
            }
            (400..=405 | 409 | 422, Some(code)) => reply.refused(Outcome::Config, code),
            _ => reply.by_status(),
        }
    }

    fn hang_up(&self, account: &Account, call_id: &str) -> Result<ApiRequest> {
        Ok(ApiRequest {
            method: Method::POST,
            url: url(account, &["Calls", &format!("{call_id}.json")])?,
            authorization: authorization(account)?,
            // "canceled" would end it only until it is answered.
            payload: Payload::Form(vec![("Status", "completed".to_owned())]),
        })
    }

    /// 21220: the call is not in progress.
    fn is_over(&self, reply: &Reply) -> bool {
        reply.json()["code"] == 21_220
    }

    fn look_up(&self, account: &Account, wanted: &Wanted<'_>) -> Result<Vec<ApiRequest>> {
        let asked = match wanted.provider_call_id {
            Some(call_id) => url(account, &["Calls", &format!("{call_id}.json")])?,
            None => {
                let mut list = url(account, &["Calls.json"])?;
                list.query_pairs_mut()
                    .append_pair("To", wanted.to)
                    .append_pair("From", wanted.from)
                    // The newest comes first.
                    .append_pair("PageSize", "1");
                list
            }
        };
        Ok(vec![ApiRequest::get(asked, authorization(account)?)])
    }

    /// By days, the last one included.
    fn records(&self, account: &Account, span: &Span, next_page: Option<&str>) -> Result<Option<ApiRequest>> {
        let mut list = url(account, &["Calls.json"])?;
        match next_page.and_then(|page| page.split_once('?')) {
            // It names the path too, which is ours to say.
            Some((_, query)) => list.set_query(Some(query)),
            None => {
                list.query_pairs_mut()
                    .append_pair("StartTime>", &span.since.format("%Y-%m-%d").to_string())
                    .append_pair("StartTime<", &span.until.format("%Y-%m-%d").to_string())
                    .append_pair("PageSize", "1000");
            }
        }
        Ok(Some(ApiRequest::get(list, authorization(account)?)))
    }

    fn recorded(&self, body: &Value) -> Option<Page> {
        let calls = body["calls"].as_array()?.iter().filter_map(report).collect();
        Some(Page { calls, next: owned(body, "/next_page_uri") })
    }

    fn found(&self, wanted: &Wanted<'_>, body: &Value) -> Option<Lookup> {
        let call = if wanted.provider_call_id.is_some() { body } else { body.pointer("/calls/0")? };
        let report = report(call)?;
        wanted.is(&report).then_some(match report.status {
            Some(CallStatus::Ended) => Lookup::Ended(report),
            _ => Lookup::Live(report),
        })
    }
}

/// A Call resource. It has no time of the answer: the talk is what its seconds are counted from, up to the end.
fn report(call: &Value) -> Option<CallReport> {
    let given = text(call, "/status")?;
    let status = match given {
        "queued" => CallStatus::Queued,
        "initiated" => CallStatus::Initiated,
        "ringing" => CallStatus::Ringing,
        "in-progress" => CallStatus::InProgress,
        "completed" | "busy" | "failed" | "no-answer" | "canceled" => CallStatus::Ended,
        // A word that we do not know says at least that the call is there.
        _ => CallStatus::Queued,
    };
    let time = |path| text(call, path).and_then(rfc2822);
    let ended = status == CallStatus::Ended;
    let seconds = json_count(call, "/duration").filter(|_| ended);
    let is_machine = text(call, "/answered_by").map(|by| by.starts_with("machine") || by == "fax");
    let ended_at = time("/end_time").filter(|_| ended);
    let answered_at = seconds.filter(|seconds| *seconds > 0).zip(ended_at.as_deref()).and_then(|(seconds, at)| {
        let end = DateTime::parse_from_rfc3339(at).ok()?.to_utc();
        Some((end - TimeDelta::seconds(seconds)).to_rfc3339_opts(SecondsFormat::AutoSi, true))
    });
    // What is paid is written as a negative amount, and often not yet.
    let cost_micros = text(call, "/price").and_then(|price| micros(price.trim_start_matches('-')));
    Some(CallReport {
        provider_call_id: owned(call, "/sid"),
        status: Some(status),
        outcome: ended.then(|| outcome(given, None, is_machine == Some(true)).0),
        cause_name: ended.then(|| given.to_owned()),
        duration_seconds: seconds,
        // By started minutes, as its callbacks have it.
        bill_duration_seconds: seconds.map(|seconds| (seconds as u64).div_ceil(60) as i64 * 60),
        cost_micros,
        cost_currency: cost_micros.and_then(|_| owned(call, "/price_unit")),
        started_at: time("/date_created").or_else(|| time("/start_time")),
        answered_at,
        ended_at,
        from: text(call, "/from").and_then(e164),
        to: text(call, "/to").and_then(e164),
        machine: is_machine,
        ..CallReport::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telephony::api::replies::{is_deferred, is_refused, the_rest_is_unknown};
    use chrono::Utc;
    use serde_json::json;
    use uuid::Uuid;

    #[test]
    fn each_documented_error_has_its_outcome() {
        let body = |code: i64| json!({ "code": code, "message": "m", "status": 400 }).to_string();
        is_deferred("twilio", 429, &body(20_429), 5, "20429");
        is_deferred("twilio", 429, "", 5, "429");
        is_deferred("twilio", 400, &body(10_004), 30, "10004");
        is_deferred("twilio", 403, &body(20_429), 5, "20429");
        for code in [13_224, 21_211, 21_214, 21_217] {
            is_refused("twilio", 400, &body(code), Outcome::InvalidNumber, &code.to_string());
        }
        is_refused("twilio", 401, &body(20_003), Outcome::Config, "20003");
        for code in [21_210, 21_212, 21_215, 21_216, 21_219, 21_999] {
            is_refused("twilio", 400, &body(code), Outcome::Config, &code.to_string());
        }
        is_refused("twilio", 401, "", Outcome::Config, "401");
        the_rest_is_unknown("twilio", &body(20_500));
    }

    #[test]
    fn a_call_resource_is_live_or_over() {
        let wanted = Wanted {
            attempt_id: Uuid::nil(),
            provider_call_id: Some("CA1"),
            from: "+14155550111",
            to: "+14155550100",
            since: Utc::now(),
            others: &[],
        };
        let mut call = json!({
            "sid": "CA1", "status": "completed", "from": "+14155550111", "to": "+14155550100", "duration": "61",
            "date_created": "Tue, 31 Aug 2010 20:36:28 +0000", "start_time": "Tue, 31 Aug 2010 20:36:29 +0000",
            "end_time": "Tue, 31 Aug 2010 20:37:44 +0000", "price": "-0.03000", "price_unit": "USD", "answered_by": "human",
        });
        let Some(Lookup::Ended(report)) = Twilio.found(&wanted, &call) else { panic!("not over") };
        assert_eq!((report.duration_seconds, report.bill_duration_seconds), (Some(61), Some(120)));
        assert_eq!((report.cost_micros, report.cost_currency.as_deref()), (Some(30_000), Some("USD")));
        assert_eq!(report.answered_at.as_deref(), Some("2010-08-31T20:36:43Z"));
        assert_eq!((report.outcome, report.machine), (Some(Outcome::Answered), Some(false)));
        call["status"] = json!("ringing");
        let Some(Lookup::Live(report)) = Twilio.found(&wanted, &call) else { panic!("not live") };
        assert_eq!((report.status, report.outcome), (Some(CallStatus::Ringing), None));
        // In a list it must not be an earlier one.
        let listed = Wanted { provider_call_id: None, ..wanted };
        assert_eq!(Twilio.found(&listed, &json!({ "calls": [call] })), None);
        assert_eq!(Twilio.found(&listed, &json!({ "calls": [] })), None);
    }
}
