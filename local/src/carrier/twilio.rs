//! The same carrier in Twilio's words: its Calls API, its callbacks, and their signature.
//!
//! Calls are played alike whoever asked for them; here is what differs in how they are asked for and told. Written apart from the
//! adapter in `shared`, so that a mistake in one is not repeated in the other.

use super::{
    Account, World,
    api::{self, Params, Taken, Trouble},
    call::{Billing, Call, Detection, Dialect, Hook, Progress, Request, Stage},
    cause::Cause,
    signature::Pairs,
    sound,
};
use axum::{
    Json, Router,
    body::Bytes,
    extract::{Path, Query, State},
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
    routing::get,
};
use base64::{Engine, engine::general_purpose::STANDARD};
use chrono::{DateTime, Utc};
use hmac::{Hmac, KeyInit, Mac};
use serde_json::{Value, json};
use sha1::Sha1;
use std::sync::Arc;
use url::Url;
use uuid::Uuid;

/// Results a page, unless asked otherwise.
const PAGE: usize = 50;
const MOST: usize = 1_000;

pub(super) fn router() -> Router<Arc<World>> {
    Router::new()
        .route("/2010-04-01/Accounts/{auth_id}/Calls.json", get(list).post(create))
        .route("/2010-04-01/Accounts/{auth_id}/Calls/{file}", get(one).post(change))
        .route("/2010-04-01/Accounts/{auth_id}/Recordings/{file}", get(sound::recording))
}

/// An error as Twilio writes it.
fn error(status: StatusCode, code: u32, message: &str) -> Response {
    let more = format!("https://www.twilio.com/docs/errors/{code}");
    (status, Json(json!({ "code": code, "message": message, "more_info": more, "status": status.as_u16() })))
        .into_response()
}

fn not_found() -> Response {
    error(StatusCode::NOT_FOUND, 20_404, "The requested resource was not found")
}

fn authenticate(world: &World, auth_id: &str, headers: &HeaderMap) -> Result<Account, Box<Response>> {
    api::authenticate(world, auth_id, headers)
        .map_err(|_| Box::new(error(StatusCode::UNAUTHORIZED, 20_003, "Authenticate")))
}

/// `X-Twilio-Signature`: over the URL as it is dialled, and the pairs of a form in the order of their names.
pub(super) fn signature(auth_token: &str, url: &str, form: &[(String, String)]) -> String {
    let mut form = form.to_vec();
    form.sort();
    form.dedup();
    let mut text = url.to_owned();
    for (name, value) in &form {
        text.push_str(name);
        text.push_str(value);
    }
    let mut mac = Hmac::<Sha1>::new_from_slice(auth_token.as_bytes())
        .unwrap_or_else(|_| unreachable!("HMAC takes keys of any length"));
    mac.update(text.as_bytes());
    STANDARD.encode(mac.finalize().into_bytes())
}

fn sid(call: Uuid) -> String {
    format!("CA{}", call.simple())
}

fn call_of(file: &str) -> Option<Uuid> {
    file.strip_suffix(".json")?.strip_prefix("CA")?.parse().ok()
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
    let form: Pairs = form_urlencoded::parse(&body).into_owned().collect();
    let request = match request(&account, &form) {
        Ok(request) => request,
        Err((code, message)) => return error(StatusCode::BAD_REQUEST, code, message),
    };
    match api::take(&world, &account, request).await {
        Taken::Call(uuid) => {
            let record = world.read(uuid, |call| resource(call, &world.options.billing)).unwrap_or_default();
            (StatusCode::CREATED, Json(record)).into_response()
        }
        Taken::CutOff => api::cut_off(),
        Taken::Trouble(Trouble::Throttle) => error(StatusCode::TOO_MANY_REQUESTS, 20_429, "Too Many Requests"),
        Taken::Trouble(Trouble::Refuse) => {
            error(StatusCode::BAD_REQUEST, 21_215, "Account not authorized to call this number")
        }
        Taken::Trouble(Trouble::Full) => error(StatusCode::BAD_REQUEST, 10_004, "Call concurrency limit exceeded"),
        Taken::Trouble(Trouble::Fail) => {
            error(StatusCode::INTERNAL_SERVER_ERROR, 20_500, "An internal server error has occurred")
        }
    }
}

/// What a create request asks for, or Twilio's code and complaint.
fn request(account: &Account, form: &Pairs) -> Result<Request, (u32, &'static str)> {
    let all = |name: &'static str| {
        form.iter().filter(move |(key, value)| key == name && !value.is_empty()).map(|(_, value)| value.clone())
    };
    let given = |name: &'static str| all(name).next();
    let hook = |name: &'static str| match given(name) {
        None => Ok(None),
        Some(url) if Url::parse(&url).is_ok_and(|url| matches!(url.scheme(), "http" | "https")) => {
            Ok(Some(Hook { url, get: false }))
        }
        Some(_) => Err((21_205, "Url is not valid")),
    };
    let number = |name: &'static str, default: u32, most: u32| match given(name).map(|value| value.parse::<u32>()) {
        None => Ok(default),
        Some(Ok(value)) if (1..=most).contains(&value) => Ok(value),
        Some(_) => Err((20_001, "A parameter is not valid")),
    };
    let is_number = |number: &str| {
        let digits = number.strip_prefix('+').unwrap_or_default();
        (7..=15).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_digit())
    };
    let to = given("To").filter(|to| is_number(to)).ok_or((21_211, "Invalid 'To' Phone Number"))?;
    let from = given("From").filter(|from| is_number(from)).ok_or((21_212, "Invalid 'From' Phone Number"))?;
    if !account.numbers.is_empty() && !account.numbers.contains(&from) {
        return Err((21_210, "'From' phone number not verified"));
    }
    let answer = hook("Url")?.ok_or((21_205, "Url parameter is required"))?;
    let machine_detection = match (given("MachineDetection").as_deref(), hook("AsyncAmdStatusCallback")?) {
        (None, _) => Detection::Off,
        (Some("Enable" | "DetectMessageEnd"), Some(hook)) if given("AsyncAmd").as_deref() == Some("true") => {
            Detection::CallBack(hook)
        }
        (Some("Enable" | "DetectMessageEnd"), _) => Detection::Tell,
        (Some(_), _) => return Err((20_001, "MachineDetection is not valid")),
    };
    // Each step is a parameter of its own; what is none of them is ignored, and the end alone is told where none is left.
    let mut steps: Vec<String> = all("StatusCallbackEvent").filter(|step| STEPS.contains(&step.as_str())).collect();
    if steps.is_empty() {
        steps.push("completed".to_owned());
    }
    number("Timeout", 60, 600)?;
    let record = given("Record").as_deref() == Some("true");
    Ok(Request {
        to,
        from,
        answer,
        fallback: hook("FallbackUrl")?,
        machine_detection,
        time_limit: number("TimeLimit", 14_400, 86_400)?,
        dialect: Dialect::Twilio(Progress {
            callback: hook("StatusCallback")?,
            steps,
            recording: hook("RecordingStatusCallback")?.filter(|_| record),
        }),
        ..Request::default()
    })
}

const STEPS: [&str; 4] = ["initiated", "ringing", "answered", "completed"];

/// Twilio's word for how a call ended, and the SIP code that goes with it.
fn end_of(cause: Cause, answered: bool) -> (&'static str, Option<u16>) {
    match (answered, cause.cause) {
        (true, _) => ("completed", Some(200)),
        (_, "USER_BUSY") => ("busy", Some(486)),
        (_, "CALL_REJECTED") => ("busy", Some(603)),
        (_, "NO_ANSWER") => ("no-answer", Some(487)),
        (_, "ORIGINATOR_CANCEL") => ("canceled", None),
        _ => ("failed", Some(404)),
    }
}

fn status(call: &Call) -> &'static str {
    match (call.stage, call.cause) {
        (Stage::Queued, _) => "queued",
        (Stage::Ringing, _) => "ringing",
        (Stage::Ended, Some(cause)) => end_of(cause, call.answered_at.is_some()).0,
        _ => "in-progress",
    }
}

/// The Call resource.
fn resource(call: &Call, billing: &Billing) -> Value {
    let time = |at: DateTime<Utc>| at.to_rfc2822();
    let ended = call.stage == Stage::Ended;
    json!({
        "account_sid": call.auth_id, "answered_by": call.machine.then_some("machine_start"), "api_version": "2010-04-01",
        "date_created": time(call.created_at), "date_updated": time(call.ended_at.unwrap_or(call.created_at)),
        "direction": "outbound-api", "duration": ended.then(|| call.talk_seconds.to_string()),
        "end_time": call.ended_at.map(time), "from": call.request.from, "parent_call_sid": null,
        "price": ended.then(|| format!("-{}", billing.cost(call.billed_seconds))), "price_unit": "USD",
        "queue_time": "0", "sid": sid(call.uuid), "start_time": call.answered_at.or(call.ended_at).map(time),
        "status": status(call), "to": call.request.to,
        "uri": format!("/2010-04-01/Accounts/{}/Calls/{}.json", call.auth_id, sid(call.uuid)),
    })
}

/// What every callback of a call says about it.
pub(super) fn common_params(call: &Call) -> Pairs {
    [
        ("AccountSid", call.auth_id.as_str()),
        ("ApiVersion", "2010-04-01"),
        ("CallSid", &sid(call.uuid)),
        ("Called", &call.request.to),
        ("Caller", &call.request.from),
        ("Direction", "outbound-api"),
        ("From", &call.request.from),
        ("To", &call.request.to),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into()
}

/// What a step of a call adds.
pub(super) fn step_params(call: &Call, step: &str) -> Vec<(&'static str, String)> {
    let sequence = STEPS.iter().position(|known| *known == step).unwrap_or_default();
    let status = match step {
        "answered" => "in-progress",
        "completed" => status(call),
        step => step,
    };
    let mut params = vec![
        ("CallStatus", status.to_owned()),
        ("CallbackSource", "call-progress-events".to_owned()),
        ("SequenceNumber", sequence.to_string()),
        ("Timestamp", call.ended_at.unwrap_or_else(Utc::now).to_rfc2822()),
    ];
    if step == "completed" {
        params.push(("CallDuration", call.talk_seconds.to_string()));
        params.push(("Duration", call.billed_seconds.div_ceil(60).to_string()));
        if let Some(code) = call.cause.and_then(|cause| end_of(cause, call.answered_at.is_some()).1) {
            params.push(("SipResponseCode", code.to_string()));
        }
    }
    params
}

/// What the callback of a recording adds; without the form of the file, as Twilio has it.
pub(super) fn recording_params(call: &Call, origin: &Url) -> Vec<(&'static str, String)> {
    let id = format!("RE{}", Uuid::new_v4().simple());
    vec![
        ("RecordingUrl", format!("{origin}2010-04-01/Accounts/{}/Recordings/{id}", call.auth_id)),
        ("RecordingSid", id),
        ("RecordingStatus", "completed".to_owned()),
        ("RecordingDuration", call.talk_seconds.to_string()),
        ("RecordingChannels", "2".to_owned()),
        ("RecordingSource", "OutboundAPI".to_owned()),
        ("RecordingStartTime", call.answered_at.unwrap_or(call.created_at).to_rfc2822()),
    ]
}

/// An account's calls, the newest first.
async fn list(
    State(world): State<Arc<World>>,
    Path(auth_id): Path<String>,
    Query(query): Query<Params>,
    headers: HeaderMap,
) -> Response {
    if let Err(response) = authenticate(&world, &auth_id, &headers) {
        return *response;
    }
    let number = |name: &str, default: usize| query.get(name).and_then(|value| value.parse().ok()).unwrap_or(default);
    let (size, page) = (number("PageSize", PAGE).clamp(1, MOST), number("Page", 0));
    let asked = |name: &str, value: &str| query.get(name).is_none_or(|wanted| wanted == value);
    let book = world.book();
    let mut calls =
        book.calls.iter().rev().filter(|call| {
            call.auth_id == auth_id && asked("To", &call.request.to) && asked("From", &call.request.from)
        });
    let found: Vec<Value> =
        calls.by_ref().skip(page * size).take(size).map(|call| resource(call, &world.options.billing)).collect();
    let next =
        calls.next().map(|_| format!("/2010-04-01/Accounts/{auth_id}/Calls.json?PageSize={size}&Page={}", page + 1));
    Json(json!({ "calls": found, "page": page, "page_size": size, "next_page_uri": next })).into_response()
}

async fn one(
    State(world): State<Arc<World>>,
    Path((auth_id, file)): Path<(String, String)>,
    headers: HeaderMap,
) -> Response {
    if let Err(response) = authenticate(&world, &auth_id, &headers) {
        return *response;
    }
    let book = world.book();
    let call = call_of(&file).and_then(|uuid| book.get(uuid)).filter(|call| call.auth_id == auth_id);
    call.map_or_else(not_found, |call| Json(resource(call, &world.options.billing)).into_response())
}

/// Ends a call.
async fn change(
    State(world): State<Arc<World>>,
    Path((auth_id, file)): Path<(String, String)>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    if let Err(response) = authenticate(&world, &auth_id, &headers) {
        return *response;
    }
    let wanted = form_urlencoded::parse(&body).find(|(name, _)| name == "Status").map(|(_, value)| value.into_owned());
    let book = world.book();
    let Some(call) = call_of(&file).and_then(|uuid| book.get(uuid)).filter(|call| call.auth_id == auth_id) else {
        return not_found();
    };
    if call.stage == Stage::Ended || !matches!(wanted.as_deref(), Some("completed" | "canceled")) {
        return error(StatusCode::BAD_REQUEST, 21_220, "Call is not in-progress. Cannot redirect.");
    }
    call.hang_up.notify_one();
    Json(resource(call, &world.options.billing)).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use std::collections::BTreeMap;

    #[derive(Deserialize)]
    struct Vector {
        id: String,
        url: String,
        method: String,
        headers: BTreeMap<String, String>,
        body: String,
        secret: String,
        valid: bool,
    }

    #[test]
    fn signs_as_the_official_sdks_do() {
        let vectors: Vec<Value> = serde_json::from_str(include_str!("../../../tests/vectors/twilio.json")).unwrap();
        let mut judged = 0;
        for vector in vectors.into_iter().filter_map(|vector| serde_json::from_value::<Vector>(vector).ok()) {
            let theirs = vector.headers.get("X-Twilio-Signature");
            let is_form = vector.headers.values().any(|value| value.contains("x-www-form-urlencoded"));
            let (Some(theirs), true, "POST", true) = (theirs, is_form, vector.method.as_str(), vector.valid) else {
                continue;
            };
            let form: Pairs = form_urlencoded::parse(vector.body.as_bytes()).into_owned().collect();
            // Of a URL with a port Twilio signs either form; settings name another key.
            if vector.headers.len() > 2 || vector.id.contains("port") {
                continue;
            }
            assert_eq!(&signature(&vector.secret, &vector.url, &form), theirs, "{}", vector.id);
            judged += 1;
        }
        assert!(judged >= 3, "only {judged} vectors");
    }

    #[test]
    fn steps_in_one_parameter_are_none() {
        let account = Account { auth_id: "AC1".to_owned(), ..Account::fresh() };
        let form = |steps: &[&str]| {
            let mut form: Pairs = [
                ("To", "+14155550100"),
                ("From", "+14155550111"),
                ("Url", "http://h/"),
                ("StatusCallback", "http://h/"),
            ]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into();
            form.extend(steps.iter().map(|step| ("StatusCallbackEvent".to_owned(), (*step).to_owned())));
            let Dialect::Twilio(progress) = request(&account, &form).unwrap().dialect else { panic!() };
            progress.steps
        };
        assert_eq!(form(&["initiated", "ringing"]), ["initiated", "ringing"]);
        assert_eq!(form(&["initiated ringing"]), ["completed"]);
    }
}
