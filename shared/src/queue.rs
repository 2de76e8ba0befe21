//! SQS: small messages that name a row; the row is the truth.

use crate::{Error, Result, config::Config, storage::Stored, telephony::CallReport};
use aws_sdk_sqs::{
    Client,
    types::{SendMessageBatchRequestEntry, builders::SendMessageBatchRequestEntryBuilder},
};
use aws_smithy_http_client::{
    Builder,
    tls::{self, rustls_provider::CryptoMode},
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, time::Duration};
use tokio::sync::OnceCell;
use uuid::Uuid;

/// The version of the message body that is written; a consumer takes this one and the one before.
pub const VERSION: u32 = 1;
/// SQS takes at most ten messages a request.
const BATCH: usize = 10;

/// The body of a message on every queue but `intake`: at most 1 KiB.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub struct Envelope {
    /// [`VERSION`].
    pub v: u32,
    /// What the message asks for, as `dial`.
    pub kind: String,
    /// The organization it is for; the message group, so that a tenant with many waits behind itself only.
    pub organization_id: String,
    /// The row that it names.
    pub id: String,
    /// RFC 3339, real time: after it the message is void.
    pub not_after: Option<String>,
}

/// The body of a message on the `intake` queue, the only one that carries what was received.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum IntakeMessage {
    /// A callback as it arrived, that the database could not take.
    Request {
        /// [`VERSION`].
        v: u32,
        /// Whether its signature was checked before it was buffered.
        verified: bool,
        /// When it came, in unix milliseconds: what is verified later is judged by that.
        #[serde(default)]
        received_at_ms: i64,
        /// Raw path.
        path: String,
        /// Raw query.
        query: String,
        /// The headers that a verification needs.
        headers: BTreeMap<String, String>,
        /// Raw body, base64; without the sound that came with it.
        body: String,
        /// Where that sound is.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        recording: Option<Stored>,
    },
    /// What the reconciler learnt from the carrier: applied by the same pipeline as a callback.
    Report {
        /// [`VERSION`].
        v: u32,
        /// The carrier account that was asked.
        source_id: Uuid,
        /// The attempt that it is about.
        attempt_id: Uuid,
        /// The key under which a repetition is known.
        dedupe_key: String,
        /// What the carrier said.
        call: Box<CallReport>,
    },
}

impl IntakeMessage {
    /// The message's body.
    pub fn to_json(&self) -> Result<String> {
        serde_json::to_string(self).map_err(|error| Error::internal(format!("an intake message is no JSON: {error}")))
    }
}

/// A message to send: its group (organization) and its body.
pub struct Outgoing {
    /// `MessageGroupId`.
    pub group: String,
    /// The body.
    pub body: String,
}

impl From<&Envelope> for Outgoing {
    fn from(envelope: &Envelope) -> Self {
        Self { group: envelope.organization_id.clone(), body: serde_json::json!(envelope).to_string() }
    }
}

/// A client of SQS, built when it is first used: most events queue nothing.
#[derive(Default)]
pub struct Queues {
    client: OnceCell<Client>,
}

impl Queues {
    async fn client(&self) -> &Client {
        self.client
            .get_or_init(|| async {
                let http = Builder::new().tls_provider(tls::Provider::Rustls(CryptoMode::Ring)).build_https();
                let config = aws_config::defaults(aws_config::BehaviorVersion::latest())
                    .http_client(http)
                    .timeout_config(
                        aws_config::timeout::TimeoutConfig::builder()
                            .connect_timeout(Duration::from_secs(1))
                            .operation_timeout(Duration::from_secs(5))
                            .build(),
                    )
                    .load()
                    .await;
                Client::new(&config)
            })
            .await
    }

    /// Sends messages to the queue `name`, ten a request. Returns the indexes of those that the queue did not take.
    pub async fn send(&self, config: &Config, name: &str, messages: &[Outgoing]) -> Result<Vec<usize>> {
        let url = config.queue_url(name)?;
        let client = self.client().await;
        let mut refused = Vec::new();
        for (chunk_index, chunk) in messages.chunks(BATCH).enumerate() {
            let first = chunk_index * BATCH;
            let entries = chunk
                .iter()
                .enumerate()
                .map(|(index, message)| entry(first + index, message))
                .collect::<Result<Vec<_>>>()?;
            match client.send_message_batch().queue_url(url).set_entries(Some(entries)).send().await {
                Ok(answer) => refused.extend(answer.failed().iter().filter_map(|f| f.id().parse::<usize>().ok())),
                Err(error) => {
                    tracing::warn!(queue = name, error = %aws_sdk_sqs::error::DisplayErrorContext(&error), "the queue took nothing");
                    refused.extend(first..first + chunk.len());
                }
            }
        }
        Ok(refused)
    }
}

fn entry(index: usize, message: &Outgoing) -> Result<SendMessageBatchRequestEntry> {
    SendMessageBatchRequestEntryBuilder::default()
        .id(index.to_string())
        .message_group_id(&message.group)
        .message_body(&message.body)
        .build()
        .map_err(|error| Error::internal(format!("a message cannot be built: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_envelope_stays_within_one_kibibyte() {
        let envelope = Envelope {
            v: VERSION,
            kind: "dial".to_owned(),
            organization_id: Uuid::max().to_string(),
            id: Uuid::max().to_string(),
            not_after: Some("2026-11-22T00:00:00.000000+00:00".to_owned()),
        };
        assert!(Outgoing::from(&envelope).body.len() <= 1024);
    }
}
