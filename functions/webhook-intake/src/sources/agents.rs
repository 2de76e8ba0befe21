//! What voice agents tell, whichever agent it is: the `agent` payload, and how its parts are read from a stranger's JSON.

use super::{Event, Payload, Unmapped, digest};
use chrono::{DateTime, SecondsFormat};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use shared::storage::Stored;
use uuid::Uuid;

/// What an event is, in the order in which later ones know more.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AgentEvent {
    /// Something on the way.
    #[default]
    Status,
    /// The agent used a tool.
    Tool,
    /// The agent speaks.
    Started,
    /// The conversation is over.
    Ended,
    /// It was looked at afterwards.
    Analyzed,
}

/// The `agent` payload of `apply_event`. Absent means "not told".
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AgentReport {
    /// What the event is.
    pub event: AgentEvent,
    /// Our attempt, which the agent was given with the call.
    pub attempt_id: Option<Uuid>,
    /// The carrier's id of the call.
    pub provider_call_id: Option<String>,
    /// The agent's own id of it.
    pub agent_call_id: Option<String>,
    /// `inbound` or `outbound`.
    pub direction: Option<String>,
    /// Caller.
    pub from: Option<String>,
    /// Callee.
    pub to: Option<String>,
    /// RFC 3339.
    pub started_at: Option<String>,
    /// RFC 3339.
    pub ended_at: Option<String>,
    /// Seconds of conversation.
    pub duration_seconds: Option<i64>,
    /// Milliseconds from the opening of the stream, which is the answer, to the agent's first audio.
    pub first_audio_ms: Option<i64>,
    /// All that was said, as text.
    pub transcript: Option<String>,
    /// All that was said, turn by turn.
    pub messages: Option<Vec<Message>>,
    /// What it was about.
    pub summary: Option<String>,
    /// Where the agent's recording lies.
    pub recording_url: Option<String>,
    /// What was made of it.
    pub analysis: Option<Value>,
    /// From -1 to 1.
    pub sentiment: Option<f64>,
    /// How interested they are, in the agent's words.
    pub interest_level: Option<String>,
    /// Why it ended, in ours; in the provider's where it maps to none.
    pub disconnect_reason: Option<String>,
    /// Why it ended, in the provider's words.
    pub disconnect_code: Option<String>,
    /// Tools that were used.
    pub tools: Vec<Tool>,
    /// The language that was spoken.
    pub language: Option<String>,
    /// What the agent's provider asks for the conversation, in millionths of `cost_currency`.
    pub cost_micros: Option<i64>,
    /// ISO 4217; `XEL` are ElevenLabs' credits.
    pub cost_currency: Option<String>,
    /// The agent's recording, which is in Storage already. Never a word of the sender's.
    #[serde(skip_deserializing, skip_serializing_if = "Option::is_none")]
    pub recording: Option<Stored>,
}

/// Something that was said.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// A value of `message_role`.
    pub role: Role,
    /// The words.
    pub text: String,
    /// RFC 3339.
    pub at: Option<String>,
}

/// Who said it: `message_role`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The person.
    Customer,
    /// The agent.
    AiAssistant,
    /// A person of ours.
    HumanAgent,
    /// Neither.
    System,
}

/// A tool that the agent used.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Tool {
    /// The provider's id of the use: the same use again changes nothing.
    pub id: String,
    /// What it means to us.
    pub name: ToolName,
    /// What the agent calls it.
    #[serde(default)]
    pub called: String,
    /// With what.
    #[serde(default = "no_arguments")]
    pub arguments: Value,
    /// RFC 3339: when it was used.
    #[serde(default)]
    pub at: Option<String>,
    /// RFC 3339: the time that it is about, where it names one with its zone.
    #[serde(default)]
    pub when: Option<String>,
}

fn no_arguments() -> Value {
    json!({})
}

/// What a tool means to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToolName {
    /// The call goes to a person.
    Transfer,
    /// They are to be called again, at a time.
    Callback,
    /// They are not to be called again.
    OptOut,
    /// They come to see a property.
    SiteVisit,
    /// Anything else.
    Other,
}

impl ToolName {
    /// The meaning of a tool's name: what the source's settings say (`"tools": {"their name": "opt_out"}`), else one of the names that
    /// say what they are. No other is guessed at.
    pub fn of(called: &str, settings: &Value) -> Self {
        if let Some(told) = settings.get("tools").and_then(|tools| tools.get(called)) {
            return serde_json::from_value(told.clone()).unwrap_or(Self::Other);
        }
        let plain: String =
            called.chars().filter(|c| c.is_ascii_alphanumeric()).collect::<String>().to_ascii_lowercase();
        match plain.as_str() {
            "transfer" | "transfercall" | "calltransfer" | "transfertohuman" | "transfertonumber"
            | "transfertoagent" | "warmtransfer" | "humantransfer" => Self::Transfer,
            "callback" | "schedulecallback" | "requestcallback" | "bookcallback" | "callbacklater" | "callagain" => {
                Self::Callback
            }
            "optout" | "donotcall" | "dnc" | "adddnc" | "addtodnc" | "markdonotcall" | "stopcalling"
            | "unsubscribe" => Self::OptOut,
            "sitevisit" | "schedulesitevisit" | "booksitevisit" | "bookvisit" | "schedulevisit" => Self::SiteVisit,
            _ => Self::Other,
        }
    }
}

impl Tool {
    /// A use of a tool; `arguments` may be an object or its JSON as text.
    pub fn used(id: impl Into<String>, called: &str, arguments: &Value, settings: &Value) -> Self {
        let arguments = match arguments {
            Value::String(text) => serde_json::from_str(text).unwrap_or_else(|_| json!({ "text": text })),
            other => other.clone(),
        };
        let arguments = if arguments.is_object() { arguments } else { json!({ "value": arguments }) };
        let when =
            ["callback_time", "callback_at", "visit_time", "scheduled_at", "datetime", "date_time", "time", "at"]
                .iter()
                .find_map(|key| rfc3339(arguments.get(key)?.as_str()?));
        Self {
            id: id.into(),
            name: ToolName::of(called, settings),
            called: called.to_owned(),
            arguments,
            at: None,
            when,
        }
    }

    /// News that is no tool, for the lead's timeline.
    pub fn news(called: &str, arguments: Value) -> Self {
        let id = format!("{called}|{}", &digest(arguments.to_string().as_bytes())["sha256|".len()..][..32]);
        Self { id, name: ToolName::Other, called: called.to_owned(), arguments, at: None, when: None }
    }
}

/// Why a conversation ended, one vocabulary for every agent: `call_logs.disconnect_reason`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EndReason {
    /// They hung up.
    CustomerEnded,
    /// The agent hung up.
    AgentEnded,
    /// A person took over.
    Transferred,
    /// A person was to take over, and did not.
    TransferFailed,
    /// Nobody spoke any more.
    Silence,
    /// It took too long.
    MaxDuration,
    /// A machine answered.
    Machine,
    /// The line was busy.
    Busy,
    /// Nobody answered.
    NoAnswer,
    /// They declined.
    Rejected,
    /// There is no such number.
    InvalidNumber,
    /// It was taken back.
    Cancelled,
    /// There was no room for it.
    Capacity,
    /// The phone network failed.
    CarrierTransient,
    /// The network holds the number for spam.
    SpamBlocked,
    /// The agent failed.
    OurFault,
    /// The account or its configuration does not allow it.
    Config,
    /// It was never begun in time.
    Expired,
    /// The provider itself says no more than that.
    Failed,
}

/// Reads parts of an event, and notes what maps to nothing.
pub struct Reader<'v> {
    root: &'v Value,
    /// Words that map to none of ours.
    pub unmapped: Vec<Unmapped>,
}

impl<'v> Reader<'v> {
    /// Reads `root`.
    pub fn new(root: &'v Value) -> Self {
        Self { root, unmapped: Vec::new() }
    }

    /// The value under the first of these JSON pointers that holds one.
    pub fn get(&self, pointers: &[&str]) -> Option<&'v Value> {
        pointers.iter().filter_map(|pointer| self.root.pointer(pointer)).find(|value| !value.is_null())
    }

    /// Text that is not blank.
    pub fn text(&self, pointers: &[&str]) -> Option<String> {
        pointers
            .iter()
            .filter_map(|pointer| self.root.pointer(pointer)?.as_str())
            .find(|text| !text.trim().is_empty())
            .map(str::to_owned)
    }

    /// The attempt that the agent was given.
    pub fn attempt(&self, pointers: &[&str]) -> Option<Uuid> {
        pointers.iter().find_map(|pointer| self.root.pointer(pointer)?.as_str()?.parse().ok())
    }

    /// A list; empty where there is none.
    pub fn list(&self, pointers: &[&str]) -> &'v [Value] {
        self.get(pointers).and_then(Value::as_array).map_or(&[], Vec::as_slice)
    }

    /// Notes a word that maps to none of ours.
    pub fn unknown(&mut self, field: &'static str, value: &str) {
        self.unmapped.push(Unmapped { field, value: value.chars().take(200).collect() });
    }

    /// Maps a reason; one that is unknown stays as it came, counted.
    pub fn end(
        &mut self,
        report: &mut AgentReport,
        field: &'static str,
        code: Option<String>,
        map: impl Fn(&str) -> Option<EndReason>,
    ) {
        let Some(code) = code else { return };
        report.disconnect_reason = match map(&code) {
            Some(reason) => name_of(&reason),
            None => {
                self.unknown(field, &code);
                Some(code.clone())
            }
        };
        report.disconnect_code = Some(code);
    }
}

/// The name of a variant, as serde writes it.
fn name_of(value: &impl Serialize) -> Option<String> {
    serde_json::to_value(value).ok()?.as_str().map(str::to_owned)
}

/// An RFC 3339 time as one; `None` for anything else, also for a time without a zone.
pub fn rfc3339(text: &str) -> Option<String> {
    DateTime::parse_from_rfc3339(text.trim()).ok().and_then(written)
}

/// Unix milliseconds as RFC 3339.
pub fn from_millis(value: &Value) -> Option<String> {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "a fraction of a millisecond tells nothing, and `as` saturates"
    )]
    let millis = value.as_i64().or_else(|| value.as_f64().map(|float| float as i64))?;
    written(DateTime::from_timestamp_millis(millis)?)
}

/// Unix seconds as RFC 3339, `offset` seconds later.
pub fn from_seconds(value: &Value, offset: f64) -> Option<String> {
    from_millis(&json!((value.as_f64()? + offset) * 1000.0))
}

/// In the years that PostgreSQL and anybody's calls know.
fn written<Z: chrono::TimeZone>(time: DateTime<Z>) -> Option<String> {
    let time = time.to_utc();
    let sensible = (2000..2200).contains(&chrono::Datelike::year(&time));
    sensible.then(|| time.to_rfc3339_opts(SecondsFormat::Millis, true))
}

/// Whole seconds of a number that may be a fraction or in milliseconds.
pub fn whole_seconds(value: &Value, per_second: f64) -> Option<i64> {
    let seconds = value.as_f64()? / per_second;
    #[expect(clippy::cast_possible_truncation, reason = "the range is checked")]
    (0.0..=1_000_000.0).contains(&seconds).then(|| seconds.round() as i64)
}

/// A price as millionths, and its currency; `parts` of the price make a unit of the currency. No cost where it is none, or absurd.
pub fn cost(price: Option<&Value>, parts: f64, currency: &str) -> (Option<i64>, Option<String>) {
    let micros = price.and_then(Value::as_f64).map(|price| price / parts * 1e6);
    #[expect(clippy::cast_possible_truncation, reason = "the range is checked")]
    let micros = micros.filter(|micros| (0.0..=1e15).contains(micros)).map(|micros| micros.round() as i64);
    (micros, micros.map(|_| currency.to_owned()))
}

/// Text of a transcript from its messages.
pub fn transcript_of(messages: &[Message]) -> Option<String> {
    let line = |message: &Message| {
        let who = match message.role {
            Role::Customer => "Customer",
            Role::AiAssistant => "Agent",
            Role::HumanAgent => "Colleague",
            Role::System => "System",
        };
        format!("{who}: {}", message.text)
    };
    (!messages.is_empty()).then(|| messages.iter().map(line).collect::<Vec<_>>().join("\n"))
}

/// Takes from a structured analysis what has a meaning of its own: a wish not to be called, to be called at a time, to come and see, and
/// how interested they are.
pub fn take_outcomes(report: &mut AgentReport, data: &Map<String, Value>, settings: &Value) {
    let is_true = |value: &Value| {
        value.as_bool() == Some(true) || value.as_str().is_some_and(|text| text.eq_ignore_ascii_case("true"))
    };
    for (key, value) in data {
        let known = match key.as_str() {
            "opt_out" | "do_not_call" | "dnc" if is_true(value) => Some("opt_out"),
            "callback_time" | "callback_at" if value.is_string() => Some("callback"),
            "site_visit_time" | "site_visit_at" if value.is_string() => Some("site_visit"),
            _ => None,
        };
        if let Some(name) = known {
            let mut tool = Tool::used(format!("analysis|{name}"), name, &json!({ "time": value }), settings);
            tool.arguments = json!({ key: value });
            report.tools.push(tool);
        }
        match key.as_str() {
            "interest_level" | "interest" if report.interest_level.is_none() => {
                report.interest_level = value.as_str().map(|text| text.chars().take(100).collect());
            }
            "sentiment_score" | "sentiment" if report.sentiment.is_none() => {
                report.sentiment = value.as_f64().filter(|score| (-1.0..=1.0).contains(score));
            }
            _ => {}
        }
    }
}

/// The event of a report. The same body again is the same event; what it is about is in the key, so that a person can read it.
pub fn event(kind: &str, report: AgentReport, unmapped: Vec<Unmapped>, body: &[u8]) -> Event {
    let call = report.agent_call_id.as_deref().or(report.provider_call_id.as_deref()).unwrap_or("-");
    let call: String = call.chars().take(100).collect();
    let hash = hex::encode(Sha256::digest(body));
    let kind: String = kind.chars().take(100).collect();
    let key = format!("{call}|{kind}|{}", &hash[..32]);
    Event { unmapped, ..Event::new(kind, key, Payload::Agent(Box::new(report))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tool_means_what_its_settings_or_its_name_say() {
        let settings = json!({ "tools": { "bye_forever": "opt_out", "callback": "other", "odd": 7 } });
        for (called, name) in [
            ("bye_forever", ToolName::OptOut),
            ("callback", ToolName::Other),
            ("odd", ToolName::Other),
            ("transfer_call", ToolName::Transfer),
            ("transferCall", ToolName::Transfer),
            ("schedule-callback", ToolName::Callback),
            ("DNC", ToolName::OptOut),
            ("bookSiteVisit", ToolName::SiteVisit),
            ("get_weather", ToolName::Other),
            ("", ToolName::Other),
        ] {
            assert_eq!(ToolName::of(called, &settings), name, "{called}");
        }
    }

    #[test]
    fn a_time_counts_with_its_zone_alone() {
        let when = |text: &str| Tool::used("1", "callback", &json!({ "time": text }), &json!({})).when;
        assert_eq!(when("2026-11-25T15:00:00+05:30").as_deref(), Some("2026-11-25T09:30:00.000Z"));
        for vague in ["tomorrow at three", "2026-11-25T15:00:00", "", "+999999-01-01T00:00:00Z", "0001-01-01T00:00:00Z"]
        {
            assert_eq!(when(vague), None, "{vague}");
        }
    }

    #[test]
    fn a_cost_is_whole_millionths_or_none() {
        for (price, parts, micros) in [
            (json!(0.12), 1.0, Some(120_000)),
            (json!(7.5), 100.0, Some(75_000)),
            (json!(296), 1.0, Some(296_000_000)),
            (json!(0.1 + 0.2), 1.0, Some(300_000)),
            (json!(0), 1.0, Some(0)),
            (json!(-1), 1.0, None),
            (json!(1e300), 1.0, None),
            (json!("0.12"), 1.0, None),
        ] {
            assert_eq!(cost(Some(&price), parts, "USD"), (micros, micros.map(|_| "USD".to_owned())), "{price}");
        }
        assert_eq!(cost(None, 1.0, "USD"), (None, None));
    }

    #[test]
    fn numbers_out_of_all_bounds_are_no_times() {
        for wild in [json!(i64::MAX), json!(i64::MIN), json!(1e300), json!(-1), json!("1"), json!(null)] {
            assert_eq!((from_millis(&wild), from_seconds(&wild, 1e300)), (None, None), "{wild}");
            assert!(whole_seconds(&wild, 1.0).is_none(), "{wild}");
        }
        assert_eq!(from_millis(&json!(1_790_000_000_000_i64)).as_deref(), Some("2026-09-21T14:13:20.000Z"));
        assert_eq!(from_seconds(&json!(1_790_000_000), 1.5).as_deref(), Some("2026-09-21T14:13:21.500Z"));
    }
}
