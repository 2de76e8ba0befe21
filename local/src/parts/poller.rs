//! Lambda's event source mappings: carries batches of SQS messages to functions, as the template says.
//!
//! What a function took is deleted; what failed is left alone, comes again when its visibility timeout ends, and goes to the dead
//! letters when it was received too often. Both are the queue's business and not ours.

mod backlog;
mod batch;
mod faults;
#[cfg(test)]
mod tests;

use crate::parts::{
    lambda::{ACCOUNT_ID, Functions, InvocationOutcome, Invoker},
    template::{SqsEvent, Template},
};
use anyhow::{Context, Result, bail};
use aws_sdk_sqs::{
    Client,
    error::DisplayErrorContext,
    types::{DeleteMessageBatchRequestEntry, Message, MessageSystemAttributeName},
};
pub use backlog::Backlog;
use batch::Verdict;
use faults::Spoiler;
pub use faults::{MessageCounts, MessageFaults};
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};
use tokio::task::JoinSet;

/// How long a request for messages waits for some, in seconds: the longest that SQS allows, as Lambda's pollers do.
const LONG_POLL_SECONDS: i32 = 20;
/// The pause after a request that failed.
const PAUSE: Duration = Duration::from_millis(250);
/// Batches at once where the template sets no limit: what Lambda begins with.
const DEFAULT_CONCURRENCY: u32 = 5;
/// How long a message is held back that others are to overtake, in seconds.
const HELD_BACK_SECONDS: i32 = 2;
/// Most messages that SQS gives in one answer.
const RECEIVE_LIMIT: u32 = 10;

/// The running event source mappings.
#[derive(Debug)]
pub struct Poller {
    tasks: JoinSet<()>,
    backlog: Backlog,
    spoiler: Spoiler,
}

impl Poller {
    /// Starts a mapping for every SQS event of `template`; `queue_urls` are by logical id. Fails when a queue is not there.
    pub fn start(
        template: &Template,
        sqs: &Client,
        queue_urls: &BTreeMap<String, String>,
        functions: &Functions,
        faults: MessageFaults,
    ) -> Result<Self> {
        let spoiler = Spoiler::new(faults);
        let mut tasks = JoinSet::new();
        // One process is left for requests and schedules; on AWS there would always be another.
        let processes = u32::try_from(functions.workers()).unwrap_or(u32::MAX).saturating_sub(1).max(1);
        let events = template.functions.iter().flat_map(|function| &function.sqs_events);
        let urls = events.filter_map(|event| queue_urls.get(&event.queue).cloned()).collect();
        let backlog = Backlog::new(sqs.clone(), urls);
        for function in &template.functions {
            for event in &function.sqs_events {
                let queue = template.queue(&event.queue).with_context(|| format!("{} is no queue", event.queue))?;
                let url = queue_urls.get(&event.queue).with_context(|| format!("{} has no URL", event.queue))?;
                if event.batch_size > RECEIVE_LIMIT || !event.batching_window.is_zero() {
                    bail!("{}: the local stack gathers no batches above one answer of SQS", event.queue);
                }
                let region = sqs.config().region().map_or("us-east-1", |region| region.as_ref()).to_owned();
                let arn = format!("arn:aws:sqs:{region}:{ACCOUNT_ID}:{}", queue.name);
                let mapping = Mapping {
                    sqs: sqs.clone(),
                    url: url.clone(),
                    visibility: queue.visibility_timeout,
                    source: batch::Source { arn, region },
                    event: event.clone(),
                    function: function.package.clone(),
                    invoker: functions.invoker(),
                    backlog: backlog.clone(),
                    spoiler: spoiler.clone(),
                };
                let concurrency = event.maximum_concurrency.unwrap_or(DEFAULT_CONCURRENCY).min(processes);
                for _ in 0..concurrency {
                    tasks.spawn(mapping.clone().run());
                }
            }
        }
        Ok(Self { tasks, backlog, spoiler })
    }

    /// The messages on their way.
    pub fn backlog(&self) -> Backlog {
        self.backlog.clone()
    }

    /// How often the queues were worse than they should be.
    pub fn counts(&self) -> MessageCounts {
        self.spoiler.counts()
    }

    /// Stops polling. A batch in hand is neither deleted nor lost: its messages come again.
    pub async fn stop(mut self) {
        self.tasks.shutdown().await;
    }
}

/// One queue and the function that is fed from it.
#[derive(Clone)]
struct Mapping {
    sqs: Client,
    url: String,
    visibility: Duration,
    source: batch::Source,
    event: SqsEvent,
    function: String,
    invoker: Invoker,
    backlog: Backlog,
    spoiler: Spoiler,
}

impl Mapping {
    async fn run(self) {
        loop {
            if let Err(error) = self.turn().await {
                tracing::warn!(queue = self.url, "polling failed: {error:#}");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }

    /// Receives a batch, has it worked off, and deletes what was.
    async fn turn(&self) -> Result<()> {
        let received = self
            .sqs
            .receive_message()
            .queue_url(&self.url)
            .max_number_of_messages(i32::try_from(self.event.batch_size)?)
            .wait_time_seconds(LONG_POLL_SECONDS)
            .message_system_attribute_names(MessageSystemAttributeName::All)
            .message_attribute_names("All")
            .send()
            .await
            .map_err(|error| anyhow::anyhow!("receiving: {}", DisplayErrorContext(error)))?;
        let messages = received.messages.unwrap_or_default();
        if messages.is_empty() {
            return Ok(());
        }
        let received = Instant::now();
        self.backlog.received(&messages);
        let (messages, later, twice) = self.spoiler.spoil(messages);
        self.hold_back(&later).await?;
        if messages.is_empty() {
            return Ok(());
        }
        let again = async {
            // Whatever comes of it: SQS promises no more than that a message comes at least once.
            if !twice.is_empty() {
                self.invoker.invoke(&self.function, self.source.event(&twice).into()).await;
            }
        };
        let invoked = self.invoker.invoke(&self.function, self.source.event(&messages).into());
        let (outcome, ()) = tokio::join!(invoked, again);
        let verdict = self.judge(&outcome, &messages);
        let failed = |message: &&Message| verdict.failed(message.message_id().unwrap_or_default());
        let (failed, done): (Vec<_>, Vec<_>) = messages.iter().partition(failed);
        for message in failed {
            self.backlog.park(message, received, self.visibility);
        }
        self.delete(&done).await
    }

    /// Lets messages come again a little later.
    async fn hold_back(&self, messages: &[Message]) -> Result<()> {
        for message in messages {
            let request =
                self.sqs.change_message_visibility().queue_url(&self.url).visibility_timeout(HELD_BACK_SECONDS);
            let answer = request.receipt_handle(message.receipt_handle().unwrap_or_default()).send().await;
            answer.map_err(|error| anyhow::anyhow!("holding back: {}", DisplayErrorContext(error)))?;
        }
        Ok(())
    }

    fn judge(&self, outcome: &InvocationOutcome, messages: &[Message]) -> Verdict {
        let verdict = match outcome {
            InvocationOutcome::Response(_) if !self.event.report_batch_item_failures => Verdict::AllDone,
            InvocationOutcome::Response(answer) => batch::judge(answer, messages),
            InvocationOutcome::FunctionError { error_type, .. } => Verdict::AllFailed(error_type.clone()),
            InvocationOutcome::Throttled => Verdict::AllFailed("throttled".to_owned()),
        };
        match &verdict {
            Verdict::AllFailed(why) => {
                tracing::warn!(function = self.function, messages = messages.len(), why, "a batch failed");
            }
            Verdict::SomeFailed(ids) => {
                tracing::info!(
                    function = self.function,
                    messages = messages.len(),
                    failed = ids.len(),
                    "messages failed"
                );
            }
            Verdict::AllDone => {}
        }
        verdict
    }

    async fn delete(&self, done: &[&Message]) -> Result<()> {
        let entries = done
            .iter()
            .enumerate()
            .map(|(index, message)| {
                DeleteMessageBatchRequestEntry::builder()
                    .id(index.to_string())
                    .receipt_handle(message.receipt_handle().unwrap_or_default())
                    .build()
            })
            .collect::<Result<Vec<_>, _>>()?;
        if entries.is_empty() {
            return Ok(());
        }
        let request = self.sqs.delete_message_batch().queue_url(&self.url).set_entries(Some(entries));
        let answer =
            request.send().await.map_err(|error| anyhow::anyhow!("deleting: {}", DisplayErrorContext(error)))?;
        match answer.failed() {
            [] => Ok(()),
            // They come again, and their function must bear that anyway.
            failed => bail!("{} messages could not be deleted: {:?}", failed.len(), failed[0].message()),
        }
    }
}
