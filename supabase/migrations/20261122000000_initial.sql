-- Every enumerated type, each in its own guarded block, so that the file may run again and a new type is added beside old ones.
-- A type's values are never removed or renamed; a new value is appended by a migration of its own.


-- The store's side: what the CallAI document names.

do $$
begin
  create type public.store_platform as enum ('shopify', 'woocommerce', 'magento', 'bigcommerce', 'custom');
exception when duplicate_object then null;
end
$$;
comment on type public.store_platform is 'Where a store runs.';

do $$
begin
  create type public.store_status as enum ('connected', 'disconnected', 'error', 'pending');
exception when duplicate_object then null;
end
$$;
comment on type public.store_status is 'Whether a store''s platform can be reached.';

do $$
begin
  create type public.setting_category as enum ('voice', 'ai', 'integration', 'notification', 'security', 'general');
exception when duplicate_object then null;
end
$$;
comment on type public.setting_category is 'What a setting of a store is about.';

do $$
begin
  create type public.product_status as enum ('active', 'draft', 'archived', 'discontinued');
exception when duplicate_object then null;
end
$$;
comment on type public.product_status is 'A product''s state in its catalogue.';

do $$
begin
  create type public.product_availability as enum ('in_stock', 'out_of_stock', 'low_stock', 'backorder', 'discontinued');
exception when duplicate_object then null;
end
$$;
comment on type public.product_availability is 'Whether a product can be had.';

do $$
begin
  create type public.order_status as enum (
    'pending', 'confirmed', 'processing', 'shipped', 'delivered', 'cancelled', 'refunded', 'returned'
  );
exception when duplicate_object then null;
end
$$;
comment on type public.order_status is 'How far an order has come.';

do $$
begin
  create type public.payment_status as enum ('pending', 'paid', 'partially_paid', 'refunded', 'partially_refunded', 'failed', 'cancelled');
exception when duplicate_object then null;
end
$$;
comment on type public.payment_status is 'How far an order''s payment has come.';

do $$
begin
  create type public.fulfillment_status as enum ('unfulfilled', 'partial', 'fulfilled', 'restocked', 'cancelled');
exception when duplicate_object then null;
end
$$;
comment on type public.fulfillment_status is 'How far an order''s delivery has come.';

do $$
begin
  create type public.call_direction as enum ('inbound', 'outbound');
exception when duplicate_object then null;
end
$$;
comment on type public.call_direction is 'Who dialled: the callee''s view of a leg.';

do $$
begin
  create type public.call_status as enum ('initiated', 'ringing', 'answered', 'completed', 'failed', 'busy', 'no_answer', 'cancelled');
exception when duplicate_object then null;
end
$$;
comment on type public.call_status is 'A store''s view of a call; derived from attempt_status and call_outcome.';

do $$
begin
  create type public.conversation_channel as enum ('voice', 'chat', 'email', 'sms', 'whatsapp');
exception when duplicate_object then null;
end
$$;
comment on type public.conversation_channel is 'How a conversation is held.';

do $$
begin
  create type public.conversation_status as enum ('active', 'paused', 'completed', 'escalated', 'abandoned', 'resolved');
exception when duplicate_object then null;
end
$$;
comment on type public.conversation_status is 'A conversation''s state.';

do $$
begin
  create type public.message_role as enum ('customer', 'ai_assistant', 'human_agent', 'system');
exception when duplicate_object then null;
end
$$;
comment on type public.message_role is 'Who said it.';

do $$
begin
  create type public.message_type as enum ('text', 'audio', 'image', 'file', 'system_event', 'action_result');
exception when duplicate_object then null;
end
$$;
comment on type public.message_type is 'What a message carries.';


-- Tenancy and people.

do $$
begin
  create type public.user_status as enum ('invited', 'active', 'suspended', 'archived');
exception when duplicate_object then null;
end
$$;
comment on type public.user_status is 'Only an active user has an organization in the eyes of row level security.';

do $$
begin
  create type public.org_tier as enum ('free', 'starter', 'pro', 'enterprise');
exception when duplicate_object then null;
end
$$;
comment on type public.org_tier is 'The size of plan that an organization is on, for display; the subscription decides.';

do $$
begin
  create type public.system_role as enum ('owner', 'admin', 'member', 'platform_admin');
exception when duplicate_object then null;
end
$$;
comment on type public.system_role is 'What a user is without a role of their own: it chooses the default permissions.';


-- Campaigns and calling.

do $$
begin
  create type public.campaign_status as enum ('draft', 'scheduled', 'running', 'paused', 'completed', 'cancelled', 'archived', 'failed');
exception when duplicate_object then null;
end
$$;
comment on type public.campaign_status is 'Changes only along private.campaign_transitions.';

do $$
begin
  create type public.campaign_lead_status as enum ('enrolled', 'queued', 'calling', 'called', 'failed', 'opted_out', 'skipped', 'archived');
exception when duplicate_object then null;
end
$$;
comment on type public.campaign_lead_status is 'A lead in one campaign; the last five are terminal.';

do $$
begin
  create type public.queue_status as enum ('queued', 'processing', 'completed', 'failed');
exception when duplicate_object then null;
end
$$;
comment on type public.queue_status is 'queued: waits for its time; processing: an attempt is under way; the others are terminal.';

do $$
begin
  create type public.attempt_status as enum (
    'created', 'submitting', 'submission_unknown', 'queued', 'initiated', 'ringing', 'in_progress', 'ended'
  );
exception when duplicate_object then null;
end
$$;
comment on type public.attempt_status is 'One dial attempt. The order is the rank: an attempt only moves forward, and ended absorbs.';

do $$
begin
  create type public.call_outcome as enum (
    'answered', 'machine', 'busy', 'no_answer', 'rejected', 'invalid_number', 'cancelled', 'capacity', 'carrier_transient',
    'spam_blocked', 'our_fault', 'config', 'lost', 'expired', 'failed'
  );
exception when duplicate_object then null;
end
$$;
comment on type public.call_outcome is 'Why an attempt ended, one vocabulary for every carrier.';

do $$
begin
  create type public.carrier_provider as enum ('plivo', 'twilio', 'telnyx', 'vonage');
exception when duplicate_object then null;
end
$$;
comment on type public.carrier_provider is 'Whose protocol a carrier account speaks.';


-- Plans, subscriptions and money.

do $$
begin
  create type public.subscription_status as enum ('trialing', 'active', 'past_due', 'suspended', 'cancelled', 'inactive');
exception when duplicate_object then null;
end
$$;
comment on type public.subscription_status is 'A subscription''s state; an overdue invoice is derived from its due date instead.';

do $$
begin
  create type public.billing_cycle as enum ('monthly', 'yearly');
exception when duplicate_object then null;
end
$$;
comment on type public.billing_cycle is 'How long a billing period is.';

do $$
begin
  create type public.invoice_status as enum ('draft', 'open', 'paid', 'void', 'uncollectible');
exception when duplicate_object then null;
end
$$;
comment on type public.invoice_status is 'An invoice is immutable from open on, but for its payment.';

do $$
begin
  create type public.payment_method_type as enum ('card', 'upi', 'bank_transfer', 'razorpay', 'stripe');
exception when duplicate_object then null;
end
$$;
comment on type public.payment_method_type is 'How an organization pays.';


-- The system.

do $$
begin
  create type public.event_status as enum ('applied', 'ignored', 'orphan', 'failed', 'dead');
exception when duplicate_object then null;
end
$$;
comment on type public.event_status is 'What became of an event from outside. failed is tried again, dead waits for a person.';
-- Tenancy and configuration: the private schema's basics, organizations, people, roles, permissions and API keys.
-- May run twice: everything is created if it is not there, or replaced.


-- Schemas -------------------------------------------------------------------------------------------------------------------------
-- public is what the API exposes; private is what it does not: bodies of functions, partitions, raw events.

create schema if not exists extensions;
create extension if not exists pgcrypto with schema extensions;
create extension if not exists "uuid-ossp" with schema extensions;

create schema if not exists private;
comment on schema private is 'What no client may see: definer bodies of functions, queues, raw events. Never exposed by the API.';
revoke all on schema private from public;
grant usage on schema private to authenticated, service_role;

-- PostgreSQL lets everybody execute a new function; here a function is closed until a grant opens it.
alter default privileges revoke execute on functions from public;


-- Ids -----------------------------------------------------------------------------------------------------------------------------

create or replace function private.uuid_v7() returns uuid
language plpgsql volatile parallel safe set search_path = '' as $$
declare
  micros bigint := (extract(epoch from clock_timestamp()) * 1000000)::bigint;
begin
  -- 48 bits of milliseconds, the version, 12 bits of the fraction of the millisecond (RFC 9562, 6.2 method 3), 62 random bits.
  return encode(
    overlay(
      uuid_send(gen_random_uuid())
      placing int8send(((micros / 1000) << 16) | x'7000'::bigint | ((micros % 1000) * 4096 / 1000))
      from 1 for 8
    ),
    'hex'
  )::uuid;
end
$$;
comment on function private.uuid_v7() is
  'A time-ordered UUID (version 7) of the real time: its order is the order of creation to about a microsecond.';
revoke execute on function private.uuid_v7() from public;


-- Errors --------------------------------------------------------------------------------------------------------------------------

create or replace function private.raise_error(status integer, code text, message text, field text default null) returns void
language plpgsql stable set search_path = '' as $$
begin
  -- PostgREST turns sqlstate PGRST into exactly this body and this status; `details` has to be a text there.
  raise sqlstate 'PGRST' using
    message = json_build_object(
      'code', code,
      'message', message,
      'details', case when field is not null then json_build_object('field', field)::text end,
      'hint', null
    )::text,
    detail = json_build_object('status', status, 'headers', json_build_object())::text;
end
$$;
comment on function private.raise_error(integer, text, text, text) is
  'Ends the request with an HTTP status and the error body that every part of the system speaks: code, message, details, hint.';
revoke execute on function private.raise_error(integer, text, text, text) from public;


-- Walls of private tables ---------------------------------------------------------------------------------------------------------

create or replace function private.close_table(target text) returns void
language plpgsql volatile set search_path = '' as $$
declare
  relation regclass := target::regclass;
begin
  execute format('revoke all on table %s from public, anon, authenticated, service_role', relation);
  execute format('alter table %s enable row level security', relation);
  execute format('alter table %s force row level security', relation);
  if not exists (select from pg_catalog.pg_policy as policy where policy.polrelid = relation and policy.polname = 'closed') then
    execute format(
      'create policy closed on %s as restrictive for all to public using (false) with check (false)', relation
    );
  end if;
end
$$;
comment on function private.close_table(text) is
  'Walls a private table off: no grant to any role of the API, row level security enabled and forced, one policy that admits nobody.';
revoke execute on function private.close_table(text) from public;


-- Time ----------------------------------------------------------------------------------------------------------------------------
-- Business time (gaps, windows, periods, retries) is the real time plus an offset that only a demonstration or a test sets;
-- leases and tokens are judged in real time, now().

create table if not exists private.clock_offset (
  single boolean primary key default true check (single),
  shift  interval not null
);
select private.close_table('private.clock_offset');
comment on table private.clock_offset is 'At most one row: how far business time is ahead of the real time. Empty in production.';

create or replace function private.clock_now() returns timestamptz
language plpgsql stable parallel safe security definer set search_path = '' as $$
begin
  return now() + coalesce((select clock.shift from private.clock_offset as clock), interval '0');
end
$$;
comment on function private.clock_now() is 'The business time of this transaction: the only clock that decides anything but leases.';
revoke execute on function private.clock_now() from public;
grant execute on function private.clock_now() to authenticated, service_role;

create or replace function private.to_business(real_time timestamptz) returns timestamptz
language plpgsql stable parallel safe security definer set search_path = '' as $$
begin
  return real_time + coalesce((select clock.shift from private.clock_offset as clock), interval '0');
end
$$;
comment on function private.to_business(timestamptz) is 'What business time it was at a real moment that somebody outside reports.';
revoke execute on function private.to_business(timestamptz) from public;

create table if not exists private.timezones (
  name text primary key
);
select private.close_table('private.timezones');
comment on table private.timezones is
  'The IANA zones that a callee or a campaign may be in. PostgreSQL itself takes any text shaped like a POSIX zone, so a typing error would pass.';
insert into private.timezones (name)
select zone.name
from pg_catalog.pg_timezone_names as zone
where zone.name ~ '^[A-Z][A-Za-z_]+(/[A-Za-z0-9_+-]+)+$' or zone.name in ('UTC', 'GMT')
on conflict do nothing;

create or replace function private.check_timezone() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  if not exists (select from private.timezones as zone where zone.name = new.timezone) then
    perform private.raise_error(422, 'invalid_timezone', format('%L is not a time zone', new.timezone), 'timezone');
  end if;
  return new;
end
$$;
comment on function private.check_timezone() is 'Trigger: refuses a row whose timezone is not an IANA zone.';

create or replace function private.update_modified_column() returns trigger
language plpgsql set search_path = '' as $$
begin
  -- A writer that brings its own timestamp (a source's) keeps it.
  if new.updated_at is not distinct from old.updated_at then
    new.updated_at := private.clock_now();
  end if;
  return new;
end
$$;
comment on function private.update_modified_column() is 'Trigger: updated_at follows every change of the row.';


-- Partitions ----------------------------------------------------------------------------------------------------------------------

create or replace function private.ensure_partitions(parent text, at timestamptz, months_ahead integer default 3) returns integer
language plpgsql volatile security definer set search_path = '' as $$
declare
  relation  regclass := parent::regclass;
  parent_name text := (select class.relname from pg_catalog.pg_class as class where class.oid = relation);
  key_name  text := (
    select attribute.attname
    from pg_catalog.pg_partitioned_table as part
    join pg_catalog.pg_attribute as attribute on attribute.attrelid = part.partrelid and attribute.attnum = part.partattrs[0]
    where part.partrelid = relation and part.partstrat = 'r'
  );
  spare     text := format('private.%I', parent_name || '_default');
  first_day timestamp;
  child     text;
  lower_bound timestamptz;
  upper_bound timestamptz;
  made      integer := 0;
begin
  if key_name is null then
    raise exception '% is not partitioned by range', parent;
  end if;
  -- Rows of a month that nobody foresaw still have a place.
  if to_regclass(spare) is null then
    execute format('create table %s partition of %s default', spare, relation);
    perform private.close_table(spare);
    execute format('comment on table %s is %L', spare, format('Rows of %s that no month''s partition takes; should be empty.', parent));
    made := made + 1;
  end if;
  for first_day in
    select date_trunc('month', at at time zone 'UTC') + make_interval(months => ahead)
    from generate_series(0, months_ahead) as ahead
  loop
    child := format('private.%I', parent_name || to_char(first_day, '"_"YYYYMM'));
    continue when to_regclass(child) is not null;
    -- Two who want the same month at once: the second finds it made.
    perform pg_advisory_xact_lock(hashtextextended('trunkline.ensure_partitions', 0));
    continue when to_regclass(child) is not null;
    lower_bound := first_day at time zone 'UTC';
    upper_bound := (first_day + interval '1 month') at time zone 'UTC';
    -- Made apart and attached, so that writers of other months wait as little as possible.
    execute format('create table %s (like %s including all)', child, relation);
    execute format(
      'with moved as (delete from %s where %I >= %L and %I < %L returning *) insert into %s select * from moved',
      spare, key_name, lower_bound, key_name, upper_bound, child
    );
    execute format('alter table %s attach partition %s for values from (%L) to (%L)', relation, child, lower_bound, upper_bound);
    perform private.close_table(child);
    execute format('comment on table %s is %L', child, format('Rows of %s of one month (UTC).', parent));
    made := made + 1;
  end loop;
  return made;
end
$$;
comment on function private.ensure_partitions(text, timestamptz, integer) is
  'Makes the monthly partitions of one private table, from the month of `at` on, and its default partition. Returns how many it made.';
revoke execute on function private.ensure_partitions(text, timestamptz, integer) from public;

create or replace function private.ensure_partitions(at timestamptz) returns integer
language plpgsql volatile security definer set search_path = '' as $$
declare
  parent regclass;
  made   integer := 0;
begin
  for parent in
    select part.partrelid
    from pg_catalog.pg_partitioned_table as part
    join pg_catalog.pg_class as class on class.oid = part.partrelid
    where class.relnamespace = 'private'::regnamespace and part.partstrat = 'r'
    order by class.relname
  loop
    made := made + private.ensure_partitions(parent::text, at);
  end loop;
  return made;
end
$$;
comment on function private.ensure_partitions(timestamptz) is
  'Makes the monthly partitions that every partitioned table of schema private needs from now on. Cheap when there is nothing to do.';
revoke execute on function private.ensure_partitions(timestamptz) from public;


-- Nudges --------------------------------------------------------------------------------------------------------------------------

create or replace function private.nudge(function_name text) returns void
language plpgsql volatile security definer set search_path = '' as $$
declare
  mark       text := 'trunkline.nudged_' || replace(function_name, '-', '_');
  body       constant jsonb := jsonb_build_object('type', 'nudge');
  origin     text;
  secret     text;
  message_id text;
  stamp      text;
begin
  if coalesce(current_setting(mark, true), '') = pg_current_xact_id()::text then
    return;
  end if;
  perform set_config(mark, pg_current_xact_id()::text, true);
  if to_regclass('vault.decrypted_secrets') is null
    or to_regprocedure('net.http_post(text,jsonb,jsonb,jsonb,integer)') is null
  then
    return;
  end if;

  select
    max(vault.decrypted_secret) filter (where vault.name = 'trunkline_functions_url'),
    max(vault.decrypted_secret) filter (where vault.name = 'trunkline_nudge_key')
  into origin, secret
  from vault.decrypted_secrets as vault
  where vault.name in ('trunkline_functions_url', 'trunkline_nudge_key');
  if origin is null or secret is null then
    return;
  end if;

  -- Standard Webhooks: pg_net sends body::text, so what is signed here is what arrives.
  message_id := 'msg_' || replace(private.uuid_v7()::text, '-', '');
  stamp := floor(extract(epoch from clock_timestamp()))::bigint::text;
  perform net.http_post(
    url := rtrim(origin, '/') || '/' || function_name || '/nudge',
    body := body,
    params := '{}'::jsonb,
    headers := jsonb_build_object(
      'Content-Type', 'application/json',
      'webhook-id', message_id,
      'webhook-timestamp', stamp,
      'webhook-signature', 'v1,' || encode(
        extensions.hmac(
          convert_to(message_id || '.' || stamp || '.' || body::text, 'utf8'),
          decode(substr(secret, 7), 'base64'),
          'sha256'
        ),
        'base64'
      )
    ),
    timeout_milliseconds := 5000
  );
exception when others then
  -- A nudge only saves latency: the schedule finds the work anyway.
  raise warning 'nudge of % failed: %', function_name, sqlerrm;
end
$$;
comment on function private.nudge(text) is
  'Asks one of our functions to look for work now: at most one signed request a function and transaction, by pg_net, configured in Vault '
  '(trunkline_functions_url, trunkline_nudge_key = whsec_ and base64). Does nothing where that is not configured, and never fails.';
revoke execute on function private.nudge(text) from public;


-- Who asks ------------------------------------------------------------------------------------------------------------------------
-- plpgsql rather than sql, because its plans outlive the request in a pooled connection; definer, because a policy on profiles
-- must not ask itself. Policies call org_with() once a statement: (select private.org_with('…')).

create or replace function private.get_auth_org_id() returns uuid
language plpgsql stable parallel safe security definer set search_path = '' as $$
begin
  return (
    select profile.organization_id
    from public.profiles as profile
    where profile.id = (select auth.uid()) and profile.status = 'active'
  );
end
$$;
comment on function private.get_auth_org_id() is 'The organization of the user whose token the request carries; null without one.';

create or replace function private.get_auth_system_role() returns public.system_role
language plpgsql stable parallel safe security definer set search_path = '' as $$
begin
  return (
    select profile.system_role
    from public.profiles as profile
    where profile.id = (select auth.uid()) and profile.status = 'active'
  );
end
$$;
comment on function private.get_auth_system_role() is 'The system role of the user whose token the request carries; null without one.';

create or replace function private.org_with(permission text) returns uuid
language plpgsql stable parallel safe security definer set search_path = '' as $$
begin
  return (
    select profile.organization_id
    from public.profiles as profile
    left join public.roles as role on role.organization_id = profile.organization_id and role.id = profile.role_id
    where profile.id = (select auth.uid())
      and profile.status = 'active'
      and (
        profile.system_role = 'owner'
        or role.permissions ? permission
        or profile.role_id is null and exists (
          select
          from public.permissions as known
          where known.key = permission
            and case profile.system_role when 'admin' then known.admin when 'member' then known.member else false end
        )
      )
  );
end
$$;
comment on function private.org_with(text) is
  'The organization in which the request''s user holds a permission, else null: a policy compares organization_id with it. '
  'An owner holds all; a role of their own decides for the others; without one, the default of their system role.';

create or replace function private.auth_has_permission(permission text) returns boolean
language plpgsql stable parallel safe security definer set search_path = '' as $$
begin
  return private.org_with(permission) is not null;
end
$$;
comment on function private.auth_has_permission(text) is 'Whether the request''s user holds a permission in their organization.';

create or replace function private.auth_covers(permissions jsonb) returns boolean
language plpgsql stable parallel safe security definer set search_path = '' as $$
begin
  return not exists (
    select
    from jsonb_array_elements_text(permissions) as wanted (permission)
    where private.org_with(wanted.permission) is null
  );
end
$$;
comment on function private.auth_covers(jsonb) is 'Whether the request''s user holds every permission of a list: nobody gives what they have not.';

create or replace function private.require_org(permission text) returns uuid
language plpgsql stable security definer set search_path = '' as $$
declare
  organization uuid := private.org_with(permission);
begin
  if organization is not null then
    return organization;
  end if;
  if (select auth.uid()) is null then
    perform private.raise_error(401, 'unauthenticated', 'A signed-in user''s token is required');
  end if;
  if private.get_auth_org_id() is null then
    perform private.raise_error(403, 'no_organization', 'The user belongs to no organization');
  end if;
  perform private.raise_error(403, 'permission_denied', format('The permission %s is required', permission));
  return null;
end
$$;
comment on function private.require_org(text) is
  'The organization of the request''s user, who has to hold the permission: else ends the request with 401 or 403.';

revoke execute on function
  private.get_auth_org_id(), private.get_auth_system_role(), private.org_with(text), private.auth_has_permission(text),
  private.auth_covers(jsonb), private.require_org(text)
from public;
grant execute on function
  private.get_auth_org_id(), private.get_auth_system_role(), private.org_with(text), private.auth_has_permission(text),
  private.auth_covers(jsonb)
to authenticated;

create or replace function public.get_auth_org_id() returns uuid
language plpgsql stable parallel safe security invoker set search_path = '' as $$
begin
  return private.get_auth_org_id();
end
$$;
comment on function public.get_auth_org_id() is 'The caller''s organization. Also the default of organization_id, so that no client sends one.';

create or replace function public.get_auth_system_role() returns public.system_role
language plpgsql stable parallel safe security invoker set search_path = '' as $$
begin
  return private.get_auth_system_role();
end
$$;
comment on function public.get_auth_system_role() is 'The caller''s system role.';

create or replace function public.auth_has_permission(permission text) returns boolean
language plpgsql stable parallel safe security invoker set search_path = '' as $$
begin
  return private.auth_has_permission(permission);
end
$$;
comment on function public.auth_has_permission(text) is 'Whether the caller holds a permission (public.permissions lists them).';

revoke execute on function public.get_auth_org_id(), public.get_auth_system_role(), public.auth_has_permission(text)
from public, anon, authenticated, service_role;
grant execute on function public.get_auth_org_id(), public.get_auth_system_role(), public.auth_has_permission(text) to authenticated;


-- permissions ---------------------------------------------------------------------------------------------------------------------

create table if not exists public.permissions (
  key         text primary key check (key ~ '^[a-z]+\.[a-z]+$'),
  description text not null,
  admin       boolean not null,
  member      boolean not null
);

revoke all on public.permissions from anon, authenticated, service_role;
grant select on public.permissions to authenticated, service_role;
alter table public.permissions enable row level security;
alter table public.permissions force row level security;
drop policy if exists "Anyone signed in may read what permissions there are" on public.permissions;
create policy "Anyone signed in may read what permissions there are" on public.permissions
  for select to authenticated using (true);
comment on table public.permissions is
  'Every permission there is, and whether an admin and a member hold it by default; an owner holds all. Reference data.';
comment on column public.permissions.admin is 'Part of the role Admin of a new organization.';
comment on column public.permissions.member is 'Part of the role Member of a new organization.';

insert into public.permissions (key, description, admin, member)
values
  ('organization.manage', 'Change the organization itself, and make its API keys', false, false),
  ('member.manage', 'Invite, suspend and remove members', true, false),
  ('role.manage', 'Make and change roles', true, false),
  ('project.create', 'Make projects', true, false),
  ('project.edit', 'Change projects and pipelines', true, false),
  ('lead.view', 'See leads and their timeline', true, true),
  ('lead.edit', 'Make and change leads', true, true),
  ('lead.delete', 'Delete leads', true, false),
  ('lead.import', 'Import leads in bulk', true, false),
  ('campaign.view', 'See campaigns and their queue', true, true),
  ('campaign.edit', 'Make and change campaigns', true, false),
  ('campaign.run', 'Start, pause, resume and cancel campaigns', true, false),
  ('call.view', 'See calls', true, true),
  ('call.listen', 'Listen to recordings', true, false),
  ('call.control', 'Make single calls and hang up', true, false),
  ('property.view', 'See properties', true, true),
  ('property.edit', 'Make and change properties', true, false),
  ('store.view', 'See stores, orders and conversations', true, true),
  ('store.edit', 'Connect and change stores', true, false),
  ('usage.view', 'See usage against the plan', true, true),
  ('billing.view', 'See subscriptions and invoices', true, true),
  ('billing.manage', 'Change plan and payment', true, false),
  ('webhook.manage', 'Manage webhook endpoints and sources', true, false),
  ('audit.view', 'See the audit log', true, true)
on conflict (key) do update
set description = excluded.description, admin = excluded.admin, member = excluded.member
where (permissions.description, permissions.admin, permissions.member)
  is distinct from (excluded.description, excluded.admin, excluded.member);


-- organizations -------------------------------------------------------------------------------------------------------------------

create table if not exists public.organizations (
  id                   uuid primary key default gen_random_uuid(),
  name                 text not null check (length(btrim(name)) between 1 and 200),
  slug                 text unique,
  tier                 public.org_tier not null default 'free',
  onboarding_status    text not null default 'pending' check (onboarding_status in ('pending', 'completed')),
  settings             jsonb not null default '{}' check (jsonb_typeof(settings) = 'object'),
  sector               text not null default 'real_estate',
  business_type        text,
  company_name         text,
  gstin                text check (gstin ~ '^[0-9]{2}[A-Z0-9]{13}$'),
  address_line_1       text,
  address_line_2       text,
  city                 text,
  state                text,
  state_code           text check (state_code ~ '^[A-Z0-9]{1,3}$'),
  country              text not null default 'India',
  country_code         text not null default 'IN' check (country_code ~ '^[A-Z]{2}$'),
  pincode              text,
  contact_number       text,
  caller_id            text check (caller_id ~ '^\+[1-9][0-9]{1,14}$'),
  timezone             text not null default 'Asia/Kolkata',
  currency             text not null default 'INR' check (currency ~ '^[A-Z]{3}$'),
  dialling_enabled     boolean not null default true,
  max_concurrent_calls integer not null default 20 check (max_concurrent_calls >= 0),
  created_at           timestamptz not null default private.clock_now(),
  updated_at           timestamptz not null default private.clock_now()
);

revoke all on public.organizations from anon, authenticated, service_role;
grant select on public.organizations to authenticated, service_role;
grant update (
  name, onboarding_status, settings, sector, business_type, company_name, gstin, address_line_1, address_line_2, city, state, state_code,
  country, country_code, pincode, contact_number, caller_id, timezone
) on public.organizations to authenticated;
alter table public.organizations enable row level security;
alter table public.organizations force row level security;
drop policy if exists "Members may see their organization" on public.organizations;
create policy "Members may see their organization" on public.organizations
  for select to authenticated using (id = (select private.get_auth_org_id()));
drop policy if exists "Who manages the organization may change it" on public.organizations;
create policy "Who manages the organization may change it" on public.organizations
  for update to authenticated
  using (id = (select private.org_with('organization.manage')))
  with check (id = (select private.org_with('organization.manage')));

create or replace trigger update_modified_column before update on public.organizations
  for each row execute function private.update_modified_column();
create or replace trigger check_timezone before insert or update of timezone on public.organizations
  for each row execute function private.check_timezone();
comment on table public.organizations is 'The tenant: every row of a customer''s carries its id. Made by create_organization() alone.';
comment on column public.organizations.caller_id is 'The caller number it prefers, of those assigned to it in caller_numbers.';
comment on column public.organizations.dialling_enabled is 'The operator''s switch: off, and nothing is dialled for this organization.';
comment on column public.organizations.max_concurrent_calls is 'Calls in flight at once, over all campaigns.';
comment on column public.organizations.currency is 'ISO 4217, upper case.';
comment on column public.organizations.state_code is 'State or province, for the place of supply (India: the two digits of the GSTIN or the letters of the state).';


-- roles ---------------------------------------------------------------------------------------------------------------------------

create table if not exists public.roles (
  id                uuid primary key default gen_random_uuid(),
  organization_id   uuid not null default public.get_auth_org_id() references public.organizations (id) on delete cascade,
  name              text not null check (length(btrim(name)) between 1 and 100),
  description       text,
  permissions       jsonb not null default '[]' check (jsonb_typeof(permissions) = 'array'),
  is_system_default boolean not null default false,
  created_at        timestamptz not null default private.clock_now(),
  updated_at        timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  unique (organization_id, name)
);

revoke all on public.roles from anon, authenticated, service_role;
grant select, delete on public.roles to authenticated;
grant insert (name, description, permissions), update (name, description, permissions) on public.roles to authenticated;
grant select on public.roles to service_role;
alter table public.roles enable row level security;
alter table public.roles force row level security;
drop policy if exists "Members may see the roles" on public.roles;
create policy "Members may see the roles" on public.roles
  for select to authenticated using (organization_id = (select private.get_auth_org_id()));
drop policy if exists "Who manages roles may make one of permissions they hold" on public.roles;
create policy "Who manages roles may make one of permissions they hold" on public.roles
  for insert to authenticated
  with check (
    organization_id = (select private.org_with('role.manage')) and not is_system_default and private.auth_covers(permissions)
  );
drop policy if exists "Who manages roles may change one of permissions they hold" on public.roles;
create policy "Who manages roles may change one of permissions they hold" on public.roles
  for update to authenticated
  using (organization_id = (select private.org_with('role.manage')) and not is_system_default and private.auth_covers(permissions))
  with check (
    organization_id = (select private.org_with('role.manage')) and not is_system_default and private.auth_covers(permissions)
  );
drop policy if exists "Who manages roles may delete one that nobody holds" on public.roles;
create policy "Who manages roles may delete one that nobody holds" on public.roles
  for delete to authenticated
  using (organization_id = (select private.org_with('role.manage')) and not is_system_default);

create or replace function private.check_role_permissions() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  unknown text := (
    select min(wanted.permission)
    from jsonb_array_elements_text(new.permissions) as wanted (permission)
    where not exists (select from public.permissions as known where known.key = wanted.permission)
  );
begin
  if unknown is not null then
    perform private.raise_error(422, 'unknown_permission', format('There is no permission %L', unknown), 'permissions');
  end if;
  return new;
end
$$;
comment on function private.check_role_permissions() is 'Trigger: a role lists permissions that exist.';

create or replace trigger update_modified_column before update on public.roles
  for each row execute function private.update_modified_column();
create or replace trigger check_role_permissions before insert or update of permissions on public.roles
  for each row execute function private.check_role_permissions();
comment on table public.roles is 'A named set of permissions of an organization. The three that came with it cannot be changed.';


-- profiles ------------------------------------------------------------------------------------------------------------------------

create table if not exists public.profiles (
  id              uuid primary key references auth.users (id) on delete cascade,
  organization_id uuid references public.organizations (id) on delete restrict,
  role_id         uuid,
  system_role     public.system_role not null default 'member',
  status          public.user_status not null default 'active',
  full_name       text,
  email           text,
  phone           text,
  avatar_url      text,
  metadata        jsonb not null default '{}' check (jsonb_typeof(metadata) = 'object'),
  created_at      timestamptz not null default private.clock_now(),
  updated_at      timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  foreign key (organization_id, role_id) references public.roles (organization_id, id) on delete restrict,
  check (role_id is null or organization_id is not null)
);
create index if not exists idx_profiles_role on public.profiles (organization_id, role_id);

revoke all on public.profiles from anon, authenticated, service_role;
grant select on public.profiles to authenticated, service_role;
grant update (full_name, phone, avatar_url, metadata) on public.profiles to authenticated;
alter table public.profiles enable row level security;
alter table public.profiles force row level security;
drop policy if exists "Users may see themselves and their colleagues" on public.profiles;
create policy "Users may see themselves and their colleagues" on public.profiles
  for select to authenticated
  using (id = (select auth.uid()) or organization_id = (select private.get_auth_org_id()));
drop policy if exists "Users may describe themselves" on public.profiles;
create policy "Users may describe themselves" on public.profiles
  for update to authenticated using (id = (select auth.uid())) with check (id = (select auth.uid()));

create or replace trigger update_modified_column before update on public.profiles
  for each row execute function private.update_modified_column();
comment on table public.profiles is
  'A user and the organization they belong to. Nobody changes their own organization, role, system role or status: the grants leave them out.';
comment on column public.profiles.role_id is 'Decides the permissions; without one, the system role does. A role that somebody holds cannot be deleted.';

create or replace function private.handle_new_user() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  insert into public.profiles (id, email, phone, full_name, avatar_url)
  values (
    new.id, new.email, new.phone,
    coalesce(new.raw_user_meta_data ->> 'full_name', new.raw_user_meta_data ->> 'name'),
    new.raw_user_meta_data ->> 'avatar_url'
  )
  on conflict (id) do nothing;
  return new;
end
$$;
comment on function private.handle_new_user() is 'Trigger: whoever signs up has a profile, in the same transaction.';

create or replace trigger on_auth_user_created after insert on auth.users
  for each row execute function private.handle_new_user();


-- api_keys ------------------------------------------------------------------------------------------------------------------------

create table if not exists public.api_keys (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null references public.organizations (id) on delete cascade,
  name            text not null check (length(btrim(name)) between 1 and 100),
  prefix          text not null unique,
  sha256          bytea not null check (length(sha256) = 32),
  scopes          text[] not null check (cardinality(scopes) > 0),
  created_by      uuid,
  created_at      timestamptz not null default private.clock_now(),
  last_used_at    timestamptz,
  revoked_at      timestamptz,
  unique (organization_id, id),
  foreign key (organization_id, created_by) references public.profiles (organization_id, id) on delete set null (created_by)
);
create index if not exists idx_api_keys_created_by on public.api_keys (organization_id, created_by);

revoke all on public.api_keys from anon, authenticated, service_role;
grant select on public.api_keys to authenticated, service_role;
alter table public.api_keys enable row level security;
alter table public.api_keys force row level security;
drop policy if exists "Who manages the organization may see its keys" on public.api_keys;
create policy "Who manages the organization may see its keys" on public.api_keys
  for select to authenticated using (organization_id = (select private.org_with('organization.manage')));
comment on table public.api_keys is
  'Keys of an organization''s own systems: the key is the tenant. Only the SHA-256 of the whole key is kept, which 160 random bits protect.';
comment on column public.api_keys.prefix is 'The part of the key that is not secret, by which it is found: tlk_ and eight hexadecimal digits.';


-- What a new organization gets ----------------------------------------------------------------------------------------------------

create or replace function private.create_organization(
  name text, timezone text, country_code text, state_code text, at timestamptz
) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  me           uuid := (select auth.uid());
  mine         public.profiles;
  organization uuid := gen_random_uuid();
  owner_role   uuid;
begin
  if me is null then
    perform private.raise_error(401, 'unauthenticated', 'A signed-in user''s token is required');
  end if;
  if length(btrim(coalesce(name, ''))) not between 1 and 200 then
    perform private.raise_error(422, 'invalid_name', 'A name of 1 to 200 characters is required', 'name');
  end if;
  if create_organization.country_code !~ '^[A-Z]{2}$' then
    perform private.raise_error(422, 'invalid_country', 'A country is two upper-case letters', 'country_code');
  end if;
  if create_organization.state_code !~ '^[A-Z0-9]{1,3}$' then
    perform private.raise_error(422, 'invalid_state', 'A state is at most three upper-case letters or digits', 'state_code');
  end if;

  -- The row lock makes two sign-ups at once into one.
  select * into mine from public.profiles as profile where profile.id = me for update;
  if mine.id is null or mine.status <> 'active' then
    perform private.raise_error(403, 'no_profile', 'The user has no active profile');
  end if;
  if mine.organization_id is not null then
    perform private.raise_error(409, 'already_in_organization', 'The user already belongs to an organization');
  end if;

  insert into public.organizations (id, name, slug, timezone, country_code, state_code, created_at, updated_at)
  values (
    organization, btrim(create_organization.name),
    trim(both '-' from regexp_replace(lower(btrim(create_organization.name)), '[^a-z0-9]+', '-', 'g'))
      || '-' || substr(replace(organization::text, '-', ''), 1, 8),
    coalesce(create_organization.timezone, 'Asia/Kolkata'), coalesce(create_organization.country_code, 'IN'),
    create_organization.state_code, at, at
  );
  insert into public.roles (organization_id, name, description, permissions, is_system_default)
  select
    organization, role.name, role.description,
    coalesce(
      (
        select jsonb_agg(known.key order by known.key)
        from public.permissions as known
        where role.name = 'Owner' or role.name = 'Admin' and known.admin or role.name = 'Member' and known.member
      ),
      '[]'
    ),
    true
  from (
    values
      ('Owner', 'Everything'),
      ('Admin', 'Everything but the organization itself'),
      ('Member', 'Sees everything, edits leads')
  ) as role (name, description);
  select role.id into owner_role from public.roles as role where role.organization_id = organization and role.name = 'Owner';
  update public.profiles as profile
  set organization_id = organization, role_id = owner_role, system_role = 'owner'
  where profile.id = me;

  perform private.create_default_pipeline(organization);
  perform private.subscribe_organization(organization, 'free', 'trialing'::public.subscription_status, at);
  perform private.audit(organization, 'organization.created', 'organization', organization, '{}', at);
  return jsonb_build_object('organization_id', organization);
end
$$;
comment on function private.create_organization(text, text, text, text, timestamptz) is
  'An organization, its three roles, its default pipeline and its trial of the Free plan, with the caller as owner: all or nothing.';

create or replace function public.create_organization(
  name text, timezone text default 'Asia/Kolkata', country_code text default 'IN', state_code text default null
) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.create_organization(name, timezone, country_code, state_code, private.clock_now())
$$;
comment on function public.create_organization(text, text, text, text) is
  'Makes an organization with the caller as its owner; 409 when they already belong to one. Returns {"organization_id"}.';

revoke execute on function
  private.create_organization(text, text, text, text, timestamptz), public.create_organization(text, text, text, text)
from public, anon, authenticated, service_role;
grant execute on function
  private.create_organization(text, text, text, text, timestamptz), public.create_organization(text, text, text, text)
to authenticated;

create or replace function private.create_api_key(name text, scopes text[], at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('organization.manage');
  known        constant text[] := array['usage.write'];
  key_id       uuid := gen_random_uuid();
  key_prefix   text := 'tlk_' || encode(extensions.gen_random_bytes(4), 'hex');
  plain        text := key_prefix || '_' || encode(extensions.gen_random_bytes(20), 'hex');
begin
  if length(btrim(coalesce(name, ''))) not between 1 and 100 then
    perform private.raise_error(422, 'invalid_name', 'A name of 1 to 100 characters is required', 'name');
  end if;
  if coalesce(cardinality(scopes), 0) = 0 or not scopes <@ known then
    perform private.raise_error(422, 'unknown_scope', format('Scopes are: %s', array_to_string(known, ', ')), 'scopes');
  end if;
  insert into public.api_keys (id, organization_id, name, prefix, sha256, scopes, created_by, created_at)
  values (
    key_id, organization, btrim(create_api_key.name), key_prefix, extensions.digest(plain, 'sha256'),
    array(select distinct scope from unnest(create_api_key.scopes) as scope order by scope), (select auth.uid()), at
  );
  perform private.audit(organization, 'api_key.created', 'api_key', key_id, jsonb_build_object('prefix', key_prefix), at);
  return jsonb_build_object('id', key_id, 'prefix', key_prefix, 'key', plain);
end
$$;
comment on function private.create_api_key(text, text[], timestamptz) is
  'A new key of the caller''s organization; the only time that the key itself is seen.';

create or replace function public.create_api_key(name text, scopes text[]) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.create_api_key(name, scopes, private.clock_now())
$$;
comment on function public.create_api_key(text, text[]) is
  'Makes an API key and returns {"id","prefix","key"}; the key is shown this once. Needs organization.manage.';

revoke execute on function private.create_api_key(text, text[], timestamptz), public.create_api_key(text, text[])
from public, anon, authenticated, service_role;
grant execute on function private.create_api_key(text, text[], timestamptz), public.create_api_key(text, text[]) to authenticated;

-- The bodies that only other bodies and triggers use.
revoke execute on function private.check_timezone(), private.update_modified_column(), private.check_role_permissions(),
  private.handle_new_user()
from public;
-- The customer's own contacts: projects, pipelines and their stages, leads and their timeline.


-- projects ------------------------------------------------------------------------------------------------------------------------

create table public.projects (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null default public.get_auth_org_id() references public.organizations (id) on delete cascade,
  name            text not null check (length(btrim(name)) between 1 and 200),
  description     text,
  address         text,
  project_type    text,
  status          text not null default 'active' check (status in ('active', 'archived')),
  metadata        jsonb not null default '{}' check (jsonb_typeof(metadata) = 'object'),
  image_url       text check (image_url ~ '^https?://'),
  image_path      text,
  created_by      uuid default auth.uid(),
  created_at      timestamptz not null default private.clock_now(),
  updated_at      timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  foreign key (organization_id, created_by) references public.profiles (organization_id, id) on delete set null (created_by)
);
create index idx_projects_created_by on public.projects (organization_id, created_by);

revoke all on public.projects from anon, authenticated, service_role;
grant select on public.projects to authenticated, service_role;
grant
  insert (name, description, address, project_type, status, metadata, image_url, image_path),
  update (name, description, address, project_type, status, metadata, image_url, image_path)
on public.projects to authenticated;
alter table public.projects enable row level security;
alter table public.projects force row level security;
create policy "Members may see the projects" on public.projects
  for select to authenticated using (organization_id = (select private.get_auth_org_id()));
create policy "Who creates projects may make one" on public.projects
  for insert to authenticated with check (organization_id = (select private.org_with('project.create')));
create policy "Who edits projects may change one" on public.projects
  for update to authenticated
  using (organization_id = (select private.org_with('project.edit')))
  with check (organization_id = (select private.org_with('project.edit')));
create trigger update_modified_column before update on public.projects
  for each row execute function private.update_modified_column();
comment on table public.projects is 'What leads are interested in: a development, a product line. Archived, never deleted.';


-- pipelines -----------------------------------------------------------------------------------------------------------------------

create table public.pipelines (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null default public.get_auth_org_id() references public.organizations (id) on delete cascade,
  name            text not null check (length(btrim(name)) between 1 and 200),
  is_default      boolean not null default false,
  created_at      timestamptz not null default private.clock_now(),
  updated_at      timestamptz not null default private.clock_now(),
  unique (organization_id, id)
);
create unique index idx_pipelines_default on public.pipelines (organization_id) where is_default;

revoke all on public.pipelines from anon, authenticated, service_role;
grant select, delete on public.pipelines to authenticated;
grant insert (name, is_default), update (name, is_default) on public.pipelines to authenticated;
grant select on public.pipelines to service_role;
alter table public.pipelines enable row level security;
alter table public.pipelines force row level security;
create policy "Members may see the pipelines" on public.pipelines
  for select to authenticated using (organization_id = (select private.get_auth_org_id()));
create policy "Who edits projects may make a pipeline" on public.pipelines
  for insert to authenticated with check (organization_id = (select private.org_with('project.edit')));
create policy "Who edits projects may change a pipeline" on public.pipelines
  for update to authenticated
  using (organization_id = (select private.org_with('project.edit')))
  with check (organization_id = (select private.org_with('project.edit')));
create policy "Who edits projects may delete a pipeline" on public.pipelines
  for delete to authenticated using (organization_id = (select private.org_with('project.edit')) and not is_default);
create trigger update_modified_column before update on public.pipelines
  for each row execute function private.update_modified_column();
comment on table public.pipelines is 'A way of working with leads; an organization has at most one default.';


-- pipeline_stages -----------------------------------------------------------------------------------------------------------------

create table public.pipeline_stages (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null default public.get_auth_org_id() references public.organizations (id) on delete cascade,
  pipeline_id     uuid not null,
  project_id      uuid,
  name            text not null check (length(btrim(name)) between 1 and 100),
  order_index     integer not null default 0,
  position        integer generated always as (order_index) stored,
  color           text not null default '#cbd5e1' check (color ~ '^#[0-9a-fA-F]{6}$'),
  created_at      timestamptz not null default private.clock_now(),
  updated_at      timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  foreign key (organization_id, pipeline_id) references public.pipelines (organization_id, id) on delete cascade,
  foreign key (organization_id, project_id) references public.projects (organization_id, id) on delete cascade
);
create index idx_pipeline_stages_pipeline on public.pipeline_stages (organization_id, pipeline_id, order_index);
create index idx_pipeline_stages_project on public.pipeline_stages (organization_id, project_id);

revoke all on public.pipeline_stages from anon, authenticated, service_role;
grant select, delete on public.pipeline_stages to authenticated;
grant
  insert (pipeline_id, project_id, name, order_index, color),
  update (project_id, name, order_index, color)
on public.pipeline_stages to authenticated;
grant select on public.pipeline_stages to service_role;
alter table public.pipeline_stages enable row level security;
alter table public.pipeline_stages force row level security;
create policy "Members may see the stages" on public.pipeline_stages
  for select to authenticated using (organization_id = (select private.get_auth_org_id()));
create policy "Who edits projects may make a stage" on public.pipeline_stages
  for insert to authenticated with check (organization_id = (select private.org_with('project.edit')));
create policy "Who edits projects may change a stage" on public.pipeline_stages
  for update to authenticated
  using (organization_id = (select private.org_with('project.edit')))
  with check (organization_id = (select private.org_with('project.edit')));
create policy "Who edits projects may delete a stage" on public.pipeline_stages
  for delete to authenticated using (organization_id = (select private.org_with('project.edit')));
create trigger update_modified_column before update on public.pipeline_stages
  for each row execute function private.update_modified_column();
comment on table public.pipeline_stages is 'The steps of a pipeline, in order; a step of one project alone names it.';
comment on column public.pipeline_stages.position is 'The same as order_index, under the name that older clients read.';

create function private.create_default_pipeline(organization uuid) returns uuid
language plpgsql volatile security definer set search_path = '' as $$
declare
  pipeline uuid;
begin
  insert into public.pipelines (organization_id, name, is_default)
  values (organization, 'Default Pipeline', true)
  on conflict (organization_id) where is_default do nothing
  returning id into pipeline;
  if pipeline is null then
    select existing.id into pipeline from public.pipelines as existing where existing.organization_id = organization and existing.is_default;
    return pipeline;
  end if;
  insert into public.pipeline_stages (organization_id, pipeline_id, name, order_index, color)
  select organization, pipeline, stage.name, stage.number - 1, stage.color
  from unnest(
    array['New Lead', 'Contacted', 'Qualified', 'Negotiation', 'Won', 'Lost'],
    array['#3b82f6', '#eab308', '#22c55e', '#a855f7', '#15803d', '#ef4444']
  ) with ordinality as stage (name, color, number);
  return pipeline;
end
$$;
comment on function private.create_default_pipeline(uuid) is
  'Gives an organization its default pipeline of six stages, once; returns the pipeline''s id.';


-- leads ---------------------------------------------------------------------------------------------------------------------------

create table public.leads (
  id                uuid primary key default gen_random_uuid(),
  organization_id   uuid not null default public.get_auth_org_id() references public.organizations (id) on delete cascade,
  project_id        uuid,
  stage_id          uuid,
  assigned_to       uuid,
  name              text not null check (length(btrim(name)) between 1 and 200),
  email             text check (email ~ '^[^@\s]+@[^@\s]+$'),
  phone             text check (phone ~ '^\+[1-9][0-9]{6,14}$'),
  timezone          text,
  source            text not null default 'manual',
  lead_source       text,
  external_lead_id  text,
  raw_data          jsonb,
  status            text not null default 'new'
    check (status in ('new', 'contacted', 'qualified', 'converted', 'lost', 'invalid', 'do_not_call')),
  score             integer not null default 0,
  notes             text,
  call_log_id       uuid,
  call_status       public.call_outcome,
  last_contacted_at timestamptz,
  waiting_status    text,
  callback_time     timestamptz,
  recording_consent boolean not null default false,
  do_not_call       boolean not null default false,
  opted_out_at      timestamptz,
  opt_out_reason    text,
  abuse_flag        boolean not null default false,
  abuse_details     text,
  rejection_reason  text,
  archived_at       timestamptz,
  created_by        uuid default auth.uid(),
  created_at        timestamptz not null default private.clock_now(),
  updated_at        timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  -- What an import names in on_conflict: the same number twice in one project is one lead.
  unique (organization_id, project_id, phone),
  foreign key (organization_id, project_id) references public.projects (organization_id, id) on delete set null (project_id),
  foreign key (organization_id, stage_id) references public.pipeline_stages (organization_id, id) on delete set null (stage_id),
  foreign key (organization_id, assigned_to) references public.profiles (organization_id, id) on delete set null (assigned_to),
  foreign key (organization_id, created_by) references public.profiles (organization_id, id) on delete set null (created_by)
);
create index idx_leads_stage on public.leads (organization_id, stage_id);
create index idx_leads_assigned_to on public.leads (organization_id, assigned_to);
create index idx_leads_created_by on public.leads (organization_id, created_by);
create index idx_leads_created_at on public.leads (organization_id, created_at desc);
create index idx_leads_phone on public.leads (organization_id, phone);

revoke all on public.leads from anon, authenticated, service_role;
grant select, delete on public.leads to authenticated;
grant
  insert (
    id, project_id, stage_id, assigned_to, name, email, phone, timezone, source, lead_source, external_lead_id, raw_data, status, score, notes,
    callback_time, recording_consent, do_not_call, opt_out_reason
  ),
  update (
    project_id, stage_id, assigned_to, name, email, phone, timezone, source, lead_source, external_lead_id, raw_data, status, score, notes,
    callback_time, recording_consent, do_not_call, opt_out_reason, abuse_flag, abuse_details, rejection_reason, archived_at
  )
on public.leads to authenticated;
grant select on public.leads to service_role;
alter table public.leads enable row level security;
alter table public.leads force row level security;
create policy "Who views leads may see them" on public.leads
  for select to authenticated using (organization_id = (select private.org_with('lead.view')));
create policy "Who edits or imports leads may make them" on public.leads
  for insert to authenticated
  with check (organization_id in ((select private.org_with('lead.edit')), (select private.org_with('lead.import'))));
create policy "Who edits leads may change them" on public.leads
  for update to authenticated
  using (organization_id = (select private.org_with('lead.edit')))
  with check (organization_id = (select private.org_with('lead.edit')));
create policy "Who deletes leads may delete one that was in no campaign" on public.leads
  for delete to authenticated using (organization_id = (select private.org_with('lead.delete')));
create trigger update_modified_column before update on public.leads
  for each row execute function private.update_modified_column();
comment on table public.leads is
  'A person to call. The import sends no organization: it is the caller''s. Once in a campaign a lead is archived instead of deleted.';
comment on column public.leads.phone is 'E.164.';
comment on column public.leads.timezone is
  'Where the person is, an IANA zone; without one the campaign''s holds. A zone that does not exist means that nobody calls.';
comment on column public.leads.call_log_id is 'The last attempt that ended; no foreign key, because the row of an attempt may go to an archive.';
comment on column public.leads.call_status is 'How the last attempt ended.';
comment on column public.leads.recording_consent is 'Without it no call to this person is recorded, whatever the campaign says.';
comment on column public.leads.do_not_call is 'Set, and the number is suppressed for the whole organization in the same transaction.';


-- lead_activities -----------------------------------------------------------------------------------------------------------------

create table public.lead_activities (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null default public.get_auth_org_id() references public.organizations (id) on delete cascade,
  lead_id         uuid not null,
  type            text not null check (length(btrim(type)) between 1 and 50),
  content         jsonb not null default '{}' check (jsonb_typeof(content) = 'object'),
  created_by      uuid default auth.uid(),
  created_at      timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  foreign key (organization_id, lead_id) references public.leads (organization_id, id) on delete cascade,
  foreign key (organization_id, created_by) references public.profiles (organization_id, id) on delete set null (created_by)
);
create index idx_lead_activities_lead on public.lead_activities (organization_id, lead_id, created_at desc);
create index idx_lead_activities_created_by on public.lead_activities (organization_id, created_by);

revoke all on public.lead_activities from anon, authenticated, service_role;
grant select on public.lead_activities to authenticated, service_role;
grant insert (lead_id, type, content) on public.lead_activities to authenticated;
alter table public.lead_activities enable row level security;
alter table public.lead_activities force row level security;
create policy "Who views leads may see their timeline" on public.lead_activities
  for select to authenticated using (organization_id = (select private.org_with('lead.view')));
create policy "Who edits leads may add to their timeline" on public.lead_activities
  for insert to authenticated with check (organization_id = (select private.org_with('lead.edit')));
comment on table public.lead_activities is 'What happened with a lead, in order. Only ever added to.';
-- Campaigns, their queue, every dial attempt, and what decides whether a number may be dialled.
--
-- Whoever changes several of these rows locks them in this order, and within one table by id, so that no two transactions wait for
-- each other: call_logs, call_queue, campaign_leads, leads, campaigns, usage counters.


-- carrier_accounts ----------------------------------------------------------------------------------------------------------------

create table public.carrier_accounts (
  id                   uuid primary key default gen_random_uuid(),
  organization_id      uuid references public.organizations (id) on delete restrict,
  provider             public.carrier_provider not null,
  name                 text,
  account_sid          text not null check (account_sid <> ''),
  auth_token_sealed    text not null,
  api_base             text not null check (api_base ~ '^https?://'),
  max_concurrent_calls integer not null default 50 check (max_concurrent_calls >= 0),
  dialling_enabled     boolean not null default true,
  is_active            boolean not null default true,
  created_at           timestamptz not null default private.clock_now(),
  updated_at           timestamptz not null default private.clock_now(),
  unique (provider, account_sid)
);
create index idx_carrier_accounts_organization_id on public.carrier_accounts (organization_id);

revoke all on public.carrier_accounts from anon, authenticated, service_role;
grant select on public.carrier_accounts to service_role;
alter table public.carrier_accounts enable row level security;
alter table public.carrier_accounts force row level security;
create policy "No user sees a carrier account" on public.carrier_accounts
  for all to anon, authenticated using (false) with check (false);
create trigger update_modified_column before update on public.carrier_accounts
  for each row execute function private.update_modified_column();
comment on table public.carrier_accounts is
  'An account with a phone carrier; without an organization it is the platform''s own. Seen by handlers alone, its token sealed.';
comment on column public.carrier_accounts.max_concurrent_calls is 'Calls in flight at once on this account, over all organizations.';


-- caller_numbers ------------------------------------------------------------------------------------------------------------------

create table public.caller_numbers (
  id                 uuid primary key default gen_random_uuid(),
  organization_id    uuid not null references public.organizations (id) on delete restrict,
  carrier_account_id uuid not null references public.carrier_accounts (id) on delete restrict,
  phone_number       text not null unique check (phone_number ~ '^\+[1-9][0-9]{1,14}$'),
  is_active          boolean not null default true,
  created_at         timestamptz not null default private.clock_now(),
  updated_at         timestamptz not null default private.clock_now(),
  unique (organization_id, id)
);
create index idx_caller_numbers_carrier_account on public.caller_numbers (carrier_account_id);

revoke all on public.caller_numbers from anon, authenticated, service_role;
grant select on public.caller_numbers to authenticated, service_role;
alter table public.caller_numbers enable row level security;
alter table public.caller_numbers force row level security;
create policy "Who views campaigns may see the numbers it calls from" on public.caller_numbers
  for select to authenticated using (organization_id = (select private.org_with('campaign.view')));

create function private.check_caller_number() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  if exists (
    select
    from public.carrier_accounts as account
    where account.id = new.carrier_account_id and account.organization_id <> new.organization_id
  ) then
    perform private.raise_error(422, 'foreign_account', 'The carrier account belongs to another organization', 'carrier_account_id');
  end if;
  return new;
end
$$;
comment on function private.check_caller_number() is
  'Trigger: a number hangs on its organization''s own carrier account, or on the platform''s.';
create trigger check_caller_number before insert or update of organization_id, carrier_account_id on public.caller_numbers
  for each row execute function private.check_caller_number();
create trigger update_modified_column before update on public.caller_numbers
  for each row execute function private.update_modified_column();
comment on table public.caller_numbers is 'The numbers an organization calls from. The operator assigns them, on proof that they are its own.';


-- suppressions --------------------------------------------------------------------------------------------------------------------

create table public.suppressions (
  organization_id uuid not null default public.get_auth_org_id() references public.organizations (id) on delete cascade,
  phone_number    text not null check (phone_number ~ '^\+[1-9][0-9]{6,14}$'),
  source          text not null default 'user' check (source in ('user', 'lead', 'call', 'complaint')),
  reason          text,
  created_at      timestamptz not null default private.clock_now(),
  primary key (organization_id, phone_number)
);

revoke all on public.suppressions from anon, authenticated, service_role;
grant select on public.suppressions to authenticated, service_role;
grant insert (phone_number, reason) on public.suppressions to authenticated;
alter table public.suppressions enable row level security;
alter table public.suppressions force row level security;
create policy "Who views leads may see who must not be called" on public.suppressions
  for select to authenticated using (organization_id = (select private.org_with('lead.view')));
create policy "Who edits leads may suppress a number" on public.suppressions
  for insert to authenticated with check (organization_id = (select private.org_with('lead.edit')));
comment on table public.suppressions is
  'Numbers that an organization must not call, whatever lead or campaign they are in. No user takes one back.';


-- campaigns -----------------------------------------------------------------------------------------------------------------------

create table public.campaigns (
  id                   uuid primary key default gen_random_uuid(),
  organization_id      uuid not null default public.get_auth_org_id() references public.organizations (id) on delete restrict,
  project_id           uuid,
  name                 text not null check (length(btrim(name)) between 1 and 200),
  description          text,
  status               public.campaign_status not null default 'draft',
  timezone             text not null default 'Asia/Kolkata',
  start_date           date,
  end_date             date,
  time_start           time not null default '09:00',
  time_end             time not null default '21:00',
  max_concurrent_calls integer not null default 10 check (max_concurrent_calls between 1 and 10000),
  max_attempts         smallint not null default 3 check (max_attempts between 1 and 10),
  ring_timeout_seconds integer not null default 45 check (ring_timeout_seconds between 15 and 120),
  max_call_seconds     integer not null default 600 check (max_call_seconds between 30 and 14400),
  agent_id             uuid,
  record_calls         boolean not null default false,
  auto_complete        boolean not null default true,
  ai_script            text,
  call_settings        jsonb not null default '{}' check (jsonb_typeof(call_settings) = 'object'),
  metadata             jsonb not null default '{}' check (jsonb_typeof(metadata) = 'object'),
  open_leads           integer not null default 0 check (open_leads >= 0),
  total_enrolled       integer not null default 0 check (total_enrolled >= 0),
  total_calls          integer not null default 0 check (total_calls >= 0),
  answered_calls       integer not null default 0 check (answered_calls >= 0),
  transferred_calls    integer not null default 0 check (transferred_calls >= 0),
  started_at           timestamptz,
  paused_at            timestamptz,
  completed_at         timestamptz,
  cancelled_at         timestamptz,
  archived_at          timestamptz,
  created_by           uuid default auth.uid(),
  created_at           timestamptz not null default private.clock_now(),
  updated_at           timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  check (start_date <= end_date),
  foreign key (organization_id, project_id) references public.projects (organization_id, id) on delete set null (project_id),
  foreign key (organization_id, created_by) references public.profiles (organization_id, id) on delete set null (created_by)
) with (fillfactor = 70);
create index idx_campaigns_organization_id on public.campaigns (organization_id, created_at desc);
create index idx_campaigns_project on public.campaigns (organization_id, project_id);
create index idx_campaigns_created_by on public.campaigns (organization_id, created_by);
create index idx_campaigns_running on public.campaigns (id) where status = 'running';

revoke all on public.campaigns from anon, authenticated, service_role;
grant select on public.campaigns to authenticated, service_role;
grant
  insert (
    project_id, name, description, timezone, start_date, end_date, time_start, time_end, max_concurrent_calls, max_attempts, agent_id,
    record_calls, auto_complete, ai_script, call_settings, metadata
  ),
  update (
    name, description, timezone, start_date, end_date, time_start, time_end, max_concurrent_calls, agent_id, record_calls, auto_complete,
    ai_script, call_settings, metadata
  )
on public.campaigns to authenticated;
alter table public.campaigns enable row level security;
alter table public.campaigns force row level security;
create policy "Who views campaigns may see them" on public.campaigns
  for select to authenticated using (organization_id = (select private.org_with('campaign.view')));
create policy "Who edits campaigns may draft one" on public.campaigns
  for insert to authenticated with check (organization_id = (select private.org_with('campaign.edit')));
create policy "Who edits campaigns may change one that is not over" on public.campaigns
  for update to authenticated
  using (
    organization_id = (select private.org_with('campaign.edit')) and status in ('draft', 'scheduled', 'running', 'paused')
  )
  with check (organization_id = (select private.org_with('campaign.edit')));
create trigger update_modified_column before update on public.campaigns
  for each row execute function private.update_modified_column();
create trigger check_timezone before insert or update of timezone on public.campaigns
  for each row execute function private.check_timezone();
comment on table public.campaigns is
  'Leads to be called, when and how. Users describe it; its status and its counters change only through functions.';
comment on column public.campaigns.time_start is
  'From this local time of the callee on, this minute included; together with time_end clamped to 09:00-21:00. Later than time_end: overnight.';
comment on column public.campaigns.open_leads is 'Leads of this campaign that are not yet in a terminal state; at 0 the campaign completes.';
comment on column public.campaigns.total_calls is 'Attempts that rang out to the carrier and ended, each once.';
comment on column public.campaigns.answered_calls is 'Of these, the ones that a person answered.';
comment on column public.campaigns.agent_id is 'Which voice agent speaks; its websocket origin is configuration of the answering function.';

create table private.campaign_transitions (
  from_status public.campaign_status not null,
  to_status   public.campaign_status not null,
  primary key (from_status, to_status)
);
select private.close_table('private.campaign_transitions');
comment on table private.campaign_transitions is 'Every change of a campaign''s status that there is. Reference data.';
insert into private.campaign_transitions (from_status, to_status)
values
  ('draft', 'scheduled'), ('draft', 'running'), ('draft', 'cancelled'),
  ('scheduled', 'draft'), ('scheduled', 'running'), ('scheduled', 'cancelled'),
  ('running', 'paused'), ('running', 'completed'), ('running', 'cancelled'), ('running', 'failed'),
  ('paused', 'running'), ('paused', 'completed'), ('paused', 'cancelled'), ('paused', 'failed'),
  ('completed', 'archived'), ('cancelled', 'archived'), ('failed', 'archived'),
  ('archived', 'draft');

create function private.check_campaign_status() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  if not exists (
    select
    from private.campaign_transitions as allowed
    where allowed.from_status = old.status and allowed.to_status = new.status
  ) then
    perform private.raise_error(
      409, 'invalid_transition', format('A campaign that is %s cannot become %s', old.status, new.status), 'status'
    );
  end if;
  return new;
end
$$;
comment on function private.check_campaign_status() is 'Trigger: a campaign''s status changes only along private.campaign_transitions.';
create trigger check_campaign_status before update of status on public.campaigns
  for each row when (old.status is distinct from new.status) execute function private.check_campaign_status();

create function private.nudge_dispatch() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  perform private.nudge('call-dispatch');
  return null;
end
$$;
comment on function private.nudge_dispatch() is 'Trigger: there may be calls to release; the dispatcher looks now instead of within the minute.';
create trigger nudge_dispatch after update of status on public.campaigns
  for each row when (old.status is distinct from new.status and new.status = 'running') execute function private.nudge_dispatch();


-- campaign_leads ------------------------------------------------------------------------------------------------------------------

create table public.campaign_leads (
  id                   uuid primary key default gen_random_uuid(),
  organization_id      uuid not null references public.organizations (id) on delete restrict,
  campaign_id          uuid not null,
  lead_id              uuid not null,
  status               public.campaign_lead_status not null default 'enrolled',
  attempt_count        smallint not null default 0,
  last_call_attempt_at timestamptz,
  call_log_id          uuid,
  skip_reason          text,
  opted_out_at         timestamptz,
  opt_out_reason       text,
  enrolled_by          uuid,
  enrolled_at          timestamptz not null default private.clock_now(),
  created_at           timestamptz not null default private.clock_now(),
  updated_at           timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  unique (organization_id, campaign_id, lead_id),
  foreign key (organization_id, campaign_id) references public.campaigns (organization_id, id) on delete restrict,
  foreign key (organization_id, lead_id) references public.leads (organization_id, id) on delete restrict,
  foreign key (organization_id, enrolled_by) references public.profiles (organization_id, id) on delete set null (enrolled_by)
) with (fillfactor = 80);
create index idx_campaign_leads_status on public.campaign_leads (campaign_id, status);
create index idx_campaign_leads_lead on public.campaign_leads (organization_id, lead_id);
create index idx_campaign_leads_enrolled_by on public.campaign_leads (organization_id, enrolled_by);

revoke all on public.campaign_leads from anon, authenticated, service_role;
grant select on public.campaign_leads to authenticated, service_role;
alter table public.campaign_leads enable row level security;
alter table public.campaign_leads force row level security;
create policy "Who views campaigns may see their leads" on public.campaign_leads
  for select to authenticated using (organization_id = (select private.org_with('campaign.view')));
create trigger update_modified_column before update on public.campaign_leads
  for each row execute function private.update_modified_column();
comment on table public.campaign_leads is 'A lead''s way through one campaign: enrolled, queued, calling, and back or to an end.';
comment on column public.campaign_leads.attempt_count is 'Attempts that counted: neither for want of capacity nor past their time.';


-- call_queue ----------------------------------------------------------------------------------------------------------------------

create table public.call_queue (
  id              uuid primary key default private.uuid_v7(),
  organization_id uuid not null references public.organizations (id) on delete restrict,
  campaign_id     uuid not null,
  lead_id         uuid not null,
  status          public.queue_status not null default 'queued',
  priority        smallint not null default 5 check (priority between 0 and 9),
  next_retry_at   timestamptz not null,
  wait_reason     text,
  attempt_count   smallint not null default 0 check (attempt_count >= 0),
  max_attempts    smallint not null default 3 check (max_attempts >= 1),
  dispatch_count  integer not null default 0 check (dispatch_count >= 0),
  last_error      text,
  metadata        jsonb not null default '{}' check (jsonb_typeof(metadata) = 'object'),
  created_at      timestamptz not null default private.clock_now(),
  updated_at      timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  unique (organization_id, campaign_id, lead_id),
  foreign key (organization_id, campaign_id) references public.campaigns (organization_id, id) on delete restrict,
  foreign key (organization_id, lead_id) references public.leads (organization_id, id) on delete restrict
) with (fillfactor = 80);
create index idx_call_queue_poll on public.call_queue (campaign_id, priority desc, next_retry_at) where status = 'queued';
create index idx_call_queue_due on public.call_queue (campaign_id, next_retry_at) where status = 'queued';
create index idx_call_queue_lead on public.call_queue (organization_id, lead_id);

revoke all on public.call_queue from anon, authenticated, service_role;
grant select on public.call_queue to authenticated, service_role;
alter table public.call_queue enable row level security;
alter table public.call_queue force row level security;
create policy "Who views campaigns may see their queue" on public.call_queue
  for select to authenticated using (organization_id = (select private.org_with('campaign.view')));
create trigger update_modified_column before update on public.call_queue
  for each row execute function private.update_modified_column();
create trigger nudge_dispatch after insert on public.call_queue
  for each statement execute function private.nudge_dispatch();
comment on table public.call_queue is
  'The queue of record: one row a lead and campaign. queued waits for next_retry_at, processing has an attempt under way, the rest is over.';
comment on column public.call_queue.priority is '9 first, 0 last, within a campaign.';
comment on column public.call_queue.next_retry_at is 'Business time from which the row may be released.';
comment on column public.call_queue.wait_reason is
  'Why it waits: outside_window, bad_timezone, campaign_over, min_gap, daily_cap, number_in_call, quota_exhausted, retry_<outcome>.';
comment on column public.call_queue.dispatch_count is 'Attempts made of this row, counted or not; numbers them.';

create table private.dispatch_holds (
  organization_id uuid primary key references public.organizations (id) on delete cascade,
  held_until      timestamptz not null,
  reason          text not null
);
select private.close_table('private.dispatch_holds');
comment on table private.dispatch_holds is
  'Organizations that a release need not look at until then (business time), and why: their plan''s quota was used up.';

create table private.retry_rules (
  outcome public.call_outcome not null,
  nth     smallint not null check (nth >= 1),
  delay   interval not null check (delay > interval '0'),
  primary key (outcome, nth)
);
select private.close_table('private.retry_rules');
comment on table private.retry_rules is
  'How long to wait after the nth attempt of a lead that ended so; no row: not again. The window, the gap and the caps come on top. Reference data.';
insert into private.retry_rules (outcome, nth, delay)
values
  ('busy', 1, '15 minutes'), ('busy', 2, '45 minutes'), ('busy', 3, '2 hours'),
  ('no_answer', 1, '2 hours'), ('no_answer', 2, '1 day'), ('no_answer', 3, '2 days'),
  ('machine', 1, '4 hours'), ('machine', 2, '4 hours'),
  ('rejected', 1, '1 day'),
  ('carrier_transient', 1, '5 minutes'), ('carrier_transient', 2, '20 minutes'),
  ('our_fault', 1, '5 minutes'), ('our_fault', 2, '20 minutes'),
  ('lost', 1, '5 minutes'), ('lost', 2, '20 minutes'),
  ('failed', 1, '5 minutes'), ('failed', 2, '20 minutes');


-- call_logs -----------------------------------------------------------------------------------------------------------------------

create table public.call_logs (
  id                      uuid primary key default private.uuid_v7(),
  organization_id         uuid not null references public.organizations (id) on delete restrict,
  campaign_id             uuid,
  lead_id                 uuid,
  project_id              uuid,
  queue_id                uuid,
  attempt_no              integer not null default 1 check (attempt_no >= 1),
  direction               public.call_direction not null default 'outbound',
  carrier_account_id      uuid not null references public.carrier_accounts (id) on delete restrict,
  call_sid                text unique,
  caller_number           text not null,
  callee_number           text not null,
  status                  public.attempt_status not null default 'created',
  call_status             public.call_outcome,
  refusal_reason          text,
  dialled                 boolean not null default false,
  agent_id                uuid,
  record_call             boolean not null default false,
  ring_timeout_seconds    integer not null default 45,
  time_limit_seconds      integer not null default 600,
  lease_until             timestamptz,
  lease_token             uuid,
  not_after               timestamptz,
  begun_at                timestamptz,
  created_at              timestamptz not null default private.clock_now(),
  submitted_at            timestamptz,
  ringing_at              timestamptz,
  answered_at             timestamptz,
  ended_at                timestamptz,
  duration                integer check (duration >= 0),
  bill_duration_seconds   integer check (bill_duration_seconds >= 0),
  carrier_cost_micros     bigint check (carrier_cost_micros >= 0),
  carrier_cost_currency   text check (carrier_cost_currency ~ '^[A-Z]{3}$'),
  hangup_cause_code       text,
  hangup_cause_name       text,
  hangup_source           text,
  machine                 boolean,
  recording_url           text,
  recording_id            text,
  recording_seconds       integer check (recording_seconds >= 0),
  conversation_transcript text,
  ai_analysis             jsonb,
  summary                 text,
  sentiment_score         numeric(3, 2) check (sentiment_score between -1 and 1),
  interest_level          text,
  transferred             boolean not null default false,
  transferred_at          timestamptz,
  transfer_reason         text,
  transfer_department     text,
  disconnect_reason       text,
  disconnect_notes        text,
  notes                   text,
  metadata                jsonb not null default '{}' check (jsonb_typeof(metadata) = 'object'),
  updated_at              timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  unique (organization_id, queue_id, attempt_no),
  foreign key (organization_id, campaign_id) references public.campaigns (organization_id, id) on delete restrict,
  foreign key (organization_id, lead_id) references public.leads (organization_id, id) on delete restrict,
  foreign key (organization_id, project_id) references public.projects (organization_id, id) on delete set null (project_id),
  foreign key (organization_id, queue_id) references public.call_queue (organization_id, id) on delete restrict,
  check ((status = 'ended') = (call_status is not null)),
  check ((status = 'ended') = (ended_at is not null)),
  check (answered_at >= created_at and ended_at >= answered_at),
  check (status = 'created' or status = 'ended' or dialled or direction = 'inbound')
) with (fillfactor = 70);
create index idx_call_logs_organization_id on public.call_logs (organization_id, created_at desc);
create index idx_call_logs_campaign_id on public.call_logs (organization_id, campaign_id, created_at desc);
create index idx_call_logs_lead_id on public.call_logs (organization_id, lead_id);
create index idx_call_logs_project_id on public.call_logs (organization_id, project_id) where project_id is not null;
-- Nobody is called twice at once, from whichever organization: the last wall behind every other check.
create unique index idx_call_logs_live_callee on public.call_logs (callee_number) where direction = 'outbound' and status <> 'ended';
create index idx_call_logs_live on public.call_logs (carrier_account_id, organization_id, campaign_id) where status <> 'ended';
create index idx_call_logs_lease on public.call_logs (lease_until) where status <> 'ended';
create index idx_call_logs_dialled on public.call_logs (callee_number, submitted_at desc) where dialled and direction = 'outbound';

revoke all on public.call_logs from anon, authenticated, service_role;
grant select on public.call_logs to authenticated, service_role;
grant update (notes) on public.call_logs to authenticated;
alter table public.call_logs enable row level security;
alter table public.call_logs force row level security;
create policy "Who views calls may see them" on public.call_logs
  for select to authenticated using (organization_id = (select private.org_with('call.view')));
create policy "Who controls calls may note something on one" on public.call_logs
  for update to authenticated
  using (organization_id = (select private.org_with('call.control')))
  with check (organization_id = (select private.org_with('call.control')));

create function private.check_attempt() returns trigger
language plpgsql set search_path = '' as $$
begin
  if new.status < old.status then
    raise exception 'attempt % is %, it does not go back to %', old.id, old.status, new.status using errcode = 'check_violation';
  end if;
  if old.call_sid is not null and new.call_sid is distinct from old.call_sid then
    raise exception 'attempt % is bound to another call of the carrier', old.id using errcode = 'check_violation';
  end if;
  return new;
end
$$;
comment on function private.check_attempt() is 'Trigger: an attempt moves only forward, and stays with the call that it was bound to first.';
create trigger check_attempt before update of status, call_sid on public.call_logs
  for each row execute function private.check_attempt();
create trigger update_modified_column before update on public.call_logs
  for each row execute function private.update_modified_column();
comment on table public.call_logs is
  'One row a leg, in or out: the attempt. Committed before the carrier hears of it, ended exactly once, and alone metered. Its id is the attempt id.';
comment on column public.call_logs.call_sid is 'The carrier''s id of the call; the first callback or answer that names one binds it.';
comment on column public.call_logs.call_status is 'How it ended; null until it has.';
comment on column public.call_logs.dialled is
  'The carrier may have rung the callee. False until begun, and again once it is proved that it did not. Counts for gap and caps.';
comment on column public.call_logs.lease_until is 'Real time until which somebody is expected to move the attempt on; then it is reconciled.';
comment on column public.call_logs.lease_token is 'Who began it: a lost answer to the same caller is given again.';
comment on column public.call_logs.not_after is 'Real time after which it may no longer be begun.';
comment on column public.call_logs.begun_at is 'Real time at which it was begun.';
comment on column public.call_logs.created_at is 'Business time, as submitted_at, ringing_at, answered_at and ended_at.';
comment on column public.call_logs.duration is 'Seconds from answer to end, as the carrier says.';
comment on column public.call_logs.bill_duration_seconds is 'Seconds the carrier bills, and so what the call counts.';
comment on column public.call_logs.carrier_cost_micros is 'What the carrier charges us, in millionths of carrier_cost_currency.';
comment on column public.call_logs.machine is 'An answering machine was heard.';
comment on column public.call_logs.record_call is 'The campaign records and the lead consents.';


-- What follows from a change of another row ---------------------------------------------------------------------------------------
-- A queue row that is locked is being moved by somebody who looks again; waiting for it here could close a circle of waiters.

create function private.wake_campaign() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  update public.call_queue as queue
  set next_retry_at = private.clock_now()
  where queue.id in (
    select waiting.id
    from public.call_queue as waiting
    where waiting.campaign_id = new.id
      and waiting.status = 'queued'
      and waiting.wait_reason in ('outside_window', 'bad_timezone', 'campaign_over')
    order by waiting.id
    for no key update skip locked
  );
  return null;
end
$$;
comment on function private.wake_campaign() is
  'Trigger: what waited for a campaign''s window or dates is judged again at the next release, since they have changed.';
create trigger wake_campaign after update of timezone, time_start, time_end, start_date, end_date on public.campaigns
  for each row when (
    (old.timezone, old.time_start, old.time_end, old.start_date, old.end_date)
      is distinct from (new.timezone, new.time_start, new.time_end, new.start_date, new.end_date)
  ) execute function private.wake_campaign();

create function private.wake_lead() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  update public.call_queue as queue
  set next_retry_at = private.clock_now()
  where queue.id in (
    select waiting.id
    from public.call_queue as waiting
    where waiting.organization_id = new.organization_id and waiting.lead_id = new.id and waiting.status = 'queued'
      and (
        waiting.wait_reason in ('outside_window', 'bad_timezone')
        or new.do_not_call or new.abuse_flag or new.archived_at is not null
      )
    order by waiting.id
    for no key update skip locked
  );
  return null;
end
$$;
comment on function private.wake_lead() is
  'Trigger: a lead that is elsewhere now, or must not be called any more, is judged again at the next release.';
create trigger wake_lead after update of timezone, do_not_call, abuse_flag, archived_at on public.leads
  for each row when (
    (old.timezone, old.do_not_call, old.abuse_flag, old.archived_at)
      is distinct from (new.timezone, new.do_not_call, new.abuse_flag, new.archived_at)
  ) execute function private.wake_lead();

create function private.suppress_lead() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  insert into public.suppressions (organization_id, phone_number, source, reason)
  values (new.organization_id, new.phone, 'lead', new.opt_out_reason)
  on conflict (organization_id, phone_number) do nothing;
  return null;
end
$$;
comment on function private.suppress_lead() is 'Trigger: who must not be called is not called as another lead either.';
create trigger suppress_new_lead after insert on public.leads
  for each row when (new.do_not_call and new.phone is not null) execute function private.suppress_lead();
create trigger suppress_lead after update of do_not_call, phone on public.leads
  for each row when (new.do_not_call and new.phone is not null) execute function private.suppress_lead();

create function private.wake_number() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  update public.call_queue as queue
  set next_retry_at = private.clock_now()
  where queue.id in (
    select waiting.id
    from public.leads as lead
    join public.call_queue as waiting on waiting.organization_id = lead.organization_id and waiting.lead_id = lead.id
    where lead.organization_id = new.organization_id and lead.phone = new.phone_number and waiting.status = 'queued'
    order by waiting.id
    for no key update of waiting skip locked
  );
  return null;
end
$$;
comment on function private.wake_number() is
  'Trigger: whatever waits to call a suppressed number, in any campaign, is ended at the next release.';
create trigger wake_number after insert on public.suppressions
  for each row execute function private.wake_number();

-- What a screen watches live, where there is Realtime.
do $$
begin
  if exists (select from pg_catalog.pg_publication where pubname = 'supabase_realtime') then
    alter publication supabase_realtime add table public.campaigns, public.campaign_leads, public.call_logs;
  end if;
end
$$;
-- Plans, their versioned prices, subscriptions, and what organizations have used.
--
-- Money is bigint in the currency's minor unit. A plan is what a customer chooses; a price is one immutable version of what it
-- costs and allows; a subscription points at the version it was sold. Usage is kept three times, in one transaction: as an event
-- (evidence), by organization-local day (what is billed) and by billing period (what quotas are judged by). They must always agree.

-- An overlap of two usage periods is refused by an exclusion constraint, which needs equality operators for gist.
create extension if not exists btree_gist with schema extensions;

-- Meters --------------------------------------------------------------------------------------------------------------------------

create table public.meters (
  key         text primary key,
  name        text not null,
  unit        text not null,
  is_reserved boolean not null default false,
  is_active   boolean not null default true,
  position    integer not null default 100,
  created_at  timestamptz not null default private.clock_now(),
  constraint meters_key_format check (key ~ '^[a-z][a-z0-9_]{0,62}$'),
  constraint meters_name_present check (btrim(name) <> ''),
  constraint meters_unit_format check (unit ~ '^[a-z][a-z ]{0,30}$')
);

revoke all on public.meters from anon, authenticated, service_role;
grant select on public.meters to authenticated, service_role;
alter table public.meters enable row level security;
alter table public.meters force row level security;
create policy "Signed-in users see the active meters" on public.meters
  for select to authenticated using (is_active);

comment on table public.meters is 'What can be counted: one row a kind of usage, with its unit.';
comment on column public.meters.key is 'The meter''s name in prices, in usage and in events'' `type`.';
comment on column public.meters.unit is 'The unit of its quantities, singular: call, second, message.';
comment on column public.meters.is_reserved is 'Counted by the platform alone; usage events from outside are refused.';
comment on column public.meters.position is 'Order on invoices and in usage lists, lowest first.';

-- Calls are counted by the database itself, so these two are part of the schema and not of the seed.
insert into public.meters (key, name, unit, is_reserved, position)
values
  ('ai_calls', 'AI calls', 'call', true, 10),
  ('call_seconds', 'Calling time', 'second', true, 20)
on conflict (key) do nothing;

-- Plans ---------------------------------------------------------------------------------------------------------------------------

create table public.subscription_plans (
  id          uuid primary key default gen_random_uuid(),
  slug        text not null,
  name        text not null,
  description text,
  features    jsonb not null default '{}',
  trial_days  integer not null default 14,
  is_public   boolean not null default true,
  is_active   boolean not null default true,
  sort_order  integer not null default 0,
  created_at  timestamptz not null default private.clock_now(),
  updated_at  timestamptz not null default private.clock_now(),
  constraint subscription_plans_slug_key unique (slug),
  constraint subscription_plans_slug_format check (slug ~ '^[a-z0-9]+(-[a-z0-9]+)*$'),
  constraint subscription_plans_name_present check (btrim(name) <> ''),
  constraint subscription_plans_features_object check (jsonb_typeof(features) = 'object'),
  constraint subscription_plans_trial_days_range check (trial_days between 0 and 365)
);

revoke all on public.subscription_plans from anon, authenticated, service_role;
grant select on public.subscription_plans to anon, authenticated, service_role;
alter table public.subscription_plans enable row level security;
alter table public.subscription_plans force row level security;
create policy "Visitors see the plans on offer" on public.subscription_plans
  for select to anon using (is_active and is_public);

create trigger update_modified_column before update on public.subscription_plans
  for each row execute function private.update_modified_column();

comment on table public.subscription_plans is
  'What can be subscribed to. What it costs and meters is in plan_prices; `features` holds the limits that are not metered.';
comment on column public.subscription_plans.features is
  'Limits on things that are not metered (max_users, max_leads) and what is switched on; -1 is unlimited.';
comment on column public.subscription_plans.trial_days is 'How long a subscription that starts as trialing stays so.';
comment on column public.subscription_plans.is_public is 'False for a plan made for one customer, which is not on the price list.';

-- Prices --------------------------------------------------------------------------------------------------------------------------

create table public.plan_prices (
  id            uuid primary key default gen_random_uuid(),
  plan_id       uuid not null references public.subscription_plans (id) on delete restrict,
  version       integer not null,
  billing_cycle public.billing_cycle not null default 'monthly',
  currency      text not null default 'INR',
  base_minor    bigint not null default 0,
  retired_at    timestamptz,
  created_at    timestamptz not null default private.clock_now(),
  constraint plan_prices_version_key unique (plan_id, billing_cycle, currency, version),
  constraint plan_prices_version_positive check (version > 0),
  constraint plan_prices_currency_format check (currency ~ '^[A-Z]{3}$'),
  constraint plan_prices_base_not_negative check (base_minor >= 0)
);

revoke all on public.plan_prices from anon, authenticated, service_role;
grant select on public.plan_prices to anon, authenticated, service_role;
alter table public.plan_prices enable row level security;
alter table public.plan_prices force row level security;
create policy "A price is seen by those who see its plan" on public.plan_prices
  for select to anon, authenticated using (plan_id in (select plan.id from public.subscription_plans as plan));

comment on table public.plan_prices is
  'One immutable version of what a plan costs. To change a price, insert the next version: those who subscribed keep theirs.';
comment on column public.plan_prices.version is 'The highest one that is not retired is sold to new subscribers.';
comment on column public.plan_prices.base_minor is
  'The price of one billing period, in the currency''s minor unit, billed when the period has ended.';
comment on column public.plan_prices.retired_at is 'Since when this version is no longer sold; the only column that may change.';

create table public.plan_price_meters (
  plan_price_id       uuid not null references public.plan_prices (id) on delete restrict,
  meter_key           text not null references public.meters (key) on delete restrict,
  included_units      bigint default 0,
  overage_price_minor bigint,
  overage_unit        bigint not null default 1,
  limit_units         bigint,
  hard                boolean not null default false,
  constraint plan_price_meters_pkey primary key (plan_price_id, meter_key),
  constraint plan_price_meters_included_range check (included_units >= -1),
  constraint plan_price_meters_overage_price_not_negative check (overage_price_minor >= 0),
  constraint plan_price_meters_overage_unit_positive check (overage_unit > 0),
  constraint plan_price_meters_limit_range check (limit_units >= -1)
);

create index idx_plan_price_meters_meter on public.plan_price_meters (meter_key);

revoke all on public.plan_price_meters from anon, authenticated, service_role;
grant select on public.plan_price_meters to anon, authenticated, service_role;
alter table public.plan_price_meters enable row level security;
alter table public.plan_price_meters force row level security;
create policy "What a price includes is seen by those who see the price" on public.plan_price_meters
  for select to anon, authenticated using (plan_price_id in (select price.id from public.plan_prices as price));

comment on table public.plan_price_meters is
  'What one price says about one meter: units included a period, the price beyond them, and the limit.';
comment on column public.plan_price_meters.included_units is
  'Units a billing period that the base price covers; null or -1 is all of them. A yearly price includes twelve months'' worth.';
comment on column public.plan_price_meters.overage_price_minor is
  'Price of each `overage_unit` beyond the included units, by the unit and not by started multiples; null is not sold.';
comment on column public.plan_price_meters.overage_unit is 'How many units the overage price is for: 60 prices seconds by the minute.';
comment on column public.plan_price_meters.limit_units is
  'Units a billing period after which a hard meter refuses; null or -1 is unlimited.';
comment on column public.plan_price_meters.hard is 'Whether the limit refuses new use. A meter with an overage price never refuses.';

create function private.refuse_price_change() returns trigger
language plpgsql set search_path = ''
as $$
begin
  if tg_op = 'UPDATE' and tg_table_name = 'plan_prices'
    and (to_jsonb(new) - 'retired_at') = (to_jsonb(old) - 'retired_at') then
    return new;
  end if;
  -- A version that nobody has bought yet may still be corrected or removed.
  if not exists (
    select from public.subscriptions as subscription
    where subscription.plan_price_id = case
      when tg_table_name = 'plan_prices' then (to_jsonb(old) ->> 'id')::uuid
      else (to_jsonb(coalesce(old, new)) ->> 'plan_price_id')::uuid
    end
  ) then
    return case when tg_op = 'DELETE' then old else new end;
  end if;
  raise exception 'a price that was sold does not change: insert the next version instead' using errcode = '23514';
end
$$;
revoke all on function private.refuse_price_change() from public;
comment on function private.refuse_price_change() is 'Trigger: keeps every price that somebody subscribed to as it was sold.';

create trigger plan_prices_are_versioned before update or delete on public.plan_prices
  for each row execute function private.refuse_price_change();
create trigger plan_price_meters_are_versioned before insert or update or delete on public.plan_price_meters
  for each row execute function private.refuse_price_change();

-- Subscriptions -------------------------------------------------------------------------------------------------------------------

create table public.subscriptions (
  id                   uuid primary key default gen_random_uuid(),
  organization_id      uuid not null references public.organizations (id) on delete restrict,
  plan_id              uuid not null references public.subscription_plans (id) on delete restrict,
  plan_price_id        uuid not null references public.plan_prices (id) on delete restrict,
  next_plan_price_id   uuid references public.plan_prices (id) on delete restrict,
  status               public.subscription_status not null,
  billing_cycle        public.billing_cycle not null,
  timezone             text not null,
  anchor_on            date not null,
  period_no            integer not null default 0,
  current_period_start timestamptz not null,
  current_period_end   timestamptz not null,
  trial_ends_at        timestamptz,
  next_invoice_at      timestamptz,
  billing_hold         text,
  cancel_at_period_end boolean not null default false,
  cancelled_at         timestamptz,
  metadata             jsonb not null default '{}',
  created_at           timestamptz not null default private.clock_now(),
  updated_at           timestamptz not null default private.clock_now(),
  constraint subscriptions_tenant_key unique (organization_id, id),
  constraint subscriptions_period_ordered check (current_period_start < current_period_end),
  constraint subscriptions_period_no_range check (period_no >= -1),
  constraint subscriptions_trial_has_end check (status <> 'trialing' or trial_ends_at is not null)
);

create index idx_subscriptions_org_id on public.subscriptions (organization_id);
create index idx_subscriptions_plan on public.subscriptions (plan_id);
create index idx_subscriptions_price on public.subscriptions (plan_price_id);
create index idx_subscriptions_next_price on public.subscriptions (next_plan_price_id) where next_plan_price_id is not null;
create index idx_subscriptions_due on public.subscriptions (next_invoice_at, id) where billing_hold is null;
create index idx_subscriptions_trial_end on public.subscriptions (trial_ends_at) where status = 'trialing';
create unique index idx_subscriptions_one_live on public.subscriptions (organization_id)
  where status not in ('cancelled', 'inactive');

revoke all on public.subscriptions from anon, authenticated, service_role;
grant select on public.subscriptions to authenticated, service_role;
alter table public.subscriptions enable row level security;
alter table public.subscriptions force row level security;
create policy "Members who may see billing see the subscriptions" on public.subscriptions
  for select to authenticated using (organization_id = (select private.org_with('billing.view')));

create trigger update_modified_column before update on public.subscriptions
  for each row execute function private.update_modified_column();

comment on table public.subscriptions is
  'Which price an organization is on, and which billing period it is in. At most one of its rows is live.';
comment on column public.subscriptions.plan_price_id is 'The price version that was sold; a later version does not touch it.';
comment on column public.subscriptions.next_plan_price_id is 'The price that takes over when the current period has been billed.';
comment on column public.subscriptions.timezone is
  'The organization''s time zone when it subscribed: it decides days and periods as long as the subscription lives.';
comment on column public.subscriptions.anchor_on is
  'The local date from which every period is computed, so that 31 January gives 29 February and then 31 March.';
comment on column public.subscriptions.period_no is
  'The current period begins this many billing cycles after the anchor; -1 is the trial of a plan that charges.';
comment on column public.subscriptions.current_period_start is 'The first instant of the period: midnight of a local day.';
comment on column public.subscriptions.current_period_end is 'The first instant that is no longer in the period.';
comment on column public.subscriptions.next_invoice_at is 'When the current period is closed and billed; null when nothing more is billed.';
comment on column public.subscriptions.billing_hold is
  'Why billing stopped for this subscription, for a person to look at; null while all is well.';

-- A plan made for one customer is not on offer, but its subscriber reads it; which subscriptions a user sees is decided above.
create policy "Signed-in users see the plans on offer and their own" on public.subscription_plans
  for select to authenticated using (
    (is_active and is_public)
    or id in (select subscription.plan_id from public.subscriptions as subscription)
  );

-- Usage ---------------------------------------------------------------------------------------------------------------------------

create table public.usage_logs (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null references public.organizations (id) on delete restrict,
  feature_key     text not null references public.meters (key) on delete restrict,
  usage_count     bigint not null default 0,
  reserved        bigint not null default 0,
  period_start    date not null,
  period_end      date not null,
  closed_at       timestamptz,
  metadata        jsonb not null default '{}',
  created_at      timestamptz not null default private.clock_now(),
  constraint usage_logs_tenant_key unique (organization_id, id),
  constraint usage_logs_period_key unique (organization_id, feature_key, period_start),
  constraint usage_logs_periods_apart exclude using gist (
    organization_id with =, feature_key with =, daterange(period_start, period_end) with &&
  ),
  constraint usage_logs_period_ordered check (period_start < period_end),
  constraint usage_logs_count_not_negative check (usage_count >= 0),
  constraint usage_logs_reserved_not_negative check (reserved >= 0)
) with (fillfactor = 50);

create index idx_usage_logs_org_period on public.usage_logs (organization_id, period_start, period_end);
create index idx_usage_logs_meter on public.usage_logs (feature_key);

revoke all on public.usage_logs from anon, authenticated, service_role;
grant select on public.usage_logs to authenticated, service_role;
alter table public.usage_logs enable row level security;
alter table public.usage_logs force row level security;
create policy "Members who may see usage see the counters" on public.usage_logs
  for select to authenticated using (organization_id = (select private.org_with('usage.view')));

comment on table public.usage_logs is
  'The counter of one meter in one billing period: what was used, and what is held for calls under way. Quotas are judged by it.';
comment on column public.usage_logs.feature_key is 'The meter.';
comment on column public.usage_logs.usage_count is 'Units used in the period; equals the sum of usage_days over it.';
comment on column public.usage_logs.reserved is
  'Units held for calls that have not ended; a hold stays in the period in which it was taken.';
comment on column public.usage_logs.period_start is 'First local day of the period.';
comment on column public.usage_logs.period_end is 'First local day after the period.';
comment on column public.usage_logs.closed_at is 'Since when the period is billed: usage that arrives later counts in the next one.';

create table public.usage_days (
  organization_id uuid not null references public.organizations (id) on delete restrict,
  meter_key       text not null references public.meters (key) on delete restrict,
  day             date not null,
  quantity        bigint not null default 0,
  events          bigint not null default 0,
  constraint usage_days_pkey primary key (organization_id, meter_key, day),
  constraint usage_days_quantity_not_negative check (quantity >= 0),
  constraint usage_days_events_not_negative check (events >= 0)
) with (fillfactor = 50);

create index idx_usage_days_meter on public.usage_days (meter_key);

revoke all on public.usage_days from anon, authenticated, service_role;
grant select on public.usage_days to authenticated, service_role;
alter table public.usage_days enable row level security;
alter table public.usage_days force row level security;
create policy "Members who may see usage see the days" on public.usage_days
  for select to authenticated using (organization_id = (select private.org_with('usage.view')));

comment on table public.usage_days is 'Usage of one meter on one day of the organization''s own calendar. Invoices are summed from it.';
comment on column public.usage_days.day is 'The local day, by the time zone of the subscription.';
comment on column public.usage_days.quantity is 'Units used that day.';
comment on column public.usage_days.events is 'How many events they came in.';

create table private.usage_keys (
  organization_id uuid not null references public.organizations (id) on delete restrict,
  source          text not null,
  key             text not null,
  body_hash       bytea,
  constraint usage_keys_pkey primary key (organization_id, source, key)
) partition by hash (organization_id);

do $$
begin
  for part in 0..7 loop
    execute format(
      'create table private.usage_keys_%s partition of private.usage_keys for values with (modulus 8, remainder %s)', part, part);
    perform private.close_table('private.usage_keys_' || part);
    execute format('comment on table private.usage_keys_%s is %L', part, 'Keys of one eighth of the organizations.');
  end loop;
end
$$;
select private.close_table('private.usage_keys');

comment on table private.usage_keys is
  'Every idempotency key ever counted, for ever: not split by time, since uniqueness would then depend on the event''s time.';
comment on column private.usage_keys.source is
  'Who counted: `call` is the platform itself, anything else is an organization''s own system.';
comment on column private.usage_keys.key is 'The event''s id in its source; for a call the attempt''s id.';
comment on column private.usage_keys.body_hash is
  'First 16 bytes of the SHA-256 of what was said under this key; null for a call that ended without a billed second.';

create table private.usage_events (
  id              uuid not null default private.uuid_v7(),
  organization_id uuid not null,
  meter_key       text not null,
  source          text not null,
  key             text not null,
  quantity        bigint not null,
  occurred_at     timestamptz not null,
  day             date not null,
  recorded_at     timestamptz not null,
  constraint usage_events_pkey primary key (occurred_at, id),
  constraint usage_events_quantity_positive check (quantity > 0)
) partition by range (occurred_at);

select private.close_table('private.usage_events');

comment on table private.usage_events is
  'Every event that was counted, append-only, split by month of occurrence (UTC). Its key row ties it to the organization.';
comment on column private.usage_events.occurred_at is 'When it happened, in business time.';
comment on column private.usage_events.day is
  'The local day it was counted on; later than the day it occurred on when that day''s period was already billed.';
comment on column private.usage_events.recorded_at is 'When it was counted, in business time.';

create function private.refuse_event_change() returns trigger
language plpgsql set search_path = ''
as $$
begin
  -- Making a month's partition moves what waits for it in the default one.
  if tg_op = 'DELETE' and tg_table_name = 'usage_events_default' then
    return old;
  end if;
  raise exception 'usage events are evidence: they are added, never changed' using errcode = '23514';
end
$$;
revoke all on function private.refuse_event_change() from public;
comment on function private.refuse_event_change() is 'Trigger: keeps usage events append-only.';

create trigger usage_events_are_append_only before update or delete on private.usage_events
  for each row execute function private.refuse_event_change();

select private.ensure_partitions('private.usage_events', private.clock_now());
-- Invoices, their lines and taxes, and what numbers them.
--
-- An invoice is a draft while it is put together, and a fiscal document from the moment it is open: then it has a number, its lines
-- add up to its subtotal and its taxes to its tax, and nothing but its payment changes. The database enforces each of these; no
-- client writes here at all.

-- Who sends the invoices ----------------------------------------------------------------------------------------------------------

create table private.billing_issuer (
  singleton          boolean primary key default true,
  legal_name         text not null,
  gstin              text,
  address_line_1     text,
  address_line_2     text,
  city               text,
  state              text,
  state_code         text,
  pincode            text,
  country_code       text not null,
  email              text,
  timezone           text not null,
  sac_code           text,
  payment_terms_days integer not null default 15,
  constraint billing_issuer_one_row check (singleton),
  constraint billing_issuer_name_present check (btrim(legal_name) <> ''),
  constraint billing_issuer_gstin_format check (gstin ~ '^[0-9]{2}[A-Z0-9]{13}$'),
  constraint billing_issuer_state_code_format check (state_code ~ '^[A-Z0-9]{1,3}$'),
  constraint billing_issuer_country_code_format check (country_code ~ '^[A-Z]{2}$'),
  constraint billing_issuer_terms_range check (payment_terms_days between 0 and 365)
);
select private.close_table('private.billing_issuer');

create trigger check_timezone before insert or update of timezone on private.billing_issuer
  for each row execute function private.check_timezone();

comment on table private.billing_issuer is 'Our own particulars, one row: copied onto every invoice when it is made.';
comment on column private.billing_issuer.state_code is 'The state we supply from, spelled as in organizations.state_code.';
comment on column private.billing_issuer.timezone is 'Decides an invoice''s date and the month in its number.';
comment on column private.billing_issuer.sac_code is 'The service accounting code printed on Indian invoices.';

-- Tax rates -----------------------------------------------------------------------------------------------------------------------

create table public.tax_rates (
  id           uuid primary key default gen_random_uuid(),
  country_code text not null,
  scope        text not null default 'any',
  name         text not null,
  rate_bp      integer not null,
  valid_from   date not null default '2000-01-01',
  valid_to     date,
  position     integer not null default 10,
  created_at   timestamptz not null default private.clock_now(),
  constraint tax_rates_version_key unique (country_code, scope, name, valid_from),
  constraint tax_rates_country_code_format check (country_code ~ '^[A-Z]{2}$'),
  constraint tax_rates_scope_known check (scope in ('any', 'intra_state', 'inter_state')),
  constraint tax_rates_name_present check (btrim(name) <> ''),
  constraint tax_rates_rate_range check (rate_bp between 0 and 10000),
  constraint tax_rates_validity_ordered check (valid_from < valid_to)
);

revoke all on public.tax_rates from anon, authenticated, service_role;
grant select on public.tax_rates to authenticated, service_role;
alter table public.tax_rates enable row level security;
alter table public.tax_rates force row level security;
create policy "Anyone signed in may read the tax rates" on public.tax_rates
  for select to authenticated using (true);

comment on table public.tax_rates is 'Tax by the customer''s country: one row a component. A country without rows is not taxed.';
comment on column public.tax_rates.scope is
  'any; or in a country that taxes by state, intra_state (customer in the issuer''s state) and inter_state.';
comment on column public.tax_rates.rate_bp is 'Hundredths of a percent: 900 is 9 %.';
comment on column public.tax_rates.valid_to is 'The first day on which it no longer holds; null as long as it holds.';

-- Invoices ------------------------------------------------------------------------------------------------------------------------

create table private.invoice_series (
  month       text primary key,
  last_number integer not null default 0,
  constraint invoice_series_month_format check (month ~ '^[0-9]{6}$'),
  constraint invoice_series_number_range check (last_number between 0 and 2199999)
);
select private.close_table('private.invoice_series');

comment on table private.invoice_series is
  'The last invoice number of each month. Its row lock makes numbers gap-free: a rolled back invoice gives its number back.';
comment on column private.invoice_series.month is 'Year and month by the issuer''s time zone: 202601.';

create table public.invoices (
  id                uuid primary key default gen_random_uuid(),
  organization_id   uuid not null references public.organizations (id) on delete restrict,
  subscription_id   uuid,
  kind              text not null default 'period',
  invoice_number    text,
  status            public.invoice_status not null default 'draft',
  currency          text not null,
  period_start      timestamptz not null,
  period_end        timestamptz not null,
  timezone          text not null,
  first_day         date not null,
  last_day          date not null,
  subtotal_minor    bigint not null,
  tax_minor         bigint not null,
  total_minor       bigint not null,
  amount_paid_minor bigint not null default 0,
  issuer            jsonb not null,
  customer          jsonb not null,
  invoice_date      date,
  due_date          date,
  finalized_at      timestamptz,
  paid_at           timestamptz,
  irn               text,
  ack_no            text,
  signed_qr         text,
  metadata          jsonb not null default '{}',
  created_at        timestamptz not null default private.clock_now(),
  updated_at        timestamptz not null default private.clock_now(),
  constraint invoices_tenant_key unique (organization_id, id),
  constraint invoices_number_key unique (invoice_number),
  constraint invoices_period_key unique (subscription_id, kind, period_start),
  constraint invoices_subscription_fkey foreign key (organization_id, subscription_id)
    references public.subscriptions (organization_id, id) on delete restrict,
  constraint invoices_kind_known check (kind in ('period')),
  constraint invoices_number_format check (invoice_number ~ '^IN[A-V]-[0-9]{6}-[0-9]{5}$'),
  constraint invoices_numbered_once_open check ((status = 'draft') = (invoice_number is null)),
  constraint invoices_dated_once_open check (
    status = 'draft' or (invoice_date is not null and due_date is not null and finalized_at is not null)
  ),
  constraint invoices_currency_format check (currency ~ '^[A-Z]{3}$'),
  constraint invoices_period_ordered check (period_start < period_end),
  constraint invoices_days_ordered check (first_day <= last_day),
  constraint invoices_total_adds_up check (total_minor = subtotal_minor + tax_minor),
  constraint invoices_total_not_negative check (total_minor >= 0),
  constraint invoices_paid_range check (amount_paid_minor between 0 and total_minor),
  constraint invoices_paid_in_full check (status <> 'paid' or (amount_paid_minor = total_minor and paid_at is not null)),
  constraint invoices_issuer_object check (jsonb_typeof(issuer) = 'object'),
  constraint invoices_customer_object check (jsonb_typeof(customer) = 'object')
) with (fillfactor = 80);

create index idx_invoices_org_period on public.invoices (organization_id, period_start desc);
create index idx_invoices_subscription on public.invoices (organization_id, subscription_id);
create index idx_invoices_status on public.invoices (status, due_date);

revoke all on public.invoices from anon, authenticated, service_role;
grant select on public.invoices to authenticated, service_role;
alter table public.invoices enable row level security;
alter table public.invoices force row level security;
create policy "Members who may see billing see the invoices" on public.invoices
  for select to authenticated using (organization_id = (select private.org_with('billing.view')) and status <> 'draft');

comment on table public.invoices is
  'One bill. From open on it is a fiscal document: numbered, adding up, and changed by its payment alone.';
comment on column public.invoices.kind is 'period: what one billing period of a subscription cost. A period is billed once.';
comment on column public.invoices.invoice_number is
  'INV-YYYYMM-NNNNN, given when the invoice becomes open; 16 characters at most, as India''s Rule 46 has it.';
comment on column public.invoices.timezone is 'The zone in which the period''s days are read.';
comment on column public.invoices.first_day is 'The first day that is billed, by that zone.';
comment on column public.invoices.last_day is 'The last day that is billed.';
comment on column public.invoices.subtotal_minor is 'Sum of the lines, in the currency''s minor unit.';
comment on column public.invoices.tax_minor is 'Sum of the taxes, each rounded alone.';
comment on column public.invoices.issuer is 'Our particulars as they were.';
comment on column public.invoices.customer is 'The organization''s particulars as they were.';
comment on column public.invoices.irn is 'Invoice reference number of India''s e-invoice portal, when it was registered there.';

create table public.invoice_lines (
  id               uuid primary key default gen_random_uuid(),
  organization_id  uuid not null,
  invoice_id       uuid not null,
  position         integer not null,
  kind             text not null,
  meter_key        text references public.meters (key) on delete restrict,
  description      text not null,
  quantity         bigint not null,
  unit             text not null,
  unit_price_minor bigint not null,
  price_units      bigint not null default 1,
  amount_minor     bigint not null,
  constraint invoice_lines_tenant_key unique (organization_id, id),
  constraint invoice_lines_position_key unique (organization_id, invoice_id, position),
  constraint invoice_lines_invoice_fkey foreign key (organization_id, invoice_id)
    references public.invoices (organization_id, id) on delete restrict,
  constraint invoice_lines_kind_known check (kind in ('base', 'included', 'overage')),
  constraint invoice_lines_description_present check (btrim(description) <> ''),
  constraint invoice_lines_price_units_positive check (price_units > 0)
);

create index idx_invoice_lines_meter on public.invoice_lines (meter_key) where meter_key is not null;

revoke all on public.invoice_lines from anon, authenticated, service_role;
grant select on public.invoice_lines to authenticated, service_role;
alter table public.invoice_lines enable row level security;
alter table public.invoice_lines force row level security;
create policy "Members who may see billing see the invoices' lines" on public.invoice_lines
  for select to authenticated using (organization_id = (select private.org_with('billing.view')));

comment on table public.invoice_lines is
  'What an invoice charges for, line by line; the one place where an amount is rounded, half away from zero.';
comment on column public.invoice_lines.kind is 'base: the plan; included: used within the allowance, amount 0; overage: used beyond it.';
comment on column public.invoice_lines.unit_price_minor is 'The price of `price_units` units, in the minor unit: 600 for 60 seconds.';
comment on column public.invoice_lines.amount_minor is 'quantity × unit_price_minor / price_units, rounded once.';

create table public.invoice_taxes (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null,
  invoice_id      uuid not null,
  position        integer not null,
  name            text not null,
  rate_bp         integer not null,
  taxable_minor   bigint not null,
  amount_minor    bigint not null,
  constraint invoice_taxes_tenant_key unique (organization_id, id),
  constraint invoice_taxes_name_key unique (organization_id, invoice_id, name),
  constraint invoice_taxes_invoice_fkey foreign key (organization_id, invoice_id)
    references public.invoices (organization_id, id) on delete restrict,
  constraint invoice_taxes_rate_range check (rate_bp between 0 and 10000)
);

revoke all on public.invoice_taxes from anon, authenticated, service_role;
grant select on public.invoice_taxes to authenticated, service_role;
alter table public.invoice_taxes enable row level security;
alter table public.invoice_taxes force row level security;
create policy "Members who may see billing see the invoices' taxes" on public.invoice_taxes
  for select to authenticated using (organization_id = (select private.org_with('billing.view')));

comment on table public.invoice_taxes is
  'The taxes of an invoice, one row a component, each rounded once and alone: CGST and SGST may differ from IGST by one paisa.';
comment on column public.invoice_taxes.taxable_minor is 'What the rate was applied to: the subtotal.';

-- Numbers -------------------------------------------------------------------------------------------------------------------------

create function private.invoice_number(month text, number integer) returns text
language sql immutable set search_path = ''
as $$
  select case
    when number between 1 and 99999 then 'INV-' || month || '-' || lpad(number::text, 5, '0')
    -- A sixth digit would break the 16 characters of Rule 46, so the month goes on in further series: INA, INB, to INU.
    when number between 100000 and 2199999 then
      'IN' || chr(64 + number / 100000) || '-' || month || '-' || lpad((number % 100000)::text, 5, '0')
  end
$$;
comment on function private.invoice_number(text, integer) is
  'The text of a month''s n-th number: INV-202601-00001 to INV-202601-99999, then INA-202601-00000 and on; null when the month is full.';

create function private.take_invoice_numbers(month text, wanted integer) returns integer
language sql set search_path = ''
as $$
  insert into private.invoice_series as series (month, last_number)
  values ($1, $2)
  on conflict on constraint invoice_series_pkey do update set last_number = series.last_number + excluded.last_number
  returning last_number - $2 + 1
$$;
comment on function private.take_invoice_numbers(text, integer) is
  'Takes a block of a month''s numbers and returns the first. Locks the month until the transaction ends: take them last.';

create function private.set_invoice_number() returns trigger
language plpgsql set search_path = ''
as $$
declare
  month text;
begin
  if new.status = 'draft' or new.invoice_number is not null then
    return new;
  end if;
  new.finalized_at := coalesce(new.finalized_at, private.clock_now());
  new.invoice_date := coalesce(new.invoice_date, (new.finalized_at at time zone (new.issuer ->> 'timezone'))::date);
  new.due_date := coalesce(new.due_date, new.invoice_date + coalesce((new.issuer ->> 'payment_terms_days')::integer, 0));
  month := to_char(new.finalized_at at time zone (new.issuer ->> 'timezone'), 'YYYYMM');
  new.invoice_number := private.invoice_number(month, private.take_invoice_numbers(month, 1));
  return new;
end
$$;
comment on function private.set_invoice_number() is
  'Trigger: an invoice that becomes open without a number gets the month''s next one, by the issuer''s time zone.';

-- Walls around what is fiscal -----------------------------------------------------------------------------------------------------

create function private.guard_invoice() returns trigger
language plpgsql set search_path = ''
as $$
declare
  payment constant text[] := array[
    'status', 'amount_paid_minor', 'paid_at', 'irn', 'ack_no', 'signed_qr', 'metadata', 'updated_at'
  ];
begin
  if tg_op = 'DELETE' then
    if old.status <> 'draft' then
      raise exception 'invoice % is final and is never deleted: void it', old.invoice_number using errcode = '23514';
    end if;
    return old;
  end if;
  if old.status = 'draft' then
    if new.status not in ('draft', 'open') then
      raise exception 'a draft invoice becomes open before it becomes %', new.status using errcode = '23514';
    end if;
    return new;
  end if;
  if to_jsonb(new) - payment is distinct from to_jsonb(old) - payment then
    raise exception 'invoice % is final: only its payment changes', old.invoice_number using errcode = '23514';
  end if;
  if new.status <> old.status and not (
    old.status = 'open' and new.status in ('paid', 'void', 'uncollectible')
    or old.status = 'uncollectible' and new.status in ('paid', 'void')
  ) then
    raise exception 'invoice % does not go from % to %', old.invoice_number, old.status, new.status using errcode = '23514';
  end if;
  return new;
end
$$;
comment on function private.guard_invoice() is
  'Trigger: draft to open, open to paid, void or uncollectible, uncollectible to paid or void; nothing else, and no other change '
  'once open.';

create function private.guard_invoice_parts() returns trigger
language plpgsql set search_path = ''
as $$
begin
  if exists (
    select
    from changed
    join public.invoices as invoice on invoice.organization_id = changed.organization_id and invoice.id = changed.invoice_id
    where invoice.status <> 'draft'
  ) then
    raise exception 'the lines and taxes of an invoice are final once it is open' using errcode = '23514';
  end if;
  return null;
end
$$;
comment on function private.guard_invoice_parts() is 'Trigger: lines and taxes change only while their invoice is a draft.';

create function private.check_invoice_sums() returns trigger
language plpgsql set search_path = ''
as $$
declare
  lines bigint;
  taxes bigint;
begin
  select coalesce(sum(line.amount_minor), 0)::bigint
  into lines
  from public.invoice_lines as line
  where line.organization_id = new.organization_id and line.invoice_id = new.id;
  select coalesce(sum(tax.amount_minor), 0)::bigint
  into taxes
  from public.invoice_taxes as tax
  where tax.organization_id = new.organization_id and tax.invoice_id = new.id;
  if lines <> new.subtotal_minor or taxes <> new.tax_minor then
    raise exception 'invoice %: lines of % and taxes of % do not make a subtotal of % and a tax of %',
      new.invoice_number, lines, taxes, new.subtotal_minor, new.tax_minor using errcode = '23514';
  end if;
  return null;
end
$$;
comment on function private.check_invoice_sums() is
  'Trigger, at the end of the transaction: an open invoice''s lines make its subtotal, and its taxes its tax.';

create trigger guard_invoice before update or delete on public.invoices
  for each row execute function private.guard_invoice();
create trigger set_invoice_number_trigger before insert or update of status on public.invoices
  for each row execute function private.set_invoice_number();
create trigger update_modified_column before update on public.invoices
  for each row execute function private.update_modified_column();
create constraint trigger invoices_add_up after insert or update on public.invoices
  deferrable initially deferred
  for each row when (new.status <> 'draft') execute function private.check_invoice_sums();

create trigger invoice_lines_inserted after insert on public.invoice_lines
  referencing new table as changed for each statement execute function private.guard_invoice_parts();
create trigger invoice_lines_updated after update on public.invoice_lines
  referencing old table as changed for each statement execute function private.guard_invoice_parts();
create trigger invoice_lines_moved after update on public.invoice_lines
  referencing new table as changed for each statement execute function private.guard_invoice_parts();
create trigger invoice_lines_deleted after delete on public.invoice_lines
  referencing old table as changed for each statement execute function private.guard_invoice_parts();
create trigger invoice_taxes_inserted after insert on public.invoice_taxes
  referencing new table as changed for each statement execute function private.guard_invoice_parts();
create trigger invoice_taxes_updated after update on public.invoice_taxes
  referencing old table as changed for each statement execute function private.guard_invoice_parts();
create trigger invoice_taxes_moved after update on public.invoice_taxes
  referencing new table as changed for each statement execute function private.guard_invoice_parts();
create trigger invoice_taxes_deleted after delete on public.invoice_taxes
  referencing old table as changed for each statement execute function private.guard_invoice_parts();

revoke all on function
  private.invoice_number(text, integer), private.take_invoice_numbers(text, integer), private.set_invoice_number(),
  private.guard_invoice(), private.guard_invoice_parts(), private.check_invoice_sums()
from public;
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
    disconnect_reason = attempt.disconnect_reason
  where log.id = attempt.id;
end
$$;
comment on function private.write_attempt(public.call_logs) is 'Writes what events and dialling change of an attempt; its row is locked already.';

create function private.next_dial_at(attempt public.call_logs, campaign public.campaigns, earliest timestamptz) returns timestamptz
language plpgsql stable security definer set search_path = '' as $$
declare
  dials timestamptz[] := private.recent_dials(attempt.callee_number, attempt.ended_at);
  free  timestamptz := greatest(earliest, dials[1] + interval '60 minutes', dials[2] + interval '24 hours');
  zone  text;
begin
  select known.name into zone
  from public.leads as lead
  join private.timezones as known on known.name = coalesce(nullif(lead.timezone, ''), campaign.timezone)
  where lead.organization_id = attempt.organization_id and lead.id = attempt.lead_id;
  if zone is not null then
    free := greatest(free, (
      private.calling_window(free, zone, campaign.time_start, campaign.time_end, campaign.start_date, campaign.end_date)
    ).opens_at);
  end if;
  return private.whole_minute(free);
end
$$;
comment on function private.next_dial_at(public.call_logs, public.campaigns, timestamptz) is
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
  if attempt.dialled then
    update public.leads as lead
    set call_log_id = attempt.id, call_status = outcome, last_contacted_at = attempt.ended_at
    where lead.organization_id = attempt.organization_id and lead.id = attempt.lead_id;
  end if;

  if queue.status = 'processing' then
    select running.* into campaign
    from public.campaigns as running
    where running.id = attempt.campaign_id
    for no key update;

    attempts := queue.attempt_count + counted::integer;
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
      last_error = case when outcome <> 'answered' then coalesce(reason, outcome::text) end
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

create function private.campaign_completed(organization uuid, campaign_id uuid, at timestamptz) returns void
language plpgsql volatile security definer set search_path = '' as $$
begin
  perform private.emit(
    organization, 'campaign.completed', campaign_id::text, jsonb_build_object('campaign_id', campaign_id, 'completed_at', at), at
  );
  perform private.audit(organization, 'campaign.completed', 'campaign', campaign_id, '{}', at);
end
$$;
comment on function private.campaign_completed(uuid, uuid, timestamptz) is 'Tells that a campaign is complete; whoever completed it calls this in the same transaction.';

create function private.amend_attempt(
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
    amended.disconnect_reason := outcome;
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
  if corrects then
    update public.leads as lead
    set call_status = outcome
    where lead.organization_id = attempt.organization_id and lead.id = attempt.lead_id and lead.call_log_id = attempt.id;
  end if;

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
  due                  timestamptz
);
comment on type private.candidate is
  'A queue row as release_calls() judges it. No verdict: it may be dialled until closes_at. A verdict with due: it waits. Without: it is over.';

create function private.judge_candidates(at timestamptz, budget integer, passed uuid[]) returns private.candidate[]
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

create function private.dispatch_obstacle(organization uuid, at timestamptz) returns text
language plpgsql stable security definer set search_path = '' as $$
begin
  return (
    select
      case
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
        ) then 'no_caller_number'
        else (
          select hold.reason from private.dispatch_holds as hold where hold.organization_id = tenant.id and hold.held_until > at
        )
      end
    from public.organizations as tenant
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

create function private.choose_candidates(candidates private.candidate[], room integer) returns private.candidate[]
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
    select tenant.organization_id, random() as number
    from (select distinct candidate.organization_id from unnest(candidates) as candidate) as tenant
  ),
  of_number as (
    -- Two rows with one number, met in different looks: one at a time.
    select distinct on ((candidates[place]).callee_number) candidates[place] as candidate, place
    from generate_subscripts(candidates, 1) as place
    order by (candidates[place]).callee_number, place
  ),
  of_campaign as (
    select
      (of_number.candidate).*, of_number.candidate,
      row_number() over (partition by (of_number.candidate).campaign_id order by of_number.place) as campaign_place
    from of_number
  ),
  of_organization as (
    select
      of_campaign.*,
      row_number() over (
        partition by of_campaign.organization_id order by of_campaign.campaign_place, of_campaign.campaign_id
      ) as organization_place
    from of_campaign
    join public.campaigns as campaign on campaign.id = of_campaign.campaign_id
    where of_campaign.campaign_place <= campaign.max_concurrent_calls
      - coalesce((select sum(calls.number) from calls where calls.campaign_id = of_campaign.campaign_id), 0)
  ),
  of_account as (
    select
      of_organization.*, ticket.number as ticket,
      row_number() over (
        partition by of_organization.carrier_account_id order by of_organization.organization_place, ticket.number
      ) as account_place
    from of_organization
    join public.organizations as organization on organization.id = of_organization.organization_id
    join ticket on ticket.organization_id = of_organization.organization_id
    where of_organization.organization_place <= organization.max_concurrent_calls
      - coalesce((select sum(calls.number) from calls where calls.organization_id = of_organization.organization_id), 0)
  ),
  first as (
    select of_account.candidate, of_account.organization_place, of_account.ticket
    from of_account
    join public.carrier_accounts as account on account.id = of_account.carrier_account_id
    where of_account.account_place <= account.max_concurrent_calls
      - coalesce((select sum(calls.number) from calls where calls.carrier_account_id = of_account.carrier_account_id), 0)
    order by of_account.organization_place, of_account.ticket
    limit room
  )
  select array_agg(first.candidate order by first.organization_place, first.ticket) into chosen from first;
  return coalesce(chosen, array[]::private.candidate[]);
end
$$;
comment on function private.choose_candidates(private.candidate[], integer) is
  'Which candidates have room now: within what their campaign, organization and carrier account may have in flight, one of each organization at a time.';

create function private.lock_releases() returns void
language sql volatile set search_path = '' as $$
  select pg_advisory_xact_lock(hashtextextended('trunkline.release_calls', 0))
$$;
comment on function private.lock_releases() is
  'One release at a time: each counts what is in flight and takes what is free. Taken before any row, and by whoever takes rows from it.';

create function private.release_calls(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' set jit = off set enable_seqscan = off as $$
declare
  wanted     constant integer := least(greatest(coalesce((request ->> 'limit')::integer, 100), 1), 500);
  attempts   jsonb;
  candidates private.candidate[];
  able       private.candidate[] := array[]::private.candidate[];
  over       private.candidate[] := array[]::private.candidate[];
  granted    uuid[] := array[]::uuid[];
  room       integer;
  moved      integer := 0;
  given      integer;
  tenant     record;
begin
  perform private.lock_releases();

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
    update public.call_queue as queue
    set next_retry_at = candidate.due, wait_reason = candidate.verdict
    from unnest(candidates) as candidate
    where queue.id = candidate.queue_id and candidate.due is not null;
    moved := (select count(*) from unnest(candidates) as candidate where candidate.verdict is not null);
    exit when moved = 0;
  end loop;
  if cardinality(over) > 0 then
    perform private.close_leads(over, at);
  end if;
  able := private.choose_candidates(able, room);

  -- The plan's quota last, organization by organization: nothing but usage counters is locked after a usage counter.
  for tenant in
    select (able[place]).organization_id as id, array_agg((able[place]).queue_id order by place) as rows
    from generate_subscripts(able, 1) as place
    group by (able[place]).organization_id
    order by (able[place]).organization_id
  loop
    given := cardinality(tenant.rows);
    if not private.reserve_usage(tenant.id, 'ai_calls', given, at) then
      given := 0;
      while given < cardinality(tenant.rows) and private.reserve_usage(tenant.id, 'ai_calls', 1, at) loop
        given := given + 1;
      end loop;
    end if;
    if given < cardinality(tenant.rows) then
      insert into private.dispatch_holds as hold (organization_id, held_until, reason)
      values (tenant.id, at + interval '5 minutes', 'quota_exhausted')
      on conflict (organization_id) do update set held_until = excluded.held_until, reason = excluded.reason;
    end if;
    granted := granted || tenant.rows[:given];
  end loop;

  with attempt as (
    insert into public.call_logs (
      organization_id, campaign_id, lead_id, project_id, queue_id, attempt_no, carrier_account_id, caller_number, callee_number,
      agent_id, record_call, ring_timeout_seconds, time_limit_seconds, created_at, lease_until, not_after
    )
    select
      candidate.organization_id, candidate.campaign_id, candidate.lead_id, candidate.project_id, candidate.queue_id,
      candidate.attempt_no, candidate.carrier_account_id, candidate.caller_number, candidate.callee_number, candidate.agent_id,
      candidate.record_call, candidate.ring_timeout_seconds, candidate.max_call_seconds, at,
      now() + interval '60 seconds', now() + least(interval '10 minutes', candidate.closes_at - at)
    from unnest(able) as candidate
    where candidate.queue_id = any (granted)
    on conflict (callee_number) where direction = 'outbound' and status <> 'ended' do nothing
    returning id, organization_id, campaign_id, lead_id, queue_id, not_after
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
    count(*)
  into attempts, given
  from attempt;
  if given < cardinality(granted) then
    -- Somebody else began to call the number meanwhile: what was held for this row goes back.
    for tenant in
      select candidate.organization_id as id, count(*) as rows
      from unnest(able) as candidate
      join public.call_queue as queue on queue.id = candidate.queue_id
      where candidate.queue_id = any (granted) and queue.status = 'queued'
      group by candidate.organization_id
      order by candidate.organization_id
    loop
      perform private.release_usage(tenant.id, 'ai_calls', tenant.rows, at);
    end loop;
  end if;

  -- Full hands, or rows that stepped aside in the last look: another one would find more.
  return jsonb_build_object('attempts', attempts, 'more', jsonb_array_length(attempts) >= wanted or moved > 0);
end
$$;
comment on function private.release_calls(jsonb, timestamptz) is
  'Makes attempts of due queue rows, fairly over organizations, through every gate and within every limit, and offers lost ones again.';

create function public.release_calls(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.release_calls($1, private.clock_now())
$$;
comment on function public.release_calls(jsonb) is
  '{"v":1,"limit":100} -> {"attempts":[{"id","organization_id","not_after"}],"more":bool}. Ask again while more is true.';


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
        when not organization.dialling_enabled then 'dialling_disabled'
        when campaign.status <> 'running' then 'campaign_' || campaign.status
        when lead.do_not_call or exists (
          select
          from public.suppressions as suppression
          where suppression.organization_id = log.organization_id and suppression.phone_number = log.callee_number
        ) then 'opted_out'
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
          'auth_token_sealed', account.auth_token_sealed,
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
      and log.direction = 'outbound'
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
      'auth_token_sealed', account.auth_token_sealed,
      'api_base', account.api_base,
      'provider_call_id', claimed.call_sid,
      'from', claimed.caller_number,
      'to', claimed.callee_number,
      'status', claimed.status,
      'age_seconds', greatest(floor(extract(epoch from now() - claimed.begun_at)), 0)::integer
    )
  )
  into stale
  from claimed
  join public.carrier_accounts as account on account.id = claimed.carrier_account_id;
  return jsonb_build_object('attempts', coalesce(stale, '[]'));
end
$$;
comment on function private.reconcile_calls(jsonb, timestamptz) is
  'Claims for a minute the attempts that nobody has moved on in time, for the carrier to be asked. None of them is ever dialled again. '
  'Also ends those that were never begun and may not be any more.';

create function public.reconcile_calls(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.reconcile_calls($1, private.clock_now())
$$;
comment on function public.reconcile_calls(jsonb) is
  '{"v":1,"limit":50} -> {"attempts":[{"attempt_id",…,"provider_call_id"|null,"from","to","status","age_seconds"}]}; the age is real, since it was begun.';


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
    when campaign.status = 'running' then private.dispatch_obstacle(campaign.organization_id, at)
    else 'campaign_' || campaign.status
  end;
  select held.held_until into hold
  from private.dispatch_holds as held
  where held.organization_id = campaign.organization_id and held.held_until > at;
  return jsonb_build_object(
    'id', campaign.id, 'name', campaign.name, 'description', campaign.description, 'status', campaign.status,
    'project_id', campaign.project_id, 'agent_id', campaign.agent_id, 'timezone', campaign.timezone,
    'start_date', campaign.start_date, 'end_date', campaign.end_date, 'time_start', campaign.time_start, 'time_end', campaign.time_end,
    'max_concurrent_calls', campaign.max_concurrent_calls, 'max_attempts', campaign.max_attempts,
    'record_calls', campaign.record_calls, 'auto_complete', campaign.auto_complete,
    'total_enrolled', campaign.total_enrolled, 'open_leads', campaign.open_leads,
    'total_calls', campaign.total_calls, 'answered_calls', campaign.answered_calls,
    'created_at', campaign.created_at, 'started_at', campaign.started_at, 'paused_at', campaign.paused_at,
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
    'next_due_at', (
      select greatest(min(queue.next_retry_at), hold)
      from public.call_queue as queue
      where queue.campaign_id = campaign.id and queue.status = 'queued'
    )
  );
end
$$;
comment on function private.campaign_json(uuid, timestamptz) is
  'A campaign as its users see it: what it is, how many leads are in which state, and what the others wait for.';

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
  'A campaign: {"id","name","status",…,"counts":{state:n},"waiting":{reason:n},"next_due_at"}. Needs campaign.view.';

create function private.create_campaign(name text, project_id uuid, settings jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('campaign.edit');
  me           uuid := (select auth.uid());
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

  insert into public.campaigns (
    organization_id, project_id, name, description, timezone, start_date, end_date, time_start, time_end, max_concurrent_calls,
    max_attempts, agent_id, record_calls, auto_complete, created_by, created_at, updated_at
  )
  values (
    organization, create_campaign.project_id, btrim(create_campaign.name), campaign.description, campaign.timezone,
    campaign.start_date, campaign.end_date, campaign.time_start, campaign.time_end, campaign.max_concurrent_calls,
    campaign.max_attempts, campaign.agent_id, campaign.record_calls, campaign.auto_complete, me, at, at
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
  'Drafts a campaign and enrols the leads of its project, or of the organization when it has none.';

create function private.enrol_leads(campaign public.campaigns, enrolled_by uuid, at timestamptz) returns integer
language plpgsql volatile security definer set search_path = '' as $$
declare
  enrolled integer;
begin
  insert into public.campaign_leads (organization_id, campaign_id, lead_id, enrolled_by, enrolled_at, created_at, updated_at)
  select campaign.organization_id, campaign.id, lead.id, enrol_leads.enrolled_by, at, at, at
  from public.leads as lead
  where lead.organization_id = campaign.organization_id
    and (campaign.project_id is null or lead.project_id = campaign.project_id)
    and lead.archived_at is null
  on conflict (organization_id, campaign_id, lead_id) do nothing;
  get diagnostics enrolled = row_count;
  update public.campaigns as mine
  set open_leads = mine.open_leads + enrolled, total_enrolled = mine.total_enrolled + enrolled
  where mine.id = campaign.id;
  return enrolled;
end
$$;
comment on function private.enrol_leads(public.campaigns, uuid, timestamptz) is 'Enrols every lead of a campaign''s project that is not archived; returns how many are new.';

create function public.create_campaign(name text, project_id uuid default null, settings jsonb default '{}') returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.create_campaign(name, project_id, settings, private.clock_now())
$$;
comment on function public.create_campaign(text, uuid, jsonb) is
  'Drafts a campaign. settings: timezone, start_date, end_date, time_start, time_end, max_concurrent_calls, max_attempts, record_calls, '
  'agent_id, auto_complete, description. Needs campaign.edit; returns the campaign as get_campaign() does.';

create function private.start_campaign(campaign_id uuid, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  campaign public.campaigns := private.claim_campaign(campaign_id, 'campaign.run');
  obstacle text;
  queued   integer;
begin
  if campaign.status not in ('draft', 'scheduled') then
    perform private.raise_error(
      409, 'invalid_transition', format('A campaign that is %s cannot be started', campaign.status), 'status'
    );
  end if;
  obstacle := private.dispatch_obstacle(campaign.organization_id, at);
  if obstacle = 'subscription_inactive' then
    perform private.raise_error(402, obstacle, 'The organization has no active subscription');
  elsif obstacle = 'no_caller_number' then
    perform private.raise_error(422, obstacle, 'The organization has no number to call from');
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
  if campaign.total_enrolled = 0 then
    perform private.enrol_leads(campaign, (select auth.uid()), at);
  end if;

  insert into public.call_queue (organization_id, campaign_id, lead_id, next_retry_at, max_attempts, created_at, updated_at)
  select member.organization_id, member.campaign_id, member.lead_id, at, campaign.max_attempts, at, at
  from public.campaign_leads as member
  where member.organization_id = campaign.organization_id and member.campaign_id = campaign.id and member.status = 'enrolled'
  on conflict do nothing;
  get diagnostics queued = row_count;
  if queued = 0 then
    perform private.raise_error(422, 'no_leads', 'The campaign has no lead to call');
  end if;
  update public.campaign_leads as member
  set status = 'queued'
  where member.organization_id = campaign.organization_id and member.campaign_id = campaign.id and member.status = 'enrolled';
  update public.campaigns as mine set status = 'running', started_at = at where mine.id = campaign.id;
  perform private.audit(
    campaign.organization_id, 'campaign.started', 'campaign', campaign.id, jsonb_build_object('queued', queued), at
  );
  return private.campaign_json(campaign.id, at);
end
$$;
comment on function private.start_campaign(uuid, timestamptz) is 'Queues every enrolled lead and lets the campaign run.';

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
  update public.campaigns as mine set status = 'paused', paused_at = at where mine.id = campaign.id;
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
  update public.campaigns as mine set status = 'running', paused_at = null where mine.id = campaign.id;
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


-- Who may call what ---------------------------------------------------------------------------------------------------------------

revoke execute on function
  public.release_calls(jsonb), public.begin_dials(jsonb), public.record_dials(jsonb), public.reconcile_calls(jsonb),
  public.get_campaign(uuid), public.create_campaign(text, uuid, jsonb), public.start_campaign(uuid), public.pause_campaign(uuid),
  public.resume_campaign(uuid), public.cancel_campaign(uuid)
from public, anon, authenticated, service_role;
grant execute on function
  private.release_calls(jsonb, timestamptz), private.begin_dials(jsonb, timestamptz), private.record_dials(jsonb, timestamptz),
  private.reconcile_calls(jsonb, timestamptz),
  public.release_calls(jsonb), public.begin_dials(jsonb), public.record_dials(jsonb), public.reconcile_calls(jsonb)
to service_role;
grant execute on function
  private.get_campaign(uuid, timestamptz), private.create_campaign(text, uuid, jsonb, timestamptz),
  private.start_campaign(uuid, timestamptz), private.pause_campaign(uuid, timestamptz), private.resume_campaign(uuid, timestamptz),
  private.cancel_campaign(uuid, timestamptz),
  public.get_campaign(uuid), public.create_campaign(text, uuid, jsonb), public.start_campaign(uuid), public.pause_campaign(uuid),
  public.resume_campaign(uuid), public.cancel_campaign(uuid)
to authenticated;
-- Counting: quotas that are taken and given back, usage that is recorded once, and what an organization has used.
--
-- One transaction writes an event's key, the event, its day and its period. Locks are always taken in the same order (keys, then
-- counters by meter and period, then days), so that writers wait for each other and never deadlock. The counter of a period is
-- also its gate: closing a period locks and closes its counters, so a writer either was there before and is billed, or finds the
-- counter closed and counts in the next period. Nothing falls between.

-- Periods -------------------------------------------------------------------------------------------------------------------------

create function private.period_boundary(anchor_on date, cycle public.billing_cycle, period_no integer) returns date
language sql immutable set search_path = ''
as $$
  select (anchor_on + make_interval(months => period_no * case cycle when 'yearly' then 12 else 1 end))::date
$$;
revoke all on function private.period_boundary(date, public.billing_cycle, integer) from public;
comment on function private.period_boundary(date, public.billing_cycle, integer) is
  'The first day of a period, always computed from the anchor: 31 January, 29 February, 31 March.';

create function private.local_midnight(day date, timezone text) returns timestamptz
language sql stable set search_path = ''
as $$
  select day::timestamp at time zone timezone
$$;
revoke all on function private.local_midnight(date, text) from public;
comment on function private.local_midnight(date, text) is 'The instant at which a local day begins.';

create function private.live_subscription(organization_id uuid) returns public.subscriptions
language sql stable set search_path = ''
as $$
  select subscription
  from public.subscriptions as subscription
  where subscription.organization_id = $1 and subscription.status not in ('cancelled', 'inactive')
$$;
revoke all on function private.live_subscription(uuid) from public;
comment on function private.live_subscription(uuid) is 'The organization''s one live subscription; null without one.';

create function private.usage_period(
  subscription public.subscriptions, organization_id uuid, timezone text, day date, at timestamptz,
  out counted_on date, out period_start date, out period_end date
)
language plpgsql stable set search_path = ''
as $$
declare
  today date := (at at time zone timezone)::date;
  number integer;
  is_closed boolean;
begin
  counted_on := day;

  if subscription.id is null then
    -- Nobody is billed, but nothing is lost: calendar months, cut where a subscription's periods begin or end.
    for try in 1..2 loop
      select log.period_start, log.period_end, bool_or(log.closed_at is not null)
      into period_start, period_end, is_closed
      from public.usage_logs as log
      where log.organization_id = usage_period.organization_id
        and log.period_start <= counted_on and counted_on < log.period_end
      group by log.period_start, log.period_end
      limit 1;
      if found and is_closed and counted_on < today then
        counted_on := today;
      else
        exit;
      end if;
    end loop;
    if period_start is null then
      period_start := date_trunc('month', counted_on)::date;
      period_end := (period_start + interval '1 month')::date;
      select greatest(usage_period.period_start, max(log.period_end) filter (where log.period_end <= counted_on)),
        least(usage_period.period_end, min(log.period_start) filter (where log.period_start > counted_on))
      into period_start, period_end
      from public.usage_logs as log
      where log.organization_id = usage_period.organization_id;
    end if;
    return;
  end if;

  period_start := (subscription.current_period_start at time zone subscription.timezone)::date;
  period_end := (subscription.current_period_end at time zone subscription.timezone)::date;
  if counted_on < period_start then
    -- Its own period is billed already: it counts today, in the period that will be billed next.
    counted_on := least(greatest(today, period_start), period_end - 1);
  elsif counted_on >= period_end then
    -- The period has ended but is not closed yet; the next ones are already known from the anchor.
    number := subscription.period_no;
    while private.period_boundary(subscription.anchor_on, subscription.billing_cycle, number + 1) <= counted_on loop
      number := number + 1;
    end loop;
    period_start := private.period_boundary(subscription.anchor_on, subscription.billing_cycle, number);
    period_end := private.period_boundary(subscription.anchor_on, subscription.billing_cycle, number + 1);
  end if;
end
$$;
revoke all on function private.usage_period(public.subscriptions, uuid, text, date, timestamptz) from public;
comment on function private.usage_period(public.subscriptions, uuid, text, date, timestamptz) is
  'In which period usage of a local day counts, and on which day: its own, or today if its own period is billed already.';

-- Quotas --------------------------------------------------------------------------------------------------------------------------

create function private.meter_cap(term public.plan_price_meters) returns bigint
language sql immutable set search_path = ''
as $$
  select case
    when term.hard and term.overage_price_minor is null and term.limit_units >= 0 then term.limit_units
  end
$$;
revoke all on function private.meter_cap(public.plan_price_meters) from public;
comment on function private.meter_cap(public.plan_price_meters) is
  'The units after which new use is refused; null when it never is: no limit, -1, a soft limit, or a price for what is beyond.';

create function private.reserve_usage(organization_id uuid, meter text, quantity bigint, at timestamptz) returns boolean
language plpgsql security definer set search_path = ''
as $$
declare
  subscription public.subscriptions;
  period record;
  cap bigint;
begin
  if quantity < 0 then
    raise exception 'a reservation is not negative' using errcode = '22023';
  end if;

  for try in 1..3 loop
    subscription := private.live_subscription(organization_id);
    if subscription.id is null or subscription.status not in ('trialing', 'active', 'past_due') then
      return false;
    end if;
    period := private.usage_period(
      subscription, organization_id, subscription.timezone, (at at time zone subscription.timezone)::date, at);

    -- How long a call will be is not known before, so a call is refused only when no second is left.
    if meter = 'ai_calls' and exists (
      select
      from public.plan_price_meters as term
      join public.usage_logs as log on log.feature_key = term.meter_key
      where term.plan_price_id = subscription.plan_price_id
        and term.meter_key = 'call_seconds'
        and log.organization_id = reserve_usage.organization_id
        and log.period_start = period.period_start
        and log.usage_count + log.reserved >= private.meter_cap(term)
    ) then
      return false;
    end if;

    select private.meter_cap(term)
    into cap
    from public.plan_price_meters as term
    where term.plan_price_id = subscription.plan_price_id and term.meter_key = meter;

    insert into public.usage_logs (organization_id, feature_key, period_start, period_end)
    select reserve_usage.organization_id, meter, period.period_start, period.period_end
    where not exists (
      select
      from public.usage_logs as log
      where log.organization_id = reserve_usage.organization_id
        and log.feature_key = meter
        and log.period_start = period.period_start
    )
    on conflict do nothing;

    -- The check and the taking are one statement. What is still held from earlier periods will be used in this one: it counts
    -- too, and it only ever shrinks, so that reading it late errs on the side of refusing.
    update public.usage_logs as log
    set reserved = log.reserved + quantity
    where log.organization_id = reserve_usage.organization_id
      and log.feature_key = meter
      and log.period_start = period.period_start
      and log.closed_at is null
      and (
        cap is null
        or log.usage_count + log.reserved + greatest(quantity, 1) + (
          select coalesce(sum(earlier.reserved), 0)
          from public.usage_logs as earlier
          where earlier.organization_id = reserve_usage.organization_id
            and earlier.feature_key = meter
            and earlier.period_start < period.period_start
            and earlier.reserved > 0
        ) <= cap
      );
    if found then
      return true;
    end if;
    exit when exists (
      select
      from public.usage_logs as log
      where log.organization_id = reserve_usage.organization_id
        and log.feature_key = meter
        and log.period_start = period.period_start
        and log.closed_at is null
    );
    -- The period was closed in between: look again which one is current.
  end loop;
  return false;
end
$$;
revoke all on function private.reserve_usage(uuid, text, bigint, timestamptz) from public;
comment on function private.reserve_usage(uuid, text, bigint, timestamptz) is
  'Holds units of a meter in the current period if the plan leaves them, and says whether; quantity 0 asks whether one unit is left. '
  'Without a live subscription: false.';

create function private.release_usage(organization_id uuid, meter text, quantity bigint, at timestamptz) returns void
language plpgsql security definer set search_path = ''
as $$
declare
  held record;
  remaining bigint := quantity;
begin
  -- Which of two equal holds ended does not matter, only how many are left: the oldest period gives back first.
  for held in
    select log.id, log.reserved
    from public.usage_logs as log
    where log.organization_id = release_usage.organization_id and log.feature_key = meter and log.reserved > 0
    order by log.period_start
    for no key update
  loop
    exit when remaining <= 0;
    update public.usage_logs as log
    set reserved = log.reserved - least(log.reserved, remaining)
    where log.id = held.id;
    remaining := remaining - least(held.reserved, remaining);
  end loop;
end
$$;
revoke all on function private.release_usage(uuid, text, bigint, timestamptz) from public;
comment on function private.release_usage(uuid, text, bigint, timestamptz) is
  'Gives held units of a meter back; never more than are held.';

-- Counting ------------------------------------------------------------------------------------------------------------------------

create function private.count_usage(
  organization_id uuid, sources text[], keys text[], meters text[], quantities bigint[], occurred timestamptz[], at timestamptz
) returns void
language plpgsql set search_path = ''
as $$
declare
  subscription public.subscriptions;
  zone text;
  days date[];
  starts date[];
  ends date[];
  is_open boolean := false;
begin
  for try in 1..5 loop
    subscription := private.live_subscription(organization_id);
    zone := subscription.timezone;
    if zone is null then
      select organization.timezone
      into strict zone
      from public.organizations as organization
      where organization.id = count_usage.organization_id;
    end if;

    -- Clocks of other systems run ahead: what is said to come from the future counts now.
    with event as (
      select given.position, (least(given.occurred_at, at) at time zone zone)::date as day
      from unnest(occurred) with ordinality as given (occurred_at, position)
    ),
    placed as (
      select distinct_day.day, period.*
      from (select distinct event.day from event) as distinct_day,
        lateral private.usage_period(subscription, count_usage.organization_id, zone, distinct_day.day, at) as period
    )
    select array_agg(placed.counted_on order by event.position), array_agg(placed.period_start order by event.position),
      array_agg(placed.period_end order by event.position)
    into days, starts, ends
    from event
    join placed using (day);

    insert into public.usage_logs (organization_id, feature_key, period_start, period_end)
    select distinct count_usage.organization_id, event.meter, event.period_start, event.period_end
    from unnest(meters, starts, ends) as event (meter, period_start, period_end)
    where not exists (
      select
      from public.usage_logs as log
      where log.organization_id = count_usage.organization_id
        and log.feature_key = event.meter
        and log.period_start = event.period_start
    )
    order by event.meter, event.period_start
    on conflict do nothing;

    with counter as (
      select log.closed_at
      from public.usage_logs as log
      where log.organization_id = count_usage.organization_id
        and (log.feature_key, log.period_start) in (
          select event.meter, event.period_start
          from unnest(meters, starts) as event (meter, period_start)
        )
      order by log.feature_key, log.period_start
      for no key update
    )
    select count(*) filter (where counter.closed_at is null) = (
      select count(distinct (event.meter, event.period_start))
      from unnest(meters, starts) as event (meter, period_start)
    )
    into is_open
    from counter;
    exit when is_open;
    -- A period was closed in between: its subscription has moved on, and so does this.
  end loop;
  if not is_open then
    raise exception 'no open billing period for organization %', organization_id using errcode = '40001';
  end if;

  update public.usage_logs as log
  set usage_count = log.usage_count + added.quantity
  from (
    select event.meter, event.period_start, sum(event.quantity)::bigint as quantity
    from unnest(meters, starts, quantities) as event (meter, period_start, quantity)
    group by event.meter, event.period_start
  ) as added
  where log.organization_id = count_usage.organization_id
    and log.feature_key = added.meter
    and log.period_start = added.period_start;

  insert into public.usage_days as total (organization_id, meter_key, day, quantity, events)
  select count_usage.organization_id, event.meter, event.day, sum(event.quantity)::bigint, count(*)
  from unnest(meters, days, quantities) as event (meter, day, quantity)
  group by event.meter, event.day
  order by event.meter, event.day
  on conflict on constraint usage_days_pkey
  do update set quantity = total.quantity + excluded.quantity, events = total.events + excluded.events;

  insert into private.usage_events (organization_id, meter_key, source, key, quantity, occurred_at, day, recorded_at)
  select count_usage.organization_id, event.meter, event.source, event.key, event.quantity, event.occurred_at, event.day, at
  from unnest(sources, keys, meters, quantities, occurred, days)
    as event (source, key, meter, quantity, occurred_at, day);
end
$$;
revoke all on function private.count_usage(uuid, text[], text[], text[], bigint[], timestamptz[], timestamptz) from public;
comment on function private.count_usage(uuid, text[], text[], text[], bigint[], timestamptz[], timestamptz) is
  'Adds events of one organization to its periods, days and event log. The caller has made sure of their keys; nothing is refused '
  'here, also not what is over a limit.';

create function private.usage_hash(body text) returns bytea
language sql immutable set search_path = ''
as $$
  select substring(sha256(convert_to(body, 'UTF8')) for 16)
$$;
revoke all on function private.usage_hash(text) from public;
comment on function private.usage_hash(text) is 'What is kept of an event''s body to tell a repetition from a contradiction.';

create function private.meter_call(attempt public.call_logs, at timestamptz) returns void
language plpgsql security definer set search_path = ''
as $$
declare
  billed bigint := greatest(coalesce(attempt.bill_duration_seconds, 0), 0);
  said bytea := case when billed > 0 then private.usage_hash(billed::text) end;
  is_first boolean;
  is_new boolean;
begin
  if attempt.ended_at is null then
    return;
  end if;

  insert into private.usage_keys as known (organization_id, source, key, body_hash)
  values (attempt.organization_id, 'call', attempt.id::text, said)
  on conflict on constraint usage_keys_pkey do nothing;
  is_first := found;
  is_new := is_first and billed > 0;
  if not is_first and billed > 0 then
    -- The call had ended without a billed second, and now the carrier says how many there were.
    update private.usage_keys as known
    set body_hash = said
    where known.organization_id = attempt.organization_id
      and known.source = 'call'
      and known.key = attempt.id::text
      and known.body_hash is null;
    is_new := found;
  end if;

  if is_first and attempt.direction = 'outbound' then
    perform private.release_usage(attempt.organization_id, 'ai_calls', 1, at);
  end if;
  if is_new then
    perform private.count_usage(
      attempt.organization_id,
      array['call', 'call'],
      array[attempt.id::text, attempt.id::text],
      array['ai_calls', 'call_seconds'],
      array[1, billed],
      array[attempt.ended_at, attempt.ended_at],
      at
    );
  end if;
end
$$;
revoke all on function private.meter_call(public.call_logs, timestamptz) from public;
comment on function private.meter_call(public.call_logs, timestamptz) is
  'Settles one ended attempt: gives back the call that was held for it, once, and counts the call and its billed seconds, once, also '
  'when the carrier reports them later.';

-- Events of an organization's own systems -----------------------------------------------------------------------------------------

create function private.parse_instant(given text) returns timestamptz
language plpgsql stable set search_path = ''
as $$
begin
  if given !~ '^\d{4}-\d{2}-\d{2}[Tt ]\d{2}:\d{2}:\d{2}(\.\d{1,9})?([Zz]|[+-]\d{2}:\d{2})$' then
    return null;
  end if;
  return given::timestamptz;
exception
  when datetime_field_overflow or invalid_datetime_format then
    return null;
end
$$;
revoke all on function private.parse_instant(text) from public;
comment on function private.parse_instant(text) is 'An RFC 3339 date and time; null if the text is not one.';

create function private.record_usage(request jsonb, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  api_key record;
  given jsonb := request -> 'events';
  ids text[];
  sources text[];
  meters text[];
  quantities bigint[];
  occurred timestamptz[];
  hashes bytea[];
  statuses text[];
  codes text[];
  stored integer[];
begin
  select key.organization_id, key.scopes
  into api_key
  from public.api_keys as key
  where key.prefix = request #>> '{api_key,prefix}'
    and encode(key.sha256, 'hex') = lower(request #>> '{api_key,sha256}')
    and key.revoked_at is null;
  if not found then
    perform private.raise_error(401, 'invalid_api_key', 'The API key is unknown or revoked');
  end if;
  if not 'usage.write' = any (api_key.scopes) then
    perform private.raise_error(403, 'missing_scope', 'The API key lacks the scope usage.write');
  end if;
  if given is null or jsonb_typeof(given) <> 'array' or jsonb_array_length(given) = 0 then
    perform private.raise_error(400, 'invalid_request', 'events must be an array of at least one event', 'events');
  end if;
  if jsonb_array_length(given) > 1000 then
    perform private.raise_error(413, 'too_many_events', 'At most 1000 events are taken at once', 'events');
  end if;

  -- What is wrong with an event concerns that event alone.
  with event as (
    select
      item.position,
      coalesce(item.value ->> 'specversion', '1.0') as specversion,
      item.value ->> 'id' as id,
      item.value ->> 'source' as source,
      item.value ->> 'type' as meter,
      case
        when jsonb_typeof(item.value -> 'quantity') = 'number' and item.value ->> 'quantity' ~ '^[0-9]{1,15}$'
        then (item.value ->> 'quantity')::bigint
      end as quantity,
      coalesce(jsonb_typeof(item.value -> 'time'), 'null') <> 'null' as is_timed,
      private.parse_instant(item.value ->> 'time') as instant
    from jsonb_array_elements(given) with ordinality as item (value, position)
  ),
  judged as (
    select
      event.*,
      case
        when event.specversion <> '1.0' then 'invalid_specversion'
        when coalesce(event.id, '') = '' or length(event.id) > 255 then 'invalid_id'
        when coalesce(event.source, '') = '' or length(event.source) > 255 then 'invalid_source'
        when event.source = 'call' then 'reserved_source'
        when meter.key is null or not meter.is_active then 'unknown_type'
        when meter.is_reserved then 'reserved_type'
        when event.quantity is null or event.quantity = 0 then 'invalid_quantity'
        when event.is_timed and (event.instant is null or event.instant < '2000-01-01') then 'invalid_time'
        when event.instant > at + interval '5 minutes' then 'time_in_future'
      end as code
    from event
    left join public.meters as meter on meter.key = event.meter
  )
  select
    array_agg(coalesce(id, '') order by position), array_agg(coalesce(source, '') order by position),
    array_agg(meter order by position), array_agg(quantity order by position),
    array_agg(coalesce(instant, at) order by position),
    array_agg(
      private.usage_hash(concat_ws(e'\x1f', meter, quantity, coalesce(extract(epoch from instant)::text, 'now'))) order by position),
    array_agg(code order by position),
    array_agg(case when code is not null then 'rejected' end order by position)
  into ids, sources, meters, quantities, occurred, hashes, codes, statuses
  from judged;

  -- The first event of a batch under a key is the one that counts; the others are compared with it like any repetition.
  with fresh as (
    insert into private.usage_keys as known (organization_id, source, key, body_hash)
    select api_key.organization_id, first.source, first.id, first.hash
    from (
      select distinct on (event.source, event.id) event.source, event.id, event.hash
      from unnest(sources, ids, hashes, codes) with ordinality as event (source, id, hash, code, position)
      where event.code is null
      order by event.source, event.id, event.position
    ) as first
    order by first.source, first.id
    on conflict on constraint usage_keys_pkey do nothing
    returning known.source, known.key
  )
  select array_agg(first.position order by first.position)
  into stored
  from fresh
  cross join lateral (
    select min(event.position)::integer as position
    from unnest(sources, ids, codes) with ordinality as event (source, id, code, position)
    where event.source = fresh.source and event.id = fresh.key and event.code is null
  ) as first;

  with event as (
    select given.*, given.position = any (coalesce(stored, '{}')) as is_stored
    from unnest(sources, ids, hashes, statuses) with ordinality as given (source, id, hash, status, position)
  )
  select array_agg(
    case
      when event.status is not null then event.status
      when event.is_stored then 'stored'
      when known.body_hash = event.hash then 'duplicate'
      else 'conflict'
    end order by event.position)
  into statuses
  from event
  left join private.usage_keys as known
    on known.organization_id = api_key.organization_id and known.source = event.source and known.key = event.id;

  if stored is not null then
    perform private.count_usage(
      api_key.organization_id, array_agg(sources[position]), array_agg(ids[position]), array_agg(meters[position]),
      array_agg(quantities[position]), array_agg(occurred[position]), at)
    from unnest(stored) as position;
  end if;

  return jsonb_build_object('results', (
    select jsonb_agg(
      jsonb_strip_nulls(jsonb_build_object(
        'id', result.id,
        'status', result.status,
        'code', case when result.status = 'conflict' then 'idempotency_conflict' else result.code end,
        'message', case
          when result.status = 'conflict' then 'An event with this source and id, but another body, was stored before'
          else case result.code
            when 'invalid_specversion' then 'specversion must be "1.0", or be left out'
            when 'invalid_id' then 'id must be a text of 1 to 255 characters'
            when 'invalid_source' then 'source must be a text of 1 to 255 characters'
            when 'reserved_source' then 'The source "call" belongs to the platform'
            when 'unknown_type' then 'type is not the key of an active meter'
            when 'reserved_type' then 'Calls are counted by the platform, not by events'
            when 'invalid_quantity' then 'data.quantity must be a whole number from 1 to 999999999999999'
            when 'invalid_time' then 'time must be an RFC 3339 date and time, or be left out'
            when 'time_in_future' then 'time lies more than five minutes ahead'
          end
        end
      ))
      order by result.position)
    from unnest(ids, statuses, codes) with ordinality as result (id, status, code, position)
  ));
end
$$;
revoke all on function private.record_usage(jsonb, timestamptz) from public;
grant execute on function private.record_usage(jsonb, timestamptz) to service_role;
comment on function private.record_usage(jsonb, timestamptz) is
  'Records a batch of usage events for the organization of an API key: each one stored, duplicate, conflict or rejected, by itself.';

create function public.record_usage(jsonb) returns jsonb
language sql set search_path = ''
as $$
  select private.record_usage($1, private.clock_now())
$$;
revoke all on function public.record_usage(jsonb) from public, anon, authenticated;
grant execute on function public.record_usage(jsonb) to service_role;
comment on function public.record_usage(jsonb) is
  'For usage-metering. {"v":1,"api_key":{"prefix","sha256"},"events":[{"specversion"?,"id","source","type","time"?,"quantity"}]} gives '
  '{"results":[{"id","status","code"?,"message"?}]}.';

-- What was used -------------------------------------------------------------------------------------------------------------------

create function private.get_usage(at timestamptz) returns jsonb
language plpgsql stable security definer set search_path = ''
as $$
declare
  organization uuid := private.require_org('usage.view');
  subscription public.subscriptions;
  zone text;
  period record;
begin
  subscription := private.live_subscription(organization);
  select coalesce(subscription.timezone, tenant.timezone) into zone from public.organizations as tenant where tenant.id = organization;
  period := private.usage_period(subscription, organization, zone, (at at time zone zone)::date, at);

  return jsonb_build_object(
    'organization_id', organization,
    'period', jsonb_build_object(
      'start', private.local_midnight(period.period_start, zone), 'end', private.local_midnight(period.period_end, zone),
      'timezone', zone
    ),
    'plan', (
      select jsonb_build_object('slug', plan.slug, 'name', plan.name, 'status', subscription.status)
      from public.subscription_plans as plan
      where plan.id = subscription.plan_id
    ),
    'meters', coalesce((
      select jsonb_agg(
        jsonb_build_object(
          'meter', meter.key,
          'name', meter.name,
          'unit', meter.unit,
          'used', coalesce(log.usage_count, 0),
          'reserved', coalesce(log.reserved, 0),
          'included', nullif(term.included_units, -1),
          'limit', nullif(term.limit_units, -1),
          'overage', case
            when term.included_units >= 0 then greatest(coalesce(log.usage_count, 0) - term.included_units, 0)
            else 0
          end
        )
        order by meter.position, meter.key)
      from public.meters as meter
      left join public.plan_price_meters as term
        on term.meter_key = meter.key and term.plan_price_id = subscription.plan_price_id
      left join public.usage_logs as log
        on log.feature_key = meter.key and log.organization_id = organization and log.period_start = period.period_start
      where term.meter_key is not null or log.id is not null
    ), '[]')
  );
end
$$;
revoke all on function private.get_usage(timestamptz) from public;
grant execute on function private.get_usage(timestamptz) to authenticated;
comment on function private.get_usage(timestamptz) is
  'Usage of the caller''s organization in the billing period of `at`, meter by meter; null in included or limit is unlimited.';

create function public.get_usage() returns jsonb
language sql stable set search_path = ''
as $$
  select private.get_usage(private.clock_now())
$$;
revoke all on function public.get_usage() from public, anon;
grant execute on function public.get_usage() to authenticated;
comment on function public.get_usage() is 'Usage of the caller''s organization in the current billing period.';

-- Subscribing ---------------------------------------------------------------------------------------------------------------------

create function private.cut_usage_periods(organization_id uuid, from_day date, period_end date, at timestamptz) returns void
language plpgsql set search_path = ''
as $$
declare
  log public.usage_logs;
  moved bigint;
begin
  for log in
    select counter.*
    from public.usage_logs as counter
    where counter.organization_id = cut_usage_periods.organization_id and counter.closed_at is null
    order by counter.feature_key, counter.period_start
    for no key update
  loop
    if log.period_start = from_day then
      update public.usage_logs as counter set period_end = cut_usage_periods.period_end where counter.id = log.id;
    elsif log.period_start < from_day then
      select coalesce(sum(total.quantity), 0)::bigint
      into moved
      from public.usage_days as total
      where total.organization_id = cut_usage_periods.organization_id
        and total.meter_key = log.feature_key
        and total.day >= from_day and total.day < log.period_end;
      update public.usage_logs as counter
      set period_end = least(counter.period_end, from_day), usage_count = counter.usage_count - moved, closed_at = at
      where counter.id = log.id;
      if moved > 0 then
        insert into public.usage_logs (organization_id, feature_key, usage_count, period_start, period_end)
        values (cut_usage_periods.organization_id, log.feature_key, moved, from_day, cut_usage_periods.period_end);
      end if;
    end if;
  end loop;
end
$$;
revoke all on function private.cut_usage_periods(uuid, date, date, timestamptz) from public;
comment on function private.cut_usage_periods(uuid, date, date, timestamptz) is
  'Ends the open usage periods of an organization at a local day, closes them, and moves what was used since that day to the new period.';

create function private.subscribe_organization(
  organization_id uuid, plan_slug text, status public.subscription_status, at timestamptz,
  cycle public.billing_cycle default 'monthly'
) returns uuid
language plpgsql security definer set search_path = ''
as $$
declare
  organization record;
  price record;
  live public.subscriptions;
  today date;
  trial_end timestamptz;
  anchor date;
  starts date;
  ends date;
  subscription_id uuid;
begin
  select tenant.timezone, tenant.currency
  into organization
  from public.organizations as tenant
  where tenant.id = subscribe_organization.organization_id
  for no key update;
  if not found then
    perform private.raise_error(404, 'organization_not_found', 'There is no such organization', 'organization_id');
  end if;

  -- The newest price on sale, in the organization's own currency where the plan has one.
  select offer.id, offer.plan_id, offer.billing_cycle, offer.base_minor, plan.trial_days
  into price
  from public.plan_prices as offer
  join public.subscription_plans as plan on plan.id = offer.plan_id
  where plan.slug = plan_slug
    and plan.is_active
    and offer.billing_cycle = cycle
    and (offer.retired_at is null or offer.retired_at > at)
  order by (offer.currency = organization.currency) desc, offer.version desc
  limit 1;
  if not found then
    perform private.raise_error(422, 'plan_not_on_sale', 'There is no such plan, or it has no price for this billing cycle', 'plan');
  end if;

  select subscription.*
  into live
  from public.subscriptions as subscription
  where subscription.organization_id = subscribe_organization.organization_id
    and subscription.status not in ('cancelled', 'inactive')
  for no key update;

  if live.plan_price_id = price.id then
    update public.subscriptions as subscription
    set status = subscribe_organization.status, next_plan_price_id = null,
      trial_ends_at = case
        when subscribe_organization.status = 'trialing'
        then coalesce(subscription.trial_ends_at, at + make_interval(days => price.trial_days))
        else subscription.trial_ends_at
      end
    where subscription.id = live.id;
    return live.id;
  end if;

  if live.id is not null and (
    exists (select from public.plan_prices as old where old.id = live.plan_price_id and old.base_minor > 0)
    or exists (
      select
      from public.plan_price_meters as term
      where term.plan_price_id = live.plan_price_id and term.overage_price_minor > 0
    )
  ) then
    -- A period that costs something is billed as it was sold; the new price takes over when it has ended.
    if live.billing_cycle <> cycle then
      perform private.raise_error(409, 'billing_cycle_differs', 'The billing cycle changes with a new subscription only', 'cycle');
    end if;
    update public.subscriptions as subscription
    set next_plan_price_id = price.id, cancel_at_period_end = false
    where subscription.id = live.id;
    return live.id;
  end if;

  -- Never into days that are billed already.
  select greatest((at at time zone organization.timezone)::date, max(log.period_end))
  into today
  from public.usage_logs as log
  where log.organization_id = subscribe_organization.organization_id and log.closed_at is not null;
  if subscribe_organization.status = 'trialing' then
    trial_end := at + make_interval(days => price.trial_days);
  end if;
  if trial_end > at and price.base_minor > 0 then
    -- The trial of a plan that charges is a period of its own, so that no month is half free.
    anchor := ((trial_end at time zone organization.timezone) + interval '1 day' - interval '1 microsecond')::date;
    starts := today;
    ends := anchor;
  else
    anchor := today;
    starts := today;
    ends := private.period_boundary(anchor, cycle, 1);
  end if;

  if live.id is not null then
    update public.subscriptions as subscription
    set status = 'cancelled', cancelled_at = at, next_invoice_at = null
    where subscription.id = live.id;
  end if;
  perform private.cut_usage_periods(organization_id, starts, ends, at);

  insert into public.subscriptions (
    organization_id, plan_id, plan_price_id, status, billing_cycle, timezone, anchor_on, period_no,
    current_period_start, current_period_end, trial_ends_at, next_invoice_at
  )
  values (
    subscribe_organization.organization_id, price.plan_id, price.id, subscribe_organization.status, cycle, organization.timezone,
    anchor, case when starts < anchor then -1 else 0 end,
    private.local_midnight(starts, organization.timezone), private.local_midnight(ends, organization.timezone),
    trial_end, private.local_midnight(ends, organization.timezone)
  )
  returning id into subscription_id;
  return subscription_id;
end
$$;
revoke all on function
  private.subscribe_organization(uuid, text, public.subscription_status, timestamptz, public.billing_cycle)
from public;
comment on function private.subscribe_organization(uuid, text, public.subscription_status, timestamptz, public.billing_cycle) is
  'Puts an organization on the newest price of a plan: at once from nothing or from a plan that charges nothing, otherwise when the '
  'current period has been billed. Periods start at the local midnight of that day.';
-- Closing billing periods: what an ended period used becomes lines, taxes and one numbered invoice, and the subscription moves on.

create function private.divide_half_away(dividend numeric, divisor numeric) returns bigint
language sql immutable set search_path = ''
as $$
  select (sign(dividend) * div(2 * abs(dividend) + divisor, 2 * divisor))::bigint
$$;
comment on function private.divide_half_away(numeric, numeric) is
  'An exact quotient rounded to a whole number, half away from zero; the divisor is positive. The one rounding of money.';

create function private.describe_quantity(quantity bigint, unit text) returns text
language sql immutable set search_path = ''
as $$
  select case
    when quantity is null then 'unlimited'
    when unit = 'second' then quantity / 60 || ' min ' || lpad((quantity % 60)::text, 2, '0') || ' s'
    else quantity::text
  end
$$;
comment on function private.describe_quantity(bigint, text) is 'A quantity as an invoice line says it; null is unlimited.';

create function private.bill_periods(subscription_ids uuid[], issuer private.billing_issuer, at timestamptz) returns uuid[]
language plpgsql set search_path = ''
as $$
declare
  drafts uuid[];
begin
  with ended as materialized (
    select
      gen_random_uuid() as invoice_id,
      subscription.*,
      plan.name as plan_name,
      price.currency,
      price.base_minor,
      (subscription.current_period_start at time zone subscription.timezone)::date as first_day,
      (subscription.current_period_end at time zone subscription.timezone)::date as next_day,
      jsonb_strip_nulls(jsonb_build_object(
        'organization_id', organization.id,
        'name', coalesce(organization.company_name, organization.name),
        'gstin', organization.gstin,
        'address_line_1', organization.address_line_1,
        'address_line_2', organization.address_line_2,
        'city', organization.city,
        'state', organization.state,
        'state_code', organization.state_code,
        'pincode', organization.pincode,
        'country', organization.country,
        'country_code', organization.country_code
      )) as customer,
      organization.country_code,
      case
        when organization.country_code = issuer.country_code and organization.state_code = issuer.state_code then 'intra_state'
        else 'inter_state'
      end as tax_scope
    from public.subscriptions as subscription
    join public.subscription_plans as plan on plan.id = subscription.plan_id
    join public.plan_prices as price on price.id = subscription.plan_price_id
    join public.organizations as organization on organization.id = subscription.organization_id
    where subscription.id = any (subscription_ids)
  ),
  used as materialized (
    -- From the days, which are the evidence, and not from the counter that quotas were judged by.
    select
      ended.invoice_id, term.*, meter.name, meter.unit, meter.position,
      nullif(term.included_units, -1) as allowance,
      coalesce((
        select sum(total.quantity)
        from public.usage_days as total
        where total.organization_id = ended.organization_id
          and total.meter_key = term.meter_key
          and total.day >= ended.first_day and total.day < ended.next_day
      ), 0)::bigint as quantity
    from ended
    join public.plan_price_meters as term on term.plan_price_id = ended.plan_price_id
    join public.meters as meter on meter.key = term.meter_key
  ),
  item as materialized (
    select
      ended.invoice_id, 0 as rank, 0 as meter_position, 'base' as kind, null::text as meter_key,
      ended.plan_name || ' plan, ' || ended.billing_cycle || case when ended.period_no < 0 then ' (trial)' else '' end as description,
      1::bigint as quantity, case ended.billing_cycle when 'yearly' then 'year' else 'month' end as unit,
      case when ended.period_no < 0 then 0 else ended.base_minor end as unit_price_minor, 1::bigint as price_units,
      case when ended.period_no < 0 then 0 else ended.base_minor end as amount_minor
    from ended
    union all
    select
      used.invoice_id, 1, used.position, 'included', used.meter_key,
      used.name || ' included: ' || private.describe_quantity(least(used.quantity, used.allowance), used.unit)
        || case when used.allowance is null then ', unlimited' else ' of ' || private.describe_quantity(used.allowance, used.unit) end,
      least(used.quantity, used.allowance), used.unit, 0, 1, 0
    from used
    where used.allowance is null or used.allowance > 0
    union all
    select
      used.invoice_id, 2, used.position, 'overage', used.meter_key,
      used.name || ' beyond the plan: ' || private.describe_quantity(used.quantity - used.allowance, used.unit),
      used.quantity - used.allowance, used.unit, used.overage_price_minor, used.overage_unit,
      private.divide_half_away((used.quantity - used.allowance)::numeric * used.overage_price_minor, used.overage_unit)
    from used
    where used.quantity > used.allowance and used.overage_price_minor is not null
  ),
  subtotal as materialized (
    select item.invoice_id, sum(item.amount_minor)::bigint as amount_minor
    from item
    group by item.invoice_id
  ),
  tax as materialized (
    select
      ended.invoice_id, rate.name, rate.rate_bp, rate.position, subtotal.amount_minor as taxable_minor,
      private.divide_half_away(subtotal.amount_minor::numeric * rate.rate_bp, 10000) as amount_minor
    from ended
    join subtotal using (invoice_id)
    join public.tax_rates as rate
      on rate.country_code = ended.country_code
      and rate.scope in ('any', ended.tax_scope)
      and rate.valid_from <= (at at time zone issuer.timezone)::date
      and (rate.valid_to is null or rate.valid_to > (at at time zone issuer.timezone)::date)
  ),
  bill as materialized (
    -- A period that costs nothing makes no invoice: a number and a document for zero would only be noise.
    select
      ended.invoice_id, subtotal.amount_minor as subtotal_minor,
      coalesce((select sum(tax.amount_minor) from tax where tax.invoice_id = ended.invoice_id), 0)::bigint as tax_minor
    from ended
    join subtotal using (invoice_id)
    where subtotal.amount_minor > 0
  ),
  draft as (
    insert into public.invoices (
      id, organization_id, subscription_id, currency, period_start, period_end, timezone, first_day, last_day, subtotal_minor,
      tax_minor, total_minor, issuer, customer, created_at, updated_at
    )
    select
      ended.invoice_id, ended.organization_id, ended.id, ended.currency, ended.current_period_start, ended.current_period_end,
      ended.timezone, ended.first_day, ended.next_day - 1, bill.subtotal_minor, bill.tax_minor, bill.subtotal_minor + bill.tax_minor,
      jsonb_strip_nulls(to_jsonb(issuer) - 'singleton'), ended.customer, at, at
    from ended
    join bill using (invoice_id)
    returning invoices.id, invoices.organization_id
  ),
  line as (
    insert into public.invoice_lines (
      organization_id, invoice_id, position, kind, meter_key, description, quantity, unit, unit_price_minor, price_units, amount_minor
    )
    select
      draft.organization_id, draft.id,
      row_number() over (partition by draft.id order by item.rank, item.meter_position, item.meter_key),
      item.kind, item.meter_key, item.description, item.quantity, item.unit, item.unit_price_minor, item.price_units, item.amount_minor
    from draft
    join item on item.invoice_id = draft.id
  ),
  levied as (
    insert into public.invoice_taxes (organization_id, invoice_id, position, name, rate_bp, taxable_minor, amount_minor)
    select
      draft.organization_id, draft.id, row_number() over (partition by draft.id order by tax.position, tax.name), tax.name,
      tax.rate_bp, tax.taxable_minor, tax.amount_minor
    from draft
    join tax on tax.invoice_id = draft.id
  )
  select array_agg(draft.id) into drafts from draft;
  return coalesce(drafts, '{}');
end
$$;
comment on function private.bill_periods(uuid[], private.billing_issuer, timestamptz) is
  'Drafts one invoice for the current period of each subscription, from its price and its days; none for a period that costs '
  'nothing. In arrears, base included; a trial period has no base price.';

create function private.close_periods(request jsonb, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  batch integer := least(greatest(coalesce((request ->> 'limit')::integer, 500), 1), 2000);
  issuer private.billing_issuer;
  claimed uuid[];
  due uuid[];
  held uuid[];
  drafts uuid[] := '{}';
  closed integer := 0;
  patience text := current_setting('lock_timeout');
  month text;
  invoices jsonb := '[]';
begin
  select * into issuer from private.billing_issuer;
  if not found then
    perform private.raise_error(409, 'billing_issuer_missing', 'Nothing is billed before private.billing_issuer says who bills');
  end if;

  update public.subscriptions as subscription
  set status = 'active'
  where subscription.id in (
    select ended.id
    from public.subscriptions as ended
    where ended.status = 'trialing' and ended.trial_ends_at <= at
    order by ended.trial_ends_at, ended.id
    limit batch
    for no key update skip locked
  );

  claimed := array(
    select subscription.id
    from public.subscriptions as subscription
    where subscription.next_invoice_at <= at and subscription.billing_hold is null
    order by subscription.next_invoice_at, subscription.id
    limit batch
    for no key update skip locked
  );

  -- One round bills one period of each; missed periods take further rounds, oldest first.
  loop
    due := array(
      select subscription.id
      from public.subscriptions as subscription
      where subscription.id = any (claimed) and subscription.next_invoice_at <= at and subscription.billing_hold is null
    );
    exit when cardinality(due) = 0 or closed >= 4 * batch;

    -- The counters are the gate. Whoever still writes into the period holds one of them and is waited for; whoever comes after
    -- finds it closed. So each has to exist.
    insert into public.usage_logs (organization_id, feature_key, period_start, period_end)
    select
      subscription.organization_id, term.meter_key,
      (subscription.current_period_start at time zone subscription.timezone)::date,
      (subscription.current_period_end at time zone subscription.timezone)::date
    from public.subscriptions as subscription
    join public.plan_price_meters as term on term.plan_price_id = subscription.plan_price_id
    where subscription.id = any (due)
      and not exists (
        select
        from public.usage_logs as log
        where log.organization_id = subscription.organization_id
          and log.feature_key = term.meter_key
          and log.period_start = (subscription.current_period_start at time zone subscription.timezone)::date
      )
    order by subscription.organization_id, term.meter_key
    on conflict do nothing;

    perform
    from public.usage_logs as log
    join public.subscriptions as subscription
      on subscription.organization_id = log.organization_id
      and log.period_start = (subscription.current_period_start at time zone subscription.timezone)::date
    where subscription.id = any (due)
    order by log.organization_id, log.feature_key, log.period_start
    for no key update of log;

    -- Days and counters were written together, so they agree. If ever they do not, a person decides, not a bill.
    held := array(
      select subscription.id
      from public.subscriptions as subscription
      join public.usage_logs as log
        on log.organization_id = subscription.organization_id
        and log.period_start = (subscription.current_period_start at time zone subscription.timezone)::date
      where subscription.id = any (due)
        and log.usage_count <> (
          select coalesce(sum(total.quantity), 0)
          from public.usage_days as total
          where total.organization_id = log.organization_id
            and total.meter_key = log.feature_key
            and total.day >= log.period_start and total.day < log.period_end
        )
    );
    if cardinality(held) > 0 then
      update public.subscriptions as subscription
      set billing_hold = 'days and counter disagree in the period that began '
        || to_char(subscription.current_period_start at time zone subscription.timezone, 'YYYY-MM-DD')
      where subscription.id = any (held);
      insert into private.outbox (organization_id, topic, key, payload, created_at)
      select
        subscription.organization_id, 'billing.held', subscription.id || ' ' || subscription.period_no,
        jsonb_build_object('subscription_id', subscription.id, 'reason', subscription.billing_hold), at
      from public.subscriptions as subscription
      where subscription.id = any (held)
      on conflict do nothing;
      due := array(select ready.id from unnest(due) as ready (id) where ready.id <> all (held));
    end if;

    drafts := drafts || private.bill_periods(due, issuer, at);

    update public.usage_logs as log
    set closed_at = at
    from public.subscriptions as subscription
    where subscription.id = any (due)
      and log.organization_id = subscription.organization_id
      and log.period_start = (subscription.current_period_start at time zone subscription.timezone)::date;

    with following as (
      select
        subscription.id,
        coalesce(price.id, subscription.plan_price_id) as plan_price_id,
        coalesce(price.plan_id, subscription.plan_id) as plan_id,
        private.local_midnight(
          private.period_boundary(subscription.anchor_on, subscription.billing_cycle, subscription.period_no + 2),
          subscription.timezone
        ) as period_end
      from public.subscriptions as subscription
      left join public.plan_prices as price on price.id = subscription.next_plan_price_id
      where subscription.id = any (due)
    )
    update public.subscriptions as subscription
    set
      plan_price_id = following.plan_price_id,
      plan_id = following.plan_id,
      next_plan_price_id = null,
      period_no = subscription.period_no + 1,
      current_period_start = subscription.current_period_end,
      current_period_end = following.period_end,
      next_invoice_at = following.period_end
    from following
    where subscription.id = following.id and not subscription.cancel_at_period_end;

    -- What was cancelled stops in its last period.
    update public.subscriptions as subscription
    set status = 'cancelled', cancelled_at = subscription.current_period_end, next_invoice_at = null
    where subscription.id = any (due) and subscription.cancel_at_period_end;
    closed := closed + cardinality(due);
  end loop;

  -- Next months' partitions, before they are needed. If somebody is in the way or makes them too, the next run looks again.
  begin
    perform set_config('lock_timeout', '1s', true);
    perform private.ensure_partitions('private.usage_events', at);
  exception when lock_not_available or deadlock_detected or duplicate_table or unique_violation then
    null;
  end;
  perform set_config('lock_timeout', patience, true);

  -- Numbers come last: the series is locked from here to the end of the transaction and not a moment longer.
  if cardinality(drafts) > 0 then
    month := to_char(at at time zone issuer.timezone, 'YYYYMM');
    with block as materialized (
      select private.take_invoice_numbers(month, cardinality(drafts)) as first
    ),
    numbered as (
      select draft.id, block.first + (row_number() over (order by draft.period_start, draft.id))::integer - 1 as number
      from public.invoices as draft, block
      where draft.id = any (drafts)
    ),
    opened as (
      update public.invoices as invoice
      set
        status = 'open',
        invoice_number = private.invoice_number(month, numbered.number),
        finalized_at = at,
        invoice_date = (at at time zone issuer.timezone)::date,
        due_date = (at at time zone issuer.timezone)::date + issuer.payment_terms_days
      from numbered
      where invoice.id = numbered.id
      returning invoice.id, invoice.organization_id, invoice.invoice_number, invoice.total_minor, invoice.currency
    ),
    announced as (
      insert into private.outbox (organization_id, topic, key, payload, created_at)
      select
        opened.organization_id, 'invoice.finalized', opened.id::text,
        jsonb_build_object(
          'invoice_id', opened.id, 'invoice_number', opened.invoice_number, 'total_minor', opened.total_minor,
          'currency', opened.currency
        ),
        at
      from opened
    )
    select jsonb_agg(
      jsonb_build_object('id', opened.id, 'organization_id', opened.organization_id, 'number', opened.invoice_number)
      order by opened.invoice_number)
    into invoices
    from opened;
  end if;

  return jsonb_build_object(
    'closed', closed, 'invoices', invoices, 'more', cardinality(claimed) = batch or cardinality(due) > 0
  );
end
$$;
comment on function private.close_periods(jsonb, timestamptz) is
  'Ends trials that are over, bills every ended period of the subscriptions it claims, once, and moves them to the period that `at` '
  'is in. Several may run at once.';

create function public.close_periods(jsonb) returns jsonb
language sql set search_path = ''
as $$
  select private.close_periods($1, private.clock_now())
$$;
comment on function public.close_periods(jsonb) is
  'For invoice-generation. {"v":1,"limit":500} gives {"closed":n,"invoices":[{"id","organization_id","number"}],"more":bool}.';

revoke all on function
  private.divide_half_away(numeric, numeric), private.describe_quantity(bigint, text),
  private.bill_periods(uuid[], private.billing_issuer, timestamptz), private.close_periods(jsonb, timestamptz),
  public.close_periods(jsonb)
from public, anon, authenticated;
grant execute on function private.close_periods(jsonb, timestamptz), public.close_periods(jsonb) to service_role;
