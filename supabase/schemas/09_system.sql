-- What the system remembers for itself: events from outside, what is to be told, and who did what.


-- webhook_events ------------------------------------------------------------------------------------------------------------------

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

create table private.webhook_events (
  id              uuid not null default private.uuid_v7(),
  received_at     timestamptz not null,
  organization_id uuid,
  source          text not null,
  source_id       text not null,
  dedupe_key      text not null,
  kind            text not null,
  attempt_id      uuid,
  headers         jsonb,
  body            text,
  payload_type    text not null check (payload_type ~ '^[a-z][a-z_]{0,30}$'),
  payload         jsonb,
  status          public.event_status not null,
  error           text,
  tries           integer not null default 1 check (tries >= 1),
  next_try_at     timestamptz,
  primary key (id, received_at),
  check ((status = 'failed') = (next_try_at is not null))
) partition by range (received_at);
create index idx_webhook_events_attempt on private.webhook_events (attempt_id);
create index idx_webhook_events_failed on private.webhook_events (next_try_at) where status = 'failed';
create index idx_webhook_events_agent_orphans on private.webhook_events (source_id, (payload ->> 'agent_call_id'))
  where status = 'orphan' and payload_type = 'agent';
create index idx_webhook_events_late_orphans on private.webhook_events (received_at) where status = 'orphan' and payload_type = 'agent';
-- Nothing is in it that the row does not say itself: who is erased from the row is gone from here.
create index idx_webhook_events_people on private.webhook_events
  using gin (private.person_keys(body, payload::text, headers::text, error)) with (fastupdate = off);
select private.close_table('private.webhook_events');
comment on table private.webhook_events is
  'Every verified event from outside as it came, and what became of it. By month of received_at, so that old months can be dropped.';
comment on column private.webhook_events.received_at is 'Business time.';
comment on column private.webhook_events.source is 'A provider''s name, or reconcile for what we asked the carrier ourselves.';
comment on column private.webhook_events.payload is
  'The event in the words of every provider of its kind, as the handler read it; payload_type says which function applies it.';
comment on column private.webhook_events.next_try_at is 'Real time at which sweep_events() applies a failed event again.';

create table private.webhook_event_keys (
  source      text not null,
  source_id   text not null,
  dedupe_key  text not null,
  event_id    uuid not null,
  received_at timestamptz not null,
  primary key (source, source_id, dedupe_key)
);
select private.close_table('private.webhook_event_keys');
comment on table private.webhook_event_keys is
  'Which events were taken in. Not partitioned by time: a duplicate is one however late it comes.';


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


-- outbox --------------------------------------------------------------------------------------------------------------------------

create table private.outbox (
  id              uuid primary key default private.uuid_v7(),
  organization_id uuid not null references public.organizations (id) on delete cascade,
  topic           text not null,
  key             text not null,
  payload         jsonb not null,
  created_at      timestamptz not null,
  dispatched_at   timestamptz,
  attempts        integer not null default 0 check (attempts >= 0),
  next_attempt_at timestamptz,
  last_error      text,
  object          text,
  sequence        bigint check (sequence > 0),
  unique (organization_id, topic, key)
);
create index idx_outbox_organization_id on private.outbox (organization_id, id) where dispatched_at is null;
create index idx_outbox_waiting on private.outbox (organization_id, id) where dispatched_at is null and sequence is not null;
create index idx_outbox_told on private.outbox (organization_id, created_at, id) where sequence is not null;
create index idx_outbox_created_at on private.outbox (created_at);
select private.close_table('private.outbox');
comment on table private.outbox is
  'What happened and is to be told, written in the transaction in which it happened; one row an organization, topic and key, so that nothing is told twice.';
comment on column private.outbox.payload is 'Empty once retention has taken it; the row stays on as the key of what was told.';
comment on column private.outbox.created_at is 'Business time.';
comment on column private.outbox.dispatched_at is 'When it was handed to the organization''s endpoints, one delivery each; at once where there were none.';
comment on column private.outbox.object is 'What it is about, as call:<id>; null for what is told to nobody outside.';
comment on column private.outbox.sequence is 'Rises with every event of the object; null for what is told to nobody outside.';

create function private.emit(organization uuid, topic text, key text, payload jsonb, at timestamptz) returns void
language plpgsql volatile security definer set search_path = '' as $$
begin
  insert into private.outbox (organization_id, topic, key, payload, created_at)
  values (organization, emit.topic, emit.key, emit.payload, at)
  on conflict do nothing;
end
$$;
comment on function private.emit(uuid, text, text, jsonb, timestamptz) is
  'Puts one event into the outbox; the same topic and key again changes nothing.';


-- Events out ----------------------------------------------------------------------------------------------------------------------
-- What of the outbox is told to an organization's own systems. What makes and delivers them: 19_functions_event_delivery.sql.

create table private.event_types (
  topic       text primary key check (topic ~ '^[a-z_]+\.[a-z_]+$'),
  version     smallint not null default 1 check (version >= 1),
  description text not null
);
select private.close_table('private.event_types');
comment on table private.event_types is
  'What organizations'' own systems may be told. A topic of the outbox that is not here is internal. Each has a JSON schema in docs/events.';
comment on column private.event_types.version is 'Rises when what the event carries changes in a way that a receiver could trip over.';
insert into private.event_types (topic, description)
values
  ('call.started', 'The carrier has taken a call, or one came in.'),
  ('call.answered', 'Somebody, or a machine, picked up.'),
  ('call.ended', 'A call is over, and how.'),
  ('call.updated', 'What call.ended said of a call was corrected.'),
  ('call.analyzed', 'What the voice agent made of a call is there, or is better than before.'),
  ('lead.created', 'There is a new lead.'),
  ('lead.opted_out', 'A lead is not to be called any more.'),
  ('campaign.started', 'A campaign begins to call.'),
  ('campaign.paused', 'A campaign begins no more calls for now.'),
  ('campaign.resumed', 'A paused campaign goes on.'),
  ('campaign.completed', 'Every lead of a campaign is through.'),
  ('campaign.cancelled', 'A campaign was called off.'),
  ('usage.threshold', 'Usage reached a share of what the plan includes.'),
  ('credit.low', 'Prepaid credit fell below its mark.'),
  ('subscription.created', 'A subscription begins.'),
  ('subscription.changed', 'A subscription''s plan, price or state changed.'),
  ('subscription.cancelled', 'A subscription is over.'),
  ('invoice.finalized', 'There is a new invoice, with its number.'),
  ('invoice.paid', 'An invoice is paid in full.'),
  ('invoice.payment_failed', 'A payment of an invoice failed.'),
  ('invoice.past_due', 'An invoice was not paid by its due date.'),
  ('credit_note.issued', 'There is a new credit note, with its number.'),
  ('order.created', 'A store has a new order.'),
  ('order.updated', 'An order''s state, payment or fulfilment changed.'),
  ('order.cancelled', 'An order was cancelled.'),
  ('conversation.escalated', 'A store''s customer is handed to a person.'),
  ('endpoint.disabled', 'An endpoint was switched off, because it failed for days or said that it is gone.'),
  ('endpoint.test', 'A test that somebody asked for; sent to one endpoint, whatever it listens to.');

create table private.event_sequences (
  organization_id uuid not null references public.organizations (id) on delete cascade,
  object          text not null,
  last            bigint not null check (last > 0),
  primary key (organization_id, object)
);
select private.close_table('private.event_sequences');
comment on table private.event_sequences is 'The last number given to an event of an object. Its row is the lock that keeps two events of one object apart.';

create table public.webhook_endpoints (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null references public.organizations (id) on delete cascade,
  url             text not null check (url ~ '^https?://[^\s/]\S*$' and length(url) <= 2048),
  description     text check (length(description) <= 200),
  events          text[] not null default '{}',
  enabled         boolean not null default true,
  disabled_reason text check (disabled_reason in ('user', 'gone', 'failing')),
  disabled_at     timestamptz,
  failing_since   timestamptz,
  created_by      uuid,
  created_at      timestamptz not null default private.clock_now(),
  updated_at      timestamptz not null default private.clock_now(),
  is_slow         boolean not null default false,
  unique (organization_id, id),
  foreign key (organization_id, created_by) references public.profiles (organization_id, id) on delete set null (created_by),
  check (enabled = (disabled_reason is null) and enabled = (disabled_at is null))
);
create index idx_webhook_endpoints_created_by on public.webhook_endpoints (organization_id, created_by);
create index idx_webhook_endpoints_enabled on public.webhook_endpoints (organization_id) where enabled;

revoke all on public.webhook_endpoints from anon, authenticated, service_role;
grant select on public.webhook_endpoints to authenticated, service_role;
alter table public.webhook_endpoints enable row level security;
alter table public.webhook_endpoints force row level security;
create policy "Who manages webhooks may see the endpoints" on public.webhook_endpoints
  for select to authenticated using (organization_id = (select private.org_with('webhook.manage')));
create trigger update_modified_column before update on public.webhook_endpoints
  for each row execute function private.update_modified_column();
comment on table public.webhook_endpoints is 'Where an organization''s own systems are told what happened. Changed by functions alone.';
comment on column public.webhook_endpoints.events is 'What it listens to: topics, or a family as call.*; everything when empty.';
comment on column public.webhook_endpoints.disabled_reason is 'user: switched off by hand; gone: it answered 410; failing: nothing reached it for days.';
comment on column public.webhook_endpoints.failing_since is 'Since when nothing has reached it; null once something has.';
comment on column public.webhook_endpoints.is_slow is 'It kept somebody waiting lately, so that it is delivered to from a queue of its own kind, and holds up nobody else.';

create table private.webhook_endpoint_secrets (
  endpoint_id     uuid primary key,
  organization_id uuid not null,
  secret_sealed   text not null,
  previous_sealed text,
  previous_until  timestamptz,
  foreign key (organization_id, endpoint_id) references public.webhook_endpoints (organization_id, id) on delete cascade,
  check ((previous_sealed is null) = (previous_until is null))
);
create index idx_webhook_endpoint_secrets_endpoint on private.webhook_endpoint_secrets (organization_id, endpoint_id);
select private.close_table('private.webhook_endpoint_secrets');
comment on table private.webhook_endpoint_secrets is 'What an endpoint''s deliveries are signed with, sealed for its row by the handler. Nobody reads it back.';
comment on column private.webhook_endpoint_secrets.previous_until is 'Real time until which the one before signs too.';

create table public.event_deliveries (
  id              uuid primary key default private.uuid_v7(),
  organization_id uuid not null references public.organizations (id) on delete cascade,
  endpoint_id     uuid not null,
  event_id        uuid not null,
  topic           text not null,
  status          text not null default 'pending' check (status in ('pending', 'delivered', 'failed', 'dead')),
  attempts        integer not null default 0 check (attempts >= 0),
  next_attempt_at timestamptz,
  lease_until     timestamptz,
  lease_token     uuid,
  last_attempt_at timestamptz,
  response_status integer,
  response_body   text check (length(response_body) <= 1024),
  duration_ms     integer check (duration_ms >= 0),
  error           text check (length(error) <= 500),
  delivered_at    timestamptz,
  created_at      timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  unique (endpoint_id, event_id),
  foreign key (organization_id, endpoint_id) references public.webhook_endpoints (organization_id, id) on delete cascade,
  check ((next_attempt_at is not null) = (status in ('pending', 'failed')))
) with (fillfactor = 80);
create index idx_event_deliveries_log on public.event_deliveries (organization_id, endpoint_id, id desc);
create index idx_event_deliveries_due on public.event_deliveries (endpoint_id, next_attempt_at, id) where status in ('pending', 'failed');
create index idx_event_deliveries_created_at on public.event_deliveries (created_at);
create index idx_event_deliveries_leased on public.event_deliveries (endpoint_id, lease_until) where lease_until is not null;

revoke all on public.event_deliveries from anon, authenticated, service_role;
grant select on public.event_deliveries to authenticated, service_role;
alter table public.event_deliveries enable row level security;
alter table public.event_deliveries force row level security;
create policy "Who manages webhooks may see the deliveries" on public.event_deliveries
  for select to authenticated using (organization_id = (select private.org_with('webhook.manage')));
comment on table public.event_deliveries is
  'One event to one endpoint, and what became of it. event_id is the outbox''s row, and the id by which a receiver knows a repetition; it has '
  'no foreign key, so that the log may outlive the event.';
comment on column public.event_deliveries.status is 'pending: not tried yet; failed: tried, and tried again at next_attempt_at; dead: not tried any more.';
comment on column public.event_deliveries.next_attempt_at is 'Business time.';
comment on column public.event_deliveries.lease_until is 'Real time until which it is somebody''s: a message on the queue, then the handler that sends it.';
comment on column public.event_deliveries.response_body is 'The beginning of what the endpoint answered.';


-- audit_logs ----------------------------------------------------------------------------------------------------------------------

create table public.audit_logs (
  id                       uuid primary key default private.uuid_v7(),
  organization_id          uuid not null references public.organizations (id) on delete restrict,
  user_id                  uuid,
  user_name                text,
  action                   text not null,
  entity_type              text,
  entity_id                uuid,
  metadata                 jsonb not null default '{}' check (jsonb_typeof(metadata) = 'object'),
  impersonator_user_id     uuid,
  is_impersonated          boolean not null default false,
  created_at               timestamptz not null default private.clock_now(),
  impersonation_session_id uuid,
  unique (organization_id, id)
);
create index idx_audit_logs_organization_id on public.audit_logs (organization_id, created_at desc);

revoke all on public.audit_logs from anon, authenticated, service_role;
grant select on public.audit_logs to authenticated, service_role;
alter table public.audit_logs enable row level security;
alter table public.audit_logs force row level security;
create policy "Who views the audit log may see it" on public.audit_logs
  for select to authenticated using (organization_id = (select private.org_with('audit.view')));

create function private.refuse_change() returns trigger
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
create trigger refuse_change before update or delete or truncate on public.audit_logs
  for each statement execute function private.refuse_change();
-- Also for a session that plays itself a replica.
alter table public.audit_logs enable always trigger refuse_change;
comment on table public.audit_logs is
  'Who did what, written in the transaction that did it. Only ever added to. user_id has no foreign key: the record outlives the user.';
comment on column public.audit_logs.user_id is 'Who did it; in a support session the user in whose name it was done.';
comment on column public.audit_logs.user_name is 'As they were called then; without a user the database role that did it.';
comment on column public.audit_logs.impersonator_user_id is 'The platform admin who did it in the user''s name.';
comment on column public.audit_logs.impersonation_session_id is 'The support session in which it was done; its reason is there.';

select private.ensure_partitions(private.clock_now());


-- The operator's own record -------------------------------------------------------------------------------------------------------

create table public.platform_audit_logs (
  id          uuid primary key default private.uuid_v7(),
  user_id     uuid,
  user_name   text,
  action      text not null,
  entity_type text,
  entity_id   uuid,
  metadata    jsonb not null default '{}' check (jsonb_typeof(metadata) = 'object'),
  created_at  timestamptz not null default private.clock_now()
);
create index idx_platform_audit_logs_created_at on public.platform_audit_logs (created_at desc);

revoke all on public.platform_audit_logs from anon, authenticated, service_role;
grant select on public.platform_audit_logs to authenticated, service_role;
alter table public.platform_audit_logs enable row level security;
alter table public.platform_audit_logs force row level security;
create policy "The operator's staff sees what was done to the platform" on public.platform_audit_logs
  for select to authenticated using ((select private.is_platform_admin()));
create trigger refuse_change before update or delete or truncate on public.platform_audit_logs
  for each statement execute function private.refuse_change();
alter table public.platform_audit_logs enable always trigger refuse_change;
comment on table public.platform_audit_logs is
  'As audit_logs, for what belongs to no organization: plans, prices, tax rates, permissions, the platform''s carrier accounts, its staff.';

create function private.audit(
  organization uuid, action text, entity_type text, entity_id uuid, metadata jsonb, at timestamptz
) returns void
language plpgsql volatile security definer set search_path = '' as $$
declare
  mine   public.profiles;
  person public.profiles;
  is_acting boolean;
begin
  select profile.* into mine from public.profiles as profile where profile.id = (select auth.uid());
  is_acting := coalesce(mine.acting_until > now(), false);
  select profile.* into person from public.profiles as profile where profile.id = case when is_acting then mine.acting_for else mine.id end;
  if organization is null then
    insert into public.platform_audit_logs (user_id, user_name, action, entity_type, entity_id, metadata, created_at)
    values (
      coalesce(mine.id, (select auth.uid())), coalesce(mine.full_name, mine.email, nullif((select auth.role()), ''), session_user),
      audit.action, audit.entity_type, audit.entity_id, coalesce(audit.metadata, '{}'), at
    );
    return;
  end if;
  insert into public.audit_logs (
    organization_id, user_id, user_name, action, entity_type, entity_id, metadata,
    impersonator_user_id, is_impersonated, impersonation_session_id, created_at
  )
  values (
    organization, coalesce(person.id, (select auth.uid())),
    coalesce(person.full_name, person.email, nullif((select auth.role()), ''), session_user),
    audit.action, audit.entity_type, audit.entity_id, coalesce(audit.metadata, '{}'),
    case when is_acting then mine.id end, is_acting, case when is_acting then mine.acting_session_id end, at
  );
end
$$;
comment on function private.audit(uuid, text, text, uuid, jsonb, timestamptz) is
  'Writes one line of the audit log for the user of the request, or for the database role when there is none; tagged in a support session. '
  'Without an organization it goes into the platform''s own.';


-- Privileged changes --------------------------------------------------------------------------------------------------------------
-- Written by triggers, so that no way of changing these rows, not even by hand, leaves no trace.

create function private.audit_change() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  entity  constant text := tg_argv[0];
  watched constant text[] := tg_argv[1:];
  unheard constant text[] := array['created_at', 'updated_at'];
  before  jsonb := case when tg_op <> 'INSERT' then to_jsonb(old) end;
  after   jsonb := case when tg_op <> 'DELETE' then to_jsonb(new) end;
  either  jsonb := coalesce(after, before);
  changed jsonb;
  action  text;
begin
  if tg_op = 'UPDATE' and before = after then
    return null;
  end if;
  -- A secret that changed is said to have changed, and is not shown.
  select jsonb_object_agg(
    field.name,
    case
      when field.name like '%\_sealed' or field.name like '%sha256' then to_jsonb('changed'::text)
      when tg_op = 'INSERT' then after -> field.name
      when tg_op = 'DELETE' then before -> field.name
      else jsonb_build_object('from', before -> field.name, 'to', after -> field.name)
    end
  )
  into changed
  from jsonb_object_keys(either) as field (name)
  where before -> field.name is distinct from after -> field.name
    and field.name <> all (unheard)
    and (cardinality(watched) = 0 or field.name = any (watched) or tg_op = 'INSERT');
  if changed is null and tg_op = 'UPDATE' then
    return null;
  end if;
  changed := coalesce(changed, '{}');
  if not either ? 'id' then
    -- Which row it was, where no id says so.
    changed := coalesce(
      (
        select jsonb_object_agg(attribute.attname, either -> attribute.attname)
        from pg_catalog.pg_index as index
        join pg_catalog.pg_attribute as attribute
          on attribute.attrelid = index.indrelid and attribute.attnum = any (index.indkey)
        where index.indrelid = tg_relid and index.indisprimary and attribute.attname <> 'organization_id'
      ),
      '{}'
    ) || changed;
  end if;
  action := entity || '.' || case
    when tg_op = 'INSERT' then 'created'
    when tg_op = 'DELETE' then 'deleted'
    when changed ? 'dialling_enabled' then case when (after -> 'dialling_enabled')::boolean then 'dialling_enabled' else 'dialling_disabled' end
    when changed ? 'revoked_at' then 'revoked'
    when changed ? 'accepted_at' then 'accepted'
    else 'changed'
  end;
  perform private.audit(
    case tg_table_name when 'organizations' then either ->> 'id' else either ->> 'organization_id' end::uuid,
    action, entity,
    (case when either ? 'id' then either ->> 'id' else either ->> 'plan_price_id' end)::uuid,
    changed, private.clock_now()
  );
  return null;
end
$$;
comment on function private.audit_change() is
  'Trigger: what is privileged is on record when it changes, with what it was and is. Arguments: what it is called, and the columns that '
  'count in an update and are shown of what is deleted (none: all but times).';

create trigger audit_change after update on public.organizations
  for each row when (old.* is distinct from new.*) execute function private.audit_change('organization');
create trigger audit_new_role after insert on public.roles
  for each row when (not new.is_system_default) execute function private.audit_change('role');
create trigger audit_change after update or delete on public.roles
  for each row execute function private.audit_change('role');
create trigger audit_change after insert or update or delete on public.permissions
  for each row execute function private.audit_change('permission');
create trigger audit_change after update or delete on public.api_keys
  for each row execute function private.audit_change('api_key', 'name', 'scopes', 'revoked_at', 'sha256');
create trigger audit_change after insert or update or delete on public.invitations
  for each row execute function private.audit_change('invitation', 'revoked_at', 'accepted_at', 'system_role', 'role_id', 'email', 'expires_at');
create trigger audit_change after insert or update or delete on public.carrier_accounts
  for each row execute function private.audit_change('carrier_account');
create trigger audit_change after insert or update or delete on public.webhook_sources
  for each row execute function private.audit_change('webhook_source');
create trigger audit_change after insert or update or delete on public.caller_numbers
  for each row execute function private.audit_change('caller_number');
create trigger audit_change after insert or update or delete on public.calling_hours
  for each row execute function private.audit_change('calling_hours');
create trigger audit_change after insert or update or delete on public.calling_holidays
  for each row execute function private.audit_change('calling_holiday');
create trigger audit_change after insert or update or delete on public.meters
  for each row execute function private.audit_change('meter');
create trigger audit_change after insert or update or delete on public.store_phone_numbers
  for each row execute function private.audit_change('store_phone_number');
create trigger audit_change after update of domain, status or delete on public.stores
  for each row execute function private.audit_change('store', 'name', 'domain', 'platform', 'status');
create trigger audit_change after insert or update or delete on private.store_credentials
  for each row execute function private.audit_change('store_credentials');
create trigger audit_change after update of
  name, project_id, timezone, start_date, end_date, time_start, time_end, max_concurrent_calls, max_attempts, ring_timeout_seconds,
  max_call_seconds, agent_id, record_calls, auto_complete, ai_script, call_settings
on public.campaigns
  for each row execute function private.audit_change(
    'campaign', 'name', 'project_id', 'timezone', 'start_date', 'end_date', 'time_start', 'time_end', 'max_concurrent_calls',
    'max_attempts', 'ring_timeout_seconds', 'max_call_seconds', 'agent_id', 'record_calls', 'auto_complete', 'ai_script', 'call_settings'
  );
-- What is deleted is gone: the line says that it was there, and not who it was.
create trigger audit_change after delete on public.leads
  for each row execute function private.audit_change('lead', 'project_id', 'source', 'status');
create trigger audit_change after update of status on public.invoices
  for each row when (old.status <> new.status and new.status in ('void', 'uncollectible'))
  execute function private.audit_change('invoice', 'status');
create trigger audit_change after insert or update or delete on private.dnc_registers
  for each row execute function private.audit_change('dnc_register');
create trigger audit_change after insert or update or delete on public.subscription_plans
  for each row execute function private.audit_change('plan');
create trigger audit_change after insert or update or delete on public.plan_prices
  for each row execute function private.audit_change('plan_price');
create trigger audit_change after insert or update or delete on public.plan_price_meters
  for each row execute function private.audit_change('plan_price_meter');
create trigger audit_change after insert or update or delete on public.tax_rates
  for each row execute function private.audit_change('tax_rate');
create trigger audit_change after insert or update or delete on private.billing_issuer
  for each row execute function private.audit_change('billing_issuer');
create trigger audit_new_subscription after insert on public.subscriptions
  for each row execute function private.audit_change('subscription');
-- A period that goes by is no privileged change, and happens to all of them at once.
create trigger audit_change after update on public.subscriptions
  for each row when (
    (old.plan_id, old.plan_price_id, old.next_plan_price_id, old.status, old.billing_cycle, old.trial_ends_at, old.billing_hold,
      old.cancel_at_period_end, old.cancelled_at, old.metadata)
    is distinct from
    (new.plan_id, new.plan_price_id, new.next_plan_price_id, new.status, new.billing_cycle, new.trial_ends_at, new.billing_hold,
      new.cancel_at_period_end, new.cancelled_at, new.metadata)
  ) execute function private.audit_change(
    'subscription', 'plan_id', 'plan_price_id', 'next_plan_price_id', 'status', 'billing_cycle', 'trial_ends_at', 'billing_hold',
    'cancel_at_period_end', 'cancelled_at', 'metadata'
  );
-- Credit that is given, taken back or corrected; what calls consume is the ledger's own affair.
do $$
begin
  if to_regclass('public.credit_transactions') is not null then
    create trigger audit_credit after insert on public.credit_transactions
      for each row when (new.type::text not in ('consumption', 'expiry', 'monthly_grant')) execute function private.audit_change('credit');
  end if;
end
$$;

create function private.audit_member() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  before jsonb := case when tg_op <> 'INSERT' then jsonb_build_object(
    'organization_id', old.organization_id, 'system_role', old.system_role, 'role_id', old.role_id, 'status', old.status) end;
  after  jsonb := case when tg_op <> 'DELETE' then jsonb_build_object(
    'organization_id', new.organization_id, 'system_role', new.system_role, 'role_id', new.role_id, 'status', new.status) end;
  person uuid := coalesce((to_jsonb(new) ->> 'id')::uuid, (to_jsonb(old) ->> 'id')::uuid);
  source uuid := (before ->> 'organization_id')::uuid;
  target uuid := (after ->> 'organization_id')::uuid;
  detail jsonb := jsonb_build_object('from', before, 'to', after);
  at     timestamptz := private.clock_now();
begin
  if coalesce(before ->> 'system_role', '') = 'platform_admin' or coalesce(after ->> 'system_role', '') = 'platform_admin' then
    perform private.audit(null, 'platform_admin.changed', 'profile', person, detail, at);
  end if;
  if source is not null and source is distinct from target then
    perform private.audit(
      source, case when after is null then 'member.deleted' else 'member.left' end, 'profile', person, detail, at
    );
  end if;
  if target is not null and target is distinct from source then
    perform private.audit(target, 'member.joined', 'profile', person, detail, at);
  elsif target is not null then
    perform private.audit(
      target,
      'member.' || case
        when before ->> 'status' <> after ->> 'status' then case after ->> 'status'
          when 'active' then case before ->> 'status' when 'archived' then 'joined' else 'reactivated' end
          when 'archived' then 'removed'
          else after ->> 'status'
        end
        else 'role_changed'
      end,
      'profile', person, detail, at
    );
  end if;
  return null;
end
$$;
comment on function private.audit_member() is 'Trigger: who belongs to an organization, as what, and the operator''s staff, is on record when it changes.';
create trigger audit_new_member after insert on public.profiles
  for each row when (new.organization_id is not null or new.system_role = 'platform_admin') execute function private.audit_member();
create trigger audit_member after update of organization_id, system_role, role_id, status on public.profiles
  for each row when (
    (old.organization_id, old.system_role, old.role_id, old.status) is distinct from
      (new.organization_id, new.system_role, new.role_id, new.status)
    and (
      old.organization_id is not null or new.organization_id is not null
      or old.system_role = 'platform_admin' or new.system_role = 'platform_admin'
    )
  ) execute function private.audit_member();
create trigger audit_left_member after delete on public.profiles
  for each row when (old.organization_id is not null or old.system_role = 'platform_admin') execute function private.audit_member();


-- impersonation_sessions ----------------------------------------------------------------------------------------------------------

create table public.impersonation_sessions (
  id              uuid primary key default private.uuid_v7(),
  organization_id uuid not null references public.organizations (id) on delete restrict,
  admin_id        uuid not null,
  target_user_id  uuid not null,
  reason          text not null check (length(btrim(reason)) between 10 and 1000),
  is_read_only    boolean not null default true,
  active          boolean generated always as (ended_at is null) stored,
  created_at      timestamptz not null default private.clock_now(),
  started_at      timestamptz not null default now(),
  expires_at      timestamptz not null,
  ended_at        timestamptz,
  ended_by        uuid,
  unique (organization_id, id),
  check (admin_id <> target_user_id),
  check (expires_at > started_at and expires_at <= started_at + interval '4 hours'),
  check (ended_at >= started_at)
);
create index idx_impersonation_sessions_org on public.impersonation_sessions (organization_id, created_at desc);
create unique index idx_impersonation_sessions_active on public.impersonation_sessions (admin_id) where ended_at is null;
create index idx_impersonation_sessions_admin on public.impersonation_sessions (admin_id, created_at desc);

revoke all on public.impersonation_sessions from anon, authenticated, service_role;
grant select on public.impersonation_sessions to authenticated, service_role;
alter table public.impersonation_sessions enable row level security;
alter table public.impersonation_sessions force row level security;
create policy "The organization sees who acted in it, staff their sessions" on public.impersonation_sessions
  for select to authenticated
  using (organization_id = (select private.org_with('audit.view')) or admin_id = (select auth.uid()));
comment on table public.impersonation_sessions is
  'Support: a platform admin acts for a user of an organization, for a stated reason and a short time. Never deleted, and only ended. '
  'No foreign keys to users: the record outlives both.';
comment on column public.impersonation_sessions.is_read_only is 'Only what the user may see; otherwise also what they may do.';
comment on column public.impersonation_sessions.active is 'Not ended yet. Whether it still counts is said by expires_at, at once and without anybody''s doing.';
comment on column public.impersonation_sessions.expires_at is 'Real time, as started_at and ended_at; at most four hours.';
comment on column public.impersonation_sessions.ended_by is 'Who ended it; null when its time was over.';

create function private.guard_impersonation() returns trigger
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
comment on function private.guard_impersonation() is 'Trigger: by platform admins for active users alone; then it is only ended, once.';
create trigger guard_impersonation before insert or update or delete on public.impersonation_sessions
  for each row execute function private.guard_impersonation();
create trigger refuse_truncate before truncate on public.impersonation_sessions
  for each statement execute function private.refuse_change();

create function private.follow_impersonation() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  -- The profile is what the helpers read; the session's end is audited while it still counts, so that the line is tagged.
  if tg_op = 'INSERT' then
    update public.profiles as admin
    set acting_for = new.target_user_id, acting_until = new.expires_at, acting_read_only = new.is_read_only, acting_session_id = new.id
    where admin.id = new.admin_id;
    perform private.audit(
      new.organization_id, 'impersonation.started', 'impersonation_session', new.id,
      jsonb_build_object(
        'admin_id', new.admin_id, 'target_user_id', new.target_user_id, 'reason', new.reason, 'is_read_only', new.is_read_only,
        'expires_at', new.expires_at
      ),
      private.clock_now()
    );
  elsif new.ended_at is not null and old.ended_at is null then
    perform private.audit(
      new.organization_id, 'impersonation.ended', 'impersonation_session', new.id,
      jsonb_build_object('admin_id', new.admin_id, 'ended_by', new.ended_by, 'ended_at', new.ended_at), private.clock_now()
    );
    update public.profiles as admin
    set acting_for = null, acting_until = null, acting_read_only = true, acting_session_id = null
    where admin.id = new.admin_id and admin.acting_session_id = new.id;
  end if;
  return null;
end
$$;
comment on function private.follow_impersonation() is 'Trigger: a session counts from its row on and until it is ended, and both are on record.';
create trigger follow_impersonation after insert or update on public.impersonation_sessions
  for each row execute function private.follow_impersonation();

create function private.end_sessions_of() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  if tg_when = 'BEFORE' then
    new.acting_for := null;
    new.acting_until := null;
    new.acting_read_only := true;
    new.acting_session_id := null;
    return new;
  end if;
  update public.impersonation_sessions as session
  set ended_at = greatest(least(now(), session.expires_at), session.started_at)
  where session.admin_id = new.id and session.ended_at is null;
  return null;
end
$$;
comment on function private.end_sessions_of() is 'Trigger: who is no longer staff acts for nobody.';
create trigger clear_acting before update of system_role, status on public.profiles
  for each row when (old.system_role = 'platform_admin' and (new.system_role <> 'platform_admin' or new.status <> 'active'))
  execute function private.end_sessions_of();
create trigger end_sessions_of after update of system_role, status on public.profiles
  for each row when (old.system_role = 'platform_admin' and (new.system_role <> 'platform_admin' or new.status <> 'active'))
  execute function private.end_sessions_of();

create function private.start_impersonation(target_user_id uuid, reason text, minutes integer, read_only boolean) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  me      public.profiles;
  target  public.profiles;
  session public.impersonation_sessions;
begin
  select profile.* into me from public.profiles as profile where profile.id = (select auth.uid()) for no key update;
  if me.id is null then
    perform private.raise_error(401, 'unauthenticated', 'A signed-in user''s token is required');
  end if;
  if me.system_role <> 'platform_admin' or me.status <> 'active' then
    perform private.raise_error(403, 'permission_denied', 'Only the operator''s staff acts for others');
  end if;
  if length(btrim(coalesce(reason, ''))) not between 10 and 1000 then
    perform private.raise_error(422, 'reason_required', 'A reason of 10 to 1000 characters is required', 'reason');
  end if;
  if minutes is null or minutes not between 1 and 240 then
    perform private.raise_error(422, 'invalid_minutes', 'A session lasts 1 to 240 minutes', 'minutes');
  end if;
  select profile.* into target
  from public.profiles as profile
  where profile.id = start_impersonation.target_user_id and profile.organization_id is not null
    and profile.status = 'active' and profile.system_role <> 'platform_admin';
  if target.id is null then
    perform private.raise_error(404, 'user_not_found', 'There is no such active user of an organization', 'target_user_id');
  end if;
  -- One at a time: the one before ends here, or has ended when its time was over.
  update public.impersonation_sessions as earlier
  set ended_at = greatest(least(now(), earlier.expires_at), earlier.started_at), ended_by = case when earlier.expires_at > now() then me.id end
  where earlier.admin_id = me.id and earlier.ended_at is null;
  insert into public.impersonation_sessions (organization_id, admin_id, target_user_id, reason, is_read_only, expires_at)
  values (target.organization_id, me.id, target.id, btrim(start_impersonation.reason), coalesce(read_only, true), now() + make_interval(mins => minutes))
  returning * into session;
  return jsonb_build_object(
    'id', session.id, 'organization_id', session.organization_id, 'target_user_id', session.target_user_id,
    'is_read_only', session.is_read_only, 'expires_at', session.expires_at
  );
end
$$;
comment on function private.start_impersonation(uuid, text, integer, boolean) is 'Begins a support session of the caller, and ends the one before.';

create function public.start_impersonation(target_user_id uuid, reason text, minutes integer default 30, read_only boolean default true)
returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.start_impersonation(target_user_id, reason, minutes, read_only)
$$;
comment on function public.start_impersonation(uuid, text, integer, boolean) is
  'For the operator''s staff: from now on the caller''s requests see what that user sees, and may do what they may unless read_only. '
  'Returns {"id","organization_id","target_user_id","is_read_only","expires_at"}.';

create function private.end_impersonation() returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  me    uuid := (select auth.uid());
  ended uuid;
begin
  if me is null then
    perform private.raise_error(401, 'unauthenticated', 'A signed-in user''s token is required');
  end if;
  perform from public.profiles as profile where profile.id = me for no key update;
  update public.impersonation_sessions as session
  set ended_at = greatest(least(now(), session.expires_at), session.started_at), ended_by = case when session.expires_at > now() then me end
  where session.admin_id = me and session.ended_at is null
  returning session.id into ended;
  return jsonb_build_object('ended', ended);
end
$$;
comment on function private.end_impersonation() is 'Ends the caller''s support session, if there is one.';

create function public.end_impersonation() returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.end_impersonation()
$$;
comment on function public.end_impersonation() is 'Ends the caller''s support session: {"ended": its id, or null}.';

create function private.reap_impersonations(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  ended integer;
begin
  -- Behind the profile's lock, as whoever begins one takes it first.
  perform
  from public.profiles as admin
  where admin.id in (
    select session.admin_id from public.impersonation_sessions as session where session.ended_at is null and session.expires_at <= now()
  )
  order by admin.id
  for no key update;
  update public.impersonation_sessions as session
  set ended_at = greatest(session.expires_at, session.started_at)
  where session.ended_at is null and session.expires_at <= now();
  get diagnostics ended = row_count;
  return jsonb_build_object('ended', ended);
end
$$;
comment on function private.reap_impersonations(jsonb, timestamptz) is
  'Closes sessions whose time is over. They have not counted since; this only writes the end down.';

create function public.reap_impersonations(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.reap_impersonations($1, private.clock_now())
$$;
comment on function public.reap_impersonations(jsonb) is '{"v":1} -> {"ended":n}. On the same schedule as reap_websockets().';


-- What is written in a support session --------------------------------------------------------------------------------------------
-- Every row that a platform admin writes in somebody's name is on record, whatever table it is in. Whether there is a session is
-- asked once a statement; a row then costs one look at a setting.

create function private.mark_impersonation() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  perform set_config(
    'trunkline.impersonated',
    case
      when (select auth.uid()) is not null and exists (
        select from public.profiles as mine where mine.id = (select auth.uid()) and mine.acting_until > now()
      ) then 'on'
      else 'off'
    end,
    true
  );
  return null;
end
$$;
comment on function private.mark_impersonation() is 'Trigger: notes whether the statement is one of a support session.';

create function private.audit_impersonated() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  before jsonb := case when tg_op <> 'INSERT' then to_jsonb(old) end;
  after  jsonb := case when tg_op <> 'DELETE' then to_jsonb(new) end;
  either jsonb := coalesce(after, before);
begin
  perform private.audit(
    (either ->> 'organization_id')::uuid, tg_table_name || '.' || lower(tg_op), tg_table_name,
    (either ->> 'id')::uuid,
    jsonb_build_object('columns', (
      select jsonb_agg(field.name order by field.name)
      from jsonb_object_keys(either) as field (name)
      where before -> field.name is distinct from after -> field.name
    )),
    private.clock_now()
  );
  return null;
end
$$;
comment on function private.audit_impersonated() is 'Trigger: one line for a row written in a support session, with the columns that changed.';

-- Whatever a signed-in user may write to directly and has a tenant; functions write their own lines.
do $$
declare
  target record;
begin
  for target in
    select class.oid::regclass as name
    from pg_catalog.pg_class as class
    where class.relnamespace = 'public'::regnamespace and class.relkind in ('r', 'p')
      and exists (
        select
        from pg_catalog.pg_attribute as attribute
        where attribute.attrelid = class.oid and attribute.attname = 'organization_id' and not attribute.attisdropped
      )
      and (
        has_any_column_privilege('authenticated', class.oid, 'insert, update') or has_table_privilege('authenticated', class.oid, 'delete')
      )
      and class.relname not in ('profiles', 'organizations', 'roles')
    order by class.relname
  loop
    execute format(
      'create trigger mark_impersonation before insert or update or delete on %s '
      'for each statement execute function private.mark_impersonation()', target.name
    );
    execute format(
      'create trigger audit_impersonated after insert or update or delete on %s for each row '
      'when (current_setting(''trunkline.impersonated'', true) = ''on'') execute function private.audit_impersonated()', target.name
    );
  end loop;
end
$$;

revoke execute on function
  private.audit_change(), private.audit_member(), private.guard_impersonation(), private.follow_impersonation(), private.end_sessions_of(),
  private.mark_impersonation(), private.audit_impersonated()
from public;
revoke execute on function
  private.start_impersonation(uuid, text, integer, boolean), public.start_impersonation(uuid, text, integer, boolean),
  private.end_impersonation(), public.end_impersonation(),
  private.reap_impersonations(jsonb, timestamptz), public.reap_impersonations(jsonb)
from public, anon, authenticated, service_role;
grant execute on function
  private.start_impersonation(uuid, text, integer, boolean), public.start_impersonation(uuid, text, integer, boolean),
  private.end_impersonation(), public.end_impersonation()
to authenticated;
grant execute on function private.reap_impersonations(jsonb, timestamptz), public.reap_impersonations(jsonb) to service_role;


-- What a screen watches live, where there is Realtime -----------------------------------------------------------------------------
-- Row level security holds for Realtime too: a screen is sent the rows that it could select.

do $$
declare
  watched text;
begin
  foreach watched in array array['call_logs', 'call_queue', 'campaigns', 'campaign_leads', 'conversations'] loop
    if to_regclass('public.' || watched) is not null
      and exists (select from pg_catalog.pg_publication where pubname = 'supabase_realtime' and not puballtables)
      and not exists (
        select
        from pg_catalog.pg_publication_tables as member
        where member.pubname = 'supabase_realtime' and member.schemaname = 'public' and member.tablename = watched
      )
    then
      execute format('alter publication supabase_realtime add table public.%I', watched);
    end if;
  end loop;
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
  'How long the rows of a table are kept, of those that apply_retention() knows; the operator''s setting. Without a row, or with nulls, for ever.';
comment on column private.retention_rules.strip_after is 'Age in business time at which strip_columns are emptied; rows that wait for a person keep them.';
comment on column private.retention_rules.stripped_until is 'How far that has come; rows before it are not looked at again.';
comment on column private.retention_rules.keep_months is 'Whole months after which a month''s partition is dropped, or its rows are deleted.';
insert into private.retention_rules (table_name, strip_after, strip_columns, keep_months)
values
  ('private.webhook_events', '30 days', '{headers,body,payload}', 13),
  ('private.usage_events', null, '{}', 96),
  -- Longer than the longest period of a plan: its events have keys of which there is one a period.
  ('private.outbox', '90 days', '{payload}', 13),
  ('public.event_deliveries', null, '{}', 3);
