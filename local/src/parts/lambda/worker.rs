//! Keeps one process of a function running: starts it, watches its deadline and its end, and starts the next.

use super::{
    lane::{Lane, STOPPED},
    runtime_api::{Remains, Sandbox},
};
use crate::parts::process::{Command, Process};
use anyhow::{Result, bail};
use chrono::{SecondsFormat, Utc};
use serde_json::json;
use std::{
    collections::BTreeMap,
    fs::File,
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::{sync::watch, time::Instant};

/// How long a process may take to ask for its first event, as on AWS.
const INIT_TIMEOUT: Duration = Duration::from_secs(10);
/// The pause before a process is started again that could not start; doubled each time, up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// How a function's processes are started.
#[derive(Debug, Clone)]
pub(super) struct Launch {
    binary: PathBuf,
    environment: BTreeMap<String, String>,
    region: String,
}

impl Launch {
    /// With the environment as Lambda makes it and `variables` on top. Fails when the binary is not there.
    pub(super) fn new(lane: &Lane, binaries: &Path, variables: BTreeMap<String, String>) -> Result<Self> {
        let function = &lane.function;
        let name = function.package.as_str();
        let binary = binaries.join(name);
        if !binary.is_file() {
            bail!("{} is not built: {} is missing", name, binary.display());
        }
        let region = variables.get("AWS_REGION").map_or("us-east-1", String::as_str).to_owned();
        let memory = function.memory_mb.to_string();
        let log_group = format!("/aws/lambda/{name}");
        let folder = binaries.display().to_string();
        let of_lambda = [
            ("_HANDLER", "bootstrap"),
            ("AWS_ACCESS_KEY_ID", "local"),
            ("AWS_DEFAULT_REGION", &region),
            ("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", &memory),
            ("AWS_LAMBDA_FUNCTION_NAME", name),
            ("AWS_LAMBDA_FUNCTION_VERSION", "$LATEST"),
            ("AWS_LAMBDA_INITIALIZATION_TYPE", "on-demand"),
            ("AWS_LAMBDA_LOG_FORMAT", "JSON"),
            ("AWS_LAMBDA_LOG_GROUP_NAME", &log_group),
            ("AWS_LAMBDA_LOG_STREAM_NAME", "local"),
            ("AWS_REGION", &region),
            ("AWS_SECRET_ACCESS_KEY", "local"),
            ("AWS_SESSION_TOKEN", "local"),
            ("LAMBDA_RUNTIME_DIR", &folder),
            ("LAMBDA_TASK_ROOT", &folder),
            ("LANG", "en_US.UTF-8"),
            ("PATH", "/usr/local/bin:/usr/bin:/bin:/opt/bin"),
            ("TZ", ":UTC"),
        ];
        let mut environment: BTreeMap<_, _> = of_lambda.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        environment.extend(variables);
        Ok(Self { binary, environment, region })
    }

    async fn start(&self, lane: &Lane, sandbox: &Sandbox) -> Result<Process> {
        Command::new(&self.binary)
            .clear_env()
            .envs(&self.environment)
            .env("AWS_LAMBDA_RUNTIME_API", sandbox.address.to_string())
            .log(&lane.log)
            .spawn()
            .await
    }
}

/// How a process ended.
enum End {
    Exited(String),
    TimedOut,
    Stopped,
}

/// Runs processes of `lane`'s function, one after the other, until `stopped`.
pub(super) async fn keep_running(lane: Arc<Lane>, launch: Launch, mut stopped: watch::Receiver<bool>) {
    let mut pause = FIRST_PAUSE;
    loop {
        let remains = match run_one(&lane, &launch, &mut stopped).await {
            Ok(Some(remains)) => remains,
            Ok(None) => return,
            Err(error) => Remains { in_hand: None, initialised: false, init_error: Some(format!("{error:#}")) },
        };
        if remains.initialised {
            pause = FIRST_PAUSE;
            continue;
        }
        // Whoever waits learns that the function does not start, one event an attempt, as each cold start on AWS would tell.
        let why = remains.init_error.unwrap_or_else(|| "it ended before it asked for an event".to_owned());
        lane.init_failed(&why);
        note(&lane, "platform.initFailed", &why);
        if let Some(invocation) = lane.take_waiting() {
            invocation.fail("Runtime.InitError", &why);
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => pause = (pause * 2).min(LONGEST_PAUSE),
            _ = stopped.wait_for(|stopped| *stopped) => return,
        }
    }
}

/// One process from start to end; nothing when we were told to stop.
async fn run_one(lane: &Arc<Lane>, launch: &Launch, stopped: &mut watch::Receiver<bool>) -> Result<Option<Remains>> {
    let sandbox = Sandbox::open(Arc::clone(lane), &launch.region).await?;
    let mut process = launch.start(lane, &sandbox).await?;
    let pid = process.id();
    lane.process_started(pid);
    let end = watch_over(lane, &sandbox, &mut process, stopped).await;
    lane.process_ended(pid);
    let mut remains = sandbox.close();
    let in_hand = remains.in_hand.take();
    let (kind, what) = match &end {
        End::Exited(how) => ("Runtime.ExitError", format!("Runtime exited with error: {how}")),
        End::TimedOut if remains.initialised => {
            let seconds = lane.function.timeout.as_secs_f64();
            ("Sandbox.Timedout", format!("Task timed out after {seconds:.2} seconds"))
        }
        End::TimedOut => ("Sandbox.Timedout", format!("Init timed out after {} seconds", INIT_TIMEOUT.as_secs())),
        End::Stopped => ("Runtime.ExitError", STOPPED.to_owned()),
    };
    // The caller first: a killed process must be known at once.
    if let Some(invocation) = in_hand {
        invocation.fail(kind, &what);
    }
    if !matches!(end, End::Exited(_)) {
        process.kill().await?;
    }
    if matches!(end, End::Stopped) {
        return Ok(None);
    }
    note(lane, "platform.fault", &what);
    if !remains.initialised {
        remains.init_error.get_or_insert(what);
    }
    Ok(Some(remains))
}

async fn watch_over(lane: &Lane, sandbox: &Sandbox, process: &mut Process, stopped: &mut watch::Receiver<bool>) -> End {
    let timeout = lane.function.timeout;
    let init_deadline = Instant::now() + INIT_TIMEOUT;
    loop {
        // An event that begins after this look cannot be due before a whole timeout from now, so one timer an event is not needed.
        let look = match sandbox.deadline() {
            Some(deadline) => deadline,
            None if sandbox.initialised() => Instant::now() + timeout,
            None => init_deadline.min(Instant::now() + timeout),
        };
        tokio::select! {
            ended = process.wait() => return End::Exited(match ended {
                Ok(status) => status.to_string(),
                Err(error) => error.to_string(),
            }),
            _ = stopped.wait_for(|stopped| *stopped) => return End::Stopped,
            () = tokio::time::sleep_until(look) => {}
        }
        if sandbox.close_if_overdue(init_deadline) {
            return End::TimedOut;
        }
    }
}

/// Adds a line of the platform's to the function's log, where its reader looks first.
fn note(lane: &Lane, kind: &str, what: &str) {
    let time = Utc::now().to_rfc3339_opts(SecondsFormat::Millis, true);
    let line = json!({ "time": time, "type": kind, "record": what });
    if let Ok(mut log) = File::options().create(true).append(true).open(&lane.log) {
        let _full_disk = writeln!(log, "{line}");
    }
}
