//! The same carrier in Telnyx's words: Call Control's commands, its webhooks with their signature, and its detail records.
//!
//! Nothing is asked of the caller while a call goes on: it brings its stream and its recording along, and every step is told to one URL.
//! Written apart from the adapter in `shared`, so that a mistake in one is not repeated in the other.

use super::{
    Account, World,
    api::{self, Params, Taken, Trouble},
    call::{Billing, Call, Commands, Detection, Dialect, Hook, Request, Stage},
    callback::{self, Told},
    cause::Cause,
    sound,
};
use axum::{
    Json, Router,
    body::Bytes,
    extract::{Path, Query, State},
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use ed25519_dalek::{Signer, SigningKey};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::sync::Arc;
use url::Url;
use uuid::Uuid;

/// Records a page at most.
const PAGE: usize = 50;
/// How long a command is known again by its id.
const COMMANDS_KNOWN: TimeDelta = TimeDelta::seconds(60);
/// What a talk comes to at most by the times that are told of it. Here a minute takes a fraction of a second, and who counts from answer
/// to end must not be told more on a slow machine than on a fast one: what is billed, the price tells.
const TOLD_TALK: TimeDelta = TimeDelta::milliseconds(900);

pub(super) fn router() -> Router<Arc<World>> {
    Router::new()
        .route("/v2/calls", post(create))
        .route("/v2/calls/{call}", get(one))
        .route("/v2/calls/{call}/actions/hangup", post(hang_up))
        .route("/v2/connections/{connection}/active_calls", get(active))
        .route("/v2/detail_records", get(records))
        .route("/telephony-recorder/{file}", get(recording))
}

impl Account {
    /// An account at Telnyx: `auth_id` is its application, and `auth_token` a JSON object of its API key and its public key.
    pub fn telnyx() -> Self {
        let random = Uuid::new_v4();
        let api_key = format!("KEY{}", Uuid::new_v4().simple().to_string().to_uppercase());
        let public_key = STANDARD.encode(signing_key(&api_key).verifying_key().as_bytes());
        Self {
            auth_id: (1_000_000_000_000_000_000 + random.as_u128() % 1_000_000_000_000_000_000).to_string(),
            auth_token: json!({ "api_key": api_key, "public_key": public_key }).to_string(),
            numbers: Vec::new(),
            max_concurrent_calls: None,
        }
    }
}

/// The key that signs an account's webhooks.
fn signing_key(api_key: &str) -> SigningKey {
    SigningKey::from_bytes(&Sha256::digest(["signing", api_key].concat()).into())
}

/// `Telnyx-Signature-Ed25519` of a body that is sent at a unix second.
fn signature(key: &SigningKey, at: i64, body: &str) -> String {
    STANDARD.encode(key.sign(format!("{at}|{body}").as_bytes()).to_bytes())
}

/// What a webhook is sent with.
pub(super) fn headers(auth_token: &str, body: &str, at: i64) -> [(&'static str, String); 2] {
    let key = signing_key(&api::secret(auth_token, "api_key").unwrap_or_default());
    [("telnyx-signature-ed25519", signature(&key, at, body)), ("telnyx-timestamp", at.to_string())]
}

/// An error as Telnyx writes it.
fn error(status: StatusCode, code: u32, title: &str, pointer: &str) -> Response {
    let source = (!pointer.is_empty()).then(|| json!({ "pointer": pointer }));
    (
        status,
        Json(json!({ "errors": [{ "code": code.to_string(), "title": title, "detail": title, "source": source }] })),
    )
        .into_response()
}

fn not_found() -> Response {
    error(StatusCode::NOT_FOUND, 10_005, "Resource not found", "")
}

fn authenticate(world: &World, headers: &HeaderMap) -> Result<Account, Box<Response>> {
    let key = api::bearer(headers);
    world
        .account_where(|account| key.is_some() && api::secret(&account.auth_token, "api_key").as_deref() == key)
        .ok_or_else(|| Box::new(error(StatusCode::UNAUTHORIZED, 10_009, "Authentication failed", "")))
}

fn control_id(call: Uuid) -> String {
    format!("v3:{}", call.simple())
}

fn call_of(control_id: &str) -> Option<Uuid> {
    control_id.strip_prefix("v3:")?.parse().ok()
}

fn commands(call: &Call) -> Option<&Commands> {
    match &call.request.dialect {
        Dialect::Telnyx(commands) => Some(commands),
        _ => None,
    }
}

async fn create(State(world): State<Arc<World>>, headers: HeaderMap, body: Bytes) -> Response {
    let account = match authenticate(&world, &headers) {
        Ok(account) => account,
        Err(response) => return *response,
    };
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let request = match request(&account, &body) {
        Ok(request) => request,
        Err((pointer, complaint)) => return error(StatusCode::UNPROCESSABLE_ENTITY, 10_015, complaint, pointer),
    };
    if let Some(known) = body["command_id"].as_str().and_then(|id| asked_before(&world, &account, id)) {
        return Json(json!({ "data": known })).into_response();
    }
    match api::take(&world, &account, request).await {
        Taken::Call(uuid) => {
            let data = world.read(uuid, resource).unwrap_or_default();
            Json(json!({ "data": data })).into_response()
        }
        Taken::CutOff => api::cut_off(),
        Taken::Trouble(Trouble::Throttle) => error(StatusCode::TOO_MANY_REQUESTS, 10_011, "Too many requests", ""),
        Taken::Trouble(Trouble::Refuse) => error(StatusCode::FORBIDDEN, 10_010, "Authorization failed", ""),
        Taken::Trouble(Trouble::Full) => error(StatusCode::FORBIDDEN, 90_041, "User channel limit exceeded D1", ""),
        Taken::Trouble(Trouble::Fail) => error(StatusCode::INTERNAL_SERVER_ERROR, 10_007, "Unexpected error", ""),
    }
}

/// A command that was given within a minute is the same command.
fn asked_before(world: &World, account: &Account, command_id: &str) -> Option<Value> {
    let since = Utc::now() - COMMANDS_KNOWN;
    let book = world.book();
    let mut recent = book.calls.iter().rev().take_while(|call| call.created_at > since);
    recent
        .find(|call| {
            call.auth_id == account.auth_id && commands(call).is_some_and(|commands| commands.command_id == command_id)
        })
        .map(resource)
}

/// What a dial command asks for, or where it is wrong and how.
fn request(account: &Account, body: &Value) -> Result<Request, (&'static str, &'static str)> {
    let text = |name: &str| body[name].as_str().filter(|text| !text.is_empty());
    let number = |name: &'static str, at: &'static str| {
        let number = text(name).unwrap_or_default();
        let digits = number.strip_prefix('+').unwrap_or_default();
        let fits = (7..=15).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_digit());
        fits.then(|| number.to_owned()).ok_or((at, "The number must be in E.164 format"))
    };
    let one_of = |name: &str, at: &'static str, known: &[&str]| match &body[name] {
        Value::Null => Ok(()),
        Value::String(word) if known.contains(&word.as_str()) => Ok(()),
        _ => Err((at, "Invalid parameter")),
    };
    let within = |name: &str, at: &'static str, default: u32, least: u64, most: u64| match &body[name] {
        Value::Null => Ok(default),
        value => match value.as_u64() {
            Some(value) if (least..=most).contains(&value) => Ok(value as u32),
            _ => Err((at, "Invalid parameter")),
        },
    };
    if text("connection_id") != Some(&account.auth_id) {
        return Err(("/connection_id", "Invalid connection_id"));
    }
    let (from, to) = (number("from", "/from")?, number("to", "/to")?);
    if !account.numbers.is_empty() && !account.numbers.contains(&from) {
        return Err(("/from", "The number is not yours"));
    }
    let webhook = text("webhook_url").unwrap_or_default();
    if !Url::parse(webhook).is_ok_and(|url| matches!(url.scheme(), "http" | "https")) {
        return Err(("/webhook_url", "Invalid URL"));
    }
    let stream = text("stream_url");
    if stream.is_some_and(|url| !url.starts_with("ws://") && !url.starts_with("wss://")) {
        return Err(("/stream_url", "Invalid URL"));
    }
    one_of("webhook_url_method", "/webhook_url_method", &["POST", "GET"])?;
    one_of("stream_track", "/stream_track", &["inbound_track", "outbound_track", "both_tracks"])?;
    one_of("stream_bidirectional_mode", "/stream_bidirectional_mode", &["mp3", "rtp"])?;
    let codecs = ["PCMU", "PCMA", "G722", "OPUS", "AMR-WB", "L16"];
    one_of("stream_bidirectional_codec", "/stream_bidirectional_codec", &codecs)?;
    one_of("record", "/record", &["record-from-answer"])?;
    one_of("record_channels", "/record_channels", &["single", "dual"])?;
    one_of("record_format", "/record_format", &["mp3", "wav"])?;
    within("timeout_secs", "/timeout_secs", 30, 5, 600)?;
    let client_state = text("client_state").unwrap_or_default();
    if STANDARD.decode(client_state).is_err() {
        return Err(("/client_state", "It must be base64"));
    }
    let machine_detection = match text("answering_machine_detection") {
        None | Some("disabled") => Detection::Off,
        Some("detect" | "detect_beep" | "detect_words" | "greeting_end" | "premium") => Detection::Tell,
        Some(_) => return Err(("/answering_machine_detection", "Invalid parameter")),
    };
    Ok(Request {
        to,
        from,
        machine_detection,
        time_limit: within("time_limit_secs", "/time_limit_secs", 14_400, 30, 14_400)?,
        dialect: Dialect::Telnyx(Commands {
            webhook: Hook { url: webhook.to_owned(), get: false },
            client_state: client_state.to_owned(),
            command_id: text("command_id").unwrap_or_default().to_owned(),
            has_stream: stream.is_some(),
            records: text("record").is_some(),
        }),
        ..Request::default()
    })
}

fn time(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::Micros, true)
}

/// What names a call wherever it is spoken of.
fn names(call: &Call) -> Value {
    json!({
        "call_control_id": control_id(call.uuid), "call_leg_id": call.uuid, "call_session_id": call.uuid,
        "client_state": commands(call).map(|commands| &commands.client_state),
    })
}

fn and(mut object: Value, more: Value) -> Value {
    if let (Value::Object(object), Value::Object(more)) = (&mut object, more) {
        object.extend(more);
    }
    object
}

/// The Call resource.
fn resource(call: &Call) -> Value {
    let ended = call.stage == Stage::Ended;
    and(
        names(call),
        json!({
            "record_type": "call", "is_alive": call.answered_at.is_some() && !ended, "start_time": time(call.created_at),
            "end_time": call.ended_at.map(time), "call_duration": if ended { call.talk_seconds } else { 0 },
        }),
    )
}

/// When the call ended, by what is told of it.
fn told_end(call: &Call) -> DateTime<Utc> {
    let ended = call.ended_at.unwrap_or_else(Utc::now);
    call.answered_at.map_or(ended, |answered| ended.min(answered + TOLD_TALK))
}

/// `hangup_cause`, `hangup_source` and the SIP code.
fn end_of(cause: Cause, answered: bool) -> (&'static str, &'static str, &'static str) {
    let source = if cause.source == "Callee" { "callee" } else { "caller" };
    match (answered, cause.cause, cause.code) {
        (true, _, 6000) => ("time_limit", "unknown", "200"),
        (true, ..) => ("normal_clearing", source, "200"),
        (_, "USER_BUSY", _) => ("user_busy", "callee", "486"),
        (_, "CALL_REJECTED", _) => ("call_rejected", "callee", "603"),
        (_, "NO_ANSWER", 6010) => ("timeout", "unknown", "487"),
        (_, "NO_ANSWER", _) => ("no_answer", "unknown", "480"),
        (_, "ORIGINATOR_CANCEL", _) => ("originator_cancel", "caller", "487"),
        _ => ("not_found", "unknown", "404"),
    }
}

/// Tells a step of a call.
pub(super) fn step(world: &Arc<World>, uuid: Uuid, step: &str) {
    let told = world.read(uuid, |call| {
        let commands = commands(call)?;
        Some((commands.webhook.clone(), events(call, commands, step, &world.options.billing, &world.url)))
    });
    let Some(Some((hook, events))) = told else { return };
    for (name, body) in events {
        // Which of two is first is nowhere promised.
        if let Some(callback) = world.address(uuid, name, hook.clone(), Told::Telnyx(body.to_string())) {
            callback::send(world, callback);
        }
    }
}

fn events(call: &Call, own: &Commands, step: &str, billing: &Billing, origin: &Url) -> Vec<(&'static str, Value)> {
    let answered = call.answered_at;
    let event = |name: &'static str, at: DateTime<Utc>, more: Value| {
        let payload = json!({ "connection_id": call.auth_id, "from": call.request.from, "to": call.request.to });
        let body = json!({
            "data": {
                "record_type": "event", "event_type": name, "id": Uuid::new_v4(), "occurred_at": time(at),
                "payload": and(and(names(call), payload), more),
            },
            "meta": { "attempt": 1, "delivered_to": own.webhook.url },
        });
        (name, body)
    };
    let start = json!({ "start_time": time(call.created_at), "direction": "outgoing" });
    let mut events = Vec::new();
    match step {
        "initiated" => {
            events.push(event("call.initiated", call.created_at, and(start, json!({ "state": "bridging" }))))
        }
        "answered" => {
            let at = answered.unwrap_or_else(Utc::now);
            events.push(event("call.answered", at, and(start, json!({ "state": "answered" }))));
            if own.has_stream {
                events.push(event("streaming.started", at, json!({ "stream_id": call.uuid })));
            }
        }
        "detected" => {
            let result = if call.machine { "machine" } else { "human" };
            events.push(event("call.machine.detection.ended", Utc::now(), json!({ "result": result })));
        }
        "completed" => {
            let at = told_end(call);
            if answered.is_some() && own.records {
                events.push(event("call.recording.saved", at, saved(call, origin)));
            }
            if answered.is_some() && own.has_stream {
                events.push(event("streaming.stopped", at, json!({ "stream_id": call.uuid })));
            }
            let (cause, source, code) =
                call.cause.map_or(("unspecified", "unknown", "500"), |cause| end_of(cause, answered.is_some()));
            let end = json!({
                "state": "hangup", "start_time": time(call.created_at), "end_time": time(at), "hangup_cause": cause,
                "hangup_source": source, "sip_hangup_cause": code, "call_quality_stats": null,
            });
            events.push(event("call.hangup", at, end));
            events.push(event("call.cost", at, cost(call, billing)));
        }
        // Whether it rings is not told.
        _ => {}
    }
    events
}

/// The price, with the seconds that are billed.
fn cost(call: &Call, billing: &Billing) -> Value {
    let (seconds, total) = (call.billed_seconds, billing.cost(call.billed_seconds));
    let part = |name: &str, cost: &str| json!({ "call_part": name, "billed_duration_secs": seconds, "cost": cost, "currency": "USD", "rate": billing.rate() });
    json!({
        "status": "success", "billed_duration_secs": seconds, "total_cost": total, "billing_group_id": null,
        "cost_parts": [part("sip-trunking", &total), part("call-control", "0.00000")],
    })
}

fn saved(call: &Call, origin: &Url) -> Value {
    let id = Uuid::new_v4();
    let end = call.ended_at.unwrap_or(call.created_at);
    let start = end - TimeDelta::seconds(call.talk_seconds.into());
    let url = format!("{origin}telephony-recorder/{id}.mp3");
    json!({
        "recording_id": id, "channels": "dual", "format": "mp3", "recording_started_at": time(start),
        "recording_ended_at": time(end), "recording_urls": { "mp3": url }, "public_recording_urls": {},
    })
}

/// A recording's link opens it by itself.
async fn recording(Path(_): Path<String>) -> Response {
    sound::response()
}

/// The calls of an application that are not over; of a call that is, nothing more is listed.
async fn active(State(world): State<Arc<World>>, Path(connection): Path<String>, headers: HeaderMap) -> Response {
    match authenticate(&world, &headers) {
        Ok(account) if account.auth_id == connection => {
            let calls: Vec<Value> = world.book().live(&connection).map(resource).collect();
            Json(json!({ "meta": { "total_items": calls.len() }, "data": calls })).into_response()
        }
        Ok(_) => not_found(),
        Err(response) => *response,
    }
}

async fn one(State(world): State<Arc<World>>, Path(call): Path<String>, headers: HeaderMap) -> Response {
    let account = match authenticate(&world, &headers) {
        Ok(account) => account,
        Err(response) => return *response,
    };
    let book = world.book();
    let call = call_of(&call).and_then(|uuid| book.get(uuid)).filter(|call| call.auth_id == account.auth_id);
    call.map_or_else(not_found, |call| Json(json!({ "data": resource(call) })).into_response())
}

async fn hang_up(State(world): State<Arc<World>>, Path(call): Path<String>, headers: HeaderMap) -> Response {
    let account = match authenticate(&world, &headers) {
        Ok(account) => account,
        Err(response) => return *response,
    };
    let book = world.book();
    match call_of(&call).and_then(|uuid| book.get(uuid)).filter(|call| call.auth_id == account.auth_id) {
        None => not_found(),
        Some(call) if call.stage == Stage::Ended => {
            error(StatusCode::UNPROCESSABLE_ENTITY, 90_018, "Call has already ended", "")
        }
        Some(call) => {
            call.hang_up.notify_one();
            Json(json!({ "data": { "result": "ok" } })).into_response()
        }
    }
}

/// A detail record: what was billed, of calls that are over.
fn record(call: &Call, billing: &Billing) -> Value {
    and(
        names(call),
        json!({
            "record_type": "call-control", "id": call.uuid, "direction": "outbound", "cli": call.request.from,
            "cld": call.request.to, "started_at": time(call.created_at), "finished_at": call.ended_at.map(time),
            "call_sec": call.talk_seconds, "billed_sec": call.billed_seconds, "cost": billing.cost(call.billed_seconds),
            "currency": "USD", "rate": billing.rate(), "connection_id": call.auth_id, "connected": call.answered_at.is_some(),
        }),
    )
}

async fn records(State(world): State<Arc<World>>, Query(query): Query<Params>, headers: HeaderMap) -> Response {
    let account = match authenticate(&world, &headers) {
        Ok(account) => account,
        Err(response) => return *response,
    };
    if query.get("filter[record_type]").map(String::as_str) != Some("call-control") {
        return error(StatusCode::BAD_REQUEST, 10_011, "No matching record type was found", "/filter[record_type]");
    }
    let bound = |name: &str| match query.get(name).map(|text| text.parse::<DateTime<Utc>>()) {
        None => Ok(None),
        Some(Ok(at)) => Ok(Some(at)),
        Some(Err(_)) => Err(Box::new(error(StatusCode::BAD_REQUEST, 10_015, "Invalid parameter", name))),
    };
    let (since, until) = match (bound("filter[started_at][gte]"), bound("filter[started_at][lt]")) {
        (Ok(since), Ok(until)) => (since, until),
        (Err(response), _) | (_, Err(response)) => return *response,
    };
    let number = |name: &str, or: usize| query.get(name).and_then(|text| text.parse().ok()).unwrap_or(or).max(1);
    let (page, size) = (number("page[number]", 1), number("page[size]", 20).min(PAGE));
    let book = world.book();
    let mut calls: Vec<&Call> = book
        .ended(&account.auth_id)
        .filter(|call| since.is_none_or(|since| call.created_at >= since))
        .filter(|call| until.is_none_or(|until| call.created_at < until))
        .collect();
    calls.sort_by_key(|call| call.created_at);
    let shown: Vec<Value> =
        calls.iter().skip((page - 1) * size).take(size).map(|call| record(call, &world.options.billing)).collect();
    let meta = json!({
        "page_number": page, "page_size": size, "total_pages": calls.len().div_ceil(size), "total_results": calls.len(),
    });
    Json(json!({ "data": shown, "meta": meta })).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signs_as_the_official_sdks_expect() {
        let vectors: Vec<Value> = serde_json::from_str(include_str!("../../../tests/vectors/telnyx.json")).unwrap();
        let mut judged = 0;
        for vector in vectors.iter().filter(|vector| vector["valid"] == true) {
            let Some(seed) = vector["signing_seed_hex"].as_str() else { continue };
            let seed: Vec<u8> = (0..32).map(|at| u8::from_str_radix(&seed[2 * at..2 * at + 2], 16).unwrap()).collect();
            let key = SigningKey::from_bytes(&seed.try_into().unwrap());
            let at = vector["headers"]["Telnyx-Timestamp"].as_str().unwrap().parse().unwrap();
            let ours = signature(&key, at, vector["body"].as_str().unwrap());
            assert_eq!(vector["headers"]["Telnyx-Signature-Ed25519"], ours, "{}", vector["id"]);
            judged += 1;
        }
        assert!(judged >= 3, "only {judged} vectors");
    }

    #[test]
    fn an_account_s_public_key_opens_what_it_signs() {
        let account = Account::telnyx();
        let [(_, signed), (_, at)] = headers(&account.auth_token, "{}", 7);
        let public: [u8; 32] =
            STANDARD.decode(api::secret(&account.auth_token, "public_key").unwrap()).unwrap().try_into().unwrap();
        let signed: [u8; 64] = STANDARD.decode(signed).unwrap().try_into().unwrap();
        let key = ed25519_dalek::VerifyingKey::from_bytes(&public).unwrap();
        assert!(key.verify_strict(format!("{at}|{{}}").as_bytes(), &signed.into()).is_ok());
    }

    #[test]
    fn refuses_what_telnyx_refuses_and_says_where() {
        let account = Account::telnyx();
        let good = json!({
            "connection_id": account.auth_id, "from": "+14155550111", "to": "+14155550100", "webhook_url": "https://h/",
            "stream_url": "wss://h/", "timeout_secs": 30, "client_state": "YQ==",
        });
        assert!(request(&account, &good).is_ok());
        for (name, value, pointer) in [
            ("connection_id", json!("1"), "/connection_id"),
            ("to", json!("14155550100"), "/to"),
            ("webhook_url", json!("ftp://h"), "/webhook_url"),
            ("stream_url", json!("https://h"), "/stream_url"),
            ("timeout_secs", json!(4), "/timeout_secs"),
            ("time_limit_secs", json!("60"), "/time_limit_secs"),
            ("client_state", json!("not base64!"), "/client_state"),
            ("stream_track", json!("all"), "/stream_track"),
        ] {
            let mut body = good.clone();
            body[name] = value;
            assert_eq!(request(&account, &body).map(|_| ()).unwrap_err().0, pointer);
        }
    }
}
