-- A hundred calls under way are a hundred answers of the carrier: ten whose answers were lost do not make its line a bad one.
set local lock_timeout = '5s';
set local statement_timeout = '60s';

create or replace function private.check_breakers(at timestamptz) returns void
language plpgsql volatile security definer set search_path = '' set enable_seqscan = off as $$
begin
  if exists (
      select
      from public.call_logs as log
      where log.direction = 'outbound' and log.call_status in ('carrier_transient', 'our_fault', 'lost', 'capacity')
        and log.ended_at > at - interval '2 minutes'
    )
    or exists (select from public.call_logs as log where log.status <> 'ended' and log.status = 'submission_unknown')
    or exists (select from private.breakers as breaker where breaker.is_open)
  then
    with judged as materialized (
      select scope.id, recent.ended_at, recent.is_fault, recent.is_live
      from (
        (
          select
            log.carrier_account_id, log.campaign_id, log.ended_at,
            case
              when log.call_status in ('carrier_transient', 'our_fault', 'lost') then true
              when log.call_status in ('answered', 'machine', 'rejected') then false
            end as is_fault,
            false as is_live
          from public.call_logs as log
          where log.status = 'ended' and log.direction = 'outbound' and log.ended_at > at - interval '2 minutes'
          order by log.ended_at desc
          limit 4000
        )
        union all
        -- Those that the carrier took speak for the line while they last, as those of which nothing is known speak against it.
        select log.carrier_account_id, log.campaign_id, at, log.status = 'submission_unknown', log.status <> 'submission_unknown'
        from public.call_logs as log
        where log.status <> 'ended' and log.direction = 'outbound' and log.status not in ('created', 'submitting')
          and log.submitted_at > at - interval '2 minutes'
      ) as recent
      cross join lateral (values (recent.carrier_account_id), (recent.campaign_id)) as scope (id)
      -- Busy, no answer and the like say nothing of the line.
      where recent.is_fault is not null and scope.id is not null
    ),
    told as (
      select
        judged.id, breaker.is_open, breaker.retry_at,
        count(*) filter (where judged.ended_at > coalesce(breaker.since, '-infinity')) as calls,
        count(*) filter (where judged.is_fault and judged.ended_at > coalesce(breaker.since, '-infinity')) as faults,
        bool_or(judged.is_fault) filter (where judged.ended_at >= breaker.retry_at and not judged.is_live) as probe_failed
      from judged
      left join private.breakers as breaker on breaker.scope = judged.id
      group by judged.id, breaker.is_open, breaker.retry_at
    )
    insert into private.breakers as breaker (scope, is_open, since, retry_at)
    select
      told.id, coalesce(told.probe_failed, true), at,
      -- Not all at the same time again.
      case when coalesce(told.probe_failed, true) then at + interval '1 minute' * (1 + 0.2 * random()) end
    from told
    where case when told.is_open then told.probe_failed is not null else told.calls >= 10 and told.faults * 2 >= told.calls end
    on conflict (scope) do update set is_open = excluded.is_open, since = excluded.since, retry_at = excluded.retry_at;

    insert into private.carrier_pace as pace (carrier_account_id, tokens, refilled_at, ceiling, ceiling_at)
    select
      account.id, coalesce(private.account_tokens(account), 0), clock_timestamp(),
      -- Half of what was tried to have in flight.
      greatest(least(account.max_concurrent_calls, known.ceiling, refused.calls + (
        select count(*) from public.call_logs as log where log.carrier_account_id = account.id and log.status <> 'ended'
      )) / 2, 1),
      at
    from public.carrier_accounts as account
    left join private.carrier_pace as known on known.carrier_account_id = account.id
    join (
      select log.carrier_account_id, count(*) as calls
      from public.call_logs as log
      where log.direction = 'outbound' and log.call_status in ('carrier_transient', 'our_fault', 'lost', 'capacity')
        and log.call_status = 'capacity' and log.ended_at > at - interval '1 minute'
      group by log.carrier_account_id
    ) as refused on refused.carrier_account_id = account.id
    where known.ceiling_at is null or known.ceiling_at <= at - interval '1 minute'
    on conflict (carrier_account_id) do update set ceiling = excluded.ceiling, ceiling_at = excluded.ceiling_at;
  end if;

  update private.carrier_pace as pace
  set
    ceiling = nullif(
      least(pace.ceiling + floor(extract(epoch from at - pace.ceiling_at) / 60)::integer, account.max_concurrent_calls), account.max_concurrent_calls
    ),
    ceiling_at = at
  from public.carrier_accounts as account
  where account.id = pace.carrier_account_id and pace.ceiling is not null and pace.ceiling_at <= at - interval '1 minute';
end
$$;

-- An order by time alone let a release pass by every row of other classes and priorities; that of another order is of no use for it.
-- Another index takes its place in this transaction.
-- squawk-ignore require-concurrent-index-deletion
drop index public.idx_call_queue_due;
-- In a transaction none is made concurrently; the rows that wait are few enough for the seconds that the statement may take.
-- squawk-ignore require-concurrent-index-creation
create index idx_call_queue_due on public.call_queue (campaign_id, next_retry_at nulls first) where status = 'queued';

create or replace function private.judge_candidates(at timestamptz, budget integer, passed uuid[], sole uuid default null) returns private.candidate[]
language plpgsql volatile security definer set search_path = '' set jit = off set plan_cache_mode = force_generic_plan set enable_seqscan = off as $$
declare
  judged private.candidate[];
begin
  with calls as materialized (
    select log.organization_id, log.campaign_id, count(*) as number
    from public.call_logs as log
    where log.status <> 'ended'
    group by log.organization_id, log.campaign_id
  ),
  waiting as materialized (
    -- A campaign that may not dial now, or is full, is left alone: its rows cost nothing and hold up nobody.
    select
      campaign.id, organization.caller_id, organization.dial_countries, organization.max_price_micros,
      organization.dispatch_weight::numeric / count(*) over (partition by campaign.organization_id) as weight,
      row_number() over (partition by campaign.organization_id order by random()) as place,
      coalesce((
        select min(own.turn - pace.turn)
        from private.dispatch_turns as own
        join private.carrier_pace as pace on pace.carrier_account_id = own.carrier_account_id
        where own.organization_id = campaign.organization_id
      ), '-infinity'::numeric) as turn
    from public.campaigns as campaign
    join public.organizations as organization on organization.id = campaign.organization_id
    where campaign.status = 'running'
      and (sole is null or campaign.id = sole)
      and campaign.dialling_enabled
      and not private.is_broken(campaign.id, at)
      and private.dispatch_obstacle(campaign.organization_id, at) is null
      and (campaign.credit_cap is null or private.campaign_credit_left(campaign) > 0)
      and campaign.max_concurrent_calls
        > coalesce((select sum(calls.number) from calls where calls.campaign_id = campaign.id), 0)
      and organization.max_concurrent_calls
        > coalesce((select sum(calls.number) from calls where calls.organization_id = organization.id), 0)
      and exists (
        select
        from public.call_queue as queue
        where queue.campaign_id = campaign.id and queue.status = 'queued' and queue.next_retry_at <= at
      )
    order by place, turn, random()
    limit budget
  ),
  ready as materialized (
    -- Of the budget as large a part as of the calls: no organization is short of rows when the calls are given out.
    select
      campaign.*, waiting.caller_id, waiting.dial_countries, waiting.max_price_micros,
      greatest(ceil(budget * waiting.weight / sum(waiting.weight) over ()), 5)::integer as most
    from waiting
    join public.campaigns as campaign on campaign.id = waiting.id
  ),
  picked as materialized (
    select queue.id
    from ready
    cross join lateral (
      -- Promised calls, then retries in half of the places, then those who were never called.
      select due.id
      from (values (2, ready.most), (1, (ready.most + 1) / 2), (0, ready.most)) as kind (dial_class, most)
      cross join lateral (
        -- Priority by priority, each by an index from its oldest due row on: however many others wait.
        with recursive level (priority) as (
          select max(top.priority)::integer
          from public.call_queue as top
          where top.campaign_id = ready.id and top.status = 'queued' and top.dial_class = kind.dial_class
          union all
          select (
            select max(lower.priority)
            from public.call_queue as lower
            where lower.campaign_id = ready.id and lower.status = 'queued' and lower.dial_class = kind.dial_class
              and lower.priority < level.priority
          )::integer
          from level
          where level.priority is not null
        )
        select oldest.id
        from level
        cross join lateral (
          select queued.id
          from public.call_queue as queued
          where queued.campaign_id = ready.id
            and queued.status = 'queued'
            and queued.dial_class = kind.dial_class
            and queued.priority = level.priority
            and queued.next_retry_at <= at
            and queued.id <> all (passed)
          order by queued.next_retry_at
          limit kind.most
        ) as oldest
        where level.priority is not null
        limit kind.most
      ) as due
      limit ready.most
    ) as queue
  ),
  locked as materialized (
    select
      queue.id, queue.organization_id, queue.campaign_id, queue.lead_id, queue.dial_class, queue.priority, queue.next_retry_at,
      queue.dispatch_count,
      lead.project_id, lead.phone, lead.timezone, lead.recording_consent, lead.do_not_call, lead.abuse_flag, lead.archived_at
    from public.call_queue as queue
    join public.leads as lead on lead.organization_id = queue.organization_id and lead.id = queue.lead_id
    where queue.id = any (array(select picked.id from picked)) and queue.status = 'queued' and queue.next_retry_at <= at
    for no key update of queue skip locked
    for key share of lead skip locked
  ),
  numbers as materialized (
    -- What an organization may call from, without those that have rung often enough in 24 hours.
    select number.organization_id, number.phone_number, number.carrier_account_id, number.registration_id
    from public.caller_numbers as number
    join public.carrier_accounts as account on account.id = number.carrier_account_id
    where number.organization_id in (select locked.organization_id from locked)
      and number.is_active and account.is_active and account.dialling_enabled and not private.is_broken(account.id, at)
      and (number.daily_calls is null or private.caller_number_room(number.phone_number, number.daily_calls, at) > 0)
  ),
  zoned as materialized (
    select
      locked.*, private.callee_zones(locked.timezone, callee.zones, ready.timezone) as zones, callee.country, callee.region, callee.is_callable,
      ready.purpose,
      case when ready.max_price_micros is not null then coalesce(private.destination_price(locked.phone) > ready.max_price_micros, true) else false end
        as is_dear
    from locked
    join ready on ready.id = locked.campaign_id
    cross join lateral private.destination(locked.phone, ready.dial_countries) as callee
  ),
  stretches as materialized (
    select place.campaign_id, place.zones, place.country, place.region, stretch.opens_at, stretch.closes_at
    from (
      select distinct zoned.campaign_id, zoned.zones, zoned.country, zoned.region from zoned where zoned.zones is not null and zoned.is_callable
    ) as place
    join public.campaigns as campaign on campaign.id = place.campaign_id
    cross join lateral private.callee_window(at, place.zones, campaign, place.country, place.region) as stretch
  ),
  seen as materialized (
    select
      zoned.*, stretches.opens_at, stretches.closes_at, private.recent_dials(zoned.phone, at) as dials,
      private.lacks_consent(zoned.organization_id, zoned.phone, zoned.country, zoned.purpose, at) as lacks_consent,
      (private.check_dnc(zoned.phone, at)).verdict as register,
      exists (
        select
        from public.suppressions as suppression
        where suppression.organization_id = zoned.organization_id and suppression.phone_number = zoned.phone
      )
      or exists (
        select
        from private.erased_numbers as erased
        where erased.organization_id = zoned.organization_id and erased.phone_hash = private.hash_number(zoned.phone)
      ) as suppressed,
      exists (
        select
        from public.call_logs as live
        where live.callee_number = zoned.phone and live.direction = 'outbound' and live.status <> 'ended'
      ) as in_call
    from zoned
    left join stretches
      on stretches.campaign_id = zoned.campaign_id and stretches.zones = zoned.zones
      and stretches.country = zoned.country and stretches.region is not distinct from zoned.region
  ),
  gated as (
    select
      seen.*,
      case
        when seen.do_not_call or seen.suppressed then 'opted_out'
        when seen.abuse_flag then 'abuse'
        when seen.archived_at is not null then 'archived'
        when seen.phone is null then 'no_phone'
        when not seen.is_callable then 'destination_blocked'
        when seen.is_dear then 'price_ceiling'
        when seen.register is not null then seen.register
        when seen.lacks_consent then 'no_consent'
        when seen.zones is null then 'bad_timezone'
        when seen.opens_at is null then 'campaign_over'
        when seen.opens_at > at then 'outside_window'
        when seen.in_call then 'number_in_call'
        when seen.dials[2] + interval '24 hours' > at then 'daily_cap'
        when seen.dials[1] + interval '60 minutes' > at then 'min_gap'
      end as verdict
    from seen
  ),
  single as (
    select
      gated.*,
      case
        -- The same number twice in one batch: the second waits for the first.
        when gated.verdict is null and row_number() over (
          partition by gated.verdict, gated.phone order by gated.dial_class desc, gated.priority desc, gated.next_retry_at, gated.id
        ) > 1 then 'number_in_call'
        else gated.verdict
      end as final_verdict
    from gated
  )
  select array_agg(
    row(
      numbered.id, numbered.organization_id, numbered.campaign_id, numbered.lead_id, numbered.project_id, numbered.phone,
      numbered.caller_number, numbered.carrier_account_id, numbered.dispatch_count + 1, numbered.agent_id,
      numbered.record_call, numbered.ring_timeout_seconds, numbered.max_call_seconds,
      numbered.closes_at, numbered.final_verdict,
      case numbered.final_verdict
        when 'bad_timezone' then at + interval '1 day'
        when 'register_stale' then private.whole_minute(at + interval '1 hour')
        when 'campaign_over' then at + interval '1 day'
        when 'outside_window' then numbered.opens_at
        when 'number_in_call' then private.whole_minute(at + interval '15 minutes')
        when 'caller_number_cap' then private.whole_minute(at + interval '15 minutes')
        when 'no_caller_series' then private.whole_minute(at + interval '1 hour')
        when 'daily_cap' then private.whole_minute(greatest(numbered.dials[2] + interval '24 hours', numbered.dials[1] + interval '60 minutes'))
        when 'min_gap' then private.whole_minute(numbered.dials[1] + interval '60 minutes')
      end,
      numbered.dial_class
    )::private.candidate
    order by numbered.dial_class desc, numbered.priority desc, numbered.next_retry_at, numbered.id
  )
  into judged
  from (
    select
      single.id, single.organization_id, single.campaign_id, single.lead_id, coalesce(single.project_id, ready.project_id) as project_id,
      single.phone, number.phone_number as caller_number, number.carrier_account_id, single.dispatch_count, ready.agent_id,
      ready.record_calls and single.recording_consent as record_call, ready.ring_timeout_seconds, ready.max_call_seconds,
      single.opens_at, single.closes_at, single.dials, single.dial_class, single.priority, single.next_retry_at,
      case
        when single.final_verdict is null and number.phone_number is null then case
          when exists (
            select
            from public.caller_numbers as own
            join public.carrier_accounts as account on account.id = own.carrier_account_id
            where own.organization_id = single.organization_id and own.is_active and account.is_active and account.dialling_enabled
              and private.may_call_from(own.phone_number, own.registration_id, single.country, single.purpose)
          )
          then 'caller_number_cap'
          else 'no_caller_series'
        end
        else single.final_verdict
      end as final_verdict
    from single
    join ready on ready.id = single.campaign_id
    left join lateral (
      select log.caller_number
      from public.call_logs as log
      where log.callee_number = single.phone and log.organization_id = single.organization_id and log.dialled and log.direction = 'outbound'
      order by log.submitted_at desc
      limit 1
    ) as last on single.final_verdict is null
    left join lateral (
      -- The number that it last called them from, else the same one for the same callee every time; the organization's general one last.
      select number.phone_number, number.carrier_account_id
      from numbers as number
      where number.organization_id = single.organization_id
        and private.may_call_from(number.phone_number, number.registration_id, single.country, single.purpose)
      order by
        (number.phone_number = last.caller_number) desc nulls last, (number.phone_number = ready.caller_id) nulls first,
        hashtextextended(number.phone_number || single.phone, 0)
      limit 1
    ) as number on single.final_verdict is null
  ) as numbered;
  return coalesce(judged, array[]::private.candidate[]);
end
$$;
