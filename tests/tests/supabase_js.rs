//! The unmodified `@supabase/supabase-js` against a running stack, and what a browser asks before it lets it.

use anyhow::{Context, Result, ensure};
use local::parts::{
    folder::{self, RunFolder},
    install,
    progress::Progress,
};
use serde_json::{Value, json};
use std::{collections::BTreeSet, fs, time::Duration};
use tests::{
    programs::{self, Program},
    supervisor_binary,
};
use tokio::process::Command;

const STARTED_WITHIN: Duration = Duration::from_secs(180);

/// Sends a request as a user, and fails unless it is taken.
async fn send(http: &reqwest::Client, up: &Value, path: &str, body: &Value) -> Result<Value> {
    let answer = http
        .post(format!("{}{path}", up["origin"].as_str().context("no origin")?))
        .header("apikey", up["publishable_key"].as_str().unwrap_or_default())
        .header("prefer", "return=representation")
        .bearer_auth(up["organizations"][0]["user_jwt"].as_str().unwrap_or_default())
        .json(body)
        .send()
        .await?;
    let (status, text) = (answer.status(), answer.text().await?);
    ensure!(status.is_success(), "{path}: {status} {text}");
    Ok(serde_json::from_str(&text)?)
}

/// Runs the client program; what it printed.
async fn run_client(folder: &RunFolder, settings: &Value) -> Result<Value> {
    folder::require_program("node", "to run the client")?;
    // A module is looked for beside the program that wants it.
    std::os::unix::fs::symlink(install::supabase_js(&Progress::hidden()).await?, folder.path().join("node_modules"))?;
    let program = folder.path().join("supabase_js.mjs");
    fs::copy(folder::workspace()?.join("tests/clients/supabase_js.mjs"), &program)?;
    let version = Command::new("node").arg("--version").output().await?.stdout;
    let major: u32 =
        String::from_utf8_lossy(&version).trim_start_matches('v').split('.').next().unwrap_or_default().parse()?;
    // The client wants a WebSocket, for Realtime; before 22 Node has one only when asked.
    let flags: &[&str] = if major < 22 { &["--experimental-websocket"] } else { &[] };
    let output = Command::new("node")
        .args(flags)
        .arg(&program)
        .env("TRUNKLINE", settings.to_string())
        .env_remove("NODE_OPTIONS")
        .kill_on_drop(true)
        .output()
        .await?;
    ensure!(output.status.success(), "the client failed: {}", String::from_utf8_lossy(&output.stderr));
    programs::last_json(&String::from_utf8_lossy(&output.stdout))
}

/// Asks as a browser does before it sends a request to another origin, and judges the answer as a browser does.
async fn preflight(http: &reqwest::Client, url: &str, method: &str, headers: &[String]) -> Result<()> {
    let answer = http
        .request(reqwest::Method::OPTIONS, url)
        .header("origin", "https://app.example.com")
        .header("access-control-request-method", method)
        .header("access-control-request-headers", headers.join(","))
        .header(
            "user-agent",
            "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/142.0 Safari/537.36",
        )
        .send()
        .await?;
    let allowed = |name: &str| -> BTreeSet<String> {
        let value = answer.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        value.split(',').map(|item| item.trim().to_ascii_lowercase()).collect()
    };
    ensure!(answer.status().is_success(), "OPTIONS {url}: {}", answer.status());
    ensure!(allowed("access-control-allow-origin").contains("*"), "OPTIONS {url} allows no origin");
    let methods = allowed("access-control-allow-methods");
    ensure!(
        ["GET", "POST"].contains(&method) || methods.contains(&method.to_ascii_lowercase()),
        "{method} {url}: {methods:?}"
    );
    let given = allowed("access-control-allow-headers");
    // A star does not stand for `authorization`.
    let missing: Vec<_> = headers.iter().filter(|name| !given.contains(*name)).collect();
    ensure!(missing.is_empty(), "OPTIONS {url} allows {given:?}, not {missing:?}");
    Ok(())
}

#[tokio::test]
async fn the_unmodified_client_reads_starts_and_counts_its_own_and_nothing_else() -> Result<()> {
    let (binaries, folder) = (programs::build(supervisor_binary!()).await?, RunFolder::create()?);
    let mut running = Program::start(&binaries.join("up"), &["--json"], folder.path()).await?;
    let up: Value = serde_json::from_str(&running.line(STARTED_WITHIN).await?)?;
    let http = local::parts::http_client()?;
    let phones = ["+919812000001", "+919812000002", "+919812000003"];
    let leads: Vec<Value> =
        phones.iter().map(|phone| json!({ "name": format!("Lead {phone}"), "phone": phone })).collect();
    send(&http, &up, "/rest/v1/leads", &json!(leads)).await?;
    let campaign =
        send(&http, &up, "/functions/v1/call-dispatch/campaigns", &json!({ "name": "From a web app" })).await?;

    let settings = json!({
        "origin": up["origin"], "key": up["publishable_key"], "campaign": campaign["id"],
        "users": { "other": up["organizations"][1]["user_jwt"], "own": up["organizations"][0]["user_jwt"] },
    });
    let said = run_client(&folder, &settings).await?;
    let (own, other) = (&said["told"]["own"], &said["told"]["other"]);
    for user in [own, other] {
        assert_eq!(user["errors"], json!([null, null]), "{said:#}");
    }
    let read: Vec<_> =
        own["leads"].as_array().into_iter().flatten().map(|lead| lead["phone"].as_str().unwrap_or_default()).collect();
    assert_eq!(read, phones);
    assert_eq!((&own["started"]["id"], &own["started"]["status"]), (&campaign["id"], &json!("running")), "{own:#}");
    assert_eq!(own["usage"]["organization_id"], up["organizations"][0]["organization_id"]);
    assert!(
        own["usage"]["meters"].as_array().is_some_and(|meters| meters.iter().any(|meter| meter["meter"] == "ai_calls")),
        "{own:#}"
    );

    assert_eq!((&other["leads"], &other["started"]), (&json!([]), &Value::Null), "{other:#}");
    assert_eq!(
        (&other["refusal"]["status"], &other["refusal"]["code"]),
        (&json!(404), &json!("campaign_not_found")),
        "{other:#}"
    );
    assert_eq!(other["usage"]["organization_id"], up["organizations"][1]["organization_id"]);

    let sent = said["sent"].as_array().context("what was sent")?;
    assert_eq!(sent.len(), 6);
    for request in sent {
        let headers: Vec<String> = serde_json::from_value(request["headers"].clone())?;
        assert!(headers.iter().any(|name| name == "authorization"), "{request}");
        preflight(
            &http,
            request["url"].as_str().unwrap_or_default(),
            request["method"].as_str().unwrap_or_default(),
            &headers,
        )
        .await?;
    }
    running.signal(libc::SIGINT);
    assert_eq!(running.end(Duration::from_secs(20)).await?.0, Some(0));
    Ok(())
}
