-- What it takes to operate the intake: recordings copied, events found and sent through again, old months dropped, persons erased.

set local lock_timeout = '5s';
set local statement_timeout = '60s';

-- Evidence and records give way to an erasure, and to nothing else.

create or replace function private.refuse_change() returns trigger
language plpgsql set search_path = '' as $$
begin
  -- What an erased person left in a line's detail is cut out of it; nobody else may ask for that.
  if tg_op = 'UPDATE' and current_setting('trunkline.erasing', true) = 'on' then
    return null;
  end if;
  raise exception '% is only ever added to', tg_table_name using errcode = 'restrict_violation';
end
$$;
comment on function private.refuse_change() is 'Trigger: a table that is only ever added to, but for what erase() cuts out.';

create or replace function private.guard_impersonation() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  target public.profiles;
begin
  if tg_op = 'INSERT' then
    select profile.* into target from public.profiles as profile where profile.id = new.target_user_id for key share;
    if target.organization_id is distinct from new.organization_id or target.status <> 'active' or target.system_role = 'platform_admin'
      or not exists (
        select
        from public.profiles as admin
        where admin.id = new.admin_id and admin.system_role = 'platform_admin' and admin.status = 'active'
      )
    then
      raise exception 'a platform admin acts for an active user of the organization' using errcode = 'check_violation';
    end if;
    return new;
  end if;
  if tg_op = 'UPDATE' and current_setting('trunkline.erasing', true) = 'on' then
    return new;
  end if;
  if tg_op = 'DELETE' or old.ended_at is not null
    or to_jsonb(new) - array['ended_at', 'ended_by', 'active'] is distinct from to_jsonb(old) - array['ended_at', 'ended_by', 'active']
  then
    raise exception 'a support session is on record: it is only ended, once' using errcode = 'restrict_violation';
  end if;
  return new;
end
$$;

create or replace function private.guard_consent() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  if tg_op = 'INSERT' then
    if new.granted_at > private.clock_now() + interval '5 minutes' then
      perform private.raise_error(422, 'granted_in_future', 'Nobody has agreed yet', 'granted_at');
    end if;
    if new.lead_id is not null and not exists (
      select
      from public.leads as lead
      where lead.organization_id = new.organization_id and lead.id = new.lead_id and lead.phone = new.phone_number
    ) then
      perform private.raise_error(422, 'number_of_another', 'The lead has another number', 'phone_number');
    end if;
    return new;
  end if;
  -- The organization's end takes its evidence along, and so does a person's erasure; otherwise a reference may fall away, and a consent is withdrawn once.
  if tg_op = 'DELETE' then
    if current_setting('trunkline.erasing', true) is distinct from 'on'
      and exists (select from public.organizations as tenant where tenant.id = old.organization_id)
    then
      raise exception 'a consent is evidence: it is revoked, never deleted' using errcode = 'restrict_violation';
    end if;
    return old;
  end if;
  if to_jsonb(new) - array['lead_id', 'created_by', 'revoked_at', 'revoke_reason']
      is distinct from to_jsonb(old) - array['lead_id', 'created_by', 'revoked_at', 'revoke_reason']
    or (new.lead_id is distinct from old.lead_id and new.lead_id is not null)
    or (new.created_by is distinct from old.created_by and new.created_by is not null)
    or old.revoked_at is not null and (new.revoked_at, new.revoke_reason) is distinct from (old.revoked_at, old.revoke_reason)
  then
    raise exception 'a consent is evidence: it is revoked, never changed' using errcode = 'restrict_violation';
  end if;
  return new;
end
$$;


-- Recordings ----------------------------------------------------------------------------------------------------------------------
-- A carrier keeps a recording for a while, Telnyx its link for ten minutes: whoever learns of one leaves the work of copying it in
-- the same transaction. This table is the queue of record, the queue `recording` only its nudge.

create table private.recordings (
  id              uuid primary key default private.uuid_v7(),
  organization_id uuid not null references public.organizations (id) on delete cascade,
  attempt_id      uuid not null unique,
  url             text,
  state           text not null default 'pending' check (state in ('pending', 'copied', 'refused', 'failed', 'erased')),
  reason          text,
  tries           integer not null default 0 check (tries >= 0),
  next_try_at     timestamptz default now(),
  nudged_at       timestamptz,
  lease_token     uuid,
  path            text unique,
  bytes           bigint check (bytes >= 0),
  content_type    text,
  created_at      timestamptz not null,
  settled_at      timestamptz,
  foreign key (organization_id, attempt_id) references public.call_logs (organization_id, id) on delete cascade,
  check ((state = 'pending') = (next_try_at is not null)),
  check (state <> 'copied' or (path is not null and bytes is not null and content_type is not null)),
  check (state <> 'erased' or url is null)
);
create index idx_recordings_due on private.recordings (next_try_at) where state = 'pending';
create index idx_recordings_organization on private.recordings (organization_id, attempt_id);
select private.close_table('private.recordings');
comment on table private.recordings is
  'One row a recorded leg: where its carrier has the recording, and how far the copy to our storage is. Written by triggers and by the worker''s functions.';
comment on column private.recordings.url is 'Where the carrier has it. Seen by the worker alone; emptied once the person is erased.';
comment on column private.recordings.next_try_at is 'Real time from which it is due; while a worker has it, until when it is that worker''s.';
comment on column private.recordings.nudged_at is 'Real time at which the sweep last put it on the queue.';
comment on column private.recordings.lease_token is 'Which worker has it: the one before, if it still lives, may no longer say what became of it.';
comment on column private.recordings.path is 'Its place in the bucket recordings: organization and attempt.';

create table private.storage_deletions (
  path         text primary key,
  requested_at timestamptz not null,
  tries        integer not null default 0 check (tries >= 0),
  next_try_at  timestamptz not null default now()
);
create index idx_storage_deletions_due on private.storage_deletions (next_try_at);
select private.close_table('private.storage_deletions');
comment on table private.storage_deletions is
  'Objects of the bucket recordings that are to be gone; a row goes once its object has. Written by erase(), worked off by the sweep.';

alter table public.call_logs add column erased_at timestamptz;
comment on column public.call_logs.erased_at is
  'Business time at which the person was erased: from then on the row takes no recording, transcript or analysis, however late one comes.';

alter table public.leads add column erased_at timestamptz;
comment on column public.leads.erased_at is 'Business time at which the person was erased: what happened with the lead afterwards is noted without words.';
alter table public.conversations add column erased_at timestamptz;
comment on column public.conversations.erased_at is 'Business time at which the person was erased: from then on no message is taken in.';


-- Erasure -------------------------------------------------------------------------------------------------------------------------

create table private.erasure_salt (
  single boolean primary key default true check (single),
  salt   bytea not null default extensions.gen_random_bytes(32) check (length(salt) = 32)
);
select private.close_table('private.erasure_salt');
comment on table private.erasure_salt is
  'One row: what an erased number is hashed with. Whoever has it can try all numbers, so the hash is a pseudonym, kept for the one purpose of not calling.';
insert into private.erasure_salt default values;

create table private.erased_numbers (
  organization_id uuid not null references public.organizations (id) on delete cascade,
  phone_hash      bytea not null check (length(phone_hash) = 32),
  erased_at       timestamptz not null,
  primary key (organization_id, phone_hash)
);
select private.close_table('private.erased_numbers');
comment on table private.erased_numbers is
  'Numbers of erased persons, as a salted hash: suppressed for ever, and not known. Beside suppressions, which say the number itself.';

create table private.personal_data (
  table_name  text not null,
  column_name text not null,
  found_by    text not null check (
    found_by in ('lead', 'customer', 'order', 'attempt', 'store_call', 'conversation', 'event', 'phone', 'content', 'none')
  ),
  via         text,
  treatment   text not null check (
    treatment in ('null', 'text', 'object', 'array', 'list', 'key', 'callee', 'caller', 'delete', 'scrub', 'kept')
  ),
  reason      text,
  primary key (table_name, column_name),
  check ((treatment = 'kept') = (reason is not null)),
  check ((treatment = 'kept') = (found_by = 'none')),
  check ((found_by = 'content') = (treatment = 'scrub') or treatment = 'delete'),
  check ((via is null) = (found_by in ('content', 'none')))
);
select private.close_table('private.personal_data');
comment on table private.personal_data is
  'What erase() does with every column that can hold a text: a column that is not listed fails a test. Reference data.';
comment on column private.personal_data.column_name is 'One column; * for all columns of a table that is not about the people who are called.';
comment on column private.personal_data.found_by is
  'Whose row it is: one of a lead, customer, order, leg, store''s call, conversation or event of the person, or their number; content is whatever row names them.';
comment on column private.personal_data.via is 'The column by which the row is found.';
comment on column private.personal_data.treatment is
  'What becomes of it: nothing, the word erased, an empty value of its type, a key made of the row''s id, anonymous where the person is that party, '
  'the row deleted, or the person''s numbers and addresses cut out. kept says why.';


-- Retention -----------------------------------------------------------------------------------------------------------------------

create table private.retention_rules (
  table_name     text primary key,
  strip_after    interval check (strip_after > interval '0'),
  strip_columns  text[] not null default '{}',
  stripped_until timestamptz,
  keep_months    integer check (keep_months >= 1)
);
select private.close_table('private.retention_rules');
comment on table private.retention_rules is
  'How long the rows of a table that is split by month are kept; the operator''s setting. Without a row, or with nulls, for ever.';
comment on column private.retention_rules.strip_after is 'Age in business time at which strip_columns are emptied; rows that wait for a person keep them.';
comment on column private.retention_rules.stripped_until is 'How far that has come; rows before it are not looked at again.';
comment on column private.retention_rules.keep_months is 'Whole months after which a month''s partition is dropped.';
insert into private.retention_rules (table_name, strip_after, strip_columns, keep_months)
values ('private.webhook_events', '30 days', '{headers,body,payload}', 13);



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
  '"recordings"?:[{"organization_id","id"}] to copy}. A single event may stand at the top, a call as "call":{…}.';

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

create function private.apply_retention(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  days     constant integer := least(greatest(coalesce((request ->> 'days')::integer, 7), 1), 366);
  rule     private.retention_rules;
  parent   text;
  key_name text;
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
          execute format('drop table private.%I', part.name);
          dropped := dropped || to_jsonb('private.' || part.name);
        exception when lock_not_available then
          raise notice '% is in use; it is dropped at the next run', part.name;
        end;
      end loop;
      execute format('delete from private.%I where %I < $1', parent || '_default', key_name) using oldest;
      get diagnostics done = row_count;
      deleted := deleted + done;
    end if;

    if rule.strip_after is not null and cardinality(rule.strip_columns) > 0 then
      if rule.stripped_until is null then
        execute format('select min(%I) from %s', key_name, rule.table_name) into rule.stripped_until;
      end if;
      cutoff := least(date_trunc('hour', at - rule.strip_after), rule.stripped_until + make_interval(days => days));
      if cutoff > rule.stripped_until then
        execute format(
          'update %s set %s where %I >= $1 and %I < $2 and status not in (''failed'', ''dead'') and (%s)',
          rule.table_name,
          (select string_agg(format('%I = null', stripping.name), ', ') from unnest(rule.strip_columns) as stripping (name)),
          key_name, key_name,
          (select string_agg(format('%I is not null', stripping.name), ' or ') from unnest(rule.strip_columns) as stripping (name))
        )
        using rule.stripped_until, cutoff;
        get diagnostics done = row_count;
        stripped := stripped + done;
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
    execute format('select count(*) from (select from private.%I limit 1000) as astray', part.name) into done;
    if done > 0 then
      unplaced := unplaced || jsonb_build_object(part.parent, done);
    end if;
  end loop;
  return jsonb_build_object('dropped', dropped, 'deleted', deleted, 'stripped', stripped, 'unplaced', unplaced);
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
  '{"v":1,"days":7} -> {"dropped":[partition],"deleted":n,"stripped":n,"unplaced":{table: n}}. Empties at most so many days'' rows at once.';


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
    ('private.webhook_events', 'headers body payload', 'event', 'id', 'null', null),
    ('private.recordings', 'url reason', 'attempt', 'attempt_id', 'null', null),
    ('private.unmapped_values', 'value', 'content', null, 'delete', null),
    ('public.audit_logs', 'metadata', 'content', null, 'scrub', null),
    ('public.platform_audit_logs', 'metadata', 'content', null, 'scrub', null),
    ('public.usage_logs', 'metadata', 'content', null, 'scrub', null),
    ('public.call_logs', 'refusal_reason disconnect_reason transfer_department', 'content', null, 'scrub', null),
    ('private.outbox', 'payload last_error', 'content', null, 'scrub', null),
    ('private.webhook_events', 'error', 'content', null, 'scrub', null),
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
    ('public.audit_logs', 'user_name action entity_type', 'none', null, 'kept', 'Who of the organization''s own people did what.'),
    ('public.platform_audit_logs', 'user_name action entity_type', 'none', null, 'kept', 'Who of the operator''s own people did what.'),
    ('public.usage_logs', 'feature_key', 'none', null, 'kept', 'A word of a fixed list, or a code.'),
    ('public.campaigns', 'name timezone', 'none', null, 'kept', 'What the organization calls it.'),
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
    ('private.timezones', '*', 'none', null, 'kept', 'Reference data.'),
    ('public.call_logs', 'stream_id stream_status stream_error transfer_sid transfer_status', 'none', null, 'kept', 'The carrier''s ids and words of states.'),
    ('public.properties', 'tower unit_number', 'none', null, 'kept', 'What is sold, not a person.'),
    ('public.call_charges', '*', 'none', null, 'kept', 'A fiscal row: amounts and the call''s id.'),
    ('public.privacy_requests', '*', 'none', null, 'kept', 'Evidence that somebody asked, by the platform''s ids.'),
    ('private.call_holds', '*', 'none', null, 'kept', 'Amounts.'),
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
  target        record;
  statement     text;
  scope         text;
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
  events := array(
    select event.id
    from private.webhook_events as event
    where (event.organization_id = organization or event.organization_id is null)
      and (
        event.attempt_id = any (attempts)
        or whole_store and event.source_id in (
          select source.id::text from public.webhook_sources as source where source.organization_id = organization and source.store_id = store
        )
        or event.body ~ by_phone or lower(event.body) ~ by_email
        or event.payload::text ~ by_phone or lower(event.payload::text) ~ by_email
        or event.headers::text ~ by_phone or lower(event.headers::text) ~ by_email
        or event.error ~ by_phone or lower(event.error) ~ by_email
      )
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
  insert into private.storage_deletions (path, requested_at)
  select copy.path, at
  from private.recordings as copy
  where copy.organization_id = organization and copy.attempt_id = any (attempts) and copy.path is not null
  on conflict do nothing;
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
    if target.is_deleted then
      statement := format('delete from %s where organization_id = $1 and %I ', target.table_name, target.via);
    else
      statement := format('update %s set %s where organization_id = $1 and %I ', target.table_name, target.assignments, target.via);
    end if;
    if target.found_by = 'event' then
      statement := replace(statement, 'organization_id = $1', '(organization_id = $1 or organization_id is null)');
    end if;
    if target.found_by = 'phone' then
      execute statement || '= any ($2)' using organization, phones;
    else
      execute statement || '= any ($2)' using organization, case target.found_by
        when 'lead' then leads
        when 'customer' then customers
        when 'order' then orders
        when 'attempt' then attempts
        when 'store_call' then calls
        when 'conversation' then conversations
        when 'event' then events
      end;
    end if;
    get diagnostics done = row_count;
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
      select
        listed.table_name, listed.column_name, listed.treatment,
        pg_catalog.format_type(attribute.atttypid, null) as type,
        exists (
          select
          from pg_catalog.pg_attribute as owner
          where owner.attrelid = attribute.attrelid and owner.attname = 'organization_id' and not owner.attisdropped
        ) as has_organization
      from private.personal_data as listed
      join pg_catalog.pg_attribute as attribute
        on attribute.attrelid = to_regclass(listed.table_name) and attribute.attname = listed.column_name and not attribute.attisdropped
      where listed.found_by = 'content'
      -- The audit last: what is cut out elsewhere may leave a line that says what was there.
      order by listed.table_name like '%audit_logs', listed.table_name, listed.column_name
    loop
      scope := case when target.has_organization then '(organization_id = $1 or organization_id is null) and ' else '$1 is not null and ' end
        || format('(%1$I::text ~ $2 or lower(%1$I::text) ~ $3)', target.column_name);
      if target.treatment = 'delete' then
        statement := format('delete from %s where %s', target.table_name, scope);
      else
        -- A number may stand in JSON without quotes, so a digit takes its place there.
        statement := format(
          'update %1$s set %2$I = coalesce(regexp_replace(coalesce(regexp_replace(%2$I::text, $2, %3$L, ''g''), %2$I::text), $3, ''erased'', ''gi''), '
          'regexp_replace(%2$I::text, $2, %3$L, ''g''), %2$I::text)::%4$s where %5$s',
          target.table_name, target.column_name, case target.type when 'jsonb' then '0' else 'erased' end, target.type, scope
        );
      end if;
      execute statement using organization, by_phone, by_email;
      get diagnostics done = row_count;
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
  private.keep_message_erased(), private.keep_activity_erased()
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


-- What was there before, and now knows of it -----------------------------------------------------------------------------------------

create or replace function private.judge_candidates(at timestamptz, budget integer, passed uuid[]) returns private.candidate[]
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
  ready as materialized (
    -- A campaign that may not dial now, or is full, is left alone: its rows cost nothing and hold up nobody.
    select campaign.*, organization.caller_id
    from public.campaigns as campaign
    join public.organizations as organization on organization.id = campaign.organization_id
    where campaign.status = 'running'
      and private.dispatch_obstacle(campaign.organization_id, at) is null
      and campaign.max_concurrent_calls
        > coalesce((select sum(calls.number) from calls where calls.campaign_id = campaign.id), 0)
      and organization.max_concurrent_calls
        > coalesce((select sum(calls.number) from calls where calls.organization_id = organization.id), 0)
      and exists (
        select
        from public.call_queue as queue
        where queue.campaign_id = campaign.id and queue.status = 'queued' and queue.next_retry_at <= at
      )
    order by random()
    limit budget
  ),
  picked as materialized (
    select queue.id
    from ready
    cross join lateral (
      -- Priority by priority, each by an index from its oldest due row on: however many others wait.
      with recursive level (priority) as (
        select max(top.priority)::integer
        from public.call_queue as top
        where top.campaign_id = ready.id and top.status = 'queued'
        union all
        select (
          select max(lower.priority)
          from public.call_queue as lower
          where lower.campaign_id = ready.id and lower.status = 'queued' and lower.priority < level.priority
        )::integer
        from level
        where level.priority is not null
      )
      select due.id
      from level
      cross join lateral (
        select waiting.id
        from public.call_queue as waiting
        where waiting.campaign_id = ready.id
          and waiting.status = 'queued'
          and waiting.priority = level.priority
          and waiting.next_retry_at <= at
          and waiting.id <> all (passed)
        order by waiting.next_retry_at
        limit greatest(budget / (select count(*) from ready), 5)
      ) as due
      limit greatest(budget / (select count(*) from ready), 5)
    ) as queue
  ),
  locked as materialized (
    select
      queue.id, queue.organization_id, queue.campaign_id, queue.lead_id, queue.priority, queue.next_retry_at, queue.dispatch_count,
      lead.project_id, lead.phone, lead.timezone, lead.recording_consent, lead.do_not_call, lead.abuse_flag, lead.archived_at
    from public.call_queue as queue
    join public.leads as lead on lead.organization_id = queue.organization_id and lead.id = queue.lead_id
    where queue.id = any (array(select picked.id from picked)) and queue.status = 'queued' and queue.next_retry_at <= at
    for no key update of queue skip locked
    for key share of lead skip locked
  ),
  zoned as materialized (
    select locked.*, zone.name as zone
    from locked
    join ready on ready.id = locked.campaign_id
    left join private.timezones as zone on zone.name = coalesce(nullif(locked.timezone, ''), ready.timezone)
  ),
  stretches as materialized (
    select place.campaign_id, place.zone, stretch.opens_at, stretch.closes_at
    from (select distinct zoned.campaign_id, zoned.zone from zoned where zoned.zone is not null) as place
    join ready on ready.id = place.campaign_id
    cross join lateral private.calling_window(
      at, place.zone, ready.time_start, ready.time_end, ready.start_date, ready.end_date
    ) as stretch
  ),
  seen as materialized (
    select
      zoned.*, stretches.opens_at, stretches.closes_at, private.recent_dials(zoned.phone, at) as dials,
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
    left join stretches on stretches.campaign_id = zoned.campaign_id and stretches.zone = zoned.zone
  ),
  gated as (
    select
      seen.*,
      case
        when seen.do_not_call or seen.suppressed then 'opted_out'
        when seen.abuse_flag then 'abuse'
        when seen.archived_at is not null then 'archived'
        when seen.phone is null then 'no_phone'
        when seen.zone is null then 'bad_timezone'
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
          partition by gated.verdict, gated.phone order by gated.priority desc, gated.next_retry_at, gated.id
        ) > 1 then 'number_in_call'
        else gated.verdict
      end as final_verdict
    from gated
  )
  select array_agg(
    row(
      single.id, single.organization_id, single.campaign_id, single.lead_id, coalesce(single.project_id, ready.project_id), single.phone,
      number.phone_number, number.carrier_account_id, single.dispatch_count + 1, ready.agent_id,
      ready.record_calls and single.recording_consent, ready.ring_timeout_seconds, ready.max_call_seconds,
      single.closes_at, single.final_verdict,
      case single.final_verdict
        when 'bad_timezone' then at + interval '1 day'
        when 'campaign_over' then at + interval '1 day'
        when 'outside_window' then single.opens_at
        when 'number_in_call' then private.whole_minute(at + interval '15 minutes')
        when 'daily_cap' then private.whole_minute(greatest(single.dials[2] + interval '24 hours', single.dials[1] + interval '60 minutes'))
        when 'min_gap' then private.whole_minute(single.dials[1] + interval '60 minutes')
      end
    )::private.candidate
    order by single.priority desc, single.next_retry_at, single.id
  )
  into judged
  from single
  join ready on ready.id = single.campaign_id
  left join lateral (
    -- The number it prefers, else the same one for the same callee every time.
    select number.phone_number, number.carrier_account_id
    from public.caller_numbers as number
    join public.carrier_accounts as account on account.id = number.carrier_account_id
    where number.organization_id = single.organization_id and number.is_active and account.is_active and account.dialling_enabled
    order by (number.phone_number = ready.caller_id) desc nulls last, hashtextextended(number.phone_number || single.phone, 0)
    limit 1
  ) as number on single.final_verdict is null;
  return coalesce(judged, array[]::private.candidate[]);
end
$$;
comment on function private.judge_candidates(timestamptz, integer, uuid[]) is
  'Locks due rows of campaigns that may dial, about a budget of them and as many of each campaign, and judges each by every gate in order.';

create or replace function private.begin_dials(request jsonb, at timestamptz) returns jsonb
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
        when not organization.dialling_enabled then 'dialling_disabled'
        when campaign.status <> 'running' then 'campaign_' || campaign.status
        when lead.do_not_call or private.is_suppressed(log.organization_id, log.callee_number) then 'opted_out'
        when lead.abuse_flag then 'abuse'
        when lead.archived_at is not null then 'archived'
        when lead.phone is distinct from log.callee_number then 'number_changed'
      end as reason
    from public.call_logs as log
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
          when reason in ('dialling_disabled', 'account_disabled') then at + interval '1 minute'
          when reason = 'number_changed' or reason like 'campaign%' then at
        end,
        closing := case
          when reason = 'opted_out' then 'opted_out'
          when reason in ('abuse', 'archived') then 'skipped'
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
