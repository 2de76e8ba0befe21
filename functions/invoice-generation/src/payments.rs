//! How an organization pays, as its people ask for it under their own JWT: a link, a charge by hand, a saved method. The database decides
//! whether they may; what a gateway has to be asked for is asked at once.

use crate::{Invoicing, collecting};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use shared::{
    Error, Result,
    http::{self as web, Request, Response},
    trigger::Invocation,
};
use uuid::Uuid;

fn invoice(id: &str) -> Result<Uuid> {
    id.parse().map_err(|_| Error::not_found("There is no such invoice, or it is not yours to see").at("id"))
}

/// `POST invoices/{id}/payment-link`: where the invoice is paid. Asked again it is the same one, while it is good.
pub async fn link(invoicing: &Invoicing, request: &Request, id: &str, invocation: &Invocation) -> Result<Response> {
    let (jwt, arguments) = (request.user_jwt()?, json!({ "invoice_id": invoice(id)? }));
    let mut link: Value = invoicing.supabase.call_as(jwt, "request_payment_link", &arguments).await?;
    if let Some(made) = made_now(invoicing, &link, invocation).await? {
        match made["outcome"].as_str() {
            Some("accepted") => {
                link["url"] = made["url"].clone();
                link["expires_at"] =
                    json!(made["expires_at"].as_i64().and_then(|at| chrono::DateTime::from_timestamp(at, 0)));
                link["state"] = json!("open");
            }
            Some("refused") => return Err(refused(&made)),
            _ => {}
        }
    }
    answer(&link)
}

/// `POST invoices/{id}/collect`: the saved method is charged, as soon as its rules allow.
pub async fn collect(invoicing: &Invoicing, request: &Request, id: &str, invocation: &Invocation) -> Result<Response> {
    let mut arguments = json!({ "invoice_id": invoice(id)? });
    keyed(&mut arguments, request);
    let charge: Value = invoicing.supabase.call_as(request.user_jwt()?, "collect_invoice", &arguments).await?;
    made_now(invoicing, &charge, invocation).await?;
    let mut response = web::json(&charge)?;
    *response.status_mut() = StatusCode::ACCEPTED;
    Ok(response)
}

#[derive(Debug, Deserialize, Serialize)]
struct Mandate {
    #[serde(skip_serializing_if = "Option::is_none")]
    gateway: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    method: Option<String>,
}

/// `POST payment-methods`: the page on which its holder agrees that a method is charged from now on.
pub async fn save(invoicing: &Invoicing, request: &Request, invocation: &Invocation) -> Result<Response> {
    let mut arguments = json!(request.json::<Mandate>()?);
    keyed(&mut arguments, request);
    let mut setup: Value = invoicing.supabase.call_as(request.user_jwt()?, "request_mandate", &arguments).await?;
    if let Some(made) = made_now(invoicing, &setup, invocation).await? {
        if made["outcome"] == "refused" {
            return Err(refused(&made));
        }
        setup["url"] = made["url"].clone();
    }
    answer(&setup)
}

/// `GET payment-methods`: what is saved, by what a person recognises it by.
pub async fn list(invoicing: &Invoicing, request: &Request) -> Result<Response> {
    let query = invoicing
        .supabase
        .from("payment_methods")
        .select("id,type,gateway,last4,brand,expiry_month,expiry_year,is_default,created_at")
        .order("is_default.desc,created_at.desc")
        .limit(100);
    let found: Value = invoicing.supabase.query_as(request.user_jwt()?, query).await?;
    web::json(&json!({ "payment_methods": found }))
}

/// `DELETE payment-methods/{id}`: it is charged no more, from now on; the gateway is told.
pub async fn forget(invoicing: &Invoicing, request: &Request, id: &str, invocation: &Invocation) -> Result<Response> {
    let id: Uuid =
        id.parse().map_err(|_| Error::not_found("There is no such payment method, or it is not yours").at("id"))?;
    let arguments = json!({ "payment_method_id": id });
    let gone: Value = invoicing.supabase.call_as(request.user_jwt()?, "forget_payment_method", &arguments).await?;
    made_now(invoicing, &gone, invocation).await?;
    web::json(&json!({ "removed": gone["removed"] }))
}

fn keyed(arguments: &mut Value, request: &Request) {
    if let Some(key) = request.header("idempotency-key") {
        arguments["idempotency_key"] = json!(key);
    }
}

/// Has the gateway asked now for what the database took down, unless it was already. If that fails, the schedule does it.
async fn made_now(invoicing: &Invoicing, row: &Value, invocation: &Invocation) -> Result<Option<Value>> {
    if !row["url"].is_null() {
        return Ok(None);
    }
    match row["id"].as_str().and_then(|id| id.parse().ok()) {
        Some(id) => collecting::run_one(invoicing, id, invocation).await,
        None => Ok(None),
    }
}

/// 200 with the page, or 202 while it is still being made: the same request again asks for it.
fn answer(row: &Value) -> Result<Response> {
    let mut response = web::json(row)?;
    if row["url"].is_null() {
        *response.status_mut() = StatusCode::ACCEPTED;
    }
    Ok(response)
}

fn refused(made: &Value) -> Error {
    tracing::error!(code = made["code"].as_str(), "the payment gateway refuses the request");
    Error::new(StatusCode::BAD_GATEWAY, "payment_gateway_refused", "the payment gateway does not take the request")
}
