//! Payment gateways that do as they are told: Stripe and Razorpay as far as we speak with them, each with its own wire form, its own way of
//! knowing a request again, and its own book of the money that moved. They decline, take their time, lose their answer after they did what
//! was asked, and tell it by webhooks that a test delivers as it likes.

mod razorpay;
mod stripe;

use anyhow::{Context, Result};
use axum::{
    Router,
    body::{Body, Bytes},
    extract::State,
    response::{IntoResponse, Response},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use chrono::{DateTime, TimeDelta, Utc};
use http::{HeaderMap, Method, StatusCode, Uri, header};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::{net::TcpListener, task::JoinHandle};
use url::Url;

pub use razorpay::KEY as RAZORPAY_KEY;
pub use stripe::KEY as STRIPE_KEY;

/// Which gateway it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Name {
    /// Forms, idempotency keys, payment intents.
    Stripe,
    /// JSON, orders, links.
    Razorpay,
}

/// What becomes of a charge of a saved method.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Reaction {
    /// It is paid.
    #[default]
    Approve,
    /// It is declined with this code.
    Decline(&'static str),
    /// It is taken and not decided yet: [`Gateway::settle`] decides.
    Slow,
}

/// What becomes of the answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Way {
    /// It arrives.
    #[default]
    Clear,
    /// What was asked is done, and the answer is cut off.
    AnswerLost,
    /// The request is cut off before anything is done.
    RequestLost,
}

/// Money that moved, as the gateway has it in its book.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The gateway's id of the payment or the refund.
    pub id: String,
    /// What for: the invoice that its notes name.
    pub invoice: String,
    /// In the gateway's smallest unit; negative is paid back.
    pub amount: i64,
    /// ISO 4217, upper case.
    pub currency: String,
}

/// A request as it came.
struct Asked {
    method: Method,
    path: Vec<String>,
    query: BTreeMap<String, String>,
    form: BTreeMap<String, String>,
    json: Value,
    headers: HeaderMap,
    body: Bytes,
}

impl Asked {
    fn segments(&self) -> Vec<&str> {
        self.path.iter().map(String::as_str).collect()
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

/// What a gateway knows.
#[derive(Default)]
struct Books {
    counter: u64,
    objects: BTreeMap<&'static str, Vec<Value>>,
    answers: BTreeMap<String, (Bytes, u16, Value)>,
    reactions: BTreeMap<String, VecDeque<Reaction>>,
    ways: VecDeque<Way>,
    entries: Vec<Entry>,
    events: Vec<Value>,
    requests: Vec<String>,
    /// What a real gateway would have refused or fined.
    faults: Vec<String>,
    /// How far business time is ahead.
    ahead: TimeDelta,
}

impl Books {
    fn id(&mut self, prefix: &str) -> String {
        self.counter += 1;
        format!("{prefix}_{:014}", self.counter)
    }

    fn now(&self) -> i64 {
        (Utc::now() + self.ahead).timestamp()
    }

    fn reaction(&mut self, token: &str) -> Reaction {
        self.reactions.get_mut(token).and_then(VecDeque::pop_front).unwrap_or_default()
    }

    fn keep(&mut self, kind: &'static str, object: Value) -> Value {
        self.objects.entry(kind).or_default().push(object.clone());
        object
    }

    fn all(&self, kind: &'static str) -> &[Value] {
        self.objects.get(kind).map(Vec::as_slice).unwrap_or_default()
    }

    fn one(&mut self, kind: &'static str, id: &str) -> Option<&mut Value> {
        self.objects.get_mut(kind)?.iter_mut().find(|object| object["id"] == id)
    }
}

struct Inside {
    name: Name,
    books: Mutex<Books>,
}

impl Inside {
    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running gateway; it ends with this value.
pub struct Gateway {
    /// Where its API is.
    pub url: Url,
    inside: Arc<Inside>,
    server: JoinHandle<()>,
}

impl Gateway {
    /// Starts one.
    pub async fn start(name: Name) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let url = Url::parse(&format!("http://{}", listener.local_addr()?))?;
        let inside = Arc::new(Inside { name, books: Mutex::default() });
        let router = Router::new().fallback(take).with_state(Arc::clone(&inside));
        let server = tokio::spawn(async move {
            let _ended = axum::serve(listener, router).await;
        });
        Ok(Self { url, inside, server })
    }

    /// How the next charges of a saved method end, one after the other; those after them are paid.
    pub fn react(&self, token: &str, reactions: impl IntoIterator<Item = Reaction>) {
        self.inside.books().reactions.entry(token.to_owned()).or_default().extend(reactions);
    }

    /// What becomes of the next requests that change something.
    pub fn lose(&self, ways: impl IntoIterator<Item = Way>) {
        self.inside.books().ways.extend(ways);
    }

    /// Sets the gateway's clock as far ahead as business time is.
    pub fn set_clock(&self, business: DateTime<Utc>) {
        self.inside.books().ahead = business - Utc::now();
    }

    /// Decides what was taken and not decided.
    pub fn settle(&self, reaction: Reaction) {
        let books = &mut *self.inside.books();
        match self.inside.name {
            Name::Stripe => stripe::settle(books, reaction),
            Name::Razorpay => razorpay::settle(books, reaction),
        }
    }

    /// Somebody pays on the page of a link or agrees on that of a mandate.
    pub fn visit(&self, url: &str) -> Result<()> {
        let books = &mut *self.inside.books();
        let done = match self.inside.name {
            Name::Stripe => stripe::visit(books, url),
            Name::Razorpay => razorpay::visit(books, url),
        };
        done.with_context(|| format!("nothing can be done at {url}"))
    }

    /// Its book of the money that moved.
    pub fn entries(&self) -> Vec<Entry> {
        self.inside.books().entries.clone()
    }

    /// What it was asked, as `POST v1/payment_intents`.
    pub fn requests(&self) -> Vec<String> {
        self.inside.books().requests.clone()
    }

    /// What it would not have let pass.
    pub fn faults(&self) -> Vec<String> {
        self.inside.books().faults.clone()
    }

    /// The bodies of its webhooks since the last time.
    pub fn take_events(&self) -> Result<Vec<Vec<u8>>> {
        let events = std::mem::take(&mut self.inside.books().events);
        events.iter().map(|event| Ok(serde_json::to_vec(event)?)).collect()
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.server.abort();
    }
}

fn pairs(text: &[u8]) -> BTreeMap<String, String> {
    form_urlencoded::parse(text).into_owned().collect()
}

async fn take(
    State(inside): State<Arc<Inside>>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let is_json = headers.get(header::CONTENT_TYPE).is_some_and(|kind| kind == "application/json");
    let asked = Asked {
        path: uri.path().split('/').filter(|part| !part.is_empty()).map(str::to_owned).collect(),
        query: pairs(uri.query().unwrap_or_default().as_bytes()),
        form: if is_json { BTreeMap::new() } else { pairs(&body) },
        json: if is_json { serde_json::from_slice(&body).unwrap_or_default() } else { Value::Null },
        method,
        headers,
        body,
    };
    let (user, password) = match inside.name {
        Name::Stripe => (STRIPE_KEY, ""),
        Name::Razorpay => RAZORPAY_KEY,
    };
    let wanted = format!("Basic {}", STANDARD.encode(format!("{user}:{password}")));
    if asked.header("authorization") != Some(&wanted) {
        return answer(401, &json!({ "error": { "code": "BAD_REQUEST_ERROR", "type": "invalid_request_error" } }));
    }
    let is_change = asked.method != Method::GET;
    let wants = if inside.name == Name::Stripe { "application/x-www-form-urlencoded" } else { "application/json" };
    if asked.method == Method::POST && asked.header("content-type") != Some(wants) {
        return answer(415, &json!({ "error": { "code": "BAD_REQUEST_ERROR" } }));
    }
    let (way, status, said) = {
        let books = &mut *inside.books();
        books.requests.push(format!("{} {}", asked.method, asked.path.join("/")));
        let way = if is_change { books.ways.pop_front().unwrap_or_default() } else { Way::Clear };
        if way == Way::RequestLost {
            (way, 500, Value::Null)
        } else {
            let (status, said) = match inside.name {
                Name::Stripe => stripe::handle(books, &asked),
                Name::Razorpay => razorpay::handle(books, &asked),
            };
            (way, status, said)
        }
    };
    if way == Way::Clear {
        return answer(status, &said);
    }
    let cut = futures::stream::once(async { Err::<Bytes, _>(std::io::Error::other("cut off")) });
    (StatusCode::OK, Body::from_stream(cut)).into_response()
}

fn answer(status: u16, body: &Value) -> Response {
    (StatusCode::from_u16(status).unwrap_or_default(), axum::Json(body)).into_response()
}
