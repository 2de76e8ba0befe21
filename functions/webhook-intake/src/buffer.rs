//! The buffer: what the database could not take, kept on a queue and drained by the same function.

use crate::{
    Intake,
    pipeline::{self, Disposition, Verdict},
    sources::carriers::{Callback, METHOD, SIGNED_HEADERS},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use http::{HeaderMap, HeaderName, HeaderValue};
use serde_json::{Value, json};
use shared::{
    Error, Result,
    http::Request,
    queue::{IntakeMessage, VERSION},
    trigger::{Invocation, Message},
};
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

/// How long one event may take when drained.
const APPLY_LIMIT: Duration = Duration::from_secs(5);

/// A callback as it arrived, as a message's body.
pub fn keep(request: &Request, verdict: Verdict) -> Result<String> {
    let headers =
        SIGNED_HEADERS.iter().filter_map(|name| Some(((*name).to_owned(), request.header(name)?.to_owned()))).collect();
    IntakeMessage::Request {
        v: VERSION,
        verified: verdict == Verdict::Signed,
        path: request.path.clone(),
        query: request.query.clone(),
        headers,
        body: STANDARD.encode(&request.body),
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
        IntakeMessage::Request { verified, path, query, headers, body, .. } => {
            let request = restore(path, query, headers, &body)?;
            match event_of(intake, &request, verified).await? {
                Some(event) => event,
                // Nobody was told that it was taken for good; a forgery leaves no row.
                None => return Ok(Disposition::Ignored),
            }
        }
    };
    apply_until(intake, &event, invocation.wait_until()).await
}

/// The event of a buffered request; `None` when it now proves to be forged.
async fn event_of(intake: &Intake, request: &Request, verified: bool) -> Result<Option<Value>> {
    let segments = request.segments();
    let [carrier, event, token] = segments.as_slice() else {
        return Err(Error::malformed("path", "a buffered request names no source"));
    };
    let callback = Callback::of(carrier, event, token)?;
    let token = callback.open(&*intake.secrets.get().await?)?;
    if !verified {
        match pipeline::verify(intake, &callback, &token, request, APPLY_LIMIT).await {
            Ok(Verdict::Signed) => {}
            Ok(Verdict::Unchecked) => return Err(Error::unavailable("the account's secret still cannot be had")),
            Err(error) if error.status == http::StatusCode::FORBIDDEN => return Ok(None),
            Err(error) => return Err(error),
        }
    }
    Ok(Some(callback.event_of(&token, &request.headers, &request.form(), &request.body)))
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

fn restore(path: String, query: String, headers: BTreeMap<String, String>, body: &str) -> Result<Request> {
    let headers: HeaderMap = headers
        .iter()
        .filter_map(|(name, value)| Some((HeaderName::try_from(name).ok()?, HeaderValue::from_str(value).ok()?)))
        .collect();
    let body = STANDARD.decode(body).map_err(|_| Error::malformed("body", "a buffered body is not base64"))?;
    Ok(Request { method: METHOD, path, query, headers, body: body.into() })
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
            method: METHOD,
            path: "/functions/v1/webhook-intake/plivo/ring/t".to_owned(),
            query: "a=1".to_owned(),
            headers,
            body: b"CallUUID=\xff".to_vec().into(),
        };
        let text = keep(&request, Verdict::Unchecked).unwrap();
        assert!(!text.contains("secret"));
        let IntakeMessage::Request { verified, path, query, headers, body, .. } = serde_json::from_str(&text).unwrap()
        else {
            panic!("another kind");
        };
        assert!(!verified);
        let back = restore(path, query, headers, &body).unwrap();
        assert_eq!((back.path, back.query, back.body), (request.path, request.query, request.body));
        assert_eq!(back.headers.len(), 1);
    }
}
