//! The template's schedules, fired at their rate divided by the clock's speed.

use crate::parts::{
    lambda::{InvocationOutcome, Invoker},
    template::Template,
};
use axum::body::Bytes;
use std::time::Duration;
use tokio::time::{Instant, MissedTickBehavior, interval_at};

/// The shortest time from one tick to the next, however fast the clock: a sweep is a guarantee and not a busy loop.
const SHORTEST: Duration = Duration::from_millis(250);

/// One schedule.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Tick {
    /// The `job` of its input.
    pub(super) job: String,
    function: String,
    input: Bytes,
    every: Duration,
}

/// All schedules of `template`, `speed` times as fast.
pub(super) fn ticks(template: &Template, speed: f64) -> Vec<Tick> {
    let of_all =
        template.functions.iter().flat_map(|function| function.schedules.iter().map(move |one| (function, one)));
    of_all
        .map(|(function, schedule)| Tick {
            job: schedule.input["job"].as_str().unwrap_or(&schedule.id).to_owned(),
            function: function.package.clone(),
            input: schedule.input.to_string().into(),
            every: schedule.rate.div_f64(speed).max(SHORTEST),
        })
        .collect()
}

impl Tick {
    /// Invokes the function with the schedule's input.
    pub(super) async fn fire(&self, invoker: &Invoker) -> InvocationOutcome {
        invoker.invoke(&self.function, self.input.clone()).await
    }
}

/// Fires `tick` for ever, and never while its last firing still runs. A failure is logged; the next tick is the retry.
pub(super) async fn keep_ticking(tick: Tick, invoker: Invoker) {
    let mut interval = interval_at(Instant::now() + tick.every, tick.every);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let outcome = tick.fire(&invoker).await;
        if !matches!(outcome, InvocationOutcome::Response(_)) {
            tracing::warn!(job = tick.job, ?outcome, "a scheduled job failed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::path::Path;

    fn ours(speed: f64) -> Vec<Tick> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../template.yaml");
        ticks(&Template::load(&path).unwrap(), speed)
    }

    #[test]
    fn every_job_of_the_template_has_its_function_and_input() {
        let ours = ours(1.0);
        let jobs: Vec<_> = ours.iter().map(|tick| (tick.job.as_str(), tick.function.as_str())).collect();
        let expected = [
            ("sweep", "webhook-intake"),
            ("retention", "webhook-intake"),
            ("release", "call-dispatch"),
            ("reconcile", "call-dispatch"),
            ("records", "call-dispatch"),
            ("reconcile_usage", "usage-metering"),
            ("expire_holds", "usage-metering"),
            ("renew_credit", "usage-metering"),
            ("close_periods", "invoice-generation"),
            ("collect", "invoice-generation"),
            ("deliver", "event-delivery"),
        ];
        assert_eq!(jobs, expected);
        assert_eq!(serde_json::from_slice::<Value>(&ours[2].input).unwrap(), json!({ "job": "release" }));
    }

    #[test]
    fn a_fast_clock_fires_more_often_up_to_a_bound() {
        let every = |speed| ours(speed)[2].every;
        assert_eq!(every(1.0), Duration::from_secs(60));
        assert_eq!(every(60.0), Duration::from_secs(1));
        assert_eq!(every(100_000.0), SHORTEST);
    }
}
