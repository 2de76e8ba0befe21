//! The run that closes ended billing periods, as often as the time allows.

use serde::Deserialize;
use serde_json::{Value, json};
use shared::{
    Result,
    metrics::{self, Metric},
    supabase::Supabase,
    trigger::Invocation,
};
use std::time::Instant;

/// Subscriptions that one transaction closes: well below the database's statement timeout.
const BATCH: u32 = 1_000;

#[derive(Deserialize)]
struct Closed {
    closed: u64,
    invoices: Vec<Value>,
    more: bool,
}

/// Closes what is due, a batch a request, until nothing is left or the invocation's time is nearly up; the next run goes on where
/// this one stopped. Every batch is complete in itself, so that ending in between loses nothing and repeats nothing.
pub async fn close_periods(supabase: &Supabase, invocation: &Invocation) -> Result<Value> {
    let deadline = invocation.wait_until();
    let (mut periods, mut invoices) = (0, 0);
    loop {
        let batch: Closed = supabase.call_until("close_periods", &json!({ "v": 1, "limit": BATCH }), deadline).await?;
        periods += batch.closed;
        invoices += batch.invoices.len();
        metrics::count(Metric::InvoicesMade, batch.invoices.len());
        if !batch.more || Instant::now() >= deadline {
            tracing::info!(periods, invoices, more = batch.more, "billing periods closed");
            return Ok(json!({ "closed": periods, "invoices": invoices, "more": batch.more }));
        }
    }
}
