//! Calls as every part of Trunkline speaks of them, whichever carrier carries them.

pub mod api;
pub mod carrier;
mod fields;
pub mod plivo;
pub mod stream_token;
pub mod telnyx;
pub mod token;
pub mod twilio;
pub mod vonage;
mod xml;

use serde::{Deserialize, Serialize};
use std::str::FromStr;

/// How far a live call has come, as a callback tells it. The order is the rank: a later event never takes a call back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CallStatus {
    /// The carrier took it and has not dialled yet.
    Queued,
    /// The carrier dials.
    Initiated,
    /// The callee's phone rings.
    Ringing,
    /// Somebody, or something, answered.
    InProgress,
    /// It is over; the outcome says how.
    Ended,
}

/// How a call ended. Every status, cause and reason of every carrier maps here; one that is not known is [`Outcome::Failed`], with the
/// carrier's own code kept beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// A person answered.
    Answered,
    /// A machine answered.
    Machine,
    /// The line was busy.
    Busy,
    /// Nobody answered in time.
    NoAnswer,
    /// The callee declined.
    Rejected,
    /// There is no such number, or it is out of service.
    InvalidNumber,
    /// We took the call back before it was answered.
    Cancelled,
    /// The carrier has no capacity for it now: not an attempt.
    Capacity,
    /// The network failed.
    CarrierTransient,
    /// The callee's network holds our number for spam.
    SpamBlocked,
    /// Our answer or agent failed.
    OurFault,
    /// The account, its permissions or its compliance papers do not allow the call.
    Config,
    /// No callback came, and the carrier knows of no such call.
    Lost,
    /// Something that we have no name for.
    Failed,
}

/// What one event tells of a call: the `call` of `apply_event`. Absent means "not told", never "zero".
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallReport {
    /// The carrier's id of the call.
    pub provider_call_id: Option<String>,
    /// How far the call has come.
    pub status: Option<CallStatus>,
    /// How it ended.
    pub outcome: Option<Outcome>,
    /// The carrier's cause code, as it wrote it.
    pub cause_code: Option<String>,
    /// The carrier's name of the cause.
    pub cause_name: Option<String>,
    /// Who ended it, as the carrier says.
    pub cause_source: Option<String>,
    /// Seconds from answer to end.
    pub duration_seconds: Option<i64>,
    /// Seconds that the carrier bills.
    pub bill_duration_seconds: Option<i64>,
    /// What the carrier charges, in millionths of the currency's unit.
    pub cost_micros: Option<i64>,
    /// The currency of the cost, ISO 4217.
    pub cost_currency: Option<String>,
    /// RFC 3339; only where the carrier told the zone.
    pub started_at: Option<String>,
    /// RFC 3339; only where the carrier told the zone.
    pub answered_at: Option<String>,
    /// RFC 3339; only where the carrier told the zone.
    pub ended_at: Option<String>,
    /// Caller, E.164.
    pub from: Option<String>,
    /// Callee, E.164.
    pub to: Option<String>,
    /// A recording that is ready.
    pub recording: Option<Recording>,
    /// Whether a machine answered.
    pub machine: Option<bool>,
    /// The agent's audio stream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream: Option<Stream>,
    /// The leg that the call was transferred to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transfer: Option<Transfer>,
    /// Whether somebody called us: the called number says whose the call is.
    #[serde(default, skip_serializing_if = "is_false")]
    pub inbound: bool,
    /// Whether the carrier's own count of seconds never comes with its callbacks: then the talk, from answer to end, is what counts.
    #[serde(default, skip_serializing_if = "is_false")]
    pub bill_talk: bool,
    /// Whether the seconds are those of the bill, which take the place of seconds that were counted before.
    #[serde(default, skip_serializing_if = "is_false")]
    pub settles: bool,
    /// A fault that the carrier reports, for a person to see.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub notice: Option<String>,
    /// A word of the carrier's that maps to none of ours, and where it stands. It is counted beside the event, and is no news of the call.
    #[serde(skip)]
    pub unmapped: Option<(&'static str, String)>,
}

fn is_false(value: &bool) -> bool {
    !value
}

/// How the agent's audio stream fares. The order is the rank: a later report never takes it back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StreamStatus {
    /// The agent hears the callee.
    Started,
    /// It goes on, badly.
    Degraded,
    /// It is over.
    Stopped,
    /// It broke, or never began.
    Failed,
}

/// What a callback tells of the agent's audio stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stream {
    /// The carrier's id of it.
    pub id: Option<String>,
    /// How it fares.
    pub status: StreamStatus,
    /// What broke it, as the carrier says.
    pub error: Option<String>,
}

/// How a transfer fares. The order is the rank, a success above every failure: of two tries one that was answered counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TransferStatus {
    /// The person is dialled.
    Initiated,
    /// The person's phone rings.
    Ringing,
    /// It was taken back.
    Cancelled,
    /// It could not be made.
    Failed,
    /// Nobody answered.
    NoAnswer,
    /// The line was busy.
    Busy,
    /// The two talk.
    Answered,
    /// They have talked.
    Completed,
}

/// What a callback tells of the leg that a call was transferred to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transfer {
    /// The carrier's id of that leg.
    pub leg: Option<String>,
    /// How it fares.
    pub status: TransferStatus,
}

/// A recording that the carrier holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recording {
    /// The carrier's id of it.
    pub id: Option<String>,
    /// Where it lies, at the carrier.
    pub url: String,
    /// Its length in seconds; `None` where the carrier does not know yet.
    pub duration_seconds: Option<i64>,
}

/// The events that a carrier's callback URL is made for. The name stands in the path and is bound by the token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CallbackEvent {
    /// The call was answered; the answer is a document.
    Answer,
    /// The callee's phone rings.
    Ring,
    /// Any step of the call: the carriers that have one URL for all of them.
    Status,
    /// The call is over.
    Hangup,
    /// A recording is ready.
    Recording,
    /// Whether a machine answered.
    Machine,
    /// The agent's audio stream began, ended or broke.
    Stream,
    /// A step of the leg that the call was transferred to; the answer may be a document.
    Dial,
    /// Somebody calls one of our numbers: no token, since the URL is the account's and not a call's.
    Inbound,
}

impl CallbackEvent {
    /// All events, in the order in which a call has them.
    pub const ALL: [Self; 9] = [
        Self::Inbound,
        Self::Status,
        Self::Ring,
        Self::Answer,
        Self::Machine,
        Self::Stream,
        Self::Dial,
        Self::Recording,
        Self::Hangup,
    ];

    /// The name in the path.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Answer => "answer",
            Self::Ring => "ring",
            Self::Status => "status",
            Self::Hangup => "hangup",
            Self::Recording => "recording",
            Self::Machine => "machine",
            Self::Stream => "stream",
            Self::Dial => "dial",
            Self::Inbound => "inbound",
        }
    }
}

impl FromStr for CallbackEvent {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|event| event.as_str() == name).ok_or(())
    }
}

/// How the carrier took a request to dial. The four are all there is: a dial is never simply "failed".
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum DialOutcome {
    /// The carrier has it, under this id.
    Accepted {
        /// The carrier's id of the call.
        provider_call_id: String,
    },
    /// Proved not dialled, and why.
    Refused {
        /// The outcome that the attempt gets.
        reason: Outcome,
        /// The carrier's status or code.
        code: String,
    },
    /// No capacity now: not an attempt, to be asked again.
    Deferred {
        /// Seconds to wait.
        retry_after_seconds: u32,
        /// The carrier's status or code.
        code: String,
    },
    /// It may have been dialled. The slot is held and nobody dials again until the reconciler has asked.
    Unknown {
        /// What was seen instead of an answer.
        code: String,
    },
}

/// What the carrier knows of a call when asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lookup {
    /// It is still going on.
    Live(CallReport),
    /// It is over.
    Ended(CallReport),
    /// The carrier knows of no such call.
    NotFound,
}

/// A decimal amount as millionths: `"0.0037"` → 3700. `None` for anything that is not a plain decimal.
pub fn micros(decimal: &str) -> Option<i64> {
    let (sign, digits) = match decimal.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, decimal),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let plain = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if (whole.is_empty() && fraction.is_empty()) || !plain(whole) || !plain(fraction) {
        return None;
    }
    // Digits beyond the sixth are below what any carrier bills.
    let fraction: String = fraction.chars().chain("000000".chars()).take(6).collect();
    let whole: i64 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
    whole.checked_mul(1_000_000)?.checked_add(fraction.parse().ok()?)?.checked_mul(sign)
}

/// A number as E.164 with its plus sign: Plivo and Vonage write it without. `None` where it is no such number (`anonymous`).
pub fn e164(number: &str) -> Option<String> {
    let digits = number.trim().trim_start_matches('+');
    let valid = (2..=15).contains(&digits.len())
        && digits.bytes().all(|byte| byte.is_ascii_digit())
        && !digits.starts_with('0');
    valid.then(|| format!("+{digits}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_exact() {
        assert_eq!(micros("0.0037"), Some(3_700));
        assert_eq!(micros("12"), Some(12_000_000));
        assert_eq!(micros(".5"), Some(500_000));
        assert_eq!(micros("-1.25"), Some(-1_250_000));
        assert_eq!(micros("0.12345678"), Some(123_456));
        for junk in ["", ".", "1e3", "1,5", "abc", "99999999999999999999"] {
            assert_eq!(micros(junk), None, "{junk}");
        }
    }

    #[test]
    fn numbers_gain_their_plus() {
        assert_eq!(e164("918031234567").as_deref(), Some("+918031234567"));
        assert_eq!(e164("+14155550100").as_deref(), Some("+14155550100"));
        for junk in ["anonymous", "", "+", "0123456", "1234567890123456"] {
            assert_eq!(e164(junk), None, "{junk}");
        }
    }

    #[test]
    fn ranks_rise_with_the_call() {
        assert!(CallStatus::Queued < CallStatus::Ringing && CallStatus::InProgress < CallStatus::Ended);
    }
}
