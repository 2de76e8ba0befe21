//! Turns: ten organizations with one to twenty thousand leads due, each of which gets its share, and a newcomer who does not wait.

use crate::world::World;
use anyhow::Result;
use std::collections::BTreeMap;

/// Leads due and weight of each organization.
const ORGANIZATIONS: [(i32, i32); 10] =
    [(1, 1), (10, 1), (100, 1), (400, 1), (900, 1), (1_200, 2), (1_500, 1), (1_600, 2), (3_000, 3), (20_000, 1)];
/// Calls a release, and releases: the second shortest queue of those above the median lasts to the end.
const CALLS: i64 = 100;
const RELEASES: usize = 30;
/// In how many calls in a row a share has to be right, and how far it may be off.
const WINDOW: usize = 6;
const TOLERANCE: f64 = 0.05;
const NEWCOMER: i32 = 11;
const COMES_AFTER: usize = 12;

const WORLD: &str = "
    create function scene.join_in(tenant integer, leads integer, weight integer) returns void
    language plpgsql as $$
    declare
      project uuid;
    begin
      insert into public.organizations (id, name, state_code, max_concurrent_calls, dispatch_weight)
      values (scene.id('8000', tenant), 'Tenant ' || tenant, 'KA', 1000, weight)
      on conflict (id) do update set dispatch_weight = excluded.dispatch_weight;
      insert into public.caller_numbers (organization_id, carrier_account_id, phone_number)
      values (scene.id('8000', tenant), scene.id('c100', 1), '+9180980000' || lpad(tenant::text, 2, '0'));
      perform scene.subscribe(tenant, 'plenty');
      insert into public.projects (organization_id, name) values (scene.id('8000', tenant), 'Project') returning id into project;
      insert into public.leads (organization_id, project_id, name, phone)
      select scene.id('8000', tenant), project, 'Lead', '+9170' || lpad((tenant * 100000 + number)::text, 8, '0')
      from generate_series(1, leads) as number;
      insert into public.campaigns (id, organization_id, project_id, name, max_concurrent_calls)
      values (scene.id('b700', tenant), scene.id('8000', tenant), project, 'Campaign', 1000);
    end
    $$;
    create function scene.enrol(tenant integer) returns void
    language plpgsql as $$
    declare
      made public.campaigns;
    begin
      select campaign.* into made from public.campaigns as campaign where campaign.id = scene.id('b700', tenant);
      perform private.enrol_leads(made, null, private.clock_now());
    end
    $$;
    create function scene.queue(tenant integer) returns void
    language plpgsql as $$
    declare
      made public.campaigns;
    begin
      select campaign.* into made from public.campaigns as campaign where campaign.id = scene.id('b700', tenant);
      insert into public.call_queue (organization_id, campaign_id, lead_id, next_retry_at, max_attempts)
      select made.organization_id, made.id, member.lead_id, private.clock_now(), made.max_attempts
      from public.campaign_leads as member
      where member.campaign_id = made.id;
      update public.campaigns set status = 'running' where id = made.id;
    end
    $$;
    -- Whom a release calls, by organization; the calls are over at once.
    create function scene.round(calls integer) returns text
    language plpgsql as $$
    declare
      released jsonb := public.release_calls(jsonb_build_object('v', 1, 'limit', calls));
      told     text;
    begin
      select string_agg(given.tenant || '=' || given.calls, ' ') into told
      from (
        select right(log.organization_id::text, 12)::integer as tenant, count(*) as calls
        from jsonb_array_elements(released -> 'attempts') as attempt
        join public.call_logs as log on log.id = (attempt ->> 'id')::uuid
        group by 1
      ) as given;
      update public.call_logs set status = 'ended', call_status = 'expired', ended_at = private.clock_now() where status <> 'ended';
      return coalesce(told, '');
    end
    $$;
    delete from public.caller_numbers;
    update public.carrier_accounts set max_calls_per_second = null;";

/// Who got how many calls of a release.
fn given(told: &str) -> BTreeMap<i32, i64> {
    let pair =
        |pair: &str| pair.split_once('=').and_then(|(tenant, calls)| Some((tenant.parse().ok()?, calls.parse().ok()?)));
    told.split_whitespace().filter_map(pair).collect()
}

/// A campaign of an organization's own, step by step: a plan that was made for an empty table reads the whole of a full one.
async fn join_in(world: &World, tenant: i32, leads: i32, weight: i32) -> Result<()> {
    for step in
        [format!("join_in({tenant}, {leads}, {weight})"), format!("enrol({tenant})"), format!("queue({tenant})")]
    {
        world.is(&format!("select scene.{step}")).await?;
        world.is("analyze public.leads, public.campaign_leads, public.call_queue").await?;
    }
    Ok(())
}

#[tokio::test]
async fn each_organization_with_work_due_gets_its_share_and_a_newcomer_its_first_call_at_once() -> Result<()> {
    let world = World::with(WORLD).await?;
    let mut left = BTreeMap::new();
    let mut weights = BTreeMap::from([(NEWCOMER, 1)]);
    // What is told of every single lead is not what is looked at here.
    for table in ["leads", "call_queue", "campaign_leads"] {
        world.is(&format!("alter table public.{table} disable trigger user")).await?;
    }
    for (tenant, (leads, weight)) in (1..).zip(ORGANIZATIONS) {
        join_in(&world, tenant, leads, weight).await?;
        left.insert(tenant, i64::from(leads));
        weights.insert(tenant, weight);
    }
    world.is("analyze").await?;

    // Of each release: who had work left after it, and who got what.
    let mut rounds = Vec::new();
    let mut newcomer_waited = None;
    for round in 0..RELEASES {
        if round == COMES_AFTER {
            join_in(&world, NEWCOMER, 500, 1).await?;
            left.insert(NEWCOMER, 500);
        }
        let given = given(&world.is(&format!("select scene.round({CALLS})")).await?);
        assert_eq!(given.values().sum::<i64>(), CALLS, "release {round} was not full: {given:?}");
        if round >= COMES_AFTER && newcomer_waited.is_none() && given.contains_key(&NEWCOMER) {
            newcomer_waited = Some(round - COMES_AFTER);
        }
        let before = left.clone();
        for (tenant, calls) in &given {
            *left.entry(*tenant).or_default() -= calls;
        }
        rounds.push((before, left.clone(), given));
    }
    assert!(newcomer_waited.is_some_and(|releases| releases < 2), "the newcomer waited {newcomer_waited:?} releases");

    let mut judged = 0;
    for window in rounds.windows(WINDOW) {
        let (first, last) = (&window[0].0, &window[WINDOW - 1].1);
        let due: Vec<i32> = first.keys().copied().filter(|tenant| last[tenant] > 0).collect();
        let calls = |tenant: i32| window.iter().filter_map(|(_, _, given)| given.get(&tenant)).sum::<i64>() as f64;
        let all: f64 = due.iter().map(|tenant| calls(*tenant)).sum();
        let weight: i32 = due.iter().map(|tenant| weights[tenant]).sum();
        for tenant in due {
            let share = all * f64::from(weights[&tenant]) / f64::from(weight);
            let off = (calls(tenant) - share).abs();
            assert!(
                off <= share * TOLERANCE,
                "organization {tenant} got {} calls where {share:.1} were its share",
                calls(tenant)
            );
            judged += 1;
        }
    }
    assert!(judged > 100, "only {judged} shares were judged");
    Ok(())
}
