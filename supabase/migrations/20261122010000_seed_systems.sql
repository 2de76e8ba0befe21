-- The rest of both seed systems: stores, products, orders and conversations; inventory; invitations and members; consent, do-not-call
-- registers and calling hours; support sessions and audit; prepaid credit, payments and credit notes.
--
-- Nothing is dropped but an index and a check that wider ones replace, so a database with data in it keeps all of it.



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




-- Acting for another user ---------------------------------------------------------------------------------------------------------
-- An operator's support session (public.impersonation_sessions) leaves its mark on the operator's own profile, so that a helper
-- that reads the profile anyway learns of it without another look-up, and so that this file needs no later one.

alter table public.profiles
  add column if not exists acting_for uuid,
  add column if not exists acting_until timestamptz,
  add column if not exists acting_read_only boolean not null default true,
  add column if not exists acting_session_id uuid;
do $$
begin
  alter table public.profiles add constraint profiles_platform_admin_apart
    check (system_role <> 'platform_admin' or organization_id is null);
exception when duplicate_object then null;
end
$$;
do $$
begin
  alter table public.profiles add constraint profiles_acting_is_platform_admin
    check (acting_for is null or (system_role = 'platform_admin' and acting_until is not null and acting_session_id is not null));
exception when duplicate_object then null;
end
$$;
comment on column public.profiles.system_role is
  'owner, admin or member of the organization; platform_admin is the operator''s own staff, who belong to none and act for users in sessions.';
comment on column public.profiles.acting_for is 'The user whose rights a platform admin has in a support session; written by its functions alone. No foreign key: the two are in no tenant together.';
comment on column public.profiles.acting_until is 'Real time at which that session ends by itself.';
comment on column public.profiles.acting_read_only is 'In the session only permissions ending in .view are held.';
comment on column public.profiles.acting_session_id is 'The session''s row in impersonation_sessions, by which the audit log is tagged.';

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

-- Replaces the one above: an operator in a session has the organization of the user they act for, everybody else their own.
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
language plpgsql stable parallel safe security definer set search_path = '' as $$
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

revoke execute on function
  private.acting_user_id(), private.get_auth_role_id(), private.is_platform_admin(), private.keep_platform_admin_apart()
from public;
grant execute on function private.acting_user_id(), private.get_auth_role_id(), private.is_platform_admin() to authenticated;

create or replace function public.get_auth_role_id() returns uuid
language plpgsql stable parallel safe security invoker set search_path = '' as $$
begin
  return private.get_auth_role_id();
end
$$;
comment on function public.get_auth_role_id() is 'The caller''s role; null when their system role decides.';
revoke execute on function public.get_auth_role_id() from public, anon, authenticated, service_role;
grant execute on function public.get_auth_role_id() to authenticated;


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
drop policy if exists "Who manages members sees the invitations, and the invited their own" on public.invitations;
create policy "Who manages members sees the invitations, and the invited their own" on public.invitations
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
      reference.conrelid::regclass as child,
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
    execute format('update %s set %I = null where %I = $1 and %I = $2', link.child, link.user_column, link.tenant_column, link.user_column)
    using organization, user_id;
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


-- What changed in tables and functions that were there --------------------------------------------------------------------------------

alter table public.projects alter column created_by set default private.acting_user_id();
alter table public.leads alter column created_by set default private.acting_user_id();
alter table public.lead_activities alter column created_by set default private.acting_user_id();
alter table public.campaigns alter column created_by set default private.acting_user_id();

alter table public.invoices
  add column credited_minor bigint not null default 0,
  add constraint invoices_credited_range check (credited_minor between 0 and total_minor),
  add constraint invoices_void_unpaid check (status <> 'void' or (amount_paid_minor = 0 and credited_minor = 0)),
  drop constraint invoices_paid_in_full;
alter table public.invoices
  add constraint invoices_paid_in_full check (
    status <> 'paid' or (amount_paid_minor + credited_minor >= total_minor and paid_at is not null)
  );
comment on column public.invoices.amount_paid_minor is 'Sum of the payments that were counted on it (payments.applied_minor).';
comment on column public.invoices.credited_minor is 'Sum of the credit notes issued against it. What is due is the total less both.';


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
    array(select distinct scope from unnest(create_api_key.scopes) as scope order by scope), private.acting_user_id(), at
  );
  perform private.audit(organization, 'api_key.created', 'api_key', key_id, jsonb_build_object('prefix', key_prefix), at);
  return jsonb_build_object('id', key_id, 'prefix', key_prefix, 'key', plain);
end
$$;

create or replace function private.guard_invoice() returns trigger
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

create or replace function private.create_campaign(name text, project_id uuid, settings jsonb, at timestamptz) returns jsonb
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

create or replace function private.start_campaign(campaign_id uuid, at timestamptz) returns jsonb
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
  unique (organization_id, store_id, conversation_id, message_index),
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




-- The order of stages -------------------------------------------------------------------------------------------------------------
-- order_index is dense, from 0 on, and each number is taken once in a pipeline, whoever drags what at once: every statement that
-- changes stages waits for the other one of its organization, and leaves its pipelines numbered.

alter table public.pipeline_stages alter column order_index set default 2147483647;
comment on column public.pipeline_stages.order_index is
  'The place in the pipeline, from 0 on without a gap. Written to, the others make room; without one a new stage is the last.';

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

-- What was there before: numbered as it is shown.
update public.pipeline_stages as stage
set order_index = numbered.number
from (
  select old.id, row_number() over (partition by old.pipeline_id order by old.order_index, old.created_at, old.id) - 1 as number
  from public.pipeline_stages as old
) as numbered
where stage.id = numbered.id and stage.order_index <> numbered.number;
drop index public.idx_pipeline_stages_pipeline;
alter table public.pipeline_stages
  add constraint pipeline_stages_place_key unique (organization_id, pipeline_id, order_index) deferrable initially deferred;

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
  'A form by which leads come in of themselves. The public never reads it here: intake takes submissions by an organization''s key.';
comment on column public.lead_forms.fields is 'What it asks: an array of {"name","label","type","required"}.';
comment on column public.lead_forms.stage_id is 'Where its leads begin; null is the first stage of the default pipeline.';
comment on column public.lead_forms.consent_text is 'What the person agrees to by sending it; copied to consents word by word.';


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
  -- The organization's end takes its evidence along; otherwise a reference may fall away, and a consent is withdrawn once.
  if tg_op = 'DELETE' then
    if exists (select from public.organizations as tenant where tenant.id = old.organization_id) then
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
  unique (organization_id, id),
  foreign key (organization_id, project_id) references public.projects (organization_id, id) on delete set null (project_id),
  foreign key (organization_id, created_by) references public.profiles (organization_id, id) on delete set null (created_by)
);
create index idx_properties_organization_id on public.properties (organization_id, created_at desc);
create index idx_properties_status on public.properties (organization_id, status, type);
create index idx_properties_project on public.properties (organization_id, project_id);
create index idx_properties_created_by on public.properties (organization_id, created_by);

revoke all on public.properties from anon, authenticated, service_role;
grant select, delete on public.properties to authenticated;
grant
  insert (id, project_id, title, description, address, price_minor, currency_code, size_sqft, bedrooms, bathrooms, type),
  update (project_id, title, description, address, price_minor, currency_code, size_sqft, bedrooms, bathrooms, type, archived_at)
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




-- Who placed a call by hand -------------------------------------------------------------------------------------------------------

alter table public.call_logs
  add column caller_id uuid,
  add foreign key (organization_id, caller_id) references public.profiles (organization_id, id) on delete set null (caller_id);
create index idx_call_logs_caller_id on public.call_logs (organization_id, caller_id) where caller_id is not null;
comment on column public.call_logs.caller_id is 'The user who placed it by hand; null for a campaign''s. The number it is made from is caller_number.';


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
insert into public.calling_hours (jurisdiction, purpose, weekday, opens, closes, on_holidays, daily_calls, basis)
select
  law.jurisdiction, purpose.name, day.number,
  case when day.number = 7 then law.sunday_opens when day.number = 6 then law.saturday_opens else law.opens end::time,
  case when day.number = 7 then law.sunday_closes when day.number = 6 then law.saturday_closes else law.closes end::time,
  law.on_holidays, law.daily_calls, law.basis
from (
  values
    ('US', 'service promotional', '08:00', '21:00', '08:00', '21:00', '08:00', '21:00', true, null::smallint, '47 CFR 64.1200(c)(1)'),
    ('US-AL', 'service promotional', '08:00', '20:00', '08:00', '20:00', null, null, false, null, 'Ala. Code 8-19A'),
    ('US-CT', 'service promotional', '09:00', '20:00', '09:00', '20:00', '09:00', '20:00', true, null, 'Conn. Gen. Stat. 42-288a'),
    ('US-FL', 'service promotional', '08:00', '20:00', '08:00', '20:00', '08:00', '20:00', true, 3, 'Fla. Stat. 501.616'),
    ('US-LA', 'service promotional', '08:00', '20:00', '08:00', '20:00', null, null, false, null, 'La. R.S. 45:844'),
    ('US-MD', 'service promotional', '08:00', '20:00', '08:00', '20:00', '08:00', '20:00', true, 3, 'Md. Com. Law 14-4501'),
    ('US-MS', 'service promotional', '08:00', '20:00', '08:00', '20:00', null, null, true, null, 'Miss. Code 77-3-723'),
    ('US-OK', 'service promotional', '08:00', '20:00', '08:00', '20:00', '08:00', '20:00', true, 3, 'Okla. Stat. 15-775C'),
    ('US-RI', 'service promotional', '09:00', '18:00', '10:00', '17:00', null, null, false, null, 'R.I. Gen. Laws 5-61-3.6'),
    ('US-TX', 'service promotional', '09:00', '21:00', '09:00', '21:00', '12:00', '21:00', true, null, 'Tex. Bus. & Com. Code 301.051'),
    ('US-WA', 'service promotional', '08:00', '20:00', '08:00', '20:00', '08:00', '20:00', true, null, 'RCW 80.36.390'),
    ('IN', 'service', '09:00', '21:00', '09:00', '21:00', '09:00', '21:00', true, null, 'TCCCPR 2018'),
    ('IN', 'promotional', '10:00', '21:00', '10:00', '21:00', '10:00', '21:00', true, null, 'TCCCPR 2018')
) as law (
  jurisdiction, purposes, opens, closes, saturday_opens, saturday_closes, sunday_opens, sunday_closes, on_holidays, daily_calls, basis
)
cross join lateral unnest(string_to_array(law.purposes, ' ')) as purpose (name)
cross join generate_series(1, 7) as day (number);

create table public.calling_holidays (
  jurisdiction text not null check (jurisdiction ~ '^[A-Z]{2}(-[A-Z0-9]{1,3})?$'),
  day          date not null,
  name         text not null,
  primary key (jurisdiction, day)
);

revoke all on public.calling_holidays from anon, authenticated, service_role;
grant select on public.calling_holidays to authenticated, service_role;
alter table public.calling_holidays enable row level security;
alter table public.calling_holidays force row level security;
create policy "Anyone signed in may read the holidays" on public.calling_holidays
  for select to authenticated using (true);
comment on table public.calling_holidays is
  'Public holidays, of a country or of a state alone; the operator adds each year''s. They matter where calling_hours says so.';
insert into public.calling_holidays (jurisdiction, day, name)
values
  ('US', '2026-11-26', 'Thanksgiving Day'), ('US', '2026-12-25', 'Christmas Day'),
  ('US', '2027-01-01', 'New Year''s Day'), ('US', '2027-01-18', 'Martin Luther King Jr. Day'), ('US', '2027-02-15', 'Washington''s Birthday'),
  ('US', '2027-05-31', 'Memorial Day'), ('US', '2027-06-19', 'Juneteenth'), ('US', '2027-07-04', 'Independence Day'),
  ('US', '2027-07-05', 'Independence Day (observed)'), ('US', '2027-09-06', 'Labor Day'), ('US', '2027-10-11', 'Columbus Day'),
  ('US', '2027-11-11', 'Veterans Day'), ('US', '2027-11-25', 'Thanksgiving Day'), ('US', '2027-12-25', 'Christmas Day');

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
          or not law.on_holidays and exists (
            select
            from public.calling_holidays as holiday
            where holiday.jurisdiction in (country, country || '-' || region) and holiday.day = legal_hours.day
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
  constraint call_credits_tenant_key unique (organization_id, id),
  constraint call_credits_currency_key unique (organization_id, currency),
  constraint call_credits_currency_format check (currency ~ '^[A-Z]{3}$'),
  constraint call_credits_balance_not_negative check (balance_minor >= 0),
  constraint call_credits_totals_not_negative check (total_purchased_minor >= 0 and total_consumed_minor >= 0),
  constraint call_credits_last_number_not_negative check (last_number >= 0),
  constraint call_credits_low_balance_not_negative check (low_balance_minor >= 0)
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
    'payment_method_id', 'updated_at'
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
comment on table public.platform_audit_logs is
  'As audit_logs, for what belongs to no organization: plans, prices, tax rates, permissions, the platform''s carrier accounts, its staff.';

-- Also for a session that plays itself a replica.
alter table public.audit_logs enable always trigger refuse_change;
alter table public.platform_audit_logs enable always trigger refuse_change;

alter table public.audit_logs add column impersonation_session_id uuid;
comment on column public.audit_logs.user_id is 'Who did it; in a support session the user in whose name it was done.';
comment on column public.audit_logs.user_name is 'As they were called then; without a user the database role that did it.';
comment on column public.audit_logs.impersonator_user_id is 'The platform admin who did it in the user''s name.';
comment on column public.audit_logs.impersonation_session_id is 'The support session in which it was done; its reason is there.';

-- Replaces the one above: it also says who acted for whom.
create or replace function private.audit(
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
    and (cardinality(watched) = 0 or field.name = any (watched) or tg_op <> 'UPDATE');
  if changed is null then
    return null;
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
  'count in an update (none: all but times).';

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
create trigger audit_change after insert or update or delete on public.caller_numbers
  for each row execute function private.audit_change('caller_number');
create trigger audit_change after insert or update or delete on public.calling_hours
  for each row execute function private.audit_change('calling_hours');
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
create policy "The organization sees who acted in it, and staff their own sessions" on public.impersonation_sessions
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
  'is too small. With `allow_partial` it takes what there is: for a call that ran over, which is recorded in full all the same.';

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
      select from public.credit_accounts as account where account.id = accounts[1] and account.balance_minor >= refund_credit.amount_minor
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

