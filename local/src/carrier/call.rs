//! The carrier's book of calls: what was asked for, how far each call is, and its record when it is over.

use super::{cause::Cause, outcome::Fate};
use chrono::{DateTime, FixedOffset, Utc};
use serde_json::{Value, json};
use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};
use tokio::sync::Notify;
use uuid::Uuid;

/// What a create-call request asks for.
#[derive(Clone, Debug, Default)]
pub(super) struct Request {
    pub from: String,
    pub to: String,
    pub answer: Hook,
    pub ring: Option<Hook>,
    pub hangup: Hook,
    pub fallback: Option<Hook>,
    pub machine_detection: Detection,
    pub time_limit: u32,
    pub caller_name: String,
    /// In whose words it was asked for: it is told in them.
    pub dialect: Dialect,
}

/// A carrier's words, and what is told in them.
#[derive(Clone, Debug, Default)]
pub(super) enum Dialect {
    /// Each event has a URL of its own.
    #[default]
    Plivo,
    /// Steps, as far as they were asked for.
    Twilio(Progress),
    /// All events go to one URL.
    Telnyx(Commands),
    /// All events of the call go to one URL.
    Vonage(Hook),
}

/// What a call at Telnyx brings along.
#[derive(Clone, Debug, Default)]
pub(super) struct Commands {
    pub webhook: Hook,
    /// Given back with every event.
    pub client_state: String,
    pub command_id: String,
    pub has_stream: bool,
    pub records: bool,
}

/// The websocket that a call at Vonage is connected with.
#[derive(Clone, Debug)]
pub(super) struct Socket {
    pub id: Uuid,
    pub uri: String,
    /// Where its events are told.
    pub hook: Hook,
}

/// What Twilio tells of a call's steps.
#[derive(Clone, Debug, Default)]
pub(super) struct Progress {
    pub callback: Option<Hook>,
    /// `initiated`, `ringing`, `answered` and `completed`, as far as they were asked for.
    pub steps: Vec<String>,
    /// Where the recording is told; none where there is none.
    pub recording: Option<Hook>,
}

/// A URL to call back, fragment and all.
#[derive(Clone, Debug, Default)]
pub(super) struct Hook {
    pub url: String,
    pub get: bool,
}

/// What is to be done about answering machines.
#[derive(Clone, Debug, Default)]
pub(super) enum Detection {
    #[default]
    Off,
    /// `Machine=true` in the answer and hang-up callbacks.
    Tell,
    /// A callback of its own.
    CallBack(Hook),
    /// The call ends when a machine picks up.
    HangUp,
}

/// How far a call is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stage {
    Queued,
    Ringing,
    InProgress,
    Ended,
}

/// What calls cost.
#[derive(Clone, Copy, Debug)]
pub struct Billing {
    /// Seconds that are billed at least, once a call is answered.
    pub first_pulse: u32,
    /// Beyond them, started pulses of so many seconds.
    pub pulse: u32,
    /// Price of a minute in millionths of the carrier's currency.
    pub rate_micros: u64,
}

impl Default for Billing {
    /// A minute at least, then by the second: so that a table of calls shows what rounding does, and two seeds never cost the same.
    fn default() -> Self {
        Self { first_pulse: 60, pulse: 1, rate_micros: 8_500 }
    }
}

impl Billing {
    /// Seconds billed for a call that talked for `seconds`.
    pub fn billed(&self, seconds: u32) -> u32 {
        match seconds {
            0 => 0,
            seconds => {
                self.first_pulse
                    + seconds.saturating_sub(self.first_pulse).div_ceil(self.pulse.max(1)) * self.pulse.max(1)
            }
        }
    }

    /// `TotalCost` of so many billed seconds, rounded to the five decimals that Plivo shows.
    pub fn cost(&self, billed_seconds: u32) -> String {
        decimal((u64::from(billed_seconds) * self.rate_micros + 300) / 600)
    }

    /// `BillRate`.
    pub fn rate(&self) -> String {
        decimal(self.rate_micros / 10)
    }
}

/// Hundred-thousandths as a decimal.
fn decimal(value: u64) -> String {
    format!("{}.{:05}", value / 100_000, value % 100_000)
}

/// One call.
#[derive(Debug)]
pub(super) struct Call {
    pub uuid: Uuid,
    pub auth_id: String,
    pub request: Request,
    /// How often the callee was called, this call included.
    pub nth: u32,
    pub fate: Fate,
    pub stage: Stage,
    pub created_at: DateTime<Utc>,
    pub answered_at: Option<DateTime<Utc>>,
    pub ended_at: Option<DateTime<Utc>>,
    pub cause: Option<Cause>,
    pub talk_seconds: u32,
    pub billed_seconds: u32,
    pub machine: bool,
    pub socket: Option<Socket>,
    /// Told when somebody hangs the call up through the API.
    pub hang_up: Arc<Notify>,
}

impl Call {
    /// The live state as `GET …?status=live` gives it.
    pub fn live(&self) -> Value {
        json!({
            "api_id": Uuid::new_v4(),
            "call_status": match self.stage {
                Stage::Queued => "queued",
                Stage::Ringing => "ringing",
                Stage::InProgress | Stage::Ended => "in-progress",
            },
            "call_uuid": self.uuid,
            "caller_name": self.request.caller_name,
            "direction": "outbound",
            "from": digits(&self.request.from),
            "request_uuid": self.uuid,
            "session_start": self.created_at.format("%Y-%m-%d %H:%M:%S%.6f").to_string(),
            "to": digits(&self.request.to),
        })
    }

    /// The call's record. Its times are in the account's zone, as Plivo's are, but keep their fractions: a demo's clock jumps hours
    /// within a second, and who asks the record whether two calls overlapped must be able to tell.
    pub fn record(&self, billing: &Billing, zone: FixedOffset) -> Value {
        let time = |at: DateTime<Utc>| at.with_timezone(&zone).format("%Y-%m-%d %H:%M:%S%.6f%:z").to_string();
        let cause = self.cause;
        json!({
            "answer_time": self.answered_at.map(time),
            "api_id": Uuid::new_v4(),
            "bill_duration": self.talk_seconds,
            "billed_duration": self.billed_seconds,
            "call_direction": "outbound",
            "call_duration": self.talk_seconds,
            "call_state": call_state(cause, self.answered_at.is_some()),
            "call_uuid": self.uuid,
            "conference_uuid": null,
            "end_time": self.ended_at.map(time),
            "from_number": format!("+{}", digits(&self.request.from)),
            "hangup_cause_code": cause.map(|cause| cause.code),
            "hangup_cause_name": cause.map(|cause| cause.name),
            "hangup_source": cause.map(|cause| cause.source),
            "initiation_time": time(self.created_at),
            "parent_call_uuid": null,
            "resource_uri": format!("/v1/Account/{}/Call/{}/", self.auth_id, self.uuid),
            "stir_verification": "Not Applicable",
            "to_number": digits(&self.request.to),
            "total_amount": billing.cost(self.billed_seconds),
            "total_rate": billing.rate(),
        })
    }
}

fn call_state(cause: Option<Cause>, answered: bool) -> &'static str {
    match cause.map(|cause| cause.status) {
        _ if answered => "ANSWER",
        Some("busy") => "BUSY",
        Some("no-answer" | "timeout") => "NO_ANSWER",
        Some("cancel") => "CANCEL",
        _ => "FAILED",
    }
}

/// A phone number without its plus and without punctuation.
pub(super) fn digits(number: &str) -> String {
    number.chars().filter(char::is_ascii_digit).collect()
}

/// All calls, in the order in which they were accepted.
#[derive(Debug, Default)]
pub(super) struct Book {
    pub calls: Vec<Call>,
    by_uuid: HashMap<Uuid, usize>,
    dialled: HashMap<String, u32>,
    asked: HashMap<String, u32>,
    live: BTreeSet<usize>,
    /// As many as there ever were at once.
    most_live: usize,
    /// Indexes of ended calls by account, in the order of their ends.
    ended: HashMap<String, Vec<usize>>,
}

impl Book {
    /// How often a call to `callee` was asked for, this time included; refused requests count here and nowhere else.
    pub fn ask(&mut self, callee: &str) -> u32 {
        let asked = self.asked.entry(callee.to_owned()).or_default();
        *asked += 1;
        *asked
    }

    /// How often `callee` was dialled, this time included.
    pub fn dial(&mut self, callee: &str) -> u32 {
        let dialled = self.dialled.entry(callee.to_owned()).or_default();
        *dialled += 1;
        *dialled
    }

    pub fn add(&mut self, call: Call) {
        self.by_uuid.insert(call.uuid, self.calls.len());
        self.live.insert(self.calls.len());
        self.most_live = self.most_live.max(self.live.len());
        self.calls.push(call);
    }

    pub fn get(&self, uuid: Uuid) -> Option<&Call> {
        self.by_uuid.get(&uuid).map(|index| &self.calls[*index])
    }

    pub fn change<T>(&mut self, uuid: Uuid, change: impl FnOnce(&mut Call) -> T) -> Option<T> {
        let index = *self.by_uuid.get(&uuid)?;
        let was = self.calls[index].stage;
        let result = change(&mut self.calls[index]);
        if was != Stage::Ended && self.calls[index].stage == Stage::Ended {
            self.ended.entry(self.calls[index].auth_id.clone()).or_default().push(index);
            self.live.remove(&index);
        }
        Some(result)
    }

    /// Calls of one account that are not over.
    pub fn live<'a>(&'a self, auth_id: &'a str) -> impl Iterator<Item = &'a Call> {
        self.live.iter().map(|index| &self.calls[*index]).filter(move |call| call.auth_id == auth_id)
    }

    /// Calls of one account that are over, the latest end first.
    pub fn ended<'a>(&'a self, auth_id: &str) -> impl ExactSizeIterator<Item = &'a Call> {
        let ended = self.ended.get(auth_id).map_or(&[][..], Vec::as_slice);
        ended.iter().rev().map(|index| &self.calls[*index])
    }

    /// How many calls there were before this one.
    pub fn place(&self, uuid: Uuid) -> Option<usize> {
        self.by_uuid.get(&uuid).copied()
    }

    /// How many calls there were at once, at most.
    pub fn most_live(&self) -> usize {
        self.most_live
    }

    /// How many calls are not over.
    pub fn live_count(&self) -> usize {
        self.live.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bills_by_pulses() {
        let whole_minutes = Billing { first_pulse: 60, pulse: 60, rate_micros: 8_500 };
        assert_eq!([0, 1, 37, 60, 61, 924].map(|seconds| whole_minutes.billed(seconds)), [0, 60, 60, 60, 120, 960]);
        let default = Billing::default();
        assert_eq!([0, 1, 60, 61, 924].map(|seconds| default.billed(seconds)), [0, 60, 60, 61, 924]);
        let by_second = Billing { first_pulse: 1, pulse: 1, rate_micros: 1_000_000 };
        assert_eq!(by_second.billed(1), 1);
        // Plivo's own examples.
        assert_eq!(by_second.cost(1), "0.01667");
        assert_eq!(whole_minutes.cost(960), "0.13600");
        assert_eq!(whole_minutes.rate(), "0.00850");
    }
}
