//! The binaries, as a person runs them: the demo's table, and what is left when they end, however they end.

use anyhow::{Context, Result};
use local::parts::{
    folder::{self, RunFolder},
    install,
    progress::Progress,
};
use serde_json::{Value, json};
use std::{collections::BTreeSet, fs, path::PathBuf, time::Duration};
use tests::{
    programs::{self, Program, all_gone, family, names},
    supervisor_binary,
};

/// On two cores that also run something else. Installing parts, the first time, is part of it.
const DEMO_WITHIN: Duration = Duration::from_secs(240);

struct Place {
    binaries: PathBuf,
    folder: RunFolder,
}

async fn place() -> Result<Place> {
    Ok(Place { binaries: programs::build(supervisor_binary!()).await?, folder: RunFolder::create()? })
}

impl Place {
    async fn demo(&self, args: &[&str]) -> Result<Program> {
        Program::start(&self.binaries.join("demo"), args, self.folder.path()).await
    }

    /// Runs a demo to its end; its numbers.
    async fn numbers(&self, args: &[&str]) -> Result<Value> {
        let mut demo = self.demo(args).await?;
        let (code, text) = demo.end(DEMO_WITHIN).await?;
        assert_eq!(code, Some(0), "{text}{}", demo.quote());
        programs::last_json(&text)
    }
}

fn number(numbers: &Value, key: &str) -> i64 {
    numbers[key].as_i64().unwrap_or_else(|| panic!("no integer {key} in {numbers}"))
}

/// The table is right by itself: each number follows from the others, and from the demo's plan.
fn assert_adds_up(numbers: &Value) {
    let n = |key| number(numbers, key);
    assert_eq!(
        (n("leads"), n("terminal"), n("open"), n("double_dials"), n("errors")),
        (200, 200, 0, 0, 0),
        "{numbers}"
    );
    assert_eq!((n("dials"), n("usage_calls")), (n("carrier_creates"), n("billable_calls")), "{numbers}");
    assert_eq!(n("usage_seconds"), n("carrier_bill_seconds"), "{numbers}");
    assert!(n("usage_calls") > 0 && n("dials") > n("leads") && n("elapsed_ms") > 0, "{numbers}");
    // 60 minutes are included; beyond, 6 rupees a minute, to the second. 999 rupees for the month, 9 % of each of two taxes.
    let overage = n("usage_seconds") - 3_600;
    assert!(overage > 0, "overage is a line of the invoice: {numbers}");
    assert_eq!(n("invoice_overage_seconds"), overage, "{numbers}");
    let subtotal = 99_900 + overage * 10;
    assert_eq!((n("invoice_lines_minor"), n("subtotal_minor")), (subtotal, subtotal), "{numbers}");
    let tax = 2 * ((subtotal * 900 + 5_000) / 10_000);
    assert_eq!((n("tax_minor"), n("invoice_total_minor")), (tax, subtotal + tax), "{numbers}");
}

#[tokio::test]
async fn the_demo_s_table_adds_up_alone_in_company_and_without_postgrest_for_a_while() -> Result<()> {
    let place = place().await?;
    // Two at once, which do not disturb each other.
    let (seven, eight) = tokio::join!(place.numbers(&["--json"]), place.numbers(&["--json", "--seed", "8"]));
    let (seven, eight) = (seven?, eight?);
    assert_adds_up(&seven);
    assert_adds_up(&eight);
    assert_ne!(number(&seven, "invoice_total_minor"), number(&eight, "invoice_total_minor"), "two seeds, two invoices");

    let interrupted = place.numbers(&["--json", "--kill-postgrest"]).await?;
    assert_adds_up(&interrupted);
    for key in [
        "dials",
        "usage_calls",
        "usage_seconds",
        "carrier_bill_seconds",
        "subtotal_minor",
        "tax_minor",
        "invoice_total_minor",
    ] {
        assert_eq!(number(&interrupted, key), number(&seven, key), "{key}");
    }
    assert_eq!(interrupted["outcomes"], seven["outcomes"]);
    Ok(())
}

/// The carriers that speak JSON, side by side: each has its own clock, database and carrier, and the same people to call.
#[tokio::test]
async fn the_demo_s_table_adds_up_at_every_carrier() -> Result<()> {
    let place = place().await?;
    let args = |provider| ["--json", "--calls", "12", "--provider", provider];
    let (telnyx, vonage) = (args("telnyx"), args("vonage"));
    let (telnyx, vonage) = tokio::join!(place.numbers(&telnyx), place.numbers(&vonage));
    let (telnyx, vonage) = (telnyx?, vonage?);
    for numbers in [&telnyx, &vonage] {
        let n = |key| number(numbers, key);
        assert_eq!((n("terminal"), n("open"), n("double_dials"), n("errors")), (12, 0, 0, 0), "{numbers}");
        assert_eq!((n("dials"), n("usage_calls")), (n("carrier_creates"), n("billable_calls")), "{numbers}");
        assert_eq!(n("usage_seconds"), n("carrier_bill_seconds"), "{numbers}");
        assert!(n("usage_calls") > 5 && n("dials") > n("leads"), "{numbers}");
    }
    // What becomes of a call is the callee's affair, and both bill by the second.
    for key in ["dials", "usage_calls", "usage_seconds"] {
        assert_eq!(number(&telnyx, key), number(&vonage, key), "{key}");
    }
    Ok(())
}

/// Small enough for CI; `--calls 10000` is the same at its full size.
#[tokio::test]
async fn a_demo_full_of_faults_and_with_its_switch_off_for_a_while_balances_all_the_same() -> Result<()> {
    let place = place().await?;
    let args = ["--json", "--faults", "severe", "--kill-switch", "--calls", "60", "--live-calls", "20"];
    let mut demo = place.demo(&args).await?;
    let (code, text) = demo.end(2 * DEMO_WITHIN).await?;
    assert_eq!(code, Some(0), "{text}{}", demo.quote());
    let numbers = programs::last_json(&text)?;
    let n = |key| number(&numbers, key);
    assert_eq!((n("terminal"), n("open"), n("double_dials"), n("errors")), (60, 0, 0, 0), "{numbers}");
    assert_eq!(n("usage_seconds"), n("carrier_bill_seconds"), "{numbers}");
    assert_eq!(number(&numbers["injected"], "database_stops"), 1, "{numbers}");
    Ok(())
}

/// Sends a request as the first organization's owner, or as `token` says; its status and body.
async fn ask(up: &Value, method: &str, path: &str, token: &str, body: &str) -> Result<(u16, Value)> {
    let answer = local::parts::http_client()?
        .request(method.parse()?, format!("{}{path}", up["origin"].as_str().context("no origin")?))
        .header("apikey", up["publishable_key"].as_str().unwrap_or_default())
        .header("content-type", "application/json")
        .header("origin", "https://app.example.com")
        .bearer_auth(token)
        .body(body.to_owned())
        .send()
        .await?;
    let allowed = answer.headers().get("access-control-allow-origin").and_then(|value| value.to_str().ok());
    assert_eq!(allowed, Some("*"), "a browser may read every answer: {method} {path}");
    Ok((answer.status().as_u16(), serde_json::from_str(&answer.text().await?).unwrap_or_default()))
}

#[tokio::test]
async fn the_running_functions_refuse_with_a_status_and_say_what_is_wrong() -> Result<()> {
    let place = place().await?;
    let mut running = Program::start(&place.binaries.join("up"), &["--json"], place.folder.path()).await?;
    let up: Value = serde_json::from_str(&running.line(DEMO_WITHIN).await?)?;
    let own = up["organizations"][0]["user_jwt"].as_str().context("no token")?;
    let other = up["organizations"][1]["user_jwt"].as_str().context("no token")?;
    let lead = json!({ "name": "Asha", "phone": "+919812345678" }).to_string();
    assert_eq!(ask(&up, "POST", "/rest/v1/leads?select=id", own, &lead).await?.0, 201);
    let campaigns = "/functions/v1/call-dispatch/campaigns";
    let (status, campaign) = ask(&up, "POST", campaigns, own, r#"{"name":"First"}"#).await?;
    assert_eq!(status, 201, "{campaign}");

    let start = format!("{campaigns}/{}/start", campaign["id"].as_str().unwrap_or_default());
    let callback = "/functions/v1/webhook-intake/plivo/hangup/forged.token";
    let large = "x".repeat(600 * 1024);
    // The last letters of a token are its signature.
    let tampered = format!("{}{}", &own[..own.len() - 6], if own.ends_with("AAAAAA") { "BBBBBB" } else { "AAAAAA" });
    for (what, method, path, token, body, expected) in [
        ("a made-up token in the URL", "POST", callback, own, "CallUUID=x", (403, "bad_token", "token")),
        ("too large a body", "POST", callback, own, large.as_str(), (413, "body_too_large", "body")),
        ("half a body", "POST", campaigns, own, "{", (400, "malformed_request", "body")),
        ("another organization's campaign", "POST", &start, other, "", (404, "campaign_not_found", "campaign_id")),
        ("a token with another signature", "POST", &start, &tampered, "", (401, "invalid_token", "")),
        ("no user's token", "POST", &start, "sb_publishable_x", "", (401, "unauthorized", "authorization")),
        ("no such route", "POST", "/functions/v1/call-dispatch/nothing", own, "", (404, "not_found", "")),
    ] {
        let (status, error) = ask(&up, method, path, token, body).await?;
        let field = error["details"]["field"].as_str().unwrap_or_default();
        let code = error["code"].as_str().unwrap_or_default();
        assert_eq!((status, code, field), expected, "{what}: {error}");
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{what}: {error}");
    }
    let read = format!("{campaigns}/{}", campaign["id"].as_str().unwrap_or_default());
    assert_eq!(ask(&up, "GET", &read, own, "").await?.1["status"], "draft", "none of them changed it");
    answers_as_the_document_says(&up).await?;
    running.signal(libc::SIGINT);
    assert_eq!(running.end(Duration::from_secs(20)).await?.0, Some(0));
    Ok(())
}

/// Asks every operation of `openapi.yaml`, with a client that knows the document alone.
async fn answers_as_the_document_says(up: &Value) -> Result<()> {
    let workspace = folder::workspace()?;
    let document: Value = serde_yaml_ng::from_str(&fs::read_to_string(workspace.join("openapi.yaml"))?)?;
    let run = RunFolder::create()?;
    let modules = install::webhook_verifiers(&Progress::hidden()).await?;
    std::os::unix::fs::symlink(modules, run.path().join("node_modules"))?;
    let program = run.path().join("openapi.mjs");
    fs::copy(workspace.join("tests/clients/openapi.mjs"), &program)?;
    let (own, given) = (&up["organizations"][0], run.path().join("given.json"));
    let told = json!({
        "document": document, "origin": up["origin"], "apikey": up["publishable_key"], "user": own["user_jwt"],
        "organization": own["api_key"],
    });
    fs::write(&given, told.to_string())?;
    let output =
        tokio::process::Command::new("node").arg(&program).env("OPENAPI", &given).kill_on_drop(true).output().await?;
    anyhow::ensure!(output.status.success(), "the client failed: {}", String::from_utf8_lossy(&output.stderr));
    let said = programs::last_json(&String::from_utf8_lossy(&output.stdout))?;
    assert_eq!(said["wrong"], json!([]), "{said:#}");
    assert!(said["operations"].as_u64().is_some_and(|count| count >= 47), "{said}");
    assert!(said["done"].as_object().is_some_and(|done| done.len() >= 29), "{said:#}");
    Ok(())
}

/// A demo in the middle of its calls, and every process of it.
async fn in_the_middle(place: &Place) -> Result<(Program, BTreeSet<u32>)> {
    let mut demo = place.demo(&["--json"]).await?;
    demo.has_said("live", DEMO_WITHIN).await.context("calls under way")?;
    let family = family(demo.id());
    let names = names(&family);
    // The kernel keeps fifteen letters of a name.
    for part in
        ["postgres", "postgrest", "python3", "call-dispatch", "webhook-intake", "usage-metering", "invoice-generat"]
    {
        assert!(names.iter().any(|name| name.starts_with(part)), "{part} in {names:?}");
    }
    Ok((demo, family))
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_demo_that_is_killed_leaves_no_process() -> Result<()> {
    let place = place().await?;
    let (mut demo, family) = in_the_middle(&place).await?;
    demo.signal(libc::SIGKILL);
    demo.end(Duration::from_secs(5)).await?;
    all_gone(&family).await
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn ctrl_c_ends_the_demo_and_all_that_it_started() -> Result<()> {
    let place = place().await?;
    let (mut demo, family) = in_the_middle(&place).await?;
    demo.signal(libc::SIGINT);
    let (code, _) = demo.end(Duration::from_secs(20)).await?;
    assert_eq!(code, Some(130));
    all_gone(&family).await
}
