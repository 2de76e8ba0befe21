//! What can start a function, told apart in one place: an HTTP request, a batch of SQS messages, or a schedule.

use crate::{
    Error, Result,
    config::Config,
    http::{self as web, Request, Response},
    metrics::{self, Metric},
    telemetry,
};
use ::http::{Method, StatusCode};
use aws_lambda_events::sqs::SqsEvent;
use lambda_runtime::{LambdaEvent, service_fn};
use serde::Deserialize;
use serde_json::{Value, json};
use std::{
    future::Future,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use tracing::Instrument;

/// One event of Lambda's.
pub enum Trigger {
    /// An HTTP API v2 or function-URL request.
    Http(Box<Request>),
    /// A batch from an SQS queue.
    Messages(Vec<Message>),
    /// A schedule's input, `{"job":"release"}`: the job's name.
    Job(String),
}

/// A message of a batch.
#[derive(Debug, Clone)]
pub struct Message {
    /// The id by which a failure is reported.
    pub id: String,
    /// The body as it was sent.
    pub body: String,
    /// How many times it was received, this one included.
    pub receive_count: u32,
}

/// The invocation that an event came with.
#[derive(Debug, Clone)]
pub struct Invocation {
    /// Lambda's request id.
    pub request_id: String,
    /// When Lambda ends the process.
    pub deadline: Instant,
}

impl Invocation {
    /// An invocation with `limit` from now on, for a function called in process.
    pub fn with_limit(request_id: impl Into<String>, limit: Duration) -> Self {
        Self { request_id: request_id.into(), deadline: Instant::now() + limit }
    }

    /// The last instant at which waiting still leaves time to answer.
    pub fn wait_until(&self) -> Instant {
        let now = Instant::now();
        let left = self.deadline.saturating_duration_since(now);
        now + left.saturating_sub(Duration::from_millis(1_500).min(left / 4))
    }
}

/// A function: what it does with each kind of event. What it does not take, it refuses loudly.
pub trait Function: Send + Sync + 'static {
    /// The largest body it accepts, in bytes.
    const BODY_LIMIT: usize = 1024 * 1024;

    /// Answers a request. `OPTIONS` and the body limit are dealt with before; an error becomes its JSON answer.
    fn http(&self, request: Request, invocation: &Invocation) -> impl Future<Output = Result<Response>> + Send;

    /// Works off a batch; returns the ids of the messages that failed and must come again.
    fn messages(&self, batch: Vec<Message>, invocation: &Invocation) -> impl Future<Output = Vec<String>> + Send {
        let _ = invocation;
        async move {
            tracing::error!("a batch arrived at a function that takes none");
            batch.into_iter().map(|message| message.id).collect()
        }
    }

    /// Runs a schedule's job; what it returns is for the log.
    fn job(&self, job: &str, invocation: &Invocation) -> impl Future<Output = Result<Value>> + Send {
        let _ = invocation;
        let refused = Error::internal(format!("there is no job {job} here"));
        async move { Err(refused) }
    }
}

/// Tells the trigger of an event. Error 400 for REST API v1 and load-balancer events, which are not spoken, and for anything else.
pub fn read(payload: Value) -> Result<Trigger> {
    #[derive(Deserialize)]
    struct Job {
        job: String,
    }
    let not_understood = |error: serde_json::Error| {
        Error::new(StatusCode::BAD_REQUEST, "event_not_understood", format!("the event cannot be read: {error}"))
    };
    if payload.get("Records").is_some() {
        let batch: SqsEvent = serde_json::from_value(payload).map_err(not_understood)?;
        return Ok(Trigger::Messages(batch.records.into_iter().map(message).collect()));
    }
    if payload.pointer("/requestContext/http").is_some() {
        let event = serde_json::from_value(payload).map_err(not_understood)?;
        return Ok(Trigger::Http(Box::new(Request::from_event(event)?)));
    }
    match serde_json::from_value::<Job>(payload) {
        Ok(Job { job }) => Ok(Trigger::Job(job)),
        Err(_) => Err(Error::new(
            StatusCode::BAD_REQUEST,
            "event_not_understood",
            "only HTTP API v2 and function-URL requests, SQS batches and schedules are understood",
        )),
    }
}

fn message(record: aws_lambda_events::sqs::SqsMessage) -> Message {
    let receive_count =
        record.attributes.get("ApproximateReceiveCount").and_then(|count| count.parse().ok()).unwrap_or(1);
    Message { id: record.message_id.unwrap_or_default(), body: record.body.unwrap_or_default(), receive_count }
}

/// Handles one event from start to answer.
pub async fn handle<F: Function>(function: &F, payload: Value, invocation: &Invocation) -> Result<Value> {
    match read(payload) {
        Ok(Trigger::Http(request)) => {
            let response = answer(function, *request, invocation).await;
            Ok(serde_json::to_value(web::to_event(response))?)
        }
        Ok(Trigger::Messages(batch)) => {
            let failed = function.messages(batch, invocation).await;
            let items: Vec<_> = failed.into_iter().map(|id| json!({ "itemIdentifier": id })).collect();
            Ok(json!({ "batchItemFailures": items }))
        }
        Ok(Trigger::Job(job)) => {
            tracing::Span::current().record("job", job.as_str());
            function.job(&job, invocation).await
        }
        // A load balancer or REST API is answered in the shape they share, so that its client sees a 400 and not a 502.
        Err(error) => Ok(json!({
            "statusCode": error.status.as_u16(),
            "headers": { "content-type": "application/json; charset=utf-8" },
            "body": error.body().to_string(),
        })),
    }
}

/// Answers a request: preflight, body limit, then the function; an error becomes its JSON answer.
pub async fn answer<F: Function>(function: &F, request: Request, invocation: &Invocation) -> Response {
    let mut response = if request.method == Method::OPTIONS {
        web::preflight()
    } else {
        let outcome = match request.bounded(F::BODY_LIMIT) {
            Ok(_) => function.http(request, invocation).await,
            Err(error) => Err(error),
        };
        outcome.unwrap_or_else(|error| {
            if error.status.is_server_error() {
                tracing::error!(code = error.code, message = error.message, "request failed");
            } else {
                let is_forged = error.code == Error::bad_signature().code;
                let metric = if is_forged { Metric::SignaturesRefused } else { Metric::RequestsRefused };
                metrics::count(metric, 1);
                tracing::info!(code = error.code, status = error.status.as_u16(), "request refused");
            }
            web::error(&error)
        })
    };
    web::allow_any_origin(&mut response);
    response
}

/// Runs a function under the Lambda runtime until the process ends: reads the environment, starts logging, then serves.
pub async fn run<F: Function>(build: impl FnOnce(Config) -> Result<F>) -> Result<(), lambda_runtime::Error> {
    let config = Config::from_env()?;
    telemetry::init(&config.log_level);
    let function = Arc::new(build(config)?);
    metrics::count(Metric::ColdStarts, 1);
    lambda_runtime::run(service_fn(move |event: LambdaEvent<Value>| {
        let function = Arc::clone(&function);
        // Boxed: the runtime's layers nest the type of this future deeper than the compiler likes.
        Box::pin(async move {
            let invocation = Invocation {
                request_id: event.context.request_id.clone(),
                deadline: Instant::now() + until(event.context.deadline),
            };
            let span = tracing::info_span!(
                "invocation",
                request_id = invocation.request_id,
                job = tracing::field::Empty,
                organization_id = tracing::field::Empty,
                attempt_id = tracing::field::Empty,
            );
            let handled = handle(&*function, event.payload, &invocation).instrument(span).await;
            // Afterwards the process is frozen.
            metrics::flush();
            handled.map_err(lambda_runtime::Error::from)
        })
    }))
    .await
}

/// From now to an instant in milliseconds of the unix epoch.
fn until(deadline_ms: u64) -> Duration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Duration::from_millis(deadline_ms).saturating_sub(now)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo;
    impl Function for Echo {
        const BODY_LIMIT: usize = 4;
        async fn http(&self, request: Request, _: &Invocation) -> Result<Response> {
            web::json(&json!({ "path": request.path }))
        }
        async fn messages(&self, batch: Vec<Message>, _: &Invocation) -> Vec<String> {
            batch.into_iter().filter(|m| m.body == "bad").map(|m| m.id).collect()
        }
    }

    fn http_event(method: &str, body: &str) -> Value {
        json!({
            "version": "2.0", "rawPath": "/functions/v1/echo/x", "rawQueryString": "", "headers": {},
            "requestContext": {"http": {"method": method}, "stage": "$default", "timeEpoch": 0},
            "body": body, "isBase64Encoded": false
        })
    }

    async fn run_echo(payload: Value) -> Value {
        handle(&Echo, payload, &Invocation::with_limit("r", Duration::from_secs(1))).await.unwrap()
    }

    #[tokio::test]
    async fn a_preflight_is_answered_before_the_function() {
        let answer = run_echo(http_event("OPTIONS", "")).await;
        assert_eq!(answer["statusCode"], 204);
        assert_eq!(answer["headers"]["access-control-allow-origin"], "*");
    }

    #[tokio::test]
    async fn an_oversized_body_is_413_and_names_the_body() {
        let answer = run_echo(http_event("POST", "12345")).await;
        assert_eq!(answer["statusCode"], 413);
        let body: Value = serde_json::from_str(answer["body"].as_str().unwrap()).unwrap();
        assert_eq!(body["details"]["field"], "body");
    }

    #[tokio::test]
    async fn only_the_failed_messages_come_again() {
        let record = |id: &str, body: &str| json!({"messageId": id, "body": body, "attributes": {"ApproximateReceiveCount": "2"}});
        let answer = run_echo(json!({"Records": [record("1", "good"), record("2", "bad")]})).await;
        assert_eq!(answer, json!({"batchItemFailures": [{"itemIdentifier": "2"}]}));
    }

    #[tokio::test]
    async fn rest_v1_and_load_balancer_events_get_400() {
        let rest = json!({"resource": "/", "path": "/", "httpMethod": "GET", "requestContext": {}});
        let balancer = json!({"requestContext": {"elb": {}}, "httpMethod": "GET", "path": "/"});
        for event in [rest, balancer, json!({}), json!(1)] {
            assert_eq!(run_echo(event).await["statusCode"], 400);
        }
    }

    #[tokio::test]
    async fn a_job_that_is_not_known_is_an_error_so_that_the_schedule_s_dead_letter_has_it() {
        let invocation = Invocation::with_limit("r", Duration::from_secs(1));
        assert!(handle(&Echo, json!({"job": "nope"}), &invocation).await.is_err());
    }
}
