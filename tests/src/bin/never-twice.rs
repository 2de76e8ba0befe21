//! `cargo run -p tests --bin never-twice -- --attempts 5000`: too long for CI, and run by hand before a release.

use anyhow::Result;
use clap::Parser;

/// Calls people under severe faults and proves from the carrier's log that nobody was called twice.
#[derive(Debug, Parser)]
struct Arguments {
    /// Attempts at least.
    #[arg(long, default_value_t = 5_000)]
    attempts: usize,
    /// Calls at once at most: of the campaign, the organization and the carrier account.
    #[arg(long, default_value_t = 32)]
    live_calls: i32,
    /// Decides what goes wrong, and how calls end.
    #[arg(long, default_value_t = 7)]
    seed: u64,
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    tests::never_twice::play(arguments.attempts, arguments.live_calls, arguments.seed).await
}
