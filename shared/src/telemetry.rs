//! Logs: one JSON line an event on Lambda, with the ids that a person searches for.

use tracing_subscriber::{EnvFilter, fmt, prelude::*};

/// Starts logging for the process, at `level` (a `tracing` filter). A second call does nothing.
pub fn init(level: &str) {
    // Of the libraries below only warnings matter to an operator.
    let filter = EnvFilter::try_new(format!("warn,shared={level},webhook_intake={level},call_dispatch={level},usage_metering={level},invoice_generation={level}"))
        .unwrap_or_else(|_| EnvFilter::new("info"));
    let lines = fmt::layer()
        .json()
        .flatten_event(true)
        .with_current_span(true)
        .with_span_list(false)
        .with_target(false)
        .with_writer(std::io::stderr);
    let _already_set = tracing_subscriber::registry().with(filter).with(lines).try_init();
}

/// A phone number as a log may show it: the last two digits.
pub fn redact_phone(number: &str) -> String {
    let tail: String = number.chars().rev().take(2).collect();
    format!("…{}", tail.chars().rev().collect::<String>())
}
