//! Plivo's callbacks: form parameters in, a [`CallReport`] out.

use crate::telephony::{
    CallReport, CallStatus, CallbackEvent, Outcome, Recording, Stream, StreamStatus, Transfer, TransferStatus,
    carrier::Callback,
    e164,
    fields::{Form, excerpt},
    micros,
};

/// Reads the form of a callback that came to the URL of `event`. `None` when it names no call.
pub fn parse(event: CallbackEvent, body: &[u8]) -> Option<Callback> {
    let form = Form::read(body);
    let call_id = form.owned("CallUUID").or_else(|| form.owned("call_uuid"))?;
    let kind = Kind::of(event, &form);
    let mut report = CallReport {
        provider_call_id: Some(call_id.clone()),
        from: form.text("From").and_then(e164),
        to: form.text("To").and_then(e164),
        machine: machine(&form),
        inbound: event == CallbackEvent::Inbound,
        ..CallReport::default()
    };
    let distinct = match kind {
        Kind::Hangup => {
            hangup(&form, &mut report);
            form.owned("CallStatus")
        }
        Kind::Ring => {
            report.status = Some(CallStatus::Ringing);
            form.owned("CallStatus")
        }
        Kind::Answer => {
            // A call of ours is answered by the callee, and one to us by this document.
            report.status = Some(if report.inbound { CallStatus::Ringing } else { CallStatus::InProgress });
            form.owned("CallStatus")
        }
        Kind::Recording => {
            let id = form.owned("RecordingID");
            report.recording = form.owned("RecordUrl").or_else(|| form.owned("RecordingUrl")).map(|url| Recording {
                id: id.clone(),
                url,
                // The action request of a session recording says -1: not known yet.
                duration_seconds: form.count("RecordingDuration"),
            });
            let length = report.recording.as_ref().and_then(|recording| recording.duration_seconds);
            id.map(|id| if length.is_some() { id } else { format!("{id}|unfinished") })
        }
        Kind::Machine => form.owned("Machine"),
        Kind::Stream => {
            let event = form.text("Event").unwrap_or_default();
            stream(&form, event, &mut report);
            Some(format!("{}|{event}", form.text("StreamID").unwrap_or_default()))
        }
        Kind::Dial => {
            transfer(&form, &mut report);
            let step = form.text("DialAction").or_else(|| form.text("DialStatus")).unwrap_or_default();
            Some(format!("{}|{step}", form.text("DialBLegUUID").unwrap_or_default()))
        }
        Kind::Unknown => {
            let named = form.text("Event").unwrap_or_default();
            report.unmapped = Some(("Event", excerpt(named)));
            Some(named.to_owned())
        }
    };
    let wants_document = matches!(event, CallbackEvent::Answer | CallbackEvent::Inbound)
        && matches!(kind, Kind::Answer | Kind::Ring | Kind::Unknown);
    let dedupe_key = format!("{call_id}|{}|{}", kind.as_str(), distinct.unwrap_or_default());
    Some(Callback { dedupe_key, report, wants_document })
}

/// What a form is about: it says so itself, and else the URL does that it was sent to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Answer,
    Ring,
    Hangup,
    Recording,
    Machine,
    Stream,
    Dial,
    Unknown,
}

impl Kind {
    fn of(event: CallbackEvent, form: &Form) -> Self {
        // A hang-up may be delivered to any URL: Plivo's hangup_url defaults to answer_url.
        match form.text("Event") {
            Some("Hangup") => return Self::Hangup,
            Some("Ring") => return Self::Ring,
            Some("StartApp") => return Self::Answer,
            Some("MachineDetection") => return Self::Machine,
            Some("StartStream" | "StopStream" | "DroppedStream" | "DegradedStream" | "PlayedStream") => {
                return Self::Stream;
            }
            _ => {}
        }
        let has = |name: &str| form.text(name).is_some();
        match event {
            CallbackEvent::Dial => Self::Dial,
            _ if has("DialStatus") || has("DialAction") => Self::Dial,
            _ if has("RecordUrl") || has("RecordingID") => Self::Recording,
            CallbackEvent::Hangup => Self::Hangup,
            CallbackEvent::Stream => Self::Stream,
            CallbackEvent::Machine => Self::Machine,
            // The name of an event that we have not heard of does not make it what the URL was made for.
            _ if has("Event") => Self::Unknown,
            CallbackEvent::Ring => Self::Ring,
            CallbackEvent::Answer => Self::Answer,
            CallbackEvent::Recording => Self::Recording,
            CallbackEvent::Status | CallbackEvent::Inbound => match form.text("CallStatus") {
                Some("ringing") => Self::Answer,
                Some("in-progress") => Self::Answer,
                Some(_) if has("HangupCause") || has("HangupCauseCode") || has("EndTime") => Self::Hangup,
                _ => Self::Unknown,
            },
        }
    }

    const fn as_str(self) -> &'static str {
        match self {
            Self::Answer => "answer",
            Self::Ring => "ring",
            Self::Hangup => "hangup",
            Self::Recording => "recording",
            Self::Machine => "machine",
            Self::Stream => "stream",
            Self::Dial => "dial",
            Self::Unknown => "unknown",
        }
    }
}

fn machine(form: &Form) -> Option<bool> {
    form.text("Machine").map(|value| value.eq_ignore_ascii_case("true"))
}

fn hangup(form: &Form, report: &mut CallReport) {
    report.status = Some(CallStatus::Ended);
    report.duration_seconds = form.count("Duration");
    report.bill_duration_seconds = form.count("BillDuration");
    report.cause_code = form.owned("HangupCauseCode");
    report.cause_name = form.owned("HangupCauseName").or_else(|| form.owned("HangupCause"));
    report.cause_source = form.owned("HangupSource");
    report.cost_micros = form.text("TotalCost").and_then(micros).filter(|cost| *cost >= 0);
    // Plivo bills every account in US dollars.
    report.cost_currency = report.cost_micros.map(|_| "USD".to_owned());
    let status = form.text("CallStatus").unwrap_or_default();
    let code = form.text("HangupCauseCode");
    report.outcome = Some(outcome(
        status,
        code,
        report.machine == Some(true),
        report.bill_duration_seconds.or(report.duration_seconds).unwrap_or(0),
    ));
    if let Some(code) = code.filter(|code| !is_known(code)) {
        report.unmapped = Some(("HangupCauseCode", excerpt(code)));
    } else if !STATUSES.contains(&status) {
        report.unmapped = Some(("CallStatus", excerpt(status)));
    }
    // Without a code and a status that has a name, what is left is what Plivo calls it.
    report.cause_name = report.cause_name.take().or_else(|| form.owned("CallStatus"));
}

fn stream(form: &Form, event: &str, report: &mut CallReport) {
    let status = match event {
        "StartStream" => StreamStatus::Started,
        "StopStream" => StreamStatus::Stopped,
        "DroppedStream" => StreamStatus::Failed,
        "DegradedStream" => StreamStatus::Degraded,
        // Something was played to its end: the stream lives, and that is no news.
        "PlayedStream" => return,
        other => match form.text("Status").or_else(|| form.text("StreamStatus")).unwrap_or(other) {
            "started" => StreamStatus::Started,
            "stopped" => StreamStatus::Stopped,
            "failed" => StreamStatus::Failed,
            other => {
                report.unmapped = Some(("stream Event", excerpt(other)));
                return;
            }
        },
    };
    // Who is streamed has answered; a call to us has no other word for it.
    report.status = (status == StreamStatus::Started).then_some(CallStatus::InProgress);
    let error =
        (status == StreamStatus::Failed).then(|| form.owned("Reason").or_else(|| form.owned("Error"))).flatten();
    report.stream = Some(Stream { id: form.owned("StreamID"), status, error });
}

fn transfer(form: &Form, report: &mut CallReport) {
    let step = form.text("DialAction").filter(|action| *action != "hangup").or_else(|| {
        // The end of the leg says how; so does the action request, when all legs have been tried.
        form.text("DialStatus").or_else(|| form.text("DialBLegStatus"))
    });
    let status = match step {
        Some("answer" | "connected" | "answered" | "in-progress") => TransferStatus::Answered,
        Some("completed" | "hangup") => TransferStatus::Completed,
        Some("ringing") => TransferStatus::Ringing,
        Some("initiated" | "dialing") => TransferStatus::Initiated,
        Some("busy") => TransferStatus::Busy,
        Some("failed") => TransferStatus::Failed,
        Some("cancel" | "canceled") => TransferStatus::Cancelled,
        Some("timeout" | "no-answer") => TransferStatus::NoAnswer,
        // Keys that were pressed tell nothing of the transfer.
        Some("digits") => return,
        Some(other) => {
            report.unmapped = Some(("DialStatus", excerpt(other)));
            return;
        }
        None => {
            report.unmapped = Some(("DialStatus", String::new()));
            return;
        }
    };
    report.transfer = Some(Transfer { leg: form.owned("DialBLegUUID"), status });
    // The person's leg has seconds and causes of its own, which are not the call's.
    report.machine = None;
}

/// The statuses that Plivo gives a call that is over.
const STATUSES: [&str; 7] = ["completed", "busy", "failed", "timeout", "no-answer", "cancel", "canceled"];

/// How the call ended, by Plivo's documented hang-up codes and, where the code says nothing, its `CallStatus`.
///
/// Source: Plivo's list of hang-up causes; the codes not listed there end as [`Outcome::Failed`], with the code kept.
pub fn outcome(carrier_status: &str, cause_code: Option<&str>, machine: bool, talk_seconds: i64) -> Outcome {
    let code: u32 = match cause_code {
        Some(code) if !is_known(code) => return Outcome::Failed,
        Some(code) => code.parse().unwrap_or(0),
        None => 0,
    };
    match code {
        9100 => Outcome::Machine,
        3010 | 3100 => Outcome::Busy,
        3000 | 6010 => Outcome::NoAnswer,
        3020 | 3040 | 3110 => Outcome::Rejected,
        2000 | 2010 | 2020 | 3050 | 3120 => Outcome::InvalidNumber,
        1000 | 9000 => Outcome::Cancelled,
        1020 | 5030 => Outcome::Capacity,
        3070 | 3080 | 3090 | 5000 | 5010 | 5020 => Outcome::CarrierTransient,
        3130 | 3140 => Outcome::SpamBlocked,
        6020 | 7011..=7014 | 7022..=7024 | 7032..=7034 | 8011..=8014 => Outcome::OurFault,
        // The normal end of a stream, and of one that was refused or crashed: within seconds it is the latter.
        4010 if talk_seconds < 5 => Outcome::OurFault,
        1010 | 2030 | 2040 | 2050 | 2060 | 2070 | 3030 => Outcome::Config,
        4000 | 4010 | 4020 | 4030 | 6000 | 9110 if machine => Outcome::Machine,
        4000 | 4010 | 4020 | 4030 | 6000 | 9110 if talk_seconds > 0 => Outcome::Answered,
        _ => match carrier_status {
            "completed" if machine => Outcome::Machine,
            "completed" if talk_seconds > 0 => Outcome::Answered,
            "busy" => Outcome::Busy,
            "no-answer" | "timeout" => Outcome::NoAnswer,
            "cancel" | "canceled" => Outcome::Cancelled,
            _ => Outcome::Failed,
        },
    }
}

/// Whether a code is in Plivo's list.
fn is_known(code: &str) -> bool {
    matches!(
        code.parse::<u32>(),
        Ok(
            0
            | 1000
            | 1010
            | 1020
            | 2000
            | 2010
            | 2020
            | 2030
            | 2040
            | 2050
            | 2060
            | 2070
            | 3000
            | 3010
            | 3020
            | 3030
            | 3040
            | 3050
            | 3070
            | 3080
            | 3090
            | 3100
            | 3110
            | 3120
            | 3130
            | 3140
            | 4000
            | 4010
            | 4020
            | 4030
            | 5000
            | 5010
            | 5020
            | 5030
            | 6000
            | 6010
            | 6020
            | 7011..=7014
            | 7022..=7024
            | 7032..=7034
            | 8011..=8014
            | 9000
            | 9100
            | 9110,
        )
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(event: CallbackEvent, form: &str) -> Callback {
        parse(event, form.as_bytes()).unwrap()
    }

    #[test]
    fn a_hangup_tells_outcome_seconds_and_cost() {
        let callback = read(
            CallbackEvent::Hangup,
            "CallUUID=u1&CallStatus=completed&HangupCauseCode=4000&HangupCauseName=Normal+Hangup&Duration=37&BillDuration=60\
             &TotalCost=0.0037&From=918031234567&To=919812345678&Event=Hangup",
        );
        assert_eq!(callback.dedupe_key, "u1|hangup|completed");
        let report = callback.report;
        assert_eq!((report.status, report.outcome), (Some(CallStatus::Ended), Some(Outcome::Answered)));
        assert_eq!((report.duration_seconds, report.bill_duration_seconds), (Some(37), Some(60)));
        assert_eq!((report.cost_micros, report.to.as_deref()), (Some(3_700), Some("+919812345678")));
        assert_eq!(report.unmapped, None);
    }

    #[test]
    fn a_hangup_sent_to_the_answer_url_is_a_hangup_and_gets_no_document() {
        for event in [CallbackEvent::Answer, CallbackEvent::Inbound] {
            let callback = read(event, "CallUUID=u1&CallStatus=busy&Event=Hangup");
            assert_eq!(callback.report.outcome, Some(Outcome::Busy));
            assert_eq!(callback.dedupe_key, "u1|hangup|busy");
            assert!(!callback.wants_document);
        }
    }

    #[test]
    fn every_status_that_plivo_names_has_an_outcome() {
        let cases = [
            ("busy", None, Outcome::Busy),
            ("no-answer", None, Outcome::NoAnswer),
            ("timeout", None, Outcome::NoAnswer),
            ("cancel", None, Outcome::Cancelled),
            ("failed", Some("3020"), Outcome::Rejected),
            ("failed", Some("3050"), Outcome::InvalidNumber),
            ("failed", Some("5030"), Outcome::Capacity),
            ("failed", Some("7011"), Outcome::OurFault),
            ("completed", Some("9100"), Outcome::Machine),
            ("failed", Some("4242"), Outcome::Failed),
            ("busy", Some("4242"), Outcome::Failed),
            ("brand-new", None, Outcome::Failed),
        ];
        for (status, code, expected) in cases {
            assert_eq!(outcome(status, code, false, 0), expected, "{status} {code:?}");
        }
        assert_eq!(outcome("completed", Some("4010"), false, 2), Outcome::OurFault);
        assert_eq!(outcome("completed", Some("4010"), false, 60), Outcome::Answered);
        assert_eq!(outcome("completed", Some("4000"), true, 60), Outcome::Machine);
    }

    #[test]
    fn what_has_no_name_is_kept_and_shown() {
        let report =
            read(CallbackEvent::Hangup, "CallUUID=u&CallStatus=failed&HangupCauseCode=4242&HangupCauseName=Odd").report;
        assert_eq!((report.cause_code.as_deref(), report.cause_name.as_deref()), (Some("4242"), Some("Odd")));
        assert_eq!(
            (report.outcome, report.unmapped),
            (Some(Outcome::Failed), Some(("HangupCauseCode", "4242".to_owned())))
        );
        let report = read(CallbackEvent::Hangup, "CallUUID=u&CallStatus=evaporated").report;
        assert_eq!(report.cause_name.as_deref(), Some("evaporated"));
        assert_eq!(
            (report.outcome, report.unmapped),
            (Some(Outcome::Failed), Some(("CallStatus", "evaporated".to_owned())))
        );
        let report = read(CallbackEvent::Ring, "CallUUID=u&Event=Levitate").report;
        assert_eq!((report.status, report.unmapped), (None, Some(("Event", "Levitate".to_owned()))));
    }

    #[test]
    fn a_recording_without_a_length_keeps_its_url() {
        let callback = read(
            CallbackEvent::Recording,
            "CallUUID=u1&RecordUrl=https://media.plivo.com/x.mp3&RecordingID=r1&RecordingDuration=-1",
        );
        assert_eq!(callback.dedupe_key, "u1|recording|r1|unfinished");
        let recording = callback.report.recording.unwrap();
        assert_eq!((recording.id.as_deref(), recording.duration_seconds), (Some("r1"), None));
        assert_eq!(callback.report.status, None);
    }

    #[test]
    fn streams_and_transfers_tell_how_they_fare() {
        let stream = |event: &str| read(CallbackEvent::Stream, &format!("CallUUID=u&StreamID=s&Event={event}")).report;
        for (event, status) in [
            ("StartStream", StreamStatus::Started),
            ("StopStream", StreamStatus::Stopped),
            ("DroppedStream", StreamStatus::Failed),
            ("DegradedStream", StreamStatus::Degraded),
        ] {
            assert_eq!(stream(event).stream.map(|stream| stream.status), Some(status), "{event}");
        }
        assert_eq!(stream("StartStream").status, Some(CallStatus::InProgress));
        let dial = |form: &str| read(CallbackEvent::Dial, &format!("CallUUID=u&DialBLegUUID=b&{form}")).report;
        for (form, status) in [
            ("DialAction=answer", TransferStatus::Answered),
            ("DialAction=hangup&DialBLegStatus=busy", TransferStatus::Busy),
            ("DialStatus=completed", TransferStatus::Completed),
            ("DialStatus=no-answer", TransferStatus::NoAnswer),
        ] {
            let report = dial(form);
            assert_eq!((report.transfer.map(|leg| leg.status), report.status), (Some(status), None), "{form}");
        }
    }

    #[test]
    fn a_machine_is_heard_while_the_call_goes_on() {
        let callback =
            read(CallbackEvent::Machine, "CallUUID=u&Event=MachineDetection&Machine=true&CallStatus=in-progress");
        assert_eq!((callback.report.machine, callback.report.status), (Some(true), None));
    }

    #[test]
    fn a_call_to_us_rings_until_its_document_is_given() {
        let callback = read(
            CallbackEvent::Inbound,
            "CallUUID=u&Event=StartApp&CallStatus=ringing&Direction=inbound&From=anonymous&To=918031234567",
        );
        assert!(callback.wants_document && callback.report.inbound);
        assert_eq!((callback.report.status, callback.report.from), (Some(CallStatus::Ringing), None));
    }

    #[test]
    fn a_form_that_names_no_call_is_not_understood() {
        assert_eq!(parse(CallbackEvent::Ring, b"To=91"), None);
    }
}
