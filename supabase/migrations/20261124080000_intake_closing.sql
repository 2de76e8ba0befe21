-- What was left of the record and the intake: an erased person's raw events are found by an index, what waits on a queue brings nobody
-- back, and sound that an agent sends along becomes its call's recording.

set local lock_timeout = '5s';
set local statement_timeout = '60s';

create function private.person_keys(variadic texts text[]) returns text[]
language plpgsql immutable parallel safe cost 1000 set search_path = '' set jit = off as $$
declare
  written constant text := lower(array_to_string(texts, E'\n'));
  numbers constant text[] := array(
    select distinct run.match[1] from regexp_matches(written, '[0-9](?:[ ().-]{0,2}[0-9]){6,}', 'g') as run (match)
  );
  number  text;
  keys    text[] := '{}'::text[];
begin
  foreach number in array numbers loop
    if number !~ '[ ().-]' then
      keys := keys || right(number, 10);
    elsif length(number) > 1000 then
      -- No person writes so; whoever looks for one looks here too.
      keys := keys || '*'::text;
    else
      -- A number may begin and end with any of the pieces, and what has more than ten digits is known by the last ten.
      keys := keys || array(
        select distinct right(joined.text, 10)
        from (
          select array_agg(piece.text) over (order by piece.place rows between 9 preceding and current row) as latest
          from regexp_split_to_table(number, '[ ().-]+') with ordinality as piece (text, place)
        ) as pieces
        cross join generate_subscripts(pieces.latest, 1) as beginning
        cross join array_to_string(pieces.latest[beginning:], '') as joined (text)
        where length(joined.text) >= 7
      );
    end if;
  end loop;
  if written ~ '@|%40' then
    keys := keys || array(
      select distinct address.match[1] || '@' || rtrim(address.match[2], '.-')
      from regexp_matches(written, '([a-z0-9._+-]*)(?:@|%40)([a-z0-9.-]*)', 'g') as address (match)
    );
  end if;
  return keys;
end
$$;
comment on function private.person_keys(text[]) is
  'What may be a phone number or an address in texts: the last ten digits of whatever reads as a number, and addresses in lower case. Of a number or an '
  'address itself it gives the key by which every text that private.phone_pattern() or private.email_pattern() would find is found by an index; * is in texts that are too odd to say.';
revoke execute on function private.person_keys(text[]) from public;

-- Nothing is in it that the row does not say itself: who is erased from the row is gone from here.
-- Before the first release no installation is in use: the table is small.
-- squawk-ignore require-concurrent-index-creation
create index idx_webhook_events_people on private.webhook_events
  using gin (private.person_keys(body, payload::text, headers::text, error)) with (fastupdate = off);

create table private.erased_persons (
  organization_id uuid not null references public.organizations (id) on delete cascade,
  key_hash        bytea not null check (length(key_hash) = 32),
  erased_at       timestamptz not null,
  primary key (organization_id, key_hash)
);
create index idx_erased_persons_erased_at on private.erased_persons (erased_at);
select private.close_table('private.erased_persons');
comment on table private.erased_persons is
  'By what an erased person was known, as salted hashes: an event that waited on a queue meanwhile brings nobody back. Rows go after 90 days, when no queue '
  'holds anything older.';
comment on column private.erased_persons.key_hash is 'Of a key of private.person_keys(), or of a shop''s name for a customer.';

update private.personal_data set found_by = 'event', via = 'id', treatment = 'null'
where table_name = 'private.webhook_events' and column_name = 'error';
insert into private.personal_data (table_name, column_name, found_by, treatment, reason)
values ('private.erased_persons', '*', 'none', 'kept', 'Salted hashes, for as long as a queue may hold an event of before.');

create or replace function private.store_event(request jsonb, told jsonb, at timestamptz) returns private.webhook_events
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

comment on function public.apply_event(jsonb) is
  '{"v":1,"source","source_id","verified":true,"headers","body","events":[{"kind","dedupe_key","attempt_id"?,"payload":{"type",…},'
  '"unmapped"?:[{"field","value"}],"note"?}]} -> {"result":"applied|duplicate|ignored|orphan|failed","organization_id","results"? of several,'
  '"recordings"?:[{"organization_id","id"}] to copy}. A single event may stand at the top, a call as "call":{…}. What waited on a queue says '
  'when it had come, "received_at".';

create or replace function private.sweep_events(request jsonb, at timestamptz) returns jsonb
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
    if private.note_activity(
      attempt, 'tool|' || coalesce(tool ->> 'id', ''),
      case tool ->> 'name'
        when 'transfer' then 'transfer' when 'callback' then 'callback' when 'opt_out' then 'opt_out' when 'site_visit' then 'site_visit'
        else 'agent_tool'
      end,
      jsonb_build_object('tool', tool -> 'called', 'arguments', tool -> 'arguments', 'when', moment), used_at
    ) then
      noted := true;
    end if;
    case tool ->> 'name'
      when 'transfer' then
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
      disconnect_notes = updated.disconnect_notes, recording_url = updated.recording_url, metadata = updated.metadata
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

create or replace function private.record_recordings(request jsonb, at timestamptz) returns jsonb
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

create or replace function private.apply_retention(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
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
begin
  -- Whoever reads or writes the table for long is not made to wait behind this: there is a next run.
  perform set_config('lock_timeout', '2s', true);
  for rule in
    select known.* from private.retention_rules as known where to_regclass(known.table_name) is not null order by known.table_name for update
  loop
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
          perform private.drop_month(to_regclass(format('private.%I', part.name)));
          dropped := dropped || to_jsonb('private.' || part.name);
        exception when lock_not_available then
          raise notice '% is in use; it is dropped at the next run', part.name;
        end;
      end loop;
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
  return jsonb_build_object('dropped', dropped, 'deleted', deleted, 'stripped', stripped, 'unplaced', unplaced);
end
$$;

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

create or replace function private.erase(request jsonb, at timestamptz) returns jsonb
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

revoke execute on function
  private.hold_object(text, timestamptz), private.take_object(public.call_logs, jsonb, timestamptz), private.customer_key(uuid, text),
  private.was_erased(private.webhook_events, timestamptz),
  private.drop_month(regclass), private.delete_before(regclass, name, timestamptz), private.first_time(regclass, name),
  private.strip_between(regclass, name, text[], timestamptz, timestamptz), private.count_astray(regclass),
  private.empty_listed(text, text, text, text, uuid, uuid[], text[]), private.scrub_listed(text, text, text, uuid, text, text)
from public;
