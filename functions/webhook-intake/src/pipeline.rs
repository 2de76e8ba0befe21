//! From a request to an applied event: verify, then one database call, else the buffer, else 503.

use crate::{Intake, buffer, sources::carriers::Callback};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use shared::{
    Error, Result,
    http::{self as web, Request, Response},
    queue::Outgoing,
    seal::Sealer,
    telephony::{CallbackEvent, token::CallbackToken},
};
use std::time::Duration;
use uuid::Uuid;

/// How long the database may be silent before an event goes to the buffer.
const APPLY_LIMIT: Duration = Duration::from_secs(2);
/// How long an answered callee may wait for the database: the event is a hint, the document needs no database.
const HINT_LIMIT: Duration = Duration::from_millis(150);
/// How long the queue may take to keep such a hint.
const HINT_QUEUE_LIMIT: Duration = Duration::from_millis(100);

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
}

/// Whether the carrier's signature could be checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is right.
    Signed,
    /// The account's secret could not be had; the token in the URL is right.
    Unchecked,
}

/// Receives one callback. Errors: 403 for a token or signature that is not right, 503 when neither database nor queue takes it.
pub async fn receive(intake: &Intake, callback: &Callback, request: &Request) -> Result<Response> {
    let secrets = intake.secrets.get().await?;
    let token = callback.open(&secrets)?;
    let span = tracing::Span::current();
    span.record("attempt_id", tracing::field::display(token.attempt_id));
    let is_answer = callback.event == CallbackEvent::Answer;
    let limit = if is_answer { HINT_LIMIT } else { APPLY_LIMIT };
    let verdict = verify(intake, callback, &token, request, limit).await?;
    let form = request.form();
    if is_answer {
        let now = chrono::Utc::now().timestamp();
        let document = callback.answer_document(&token, &form, &secrets, &intake.config, now);
        offer(intake, callback, &token, request, verdict).await;
        return web::text(StatusCode::OK, "application/xml", document);
    }
    let applied = match verdict {
        Verdict::Signed => {
            let event = callback.event_of(&token, &request.headers, &form, &request.body);
            apply(intake, &event, APPLY_LIMIT).await
        }
        Verdict::Unchecked => Err(Error::unavailable("the account's secret could not be had")),
    };
    let applied = match applied {
        Ok(applied) => applied,
        Err(error) => {
            tracing::warn!(error = %error, "the database did not take the event; it goes to the buffer");
            keep(intake, &token, request, verdict).await?;
            Disposition::Buffered
        }
    };
    reply(applied)
}

/// Verifies the carrier's signature against the account that the token names.
pub async fn verify(
    intake: &Intake,
    callback: &Callback,
    token: &CallbackToken,
    request: &Request,
    limit: Duration,
) -> Result<Verdict> {
    for looked_again in [false, true] {
        let account = match intake.accounts.get(&intake.supabase, token.carrier_account_id, limit).await {
            Ok(account) => account,
            Err(error) => {
                tracing::warn!(error = %error, "the account's secret could not be had; the event is kept unverified");
                return Ok(Verdict::Unchecked);
            }
        };
        if !account.found || account.provider != callback.carrier {
            return Err(Error::bad_signature());
        }
        let sealer = Sealer::new(&intake.secrets.get().await?.seal_keys)?;
        let auth_token = sealer.open(&account.auth_token_sealed, &token.carrier_account_id.to_string())?;
        if callback.is_signed(auth_token, &intake.config.public_origin, request) {
            return Ok(Verdict::Signed);
        }
        if looked_again || !intake.accounts.forget(token.carrier_account_id).await {
            break;
        }
    }
    tracing::warn!(carrier = callback.carrier, "a callback's signature does not match");
    Err(Error::bad_signature().at("x-plivo-signature-v3"))
}

/// Stores and applies an event: one request.
pub async fn apply(intake: &Intake, event: &Value, limit: Duration) -> Result<Disposition> {
    let answer: Answer = intake.supabase.call_within("apply_event", event, limit).await?;
    if let Some(organization) = answer.organization_id {
        tracing::Span::current().record("organization_id", tracing::field::display(organization));
    }
    tracing::debug!(kind = event["kind"].as_str(), result = ?answer.result, "event");
    Ok(answer.result)
}

/// Offers an answer event to the database, else to the queue, within what an answered callee can wait. Losing it loses nothing: the
/// hang-up and the carrier's record carry the answer time.
async fn offer(intake: &Intake, callback: &Callback, token: &CallbackToken, request: &Request, verdict: Verdict) {
    if verdict == Verdict::Signed {
        let event = callback.event_of(token, &request.headers, &request.form(), &request.body);
        if apply(intake, &event, HINT_LIMIT).await.is_ok() {
            return;
        }
    }
    if tokio::time::timeout(HINT_QUEUE_LIMIT, keep(intake, token, request, verdict)).await.is_err() {
        tracing::warn!("neither database nor queue took the answer event in time");
    }
}

/// Puts the raw request on the buffer. Error 503 when the queue refuses too.
async fn keep(intake: &Intake, token: &CallbackToken, request: &Request, verdict: Verdict) -> Result<()> {
    let message = Outgoing { group: token.carrier_account_id.to_string(), body: buffer::keep(request, verdict)? };
    let refused = intake.queues.send(&intake.config, "intake", &[message]).await?;
    if refused.is_empty() {
        Ok(())
    } else {
        Err(Error::unavailable("neither the database nor the buffer takes the event"))
    }
}

fn reply(applied: Disposition) -> Result<Response> {
    match applied {
        // 2xx, since sending it again would change nothing; the body says what is wrong with it.
        Disposition::Orphan => web::json_with(
            StatusCode::ACCEPTED,
            &serde_json::json!({
                "result": applied,
                "code": "unknown_attempt",
                "message": "the event is kept; its attempt is not known here, or is bound to another call",
                "details": { "field": "attempt_id" },
                "hint": null,
            }),
        ),
        Disposition::Buffered => web::json_with(StatusCode::ACCEPTED, &serde_json::json!({ "result": applied })),
        _ => web::json(&serde_json::json!({ "result": applied })),
    }
}
