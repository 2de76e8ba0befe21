//! Numbers for an operator, in CloudWatch's embedded metric format: one line of JSON an invocation, from which CloudWatch makes metrics. No
//! request is sent, and a function's role needs no right for it.
//!
//! What an invocation counts is gathered and written when it ends. `METRICS_NAMESPACE` says where it belongs; without it nothing is written.

use serde_json::{Map, Value, json};
use std::{
    collections::BTreeMap,
    sync::{Mutex, OnceLock, PoisonError},
};

/// CloudWatch takes so many values of a metric a line.
const MOST_VALUES: usize = 100;

/// What is counted. `docs/runbook.md` says what each of them means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Metric {
    /// The first invocation of a process.
    ColdStarts,
    /// How long the database took for a request.
    DatabaseMillis,
    /// Requests whose signature did not match.
    SignaturesRefused,
    /// Requests refused with another code below 500.
    RequestsRefused,
    /// Events that the database could not take and the queue did.
    EventsBuffered,
    /// Attempts put on the queue.
    CallsReleased,
    /// Calls that a carrier took.
    CallsDialled,
    /// Calls that a carrier refused, or of which nobody knows what became of them.
    CallsRefused,
    /// Attempts that were not dialled any more when their turn came.
    CallsSkipped,
    /// Attempts that went silent, so that the carrier is asked for them.
    AttemptsSilent,
    /// Of these, those that are half an hour old and that it could not be asked for.
    AttemptsStuck,
    /// Organizations whose usage does not add up.
    UsageMismatches,
    /// Invoices made.
    InvoicesMade,
    /// What payment gateways were asked for.
    PaymentsAsked,
    /// Of these, those of which nobody knows yet what became of them.
    PaymentsUnknown,
    /// Deliveries that arrived.
    DeliveriesMade,
    /// Deliveries that did not.
    DeliveriesFailed,
}

impl Metric {
    /// As CloudWatch shows it.
    pub fn name(self) -> String {
        format!("{self:?}")
    }

    fn unit(self) -> &'static str {
        match self {
            Self::DatabaseMillis => "Milliseconds",
            _ => "Count",
        }
    }
}

static GATHERED: Mutex<BTreeMap<Metric, Vec<f64>>> = Mutex::new(BTreeMap::new());

/// Counts `count` more of something. Nothing counted is written too: a metric that is there and zero is not one that is missing.
pub fn count(metric: Metric, count: usize) {
    with(|gathered| {
        let values = gathered.entry(metric).or_insert_with(|| vec![0.0]);
        if let Some(sum) = values.first_mut() {
            *sum += count as f64;
        }
    });
}

/// Takes down one measurement.
pub fn measure(metric: Metric, value: f64) {
    with(|gathered| {
        let values = gathered.entry(metric).or_default();
        if values.len() < MOST_VALUES {
            values.push(value);
        }
    });
}

fn with<T>(change: impl FnOnce(&mut BTreeMap<Metric, Vec<f64>>) -> T) -> Option<T> {
    place().is_some().then(|| change(&mut GATHERED.lock().unwrap_or_else(PoisonError::into_inner)))
}

/// The namespace, and the function as the only dimension.
fn place() -> Option<&'static (String, String)> {
    static PLACE: OnceLock<Option<(String, String)>> = OnceLock::new();
    let read = || {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        Some((variable("METRICS_NAMESPACE")?, variable("AWS_LAMBDA_FUNCTION_NAME")?))
    };
    PLACE.get_or_init(read).as_ref()
}

/// Writes what was gathered since the last time, on a line of its own.
#[allow(clippy::print_stdout)]
pub fn flush() {
    let Some((namespace, function)) = place() else { return };
    let gathered = with(std::mem::take).unwrap_or_default();
    if !gathered.is_empty() {
        println!("{}", line(namespace, function, chrono::Utc::now().timestamp_millis(), &gathered));
    }
}

fn line(namespace: &str, function: &str, now_ms: i64, gathered: &BTreeMap<Metric, Vec<f64>>) -> Value {
    let metrics: Vec<Value> =
        gathered.keys().map(|metric| json!({ "Name": metric.name(), "Unit": metric.unit() })).collect();
    let directive = json!({ "Namespace": namespace, "Dimensions": [["Function"]], "Metrics": metrics });
    let mut line = Map::new();
    line.insert("_aws".to_owned(), json!({ "Timestamp": now_ms, "CloudWatchMetrics": [directive] }));
    line.insert("Function".to_owned(), json!(function));
    line.extend(gathered.iter().map(|(metric, values)| {
        let value = if let [one] = values.as_slice() { json!(one) } else { json!(values) };
        (metric.name(), value)
    }));
    Value::Object(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_names_every_metric_once_and_carries_its_values() {
        let gathered = BTreeMap::from([(Metric::CallsDialled, vec![3.0]), (Metric::DatabaseMillis, vec![4.5, 6.0])]);
        let line = line("Trunkline/prod", "prod-call-dispatch", 1_795_494_600_000, &gathered);
        assert_eq!(
            line,
            json!({
                "_aws": {
                    "Timestamp": 1_795_494_600_000_i64,
                    "CloudWatchMetrics": [{
                        "Namespace": "Trunkline/prod",
                        "Dimensions": [["Function"]],
                        "Metrics": [
                            { "Name": "DatabaseMillis", "Unit": "Milliseconds" }, { "Name": "CallsDialled", "Unit": "Count" },
                        ],
                    }],
                },
                "Function": "prod-call-dispatch", "CallsDialled": 3.0, "DatabaseMillis": [4.5, 6.0],
            })
        );
    }

    #[test]
    fn without_a_namespace_nothing_is_gathered() {
        count(Metric::CallsDialled, 1);
        assert_eq!(with(|gathered| gathered.len()), None);
    }
}
