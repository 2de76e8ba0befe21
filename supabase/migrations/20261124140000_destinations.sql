-- The same gate for transfers as for dials, and seconds that a carrier tells late or not at all.
set local lock_timeout = '5s';
set local statement_timeout = '60s';

create table private.unsettled_calls (
  organization_id uuid not null,
  attempt_id      uuid not null,
  due_at          timestamptz not null,
  tries           smallint not null default 0 check (tries >= 0),
  primary key (organization_id, attempt_id),
  foreign key (organization_id, attempt_id) references public.call_logs (organization_id, id) on delete cascade
);
create index idx_unsettled_calls_due on private.unsettled_calls (due_at);
select private.close_table('private.unsettled_calls');
comment on table private.unsettled_calls is
  'Calls of a carrier that tells no seconds with the end, and whose answer or bill was never told: it is asked a few times while it still knows.';
comment on column private.unsettled_calls.due_at is 'Real time at which the carrier is asked.';

create function private.await_seconds(attempt public.call_logs) returns void
language sql volatile security definer set search_path = '' as $$
  insert into private.unsettled_calls as own (organization_id, attempt_id, due_at)
  values (attempt.organization_id, attempt.id, now() + interval '60 seconds')
  on conflict do nothing
$$;
comment on function private.await_seconds(public.call_logs) is 'Has the carrier asked for the seconds of a call, unless they are told within a minute.';

create function private.take_unsettled(most integer) returns setof public.call_logs
language plpgsql volatile security definer set search_path = '' as $$
begin
  -- Five times, a minute apart: what the carrier has not said by then its records of the day say.
  delete from private.unsettled_calls as own
  where own.due_at < now() and own.tries >= 5;
  return query
  with due as (
    select waiting.organization_id, waiting.attempt_id
    from private.unsettled_calls as waiting
    where waiting.due_at < now()
    order by waiting.due_at
    limit most
    for no key update skip locked
  ),
  taken as (
    update private.unsettled_calls as own
    set due_at = now() + interval '60 seconds', tries = own.tries + 1
    from due
    where own.organization_id = due.organization_id and own.attempt_id = due.attempt_id
    returning own.organization_id, own.attempt_id
  )
  select log.*
  from taken
  join public.call_logs as log on log.organization_id = taken.organization_id and log.id = taken.attempt_id
  where log.status = 'ended' and log.call_sid is not null;
end
$$;
comment on function private.take_unsettled(integer) is 'Ended calls whose seconds the carrier is to be asked for now; each is given out again a minute later, five times at most.';

create function private.transfer_number(told text) returns text
language sql immutable parallel safe set search_path = '' as $$
  select (regexp_match(
    regexp_replace(regexp_replace(regexp_replace(told, '^\s*(tel|sips?):', '', 'i'), '[@;].*$', ''), '[\s().-]', '', 'g'), '^\+?[0-9*#]{2,20}$'
  ))[1]
$$;
comment on function private.transfer_number(text) is
  'The number that a transfer''s destination is, however it is written (also as tel: or sip:); null for one that names none, as a department.';

-- What an hour may cost is judged at one place, for a dial and for a transfer.
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

create or replace function private.dispatch_obstacle(organization uuid, at timestamptz) returns text
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

create function private.transfer_refusal(tenant_id uuid, told text, at timestamptz) returns text
language plpgsql stable security definer set search_path = '' as $$
declare
  phone  constant text := private.transfer_number(told);
  tenant public.organizations;
begin
  if phone is null then
    return null;
  end if;
  select own.* into tenant from public.organizations as own where own.id = tenant_id;
  return case
    -- Without its country nobody knows where it leads: short codes and emergency calls are among those.
    when tenant.id is null or phone not like '+%' or not (private.destination(phone, tenant.dial_countries)).is_callable then 'destination_blocked'
    when tenant.max_price_micros is not null and coalesce(private.destination_price(phone) > tenant.max_price_micros, true) then 'price_ceiling'
    when private.spends_too_much(tenant, at) then 'spend_ceiling'
  end;
end
$$;
comment on function private.transfer_refusal(uuid, text, timestamptz) is
  'Why a call of an organization may not be transferred there, by the rules and in the words of a dial: destination_blocked, price_ceiling, spend_ceiling. '
  'Null where it may, and for a destination that is no number.';

create function private.destination_of_transfer(arguments jsonb) returns text
language sql immutable parallel safe set search_path = '' as $$
  select named.told
  from unnest(array[
    arguments ->> 'destination', arguments ->> 'phone_number', arguments ->> 'phoneNumber', arguments ->> 'transfer_to', arguments ->> 'number',
    arguments ->> 'to', arguments #>> '{destination,number}', arguments #>> '{destination,sipUri}', arguments ->> 'sip_uri'
  ]) with ordinality as named (told, place)
  where private.transfer_number(named.told) is not null
  order by named.place
  limit 1
$$;
comment on function private.destination_of_transfer(jsonb) is 'The number in what a voice agent calls its transfer with, under any of the names that agents give it.';

create function private.judge_transfer(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  destination constant text := btrim(request ->> 'to');
  attempt public.call_logs;
  refusal text;
begin
  if coalesce(destination, '') = '' or length(destination) > 200 then
    perform private.raise_error(400, 'malformed_request', 'to is the number to transfer to', 'to');
  end if;
  select log.* into attempt from public.call_logs as log where log.id = private.to_uuid(request ->> 'attempt_id') for key share;
  if attempt.id is null then
    perform private.raise_error(404, 'call_not_found', 'There is no such call', 'attempt_id');
  end if;
  if attempt.status = 'ended' then
    perform private.raise_error(409, 'call_ended', 'The call has ended', 'attempt_id');
  end if;
  -- Whoever asks means a number: what is none leads nowhere that is known.
  refusal := case
    when private.transfer_number(destination) is null then 'destination_blocked'
    else private.transfer_refusal(attempt.organization_id, destination, at)
  end;
  if refusal is not null then
    perform private.note_activity(
      attempt, 'transfer|' || destination, 'transfer', jsonb_build_object('arguments', jsonb_build_object('destination', destination), 'refused', refusal), at
    );
  end if;
  return jsonb_build_object('allowed', refusal is null, 'reason', refusal);
end
$$;
comment on function private.judge_transfer(jsonb, timestamptz) is 'Whether a call under way may be transferred to a number. A refusal is noted with its lead.';

create function public.judge_transfer(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.judge_transfer($1, private.clock_now())
$$;
comment on function public.judge_transfer(jsonb) is
  '{"v":1,"attempt_id":uuid,"to":text} -> {"allowed":bool,"reason":"destination_blocked|price_ceiling|spend_ceiling"|null}.';

revoke all on function
  private.await_seconds(public.call_logs), private.take_unsettled(integer), private.transfer_number(text),
  private.transfer_refusal(uuid, text, timestamptz), private.destination_of_transfer(jsonb), private.judge_transfer(jsonb, timestamptz),
  public.judge_transfer(jsonb)
from public, anon, authenticated, service_role;
grant execute on function private.judge_transfer(jsonb, timestamptz), public.judge_transfer(jsonb) to service_role;

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

create or replace function private.open_source(request jsonb, at timestamptz) returns jsonb
language plpgsql stable security definer set search_path = '' as $$
declare
  wanted  constant uuid := private.to_uuid(request ->> 'source_id');
  account public.carrier_accounts;
  source  public.webhook_sources;
begin
  -- What is not a UUID is simply not the name of a source: the URL is a stranger's text.
  select known.* into source from public.webhook_sources as known where known.id = wanted and known.is_active;
  if source.id is not null then
    return jsonb_build_object(
      'found', true,
      'provider', source.provider,
      'organization_id', source.organization_id,
      'store_id', source.store_id,
      'settings', source.settings || case
        when source.organization_id is not null and source.settings ? 'transfer_destination' then jsonb_build_object(
          'transfer_refused', private.transfer_refusal(
            source.organization_id,
            coalesce(private.destination_of_transfer(source.settings -> 'transfer_destination'), private.destination_of_transfer(jsonb_build_object('to', source.settings ->> 'transfer_destination'))),
            at
          )
        )
        else '{}'
      end,
      'secrets_sealed', case
        when source.previous_until <= now() then to_jsonb(source.secrets_sealed[1:1])
        else to_jsonb(source.secrets_sealed)
      end,
      'previous_until', case when source.previous_until > now() then floor(extract(epoch from source.previous_until))::bigint end
    );
  end if;
  select known.* into account from public.carrier_accounts as known where known.id = wanted and known.is_active;
  if account.id is not null then
    return jsonb_build_object(
      'found', true,
      'provider', account.provider,
      'organization_id', account.organization_id,
      'account_sid', account.account_sid,
      'settings', '{}'::jsonb,
      'secrets_sealed', jsonb_build_array(account.credentials_sealed)
    );
  end if;
  return jsonb_build_object('found', false);
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
      'age_seconds', greatest(floor(extract(epoch from now() - claimed.begun_at)), 0)::integer
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

create or replace function private.claim_carrier_check(request jsonb, at timestamptz) returns jsonb
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

create or replace function private.apply_agent_event(
  event private.webhook_events, source public.webhook_sources, at timestamptz,
  out result public.event_status, out error text, out organization_id uuid
)
language plpgsql volatile security definer set search_path = '' as $$
declare
  told     jsonb := event.payload;
  agent_id text := left(nullif(told ->> 'agent_call_id', ''), 200);
  rank     integer := coalesce(array_position(array['status', 'tool', 'started', 'ended', 'analyzed'], told ->> 'event'), 1) - 1;
  is_over  boolean := coalesce(told ->> 'event' in ('ended', 'analyzed'), false);
  attempt  public.call_logs;
  updated  public.call_logs;
  ranks    jsonb;
  agent    jsonb;
  tool     jsonb;
  tools    jsonb := case jsonb_typeof(told -> 'tools') when 'array' then told -> 'tools' else '[]' end;
  message_count integer := case jsonb_typeof(told -> 'messages') when 'array' then jsonb_array_length(told -> 'messages') end;
  replaces boolean := false;
  noted    boolean := false;
  latest   timestamptz;
  used_at  timestamptz;
  moment   timestamptz;
  reason   text;
  refusal  text;
  orphan   private.webhook_events;
  applied  record;
begin
  organization_id := source.organization_id;
  -- Two events of one conversation, of which one tells what the other needs to find its call, see each other.
  if agent_id is not null then
    perform pg_advisory_xact_lock(hashtextextended('trunkline.agent:' || event.source_id || ':' || agent_id, 0));
  end if;
  select log.* into attempt
  from public.call_logs as log
  where log.id = private.attempt_of_agent(event)
  for no key update;
  if attempt.id is null then
    result := 'orphan';
    error := 'unknown_attempt';
    return;
  end if;
  if source.organization_id <> attempt.organization_id then
    result := 'orphan';
    error := 'other_organization';
    return;
  end if;
  organization_id := attempt.organization_id;
  if attempt.agent_call_id <> agent_id then
    result := 'orphan';
    error := 'other_conversation';
    return;
  end if;
  if jsonb_array_length(tools) > 0 then
    perform private.lock_person(attempt, tools @? '$[*] ? (@.name == "opt_out")');
  end if;

  updated := attempt;
  latest := greatest(at, attempt.created_at);
  agent := coalesce(attempt.metadata -> 'agent', '{}');
  ranks := coalesce(agent -> 'ranks', '{}');
  updated.agent_call_id := coalesce(attempt.agent_call_id, agent_id);
  if private.knows_more(ranks, 'transcript', rank, attempt.conversation_transcript, told ->> 'transcript') then
    updated.conversation_transcript := told ->> 'transcript';
    ranks := ranks || jsonb_build_object('transcript', rank);
  end if;
  if private.knows_more(ranks, 'summary', rank, attempt.summary, told ->> 'summary') then
    updated.summary := told ->> 'summary';
    ranks := ranks || jsonb_build_object('summary', rank);
  end if;
  if private.knows_more(ranks, 'analysis', rank, attempt.ai_analysis::text, nullif(told -> 'analysis', 'null')::text) then
    updated.ai_analysis := told -> 'analysis';
    ranks := ranks || jsonb_build_object('analysis', rank);
  end if;
  if private.knows_more(ranks, 'sentiment', rank, attempt.sentiment_score::text, round((told ->> 'sentiment')::numeric, 2)::text) then
    updated.sentiment_score := round((told ->> 'sentiment')::numeric, 2);
    ranks := ranks || jsonb_build_object('sentiment', rank);
  end if;
  if private.knows_more(ranks, 'interest_level', rank, attempt.interest_level, told ->> 'interest_level') then
    updated.interest_level := told ->> 'interest_level';
    ranks := ranks || jsonb_build_object('interest_level', rank);
  end if;
  if private.knows_more(ranks, 'disconnect_reason', rank,
    case when ranks ? 'disconnect_reason' then attempt.disconnect_reason end, told ->> 'disconnect_reason')
  then
    updated.disconnect_reason := told ->> 'disconnect_reason';
    updated.disconnect_notes := told ->> 'disconnect_code';
    ranks := ranks || jsonb_build_object('disconnect_reason', rank);
  end if;
  -- A recording of the carrier's has an id, and stays.
  if attempt.recording_id is null
    and private.knows_more(ranks, 'recording_url', rank, attempt.recording_url, told ->> 'recording_url')
  then
    updated.recording_url := told ->> 'recording_url';
    ranks := ranks || jsonb_build_object('recording_url', rank);
  end if;
  if told #>> '{recording,path}' is not null and private.take_object(attempt, told -> 'recording', at) then
    updated.recording_url := told #>> '{recording,path}';
    -- No link of any later event takes its place.
    ranks := ranks || jsonb_build_object('recording_url', 9);
  end if;
  -- The first word is the first, however often it is told.
  updated.first_audio_ms := coalesce(attempt.first_audio_ms, least(greatest((told ->> 'first_audio_ms')::bigint, 0), 3600000)::integer);
  if private.knows_more(ranks, 'language', rank, agent ->> 'language', told ->> 'language') then
    agent := agent || jsonb_build_object('language', told ->> 'language');
    ranks := ranks || jsonb_build_object('language', rank);
  end if;
  if message_count > 0 and (rank, message_count)
    > (coalesce((ranks ->> 'messages')::integer, -1), coalesce((agent ->> 'message_count')::integer, 0))
  then
    replaces := true;
    agent := agent || jsonb_build_object('message_count', message_count);
    ranks := ranks || jsonb_build_object('messages', rank);
  end if;
  agent := agent || jsonb_strip_nulls(jsonb_build_object(
    'provider', source.provider,
    'started_at', least((agent ->> 'started_at')::timestamptz, (told ->> 'started_at')::timestamptz),
    'ended_at', greatest((agent ->> 'ended_at')::timestamptz, (told ->> 'ended_at')::timestamptz),
    'duration_seconds', greatest((agent ->> 'duration_seconds')::integer, (told ->> 'duration_seconds')::integer)
  ));

  for tool in select element.value from jsonb_array_elements(tools) as element loop
    used_at := private.clamp_time(
      coalesce(tool ->> 'at', told ->> 'ended_at', told ->> 'started_at'), attempt.created_at, latest
    );
    used_at := coalesce(used_at, latest);
    moment := private.to_business((tool ->> 'when')::timestamptz);
    reason := left(coalesce(tool #>> '{arguments,reason}', tool #>> '{arguments,message}'), 500);
    refusal := case
      when tool ->> 'name' = 'transfer' then private.transfer_refusal(attempt.organization_id, private.destination_of_transfer(tool -> 'arguments'), at)
    end;
    if private.note_activity(
      attempt, 'tool|' || coalesce(tool ->> 'id', ''),
      case tool ->> 'name'
        when 'transfer' then 'transfer' when 'callback' then 'callback' when 'opt_out' then 'opt_out' when 'site_visit' then 'site_visit'
        else 'agent_tool'
      end,
      jsonb_build_object('tool', tool -> 'called', 'arguments', tool -> 'arguments', 'when', moment, 'refused', refusal), used_at
    ) then
      noted := true;
    end if;
    case tool ->> 'name'
      when 'transfer' then
        if refusal is not null then
          -- It is not in our hands any more; a person has to know.
          perform private.raise_alarm(attempt, 'transfer_refused', jsonb_build_object('reason', refusal), at);
        end if;
        updated.transferred := true;
        updated.transferred_at := least(updated.transferred_at, used_at);
        if private.knows_more(ranks, 'transfer_reason', 0, updated.transfer_reason, reason) then
          updated.transfer_reason := reason;
        end if;
        if private.knows_more(ranks, 'transfer_department', 0, updated.transfer_department,
          left(coalesce(tool #>> '{arguments,department}', tool #>> '{arguments,destination}'), 200))
        then
          updated.transfer_department := left(coalesce(tool #>> '{arguments,department}', tool #>> '{arguments,destination}'), 200);
        end if;
      when 'callback' then
        if moment is not null then
          agent := agent || jsonb_build_object('callback_at', greatest((agent ->> 'callback_at')::timestamptz, moment));
        end if;
      when 'opt_out' then
        agent := agent || jsonb_build_object('opted_out', true);
        perform private.opt_out(attempt.organization_id, private.number_of_person(attempt), coalesce(reason, 'said so in a call'), at);
      else
        null;
    end case;
  end loop;

  updated.metadata := attempt.metadata || jsonb_build_object('agent', agent || jsonb_build_object('ranks', ranks));
  if updated is distinct from attempt then
    noted := true;
    update public.call_logs as log
    set
      agent_call_id = updated.agent_call_id, conversation_transcript = updated.conversation_transcript, ai_analysis = updated.ai_analysis,
      summary = updated.summary, sentiment_score = updated.sentiment_score, interest_level = updated.interest_level,
      transferred = updated.transferred, transferred_at = updated.transferred_at, transfer_reason = updated.transfer_reason,
      transfer_department = updated.transfer_department, disconnect_reason = updated.disconnect_reason,
      disconnect_notes = updated.disconnect_notes, recording_url = updated.recording_url, metadata = updated.metadata,
      first_audio_ms = updated.first_audio_ms
    where log.id = attempt.id;
  end if;
  if updated.transferred and not attempt.transferred then
    update public.campaigns as campaign
    set transferred_calls = campaign.transferred_calls + 1
    where campaign.id = attempt.campaign_id;
  end if;
  if (agent ->> 'callback_at') is distinct from (attempt.metadata #>> '{agent,callback_at}') then
    perform private.call_back(updated, (agent ->> 'callback_at')::timestamptz, at);
  end if;
  perform private.follow_conversation(updated, told, replaces, is_over, at);
  if is_over or updated.metadata #>> '{agent,ended_at}' is not null then
    perform private.note_activity(
      updated, 'call', 'call',
      jsonb_build_object(
        'summary', updated.summary, 'sentiment', updated.sentiment_score, 'interest_level', updated.interest_level,
        'disconnect_reason', case when ranks ? 'disconnect_reason' then updated.disconnect_reason end,
        'duration_seconds', agent -> 'duration_seconds'
      ),
      coalesce(private.clamp_time(agent ->> 'ended_at', attempt.created_at, latest), latest)
    );
  end if;
  result := case when noted or replaces then 'applied' else 'ignored' end::public.event_status;

  -- What came before anybody knew whose conversation it was.
  if attempt.agent_call_id is null and updated.agent_call_id is not null then
    for orphan in
      select waiting.*
      from private.webhook_events as waiting
      where waiting.source_id = event.source_id and waiting.payload ->> 'agent_call_id' = told ->> 'agent_call_id'
        and waiting.status = 'orphan' and waiting.payload_type = 'agent' and waiting.error = 'unknown_attempt'
      order by waiting.received_at, waiting.id
      for no key update
    loop
      select * into applied from private.apply_agent_event(orphan, source, at);
      update private.webhook_events as stored
      set
        status = applied.result, error = applied.error, organization_id = applied.organization_id, attempt_id = attempt.id,
        tries = stored.tries + 1
      where stored.id = orphan.id and stored.received_at = orphan.received_at;
    end loop;
  end if;
end
$$;

insert into private.personal_data (table_name, column_name, found_by, via, treatment, reason)
values ('private.unsettled_calls', '*', 'none', null, 'kept', 'Ids of calls, for five minutes.');
