//! From a request to an applied event: verify, then one database call, else the buffer, else 503.

use crate::{
    Intake, buffer, recordings, sound,
    sources::{self, Event, OpenSource, Source},
};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use shared::{
    Error, Result,
    http::{self as web, Request, Response},
    metrics::{self, Metric},
    queue::Outgoing,
};
use std::{borrow::Cow, time::Duration};
use uuid::Uuid;

/// How long the database may be silent before an event goes to the buffer.
pub const APPLY_LIMIT: Duration = Duration::from_secs(2);

/// How long the queue may take to hear of a recording.
const ANNOUNCE_LIMIT: Duration = Duration::from_millis(500);

/// What became of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Disposition {
    /// It changed its row, or told it nothing new.
    Applied,
    /// It was here before.
    Duplicate,
    /// It is kept, and means nothing to us.
    Ignored,
    /// It is kept; its attempt is not known, or is bound to another call.
    Orphan,
    /// It is kept; applying it failed and will be tried again.
    Failed,
    /// The database is away; the queue keeps it.
    Buffered,
}

#[derive(Deserialize)]
struct Answer {
    result: Disposition,
    #[serde(default)]
    organization_id: Option<Uuid>,
    #[serde(default)]
    recordings: Vec<recordings::Waiting>,
}

/// Whether the sender's signature could be checked.
pub enum Verdict<T> {
    /// It is right; what it took to check it.
    Signed(T),
    /// The source's secret could not be had.
    Unchecked,
}

/// Receives what a source sends to `POST <source>/<id>`. Errors: 404 where there is no such source, 403 for a signature that is not
/// right, 503 when neither database nor queue takes it.
pub async fn receive(intake: &Intake, source: &dyn Source, id: Uuid, request: &Request) -> Result<Response> {
    if source.is_greeting(request) {
        return web::json(&json!({ "result": Disposition::Ignored }));
    }
    let now_ms = chrono::Utc::now().timestamp_millis();
    let (verified, request, recording, applied, reply) =
        match verify(intake, source, id, request, now_ms, APPLY_LIMIT).await? {
            Verdict::Signed(open) => {
                let (request, recording) = sound::set_aside(intake, source, &open, request).await?;
                let mut events = read(source, &open, &request);
                sound::attach(&mut events, recording.as_ref());
                let event = sources::apply_request(source.name(), id, &request, &events);
                let applied = apply(intake, &event, APPLY_LIMIT).await;
                let reply = source.reply(&open, &request);
                (true, request, recording, applied, reply)
            }
            Verdict::Unchecked => {
                let away = Error::unavailable("the source's secret could not be had");
                // Whoever could put anything of this size into Storage unasked would fill it; the sender has it still.
                if request.body.len() > sources::EVENT_LIMIT {
                    return Err(away);
                }
                (false, Cow::Borrowed(request), None, Err(away), None)
            }
        };
    let applied = match applied {
        Ok(applied) => applied,
        Err(error) => {
            tracing::warn!(error = %error, "the database did not take the event; it goes to the buffer");
            let keeps = |header: &str| source.keeps(header, verified);
            let message = buffer::message(&request, verified, now_ms, recording.as_ref(), keeps)?;
            if let Err(error) = keep(intake, id.to_string(), message).await {
                sound::forget(intake, recording.as_ref()).await;
                return Err(error);
            }
            Disposition::Buffered
        }
    };
    match reply {
        Some(reply) => web::json(&reply),
        None => answer(applied),
    }
}

/// Verifies a request against the source that its path names.
pub async fn verify(
    intake: &Intake,
    source: &dyn Source,
    id: Uuid,
    request: &Request,
    now_ms: i64,
    limit: Duration,
) -> Result<Verdict<OpenSource>> {
    let verdict =
        check(intake, id, limit, |open| (open.provider == source.name()).then(|| source.verify(open, request, now_ms)))
            .await?;
    verdict.ok_or_else(|| {
        tracing::warn!(source = source.name(), source_id = %id, "a signature does not match");
        Error::bad_signature()
    })
}

/// Looks the source up and asks `is_signed`, a second time with a fresh look when the secret may have been rotated. `None`: the
/// signature is wrong. Error 404 where there is no such source, or it is another provider's (`is_signed` gives `None`).
pub async fn check(
    intake: &Intake,
    id: Uuid,
    limit: Duration,
    is_signed: impl Fn(&OpenSource) -> Option<bool>,
) -> Result<Option<Verdict<OpenSource>>> {
    let secrets = intake.secrets.get().await?;
    for looked_again in [false, true] {
        let open = match intake.accounts.get(&intake.supabase, &secrets, id, limit).await {
            Ok(open) => open,
            Err(error) => {
                tracing::warn!(error = %error, "the source's secret could not be had; the event is kept unverified");
                return Ok(Some(Verdict::Unchecked));
            }
        };
        let named = match open.and_then(|open| Some((is_signed(&open)?, open))) {
            Some((true, open)) => return Ok(Some(Verdict::Signed(open))),
            Some((false, _)) => true,
            None => false,
        };
        if looked_again || !intake.accounts.forget(id).await {
            let unknown = || Error::not_found("there is no such source").at("source_id");
            return if named { Ok(None) } else { Err(unknown()) };
        }
    }
    Ok(None)
}

/// What a verified request tells; what is not understood is an event too.
pub fn read(source: &dyn Source, open: &OpenSource, request: &Request) -> Vec<Event> {
    match source.read(open, request) {
        Ok(events) if !events.is_empty() => events,
        Ok(_) => vec![Event::ignored("empty", &request.body, "it tells nothing")],
        Err(error) => vec![Event::ignored("unreadable", &request.body, format!("{}: {}", error.code, error.message))],
    }
}

/// Stores and applies an event: one request.
pub async fn apply(intake: &Intake, event: &Value, limit: Duration) -> Result<Disposition> {
    let event = sources::without_nul(event.clone());
    let answer: Answer = intake.supabase.call_within("apply_event", &event, limit).await?;
    if let Some(organization) = answer.organization_id {
        tracing::Span::current().record("organization_id", tracing::field::display(organization));
    }
    tracing::debug!(source = event["source"].as_str(), result = ?answer.result, "event");
    // A carrier's link may live for ten minutes only; a queue that is slow to take it must not hold the carrier up.
    let announced = tokio::time::timeout(ANNOUNCE_LIMIT, recordings::announce(intake, &answer.recordings)).await;
    if announced.is_err() {
        tracing::warn!("the queue is slow; the recording waits for the sweep");
    }
    Ok(answer.result)
}

/// Puts a raw request on the buffer, behind the others of its source. Error 503 when the queue refuses too.
pub async fn keep(intake: &Intake, group: String, body: String) -> Result<()> {
    let refused = intake.queues.send(&intake.config, "intake", &[Outgoing { group, body }]).await?;
    if refused.is_empty() {
        metrics::count(Metric::EventsBuffered, 1);
        Ok(())
    } else {
        Err(Error::unavailable("neither the database nor the buffer takes the event"))
    }
}

/// 2xx for all that is kept, since sending it again would change nothing; the body says what became of it.
pub fn answer(applied: Disposition) -> Result<Response> {
    let status = match applied {
        Disposition::Orphan | Disposition::Buffered => StatusCode::ACCEPTED,
        _ => StatusCode::OK,
    };
    let mut body = Map::from_iter([("result".to_owned(), json!(applied))]);
    if applied == Disposition::Orphan {
        body.extend([
            ("code".to_owned(), json!("unknown_attempt")),
            (
                "message".to_owned(),
                json!("the event is kept; what it is about is not known here, or is bound to another call"),
            ),
            ("details".to_owned(), json!({ "field": "attempt_id" })),
            ("hint".to_owned(), Value::Null),
        ]);
    }
    web::json_with(status, &body)
}
