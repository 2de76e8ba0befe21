//! Telnyx's callbacks: Call Control's JSON envelope, or TeXML's form, in; a [`CallReport`] out.

use crate::telephony::{
    CallReport, CallStatus, CallbackEvent, Outcome, Recording, Stream, StreamStatus, Transfer, TransferStatus,
    carrier::Callback,
    e164,
    fields::{excerpt, json_count, owned, rfc3339, seconds_between, text},
    micros, twilio,
};
use serde_json::Value;

/// Reads a callback that came to the URL of `event`. `None` when it is neither an event nor a form that names a call.
pub fn parse(event: CallbackEvent, body: &[u8]) -> Option<Callback> {
    if !body.trim_ascii_start().starts_with(b"{") {
        return twilio::callback::parse(event, body);
    }
    let envelope: Value = serde_json::from_slice(body).ok()?;
    let data = envelope.get("data")?;
    let name = text(data, "/event_type")?;
    let payload = data.get("payload").unwrap_or(&Value::Null);
    let call_id = owned(payload, "/call_control_id");
    // Each event has an id, which stays the same when it is sent again.
    let dedupe_key = owned(data, "/id").or_else(|| call_id.clone().map(|call| format!("{call}|{name}")))?;
    let mut report = CallReport {
        provider_call_id: call_id,
        from: text(payload, "/from").and_then(e164),
        to: text(payload, "/to").and_then(e164),
        inbound: event == CallbackEvent::Inbound,
        ..CallReport::default()
    };
    let at = text(data, "/occurred_at").and_then(rfc3339);
    match (event, name) {
        // Only the leg of the person tells its steps to this URL.
        (CallbackEvent::Dial, _) if name.starts_with("call.") => leg(name, payload, &mut report),
        (_, "call.initiated") => {
            let incoming = text(payload, "/direction") == Some("incoming");
            report.status = Some(if incoming { CallStatus::Ringing } else { CallStatus::Initiated });
            report.started_at = at;
        }
        (_, "call.answered") => {
            report.status = Some(CallStatus::InProgress);
            report.answered_at = at;
            report.bill_talk = true;
        }
        (_, "call.bridged") => report.transfer = Some(Transfer { leg: None, status: TransferStatus::Answered }),
        (_, "call.hangup") => hangup(payload, at, &mut report),
        (_, "call.cost") => cost(payload, &mut report),
        (_, "call.recording.saved") => recording(payload, &mut report),
        (_, "call.recording.error") => {
            let reason = text(payload, "/reason").or_else(|| text(payload, "/error")).unwrap_or_default();
            report.notice = Some(format!("call.recording.error {}", excerpt(reason)).trim_end().to_owned());
        }
        (_, "streaming.started") => report.stream = stream(payload, StreamStatus::Started),
        (_, "streaming.stopped") => report.stream = stream(payload, StreamStatus::Stopped),
        (_, "streaming.failed") => report.stream = stream(payload, StreamStatus::Failed),
        // What was pressed is the agent's business.
        (_, "call.dtmf.received") => {}
        (_, name) if name.starts_with("call.machine.") => machine(payload, &mut report),
        (_, name) => report.unmapped = Some(("event_type", excerpt(name))),
    }
    Some(Callback { dedupe_key, report, wants_document: false })
}

fn hangup(payload: &Value, at: Option<String>, report: &mut CallReport) {
    let cause = text(payload, "/hangup_cause").unwrap_or_default();
    let (outcome, is_known) = outcome(cause);
    report.status = Some(CallStatus::Ended);
    report.outcome = Some(outcome);
    report.cause_code = owned(payload, "/sip_hangup_cause");
    report.cause_name = owned(payload, "/hangup_cause");
    report.cause_source = owned(payload, "/hangup_source");
    report.ended_at = text(payload, "/end_time").and_then(rfc3339).or(at);
    report.bill_talk = true;
    if !is_known {
        report.unmapped = Some(("hangup_cause", excerpt(cause)));
    }
}

/// How the call ended, and whether the cause is one that Telnyx documents. What is not known ends as [`Outcome::Failed`].
pub fn outcome(cause: &str) -> (Outcome, bool) {
    let outcome = match cause {
        "normal_clearing" | "time_limit" => Outcome::Answered,
        "user_busy" => Outcome::Busy,
        "timeout" | "no_answer" => Outcome::NoAnswer,
        "call_rejected" => Outcome::Rejected,
        "not_found" => Outcome::InvalidNumber,
        "originator_cancel" => Outcome::Cancelled,
        "unspecified" => Outcome::CarrierTransient,
        _ => return (Outcome::Failed, false),
    };
    (outcome, true)
}

/// The price comes after the end, where the application is set to tell it. Its seconds are those of the bill: they take the place of
/// the talk's, which are all that is known until then.
fn cost(payload: &Value, report: &mut CallReport) {
    let amount = match payload.get("total_cost") {
        Some(Value::Number(number)) => micros(&number.to_string()),
        Some(Value::String(text)) => micros(text),
        _ => None,
    };
    match text(payload, "/status") {
        Some("success") | None => {
            report.cost_micros = amount.filter(|cost| *cost >= 0);
            report.bill_duration_seconds = json_count(payload, "/billed_duration_secs");
            report.settles = report.bill_duration_seconds.is_some();
            let currency =
                text(payload, "/cost_parts/0/currency").or_else(|| text(payload, "/currency")).unwrap_or("USD");
            let is_currency = currency.len() == 3 && currency.bytes().all(|byte| byte.is_ascii_alphabetic());
            report.cost_currency = report.cost_micros.filter(|_| is_currency).map(|_| currency.to_ascii_uppercase());
        }
        Some("error") => report.notice = Some("call.cost status=error".to_owned()),
        Some(other) => report.unmapped = Some(("call.cost status", excerpt(other))),
    }
}

fn recording(payload: &Value, report: &mut CallReport) {
    let url = ["recording_urls", "public_recording_urls"].iter().find_map(|urls| {
        let urls = payload.get(urls)?;
        owned(urls, "/mp3").or_else(|| owned(urls, "/wav"))
    });
    let length = json_count(payload, "/duration_millis")
        .map(|millis| millis / 1_000)
        .or_else(|| seconds_between(text(payload, "/recording_started_at")?, text(payload, "/recording_ended_at")?));
    report.recording = url.map(|url| Recording { id: owned(payload, "/recording_id"), url, duration_seconds: length });
}

fn stream(payload: &Value, status: StreamStatus) -> Option<Stream> {
    let error = owned(payload, "/failure_reason").or_else(|| owned(payload, "/stream_params/failure_reason"));
    Some(Stream { id: owned(payload, "/stream_id"), status, error })
}

fn machine(payload: &Value, report: &mut CallReport) {
    let result = text(payload, "/result").unwrap_or_default();
    report.machine = match result {
        "human" | "human_residence" | "human_business" => Some(false),
        "machine" | "fax_detected" | "beep_detected" => Some(true),
        // It could not tell, or tells of a greeting what the detection has told already.
        "not_sure" | "silence" | "ended" | "no_beep_detected" | "prompt_ended" => None,
        other => {
            report.unmapped = Some(("machine detection result", excerpt(other)));
            None
        }
    };
}

/// A step of the leg that the call was transferred to: its id is not the call's, and neither is how it ends.
fn leg(name: &str, payload: &Value, report: &mut CallReport) {
    let status = match (name, text(payload, "/hangup_cause").unwrap_or_default()) {
        ("call.initiated", _) => TransferStatus::Initiated,
        ("call.answered" | "call.bridged", _) => TransferStatus::Answered,
        ("call.hangup", "normal_clearing" | "time_limit") => TransferStatus::Completed,
        ("call.hangup", "user_busy") => TransferStatus::Busy,
        ("call.hangup", "timeout" | "no_answer") => TransferStatus::NoAnswer,
        ("call.hangup", "originator_cancel") => TransferStatus::Cancelled,
        ("call.hangup", _) => TransferStatus::Failed,
        _ => return,
    };
    let leg = report.provider_call_id.take();
    (report.from, report.to) = (None, None);
    report.transfer = Some(Transfer { leg, status });
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(event: CallbackEvent, name: &str, payload: Value) -> CallReport {
        let mut payload = payload;
        payload["call_control_id"] = json!("v3:abc");
        let body = json!({
            "data": { "event_type": name, "id": "e1", "occurred_at": "2026-09-21T13:33:20.000000Z", "payload": payload }
        });
        let callback = parse(event, body.to_string().as_bytes()).unwrap();
        assert_eq!(callback.dedupe_key, "e1");
        callback.report
    }

    #[test]
    fn a_call_s_events_tell_its_life() {
        let event = |name: &str, payload: Value| read(CallbackEvent::Status, name, payload);
        assert_eq!(event("call.initiated", json!({ "direction": "outgoing" })).status, Some(CallStatus::Initiated));
        assert_eq!(event("call.initiated", json!({ "direction": "incoming" })).status, Some(CallStatus::Ringing));
        let answered = event("call.answered", json!({ "from": "+14155550111" }));
        assert_eq!(
            (answered.status, answered.answered_at.as_deref()),
            (Some(CallStatus::InProgress), Some("2026-09-21T13:33:20Z"))
        );
        let hangup = event(
            "call.hangup",
            json!({ "hangup_cause": "normal_clearing", "hangup_source": "callee", "sip_hangup_cause": "200" }),
        );
        assert_eq!((hangup.status, hangup.outcome), (Some(CallStatus::Ended), Some(Outcome::Answered)));
        assert_eq!((hangup.cause_code.as_deref(), hangup.cause_source.as_deref()), (Some("200"), Some("callee")));
        assert_eq!(
            event("streaming.failed", json!({ "stream_id": "s" })).stream.map(|s| s.status),
            Some(StreamStatus::Failed)
        );
        let cost =
            event("call.cost", json!({ "status": "success", "total_cost": "0.0042", "billed_duration_secs": 60 }));
        assert_eq!(
            (cost.cost_micros, cost.cost_currency.as_deref(), cost.bill_duration_seconds, cost.settles),
            (Some(4_200), Some("USD"), Some(60), true)
        );
        let failed = event("call.cost", json!({ "status": "error", "billed_duration_secs": 60 }));
        assert_eq!((failed.bill_duration_seconds, failed.settles), (None, false));
        let saved = event(
            "call.recording.saved",
            json!({ "recording_id": "r", "recording_urls": { "mp3": "https://r/1.mp3" },
                    "recording_started_at": "2026-09-21T13:32:43Z", "recording_ended_at": "2026-09-21T13:33:20Z" }),
        );
        assert_eq!(
            saved.recording.map(|recording| (recording.url, recording.duration_seconds)),
            Some(("https://r/1.mp3".to_owned(), Some(37)))
        );
    }

    #[test]
    fn every_cause_that_telnyx_names_has_an_outcome() {
        for (cause, expected) in [
            ("call_rejected", Outcome::Rejected),
            ("normal_clearing", Outcome::Answered),
            ("originator_cancel", Outcome::Cancelled),
            ("timeout", Outcome::NoAnswer),
            ("time_limit", Outcome::Answered),
            ("user_busy", Outcome::Busy),
            ("not_found", Outcome::InvalidNumber),
            ("no_answer", Outcome::NoAnswer),
            ("unspecified", Outcome::CarrierTransient),
        ] {
            assert_eq!(outcome(cause), (expected, true), "{cause}");
        }
        let report = read(CallbackEvent::Hangup, "call.hangup", json!({ "hangup_cause": "solar_flare" }));
        assert_eq!((report.outcome, report.cause_name.as_deref()), (Some(Outcome::Failed), Some("solar_flare")));
        assert_eq!(report.unmapped, Some(("hangup_cause", "solar_flare".to_owned())));
    }

    #[test]
    fn a_machine_is_told_by_every_kind_of_detection() {
        for (name, result, machine) in [
            ("call.machine.detection.ended", "human", Some(false)),
            ("call.machine.detection.ended", "machine", Some(true)),
            ("call.machine.detection.ended", "not_sure", None),
            ("call.machine.greeting.ended", "beep_detected", Some(true)),
            ("call.machine.greeting.ended", "ended", None),
            ("call.machine.premium.detection.ended", "human_residence", Some(false)),
            ("call.machine.premium.detection.ended", "human_business", Some(false)),
            ("call.machine.premium.detection.ended", "fax_detected", Some(true)),
            ("call.machine.premium.detection.ended", "silence", None),
            ("call.machine.premium.greeting.ended", "no_beep_detected", None),
        ] {
            let report = read(CallbackEvent::Machine, name, json!({ "result": result }));
            assert_eq!((report.machine, report.unmapped), (machine, None), "{name} {result}");
        }
        assert!(
            read(CallbackEvent::Machine, "call.machine.detection.ended", json!({ "result": "parrot" }))
                .unmapped
                .is_some()
        );
    }

    #[test]
    fn a_leg_s_end_is_not_the_call_s() {
        let report = read(CallbackEvent::Dial, "call.hangup", json!({ "hangup_cause": "user_busy" }));
        assert_eq!((report.status, report.provider_call_id), (None, None));
        assert_eq!(report.transfer, Some(Transfer { leg: Some("v3:abc".to_owned()), status: TransferStatus::Busy }));
    }

    #[test]
    fn texml_speaks_in_forms() {
        let callback =
            parse(CallbackEvent::Answer, b"CallSid=v3:abc&CallStatus=in-progress&From=%2B14155550111").unwrap();
        assert!(callback.wants_document);
        assert_eq!(callback.report.status, Some(CallStatus::InProgress));
        assert_eq!(parse(CallbackEvent::Status, br#"{"data":{}}"#), None);
    }
}
