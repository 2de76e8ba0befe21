-- What webhook-intake calls: one event from outside is one function, one transaction, one round trip.
-- Every row is found by an index, and the bodies say so: see 11_functions_call_dispatch.sql.


-- What strangers write -------------------------------------------------------------------------------------------------------------

create function private.to_uuid(written text) returns uuid
language sql immutable parallel safe set search_path = '' as $$
  select case when written ~* '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$' then written::uuid end
$$;
comment on function private.to_uuid(text) is 'The UUID that is written there; null for anything else.';


-- open_source ---------------------------------------------------------------------------------------------------------------------

create function private.open_source(request jsonb, at timestamptz) returns jsonb
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
comment on function private.open_source(jsonb, timestamptz) is 'What it takes to verify a source''s signature, sealed: of a webhook source or a carrier account.';

create function public.open_source(jsonb) returns jsonb
language sql stable security invoker set search_path = '' as $$
  select private.open_source($1, private.clock_now())
$$;
comment on function public.open_source(jsonb) is
  '{"v":1,"source_id":uuid} -> {"found":true,"provider","organization_id","store_id"?,"account_sid"?,"settings","secrets_sealed":[newest first],'
  '"previous_until"?: unix seconds until which the second holds} or {"found":false}.';


-- Webhook sources, made by their organization -------------------------------------------------------------------------------------

create function private.create_webhook_source(
  id uuid, provider text, name text, secret_sealed text, settings jsonb, store_id uuid, at timestamptz
) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('webhook.manage');
  made         public.webhook_sources;
begin
  if secret_sealed is null or secret_sealed not like 'v1.%' then
    perform private.raise_error(422, 'invalid_secret', 'The secret is sealed by the function that makes sources', 'secret_sealed');
  end if;
  if store_id is not null and not exists (
    select from public.stores as store where store.organization_id = organization and store.id = create_webhook_source.store_id
  ) then
    perform private.raise_error(422, 'unknown_store', 'There is no such store', 'store_id');
  end if;
  begin
    insert into public.webhook_sources (id, organization_id, store_id, provider, name, secrets_sealed, settings)
    values (
      create_webhook_source.id, organization, create_webhook_source.store_id, create_webhook_source.provider,
      coalesce(nullif(btrim(create_webhook_source.name), ''), create_webhook_source.provider), array[secret_sealed],
      coalesce(create_webhook_source.settings, '{}')
    )
    returning * into made;
  exception
    when unique_violation then
      perform private.raise_error(409, 'source_exists', 'There is a source with this id', 'id');
    when check_violation or not_null_violation then
      perform private.raise_error(422, 'invalid_source', 'A source has an id, a provider''s name and an object of settings', 'provider');
  end;
  return to_jsonb(made) - 'secrets_sealed';
end
$$;
comment on function private.create_webhook_source(uuid, text, text, text, jsonb, uuid, timestamptz) is
  'Makes a source in the caller''s organization; the secret comes sealed for its id.';

create function public.create_webhook_source(
  id uuid, provider text, name text, secret_sealed text, settings jsonb default '{}', store_id uuid default null
) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.create_webhook_source(id, provider, name, secret_sealed, settings, store_id, private.clock_now())
$$;
comment on function public.create_webhook_source(uuid, text, text, text, jsonb, uuid) is
  'Who may tell the organization something. Called by POST webhook-intake/sources, which seals the secret. Needs webhook.manage.';

create function private.claim_webhook_source(source_id uuid) returns public.webhook_sources
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('webhook.manage');
  source       public.webhook_sources;
begin
  select mine.* into source
  from public.webhook_sources as mine
  where mine.organization_id = organization and mine.id = source_id
  for no key update;
  if source.id is null then
    perform private.raise_error(404, 'source_not_found', 'There is no such source', 'source_id');
  end if;
  return source;
end
$$;
comment on function private.claim_webhook_source(uuid) is 'Locks a source of the caller''s organization; 404 for any other.';

create function private.rotate_webhook_source_secret(
  source_id uuid, secret_sealed text, keep_previous_seconds integer, at timestamptz
) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  source public.webhook_sources := private.claim_webhook_source(source_id);
  keep   constant integer := least(greatest(coalesce(keep_previous_seconds, 86400), 0), 2592000);
begin
  if secret_sealed is null or secret_sealed not like 'v1.%' then
    perform private.raise_error(422, 'invalid_secret', 'The secret is sealed by the function that rotates it', 'secret_sealed');
  end if;
  update public.webhook_sources as mine
  set
    secrets_sealed = case when keep > 0 then array[secret_sealed, source.secrets_sealed[1]] else array[secret_sealed] end,
    previous_until = case when keep > 0 then now() + make_interval(secs => keep) end
  where mine.id = source.id
  returning * into source;
  return to_jsonb(source) - 'secrets_sealed';
end
$$;
comment on function private.rotate_webhook_source_secret(uuid, text, integer, timestamptz) is
  'A new secret; the one before it holds on for a while, and no older one.';

create function public.rotate_webhook_source_secret(
  source_id uuid, secret_sealed text, keep_previous_seconds integer default 86400
) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.rotate_webhook_source_secret(source_id, secret_sealed, keep_previous_seconds, private.clock_now())
$$;
comment on function public.rotate_webhook_source_secret(uuid, text, integer) is
  'Called by POST webhook-intake/sources/{id}/secrets, which seals the secret. The previous one is valid for keep_previous_seconds more, '
  'a day unless told, 30 days at most; 0 ends it at once. Needs webhook.manage.';

create function private.set_webhook_source_active(source_id uuid, is_active boolean, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  source public.webhook_sources := private.claim_webhook_source(source_id);
begin
  update public.webhook_sources as mine
  set is_active = coalesce(set_webhook_source_active.is_active, mine.is_active)
  where mine.id = source.id
  returning * into source;
  return to_jsonb(source) - 'secrets_sealed';
end
$$;
comment on function private.set_webhook_source_active(uuid, boolean, timestamptz) is 'Turns a source off, or on again.';

create function public.set_webhook_source_active(source_id uuid, is_active boolean) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.set_webhook_source_active(source_id, is_active, private.clock_now())
$$;
comment on function public.set_webhook_source_active(uuid, boolean) is
  'Turns a source off or on again: what it sends while it is off is refused, or kept as an orphan. Needs webhook.manage.';


-- Words that nobody has mapped ----------------------------------------------------------------------------------------------------

create function private.note_unmapped(
  organization uuid, provider text, words jsonb, event uuid, at timestamptz
) returns void
language plpgsql volatile security definer set search_path = '' as $$
begin
  if words is null or jsonb_typeof(words) <> 'array' then
    return;
  end if;
  insert into private.unmapped_values as known (organization_id, source, field, value, event_id, first_seen_at, last_seen_at)
  select distinct organization, provider, left(word ->> 'field', 100), left(word ->> 'value', 200), event, at, at
  from jsonb_array_elements(words) as word
  where word ->> 'field' <> '' and word ->> 'value' is not null
  order by 3, 4
  limit 20
  on conflict (organization_id, source, field, value) do update
  set seen = known.seen + 1, event_id = excluded.event_id, last_seen_at = excluded.last_seen_at;
end
$$;
comment on function private.note_unmapped(uuid, text, jsonb, uuid, timestamptz) is
  'Counts the words of an event that map to none of ours: [{"field","value"}].';

create function private.list_unmapped_values(at timestamptz) returns jsonb
language plpgsql stable security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('webhook.manage');
begin
  return (
    select coalesce(
      jsonb_agg(
        jsonb_build_object(
          'source', word.source, 'field', word.field, 'value', word.value, 'seen', word.seen, 'event_id', word.event_id,
          'first_seen_at', word.first_seen_at, 'last_seen_at', word.last_seen_at
        )
        order by word.last_seen_at desc, word.source, word.field, word.value
      ),
      '[]'
    )
    from (
      select unmapped.*
      from private.unmapped_values as unmapped
      where unmapped.organization_id = organization
      order by unmapped.last_seen_at desc
      limit 1000
    ) as word
  );
end
$$;
comment on function private.list_unmapped_values(timestamptz) is 'The words of providers in the caller''s organization that map to none of ours, latest first.';

create function public.list_unmapped_values() returns jsonb
language sql stable security invoker set search_path = '' as $$
  select private.list_unmapped_values(private.clock_now())
$$;
comment on function public.list_unmapped_values() is
  'What providers said that nobody has mapped: [{"source","field","value","seen","event_id","first_seen_at","last_seen_at"}], latest first. '
  'Needs webhook.manage.';


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

create function private.later_word(words text[], known text, told text) returns text
language sql immutable parallel safe set search_path = '' as $$
  select words[greatest(array_position(words, known), array_position(words, told))]
$$;
comment on function private.later_word(text[], text, text) is 'Of two words in the order of their rank the later; the one there is where the other is null.';

create function private.merge_call(attempt public.call_logs, call jsonb, at timestamptz) returns public.call_logs
language plpgsql stable security definer set search_path = '' as $$
declare
  streams   constant text[] := array['started', 'degraded', 'stopped', 'failed'];
  transfers constant text[] := array['initiated', 'ringing', 'cancelled', 'failed', 'no_answer', 'busy', 'answered', 'completed'];
  latest    constant timestamptz := greatest(coalesce(attempt.ended_at, at), attempt.created_at);
  status    constant public.attempt_status := (call ->> 'status')::public.attempt_status;
  machine   constant boolean := (call ->> 'machine')::boolean;
  recording constant jsonb := nullif(call -> 'recording', 'null');
  stream    constant jsonb := nullif(call -> 'stream', 'null');
  transfer  constant jsonb := nullif(call -> 'transfer', 'null');
  merged    public.call_logs := attempt;
begin
  merged.call_sid := coalesce(attempt.call_sid, call ->> 'provider_call_id');
  merged.answered_at := coalesce(
    attempt.answered_at, private.clamp_time(call ->> 'answered_at', attempt.created_at, latest), case when status = 'in_progress' then latest end
  );
  if status = 'ringing' or attempt.ringing_at > merged.answered_at then
    -- It rang before it was answered, also where we heard of it later.
    merged.ringing_at := least(coalesce(attempt.ringing_at, latest), merged.answered_at);
  end if;
  -- Seconds that were counted stand; a call given up as lost may still turn out to have had some.
  merged.duration := coalesce(nullif(attempt.duration, 0), (call ->> 'duration_seconds')::integer, attempt.duration);
  merged.bill_duration_seconds := coalesce(
    nullif(attempt.bill_duration_seconds, 0), (call ->> 'bill_duration_seconds')::integer, attempt.bill_duration_seconds
  );
  if attempt.carrier_cost_micros is null and call ->> 'cost_micros' is not null then
    merged.carrier_cost_micros := (call ->> 'cost_micros')::bigint;
    merged.carrier_cost_currency := upper(call ->> 'cost_currency');
  end if;
  merged.machine := coalesce(attempt.machine or machine, machine, attempt.machine);
  -- An agent's recording, which has no id, gives way to the carrier's, whichever is told first.
  if recording is not null and attempt.recording_id is null then
    merged.recording_url := recording ->> 'url';
    merged.recording_id := recording ->> 'id';
    merged.recording_seconds := (recording ->> 'duration_seconds')::integer;
  elsif recording ->> 'id' = attempt.recording_id then
    merged.recording_seconds := coalesce(attempt.recording_seconds, (recording ->> 'duration_seconds')::integer);
  end if;
  if stream is not null then
    merged.stream_status := private.later_word(streams, attempt.stream_status, stream ->> 'status');
    merged.stream_id := least(attempt.stream_id, stream ->> 'id');
    merged.stream_error := coalesce(attempt.stream_error, stream ->> 'error');
  end if;
  if transfer is not null then
    merged.transfer_status := private.later_word(transfers, attempt.transfer_status, transfer ->> 'status');
    merged.transfer_sid := case
      when merged.transfer_status = attempt.transfer_status then coalesce(attempt.transfer_sid, transfer ->> 'leg')
      else coalesce(transfer ->> 'leg', attempt.transfer_sid)
    end;
    if merged.transfer_status in ('answered', 'completed') then
      merged.transferred := true;
      merged.transferred_at := coalesce(attempt.transferred_at, latest);
    end if;
  end if;
  return merged;
end
$$;
comment on function private.merge_call(public.call_logs, jsonb, timestamptz) is
  'A leg with what a carrier''s event tells of it added: what is known is kept, and no order of events ends in another row.';

create function private.apply_call_event(
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
comment on function private.apply_call_event(text, text, uuid, jsonb, timestamptz) is
  'What one event means for its attempt: binds the carrier''s call, moves the status forward, adds what was not known, or ends it.';

create function private.apply_payload(
  event private.webhook_events, at timestamptz, out result public.event_status, out error text, out organization_id uuid
)
language plpgsql volatile security definer set search_path = '' as $$
declare
  applied record;
  source  public.webhook_sources;
begin
  if event.payload_type = 'call' then
    select * into applied
    from private.apply_call_event(event.source, event.source_id, event.attempt_id, coalesce(event.payload, '{}'), at);
    result := applied.result;
    error := applied.error;
    organization_id := applied.organization_id;
    return;
  end if;

  -- The handler remembers a source for minutes: one that was turned off or deleted meanwhile changes nothing any more.
  select known.* into source
  from public.webhook_sources as known
  where known.id = private.to_uuid(event.source_id) and known.provider = event.source and known.is_active;
  organization_id := source.organization_id;
  if source.id is null then
    result := 'orphan';
    error := 'unknown_source';
    return;
  end if;
  case event.payload_type
    when 'nothing' then
      result := 'ignored';
      return;
    when 'agent' then
      select * into applied from private.apply_agent_event(event, source, at);
    when 'store' then
      select * into applied from private.apply_store_event(event, source, at);
    when 'payment' then
      select * into applied from private.apply_payment_event(event, source, at);
    else
      result := 'ignored';
      error := 'unknown_payload';
      return;
  end case;
  result := applied.result;
  error := applied.error;
  organization_id := coalesce(applied.organization_id, organization_id);
end
$$;
comment on function private.apply_payload(private.webhook_events, timestamptz) is
  'Applies a stored event by the one function of its payload''s type; each gives the result, an error, and whose event it was.';

create function private.store_event(request jsonb, told jsonb, at timestamptz) returns private.webhook_events
language plpgsql volatile security definer set search_path = '' set jit = off set enable_seqscan = off as $$
declare
  arrived constant timestamptz := private.to_business((request ->> 'received_at')::timestamptz);
  event   private.webhook_events;
  applied record;
begin
  event.source := request ->> 'source';
  event.source_id := request ->> 'source_id';
  event.dedupe_key := told ->> 'dedupe_key';
  event.kind := told ->> 'kind';
  if event.source is null or event.source_id is null or event.dedupe_key is null or event.kind is null then
    perform private.raise_error(400, 'malformed_event', 'source, source_id, kind and dedupe_key are required');
  end if;
  event.id := private.uuid_v7();
  event.received_at := at;
  event.headers := request -> 'headers';
  event.body := request ->> 'body';
  event.tries := 1;
  -- The call of a carrier may stand beside its event, as it did before there were other payloads.
  event.payload := case when told ? 'payload' then told -> 'payload' else nullif(told -> 'call', 'null') end;
  event.payload_type := case
    when not told ? 'payload' then 'call'
    when told -> 'payload' ->> 'type' ~ '^[a-z][a-z_]{0,30}$' then told -> 'payload' ->> 'type'
    else 'nothing'
  end;

  if event.payload_type = 'agent' and event.payload #>> '{recording,path}' is not null then
    perform private.hold_object(event.payload #>> '{recording,path}', at);
  end if;
  -- The key decides, in the transaction of the effect: the second of two at once waits here for the first.
  insert into private.webhook_event_keys (source, source_id, dedupe_key, event_id, received_at)
  values (event.source, event.source_id, event.dedupe_key, event.id, at)
  on conflict (source, source_id, dedupe_key) do nothing;
  if not found then
    return event;
  end if;

  begin
    -- Known before it is applied, so that the sweep can lock it with others in order.
    event.attempt_id := coalesce(
      (told ->> 'attempt_id')::uuid, case when event.payload_type = 'agent' then private.attempt_of_agent(event) end
    );
    select * into applied from private.apply_payload(event, at);
    if event.attempt_id is null and (event.payload ->> 'inbound')::boolean then
      event.attempt_id := (select log.id from public.call_logs as log where log.call_sid = event.payload ->> 'provider_call_id');
    end if;
    event.status := applied.result;
    event.error := coalesce(applied.error, case when applied.result = 'ignored' then told ->> 'note' end);
    event.organization_id := applied.organization_id;
    if arrived is not null and private.was_erased(event, arrived) then
      raise exception using errcode = 'ERASE';
    end if;
  exception when sqlstate 'ERASE' then
    -- Whatever it did is undone: it waited on a queue while its person was erased, and says nothing any more.
    event.status := 'ignored';
    event.error := 'erased';
    event.headers := null;
    event.body := null;
    event.payload := null;
    insert into private.webhook_events select event.*;
    return event;
  when others then
    event.status := 'failed';
    event.error := sqlstate || ' ' || sqlerrm;
    event.next_try_at := now() + interval '1 minute';
    event.organization_id := (
      select source.organization_id from public.webhook_sources as source where source.id = private.to_uuid(event.source_id)
    );
  end;

  insert into private.webhook_events select event.*;
  perform private.note_unmapped(event.organization_id, event.source, told -> 'unmapped', event.id, at);
  return event;
end
$$;
comment on function private.store_event(jsonb, jsonb, timestamptz) is
  'Stores one event of a request under its key and applies it; without a status it was here before.';

create function private.apply_event(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' set jit = off set enable_seqscan = off as $$
declare
  told         jsonb;
  event        private.webhook_events;
  results      text[] := '{}'::text[];
  organization uuid;
  answer       jsonb;
begin
  if (request ->> 'verified')::boolean is not true then
    perform private.raise_error(403, 'unverified_event', 'An event is verified before it is stored');
  end if;
  for told in
    select element.value
    from jsonb_array_elements(coalesce(nullif(request -> 'events', 'null'), jsonb_build_array(request - array['headers', 'body'])))
      with ordinality as element (value, place)
    order by element.place
  loop
    event := private.store_event(request, told, at);
    organization := coalesce(event.organization_id, organization);
    results := results || coalesce(event.status::text, 'duplicate');
  end loop;
  -- Of several the one that a person would want to hear of.
  answer := jsonb_build_object(
    'result', coalesce(
      (
        select known.result
        from unnest(array['failed', 'orphan', 'applied', 'ignored', 'duplicate']) with ordinality as known (result, place)
        where known.result = any (results)
        order by known.place
        limit 1
      ),
      'ignored'
    ),
    'organization_id', organization,
    'results', case when cardinality(results) > 1 then to_jsonb(results) end
  );
  return jsonb_strip_nulls(answer);
end
$$;
comment on function private.apply_event(jsonb, timestamptz) is
  'Stores the verified events of one request and applies them, each once for its (source, source_id, dedupe_key). If applying one fails, it '
  'stays, failed, and is tried again.';

create function public.apply_event(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.apply_event($1, private.clock_now())
$$;
comment on function public.apply_event(jsonb) is
  '{"v":1,"source","source_id","verified":true,"headers","body","events":[{"kind","dedupe_key","attempt_id"?,"payload":{"type",…},'
  '"unmapped"?:[{"field","value"}],"note"?}]} -> {"result":"applied|duplicate|ignored|orphan|failed","organization_id","results"? of several}. '
  'A single event may stand at the top, a call as "call":{…}. What waited on a queue says when it had come, "received_at".';


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
    array(select distinct waiting.attempt_id from private.webhook_events as waiting where waiting.id = any (due))
  );
  -- In the order in which they came, so that a ring is applied before the hang-up that followed it.
  for event in
    select waiting.*
    from private.webhook_events as waiting
    where waiting.id = any (due)
    order by waiting.received_at, waiting.id
  loop
    begin
      select * into applied from private.apply_payload(event, at);
      update private.webhook_events as stored
      set
        status = applied.result, error = applied.error, organization_id = coalesce(applied.organization_id, stored.organization_id),
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
  -- What an agent told before the carrier had named the call is known by now, or is about a call that is not ours.
  for event in
    select waiting.*
    from private.webhook_events as waiting
    where waiting.status = 'orphan' and waiting.payload_type = 'agent' and waiting.received_at > at - interval '15 minutes'
      and waiting.error = 'unknown_attempt' and waiting.payload ->> 'provider_call_id' is not null
      and private.attempt_of_agent(waiting) is not null
    order by waiting.received_at, waiting.id
    limit 50
    for no key update skip locked
  loop
    begin
      select * into applied from private.apply_payload(event, at);
      update private.webhook_events as stored
      set
        status = applied.result, error = applied.error, organization_id = coalesce(applied.organization_id, stored.organization_id),
        attempt_id = private.attempt_of_agent(event), tries = event.tries + 1
      where stored.id = event.id and stored.received_at = event.received_at;
      done := done + 1;
    exception when others then
      update private.webhook_events as stored
      set
        status = 'failed', error = sqlstate || ' ' || sqlerrm, tries = event.tries + 1, next_try_at = now() + interval '1 minute',
        attempt_id = private.attempt_of_agent(event)
      where stored.id = event.id and stored.received_at = event.received_at;
      failed := failed + 1;
    end;
  end loop;
  return jsonb_build_object('applied', done, 'failed', failed, 'dead', dead);
end
$$;
comment on function private.sweep_events(jsonb, timestamptz) is
  'Applies again the events that failed and are due: after 1, 2, 4 … minutes, eight times in all, then they are dead and wait for a person. '
  'An agent''s event that came before its call was known is applied once it is.';

create function public.sweep_events(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.sweep_events($1, private.clock_now())
$$;
comment on function public.sweep_events(jsonb) is '{"v":1,"limit":100} -> {"applied":n,"failed":n,"dead":n}. Also makes the coming months'' partitions.';


revoke execute on function
  private.to_uuid(text), private.open_source(jsonb, timestamptz), private.apply_event(jsonb, timestamptz),
  private.sweep_events(jsonb, timestamptz), private.apply_call_event(text, text, uuid, jsonb, timestamptz),
  private.clamp_time(text, timestamptz, timestamptz), private.later_word(text[], text, text),
  private.merge_call(public.call_logs, jsonb, timestamptz), private.raise_alarm(public.call_logs, text, jsonb, timestamptz),
  private.apply_payload(private.webhook_events, timestamptz), private.store_event(jsonb, jsonb, timestamptz),
  private.note_unmapped(uuid, text, jsonb, uuid, timestamptz), private.claim_webhook_source(uuid),
  private.create_webhook_source(uuid, text, text, text, jsonb, uuid, timestamptz),
  private.rotate_webhook_source_secret(uuid, text, integer, timestamptz),
  private.set_webhook_source_active(uuid, boolean, timestamptz), private.list_unmapped_values(timestamptz),
  public.open_source(jsonb), public.apply_event(jsonb), public.sweep_events(jsonb),
  public.create_webhook_source(uuid, text, text, text, jsonb, uuid), public.rotate_webhook_source_secret(uuid, text, integer),
  public.set_webhook_source_active(uuid, boolean), public.list_unmapped_values()
from public, anon, authenticated, service_role;
grant execute on function
  private.open_source(jsonb, timestamptz), private.apply_event(jsonb, timestamptz), private.sweep_events(jsonb, timestamptz),
  public.open_source(jsonb), public.apply_event(jsonb), public.sweep_events(jsonb)
to service_role;
grant execute on function
  private.create_webhook_source(uuid, text, text, text, jsonb, uuid, timestamptz),
  private.rotate_webhook_source_secret(uuid, text, integer, timestamptz),
  private.set_webhook_source_active(uuid, boolean, timestamptz), private.list_unmapped_values(timestamptz),
  public.create_webhook_source(uuid, text, text, text, jsonb, uuid), public.rotate_webhook_source_secret(uuid, text, integer),
  public.set_webhook_source_active(uuid, boolean), public.list_unmapped_values()
to authenticated;
