//! From what is due to what was told: claimed, queued, sent, recorded.
//!
//! A delivery is a row with a lease. Whoever dies between sending and recording lets the lease lapse, and the same event goes out again
//! under the same id: a receiver may have it twice, and never not at all.

use crate::{
    Delivery,
    sender::{Letter, Outcome},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use shared::{
    Result,
    metrics::{self, Metric},
    queue::{Envelope, Outgoing, VERSION},
    seal::Sealer,
    trigger::{Invocation, Message},
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::task::JoinSet;
use uuid::Uuid;

/// Deliveries a request.
const LIMIT: u32 = 200;
/// Rounds an invocation.
const ROUNDS: u32 = 10;
/// How long outcomes wait for others before they are recorded: a slow endpoint holds up nobody's record.
const GATHERED: Duration = Duration::from_millis(500);
/// Time that recording needs: nothing is sent with less left beyond the sender's own patience.
const RESERVE: Duration = Duration::from_secs(5);
/// The kind of our messages.
const KIND: &str = "event";
/// The kind of those on the queue of who is slow: a batch takes as long as its slowest endpoint, so that these wait for one another only.
const SLOW: &str = "event_slow";

#[derive(Deserialize)]
struct Claimed {
    deliveries: Vec<Claim>,
    #[serde(default)]
    more: bool,
}

#[derive(Deserialize)]
struct Claim {
    id: String,
    organization_id: String,
    #[serde(default)]
    slow: bool,
}

#[derive(Deserialize)]
struct Begun {
    deliveries: Vec<Due>,
    /// Whether some were given back, because their endpoint turned out to be slow.
    #[serde(default)]
    more: bool,
}

/// A delivery that is this invocation's to make.
#[derive(Deserialize)]
struct Due {
    id: Uuid,
    organization_id: Uuid,
    endpoint_id: Uuid,
    event_id: String,
    url: String,
    body: String,
    secret_sealed: String,
    previous_sealed: Option<String>,
}

#[derive(Serialize)]
struct Made {
    id: Uuid,
    #[serde(flatten)]
    outcome: Outcome,
}

#[derive(Deserialize)]
struct Recorded {
    #[serde(default)]
    more: bool,
}

/// Puts what is due on the queue, until nothing more is. Returns how many went, and how many the queue did not take.
pub async fn release(delivery: &Delivery, invocation: &Invocation) -> Result<Value> {
    let (mut sent, mut unsent) = (0, 0);
    for _ in 0..ROUNDS {
        let claimed: Claimed = delivery.supabase.call("claim_deliveries", &json!({ "v": 1, "limit": LIMIT })).await?;
        let (slow, fast): (Vec<Claim>, Vec<Claim>) = claimed.deliveries.into_iter().partition(|claim| claim.slow);
        for (kind, claims) in [(KIND, fast), (SLOW, slow)] {
            if claims.is_empty() {
                continue;
            }
            let messages: Vec<Outgoing> = claims.iter().map(|claim| message(claim, kind)).collect();
            let refused = delivery.queues.send(&delivery.config, kind, &messages).await?;
            sent += messages.len() - refused.len();
            unsent += refused.len();
        }
        let time_left = invocation.deadline.saturating_duration_since(Instant::now());
        if !claimed.more || unsent > 0 || time_left < Duration::from_secs(5) {
            break;
        }
    }
    if sent + unsent > 0 {
        tracing::info!(sent, unsent, "deliveries claimed");
    }
    Ok(json!({ "sent": sent, "unsent": unsent }))
}

fn message(claim: &Claim, kind: &str) -> Outgoing {
    Outgoing::from(&Envelope {
        v: VERSION,
        kind: kind.to_owned(),
        organization_id: claim.organization_id.clone(),
        id: claim.id.clone(),
        not_after: None,
    })
}

/// Makes a batch of deliveries, all at once. Returns the messages that must come again: those that were certainly not begun.
pub async fn batch(delivery: &Delivery, batch: Vec<Message>, invocation: &Invocation) -> Vec<String> {
    let Read { wanted, slow, unread: mut again } = read(&batch);
    if wanted.is_empty() {
        return again;
    }
    let token = Uuid::new_v4();
    let needed = delivery.sender.timeout() + RESERVE;
    let latest = invocation.deadline.checked_sub(needed).unwrap_or_else(Instant::now);
    let request = json!({ "v": 1, "lease_token": token, "deliveries": wanted, "slow": slow });
    let begun: Begun = match delivery.supabase.call_until("begin_deliveries", &request, latest).await {
        Ok(begun) => begun,
        Err(error) => {
            tracing::error!(error = %error, "the batch could not be begun; it comes again");
            let unread = again.clone();
            again.extend(batch.into_iter().map(|message| message.id).filter(|id| !unread.contains(id)));
            return again;
        }
    };
    let more = begun.more;
    if (send_all(delivery, begun.deliveries, token, invocation).await || more)
        && let Err(error) = release(delivery, invocation).await
    {
        // The next tick finds them.
        tracing::warn!(error = %error, "what else is due could not be claimed");
    }
    again
}

/// What a batch asks for.
#[derive(Default)]
struct Read {
    /// Its deliveries.
    wanted: Vec<Uuid>,
    /// Whether it came from the queue of the slow.
    slow: bool,
    /// The messages that are none: those stay on the queue until they are dead letters.
    unread: Vec<String>,
}

fn read(batch: &[Message]) -> Read {
    let mut read = Read::default();
    for message in batch {
        let envelope = serde_json::from_str::<Envelope>(&message.body).ok().filter(|envelope| {
            [KIND, SLOW].contains(&envelope.kind.as_str())
                && (VERSION.saturating_sub(1)..=VERSION).contains(&envelope.v)
        });
        match envelope.and_then(|envelope| Some((Uuid::parse_str(&envelope.id).ok()?, envelope.kind == SLOW))) {
            Some((id, slow)) => {
                read.wanted.push(id);
                read.slow |= slow;
            }
            None => {
                tracing::error!(message_id = message.id, "a message on the event queue is none of ours");
                read.unread.push(message.id.clone());
            }
        }
    }
    read
}

/// Sends all at once and records as they come in. Whether an endpoint of theirs has more that is due.
async fn send_all(delivery: &Delivery, due: Vec<Due>, token: Uuid, invocation: &Invocation) -> bool {
    let mut running = JoinSet::new();
    let mut made = Vec::new();
    let mut more = false;
    for due in due {
        match secrets_of(delivery, &due).await {
            Ok(secrets) => {
                let sender = Arc::clone(&delivery.sender);
                running.spawn(async move {
                    let letter = Letter { id: &due.event_id, url: &due.url, body: due.body, secrets: &secrets };
                    let outcome = sender.send(letter).await;
                    let arrived = outcome.error.is_none();
                    metrics::count(if arrived { Metric::DeliveriesMade } else { Metric::DeliveriesFailed }, 1);
                    tracing::info!(
                        organization_id = %due.organization_id,
                        endpoint_id = %due.endpoint_id,
                        event_id = due.event_id,
                        status = outcome.status,
                        error = outcome.error,
                        duration_ms = outcome.duration_ms,
                        "delivered"
                    );
                    Made { id: due.id, outcome }
                });
            }
            Err(error) => {
                tracing::error!(endpoint_id = %due.endpoint_id, error = %error, "the event cannot be signed");
                let error = Some("the endpoint's secret cannot be opened".to_owned());
                made.push(Made { id: due.id, outcome: Outcome { error, ..Outcome::default() } });
            }
        }
    }
    while !running.is_empty() {
        match tokio::time::timeout(GATHERED, running.join_next()).await {
            Ok(Some(Ok(one))) => made.push(one),
            // Its lease lapses, and it is made again.
            Ok(Some(Err(error))) => tracing::error!(error = %error, "a delivery ended without an outcome"),
            Ok(None) => break,
            Err(_) => more |= record(delivery, &mut made, token, invocation).await,
        }
    }
    more | record(delivery, &mut made, token, invocation).await
}

/// The endpoint's secrets, opened: the current one first.
async fn secrets_of(delivery: &Delivery, due: &Due) -> Result<Vec<String>> {
    let sealer = Sealer::new(&delivery.secrets.get().await?.seal_keys)?;
    let row = due.endpoint_id.to_string();
    let sealed = std::iter::once(&due.secret_sealed).chain(&due.previous_sealed);
    sealed.map(|sealed| sealer.open(sealed, &row)).collect()
}

/// Records what was made so far. What cannot be recorded is made again when its lease lapses.
async fn record(delivery: &Delivery, made: &mut Vec<Made>, token: Uuid, invocation: &Invocation) -> bool {
    if made.is_empty() {
        return false;
    }
    let request = json!({ "v": 1, "lease_token": token, "results": made });
    made.clear();
    match delivery.supabase.call_until::<Recorded>("record_deliveries", &request, invocation.wait_until()).await {
        Ok(recorded) => recorded.more,
        Err(error) => {
            tracing::error!(error = %error, "deliveries could not be recorded; they are made again");
            false
        }
    }
}
