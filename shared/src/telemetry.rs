//! Logs: one JSON line an event on Lambda, with the ids that a person searches for.

use tracing::{Subscriber, subscriber::DefaultGuard};
use tracing_subscriber::{EnvFilter, fmt, fmt::MakeWriter, prelude::*};

/// Starts logging for the process, at `level` (a `tracing` filter). A second call does nothing.
pub fn init(level: &str) {
    let _already_set = subscriber(level, std::io::stderr).try_init();
}

/// Writes this thread's log lines to `into`, exactly as [`init`] would, until the guard is dropped: a test reads them.
pub fn capture<W>(level: &str, into: W) -> DefaultGuard
where
    W: for<'writer> MakeWriter<'writer> + Send + Sync + 'static,
{
    subscriber(level, into).set_default()
}

fn subscriber<W>(level: &str, into: W) -> impl Subscriber + Send + Sync
where
    W: for<'writer> MakeWriter<'writer> + Send + Sync + 'static,
{
    // Of the libraries below only warnings matter to an operator.
    let filter = EnvFilter::try_new(format!("warn,shared={level},webhook_intake={level},call_dispatch={level},usage_metering={level},invoice_generation={level},event_delivery={level}"))
        .unwrap_or_else(|_| EnvFilter::new("info"));
    let lines = fmt::layer()
        .json()
        .flatten_event(true)
        .with_current_span(true)
        .with_span_list(false)
        .with_target(false)
        .with_writer(into);
    tracing_subscriber::registry().with(filter).with(lines)
}

/// A phone number as a log may show it: the last two digits.
pub fn redact_phone(number: &str) -> String {
    let tail: String = number.chars().rev().take(2).collect();
    format!("…{}", tail.chars().rev().collect::<String>())
}
