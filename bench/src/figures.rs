//! What is said of many measurements.

use std::time::Duration;

/// The machine as it matters for a figure.
pub fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let build = if cfg!(debug_assertions) { "debug build: not for comparison" } else { "release build" };
    format!("{cores} cores, {build}")
}

/// Times of the same thing, many times over.
#[derive(Debug, Default)]
pub struct Times(Vec<Duration>);

impl Times {
    /// Adds one.
    pub fn push(&mut self, time: Duration) {
        self.0.push(time);
    }

    /// The time that `part` of a hundred are not above, in milliseconds.
    pub fn percentile(&self, part: usize) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let place = sorted.len().saturating_sub(1) * part / 100;
        sorted.get(place).map_or(f64::NAN, |time| time.as_secs_f64() * 1_000.0)
    }

    /// The median, in milliseconds.
    pub fn median(&self) -> f64 {
        self.percentile(50)
    }
}
