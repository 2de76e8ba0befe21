//! Plays storms at full size and tells what came of them; too long for CI, and run by hand before a release.

use anyhow::{Context, Result};
use std::{env, time::Duration};
use tests::{
    Stack,
    storm::{Storm, Weather},
};

/// The database stopped for half a minute under fifty events a second, then a road to PostgREST, whose pool is two, on which everything
/// goes wrong, under a hundred hang-ups a second, sent up to three times, and with the queue away for five seconds of it.
#[tokio::main]
async fn main() -> Result<()> {
    let supervisor = env::current_exe()?.with_file_name("stack-supervisor");
    supervisor.is_file().then_some(()).context("first: cargo build -p tests --bins")?;
    let wanted = env::args().nth(1).unwrap_or_default();
    let stopped = Storm {
        weather: Weather::DatabaseStopped,
        rate: 50,
        quiet: Duration::from_secs(5),
        lasts: Duration::from_secs(30),
        queue_away: Duration::ZERO,
        copies: 1,
    };
    let road = Storm {
        weather: Weather::Road,
        rate: 100,
        quiet: Duration::from_secs(3),
        lasts: Duration::from_secs(30),
        queue_away: Duration::from_secs(5),
        copies: 3,
    };
    for (name, storm, pool) in [("stopped", stopped, 8), ("road", road, 2)] {
        if !wanted.is_empty() && wanted != name {
            continue;
        }
        let stack = Stack::start_with_pool(&supervisor, pool).await?;
        println!("{name}: {storm:?}");
        println!("{}", storm.play(&stack).await?.text());
    }
    Ok(())
}
