//! The carriers' official SDKs: what we sign they verify, what they sign we accept, and they write the documents that we write.

use anyhow::{Context, Result, ensure};
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use local::parts::{
    folder::{self, RunFolder},
    install::{self, CarrierSdk},
    progress::Progress,
};
use serde_json::{Value, json};
use shared::telephony::carrier::{self, Answer, Connect, Credentials, Dial, Rejection, Signed};
use std::fs;
use tests::{
    deliveries::{Account, CARRIERS, Call, recorded},
    programs,
    stack::PUBLIC_ORIGIN,
};
use tokio::process::Command;
use uuid::Uuid;

const PATH: &str = "/functions/v1/webhook-intake/x/status/token";

async fn ask(settings: &Value) -> Result<Value> {
    let folder = RunFolder::create()?;
    folder::require_program("node", "to run the carriers' SDKs")?;
    let program = folder.path().join("carriers.mjs");
    fs::copy(folder::workspace()?.join("tests/clients/carriers.mjs"), &program)?;
    // More than an environment takes.
    let file = folder.path().join("settings.json");
    fs::write(&file, settings.to_string())?;
    let output = Command::new("node")
        .arg(&program)
        .env("TRUNKLINE", &file)
        .env_remove("NODE_OPTIONS")
        .kill_on_drop(true)
        .output()
        .await?;
    ensure!(output.status.success(), "the SDKs failed: {}", String::from_utf8_lossy(&output.stderr));
    programs::last_json(&String::from_utf8_lossy(&output.stdout))
}

async fn folders() -> Result<Value> {
    let mut folders = json!({});
    for (name, sdk) in [
        ("plivo", CarrierSdk::Plivo),
        ("twilio", CarrierSdk::Twilio),
        ("telnyx", CarrierSdk::Telnyx),
        ("vonage", CarrierSdk::Vonage),
    ] {
        folders[name] = json!(install::carrier_sdk(sdk, &Progress::hidden()).await?);
    }
    Ok(folders)
}

/// Every recorded delivery, signed by us, and each a second time with something changed in it.
fn signed_by_us() -> Result<Vec<Value>> {
    let mut requests = Vec::new();
    for name in CARRIERS {
        let account = Account::new(name);
        let call = Call {
            attempt: None,
            sid: Uuid::new_v4().to_string(),
            from: "+14155550111".to_owned(),
            to: "+14155550100".to_owned(),
        };
        // Telnyx's SDK reads what it has verified, and knows no TeXML.
        for delivery in recorded(name)?.into_iter().filter(|delivery| name != "telnyx" || delivery.json.is_some()) {
            let event = account.send(PATH, &call, &delivery)?;
            let body = String::from_utf8(event.sent_body().to_vec())?;
            let mut request = json!({
                "carrier": name, "url": format!("{PUBLIC_ORIGIN}{PATH}"), "headers": event.payload()["headers"], "body": body,
                "form": form_urlencoded::parse(body.as_bytes()).collect::<Vec<_>>(),
                "credentials": serde_json::from_str::<Value>(&account.credentials())?, "is_good": true,
            });
            requests.push(request.clone());
            request["is_good"] = json!(false);
            match name {
                // Vonage's SDK looks at the token alone.
                "vonage" => request["credentials"]["signature_secret"] = json!("another"),
                "telnyx" => request["body"] = json!(format!("{body} ")),
                _ => request["form"][0][1] = json!("another"),
            }
            requests.push(request);
        }
    }
    Ok(requests)
}

/// What Twilio's SDK is to sign.
fn to_sign() -> Vec<Value> {
    let url = format!("{PUBLIC_ORIGIN}{PATH}");
    let form = json!([
        ["CallSid", "CA1"],
        ["CallerName", ""],
        ["To", "+14155550100"],
        ["City", "São Paulo & more"],
        ["x", "b"],
        ["x", "a"],
        ["x", "a"]
    ]);
    vec![
        json!({ "url": url, "form": form, "json": null, "token": "t1" }),
        json!({ "url": format!("{url}?b=2&a=%7Bx%7D"), "form": form, "json": null, "token": "t2" }),
        json!({ "url": url, "form": [], "json": null, "token": "t3" }),
        json!({ "url": url, "form": [], "json": "{\"a\": \"हाँ\"}", "token": "t4" }),
        json!({ "url": format!("{url}?q=1"), "form": [], "json": "{}", "token": "t5" }),
    ]
}

fn we_accept(asked: &Value, told: &Value, signature: &str) -> Result<bool> {
    let (content_type, body) = match asked["json"].as_str() {
        Some(json) => ("application/json", json.to_owned()),
        None => {
            let pairs = asked["form"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|pair| (pair[0].as_str().unwrap_or_default(), pair[1].as_str().unwrap_or_default()));
            (
                "application/x-www-form-urlencoded",
                form_urlencoded::Serializer::new(String::new()).extend_pairs(pairs).finish(),
            )
        }
    };
    let headers = HeaderMap::from_iter([
        (HeaderName::from_static("content-type"), HeaderValue::from_static(content_type)),
        (HeaderName::from_static("x-twilio-signature"), HeaderValue::from_str(signature)?),
    ]);
    let url = told["url"].as_str().context("a URL")?;
    let signed = Signed { method: &Method::POST, url, headers: &headers, body: body.as_bytes() };
    let credentials = Credentials::read(asked["token"].as_str().context("a token")?);
    Ok(carrier::by_name("twilio").context("no twilio")?.verify(&credentials, &signed, 0))
}

const URL: &str = "wss://voice.example.com/stream/x/y";
/// Without a quote, since plivo-node writes one as it is into an attribute.
const CALLBACK: &str = "https://calls.example.com/t?a=1&b=<'>";
const NAMED: &[(&str, &str)] = &[("attempt", "01J9Z"), ("name", "O'Neil & \"Sons\" <x>")];

fn documents() -> Vec<(&'static str, &'static str, Answer<'static>)> {
    let dial = Answer::Dial(Dial {
        to: "+14155550199",
        caller_id: "+14155550111",
        timeout: 30,
        time_limit: 60,
        action: Some(CALLBACK),
        ..Dial::default()
    });
    let connect = |recorded, parameters| {
        Answer::Connect(Connect {
            url: URL,
            parameters,
            stream_callback: Some(CALLBACK),
            recording_callback: recorded,
            after: None,
        })
    };
    vec![
        ("plivo", "connect", connect(Some(CALLBACK), &[])),
        ("plivo", "dial", dial.clone()),
        ("plivo", "hangup", Answer::Hangup),
        ("plivo", "busy", Answer::Reject(Rejection::Busy)),
        ("twilio", "connect", connect(None, NAMED)),
        ("twilio", "dial", dial),
        ("twilio", "hangup", Answer::Hangup),
        ("twilio", "busy", Answer::Reject(Rejection::Busy)),
    ]
}

/// The elements of a document, whatever the order of their attributes.
fn elements(xml: &str) -> Result<Vec<String>> {
    let document = roxmltree::Document::parse(xml).with_context(|| xml.to_owned())?;
    let elements = document.descendants().filter(roxmltree::Node::is_element).map(|node| {
        let mut attributes: Vec<String> =
            node.attributes().map(|attribute| format!("{}={}", attribute.name(), attribute.value())).collect();
        attributes.sort();
        format!("{} {attributes:?} {:?}", node.tag_name().name(), node.text().map(str::trim))
    });
    Ok(elements.collect())
}

#[tokio::test]
async fn the_official_sdks_and_we_are_of_one_mind() -> Result<()> {
    let (requests, to_sign, documents) = (signed_by_us()?, to_sign(), documents());
    let wanted: Vec<Value> = documents
        .iter()
        .map(|(carrier, what, _)| json!({ "carrier": carrier, "what": what, "url": URL, "callback": CALLBACK, "parameters": NAMED, "to": "+14155550199", "caller": "+14155550111" }))
        .collect();
    let said =
        ask(&json!({ "folders": folders().await?, "requests": requests, "to_sign": to_sign, "documents": wanted }))
            .await?;

    let verdicts = said["verdicts"].as_array().context("verdicts")?;
    assert_eq!(verdicts.len(), requests.len());
    for (request, verdict) in requests.iter().zip(verdicts) {
        assert_eq!(verdict, &request["is_good"], "{request:#}");
    }
    let signatures = said["signatures"].as_array().context("signatures")?;
    assert_eq!(signatures.len(), to_sign.len());
    for (asked, told) in to_sign.iter().zip(signatures) {
        let signature = told["signature"].as_str().context("a signature")?;
        assert!(we_accept(asked, told, signature)?, "{asked} {told}");
        let other: String = signature.chars().rev().collect();
        assert!(!we_accept(asked, told, &other)?, "{asked}");
    }
    for ((name, what, answer), written) in documents.iter().zip(said["written"].as_array().context("documents")?) {
        let ours = carrier::by_name(name).context("no carrier")?.answer(answer).body;
        assert_eq!(elements(&ours)?, elements(written.as_str().context("a document")?)?, "{name} {what}");
    }
    Ok(())
}
