-- What webhook-intake calls: one event from outside is one function, one transaction, one round trip.
-- Every row is found by an index, and the bodies say so: see 11_functions_call_dispatch.sql.


-- open_source ---------------------------------------------------------------------------------------------------------------------

create function private.open_source(request jsonb, at timestamptz) returns jsonb
language plpgsql stable security definer set search_path = '' as $$
declare
  account public.carrier_accounts;
begin
  -- What is not a UUID is simply not the name of a source: the URL is a stranger's text.
  select source.* into account
  from public.carrier_accounts as source
  where source.id::text = lower(request ->> 'source_id') and source.is_active;
  if account.id is null then
    return jsonb_build_object('found', false);
  end if;
  return jsonb_build_object(
    'found', true,
    'provider', account.provider,
    'account_sid', account.account_sid,
    'auth_token_sealed', account.auth_token_sealed,
    'organization_id', account.organization_id
  );
end
$$;
comment on function private.open_source(jsonb, timestamptz) is 'What it takes to verify a source''s signature, sealed.';

create function public.open_source(jsonb) returns jsonb
language sql stable security invoker set search_path = '' as $$
  select private.open_source($1, private.clock_now())
$$;
comment on function public.open_source(jsonb) is
  '{"v":1,"source_id":uuid} -> {"found":true,"provider","account_sid","auth_token_sealed","organization_id"} or {"found":false}.';


-- apply_event ---------------------------------------------------------------------------------------------------------------------

create function private.clamp_time(reported text, earliest timestamptz, latest timestamptz) returns timestamptz
language plpgsql stable set search_path = '' as $$
begin
  if reported is null then
    return null;
  end if;
  return least(greatest(private.to_business(reported::timestamptz), earliest), latest);
end
$$;
comment on function private.clamp_time(text, timestamptz, timestamptz) is
  'A carrier''s time as business time, brought between two bounds: its clock is not ours.';

create function private.raise_alarm(attempt public.call_logs, alarm text, detail jsonb, at timestamptz) returns void
language plpgsql volatile security definer set search_path = '' as $$
begin
  perform private.emit(
    attempt.organization_id,
    'alarm.' || alarm,
    attempt.id::text || ':' || coalesce(detail ->> 'provider_call_id', ''),
    jsonb_build_object('attempt_id', attempt.id, 'campaign_id', attempt.campaign_id) || detail,
    at
  );
end
$$;
comment on function private.raise_alarm(public.call_logs, text, jsonb, timestamptz) is
  'Puts into the outbox what a person has to look at, once for each attempt and call of the carrier.';

create function private.apply_call_event(
  source text, source_id text, attempt_id uuid, call jsonb, at timestamptz,
  out result public.event_status, out error text, out organization_id uuid
)
language plpgsql volatile security definer set search_path = '' as $$
declare
  attempt     public.call_logs;
  updated     public.call_logs;
  call_id     text := call ->> 'provider_call_id';
  status      public.attempt_status := (call ->> 'status')::public.attempt_status;
  outcome     public.call_outcome := (call ->> 'outcome')::public.call_outcome;
  recording   jsonb := nullif(call -> 'recording', 'null');
  machine     boolean := (call ->> 'machine')::boolean;
  latest      timestamptz;
  answer_time timestamptz;
begin
  select log.* into attempt
  from public.call_logs as log
  where log.id = apply_call_event.attempt_id
  for no key update;
  if attempt.id is null then
    result := 'orphan';
    error := 'unknown_attempt';
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
  updated := attempt;
  latest := greatest(coalesce(attempt.ended_at, at), attempt.created_at);
  answer_time := private.clamp_time(call ->> 'answered_at', attempt.created_at, latest);
  updated.call_sid := coalesce(attempt.call_sid, call_id);
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
  updated.answered_at := coalesce(attempt.answered_at, answer_time, case when status = 'in_progress' then latest end);
  if status = 'ringing' then
    updated.ringing_at := coalesce(attempt.ringing_at, least(latest, updated.answered_at));
  end if;
  updated.duration := coalesce(attempt.duration, (call ->> 'duration_seconds')::integer);
  -- Seconds that were counted stand; a call given up as lost may still turn out to have had some.
  updated.bill_duration_seconds := coalesce(
    nullif(attempt.bill_duration_seconds, 0), (call ->> 'bill_duration_seconds')::integer, attempt.bill_duration_seconds
  );
  if attempt.carrier_cost_micros is null and call ->> 'cost_micros' is not null then
    updated.carrier_cost_micros := (call ->> 'cost_micros')::bigint;
    updated.carrier_cost_currency := upper(call ->> 'cost_currency');
  end if;
  if attempt.hangup_cause_code is null and attempt.hangup_cause_name is null then
    updated.hangup_cause_code := call ->> 'cause_code';
    updated.hangup_cause_name := call ->> 'cause_name';
    updated.hangup_source := call ->> 'cause_source';
  end if;
  updated.machine := coalesce(attempt.machine or machine, machine, attempt.machine);
  if recording is not null and attempt.recording_url is null then
    updated.recording_url := recording ->> 'url';
    updated.recording_id := recording ->> 'id';
    updated.recording_seconds := (recording ->> 'duration_seconds')::integer;
  end if;

  if status = 'ended' and attempt.status <> 'ended' then
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
    outcome := coalesce(
      outcome,
      case when updated.answered_at is not null or updated.bill_duration_seconds > 0 then 'answered' else 'failed' end::public.call_outcome
    );
    if outcome = 'answered' and updated.machine then
      outcome := 'machine';
    end if;
    perform private.end_attempt(updated, outcome, at);
    result := 'applied';
  elsif attempt.status = 'ended' then
    result := case when private.amend_attempt(attempt, updated, outcome, at) then 'applied' else 'ignored' end::public.event_status;
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
end
$$;
comment on function private.apply_call_event(text, text, uuid, jsonb, timestamptz) is
  'What one event means for its attempt: binds the carrier''s call, moves the status forward, adds what was not known, or ends it.';

create function private.apply_event(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' set jit = off set enable_seqscan = off as $$
declare
  event   private.webhook_events;
  applied record;
begin
  event.source := request ->> 'source';
  event.source_id := request ->> 'source_id';
  event.dedupe_key := request ->> 'dedupe_key';
  event.kind := request ->> 'kind';
  if event.source is null or event.source_id is null or event.dedupe_key is null or event.kind is null then
    perform private.raise_error(400, 'malformed_event', 'source, source_id, kind and dedupe_key are required');
  end if;
  if (request ->> 'verified')::boolean is not true then
    perform private.raise_error(403, 'unverified_event', 'An event is verified before it is stored');
  end if;
  event.id := private.uuid_v7();
  event.received_at := at;

  -- The key decides, in the transaction of the effect: the second of two at once waits here for the first.
  insert into private.webhook_event_keys (source, source_id, dedupe_key, event_id, received_at)
  values (event.source, event.source_id, event.dedupe_key, event.id, at)
  on conflict (source, source_id, dedupe_key) do nothing;
  if not found then
    return jsonb_build_object('result', 'duplicate');
  end if;

  begin
    event.attempt_id := (request ->> 'attempt_id')::uuid;
    select * into applied
    from private.apply_call_event(event.source, event.source_id, event.attempt_id, coalesce(request -> 'call', '{}'), at);
    event.status := applied.result;
    event.error := applied.error;
    event.organization_id := applied.organization_id;
  exception when others then
    event.status := 'failed';
    event.error := sqlstate || ' ' || sqlerrm;
    event.next_try_at := now() + interval '1 minute';
  end;

  insert into private.webhook_events (
    id, received_at, organization_id, source, source_id, dedupe_key, kind, attempt_id, headers, body, call, status, error, next_try_at
  )
  values (
    event.id, event.received_at, event.organization_id, event.source, event.source_id, event.dedupe_key, event.kind, event.attempt_id,
    request -> 'headers', request ->> 'body', request -> 'call', event.status, event.error, event.next_try_at
  );
  return jsonb_strip_nulls(jsonb_build_object('result', event.status, 'organization_id', event.organization_id));
end
$$;
comment on function private.apply_event(jsonb, timestamptz) is
  'Stores one verified event and applies it, once for each (source, source_id, dedupe_key). If applying fails, the event stays, failed, and is tried again.';

create function public.apply_event(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.apply_event($1, private.clock_now())
$$;
comment on function public.apply_event(jsonb) is
  '{"v":1,"source","source_id","kind","attempt_id","dedupe_key","verified":true,"headers","body","call":{...}} -> '
  '{"result":"applied|duplicate|ignored|orphan|failed","organization_id"}.';


-- sweep_events --------------------------------------------------------------------------------------------------------------------

create function private.sweep_events(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' set jit = off set enable_seqscan = off as $$
declare
  most    constant integer := 8;
  due     uuid[];
  event   private.webhook_events;
  applied record;
  done    integer := 0;
  failed  integer := 0;
  dead    integer := 0;
begin
  perform private.ensure_partitions(at);

  select array_agg(candidate.id) into due
  from (
    select waiting.id
    from private.webhook_events as waiting
    where waiting.status = 'failed' and waiting.next_try_at <= now()
    order by waiting.next_try_at
    limit least(greatest(coalesce((request ->> 'limit')::integer, 100), 1), 1000)
    for update skip locked
  ) as candidate;

  perform private.lock_attempts(
    array(select distinct waiting.attempt_id from private.webhook_events as waiting where waiting.id = any (due) and waiting.status = 'failed')
  );
  -- In the order in which they came, so that a ring is applied before the hang-up that followed it.
  for event in
    select waiting.*
    from private.webhook_events as waiting
    where waiting.id = any (due) and waiting.status = 'failed'
    order by waiting.received_at, waiting.id
  loop
    begin
      select * into applied
      from private.apply_call_event(event.source, event.source_id, event.attempt_id, coalesce(event.call, '{}'), at);
      update private.webhook_events as stored
      set
        status = applied.result, error = applied.error, organization_id = applied.organization_id,
        tries = event.tries + 1, next_try_at = null
      where stored.id = event.id and stored.received_at = event.received_at;
      done := done + 1;
    exception when others then
      update private.webhook_events as stored
      set
        status = case when event.tries + 1 >= most then 'dead' else 'failed' end::public.event_status,
        error = sqlstate || ' ' || sqlerrm,
        tries = event.tries + 1,
        next_try_at = case when event.tries + 1 < most then now() + interval '1 minute' * (2 ^ event.tries) end
      where stored.id = event.id and stored.received_at = event.received_at;
      if event.tries + 1 >= most then
        dead := dead + 1;
      else
        failed := failed + 1;
      end if;
    end;
  end loop;
  return jsonb_build_object('applied', done, 'failed', failed, 'dead', dead);
end
$$;
comment on function private.sweep_events(jsonb, timestamptz) is
  'Applies again the events that failed and are due: after 1, 2, 4 … minutes, eight times in all, then they are dead and wait for a person.';

create function public.sweep_events(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.sweep_events($1, private.clock_now())
$$;
comment on function public.sweep_events(jsonb) is '{"v":1,"limit":100} -> {"applied":n,"failed":n,"dead":n}. Also makes the coming months'' partitions.';


revoke execute on function
  private.open_source(jsonb, timestamptz), private.apply_event(jsonb, timestamptz), private.sweep_events(jsonb, timestamptz),
  private.apply_call_event(text, text, uuid, jsonb, timestamptz), private.clamp_time(text, timestamptz, timestamptz),
  private.raise_alarm(public.call_logs, text, jsonb, timestamptz),
  public.open_source(jsonb), public.apply_event(jsonb), public.sweep_events(jsonb)
from public, anon, authenticated, service_role;
grant execute on function
  private.open_source(jsonb, timestamptz), private.apply_event(jsonb, timestamptz), private.sweep_events(jsonb, timestamptz),
  public.open_source(jsonb), public.apply_event(jsonb), public.sweep_events(jsonb)
to service_role;
