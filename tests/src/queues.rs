//! Queues of a test's own, on the queue server that all share.

use crate::{events, supervisor::Attached};
use anyhow::{Context, Result, ensure};
use aws_sdk_sqs::{
    Client,
    types::{DeleteMessageBatchRequestEntry, Message, MessageSystemAttributeName},
};
use serde_json::{Value, json};
use shared::trigger::Function;
use std::sync::Once;
use url::Url;
use uuid::Uuid;

/// Messages that Lambda hands to a function at once, by `template.yaml`.
const BATCH: i32 = 10;

/// A queue with a name that no other test has.
#[derive(Debug, Clone)]
pub struct Queue {
    /// Its URL.
    pub url: String,
    client: Client,
}

/// What became of a batch.
#[derive(Debug, Default)]
pub struct Delivered {
    /// Messages handed over.
    pub messages: usize,
    /// Messages that the function wants to see again.
    pub failed: usize,
}

impl Queue {
    /// Makes a queue and, the first time, points this process's AWS clients at its server.
    pub async fn create(attached: &Attached, name: &str) -> Result<Self> {
        let (endpoint, environment) = attached.queues().await?;
        point_clients_at(environment);
        let client = local::parts::sqs::client(&Url::parse(&endpoint)?);
        let created = client.create_queue().queue_name(format!("{name}-{}", Uuid::new_v4().simple())).send().await?;
        Ok(Self { url: created.queue_url.context("a queue without a URL")?, client })
    }

    /// Takes what is there, ten messages at most; they are hidden then, for as long as the queue's visibility timeout says.
    pub async fn receive(&self) -> Result<Vec<Message>> {
        let received = self
            .client
            .receive_message()
            .queue_url(&self.url)
            .max_number_of_messages(BATCH)
            .message_system_attribute_names(MessageSystemAttributeName::All)
            .send()
            .await?;
        Ok(received.messages.unwrap_or_default())
    }

    /// How many messages wait to be received.
    pub async fn waiting(&self) -> Result<usize> {
        use aws_sdk_sqs::types::QueueAttributeName::ApproximateNumberOfMessages;
        let asked = self
            .client
            .get_queue_attributes()
            .queue_url(&self.url)
            .attribute_names(ApproximateNumberOfMessages)
            .send()
            .await?;
        let count = asked.attributes().and_then(|attributes| attributes.get(&ApproximateNumberOfMessages));
        Ok(count.context("a queue without a length")?.parse()?)
    }

    /// Puts a message on the queue.
    pub async fn send(&self, body: &str) -> Result<()> {
        self.client.send_message().queue_url(&self.url).message_body(body).send().await?;
        Ok(())
    }

    /// Hands everything that waits to a function, batch by batch, as Lambda's event source does: what did not fail is deleted, what
    /// failed stays and is hidden.
    pub async fn deliver(&self, function: &impl Function) -> Result<Delivered> {
        self.deliver_some(function, usize::MAX).await
    }

    /// As [`Queue::deliver`], at most so many batches.
    pub async fn deliver_some(&self, function: &impl Function, batches: usize) -> Result<Delivered> {
        let mut delivered = Delivered::default();
        for _ in 0..batches {
            let messages = self.receive().await?;
            if messages.is_empty() {
                break;
            }
            let failed = hand_over(function, &messages).await?;
            delivered.messages += messages.len();
            delivered.failed += failed.len();
            let mut taken = Vec::with_capacity(messages.len());
            for (index, message) in messages.iter().enumerate() {
                let receipt = message.receipt_handle().context("a message without a receipt")?;
                if !failed.iter().any(|id| Some(id.as_str()) == message.message_id()) {
                    let entry = DeleteMessageBatchRequestEntry::builder().id(index.to_string()).receipt_handle(receipt);
                    taken.push(entry.build()?);
                }
            }
            if !taken.is_empty() {
                self.client.delete_message_batch().queue_url(&self.url).set_entries(Some(taken)).send().await?;
            }
        }
        Ok(delivered)
    }

    /// Lets received messages be received again at once.
    pub async fn release(&self, messages: &[Message]) -> Result<()> {
        for message in messages {
            let receipt = message.receipt_handle().context("a message without a receipt")?;
            self.client
                .change_message_visibility()
                .queue_url(&self.url)
                .receipt_handle(receipt)
                .visibility_timeout(0)
                .send()
                .await?;
        }
        Ok(())
    }
}

/// Hands messages to a function; the ids of those that it reports as failed. Nothing happens on the queue.
pub async fn hand_over(function: &impl Function, messages: &[Message]) -> Result<Vec<String>> {
    let answer = events::invoke(function, batch(messages)).await?;
    let failures = answer["batchItemFailures"].as_array().context("an answer without batchItemFailures")?;
    let failed: Vec<String> =
        failures.iter().filter_map(|failure| failure["itemIdentifier"].as_str().map(str::to_owned)).collect();
    ensure!(failed.len() == failures.len(), "a failure without an id: {answer}");
    Ok(failed)
}

/// The event of a batch.
pub fn batch(messages: &[Message]) -> Value {
    let records: Vec<Value> = messages
        .iter()
        .map(|message| {
            let count = message
                .attributes()
                .and_then(|attributes| attributes.get(&MessageSystemAttributeName::ApproximateReceiveCount))
                .map_or("1", String::as_str);
            json!({
                "messageId": message.message_id(),
                "receiptHandle": message.receipt_handle(),
                "body": message.body(),
                "attributes": {
                    "ApproximateReceiveCount": count, "SentTimestamp": "1795494600000", "SenderId": "AIDAEXAMPLE",
                    "ApproximateFirstReceiveTimestamp": "1795494600000",
                },
                "messageAttributes": {},
                "md5OfBody": message.md5_of_body(),
                "eventSource": "aws:sqs",
                "eventSourceARN": "arn:aws:sqs:us-east-1:000000000000:queue",
                "awsRegion": "us-east-1",
            })
        })
        .collect();
    json!({ "Records": records })
}

/// Functions read the server's address and credentials from the environment, as Lambda gives them.
fn point_clients_at(environment: std::collections::BTreeMap<String, String>) {
    static POINTED: Once = Once::new();
    POINTED.call_once(|| {
        for (name, value) in environment {
            #[allow(unsafe_code)]
            // SAFETY: every reader of these variables in this process is Rust's own `std::env`, which takes the lock that this takes;
            // the C library is asked to resolve no host name, which is what it would read the environment for.
            unsafe {
                std::env::set_var(name, value);
            }
        }
    });
}
