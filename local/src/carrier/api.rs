//! Plivo's HTTP API, as much of it as a dialler and a reconciler use.

use super::{
    Account, World,
    call::{Book, Call, Detection, Dialect, Hook, Request, Stage, digits},
    faults::Fault,
    outcome, play, sound, telnyx, twilio, vonage,
};
use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{Path, Query, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use base64::{Engine, engine::general_purpose::STANDARD};
use chrono::{DateTime, NaiveDateTime, Utc};
use serde_json::{Value, json};
use std::{collections::HashMap, sync::Arc, time::Duration};
use tokio::sync::Notify;
use url::Url;
use uuid::Uuid;

/// Results a page at most, as at Plivo.
const PAGE: usize = 20;

pub(super) fn router(world: Arc<World>) -> Router {
    Router::new()
        .route("/v1/Account/{auth_id}/Call/", get(list).post(create))
        .route("/v1/Account/{auth_id}/Call/{call_uuid}/", get(one).delete(hang_up))
        .merge(twilio::router())
        .merge(telnyx::router())
        .merge(vonage::router())
        .route("/recordings/{auth_id}/{file}", get(sound::recording))
        .fallback(async || error(StatusCode::NOT_FOUND, "not found"))
        .with_state(world)
}

/// An error as Plivo writes it.
fn error(status: StatusCode, message: &str) -> Response {
    (status, Json(json!({"api_id": Uuid::new_v4(), "error": message}))).into_response()
}

pub(super) type Params = HashMap<String, String>;

/// The token that came along.
pub(super) fn bearer(headers: &HeaderMap) -> Option<&str> {
    headers.get(header::AUTHORIZATION)?.to_str().ok()?.strip_prefix("Bearer ")
}

/// One of the secrets that an account's token is made of.
pub(super) fn secret(auth_token: &str, name: &str) -> Option<String> {
    serde_json::from_str::<Value>(auth_token).ok()?[name].as_str().map(str::to_owned)
}

/// The account whose credentials came along, if it is the one in the path.
pub(super) fn authenticate(world: &World, auth_id: &str, headers: &HeaderMap) -> Result<Account, Box<Response>> {
    let credentials = headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.strip_prefix("Basic "))
        .and_then(|value| STANDARD.decode(value.trim()).ok())
        .and_then(|bytes| String::from_utf8(bytes).ok());
    let pair = credentials.as_deref().and_then(|text| text.split_once(':'));
    match (world.account(auth_id), pair) {
        (Some(account), Some((user, token))) if user == account.auth_id && token == account.auth_token => Ok(account),
        _ => Err(Box::new(error(
            StatusCode::UNAUTHORIZED,
            "Could not verify your access level for that URL. You have to login with proper credentials",
        ))),
    }
}

async fn create(
    State(world): State<Arc<World>>,
    Path(auth_id): Path<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let account = match authenticate(&world, &auth_id, &headers) {
        Ok(account) => account,
        Err(response) => return *response,
    };
    let refuse = |status: StatusCode, message: &str, to: Option<&str>| {
        world
            .note(json!({"event": "refused", "at": Utc::now(), "to": to, "status": status.as_u16(), "error": message}));
        error(status, message)
    };
    let request = match parameters(&headers, &body).and_then(|params| request(&account, &params)) {
        Ok(request) => request,
        Err(message) => return refuse(StatusCode::BAD_REQUEST, &message, None),
    };
    let callee = digits(&request.to);
    let compliance = "Outbound calls are refused: the compliance application is not in 'accepted' status";
    match take(&world, &account, request).await {
        Taken::Call(uuid) => {
            let fired = json!({"api_id": Uuid::new_v4(), "message": "call fired", "request_uuid": uuid});
            (StatusCode::CREATED, Json(fired)).into_response()
        }
        Taken::CutOff => cut_off(),
        Taken::Trouble(trouble) => {
            let (status, message) = match trouble {
                Trouble::Throttle => (StatusCode::TOO_MANY_REQUESTS, "Too many requests, rate limited"),
                Trouble::Refuse => (StatusCode::BAD_REQUEST, compliance),
                Trouble::Fail => (StatusCode::INTERNAL_SERVER_ERROR, "Internal server error"),
                Trouble::Full => (StatusCode::FORBIDDEN, "Concurrency Limit Breached"),
            };
            refuse(status, message, Some(&callee))
        }
    }
}

/// What becomes of a request for a call.
pub(super) enum Taken {
    /// It is made, and the answer says so.
    Call(Uuid),
    /// It is made, and the answer is lost.
    CutOff,
    /// It is not made; or it is, and the answer lies ([`Trouble::Fail`]).
    Trouble(Trouble),
}

/// Why a request for a call is answered with an error.
pub(super) enum Trouble {
    /// Too many requests.
    Throttle,
    /// The account may not make it.
    Refuse,
    /// The carrier is broken.
    Fail,
    /// The account has as many calls as it may.
    Full,
}

/// Takes a request for a call, with all that may go wrong.
pub(super) async fn take(world: &Arc<World>, account: &Account, request: Request) -> Taken {
    let callee = digits(&request.to);
    let asked = world.book().ask(&callee);
    let strikes = |fault| world.faults.strikes(fault, world.options.seed, &[&callee, &asked.to_string()]);
    if strikes(Fault::Throttle) {
        return Taken::Trouble(Trouble::Throttle);
    }
    if strikes(Fault::Refuse) {
        return Taken::Trouble(Trouble::Refuse);
    }
    if strikes(Fault::Fail) {
        return Taken::Trouble(Trouble::Fail);
    }
    let Some(uuid) = accept(world, account, request) else { return Taken::Trouble(Trouble::Full) };
    if strikes(Fault::SlowResponse) {
        tokio::time::sleep(Duration::from_millis(world.faults.get().response_delay_ms)).await;
    }
    if strikes(Fault::LoseResponse) {
        return Taken::CutOff;
    }
    if strikes(Fault::Lie) { Taken::Trouble(Trouble::Fail) } else { Taken::Call(uuid) }
}

/// An answer that breaks off after its headers.
pub(super) fn cut_off() -> Response {
    let cut = futures::stream::once(async { Err::<Bytes, _>(std::io::Error::other("the line is cut")) });
    let lost = Response::builder().status(StatusCode::CREATED).header(header::CONTENT_TYPE, "application/json");
    lost.body(Body::from_stream(cut)).unwrap_or_default()
}

/// Enters a call in the book and starts it; none when the account has as many calls as it may.
fn accept(world: &Arc<World>, account: &Account, request: Request) -> Option<Uuid> {
    let uuid = Uuid::new_v4();
    let callee = digits(&request.to);
    let line = {
        let mut book = world.book();
        if account.max_concurrent_calls.is_some_and(|limit| book.live(&account.auth_id).count() >= limit) {
            return None;
        }
        let nth = book.dial(&callee);
        let call = Call {
            uuid,
            auth_id: account.auth_id.clone(),
            fate: outcome::fate(world.options.seed, &world.options.mix, &callee, nth),
            request,
            nth,
            stage: Stage::Queued,
            created_at: Utc::now(),
            answered_at: None,
            ended_at: None,
            cause: None,
            talk_seconds: 0,
            billed_seconds: 0,
            machine: false,
            socket: None,
            hang_up: Arc::new(Notify::new()),
        };
        let line = json!({
            "event": "create", "at": call.created_at, "call_uuid": uuid, "to": callee,
            "from": digits(&call.request.from), "nth": nth, "outcome": call.fate.outcome,
        });
        book.add(call);
        line
    };
    world.note(line);
    world.spawn(play::play(Arc::clone(world), uuid));
    Some(uuid)
}

/// The parameters of a create request, JSON or form; values that are no text are taken as they are written.
fn parameters(headers: &HeaderMap, body: &[u8]) -> Result<Params, String> {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if kind.starts_with("application/x-www-form-urlencoded") {
        return Ok(form_urlencoded::parse(body).into_owned().collect());
    }
    let object: serde_json::Map<String, Value> =
        serde_json::from_slice(body).map_err(|_| "the request body is not valid JSON".to_owned())?;
    let text = |value: Value| match value {
        Value::String(text) => text,
        other => other.to_string(),
    };
    Ok(object.into_iter().map(|(name, value)| (name, text(value))).collect())
}

/// What a create request asks for, or Plivo's complaint about it.
fn request(account: &Account, params: &Params) -> Result<Request, String> {
    let given = |name: &str| params.get(name).filter(|value| !value.is_empty());
    let required = |name: &str| given(name).cloned().ok_or_else(|| format!("{name} parameter not present"));
    let hook = |name: &str| -> Result<Option<Hook>, String> {
        let Some(url) = given(&format!("{name}_url")) else { return Ok(None) };
        let fits = Url::parse(url).is_ok_and(|url| matches!(url.scheme(), "http" | "https"));
        let method = given(&format!("{name}_method")).map_or("POST", String::as_str);
        match (fits, method) {
            (true, "POST" | "GET") => Ok(Some(Hook { url: url.clone(), get: method == "GET" })),
            (true, _) => Err(format!("{name}_method parameter is not valid")),
            (false, _) => Err(format!("{name}_url parameter is not valid")),
        }
    };
    let number = |name: &str, default: u32, most: u32| match given(name).map(|value| value.parse::<u32>()) {
        None => Ok(default),
        Some(Ok(value)) if (1..=most).contains(&value) => Ok(value),
        Some(_) => Err(format!("{name} parameter is not valid")),
    };

    let (from, to) = (required("from")?, required("to")?);
    required("answer_url")?;
    let answer = hook("answer")?.unwrap_or_default();
    for (name, value) in [("from", &from), ("to", &to)] {
        let plain = value.strip_prefix('+').unwrap_or(value);
        if !(7..=15).contains(&plain.len()) || !plain.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(format!("{name} parameter is not a valid phone number"));
        }
    }
    if digits(&from) == digits(&to) {
        return Err("from and to must not be the same number".to_owned());
    }
    if !account.numbers.is_empty() && !account.numbers.iter().any(|number| digits(number) == digits(&from)) {
        return Err(format!("from number {from} is not associated with your account"));
    }
    let machine_detection = match (given("machine_detection").map(String::as_str), hook("machine_detection")?) {
        (None | Some("false"), _) => Detection::Off,
        (Some("true"), Some(hook)) => Detection::CallBack(hook),
        (Some("true"), None) => Detection::Tell,
        (Some("hangup"), _) => Detection::HangUp,
        (Some(_), _) => return Err("machine_detection parameter is not valid".to_owned()),
    };
    // Judged, but of no effect: who does not answer is given up after the pace's longest ring.
    number("ring_timeout", 120, 86_400)?;
    Ok(Request {
        from,
        to,
        ring: hook("ring")?,
        // Without a URL of its own the hang-up goes to the answer URL: a trap that Plivo's users know.
        hangup: hook("hangup")?.unwrap_or_else(|| answer.clone()),
        fallback: hook("fallback")?,
        answer,
        machine_detection,
        time_limit: number("time_limit", 14_400, 86_400)?,
        caller_name: params.get("caller_name").map(|name| name.chars().take(50).collect()).unwrap_or_default(),
        dialect: Dialect::Plivo,
    })
}

/// Live calls, queued calls, or the records of ended ones, newest first.
async fn list(
    State(world): State<Arc<World>>,
    Path(auth_id): Path<String>,
    Query(query): Query<Params>,
    headers: HeaderMap,
) -> Response {
    if let Err(response) = authenticate(&world, &auth_id, &headers) {
        return *response;
    }
    let book = world.book();
    let staged = |queued: bool| {
        let calls = book.live(&auth_id).filter(|call| (call.stage == Stage::Queued) == queued);
        Json(json!({"api_id": Uuid::new_v4(), "calls": calls.map(|call| call.uuid).collect::<Vec<_>>()}))
            .into_response()
    };
    match query.get("status").map(String::as_str) {
        Some("live") => return staged(false),
        Some("queued") => return staged(true),
        Some(_) => return error(StatusCode::BAD_REQUEST, "status parameter is not valid"),
        None => {}
    }
    match records(&world, &book, &auth_id, &query) {
        Ok(page) => Json(page).into_response(),
        Err(message) => error(StatusCode::BAD_REQUEST, &message),
    }
}

fn records(world: &World, book: &Book, auth_id: &str, query: &Params) -> Result<Value, String> {
    let number = |name: &str, default: usize| match query.get(name).map(|value| value.parse::<usize>()) {
        None => Ok(default),
        Some(Ok(value)) => Ok(value),
        Some(Err(_)) => Err(format!("{name} parameter is not valid")),
    };
    let limit = number("limit", PAGE)?.clamp(1, PAGE);
    let offset = number("offset", 0)?;
    let filters = filters(query)?;
    let fits = |call: &&Call| filters.iter().all(|filter| filter(call));
    // Without a filter nothing need be looked at to be counted: whoever reads it all asks for many pages.
    let total = if filters.is_empty() { book.ended(auth_id).len() } else { book.ended(auth_id).filter(fits).count() };
    let page = |offset: usize| format!("/v1/Account/{auth_id}/Call/?limit={limit}&offset={offset}");
    let objects: Vec<_> = book
        .ended(auth_id)
        .filter(fits)
        .skip(offset)
        .take(limit)
        .map(|call| call.record(&world.options.billing, world.options.zone))
        .collect();
    Ok(json!({
        "api_id": Uuid::new_v4(),
        "meta": {
            "limit": limit,
            "offset": offset,
            "total_count": total,
            "next": (offset + limit < total).then(|| page(offset + limit)),
            "previous": (offset > 0).then(|| page(offset.saturating_sub(limit))),
        },
        "objects": objects,
    }))
}

type Filter = Box<dyn Fn(&Call) -> bool>;

/// What the query asks of a record. Numbers match exactly or by prefix.
fn filters(query: &Params) -> Result<Vec<Filter>, String> {
    let mut filters: Vec<Filter> = Vec::new();
    for (name, value) in query {
        let wrong = || format!("{name} parameter is not valid");
        match name.as_str() {
            "to_number" | "from_number" => {
                let (wanted, to) = (digits(value), name == "to_number");
                filters.push(Box::new(move |call| {
                    digits(if to { &call.request.to } else { &call.request.from }).starts_with(&wanted)
                }));
            }
            "hangup_cause_code" => {
                let code: u16 = value.parse().map_err(|_| wrong())?;
                filters.push(Box::new(move |call| call.cause.is_some_and(|cause| cause.code == code)));
            }
            "end_time__gt" | "end_time__gte" | "end_time__lt" | "end_time__lte" => {
                let bound = time(value).ok_or_else(wrong)?;
                let kept: fn(&DateTime<Utc>, &DateTime<Utc>) -> bool = match name.as_str() {
                    "end_time__gt" => |end, bound| end > bound,
                    "end_time__gte" => |end, bound| end >= bound,
                    "end_time__lt" => |end, bound| end < bound,
                    _ => |end, bound| end <= bound,
                };
                filters.push(Box::new(move |call| call.ended_at.is_some_and(|end| kept(&end, &bound))));
            }
            _ => {}
        }
    }
    Ok(filters)
}

/// A filter's time: UTC, seconds and fraction optional.
fn time(text: &str) -> Option<DateTime<Utc>> {
    ["%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M"]
        .into_iter()
        .find_map(|format| NaiveDateTime::parse_from_str(text, format).ok())
        .map(|time| time.and_utc())
}

/// A call's live state, or its record once it is over.
async fn one(
    State(world): State<Arc<World>>,
    Path((auth_id, call_uuid)): Path<(String, String)>,
    Query(query): Query<Params>,
    headers: HeaderMap,
) -> Response {
    if let Err(response) = authenticate(&world, &auth_id, &headers) {
        return *response;
    }
    let book = world.book();
    let call = call_uuid.parse().ok().and_then(|uuid| book.get(uuid)).filter(|call| call.auth_id == auth_id);
    let found = call.and_then(|call| {
        let is = match query.get("status").map(String::as_str) {
            Some("queued") => call.stage == Stage::Queued,
            Some("live") => matches!(call.stage, Stage::Ringing | Stage::InProgress),
            _ => return (call.stage == Stage::Ended).then(|| call.record(&world.options.billing, world.options.zone)),
        };
        is.then(|| call.live())
    });
    found.map_or_else(|| error(StatusCode::NOT_FOUND, "not found"), |call| Json(call).into_response())
}

async fn hang_up(
    State(world): State<Arc<World>>,
    Path((auth_id, call_uuid)): Path<(String, String)>,
    headers: HeaderMap,
) -> Response {
    if let Err(response) = authenticate(&world, &auth_id, &headers) {
        return *response;
    }
    let book = world.book();
    let call = call_uuid.parse().ok().and_then(|uuid| book.get(uuid)).filter(|call| call.auth_id == auth_id);
    match call.filter(|call| call.stage != Stage::Ended) {
        Some(call) => {
            call.hang_up.notify_one();
            StatusCode::NO_CONTENT.into_response()
        }
        None => error(StatusCode::NOT_FOUND, "not found"),
    }
}
