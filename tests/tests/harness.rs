//! The stand that all other tests rely on.

use anyhow::Result;
use tests::{Database, Fingerprint, Stack, scene, supervisor_binary};

#[tokio::test]
async fn a_database_is_the_test_s_own() -> Result<()> {
    let (one, other) = (Database::migrated(supervisor_binary!()).await?, Database::migrated(supervisor_binary!()).await?);
    let (one, other) = (one.connect(local::parts::postgres::Role::Owner).await?, other.connect(local::parts::postgres::Role::Owner).await?);
    let before = Fingerprint::of(&other).await?;
    one.batch_execute("insert into private.clock_offset (shift) values ('1 day')").await?;
    before.assert_same(&Fingerprint::of(&other).await?);
    let changed = before.changed(&Fingerprint::of(&one).await?);
    assert_eq!(changed.into_iter().collect::<Vec<_>>(), ["private.clock_offset"]);
    Ok(())
}

#[tokio::test]
async fn a_stack_plays_a_campaign_up_to_its_calls() -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    let campaign = scene::running_campaign(&stack, &scene::phones(1, 3)).await?;
    let calls = campaign.dial(&stack).await?;
    let mut callees: Vec<String> = calls.into_iter().map(|call| call.to).collect();
    callees.sort();
    assert_eq!(callees, scene::phones(1, 3));
    Ok(())
}
