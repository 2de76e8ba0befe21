//! Each adapter sends what its carrier's official SDK sends for the same call.

use anyhow::{Context, Result, ensure};
use axum::{Json, Router, body::Bytes, extract::State, http::Request};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use local::parts::{
    folder::{self, RunFolder},
    install::{self, CarrierSdk},
    progress::Progress,
};
use serde_json::{Map, Value, json};
use shared::telephony::{
    CallbackEvent,
    api::{self, Account, Create, Wanted},
    carrier::{self, Credentials},
};
use std::{
    fs,
    sync::{Arc, Mutex, PoisonError},
};
use tests::programs;
use tokio::{net::TcpListener, process::Command, task::JoinHandle};
use uuid::Uuid;

const SDKS: [(&str, CarrierSdk); 4] = [
    ("plivo", CarrierSdk::Plivo),
    ("twilio", CarrierSdk::Twilio),
    ("telnyx", CarrierSdk::Telnyx),
    ("vonage", CarrierSdk::Vonage),
];
/// Twilio's SDK takes no other.
const ACCOUNT: &str = "AC1";
const FROM: &str = "+14155550111";
const TO: &str = "+14155550100";
const STREAM: &str = "wss://voice.example.com/stream/a/b";

/// A request as it came over the wire, as far as it is the same whenever it is made.
#[derive(Debug, Clone, PartialEq)]
struct Seen {
    method: String,
    target: String,
    /// The scheme, and what it says of the account.
    authorization: (String, Value),
    content_type: String,
    body: Value,
}

type Log = Arc<Mutex<Vec<Seen>>>;

/// A form's pairs, sorted; or JSON; or nothing.
fn read_body(content_type: &str, body: &[u8]) -> Value {
    if content_type == "application/x-www-form-urlencoded" {
        let mut pairs: Vec<(String, String)> = form_urlencoded::parse(body).into_owned().collect();
        pairs.sort();
        return json!(pairs);
    }
    serde_json::from_slice(body).unwrap_or(Value::Null)
}

/// Of a token of Vonage's the header and the names of its claims, with the application; of others everything.
fn read_authorization(header: &str) -> (String, Value) {
    let (scheme, rest) = header.split_once(' ').unwrap_or((header, ""));
    let parts: Vec<Value> = rest
        .split('.')
        .take(2)
        .filter_map(|part| serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).ok()?).ok())
        .collect();
    let [token, claims] = parts.as_slice() else { return (scheme.to_owned(), json!(rest)) };
    let mut names: Vec<&String> = claims.as_object().into_iter().flat_map(Map::keys).collect();
    names.sort();
    let lasts = claims["exp"].as_i64().unwrap_or(i64::MAX) - claims["iat"].as_i64().unwrap_or_default() <= 900;
    (scheme.to_owned(), json!([token["alg"], token["typ"], names, claims["application_id"], lasts]))
}

async fn keep(State(log): State<Log>, request: Request<axum::body::Body>) -> Json<Value> {
    let (parts, body) = request.into_parts();
    let body: Bytes = axum::body::to_bytes(body, 1 << 20).await.unwrap_or_default();
    let header = |name: &str| parts.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let content_type = header("content-type").split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let read = read_body(&content_type, &body);
    // An SDK may name the type of nothing, or send an object without anything in it.
    let is_empty = read.is_null() || read == json!({});
    let seen = Seen {
        method: parts.method.to_string(),
        target: parts.uri.to_string(),
        authorization: read_authorization(header("authorization")),
        content_type: if is_empty { String::new() } else { content_type },
        body: if is_empty { Value::Null } else { read },
    };
    log.lock().unwrap_or_else(PoisonError::into_inner).push(seen);
    Json(json!({ "request_uuid": "i", "sid": "i", "uuid": "i", "data": { "call_control_id": "i" } }))
}

struct Listener {
    url: String,
    log: Log,
    server: JoinHandle<()>,
}

impl Listener {
    async fn start() -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let url = format!("http://{}", listener.local_addr()?);
        let log = Log::default();
        let router = Router::new().fallback(keep).with_state(Arc::clone(&log));
        let server = tokio::spawn(async move {
            let _ended = axum::serve(listener, router).await;
        });
        Ok(Self { url, log, server })
    }

    fn take(&self) -> Vec<Seen> {
        std::mem::take(&mut *self.log.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.server.abort();
    }
}

fn callbacks() -> Vec<(CallbackEvent, String)> {
    CallbackEvent::ALL
        .into_iter()
        .map(|event| (event, format!("https://calls.example.com/x/{}/t#rc=3&rp=ct,rt,5xx", event.as_str())))
        .collect()
}

/// The call in the words of each SDK, as its documentation has it: not taken from what the adapters make of it.
fn in_their_words(carrier: &str, attempt: Uuid) -> Value {
    let callback = |event: &str| format!("https://calls.example.com/x/{event}/t#rc=3&rp=ct,rt,5xx");
    match carrier {
        "plivo" => json!({
            "from": FROM, "to": TO, "answer_url": callback("answer"), "ring_url": callback("ring"),
            "hangup_url": callback("hangup"), "ring_timeout": 30, "time_limit": 600, "machine_detection": "true",
        }),
        "twilio" => json!({
            "from": FROM, "to": TO, "url": callback("answer"), "statusCallback": callback("status"),
            "statusCallbackEvent": ["initiated", "ringing", "answered", "completed"], "timeout": 30, "timeLimit": 600,
            "machineDetection": "Enable", "asyncAmd": "true", "asyncAmdStatusCallback": callback("machine"),
            "record": true, "recordingChannels": "dual", "recordingStatusCallback": callback("recording"),
        }),
        "telnyx" => {
            let state = base64::engine::general_purpose::STANDARD.encode(attempt.to_string());
            json!({
                "connection_id": ACCOUNT, "from": FROM, "to": TO, "command_id": attempt, "client_state": state,
                "webhook_url": callback("status"), "webhook_url_method": "POST", "timeout_secs": 30, "time_limit_secs": 600,
                "answering_machine_detection": "detect", "stream_url": STREAM, "stream_track": "inbound_track",
                "stream_bidirectional_mode": "rtp", "stream_bidirectional_codec": "PCMU", "record": "record-from-answer",
                "record_channels": "dual", "record_format": "mp3",
            })
        }
        _ => json!({
            "to": [{ "type": "phone", "number": "14155550100" }], "from": { "type": "phone", "number": "14155550111" },
            "answerUrl": [callback("answer")], "answerMethod": "POST", "eventUrl": [callback("status")], "eventMethod": "POST",
            "machineDetection": "continue", "lengthTimer": 600, "ringingTimer": 30,
        }),
    }
}

/// What the account is opened with, as the SDK and as the adapter have it.
fn credentials(carrier: &str, key: &str) -> (String, Credentials) {
    let (secret, sealed) = match carrier {
        "telnyx" => ("KEY".to_owned(), json!({ "api_key": "KEY" })),
        "vonage" => (key.to_owned(), json!({ "application_id": ACCOUNT, "private_key": key })),
        _ => ("token".to_owned(), json!({ "auth_token": "token" })),
    };
    (secret, Credentials::read(&sealed.to_string()))
}

async fn private_key() -> Result<String> {
    let program = "console.log(require('node:crypto').generateKeyPairSync('rsa', { modulusLength: 2048, \
                   privateKeyEncoding: { type: 'pkcs8', format: 'pem' }, publicKeyEncoding: { type: 'spki', format: 'pem' } }).privateKey)";
    let output = Command::new("node").args(["-e", program]).output().await?;
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

#[tokio::test]
async fn each_adapter_sends_what_the_official_sdk_sends() -> Result<()> {
    folder::require_program("node", "to run the carriers' SDKs")?;
    let (listener, attempt, key) = (Listener::start().await?, Uuid::from_u128(7), private_key().await?);
    let mut folders = json!({});
    for (name, sdk) in SDKS {
        folders[name] = json!(install::carrier_sdk(sdk, &Progress::hidden()).await?);
    }
    let mut calls = Vec::new();
    for (name, _) in SDKS {
        for what in ["create", "hangup", "lookup"] {
            calls.push(json!({
                "carrier": name, "what": what, "account": ACCOUNT, "secret": credentials(name, &key).0, "id": "call-1",
                "call": in_their_words(name, attempt),
            }));
        }
    }

    let folder = RunFolder::create()?;
    let (program, settings) = (folder.path().join("wire.mjs"), folder.path().join("settings.json"));
    fs::copy(folder::workspace()?.join("tests/clients/wire.mjs"), &program)?;
    fs::write(&settings, json!({ "folders": folders, "listener": listener.url, "calls": calls }).to_string())?;
    let output = Command::new("node")
        .arg(&program)
        .env("TRUNKLINE", &settings)
        .env_remove("NODE_OPTIONS")
        .kill_on_drop(true)
        .output()
        .await?;
    ensure!(output.status.success(), "the SDKs failed: {}", String::from_utf8_lossy(&output.stderr));
    let said = programs::last_json(&String::from_utf8_lossy(&output.stdout))?;
    let theirs = listener.take();
    ensure!(theirs.len() == calls.len(), "{said} {theirs:#?}");

    let http = shared::supabase::http_client()?;
    for (name, _) in SDKS {
        let carrier = carrier::by_name(name).context("no such carrier")?;
        let account = Account::new(carrier, ACCOUNT, credentials(name, &key).1, &listener.url, true)?;
        let call = Create {
            attempt_id: attempt,
            from: FROM,
            to: TO,
            callbacks: &callbacks(),
            stream_url: Some(STREAM),
            ring_timeout: 30,
            time_limit: 600,
            record: true,
        };
        let _outcome = api::create(carrier, &http, &account, &call).await;
        api::hang_up(carrier, &http, &account, "call-1").await?;
        let since = chrono::Utc::now();
        let wanted =
            Wanted { attempt_id: attempt, provider_call_id: Some("call-1"), from: FROM, to: TO, since, others: &[] };
        let _found = api::look_up(carrier, &http, &account, &wanted).await;
    }
    // Plivo is asked for a live call before its record, which is what its SDK asks for.
    let ours: Vec<Seen> = listener.take().into_iter().filter(|seen| !seen.target.contains("status=live")).collect();
    assert_eq!(ours.len(), theirs.len(), "{ours:#?}");
    for ((ours, theirs), asked) in ours.iter().zip(&theirs).zip(&calls) {
        assert_eq!(ours, theirs, "{} {}", asked["carrier"], asked["what"]);
    }
    Ok(())
}
