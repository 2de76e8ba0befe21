//! The crowd of `cargo run -p tests --bin crowd`, in a size for CI.

use super::*;
use tests::fan_out::Crowd;

#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_of_which_some_hang_and_some_lead_inside_delays_nobody_who_is_well() -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    let crowd = Crowd { endpoints: 20, each: 10, events: 20, rate: 20, patience: PATIENCE, rounds: 2 };
    let report = crowd.play(&stack).await?;
    println!("{}", report.text());
    let slow = "select string_agg(distinct split_part(split_part(url, '/', 4), '-', 1), ' ') from public.webhook_endpoints where is_slow and url like 'http:%'";
    assert_eq!(stack.value(slow).await?.trim(), "hang", "who answers nothing is told so");
    Ok(())
}
