//! The HTTP API in front of the functions: events of payload format 2.0, and answers as API Gateway makes them of what a function
//! returns.

use super::{ACCOUNT_ID, HttpRequest, InvocationOutcome, Invoker, PAYLOAD_LIMIT, runtime_api::trace_id};
use crate::parts::template::Route;
use axum::body::Bytes;
use base64::{Engine, engine::general_purpose::STANDARD};
use chrono::Utc;
use http::{
    HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode,
    header::{CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, COOKIE, HOST, SET_COOKIE, TRANSFER_ENCODING, USER_AGENT},
};
use serde_json::{Map, Value, json};
use std::{collections::BTreeMap, net::IpAddr, time::Duration};
use uuid::Uuid;

/// How long the API waits for a function, whatever the function's own timeout is.
const INTEGRATION_TIMEOUT: Duration = Duration::from_secs(30);
/// The API's id, as in its domain and its events.
const API_ID: &str = "local";

/// The route that a request takes.
pub(super) struct Match<'a> {
    function: &'a str,
    route: &'a Route,
    parameters: BTreeMap<String, String>,
}

impl<'a> Match<'a> {
    /// `route` to `function`, when `request` takes it.
    pub(super) fn of(function: &'a str, route: &'a Route, request: &Request<Bytes>) -> Option<Self> {
        Some(Self { function, route, parameters: path_parameters(route, request)? })
    }
}

/// Answers a request with the function that its route leads to.
pub(super) async fn answer(
    invoker: &Invoker,
    matched: Option<Match<'_>>,
    HttpRequest { request, source_ip }: HttpRequest,
) -> Response<Bytes> {
    let request_id = Uuid::new_v4().simple().to_string();
    let mut response = match matched {
        None => plain(StatusCode::NOT_FOUND, "Not Found"),
        Some(Match { function, route, parameters }) => {
            let event = event(&request, source_ip, route, parameters, &request_id).to_string();
            if event.len() > PAYLOAD_LIMIT {
                plain(StatusCode::PAYLOAD_TOO_LARGE, "Request Entity Too Large")
            } else {
                let invocation = invoker.invoke(function, event.into());
                match tokio::time::timeout(INTEGRATION_TIMEOUT, invocation).await {
                    Ok(InvocationOutcome::Response(body)) => response(&body).unwrap_or_else(|| {
                        tracing::warn!(function, "the function's answer is no HTTP response");
                        plain(StatusCode::INTERNAL_SERVER_ERROR, "Internal Server Error")
                    }),
                    // A function's own timeout is an error like any other; only the API's is told apart.
                    Ok(InvocationOutcome::FunctionError { .. }) => {
                        plain(StatusCode::INTERNAL_SERVER_ERROR, "Internal Server Error")
                    }
                    Ok(InvocationOutcome::Throttled) | Err(_) => {
                        plain(StatusCode::SERVICE_UNAVAILABLE, "Service Unavailable")
                    }
                }
            }
        }
    };
    if let Ok(id) = HeaderValue::try_from(request_id) {
        response.headers_mut().insert("apigw-requestid", id);
    }
    response
}

/// What a route's `{name}` parts stand for in the request's path; nothing when the route is another.
fn path_parameters(route: &Route, request: &Request<Bytes>) -> Option<BTreeMap<String, String>> {
    if route.method != "ANY" && route.method != request.method().as_str() {
        return None;
    }
    let mut parameters = BTreeMap::new();
    let mut rest = request.uri().path().strip_prefix('/')?;
    for part in route.path.strip_prefix('/')?.split('/') {
        let name = part.strip_prefix('{').and_then(|part| part.strip_suffix('}'));
        if let Some(name) = name.and_then(|name| name.strip_suffix('+')) {
            parameters.insert(name.to_owned(), percent_decoded(rest));
            return (!rest.is_empty()).then_some(parameters);
        }
        let (segment, tail) = rest.split_once('/').unwrap_or((rest, ""));
        match name {
            Some(name) if !segment.is_empty() => {
                parameters.insert(name.to_owned(), percent_decoded(segment));
            }
            None if segment == part => {}
            _ => return None,
        }
        rest = tail;
    }
    rest.is_empty().then_some(parameters)
}

/// The event of a request (payload format 2.0).
fn event(
    request: &Request<Bytes>,
    source_ip: IpAddr,
    route: &Route,
    parameters: BTreeMap<String, String>,
    request_id: &str,
) -> Value {
    let path = request.uri().path();
    let query = request.uri().query().unwrap_or_default();
    let text = |name: HeaderName| request.headers().get(name).map(value_text).unwrap_or_default();
    let domain = text(HOST);
    let route_key = format!("{} {}", route.method, route.path);
    let now = Utc::now();
    let mut event = json!({
        "version": "2.0",
        "routeKey": route_key,
        "rawPath": path,
        "rawQueryString": query,
        "headers": headers(request.headers(), source_ip, &domain),
        "requestContext": {
            "accountId": ACCOUNT_ID,
            "apiId": API_ID,
            "domainName": domain,
            "domainPrefix": domain.split(['.', ':']).next().unwrap_or_default(),
            "http": {
                "method": request.method().as_str(),
                "path": path,
                "protocol": "HTTP/1.1",
                "sourceIp": source_ip.to_string(),
                "userAgent": text(USER_AGENT),
            },
            "requestId": request_id,
            "routeKey": route_key,
            "stage": "$default",
            "time": now.format("%d/%b/%Y:%H:%M:%S +0000").to_string(),
            "timeEpoch": now.timestamp_millis(),
        },
        "isBase64Encoded": false,
    });
    let cookies: Vec<_> = request
        .headers()
        .get_all(COOKIE)
        .iter()
        .flat_map(|line| value_text(line).split(';').map(|cookie| cookie.trim().to_owned()).collect::<Vec<_>>())
        .filter(|cookie| !cookie.is_empty())
        .collect();
    if !cookies.is_empty() {
        event["cookies"] = json!(cookies);
    }
    if !query.is_empty() {
        let mut parameters = BTreeMap::<String, String>::new();
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            let joined = parameters.entry(name.into_owned());
            joined.and_modify(|all| *all = format!("{all},{value}")).or_insert_with(|| value.into_owned());
        }
        event["queryStringParameters"] = json!(parameters);
    }
    if !parameters.is_empty() {
        event["pathParameters"] = json!(parameters);
    }
    let body = request.body();
    if !body.is_empty() {
        match std::str::from_utf8(body) {
            Ok(text) if is_text(request.headers()) => event["body"] = json!(text),
            _ => {
                event["body"] = json!(STANDARD.encode(body));
                event["isBase64Encoded"] = json!(true);
            }
        }
    }
    event
}

/// Lower-case names, several values joined with commas, without cookies, with what the API adds.
fn headers(sent: &HeaderMap, source_ip: IpAddr, domain: &str) -> Map<String, Value> {
    let mut headers = Map::new();
    for name in sent.keys().filter(|name| !matches!(**name, COOKIE | CONNECTION | TRANSFER_ENCODING)) {
        let values: Vec<_> = sent.get_all(name).iter().map(value_text).collect();
        headers.insert(name.as_str().to_owned(), json!(values.join(",")));
    }
    let port = domain.rsplit_once(':').map_or("80", |(_, port)| port);
    let forwarded = match headers.get("x-forwarded-for").and_then(Value::as_str) {
        Some(before) => format!("{before}, {source_ip}"),
        None => source_ip.to_string(),
    };
    headers.insert("x-forwarded-for".to_owned(), json!(forwarded));
    headers.entry("x-forwarded-port").or_insert_with(|| json!(port));
    headers.entry("x-forwarded-proto").or_insert_with(|| json!("http"));
    let root = trace_id().split(';').next().unwrap_or_default().to_owned();
    headers.entry("x-amzn-trace-id").or_insert_with(|| json!(root));
    headers
}

/// Whether a body goes into the event as text. AWS documents no list; this is what it was observed to do: a form, an unknown type and
/// no type at all are base64.
fn is_text(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).map(value_text).unwrap_or_default().to_ascii_lowercase();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    kind.starts_with("text/") || matches!(kind, "application/json" | "application/xml" | "application/javascript")
}

/// The HTTP response that a function's answer stands for; nothing when it stands for none.
fn response(answer: &[u8]) -> Option<Response<Bytes>> {
    let value: Value = serde_json::from_slice(answer).ok()?;
    let Some(status) = value.get("statusCode") else {
        // JSON without a status code is the body of a 200.
        let response = Response::builder().header(CONTENT_TYPE, "application/json");
        return response.body(Bytes::copy_from_slice(answer)).ok();
    };
    let status = status.as_u64().or_else(|| status.as_str()?.parse().ok())?;
    let mut response = Response::new(Bytes::new());
    *response.status_mut() = StatusCode::from_u16(u16::try_from(status).ok()?).ok()?;
    let headers = response.headers_mut();
    for (name, value) in value.get("headers").and_then(Value::as_object).into_iter().flatten() {
        headers.insert(HeaderName::try_from(name).ok()?, header_value(value)?);
    }
    for (name, values) in value.get("multiValueHeaders").and_then(Value::as_object).into_iter().flatten() {
        let name = HeaderName::try_from(name).ok()?;
        headers.remove(&name);
        for value in values.as_array()? {
            headers.append(&name, header_value(value)?);
        }
    }
    for cookie in value.get("cookies").and_then(Value::as_array).into_iter().flatten() {
        headers.append(SET_COOKIE, header_value(cookie)?);
    }
    // Of the connection, not of the answer.
    for name in [CONNECTION, CONTENT_LENGTH, TRANSFER_ENCODING] {
        headers.remove(name);
    }
    headers.entry(CONTENT_TYPE).or_insert(HeaderValue::from_static("text/plain;charset=UTF-8"));
    let encoded = value.get("isBase64Encoded").and_then(Value::as_bool).unwrap_or(false);
    *response.body_mut() = match value.get("body") {
        None | Some(Value::Null) => Bytes::new(),
        Some(Value::String(text)) if encoded => STANDARD.decode(text).ok()?.into(),
        Some(Value::String(text)) => text.clone().into(),
        Some(_) => return None,
    };
    Some(response)
}

fn header_value(value: &Value) -> Option<HeaderValue> {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Number(_) | Value::Bool(_) => value.to_string(),
        _ => return None,
    };
    HeaderValue::try_from(text).ok()
}

/// An answer of the API itself.
fn plain(status: StatusCode, message: &str) -> Response<Bytes> {
    let mut response = Response::new(json!({ "message": message }).to_string().into());
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn value_text(value: &HeaderValue) -> String {
    String::from_utf8_lossy(value.as_bytes()).into_owned()
}

fn percent_decoded(text: &str) -> String {
    let mut bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    while let [byte, rest @ ..] = bytes {
        let digits = rest.get(..2).filter(|_| *byte == b'%').and_then(|digits| std::str::from_utf8(digits).ok());
        let escaped = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        out.push(escaped.unwrap_or(*byte));
        bytes = if escaped.is_some() { &rest[2..] } else { rest };
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests;
