//! The example of an agent, unmodified: it takes a call's socket by its token, answers with sound, and its report is on the call.

use super::*;
use axum::{
    Router,
    body::Bytes,
    extract::State,
    response::{IntoResponse, Response},
};
use http::{HeaderMap, StatusCode, Uri};
use local::parts::{
    folder::{self, RunFolder},
    install,
    progress::Progress,
};
use shared::telephony::stream_token;
use std::{fs, process::Stdio, sync::Arc};
use tests::{agents, programs};
use tokio::io::{AsyncBufReadExt, BufReader};
use webhook_intake::Intake;

/// The intake behind HTTP, as API Gateway puts it there.
async fn served(State(intake): State<Arc<Intake>>, uri: Uri, headers: HeaderMap, body: Bytes) -> Response {
    let mut event = HttpEvent::post(uri.path()).body(body.to_vec());
    for (name, value) in &headers {
        event = event.header(name.as_str(), value.to_str().unwrap_or_default());
    }
    match event.send(&*intake).await {
        Ok(answer) => (StatusCode::from_u16(answer.status).unwrap_or_default(), answer.body).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

#[tokio::test]
async fn the_example_of_an_agent_takes_a_call_and_reports_it() -> Result<()> {
    let (stack, campaign) = running(1).await?;
    let call = campaign.dial(&stack).await?.pop().context("not dialled")?;
    let intake = Arc::new(stack.intake()?);
    let source = agents::connect(&stack, &intake, &campaign.tenant, "agent", json!({})).await?;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let origin = format!("http://{}", listener.local_addr()?);
    let server = tokio::spawn(async move {
        let router = Router::new().fallback(served).with_state(intake);
        let _ended = axum::serve(listener, router).await;
    });

    let run = RunFolder::create()?;
    std::os::unix::fs::symlink(install::websockets(&Progress::hidden()).await?, run.path().join("node_modules"))?;
    let workspace = folder::workspace()?;
    for file in ["examples/agent/agent.mjs", "tests/clients/caller.mjs"] {
        let name = file.rsplit('/').next().unwrap_or_default();
        fs::copy(workspace.join(file), run.path().join(name))?;
    }
    let secrets = stack.keys.secrets()?;
    let token = token_of(&call, &secrets)?;
    let key = stream_token::agent_key(&secrets.callback_keys[0].key, token.agent_id);
    let hexadecimal: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut agent = tokio::process::Command::new("node")
        .arg(run.path().join("agent.mjs"))
        .env("AGENT_KEY", hexadecimal)
        .env("TRUNKLINE_URL", format!("{origin}/functions/v1"))
        .env("REPORT_URL", format!("{origin}{}", agents::path("agent", source.id)))
        .env("REPORT_SECRET", &source.secret)
        .env("PORT", "0")
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let mut lines = BufReader::new(agent.stdout.take().context("no output")?).lines();
    let line = tokio::time::timeout(Duration::from_secs(60), lines.next_line()).await??.context("it ended")?;
    let port = line.rsplit(' ').next().unwrap_or_default().to_owned();

    let until = chrono::Utc::now().timestamp() + 60;
    let good = stream_token::sign(&secrets.callback_keys, token.agent_id, token.attempt_id, until).unwrap_or_default();
    let url = |token: &str, attempt| format!("ws://127.0.0.1:{port}/stream/{attempt}/{token}");
    // The token of one call opens no other's socket.
    let asked = json!({ "url": url(&good, token.attempt_id), "forged": url(&good, Uuid::new_v4()) });
    let output = tokio::process::Command::new("node")
        .arg(run.path().join("caller.mjs"))
        .env("CALL", asked.to_string())
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await?;
    let said = programs::last_json(&String::from_utf8_lossy(&output.stdout))
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    assert_eq!((&said["forged"], &said["second"]), (&json!(403), &json!(409)), "{said}");
    assert_eq!((&said["sounds"], &said["bytes"]), (&json!(51), &json!(4_000 + 50 * 160)), "{said}");

    let told = "select concat_ws(' ', summary, first_audio_ms < 2000) from public.call_logs";
    for _ in 0..100 {
        if !stack.value("select summary from public.call_logs").await?.is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(stack.value(told).await?, "Repeated 1.0 seconds of what the caller said. t");
    assert_eq!(stack.value("select count(*) from public.websocket_sessions").await?, "0");
    server.abort();
    Ok(())
}
