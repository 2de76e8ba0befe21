//! Experiments 3, 4 and 5: a campaign is complete exactly once, a cancelled one never, and each call is counted once.

use crate::world::{World, count, gives, meet, refused};
use anyhow::Result;
use futures::future::try_join_all;

async fn two_last_leads() -> Result<World> {
    World::with("select scene.subscribe(1, 'plenty'); select scene.campaign(1, 1, 2); select scene.dial(1, 2)").await
}

/// Complete, and told once, in the outbox and on record.
async fn assert_complete(world: &World, state: &str) -> Result<()> {
    assert_eq!(world.is("select scene.campaign_of(1)").await?, state);
    assert_eq!(world.is("select scene.told('campaign.completed')").await?, "1");
    assert_eq!(world.is("select count(*) from public.audit_logs where action = 'campaign.completed'").await?, "1");
    Ok(())
}

#[tokio::test]
async fn f03_two_last_leads_that_end_at_once_complete_their_campaign_once() -> Result<()> {
    let world = two_last_leads().await?;
    let answers = world.meet("select scene.hang_up(1)", "select scene.hang_up(2, 'invalid_number')").await?;
    assert_eq!(answers, (gives("applied"), gives("applied")));
    assert_complete(&world, "completed, 0 open, 2 calls, 1 answered").await
}

#[tokio::test]
async fn f03_a_last_lead_that_ends_and_one_that_a_release_gives_up_complete_their_campaign_once() -> Result<()> {
    for hang_up_first in [true, false] {
        let world = World::with("select scene.subscribe(1, 'plenty'); select scene.campaign(1, 1, 2)").await?;
        world.is("update public.call_queue as queue set next_retry_at = 'infinity' from public.leads as lead where lead.id = queue.lead_id and lead.phone = scene.phone(2)").await?;
        world.is("select scene.dial(1)").await?;
        world.is("update public.leads set archived_at = private.clock_now() where phone = scene.phone(2)").await?;
        let (end, release) = ("select scene.hang_up(1)", "select scene.release()");
        let answers = if hang_up_first { world.meet(end, release).await? } else { world.meet(release, end).await? };
        assert!(answers.0.is_ok() && answers.1.is_ok(), "{answers:?}");
        assert_complete(&world, "completed, 0 open, 1 calls, 1 answered").await?;
    }
    Ok(())
}

#[tokio::test]
async fn f03_a_last_lead_that_ends_and_one_whose_gate_is_shut_complete_their_campaign_once() -> Result<()> {
    let world =
        World::with("select scene.subscribe(1, 'plenty'); select scene.campaign(1, 1, 2); select scene.release()")
            .await?;
    world.is("select scene.begin_dials(1, 1)").await?;
    world.is("update public.leads set do_not_call = true where phone = scene.phone(2)").await?;
    let answers = world.meet("select scene.begin_dials(2, 2)", "select scene.hang_up(1)").await?;
    assert_eq!(answers, (gives("opted_out"), gives("applied")));
    assert_complete(&world, "completed, 0 open, 1 calls, 1 answered").await
}

#[tokio::test]
async fn f03_forty_times_two_last_leads_complete_forty_campaigns() -> Result<()> {
    let world = World::with("select scene.subscribe(1, 'plenty')").await?;
    world.is("select scene.campaign(1, n, 100 + n) from generate_series(1, 40) as n").await?;
    world.is("select scene.dial(variadic array(select n + m from generate_series(1, 40) as n, unnest(array[0, 100]) as m))").await?;
    let sessions = [world.session().await?, world.session().await?];
    for number in 1..=40 {
        let ends = sessions
            .iter()
            .zip([number, 100 + number])
            .map(|(session, lead)| async move { session.done(&format!("select scene.hang_up({lead})")).await });
        assert_eq!(try_join_all(ends).await?, ["applied", "applied"]);
    }
    assert_eq!(world.is("select string_agg(distinct status || ' ' || open_leads || ' ' || total_calls, ', ') from public.campaigns").await?, "completed 0 2");
    assert_eq!(world.is("select scene.told('campaign.completed')").await?, "40");
    Ok(())
}

const CANCEL: &str = "select public.cancel_campaign((select id from public.campaigns)) ->> 'status'";

#[tokio::test]
async fn f04_a_campaign_whose_last_call_ends_while_it_is_cancelled_does_not_pass_through_completed() -> Result<()> {
    let world = two_last_leads().await?;
    world.is("select scene.hang_up(2)").await?;
    let (owner, carrier) = (world.session_of_owner(1).await?, world.session().await?);
    let answers = meet(&owner, CANCEL, &carrier, "select scene.hang_up(1, 'busy')").await?;
    assert_eq!(answers, (gives("cancelled"), gives("applied")));
    assert_eq!(world.is("select scene.campaign_of(1)").await?, "cancelled, 0 open, 2 calls, 1 answered");
    assert_eq!(world.is("select scene.waits(1)").await?, "failed 1, skipped campaign_cancelled");
    assert_eq!(world.is("select scene.told('campaign.completed')").await?, "0");
    assert_eq!(world.is("select count(*) from public.campaigns where completed_at is null").await?, "1");
    Ok(())
}

#[tokio::test]
async fn f04_a_campaign_that_completes_while_somebody_cancels_it_is_complete() -> Result<()> {
    let world = two_last_leads().await?;
    world.is("select scene.hang_up(2)").await?;
    let (owner, carrier) = (world.session_of_owner(1).await?, world.session().await?);
    let answers = meet(&carrier, "select scene.hang_up(1)", &owner, CANCEL).await?;
    assert_eq!(answers, (gives("applied"), refused("invalid_transition")));
    assert_complete(&world, "completed, 0 open, 2 calls, 2 answered").await
}

#[tokio::test]
async fn f04_a_cancellation_and_a_release_at_once_leave_nobody_waiting_to_be_called() -> Result<()> {
    for cancel_first in [true, false] {
        let world = World::with("select scene.subscribe(1, 'plenty'); select scene.campaign(1, 1, 2)").await?;
        let (owner, dispatcher) = (world.session_of_owner(1).await?, world.session().await?);
        let release = "select scene.release()";
        let (cancelled, released) = if cancel_first {
            meet(&owner, CANCEL, &dispatcher, release).await?
        } else {
            let (released, cancelled) = meet(&dispatcher, release, &owner, CANCEL).await?;
            (cancelled, released)
        };
        assert_eq!(cancelled, gives("cancelled"));
        assert_eq!(released, gives(if cancel_first { "none" } else { "1 2" }));
        if !cancel_first {
            assert_eq!(world.is("select scene.begin_dials(1, 1, 2)").await?, "campaign_cancelled campaign_cancelled");
        }
        assert_eq!(world.is("select scene.campaign_of(1)").await?, "cancelled, 0 open, 0 calls, 0 answered");
        assert_eq!(world.is("select scene.waits(1)").await?, "failed 0, skipped campaign_cancelled");
        assert_eq!(world.is("select scene.told('campaign.completed')").await?, "0");
    }
    Ok(())
}

#[tokio::test]
async fn f05_a_call_whose_end_two_tell_at_once_is_counted_once() -> Result<()> {
    let world = two_last_leads().await?;
    let answers =
        world.meet("select scene.hang_up(1, key => 'one')", "select scene.hang_up(1, key => 'other')").await?;
    assert_eq!(answers, (gives("applied"), gives("ignored")));
    assert_eq!(world.is("select scene.campaign_of(1)").await?, "running, 1 open, 1 calls, 1 answered");
    assert_eq!(world.is("select scene.usage(1)").await?, "ai_calls 1+1, call_seconds 30+0");
    Ok(())
}

#[tokio::test]
async fn f05_a_call_whose_end_many_tell_at_once_is_counted_once() -> Result<()> {
    let world = two_last_leads().await?;
    // The same delivery, other deliveries, the carrier's own record: all at once.
    let told = world.crowd((0..12).map(|n| {
        let key = if n % 2 == 0 { "'the-end'".to_owned() } else { format!("'end-{n}'") };
        format!("select scene.hang_up(1, key => {key})")
    }));
    let told = told.await?;
    assert_eq!(count(&told, "applied"), 1, "{told:?}");
    assert_eq!(count(&told, "applied") + count(&told, "duplicate") + count(&told, "ignored"), 12, "{told:?}");
    assert_eq!(world.is("select scene.campaign_of(1)").await?, "running, 1 open, 1 calls, 1 answered");
    assert_eq!(world.is("select scene.usage(1)").await?, "ai_calls 1+1, call_seconds 30+0");
    assert_eq!(world.is("select scene.told('call.ended')").await?, "1");
    Ok(())
}

#[tokio::test]
async fn f05_calls_that_end_at_once_are_all_counted() -> Result<()> {
    let world = World::with(
        "select scene.subscribe(1, 'plenty'); select scene.campaign(1, variadic array(select generate_series(1, 16)))",
    )
    .await?;
    world.is("select scene.dial(variadic array(select generate_series(1, 16)))").await?;
    let told = world.crowd((1..=16).map(|number| format!("select scene.hang_up({number})"))).await?;
    assert_eq!(count(&told, "applied"), 16, "{told:?}");
    assert_complete(&world, "completed, 0 open, 16 calls, 16 answered").await?;
    assert_eq!(world.is("select scene.usage(1)").await?, "ai_calls 16+0, call_seconds 480+0");
    Ok(())
}

#[tokio::test]
async fn of_two_who_start_a_campaign_at_once_one_does() -> Result<()> {
    let world = World::with("select scene.subscribe(1, 'plenty')").await?;
    world.is("insert into public.leads (organization_id, name, phone) select scene.id('8000', 1), 'Lead', scene.phone(1)").await?;
    let (one, other) = (world.session_of_owner(1).await?, world.session_of_owner(1).await?);
    let campaign = one.done("select public.create_campaign('Autumn') ->> 'id'").await?;
    let start = format!("select public.start_campaign('{campaign}') ->> 'status'");
    assert_eq!(meet(&one, &start, &other, &start).await?, (gives("running"), refused("invalid_transition")));
    assert_eq!(world.is("select count(*) from public.call_queue").await?, "1");
    Ok(())
}

/// What disagrees with what it is counted from: nothing, ever.
const DISAGREEMENTS: &str = "
    select string_agg(problem, '; ')
    from (
      select format('campaign %s: %s', campaign.name, row(campaign.*)) as problem
      from public.campaigns as campaign
      cross join lateral (
        select count(*) as leads
        from public.campaign_leads as member
        where member.campaign_id = campaign.id and member.status in ('enrolled', 'queued', 'calling')
      ) as open
      cross join lateral (
        select count(*) filter (where log.dialled) as calls, count(*) filter (where log.dialled and log.call_status = 'answered') as answered
        from public.call_logs as log
        where log.campaign_id = campaign.id and log.status = 'ended'
      ) as ended
      where (campaign.open_leads, campaign.total_calls, campaign.answered_calls) <> (open.leads, ended.calls, ended.answered)
        or (campaign.open_leads = 0) <> (campaign.status in ('completed', 'cancelled'))
        or (campaign.status = 'completed') <> (
          1 = (select count(*) from private.outbox as told where told.topic = 'campaign.completed' and told.key = campaign.id::text)
        )
      union all
      select format('queue row %s is %s, its lead %s, its attempts under way %s', queue.id, queue.status, member.status, live.attempts)
      from public.call_queue as queue
      join public.campaign_leads as member using (organization_id, campaign_id, lead_id)
      cross join lateral (
        select count(*) as attempts from public.call_logs as log where log.queue_id = queue.id and log.status <> 'ended'
      ) as live
      where (queue.status = 'processing')::integer <> live.attempts or (member.status = 'calling')::integer <> live.attempts
      union all
      select format('organization %s: %s calls used, %s held', log.organization_id, log.usage_count, log.reserved)
      from public.usage_logs as log
      where log.feature_key = 'ai_calls'
        and (log.usage_count, log.reserved) <> (
          select count(*) filter (where attempt.bill_duration_seconds > 0), count(*) filter (where attempt.status <> 'ended')
          from public.call_logs as attempt
          where attempt.organization_id = log.organization_id
        )
      union all
      select problem from private.check_holds()
      union all
      select problem from private.check_credit()
      union all
      select format('%s seconds used and %s held of 60', log.usage_count, log.reserved)
      from public.usage_logs as log
      join public.subscriptions as subscription using (organization_id)
      join public.subscription_plans as plan on plan.id = subscription.plan_id
      where plan.slug = 'minute' and log.feature_key = 'call_seconds' and log.usage_count + log.reserved > 60
      union all
      select format('wallet: %s consumed, calls cost %s', wallet.total_consumed_minor, coalesce(sum(charge.charged_minor), 0))
      from public.call_credits as wallet
      left join public.call_charges as charge using (organization_id, currency)
      group by wallet.id
      having wallet.total_consumed_minor <> coalesce(sum(charge.charged_minor), 0) or sum(charge.uncollected_minor) > 0
      union all
      select format('event %s: %s', event.kind, event.error) from private.webhook_events as event where event.status = 'failed'
    ) as found";

#[tokio::test]
async fn whatever_sixteen_sessions_do_at_once_every_count_agrees_in_the_end() -> Result<()> {
    everything_at_once("select scene.subscribe(1, 'plenty'), scene.subscribe(2, 'five')").await
}

#[tokio::test]
async fn whatever_sixteen_sessions_do_at_once_what_is_held_and_paid_agrees_in_the_end() -> Result<()> {
    everything_at_once("select scene.subscribe(1, 'prepaid'), scene.subscribe(2, 'minute'); select scene.credit(3000)")
        .await
}

async fn everything_at_once(plans: &str) -> Result<()> {
    let world = World::with(plans).await?;
    world.is("select scene.campaign(1 + n % 2, 10 * n + 1, 10 * n + 2, 10 * n + 3, 10 * n + 4) from generate_series(1, 8) as n").await?;
    world.is("select scene.longest(30)").await?;
    let lead = |n: usize| 10 * (1 + n % 8) + 1 + n / 8 % 4;
    let done = |n: usize, step: usize| {
        let (number, key) = (lead(n), n % 3);
        match (n + step) % 16 {
            0..4 => "select scene.release()".to_owned(),
            4..7 => format!("select scene.begin_dials({key}, {number}, {}, {})", lead(n + 1), lead(n + 9)),
            7..9 => format!("select scene.record_dial({number}, '{}')", ["accepted", "refused", "deferred", "unknown"][(n + step) / 16 % 4]),
            9 => format!(r#"select scene.tell({number}, '{{"status": "ringing"}}')"#),
            10..13 => format!("select scene.hang_up({number}, '{}', key => '{number}-{key}')", ["answered", "busy", "invalid_number"][key]),
            13 => format!("update public.leads set do_not_call = true where phone = scene.phone({number})"),
            14 => "update public.campaigns set status = case status when 'running' then 'paused' else 'running' end::public.campaign_status
                   where status in ('running', 'paused') and name = 'Campaign of 11'".to_owned(),
            _ => "delete from private.dispatch_holds; update private.clock_offset set shift = shift + interval '20 minutes'".to_owned(),
        }
    };
    for step in 0..16 {
        let told = world.crowd((0..16).map(|n| done(n + 7 * step, step))).await?;
        let failures: Vec<_> = told.iter().filter_map(|answer| answer.as_ref().err()).collect();
        assert!(failures.is_empty(), "{failures:?} in step {step}");
        assert_eq!(world.is(DISAGREEMENTS).await?, "", "after step {step}");
    }
    assert_ne!(world.is("select count(*) from public.call_logs where dialled").await?, "0");
    Ok(())
}
