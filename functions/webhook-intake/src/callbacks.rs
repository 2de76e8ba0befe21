//! Carriers' callbacks, on the pipeline of all sources: the token in the path is verified too, an answered callee waits for nothing, and
//! a caller not for long.

use crate::{
    Intake, buffer,
    pipeline::{self, APPLY_LIMIT, Disposition, Verdict},
    sources::{
        self,
        carriers::{Callback, Opened},
    },
};
use http::StatusCode;
use serde::Deserialize;
use serde_json::Value;
use shared::{
    Error, Result,
    http::{self as web, Request, Response},
    telephony::{CallbackEvent, carrier::Document},
};
use std::time::Duration;
use uuid::Uuid;

/// How long an answered callee may wait for the database: the event is a hint, the document needs no database.
const HINT_LIMIT: Duration = Duration::from_millis(150);
/// How long the queue may take to keep such a hint.
const HINT_QUEUE_LIMIT: Duration = Duration::from_millis(100);
/// How long somebody who calls us may wait for the database, which knows whose number it is.
const INBOUND_LIMIT: Duration = Duration::from_millis(1_500);

/// What a callback is about, once its URL is proved to be ours.
struct Subject {
    account: Uuid,
    attempt: Option<Uuid>,
}

/// Receives one callback. Errors: 403 for a token or signature that is not right, 503 when neither database nor queue takes it.
pub async fn receive(intake: &Intake, callback: &Callback, request: &Request) -> Result<Response> {
    if callback.event == CallbackEvent::Inbound {
        return called(intake, callback, request).await;
    }
    let secrets = intake.secrets.get().await?;
    let token = callback.open(&secrets)?;
    let span = tracing::Span::current();
    span.record("attempt_id", tracing::field::display(token.attempt_id));
    let subject = Subject { account: token.carrier_account_id, attempt: Some(token.attempt_id) };
    let is_answer = callback.event == CallbackEvent::Answer;
    let limit = if is_answer { HINT_LIMIT } else { APPLY_LIMIT };
    let now_ms = chrono::Utc::now().timestamp_millis();
    let is_signed = verify(intake, callback, subject.account, request, now_ms, limit).await?;
    if is_answer {
        let document = callback.answer_document(&token, request, &secrets, &intake.config, now_ms / 1_000);
        offer(intake, callback, &subject, request, is_signed).await;
        return answer(document);
    }
    let applied = take(intake, callback, &subject, request, is_signed).await?;
    if callback.event == CallbackEvent::Dial {
        // The end of a transfer is the end of what the carrier had to do: it asks what comes next, and nothing does.
        return answer(callback.nothing());
    }
    pipeline::answer(applied)
}

/// Somebody calls one of our numbers, or such a call goes on or ends: the carriers have one URL for all of it.
async fn called(intake: &Intake, callback: &Callback, request: &Request) -> Result<Response> {
    let subject = Subject { account: callback.account()?, attempt: None };
    let wants_document = callback.wants_document(request);
    let limit = if wants_document { INBOUND_LIMIT } else { APPLY_LIMIT };
    let now_ms = chrono::Utc::now().timestamp_millis();
    let began = tokio::time::Instant::now();
    let is_signed = verify(intake, callback, subject.account, request, now_ms, limit).await?;
    if !wants_document {
        let applied = take(intake, callback, &subject, request, is_signed).await?;
        return pipeline::answer(applied);
    }
    let opened = if is_signed {
        let event = sources::without_nul(callback.event_of(subject.account, None, request));
        let left = limit.saturating_sub(began.elapsed());
        intake.supabase.call_within::<Answer>("open_inbound_call", &event, left).await
    } else {
        Err(Error::unavailable("the account's secret could not be had"))
    };
    let secrets = intake.secrets.get().await?;
    answer(match opened {
        Ok(Answer { call: Some(opened), .. }) => {
            tracing::Span::current().record("attempt_id", tracing::field::display(opened.attempt_id));
            callback.inbound_document(&opened, &secrets, &intake.config, now_ms / 1_000)
        }
        Ok(Answer { call: None, result }) => {
            tracing::warn!(
                carrier = callback.carrier.name(),
                ?result,
                "a call to a number that is nobody's, or that is over"
            );
            callback.sorry()
        }
        Err(error) => {
            tracing::error!(error = %error, carrier = callback.carrier.name(), "a call to us could not be taken down");
            let kept = keep(intake, &subject, request, is_signed, callback);
            if !matches!(tokio::time::timeout(HINT_QUEUE_LIMIT, kept).await, Ok(Ok(()))) {
                tracing::error!("neither database nor queue took the call down");
            }
            callback.sorry()
        }
    })
}

#[derive(Deserialize)]
struct Answer {
    result: Disposition,
    #[serde(default)]
    call: Option<Opened>,
}

fn answer(document: Document) -> Result<Response> {
    web::text(StatusCode::OK, document.content_type, document.body)
}

/// Applies a callback, or puts it on the buffer. Error 503 when neither takes it.
async fn take(
    intake: &Intake,
    callback: &Callback,
    subject: &Subject,
    request: &Request,
    is_signed: bool,
) -> Result<Disposition> {
    let applied = if is_signed {
        let event = callback.event_of(subject.account, subject.attempt, request);
        pipeline::apply(intake, &event, APPLY_LIMIT).await
    } else {
        Err(Error::unavailable("the account's secret could not be had"))
    };
    match applied {
        Ok(applied) => Ok(applied),
        Err(error) => {
            tracing::warn!(error = %error, "the database did not take the event; it goes to the buffer");
            keep(intake, subject, request, is_signed, callback).await?;
            Ok(Disposition::Buffered)
        }
    }
}

/// The event of a buffered callback. Error 403 when it now proves to be forged. A signature is judged by the time at which it came.
pub async fn drained(
    intake: &Intake,
    callback: &Callback,
    request: &Request,
    verified: bool,
    received_at_ms: i64,
    limit: Duration,
) -> Result<Value> {
    let (account, attempt) = match callback.event {
        CallbackEvent::Inbound => (callback.account()?, None),
        _ => {
            let token = callback.open(&*intake.secrets.get().await?)?;
            (token.carrier_account_id, Some(token.attempt_id))
        }
    };
    if !verified && !verify(intake, callback, account, request, received_at_ms, limit).await? {
        return Err(Error::unavailable("the account's secret still cannot be had"));
    }
    Ok(callback.event_of(account, attempt, request))
}

/// Verifies the carrier's signature against the account that the URL names; false where its secret cannot be had.
async fn verify(
    intake: &Intake,
    callback: &Callback,
    account: Uuid,
    request: &Request,
    now_ms: i64,
    limit: Duration,
) -> Result<bool> {
    let (origin, carrier) = (&intake.config.public_origin, callback.carrier.name());
    let verdict = pipeline::check(intake, account, limit, |open| {
        (open.provider == carrier).then(|| callback.is_signed(open, origin, request, now_ms / 1_000))
    });
    match verdict.await {
        Ok(Some(Verdict::Signed(_))) => Ok(true),
        Ok(Some(Verdict::Unchecked)) => Ok(false),
        // An account that is not there is no secret to a stranger who made up a token; there is none to tell apart.
        Ok(None) => Err(refused(callback)),
        Err(error) if error.status == StatusCode::NOT_FOUND => Err(refused(callback)),
        Err(error) => Err(error),
    }
}

fn refused(callback: &Callback) -> Error {
    tracing::warn!(carrier = callback.carrier.name(), "a callback's signature does not match");
    // The first header beside the content type carries the signature.
    Error::bad_signature().at(callback.carrier.signed_headers().get(1).copied().unwrap_or("signature"))
}

/// Offers an answer event to the database, else to the queue, within what an answered callee can wait. Losing it loses nothing: the
/// hang-up and the carrier's record carry the answer time.
async fn offer(intake: &Intake, callback: &Callback, subject: &Subject, request: &Request, is_signed: bool) {
    if is_signed {
        let event = callback.event_of(subject.account, subject.attempt, request);
        if pipeline::apply(intake, &event, HINT_LIMIT).await.is_ok() {
            return;
        }
    }
    if tokio::time::timeout(HINT_QUEUE_LIMIT, keep(intake, subject, request, is_signed, callback)).await.is_err() {
        tracing::warn!("neither database nor queue took the answer event in time");
    }
}

async fn keep(
    intake: &Intake,
    subject: &Subject,
    request: &Request,
    verified: bool,
    callback: &Callback,
) -> Result<()> {
    let now_ms = chrono::Utc::now().timestamp_millis();
    // A signature that was checked need not be kept; one that is a token for the carrier's own use must not be.
    let message = buffer::message(request, verified, now_ms, None, |header| {
        callback.carrier.signed_headers().contains(&header) && !(verified && header == "authorization")
    })?;
    pipeline::keep(intake, subject.account.to_string(), message).await
}
