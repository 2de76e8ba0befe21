//! A link to the page of usage that a browser can follow without a JWT: from an e-mail, or from a button.

use crate::{
    Metering,
    usage::{self, Daily, Usage},
};
use chrono::{DateTime, Utc};
use serde::Deserialize;
use serde_json::json;
use shared::{
    Error, Result,
    http::{self as web, Request, Response},
    signed_link,
};
use uuid::Uuid;

/// How long a link is good.
const LINK_SECONDS: i64 = 15 * 60;
/// What it is signed for: the page, and not what else may be linked to one day.
const PURPOSE: &str = "usage.html";

/// What the page shows, as `open_usage` gives it.
#[derive(Deserialize)]
struct Opened {
    usage: Usage,
    daily: Daily,
}

/// Whose usage the caller sees.
#[derive(Deserialize)]
struct Seen {
    organization_id: Uuid,
}

/// `POST usage/link`: an address of the page that is good for fifteen minutes, for whoever it is given to. Errors: 401 without a JWT, 403
/// without `usage.view`: who may not see it is given no link to it.
pub async fn make(metering: &Metering, request: &Request) -> Result<Response> {
    let seen: Seen = metering.supabase.call_as(request.user_jwt()?, "get_usage", &json!({})).await?;
    let organization = seen.organization_id;
    let secrets = metering.secrets.get().await?;
    let not_after = Utc::now().timestamp() + LINK_SECONDS;
    let token = signed_link::sign(&secrets.callback_keys, PURPOSE, organization, not_after)
        .ok_or_else(|| Error::internal("there is no key to sign links with"))?;
    web::json(&json!({
        "url": format!("{}/functions/v1/usage-metering/usage/{organization}.html?t={token}", metering.public_origin),
        "expires_at": DateTime::from_timestamp(not_after, 0),
    }))
}

/// `GET usage/{organization}.html?t=`: the page by a link. Errors: 403 for one that was not given out for it, or is over.
pub async fn open(metering: &Metering, request: &Request, name: &str) -> Result<Response> {
    let organization: Uuid = name
        .strip_suffix(".html")
        .and_then(|id| id.parse().ok())
        .ok_or_else(|| Error::not_found("there is no such page"))?;
    let token = request.query_pairs().into_iter().find(|(name, _)| name == "t").map(|(_, token)| token);
    let secrets = metering.secrets.get().await?;
    let now = Utc::now().timestamp();
    signed_link::verify(&secrets.callback_keys, PURPOSE, organization, &token.unwrap_or_default(), now)?;
    let opened: Opened =
        metering.supabase.call("open_usage", &json!({ "v": 1, "organization_id": organization })).await?;
    usage::shown(&opened.usage, &opened.daily)
}
