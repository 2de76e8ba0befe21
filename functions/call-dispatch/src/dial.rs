//! Dialling a batch: one request begins it, one request a call goes to the carrier, one request records what came of it.

use crate::Dispatch;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use shared::{
    Error, Result,
    metrics::{self, Metric},
    queue::{Envelope, VERSION},
    seal::Sealer,
    secrets::Secrets,
    telephony::{
        CallbackEvent, DialOutcome, Outcome,
        api::{self, Account, Create},
        carrier::{self, Carrier, Credentials},
        stream_token,
        token::CallbackToken,
    },
    trigger::{Invocation, Message},
};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use uuid::Uuid;

/// Time that a dial and its recording need: no dial begins with less.
const RESERVE: Duration = Duration::from_secs(15);

#[derive(Deserialize)]
struct Begun {
    dials: Vec<Dial>,
    #[serde(default)]
    skipped: Vec<Skipped>,
}

#[derive(Deserialize)]
struct Skipped {
    attempt_id: Uuid,
    reason: String,
}

/// A call that the database has allowed, for this invocation alone.
#[derive(Debug, Clone, Deserialize)]
struct Dial {
    attempt_id: Uuid,
    organization_id: Uuid,
    #[serde(flatten)]
    account: SealedAccount,
    from: String,
    to: String,
    ring_timeout_seconds: u32,
    time_limit_seconds: u32,
    record: bool,
    agent_id: Option<Uuid>,
    not_after: i64,
}

#[derive(Debug, Serialize)]
struct Outcomes {
    attempt_id: Uuid,
    #[serde(flatten)]
    outcome: DialOutcome,
}

/// Dials a batch of `dial` messages. Returns those that must come again: the ones that were certainly not begun.
pub async fn batch(dispatch: &Dispatch, batch: Vec<Message>, invocation: &Invocation) -> Vec<String> {
    let (attempts, mut again) = read(&batch);
    if attempts.is_empty() {
        return again;
    }
    let begun = match begin(dispatch, &attempts, invocation).await {
        Ok(begun) => begun,
        Err(error) => {
            tracing::error!(error = %error, "the batch could not be begun; it comes again");
            again.extend(
                batch.into_iter().map(|message| message.id).filter(|id| !again.contains(id)).collect::<Vec<_>>(),
            );
            return again;
        }
    };
    for skipped in &begun.skipped {
        tracing::info!(attempt_id = %skipped.attempt_id, reason = skipped.reason, "not dialled");
    }
    let outcomes = dial_all(dispatch, begun.dials).await;
    let taken = outcomes.iter().filter(|one| matches!(one.outcome, DialOutcome::Accepted { .. })).count();
    metrics::count(Metric::CallsSkipped, begun.skipped.len());
    metrics::count(Metric::CallsDialled, taken);
    metrics::count(Metric::CallsRefused, outcomes.len() - taken);
    if !outcomes.is_empty() {
        record(dispatch, &outcomes, invocation).await;
    }
    again
}

/// The attempts of a batch, and the messages that are none: those stay on the queue until they are dead letters, where a person
/// can see them.
fn read(batch: &[Message]) -> (Vec<Uuid>, Vec<String>) {
    let mut attempts = Vec::with_capacity(batch.len());
    let mut unread = Vec::new();
    for message in batch {
        let attempt = serde_json::from_str::<Envelope>(&message.body)
            .ok()
            .filter(|envelope| envelope.kind == "dial" && (VERSION.saturating_sub(1)..=VERSION).contains(&envelope.v))
            .and_then(|envelope| Uuid::parse_str(&envelope.id).ok());
        match attempt {
            Some(attempt) => attempts.push(attempt),
            None => {
                tracing::error!(message_id = message.id, "a message on the dial queue is none of ours");
                unread.push(message.id.clone());
            }
        }
    }
    (attempts, unread)
}

/// Moves the attempts to `submitting`, once and only once. The lease token is this invocation's own, so that asking again after a
/// lost answer gives the same dials, and another handler with the same message gets none.
async fn begin(dispatch: &Dispatch, attempts: &[Uuid], invocation: &Invocation) -> Result<Begun> {
    let latest = invocation.deadline.checked_sub(RESERVE).unwrap_or_else(Instant::now);
    let request = json!({ "v": 1, "lease_token": Uuid::new_v4(), "attempts": attempts });
    let begun = dispatch.supabase.call_until("begin_dials", &request, latest).await?;
    Ok(begun)
}

async fn dial_all(dispatch: &Dispatch, dials: Vec<Dial>) -> Vec<Outcomes> {
    let mut running = JoinSet::new();
    let mut outcomes = Vec::with_capacity(dials.len());
    for dial in dials {
        match prepare(dispatch, &dial).await {
            Ok(prepared) => {
                let http = dispatch.http.clone();
                running.spawn(async move {
                    let outcome = prepared.create(&http, &dial).await;
                    tracing::info!(
                        organization_id = %dial.organization_id,
                        attempt_id = %dial.attempt_id,
                        provider = prepared.carrier.name(),
                        outcome = ?outcome,
                        "dialled"
                    );
                    Outcomes { attempt_id: dial.attempt_id, outcome }
                });
            }
            Err(error) => {
                tracing::error!(attempt_id = %dial.attempt_id, error = %error, "the call cannot be made");
                let outcome = DialOutcome::Refused { reason: Outcome::Config, code: error.code };
                outcomes.push(Outcomes { attempt_id: dial.attempt_id, outcome });
            }
        }
    }
    while let Some(finished) = running.join_next().await {
        match finished {
            Ok(outcome) => outcomes.push(outcome),
            // The attempt stays `submitting`; its lease brings the reconciler.
            Err(error) => tracing::error!(error = %error, "a dial ended without an outcome"),
        }
    }
    outcomes
}

/// A dial with all that the carrier is told.
struct Prepared {
    carrier: &'static dyn Carrier,
    account: Account,
    callbacks: Vec<(CallbackEvent, String)>,
    stream_url: Option<String>,
}

impl Prepared {
    async fn create(&self, http: &reqwest::Client, dial: &Dial) -> DialOutcome {
        let call = Create {
            attempt_id: dial.attempt_id,
            from: &dial.from,
            to: &dial.to,
            callbacks: &self.callbacks,
            stream_url: self.stream_url.as_deref(),
            ring_timeout: dial.ring_timeout_seconds,
            time_limit: dial.time_limit_seconds,
            record: dial.record,
        };
        api::create(self.carrier, http, &self.account, &call).await
    }
}

async fn prepare(dispatch: &Dispatch, dial: &Dial) -> Result<Prepared> {
    let secrets = dispatch.secrets.get().await?;
    let (carrier, account) = dial.account.open(dispatch, &secrets)?;
    let token = CallbackToken {
        attempt_id: dial.attempt_id,
        carrier_account_id: dial.account.carrier_account_id,
        record: dial.record,
        not_after: dial.not_after,
        agent_id: dial.agent_id.unwrap_or_default(),
    };
    let encode = |event: CallbackEvent| {
        token
            .encode(&secrets.callback_keys, carrier.name(), event)
            .ok_or_else(|| Error::internal("the stack's secret has no callback key"))
    };
    let origin = &dispatch.config.public_origin;
    let callbacks = CallbackEvent::ALL
        .into_iter()
        .filter(|event| *event != CallbackEvent::Inbound)
        .map(|event| {
            let (name, path, token, retries) = (carrier.name(), event.as_str(), encode(event)?, carrier.retries());
            Ok((event, format!("{origin}/functions/v1/webhook-intake/{name}/{path}/{token}{retries}")))
        })
        .collect::<Result<_>>()?;
    // As the document says that answers a call, at carriers that ask for one.
    let until = dial.not_after + i64::from(dial.ring_timeout_seconds) + stream_token::GOOD_FOR_SECONDS;
    let stream = stream_token::sign(&secrets.callback_keys, token.agent_id, dial.attempt_id, until);
    let agent = dispatch.config.agent_origin(&token.agent_id.to_string());
    let stream_url = agent
        .zip(stream)
        .map(|(agent, stream)| format!("{}/stream/{}/{stream}", agent.trim_end_matches('/'), dial.attempt_id));
    Ok(Prepared { carrier, account, callbacks, stream_url })
}

/// A carrier account, as the database hands it out.
#[derive(Debug, Clone, Deserialize)]
pub struct SealedAccount {
    provider: String,
    pub carrier_account_id: Uuid,
    account_sid: String,
    #[serde(alias = "auth_token_sealed")]
    credentials_sealed: String,
    api_base: String,
}

impl SealedAccount {
    /// Opens it, for a host that may be asked.
    pub fn open(&self, dispatch: &Dispatch, secrets: &Secrets) -> Result<(&'static dyn Carrier, Account)> {
        let carrier = carrier::by_name(&self.provider).ok_or_else(|| Error::internal("there is no such carrier"))?;
        let opened =
            Sealer::new(&secrets.seal_keys)?.open(&self.credentials_sealed, &self.carrier_account_id.to_string())?;
        let credentials = Credentials::read(&opened);
        let account =
            Account::new(carrier, &self.account_sid, credentials, &self.api_base, dispatch.config.is_local())?;
        Ok((carrier, account))
    }
}

/// Records the outcomes, for as long as the invocation lasts. What could not be recorded is `submitting` still: a callback binds it,
/// or the reconciler asks.
async fn record(dispatch: &Dispatch, outcomes: &[Outcomes], invocation: &Invocation) {
    let request = json!({ "v": 1, "results": outcomes });
    let recorded: Result<Value> = dispatch.supabase.call_until("record_dials", &request, invocation.wait_until()).await;
    if let Err(error) = recorded {
        tracing::error!(error = %error, dials = outcomes.len(), "outcomes could not be recorded");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(id: &str, body: &str) -> Message {
        Message { id: id.to_owned(), body: body.to_owned(), receive_count: 1 }
    }

    #[test]
    fn a_message_that_is_none_of_ours_is_left_for_the_dead_letters() {
        let good = json!({"v": 1, "kind": "dial", "organization_id": "o", "id": Uuid::from_u128(1), "not_after": null})
            .to_string();
        let later = good.replace("\"v\":1", "\"v\":2");
        let other = good.replace("dial", "event");
        let batch = [message("a", &good), message("b", "{"), message("c", &later), message("d", &other)];
        let (attempts, unread) = read(&batch);
        assert_eq!((attempts, unread.join("")), (vec![Uuid::from_u128(1)], "bcd".to_owned()));
    }

    #[test]
    fn an_outcome_is_written_flat() {
        let outcomes = Outcomes {
            attempt_id: Uuid::from_u128(1),
            outcome: DialOutcome::Deferred { retry_after_seconds: 5, code: "429".to_owned() },
        };
        assert_eq!(
            json!(outcomes),
            json!({"attempt_id": Uuid::from_u128(1), "outcome": "deferred", "retry_after_seconds": 5, "code": "429"})
        );
    }
}
