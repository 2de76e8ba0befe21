//! What an organization has used, for one of its users.

use crate::Metering;
use serde_json::{Value, json};
use shared::{
    Result,
    http::{self as web, Request, Response},
};

/// `GET usage`: the current billing period, meter by meter, under the user's own JWT. Errors: 401 without one, 403 without
/// `usage.view`.
pub async fn current(metering: &Metering, request: &Request) -> Result<Response> {
    let usage: Value = metering.supabase.call_as(request.user_jwt()?, "get_usage", &json!({})).await?;
    web::json(&usage)
}
