-- What the system remembers for itself: events from outside, what is to be told, and who did what.


-- webhook_events ------------------------------------------------------------------------------------------------------------------

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
  call            jsonb,
  status          public.event_status not null,
  error           text,
  tries           integer not null default 1 check (tries >= 1),
  next_try_at     timestamptz,
  primary key (id, received_at),
  check ((status = 'failed') = (next_try_at is not null))
) partition by range (received_at);
create index idx_webhook_events_attempt on private.webhook_events (attempt_id);
create index idx_webhook_events_failed on private.webhook_events (next_try_at) where status = 'failed';
select private.close_table('private.webhook_events');
comment on table private.webhook_events is
  'Every verified event from outside as it came, and what became of it. By month of received_at, so that old months can be dropped.';
comment on column private.webhook_events.received_at is 'Business time.';
comment on column private.webhook_events.source is 'A carrier, or reconcile for what we asked the carrier ourselves.';
comment on column private.webhook_events.call is 'The event in the words of every carrier, as the handler read it.';
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
  unique (topic, key)
);
create index idx_outbox_organization_id on private.outbox (organization_id, id) where dispatched_at is null;
select private.close_table('private.outbox');
comment on table private.outbox is
  'What happened and is to be told, written in the transaction in which it happened; one row a topic and key, so that nothing is told twice.';
comment on column private.outbox.created_at is 'Business time.';

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


-- audit_logs ----------------------------------------------------------------------------------------------------------------------

create table public.audit_logs (
  id                   uuid primary key default private.uuid_v7(),
  organization_id      uuid not null references public.organizations (id) on delete restrict,
  user_id              uuid,
  user_name            text,
  action               text not null,
  entity_type          text,
  entity_id            uuid,
  metadata             jsonb not null default '{}' check (jsonb_typeof(metadata) = 'object'),
  impersonator_user_id uuid,
  is_impersonated      boolean not null default false,
  created_at           timestamptz not null default private.clock_now(),
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
  raise exception '% is only ever added to', tg_table_name using errcode = 'restrict_violation';
end
$$;
comment on function private.refuse_change() is 'Trigger: a table that is only ever added to.';
create trigger refuse_change before update or delete or truncate on public.audit_logs
  for each statement execute function private.refuse_change();
comment on table public.audit_logs is
  'Who did what, written in the transaction that did it. Only ever added to. user_id has no foreign key: the record outlives the user.';

create function private.audit(
  organization uuid, action text, entity_type text, entity_id uuid, metadata jsonb, at timestamptz
) returns void
language plpgsql volatile security definer set search_path = '' as $$
declare
  me uuid := (select auth.uid());
begin
  insert into public.audit_logs (organization_id, user_id, user_name, action, entity_type, entity_id, metadata, created_at)
  values (
    organization, me,
    (select coalesce(profile.full_name, profile.email) from public.profiles as profile where profile.id = me),
    audit.action, audit.entity_type, audit.entity_id, coalesce(audit.metadata, '{}'), at
  );
end
$$;
comment on function private.audit(uuid, text, text, uuid, jsonb, timestamptz) is
  'Writes one line of the audit log for the user of the request, or for the system when there is none.';

select private.ensure_partitions(private.clock_now());
