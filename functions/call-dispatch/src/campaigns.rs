//! Campaigns under the user's own JWT: the database checks permission, state and plan.

use crate::Dispatch;
use http::{Method, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use shared::{
    Error, Result,
    http::{self as web, Request, Response},
};
use uuid::Uuid;

/// What a user sends to create a campaign. `settings` is checked, key by key, where it is stored.
#[derive(Deserialize, Serialize)]
struct NewCampaign {
    name: String,
    #[serde(default)]
    project_id: Option<Uuid>,
    #[serde(default = "empty")]
    settings: Value,
}

fn empty() -> Value {
    json!({})
}

/// `POST campaigns`, `GET campaigns/{id}`, `POST campaigns/{id}/{start|schedule|pause|resume|cancel|complete|archive|restore|preview}`;
/// `path` is what follows `campaigns`.
pub async fn route(dispatch: &Dispatch, request: &Request, path: &[&str]) -> Result<Response> {
    let jwt = request.user_jwt()?;
    match (&request.method, path) {
        (&Method::POST, []) => {
            let campaign: NewCampaign = request.json()?;
            let created: Value = dispatch.supabase.call_as(jwt, "create_campaign", &campaign).await?;
            web::json_with(StatusCode::CREATED, &created)
        }
        (&Method::GET, [id]) => call(dispatch, jwt, "get_campaign", id).await,
        (&Method::POST, [id, action]) => {
            let function = match *action {
                "start" => "start_campaign",
                "schedule" => "schedule_campaign",
                "pause" => "pause_campaign",
                "resume" => "resume_campaign",
                "cancel" => "cancel_campaign",
                "complete" => "complete_campaign",
                "archive" => "archive_campaign",
                "restore" => "restore_campaign",
                "preview" => "preview_campaign",
                _ => return Err(Error::not_found("a campaign has no such action").at("action")),
            };
            call(dispatch, jwt, function, id).await
        }
        (_, [] | [_] | [_, _]) => Err(Error::method_not_allowed(&request.method)),
        _ => Err(Error::not_found("there is no such route")),
    }
}

async fn call(dispatch: &Dispatch, jwt: &str, function: &str, id: &str) -> Result<Response> {
    let id: Uuid = id.parse().map_err(|_| Error::malformed("campaign_id", "a campaign's id is a UUID"))?;
    let answer: Value = dispatch.supabase.call_as(jwt, function, &json!({ "campaign_id": id })).await?;
    web::json(&answer)
}
