//! Twilio's callbacks, and those of TeXML, which are named alike: form parameters in, a [`CallReport`] out.

use crate::telephony::{
    CallReport, CallStatus, CallbackEvent, Outcome, Recording, Stream, StreamStatus, Transfer, TransferStatus,
    carrier::Callback,
    e164,
    fields::{Form, excerpt, rfc2822, rfc3339},
};

/// Reads the form of a callback that came to the URL of `event`. `None` when it names no call.
pub fn parse(event: CallbackEvent, body: &[u8]) -> Option<Callback> {
    let form = Form::read(body);
    let call_id = form.owned("CallSid")?;
    let kind = Kind::of(event, &form);
    let mut report = CallReport {
        provider_call_id: Some(call_id.clone()),
        from: form.text("From").and_then(e164),
        to: form.text("To").and_then(e164),
        inbound: event == CallbackEvent::Inbound,
        ..CallReport::default()
    };
    let step = match kind {
        Kind::Recording => {
            let state = form.owned("RecordingStatus").unwrap_or_else(|| "completed".to_owned());
            recording(&form, &state, &mut report);
            format!("{}|{state}", form.text("RecordingSid").unwrap_or_default())
        }
        Kind::Stream => {
            let step = form.owned("StreamEvent").unwrap_or_default();
            stream(&form, &step, &mut report);
            format!("{}|{step}", form.text("StreamSid").unwrap_or_default())
        }
        Kind::Leg => {
            // Each step of the person's leg is told under the leg's own id, beside that of its parent.
            report.provider_call_id = form.owned("ParentCallSid");
            let status = form.text("CallStatus").unwrap_or_default();
            transfer(Some(call_id.clone()), status, &mut report);
            status.to_owned()
        }
        Kind::Dial => {
            let status = form.text("DialCallStatus").unwrap_or_default();
            transfer(form.owned("DialCallSid"), status, &mut report);
            format!("{}|{status}", form.text("DialCallSid").unwrap_or_default())
        }
        Kind::Machine => {
            answered_by(&form, &mut report);
            form.owned("AnsweredBy").unwrap_or_default()
        }
        Kind::Status => {
            answered_by(&form, &mut report);
            status(&form, &mut report);
            let sequence = form.text("SequenceNumber").unwrap_or_default();
            format!("{}|{sequence}", form.text("CallStatus").unwrap_or_default())
        }
    };
    let is_progress = form.text("CallbackSource") == Some("call-progress-events");
    let wants_document = matches!(event, CallbackEvent::Answer | CallbackEvent::Inbound)
        && kind == Kind::Status
        && report.status != Some(CallStatus::Ended)
        && !is_progress;
    if wants_document {
        // The document is fetched when the callee has answered, and of a call to us before we do.
        report.status =
            if report.inbound { report.status.or(Some(CallStatus::Ringing)) } else { Some(CallStatus::InProgress) };
    }
    let part = if wants_document { "answer" } else { kind.as_str() };
    Some(Callback { dedupe_key: format!("{call_id}|{part}|{step}"), report, wants_document })
}

/// What a form is about: it says so itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Status,
    Recording,
    Machine,
    Stream,
    /// The end of a `<Dial>`, told of the call that was transferred.
    Dial,
    /// A step of the leg that it was transferred to.
    Leg,
}

impl Kind {
    fn of(event: CallbackEvent, form: &Form) -> Self {
        let has = |name: &str| form.text(name).is_some();
        if has("StreamEvent") || event == CallbackEvent::Stream {
            return Self::Stream;
        }
        // The end of a transfer brings the recording's URL along; the recording has a callback of its own.
        if has("DialCallStatus") {
            return Self::Dial;
        }
        if has("RecordingSid") && (has("RecordingStatus") || event == CallbackEvent::Recording) {
            return Self::Recording;
        }
        if has("ParentCallSid") && form.text("ParentCallSid") != form.text("CallSid") {
            return Self::Leg;
        }
        if event == CallbackEvent::Machine || (has("AnsweredBy") && !has("CallStatus")) {
            return Self::Machine;
        }
        Self::Status
    }

    const fn as_str(self) -> &'static str {
        match self {
            Self::Status => "status",
            Self::Recording => "recording",
            Self::Machine => "machine",
            Self::Stream => "stream",
            Self::Dial | Self::Leg => "dial",
        }
    }
}

fn status(form: &Form, report: &mut CallReport) {
    let given = form.text("CallStatus").unwrap_or_default();
    let at = form.text("Timestamp").and_then(|at| rfc2822(at).or_else(|| rfc3339(at)));
    report.status = match given {
        "queued" => Some(CallStatus::Queued),
        "initiated" => Some(CallStatus::Initiated),
        "ringing" => Some(CallStatus::Ringing),
        "in-progress" | "answered" => {
            report.answered_at = at;
            Some(CallStatus::InProgress)
        }
        "completed" | "busy" | "failed" | "no-answer" | "canceled" => {
            report.ended_at = at;
            Some(CallStatus::Ended)
        }
        // Where the carrier names a status that we do not know, the seconds still say that it is over.
        _ if form.text("CallDuration").is_some() => Some(CallStatus::Ended),
        _ => None,
    };
    if report.status.is_none() {
        report.unmapped = Some(("CallStatus", excerpt(given)));
    }
    if report.status != Some(CallStatus::Ended) {
        return;
    }
    // `Duration` is in minutes, `CallDuration` in seconds.
    report.duration_seconds = form.count("CallDuration");
    report.bill_duration_seconds = form
        .count("Duration")
        .and_then(|minutes| minutes.checked_mul(60))
        .filter(|n| i32::try_from(*n).is_ok())
        .or(report.duration_seconds);
    let code = form.text("ErrorCode").or_else(|| form.text("SipResponseCode"));
    report.cause_code = code.map(str::to_owned);
    report.cause_name = Some(given.to_owned());
    let (outcome, is_known) = outcome(given, code, report.machine == Some(true));
    report.outcome = Some(outcome);
    if !is_known {
        report.unmapped = Some(match code {
            Some(code) if given == "failed" => ("SipResponseCode", excerpt(code)),
            _ => ("CallStatus", excerpt(given)),
        });
    }
}

/// How the call ended, and whether the status and its code are ones that Twilio documents: by the status, which of a failure is told
/// apart by its error or SIP code. What is not known ends as [`Outcome::Failed`].
pub fn outcome(status: &str, code: Option<&str>, machine: bool) -> (Outcome, bool) {
    let number = code.map(|code| code.parse::<u32>().unwrap_or(u32::MAX));
    let outcome = match (status, number) {
        ("completed", _) if machine => Outcome::Machine,
        ("completed", _) => Outcome::Answered,
        ("busy" | "failed", Some(403 | 603)) => Outcome::Rejected,
        ("busy", _) => Outcome::Busy,
        ("no-answer", _) => Outcome::NoAnswer,
        ("canceled", _) => Outcome::Cancelled,
        ("failed", Some(404 | 604 | 21_211 | 21_214 | 21_217 | 13_224)) => Outcome::InvalidNumber,
        ("failed", Some(486 | 600)) => Outcome::Busy,
        ("failed", Some(487 | 408)) => Outcome::NoAnswer,
        ("failed", Some(607 | 608)) => Outcome::SpamBlocked,
        ("failed", Some(500..=599)) => Outcome::CarrierTransient,
        ("failed", Some(20_429 | 10_004)) => Outcome::Capacity,
        ("failed", Some(11_200..=11_299 | 12_100..=12_199 | 31_900..=31_999)) => Outcome::OurFault,
        ("failed", Some(20_003 | 21_210 | 21_212 | 21_215)) => Outcome::Config,
        ("failed", None) => return (Outcome::Failed, true),
        _ => return (Outcome::Failed, false),
    };
    (outcome, true)
}

fn answered_by(form: &Form, report: &mut CallReport) {
    match form.text("AnsweredBy") {
        Some("human") => report.machine = Some(false),
        Some("machine_start" | "machine_end_beep" | "machine_end_silence" | "machine_end_other" | "fax") => {
            report.machine = Some(true);
        }
        // "unknown" is Twilio's own word: it could not tell.
        None | Some("unknown") => {}
        Some(other) => report.unmapped = Some(("AnsweredBy", excerpt(other))),
    }
}

fn recording(form: &Form, state: &str, report: &mut CallReport) {
    match state {
        "completed" => {
            report.recording = form.owned("RecordingUrl").map(|url| Recording {
                id: form.owned("RecordingSid"),
                url,
                duration_seconds: form.count("RecordingDuration"),
            });
        }
        "in-progress" => {}
        "absent" => report.notice = Some("RecordingStatus=absent: nothing was recorded".to_owned()),
        other => report.unmapped = Some(("RecordingStatus", excerpt(other))),
    }
}

fn stream(form: &Form, step: &str, report: &mut CallReport) {
    let status = match step {
        "stream-started" => StreamStatus::Started,
        "stream-stopped" => StreamStatus::Stopped,
        "stream-error" => StreamStatus::Failed,
        other => {
            report.unmapped = Some(("StreamEvent", excerpt(other)));
            return;
        }
    };
    // Who is streamed has answered; a call to us has no other word for it.
    report.status = (status == StreamStatus::Started).then_some(CallStatus::InProgress);
    report.stream = Some(Stream { id: form.owned("StreamSid"), status, error: form.owned("StreamError") });
}

fn transfer(leg: Option<String>, status: &str, report: &mut CallReport) {
    // What the leg's form says of numbers and times is the leg's.
    (report.from, report.to, report.machine) = (None, None, None);
    let status = match status {
        "queued" | "initiated" => TransferStatus::Initiated,
        "ringing" => TransferStatus::Ringing,
        "in-progress" | "answered" => TransferStatus::Answered,
        "completed" => TransferStatus::Completed,
        "busy" => TransferStatus::Busy,
        "failed" => TransferStatus::Failed,
        "no-answer" => TransferStatus::NoAnswer,
        "canceled" => TransferStatus::Cancelled,
        other => {
            report.unmapped = Some(("DialCallStatus", excerpt(other)));
            return;
        }
    };
    report.transfer = Some(Transfer { leg, status });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(event: CallbackEvent, form: &str) -> Callback {
        parse(event, form.as_bytes()).unwrap()
    }

    #[test]
    fn the_end_of_a_call_tells_seconds_and_not_minutes() {
        let callback = read(
            CallbackEvent::Status,
            "CallSid=CA1&CallStatus=completed&Duration=1&CallDuration=37&SipResponseCode=200&SequenceNumber=3&From=%2B14155550111\
             &To=%2B14155550100&Timestamp=Tue%2C+24+Nov+2026+04%3A30%3A37+%2B0000&CallbackSource=call-progress-events",
        );
        let report = callback.report;
        assert_eq!(callback.dedupe_key, "CA1|status|completed|3");
        assert_eq!((report.status, report.outcome), (Some(CallStatus::Ended), Some(Outcome::Answered)));
        assert_eq!((report.duration_seconds, report.bill_duration_seconds), (Some(37), Some(60)));
        assert_eq!((report.ended_at.as_deref(), report.unmapped), (Some("2026-11-24T04:30:37Z"), None));
    }

    #[test]
    fn every_status_and_code_that_twilio_names_has_an_outcome() {
        let cases = [
            ("completed", None, Outcome::Answered),
            ("busy", Some("486"), Outcome::Busy),
            ("busy", Some("603"), Outcome::Rejected),
            ("no-answer", Some("487"), Outcome::NoAnswer),
            ("canceled", None, Outcome::Cancelled),
            ("failed", None, Outcome::Failed),
            ("failed", Some("404"), Outcome::InvalidNumber),
            ("failed", Some("403"), Outcome::Rejected),
            ("failed", Some("503"), Outcome::CarrierTransient),
            ("failed", Some("607"), Outcome::SpamBlocked),
            ("failed", Some("13224"), Outcome::InvalidNumber),
            ("failed", Some("10004"), Outcome::Capacity),
            ("failed", Some("11200"), Outcome::OurFault),
            ("failed", Some("21215"), Outcome::Config),
        ];
        for (status, code, expected) in cases {
            assert_eq!(outcome(status, code, false), (expected, true), "{status} {code:?}");
        }
        for (status, code) in [("failed", Some("499")), ("failed", Some("x")), ("evaporated", None)] {
            assert_eq!(outcome(status, code, false), (Outcome::Failed, false), "{status} {code:?}");
        }
        assert_eq!(outcome("completed", None, true).0, Outcome::Machine);
    }

    #[test]
    fn who_answered_is_told_with_a_status_or_alone() {
        let machine = |form: &str| read(CallbackEvent::Machine, form).report.machine;
        for word in ["machine_start", "machine_end_beep", "machine_end_silence", "machine_end_other", "fax"] {
            assert_eq!(machine(&format!("CallSid=CA1&AnsweredBy={word}")), Some(true), "{word}");
        }
        assert_eq!(
            (machine("CallSid=CA1&AnsweredBy=human"), machine("CallSid=CA1&AnsweredBy=unknown")),
            (Some(false), None)
        );
        let report = read(CallbackEvent::Machine, "CallSid=CA1&AnsweredBy=parrot").report;
        assert_eq!((report.machine, report.unmapped), (None, Some(("AnsweredBy", "parrot".to_owned()))));
        let ended =
            read(CallbackEvent::Status, "CallSid=CA1&CallStatus=completed&CallDuration=9&AnsweredBy=machine_start")
                .report;
        assert_eq!((ended.machine, ended.outcome), (Some(true), Some(Outcome::Machine)));
    }

    #[test]
    fn a_leg_is_its_parent_s() {
        let leg = read(CallbackEvent::Dial, "CallSid=CA2&ParentCallSid=CA1&CallStatus=in-progress").report;
        assert_eq!((leg.provider_call_id.as_deref(), leg.status), (Some("CA1"), None));
        assert_eq!(leg.transfer, Some(Transfer { leg: Some("CA2".to_owned()), status: TransferStatus::Answered }));
        let end =
            read(CallbackEvent::Dial, "CallSid=CA1&DialCallSid=CA2&DialCallStatus=busy&CallStatus=in-progress").report;
        assert_eq!(end.transfer, Some(Transfer { leg: Some("CA2".to_owned()), status: TransferStatus::Busy }));
    }

    #[test]
    fn a_document_is_wanted_by_a_call_and_not_by_its_progress() {
        let wants = |event, form: &str| read(event, form).wants_document;
        assert!(wants(CallbackEvent::Inbound, "CallSid=CA1&CallStatus=ringing&Direction=inbound"));
        assert!(wants(CallbackEvent::Answer, "CallSid=CA1&CallStatus=in-progress"));
        assert!(!wants(CallbackEvent::Answer, "CallSid=CA1&CallStatus=completed"));
        assert!(!wants(
            CallbackEvent::Inbound,
            "CallSid=CA1&CallStatus=in-progress&CallbackSource=call-progress-events"
        ));
    }

    #[test]
    fn only_a_finished_recording_is_one() {
        let recording = |state: &str| {
            let form = format!(
                "CallSid=CA1&RecordingSid=RE1&RecordingUrl=https://r/1&RecordingDuration=36&RecordingStatus={state}"
            );
            read(CallbackEvent::Recording, &form).report
        };
        assert_eq!(recording("completed").recording.map(|recording| recording.duration_seconds), Some(Some(36)));
        assert_eq!(recording("in-progress").recording, None);
        assert!(recording("absent").notice.is_some() && recording("mislaid").unmapped.is_some());
    }
}
