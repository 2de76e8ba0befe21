//! Any voice agent, by Standard Webhooks: `{"type": "agent.<event>", "data": {the agent payload}}`. What an organization's own agent
//! speaks, without a provider in between.

use super::{
    Event, OpenSource, Payload, Source,
    agents::{AgentEvent, AgentReport, Tool, rfc3339},
    retell::agent_settings,
};
use serde_json::Value;
use shared::{Error, Result, http::Request, seal, standard_webhooks};

/// An agent that speaks our own words.
pub struct Agent;

impl Source for Agent {
    fn name(&self) -> &'static str {
        "agent"
    }

    fn signed_headers(&self) -> &'static [&'static str] {
        &["webhook-id", "webhook-timestamp", "webhook-signature"]
    }

    fn verify(&self, source: &OpenSource, request: &Request, now_ms: i64) -> bool {
        let now = now_ms.div_euclid(1000);
        standard_webhooks::verify(&source.secrets, &request.headers, &request.body, now).is_ok()
    }

    fn read(&self, source: &OpenSource, request: &Request) -> Result<Vec<Event>> {
        let body: Value = serde_json::from_slice(&request.body)?;
        let kind = body.get("type").and_then(Value::as_str).unwrap_or_default();
        let event = match kind.strip_prefix("agent.") {
            Some("started") => AgentEvent::Started,
            Some("ended") => AgentEvent::Ended,
            Some("analyzed") => AgentEvent::Analyzed,
            Some("tool") => AgentEvent::Tool,
            Some("status") => AgentEvent::Status,
            _ => return Err(Error::malformed("type", "an agent's event is started, ended, analyzed, tool or status")),
        };
        let data = body.get("data").filter(|data| data.is_object());
        let data = data.ok_or_else(|| Error::malformed("data", "an agent's event has an object of data"))?;
        let mut report: AgentReport =
            // What serde says would quote what was said.
            serde_json::from_value(data.clone()).map_err(|_| Error::malformed("data", "a part of the data has another shape"))?;
        report.event = event;
        for time in [&mut report.started_at, &mut report.ended_at] {
            *time = time.as_deref().and_then(rfc3339);
        }
        for message in report.messages.iter_mut().flatten() {
            message.at = message.at.as_deref().and_then(rfc3339);
        }
        report.duration_seconds = report.duration_seconds.filter(|seconds| (0..=1_000_000).contains(seconds));
        let is_currency = |code: &String| code.len() == 3 && code.bytes().all(|letter| letter.is_ascii_uppercase());
        report.cost_currency = report.cost_currency.filter(is_currency);
        report.cost_micros = report
            .cost_micros
            .filter(|micros| report.cost_currency.is_some() && (0..=1_000_000_000_000_000).contains(micros));
        report.first_audio_ms = report.first_audio_ms.filter(|milliseconds| (0..=3_600_000).contains(milliseconds));
        report.sentiment = report.sentiment.filter(|score| (-1.0..=1.0).contains(score));
        report.tools = report.tools.into_iter().map(|tool| understood(tool, &source.settings)).collect();
        let id = request.header("webhook-id").unwrap_or_default();
        let key = format!("id|{}", id.chars().take(200).collect::<String>());
        Ok(vec![Event::new(kind, key, Payload::Agent(Box::new(report)))])
    }

    fn check_settings(&self, settings: &Value) -> Result<()> {
        agent_settings(settings, &[])
    }

    fn check_secret(&self, secret: &str) -> Result<()> {
        match standard_webhooks::sign(secret, "id", 0, b"") {
            Some(_) if secret.starts_with("whsec_") && secret.len() >= 30 => Ok(()),
            _ => {
                let message = "a secret of Standard Webhooks is whsec_ and base64";
                Err(Error::new(http::StatusCode::UNPROCESSABLE_ENTITY, "invalid_secret", message).at("secret"))
            }
        }
    }

    fn new_secret(&self) -> Option<String> {
        Some(seal::new_webhook_secret())
    }
}

/// A tool with the time that its arguments name.
fn understood(tool: Tool, settings: &Value) -> Tool {
    let read = Tool::used(tool.id.clone(), &tool.called, &tool.arguments, settings);
    let when = tool.when.as_deref().and_then(rfc3339).or(read.when);
    Tool { when, at: tool.at.as_deref().and_then(rfc3339), arguments: read.arguments, ..tool }
}
