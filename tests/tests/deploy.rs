//! `template.yaml`, deployed into MiniStack by `sam`: what AWS would run is run, with its own queues, schedules and roles. Too long for
//! every run of CI; `tests/deploy/run` prepares what it needs and asks for it.

use anyhow::{Context, Result, ensure};
use aws_sdk_sqs::types::QueueAttributeName;
use local::parts::{folder, postgres, postgres::Role, process::Command};
use serde_json::{Value, json};
use std::{
    path::PathBuf,
    time::{Duration, Instant},
};
use tests::{
    Stack,
    callbacks::TALKED,
    events::HttpEvent,
    scene::{self, phones},
    stack::PUBLIC_ORIGIN,
    supervisor_binary,
};
use url::Url;

const STACK: &str = "trunkline-test";
/// A schedule's minute, and what a busy machine needs besides.
const PATIENCE: Duration = Duration::from_secs(150);

/// Where the tools are: `tests/deploy/run` says so.
fn tool(name: &str) -> Result<PathBuf> {
    Ok(PathBuf::from(std::env::var(name).with_context(|| format!("{name} is not set: run tests/deploy/run"))?))
}

struct Cloud {
    url: Url,
    http: reqwest::Client,
    _process: local::parts::process::Process,
}

impl Cloud {
    async fn start(stack: &Stack) -> Result<Self> {
        let port = postgres::free_port()?;
        let folder = stack.database.attached.folder.join("cloud");
        std::fs::create_dir_all(&folder)?;
        let process = Command::new(tool("MINISTACK")?)
            .clear_env()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("PYTHONUNBUFFERED", "1")
            .env("HOME", &folder)
            .env("TMPDIR", &folder)
            .env("BIND_HOST", "127.0.0.1")
            .env("MINISTACK_HOST", "127.0.0.1")
            .env("GATEWAY_PORT", port.to_string())
            .env("SERVICES", "sqs,secretsmanager,s3,cloudformation,lambda,scheduler,apigateway,iam,logs,monitoring,cloudwatch,sns,sts")
            // It would listen on every address of the machine.
            .env("IOT_MTLS_ENABLED", "0")
            .env("LAMBDA_EXECUTOR", "local")
            // It tells functions to ask itself, and not AWS.
            .env("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{port}"))
            .env("DOCKER_HOST", "unix:///nonexistent")
            .folder(&folder)
            .log(tool("DEPLOY_LOGS")?.join("ministack.log"))
            .spawn()
            .await?;
        let cloud = Self {
            url: Url::parse(&format!("http://127.0.0.1:{port}/"))?,
            http: shared::supabase::http_client()?,
            _process: process,
        };
        let begun = Instant::now();
        while !cloud.http.get(cloud.url.join("_ministack/health")?).send().await.is_ok_and(|a| a.status().is_success())
        {
            ensure!(begun.elapsed() < PATIENCE, "MiniStack does not answer");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(cloud)
    }

    /// The environment of an AWS tool.
    fn command(&self, program: PathBuf) -> Command {
        let mut command = Command::new(program);
        for (name, value) in [
            ("AWS_ENDPOINT_URL", self.url.as_str().trim_end_matches('/')),
            ("AWS_ACCESS_KEY_ID", "local"),
            ("AWS_SECRET_ACCESS_KEY", "local"),
            ("AWS_REGION", local::parts::sqs::REGION),
            ("AWS_DEFAULT_REGION", local::parts::sqs::REGION),
            ("SAM_CLI_TELEMETRY", "0"),
        ] {
            command = command.env(name, value);
        }
        command
    }

    /// A request of Secrets Manager's protocol.
    async fn json(&self, target: &str, body: &Value) -> Result<Value> {
        let answer = self
            .http
            .post(self.url.clone())
            .header("content-type", "application/x-amz-json-1.1")
            .header("x-amz-target", target)
            .header("authorization", "AWS4-HMAC-SHA256 Credential=local/20261124/us-east-1/secretsmanager/aws4_request, SignedHeaders=host, Signature=0")
            .body(body.to_string())
            .send()
            .await?;
        Ok(answer.json().await?)
    }

    /// Invokes a function; what it answers.
    async fn invoke(&self, function: &str, event: &Value) -> Result<Value> {
        let url = self.url.join(&format!("2015-03-31/functions/{STACK}-{function}/invocations"))?;
        let answer = self.http.post(url).timeout(Duration::from_secs(60)).body(event.to_string()).send().await?;
        ensure!(answer.status().is_success(), "{function}: {}", answer.status());
        Ok(answer.json().await?)
    }
}

async fn wait_for(what: &str, mut is_so: impl AsyncFnMut() -> Result<bool>) -> Result<()> {
    let begun = Instant::now();
    while !is_so().await? {
        ensure!(begun.elapsed() < PATIENCE, "{what} did not happen");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    println!("{what}: after {:.1} s", begun.elapsed().as_secs_f64());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "wants sam, MiniStack and the built functions: tests/deploy/run"]
async fn what_is_deployed_dials_listens_sweeps_and_keeps_what_it_cannot_read() -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    let cloud = Cloud::start(&stack).await?;
    let secret = cloud
        .json("secretsmanager.CreateSecret", &json!({ "Name": STACK, "SecretString": stack.keys.secret_json() }))
        .await?;
    let arn = secret["ARN"].as_str().context("no ARN")?;

    // The guide's own command; the template of the build says where the binaries are.
    let workspace = folder::workspace()?;
    let origin = stack.config.supabase_url.as_str().trim_end_matches('/');
    let overrides = [
        "Stage=dev".to_owned(),
        format!("Architectures={}", if cfg!(target_arch = "aarch64") { "arm64" } else { "x86_64" }),
        format!("SupabaseUrl={origin}"),
        format!("SupabasePublishableKey={}", stack.keys.publishable_key),
        format!("SecretArn={arn}"),
        format!("PublicOrigin={PUBLIC_ORIGIN}"),
        "IntakeUrl=yes".to_owned(),
    ];
    let template = tool("BUILT_TEMPLATE")?;
    let sam = cloud.command(tool("SAM")?).args(["deploy", "--template-file"]).arg(template).args([
        "--stack-name",
        STACK,
        "--s3-bucket",
        "deploy",
        "--capabilities",
        "CAPABILITY_IAM",
        "--no-confirm-changeset",
        "--no-progressbar",
        "--parameter-overrides",
    ]);
    cloud.http.put(cloud.url.join("deploy")?).send().await?.error_for_status()?;
    sam.args(overrides)
        .folder(&workspace)
        .log(tool("DEPLOY_LOGS")?.join("sam.log"))
        .run()
        .await
        .context("sam deploy")?;

    // Connecting, by the command of the guide.
    let connected = cloud
        .command(workspace.join("target/debug/local"))
        .args(["connect", "--stack", STACK, "--no-nudge", "--database-url", stack.database.url(Role::Owner)])
        .log(tool("DEPLOY_LOGS")?.join("connect.log"))
        .run()
        .await;
    connected.context("connect")?;
    let url = "select decrypted_secret from vault.decrypted_secrets where name = 'trunkline_functions_url'";
    ensure!(stack.value(url).await? == format!("{PUBLIC_ORIGIN}/functions/v1"));

    // A schedule releases, the queue feeds the dialler, and the carrier is asked.
    let campaign = scene::running_campaign(&stack, &phones(1, 2)).await?;
    wait_for("the schedule released and the queue dialled", async || Ok(campaign.carrier.creates().len() == 2)).await?;
    ensure!(stack.value("select count(*) from public.call_logs where status = 'created'").await? == "0");

    // A signed callback becomes what the row says; a forged one changes nothing.
    let call = campaign.carrier.creates()[0].clone();
    let hangup = campaign.carrier.hangup(&call, &TALKED)?;
    let forged = HttpEvent::post(&path_of(&hangup))
        .header("content-type", "application/x-www-form-urlencoded")
        .body("Duration=1");
    let answer = cloud.invoke("webhook-intake", &forged.payload()).await?;
    ensure!(answer["statusCode"] == 403, "{answer}");
    let ended = "select count(*) from public.call_logs where status = 'ended'";
    ensure!(stack.value(ended).await? == "0");
    let answer = cloud.invoke("webhook-intake", &hangup.payload()).await?;
    ensure!(answer["statusCode"] == 200, "{answer}");
    ensure!(stack.value(ended).await? == "1");

    // The sweep applies what failed, when its schedule comes round.
    stack
        .sql
        .batch_execute("update private.webhook_events set status = 'failed', tries = 1, next_try_at = now() - interval '1 minute' where status = 'applied'")
        .await?;
    let left = "select count(*) from private.webhook_events where status = 'failed'";
    ensure!(stack.value(left).await? != "0");
    wait_for("the schedule swept", async || Ok(stack.value(left).await? == "0")).await?;

    // What cannot be read ends among the dead letters, and is sent through again by the command of the runbook.
    let sqs = local::parts::sqs::client(&cloud.url);
    let queue = async |name: &str| -> Result<String> {
        let found = sqs.get_queue_url().queue_name(format!("{STACK}-{name}")).send().await?;
        found.queue_url.context("a queue without a URL")
    };
    let (live, dead) = (queue("dial").await?, queue("dial-dead").await?);
    let length = async |url: &str| -> Result<usize> {
        let name = QueueAttributeName::ApproximateNumberOfMessages;
        let asked = sqs.get_queue_attributes().queue_url(url).attribute_names(name.clone()).send().await?;
        Ok(asked.attributes().and_then(|all| all.get(&name)).context("no length")?.parse()?)
    };
    // Three minutes are long for a test.
    sqs.set_queue_attributes().queue_url(&live).attributes(QueueAttributeName::VisibilityTimeout, "2").send().await?;
    sqs.send_message().queue_url(&live).message_body("poison").message_group_id("poison").send().await?;
    wait_for("the poison was given up", async || Ok(length(&dead).await? == 1)).await?;
    let (moved, _) = local::operate::queues::redrive(&sqs, &format!("{STACK}-dial-dead"), 10).await?;
    ensure!(moved == 1);
    wait_for("and again", async || Ok(length(&dead).await? == 1)).await?;
    Ok(())
}

/// The path of a request.
fn path_of(event: &HttpEvent) -> String {
    event.payload()["rawPath"].as_str().unwrap_or_default().to_owned()
}
