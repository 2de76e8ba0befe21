//! What a user does with their organization's subscription, under their own JWT: the database decides whether they may, and does it.

use crate::Invoicing;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use shared::{
    Error, Result,
    http::{self as web, Request, Response},
};

/// Another plan, and when it holds. What is left out is left to the database.
#[derive(Debug, Deserialize, Serialize)]
pub struct Change {
    plan: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cycle: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timing: Option<String>,
}

impl Change {
    /// Whether a plan is named at all.
    pub fn is_one(&self) -> bool {
        self.plan.is_some()
    }
}

#[derive(Debug, Deserialize, Serialize)]
struct Cancellation {
    #[serde(skip_serializing_if = "Option::is_none")]
    timing: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

#[derive(Debug, Deserialize, Serialize)]
struct Coupon {
    code: String,
}

/// `GET subscriptions`: the live one, `null` without.
pub async fn show(invoicing: &Invoicing, request: &Request) -> Result<Response> {
    let found: Value = invoicing.supabase.call_as(request.user_jwt()?, "get_org_subscription", &json!({})).await?;
    web::json(&json!({ "subscription": found }))
}

/// `POST subscriptions/{change|cancel|pause|resume|coupon}`. Each names the state that is asked for, so that asking twice is asking once; under
/// an `Idempotency-Key` also when something else was asked in between.
pub async fn act(invoicing: &Invoicing, request: &Request, action: &str) -> Result<Response> {
    let jwt = request.user_jwt()?;
    let (function, mut arguments) = match action {
        "change" => {
            let change: Change = request.json()?;
            if !change.is_one() {
                return Err(Error::malformed("plan", "plan must be the slug of a plan"));
            }
            ("change_subscription", json!(change))
        }
        "cancel" => ("cancel_subscription", json!(request.json::<Cancellation>()?)),
        "pause" => ("pause_subscription", json!({})),
        "resume" => ("resume_subscription", json!({})),
        "coupon" => ("redeem_coupon", json!(request.json::<Coupon>()?)),
        _ => return Err(Error::not_found("there is no such route")),
    };
    if let Some(key) = request.header("idempotency-key") {
        arguments["idempotency_key"] = json!(key);
    }
    let answer: Value = invoicing.supabase.call_as(jwt, function, &arguments).await?;
    web::json(&answer)
}
