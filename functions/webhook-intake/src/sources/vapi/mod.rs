//! Vapi: server messages, `{"message": {"type", "call", …}}`, authenticated as the assistant's server is configured.

mod authentication;
mod reasons;

pub use reasons::end_reason;

use super::{
    Event, OpenSource, Source,
    agents::{self, AgentEvent, AgentReport, Message, Reader, Role, Tool, ToolName},
};
use serde_json::{Value, json};
use shared::{Result, http::Request, seal};

/// Messages that come many times a second, or are about no call, and change nothing that is kept.
const NOTHING: [&str; 18] = [
    "speech-update",
    "user-interrupted",
    "model-output",
    "voice-input",
    "assistant.speechStarted",
    "knowledge-base-request",
    "call.endpointing.request",
    "voice-request",
    "handoff-destination-request",
    "session.created",
    "session.updated",
    "session.deleted",
    "chat.created",
    "chat.deleted",
    "call.deleted",
    "call.delete.failed",
    "campaign.predial",
    "assistant-speech",
];

/// Vapi.
pub struct Vapi;

impl Source for Vapi {
    fn name(&self) -> &'static str {
        "vapi"
    }

    fn signed_headers(&self) -> &'static [&'static str] {
        &[]
    }

    // Which header signs is a setting, which is not at hand when a request is kept unverified.
    fn keeps(&self, header: &str, verified: bool) -> bool {
        let foreign = ["host", "cookie", "forwarded", "connection", "content-length", "accept-encoding"];
        !verified && !foreign.contains(&header) && !header.starts_with("x-forwarded-") && !header.starts_with("x-amz")
    }

    fn verify(&self, source: &OpenSource, request: &Request, now_ms: i64) -> bool {
        authentication::verify(source, request, now_ms)
    }

    fn read(&self, source: &OpenSource, request: &Request) -> Result<Vec<Event>> {
        let body: Value = serde_json::from_slice(&request.body)?;
        let mut reader = Reader::new(body.get("message").unwrap_or(&body));
        let Some(kind) = reader.text(&["/type"]) else {
            return Ok(vec![Event::ignored("unknown", &request.body, "it names no type")]);
        };
        let Some(mut report) = told(&kind, &mut reader, &source.settings) else {
            let mut ignored = Event::ignored(&kind, &request.body, "it changes nothing that is kept");
            if !is_nothing(&kind) {
                reader.unknown("type", &kind);
                ignored = Event {
                    unmapped: reader.unmapped,
                    ..Event::ignored("unknown", &request.body, "a type that is not known")
                };
            }
            return Ok(vec![ignored]);
        };
        if let Some(plain) =
            reader.get(&["/analysis/structuredData", "/call/analysis/structuredData"]).and_then(Value::as_object)
        {
            agents::take_outcomes(&mut report, plain, &source.settings);
        }
        Ok(vec![agents::event(&kind, report, reader.unmapped, &request.body)])
    }

    // Vapi waits for what its requests ask; to the others any answer will do.
    fn reply(&self, source: &OpenSource, request: &Request) -> Option<Value> {
        let body: Value = serde_json::from_slice(&request.body).ok()?;
        let reader = Reader::new(body.get("message").unwrap_or(&body));
        match reader.text(&["/type"])?.as_str() {
            "tool-calls" => {
                let noted = |tool: &Tool| json!({ "toolCallId": tool.id, "name": tool.called, "result": "noted" });
                let results: Vec<Value> = tool_calls(&reader, &source.settings).iter().map(noted).collect();
                Some(json!({ "results": results }))
            }
            "transfer-destination-request" | "handoff-destination-request" => {
                Some(match (source.settings.get("transfer_destination"), source.setting("transfer_refused")) {
                    // The rules of a dial hold for whoever a call is handed to.
                    (Some(_), Some(reason)) => json!({ "error": format!("the destination is refused: {reason}") }),
                    (Some(destination), None) => json!({ "destination": destination }),
                    (None, _) => json!({ "error": "no destination is configured" }),
                })
            }
            "assistant-request" => Some(match source.setting("assistant_id") {
                Some(id) => json!({ "assistantId": id }),
                None => json!({ "error": "no assistant is configured" }),
            }),
            _ => None,
        }
    }

    fn check_settings(&self, settings: &Value) -> Result<()> {
        let mut more = authentication::SETTINGS.to_vec();
        more.extend(["transfer_destination", "assistant_id"]);
        super::retell::agent_settings(settings, &more)?;
        authentication::check(settings)
    }

    fn new_secret(&self) -> Option<String> {
        Some(seal::new_webhook_secret())
    }
}

/// `transcript` is also written with its kind: `transcript[transcriptType="final"]`.
fn is_nothing(kind: &str) -> bool {
    NOTHING.contains(&kind)
}

/// What a message tells; `None` for one that changes nothing.
fn told(kind: &str, reader: &mut Reader<'_>, settings: &Value) -> Option<AgentReport> {
    let mut report = call(reader);
    report.event = match kind.split('[').next().unwrap_or_default() {
        "status-update" => {
            let status = reader.text(&["/status"]).unwrap_or_default();
            match status.as_str() {
                "in-progress" => AgentEvent::Started,
                "ended" => AgentEvent::Ended,
                "scheduled" | "queued" | "ringing" | "forwarding" | "not-found" | "deletion-failed" => {
                    report.tools.push(Tool::news("status", json!({ "status": status })));
                    AgentEvent::Status
                }
                other => {
                    reader.unknown("status", other);
                    AgentEvent::Status
                }
            }
        }
        "end-of-call-report" => AgentEvent::Analyzed,
        "transcript" => {
            if report.messages.is_none() && reader.text(&["/transcriptType"]).as_deref() != Some("partial") {
                let role = role(&reader.text(&["/role"]).unwrap_or_default());
                let text = reader.text(&["/transcript"]);
                report.messages = role.zip(text).map(|(role, text)| {
                    vec![Message { role, text, at: reader.get(&["/timestamp"]).and_then(agents::from_millis) }]
                });
            }
            report.transcript = report.messages.as_deref().and_then(agents::transcript_of);
            AgentEvent::Status
        }
        "conversation-update" => AgentEvent::Status,
        "tool-calls" | "function-call" => {
            report.tools = tool_calls(reader, settings);
            AgentEvent::Tool
        }
        "transfer-update" => {
            let destination = reader.get(&["/destination"]);
            let number = reader.text(&["/destination/number", "/destination/sipUri", "/destination/assistantName"]);
            let to_person =
                reader.text(&["/destination/type"]).as_deref() != Some("assistant") && destination.is_some();
            let news = Tool::news("transfer-update", json!({ "destination": number }));
            report.tools.push(Tool { name: if to_person { ToolName::Transfer } else { ToolName::Other }, ..news });
            AgentEvent::Tool
        }
        "hang" | "transfer-destination-request" | "phone-call-control" | "assistant-request" => {
            let request = reader.get(&["/request"]);
            report
                .tools
                .push(Tool::news(kind, request.map_or_else(|| json!({}), |request| json!({ "request": request }))));
            AgentEvent::Status
        }
        "language-change-detected" => {
            report.language = reader.text(&["/language"]);
            AgentEvent::Status
        }
        "call.artifact.upload" | "call-artifact-upload" => AgentEvent::Status,
        _ => return None,
    };
    let code = reader.text(&["/endedReason", "/call/endedReason"]);
    reader.end(&mut report, "endedReason", code, end_reason);
    Some(report)
}

/// What every message has: the call as it is known by then.
fn call(reader: &Reader<'_>) -> AgentReport {
    let turns = reader.list(&["/artifact/messages", "/messages", "/call/artifact/messages"]);
    let messages: Vec<Message> = turns.iter().filter_map(message).collect();
    let customer = reader.text(&["/customer/number", "/call/customer/number"]);
    let ours = reader.text(&["/phoneNumber/number", "/call/phoneNumber/number"]);
    let direction = match reader.text(&["/call/type"]).as_deref() {
        Some("inboundPhoneCall") => Some("inbound"),
        Some("outboundPhoneCall") => Some("outbound"),
        _ => None,
    };
    let (from, to) = if direction == Some("inbound") { (customer, ours) } else { (ours, customer) };
    let time = |pointers: &[&str]| reader.text(pointers).and_then(|text| agents::rfc3339(&text));
    let (started_at, ended_at) = (time(&["/startedAt", "/call/startedAt"]), time(&["/endedAt", "/call/endedAt"]));
    let (cost_micros, cost_currency) = agents::cost(reader.get(&["/cost", "/call/cost"]), 1.0, "USD");
    AgentReport {
        attempt_id: reader.attempt(&[
            "/call/metadata/attempt_id",
            "/call/assistantOverrides/variableValues/attempt_id",
            "/artifact/variableValues/attempt_id",
            "/assistant/metadata/attempt_id",
            "/call/customer/externalId",
            "/customer/externalId",
        ]),
        provider_call_id: reader.text(&["/call/phoneCallProviderId"]),
        agent_call_id: reader.text(&["/call/id"]),
        direction: direction.map(str::to_owned),
        from,
        to,
        duration_seconds: reader
            .get(&["/durationSeconds"])
            .and_then(|seconds| agents::whole_seconds(seconds, 1.0))
            .or_else(|| seconds_between(started_at.as_deref()?, ended_at.as_deref()?)),
        started_at,
        ended_at,
        cost_micros,
        cost_currency,
        transcript: reader.text(&["/artifact/transcript", "/transcript", "/call/artifact/transcript"]),
        messages: (!messages.is_empty()).then_some(messages),
        summary: reader.text(&["/analysis/summary", "/summary", "/call/analysis/summary"]),
        recording_url: reader.text(&[
            "/artifact/recordingUrl",
            "/artifact/recording/mono/combinedUrl",
            "/artifact/stereoRecordingUrl",
            "/recordingUrl",
            "/call/artifact/recordingUrl",
        ]),
        analysis: reader.get(&["/analysis", "/call/analysis"]).filter(|analysis| analysis.is_object()).cloned(),
        ..AgentReport::default()
    }
}

fn seconds_between(from: &str, to: &str) -> Option<i64> {
    let parse = |text: &str| chrono::DateTime::parse_from_rfc3339(text).ok();
    Some((parse(to)? - parse(from)?).num_seconds()).filter(|seconds| *seconds >= 0)
}

fn role(name: &str) -> Option<Role> {
    match name {
        "user" | "customer" => Some(Role::Customer),
        "bot" | "assistant" => Some(Role::AiAssistant),
        _ => None,
    }
}

fn message(turn: &Value) -> Option<Message> {
    let role = role(turn.get("role")?.as_str()?)?;
    let text = turn.get("message").or_else(|| turn.get("content"))?.as_str()?;
    let text = Some(text).filter(|text| !text.trim().is_empty())?.to_owned();
    Some(Message { role, text, at: turn.get("time").and_then(agents::from_millis) })
}

/// The calls of a `tool-calls` message; an older one has a single `functionCall`.
fn tool_calls(reader: &Reader<'_>, settings: &Value) -> Vec<Tool> {
    let text = |value: &Value, pointer: &str| value.pointer(pointer).and_then(Value::as_str).map(str::to_owned);
    let listed = reader.list(&["/toolCallList", "/toolCalls"]);
    let mut tools: Vec<Tool> = listed
        .iter()
        .filter_map(|call| {
            let name = text(call, "/function/name").or_else(|| text(call, "/name"))?;
            let arguments = call
                .pointer("/function/arguments")
                .or_else(|| call.get("arguments"))
                .or_else(|| call.get("parameters"));
            Some(Tool::used(text(call, "/id")?, &name, arguments.unwrap_or(&json!({})), settings))
        })
        .collect();
    if let Some((call, name)) = reader.get(&["/functionCall"]).and_then(|call| Some((call, text(call, "/name")?))) {
        let arguments = call.get("parameters").cloned().unwrap_or_else(|| json!({}));
        tools.push(Tool::used(Tool::news(&name, arguments.clone()).id, &name, &arguments, settings));
    }
    let at = reader.get(&["/timestamp"]).and_then(agents::from_millis);
    tools.iter_mut().for_each(|tool| tool.at = at.clone());
    tools
}
