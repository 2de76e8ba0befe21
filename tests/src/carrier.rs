//! A carrier that does as it is told: for a create call it gives the answer that the callee's number asks for, and keeps what it was
//! asked. What callbacks say is up to the test; they are signed by the signer of the simulated carrier, which shares nothing with the
//! verifier under test.

use crate::events::HttpEvent;
use anyhow::{Context, Result};
use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{Path, Query, State},
    response::{IntoResponse, Response},
    routing::get,
};
use http::{HeaderMap, StatusCode, header};
use serde::Deserialize;
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{net::TcpListener, task::JoinHandle};
use url::Url;
use uuid::Uuid;

/// How a create call is answered.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Reaction {
    /// 201 with the call's id.
    #[default]
    Accept,
    /// As [`Reaction::Accept`], after a while.
    AcceptAfter(Duration),
    /// This status and message; nothing is dialled.
    Refuse(u16, &'static str),
    /// 429 with so many seconds.
    Defer(u32),
    /// Dialled, and the answer is cut off.
    CutOff,
}

/// A create call that came in.
#[derive(Debug, Clone, Deserialize)]
pub struct Create {
    /// The call's id at the carrier, given out where the answer says so.
    #[serde(default = "Uuid::new_v4")]
    pub call_uuid: Uuid,
    /// Caller.
    pub from: String,
    /// Callee.
    pub to: String,
    /// Fetched when the call is answered.
    pub answer_url: String,
    /// Told when it rings.
    pub ring_url: String,
    /// Told when it is over.
    pub hangup_url: String,
}

#[derive(Default)]
struct Inside {
    auth_id: String,
    auth_token: String,
    reactions: Mutex<BTreeMap<String, Reaction>>,
    creates: Mutex<Vec<Create>>,
    records: Mutex<Vec<Value>>,
}

impl Inside {
    fn creates(&self) -> MutexGuard<'_, Vec<Create>> {
        self.creates.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The running carrier; it ends with this value.
pub struct CarrierStub {
    /// Where its API is.
    pub url: Url,
    /// The account that it knows.
    pub auth_id: String,
    /// The account's password, which signs its callbacks.
    pub auth_token: String,
    inside: Arc<Inside>,
    server: JoinHandle<()>,
}

impl CarrierStub {
    /// Starts one with an account of its own.
    pub async fn start() -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let url = Url::parse(&format!("http://{}/", listener.local_addr()?))?;
        let account = local::carrier::Account::fresh();
        let inside = Arc::new(Inside {
            auth_id: account.auth_id.clone(),
            auth_token: account.auth_token.clone(),
            ..Inside::default()
        });
        let router = Router::new()
            .route("/v1/Account/{auth_id}/Call/", get(list).post(create))
            .route("/v1/Account/{auth_id}/Call/{call_uuid}/", get(one))
            .with_state(Arc::clone(&inside));
        let server = tokio::spawn(async move {
            let _ended = axum::serve(listener, router).await;
        });
        Ok(Self { url, auth_id: account.auth_id, auth_token: account.auth_token, inside, server })
    }

    /// How calls to a number, with its plus sign, are answered from now on.
    pub fn react(&self, to: &str, reaction: Reaction) {
        self.inside.reactions.lock().unwrap_or_else(PoisonError::into_inner).insert(to.to_owned(), reaction);
    }

    /// The calls it was asked for, those it refused included, in order.
    pub fn creates(&self) -> Vec<Create> {
        self.inside.creates().clone()
    }

    /// Adds to the records of calls that it can be asked for, as Plivo writes them.
    pub fn keep_record(&self, record: Value) {
        self.inside.records.lock().unwrap_or_else(PoisonError::into_inner).push(record);
    }
}

impl Drop for CarrierStub {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// A callback signed with any token. The URL's fragment, with Plivo's retry settings, is not sent.
pub fn signed_callback(auth_token: &str, url: &str, form: &[(&str, &str)]) -> Result<HttpEvent> {
    let form: Vec<(String, String)> =
        form.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let url = Url::parse(url).with_context(|| url.to_owned())?;
    let sent_to = url.as_str().split('#').next().unwrap_or_default();
    let target = sent_to.strip_prefix(&url.origin().ascii_serialization()).unwrap_or_default();
    let mut event = HttpEvent::post(target).form(&form);
    for (name, value) in local::carrier::sign_callback(auth_token, sent_to, &form, &local::carrier::nonce()) {
        event = event.header(name, value);
    }
    Ok(event)
}

async fn create(
    State(inside): State<Arc<Inside>>,
    Path(auth_id): Path<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let credentials =
        reqwest::Client::new().post("http://localhost/").basic_auth(&inside.auth_id, Some(&inside.auth_token)).build();
    let wanted = credentials.ok().and_then(|request| request.headers().get(header::AUTHORIZATION).cloned());
    if auth_id != inside.auth_id || wanted.as_ref() != headers.get(header::AUTHORIZATION) {
        return error(401, "Could not verify your access level for that URL.");
    }
    let Ok(create) = serde_json::from_slice::<Create>(&body) else {
        return error(400, "the request body is not valid JSON");
    };
    let reaction = {
        let reactions = inside.reactions.lock().unwrap_or_else(PoisonError::into_inner);
        reactions.get(&create.to).cloned().unwrap_or_default()
    };
    let call_uuid = create.call_uuid;
    inside.creates().push(create);
    let accepted = json!({ "api_id": Uuid::new_v4(), "message": "call fired", "request_uuid": call_uuid });
    match reaction {
        Reaction::Accept => (StatusCode::CREATED, Json(accepted)).into_response(),
        Reaction::AcceptAfter(delay) => {
            tokio::time::sleep(delay).await;
            (StatusCode::CREATED, Json(accepted)).into_response()
        }
        Reaction::Refuse(status, message) => error(status, message),
        Reaction::Defer(seconds) => {
            let mut response = error(429, "Too many requests, rate limited");
            response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
            response
        }
        Reaction::CutOff => {
            let cut = futures::stream::once(async { Err::<Bytes, _>(std::io::Error::other("cut off")) });
            (StatusCode::CREATED, Body::from_stream(cut)).into_response()
        }
    }
}

/// The records of calls, or of those between two numbers, the newest first and page by page.
async fn list(State(inside): State<Arc<Inside>>, Query(query): Query<BTreeMap<String, String>>) -> Response {
    let records = inside.records.lock().unwrap_or_else(PoisonError::into_inner);
    let asked = |record: &&Value| {
        ["from_number", "to_number"]
            .iter()
            .all(|name| query.get(*name).is_none_or(|number| record[*name] == json!(number)))
    };
    let number = |name: &str, or: usize| query.get(name).and_then(|text| text.parse().ok()).unwrap_or(or);
    let (limit, offset) = (number("limit", 20), number("offset", 0));
    let objects: Vec<&Value> = records.iter().rev().filter(asked).skip(offset).collect();
    let next = (objects.len() > limit).then(|| format!("/v1/Account/A/Call/?limit={limit}&offset={}", offset + limit));
    let objects: Vec<&Value> = objects.into_iter().take(limit).collect();
    let meta = json!({ "limit": limit, "offset": offset, "next": next });
    Json(json!({ "api_id": Uuid::new_v4(), "meta": meta, "objects": objects })).into_response()
}

/// The record of one call; none of them is live.
async fn one(
    State(inside): State<Arc<Inside>>,
    Path((_, call_uuid)): Path<(String, String)>,
    Query(query): Query<BTreeMap<String, String>>,
) -> Response {
    let records = inside.records.lock().unwrap_or_else(PoisonError::into_inner);
    match records.iter().find(|record| record["call_uuid"] == json!(call_uuid)) {
        Some(record) if !query.contains_key("status") => Json(record).into_response(),
        _ => error(404, "call not found"),
    }
}

fn error(status: u16, message: &str) -> Response {
    let status = StatusCode::from_u16(status).unwrap_or_default();
    (status, Json::<Value>(json!({ "api_id": Uuid::new_v4(), "error": message }))).into_response()
}
