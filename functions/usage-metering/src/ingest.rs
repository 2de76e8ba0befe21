//! Usage events of an organization's own systems: CloudEvents in JSON, one or many, each stored once.
//!
//! An answer of 200 means that what is `stored` is durable and counted. Sending the same events again, for instance because an
//! answer was lost, counts nothing twice: `source` and `id` name an event for ever.

use crate::Metering;
use http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use shared::{
    Error, Result,
    api_key::ApiKey,
    http::{self as web, Request, Response},
    trigger::{Invocation, Message},
};
use uuid::Uuid;

/// Events that one request may carry.
const MAX_EVENTS: usize = 1_000;
/// The version of a queued message; the one before is understood too.
const VERSION: u32 = 1;

/// What the database makes of an event.
#[derive(Deserialize, Serialize)]
struct Outcome {
    id: String,
    status: Status,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<String>,
}

#[derive(Clone, Copy, Deserialize, Serialize, PartialEq)]
#[serde(rename_all = "snake_case")]
enum Status {
    /// Counted now.
    Stored,
    /// Counted before; nothing changed.
    Duplicate,
    /// Another event was counted under this source and id; nothing changed.
    Conflict,
    /// Not a usage event that can be counted.
    Rejected,
}

#[derive(Deserialize, Serialize)]
struct Outcomes {
    results: Vec<Outcome>,
}

/// `POST usage/events`. A batch is answered 200 with an outcome an event; a single event with its own outcome, where a conflict is
/// 409 and a rejection 422. Errors: 401 and 403 for the key, 400 for what is no event, 413 for more than a thousand.
pub async fn receive(metering: &Metering, request: &Request, invocation: &Invocation) -> Result<Response> {
    let key = ApiKey::of(request)?;
    let (events, is_batch) = events(request.json()?)?;
    let request = json!({ "v": 1, "api_key": key, "events": events });
    // Recording is idempotent, so a lost answer is asked for again.
    let outcomes: Outcomes = metering.supabase.call_until("record_usage", &request, invocation.wait_until()).await?;
    if is_batch {
        return web::json(&outcomes);
    }
    let outcome = outcomes.results.into_iter().next();
    single(outcome.ok_or_else(|| Error::internal("record_usage answered an event with nothing"))?)
}

/// What the `usage` queue carries: events that a part of the platform has counted for an organization.
#[derive(Deserialize)]
struct Queued {
    v: u32,
    organization_id: Uuid,
    events: Vec<Value>,
}

/// Records the messages of a batch, each by itself. A message comes again, and in the end lies with the dead letters for a person to
/// see, while the database is away or one of its events is refused; what of it was stored is not counted again.
pub async fn drain(metering: &Metering, batch: Vec<Message>, invocation: &Invocation) -> Vec<String> {
    let mut again = Vec::new();
    for message in batch {
        match drain_one(metering, &message.body, invocation).await {
            Ok(refused) if refused.is_empty() => {}
            Ok(refused) => {
                let codes: Vec<&str> = refused.iter().filter_map(|outcome| outcome.code.as_deref()).collect();
                tracing::error!(?codes, receive_count = message.receive_count, "usage from the queue is refused");
                again.push(message.id);
            }
            Err(error) => {
                tracing::error!(%error, receive_count = message.receive_count, "usage from the queue could not be recorded");
                again.push(message.id);
            }
        }
    }
    again
}

/// Records one message; returns what of it was refused.
async fn drain_one(metering: &Metering, body: &str, invocation: &Invocation) -> Result<Vec<Outcome>> {
    let queued: Queued = serde_json::from_str(body)?;
    // This version and the one before are understood.
    if queued.v + 1 < VERSION || queued.v > VERSION {
        return Err(Error::malformed("v", "the message is of another version"));
    }
    let (events, _) = events(Value::Array(queued.events))?;
    let request = json!({ "v": 1, "organization_id": queued.organization_id, "events": events });
    let outcomes: Outcomes = metering.supabase.call_until("record_usage", &request, invocation.wait_until()).await?;
    Ok(outcomes
        .results
        .into_iter()
        .filter(|outcome| matches!(outcome.status, Status::Conflict | Status::Rejected))
        .collect())
}

/// The events of a body, as the database takes them, and whether they came as a batch.
fn events(body: Value) -> Result<(Vec<Value>, bool)> {
    let (items, is_batch) = match body {
        Value::Array(items) => (items, true),
        item @ Value::Object(_) => (vec![item], false),
        _ => return Err(Error::malformed("body", "the body is one CloudEvent or an array of them")),
    };
    if items.is_empty() {
        return Err(Error::malformed("body", "there is no event in the array"));
    }
    if items.len() > MAX_EVENTS {
        return Err(Error::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "too_many_events",
            format!("at most {MAX_EVENTS} events are taken at once"),
        )
        .at("body"));
    }
    Ok((items.iter().map(event).collect(), is_batch))
}

/// One event in the words of `record_usage`. What is wrong with it is said there, for that event alone.
fn event(item: &Value) -> Value {
    // PostgreSQL stores no NUL in a text: such a text is no valid one, and must not cost the others of its batch.
    let text = |name: &str| item.get(name).filter(|value| value.as_str().is_none_or(|text| !text.contains('\0')));
    json!({
        "specversion": text("specversion"),
        "id": text("id").filter(|id| id.is_string()),
        "source": text("source").filter(|source| source.is_string()),
        "type": text("type"),
        "time": text("time"),
        "corrects": text("corrects"),
        "quantity": item.pointer("/data/quantity").map(|given| if given.is_number() { given.clone() } else { wrong(given) }),
        "value": item.pointer("/data/value").filter(|value| value.as_str().is_some_and(|text| !text.contains('\0'))),
    })
}

/// What is said where a number should be, without what it says.
fn wrong(given: &Value) -> Value {
    if given.is_null() { Value::Null } else { json!("") }
}

fn single(outcome: Outcome) -> Result<Response> {
    let (status, field) = match outcome.status {
        Status::Stored | Status::Duplicate => return web::json(&outcome),
        Status::Conflict => (StatusCode::CONFLICT, "id"),
        Status::Rejected => (StatusCode::UNPROCESSABLE_ENTITY, field_of(outcome.code.as_deref().unwrap_or_default())),
    };
    let code = outcome.code.unwrap_or_else(|| "event_rejected".to_owned());
    Err(Error::new(status, code, outcome.message.unwrap_or_default()).at(field))
}

/// The field that a rejection's code is about.
fn field_of(code: &str) -> &'static str {
    match code {
        "invalid_specversion" => "specversion",
        "invalid_source" | "reserved_source" => "source",
        "unknown_type" | "reserved_type" => "type",
        "invalid_quantity" | "correction_too_large" => "data.quantity",
        "invalid_value" => "data.value",
        "invalid_corrects" | "unknown_corrected" => "corrects",
        "invalid_time" | "time_in_future" => "time",
        _ => "id",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[test]
    fn one_event_and_a_batch_are_told_apart() {
        let one =
            json!({"specversion": "1.0", "id": "a", "source": "crm", "type": "sms_messages", "data": {"quantity": 3}});
        let (events_of_one, is_batch) = events(one.clone()).unwrap();
        assert!(!is_batch);
        assert_eq!(
            events_of_one[0],
            json!({"specversion": "1.0", "id": "a", "source": "crm", "type": "sms_messages", "time": null, "corrects": null, "quantity": 3, "value": null})
        );
        assert!(events(json!([one])).unwrap().1);
    }

    #[test]
    fn what_is_no_event_is_400_and_too_many_are_413() {
        for body in [json!(7), json!("x"), json!(null), json!([])] {
            assert_eq!(events(body).unwrap_err().status, StatusCode::BAD_REQUEST);
        }
        assert!(events(json!(vec![json!({}); MAX_EVENTS])).is_ok());
        let error = events(json!(vec![json!({}); MAX_EVENTS + 1])).unwrap_err();
        assert_eq!((error.status, error.code.as_str()), (StatusCode::PAYLOAD_TOO_LARGE, "too_many_events"));
    }

    #[test]
    fn a_wrong_field_becomes_null_and_leaves_the_rest_of_the_batch_alone() {
        let (events, _) = events(json!([7, {"id": "a\0b", "source": 3, "data": {"value": "a\0b"}}])).unwrap();
        assert!(events[0].as_object().unwrap().values().all(Value::is_null));
        assert!(events[1].as_object().unwrap().values().all(Value::is_null));
    }

    #[test]
    fn a_quantity_that_is_no_number_stays_wrong() {
        // Left out it may mean one, so that a text must not be taken for nothing.
        let (events, _) = events(json!([{"data": {"quantity": "a\0b"}}, {"data": {"quantity": 1.5}}])).unwrap();
        assert_eq!(events[0]["quantity"], json!(""));
        assert_eq!(events[1]["quantity"], json!(1.5));
    }

    #[test]
    fn a_single_event_s_outcome_is_its_answer() {
        let outcome = |status, code: Option<&str>| {
            single(Outcome { id: "a".into(), status, code: code.map(str::to_owned), message: Some("m".into()) })
        };
        assert_eq!(outcome(Status::Duplicate, None).unwrap().status(), StatusCode::OK);
        let conflict = outcome(Status::Conflict, Some("idempotency_conflict")).unwrap_err();
        assert_eq!((conflict.status, conflict.code.as_str()), (StatusCode::CONFLICT, "idempotency_conflict"));
        let rejected = outcome(Status::Rejected, Some("invalid_quantity")).unwrap_err();
        assert_eq!(
            (rejected.status, rejected.field.as_deref()),
            (StatusCode::UNPROCESSABLE_ENTITY, Some("data.quantity"))
        );
    }
}
