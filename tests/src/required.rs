//! What a test wants of the machine beyond Rust, Node and Python.

use anyhow::{Result, bail};
use std::{
    env,
    io::{Write, stderr},
};

/// Says that something is not there, and what installs it: where the gate runs (`CI=true`) that fails the test; elsewhere the test is
/// left out, and says so.
pub fn missing(what: &str, advice: &str) -> Result<()> {
    if env::var("CI").is_ok_and(|value| value == "true") {
        bail!("{what} is missing: {advice}");
    }
    // Not with `eprintln`, which the test runner keeps to itself for a test that passes.
    writeln!(stderr(), "NOT TESTED: {what} is missing. {advice}")?;
    Ok(())
}
