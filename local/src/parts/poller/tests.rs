use super::*;
use crate::parts::{lambda::tests::Stage, sqs};
use axum::{Json, Router, extract::State, http::HeaderMap, routing::post};
use serde_json::{Value, json};
use std::{
    sync::{Arc, Mutex},
    time::Instant,
};
use url::Url;

const TEMPLATE: &str = r#"
Resources:
  WorkQueue: {Type: AWS::SQS::Queue, Properties: {QueueName: !Sub "${AWS::StackName}-work", VisibilityTimeout: 6}}
  Echo:
    Type: AWS::Serverless::Function
    Properties:
      CodeUri: functions/echo
      Timeout: 1
      Environment: {Variables: {}}
      Events:
        Work:
          Type: SQS
          Properties:
            Queue: !GetAtt WorkQueue.Arn
            FunctionResponseTypes: [ReportBatchItemFailures]
            ScalingConfig: {MaximumConcurrency: 2}
"#;

/// An SQS of one queue that gives each of its batches once, and remembers what it was asked.
#[derive(Clone, Default)]
struct FakeSqs(Arc<Mutex<Asked>>);

#[derive(Default)]
struct Asked {
    batches: Vec<Vec<&'static str>>,
    receives: Vec<Value>,
    deletes: Vec<Value>,
}

impl FakeSqs {
    async fn serve(&self) -> Client {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = Url::parse(&format!("http://{}/", listener.local_addr().unwrap())).unwrap();
        let router = Router::new().route("/", post(answer)).with_state(self.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        sqs::client(&url)
    }

    fn offer(&self, batch: &[&'static str]) {
        self.0.lock().unwrap().batches.push(batch.to_vec());
    }

    /// The receipt handles of each deletion, once there were `count`.
    async fn deletions(&self, count: usize) -> Vec<Vec<String>> {
        let begun = Instant::now();
        loop {
            let deletes = self.0.lock().unwrap().deletes.clone();
            if deletes.len() >= count || begun.elapsed() > Duration::from_secs(5) {
                let handles = |delete: &Value| {
                    let entries = delete["Entries"].as_array().unwrap().iter();
                    entries.map(|entry| entry["ReceiptHandle"].as_str().unwrap().to_owned()).collect()
                };
                return deletes.iter().map(handles).collect();
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

async fn answer(State(fake): State<FakeSqs>, headers: HeaderMap, body: String) -> Json<Value> {
    let request: Value = serde_json::from_str(&body).unwrap();
    match headers["x-amz-target"].to_str().unwrap() {
        "AmazonSQS.ReceiveMessage" => {
            let batch = {
                let mut asked = fake.0.lock().unwrap();
                asked.receives.push(request);
                asked.batches.pop()
            };
            if batch.is_none() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            let message = |body: &&str| json!({ "MessageId": format!("id-{body}"), "ReceiptHandle": format!("handle-{body}"), "Body": body });
            Json(json!({ "Messages": batch.unwrap_or_default().iter().map(message).collect::<Vec<_>>() }))
        }
        "AmazonSQS.DeleteMessageBatch" => {
            fake.0.lock().unwrap().deletes.push(request);
            Json(json!({ "Successful": [], "Failed": [] }))
        }
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn what_was_done_is_deleted_in_one_request_and_what_failed_is_left() {
    let stage = Stage::new(None);
    let template = Template::parse(TEMPLATE).unwrap();
    let functions = stage.start_template(&template, 1).await.unwrap();
    let fake = FakeSqs::default();
    fake.offer(&["a", "fail", "b"]);
    let urls = BTreeMap::from([("WorkQueue".to_owned(), "http://localhost/0/trunkline-work".to_owned())]);
    let poller = Poller::start(&template, &fake.serve().await, &urls, &functions, MessageFaults::default()).unwrap();
    assert_eq!(fake.deletions(1).await, [["handle-a", "handle-b"]]);

    // A whole batch that fails, for the function's own reasons or because its process dies, is left alone, and the poller goes on.
    fake.offer(&["die", "c"]);
    fake.offer(&["fail"]);
    tokio::time::sleep(Duration::from_millis(300)).await;
    fake.offer(&["d"]);
    assert_eq!(fake.deletions(2).await, [vec!["handle-a", "handle-b"], vec!["handle-d"]]);
    // `fail`, whose id is one for both, and `die` with `c` beside it.
    assert_eq!(poller.backlog().parked(), 3);
    poller.stop().await;

    let receive = fake.0.lock().unwrap().receives[0].clone();
    assert_eq!(receive["MaxNumberOfMessages"], 10);
    assert_eq!(receive["WaitTimeSeconds"], 20);
    assert_eq!(receive["MessageSystemAttributeNames"], json!(["All"]));
    functions.stop().await;
}

#[tokio::test]
async fn a_queue_that_is_not_there_is_an_error() {
    let stage = Stage::new(None);
    let template = Template::parse(TEMPLATE).unwrap();
    let functions = stage.start_template(&template, 1).await.unwrap();
    let error = Poller::start(
        &template,
        &FakeSqs::default().serve().await,
        &BTreeMap::new(),
        &functions,
        MessageFaults::default(),
    )
    .unwrap_err();
    assert!(error.to_string().contains("WorkQueue has no URL"), "{error}");
    functions.stop().await;
}
