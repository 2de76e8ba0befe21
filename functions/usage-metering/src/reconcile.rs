//! The check that keys, events, days and counters agree, for every organization at once.

use crate::Metering;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use shared::{
    Result,
    metrics::{self, Metric},
    trigger::Invocation,
};
use uuid::Uuid;

#[derive(Deserialize, Serialize)]
struct Reconciled {
    wrong: Vec<Wrong>,
    held: u64,
}

#[derive(Deserialize, Serialize)]
struct Wrong {
    organization_id: Uuid,
    problems: Vec<String>,
}

/// Compares, stops the billing of whom it is wrong for, and says so in the log as loudly as a log can; the outbox tells it too.
pub async fn run(metering: &Metering, invocation: &Invocation) -> Result<Value> {
    let outcome: Reconciled =
        metering.supabase.call_until("reconcile_usage", &json!({ "v": 1 }), invocation.wait_until()).await?;
    metrics::count(Metric::UsageMismatches, outcome.wrong.len());
    for wrong in &outcome.wrong {
        tracing::error!(organization_id = %wrong.organization_id, problems = ?wrong.problems, "usage does not add up: billing is held");
    }
    tracing::info!(wrong = outcome.wrong.len(), held = outcome.held, "usage reconciled");
    Ok(serde_json::to_value(outcome)?)
}
