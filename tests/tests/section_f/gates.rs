//! What a release keeps to, whoever else releases at the same moment: calls in flight at three levels, and an account's pace.

use crate::world::World;
use anyhow::Result;

const RELEASERS: usize = 16;
const PLENTY: &str =
    "select scene.subscribe(1, 'plenty'); select scene.campaign(1, variadic array(select generate_series(1, 60)))";

/// Sixteen sessions release at once, some calls end in between: never more in flight than allowed, and in the end as many.
#[tokio::test]
async fn sixteen_sessions_fill_each_of_three_limits_and_pass_none() -> Result<()> {
    let limits = [
        ("public.campaigns", "update public.campaigns set max_concurrent_calls = 7"),
        ("public.organizations", "update public.organizations set max_concurrent_calls = 7"),
        ("public.carrier_accounts", "update public.carrier_accounts set max_concurrent_calls = 7"),
    ];
    for (level, limit) in limits {
        let world = World::with(PLENTY).await?;
        world.is(limit).await?;
        // A call to us takes a place too, where there is no campaign to count it.
        let inbound = usize::from(level != "public.campaigns");
        if inbound == 1 {
            world
                .is("insert into public.call_logs (organization_id, direction, carrier_account_id, call_sid, caller_number, callee_number, status)
                     select scene.id('8000', 1), 'inbound', account.id, 'in-1', '+915550001', '+915550002', 'in_progress'
                     from public.carrier_accounts as account limit 1")
                .await?;
        }
        for _ in 0..3 {
            let released = world.crowd((0..RELEASERS).map(|_| "select scene.release()".to_owned())).await?;
            assert!(released.iter().all(Result::is_ok), "{level}: {released:?}");
            let live = world.is("select count(*) from public.call_logs where status <> 'ended'").await?;
            assert_eq!(live, "7", "{level}");
            world
                .is("update public.call_logs set status = 'ended', call_status = 'expired', ended_at = private.clock_now()
                     where id in (select id from public.call_logs where status <> 'ended' and direction = 'outbound' limit 3)")
                .await?;
        }
    }
    Ok(())
}

/// The bucket is one, however many take from it.
#[tokio::test]
async fn sixteen_sessions_begin_no_more_calls_than_the_pace_admits() -> Result<()> {
    let world = World::with(PLENTY).await?;
    // So slow that the test ends before the next call is admitted.
    world.is("update public.carrier_accounts set max_calls_per_second = 0.001").await?;
    let released = world.crowd((0..RELEASERS).map(|_| "select scene.release()".to_owned())).await?;
    assert!(released.iter().all(Result::is_ok), "{released:?}");
    assert_eq!(world.is("select count(*) from public.call_logs").await?, "1");
    Ok(())
}
