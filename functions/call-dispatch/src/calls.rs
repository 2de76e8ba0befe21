//! Single calls under the user's own JWT.

use crate::{Dispatch, dial::SealedAccount, release};
use http::{Method, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use shared::{
    Error, Result,
    http::{self as web, Request, Response},
    telephony::api,
};
use uuid::Uuid;

/// `POST calls`, `POST calls/{id}/{hangup|retry}`; `path` is what follows `calls`.
pub async fn route(dispatch: &Dispatch, request: &Request, path: &[&str]) -> Result<Response> {
    let jwt = request.user_jwt()?;
    match (&request.method, path) {
        (&Method::POST, []) => place(dispatch, jwt, &request.json()?).await,
        (&Method::POST, [id, "hangup"]) => hang_up(dispatch, jwt, id).await,
        (&Method::POST, [id, "retry"]) => {
            let answer: Value = dispatch.supabase.call_as(jwt, "retry_call", &json!({ "call_id": uuid(id)? })).await?;
            web::json_with(StatusCode::ACCEPTED, &answer)
        }
        (_, [] | [_, "hangup" | "retry"]) => Err(Error::method_not_allowed(&request.method)),
        _ => Err(Error::not_found("there is no such route")),
    }
}

fn uuid(id: &str) -> Result<Uuid> {
    id.parse().map_err(|_| Error::malformed("call_id", "a call's id is a UUID"))
}

/// Whom to call, and as which campaign would.
#[derive(Deserialize, Serialize)]
struct NewCall {
    campaign_id: Uuid,
    lead_id: Uuid,
}

/// Makes one call. The database has written the attempt down before the queue hears of it: if the message is lost, the next release
/// sends it.
async fn place(dispatch: &Dispatch, jwt: &str, call: &NewCall) -> Result<Response> {
    let answer: Value = dispatch.supabase.call_as(jwt, "place_call", call).await?;
    let text = |key: &str| answer[key].as_str().unwrap_or_default().to_owned();
    let attempt = release::Attempt {
        id: text("attempt_id"),
        organization_id: text("organization_id"),
        not_after: answer["not_after"].as_str().map(str::to_owned),
    };
    let sent = dispatch.queues.send(&dispatch.config, "dial", &[release::message(&attempt)]).await;
    match sent {
        Ok(refused) if refused.is_empty() => tracing::info!(attempt_id = attempt.id, "placed"),
        Ok(_) => tracing::warn!(attempt_id = attempt.id, "the queue did not take a call; the next release sends it"),
        Err(error) => {
            tracing::warn!(attempt_id = attempt.id, error = %error, "the queue is away; the next release sends the call");
        }
    }
    web::json_with(StatusCode::ACCEPTED, &answer)
}

/// What it takes to end a call.
#[derive(Deserialize)]
struct Hangup {
    provider_call_id: String,
    #[serde(flatten)]
    account: SealedAccount,
}

/// Ends a call that is under way. The user's own request decides and is recorded; the account's secrets are handed to the service
/// alone. How the call ended is told by the carrier, as of any call.
async fn hang_up(dispatch: &Dispatch, jwt: &str, id: &str) -> Result<Response> {
    let id = uuid(id)?;
    let answer: Value = dispatch.supabase.call_as(jwt, "hang_up_call", &json!({ "call_id": id })).await?;
    let request = json!({ "v": 1, "attempt_id": answer["attempt_id"] });
    let hangup: Hangup = dispatch.supabase.call("open_hangup", &request).await?;
    let secrets = dispatch.secrets.get().await?;
    let (carrier, account) = hangup.account.open(dispatch, &secrets)?;
    api::hang_up(carrier, &dispatch.http, &account, &hangup.provider_call_id).await?;
    tracing::info!(attempt_id = %id, provider = carrier.name(), "hung up");
    web::json_with(StatusCode::ACCEPTED, &answer)
}
