//! How many messages are on their way, for those who wait until none is.

use anyhow::Result;
use aws_sdk_sqs::{
    Client,
    error::DisplayErrorContext,
    types::{Message, QueueAttributeName},
};
use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// The messages of every queue that a function is fed from. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Backlog {
    sqs: Client,
    urls: BTreeSet<String>,
    /// Messages that failed, and until when at least they stay hidden.
    parked: Arc<Mutex<HashMap<String, Instant>>>,
}

impl Backlog {
    pub(super) fn new(sqs: Client, urls: BTreeSet<String>) -> Self {
        Self { sqs, urls, parked: Arc::default() }
    }

    /// Messages that wait, are delayed, or are in a function's hands. Those that failed and come again when their visibility timeout
    /// ends are not counted until then: minutes may pass, and what they ask for is kept in the database as well.
    pub async fn count(&self) -> Result<u64> {
        let names = [
            QueueAttributeName::ApproximateNumberOfMessages,
            QueueAttributeName::ApproximateNumberOfMessagesNotVisible,
            QueueAttributeName::ApproximateNumberOfMessagesDelayed,
        ];
        let mut sum = 0;
        for url in &self.urls {
            let request = self.sqs.get_queue_attributes().queue_url(url).set_attribute_names(Some(names.to_vec()));
            let answer = request.send().await;
            let answer =
                answer.map_err(|error| anyhow::anyhow!("counting messages: {}", DisplayErrorContext(error)))?;
            let counts = names.iter().filter_map(|name| answer.attributes()?.get(name)?.parse::<u64>().ok());
            sum += counts.sum::<u64>();
        }
        Ok(sum.saturating_sub(self.parked()))
    }

    /// Messages that failed and are hidden still.
    pub fn parked(&self) -> u64 {
        let mut parked = self.lock();
        let now = Instant::now();
        parked.retain(|_, until| *until > now);
        parked.len() as u64
    }

    pub(super) fn received(&self, messages: &[Message]) {
        let mut parked = self.lock();
        for id in messages.iter().filter_map(Message::message_id) {
            parked.remove(id);
        }
    }

    /// `message`, which came at `received`, failed, and is hidden for `visibility` from then on.
    pub(super) fn park(&self, message: &Message, received: Instant, visibility: Duration) {
        if let Some(id) = message.message_id() {
            self.lock().insert(id.to_owned(), received + visibility);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Instant>> {
        self.parked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
