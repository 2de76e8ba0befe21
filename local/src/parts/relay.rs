//! Delivers the queue of `net.http_post` over HTTP, as pg_net's worker does, with its weaknesses: a batch of two hundred is taken in one
//! transaction and sent at once, the next batch waits for the slowest of them, and nothing is ever sent again. Only when the transaction
//! breaks after sending does the batch come back, and is sent twice.

use anyhow::{Context, Result};
use futures::{StreamExt, future, stream};
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_postgres::{AsyncMessage, Client, NoTls, Row};

/// Most requests in a batch, as pg_net's `pg_net.batch_size`.
const BATCH: usize = 200;
/// How long to sleep when nothing wakes us, as pg_net does.
const IDLE: Duration = Duration::from_secs(1);
/// How long to wait before a lost database is tried again.
const RECONNECT: Duration = Duration::from_millis(250);

const TAKE: &str = "
    delete from net.http_request_queue
    where id in (select id from net.http_request_queue order by id limit 200)
    returning id, method::text, url, headers, body, timeout_milliseconds";
const KEEP: &str = "
    insert into net._http_response (id, status_code, content_type, headers, content, timed_out, error_msg)
    select id, status_code, content_type, headers, content, timed_out, error_msg
    from jsonb_to_recordset($1) as response (
      id bigint, status_code integer, content_type text, headers jsonb, content text, timed_out boolean, error_msg text)";
const FORGET: &str = "delete from net._http_response where created < now() - interval '6 hours'";

/// The running relay.
#[derive(Debug)]
pub struct Relay {
    task: JoinHandle<()>,
}

impl Relay {
    /// Starts it on the database at `database_url`, with a role that may read and empty the queue. Fails when it cannot connect;
    /// a connection lost later is made again.
    pub async fn start(database_url: String) -> Result<Self> {
        // A second installation in one process keeps the first.
        let _already = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder().no_proxy().user_agent("pg_net/0.20.4").build()?;
        let mut database = Database::connect(&database_url).await?;
        let task = tokio::spawn(async move {
            loop {
                if let Err(error) = database.deliver(&http).await {
                    tracing::warn!("the relay lost the database: {error:#}");
                }
                database = loop {
                    tokio::time::sleep(RECONNECT).await;
                    if let Ok(again) = Database::connect(&database_url).await {
                        break again;
                    }
                };
            }
        });
        Ok(Self { task })
    }

    /// Stops it. Requests on their way are dropped, and sent again by whoever takes over.
    pub async fn stop(mut self) {
        self.task.abort();
        let _aborted = (&mut self.task).await;
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Database {
    client: Client,
    wakes: mpsc::Receiver<()>,
}

impl Database {
    async fn connect(url: &str) -> Result<Self> {
        let (client, mut connection) =
            tokio_postgres::connect(url, NoTls).await.context("the relay cannot reach the database")?;
        let (wake, wakes) = mpsc::channel(1);
        tokio::spawn(async move {
            let mut messages = stream::poll_fn(move |context| connection.poll_message(context));
            while let Some(Ok(message)) = messages.next().await {
                if matches!(message, AsyncMessage::Notification(_)) {
                    // One that is not yet seen stands for all.
                    let _already_woken = wake.try_send(());
                }
            }
        });
        client.batch_execute("listen net_wake").await?;
        Ok(Self { client, wakes })
    }

    /// Delivers batch after batch, until the database is lost.
    async fn deliver(&mut self, http: &reqwest::Client) -> Result<()> {
        loop {
            while self.deliver_batch(http).await? == BATCH {}
            if let Ok(None) = tokio::time::timeout(IDLE, self.wakes.recv()).await {
                anyhow::bail!("the connection was closed");
            }
        }
    }

    async fn deliver_batch(&mut self, http: &reqwest::Client) -> Result<usize> {
        let transaction = self.client.transaction().await?;
        let rows = transaction.query(TAKE, &[]).await?;
        if rows.is_empty() {
            transaction.rollback().await?;
            return Ok(0);
        }
        let responses = future::join_all(rows.iter().map(|row| send(http, row))).await;
        transaction.execute(KEEP, &[&Value::Array(responses)]).await?;
        transaction.execute(FORGET, &[]).await?;
        transaction.commit().await?;
        Ok(rows.len())
    }
}

/// Sends one request; what came of it as a row of `net._http_response`.
async fn send(http: &reqwest::Client, row: &Row) -> Value {
    let (id, timeout_ms): (i64, i32) = (row.get("id"), row.get("timeout_milliseconds"));
    let begun = Instant::now();
    match exchange(http, row, Duration::from_millis(u64::try_from(timeout_ms).unwrap_or(0))).await {
        Ok(mut response) => {
            response["id"] = json!(id);
            response["timed_out"] = json!(false);
            response
        }
        Err(error) => {
            let timed_out = error.downcast_ref::<reqwest::Error>().is_some_and(reqwest::Error::is_timeout);
            let message = if timed_out {
                let took = begun.elapsed().as_secs_f64() * 1_000.0;
                format!("Timeout of {timeout_ms} ms reached. Total time: {took:.3} ms")
            } else {
                format!("{error:#}")
            };
            json!({ "id": id, "timed_out": timed_out, "error_msg": message })
        }
    }
}

async fn exchange(http: &reqwest::Client, row: &Row, timeout: Duration) -> Result<Value> {
    let method = Method::from_bytes(row.get::<_, String>("method").to_ascii_uppercase().as_bytes())?;
    let headers: Option<Value> = row.get("headers");
    let body: Option<Vec<u8>> = row.get("body");
    let mut request =
        http.request(method, row.get::<_, String>("url")).timeout(timeout).headers(header_map(headers.as_ref())?);
    if let Some(body) = body {
        request = request.body(body);
    }
    let response = request.send().await?;
    let status = response.status().as_u16();
    let content_type = response.headers().get("content-type").and_then(|value| value.to_str().ok()).map(str::to_owned);
    let headers: Value = response
        .headers()
        .iter()
        .filter_map(|(name, value)| Some((name.to_string(), json!(value.to_str().ok()?))))
        .collect::<serde_json::Map<_, _>>()
        .into();
    // Postgres's text knows no zero byte.
    let content = String::from_utf8_lossy(&response.bytes().await?).replace('\0', "");
    Ok(json!({ "status_code": status, "content_type": content_type, "headers": headers, "content": content }))
}

fn header_map(headers: Option<&Value>) -> Result<HeaderMap> {
    let given = headers.and_then(Value::as_object).into_iter().flatten();
    given
        .map(|(name, value)| {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            Ok((HeaderName::try_from(name)?, HeaderValue::try_from(text)?))
        })
        .collect()
}
