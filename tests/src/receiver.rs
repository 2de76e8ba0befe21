//! A customer's own system: takes events, and behaves as its path says.

use anyhow::Result;
use axum::{
    Router,
    body::Bytes,
    extract::{Path, State},
    response::{IntoResponse, Response},
    routing::post,
};
use http::{HeaderMap, StatusCode, header};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use tokio::{net::TcpListener, task::JoinHandle};

/// Longer than any test's patience.
const NEVER: Duration = Duration::from_secs(3_600);

/// What came in at one path.
#[derive(Debug, Clone)]
pub struct Received {
    /// The path's last segment.
    pub name: String,
    /// The request's headers.
    pub headers: BTreeMap<String, String>,
    /// Its body as it came.
    pub body: String,
    /// When.
    pub at: Instant,
}

impl Received {
    /// The event's id, as its header says.
    pub fn id(&self) -> &str {
        self.headers.get("webhook-id").map_or("", String::as_str)
    }

    /// The event.
    pub fn event(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_default()
    }
}

/// What came in, and which events of which path were among it.
#[derive(Default)]
struct Log {
    received: Vec<Received>,
    known: HashSet<(String, String)>,
}

/// A server on loopback. `/<behaviour>-<name>`: `ok`, `hang`, `half` (every other event is refused once), `redirect` (to
/// `/trap`), `busy` (503 with an hour of `Retry-After`), `gone` (410).
pub struct Receiver {
    /// Its address, without a slash at the end.
    pub origin: String,
    all: Arc<Mutex<Log>>,
    task: JoinHandle<()>,
}

impl Receiver {
    /// Starts one.
    pub async fn start() -> Result<Self> {
        let all = Arc::<Mutex<Log>>::default();
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let origin = format!("http://{}", listener.local_addr()?);
        let router = Router::new().route("/{name}", post(take).get(take)).with_state((all.clone(), origin.clone()));
        let task = tokio::spawn(async move {
            let _ended = axum::serve(listener, router).await;
        });
        Ok(Self { origin, all, task })
    }

    /// The address of a path.
    pub fn url(&self, name: &str) -> String {
        format!("{}/{name}", self.origin)
    }

    /// Everything that came in so far, in order.
    pub fn all(&self) -> Vec<Received> {
        lock(&self.all).received.clone()
    }

    /// How many requests came to a path.
    pub fn count(&self, name: &str) -> usize {
        lock(&self.all).received.iter().filter(|received| received.name == name).count()
    }

    /// How many different events came to a path.
    pub fn events(&self, name: &str) -> usize {
        lock(&self.all).known.iter().filter(|(path, _)| path == name).count()
    }

    /// The ids of the events that came to a path.
    pub fn ids(&self, name: &str) -> BTreeSet<String> {
        lock(&self.all)
            .received
            .iter()
            .filter(|received| received.name == name)
            .map(|received| received.id().to_owned())
            .collect()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.task.abort();
    }
}

type Shared = (Arc<Mutex<Log>>, String);

async fn take(
    State((all, origin)): State<Shared>,
    Path(name): Path<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let headers =
        headers.iter().filter_map(|(name, value)| Some((name.to_string(), value.to_str().ok()?.to_owned()))).collect();
    let body = String::from_utf8_lossy(&body).into_owned();
    let received = Received { name: name.clone(), headers, body, at: Instant::now() };
    let (is_new, odd) = {
        let mut all = lock(&all);
        let is_new = all.known.insert((name.clone(), received.id().to_owned()));
        let odd = received.id().bytes().last().is_some_and(|last| last % 2 == 1);
        all.received.push(received);
        (is_new, odd)
    };
    match name.split('-').next().unwrap_or_default() {
        "hang" => {
            tokio::time::sleep(NEVER).await;
            StatusCode::OK.into_response()
        }
        "half" if is_new && odd => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        "redirect" => (StatusCode::TEMPORARY_REDIRECT, [(header::LOCATION, format!("{origin}/trap"))]).into_response(),
        "busy" => (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, "3600")]).into_response(),
        "gone" => StatusCode::GONE.into_response(),
        _ => "thank you".into_response(),
    }
}

fn lock(all: &Mutex<Log>) -> MutexGuard<'_, Log> {
    all.lock().unwrap_or_else(PoisonError::into_inner)
}
