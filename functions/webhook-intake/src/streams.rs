//! The sockets of voice agents: an agent's server says when one is opened, is still there, and is closed.
//!
//! The token that the carrier opened the socket with is what lets it: it names the call, and nobody else has it. By it the server also asks
//! whether the call may be transferred to a number, before it has that done.

use crate::Intake;
use http::{Method, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};
use shared::{
    Error, Result,
    http::{self as web, Request, Response},
    telephony::stream_token,
};
use uuid::Uuid;

/// What the agent's server calls the socket.
#[derive(Deserialize)]
struct Socket {
    connection_id: String,
}

/// Where the agent wants to hand the call to.
#[derive(Deserialize)]
struct Transfer {
    to: String,
}

/// `POST streams/{attempt}/{token}/{open|ping|close|transfer}`; `path` is what follows `streams`.
pub async fn route(intake: &Intake, request: &Request, path: &[&str]) -> Result<Response> {
    let (attempt, token, action) = match (&request.method, path) {
        (&Method::POST, [attempt, token, action @ ("open" | "ping" | "close" | "transfer")]) => {
            let attempt: Uuid =
                attempt.parse().map_err(|_| Error::malformed("attempt_id", "an attempt's id is a UUID"))?;
            (attempt, *token, *action)
        }
        (_, [_, _, "open" | "ping" | "close" | "transfer"]) => return Err(Error::method_not_allowed(&request.method)),
        _ => return Err(Error::not_found("there is no such route")),
    };
    let secrets = intake.secrets.get().await?;
    let not_after = stream_token::read(&secrets.callback_keys, attempt, token);
    // A socket lives longer than the token that opened it: of what is open, the token still says whose it is.
    let is_late = not_after.is_some_and(|not_after| action == "open" && chrono::Utc::now().timestamp() > not_after);
    if not_after.is_none() || is_late {
        let message = "the token is not one that was given out for this call, or it is over";
        return Err(Error::new(StatusCode::FORBIDDEN, "bad_token", message).at("token"));
    }
    if action == "transfer" {
        let Transfer { to } = request.json()?;
        let verdict: Value =
            intake.supabase.call("judge_transfer", &json!({ "v": 1, "attempt_id": attempt, "to": to })).await?;
        tracing::info!(attempt_id = %attempt, allowed = %verdict["allowed"], reason = %verdict["reason"], "a transfer is judged");
        return web::json(&verdict);
    }
    // One connection of one call is not another's.
    let Socket { connection_id } = request.json()?;
    let connection_id = format!("{attempt}/{connection_id}");
    let (function, body) = match action {
        "open" => (
            "open_websocket",
            json!({ "v": 1, "kind": "agent", "attempt_id": attempt, "connection_id": connection_id }),
        ),
        "ping" => ("ping_websockets", json!({ "v": 1, "connection_ids": [connection_id] })),
        _ => ("close_websocket", json!({ "v": 1, "connection_id": connection_id })),
    };
    let answer: Value = intake.supabase.call(function, &body).await?;
    tracing::info!(attempt_id = %attempt, action, "agent's socket");
    if action == "ping" {
        return web::json(&json!({ "gone": answer["gone"].as_array().is_some_and(|gone| !gone.is_empty()) }));
    }
    web::json(&answer)
}
