-- A number is not called too often in a month or ever; a lead of no known zone ends with its campaign; a campaign may be about some leads of
-- its project; a transfer goes through the gate of a dial; and a delivery whose handler died before it reached the queue is found within half
-- a minute.
set local lock_timeout = '5s';
set local statement_timeout = '60s';

alter table private.platform_dialling
  add column monthly_dials smallint not null default 15,
  add column lifetime_dials smallint not null default 60;
-- A table of one row.
-- squawk-ignore constraint-missing-not-valid
alter table private.platform_dialling add constraint platform_dialling_dials_range check (monthly_dials between 1 and 60 and lifetime_dials between monthly_dials and 1000);
comment on column private.platform_dialling.monthly_dials is 'Dials of one number by one organization in any 30 days at most, over all its campaigns.';
comment on column private.platform_dialling.lifetime_dials is 'Dials of one number by one organization at most, ever; beyond, the lead is over.';
alter table private.dial_evidence
  add column dials_in_30_days smallint,
  add column dials_ever integer;
comment on column private.dial_evidence.dials_in_30_days is 'How often the organization had called the number in the 30 days before: monthly_dials was judged by this.';
comment on column private.dial_evidence.dials_ever is 'How often the organization had called the number at all: lifetime_dials was judged by this.';
alter table public.campaigns add column lead_filter jsonb not null default '{}';
-- Campaigns are few, and all of them have the default.
-- squawk-ignore constraint-missing-not-valid
alter table public.campaigns add constraint campaigns_lead_filter_object check (jsonb_typeof(lead_filter) = 'object');
comment on column public.campaigns.lead_filter is
  'Which leads of its project it is about, as create_campaign() was told; empty is all of them. Checked by private.check_lead_filter().';
comment on column public.call_queue.wait_reason is
  'Why it waits: outside_window, bad_timezone, campaign_over, min_gap, daily_cap, monthly_cap, number_in_call, caller_number_cap, register_stale, credit_cap, no_caller_series, quota_exhausted, credit_exhausted, callback, retry_<outcome>.';

create or replace function private.apply_call_event(
  source text, source_id text, attempt_id uuid, call jsonb, at timestamptz,
  out result public.event_status, out error text, out organization_id uuid
)
language plpgsql volatile security definer set search_path = '' as $$
declare
  attempt   public.call_logs;
  updated   public.call_logs;
  wanted    uuid := apply_call_event.attempt_id;
  call_id   text := call ->> 'provider_call_id';
  status    public.attempt_status := (call ->> 'status')::public.attempt_status;
  outcome   public.call_outcome := (call ->> 'outcome')::public.call_outcome;
  latest    timestamptz;
  has_ended boolean;
  unknown   text := 'unknown_attempt';
begin
  if wanted is null and (call ->> 'inbound')::boolean then
    select opened.leg_id, coalesce(opened.error, unknown) into wanted, unknown
    from private.open_inbound_leg(apply_call_event.source, apply_call_event.source_id, call, at) as opened;
  end if;
  select log.* into attempt
  from public.call_logs as log
  where log.id = wanted
  for no key update;
  if attempt.id is null then
    result := 'orphan';
    error := unknown;
    return;
  end if;
  if attempt.carrier_account_id::text <> lower(apply_call_event.source_id) then
    result := 'orphan';
    error := 'other_account';
    return;
  end if;
  organization_id := attempt.organization_id;

  -- Two calls of the carrier for one attempt: somebody was dialled twice. The first one stays the attempt's.
  if attempt.call_sid <> call_id then
    result := 'orphan';
    error := 'duplicate_dial';
    perform private.raise_alarm(
      attempt, 'duplicate_dial', jsonb_build_object('provider_call_id', call_id, 'bound_to', attempt.call_sid), at
    );
    return;
  end if;

  if attempt.call_sid is null and exists (
    select from public.call_logs as other where other.call_sid = call_id and other.id <> attempt.id
  ) then
    -- That call is another attempt's, and stays it.
    result := 'orphan';
    error := 'call_id_reused';
    perform private.raise_alarm(attempt, 'call_id_reused', jsonb_build_object('provider_call_id', call_id), at);
    return;
  end if;

  -- What is known is kept, what is new is added, and the status only moves forward.
  updated := private.merge_call(attempt, call, at);
  if (apply_call_event.source = 'reconcile' and status = 'ended' or (call ->> 'settles')::boolean) and call ->> 'bill_duration_seconds' is not null then
    -- Of the seconds that are billed the carrier's own record or bill has the last word, also after an event told others.
    updated.bill_duration_seconds := (call ->> 'bill_duration_seconds')::integer;
  end if;
  has_ended := status = 'ended' and attempt.status <> 'ended';
  latest := greatest(coalesce(attempt.ended_at, at), attempt.created_at);
  if attempt.direction = 'outbound' and not attempt.dialled
    and apply_call_event.source <> 'reconcile' and (status is not null or call_id is not null)
  then
    -- The carrier knows the call, so it was dialled, whatever we believed.
    updated.dialled := true;
    updated.submitted_at := coalesce(attempt.submitted_at, latest);
    if attempt.status = 'ended' then
      perform private.raise_alarm(attempt, 'dialled_after_refusal', jsonb_build_object('provider_call_id', call_id), at);
    end if;
  end if;
  if has_ended then
    updated.ended_at := greatest(
      private.clamp_time(call ->> 'ended_at', attempt.created_at, latest), updated.ringing_at, updated.answered_at
    );
    updated.ended_at := coalesce(updated.ended_at, latest);
    -- The answer event is a hint that may be lost; the seconds of talk tell when it was.
    if updated.answered_at is null and updated.duration > 0 then
      updated.answered_at := greatest(
        updated.ended_at - make_interval(secs => updated.duration), attempt.created_at, updated.submitted_at, updated.ringing_at
      );
    end if;
    if updated.duration is null and updated.answered_at is not null then
      updated.duration := floor(extract(epoch from updated.ended_at - updated.answered_at));
    end if;
  end if;
  if (call ->> 'bill_talk')::boolean and updated.ended_at is not null then
    -- This carrier tells no seconds; the answer may be told after the end.
    updated.duration := coalesce(nullif(updated.duration, 0), floor(extract(epoch from updated.ended_at - updated.answered_at)), updated.duration);
    updated.bill_duration_seconds := coalesce(nullif(updated.bill_duration_seconds, 0), updated.duration, updated.bill_duration_seconds);
  end if;
  -- The cause goes with the end that stays.
  if coalesce(call ->> 'cause_code', call ->> 'cause_name') is not null and (
    attempt.hangup_cause_code is null and attempt.hangup_cause_name is null
    or private.outcome_rank(private.settled_outcome(updated, outcome), private.has_talked(updated))
      > private.outcome_rank(attempt.call_status, private.has_talked(updated))
  ) then
    updated.hangup_cause_code := call ->> 'cause_code';
    updated.hangup_cause_name := call ->> 'cause_name';
    updated.hangup_source := call ->> 'cause_source';
  end if;

  if has_ended then
    outcome := private.settled_outcome(updated, coalesce(
      outcome,
      case when updated.answered_at is not null or updated.bill_duration_seconds > 0 then 'answered' else 'failed' end::public.call_outcome
    ));
    perform private.end_attempt(updated, outcome, at);
    result := 'applied';
    if (call ->> 'bill_talk')::boolean and apply_call_event.source <> 'reconcile' and outcome in ('answered', 'machine', 'our_fault')
      and coalesce(updated.bill_duration_seconds, 0) = 0
    then
      perform private.await_seconds(updated);
    end if;
  elsif attempt.status = 'ended' then
    result := case when private.amend_attempt(attempt, updated, outcome, at) then 'applied' else 'ignored' end::public.event_status;
    if (call ->> 'settles')::boolean or updated.bill_duration_seconds is distinct from attempt.bill_duration_seconds then
      delete from private.unsettled_calls as own where own.organization_id = attempt.organization_id and own.attempt_id = attempt.id;
    end if;
  else
    if status > attempt.status then
      updated.status := status;
      updated.lease_until := now() + make_interval(
        secs => case status when 'in_progress' then attempt.time_limit_seconds + 120 else attempt.ring_timeout_seconds + 60 end
      );
    end if;
    if updated is not distinct from attempt then
      result := 'ignored';
    else
      perform private.write_attempt(updated);
      result := 'applied';
    end if;
  end if;
  if call ->> 'notice' is not null then
    error := call ->> 'notice';
    perform private.raise_alarm(
      attempt, 'carrier_fault', jsonb_build_object('provider_call_id', coalesce(call_id, attempt.call_sid), 'notice', error), at
    );
  end if;
end
$$;

create function private.dial_cap(organization uuid, callee text, at timestamptz, out verdict text, out due timestamptz)
language plpgsql stable security definer set search_path = '' as $$
declare
  platform private.platform_dialling;
  dials    timestamptz[];
begin
  select known.* into platform from private.platform_dialling as known;
  -- Newest first, and no more than it takes to tell: nearly always a handful.
  dials := array(
    select log.submitted_at
    from public.call_logs as log
    where log.callee_number = callee and log.dialled and log.direction = 'outbound' and log.organization_id = organization
    order by log.submitted_at desc
    limit platform.lifetime_dials
  );
  if cardinality(dials) >= platform.lifetime_dials then
    verdict := 'lifetime_cap';
  elsif dials[platform.monthly_dials] > at - interval '30 days' then
    verdict := 'monthly_cap';
    due := dials[platform.monthly_dials] + interval '30 days';
  end if;
end
$$;
comment on function private.dial_cap(uuid, text, timestamptz) is
  'Whether an organization has called a number as often as it may in 30 days, and when it may again, or ever, whichever campaigns the calls were of.';

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
      queue.dispatch_count, queue.wait_reason,
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
      capped.verdict as cap, capped.due as cap_due,
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
    cross join lateral private.dial_cap(zoned.organization_id, zoned.phone, at) as capped
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
        when seen.cap is not null then seen.cap
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
        -- A day to put it right. Once the campaign is over, or nobody else is left in it, that was the end.
        when 'bad_timezone' then case when not numbered.is_last then at + interval '1 day' end
        when 'register_stale' then private.whole_minute(at + interval '1 hour')
        when 'campaign_over' then case when not numbered.is_past then at + interval '1 day' end
        when 'monthly_cap' then private.whole_minute(numbered.cap_due)
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
      single.opens_at, single.closes_at, single.dials, single.cap_due, single.dial_class, single.priority, single.next_retry_at,
      -- A day later it is past everywhere.
      coalesce((at at time zone 'UTC')::date > ready.end_date + 1, false) as is_past,
      case when single.final_verdict = 'bad_timezone' then
        coalesce((at at time zone 'UTC')::date > ready.end_date + 1, false)
        or single.wait_reason = 'bad_timezone' and not exists (
          select
          from public.call_queue as other
          where other.campaign_id = single.campaign_id and other.status in ('queued', 'processing')
            and other.wait_reason is distinct from 'bad_timezone'
        )
      end as is_last,
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

create or replace function private.write_evidence(attempts uuid[], at timestamptz) returns void
language plpgsql volatile security definer set search_path = '' as $$
begin
  insert into private.dial_evidence (
    attempt_id, organization_id, consent_id, register_key, register_version, country, region, purpose, zones, zone_source, dials_before,
    caller_series, registration_id, dials_in_30_days, dials_ever
  )
  select
    log.id, log.organization_id, consent.id, register.register_key, register.version, callee.country, callee.region, campaign.purpose,
    private.callee_zones(lead.timezone, callee.zones, campaign.timezone),
    case when lead.timezone <> '' then 'lead' when callee.zones is not null then 'number' else 'campaign' end,
    private.recent_dials(log.callee_number, at),
    (
      select series.prefix
      from private.caller_series as series
      where series.country = callee.country and series.purpose = campaign.purpose and starts_with(log.caller_number, series.prefix)
      order by length(series.prefix) desc
      limit 1
    ),
    number.registration_id, before.in_30_days, before.ever
  from public.call_logs as log
  join public.caller_numbers as number on number.phone_number = log.caller_number
  join public.campaigns as campaign on campaign.organization_id = log.organization_id and campaign.id = log.campaign_id
  join public.leads as lead on lead.organization_id = log.organization_id and lead.id = log.lead_id
  cross join lateral private.destination(log.callee_number, null) as callee
  cross join lateral private.check_dnc(log.callee_number, at) as register
  cross join lateral (
    select count(*) filter (where earlier.submitted_at > at - interval '30 days') as in_30_days, count(*) as ever
    from public.call_logs as earlier
    where earlier.callee_number = log.callee_number and earlier.dialled and earlier.direction = 'outbound'
      and earlier.organization_id = log.organization_id
  ) as before
  left join lateral (
    select known.id
    from public.consents as known
    where known.organization_id = log.organization_id and known.phone_number = log.callee_number
      and known.scope = 'call_' || campaign.purpose
      and known.granted_at <= at and (known.expires_at is null or known.expires_at > at) and (known.revoked_at is null or known.revoked_at > at)
    order by known.granted_at desc
    limit 1
  ) as consent on true
  where log.id = any (attempts);
end
$$;

create or replace function private.get_dial_evidence(phone_number text, at timestamptz) returns jsonb
language plpgsql stable security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('call.view');
begin
  return jsonb_build_object('phone_number', phone_number, 'calls', (
    select coalesce(
      jsonb_agg(
        jsonb_build_object(
          'call_id', log.id, 'campaign_id', log.campaign_id, 'dialled_at', log.submitted_at, 'outcome', log.call_status,
          'caller_number', log.caller_number, 'purpose', seen.purpose, 'country', seen.country, 'region', seen.region,
          'zones', seen.zones, 'zone_source', seen.zone_source, 'register', seen.register_key, 'register_version', seen.register_version,
          'register_obtained_at', version.obtained_at, 'dials_before', seen.dials_before,
          'dials_in_30_days', seen.dials_in_30_days, 'dials_ever', seen.dials_ever,
          'caller_series', seen.caller_series, 'registration_id', seen.registration_id,
          'consent', case
            when consent.id is not null then jsonb_build_object(
              'id', consent.id, 'text', consent.consent_text, 'source', consent.source, 'granted_at', consent.granted_at, 'proof', consent.proof
            )
          end
        )
        order by log.submitted_at desc
      ),
      '[]'
    )
    from public.call_logs as log
    join private.dial_evidence as seen on seen.attempt_id = log.id
    left join private.dnc_versions as version on version.register_key = seen.register_key and version.number = seen.register_version
    left join public.consents as consent on consent.organization_id = log.organization_id and consent.id = seen.consent_id
    where log.organization_id = organization and log.callee_number = get_dial_evidence.phone_number and log.direction = 'outbound'
      and log.dialled and log.submitted_at <= at
  ));
end
$$;

create or replace function private.reconcile_calls(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' set jit = off set enable_seqscan = off as $$
declare
  most    constant integer := least(greatest(coalesce((request ->> 'limit')::integer, 50), 1), 500);
  expired uuid[];
  attempt public.call_logs;
  stale   jsonb;
begin
  -- What was never begun and may not be any more, whose message never came: nobody was called.
  expired := array(
    select late.id
    from (
      select log.id
      from public.call_logs as log
      where log.status = 'created' and log.lease_until < now() and log.not_after <= now()
      order by log.lease_until
      limit most
    ) as late
    order by late.id
  );
  if cardinality(expired) > 0 then
    perform private.lock_attempts(expired);
    for attempt in
      select log.*
      from public.call_logs as log
      where log.id = any (expired) and log.status = 'created'
      order by log.organization_id, log.id
    loop
      perform private.end_attempt(attempt, 'expired', at);
    end loop;
  end if;

  with lapsed as (
    select log.id
    from public.call_logs as log
    where log.status in ('submitting', 'submission_unknown', 'queued', 'initiated', 'ringing', 'in_progress')
      -- A call to us is known by the carrier's id of it alone.
      and (log.direction = 'outbound' or log.call_sid is not null)
      and log.lease_until < now()
    order by log.lease_until
    limit most
    for no key update skip locked
  ),
  claimed as (
    update public.call_logs as log
    set lease_until = now() + interval '60 seconds'
    from lapsed
    where log.id = lapsed.id
    returning log.*
  )
  select jsonb_agg(
    jsonb_build_object(
      'attempt_id', claimed.id,
      'organization_id', claimed.organization_id,
      'provider', account.provider,
      'carrier_account_id', account.id,
      'account_sid', account.account_sid,
      'credentials_sealed', account.credentials_sealed,
      'api_base', account.api_base,
      'provider_call_id', claimed.call_sid,
      'from', claimed.caller_number,
      'to', claimed.callee_number,
      'status', claimed.status,
      'age_seconds', greatest(floor(extract(epoch from now() - claimed.begun_at)), 0)::integer,
      -- Asked for by its numbers, the carrier may tell of another call to them.
      'others', case when claimed.call_sid is null then array(
        select other.call_sid
        from public.call_logs as other
        where other.callee_number = claimed.callee_number and other.dialled and other.direction = 'outbound'
          and other.call_sid is not null and other.id <> claimed.id
        order by other.submitted_at desc
        limit 20
      ) else '{}' end
    )
  )
  into stale
  from (select claimed.* from claimed union all select unsettled.* from private.take_unsettled(most) as unsettled) as claimed
  join public.carrier_accounts as account on account.id = claimed.carrier_account_id;
  return jsonb_build_object('attempts', coalesce(stale, '[]'), 'agentless', private.reap_websockets('{"v": 1}', at) -> 'calls');
end
$$;

create or replace function private.campaign_json(campaign_id uuid, at timestamptz) returns jsonb
language plpgsql stable security definer set search_path = '' set jit = off as $$
declare
  campaign public.campaigns;
  obstacle text;
  hold     timestamptz;
begin
  select described.* into campaign from public.campaigns as described where described.id = campaign_json.campaign_id;
  obstacle := case
    when campaign.status <> 'running' then 'campaign_' || campaign.status
    else private.campaign_obstacle(campaign, at)
  end;
  select held.held_until into hold
  from private.dispatch_holds as held
  where held.organization_id = campaign.organization_id and held.held_until > at;
  return jsonb_build_object(
    'id', campaign.id, 'name', campaign.name, 'description', campaign.description, 'status', campaign.status,
    'project_id', campaign.project_id, 'agent_id', campaign.agent_id, 'timezone', campaign.timezone,
    'start_date', campaign.start_date, 'end_date', campaign.end_date, 'time_start', campaign.time_start, 'time_end', campaign.time_end,
    'max_concurrent_calls', campaign.max_concurrent_calls, 'max_attempts', campaign.max_attempts,
    'record_calls', campaign.record_calls, 'auto_complete', campaign.auto_complete, 'purpose', campaign.purpose,
    'retry_rules', campaign.retry_rules, 'lead_filter', campaign.lead_filter, 'credit_cap', campaign.credit_cap, 'credit_spent', campaign.credit_spent,
    'total_enrolled', campaign.total_enrolled, 'open_leads', campaign.open_leads,
    'total_calls', campaign.total_calls, 'answered_calls', campaign.answered_calls,
    'created_at', campaign.created_at, 'started_at', campaign.started_at, 'paused_at', campaign.paused_at, 'pause_reason', campaign.pause_reason,
    'completed_at', campaign.completed_at, 'cancelled_at', campaign.cancelled_at,
    'counts', (
      select jsonb_object_agg(state.name, coalesce(counted.number, 0))
      from unnest(enum_range(null::public.campaign_lead_status)) as state (name)
      left join (
        select member.status, count(*) as number
        from public.campaign_leads as member
        where member.campaign_id = campaign.id
        group by member.status
      ) as counted on counted.status = state.name
    ),
    'waiting', (
      select coalesce(jsonb_object_agg(reasoned.reason, reasoned.number), '{}')
      from (
        select
          coalesce(obstacle, case when queue.next_retry_at > at then coalesce(queue.wait_reason, 'scheduled') else 'capacity' end) as reason,
          count(*) as number
        from public.call_queue as queue
        where queue.campaign_id = campaign.id and queue.status = 'queued'
        group by 1
      ) as reasoned
    ),
    'skipped', (
      select coalesce(jsonb_object_agg(reasoned.reason, reasoned.number), '{}')
      from (
        select coalesce(member.skip_reason, member.status::text) as reason, count(*) as number
        from public.campaign_leads as member
        where member.campaign_id = campaign.id and member.status in ('skipped', 'opted_out')
        group by 1
      ) as reasoned
    ),
    'next_due_at', (
      select greatest(min(queue.next_retry_at), hold)
      from public.call_queue as queue
      where queue.campaign_id = campaign.id and queue.status = 'queued'
    )
  );
end
$$;
comment on function private.campaign_json(uuid, timestamptz) is
  'A campaign as its users see it: what it is, how many leads are in which state, what the others wait for, and why some are never called.';

create or replace function private.create_campaign(name text, project_id uuid, settings jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('campaign.edit');
  me           uuid := private.acting_user_id();
  campaign     public.campaigns;
  field        text;
  enrolled     integer;
begin
  settings := coalesce(settings, '{}');
  if length(btrim(coalesce(name, ''))) not between 1 and 200 then
    perform private.raise_error(422, 'invalid_name', 'A name of 1 to 200 characters is required', 'name');
  end if;
  if jsonb_typeof(settings) <> 'object' then
    perform private.raise_error(422, 'invalid_setting', 'settings is an object', 'settings');
  end if;
  if create_campaign.project_id is not null and not exists (
    select
    from public.projects as project
    where project.organization_id = organization and project.id = create_campaign.project_id
  ) then
    perform private.raise_error(404, 'project_not_found', 'There is no such project', 'project_id');
  end if;

  select tenant.timezone into campaign.timezone from public.organizations as tenant where tenant.id = organization;
  begin
    field := 'timezone';
    campaign.timezone := coalesce(settings ->> field, campaign.timezone);
    field := 'description';
    campaign.description := settings ->> field;
    field := 'start_date';
    campaign.start_date := (settings ->> field)::date;
    field := 'end_date';
    campaign.end_date := (settings ->> field)::date;
    field := 'time_start';
    campaign.time_start := coalesce((settings ->> field)::time, '09:00');
    field := 'time_end';
    campaign.time_end := coalesce((settings ->> field)::time, '21:00');
    field := 'max_concurrent_calls';
    campaign.max_concurrent_calls := coalesce((settings ->> field)::integer, 10);
    field := 'max_attempts';
    campaign.max_attempts := coalesce((settings ->> field)::smallint, 3);
    field := 'agent_id';
    campaign.agent_id := (settings ->> field)::uuid;
    field := 'record_calls';
    campaign.record_calls := coalesce((settings ->> field)::boolean, false);
    field := 'auto_complete';
    campaign.auto_complete := coalesce((settings ->> field)::boolean, true);
    field := 'credit_cap';
    campaign.credit_cap := (settings ->> field)::bigint;
  exception when data_exception then
    perform private.raise_error(422, 'invalid_setting', format('%L is not a value of %s', settings ->> field, field), field);
  end;
  if campaign.max_concurrent_calls not between 1 and 10000 then
    perform private.raise_error(422, 'invalid_setting', 'max_concurrent_calls is from 1 to 10000', 'max_concurrent_calls');
  end if;
  if campaign.max_attempts not between 1 and 10 then
    perform private.raise_error(422, 'invalid_setting', 'max_attempts is from 1 to 10', 'max_attempts');
  end if;
  if campaign.start_date > campaign.end_date then
    perform private.raise_error(422, 'invalid_setting', 'end_date is not before start_date', 'end_date');
  end if;
  campaign.purpose := coalesce(settings ->> 'purpose', 'service');
  if campaign.purpose not in ('service', 'promotional') then
    perform private.raise_error(422, 'invalid_setting', 'purpose is service or promotional', 'purpose');
  end if;
  -- What they may be, the table's own trigger says.
  campaign.retry_rules := coalesce(nullif(settings -> 'retry_rules', 'null'), '{}');
  if jsonb_typeof(campaign.retry_rules) <> 'object' then
    perform private.raise_error(422, 'invalid_setting', 'retry_rules is an object', 'retry_rules');
  end if;
  if campaign.credit_cap <= 0 then
    perform private.raise_error(422, 'invalid_setting', 'credit_cap is above 0', 'credit_cap');
  end if;
  campaign.lead_filter := private.check_lead_filter(settings -> 'leads');

  insert into public.campaigns (
    organization_id, project_id, name, description, timezone, start_date, end_date, time_start, time_end, max_concurrent_calls,
    max_attempts, agent_id, record_calls, auto_complete, purpose, retry_rules, credit_cap, lead_filter, created_by, created_at, updated_at
  )
  values (
    organization, create_campaign.project_id, btrim(create_campaign.name), campaign.description, campaign.timezone,
    campaign.start_date, campaign.end_date, campaign.time_start, campaign.time_end, campaign.max_concurrent_calls,
    campaign.max_attempts, campaign.agent_id, campaign.record_calls, campaign.auto_complete, campaign.purpose, campaign.retry_rules,
    campaign.credit_cap, campaign.lead_filter, me, at, at
  )
  returning * into campaign;
  enrolled := private.enrol_leads(campaign, me, at);
  perform private.audit(
    organization, 'campaign.created', 'campaign', campaign.id, jsonb_build_object('name', campaign.name, 'enrolled', enrolled), at
  );
  return private.campaign_json(campaign.id, at);
end
$$;
comment on function private.create_campaign(text, uuid, jsonb, timestamptz) is
  'Drafts a campaign and enrols the leads of its project, or of the organization when it has none, as far as its filter takes them.';

create or replace function private.enrol_leads(campaign public.campaigns, enrolled_by uuid, at timestamptz) returns integer
language plpgsql volatile security definer set search_path = '' as $$
declare
  filter   constant jsonb := campaign.lead_filter;
  ids      constant uuid[] := array(select element.id::uuid from jsonb_array_elements_text(filter -> 'lead_ids') as element (id));
  enrolled integer;
begin
  insert into public.campaign_leads (organization_id, campaign_id, lead_id, enrolled_by, enrolled_at, created_at, updated_at)
  select campaign.organization_id, campaign.id, lead.id, enrol_leads.enrolled_by, at, at, at
  from public.leads as lead
  where lead.organization_id = campaign.organization_id
    and (campaign.project_id is null or lead.project_id = campaign.project_id)
    and lead.archived_at is null
    and (not filter ? 'lead_ids' or lead.id = any (ids))
    and (not filter ? 'stage_ids' or lower(filter ->> 'stage_ids')::jsonb ? lead.stage_id::text)
    and (not filter ? 'assigned_to' or lower(filter ->> 'assigned_to')::jsonb ? lead.assigned_to::text)
    and (not filter ? 'statuses' or filter -> 'statuses' ? lead.status)
    and (not filter ? 'sources' or filter -> 'sources' ? lead.source)
    and (not filter ? 'min_score' or lead.score >= (filter ->> 'min_score')::numeric)
    and (not coalesce((filter ->> 'never_called')::boolean, false) or lead.call_status is null)
  on conflict (organization_id, campaign_id, lead_id) do nothing;
  get diagnostics enrolled = row_count;
  update public.campaigns as mine
  set open_leads = mine.open_leads + enrolled, total_enrolled = mine.total_enrolled + enrolled
  where mine.id = campaign.id;
  return enrolled;
end
$$;
comment on function private.enrol_leads(public.campaigns, uuid, timestamptz) is 'Enrols every lead of a campaign''s project that its filter takes and that is not archived; returns how many are new.';

create or replace function private.restore_campaign(campaign_id uuid, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('campaign.run');
  campaign     public.campaigns;
  reopened     integer;
begin
  perform
  from public.call_queue as queue
  where queue.organization_id = organization and queue.campaign_id = restore_campaign.campaign_id and queue.status = 'failed'
  order by queue.id
  for no key update;
  perform
  from public.campaign_leads as member
  where member.organization_id = organization and member.campaign_id = restore_campaign.campaign_id and member.status = 'skipped'
  order by member.id
  for no key update;
  campaign := private.claim_campaign(campaign_id, 'campaign.run');
  if campaign.status <> 'archived' then
    perform private.raise_error(
      409, 'invalid_transition', format('A campaign that is %s cannot be restored', campaign.status), 'status'
    );
  end if;
  -- Whom nothing but the campaign's end took out is open again; who was called, failed or must not be called stays so.
  update public.call_queue as queue
  set status = 'queued', next_retry_at = at, last_error = null
  from public.campaign_leads as member
  where queue.organization_id = organization and queue.campaign_id = campaign.id and queue.status = 'failed'
    and member.organization_id = organization and member.campaign_id = campaign.id and member.lead_id = queue.lead_id
    and member.status = 'skipped' and member.skip_reason in ('campaign_cancelled', 'campaign_completed', 'campaign_over', 'bad_timezone');
  update public.campaign_leads as member
  set
    skip_reason = null,
    status = case
      when exists (
        select
        from public.call_queue as queue
        where queue.organization_id = organization and queue.campaign_id = campaign.id and queue.lead_id = member.lead_id
      )
      then 'queued'
      else 'enrolled'
    end::public.campaign_lead_status
  where member.organization_id = organization and member.campaign_id = campaign.id
    and member.status = 'skipped' and member.skip_reason in ('campaign_cancelled', 'campaign_completed', 'campaign_over', 'bad_timezone');
  get diagnostics reopened = row_count;
  update public.campaigns as mine
  set
    status = 'draft', archived_at = null, completed_at = null, cancelled_at = null, started_at = null, paused_at = null,
    pause_reason = null, open_leads = mine.open_leads + reopened
  where mine.id = campaign.id;
  perform private.audit(campaign.organization_id, 'campaign.restored', 'campaign', campaign.id, jsonb_build_object('reopened', reopened), at);
  return private.campaign_json(campaign.id, at);
end
$$;

create or replace function private.claim_deliveries(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' set jit = off set enable_seqscan = off as $$
declare
  wanted  constant integer := least(greatest(coalesce((request ->> 'limit')::integer, 200), 1), 500);
  claimed jsonb;
begin
  perform private.fan_out(500, at);
  with ready as (
    -- An endpoint that nothing reaches is tried with a few at a time, so that its timeouts hold up little else.
    select
      endpoint.organization_id, endpoint.id,
      case when endpoint.failing_since is not null then 4 when endpoint.is_slow then 20 else 50 end - (
        select count(*) from public.event_deliveries as busy where busy.endpoint_id = endpoint.id and busy.lease_until > now()
      ) as room
    from public.webhook_endpoints as endpoint
    where endpoint.enabled
  ),
  candidates as (
    select
      ready.organization_id, due.id, due.next_attempt_at,
      row_number() over (partition by ready.id order by due.next_attempt_at, due.id) as nth
    from ready
    cross join lateral (
      select delivery.id, delivery.next_attempt_at
      from public.event_deliveries as delivery
      where delivery.endpoint_id = ready.id and delivery.status in ('pending', 'failed') and delivery.next_attempt_at <= at
        and (delivery.lease_until is null or delivery.lease_until <= now())
      order by delivery.next_attempt_at, delivery.id
      limit least(greatest(ready.room, 0), wanted)
    ) as due
  ),
  ranked as (
    select
      candidate.id, candidate.next_attempt_at,
      row_number() over (partition by candidate.organization_id order by candidate.nth, candidate.next_attempt_at, candidate.id) as turn
    from candidates as candidate
  ),
  chosen as (
    select ranked.id, ranked.turn from ranked order by ranked.turn, ranked.next_attempt_at, ranked.id limit wanted
  ),
  locked as (
    select delivery.id
    from public.event_deliveries as delivery
    where delivery.id in (select chosen.id from chosen) and delivery.status in ('pending', 'failed')
      and (delivery.lease_until is null or delivery.lease_until <= now())
    order by delivery.id
    for no key update skip locked
  ),
  leased as (
    update public.event_deliveries as delivery
    -- Whoever claims may die before the queue has it, and then nothing but the lease brings it back: the first one is short. What lapses
    -- all the same waits on a queue that is behind, and is not put there again and again.
    set lease_until = now() + case when delivery.lease_until is null then interval '30 seconds' else interval '3 minutes' end, lease_token = null
    from locked
    where delivery.id = locked.id
    returning delivery.id, delivery.organization_id, delivery.endpoint_id
  )
  select jsonb_agg(
    jsonb_build_object('id', leased.id, 'organization_id', leased.organization_id, 'slow', endpoint.is_slow) order by chosen.turn, leased.id
  )
  into claimed
  from leased
  join chosen on chosen.id = leased.id
  join public.webhook_endpoints as endpoint on endpoint.id = leased.endpoint_id;
  claimed := coalesce(claimed, '[]');
  return jsonb_build_object('deliveries', claimed, 'more', jsonb_array_length(claimed) = wanted);
end
$$;

create function private.check_lead_filter(filter jsonb) returns jsonb
language plpgsql stable security definer set search_path = '' as $$
declare
  most constant integer := 5000;
  part record;
begin
  filter := coalesce(nullif(filter, 'null'), '{}');
  if jsonb_typeof(filter) <> 'object' then
    perform private.raise_error(422, 'invalid_setting', 'leads is an object', 'leads');
  end if;
  for part in select item.key, item.value from jsonb_each(filter) as item
  loop
    -- What is not understood must not mean everybody.
    if part.key <> all (array['lead_ids', 'stage_ids', 'assigned_to', 'statuses', 'sources', 'min_score', 'never_called']) then
      perform private.raise_error(422, 'invalid_setting', format('leads has no %s', left(part.key, 50)), 'leads');
    elsif part.key = 'min_score' then
      if jsonb_typeof(part.value) <> 'number' or (part.value)::numeric not between -2147483648 and 2147483647 then
        perform private.raise_error(422, 'invalid_setting', 'min_score is a number', 'leads');
      end if;
    elsif part.key = 'never_called' then
      if jsonb_typeof(part.value) <> 'boolean' then
        perform private.raise_error(422, 'invalid_setting', 'never_called is true or false', 'leads');
      end if;
    elsif jsonb_typeof(part.value) <> 'array' or jsonb_array_length(part.value) not between 1 and most
      or jsonb_path_exists(part.value, '$[*] ? (@.type() != "string")')
    then
      perform private.raise_error(422, 'invalid_setting', format('%s is a list of 1 to %s strings', part.key, most), 'leads');
    elsif part.key in ('lead_ids', 'stage_ids', 'assigned_to') and exists (
      select
      from jsonb_array_elements_text(part.value) as element (id)
      where element.id !~* '^[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}$'
    ) then
      perform private.raise_error(422, 'invalid_setting', format('%s are ids', part.key), 'leads');
    end if;
  end loop;
  return filter;
end
$$;
comment on function private.check_lead_filter(jsonb) is
  'A filter of leads: {"lead_ids","stage_ids","assigned_to","statuses","sources": lists,"min_score","never_called"}, all of which hold at once; '
  'anything else in it is 422.';

create function private.check_transfer(call_id uuid, phone_number text, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('call.control');
  attempt      public.call_logs;
  obstacle     text;
  reason       text;
begin
  select log.* into attempt from public.call_logs as log where log.organization_id = organization and log.id = check_transfer.call_id;
  if attempt.id is null then
    perform private.raise_error(404, 'call_not_found', 'There is no such call', 'call_id');
  end if;
  if attempt.status = 'ended' then
    perform private.raise_error(409, 'invalid_transition', 'A call that is over goes to nobody', 'call_id');
  end if;
  obstacle := private.dispatch_obstacle(organization, at);
  reason := case
    when private.transfer_number(phone_number) is null then 'destination_blocked'
    else coalesce(
      private.transfer_refusal(organization, phone_number, at),
      case when obstacle in ('platform_disabled', 'dialling_disabled') then obstacle end
    )
  end;
  perform private.audit(
    organization, 'call.transfer_checked', 'call_log', attempt.id,
    jsonb_strip_nulls(jsonb_build_object('allowed', reason is null, 'reason', reason)), at
  );
  return jsonb_build_object('call_id', attempt.id, 'allowed', reason is null, 'reason', reason);
end
$$;
comment on function private.check_transfer(uuid, text, timestamptz) is
  'Whether a call under way may be handed on to a number: what may be dialled may be transferred to, and nothing else. Put on record without the number.';

create function public.check_transfer(call_id uuid, phone_number text) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.check_transfer(call_id, phone_number, private.clock_now())
$$;
comment on function public.check_transfer(uuid, text) is
  'Asked before a call is transferred: {"call_id","allowed","reason"}, where the reason is destination_blocked, price_ceiling, spend_ceiling or a '
  'switch; 409 when the call is over. Needs call.control.';

comment on function public.get_campaign(uuid) is
  'A campaign: {"id","name","status",…,"counts":{state:n},"waiting":{reason:n},"skipped":{reason:n},"next_due_at"}. Needs campaign.view.';

comment on function public.create_campaign(text, uuid, jsonb) is
  'Drafts a campaign. settings: timezone, start_date, end_date, time_start, time_end, max_concurrent_calls, max_attempts, record_calls, '
  'agent_id, auto_complete, description, purpose, retry_rules, credit_cap, leads ({"lead_ids","stage_ids","assigned_to","statuses","sources",'
  '"min_score","never_called"}: which of the project''s). Needs campaign.edit; returns the campaign as get_campaign() does.';

comment on function public.reconcile_calls(jsonb) is
  '{"v":1,"limit":50} -> {"attempts":[{"attempt_id",…,"provider_call_id"|null,"from","to","status","age_seconds","others"}],"agentless":[{"organization_id",'
  '"attempt_id"}]}; the age is real, since it was begun.';

insert into private.personal_data (table_name, column_name, found_by, via, treatment, reason)
values
  ('public.campaigns', 'lead_filter', 'none', null, 'kept', 'Ids, and words of lists.');

revoke execute on function private.check_lead_filter(jsonb), private.check_transfer(uuid, text, timestamptz)
from public, anon, authenticated, service_role;
revoke execute on function public.check_transfer(uuid, text) from public, anon, authenticated, service_role;
grant execute on function private.check_transfer(uuid, text, timestamptz), public.check_transfer(uuid, text) to authenticated;
