//! Vonage's callbacks: JSON in, a [`CallReport`] out.

use crate::telephony::{
    CallReport, CallStatus, CallbackEvent, Outcome, Recording, Stream, StreamStatus, Transfer, TransferStatus,
    carrier::Callback,
    e164,
    fields::{excerpt, json_count, owned, rfc3339, seconds_between, text},
    micros,
};
use serde_json::Value;

/// Reads a callback that came to the URL of `event`. `None` when it names neither a call nor a recording.
pub fn parse(event: CallbackEvent, body: &[u8]) -> Option<Callback> {
    let body: Value = serde_json::from_slice(body).ok()?;
    let call_id = owned(&body, "/uuid");
    let status = text(&body, "/status");
    let mut report = CallReport {
        provider_call_id: call_id.clone(),
        from: text(&body, "/from").and_then(e164),
        to: text(&body, "/to").and_then(e164),
        inbound: event == CallbackEvent::Inbound,
        ..CallReport::default()
    };
    if let Some(url) = owned(&body, "/recording_url") {
        let id = owned(&body, "/recording_uuid");
        let length =
            text(&body, "/start_time").zip(text(&body, "/end_time")).and_then(|(from, to)| seconds_between(from, to));
        let dedupe_key = format!("{}|recording", id.as_deref().unwrap_or(&url));
        report.recording = Some(Recording { id, url, duration_seconds: length });
        return Some(Callback { dedupe_key, report, wants_document: false });
    }
    let call = call_id.or_else(|| owned(&body, "/conversation_uuid"))?;
    let kind = Kind::of(event, &body, status);
    let step = status.or_else(|| text(&body, "/type")).unwrap_or_default();
    match kind {
        Kind::Answer => report.status = Some(if report.inbound { CallStatus::Ringing } else { CallStatus::InProgress }),
        Kind::Status => of_call(&body, step, &mut report),
        Kind::Stream => of_stream(&call, step, &body, &mut report),
        Kind::Leg => of_leg(step, &mut report),
        Kind::Transfer => report.transfer = Some(Transfer { leg: None, status: TransferStatus::Answered }),
        // What was said or pressed is the agent's business.
        Kind::Input => {}
    }
    let dedupe_key = format!("{call}|{}|{step}", kind.as_str());
    Some(Callback { dedupe_key, report, wants_document: kind == Kind::Answer })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The request for a document: it has no status.
    Answer,
    Status,
    /// An event of the websocket's own leg, to the voice agent.
    Stream,
    /// An event of the leg to a person.
    Leg,
    Transfer,
    Input,
}

impl Kind {
    fn of(event: CallbackEvent, body: &Value, status: Option<&str>) -> Self {
        let is_socket =
            |path| text(body, path).is_some_and(|end| end.starts_with("ws://") || end.starts_with("wss://"));
        match (event, status) {
            _ if text(body, "/type") == Some("transfer") || body.get("conversation_uuid_to").is_some() => {
                Self::Transfer
            }
            (_, Some("transfer")) => Self::Transfer,
            (_, Some("input")) => Self::Input,
            (_, None) if body.get("dtmf").is_some() || body.get("speech").is_some() => Self::Input,
            // A socket that its application closed tells so under the call's events too.
            (CallbackEvent::Stream, _) | (_, Some("disconnected")) => Self::Stream,
            _ if is_socket("/to") || is_socket("/from") => Self::Stream,
            (CallbackEvent::Dial, _) => Self::Leg,
            (CallbackEvent::Answer | CallbackEvent::Inbound, None) => Self::Answer,
            _ => Self::Status,
        }
    }

    const fn as_str(self) -> &'static str {
        match self {
            Self::Answer => "answer",
            Self::Status => "status",
            Self::Stream => "stream",
            Self::Leg => "dial",
            Self::Transfer => "transfer",
            Self::Input => "input",
        }
    }
}

fn of_call(body: &Value, status: &str, report: &mut CallReport) {
    let at = text(body, "/timestamp").and_then(rfc3339);
    report.status = match status {
        "started" => Some(CallStatus::Initiated),
        "ringing" => Some(CallStatus::Ringing),
        "answered" => {
            report.answered_at = text(body, "/start_time").and_then(rfc3339).or(at);
            Some(CallStatus::InProgress)
        }
        "human" => {
            report.machine = Some(false);
            None
        }
        "machine" => {
            report.machine = Some(true);
            None
        }
        "completed" | "busy" | "cancelled" | "failed" | "rejected" | "timeout" | "unanswered" => {
            ended(body, status, at, report);
            Some(CallStatus::Ended)
        }
        other => {
            report.unmapped = Some(("status", excerpt(other)));
            None
        }
    };
}

fn ended(body: &Value, status: &str, at: Option<String>, report: &mut CallReport) {
    let sip_code = json_count(body, "/sip_code");
    report.outcome = Some(outcome(status, sip_code));
    report.duration_seconds = json_count(body, "/duration");
    report.bill_duration_seconds = report.duration_seconds;
    report.ended_at = text(body, "/end_time").and_then(rfc3339).or(at);
    if report.duration_seconds.unwrap_or(0) > 0 {
        report.answered_at = text(body, "/start_time").and_then(rfc3339);
    }
    report.cost_micros = match body.get("price") {
        Some(Value::String(price)) => micros(price),
        Some(Value::Number(price)) => micros(&price.to_string()),
        _ => None,
    }
    .filter(|cost| *cost >= 0);
    // Vonage bills every account in euros.
    report.cost_currency = report.cost_micros.map(|_| "EUR".to_owned());
    report.cause_code = sip_code.map(|code| code.to_string());
    // A plain end is no cause: one may follow the real one, and must not stand in its place.
    report.cause_name = (status != "completed")
        .then(|| owned(body, "/detail").or_else(|| owned(body, "/reason")).unwrap_or_else(|| status.to_owned()));
}

/// How the call ended. All terminal statuses that Vonage documents are here; others never end a call.
pub fn outcome(status: &str, sip_code: Option<i64>) -> Outcome {
    match (status, sip_code) {
        ("completed", _) => Outcome::Answered,
        ("busy", _) => Outcome::Busy,
        ("cancelled", _) => Outcome::Cancelled,
        ("rejected", _) => Outcome::Rejected,
        ("timeout" | "unanswered", _) => Outcome::NoAnswer,
        ("failed", Some(404 | 604)) => Outcome::InvalidNumber,
        ("failed", _) => Outcome::CarrierTransient,
        _ => Outcome::Failed,
    }
}

/// The websocket has an id of its own, which is not the call's.
fn of_stream(socket: &str, step: &str, body: &Value, report: &mut CallReport) {
    let status = match step {
        "answered" => StreamStatus::Started,
        "completed" | "cancelled" => StreamStatus::Stopped,
        "disconnected" | "failed" | "rejected" | "timeout" | "unanswered" | "busy" => StreamStatus::Failed,
        "started" | "ringing" => {
            report.provider_call_id = None;
            return;
        }
        other => {
            report.provider_call_id = None;
            report.unmapped = Some(("stream status", excerpt(other)));
            return;
        }
    };
    let error =
        (status == StreamStatus::Failed).then(|| owned(body, "/detail").or_else(|| owned(body, "/reason"))).flatten();
    report.provider_call_id = None;
    (report.from, report.to) = (None, None);
    report.stream = Some(Stream { id: Some(socket.to_owned()), status, error });
}

fn of_leg(step: &str, report: &mut CallReport) {
    let status = match step {
        "started" => TransferStatus::Initiated,
        "ringing" => TransferStatus::Ringing,
        "answered" => TransferStatus::Answered,
        "completed" => TransferStatus::Completed,
        "busy" => TransferStatus::Busy,
        "cancelled" => TransferStatus::Cancelled,
        "timeout" | "unanswered" => TransferStatus::NoAnswer,
        "failed" | "rejected" => TransferStatus::Failed,
        other => {
            report.provider_call_id = None;
            report.unmapped = Some(("leg status", excerpt(other)));
            return;
        }
    };
    let leg = report.provider_call_id.take();
    (report.from, report.to) = (None, None);
    report.transfer = Some(Transfer { leg, status });
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(event: CallbackEvent, mut body: Value) -> Callback {
        body["uuid"] = json!("u");
        body["timestamp"] = json!("2026-09-21T13:33:20.000Z");
        parse(event, body.to_string().as_bytes()).unwrap()
    }

    fn status(body: Value) -> CallReport {
        read(CallbackEvent::Status, body).report
    }

    #[test]
    fn the_end_of_a_call_tells_seconds_and_price() {
        let callback = read(
            CallbackEvent::Status,
            json!({ "status": "completed", "duration": "37", "price": "0.00617", "start_time": "2026-09-21T13:32:43.000Z",
                    "end_time": "2026-09-21T13:33:20.000Z", "from": "14155550111", "to": "14155550100" }),
        );
        assert_eq!(callback.dedupe_key, "u|status|completed");
        let report = callback.report;
        assert_eq!(
            (report.outcome, report.duration_seconds, report.cost_micros),
            (Some(Outcome::Answered), Some(37), Some(6_170))
        );
        assert_eq!(
            (report.answered_at.as_deref(), report.to.as_deref()),
            (Some("2026-09-21T13:32:43Z"), Some("+14155550100"))
        );
        assert_eq!(report.cause_name, None);
    }

    #[test]
    fn every_status_that_vonage_names_means_something() {
        for (name, expected) in [
            ("busy", Outcome::Busy),
            ("cancelled", Outcome::Cancelled),
            ("failed", Outcome::CarrierTransient),
            ("rejected", Outcome::Rejected),
            ("timeout", Outcome::NoAnswer),
            ("unanswered", Outcome::NoAnswer),
            ("completed", Outcome::Answered),
        ] {
            let report = status(json!({ "status": name }));
            assert_eq!((report.status, report.outcome), (Some(CallStatus::Ended), Some(expected)), "{name}");
        }
        assert_eq!(status(json!({ "status": "failed", "sip_code": 404 })).outcome, Some(Outcome::InvalidNumber));
        for (name, expected) in
            [("started", CallStatus::Initiated), ("ringing", CallStatus::Ringing), ("answered", CallStatus::InProgress)]
        {
            assert_eq!(status(json!({ "status": name })).status, Some(expected), "{name}");
        }
        assert_eq!(
            (status(json!({ "status": "machine" })).machine, status(json!({ "status": "human" })).machine),
            (Some(true), Some(false))
        );
        let odd = status(json!({ "status": "evaporated" }));
        assert_eq!((odd.status, odd.outcome, odd.unmapped), (None, None, Some(("status", "evaporated".to_owned()))));
    }

    #[test]
    fn a_socket_s_events_are_not_the_call_s() {
        for (event, body) in [
            (CallbackEvent::Stream, json!({ "status": "answered" })),
            (CallbackEvent::Status, json!({ "status": "answered", "to": "wss://voice.example.com/stream/x" })),
        ] {
            let report = read(event, body).report;
            assert_eq!((report.provider_call_id, report.status), (None, None));
            assert_eq!(report.stream.map(|stream| stream.status), Some(StreamStatus::Started));
        }
        let broken = status(json!({ "status": "disconnected", "reason": "closed" }));
        assert_eq!(
            broken.stream.map(|stream| (stream.status, stream.error)),
            Some((StreamStatus::Failed, Some("closed".to_owned())))
        );
    }

    #[test]
    fn a_recording_names_no_call_and_is_kept() {
        let body = json!({ "recording_url": "https://api.nexmo.com/v1/files/r", "recording_uuid": "r", "conversation_uuid": "CON-1",
                           "start_time": "2026-09-21T13:32:43Z", "end_time": "2026-09-21T13:33:19Z" });
        let callback = parse(CallbackEvent::Recording, body.to_string().as_bytes()).unwrap();
        assert_eq!((callback.dedupe_key.as_str(), callback.report.provider_call_id), ("r|recording", None));
        assert_eq!(callback.report.recording.and_then(|recording| recording.duration_seconds), Some(36));
    }

    #[test]
    fn a_document_is_wanted_where_there_is_no_status() {
        let inbound = read(CallbackEvent::Inbound, json!({ "from": "anonymous", "to": "14155550100" }));
        assert!(inbound.wants_document);
        assert_eq!((inbound.report.status, inbound.report.from), (Some(CallStatus::Ringing), None));
        assert!(!read(CallbackEvent::Answer, json!({ "status": "completed" })).wants_document);
        let leg = read(CallbackEvent::Dial, json!({ "status": "busy" })).report;
        assert_eq!(leg.transfer, Some(Transfer { leg: Some("u".to_owned()), status: TransferStatus::Busy }));
    }

    #[test]
    fn what_is_no_event_is_not_understood() {
        for body in ["", "[]", "{}", "null", "7", r#"{"status":"ringing"}"#] {
            assert_eq!(parse(CallbackEvent::Status, body.as_bytes()), None, "{body}");
        }
    }
}
