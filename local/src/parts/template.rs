//! What `template.yaml` says, as far as a stack on one machine needs it: queues, and functions with their environment and events.
//!
//! Understood are the short and long forms of `Ref`, `Fn::GetAtt` and `Fn::Sub`, parameters' defaults, and `Globals.Function`. What the
//! local stack could not honour (a `cron(…)` schedule, an event of another type) is an error and not ignored, so that the two never differ
//! in silence.

use anyhow::{Context, Result, anyhow, bail};
use serde_yaml_ng::{Mapping, Value as Yaml};
use std::{collections::BTreeMap, path::Path, time::Duration};

/// What `AWS::StackName` is on one machine.
pub const STACK_NAME: &str = "trunkline";

/// The parsed template, in the order of the file.
#[derive(Debug, Clone, Default)]
pub struct Template {
    /// Every `AWS::SQS::Queue`.
    pub queues: Vec<Queue>,
    /// Every `AWS::Serverless::Function`.
    pub functions: Vec<Function>,
    /// Parameters by name, with their default.
    pub parameters: BTreeMap<String, Option<String>>,
}

/// A queue, named as it is with [`STACK_NAME`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Queue {
    /// Its key below `Resources`, as `DialQueue`.
    pub logical_id: String,
    /// Its name, as `trunkline-dial`.
    pub name: String,
    /// How long a received message stays hidden; 30 s when absent, as on AWS.
    pub visibility_timeout: Duration,
    /// How long a message is kept; four days when absent, as on AWS.
    pub message_retention: Duration,
    /// Where messages go that were received too often.
    pub redrive: Option<Redrive>,
}

/// A queue's redrive policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redrive {
    /// The dead-letter queue's logical id.
    pub target: String,
    /// How often a message may be received before it goes there.
    pub max_receive_count: u32,
}

/// A Lambda function.
#[derive(Debug, Clone)]
pub struct Function {
    /// Its key below `Resources`, as `CallDispatchFunction`.
    pub logical_id: String,
    /// The last part of `CodeUri`, which is the name of its package and of its binary: `call-dispatch`.
    pub package: String,
    /// How long an invocation may take.
    pub timeout: Duration,
    /// Memory in MB. Told to the process, not enforced.
    pub memory_mb: u32,
    /// Its variables, those of `Globals.Function` included.
    pub environment: BTreeMap<String, Value>,
    /// HTTP API routes that lead to it.
    pub routes: Vec<Route>,
    /// Queues that it is fed from.
    pub sqs_events: Vec<SqsEvent>,
    /// Schedules that invoke it.
    pub schedules: Vec<Schedule>,
}

/// A property that may be an intrinsic function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// A plain value.
    Text(String),
    /// `Ref`: a parameter, a pseudo parameter, or a resource (of a queue it is the URL).
    Ref(String),
    /// `Fn::GetAtt`.
    GetAtt {
        /// The resource's logical id.
        resource: String,
        /// As `Arn`.
        attribute: String,
    },
    /// `Fn::Sub`, unresolved.
    Sub(String),
}

/// A route of the HTTP API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// A method in upper case, or `ANY`.
    pub method: String,
    /// As `/functions/v1/call-dispatch/{proxy+}`.
    pub path: String,
}

/// An event source mapping from a queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SqsEvent {
    /// The queue's logical id.
    pub queue: String,
    /// Most messages in one invocation.
    pub batch_size: u32,
    /// How long to gather a batch.
    pub batching_window: Duration,
    /// Most batches at once (`ScalingConfig`).
    pub maximum_concurrency: Option<u32>,
    /// Whether the function's answer names the messages that failed. Without it every answer counts as success.
    pub report_batch_item_failures: bool,
}

/// A schedule at a fixed rate.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    /// Its key below the function's `Events`, as `Release`.
    pub id: String,
    /// Time from one tick to the next.
    pub rate: Duration,
    /// What the function is invoked with.
    pub input: serde_json::Value,
}

impl Template {
    /// Reads the file at `path`. Errors name the resource and the property.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("{} cannot be read", path.display()))?;
        Self::parse(&text).with_context(|| format!("{} is not understood", path.display()))
    }

    /// Reads the template from its text.
    pub fn parse(text: &str) -> Result<Self> {
        let document: Yaml = serde_yaml_ng::from_str(text)?;
        let mut template = Self { parameters: parameters(&document), ..Self::default() };
        let globals = document.get("Globals").and_then(|globals| globals.get("Function"));
        let resources = document.get("Resources").and_then(Yaml::as_mapping).context("there are no Resources")?;
        for (logical_id, resource) in resources {
            let logical_id = logical_id.as_str().context("a resource's name is no text")?;
            let empty = Yaml::Mapping(Mapping::new());
            let properties = Properties {
                own: resource.get("Properties").unwrap_or(&empty),
                globals: None,
                parameters: &template.parameters,
            };
            match resource.get("Type").and_then(Yaml::as_str) {
                Some("AWS::SQS::Queue") => {
                    let queue = queue(logical_id, &properties).with_context(|| logical_id.to_owned())?;
                    template.queues.push(queue);
                }
                Some("AWS::Serverless::Function") => {
                    let properties = Properties { globals, ..properties };
                    let function = function(logical_id, &properties).with_context(|| logical_id.to_owned())?;
                    template.functions.push(function);
                }
                _ => {}
            }
        }
        Ok(template)
    }

    /// A queue by its logical id.
    pub fn queue(&self, logical_id: &str) -> Option<&Queue> {
        self.queues.iter().find(|queue| queue.logical_id == logical_id)
    }

    /// A function by the name of its package.
    pub fn function(&self, package: &str) -> Option<&Function> {
        self.functions.iter().find(|function| function.package == package)
    }

    /// `value` as far as the template alone gives it: plain text, and what refers to parameters with a default. A resource has no
    /// value here.
    pub fn resolve(&self, value: &Value) -> Option<String> {
        resolve(value, &self.parameters)
    }
}

/// A resource's properties, with what stands behind those that it does not set.
struct Properties<'a> {
    own: &'a Yaml,
    globals: Option<&'a Yaml>,
    parameters: &'a BTreeMap<String, Option<String>>,
}

impl<'a> Properties<'a> {
    fn get(&self, name: &str) -> Option<&'a Yaml> {
        self.own.get(name).or_else(|| self.globals?.get(name))
    }

    fn within(&self, own: &'a Yaml) -> Properties<'a> {
        Properties { own, globals: None, parameters: self.parameters }
    }

    fn text(&self, name: &str) -> Result<Option<String>> {
        let Some(yaml) = self.get(name) else { return Ok(None) };
        let value = value(yaml).with_context(|| name.to_owned())?;
        let text =
            resolve(&value, self.parameters).with_context(|| format!("{name} depends on what is not known here"))?;
        Ok(Some(text))
    }

    fn number(&self, name: &str) -> Result<Option<u32>> {
        let parse = |text: String| text.parse().with_context(|| format!("{name} is {text}, not a whole number"));
        self.text(name)?.map(parse).transpose()
    }

    fn seconds(&self, name: &str, default: u32) -> Result<Duration> {
        Ok(Duration::from_secs(self.number(name)?.unwrap_or(default).into()))
    }

    /// The logical id of the resource that a property refers to.
    fn target(&self, name: &str) -> Result<String> {
        match value(self.get(name).with_context(|| format!("{name} is missing"))?)? {
            Value::Ref(resource) | Value::GetAtt { resource, .. } => Ok(resource),
            other => bail!("{name} is {other:?}, not a reference to a resource"),
        }
    }
}

fn parameters(document: &Yaml) -> BTreeMap<String, Option<String>> {
    let declared = document.get("Parameters").and_then(Yaml::as_mapping);
    let with_default = |(name, parameter): (&Yaml, &Yaml)| {
        Some((name.as_str()?.to_owned(), parameter.get("Default").and_then(scalar)))
    };
    declared.into_iter().flatten().filter_map(with_default).collect()
}

fn queue(logical_id: &str, properties: &Properties<'_>) -> Result<Queue> {
    let redrive = properties.get("RedrivePolicy").map(|policy| {
        let policy = properties.within(policy);
        let max_receive_count = policy.number("maxReceiveCount")?.context("maxReceiveCount is missing")?;
        Ok::<_, anyhow::Error>(Redrive { target: policy.target("deadLetterTargetArn")?, max_receive_count })
    });
    Ok(Queue {
        logical_id: logical_id.to_owned(),
        name: properties.text("QueueName")?.context("QueueName is missing: its URL could not be known beforehand")?,
        visibility_timeout: properties.seconds("VisibilityTimeout", 30)?,
        message_retention: properties.seconds("MessageRetentionPeriod", 345_600)?,
        redrive: redrive.transpose().context("RedrivePolicy")?,
    })
}

fn function(logical_id: &str, properties: &Properties<'_>) -> Result<Function> {
    let code = properties.text("CodeUri")?.context("CodeUri is missing")?;
    let package = code.trim_end_matches('/').rsplit('/').next().unwrap_or_default().to_owned();
    let mut function = Function {
        logical_id: logical_id.to_owned(),
        package,
        timeout: properties.seconds("Timeout", 3)?,
        memory_mb: properties.number("MemorySize")?.unwrap_or(128),
        environment: BTreeMap::new(),
        routes: Vec::new(),
        sqs_events: Vec::new(),
        schedules: Vec::new(),
    };
    for source in [properties.globals, Some(properties.own)].into_iter().flatten() {
        let variables = source.get("Environment").and_then(|it| it.get("Variables")).and_then(Yaml::as_mapping);
        for (name, variable) in variables.into_iter().flatten() {
            let name = name.as_str().context("a variable's name is no text")?;
            function.environment.insert(name.to_owned(), value(variable).with_context(|| name.to_owned())?);
        }
    }
    let events = properties.get("Events").and_then(Yaml::as_mapping);
    for (id, event) in events.into_iter().flatten() {
        let id = id.as_str().context("an event's name is no text")?;
        add_event(&mut function, id, event, properties).with_context(|| format!("Events.{id}"))?;
    }
    Ok(function)
}

fn add_event(function: &mut Function, id: &str, event: &Yaml, properties: &Properties<'_>) -> Result<()> {
    let kind = event.get("Type").and_then(Yaml::as_str).context("Type is missing")?;
    let properties = properties.within(event.get("Properties").context("Properties are missing")?);
    match kind {
        "HttpApi" => function.routes.push(Route {
            method: properties.text("Method")?.context("Method is missing")?.to_ascii_uppercase(),
            path: properties.text("Path")?.context("Path is missing")?,
        }),
        "SQS" => {
            let scaling = properties.get("ScalingConfig").map(|scaling| properties.within(scaling));
            let responses = properties.get("FunctionResponseTypes").and_then(Yaml::as_sequence);
            function.sqs_events.push(SqsEvent {
                queue: properties.target("Queue")?,
                batch_size: properties.number("BatchSize")?.unwrap_or(10),
                batching_window: properties.seconds("MaximumBatchingWindowInSeconds", 0)?,
                maximum_concurrency: scaling.map(|it| it.number("MaximumConcurrency")).transpose()?.flatten(),
                report_batch_item_failures: responses
                    .is_some_and(|kinds| kinds.iter().any(|kind| kind.as_str() == Some("ReportBatchItemFailures"))),
            });
        }
        "ScheduleV2" | "Schedule" => {
            let expression = properties
                .text(if kind == "Schedule" { "Schedule" } else { "ScheduleExpression" })?
                .context("the expression is missing")?;
            let input = properties.text("Input")?.unwrap_or_else(|| "{}".to_owned());
            function.schedules.push(Schedule {
                id: id.to_owned(),
                rate: rate(&expression)?,
                input: serde_json::from_str(&input).context("Input is not JSON")?,
            });
        }
        other => bail!("the local stack has no events of type {other}"),
    }
    Ok(())
}

/// `rate(1 minute)` as a duration.
fn rate(expression: &str) -> Result<Duration> {
    let understood = || {
        let (count, unit) = expression.strip_prefix("rate(")?.strip_suffix(')')?.split_once(' ')?;
        let count: u64 = count.parse().ok().filter(|count| *count > 0)?;
        let seconds = match unit.trim().trim_end_matches('s') {
            "minute" => 60,
            "hour" => 3_600,
            "day" => 86_400,
            _ => return None,
        };
        Some(Duration::from_secs(count * seconds))
    };
    understood().ok_or_else(|| anyhow!("{expression} is not rate(<number> minutes|hours|days)"))
}

/// A plain value as text.
fn scalar(yaml: &Yaml) -> Option<String> {
    match yaml {
        Yaml::String(text) => Some(text.clone()),
        Yaml::Number(number) => Some(number.to_string()),
        Yaml::Bool(flag) => Some(flag.to_string()),
        _ => None,
    }
}

/// A property's value, intrinsic functions told apart.
fn value(yaml: &Yaml) -> Result<Value> {
    let (name, argument) = match yaml {
        Yaml::Tagged(tagged) => (tagged.tag.to_string().trim_start_matches('!').to_owned(), &tagged.value),
        Yaml::Mapping(mapping) if mapping.len() == 1 => {
            let (name, argument) = mapping.iter().next().context("an empty mapping")?;
            (name.as_str().unwrap_or_default().trim_start_matches("Fn::").to_owned(), argument)
        }
        plain => return scalar(plain).map(Value::Text).with_context(|| format!("{plain:?} is no plain value")),
    };
    let text = scalar(argument);
    match (name.as_str(), text) {
        ("Ref", Some(target)) => Ok(Value::Ref(target)),
        ("Sub", Some(text)) => Ok(Value::Sub(text)),
        ("GetAtt", Some(text)) => {
            let (resource, attribute) = text.split_once('.').context("!GetAtt without an attribute")?;
            Ok(Value::GetAtt { resource: resource.to_owned(), attribute: attribute.to_owned() })
        }
        ("GetAtt", None) => {
            let part = |index: usize| argument.get(index).and_then(scalar).context("Fn::GetAtt needs two names");
            Ok(Value::GetAtt { resource: part(0)?, attribute: part(1)? })
        }
        _ => bail!("!{name} is not understood here"),
    }
}

fn resolve(value: &Value, parameters: &BTreeMap<String, Option<String>>) -> Option<String> {
    let named = |name: &str| match name {
        "AWS::StackName" => Some(STACK_NAME.to_owned()),
        _ => parameters.get(name)?.clone(),
    };
    match value {
        Value::Text(text) => Some(text.clone()),
        Value::Ref(name) => named(name),
        Value::GetAtt { .. } => None,
        Value::Sub(text) => {
            let mut out = String::new();
            let mut rest = text.as_str();
            while let Some((before, after)) = rest.split_once("${") {
                let (name, tail) = after.split_once('}')?;
                out.push_str(before);
                out.push_str(&named(name)?);
                rest = tail;
            }
            Some(out + rest)
        }
    }
}

#[cfg(test)]
mod tests;
