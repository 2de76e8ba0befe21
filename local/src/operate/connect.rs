//! `connect`: the last step of a deployment. The database is told where the functions are and with what key it nudges them, and a nudge
//! shows that they take it.

use super::{aws, table};
use crate::parts::postgres;
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use std::{io::Read, time::Duration};
use url::Url;

/// What a stack is connected with.
#[derive(Debug, Args)]
pub struct Connect {
    /// The CloudFormation stack, whose outputs FunctionsUrl and SecretArn are asked for.
    #[arg(long, required_unless_present = "functions_url")]
    stack: Option<String>,
    /// The functions' address, ending in /functions/v1, in place of the stack's output.
    #[arg(long, value_name = "URL")]
    functions_url: Option<String>,
    /// Read the nudge key from the standard input, in place of the stack's secret.
    #[arg(long)]
    key_from_stdin: bool,
    /// The database, as its owner: the session pooler's or the direct address, of the project's settings.
    #[arg(long, value_name = "URL", env = "DATABASE_URL", hide_env_values = true)]
    database_url: String,
    /// Where AWS is, for an emulator of it.
    #[arg(long, value_name = "URL", env = "AWS_ENDPOINT_URL")]
    aws_url: Option<Url>,
    /// Say what would be done, and do nothing.
    #[arg(long)]
    dry_run: bool,
    /// Do not send a nudge afterwards.
    #[arg(long)]
    no_nudge: bool,
}

/// Does it, and says what to print. Nothing of the key is printed.
pub async fn run(command: &Connect) -> Result<String> {
    let (functions_url, key) = told(command).await?;
    let functions_url = functions_url.trim_end_matches('/');
    ensure!(functions_url.ends_with("/functions/v1"), "{functions_url} does not end in /functions/v1");
    let client = postgres::connect(&command.database_url).await.context("the database")?;
    if command.dry_run {
        let known = "select count(*) from pg_proc where oid = to_regprocedure('private.connect_functions(text,text)')";
        let is_there = client.query_one(known, &[]).await?.get::<_, i64>(0) == 1;
        ensure!(is_there, "the database has not the migrations yet: supabase db push");
        return Ok(format!("would put {functions_url} and the stack's nudge key into Vault\n"));
    }
    let row = client.query_one("select private.connect_functions($1, $2)::text", &[&functions_url, &key]).await;
    let told: serde_json::Value =
        serde_json::from_str(&row.context("private.connect_functions()")?.get::<_, String>(0))?;
    let mut rows: Vec<Vec<String>> = ["trunkline_functions_url", "trunkline_nudge_key"]
        .map(|name| vec![format!("Vault: {name}"), told[name].as_str().unwrap_or_default().to_owned()])
        .into();
    for hook in told["database_webhooks"].as_array().into_iter().flatten().filter_map(|hook| hook.as_str()) {
        rows.push(vec!["database webhook".to_owned(), hook.to_owned()]);
    }
    if !command.no_nudge {
        for function in ["call-dispatch", "event-delivery", "webhook-intake"] {
            let answered = nudge(functions_url, function, &key).await?;
            rows.push(vec![format!("nudge of {function}"), answered]);
        }
    }
    Ok(table(&["what", "is"], &rows))
}

async fn told(command: &Connect) -> Result<(String, String)> {
    let from_stdin = command.key_from_stdin.then(read_key).transpose()?;
    if let (Some(url), Some(key)) = (&command.functions_url, &from_stdin) {
        return Ok((url.clone(), key.clone()));
    }
    let Some(stack) = &command.stack else { bail!("--stack says where the key is; or give it with --key-from-stdin") };
    let config = aws::config().await;
    let outputs = aws::outputs(&config, stack, command.aws_url.as_ref()).await?;
    let output = |name: &str| outputs.get(name).cloned().with_context(|| format!("{stack} gives out no {name}"));
    let url = command.functions_url.clone().map_or_else(|| output("FunctionsUrl"), Ok)?;
    let key = match from_stdin {
        Some(key) => key,
        None => {
            let secret = aws::secret(&config, &output("SecretArn")?, command.aws_url.as_ref()).await?;
            secret["nudge_keys"][0].as_str().context("the stack's secret has no nudge_keys")?.to_owned()
        }
    };
    Ok((url, key))
}

fn read_key() -> Result<String> {
    let mut text = String::new();
    std::io::stdin().take(1_024).read_to_string(&mut text)?;
    Ok(text.trim().to_owned())
}

/// A nudge as the database sends it: what the function answers proves that it has the same key.
async fn nudge(functions_url: &str, function: &str, key: &str) -> Result<String> {
    let (id, now) = (format!("msg_{}", uuid::Uuid::new_v4().simple()), chrono::Utc::now().timestamp());
    let body = r#"{"type": "nudge"}"#;
    let signature = shared::standard_webhooks::sign(key, &id, now, body.as_bytes()).context("that is no nudge key")?;
    let answer = shared::supabase::http_client()?
        .post(format!("{functions_url}/{function}/nudge"))
        .timeout(Duration::from_secs(30))
        .header("content-type", "application/json")
        .header("webhook-id", id)
        .header("webhook-timestamp", now)
        .header("webhook-signature", signature)
        .body(body)
        .send()
        .await
        .map_err(reqwest::Error::without_url)
        .with_context(|| format!("{function} does not answer"))?;
    let status = answer.status();
    ensure!(
        status.is_success(),
        "{function} answered {status} to a nudge: {}",
        match status.as_u16() {
            403 => "it has another key; a rotated one is known within five minutes",
            404 => "the address leads elsewhere",
            _ => "its log says why",
        }
    );
    Ok("taken".to_owned())
}
