//! Retell: `X-Retell-Signature: v=<unix ms>,d=<hex>`, HMAC-SHA256 under the API key over the raw body and the milliseconds.

use super::{
    Event, OpenSource, Source,
    agents::{self, AgentEvent, AgentReport, EndReason, Message, Reader, Role, Tool, ToolName},
};
use serde_json::{Value, json};
use shared::{
    Result,
    http::Request,
    mac::{self, Encoding, Hash},
};
use std::collections::HashSet;

/// Milliseconds by which a signature's time may differ from now, either way: that of Retell's own library.
const TOLERANCE_MS: i64 = 300_000;
const HEADER: &str = "x-retell-signature";

/// Retell.
pub struct Retell;

impl Source for Retell {
    fn name(&self) -> &'static str {
        "retell"
    }

    fn signed_headers(&self) -> &'static [&'static str] {
        &[HEADER]
    }

    fn verify(&self, source: &OpenSource, request: &Request, now_ms: i64) -> bool {
        let Some((stamp, digest)) =
            request.header(HEADER).and_then(|header| header.strip_prefix("v=")).and_then(|rest| rest.split_once(",d="))
        else {
            return false;
        };
        // Written as a number is: the digest is made over its digits.
        let Some(sent) = stamp.parse::<i64>().ok().filter(|sent| sent.to_string() == stamp) else { return false };
        now_ms.saturating_sub(sent).saturating_abs() <= TOLERANCE_MS
            && mac::is_signed(Hash::Sha256, Encoding::Hex, source.keys(), &[&request.body, stamp.as_bytes()], digest)
    }

    fn read(&self, source: &OpenSource, request: &Request) -> Result<Vec<Event>> {
        let body: Value = serde_json::from_slice(&request.body)?;
        let mut reader = Reader::new(&body);
        let Some(kind) = reader.text(&["/event"]) else {
            return Ok(match function(&reader, &body, &source.settings, &request.body) {
                Some(report) => vec![agents::event("function", report, reader.unmapped, &request.body)],
                None => vec![Event::ignored("unknown", &request.body, "it names no event")],
            });
        };
        let mut report = call(&mut reader, &source.settings);
        report.event = match kind.as_str() {
            "call_started" => AgentEvent::Started,
            "call_ended" => AgentEvent::Ended,
            "call_analyzed" => AgentEvent::Analyzed,
            "transcript_updated" => AgentEvent::Status,
            "transfer_bridged" => {
                let to = reader.get(&["/transfer_destination", "/call/transfer_destination"]);
                report.tools.push(Tool {
                    name: ToolName::Transfer,
                    ..Tool::news("transfer_bridged", json!({ "destination": to }))
                });
                AgentEvent::Tool
            }
            "transfer_started" | "transfer_cancelled" | "transfer_ended" => {
                let to = reader.get(&["/transfer_destination", "/call/transfer_destination"]);
                report.tools.push(Tool::news(&kind, json!({ "destination": to })));
                AgentEvent::Status
            }
            "chat_started" | "chat_ended" | "chat_analyzed" => {
                return Ok(vec![Event::ignored(kind, &request.body, "a chat is no call")]);
            }
            _ => {
                reader.unknown("event", &kind);
                let ignored = Event::ignored("unknown", &request.body, "an event that is not known");
                return Ok(vec![Event { unmapped: reader.unmapped, ..ignored }]);
            }
        };
        Ok(vec![agents::event(&kind, report, reader.unmapped, &request.body)])
    }

    // A function of the agent's waits for a result; webhooks read none.
    fn reply(&self, _: &OpenSource, request: &Request) -> Option<Value> {
        let body: Value = serde_json::from_slice(&request.body).ok()?;
        (body.get("event").is_none() && body.get("name").is_some()).then(|| json!({ "result": "noted" }))
    }

    fn check_settings(&self, settings: &Value) -> Result<()> {
        agent_settings(settings, &[])
    }
}

/// The settings of an agent: what its tools mean, and `more`.
pub fn agent_settings(settings: &Value, more: &[&str]) -> Result<()> {
    let invalid = |message: String| Err(super::invalid_settings(message));
    let Some(settings) = settings.as_object() else { return invalid("settings are an object".to_owned()) };
    if let Some(key) = settings.keys().find(|key| *key != "tools" && !more.contains(&key.as_str())) {
        return invalid(format!("there is no setting {key}"));
    }
    let tools = settings.get("tools").cloned().unwrap_or_else(|| json!({}));
    match serde_json::from_value::<std::collections::BTreeMap<String, ToolName>>(tools) {
        Ok(_) => Ok(()),
        Err(error) => invalid(format!("tools map a name to transfer, callback, opt_out, site_visit or other: {error}")),
    }
}

/// What every event has: the call as it is known by then.
fn call(reader: &mut Reader<'_>, settings: &Value) -> AgentReport {
    let turns =
        reader.list(&["/call/transcript_with_tool_calls", "/transcript_with_tool_calls", "/call/transcript_object"]);
    let turns = if turns.is_empty() { reader.list(&["/call/transcript_object"]) } else { turns };
    let started = reader.get(&["/call/start_timestamp"]);
    let messages = messages(turns, started);
    let mut report = AgentReport {
        attempt_id: reader.attempt(&[
            "/call/metadata/attempt_id",
            "/call/retell_llm_dynamic_variables/attempt_id",
            "/call/metadata/attempt",
        ]),
        provider_call_id: reader.text(&["/call/telephony_identifier/twilio_call_sid"]),
        agent_call_id: reader.text(&["/call/call_id"]),
        direction: reader.text(&["/call/direction"]),
        from: reader.text(&["/call/from_number"]),
        to: reader.text(&["/call/to_number"]),
        started_at: started.and_then(agents::from_millis),
        ended_at: reader.get(&["/call/end_timestamp"]).and_then(agents::from_millis),
        duration_seconds: reader.get(&["/call/duration_ms"]).and_then(|ms| agents::whole_seconds(ms, 1000.0)),
        transcript: reader.text(&["/call/transcript"]).or_else(|| agents::transcript_of(&messages)),
        messages: (!messages.is_empty()).then_some(messages),
        summary: reader.text(&["/call/call_analysis/call_summary"]),
        recording_url: reader.text(&["/call/recording_url", "/call/recording_multi_channel_url"]),
        analysis: reader.get(&["/call/call_analysis"]).filter(|analysis| analysis.is_object()).cloned(),
        tools: tools(turns, settings),
        ..AgentReport::default()
    };
    // In US cents.
    (report.cost_micros, report.cost_currency) =
        agents::cost(reader.get(&["/call/call_cost/combined_cost"]), 100.0, "USD");
    if let Some(sentiment) = reader.text(&["/call/call_analysis/user_sentiment"]) {
        match sentiment.as_str() {
            "Positive" => report.sentiment = Some(1.0),
            "Neutral" => report.sentiment = Some(0.0),
            "Negative" => report.sentiment = Some(-1.0),
            "Unknown" => {}
            other => reader.unknown("user_sentiment", other),
        }
    }
    if let Some(data) = reader.get(&["/call/call_analysis/custom_analysis_data"]).and_then(Value::as_object) {
        agents::take_outcomes(&mut report, data, settings);
    }
    if let Some(status) = reader.text(&["/call/call_status"])
        && !["registered", "not_connected", "ongoing", "ended", "error"].contains(&status.as_str())
    {
        reader.unknown("call_status", &status);
    }
    let code = reader.text(&["/call/disconnection_reason"]);
    reader.end(&mut report, "disconnection_reason", code, end_reason);
    if ["call_transfer", "transfer_bridged", "call_take_over"]
        .iter()
        .any(|code| report.disconnect_code.as_deref() == Some(code))
    {
        let to = reader.get(&["/call/transfer_destination"]);
        report.tools.push(Tool { name: ToolName::Transfer, ..Tool::news("transferred", json!({ "destination": to })) });
    }
    report
}

/// The 34 reasons of the API, one by one.
pub fn end_reason(code: &str) -> Option<EndReason> {
    Some(match code {
        "user_hangup" => EndReason::CustomerEnded,
        "agent_hangup" => EndReason::AgentEnded,
        "call_transfer" | "transfer_bridged" | "call_take_over" => EndReason::Transferred,
        "transfer_cancelled" => EndReason::TransferFailed,
        "voicemail_reached" | "ivr_reached" => EndReason::Machine,
        "inactivity" => EndReason::Silence,
        "max_duration_reached" => EndReason::MaxDuration,
        "concurrency_limit_reached" | "no_concurrency_fallback" => EndReason::Capacity,
        "no_valid_payment" | "scam_detected" | "telephony_provider_permission_denied" | "sip_routing_error" => {
            EndReason::Config
        }
        "dial_busy" => EndReason::Busy,
        "dial_failed" | "error_unknown" => EndReason::Failed,
        "dial_no_answer" | "error_user_not_joined" => EndReason::NoAnswer,
        "invalid_destination" => EndReason::InvalidNumber,
        "telephony_provider_unavailable" => EndReason::CarrierTransient,
        "marked_as_spam" => EndReason::SpamBlocked,
        "user_declined" => EndReason::Rejected,
        "manual_stopped" => EndReason::Cancelled,
        "registered_call_timeout" => EndReason::Expired,
        "error_llm_websocket_open"
        | "error_llm_websocket_lost_connection"
        | "error_llm_websocket_runtime"
        | "error_llm_websocket_corrupt_payload"
        | "error_no_audio_received"
        | "error_asr"
        | "error_retell" => EndReason::OurFault,
        _ => return None,
    })
}

fn messages(turns: &[Value], started: Option<&Value>) -> Vec<Message> {
    turns
        .iter()
        .filter_map(|turn| {
            let role = match turn.get("role")?.as_str()? {
                "agent" => Role::AiAssistant,
                "user" => Role::Customer,
                "transfer_target" => Role::HumanAgent,
                _ => return None,
            };
            let text = turn.get("content")?.as_str().filter(|text| !text.trim().is_empty())?.to_owned();
            let offset = turn.pointer("/words/0/start").and_then(Value::as_f64);
            let at = offset
                .zip(started.and_then(Value::as_f64))
                .and_then(|(offset, started)| agents::from_millis(&json!(started + offset * 1000.0)));
            Some(Message { role, text, at })
        })
        .collect()
}

/// The tools that were called, but for those that are known to have failed.
fn tools(turns: &[Value], settings: &Value) -> Vec<Tool> {
    let field = |turn: &Value, name: &str| turn.get(name).and_then(Value::as_str).map(str::to_owned);
    let failed: HashSet<String> = turns
        .iter()
        .filter(|turn| turn.get("successful").and_then(Value::as_bool) == Some(false))
        .filter_map(|turn| field(turn, "tool_call_id"))
        .collect();
    turns
        .iter()
        .filter(|turn| field(turn, "role").as_deref() == Some("tool_call_invocation"))
        .filter_map(|turn| Some((field(turn, "tool_call_id")?, field(turn, "name")?, turn.get("arguments")?)))
        .filter(|(id, _, _)| !failed.contains(id))
        .map(|(id, name, arguments)| Tool::used(id, &name, arguments, settings))
        .collect()
}

/// A function of the agent's that is served here: `{"name","args","call"}`. Its use is in the call's transcript too, with an id.
fn function(reader: &Reader<'_>, body: &Value, settings: &Value, raw: &[u8]) -> Option<AgentReport> {
    let name = reader.text(&["/name"])?;
    reader.get(&["/call"])?;
    let arguments = body.get("args").cloned().unwrap_or_else(|| json!({}));
    let mut inner = Reader::new(body);
    let mut report = call(&mut inner, settings);
    let here = Tool::used(super::digest(raw), &name, &arguments, settings);
    let known = report.tools.iter().any(|tool| tool.called == name && tool.arguments == here.arguments);
    if !known {
        report.tools.push(here);
    }
    report.event = AgentEvent::Tool;
    Some(report)
}
