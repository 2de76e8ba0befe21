-- Trunkline's whole schema, for Supabase's SQL editor: paste it and press Run. Made from schemas/ by `cargo run -p local -- generate`;
-- do not edit. One statement, so it is applied whole or not at all. Where the Supabase CLI is at hand, `supabase db push` is better: it
-- applies what is new and keeps a record.

do $trunkline_master$
declare
  version   constant text := 'de0dc46e8c95';
  installed text;
  clash     text;
begin
  select obj_description(oid, 'pg_namespace') into installed from pg_catalog.pg_namespace where nspname = 'private';
  if installed = 'Trunkline ' || version then
    raise notice 'Trunkline % is here already: nothing to do.', version;
    return;
  end if;
  select string_agg(relname, ', ' order by relname) into clash
  from pg_catalog.pg_class
  where relnamespace = 'public'::regnamespace
    and relkind in ('r', 'p', 'v', 'm')
    and relname in (
      'permissions', 'organizations', 'roles', 'profiles', 'api_keys', 'stores', 'settings', 'store_phone_numbers',
      'user_settings', 'invitations', 'customers', 'customer_totals', 'products', 'product_images', 'orders',
      'order_line_items', 'privacy_requests', 'conversations', 'conversation_messages', 'calls', 'call_analytics',
      'projects', 'pipelines', 'pipeline_stages', 'leads', 'lead_activities', 'stage_transitions', 'lead_forms',
      'consents', 'properties', 'property_reservations', 'property_images', 'property_features', 'carrier_accounts',
      'caller_numbers', 'suppressions', 'campaigns', 'campaign_leads', 'call_queue', 'call_logs', 'calling_hours',
      'calling_holidays', 'websocket_sessions', 'meters', 'subscription_plans', 'plan_prices', 'plan_price_meters',
      'subscriptions', 'usage_logs', 'usage_days', 'call_credits', 'credit_accounts', 'credit_transactions',
      'credit_ledger', 'call_charges', 'tax_rates', 'invoices', 'invoice_lines', 'invoice_taxes', 'payment_methods',
      'payments', 'refunds', 'credit_notes', 'credit_note_lines', 'credit_note_taxes', 'webhook_sources', 'audit_logs',
      'platform_audit_logs', 'impersonation_sessions'
    );
  if installed like 'Trunkline %' then
    raise exception 'another version of Trunkline is installed here (%); apply supabase/migrations with `supabase db push` instead', installed;
  elsif clash is not null then
    raise exception 'this project has other tables of the same names: %. Nothing was changed.', clash
      using hint = 'Install Trunkline into a project of its own, or rename these tables first.';
  end if;

  execute $trunkline_schema$
-- 00_enums_and_types.sql

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

do $$
begin
  create type public.credit_transaction_type as enum (
    'purchase', 'monthly_grant', 'promotional_grant', 'consumption', 'refund', 'adjustment', 'expiry'
  );
exception when duplicate_object then null;
end
$$;
comment on type public.credit_transaction_type is 'Why prepaid credit came or went.';

do $$
begin
  create type public.credit_account_kind as enum (
    'monthly', 'promotional', 'purchased', 'payments', 'grants', 'consumption', 'expiry', 'adjustments'
  );
exception when duplicate_object then null;
end
$$;
comment on type public.credit_account_kind is
  'The accounts of prepaid credit: the first three hold it and are used up in this order, the others say where it came from or went.';

do $$
begin
  create type public.ledger_side as enum ('debit', 'credit');
exception when duplicate_object then null;
end
$$;
comment on type public.ledger_side is 'The side of an account on which an entry stands: a credit adds to what it holds, a debit takes from it.';

do $$
begin
  create type public.payment_gateway as enum ('razorpay', 'stripe', 'manual');
exception when duplicate_object then null;
end
$$;
comment on type public.payment_gateway is 'Who moved the money; manual is a transfer that a person saw on the bank statement.';

do $$
begin
  create type public.payment_transaction_status as enum ('pending', 'authorized', 'failed', 'captured', 'refunded');
exception when duplicate_object then null;
end
$$;
comment on type public.payment_transaction_status is
  'One payment at a gateway. The first three may follow each other; captured is money that came, and only a full refund follows it.';

do $$
begin
  create type public.refund_status as enum ('pending', 'processed', 'failed');
exception when duplicate_object then null;
end
$$;
comment on type public.refund_status is 'One refund at a gateway; the last two are terminal.';

do $$
begin
  create type public.credit_note_status as enum ('draft', 'issued');
exception when duplicate_object then null;
end
$$;
comment on type public.credit_note_status is 'A credit note is immutable once it is issued.';
-- 01_stores_and_settings.sql

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
-- 02_products_and_orders.sql

-- What a store sells and to whom: customers and their totals, products and their images, orders and their lines.
-- May run twice: everything is created if it is not there, or replaced.
--
-- Money is bigint in the minor unit of the currency that the row, or the order of a line, names (currency_code):
--   price                        -> price_minor                  subtotal_price               -> subtotal_price_minor
--   compare_at_price             -> compare_at_price_minor       total_tax, total_shipping    -> total_tax_minor, total_shipping_minor
--   cost_per_item                -> cost_per_item_minor          total_discounts, total_price -> total_discounts_minor, total_price_minor
--   total_spent, lifetime_value  -> customer_totals.total_spent_minor, .lifetime_value_minor: one row a currency, never added up
--   (new)                        -> orders.total_refunded_minor: what was paid back of an order that stands
--
-- Whoever changes several of these rows locks them in this order, and within one table by id: orders, customers, customer_totals.


-- customers -----------------------------------------------------------------------------------------------------------------------

create table if not exists public.customers (
  id                 uuid primary key default gen_random_uuid(),
  organization_id    uuid not null default public.get_auth_org_id(),
  store_id           uuid not null,
  external_id        text not null check (length(external_id) between 1 and 255),
  email              text check (email ~ '^[^@\s]+@[^@\s]+$'),
  phone              text check (phone ~ '^\+[1-9][0-9]{1,14}$'),
  first_name         text check (length(first_name) <= 255),
  last_name          text check (length(last_name) <= 255),
  accepts_marketing  boolean not null default false,
  preferred_language text not null default 'en' check (preferred_language ~ '^[A-Za-z]{2,3}([-_][A-Za-z0-9]{2,8})*$'),
  total_orders       integer not null default 0 check (total_orders >= 0),
  last_order_date    timestamptz,
  last_contact_date  timestamptz,
  tags               text[] not null default '{}',
  platform_data      jsonb not null default '{}' check (jsonb_typeof(platform_data) = 'object'),
  source_updated_at  timestamptz,
  last_synced_at     timestamptz not null default private.clock_now(),
  sync_hash          text check (length(sync_hash) <= 64),
  created_at         timestamptz not null default private.clock_now(),
  updated_at         timestamptz not null default private.clock_now(),
  unique (organization_id, store_id, id),
  unique (organization_id, store_id, external_id),
  foreign key (organization_id, store_id) references public.stores (organization_id, id) on delete cascade
);
create index if not exists idx_customers_store_id on public.customers (organization_id, store_id, created_at desc);
create index if not exists idx_customers_email on public.customers (organization_id, store_id, email) where email is not null;
create index if not exists idx_customers_phone on public.customers (organization_id, store_id, phone) where phone is not null;
create index if not exists idx_customers_last_order_date on public.customers (organization_id, store_id, last_order_date desc);
create index if not exists idx_customers_tags on public.customers using gin (tags);

revoke all on public.customers from anon, authenticated, service_role;
grant select on public.customers to authenticated, service_role;
grant
  insert (id, store_id, external_id, email, phone, first_name, last_name, accepts_marketing, preferred_language, tags),
  update (email, phone, first_name, last_name, accepts_marketing, preferred_language, tags)
on public.customers to authenticated;
alter table public.customers enable row level security;
alter table public.customers force row level security;
drop policy if exists "Who views stores may see their customers" on public.customers;
create policy "Who views stores may see their customers" on public.customers
  for select to authenticated using (organization_id = (select private.org_with('store.view')));
drop policy if exists "Who edits stores may add a customer" on public.customers;
create policy "Who edits stores may add a customer" on public.customers
  for insert to authenticated with check (organization_id = (select private.org_with('store.edit')));
drop policy if exists "Who edits stores may change a customer" on public.customers;
create policy "Who edits stores may change a customer" on public.customers
  for update to authenticated
  using (organization_id = (select private.org_with('store.edit')))
  with check (organization_id = (select private.org_with('store.edit')));

create or replace trigger keep_newer_source before update of source_updated_at on public.customers
  for each row execute function private.keep_newer_source();
create or replace trigger update_modified_column before update on public.customers
  for each row execute function private.update_modified_column();
comment on table public.customers is
  'Who buys at a store. What they spent is counted by the database, a currency at a time, in customer_totals.';
comment on column public.customers.external_id is 'The platform''s id, as text: it may be larger than any number type.';
comment on column public.customers.phone is 'E.164. A caller is known by it.';
comment on column public.customers.total_orders is 'Orders that stand, in whatever currency: neither cancelled, returned nor refunded.';
comment on column public.customers.last_order_date is 'Of all orders, whatever became of them.';
comment on column public.customers.last_contact_date is 'Start of their latest call or conversation.';
comment on column public.customers.source_updated_at is
  'The platform''s own timestamp of what this row says; an older one changes nothing.';
comment on column public.customers.sync_hash is
  'Of what was last taken from the platform, to see without comparing whether anything changed.';


-- customer_totals -----------------------------------------------------------------------------------------------------------------

create table if not exists public.customer_totals (
  organization_id      uuid not null,
  store_id             uuid not null,
  customer_id          uuid not null,
  currency_code        text not null check (currency_code ~ '^[A-Z]{3}$'),
  total_orders         integer not null check (total_orders >= 0),
  total_spent_minor    bigint not null check (total_spent_minor >= 0),
  lifetime_value_minor bigint not null check (lifetime_value_minor between 0 and total_spent_minor),
  created_at           timestamptz not null default private.clock_now(),
  updated_at           timestamptz not null default private.clock_now(),
  primary key (organization_id, store_id, customer_id, currency_code),
  foreign key (organization_id, store_id, customer_id) references public.customers (organization_id, store_id, id) on delete cascade
);
create index if not exists idx_customer_totals_lifetime_value
  on public.customer_totals (organization_id, store_id, currency_code, lifetime_value_minor desc);

revoke all on public.customer_totals from anon, authenticated, service_role;
grant select on public.customer_totals to authenticated, service_role;
alter table public.customer_totals enable row level security;
alter table public.customer_totals force row level security;
drop policy if exists "Who views stores may see what their customers spent" on public.customer_totals;
create policy "Who views stores may see what their customers spent" on public.customer_totals
  for select to authenticated using (organization_id = (select private.org_with('store.view')));
create or replace trigger update_modified_column before update on public.customer_totals
  for each row execute function private.update_modified_column();
comment on table public.customer_totals is
  'What a customer''s standing orders come to, one row a currency that they have such an order in. Kept by the trigger on orders alone.';
comment on column public.customer_totals.total_spent_minor is 'Sum of total_price_minor.';
comment on column public.customer_totals.lifetime_value_minor is 'The same less what was paid back of orders that stand.';


-- products ------------------------------------------------------------------------------------------------------------------------

create table if not exists public.products (
  id                     uuid primary key default gen_random_uuid(),
  organization_id        uuid not null default public.get_auth_org_id(),
  store_id               uuid not null,
  external_id            text not null check (length(external_id) between 1 and 255),
  external_variant_id    text,
  title                  text not null check (length(title) between 1 and 500),
  description            text,
  handle                 text,
  product_type           text,
  vendor                 text,
  tags                   text[] not null default '{}',
  price_minor            bigint not null check (price_minor >= 0),
  compare_at_price_minor bigint check (compare_at_price_minor >= 0),
  cost_per_item_minor    bigint check (cost_per_item_minor >= 0),
  currency_code          text not null check (currency_code ~ '^[A-Z]{3}$'),
  sku                    text,
  barcode                text,
  inventory_quantity     integer not null default 0 check (inventory_quantity >= 0),
  inventory_tracked      boolean not null default false,
  availability           public.product_availability not null default 'in_stock',
  weight                 numeric(8, 3) check (weight >= 0),
  weight_unit            text not null default 'kg' check (weight_unit in ('g', 'kg', 'oz', 'lb')),
  seo_title              text,
  seo_description        text,
  platform_data          jsonb not null default '{}' check (jsonb_typeof(platform_data) = 'object'),
  status                 public.product_status not null default 'active',
  is_published           boolean not null default true,
  published_at           timestamptz,
  source_updated_at      timestamptz,
  last_synced_at         timestamptz not null default private.clock_now(),
  sync_hash              text check (length(sync_hash) <= 64),
  created_at             timestamptz not null default private.clock_now(),
  updated_at             timestamptz not null default private.clock_now(),
  unique (organization_id, store_id, id),
  unique (organization_id, store_id, external_id),
  foreign key (organization_id, store_id) references public.stores (organization_id, id) on delete cascade
);
create index if not exists idx_products_store_id on public.products (organization_id, store_id, created_at desc);
create index if not exists idx_products_sku on public.products (organization_id, store_id, sku) where sku is not null;
create index if not exists idx_products_status on public.products (organization_id, store_id, status);
create index if not exists idx_products_availability on public.products (organization_id, store_id, availability);
create index if not exists idx_products_last_synced on public.products (organization_id, store_id, last_synced_at);
create index if not exists idx_products_tags on public.products using gin (tags);

revoke all on public.products from anon, authenticated, service_role;
grant select, delete on public.products to authenticated;
grant
  insert (
    id, store_id, external_id, external_variant_id, title, description, handle, product_type, vendor, tags, price_minor,
    compare_at_price_minor, cost_per_item_minor, currency_code, sku, barcode, inventory_quantity, inventory_tracked, availability, weight,
    weight_unit, seo_title, seo_description, status, is_published, published_at
  ),
  update (
    external_variant_id, title, description, handle, product_type, vendor, tags, price_minor, compare_at_price_minor, cost_per_item_minor,
    currency_code, sku, barcode, inventory_quantity, inventory_tracked, availability, weight, weight_unit, seo_title, seo_description,
    status, is_published, published_at
  )
on public.products to authenticated;
grant select on public.products to service_role;
alter table public.products enable row level security;
alter table public.products force row level security;
drop policy if exists "Who views stores may see their products" on public.products;
create policy "Who views stores may see their products" on public.products
  for select to authenticated using (organization_id = (select private.org_with('store.view')));
drop policy if exists "Who edits stores may add a product" on public.products;
create policy "Who edits stores may add a product" on public.products
  for insert to authenticated with check (organization_id = (select private.org_with('store.edit')));
drop policy if exists "Who edits stores may change a product" on public.products;
create policy "Who edits stores may change a product" on public.products
  for update to authenticated
  using (organization_id = (select private.org_with('store.edit')))
  with check (organization_id = (select private.org_with('store.edit')));
drop policy if exists "Who edits stores may delete a product" on public.products;
create policy "Who edits stores may delete a product" on public.products
  for delete to authenticated using (organization_id = (select private.org_with('store.edit')));

create or replace function private.fill_store_currency() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  new.currency_code := (
    select store.currency_code
    from public.stores as store
    where store.organization_id = new.organization_id and store.id = new.store_id
  );
  return new;
end
$$;
comment on function private.fill_store_currency() is 'Trigger: an amount that names no currency is in its store''s.';
create or replace trigger fill_store_currency before insert on public.products
  for each row when (new.currency_code is null) execute function private.fill_store_currency();
create or replace trigger keep_newer_source before update of source_updated_at on public.products
  for each row execute function private.keep_newer_source();
create or replace trigger update_modified_column before update on public.products
  for each row execute function private.update_modified_column();
comment on table public.products is 'What a store sells, as its platform says it.';
comment on column public.products.external_id is 'The platform''s id, as text.';
comment on column public.products.price_minor is 'In the minor unit of currency_code, as every amount of this row.';
comment on column public.products.currency_code is 'ISO 4217, upper case; the store''s when not given.';
comment on column public.products.inventory_quantity is
  'What can be sold. A platform that oversells says less than nothing: that is 0 here, and as it came in platform_data.';
comment on column public.products.source_updated_at is 'The platform''s own timestamp of what this row says; an older one changes nothing.';


-- product_images ------------------------------------------------------------------------------------------------------------------

create table if not exists public.product_images (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null default public.get_auth_org_id(),
  store_id        uuid not null,
  product_id      uuid not null,
  external_id     text,
  url             text not null check (url ~ '^https?://'),
  alt_text        text,
  position        integer not null default 0 check (position >= 0),
  created_at      timestamptz not null default private.clock_now(),
  updated_at      timestamptz not null default private.clock_now(),
  unique (organization_id, store_id, id),
  unique (organization_id, store_id, product_id, external_id),
  foreign key (organization_id, store_id, product_id) references public.products (organization_id, store_id, id) on delete cascade
);
create index if not exists idx_product_images_position on public.product_images (organization_id, store_id, product_id, position);

revoke all on public.product_images from anon, authenticated, service_role;
grant select, delete on public.product_images to authenticated;
grant insert (store_id, product_id, external_id, url, alt_text, position), update (url, alt_text, position)
on public.product_images to authenticated;
grant select on public.product_images to service_role;
alter table public.product_images enable row level security;
alter table public.product_images force row level security;
drop policy if exists "Who views stores may see their products' images" on public.product_images;
create policy "Who views stores may see their products' images" on public.product_images
  for select to authenticated using (organization_id = (select private.org_with('store.view')));
drop policy if exists "Who edits stores may add an image" on public.product_images;
create policy "Who edits stores may add an image" on public.product_images
  for insert to authenticated with check (organization_id = (select private.org_with('store.edit')));
drop policy if exists "Who edits stores may change an image" on public.product_images;
create policy "Who edits stores may change an image" on public.product_images
  for update to authenticated
  using (organization_id = (select private.org_with('store.edit')))
  with check (organization_id = (select private.org_with('store.edit')));
drop policy if exists "Who edits stores may delete an image" on public.product_images;
create policy "Who edits stores may delete an image" on public.product_images
  for delete to authenticated using (organization_id = (select private.org_with('store.edit')));
create or replace trigger update_modified_column before update on public.product_images
  for each row execute function private.update_modified_column();
comment on table public.product_images is 'Pictures of a product, in order of position.';


-- orders --------------------------------------------------------------------------------------------------------------------------

create table if not exists public.orders (
  id                    uuid primary key default gen_random_uuid(),
  organization_id       uuid not null default public.get_auth_org_id(),
  store_id              uuid not null,
  customer_id           uuid,
  external_id           text not null check (length(external_id) between 1 and 255),
  order_number          text,
  customer_email        text check (customer_email ~ '^[^@\s]+@[^@\s]+$'),
  customer_phone        text,
  customer_first_name   text,
  customer_last_name    text,
  customer_external_id  text,
  subtotal_price_minor  bigint not null check (subtotal_price_minor >= 0),
  total_tax_minor       bigint not null default 0 check (total_tax_minor >= 0),
  total_shipping_minor  bigint not null default 0 check (total_shipping_minor >= 0),
  total_discounts_minor bigint not null default 0 check (total_discounts_minor >= 0),
  total_price_minor     bigint not null check (total_price_minor >= 0),
  total_refunded_minor  bigint not null default 0 check (total_refunded_minor >= 0),
  currency_code         text not null check (currency_code ~ '^[A-Z]{3}$'),
  status                public.order_status not null default 'pending',
  payment_status        public.payment_status not null default 'pending',
  fulfillment_status    public.fulfillment_status not null default 'unfulfilled',
  is_standing           boolean not null generated always as (
    status not in ('cancelled', 'refunded', 'returned') and payment_status not in ('refunded', 'failed', 'cancelled')
  ) stored,
  shipping_address      jsonb,
  billing_address       jsonb,
  shipping_method       text,
  tracking_number       text,
  tracking_url          text check (tracking_url ~ '^https?://'),
  order_date            timestamptz not null,
  shipped_date          timestamptz,
  delivered_date        timestamptz,
  cancelled_date        timestamptz,
  platform_data         jsonb not null default '{}' check (jsonb_typeof(platform_data) = 'object'),
  customer_notes        text,
  internal_notes        text,
  source_updated_at     timestamptz,
  last_synced_at        timestamptz not null default private.clock_now(),
  sync_hash             text check (length(sync_hash) <= 64),
  created_at            timestamptz not null default private.clock_now(),
  updated_at            timestamptz not null default private.clock_now(),
  unique (organization_id, store_id, id),
  unique (organization_id, store_id, external_id),
  foreign key (organization_id, store_id) references public.stores (organization_id, id) on delete cascade,
  foreign key (organization_id, store_id, customer_id) references public.customers (organization_id, store_id, id)
    on delete set null (customer_id)
);
create index if not exists idx_orders_store_id on public.orders (organization_id, store_id, order_date desc);
create index if not exists idx_orders_customer_id on public.orders (organization_id, store_id, customer_id, order_date desc)
  where customer_id is not null;
create index if not exists idx_orders_customer_email on public.orders (organization_id, store_id, customer_email)
  where customer_email is not null;
create index if not exists idx_orders_customer_phone on public.orders (organization_id, store_id, customer_phone)
  where customer_phone is not null;
create index if not exists idx_orders_status on public.orders (organization_id, store_id, status);
create index if not exists idx_orders_payment_status on public.orders (organization_id, store_id, payment_status);
create index if not exists idx_orders_fulfillment_status on public.orders (organization_id, store_id, fulfillment_status);
create index if not exists idx_orders_order_date on public.orders (organization_id, order_date desc);
create index if not exists idx_orders_last_synced on public.orders (organization_id, store_id, last_synced_at);
create index if not exists idx_orders_customer_external_id on public.orders (organization_id, store_id, customer_external_id)
  where customer_external_id is not null;

revoke all on public.orders from anon, authenticated, service_role;
grant select on public.orders to authenticated, service_role;
grant
  insert (
    id, store_id, customer_id, external_id, order_number, customer_email, customer_phone, customer_first_name, customer_last_name,
    subtotal_price_minor, total_tax_minor, total_shipping_minor, total_discounts_minor, total_price_minor, currency_code, shipping_address,
    billing_address, shipping_method, order_date, customer_notes, internal_notes
  ),
  update (
    customer_id, customer_email, customer_phone, customer_first_name, customer_last_name, shipping_address, billing_address,
    shipping_method, tracking_number, tracking_url, customer_notes, internal_notes
  )
on public.orders to authenticated;
alter table public.orders enable row level security;
alter table public.orders force row level security;
drop policy if exists "Who views stores may see their orders" on public.orders;
create policy "Who views stores may see their orders" on public.orders
  for select to authenticated using (organization_id = (select private.org_with('store.view')));
drop policy if exists "Who edits stores may add an order" on public.orders;
create policy "Who edits stores may add an order" on public.orders
  for insert to authenticated with check (organization_id = (select private.org_with('store.edit')));
drop policy if exists "Who edits stores may change an order" on public.orders;
create policy "Who edits stores may change an order" on public.orders
  for update to authenticated
  using (organization_id = (select private.org_with('store.edit')))
  with check (organization_id = (select private.org_with('store.edit')));

-- What orders do to one customer's totals in one currency.
do $$
begin
  create type private.order_effect as (
    organization_id      uuid,
    store_id             uuid,
    customer_id          uuid,
    currency_code        text,
    orders               integer,
    total_spent_minor    bigint,
    lifetime_value_minor bigint
  );
exception when duplicate_object then null;
end
$$;
comment on type private.order_effect is
  'What the orders of a statement, taken in (+) and out (-), do to one customer''s totals in one currency.';

create or replace function private.apply_order_effects(effects private.order_effect[]) returns void
language plpgsql volatile security definer set search_path = '' as $$
begin
  -- One at a time for a customer, and everybody in the same order: what follows sees all that was committed before.
  perform
  from public.customers as customer
  where (customer.organization_id, customer.store_id, customer.id) in (
    select effect.organization_id, effect.store_id, effect.customer_id from unnest(effects) as effect
  )
  order by customer.id
  for no key update;

  insert into public.customer_totals as total (
    organization_id, store_id, customer_id, currency_code, total_orders, total_spent_minor, lifetime_value_minor
  )
  select
    effect.organization_id, effect.store_id, effect.customer_id, effect.currency_code,
    effect.orders + coalesce(present.total_orders, 0),
    effect.total_spent_minor + coalesce(present.total_spent_minor, 0),
    effect.lifetime_value_minor + coalesce(present.lifetime_value_minor, 0)
  from unnest(effects) as effect
  -- A customer who is being deleted has no totals any more.
  join public.customers as customer
    on customer.organization_id = effect.organization_id
    and customer.store_id = effect.store_id
    and customer.id = effect.customer_id
  left join public.customer_totals as present
    on present.organization_id = effect.organization_id
    and present.store_id = effect.store_id
    and present.customer_id = effect.customer_id
    and present.currency_code = effect.currency_code
  where (effect.orders, effect.total_spent_minor, effect.lifetime_value_minor) <> (0, 0, 0)
  on conflict (organization_id, store_id, customer_id, currency_code) do update
  set
    total_orders = excluded.total_orders,
    total_spent_minor = excluded.total_spent_minor,
    lifetime_value_minor = excluded.lifetime_value_minor;

  if exists (select from unnest(effects) as effect where effect.orders < 0) then
    delete from public.customer_totals as total
    where total.total_orders = 0
      and (total.organization_id, total.store_id, total.customer_id) in (
        select effect.organization_id, effect.store_id, effect.customer_id from unnest(effects) as effect
      );
  end if;

  update public.customers as customer
  set total_orders = customer.total_orders + change.orders, last_order_date = change.last_order_date
  from (
    select
      touched.organization_id, touched.store_id, touched.customer_id, touched.orders,
      (
        select max(purchase.order_date)
        from public.orders as purchase
        where purchase.organization_id = touched.organization_id
          and purchase.store_id = touched.store_id
          and purchase.customer_id = touched.customer_id
      ) as last_order_date
    from (
      select effect.organization_id, effect.store_id, effect.customer_id, sum(effect.orders)::integer as orders
      from unnest(effects) as effect
      group by effect.organization_id, effect.store_id, effect.customer_id
    ) as touched
  ) as change
  where customer.organization_id = change.organization_id
    and customer.store_id = change.store_id
    and customer.id = change.customer_id
    and (change.orders <> 0 or customer.last_order_date is distinct from change.last_order_date);
end
$$;
comment on function private.apply_order_effects(private.order_effect[]) is
  'Adds the effects of orders to their customers'' totals, the customers locked in order of id. The work grows with the orders that changed.';

create or replace function private.update_customer_lifetime_value() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  effects private.order_effect[];
begin
  -- Each branch sums up, for a customer and a currency, the orders that stand: as many, their price, their price less refunds.
  case tg_op
    when 'INSERT' then
      select
        array_agg(
          row(
            effect.organization_id, effect.store_id, effect.customer_id, effect.currency_code, effect.orders, effect.spent, effect.value
          )::private.order_effect
        )
      into effects
      from (
        select
          entry.organization_id, entry.store_id, entry.customer_id, entry.currency_code,
          count(*) filter (where entry.is_standing) as orders,
          coalesce(sum(entry.total_price_minor) filter (where entry.is_standing), 0) as spent,
          coalesce(sum(greatest(entry.total_price_minor - entry.total_refunded_minor, 0)) filter (where entry.is_standing), 0) as value
        from added as entry
        where entry.customer_id is not null
        group by entry.organization_id, entry.store_id, entry.customer_id, entry.currency_code
      ) as effect;
    when 'DELETE' then
      select
        array_agg(
          row(
            effect.organization_id, effect.store_id, effect.customer_id, effect.currency_code, -effect.orders, -effect.spent, -effect.value
          )::private.order_effect
        )
      into effects
      from (
        select
          entry.organization_id, entry.store_id, entry.customer_id, entry.currency_code,
          count(*) filter (where entry.is_standing) as orders,
          coalesce(sum(entry.total_price_minor) filter (where entry.is_standing), 0) as spent,
          coalesce(sum(greatest(entry.total_price_minor - entry.total_refunded_minor, 0)) filter (where entry.is_standing), 0) as value
        from removed as entry
        where entry.customer_id is not null
        group by entry.organization_id, entry.store_id, entry.customer_id, entry.currency_code
      ) as effect;
    else
      select
        array_agg(
          row(
            effect.organization_id, effect.store_id, effect.customer_id, effect.currency_code, effect.orders, effect.spent, effect.value
          )::private.order_effect
        )
      into effects
      from (
        select
          entry.organization_id, entry.store_id, entry.customer_id, entry.currency_code,
          coalesce(sum(entry.sign) filter (where entry.is_standing), 0) as orders,
          coalesce(sum(entry.sign * entry.total_price_minor) filter (where entry.is_standing), 0) as spent,
          coalesce(
            sum(entry.sign * greatest(entry.total_price_minor - entry.total_refunded_minor, 0)) filter (where entry.is_standing), 0
          ) as value
        from removed as before
        join added as after on after.id = before.id
        cross join lateral (
          values
            (
              -1, before.organization_id, before.store_id, before.customer_id, before.currency_code, before.is_standing,
              before.total_price_minor, before.total_refunded_minor
            ),
            (
              1, after.organization_id, after.store_id, after.customer_id, after.currency_code, after.is_standing,
              after.total_price_minor, after.total_refunded_minor
            )
        ) as entry (
          sign, organization_id, store_id, customer_id, currency_code, is_standing, total_price_minor, total_refunded_minor
        )
        -- Only what an order says to a total: a note or a tracking number locks nobody.
        where entry.customer_id is not null
          and (
            before.customer_id, before.currency_code, before.is_standing, before.total_price_minor, before.total_refunded_minor,
            before.order_date
          ) is distinct from (
            after.customer_id, after.currency_code, after.is_standing, after.total_price_minor, after.total_refunded_minor,
            after.order_date
          )
        group by entry.organization_id, entry.store_id, entry.customer_id, entry.currency_code
      ) as effect;
  end case;
  if effects is not null then
    perform private.apply_order_effects(effects);
  end if;
  return null;
end
$$;
comment on function private.update_customer_lifetime_value() is
  'Trigger: customer_totals, total_orders and last_order_date follow every order that comes, changes, moves to another customer or goes.';

create or replace trigger update_customer_ltv_trigger after insert on public.orders
  referencing new table as added
  for each statement execute function private.update_customer_lifetime_value();
create or replace trigger update_customer_ltv_on_update_trigger after update on public.orders
  referencing old table as removed new table as added
  for each statement execute function private.update_customer_lifetime_value();
create or replace trigger update_customer_ltv_on_delete_trigger after delete on public.orders
  referencing old table as removed
  for each statement execute function private.update_customer_lifetime_value();
create or replace trigger fill_store_currency before insert on public.orders
  for each row when (new.currency_code is null) execute function private.fill_store_currency();
create or replace trigger keep_newer_source before update of source_updated_at on public.orders
  for each row execute function private.keep_newer_source();
create or replace trigger update_modified_column before update on public.orders
  for each row execute function private.update_modified_column();
comment on table public.orders is 'What a customer ordered. Its three statuses are moved by functions alone, as the platform reports them.';
comment on column public.orders.external_id is 'The platform''s id, as text.';
comment on column public.orders.customer_phone is 'As the platform has it, E.164 or not.';
comment on column public.orders.total_price_minor is
  'What the customer pays, in the minor unit of currency_code, as every amount of this row.';
comment on column public.orders.total_refunded_minor is 'What was paid back of it so far.';
comment on column public.orders.is_standing is
  'Counts towards what its customer has spent: neither cancelled, returned nor refunded as a whole, and its payment did not fail.';
comment on column public.orders.currency_code is 'ISO 4217, upper case; the store''s when not given.';
comment on column public.orders.source_updated_at is 'The platform''s own timestamp of what this row says; an older one changes nothing.';

create or replace function private.recompute_customer_totals(organization uuid, store uuid) returns integer
language plpgsql volatile security definer set search_path = '' as $$
declare
  corrected integer;
begin
  -- Nobody orders meanwhile: an order waits for its customer.
  perform
  from public.customers as customer
  where customer.organization_id = organization and customer.store_id = store
  order by customer.id
  for no key update;

  with truth as (
    select
      purchase.customer_id, purchase.currency_code, count(*)::integer as total_orders,
      sum(purchase.total_price_minor)::bigint as total_spent_minor,
      sum(greatest(purchase.total_price_minor - purchase.total_refunded_minor, 0))::bigint as lifetime_value_minor
    from public.orders as purchase
    where purchase.organization_id = organization
      and purchase.store_id = store
      and purchase.customer_id is not null
      and purchase.is_standing
    group by purchase.customer_id, purchase.currency_code
  ),
  gone as (
    delete from public.customer_totals as total
    where total.organization_id = organization
      and total.store_id = store
      and not exists (
        select from truth where truth.customer_id = total.customer_id and truth.currency_code = total.currency_code
      )
    returning total.customer_id
  ),
  written as (
    insert into public.customer_totals as total (
      organization_id, store_id, customer_id, currency_code, total_orders, total_spent_minor, lifetime_value_minor
    )
    select
      organization, store, truth.customer_id, truth.currency_code, truth.total_orders, truth.total_spent_minor,
      truth.lifetime_value_minor
    from truth
    on conflict (organization_id, store_id, customer_id, currency_code) do update
    set
      total_orders = excluded.total_orders,
      total_spent_minor = excluded.total_spent_minor,
      lifetime_value_minor = excluded.lifetime_value_minor
    where (total.total_orders, total.total_spent_minor, total.lifetime_value_minor)
      is distinct from (excluded.total_orders, excluded.total_spent_minor, excluded.lifetime_value_minor)
    returning total.customer_id
  ),
  counted as (
    update public.customers as customer
    set total_orders = fact.total_orders, last_order_date = fact.last_order_date
    from (
      select
        known.id,
        count(purchase.id) filter (where purchase.is_standing)::integer as total_orders,
        max(purchase.order_date) as last_order_date
      from public.customers as known
      left join public.orders as purchase
        on purchase.organization_id = known.organization_id
        and purchase.store_id = known.store_id
        and purchase.customer_id = known.id
      where known.organization_id = organization and known.store_id = store
      group by known.id
    ) as fact
    where customer.id = fact.id
      and (customer.total_orders, customer.last_order_date) is distinct from (fact.total_orders, fact.last_order_date)
    returning customer.id
  )
  select count(*)::integer
  into corrected
  from (select gone.customer_id from gone union select written.customer_id from written union select counted.id from counted) as touched;
  return corrected;
end
$$;
comment on function private.recompute_customer_totals(uuid, uuid) is
  'Counts a store''s customers'' totals anew from its orders; returns how many customers were wrong, which should be none.';


-- order_line_items ----------------------------------------------------------------------------------------------------------------

create table if not exists public.order_line_items (
  id                  uuid primary key default gen_random_uuid(),
  organization_id     uuid not null default public.get_auth_org_id(),
  store_id            uuid not null,
  order_id            uuid not null,
  product_id          uuid,
  external_id         text check (length(external_id) between 1 and 255),
  external_product_id text,
  external_variant_id text,
  title               text not null check (length(title) between 1 and 500),
  variant_title       text,
  sku                 text,
  price_minor         bigint not null check (price_minor >= 0),
  quantity            integer not null check (quantity > 0),
  total_price_minor   bigint not null check (total_price_minor >= 0),
  properties          jsonb not null default '{}',
  fulfillment_status  public.fulfillment_status not null default 'unfulfilled',
  fulfilled_quantity  integer not null default 0,
  created_at          timestamptz not null default private.clock_now(),
  updated_at          timestamptz not null default private.clock_now(),
  unique (organization_id, store_id, id),
  unique (organization_id, store_id, order_id, external_id),
  foreign key (organization_id, store_id, order_id) references public.orders (organization_id, store_id, id) on delete cascade,
  foreign key (organization_id, store_id, product_id) references public.products (organization_id, store_id, id)
    on delete set null (product_id),
  check (fulfilled_quantity between 0 and quantity)
);
create index if not exists idx_order_line_items_product_id on public.order_line_items (organization_id, store_id, product_id)
  where product_id is not null;
create index if not exists idx_order_line_items_external_product_id
  on public.order_line_items (organization_id, store_id, external_product_id) where external_product_id is not null;
create index if not exists idx_order_line_items_sku on public.order_line_items (organization_id, store_id, sku) where sku is not null;

revoke all on public.order_line_items from anon, authenticated, service_role;
grant select on public.order_line_items to authenticated, service_role;
grant
  insert (
    store_id, order_id, product_id, external_id, external_product_id, external_variant_id, title, variant_title, sku, price_minor, quantity,
    total_price_minor, properties
  ),
  update (product_id, title, variant_title, sku, properties)
on public.order_line_items to authenticated;
alter table public.order_line_items enable row level security;
alter table public.order_line_items force row level security;
drop policy if exists "Who views stores may see their orders' lines" on public.order_line_items;
create policy "Who views stores may see their orders' lines" on public.order_line_items
  for select to authenticated using (organization_id = (select private.org_with('store.view')));
drop policy if exists "Who edits stores may add a line" on public.order_line_items;
create policy "Who edits stores may add a line" on public.order_line_items
  for insert to authenticated with check (organization_id = (select private.org_with('store.edit')));
drop policy if exists "Who edits stores may describe a line" on public.order_line_items;
create policy "Who edits stores may describe a line" on public.order_line_items
  for update to authenticated
  using (organization_id = (select private.org_with('store.edit')))
  with check (organization_id = (select private.org_with('store.edit')));
create or replace trigger update_modified_column before update on public.order_line_items
  for each row execute function private.update_modified_column();
comment on table public.order_line_items is
  'The lines of an order, in its currency. A line that the platform names is one row, however often it is sent.';
comment on column public.order_line_items.external_id is
  'The platform''s id of the line; what an upsert names in on_conflict, with the order.';
comment on column public.order_line_items.price_minor is 'Of one, in the minor unit of the order''s currency_code.';
comment on column public.order_line_items.total_price_minor is 'Of the line, discounts taken off.';

revoke execute on function
  private.fill_store_currency(), private.apply_order_effects(private.order_effect[]), private.update_customer_lifetime_value(),
  private.recompute_customer_totals(uuid, uuid)
from public;


-- store_tombstones ----------------------------------------------------------------------------------------------------------------

create table if not exists private.store_tombstones (
  organization_id uuid not null,
  store_id        uuid not null,
  kind            text not null check (kind in ('product', 'order', 'customer')),
  external_id     text not null check (length(external_id) between 1 and 255),
  is_redacted     boolean not null default false,
  deleted_at      timestamptz not null,
  primary key (organization_id, store_id, kind, external_id),
  foreign key (organization_id, store_id) references public.stores (organization_id, id) on delete cascade
);
select private.close_table('private.store_tombstones');
comment on table private.store_tombstones is
  'What a platform deleted: an event that is older than the deletion and comes after it brings nothing back.';
comment on column private.store_tombstones.is_redacted is 'A customer who asked to be forgotten: their orders come without them.';


-- privacy_requests ----------------------------------------------------------------------------------------------------------------

create table if not exists public.privacy_requests (
  id                   uuid primary key default gen_random_uuid(),
  organization_id      uuid not null,
  store_id             uuid not null,
  kind                 text not null check (kind in ('data_request', 'customer_redact', 'shop_redact')),
  external_id          text check (length(external_id) <= 255),
  customer_id          uuid,
  customer_external_id text,
  order_external_ids   text[] not null default '{}',
  requested_at         timestamptz not null,
  due_at               timestamptz not null,
  completed_at         timestamptz,
  created_at           timestamptz not null default private.clock_now(),
  updated_at           timestamptz not null default private.clock_now(),
  unique (organization_id, store_id, id),
  foreign key (organization_id, store_id) references public.stores (organization_id, id) on delete cascade,
  foreign key (organization_id, store_id, customer_id) references public.customers (organization_id, store_id, id)
    on delete set null (customer_id),
  check (due_at > requested_at),
  -- Who was forgotten is not named by the record of it.
  check (completed_at is null or customer_external_id is null and order_external_ids = '{}')
);
create index if not exists idx_privacy_requests_store on public.privacy_requests (organization_id, store_id, requested_at desc);
create index if not exists idx_privacy_requests_customer on public.privacy_requests (organization_id, store_id, customer_id)
  where customer_id is not null;

revoke all on public.privacy_requests from anon, authenticated, service_role;
grant select on public.privacy_requests to authenticated, service_role;
alter table public.privacy_requests enable row level security;
alter table public.privacy_requests force row level security;
drop policy if exists "Who views stores may see what people asked of them" on public.privacy_requests;
create policy "Who views stores may see what people asked of them" on public.privacy_requests
  for select to authenticated using (organization_id = (select private.org_with('store.view')));
create or replace trigger update_modified_column before update on public.privacy_requests
  for each row execute function private.update_modified_column();
comment on table public.privacy_requests is
  'What people and shops asked about their data: to be given it, or to be forgotten. The latter is done at once, the former by a person.';
comment on column public.privacy_requests.external_id is 'The platform''s id of the request.';
comment on column public.privacy_requests.due_at is 'Thirty days after it was asked, which is what the platforms allow.';
-- 03_calls_and_conversations.sql

-- What is said between a store and its customers: conversations, their messages, calls, and the analytics of calls.
-- May run twice: everything is created if it is not there, or replaced.
--
-- Whoever changes several of these rows locks them in this order, and within one table by id: stores, call_logs, calls, conversations,
-- customers.


-- conversations -------------------------------------------------------------------------------------------------------------------

create table if not exists public.conversations (
  id                      uuid primary key default gen_random_uuid(),
  organization_id         uuid not null default public.get_auth_org_id(),
  store_id                uuid not null,
  conversation_key        text not null check (length(conversation_key) between 1 and 255),
  order_id                uuid,
  customer_id             uuid,
  channel                 public.conversation_channel not null,
  status                  public.conversation_status not null default 'active',
  customer_identifier     text check (length(customer_identifier) <= 255),
  customer_name           text,
  start_time              timestamptz not null default private.clock_now(),
  end_time                timestamptz,
  last_activity_at        timestamptz not null default private.clock_now(),
  title                   text check (length(title) <= 500),
  summary                 text,
  primary_intent          text,
  resolution_status       text,
  ai_context              jsonb not null default '{}' check (jsonb_typeof(ai_context) = 'object'),
  conversation_history    jsonb not null default '[]' check (jsonb_typeof(conversation_history) in ('array', 'object')),
  sentiment_score         numeric(3, 2) check (sentiment_score between -1 and 1),
  satisfaction_rating     smallint check (satisfaction_rating between 1 and 5),
  escalated_to_human      boolean not null default false,
  resolution_time_seconds integer check (resolution_time_seconds >= 0),
  assigned_agent_id       uuid,
  escalation_reason       text,
  tags                    text[] not null default '{}',
  priority_level          smallint not null default 1 check (priority_level between 1 and 5),
  platform_data           jsonb not null default '{}' check (jsonb_typeof(platform_data) = 'object'),
  created_at              timestamptz not null default private.clock_now(),
  updated_at              timestamptz not null default private.clock_now(),
  unique (organization_id, store_id, id),
  unique (organization_id, store_id, conversation_key),
  foreign key (organization_id, store_id) references public.stores (organization_id, id) on delete cascade,
  foreign key (organization_id, store_id, order_id) references public.orders (organization_id, store_id, id)
    on delete set null (order_id),
  foreign key (organization_id, store_id, customer_id) references public.customers (organization_id, store_id, id)
    on delete set null (customer_id),
  foreign key (organization_id, assigned_agent_id) references public.profiles (organization_id, id) on delete set null (assigned_agent_id),
  check (end_time >= start_time),
  check ((end_time is not null) = (status in ('completed', 'resolved', 'abandoned')))
) with (fillfactor = 80);
create index if not exists idx_conversations_store_id on public.conversations (organization_id, store_id, start_time desc);
create index if not exists idx_conversations_order_id on public.conversations (organization_id, store_id, order_id)
  where order_id is not null;
create index if not exists idx_conversations_customer_id on public.conversations (organization_id, store_id, customer_id)
  where customer_id is not null;
create index if not exists idx_conversations_assigned_agent on public.conversations (organization_id, assigned_agent_id)
  where assigned_agent_id is not null;
create index if not exists idx_conversations_channel on public.conversations (organization_id, store_id, channel);
create index if not exists idx_conversations_status on public.conversations (organization_id, store_id, status);
create index if not exists idx_conversations_start_time on public.conversations (organization_id, start_time desc);
create index if not exists idx_conversations_last_activity on public.conversations (last_activity_at) where status = 'active';
create index if not exists idx_conversations_customer_identifier
  on public.conversations (organization_id, store_id, customer_identifier) where customer_identifier is not null;
create index if not exists idx_conversations_tags on public.conversations using gin (tags);

revoke all on public.conversations from anon, authenticated, service_role;
grant select on public.conversations to authenticated, service_role;
grant update (
  order_id, customer_id, customer_name, title, summary, primary_intent, resolution_status, satisfaction_rating, assigned_agent_id, tags,
  priority_level
) on public.conversations to authenticated;
alter table public.conversations enable row level security;
alter table public.conversations force row level security;
drop policy if exists "Who views stores may see their conversations" on public.conversations;
create policy "Who views stores may see their conversations" on public.conversations
  for select to authenticated using (organization_id = (select private.org_with('store.view')));
drop policy if exists "Who edits stores may describe and assign a conversation" on public.conversations;
create policy "Who edits stores may describe and assign a conversation" on public.conversations
  for update to authenticated
  using (organization_id = (select private.org_with('store.edit')))
  with check (organization_id = (select private.org_with('store.edit')));

create or replace function private.calculate_resolution_time() returns trigger
language plpgsql set search_path = '' as $$
begin
  if new.status in ('completed', 'resolved', 'abandoned') then
    new.end_time := coalesce(new.end_time, greatest(private.clock_now(), new.start_time));
  elsif tg_op = 'UPDATE' and old.status in ('completed', 'resolved', 'abandoned') then
    -- Opened again: it has not ended.
    new.end_time := null;
  end if;
  new.resolution_time_seconds := case
    when new.status in ('completed', 'resolved') then floor(extract(epoch from new.end_time - new.start_time))::integer
  end;
  new.escalated_to_human := new.escalated_to_human or new.status = 'escalated';
  return new;
end
$$;
comment on function private.calculate_resolution_time() is
  'Trigger: a conversation that is over has an end, one that was resolved or completed has the seconds it took; also when corrected.';
create or replace trigger calculate_resolution_time_trigger
  before insert or update of status, start_time, end_time, resolution_time_seconds on public.conversations
  for each row execute function private.calculate_resolution_time();
create or replace function private.note_customer_contact() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  update public.customers as customer
  set last_contact_date = least(new.start_time, private.clock_now())
  where customer.organization_id = new.organization_id
    and customer.store_id = new.store_id
    and customer.id = new.customer_id
    and (customer.last_contact_date is null or customer.last_contact_date < least(new.start_time, private.clock_now()));
  return null;
end
$$;
comment on function private.note_customer_contact() is
  'Trigger: a customer''s last contact is the start of their latest call or conversation, in whatever order these become known.';
create or replace trigger note_customer_contact after insert or update of customer_id on public.conversations
  for each row when (new.customer_id is not null) execute function private.note_customer_contact();
create or replace trigger update_modified_column before update on public.conversations
  for each row execute function private.update_modified_column();
comment on table public.conversations is
  'One exchange with one customer on one channel. Its status and its times are moved by functions and triggers; users describe and assign it.';
comment on column public.conversations.conversation_key is 'The name that the channel gives it; once a store.';
comment on column public.conversations.customer_identifier is 'Who speaks, as the channel knows them: a number, an address, or anonymous.';
comment on column public.conversations.last_activity_at is
  'The latest message''s time. It never moves back, whatever order messages come in, and never into the future.';
comment on column public.conversations.end_time is
  'Set exactly when the status is completed, resolved or abandoned. A message that comes later does not move it.';
comment on column public.conversations.escalated_to_human is 'A person was called for at some time; stays true.';
comment on column public.conversations.priority_level is '1 lowest, 5 highest.';


-- conversation_messages -----------------------------------------------------------------------------------------------------------

create table if not exists public.conversation_messages (
  id                  uuid primary key default gen_random_uuid(),
  organization_id     uuid not null default public.get_auth_org_id(),
  store_id            uuid not null,
  conversation_id     uuid not null,
  message_index       integer not null check (message_index >= 0),
  external_message_id text,
  role                public.message_role not null,
  type                public.message_type not null default 'text',
  content             text not null check (content ~ '\S'),
  content_type        text not null default 'text/plain',
  attachments         jsonb not null default '[]' check (jsonb_typeof(attachments) = 'array'),
  ai_model            text,
  ai_prompt           text,
  ai_metadata         jsonb not null default '{}' check (jsonb_typeof(ai_metadata) = 'object'),
  processed_at        timestamptz,
  processing_time_ms  integer check (processing_time_ms >= 0),
  intent              text,
  entities            jsonb,
  sentiment_score     numeric(3, 2) check (sentiment_score between -1 and 1),
  platform_data       jsonb not null default '{}' check (jsonb_typeof(platform_data) = 'object'),
  timestamp           timestamptz not null default private.clock_now(),
  created_at          timestamptz not null default private.clock_now(),
  updated_at          timestamptz not null default private.clock_now(),
  unique (organization_id, store_id, id),
  unique (organization_id, conversation_id, message_index),
  unique (organization_id, store_id, conversation_id, external_message_id),
  foreign key (organization_id, store_id, conversation_id) references public.conversations (organization_id, store_id, id)
    on delete cascade
);
create index if not exists idx_messages_timestamp on public.conversation_messages (organization_id, store_id, timestamp desc);
create index if not exists idx_messages_role on public.conversation_messages (organization_id, store_id, timestamp desc)
  where role = 'human_agent';
create index if not exists idx_messages_type on public.conversation_messages (organization_id, store_id, type, timestamp desc)
  where type <> 'text';

revoke all on public.conversation_messages from anon, authenticated, service_role;
grant select on public.conversation_messages to authenticated, service_role;
alter table public.conversation_messages enable row level security;
alter table public.conversation_messages force row level security;
drop policy if exists "Who views stores may see what was said" on public.conversation_messages;
create policy "Who views stores may see what was said" on public.conversation_messages
  for select to authenticated using (organization_id = (select private.org_with('store.view')));

create or replace function private.number_message() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  perform
  from public.conversations as conversation
  where conversation.organization_id = new.organization_id
    and conversation.store_id = new.store_id
    and conversation.id = new.conversation_id
  for no key update;
  new.message_index := (
    select coalesce(max(message.message_index) + 1, 0)
    from public.conversation_messages as message
    where message.organization_id = new.organization_id
      and message.store_id = new.store_id
      and message.conversation_id = new.conversation_id
  );
  return new;
end
$$;
comment on function private.number_message() is 'Trigger: a message that comes without a number gets its conversation''s next one.';
create or replace trigger number_message before insert on public.conversation_messages
  for each row when (new.message_index is null) execute function private.number_message();

create or replace function private.update_conversation_activity() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  perform
  from public.conversations as conversation
  where (conversation.organization_id, conversation.store_id, conversation.id) in (
    select message.organization_id, message.store_id, message.conversation_id from added as message
  )
  order by conversation.id
  for no key update;

  -- Late, early or reordered, a message is taken in; only a later one moves the time, and a clock ahead of ours not beyond now.
  update public.conversations as conversation
  set last_activity_at = latest.at
  from (
    select
      message.organization_id, message.store_id, message.conversation_id,
      least(max(message.timestamp), private.clock_now()) as at
    from added as message
    group by message.organization_id, message.store_id, message.conversation_id
  ) as latest
  where conversation.organization_id = latest.organization_id
    and conversation.store_id = latest.store_id
    and conversation.id = latest.conversation_id
    and conversation.last_activity_at < latest.at;
  return null;
end
$$;
comment on function private.update_conversation_activity() is 'Trigger: a conversation was last active when its latest message was said.';
create or replace trigger update_conversation_activity_trigger after insert on public.conversation_messages
  referencing new table as added
  for each statement execute function private.update_conversation_activity();
create or replace trigger update_modified_column before update on public.conversation_messages
  for each row execute function private.update_modified_column();
comment on table public.conversation_messages is 'What was said, in order of message_index. Written by functions alone.';
comment on column public.conversation_messages.message_index is 'From 0; the next one when not given.';
comment on column public.conversation_messages.external_message_id is 'The channel''s own id: the same message twice is one.';
comment on column public.conversation_messages.timestamp is 'When it was said, as the channel says; created_at is when we heard of it.';


-- calls ---------------------------------------------------------------------------------------------------------------------------

create or replace function private.to_call_status(attempt public.attempt_status, outcome public.call_outcome)
returns public.call_status
language sql immutable parallel safe set search_path = '' as $$
  select case
    when attempt = 'ringing' then 'ringing'::public.call_status
    when attempt = 'in_progress' then 'answered'::public.call_status
    when attempt <> 'ended' then 'initiated'::public.call_status
    else case outcome
      when 'answered' then 'completed'::public.call_status
      when 'machine' then 'completed'::public.call_status
      when 'busy' then 'busy'::public.call_status
      when 'rejected' then 'busy'::public.call_status
      when 'no_answer' then 'no_answer'::public.call_status
      when 'cancelled' then 'cancelled'::public.call_status
      when 'expired' then 'cancelled'::public.call_status
      -- invalid_number, capacity, carrier_transient, spam_blocked, our_fault, config, lost, failed
      else 'failed'::public.call_status
    end
  end
$$;
comment on function private.to_call_status(public.attempt_status, public.call_outcome) is
  'A leg''s state in the words of a store''s call: the one mapping, of every state and every outcome.';
revoke execute on function private.to_call_status(public.attempt_status, public.call_outcome) from public;
-- A user who changes a note of a call computes its generated status anew.
grant execute on function private.to_call_status(public.attempt_status, public.call_outcome) to authenticated;

create or replace function private.to_call_party(number text) returns text
language sql immutable parallel safe set search_path = '' as $$
  select case when number ~ '^\+[1-9][0-9]{1,14}$' then number else 'anonymous' end
$$;
comment on function private.to_call_party(text) is
  'A number as a store''s call takes it: E.164, else anonymous. What the carrier said stays in the leg.';
revoke execute on function private.to_call_party(text) from public;

create table if not exists public.calls (
  id                    uuid primary key default gen_random_uuid(),
  organization_id       uuid not null default public.get_auth_org_id(),
  store_id              uuid not null,
  call_log_id           uuid,
  conversation_id       uuid,
  order_id              uuid,
  customer_id           uuid,
  twilio_call_sid       text check (length(twilio_call_sid) between 1 and 100),
  call_id               text check (length(call_id) between 1 and 100),
  from_phone            text not null check (from_phone ~ '^\+[1-9][0-9]{1,14}$' or from_phone = 'anonymous'),
  to_phone              text not null check (to_phone ~ '^\+[1-9][0-9]{1,14}$' or to_phone = 'anonymous'),
  direction             public.call_direction not null,
  attempt_status        public.attempt_status not null default 'initiated',
  call_outcome          public.call_outcome,
  status                public.call_status not null
    generated always as (private.to_call_status(attempt_status, call_outcome)) stored,
  start_time            timestamptz not null,
  answered_at           timestamptz,
  end_time              timestamptz,
  duration_seconds      integer check (duration_seconds >= 0),
  recording_url         text,
  recording_sid         text,
  transcript            text,
  transcript_confidence numeric(3, 2) check (transcript_confidence between 0 and 1),
  ai_summary            text,
  intent_detected       text,
  sentiment_score       numeric(3, 2) check (sentiment_score between -1 and 1),
  satisfaction_rating   smallint check (satisfaction_rating between 1 and 5),
  quality_score         numeric(3, 2) check (quality_score between 0 and 1),
  dropped_call          boolean not null default false,
  twilio_data           jsonb not null default '{}' check (jsonb_typeof(twilio_data) = 'object'),
  ai_context            jsonb not null default '{}' check (jsonb_typeof(ai_context) = 'object'),
  created_at            timestamptz not null default private.clock_now(),
  updated_at            timestamptz not null default private.clock_now(),
  unique (organization_id, store_id, id),
  unique (organization_id, call_log_id),
  unique (organization_id, twilio_call_sid),
  unique (organization_id, call_id),
  foreign key (organization_id, store_id) references public.stores (organization_id, id) on delete cascade,
  foreign key (organization_id, store_id, conversation_id) references public.conversations (organization_id, store_id, id)
    on delete set null (conversation_id),
  foreign key (organization_id, store_id, order_id) references public.orders (organization_id, store_id, id)
    on delete set null (order_id),
  foreign key (organization_id, store_id, customer_id) references public.customers (organization_id, store_id, id)
    on delete set null (customer_id),
  check (end_time >= start_time),
  check ((attempt_status = 'ended') = (call_outcome is not null)),
  check ((attempt_status = 'ended') = (end_time is not null))
) with (fillfactor = 80);
create index if not exists idx_calls_store_id on public.calls (organization_id, store_id, start_time desc);
create index if not exists idx_calls_conversation_id on public.calls (organization_id, store_id, conversation_id)
  where conversation_id is not null;
create index if not exists idx_calls_order_id on public.calls (organization_id, store_id, order_id) where order_id is not null;
create index if not exists idx_calls_customer_id on public.calls (organization_id, store_id, customer_id) where customer_id is not null;
create index if not exists idx_calls_direction on public.calls (organization_id, store_id, direction, start_time desc);
create index if not exists idx_calls_status on public.calls (organization_id, store_id, status);
create index if not exists idx_calls_start_time on public.calls (organization_id, start_time desc);
create index if not exists idx_calls_phone_numbers on public.calls (organization_id, from_phone, to_phone);

revoke all on public.calls from anon, authenticated, service_role;
grant select on public.calls to authenticated, service_role;
grant update (order_id, customer_id, satisfaction_rating) on public.calls to authenticated;
alter table public.calls enable row level security;
alter table public.calls force row level security;
drop policy if exists "Who views stores and calls may see their calls" on public.calls;
create policy "Who views stores and calls may see their calls" on public.calls
  for select to authenticated
  using (
    organization_id = (select private.org_with('store.view')) and organization_id = (select private.org_with('call.view'))
  );
drop policy if exists "Who edits stores may file and rate a call" on public.calls;
create policy "Who edits stores may file and rate a call" on public.calls
  for update to authenticated
  using (organization_id = (select private.org_with('store.edit')))
  with check (organization_id = (select private.org_with('store.edit')));

create or replace function private.calculate_call_duration() returns trigger
language plpgsql set search_path = '' as $$
begin
  new.duration_seconds := floor(extract(epoch from new.end_time - new.start_time))::integer;
  return new;
end
$$;
comment on function private.calculate_call_duration() is
  'Trigger: a call''s duration is its end less its start, whenever either is written, and nothing else.';
create or replace trigger calculate_call_duration_trigger
  before insert or update of start_time, end_time, duration_seconds on public.calls
  for each row execute function private.calculate_call_duration();

create or replace function private.check_call_status() returns trigger
language plpgsql set search_path = '' as $$
begin
  raise exception 'call % is %, it does not go back to %', old.id, old.attempt_status, new.attempt_status using errcode = 'check_violation';
end
$$;
comment on function private.check_call_status() is 'Trigger: a call moves only forward.';
create or replace trigger check_call_status before update of attempt_status on public.calls
  for each row when (new.attempt_status < old.attempt_status) execute function private.check_call_status();
create or replace trigger note_customer_contact after insert or update of customer_id on public.calls
  for each row when (new.customer_id is not null) execute function private.note_customer_contact();
create or replace trigger update_modified_column before update on public.calls
  for each row execute function private.update_modified_column();
comment on table public.calls is
  'A store''s view of a leg of call_logs: whom it was with and what came of it. The leg alone is metered, and says what happened.';
comment on column public.calls.call_log_id is 'The leg. Null once its row has gone to an archive.';
comment on column public.calls.twilio_call_sid is 'The carrier''s id of the call, whichever carrier; the leg''s call_sid.';
comment on column public.calls.call_id is 'The voice agent''s id of the call.';
comment on column public.calls.from_phone is 'E.164, or anonymous when the caller withheld it.';
comment on column public.calls.attempt_status is 'The leg''s status; moves only forward.';
comment on column public.calls.call_outcome is
  'How the leg ended; null until it has. A leg that was taken for lost may still get a better one.';
comment on column public.calls.status is 'Derived from the two by private.to_call_status(); nobody writes it.';
comment on column public.calls.duration_seconds is 'From start_time to end_time.';
comment on column public.calls.dropped_call is 'It was answered and broke off: neither side meant to end it.';
comment on column public.calls.twilio_data is 'What the carrier said beyond the columns.';


-- call_analytics ------------------------------------------------------------------------------------------------------------------

create table if not exists public.call_analytics (
  id                          uuid primary key default gen_random_uuid(),
  organization_id             uuid not null,
  store_id                    uuid not null,
  date_period                 date not null,
  hour_period                 smallint check (hour_period between 0 and 23),
  total_calls                 integer not null default 0 check (total_calls >= 0),
  inbound_calls               integer not null default 0 check (inbound_calls >= 0),
  outbound_calls              integer not null default 0 check (outbound_calls >= 0),
  answered_calls              integer not null default 0 check (answered_calls >= 0),
  missed_calls                integer not null default 0 check (missed_calls >= 0),
  dropped_calls               integer not null default 0 check (dropped_calls >= 0),
  average_call_duration       numeric(10, 2) check (average_call_duration >= 0),
  average_quality_score       numeric(3, 2) check (average_quality_score between 0 and 1),
  average_satisfaction_rating numeric(3, 2) check (average_satisfaction_rating between 1 and 5),
  ai_resolution_rate          numeric(5, 2) check (ai_resolution_rate between 0 and 100),
  human_escalation_rate       numeric(5, 2) check (human_escalation_rate between 0 and 100),
  average_response_time_ms    integer check (average_response_time_ms >= 0),
  top_intents                 jsonb not null default '[]' check (jsonb_typeof(top_intents) = 'array'),
  resolution_categories       jsonb not null default '{}' check (jsonb_typeof(resolution_categories) = 'object'),
  created_at                  timestamptz not null default private.clock_now(),
  updated_at                  timestamptz not null default private.clock_now(),
  unique (organization_id, store_id, id),
  -- The day as a whole has no hour, and is one row all the same.
  unique nulls not distinct (organization_id, store_id, date_period, hour_period),
  foreign key (organization_id, store_id) references public.stores (organization_id, id) on delete cascade,
  check (inbound_calls + outbound_calls = total_calls),
  check (answered_calls + missed_calls <= total_calls),
  check (dropped_calls <= total_calls)
);
create index if not exists idx_call_analytics_date on public.call_analytics (organization_id, date_period desc);

revoke all on public.call_analytics from anon, authenticated, service_role;
grant select on public.call_analytics to authenticated, service_role;
alter table public.call_analytics enable row level security;
alter table public.call_analytics force row level security;
drop policy if exists "Who views stores may see their analytics" on public.call_analytics;
create policy "Who views stores may see their analytics" on public.call_analytics
  for select to authenticated using (organization_id = (select private.org_with('store.view')));
create or replace trigger update_modified_column before update on public.call_analytics
  for each row execute function private.update_modified_column();
comment on table public.call_analytics is
  'A store''s calls by day and hour of its own time zone, written by roll_up_call_analytics() alone and always computable again.';
comment on column public.call_analytics.hour_period is 'The hour from which on, 0 to 23; null is the whole day.';
comment on column public.call_analytics.missed_calls is
  'Ended without an answer. A call still under way is neither answered nor missed until it is.';
comment on column public.call_analytics.average_call_duration is 'Seconds, of answered calls that have ended.';
comment on column public.call_analytics.ai_resolution_rate is
  'Of the calls'' conversations that are over, percent that no person was called for.';
comment on column public.call_analytics.human_escalation_rate is 'Of the calls'' conversations, percent that a person was called for.';
comment on column public.call_analytics.average_response_time_ms is 'Of the agent''s messages in the calls'' conversations.';
comment on column public.call_analytics.top_intents is '[{"intent","calls"}], the ten most frequent, most frequent first.';
comment on column public.call_analytics.resolution_categories is 'Conversations by resolution_status.';

create or replace function private.roll_up_call_analytics(store uuid, day date) returns integer
language plpgsql volatile security definer set search_path = '' as $$
declare
  subject public.stores;
  written integer;
begin
  -- One roll-up of a store at a time, so that the one that looked last is the one that stands.
  select shop.* into subject from public.stores as shop where shop.id = store for no key update;
  if subject.id is null then
    return 0;
  end if;

  with fact as materialized (
    select
      call.id, extract(hour from call.start_time at time zone subject.timezone)::smallint as hour_of_day,
      call.direction, call.attempt_status = 'ended' as ended,
      call.answered_at is not null or call.status in ('answered', 'completed') as answered,
      call.duration_seconds, call.dropped_call, call.quality_score, call.satisfaction_rating, call.intent_detected, call.conversation_id
    from public.calls as call
    where call.organization_id = subject.organization_id
      and call.store_id = subject.id
      and call.start_time >= day::timestamp at time zone subject.timezone
      and call.start_time < (day + 1)::timestamp at time zone subject.timezone
  ),
  -- Every call is in its hour and in its day.
  entry as materialized (
    select fact.*, slot.hour_period
    from fact
    cross join lateral (values (fact.hour_of_day), (null)) as slot (hour_period)
  ),
  counted as (
    select
      entry.hour_period,
      count(*)::integer as total_calls,
      (count(*) filter (where entry.direction = 'inbound'))::integer as inbound_calls,
      (count(*) filter (where entry.direction = 'outbound'))::integer as outbound_calls,
      (count(*) filter (where entry.answered))::integer as answered_calls,
      (count(*) filter (where entry.ended and not entry.answered))::integer as missed_calls,
      (count(*) filter (where entry.dropped_call))::integer as dropped_calls,
      round(avg(entry.duration_seconds) filter (where entry.ended and entry.answered), 2) as average_call_duration,
      round(avg(entry.quality_score), 2) as average_quality_score,
      round(avg(entry.satisfaction_rating), 2) as average_satisfaction_rating
    from entry
    group by entry.hour_period
  ),
  talk as materialized (
    select distinct entry.hour_period, conversation.id, conversation.status, conversation.escalated_to_human, conversation.resolution_status
    from entry
    join public.conversations as conversation
      on conversation.organization_id = subject.organization_id
      and conversation.store_id = subject.id
      and conversation.id = entry.conversation_id
  ),
  resolved as (
    select
      talk.hour_period,
      round(
        100.0 * count(*) filter (where talk.status in ('completed', 'resolved') and not talk.escalated_to_human)
          / nullif(count(*) filter (where talk.status in ('completed', 'resolved', 'abandoned')), 0),
        2
      ) as ai_resolution_rate,
      round(100.0 * count(*) filter (where talk.escalated_to_human) / count(*), 2) as human_escalation_rate
    from talk
    group by talk.hour_period
  ),
  category as (
    select grouped.hour_period, jsonb_object_agg(grouped.resolution_status, grouped.conversations) as resolution_categories
    from (
      select talk.hour_period, talk.resolution_status, count(*) as conversations
      from talk
      where talk.resolution_status is not null
      group by talk.hour_period, talk.resolution_status
    ) as grouped
    group by grouped.hour_period
  ),
  reply as (
    select talk.hour_period, round(avg(message.processing_time_ms))::integer as average_response_time_ms
    from talk
    join public.conversation_messages as message
      on message.organization_id = subject.organization_id
      and message.store_id = subject.id
      and message.conversation_id = talk.id
    where message.role = 'ai_assistant'
    group by talk.hour_period
  ),
  intent as (
    select
      ranked.hour_period,
      jsonb_agg(jsonb_build_object('intent', ranked.intent, 'calls', ranked.calls) order by ranked.calls desc, ranked.intent) as top_intents
    from (
      select
        entry.hour_period, entry.intent_detected as intent, count(*) as calls,
        row_number() over (partition by entry.hour_period order by count(*) desc, entry.intent_detected) as place
      from entry
      where entry.intent_detected is not null
      group by entry.hour_period, entry.intent_detected
    ) as ranked
    where ranked.place <= 10
    group by ranked.hour_period
  ),
  gone as (
    delete from public.call_analytics as old
    where old.organization_id = subject.organization_id
      and old.store_id = subject.id
      and old.date_period = day
      and not exists (select from counted where counted.hour_period is not distinct from old.hour_period)
    returning old.id
  ),
  saved as (
    insert into public.call_analytics as current (
      organization_id, store_id, date_period, hour_period, total_calls, inbound_calls, outbound_calls, answered_calls, missed_calls,
      dropped_calls, average_call_duration, average_quality_score, average_satisfaction_rating, ai_resolution_rate,
      human_escalation_rate, average_response_time_ms, top_intents, resolution_categories
    )
    select
      subject.organization_id, subject.id, day, counted.hour_period, counted.total_calls, counted.inbound_calls,
      counted.outbound_calls, counted.answered_calls, counted.missed_calls, counted.dropped_calls, counted.average_call_duration,
      counted.average_quality_score, counted.average_satisfaction_rating, resolved.ai_resolution_rate,
      resolved.human_escalation_rate, reply.average_response_time_ms, coalesce(intent.top_intents, '[]'),
      coalesce(category.resolution_categories, '{}')
    from counted
    left join resolved on resolved.hour_period is not distinct from counted.hour_period
    left join category on category.hour_period is not distinct from counted.hour_period
    left join reply on reply.hour_period is not distinct from counted.hour_period
    left join intent on intent.hour_period is not distinct from counted.hour_period
    on conflict (organization_id, store_id, date_period, hour_period) do update
    set
      total_calls = excluded.total_calls, inbound_calls = excluded.inbound_calls, outbound_calls = excluded.outbound_calls,
      answered_calls = excluded.answered_calls, missed_calls = excluded.missed_calls, dropped_calls = excluded.dropped_calls,
      average_call_duration = excluded.average_call_duration, average_quality_score = excluded.average_quality_score,
      average_satisfaction_rating = excluded.average_satisfaction_rating, ai_resolution_rate = excluded.ai_resolution_rate,
      human_escalation_rate = excluded.human_escalation_rate, average_response_time_ms = excluded.average_response_time_ms,
      top_intents = excluded.top_intents, resolution_categories = excluded.resolution_categories
    where (
      current.total_calls, current.inbound_calls, current.outbound_calls, current.answered_calls, current.missed_calls,
      current.dropped_calls, current.average_call_duration, current.average_quality_score, current.average_satisfaction_rating,
      current.ai_resolution_rate, current.human_escalation_rate, current.average_response_time_ms, current.top_intents,
      current.resolution_categories
    ) is distinct from (
      excluded.total_calls, excluded.inbound_calls, excluded.outbound_calls, excluded.answered_calls, excluded.missed_calls,
      excluded.dropped_calls, excluded.average_call_duration, excluded.average_quality_score, excluded.average_satisfaction_rating,
      excluded.ai_resolution_rate, excluded.human_escalation_rate, excluded.average_response_time_ms, excluded.top_intents,
      excluded.resolution_categories
    )
    returning current.id
  )
  select ((select count(*) from gone) + (select count(*) from saved))::integer into written;
  return written;
end
$$;
comment on function private.roll_up_call_analytics(uuid, date) is
  'Writes a store''s analytics of one day of its own time zone from its calls; again, and nothing changes. Returns the rows that changed.';


-- What a schedule calls -----------------------------------------------------------------------------------------------------------

create or replace function private.roll_up_call_analytics(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  subject record;
  last    uuid;
  stores  integer := 0;
  rows    integer := 0;
  wanted  integer := least(greatest(coalesce((request ->> 'limit')::integer, 50), 1), 1000);
begin
  for subject in
    select store.id, (at at time zone store.timezone)::date as today
    from public.stores as store
    where store.id > coalesce((request ->> 'after')::uuid, '00000000-0000-0000-0000-000000000000')
      and exists (
        select
        from public.calls as call
        where call.organization_id = store.organization_id and call.store_id = store.id and call.start_time >= at - interval '2 days'
      )
    order by store.id
    limit wanted
  loop
    last := subject.id;
    stores := stores + 1;
    rows := rows + private.roll_up_call_analytics(subject.id, subject.today - 1) + private.roll_up_call_analytics(subject.id, subject.today);
  end loop;
  return jsonb_build_object('stores', stores, 'rows', rows, 'next', case when stores = wanted then last end);
end
$$;
comment on function private.roll_up_call_analytics(jsonb, timestamptz) is
  'Rolls up yesterday and today, each in the store''s own zone, of the stores that had calls; in pages, by the id of the store.';

create or replace function public.roll_up_call_analytics(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.roll_up_call_analytics($1, private.clock_now())
$$;
comment on function public.roll_up_call_analytics(jsonb) is
  '{"v":1,"limit":50,"after":uuid|null} -> {"stores":n,"rows":n,"next":uuid|null}: next is the `after` of the next page.';

create or replace function private.auto_complete_inactive_conversations(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  completed integer;
  wanted    integer := least(greatest(coalesce((request ->> 'limit')::integer, 500), 1), 5000);
begin
  with idle as (
    select conversation.id
    from public.conversations as conversation
    where conversation.status = 'active'
      and conversation.last_activity_at < at - interval '1 hour'
      -- A long silence on a line that is open is not the end.
      and not exists (
        select
        from public.calls as call
        where call.organization_id = conversation.organization_id
          and call.store_id = conversation.store_id
          and call.conversation_id = conversation.id
          and call.attempt_status <> 'ended'
      )
    order by conversation.last_activity_at, conversation.id
    limit wanted
    for no key update skip locked
  )
  update public.conversations as conversation
  set status = 'completed', end_time = greatest(conversation.last_activity_at, conversation.start_time)
  from idle
  where conversation.id = idle.id;
  get diagnostics completed = row_count;
  return jsonb_build_object('completed', completed, 'more', completed = wanted);
end
$$;
comment on function private.auto_complete_inactive_conversations(jsonb, timestamptz) is
  'Completes conversations in which nothing was said for an hour, as of what was said last; one that somebody is writing in is left alone.';

create or replace function public.auto_complete_inactive_conversations(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.auto_complete_inactive_conversations($1, private.clock_now())
$$;
comment on function public.auto_complete_inactive_conversations(jsonb) is '{"v":1,"limit":500} -> {"completed":n,"more":bool}.';

revoke execute on function
  private.calculate_resolution_time(), private.number_message(), private.update_conversation_activity(),
  private.note_customer_contact(), private.calculate_call_duration(), private.check_call_status(),
  private.roll_up_call_analytics(uuid, date)
from public;
revoke execute on function
  private.roll_up_call_analytics(jsonb, timestamptz), public.roll_up_call_analytics(jsonb),
  private.auto_complete_inactive_conversations(jsonb, timestamptz), public.auto_complete_inactive_conversations(jsonb)
from public, anon, authenticated, service_role;
grant execute on function
  private.roll_up_call_analytics(jsonb, timestamptz), public.roll_up_call_analytics(jsonb),
  private.auto_complete_inactive_conversations(jsonb, timestamptz), public.auto_complete_inactive_conversations(jsonb)
to service_role;


-- What a screen watches live, where there is Realtime.
do $$
begin
  if exists (select from pg_catalog.pg_publication where pubname = 'supabase_realtime' and not puballtables)
    and not exists (
      select
      from pg_catalog.pg_publication_tables
      where pubname = 'supabase_realtime' and schemaname = 'public' and tablename = 'conversations'
    )
  then
    alter publication supabase_realtime add table public.conversations;
  end if;
end
$$;
-- 04_crm.sql

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
  created_by      uuid default private.acting_user_id(),
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
  order_index     integer not null default 2147483647,
  position        integer generated always as (order_index) stored,
  color           text not null default '#cbd5e1' check (color ~ '^#[0-9a-fA-F]{6}$'),
  created_at      timestamptz not null default private.clock_now(),
  updated_at      timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  foreign key (organization_id, pipeline_id) references public.pipelines (organization_id, id) on delete cascade,
  foreign key (organization_id, project_id) references public.projects (organization_id, id) on delete cascade,
  constraint pipeline_stages_place_key unique (organization_id, pipeline_id, order_index) deferrable initially deferred
);
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
comment on column public.pipeline_stages.order_index is
  'The place in the pipeline, from 0 on without a gap. Written to, the others make room; without one a new stage is the last.';
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
  created_by        uuid default private.acting_user_id(),
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
  created_by      uuid default private.acting_user_id(),
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


-- The order of stages -------------------------------------------------------------------------------------------------------------
-- order_index is dense, from 0 on, and each number is taken once in a pipeline, whoever drags what at once: every statement that
-- changes stages waits for the other one of its organization, and leaves its pipelines numbered.

create function private.lock_stages() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  -- Before any row is locked: two drags that each hold a row of the other's would wait for each other.
  perform pg_advisory_xact_lock(hashtextextended('trunkline.pipeline_stages' || coalesce(private.get_auth_org_id()::text, ''), 0));
  return null;
end
$$;
comment on function private.lock_stages() is 'Trigger: one change of an organization''s stages at a time.';
create trigger lock_stages before insert or update or delete on public.pipeline_stages
  for each statement execute function private.lock_stages();

create function private.number_stages() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  -- Nothing to do ends the recursion: what is renumbered here comes by once more.
  if tg_op = 'INSERT' then
    with numbered as (
      select stage.id, row_number() over (
        partition by stage.pipeline_id order by stage.order_index, (placed.id is null), stage.created_at, stage.ctid
      ) - 1 as number
      from public.pipeline_stages as stage
      left join after as placed on placed.id = stage.id
      where stage.pipeline_id in (select after.pipeline_id from after)
    )
    update public.pipeline_stages as stage
    set order_index = numbered.number
    from numbered
    where stage.id = numbered.id and stage.order_index <> numbered.number;
  elsif tg_op = 'UPDATE' then
    if not exists (
      select
      from after
      join before on before.id = after.id
      where (after.order_index, after.pipeline_id) is distinct from (before.order_index, before.pipeline_id)
    ) then
      return null;
    end if;
    with numbered as (
      select stage.id, row_number() over (
        partition by stage.pipeline_id
        -- Dragged down it comes after the one whose place it takes, dragged up before it.
        order by stage.order_index,
          case when before.order_index < after.order_index then 1 when before.order_index > after.order_index then -1 else 0 end,
          stage.created_at, stage.id
      ) - 1 as number
      from public.pipeline_stages as stage
      left join after on after.id = stage.id
      left join before on before.id = stage.id
      where stage.pipeline_id in (select after.pipeline_id from after union select before.pipeline_id from before)
    )
    update public.pipeline_stages as stage
    set order_index = numbered.number
    from numbered
    where stage.id = numbered.id and stage.order_index <> numbered.number;
  else
    with numbered as (
      select stage.id, row_number() over (partition by stage.pipeline_id order by stage.order_index, stage.id) - 1 as number
      from public.pipeline_stages as stage
      where stage.pipeline_id in (select before.pipeline_id from before)
    )
    update public.pipeline_stages as stage
    set order_index = numbered.number
    from numbered
    where stage.id = numbered.id and stage.order_index <> numbered.number;
  end if;
  return null;
end
$$;
comment on function private.number_stages() is 'Trigger: the stages of every pipeline that a statement touched are numbered from 0 on.';
create trigger number_new_stages after insert on public.pipeline_stages
  referencing new table as after for each statement execute function private.number_stages();
create trigger number_moved_stages after update on public.pipeline_stages
  referencing old table as before new table as after for each statement execute function private.number_stages();
create trigger number_left_stages after delete on public.pipeline_stages
  referencing old table as before for each statement execute function private.number_stages();

create function private.move_stage(stage_id uuid, place integer) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('project.edit');
  pipeline     uuid;
begin
  if place is null or place < 0 then
    perform private.raise_error(422, 'invalid_position', 'A position is 0 or more', 'position');
  end if;
  update public.pipeline_stages as stage
  set order_index = least(place, 2147483646)
  where stage.organization_id = organization and stage.id = move_stage.stage_id
  returning stage.pipeline_id into pipeline;
  if pipeline is null then
    perform private.raise_error(404, 'stage_not_found', 'There is no such stage', 'stage_id');
  end if;
  return (
    select jsonb_build_object(
      'pipeline_id', pipeline,
      'stages', jsonb_agg(jsonb_build_object('id', stage.id, 'name', stage.name, 'position', stage.position) order by stage.position)
    )
    from public.pipeline_stages as stage
    where stage.organization_id = organization and stage.pipeline_id = pipeline
  );
end
$$;
comment on function private.move_stage(uuid, integer) is 'Puts a stage of the caller''s organization in another place of its pipeline.';

create function public.move_stage(stage_id uuid, "position" integer) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.move_stage($1, $2)
$$;
comment on function public.move_stage(uuid, integer) is
  'Drags a stage to a place, from 0 on; beyond the end is the end. Returns {"pipeline_id","stages":[{"id","name","position"}]}. Needs project.edit.';

revoke execute on function private.lock_stages(), private.number_stages() from public;
revoke execute on function private.move_stage(uuid, integer), public.move_stage(uuid, integer)
from public, anon, authenticated, service_role;
grant execute on function private.move_stage(uuid, integer), public.move_stage(uuid, integer) to authenticated;


-- stage_transitions ---------------------------------------------------------------------------------------------------------------

create table public.stage_transitions (
  id              uuid primary key default private.uuid_v7(),
  organization_id uuid not null references public.organizations (id) on delete cascade,
  lead_id         uuid not null,
  from_stage_id   uuid,
  to_stage_id     uuid,
  from_stage_name text,
  to_stage_name   text,
  moved_by        uuid,
  moved_at        timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  foreign key (organization_id, lead_id) references public.leads (organization_id, id) on delete cascade,
  foreign key (organization_id, from_stage_id) references public.pipeline_stages (organization_id, id) on delete set null (from_stage_id),
  foreign key (organization_id, to_stage_id) references public.pipeline_stages (organization_id, id) on delete set null (to_stage_id),
  foreign key (organization_id, moved_by) references public.profiles (organization_id, id) on delete set null (moved_by)
);
create index idx_stage_transitions_lead on public.stage_transitions (organization_id, lead_id, moved_at desc);
create index idx_stage_transitions_from_stage on public.stage_transitions (organization_id, from_stage_id);
create index idx_stage_transitions_to_stage on public.stage_transitions (organization_id, to_stage_id);
create index idx_stage_transitions_moved_by on public.stage_transitions (organization_id, moved_by);

revoke all on public.stage_transitions from anon, authenticated, service_role;
grant select on public.stage_transitions to authenticated, service_role;
alter table public.stage_transitions enable row level security;
alter table public.stage_transitions force row level security;
create policy "Who views leads may see how they moved" on public.stage_transitions
  for select to authenticated using (organization_id = (select private.org_with('lead.view')));
comment on table public.stage_transitions is 'Every move of a lead from one stage to another, written by the move itself.';
comment on column public.stage_transitions.from_stage_name is 'As it was called then; stays when the stage is deleted.';
comment on column public.stage_transitions.moved_by is 'Null when the system moved it.';

create function private.record_stage_transition() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  left_stage uuid := case when tg_op = 'UPDATE' then old.stage_id end;
begin
  -- A stage that is being deleted takes its leads along: then it is no longer there to point at.
  insert into public.stage_transitions (
    organization_id, lead_id, from_stage_id, to_stage_id, from_stage_name, to_stage_name, moved_by, moved_at
  )
  select
    new.organization_id, new.id, source.id, new.stage_id,
    case
      when left_stage is not null then coalesce(
        source.name,
        (
          select earlier.to_stage_name
          from public.stage_transitions as earlier
          where earlier.organization_id = new.organization_id and earlier.lead_id = new.id
          order by earlier.moved_at desc, earlier.id desc
          limit 1
        )
      )
    end,
    target.name,
    (
      select member.id
      from public.profiles as member
      where member.organization_id = new.organization_id and member.id = private.acting_user_id()
    ),
    private.clock_now()
  from (values (true)) as one (row)
  left join public.pipeline_stages as source on source.organization_id = new.organization_id and source.id = left_stage
  left join public.pipeline_stages as target on target.organization_id = new.organization_id and target.id = new.stage_id;
  return null;
end
$$;
comment on function private.record_stage_transition() is 'Trigger: a lead''s move is written down in the transaction that makes it.';
revoke execute on function private.record_stage_transition() from public;
create trigger record_first_stage after insert on public.leads
  for each row when (new.stage_id is not null) execute function private.record_stage_transition();
create trigger record_stage_transition after update of stage_id on public.leads
  for each row when (old.stage_id is distinct from new.stage_id) execute function private.record_stage_transition();


-- lead_forms ----------------------------------------------------------------------------------------------------------------------

create table public.lead_forms (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null default public.get_auth_org_id() references public.organizations (id) on delete cascade,
  project_id      uuid,
  stage_id        uuid,
  name            text not null check (length(btrim(name)) between 1 and 200),
  description     text,
  fields          jsonb not null default '[]' check (jsonb_typeof(fields) = 'array'),
  consent_text    text,
  is_active       boolean not null default true,
  created_by      uuid default private.acting_user_id(),
  created_at      timestamptz not null default private.clock_now(),
  updated_at      timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  foreign key (organization_id, project_id) references public.projects (organization_id, id) on delete set null (project_id),
  foreign key (organization_id, stage_id) references public.pipeline_stages (organization_id, id) on delete set null (stage_id),
  foreign key (organization_id, created_by) references public.profiles (organization_id, id) on delete set null (created_by)
);
create index idx_lead_forms_project on public.lead_forms (organization_id, project_id);
create index idx_lead_forms_stage on public.lead_forms (organization_id, stage_id);
create index idx_lead_forms_created_by on public.lead_forms (organization_id, created_by);

revoke all on public.lead_forms from anon, authenticated, service_role;
grant select, delete on public.lead_forms to authenticated;
grant
  insert (project_id, stage_id, name, description, fields, consent_text, is_active),
  update (project_id, stage_id, name, description, fields, consent_text, is_active)
on public.lead_forms to authenticated;
alter table public.lead_forms
  add column consent_scopes text[] not null default '{call_service}'
    check (consent_scopes <@ array['call_service', 'call_promotional', 'recording', 'sms', 'whatsapp']),
  add column rate_per_minute integer not null default 30 check (rate_per_minute between 1 and 6000);
grant insert (consent_scopes, rate_per_minute), update (consent_scopes, rate_per_minute) on public.lead_forms to authenticated;
grant select on public.lead_forms to service_role;
alter table public.lead_forms enable row level security;
alter table public.lead_forms force row level security;
create policy "Who views leads may see the forms" on public.lead_forms
  for select to authenticated using (organization_id = (select private.org_with('lead.view')));
create policy "Who edits projects may make a form" on public.lead_forms
  for insert to authenticated with check (organization_id = (select private.org_with('project.edit')));
create policy "Who edits projects may change a form" on public.lead_forms
  for update to authenticated
  using (organization_id = (select private.org_with('project.edit')))
  with check (organization_id = (select private.org_with('project.edit')));
create policy "Who edits projects may delete a form" on public.lead_forms
  for delete to authenticated using (organization_id = (select private.org_with('project.edit')));
create trigger update_modified_column before update on public.lead_forms
  for each row execute function private.update_modified_column();
comment on table public.lead_forms is
  'A form by which leads come in of themselves. The public never reads it here: intake takes submissions by the form''s id, which is no secret.';
comment on column public.lead_forms.consent_scopes is 'What consent_text is a consent to.';
comment on column public.lead_forms.rate_per_minute is 'Submissions a minute that are taken; of more the sender is told to wait.';
comment on column public.lead_forms.fields is 'What it asks: an array of {"name","label","type","required"}.';
comment on column public.lead_forms.stage_id is 'Where its leads begin; null is the first stage of the default pipeline.';
comment on column public.lead_forms.consent_text is 'What the person agrees to by sending it; copied to consents word by word.';


-- What intake remembers of those who send leads -------------------------------------------------------------------------------------

create table private.rate_limits (
  subject     text primary key check (length(subject) between 1 and 200),
  tokens      numeric not null,
  refilled_at timestamptz not null
);
select private.close_table('private.rate_limits');
comment on table private.rate_limits is 'A bucket a sender: what it may still send now, in whatever process it is served. Real time.';

create table private.lead_requests (
  organization_id uuid not null references public.organizations (id) on delete cascade,
  subject         text not null,
  key             text not null check (length(key) between 1 and 255),
  body_sha256     text not null,
  answer          jsonb,
  created_at      timestamptz not null,
  primary key (organization_id, subject, key)
);
create index idx_lead_requests_created_at on private.lead_requests (created_at);
select private.close_table('private.lead_requests');
comment on table private.lead_requests is
  'Requests that came with an idempotency key, and what they were answered: ids and codes, nobody''s particulars. Kept for a week.';


-- consents ------------------------------------------------------------------------------------------------------------------------

create table public.consents (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null default public.get_auth_org_id() references public.organizations (id) on delete cascade,
  lead_id         uuid,
  phone_number    text not null check (phone_number ~ '^\+[1-9][0-9]{6,14}$'),
  scope           text not null check (scope in ('call_service', 'call_promotional', 'recording', 'sms', 'whatsapp')),
  consent_text    text not null check (length(btrim(consent_text)) > 0),
  source          text not null check (source in ('form', 'call', 'import', 'written', 'message', 'in_person')),
  proof           jsonb not null check (jsonb_typeof(proof) = 'object' and proof <> '{}'),
  granted_at      timestamptz not null default private.clock_now(),
  expires_at      timestamptz,
  revoked_at      timestamptz,
  revoke_reason   text,
  created_by      uuid default private.acting_user_id(),
  created_at      timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  foreign key (organization_id, lead_id) references public.leads (organization_id, id) on delete set null (lead_id),
  foreign key (organization_id, created_by) references public.profiles (organization_id, id) on delete set null (created_by),
  check (expires_at > granted_at),
  check (revoked_at >= granted_at)
);
create index idx_consents_number on public.consents (organization_id, phone_number, scope, granted_at desc);
create index idx_consents_lead on public.consents (organization_id, lead_id);
create index idx_consents_created_by on public.consents (organization_id, created_by);

revoke all on public.consents from anon, authenticated, service_role;
grant select on public.consents to authenticated, service_role;
grant insert (lead_id, phone_number, scope, consent_text, source, proof, granted_at, expires_at) on public.consents to authenticated;
alter table public.consents enable row level security;
alter table public.consents force row level security;
create policy "Who views leads may see what they agreed to" on public.consents
  for select to authenticated using (organization_id = (select private.org_with('lead.view')));
create policy "Who edits leads may record that one agreed" on public.consents
  for insert to authenticated with check (organization_id = (select private.org_with('lead.edit')));

create function private.guard_consent() returns trigger
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
comment on function private.guard_consent() is 'Trigger: what somebody agreed to stays as it was; it can only be withdrawn, once.';
create trigger guard_consent before insert or update or delete on public.consents
  for each row execute function private.guard_consent();

create function private.has_consent(organization uuid, phone text, wanted text, at timestamptz) returns boolean
language plpgsql stable security definer set search_path = '' as $$
begin
  return exists (
    select
    from public.consents as consent
    where consent.organization_id = organization
      and consent.phone_number = phone
      and consent.scope = wanted
      and consent.granted_at <= at
      and (consent.expires_at is null or consent.expires_at > at)
      and (consent.revoked_at is null or consent.revoked_at > at)
  );
end
$$;
comment on function private.has_consent(uuid, text, text, timestamptz) is
  'Whether a number has agreed to a scope, and has not withdrawn it, as of a moment: also of one in the past.';

create function private.follow_recording_consent() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  update public.leads as lead
  set recording_consent = private.has_consent(new.organization_id, new.phone_number, 'recording', private.clock_now())
  where lead.organization_id = new.organization_id and lead.phone = new.phone_number
    and lead.recording_consent <> private.has_consent(new.organization_id, new.phone_number, 'recording', private.clock_now());
  return null;
end
$$;
comment on function private.follow_recording_consent() is 'Trigger: leads.recording_consent says what the number last agreed to.';
create trigger follow_recording_consent after insert or update of revoked_at on public.consents
  for each row when (new.scope = 'recording') execute function private.follow_recording_consent();

create function private.suppress_revoked() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  insert into public.suppressions (organization_id, phone_number, source, reason)
  values (new.organization_id, new.phone_number, 'lead', coalesce(new.revoke_reason, 'consent revoked'))
  on conflict (organization_id, phone_number) do nothing;
  return null;
end
$$;
comment on function private.suppress_revoked() is 'Trigger: who no longer wants to be called is not called, from this transaction on.';
create trigger suppress_revoked after update of revoked_at on public.consents
  for each row when (old.revoked_at is null and new.revoked_at is not null and new.scope in ('call_service', 'call_promotional'))
  execute function private.suppress_revoked();
comment on table public.consents is
  'What a person agreed to, word by word, with the proof: one row a scope and occasion. Evidence, so only ever added to and revoked.';
comment on column public.consents.scope is 'One of calling for a service or for promotion, recording the call, or a message.';
comment on column public.consents.consent_text is 'The words that were shown or said.';
comment on column public.consents.proof is 'How it can be shown: form and address, recording and second, document and page.';
comment on column public.consents.expires_at is 'Until when it holds; null has no end of its own.';

create function private.revoke_consent(consent_id uuid, reason text, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('lead.edit');
  revoked      public.consents;
begin
  update public.consents as consent
  set revoked_at = greatest(at, consent.granted_at), revoke_reason = revoke_consent.reason
  where consent.organization_id = organization and consent.id = revoke_consent.consent_id and consent.revoked_at is null
  returning consent.* into revoked;
  if revoked.id is null then
    perform private.raise_error(404, 'consent_not_found', 'There is no such consent that still holds', 'consent_id');
  end if;
  return jsonb_build_object('id', revoked.id, 'scope', revoked.scope, 'revoked_at', revoked.revoked_at);
end
$$;
comment on function private.revoke_consent(uuid, text, timestamptz) is 'Withdraws a consent in the caller''s organization.';

create function public.revoke_consent(consent_id uuid, reason text default null) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.revoke_consent(consent_id, reason, private.clock_now())
$$;
comment on function public.revoke_consent(uuid, text) is
  'Withdraws a consent; to be called: the number is suppressed at once. Needs lead.edit. Returns {"id","scope","revoked_at"}.';

revoke execute on function
  private.guard_consent(), private.has_consent(uuid, text, text, timestamptz), private.follow_recording_consent(), private.suppress_revoked()
from public;
revoke execute on function private.revoke_consent(uuid, text, timestamptz), public.revoke_consent(uuid, text)
from public, anon, authenticated, service_role;
grant execute on function private.revoke_consent(uuid, text, timestamptz), public.revoke_consent(uuid, text) to authenticated;
-- 05_inventory.sql

-- What an organization sells or lets itself: properties, their reservations, images and features.
--
-- price -> price_minor, in the minor unit of currency_code.
-- Whoever changes several of these rows locks the property first.


-- properties ----------------------------------------------------------------------------------------------------------------------

create table public.properties (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null default public.get_auth_org_id() references public.organizations (id) on delete cascade,
  project_id      uuid,
  title           text not null check (length(btrim(title)) between 1 and 500),
  description     text,
  address         text,
  price_minor     bigint not null check (price_minor >= 0),
  currency_code   text not null check (currency_code ~ '^[A-Z]{3}$'),
  size_sqft       integer check (size_sqft > 0),
  bedrooms        smallint check (bedrooms >= 0),
  bathrooms       smallint check (bathrooms >= 0),
  type            text not null check (type in ('apartment', 'villa', 'plot', 'commercial')),
  status          text not null default 'available' check (status in ('available', 'reserved', 'sold', 'rented')),
  archived_at     timestamptz,
  created_by      uuid default private.acting_user_id(),
  created_at      timestamptz not null default private.clock_now(),
  updated_at      timestamptz not null default private.clock_now(),
  tower           text check (length(btrim(tower)) between 1 and 100),
  floor_number    smallint,
  unit_number     text check (length(btrim(unit_number)) between 1 and 50),
  unique (organization_id, id),
  foreign key (organization_id, project_id) references public.projects (organization_id, id) on delete set null (project_id),
  foreign key (organization_id, created_by) references public.profiles (organization_id, id) on delete set null (created_by)
);
create index idx_properties_organization_id on public.properties (organization_id, created_at desc);
create index idx_properties_status on public.properties (organization_id, status, type);
create index idx_properties_project on public.properties (organization_id, project_id);
-- A flat of a development is there once.
create unique index idx_properties_unit on public.properties (organization_id, project_id, tower, unit_number) nulls not distinct
  where unit_number is not null and archived_at is null;
create index idx_properties_created_by on public.properties (organization_id, created_by);

revoke all on public.properties from anon, authenticated, service_role;
grant select, delete on public.properties to authenticated;
grant
  insert (
    id, project_id, title, description, address, price_minor, currency_code, size_sqft, bedrooms, bathrooms, type,
    tower, floor_number, unit_number
  ),
  update (
    project_id, title, description, address, price_minor, currency_code, size_sqft, bedrooms, bathrooms, type, archived_at,
    tower, floor_number, unit_number
  )
on public.properties to authenticated;
grant select on public.properties to service_role;
alter table public.properties enable row level security;
alter table public.properties force row level security;
create policy "Who views properties may see them" on public.properties
  for select to authenticated using (organization_id = (select private.org_with('property.view')));
create policy "Who edits properties may add one" on public.properties
  for insert to authenticated with check (organization_id = (select private.org_with('property.edit')));
create policy "Who edits properties may change one" on public.properties
  for update to authenticated
  using (organization_id = (select private.org_with('property.edit')))
  with check (organization_id = (select private.org_with('property.edit')));
create policy "Who edits properties may delete one that is free" on public.properties
  for delete to authenticated using (organization_id = (select private.org_with('property.edit')) and status = 'available');

create function private.fill_organization_currency() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  new.currency_code := (select organization.currency from public.organizations as organization where organization.id = new.organization_id);
  return new;
end
$$;
comment on function private.fill_organization_currency() is 'Trigger: an amount that names no currency is in its organization''s.';
create trigger fill_organization_currency before insert on public.properties
  for each row when (new.currency_code is null) execute function private.fill_organization_currency();
create trigger update_modified_column before update on public.properties
  for each row execute function private.update_modified_column();
comment on table public.properties is
  'A flat, a house, a plot. Users describe it; its status moves by reserve_property() and set_property_status() alone. Archived once it had a reservation.';
comment on column public.properties.price_minor is 'In the minor unit of currency_code.';
comment on column public.properties.currency_code is 'ISO 4217, upper case; the organization''s when not given.';
comment on column public.properties.tower is 'The building of the project that it is in, where there are several.';
comment on column public.properties.unit_number is 'What the door says; once a project and tower, of those that are not archived.';
comment on column public.properties.status is 'reserved exactly while a row of property_reservations holds it.';


-- property_reservations -----------------------------------------------------------------------------------------------------------

create table public.property_reservations (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null,
  property_id     uuid not null,
  lead_id         uuid,
  status          text not null default 'held' check (status in ('held', 'released', 'expired', 'sold', 'rented')),
  reserved_by     uuid,
  held_until      timestamptz,
  created_at      timestamptz not null default private.clock_now(),
  ended_at        timestamptz,
  updated_at      timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  foreign key (organization_id, property_id) references public.properties (organization_id, id) on delete restrict,
  foreign key (organization_id, lead_id) references public.leads (organization_id, id) on delete set null (lead_id),
  foreign key (organization_id, reserved_by) references public.profiles (organization_id, id) on delete set null (reserved_by),
  check ((status = 'held') = (ended_at is null)),
  check (held_until > created_at)
);
-- Of two who reserve at once one wins, whatever code they come by.
create unique index idx_property_reservations_held on public.property_reservations (organization_id, property_id) where status = 'held';
create index idx_property_reservations_property on public.property_reservations (organization_id, property_id, created_at desc);
create index idx_property_reservations_lead on public.property_reservations (organization_id, lead_id);
create index idx_property_reservations_reserved_by on public.property_reservations (organization_id, reserved_by);
create index idx_property_reservations_due on public.property_reservations (held_until) where status = 'held';

revoke all on public.property_reservations from anon, authenticated, service_role;
grant select on public.property_reservations to authenticated, service_role;
alter table public.property_reservations enable row level security;
alter table public.property_reservations force row level security;
create policy "Who views properties may see their reservations" on public.property_reservations
  for select to authenticated using (organization_id = (select private.org_with('property.view')));
create trigger update_modified_column before update on public.property_reservations
  for each row execute function private.update_modified_column();
comment on table public.property_reservations is
  'Who held a property, for whom, until when, and what came of it. At most one holds it. Written by functions alone.';
comment on column public.property_reservations.held_until is 'Business time at which the hold ends by itself; null: when somebody ends it.';


-- property_images -----------------------------------------------------------------------------------------------------------------

create table public.property_images (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null default public.get_auth_org_id(),
  property_id     uuid not null,
  url             text not null check (url ~ '^https?://'),
  is_featured     boolean not null default false,
  order_index     integer not null default 0 check (order_index >= 0),
  position        integer generated always as (order_index) stored,
  created_at      timestamptz not null default private.clock_now(),
  updated_at      timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  foreign key (organization_id, property_id) references public.properties (organization_id, id) on delete cascade
);
create index idx_property_images_property on public.property_images (organization_id, property_id, order_index);
create unique index idx_property_images_featured on public.property_images (organization_id, property_id) where is_featured;

revoke all on public.property_images from anon, authenticated, service_role;
grant select, delete on public.property_images to authenticated;
grant insert (property_id, url, is_featured, order_index), update (url, is_featured, order_index)
on public.property_images to authenticated;
grant select on public.property_images to service_role;
alter table public.property_images enable row level security;
alter table public.property_images force row level security;
create policy "Who views properties may see their images" on public.property_images
  for select to authenticated using (organization_id = (select private.org_with('property.view')));
create policy "Who edits properties may add an image" on public.property_images
  for insert to authenticated with check (organization_id = (select private.org_with('property.edit')));
create policy "Who edits properties may change an image" on public.property_images
  for update to authenticated
  using (organization_id = (select private.org_with('property.edit')))
  with check (organization_id = (select private.org_with('property.edit')));
create policy "Who edits properties may delete an image" on public.property_images
  for delete to authenticated using (organization_id = (select private.org_with('property.edit')));

create function private.keep_one_featured_image() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  -- The property's row makes two choices at once into one after the other; the later one stands.
  perform from public.properties as property
  where property.organization_id = new.organization_id and property.id = new.property_id
  for no key update;
  update public.property_images as other
  set is_featured = false
  where other.organization_id = new.organization_id
    and other.property_id = new.property_id
    and other.id <> new.id
    and other.is_featured;
  return new;
end
$$;
comment on function private.keep_one_featured_image() is 'Trigger: an image that is featured takes that from the property''s other one.';
create trigger keep_one_featured_image before insert or update of is_featured on public.property_images
  for each row when (new.is_featured) execute function private.keep_one_featured_image();
create trigger update_modified_column before update on public.property_images
  for each row execute function private.update_modified_column();
comment on table public.property_images is 'Pictures of a property, in order; at most one stands for it.';
comment on column public.property_images.position is 'The same as order_index, under the name that other tables use.';


-- property_features ---------------------------------------------------------------------------------------------------------------

create table public.property_features (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null default public.get_auth_org_id(),
  property_id     uuid not null,
  feature_name    text not null check (length(btrim(feature_name)) between 1 and 200),
  created_at      timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  unique (organization_id, property_id, feature_name),
  foreign key (organization_id, property_id) references public.properties (organization_id, id) on delete cascade
);

revoke all on public.property_features from anon, authenticated, service_role;
grant select, delete on public.property_features to authenticated;
grant insert (property_id, feature_name) on public.property_features to authenticated;
grant select on public.property_features to service_role;
alter table public.property_features enable row level security;
alter table public.property_features force row level security;
create policy "Who views properties may see their features" on public.property_features
  for select to authenticated using (organization_id = (select private.org_with('property.view')));
create policy "Who edits properties may add a feature" on public.property_features
  for insert to authenticated with check (organization_id = (select private.org_with('property.edit')));
create policy "Who edits properties may delete a feature" on public.property_features
  for delete to authenticated using (organization_id = (select private.org_with('property.edit')));
comment on table public.property_features is 'What a property has: a lift, a pool, parking. Each once.';


-- What users do with them ---------------------------------------------------------------------------------------------------------

create function private.end_reservation(property public.properties, outcome text, at timestamptz) returns void
language plpgsql volatile security definer set search_path = '' as $$
begin
  update public.property_reservations as hold
  set status = outcome, ended_at = greatest(at, hold.created_at)
  where hold.organization_id = property.organization_id and hold.property_id = property.id and hold.status = 'held';
end
$$;
comment on function private.end_reservation(public.properties, text, timestamptz) is
  'Ends the hold on a property, if there is one; whoever calls has locked the property and sets its status.';

create function private.lock_property(organization uuid, property_id uuid, at timestamptz) returns public.properties
language plpgsql volatile security definer set search_path = '' as $$
declare
  property public.properties;
begin
  select asked.* into property
  from public.properties as asked
  where asked.organization_id = organization and asked.id = lock_property.property_id
  for no key update;
  if property.id is null then
    perform private.raise_error(404, 'property_not_found', 'There is no such property', 'property_id');
  end if;
  if property.status = 'reserved' and exists (
    select
    from public.property_reservations as hold
    where hold.organization_id = organization and hold.property_id = property.id and hold.status = 'held' and hold.held_until <= at
  ) then
    perform private.end_reservation(property, 'expired', at);
    update public.properties as freed set status = 'available' where freed.id = property.id returning freed.* into property;
  end if;
  return property;
end
$$;
comment on function private.lock_property(uuid, uuid, timestamptz) is
  'A property of an organization, locked, and free again if the hold on it has run out; 404 if there is none.';

create function private.reserve_property(property_id uuid, lead_id uuid, held_until timestamptz, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('property.edit');
  property     public.properties;
  hold         public.property_reservations;
begin
  if held_until <= at then
    perform private.raise_error(422, 'invalid_time', 'A reservation ends in the future', 'held_until');
  end if;
  property := private.lock_property(organization, property_id, at);
  if property.status <> 'available' or property.archived_at is not null then
    perform private.raise_error(
      409, 'property_not_available',
      format('The property is %s', case when property.archived_at is not null then 'archived' else property.status end), 'property_id'
    );
  end if;
  if lead_id is not null and not exists (
    select from public.leads as lead where lead.organization_id = organization and lead.id = reserve_property.lead_id
  ) then
    perform private.raise_error(404, 'lead_not_found', 'There is no such lead', 'lead_id');
  end if;
  insert into public.property_reservations (organization_id, property_id, lead_id, reserved_by, held_until, created_at)
  values (organization, property.id, reserve_property.lead_id, private.acting_user_id(), reserve_property.held_until, at)
  returning * into hold;
  update public.properties as reserved set status = 'reserved' where reserved.id = property.id;
  perform private.audit(
    organization, 'property.reserved', 'property', property.id,
    jsonb_build_object('reservation_id', hold.id, 'lead_id', hold.lead_id, 'held_until', hold.held_until), at
  );
  return to_jsonb(hold);
end
$$;
comment on function private.reserve_property(uuid, uuid, timestamptz, timestamptz) is
  'Holds a property: whoever comes second, however soon, is told that it is reserved.';

create function public.reserve_property(property_id uuid, lead_id uuid default null, held_until timestamptz default null) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.reserve_property(property_id, lead_id, held_until, private.clock_now())
$$;
comment on function public.reserve_property(uuid, uuid, timestamptz) is
  'Reserves an available property, for a lead if one is named, and returns the reservation; 409 property_not_available. Needs property.edit.';

create function private.set_property_status(property_id uuid, status text, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('property.edit');
  property     public.properties;
  changed      public.properties;
begin
  property := private.lock_property(organization, property_id, at);
  if status is null or not (property.status, status) in (
    ('reserved', 'available'), ('reserved', 'sold'), ('reserved', 'rented'),
    ('available', 'sold'), ('available', 'rented'),
    ('sold', 'available'), ('rented', 'available')
  ) then
    perform private.raise_error(
      409, 'invalid_transition', format('A property that is %s cannot become %s', property.status, coalesce(status, 'nothing')), 'status'
    );
  end if;
  if property.status = 'reserved' then
    perform private.end_reservation(property, case when status = 'available' then 'released' else status end, at);
  end if;
  update public.properties as moved
  set status = set_property_status.status
  where moved.id = property.id
  returning moved.* into changed;
  perform private.audit(
    organization, 'property.status_changed', 'property', property.id,
    jsonb_build_object('from', property.status, 'to', changed.status), at
  );
  return to_jsonb(changed);
end
$$;
comment on function private.set_property_status(uuid, text, timestamptz) is
  'Moves a property along: reserved to available, sold or rented, available to sold or rented, and either back. The hold ends with it.';

create function public.set_property_status(property_id uuid, status text) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.set_property_status(property_id, status, private.clock_now())
$$;
comment on function public.set_property_status(uuid, text) is
  'Releases, sells, lets or offers a property again, and returns it; 409 invalid_transition. Reserving is reserve_property(). Needs property.edit.';

create function private.order_property_images(property_id uuid, image_ids uuid[], at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('property.edit');
  property     public.properties;
begin
  -- Two drags at once are one after the other: the result is the later one's order, whole.
  property := private.lock_property(organization, property_id, at);
  if exists (
    select
    from unnest(image_ids) as named (id)
    where not exists (
      select
      from public.property_images as image
      where image.organization_id = organization and image.property_id = property.id and image.id = named.id
    )
  ) then
    perform private.raise_error(422, 'unknown_image', 'An image is not one of this property', 'image_ids');
  end if;
  update public.property_images as image
  set order_index = wanted.place
  from (
    select
      present.id,
      (row_number() over (order by named.place nulls last, present.order_index, present.created_at, present.id) - 1)::integer as place
    from public.property_images as present
    left join (
      select listed.id, min(listed.place) as place from unnest(image_ids) with ordinality as listed (id, place) group by listed.id
    ) as named on named.id = present.id
    where present.organization_id = organization and present.property_id = property.id
  ) as wanted
  where image.id = wanted.id and image.order_index <> wanted.place;
  return coalesce(
    (
      select jsonb_agg(jsonb_build_object('id', image.id, 'order_index', image.order_index) order by image.order_index)
      from public.property_images as image
      where image.organization_id = organization and image.property_id = property.id
    ),
    '[]'
  );
end
$$;
comment on function private.order_property_images(uuid, uuid[], timestamptz) is
  'Numbers a property''s images from 0: those named, in their order, then the others as they were.';

create function public.order_property_images(property_id uuid, image_ids uuid[]) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.order_property_images(property_id, image_ids, private.clock_now())
$$;
comment on function public.order_property_images(uuid, uuid[]) is
  'Puts a property''s images in order and returns [{"id","order_index"}]; images not named follow. Needs property.edit.';

create function private.expire_reservations(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  due     record;
  expired integer := 0;
  wanted  integer := least(greatest(coalesce((request ->> 'limit')::integer, 500), 1), 5000);
begin
  for due in
    select property.organization_id, property.id
    from public.property_reservations as hold
    join public.properties as property on property.organization_id = hold.organization_id and property.id = hold.property_id
    where hold.status = 'held' and hold.held_until <= at
    order by property.id
    limit wanted
    for no key update of property skip locked
  loop
    perform private.lock_property(due.organization_id, due.id, at);
    expired := expired + 1;
  end loop;
  return jsonb_build_object('expired', expired, 'more', expired = wanted);
end
$$;
comment on function private.expire_reservations(jsonb, timestamptz) is 'Frees the properties whose hold has run out.';

create function public.expire_reservations(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.expire_reservations($1, private.clock_now())
$$;
comment on function public.expire_reservations(jsonb) is '{"v":1,"limit":500} -> {"expired":n,"more":bool}.';

revoke execute on function
  private.fill_organization_currency(), private.keep_one_featured_image(),
  private.end_reservation(public.properties, text, timestamptz), private.lock_property(uuid, uuid, timestamptz)
from public;
revoke execute on function
  private.reserve_property(uuid, uuid, timestamptz, timestamptz), public.reserve_property(uuid, uuid, timestamptz),
  private.set_property_status(uuid, text, timestamptz), public.set_property_status(uuid, text),
  private.order_property_images(uuid, uuid[], timestamptz), public.order_property_images(uuid, uuid[]),
  private.expire_reservations(jsonb, timestamptz), public.expire_reservations(jsonb)
from public, anon, authenticated, service_role;
grant execute on function
  private.reserve_property(uuid, uuid, timestamptz, timestamptz), public.reserve_property(uuid, uuid, timestamptz),
  private.set_property_status(uuid, text, timestamptz), public.set_property_status(uuid, text),
  private.order_property_images(uuid, uuid[], timestamptz), public.order_property_images(uuid, uuid[])
to authenticated;
grant execute on function private.expire_reservations(jsonb, timestamptz), public.expire_reservations(jsonb) to service_role;
-- 06_campaigns_and_calling.sql

-- Campaigns, their queue, every dial attempt, and what decides whether a number may be dialled.
--
-- Whoever changes several of these rows locks them in this order, and within one table by id, so that no two transactions wait for
-- each other: call_logs, call_queue, campaign_leads, leads, campaigns, usage counters, wallets.


-- carrier_accounts ----------------------------------------------------------------------------------------------------------------

create table public.carrier_accounts (
  id                   uuid primary key default gen_random_uuid(),
  organization_id      uuid references public.organizations (id) on delete restrict,
  provider             public.carrier_provider not null,
  name                 text,
  account_sid          text not null check (account_sid <> ''),
  credentials_sealed    text not null,
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
create function private.keep_account_owner() returns trigger
language plpgsql set search_path = '' as $$
begin
  raise exception 'a carrier account stays with whom it is' using errcode = 'check_violation';
end
$$;
comment on function private.keep_account_owner() is 'Trigger: numbers and legs hang on an account, which no other organization takes over.';
revoke execute on function private.keep_account_owner() from public;
create trigger keep_account_owner before update of organization_id on public.carrier_accounts
  for each row when (old.organization_id is distinct from new.organization_id) execute function private.keep_account_owner();
create trigger update_modified_column before update on public.carrier_accounts
  for each row execute function private.update_modified_column();
comment on table public.carrier_accounts is
  'An account with a phone carrier; without an organization it is the platform''s own. Seen by handlers alone, its secrets sealed.';
comment on column public.carrier_accounts.credentials_sealed is
  'What the carrier knows us by and what it signs with, as a JSON object of the carrier''s own keys or a bare auth token; sealed for this row''s id.';
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
  'Trigger: a number hangs on its organization''s own carrier account, or on the platform''s; so does a leg.';
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
  created_by           uuid default private.acting_user_id(),
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
  'Why it waits: outside_window, bad_timezone, campaign_over, min_gap, daily_cap, number_in_call, quota_exhausted, credit_exhausted, callback, retry_<outcome>.';
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
  caller_id               uuid,
  unique (organization_id, id),
  unique (organization_id, queue_id, attempt_no),
  foreign key (organization_id, campaign_id) references public.campaigns (organization_id, id) on delete restrict,
  foreign key (organization_id, lead_id) references public.leads (organization_id, id) on delete restrict,
  foreign key (organization_id, project_id) references public.projects (organization_id, id) on delete set null (project_id),
  foreign key (organization_id, queue_id) references public.call_queue (organization_id, id) on delete restrict,
  foreign key (organization_id, caller_id) references public.profiles (organization_id, id) on delete set null (caller_id),
  check ((status = 'ended') = (call_status is not null)),
  check ((status = 'ended') = (ended_at is not null)),
  check (answered_at >= created_at and ended_at >= answered_at),
  check (status = 'created' or status = 'ended' or dialled or direction = 'inbound')
) with (fillfactor = 70);
create index idx_call_logs_organization_id on public.call_logs (organization_id, created_at desc);
create index idx_call_logs_campaign_id on public.call_logs (organization_id, campaign_id, created_at desc);
create index idx_call_logs_lead_id on public.call_logs (organization_id, lead_id);
create index idx_call_logs_project_id on public.call_logs (organization_id, project_id) where project_id is not null;
create index idx_call_logs_caller_id on public.call_logs (organization_id, caller_id) where caller_id is not null;
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
create trigger check_carrier_account before insert or update of organization_id, carrier_account_id on public.call_logs
  for each row execute function private.check_caller_number();
create trigger check_attempt before update of status, call_sid on public.call_logs
  for each row execute function private.check_attempt();
create trigger update_modified_column before update on public.call_logs
  for each row execute function private.update_modified_column();
comment on table public.call_logs is
  'One row a leg, in or out: the attempt. Committed before the carrier hears of it, ended exactly once, and alone metered. Its id is the attempt id.';
comment on column public.call_logs.caller_id is 'The user who placed it by hand; null for a campaign''s. The number it is made from is caller_number.';
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
  if exists (select from pg_catalog.pg_publication where pubname = 'supabase_realtime' and not puballtables) then
    alter publication supabase_realtime add table public.campaigns, public.campaign_leads, public.call_logs;
  end if;
end
$$;


-- The store's view of a leg -------------------------------------------------------------------------------------------------------
-- calls and store_phone_numbers are in files before this one, which a person may paste without it: what joins them is here.

alter table public.store_phone_numbers
  add foreign key (carrier_account_id) references public.carrier_accounts (id) on delete restrict;
create trigger check_caller_number before insert or update of organization_id, carrier_account_id on public.store_phone_numbers
  for each row when (new.carrier_account_id is not null) execute function private.check_caller_number();

alter table public.calls
  add foreign key (organization_id, call_log_id) references public.call_logs (organization_id, id) on delete set null (call_log_id);

create function private.is_dropped(leg public.call_logs) returns boolean
language sql immutable parallel safe set search_path = '' as $$
  select leg.answered_at is not null and coalesce(leg.call_status in ('carrier_transient', 'our_fault', 'failed'), false)
$$;
comment on function private.is_dropped(public.call_logs) is
  'Whether a leg was answered and then ended by a fault, of the carrier or of ours.';

create function private.attach_leg() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  leg public.call_logs;
begin
  -- Shared with nobody who moves the leg on: either that move is seen here, or it sees this call and tells it.
  select log.* into leg
  from public.call_logs as log
  where log.organization_id = new.organization_id and log.id = new.call_log_id
  for share;
  if leg.id is null then
    -- The foreign key says so, in its own words.
    return new;
  end if;
  new.direction := leg.direction;
  new.from_phone := private.to_call_party(leg.caller_number);
  new.to_phone := private.to_call_party(leg.callee_number);
  new.start_time := leg.created_at;
  new.attempt_status := leg.status;
  new.call_outcome := leg.call_status;
  new.twilio_call_sid := leg.call_sid;
  new.answered_at := leg.answered_at;
  new.end_time := case when leg.ended_at is not null then greatest(leg.ended_at, leg.created_at) end;
  new.dropped_call := private.is_dropped(leg);
  new.recording_url := coalesce(leg.recording_url, new.recording_url);
  new.recording_sid := coalesce(leg.recording_id, new.recording_sid);
  new.transcript := coalesce(leg.conversation_transcript, new.transcript);
  new.ai_summary := coalesce(leg.summary, new.ai_summary);
  new.sentiment_score := coalesce(leg.sentiment_score, new.sentiment_score);
  return new;
end
$$;
comment on function private.attach_leg() is 'Trigger: a call that names its leg says what the leg says.';
create trigger attach_leg before insert or update of call_log_id on public.calls
  for each row when (new.call_log_id is not null) execute function private.attach_leg();

create function private.update_store_call() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  update public.calls as call
  set
    attempt_status = new.status,
    call_outcome = new.call_status,
    twilio_call_sid = new.call_sid,
    answered_at = new.answered_at,
    end_time = case when new.ended_at is not null then greatest(new.ended_at, call.start_time) end,
    dropped_call = private.is_dropped(new),
    recording_url = coalesce(new.recording_url, call.recording_url),
    recording_sid = coalesce(new.recording_id, call.recording_sid),
    transcript = coalesce(new.conversation_transcript, call.transcript),
    ai_summary = coalesce(new.summary, call.ai_summary),
    sentiment_score = coalesce(new.sentiment_score, call.sentiment_score)
  where call.organization_id = new.organization_id and call.call_log_id = new.id;
  return null;
end
$$;
comment on function private.update_store_call() is 'Trigger: a leg that moves on takes its store''s call along; most legs have none.';
create trigger update_store_call after update on public.call_logs
  for each row when (
    (
      old.status, old.call_status, old.call_sid, old.answered_at, old.ended_at, old.recording_url, old.recording_id,
      old.conversation_transcript, old.summary, old.sentiment_score
    ) is distinct from (
      new.status, new.call_status, new.call_sid, new.answered_at, new.ended_at, new.recording_url, new.recording_id,
      new.conversation_transcript, new.summary, new.sentiment_score
    )
  ) execute function private.update_store_call();

revoke execute on function private.is_dropped(public.call_logs), private.attach_leg(), private.update_store_call() from public;



-- What the voice agent calls a call ------------------------------------------------------------------------------------------------

alter table public.call_logs add column agent_call_id text check (length(agent_call_id) between 1 and 200);
create index idx_call_logs_agent_call_id on public.call_logs (agent_call_id) where agent_call_id is not null;
comment on column public.call_logs.agent_call_id is 'The voice agent''s own id of the conversation; its first event that names both binds it.';


-- How a lead's last call went -----------------------------------------------------------------------------------------------------

create function private.settle_lead() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  if tg_op = 'INSERT' or old.status <> 'ended' then
    -- Calls may be settled in another order than they ended in: the one that ended last stays.
    update public.leads as lead
    set call_log_id = new.id, call_status = new.call_status, last_contacted_at = new.ended_at
    where lead.organization_id = new.organization_id and lead.id = new.lead_id
      and (lead.last_contacted_at is null or (lead.last_contacted_at, coalesce(lead.call_log_id, new.id)) <= (new.ended_at, new.id));
    return null;
  end if;

  -- A correction may also take the place away: then all calls of the lead are looked at, with nobody else at it.
  perform from public.leads as lead where lead.organization_id = new.organization_id and lead.id = new.lead_id for no key update;
  update public.leads as lead
  set call_log_id = last.id, call_status = last.call_status, last_contacted_at = last.ended_at
  from (
    select log.id, log.call_status, log.ended_at
    from public.call_logs as log
    where log.organization_id = new.organization_id and log.lead_id = new.lead_id and log.status = 'ended' and log.dialled
    order by log.ended_at desc, log.id desc
    limit 1
  ) as last
  where lead.organization_id = new.organization_id and lead.id = new.lead_id
    and (lead.call_log_id, lead.call_status, lead.last_contacted_at) is distinct from (last.id, last.call_status, last.ended_at);
  return null;
end
$$;
comment on function private.settle_lead() is
  'Trigger: leads.call_status, call_log_id and last_contacted_at are those of the call that ended last, in whatever order the ends become known.';
revoke execute on function private.settle_lead() from public;
create trigger settle_new_lead after insert on public.call_logs
  for each row when (new.lead_id is not null and new.status = 'ended' and new.dialled) execute function private.settle_lead();
create trigger settle_lead after update of status, call_status, ended_at, dialled on public.call_logs
  for each row when (
    new.lead_id is not null and new.status = 'ended' and new.dialled
    and (old.status, old.call_status, old.ended_at, old.dialled) is distinct from (new.status, new.call_status, new.ended_at, new.dialled)
  ) execute function private.settle_lead();


-- Registers of numbers not to be called -------------------------------------------------------------------------------------------
-- Public registers, for every organization alike: beside suppressions, which are an organization's own. A number is on a register
-- from one version on and until before another, so that it can be said of any call which list it was checked against.

create table private.dnc_registers (
  key          text primary key check (key ~ '^[a-z][a-z0-9_]{1,30}$'),
  name         text not null,
  country_code text not null check (country_code ~ '^[A-Z]{2}$'),
  phone_prefix text not null check (phone_prefix ~ '^\+[1-9][0-9]{0,5}$'),
  max_age      interval not null default '31 days' check (max_age > interval '0'),
  is_enforced  boolean not null default false
);
select private.close_table('private.dnc_registers');
comment on table private.dnc_registers is 'The registers there are. One that is enforced and older than max_age admits no call at all.';
comment on column private.dnc_registers.phone_prefix is 'Which numbers it is about.';
comment on column private.dnc_registers.max_age is 'How old its last version may be: 31 days by 47 CFR 64.1200(c)(2).';
comment on column private.dnc_registers.is_enforced is 'Set by the operator once the first version is loaded; until then the register is only looked at.';
insert into private.dnc_registers (key, name, country_code, phone_prefix)
values
  ('us_national', 'US National Do Not Call Registry', 'US', '+1'),
  ('in_ncpr', 'India National Customer Preference Register', 'IN', '+91');

create table private.dnc_versions (
  register_key text not null references private.dnc_registers (key) on delete restrict,
  number       integer not null check (number > 0),
  label        text not null,
  is_full      boolean not null,
  obtained_at  timestamptz not null,
  published_at timestamptz,
  entries      bigint,
  sha256       bytea check (length(sha256) = 32),
  primary key (register_key, number),
  unique (register_key, label)
);
select private.close_table('private.dnc_versions');
comment on table private.dnc_versions is 'Every version of a register that was loaded. In use from published_at on, and judged by obtained_at.';
comment on column private.dnc_versions.is_full is 'The whole list; otherwise only what came and went since the version before.';
comment on column private.dnc_versions.obtained_at is 'Business time at which the register gave it out: from then on it ages.';
comment on column private.dnc_versions.sha256 is 'Of the file that was loaded.';

create table private.dnc_staged (
  register_key text not null,
  number       integer not null,
  phone_number text not null check (phone_number ~ '^\+[1-9][0-9]{6,14}$'),
  is_removed   boolean not null default false,
  primary key (register_key, number, phone_number),
  foreign key (register_key, number) references private.dnc_versions (register_key, number) on delete cascade
);
select private.close_table('private.dnc_staged');
comment on table private.dnc_staged is 'A version being loaded, by copy; empty again once it is published.';

create table private.dnc_entries (
  phone_number text not null,
  register_key text not null references private.dnc_registers (key) on delete restrict,
  listed_in    integer not null,
  removed_in   integer check (removed_in > listed_in),
  primary key (phone_number, register_key, listed_in)
);
create index idx_dnc_entries_register on private.dnc_entries (register_key, phone_number) where removed_in is null;
select private.close_table('private.dnc_entries');
comment on table private.dnc_entries is 'A number''s stretches on a register: from version listed_in on, and no longer from removed_in on.';

create function private.open_dnc_version(register text, label text, is_full boolean, obtained_at timestamptz) returns integer
language plpgsql volatile security definer set search_path = '' as $$
declare
  opened integer;
begin
  perform from private.dnc_registers as known where known.key = register for no key update;
  if not found then
    raise exception 'there is no register %', register using errcode = 'no_data_found';
  end if;
  insert into private.dnc_versions (register_key, number, label, is_full, obtained_at)
  select register, coalesce(max(version.number), 0) + 1, open_dnc_version.label, open_dnc_version.is_full, open_dnc_version.obtained_at
  from private.dnc_versions as version
  where version.register_key = register
  returning number into opened;
  return opened;
end
$$;
comment on function private.open_dnc_version(text, text, boolean, timestamptz) is
  'Begins a new version of a register and returns its number: its list is then copied into private.dnc_staged.';

create function private.publish_dnc_version(register text, version integer, at timestamptz) returns bigint
language plpgsql volatile security definer set search_path = '' as $$
declare
  opened private.dnc_versions;
  held   bigint;
begin
  perform from private.dnc_registers as known where known.key = register for no key update;
  select candidate.* into opened
  from private.dnc_versions as candidate
  where candidate.register_key = register and candidate.number = publish_dnc_version.version;
  if opened.number is null or opened.published_at is not null then
    raise exception 'version % of % is not open', version, register using errcode = 'no_data_found';
  end if;
  if exists (
    select
    from private.dnc_versions as later
    where later.register_key = register and later.number > opened.number and later.published_at is not null
  ) then
    raise exception 'a later version of % is published already', register using errcode = 'object_not_in_prerequisite_state';
  end if;
  -- An empty full list is a broken download, not a country that may be called.
  if opened.is_full and not exists (
    select from private.dnc_staged as staged where staged.register_key = register and staged.number = opened.number
  ) then
    raise exception 'version % of % is empty', version, register using errcode = 'object_not_in_prerequisite_state';
  end if;

  update private.dnc_entries as entry
  set removed_in = opened.number
  where entry.register_key = register and entry.removed_in is null
    and case
      when opened.is_full then not exists (
        select
        from private.dnc_staged as staged
        where staged.register_key = register and staged.number = opened.number
          and staged.phone_number = entry.phone_number and not staged.is_removed
      )
      else exists (
        select
        from private.dnc_staged as staged
        where staged.register_key = register and staged.number = opened.number
          and staged.phone_number = entry.phone_number and staged.is_removed
      )
    end;
  insert into private.dnc_entries (phone_number, register_key, listed_in)
  select staged.phone_number, register, opened.number
  from private.dnc_staged as staged
  where staged.register_key = register and staged.number = opened.number and not staged.is_removed
    and not exists (
      select
      from private.dnc_entries as entry
      where entry.phone_number = staged.phone_number and entry.register_key = register and entry.removed_in is null
    );
  delete from private.dnc_staged as staged where staged.register_key = register and staged.number = opened.number;
  held := (select count(*) from private.dnc_entries as entry where entry.register_key = register and entry.removed_in is null);
  update private.dnc_versions as published
  set published_at = at, entries = held
  where published.register_key = register and published.number = opened.number;
  return held;
end
$$;
comment on function private.publish_dnc_version(text, integer, timestamptz) is
  'Puts a loaded version in use, all at once, and returns how many numbers the register now holds. Refuses an empty full list.';

create function private.check_dnc(phone text, at timestamptz, out verdict text, out register_key text, out version integer)
language plpgsql stable security definer set search_path = '' as $$
declare
  register record;
begin
  for register in
    select known.key, known.max_age, latest.number, latest.obtained_at
    from private.dnc_registers as known
    left join lateral (
      select published.number, published.obtained_at
      from private.dnc_versions as published
      where published.register_key = known.key and published.published_at <= check_dnc.at
      order by published.number desc
      limit 1
    ) as latest on true
    where known.is_enforced and starts_with(phone, known.phone_prefix)
    order by known.key
  loop
    register_key := register.key;
    version := register.number;
    if register.number is null or register.obtained_at < at - register.max_age then
      verdict := 'register_stale';
      return;
    end if;
    if exists (
      select
      from private.dnc_entries as entry
      where entry.phone_number = phone and entry.register_key = register.key
        and entry.listed_in <= register.number and (entry.removed_in is null or entry.removed_in > register.number)
    ) then
      verdict := 'registered';
      return;
    end if;
  end loop;
end
$$;
comment on function private.check_dnc(text, timestamptz) is
  'Whether a register forbids to call a number: registered, or register_stale when its list is too old to say; null when it may be called. '
  'Names the register and the version that was looked at, for the record.';


-- Calling hours by law ------------------------------------------------------------------------------------------------------------

create table public.calling_hours (
  jurisdiction text not null check (jurisdiction ~ '^[A-Z]{2}(-[A-Z0-9]{1,3})?$'),
  purpose      text not null check (purpose in ('service', 'promotional')),
  weekday      smallint not null check (weekday between 1 and 7),
  opens        time,
  closes       time,
  on_holidays  boolean not null default true,
  daily_calls  smallint check (daily_calls > 0),
  basis        text not null,
  evidence     text not null default 'operator' check (
    evidence in ('rule', 'secondary', 'not verified; stricter default', 'operator')
  ),
  primary key (jurisdiction, purpose, weekday),
  check ((opens is null) = (closes is null)),
  check (opens < closes)
);

revoke all on public.calling_hours from anon, authenticated, service_role;
grant select on public.calling_hours to authenticated, service_role;
alter table public.calling_hours enable row level security;
alter table public.calling_hours force row level security;
create policy "Anyone signed in may read the legal hours" on public.calling_hours
  for select to authenticated using (true);
comment on table public.calling_hours is
  'When the law of a country, and of a state within it, lets somebody be called, in their own local time; both must. Reference data, to be '
  'checked by a lawyer before launch. A country without rows: nobody is called there.';
comment on column public.calling_hours.jurisdiction is 'ISO 3166: a country, or country-state.';
comment on column public.calling_hours.weekday is 'ISO: 1 is Monday, 7 is Sunday.';
comment on column public.calling_hours.opens is 'The opening minute belongs to it, the closing one does not; null is not at all that day.';
comment on column public.calling_hours.on_holidays is 'Whether these hours also hold on a public holiday; otherwise nobody is called on one.';
comment on column public.calling_hours.daily_calls is 'Calls to one person in 24 hours, where the law counts them.';
comment on column public.calling_hours.basis is 'What law or rule it is taken from, as far as that is known.';
comment on column public.calling_hours.evidence is
  'How well it is known. rule: the text of the rule was read; secondary: guides that agree, and not the text itself; not verified: it could not be '
  'confirmed, or guides disagree, and the stricter reading is taken; operator: whoever runs this answers for it.';
insert into public.calling_hours (jurisdiction, purpose, weekday, opens, closes, on_holidays, daily_calls, basis, evidence)
select
  law.jurisdiction, purpose.name, day.number,
  case when day.number = 7 then law.sunday_opens when day.number = 6 then law.saturday_opens else law.opens end::time,
  case when day.number = 7 then law.sunday_closes when day.number = 6 then law.saturday_closes else law.closes end::time,
  law.on_holidays, law.daily_calls, law.basis,
  case law.evidence when 'no' then 'not verified; stricter default' else law.evidence end
from (
  values
    ('US', 'service promotional', '08:00', '21:00', '08:00', '21:00', '08:00', '21:00', true, null::smallint, '47 CFR 64.1200(c)(1)', 'rule'),
    ('US-AL', 'service promotional', '08:00', '20:00', '08:00', '20:00', null, null, false, null, 'Alabama; section not known', 'secondary'),
    ('US-CT', 'service promotional', '09:00', '20:00', '09:00', '20:00', '09:00', '20:00', true, null, 'Conn. Gen. Stat. 42-288a', 'secondary'),
    ('US-FL', 'service promotional', '08:00', '20:00', '08:00', '20:00', '08:00', '20:00', true, 3, 'Fla. Stat. 501.616(6)', 'rule'),
    ('US-KY', 'service promotional', '10:00', '21:00', '10:00', '21:00', '10:00', '21:00', true, null, 'KRS 367.46955', 'secondary'),
    ('US-LA', 'service promotional', '08:00', '20:00', '08:00', '20:00', null, null, false, null, 'LPSC General Order R-29617', 'secondary'),
    ('US-MA', 'service promotional', '08:00', '20:00', '08:00', '20:00', '08:00', '20:00', true, null, 'M.G.L. c. 159C', 'secondary'),
    ('US-MD', 'service promotional', '08:00', '20:00', '08:00', '20:00', '08:00', '20:00', true, 3, 'Md. Com. Law 14-4502', 'secondary'),
    ('US-MI', 'service promotional', '09:00', '21:00', '09:00', '21:00', '09:00', '21:00', true, null, 'Michigan; section not known', 'secondary'),
    ('US-MN', 'service promotional', '09:00', '21:00', '09:00', '21:00', '09:00', '21:00', true, null, 'Minnesota; section not known', 'secondary'),
    -- One guide ends the day at 20:00, the statute at 21:00; the holiday rule is said to be repealed, and is still listed.
    ('US-MS', 'service promotional', '08:00', '20:00', '08:00', '20:00', null, null, false, null, 'Miss. Code 77-3-603, 77-3-723', 'no'),
    -- On Sundays and holidays it is recorded messages that are restricted; a voice that is made counts as one here.
    ('US-NE', 'service promotional', '08:00', '21:00', '08:00', '21:00', '13:00', '21:00', false, null, '291 Neb. Admin. Code 11', 'secondary'),
    ('US-NM', 'service promotional', '09:00', '21:00', '09:00', '21:00', '09:00', '21:00', true, null, 'New Mexico; section not known', 'secondary'),
    ('US-NV', 'service promotional', '09:00', '20:00', '09:00', '20:00', '09:00', '20:00', true, null, 'NRS 597.814; guides', 'secondary'),
    -- From nine on by the rule for automatic announcing devices, to eight by the newer one for automatic selection.
    ('US-OK', 'service promotional', '09:00', '20:00', '09:00', '20:00', '09:00', '20:00', true, 3, 'Okla. Stat. 15-755.1, 15-775C.4', 'secondary'),
    ('US-PA', 'service promotional', '08:00', '21:00', '08:00', '12:00', '08:00', '21:00', false, null, '73 P.S. 2245(a); Saturday by one guide', 'no'),
    ('US-RI', 'service promotional', '09:00', '18:00', '10:00', '17:00', null, null, false, null, 'R.I. Gen. Laws 5-61-2, 5-61-3.6', 'rule'),
    -- Automated dialling on weekdays alone.
    ('US-SD', 'service promotional', '09:00', '21:00', null, null, null, null, true, null, 'S.D. Codified Laws 37-30-28', 'rule'),
    ('US-TX', 'service promotional', '09:00', '21:00', '09:00', '21:00', '12:00', '21:00', true, null, 'Texas; section not known', 'no'),
    ('US-UT', 'service promotional', '08:00', '21:00', '08:00', '21:00', null, null, false, null, 'Utah Code 13-25a-103(3)', 'rule'),
    ('US-WA', 'service promotional', '08:00', '20:00', '08:00', '20:00', '08:00', '20:00', true, null, 'RCW 19.158.040(2)', 'rule'),
    ('US-WY', 'service promotional', '08:00', '20:00', '08:00', '20:00', '08:00', '20:00', true, null, 'Wyoming; section not known', 'no'),
    ('IN', 'service', '09:00', '21:00', '09:00', '21:00', '09:00', '21:00', true, null, 'TRAI TCCCPR 2010', 'secondary'),
    ('IN', 'promotional', '10:00', '21:00', '10:00', '21:00', '10:00', '21:00', true, null, 'India; common practice', 'no')
) as law (
  jurisdiction, purposes, opens, closes, saturday_opens, saturday_closes, sunday_opens, sunday_closes, on_holidays, daily_calls, basis,
  evidence
)
cross join lateral unnest(string_to_array(law.purposes, ' ')) as purpose (name)
cross join generate_series(1, 7) as day (number);

create table public.calling_holidays (
  jurisdiction text not null check (jurisdiction ~ '^[A-Z]{2}(-[A-Z0-9]{1,3})?$'),
  day          date not null,
  name         text not null,
  evidence     text not null default 'operator' check (
    evidence in ('rule', 'secondary', 'not verified; stricter default', 'operator')
  ),
  primary key (jurisdiction, day)
);

revoke all on public.calling_holidays from anon, authenticated, service_role;
grant select on public.calling_holidays to authenticated, service_role;
alter table public.calling_holidays enable row level security;
alter table public.calling_holidays force row level security;
create policy "Anyone signed in may read the holidays" on public.calling_holidays
  for select to authenticated using (true);
comment on table public.calling_holidays is
  'Public holidays, of a country or of a state alone; the operator adds each year''s. They matter where calling_hours says so: there nobody is '
  'called after the last one that is known of the country.';
comment on column public.calling_holidays.evidence is
  'As in calling_hours. rule is 5 U.S.C. 6103; the Friday before a Saturday and the Monday after a Sunday are taken along.';
insert into public.calling_holidays (jurisdiction, day, name, evidence)
values
  ('US', '2026-11-26', 'Thanksgiving Day', 'rule'), ('US', '2026-12-25', 'Christmas Day', 'rule'),
  ('US', '2027-01-01', 'New Year''s Day', 'rule'), ('US', '2027-01-18', 'Martin Luther King Jr. Day', 'rule'),
  ('US', '2027-02-15', 'Washington''s Birthday', 'rule'), ('US', '2027-05-31', 'Memorial Day', 'rule'),
  ('US', '2027-06-18', 'Juneteenth (observed)', 'rule'), ('US', '2027-06-19', 'Juneteenth', 'rule'),
  ('US', '2027-07-04', 'Independence Day', 'rule'), ('US', '2027-07-05', 'Independence Day (observed)', 'rule'),
  ('US', '2027-09-06', 'Labor Day', 'rule'), ('US', '2027-10-11', 'Columbus Day', 'rule'), ('US', '2027-11-11', 'Veterans Day', 'rule'),
  ('US', '2027-11-25', 'Thanksgiving Day', 'rule'), ('US', '2027-12-24', 'Christmas Day (observed)', 'rule'),
  ('US', '2027-12-25', 'Christmas Day', 'rule'), ('US', '2027-12-31', 'New Year''s Day (observed)', 'rule'),
  ('US', '2028-01-01', 'New Year''s Day', 'rule'),
  ('US-AL', '2027-02-09', 'Mardi Gras', 'not verified; stricter default'),
  ('US-AL', '2027-04-26', 'Confederate Memorial Day', 'not verified; stricter default'),
  ('US-AL', '2027-06-07', 'Jefferson Davis'' Birthday', 'not verified; stricter default'),
  ('US-LA', '2027-01-08', 'Battle of New Orleans', 'secondary'), ('US-LA', '2027-01-19', 'Robert E. Lee Day', 'secondary'),
  ('US-LA', '2027-02-09', 'Mardi Gras', 'not verified; stricter default'),
  ('US-LA', '2027-03-26', 'Good Friday', 'not verified; stricter default'),
  ('US-MS', '2027-04-26', 'Confederate Memorial Day', 'not verified; stricter default'),
  ('US-PA', '2027-03-26', 'Good Friday', 'not verified; stricter default'),
  ('US-PA', '2027-06-14', 'Flag Day', 'not verified; stricter default'),
  ('US-RI', '2027-08-09', 'Victory Day', 'secondary'),
  ('US-UT', '2027-07-23', 'Pioneer Day (observed)', 'not verified; stricter default'), ('US-UT', '2027-07-24', 'Pioneer Day', 'secondary');

create function private.legal_hours(
  country text, region text, wanted text, day date, out opens time, out closes time, out daily_calls smallint
)
language plpgsql stable security definer set search_path = '' as $$
begin
  -- The country's and the state's hours at once; what either forbids is forbidden.
  select max(law.opens), min(law.closes), min(law.daily_calls)
  into opens, closes, daily_calls
  from public.calling_hours as law
  where law.jurisdiction in (country, country || '-' || region) and law.purpose = wanted and law.weekday = extract(isodow from day);
  if opens >= closes
    or not exists (
      select from public.calling_hours as law where law.jurisdiction = country and law.purpose = wanted
    )
    or exists (
      select
      from public.calling_hours as law
      where law.jurisdiction in (country, country || '-' || region) and law.purpose = wanted and law.weekday = extract(isodow from day)
        and (
          law.opens is null
          or not law.on_holidays and (
            exists (
              select
              from public.calling_holidays as holiday
              where holiday.jurisdiction in (country, country || '-' || region) and holiday.day = legal_hours.day
            )
            -- Of a year whose holidays nobody entered it is not known which days they are.
            or legal_hours.day > coalesce(
              (select max(holiday.day) from public.calling_holidays as holiday where holiday.jurisdiction = country), '-infinity'
            )
          )
        )
    )
  then
    opens := null;
    closes := null;
  end if;
end
$$;
comment on function private.legal_hours(text, text, text, date) is
  'The local hours in which the law of a country and state allows a call on a day; null when it does not, or when nothing is known of the country.';

revoke execute on function
  private.open_dnc_version(text, text, boolean, timestamptz), private.publish_dnc_version(text, integer, timestamptz),
  private.check_dnc(text, timestamptz), private.legal_hours(text, text, text, date)
from public;


-- websocket_sessions --------------------------------------------------------------------------------------------------------------

create table public.websocket_sessions (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null references public.organizations (id) on delete cascade,
  kind            text not null check (kind in ('dashboard', 'agent')),
  user_id         uuid,
  call_log_id     uuid,
  agent_id        uuid,
  connection_id   text not null unique check (length(connection_id) between 1 and 255),
  metadata        jsonb not null default '{}' check (jsonb_typeof(metadata) = 'object'),
  created_at      timestamptz not null default private.clock_now(),
  last_ping_at    timestamptz not null default now(),
  unique (organization_id, id),
  foreign key (organization_id, user_id) references public.profiles (organization_id, id) on delete cascade,
  foreign key (organization_id, call_log_id) references public.call_logs (organization_id, id) on delete cascade,
  check (case kind when 'dashboard' then user_id is not null and call_log_id is null else call_log_id is not null and user_id is null end)
) with (fillfactor = 70);
create index idx_websocket_sessions_user on public.websocket_sessions (organization_id, user_id) where user_id is not null;
-- A call has one voice: the second socket of a leg is refused while the first lives.
create unique index idx_websocket_sessions_call on public.websocket_sessions (organization_id, call_log_id) where call_log_id is not null;
create index idx_websocket_sessions_last_ping on public.websocket_sessions (last_ping_at);

revoke all on public.websocket_sessions from anon, authenticated, service_role;
-- Not the connection's id: whoever has it could speak on it.
grant select (id, organization_id, kind, user_id, call_log_id, agent_id, metadata, created_at, last_ping_at)
on public.websocket_sessions to authenticated;
grant select on public.websocket_sessions to service_role;
alter table public.websocket_sessions enable row level security;
alter table public.websocket_sessions force row level security;
create policy "Users see their own sockets, and who views calls their agents'" on public.websocket_sessions
  for select to authenticated
  using (
    organization_id = (select private.get_auth_org_id()) and user_id = (select auth.uid())
    or organization_id = (select private.org_with('call.view')) and kind = 'agent'
  );
comment on table public.websocket_sessions is
  'Sockets that are open now: a user''s dashboard, or the voice agent of one leg. Written by handlers, kept by pings, reaped without them.';
comment on column public.websocket_sessions.connection_id is 'What the socket server or gateway calls it.';
comment on column public.websocket_sessions.last_ping_at is 'Real time.';

create function private.open_websocket(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  socket public.websocket_sessions;
  leg    public.call_logs;
begin
  if coalesce(request ->> 'connection_id', '') = '' or length(request ->> 'connection_id') > 255
    or request ->> 'kind' not in ('dashboard', 'agent') or request ->> 'kind' is null
  then
    perform private.raise_error(400, 'malformed_request', 'connection_id and kind are required');
  end if;
  -- Whose it is follows from the user or the leg; no caller names an organization.
  if request ->> 'kind' = 'dashboard' then
    select profile.organization_id, profile.id into socket.organization_id, socket.user_id
    from public.profiles as profile
    where profile.id = (request ->> 'user_id')::uuid and profile.status = 'active' and profile.organization_id is not null
    for key share;
    if socket.user_id is null then
      perform private.raise_error(403, 'no_organization', 'The user belongs to no organization', 'user_id');
    end if;
  else
    select log.* into leg from public.call_logs as log where log.id = (request ->> 'attempt_id')::uuid for key share;
    if leg.id is null then
      perform private.raise_error(404, 'call_not_found', 'There is no such call', 'attempt_id');
    end if;
    if leg.status = 'ended' then
      perform private.raise_error(409, 'call_ended', 'The call has ended', 'attempt_id');
    end if;
  end if;
  delete from public.websocket_sessions as lapsed
  where (lapsed.connection_id = request ->> 'connection_id' or lapsed.organization_id = leg.organization_id and lapsed.call_log_id = leg.id)
    and lapsed.last_ping_at < now() - interval '90 seconds';
  insert into public.websocket_sessions (organization_id, kind, user_id, call_log_id, agent_id, connection_id, metadata, created_at, last_ping_at)
  values (
    coalesce(leg.organization_id, socket.organization_id), request ->> 'kind', socket.user_id, leg.id, leg.agent_id,
    request ->> 'connection_id', coalesce(request -> 'metadata', '{}'), at, now()
  )
  on conflict do nothing
  returning * into socket;
  if socket.id is null then
    perform private.raise_error(409, 'already_connected', 'There is a live socket of this connection or call', 'connection_id');
  end if;
  return jsonb_build_object('id', socket.id, 'organization_id', socket.organization_id);
end
$$;
comment on function private.open_websocket(jsonb, timestamptz) is 'Writes down a socket that was opened, for the tenant of its user or leg.';

create function public.open_websocket(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.open_websocket($1, private.clock_now())
$$;
comment on function public.open_websocket(jsonb) is
  '{"v":1,"connection_id":text,"kind":"dashboard","user_id":uuid} or {…"kind":"agent","attempt_id":uuid} -> {"id","organization_id"}. '
  '409 while another socket of the call or connection lives.';

create function private.ping_websockets(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  asked text[] := array(select jsonb_array_elements_text(request -> 'connection_ids'));
  alive text[];
begin
  with pinged as (
    select socket.id
    from public.websocket_sessions as socket
    where socket.connection_id = any (asked)
    order by socket.id
    for no key update
  ),
  moved as (
    update public.websocket_sessions as socket
    set last_ping_at = greatest(socket.last_ping_at, now())
    from pinged
    where socket.id = pinged.id
    returning socket.connection_id
  )
  select coalesce(array_agg(moved.connection_id), '{}') into alive from moved;
  return jsonb_build_object('gone', (
    select coalesce(jsonb_agg(missing.id), '[]') from unnest(asked) as missing (id) where missing.id <> all (alive)
  ));
end
$$;
comment on function private.ping_websockets(jsonb, timestamptz) is 'Keeps sockets alive, and names those that are no longer known: their server closes them.';

create function public.ping_websockets(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.ping_websockets($1, private.clock_now())
$$;
comment on function public.ping_websockets(jsonb) is
  '{"v":1,"connection_ids":[text]} -> {"gone":[text]}: reaped, or of a user who may no longer see anything. At least once in 60 seconds.';

create function private.close_websocket(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  closed integer;
begin
  delete from public.websocket_sessions as socket where socket.connection_id = request ->> 'connection_id';
  get diagnostics closed = row_count;
  return jsonb_build_object('closed', closed);
end
$$;
comment on function private.close_websocket(jsonb, timestamptz) is 'Forgets a socket that was closed; again changes nothing.';

create function public.close_websocket(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.close_websocket($1, private.clock_now())
$$;
comment on function public.close_websocket(jsonb) is '{"v":1,"connection_id":text} -> {"closed":0|1}.';

create function private.reap_websockets(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  most   constant integer := least(greatest(coalesce((request ->> 'limit')::integer, 1000), 1), 10000);
  reaped jsonb;
begin
  with lapsed as (
    select socket.id
    from public.websocket_sessions as socket
    where socket.last_ping_at < now() - interval '90 seconds'
    order by socket.last_ping_at
    limit most
    for update skip locked
  ),
  gone as (
    delete from public.websocket_sessions as socket
    using lapsed
    where socket.id = lapsed.id
    returning socket.kind, socket.organization_id, socket.call_log_id, socket.connection_id
  )
  select jsonb_build_object(
    'reaped', count(*),
    'calls', coalesce(
      jsonb_agg(jsonb_build_object('organization_id', gone.organization_id, 'attempt_id', gone.call_log_id))
        filter (where gone.kind = 'agent' and exists (
          select from public.call_logs as log where log.id = gone.call_log_id and log.status <> 'ended'
        )),
      '[]'
    )
  )
  into reaped
  from gone;
  return reaped;
end
$$;
comment on function private.reap_websockets(jsonb, timestamptz) is
  'Forgets sockets that have not been heard of for 90 seconds, and names the calls that go on without their agent.';

create function public.reap_websockets(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.reap_websockets($1, private.clock_now())
$$;
comment on function public.reap_websockets(jsonb) is
  '{"v":1,"limit":1000} -> {"reaped":n,"calls":[{"organization_id","attempt_id"}]}: calls under way whose agent is gone. Every minute.';

create function private.drop_websockets() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  delete from public.websocket_sessions as socket where socket.organization_id = old.organization_id and socket.user_id = old.id;
  return new;
end
$$;
comment on function private.drop_websockets() is
  'Trigger: who is suspended, removed or in another organization has no socket of the old one; the next ping tells its server.';
create trigger drop_websockets before update of status, organization_id on public.profiles
  for each row when (
    old.organization_id is not null and (new.status <> 'active' or new.organization_id is distinct from old.organization_id)
  ) execute function private.drop_websockets();

revoke execute on function private.drop_websockets() from public;
revoke execute on function
  public.open_websocket(jsonb), public.ping_websockets(jsonb), public.close_websocket(jsonb), public.reap_websockets(jsonb),
  private.open_websocket(jsonb, timestamptz), private.ping_websockets(jsonb, timestamptz),
  private.close_websocket(jsonb, timestamptz), private.reap_websockets(jsonb, timestamptz)
from public, anon, authenticated, service_role;
grant execute on function
  public.open_websocket(jsonb), public.ping_websockets(jsonb), public.close_websocket(jsonb), public.reap_websockets(jsonb),
  private.open_websocket(jsonb, timestamptz), private.ping_websockets(jsonb, timestamptz),
  private.close_websocket(jsonb, timestamptz), private.reap_websockets(jsonb, timestamptz)
to service_role;


-- The agent's stream, and where a call was transferred to ---------------------------------------------------------------------------
-- The words stand in the order of their rank: whichever report comes first, the later word stays.

alter table public.call_logs
  add column stream_id text,
  add column stream_status text check (stream_status in ('started', 'degraded', 'stopped', 'failed')),
  add column stream_error text,
  add column transfer_sid text,
  add column transfer_status text check (
    transfer_status in ('initiated', 'ringing', 'cancelled', 'failed', 'no_answer', 'busy', 'answered', 'completed')
  );
comment on column public.call_logs.stream_id is 'The carrier''s id of the agent''s audio stream.';
comment on column public.call_logs.stream_status is 'How the agent''s audio stream fares, as the carrier says.';
comment on column public.call_logs.stream_error is 'What broke the stream, in the carrier''s words.';
comment on column public.call_logs.transfer_sid is 'The carrier''s id of the leg to the person that the call was transferred to.';
comment on column public.call_logs.transfer_status is 'How the transfer fared: of two tries one that was answered counts.';
-- 07_plans_and_usage.sql

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
  tier        public.org_tier,
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

create function private.fill_tier() returns trigger
language plpgsql set search_path = '' as $$
begin
  if new.slug = any (enum_range(null::public.org_tier)::text[]) then
    new.tier := new.slug::public.org_tier;
  end if;
  return new;
end
$$;
comment on function private.fill_tier() is 'Trigger: a plan that is called like a tier is of that tier, unless told otherwise.';
revoke execute on function private.fill_tier() from public;
create trigger fill_tier before insert on public.subscription_plans
  for each row when (new.tier is null) execute function private.fill_tier();

comment on table public.subscription_plans is
  'What can be subscribed to. What it costs and meters is in plan_prices; `features` holds the limits that are not metered.';
comment on column public.subscription_plans.features is
  'Limits on things that are not metered (max_users, max_leads) and what is switched on; -1 is unlimited.';
comment on column public.subscription_plans.tier is 'What organizations.tier becomes on this plan; null leaves it as it is.';
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
  credit_price_minor  bigint,
  credit_unit         bigint not null default 60,
  credit_pulse        bigint not null default 1,
  constraint plan_price_meters_pkey primary key (plan_price_id, meter_key),
  constraint plan_price_meters_included_range check (included_units >= -1),
  constraint plan_price_meters_overage_price_not_negative check (overage_price_minor >= 0),
  constraint plan_price_meters_overage_unit_positive check (overage_unit > 0),
  constraint plan_price_meters_limit_range check (limit_units >= -1),
  constraint plan_price_meters_credit_price_not_negative check (credit_price_minor >= 0),
  constraint plan_price_meters_credit_unit_positive check (credit_unit > 0),
  constraint plan_price_meters_credit_pulse_positive check (credit_pulse > 0),
  constraint plan_price_meters_credit_buys_calling check (credit_price_minor is null or meter_key in ('ai_calls', 'call_seconds')),
  constraint plan_price_meters_calls_sold_one_way check (
    meter_key <> 'ai_calls' or credit_price_minor is null or overage_price_minor is null
  )
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
comment on column public.plan_price_meters.credit_price_minor is
  'Price of each `credit_unit` seconds in prepaid credit, for seconds beyond the included ones, or for all seconds of a call beyond the '
  'included calls; null is not paid with credit. Credit comes before overage, and where there is no overage price nothing is dialled '
  'without it. A call costs its pulses, rounded once to the minor unit, half away from zero.';
comment on column public.plan_price_meters.credit_unit is 'How many seconds the credit price is for.';
comment on column public.plan_price_meters.credit_pulse is
  'Credit pays for started multiples of this many seconds of a call: 1 is by the second, 60 by the started minute.';

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

create function private.follow_tier() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  -- Without a live subscription an organization is on none of the plans that cost.
  update public.organizations as organization
  set tier = coalesce(live.tier, 'free')
  from (
    select
      tenant.id, subscription.id is not null as is_subscribed, plan.tier
    from public.organizations as tenant
    left join public.subscriptions as subscription
      on subscription.organization_id = tenant.id and subscription.status not in ('cancelled', 'inactive')
    left join public.subscription_plans as plan on plan.id = subscription.plan_id
    where case tg_table_name
      when 'subscriptions' then tenant.id = (to_jsonb(new) ->> 'organization_id')::uuid
      else subscription.plan_id = (to_jsonb(new) ->> 'id')::uuid
    end
  ) as live
  where organization.id = live.id
    and (live.tier is not null or not live.is_subscribed)
    and organization.tier <> coalesce(live.tier, 'free');
  return null;
end
$$;
comment on function private.follow_tier() is 'Trigger: organizations.tier is that of the plan which is subscribed to, in the same transaction.';
revoke execute on function private.follow_tier() from public;
create trigger follow_tier_of_new after insert on public.subscriptions
  for each row execute function private.follow_tier();
create trigger follow_tier after update of plan_id, status on public.subscriptions
  for each row when (old.plan_id <> new.plan_id or old.status <> new.status) execute function private.follow_tier();
create trigger follow_tier after update of tier on public.subscription_plans
  for each row when (old.tier is distinct from new.tier) execute function private.follow_tier();

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

-- What a plan has room for --------------------------------------------------------------------------------------------------------
-- max_leads, max_projects and max_campaigns of the plan, or of subscriptions.metadata.custom_limits. A plan that names none, and -1, limit
-- nothing; what is archived takes no room. Counted behind a lock, so that two at once do not both take the last place.

create function private.plan_limit(organization uuid, feature_key text) returns bigint
language plpgsql stable security definer set search_path = '' as $$
declare
  allowed jsonb := (
    select coalesce(nullif(subscription.metadata #> array['custom_limits', feature_key], 'null'), plan.features -> feature_key)
    from public.subscriptions as subscription
    join public.subscription_plans as plan on plan.id = subscription.plan_id
    where subscription.organization_id = organization and subscription.status not in ('cancelled', 'inactive')
  );
begin
  return case when jsonb_typeof(allowed) = 'number' and allowed::numeric >= 0 then floor(allowed::numeric) end;
end
$$;
comment on function private.plan_limit(uuid, text) is 'How many of something an organization''s plan has room for; null is no limit.';

create function private.check_limit(organization uuid, counted text) returns void
language plpgsql volatile security definer set search_path = '' as $$
declare
  allowed bigint := private.plan_limit(organization, 'max_' || counted);
  used    bigint;
begin
  if allowed is null then
    return;
  end if;
  perform pg_advisory_xact_lock(hashtextextended('trunkline.plan_limit ' || organization::text, 0));
  -- One more than there may be is enough to know.
  used := case counted
    when 'leads' then (
      select count(*)
      from (
        select from public.leads as lead where lead.organization_id = organization and lead.archived_at is null limit allowed + 1
      ) as some_of_them
    )
    when 'projects' then (
      select count(*)
      from (
        select from public.projects as project where project.organization_id = organization and project.status <> 'archived' limit allowed + 1
      ) as some_of_them
    )
    when 'campaigns' then (
      select count(*)
      from (
        select
        from public.campaigns as campaign
        where campaign.organization_id = organization and campaign.status <> 'archived'
        limit allowed + 1
      ) as some_of_them
    )
  end;
  if used > allowed then
    perform private.raise_error(402, 'quota_exhausted', format('The plan has room for %s %s', allowed, counted));
  end if;
end
$$;
comment on function private.check_limit(uuid, text) is
  'Ends the request with 402 when an organization has more leads, projects or campaigns than its plan has room for.';

create function private.enforce_limit() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  tenant uuid;
begin
  if tg_level = 'ROW' then
    perform private.check_limit(new.organization_id, tg_table_name);
    return null;
  end if;
  for tenant in select distinct added.organization_id from added order by added.organization_id loop
    perform private.check_limit(tenant, tg_table_name);
  end loop;
  return null;
end
$$;
comment on function private.enforce_limit() is 'Trigger: what is added, or taken out of the archive, fits into the plan.';
revoke execute on function private.plan_limit(uuid, text), private.check_limit(uuid, text), private.enforce_limit() from public;

create trigger enforce_limit after insert on public.leads
  referencing new table as added for each statement execute function private.enforce_limit();
create trigger enforce_limit_again after update of archived_at on public.leads
  for each row when (old.archived_at is not null and new.archived_at is null) execute function private.enforce_limit();
create trigger enforce_limit after insert on public.projects
  referencing new table as added for each statement execute function private.enforce_limit();
create trigger enforce_limit_again after update of status on public.projects
  for each row when (old.status = 'archived' and new.status <> 'archived') execute function private.enforce_limit();
create trigger enforce_limit after insert on public.campaigns
  referencing new table as added for each statement execute function private.enforce_limit();
create trigger enforce_limit_again after update of status on public.campaigns
  for each row when (old.status = 'archived' and new.status <> 'archived') execute function private.enforce_limit();


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
  prepaid         bigint not null default 0,
  constraint usage_logs_tenant_key unique (organization_id, id),
  constraint usage_logs_period_key unique (organization_id, feature_key, period_start),
  constraint usage_logs_periods_apart exclude using gist (
    organization_id with =, feature_key with =, daterange(period_start, period_end) with &&
  ),
  constraint usage_logs_period_ordered check (period_start < period_end),
  constraint usage_logs_count_not_negative check (usage_count >= 0),
  constraint usage_logs_reserved_not_negative check (reserved >= 0),
  constraint usage_logs_prepaid_range check (prepaid between 0 and usage_count)
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
comment on column public.usage_logs.prepaid is
  'Of the units used, those that were charged to prepaid credit: they use up nothing that is included, and no invoice bills them again. '
  'Equals the sum of usage_days over the period.';
comment on column public.usage_logs.period_start is 'First local day of the period.';
comment on column public.usage_logs.period_end is 'First local day after the period.';
comment on column public.usage_logs.closed_at is 'Since when the period is billed: usage that arrives later counts in the next one.';

create table public.usage_days (
  organization_id uuid not null references public.organizations (id) on delete restrict,
  meter_key       text not null references public.meters (key) on delete restrict,
  day             date not null,
  quantity        bigint not null default 0,
  events          bigint not null default 0,
  prepaid         bigint not null default 0,
  constraint usage_days_pkey primary key (organization_id, meter_key, day),
  constraint usage_days_quantity_not_negative check (quantity >= 0),
  constraint usage_days_events_not_negative check (events >= 0),
  constraint usage_days_prepaid_range check (prepaid between 0 and quantity)
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
comment on column public.usage_days.prepaid is 'Of the units used, those that were charged to prepaid credit and are not billed.';

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


-- Prepaid credit ------------------------------------------------------------------------------------------------------------------
--
-- A double-entry ledger. Credit is held in accounts of the organization: what a plan grants for a month, what was given away, what
-- was bought; they are used up in this order, the one that expires first before the others. Every movement is one transaction whose
-- debits equal its credits, and has a counterpart account that says where the credit came from or went: all accounts of a wallet
-- add up to zero at any time. Nothing is ever changed or deleted; balances follow from the entries by trigger.

create table public.call_credits (
  id                    uuid primary key default gen_random_uuid(),
  organization_id       uuid not null references public.organizations (id) on delete restrict,
  currency              text not null,
  balance_minor         bigint not null default 0,
  total_purchased_minor bigint not null default 0,
  total_consumed_minor  bigint not null default 0,
  last_number           bigint not null default 0,
  low_balance_minor     bigint,
  created_at            timestamptz not null default private.clock_now(),
  updated_at            timestamptz not null default private.clock_now(),
  held_minor            bigint not null default 0,
  constraint call_credits_tenant_key unique (organization_id, id),
  constraint call_credits_currency_key unique (organization_id, currency),
  constraint call_credits_currency_format check (currency ~ '^[A-Z]{3}$'),
  constraint call_credits_balance_not_negative check (balance_minor >= 0),
  constraint call_credits_totals_not_negative check (total_purchased_minor >= 0 and total_consumed_minor >= 0),
  constraint call_credits_last_number_not_negative check (last_number >= 0),
  constraint call_credits_low_balance_not_negative check (low_balance_minor >= 0),
  constraint call_credits_held_not_negative check (held_minor >= 0)
) with (fillfactor = 50);

revoke all on public.call_credits from anon, authenticated, service_role;
grant select on public.call_credits to authenticated, service_role;
alter table public.call_credits enable row level security;
alter table public.call_credits force row level security;
create policy "Members who may see billing see the credit" on public.call_credits
  for select to authenticated using (organization_id = (select private.org_with('billing.view')));

create trigger update_modified_column before update on public.call_credits
  for each row execute function private.update_modified_column();

comment on table public.call_credits is
  'An organization''s prepaid credit, one wallet a currency. Its row is the lock under which every transaction of the wallet is written.';
comment on column public.call_credits.balance_minor is
  'What can be spent, in the currency''s minor unit: the sum of the accounts that hold credit. Credit that expired is taken out by the '
  'next transaction or the next run of expire_credit(), whichever comes first.';
comment on column public.call_credits.total_purchased_minor is 'What was bought so far, less what was paid back.';
comment on column public.call_credits.total_consumed_minor is 'What was used so far, less what was given back.';
comment on column public.call_credits.last_number is 'The number of the wallet''s last transaction.';
comment on column public.call_credits.held_minor is
  'Of the balance, what is held for calls under way: no other call begins on it, and it is not paid back. More than the balance when '
  'credit expired meanwhile.';
comment on column public.call_credits.low_balance_minor is 'Below this balance `credit.low` is told, once a billing period; null is never.';

create table public.credit_accounts (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null,
  currency        text not null,
  kind            public.credit_account_kind not null,
  expires_at      timestamptz,
  balance_minor   bigint not null default 0,
  created_at      timestamptz not null default private.clock_now(),
  constraint credit_accounts_tenant_key unique (organization_id, id),
  constraint credit_accounts_kind_key unique nulls not distinct (organization_id, currency, kind, expires_at),
  constraint credit_accounts_wallet_fkey foreign key (organization_id, currency)
    references public.call_credits (organization_id, currency) on delete restrict,
  constraint credit_accounts_balance_not_negative check (kind > 'purchased' or balance_minor >= 0),
  constraint credit_accounts_expiry_fits check (
    case kind when 'monthly' then expires_at is not null when 'promotional' then true else expires_at is null end
  )
) with (fillfactor = 50);

create index idx_credit_accounts_expiry on public.credit_accounts (expires_at) where balance_minor > 0 and expires_at is not null;

revoke all on public.credit_accounts from anon, authenticated, service_role;
grant select on public.credit_accounts to authenticated, service_role;
alter table public.credit_accounts enable row level security;
alter table public.credit_accounts force row level security;
create policy "Members who may see billing see the credit accounts" on public.credit_accounts
  for select to authenticated using (organization_id = (select private.org_with('billing.view')));

comment on table public.credit_accounts is
  'The accounts of a wallet: one a kind and expiry. Those that hold credit are never negative; their counterparts mostly are one or '
  'the other for ever.';
comment on column public.credit_accounts.kind is
  'monthly, promotional, purchased hold credit and are used in this order; payments, grants, consumption, expiry and adjustments are '
  'where it came from or went.';
comment on column public.credit_accounts.expires_at is 'From when on its credit is no longer spent; null is never.';
comment on column public.credit_accounts.balance_minor is 'Its credits less its debits.';

create table public.credit_transactions (
  id                   uuid primary key default gen_random_uuid(),
  organization_id      uuid not null,
  currency             text not null,
  number               bigint not null,
  type                 public.credit_transaction_type not null,
  amount_minor         bigint not null,
  requested_minor      bigint not null,
  balance_before_minor bigint not null,
  balance_after_minor  bigint not null,
  idempotency_key      text not null,
  reverses_id          uuid,
  reference_type       text,
  reference_id         uuid,
  description          text,
  created_by           uuid,
  created_at           timestamptz not null,
  constraint credit_transactions_tenant_key unique (organization_id, id),
  constraint credit_transactions_number_key unique (organization_id, currency, number),
  constraint credit_transactions_idempotency_key unique (organization_id, idempotency_key),
  constraint credit_transactions_wallet_fkey foreign key (organization_id, currency)
    references public.call_credits (organization_id, currency) on delete restrict,
  constraint credit_transactions_reverses_fkey foreign key (organization_id, reverses_id)
    references public.credit_transactions (organization_id, id) on delete restrict,
  constraint credit_transactions_number_positive check (number > 0),
  constraint credit_transactions_amount_positive check (amount_minor > 0),
  constraint credit_transactions_requested_range check (requested_minor >= amount_minor),
  constraint credit_transactions_balance_not_negative check (balance_before_minor >= 0 and balance_after_minor >= 0),
  constraint credit_transactions_key_present check (length(idempotency_key) between 1 and 255),
  constraint credit_transactions_refund_reverses check ((type = 'refund') = (reverses_id is not null)),
  constraint credit_transactions_adjustment_explained check (type <> 'adjustment' or btrim(description) <> '' and description is not null)
);

create index idx_credit_transactions_org_time on public.credit_transactions (organization_id, created_at desc);
create index idx_credit_transactions_reverses on public.credit_transactions (organization_id, reverses_id) where reverses_id is not null;

revoke all on public.credit_transactions from anon, authenticated, service_role;
grant select on public.credit_transactions to authenticated, service_role;
alter table public.credit_transactions enable row level security;
alter table public.credit_transactions force row level security;
create policy "Members who may see billing see the credit transactions" on public.credit_transactions
  for select to authenticated using (organization_id = (select private.org_with('billing.view')));

comment on table public.credit_transactions is
  'Every movement of prepaid credit, append-only: what it was, how much, and the balance before and after. Its entries are in '
  'credit_ledger.';
comment on column public.credit_transactions.number is 'Counts the wallet''s transactions without a gap: its balances form a chain.';
comment on column public.credit_transactions.amount_minor is 'How much moved, always positive; the balances tell the direction.';
comment on column public.credit_transactions.requested_minor is
  'How much was to move: more than the amount where a call used more than was left, which is then what stays unpaid.';
comment on column public.credit_transactions.idempotency_key is 'Whoever writes the same again under this key writes nothing.';
comment on column public.credit_transactions.reverses_id is
  'What a refund gives back, in part or in full: a consumption, to the accounts that it was taken from; or a purchase, in money.';
comment on column public.credit_transactions.reference_type is 'What it was for: call, payment, subscription.';
comment on column public.credit_transactions.reference_id is 'The id of what it was for. No foreign key: the record outlives it.';
comment on column public.credit_transactions.created_by is 'The user who did it; null is the platform. No foreign key, as before.';

create table public.credit_ledger (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null,
  transaction_id  uuid not null,
  position        integer not null,
  account_id      uuid not null,
  side            public.ledger_side not null,
  amount_minor    bigint not null,
  constraint credit_ledger_tenant_key unique (organization_id, id),
  constraint credit_ledger_position_key unique (organization_id, transaction_id, position),
  constraint credit_ledger_transaction_fkey foreign key (organization_id, transaction_id)
    references public.credit_transactions (organization_id, id) on delete restrict,
  constraint credit_ledger_account_fkey foreign key (organization_id, account_id)
    references public.credit_accounts (organization_id, id) on delete restrict,
  constraint credit_ledger_position_positive check (position > 0),
  constraint credit_ledger_amount_positive check (amount_minor > 0)
);

create index idx_credit_ledger_account on public.credit_ledger (organization_id, account_id);

revoke all on public.credit_ledger from anon, authenticated, service_role;
grant select on public.credit_ledger to authenticated, service_role;
alter table public.credit_ledger enable row level security;
alter table public.credit_ledger force row level security;
create policy "Members who may see billing see the credit ledger" on public.credit_ledger
  for select to authenticated using (organization_id = (select private.org_with('billing.view')));

comment on table public.credit_ledger is
  'The entries of the credit transactions, append-only: each moves an amount on one side of one account. In every transaction debits '
  'equal credits.';

create function private.credit_entry_fits(
  type public.credit_transaction_type, kind public.credit_account_kind, side public.ledger_side
) returns boolean
language sql immutable set search_path = ''
as $$
  select case type
    when 'purchase' then (kind, side) in (('payments', 'debit'), ('purchased', 'credit'))
    when 'monthly_grant' then (kind, side) in (('grants', 'debit'), ('monthly', 'credit'))
    when 'promotional_grant' then (kind, side) in (('grants', 'debit'), ('promotional', 'credit'))
    when 'consumption' then kind <= 'purchased' and side = 'debit' or (kind, side) = ('consumption', 'credit')
    when 'expiry' then kind < 'purchased' and side = 'debit' or (kind, side) = ('expiry', 'credit')
    when 'refund' then
      (kind, side) in (('consumption', 'debit'), ('purchased', 'debit'), ('payments', 'credit')) or kind <= 'purchased' and side = 'credit'
    when 'adjustment' then kind = 'adjustments' or kind <= 'purchased' and side = 'debit' or (kind, side) = ('purchased', 'credit')
  end
$$;
comment on function private.credit_entry_fits(public.credit_transaction_type, public.credit_account_kind, public.ledger_side) is
  'Which accounts a kind of transaction moves, and on which side.';

create function private.apply_credit_entries() returns trigger
language plpgsql set search_path = ''
as $$
begin
  -- All entries of a transaction are written by one statement, so that none is slipped under an old one.
  if exists (
    select
    from public.credit_ledger as entry
    join added on added.organization_id = entry.organization_id and added.transaction_id = entry.transaction_id
    where not exists (select from added as own where own.id = entry.id)
  ) then
    raise exception 'the entries of a credit transaction are final' using errcode = '23514';
  end if;

  update public.credit_accounts as account
  set balance_minor = account.balance_minor + net.amount
  from (
    select
      added.organization_id, added.account_id,
      sum(case added.side when 'credit' then added.amount_minor else -added.amount_minor end)::bigint as amount
    from added
    group by added.organization_id, added.account_id
  ) as net
  where account.organization_id = net.organization_id and account.id = net.account_id;

  update public.call_credits as wallet
  set
    balance_minor = wallet.balance_minor + net.held,
    total_purchased_minor = wallet.total_purchased_minor + net.purchased,
    total_consumed_minor = wallet.total_consumed_minor + net.consumed
  from (
    select
      moved.organization_id, moved.currency,
      coalesce(sum(moved.amount) filter (where moved.kind <= 'purchased'), 0)::bigint as held,
      coalesce(-sum(moved.amount) filter (where moved.kind = 'payments'), 0)::bigint as purchased,
      coalesce(sum(moved.amount) filter (where moved.kind = 'consumption'), 0)::bigint as consumed
    from (
      select
        account.organization_id, account.currency, account.kind,
        case added.side when 'credit' then added.amount_minor else -added.amount_minor end as amount
      from added
      join public.credit_accounts as account on account.organization_id = added.organization_id and account.id = added.account_id
    ) as moved
    group by moved.organization_id, moved.currency
  ) as net
  where wallet.organization_id = net.organization_id and wallet.currency = net.currency;
  return null;
end
$$;
comment on function private.apply_credit_entries() is
  'Trigger: new entries change the balances of their accounts and of the wallet; a balance that would become negative refuses them.';

create function private.check_credit_transaction() returns trigger
language plpgsql set search_path = ''
as $$
declare
  sums record;
begin
  select
    coalesce(sum(entry.amount_minor) filter (where entry.side = 'debit'), 0) as debits,
    coalesce(sum(entry.amount_minor) filter (where entry.side = 'credit'), 0) as credits,
    coalesce(sum(case entry.side when 'credit' then entry.amount_minor else -entry.amount_minor end)
      filter (where account.kind <= 'purchased'), 0) as held,
    coalesce(bool_and(account.currency = new.currency and private.credit_entry_fits(new.type, account.kind, entry.side)), false) as fits
  into sums
  from public.credit_ledger as entry
  join public.credit_accounts as account on account.organization_id = entry.organization_id and account.id = entry.account_id
  where entry.organization_id = new.organization_id and entry.transaction_id = new.id;
  if sums.debits <> new.amount_minor or sums.credits <> new.amount_minor or not sums.fits
    or abs(sums.held) <> new.amount_minor or new.balance_after_minor - new.balance_before_minor <> sums.held then
    raise exception 'credit transaction %: debits of % and credits of % do not make a % of %',
      new.id, sums.debits, sums.credits, new.type, new.amount_minor using errcode = '23514';
  end if;

  -- The balances form a chain, from the wallet's first transaction to its last.
  if new.balance_before_minor <> coalesce((
    select previous.balance_after_minor
    from public.credit_transactions as previous
    where previous.organization_id = new.organization_id
      and previous.currency = new.currency
      and previous.number = new.number - 1
  ), case new.number when 1 then 0 end, -1) then
    raise exception 'credit transaction % does not follow the one before it', new.id using errcode = '23514';
  end if;

  if new.type = 'refund' and not exists (
    select
    from public.credit_transactions as original
    where original.organization_id = new.organization_id
      and original.id = new.reverses_id
      and original.currency = new.currency
      and (original.type, sums.held > 0) in (('consumption', true), ('purchase', false))
      and original.amount_minor >= (
        select sum(refund.amount_minor)
        from public.credit_transactions as refund
        where refund.organization_id = new.organization_id and refund.reverses_id = new.reverses_id
      )
  ) then
    raise exception 'credit transaction % gives back more than there was', new.id using errcode = '23514';
  end if;
  return null;
end
$$;
comment on function private.check_credit_transaction() is
  'Trigger, at the end of the transaction: debits equal credits, the accounts are those of its type, the balances follow the ones '
  'before, and a refund gives back what it names and no more.';

create function private.refuse_money_change() returns trigger
language plpgsql set search_path = ''
as $$
begin
  raise exception '% is a record of money: it is added to, never changed', tg_table_name using errcode = '23514';
end
$$;
comment on function private.refuse_money_change() is 'Trigger: keeps records of money as they were written.';

create trigger apply_credit_entries after insert on public.credit_ledger
  referencing new table as added for each statement execute function private.apply_credit_entries();
create trigger credit_ledger_is_append_only before update or delete or truncate on public.credit_ledger
  for each statement execute function private.refuse_money_change();
create trigger credit_transactions_is_append_only before update or delete or truncate on public.credit_transactions
  for each statement execute function private.refuse_money_change();
create trigger credit_accounts_are_kept before delete or truncate on public.credit_accounts
  for each statement execute function private.refuse_money_change();
create trigger call_credits_are_kept before delete or truncate on public.call_credits
  for each statement execute function private.refuse_money_change();
create constraint trigger credit_transactions_add_up after insert on public.credit_transactions
  deferrable initially deferred for each row execute function private.check_credit_transaction();

revoke all on function
  private.credit_entry_fits(public.credit_transaction_type, public.credit_account_kind, public.ledger_side),
  private.apply_credit_entries(), private.check_credit_transaction(), private.refuse_money_change()
from public;


-- What a call holds, and what it cost ---------------------------------------------------------------------------------------------

create table private.call_holds (
  attempt_id      uuid not null,
  organization_id uuid not null,
  seconds         bigint not null default 0,
  credit_seconds  bigint not null default 0,
  is_beyond       boolean not null default false,
  currency        text,
  credit_minor    bigint not null default 0,
  constraint call_holds_pkey primary key (attempt_id),
  constraint call_holds_attempt_fkey foreign key (organization_id, attempt_id)
    references public.call_logs (organization_id, id) on delete restrict,
  constraint call_holds_wallet_fkey foreign key (organization_id, currency)
    references public.call_credits (organization_id, currency) on delete restrict,
  constraint call_holds_seconds_not_negative check (seconds >= 0 and credit_seconds >= 0),
  constraint call_holds_credit_not_negative check (credit_minor >= 0),
  constraint call_holds_credit_has_wallet check (credit_minor = 0 or currency is not null)
);

create index idx_call_holds_attempt on private.call_holds (organization_id, attempt_id);
create index idx_call_holds_wallet on private.call_holds (organization_id, currency) where currency is not null;
select private.close_table('private.call_holds');

comment on table private.call_holds is
  'What an outbound attempt that has not ended holds: one call, so many seconds, so much credit. Made by the release, gone with the '
  'attempt''s end, whatever that end is. The counters'' `reserved` and the wallet''s `held_minor` are the sums of these rows.';
comment on column private.call_holds.seconds is 'Held of the plan''s seconds, the most that the call may last; 0 where the plan limits none.';
comment on column private.call_holds.credit_seconds is 'How many seconds of the call the held credit pays for.';
comment on column private.call_holds.is_beyond is 'The call itself was beyond the included calls when it was released.';
comment on column private.call_holds.currency is 'The wallet that the credit is held in; null without credit.';
comment on column private.call_holds.credit_minor is 'What is held of it.';

create table public.call_charges (
  call_log_id       uuid not null,
  organization_id   uuid not null,
  plan_price_id     uuid not null references public.plan_prices (id) on delete restrict,
  meter_key         text not null references public.meters (key) on delete restrict,
  day               date not null,
  seconds           bigint not null,
  credit_seconds    bigint not null,
  overage_seconds   bigint not null default 0,
  currency          text not null,
  charged_minor     bigint not null,
  uncollected_minor bigint not null default 0,
  transaction_id    uuid,
  created_at        timestamptz not null,
  constraint call_charges_pkey primary key (call_log_id),
  constraint call_charges_tenant_key unique (organization_id, call_log_id),
  constraint call_charges_call_fkey foreign key (organization_id, call_log_id)
    references public.call_logs (organization_id, id) on delete restrict,
  constraint call_charges_transaction_fkey foreign key (organization_id, transaction_id)
    references public.credit_transactions (organization_id, id) on delete restrict,
  constraint call_charges_seconds_fit check (
    seconds > 0 and credit_seconds >= 0 and overage_seconds >= 0 and credit_seconds + overage_seconds <= seconds
  ),
  constraint call_charges_amounts_not_negative check (charged_minor >= 0 and uncollected_minor >= 0),
  constraint call_charges_charge_is_in_ledger check ((charged_minor > 0) = (transaction_id is not null))
);

create index idx_call_charges_org_day on public.call_charges (organization_id, day);
create index idx_call_charges_transaction on public.call_charges (organization_id, transaction_id) where transaction_id is not null;
create index idx_call_charges_price on public.call_charges (plan_price_id);
create index idx_call_charges_meter on public.call_charges (meter_key);

revoke all on public.call_charges from anon, authenticated, service_role;
grant select on public.call_charges to authenticated, service_role;
alter table public.call_charges enable row level security;
alter table public.call_charges force row level security;
create policy "Members who may see billing see what calls cost" on public.call_charges
  for select to authenticated using (organization_id = (select private.org_with('billing.view')));

create trigger call_charges_is_append_only before update or delete or truncate on public.call_charges
  for each statement execute function private.refuse_money_change();

comment on table public.call_charges is
  'How the seconds of a call that were beyond what the plan includes were paid, once a call, append-only. Calls within the plan, and '
  'plans that take no credit, have no row.';
comment on column public.call_charges.meter_key is 'The term that priced them: ai_calls for a call beyond the included calls, else call_seconds.';
comment on column public.call_charges.day is 'The local day on which the call was counted.';
comment on column public.call_charges.seconds is 'Seconds beyond what the plan includes.';
comment on column public.call_charges.credit_seconds is 'Of these, those that credit paid for.';
comment on column public.call_charges.overage_seconds is 'Of these, those that the invoice bills, because the credit did not reach and the plan prices them.';
comment on column public.call_charges.charged_minor is 'What was taken from prepaid credit.';
comment on column public.call_charges.uncollected_minor is
  'What the call cost beyond the credit that there was, where the plan has no price for overage: recorded, and billed to nobody.';
comment on column public.call_charges.transaction_id is 'The consumption in the credit ledger; null when nothing was taken.';
-- 08_invoicing.sql

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
  credited_minor    bigint not null default 0,
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
  constraint invoices_credited_range check (credited_minor between 0 and total_minor),
  constraint invoices_paid_in_full check (
    status <> 'paid' or (amount_paid_minor + credited_minor >= total_minor and paid_at is not null)
  ),
  constraint invoices_void_unpaid check (status <> 'void' or (amount_paid_minor = 0 and credited_minor = 0)),
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
comment on column public.invoices.amount_paid_minor is 'Sum of the payments that were counted on it (payments.applied_minor).';
comment on column public.invoices.credited_minor is 'Sum of the credit notes issued against it. What is due is the total less both.';
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
    'status', 'amount_paid_minor', 'credited_minor', 'paid_at', 'irn', 'ack_no', 'signed_qr', 'metadata', 'updated_at'
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


-- Payment methods -----------------------------------------------------------------------------------------------------------------

create function private.has_card_number(given text) returns boolean
language sql immutable set search_path = ''
as $$
  -- Every run of at least 13 digits, with single separators between them or without. A run of up to 19 is a card number if it begins
  -- as one and its check digit is right (Luhn); a longer run has no business here at all.
  select exists (
    select
    from (
      select regexp_replace(run.match[1], '[^0-9]', '', 'g') as digits
      from regexp_matches(
        -- A UUID is none, though it may be all digits.
        regexp_replace($1, '\m[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\M', '', 'gi'), '([0-9](?:[ ._/-]?[0-9]){12,})', 'g'
      ) as run (match)
    ) as run
    where length(run.digits) > 19
      or run.digits ~ '^[2-6]' and (
        select sum(
          case when (length(run.digits) - place) % 2 = 0 then digit else digit * 2 - case when digit > 4 then 9 else 0 end end
        ) % 10 = 0
        from generate_series(1, length(run.digits)) as place, substr(run.digits, place, 1) as character, cast(character as integer) as digit
      )
  )
$$;
comment on function private.has_card_number(text) is
  'Whether a text holds what may be a card number (PAN), also one written in groups. Times and ids in milliseconds begin with 1 and pass.';

create table public.payment_methods (
  id                        uuid primary key default gen_random_uuid(),
  organization_id           uuid not null references public.organizations (id) on delete restrict,
  type                      public.payment_method_type not null,
  gateway                   public.payment_gateway not null,
  gateway_customer_id       text,
  gateway_payment_method_id text not null,
  last4                     text,
  brand                     text,
  expiry_month              integer,
  expiry_year               integer,
  is_default                boolean not null default false,
  metadata                  jsonb not null default '{}',
  removed_at                timestamptz,
  created_at                timestamptz not null default private.clock_now(),
  updated_at                timestamptz not null default private.clock_now(),
  constraint payment_methods_tenant_key unique (organization_id, id),
  constraint payment_methods_token_key unique (gateway, gateway_payment_method_id),
  constraint payment_methods_token_format check (gateway_payment_method_id ~ '^[A-Za-z0-9_.:-]{1,255}$'),
  constraint payment_methods_customer_format check (gateway_customer_id ~ '^[A-Za-z0-9_.:-]{1,255}$'),
  constraint payment_methods_last4_format check (last4 ~ '^[0-9]{4}$'),
  constraint payment_methods_brand_format check (brand ~ '^[A-Za-z][A-Za-z ._-]{0,49}$'),
  constraint payment_methods_expiry_range check (expiry_month between 1 and 12 and expiry_year between 2000 and 2199),
  constraint payment_methods_expiry_whole check ((expiry_month is null) = (expiry_year is null)),
  constraint payment_methods_card_described check (type <> 'card' or last4 is not null),
  constraint payment_methods_default_kept check (not (is_default and removed_at is not null)),
  constraint payment_methods_metadata_object check (jsonb_typeof(metadata) = 'object'),
  constraint payment_methods_no_card_number check (
    not private.has_card_number(gateway_payment_method_id)
    and not private.has_card_number(coalesce(gateway_customer_id, ''))
    and not private.has_card_number(metadata::text)
  ),
  constraint payment_methods_no_card_code check (
    not metadata ?| array['number', 'card_number', 'pan', 'cvv', 'cvv2', 'cvc', 'csc', 'security_code', 'pin', 'track1', 'track2']
  )
);

create unique index idx_payment_methods_default on public.payment_methods (organization_id) where is_default;
create index idx_payment_methods_org_id on public.payment_methods (organization_id) where removed_at is null;

revoke all on public.payment_methods from anon, authenticated, service_role;
grant select on public.payment_methods to authenticated, service_role;
alter table public.payment_methods enable row level security;
alter table public.payment_methods force row level security;
create policy "Members who may see billing see the payment methods" on public.payment_methods
  for select to authenticated using (organization_id = (select private.org_with('billing.view')) and removed_at is null);

comment on table public.payment_methods is
  'How an organization pays: the gateway''s token and what a person recognises it by. Never a card number or its code: the table '
  'refuses them.';
comment on column public.payment_methods.gateway_payment_method_id is 'The gateway''s token, worth nothing without our key to that gateway.';
comment on column public.payment_methods.last4 is 'The last four digits of a card or an account.';
comment on column public.payment_methods.is_default is 'What is charged; one a organization.';
comment on column public.payment_methods.removed_at is 'Since when it is no longer used; the row stays, as payments refer to it.';

-- Payments ------------------------------------------------------------------------------------------------------------------------

create table public.payments (
  id                 uuid primary key default gen_random_uuid(),
  organization_id    uuid not null references public.organizations (id) on delete restrict,
  purpose            text not null,
  invoice_id         uuid,
  payment_method_id  uuid,
  gateway            public.payment_gateway not null,
  gateway_order_id   text,
  gateway_payment_id text,
  status             public.payment_transaction_status not null default 'pending',
  amount_minor       bigint not null,
  currency           text not null,
  applied_minor      bigint not null default 0,
  refunded_minor     bigint not null default 0,
  problem            text,
  failure_code       text,
  failure_message    text,
  status_at          timestamptz not null,
  captured_at        timestamptz,
  created_at         timestamptz not null default private.clock_now(),
  updated_at         timestamptz not null default private.clock_now(),
  constraint payments_tenant_key unique (organization_id, id),
  constraint payments_gateway_key unique (gateway, gateway_payment_id),
  constraint payments_invoice_fkey foreign key (organization_id, invoice_id)
    references public.invoices (organization_id, id) on delete restrict,
  constraint payments_payment_method_fkey foreign key (organization_id, payment_method_id)
    references public.payment_methods (organization_id, id) on delete restrict,
  constraint payments_purpose_known check (purpose in ('invoice', 'credit')),
  constraint payments_purpose_fits check ((purpose = 'invoice') = (invoice_id is not null)),
  constraint payments_order_format check (gateway_order_id ~ '^[A-Za-z0-9_.:/-]{1,255}$'),
  constraint payments_payment_format check (gateway_payment_id ~ '^[A-Za-z0-9_.:/-]{1,255}$'),
  constraint payments_identified check (gateway_payment_id is not null or gateway_order_id is not null and status = 'pending'),
  constraint payments_amount_positive check (amount_minor > 0),
  constraint payments_currency_format check (currency ~ '^[A-Z]{3}$'),
  constraint payments_applied_whole check (applied_minor = 0 or applied_minor = amount_minor and status >= 'captured'),
  constraint payments_refunded_range check (refunded_minor between 0 and amount_minor),
  constraint payments_refunded_after_capture check (refunded_minor = 0 or status >= 'captured'),
  constraint payments_refunded_in_full check ((status = 'refunded') = (refunded_minor = amount_minor)),
  constraint payments_captured_has_time check ((status >= 'captured') = (captured_at is not null)),
  constraint payments_problem_known check (problem in ('amount_differs', 'currency_differs', 'invoice_not_open')),
  constraint payments_problem_is_unapplied check (problem is null or applied_minor = 0)
);

create index idx_payments_org_time on public.payments (organization_id, created_at desc);
create index idx_payments_invoice on public.payments (organization_id, invoice_id) where invoice_id is not null;
create index idx_payments_method on public.payments (organization_id, payment_method_id) where payment_method_id is not null;
create index idx_payments_order on public.payments (gateway, gateway_order_id) where gateway_order_id is not null;

revoke all on public.payments from anon, authenticated, service_role;
grant select on public.payments to authenticated, service_role;
alter table public.payments enable row level security;
alter table public.payments force row level security;
create policy "Members who may see billing see the payments" on public.payments
  for select to authenticated using (organization_id = (select private.org_with('billing.view')));

comment on table public.payments is
  'Payments at gateways, as the gateways report them: of an invoice, or of prepaid credit. Money that came is never forgotten, also '
  'where it fits no invoice.';
comment on column public.payments.purpose is 'invoice: pays one invoice in full; credit: buys prepaid credit.';
comment on column public.payments.gateway_payment_id is 'The gateway''s id of the payment; null while only its order is known.';
comment on column public.payments.applied_minor is
  'What of it was counted on its invoice: all of it, if amount and currency were what was due, or nothing.';
comment on column public.payments.refunded_minor is 'What was paid back of it.';
comment on column public.payments.problem is
  'Why money that came was not counted on its invoice, for a person to look at: amount_differs, currency_differs, invoice_not_open.';
comment on column public.payments.status_at is 'When the gateway says that it came to this status; older news does not change it.';

-- What a payer's bank says against it, as the gateway reports it.
alter table public.payments
  add column dispute_status text,
  add column disputed_minor bigint,
  add column disputed_at timestamptz,
  add constraint payments_dispute_whole check (
    (dispute_status is null) = (disputed_at is null) and (dispute_status is null) = (disputed_minor is null)
  );
comment on column public.payments.dispute_status is 'The gateway''s word: of an open dispute, or how it ended. It moves no money by itself.';
comment on column public.payments.disputed_at is 'When the gateway said so; older news does not change it.';

create table public.refunds (
  id                uuid primary key default gen_random_uuid(),
  organization_id   uuid not null,
  payment_id        uuid not null,
  gateway           public.payment_gateway not null,
  gateway_refund_id text not null,
  status            public.refund_status not null,
  amount_minor      bigint not null,
  currency          text not null,
  processed_at      timestamptz,
  created_at        timestamptz not null default private.clock_now(),
  updated_at        timestamptz not null default private.clock_now(),
  constraint refunds_tenant_key unique (organization_id, id),
  constraint refunds_gateway_key unique (gateway, gateway_refund_id),
  constraint refunds_payment_fkey foreign key (organization_id, payment_id)
    references public.payments (organization_id, id) on delete restrict,
  constraint refunds_refund_format check (gateway_refund_id ~ '^[A-Za-z0-9_.:/-]{1,255}$'),
  constraint refunds_amount_positive check (amount_minor > 0),
  constraint refunds_currency_format check (currency ~ '^[A-Z]{3}$'),
  constraint refunds_processed_has_time check ((status = 'processed') = (processed_at is not null))
);

create index idx_refunds_payment on public.refunds (organization_id, payment_id);

revoke all on public.refunds from anon, authenticated, service_role;
grant select on public.refunds to authenticated, service_role;
alter table public.refunds enable row level security;
alter table public.refunds force row level security;
create policy "Members who may see billing see the refunds" on public.refunds
  for select to authenticated using (organization_id = (select private.org_with('billing.view')));

comment on table public.refunds is
  'Money that went back, as the gateways report it. What it means for an invoice is said by a credit note, not by a refund.';

-- Credit notes --------------------------------------------------------------------------------------------------------------------

create table private.credit_note_series (
  month       text primary key,
  last_number integer not null default 0,
  constraint credit_note_series_month_format check (month ~ '^[0-9]{6}$'),
  constraint credit_note_series_number_range check (last_number between 0 and 1399999)
);
select private.close_table('private.credit_note_series');

comment on table private.credit_note_series is
  'The last credit note number of each month, as invoice_series is for invoices. Its row lock makes numbers gap-free.';

create table public.credit_notes (
  id                 uuid primary key default gen_random_uuid(),
  organization_id    uuid not null references public.organizations (id) on delete restrict,
  invoice_id         uuid not null,
  credit_note_number text,
  status             public.credit_note_status not null default 'draft',
  idempotency_key    text not null,
  reason             text not null,
  currency           text not null,
  subtotal_minor     bigint not null,
  tax_minor          bigint not null,
  total_minor        bigint not null,
  issuer             jsonb not null,
  customer           jsonb not null,
  credit_note_date   date,
  issued_at          timestamptz,
  irn                text,
  ack_no             text,
  signed_qr          text,
  created_by         uuid,
  created_at         timestamptz not null default private.clock_now(),
  constraint credit_notes_tenant_key unique (organization_id, id),
  constraint credit_notes_number_key unique (credit_note_number),
  constraint credit_notes_idempotency_key unique (organization_id, idempotency_key),
  constraint credit_notes_invoice_fkey foreign key (organization_id, invoice_id)
    references public.invoices (organization_id, id) on delete restrict,
  constraint credit_notes_number_format check (credit_note_number ~ '^CR[A-N]-[0-9]{6}-[0-9]{5}$'),
  constraint credit_notes_numbered_once_issued check ((status = 'draft') = (credit_note_number is null)),
  constraint credit_notes_dated_once_issued check (status = 'draft' or (credit_note_date is not null and issued_at is not null)),
  constraint credit_notes_key_present check (length(idempotency_key) between 1 and 255),
  constraint credit_notes_reason_present check (btrim(reason) <> ''),
  constraint credit_notes_currency_format check (currency ~ '^[A-Z]{3}$'),
  constraint credit_notes_amounts_not_negative check (subtotal_minor > 0 and tax_minor >= 0),
  constraint credit_notes_total_adds_up check (total_minor = subtotal_minor + tax_minor),
  constraint credit_notes_issuer_object check (jsonb_typeof(issuer) = 'object'),
  constraint credit_notes_customer_object check (jsonb_typeof(customer) = 'object')
);

create index idx_credit_notes_invoice on public.credit_notes (organization_id, invoice_id);

revoke all on public.credit_notes from anon, authenticated, service_role;
grant select on public.credit_notes to authenticated, service_role;
alter table public.credit_notes enable row level security;
alter table public.credit_notes force row level security;
create policy "Members who may see billing see the credit notes" on public.credit_notes
  for select to authenticated using (organization_id = (select private.org_with('billing.view')) and status <> 'draft');

comment on table public.credit_notes is
  'What takes back an invoice, in part or in full. All credit notes of an invoice together never exceed it, line by line, tax by tax.';
comment on column public.credit_notes.credit_note_number is
  'CRN-YYYYMM-NNNNN, of a series of its own without gaps, given when it is issued; 16 characters, as India''s Rule 53 has it.';
comment on column public.credit_notes.idempotency_key is 'Whoever issues the same again under this key issues nothing.';
comment on column public.credit_notes.issuer is 'Our particulars, as they are on the invoice.';
comment on column public.credit_notes.customer is 'The organization''s particulars, as they are on the invoice.';
comment on column public.credit_notes.irn is 'Reference number of India''s e-invoice portal, when it was registered there.';
comment on column public.credit_notes.created_by is 'The user who issued it; null is the platform. No foreign key: the record outlives the user.';

create table public.credit_note_lines (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null,
  credit_note_id  uuid not null,
  invoice_line_id uuid not null,
  position        integer not null,
  description     text not null,
  amount_minor    bigint not null,
  constraint credit_note_lines_tenant_key unique (organization_id, id),
  constraint credit_note_lines_position_key unique (organization_id, credit_note_id, position),
  constraint credit_note_lines_line_key unique (organization_id, credit_note_id, invoice_line_id),
  constraint credit_note_lines_credit_note_fkey foreign key (organization_id, credit_note_id)
    references public.credit_notes (organization_id, id) on delete restrict,
  constraint credit_note_lines_invoice_line_fkey foreign key (organization_id, invoice_line_id)
    references public.invoice_lines (organization_id, id) on delete restrict,
  constraint credit_note_lines_description_present check (btrim(description) <> ''),
  constraint credit_note_lines_amount_positive check (amount_minor > 0)
);

create index idx_credit_note_lines_invoice_line on public.credit_note_lines (organization_id, invoice_line_id);

revoke all on public.credit_note_lines from anon, authenticated, service_role;
grant select on public.credit_note_lines to authenticated, service_role;
alter table public.credit_note_lines enable row level security;
alter table public.credit_note_lines force row level security;
create policy "Members who may see billing see the credit notes' lines" on public.credit_note_lines
  for select to authenticated using (organization_id = (select private.org_with('billing.view')));

comment on table public.credit_note_lines is 'What a credit note takes back, invoice line by invoice line.';
comment on column public.credit_note_lines.amount_minor is 'What is taken back of the invoice line, before tax; positive.';

create table public.credit_note_taxes (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null,
  credit_note_id  uuid not null,
  position        integer not null,
  name            text not null,
  rate_bp         integer not null,
  taxable_minor   bigint not null,
  amount_minor    bigint not null,
  constraint credit_note_taxes_tenant_key unique (organization_id, id),
  constraint credit_note_taxes_name_key unique (organization_id, credit_note_id, name),
  constraint credit_note_taxes_credit_note_fkey foreign key (organization_id, credit_note_id)
    references public.credit_notes (organization_id, id) on delete restrict,
  constraint credit_note_taxes_rate_range check (rate_bp between 0 and 10000),
  constraint credit_note_taxes_amounts_not_negative check (taxable_minor >= 0 and amount_minor >= 0)
);

revoke all on public.credit_note_taxes from anon, authenticated, service_role;
grant select on public.credit_note_taxes to authenticated, service_role;
alter table public.credit_note_taxes enable row level security;
alter table public.credit_note_taxes force row level security;
create policy "Members who may see billing see the credit notes' taxes" on public.credit_note_taxes
  for select to authenticated using (organization_id = (select private.org_with('billing.view')));

comment on table public.credit_note_taxes is
  'The taxes of a credit note, one row a component: what the invoice''s tax is on all that was credited so far, less what it was before. '
  'So that crediting an invoice piece by piece takes back its tax to the unit.';

-- Walls around payments and credit notes ------------------------------------------------------------------------------------------

create function private.credit_note_number(month text, number integer) returns text
language sql immutable set search_path = ''
as $$
  select case
    when number between 1 and 99999 then 'CRN-' || month || '-' || lpad(number::text, 5, '0')
    when number between 100000 and 1399999 then
      'CR' || chr(64 + number / 100000) || '-' || month || '-' || lpad((number % 100000)::text, 5, '0')
  end
$$;
comment on function private.credit_note_number(text, integer) is
  'The text of a month''s n-th number: CRN-202601-00001 to CRN-202601-99999, then CRA-202601-00000 and on to CRM; null when the month is '
  'full.';

create function private.take_credit_note_number(month text) returns integer
language sql set search_path = ''
as $$
  insert into private.credit_note_series as series (month, last_number)
  values ($1, 1)
  on conflict on constraint credit_note_series_pkey do update set last_number = series.last_number + 1
  returning last_number
$$;
comment on function private.take_credit_note_number(text) is
  'Takes a month''s next number. Locks the month until the transaction ends: take it last.';

create function private.guard_credit_note() returns trigger
language plpgsql set search_path = ''
as $$
begin
  if tg_op = 'DELETE' then
    if old.status <> 'draft' then
      raise exception 'credit note % is final and is never deleted', old.credit_note_number using errcode = '23514';
    end if;
    return old;
  end if;
  if tg_op = 'INSERT' then
    if new.status <> 'draft' then
      raise exception 'a credit note is a draft before it is issued' using errcode = '23514';
    end if;
    return new;
  end if;
  if old.status = 'draft' then
    if new.status = 'issued' and new.credit_note_number is null then
      new.issued_at := coalesce(new.issued_at, private.clock_now());
      new.credit_note_date := coalesce(new.credit_note_date, (new.issued_at at time zone (new.issuer ->> 'timezone'))::date);
    end if;
    return new;
  end if;
  if to_jsonb(new) - array['irn', 'ack_no', 'signed_qr'] is distinct from to_jsonb(old) - array['irn', 'ack_no', 'signed_qr'] then
    raise exception 'credit note % is final', old.credit_note_number using errcode = '23514';
  end if;
  return new;
end
$$;
comment on function private.guard_credit_note() is 'Trigger: a credit note goes from draft to issued, and is final then.';

create function private.set_credit_note_number() returns trigger
language plpgsql set search_path = ''
as $$
declare
  month text;
begin
  if new.status = 'issued' and new.credit_note_number is null then
    -- The invoice before the series, as whoever changes an invoice holds its row already.
    perform
    from public.invoices as invoice
    where invoice.organization_id = new.organization_id
      and invoice.id = new.invoice_id
      and invoice.currency = new.currency
      and invoice.status in ('open', 'paid', 'uncollectible')
    for no key update;
    if not found then
      raise exception 'a credit note is issued against a final invoice of its currency' using errcode = '23514';
    end if;
    month := to_char(new.issued_at at time zone (new.issuer ->> 'timezone'), 'YYYYMM');
    new.credit_note_number := private.credit_note_number(month, private.take_credit_note_number(month));
  end if;
  return new;
end
$$;
comment on function private.set_credit_note_number() is
  'Trigger: a credit note that is issued locks its invoice and gets the month''s next number, by the issuer''s time zone.';

create function private.count_credit_note() returns trigger
language plpgsql set search_path = ''
as $$
begin
  update public.invoices as invoice
  set credited_minor = invoice.credited_minor + new.total_minor
  where invoice.organization_id = new.organization_id and invoice.id = new.invoice_id;
  return null;
end
$$;
comment on function private.count_credit_note() is
  'Trigger: a credit note that was issued is counted on its invoice, which refuses more than its total.';

create function private.guard_credit_note_parts() returns trigger
language plpgsql set search_path = ''
as $$
begin
  if exists (
    select
    from changed
    join public.credit_notes as note on note.organization_id = changed.organization_id and note.id = changed.credit_note_id
    where note.status <> 'draft'
  ) then
    raise exception 'the lines and taxes of a credit note are final once it is issued' using errcode = '23514';
  end if;
  return null;
end
$$;
comment on function private.guard_credit_note_parts() is 'Trigger: lines and taxes change only while their credit note is a draft.';

create function private.check_credit_note_sums() returns trigger
language plpgsql set search_path = ''
as $$
declare
  lines bigint;
  taxes bigint;
begin
  select coalesce(sum(line.amount_minor), 0)::bigint
  into lines
  from public.credit_note_lines as line
  where line.organization_id = new.organization_id and line.credit_note_id = new.id;
  select coalesce(sum(tax.amount_minor), 0)::bigint
  into taxes
  from public.credit_note_taxes as tax
  where tax.organization_id = new.organization_id and tax.credit_note_id = new.id;
  if lines <> new.subtotal_minor or taxes <> new.tax_minor then
    raise exception 'credit note %: lines of % and taxes of % do not make a subtotal of % and a tax of %',
      new.credit_note_number, lines, taxes, new.subtotal_minor, new.tax_minor using errcode = '23514';
  end if;

  if exists (
    select
    from public.credit_note_lines as line
    join public.invoice_lines as billed on billed.organization_id = line.organization_id and billed.id = line.invoice_line_id
    where line.organization_id = new.organization_id
      and line.credit_note_id = new.id
      and (
        billed.invoice_id <> new.invoice_id
        or billed.amount_minor < (
          select sum(other.amount_minor)
          from public.credit_note_lines as other
          join public.credit_notes as note on note.organization_id = other.organization_id and note.id = other.credit_note_id
          where other.organization_id = line.organization_id and other.invoice_line_id = billed.id and note.status = 'issued'
        )
      )
  ) or exists (
    select
    from public.credit_note_taxes as tax
    where tax.organization_id = new.organization_id
      and tax.credit_note_id = new.id
      and coalesce((
        select billed.amount_minor
        from public.invoice_taxes as billed
        where billed.organization_id = tax.organization_id and billed.invoice_id = new.invoice_id and billed.name = tax.name
      ), 0) < (
        select sum(other.amount_minor)
        from public.credit_notes as note
        join public.credit_note_taxes as other on other.organization_id = note.organization_id and other.credit_note_id = note.id
        where note.organization_id = new.organization_id
          and note.invoice_id = new.invoice_id
          and note.status = 'issued'
          and other.name = tax.name
      )
  ) then
    raise exception 'credit note % takes back more than was billed', new.credit_note_number using errcode = '23514';
  end if;
  return null;
end
$$;
comment on function private.check_credit_note_sums() is
  'Trigger, at the end of the transaction: an issued credit note''s lines make its subtotal and its taxes its tax, and neither a line nor '
  'a tax of the invoice is taken back more than once.';

create function private.guard_payment() returns trigger
language plpgsql set search_path = ''
as $$
declare
  news constant text[] := array[
    'status', 'status_at', 'applied_minor', 'refunded_minor', 'problem', 'failure_code', 'failure_message', 'captured_at',
    'payment_method_id', 'updated_at', 'dispute_status', 'disputed_minor', 'disputed_at'
  ];
  -- What the order's row learns from the first payment of the order.
  identity constant text[] := array['gateway_payment_id', 'amount_minor', 'currency'];
  open text[] := case when old.gateway_payment_id is null then news || identity else news end;
begin
  if to_jsonb(new) - open is distinct from to_jsonb(old) - open then
    raise exception 'payment %: what was paid does not change', old.id using errcode = '23514';
  end if;
  if old.status >= 'captured' and (new.status < old.status or new.captured_at is distinct from old.captured_at)
    or new.refunded_minor < old.refunded_minor or new.applied_minor < old.applied_minor then
    raise exception 'payment % does not go from % to %', old.id, old.status, new.status using errcode = '23514';
  end if;
  return new;
end
$$;
comment on function private.guard_payment() is
  'Trigger: a payment that came stays paid; who paid what, and what was counted or paid back of it, is never taken back.';

create function private.apply_payment() returns trigger
language plpgsql set search_path = ''
as $$
begin
  update public.invoices as invoice
  set amount_paid_minor = invoice.amount_paid_minor + new.applied_minor - case tg_op when 'UPDATE' then old.applied_minor else 0 end
  where invoice.organization_id = new.organization_id
    and invoice.id = new.invoice_id
    and invoice.currency = new.currency
    and invoice.status in ('open', 'uncollectible');
  if not found then
    raise exception 'a payment is counted on an open invoice of its currency' using errcode = '23514';
  end if;
  return null;
end
$$;
comment on function private.apply_payment() is 'Trigger: what is counted of a payment is counted on its invoice.';

create function private.check_invoice_settlement() returns trigger
language plpgsql set search_path = ''
as $$
declare
  paid bigint;
  credited bigint;
begin
  select coalesce(sum(payment.applied_minor), 0)::bigint
  into paid
  from public.payments as payment
  where payment.organization_id = new.organization_id and payment.invoice_id = new.id;
  select coalesce(sum(note.total_minor), 0)::bigint
  into credited
  from public.credit_notes as note
  where note.organization_id = new.organization_id and note.invoice_id = new.id and note.status = 'issued';
  if exists (
    select
    from public.invoices as invoice
    where invoice.organization_id = new.organization_id
      and invoice.id = new.id
      and (invoice.amount_paid_minor, invoice.credited_minor) <> (paid, credited)
  ) then
    raise exception 'invoice %: payments make % and credit notes %', new.invoice_number, paid, credited using errcode = '23514';
  end if;
  return null;
end
$$;
comment on function private.check_invoice_settlement() is
  'Trigger, at the end of the transaction: what an invoice says was paid and credited is what its payments and credit notes say.';

create function private.guard_refund() returns trigger
language plpgsql set search_path = ''
as $$
begin
  if to_jsonb(new) - array['status', 'processed_at', 'updated_at'] is distinct from to_jsonb(old) - array['status', 'processed_at', 'updated_at']
    or old.status <> 'pending' and new.status <> old.status then
    raise exception 'refund % is final', old.id using errcode = '23514';
  end if;
  return new;
end
$$;
comment on function private.guard_refund() is 'Trigger: a refund goes from pending to processed or failed, and nothing else changes.';

create function private.apply_refund() returns trigger
language plpgsql set search_path = ''
as $$
begin
  update public.payments as payment
  set
    refunded_minor = payment.refunded_minor + new.amount_minor,
    status = case when payment.refunded_minor + new.amount_minor = payment.amount_minor then 'refunded' else payment.status end
  where payment.organization_id = new.organization_id
    and payment.id = new.payment_id
    and payment.currency = new.currency
    and payment.gateway = new.gateway;
  if not found then
    raise exception 'a refund is in the currency and of the gateway of its payment' using errcode = '23514';
  end if;
  return null;
end
$$;
comment on function private.apply_refund() is
  'Trigger: a processed refund is counted on its payment, which refuses more than was paid, or anything before it was.';

create trigger update_modified_column before update on public.payment_methods
  for each row execute function private.update_modified_column();
create trigger payment_methods_are_kept before delete or truncate on public.payment_methods
  for each statement execute function private.refuse_money_change();

create trigger guard_payment before update on public.payments
  for each row execute function private.guard_payment();
create trigger update_modified_column before update on public.payments
  for each row execute function private.update_modified_column();
create trigger payments_are_kept before delete or truncate on public.payments
  for each statement execute function private.refuse_money_change();
create trigger payment_is_counted_on_insert after insert on public.payments
  for each row when (new.applied_minor <> 0) execute function private.apply_payment();
create trigger payment_is_counted after update on public.payments
  for each row when (new.applied_minor <> old.applied_minor) execute function private.apply_payment();

create trigger guard_refund before update on public.refunds
  for each row execute function private.guard_refund();
create trigger update_modified_column before update on public.refunds
  for each row execute function private.update_modified_column();
create trigger refunds_are_kept before delete or truncate on public.refunds
  for each statement execute function private.refuse_money_change();
create trigger refund_is_counted_on_insert after insert on public.refunds
  for each row when (new.status = 'processed') execute function private.apply_refund();
create trigger refund_is_counted after update on public.refunds
  for each row when (new.status = 'processed' and old.status <> 'processed') execute function private.apply_refund();

create constraint trigger invoices_are_settled_on_insert after insert on public.invoices
  deferrable initially deferred
  for each row when (new.amount_paid_minor <> 0 or new.credited_minor <> 0) execute function private.check_invoice_settlement();
create constraint trigger invoices_are_settled after update on public.invoices
  deferrable initially deferred
  for each row when (new.amount_paid_minor <> old.amount_paid_minor or new.credited_minor <> old.credited_minor)
  execute function private.check_invoice_settlement();

create trigger guard_credit_note before insert or update or delete on public.credit_notes
  for each row execute function private.guard_credit_note();
create trigger set_credit_note_number_trigger before update of status on public.credit_notes
  for each row execute function private.set_credit_note_number();
create trigger credit_note_is_counted after update on public.credit_notes
  for each row when (new.status = 'issued' and old.status <> 'issued') execute function private.count_credit_note();
create trigger credit_notes_are_kept before truncate on public.credit_notes
  for each statement execute function private.refuse_money_change();
create constraint trigger credit_notes_add_up after insert or update on public.credit_notes
  deferrable initially deferred
  for each row when (new.status = 'issued') execute function private.check_credit_note_sums();

create trigger credit_note_lines_inserted after insert on public.credit_note_lines
  referencing new table as changed for each statement execute function private.guard_credit_note_parts();
create trigger credit_note_lines_updated after update on public.credit_note_lines
  referencing old table as changed for each statement execute function private.guard_credit_note_parts();
create trigger credit_note_lines_moved after update on public.credit_note_lines
  referencing new table as changed for each statement execute function private.guard_credit_note_parts();
create trigger credit_note_lines_deleted after delete on public.credit_note_lines
  referencing old table as changed for each statement execute function private.guard_credit_note_parts();
create trigger credit_note_taxes_inserted after insert on public.credit_note_taxes
  referencing new table as changed for each statement execute function private.guard_credit_note_parts();
create trigger credit_note_taxes_updated after update on public.credit_note_taxes
  referencing old table as changed for each statement execute function private.guard_credit_note_parts();
create trigger credit_note_taxes_moved after update on public.credit_note_taxes
  referencing new table as changed for each statement execute function private.guard_credit_note_parts();
create trigger credit_note_taxes_deleted after delete on public.credit_note_taxes
  referencing old table as changed for each statement execute function private.guard_credit_note_parts();

revoke all on function
  private.has_card_number(text), private.credit_note_number(text, integer), private.take_credit_note_number(text),
  private.guard_credit_note(), private.set_credit_note_number(), private.count_credit_note(), private.guard_credit_note_parts(),
  private.check_credit_note_sums(),
  private.guard_payment(), private.apply_payment(), private.check_invoice_settlement(), private.guard_refund(), private.apply_refund()
from public;
-- 09_system.sql

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
-- 10_functions_webhook_intake.sql

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

  -- What is known is kept, what is new is added, and the status only moves forward.
  updated := private.merge_call(attempt, call, at);
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
    if event.attempt_id is null and (event.payload ->> 'inbound')::boolean then
      event.attempt_id := (select log.id from public.call_logs as log where log.call_sid = event.payload ->> 'provider_call_id');
    end if;
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
  'A single event may stand at the top, a call as "call":{…}.';


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
-- 11_functions_call_dispatch.sql

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
    disconnect_reason = attempt.disconnect_reason,
    stream_id = attempt.stream_id,
    stream_status = attempt.stream_status,
    stream_error = attempt.stream_error,
    transferred = attempt.transferred,
    transferred_at = attempt.transferred_at,
    transfer_sid = attempt.transfer_sid,
    transfer_status = attempt.transfer_status
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
  if attempt.dialled or attempt.direction = 'inbound' then
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
  if attempt.dialled or attempt.direction = 'inbound' then
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

create function private.has_talked(attempt public.call_logs) returns boolean
language sql immutable parallel safe set search_path = '' as $$
  select coalesce(greatest(attempt.duration, attempt.bill_duration_seconds) > 0, attempt.answered_at is not null)
$$;
comment on function private.has_talked(public.call_logs) is
  'Whether a leg had a second of talk: by the carrier''s seconds, and where it tells none, by its answer.';

create function private.settled_outcome(attempt public.call_logs, reported public.call_outcome) returns public.call_outcome
language sql immutable parallel safe set search_path = '' as $$
  select case
    when reported in ('answered', 'our_fault') and attempt.machine then 'machine'::public.call_outcome
    when reported = 'answered' and attempt.stream_status = 'failed' and coalesce(attempt.duration, 0) < 5 then 'our_fault'::public.call_outcome
    else reported
  end
$$;
comment on function private.settled_outcome(public.call_logs, public.call_outcome) is
  'What an end means beside what else is known of the leg: who answered may be a machine, and whom no agent spoke to was not answered by us.';

create function private.outcome_rank(outcome public.call_outcome, has_talked boolean) returns integer
language sql immutable parallel safe set search_path = '' as $$
  select case outcome
    when 'lost' then 0
    when 'expired' then 0
    when 'failed' then 10
    when 'answered' then case when has_talked then 90 else 20 end
    when 'cancelled' then 30
    when 'capacity' then 40
    when 'config' then 41
    when 'carrier_transient' then 42
    when 'our_fault' then case when has_talked then 95 else 43 end
    when 'no_answer' then 50
    when 'rejected' then 60
    when 'busy' then 70
    when 'invalid_number' then 80
    when 'spam_blocked' then 81
    when 'machine' then 99
  end
$$;
comment on function private.outcome_rank(public.call_outcome, boolean) is
  'Which of two ends that a carrier told of one call stays, whichever came first: the one that says more. A guess is nothing, a plain end '
  'without a second of talk says less than the reason for it, and talk says more than any reason why there was none.';

create function private.amend_attempt(
  attempt public.call_logs, amended public.call_logs, outcome public.call_outcome, at timestamptz
) returns boolean
language plpgsql volatile security definer set search_path = '' as $$
declare
  queue    public.call_queue;
  member   public.campaign_leads;
  campaign public.campaigns;
  settled  constant public.call_outcome := private.settled_outcome(amended, coalesce(outcome, attempt.call_status));
  -- Who was dialled after all has no reason any more why he was not.
  corrects constant boolean := settled <> attempt.call_status and (
    outcome is not null and not attempt.dialled and amended.dialled
    or private.outcome_rank(settled, private.has_talked(amended)) > private.outcome_rank(attempt.call_status, private.has_talked(amended))
  );
  completes boolean := false;
begin
  outcome := settled;
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
  limits     integer[] := array[]::integer[];
  holds      private.call_holds[] := array[]::private.call_holds[];
  holding    record;
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

  -- What the calls may cost last, organization by organization: nothing but wallets is locked after usage counters.
  for tenant in
    select
      (able[place]).organization_id as id, array_agg((able[place]).queue_id order by place) as rows,
      array_agg((able[place]).max_call_seconds order by place) as wanted
    from generate_subscripts(able, 1) as place
    group by (able[place]).organization_id
    order by (able[place]).organization_id
  loop
    holding := private.hold_calls(tenant.id, tenant.wanted, at);
    given := cardinality(holding.limits);
    if given < cardinality(tenant.rows) then
      insert into private.dispatch_holds as hold (organization_id, held_until, reason)
      values (tenant.id, at + interval '5 minutes', holding.reason)
      on conflict (organization_id) do update set held_until = excluded.held_until, reason = excluded.reason;
    end if;
    granted := granted || tenant.rows[:given];
    limits := limits || holding.limits;
    holds := holds || holding.holds;
  end loop;

  with attempt as (
    insert into public.call_logs (
      organization_id, campaign_id, lead_id, project_id, queue_id, attempt_no, carrier_account_id, caller_number, callee_number,
      agent_id, record_call, ring_timeout_seconds, time_limit_seconds, created_at, lease_until, not_after
    )
    select
      candidate.organization_id, candidate.campaign_id, candidate.lead_id, candidate.project_id, candidate.queue_id,
      candidate.attempt_no, candidate.carrier_account_id, candidate.caller_number, candidate.callee_number, candidate.agent_id,
      candidate.record_call, candidate.ring_timeout_seconds, allowed.seconds, at,
      now() + interval '60 seconds', now() + least(interval '10 minutes', candidate.closes_at - at)
    from unnest(able) as candidate
    join unnest(granted, limits) as allowed (queue_id, seconds) on allowed.queue_id = candidate.queue_id
    on conflict (callee_number) where direction = 'outbound' and status <> 'ended' do nothing
    returning id, organization_id, campaign_id, lead_id, queue_id, not_after
  ),
  held as (
    insert into private.call_holds (attempt_id, organization_id, seconds, credit_seconds, is_beyond, currency, credit_minor)
    select attempt.id, hold.organization_id, hold.seconds, hold.credit_seconds, hold.is_beyond, hold.currency, hold.credit_minor
    from generate_subscripts(granted, 1) as place
    join attempt on attempt.queue_id = granted[place]
    cross join lateral (select (holds[place]).*) as hold
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
    perform private.give_back_holds(
      array(
        select holds[place]
        from generate_subscripts(granted, 1) as place
        join public.call_queue as queue on queue.id = granted[place]
        where queue.status = 'queued'
      ),
      at
    );
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
      -- A call to us is known by the carrier's id of it alone.
      and (log.direction = 'outbound' or log.call_sid is not null)
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
      'credentials_sealed', account.credentials_sealed,
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
  me           uuid := private.acting_user_id();
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
    perform private.enrol_leads(campaign, private.acting_user_id(), at);
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
-- 12_functions_usage_metering.sql

-- Counting: quotas that are taken and given back, usage that is recorded once, and what an organization has used.
--
-- One transaction writes an event's key, the event, its day and its period. Locks are always taken in the same order (keys, then
-- counters by meter and period, then days, then wallets), so that writers wait for each other and never deadlock. The counter of a
-- period is also its gate: closing a period locks and closes its counters, so a writer either was there before and is billed, or
-- finds the counter closed and counts in the next period. Nothing falls between.

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
  hold private.call_holds;
  charged bigint := 0;
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
  if not is_first and not is_new then
    return;
  end if;

  -- Under the counters' locks a hold becomes use: whoever asks what is left sees the one or the other, never both and never neither.
  perform
  from public.usage_logs as log
  where log.organization_id = attempt.organization_id
    and log.feature_key in ('ai_calls', 'call_seconds')
    and (log.closed_at is null or log.reserved > 0)
  order by log.feature_key, log.period_start
  for no key update;
  delete from private.call_holds as held where held.attempt_id = attempt.id returning held.* into hold;
  if is_first and attempt.direction = 'outbound' then
    perform private.release_usage(attempt.organization_id, 'ai_calls', 1, at);
  end if;
  if hold.seconds > 0 then
    perform private.release_usage(attempt.organization_id, 'call_seconds', hold.seconds, at);
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
  if is_new or hold.credit_minor > 0 then
    charged := private.charge_call(attempt, case when is_new then billed else 0 end, hold, at);
  end if;

  -- More is left than before: who waits for it is asked again.
  if hold.attempt_id is not null and (not is_new or hold.seconds > billed or hold.credit_minor > charged) then
    perform private.lift_dispatch_hold(attempt.organization_id, array['quota_exhausted', 'credit_exhausted']);
  end if;
end
$$;
revoke all on function private.meter_call(public.call_logs, timestamptz) from public;
comment on function private.meter_call(public.call_logs, timestamptz) is
  'Settles one ended attempt: gives back what was held for it, once, counts the call and its billed seconds and charges what is beyond '
  'the plan, once, also when the carrier reports them later.';

create function private.lift_dispatch_hold(organization_id uuid, reasons text[]) returns boolean
language plpgsql security definer set search_path = ''
as $$
begin
  -- Whoever has it locked without the caller's lock is lifting it too.
  delete from private.dispatch_holds as hold
  where hold.organization_id in (
    select waiting.organization_id
    from private.dispatch_holds as waiting
    where waiting.organization_id = lift_dispatch_hold.organization_id and waiting.reason = any (reasons)
    for update skip locked
  );
  return found;
end
$$;
revoke all on function private.lift_dispatch_hold(uuid, text[]) from public;
comment on function private.lift_dispatch_hold(uuid, text[]) is
  'Lets an organization be released for again that waits for one of these reasons, and says whether it did. The caller holds the lock '
  'of what there is more of.';

-- What a call may cost, and what it cost ------------------------------------------------------------------------------------------
--
-- A second of calling is paid by what the plan includes, then by prepaid credit, then by overage where the plan prices it. What pays
-- is decided when the call ends, by what is left then; the hold of the release only makes sure that it is there. The locks are the
-- counters of the organization, then its wallet.

create function private.credit_cost(seconds bigint, term public.plan_price_meters) returns bigint
language plpgsql immutable set search_path = ''
as $$
begin
  return private.divide_half_away(
    div(seconds::numeric + term.credit_pulse - 1, term.credit_pulse) * term.credit_pulse * term.credit_price_minor, term.credit_unit);
end
$$;
comment on function private.credit_cost(bigint, public.plan_price_meters) is
  'What seconds of one call cost in prepaid credit: started pulses, rounded once.';

create function private.credit_reach(amount_minor bigint, term public.plan_price_meters) returns bigint
language plpgsql immutable set search_path = ''
as $$
begin
  if term.credit_price_minor = 0 then
    return 2147483647;
  end if;
  return least(
    div(greatest(amount_minor, 0)::numeric * term.credit_unit, term.credit_price_minor::numeric * term.credit_pulse) * term.credit_pulse,
    2147483647
  )::bigint;
end
$$;
comment on function private.credit_reach(bigint, public.plan_price_meters) is 'How many seconds of one call an amount of credit pays for, in whole pulses.';

create function private.shortest_call() returns integer
language sql immutable set search_path = ''
as $$
  select 30
$$;
comment on function private.shortest_call() is
  'Nobody is called for fewer seconds than these, the shortest that a campaign may ask for: where less is left, the lead waits.';

create function private.hold_calls(
  organization_id uuid, wanted integer[], at timestamptz,
  out limits integer[], out holds private.call_holds[], out reason text
)
language plpgsql security definer set search_path = ''
as $$
declare
  subscription public.subscriptions;
  period record;
  calls public.plan_price_meters;
  talk public.plan_price_meters;
  term public.plan_price_meters;
  counter record;
  open_holds record;
  money text;
  wallet_id uuid;
  is_metered boolean;
  is_beyond boolean;
  calls_left bigint;
  calls_covered bigint;
  seconds_left bigint;
  seconds_covered bigint;
  credit_left bigint;
  granted bigint;
  covered bigint;
  paid bigint;
  cost bigint;
  seconds_held bigint := 0;
  credit_held bigint := 0;
begin
  limits := '{}';
  holds := '{}';

  for try in 1..3 loop
    subscription := private.live_subscription(organization_id);
    if subscription.id is null or subscription.status not in ('trialing', 'active', 'past_due') then
      reason := 'quota_exhausted';
      return;
    end if;
    period := private.usage_period(
      subscription, organization_id, subscription.timezone, (at at time zone subscription.timezone)::date, at);
    select price.currency into money from public.plan_prices as price where price.id = subscription.plan_price_id;
    select own.* into calls
    from public.plan_price_meters as own
    where own.plan_price_id = subscription.plan_price_id and own.meter_key = 'ai_calls';
    select own.* into talk
    from public.plan_price_meters as own
    where own.plan_price_id = subscription.plan_price_id and own.meter_key = 'call_seconds';
    is_metered := coalesce(talk.included_units >= 0, false) or private.meter_cap(talk) is not null;

    insert into public.usage_logs (organization_id, feature_key, period_start, period_end)
    select hold_calls.organization_id, meter.key, period.period_start, period.period_end
    from unnest(array['ai_calls', case when is_metered then 'call_seconds' end]) as meter (key)
    where meter.key is not null
      and not exists (
        select
        from public.usage_logs as log
        where log.organization_id = hold_calls.organization_id and log.feature_key = meter.key and log.period_start = period.period_start
      )
    order by meter.key
    on conflict do nothing;

    -- What is still held from earlier periods will be used in this one.
    with locked as (
      select log.*
      from public.usage_logs as log
      where log.organization_id = hold_calls.organization_id
        and log.feature_key in ('ai_calls', 'call_seconds')
        and (log.period_start = period.period_start or log.period_start < period.period_start and log.reserved > 0)
      order by log.feature_key, log.period_start
      for no key update
    )
    select
      coalesce(bool_or(locked.closed_at is not null) filter (where locked.period_start = period.period_start), true) as is_closed,
      sum(locked.usage_count) filter (where locked.feature_key = 'ai_calls' and locked.period_start = period.period_start)::bigint as calls,
      sum(locked.prepaid) filter (where locked.feature_key = 'ai_calls' and locked.period_start = period.period_start)::bigint as paid_calls,
      sum(locked.reserved) filter (where locked.feature_key = 'ai_calls')::bigint as held_calls,
      sum(locked.usage_count) filter (where locked.feature_key = 'call_seconds' and locked.period_start = period.period_start)::bigint as seconds,
      sum(locked.prepaid) filter (where locked.feature_key = 'call_seconds' and locked.period_start = period.period_start)::bigint as paid_seconds,
      sum(locked.reserved) filter (where locked.feature_key = 'call_seconds')::bigint as held_seconds
    into counter
    from locked;
    exit when not counter.is_closed;
    -- The period was closed in between: look again which one is current.
  end loop;
  if counter.is_closed then
    reason := 'quota_exhausted';
    return;
  end if;

  -- Null is without end. Calls under way use up what is included only as far as no credit is held for them.
  select count(*) filter (where held.is_beyond) as calls, coalesce(sum(held.credit_seconds) filter (where not held.is_beyond), 0) as seconds
  into open_holds
  from private.call_holds as held
  where held.organization_id = hold_calls.organization_id;
  calls_left := private.meter_cap(calls) - counter.calls - counter.held_calls;
  seconds_left := private.meter_cap(talk) - counter.seconds - counter.held_seconds;
  if calls.credit_price_minor is not null and calls.included_units >= 0 then
    calls_covered := calls.included_units - (counter.calls - counter.paid_calls) - (counter.held_calls - open_holds.calls);
  end if;
  if talk.credit_price_minor is not null and talk.included_units >= 0 then
    seconds_covered := talk.included_units - (counter.seconds - counter.paid_seconds) - (counter.held_seconds - open_holds.seconds);
  end if;

  for place in 1..cardinality(wanted) loop
    granted := least(wanted[place], seconds_left);
    if calls_left <= 0 or granted < private.shortest_call() then
      reason := 'quota_exhausted';
      exit;
    end if;

    term := null;
    covered := granted;
    is_beyond := coalesce(calls_covered <= 0, false);
    if is_beyond then
      term := calls;
      covered := 0;
    elsif seconds_covered < granted then
      term := talk;
      covered := greatest(seconds_covered, 0);
    end if;
    paid := 0;
    cost := 0;
    if covered < granted then
      if credit_left is null then
        wallet_id := private.lock_wallet(organization_id, money, at);
        credit_left := coalesce((
          select own.balance_minor - own.held_minor from public.call_credits as own where own.id = wallet_id
        ), 0);
      end if;
      paid := least(granted - covered, private.credit_reach(credit_left, term));
      cost := private.credit_cost(paid, term);
      if term.overage_price_minor is null then
        granted := covered + paid;
        if granted < private.shortest_call() then
          reason := 'credit_exhausted';
          exit;
        end if;
      end if;
    end if;

    limits := limits || granted::integer;
    holds := holds || row(
      null, organization_id, case when is_metered then granted else 0 end, paid, is_beyond,
      case when paid > 0 and wallet_id is not null then money end, cost
    )::private.call_holds;
    calls_left := calls_left - 1;
    seconds_left := seconds_left - granted;
    calls_covered := calls_covered - (not is_beyond)::integer;
    seconds_covered := seconds_covered - covered;
    credit_left := credit_left - cost;
    seconds_held := seconds_held + case when is_metered then granted else 0 end;
    credit_held := credit_held + cost;
  end loop;

  update public.usage_logs as log
  set reserved = log.reserved + case log.feature_key when 'ai_calls' then cardinality(limits) else seconds_held end
  where log.organization_id = hold_calls.organization_id
    and log.period_start = period.period_start
    and (log.feature_key = 'ai_calls' and cardinality(limits) > 0 or log.feature_key = 'call_seconds' and seconds_held > 0);
  if credit_held > 0 then
    update public.call_credits as own set held_minor = own.held_minor + credit_held where own.id = wallet_id;
  end if;
end
$$;
comment on function private.hold_calls(uuid, integer[], timestamptz) is
  'Holds what calls of one organization may cost at most, in the order of their time limits `wanted`, as many as fit: the call, its '
  'seconds, and credit for what is beyond the plan. Gives for each the limit it may last, which is less where less is left, and what it '
  'holds; where not all fit, the reason why the next one has to wait.';

create function private.give_back_holds(holds private.call_holds[], at timestamptz) returns void
language plpgsql security definer set search_path = ''
as $$
declare
  tenant record;
begin
  for tenant in
    select
      held.organization_id as id, count(*) as calls, sum(held.seconds)::bigint as seconds, max(held.currency) as currency,
      sum(held.credit_minor)::bigint as credit
    from unnest(holds) as held
    group by held.organization_id
    order by held.organization_id
  loop
    perform private.release_usage(tenant.id, 'ai_calls', tenant.calls, at);
    if tenant.seconds > 0 then
      perform private.release_usage(tenant.id, 'call_seconds', tenant.seconds, at);
    end if;
    if tenant.credit > 0 then
      update public.call_credits as own
      set held_minor = own.held_minor - tenant.credit
      where own.organization_id = tenant.id and own.currency = tenant.currency;
    end if;
  end loop;
end
$$;
comment on function private.give_back_holds(private.call_holds[], timestamptz) is
  'Gives back what was held for calls that were not made after all, in the transaction that held it.';

create function private.charge_call(attempt public.call_logs, billed bigint, hold private.call_holds, at timestamptz) returns bigint
language plpgsql security definer set search_path = ''
as $$
declare
  subscription public.subscriptions;
  calls public.plan_price_meters;
  talk public.plan_price_meters;
  term public.plan_price_meters;
  money text;
  wallet_id uuid;
  counted_on date;
  counter record;
  beyond bigint := 0;
  paid bigint;
  cost bigint;
  taken bigint := 0;
begin
  if billed > 0 then
    subscription := private.live_subscription(attempt.organization_id);
    select own.* into calls
    from public.plan_price_meters as own
    where own.plan_price_id = subscription.plan_price_id and own.meter_key = 'ai_calls';
    select own.* into talk
    from public.plan_price_meters as own
    where own.plan_price_id = subscription.plan_price_id and own.meter_key = 'call_seconds';
  end if;

  if calls.credit_price_minor is not null and calls.included_units >= 0
    or talk.credit_price_minor is not null and talk.included_units >= 0 then
    select price.currency into money from public.plan_prices as price where price.id = subscription.plan_price_id;
    select event.day
    into strict counted_on
    from private.usage_events as event
    where event.occurred_at = attempt.ended_at
      and event.organization_id = attempt.organization_id
      and event.meter_key = 'call_seconds'
      and event.source = 'call'
      and event.key = attempt.id::text;
    -- With this call, and without what credit paid before.
    select
      sum(log.usage_count - log.prepaid) filter (where log.feature_key = 'ai_calls')::bigint as calls,
      sum(log.usage_count - log.prepaid) filter (where log.feature_key = 'call_seconds')::bigint as seconds
    into counter
    from public.usage_logs as log
    where log.organization_id = attempt.organization_id
      and log.feature_key in ('ai_calls', 'call_seconds')
      and log.period_start <= counted_on and counted_on < log.period_end;
    if calls.credit_price_minor is not null and calls.included_units >= 0 and counter.calls > calls.included_units then
      term := calls;
      beyond := billed;
    elsif talk.credit_price_minor is not null and talk.included_units >= 0 and counter.seconds > talk.included_units then
      term := talk;
      beyond := least(billed, counter.seconds - talk.included_units);
    end if;
  end if;
  if beyond = 0 and coalesce(hold.credit_minor, 0) = 0 then
    return 0;
  end if;

  -- The plan may have changed its currency since the release: then there are two wallets.
  perform
  from public.call_credits as own
  where own.organization_id = attempt.organization_id and own.currency in (hold.currency, money)
  order by own.currency
  for no key update;
  if hold.credit_minor > 0 then
    update public.call_credits as own
    set held_minor = own.held_minor - hold.credit_minor
    where own.organization_id = attempt.organization_id and own.currency = hold.currency;
  end if;
  if beyond = 0 then
    return 0;
  end if;

  paid := beyond;
  if term.overage_price_minor is not null then
    -- What credit does not pay for in whole pulses is billed.
    wallet_id := private.lock_wallet(attempt.organization_id, money, at);
    paid := least(beyond, private.credit_reach(
      coalesce((select own.balance_minor from public.call_credits as own where own.id = wallet_id), 0), term
    ));
  end if;
  cost := private.credit_cost(paid, term);
  if cost > 0 then
    taken := private.debit_credit(
      attempt.organization_id, money, cost, 'call ' || attempt.id, at, true, 'consumption', 'call', attempt.id);
  end if;
  insert into public.call_charges (
    call_log_id, organization_id, plan_price_id, meter_key, day, seconds, credit_seconds, overage_seconds, currency, charged_minor,
    uncollected_minor, transaction_id, created_at
  )
  values (
    attempt.id, attempt.organization_id, subscription.plan_price_id, term.meter_key, counted_on, beyond,
    case when taken < cost then div(paid::numeric * taken, cost)::bigint else paid end, beyond - paid, money, taken, cost - taken,
    (
      select transaction.id
      from public.credit_transactions as transaction
      where transaction.organization_id = attempt.organization_id and transaction.idempotency_key = 'call ' || attempt.id
    ),
    at
  );
  update public.usage_logs as log
  set prepaid = log.prepaid + case log.feature_key when 'ai_calls' then 1 else paid end
  where log.organization_id = attempt.organization_id
    and log.feature_key in ('call_seconds', term.meter_key)
    and log.period_start <= counted_on and counted_on < log.period_end;
  update public.usage_days as total
  set prepaid = total.prepaid + case total.meter_key when 'ai_calls' then 1 else paid end
  where total.organization_id = attempt.organization_id
    and total.meter_key in ('call_seconds', term.meter_key)
    and total.day = counted_on;
  return taken;
end
$$;
comment on function private.charge_call(public.call_logs, bigint, private.call_holds, timestamptz) is
  'Lets go of the credit that was held for a call and takes what its seconds beyond the plan cost, as far as the balance goes, and says '
  'how much. The call is counted already, its counters are locked, and nobody charges it twice.';

create function private.check_holds(organization_id uuid default null) returns table (organization uuid, problem text)
language sql stable security definer set search_path = ''
as $$
  with live as (
    select log.organization_id, log.id
    from public.call_logs as log
    where log.direction = 'outbound' and log.status <> 'ended' and (log.organization_id = $1 or $1 is null)
  ),
  held as (
    select own.organization_id, count(*) as calls, sum(own.seconds) as seconds
    from private.call_holds as own
    where own.organization_id = $1 or $1 is null
    group by own.organization_id
  ),
  counted as (
    select
      log.organization_id,
      sum(log.reserved) filter (where log.feature_key = 'ai_calls') as calls,
      sum(log.reserved) filter (where log.feature_key = 'call_seconds') as seconds
    from public.usage_logs as log
    where log.organization_id = $1 or $1 is null
    group by log.organization_id
  )
  select coalesce(own.organization_id, live.organization_id), format('attempt %s', coalesce(own.attempt_id, live.id))
    || case when live.id is null then ' has ended and holds something' else ' has not ended and holds nothing' end
  from (select hold.* from private.call_holds as hold where hold.organization_id = $1 or $1 is null) as own
  full join live on live.id = own.attempt_id
  where own.attempt_id is null or live.id is null
  union all
  select
    tenant.id,
    format(
      '%s calls and %s seconds held, %s and %s counted', coalesce(held.calls, 0), coalesce(held.seconds, 0), coalesce(counted.calls, 0),
      coalesce(counted.seconds, 0)
    )
  from public.organizations as tenant
  left join held on held.organization_id = tenant.id
  left join counted on counted.organization_id = tenant.id
  where (tenant.id = $1 or $1 is null)
    and (coalesce(held.calls, 0), coalesce(held.seconds, 0)) <> (coalesce(counted.calls, 0), coalesce(counted.seconds, 0))
  union all
  select wallet.organization_id, format('%s of credit held, the wallet says %s', coalesce(sum(own.credit_minor), 0), wallet.held_minor)
  from public.call_credits as wallet
  left join private.call_holds as own on own.organization_id = wallet.organization_id and own.currency = wallet.currency
  where wallet.organization_id = $1 or $1 is null
  group by wallet.id
  having wallet.held_minor <> coalesce(sum(own.credit_minor), 0)
$$;
comment on function private.check_holds(uuid) is
  'Compares what is held with the attempts that hold it and returns what disagrees: nothing, ever. For one organization or all.';

revoke all on function
  private.credit_cost(bigint, public.plan_price_meters), private.credit_reach(bigint, public.plan_price_meters), private.shortest_call(),
  private.hold_calls(uuid, integer[], timestamptz), private.give_back_holds(private.call_holds[], timestamptz),
  private.charge_call(public.call_logs, bigint, private.call_holds, timestamptz), private.check_holds(uuid)
from public;

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
            when term.included_units >= 0 then greatest(coalesce(log.usage_count - log.prepaid, 0) - term.included_units, 0)
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
  moved_prepaid bigint;
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
      select coalesce(sum(total.quantity), 0)::bigint, coalesce(sum(total.prepaid), 0)::bigint
      into moved, moved_prepaid
      from public.usage_days as total
      where total.organization_id = cut_usage_periods.organization_id
        and total.meter_key = log.feature_key
        and total.day >= from_day and total.day < log.period_end;
      update public.usage_logs as counter
      set
        period_end = least(counter.period_end, from_day), usage_count = counter.usage_count - moved,
        prepaid = counter.prepaid - moved_prepaid, closed_at = at
      where counter.id = log.id;
      if moved > 0 then
        insert into public.usage_logs (organization_id, feature_key, usage_count, prepaid, period_start, period_end)
        values (cut_usage_periods.organization_id, log.feature_key, moved, moved_prepaid, from_day, cut_usage_periods.period_end);
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


-- Prepaid credit ------------------------------------------------------------------------------------------------------------------
--
-- The wallet's row is locked first, then its accounts are read: transactions of one wallet follow each other, others do not wait.
-- What has expired is taken out before anything else happens, so that a balance is never spent that was not there any more.

create function private.write_credit(
  wallet_id uuid, type public.credit_transaction_type, requested bigint, key text, accounts uuid[], sides public.ledger_side[],
  amounts bigint[], reverses uuid, reference_type text, reference_id uuid, description text, at timestamptz
) returns uuid
language plpgsql set search_path = ''
as $$
declare
  wallet public.call_credits;
  moved bigint;
  held bigint;
  transaction uuid := gen_random_uuid();
begin
  select
    sum(entry.amount) filter (where entry.side = 'credit'),
    sum(case entry.side when 'credit' then entry.amount else -entry.amount end) filter (where account.kind <= 'purchased')
  into strict moved, held
  from unnest(accounts, sides, amounts) as entry (account_id, side, amount)
  join public.credit_accounts as account on account.id = entry.account_id;

  update public.call_credits as own
  set last_number = own.last_number + 1
  where own.id = wallet_id
  returning own.* into strict wallet;
  -- One statement, so that what it writes adds up at its end, and not only at the end of the transaction.
  with written as (
    insert into public.credit_transactions (
      id, organization_id, currency, number, type, amount_minor, requested_minor, balance_before_minor, balance_after_minor,
      idempotency_key, reverses_id, reference_type, reference_id, description, created_by, created_at
    )
    values (
      transaction, wallet.organization_id, wallet.currency, wallet.last_number, type, moved, requested, wallet.balance_minor,
      wallet.balance_minor + held, key, reverses, reference_type, reference_id, description, (select auth.uid()), at
    )
    returning credit_transactions.organization_id, credit_transactions.id
  )
  insert into public.credit_ledger (organization_id, transaction_id, position, account_id, side, amount_minor)
  select written.organization_id, written.id, entry.position, entry.account_id, entry.side, entry.amount
  from written, unnest(accounts, sides, amounts) with ordinality as entry (account_id, side, amount, position);

  if wallet.balance_minor >= wallet.low_balance_minor and wallet.balance_minor + held < wallet.low_balance_minor then
    perform private.emit(
      wallet.organization_id, 'credit.low',
      wallet.id || ' ' || coalesce((private.live_subscription(wallet.organization_id)).current_period_start, date_trunc('month', at))::date,
      jsonb_build_object(
        'currency', wallet.currency, 'balance_minor', wallet.balance_minor + held, 'low_balance_minor', wallet.low_balance_minor
      ),
      at
    );
  end if;
  return transaction;
end
$$;
comment on function private.write_credit(
  uuid, public.credit_transaction_type, bigint, text, uuid[], public.ledger_side[], bigint[], uuid, text, uuid, text, timestamptz
) is 'Writes one credit transaction and its entries. The caller holds the wallet''s lock and has made sure that it may be written.';

create function private.credit_account(
  organization_id uuid, currency text, kind public.credit_account_kind, expires_at timestamptz default null
) returns uuid
language plpgsql set search_path = ''
as $$
declare
  account_id uuid;
begin
  select account.id
  into account_id
  from public.credit_accounts as account
  where account.organization_id = credit_account.organization_id
    and account.currency = credit_account.currency
    and account.kind = credit_account.kind
    and account.expires_at is not distinct from credit_account.expires_at;
  if not found then
    insert into public.credit_accounts (organization_id, currency, kind, expires_at)
    values (organization_id, currency, kind, expires_at)
    returning id into account_id;
  end if;
  return account_id;
end
$$;
comment on function private.credit_account(uuid, text, public.credit_account_kind, timestamptz) is
  'The id of an account, made when it is not there. The caller holds the wallet''s lock.';

create function private.take_out_expired(wallet_id uuid, at timestamptz) returns integer
language plpgsql set search_path = ''
as $$
declare
  account public.credit_accounts;
  taken integer := 0;
begin
  for account in
    select expired.*
    from public.call_credits as wallet
    join public.credit_accounts as expired on expired.organization_id = wallet.organization_id and expired.currency = wallet.currency
    where wallet.id = wallet_id and expired.kind < 'purchased' and expired.balance_minor > 0 and expired.expires_at <= at
    order by expired.kind, expired.expires_at
  loop
    perform private.write_credit(
      wallet_id, 'expiry', account.balance_minor, 'expiry ' || gen_random_uuid(),
      array[account.id, private.credit_account(account.organization_id, account.currency, 'expiry')],
      array['debit', 'credit']::public.ledger_side[], array[account.balance_minor, account.balance_minor],
      null, null, null, null, at
    );
    taken := taken + 1;
  end loop;
  return taken;
end
$$;
comment on function private.take_out_expired(uuid, timestamptz) is
  'Takes out of a wallet what has expired, and says from how many accounts. The caller holds the wallet''s lock.';

create function private.lock_wallet(organization_id uuid, currency text, at timestamptz) returns uuid
language plpgsql set search_path = ''
as $$
declare
  wallet_id uuid;
begin
  select wallet.id
  into wallet_id
  from public.call_credits as wallet
  where wallet.organization_id = lock_wallet.organization_id and wallet.currency = lock_wallet.currency
  for no key update;
  if found then
    perform private.take_out_expired(wallet_id, at);
  end if;
  return wallet_id;
end
$$;
comment on function private.lock_wallet(uuid, text, timestamptz) is
  'Locks a wallet, takes out what has expired and returns its id; null when there is none.';

create function private.repeated_credit(
  organization_id uuid, currency text, type public.credit_transaction_type, requested bigint, key text, reverses uuid
) returns public.credit_transactions
language plpgsql stable set search_path = ''
as $$
declare
  written public.credit_transactions;
begin
  select transaction.*
  into written
  from public.credit_transactions as transaction
  where transaction.organization_id = repeated_credit.organization_id and transaction.idempotency_key = key;
  if found and (written.currency, written.type, written.requested_minor, written.reverses_id)
    is distinct from (currency, type, requested, reverses) then
    perform private.raise_error(409, 'idempotency_conflict', 'Another credit transaction was written under this key', 'key');
  end if;
  return written;
end
$$;
comment on function private.repeated_credit(uuid, text, public.credit_transaction_type, bigint, text, uuid) is
  'The transaction that was already written under a key, null when there is none; 409 when it said something else.';

create function private.post_credit(
  organization_id uuid, type public.credit_transaction_type, currency text, amount_minor bigint, key text, at timestamptz,
  expires_at timestamptz default null, reference_type text default null, reference_id uuid default null, description text default null
) returns uuid
language plpgsql security definer set search_path = ''
as $$
declare
  wallet_id uuid;
  known public.credit_transactions;
  source public.credit_account_kind;
  target public.credit_account_kind;
begin
  select route.source, route.target
  into source, target
  from (
    values
      ('purchase'::public.credit_transaction_type, 'payments'::public.credit_account_kind, 'purchased'::public.credit_account_kind),
      ('monthly_grant', 'grants', 'monthly'),
      ('promotional_grant', 'grants', 'promotional'),
      ('adjustment', 'adjustments', 'purchased')
  ) as route (type, source, target)
  where route.type = post_credit.type;
  if source is null then
    raise exception 'a % does not bring credit', type using errcode = '22023';
  end if;
  if coalesce(amount_minor, 0) <= 0 then
    perform private.raise_error(422, 'invalid_amount', 'An amount of credit is positive', 'amount_minor');
  end if;
  if type = 'monthly_grant' and expires_at is null or type in ('purchase', 'adjustment') and expires_at is not null then
    perform private.raise_error(422, 'invalid_expiry', 'A monthly grant expires, a purchase and an adjustment do not', 'expires_at');
  end if;

  insert into public.call_credits (organization_id, currency, created_at, updated_at)
  values (organization_id, currency, at, at)
  on conflict on constraint call_credits_currency_key do nothing;
  wallet_id := private.lock_wallet(organization_id, currency, at);
  known := private.repeated_credit(organization_id, currency, type, amount_minor, key, null);
  if known.id is not null then
    return known.id;
  end if;
  if expires_at <= at then
    perform private.raise_error(422, 'invalid_expiry', 'The credit would have expired already', 'expires_at');
  end if;
  if private.lift_dispatch_hold(organization_id, array['credit_exhausted']) then
    perform private.nudge('call-dispatch');
  end if;
  return private.write_credit(
    wallet_id, type, amount_minor, key,
    array[
      private.credit_account(organization_id, currency, source), private.credit_account(organization_id, currency, target, expires_at)
    ],
    array['debit', 'credit']::public.ledger_side[], array[amount_minor, amount_minor],
    null, reference_type, reference_id, description, at
  );
end
$$;
comment on function private.post_credit(
  uuid, public.credit_transaction_type, text, bigint, text, timestamptz, timestamptz, text, uuid, text
) is
  'Puts credit into an organization''s wallet, once a key: a purchase, a monthly or promotional grant, or an adjustment, which needs a '
  'description. Returns the transaction.';

create function private.debit_credit(
  organization_id uuid, currency text, amount_minor bigint, key text, at timestamptz, allow_partial boolean default false,
  type public.credit_transaction_type default 'consumption', reference_type text default null, reference_id uuid default null,
  description text default null
) returns bigint
language plpgsql security definer set search_path = ''
as $$
declare
  wallet_id uuid;
  known public.credit_transactions;
  accounts uuid[];
  amounts bigint[];
  taken bigint;
begin
  if type not in ('consumption', 'adjustment') then
    raise exception 'a % does not take credit', type using errcode = '22023';
  end if;
  if coalesce(amount_minor, 0) <= 0 then
    perform private.raise_error(422, 'invalid_amount', 'An amount of credit is positive', 'amount_minor');
  end if;

  wallet_id := private.lock_wallet(organization_id, currency, at);
  if wallet_id is null then
    return 0;
  end if;
  known := private.repeated_credit(organization_id, currency, type, amount_minor, key, null);
  if known.id is not null then
    return known.amount_minor;
  end if;
  -- What is held for calls under way is theirs; only a call that has ended takes from all there is.
  if not allow_partial and exists (
    select from public.call_credits as own where own.id = wallet_id and own.balance_minor - own.held_minor < debit_credit.amount_minor
  ) then
    return 0;
  end if;

  -- Monthly before promotional before purchased, and within each what expires first.
  with held as (
    select
      account.id, account.kind, account.expires_at,
      least(
        account.balance_minor,
        debit_credit.amount_minor
          - coalesce(sum(account.balance_minor) over (
            order by account.kind, account.expires_at, account.id rows between unbounded preceding and 1 preceding
          ), 0)
      )::bigint as amount
    from public.credit_accounts as account
    where account.organization_id = debit_credit.organization_id
      and account.currency = debit_credit.currency
      and account.kind <= 'purchased'
      and account.balance_minor > 0
  )
  select
    array_agg(held.id order by held.kind, held.expires_at, held.id),
    array_agg(held.amount order by held.kind, held.expires_at, held.id),
    coalesce(sum(held.amount), 0)::bigint
  into accounts, amounts, taken
  from held
  where held.amount > 0;
  if taken = 0 or taken < amount_minor and not allow_partial then
    return 0;
  end if;

  perform private.write_credit(
    wallet_id, type, amount_minor, key,
    accounts || private.credit_account(
      organization_id, currency, case type when 'consumption' then 'consumption' else 'adjustments' end::public.credit_account_kind),
    array_fill('debit'::public.ledger_side, array[cardinality(accounts)]) || 'credit'::public.ledger_side,
    amounts || taken, null, reference_type, reference_id, description, at
  );
  return taken;
end
$$;
comment on function private.debit_credit(
  uuid, text, bigint, text, timestamptz, boolean, public.credit_transaction_type, text, uuid, text
) is
  'Takes credit out of an organization''s wallet, once a key, and returns how much: all of it, or 0 and nothing changed when the balance '
  'is too small, less what is held. With `allow_partial` it takes what there is: for a call that ran over, which is recorded in full all '
  'the same.';

create function private.refund_credit(
  organization_id uuid, transaction_id uuid, amount_minor bigint, key text, at timestamptz, description text default null
) returns uuid
language plpgsql security definer set search_path = ''
as $$
declare
  original public.credit_transactions;
  wallet_id uuid;
  known public.credit_transactions;
  given_back bigint;
  accounts uuid[];
  amounts bigint[];
begin
  if coalesce(amount_minor, 0) <= 0 then
    perform private.raise_error(422, 'invalid_amount', 'An amount of credit is positive', 'amount_minor');
  end if;
  select transaction.*
  into original
  from public.credit_transactions as transaction
  where transaction.organization_id = refund_credit.organization_id
    and transaction.id = refund_credit.transaction_id
    and transaction.type in ('consumption', 'purchase');
  if not found then
    perform private.raise_error(404, 'credit_transaction_not_found', 'There is no such consumption or purchase', 'transaction_id');
  end if;
  wallet_id := private.lock_wallet(organization_id, original.currency, at);
  known := private.repeated_credit(organization_id, original.currency, 'refund', amount_minor, key, transaction_id);
  if known.id is not null then
    return known.id;
  end if;
  select coalesce(sum(refund.amount_minor), 0)
  into given_back
  from public.credit_transactions as refund
  where refund.organization_id = refund_credit.organization_id and refund.reverses_id = transaction_id;
  if given_back + amount_minor > original.amount_minor then
    perform private.raise_error(422, 'refund_too_large', 'More would be given back than there was', 'amount_minor');
  end if;

  if original.type = 'purchase' then
    accounts := array[private.credit_account(organization_id, original.currency, 'purchased')];
    if not exists (
      select
      from public.credit_accounts as account, public.call_credits as own
      where account.id = accounts[1]
        and own.id = wallet_id
        and least(account.balance_minor, own.balance_minor - own.held_minor) >= refund_credit.amount_minor
    ) then
      perform private.raise_error(422, 'insufficient_credit', 'The credit that was bought is used up', 'amount_minor');
    end if;
    return private.write_credit(
      wallet_id, 'refund', amount_minor, key,
      accounts || private.credit_account(organization_id, original.currency, 'payments'),
      array['debit', 'credit']::public.ledger_side[], array[amount_minor, amount_minor], transaction_id, original.reference_type,
      original.reference_id, description, at
    );
  end if;

  -- Back to where it was taken from, what was taken last first. An account that has expired since gives it up again.
  with taken as (
    select
      entry.account_id, entry.position, entry.amount_minor as amount,
      coalesce(sum(entry.amount_minor) over (order by entry.position desc rows between unbounded preceding and 1 preceding), 0) as before
    from public.credit_ledger as entry
    where entry.organization_id = refund_credit.organization_id
      and entry.transaction_id = refund_credit.transaction_id
      and entry.side = 'debit'
  ),
  returned as (
    select
      taken.account_id, taken.position,
      least(taken.amount + taken.before, given_back + refund_credit.amount_minor) - greatest(taken.before, given_back) as amount
    from taken
  )
  select array_agg(returned.account_id order by returned.position), array_agg(returned.amount::bigint order by returned.position)
  into accounts, amounts
  from returned
  where returned.amount > 0;
  return private.write_credit(
    wallet_id, 'refund', amount_minor, key,
    private.credit_account(organization_id, original.currency, 'consumption') || accounts,
    'debit'::public.ledger_side || array_fill('credit'::public.ledger_side, array[cardinality(accounts)]),
    amount_minor || amounts, transaction_id, original.reference_type, original.reference_id, description, at
  );
end
$$;
comment on function private.refund_credit(uuid, uuid, bigint, text, timestamptz, text) is
  'Gives back a consumption, to the accounts that it was taken from, or takes out a purchase that is paid back in money; in part or in '
  'full, once a key, and never more than there was. Returns the transaction.';

create function private.expire_credit(request jsonb, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  batch integer := least(greatest(coalesce((request ->> 'limit')::integer, 500), 1), 2000);
  wallets integer := 0;
  expired integer := 0;
  due uuid;
begin
  for due in
    select wallet.id
    from public.call_credits as wallet
    where exists (
      select
      from public.credit_accounts as account
      where account.organization_id = wallet.organization_id
        and account.currency = wallet.currency
        and account.balance_minor > 0
        and account.expires_at <= at
    )
    order by wallet.id
    limit batch
    for no key update skip locked
  loop
    wallets := wallets + 1;
    expired := expired + private.take_out_expired(due, at);
  end loop;
  return jsonb_build_object('expired', expired, 'more', wallets = batch);
end
$$;
comment on function private.expire_credit(jsonb, timestamptz) is
  'Takes out of the wallets what has expired. A wallet that somebody else has locked does it itself, or the next run does.';

create function public.expire_credit(jsonb) returns jsonb
language sql set search_path = ''
as $$
  select private.expire_credit($1, private.clock_now())
$$;
comment on function public.expire_credit(jsonb) is 'For usage-metering, by schedule. {"v":1,"limit":500} gives {"expired":n,"more":bool}.';

create function private.check_credit(organization_id uuid default null)
returns table (organization uuid, currency text, account_id uuid, problem text)
language sql stable security definer set search_path = ''
as $$
  with entry as (
    select
      account.organization_id, account.currency, account.id, account.kind, account.balance_minor,
      coalesce(sum(case ledger.side when 'credit' then ledger.amount_minor else -ledger.amount_minor end), 0) as entries
    from public.credit_accounts as account
    left join public.credit_ledger as ledger on ledger.organization_id = account.organization_id and ledger.account_id = account.id
    where account.organization_id = $1 or $1 is null
    group by account.id
  ),
  wallet as (
    select
      own.organization_id, own.currency, own.balance_minor, own.last_number, own.total_purchased_minor, own.total_consumed_minor,
      coalesce(sum(entry.entries), 0) as all_entries,
      coalesce(sum(entry.entries) filter (where entry.kind <= 'purchased'), 0) as held,
      coalesce(-sum(entry.entries) filter (where entry.kind = 'payments'), 0) as purchased,
      coalesce(sum(entry.entries) filter (where entry.kind = 'consumption'), 0) as consumed
    from public.call_credits as own
    left join entry on entry.organization_id = own.organization_id and entry.currency = own.currency
    where own.organization_id = $1 or $1 is null
    group by own.id
  )
  select entry.organization_id, entry.currency, entry.id, format('balance %s, entries %s', entry.balance_minor, entry.entries)
  from entry
  where entry.balance_minor <> entry.entries
  union all
  select
    wallet.organization_id, wallet.currency, null,
    format('balance %s, held %s, all accounts %s, last number %s', wallet.balance_minor, wallet.held, wallet.all_entries, wallet.last_number)
  from wallet
  where (wallet.balance_minor, wallet.all_entries, wallet.total_purchased_minor, wallet.total_consumed_minor)
      <> (wallet.held, 0, wallet.purchased, wallet.consumed)
    or wallet.last_number <> (
      select count(*)
      from public.credit_transactions as transaction
      where transaction.organization_id = wallet.organization_id and transaction.currency = wallet.currency
    )
$$;
comment on function private.check_credit(uuid) is
  'Computes every balance of prepaid credit again from the entries and returns what disagrees: nothing, ever. For one organization or all.';

revoke all on function
  private.write_credit(
    uuid, public.credit_transaction_type, bigint, text, uuid[], public.ledger_side[], bigint[], uuid, text, uuid, text, timestamptz
  ),
  private.credit_account(uuid, text, public.credit_account_kind, timestamptz), private.take_out_expired(uuid, timestamptz),
  private.lock_wallet(uuid, text, timestamptz),
  private.repeated_credit(uuid, text, public.credit_transaction_type, bigint, text, uuid),
  private.post_credit(uuid, public.credit_transaction_type, text, bigint, text, timestamptz, timestamptz, text, uuid, text),
  private.debit_credit(uuid, text, bigint, text, timestamptz, boolean, public.credit_transaction_type, text, uuid, text),
  private.refund_credit(uuid, uuid, bigint, text, timestamptz, text), private.expire_credit(jsonb, timestamptz),
  private.check_credit(uuid), public.expire_credit(jsonb)
from public, anon, authenticated, service_role;
grant execute on function private.expire_credit(jsonb, timestamptz), public.expire_credit(jsonb) to service_role;


-- What a plan allows --------------------------------------------------------------------------------------------------------------
-- Limits on things that are not metered: the plan's features, and for one customer the subscription's metadata.custom_limits.

create function private.check_feature_quota(organization_id uuid, feature_key text, current_usage bigint) returns boolean
language plpgsql stable security definer set search_path = ''
as $$
declare
  subscription public.subscriptions := private.live_subscription(organization_id);
  allowed jsonb;
begin
  if subscription.id is null or subscription.status not in ('trialing', 'active', 'past_due') then
    return false;
  end if;
  select coalesce(nullif(subscription.metadata #> array['custom_limits', feature_key], 'null'), plan.features -> feature_key)
  into allowed
  from public.subscription_plans as plan
  where plan.id = subscription.plan_id;
  return coalesce(
    case jsonb_typeof(allowed)
      when 'boolean' then allowed::boolean
      when 'number' then allowed::numeric = -1 or current_usage < allowed::numeric
    end,
    false
  );
end
$$;
revoke all on function private.check_feature_quota(uuid, text, bigint) from public;
comment on function private.check_feature_quota(uuid, text, bigint) is
  'Whether a plan leaves room for one more of something of which there are `current_usage`: -1 is unlimited, what the plan does not name is not '
  'part of it, and without a live subscription there is nothing. A switch is simply on or off.';

create function private.check_feature_quota(feature_key text, current_usage bigint) returns boolean
language plpgsql stable security definer set search_path = ''
as $$
begin
  return private.check_feature_quota(private.get_auth_org_id(), feature_key, current_usage);
end
$$;
revoke all on function private.check_feature_quota(text, bigint) from public;
grant execute on function private.check_feature_quota(text, bigint) to authenticated;
comment on function private.check_feature_quota(text, bigint) is 'The same for the caller''s own organization.';

create function public.check_feature_quota(feature_key text, current_usage bigint default 0) returns boolean
language sql stable security invoker set search_path = ''
as $$
  select private.check_feature_quota(feature_key, current_usage)
$$;
revoke all on function public.check_feature_quota(text, bigint) from public, anon, authenticated, service_role;
grant execute on function public.check_feature_quota(text, bigint) to authenticated;
comment on function public.check_feature_quota(text, bigint) is
  'Whether the caller''s plan leaves room for one more of a feature (max_users, max_leads, …) of which there are `current_usage`.';

create function private.get_org_subscription() returns jsonb
language plpgsql stable security definer set search_path = ''
as $$
declare
  organization uuid := private.require_org('billing.view');
  subscription public.subscriptions := private.live_subscription(organization);
begin
  if subscription.id is null then
    return null;
  end if;
  return (
    select jsonb_build_object(
      'id', subscription.id, 'status', subscription.status, 'billing_cycle', subscription.billing_cycle,
      'current_period_start', subscription.current_period_start, 'current_period_end', subscription.current_period_end,
      'trial_ends_at', subscription.trial_ends_at, 'cancel_at_period_end', subscription.cancel_at_period_end,
      'plan', jsonb_build_object(
        'id', plan.id, 'slug', plan.slug, 'name', plan.name,
        'features', plan.features || coalesce(nullif(subscription.metadata -> 'custom_limits', 'null'), '{}')
      ),
      'price', jsonb_build_object('id', price.id, 'version', price.version, 'currency', price.currency, 'base_minor', price.base_minor)
    )
    from public.subscription_plans as plan
    join public.plan_prices as price on price.id = subscription.plan_price_id
    where plan.id = subscription.plan_id
  );
end
$$;
revoke all on function private.get_org_subscription() from public;
grant execute on function private.get_org_subscription() to authenticated;
comment on function private.get_org_subscription() is 'The live subscription of the caller''s organization with its plan and price; null without one.';

create function public.get_org_subscription() returns jsonb
language sql stable security invoker set search_path = ''
as $$
  select private.get_org_subscription()
$$;
revoke all on function public.get_org_subscription() from public, anon, authenticated, service_role;
grant execute on function public.get_org_subscription() to authenticated;
comment on function public.get_org_subscription() is
  'The caller''s live subscription: {"id","status","plan":{"slug","features"},"price",…,"trial_ends_at"}; null without one. Needs billing.view.';
-- 13_functions_invoice_generation.sql

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
      -- What prepaid credit paid is settled: it is neither included nor billed again.
      coalesce((
        select sum(total.quantity - total.prepaid)
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
        and (log.usage_count, log.prepaid) <> (
          select coalesce(sum(total.quantity), 0), coalesce(sum(total.prepaid), 0)
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


-- Payments ------------------------------------------------------------------------------------------------------------------------
--
-- A gateway's news comes late, twice and in any order. A payment is known by its gateway's id or, before it has one, by its order;
-- the organization is always the invoice's or the order's, never the message's. Locks are taken payment first, then invoice.

create function private.settle_invoice(organization_id uuid, invoice_id uuid, at timestamptz) returns text
language plpgsql set search_path = ''
as $$
declare
  invoice public.invoices;
begin
  update public.invoices as own
  set status = 'paid', paid_at = at
  where own.organization_id = settle_invoice.organization_id
    and own.id = settle_invoice.invoice_id
    and own.status in ('open', 'uncollectible')
    and own.amount_paid_minor + own.credited_minor >= own.total_minor
  returning own.* into invoice;
  if found then
    perform private.emit(
      organization_id, 'invoice.paid', invoice_id::text,
      jsonb_build_object(
        'invoice_id', invoice.id, 'invoice_number', invoice.invoice_number, 'total_minor', invoice.total_minor,
        'amount_paid_minor', invoice.amount_paid_minor, 'credited_minor', invoice.credited_minor, 'currency', invoice.currency
      ),
      at
    );
    return 'paid';
  end if;
  return (
    select own.status::text
    from public.invoices as own
    where own.organization_id = settle_invoice.organization_id and own.id = settle_invoice.invoice_id
  );
end
$$;
comment on function private.settle_invoice(uuid, uuid, timestamptz) is
  'Makes an invoice paid once nothing is due on it any more, and returns its status.';

create function private.read_minor(request jsonb, field text) returns bigint
language plpgsql immutable set search_path = ''
as $$
begin
  if jsonb_typeof(request -> field) = 'number' and request ->> field ~ '^[0-9]{1,15}$' and (request ->> field)::bigint > 0 then
    return (request ->> field)::bigint;
  end if;
  perform private.raise_error(400, 'invalid_request', format('%s must be a whole positive number of minor units', field), field);
  return null;
end
$$;
comment on function private.read_minor(jsonb, text) is 'An amount of money of a request: a positive whole number, or the request ends with 400.';

create function private.read_choice(request jsonb, field text, choices text[]) returns text
language plpgsql immutable set search_path = ''
as $$
begin
  if request ->> field = any (choices) then
    return request ->> field;
  end if;
  perform private.raise_error(400, 'invalid_request', format('%s must be one of %s', field, array_to_string(choices, ', ')), field);
  return null;
end
$$;
comment on function private.read_choice(jsonb, text, text[]) is 'One of a few words of a request, or the request ends with 400.';

create function private.read_token(request jsonb, field text) returns text
language plpgsql immutable set search_path = ''
as $$
begin
  if request ->> field ~ '^[A-Za-z0-9_.:/-]{1,255}$' and not private.has_card_number(request ->> field) then
    return request ->> field;
  end if;
  perform private.raise_error(400, 'invalid_request', format('%s must be an id of the gateway', field), field);
  return null;
end
$$;
comment on function private.read_token(jsonb, text) is 'A gateway''s id of a request, or the request ends with 400.';

create function private.read_uuid(request jsonb, field text) returns uuid
language plpgsql immutable set search_path = ''
as $$
begin
  if request ->> field is null then
    return null;
  end if;
  if request ->> field !~* '^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$' then
    perform private.raise_error(400, 'invalid_request', format('%s must be a UUID', field), field);
  end if;
  return (request ->> field)::uuid;
end
$$;
comment on function private.read_uuid(jsonb, text) is 'An id of ours of a request, null when there is none, or the request ends with 400.';

create function private.open_payment(request jsonb, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  via public.payment_gateway := private.read_choice(request, 'gateway', array['razorpay', 'stripe', 'manual'])::public.payment_gateway;
  gateway_order text := private.read_token(request, 'order_id');
  wanted uuid := private.read_uuid(request, 'invoice_id');
  invoice public.invoices;
  buyer uuid := private.read_uuid(request, 'organization_id');
  due bigint;
  money text;
  payment public.payments;
begin
  if wanted is not null then
    select own.* into invoice from public.invoices as own where own.id = wanted and own.status <> 'draft' for no key update;
    if not found then
      perform private.raise_error(404, 'invoice_not_found', 'There is no such invoice', 'invoice_id');
    end if;
    due := invoice.total_minor - invoice.amount_paid_minor - invoice.credited_minor;
    if invoice.status not in ('open', 'uncollectible') or due <= 0 then
      perform private.raise_error(409, 'invoice_not_open', 'Nothing is due on the invoice', 'invoice_id');
    end if;
    buyer := invoice.organization_id;
    money := invoice.currency;
  else
    due := private.read_minor(request, 'amount_minor');
    money := request ->> 'currency';
    if coalesce(money, '') !~ '^[A-Z]{3}$' then
      perform private.raise_error(400, 'invalid_request', 'currency must be three upper-case letters', 'currency');
    end if;
    if not exists (select from public.organizations as organization where organization.id = buyer) then
      perform private.raise_error(404, 'organization_not_found', 'There is no such organization', 'organization_id');
    end if;
    -- Without an invoice there is no row to wait on, so that the same order at once would be written twice.
    perform from public.organizations as organization where organization.id = buyer for no key update;
  end if;

  select known.* into payment
  from public.payments as known
  where known.gateway = via and known.gateway_order_id = gateway_order
  order by known.created_at, known.id
  limit 1;
  if not found then
    insert into public.payments (
      organization_id, purpose, invoice_id, gateway, gateway_order_id, amount_minor, currency, status_at, created_at, updated_at
    )
    values (
      buyer, case when wanted is null then 'credit' else 'invoice' end, wanted, via, gateway_order, due, money, at, at, at
    )
    returning * into payment;
  elsif (payment.organization_id, payment.invoice_id) is distinct from (buyer, wanted) then
    perform private.raise_error(409, 'order_in_use', 'The order belongs to another payment', 'order_id');
  end if;
  return jsonb_build_object('payment_id', payment.id, 'status', payment.status, 'amount_minor', due, 'currency', money);
end
$$;
comment on function private.open_payment(jsonb, timestamptz) is
  'Writes down that an order was made at a gateway, for what is due on an invoice or for prepaid credit, so that its payment is '
  'recognised also when no browser comes back from it.';

create function private.record_payment(request jsonb, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  via public.payment_gateway := private.read_choice(request, 'gateway', array['razorpay', 'stripe', 'manual'])::public.payment_gateway;
  gateway_payment text := private.read_token(request, 'payment_id');
  gateway_order text := case when request ->> 'order_id' is not null then private.read_token(request, 'order_id') end;
  news public.payment_transaction_status :=
    private.read_choice(request, 'status', array['pending', 'authorized', 'failed', 'captured'])::public.payment_transaction_status;
  amount bigint := private.read_minor(request, 'amount_minor');
  money text := upper(request ->> 'currency');
  happened timestamptz := least(coalesce(private.to_business(private.parse_instant(request ->> 'occurred_at')), at), at);
  wanted uuid := private.read_uuid(request, 'invoice_id');
  payment public.payments;
  sibling public.payments;
  invoice public.invoices;
  result text := 'applied';
begin
  if coalesce(money, '') !~ '^[A-Z]{3}$' then
    perform private.raise_error(400, 'invalid_request', 'currency must be three letters', 'currency');
  end if;

  for try in 1..3 loop
    select known.* into payment
    from public.payments as known
    where known.gateway = via and known.gateway_payment_id = gateway_payment
    for no key update;
    exit when found;

    -- The first payment of an order takes the row that the order was given, a further try makes one of its own.
    begin
      update public.payments as known
      set gateway_payment_id = gateway_payment, amount_minor = amount, currency = money, status_at = happened
      where known.id = (
          select waiting.id
          from public.payments as waiting
          where waiting.gateway = via and waiting.gateway_order_id = gateway_order and waiting.gateway_payment_id is null
          limit 1
          for no key update
        )
        and known.gateway_payment_id is null
      returning known.* into payment;
      exit when found;

      select known.* into sibling
      from public.payments as known
      where known.gateway = via and known.gateway_order_id = gateway_order
      order by known.created_at, known.id
      limit 1;
      if found then
        wanted := sibling.invoice_id;
      else
        select own.* into invoice from public.invoices as own where own.id = wanted and own.status <> 'draft';
        if not found then
          return jsonb_build_object('result', 'orphan');
        end if;
      end if;
      insert into public.payments (
        organization_id, purpose, invoice_id, gateway, gateway_order_id, gateway_payment_id, amount_minor, currency, status_at, created_at,
        updated_at
      )
      values (
        coalesce(sibling.organization_id, invoice.organization_id), coalesce(sibling.purpose, 'invoice'), wanted, via, gateway_order,
        gateway_payment, amount, money, happened, at, at
      )
      returning * into payment;
      exit;
    exception when unique_violation then
      -- The same news came twice at once, and the other one was first.
      null;
    end;
  end loop;
  if payment.id is null then
    raise exception 'payment % is written by somebody else', gateway_payment using errcode = '40001';
  end if;

  if (payment.amount_minor, payment.currency) <> (amount, money) then
    result := 'conflict';
    perform private.emit(
      payment.organization_id, 'payment.conflict', payment.id::text,
      jsonb_build_object('payment_id', payment.id, 'amount_minor', amount, 'currency', money), at
    );
  elsif payment.status >= 'captured' then
    result := case when news = 'captured' then 'duplicate' else 'ignored' end;
  elsif news = payment.status then
    -- A payment that was just written is pending already.
    result := case when news = 'pending' and payment.created_at = at then 'applied' else 'duplicate' end;
  elsif news <> 'captured' and (happened < payment.status_at or news = 'pending') then
    result := 'ignored';
  elsif news <> 'captured' then
    update public.payments as known
    set
      status = news,
      status_at = happened,
      failure_code = case when news = 'failed' then left(request #>> '{failure,code}', 100) end,
      failure_message = case when news = 'failed' then left(request #>> '{failure,message}', 500) end
    where known.id = payment.id
    returning known.* into payment;
    if news = 'failed' and payment.invoice_id is not null then
      perform private.emit(
        payment.organization_id, 'invoice.payment_failed', payment.id::text,
        jsonb_build_object('invoice_id', payment.invoice_id, 'payment_id', payment.id, 'code', payment.failure_code), at
      );
    end if;
  else
    select own.* into invoice
    from public.invoices as own
    where own.organization_id = payment.organization_id and own.id = payment.invoice_id
    for no key update;
    payment.problem := case
      when payment.purpose = 'credit' then null
      when invoice.status not in ('open', 'uncollectible') then 'invoice_not_open'
      when invoice.currency <> money then 'currency_differs'
      when invoice.total_minor - invoice.amount_paid_minor - invoice.credited_minor <> amount then 'amount_differs'
    end;
    update public.payments as known
    set
      status = 'captured',
      status_at = happened,
      captured_at = happened,
      failure_code = null,
      failure_message = null,
      problem = payment.problem,
      applied_minor = case when payment.problem is null and known.purpose = 'invoice' then amount else 0 end
    where known.id = payment.id
    returning known.* into payment;
    perform private.audit(
      payment.organization_id, 'payment.captured', 'payment', payment.id,
      jsonb_strip_nulls(jsonb_build_object(
        'invoice_id', payment.invoice_id, 'amount_minor', amount, 'currency', money, 'problem', payment.problem
      )), at
    );
    if payment.problem is not null then
      result := 'unmatched';
      perform private.emit(
        payment.organization_id, 'payment.unmatched', payment.id::text,
        jsonb_build_object(
          'payment_id', payment.id, 'invoice_id', payment.invoice_id, 'amount_minor', amount, 'currency', money, 'problem', payment.problem
        ), at
      );
    elsif payment.purpose = 'credit' then
      perform private.post_credit(
        payment.organization_id, 'purchase', money, amount, 'payment ' || payment.id, at, null, 'payment', payment.id, null);
    else
      perform private.settle_invoice(payment.organization_id, payment.invoice_id, at);
    end if;
  end if;

  return jsonb_build_object(
    'result', result,
    'payment', jsonb_build_object('id', payment.id, 'organization_id', payment.organization_id, 'status', payment.status,
      'problem', payment.problem),
    'invoice', (
      select jsonb_build_object('id', own.id, 'number', own.invoice_number, 'status', own.status)
      from public.invoices as own
      where own.organization_id = payment.organization_id and own.id = payment.invoice_id
    )
  );
end
$$;
comment on function private.record_payment(jsonb, timestamptz) is
  'Applies a gateway''s news of a payment: once, in any order. An invoice becomes paid only by money of exactly what is due, in its '
  'currency; other money is kept, told and left to a person. A failure after the capture changes nothing.';

create function private.record_refund(request jsonb, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  via public.payment_gateway := private.read_choice(request, 'gateway', array['razorpay', 'stripe', 'manual'])::public.payment_gateway;
  gateway_refund text := private.read_token(request, 'refund_id');
  gateway_payment text := private.read_token(request, 'payment_id');
  news public.refund_status := private.read_choice(request, 'status', array['pending', 'processed', 'failed'])::public.refund_status;
  amount bigint := private.read_minor(request, 'amount_minor');
  money text := upper(request ->> 'currency');
  payment public.payments;
  refund public.refunds;
  purchase public.credit_transactions;
  left_over bigint;
  result text := 'applied';
begin
  -- The payment's row is what refunds of it wait on.
  select known.* into payment
  from public.payments as known
  where known.gateway = via and known.gateway_payment_id = gateway_payment and known.status >= 'captured'
  for no key update;
  if not found then
    return jsonb_build_object('result', 'orphan');
  end if;
  select known.* into refund
  from public.refunds as known
  where known.gateway = via and known.gateway_refund_id = gateway_refund;

  if found and (refund.payment_id, refund.amount_minor, refund.currency) is distinct from (payment.id, amount, money)
    or money is distinct from payment.currency
    or news = 'processed' and refund.status is distinct from 'processed' and payment.refunded_minor + amount > payment.amount_minor then
    perform private.emit(
      payment.organization_id, 'refund.conflict', via || ' ' || gateway_refund,
      jsonb_build_object('payment_id', payment.id, 'amount_minor', amount, 'currency', money), at
    );
    return jsonb_build_object('result', 'conflict', 'payment', jsonb_build_object('id', payment.id, 'status', payment.status));
  end if;

  if refund.id is null then
    insert into public.refunds (
      organization_id, payment_id, gateway, gateway_refund_id, status, amount_minor, currency, processed_at, created_at, updated_at
    )
    values (
      payment.organization_id, payment.id, via, gateway_refund, news, amount, money, case when news = 'processed' then at end, at, at
    )
    returning * into refund;
  elsif refund.status = news then
    result := 'duplicate';
  elsif refund.status <> 'pending' or news = 'pending' then
    result := 'ignored';
  else
    update public.refunds as known
    set status = news, processed_at = case when news = 'processed' then at end
    where known.id = refund.id
    returning known.* into refund;
  end if;

  if result = 'applied' and news = 'processed' then
    perform private.audit(
      payment.organization_id, 'payment.refunded', 'payment', payment.id,
      jsonb_build_object('refund_id', refund.id, 'amount_minor', amount, 'currency', money), at
    );
    perform private.emit(
      payment.organization_id, 'payment.refunded', refund.id::text,
      jsonb_build_object('payment_id', payment.id, 'invoice_id', payment.invoice_id, 'amount_minor', amount, 'currency', money), at
    );
    if payment.purpose = 'credit' then
      -- The credit that was bought goes with the money, as far as it is still there.
      select transaction.* into purchase
      from public.credit_transactions as transaction
      where transaction.organization_id = payment.organization_id and transaction.idempotency_key = 'payment ' || payment.id;
      perform private.lock_wallet(payment.organization_id, purchase.currency, at);
      select least(amount, coalesce(sum(account.balance_minor), 0))
      into left_over
      from public.credit_accounts as account
      where account.organization_id = payment.organization_id and account.currency = purchase.currency and account.kind = 'purchased';
      if left_over > 0 then
        perform private.refund_credit(payment.organization_id, purchase.id, left_over, 'refund ' || refund.id, at, null);
      end if;
      if left_over < amount then
        perform private.emit(
          payment.organization_id, 'credit.refunded_when_used', refund.id::text,
          jsonb_build_object('payment_id', payment.id, 'used_minor', amount - left_over, 'currency', money), at
        );
      end if;
    end if;
  end if;
  return jsonb_build_object(
    'result', result,
    'refund', jsonb_build_object('id', refund.id, 'status', refund.status),
    'payment', (
      select jsonb_build_object('id', known.id, 'status', known.status, 'refunded_minor', known.refunded_minor)
      from public.payments as known
      where known.id = payment.id
    )
  );
end
$$;
comment on function private.record_refund(jsonb, timestamptz) is
  'Applies a gateway''s news of a refund, once; never more than was paid. Before its payment is known it is an orphan, to be tried again. '
  'A refund of prepaid credit takes the credit out as far as it is there.';

-- Payment methods -----------------------------------------------------------------------------------------------------------------

create function private.save_payment_method(request jsonb, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  via public.payment_gateway := private.read_choice(request, 'gateway', array['razorpay', 'stripe'])::public.payment_gateway;
  kind public.payment_method_type :=
    private.read_choice(request, 'type', array['card', 'upi', 'bank_transfer', 'razorpay', 'stripe'])::public.payment_method_type;
  token text := private.read_token(request, 'payment_method_id');
  customer text := case when request ->> 'customer_id' is not null then private.read_token(request, 'customer_id') end;
  owner uuid := private.read_uuid(request, 'organization_id');
  method public.payment_methods;
begin
  -- The organization's row is what decides between two that become the default at once.
  perform from public.organizations as organization where organization.id = owner for no key update;
  if not found then
    perform private.raise_error(404, 'organization_not_found', 'There is no such organization', 'organization_id');
  end if;
  if coalesce(request ->> 'last4', '0000') !~ '^[0-9]{4}$' then
    perform private.raise_error(422, 'invalid_last4', 'last4 must be the last four digits', 'last4');
  end if;
  select known.* into method
  from public.payment_methods as known
  where known.gateway = via and known.gateway_payment_method_id = token;
  if found and method.organization_id <> owner then
    perform private.raise_error(409, 'payment_method_in_use', 'The payment method belongs to somebody else', 'payment_method_id');
  end if;

  if coalesce((request ->> 'is_default')::boolean, false) or not exists (
    select
    from public.payment_methods as other
    where other.organization_id = owner and other.is_default and other.id is distinct from method.id
  ) then
    update public.payment_methods as other
    set is_default = false
    where other.organization_id = owner and other.is_default and other.id is distinct from method.id;
    method.is_default := true;
  end if;
  insert into public.payment_methods as known (
    organization_id, type, gateway, gateway_customer_id, gateway_payment_method_id, last4, brand, expiry_month, expiry_year, is_default,
    created_at, updated_at
  )
  values (
    owner, kind, via, customer, token, request ->> 'last4', request ->> 'brand', (request ->> 'expiry_month')::integer,
    (request ->> 'expiry_year')::integer, coalesce(method.is_default, false), at, at
  )
  on conflict on constraint payment_methods_token_key do update
  set
    -- What it is by name says more than that it is the gateway's, whichever is told first.
    type = case when excluded.type in ('razorpay', 'stripe') then known.type else excluded.type end,
    gateway_customer_id = coalesce(excluded.gateway_customer_id, known.gateway_customer_id),
    last4 = coalesce(excluded.last4, known.last4),
    brand = coalesce(excluded.brand, known.brand),
    expiry_month = coalesce(excluded.expiry_month, known.expiry_month),
    expiry_year = coalesce(excluded.expiry_year, known.expiry_year),
    is_default = excluded.is_default,
    removed_at = null
  where known.organization_id = excluded.organization_id
  returning known.* into method;
  if method.id is null then
    perform private.raise_error(409, 'payment_method_in_use', 'The payment method belongs to somebody else', 'payment_method_id');
  end if;
  perform private.audit(
    owner, 'payment_method.saved', 'payment_method', method.id, jsonb_build_object('type', kind, 'is_default', method.is_default), at
  );
  return jsonb_build_object('id', method.id, 'is_default', method.is_default);
end
$$;
comment on function private.save_payment_method(jsonb, timestamptz) is
  'Keeps a gateway''s token for an organization; the first one, and one that says so, becomes the default. Twice the same is one.';

create function private.remove_payment_method(request jsonb, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  via public.payment_gateway := private.read_choice(request, 'gateway', array['razorpay', 'stripe'])::public.payment_gateway;
  token text := private.read_token(request, 'payment_method_id');
  method public.payment_methods;
begin
  update public.payment_methods as known
  set removed_at = at, is_default = false
  where known.gateway = via and known.gateway_payment_method_id = token and known.removed_at is null
  returning known.* into method;
  if found then
    perform private.audit(method.organization_id, 'payment_method.removed', 'payment_method', method.id, '{}', at);
  end if;
  return jsonb_build_object('removed', method.id is not null);
end
$$;
comment on function private.remove_payment_method(jsonb, timestamptz) is
  'A gateway''s token is used no more: its mandate was cancelled or its card removed.';

-- Credit notes --------------------------------------------------------------------------------------------------------------------

create function private.issue_credit_note(request jsonb, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  wanted uuid := private.read_uuid(request, 'invoice_id');
  given jsonb := request -> 'lines';
  key text := request ->> 'idempotency_key';
  why text := btrim(request ->> 'reason');
  invoice public.invoices;
  note public.credit_notes;
  lines uuid[];
  amounts bigint[];
  subtotal bigint;
  credited_before bigint;
  tax bigint;
begin
  if length(coalesce(key, '')) not between 1 and 255 then
    perform private.raise_error(400, 'invalid_request', 'idempotency_key must be a text of 1 to 255 characters', 'idempotency_key');
  end if;
  if coalesce(why, '') = '' then
    perform private.raise_error(422, 'reason_missing', 'A credit note says why', 'reason');
  end if;

  -- Credit notes of one invoice wait for each other, and for its payment.
  select own.* into invoice from public.invoices as own where own.id = wanted and own.status <> 'draft' for no key update;
  if not found then
    perform private.raise_error(404, 'invoice_not_found', 'There is no such invoice', 'invoice_id');
  end if;

  if given is not null then
    if jsonb_typeof(given) <> 'array' or jsonb_array_length(given) = 0 then
      perform private.raise_error(400, 'invalid_request', 'lines must be an array of at least one line, or be left out', 'lines');
    end if;
    select array_agg(private.read_uuid(item.value, 'invoice_line_id') order by item.position),
      array_agg(private.read_minor(item.value, 'amount_minor') order by item.position)
    into lines, amounts
    from jsonb_array_elements(given) with ordinality as item (value, position);
  end if;

  select known.* into note
  from public.credit_notes as known
  where known.organization_id = invoice.organization_id and known.idempotency_key = key;
  if found then
    if note.invoice_id <> invoice.id or note.reason <> why or given is not null and (
      select array_agg((line.invoice_line_id, line.amount_minor) order by line.position)
      from public.credit_note_lines as line
      where line.organization_id = note.organization_id and line.credit_note_id = note.id
    ) is distinct from (
      select array_agg((line.id, line.amount) order by line.position)
      from unnest(lines, amounts) with ordinality as line (id, amount, position)
    ) then
      perform private.raise_error(409, 'idempotency_conflict', 'Another credit note was issued under this key', 'idempotency_key');
    end if;
    return jsonb_build_object(
      'result', 'duplicate', 'id', note.id, 'number', note.credit_note_number, 'total_minor', note.total_minor, 'currency', note.currency
    );
  end if;
  if invoice.status = 'void' then
    perform private.raise_error(409, 'invoice_void', 'A void invoice is not credited', 'invoice_id');
  end if;

  -- What is left of each line; without lines, all of it.
  select
    array_agg(remaining.id order by remaining.position), array_agg(remaining.amount order by remaining.position)
  into lines, amounts
  from (
    select
      billed.id, billed.position,
      coalesce(asked.amount, billed.amount_minor - credited.amount) as amount
    from public.invoice_lines as billed
    cross join lateral (
      select coalesce(sum(line.amount_minor), 0)::bigint as amount
      from public.credit_note_lines as line
      join public.credit_notes as issued on issued.organization_id = line.organization_id and issued.id = line.credit_note_id
      where line.organization_id = billed.organization_id and line.invoice_line_id = billed.id and issued.status = 'issued'
    ) as credited
    left join (
      select line.id, sum(line.amount)::bigint as amount
      from unnest(lines, amounts) as line (id, amount)
      group by line.id
    ) as asked on asked.id = billed.id
    where billed.organization_id = invoice.organization_id
      and billed.invoice_id = invoice.id
      and (given is null and billed.amount_minor > credited.amount or asked.amount <= billed.amount_minor - credited.amount)
  ) as remaining;
  if coalesce(cardinality(lines), 0) = 0
    or given is not null and cardinality(lines) <> jsonb_array_length(given) then
    perform private.raise_error(
      422, 'credit_too_large', 'A line is not on the invoice, is named twice, or has less left to be credited', 'lines');
  end if;
  select sum(amount.minor)::bigint into subtotal from unnest(amounts) as amount (minor);
  select coalesce(sum(issued.subtotal_minor), 0)::bigint
  into credited_before
  from public.credit_notes as issued
  where issued.organization_id = invoice.organization_id and issued.invoice_id = invoice.id and issued.status = 'issued';
  if credited_before + subtotal > invoice.subtotal_minor then
    perform private.raise_error(422, 'credit_too_large', 'More would be credited than was billed', 'lines');
  end if;

  insert into public.credit_notes (
    organization_id, invoice_id, idempotency_key, reason, currency, subtotal_minor, tax_minor, total_minor, issuer, customer, created_by,
    created_at
  )
  values (
    invoice.organization_id, invoice.id, key, why, invoice.currency, subtotal, 0, subtotal, invoice.issuer, invoice.customer,
    (select auth.uid()), at
  )
  returning * into note;
  insert into public.credit_note_lines (organization_id, credit_note_id, invoice_line_id, position, description, amount_minor)
  select
    note.organization_id, note.id, billed.id, row_number() over (order by line.position), billed.description, line.amount
  from unnest(lines, amounts) with ordinality as line (id, amount, position)
  join public.invoice_lines as billed on billed.organization_id = note.organization_id and billed.id = line.id;
  -- By the difference of two roundings, so that the pieces of an invoice take back its tax to the unit.
  with levied as (
    insert into public.credit_note_taxes (organization_id, credit_note_id, position, name, rate_bp, taxable_minor, amount_minor)
    select
      note.organization_id, note.id, billed.position, billed.name, billed.rate_bp, subtotal,
      private.divide_half_away(billed.amount_minor::numeric * (credited_before + subtotal), invoice.subtotal_minor)
        - private.divide_half_away(billed.amount_minor::numeric * credited_before, invoice.subtotal_minor)
    from public.invoice_taxes as billed
    where billed.organization_id = invoice.organization_id and billed.invoice_id = invoice.id
    returning credit_note_taxes.amount_minor
  )
  select coalesce(sum(levied.amount_minor), 0)::bigint into tax from levied;

  perform private.audit(
    note.organization_id, 'credit_note.issued', 'credit_note', note.id,
    jsonb_build_object('invoice_id', invoice.id, 'total_minor', subtotal + tax, 'currency', note.currency, 'reason', why), at
  );
  update public.credit_notes as own
  set tax_minor = tax, total_minor = own.subtotal_minor + tax
  where own.id = note.id;
  update public.credit_notes as own set status = 'issued', issued_at = at where own.id = note.id returning own.* into note;
  perform private.settle_invoice(note.organization_id, invoice.id, at);
  perform private.emit(
    note.organization_id, 'credit_note.issued', note.id::text,
    jsonb_build_object(
      'credit_note_id', note.id, 'credit_note_number', note.credit_note_number, 'invoice_id', invoice.id,
      'invoice_number', invoice.invoice_number, 'total_minor', note.total_minor, 'currency', note.currency
    ), at
  );
  return jsonb_build_object(
    'result', 'issued', 'id', note.id, 'number', note.credit_note_number, 'total_minor', note.total_minor, 'currency', note.currency
  );
end
$$;
comment on function private.issue_credit_note(jsonb, timestamptz) is
  'Issues a credit note against a final invoice, once a key: for lines that are named, or for all that is left. Taxes follow the '
  'invoice''s. An invoice on which nothing is due any more becomes paid.';

-- What handlers call --------------------------------------------------------------------------------------------------------------

create function public.open_payment(jsonb) returns jsonb
language sql set search_path = ''
as $$
  select private.open_payment($1, private.clock_now())
$$;
comment on function public.open_payment(jsonb) is
  'For invoice-generation. {"v":1,"gateway","order_id","invoice_id"} or, for credit, {"v":1,"gateway","order_id","organization_id",'
  '"amount_minor","currency"} gives {"payment_id","status","amount_minor","currency"}.';

create function public.record_payment(jsonb) returns jsonb
language sql set search_path = ''
as $$
  select private.record_payment($1, private.clock_now())
$$;
comment on function public.record_payment(jsonb) is
  'For webhook-intake. {"v":1,"gateway","payment_id","order_id"?,"invoice_id"?,"status":"pending|authorized|failed|captured",'
  '"amount_minor","currency","occurred_at"?,"failure"?:{"code","message"}} gives {"result":"applied|duplicate|ignored|unmatched|conflict|'
  'orphan","payment","invoice"}.';

create function public.record_refund(jsonb) returns jsonb
language sql set search_path = ''
as $$
  select private.record_refund($1, private.clock_now())
$$;
comment on function public.record_refund(jsonb) is
  'For webhook-intake. {"v":1,"gateway","refund_id","payment_id","status":"pending|processed|failed","amount_minor","currency"} gives '
  '{"result":"applied|duplicate|ignored|conflict|orphan","refund","payment"}.';

create function public.save_payment_method(jsonb) returns jsonb
language sql set search_path = ''
as $$
  select private.save_payment_method($1, private.clock_now())
$$;
comment on function public.save_payment_method(jsonb) is
  'For webhook-intake. {"v":1,"organization_id","gateway","type","payment_method_id","customer_id"?,"last4"?,"brand"?,"expiry_month"?,'
  '"expiry_year"?,"is_default"?} gives {"id","is_default"}.';

create function public.remove_payment_method(jsonb) returns jsonb
language sql set search_path = ''
as $$
  select private.remove_payment_method($1, private.clock_now())
$$;
comment on function public.remove_payment_method(jsonb) is
  'For webhook-intake. {"v":1,"gateway","payment_method_id"} gives {"removed":bool}.';

create function public.issue_credit_note(jsonb) returns jsonb
language sql set search_path = ''
as $$
  select private.issue_credit_note($1, private.clock_now())
$$;
comment on function public.issue_credit_note(jsonb) is
  'For invoice-generation. {"v":1,"invoice_id","idempotency_key","reason","lines"?:[{"invoice_line_id","amount_minor"}]} gives '
  '{"result":"issued|duplicate","id","number","total_minor","currency"}.';

revoke all on function
  private.settle_invoice(uuid, uuid, timestamptz), private.read_minor(jsonb, text), private.read_choice(jsonb, text, text[]),
  private.read_token(jsonb, text), private.read_uuid(jsonb, text), private.open_payment(jsonb, timestamptz),
  private.record_payment(jsonb, timestamptz), private.record_refund(jsonb, timestamptz),
  private.save_payment_method(jsonb, timestamptz), private.remove_payment_method(jsonb, timestamptz),
  private.issue_credit_note(jsonb, timestamptz), public.open_payment(jsonb), public.record_payment(jsonb), public.record_refund(jsonb),
  public.save_payment_method(jsonb), public.remove_payment_method(jsonb), public.issue_credit_note(jsonb)
from public, anon, authenticated, service_role;
grant execute on function
  private.open_payment(jsonb, timestamptz), private.record_payment(jsonb, timestamptz), private.record_refund(jsonb, timestamptz),
  private.save_payment_method(jsonb, timestamptz), private.remove_payment_method(jsonb, timestamptz),
  private.issue_credit_note(jsonb, timestamptz), public.open_payment(jsonb), public.record_payment(jsonb), public.record_refund(jsonb),
  public.save_payment_method(jsonb), public.remove_payment_method(jsonb), public.issue_credit_note(jsonb)
to service_role;
-- 14_functions_agents.sql

-- What a voice agent's events mean. An event finds its attempt by our id, which the agent was given with the call, by the carrier's call,
-- or by the agent's own. Events come in any order and more than once: of two values the one that knows more stays, so that the row in
-- which a call's events end is the same. Locks are taken in the order that 06_campaigns_and_calling.sql names.


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
  private.attempt_of_agent(private.webhook_events), private.knows_more(jsonb, text, integer, text, text),
  private.number_of_person(public.call_logs), private.lock_person(public.call_logs, boolean), private.opt_out(uuid, text, text, timestamptz),
  private.call_back(public.call_logs, timestamptz, timestamptz),
  private.note_activity(public.call_logs, text, text, jsonb, timestamptz),
  private.follow_conversation(public.call_logs, jsonb, boolean, boolean, timestamptz),
  private.apply_agent_event(private.webhook_events, public.webhook_sources, timestamptz)
from public, anon, authenticated, service_role;
-- 15_functions_stores_and_payments.sql

-- What shops and payment gateways tell: each event of theirs changes the row that it names, in whatever order it comes.
-- Called by apply_event() through private.apply_payload(); users call only what is at the end.


-- Words and numbers of others -----------------------------------------------------------------------------------------------------

create function private.to_minor(amount text, currency text) returns bigint
language sql immutable parallel safe set search_path = '' as $$
  select round(
    amount::numeric * case
      when currency in (
        'BIF', 'CLP', 'DJF', 'GNF', 'ISK', 'JPY', 'KMF', 'KRW', 'PYG', 'RWF', 'UGX', 'VND', 'VUV', 'XAF', 'XOF', 'XPF'
      ) then 1
      when currency in ('BHD', 'IQD', 'JOD', 'KWD', 'LYD', 'OMR', 'TND') then 1000
      else 100
    end
  )::bigint
$$;
comment on function private.to_minor(text, text) is
  'A decimal amount in the minor unit of its currency (ISO 4217), exactly; what is finer than that is rounded half away from zero.';

create function private.plain_email(written text) returns text
language sql immutable parallel safe set search_path = '' as $$
  select case when length(written) <= 254 and btrim(written) ~ '^[^@\s]+@[^@\s]+$' then lower(btrim(written)) end
$$;
comment on function private.plain_email(text) is 'An address as it is compared and stored; null for what is none.';

create function private.plain_phone(written text) returns text
language sql immutable parallel safe set search_path = '' as $$
  select case
    when written ~ '^\s*(\+|00)[0-9 ().\-/]+$' and number.digits ~ '^[1-9][0-9]{6,14}$' then '+' || number.digits
  end
  from (select regexp_replace(regexp_replace(written, '[^0-9]', '', 'g'), '^00', '')) as number (digits)
$$;
comment on function private.plain_phone(text) is
  'The E.164 form of a number that says its country; null for any other, as nobody may guess whom to call.';

create function private.store_time(written text) returns timestamptz
language sql stable set search_path = '' as $$
  select private.to_business(private.parse_instant(written))
$$;
comment on function private.store_time(text) is 'A platform''s RFC 3339 time as business time; null for what is none.';

create function private.text_array(list jsonb) returns text[]
language sql immutable parallel safe set search_path = '' as $$
  select coalesce(array_agg(item.value order by item.place), '{}')
  from jsonb_array_elements_text(case when jsonb_typeof(list) = 'array' then list else '[]' end) with ordinality as item (value, place)
$$;
comment on function private.text_array(jsonb) is 'The texts of a JSON array; none when it is none.';


-- Versions ------------------------------------------------------------------------------------------------------------------------
-- A platform's timestamps are of a whole second, and two changes may share one. Of two versions of the same second the one that is
-- further on stands, and of two equally far the one with the greater hash: which comes first never matters.

create function private.store_version(told jsonb, rank integer) returns text
language sql immutable set search_path = '' as $$
  select lpad(least(greatest(coalesce(rank, 0), 0), 99)::text, 2, '0')
    || left(encode(extensions.digest(convert_to(told::text, 'utf8'), 'sha256'), 'hex'), 48)
$$;
comment on function private.store_version(jsonb, integer) is
  'What decides between two versions of one second, kept in sync_hash: how far on it is, then the content''s hash.';

create function private.lock_store_object(store uuid, kind text, external_id text) returns void
language sql volatile set search_path = '' as $$
  select pg_advisory_xact_lock(hashtextextended('trunkline.store.' || store || '.' || kind || '.' || external_id, 0))
$$;
comment on function private.lock_store_object(uuid, text, text) is
  'One event of a platform''s object at a time, also of one that is not there yet: an order before its customer.';

create function private.bury(source public.webhook_sources, kind text, external_id text, redacted boolean, at timestamptz) returns void
language sql volatile security definer set search_path = '' as $$
  insert into private.store_tombstones as known (organization_id, store_id, kind, external_id, is_redacted, deleted_at)
  values (source.organization_id, source.store_id, kind, external_id, redacted, at)
  on conflict (organization_id, store_id, kind, external_id) do update
  set is_redacted = known.is_redacted or excluded.is_redacted
$$;
comment on function private.bury(public.webhook_sources, text, text, boolean, timestamptz) is
  'Remembers that the platform deleted an object, so that a late event does not bring it back.';

create function private.is_buried(source public.webhook_sources, kind text, external_id text, restored boolean) returns boolean
language plpgsql volatile security definer set search_path = '' as $$
begin
  if restored then
    delete from private.store_tombstones as known
    where known.organization_id = source.organization_id
      and known.store_id = source.store_id
      and known.kind = is_buried.kind
      and known.external_id = is_buried.external_id
      and not known.is_redacted;
  end if;
  return exists (
    select
    from private.store_tombstones as known
    where known.organization_id = source.organization_id
      and known.store_id = source.store_id
      and known.kind = is_buried.kind
      and known.external_id = is_buried.external_id
  );
end
$$;
comment on function private.is_buried(public.webhook_sources, text, text, boolean) is
  'Whether the platform deleted an object; one that it took out of its bin again is not.';


-- Products ------------------------------------------------------------------------------------------------------------------------

create function private.apply_product(
  source public.webhook_sources, store public.stores, payload jsonb, at timestamptz, out result public.event_status, out error text
)
language plpgsql volatile security definer set search_path = '' as $$
declare
  told     constant jsonb := payload -> 'product';
  external constant text := told ->> 'external_id';
  version  constant timestamptz := private.parse_instant(payload ->> 'version_at');
  currency constant text := coalesce(told ->> 'currency', store.currency_code);
  product  uuid;
begin
  perform private.lock_store_object(store.id, 'product', external);
  if private.is_buried(source, 'product', external, (payload ->> 'restored')::boolean) then
    result := 'ignored';
    error := 'deleted';
    return;
  end if;
  insert into public.products as known (
    organization_id, store_id, external_id, external_variant_id, title, description, handle, product_type, vendor, tags, price_minor,
    compare_at_price_minor, currency_code, sku, barcode, inventory_quantity, inventory_tracked, availability, weight, weight_unit, status,
    is_published, published_at, platform_data, source_updated_at, last_synced_at, sync_hash
  )
  values (
    store.organization_id, store.id, external, told ->> 'external_variant_id',
    left(coalesce(nullif(btrim(told ->> 'title'), ''), 'Product ' || external), 500), told ->> 'description', told ->> 'handle',
    told ->> 'product_type', told ->> 'vendor', private.text_array(told -> 'tags'),
    greatest(coalesce(private.to_minor(told ->> 'price', currency), 0), 0),
    greatest(private.to_minor(told ->> 'compare_at_price', currency), 0), currency, told ->> 'sku', told ->> 'barcode',
    least(greatest(coalesce((told ->> 'inventory_quantity')::numeric, 0), 0), 2147483647)::integer,
    coalesce((told ->> 'inventory_tracked')::boolean, false),
    coalesce(told ->> 'availability', 'in_stock')::public.product_availability,
    case when (told ->> 'weight')::numeric between 0 and 99999 then (told ->> 'weight')::numeric end,
    coalesce(told ->> 'weight_unit', 'kg'), coalesce(told ->> 'status', 'active')::public.product_status,
    coalesce((told ->> 'is_published')::boolean, true), private.store_time(told ->> 'published_at'),
    coalesce(told -> 'platform', '{}'), version, at, private.store_version(told, 0)
  )
  on conflict (organization_id, store_id, external_id) do update
  set
    external_variant_id = excluded.external_variant_id, title = excluded.title, description = excluded.description,
    handle = excluded.handle, product_type = excluded.product_type, vendor = excluded.vendor, tags = excluded.tags,
    price_minor = excluded.price_minor, compare_at_price_minor = excluded.compare_at_price_minor,
    currency_code = excluded.currency_code, sku = excluded.sku, barcode = excluded.barcode,
    inventory_quantity = excluded.inventory_quantity, inventory_tracked = excluded.inventory_tracked,
    availability = excluded.availability, weight = excluded.weight, weight_unit = excluded.weight_unit,
    -- A word that nobody has mapped leaves what was known.
    status = coalesce((told ->> 'status')::public.product_status, known.status),
    is_published = excluded.is_published, published_at = excluded.published_at,
    platform_data = known.platform_data || excluded.platform_data, source_updated_at = excluded.source_updated_at,
    last_synced_at = excluded.last_synced_at, sync_hash = excluded.sync_hash
  where known.source_updated_at is null
    or excluded.source_updated_at > known.source_updated_at
    or excluded.source_updated_at = known.source_updated_at
      and excluded.sync_hash collate "C" > coalesce(known.sync_hash, '') collate "C"
  returning known.id into product;
  if product is null then
    result := 'ignored';
    error := 'older_version';
    return;
  end if;

  delete from public.product_images as image
  where image.organization_id = store.organization_id
    and image.store_id = store.id
    and image.product_id = product
    and image.external_id is not null
    and not exists (
      select from jsonb_array_elements(coalesce(told -> 'images', '[]')) as item (value) where item.value ->> 'external_id' = image.external_id
    );
  insert into public.product_images as known (organization_id, store_id, product_id, external_id, url, alt_text, position)
  select distinct on (item.external_id)
    store.organization_id, store.id, product, item.external_id, item.url, item.alt_text, greatest(coalesce(item.position, 0), 0)
  from jsonb_to_recordset(coalesce(told -> 'images', '[]')) as item (external_id text, url text, alt_text text, position integer)
  where item.external_id is not null and item.url ~ '^https?://'
  order by item.external_id
  on conflict (organization_id, store_id, product_id, external_id) do update
  set url = excluded.url, alt_text = excluded.alt_text, position = excluded.position
  where (known.url, known.alt_text, known.position) is distinct from (excluded.url, excluded.alt_text, excluded.position);

  -- Orders that named it before it was known.
  update public.order_line_items as line
  set product_id = product
  where line.organization_id = store.organization_id
    and line.store_id = store.id
    and line.external_product_id = external
    and line.product_id is null;
  result := 'applied';
end
$$;
comment on function private.apply_product(public.webhook_sources, public.stores, jsonb, timestamptz) is
  'A product as its platform says it: the row and its images, by source version.';


-- Customers -----------------------------------------------------------------------------------------------------------------------

create function private.apply_customer(
  source public.webhook_sources, store public.stores, payload jsonb, at timestamptz, out result public.event_status, out error text
)
language plpgsql volatile security definer set search_path = '' as $$
declare
  told     constant jsonb := payload -> 'customer';
  external constant text := told ->> 'external_id';
  version  constant timestamptz := private.parse_instant(payload ->> 'version_at');
  unlinked uuid[];
  customer uuid;
  is_newer boolean;
begin
  perform private.lock_store_object(store.id, 'customer', external);
  if private.is_buried(source, 'customer', external, (payload ->> 'restored')::boolean) then
    result := 'ignored';
    error := 'deleted';
    return;
  end if;
  -- Orders are locked before their customer.
  unlinked := array(
    select purchase.id
    from public.orders as purchase
    where purchase.organization_id = store.organization_id
      and purchase.store_id = store.id
      and purchase.customer_external_id = external
      and purchase.customer_id is null
    order by purchase.id
    for no key update
  );
  insert into public.customers as known (
    organization_id, store_id, external_id, email, phone, first_name, last_name, accepts_marketing, preferred_language, tags, platform_data,
    source_updated_at, last_synced_at, sync_hash
  )
  values (
    store.organization_id, store.id, external, private.plain_email(told ->> 'email'), private.plain_phone(told ->> 'phone'),
    left(told ->> 'first_name', 255), left(told ->> 'last_name', 255), coalesce((told ->> 'accepts_marketing')::boolean, false),
    case when told ->> 'language' ~ '^[A-Za-z]{2,3}([-_][A-Za-z0-9]{2,8})*$' then told ->> 'language' else 'en' end,
    private.text_array(told -> 'tags'), coalesce(told -> 'platform', '{}'), version, at, private.store_version(told, 0)
  )
  on conflict (organization_id, store_id, external_id) do update
  set
    email = excluded.email, phone = excluded.phone, first_name = excluded.first_name, last_name = excluded.last_name,
    accepts_marketing = excluded.accepts_marketing, preferred_language = excluded.preferred_language, tags = excluded.tags,
    platform_data = known.platform_data || excluded.platform_data, source_updated_at = excluded.source_updated_at,
    last_synced_at = excluded.last_synced_at, sync_hash = excluded.sync_hash
  where known.source_updated_at is null
    or excluded.source_updated_at > known.source_updated_at
    or excluded.source_updated_at = known.source_updated_at
      and excluded.sync_hash collate "C" > coalesce(known.sync_hash, '') collate "C"
  returning known.id into customer;
  is_newer := customer is not null;
  if cardinality(unlinked) > 0 then
    update public.orders as purchase
    set customer_id = person.id
    from public.customers as person
    where purchase.id = any (unlinked)
      and person.organization_id = store.organization_id
      and person.store_id = store.id
      and person.external_id = external;
  end if;
  result := case when is_newer or cardinality(unlinked) > 0 then 'applied' else 'ignored' end::public.event_status;
  error := case when not is_newer then 'older_version' end;
end
$$;
comment on function private.apply_customer(public.webhook_sources, public.stores, jsonb, timestamptz) is
  'A customer as their platform says it, by source version; orders that named them before they were known are linked.';


-- Orders --------------------------------------------------------------------------------------------------------------------------

create function private.order_refunds(refunds jsonb) returns bigint
language sql immutable parallel safe set search_path = '' as $$
  select coalesce(sum(entry.value::bigint), 0)::bigint
  from jsonb_each_text(case when jsonb_typeof(refunds) = 'object' then refunds else '{}' end) as entry (key, value)
$$;
comment on function private.order_refunds(jsonb) is 'The sum of an order''s refunds, each kept under its id and so counted once.';

create function private.apply_order(
  source public.webhook_sources, store public.stores, payload jsonb, at timestamptz, out result public.event_status, out error text
)
language plpgsql volatile security definer set search_path = '' as $$
declare
  told     constant jsonb := payload -> 'order';
  external constant text := told ->> 'external_id';
  buyer    constant text := told ->> 'customer_external_id';
  version  constant timestamptz := private.parse_instant(payload ->> 'version_at');
  currency constant text := coalesce(upper(told ->> 'currency'), store.currency_code);
  fresh    public.orders;
  person   private.store_tombstones;
  written  uuid;
begin
  perform private.lock_store_object(store.id, 'order', external);
  if private.is_buried(source, 'order', external, (payload ->> 'restored')::boolean) then
    result := 'ignored';
    error := 'deleted';
    return;
  end if;
  if buyer is not null then
    perform private.lock_store_object(store.id, 'customer', buyer);
    select known.* into person
    from private.store_tombstones as known
    where known.organization_id = store.organization_id
      and known.store_id = store.id
      and known.kind = 'customer'
      and known.external_id = buyer;
    if person.external_id is null then
      -- The order may come before its customer: a row that any event of theirs completes.
      insert into public.customers (organization_id, store_id, external_id)
      values (store.organization_id, store.id, buyer)
      on conflict (organization_id, store_id, external_id) do nothing;
      select known.id into fresh.customer_id
      from public.customers as known
      where known.organization_id = store.organization_id and known.store_id = store.id and known.external_id = buyer;
    end if;
  end if;

  -- Who asked to be forgotten is not written down again by their order.
  if person.is_redacted is not true then
    fresh.customer_email := private.plain_email(told ->> 'customer_email');
    fresh.customer_phone := left(told ->> 'customer_phone', 50);
    fresh.customer_first_name := left(told ->> 'customer_first_name', 255);
    fresh.customer_last_name := left(told ->> 'customer_last_name', 255);
    fresh.shipping_address := nullif(told -> 'shipping_address', 'null');
    fresh.billing_address := nullif(told -> 'billing_address', 'null');
    fresh.customer_notes := told ->> 'customer_notes';
    fresh.customer_external_id := buyer;
  end if;
  fresh.status := (told ->> 'status')::public.order_status;
  fresh.payment_status := (told ->> 'payment_status')::public.payment_status;
  fresh.fulfillment_status := (told ->> 'fulfillment_status')::public.fulfillment_status;
  fresh.platform_data := coalesce(told -> 'platform', '{}') || jsonb_build_object('refunds', (
    select coalesce(jsonb_object_agg(item.external_id, greatest(coalesce(private.to_minor(item.amount, currency), 0), 0)), '{}')
    from jsonb_to_recordset(coalesce(told -> 'refunds', '[]')) as item (external_id text, amount text)
    where item.external_id is not null
  ));

  insert into public.orders as known (
    organization_id, store_id, customer_id, external_id, order_number, customer_email, customer_phone, customer_first_name,
    customer_last_name, customer_external_id, subtotal_price_minor, total_tax_minor, total_shipping_minor, total_discounts_minor,
    total_price_minor, total_refunded_minor, currency_code, status, payment_status, fulfillment_status, shipping_address, billing_address,
    shipping_method, tracking_number, tracking_url, order_date, shipped_date, delivered_date, cancelled_date, platform_data, customer_notes,
    source_updated_at, last_synced_at, sync_hash
  )
  values (
    store.organization_id, store.id, fresh.customer_id, external, left(told ->> 'order_number', 255), fresh.customer_email,
    fresh.customer_phone, fresh.customer_first_name, fresh.customer_last_name, fresh.customer_external_id,
    greatest(coalesce(private.to_minor(told ->> 'subtotal', currency), 0), 0),
    greatest(coalesce(private.to_minor(told ->> 'tax', currency), 0), 0),
    greatest(coalesce(private.to_minor(told ->> 'shipping', currency), 0), 0),
    greatest(coalesce(private.to_minor(told ->> 'discounts', currency), 0), 0),
    greatest(private.to_minor(told ->> 'total', currency), 0), private.order_refunds(fresh.platform_data -> 'refunds'), currency,
    coalesce(fresh.status, 'pending'), coalesce(fresh.payment_status, 'pending'), coalesce(fresh.fulfillment_status, 'unfulfilled'),
    fresh.shipping_address, fresh.billing_address, told ->> 'shipping_method', told ->> 'tracking_number',
    case when told ->> 'tracking_url' ~ '^https?://' then told ->> 'tracking_url' end,
    coalesce(private.store_time(told ->> 'ordered_at'), private.to_business(version)), private.store_time(told ->> 'shipped_at'),
    private.store_time(told ->> 'delivered_at'), private.store_time(told ->> 'cancelled_at'), fresh.platform_data, fresh.customer_notes,
    version, at, private.store_version(told, (payload ->> 'rank')::integer)
  )
  on conflict (organization_id, store_id, external_id) do update
  set
    customer_id = case when buyer is null then known.customer_id else excluded.customer_id end,
    order_number = excluded.order_number, customer_email = excluded.customer_email, customer_phone = excluded.customer_phone,
    customer_first_name = excluded.customer_first_name, customer_last_name = excluded.customer_last_name,
    customer_external_id = excluded.customer_external_id, subtotal_price_minor = excluded.subtotal_price_minor,
    total_tax_minor = excluded.total_tax_minor, total_shipping_minor = excluded.total_shipping_minor,
    total_discounts_minor = excluded.total_discounts_minor, total_price_minor = excluded.total_price_minor,
    -- A refund that was told by itself is not forgotten, whichever version of the order comes after it.
    total_refunded_minor = private.order_refunds(
      coalesce(known.platform_data -> 'refunds', '{}') || (excluded.platform_data -> 'refunds')
    ),
    currency_code = excluded.currency_code, status = coalesce(fresh.status, known.status),
    payment_status = coalesce(fresh.payment_status, known.payment_status),
    fulfillment_status = coalesce(fresh.fulfillment_status, known.fulfillment_status),
    shipping_address = excluded.shipping_address, billing_address = excluded.billing_address, shipping_method = excluded.shipping_method,
    tracking_number = excluded.tracking_number, tracking_url = excluded.tracking_url, order_date = excluded.order_date,
    shipped_date = excluded.shipped_date, delivered_date = excluded.delivered_date, cancelled_date = excluded.cancelled_date,
    platform_data = known.platform_data || excluded.platform_data || jsonb_build_object(
      'refunds', coalesce(known.platform_data -> 'refunds', '{}') || (excluded.platform_data -> 'refunds')
    ),
    customer_notes = excluded.customer_notes, source_updated_at = excluded.source_updated_at, last_synced_at = excluded.last_synced_at,
    sync_hash = excluded.sync_hash
  where known.source_updated_at is null
    or excluded.source_updated_at > known.source_updated_at
    or excluded.source_updated_at = known.source_updated_at
      and excluded.sync_hash collate "C" > coalesce(known.sync_hash, '') collate "C"
  returning known.id into written;
  if written is null then
    result := 'ignored';
    error := 'older_version';
    return;
  end if;

  -- Lines that only a user wrote have no id of the platform's, and stay.
  delete from public.order_line_items as line
  where line.organization_id = store.organization_id
    and line.store_id = store.id
    and line.order_id = written
    and line.external_id is not null
    and not exists (
      select from jsonb_array_elements(coalesce(told -> 'lines', '[]')) as item (value) where item.value ->> 'external_id' = line.external_id
    );
  insert into public.order_line_items as known (
    organization_id, store_id, order_id, product_id, external_id, external_product_id, external_variant_id, title, variant_title, sku,
    price_minor, quantity, total_price_minor, properties, fulfillment_status, fulfilled_quantity
  )
  select distinct on (item.external_id)
    store.organization_id, store.id, written, product.id, item.external_id, item.external_product_id, item.external_variant_id,
    left(coalesce(nullif(btrim(item.title), ''), 'Line ' || item.external_id), 500), item.variant_title, item.sku,
    greatest(coalesce(private.to_minor(item.price, currency), 0), 0), item.quantity,
    greatest(
      coalesce(
        private.to_minor(item.total, currency),
        private.to_minor(item.price, currency) * item.quantity - coalesce(private.to_minor(item.discount, currency), 0),
        0
      ),
      0
    ),
    coalesce(item.properties, '{}'), coalesce(item.fulfillment_status, 'unfulfilled'),
    least(greatest(coalesce(item.fulfilled_quantity, 0), 0), item.quantity)
  from jsonb_to_recordset(coalesce(told -> 'lines', '[]')) as item (
    external_id text, external_product_id text, external_variant_id text, title text, variant_title text, sku text, price text, total text,
    discount text, quantity integer, properties jsonb, fulfillment_status public.fulfillment_status, fulfilled_quantity integer
  )
  left join public.products as product
    on product.organization_id = store.organization_id
    and product.store_id = store.id
    and product.external_id = item.external_product_id
  where item.external_id is not null and item.quantity > 0
  order by item.external_id
  on conflict (organization_id, store_id, order_id, external_id) do update
  set
    product_id = coalesce(excluded.product_id, known.product_id), external_product_id = excluded.external_product_id,
    external_variant_id = excluded.external_variant_id, title = excluded.title, variant_title = excluded.variant_title, sku = excluded.sku,
    price_minor = excluded.price_minor, quantity = excluded.quantity, total_price_minor = excluded.total_price_minor,
    properties = excluded.properties, fulfillment_status = excluded.fulfillment_status, fulfilled_quantity = excluded.fulfilled_quantity
  where (
    known.product_id, known.external_product_id, known.external_variant_id, known.title, known.variant_title, known.sku, known.price_minor,
    known.quantity, known.total_price_minor, known.properties, known.fulfillment_status, known.fulfilled_quantity
  ) is distinct from (
    coalesce(excluded.product_id, known.product_id), excluded.external_product_id, excluded.external_variant_id, excluded.title,
    excluded.variant_title, excluded.sku, excluded.price_minor, excluded.quantity, excluded.total_price_minor, excluded.properties,
    excluded.fulfillment_status, excluded.fulfilled_quantity
  );

  -- What the order says of a customer of whom no event has come.
  if fresh.customer_id is not null then
    update public.customers as known
    set
      email = coalesce(fresh.customer_email, known.email), phone = coalesce(private.plain_phone(fresh.customer_phone), known.phone),
      first_name = coalesce(fresh.customer_first_name, known.first_name), last_name = coalesce(fresh.customer_last_name, known.last_name)
    where known.organization_id = store.organization_id
      and known.store_id = store.id
      and known.id = fresh.customer_id
      and known.source_updated_at is null;
  end if;
  result := 'applied';
end
$$;
comment on function private.apply_order(public.webhook_sources, public.stores, jsonb, timestamptz) is
  'An order as its platform says it, with its lines and the row of its customer, by source version: an older version changes nothing.';

create function private.apply_order_refund(
  source public.webhook_sources, store public.stores, payload jsonb, at timestamptz, out result public.event_status, out error text
)
language plpgsql volatile security definer set search_path = '' as $$
declare
  external constant text := payload ->> 'order_external_id';
  known    public.orders;
  refunds  jsonb;
begin
  perform private.lock_store_object(store.id, 'order', external);
  if private.is_buried(source, 'order', external, false) then
    result := 'ignored';
    error := 'deleted';
    return;
  end if;
  select purchase.* into known
  from public.orders as purchase
  where purchase.organization_id = store.organization_id and purchase.store_id = store.id and purchase.external_id = external
  for no key update;
  if known.id is null then
    -- Kept, and tried again until the order is here.
    raise exception 'the order % of the refund has not come yet', external using errcode = 'no_data_found';
  end if;
  refunds := coalesce(known.platform_data -> 'refunds', '{}') || jsonb_build_object(
    payload #>> '{refund,external_id}', greatest(coalesce(private.to_minor(payload #>> '{refund,amount}', known.currency_code), 0), 0)
  );
  if refunds = known.platform_data -> 'refunds' then
    result := 'ignored';
    return;
  end if;
  update public.orders as purchase
  set
    total_refunded_minor = private.order_refunds(refunds),
    platform_data = known.platform_data || jsonb_build_object('refunds', refunds)
  where purchase.id = known.id;
  result := 'applied';
end
$$;
comment on function private.apply_order_refund(public.webhook_sources, public.stores, jsonb, timestamptz) is
  'A refund of a shop''s order, told by itself: counted once, also when the order tells it too.';


-- The end of things ---------------------------------------------------------------------------------------------------------------

create function private.apply_store_deletion(
  source public.webhook_sources, store public.stores, payload jsonb, at timestamptz, out result public.event_status, out error text
)
language plpgsql volatile security definer set search_path = '' as $$
declare
  kind     constant text := split_part(payload ->> 'event', '_', 1);
  external constant text := payload ->> 'external_id';
begin
  perform private.lock_store_object(store.id, kind, external);
  perform private.bury(source, kind, external, false, at);
  case kind
    when 'product' then
      delete from public.products as gone
      where gone.organization_id = store.organization_id and gone.store_id = store.id and gone.external_id = external;
    when 'order' then
      delete from public.orders as gone
      where gone.organization_id = store.organization_id and gone.store_id = store.id and gone.external_id = external;
    when 'customer' then
      -- Orders before their customer: what refers to the row is set free in that order.
      update public.orders as purchase
      set customer_id = null
      where purchase.organization_id = store.organization_id
        and purchase.store_id = store.id
        and purchase.customer_id = (
          select known.id
          from public.customers as known
          where known.organization_id = store.organization_id and known.store_id = store.id and known.external_id = external
        );
      delete from public.customers as gone
      where gone.organization_id = store.organization_id and gone.store_id = store.id and gone.external_id = external;
  end case;
  result := 'applied';
end
$$;
comment on function private.apply_store_deletion(public.webhook_sources, public.stores, jsonb, timestamptz) is
  'What the platform deleted is deleted, and stays so when an older event comes after it.';

create function private.apply_store_uninstall(
  source public.webhook_sources, store public.stores, payload jsonb, at timestamptz, out result public.event_status, out error text
)
language plpgsql volatile security definer set search_path = '' as $$
declare
  connected public.store_status;
begin
  select known.status into connected
  from public.stores as known
  where known.organization_id = store.organization_id and known.id = store.id
  for no key update;
  delete from private.store_credentials as known
  where known.organization_id = store.organization_id and known.store_id = store.id;
  update public.stores as known
  set status = 'disconnected', token_expires_at = null
  where known.organization_id = store.organization_id and known.id = store.id and known.status <> 'disconnected';
  if connected = 'disconnected' then
    result := 'ignored';
    return;
  end if;
  perform private.audit(store.organization_id, 'store.disconnected', 'store', store.id, jsonb_build_object('platform', store.platform), at);
  perform private.emit(
    store.organization_id, 'store.disconnected', store.id || ' ' || at::text, jsonb_build_object('store_id', store.id, 'platform', store.platform), at
  );
  result := 'applied';
end
$$;
comment on function private.apply_store_uninstall(public.webhook_sources, public.stores, jsonb, timestamptz) is
  'The shop took our app out: the store is disconnected and what opened it is dropped. The source stays, since the shop''s last wish comes later.';


-- Privacy -------------------------------------------------------------------------------------------------------------------------

create function private.forget_store_events(source public.webhook_sources, external_customer text, external_orders text[])
returns void
language sql volatile security definer set search_path = '' as $$
  update private.webhook_events as stored
  set body = null, payload = null
  from private.webhook_event_keys as key
  where key.source = forget_store_events.source.provider
    and key.source_id = forget_store_events.source.id::text
    and stored.id = key.event_id
    and stored.received_at = key.received_at
    and (stored.body is not null or stored.payload is not null)
    and (
      external_customer is null
      or stored.payload #>> '{customer,external_id}' = external_customer
      or stored.payload #>> '{order,customer_external_id}' = external_customer
      or stored.payload ->> 'external_id' = external_customer and stored.payload ->> 'event' = 'customer_deleted'
      or stored.payload #>> '{order,external_id}' = any (external_orders)
    )
$$;
comment on function private.forget_store_events(public.webhook_sources, text, text[]) is
  'Takes what a source told of one customer, or without one of anybody, out of the events as they came.';

create function private.note_privacy_request(
  source public.webhook_sources, wish text, payload jsonb, customer uuid, done boolean, at timestamptz
) returns void
language plpgsql volatile security definer set search_path = '' as $$
declare
  request uuid;
begin
  insert into public.privacy_requests (
    organization_id, store_id, kind, external_id, customer_id, customer_external_id, order_external_ids, requested_at, due_at, completed_at
  )
  values (
    source.organization_id, source.store_id, wish, payload ->> 'request_id', customer,
    case when not done then payload #>> '{customer,external_id}' end,
    case when not done then private.text_array(payload -> 'order_external_ids') else '{}' end,
    at, at + interval '30 days', case when done then at end
  )
  returning id into request;
  perform private.audit(source.organization_id, 'privacy.' || wish, 'privacy_request', request, '{}', at);
  perform private.emit(
    source.organization_id, 'privacy.' || wish, request::text,
    jsonb_build_object('privacy_request_id', request, 'store_id', source.store_id, 'completed', done), at
  );
end
$$;
comment on function private.note_privacy_request(public.webhook_sources, text, jsonb, uuid, boolean, timestamptz) is
  'Writes down what a person or a shop asked for, and until when it has to be done.';

create function private.apply_customer_redact(
  source public.webhook_sources, store public.stores, payload jsonb, at timestamptz, out result public.event_status, out error text
)
language plpgsql volatile security definer set search_path = '' as $$
declare
  external constant text := payload #>> '{customer,external_id}';
  orders   constant text[] := private.text_array(payload -> 'order_external_ids');
  customer public.customers;
  theirs   uuid[];
  contact  record;
begin
  perform private.lock_store_object(store.id, 'customer', external);
  perform private.bury(source, 'customer', external, true, at);
  theirs := array(
    select purchase.id
    from public.orders as purchase
    where purchase.organization_id = store.organization_id
      and purchase.store_id = store.id
      and (
        purchase.customer_external_id = external
        or purchase.external_id = any (orders)
        or purchase.customer_id = (
          select known.id
          from public.customers as known
          where known.organization_id = store.organization_id and known.store_id = store.id and known.external_id = external
        )
      )
    order by purchase.id
    for no key update
  );
  select known.* into customer
  from public.customers as known
  where known.organization_id = store.organization_id and known.store_id = store.id and known.external_id = external
  for update;

  -- By every number and address that is known of them, wherever else it is written down.
  for contact in
    select distinct known.phone, known.email
    from (
      select private.plain_phone(payload #>> '{customer,phone}') as phone, private.plain_email(payload #>> '{customer,email}') as email
      union
      select customer.phone, customer.email
      union
      select private.plain_phone(purchase.customer_phone), purchase.customer_email
      from public.orders as purchase
      where purchase.id = any (theirs) and purchase.customer_external_id = external
    ) as known
    order by known.phone, known.email
  loop
    perform private.erase(
      jsonb_strip_nulls(jsonb_build_object(
        'v', 1, 'organization_id', store.organization_id, 'store_id', store.id, 'customer_external_id', external,
        'phone', contact.phone, 'email', contact.email
      )), at
    );
  end loop;

  update public.orders as purchase
  set
    customer_id = null, customer_email = null, customer_phone = null, customer_first_name = null, customer_last_name = null,
    customer_external_id = null, shipping_address = null, billing_address = null, customer_notes = null, internal_notes = null,
    tracking_number = null, tracking_url = null
  where purchase.id = any (theirs);
  delete from public.customers as known where known.id = customer.id;
  perform private.forget_store_events(source, external, orders);
  perform private.note_privacy_request(source, 'customer_redact', payload, null, true, at);
  result := 'applied';
end
$$;
comment on function private.apply_customer_redact(public.webhook_sources, public.stores, jsonb, timestamptz) is
  'A customer who asked to be forgotten: their row goes, their orders keep amounts alone, and no late event writes them down again.';

create function private.apply_shop_redact(
  source public.webhook_sources, store public.stores, payload jsonb, at timestamptz, out result public.event_status, out error text
)
language plpgsql volatile security definer set search_path = '' as $$
begin
  perform from public.stores as known
  where known.organization_id = store.organization_id and known.id = store.id
  for no key update;
  -- Everybody of the store, wherever else they are written down; what was only the store's is then taken away.
  perform private.erase(jsonb_build_object('v', 1, 'organization_id', store.organization_id, 'store_id', store.id), at);
  delete from public.calls as gone where gone.organization_id = store.organization_id and gone.store_id = store.id;
  delete from public.conversations as gone where gone.organization_id = store.organization_id and gone.store_id = store.id;
  delete from public.orders as gone where gone.organization_id = store.organization_id and gone.store_id = store.id;
  delete from public.customers as gone where gone.organization_id = store.organization_id and gone.store_id = store.id;
  delete from public.products as gone where gone.organization_id = store.organization_id and gone.store_id = store.id;
  delete from private.store_credentials as gone where gone.organization_id = store.organization_id and gone.store_id = store.id;
  update public.stores as known
  set status = 'disconnected', token_expires_at = null, owner_email = null, owner_name = null
  where known.organization_id = store.organization_id and known.id = store.id;
  perform private.forget_store_events(source, null, '{}');
  perform private.note_privacy_request(source, 'shop_redact', payload, null, true, at);
  result := 'applied';
end
$$;
comment on function private.apply_shop_redact(public.webhook_sources, public.stores, jsonb, timestamptz) is
  'A shop that left asks to be forgotten: everything it told, and everybody it told of.';

create function private.forget_redact_event() returns trigger
language plpgsql set search_path = '' as $$
begin
  -- The wish to be forgotten names the person; once granted it need not.
  if new.status = 'applied' and new.payload ->> 'event' in ('customer_redact', 'shop_redact') then
    new.body := null;
    new.payload := new.payload - array['customer', 'order_external_ids'];
  end if;
  return new;
end
$$;
comment on function private.forget_redact_event() is 'Trigger: an event that had somebody erased keeps nothing of them itself.';
create trigger forget_redact_event before insert or update of status on private.webhook_events
  for each row when (new.payload_type = 'store') execute function private.forget_redact_event();

create function private.complete_privacy_request(request_id uuid, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('store.edit');
  done         public.privacy_requests;
begin
  update public.privacy_requests as request
  set completed_at = at, customer_external_id = null, order_external_ids = '{}'
  where request.organization_id = organization and request.id = request_id and request.completed_at is null
  returning request.* into done;
  if done.id is null then
    perform private.raise_error(404, 'privacy_request_not_found', 'There is no such request that is still open', 'request_id');
  end if;
  return jsonb_build_object('id', done.id, 'kind', done.kind, 'completed_at', done.completed_at);
end
$$;
comment on function private.complete_privacy_request(uuid, timestamptz) is 'Marks a request in the caller''s organization as done.';

create function public.complete_privacy_request(request_id uuid) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.complete_privacy_request(request_id, private.clock_now())
$$;
comment on function public.complete_privacy_request(uuid) is
  'Says that a customer was given their data; 404 unless the request is open. Needs store.edit. Returns {"id","kind","completed_at"}.';


-- apply_store_event ---------------------------------------------------------------------------------------------------------------

create function private.apply_store_event(
  event private.webhook_events, source public.webhook_sources, at timestamptz,
  out result public.event_status, out error text, out organization_id uuid
)
language plpgsql volatile security definer set search_path = '' as $$
declare
  payload constant jsonb := event.payload;
  store   public.stores;
  known   text[];
  applied record;
begin
  organization_id := source.organization_id;
  if source.provider not in ('shopify', 'woocommerce') then
    result := 'orphan';
    error := 'no_shop';
    return;
  end if;
  select mine.* into store
  from public.stores as mine
  where mine.organization_id = source.organization_id and mine.id = source.store_id and mine.platform::text = source.provider;
  if store.id is null then
    result := 'orphan';
    error := 'unknown_store';
    return;
  end if;
  -- Whose event it is, as the header says, and as the signed body says where it does. One app's secret signs for all of its shops.
  known := array[store.domain, lower(source.settings ->> 'shop_domain')];
  if payload ->> 'shop' is not null and not lower(payload ->> 'shop') = any (array_remove(known, null))
    or jsonb_array_length(coalesce(nullif(payload -> 'signed_shops', 'null'), '[]')) > 0
      and not array(select lower(said.name) from jsonb_array_elements_text(payload -> 'signed_shops') as said (name)) && known
  then
    result := 'orphan';
    error := 'other_shop';
    return;
  end if;

  case payload ->> 'event'
    when 'product' then
      select * into applied from private.apply_product(source, store, payload, at);
    when 'customer' then
      select * into applied from private.apply_customer(source, store, payload, at);
    when 'order' then
      select * into applied from private.apply_order(source, store, payload, at);
    when 'refund' then
      select * into applied from private.apply_order_refund(source, store, payload, at);
    when 'product_deleted', 'order_deleted', 'customer_deleted' then
      select * into applied from private.apply_store_deletion(source, store, payload, at);
    when 'uninstalled' then
      select * into applied from private.apply_store_uninstall(source, store, payload, at);
    when 'customer_redact' then
      select * into applied from private.apply_customer_redact(source, store, payload, at);
    when 'shop_redact' then
      select * into applied from private.apply_shop_redact(source, store, payload, at);
    when 'data_request' then
      perform private.note_privacy_request(
        source, 'data_request', payload,
        (
          select customer.id
          from public.customers as customer
          where customer.organization_id = store.organization_id
            and customer.store_id = store.id
            and customer.external_id = payload #>> '{customer,external_id}'
        ), false, at
      );
      result := 'applied';
      return;
    else
      result := 'ignored';
      error := 'unknown_event';
      return;
  end case;
  result := applied.result;
  error := applied.error;
  if result = 'applied' and payload ->> 'event' in ('product', 'customer', 'order', 'refund') then
    update public.stores as mine
    set last_sync_at = at
    where mine.organization_id = store.organization_id and mine.id = store.id
      and (mine.last_sync_at is null or mine.last_sync_at < at - interval '1 minute');
  end if;
end
$$;
comment on function private.apply_store_event(private.webhook_events, public.webhook_sources, timestamptz) is
  'What a shop''s event changes. A shop speaks for its own store alone.';


-- Payments ------------------------------------------------------------------------------------------------------------------------

create function private.apply_payment_event(
  event private.webhook_events, source public.webhook_sources, at timestamptz,
  out result public.event_status, out error text, out organization_id uuid
)
language plpgsql volatile security definer set search_path = '' as $$
declare
  request  jsonb := coalesce(nullif(event.payload -> 'request', 'null'), '{}') || jsonb_build_object('v', 1, 'gateway', source.provider);
  payment  public.payments;
  answer   jsonb;
  refund   jsonb;
  outcomes text[] := '{}'::text[];
begin
  -- Anybody may make a source of their own, and sign what they please with its secret: money is told by the platform's sources alone.
  if source.organization_id is not null or source.provider not in ('stripe', 'razorpay') then
    result := 'orphan';
    error := 'not_a_gateway';
    organization_id := source.organization_id;
    return;
  end if;

  case event.payload ->> 'event'
    when 'payment' then
      answer := private.record_payment(request, at);
      organization_id := (answer #>> '{payment,organization_id}')::uuid;
      outcomes := array[answer ->> 'result'];
      if organization_id is not null and request ->> 'invoice_id' is not null
        and (answer #>> '{invoice,id}') is distinct from lower(request ->> 'invoice_id')
      then
        -- The order is the invoice's that it was opened for, whatever is written beside it.
        outcomes := outcomes || 'other_invoice'::text;
        perform private.emit(
          organization_id, 'payment.conflict', (answer #>> '{payment,id}') || ' ' || lower(request ->> 'invoice_id'),
          jsonb_build_object('payment_id', answer #>> '{payment,id}', 'invoice_id', request ->> 'invoice_id'), at
        );
      end if;
      error := coalesce(answer #>> '{payment,problem}', nullif(nullif(outcomes[cardinality(outcomes)], 'applied'), 'duplicate'));

    when 'refunds' then
      for refund in
        select item.value from jsonb_array_elements(event.payload -> 'requests') as item (value) order by item.value ->> 'refund_id'
      loop
        refund := refund || jsonb_build_object('v', 1, 'gateway', source.provider);
        answer := private.record_refund(refund, at);
        select known.* into payment
        from public.payments as known
        where known.gateway = source.provider::public.payment_gateway and known.gateway_payment_id = refund ->> 'payment_id';
        organization_id := payment.organization_id;
        if answer ->> 'result' = 'orphan' then
          -- Kept, and tried again: gateways tell of a refund before they tell of the payment's capture.
          raise exception 'the payment of refund % has not come yet', refund ->> 'refund_id' using errcode = 'no_data_found';
        end if;
        if answer ->> 'result' = 'ignored' and refund ->> 'status' = 'failed' and answer #>> '{refund,status}' = 'processed' then
          -- Money that was counted as gone came back to us: a person has to look at it.
          perform private.emit(
            payment.organization_id, 'refund.failed_late', refund ->> 'refund_id',
            jsonb_build_object('payment_id', payment.id, 'refund_id', answer #>> '{refund,id}'), at
          );
          error := 'failed_late';
        end if;
        outcomes := outcomes || (answer ->> 'result');
      end loop;
      if event.payload ->> 'refunded_minor' is not null then
        select known.* into payment
        from public.payments as known
        where known.gateway = source.provider::public.payment_gateway
          and known.gateway_payment_id = event.payload ->> 'payment_id';
        organization_id := payment.organization_id;
        if payment.id is null or payment.refunded_minor < (event.payload ->> 'refunded_minor')::bigint then
          -- The charge says how much is gone, the refunds say which: until they have come, it waits.
          raise exception 'refunds of payment % have not come yet', event.payload ->> 'payment_id' using errcode = 'no_data_found';
        end if;
      end if;
      error := coalesce(error, case when 'conflict' = any (outcomes) then 'conflict' end);

    when 'method' then
      if request ->> 'organization_id' is null then
        request := request || jsonb_build_object('organization_id', (
          select known.organization_id
          from public.payment_methods as known
          where known.gateway = source.provider::public.payment_gateway
            and (
              known.gateway_payment_method_id = request ->> 'payment_method_id'
              or known.gateway_customer_id = request ->> 'customer_id'
            )
          order by known.gateway_payment_method_id = request ->> 'payment_method_id' desc, known.created_at
          limit 1
        ));
      end if;
      if not exists (select from public.organizations as tenant where tenant.id = private.to_uuid(request ->> 'organization_id')) then
        result := 'orphan';
        error := 'unknown_customer';
        return;
      end if;
      organization_id := (request ->> 'organization_id')::uuid;
      perform private.save_payment_method(request, at);
      outcomes := array['applied'];

    when 'method_removed' then
      organization_id := (
        select known.organization_id
        from public.payment_methods as known
        where known.gateway = source.provider::public.payment_gateway
          and known.gateway_payment_method_id = request ->> 'payment_method_id'
      );
      outcomes := array[
        case when (private.remove_payment_method(request, at) ->> 'removed')::boolean then 'applied' else 'ignored' end
      ];

    when 'order_expired' then
      update public.payments as known
      set failure_code = 'expired', failure_message = 'Nobody paid before the order expired'
      where known.gateway = source.provider::public.payment_gateway
        and known.gateway_order_id = request ->> 'order_id'
        and known.gateway_payment_id is null
        and known.status = 'pending'
        and known.failure_code is distinct from 'expired'
      returning known.* into payment;
      organization_id := payment.organization_id;
      outcomes := array[case when payment.id is not null then 'applied' else 'ignored' end];

    when 'dispute' then
      update public.payments as known
      set
        dispute_status = left(request ->> 'status', 50), disputed_minor = private.read_minor(request, 'amount_minor'),
        disputed_at = private.parse_instant(request ->> 'occurred_at')
      where known.gateway = source.provider::public.payment_gateway
        and known.gateway_payment_id = request ->> 'payment_id'
        and (
          known.disputed_at is null
          or known.disputed_at < private.parse_instant(request ->> 'occurred_at')
          or known.disputed_at = private.parse_instant(request ->> 'occurred_at')
            and coalesce(known.dispute_status, '') < left(request ->> 'status', 50)
        )
      returning known.* into payment;
      if payment.id is null and not exists (
        select
        from public.payments as known
        where known.gateway = source.provider::public.payment_gateway and known.gateway_payment_id = request ->> 'payment_id'
      ) then
        raise exception 'the payment of a dispute has not come yet' using errcode = 'no_data_found';
      end if;
      organization_id := payment.organization_id;
      if payment.id is not null then
        perform private.audit(
          payment.organization_id, 'payment.disputed', 'payment', payment.id,
          jsonb_build_object('status', payment.dispute_status, 'amount_minor', payment.disputed_minor, 'currency', payment.currency), at
        );
        perform private.emit(
          payment.organization_id, 'payment.disputed', payment.id || ' ' || (request ->> 'dispute_id') || ' ' || payment.dispute_status,
          jsonb_build_object(
            'payment_id', payment.id, 'status', payment.dispute_status, 'amount_minor', payment.disputed_minor,
            'currency', payment.currency, 'reason', left(request ->> 'reason', 100)
          ), at
        );
      end if;
      outcomes := array[case when payment.id is not null then 'applied' else 'ignored' end];

    else
      result := 'ignored';
      error := 'unknown_event';
      return;
  end case;

  result := case
    when outcomes && array['applied', 'conflict', 'unmatched', 'other_invoice'] then 'applied'
    when 'orphan' = any (outcomes) then 'orphan'
    else 'ignored'
  end::public.event_status;
end
$$;
comment on function private.apply_payment_event(private.webhook_events, public.webhook_sources, timestamptz) is
  'What a gateway''s event changes: payments, refunds, payment methods, disputes. Only the platform''s own sources speak of money.';


revoke execute on function
  private.to_minor(text, text), private.plain_email(text), private.plain_phone(text), private.store_time(text), private.text_array(jsonb),
  private.store_version(jsonb, integer), private.lock_store_object(uuid, text, text),
  private.bury(public.webhook_sources, text, text, boolean, timestamptz), private.is_buried(public.webhook_sources, text, text, boolean),
  private.apply_product(public.webhook_sources, public.stores, jsonb, timestamptz),
  private.apply_customer(public.webhook_sources, public.stores, jsonb, timestamptz),
  private.order_refunds(jsonb), private.apply_order(public.webhook_sources, public.stores, jsonb, timestamptz),
  private.apply_order_refund(public.webhook_sources, public.stores, jsonb, timestamptz),
  private.apply_store_deletion(public.webhook_sources, public.stores, jsonb, timestamptz),
  private.apply_store_uninstall(public.webhook_sources, public.stores, jsonb, timestamptz),
  private.forget_store_events(public.webhook_sources, text, text[]),
  private.note_privacy_request(public.webhook_sources, text, jsonb, uuid, boolean, timestamptz),
  private.apply_customer_redact(public.webhook_sources, public.stores, jsonb, timestamptz),
  private.apply_shop_redact(public.webhook_sources, public.stores, jsonb, timestamptz), private.forget_redact_event(),
  private.apply_store_event(private.webhook_events, public.webhook_sources, timestamptz),
  private.apply_payment_event(private.webhook_events, public.webhook_sources, timestamptz)
from public, anon, authenticated, service_role;
revoke execute on function private.complete_privacy_request(uuid, timestamptz), public.complete_privacy_request(uuid)
from public, anon, authenticated, service_role;
grant execute on function private.complete_privacy_request(uuid, timestamptz), public.complete_privacy_request(uuid) to authenticated;
-- 16_functions_inbound_calls.sql

-- Calls to the numbers of stores and organizations. The carriers have one URL for all that happens to such a call, and their events come
-- in any order: whichever comes first opens the rows.


create function private.open_inbound_leg(
  source text, source_id text, call jsonb, at timestamptz,
  out leg_id uuid, out error text
)
language plpgsql volatile security definer set search_path = '' as $$
declare
  call_id constant text := call ->> 'provider_call_id';
  account public.carrier_accounts;
  number  public.store_phone_numbers;
  leg     public.call_logs;
begin
  if call_id is null then
    error := 'unknown_call';
    return;
  end if;
  select log.id into leg_id from public.call_logs as log where log.call_sid = call_id;
  if leg_id is not null then
    return;
  end if;
  select known.* into account
  from public.carrier_accounts as known
  where known.id = private.to_uuid(open_inbound_leg.source_id) and known.provider::text = open_inbound_leg.source and known.is_active;
  if account.id is null then
    error := 'unknown_account';
    return;
  end if;

  -- Whose number it is: a store's, or one that an organization calls from. It counts only on the account on which it rings.
  select known.* into number
  from public.store_phone_numbers as known
  where known.phone_number = call ->> 'to' and known.is_active
    and coalesce(known.carrier_account_id, account.id) = account.id
    and coalesce(account.organization_id, known.organization_id) = known.organization_id;
  leg.organization_id := number.organization_id;
  if leg.organization_id is null then
    select known.organization_id into leg.organization_id
    from public.caller_numbers as known
    where known.phone_number = call ->> 'to' and known.is_active and known.carrier_account_id = account.id;
    -- Who calls back is the lead of that number, where there is one and no other.
    select (array_agg(lead.id))[1], (array_agg(lead.project_id))[1] into leg.lead_id, leg.project_id
    from public.leads as lead
    where lead.organization_id = leg.organization_id and lead.phone = call ->> 'from' and lead.archived_at is null
    having count(*) = 1;
  end if;
  if leg.organization_id is null then
    error := 'unknown_number';
    return;
  end if;

  insert into public.call_logs (
    organization_id, lead_id, project_id, direction, carrier_account_id, call_sid, caller_number, callee_number, status,
    time_limit_seconds, begun_at, created_at, lease_until
  )
  values (
    leg.organization_id, leg.lead_id, leg.project_id, 'inbound', account.id, call_id, coalesce(call ->> 'from', 'anonymous'), call ->> 'to',
    'initiated', 3600, now(), at, now() + interval '2 minutes'
  )
  on conflict (call_sid) do nothing
  returning id into leg_id;
  if leg_id is null then
    -- Another event of the same call was faster.
    select log.id into leg_id from public.call_logs as log where log.call_sid = call_id;
    return;
  end if;
  if number.id is not null then
    insert into public.calls (organization_id, store_id, call_log_id, customer_id, from_phone, to_phone, direction, start_time)
    select
      number.organization_id, number.store_id, leg_id,
      -- The customer of that number, where there is one and no other.
      (
        select (array_agg(customer.id))[1]
        from public.customers as customer
        where customer.organization_id = number.organization_id and customer.store_id = number.store_id
          and customer.phone = call ->> 'from'
        having count(*) = 1
      ),
      'anonymous', number.phone_number, 'inbound', at;
  end if;
end
$$;
comment on function private.open_inbound_leg(text, text, jsonb, timestamptz) is
  'The leg of a call to one of our numbers, by the carrier''s id of it; the first event of a call makes it, and a store''s view of it.';

create function private.open_inbound_call(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' set jit = off set enable_seqscan = off as $$
declare
  applied constant jsonb := private.apply_event(request, at);
  leg     public.call_logs;
begin
  select log.* into leg
  from public.call_logs as log
  where log.call_sid = request #>> '{events,0,payload,provider_call_id}'
    and log.carrier_account_id = private.to_uuid(request ->> 'source_id')
    and log.direction = 'inbound'
    and log.status <> 'ended';
  return jsonb_strip_nulls(applied || jsonb_build_object(
    'call', case when leg.id is not null then jsonb_build_object(
      'attempt_id', leg.id, 'carrier_account_id', leg.carrier_account_id, 'agent_id', leg.agent_id, 'record', leg.record_call
    ) end
  ));
end
$$;
comment on function private.open_inbound_call(jsonb, timestamptz) is
  'Stores the event of a call to one of our numbers as apply_event() does, and tells what its answer is made of; without a call there is '
  'nobody to connect it with.';

create function public.open_inbound_call(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.open_inbound_call($1, private.clock_now())
$$;
comment on function public.open_inbound_call(jsonb) is
  'An apply_event request with one event of a call to us -> {"result","organization_id"?,"call"?:{"attempt_id","carrier_account_id","agent_id"?,"record"}}. '
  'The same call again gives the same rows.';

revoke execute on function
  private.open_inbound_leg(text, text, jsonb, timestamptz), private.open_inbound_call(jsonb, timestamptz), public.open_inbound_call(jsonb)
from public, anon, authenticated, service_role;
grant execute on function private.open_inbound_call(jsonb, timestamptz), public.open_inbound_call(jsonb) to service_role;
-- 17_functions_operate.sql

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
    ('private.outbox', 'topic key', 'none', null, 'kept', 'What happened, and the id of what it happened to.'),
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
-- 18_functions_leads.sql

-- What webhook-intake calls when somebody sends leads: one request, one transaction, an outcome for each lead.


-- Phone numbers -------------------------------------------------------------------------------------------------------------------

create function private.to_e164(written text, country text) returns text
language plpgsql immutable parallel safe set search_path = '' as $$
declare
  -- Country: calling code, trunk prefix, shortest and longest national number. Where a country is not here, numbers come with their +.
  plans  constant jsonb := '{
    "IN":["91","0",10,10],"US":["1","1",10,10],"CA":["1","1",10,10],"GB":["44","0",9,10],"IE":["353","0",7,9],"AU":["61","0",9,9],
    "NZ":["64","0",8,10],"SG":["65","",8,8],"MY":["60","0",8,10],"ID":["62","0",8,12],"PH":["63","0",8,10],"TH":["66","0",8,9],
    "VN":["84","0",9,10],"HK":["852","",8,8],"CN":["86","0",10,11],"JP":["81","0",9,10],"KR":["82","0",8,10],"TW":["886","0",8,9],
    "BD":["880","0",8,10],"PK":["92","0",9,10],"LK":["94","0",9,9],"NP":["977","0",8,10],"AE":["971","0",8,9],"SA":["966","0",8,9],
    "QA":["974","",8,8],"KW":["965","",8,8],"BH":["973","",8,8],"OM":["968","",8,8],"IL":["972","0",8,9],"TR":["90","0",10,10],
    "EG":["20","0",8,10],"ZA":["27","0",9,9],"NG":["234","0",8,10],"KE":["254","0",9,9],"GH":["233","0",9,9],"TZ":["255","0",9,9],
    "UG":["256","0",9,9],"DE":["49","0",7,11],"FR":["33","0",9,9],"ES":["34","",9,9],"PT":["351","",9,9],"NL":["31","0",9,9],
    "BE":["32","0",8,9],"LU":["352","",6,11],"AT":["43","0",7,13],"CH":["41","0",9,9],"DK":["45","",8,8],"NO":["47","",8,8],
    "SE":["46","0",7,10],"FI":["358","0",6,11],"PL":["48","",9,9],"CZ":["420","",9,9],"GR":["30","",10,10],"RO":["40","0",9,9],
    "HU":["36","06",8,9],"BR":["55","0",10,11],"MX":["52","",10,10],"AR":["54","0",10,11],"CL":["56","",9,9],"CO":["57","",8,10],
    "PE":["51","0",8,9]
  }'::jsonb;
  plan   constant jsonb := plans -> upper(country);
  code   constant text := plan ->> 0;
  trunk  constant text := plan ->> 1;
  digits text := regexp_replace(written, '[^0-9]', '', 'g');
  inner_ text;
begin
  if written is null or written !~ '^\s*\+?[0-9 ().\-/\u00a0]+\s*$' or length(written) > 40 then
    return null;
  end if;
  if written ~ '^\s*(\+|00)' then
    digits := regexp_replace(digits, '^00', '');
    return case when digits ~ '^[1-9][0-9]{6,14}$' then '+' || digits end;
  end if;
  if plan is null then
    return null;
  end if;
  inner_ := case when trunk <> '' and digits like trunk || '%' then substr(digits, length(trunk) + 1) else digits end;
  if length(inner_) between (plan ->> 2)::integer and (plan ->> 3)::integer and inner_ !~ '^0' then
    return '+' || code || inner_;
  end if;
  inner_ := substr(digits, length(code) + 1);
  if digits like code || '%' and length(inner_) between (plan ->> 2)::integer and (plan ->> 3)::integer and inner_ !~ '^0' then
    return '+' || digits;
  end if;
  return null;
end
$$;
comment on function private.to_e164(text, text) is
  'A number as a person writes it, in E.164: with + or 00 it says its country, else it is one of the country given. Null when it is neither.';


-- Limits --------------------------------------------------------------------------------------------------------------------------

create function private.take_tokens(subject text, cost integer, per_minute integer, burst integer) returns void
language plpgsql volatile security definer set search_path = '' as $$
declare
  moment constant timestamptz := clock_timestamp();
  left_  numeric;
  wait   integer;
begin
  insert into private.rate_limits as bucket (subject, tokens, refilled_at)
  values (take_tokens.subject, burst - cost, moment)
  on conflict on constraint rate_limits_pkey do update
  set
    tokens = least(
      burst, bucket.tokens + greatest(extract(epoch from excluded.refilled_at - bucket.refilled_at), 0) * per_minute / 60.0
    ) - cost,
    refilled_at = greatest(bucket.refilled_at, excluded.refilled_at)
  returning bucket.tokens into left_;
  if left_ >= 0 then
    return;
  end if;
  -- The refusal undoes the withdrawal: whoever is told to wait has not used up what they wait for.
  wait := greatest(ceil(-left_ * 60.0 / per_minute), 1);
  raise sqlstate 'PGRST' using
    message = json_build_object(
      'code', 'rate_limited',
      'message', format('Too many at once; the next are taken in %s seconds', wait),
      'details', json_build_object('retry_after', wait)::text,
      'hint', null
    )::text,
    detail = json_build_object('status', 429, 'headers', json_build_object('Retry-After', wait::text))::text;
end
$$;
comment on function private.take_tokens(text, integer, integer, integer) is
  'Takes from a sender''s bucket, which refills by the minute; empty, the request ends with 429 and says when to come again.';


-- ingest_leads --------------------------------------------------------------------------------------------------------------------

create function private.first_stage(organization uuid, project uuid) returns uuid
language sql stable security definer set search_path = '' as $$
  select stage.id
  from public.pipelines as pipeline
  join public.pipeline_stages as stage on stage.organization_id = pipeline.organization_id and stage.pipeline_id = pipeline.id
  where pipeline.organization_id = organization
    and pipeline.is_default
    and (stage.project_id is null or stage.project_id = project)
  order by stage.order_index, stage.id
  limit 1
$$;
comment on function private.first_stage(uuid, uuid) is 'Where a lead of a project begins in its organization''s default pipeline.';

create function private.read_lead(item jsonb, form public.lead_forms, country text) returns jsonb
language plpgsql stable security definer set search_path = '' as $$
declare
  lead    jsonb := '{}'::jsonb;
  missing text;
  field   text;
begin
  if jsonb_typeof(item) <> 'object' then
    return jsonb_build_object('code', 'invalid_lead', 'message', 'A lead is an object');
  end if;
  if form.id is not null then
    select asked.value ->> 'name' into missing
    from jsonb_array_elements(form.fields) with ordinality as asked (value, place)
    where asked.value -> 'required' = 'true' and coalesce(btrim(item ->> (asked.value ->> 'name')), '') = ''
    order by asked.place
    limit 1;
    if missing is not null then
      return jsonb_build_object('code', 'missing_field', 'field', missing, 'message', format('%s is required', missing));
    end if;
    lead := jsonb_build_object('project_id', form.project_id, 'raw_data', (
      select coalesce(jsonb_object_agg(asked.name, left(item ->> asked.name, 2000)), '{}')
      from (
        select distinct entry.value ->> 'name' as name from jsonb_array_elements(form.fields) as entry (value)
      ) as asked
      where asked.name not in ('name', 'phone', 'email') and item ->> asked.name is not null
    ));
  else
    if item ->> 'project_id' is not null and private.to_uuid(item ->> 'project_id') is null then
      return jsonb_build_object('code', 'unknown_project', 'field', 'project_id', 'message', 'There is no such project');
    end if;
    if item ->> 'timezone' is not null and not exists (select from private.timezones as zone where zone.name = item ->> 'timezone') then
      return jsonb_build_object('code', 'invalid_timezone', 'field', 'timezone', 'message', 'This is not a time zone');
    end if;
    if jsonb_typeof(coalesce(item -> 'fields', '{}')) <> 'object' or length((item -> 'fields')::text) > 16384 then
      return jsonb_build_object('code', 'invalid_fields', 'field', 'fields', 'message', 'fields is an object of at most 16 KiB');
    end if;
    lead := jsonb_build_object(
      'project_id', item ->> 'project_id', 'timezone', item ->> 'timezone', 'notes', left(item ->> 'notes', 10000),
      'external_lead_id', left(item ->> 'external_lead_id', 255), 'lead_source', left(item ->> 'source', 100),
      'raw_data', item -> 'fields'
    );
    if coalesce(jsonb_typeof(item -> 'consents'), 'null') not in ('array', 'null') then
      return jsonb_build_object('code', 'invalid_consent', 'field', 'consents', 'message', 'consents is an array');
    end if;
    if exists (
      select
      from jsonb_array_elements(coalesce(nullif(item -> 'consents', 'null'), '[]')) as given (value)
      where coalesce(given.value ->> 'scope', '') not in ('call_service', 'call_promotional', 'recording', 'sms', 'whatsapp')
        or coalesce(btrim(given.value ->> 'text'), '') = ''
        or given.value ->> 'source' is not null
          and given.value ->> 'source' not in ('form', 'call', 'import', 'written', 'message', 'in_person')
        or given.value ->> 'granted_at' is not null and private.parse_instant(given.value ->> 'granted_at') is null
        or coalesce(jsonb_typeof(given.value -> 'proof'), 'null') not in ('object', 'null')
    ) then
      return jsonb_build_object(
        'code', 'invalid_consent', 'field', 'consents', 'message', 'A consent has a known scope and the text that was agreed to'
      );
    end if;
  end if;

  foreach field in array array['name', 'phone', 'email'] loop
    if coalesce(jsonb_typeof(item -> field), 'null') not in ('string', 'number', 'null') then
      return jsonb_build_object('code', 'invalid_lead', 'field', field, 'message', format('%s must be a text', field));
    end if;
  end loop;
  lead := lead || jsonb_build_object(
    'phone', private.to_e164(item ->> 'phone', coalesce(nullif(item ->> 'country', ''), country)),
    'email', private.plain_email(item ->> 'email'),
    'name', left(btrim(regexp_replace(item ->> 'name', '\s+', ' ', 'g')), 200)
  );
  if lead ->> 'phone' is null then
    return jsonb_build_object(
      'code', 'invalid_phone', 'field', 'phone', 'message', 'A phone number with its country code, or one of the country, is required'
    );
  end if;
  if coalesce(btrim(item ->> 'email'), '') <> '' and lead ->> 'email' is null then
    return jsonb_build_object('code', 'invalid_email', 'field', 'email', 'message', 'This is not an e-mail address');
  end if;
  if coalesce(lead ->> 'name', '') = '' then
    lead := lead || jsonb_build_object('name', lead ->> 'phone', 'unnamed', true);
  end if;
  return lead;
end
$$;
comment on function private.read_lead(jsonb, public.lead_forms, text) is
  'What a lead says, in our words, or {"code","field","message"}: what is wrong with it concerns that lead alone.';

create function private.write_lead(
  organization uuid, lead jsonb, form public.lead_forms, at timestamptz, out lead_id uuid, out is_new boolean
)
language plpgsql volatile security definer set search_path = '' as $$
declare
  project constant uuid := (lead ->> 'project_id')::uuid;
begin
  -- Without a project no constraint tells two of a number apart; the caller holds the lock under which one may look.
  if project is null then
    select known.id into lead_id
    from public.leads as known
    where known.organization_id = organization and known.project_id is null and known.phone = lead ->> 'phone'
    order by known.archived_at is not null, known.created_at, known.id
    limit 1
    for no key update;
  end if;
  is_new := false;
  if lead_id is null then
    insert into public.leads as known (
      organization_id, project_id, stage_id, name, email, phone, timezone, source, lead_source, external_lead_id, raw_data, notes,
      recording_consent, created_by, created_at, updated_at
    )
    values (
      organization, project, coalesce(form.stage_id, private.first_stage(organization, project)), lead ->> 'name', lead ->> 'email',
      lead ->> 'phone', lead ->> 'timezone', case when form.id is null then 'api' else 'form' end,
      coalesce(lead ->> 'lead_source', form.name), lead ->> 'external_lead_id', nullif(lead -> 'raw_data', 'null'), lead ->> 'notes',
      private.has_consent(organization, lead ->> 'phone', 'recording', at), null, at, at
    )
    on conflict (organization_id, project_id, phone) do nothing
    returning known.id into lead_id;
    is_new := lead_id is not null;
  end if;
  if is_new then
    return;
  end if;
  -- A stranger's form adds what was not known; the organization's own system corrects what was.
  update public.leads as known
  set
    name = case when form.id is null and lead -> 'unnamed' is null then lead ->> 'name' else known.name end,
    email = case when form.id is null then coalesce(lead ->> 'email', known.email) else coalesce(known.email, lead ->> 'email') end,
    timezone = coalesce(lead ->> 'timezone', known.timezone),
    lead_source = coalesce(known.lead_source, lead ->> 'lead_source'),
    external_lead_id = coalesce(lead ->> 'external_lead_id', known.external_lead_id),
    notes = coalesce(lead ->> 'notes', known.notes),
    raw_data = case
      when form.id is null then coalesce(known.raw_data, '{}') || coalesce(nullif(lead -> 'raw_data', 'null'), '{}')
      else coalesce(nullif(lead -> 'raw_data', 'null'), '{}') || coalesce(known.raw_data, '{}')
    end
  where known.organization_id = organization
    and known.phone = lead ->> 'phone'
    and (known.id = lead_id or lead_id is null and known.project_id = project)
  returning known.id into lead_id;
end
$$;
comment on function private.write_lead(uuid, jsonb, public.lead_forms, timestamptz) is
  'One lead a number and project of an organization: made, or told what is new. Stage, status and who must not be called stay.';

create function private.ingest_leads(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  given        constant jsonb := request -> 'leads';
  request_key  constant text := request ->> 'idempotency_key';
  key          public.api_keys;
  form         public.lead_forms;
  organization public.organizations;
  sender       text;
  earlier      private.lead_requests;
  reply        jsonb;
  results      jsonb := '{}'::jsonb;
  item         record;
  written      record;
  consent      record;
begin
  if request ->> 'form_id' is not null then
    select known.* into form from public.lead_forms as known where known.id = private.to_uuid(request ->> 'form_id') and known.is_active;
    if form.id is null then
      perform private.raise_error(404, 'form_not_found', 'There is no such form', 'form_id');
    end if;
    sender := 'form ' || form.id;
  else
    select known.* into key
    from public.api_keys as known
    where known.prefix = request #>> '{api_key,prefix}'
      and encode(known.sha256, 'hex') = lower(request #>> '{api_key,sha256}')
      and known.revoked_at is null;
    if key.id is null then
      perform private.raise_error(401, 'invalid_api_key', 'The API key is unknown or revoked');
    end if;
    if not 'lead.write' = any (key.scopes) then
      perform private.raise_error(403, 'missing_scope', 'The API key lacks the scope lead.write');
    end if;
    sender := 'key ' || key.prefix;
  end if;
  if given is null or jsonb_typeof(given) <> 'array' or jsonb_array_length(given) = 0 then
    perform private.raise_error(400, 'invalid_request', 'leads must be an array of at least one lead', 'leads');
  end if;
  if jsonb_array_length(given) > (case when form.id is null then 500 else 1 end) then
    perform private.raise_error(413, 'too_many_leads', 'At most 500 leads are taken at once, and one by a form', 'leads');
  end if;
  if request_key is not null and length(request_key) not between 1 and 255 then
    perform private.raise_error(400, 'invalid_request', 'An idempotency key has 1 to 255 characters', 'idempotency-key');
  end if;
  select tenant.* into organization
  from public.organizations as tenant
  where tenant.id = coalesce(form.organization_id, key.organization_id);

  perform private.take_tokens(
    'leads ' || sender, jsonb_array_length(given), coalesce(form.rate_per_minute, 600), coalesce(form.rate_per_minute, 1000)
  );

  if request_key is not null then
    insert into private.lead_requests (organization_id, subject, key, body_sha256, created_at)
    values (organization.id, sender, request_key, coalesce(request ->> 'body_sha256', ''), at)
    on conflict on constraint lead_requests_pkey do nothing;
    if not found then
      select known.* into earlier
      from private.lead_requests as known
      where known.organization_id = organization.id and known.subject = sender and known.key = request_key;
      if earlier.body_sha256 <> coalesce(request ->> 'body_sha256', '') then
        perform private.raise_error(409, 'idempotency_conflict', 'Another request came with this key', 'idempotency-key');
      end if;
      return earlier.answer || jsonb_build_object('replayed', true);
    end if;
    delete from private.lead_requests as old
    where old.ctid in (
      select stale.ctid from private.lead_requests as stale where stale.created_at < at - interval '7 days'
      order by stale.created_at limit 100 for update skip locked
    );
  end if;

  -- One at a time for leads without a project, and in order of number with one: two batches never wait for each other in a circle.
  perform pg_advisory_xact_lock(hashtextextended('trunkline.ingest_leads' || organization.id, 0));
  for item in
    select judged.place, judged.value, judged.lead
    from (
      select
        entry.place, entry.value, private.read_lead(entry.value, form, coalesce(organization.country_code, 'IN')) as lead
      from jsonb_array_elements(given) with ordinality as entry (value, place)
    ) as judged
    order by judged.lead ->> 'phone', judged.place
  loop
    if item.lead ? 'code' then
      results := results || jsonb_build_object(item.place, item.lead || '{"status": "rejected"}');
      continue;
    end if;
    if item.lead ->> 'project_id' is not null and not exists (
      select
      from public.projects as project
      where project.organization_id = organization.id and project.id = (item.lead ->> 'project_id')::uuid
    ) then
      results := results || jsonb_build_object(
        item.place,
        jsonb_build_object(
          'status', 'rejected', 'code', 'unknown_project', 'field', 'project_id', 'message', 'There is no such project'
        )
      );
      continue;
    end if;
    select * into written from private.write_lead(organization.id, item.lead, form, at);
    insert into public.lead_activities (organization_id, lead_id, type, content, created_by, created_at)
    values (
      organization.id, written.lead_id, case when written.is_new then 'lead_created' else 'lead_received_again' end,
      jsonb_strip_nulls(jsonb_build_object('form_id', form.id, 'api_key', key.prefix)), null, at
    );

    for consent in
      select given_.scope, given_.words, given_.source, given_.proof, least(coalesce(given_.granted_at, at), at) as granted_at
      from (
        select scope.name as scope, form.consent_text as words, 'form' as source, '{}'::jsonb as proof, null::timestamptz as granted_at
        from unnest(form.consent_scopes) as scope (name)
        where coalesce(btrim(form.consent_text), '') <> ''
        union all
        select
          said.value ->> 'scope', left(said.value ->> 'text', 5000), coalesce(said.value ->> 'source', 'import'),
          coalesce(nullif(said.value -> 'proof', 'null'), '{}'), private.to_business(private.parse_instant(said.value ->> 'granted_at'))
        from jsonb_array_elements(
          case when form.id is null then coalesce(nullif(item.value -> 'consents', 'null'), '[]') else '[]' end
        ) as said (value)
      ) as given_
      where not exists (
        select
        from public.consents as known
        where known.organization_id = organization.id
          and known.phone_number = item.lead ->> 'phone'
          and known.scope = given_.scope
          and known.consent_text = given_.words
          and known.revoked_at is null
          and (known.expires_at is null or known.expires_at > at)
      )
    loop
      insert into public.consents (
        organization_id, lead_id, phone_number, scope, consent_text, source, proof, granted_at, created_by, created_at
      )
      values (
        organization.id, written.lead_id, item.lead ->> 'phone', consent.scope, consent.words, consent.source,
        consent.proof || jsonb_strip_nulls(jsonb_build_object('form_id', form.id, 'api_key', key.prefix, 'received_at', at)),
        consent.granted_at, null, at
      );
    end loop;

    if written.is_new then
      perform private.emit(
        organization.id, 'lead.created', written.lead_id::text,
        jsonb_strip_nulls(jsonb_build_object(
          'lead_id', written.lead_id, 'project_id', item.lead ->> 'project_id', 'form_id', form.id
        )), at
      );
    end if;
    results := results || jsonb_build_object(
      item.place, jsonb_build_object('status', case when written.is_new then 'created' else 'updated' end, 'id', written.lead_id)
    );
  end loop;

  reply := jsonb_build_object(
    'organization_id', organization.id,
    'results', (
      select jsonb_agg(jsonb_build_object('index', outcome.key::integer - 1) || outcome.value order by outcome.key::integer)
      from jsonb_each(results) as outcome
    )
  );
  if request_key is not null then
    update private.lead_requests as mine
    set answer = reply
    where mine.organization_id = organization.id and mine.subject = sender and mine.key = request_key;
  end if;
  return reply;
end
$$;
comment on function private.ingest_leads(jsonb, timestamptz) is
  'Takes leads from an organization''s own system, or one from its form: into its projects, at the first stage of its pipeline.';

create function public.ingest_leads(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.ingest_leads($1, private.clock_now())
$$;
comment on function public.ingest_leads(jsonb) is
  'For webhook-intake. {"v":1,"api_key":{"prefix","sha256"} or "form_id","leads":[{"name","phone","email","project_id","country","timezone",'
  '"source","external_lead_id","notes","fields":{},"consents":[{"scope","text","source"?,"granted_at"?,"proof"?}]}],"idempotency_key"?,'
  '"body_sha256"?} -> {"organization_id","results":[{"index","status":"created|updated|rejected","id"?,"code"?,"field"?,"message"?}],'
  '"replayed"?}; 429 with Retry-After for too many.';


revoke execute on function
  private.to_e164(text, text), private.take_tokens(text, integer, integer, integer), private.first_stage(uuid, uuid),
  private.read_lead(jsonb, public.lead_forms, text), private.write_lead(uuid, jsonb, public.lead_forms, timestamptz),
  private.ingest_leads(jsonb, timestamptz), public.ingest_leads(jsonb)
from public, anon, authenticated, service_role;
grant execute on function private.ingest_leads(jsonb, timestamptz), public.ingest_leads(jsonb) to service_role;
$trunkline_schema$;
  execute format('comment on schema private is %L', 'Trunkline ' || version);
end
$trunkline_master$;
