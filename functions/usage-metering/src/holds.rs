//! Units that an organization's own system holds for what it is about to do, until the event tells what was used.
//!
//! A hold is named like the event that it is for: counting that event settles it. Who dies in between leaves a hold that is over by
//! itself.

use crate::Metering;
use http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use shared::{
    Error, Result,
    api_key::ApiKey,
    http::{self as web, Request, Response},
    trigger::Invocation,
};

/// Holds given back by one request.
const BATCH: u32 = 500;

/// What a hold says, or which one is meant; what is wrong with it is said by the database.
#[derive(Deserialize, Serialize)]
struct Wanted {
    #[serde(default)]
    source: Value,
    #[serde(default)]
    id: Value,
    #[serde(rename = "type", default)]
    kind: Value,
    #[serde(default)]
    quantity: Value,
    #[serde(default)]
    seconds: Value,
}

impl Wanted {
    /// As the database takes it. PostgreSQL stores no NUL in a text: such a text is none.
    fn of(request: &Request) -> Result<Value> {
        let key = ApiKey::of(request)?;
        let wanted: Self = request.json()?;
        let text =
            |value: Value| if value.as_str().is_some_and(|text| text.contains('\0')) { Value::Null } else { value };
        Ok(json!({
            "v": 1, "api_key": key, "source": text(wanted.source), "id": text(wanted.id), "type": text(wanted.kind),
            "quantity": wanted.quantity, "seconds": wanted.seconds,
        }))
    }
}

/// `POST usage/holds`: `{"source","id","type","quantity","seconds"?}` holds units of a meter, ten minutes where it is not said for how
/// long. Errors: 402 where the plan leaves no room, 409 for an id of other units or of an event that is counted, 422 for what is wrong.
pub async fn hold(metering: &Metering, request: &Request, invocation: &Invocation) -> Result<Response> {
    let wanted = Wanted::of(request)?;
    // The same again is the same hold, so a lost answer is asked for again.
    let held: Value = metering.supabase.call_until("hold_usage", &wanted, invocation.wait_until()).await?;
    web::json(&held)
}

/// `POST usage/holds/release`: `{"source","id"}` gives back what is held for an event that will not come, and says whether anything was.
pub async fn release(metering: &Metering, request: &Request, invocation: &Invocation) -> Result<Response> {
    let wanted = Wanted::of(request)?;
    if !wanted["source"].is_string() || !wanted["id"].is_string() {
        return Err(Error::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_id", "source and id name a hold").at("id"));
    }
    let released: Value = metering.supabase.call_until("release_usage_hold", &wanted, invocation.wait_until()).await?;
    web::json(&released)
}

#[derive(Deserialize)]
struct Expired {
    expired: u64,
    more: bool,
}

/// Gives back what was held for longer than was said, until nothing is left to do.
pub async fn expire(metering: &Metering, invocation: &Invocation) -> Result<Value> {
    let request = json!({ "v": 1, "limit": BATCH });
    let mut all = 0;
    loop {
        let done: Expired =
            metering.supabase.call_until("expire_usage_holds", &request, invocation.wait_until()).await?;
        all += done.expired;
        if !done.more {
            break;
        }
    }
    tracing::info!(expired = all, "holds that nobody settled are given back");
    Ok(json!({ "expired": all }))
}
