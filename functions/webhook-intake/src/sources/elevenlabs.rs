//! ElevenLabs: `ElevenLabs-Signature: t=<unix seconds>,v0=<hex>`, HMAC-SHA256 over the seconds, a dot and the raw body.

use super::{
    Event, OpenSource, Sound, Source,
    agents::{self, AgentEvent, AgentReport, EndReason, Message, Reader, Role, Tool},
    retell::agent_settings,
};
use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use shared::{
    Result,
    http::Request,
    mac::{self, Hash},
};
use std::collections::HashSet;

/// How old a signature may be. One from the future is taken, as ElevenLabs' own library takes it: its clock is the one that signs.
const TOLERANCE_MS: i64 = 30 * 60 * 1000;
const HEADER: &str = "elevenlabs-signature";
/// The events that carry a call's sound, base64.
const AUDIO: [&str; 2] = ["post_call_audio", "unredacted_audio"];
/// What Lambda takes: a webhook with sound may be as large.
const BODY_LIMIT: usize = 6 * 1024 * 1024;

/// ElevenLabs.
pub struct ElevenLabs;

impl Source for ElevenLabs {
    fn name(&self) -> &'static str {
        "elevenlabs"
    }

    fn signed_headers(&self) -> &'static [&'static str] {
        &[HEADER]
    }

    fn verify(&self, source: &OpenSource, request: &Request, now_ms: i64) -> bool {
        let Some(header) = request.header(HEADER) else { return false };
        let part = |prefix: &str| header.split(',').find_map(|part| part.strip_prefix(prefix));
        let (Some(stamp), Some(signature)) = (part("t="), part("v0=")) else { return false };
        let Ok(sent) = stamp.parse::<i64>() else { return false };
        if sent.saturating_mul(1000) < now_ms.saturating_sub(TOLERANCE_MS) {
            return false;
        }
        let parts: [&[u8]; 3] = [stamp.as_bytes(), b".", &request.body];
        source.keys().fold(false, |matched, key| {
            let expected = hex::encode(mac::hmac(Hash::Sha256, key, &parts));
            matched | (!key.is_empty() & mac::same(expected.as_bytes(), signature.as_bytes()))
        })
    }

    fn body_limit(&self) -> usize {
        BODY_LIMIT
    }

    fn set_aside(&self, request: &Request) -> Option<Sound> {
        let mut body: Value = serde_json::from_slice(&request.body).ok()?;
        let kind = body.get("type")?.as_str()?;
        if !AUDIO.contains(&kind) {
            return None;
        }
        let place = body.pointer_mut("/data/full_audio")?;
        let audio = STANDARD.decode(place.as_str()?).ok()?;
        // What it was stays with the event, which is known again by that.
        *place = json!({ "bytes": audio.len(), "sha256": hex::encode(Sha256::digest(&audio)) });
        Some(Sound { audio: audio.into(), rest: body.to_string().into() })
    }

    fn read(&self, source: &OpenSource, request: &Request) -> Result<Vec<Event>> {
        let body: Value = serde_json::from_slice(&request.body)?;
        let mut reader = Reader::new(&body);
        let Some(kind) = reader.text(&["/type"]) else {
            return Ok(vec![Event::ignored("unknown", &request.body, "it names no type")]);
        };
        let mut report =
            AgentReport { agent_call_id: reader.text(&["/data/conversation_id"]), ..AgentReport::default() };
        match kind.as_str() {
            "post_call_transcription" | "unredacted_transcript" => {
                transcription(&mut reader, &mut report, &source.settings);
            }
            // The sound is in Storage by now, and becomes the recording of whoever has this conversation.
            kind if AUDIO.contains(&kind) => report.event = AgentEvent::Status,
            "call_initiation_failure" => failure(&mut reader, &mut report),
            "answering_machine_detection" => {
                report.event = AgentEvent::Status;
                report.tools.push(Tool::news(&kind, body.get("data").cloned().unwrap_or_default()));
                report.provider_call_id = reader.text(&["/data/metadata/phone_call/call_sid", "/data/call_sid"]);
            }
            "voice_removal_notice" | "voice_removal_notice_withdrawn" | "voice_removed" => {
                return Ok(vec![Event::ignored(kind, &request.body, "it is about no call")]);
            }
            _ => {
                reader.unknown("type", &kind);
                let ignored = Event::ignored("unknown", &request.body, "a type that is not known");
                return Ok(vec![Event { unmapped: reader.unmapped, ..ignored }]);
            }
        }
        Ok(vec![agents::event(&kind, report, reader.unmapped, &request.body)])
    }

    fn check_settings(&self, settings: &Value) -> Result<()> {
        agent_settings(settings, &[])
    }
}

/// The whole conversation, and what was made of it.
fn transcription(reader: &mut Reader<'_>, report: &mut AgentReport, settings: &Value) {
    report.event = AgentEvent::Analyzed;
    let turns = reader.list(&["/data/transcript"]);
    let started = reader.get(&["/data/metadata/start_time_unix_secs"]);
    let seconds = reader.get(&["/data/metadata/call_duration_secs"]);
    let messages: Vec<Message> = turns.iter().filter_map(|turn| message(turn, started)).collect();
    report.attempt_id = reader.attempt(&["/data/conversation_initiation_client_data/dynamic_variables/attempt_id"]);
    report.provider_call_id = reader.text(&["/data/metadata/phone_call/call_sid"]);
    report.direction = reader.text(&["/data/metadata/phone_call/direction"]);
    let agent = reader.text(&["/data/metadata/phone_call/agent_number"]);
    let external = reader.text(&["/data/metadata/phone_call/external_number"]);
    (report.from, report.to) =
        if report.direction.as_deref() == Some("inbound") { (external, agent) } else { (agent, external) };
    report.started_at = started.and_then(|seconds| agents::from_seconds(seconds, 0.0));
    report.ended_at =
        started.zip(seconds.and_then(Value::as_f64)).and_then(|(at, seconds)| agents::from_seconds(at, seconds));
    report.duration_seconds = seconds.and_then(|seconds| agents::whole_seconds(seconds, 1.0));
    report.transcript = agents::transcript_of(&messages);
    report.messages = (!messages.is_empty()).then_some(messages);
    report.summary = reader.text(&["/data/analysis/transcript_summary"]);
    report.analysis = reader.get(&["/data/analysis"]).filter(|analysis| analysis.is_object()).cloned();
    report.language = reader.text(&["/data/metadata/main_language"]);
    // Credits, whose price is that of the account's plan: an exchange rate like another.
    (report.cost_micros, report.cost_currency) = agents::cost(reader.get(&["/data/metadata/cost"]), 1.0, "XEL");
    report.tools = tools(turns, settings);
    if let Some(results) = reader.get(&["/data/analysis/data_collection_results"]).and_then(Value::as_object) {
        let data =
            results.iter().filter_map(|(key, result)| Some((key.clone(), result.get("value")?.clone()))).collect();
        agents::take_outcomes(report, &data, settings);
    }
    let mut known = |pointer: &str, field: &'static str, values: &[&str]| {
        if let Some(value) = reader.text(&[pointer]).filter(|value| !values.contains(&value.as_str())) {
            reader.unknown(field, &value);
        }
    };
    known("/data/status", "status", &["initiated", "in-progress", "processing", "done", "failed"]);
    known("/data/analysis/call_successful", "call_successful", &["success", "failure", "unknown"]);
    let reason = reader.text(&["/data/metadata/termination_reason"]);
    reader.end(report, "termination_reason", reason, end_reason);
    if report.disconnect_reason.is_none() && reader.text(&["/data/status"]).as_deref() == Some("failed") {
        let code = reader.text(&["/data/metadata/error/reason"]).unwrap_or_else(|| "failed".to_owned());
        reader.end(report, "error", Some(code), |_| Some(EndReason::OurFault));
    }
}

/// Why a conversation ended. The provider writes sentences and lists none; these are the ones that it is seen to write.
pub fn end_reason(code: &str) -> Option<EndReason> {
    Some(match code.trim_end_matches('.').to_ascii_lowercase().as_str() {
        "call ended by remote party" | "client disconnected" | "client disconnected: 1000" => EndReason::CustomerEnded,
        "end_call tool was called" | "agent ended the call" => EndReason::AgentEnded,
        "transfer_to_number tool was called" | "call transferred" => EndReason::Transferred,
        "max duration exceeded" | "max_duration_exceeded" | "conversation exceeded the maximum duration" => {
            EndReason::MaxDuration
        }
        "silence timeout" | "no user input" | "inactivity" => EndReason::Silence,
        "voicemail detected" | "voicemail_detection tool was called" => EndReason::Machine,
        _ => return None,
    })
}

/// No conversation came about. The carrier's own words are in `metadata.body`.
fn failure(reader: &mut Reader<'_>, report: &mut AgentReport) {
    report.event = AgentEvent::Ended;
    let body = "/data/metadata/body";
    let of = |name: &str| format!("{body}/{name}");
    report.provider_call_id = reader.text(&[&of("CallSid"), &of("call_sid"), &of("call_id")]);
    report.attempt_id = reader.attempt(&[
        "/data/conversation_initiation_client_data/dynamic_variables/attempt_id",
        "/data/metadata/attempt_id",
    ]);
    report.from = reader.text(&[&of("From"), &of("from_number")]);
    report.to = reader.text(&[&of("To"), &of("to_number")]);
    let reason = reader.text(&["/data/failure_reason"]);
    reader.end(report, "failure_reason", reason, |code| match code {
        "busy" => Some(EndReason::Busy),
        "no-answer" => Some(EndReason::NoAnswer),
        "unknown" => Some(EndReason::Failed),
        _ => None,
    });
}

fn message(turn: &Value, started: Option<&Value>) -> Option<Message> {
    let role = match turn.get("role")?.as_str()? {
        "user" => Role::Customer,
        "agent" => Role::AiAssistant,
        _ => return None,
    };
    let text = turn.get("message")?.as_str().filter(|text| !text.trim().is_empty())?.to_owned();
    let offset = turn.get("time_in_call_secs").and_then(Value::as_f64);
    let at = started.zip(offset).and_then(|(started, offset)| agents::from_seconds(started, offset));
    Some(Message { role, text, at })
}

/// The tools that were called, but for those that are known to have failed.
fn tools(turns: &[Value], settings: &Value) -> Vec<Tool> {
    let of = |name: &str| {
        turns.iter().filter_map(|turn| turn.get(name)?.as_array().cloned()).flatten().collect::<Vec<Value>>()
    };
    let field = |value: &Value, name: &str| value.get(name).and_then(Value::as_str).map(str::to_owned);
    let failed: HashSet<String> = of("tool_results")
        .iter()
        .filter(|result| result.get("is_error").and_then(Value::as_bool) == Some(true))
        .filter_map(|result| field(result, "request_id"))
        .collect();
    of("tool_calls")
        .iter()
        .filter(|call| call.get("tool_has_been_called").and_then(Value::as_bool) != Some(false))
        .filter_map(|call| {
            Some((field(call, "request_id")?, field(call, "tool_name")?, call.get("params_as_json")?.clone()))
        })
        .filter(|(id, _, _)| !failed.contains(id))
        .map(|(id, name, arguments)| {
            let arguments = if arguments.as_str() == Some("") { json!({}) } else { arguments };
            Tool::used(id, &name, &arguments, settings)
        })
        .collect()
}
