//! Experiments 7 and 13 to 18: what becomes of a call when workers die, callbacks race and gates close.

use crate::world::{World, count, gives, refused};
use anyhow::Result;

/// A world in which these numbers of Near's one campaign are being called.
async fn dialled(count: u8) -> Result<World> {
    let numbers: Vec<_> = (1..=count).map(|number| number.to_string()).collect();
    let numbers = numbers.join(", ");
    World::with(&format!(
        "select scene.subscribe(1, 'plenty'); select scene.campaign(1, {numbers}); select scene.dial({numbers})"
    ))
    .await
}

const RINGS: &str = r#"select scene.tell(1, '{"status": "ringing"}')"#;
const ANSWERED: &str = r#"select scene.tell(1, '{"status": "in_progress"}')"#;

#[tokio::test]
async fn f07_a_ring_that_was_overtaken_by_the_end_does_not_take_it_back() -> Result<()> {
    let world = dialled(1).await?;
    let (end, ring) = world.meet("select scene.hang_up(1)", RINGS).await?;
    // The ring adds when it rang, and nothing else.
    assert_eq!((end, ring), (gives("applied"), gives("applied")));
    assert_eq!(world.is("select scene.call(1)").await?, "ended answered");
    assert_eq!(world.is("select scene.campaign_of(1)").await?, "completed, 0 open, 1 calls, 1 answered");
    let back = world.crowd(["ringing", "in_progress", "queued", "created"].map(|status| {
        format!("update public.call_logs set status = '{status}', call_status = null, ended_at = null where id = scene.attempt(1)")
    }));
    assert_eq!(back.await?, vec![refused("23514"); 4], "and nobody else does either");
    Ok(())
}

#[tokio::test]
async fn f07_the_events_of_a_call_all_at_once_end_it_once() -> Result<()> {
    let world = dialled(1).await?;
    let end = "select scene.hang_up(1)";
    let events = [RINGS, ANSWERED, end, RINGS, end, ANSWERED, RINGS, end, ANSWERED, end, RINGS, end];
    let told = world.crowd(events.map(str::to_owned)).await?;
    assert_eq!(count(&told, "failed"), 0, "{told:?}");
    assert_eq!(world.is("select scene.call(1)").await?, "ended answered");
    assert_eq!(world.is("select scene.usage(1)").await?, "ai_calls 1+0, call_seconds 30+0");
    assert_eq!(world.is("select scene.campaign_of(1)").await?, "completed, 0 open, 1 calls, 1 answered");
    let times =
        "select answered_at >= created_at and ended_at >= answered_at and ringing_at <= ended_at from public.call_logs";
    assert_eq!(world.is(times).await?, "t");
    Ok(())
}

#[tokio::test]
async fn f07_a_store_s_call_that_is_written_while_its_leg_moves_on_says_what_the_leg_says() -> Result<()> {
    let attach =
        "insert into public.calls (organization_id, store_id, call_log_id, from_phone, to_phone, direction, start_time)
                  select organization_id, scene.id('a000', 1), id, 'anonymous', 'anonymous', 'outbound', created_at
                  from public.call_logs where id = scene.attempt(1) returning 'written'";
    let end = "select scene.hang_up(1)";
    for end_first in [true, false] {
        let world = dialled(1).await?;
        let answers = if end_first { world.meet(end, attach).await? } else { world.meet(attach, end).await? };
        let wanted =
            if end_first { (gives("applied"), gives("written")) } else { (gives("written"), gives("applied")) };
        assert_eq!(answers, wanted);
        let told = "select call.status || ' ' || (call.end_time = log.ended_at) || ' ' || (call.twilio_call_sid = log.call_sid)
                    from public.calls as call join public.call_logs as log on log.id = call.call_log_id";
        assert_eq!(world.is(told).await?, "completed true true");
    }
    Ok(())
}

#[tokio::test]
async fn f13_of_two_workers_with_the_same_message_one_dials() -> Result<()> {
    let world =
        World::with("select scene.subscribe(1, 'plenty'); select scene.campaign(1, 1); select scene.release()").await?;
    let answers = world.meet("select scene.begin_dials(1, 1)", "select scene.begin_dials(2, 1)").await?;
    assert_eq!(answers, (gives("1"), gives("already_begun")));
    Ok(())
}

#[tokio::test]
async fn f13_a_worker_that_dies_before_it_was_told_to_dial_has_dialled_nobody_and_another_dials() -> Result<()> {
    let world =
        World::with("select scene.subscribe(1, 'plenty'); select scene.campaign(1, 1); select scene.release()").await?;
    let (dying, other) = (world.session().await?, world.session().await?);
    dying.done("begin").await?;
    assert_eq!(dying.run("select scene.begin_dials(1, 1)").await, gives("1"));
    let waiting = other.start("select scene.begin_dials(2, 1)");
    waiting.waits_for(&dying).await?;
    dying.dies().await?;
    assert_eq!(waiting.ends().await?, gives("1"));
    Ok(())
}

#[tokio::test]
async fn f13_what_a_worker_dialled_before_it_died_is_asked_about_and_never_dialled_again() -> Result<()> {
    let world =
        World::with("select scene.subscribe(1, 'plenty'); select scene.campaign(1, 1); select scene.release()").await?;
    assert_eq!(world.is("select scene.begin_dials(1, 1)").await?, "1");
    // The carrier took the call; the worker died before it could say so, and its lease ran out.
    world.is("update public.call_logs set lease_until = now() - interval '1 second', not_after = now() + interval '5 minutes'").await?;
    for worker in [1, 2] {
        assert_eq!(world.is(&format!("select scene.begin_dials({worker}, 1)")).await?, "already_begun");
    }
    assert_eq!(world.is("select scene.release()").await?, "none");
    let ask = "select public.reconcile_calls('{\"v\": 1}') #>> '{attempts,0,status}'";
    let asked = world.crowd([ask; 4].map(str::to_owned)).await?;
    assert_eq!((count(&asked, "submitting"), count(&asked, "")), (1, 3), "{asked:?}");
    assert_eq!(world.is("select count(*) from public.call_logs").await?, "1");
    // The carrier knows nothing of it for certain only much later: then the lead is tried again, and as another attempt.
    assert_eq!(
        world.is(r#"select scene.tell(1, '{"status": "ended", "outcome": "lost", "provider_call_id": null}')"#).await?,
        "applied"
    );
    assert_eq!(world.is("select scene.waits(1)").await?, "queued retry_lost 1, queued");
    assert_eq!(world.is("select scene.release()").await?, "none");
    Ok(())
}

#[tokio::test]
async fn f14_a_callback_that_comes_while_the_dispatcher_records_waits_and_is_applied() -> Result<()> {
    let world = World::with("select scene.subscribe(1, 'plenty'); select scene.campaign(1, 1); select scene.release(); select scene.begin_dials(1, 1)").await?;
    let answers = world.meet("select scene.record_dial(1, 'accepted')", RINGS).await?;
    assert_eq!(answers, (gives("1"), gives("applied")));
    assert_eq!(world.is("select scene.call(1)").await?, "ringing");
    Ok(())
}

#[tokio::test]
async fn f14_a_call_that_is_over_before_the_dispatcher_records_it_stays_over() -> Result<()> {
    for record in ["accepted", "unknown", "refused", "deferred"] {
        let world = World::with("select scene.subscribe(1, 'plenty'); select scene.campaign(1, 1); select scene.release(); select scene.begin_dials(1, 1)").await?;
        let (end, recorded) =
            world.meet("select scene.hang_up(1)", &format!("select scene.record_dial(1, '{record}')")).await?;
        assert_eq!(end, gives("applied"));
        assert_eq!(recorded, gives(if record == "accepted" { "1" } else { "0" }), "{record}");
        assert_eq!(world.is("select scene.call(1)").await?, "ended answered", "{record}");
        assert_eq!(world.is("select scene.waits(1)").await?, "completed 1, called", "{record}");
        assert_eq!(world.is("select scene.usage(1)").await?, "ai_calls 1+0, call_seconds 30+0", "{record}");
        assert_eq!(world.is("select scene.told('alarm.duplicate_dial')").await?, "0", "{record}");
    }
    Ok(())
}

#[tokio::test]
async fn f15_a_failed_callback_delivered_twice_at_once_counts_once() -> Result<()> {
    let world = dialled(1).await?;
    let busy = "select scene.hang_up(1, 'busy', key => 'the-end')";
    assert_eq!(world.meet(busy, busy).await?, (gives("applied"), gives("duplicate")));
    assert_eq!(world.is("select scene.waits(1)").await?, "queued retry_busy 1, queued");
    Ok(())
}

#[tokio::test]
async fn f15_a_failed_callback_that_is_replayed_later_puts_nothing_back_into_the_queue() -> Result<()> {
    let world = dialled(1).await?;
    let first = world.is("select scene.attempt(1)").await?;
    let replay =
        |key: &str| format!(r#"select scene.tell(1, '{{"status": "ended", "outcome": "busy"}}', '{key}', '{first}')"#);
    assert_eq!(world.is(&replay("the-end")).await?, "applied");
    // Two hours later it is being called again, and then is reached.
    world.is("update private.clock_offset set shift = shift + interval '2 hours'").await?;
    for (step, state) in [
        ("select scene.release()", "processing 1, calling"),
        ("select scene.begin_dials(1, 1)", "processing 1, calling"),
        ("select scene.hang_up(1)", "completed 2, called"),
    ] {
        world.is(step).await?;
        for (key, told) in [("the-end", "duplicate"), (step, "ignored")] {
            assert_eq!(world.is(&replay(&key.replace('\'', ""))).await?, told, "after {step}");
            assert_eq!(world.is("select scene.waits(1)").await?, state, "after {step}");
        }
    }
    assert_eq!(world.is("select scene.campaign_of(1)").await?, "completed, 0 open, 2 calls, 1 answered");
    assert_eq!(world.is("select scene.release()").await?, "none");
    Ok(())
}

#[tokio::test]
async fn f16_every_way_in_which_a_call_can_end_ends_it() -> Result<()> {
    let world = World::new().await?;
    // A caller who cancels is `cancelled`, a ring that times out is `no_answer`: the words of the carriers are translated before.
    let outcomes = world
        .is("select string_agg(outcome::text, ' ') from unnest(enum_range(null::public.call_outcome)) as outcome")
        .await?;
    assert!(outcomes.contains("cancelled") && outcomes.contains("no_answer"), "{outcomes}");
    let outcomes: Vec<_> = outcomes.split(' ').collect();
    let numbers = (1..=outcomes.len()).map(|number| number.to_string()).collect::<Vec<_>>().join(", ");
    world
        .is(&format!(
            "select scene.subscribe(1, 'plenty'); select scene.campaign(1, {numbers}); select scene.dial({numbers})"
        ))
        .await?;
    for (outcome, number) in outcomes.iter().zip(1..) {
        assert_eq!(world.is(&format!("select scene.hang_up({number}, '{outcome}')")).await?, "applied", "{outcome}");
        assert_eq!(world.is(&format!("select scene.call({number})")).await?, format!("ended {outcome}"));
    }
    let hanging = "select count(*) from public.call_queue as queue
                   join public.campaign_leads as member using (organization_id, campaign_id, lead_id)
                   where queue.status = 'processing' or member.status = 'calling'";
    assert_eq!(world.is(hanging).await?, "0", "no lead is left in a call");
    assert_eq!(world.is("select sum(reserved) from public.usage_logs").await?, "0", "and nothing is held for one");
    Ok(())
}

#[tokio::test]
async fn f17_who_opts_out_while_a_retry_is_pending_is_not_called_again() -> Result<()> {
    let world = dialled(3).await?;
    world.is("select scene.hang_up(1, 'busy'), scene.hang_up(2, 'busy'), scene.hang_up(3, 'busy')").await?;
    assert_eq!(world.is("select scene.waits(1)").await?, "queued retry_busy 1, queued");
    world.is("update public.leads set do_not_call = true where phone = scene.phone(1)").await?;
    world.is("update public.leads set abuse_flag = true where phone = scene.phone(2)").await?;
    world.is("update private.clock_offset set shift = shift + interval '2 hours'").await?;
    assert_eq!(world.is("select scene.release()").await?, "3");
    assert_eq!(world.is("select scene.waits(1)").await?, "failed 1, opted_out opted_out");
    assert_eq!(world.is("select scene.waits(2)").await?, "failed 1, skipped abuse");
    Ok(())
}

/// Three leads opt out, or are found abusive, each in a way of its own.
const OPT_OUTS: [&str; 3] = [
    "update public.leads set do_not_call = true where phone = scene.phone(1)",
    "insert into public.suppressions (organization_id, phone_number) values (scene.id('8000', 1), scene.phone(2))",
    "update public.leads set abuse_flag = true where phone = scene.phone(3)",
];

/// Nobody was called, each lead is over, and so is their campaign.
async fn assert_left_in_peace(world: &World) -> Result<()> {
    assert_eq!(world.is("select count(*) from public.call_logs where dialled").await?, "0");
    assert_eq!(world.is("select scene.waits(1)").await?, "failed 0, opted_out opted_out");
    assert_eq!(world.is("select scene.waits(2)").await?, "failed 0, opted_out opted_out");
    assert_eq!(world.is("select scene.waits(3)").await?, "failed 0, skipped abuse");
    assert_eq!(world.is("select scene.campaign_of(1)").await?, "completed, 0 open, 0 calls, 0 answered");
    assert_eq!(world.is("select coalesce(sum(reserved), 0) from public.usage_logs").await?, "0");
    Ok(())
}

#[tokio::test]
async fn f17_who_opts_out_while_a_release_takes_them_is_stopped_before_dialling() -> Result<()> {
    let world = World::with("select scene.subscribe(1, 'plenty'); select scene.campaign(1, 1, 2, 3)").await?;
    let (dispatcher, leads) = (world.session().await?, world.session().await?);
    dispatcher.done("begin").await?;
    assert_eq!(dispatcher.run("select scene.release()").await, gives("1 2 3"));
    // Nobody who opts out waits for a dispatcher.
    for way in OPT_OUTS {
        leads.done(way).await?;
    }
    dispatcher.done("commit").await?;
    assert_eq!(world.is("select scene.begin_dials(1, 1, 2, 3)").await?, "abuse opted_out opted_out");
    assert_left_in_peace(&world).await
}

#[tokio::test]
async fn f17_a_release_passes_by_whoever_is_just_opting_out() -> Result<()> {
    let world = World::with("select scene.subscribe(1, 'plenty'); select scene.campaign(1, 1, 2, 3)").await?;
    let leads = world.session().await?;
    leads.done("begin").await?;
    for way in OPT_OUTS {
        leads.done(way).await?;
    }
    assert_eq!(world.is("select scene.release()").await?, "none", "it cannot see it yet");
    leads.done("commit").await?;
    assert_eq!(world.is("select scene.release()").await?, "none");
    assert_left_in_peace(&world).await
}

#[tokio::test]
async fn f18_a_paused_campaign_s_rows_hold_up_nobody_and_two_releases_share_what_room_there_is() -> Result<()> {
    let world = World::with("select scene.subscribe(1, 'plenty'), scene.subscribe(2, 'plenty')").await?;
    world.is("select scene.campaign(1, variadic array(select generate_series(101, 160)))").await?;
    world.is("update public.call_queue set next_retry_at = next_retry_at - interval '1 day', priority = 9; update public.campaigns set status = 'paused'").await?;
    world.is("select scene.campaign(2, 1, 2, 3); update public.campaigns set max_concurrent_calls = 2 where status = 'running'").await?;
    let release = "select scene.release()";
    assert_eq!(world.meet(release, release).await?, (gives("1 2"), gives("none")));
    Ok(())
}
