//! Release: one request picks what may be dialled now and writes an attempt for each; the attempts go to the queue.
//!
//! The nudge and the schedule run the same thing, at once if it so happens: the database hands each row out once. An attempt whose
//! message was not sent keeps its lease until it runs out, and is then handed out again under the same id.

use crate::Dispatch;
use serde::Deserialize;
use serde_json::{Value, json};
use shared::{
    Result,
    metrics::{self, Metric},
    queue::{Envelope, Outgoing, VERSION},
    trigger::Invocation,
};
use std::time::{Duration, Instant};

/// Attempts a request.
const LIMIT: u32 = 200;
/// Rounds an invocation: a backlog is worked off over several, so that a pause takes effect soon.
const ROUNDS: u32 = 10;
/// In which a carrier account has a second's worth of calls again.
const PACE: Duration = Duration::from_secs(1);
/// As long as an invocation goes on for calls that wait for the pace: until the next one of the schedule.
const PACED: Duration = Duration::from_secs(55);

#[derive(Deserialize)]
struct Released {
    attempts: Vec<Attempt>,
    #[serde(default)]
    more: bool,
    /// Calls wait for nothing but the pace of their carrier account.
    #[serde(default)]
    paced: bool,
}

/// An attempt that is to be dialled.
#[derive(Deserialize)]
pub struct Attempt {
    pub id: String,
    pub organization_id: String,
    pub not_after: Option<String>,
}

/// Releases until nothing more may be dialled now. Returns how many attempts went to the queue, and how many it did not take.
///
/// Only the schedule waits (`paced`) for what a carrier account's pace lets go a second later: whoever nudges wants an answer, and ten
/// nudges would be ten that wait.
pub async fn run(dispatch: &Dispatch, invocation: &Invocation, paced: bool) -> Result<Value> {
    let (mut sent, mut unsent) = (0, 0);
    let (mut rounds, started) = (0, Instant::now());
    while rounds < ROUNDS {
        let request = json!({ "v": 1, "limit": LIMIT });
        let released: Released = dispatch.supabase.call("release_calls", &request).await?;
        let messages: Vec<Outgoing> = released.attempts.iter().map(message).collect();
        if !messages.is_empty() {
            let refused = dispatch.queues.send(&dispatch.config, "dial", &messages).await?;
            sent += messages.len() - refused.len();
            unsent += refused.len();
        }
        let time_left = invocation.deadline.saturating_duration_since(Instant::now());
        if unsent > 0 || time_left < Duration::from_secs(10) {
            break;
        }
        if released.more {
            rounds += 1;
        } else if paced && released.paced && started.elapsed() < PACED {
            tokio::time::sleep(PACE).await;
        } else {
            break;
        }
    }
    metrics::count(Metric::CallsReleased, sent);
    if sent + unsent > 0 {
        tracing::info!(sent, unsent, "released");
    }
    Ok(json!({ "sent": sent, "unsent": unsent }))
}

/// Its message on the queue `dial`.
pub fn message(attempt: &Attempt) -> Outgoing {
    Outgoing::from(&Envelope {
        v: VERSION,
        kind: "dial".to_owned(),
        organization_id: attempt.organization_id.clone(),
        id: attempt.id.clone(),
        not_after: attempt.not_after.clone(),
    })
}
