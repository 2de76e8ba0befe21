//! Ten thousand events to fifty endpoints of which twenty misbehave; too long for CI, and run by hand before a release.

use anyhow::{Context, Result, ensure};
use std::{env, time::Duration};
use tests::{Stack, fan_out::Crowd};

/// Fifty endpoints of fifty organizations, two hundred events for each: thirty are well, five never answer, five refuse half of what they
/// are sent once, five redirect to loopback, and the names of five lead to another private address every time. Endpoints have the fifteen
/// seconds that they have in earnest. `CROWD_EACH=10 CROWD_EVENTS=2000` is the same ten thousand events with ten listeners each.
#[tokio::main]
async fn main() -> Result<()> {
    let supervisor = env::current_exe()?.with_file_name("stack-supervisor");
    supervisor.is_file().then_some(()).context("first: cargo build -p tests --bins")?;
    let number = |name: &str, default: usize| match env::var(name) {
        Ok(text) => text.parse().with_context(|| format!("{name} is no number")),
        Err(_) => Ok(default),
    };
    let crowd = Crowd {
        endpoints: 50,
        each: number("CROWD_EACH", 1)?,
        events: number("CROWD_EVENTS", 200)?,
        rate: number("CROWD_RATE", 10)?,
        patience: Duration::from_secs(15),
        rounds: number("CROWD_ROUNDS", 2)?,
    };
    println!("{crowd:?}");
    let stack = Stack::start_with_pool(&supervisor, 16).await?;
    let report = crowd.play(&stack).await?;
    println!("{}", report.text());
    ensure!(report.behind < Duration::from_secs(60), "a healthy endpoint waited for more than a minute");
    Ok(())
}
