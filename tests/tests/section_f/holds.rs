//! Experiment 20 where calls are made: what a cap or a wallet leaves is held at the release and settled at the end, whoever else is at it.

use crate::world::{World, gives, refused};
use anyhow::Result;

/// What disagrees with what is held, with the ledger, or with what the calls cost: nothing, ever.
const HELD_AND_PAID: &str = "
    select string_agg(problem, '; ')
    from (
      select problem from private.check_holds()
      union all
      select problem from private.check_credit()
      union all
      select format('%s consumed, calls cost %s', wallet.total_consumed_minor, calls.cost)
      from public.call_credits as wallet
      cross join lateral (
        select coalesce(sum(charge.charged_minor), 0) as cost
        from public.call_charges as charge
        where charge.organization_id = wallet.organization_id
      ) as calls
      where wallet.total_consumed_minor <> calls.cost
    ) as found";

/// The numbers under way.
const LIVE: &str = "select string_agg(scene.number(callee_number)::text, ' ' order by id) from public.call_logs where status <> 'ended'";

/// Sixteen sessions, of which some tell how the calls under way ended and the others release: nobody is told twice.
async fn ends_and_releases(world: &World, outcome: impl Fn(usize) -> &'static str) -> Result<usize> {
    let live = world.is(LIVE).await?;
    let numbers: Vec<_> = live.split(' ').filter(|number| !number.is_empty()).collect();
    if !numbers.is_empty() {
        world.is(&format!("select scene.begin_dials(1, {})", numbers.join(", "))).await?;
    }
    let mut told: Vec<_> = numbers
        .iter()
        .zip(0..)
        .map(|(number, n)| format!("select scene.hang_up({number}, '{}')", outcome(n)))
        .collect();
    told.extend((told.len()..16).map(|_| "select scene.release()".to_owned()));
    let answers = world.crowd(told).await?;
    assert!(answers.iter().all(Result::is_ok), "{answers:?}");
    assert_eq!(world.is(HELD_AND_PAID).await?, "");
    Ok(numbers.len())
}

#[tokio::test]
async fn f20_sixteen_sessions_of_calls_on_a_cap_of_sixty_seconds_make_two_of_thirty() -> Result<()> {
    let world = World::with(
        "select scene.subscribe(1, 'minute'); select scene.campaign(1, variadic array(select generate_series(1, 40)))",
    )
    .await?;
    world.is("select scene.longest(30)").await?;
    let released = world.crowd((0..16).map(|_| "select scene.release()".to_owned())).await?;
    assert!(released.iter().all(Result::is_ok), "{released:?}");
    assert_eq!(world.is("select scene.usage(1)").await?, "ai_calls 0+2, call_seconds 0+60");
    assert_eq!(world.is(HELD_AND_PAID).await?, "");
    // They are busy while others look for what they give back, and at last they are answered.
    for _ in 0..3 {
        assert_eq!(ends_and_releases(&world, |_| "busy").await?, 2);
        world.is("select scene.release()").await?;
        assert_eq!(world.is("select scene.usage(1)").await?, "ai_calls 0+2, call_seconds 0+60");
    }
    assert_eq!(ends_and_releases(&world, |_| "answered").await?, 2);
    assert_eq!(ends_and_releases(&world, |_| "answered").await?, 0);
    assert_eq!(world.is("select scene.usage(1)").await?, "ai_calls 2+0, call_seconds 60+0");
    Ok(())
}

#[tokio::test]
async fn f20_sixteen_sessions_of_calls_on_credit_for_five_make_five() -> Result<()> {
    for (plan, included) in [("prepaid", 0), ("mixed", 3)] {
        let world = World::with("select scene.campaign(1, variadic array(select generate_series(1, 40)))").await?;
        world.is(&format!("select scene.subscribe(1, '{plan}'); select scene.longest(30)")).await?;
        // Thirty seconds are three rupees.
        world.is("select scene.credit(1500)").await?;
        let released = world.crowd((0..16).map(|_| "select scene.release()".to_owned())).await?;
        assert!(released.iter().all(Result::is_ok), "{released:?}");
        let wallet = "select balance_minor || ' ' || held_minor from public.call_credits";
        assert_eq!(world.is(wallet).await?, "1500 1500");
        assert_eq!(world.is(HELD_AND_PAID).await?, "");
        let all = included + 5;
        assert_eq!(ends_and_releases(&world, |n| if n % 2 == 0 { "answered" } else { "busy" }).await?, all);
        world.is("select scene.release()").await?;
        while ends_and_releases(&world, |_| "answered").await? > 0 {
            world.is("select scene.release()").await?;
        }
        assert_eq!(world.is(wallet).await?, "0 0", "{plan}");
        let calls = "select count(*) || ' of ' || sum(bill_duration_seconds) from public.call_logs where bill_duration_seconds > 0";
        assert_eq!(world.is(calls).await?, format!("{all} of {}", 30 * all), "{plan}");
        let charged =
            "select count(*) || ' ' || sum(charged_minor) || ' ' || sum(uncollected_minor) from public.call_charges";
        assert_eq!(world.is(charged).await?, "5 1500 0", "{plan}");
    }
    Ok(())
}

#[tokio::test]
async fn f20_a_call_that_two_tell_the_end_of_at_once_is_paid_once() -> Result<()> {
    let world =
        World::with("select scene.subscribe(1, 'prepaid'); select scene.campaign(1, 1); select scene.credit(9000)")
            .await?;
    world.is("select scene.dial(1)").await?;
    let answers =
        world.meet("select scene.hang_up(1, key => 'one')", "select scene.hang_up(1, key => 'other')").await?;
    assert_eq!(answers, (gives("applied"), gives("ignored")));
    assert_eq!(world.is("select balance_minor || ' ' || held_minor from public.call_credits").await?, "8700 0");
    assert_eq!(world.is(HELD_AND_PAID).await?, "");
    Ok(())
}

#[tokio::test]
async fn f20_credit_that_is_held_for_a_call_is_not_spent_or_paid_back_at_the_same_time() -> Result<()> {
    let world =
        World::with("select scene.subscribe(1, 'prepaid'); select scene.campaign(1, 1); select scene.credit(6000)")
            .await?;
    let back = "select private.refund_credit(organization_id, id, 1, 'back', private.clock_now()) from public.credit_transactions where type = 'purchase'";
    assert_eq!(world.meet("select scene.release()", back).await?, (gives("1"), refused("insufficient_credit")));
    assert_eq!(world.is("select scene.debit(1, 'fee')").await?, "0");
    // The other way round there is not enough for ten minutes, and the call may last as long as the rest reaches.
    let world =
        World::with("select scene.subscribe(1, 'prepaid'); select scene.campaign(1, 1); select scene.credit(6000)")
            .await?;
    assert_eq!(
        world.meet("select scene.debit(1000, 'fee')", "select scene.release()").await?,
        (gives("1000"), gives("1"))
    );
    assert_eq!(world.is("select time_limit_seconds from public.call_logs").await?, "500");
    Ok(())
}
