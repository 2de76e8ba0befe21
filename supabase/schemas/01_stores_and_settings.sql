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

create or replace function private.connect_functions(functions_url text, nudge_key text) returns jsonb
language plpgsql volatile security invoker set search_path = '' as $$
declare
  wanted record;
  known  uuid;
  before text;
  told   jsonb := '{}'::jsonb;
begin
  if to_regprocedure('vault.create_secret(text,text,text,uuid)') is null
    or to_regprocedure('net.http_post(text,jsonb,jsonb,jsonb,integer)') is null
  then
    raise exception 'the extensions supabase_vault and pg_net are needed: switch both on' using errcode = 'feature_not_supported';
  end if;
  if functions_url !~ '^https?://[^/\s]+/functions/v1$' then
    raise exception 'the functions'' address ends in /functions/v1, without a slash after it' using errcode = 'invalid_parameter_value';
  end if;
  if nudge_key !~ '^whsec_[A-Za-z0-9+/]{32,}=*$' then
    raise exception 'a nudge key is whsec_ and at least 24 bytes in base64' using errcode = 'invalid_parameter_value';
  end if;
  for wanted in select * from (values ('trunkline_functions_url', functions_url), ('trunkline_nudge_key', nudge_key)) as secret (name, value) loop
    select vault.id, vault.decrypted_secret into known, before from vault.decrypted_secrets as vault where vault.name = wanted.name;
    if known is null then
      perform vault.create_secret(wanted.value, wanted.name, 'Trunkline: see docs/deploy.md');
    elsif before is distinct from wanted.value then
      perform vault.update_secret(known, wanted.value);
    end if;
    told := told || jsonb_build_object(
      wanted.name, case when known is null then 'set' when before is distinct from wanted.value then 'changed' else 'as before' end
    );
  end loop;
  return told || jsonb_build_object('database_webhooks', (
    select coalesce(jsonb_agg(format('%s on %s', hook.tgname, hook.tgrelid::regclass) order by hook.tgrelid::regclass::text, hook.tgname), '[]')
    from pg_catalog.pg_trigger as hook
    join pg_catalog.pg_proc as routine on routine.oid = hook.tgfoid
    where routine.pronamespace = 'private'::regnamespace and routine.proname ~ '^nudge_' and hook.tgenabled in ('O', 'A')
  ));
end
$$;
comment on function private.connect_functions(text, text) is
  'Says where the functions are and with what key they are nudged: both go to Vault, where the triggers that are our database webhooks read them. '
  'For the database''s owner, who runs it again after a rotation; returns what changed, and the webhooks that there are.';
revoke execute on function private.connect_functions(text, text) from public;


-- Who asks ------------------------------------------------------------------------------------------------------------------------
-- plpgsql rather than sql, because its plans outlive the request in a pooled connection; definer, because a policy on profiles
-- must not ask itself. Policies call org_with() once a statement: (select private.org_with('…')). It is planned once a connection
-- (plan_cache_mode): a plan for the values at hand, made the first five times, costs ten times what the look-up does.
-- An operator's support session (public.impersonation_sessions) leaves its mark on the operator's own profile, so that a helper
-- that reads the profile anyway learns of it without another look-up.

create or replace function private.acting_user_id() returns uuid
language plpgsql stable parallel safe security definer set search_path = '' as $$
begin
  return (
    select case when mine.acting_until > now() then mine.acting_for else mine.id end
    from public.profiles as mine
    where mine.id = (select auth.uid())
  );
end
$$;
comment on function private.acting_user_id() is
  'In whose name the request acts: the user of its token, or in a support session the user acted for. Default of created_by.';

create or replace function private.get_auth_org_id() returns uuid
language plpgsql stable parallel safe security definer set search_path = '' as $$
begin
  return (
    select holder.organization_id
    from public.profiles as mine
    join public.profiles as holder on holder.id = case when mine.acting_until > now() then mine.acting_for else mine.id end
    where mine.id = (select auth.uid()) and mine.status = 'active' and holder.status = 'active'
  );
end
$$;
comment on function private.get_auth_org_id() is
  'The organization of the user whose token the request carries, or of the user they act for in a support session; null without one.';

create or replace function private.get_auth_system_role() returns public.system_role
language plpgsql stable parallel safe security definer set search_path = '' as $$
begin
  return (
    select holder.system_role
    from public.profiles as mine
    join public.profiles as holder on holder.id = case when mine.acting_until > now() then mine.acting_for else mine.id end
    where mine.id = (select auth.uid()) and mine.status = 'active' and holder.status = 'active'
  );
end
$$;
comment on function private.get_auth_system_role() is
  'The system role of the user whose token the request carries, or of the user they act for; null without one.';

create or replace function private.get_auth_role_id() returns uuid
language plpgsql stable parallel safe security definer set search_path = '' as $$
begin
  return (
    select holder.role_id
    from public.profiles as mine
    join public.profiles as holder on holder.id = case when mine.acting_until > now() then mine.acting_for else mine.id end
    where mine.id = (select auth.uid()) and mine.status = 'active' and holder.status = 'active'
  );
end
$$;
comment on function private.get_auth_role_id() is
  'The role of the user whose token the request carries, or of the user they act for; null when their system role decides.';

create or replace function private.org_with(permission text) returns uuid
language plpgsql stable parallel safe security definer set search_path = '' set plan_cache_mode = force_generic_plan as $$
begin
  return (
    select holder.organization_id
    from public.profiles as mine
    join public.profiles as holder on holder.id = case when mine.acting_until > now() then mine.acting_for else mine.id end
    left join public.roles as role on role.organization_id = holder.organization_id and role.id = holder.role_id
    where mine.id = (select auth.uid())
      and mine.status = 'active'
      and holder.status = 'active'
      and (holder.id = mine.id or not mine.acting_read_only or permission like '%.view')
      and (
        holder.system_role = 'owner'
        or role.permissions ? permission
        or holder.role_id is null and exists (
          select
          from public.permissions as known
          where known.key = permission
            and case holder.system_role when 'admin' then known.admin when 'member' then known.member else false end
        )
      )
  );
end
$$;
comment on function private.org_with(text) is
  'The organization in which the request''s user holds a permission, else null: a policy compares organization_id with it. '
  'An owner holds all; a role of their own decides for the others; without one, the default of their system role. '
  'In a support session the rights are those of the user acted for, and of these only the views unless the session may write.';

create or replace function private.is_platform_admin() returns boolean
language plpgsql stable parallel safe security definer set search_path = '' as $$
begin
  return exists (
    select
    from public.profiles as mine
    where mine.id = (select auth.uid()) and mine.status = 'active' and mine.system_role = 'platform_admin'
  );
end
$$;
comment on function private.is_platform_admin() is 'Whether the token is of the operator''s staff, in a support session or not.';

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
  private.acting_user_id(), private.get_auth_org_id(), private.get_auth_system_role(), private.get_auth_role_id(), private.org_with(text),
  private.is_platform_admin(), private.auth_has_permission(text), private.auth_covers(jsonb), private.require_org(text)
from public;
grant execute on function
  private.acting_user_id(), private.get_auth_org_id(), private.get_auth_system_role(), private.get_auth_role_id(), private.org_with(text),
  private.is_platform_admin(), private.auth_has_permission(text), private.auth_covers(jsonb)
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

create or replace function public.get_auth_role_id() returns uuid
language plpgsql stable parallel safe security invoker set search_path = '' as $$
begin
  return private.get_auth_role_id();
end
$$;
comment on function public.get_auth_role_id() is 'The caller''s role; null when their system role decides.';

create or replace function public.auth_has_permission(permission text) returns boolean
language plpgsql stable parallel safe security invoker set search_path = '' as $$
begin
  return private.auth_has_permission(permission);
end
$$;
comment on function public.auth_has_permission(text) is 'Whether the caller holds a permission (public.permissions lists them).';

revoke execute on function
  public.get_auth_org_id(), public.get_auth_system_role(), public.get_auth_role_id(), public.auth_has_permission(text)
from public, anon, authenticated, service_role;
grant execute on function
  public.get_auth_org_id(), public.get_auth_system_role(), public.get_auth_role_id(), public.auth_has_permission(text)
to authenticated;


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
comment on column public.organizations.tier is 'Of the plan that it is subscribed to; follows the subscription by itself.';
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
  id                uuid primary key references auth.users (id) on delete cascade,
  organization_id   uuid references public.organizations (id) on delete restrict,
  role_id           uuid,
  system_role       public.system_role not null default 'member',
  status            public.user_status not null default 'active',
  full_name         text,
  email             text,
  phone             text,
  avatar_url        text,
  metadata          jsonb not null default '{}' check (jsonb_typeof(metadata) = 'object'),
  created_at        timestamptz not null default private.clock_now(),
  updated_at        timestamptz not null default private.clock_now(),
  acting_for        uuid,
  acting_until      timestamptz,
  acting_read_only  boolean not null default true,
  acting_session_id uuid,
  unique (organization_id, id),
  foreign key (organization_id, role_id) references public.roles (organization_id, id) on delete restrict,
  check (role_id is null or organization_id is not null),
  constraint profiles_platform_admin_apart check (system_role <> 'platform_admin' or organization_id is null),
  constraint profiles_acting_is_platform_admin check (
    acting_for is null or (system_role = 'platform_admin' and acting_until is not null and acting_session_id is not null)
  )
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
create or replace function private.keep_platform_admin_apart() returns trigger
language plpgsql set search_path = '' as $$
begin
  perform private.raise_error(409, 'platform_admin', 'A platform admin belongs to no organization');
  return new;
end
$$;
comment on function private.keep_platform_admin_apart() is
  'Trigger: a platform admin who joins or makes an organization would silently lose what they are; it is taken from them first.';
create or replace trigger keep_platform_admin_apart before update of organization_id on public.profiles
  for each row when (old.system_role = 'platform_admin' and new.organization_id is not null)
  execute function private.keep_platform_admin_apart();
comment on table public.profiles is
  'A user and the organization they belong to. Nobody changes their own organization, role, system role or status: the grants leave them out.';
comment on column public.profiles.role_id is 'Decides the permissions; without one, the system role does. A role that somebody holds cannot be deleted.';
comment on column public.profiles.system_role is
  'owner, admin or member of the organization; platform_admin is the operator''s own staff, who belong to none and act for users in sessions.';
comment on column public.profiles.acting_for is 'The user whose rights a platform admin has in a support session; written by its functions alone. No foreign key: the two are in no tenant together.';
comment on column public.profiles.acting_until is 'Real time at which that session ends by itself.';
comment on column public.profiles.acting_read_only is 'In the session only permissions ending in .view are held.';
comment on column public.profiles.acting_session_id is 'The session''s row in impersonation_sessions, by which the audit log is tagged.';

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
  perform private.join_by_email(new.id, new.email, new.email_confirmed_at);
  return new;
end
$$;
comment on function private.handle_new_user() is
  'Trigger: whoever signs up has a profile, in the same transaction. Their metadata may say how they are called and look, and nothing else: '
  'organization and role come from an invitation.';

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
  known        constant text[] := array['lead.write', 'usage.write'];
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
    array(select distinct scope from unnest(create_api_key.scopes) as scope order by scope), private.acting_user_id(), at
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
  private.keep_platform_admin_apart(), private.handle_new_user()
from public;


-- Sources -------------------------------------------------------------------------------------------------------------------------
-- Rows that another system owns (a shop's products, customers, orders) carry that system's own timestamp beside ours, and the two
-- are never compared with each other.

create or replace function private.keep_newer_source() returns trigger
language plpgsql set search_path = '' as $$
begin
  if new.source_updated_at < old.source_updated_at then
    -- A late event: the row stays as it is, and the writer's `returning` says nothing was written.
    return null;
  end if;
  new.source_updated_at := coalesce(new.source_updated_at, old.source_updated_at);
  return new;
end
$$;
comment on function private.keep_newer_source() is
  'Trigger: an update that carries an older source_updated_at than the row has changes nothing, so that events may come in any order.';


-- stores --------------------------------------------------------------------------------------------------------------------------

create table if not exists public.stores (
  id               uuid primary key default gen_random_uuid(),
  organization_id  uuid not null default public.get_auth_org_id() references public.organizations (id) on delete cascade,
  name             text not null check (length(btrim(name)) between 1 and 255),
  domain           text not null check (
    length(domain) <= 255 and domain ~ '^[a-z0-9-]+(\.[a-z0-9-]+)*\.([a-z]{2,}|xn--[a-z0-9-]+)$'
  ),
  platform         public.store_platform not null,
  store_url        text check (store_url ~ '^https?://'),
  currency_code    text not null default 'USD' check (currency_code ~ '^[A-Z]{3}$'),
  timezone         text not null default 'UTC',
  status           public.store_status not null default 'pending',
  token_expires_at timestamptz,
  last_sync_at     timestamptz,
  sync_enabled     boolean not null default true,
  owner_email      text check (owner_email ~ '^[^@\s]+@[^@\s]+$'),
  owner_name       text,
  created_at       timestamptz not null default private.clock_now(),
  updated_at       timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  unique (organization_id, domain)
);
-- Anybody may write down a domain; only the one who proved it is connected to it.
create unique index if not exists idx_stores_domain on public.stores (domain) where status = 'connected';
create index if not exists idx_stores_platform on public.stores (organization_id, platform);
create index if not exists idx_stores_status on public.stores (organization_id, status);
create index if not exists idx_stores_created_at on public.stores (organization_id, created_at desc);

revoke all on public.stores from anon, authenticated, service_role;
grant select, delete on public.stores to authenticated;
grant
  insert (id, name, domain, platform, store_url, currency_code, timezone, sync_enabled, owner_email, owner_name),
  update (name, store_url, currency_code, timezone, sync_enabled, owner_email, owner_name)
on public.stores to authenticated;
grant select on public.stores to service_role;
alter table public.stores enable row level security;
alter table public.stores force row level security;
drop policy if exists "Who views stores may see them" on public.stores;
create policy "Who views stores may see them" on public.stores
  for select to authenticated using (organization_id = (select private.org_with('store.view')));
drop policy if exists "Who edits stores may add one" on public.stores;
create policy "Who edits stores may add one" on public.stores
  for insert to authenticated with check (organization_id = (select private.org_with('store.edit')));
drop policy if exists "Who edits stores may change one" on public.stores;
create policy "Who edits stores may change one" on public.stores
  for update to authenticated
  using (organization_id = (select private.org_with('store.edit')))
  with check (organization_id = (select private.org_with('store.edit')));
drop policy if exists "Who edits stores may delete one that was never connected" on public.stores;
create policy "Who edits stores may delete one that was never connected" on public.stores
  for delete to authenticated using (organization_id = (select private.org_with('store.edit')) and status = 'pending');

create or replace trigger check_timezone before insert or update of timezone on public.stores
  for each row execute function private.check_timezone();
create or replace trigger update_modified_column before update on public.stores
  for each row execute function private.update_modified_column();
comment on table public.stores is
  'A shop of an organization, on whatever platform. Everything below it carries organization_id and store_id, and both are in every foreign key.';
comment on column public.stores.domain is 'Lower case. Once an organization; of the organizations that name it, one is connected.';
comment on column public.stores.currency_code is 'ISO 4217, upper case; what an amount is in that names no currency of its own.';
comment on column public.stores.timezone is 'IANA; the days and hours of call_analytics are this zone''s.';
comment on column public.stores.status is 'Moved by functions alone: connected is what the platform confirmed.';
comment on column public.stores.token_expires_at is 'When the platform''s token ends; the token itself is in private.store_credentials.';


-- store_credentials ---------------------------------------------------------------------------------------------------------------
-- Beside the store and not in it, so that no select of a store can ever name a token.

create table if not exists private.store_credentials (
  organization_id       uuid not null,
  store_id              uuid not null,
  access_token_sealed   text check (access_token_sealed <> ''),
  refresh_token_sealed  text check (refresh_token_sealed <> ''),
  webhook_secret_sealed text check (webhook_secret_sealed <> ''),
  created_at            timestamptz not null default private.clock_now(),
  updated_at            timestamptz not null default private.clock_now(),
  primary key (organization_id, store_id),
  foreign key (organization_id, store_id) references public.stores (organization_id, id) on delete cascade
);
select private.close_table('private.store_credentials');
create or replace trigger update_modified_column before update on private.store_credentials
  for each row execute function private.update_modified_column();
comment on table private.store_credentials is
  'What it takes to act for a store on its platform, sealed by the handlers; the database cannot open it. Read by definer functions alone.';
comment on column private.store_credentials.webhook_secret_sealed is 'What the platform signs its webhooks with.';


-- settings ------------------------------------------------------------------------------------------------------------------------

create table if not exists private.setting_types (
  category      public.setting_category not null,
  key           text not null,
  type          text not null check (type in ('text', 'integer', 'number', 'boolean', 'time', 'timezone')),
  minimum       numeric,
  maximum       numeric,
  default_value jsonb not null,
  description   text not null,
  primary key (category, key),
  check (minimum <= maximum)
);
select private.close_table('private.setting_types');
comment on table private.setting_types is
  'The settings that every new store has, what their values may be and what they start with. Reference data; other keys are free.';
insert into private.setting_types (category, key, type, minimum, maximum, default_value, description)
values
  ('voice', 'greeting_message', 'text', 1, 1000, '"Hello, and thank you for calling. How may I help you?"', 'What the agent says first'),
  ('voice', 'max_call_duration', 'integer', 30, 14400, '600', 'Seconds after which a call is ended'),
  ('voice', 'voice_model', 'text', 1, 200, '"en-US-AriaNeural"', 'The voice that speaks'),
  ('ai', 'model_provider', 'text', 1, 100, '"openai"', 'Whose language model answers'),
  ('ai', 'model_name', 'text', 1, 200, '"gpt-4"', 'Which language model answers'),
  ('ai', 'max_tokens', 'integer', 1, 100000, '150', 'Tokens of one answer at most'),
  ('ai', 'temperature', 'number', 0, 2, '0.7', 'How freely the model answers'),
  ('integration', 'sync_frequency', 'integer', 60, 86400, '300', 'Seconds between two syncs with the platform'),
  ('integration', 'auto_sync', 'boolean', null, null, 'true', 'Whether the store is synced without being asked'),
  ('general', 'business_hours_start', 'time', null, null, '"09:00"', 'When the store opens, in its own time'),
  ('general', 'business_hours_end', 'time', null, null, '"17:00"', 'When the store closes, in its own time'),
  ('general', 'timezone', 'timezone', null, null, '"UTC"', 'The zone of the opening hours; starts as the store''s own')
on conflict (category, key) do update
set
  type = excluded.type, minimum = excluded.minimum, maximum = excluded.maximum,
  default_value = excluded.default_value, description = excluded.description
where (setting_types.type, setting_types.minimum, setting_types.maximum, setting_types.default_value, setting_types.description)
  is distinct from (excluded.type, excluded.minimum, excluded.maximum, excluded.default_value, excluded.description);

create table if not exists public.settings (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null default public.get_auth_org_id() references public.organizations (id) on delete cascade,
  store_id        uuid,
  category        public.setting_category not null,
  key             text not null check (key ~ '^[a-z][a-z0-9_]{0,99}$'),
  value           jsonb not null,
  description     text,
  is_encrypted    boolean not null default false,
  is_required     boolean not null default false,
  created_at      timestamptz not null default private.clock_now(),
  updated_at      timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  -- A setting of the whole organization has no store, and is one all the same.
  unique nulls not distinct (organization_id, store_id, category, key),
  foreign key (organization_id, store_id) references public.stores (organization_id, id) on delete cascade,
  check (not is_encrypted or jsonb_typeof(value -> 'sealed') is not distinct from 'string')
);
create index if not exists idx_settings_key on public.settings (organization_id, key);
create index if not exists idx_settings_category_key on public.settings (organization_id, category, key);

revoke all on public.settings from anon, authenticated, service_role;
grant select, delete on public.settings to authenticated;
grant insert (store_id, category, key, value, description), update (store_id, category, key, value, description)
on public.settings to authenticated;
grant select on public.settings to service_role;
alter table public.settings enable row level security;
alter table public.settings force row level security;
drop policy if exists "Who views stores may see their settings, but for the sealed" on public.settings;
create policy "Who views stores may see their settings, but for the sealed" on public.settings
  for select to authenticated using (organization_id = (select private.org_with('store.view')) and not is_encrypted);
drop policy if exists "Who edits stores may make a setting" on public.settings;
create policy "Who edits stores may make a setting" on public.settings
  for insert to authenticated
  with check (organization_id = (select private.org_with('store.edit')) and not is_encrypted);
drop policy if exists "Who edits stores may change a setting" on public.settings;
create policy "Who edits stores may change a setting" on public.settings
  for update to authenticated
  using (organization_id = (select private.org_with('store.edit')) and not is_encrypted)
  with check (organization_id = (select private.org_with('store.edit')) and not is_encrypted);
drop policy if exists "Who edits stores may delete a setting that is not required" on public.settings;
create policy "Who edits stores may delete a setting that is not required" on public.settings
  for delete to authenticated
  using (organization_id = (select private.org_with('store.edit')) and not is_encrypted and not is_required);

create or replace function private.check_setting() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  expected private.setting_types;
  plain    text := new.value #>> '{}';
  fits     boolean;
begin
  select known.* into expected
  from private.setting_types as known
  where known.category = new.category and known.key = new.key;
  if expected.key is null or new.is_encrypted then
    return new;
  end if;
  fits := case
    when jsonb_typeof(new.value)
      <> case expected.type when 'integer' then 'number' when 'number' then 'number' when 'boolean' then 'boolean' else 'string' end
      then false
    when expected.type = 'text' then length(btrim(plain)) between expected.minimum and expected.maximum
    when expected.type = 'integer' then plain::numeric % 1 = 0 and plain::numeric between expected.minimum and expected.maximum
    when expected.type = 'number' then plain::numeric between expected.minimum and expected.maximum
    when expected.type = 'time' then plain ~ '^([01][0-9]|2[0-3]):[0-5][0-9]$'
    when expected.type = 'timezone' then exists (select from private.timezones as zone where zone.name = plain)
    else true
  end;
  if not fits then
    perform private.raise_error(
      422, 'invalid_setting',
      format('%s.%s takes a %s%s', new.category, new.key, expected.type,
        case when expected.minimum is not null then format(' of %s to %s', expected.minimum, expected.maximum) end),
      'value'
    );
  end if;
  return new;
end
$$;
comment on function private.check_setting() is 'Trigger: a setting that private.setting_types knows has a value of its type and range.';
create or replace trigger check_setting before insert or update of category, key, value on public.settings
  for each row execute function private.check_setting();
create or replace trigger update_modified_column before update on public.settings
  for each row execute function private.update_modified_column();
comment on table public.settings is 'What an organization has set for one of its stores, or, without a store, for all of them.';
comment on column public.settings.is_encrypted is 'The value is {"sealed":"…"}: written and read by handlers alone, seen by no user.';
comment on column public.settings.is_required is 'No user deletes it.';

create or replace function private.create_default_settings() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  insert into public.settings (organization_id, store_id, category, key, value, description)
  select
    new.organization_id, new.id, known.category, known.key,
    case when known.type = 'timezone' then to_jsonb(new.timezone) else known.default_value end,
    known.description
  from private.setting_types as known
  on conflict (organization_id, store_id, category, key) do nothing;
  return null;
end
$$;
comment on function private.create_default_settings() is 'Trigger: a new store has its twelve settings, in the same transaction.';
create or replace trigger create_default_settings_trigger after insert on public.stores
  for each row execute function private.create_default_settings();


-- store_phone_numbers -------------------------------------------------------------------------------------------------------------

create table if not exists public.store_phone_numbers (
  id                 uuid primary key default gen_random_uuid(),
  organization_id    uuid not null,
  store_id           uuid not null,
  carrier_account_id uuid,
  phone_number       text not null unique check (phone_number ~ '^\+[1-9][0-9]{1,14}$'),
  twilio_sid         text,
  is_active          boolean not null default true,
  is_primary         boolean not null default false,
  voice_url          text check (voice_url ~ '^https?://'),
  voice_method       text not null default 'POST' check (voice_method in ('GET', 'POST')),
  created_at         timestamptz not null default private.clock_now(),
  updated_at         timestamptz not null default private.clock_now(),
  unique (organization_id, store_id, id),
  unique (organization_id, twilio_sid),
  foreign key (organization_id, store_id) references public.stores (organization_id, id) on delete cascade,
  check (is_active or not is_primary)
);
create index if not exists idx_phone_numbers_active on public.store_phone_numbers (organization_id, store_id) where is_active;
create unique index if not exists idx_phone_numbers_primary on public.store_phone_numbers (organization_id, store_id) where is_primary;
create index if not exists idx_phone_numbers_carrier_account on public.store_phone_numbers (carrier_account_id)
  where carrier_account_id is not null;

revoke all on public.store_phone_numbers from anon, authenticated, service_role;
grant select on public.store_phone_numbers to authenticated, service_role;
grant update (is_active, is_primary) on public.store_phone_numbers to authenticated;
alter table public.store_phone_numbers enable row level security;
alter table public.store_phone_numbers force row level security;
drop policy if exists "Who views stores may see their numbers" on public.store_phone_numbers;
create policy "Who views stores may see their numbers" on public.store_phone_numbers
  for select to authenticated using (organization_id = (select private.org_with('store.view')));
drop policy if exists "Who edits stores may switch a number" on public.store_phone_numbers;
create policy "Who edits stores may switch a number" on public.store_phone_numbers
  for update to authenticated
  using (organization_id = (select private.org_with('store.edit')))
  with check (organization_id = (select private.org_with('store.edit')));

create or replace function private.keep_one_primary_number() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  -- The store's row makes two choices at once into one after the other; the later one stands.
  perform from public.stores as store
  where store.organization_id = new.organization_id and store.id = new.store_id
  for no key update;
  update public.store_phone_numbers as other
  set is_primary = false
  where other.organization_id = new.organization_id
    and other.store_id = new.store_id
    and other.id <> new.id
    and other.is_primary;
  return new;
end
$$;
comment on function private.keep_one_primary_number() is 'Trigger: a number that becomes primary takes that from the store''s other one.';
create or replace trigger keep_one_primary_number before insert or update of is_primary, store_id on public.store_phone_numbers
  for each row when (new.is_primary) execute function private.keep_one_primary_number();
create or replace trigger update_modified_column before update on public.store_phone_numbers
  for each row execute function private.update_modified_column();
comment on table public.store_phone_numbers is
  'The numbers on which a store is called. The operator assigns them, on proof that they are its own; which one is primary, users say.';
comment on column public.store_phone_numbers.phone_number is 'E.164. One store in the whole system: it says whose an inbound call is.';
comment on column public.store_phone_numbers.carrier_account_id is
  'The account on which the number rings; a call from another one is not this store''s.';
comment on column public.store_phone_numbers.twilio_sid is 'The carrier''s id of the number, whichever carrier.';
comment on column public.store_phone_numbers.voice_url is 'What the carrier was told to ask when the number is called.';


-- user_settings -------------------------------------------------------------------------------------------------------------------

create table if not exists public.user_settings (
  id                  uuid primary key default gen_random_uuid(),
  organization_id     uuid not null default public.get_auth_org_id(),
  user_id             uuid not null unique default auth.uid(),
  twilio_phone        text check (twilio_phone ~ '^\+[1-9][0-9]{1,14}$'),
  twilio_account_sid  text,
  elevenlabs_voice_id text,
  created_at          timestamptz not null default private.clock_now(),
  updated_at          timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  unique (organization_id, user_id),
  foreign key (organization_id, user_id) references public.profiles (organization_id, id) on delete cascade
);

revoke all on public.user_settings from anon, authenticated, service_role;
grant select, delete on public.user_settings to authenticated;
grant
  insert (twilio_phone, twilio_account_sid, elevenlabs_voice_id),
  update (twilio_phone, twilio_account_sid, elevenlabs_voice_id)
on public.user_settings to authenticated;
grant select on public.user_settings to service_role;
alter table public.user_settings enable row level security;
alter table public.user_settings force row level security;
drop policy if exists "Users may see their own settings" on public.user_settings;
create policy "Users may see their own settings" on public.user_settings
  for select to authenticated
  using (user_id = (select auth.uid()) and organization_id = (select private.get_auth_org_id()));
drop policy if exists "Users may make their own settings" on public.user_settings;
create policy "Users may make their own settings" on public.user_settings
  for insert to authenticated
  with check (user_id = (select auth.uid()) and organization_id = (select private.get_auth_org_id()));
drop policy if exists "Users may change their own settings" on public.user_settings;
create policy "Users may change their own settings" on public.user_settings
  for update to authenticated
  using (user_id = (select auth.uid()) and organization_id = (select private.get_auth_org_id()))
  with check (user_id = (select auth.uid()) and organization_id = (select private.get_auth_org_id()));
drop policy if exists "Users may delete their own settings" on public.user_settings;
create policy "Users may delete their own settings" on public.user_settings
  for delete to authenticated
  using (user_id = (select auth.uid()) and organization_id = (select private.get_auth_org_id()));
create or replace trigger update_modified_column before update on public.user_settings
  for each row execute function private.update_modified_column();
comment on table public.user_settings is
  'What one user has set for themselves, at most one row each. Their keys are in private.user_credentials.';
comment on column public.user_settings.twilio_account_sid is 'Names an account with the carrier; it opens nothing.';

create table if not exists private.user_credentials (
  organization_id           uuid not null,
  user_id                   uuid not null,
  twilio_auth_token_sealed  text check (twilio_auth_token_sealed <> ''),
  openai_api_key_sealed     text check (openai_api_key_sealed <> ''),
  gemini_api_key_sealed     text check (gemini_api_key_sealed <> ''),
  elevenlabs_api_key_sealed text check (elevenlabs_api_key_sealed <> ''),
  created_at                timestamptz not null default private.clock_now(),
  updated_at                timestamptz not null default private.clock_now(),
  primary key (organization_id, user_id),
  foreign key (organization_id, user_id) references public.user_settings (organization_id, user_id) on delete cascade
);
select private.close_table('private.user_credentials');
create or replace trigger update_modified_column before update on private.user_credentials
  for each row execute function private.update_modified_column();
comment on table private.user_credentials is
  'A user''s keys to other services, sealed by the handlers; the database cannot open them, and nobody is ever shown one.';

revoke execute on function
  private.keep_newer_source(), private.check_setting(), private.create_default_settings(), private.keep_one_primary_number()
from public;


-- invitations ---------------------------------------------------------------------------------------------------------------------

create table if not exists public.invitations (
  id                uuid primary key default gen_random_uuid(),
  organization_id   uuid not null references public.organizations (id) on delete cascade,
  organization_name text not null,
  email             text not null check (email = lower(email) and email ~ '^[^@\s]+@[^@\s]+$' and length(email) <= 254),
  system_role       public.system_role not null default 'member' check (system_role <> 'platform_admin'),
  role_id           uuid,
  token_sha256      bytea not null unique check (length(token_sha256) = 32),
  invited_by        uuid,
  accepted_by       uuid,
  created_at        timestamptz not null default private.clock_now(),
  expires_at        timestamptz not null,
  accepted_at       timestamptz,
  revoked_at        timestamptz,
  unique (organization_id, id),
  foreign key (organization_id, role_id) references public.roles (organization_id, id) on delete cascade,
  foreign key (organization_id, invited_by) references public.profiles (organization_id, id) on delete set null (invited_by),
  foreign key (organization_id, accepted_by) references public.profiles (organization_id, id) on delete set null (accepted_by),
  check (accepted_at is null or revoked_at is null)
);
create unique index if not exists idx_invitations_pending on public.invitations (organization_id, email)
  where accepted_at is null and revoked_at is null;
create index if not exists idx_invitations_email on public.invitations (email) where accepted_at is null and revoked_at is null;
create index if not exists idx_invitations_role on public.invitations (organization_id, role_id);
create index if not exists idx_invitations_invited_by on public.invitations (organization_id, invited_by);
create index if not exists idx_invitations_accepted_by on public.invitations (organization_id, accepted_by);

create or replace function private.auth_email() returns text
language plpgsql stable parallel safe security definer set search_path = '' as $$
begin
  return (
    select lower(account.email)
    from auth.users as account
    where account.id = (select auth.uid()) and account.email_confirmed_at is not null
  );
end
$$;
comment on function private.auth_email() is
  'The address of the request''s user, in lower case, if they proved that it is theirs; not the token''s claim, which may be unproved.';
revoke execute on function private.auth_email() from public;
grant execute on function private.auth_email() to authenticated;

revoke all on public.invitations from anon, authenticated, service_role;
-- What the token hashes to is nobody's business.
grant select (
  id, organization_id, organization_name, email, system_role, role_id, invited_by, accepted_by, created_at, expires_at, accepted_at, revoked_at
) on public.invitations to authenticated, service_role;
alter table public.invitations enable row level security;
alter table public.invitations force row level security;
drop policy if exists "Who manages members sees invitations, the invited their own" on public.invitations;
create policy "Who manages members sees invitations, the invited their own" on public.invitations
  for select to authenticated
  using (organization_id = (select private.org_with('member.manage')) or email = (select private.auth_email()));
comment on table public.invitations is
  'Who may join an organization, and as what. The only way in for a user who did not make the organization: sign-up reads it, never what '
  'the user says of themselves.';
comment on column public.invitations.organization_name is 'As it was then, so that the invited can read who asks.';
comment on column public.invitations.email is 'Lower case; joins the account that has proved this address.';
comment on column public.invitations.token_sha256 is 'Of the token that was shown once, to be sent to the address.';
comment on column public.invitations.expires_at is 'Real time.';


-- Joining -------------------------------------------------------------------------------------------------------------------------

create or replace function private.detach_member(organization uuid, user_id uuid) returns void
language plpgsql volatile security definer set search_path = '' as $$
declare
  link record;
begin
  for link in
    select
      reference.conrelid::regclass as child, reference.confdeltype = 'c' as goes_along,
      (select attribute.attname from pg_catalog.pg_attribute as attribute
        where attribute.attrelid = reference.conrelid
          and attribute.attnum = reference.conkey[array_position(reference.confkey, tenant.attnum)]) as tenant_column,
      (select attribute.attname from pg_catalog.pg_attribute as attribute
        where attribute.attrelid = reference.conrelid
          and attribute.attnum = reference.conkey[array_position(reference.confkey, person.attnum)]) as user_column
    from pg_catalog.pg_constraint as reference
    join pg_catalog.pg_attribute as tenant on tenant.attrelid = reference.confrelid and tenant.attname = 'organization_id'
    join pg_catalog.pg_attribute as person on person.attrelid = reference.confrelid and person.attname = 'id'
    where reference.contype = 'f' and reference.confrelid = 'public.profiles'::regclass
      and reference.conparentid = 0 and cardinality(reference.conkey) = 2
    order by reference.conrelid::regclass::text
  loop
    -- What is the user's own (settings, open sockets) goes; from what they did, only the name.
    if link.goes_along then
      execute format('delete from %s where %I = $1 and %I = $2', link.child, link.tenant_column, link.user_column) using organization, user_id;
    else
      execute format('update %s set %I = null where %I = $1 and %I = $2', link.child, link.user_column, link.tenant_column, link.user_column)
      using organization, user_id;
    end if;
  end loop;
end
$$;
comment on function private.detach_member(uuid, uuid) is
  'Takes a user''s name off every row of an organization, as deleting the user would, so that they can belong to another. The audit log keeps it.';

create or replace function private.join_organization(invitation_id uuid, user_id uuid) returns boolean
language plpgsql volatile security definer set search_path = '' as $$
declare
  mine       public.profiles;
  invitation public.invitations;
begin
  select profile.* into mine from public.profiles as profile where profile.id = join_organization.user_id for update;
  select pending.* into invitation
  from public.invitations as pending
  where pending.id = invitation_id and pending.accepted_at is null and pending.revoked_at is null and pending.expires_at > now()
  for update;
  if mine.id is null or invitation.id is null or mine.system_role = 'platform_admin' then
    return false;
  end if;
  if mine.organization_id is not null and mine.status <> 'archived' then
    return false;
  end if;
  -- Somebody who was removed keeps their place in the old organization's history until they belong to another.
  if mine.organization_id <> invitation.organization_id then
    perform private.detach_member(mine.organization_id, mine.id);
  end if;
  update public.profiles as profile
  set organization_id = invitation.organization_id, role_id = invitation.role_id, system_role = invitation.system_role, status = 'active'
  where profile.id = mine.id;
  update public.invitations as pending
  set accepted_at = private.clock_now(), accepted_by = mine.id
  where pending.id = invitation.id;
  return true;
end
$$;
comment on function private.join_organization(uuid, uuid) is
  'Makes a user a member as a pending invitation says, once; false when it is not pending or the user belongs to an organization.';

create or replace function private.join_by_email(user_id uuid, address text, proved_at timestamptz) returns void
language plpgsql volatile security definer set search_path = '' as $$
declare
  pending uuid[];
begin
  if proved_at is null or coalesce(address, '') = '' then
    return;
  end if;
  pending := array(
    select invitation.id
    from public.invitations as invitation
    where invitation.email = lower(address)
      and invitation.accepted_at is null and invitation.revoked_at is null and invitation.expires_at > now()
  );
  -- Asked by two organizations, it is the user who chooses: accept_invitation().
  if cardinality(pending) = 1 then
    perform private.join_organization(pending[1], user_id);
  end if;
end
$$;
comment on function private.join_by_email(uuid, text, timestamptz) is
  'A user who proved an address to which one invitation is pending becomes a member by it.';

create or replace function private.handle_user_change() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  update public.profiles as profile
  set email = new.email, phone = coalesce(new.phone, profile.phone)
  where profile.id = new.id and (profile.email, profile.phone) is distinct from (new.email::text, coalesce(new.phone, profile.phone));
  perform private.join_by_email(new.id, new.email, new.email_confirmed_at);
  return new;
end
$$;
comment on function private.handle_user_change() is
  'Trigger: a profile follows its account''s address and number; an address that is proved only now takes up its invitation now.';

create or replace trigger on_auth_user_changed after update of email, phone, email_confirmed_at on auth.users
  for each row when (
    (old.email, old.phone, old.email_confirmed_at) is distinct from (new.email, new.phone, new.email_confirmed_at)
  ) execute function private.handle_user_change();


-- Members -------------------------------------------------------------------------------------------------------------------------
-- Whoever changes members locks the organization's row first, and judges rights behind that lock.

create or replace function private.permissions_of(organization uuid, system_role public.system_role, role_id uuid) returns jsonb
language plpgsql stable security definer set search_path = '' as $$
begin
  if permissions_of.system_role <> 'owner' and permissions_of.role_id is not null then
    return (
      select role.permissions
      from public.roles as role
      where role.organization_id = organization and role.id = permissions_of.role_id
    );
  end if;
  return (
    select coalesce(jsonb_agg(known.key), '[]')
    from public.permissions as known
    where case permissions_of.system_role when 'owner' then true when 'admin' then known.admin when 'member' then known.member end
  );
end
$$;
comment on function private.permissions_of(uuid, public.system_role, uuid) is
  'What somebody with a system role and a role may do in an organization; null when it has no such role.';

create or replace function private.lock_members(permission text) returns uuid
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.require_org(permission);
begin
  perform from public.organizations as tenant where tenant.id = organization for no key update;
  if private.require_org(permission) <> organization then
    perform private.raise_error(409, 'membership_changed', 'The caller''s membership has changed meanwhile');
  end if;
  return organization;
end
$$;
comment on function private.lock_members(text) is
  'The caller''s organization, locked against any other change of its members, with the permission judged behind the lock.';

create or replace function private.check_grant(organization uuid, system_role public.system_role, role_id uuid) returns void
language plpgsql stable security definer set search_path = '' as $$
declare
  given jsonb := private.permissions_of(organization, check_grant.system_role, check_grant.role_id);
begin
  if check_grant.system_role is null or check_grant.system_role = 'platform_admin' then
    perform private.raise_error(422, 'invalid_system_role', 'A member is owner, admin or member', 'system_role');
  end if;
  if given is null or check_grant.role_id is not null and not exists (
    select from public.roles as role where role.organization_id = organization and role.id = check_grant.role_id
  ) then
    perform private.raise_error(404, 'role_not_found', 'There is no such role', 'role_id');
  end if;
  if check_grant.system_role = 'owner' and private.get_auth_system_role() <> 'owner' then
    perform private.raise_error(403, 'owner_required', 'Only an owner makes an owner', 'system_role');
  end if;
  if not private.auth_covers(given) then
    perform private.raise_error(403, 'permission_denied', 'Nobody gives permissions that they do not hold', 'role_id');
  end if;
end
$$;
comment on function private.check_grant(uuid, public.system_role, uuid) is
  'Ends the request with 403, 404 or 422 unless the caller may make somebody this: owners by owners, and nothing that the caller has not.';

create or replace function private.claim_member(organization uuid, user_id uuid) returns public.profiles
language plpgsql volatile security definer set search_path = '' as $$
declare
  member public.profiles;
begin
  select profile.* into member
  from public.profiles as profile
  where profile.organization_id = organization and profile.id = claim_member.user_id and profile.status <> 'archived'
  for no key update;
  if member.id is null then
    perform private.raise_error(404, 'member_not_found', 'There is no such member', 'user_id');
  end if;
  if member.id = private.acting_user_id() then
    perform private.raise_error(403, 'own_membership', 'Nobody changes their own role or status', 'user_id');
  end if;
  if member.system_role = 'owner' and private.get_auth_system_role() <> 'owner' then
    perform private.raise_error(403, 'owner_required', 'Only an owner changes an owner', 'user_id');
  end if;
  if not private.auth_covers(private.permissions_of(organization, member.system_role, member.role_id)) then
    perform private.raise_error(403, 'permission_denied', 'The member holds permissions that the caller does not', 'user_id');
  end if;
  return member;
end
$$;
comment on function private.claim_member(uuid, uuid) is
  'Locks a member whom the caller may change: not themselves, not an owner unless they are one, nobody who may do more than they.';

create or replace function private.member_json(user_id uuid) returns jsonb
language sql stable security definer set search_path = '' as $$
  select jsonb_build_object(
    'user_id', profile.id, 'system_role', profile.system_role, 'role_id', profile.role_id, 'status', profile.status
  )
  from public.profiles as profile
  where profile.id = $1
$$;
comment on function private.member_json(uuid) is 'A member as the functions that change one return them.';

create or replace function private.set_member_role(user_id uuid, system_role public.system_role, role_id uuid) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.lock_members('member.manage');
  member       public.profiles := private.claim_member(organization, user_id);
begin
  perform private.check_grant(organization, set_member_role.system_role, set_member_role.role_id);
  update public.profiles as profile
  set system_role = set_member_role.system_role, role_id = set_member_role.role_id
  where profile.id = member.id;
  return private.member_json(member.id);
end
$$;
comment on function private.set_member_role(uuid, public.system_role, uuid) is 'Makes a member of the caller''s organization something else.';

create or replace function public.set_member_role(user_id uuid, system_role public.system_role, role_id uuid default null) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.set_member_role(user_id, system_role, role_id)
$$;
comment on function public.set_member_role(uuid, public.system_role, uuid) is
  'Sets what a member is; without a role, their system role decides. Needs member.manage, and all that is given or taken; owners are made '
  'and changed by owners. Returns {"user_id","system_role","role_id","status"}.';

create or replace function private.set_member_status(user_id uuid, status public.user_status) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.lock_members('member.manage');
  member       public.profiles := private.claim_member(organization, user_id);
begin
  if set_member_status.status is null or set_member_status.status not in ('active', 'suspended') then
    perform private.raise_error(422, 'invalid_status', 'A member is made active or suspended', 'status');
  end if;
  update public.profiles as profile set status = set_member_status.status where profile.id = member.id;
  return private.member_json(member.id);
end
$$;
comment on function private.set_member_status(uuid, public.user_status) is 'Suspends a member, who then sees nothing, or lets them in again.';

create or replace function public.set_member_status(user_id uuid, status public.user_status) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.set_member_status(user_id, status)
$$;
comment on function public.set_member_status(uuid, public.user_status) is
  'Suspends a member or makes them active again. Needs member.manage; owners by owners.';

create or replace function private.remove_member(user_id uuid) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.lock_members('member.manage');
  member       public.profiles := private.claim_member(organization, user_id);
begin
  -- Archived in place: what they made keeps their name, and they can be invited again, here or elsewhere.
  update public.profiles as profile
  set status = 'archived', system_role = 'member', role_id = null
  where profile.id = member.id;
  update public.leads as lead set assigned_to = null where lead.organization_id = organization and lead.assigned_to = member.id;
  return private.member_json(member.id);
end
$$;
comment on function private.remove_member(uuid) is 'Takes a member out of the caller''s organization; leads assigned to them are assigned to nobody.';

create or replace function public.remove_member(user_id uuid) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.remove_member(user_id)
$$;
comment on function public.remove_member(uuid) is 'Removes a member: from then on they see nothing. Needs member.manage; owners by owners.';

create or replace function private.leave_organization() returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  mine public.profiles;
begin
  select profile.* into mine from public.profiles as profile where profile.id = (select auth.uid());
  perform from public.organizations as tenant where tenant.id = mine.organization_id for no key update;
  select profile.* into mine from public.profiles as profile where profile.id = (select auth.uid()) for update;
  if mine.id is null then
    perform private.raise_error(401, 'unauthenticated', 'A signed-in user''s token is required');
  end if;
  if mine.organization_id is null then
    perform private.raise_error(403, 'no_organization', 'The user belongs to no organization');
  end if;
  if mine.status not in ('active', 'archived') then
    perform private.raise_error(403, 'suspended', 'Who is suspended waits for the organization');
  end if;
  if mine.system_role = 'owner' and not exists (
    select
    from public.profiles as other
    where other.organization_id = mine.organization_id
      and other.id <> mine.id and other.system_role = 'owner' and other.status = 'active'
  ) then
    perform private.raise_error(409, 'last_owner', 'An organization keeps at least one owner');
  end if;
  perform private.detach_member(mine.organization_id, mine.id);
  update public.profiles as profile
  set organization_id = null, role_id = null, system_role = 'member', status = 'active'
  where profile.id = mine.id;
  return jsonb_build_object('left', mine.organization_id);
end
$$;
comment on function private.leave_organization() is
  'Takes the caller out of their organization, or out of one that removed them, so that they can join or make another.';

create or replace function public.leave_organization() returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.leave_organization()
$$;
comment on function public.leave_organization() is 'Leaves the caller''s organization; 409 for its last owner. Returns {"left"}.';

create or replace function private.create_invitation(email text, system_role public.system_role, role_id uuid) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.lock_members('member.manage');
  address      text := lower(btrim(coalesce(create_invitation.email, '')));
  plain        text := 'tli_' || encode(extensions.gen_random_bytes(20), 'hex');
  seats        bigint;
  invitation   public.invitations;
begin
  if address !~ '^[^@\s]+@[^@\s]+$' or length(address) > 254 then
    perform private.raise_error(422, 'invalid_email', 'An e-mail address is required', 'email');
  end if;
  perform private.check_grant(organization, create_invitation.system_role, create_invitation.role_id);
  if exists (
    select
    from public.profiles as member
    where member.organization_id = organization and lower(member.email) = address and member.status <> 'archived'
  ) then
    perform private.raise_error(409, 'already_member', 'This address belongs to a member', 'email');
  end if;

  -- Asked again, the earlier invitation is void.
  update public.invitations as pending
  set revoked_at = private.clock_now()
  where pending.organization_id = organization
    and pending.accepted_at is null and pending.revoked_at is null
    and (pending.email = address or pending.expires_at <= now());
  seats := (
    select count(*) from public.profiles as member where member.organization_id = organization and member.status <> 'archived'
  ) + (
    select count(*)
    from public.invitations as pending
    where pending.organization_id = organization and pending.accepted_at is null and pending.revoked_at is null
  );
  if not private.check_feature_quota(organization, 'max_users', seats) then
    perform private.raise_error(402, 'quota_exhausted', 'The plan has no seat left', 'email');
  end if;
  insert into public.invitations (organization_id, organization_name, email, system_role, role_id, token_sha256, invited_by, expires_at)
  select
    tenant.id, tenant.name, address, create_invitation.system_role, create_invitation.role_id, extensions.digest(plain, 'sha256'),
    private.acting_user_id(), now() + interval '7 days'
  from public.organizations as tenant
  where tenant.id = organization
  returning * into invitation;
  return jsonb_build_object(
    'id', invitation.id, 'email', invitation.email, 'system_role', invitation.system_role, 'role_id', invitation.role_id,
    'expires_at', invitation.expires_at, 'token', plain
  );
end
$$;
comment on function private.create_invitation(text, public.system_role, uuid) is
  'Invites an address into the caller''s organization; the only time that the token is seen.';

create or replace function public.create_invitation(email text, system_role public.system_role default 'member', role_id uuid default null)
returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.create_invitation(email, system_role, role_id)
$$;
comment on function public.create_invitation(text, public.system_role, uuid) is
  'Invites somebody for seven days: {"id","email","system_role","role_id","expires_at","token"}, the token shown this once. '
  '402 when the plan has no seat left. Needs member.manage.';

create or replace function private.revoke_invitation(invitation_id uuid) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.lock_members('member.manage');
  revoked      uuid;
begin
  update public.invitations as pending
  set revoked_at = private.clock_now()
  where pending.organization_id = organization and pending.id = revoke_invitation.invitation_id
    and pending.accepted_at is null and pending.revoked_at is null
  returning pending.id into revoked;
  if revoked is null then
    perform private.raise_error(404, 'invitation_not_found', 'There is no such pending invitation', 'invitation_id');
  end if;
  return jsonb_build_object('id', revoked);
end
$$;
comment on function private.revoke_invitation(uuid) is 'Takes back a pending invitation of the caller''s organization.';

create or replace function public.revoke_invitation(invitation_id uuid) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.revoke_invitation(invitation_id)
$$;
comment on function public.revoke_invitation(uuid) is 'Takes back a pending invitation; 404 when there is none. Needs member.manage.';

create or replace function private.accept_invitation(token text, invitation_id uuid) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  me         uuid := (select auth.uid());
  proved     text := private.auth_email();
  address    text := (select nullif(account.email, '') from auth.users as account where account.id = me);
  invitation public.invitations;
begin
  if me is null then
    perform private.raise_error(401, 'unauthenticated', 'A signed-in user''s token is required');
  end if;
  select pending.* into invitation
  from public.invitations as pending
  where pending.accepted_at is null and pending.revoked_at is null and pending.expires_at > now()
    and (
      pending.token_sha256 = extensions.digest(accept_invitation.token, 'sha256')
      or accept_invitation.token is null and pending.id = accept_invitation.invitation_id and pending.email = proved
    );
  if invitation.id is null then
    perform private.raise_error(404, 'invitation_not_found', 'There is no such pending invitation', 'token');
  end if;
  -- A token that was passed on is of no use to somebody with another address; an account without one proves itself by the token.
  if address is not null and proved is distinct from invitation.email then
    perform private.raise_error(403, 'invitation_of_another', 'The invitation is for another address, or the address is not confirmed');
  end if;
  if not private.join_organization(invitation.id, me) then
    perform private.raise_error(409, 'already_in_organization', 'The user already belongs to an organization');
  end if;
  return jsonb_build_object('organization_id', invitation.organization_id);
end
$$;
comment on function private.accept_invitation(text, uuid) is 'Joins the caller to the organization that invited them.';

create or replace function public.accept_invitation(token text default null, invitation_id uuid default null) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.accept_invitation(token, invitation_id)
$$;
comment on function public.accept_invitation(text, uuid) is
  'Joins by the token that was sent, or by the id of an invitation to the caller''s confirmed address. 404 unless it is pending, 403 when it is '
  'for another address, 409 for a member of an organization. Returns {"organization_id"}.';

revoke execute on function
  private.detach_member(uuid, uuid), private.join_organization(uuid, uuid), private.join_by_email(uuid, text, timestamptz), private.handle_user_change(),
  private.permissions_of(uuid, public.system_role, uuid), private.lock_members(text),
  private.check_grant(uuid, public.system_role, uuid), private.claim_member(uuid, uuid), private.member_json(uuid)
from public;
revoke execute on function
  private.set_member_role(uuid, public.system_role, uuid), public.set_member_role(uuid, public.system_role, uuid),
  private.set_member_status(uuid, public.user_status), public.set_member_status(uuid, public.user_status),
  private.remove_member(uuid), public.remove_member(uuid), private.leave_organization(), public.leave_organization(),
  private.create_invitation(text, public.system_role, uuid), public.create_invitation(text, public.system_role, uuid),
  private.revoke_invitation(uuid), public.revoke_invitation(uuid),
  private.accept_invitation(text, uuid), public.accept_invitation(text, uuid)
from public, anon, authenticated, service_role;
grant execute on function
  private.set_member_role(uuid, public.system_role, uuid), public.set_member_role(uuid, public.system_role, uuid),
  private.set_member_status(uuid, public.user_status), public.set_member_status(uuid, public.user_status),
  private.remove_member(uuid), public.remove_member(uuid), private.leave_organization(), public.leave_organization(),
  private.create_invitation(text, public.system_role, uuid), public.create_invitation(text, public.system_role, uuid),
  private.revoke_invitation(uuid), public.revoke_invitation(uuid),
  private.accept_invitation(text, uuid), public.accept_invitation(text, uuid)
to authenticated;
