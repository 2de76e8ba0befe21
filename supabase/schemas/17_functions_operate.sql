-- What it takes to operate the intake: recordings copied, events found and sent through again, old months dropped, persons erased.


-- Recordings ----------------------------------------------------------------------------------------------------------------------

create function private.note_recording() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  waiting private.recordings;
begin
  insert into private.recordings as known (organization_id, attempt_id, url, state, reason, next_try_at, created_at, settled_at)
  values (
    new.organization_id, new.id, new.recording_url,
    case when new.record_call then 'pending' else 'refused' end,
    case when not new.record_call then 'no_consent' end,
    case when new.record_call then now() end,
    private.clock_now(),
    case when not new.record_call then private.clock_now() end
  )
  -- The carrier's own recording may follow the agent's, and then takes its place.
  on conflict (attempt_id) do update
  set
    url = excluded.url, state = 'pending', reason = null, tries = 0, next_try_at = now(), nudged_at = null, lease_token = null,
    settled_at = null
  where known.url is distinct from excluded.url and known.state in ('pending', 'copied', 'failed') and excluded.state = 'pending'
  returning known.* into waiting;
  if waiting.state = 'pending' then
    perform set_config(
      'trunkline.recordings',
      coalesce(nullif(current_setting('trunkline.recordings', true), ''), '') || ' ' || new.organization_id || '/' || new.id,
      true
    );
  end if;
  return null;
end
$$;
comment on function private.note_recording() is
  'Trigger: a leg that has a recording leaves the work of copying it, once, in the transaction that told of it. Without consent it is refused.';
create trigger note_new_recording after insert on public.call_logs
  for each row when (new.recording_url like 'http%') execute function private.note_recording();
create trigger note_recording after update of recording_url on public.call_logs
  for each row when (new.recording_url like 'http%' and new.recording_url is distinct from old.recording_url)
  execute function private.note_recording();

create function private.take_recordings() returns jsonb
language plpgsql volatile set search_path = '' as $$
declare
  noted text := nullif(btrim(current_setting('trunkline.recordings', true)), '');
begin
  if noted is null then
    return null;
  end if;
  perform set_config('trunkline.recordings', '', true);
  return (
    select jsonb_agg(jsonb_build_object('organization_id', split_part(leg.name, '/', 1), 'id', split_part(leg.name, '/', 2)))
    from (select distinct unnest(string_to_array(noted, ' ')) as name) as leg
  );
end
$$;
comment on function private.take_recordings() is
  'The recordings that this transaction left to be copied, [{"organization_id","id": the attempt}]; null when there are none.';

create function private.with_recordings(answer jsonb) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
begin
  return answer || jsonb_strip_nulls(jsonb_build_object('recordings', private.take_recordings()));
end
$$;
comment on function private.with_recordings(jsonb) is 'What became of an event, and which recordings whoever applied it tells the queue of.';

create function private.due_recordings(most integer) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  due jsonb;
begin
  -- Its first message went out with the event; the sweep is for those that were lost, or have failed before.
  with late as (
    select waiting.id
    from private.recordings as waiting
    where waiting.state = 'pending' and waiting.next_try_at < now() - interval '1 minute'
      and (waiting.nudged_at is null or waiting.nudged_at < now() - interval '5 minutes')
    order by waiting.next_try_at
    limit most
    for update skip locked
  ),
  nudged as (
    update private.recordings as waiting
    set nudged_at = now()
    from late
    where waiting.id = late.id
    returning waiting.organization_id, waiting.attempt_id
  )
  select coalesce(jsonb_agg(jsonb_build_object('organization_id', nudged.organization_id, 'id', nudged.attempt_id)), '[]') into due from nudged;
  return due;
end
$$;
comment on function private.due_recordings(integer) is 'Recordings whose copy is due and that no message seems to be about; at most once in five minutes each.';

create function private.with_due_work(answer jsonb) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
begin
  return answer || jsonb_build_object(
    'recordings', private.due_recordings(100) || coalesce(private.take_recordings(), '[]'),
    'deletions', (select count(*) from private.storage_deletions as doomed where doomed.next_try_at <= now())
  );
end
$$;
comment on function private.with_due_work(jsonb) is 'What a sweep did, and what it leaves to the function: recordings to put on the queue, objects to delete.';

-- Replaces the one before: an event's answer also names the recordings that it told of.
create or replace function public.apply_event(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.with_recordings(private.apply_event($1, private.clock_now()))
$$;
comment on function public.apply_event(jsonb) is
  '{"v":1,"source","source_id","verified":true,"headers","body","events":[{"kind","dedupe_key","attempt_id"?,"payload":{"type",…},'
  '"unmapped"?:[{"field","value"}],"note"?}]} -> {"result":"applied|duplicate|ignored|orphan|failed","organization_id","results"? of several,'
  '"recordings"?:[{"organization_id","id"}] to copy}. A single event may stand at the top, a call as "call":{…}. What waited on a queue says '
  'when it had come, "received_at".';

-- Replaces the one before: the sweep also finds recordings that nobody copied, and objects that are to be gone.
create or replace function public.sweep_events(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.with_due_work(private.sweep_events($1, private.clock_now()))
$$;
comment on function public.sweep_events(jsonb) is
  '{"v":1,"limit":100} -> {"applied":n,"failed":n,"dead":n,"recordings":[{"organization_id","id"}] to copy,"deletions": n that are due}. '
  'Also makes the coming months'' partitions.';

create function private.claim_recordings(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  token   constant uuid := (request ->> 'lease_token')::uuid;
  claimed uuid[];
begin
  if token is null or jsonb_typeof(request -> 'ids') is distinct from 'array' then
    perform private.raise_error(400, 'malformed_request', 'lease_token and ids are required');
  end if;
  with mine as (
    select waiting.id
    from private.recordings as waiting
    where waiting.attempt_id in (select named.id::uuid from jsonb_array_elements_text(request -> 'ids') as named (id))
      and waiting.state = 'pending' and (waiting.next_try_at <= now() or waiting.lease_token = token)
    order by waiting.id
    for update skip locked
  ),
  leased as (
    update private.recordings as waiting
    set
      tries = case when waiting.lease_token is distinct from token then waiting.tries + 1 else waiting.tries end,
      lease_token = token,
      next_try_at = now() + interval '3 minutes'
    from mine
    where waiting.id = mine.id
    returning waiting.id
  )
  select coalesce(array_agg(leased.id), '{}') into claimed from leased;

  -- Whoever withdrew the consent meanwhile is not copied either.
  update private.recordings as waiting
  set state = 'refused', reason = 'no_consent', next_try_at = null, settled_at = at
  from public.call_logs as log
  where waiting.id = any (claimed) and log.id = waiting.attempt_id and not log.record_call;

  return jsonb_build_object('recordings', (
    select coalesce(
      jsonb_agg(
        jsonb_build_object(
          'id', waiting.attempt_id, 'organization_id', waiting.organization_id, 'url', waiting.url, 'tries', waiting.tries,
          'provider', account.provider, 'carrier_account_id', account.id, 'account_sid', account.account_sid,
          'credentials_sealed', account.credentials_sealed, 'api_base', account.api_base
        )
        order by waiting.id
      ),
      '[]'
    )
    from private.recordings as waiting
    join public.call_logs as log on log.id = waiting.attempt_id
    join public.carrier_accounts as account on account.id = log.carrier_account_id
    where waiting.id = any (claimed) and waiting.state = 'pending'
  ));
end
$$;
comment on function private.claim_recordings(jsonb, timestamptz) is
  'Hands recordings to a worker for three minutes, each to one; what is settled, not due or somebody else''s is left out.';

create function public.claim_recordings(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.claim_recordings($1, private.clock_now())
$$;
comment on function public.claim_recordings(jsonb) is
  '{"v":1,"lease_token":uuid,"ids":[attempt]} -> {"recordings":[{"id","organization_id","url","provider","carrier_account_id","account_sid",'
  '"credentials_sealed","api_base","tries"}]}. The same token again gets the same.';

create function private.record_recordings(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  most    constant integer := 8;
  token   constant uuid := (request ->> 'lease_token')::uuid;
  outcome jsonb;
  copy    private.recordings;
  settled integer := 0;
begin
  for outcome in
    select result.value from jsonb_array_elements(request -> 'results') as result (value) order by result.value ->> 'id'
  loop
    -- The leg before its recording, as whoever erases locks them.
    perform from public.call_logs as log where log.id = (outcome ->> 'id')::uuid for no key update;
    select waiting.* into copy
    from private.recordings as waiting
    where waiting.attempt_id = (outcome ->> 'id')::uuid
    for update;
    if copy.state = 'erased' or copy.id is null then
      -- The person was erased while the copy was under way: it goes too.
      if outcome ->> 'result' = 'copied' then
        insert into private.storage_deletions (path, requested_at) values (outcome ->> 'path', at) on conflict do nothing;
      end if;
      continue;
    end if;
    continue when copy.state <> 'pending' or copy.lease_token is distinct from token;
    settled := settled + 1;
    if outcome ->> 'result' = 'copied' then
      -- An agent's object, or one of another kind, that lay there before.
      insert into private.storage_deletions (path, requested_at)
      select copy.path, at
      where copy.path <> outcome ->> 'path'
      on conflict (path) do nothing;
      update private.recordings as waiting
      set
        state = 'copied', reason = null, path = outcome ->> 'path', bytes = (outcome ->> 'bytes')::bigint,
        content_type = outcome ->> 'content_type', next_try_at = null, lease_token = null, settled_at = at
      where waiting.id = copy.id;
      update public.call_logs as log set recording_url = outcome ->> 'path' where log.id = copy.attempt_id;
    elsif outcome ->> 'result' = 'refused' or copy.tries >= most then
      update private.recordings as waiting
      set
        state = case when outcome ->> 'result' = 'refused' then 'refused' else 'failed' end,
        reason = left(outcome ->> 'reason', 500), next_try_at = null, lease_token = null, settled_at = at
      where waiting.id = copy.id;
      perform private.emit(
        copy.organization_id, 'alarm.recording_' || case when outcome ->> 'result' = 'refused' then 'refused' else 'failed' end,
        copy.attempt_id::text, jsonb_build_object('attempt_id', copy.attempt_id, 'reason', left(outcome ->> 'reason', 500)), at
      );
    else
      update private.recordings as waiting
      set
        reason = left(outcome ->> 'reason', 500), lease_token = null,
        next_try_at = now() + interval '1 minute' * (2 ^ (copy.tries - 1))
      where waiting.id = copy.id;
    end if;
  end loop;
  return jsonb_build_object('settled', settled);
end
$$;
comment on function private.record_recordings(jsonb, timestamptz) is
  'What became of copies: copied, refused for good, or failed, to be tried again after 1, 2, 4 … minutes, eight times in all. What is over is told to a person.';

create function public.record_recordings(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.record_recordings($1, private.clock_now())
$$;
comment on function public.record_recordings(jsonb) is
  '{"v":1,"lease_token":uuid,"results":[{"id":attempt,"result":"copied|refused|failed","reason"?,"path"?,"bytes"?,"content_type"?}]} -> {"settled":n}.';

create function private.hold_object(object_path text, at timestamptz) returns void
language sql volatile security definer set search_path = '' as $$
  insert into private.storage_deletions (path, requested_at, next_try_at)
  select object_path, at, now() + interval '7 days'
  where not exists (select from private.recordings as taken where taken.path = object_path)
  on conflict (path) do nothing
$$;
comment on function private.hold_object(text, timestamptz) is
  'An object that came with an event is to go in a week, unless a call takes it as its recording: what is about no call of ours, or never applied, is '
  'not kept for ever.';

create function private.take_object(attempt public.call_logs, object jsonb, at timestamptz) returns boolean
language plpgsql volatile security definer set search_path = '' as $$
declare
  object_path constant text := object ->> 'path';
  known       private.recordings;
begin
  select waiting.* into known from private.recordings as waiting where waiting.attempt_id = attempt.id for update;
  -- One that a worker is about to delete is as good as gone.
  perform from private.storage_deletions as held where held.path = object_path and held.tries = 0 for update;
  if not found then
    return false;
  end if;
  -- The carrier's own recording stays, as does the longer one of two of an agent's.
  if attempt.erased_at is not null or not attempt.record_call or attempt.recording_id is not null
    or known.state = 'copied' and known.bytes >= (object ->> 'bytes')::bigint
  then
    update private.storage_deletions as held set next_try_at = now() where held.path = object_path;
    return false;
  end if;
  insert into private.storage_deletions (path, requested_at)
  select known.path, at
  where known.path is not null
  on conflict (path) do nothing;
  insert into private.recordings as mine (
    organization_id, attempt_id, state, next_try_at, path, bytes, content_type, created_at, settled_at
  )
  values (
    attempt.organization_id, attempt.id, 'copied', null, object_path, (object ->> 'bytes')::bigint, object ->> 'content_type', at, at
  )
  on conflict (attempt_id) do update
  set
    state = 'copied', url = null, reason = null, next_try_at = null, lease_token = null, path = excluded.path, bytes = excluded.bytes,
    content_type = excluded.content_type, settled_at = at;
  delete from private.storage_deletions as held where held.path = object_path;
  return true;
end
$$;
comment on function private.take_object(public.call_logs, jsonb, timestamptz) is
  'The sound that an agent sent along, {"path","bytes","content_type"}, becomes the recording of its call, where consent was given and the carrier told of '
  'none; else the object goes. The caller has locked the leg.';

create function private.open_recording(call_id uuid, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('call.listen');
  attempt      uuid;
  copy         private.recordings;
begin
  -- A leg by its own id, or by that of the store's call.
  select log.id into attempt from public.call_logs as log where log.organization_id = organization and log.id = open_recording.call_id;
  if attempt is null then
    select call.call_log_id into attempt from public.calls as call where call.organization_id = organization and call.id = open_recording.call_id;
  end if;
  select known.* into copy
  from private.recordings as known
  where known.organization_id = organization and known.attempt_id = attempt;
  if copy.state = 'pending' then
    perform private.raise_error(409, 'recording_not_ready', 'The recording is still at the carrier');
  end if;
  if copy.state is distinct from 'copied' then
    perform private.raise_error(404, 'recording_not_found', 'There is no recording of such a call', 'call_id');
  end if;
  perform private.audit(organization, 'recording.opened', 'call_log', attempt, '{}', at);
  return jsonb_build_object('path', copy.path, 'content_type', copy.content_type, 'bytes', copy.bytes);
end
$$;
comment on function private.open_recording(uuid, timestamptz) is 'Where a call''s recording is, for who may listen; that it was opened is on record.';

create function public.open_recording(call_id uuid) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.open_recording(call_id, private.clock_now())
$$;
comment on function public.open_recording(uuid) is
  'Called by POST webhook-intake/calls/{id}/recording, which makes a link of it that ends soon. Needs call.listen. Returns {"path","content_type","bytes"}.';

create function private.claim_deletions(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  paths jsonb;
begin
  with due as (
    select doomed.path
    from private.storage_deletions as doomed
    where doomed.next_try_at <= now()
    order by doomed.next_try_at
    limit least(greatest(coalesce((request ->> 'limit')::integer, 100), 1), 1000)
    for update skip locked
  ),
  claimed as (
    update private.storage_deletions as doomed
    set tries = doomed.tries + 1, next_try_at = now() + least(interval '5 minutes' * (doomed.tries + 1), interval '1 day')
    from due
    where doomed.path = due.path
    returning doomed.path
  )
  select coalesce(jsonb_agg(claimed.path order by claimed.path), '[]') into paths from claimed;
  return jsonb_build_object('paths', paths);
end
$$;
comment on function private.claim_deletions(jsonb, timestamptz) is 'Objects that are to be gone, for one worker for a while.';

create function public.claim_deletions(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.claim_deletions($1, private.clock_now())
$$;
comment on function public.claim_deletions(jsonb) is '{"v":1,"limit":100} -> {"paths":[text]}: objects of the bucket recordings to delete.';

create function private.record_deletions(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  gone integer;
begin
  delete from private.storage_deletions as doomed
  where doomed.path in (select named.path from jsonb_array_elements_text(request -> 'paths') as named (path));
  get diagnostics gone = row_count;
  return jsonb_build_object('gone', gone);
end
$$;
comment on function private.record_deletions(jsonb, timestamptz) is 'Objects that are gone.';

create function public.record_deletions(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.record_deletions($1, private.clock_now())
$$;
comment on function public.record_deletions(jsonb) is '{"v":1,"paths":[text]} -> {"gone":n}.';

-- The bucket, where there is Supabase Storage. Its own policies are the wall for whoever asks Storage directly.
do $$
begin
  if to_regclass('storage.buckets') is null or to_regclass('storage.objects') is null then
    return;
  end if;
  insert into storage.buckets (id, name, public)
  values ('recordings', 'recordings', false)
  on conflict (id) do update set public = false;
  create policy "Who listens to calls may read the recordings" on storage.objects
    for select to authenticated
    using (bucket_id = 'recordings' and split_part(name, '/', 1) = (select private.org_with('call.listen'))::text);
exception when insufficient_privilege then
  raise notice 'The bucket recordings and its policy are to be made by hand: %', sqlerrm;
end
$$;


-- Events: found, looked at, sent through again ------------------------------------------------------------------------------------

create function private.find_events(organization uuid, filter jsonb, most integer) returns setof private.webhook_events
language plpgsql stable security definer set search_path = '' as $$
begin
  return query
  select event.*
  from private.webhook_events as event
  where (find_events.organization is null or event.organization_id = find_events.organization)
    and (filter ->> 'organization_id' is null or event.organization_id = (filter ->> 'organization_id')::uuid)
    and (filter ->> 'before' is null or event.id < (filter ->> 'before')::uuid)
    and (filter ->> 'source' is null or event.source = filter ->> 'source')
    and (filter ->> 'source_id' is null or event.source_id = filter ->> 'source_id')
    and (filter ->> 'kind' is null or event.kind = filter ->> 'kind')
    and (filter ->> 'status' is null or event.status::text = any (string_to_array(filter ->> 'status', ',')))
    and (filter ->> 'attempt_id' is null or event.attempt_id = (filter ->> 'attempt_id')::uuid)
    and (filter ->> 'since' is null or event.received_at >= (filter ->> 'since')::timestamptz)
    and (filter ->> 'until' is null or event.received_at < (filter ->> 'until')::timestamptz)
  order by event.id desc
  limit most;
end
$$;
comment on function private.find_events(uuid, jsonb, integer) is
  'Events that match a filter, latest first, from one before which the page begins: organization_id, source, source_id, kind, status (several by comma), '
  'attempt_id, since, until, before. Of one organization, or, with null, of all.';

create function private.list_events(organization uuid, filter jsonb) returns jsonb
language plpgsql stable security definer set search_path = '' as $$
declare
  most   constant integer := least(greatest(coalesce((filter ->> 'limit')::integer, 50), 1), 500);
  events jsonb;
begin
  select coalesce(
    jsonb_agg(
      jsonb_strip_nulls(jsonb_build_object(
        'id', event.id, 'received_at', event.received_at, 'organization_id', event.organization_id, 'source', event.source,
        'source_id', event.source_id, 'kind', event.kind, 'attempt_id', event.attempt_id, 'status', event.status, 'error', event.error,
        'tries', event.tries, 'next_try_at', event.next_try_at
      ))
      order by event.id desc
    ),
    '[]'
  )
  into events
  from private.find_events(list_events.organization, filter, most) as event;
  return jsonb_build_object(
    'events', events, 'before', case when jsonb_array_length(events) = most then events -> -1 -> 'id' end
  );
end
$$;
comment on function private.list_events(uuid, jsonb) is 'One page of events without what they carried; `before` begins the next one.';

create function private.get_event(organization uuid, event_id uuid) returns jsonb
language plpgsql stable security definer set search_path = '' as $$
declare
  event private.webhook_events;
begin
  select known.* into event
  from private.webhook_events as known
  where known.id = event_id and (get_event.organization is null or known.organization_id = get_event.organization);
  if event.id is null then
    perform private.raise_error(404, 'event_not_found', 'There is no such event', 'id');
  end if;
  return to_jsonb(event);
end
$$;
comment on function private.get_event(uuid, uuid) is 'One event with all that is kept of it.';

create function private.redrive_events(organization uuid, ids uuid[], filter jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  most     constant integer := 1000;
  redriven integer;
begin
  if ids is null and coalesce(filter, '{}') - array['limit', 'before'] = '{}' then
    perform private.raise_error(422, 'filter_required', 'ids or a filter say which events are meant', 'filter');
  end if;
  with meant as (
    select event.id, event.received_at
    from private.webhook_events as event
    where event.id = any (
        case
          when ids is not null then ids
          else array(
            select found.id
            from private.find_events(
              redrive_events.organization, filter || jsonb_build_object('status', coalesce(filter ->> 'status', 'failed,dead')), most
            ) as found
          )
        end
      )
      and (redrive_events.organization is null or event.organization_id = redrive_events.organization)
      -- What was applied is not applied again, and what was stripped or erased says nothing any more.
      and event.status in ('failed', 'dead') and (event.payload is not null or event.body is not null)
    order by event.id
    limit most
    for update
  )
  update private.webhook_events as event
  set status = 'failed', tries = 1, next_try_at = now()
  from meant
  where event.id = meant.id and event.received_at = meant.received_at;
  get diagnostics redriven = row_count;
  if redriven > 0 then
    perform private.audit(
      redrive_events.organization, 'webhook_events.redriven', 'webhook_event', case when cardinality(ids) = 1 then ids[1] end,
      jsonb_strip_nulls(jsonb_build_object('events', redriven, 'filter', filter)), at
    );
    perform private.nudge('webhook-intake');
  end if;
  return jsonb_build_object('redriven', redriven);
end
$$;
comment on function private.redrive_events(uuid, uuid[], jsonb, timestamptz) is
  'Makes failed and dead events due now, with all their tries before them: by id, or by filter, a thousand at most. The sweep applies them.';

create function private.count_events(organization uuid, filter jsonb, at timestamptz) returns jsonb
language plpgsql stable security definer set search_path = '' as $$
begin
  return jsonb_build_object(
    'since', coalesce((filter ->> 'since')::timestamptz, at - interval '7 days'),
    'events', (
      select coalesce(
        jsonb_agg(
          jsonb_build_object(
            'source', part.source, 'status', part.status, 'events', part.events, 'oldest', part.oldest, 'latest', part.latest
          )
          order by part.source, part.status
        ),
        '[]'
      )
      from (
        select event.source, event.status, count(*) as events, min(event.received_at) as oldest, max(event.received_at) as latest
        from private.webhook_events as event
        where event.received_at >= coalesce((filter ->> 'since')::timestamptz, at - interval '7 days')
          and (count_events.organization is null or event.organization_id = count_events.organization)
          and (filter ->> 'organization_id' is null or event.organization_id = (filter ->> 'organization_id')::uuid)
        group by event.source, event.status
      ) as part
    ),
    'unmapped', (
      select coalesce(
        jsonb_agg(jsonb_build_object('source', word.source, 'field', word.field, 'value', word.value, 'seen', word.seen) order by word.seen desc),
        '[]'
      )
      from (
        select unmapped.source, unmapped.field, unmapped.value, sum(unmapped.seen) as seen
        from private.unmapped_values as unmapped
        where (count_events.organization is null or unmapped.organization_id = count_events.organization)
          and (filter ->> 'organization_id' is null or unmapped.organization_id = (filter ->> 'organization_id')::uuid)
        group by unmapped.source, unmapped.field, unmapped.value
        order by sum(unmapped.seen) desc, unmapped.source, unmapped.field, unmapped.value
        limit 100
      ) as word
    )
  );
end
$$;
comment on function private.count_events(uuid, jsonb, timestamptz) is
  'Events by source and status since a time, the last seven days unless told, and the words of providers that nobody has mapped.';

-- For users, in their own organization.
create function private.list_webhook_events(filter jsonb) returns jsonb
language plpgsql stable security definer set search_path = '' as $$
begin
  return private.list_events(private.require_org('webhook.manage'), coalesce(filter, '{}'));
exception when invalid_text_representation or invalid_datetime_format or datetime_field_overflow then
  perform private.raise_error(400, 'malformed_request', 'The filter holds what is no id, time or number', 'filter');
  return null;
end
$$;
comment on function private.list_webhook_events(jsonb) is 'One page of the events of the caller''s organization.';
create function public.list_webhook_events(filter jsonb default '{}') returns jsonb
language sql stable security invoker set search_path = '' as $$
  select private.list_webhook_events(filter)
$$;
comment on function public.list_webhook_events(jsonb) is
  'What came in: {"events":[{"id","received_at","source","kind","status","error",…}],"before"}, latest first. The filter knows source, source_id, kind, status '
  '(several by comma), attempt_id, since, until, limit, and before, which continues a list. Needs webhook.manage.';

create function private.get_webhook_event(id uuid) returns jsonb
language plpgsql stable security definer set search_path = '' as $$
begin
  return private.get_event(private.require_org('webhook.manage'), get_webhook_event.id);
end
$$;
comment on function private.get_webhook_event(uuid) is 'One event of the caller''s organization.';
create function public.get_webhook_event(id uuid) returns jsonb
language sql stable security invoker set search_path = '' as $$
  select private.get_webhook_event(id)
$$;
comment on function public.get_webhook_event(uuid) is 'One event as it came, and what became of it. Needs webhook.manage.';

create function private.redrive_webhook_events(ids uuid[], filter jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
begin
  return private.redrive_events(private.require_org('webhook.manage'), ids, filter, at);
exception when invalid_text_representation or invalid_datetime_format or datetime_field_overflow then
  perform private.raise_error(400, 'malformed_request', 'The filter holds what is no id, time or number', 'filter');
  return null;
end
$$;
comment on function private.redrive_webhook_events(uuid[], jsonb, timestamptz) is 'Sends events of the caller''s organization through again.';
create function public.redrive_webhook_events(ids uuid[] default null, filter jsonb default null) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.redrive_webhook_events(ids, filter, private.clock_now())
$$;
comment on function public.redrive_webhook_events(uuid[], jsonb) is
  'Failed and dead events, by id or by the filter of list_webhook_events(), are applied again at the next sweep: {"redriven":n}. Needs webhook.manage.';

create function private.count_webhook_events(since timestamptz, at timestamptz) returns jsonb
language plpgsql stable security definer set search_path = '' as $$
begin
  return private.count_events(private.require_org('webhook.manage'), jsonb_strip_nulls(jsonb_build_object('since', since)), at);
end
$$;
comment on function private.count_webhook_events(timestamptz, timestamptz) is 'What came in at the caller''s organization, counted.';
create function public.count_webhook_events(since timestamptz default null) returns jsonb
language sql stable security invoker set search_path = '' as $$
  select private.count_webhook_events(since, private.clock_now())
$$;
comment on function public.count_webhook_events(timestamptz) is
  'Events by source and status, the last seven days unless told, and unmapped words: {"since","events":[…],"unmapped":[…]}. Needs webhook.manage.';

-- For the operator's tools, over all organizations.
create function public.list_events(jsonb) returns jsonb
language sql stable security invoker set search_path = '' as $$
  select private.list_events(null, $1)
$$;
comment on function public.list_events(jsonb) is '{"v":1, the filter of list_webhook_events(), "organization_id"?} -> {"events":[…],"before"}.';
create function public.get_event(jsonb) returns jsonb
language sql stable security invoker set search_path = '' as $$
  select private.get_event(null, ($1 ->> 'id')::uuid)
$$;
comment on function public.get_event(jsonb) is '{"v":1,"id":uuid} -> the event.';
create function public.redrive_events(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.redrive_events(
    null, case when $1 ? 'ids' then array(select named.id::uuid from jsonb_array_elements_text($1 -> 'ids') as named (id)) end,
    $1 - array['v', 'ids'], private.clock_now()
  )
$$;
comment on function public.redrive_events(jsonb) is '{"v":1,"ids":[uuid]} or {"v":1, a filter} -> {"redriven":n}.';
create function public.count_events(jsonb) returns jsonb
language sql stable security invoker set search_path = '' as $$
  select private.count_events(null, $1, private.clock_now())
$$;
comment on function public.count_events(jsonb) is '{"v":1,"organization_id"?,"since"?} -> {"since","events":[…],"unmapped":[…]}.';


-- Retention -----------------------------------------------------------------------------------------------------------------------

-- The statements that apply_retention() puts together, of private.retention_rules and the catalog alone: nobody calls these but it.
create function private.drop_month(part regclass) returns void
language plpgsql volatile security definer set search_path = '' as $$
begin
  execute format('drop table %s', part);
end
$$;
comment on function private.drop_month(regclass) is 'Drops one month of a table that is split by month.';

create function private.delete_before(part regclass, key_name name, oldest timestamptz) returns bigint
language plpgsql volatile security definer set search_path = '' as $$
declare
  done bigint;
begin
  execute format('delete from %s where %I < $1', part, key_name) using oldest;
  get diagnostics done = row_count;
  return done;
end
$$;
comment on function private.delete_before(regclass, name, timestamptz) is 'Deletes what is too old and in no month''s partition: how many rows.';

create function private.first_time(split regclass, key_name name) returns timestamptz
language plpgsql stable security definer set search_path = '' as $$
declare
  found_at timestamptz;
begin
  execute format('select min(%I) from %s', key_name, split) into found_at;
  return found_at;
end
$$;
comment on function private.first_time(regclass, name) is 'The time of the oldest row.';

create function private.strip_between(split regclass, key_name name, columns text[], since timestamptz, until timestamptz) returns bigint
language plpgsql volatile security definer set search_path = '' as $$
declare
  done bigint;
begin
  execute format(
    'update %s set %s where %I >= $1 and %I < $2 and status not in (''failed'', ''dead'') and (%s)',
    split,
    (select string_agg(format('%I = null', stripping.name), ', ') from unnest(columns) as stripping (name)),
    key_name, key_name,
    (select string_agg(format('%I is not null', stripping.name), ' or ') from unnest(columns) as stripping (name))
  )
  using since, until;
  get diagnostics done = row_count;
  return done;
end
$$;
comment on function private.strip_between(regclass, name, text[], timestamptz, timestamptz) is
  'Empties columns of the rows of a time, but for those that wait for a person: how many rows.';

create function private.count_astray(part regclass) returns bigint
language plpgsql stable security definer set search_path = '' as $$
declare
  found_rows bigint;
begin
  execute format('select count(*) from (select from %s limit 1000) as astray', part) into found_rows;
  return found_rows;
end
$$;
comment on function private.count_astray(regclass) is 'Rows that no month''s partition took, a thousand at most.';

create function private.seal_usage(part regclass, before timestamptz) returns void
language plpgsql volatile security definer set search_path = '' as $$
begin
  execute format(
    'insert into private.usage_seals as seal (organization_id, meter_key, day, quantity, events)
     select event.organization_id, event.meter_key, event.day, sum(event.quantity)::bigint, count(*)
     from %s as event
     where event.occurred_at < $1
     group by event.organization_id, event.meter_key, event.day
     on conflict on constraint usage_seals_pkey
     do update set quantity = seal.quantity + excluded.quantity, events = seal.events + excluded.events',
    part
  ) using before;
end
$$;
comment on function private.seal_usage(regclass, timestamptz) is
  'Writes down what the usage events of a partition came to, before the same transaction takes them away.';

create function private.forget_events(rule private.retention_rules, most integer, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' set enable_seqscan = off as $$
declare
  oldest   constant timestamptz := (date_trunc('month', at at time zone 'UTC') - make_interval(months => rule.keep_months)) at time zone 'UTC';
  cutoff   constant timestamptz := date_trunc('hour', at - rule.strip_after);
  reached  timestamptz;
  stripped bigint := 0;
  deleted  bigint := 0;
begin
  if rule.strip_after is not null and cutoff > coalesce(rule.stripped_until, '-infinity') then
    with old as (
      select told.id, told.organization_id
      from private.outbox as told
      where told.created_at >= coalesce(rule.stripped_until, '-infinity') and told.created_at < cutoff and told.payload <> '{}'
        -- What an endpoint still waits for keeps what it carries; one that is switched off waits no longer.
        and not exists (
          select
          from public.webhook_endpoints as endpoint
          join public.event_deliveries as delivery on delivery.endpoint_id = endpoint.id and delivery.event_id = told.id
          where endpoint.organization_id = told.organization_id and endpoint.enabled and delivery.status in ('pending', 'failed')
        )
      order by told.created_at
      limit most
    ),
    gone as (
      delete from public.event_deliveries as delivery
      using old, public.webhook_endpoints as endpoint
      where endpoint.organization_id = old.organization_id and delivery.endpoint_id = endpoint.id and delivery.event_id = old.id
        and delivery.status in ('pending', 'failed')
    ),
    emptied as (
      update private.outbox as told
      set payload = '{}', dispatched_at = case when told.sequence is not null then coalesce(told.dispatched_at, at) else told.dispatched_at end
      from old
      where told.id = old.id
      returning told.created_at
    )
    select count(*), max(emptied.created_at) into stripped, reached from emptied;
    update private.retention_rules as known
    set stripped_until = case when stripped < most then cutoff else reached end
    where known.table_name = rule.table_name;
  end if;
  if rule.keep_months is not null and rule.table_name = 'private.outbox' then
    delete from private.outbox as told
    where told.id in (select old.id from private.outbox as old where old.created_at < oldest order by old.created_at limit most);
    get diagnostics deleted = row_count;
  elsif rule.keep_months is not null then
    delete from public.event_deliveries as delivery
    where delivery.id in (
      select old.id
      from public.event_deliveries as old
      join public.webhook_endpoints as endpoint on endpoint.id = old.endpoint_id
      where old.created_at < oldest and (old.status in ('delivered', 'dead') or not endpoint.enabled)
      order by old.created_at
      limit most
    );
    get diagnostics deleted = row_count;
  end if;
  return jsonb_build_object('stripped', stripped, 'deleted', deleted, 'more', stripped = most or deleted = most);
end
$$;
comment on function private.forget_events(private.retention_rules, integer, timestamptz) is
  'Empties events out that are old enough and waited for by nobody, and deletes them, or the log of their deliveries, when their time is over; so many rows at most.';

create function private.apply_retention(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  most     constant integer := least(greatest(coalesce((request ->> 'rows')::integer, 20000), 1), 100000);
  days     constant integer := least(greatest(coalesce((request ->> 'days')::integer, 7), 1), 366);
  rule     private.retention_rules;
  parent   text;
  key_name name;
  part     record;
  oldest   timestamptz;
  cutoff   timestamptz;
  done     bigint;
  stripped bigint := 0;
  deleted  bigint := 0;
  dropped  jsonb := '[]'::jsonb;
  unplaced jsonb := '{}'::jsonb;
  told     jsonb;
  more     boolean := false;
begin
  -- Whoever reads or writes the table for long is not made to wait behind this: there is a next run.
  perform set_config('lock_timeout', '2s', true);
  for rule in
    select known.* from private.retention_rules as known where to_regclass(known.table_name) is not null order by known.table_name for update
  loop
    if rule.table_name in ('private.outbox', 'public.event_deliveries') then
      told := private.forget_events(rule, most, at);
      stripped := stripped + (told ->> 'stripped')::bigint;
      deleted := deleted + (told ->> 'deleted')::bigint;
      more := more or (told ->> 'more')::boolean;
      continue;
    end if;
    select attribute.attname into key_name
    from pg_catalog.pg_partitioned_table as split
    join pg_catalog.pg_attribute as attribute on attribute.attrelid = split.partrelid and attribute.attnum = split.partattrs[0]
    where split.partrelid = rule.table_name::regclass and split.partstrat = 'r';
    continue when key_name is null;
    parent := split_part(rule.table_name, '.', 2);

    if rule.keep_months is not null then
      oldest := (date_trunc('month', at at time zone 'UTC') - make_interval(months => rule.keep_months)) at time zone 'UTC';
      for part in
        select child.relname as name
        from pg_catalog.pg_inherits as split
        join pg_catalog.pg_class as child on child.oid = split.inhrelid
        where split.inhparent = rule.table_name::regclass
          and child.relname ~ ('^' || parent || '_[0-9]{6}$')
          and to_date(right(child.relname, 6), 'YYYYMM') + interval '1 month' <= oldest at time zone 'UTC'
        order by child.relname
      loop
        begin
          if rule.table_name = 'private.usage_events' then
            perform private.seal_usage(to_regclass(format('private.%I', part.name)), oldest);
          end if;
          perform private.drop_month(to_regclass(format('private.%I', part.name)));
          dropped := dropped || to_jsonb('private.' || part.name);
        exception when lock_not_available then
          raise notice '% is in use; it is dropped at the next run', part.name;
        end;
      end loop;
      if rule.table_name = 'private.usage_events' then
        perform private.seal_usage(to_regclass(format('private.%I', parent || '_default')), oldest);
      end if;
      deleted := deleted + private.delete_before(to_regclass(format('private.%I', parent || '_default')), key_name, oldest);
    end if;

    if rule.strip_after is not null and cardinality(rule.strip_columns) > 0 then
      if rule.stripped_until is null then
        rule.stripped_until := private.first_time(rule.table_name::regclass, key_name);
      end if;
      cutoff := least(date_trunc('hour', at - rule.strip_after), rule.stripped_until + make_interval(days => days));
      if cutoff > rule.stripped_until then
        stripped := stripped
          + private.strip_between(rule.table_name::regclass, key_name, rule.strip_columns, rule.stripped_until, cutoff);
        update private.retention_rules as known set stripped_until = cutoff where known.table_name = rule.table_name;
      end if;
    end if;
  end loop;

  for part in
    select split.inhparent::regclass::text as parent, child.relname as name
    from pg_catalog.pg_inherits as split
    join pg_catalog.pg_class as child on child.oid = split.inhrelid
    where child.relnamespace = 'private'::regnamespace and pg_get_expr(child.relpartbound, child.oid) = 'DEFAULT'
    order by child.relname
  loop
    done := private.count_astray(to_regclass(format('private.%I', part.name)));
    if done > 0 then
      unplaced := unplaced || jsonb_build_object(part.parent, done);
    end if;
  end loop;
  -- No queue holds an event for so long.
  delete from private.erased_persons as known where known.erased_at < at - interval '90 days';

  -- Old usage may come at any time: its month is made for it, a few of them a run, and whoever is in the way has it done by the next.
  for oldest in
    select distinct date_trunc('month', event.occurred_at at time zone 'UTC') at time zone 'UTC' as month
    from private.usage_events_default as event
    order by month
    limit 12
  loop
    begin
      perform private.ensure_partitions('private.usage_events', oldest, 0);
    exception when lock_not_available or deadlock_detected then
      raise notice 'usage_events is in use; the month of % is made at the next run', oldest;
    end;
  end loop;
  return jsonb_build_object('dropped', dropped, 'deleted', deleted, 'stripped', stripped, 'unplaced', unplaced, 'more', more);
end
$$;
comment on function private.apply_retention(jsonb, timestamptz) is
  'Empties what is old enough, drops months past their time, and tells of rows that no month''s partition took. The keys of events stay: '
  'a duplicate is one however late it comes. Failed and dead events keep what they carry until their month goes.';

create function public.apply_retention(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.apply_retention($1, private.clock_now())
$$;
comment on function public.apply_retention(jsonb) is
  '{"v":1,"days":7,"rows":20000} -> {"dropped":[partition],"deleted":n,"stripped":n,"unplaced":{table: n},"more"}. Empties at most so many days'' rows '
  'of what comes in, and so many rows of what goes out, at once; more: call again.';


-- Erasure -------------------------------------------------------------------------------------------------------------------------
-- Every column that can hold a text is listed with what becomes of it; a test compares the list with the catalog, and looks for the
-- person in every column of every table afterwards.

insert into private.personal_data (table_name, column_name, found_by, via, treatment, reason)
select listed.table_name, named.column_name, listed.found_by, listed.via, listed.treatment, listed.reason
from (
  values
    ('public.leads', 'name', 'lead', 'id', 'text', null),
    ('public.leads', 'email phone timezone lead_source external_lead_id raw_data notes waiting_status opt_out_reason abuse_details rejection_reason', 'lead', 'id', 'null', null),
    ('public.lead_activities', 'content', 'lead', 'lead_id', 'object', null),
    ('public.consents', 'phone_number consent_text proof revoke_reason', 'phone', 'phone_number', 'delete', null),
    ('public.suppressions', 'phone_number reason', 'phone', 'phone_number', 'delete', null),
    ('public.campaign_leads', 'opt_out_reason', 'lead', 'lead_id', 'null', null),
    ('public.call_queue', 'metadata', 'lead', 'lead_id', 'object', null),
    ('public.call_queue', 'last_error', 'lead', 'lead_id', 'null', null),
    ('public.call_logs', 'callee_number', 'attempt', 'id', 'callee', null),
    ('public.call_logs', 'caller_number', 'attempt', 'id', 'caller', null),
    ('public.call_logs', 'recording_url recording_id conversation_transcript ai_analysis summary interest_level transfer_reason disconnect_notes notes', 'attempt', 'id', 'null', null),
    ('public.call_logs', 'metadata', 'attempt', 'id', 'object', null),
    ('public.websocket_sessions', 'connection_id metadata', 'attempt', 'call_log_id', 'delete', null),
    ('public.calls', 'to_phone', 'store_call', 'id', 'callee', null),
    ('public.calls', 'from_phone', 'store_call', 'id', 'caller', null),
    ('public.calls', 'recording_url recording_sid transcript ai_summary intent_detected', 'store_call', 'id', 'null', null),
    ('public.calls', 'twilio_data ai_context', 'store_call', 'id', 'object', null),
    ('public.conversations', 'conversation_key', 'conversation', 'id', 'key', null),
    ('public.conversations', 'customer_identifier customer_name title summary primary_intent escalation_reason', 'conversation', 'id', 'null', null),
    ('public.conversations', 'ai_context platform_data', 'conversation', 'id', 'object', null),
    ('public.conversations', 'conversation_history', 'conversation', 'id', 'array', null),
    ('public.conversations', 'tags', 'conversation', 'id', 'list', null),
    ('public.conversation_messages', 'content', 'conversation', 'conversation_id', 'text', null),
    ('public.conversation_messages', 'external_message_id ai_prompt intent entities', 'conversation', 'conversation_id', 'null', null),
    ('public.conversation_messages', 'attachments', 'conversation', 'conversation_id', 'array', null),
    ('public.conversation_messages', 'ai_metadata platform_data', 'conversation', 'conversation_id', 'object', null),
    ('public.customers', 'external_id', 'customer', 'id', 'key', null),
    ('public.customers', 'email phone first_name last_name sync_hash', 'customer', 'id', 'null', null),
    ('public.customers', 'tags', 'customer', 'id', 'list', null),
    ('public.customers', 'platform_data', 'customer', 'id', 'object', null),
    ('public.orders', 'customer_email customer_phone customer_first_name customer_last_name customer_external_id shipping_address billing_address tracking_number tracking_url customer_notes internal_notes sync_hash', 'order', 'id', 'null', null),
    ('public.orders', 'platform_data', 'order', 'id', 'object', null),
    ('public.order_line_items', 'properties', 'order', 'order_id', 'object', null),
    ('private.webhook_events', 'headers body payload error', 'event', 'id', 'null', null),
    ('private.recordings', 'url reason', 'attempt', 'attempt_id', 'null', null),
    ('private.unmapped_values', 'value', 'content', null, 'delete', null),
    ('public.audit_logs', 'metadata', 'content', null, 'scrub', null),
    ('public.platform_audit_logs', 'metadata', 'content', null, 'scrub', null),
    ('public.usage_logs', 'metadata', 'content', null, 'scrub', null),
    ('public.call_logs', 'refusal_reason disconnect_reason transfer_department', 'content', null, 'scrub', null),
    ('private.outbox', 'payload last_error', 'content', null, 'scrub', null),
    ('public.impersonation_sessions', 'reason', 'content', null, 'scrub', null),
    ('public.campaign_leads', 'skip_reason', 'content', null, 'scrub', null),
    ('public.call_queue', 'wait_reason', 'content', null, 'scrub', null),
    ('public.conversations', 'resolution_status', 'content', null, 'scrub', null),
    ('public.projects', 'description metadata', 'content', null, 'scrub', null),
    ('public.campaigns', 'description ai_script call_settings metadata', 'content', null, 'scrub', null),
    ('public.properties', 'description', 'content', null, 'scrub', null),
    ('public.leads', 'source status', 'none', null, 'kept', 'A word of a fixed list, or a code.'),
    ('public.lead_activities', 'type', 'none', null, 'kept', 'A word of a fixed list, or a code.'),
    ('public.consents', 'scope source', 'none', null, 'kept', 'A word of a fixed list, or a code.'),
    ('public.suppressions', 'source', 'none', null, 'kept', 'A word of a fixed list, or a code.'),
    ('public.call_logs', 'call_sid agent_call_id', 'none', null, 'kept', 'Names a thing in another system, not a person.'),
    ('public.call_logs', 'carrier_cost_currency hangup_cause_code hangup_cause_name hangup_source', 'none', null, 'kept', 'A word of a fixed list, or a code.'),
    ('public.calls', 'twilio_call_sid call_id', 'none', null, 'kept', 'Names a thing in another system, not a person.'),
    ('public.websocket_sessions', 'kind', 'none', null, 'kept', 'A word of a fixed list, or a code.'),
    ('public.conversation_messages', 'content_type ai_model', 'none', null, 'kept', 'A word of a fixed list, or a code.'),
    ('public.customers', 'preferred_language', 'none', null, 'kept', 'A word of a fixed list, or a code.'),
    ('public.orders', 'external_id order_number', 'none', null, 'kept', 'Names the purchase, which stays as a fiscal row without its person.'),
    ('public.orders', 'currency_code shipping_method', 'none', null, 'kept', 'A word of a fixed list, or a code.'),
    ('public.order_line_items', 'external_id external_product_id external_variant_id title variant_title sku', 'none', null, 'kept', 'What was sold, a fiscal row.'),
    ('private.webhook_events', 'source source_id kind payload_type', 'none', null, 'kept', 'A word of a fixed list, or a code.'),
    ('private.webhook_events', 'dedupe_key', 'none', null, 'kept', 'Names the event at its source: ids and times, or a hash.'),
    ('private.webhook_event_keys', '*', 'none', null, 'kept', 'Name events at their sources: ids and times, or a hash; a repetition is known by them for ever.'),
    ('private.unmapped_values', 'source field', 'none', null, 'kept', 'A word of a fixed list, or a code.'),
    ('private.outbox', 'topic key object', 'none', null, 'kept', 'What happened, and the id of what it happened to.'),
    ('private.recordings', 'state content_type', 'none', null, 'kept', 'A word of a fixed list, or a code.'),
    ('private.recordings', 'path', 'none', null, 'kept', 'Organization and attempt; the object goes.'),
    ('private.storage_deletions', '*', 'none', null, 'kept', 'Objects that are about to go, by organization and attempt.'),
    ('private.erased_numbers', '*', 'none', null, 'kept', 'The salted hash by which an erased person is not called again.'),
    ('private.erased_persons', '*', 'none', null, 'kept', 'Salted hashes, for as long as a queue may hold an event of before.'),
    ('public.audit_logs', 'user_name action entity_type', 'none', null, 'kept', 'Who of the organization''s own people did what.'),
    ('public.platform_audit_logs', 'user_name action entity_type', 'none', null, 'kept', 'Who of the operator''s own people did what.'),
    ('public.usage_logs', 'feature_key', 'none', null, 'kept', 'A word of a fixed list, or a code.'),
    ('public.campaigns', 'name timezone', 'none', null, 'kept', 'What the organization calls it.'),
    ('public.campaigns', 'retry_rules purpose pause_reason', 'none', null, 'kept', 'Minutes, and words of lists.'),
    ('public.campaigns', 'lead_filter', 'none', null, 'kept', 'Ids, and words of lists.'),
    ('public.organizations', 'dial_countries', 'none', null, 'kept', 'Countries.'),
    ('public.projects', 'name address project_type status image_url image_path', 'none', null, 'kept', 'A development or a product line, not a person.'),
    ('public.properties', 'title address currency_code type status', 'none', null, 'kept', 'A building, not a person.'),
    ('public.invoices', '*', 'none', null, 'kept', 'A fiscal row: the organization''s own bill, kept by law.'),
    ('public.invoice_lines', '*', 'none', null, 'kept', 'A fiscal row: the organization''s own bill, kept by law.'),
    ('public.invoice_taxes', '*', 'none', null, 'kept', 'A fiscal row: the organization''s own bill, kept by law.'),
    ('public.credit_notes', '*', 'none', null, 'kept', 'A fiscal row: the organization''s own bill, kept by law.'),
    ('public.credit_note_lines', '*', 'none', null, 'kept', 'A fiscal row: the organization''s own bill, kept by law.'),
    ('public.credit_note_taxes', '*', 'none', null, 'kept', 'A fiscal row: the organization''s own bill, kept by law.'),
    ('public.payments', '*', 'none', null, 'kept', 'A fiscal row: the organization''s own bill, kept by law.'),
    ('public.payment_methods', '*', 'none', null, 'kept', 'A fiscal row: the organization''s own bill, kept by law.'),
    ('public.refunds', '*', 'none', null, 'kept', 'A fiscal row: the organization''s own bill, kept by law.'),
    ('public.credit_accounts', '*', 'none', null, 'kept', 'A fiscal row: the organization''s own bill, kept by law.'),
    ('public.credit_transactions', '*', 'none', null, 'kept', 'A fiscal row: the organization''s own bill, kept by law.'),
    ('public.call_credits', '*', 'none', null, 'kept', 'A fiscal row: the organization''s own bill, kept by law.'),
    ('public.subscriptions', '*', 'none', null, 'kept', 'A fiscal row: the organization''s own bill, kept by law.'),
    ('private.usage_events', '*', 'none', null, 'kept', 'What was counted, for the bill: a key of the counting system and an amount.'),
    ('private.usage_keys', '*', 'none', null, 'kept', 'What was counted, for the bill: a key of the counting system and an amount.'),
    ('private.usage_readings', '*', 'none', null, 'kept', 'What was counted, for the bill: a key of the counting system and an amount.'),
    ('private.usage_seals', '*', 'none', null, 'kept', 'What was counted, for the bill: sums by day.'),
    ('public.usage_days', '*', 'none', null, 'kept', 'What was counted, for the bill: a key of the counting system and an amount.'),
    ('public.organizations', '*', 'none', null, 'kept', 'An account of the system or the organization itself; its owner ends it.'),
    ('public.profiles', '*', 'none', null, 'kept', 'An account of the system or the organization itself; its owner ends it.'),
    ('public.invitations', '*', 'none', null, 'kept', 'An account of the system or the organization itself; its owner ends it.'),
    ('public.user_settings', '*', 'none', null, 'kept', 'An account of the system or the organization itself; its owner ends it.'),
    ('public.stores', '*', 'none', null, 'kept', 'Configuration of the organization, not about the people it calls.'),
    ('public.store_phone_numbers', '*', 'none', null, 'kept', 'Configuration of the organization, not about the people it calls.'),
    ('public.settings', '*', 'none', null, 'kept', 'Configuration of the organization, not about the people it calls.'),
    ('public.roles', '*', 'none', null, 'kept', 'Configuration of the organization, not about the people it calls.'),
    ('public.pipelines', '*', 'none', null, 'kept', 'Configuration of the organization, not about the people it calls.'),
    ('public.pipeline_stages', '*', 'none', null, 'kept', 'Configuration of the organization, not about the people it calls.'),
    ('public.lead_forms', '*', 'none', null, 'kept', 'Configuration of the organization, not about the people it calls.'),
    ('public.caller_numbers', '*', 'none', null, 'kept', 'Configuration of the organization, not about the people it calls.'),
    ('public.carrier_accounts', '*', 'none', null, 'kept', 'Configuration of the organization, not about the people it calls.'),
    ('public.webhook_sources', '*', 'none', null, 'kept', 'Configuration of the organization, not about the people it calls.'),
    ('public.stage_transitions', '*', 'none', null, 'kept', 'Configuration of the organization, not about the people it calls.'),
    ('private.dispatch_holds', '*', 'none', null, 'kept', 'Configuration of the organization, not about the people it calls.'),
    ('public.api_keys', '*', 'none', null, 'kept', 'A secret or its hash.'),
    ('private.store_credentials', '*', 'none', null, 'kept', 'A secret or its hash.'),
    ('private.user_credentials', '*', 'none', null, 'kept', 'A secret or its hash.'),
    ('private.erasure_salt', '*', 'none', null, 'kept', 'A secret or its hash.'),
    ('public.products', '*', 'none', null, 'kept', 'What a shop sells, not a person.'),
    ('public.product_images', '*', 'none', null, 'kept', 'What a shop sells, not a person.'),
    ('public.customer_totals', '*', 'none', null, 'kept', 'What a shop sells, not a person.'),
    ('public.call_analytics', '*', 'none', null, 'kept', 'What a shop sells, not a person.'),
    ('public.property_features', '*', 'none', null, 'kept', 'What a shop sells, not a person.'),
    ('public.property_images', '*', 'none', null, 'kept', 'What a shop sells, not a person.'),
    ('public.property_reservations', '*', 'none', null, 'kept', 'What a shop sells, not a person.'),
    ('public.permissions', '*', 'none', null, 'kept', 'Reference data.'),
    ('public.meters', '*', 'none', null, 'kept', 'Reference data.'),
    ('public.plan_prices', '*', 'none', null, 'kept', 'Reference data.'),
    ('public.plan_price_meters', '*', 'none', null, 'kept', 'Reference data.'),
    ('public.subscription_plans', '*', 'none', null, 'kept', 'Reference data.'),
    ('public.tax_rates', '*', 'none', null, 'kept', 'Reference data.'),
    ('public.calling_hours', '*', 'none', null, 'kept', 'Reference data.'),
    ('public.calling_holidays', '*', 'none', null, 'kept', 'Reference data.'),
    ('private.billing_issuer', '*', 'none', null, 'kept', 'Reference data.'),
    ('private.credit_note_series', '*', 'none', null, 'kept', 'Reference data.'),
    ('private.invoice_series', '*', 'none', null, 'kept', 'Reference data.'),
    ('private.dnc_registers', '*', 'none', null, 'kept', 'Reference data.'),
    ('private.dnc_versions', '*', 'none', null, 'kept', 'Reference data.'),
    ('private.setting_types', '*', 'none', null, 'kept', 'Reference data.'),
    ('private.dial_evidence', '*', 'none', null, 'kept', 'Ids, and words of lists.'),
    ('private.destinations', '*', 'none', null, 'kept', 'Reference data.'),
    ('private.caller_series', '*', 'none', null, 'kept', 'Reference data.'),
    ('private.campaign_days', '*', 'none', null, 'kept', 'Counts.'),
    ('private.carrier_checks', '*', 'none', null, 'kept', 'Where the carrier goes on.'),
    ('private.carrier_records', '*', 'none', null, 'kept', 'Ids and amounts, for as long as they are compared.'),
    ('private.restores', '*', 'none', null, 'kept', 'Times, and the operator''s words.'),
    ('private.restore_accounts', '*', 'none', null, 'kept', 'Where the carrier goes on.'),
    ('private.carrier_differences', '*', 'none', null, 'kept', 'Ids, amounts, and words of a list.'),
    ('private.consent_rules', '*', 'none', null, 'kept', 'Reference data.'),
    ('private.platform_dialling', '*', 'none', null, 'kept', 'Reference data.'),
    ('private.timezones', '*', 'none', null, 'kept', 'Reference data.'),
    ('public.call_logs', 'stream_id stream_status stream_error transfer_sid transfer_status', 'none', null, 'kept', 'The carrier''s ids and words of states.'),
    ('public.properties', 'tower unit_number', 'none', null, 'kept', 'What is sold, not a person.'),
    ('public.call_charges', '*', 'none', null, 'kept', 'A fiscal row: amounts and the call''s id.'),
    ('public.privacy_requests', '*', 'none', null, 'kept', 'Evidence that somebody asked, by the platform''s ids.'),
    ('private.usage_adjustments', '*', 'none', null, 'kept', 'What was counted, for the bill: ids and amounts.'),
    ('private.invoice_items', '*', 'none', null, 'kept', 'A fiscal row: what a line of the organization''s own bill will say.'),
    ('private.dunning_policy', '*', 'none', null, 'kept', 'Reference data.'),
    ('private.billing_requests', '*', 'none', null, 'kept', 'What an organization asked of its own subscription, for thirty days.'),
    ('private.coupons', '*', 'none', null, 'kept', 'Reference data.'),
    ('private.discounts', '*', 'none', null, 'kept', 'A fiscal row: what is taken off the organization''s own bills.'),
    ('private.call_corrections', '*', 'none', null, 'kept', 'A fiscal row: amounts and the call''s id.'),
    ('private.call_ratings', '*', 'none', null, 'kept', 'A fiscal row: amounts, the call''s id, and the prefix of a destination.'),
    ('private.call_costs', '*', 'none', null, 'kept', 'Amounts and the call''s id.'),
    ('private.rate_decks', '*', 'none', null, 'kept', 'Reference data.'),
    ('private.rate_deck_versions', '*', 'none', null, 'kept', 'Reference data.'),
    ('private.rates', '*', 'none', null, 'kept', 'Reference data.'),
    ('private.organization_rate_decks', '*', 'none', null, 'kept', 'Which price list an organization has.'),
    ('private.carrier_rate_decks', '*', 'none', null, 'kept', 'Which price list a carrier account has.'),
    ('private.exchange_rates', '*', 'none', null, 'kept', 'Reference data.'),
    ('private.payment_accounts', '*', 'none', null, 'kept', 'A secret or its hash.'),
    ('private.mandate_rules', '*', 'none', null, 'kept', 'Reference data.'),
    ('private.decline_codes', '*', 'none', null, 'kept', 'Reference data.'),
    ('private.payment_customers', '*', 'none', null, 'kept', 'Names a thing in another system, not a person.'),
    ('private.gateway_requests', '*', 'none', null, 'kept', 'A fiscal row: what was asked for the organization''s own bill.'),
    ('private.call_holds', '*', 'none', null, 'kept', 'Amounts.'),
    ('private.usage_holds', '*', 'none', null, 'kept', 'What is held for an event to come: a key of the counting system and an amount.'),
    ('private.unsettled_calls', '*', 'none', null, 'kept', 'Ids of calls, for five minutes.'),
    ('private.lead_requests', '*', 'none', null, 'kept', 'Ids, codes and hashes.'),
    ('private.rate_limits', '*', 'none', null, 'kept', 'Ids of keys and forms.'),
    ('private.store_tombstones', '*', 'none', null, 'kept', 'The platform''s ids of what it deleted.'),
    ('public.event_deliveries', 'response_body', 'content', null, 'scrub', null),
    ('public.event_deliveries', 'topic status error', 'none', null, 'kept', 'What was told, and how the way there went.'),
    ('public.webhook_endpoints', '*', 'none', null, 'kept', 'Where an organization''s own systems listen.'),
    ('private.webhook_endpoint_secrets', '*', 'none', null, 'kept', 'Sealed.'),
    ('private.event_sequences', '*', 'none', null, 'kept', 'The id of what something happened to.'),
    ('private.event_types', '*', 'none', null, 'kept', 'Reference data.'),
    ('private.gst_states', '*', 'none', null, 'kept', 'Reference data.'),
    ('private.billing_logos', '*', 'none', null, 'kept', 'The issuer''s.'),
    ('private.personal_data', '*', 'none', null, 'kept', 'Reference data.'),
    ('private.retention_rules', '*', 'none', null, 'kept', 'Reference data.'),
    ('private.dnc_entries', '*', 'none', null, 'kept', 'A public register, kept because the law asks whether it was looked at.'),
    ('private.dnc_staged', '*', 'none', null, 'kept', 'A public register, kept because the law asks whether it was looked at.')
) as listed (table_name, columns, found_by, via, treatment, reason)
cross join lateral unnest(string_to_array(listed.columns, ' ')) as named (column_name);

create function private.hash_number(phone text) returns bytea
language sql stable security definer set search_path = '' as $$
  select extensions.digest(salted.salt || convert_to(phone, 'utf8'), 'sha256') from private.erasure_salt as salted
$$;
comment on function private.hash_number(text) is 'The pseudonym by which an erased number is still known not to be called.';

create function private.is_suppressed(organization uuid, phone text) returns boolean
language plpgsql stable security definer set search_path = '' as $$
begin
  return exists (
      select
      from public.suppressions as suppression
      where suppression.organization_id = organization and suppression.phone_number = phone
    )
    or exists (
      select
      from private.erased_numbers as erased
      where erased.organization_id = organization and erased.phone_hash = private.hash_number(phone)
    );
end
$$;
comment on function private.is_suppressed(uuid, text) is
  'Whether an organization must not call a number: it is suppressed, or was that of a person who has been erased.';

create function private.phone_pattern(phones text[]) returns text
language sql immutable set search_path = '' as $$
  -- As people and providers write it: with or without plus, country code and leading zero, escaped, and with separators between.
  select '(?<![0-9])(' || string_agg(
    case
      when length(number.digits) > 10
        then '([+]|%2[bB]|00)?(' || left(number.digits, -10) || '[ ().-]{0,2})?0?' || spaced.digits
      else '[+]?' || spaced.digits
    end,
    '|'
  ) || ')(?![0-9])'
  from unnest(phones) as written (phone)
  cross join lateral (select regexp_replace(written.phone, '[^0-9]', '', 'g') as digits) as number
  cross join lateral (select array_to_string(string_to_array(right(number.digits, 10), null), '[ ().-]{0,2}') as digits) as spaced
  where length(number.digits) >= 7
$$;
comment on function private.phone_pattern(text[]) is 'What finds these numbers in a text; null for none.';

create function private.email_pattern(emails text[]) returns text
language sql immutable set search_path = '' as $$
  select '(?<![a-z0-9._+-])(' || string_agg(
    replace(regexp_replace(lower(written.email), '([^a-z0-9@])', '\\\1', 'g'), '@', '(@|%40)'), '|'
  ) || ')(?![a-z0-9-]|[.][a-z0-9])'
  from unnest(emails) as written (email)
  where written.email like '%_@_%'
$$;
comment on function private.email_pattern(text[]) is 'What finds these addresses in a text, in lower case; null for none.';

create function private.keep_erased() returns trigger
language plpgsql set search_path = '' as $$
begin
  new.recording_url := null;
  new.recording_id := null;
  new.conversation_transcript := null;
  new.ai_analysis := null;
  new.summary := null;
  new.interest_level := null;
  new.transfer_reason := null;
  new.disconnect_notes := null;
  new.notes := null;
  new.metadata := '{}';
  return new;
end
$$;
comment on function private.keep_erased() is 'Trigger: an erased leg may still learn what it cost, and nothing that was said.';
create trigger keep_erased before update on public.call_logs
  for each row when (old.erased_at is not null) execute function private.keep_erased();

create function private.keep_event_erased() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  -- Copied, deleted or on a queue meanwhile: what comes late of an erased person is known by its key, and not kept.
  if exists (select from public.call_logs as log where log.id = new.attempt_id and log.erased_at is not null) then
    new.headers := null;
    new.body := null;
    new.payload := null;
  end if;
  return new;
end
$$;
comment on function private.keep_event_erased() is 'Trigger: an event about an erased leg is stored without what it says.';
create trigger keep_event_erased before insert on private.webhook_events
  for each row when (new.attempt_id is not null) execute function private.keep_event_erased();

create function private.keep_conversation_erased() returns trigger
language plpgsql set search_path = '' as $$
begin
  new.customer_identifier := null;
  new.customer_name := null;
  new.title := null;
  new.summary := null;
  new.primary_intent := null;
  new.escalation_reason := null;
  new.ai_context := '{}';
  new.platform_data := '{}';
  new.conversation_history := '[]';
  new.tags := '{}';
  return new;
end
$$;
comment on function private.keep_conversation_erased() is 'Trigger: an erased conversation may still end, and learns nothing that was said.';
create trigger keep_erased before update on public.conversations
  for each row when (old.erased_at is not null) execute function private.keep_conversation_erased();

create function private.keep_message_erased() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  if exists (
    select
    from public.conversations as talk
    where talk.organization_id = new.organization_id and talk.id = new.conversation_id and talk.erased_at is not null
  ) then
    return null;
  end if;
  return new;
end
$$;
comment on function private.keep_message_erased() is 'Trigger: an erased conversation takes no message.';
create trigger keep_erased before insert on public.conversation_messages
  for each row execute function private.keep_message_erased();

create function private.keep_activity_erased() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  if exists (
    select from public.leads as lead where lead.organization_id = new.organization_id and lead.id = new.lead_id and lead.erased_at is not null
  ) then
    new.content := '{}';
  end if;
  return new;
end
$$;
comment on function private.keep_activity_erased() is 'Trigger: what happens with an erased lead is noted, and not what was said.';
create trigger keep_erased before insert on public.lead_activities
  for each row execute function private.keep_activity_erased();

create function private.customer_key(store uuid, external_id text) returns text
language sql immutable parallel safe set search_path = '' as $$
  select case when external_id not like 'erased:%' then 'customer|' || store || '|' || external_id end
$$;
comment on function private.customer_key(uuid, text) is 'What a shop''s name for a customer is called in private.erased_persons.';

create function private.was_erased(event private.webhook_events, since timestamptz) returns boolean
language plpgsql stable security definer set search_path = '' as $$
declare
  shop uuid;
begin
  if not exists (
    select
    from private.erased_persons as known
    where (known.organization_id = event.organization_id or event.organization_id is null) and known.erased_at >= since
  ) then
    return false;
  end if;
  shop := (select source.store_id from public.webhook_sources as source where source.id = private.to_uuid(event.source_id));
  return exists (
    select
    from (
      select unnest(private.person_keys(event.body, event.payload::text)) as key
      union all select private.customer_key(shop, event.payload #>> '{customer,external_id}')
      union all select private.customer_key(shop, event.payload #>> '{order,customer_external_id}')
    ) as named
    join private.erased_persons as known
      on known.key_hash = private.hash_number(named.key) and known.erased_at >= since
      and (known.organization_id = event.organization_id or event.organization_id is null)
  );
end
$$;
comment on function private.was_erased(private.webhook_events, timestamptz) is
  'Whether an event names somebody whom its organization, or any where it is nobody''s, has erased since it came.';

-- The statements that erase() puts together, of private.personal_data alone, which migrations write: nobody calls these two but it.
create function private.empty_listed(
  table_name text, found_by text, via text, assignments text, organization uuid, ids uuid[], phones text[]
) returns bigint
language plpgsql volatile security definer set search_path = '' as $$
declare
  statement text;
  done      bigint;
begin
  if assignments is null then
    statement := format('delete from %s where organization_id = $1 and %I ', table_name::regclass, via);
  else
    statement := format('update %s set %s where organization_id = $1 and %I ', table_name::regclass, assignments, via);
  end if;
  if found_by = 'event' then
    statement := replace(statement, 'organization_id = $1', '(organization_id = $1 or organization_id is null)');
  end if;
  if found_by = 'phone' then
    execute statement || '= any ($2)' using organization, phones;
  else
    execute statement || '= any ($2)' using organization, ids;
  end if;
  get diagnostics done = row_count;
  return done;
end
$$;
comment on function private.empty_listed(text, text, text, text, uuid, uuid[], text[]) is
  'Empties the listed columns of a table in an organization''s rows of the person, or deletes the rows: how many.';

create function private.scrub_listed(
  table_name text, column_name text, treatment text, organization uuid, by_phone text, by_email text
) returns bigint
language plpgsql volatile security definer set search_path = '' as $$
declare
  type             text;
  has_organization boolean;
  scope            text;
  done             bigint;
begin
  select
    pg_catalog.format_type(attribute.atttypid, null),
    exists (
      select
      from pg_catalog.pg_attribute as owner
      where owner.attrelid = attribute.attrelid and owner.attname = 'organization_id' and not owner.attisdropped
    )
  into strict type, has_organization
  from pg_catalog.pg_attribute as attribute
  where attribute.attrelid = scrub_listed.table_name::regclass and attribute.attname = scrub_listed.column_name and not attribute.attisdropped;
  scope := case when has_organization then '(organization_id = $1 or organization_id is null) and ' else '$1 is not null and ' end
    || format('(%1$I::text ~ $2 or lower(%1$I::text) ~ $3)', scrub_listed.column_name);
  if treatment = 'delete' then
    execute format('delete from %s where %s', scrub_listed.table_name::regclass, scope) using organization, by_phone, by_email;
  else
    -- A number may stand in JSON without quotes, so a digit takes its place there.
    execute format(
      'update %1$s set %2$I = coalesce(regexp_replace(coalesce(regexp_replace(%2$I::text, $2, %3$L, ''g''), %2$I::text), $3, ''erased'', ''gi''), '
      'regexp_replace(%2$I::text, $2, %3$L, ''g''), %2$I::text)::%4$s where %5$s',
      scrub_listed.table_name::regclass, scrub_listed.column_name, case type when 'jsonb' then '0' else 'erased' end, type, scope
    )
    using organization, by_phone, by_email;
  end if;
  get diagnostics done = row_count;
  return done;
end
$$;
comment on function private.scrub_listed(text, text, text, uuid, text, text) is
  'Cuts a person''s numbers and addresses out of a listed column wherever an organization''s rows name them, or deletes the rows: how many.';

create function private.erase(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization  constant uuid := (request ->> 'organization_id')::uuid;
  store         constant uuid := (request ->> 'store_id')::uuid;
  asked_phone   constant text := nullif('+' || regexp_replace(coalesce(request ->> 'phone', ''), '[^0-9]', '', 'g'), '+');
  asked_email   constant text := nullif(lower(btrim(coalesce(request ->> 'email', ''))), '');
  external      constant text := nullif(request ->> 'customer_external_id', '');
  whole_store   constant boolean := asked_phone is null and asked_email is null and external is null and store is not null;
  leads         uuid[] := '{}'::uuid[];
  customers     uuid[];
  orders        uuid[];
  attempts      uuid[];
  calls         uuid[];
  conversations uuid[];
  events        uuid[];
  phones        text[];
  emails        text[];
  by_phone      text;
  by_email      text;
  keys          text[];
  target        record;
  done          bigint;
  rows_of       jsonb := '{}'::jsonb;
begin
  if organization is null or (asked_phone is null and asked_email is null and external is null and store is null) then
    perform private.raise_error(400, 'malformed_request', 'organization_id and a phone, an email or a store are required');
  end if;
  if external is not null and store is null then
    perform private.raise_error(400, 'malformed_request', 'A customer''s id is one of a store', 'store_id');
  end if;

  -- Who it is. Everything that hangs on the person is found by ids; what merely names them, by pattern.
  if not whole_store then
    leads := array(
      select lead.id
      from public.leads as lead
      where lead.organization_id = organization and (lead.phone = asked_phone or lower(lead.email) = asked_email)
    );
  end if;
  customers := array(
    select customer.id
    from public.customers as customer
    where customer.organization_id = organization
      and (
        customer.phone = asked_phone
        or lower(customer.email) = asked_email
        or customer.store_id = store and (whole_store or customer.external_id = external)
      )
  );
  orders := array(
    select purchase.id
    from public.orders as purchase
    where purchase.organization_id = organization
      and (
        purchase.customer_id = any (customers)
        or purchase.customer_phone = asked_phone
        or lower(purchase.customer_email) = asked_email
        or purchase.store_id = store and (whole_store or purchase.customer_external_id = external)
      )
  );
  calls := array(
    select call.id
    from public.calls as call
    where call.organization_id = organization
      and (
        call.customer_id = any (customers) or call.order_id = any (orders)
        or asked_phone = case call.direction when 'outbound' then call.to_phone else call.from_phone end
        or whole_store and call.store_id = store
      )
  );
  attempts := array(
    select log.id
    from public.call_logs as log
    where log.organization_id = organization
      and (
        log.lead_id = any (leads)
        or asked_phone = case log.direction when 'outbound' then log.callee_number else log.caller_number end
        or log.id in (select call.call_log_id from public.calls as call where call.organization_id = organization and call.id = any (calls))
      )
  );
  calls := calls || array(
    select call.id
    from public.calls as call
    where call.organization_id = organization and call.call_log_id = any (attempts) and call.id <> all (calls)
  );
  conversations := array(
    select talk.id
    from public.conversations as talk
    where talk.organization_id = organization
      and (
        talk.customer_id = any (customers) or talk.order_id = any (orders)
        or talk.customer_identifier = asked_phone or lower(talk.customer_identifier) = asked_email
        or whole_store and talk.store_id = store
        or talk.id in (select call.conversation_id from public.calls as call where call.organization_id = organization and call.id = any (calls))
      )
  );
  phones := array(
    select distinct known.number
    from (
      select asked_phone as number
      union all select lead.phone from public.leads as lead where lead.id = any (leads)
      union all select customer.phone from public.customers as customer where customer.id = any (customers)
      union all select purchase.customer_phone from public.orders as purchase where purchase.id = any (orders)
      union all
        select case log.direction when 'outbound' then log.callee_number else log.caller_number end
        from public.call_logs as log
        where log.id = any (attempts)
    ) as known
    where known.number ~ '[0-9]{7}'
  );
  emails := array(
    select distinct lower(known.address)
    from (
      select asked_email as address
      union all select lead.email from public.leads as lead where lead.id = any (leads)
      union all select customer.email from public.customers as customer where customer.id = any (customers)
      union all select purchase.customer_email from public.orders as purchase where purchase.id = any (orders)
    ) as known
    where known.address is not null
  );
  by_phone := private.phone_pattern(phones);
  by_email := private.email_pattern(emails);

  perform private.lock_attempts(attempts);
  if exists (select from public.call_logs as log where log.id = any (attempts) and log.status <> 'ended') then
    perform private.raise_error(409, 'call_in_progress', 'The person is being called now; once the call has ended they can be erased');
  end if;
  keys := private.person_keys(variadic phones || emails);
  -- Each by an index; the keys find all that the patterns would, and now and then an order's number.
  events := array(
    select event.id
    from private.webhook_events as event
    where event.attempt_id = any (attempts) and (event.organization_id = organization or event.organization_id is null)
    union
    select event.id
    from private.webhook_events as event
    where private.person_keys(event.body, event.payload::text, event.headers::text, event.error) && array_append(keys, '*')
      and (event.organization_id = organization or event.organization_id is null)
      and (
        event.body ~ by_phone or lower(event.body) ~ by_email
        or event.payload::text ~ by_phone or lower(event.payload::text) ~ by_email
        or event.headers::text ~ by_phone or lower(event.headers::text) ~ by_email
        or event.error ~ by_phone or lower(event.error) ~ by_email
      )
    union
    select key.event_id
    from public.webhook_sources as source
    join private.webhook_event_keys as key on key.source = source.provider and key.source_id = source.id::text
    where whole_store and source.organization_id = organization and source.store_id = store
  );

  perform set_config('trunkline.erasing', 'on', true);
  -- An erased person is still not called: the number goes, its salted hash stays.
  if coalesce((request ->> 'suppress')::boolean, true) then
    insert into private.erased_numbers (organization_id, phone_hash, erased_at)
    select organization, private.hash_number(known.number), at
    from unnest(phones) as known (number)
    on conflict do nothing;
  else
    insert into private.erased_numbers (organization_id, phone_hash, erased_at)
    select organization, private.hash_number(suppression.phone_number), at
    from public.suppressions as suppression
    where suppression.organization_id = organization and suppression.phone_number = any (phones)
    on conflict do nothing;
  end if;
  -- What waits on a queue, or comes again from there, brings nobody back.
  insert into private.erased_persons as known (organization_id, key_hash, erased_at)
  select distinct organization, private.hash_number(named.key), at
  from (
    select unnest(keys) as key
    union all
    select private.customer_key(customer.store_id, customer.external_id) from public.customers as customer where customer.id = any (customers)
    union all
    select private.customer_key(store, external) where external is not null
  ) as named
  where named.key not like 'erased:%'
  on conflict (organization_id, key_hash) do update set erased_at = greatest(known.erased_at, excluded.erased_at);
  insert into private.storage_deletions (path, requested_at)
  select copy.path, at
  from private.recordings as copy
  where copy.organization_id = organization and copy.attempt_id = any (attempts) and copy.path is not null
  on conflict (path) do update set next_try_at = now();
  update private.storage_deletions as held
  set next_try_at = now()
  from private.webhook_events as event
  where event.id = any (events) and held.path = event.payload #>> '{recording,path}';
  update private.recordings as copy
  set state = 'erased', url = null, reason = null, next_try_at = null, lease_token = null, settled_at = coalesce(copy.settled_at, at)
  where copy.organization_id = organization and copy.attempt_id = any (attempts);

  for target in
    select
      listed.table_name, listed.found_by, listed.via, bool_or(listed.treatment = 'delete') as is_deleted,
      string_agg(
        format('%I = ', listed.column_name) || case listed.treatment
          when 'null' then 'null'
          when 'text' then '''erased'''
          when 'object' then '''{}'''
          when 'array' then '''[]'''
          when 'list' then '''{}'''
          when 'key' then '''erased:'' || id'
          when 'callee' then format('case when direction = ''outbound'' then ''anonymous'' else %I end', listed.column_name)
          when 'caller' then format('case when direction = ''inbound'' then ''anonymous'' else %I end', listed.column_name)
        end,
        ', ' order by listed.column_name
      ) filter (where listed.treatment <> 'delete') as assignments
    from private.personal_data as listed
    where listed.found_by not in ('content', 'none') and to_regclass(listed.table_name) is not null
    group by listed.table_name, listed.found_by, listed.via
    -- Legs before the store's calls that follow them; see the order of locks in 06_campaigns_and_calling.sql.
    order by
      array_position(
        array['public.call_logs', 'public.call_queue', 'public.campaign_leads', 'public.leads', 'public.calls', 'public.conversations', 'public.customers'],
        listed.table_name
      ) nulls last,
      listed.table_name
  loop
    done := private.empty_listed(
      target.table_name, target.found_by, target.via, case when not target.is_deleted then target.assignments end, organization,
      case target.found_by
        when 'lead' then leads
        when 'customer' then customers
        when 'order' then orders
        when 'attempt' then attempts
        when 'store_call' then calls
        when 'conversation' then conversations
        when 'event' then events
      end,
      phones
    );
    if done > 0 then
      rows_of := rows_of || jsonb_build_object(target.table_name, done);
    end if;
  end loop;
  update public.call_logs as log set erased_at = coalesce(log.erased_at, at) where log.id = any (attempts);
  update public.conversations as talk set erased_at = coalesce(talk.erased_at, at) where talk.id = any (conversations);
  -- Nobody waits to call them any more: the next release ends what is queued.
  update public.leads as lead
  set
    archived_at = coalesce(lead.archived_at, at), do_not_call = true, opted_out_at = coalesce(lead.opted_out_at, at),
    erased_at = coalesce(lead.erased_at, at)
  where lead.id = any (leads);
  -- What says nothing any more is not tried again.
  update private.webhook_events as event
  set status = 'ignored', error = 'erased', next_try_at = null
  where event.id = any (events) and event.status in ('failed', 'dead');

  if by_phone is not null or by_email is not null then
    for target in
      select listed.table_name, listed.column_name, listed.treatment
      from private.personal_data as listed
      where listed.found_by = 'content' and to_regclass(listed.table_name) is not null
      -- The audit last: what is cut out elsewhere may leave a line that says what was there.
      order by listed.table_name like '%audit_logs', listed.table_name, listed.column_name
    loop
      done := private.scrub_listed(target.table_name, target.column_name, target.treatment, organization, by_phone, by_email);
      if done > 0 then
        rows_of := rows_of || jsonb_build_object(
          target.table_name, coalesce((rows_of ->> target.table_name)::bigint, 0) + done
        );
      end if;
    end loop;
  end if;
  perform set_config('trunkline.erasing', '', true);

  perform private.audit(
    organization, case when whole_store then 'store.erased' else 'person.erased' end,
    case when whole_store then 'store' else 'person' end, case when whole_store then store end,
    jsonb_build_object('rows', rows_of, 'recordings', (
      select count(*) from private.recordings as copy where copy.attempt_id = any (attempts) and copy.path is not null
    )),
    at
  );
  return jsonb_build_object('erased', rows_of <> '{}', 'rows', rows_of);
end
$$;
comment on function private.erase(jsonb, timestamptz) is
  'Erases a person from an organization: {"organization_id","phone"?,"email"?,"store_id"?,"customer_external_id"?,"suppress"?}; with store_id alone every '
  'customer of the store. All that private.personal_data lists is emptied, recordings are deleted by the sweep, and the number is kept as a salted hash, so that it is '
  'never called again. Fiscal rows stay. Again changes nothing. 409 while a call with the person is under way.';

create function public.erase(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.erase($1, private.clock_now())
$$;
comment on function public.erase(jsonb) is
  '{"v":1,"organization_id","phone"?,"email"?,"store_id"?,"customer_external_id"?,"suppress"?:true} -> {"erased":bool,"rows":{table: n}}.';

create function private.erase_person(phone text, email text, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('lead.delete');
begin
  if nullif(btrim(coalesce(phone, '')), '') is null and nullif(btrim(coalesce(email, '')), '') is null then
    perform private.raise_error(422, 'person_required', 'A phone number or an email address says who it is', 'phone');
  end if;
  if phone is not null and phone !~ '^\+[1-9][0-9]{6,14}$' then
    perform private.raise_error(422, 'invalid_phone', 'A phone number is written as +, country code and number', 'phone');
  end if;
  return private.erase(
    jsonb_build_object(
      'organization_id', organization,
      'phone', erase_person.phone, 'email', erase_person.email
    ),
    at
  );
end
$$;
comment on function private.erase_person(text, text, timestamptz) is 'Erases a person from the caller''s organization.';

create function public.erase_person(phone text default null, email text default null) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.erase_person(phone, email, private.clock_now())
$$;
comment on function public.erase_person(text, text) is
  'Leaves no trace of a person, by phone number, email address or both, in the caller''s organization, but for its bills. They are never called again. '
  'Needs lead.delete. Returns {"erased","rows":{table: n}}.';


revoke execute on function
  private.note_recording(), private.take_recordings(), private.with_recordings(jsonb), private.due_recordings(integer), private.with_due_work(jsonb),
  private.find_events(uuid, jsonb, integer),
  private.list_events(uuid, jsonb), private.get_event(uuid, uuid), private.redrive_events(uuid, uuid[], jsonb, timestamptz),
  private.count_events(uuid, jsonb, timestamptz), private.hash_number(text), private.is_suppressed(uuid, text), private.phone_pattern(text[]),
  private.email_pattern(text[]), private.keep_erased(), private.keep_event_erased(), private.keep_conversation_erased(),
  private.keep_message_erased(), private.keep_activity_erased(), private.hold_object(text, timestamptz),
  private.take_object(public.call_logs, jsonb, timestamptz), private.customer_key(uuid, text),
  private.was_erased(private.webhook_events, timestamptz),
  private.drop_month(regclass), private.delete_before(regclass, name, timestamptz), private.first_time(regclass, name),
  private.strip_between(regclass, name, text[], timestamptz, timestamptz), private.count_astray(regclass),
  private.empty_listed(text, text, text, text, uuid, uuid[], text[]), private.scrub_listed(text, text, text, uuid, text, text)
from public;
revoke execute on function
  private.claim_recordings(jsonb, timestamptz), public.claim_recordings(jsonb),
  private.record_recordings(jsonb, timestamptz), public.record_recordings(jsonb),
  private.claim_deletions(jsonb, timestamptz), public.claim_deletions(jsonb),
  private.record_deletions(jsonb, timestamptz), public.record_deletions(jsonb),
  private.open_recording(uuid, timestamptz), public.open_recording(uuid),
  private.list_webhook_events(jsonb), public.list_webhook_events(jsonb),
  private.get_webhook_event(uuid), public.get_webhook_event(uuid),
  private.redrive_webhook_events(uuid[], jsonb, timestamptz), public.redrive_webhook_events(uuid[], jsonb),
  private.count_webhook_events(timestamptz, timestamptz), public.count_webhook_events(timestamptz),
  public.list_events(jsonb), public.get_event(jsonb), public.redrive_events(jsonb), public.count_events(jsonb),
  private.seal_usage(regclass, timestamptz), private.forget_events(private.retention_rules, integer, timestamptz),
  private.apply_retention(jsonb, timestamptz), public.apply_retention(jsonb),
  private.erase(jsonb, timestamptz), public.erase(jsonb),
  private.erase_person(text, text, timestamptz), public.erase_person(text, text)
from public, anon, authenticated, service_role;
grant execute on function
  private.open_recording(uuid, timestamptz), public.open_recording(uuid),
  private.list_webhook_events(jsonb), public.list_webhook_events(jsonb),
  private.get_webhook_event(uuid), public.get_webhook_event(uuid),
  private.redrive_webhook_events(uuid[], jsonb, timestamptz), public.redrive_webhook_events(uuid[], jsonb),
  private.count_webhook_events(timestamptz, timestamptz), public.count_webhook_events(timestamptz),
  private.erase_person(text, text, timestamptz), public.erase_person(text, text)
to authenticated;
grant execute on function
  private.with_recordings(jsonb), private.with_due_work(jsonb),
  private.claim_recordings(jsonb, timestamptz), public.claim_recordings(jsonb),
  private.record_recordings(jsonb, timestamptz), public.record_recordings(jsonb),
  private.claim_deletions(jsonb, timestamptz), public.claim_deletions(jsonb),
  private.record_deletions(jsonb, timestamptz), public.record_deletions(jsonb),
  private.list_events(uuid, jsonb), private.get_event(uuid, uuid), private.redrive_events(uuid, uuid[], jsonb, timestamptz),
  private.count_events(uuid, jsonb, timestamptz),
  public.list_events(jsonb), public.get_event(jsonb), public.redrive_events(jsonb), public.count_events(jsonb),
  private.apply_retention(jsonb, timestamptz), public.apply_retention(jsonb),
  private.erase(jsonb, timestamptz), public.erase(jsonb)
to service_role;
