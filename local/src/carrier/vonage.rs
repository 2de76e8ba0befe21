//! The same carrier in Vonage's words: its Voice API behind an application's own tokens, its documents (NCCO), and its signed events.
//!
//! Written apart from the adapter in `shared`, so that a mistake in one is not repeated in the other.

use super::{
    Account, World,
    answer::{Instructions, Then},
    api::{self, Params, Taken, Trouble},
    call::{Billing, Call, Detection, Dialect, Hook, Request, Socket, Stage, digits},
    callback::{self, Callback, Told},
    cause::Cause,
    sound,
};
use anyhow::Context;
use axum::{
    Json, Router,
    body::Bytes,
    extract::{Path, Query, State},
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
    routing::get,
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use hmac::{Hmac, KeyInit, Mac};
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use rsa::{
    RsaPrivateKey,
    pkcs8::{DecodePrivateKey, EncodePrivateKey, LineEnding},
    traits::PublicKeyParts,
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::{
    sync::{Arc, PoisonError},
    time::Duration,
};
use url::Url;
use uuid::Uuid;

/// Calls a page, unless it is said, and at most.
const PAGE: usize = 10;
const MOST: usize = 100;
/// Bits of an application's key.
const KEY_BITS: usize = 2_048;
/// After so long the end without a talk is told once more, as a plain one.
const ONCE_MORE: Duration = Duration::from_millis(300);
/// Content types that a websocket may have.
const SOCKET_TYPES: [&str; 3] = ["audio/l16;rate=8000", "audio/l16;rate=16000", "audio/l16;rate=24000"];

pub(super) fn router() -> Router<Arc<World>> {
    Router::new()
        .route("/v1/calls", get(list).post(create))
        .route("/v1/calls/{call}", get(one).put(change))
        .route("/v1/files/{file}", get(recording))
}

impl Account {
    /// An account at Vonage: `auth_id` is its application, and `auth_token` a JSON object of its secrets, with a fresh key of the
    /// application's.
    pub fn vonage() -> anyhow::Result<Self> {
        let key = RsaPrivateKey::new(&mut rsa::rand_core::OsRng, KEY_BITS).context("no key for the application")?;
        let private_key = key.to_pkcs8_pem(LineEnding::LF).context("the application's key cannot be encoded")?;
        let application = Uuid::new_v4().to_string();
        let random = || Uuid::new_v4().simple().to_string();
        let secrets = json!({
            "api_key": &random()[..8], "signature_secret": random() + &random(), "application_id": application,
            "private_key": private_key.as_str(),
        });
        Ok(Self {
            auth_id: application,
            auth_token: secrets.to_string(),
            numbers: Vec::new(),
            max_concurrent_calls: None,
        })
    }
}

/// The key that an application's tokens are judged by.
fn key_of(world: &World, account: &Account) -> Option<DecodingKey> {
    let mut keys = world.keys.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(key) = keys.get(&account.auth_id) {
        return Some(key.clone());
    }
    let private = RsaPrivateKey::from_pkcs8_pem(&api::secret(&account.auth_token, "private_key")?).ok()?;
    let key = DecodingKey::from_rsa_raw_components(&private.n().to_bytes_be(), &private.e().to_bytes_be());
    keys.insert(account.auth_id.clone(), key.clone());
    Some(key)
}

fn authenticate(world: &World, headers: &HeaderMap) -> Result<Account, Box<Response>> {
    let account = || {
        let token = api::bearer(headers)?;
        let claims: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?).ok()?;
        let account = world.account(claims["application_id"].as_str()?)?;
        let mut rules = Validation::new(Algorithm::RS256);
        rules.set_required_spec_claims(&["exp"]);
        jsonwebtoken::decode::<Value>(token, &key_of(world, &account)?, &rules).ok()?;
        Some(account)
    };
    account().ok_or_else(|| Box::new(error(StatusCode::UNAUTHORIZED, "Unauthorized", None)))
}

/// An error as Vonage writes it.
fn error(status: StatusCode, title: &str, wrong: Option<(&str, &str)>) -> Response {
    let invalid = wrong.map(|(name, reason)| json!([{ "name": name, "reason": reason }]));
    let body = json!({
        "type": "https://developer.vonage.com/api-errors", "title": title, "detail": title, "instance": Uuid::new_v4(),
        "invalid_parameters": invalid,
    });
    (status, Json(body)).into_response()
}

fn not_found() -> Response {
    error(StatusCode::NOT_FOUND, "Not Found", None)
}

fn conversation(call: &Call) -> String {
    format!("CON-{}", call.uuid)
}

async fn create(State(world): State<Arc<World>>, headers: HeaderMap, body: Bytes) -> Response {
    let account = match authenticate(&world, &headers) {
        Ok(account) => account,
        Err(response) => return *response,
    };
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let request = match request(&account, &body) {
        Ok(request) => request,
        Err(wrong) => return error(StatusCode::BAD_REQUEST, "Bad Request", Some(wrong)),
    };
    match api::take(&world, &account, request).await {
        Taken::Call(uuid) => {
            let conversation = world.read(uuid, conversation);
            let started = json!({
                "uuid": uuid, "status": "started", "direction": "outbound", "conversation_uuid": conversation,
            });
            (StatusCode::CREATED, Json(started)).into_response()
        }
        Taken::CutOff => api::cut_off(),
        Taken::Trouble(Trouble::Throttle | Trouble::Full) => {
            error(StatusCode::TOO_MANY_REQUESTS, "Rate Limit Hit", None)
        }
        Taken::Trouble(Trouble::Refuse) => error(StatusCode::FORBIDDEN, "Forbidden", None),
        Taken::Trouble(Trouble::Fail) => error(StatusCode::INTERNAL_SERVER_ERROR, "Internal Error", None),
    }
}

/// What a request asks for, or the parameter that is wrong and why.
fn request(account: &Account, body: &Value) -> Result<Request, (&'static str, &'static str)> {
    let phone = |end: &Value, name: &'static str| {
        let number = end["number"].as_str().unwrap_or_default();
        let fits = end["type"] == "phone" && (7..=15).contains(&number.len());
        let fits = fits && number.bytes().all(|byte| byte.is_ascii_digit());
        fits.then(|| number.to_owned()).ok_or((name, "Must be a phone number without a plus sign"))
    };
    let hook = |name: &'static str, method: &str| match body[name].as_array().map(Vec::as_slice) {
        None | Some([]) => Ok(None),
        Some([url]) if url.as_str().and_then(|url| Url::parse(url).ok()).is_some() => {
            let url = url.as_str().unwrap_or_default().to_owned();
            Ok(Some(Hook { url, get: body[method].as_str() != Some("POST") }))
        }
        Some(_) => Err((name, "Must be a list of one URL")),
    };
    let within = |name: &'static str, default: u32, most: u64| match &body[name] {
        Value::Null => Ok(default),
        value => match value.as_u64() {
            Some(value) if (1..=most).contains(&value) => Ok(value as u32),
            _ => Err((name, "Out of range")),
        },
    };
    let to = match body["to"].as_array().map(Vec::as_slice) {
        Some([to]) => phone(to, "to[0].number")?,
        _ => return Err(("to", "Must be a list of one endpoint")),
    };
    let from = phone(&body["from"], "from")?;
    if !account.numbers.is_empty() && !account.numbers.iter().any(|number| digits(number) == from) {
        return Err(("from", "The number is not linked to the application"));
    }
    let answer = hook("answer_url", "answer_method")?.ok_or(("answer_url", "Required without an ncco"))?;
    // Without a URL of its own an event goes to the application's, which has none here.
    let events = hook("event_url", "event_method")?.ok_or(("event_url", "Required"))?;
    if answer.get || events.get {
        return Err(("answer_method", "What is asked by GET is not signed, and nobody here asks for that"));
    }
    within("ringing_timer", 60, 120)?;
    let machine_detection = match body["machine_detection"].as_str() {
        None => Detection::Off,
        Some("continue") => Detection::Tell,
        Some("hangup") => Detection::HangUp,
        Some(_) => return Err(("machine_detection", "Must be continue or hangup")),
    };
    Ok(Request {
        to,
        from,
        answer,
        machine_detection,
        time_limit: within("length_timer", 7_200, 86_400)?,
        dialect: Dialect::Vonage(events),
        ..Request::default()
    })
}

/// What a document makes the call do. The error says what is wrong with it.
pub(super) fn read_ncco(document: &str) -> Result<Instructions, String> {
    let document: Value = serde_json::from_str(document).map_err(|error| error.to_string())?;
    let steps = document.as_array().ok_or("an NCCO is a list")?;
    let url_of = |step: &Value| step["eventUrl"][0].as_str().map(str::to_owned);
    let mut read = Instructions { recording: None, socket: None, then: Then::End };
    for step in steps {
        match step["action"].as_str().unwrap_or_default() {
            "record" => {
                let method = step["eventMethod"].as_str().unwrap_or("POST").to_owned();
                read.recording = url_of(step).map(|url| (url, method));
            }
            "connect" => {
                let endpoint = &step["endpoint"][0];
                if endpoint["type"] == "websocket" {
                    let uri = endpoint["uri"].as_str().unwrap_or_default();
                    let kind = endpoint["content-type"].as_str().unwrap_or_default();
                    if !(uri.starts_with("wss://") || uri.starts_with("ws://")) || !SOCKET_TYPES.contains(&kind) {
                        return Err(format!("no websocket: {endpoint}"));
                    }
                    read.socket = url_of(step).map(|url| (url, uri.to_owned()));
                } else if endpoint["type"] != "phone" {
                    return Err(format!("nothing that is connected with: {endpoint}"));
                }
                read.then = Then::Talk;
                return Ok(read);
            }
            "conversation" => {
                read.then = Then::Talk;
                return Ok(read);
            }
            "talk" | "stream" | "input" | "notify" | "wait" => {}
            other => return Err(format!("{other:?} is no action of Vonage's")),
        }
    }
    Ok(read)
}

fn time(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::Millis, true)
}

/// How a call ended, and the SIP code where one is told.
fn end_of(cause: Cause, answered: bool) -> (&'static str, Option<u16>) {
    match (answered, cause.cause, cause.code) {
        (true, ..) => ("completed", None),
        (_, "USER_BUSY", _) => ("busy", None),
        (_, "CALL_REJECTED", _) => ("rejected", None),
        (_, "NO_ANSWER", 6010) => ("timeout", None),
        (_, "NO_ANSWER", _) => ("unanswered", None),
        (_, "ORIGINATOR_CANCEL", _) => ("cancelled", None),
        _ => ("failed", Some(404)),
    }
}

fn status(call: &Call) -> &'static str {
    match (call.stage, call.cause) {
        (Stage::Queued, _) => "started",
        (Stage::Ringing, _) => "ringing",
        (Stage::Ended, Some(cause)) => end_of(cause, call.answered_at.is_some()).0,
        _ => "answered",
    }
}

/// The call as it is kept.
fn resource(call: &Call, billing: &Billing) -> Value {
    let ended = call.stage == Stage::Ended;
    let phone = |number: &str| json!({ "type": "phone", "number": number });
    json!({
        "uuid": call.uuid, "conversation_uuid": conversation(call), "direction": "outbound", "status": status(call),
        "to": phone(&call.request.to), "from": phone(&call.request.from), "rate": billing.rate(),
        "price": ended.then(|| billing.cost(call.billed_seconds)), "duration": ended.then(|| call.billed_seconds.to_string()),
        // With its fraction: see the record of Plivo's.
        "start_time": call.created_at.to_rfc3339_opts(SecondsFormat::Micros, true),
        "end_time": call.ended_at.map(|at| at.to_rfc3339_opts(SecondsFormat::Micros, true)), "network": "40445",
    })
}

/// `Authorization` of a webhook: the body is bound by its hash.
pub(super) fn authorization(auth_token: &str, body: &str, at: i64) -> String {
    let secret = |name: &str| api::secret(auth_token, name).unwrap_or_default();
    let part = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let header = part(json!({ "alg": "HS256", "typ": "JWT" }));
    let claims = part(json!({
        "iat": at, "jti": Uuid::new_v4(), "iss": "Vonage", "payload_hash": payload_hash(body), "api_key": secret("api_key"),
        "application_id": secret("application_id"),
    }));
    let text = format!("{header}.{claims}");
    let signature = sign(&secret("signature_secret"), &text);
    format!("Bearer {text}.{signature}")
}

fn payload_hash(body: &str) -> String {
    Sha256::digest(body).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn sign(secret: &str, text: &str) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes())
        .unwrap_or_else(|_| unreachable!("HMAC takes keys of any length"));
    mac.update(text.as_bytes());
    URL_SAFE_NO_PAD.encode(mac.finalize().into_bytes())
}

/// What every request about a call says of it.
fn names(call: &Call) -> Value {
    json!({
        "from": call.request.from, "to": call.request.to, "uuid": call.uuid, "conversation_uuid": conversation(call),
    })
}

/// The request for the document.
pub(super) fn document(world: &World, uuid: Uuid, hook: Hook) -> Option<Callback> {
    let body = world.read(uuid, names)?;
    world.address(uuid, "Answer", hook, Told::Vonage(body.to_string()))
}

/// Tells a step of a call.
pub(super) fn step(world: &Arc<World>, uuid: Uuid, step: &str) {
    let told = world.read(uuid, |call| {
        let Dialect::Vonage(events) = &call.request.dialect else { return None };
        let answered = call.answered_at.is_some();
        let status = match step {
            "initiated" => "started",
            "detected" if call.machine => "machine",
            "detected" => "human",
            "completed" => status(call),
            step => step,
        };
        let mut told = vec![(status, events.clone(), event(call, status, &world.options.billing))];
        if let Some(socket) = &call.socket
            && let Some(status) = match step {
                "connected" => Some("answered"),
                "completed" => Some("completed"),
                _ => None,
            }
        {
            let name = if status == "answered" { "SocketAnswered" } else { "SocketCompleted" };
            told.push((name, socket.hook.clone(), of_socket(call, socket, status)));
        }
        if step == "connected" {
            told.remove(0);
        }
        // After an end without a talk a plain one may follow.
        let again = step == "completed" && !answered && status != "rejected" && call.fate.variant % 3 == 0;
        let again = again.then(|| (events.clone(), event(call, "completed", &world.options.billing)));
        Some((told, again))
    });
    let Some(Some((told, again))) = told else { return };
    for (name, hook, body) in told {
        if let Some(callback) = world.address(uuid, name, hook, Told::Vonage(body.to_string())) {
            callback::send(world, callback);
        }
    }
    if let Some((hook, body)) = again
        && let Some(callback) = world.address(uuid, "completed", hook, Told::Vonage(body.to_string()))
    {
        callback::send_after(world, callback, ONCE_MORE);
    }
}

fn event(call: &Call, status: &str, billing: &Billing) -> Value {
    let mut body = names(call);
    body["direction"] = json!("outbound");
    body["status"] = json!(status);
    body["timestamp"] = json!(time(call.ended_at.unwrap_or_else(Utc::now)));
    if status == "answered" {
        body["start_time"] = json!(call.answered_at.map(time));
    }
    if status == "completed" {
        body["start_time"] = json!(call.answered_at.map(time));
        body["end_time"] = json!(call.ended_at.map(time));
        body["duration"] = json!(call.billed_seconds.to_string());
        body["price"] = json!(billing.cost(call.billed_seconds));
        body["rate"] = json!(billing.rate());
        body["network"] = json!("40445");
    }
    if let Some(code) = call.cause.and_then(|cause| end_of(cause, call.answered_at.is_some()).1) {
        body["sip_code"] = json!(code);
    }
    body
}

/// The websocket is a leg of its own.
fn of_socket(call: &Call, socket: &Socket, status: &str) -> Value {
    json!({
        "from": call.request.from, "to": socket.uri, "uuid": socket.id, "conversation_uuid": conversation(call),
        "status": status, "direction": "outbound", "timestamp": time(Utc::now()),
    })
}

/// Tells of the recording, which names the conversation and not the call.
pub(super) fn recorded(world: &Arc<World>, uuid: Uuid, hook: Hook) {
    let body = world.read(uuid, |call| {
        let end = call.ended_at.unwrap_or(call.created_at);
        let id = Uuid::new_v4();
        json!({
            "start_time": time(end - TimeDelta::seconds(call.talk_seconds.into())), "end_time": time(end),
            "recording_url": format!("{}v1/files/{id}", world.url), "recording_uuid": id, "size": 12_228,
            "conversation_uuid": conversation(call), "timestamp": time(Utc::now()),
        })
    });
    let Some(body) = body else { return };
    if let Some(callback) = world.address(uuid, "Recording", hook, Told::Vonage(body.to_string())) {
        callback::send(world, callback);
    }
}

async fn recording(State(world): State<Arc<World>>, Path(_): Path<String>, headers: HeaderMap) -> Response {
    match authenticate(&world, &headers) {
        Ok(_) => sound::response(),
        Err(response) => *response,
    }
}

/// An application's calls from a time on.
async fn list(State(world): State<Arc<World>>, Query(query): Query<Params>, headers: HeaderMap) -> Response {
    let account = match authenticate(&world, &headers) {
        Ok(account) => account,
        Err(response) => return *response,
    };
    let bound = |name: &'static str| match query.get(name).map(|text| text.parse::<DateTime<Utc>>()) {
        None => Ok(None),
        Some(Ok(at)) => Ok(Some(at)),
        Some(Err(_)) => Err(Box::new(error(StatusCode::BAD_REQUEST, "Bad Request", Some((name, "Must be a time"))))),
    };
    let (since, until) = match (bound("date_start"), bound("date_end")) {
        (Ok(since), Ok(until)) => (since, until),
        (Err(response), _) | (_, Err(response)) => return *response,
    };
    let number = |name: &str, or: usize| query.get(name).and_then(|text| text.parse().ok()).unwrap_or(or);
    let (index, size) = (number("record_index", 0), number("page_size", PAGE).clamp(1, MOST));
    let book = world.book();
    let mut calls: Vec<&Call> = book
        .calls
        .iter()
        .filter(|call| call.auth_id == account.auth_id)
        .filter(|call| since.is_none_or(|since| call.created_at >= since))
        .filter(|call| until.is_none_or(|until| call.created_at <= until))
        .collect();
    if query.get("order").map(String::as_str) == Some("desc") {
        calls.reverse();
    }
    let shown: Vec<Value> =
        calls.iter().skip(index).take(size).map(|call| resource(call, &world.options.billing)).collect();
    Json(json!({
        "count": calls.len(), "page_size": size, "record_index": index, "_embedded": { "calls": shown },
        "_links": { "self": { "href": "/v1/calls" } },
    }))
    .into_response()
}

async fn one(State(world): State<Arc<World>>, Path(call): Path<String>, headers: HeaderMap) -> Response {
    let account = match authenticate(&world, &headers) {
        Ok(account) => account,
        Err(response) => return *response,
    };
    let book = world.book();
    let call = call.parse().ok().and_then(|uuid| book.get(uuid)).filter(|call| call.auth_id == account.auth_id);
    call.map_or_else(not_found, |call| Json(resource(call, &world.options.billing)).into_response())
}

/// Ends a call.
async fn change(
    State(world): State<Arc<World>>,
    Path(call): Path<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let account = match authenticate(&world, &headers) {
        Ok(account) => account,
        Err(response) => return *response,
    };
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    if body["action"] != "hangup" {
        return error(StatusCode::BAD_REQUEST, "Bad Request", Some(("action", "Must be hangup")));
    }
    let book = world.book();
    let call = call.parse().ok().and_then(|uuid| book.get(uuid)).filter(|call| call.auth_id == account.auth_id);
    match call.filter(|call| call.stage != Stage::Ended) {
        Some(call) => {
            call.hang_up.notify_one();
            StatusCode::NO_CONTENT.into_response()
        }
        None => not_found(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signs_as_the_official_sdks_expect() {
        let vectors: Vec<Value> = serde_json::from_str(include_str!("../../../tests/vectors/vonage.json")).unwrap();
        let mut judged = 0;
        for vector in vectors.iter().filter(|vector| vector["valid"] == true) {
            let token = vector["headers"]["Authorization"].as_str().unwrap().strip_prefix("Bearer ").unwrap();
            let (text, theirs) = token.rsplit_once('.').unwrap();
            assert_eq!(sign(vector["secret"].as_str().unwrap(), text), theirs, "{}", vector["id"]);
            let claims = URL_SAFE_NO_PAD.decode(text.split_once('.').unwrap().1).unwrap();
            let claims: Value = serde_json::from_slice(&claims).unwrap();
            assert_eq!(claims["payload_hash"], payload_hash(vector["body"].as_str().unwrap()), "{}", vector["id"]);
            judged += 1;
        }
        assert!(judged >= 2, "only {judged} vectors");
    }

    #[test]
    fn reads_documents_as_strictly_as_vonage() {
        let socket = r#"{"action":"connect","eventUrl":["https://h/stream"],"endpoint":[{"type":"websocket","uri":"wss://v/x","content-type":"audio/l16;rate=16000"}]}"#;
        let read = read_ncco(&format!(r#"[{{"action":"record","eventUrl":["https://h/rec"]}},{socket}]"#)).unwrap();
        assert_eq!(read.recording, Some(("https://h/rec".to_owned(), "POST".to_owned())));
        assert_eq!(read.socket, Some(("https://h/stream".to_owned(), "wss://v/x".to_owned())));
        assert_eq!(read.then, Then::Talk);
        assert_eq!(read_ncco("[]").unwrap().then, Then::End);
        assert_eq!(read_ncco(r#"[{"action":"talk","text":"Bye"}]"#).unwrap().then, Then::End);
        for wrong in [
            "",
            "{}",
            "<Response/>",
            r#"[{"action":"hangup"}]"#,
            r#"[{"action":"connect"}]"#,
            &format!("[{}]", socket.replace("wss://", "https://")),
            &format!("[{}]", socket.replace("16000", "44100")),
        ] {
            assert!(read_ncco(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn refuses_what_vonage_refuses_and_names_it() {
        let account = Account { auth_id: "app".to_owned(), ..Account::fresh() };
        let good = json!({
            "to": [{ "type": "phone", "number": "14155550100" }], "from": { "type": "phone", "number": "14155550111" },
            "answer_url": ["https://h/a"], "answer_method": "POST", "event_url": ["https://h/e"], "event_method": "POST",
        });
        assert!(request(&account, &good).is_ok());
        for (name, value, wrong) in [
            ("to", json!([{ "type": "phone", "number": "+14155550100" }]), "to[0].number"),
            ("to", json!([]), "to"),
            ("from", json!("14155550111"), "from"),
            ("answer_url", json!("https://h/a"), "answer_url"),
            ("answer_method", json!("GET"), "answer_method"),
            ("ringing_timer", json!(121), "ringing_timer"),
            ("machine_detection", json!("perhaps"), "machine_detection"),
        ] {
            let mut body = good.clone();
            body[name] = value;
            let refused = request(&account, &body).map(|_| ()).unwrap_err().0;
            // A text in place of a list is no URL at all.
            assert_eq!(refused, wrong, "{name}");
        }
    }
}
