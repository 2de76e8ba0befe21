//! A proxy in front of PostgREST that counts what passes, and can be slow, lose answers or let nothing through.

use anyhow::Result;
use axum::{
    Router,
    body::{Body, to_bytes},
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use http::{Method, StatusCode};
use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{net::TcpListener, task::JoinHandle};
use url::Url;

/// Largest body that passes, in bytes.
const BODY_LIMIT: usize = 16 * 1024 * 1024;

/// A request that passed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Its method.
    pub method: Method,
    /// Its path and query, as `/rpc/apply_event`.
    pub target: String,
}

/// What goes wrong on the way.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Trouble {
    /// Nothing.
    #[default]
    None,
    /// Every request is held back for so long.
    Delay(Duration),
    /// The next request for this path reaches PostgREST, and its answer is lost.
    LoseNextAnswer(&'static str),
    /// No request for this path gets through.
    Refuse(&'static str),
    /// Of five requests one passes, one is late, one is cut off before it arrives and one after, and one is met with silence.
    Everything,
}

/// How late a late request is.
const LATE: Duration = Duration::from_millis(300);
/// How long the silence lasts: longer than anybody waits.
const SILENCE: Duration = Duration::from_secs(6);

struct Inside {
    target: Url,
    http: reqwest::Client,
    seen: Mutex<Vec<Seen>>,
    trouble: Mutex<Trouble>,
    troubled: AtomicU64,
}

impl Inside {
    fn seen(&self) -> MutexGuard<'_, Vec<Seen>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn trouble(&self) -> MutexGuard<'_, Trouble> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The running proxy; it ends with this value.
pub struct Proxy {
    /// Where it listens.
    pub url: Url,
    inside: Arc<Inside>,
    server: JoinHandle<()>,
}

impl Proxy {
    /// Starts one in front of `target`.
    pub async fn start(target: Url) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let url = Url::parse(&format!("http://{}/", listener.local_addr()?))?;
        let inside = Arc::new(Inside {
            target,
            http: local::parts::http_client()?,
            seen: Mutex::default(),
            trouble: Mutex::default(),
            troubled: AtomicU64::default(),
        });
        let router = Router::new().fallback(pass).with_state(Arc::clone(&inside));
        let server = tokio::spawn(async move {
            let _ended = axum::serve(local::parts::without_delay(listener), router).await;
        });
        Ok(Self { url, inside, server })
    }

    /// What passed since the last time this was asked.
    pub fn take(&self) -> Vec<Seen> {
        std::mem::take(&mut *self.inside.seen())
    }

    /// The paths of what passed since the last time this or [`Proxy::take`] was asked, in order.
    pub fn take_paths(&self) -> Vec<String> {
        self.take().into_iter().map(|seen| seen.target.split('?').next().unwrap_or_default().to_owned()).collect()
    }

    /// What goes wrong from now on.
    pub fn make(&self, trouble: Trouble) {
        *self.inside.trouble() = trouble;
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn pass(State(inside): State<Arc<Inside>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let target = parts.uri.path_and_query().map(ToString::to_string).unwrap_or_default();
    inside.seen().push(Seen { method: parts.method.clone(), target: target.clone() });
    let path = parts.uri.path().to_owned();
    let trouble = inside.trouble().clone();
    if let Trouble::Delay(delay) = trouble {
        tokio::time::sleep(delay).await;
    }
    let turn = if trouble == Trouble::Everything { inside.troubled.fetch_add(1, Ordering::Relaxed) % 5 } else { 0 };
    match turn {
        1 => tokio::time::sleep(LATE).await,
        2 => return cut_off(),
        4 => {
            tokio::time::sleep(SILENCE).await;
            return cut_off();
        }
        _ => {}
    }
    if matches!(trouble, Trouble::Refuse(refused) if refused == path) {
        return (StatusCode::SERVICE_UNAVAILABLE, "refused on the way").into_response();
    }
    match forward(&inside, parts, body, &target).await {
        Ok(_) if matches!(trouble, Trouble::LoseNextAnswer(lost) if lost == path) => {
            *inside.trouble() = Trouble::None;
            (StatusCode::BAD_GATEWAY, "lost on the way back").into_response()
        }
        Ok(_) if turn == 3 => cut_off(),
        Ok(response) => response,
        // As the gateway of Supabase does when PostgREST is away.
        Err(error) => (StatusCode::SERVICE_UNAVAILABLE, format!("{error:#}")).into_response(),
    }
}

/// An answer that breaks off where its body should begin.
fn cut_off() -> Response {
    let cut = futures::stream::once(async { Err::<axum::body::Bytes, _>(std::io::Error::other("cut off")) });
    Response::new(Body::from_stream(cut))
}

async fn forward(inside: &Inside, parts: http::request::Parts, body: Body, target: &str) -> Result<Response> {
    let mut headers = parts.headers;
    for name in [http::header::HOST, http::header::CONNECTION, http::header::TRANSFER_ENCODING] {
        headers.remove(name);
    }
    let url = inside.target.join(target.trim_start_matches('/'))?;
    let body = to_bytes(body, BODY_LIMIT).await?;
    let answer = inside.http.request(parts.method, url).headers(headers).body(body).send().await?;
    let (parts, body) = http::Response::<reqwest::Body>::from(answer).into_parts();
    Ok(Response::from_parts(parts, Body::new(body)))
}
