//! A host that keeps recordings, and does with each what its name says.

use anyhow::Result;
use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Path, State},
    response::{IntoResponse, Response},
    routing::get,
};
use futures::StreamExt;
use http::{HeaderMap, StatusCode, header};
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{net::TcpListener, task::JoinHandle};
use url::Url;

/// What was asked for, and under whose name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// The recording.
    pub name: String,
    /// `Authorization`, as it came.
    pub authorization: Option<String>,
}

#[derive(Default)]
struct Inside {
    asked: Mutex<Vec<Asked>>,
    onward: Mutex<Option<String>>,
}

/// The running host; it ends with this value.
pub struct MediaHost {
    /// Its root.
    pub url: Url,
    inside: Arc<Inside>,
    server: JoinHandle<()>,
}

/// Seconds of silence in a recording.
pub const SECONDS: u32 = 3;

impl MediaHost {
    /// Starts one.
    pub async fn start() -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let url = Url::parse(&format!("http://{}/", listener.local_addr()?))?;
        let inside = Arc::new(Inside::default());
        let router = Router::new().route("/{name}", get(recording)).with_state(Arc::clone(&inside));
        let server = tokio::spawn(async move {
            let _ended = axum::serve(listener, router).await;
        });
        Ok(Self { url, inside, server })
    }

    /// The URL of a recording: `good`, `page`, `gone`, `empty`, `broken`, `huge`, or `moved`.
    pub fn recording(&self, name: &str) -> String {
        format!("{}{name}.mp3", self.url)
    }

    /// Where `moved` is now.
    pub fn move_to(&self, url: &str) {
        *self.inside.onward.lock().unwrap_or_else(PoisonError::into_inner) = Some(url.to_owned());
    }

    /// What it was asked for since the last time.
    pub fn take(&self) -> Vec<Asked> {
        std::mem::take(&mut self.inside.asked.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for MediaHost {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn recording(State(inside): State<Arc<Inside>>, Path(file): Path<String>, headers: HeaderMap) -> Response {
    let name = file.trim_end_matches(".mp3").to_owned();
    let authorization = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).map(str::to_owned);
    inside.asked.lock().unwrap_or_else(PoisonError::into_inner).push(Asked { name: name.clone(), authorization });
    let sound = [(header::CONTENT_TYPE, "audio/mpeg")];
    // The beginning arrives, and then nothing more.
    let broken = || {
        let begun = futures::stream::once(async { Ok(Bytes::from(local::carrier::mp3(1))) });
        let cut = futures::stream::once(async {
            tokio::time::sleep(Duration::from_millis(200)).await;
            Err(std::io::Error::other("the line is cut"))
        });
        Body::from_stream(begun.chain(cut))
    };
    match name.as_str() {
        "good" => (sound, local::carrier::mp3(SECONDS)).into_response(),
        "page" => ([(header::CONTENT_TYPE, "text/html")], "<p>Sign in</p>").into_response(),
        "empty" => (sound, "").into_response(),
        "broken" => (sound, broken()).into_response(),
        "huge" => (sound, [(header::CONTENT_LENGTH, "300000000")], broken()).into_response(),
        "moved" => {
            let onward = inside.onward.lock().unwrap_or_else(PoisonError::into_inner).clone().unwrap_or_default();
            (StatusCode::FOUND, [(header::LOCATION, onward)]).into_response()
        }
        _ => StatusCode::NOT_FOUND.into_response(),
    }
}
