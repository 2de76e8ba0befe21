//! Plivo's callbacks: form parameters in, a [`CallReport`] out.

use crate::telephony::{CallReport, CallStatus, CallbackEvent, Outcome, Recording, e164, micros};
use std::collections::HashMap;

/// What a callback tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Callback {
    /// The key under which a repeated delivery is known: what it is about, not its signature.
    pub dedupe_key: String,
    /// What it tells of the call.
    pub report: CallReport,
}

/// Reads the form of a callback that came to the URL of `event`. `None` when it names no call.
pub fn parse(event: CallbackEvent, form: &[(String, String)]) -> Option<Callback> {
    let form: HashMap<&str, &str> = form.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let text = |name: &str| form.get(name).copied().filter(|value| !value.is_empty());
    let owned = |name: &str| text(name).map(str::to_owned);
    let number = |name: &str| text(name).and_then(|value| value.parse::<i64>().ok()).filter(|n| *n >= 0);
    let call_id = text("CallUUID").or_else(|| text("call_uuid"))?;
    let carrier_status = text("CallStatus").unwrap_or_default();
    let machine = text("Machine").map(|value| value == "true");

    let mut report = CallReport {
        provider_call_id: Some(call_id.to_owned()),
        from: text("From").and_then(e164),
        to: text("To").and_then(e164),
        machine,
        ..CallReport::default()
    };
    // A hang-up may be delivered to any URL (Plivo's hangup_url defaults to answer_url): what the form says, counts.
    let ended = event == CallbackEvent::Hangup || text("Event") == Some("Hangup");
    match event {
        _ if ended => {
            report.status = Some(CallStatus::Ended);
            report.duration_seconds = number("Duration");
            report.bill_duration_seconds = number("BillDuration");
            report.cause_code = owned("HangupCauseCode");
            report.cause_name = owned("HangupCauseName").or_else(|| owned("HangupCause"));
            report.cause_source = owned("HangupSource");
            report.cost_micros = text("TotalCost").and_then(micros);
            // Plivo bills every account in US dollars.
            report.cost_currency = report.cost_micros.map(|_| "USD".to_owned());
            report.outcome = Some(outcome(
                carrier_status,
                text("HangupCauseCode"),
                machine == Some(true),
                report.bill_duration_seconds.or(report.duration_seconds).unwrap_or(0),
            ));
        }
        CallbackEvent::Ring => report.status = Some(CallStatus::Ringing),
        CallbackEvent::Answer => report.status = Some(CallStatus::InProgress),
        CallbackEvent::Recording | CallbackEvent::Hangup => {}
    }
    if event == CallbackEvent::Recording
        && let Some(url) = text("RecordUrl").or_else(|| text("RecordingUrl"))
    {
        report.recording = Some(Recording {
            id: owned("RecordingID"),
            url: url.to_owned(),
            // The action request of a session recording says -1: not known yet.
            duration_seconds: number("RecordingDuration"),
        });
    }
    let part = if ended { "hangup" } else { event.as_str() };
    let distinct = report.recording.as_ref().and_then(|r| r.id.as_deref()).unwrap_or(carrier_status);
    Some(Callback { dedupe_key: format!("{call_id}|{part}|{distinct}"), report })
}

/// How the call ended, by Plivo's documented hang-up codes and, where the code says nothing, its `CallStatus`.
///
/// Source: Plivo's list of hang-up causes; the codes not listed there end as [`Outcome::Failed`], with the code kept.
pub fn outcome(carrier_status: &str, cause_code: Option<&str>, machine: bool, talk_seconds: i64) -> Outcome {
    let code: u32 = cause_code.and_then(|code| code.parse().ok()).unwrap_or(0);
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn form(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn a_hangup_tells_outcome_seconds_and_cost() {
        let callback = parse(
            CallbackEvent::Hangup,
            &form(&[
                ("CallUUID", "u1"),
                ("CallStatus", "completed"),
                ("HangupCauseCode", "4000"),
                ("HangupCauseName", "Normal Hangup"),
                ("Duration", "37"),
                ("BillDuration", "60"),
                ("TotalCost", "0.0037"),
                ("From", "918031234567"),
                ("To", "919812345678"),
                ("Event", "Hangup"),
            ]),
        )
        .unwrap();
        assert_eq!(callback.dedupe_key, "u1|hangup|completed");
        let report = callback.report;
        assert_eq!((report.status, report.outcome), (Some(CallStatus::Ended), Some(Outcome::Answered)));
        assert_eq!((report.duration_seconds, report.bill_duration_seconds), (Some(37), Some(60)));
        assert_eq!((report.cost_micros, report.to.as_deref()), (Some(3_700), Some("+919812345678")));
    }

    #[test]
    fn a_hangup_sent_to_the_answer_url_is_a_hangup() {
        let callback =
            parse(CallbackEvent::Answer, &form(&[("CallUUID", "u1"), ("CallStatus", "busy"), ("Event", "Hangup")]))
                .unwrap();
        assert_eq!(callback.report.outcome, Some(Outcome::Busy));
        assert_eq!(callback.dedupe_key, "u1|hangup|busy");
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
    fn a_recording_without_a_length_keeps_its_url() {
        let callback = parse(
            CallbackEvent::Recording,
            &form(&[
                ("CallUUID", "u1"),
                ("RecordUrl", "https://media.plivo.com/x.mp3"),
                ("RecordingID", "r1"),
                ("RecordingDuration", "-1"),
            ]),
        )
        .unwrap();
        assert_eq!(callback.dedupe_key, "u1|recording|r1");
        let recording = callback.report.recording.unwrap();
        assert_eq!((recording.id.as_deref(), recording.duration_seconds), (Some("r1"), None));
        assert_eq!(callback.report.status, None);
    }

    #[test]
    fn a_form_that_names_no_call_is_not_understood() {
        assert_eq!(parse(CallbackEvent::Ring, &form(&[("To", "91")])), None);
    }

    proptest! {
        #[test]
        fn no_form_panics(pairs in prop::collection::vec((".{0,12}", ".{0,20}"), 0..12), which in 0usize..4) {
            let mut pairs = pairs;
            pairs.push(("CallUUID".to_owned(), "u".to_owned()));
            let _ = parse(CallbackEvent::ALL[which], &pairs);
        }
    }
}
