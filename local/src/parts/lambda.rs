//! AWS Lambda on one machine: built binaries as processes, fed through the Runtime API as AWS speaks it, behind an HTTP API as AWS
//! makes its events.
//!
//! - [`Functions`] starts so many processes a function and keeps them: one that dies or passes its deadline is replaced.
//! - [`Invoker`] hands an event to the next free process of a function; events wait their turn, in order, up to a bound.
//! - A process is told nothing but what Lambda and `template.yaml` tell it, and serves one event at a time.

mod api_gateway;
mod lane;
mod runtime_api;
mod worker;

#[cfg(test)]
pub(in crate::parts) mod tests;

use crate::parts::{
    gateway::{FunctionHandler, FunctionRequest},
    template::{Function, Template},
};
use anyhow::{Context, Result, bail};
use api_gateway::Match;
use axum::body::Bytes;
use lane::Lane;
use std::{collections::BTreeMap, net::IpAddr, path::PathBuf, sync::Arc};
use tokio::{sync::watch, task::JoinSet};

/// Most bytes of an event or of an answer: Lambda's limit for synchronous invocations.
pub const PAYLOAD_LIMIT: usize = 6 * 1024 * 1024;
/// The account that everything local belongs to, as in its ARNs.
pub const ACCOUNT_ID: &str = "000000000000";

/// How the functions are run.
#[derive(Debug, Clone)]
pub struct LambdaOptions {
    /// The folder of the binaries, each named as its package.
    pub binaries: PathBuf,
    /// Values for the variables that `template.yaml` gives its functions, and `AWS_…` for all of them.
    pub environment: BTreeMap<String, String>,
    /// Processes a function: as many of its events are handled at once.
    pub workers: usize,
    /// Where each function's output is appended, as `call-dispatch.log`.
    pub log_dir: PathBuf,
}

/// The running functions.
#[derive(Debug)]
pub struct Functions {
    invoker: Invoker,
    workers: JoinSet<()>,
    workers_per_function: usize,
    stop: watch::Sender<bool>,
}

/// How an invocation ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InvocationOutcome {
    /// The function answered.
    Response(Bytes),
    /// The function failed: an error of its own, a crash (`Runtime.ExitError`) or its timeout (`Sandbox.Timedout`).
    FunctionError {
        /// The kind of error.
        error_type: String,
        /// JSON with `errorType` and `errorMessage`.
        payload: Bytes,
    },
    /// Too many events wait for this function already.
    Throttled,
}

/// What the functions are at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Activity {
    /// Events that wait for a free process.
    pub queued: u64,
    /// Events that a process has in hand.
    pub in_flight: u64,
    /// Events accepted since the start.
    pub started: u64,
    /// Events that ended in a function error since the start.
    pub failed: u64,
}

/// An HTTP request for the functions, as it reached the API.
#[derive(Debug, Clone)]
pub struct HttpRequest {
    /// The URI is path and query as they were sent.
    pub request: http::Request<Bytes>,
    /// Where it came from.
    pub source_ip: IpAddr,
}

/// Invokes functions by the name of their package. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Invoker {
    lanes: Arc<BTreeMap<String, Arc<Lane>>>,
}

impl Functions {
    /// Starts every function of `template`, and returns when each has a process that waits for events. Fails when a binary or a
    /// variable is missing, or a process ends before it asked for an event; the end of its log is then part of the error.
    pub async fn start(template: &Template, options: LambdaOptions) -> Result<Self> {
        if options.workers == 0 {
            bail!("a function needs at least one process");
        }
        let (stop, stopped) = watch::channel(false);
        let mut workers = JoinSet::new();
        let mut lanes = BTreeMap::new();
        for function in &template.functions {
            let lane = Arc::new(Lane::new(function, options.log_dir.join(format!("{}.log", function.package))));
            let environment = environment(template, function, &options.environment)?;
            let command = worker::Launch::new(&lane, &options.binaries, environment)?;
            for _ in 0..options.workers {
                workers.spawn(worker::keep_running(Arc::clone(&lane), command.clone(), stopped.clone()));
            }
            lanes.insert(function.package.clone(), lane);
        }
        let workers_per_function = options.workers;
        let functions = Self { invoker: Invoker { lanes: Arc::new(lanes) }, workers, workers_per_function, stop };
        for lane in functions.invoker.lanes.values() {
            lane.ready().await?;
        }
        Ok(functions)
    }

    /// What invokes them.
    pub fn invoker(&self) -> Invoker {
        self.invoker.clone()
    }

    /// What the gateway passes requests for functions to.
    pub fn handler(&self) -> FunctionHandler {
        let invoker = self.invoker();
        Arc::new(move |FunctionRequest { request, source_ip, .. }| {
            let invoker = invoker.clone();
            Box::pin(async move { invoker.http(HttpRequest { request, source_ip }).await.map(axum::body::Body::from) })
        })
    }

    /// Processes a function.
    pub fn workers(&self) -> usize {
        self.workers_per_function
    }

    /// The ids of a function's live processes.
    pub fn processes(&self, function: &str) -> Vec<u32> {
        self.invoker.lanes.get(function).map(|lane| lane.processes()).unwrap_or_default()
    }

    /// Kills one live process of a function with SIGKILL, as a machine's death would: the `nth`, counted round. Whether there was one.
    pub fn kill_one(&self, function: &str, nth: usize) -> bool {
        self.invoker.lanes.get(function).is_some_and(|lane| lane.kill_one(nth))
    }

    /// Kills every process. Events in hand fail.
    pub async fn stop(mut self) {
        self.stop.send_replace(true);
        while self.workers.join_next().await.is_some() {}
    }
}

impl Drop for Functions {
    fn drop(&mut self) {
        // Nobody may wait for a process that will never come.
        self.invoker.lanes.values().for_each(|lane| lane.close());
    }
}

impl Invoker {
    /// Invokes `function` with a JSON event, and waits for its answer. The function goes on when this is cancelled, as on AWS.
    /// A function that does not exist is a function error.
    pub async fn invoke(&self, function: &str, payload: Bytes) -> InvocationOutcome {
        match self.lanes.get(function) {
            Some(lane) => lane.invoke(payload).await,
            None => InvocationOutcome::error("ResourceNotFoundException", &format!("there is no function {function}")),
        }
    }

    /// Answers a request as the HTTP API does: the route's function is invoked with an event of version 2.0.
    pub async fn http(&self, request: HttpRequest) -> http::Response<Bytes> {
        let matched = self.lanes.iter().find_map(|(function, lane)| {
            let mut routes = lane.function.routes.iter();
            routes.find_map(|route| Match::of(function, route, &request.request))
        });
        api_gateway::answer(self, matched, request).await
    }

    /// What all functions are at.
    pub fn activity(&self) -> Activity {
        let each = self.lanes.values().map(|lane| lane.activity());
        each.fold(Activity::default(), |sum, one| Activity {
            queued: sum.queued + one.queued,
            in_flight: sum.in_flight + one.in_flight,
            started: sum.started + one.started,
            failed: sum.failed + one.failed,
        })
    }

    /// What one function is at; nothing for a function that does not exist.
    pub fn activity_of(&self, function: &str) -> Activity {
        self.lanes.get(function).map(|lane| lane.activity()).unwrap_or_default()
    }
}

impl InvocationOutcome {
    /// A function error in Lambda's shape.
    fn error(error_type: &str, message: &str) -> Self {
        let payload = serde_json::json!({ "errorType": error_type, "errorMessage": message }).to_string().into();
        Self::FunctionError { error_type: error_type.to_owned(), payload }
    }
}

/// What `template.yaml` gives `function`, with `given` for what only a running stack knows, and the `AWS_…` of `given`.
fn environment(
    template: &Template,
    function: &Function,
    given: &BTreeMap<String, String>,
) -> Result<BTreeMap<String, String>> {
    let of_aws = given.iter().filter(|(name, _)| name.starts_with("AWS_"));
    let mut environment: BTreeMap<_, _> = of_aws.map(|(name, value)| (name.clone(), value.clone())).collect();
    for (name, value) in &function.environment {
        let value = given.get(name).cloned().or_else(|| template.resolve(value));
        let value = value.with_context(|| format!("{}: the stack has no value for {name}", function.package))?;
        environment.insert(name.clone(), value);
    }
    Ok(environment)
}
