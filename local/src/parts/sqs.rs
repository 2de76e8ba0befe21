//! SQS and Secrets Manager, both by MiniStack: queues as `template.yaml` names them, and the stack's one secret.

use crate::parts::{
    install::MiniStack,
    postgres::free_port,
    process::{Command, Process},
    template::Template,
};
use anyhow::{Context, Result, bail};
use aws_sdk_sqs::{
    Client,
    config::{Credentials, Region},
    types::QueueAttributeName,
};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::Path,
    time::{Duration, Instant},
};
use tokio::time::sleep;
use url::Url;

/// The region that everything is in.
pub const REGION: &str = "us-east-1";
/// Account that MiniStack gives to whoever it does not know.
const ACCOUNT: &str = "000000000000";
/// Credentials are asked for by the clients' libraries and not looked at by the server.
const ACCESS_KEY: &str = "local";
/// How long it may take to answer.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How often a start is tried on another port.
const PORT_TRIES: usize = 5;

/// A running MiniStack.
#[derive(Debug)]
pub struct Sqs {
    /// Its endpoint, for every service of it.
    pub url: Url,
    process: Process,
}

impl Sqs {
    /// Starts it on a free port of 127.0.0.1. It writes only below `folder`; its log is `sqs.log` in `logs`.
    pub async fn start(installed: &MiniStack, folder: &Path, logs: &Path) -> Result<Self> {
        let scratch = folder.join("ministack");
        fs::create_dir_all(&scratch)?;
        let mut last = None;
        for _ in 0..PORT_TRIES {
            match start_once(installed, &scratch, logs).await {
                Ok(started) => return Ok(started),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| anyhow::anyhow!("MiniStack was not started")))
    }

    /// A client of its queues.
    pub fn client(&self) -> Client {
        client(&self.url)
    }

    /// Makes the template's queues, dead-letter queues and redrive included; their URLs by logical id.
    pub async fn create_queues(&self, template: &Template) -> Result<BTreeMap<String, String>> {
        let client = self.client();
        let mut urls = BTreeMap::new();
        for queue in &template.queues {
            let created = client
                .create_queue()
                .queue_name(&queue.name)
                .attributes(QueueAttributeName::VisibilityTimeout, queue.visibility_timeout.as_secs().to_string())
                .attributes(QueueAttributeName::MessageRetentionPeriod, queue.message_retention.as_secs().to_string())
                .send()
                .await
                .with_context(|| format!("cannot make queue {}", queue.name))?;
            let url = created.queue_url.with_context(|| format!("queue {} has no URL", queue.name))?;
            urls.insert(queue.logical_id.clone(), url);
        }
        // Only now: a policy names its dead-letter queue, which may stand later in the file.
        for queue in &template.queues {
            let Some(redrive) = &queue.redrive else { continue };
            let dead = template.queues.iter().find(|other| other.logical_id == redrive.target).with_context(|| {
                format!("queue {} redrives to {}, which is no queue", queue.logical_id, redrive.target)
            })?;
            let policy = json!({
                "deadLetterTargetArn": format!("arn:aws:sqs:{REGION}:{ACCOUNT}:{}", dead.name),
                "maxReceiveCount": redrive.max_receive_count.to_string(),
            });
            client
                .set_queue_attributes()
                .queue_url(&urls[&queue.logical_id])
                .set_attributes(Some(HashMap::from([(QueueAttributeName::RedrivePolicy, policy.to_string())])))
                .send()
                .await
                .with_context(|| format!("cannot set the redrive policy of {}", queue.name))?;
        }
        Ok(urls)
    }

    /// Keeps a secret; its ARN.
    pub async fn create_secret(&self, name: &str, value: &str) -> Result<String> {
        // The service's SDK would be a large dependency for one request; the server does not check signatures.
        let signature =
            format!("AWS4-HMAC-SHA256 Credential={ACCESS_KEY}/20261122/{REGION}/secretsmanager/aws4_request");
        let response = crate::parts::http_client()?
            .post(self.url.clone())
            .header("x-amz-target", "secretsmanager.CreateSecret")
            .header("content-type", "application/x-amz-json-1.1")
            .header("authorization", signature)
            .body(json!({ "Name": name, "SecretString": value }).to_string())
            .send()
            .await?
            .error_for_status()
            .context("cannot make the secret")?;
        let made: Value = response.json().await?;
        Ok(made["ARN"].as_str().context("the secret has no ARN")?.to_owned())
    }

    /// What a function's environment says, so that its AWS clients find this server.
    pub fn environment(&self) -> [(&'static str, String); 4] {
        [
            ("AWS_ENDPOINT_URL", self.url.as_str().trim_end_matches('/').to_owned()),
            ("AWS_REGION", REGION.to_owned()),
            ("AWS_ACCESS_KEY_ID", ACCESS_KEY.to_owned()),
            ("AWS_SECRET_ACCESS_KEY", ACCESS_KEY.to_owned()),
        ]
    }

    /// Stops it and what it started, at once: it has nothing to keep, and would first wait for its clients.
    pub async fn stop(self) -> Result<()> {
        self.process.kill().await
    }
}

/// A client of an SQS server on this machine.
pub fn client(url: &Url) -> Client {
    let config = aws_sdk_sqs::Config::builder()
        .behavior_version_latest()
        .endpoint_url(url.as_str().trim_end_matches('/'))
        .region(Region::from_static(REGION))
        .credentials_provider(Credentials::new(ACCESS_KEY, ACCESS_KEY, None, None, "local"))
        .http_client(aws_smithy_http_client::Builder::new().build_http())
        .build();
    Client::from_conf(config)
}

async fn start_once(installed: &MiniStack, scratch: &Path, logs: &Path) -> Result<Sqs> {
    let port = free_port()?;
    let mut process = Command::new(&installed.python)
        .args(["-s", "-m", "ministack"])
        .clear_env()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("PYTHONPATH", &installed.site)
        .env("PYTHONUNBUFFERED", "1")
        .env("HOME", scratch)
        // It writes a file with its process id there, by its port.
        .env("TMPDIR", scratch)
        .env("BIND_HOST", "127.0.0.1")
        .env("MINISTACK_HOST", "127.0.0.1")
        .env("GATEWAY_PORT", port.to_string())
        .env("SERVICES", "sqs,secretsmanager")
        .env("LOG_LEVEL", "WARNING")
        // It would remove the containers of other MiniStacks.
        .env("DOCKER_HOST", "unix:///nonexistent")
        .folder(scratch)
        .log(logs.join("sqs.log"))
        .spawn()
        .await?;
    let url = Url::parse(&format!("http://127.0.0.1:{port}/"))?;
    let http = crate::parts::http_client()?;
    let begun = Instant::now();
    loop {
        if !process.is_running() {
            bail!("MiniStack ended as it started{}", process.quote_log());
        }
        let health = http.get(url.join("_ministack/health")?).timeout(Duration::from_secs(5)).send().await;
        if health.is_ok_and(|response| response.status().is_success()) {
            return Ok(Sqs { url, process });
        }
        if begun.elapsed() > START_LIMIT {
            bail!("MiniStack does not answer{}", process.quote_log());
        }
        sleep(Duration::from_millis(25)).await;
    }
}
