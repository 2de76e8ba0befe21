//! Requests as API Gateway's HTTP API (payload 2.0) and function URLs bring them, and answers as Supabase's edge functions give them.

use crate::{Error, Result};
use aws_lambda_events::apigw::{ApiGatewayV2httpRequest, ApiGatewayV2httpResponse};
use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use lambda_http::Body;
use serde::{Serialize, de::DeserializeOwned};
use std::collections::BTreeMap;

/// A request, with path and query exactly as the client sent them: signatures are made over those.
#[derive(Debug, Clone)]
pub struct Request {
    /// The method.
    pub method: Method,
    /// The raw path, percent-encoded as received, as `/functions/v1/webhook-intake/plivo/ring/…`.
    pub path: String,
    /// The raw query without the question mark; empty when there is none.
    pub query: String,
    /// The headers, looked up case-insensitively.
    pub headers: HeaderMap,
    /// The body as it was sent, base64 undone.
    pub body: Bytes,
}

/// An answer.
pub type Response = http::Response<Body>;

impl Request {
    /// Reads an HTTP API v2 or function-URL event. Error 400 for a body that is not what its base64 flag says.
    pub fn from_event(event: ApiGatewayV2httpRequest) -> Result<Self> {
        let body = event.body.unwrap_or_default();
        let body = if event.is_base64_encoded {
            STANDARD.decode(body).map_err(|_| Error::malformed("body", "the body is not base64"))?.into()
        } else {
            Bytes::from(body)
        };
        Ok(Self {
            method: event.request_context.http.method,
            path: event.raw_path.unwrap_or_default(),
            query: event.raw_query_string.unwrap_or_default(),
            headers: event.headers,
            body,
        })
    }

    /// The path's segments below `/functions/v1/<function>`; the path itself when it is not below it.
    pub fn segments(&self) -> Vec<&str> {
        let below = self
            .path
            .strip_prefix("/functions/v1/")
            .and_then(|rest| rest.split_once('/').map(|(_, below)| below))
            .unwrap_or_else(|| self.path.trim_start_matches('/'));
        below.split('/').filter(|segment| !segment.is_empty()).collect()
    }

    /// A header as text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// The caller's JWT. Error 401 where there is none, or a project key stands in its place.
    pub fn user_jwt(&self) -> Result<&str> {
        self.header("authorization")
            .and_then(|value| value.strip_prefix("Bearer ").or_else(|| value.strip_prefix("bearer ")))
            .map(str::trim)
            .filter(|token| !token.is_empty() && !token.starts_with("sb_"))
            .ok_or_else(|| Error::unauthorized("sign in first: this route needs a user's JWT").at("authorization"))
    }

    /// Refuses a body over `limit` bytes with 413.
    pub fn bounded(&self, limit: usize) -> Result<&Self> {
        if self.body.len() > limit { Err(Error::too_large(limit)) } else { Ok(self) }
    }

    /// The body as JSON; an empty one reads as `{}`. Error 400 that says where it goes wrong.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T> {
        let body: &[u8] = if self.body.is_empty() { b"{}" } else { &self.body };
        Ok(serde_json::from_slice(body)?)
    }

    /// The pairs of a form body in the order they came: blank values, duplicates and white space kept, `+` read as a space.
    pub fn form(&self) -> Vec<(String, String)> {
        form_urlencoded::parse(&self.body).into_owned().collect()
    }

    /// The pairs of the query in the order they came.
    pub fn query_pairs(&self) -> Vec<(String, String)> {
        form_urlencoded::parse(self.query.as_bytes()).into_owned().collect()
    }
}

/// 200 with a JSON body.
pub fn json(value: &impl Serialize) -> Result<Response> {
    json_with(StatusCode::OK, value)
}

/// A JSON body under `status`.
pub fn json_with(status: StatusCode, value: &impl Serialize) -> Result<Response> {
    let body =
        serde_json::to_string(value).map_err(|error| Error::internal(format!("the answer is no JSON: {error}")))?;
    text(status, "application/json; charset=utf-8", body)
}

/// A text body of `content_type` under `status`.
pub fn text(status: StatusCode, content_type: &'static str, body: impl Into<String>) -> Result<Response> {
    let mut response = Response::new(Body::Text(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    Ok(response)
}

/// An error as its answer.
pub fn error(error: &Error) -> Response {
    let mut response = Response::new(Body::Text(error.body().to_string()));
    *response.status_mut() = error.status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json; charset=utf-8"));
    if let Some(seconds) = error.retry_after_seconds {
        headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

/// What a browser's preflight is told, and what stands on every answer: the same as Supabase's edge functions.
pub fn allow_any_origin(response: &mut Response) {
    let headers = response.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    headers.insert(
        header::ACCESS_CONTROL_ALLOW_HEADERS,
        HeaderValue::from_static("authorization, x-client-info, apikey, content-type, x-api-key, idempotency-key"),
    );
    headers.insert(
        header::ACCESS_CONTROL_ALLOW_METHODS,
        HeaderValue::from_static("GET, POST, PUT, PATCH, DELETE, OPTIONS"),
    );
}

/// The answer to a browser's preflight.
pub fn preflight() -> Response {
    let mut response = Response::new(Body::Empty);
    *response.status_mut() = StatusCode::NO_CONTENT;
    response.headers_mut().insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("86400"));
    response
}

/// Turns an answer into what API Gateway takes.
pub fn to_event(response: Response) -> ApiGatewayV2httpResponse {
    let (parts, body) = response.into_parts();
    let mut answer = ApiGatewayV2httpResponse::default();
    answer.status_code = i64::from(parts.status.as_u16());
    answer.headers = parts.headers;
    match body {
        Body::Binary(bytes) => {
            answer.body = Some(Body::Text(STANDARD.encode(bytes)));
            answer.is_base64_encoded = true;
        }
        other => answer.body = Some(other),
    }
    answer
}

/// The headers that a stored event keeps: none that carries a credential.
pub fn storable_headers(headers: &HeaderMap) -> BTreeMap<String, String> {
    const KEPT: [&str; 14] = [
        "content-type",
        "user-agent",
        "x-plivo-signature-v3-nonce",
        "webhook-id",
        "webhook-timestamp",
        "i-twilio-idempotency-token",
        "x-shopify-webhook-id",
        "x-shopify-topic",
        "x-shopify-shop-domain",
        "x-shopify-event-id",
        "x-shopify-api-version",
        "x-wc-webhook-topic",
        "x-wc-webhook-delivery-id",
        "x-razorpay-event-id",
    ];
    KEPT.iter().filter_map(|name| Some(((*name).to_owned(), headers.get(*name)?.to_str().ok()?.to_owned()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(path: &str, headers: &[(&'static str, &str)], body: &[u8]) -> Request {
        Request {
            method: Method::POST,
            path: path.to_owned(),
            query: String::new(),
            headers: headers.iter().map(|(k, v)| (http::HeaderName::from_static(k), v.parse().unwrap())).collect(),
            body: Bytes::copy_from_slice(body),
        }
    }

    #[test]
    fn segments_are_those_below_the_function() {
        let segments = |path| request(path, &[], b"").segments().join("|");
        assert_eq!(segments("/functions/v1/call-dispatch/campaigns/x/start"), "campaigns|x|start");
        assert_eq!(segments("/functions/v1/call-dispatch"), "functions|v1|call-dispatch");
        assert_eq!(segments("/functions/v1/usage-metering/usage"), "usage");
    }

    #[test]
    fn a_project_key_is_not_a_user() {
        let jwt = |value: &str| request("/", &[("authorization", value)], b"").user_jwt().map(str::to_owned);
        assert_eq!(jwt("Bearer a.b.c").unwrap(), "a.b.c");
        for bad in ["Bearer sb_publishable_x", "Bearer ", "Basic x"] {
            assert_eq!(jwt(bad).unwrap_err().status, StatusCode::UNAUTHORIZED, "{bad}");
        }
    }

    #[test]
    fn a_form_keeps_blanks_duplicates_and_spaces() {
        let form = request("/", &[], b"a=&a=1&b=x+y%20&c").form();
        let pairs: Vec<_> = form.iter().map(|(k, v)| format!("{k}={v}")).collect();
        assert_eq!(pairs, ["a=", "a=1", "b=x y ", "c="]);
    }

    #[test]
    fn an_event_s_base64_body_is_decoded_and_its_query_left_alone() {
        let event: ApiGatewayV2httpRequest = serde_json::from_value(serde_json::json!({
            "version": "2.0", "routeKey": "ANY /{proxy+}", "rawPath": "/functions/v1/f/a%20b", "rawQueryString": "x=%2B&a=1",
            "headers": {"content-type": "application/x-www-form-urlencoded"},
            "requestContext": {"http": {"method": "POST", "path": "/f", "protocol": "HTTP/1.1", "sourceIp": "1.1.1.1", "userAgent": "u"}, "stage": "$default", "timeEpoch": 0},
            "body": "YT0x", "isBase64Encoded": true
        }))
        .unwrap();
        let request = Request::from_event(event).unwrap();
        assert_eq!((&request.body[..], request.query.as_str()), (&b"a=1"[..], "x=%2B&a=1"));
        assert_eq!(request.path, "/functions/v1/f/a%20b");
    }
}
