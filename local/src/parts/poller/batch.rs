//! What Lambda makes of a batch of messages, and of a function's answer to it.

use aws_sdk_sqs::types::{Message, MessageAttributeValue};
use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Map, Value, json};
use std::collections::{BTreeSet, HashMap};

/// Where messages come from, as each record tells.
#[derive(Debug, Clone)]
pub(super) struct Source {
    pub(super) arn: String,
    pub(super) region: String,
}

impl Source {
    /// The event that carries `messages`, as JSON.
    pub(super) fn event(&self, messages: &[Message]) -> String {
        let records: Vec<_> = messages.iter().map(|message| self.record(message)).collect();
        json!({ "Records": records }).to_string()
    }

    fn record(&self, message: &Message) -> Value {
        let attributes: Map<_, _> = message
            .attributes()
            .into_iter()
            .flatten()
            .map(|(name, value)| (name.as_str().to_owned(), json!(value)))
            .collect();
        let mut record = json!({
            "messageId": message.message_id(),
            "receiptHandle": message.receipt_handle(),
            "body": message.body(),
            "attributes": attributes,
            "messageAttributes": message_attributes(message.message_attributes()),
            "md5OfBody": message.md5_of_body(),
            "eventSource": "aws:sqs",
            "eventSourceARN": self.arn,
            "awsRegion": self.region,
        });
        if let Some(md5) = message.md5_of_message_attributes() {
            record["md5OfMessageAttributes"] = json!(md5);
        }
        record
    }
}

fn message_attributes(attributes: Option<&HashMap<String, MessageAttributeValue>>) -> Map<String, Value> {
    let one = |value: &MessageAttributeValue| {
        let mut out = json!({ "dataType": value.data_type(), "stringListValues": [], "binaryListValues": [] });
        if let Some(text) = value.string_value() {
            out["stringValue"] = json!(text);
        }
        if let Some(bytes) = value.binary_value() {
            out["binaryValue"] = json!(STANDARD.encode(bytes));
        }
        out
    };
    attributes.into_iter().flatten().map(|(name, value)| (name.clone(), one(value))).collect()
}

/// What becomes of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Every message is deleted.
    AllDone,
    /// All but these are deleted.
    SomeFailed(BTreeSet<String>),
    /// None is deleted; why.
    AllFailed(String),
}

impl Verdict {
    /// Whether the message called `id` failed.
    pub(super) fn failed(&self, id: &str) -> bool {
        match self {
            Self::AllDone => false,
            Self::SomeFailed(ids) => ids.contains(id),
            Self::AllFailed(_) => true,
        }
    }
}

/// Reads a function's answer under `ReportBatchItemFailures`, by AWS's rules: nothing reported is success; an answer that is not
/// understood, or a message in it that is empty or not of this batch, fails the whole batch.
pub(super) fn judge(answer: &[u8], messages: &[Message]) -> Verdict {
    let failed = |why: &str| Verdict::AllFailed(why.to_owned());
    let Ok(answer) = serde_json::from_slice::<Value>(answer) else {
        return failed("the answer is not JSON");
    };
    let items = match &answer {
        Value::Null => return Verdict::AllDone,
        Value::Object(answer) => answer.get("batchItemFailures").unwrap_or(&Value::Null),
        _ => return failed("the answer is no object"),
    };
    let items = match items {
        Value::Null => return Verdict::AllDone,
        Value::Array(items) => items,
        _ => return failed("batchItemFailures is no list"),
    };
    let mut ids = BTreeSet::new();
    for item in items {
        match item.get("itemIdentifier").and_then(Value::as_str) {
            Some(id) if messages.iter().any(|message| message.message_id() == Some(id)) => ids.insert(id.to_owned()),
            Some("") | None => return failed("an itemIdentifier is missing or empty"),
            Some(_) => return failed("an itemIdentifier is not of this batch"),
        };
    }
    if ids.is_empty() { Verdict::AllDone } else { Verdict::SomeFailed(ids) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_sdk_sqs::{primitives::Blob, types::MessageSystemAttributeName};

    fn batch() -> [Message; 3] {
        ["a", "b", "c"]
            .map(|id| Message::builder().message_id(id).receipt_handle(format!("handle-{id}")).body("{}").build())
    }

    #[test]
    fn nothing_reported_is_success() {
        for answer in ["null", "{}", r#"{"batchItemFailures":[]}"#, r#"{"batchItemFailures":null}"#] {
            assert_eq!(judge(answer.as_bytes(), &batch()), Verdict::AllDone, "{answer}");
        }
    }

    #[test]
    fn only_what_is_reported_failed() {
        let answer = br#"{"batchItemFailures":[{"itemIdentifier":"c"},{"itemIdentifier":"a"},{"itemIdentifier":"c"}]}"#;
        let verdict = judge(answer, &batch());
        assert!(verdict.failed("a") && !verdict.failed("b") && verdict.failed("c"), "{verdict:?}");
    }

    #[test]
    fn what_is_not_understood_fails_the_whole_batch() {
        for answer in [
            "",
            "{",
            r#""done""#,
            r#"{"batchItemFailures":"a"}"#,
            r#"{"batchItemFailures":[{"itemIdentifier":""}]}"#,
            r#"{"batchItemFailures":[{"itemIdentifier":null}]}"#,
            r#"{"batchItemFailures":[{"itemIdentifier":7}]}"#,
            r#"{"batchItemFailures":[{"identifier":"a"}]}"#,
            r#"{"batchItemFailures":["a"]}"#,
            r#"{"batchItemFailures":[{"itemIdentifier":"a"},{"itemIdentifier":"of another batch"}]}"#,
        ] {
            let verdict = judge(answer.as_bytes(), &batch());
            assert!(matches!(verdict, Verdict::AllFailed(_)), "{answer}: {verdict:?}");
            assert!(verdict.failed("b"));
        }
    }

    #[test]
    fn a_record_is_as_lambda_writes_it() {
        let message = Message::builder()
            .message_id("a")
            .receipt_handle("handle")
            .body("{\"v\":1}")
            .md5_of_body("5d41")
            .attributes(MessageSystemAttributeName::ApproximateReceiveCount, "2")
            .attributes(MessageSystemAttributeName::MessageGroupId, "tenant")
            .message_attributes(
                "n",
                MessageAttributeValue::builder().data_type("Number").string_value("1").build().unwrap(),
            )
            .message_attributes(
                "b",
                MessageAttributeValue::builder().data_type("Binary").binary_value(Blob::new(b"hi")).build().unwrap(),
            )
            .build();
        let source = Source {
            arn: "arn:aws:sqs:us-east-1:000000000000:trunkline-dial".to_owned(),
            region: "us-east-1".to_owned(),
        };
        let event: Value = serde_json::from_str(&source.event(&[message])).unwrap();
        let record = json!({
            "messageId": "a",
            "receiptHandle": "handle",
            "body": "{\"v\":1}",
            "attributes": { "ApproximateReceiveCount": "2", "MessageGroupId": "tenant" },
            "messageAttributes": {
                "n": { "dataType": "Number", "stringValue": "1", "stringListValues": [], "binaryListValues": [] },
                "b": { "dataType": "Binary", "binaryValue": "aGk=", "stringListValues": [], "binaryListValues": [] },
            },
            "md5OfBody": "5d41",
            "eventSource": "aws:sqs",
            "eventSourceARN": "arn:aws:sqs:us-east-1:000000000000:trunkline-dial",
            "awsRegion": "us-east-1",
        });
        assert_eq!(event, json!({ "Records": [record] }));
    }
}
