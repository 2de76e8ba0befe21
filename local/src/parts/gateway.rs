//! The one origin that clients see, as Supabase's API gateway is: `/rest/v1` is PostgREST, `/functions/v1` the functions, and
//! `/storage/v1` a folder.
//!
//! An API key is not a token: where a request carries no token of its own, the key is swapped for a short-lived one of its role, and
//! PostgREST never sees a key.

mod access;
mod storage;

use crate::parts::keys::Keys;
use access::{API_KEY, Access, Refusal, take_api_key};
use anyhow::{Context, Result};
use axum::{
    Router,
    body::Body,
    extract::{ConnectInfo, Path, Request, State},
    response::{IntoResponse, Response},
    routing::{any, get},
};
use bytes::Bytes;
use futures::future::BoxFuture;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use serde_json::{Value, json};
use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
};
use tokio::{net::TcpListener, task::JoinHandle};
use url::Url;

/// Largest body that Lambda takes, in bytes.
const FUNCTION_BODY_LIMIT: usize = 6 * 1024 * 1024;
/// Headers that concern one connection and are not passed on.
const HOP_BY_HOP: [HeaderName; 8] = [
    header::CONNECTION,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    HeaderName::from_static("keep-alive"),
];

/// A request for a function, as it came in.
#[derive(Debug)]
pub struct FunctionRequest {
    /// The function's name, like `webhook-intake`.
    pub function: String,
    /// Method, path and query as sent (`/functions/v1/…` included), headers as sent, body whole.
    pub request: http::Request<Bytes>,
    /// Who sent it.
    pub source_ip: IpAddr,
}

/// Answers requests for functions.
pub type FunctionHandler = Arc<dyn Fn(FunctionRequest) -> BoxFuture<'static, Response> + Send + Sync>;

/// A bound port whose origin is known before anything answers there, since the functions are told the origin as they start.
#[derive(Debug)]
pub struct Listening {
    listener: TcpListener,
    origin: Url,
    storage: Option<PathBuf>,
}

impl Listening {
    /// Binds `port` of 127.0.0.1, or any free one.
    pub async fn bind(port: Option<u16>) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", port.unwrap_or(0)))
            .await
            .with_context(|| format!("cannot listen on port {} of 127.0.0.1", port.unwrap_or(0)))?;
        let origin = Url::parse(&format!("http://{}/", listener.local_addr()?))?;
        Ok(Self { listener, origin, storage: None })
    }

    /// Offers Supabase Storage's endpoints too, with their objects below `folder`.
    pub fn with_storage(self, folder: PathBuf) -> Self {
        Self { storage: Some(folder), ..self }
    }

    /// The origin, with a slash at its end as [`Url`] has it.
    pub fn origin(&self) -> &Url {
        &self.origin
    }

    /// The origin without a slash at its end.
    pub fn origin_text(&self) -> String {
        self.origin.as_str().trim_end_matches('/').to_owned()
    }

    /// Begins to answer. `rest` is PostgREST's root, or that of a proxy in front of it.
    pub fn serve(self, keys: Keys, rest: Url, functions: Option<FunctionHandler>) -> Result<Gateway> {
        let state = Arc::new(Shared {
            client: crate::parts::http_client()?,
            access: Access::new(keys),
            rest,
            functions,
            origin: self.origin_text(),
            objects: self.storage.map(storage::Objects::new),
        });
        let routes = Router::new()
            .route("/", get(index))
            .route("/auth/v1/.well-known/jwks.json", get(key_set))
            .route("/rest/v1", any(forward))
            .route("/rest/v1/", any(forward))
            .route("/rest/v1/{*path}", any(forward))
            .route("/functions/v1/{function}", any(call_function))
            .route("/functions/v1/{function}/", any(call_function))
            .route("/functions/v1/{function}/{*path}", any(call_function_path))
            .merge(storage::routes())
            .fallback(no_route)
            .with_state(state);
        let service = routes.into_make_service_with_connect_info::<SocketAddr>();
        let task = tokio::spawn(async move {
            if let Err(error) = axum::serve(super::without_delay(self.listener), service).await {
                tracing::error!(%error, "the gateway ended");
            }
        });
        Ok(Gateway { task })
    }
}

/// The running gateway.
#[derive(Debug)]
pub struct Gateway {
    task: JoinHandle<()>,
}

impl Gateway {
    /// Stops answering.
    pub async fn stop(self) {
        self.task.abort();
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Shared {
    client: reqwest::Client,
    access: Access,
    rest: Url,
    functions: Option<FunctionHandler>,
    origin: String,
    objects: Option<storage::Objects>,
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let (status, message, hint) = self.words();
        answer(status, json!({ "message": message, "hint": hint }))
    }
}

async fn index(State(shared): State<Arc<Shared>>) -> Response {
    let origin = &shared.origin;
    answer(
        StatusCode::OK,
        json!({
            "name": "trunkline",
            "rest": format!("{origin}/rest/v1"),
            "functions": format!("{origin}/functions/v1"),
            "jwks": format!("{origin}/auth/v1/.well-known/jwks.json"),
        }),
    )
}

async fn key_set(State(shared): State<Arc<Shared>>) -> Response {
    answer(StatusCode::OK, shared.access.keys().public_jwks())
}

async fn no_route() -> Response {
    answer(StatusCode::NOT_FOUND, json!({ "message": "no Route matched with those values" }))
}

async fn forward(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    if parts.method == Method::OPTIONS && parts.headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD) {
        return preflight(&parts.headers);
    }
    let (api_key, query) = take_api_key(&parts.headers, parts.uri.query());
    let authorization = match shared.access.authorization(&parts.headers, api_key.as_deref()) {
        Ok(authorization) => authorization,
        Err(refusal) => return refusal.into_response(),
    };
    let path = parts.uri.path().strip_prefix("/rest/v1").unwrap_or_default().trim_start_matches('/');
    let mut target = shared.rest.clone();
    let base = target.path().trim_end_matches('/').to_owned();
    // Percent-encoding stays as the client had it: `set_path` adds to it only what is missing.
    target.set_path(&format!("{base}/{path}"));
    target.set_query(query.as_deref());

    let mut headers = end_to_end(parts.headers);
    headers.remove(header::HOST);
    headers.remove(API_KEY);
    headers.insert(header::AUTHORIZATION, authorization);
    let mut outgoing = shared.client.request(parts.method, target).headers(headers);
    if !axum::body::HttpBody::is_end_stream(&body) {
        outgoing = outgoing.body(reqwest::Body::wrap_stream(body.into_data_stream()));
    }
    match outgoing.send().await {
        Ok(incoming) => {
            let (mut parts, body) = http::Response::<reqwest::Body>::from(incoming).into_parts();
            parts.headers = end_to_end(parts.headers);
            let mut response = Response::from_parts(parts, Body::new(body));
            allow_any_origin(response.headers_mut());
            response
        }
        Err(error) => {
            tracing::warn!(%error, "PostgREST cannot be reached");
            let mut response = answer(
                StatusCode::SERVICE_UNAVAILABLE,
                json!({
                    "code": "database_unavailable",
                    "message": "The database's API cannot be reached.",
                    "details": null,
                    "hint": "Send the request again in a few seconds.",
                }),
            );
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("5"));
            response
        }
    }
}

async fn call_function(
    state: State<Arc<Shared>>,
    caller: ConnectInfo<SocketAddr>,
    Path(function): Path<String>,
    request: Request,
) -> Response {
    invoke(state.0, caller.0, function, request).await
}

async fn call_function_path(
    state: State<Arc<Shared>>,
    caller: ConnectInfo<SocketAddr>,
    Path((function, _)): Path<(String, String)>,
    request: Request,
) -> Response {
    invoke(state.0, caller.0, function, request).await
}

async fn invoke(shared: Arc<Shared>, caller: SocketAddr, function: String, request: Request) -> Response {
    let Some(handler) = shared.functions.clone() else {
        return no_route().await;
    };
    let (parts, body) = request.into_parts();
    match axum::body::to_bytes(body, FUNCTION_BODY_LIMIT).await {
        Ok(body) => {
            let request = http::Request::from_parts(parts, body);
            handler(FunctionRequest { function, request, source_ip: caller.ip() }).await
        }
        Err(_) => answer(StatusCode::PAYLOAD_TOO_LARGE, json!({ "message": "Request Too Long" })),
    }
}

fn end_to_end(mut headers: HeaderMap) -> HeaderMap {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
    headers
}

/// What Supabase's gateway answers to a browser that asks before it sends.
fn preflight(asked: &HeaderMap) -> Response {
    let mut response = StatusCode::OK.into_response();
    let headers = response.headers_mut();
    allow_any_origin(headers);
    headers.insert(
        header::ACCESS_CONTROL_ALLOW_METHODS,
        HeaderValue::from_static("GET,HEAD,PUT,PATCH,POST,DELETE,OPTIONS,TRACE,CONNECT"),
    );
    if let Some(wanted) = asked.get(header::ACCESS_CONTROL_REQUEST_HEADERS) {
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, wanted.clone());
    }
    headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("3600"));
    response
}

fn allow_any_origin(headers: &mut HeaderMap) {
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    headers.insert(
        header::ACCESS_CONTROL_EXPOSE_HEADERS,
        HeaderValue::from_static(
            "Content-Encoding, Content-Location, Content-Range, Content-Type, Date, Location, Server, Transfer-Encoding, Range-Unit",
        ),
    );
}

fn answer(status: StatusCode, body: Value) -> Response {
    let mut response = (status, axum::Json(body)).into_response();
    allow_any_origin(response.headers_mut());
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_of_one_connection_are_not_passed_on() {
        let sent = [
            (header::CONNECTION, "x-private, close"),
            (HeaderName::from_static("x-private"), "1"),
            (header::TRANSFER_ENCODING, "chunked"),
            (header::ACCEPT, "*/*"),
        ];
        let kept = end_to_end(sent.map(|(name, value)| (name, HeaderValue::from_static(value))).into_iter().collect());
        assert_eq!(kept.keys().collect::<Vec<_>>(), [&header::ACCEPT]);
    }
}
