//! Why a call ended, in Plivo's words: status, cause, name, code and who did it.

use super::outcome::{Fate, Outcome};

/// The end of a call as callbacks and call records tell it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cause {
    /// `CallStatus` of the hang-up callback. Plivo calls a declined call `busy` too: only the code tells them apart.
    pub status: &'static str,
    /// `HangupCause`, FreeSWITCH's word.
    pub cause: &'static str,
    /// `HangupCauseName`.
    pub name: &'static str,
    /// `HangupCauseCode`.
    pub code: u16,
    /// `HangupSource`.
    pub source: &'static str,
}

const fn cause(
    status: &'static str,
    cause: &'static str,
    name: &'static str,
    code: u16,
    source: &'static str,
) -> Cause {
    Cause { status, cause, name, code, source }
}

/// The callee hangs up.
pub const NORMAL: Cause = cause("completed", "NORMAL_CLEARING", "Normal Hangup", 4000, "Callee");
/// The document has no more to do: also how a stream ends when the agent closes it.
pub const END_OF_XML: Cause = cause("completed", "NORMAL_CLEARING", "End Of XML Instructions", 4010, "Plivo");
/// `<Hangup/>`.
pub const XML_HANGUP: Cause = cause("completed", "NORMAL_CLEARING", "Normal Hangup", 4000, "Answer XML");
/// `time_limit` is over.
pub const TIME_LIMIT: Cause = cause("completed", "NORMAL_CLEARING", "Scheduled Hangup", 6000, "Plivo");
/// An answering machine, where the caller asked to hang up on one.
pub const MACHINE: Cause = cause("completed", "NORMAL_CLEARING", "Machine Detected", 9100, "Plivo");
/// The answer URL could not be reached or did not answer 200.
pub const ANSWER_UNREACHABLE: Cause = cause("completed", "NORMAL_CLEARING", "Error Reaching Answer URL", 7011, "Error");
/// The answer URL's document is none.
pub const INVALID_XML: Cause = cause("completed", "NORMAL_CLEARING", "Invalid Answer XML", 8011, "Error");
/// Hung up through the API before it was answered.
pub const CANCELLED: Cause = cause("cancel", "ORIGINATOR_CANCEL", "Canceled", 1000, "API Request");
/// Hung up through the API while talking.
pub const API_HANGUP: Cause = cause("completed", "NORMAL_CLEARING", "Normal Hangup", 4000, "API Request");

const BUSY: [Cause; 2] = [
    cause("busy", "USER_BUSY", "Busy Line", 3010, "Callee"),
    cause("busy", "USER_BUSY", "Busy everywhere", 3100, "Carrier"),
];
const NO_ANSWER: [Cause; 2] = [
    cause("no-answer", "NO_ANSWER", "No Answer", 3000, "Carrier"),
    cause("timeout", "NO_ANSWER", "Ring Timeout Reached", 6010, "Plivo"),
];
const REJECTED: [Cause; 2] = [
    cause("busy", "CALL_REJECTED", "Rejected", 3020, "Callee"),
    cause("busy", "CALL_REJECTED", "Declined", 3110, "Callee"),
];
const INVALID: [Cause; 3] = [
    cause("failed", "UNALLOCATED_NUMBER", "Unallocated number", 3050, "Carrier"),
    cause("failed", "UNALLOCATED_NUMBER", "User does not exist anywhere", 3120, "Carrier"),
    cause("failed", "NO_ROUTE_DESTINATION", "Invalid Destination Address", 2000, "Carrier"),
];

/// The cause that goes with a fate when the call runs its course.
pub fn of(fate: &Fate) -> Cause {
    let pick = |causes: &[Cause]| causes[usize::from(fate.variant) % causes.len()];
    match fate.outcome {
        Outcome::Answered => pick(&[NORMAL, NORMAL, END_OF_XML]),
        Outcome::Machine => NORMAL,
        Outcome::Busy => pick(&BUSY),
        Outcome::NoAnswer => pick(&NO_ANSWER),
        Outcome::Rejected => pick(&REJECTED),
        Outcome::Invalid => pick(&INVALID),
    }
}
