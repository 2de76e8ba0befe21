//! Single calls under the user's own JWT.

use crate::{Dispatch, dial::SealedAccount};
use http::{Method, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};
use shared::{
    Error, Result,
    http::{self as web, Request, Response},
    telephony::api,
};
use uuid::Uuid;

/// `POST calls/{id}/hangup`; `path` is what follows `calls`.
pub async fn route(dispatch: &Dispatch, request: &Request, path: &[&str]) -> Result<Response> {
    let jwt = request.user_jwt()?;
    match (&request.method, path) {
        (&Method::POST, [id, "hangup"]) => hang_up(dispatch, jwt, id).await,
        (_, [_, "hangup"]) => Err(Error::method_not_allowed(&request.method)),
        _ => Err(Error::not_found("there is no such route")),
    }
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
    let id: Uuid = id.parse().map_err(|_| Error::malformed("call_id", "a call's id is a UUID"))?;
    let answer: Value = dispatch.supabase.call_as(jwt, "hang_up_call", &json!({ "call_id": id })).await?;
    let request = json!({ "v": 1, "attempt_id": answer["attempt_id"] });
    let hangup: Hangup = dispatch.supabase.call("open_hangup", &request).await?;
    let secrets = dispatch.secrets.get().await?;
    let (carrier, account) = hangup.account.open(dispatch, &secrets)?;
    api::hang_up(carrier, &dispatch.http, &account, &hangup.provider_call_id).await?;
    tracing::info!(attempt_id = %id, provider = carrier.name(), "hung up");
    web::json_with(StatusCode::ACCEPTED, &answer)
}
