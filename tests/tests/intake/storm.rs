//! The storms of `cargo run -p tests --bin storm`, in a size for CI.

use anyhow::Result;
use std::time::Duration;
use tests::{
    Stack,
    storm::{Storm, Weather},
    supervisor_binary,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_database_loses_nothing() -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    let storm = Storm {
        weather: Weather::DatabaseStopped,
        rate: 50,
        quiet: Duration::from_millis(500),
        lasts: Duration::from_secs(3),
        queue_away: Duration::ZERO,
        copies: 1,
    };
    let report = storm.play(&stack).await?;
    println!("{}", report.text());
    assert_eq!(report.refused, 0, "carriers see nothing of it");
    assert!(report.buffered > 0, "the database was never away");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_road_on_which_everything_goes_wrong_loses_nothing() -> Result<()> {
    let stack = Stack::start_with_pool(supervisor_binary!(), 2).await?;
    let storm = Storm {
        weather: Weather::Road,
        rate: 30,
        quiet: Duration::from_millis(500),
        lasts: Duration::from_secs(4),
        queue_away: Duration::from_secs(1),
        copies: 3,
    };
    let report = storm.play(&stack).await?;
    println!("{}", report.text());
    assert!(report.buffered > 0 && report.refused > 0, "neither the database nor the queue was ever away");
    assert!(report.acknowledged >= report.calls, "each is acknowledged in the end");
    Ok(())
}
