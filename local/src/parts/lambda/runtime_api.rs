//! The Lambda Runtime API (version 2018-06-01), one server a process: so the address alone tells who is speaking.

use super::{
    ACCOUNT_ID, InvocationOutcome, PAYLOAD_LIMIT,
    lane::{Invocation, Lane},
};
use anyhow::Result;
use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Path, Request, State},
    http::{HeaderMap, StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde_json::json;
use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};
use tokio::{net::TcpListener, task::JoinHandle, time::Instant};
use uuid::Uuid;

/// Why a process that asked must not be given an event.
const CLOSED: &str = "this sandbox is closed";

/// The Runtime API of one process, from its start to its end.
#[derive(Debug)]
pub(super) struct Sandbox {
    state: Arc<SandboxState>,
    server: JoinHandle<()>,
    /// Where the process finds it.
    pub(super) address: SocketAddr,
}

#[derive(Debug)]
struct SandboxState {
    lane: Arc<Lane>,
    arn: String,
    at: Mutex<At>,
}

#[derive(Debug, Default)]
struct At {
    initialised: bool,
    closed: bool,
    in_hand: Option<InHand>,
    init_error: Option<String>,
}

#[derive(Debug)]
struct InHand {
    invocation: Invocation,
    deadline: Instant,
}

/// What a process left behind.
#[derive(Debug)]
pub(super) struct Remains {
    /// The event it had not answered.
    pub(super) in_hand: Option<Invocation>,
    /// Whether it ever asked for an event.
    pub(super) initialised: bool,
    /// What it reported as the reason why it could not start.
    pub(super) init_error: Option<String>,
}

impl Sandbox {
    /// Opens the API for a process of `lane`'s function on a free port of loopback.
    pub(super) async fn open(lane: Arc<Lane>, region: &str) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let arn = format!("arn:aws:lambda:{region}:{ACCOUNT_ID}:function:{}", lane.function.package);
        let state = Arc::new(SandboxState { lane, arn, at: Mutex::default() });
        let router = Router::new()
            .route("/2018-06-01/runtime/invocation/next", get(next))
            .route("/2018-06-01/runtime/invocation/{id}/response", post(response))
            .route("/2018-06-01/runtime/invocation/{id}/error", post(error))
            .route("/2018-06-01/runtime/init/error", post(init_error))
            .with_state(Arc::clone(&state));
        let server = tokio::spawn(async move {
            let _ended = axum::serve(crate::parts::without_delay(listener), router).await;
        });
        Ok(Self { state, server, address })
    }

    /// Whether the process asked for an event yet.
    pub(super) fn initialised(&self) -> bool {
        self.state.at().initialised
    }

    /// The deadline of the event in hand.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.state.at().in_hand.as_ref().map(|in_hand| in_hand.deadline)
    }

    /// Whether the process is late, with its event or, past `init_deadline`, with asking for its first. A late one is given nothing
    /// any more.
    pub(super) fn close_if_overdue(&self, init_deadline: Instant) -> bool {
        let mut at = self.state.at();
        let deadline = at.in_hand.as_ref().map(|in_hand| in_hand.deadline);
        let deadline = deadline.or((!at.initialised).then_some(init_deadline));
        let overdue = deadline.is_some_and(|deadline| Instant::now() >= deadline);
        at.closed |= overdue;
        overdue
    }

    /// Gives the process nothing any more, and tells what it left.
    pub(super) fn close(&self) -> Remains {
        let mut at = self.state.at();
        at.closed = true;
        Remains {
            in_hand: at.in_hand.take().map(|in_hand| in_hand.invocation),
            initialised: at.initialised,
            init_error: at.init_error.take(),
        }
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl SandboxState {
    fn at(&self) -> MutexGuard<'_, At> {
        self.at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The event in hand when it is the one called `id`.
    fn finish(&self, id: &str) -> Option<Invocation> {
        let mut at = self.at();
        let in_hand = at.in_hand.take_if(|in_hand| in_hand.invocation.id == id)?;
        Some(in_hand.invocation)
    }
}

async fn next(State(state): State<Arc<SandboxState>>) -> Response {
    let unanswered = {
        let mut at = state.at();
        at.initialised = true;
        at.in_hand.take()
    };
    if let Some(unanswered) = unanswered {
        unanswered
            .invocation
            .fail("Runtime.Unknown", "the runtime asked for the next event before it answered this one");
    }
    state.lane.is_ready();
    let invocation = state.lane.take().await;
    let timeout = state.lane.function.timeout;
    let mut at = state.at();
    if at.closed {
        drop(at);
        state.lane.give_back(invocation);
        return refused(StatusCode::INTERNAL_SERVER_ERROR, "InternalServerError", CLOSED);
    }
    let deadline_ms = (SystemTime::now() + timeout).duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    let headers = [
        ("content-type", "application/json".to_owned()),
        ("lambda-runtime-aws-request-id", invocation.id.clone()),
        ("lambda-runtime-deadline-ms", deadline_ms.to_string()),
        ("lambda-runtime-invoked-function-arn", state.arn.clone()),
        ("lambda-runtime-trace-id", trace_id()),
    ];
    let payload = invocation.payload.clone();
    at.in_hand = Some(InHand { invocation, deadline: Instant::now() + timeout });
    drop(at);
    (headers, payload).into_response()
}

async fn response(State(state): State<Arc<SandboxState>>, Path(id): Path<String>, request: Request) -> Response {
    match read(request.into_body()).await {
        Some(body) => finish(&state, &id, InvocationOutcome::Response(body)),
        None => {
            let what = format!("Response payload size exceeded maximum allowed payload size ({PAYLOAD_LIMIT} bytes).");
            finish(&state, &id, InvocationOutcome::error("Function.ResponseSizeTooLarge", &what));
            refused(StatusCode::PAYLOAD_TOO_LARGE, "RequestEntityTooLarge", &what)
        }
    }
}

async fn error(
    State(state): State<Arc<SandboxState>>,
    Path(id): Path<String>,
    headers: HeaderMap,
    request: Request,
) -> Response {
    let payload = read(request.into_body()).await.unwrap_or_default();
    finish(&state, &id, InvocationOutcome::FunctionError { error_type: error_type(&headers), payload })
}

async fn init_error(State(state): State<Arc<SandboxState>>, headers: HeaderMap, request: Request) -> Response {
    let payload = read(request.into_body()).await.unwrap_or_default();
    let told = format!("{}: {}", error_type(&headers), String::from_utf8_lossy(&payload));
    state.at().init_error = Some(told);
    accepted()
}

fn finish(state: &SandboxState, id: &str, outcome: InvocationOutcome) -> Response {
    match state.finish(id) {
        Some(invocation) => {
            invocation.answer(outcome);
            accepted()
        }
        None => refused(StatusCode::BAD_REQUEST, "InvalidRequestID", "Invalid request ID"),
    }
}

fn accepted() -> Response {
    let json = [(CONTENT_TYPE, "application/json")];
    (StatusCode::ACCEPTED, json, r#"{"status":"OK"}"#).into_response()
}

fn refused(status: StatusCode, kind: &str, message: &str) -> Response {
    let json = [(CONTENT_TYPE, "application/json")];
    (status, json, json!({ "errorMessage": message, "errorType": kind }).to_string()).into_response()
}

/// The whole body; nothing when it is above Lambda's limit or breaks off.
async fn read(body: Body) -> Option<Bytes> {
    axum::body::to_bytes(body, PAYLOAD_LIMIT).await.ok()
}

fn error_type(headers: &HeaderMap) -> String {
    let named = headers.get("lambda-runtime-function-error-type").and_then(|value| value.to_str().ok());
    named.unwrap_or("Unhandled").to_owned()
}

/// A trace id as X-Ray writes it, not sampled.
pub(super) fn trace_id() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let random = Uuid::new_v4().simple().to_string();
    format!("Root=1-{seconds:08x}-{};Parent={};Sampled=0", &random[..24], &random[16..])
}
