//! The organization's own system: an endpoint on loopback that is told what happened, verifies it, and keeps count.

use super::cast::Cast;
use crate::{
    parts::{postgres::Role, progress::Step},
    stack::Stack,
};
use anyhow::{Context, Result};
use axum::{Router, body::Bytes, extract::State, routing::post};
use http::{HeaderMap, StatusCode};
use serde_json::{Value, json};
use shared::standard_webhooks;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant},
};
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_postgres::Client;
use uuid::Uuid;

/// Up to so many leads it is told everything; a load test is about calls, and has a hundred thousand events.
const ALL_UP_TO: usize = 1_000;
/// What it is told of a load test.
const OUTLINE: [&str; 3] = ["campaign.*", "invoice.*", "subscription.*"];
/// How long what is still to be told may take. A delivery whose handler was killed between claiming it and handing it to the queue comes
/// back with its lease: after half a minute, and after three more if that happens to it twice.
const SETTLING: Duration = Duration::from_secs(240);
/// After so long the log says what is not told yet, and where it stands; and once more when it is given up.
const NOTABLE: Duration = Duration::from_secs(30);
/// How often it is looked whether all is told.
const GLANCE: Duration = Duration::from_millis(400);

/// The endpoint.
pub struct Listener {
    id: Uuid,
    inbox: Arc<Inbox>,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct Inbox {
    secret: OnceLock<String>,
    events: Mutex<BTreeMap<String, String>>,
}

/// What was told, and what happened.
#[derive(Clone, Debug, Default)]
pub struct Told {
    /// Events that came in and verified, by id; each is there once, however often it came.
    pub received: BTreeMap<String, String>,
    /// Events that the database says happened, by id.
    pub happened: BTreeMap<String, String>,
}

impl Told {
    /// How many of what came in is what happened; -1 when there is something among it that did not.
    pub fn agreeing(&self) -> i64 {
        let known = self.received.iter().all(|(id, topic)| self.happened.get(id) == Some(topic));
        if known { self.received.len() as i64 } else { -1 }
    }

    /// What came in, by topic.
    pub fn topics(&self) -> BTreeMap<&str, i64> {
        let mut topics = BTreeMap::new();
        for topic in self.received.values() {
            *topics.entry(topic.as_str()).or_default() += 1;
        }
        topics
    }
}

impl Listener {
    /// Starts the endpoint, and registers it as the owner does.
    pub async fn register(cast: &Cast, leads: usize) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.context("cannot listen for events")?;
        let url = format!("http://{}/events", listener.local_addr()?);
        let inbox = Arc::<Inbox>::default();
        let router = Router::new().route("/events", post(take)).with_state(inbox.clone());
        let task = tokio::spawn(async move {
            let _ended = axum::serve(listener, router).await;
        });
        let topics: &[&str] = if leads <= ALL_UP_TO { &[] } else { &OUTLINE };
        let request = json!({ "url": url, "events": topics, "description": "The CRM" });
        let made = cast.browser.post("functions/v1/event-delivery/endpoints", &request).await?;
        let secret = made["secret"].as_str().context("an endpoint without a secret")?;
        let _set_once = inbox.secret.set(secret.to_owned());
        let id = made["id"].as_str().context("an endpoint without an id")?.parse()?;
        Ok(Self { id, inbox, task })
    }

    /// Waits until everything is told; what was, and what happened.
    pub async fn settle(&self, stack: &Stack, step: &Step) -> Result<Told> {
        let database = stack.connect(Role::Admin).await?;
        let begun = Instant::now();
        let mut noted = false;
        loop {
            let happened = self.happened(&database).await?;
            let received = lock(&self.inbox.events).clone();
            step.say(format!("{} of {} events", received.len(), happened.len()));
            let is_over = begun.elapsed() > SETTLING;
            if happened.len() != received.len() && (is_over || begun.elapsed() > NOTABLE && !noted) {
                noted = true;
                self.note_untold(&database, &happened, &received, begun.elapsed()).await?;
            }
            if happened.len() == received.len() || is_over {
                return Ok(Told { received, happened });
            }
            stack.clock.fire("deliver").await?;
            tokio::time::sleep(GLANCE).await;
        }
    }

    /// Says in the log which events are not told yet, and in what state their deliveries are.
    async fn note_untold(
        &self,
        database: &Client,
        happened: &BTreeMap<String, String>,
        received: &BTreeMap<String, String>,
        after: Duration,
    ) -> Result<()> {
        let untold: Vec<&String> = happened.keys().filter(|id| !received.contains_key(*id)).collect();
        let state = "select told.id::text || ' ' || told.topic || ': ' || coalesce(
              format(
                '%s, %s attempts, due in %s s, %s%s, answered %s %s', delivery.status, delivery.attempts,
                round(extract(epoch from delivery.next_attempt_at - private.clock_now())),
                case when delivery.lease_token is null then 'claimed for' else 'begun, leased for' end,
                coalesce(' ' || round(extract(epoch from delivery.lease_until - now())) || ' s', ' nobody'),
                coalesce(delivery.response_status::text, 'nothing'), coalesce(delivery.error, '')
              ),
              'no delivery, ' || case when told.dispatched_at is null then 'not fanned out' else 'fanned out' end
            )
            from private.outbox as told
            left join public.event_deliveries as delivery on delivery.event_id = told.id and delivery.endpoint_id = $2
            where told.id::text = any ($1)
            order by told.id";
        let rows = database.query(state, &[&untold, &self.id]).await.context("what is not told")?;
        for row in rows {
            tracing::warn!(after_s = after.as_secs(), delivery = row.get::<_, String>(0), "an event is not told yet");
        }
        Ok(())
    }

    /// What happened since the endpoint was there, as far as it listens to it: from the outbox, not from what was delivered.
    async fn happened(&self, database: &Client) -> Result<BTreeMap<String, String>> {
        let events = "select told.id::text, told.topic
            from private.outbox as told
            join public.webhook_endpoints as endpoint on endpoint.organization_id = told.organization_id
            where endpoint.id = $1 and told.sequence is not null and told.created_at >= endpoint.created_at
              and private.wants_event(endpoint.events, told.topic)";
        let rows = database.query(events, &[&self.id]).await.context("what happened")?;
        Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn take(State(inbox): State<Arc<Inbox>>, headers: HeaderMap, body: Bytes) -> StatusCode {
    let secrets: Vec<String> = inbox.secret.get().cloned().into_iter().collect();
    let now = chrono::Utc::now().timestamp();
    let Ok(id) = standard_webhooks::verify(&secrets, &headers, &body, now) else {
        return StatusCode::UNAUTHORIZED;
    };
    let event: Value = serde_json::from_slice(&body).unwrap_or_default();
    let topic = event["type"].as_str().unwrap_or_default();
    lock(&inbox.events).insert(id.to_owned(), topic.to_owned());
    StatusCode::NO_CONTENT
}

fn lock(events: &Mutex<BTreeMap<String, String>>) -> MutexGuard<'_, BTreeMap<String, String>> {
    events.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_did_not_happen_agrees_with_nothing() {
        let one = |id: &str, topic: &str| BTreeMap::from([(id.to_owned(), topic.to_owned())]);
        let told = |received, happened| Told { received, happened }.agreeing();
        assert_eq!(told(one("a", "call.ended"), one("a", "call.ended")), 1);
        assert_eq!(told(one("a", "call.ended"), one("a", "call.started")), -1);
        assert_eq!(told(one("b", "call.ended"), one("a", "call.ended")), -1);
        assert_eq!(told(BTreeMap::new(), one("a", "call.ended")), 0);
    }
}
