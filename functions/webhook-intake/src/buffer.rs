//! The buffer: what the database could not take, kept on a queue and drained by the same function.

use crate::{
    Intake, callbacks,
    pipeline::{self, Disposition, Verdict},
    sound,
    sources::{self, apply_request, carriers::Callback},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use chrono::DateTime;
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use serde_json::{Value, json};
use shared::{
    Error, Result,
    http::Request,
    queue::{IntakeMessage, VERSION},
    storage::Stored,
    trigger::{Invocation, Message},
};
use std::{
    borrow::Cow,
    collections::BTreeMap,
    time::{Duration, Instant},
};
use uuid::Uuid;

/// How long one event may take when drained.
const APPLY_LIMIT: Duration = Duration::from_secs(5);

/// A request as it arrived, as a message's body, with the headers that `keeps` names.
pub fn message(
    request: &Request,
    verified: bool,
    received_at_ms: i64,
    recording: Option<&Stored>,
    keeps: impl Fn(&str) -> bool,
) -> Result<String> {
    let headers = request
        .headers
        .iter()
        .filter(|(name, _)| *name == http::header::CONTENT_TYPE || keeps(name.as_str()))
        .filter_map(|(name, value)| Some((name.as_str().to_owned(), value.to_str().ok()?.to_owned())))
        .collect();
    IntakeMessage::Request {
        v: VERSION,
        verified,
        received_at_ms,
        path: request.path.clone(),
        query: request.query.clone(),
        headers,
        body: STANDARD.encode(&request.body),
        recording: recording.cloned(),
    }
    .to_json()
}

/// Applies a batch, one after the other: the database is just coming back. Returns the messages that must come again.
pub async fn drain(intake: &Intake, batch: Vec<Message>, invocation: &Invocation) -> Vec<String> {
    let mut again = Vec::new();
    for message in batch {
        match drain_one(intake, &message.body, invocation).await {
            Ok(applied) => tracing::info!(result = ?applied, "drained"),
            // It waits on the queue until the database is back, or in the dead letters for a person to see.
            Err(error) => {
                tracing::error!(error = %error, receive_count = message.receive_count, "a buffered event could not be applied");
                again.push(message.id);
            }
        }
    }
    again
}

async fn drain_one(intake: &Intake, body: &str, invocation: &Invocation) -> Result<Disposition> {
    let event = match serde_json::from_str(body)? {
        IntakeMessage::Report { source_id, attempt_id, dedupe_key, call, .. } => json!({
            "v": 1, "source": "reconcile", "source_id": source_id, "kind": "report", "attempt_id": attempt_id,
            "dedupe_key": dedupe_key, "verified": true, "headers": {}, "body": "", "call": call,
        }),
        IntakeMessage::Request { verified, received_at_ms, path, query, headers, body, recording, .. } => {
            let request = restore(path, query, headers, &body)?;
            match event_of(intake, &request, verified, received_at_ms, recording).await? {
                Some(mut event) => {
                    // Whoever was erased since is not brought back by what was told before.
                    event["received_at"] = json!(rfc3339(received_at_ms));
                    event
                }
                // Nobody was told that it was taken for good; a forgery leaves no row.
                None => return Ok(Disposition::Ignored),
            }
        }
    };
    apply_until(intake, &event, invocation.wait_until()).await
}

/// The event of a buffered request; `None` when it now proves to be forged, or for nobody. A signature is judged by the time at which
/// it came.
async fn event_of(
    intake: &Intake,
    request: &Request,
    verified: bool,
    received_at_ms: i64,
    recording: Option<Stored>,
) -> Result<Option<Value>> {
    let segments = request.segments();
    let event = match segments.as_slice() {
        [carrier, event, token] => {
            let callback = Callback::of(carrier, event, token)?;
            callbacks::drained(intake, &callback, request, verified, received_at_ms, APPLY_LIMIT).await
        }
        [name, id] => {
            let named = sources::find(name).zip(id.parse::<Uuid>().ok());
            let (source, id) = named.ok_or_else(|| Error::malformed("path", "a buffered request names no source"))?;
            let verified = verified.then_some(recording);
            drained(intake, source, id, request, verified, received_at_ms).await
        }
        _ => Err(Error::malformed("path", "a buffered request names no source")),
    };
    match event {
        Ok(event) => Ok(Some(event)),
        Err(error) if matches!(error.status.as_u16(), 403 | 404) => {
            tracing::warn!(error = %error, "a buffered request is dropped");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// What a buffered request of a source tells. Its settings are needed to read it, also where its signature was checked before, and where
/// sound that came with it is in Storage already.
async fn drained(
    intake: &Intake,
    source: &dyn sources::Source,
    id: Uuid,
    request: &Request,
    verified: Option<Option<Stored>>,
    received_at_ms: i64,
) -> Result<Value> {
    let verdict = if verified.is_some() {
        let known = |open: &sources::OpenSource| (open.provider == source.name()).then_some(true);
        pipeline::check(intake, id, APPLY_LIMIT, known).await?
    } else {
        Some(pipeline::verify(intake, source, id, request, received_at_ms, APPLY_LIMIT).await?)
    };
    match verdict {
        Some(Verdict::Signed(open)) => {
            let (request, recording) = match verified {
                Some(recording) => (Cow::Borrowed(request), recording),
                None => sound::set_aside(intake, source, &open, request).await?,
            };
            let mut events = pipeline::read(source, &open, &request);
            sound::attach(&mut events, recording.as_ref());
            Ok(apply_request(source.name(), id, &request, &events))
        }
        Some(Verdict::Unchecked) => Err(Error::unavailable("the source's secret still cannot be had")),
        None => Err(Error::bad_signature()),
    }
}

/// Applies an event, again and again while the database is away and the invocation lasts: it is stored under its key, once.
async fn apply_until(intake: &Intake, event: &Value, deadline: Instant) -> Result<Disposition> {
    let mut pause = Duration::from_millis(100);
    loop {
        match pipeline::apply(intake, event, APPLY_LIMIT).await {
            Err(error) if error.is_retryable() && Instant::now() + pause < deadline => {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(2));
            }
            result => return result,
        }
    }
}

/// Unix milliseconds as PostgreSQL reads a time; nothing for a message of before there was one.
fn rfc3339(ms: i64) -> Option<String> {
    (ms > 0).then(|| DateTime::from_timestamp_millis(ms))?.map(|at| at.to_rfc3339())
}

fn restore(path: String, query: String, headers: BTreeMap<String, String>, body: &str) -> Result<Request> {
    let headers: HeaderMap = headers
        .iter()
        .filter_map(|(name, value)| Some((HeaderName::try_from(name).ok()?, HeaderValue::from_str(value).ok()?)))
        .collect();
    let body = STANDARD.decode(body).map_err(|_| Error::malformed("body", "a buffered body is not base64"))?;
    Ok(Request { method: Method::POST, path, query, headers, body: body.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_comes_back_as_it_went() {
        let mut headers = HeaderMap::new();
        headers.insert("x-plivo-signature-v3-nonce", HeaderValue::from_static("n"));
        headers.insert("authorization", HeaderValue::from_static("secret"));
        let request = Request {
            method: Method::POST,
            path: "/functions/v1/webhook-intake/plivo/ring/t".to_owned(),
            query: "a=1".to_owned(),
            headers,
            body: b"CallUUID=\xff".to_vec().into(),
        };
        let text = message(&request, false, 7, None, |name| name.starts_with("x-plivo")).unwrap();
        assert!(!text.contains("secret"));
        let IntakeMessage::Request { verified, received_at_ms, path, query, headers, body, .. } =
            serde_json::from_str(&text).unwrap()
        else {
            panic!("another kind");
        };
        assert!(!verified && received_at_ms == 7);
        let back = restore(path, query, headers, &body).unwrap();
        assert_eq!((back.path, back.query, back.body), (request.path, request.query, request.body));
        assert_eq!(back.headers.len(), 1);
    }
}
