//! The end of the billing period: usage is read once more, the period closes, and the customer fetches the invoice.

use super::{cast::Cast, facts};
use crate::{
    parts::{postgres::Role, progress::Step},
    stack::Stack,
};
use anyhow::{Context, Result, bail};
use aws_sdk_sqs::types::QueueAttributeName;
use chrono::TimeDelta;
use serde_json::Value;
use std::{fs, path::PathBuf};

/// The schedule that closes periods.
const CLOSE: &str = "close_periods";
/// How long after its end a period is looked at.
const AFTER: TimeDelta = TimeDelta::minutes(5);

/// What the customer saw.
pub struct Billed {
    /// Usage in the period, before it closed.
    pub usage: Value,
    /// The invoice.
    pub shown: Option<Value>,
    /// Where the invoice's page was saved.
    pub page: PathBuf,
}

impl Billed {
    /// The invoice's number.
    pub fn number(&self) -> &str {
        self.shown.as_ref().and_then(|invoice| invoice["invoice_number"].as_str()).unwrap_or("the invoice")
    }
}

/// Lets the period end, has it closed by its schedule, and fetches the invoice as the owner, as JSON and as a page.
pub async fn close(stack: &Stack, cast: &Cast, step: &Step) -> Result<Billed> {
    step.say("reading the usage");
    let usage = cast.browser.get("functions/v1/usage-metering/usage").await?;

    step.say("letting the period end");
    let database = stack.connect(Role::Admin).await?;
    let end = facts::period_end(&database, cast.organization.id).await?;
    stack.clock.jump_to(end + AFTER).await?;
    stack.clock.fire(CLOSE).await?;

    step.say("fetching the invoice");
    let list = cast.browser.get("functions/v1/invoice-generation/invoices").await?;
    let invoice = first(&list).with_context(|| format!("there is no invoice in {list}"))?;
    let id = invoice["id"].as_str().with_context(|| format!("an invoice without an id: {invoice}"))?;
    let path = format!("functions/v1/invoice-generation/invoices/{id}");
    let shown = cast.browser.get(&path).await?;
    let page = stack.log_dir.join("invoice.html");
    let html = cast.browser.page(&format!("{path}.html")).await?;
    // The folder of a long run may have been cleared away as an old one.
    fs::create_dir_all(&stack.log_dir)
        .and_then(|()| fs::write(&page, html))
        .with_context(|| format!("cannot write {}", page.display()))?;
    let shown = shown.get("invoice").cloned().unwrap_or(shown);
    if shown["id"].as_str() != Some(id) {
        bail!("asked for invoice {id}, got {shown}");
    }
    Ok(Billed { usage, shown: Some(shown), page })
}

/// The first of a list, bare or wrapped in an object.
fn first(list: &Value) -> Option<&Value> {
    let list = list.as_array().or_else(|| list.as_object()?.values().find_map(Value::as_array))?;
    list.first()
}

/// Messages in all dead-letter queues.
pub async fn dead_letters(stack: &Stack) -> Result<u64> {
    let sqs = stack.sqs();
    let dead: Vec<_> = stack
        .template
        .queues
        .iter()
        .filter_map(|queue| queue.redrive.as_ref())
        .map(|redrive| &redrive.target)
        .collect();
    let mut count = 0;
    for (id, url) in stack.queue_urls.iter().filter(|(id, _)| dead.contains(id)) {
        let request = sqs.get_queue_attributes().queue_url(url);
        let answer = request.attribute_names(QueueAttributeName::ApproximateNumberOfMessages).send().await;
        let attributes =
            answer.with_context(|| format!("counting the messages of {id}"))?.attributes.unwrap_or_default();
        let messages = attributes.get(&QueueAttributeName::ApproximateNumberOfMessages);
        count += messages.and_then(|messages| messages.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(count)
}
