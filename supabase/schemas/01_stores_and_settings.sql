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
