//! `queues`: what waits on SQS, and messages that a function gave up on. To redrive is to receive, send and delete, in this order: a
//! message may come twice, and is never lost.

use super::table;
use anyhow::{Context, Result, bail, ensure};
use aws_sdk_sqs::{
    Client,
    types::{Message, MessageSystemAttributeName, QueueAttributeName},
};
use clap::{Args, Subcommand};
use url::Url;

/// What names the queue for what another one gave up on.
const DEAD: &str = "-dead";
/// Messages a request at most.
const BATCH: i32 = 10;
/// How long a message is hidden while it is moved, in seconds.
const HIDDEN: i32 = 30;

/// What to do with queues.
#[derive(Debug, Subcommand)]
pub enum Queues {
    /// List queues and how many messages each has.
    List {
        /// Where they are.
        #[command(flatten)]
        place: Place,
    },
    /// Send a dead-letter queue's messages through again.
    Redrive {
        /// The dead-letter queue's name, like trunkline-intake-dead.
        queue: String,
        /// How many at most.
        #[arg(long, default_value_t = 1_000)]
        most: usize,
        /// Where they are.
        #[command(flatten)]
        place: Place,
    },
}

/// Where the queues are.
#[derive(Debug, Args)]
pub struct Place {
    /// The server, for a stack on this machine; what `cargo up` prints. Without it the account of the AWS environment.
    #[arg(long, value_name = "URL")]
    sqs_url: Option<Url>,
    /// What the queues' names begin with: the stack's name.
    #[arg(long, default_value = crate::parts::template::STACK_NAME)]
    stack: String,
}

impl Place {
    async fn client(&self) -> Client {
        match &self.sqs_url {
            Some(url) => crate::parts::sqs::client(url),
            None => Client::new(&super::aws::config().await),
        }
    }
}

/// Does it, and says what to print.
pub async fn run(command: &Queues) -> Result<String> {
    match command {
        Queues::List { place } => list(&place.client().await, &place.stack).await,
        Queues::Redrive { queue, most, place } => {
            let (moved, left) = redrive(&place.client().await, queue, *most).await?;
            Ok(format!("{moved} messages sent through again, about {left} left on {queue}\n"))
        }
    }
}

async fn list(client: &Client, stack: &str) -> Result<String> {
    let mut rows = Vec::new();
    let mut pages = client.list_queues().queue_name_prefix(format!("{stack}-")).into_paginator().send();
    while let Some(page) = pages.next().await {
        for url in page.context("the queues cannot be listed")?.queue_urls() {
            let [waiting, in_flight, delayed] = lengths(client, url).await?;
            let name = url.rsplit('/').next().unwrap_or(url).to_owned();
            rows.push(vec![name, waiting.to_string(), in_flight.to_string(), delayed.to_string()]);
        }
    }
    rows.sort();
    Ok(table(&["queue", "waiting", "in flight", "delayed"], &rows))
}

/// Messages that wait, that somebody has, and that are held back.
async fn lengths(client: &Client, url: &str) -> Result<[u64; 3]> {
    let names = [
        QueueAttributeName::ApproximateNumberOfMessages,
        QueueAttributeName::ApproximateNumberOfMessagesNotVisible,
        QueueAttributeName::ApproximateNumberOfMessagesDelayed,
    ];
    let asked = client.get_queue_attributes().queue_url(url).set_attribute_names(Some(names.to_vec())).send().await?;
    let count = |name: &QueueAttributeName| {
        asked.attributes().and_then(|all| all.get(name)).and_then(|text| text.parse().ok()).unwrap_or_default()
    };
    Ok([count(&names[0]), count(&names[1]), count(&names[2])])
}

/// Moves messages of a dead-letter queue to the queue that it is for. How many were moved, and how many are left.
pub async fn redrive(client: &Client, dead: &str, most: usize) -> Result<(usize, u64)> {
    let Some(live) = dead.strip_suffix(DEAD) else { bail!("{dead} is no dead-letter queue: its name ends in {DEAD}") };
    let (from, to) = tokio::try_join!(url_of(client, dead), url_of(client, live))?;
    let mut moved = 0;
    while moved < most {
        let wanted = BATCH.min(i32::try_from(most - moved).unwrap_or(BATCH));
        let received = client
            .receive_message()
            .queue_url(&from)
            .max_number_of_messages(wanted)
            .visibility_timeout(HIDDEN)
            .message_system_attribute_names(MessageSystemAttributeName::All)
            .send()
            .await?;
        let messages = received.messages.unwrap_or_default();
        if messages.is_empty() {
            break;
        }
        for message in &messages {
            move_one(client, message, &from, &to).await?;
            moved += 1;
        }
    }
    Ok((moved, lengths(client, &from).await?[0]))
}

async fn move_one(client: &Client, message: &Message, from: &str, to: &str) -> Result<()> {
    let group = message.attributes().and_then(|all| all.get(&MessageSystemAttributeName::MessageGroupId)).cloned();
    let body = message.body().context("a message without a body")?;
    let sent = client.send_message().queue_url(to).message_body(body).set_message_group_id(group).send().await?;
    ensure!(sent.message_id().is_some(), "the queue took no message");
    let receipt = message.receipt_handle().context("a message without a receipt")?;
    client.delete_message().queue_url(from).receipt_handle(receipt).send().await?;
    Ok(())
}

async fn url_of(client: &Client, name: &str) -> Result<String> {
    let found = client.get_queue_url().queue_name(name).send().await;
    found.with_context(|| format!("there is no queue {name}"))?.queue_url.with_context(|| format!("{name} has no URL"))
}
