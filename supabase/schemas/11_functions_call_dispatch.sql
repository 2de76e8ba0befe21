-- What call-dispatch calls, and what ends an attempt. The locks are always taken in the order that 06_campaigns_and_calling.sql names.
--
-- The bodies that handlers call find every row by an index, and say so (enable_seqscan = off): a plan that a connection makes while
-- a table is still empty would else read the whole of it for as long as the connection lives. Compiling them (jit) would take longer
-- than running them.


-- The calling window --------------------------------------------------------------------------------------------------------------

create function private.calling_window(
  at timestamptz, zone text, time_start time, time_end time, start_date date, end_date date,
  out opens_at timestamptz, out closes_at timestamptz
)
language plpgsql stable set search_path = '' as $$
begin
  select
    (day.value + piece.opens)::timestamp at time zone zone,
    (day.value + piece.closes)::timestamp at time zone zone
  into opens_at, closes_at
  from (
      select greatest((at at time zone zone)::date, start_date) + ahead as value
      from generate_series(0, 2) as ahead
    ) as day
    cross join (
      -- A window over midnight is two pieces of a day; what the law leaves of either is between 09:00 and 21:00.
      select greatest(part.opens, time '09:00') as opens, least(part.closes, time '21:00') as closes
      from (
        select time_start, time_end where time_start < time_end
        union all
        select time_start, time '24:00' where time_start >= time_end
        union all
        select time '00:00', time_end where time_start >= time_end
      ) as part (opens, closes)
    ) as piece
  where piece.opens < piece.closes
    and (end_date is null or day.value <= end_date)
    and (day.value + piece.closes)::timestamp at time zone zone > at
  order by 1
  limit 1;
end
$$;
comment on function private.calling_window(timestamptz, text, time, time, date, date) is
  'The stretch in which somebody in a zone may be called: the one that is open, or else the next; null when there is none. '
  'The opening minute belongs to it, the closing one does not.';

create function private.legal_window(
  at timestamptz, zone text, campaign public.campaigns, country text, region text, out opens_at timestamptz, out closes_at timestamptz
)
language plpgsql stable security definer set search_path = '' as $$
declare
  stretch record;
  law     record;
  day     date;
  moment  timestamptz := at;
begin
  -- Holidays may follow on a weekend: ten days are looked through.
  for try in 1..20 loop
    stretch := private.calling_window(moment, zone, campaign.time_start, campaign.time_end, campaign.start_date, campaign.end_date);
    exit when stretch.opens_at is null or stretch.opens_at > at + interval '10 days' and try > 2;
    day := (stretch.opens_at at time zone zone)::date;
    law := private.legal_hours(country, region, campaign.purpose, day);
    if law.opens is not null then
      opens_at := greatest(stretch.opens_at, (day + law.opens)::timestamp at time zone zone);
      closes_at := least(stretch.closes_at, (day + law.closes)::timestamp at time zone zone);
      if opens_at < closes_at and closes_at > at then
        return;
      end if;
    end if;
    moment := stretch.closes_at;
  end loop;
  opens_at := null;
  closes_at := null;
end
$$;
comment on function private.legal_window(timestamptz, text, public.campaigns, text, text) is
  'The calling window of a campaign in a zone, as far as the law of the country and state leaves it open on that day; null when nothing is left.';

create function private.callee_zones(lead_zone text, number_zones text[], campaign_zone text) returns text[]
language sql stable security definer set search_path = '' as $$
  select case when count(known.name) = count(*) then array_agg(known.name order by known.name) end
  from unnest(case when lead_zone <> '' then array[lead_zone] else coalesce(number_zones, array[campaign_zone]) end) as wanted (name)
  left join private.timezones as known on known.name = wanted.name
$$;
comment on function private.callee_zones(text, text[], text) is
  'The zones that a callee may be in: the lead''s own, else those of the number, else the campaign''s; null when one of them is no zone.';

create function private.callee_window(
  at timestamptz, zones text[], campaign public.campaigns, country text, region text, out opens_at timestamptz, out closes_at timestamptz
)
language plpgsql stable security definer set search_path = '' as $$
declare
  moment timestamptz := at;
begin
  -- When the last of them opens, another may have closed meanwhile: then it is the next time.
  for try in 1..10 loop
    select case when bool_and(stretch.opens_at is not null) then max(stretch.opens_at) end, min(stretch.closes_at)
    into opens_at, closes_at
    from unnest(zones) as place (zone)
    cross join lateral private.legal_window(moment, place.zone, campaign, country, region) as stretch;
    exit when opens_at is null or opens_at <= moment;
    moment := opens_at;
  end loop;
end
$$;
comment on function private.callee_window(timestamptz, text[], public.campaigns, text, text) is
  'The stretch in which somebody who is in any of some zones may be called in all of them; null when there is none.';

create function private.recent_dials(callee text, at timestamptz) returns timestamptz[]
language plpgsql stable security definer set search_path = '' as $$
begin
  return (
    select array_agg(dial.at order by dial.at desc)
    from (
      -- Each dial is placed at its end, the latest moment at which the phone can have rung.
      select coalesce(log.ended_at, log.submitted_at) as at
      from public.call_logs as log
      where log.callee_number = callee
        and log.dialled
        and log.direction = 'outbound'
        and log.submitted_at > recent_dials.at - interval '30 hours'
      order by log.submitted_at desc
      limit 2
    ) as dial
  );
end
$$;
comment on function private.recent_dials(text, timestamptz) is
  'When a number was last dialled, and the time before, by whichever organization: 60 minutes lie between two dials, and two are all in 24 hours.';

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

create function private.whole_minute(moment timestamptz) returns timestamptz
language plpgsql stable set search_path = '' as $$
begin
  return date_trunc('minute', moment + interval '59.999999 seconds');
end
$$;
comment on function private.whole_minute(timestamptz) is
  'The moment, or the next full minute: what falls due together is released together.';


-- The end of an attempt -----------------------------------------------------------------------------------------------------------

create function private.lock_attempts(attempts uuid[]) returns void
language plpgsql volatile security definer set search_path = '' as $$
begin
  perform from public.call_logs as log where log.id = any (attempts) order by log.id for no key update;
  perform
  from public.call_queue as queue
  where queue.id in (select log.queue_id from public.call_logs as log where log.id = any (attempts))
  order by queue.id
  for no key update;
  perform
  from public.campaign_leads as member
  where (member.organization_id, member.campaign_id, member.lead_id) in (
    select log.organization_id, log.campaign_id, log.lead_id from public.call_logs as log where log.id = any (attempts)
  )
  order by member.id
  for no key update;
  perform
  from public.leads as lead
  where lead.id in (select log.lead_id from public.call_logs as log where log.id = any (attempts))
  order by lead.id
  for no key update;
  perform
  from public.campaigns as campaign
  where campaign.id in (select log.campaign_id from public.call_logs as log where log.id = any (attempts))
  order by campaign.id
  for no key update;
end
$$;
comment on function private.lock_attempts(uuid[]) is
  'Locks attempts and all that ending them touches, table by table and by id: who ends several calls this first.';

create function private.write_attempt(attempt public.call_logs) returns void
language plpgsql volatile security definer set search_path = '' as $$
begin
  update public.call_logs as log
  set
    status = attempt.status,
    call_status = attempt.call_status,
    call_sid = attempt.call_sid,
    dialled = attempt.dialled,
    refusal_reason = attempt.refusal_reason,
    lease_until = attempt.lease_until,
    submitted_at = attempt.submitted_at,
    ringing_at = attempt.ringing_at,
    answered_at = attempt.answered_at,
    ended_at = attempt.ended_at,
    duration = attempt.duration,
    bill_duration_seconds = attempt.bill_duration_seconds,
    carrier_cost_micros = attempt.carrier_cost_micros,
    carrier_cost_currency = attempt.carrier_cost_currency,
    hangup_cause_code = attempt.hangup_cause_code,
    hangup_cause_name = attempt.hangup_cause_name,
    hangup_source = attempt.hangup_source,
    machine = attempt.machine,
    recording_url = attempt.recording_url,
    recording_id = attempt.recording_id,
    recording_seconds = attempt.recording_seconds,
    disconnect_reason = attempt.disconnect_reason,
    stream_id = attempt.stream_id,
    stream_status = attempt.stream_status,
    stream_error = attempt.stream_error,
    transferred = attempt.transferred,
    transferred_at = attempt.transferred_at,
    transfer_sid = attempt.transfer_sid,
    transfer_status = attempt.transfer_status
  where log.id = attempt.id;
end
$$;
comment on function private.write_attempt(public.call_logs) is 'Writes what events and dialling change of an attempt; its row is locked already.';

create function private.day_part(moment timestamptz, zone text) returns integer
language sql stable set search_path = '' as $$
  select width_bucket(extract(hour from moment at time zone zone), array[12, 17]::numeric[])
$$;
comment on function private.day_part(timestamptz, text) is 'Morning, afternoon or evening: 0, 1 or 2.';

create function private.retry_wait(campaign public.campaigns, outcome public.call_outcome, nth bigint) returns interval
language plpgsql volatile security definer set search_path = '' as $$
declare
  jitter constant numeric := coalesce((select platform.retry_jitter from private.platform_dialling as platform), 0);
  wait   interval;
begin
  if campaign.retry_rules ? outcome::text then
    wait := make_interval(mins => (campaign.retry_rules -> outcome::text ->> (nth - 1)::integer)::integer);
  else
    wait := (select rule.delay from private.retry_rules as rule where rule.outcome = retry_wait.outcome and rule.nth = retry_wait.nth);
  end if;
  return wait * (1 + jitter * (2 * random() - 1));
end
$$;
comment on function private.retry_wait(public.campaigns, public.call_outcome, bigint) is
  'How long to wait after the nth attempt that ended so: by the campaign''s rules, else the platform''s, and a little sooner or later; null is not again.';

create function private.next_dial_at(
  attempt public.call_logs, campaign public.campaigns, earliest timestamptz, other_part boolean default false
) returns timestamptz
language plpgsql stable security definer set search_path = '' as $$
declare
  dials timestamptz[] := private.recent_dials(attempt.callee_number, attempt.ended_at);
  free  timestamptz := greatest(earliest, dials[1] + interval '60 minutes', dials[2] + interval '24 hours');
  zones text[];
  callee record;
begin
  select found.* into callee from private.destination(attempt.callee_number, null) as found;
  select private.callee_zones(lead.timezone, callee.zones, campaign.timezone) into zones
  from public.leads as lead
  where lead.organization_id = attempt.organization_id and lead.id = attempt.lead_id;
  if zones is not null then
    -- Who was not there in the morning may be in the afternoon.
    if other_part and private.day_part(free, zones[1]) = private.day_part(coalesce(attempt.submitted_at, attempt.ended_at), zones[1]) then
      free := (
        (free at time zone zones[1])::date + (array['12:00', '17:00', '33:00']::interval[])[private.day_part(free, zones[1]) + 1]
      )::timestamp at time zone zones[1];
    end if;
    free := greatest(free, (private.callee_window(free, zones, campaign, callee.country, callee.region)).opens_at);
  end if;
  return private.whole_minute(free);
end
$$;
comment on function private.next_dial_at(public.call_logs, public.campaigns, timestamptz, boolean) is
  'When a lead may be called again, not before a given time: gap, caps and window as they look now. The release judges anew.';

create function private.end_attempt(
  attempt public.call_logs, outcome public.call_outcome, at timestamptz,
  due timestamptz default null, closing public.campaign_lead_status default null, reason text default null
) returns void
language plpgsql volatile security definer set search_path = '' as $$
declare
  queue    public.call_queue;
  member   public.campaign_leads;
  campaign public.campaigns;
  -- Want of capacity or time is not the lead's doing, and neither is a gate that closed.
  counted  boolean := outcome not in ('capacity', 'expired') and due is null and closing is null;
  attempts smallint;
  tries    bigint;
  wait     interval;
  next_at  timestamptz := due;
  final    public.campaign_lead_status := closing;
  completes boolean;
begin
  attempt.status := 'ended';
  attempt.call_status := outcome;
  attempt.ended_at := coalesce(attempt.ended_at, greatest(at, attempt.created_at));
  attempt.refusal_reason := coalesce(reason, attempt.refusal_reason);
  attempt.lease_until := null;
  if attempt.dialled or attempt.direction = 'inbound' then
    attempt.disconnect_reason := coalesce(attempt.disconnect_reason, outcome::text);
  end if;

  select waiting.* into queue
  from public.call_queue as waiting
  where waiting.organization_id = attempt.organization_id and waiting.id = attempt.queue_id
  for no key update;
  select enrolled.* into member
  from public.campaign_leads as enrolled
  where enrolled.organization_id = attempt.organization_id
    and enrolled.campaign_id = attempt.campaign_id
    and enrolled.lead_id = attempt.lead_id
  for no key update;
  perform private.write_attempt(attempt);

  if queue.status = 'processing' then
    select running.* into campaign
    from public.campaigns as running
    where running.id = attempt.campaign_id
    for no key update;

    attempts := queue.attempt_count + counted::integer;
    -- They asked to be called at a time, which ends no lead and is no retry.
    if final is null and next_at is null and queue.metadata ? 'callback_at' then
      next_at := private.next_dial_at(
        attempt, campaign, greatest((queue.metadata ->> 'callback_at')::timestamptz, attempt.ended_at)
      );
      reason := 'callback';
    end if;
    if final is null and next_at is null then
      if outcome = 'answered' then
        final := 'called';
      elsif not counted then
        next_at := at + interval '1 minute';
      elsif attempts < queue.max_attempts then
        tries := (
          select count(*)
          from public.call_logs as log
          where log.organization_id = attempt.organization_id
            and log.queue_id = queue.id
            and log.call_status = end_attempt.outcome
        );
        wait := private.retry_wait(campaign, outcome, tries);
        if wait is not null then
          next_at := private.next_dial_at(
            attempt, campaign, attempt.ended_at + wait,
            exists (
              select from private.retry_rules as rule where rule.outcome = end_attempt.outcome and rule.nth = tries and rule.other_part
            )
          );
        end if;
      end if;
      if final is null and next_at is null then
        final := 'failed';
      end if;
    end if;
    if final is null and campaign.status not in ('scheduled', 'running', 'paused') then
      final := 'skipped';
      reason := 'campaign_' || campaign.status;
    end if;
    completes := final is not null and campaign.open_leads = 1 and campaign.auto_complete and campaign.status in ('running', 'paused');

    update public.call_queue as waiting
    set
      status = case when final is null then 'queued' when final = 'called' then 'completed' else 'failed' end::public.queue_status,
      attempt_count = attempts,
      next_retry_at = coalesce(next_at, waiting.next_retry_at),
      wait_reason = case when final is null then coalesce(reason, 'retry_' || outcome) end,
      last_error = case when outcome <> 'answered' then coalesce(reason, outcome::text) end,
      dial_class = case
        when final is null and reason = 'callback' then 2
        when final is null and counted then 1
        else waiting.dial_class
      end,
      max_attempts = case when reason = 'callback' then greatest(waiting.max_attempts, attempts + 1) else waiting.max_attempts end,
      metadata = waiting.metadata - 'callback_at'
    where waiting.id = queue.id;
    update public.campaign_leads as enrolled
    set
      status = coalesce(final, 'queued'),
      attempt_count = attempts,
      call_log_id = attempt.id,
      last_call_attempt_at = case when attempt.dialled then attempt.submitted_at else enrolled.last_call_attempt_at end,
      skip_reason = case when final in ('skipped', 'opted_out') then coalesce(reason, outcome::text) end,
      opted_out_at = case when final = 'opted_out' then at end
    where enrolled.id = member.id;
  end if;

  if campaign.id is not null and (final is not null or attempt.dialled) then
    update public.campaigns as running
    set
      open_leads = running.open_leads - (final is not null)::integer,
      total_calls = running.total_calls + attempt.dialled::integer,
      answered_calls = running.answered_calls + (attempt.dialled and outcome = 'answered')::integer,
      status = case when completes then 'completed' else running.status end,
      completed_at = case when completes then at else running.completed_at end
    where running.id = campaign.id;
    if completes then
      perform private.campaign_completed(campaign.organization_id, campaign.id, at);
    end if;
  end if;

  if campaign.id is null and attempt.campaign_id is not null then
    -- What the call costs is written on it, and it is locked before counters and wallets.
    perform from public.campaigns as spender where spender.id = attempt.campaign_id for no key update;
  end if;
  perform private.meter_call(attempt, at);
  if attempt.dialled or attempt.direction = 'inbound' then
    perform private.emit(
      attempt.organization_id, 'call.ended', attempt.id::text,
      private.end_event(attempt) || jsonb_build_object('lead_status', coalesce(final, 'queued'), 'next_attempt_at', next_at), at
    );
  end if;
  -- A slot is free: whoever waits for it need not wait for the next minute.
  if not coalesce(completes, false) and campaign.status = 'running' and exists (
    select
    from public.call_queue as waiting
    where waiting.campaign_id = campaign.id and waiting.status = 'queued' and waiting.next_retry_at <= at
  ) then
    perform private.nudge('call-dispatch');
  end if;
end
$$;
comment on function private.end_attempt(
  public.call_logs, public.call_outcome, timestamptz, timestamptz, public.campaign_lead_status, text
) is
  'Ends a locked attempt, once, and settles all that hangs on it in one transaction: queue, lead, campaign, usage, outbox. '
  'due puts the lead back until then and closing ends it, both without counting the attempt; else the retry rules decide.';

create function private.campaign_completed(organization uuid, campaign_id uuid, at timestamptz) returns void
language plpgsql volatile security definer set search_path = '' as $$
begin
  perform private.emit(
    organization, 'campaign.completed',
    -- One that was restored completes once more.
    case
      when exists (select from private.outbox as told where told.topic = 'campaign.completed' and told.key = campaign_completed.campaign_id::text)
      then private.key_at(campaign_id, at)
      else campaign_id::text
    end,
    jsonb_build_object('campaign_id', campaign_id, 'completed_at', at), at
  );
  perform private.audit(organization, 'campaign.completed', 'campaign', campaign_id, '{}', at);
end
$$;
comment on function private.campaign_completed(uuid, uuid, timestamptz) is 'Tells that a campaign is complete; whoever completed it calls this in the same transaction.';

create function private.has_talked(attempt public.call_logs) returns boolean
language sql immutable parallel safe set search_path = '' as $$
  select coalesce(greatest(attempt.duration, attempt.bill_duration_seconds) > 0, attempt.answered_at is not null)
$$;
comment on function private.has_talked(public.call_logs) is
  'Whether a leg had a second of talk: by the carrier''s seconds, and where it tells none, by its answer.';

create function private.settled_outcome(attempt public.call_logs, reported public.call_outcome) returns public.call_outcome
language sql immutable parallel safe set search_path = '' as $$
  select case
    when reported in ('answered', 'our_fault') and attempt.machine then 'machine'::public.call_outcome
    when reported = 'answered' and attempt.stream_status = 'failed' and coalesce(attempt.duration, 0) < 5 then 'our_fault'::public.call_outcome
    else reported
  end
$$;
comment on function private.settled_outcome(public.call_logs, public.call_outcome) is
  'What an end means beside what else is known of the leg: who answered may be a machine, and whom no agent spoke to was not answered by us.';

create function private.outcome_rank(outcome public.call_outcome, has_talked boolean) returns integer
language sql immutable parallel safe set search_path = '' as $$
  select case outcome
    when 'lost' then 0
    when 'expired' then 0
    when 'failed' then 10
    when 'answered' then case when has_talked then 90 else 20 end
    when 'cancelled' then 30
    when 'capacity' then 40
    when 'config' then 41
    when 'carrier_transient' then 42
    when 'our_fault' then case when has_talked then 95 else 43 end
    when 'no_answer' then 50
    when 'rejected' then 60
    when 'busy' then 70
    when 'invalid_number' then 80
    when 'spam_blocked' then 81
    when 'machine' then 99
  end
$$;
comment on function private.outcome_rank(public.call_outcome, boolean) is
  'Which of two ends that a carrier told of one call stays, whichever came first: the one that says more. A guess is nothing, a plain end '
  'without a second of talk says less than the reason for it, and talk says more than any reason why there was none.';

create function private.amend_attempt(
  attempt public.call_logs, amended public.call_logs, outcome public.call_outcome, at timestamptz
) returns boolean
language plpgsql volatile security definer set search_path = '' as $$
declare
  queue    public.call_queue;
  member   public.campaign_leads;
  campaign public.campaigns;
  settled  constant public.call_outcome := private.settled_outcome(amended, coalesce(outcome, attempt.call_status));
  -- Who was dialled after all has no reason any more why he was not.
  corrects constant boolean := settled <> attempt.call_status and (
    outcome is not null and not attempt.dialled and amended.dialled
    or private.outcome_rank(settled, private.has_talked(amended)) > private.outcome_rank(attempt.call_status, private.has_talked(amended))
  );
  completes boolean := false;
begin
  outcome := settled;
  if corrects then
    amended.call_status := outcome;
    -- What the agent said of the end stands, whichever of the two was told first.
    if attempt.metadata #>> '{agent,ranks,disconnect_reason}' is null then
      amended.disconnect_reason := outcome;
    end if;
  end if;
  if amended is not distinct from attempt then
    return false;
  end if;

  if corrects or amended.dialled <> attempt.dialled then
    select waiting.* into queue
    from public.call_queue as waiting
    where waiting.organization_id = attempt.organization_id and waiting.id = attempt.queue_id
    for no key update;
    select enrolled.* into member
    from public.campaign_leads as enrolled
    where enrolled.organization_id = attempt.organization_id
      and enrolled.campaign_id = attempt.campaign_id
      and enrolled.lead_id = attempt.lead_id
    for no key update;
  end if;
  perform private.write_attempt(amended);

  if queue.id is not null then
    select running.* into campaign from public.campaigns as running where running.id = attempt.campaign_id for no key update;
    -- Somebody who did answer, and waits to be called again for nothing, is left in peace.
    if corrects and outcome = 'answered' and queue.status = 'queued' then
      completes := campaign.open_leads = 1 and campaign.auto_complete and campaign.status in ('running', 'paused');
      update public.call_queue as waiting
      set status = 'completed', wait_reason = null, last_error = null
      where waiting.id = queue.id;
    end if;
    if corrects and outcome = 'answered' and queue.status in ('queued', 'failed') and member.call_log_id = attempt.id then
      update public.campaign_leads as enrolled set status = 'called', skip_reason = null where enrolled.id = member.id;
    end if;
    update public.campaigns as running
    set
      open_leads = running.open_leads - (corrects and outcome = 'answered' and queue.status = 'queued')::integer,
      total_calls = running.total_calls + (amended.dialled and not attempt.dialled)::integer,
      answered_calls = running.answered_calls
        + (amended.dialled and amended.call_status = 'answered')::integer - (attempt.dialled and attempt.call_status = 'answered')::integer,
      status = case when completes then 'completed' else running.status end,
      completed_at = case when completes then at else running.completed_at end
    where running.id = campaign.id;
    if completes then
      perform private.campaign_completed(campaign.organization_id, campaign.id, at);
    end if;
  end if;
  if amended.bill_duration_seconds is distinct from attempt.bill_duration_seconds then
    if campaign.id is null and attempt.campaign_id is not null then
      perform from public.campaigns as spender where spender.id = attempt.campaign_id for no key update;
    end if;
    perform private.meter_call(amended, at);
  end if;
  -- Of a call that was never made nothing was told. It was made after all.
  if amended.dialled and not attempt.dialled and attempt.direction <> 'inbound' then
    perform private.emit(
      amended.organization_id, 'call.ended', amended.id::text,
      private.end_event(amended) || (
        select jsonb_build_object(
          'lead_status', max(enrolled.status::text), 'next_attempt_at', max(waiting.next_retry_at) filter (where waiting.status = 'queued')
        )
        from public.campaign_leads as enrolled
        left join public.call_queue as waiting on waiting.organization_id = amended.organization_id and waiting.id = amended.queue_id
        where enrolled.organization_id = amended.organization_id and enrolled.campaign_id = amended.campaign_id
          and enrolled.lead_id = amended.lead_id
      ),
      at
    );
  end if;
  return true;
end
$$;
comment on function private.amend_attempt(public.call_logs, public.call_logs, public.call_outcome, timestamptz) is
  'Adds to an ended attempt what came late: cost, recording, seconds not yet counted, a better reason. It never ends twice. False if nothing was new.';


-- release_calls -------------------------------------------------------------------------------------------------------------------
-- The large statements below are planned once a connection (plan_cache_mode), since planning them takes as long as running them.

create type private.candidate as (
  queue_id             uuid,
  organization_id      uuid,
  campaign_id          uuid,
  lead_id              uuid,
  project_id           uuid,
  callee_number        text,
  caller_number        text,
  carrier_account_id   uuid,
  attempt_no           integer,
  agent_id             uuid,
  record_call          boolean,
  ring_timeout_seconds integer,
  max_call_seconds     integer,
  closes_at            timestamptz,
  verdict              text,
  due                  timestamptz,
  dial_class           smallint
);
comment on type private.candidate is
  'A queue row as release_calls() judges it. No verdict: it may be dialled until closes_at. A verdict with due: it waits. Without: it is over.';

create function private.check_breakers(at timestamptz) returns void
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
comment on function private.check_breakers(timestamptz) is
  'Opens and closes the breakers of carrier accounts and campaigns by how calls ended in the last two minutes, and lowers or raises the '
  'calls in flight of accounts whose carrier was full. Under the lock of releases.';

create function private.is_broken(scope uuid, at timestamptz) returns boolean
language plpgsql stable security definer set search_path = '' as $$
begin
  return exists (
    select
    from private.breakers as breaker
    where breaker.scope = is_broken.scope and breaker.is_open
      and (
        breaker.retry_at > is_broken.at
        or exists (
          select
          from public.call_logs as probe
          where probe.status <> 'ended' and probe.direction = 'outbound' and probe.created_at >= breaker.retry_at
            and breaker.scope in (probe.carrier_account_id, probe.campaign_id)
        )
      )
  );
end
$$;
comment on function private.is_broken(uuid, timestamptz) is
  'Whether nothing may be begun on an account or of a campaign since too much failed; once the wait is over, one call at a time may.';

create function private.has_tripped(scope uuid, at timestamptz) returns boolean
language plpgsql stable security definer set search_path = '' as $$
begin
  return exists (
    select
    from private.breakers as breaker
    where breaker.scope = has_tripped.scope and breaker.is_open and breaker.retry_at > has_tripped.at
  );
end
$$;
comment on function private.has_tripped(uuid, timestamptz) is
  'Whether nothing may be begun on an account or of a campaign yet; the call that tries whether it is over is released after that.';

create function private.caller_number_room(number text, daily_calls integer, at timestamptz) returns integer
language plpgsql stable security definer set search_path = '' as $$
begin
  return daily_calls - (
    select count(*)
    from (
      select
      from public.call_logs as log
      where log.caller_number = number
        and log.direction = 'outbound'
        and log.created_at > at - interval '24 hours'
        and (log.dialled or log.status = 'created')
      limit daily_calls
    ) as made
  )::integer;
end
$$;
comment on function private.caller_number_room(text, integer, timestamptz) is
  'How many calls more may be made from a number of ours now: its daily ones less those of the last 24 hours.';

create function private.judge_candidates(at timestamptz, budget integer, passed uuid[], sole uuid default null) returns private.candidate[]
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
      greatest(ceil(budget * waiting.weight / sum(waiting.weight) over ()), 5)::integer as most, selling.is_by_deck,
      case when selling.is_by_deck then private.selling_version(campaign.organization_id, at) end as version_id
    from waiting
    join public.campaigns as campaign on campaign.id = waiting.id
    cross join lateral (
      select exists (
        select
        from public.subscriptions as subscription
        join public.plan_price_meters as term on term.plan_price_id = subscription.plan_price_id and term.meter_key = 'rated_calls'
        where subscription.organization_id = campaign.organization_id and subscription.status not in ('cancelled', 'inactive')
      ) as is_by_deck
    ) as selling
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
        as is_dear,
      case when ready.is_by_deck then (private.find_rate(ready.version_id, locked.phone)).price_micros is null else false end as is_unpriced
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
        when seen.is_unpriced then 'no_rate'
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
comment on function private.judge_candidates(timestamptz, integer, uuid[], uuid) is
  'Locks due rows of campaigns that may dial, or of a sole one of them, about a budget of them and as many of each campaign, and judges each by every gate in order.';

create function private.campaign_credit_left(campaign public.campaigns) returns bigint
language plpgsql stable security definer set search_path = '' as $$
begin
  if campaign.credit_cap is null then
    return null;
  end if;
  return campaign.credit_cap - campaign.credit_spent - (
    select coalesce(sum(hold.credit_minor), 0)
    from public.call_logs as log
    join private.call_holds as hold on hold.attempt_id = log.id
    where log.status <> 'ended' and log.organization_id = campaign.organization_id and log.campaign_id = campaign.id
  );
end
$$;
comment on function private.campaign_credit_left(public.campaigns) is
  'What a campaign''s next calls may cost in prepaid credit, beside what is spent and what calls under way may still cost; null is without limit.';

create function private.campaign_obstacle(campaign public.campaigns, at timestamptz) returns text
language plpgsql stable security definer set search_path = '' as $$
begin
  return case
    when not campaign.dialling_enabled then 'campaign_disabled'
    when private.is_broken(campaign.id, at) then 'circuit_open'
    when private.campaign_credit_left(campaign) <= 0 then 'credit_cap'
    else private.dispatch_obstacle(campaign.organization_id, at)
  end;
end
$$;
comment on function private.campaign_obstacle(public.campaigns, timestamptz) is
  'Why nothing at all may be dialled for a campaign now, whatever its own state is; null if something may.';

create function private.spends_too_much(tenant public.organizations, at timestamptz) returns boolean
language plpgsql stable security definer set search_path = '' as $$
begin
  return tenant.max_hourly_cost_micros is not null and (
    select
      coalesce(sum(log.carrier_cost_micros), 0) >= tenant.max_hourly_cost_micros
      or coalesce(bool_or(log.carrier_cost_currency is distinct from tenant.hourly_cost_currency), false)
    from public.call_logs as log
    -- The longest call and the hour.
    where log.organization_id = tenant.id and log.created_at > at - interval '5 hours'
      and log.ended_at > at - interval '1 hour' and log.carrier_cost_micros > 0
  );
end
$$;
comment on function private.spends_too_much(public.organizations, timestamptz) is
  'Whether an organization''s calls of the last hour cost at the carrier what they may, or in a currency that nobody compared.';
revoke all on function private.spends_too_much(public.organizations, timestamptz) from public, anon, authenticated, service_role;

create function private.dispatch_obstacle(organization uuid, at timestamptz) returns text
language plpgsql stable security definer set search_path = '' as $$
begin
  return (
    select
      case
        -- A switch that is not there is off.
        when platform.dialling_enabled is not true then 'platform_disabled'
        when not tenant.dialling_enabled then 'dialling_disabled'
        when not exists (
          select
          from public.subscriptions as subscription
          where subscription.organization_id = tenant.id and subscription.status in ('trialing', 'active', 'past_due')
        ) then 'subscription_inactive'
        when not exists (
          select
          from public.caller_numbers as number
          join public.carrier_accounts as account on account.id = number.carrier_account_id
          where number.organization_id = tenant.id and number.is_active and account.is_active and account.dialling_enabled
        )
        then case
          when exists (
            select from public.caller_numbers as number where number.organization_id = tenant.id and number.is_active
          ) then 'account_disabled'
          else 'no_caller_number'
        end
        when not exists (
          select
          from public.caller_numbers as number
          join public.carrier_accounts as account on account.id = number.carrier_account_id
          where number.organization_id = tenant.id and number.is_active and account.is_active and account.dialling_enabled
            and not private.is_broken(account.id, at)
        ) then 'circuit_open'
        when exists (
          select from private.dispatch_holds as hold where hold.organization_id = tenant.id and hold.held_until > at
        )
        then (select hold.reason from private.dispatch_holds as hold where hold.organization_id = tenant.id)
        when private.spends_too_much(tenant, at)
        then 'spend_ceiling'
        -- All its numbers rest: its leads are left where they are, and none of them is looked at.
        when not exists (
          select
          from public.caller_numbers as number
          join public.carrier_accounts as account on account.id = number.carrier_account_id
          where number.organization_id = tenant.id and number.is_active and account.is_active and account.dialling_enabled
            and not private.is_broken(account.id, at)
            and (number.daily_calls is null or private.caller_number_room(number.phone_number, number.daily_calls, at) > 0)
        )
        then 'caller_number_cap'
      end
    from public.organizations as tenant
    left join private.platform_dialling as platform on platform.single
    where tenant.id = organization
  );
end
$$;
comment on function private.dispatch_obstacle(uuid, timestamptz) is
  'Why nothing at all may be dialled for an organization now; null if something may.';

create function private.close_leads(candidates private.candidate[], at timestamptz) returns void
language plpgsql volatile security definer set search_path = '' as $$
declare
  closed   record;
  campaign public.campaigns;
begin
  update public.call_queue as queue
  set status = 'failed', last_error = candidate.verdict, wait_reason = null
  from unnest(candidates) as candidate
  where queue.id = candidate.queue_id;
  update public.campaign_leads as member
  set
    status = case candidate.verdict when 'opted_out' then 'opted_out' else 'skipped' end::public.campaign_lead_status,
    skip_reason = candidate.verdict,
    opted_out_at = case candidate.verdict when 'opted_out' then at end
  from unnest(candidates) as candidate
  where member.organization_id = candidate.organization_id
    and member.campaign_id = candidate.campaign_id
    and member.lead_id = candidate.lead_id;
  for closed in
    select candidate.campaign_id as id, count(*)::integer as leads
    from unnest(candidates) as candidate
    group by candidate.campaign_id
    order by candidate.campaign_id
  loop
    update public.campaigns as running
    set
      open_leads = running.open_leads - closed.leads,
      status = case when running.open_leads = closed.leads and running.auto_complete then 'completed' else running.status end,
      completed_at = case when running.open_leads = closed.leads and running.auto_complete then at end
    where running.id = closed.id
    returning running.* into campaign;
    if campaign.status = 'completed' then
      perform private.campaign_completed(campaign.organization_id, campaign.id, at);
    end if;
  end loop;
end
$$;
comment on function private.close_leads(private.candidate[], timestamptz) is
  'Ends what may never be dialled: queue rows, leads of the campaign, and the campaign when they were its last.';

create function private.account_tokens(account public.carrier_accounts) returns numeric
language plpgsql volatile security definer set search_path = '' as $$
declare
  pace constant numeric := account.max_calls_per_second;
begin
  if pace is null then
    return null;
  end if;
  return coalesce(
    (
      -- A second's worth at most, and never less than a call: a pause is not made up for by a burst.
      select least(greatest(pace, 1), known.tokens + pace * greatest(extract(epoch from clock_timestamp() - known.refilled_at), 0))
      from private.carrier_pace as known
      where known.carrier_account_id = account.id
    ),
    greatest(pace, 1)
  );
end
$$;
comment on function private.account_tokens(public.carrier_accounts) is
  'How many calls may be begun on an account at this moment of real time; null is any number. The release that asks holds the lock of releases.';

create function private.choose_candidates(candidates private.candidate[], room integer, at timestamptz) returns private.candidate[]
language plpgsql volatile security definer set search_path = '' set jit = off set plan_cache_mode = force_generic_plan set enable_seqscan = off as $$
declare
  chosen private.candidate[];
begin
  with calls as materialized (
    select log.carrier_account_id, log.organization_id, log.campaign_id, count(*) as number
    from public.call_logs as log
    where log.status <> 'ended'
    group by log.carrier_account_id, log.organization_id, log.campaign_id
  ),
  ticket as materialized (
    select tenant.campaign_id, random() as number
    from (select distinct candidate.campaign_id from unnest(candidates) as candidate) as tenant
  ),
  of_number as (
    -- Two rows with one number, met in different looks: one at a time.
    select distinct on ((candidates[place]).callee_number) candidates[place] as candidate, place
    from generate_subscripts(candidates, 1) as place
    order by (candidates[place]).callee_number, place
  ),
  of_kind as (
    select
      (of_number.candidate).*, of_number.candidate,
      row_number() over (
        partition by (of_number.candidate).campaign_id, (of_number.candidate).dial_class order by of_number.place
      ) as kind_place,
      row_number() over (partition by (of_number.candidate).caller_number order by of_number.place) as number_place
    from of_number
  ),
  of_campaign as (
    -- Promised calls, then fresh ones and retries by turns; which of the two is first, is drawn.
    select
      of_kind.*, ticket.number as campaign_ticket,
      row_number() over (
        partition by of_kind.campaign_id
        order by (of_kind.dial_class = 2) desc, of_kind.kind_place, (of_kind.dial_class = 1) = (ticket.number < 0.5) desc
      ) as campaign_place
    from of_kind
    join ticket on ticket.campaign_id = of_kind.campaign_id
    join public.caller_numbers as number on number.phone_number = of_kind.caller_number
    where number.daily_calls is null
      or of_kind.number_place <= private.caller_number_room(number.phone_number, number.daily_calls, at)
  ),
  of_organization as (
    select
      of_campaign.*,
      row_number() over (
        partition by of_campaign.organization_id
        order by (of_campaign.dial_class = 2) desc, of_campaign.campaign_place, of_campaign.campaign_ticket
      ) as organization_place
    from of_campaign
    join public.campaigns as campaign on campaign.id = of_campaign.campaign_id
    left join private.breakers as breaker on breaker.scope = campaign.id and breaker.is_open
    where of_campaign.campaign_place <= coalesce(breaker.is_open::integer, 2147483647)
      and of_campaign.campaign_place <= campaign.max_concurrent_calls
      - coalesce((select sum(calls.number) from calls where calls.campaign_id = of_campaign.campaign_id), 0)
  ),
  with_turn as (
    select
      of_organization.*, own.turn is null as is_new,
      greatest(own.turn, pace.turn, 0)
        + (
          row_number() over (
            partition by of_organization.organization_id, of_organization.carrier_account_id order by of_organization.organization_place
          ) - 1
        )::numeric / organization.dispatch_weight as turn
    from of_organization
    join public.organizations as organization on organization.id = of_organization.organization_id
    left join private.carrier_pace as pace on pace.carrier_account_id = of_organization.carrier_account_id
    left join private.dispatch_turns as own
      on own.organization_id = of_organization.organization_id and own.carrier_account_id = of_organization.carrier_account_id
    where of_organization.organization_place <= organization.max_concurrent_calls
      - coalesce((select sum(calls.number) from calls where calls.organization_id = of_organization.organization_id), 0)
  ),
  of_account as (
    select
      with_turn.candidate, with_turn.carrier_account_id, with_turn.campaign_ticket,
      row_number() over (
        partition by with_turn.carrier_account_id order by with_turn.turn, with_turn.is_new desc, with_turn.campaign_ticket
      ) as account_place
    from with_turn
  ),
  room_left as materialized (
    select
      account.id,
      least(
        least(account.max_concurrent_calls, pace.ceiling)
          - coalesce((select sum(calls.number) from calls where calls.carrier_account_id = account.id), 0),
        floor(private.account_tokens(account)),
        -- One call tries whether a fault is over.
        breaker.is_open::integer
      ) as calls
    from public.carrier_accounts as account
    left join private.carrier_pace as pace on pace.carrier_account_id = account.id
    left join private.breakers as breaker on breaker.scope = account.id and breaker.is_open
    where account.id in (select of_account.carrier_account_id from of_account)
  ),
  first as (
    select of_account.candidate, of_account.account_place, of_account.campaign_ticket
    from of_account
    join room_left on room_left.id = of_account.carrier_account_id
    where of_account.account_place <= room_left.calls
    order by of_account.account_place, of_account.campaign_ticket
    limit room
  )
  select array_agg(first.candidate order by first.account_place, first.campaign_ticket) into chosen from first;
  return coalesce(chosen, array[]::private.candidate[]);
end
$$;
comment on function private.choose_candidates(private.candidate[], integer, timestamptz) is
  'Which candidates have room now: within what their campaign, organization and carrier account may have in flight and the account''s pace, '
  'each organization by its weight.';

create function private.take_turns(attempts uuid[]) returns void
language plpgsql volatile security definer set search_path = '' as $$
begin
  with given as materialized (
    select
      log.carrier_account_id, log.organization_id, count(*) as calls, tenant.dispatch_weight::numeric as weight,
      greatest(own.turn, pace.turn, 0) as turn
    from public.call_logs as log
    join public.organizations as tenant on tenant.id = log.organization_id
    left join private.carrier_pace as pace on pace.carrier_account_id = log.carrier_account_id
    left join private.dispatch_turns as own
      on own.organization_id = log.organization_id and own.carrier_account_id = log.carrier_account_id
    where log.id = any (attempts)
    group by log.carrier_account_id, log.organization_id, tenant.dispatch_weight, own.turn, pace.turn
  ),
  moved as (
    insert into private.dispatch_turns as own (organization_id, carrier_account_id, turn)
    select given.organization_id, given.carrier_account_id, given.turn + given.calls / given.weight
    from given
    on conflict (organization_id, carrier_account_id) do update set turn = excluded.turn
  )
  insert into private.carrier_pace as pace (carrier_account_id, tokens, refilled_at, turn)
  select
    account.id, coalesce(private.account_tokens(account) - sum(given.calls), 0), clock_timestamp(),
    max(given.turn + (given.calls - 1) / given.weight)
  from given
  join public.carrier_accounts as account on account.id = given.carrier_account_id
  group by account.id
  on conflict (carrier_account_id) do update
  set tokens = excluded.tokens, refilled_at = excluded.refilled_at, turn = greatest(pace.turn, excluded.turn);
end
$$;
comment on function private.take_turns(uuid[]) is 'Takes from the pace of carrier accounts, and from the turns of organizations, what new attempts use of them.';

create function private.lock_releases() returns void
language sql volatile set search_path = '' as $$
  select pg_advisory_xact_lock(hashtextextended('trunkline.release_calls', 0))
$$;
comment on function private.lock_releases() is
  'One release at a time: each counts what is in flight and takes what is free. Taken before any row, and by whoever takes rows from it.';

create function private.write_evidence(attempts uuid[], at timestamptz) returns void
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
comment on function private.write_evidence(uuid[], timestamptz) is 'Keeps why new attempts were allowed.';

create function private.get_dial_evidence(phone_number text, at timestamptz) returns jsonb
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
comment on function private.get_dial_evidence(text, timestamptz) is 'Why each call to a number was allowed, for whoever has to show it.';

create function public.get_dial_evidence(phone_number text) returns jsonb
language sql stable security invoker set search_path = '' as $$
  select private.get_dial_evidence(phone_number, private.clock_now())
$$;
comment on function public.get_dial_evidence(text) is
  'Every call of the organization to a number, with consent, register version, zone, earlier dials and caller number as the release saw them. Needs call.view.';

create function private.release_calls(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' set jit = off set enable_seqscan = off as $$
declare
  wanted     constant integer := least(greatest(coalesce((request ->> 'limit')::integer, 100), 1), 500);
  attempts   jsonb;
  candidates private.candidate[];
  able       private.candidate[] := array[]::private.candidate[];
  over       private.candidate[] := array[]::private.candidate[];
  granted    uuid[] := array[]::uuid[];
  limits     integer[] := array[]::integer[];
  holds      private.call_holds[] := array[]::private.call_holds[];
  holding    record;
  waiting    uuid[];
  made       uuid[];
  capped     uuid[];
  kept       integer[];
  room       integer;
  moved      integer := 0;
  given      integer;
  tenant     record;
begin
  perform private.lock_releases();
  perform private.start_scheduled(at);
  perform private.check_breakers(at);

  -- An attempt whose message was lost is offered again, the same one.
  with lapsed as (
    select log.id
    from public.call_logs as log
    where log.status = 'created' and log.lease_until < now() and log.not_after > now()
    order by log.lease_until
    limit wanted
    for no key update skip locked
  ),
  renewed as (
    update public.call_logs as log
    set lease_until = now() + interval '60 seconds'
    from lapsed
    where log.id = lapsed.id
    returning log.id, log.organization_id, log.not_after
  )
  select jsonb_agg(jsonb_build_object('id', renewed.id, 'organization_id', renewed.organization_id, 'not_after', renewed.not_after))
  into attempts
  from renewed;
  attempts := coalesce(attempts, '[]');
  room := wanted - jsonb_array_length(attempts);

  -- Look until there are enough that may be dialled. Who must wait is told why and until when, and steps aside.
  for round in 1..5 loop
    exit when cardinality(able) >= room;
    candidates := private.judge_candidates(
      at, greatest(2 * room, 50), array(select candidate.queue_id from unnest(able || over) as candidate)
    );
    able := able || array(select candidate from unnest(candidates) as candidate where candidate.verdict is null);
    over := over || array(select candidate from unnest(candidates) as candidate where candidate.verdict is not null and candidate.due is null);
    moved := (select count(*) from unnest(candidates) as candidate where candidate.verdict is not null);
    if moved > 0 then
      update public.call_queue as queue
      set next_retry_at = candidate.due, wait_reason = candidate.verdict
      from unnest(candidates) as candidate
      where queue.id = candidate.queue_id and candidate.due is not null;
    end if;
    exit when cardinality(candidates) = 0;
  end loop;
  if cardinality(over) > 0 then
    perform private.close_leads(over, at);
  end if;
  waiting := (select array_agg(distinct candidate.carrier_account_id) from unnest(able) as candidate);
  able := private.choose_candidates(able, room, at);

  -- What the calls may cost last, organization by organization: nothing but wallets is locked after usage counters.
  for tenant in
    select
      (able[place]).organization_id as id, array_agg((able[place]).queue_id order by place) as rows,
      array_agg((able[place]).max_call_seconds order by place) as wanted
    from generate_subscripts(able, 1) as place
    group by (able[place]).organization_id
    order by (able[place]).organization_id
  loop
    holding := private.hold_calls(tenant.id, tenant.wanted, at);
    given := cardinality(holding.limits);
    if given < cardinality(tenant.rows) then
      insert into private.dispatch_holds as hold (organization_id, held_until, reason)
      values (tenant.id, at + interval '5 minutes', holding.reason)
      on conflict (organization_id) do update set held_until = excluded.held_until, reason = excluded.reason;
    end if;
    granted := granted || tenant.rows[:given];
    limits := limits || holding.limits;
    holds := holds || holding.holds;
  end loop;

  -- What the calls of a campaign may cost at most has to fit under its own cap, one after the other.
  capped := array(
    select summed.queue_id
    from (
      select
        candidate.queue_id, candidate.campaign_id,
        sum((holds[place]).credit_minor) over (partition by candidate.campaign_id order by place) as credit_minor
      from generate_subscripts(granted, 1) as place
      join unnest(able) as candidate on candidate.queue_id = granted[place]
    ) as summed
    join public.campaigns as campaign on campaign.id = summed.campaign_id and campaign.credit_cap is not null
    where summed.credit_minor > private.campaign_credit_left(campaign)
  );
  if cardinality(capped) > 0 then
    perform private.give_back_holds(
      array(select holds[place] from generate_subscripts(granted, 1) as place where granted[place] = any (capped)), at
    );
    update public.call_queue as queue
    set next_retry_at = private.whole_minute(at + interval '15 minutes'), wait_reason = 'credit_cap'
    where queue.id = any (capped);
    kept := array(select place from generate_subscripts(granted, 1) as place where granted[place] <> all (capped) order by place);
    limits := array(select limits[place] from unnest(kept) with ordinality as keep (place, nth) order by keep.nth);
    holds := array(select holds[place] from unnest(kept) with ordinality as keep (place, nth) order by keep.nth);
    granted := array(select granted[place] from unnest(kept) with ordinality as keep (place, nth) order by keep.nth);
  end if;

  with attempt as (
    insert into public.call_logs (
      organization_id, campaign_id, lead_id, project_id, queue_id, attempt_no, carrier_account_id, caller_number, callee_number,
      agent_id, record_call, ring_timeout_seconds, time_limit_seconds, created_at, lease_until, not_after
    )
    select
      candidate.organization_id, candidate.campaign_id, candidate.lead_id, candidate.project_id, candidate.queue_id,
      candidate.attempt_no, candidate.carrier_account_id, candidate.caller_number, candidate.callee_number, candidate.agent_id,
      candidate.record_call, candidate.ring_timeout_seconds, allowed.seconds, at,
      now() + interval '60 seconds', now() + least(interval '10 minutes', candidate.closes_at - at)
    from unnest(able) as candidate
    join unnest(granted, limits) as allowed (queue_id, seconds) on allowed.queue_id = candidate.queue_id
    on conflict (callee_number) where direction = 'outbound' and status <> 'ended' do nothing
    returning id, organization_id, campaign_id, lead_id, queue_id, not_after
  ),
  held as (
    insert into private.call_holds (attempt_id, organization_id, seconds, credit_seconds, is_beyond, currency, credit_minor)
    select attempt.id, hold.organization_id, hold.seconds, hold.credit_seconds, hold.is_beyond, hold.currency, hold.credit_minor
    from generate_subscripts(granted, 1) as place
    join attempt on attempt.queue_id = granted[place]
    cross join lateral (select (holds[place]).*) as hold
  ),
  taken as (
    update public.call_queue as queue
    set status = 'processing', dispatch_count = queue.dispatch_count + 1, wait_reason = null
    from attempt
    where queue.id = attempt.queue_id
  ),
  calling as (
    update public.campaign_leads as member
    set status = 'calling'
    from attempt
    where member.organization_id = attempt.organization_id
      and member.campaign_id = attempt.campaign_id
      and member.lead_id = attempt.lead_id
  )
  select
    attempts || coalesce(
      jsonb_agg(jsonb_build_object('id', attempt.id, 'organization_id', attempt.organization_id, 'not_after', attempt.not_after)), '[]'
    ),
    count(*), array_agg(attempt.id)
  into attempts, given, made
  from attempt;
  if given > 0 then
    perform private.take_turns(made);
    perform private.write_evidence(made, at);
  end if;
  if given < cardinality(granted) then
    -- Somebody else began to call the number meanwhile: what was held for this row goes back.
    perform private.give_back_holds(
      array(
        select holds[place]
        from generate_subscripts(granted, 1) as place
        join public.call_queue as queue on queue.id = granted[place]
        where queue.status = 'queued'
      ),
      at
    );
  end if;

  -- Full hands, or rows that stepped aside in the last look: another one would find more.
  return jsonb_strip_nulls(jsonb_build_object(
    'attempts', attempts,
    'more', jsonb_array_length(attempts) >= wanted or moved > 0,
    -- Something waits for nothing but the pace of its account: in a second there is as much again.
    'paced', exists (
      select
      from public.carrier_accounts as account
      where account.id = any (waiting) and private.account_tokens(account) < 1
    )
  ));
end
$$;
comment on function private.release_calls(jsonb, timestamptz) is
  'Makes attempts of due queue rows, fairly over organizations, through every gate and within every limit, and offers lost ones again.';

create function public.release_calls(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.release_calls($1, private.clock_now())
$$;
comment on function public.release_calls(jsonb) is
  '{"v":1,"limit":100} -> {"attempts":[{"id","organization_id","not_after"}],"more":bool,"paced":bool}. Ask again while more is true, and in a '
  'second when paced is.';


-- begin_dials ---------------------------------------------------------------------------------------------------------------------

create function private.begin_dials(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' set jit = off set enable_seqscan = off as $$
declare
  asked   uuid[] := array(select distinct item.value::uuid from jsonb_array_elements_text(request -> 'attempts') as item (value));
  token   uuid := (request ->> 'lease_token')::uuid;
  shut    jsonb;
  attempt public.call_logs;
  reason  text;
  dials   jsonb;
  skipped jsonb;
begin
  if token is null or cardinality(asked) = 0 then
    perform private.raise_error(400, 'malformed_request', 'lease_token and attempts are required');
  end if;
  perform from public.call_logs as log where log.id = any (asked) order by log.id for no key update;

  -- Every gate that can have closed since the release, once more, at the last moment.
  select jsonb_object_agg(gate.id, gate.reason) into shut
  from (
    select
      log.id,
      case
        when log.not_after <= now() then 'expired'
        when not account.is_active or not account.dialling_enabled then 'account_disabled'
        when platform.dialling_enabled is not true then 'platform_disabled'
        when not organization.dialling_enabled then 'dialling_disabled'
        when private.has_tripped(log.carrier_account_id, at) or private.has_tripped(log.campaign_id, at) then 'circuit_open'
        when not campaign.dialling_enabled then 'campaign_disabled'
        -- A single call is made whether its campaign runs or not.
        when log.queue_id is not null and campaign.status <> 'running' then 'campaign_' || campaign.status
        when lead.do_not_call or private.is_suppressed(log.organization_id, log.callee_number) then 'opted_out'
        when lead.abuse_flag then 'abuse'
        when lead.archived_at is not null then 'archived'
        when lead.phone is distinct from log.callee_number then 'number_changed'
        when private.lacks_consent(
          log.organization_id, log.callee_number, (private.destination(log.callee_number, null)).country, campaign.purpose, at
        )
        then 'no_consent'
      end as reason
    from public.call_logs as log
    left join private.platform_dialling as platform on platform.single
    join public.organizations as organization on organization.id = log.organization_id
    join public.carrier_accounts as account on account.id = log.carrier_account_id
    join public.campaigns as campaign on campaign.organization_id = log.organization_id and campaign.id = log.campaign_id
    join public.leads as lead on lead.organization_id = log.organization_id and lead.id = log.lead_id
    where log.id = any (asked) and log.status = 'created'
  ) as gate
  where gate.reason is not null;

  if shut is not null then
    perform private.lock_attempts(array(select closed.key::uuid from jsonb_object_keys(shut) as closed (key)));
    for attempt in
      select log.*
      from public.call_logs as log
      where log.id::text = any (array(select jsonb_object_keys(shut))) and log.id = any (asked)
      order by log.organization_id, log.id
    loop
      reason := shut ->> attempt.id::text;
      perform private.end_attempt(
        attempt,
        case reason when 'expired' then 'expired' else 'cancelled' end::public.call_outcome,
        at,
        due := case
          when reason in ('platform_disabled', 'dialling_disabled', 'account_disabled', 'circuit_open') then at + interval '1 minute'
          when reason = 'number_changed' or reason like 'campaign%' then at
        end,
        closing := case
          when reason = 'opted_out' then 'opted_out'
          when reason in ('abuse', 'archived', 'no_consent') then 'skipped'
        end::public.campaign_lead_status,
        reason := reason
      );
    end loop;
  end if;

  update public.call_logs as log
  set
    status = 'submitting', dialled = true, submitted_at = greatest(at, log.created_at), begun_at = now(),
    lease_token = token, lease_until = now() + interval '60 seconds'
  where log.id = any (asked) and log.status = 'created';

  -- Also those that this very caller began before, when the answer was lost on the way.
  select
    coalesce(
      jsonb_agg(
        jsonb_build_object(
          'attempt_id', log.id,
          'organization_id', log.organization_id,
          'provider', account.provider,
          'carrier_account_id', account.id,
          'account_sid', account.account_sid,
          'credentials_sealed', account.credentials_sealed,
          'api_base', account.api_base,
          'from', log.caller_number,
          'to', log.callee_number,
          'ring_timeout_seconds', log.ring_timeout_seconds,
          'time_limit_seconds', log.time_limit_seconds,
          'record', log.record_call,
          'agent_id', log.agent_id,
          'not_after', floor(extract(epoch from log.not_after))::bigint
        )
      ) filter (where log.lease_token = token and log.status = 'submitting' and log.lease_until > now() and log.not_after > now()),
      '[]'
    )
  into dials
  from public.call_logs as log
  join public.carrier_accounts as account on account.id = log.carrier_account_id
  where log.id = any (asked);

  select coalesce(
    jsonb_agg(
      jsonb_build_object(
        'attempt_id', wanted.id,
        'reason', coalesce(
          shut ->> wanted.id::text,
          case when log.id is null then 'unknown_attempt' when log.status = 'ended' then 'ended' else 'already_begun' end
        )
      )
    ),
    '[]'
  )
  into skipped
  from unnest(asked) as wanted (id)
  left join public.call_logs as log on log.id = wanted.id
  where not jsonb_path_exists(dials, '$[*] ? (@.attempt_id == $id)', jsonb_build_object('id', wanted.id));
  return jsonb_build_object('dials', dials, 'skipped', skipped);
end
$$;
comment on function private.begin_dials(jsonb, timestamptz) is
  'Moves attempts from created to submitting, each once and only once, and says how to dial them. Whoever gets a dial here makes the one request there is.';

create function public.begin_dials(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.begin_dials($1, private.clock_now())
$$;
comment on function public.begin_dials(jsonb) is
  '{"v":1,"lease_token":uuid,"attempts":[uuid]} -> {"dials":[{"attempt_id",…,"not_after":unix seconds}],"skipped":[{"attempt_id","reason"}]}.';


-- record_dials --------------------------------------------------------------------------------------------------------------------

create function private.record_dials(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' set jit = off set enable_seqscan = off as $$
declare
  known    constant text[] := array['accepted', 'refused', 'deferred', 'unknown'];
  item     jsonb;
  attempt  public.call_logs;
  call_id  text;
  result   text;
  refusal  public.call_outcome;
  recorded integer := 0;
begin
  perform
  from public.call_logs as log
  where log.id in (select (dial.value ->> 'attempt_id')::uuid from jsonb_array_elements(request -> 'results') as dial (value))
  order by log.id
  for no key update;
  perform private.lock_attempts(array(
    select (dial.value ->> 'attempt_id')::uuid
    from jsonb_array_elements(request -> 'results') as dial (value)
    where dial.value ->> 'outcome' in ('refused', 'deferred')
  ));

  for item in
    select dial.value
    from jsonb_array_elements(request -> 'results') as dial (value)
    join public.call_logs as log on log.id = (dial.value ->> 'attempt_id')::uuid
    order by log.organization_id, log.id
  loop
    result := item ->> 'outcome';
    call_id := item ->> 'provider_call_id';
    if result is null or result <> all (known) then
      perform private.raise_error(400, 'malformed_request', format('There is no dial outcome %L', result), 'outcome');
    end if;
    select log.* into attempt from public.call_logs as log where log.id = (item ->> 'attempt_id')::uuid;

    -- A callback may have been faster: what it said stands.
    if result = 'accepted' then
      if attempt.call_sid <> call_id then
        perform private.raise_alarm(
          attempt, 'duplicate_dial', jsonb_build_object('provider_call_id', call_id, 'bound_to', attempt.call_sid), at
        );
      elsif exists (select from public.call_logs as other where other.call_sid = call_id and other.id <> attempt.id) then
        perform private.raise_alarm(attempt, 'call_id_reused', jsonb_build_object('provider_call_id', call_id), at);
      else
        attempt.call_sid := coalesce(attempt.call_sid, call_id);
      end if;
      if attempt.status in ('submitting', 'submission_unknown') then
        attempt.status := 'queued';
        attempt.lease_until := now() + make_interval(secs => attempt.ring_timeout_seconds + 60);
      end if;
      perform private.write_attempt(attempt);
      recorded := recorded + 1;
    elsif attempt.status not in ('submitting', 'submission_unknown') then
      continue;
    elsif result = 'unknown' then
      -- It may be ringing: the attempt keeps its place until the carrier has been asked.
      attempt.status := 'submission_unknown';
      attempt.lease_until := now() + interval '60 seconds';
      attempt.refusal_reason := item ->> 'reason';
      perform private.write_attempt(attempt);
      recorded := recorded + 1;
    else
      -- Proved not dialled.
      attempt.dialled := false;
      attempt.hangup_cause_code := coalesce(attempt.hangup_cause_code, item ->> 'code');
      if result = 'deferred' then
        perform private.end_attempt(
          attempt, 'capacity', at,
          due := at + make_interval(secs => least(greatest(coalesce((item ->> 'retry_after_seconds')::integer, 60), 1), 86400)),
          reason := 'capacity'
        );
      else
        refusal := case
          when item ->> 'reason' = any (enum_range(null::public.call_outcome)::text[])
            and item ->> 'reason' not in ('answered', 'machine', 'lost', 'expired')
          then item ->> 'reason'
          else 'failed'
        end::public.call_outcome;
        perform private.end_attempt(attempt, refusal, at);
      end if;
      recorded := recorded + 1;
    end if;
  end loop;
  return jsonb_build_object('recorded', recorded);
end
$$;
comment on function private.record_dials(jsonb, timestamptz) is
  'What came of the requests to the carrier: accepted, refused or deferred (both proved not dialled), or unknown, which keeps the attempt for the reconciler.';

create function public.record_dials(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.record_dials($1, private.clock_now())
$$;
comment on function public.record_dials(jsonb) is
  '{"v":1,"results":[{"attempt_id","outcome":"accepted|refused|deferred|unknown","provider_call_id"?,"reason"?,"code"?,"retry_after_seconds"?}]} '
  '-> {"recorded":n}.';


-- reconcile_calls -----------------------------------------------------------------------------------------------------------------

create function private.reconcile_calls(request jsonb, at timestamptz) returns jsonb
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
comment on function private.reconcile_calls(jsonb, timestamptz) is
  'Claims for a minute the attempts that nobody has moved on in time, for the carrier to be asked. None of them is ever dialled again. '
  'Also ends those that were never begun and may not be any more, forgets the sockets that nobody has heard of, and has the carrier asked for the '
  'seconds of ended calls that nobody has told.';

create function public.reconcile_calls(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.reconcile_calls($1, private.clock_now())
$$;
comment on function public.reconcile_calls(jsonb) is
  '{"v":1,"limit":50} -> {"attempts":[{"attempt_id",…,"provider_call_id"|null,"from","to","status","age_seconds","others"}],"agentless":[{"organization_id",'
  '"attempt_id"}]}; the age is real, since it was begun.';


-- The carrier's records of a day --------------------------------------------------------------------------------------------------

create function private.claim_carrier_check(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  -- Until four in the morning carriers still add to what was.
  yesterday constant date := ((now() - interval '4 hours') at time zone 'UTC')::date - 1;
  claimed   jsonb;
begin
  insert into private.carrier_checks (carrier_account_id, day)
  select account.id, yesterday
  from public.carrier_accounts as account
  where account.is_active and account.created_at < at
  on conflict do nothing;
  with due as (
    select waiting.carrier_account_id, waiting.day
    from private.carrier_checks as waiting
    where waiting.finished_at is null and waiting.day > yesterday - 7 and (waiting.lease_until is null or waiting.lease_until < now())
    order by waiting.day, waiting.carrier_account_id
    limit 1
    for no key update skip locked
  ),
  taken as (
    update private.carrier_checks as own
    set lease_until = now() + interval '5 minutes'
    from due
    where own.carrier_account_id = due.carrier_account_id and own.day = due.day
    returning own.*
  )
  select jsonb_build_object(
    'day', taken.day, 'next_page', taken.next_page, 'provider', account.provider, 'carrier_account_id', account.id,
    'account_sid', account.account_sid, 'credentials_sealed', account.credentials_sealed, 'api_base', account.api_base
  )
  into claimed
  from taken
  join public.carrier_accounts as account on account.id = taken.carrier_account_id;
  return claimed;
end
$$;
comment on function private.claim_carrier_check(jsonb, timestamptz) is
  'Gives out one account whose records of a day are to be fetched, or to be gone on with, for five minutes: yesterday''s, and for a week what failed.';

create function public.claim_carrier_check(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.claim_carrier_check($1, private.clock_now())
$$;
comment on function public.claim_carrier_check(jsonb) is
  '{"v":1} -> {"day","next_page","provider","carrier_account_id","account_sid","credentials_sealed","api_base"}, or null when nothing is due.';

create function private.store_carrier_records(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  account constant uuid := (request ->> 'carrier_account_id')::uuid;
  checked constant date := (request ->> 'day')::date;
begin
  perform
  from private.carrier_checks as own
  where own.carrier_account_id = account and own.day = checked and own.finished_at is null
  for no key update;
  if not found then
    return jsonb_build_object('done', true, 'differences', 0, 'corrected', 0);
  end if;
  insert into private.carrier_records (carrier_account_id, day, provider_call_id, started_at, bill_duration_seconds, cost_micros, cost_currency)
  select distinct on (told.provider_call_id)
    account, checked, told.provider_call_id, told.started_at, told.bill_duration_seconds, told.cost_micros, told.cost_currency
  from jsonb_to_recordset(coalesce(request -> 'records', '[]')) as told (
    provider_call_id text, started_at timestamptz, bill_duration_seconds integer, cost_micros bigint, cost_currency text
  )
  where told.provider_call_id <> ''
  on conflict (carrier_account_id, day, provider_call_id) do update
  set
    started_at = excluded.started_at, bill_duration_seconds = excluded.bill_duration_seconds, cost_micros = excluded.cost_micros,
    cost_currency = excluded.cost_currency;
  if request ->> 'next_page' is not null then
    update private.carrier_checks as own
    set next_page = request ->> 'next_page', pages = own.pages + 1, lease_until = now() + interval '5 minutes'
    where own.carrier_account_id = account and own.day = checked;
    return jsonb_build_object('done', false);
  end if;
  return private.compare_carrier_records(account, checked, at) || '{"done": true}';
end
$$;
comment on function private.store_carrier_records(jsonb, timestamptz) is
  'Keeps a page of a carrier''s records; with the last one compares the day. A page that comes again changes nothing.';

create function public.store_carrier_records(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.store_carrier_records($1, private.clock_now())
$$;
comment on function public.store_carrier_records(jsonb) is
  '{"v":1,"carrier_account_id","day","records":[{"provider_call_id","started_at","bill_duration_seconds","cost_micros","cost_currency"}],'
  '"next_page":text|null} -> {"done":false} or {"done":true,"differences":n,"corrected":n}.';

create function private.compare_carrier_records(account uuid, checked date, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  opens  constant timestamptz := checked::timestamp at time zone 'UTC';
  closes constant timestamptz := (checked + 1)::timestamp at time zone 'UTC';
  attempt public.call_logs;
  amended public.call_logs;
  theirs  private.carrier_records;
  found_  integer;
  corrected integer := 0;
begin
  insert into private.carrier_differences (
    carrier_account_id, day, kind, provider_call_id, attempt_id, organization_id, our_seconds, their_seconds, our_cost_micros, their_cost_micros,
    cost_currency, found_at
  )
  -- Records of the hours before and after are there for attempts at the edges of the day, and are judged with their own day.
  select
    account, checked, told.kind, record.provider_call_id, log.id, log.organization_id, log.bill_duration_seconds, record.bill_duration_seconds,
    log.carrier_cost_micros, record.cost_micros, record.cost_currency, at
  from private.carrier_records as record
  left join public.call_logs as log on log.call_sid = record.provider_call_id and log.carrier_account_id = account
  cross join lateral (
    select 'call_without_attempt' as kind
    where log.id is null and not exists (
      select from public.call_logs as leg where leg.transfer_sid = record.provider_call_id
    )
    union all
    select 'other_seconds'
    where log.status = 'ended' and record.bill_duration_seconds <> coalesce(log.bill_duration_seconds, 0)
    union all
    select 'other_cost'
    where log.status = 'ended' and record.cost_micros is not null
      and (record.cost_micros, record.cost_currency) is distinct from (log.carrier_cost_micros, log.carrier_cost_currency)
  ) as told
  where record.carrier_account_id = account and record.day = checked
    and (record.started_at is null or record.started_at >= opens and record.started_at < closes)
  union all
  select
    account, checked, 'attempt_without_record', log.call_sid, log.id, log.organization_id, log.bill_duration_seconds, null,
    log.carrier_cost_micros, null, log.carrier_cost_currency, at
  from public.call_logs as log
  where log.carrier_account_id = account and log.direction = 'outbound' and log.dialled and log.status = 'ended'
    and log.begun_at >= opens and log.begun_at < closes
    -- What was lost was looked for already, and not found.
    and (log.call_sid is not null or log.call_status <> 'lost')
    and not exists (
      select
      from private.carrier_records as record
      where record.carrier_account_id = account and record.day = checked and record.provider_call_id = log.call_sid
    );
  get diagnostics found_ = row_count;

  perform private.lock_attempts(array(
    select distinct differing.attempt_id
    from private.carrier_differences as differing
    where differing.carrier_account_id = account and differing.day = checked and differing.kind in ('other_seconds', 'other_cost')
  ));
  for attempt in
    select log.*
    from public.call_logs as log
    where log.id in (
      select differing.attempt_id
      from private.carrier_differences as differing
      where differing.carrier_account_id = account and differing.day = checked and differing.kind in ('other_seconds', 'other_cost')
    )
    order by log.organization_id, log.id
  loop
    select own.* into theirs
    from private.carrier_records as own
    where own.carrier_account_id = account and own.day = checked and own.provider_call_id = attempt.call_sid;
    amended := attempt;
    amended.bill_duration_seconds := coalesce(theirs.bill_duration_seconds, attempt.bill_duration_seconds);
    if theirs.cost_micros is not null then
      amended.carrier_cost_micros := theirs.cost_micros;
      amended.carrier_cost_currency := theirs.cost_currency;
    end if;
    if private.amend_attempt(attempt, amended, null, at) then
      corrected := corrected + 1;
    end if;
  end loop;
  update private.carrier_differences as differing
  set is_corrected = true
  where differing.carrier_account_id = account and differing.day = checked and differing.kind in ('other_seconds', 'other_cost');

  insert into private.outbox (organization_id, topic, key, payload, created_at)
  select
    differing.organization_id, 'alarm.carrier_records_differ', concat_ws(' ', account, checked, differing.organization_id),
    jsonb_build_object('carrier_account_id', account, 'day', checked, 'differences', count(*)), at
  from private.carrier_differences as differing
  where differing.carrier_account_id = account and differing.day = checked and differing.organization_id is not null
  group by differing.organization_id
  on conflict do nothing;
  delete from private.carrier_records as own where own.carrier_account_id = account and own.day = checked;
  update private.carrier_checks as own
  set finished_at = now(), lease_until = null, next_page = null, differences = found_
  where own.carrier_account_id = account and own.day = checked;
  return jsonb_build_object('differences', found_, 'corrected', corrected);
end
$$;
comment on function private.compare_carrier_records(uuid, date, timestamptz) is
  'Compares a day''s records with our attempts in one statement; every difference becomes a row, other seconds and costs are corrected at the price of the call.';


-- What a user does with a campaign ------------------------------------------------------------------------------------------------

create function private.campaign_json(campaign_id uuid, at timestamptz) returns jsonb
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

create function private.claim_campaign(campaign_id uuid, permission text) returns public.campaigns
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.require_org(permission);
  campaign     public.campaigns;
begin
  select mine.* into campaign
  from public.campaigns as mine
  where mine.organization_id = organization and mine.id = claim_campaign.campaign_id
  for no key update;
  if campaign.id is null then
    perform private.raise_error(404, 'campaign_not_found', 'There is no such campaign', 'campaign_id');
  end if;
  return campaign;
end
$$;
comment on function private.claim_campaign(uuid, text) is
  'Locks a campaign of the request''s user, who has to hold the permission; else ends the request with 401, 403 or 404.';

create function private.get_campaign(campaign_id uuid, at timestamptz) returns jsonb
language plpgsql stable security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('campaign.view');
begin
  if not exists (
    select
    from public.campaigns as mine
    where mine.organization_id = organization and mine.id = get_campaign.campaign_id
  ) then
    perform private.raise_error(404, 'campaign_not_found', 'There is no such campaign', 'campaign_id');
  end if;
  return private.campaign_json(campaign_id, at);
end
$$;
comment on function private.get_campaign(uuid, timestamptz) is 'One campaign of the caller''s organization.';

create function public.get_campaign(campaign_id uuid) returns jsonb
language sql stable security invoker set search_path = '' as $$
  select private.get_campaign(campaign_id, private.clock_now())
$$;
comment on function public.get_campaign(uuid) is
  'A campaign: {"id","name","status",…,"counts":{state:n},"waiting":{reason:n},"skipped":{reason:n},"next_due_at"}. Needs campaign.view.';

create function private.create_campaign(name text, project_id uuid, settings jsonb, at timestamptz) returns jsonb
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

create function private.enrol_leads(campaign public.campaigns, enrolled_by uuid, at timestamptz) returns integer
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

create function public.create_campaign(name text, project_id uuid default null, settings jsonb default '{}') returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.create_campaign(name, project_id, settings, private.clock_now())
$$;
comment on function public.create_campaign(text, uuid, jsonb) is
  'Drafts a campaign. settings: timezone, start_date, end_date, time_start, time_end, max_concurrent_calls, max_attempts, record_calls, '
  'agent_id, auto_complete, description, purpose, retry_rules, credit_cap, leads ({"lead_ids","stage_ids","assigned_to","statuses","sources",'
  '"min_score","never_called"}: which of the project''s). Needs campaign.edit; returns the campaign as get_campaign() does.';

create function private.check_startable(campaign public.campaigns, at timestamptz) returns void
language plpgsql volatile security definer set search_path = '' as $$
declare
  obstacle constant text := private.dispatch_obstacle(campaign.organization_id, at);
begin
  if obstacle = 'subscription_inactive' then
    perform private.raise_error(402, obstacle, 'The organization has no active subscription');
  elsif obstacle in ('no_caller_number', 'account_disabled') then
    perform private.raise_error(422, 'no_caller_number', 'The organization has no number to call from');
  elsif obstacle = 'dialling_disabled' then
    perform private.raise_error(422, obstacle, 'Dialling is disabled for the organization');
  end if;
  if (private.calling_window(at, campaign.timezone, campaign.time_start, campaign.time_end, campaign.start_date, campaign.end_date)).opens_at
    is null
  then
    perform private.raise_error(
      422, 'window_never_opens', 'Nothing is left of the calling window between 09:00 and 21:00 and the campaign''s dates', 'time_start'
    );
  end if;
end
$$;
comment on function private.check_startable(public.campaigns, timestamptz) is
  'Refuses a campaign that could call nobody whatever its leads are.';

create function private.queue_campaign(campaign public.campaigns, at timestamptz) returns integer
language plpgsql volatile security definer set search_path = '' as $$
declare
  queued integer;
begin
  if campaign.total_enrolled = 0 then
    perform private.enrol_leads(campaign, private.acting_user_id(), at);
  end if;
  insert into public.call_queue (organization_id, campaign_id, lead_id, next_retry_at, max_attempts, created_at, updated_at)
  select member.organization_id, member.campaign_id, member.lead_id, at, campaign.max_attempts, at, at
  from public.campaign_leads as member
  where member.organization_id = campaign.organization_id and member.campaign_id = campaign.id and member.status = 'enrolled'
  on conflict do nothing;
  update public.campaign_leads as member
  set status = 'queued'
  where member.organization_id = campaign.organization_id and member.campaign_id = campaign.id and member.status = 'enrolled';
  -- With those that a restored campaign had left, or that it queued when it was scheduled.
  select count(*) into queued
  from public.call_queue as queue
  where queue.organization_id = campaign.organization_id and queue.campaign_id = campaign.id and queue.status = 'queued';
  if queued = 0 then
    perform private.raise_error(422, 'no_leads', 'The campaign has no lead to call');
  end if;
  return queued;
end
$$;
comment on function private.queue_campaign(public.campaigns, timestamptz) is
  'Queues every enrolled lead of a locked campaign; returns how many wait, and refuses when nobody does.';

create function private.start_campaign(campaign_id uuid, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  campaign public.campaigns := private.claim_campaign(campaign_id, 'campaign.run');
  queued   integer;
begin
  if campaign.status not in ('draft', 'scheduled') then
    perform private.raise_error(
      409, 'invalid_transition', format('A campaign that is %s cannot be started', campaign.status), 'status'
    );
  end if;
  perform private.check_startable(campaign, at);
  queued := private.queue_campaign(campaign, at);
  update public.campaigns as mine set status = 'running', started_at = at where mine.id = campaign.id;
  perform private.audit(campaign.organization_id, 'campaign.started', 'campaign', campaign.id, jsonb_build_object('queued', queued), at);
  return private.campaign_json(campaign.id, at);
end
$$;
comment on function private.start_campaign(uuid, timestamptz) is 'Queues every enrolled lead and lets the campaign run.';

create function private.schedule_campaign(campaign_id uuid, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  campaign public.campaigns := private.claim_campaign(campaign_id, 'campaign.run');
  queued   integer;
begin
  if campaign.status <> 'draft' then
    perform private.raise_error(
      409, 'invalid_transition', format('A campaign that is %s cannot be scheduled', campaign.status), 'status'
    );
  end if;
  if campaign.start_date is null or campaign.start_date <= (at at time zone campaign.timezone)::date then
    perform private.raise_error(422, 'invalid_setting', 'A campaign is scheduled for a start_date that is to come', 'start_date');
  end if;
  perform private.check_startable(campaign, at);
  queued := private.queue_campaign(campaign, at);
  update public.campaigns as mine set status = 'scheduled' where mine.id = campaign.id;
  perform private.audit(
    campaign.organization_id, 'campaign.scheduled', 'campaign', campaign.id,
    jsonb_build_object('queued', queued, 'start_date', campaign.start_date), at
  );
  return private.campaign_json(campaign.id, at);
end
$$;
comment on function private.schedule_campaign(uuid, timestamptz) is
  'Queues every enrolled lead now, so that the campaign need only be let run on its start date.';

create function public.schedule_campaign(campaign_id uuid) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.schedule_campaign(campaign_id, private.clock_now())
$$;
comment on function public.schedule_campaign(uuid) is
  'Lets a draft start by itself on its start_date, in its own time zone; 409 when it is no draft, else refused as start_campaign() is. Needs campaign.run.';

create function private.start_scheduled(at timestamptz) returns integer
language plpgsql volatile security definer set search_path = '' as $$
declare
  campaign public.campaigns;
  started  integer := 0;
begin
  for campaign in
    select due.*
    from public.campaigns as due
    where due.status = 'scheduled' and due.start_date <= (at at time zone due.timezone)::date
    order by due.id
    for no key update skip locked
  loop
    update public.campaigns as mine set status = 'running', started_at = at where mine.id = campaign.id;
    perform private.audit(
      campaign.organization_id, 'campaign.started', 'campaign', campaign.id, jsonb_build_object('start_date', campaign.start_date), at
    );
    started := started + 1;
  end loop;
  return started;
end
$$;
comment on function private.start_scheduled(timestamptz) is
  'Lets scheduled campaigns run whose start date has come; what stands in their way is told as of any that runs. Part of every release.';

create function public.start_campaign(campaign_id uuid) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.start_campaign(campaign_id, private.clock_now())
$$;
comment on function public.start_campaign(uuid) is 'Starts a draft; 409 when it is not one, 402 without a subscription, 422 when nothing could be dialled. Needs campaign.run.';

create function private.pause_campaign(campaign_id uuid, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  campaign public.campaigns := private.claim_campaign(campaign_id, 'campaign.run');
begin
  if campaign.status <> 'running' then
    perform private.raise_error(
      409, 'invalid_transition', format('A campaign that is %s cannot be paused', campaign.status), 'status'
    );
  end if;
  update public.campaigns as mine set status = 'paused', paused_at = at, pause_reason = null where mine.id = campaign.id;
  perform private.audit(campaign.organization_id, 'campaign.paused', 'campaign', campaign.id, '{}', at);
  return private.campaign_json(campaign.id, at);
end
$$;
comment on function private.pause_campaign(uuid, timestamptz) is 'Nothing more is begun; calls under way go on to their end.';

create function public.pause_campaign(campaign_id uuid) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.pause_campaign(campaign_id, private.clock_now())
$$;
comment on function public.pause_campaign(uuid) is 'Pauses a running campaign; 409 when it is not running. Needs campaign.run.';

create function private.resume_campaign(campaign_id uuid, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  campaign public.campaigns := private.claim_campaign(campaign_id, 'campaign.run');
begin
  if campaign.status <> 'paused' then
    perform private.raise_error(
      409, 'invalid_transition', format('A campaign that is %s cannot be resumed', campaign.status), 'status'
    );
  end if;
  if private.dispatch_obstacle(campaign.organization_id, at) = 'subscription_inactive' then
    perform private.raise_error(402, 'subscription_inactive', 'The organization has no active subscription');
  end if;
  update public.campaigns as mine set status = 'running', paused_at = null, pause_reason = null where mine.id = campaign.id;
  perform private.audit(campaign.organization_id, 'campaign.resumed', 'campaign', campaign.id, '{}', at);
  return private.campaign_json(campaign.id, at);
end
$$;
comment on function private.resume_campaign(uuid, timestamptz) is 'A paused campaign runs again.';

create function public.resume_campaign(campaign_id uuid) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.resume_campaign(campaign_id, private.clock_now())
$$;
comment on function public.resume_campaign(uuid) is 'Resumes a paused campaign; 409 when it is not paused. Needs campaign.run.';

create function private.cancel_campaign(campaign_id uuid, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('campaign.run');
  campaign     public.campaigns;
  skipped      integer;
begin
  -- Queue rows and leads before the campaign, as whoever ends a call locks them; and while no release holds any.
  perform private.lock_releases();
  perform
  from public.call_queue as queue
  where queue.organization_id = organization and queue.campaign_id = cancel_campaign.campaign_id and queue.status = 'queued'
  order by queue.id
  for no key update;
  perform
  from public.campaign_leads as member
  where member.organization_id = organization
    and member.campaign_id = cancel_campaign.campaign_id
    and member.status in ('enrolled', 'queued')
  order by member.id
  for no key update;
  campaign := private.claim_campaign(campaign_id, 'campaign.run');
  if campaign.status not in ('draft', 'scheduled', 'running', 'paused') then
    perform private.raise_error(
      409, 'invalid_transition', format('A campaign that is %s cannot be cancelled', campaign.status), 'status'
    );
  end if;

  update public.call_queue as queue
  set status = 'failed', last_error = 'campaign_cancelled', wait_reason = null
  where queue.organization_id = organization and queue.campaign_id = campaign.id and queue.status = 'queued';
  update public.campaign_leads as member
  set status = 'skipped', skip_reason = 'campaign_cancelled'
  where member.organization_id = organization and member.campaign_id = campaign.id and member.status in ('enrolled', 'queued');
  get diagnostics skipped = row_count;
  update public.campaigns as mine
  set status = 'cancelled', cancelled_at = at, open_leads = mine.open_leads - skipped
  where mine.id = campaign.id;
  perform private.audit(
    organization, 'campaign.cancelled', 'campaign', campaign.id, jsonb_build_object('skipped', skipped), at
  );
  return private.campaign_json(campaign.id, at);
end
$$;
comment on function private.cancel_campaign(uuid, timestamptz) is
  'Nobody who waits is called any more; calls under way go on to their end, and then are not tried again.';

create function public.cancel_campaign(campaign_id uuid) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.cancel_campaign(campaign_id, private.clock_now())
$$;
comment on function public.cancel_campaign(uuid) is 'Cancels a campaign that is not over; 409 when it is. Needs campaign.run.';

create function private.complete_campaign(campaign_id uuid, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('campaign.run');
  campaign     public.campaigns;
  skipped      integer;
begin
  perform private.lock_releases();
  perform
  from public.call_queue as queue
  where queue.organization_id = organization and queue.campaign_id = complete_campaign.campaign_id and queue.status = 'queued'
  order by queue.id
  for no key update;
  perform
  from public.campaign_leads as member
  where member.organization_id = organization
    and member.campaign_id = complete_campaign.campaign_id
    and member.status in ('enrolled', 'queued')
  order by member.id
  for no key update;
  campaign := private.claim_campaign(campaign_id, 'campaign.run');
  if campaign.status not in ('running', 'paused') then
    perform private.raise_error(
      409, 'invalid_transition', format('A campaign that is %s cannot be completed', campaign.status), 'status'
    );
  end if;
  update public.call_queue as queue
  set status = 'failed', last_error = 'campaign_completed', wait_reason = null
  where queue.organization_id = organization and queue.campaign_id = campaign.id and queue.status = 'queued';
  update public.campaign_leads as member
  set status = 'skipped', skip_reason = 'campaign_completed'
  where member.organization_id = organization and member.campaign_id = campaign.id and member.status in ('enrolled', 'queued');
  get diagnostics skipped = row_count;
  update public.campaigns as mine
  set status = 'completed', completed_at = at, open_leads = mine.open_leads - skipped
  where mine.id = campaign.id;
  perform private.campaign_completed(organization, campaign.id, at);
  return private.campaign_json(campaign.id, at);
end
$$;
comment on function private.complete_campaign(uuid, timestamptz) is
  'Ends a campaign before its last lead: who waits is called no more, calls under way go on to their end.';

create function public.complete_campaign(campaign_id uuid) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.complete_campaign(campaign_id, private.clock_now())
$$;
comment on function public.complete_campaign(uuid) is 'Completes a running or paused campaign; 409 when it is neither. Needs campaign.run.';

create function private.archive_campaign(campaign_id uuid, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  campaign public.campaigns := private.claim_campaign(campaign_id, 'campaign.run');
begin
  if campaign.status not in ('completed', 'cancelled', 'failed') then
    perform private.raise_error(
      409, 'invalid_transition', format('A campaign that is %s cannot be archived', campaign.status), 'status'
    );
  end if;
  update public.campaigns as mine set status = 'archived', archived_at = at where mine.id = campaign.id;
  perform private.audit(campaign.organization_id, 'campaign.archived', 'campaign', campaign.id, '{}', at);
  return private.campaign_json(campaign.id, at);
end
$$;
comment on function private.archive_campaign(uuid, timestamptz) is 'Puts a campaign that is over away; its calls stay.';

create function public.archive_campaign(campaign_id uuid) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.archive_campaign(campaign_id, private.clock_now())
$$;
comment on function public.archive_campaign(uuid) is 'Archives a campaign that is over; 409 when it is not. Needs campaign.run.';

create function private.restore_campaign(campaign_id uuid, at timestamptz) returns jsonb
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
comment on function private.restore_campaign(uuid, timestamptz) is
  'Makes an archived campaign a draft again: who was still waiting when it ended is open again, who was called stays called.';

create function public.restore_campaign(campaign_id uuid) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.restore_campaign(campaign_id, private.clock_now())
$$;
comment on function public.restore_campaign(uuid) is 'Makes an archived campaign a draft again; 409 when it is not archived. Needs campaign.run.';

create function private.preview_campaign(campaign_id uuid, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  campaign   public.campaigns;
  candidates private.candidate[];
  judged     private.candidate[] := array[]::private.candidate[];
  holding    record;
  obstacle   text;
  preview    jsonb;
begin
  begin
    -- It is started, judged and held for as start does and a release after it, and then none of it has been.
    perform private.start_campaign(campaign_id, at);
    select mine.* into campaign from public.campaigns as mine where mine.id = preview_campaign.campaign_id;
    obstacle := private.campaign_obstacle(campaign, at);
    for round in 1..5 loop
      candidates := private.judge_candidates(
        at, 2000, array(select candidate.queue_id from unnest(judged) as candidate), campaign.id
      );
      exit when cardinality(candidates) = 0;
      judged := judged || candidates;
    end loop;
    holding := private.hold_calls(
      campaign.organization_id,
      array(select candidate.max_call_seconds from unnest(judged) as candidate where candidate.verdict is null), at
    );
    preview := jsonb_build_object(
      'queued', (select count(*) from public.call_queue as queue where queue.campaign_id = campaign.id and queue.status = 'queued'),
      'judged', cardinality(judged),
      'obstacle', obstacle,
      'callable', (select count(*) from unnest(judged) as candidate where candidate.verdict is null),
      'affordable', cardinality(holding.limits),
      'later', (
        select coalesce(jsonb_object_agg(told.verdict, told.leads), '{}')
        from (
          select candidate.verdict, count(*) as leads
          from unnest(judged) as candidate
          where candidate.verdict is not null and candidate.due is not null
          group by candidate.verdict
        ) as told
      ),
      'skipped', (
        select coalesce(jsonb_object_agg(told.verdict, told.leads), '{}')
        from (
          select candidate.verdict, count(*) as leads
          from unnest(judged) as candidate
          where candidate.verdict is not null and candidate.due is null
          group by candidate.verdict
        ) as told
      ),
      'first_call_at', case
        when obstacle is null then (
          select min(case when candidate.verdict is null then at else candidate.due end) from unnest(judged) as candidate
        )
      end,
      -- If every call lasted as long as it may, one after the other in as many lines as there are.
      'done_by', (
        select max(coalesce(candidate.due, at)) + make_interval(
          secs => ceil(count(*)::numeric / campaign.max_concurrent_calls)::integer * (campaign.ring_timeout_seconds + campaign.max_call_seconds)
        )
        from unnest(judged) as candidate
        where candidate.verdict is null or candidate.due is not null
      ),
      'cost', jsonb_build_object(
        'currency', (select max(held.currency) from unnest(holding.holds) as held),
        'credit_minor', (select coalesce(sum(held.credit_minor), 0) from unnest(holding.holds) as held)
      )
    );
    raise exception using errcode = 'TL001';
  exception when sqlstate 'TL001' then
    null;
  end;
  return preview;
end
$$;
comment on function private.preview_campaign(uuid, timestamptz) is
  'What a start would do now, by doing it and taking it back: the same gates, and what the calls may cost at most in credit. Of very many leads '
  'the first ten thousand are judged.';

create function public.preview_campaign(campaign_id uuid) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.preview_campaign(campaign_id, private.clock_now())
$$;
comment on function public.preview_campaign(uuid) is
  'Of a draft: {"queued","judged","obstacle","callable","affordable","later":{reason:n},"skipped":{reason:n},"first_call_at","done_by",'
  '"cost":{"currency","credit_minor"}}; refused as start_campaign() would be. Needs campaign.run.';


-- What a user does with a call ----------------------------------------------------------------------------------------------------

create function private.refuse_call(reason text, due timestamptz) returns void
language plpgsql stable set search_path = '' as $$
begin
  raise sqlstate 'PGRST' using
    message = json_build_object(
      'code', 'call_refused',
      'message', format('The call may not be made: %s', replace(reason, '_', ' ')),
      'details', json_build_object('field', 'lead_id', 'reason', reason, 'next_at', due)::text,
      'hint', null
    )::text,
    detail = json_build_object('status', 422, 'headers', json_build_object())::text;
end
$$;
comment on function private.refuse_call(text, timestamptz) is
  'Ends the request with 422 call_refused: details name the gate as the reason, and when it opens if it does.';

create function private.judge_lead(campaign_id uuid, lead_id uuid, at timestamptz) returns private.candidate
language plpgsql volatile security definer set search_path = '' as $$
declare
  row_id    uuid;
  candidate private.candidate;
begin
  begin
    -- The lead is put in front of the campaign's queue, judged as any of it, and then none of that has been.
    insert into public.call_queue as queue (organization_id, campaign_id, lead_id, next_retry_at, dial_class, priority, created_at, updated_at)
    select campaign.organization_id, campaign.id, judge_lead.lead_id, '-infinity', 2, 9, at, at
    from public.campaigns as campaign
    where campaign.id = judge_lead.campaign_id
    on conflict on constraint call_queue_organization_id_campaign_id_lead_id_key do update
    set status = 'queued', next_retry_at = '-infinity', dial_class = 2, priority = 9
    where queue.status <> 'processing'
    returning queue.id into row_id;
    update public.campaigns as campaign set status = 'running' where campaign.id = judge_lead.campaign_id and campaign.status <> 'running';
    select judged.* into candidate
    from unnest(private.judge_candidates(at, 1, array[]::uuid[], campaign_id)) as judged
    where judged.queue_id = row_id;
    raise exception using errcode = 'TL001';
  exception when sqlstate 'TL001' then
    null;
  end;
  return candidate;
end
$$;
comment on function private.judge_lead(uuid, uuid, timestamptz) is
  'A lead as a release would judge it now for a campaign that runs, whether it is enrolled or not; null when it is being called, or when its '
  'campaign or organization has no place for another call. Writes nothing.';

create function private.place_call(campaign_id uuid, lead_id uuid, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('campaign.run');
  campaign     public.campaigns;
  candidate    private.candidate;
  chosen       private.candidate[];
  obstacle     text;
  holding      record;
  attempt      public.call_logs;
begin
  perform private.lock_releases();
  select mine.* into campaign
  from public.campaigns as mine
  where mine.organization_id = organization and mine.id = place_call.campaign_id;
  if campaign.id is null then
    perform private.raise_error(404, 'campaign_not_found', 'There is no such campaign', 'campaign_id');
  end if;
  if not exists (select from public.leads as mine where mine.organization_id = organization and mine.id = place_call.lead_id) then
    perform private.raise_error(404, 'lead_not_found', 'There is no such lead', 'lead_id');
  end if;
  if campaign.status not in ('draft', 'scheduled', 'running', 'paused') then
    perform private.raise_error(
      409, 'invalid_transition', format('A campaign that is %s calls nobody', campaign.status), 'campaign_id'
    );
  end if;
  perform private.check_breakers(at);
  obstacle := private.campaign_obstacle(campaign, at);
  if obstacle = 'subscription_inactive' then
    perform private.raise_error(402, obstacle, 'The organization has no active subscription');
  elsif obstacle is not null then
    perform private.refuse_call(obstacle, null);
  end if;

  candidate := private.judge_lead(campaign.id, lead_id, at);
  if candidate.queue_id is null then
    perform private.refuse_call('capacity', null);
  elsif candidate.verdict is not null then
    perform private.refuse_call(candidate.verdict, candidate.due);
  end if;
  chosen := private.choose_candidates(array[candidate], 1, at);
  if cardinality(chosen) = 0 then
    perform private.refuse_call('capacity', null);
  end if;
  holding := private.hold_calls(organization, array[candidate.max_call_seconds], at);
  if cardinality(holding.limits) = 0 then
    perform private.refuse_call(holding.reason, null);
  end if;
  if (holding.holds[1]).credit_minor > private.campaign_credit_left(campaign) then
    perform private.refuse_call('credit_cap', null);
  end if;

  -- Of no queue: how it ends is nothing to the campaign's leads and counters.
  insert into public.call_logs (
    organization_id, campaign_id, lead_id, project_id, carrier_account_id, caller_number, callee_number, agent_id, record_call,
    ring_timeout_seconds, time_limit_seconds, caller_id, created_at, lease_until, not_after
  )
  values (
    organization, campaign.id, lead_id, candidate.project_id, candidate.carrier_account_id, candidate.caller_number, candidate.callee_number,
    candidate.agent_id, candidate.record_call, candidate.ring_timeout_seconds, holding.limits[1], private.acting_user_id(), at,
    now() + interval '60 seconds', now() + least(interval '10 minutes', candidate.closes_at - at)
  )
  on conflict (callee_number) where direction = 'outbound' and status <> 'ended' do nothing
  returning * into attempt;
  if attempt.id is null then
    perform private.refuse_call('number_in_call', null);
  end if;
  insert into private.call_holds (attempt_id, organization_id, seconds, credit_seconds, is_beyond, currency, credit_minor)
  select attempt.id, hold.organization_id, hold.seconds, hold.credit_seconds, hold.is_beyond, hold.currency, hold.credit_minor
  from unnest(holding.holds) as hold;
  perform private.take_turns(array[attempt.id]);
  perform private.write_evidence(array[attempt.id], at);
  perform private.audit(
    organization, 'call.placed', 'call_log', attempt.id, jsonb_build_object('campaign_id', campaign.id, 'lead_id', lead_id), at
  );
  return jsonb_build_object(
    'attempt_id', attempt.id, 'organization_id', organization, 'campaign_id', campaign.id, 'lead_id', lead_id, 'status', attempt.status,
    'from', attempt.caller_number, 'not_after', attempt.not_after
  );
end
$$;
comment on function private.place_call(uuid, uuid, timestamptz) is
  'Makes one attempt at a lead as a campaign would, whether it runs or not, through every gate of a release; a refusal says which one.';

create function public.place_call(campaign_id uuid, lead_id uuid) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.place_call(campaign_id, lead_id, private.clock_now())
$$;
comment on function public.place_call(uuid, uuid) is
  'One call to a lead with a campaign''s settings, to try it out: {"attempt_id","organization_id","campaign_id","lead_id","status","from","not_after"}. '
  '422 call_refused names the gate; 402 without a subscription. Needs campaign.run.';

create function private.retry_call(call_id uuid, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('campaign.run');
  attempt      public.call_logs;
  queue        public.call_queue;
  campaign     public.campaigns;
begin
  select log.* into attempt from public.call_logs as log where log.organization_id = organization and log.id = retry_call.call_id;
  if attempt.id is null then
    perform private.raise_error(404, 'call_not_found', 'There is no such call', 'call_id');
  end if;
  select waiting.* into queue
  from public.call_queue as waiting
  where waiting.organization_id = organization and waiting.id = attempt.queue_id
  for no key update;
  if queue.id is null or queue.status not in ('queued', 'failed') then
    perform private.raise_error(
      409, 'invalid_transition',
      case queue.status
        when 'completed' then 'The lead has been reached' when 'processing' then 'The lead is being called' else 'The call is of no campaign''s queue'
      end,
      'call_id'
    );
  end if;
  if private.is_suppressed(organization, attempt.callee_number) or exists (
    select
    from public.leads as lead
    where lead.organization_id = organization and lead.id = queue.lead_id and lead.do_not_call
  ) then
    perform private.refuse_call('opted_out', null);
  end if;
  perform
  from public.campaign_leads as member
  where member.organization_id = organization and member.campaign_id = queue.campaign_id and member.lead_id = queue.lead_id
  for no key update;
  select mine.* into campaign
  from public.campaigns as mine
  where mine.organization_id = organization and mine.id = queue.campaign_id
  for no key update;
  if campaign.status not in ('running', 'paused') then
    perform private.raise_error(
      409, 'invalid_transition', format('A campaign that is %s calls nobody', campaign.status), 'status'
    );
  end if;
  update public.call_queue as waiting
  set
    status = 'queued', next_retry_at = at, wait_reason = null, last_error = null, dial_class = greatest(waiting.dial_class, 1),
    max_attempts = greatest(waiting.max_attempts, waiting.attempt_count + 1)
  where waiting.id = queue.id;
  update public.campaign_leads as member
  set status = 'queued', skip_reason = null
  where member.organization_id = organization and member.campaign_id = queue.campaign_id and member.lead_id = queue.lead_id;
  update public.campaigns as mine
  set open_leads = mine.open_leads + (queue.status = 'failed')::integer
  where mine.id = campaign.id;
  perform private.audit(
    organization, 'call.retried', 'call_log', attempt.id, jsonb_build_object('campaign_id', campaign.id, 'lead_id', queue.lead_id), at
  );
  perform private.nudge('call-dispatch');
  return jsonb_build_object('call_id', attempt.id, 'campaign_id', campaign.id, 'lead_id', queue.lead_id, 'status', 'queued', 'due_at', at);
end
$$;
comment on function private.retry_call(uuid, timestamptz) is
  'Puts the lead of a failed call back into its campaign''s queue for one more attempt, due now: gap, caps and window are the release''s to judge.';

create function public.retry_call(call_id uuid) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.retry_call(call_id, private.clock_now())
$$;
comment on function public.retry_call(uuid) is
  'Calls the lead of a failed call again: {"call_id","campaign_id","lead_id","status","due_at"}; 409 when it was reached, is being called, or its '
  'campaign is over. Needs campaign.run.';

create function private.hang_up_call(call_id uuid, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('call.control');
  attempt      public.call_logs;
begin
  -- A leg by its own id, or by that of the store's call.
  select log.* into attempt
  from public.call_logs as log
  where log.organization_id = organization
    and log.id = coalesce(
      (select call.call_log_id from public.calls as call where call.organization_id = organization and call.id = hang_up_call.call_id),
      hang_up_call.call_id
    );
  if attempt.id is null then
    perform private.raise_error(404, 'call_not_found', 'There is no such call', 'call_id');
  end if;
  if attempt.status not in ('submitting', 'submission_unknown', 'queued', 'initiated', 'ringing', 'in_progress') or attempt.call_sid is null then
    perform private.raise_error(
      409, 'invalid_transition', format('A call that is %s cannot be hung up', replace(attempt.status::text, '_', ' ')), 'status'
    );
  end if;
  perform private.audit(organization, 'call.hung_up', 'call_log', attempt.id, '{}', at);
  return jsonb_build_object('attempt_id', attempt.id, 'status', attempt.status);
end
$$;
comment on function private.hang_up_call(uuid, timestamptz) is
  'Whether a call may be hung up by the request''s user, who is put on record. The carrier is told by the handler; how the call ended, it tells itself.';

create function public.hang_up_call(call_id uuid) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.hang_up_call(call_id, private.clock_now())
$$;
comment on function public.hang_up_call(uuid) is
  'Allows a call under way to be hung up, by its leg''s id or the store''s call''s; 409 when the carrier has not told of it or it is over. Needs call.control.';

create function private.open_hangup(request jsonb) returns jsonb
language sql stable security definer set search_path = '' as $$
  select jsonb_build_object(
    'provider_call_id', log.call_sid,
    'provider', account.provider,
    'carrier_account_id', account.id,
    'account_sid', account.account_sid,
    'credentials_sealed', account.credentials_sealed,
    'api_base', account.api_base
  )
  from public.call_logs as log
  join public.carrier_accounts as account on account.id = log.carrier_account_id
  where log.id = (request ->> 'attempt_id')::uuid and log.call_sid is not null
$$;
comment on function private.open_hangup(jsonb) is 'What it takes to tell the carrier that a call is to end; the account''s secrets stay sealed.';

create function public.open_hangup(jsonb) returns jsonb
language sql stable security invoker set search_path = '' as $$
  select private.open_hangup($1)
$$;
comment on function public.open_hangup(jsonb) is
  '{"v":1,"attempt_id":uuid} -> {"provider_call_id","provider","carrier_account_id","account_sid","credentials_sealed","api_base"}, or null.';


-- Who may call what ---------------------------------------------------------------------------------------------------------------

revoke execute on function
  public.claim_carrier_check(jsonb), public.store_carrier_records(jsonb), public.release_calls(jsonb), public.begin_dials(jsonb), public.record_dials(jsonb), public.reconcile_calls(jsonb),
  public.get_campaign(uuid), public.create_campaign(text, uuid, jsonb), public.start_campaign(uuid), public.pause_campaign(uuid),
  public.resume_campaign(uuid), public.cancel_campaign(uuid), public.complete_campaign(uuid), public.archive_campaign(uuid),
  public.restore_campaign(uuid), public.preview_campaign(uuid), public.schedule_campaign(uuid), public.get_dial_evidence(text)
from public, anon, authenticated, service_role;
grant execute on function
  private.release_calls(jsonb, timestamptz), private.begin_dials(jsonb, timestamptz), private.record_dials(jsonb, timestamptz),
  private.reconcile_calls(jsonb, timestamptz), private.claim_carrier_check(jsonb, timestamptz), private.store_carrier_records(jsonb, timestamptz),
  public.claim_carrier_check(jsonb), public.store_carrier_records(jsonb),
  public.release_calls(jsonb), public.begin_dials(jsonb), public.record_dials(jsonb), public.reconcile_calls(jsonb)
to service_role;
grant execute on function
  private.get_campaign(uuid, timestamptz), private.create_campaign(text, uuid, jsonb, timestamptz),
  private.start_campaign(uuid, timestamptz), private.pause_campaign(uuid, timestamptz), private.resume_campaign(uuid, timestamptz),
  private.cancel_campaign(uuid, timestamptz), private.complete_campaign(uuid, timestamptz), private.archive_campaign(uuid, timestamptz),
  private.restore_campaign(uuid, timestamptz), private.preview_campaign(uuid, timestamptz), private.schedule_campaign(uuid, timestamptz), private.get_dial_evidence(text, timestamptz),
  public.get_campaign(uuid), public.create_campaign(text, uuid, jsonb), public.start_campaign(uuid), public.pause_campaign(uuid),
  public.resume_campaign(uuid), public.cancel_campaign(uuid), public.complete_campaign(uuid), public.archive_campaign(uuid),
  public.restore_campaign(uuid), public.preview_campaign(uuid), public.schedule_campaign(uuid), public.get_dial_evidence(text)
to authenticated;

revoke execute on function
  public.hang_up_call(uuid), public.open_hangup(jsonb), public.place_call(uuid, uuid), public.retry_call(uuid)
from public, anon, authenticated, service_role;
grant execute on function private.open_hangup(jsonb), public.open_hangup(jsonb) to service_role;
grant execute on function
  private.hang_up_call(uuid, timestamptz), public.hang_up_call(uuid), private.place_call(uuid, uuid, timestamptz), public.place_call(uuid, uuid),
  private.retry_call(uuid, timestamptz), public.retry_call(uuid)
to authenticated;
