//! Measurements by hand, against limits: they say how fast it is on one machine, and no test depends on them. One file each.

mod figures;
mod intake;
mod invoices;
mod metering;
mod release;
mod rls;

use anyhow::Result;
use clap::Parser;

/// Measurements on real parts. Run them alone on a machine, in a release build.
#[derive(Debug, Parser)]
#[command(name = "bench", bin_name = "cargo run -p bench --release --")]
enum Benchmark {
    /// What row-level security costs through PostgREST, against the same query with its filter written by hand.
    Rls(rls::Options),
    /// What a release costs, whatever is queued.
    Release(release::Options),
    /// What `webhook-intake` costs, against a handler that only forwards.
    Intake(intake::Options),
    /// How fast usage is counted, read and held, against the limit of the machine.
    Metering(metering::Options),
    /// The invoice run in batches, against one transaction an invoice.
    Invoices(invoices::Options),
}

#[tokio::main]
async fn main() -> Result<()> {
    println!("{}", figures::machine());
    match Benchmark::parse_from(local::arguments()) {
        Benchmark::Rls(options) => rls::run(&options).await,
        Benchmark::Release(options) => release::run(options).await,
        Benchmark::Intake(options) => intake::run(options).await,
        Benchmark::Metering(options) => metering::run(options).await,
        Benchmark::Invoices(options) => invoices::run(&options).await,
    }
}
