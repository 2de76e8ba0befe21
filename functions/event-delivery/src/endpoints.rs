//! Endpoints under the user's own JWT: the database checks permission and state. An endpoint's secret is made here, shown once, and
//! stored sealed for its row.

use crate::{Delivery, address};
use http::{Method, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};
use shared::{
    Error, Result,
    http::{self as web, Request, Response},
    seal::Sealer,
    standard_webhooks,
    supabase::Query,
};
use std::borrow::Cow;
use uuid::Uuid;

/// What is shown of an endpoint.
const ENDPOINT: &str =
    "id,url,description,events,enabled,disabled_reason,disabled_at,failing_since,created_by,created_at,updated_at";
/// What a list shows of a delivery.
const DELIVERY: &str = "id,endpoint_id,event_id,topic,status,attempts,next_attempt_at,last_attempt_at,response_status,response_body,\
                        duration_ms,error,delivered_at,created_at";
/// Deliveries a page, unless fewer are asked for.
const PAGE: usize = 100;

/// What a user sends to create an endpoint.
#[derive(Deserialize)]
struct NewEndpoint {
    url: String,
    #[serde(default)]
    events: Vec<String>,
    #[serde(default)]
    description: Option<String>,
}

/// What a user sends to change one: what is left out stays.
#[derive(Deserialize)]
struct Changes {
    url: Option<String>,
    events: Option<Vec<String>>,
    description: Option<String>,
}

/// Which events are sent again.
#[derive(Deserialize)]
struct Range {
    since: String,
    until: Option<String>,
}

/// `GET|POST endpoints`, `GET|PATCH|DELETE endpoints/{id}`, `GET endpoints/{id}/deliveries`,
/// `POST endpoints/{id}/{rotate|test|enable|disable|replay}`; `path` is what follows `endpoints`.
pub async fn route(delivery: &Delivery, request: &Request, path: &[&str]) -> Result<Response> {
    let jwt = request.user_jwt()?;
    match (&request.method, path) {
        (&Method::GET, []) => {
            let query = delivery.supabase.from("webhook_endpoints").select(ENDPOINT).order("created_at.desc,id");
            rows(delivery, jwt, query).await
        }
        (&Method::POST, []) => create(delivery, jwt, request).await,
        (&Method::GET, [id]) => show(delivery, jwt, id).await,
        (&Method::PATCH, [id]) => {
            let changes: Changes = request.json()?;
            if let Some(url) = &changes.url {
                address::read_url(url, delivery.sender.is_local())?;
            }
            let arguments = json!({
                "endpoint_id": endpoint(id)?, "url": changes.url, "events": changes.events, "description": changes.description,
            });
            call(delivery, jwt, "update_webhook_endpoint", &arguments).await
        }
        (&Method::DELETE, [id]) => {
            call(delivery, jwt, "delete_webhook_endpoint", &json!({ "endpoint_id": endpoint(id)? })).await
        }
        (&Method::GET, [id, "deliveries"]) => log(delivery, jwt, request, id).await,
        (&Method::POST, [id, action]) => act(delivery, jwt, request, endpoint(id)?, action).await,
        (_, [] | [_] | [_, _]) => Err(Error::method_not_allowed(&request.method)),
        _ => Err(Error::not_found("there is no such route")),
    }
}

/// `GET deliveries/{id}`, `POST deliveries/{id}/replay`; `path` is what follows `deliveries`.
pub async fn deliveries(delivery: &Delivery, request: &Request, path: &[&str]) -> Result<Response> {
    let jwt = request.user_jwt()?;
    let (function, id) = match (&request.method, path) {
        (&Method::GET, [id]) => ("get_event_delivery", id),
        (&Method::POST, [id, "replay"]) => ("replay_delivery", id),
        (_, [_] | [_, "replay"]) => return Err(Error::method_not_allowed(&request.method)),
        _ => return Err(Error::not_found("there is no such route")),
    };
    call(delivery, jwt, function, &json!({ "delivery_id": uuid("delivery_id", id)? })).await
}

async fn act(delivery: &Delivery, jwt: &str, request: &Request, id: Uuid, action: &str) -> Result<Response> {
    match action {
        "rotate" => {
            let (secret, sealed) = new_secret(delivery, id).await?;
            let arguments = json!({ "endpoint_id": id, "secret_sealed": sealed });
            let mut rotated: Value = delivery.supabase.call_as(jwt, "rotate_webhook_secret", &arguments).await?;
            rotated["secret"] = json!(secret);
            web::json(&rotated)
        }
        "test" => call(delivery, jwt, "test_webhook_endpoint", &json!({ "endpoint_id": id })).await,
        "enable" | "disable" => {
            let arguments = json!({ "endpoint_id": id, "enabled": action == "enable" });
            call(delivery, jwt, "set_webhook_endpoint", &arguments).await
        }
        "replay" => {
            let range: Range = request.json()?;
            let arguments = json!({ "endpoint_id": id, "since": range.since, "until": range.until });
            call(delivery, jwt, "replay_deliveries", &arguments).await
        }
        _ => Err(Error::not_found("an endpoint has no such action").at("action")),
    }
}

async fn create(delivery: &Delivery, jwt: &str, request: &Request) -> Result<Response> {
    let new: NewEndpoint = request.json()?;
    address::read_url(&new.url, delivery.sender.is_local())?;
    // The secret is sealed for its row, so the row's id is made here too.
    let id = Uuid::new_v4();
    let (secret, sealed) = new_secret(delivery, id).await?;
    let arguments = json!({
        "endpoint_id": id, "url": new.url, "events": new.events, "description": new.description, "secret_sealed": sealed,
    });
    let mut created: Value = delivery.supabase.call_as(jwt, "create_webhook_endpoint", &arguments).await?;
    created["secret"] = json!(secret);
    web::json_with(StatusCode::CREATED, &created)
}

/// A secret, as its owner is shown it and as it is stored.
async fn new_secret(delivery: &Delivery, id: Uuid) -> Result<(String, String)> {
    let secret = standard_webhooks::new_secret();
    let sealed = Sealer::new(&delivery.secrets.get().await?.seal_keys)?.seal(&secret, &id.to_string())?;
    Ok((secret, sealed))
}

async fn show(delivery: &Delivery, jwt: &str, id: &str) -> Result<Response> {
    let query = delivery.supabase.from("webhook_endpoints").select(ENDPOINT).eq("id", endpoint(id)?.to_string());
    let mut found: Vec<Value> = delivery.supabase.query_as(jwt, query).await?;
    let endpoint = found.pop().ok_or_else(|| Error::not_found("there is no such endpoint").at("endpoint_id"))?;
    web::json(&endpoint)
}

/// The newest deliveries first; `?status=`, `?before=` (a delivery's id) and `?limit=` narrow the list.
async fn log(delivery: &Delivery, jwt: &str, request: &Request, id: &str) -> Result<Response> {
    let mut query = delivery
        .supabase
        .from("event_deliveries")
        .select(DELIVERY)
        .eq("endpoint_id", endpoint(id)?.to_string())
        .order("id.desc");
    let mut limit = PAGE;
    for (name, value) in url::form_urlencoded::parse(request.query.as_bytes()) {
        query = match name.as_ref() {
            "status" => query.eq("status", status(value)?),
            "before" => query.lt("id", uuid("before", &value)?.to_string()),
            "limit" => {
                let wanted: usize = value.parse().map_err(|_| Error::malformed("limit", "a limit is a number"))?;
                limit = wanted.clamp(1, PAGE);
                query
            }
            _ => query,
        };
    }
    rows(delivery, jwt, query.limit(limit)).await
}

fn status(value: Cow<'_, str>) -> Result<Cow<'_, str>> {
    match value.as_ref() {
        "pending" | "delivered" | "failed" | "dead" => Ok(value),
        _ => Err(Error::malformed("status", "a status is pending, delivered, failed or dead")),
    }
}

async fn rows(delivery: &Delivery, jwt: &str, query: Query) -> Result<Response> {
    let rows: Vec<Value> = delivery.supabase.query_as(jwt, query).await?;
    web::json(&rows)
}

async fn call(delivery: &Delivery, jwt: &str, function: &str, arguments: &Value) -> Result<Response> {
    let answer: Value = delivery.supabase.call_as(jwt, function, arguments).await?;
    web::json(&answer)
}

fn endpoint(id: &str) -> Result<Uuid> {
    uuid("endpoint_id", id)
}

fn uuid(field: &str, text: &str) -> Result<Uuid> {
    text.parse().map_err(|_| Error::malformed(field, "an id is a UUID"))
}
