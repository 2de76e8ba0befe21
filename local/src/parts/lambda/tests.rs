use super::*;
use crate::parts::folder::RunFolder;
use http::{Request, StatusCode};
use serde_json::{Value, json};
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    time::{Duration, Instant},
};

const TEMPLATE: &str = r#"
Parameters:
  LogLevel: {Type: String, Default: info}
Globals:
  Function:
    Environment: {Variables: {LOG_LEVEL: !Ref LogLevel, PUBLIC_ORIGIN: !Ref PublicOrigin}}
Resources:
  Echo:
    Type: AWS::Serverless::Function
    Properties:
      CodeUri: functions/echo
      Timeout: 1
      MemorySize: 256
      Events: {Api: {Type: HttpApi, Properties: {Method: ANY, Path: "/functions/v1/echo/{proxy+}"}}}
"#;

/// The same with time enough for a machine that is busy with other tests.
fn patient() -> Template {
    Template::parse(&TEMPLATE.replace("Timeout: 1", "Timeout: 30")).unwrap()
}

/// Stands for a function's binary: the test executable, started again to run [`a_function_process`] alone.
pub(in crate::parts) struct Stage {
    folder: RunFolder,
}

impl Stage {
    pub(in crate::parts) fn new(script: Option<&str>) -> Self {
        let folder = RunFolder::create().unwrap();
        let us = std::env::current_exe().unwrap();
        let ours = format!(
            "#!/bin/sh\nexec {} --exact parts::lambda::tests::a_function_process --ignored --nocapture\n",
            us.display()
        );
        let binary = folder.path().join("echo");
        fs::write(&binary, script.unwrap_or(&ours)).unwrap();
        fs::set_permissions(&binary, fs::Permissions::from_mode(0o755)).unwrap();
        Self { folder }
    }

    async fn start(&self, workers: usize) -> Result<Functions> {
        self.start_template(&Template::parse(TEMPLATE)?, workers).await
    }

    pub(in crate::parts) async fn start_template(&self, template: &Template, workers: usize) -> Result<Functions> {
        let environment =
            [("PUBLIC_ORIGIN", "https://api.example.com"), ("SECRET_ARN", "not for echo"), ("AWS_X", "x")];
        let options = LambdaOptions {
            binaries: self.folder.path().to_owned(),
            environment: environment.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
            workers,
            log_dir: self.folder.path().to_owned(),
        };
        Functions::start(template, options).await
    }
}

/// A runtime as small as can be: does what the event says. Of a batch it fails the messages that say so.
#[tokio::test]
#[ignore = "a process of the other tests here"]
async fn a_function_process() {
    let Ok(api) = std::env::var("AWS_LAMBDA_RUNTIME_API") else { return };
    let base = format!("http://{api}/2018-06-01/runtime");
    let client = crate::parts::http_client().unwrap();
    loop {
        let next = client.get(format!("{base}/invocation/next")).send().await.unwrap();
        let headers: BTreeMap<_, _> =
            next.headers().iter().map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned())).collect();
        let id = &headers["lambda-runtime-aws-request-id"];
        let event: Value = next.json().await.unwrap();
        let post = |path: &str, body: String| client.post(format!("{base}/invocation/{id}/{path}")).body(body);
        let answer = match event["do"].as_str() {
            Some("sleep") => {
                tokio::time::sleep(Duration::from_millis(event["ms"].as_u64().unwrap())).await;
                event["ms"].to_string()
            }
            Some("die") => std::process::exit(3),
            Some("fail") => {
                let failure = json!({ "errorType": "Refused", "errorMessage": "no" }).to_string();
                let post = post("error", failure).header("lambda-runtime-function-error-type", "Refused");
                assert_eq!(post.send().await.unwrap().status(), StatusCode::ACCEPTED);
                continue;
            }
            Some("swell") => "x".repeat(PAYLOAD_LIMIT + 1),
            Some("environment") => {
                json!({ "variables": std::env::vars().collect::<BTreeMap<_, _>>(), "headers": headers }).to_string()
            }
            _ => match event["Records"].as_array() {
                Some(records) if records.iter().any(|record| record["body"] == "die") => std::process::exit(4),
                Some(records) => {
                    let failed = records.iter().filter(|record| record["body"] == "fail");
                    let items: Vec<_> = failed.map(|record| json!({ "itemIdentifier": record["messageId"] })).collect();
                    json!({ "batchItemFailures": items }).to_string()
                }
                None => event.to_string(),
            },
        };
        // A late answer is refused, and a process that is killed as it sends learns nothing.
        let _late = post("response", answer).send().await;
    }
}

fn response(outcome: &InvocationOutcome) -> Value {
    match outcome {
        InvocationOutcome::Response(body) => serde_json::from_slice(body).unwrap(),
        other => panic!("{other:?}"),
    }
}

fn failure(outcome: InvocationOutcome) -> (String, String) {
    match outcome {
        InvocationOutcome::FunctionError { error_type, payload } => {
            let payload: Value = serde_json::from_slice(&payload).unwrap();
            (error_type, payload["errorMessage"].as_str().unwrap().to_owned())
        }
        other => panic!("{other:?}"),
    }
}

fn event(value: Value) -> Bytes {
    value.to_string().into()
}

#[tokio::test]
async fn an_event_reaches_a_process_and_its_answer_comes_back() {
    let stage = Stage::new(None);
    let functions = stage.start(2).await.unwrap();
    let invoker = functions.invoker();
    assert_eq!(response(&invoker.invoke("echo", event(json!({ "a": 1 }))).await), json!({ "a": 1 }));
    let (kind, message) = failure(invoker.invoke("echo", event(json!({ "do": "fail" }))).await);
    assert_eq!((kind.as_str(), message.as_str()), ("Refused", "no"));
    assert_eq!(failure(invoker.invoke("nobody", Bytes::new()).await).0, "ResourceNotFoundException");
    assert_eq!(invoker.activity(), Activity { queued: 0, in_flight: 0, started: 2, failed: 1 });
    let (kind, _) = failure(invoker.invoke("echo", event(json!({ "do": "swell" }))).await);
    assert_eq!(kind, "Function.ResponseSizeTooLarge");
    functions.stop().await;
    assert_eq!(failure(invoker.invoke("echo", event(json!({}))).await).0, "Runtime.ExitError");
}

#[tokio::test]
async fn a_process_knows_what_lambda_and_the_template_tell_it_and_nothing_else() {
    let stage = Stage::new(None);
    let functions = stage.start(1).await.unwrap();
    let before = chrono::Utc::now().timestamp_millis();
    let told = response(&functions.invoker().invoke("echo", event(json!({ "do": "environment" }))).await);
    let after = chrono::Utc::now().timestamp_millis();
    let variables = told["variables"].as_object().unwrap();
    for (name, value) in [
        ("AWS_LAMBDA_FUNCTION_NAME", "echo"),
        ("AWS_LAMBDA_FUNCTION_VERSION", "$LATEST"),
        ("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "256"),
        ("AWS_LAMBDA_LOG_FORMAT", "JSON"),
        ("AWS_X", "x"),
        ("LOG_LEVEL", "info"),
        ("PUBLIC_ORIGIN", "https://api.example.com"),
    ] {
        assert_eq!(variables[name], value, "{name}");
    }
    for name in ["HOME", "USER", "SECRET_ARN", "CARGO_MANIFEST_DIR"] {
        assert!(!variables.contains_key(name), "{name}");
    }
    let headers = &told["headers"];
    let deadline: i64 = headers["lambda-runtime-deadline-ms"].as_str().unwrap().parse().unwrap();
    assert!((before + 1_000..=after + 1_000).contains(&deadline));
    assert_eq!(headers["lambda-runtime-invoked-function-arn"], "arn:aws:lambda:us-east-1:000000000000:function:echo");
    assert!(headers["lambda-runtime-trace-id"].as_str().unwrap().starts_with("Root=1-"));
    functions.stop().await;
}

#[tokio::test]
async fn a_late_process_is_answered_for_killed_and_replaced() {
    let stage = Stage::new(None);
    let functions = stage.start(1).await.unwrap();
    let invoker = functions.invoker();
    let first = functions.processes("echo");
    let begun = Instant::now();
    let (kind, message) = failure(invoker.invoke("echo", event(json!({ "do": "sleep", "ms": 60_000 }))).await);
    assert_eq!(kind, "Sandbox.Timedout");
    assert!(message.ends_with("Task timed out after 1.00 seconds"), "{message}");
    assert!((Duration::from_secs(1)..Duration::from_secs(3)).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    assert_eq!(response(&invoker.invoke("echo", event(json!({ "again": true }))).await), json!({ "again": true }));
    let second = functions.processes("echo");
    assert!(second.len() == 1 && first != second, "{first:?} {second:?}");
    functions.stop().await;
}

#[tokio::test]
async fn a_process_that_dies_is_reported_at_once_and_replaced() {
    let stage = Stage::new(None);
    let functions = stage.start_template(&patient(), 1).await.unwrap();
    let invoker = functions.invoker();
    let (kind, message) = failure(invoker.invoke("echo", event(json!({ "do": "die" }))).await);
    assert_eq!(kind, "Runtime.ExitError");
    assert!(message.contains("exit status: 3"), "{message}");

    let begun = Instant::now();
    let slow = tokio::spawn({
        let invoker = invoker.clone();
        async move { invoker.invoke("echo", event(json!({ "do": "sleep", "ms": 60_000 }))).await }
    });
    while invoker.activity().in_flight == 0 || functions.processes("echo").is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // The event may be queued while the process is being replaced: killed too early, it is simply the next one's.
    tokio::time::sleep(Duration::from_millis(200)).await;
    let pid = functions.processes("echo")[0];
    assert!(std::process::Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
    let (kind, message) = failure(slow.await.unwrap());
    assert!(kind == "Runtime.ExitError" && message.contains("signal: 9"), "{kind} {message}");
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    assert_eq!(response(&invoker.invoke("echo", event(json!(5))).await), json!(5));
    functions.stop().await;
}

#[tokio::test]
async fn events_wait_their_turn_and_too_many_are_throttled() {
    let stage = Stage::new(None);
    let functions = stage.start_template(&patient(), 1).await.unwrap();
    let invoker = functions.invoker();
    let invoke = |value: Value| {
        let invoker = invoker.clone();
        tokio::spawn(async move { invoker.invoke("echo", event(value)).await })
    };
    let slow = invoke(json!({ "do": "sleep", "ms": 1_500 }));
    while invoker.activity().in_flight == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let waiting: Vec<_> = (0..1_000).map(|n| invoke(json!(n))).collect();
    while invoker.activity().queued < 1_000 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(invoke(json!("one more")).await.unwrap(), InvocationOutcome::Throttled);
    assert_eq!(response(&slow.await.unwrap()), json!(1_500));
    for (n, waited) in waiting.into_iter().enumerate() {
        assert_eq!(response(&waited.await.unwrap()), json!(n));
    }
    functions.stop().await;
}

#[tokio::test]
async fn a_function_that_cannot_start_says_why() {
    let missing = Stage::new(None);
    fs::remove_file(missing.folder.path().join("echo")).unwrap();
    let error = missing.start(1).await.unwrap_err().to_string();
    assert!(error.contains("echo is not built"), "{error}");
    let broken = Stage::new(Some("#!/bin/sh\necho PUBLIC_ORIGIN is not set >&2\nexit 1\n"));
    let error = broken.start(2).await.unwrap_err().to_string();
    assert!(error.contains("exit status: 1") && error.contains("PUBLIC_ORIGIN is not set"), "{error}");
}

#[tokio::test]
async fn a_request_becomes_an_event_and_an_answer_a_response() {
    let stage = Stage::new(None);
    let functions = stage.start(1).await.unwrap();
    let invoker = functions.invoker();
    let send = |request: Request<Bytes>| {
        let invoker = invoker.clone();
        async move { invoker.http(HttpRequest { request, source_ip: [127, 0, 0, 1].into() }).await }
    };
    let post = |body: &'static str| Request::post("/functions/v1/echo/a%20b?x=1").body(Bytes::from(body)).unwrap();
    // The fake function gives the event back, which has no status code, and so is the body of a 200.
    let answer = send(post("x=1&y=2")).await;
    assert_eq!(
        (answer.status(), &answer.headers()["content-type"]),
        (StatusCode::OK, &"application/json".parse().unwrap())
    );
    assert!(answer.headers().contains_key("apigw-requestid"));
    let event: Value = serde_json::from_slice(answer.body()).unwrap();
    assert_eq!(event["rawPath"], "/functions/v1/echo/a%20b");
    assert_eq!(event["isBase64Encoded"], true);
    let elsewhere = Request::get("/functions/v1/other/x").body(Bytes::new()).unwrap();
    let answer = send(elsewhere).await;
    assert_eq!((answer.status(), &answer.body()[..]), (StatusCode::NOT_FOUND, &br#"{"message":"Not Found"}"#[..]));
    let large = Request::post("/functions/v1/echo/x").body(Bytes::from(vec![b'x'; PAYLOAD_LIMIT])).unwrap();
    assert_eq!(send(large).await.status(), StatusCode::PAYLOAD_TOO_LARGE);
    functions.stop().await;
    let answer = send(post("")).await;
    assert_eq!(answer.status(), StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(&answer.body()[..], br#"{"message":"Internal Server Error"}"#);
}
