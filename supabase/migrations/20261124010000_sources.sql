-- Sources beside carriers: who they are, what they said that nobody has mapped, and events of any payload.

set local lock_timeout = '5s';
set local statement_timeout = '60s';

-- Only functions read it, and this migration replaces them.
-- squawk-ignore renaming-column
alter table private.webhook_events rename column call to payload;
alter table private.webhook_events
  add column payload_type text not null default 'call' check (payload_type ~ '^[a-z][a-z_]{0,30}$');
-- Every row names it, from the functions below on.
-- squawk-ignore ban-drop-default
alter table private.webhook_events alter column payload_type drop default;
comment on column private.webhook_events.source is 'A provider''s name, or reconcile for what we asked the carrier ourselves.';
comment on column private.webhook_events.payload is
  'The event in the words of every provider of its kind, as the handler read it; payload_type says which function applies it.';
-- A partition has the comments of its table.
do $$
declare
  told record;
begin
  for told in
    select child.inhrelid::regclass as name, attribute.attname, col_description(child.inhparent, attribute.attnum) as comment
    from pg_catalog.pg_inherits as child
    join pg_catalog.pg_attribute as attribute on attribute.attrelid = child.inhparent and attribute.attname in ('source', 'payload')
    join pg_catalog.pg_attribute as own on own.attrelid = child.inhrelid and own.attname = attribute.attname
    where child.inhparent = 'private.webhook_events'::regclass and col_description(child.inhrelid, own.attnum) is not null
  loop
    execute format('comment on column %s.%I is %L', told.name, told.attname, told.comment);
  end loop;
end
$$;
-- Before the first release no installation is in use: the table is small.
-- squawk-ignore require-concurrent-index-creation
create index idx_webhook_events_agent_orphans on private.webhook_events (source_id, (payload ->> 'agent_call_id'))
  where status = 'orphan' and payload_type = 'agent';
-- Before the first release no installation is in use: the table is small.
-- squawk-ignore require-concurrent-index-creation
create index idx_webhook_events_late_orphans on private.webhook_events (received_at) where status = 'orphan' and payload_type = 'agent';

alter table public.call_logs add column agent_call_id text check (length(agent_call_id) between 1 and 200);
-- Before the first release no installation is in use: the table is small.
-- squawk-ignore require-concurrent-index-creation
create index idx_call_logs_agent_call_id on public.call_logs (agent_call_id) where agent_call_id is not null;
comment on column public.call_logs.agent_call_id is 'The voice agent''s own id of the conversation; its first event that names both binds it.';
comment on column public.call_queue.wait_reason is
  'Why it waits: outside_window, bad_timezone, campaign_over, min_gap, daily_cap, number_in_call, quota_exhausted, callback, retry_<outcome>.';

create table private.unmapped_values (
  id              uuid primary key default private.uuid_v7(),
  organization_id uuid references public.organizations (id) on delete cascade,
  source          text not null,
  field           text not null check (length(field) between 1 and 100),
  value           text not null check (length(value) <= 200),
  seen            bigint not null default 1 check (seen >= 1),
  event_id        uuid not null,
  first_seen_at   timestamptz not null,
  last_seen_at    timestamptz not null,
  -- What reaches the platform's own sources belongs to no organization, and is one row all the same.
  unique nulls not distinct (organization_id, source, field, value)
);
select private.close_table('private.unmapped_values');
comment on table private.unmapped_values is
  'Words of providers that map to none of ours: kept as they came, counted, and shown to those who can tell us what they mean.';
comment on column private.unmapped_values.event_id is 'The latest event that had it; no foreign key, because events go with their month.';
comment on column private.unmapped_values.first_seen_at is 'Business time, as last_seen_at.';


-- webhook_sources -----------------------------------------------------------------------------------------------------------------

create table public.webhook_sources (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid references public.organizations (id) on delete cascade,
  store_id        uuid,
  provider        text not null check (provider ~ '^[a-z][a-z0-9_]{1,30}$'),
  name            text not null check (length(btrim(name)) between 1 and 200),
  secrets_sealed  text[] not null check (cardinality(secrets_sealed) between 1 and 2 and array_position(secrets_sealed, null) is null),
  previous_until  timestamptz,
  settings        jsonb not null default '{}' check (jsonb_typeof(settings) = 'object' and length(settings::text) <= 8192),
  is_active       boolean not null default true,
  created_at      timestamptz not null default private.clock_now(),
  updated_at      timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  foreign key (organization_id, store_id) references public.stores (organization_id, id) on delete cascade,
  check (store_id is null or organization_id is not null),
  check ((previous_until is not null) = (cardinality(secrets_sealed) = 2))
);
create index idx_webhook_sources_store on public.webhook_sources (organization_id, store_id);

revoke all on public.webhook_sources from anon, authenticated, service_role;
grant select (
  id, organization_id, store_id, provider, name, previous_until, settings, is_active, created_at, updated_at
) on public.webhook_sources to authenticated, service_role;
alter table public.webhook_sources enable row level security;
alter table public.webhook_sources force row level security;
create policy "Who manages webhooks may see the sources" on public.webhook_sources
  for select to authenticated using (organization_id = (select private.org_with('webhook.manage')));
create trigger update_modified_column before update on public.webhook_sources
  for each row execute function private.update_modified_column();
comment on table public.webhook_sources is
  'Who outside may tell us something, and how it proves that it is them; without an organization it is the platform''s own. The id is in the URL.';
comment on column public.webhook_sources.provider is 'The handler''s name of it: a table in the code lists them, so that a new one needs no migration.';
comment on column public.webhook_sources.secrets_sealed is
  'Newest first, sealed for this row''s id. The second is the one before, and still opens until previous_until. No user reads them.';
comment on column public.webhook_sources.previous_until is 'Real time.';
comment on column public.webhook_sources.settings is 'What the provider was configured with, as header names and encodings; never a secret.';


create trigger audit_change after insert or update or delete on public.webhook_sources
  for each row execute function private.audit_change('webhook_source');

create function private.to_uuid(written text) returns uuid
language sql immutable parallel safe set search_path = '' as $$
  select case when written ~* '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$' then written::uuid end
$$;
comment on function private.to_uuid(text) is 'The UUID that is written there; null for anything else.';

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
      'settings', source.settings,
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
      'secrets_sealed', jsonb_build_array(account.auth_token_sealed)
    );
  end if;
  return jsonb_build_object('found', false);
end
$$;
comment on function private.open_source(jsonb, timestamptz) is 'What it takes to verify a source''s signature, sealed: of a webhook source or a carrier account.';

create or replace function public.open_source(jsonb) returns jsonb
language sql stable security invoker set search_path = '' as $$
  select private.open_source($1, private.clock_now())
$$;
comment on function public.open_source(jsonb) is
  '{"v":1,"source_id":uuid} -> {"found":true,"provider","organization_id","store_id"?,"account_sid"?,"settings","secrets_sealed":[newest first],'
  '"previous_until"?: unix seconds until which the second holds} or {"found":false}.';

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

create or replace function private.apply_call_event(
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
  -- An agent's recording, which has no id, gives way to the carrier's, whichever is told first.
  if recording is not null and attempt.recording_id is null then
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
    event.status := applied.result;
    event.error := coalesce(applied.error, case when applied.result = 'ignored' then told ->> 'note' end);
    event.organization_id := applied.organization_id;
  exception when others then
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

create or replace function private.apply_event(request jsonb, at timestamptz) returns jsonb
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

create or replace function public.apply_event(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.apply_event($1, private.clock_now())
$$;
comment on function public.apply_event(jsonb) is
  '{"v":1,"source","source_id","verified":true,"headers","body","events":[{"kind","dedupe_key","attempt_id"?,"payload":{"type",…},'
  '"unmapped"?:[{"field","value"}],"note"?}]} -> {"result":"applied|duplicate|ignored|orphan|failed","organization_id","results"? of several}. '
  'A single event may stand at the top, a call as "call":{…}.';

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

create or replace function private.end_attempt(
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
  next_at  timestamptz := due;
  final    public.campaign_lead_status := closing;
  completes boolean;
begin
  attempt.status := 'ended';
  attempt.call_status := outcome;
  attempt.ended_at := coalesce(attempt.ended_at, greatest(at, attempt.created_at));
  attempt.refusal_reason := coalesce(reason, attempt.refusal_reason);
  attempt.lease_until := null;
  if attempt.dialled then
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
        select private.next_dial_at(attempt, campaign, attempt.ended_at + rule.delay) into next_at
        from private.retry_rules as rule
        where rule.outcome = end_attempt.outcome
          and rule.nth = (
            select count(*)
            from public.call_logs as log
            where log.organization_id = attempt.organization_id
              and log.queue_id = queue.id
              and log.call_status = end_attempt.outcome
          );
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

  perform private.meter_call(attempt, at);
  if attempt.dialled then
    perform private.emit(
      attempt.organization_id, 'call.ended', attempt.id::text,
      jsonb_build_object(
        'call_id', attempt.id, 'campaign_id', attempt.campaign_id, 'lead_id', attempt.lead_id, 'attempt_no', attempt.attempt_no,
        'outcome', outcome, 'answered_at', attempt.answered_at, 'ended_at', attempt.ended_at, 'duration_seconds', attempt.duration,
        'billed_seconds', attempt.bill_duration_seconds, 'lead_status', coalesce(final, 'queued'), 'next_attempt_at', next_at
      ),
      at
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

create or replace function private.amend_attempt(
  attempt public.call_logs, amended public.call_logs, outcome public.call_outcome, at timestamptz
) returns boolean
language plpgsql volatile security definer set search_path = '' as $$
declare
  queue    public.call_queue;
  member   public.campaign_leads;
  campaign public.campaigns;
  -- A guess gives way to what the carrier says, and a call without a second of talk to the reason why there was none.
  corrects boolean := coalesce(
    outcome <> attempt.call_status
    and (
      attempt.call_status in ('lost', 'expired')
      or not attempt.dialled and amended.dialled
      or outcome = 'answered' and attempt.call_status in ('failed', 'no_answer', 'cancelled') and amended.answered_at is not null
      or attempt.call_status = 'answered' and outcome in ('busy', 'no_answer', 'rejected', 'machine')
        and coalesce(amended.duration, 0) = 0 and coalesce(amended.bill_duration_seconds, 0) = 0
    ),
    false
  );
  completes boolean := false;
begin
  if outcome = 'answered' and amended.machine then
    outcome := 'machine';
    corrects := corrects and attempt.call_status <> 'machine';
  end if;
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
    perform private.meter_call(amended, at);
  end if;
  return true;
end
$$;
comment on function private.amend_attempt(public.call_logs, public.call_logs, public.call_outcome, timestamptz) is
  'Adds to an ended attempt what came late: cost, recording, seconds not yet counted, a better reason. It never ends twice. False if nothing was new.';

create function private.attempt_of_agent(event private.webhook_events) returns uuid
language plpgsql stable security definer set search_path = '' as $$
declare
  told   jsonb := event.payload;
  tenant uuid := (
    select source.organization_id from public.webhook_sources as source where source.id = private.to_uuid(event.source_id)
  );
  found_id uuid;
begin
  select log.id into found_id from public.call_logs as log where log.id = private.to_uuid(told ->> 'attempt_id');
  if found_id is null and told ->> 'provider_call_id' is not null then
    select log.id into found_id
    from public.call_logs as log
    where log.call_sid = told ->> 'provider_call_id' and log.organization_id = coalesce(tenant, log.organization_id);
  end if;
  if found_id is null and told ->> 'agent_call_id' is not null then
    select log.id into found_id
    from public.call_logs as log
    where log.agent_call_id = left(told ->> 'agent_call_id', 200) and log.organization_id = coalesce(tenant, log.organization_id)
    order by log.created_at desc
    limit 1;
  end if;
  return found_id;
end
$$;
comment on function private.attempt_of_agent(private.webhook_events) is
  'Which attempt an agent''s event is about, within the organization of its source; null when it is not known.';

create function private.knows_more(ranks jsonb, field text, rank integer, known text, told text) returns boolean
language sql immutable parallel safe set search_path = '' as $$
  select told is not null and (
    known is null
    or (rank, length(told), told collate "C") > (coalesce((ranks ->> field)::integer, -1), length(known), known collate "C")
  )
$$;
comment on function private.knows_more(jsonb, text, integer, text, text) is
  'Whether a value that is told replaces the one that is known: it comes of a later kind of event, or is longer. A total order, so that '
  'the order of events does not matter.';

create function private.number_of_person(attempt public.call_logs) returns text
language sql immutable parallel safe set search_path = '' as $$
  select case attempt.direction when 'inbound' then attempt.caller_number else attempt.callee_number end
$$;
comment on function private.number_of_person(public.call_logs) is 'The number of the person in a call, whoever dialled.';

create function private.lock_person(attempt public.call_logs, everywhere boolean) returns void
language plpgsql volatile security definer set search_path = '' as $$
declare
  people uuid[] := array(
    select lead.id
    from public.leads as lead
    where lead.organization_id = attempt.organization_id
      and (lead.id = attempt.lead_id or everywhere and lead.phone = private.number_of_person(attempt))
  );
begin
  perform
  from public.call_queue as queue
  where queue.organization_id = attempt.organization_id
    and (queue.id = attempt.queue_id or everywhere and queue.lead_id = any (people))
  order by queue.id
  for no key update;
  perform
  from public.campaign_leads as member
  where member.organization_id = attempt.organization_id and member.lead_id = any (people)
    and (everywhere or member.campaign_id = attempt.campaign_id)
  order by member.id
  for no key update;
  perform from public.leads as lead where lead.id = any (people) order by lead.id for no key update;
  perform
  from public.campaigns as campaign
  where campaign.id = attempt.campaign_id
    or campaign.id in (
      select queue.campaign_id
      from public.call_queue as queue
      where everywhere and queue.organization_id = attempt.organization_id and queue.lead_id = any (people)
    )
  order by campaign.id
  for no key update;
end
$$;
comment on function private.lock_person(public.call_logs, boolean) is
  'Locks what a word of the person called may change, table by table and by id: of this call''s campaign, or of all of the organization''s.';

create function private.opt_out(organization uuid, phone text, reason text, at timestamptz) returns boolean
language plpgsql volatile security definer set search_path = '' as $$
declare
  waiting  uuid[];
  closed   record;
  campaign public.campaigns;
begin
  if phone is null or phone !~ '^\+[1-9][0-9]{6,14}$' then
    return false;
  end if;
  insert into public.suppressions (organization_id, phone_number, source, reason)
  values (organization, phone, 'call', reason)
  on conflict (organization_id, phone_number) do nothing;
  waiting := array(
    select queue.id
    from public.leads as lead
    join public.call_queue as queue on queue.organization_id = lead.organization_id and queue.lead_id = lead.id
    where lead.organization_id = organization and lead.phone = opt_out.phone and queue.status = 'queued'
    order by queue.id
  );
  update public.call_queue as queue
  set status = 'failed', last_error = 'opted_out', wait_reason = null
  where queue.id = any (waiting);
  update public.campaign_leads as member
  set status = 'opted_out', skip_reason = 'opted_out', opted_out_at = at, opt_out_reason = reason
  from public.call_queue as queue
  where queue.id = any (waiting)
    and member.organization_id = queue.organization_id
    and member.campaign_id = queue.campaign_id
    and member.lead_id = queue.lead_id;
  update public.leads as lead
  set
    do_not_call = true, status = 'do_not_call', opted_out_at = coalesce(lead.opted_out_at, at),
    opt_out_reason = coalesce(lead.opt_out_reason, reason), callback_time = null
  where lead.organization_id = organization and lead.phone = opt_out.phone
    and (not lead.do_not_call or lead.status <> 'do_not_call' or lead.callback_time is not null);

  for closed in
    select queue.campaign_id as id, count(*)::integer as leads
    from public.call_queue as queue
    where queue.id = any (waiting)
    group by queue.campaign_id
    order by queue.campaign_id
  loop
    update public.campaigns as running
    set
      open_leads = running.open_leads - closed.leads,
      status = case
        when running.open_leads = closed.leads and running.auto_complete and running.status in ('running', 'paused') then 'completed'
        else running.status
      end,
      completed_at = case
        when running.open_leads = closed.leads and running.auto_complete and running.status in ('running', 'paused') then at
        else running.completed_at
      end
    where running.id = closed.id
    returning running.* into campaign;
    if campaign.status = 'completed' then
      perform private.campaign_completed(campaign.organization_id, campaign.id, at);
    end if;
  end loop;
  return true;
end
$$;
comment on function private.opt_out(uuid, text, text, timestamptz) is
  'Somebody does not want to be called: the number is suppressed, its leads are marked, and all that waits to call it in any campaign of the '
  'organization is cancelled, in one transaction. Again, and nothing changes. The caller holds the locks of private.lock_person().';

create function private.call_back(attempt public.call_logs, moment timestamptz, at timestamptz) returns void
language plpgsql volatile security definer set search_path = '' as $$
declare
  queue    public.call_queue;
  campaign public.campaigns;
  next_at  timestamptz;
begin
  if moment is null or moment <= at or moment > at + interval '90 days' or exists (
    select
    from public.suppressions as suppression
    where suppression.organization_id = attempt.organization_id
      and suppression.phone_number = private.number_of_person(attempt)
  ) then
    return;
  end if;
  update public.leads as lead
  set callback_time = moment
  where lead.organization_id = attempt.organization_id and lead.id = attempt.lead_id and lead.callback_time is distinct from moment;

  select waiting.* into queue from public.call_queue as waiting where waiting.id = attempt.queue_id;
  -- A later attempt has its own say.
  if queue.id is null or queue.dispatch_count <> attempt.attempt_no then
    return;
  end if;
  if queue.status = 'processing' then
    -- The end of the call reads it.
    update public.call_queue as waiting
    set metadata = waiting.metadata || jsonb_build_object('callback_at', moment)
    where waiting.id = queue.id;
    return;
  end if;
  select running.* into campaign from public.campaigns as running where running.id = queue.campaign_id;
  if campaign.status not in ('scheduled', 'running', 'paused') then
    return;
  end if;
  next_at := private.next_dial_at(attempt, campaign, greatest(moment, attempt.ended_at));
  update public.call_queue as waiting
  set
    status = 'queued', next_retry_at = next_at, wait_reason = 'callback',
    max_attempts = greatest(waiting.max_attempts, waiting.attempt_count + 1)
  where waiting.id = queue.id;
  if queue.status <> 'queued' then
    update public.campaign_leads as member
    set status = 'queued', skip_reason = null
    where member.organization_id = queue.organization_id
      and member.campaign_id = queue.campaign_id
      and member.lead_id = queue.lead_id;
    update public.campaigns as running set open_leads = running.open_leads + 1 where running.id = campaign.id;
  end if;
end
$$;
comment on function private.call_back(public.call_logs, timestamptz, timestamptz) is
  'Somebody asked to be called at a time: the lead says so, and the queue row of this attempt, locked already, waits for then, also when the '
  'call had closed it. A campaign that is over is not opened again.';

create function private.note_activity(
  attempt public.call_logs, key text, type text, content jsonb, happened_at timestamptz
) returns boolean
language plpgsql volatile security definer set search_path = '' as $$
begin
  if attempt.lead_id is null then
    return false;
  end if;
  insert into public.lead_activities as activity (id, organization_id, lead_id, type, content, created_by, created_at)
  values (
    md5(attempt.id || '|' || key)::uuid, attempt.organization_id, attempt.lead_id, note_activity.type,
    jsonb_strip_nulls(jsonb_build_object('call_id', attempt.id) || content), null, happened_at
  )
  on conflict (id) do update
  set content = excluded.content
  where activity.content is distinct from excluded.content;
  return found;
end
$$;
comment on function private.note_activity(public.call_logs, text, text, jsonb, timestamptz) is
  'One line in a lead''s timeline for one thing that happened in a call; told again it is the same line.';

create function private.follow_conversation(
  attempt public.call_logs, told jsonb, replaces boolean, is_over boolean, at timestamptz
) returns void
language plpgsql volatile security definer set search_path = '' as $$
declare
  call         public.calls;
  conversation public.conversations;
  agent        jsonb := attempt.metadata -> 'agent';
  ended        timestamptz;
begin
  select mine.* into call
  from public.calls as mine
  where mine.organization_id = attempt.organization_id and mine.call_log_id = attempt.id
  for no key update;
  if call.id is null then
    return;
  end if;
  select held.* into conversation
  from public.conversations as held
  where held.organization_id = call.organization_id and held.store_id = call.store_id and held.id = call.conversation_id
  for no key update;
  if conversation.id is null then
    insert into public.conversations (
      organization_id, store_id, conversation_key, order_id, customer_id, channel, customer_identifier, start_time, last_activity_at
    )
    values (
      call.organization_id, call.store_id, 'agent:' || attempt.id, call.order_id, call.customer_id, 'voice',
      private.to_call_party(private.number_of_person(attempt)), call.start_time, call.start_time
    )
    on conflict (organization_id, store_id, conversation_key) do update set channel = 'voice'
    returning * into conversation;
  end if;
  update public.calls as mine
  set conversation_id = conversation.id, call_id = coalesce(mine.call_id, left(attempt.agent_call_id, 100))
  where mine.id = call.id
    and (mine.conversation_id is distinct from conversation.id or mine.call_id is null and attempt.agent_call_id is not null);

  if replaces then
    insert into public.conversation_messages as message (
      organization_id, store_id, conversation_id, message_index, external_message_id, role, type, content, timestamp
    )
    select
      conversation.organization_id, conversation.store_id, conversation.id, (said.place - 1)::integer, 'agent:' || said.place,
      (said.value ->> 'role')::public.message_role, 'text', said.value ->> 'text',
      coalesce(private.clamp_time(said.value ->> 'at', conversation.start_time, greatest(at, conversation.start_time)), conversation.start_time)
    from jsonb_array_elements(told -> 'messages') with ordinality as said (value, place)
    on conflict (organization_id, store_id, conversation_id, external_message_id) do update
    set role = excluded.role, content = excluded.content, timestamp = excluded.timestamp
    where (message.role, message.content, message.timestamp) is distinct from (excluded.role, excluded.content, excluded.timestamp);
    delete from public.conversation_messages as message
    where message.organization_id = conversation.organization_id
      and message.store_id = conversation.store_id
      and message.conversation_id = conversation.id
      and message.external_message_id like 'agent:%'
      and substr(message.external_message_id, 7)::integer > jsonb_array_length(told -> 'messages');
  end if;

  ended := greatest(private.clamp_time(agent ->> 'ended_at', conversation.start_time, at), conversation.start_time);
  update public.conversations as held
  set
    summary = coalesce(attempt.summary, held.summary),
    sentiment_score = coalesce(attempt.sentiment_score, held.sentiment_score),
    escalated_to_human = held.escalated_to_human or attempt.transferred,
    escalation_reason = coalesce(attempt.transfer_reason, held.escalation_reason),
    ai_context = held.ai_context || jsonb_strip_nulls(jsonb_build_object('language', agent -> 'language')),
    status = case when is_over and held.status in ('active', 'paused', 'escalated') then 'completed' else held.status end,
    end_time = case when is_over or held.end_time is not null then coalesce(ended, held.end_time, greatest(at, held.start_time)) end
  where held.organization_id = conversation.organization_id
    and held.store_id = conversation.store_id
    and held.id = conversation.id;
end
$$;
comment on function private.follow_conversation(public.call_logs, jsonb, boolean, boolean, timestamptz) is
  'The conversation of a call that is a store''s: opened, its messages written, summed up and closed as the agent tells it.';

create function private.apply_agent_event(
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
comment on function private.apply_agent_event(private.webhook_events, public.webhook_sources, timestamptz) is
  'What an agent''s event means for its attempt: transcript, analysis, recording and tools land in the call, the conversation and the lead. '
  'The state of the call is the carrier''s to tell.';

revoke execute on function
  private.to_uuid(text), private.open_source(jsonb, timestamptz), private.apply_event(jsonb, timestamptz),
  private.sweep_events(jsonb, timestamptz), private.apply_call_event(text, text, uuid, jsonb, timestamptz),
  private.clamp_time(text, timestamptz, timestamptz), private.raise_alarm(public.call_logs, text, jsonb, timestamptz),
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

revoke execute on function
  private.attempt_of_agent(private.webhook_events), private.knows_more(jsonb, text, integer, text, text),
  private.number_of_person(public.call_logs), private.lock_person(public.call_logs, boolean), private.opt_out(uuid, text, text, timestamptz),
  private.call_back(public.call_logs, timestamptz, timestamptz),
  private.note_activity(public.call_logs, text, text, jsonb, timestamptz),
  private.follow_conversation(public.call_logs, jsonb, boolean, boolean, timestamptz),
  private.apply_agent_event(private.webhook_events, public.webhook_sources, timestamptz)
from public, anon, authenticated, service_role;
