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
  aggregation text not null default 'sum',
  source      text not null default 'events',
  rounding    text not null default 'none',
  pulse       bigint not null default 1,
  constraint meters_key_format check (key ~ '^[a-z][a-z0-9_]{0,62}$'),
  constraint meters_name_present check (btrim(name) <> ''),
  constraint meters_unit_format check (unit ~ '^[a-z][a-z ]{0,30}$'),
  constraint meters_aggregation_known check (aggregation in ('sum', 'count', 'max', 'unique', 'latest')),
  constraint meters_source_known check (source in ('events', 'calls', 'rows', 'rates')),
  constraint meters_source_is_reserved check (source = 'events' or is_reserved),
  constraint meters_rounding_known check (rounding in ('none', 'event', 'period')),
  constraint meters_rounding_of_sums check (rounding = 'none' or aggregation = 'sum'),
  constraint meters_pulse_positive check (pulse > 0)
);

revoke all on public.meters from anon, authenticated, service_role;
grant select on public.meters to authenticated, service_role;
alter table public.meters enable row level security;
alter table public.meters force row level security;
create policy "Signed-in users see the active meters" on public.meters
  for select to authenticated using (is_active);

create function private.refuse_meter_change() returns trigger
language plpgsql security definer set search_path = ''
as $$
begin
  if exists (select from public.usage_logs as log where log.feature_key = old.key) then
    raise exception 'what meter % has counted would mean something else: make another meter', old.key using errcode = '23514';
  end if;
  return new;
end
$$;
revoke all on function private.refuse_meter_change() from public;
comment on function private.refuse_meter_change() is 'Trigger: how a meter counts does not change once it has counted.';

create trigger meters_keep_their_meaning before update of aggregation, rounding, pulse on public.meters
  for each row
  when ((old.aggregation, old.rounding, old.pulse) is distinct from (new.aggregation, new.rounding, new.pulse))
  execute function private.refuse_meter_change();

comment on table public.meters is 'What can be counted: one row a kind of usage, with its unit and how it is added up.';
comment on column public.meters.key is 'The meter''s name in prices, in usage and in events'' `type`.';
comment on column public.meters.unit is 'The unit of its quantities, singular: call, second, message.';
comment on column public.meters.is_reserved is 'Counted by the platform alone; usage events from outside are refused.';
comment on column public.meters.position is 'Order on invoices and in usage lists, lowest first.';
comment on column public.meters.aggregation is
  'What a day and a period make of its events: sum of their quantities, count of them, the largest quantity, how many different values, or '
  'the latest quantity.';
comment on column public.meters.source is
  'Who counts: events of an organization''s own systems, the database for each call that ends, what such a call comes to by rate deck, or the '
  'rows that are there now.';
comment on column public.meters.rounding is
  'none counts by the unit, event counts each event (each call) up to started pulses, period bills the period''s sum up to started pulses.';
comment on column public.meters.pulse is 'How many units a pulse has: 60 makes started minutes of seconds.';

-- Calls are counted by the database itself, so the first two are part of the schema and not of the seed; the next two are reported, and
-- of the others there are so many now, which a plan limits (max_users, max_leads, …) where they are made.
insert into public.meters (key, name, unit, is_reserved, position, aggregation, source)
values
  ('ai_calls', 'AI calls', 'call', true, 10, 'count', 'calls'),
  ('call_seconds', 'Calling time', 'second', true, 20, 'sum', 'calls'),
  ('agent_tokens', 'Agent tokens', 'token', false, 30, 'sum', 'events'),
  ('recording_seconds', 'Recordings', 'second', false, 40, 'sum', 'events'),
  ('users', 'Users', 'user', true, 200, 'latest', 'rows'),
  ('projects', 'Projects', 'project', true, 210, 'latest', 'rows'),
  ('campaigns', 'Campaigns', 'campaign', true, 220, 'latest', 'rows'),
  ('leads', 'Leads', 'lead', true, 230, 'latest', 'rows'),
  ('stores', 'Stores', 'store', true, 240, 'latest', 'rows')
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
  monthly_credit_minor bigint not null default 0,
  billed_in     text not null default 'arrears',
  minimum_minor bigint,
  constraint plan_prices_version_key unique (plan_id, billing_cycle, currency, version),
  constraint plan_prices_version_positive check (version > 0),
  constraint plan_prices_currency_format check (currency ~ '^[A-Z]{3}$'),
  constraint plan_prices_base_not_negative check (base_minor >= 0),
  constraint plan_prices_monthly_credit_not_negative check (monthly_credit_minor >= 0),
  constraint plan_prices_billed_in_known check (billed_in in ('advance', 'arrears')),
  constraint plan_prices_minimum_positive check (minimum_minor > 0)
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
  'The price of one billing period, in the currency''s minor unit, billed as `billed_in` says.';
comment on column public.plan_prices.monthly_credit_minor is
  'Prepaid credit that each month of a paid subscription begins with, once, in the price''s currency; what is left of it at the month''s '
  'end is gone.';
comment on column public.plan_prices.billed_in is
  'advance: the base price is billed when its period begins; arrears: when it has ended. What was used is always billed afterwards.';
comment on column public.plan_prices.minimum_minor is
  'What base price and usage of a whole period come to at least; what is missing is a line of its own. Null is no commitment.';
comment on column public.plan_prices.retired_at is 'Since when this version is no longer sold; the only column that may change.';

create function private.are_tiers(tiers jsonb) returns boolean
language plpgsql immutable strict set search_path = ''
as $$
declare
  steps integer := case jsonb_typeof(tiers) when 'array' then jsonb_array_length(tiers) else 0 end;
begin
  return steps between 1 and 100 and coalesce((
    select bool_and(
      jsonb_typeof(tier.step) = 'object'
      and coalesce(tier.step ->> 'unit_minor', '') ~ '^[0-9]{1,15}$' and jsonb_typeof(tier.step -> 'unit_minor') = 'number'
      and coalesce(tier.step ->> 'flat_minor', '0') ~ '^[0-9]{1,15}$'
      and case when tier.number = steps then nullif(tier.step -> 'up_to', 'null') is null
        else jsonb_typeof(tier.step -> 'up_to') = 'number' and tier.step ->> 'up_to' ~ '^[0-9]{1,15}$'
          and (tier.step ->> 'up_to')::numeric > coalesce((tiers -> (tier.number::integer - 2) ->> 'up_to')::numeric, 0) end
    )
    from (
      select given.step, given.number
      from jsonb_array_elements(case when steps > 0 then tiers else '[]' end) with ordinality as given (step, number)
    ) as tier
  ), false);
end
$$;
comment on function private.are_tiers(jsonb) is
  'Whether a text says tiers: [{"up_to":1000,"unit_minor":400,"flat_minor":0}, …, {"unit_minor":300}], rising, the last without an end.';
revoke all on function private.are_tiers(jsonb) from public, anon, authenticated, service_role;

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
  pricing_model       text not null default 'per_unit',
  tiers               jsonb,
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
  ),
  constraint plan_price_meters_model_known check (pricing_model in ('per_unit', 'graduated', 'volume', 'package')),
  constraint plan_price_meters_tiers_fit check ((pricing_model in ('graduated', 'volume')) = (tiers is not null)),
  constraint plan_price_meters_tiers_valid check (private.are_tiers(tiers)),
  constraint plan_price_meters_model_is_sold check (pricing_model = 'per_unit' or overage_price_minor is not null)
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
comment on column public.plan_price_meters.pricing_model is
  'How what is beyond the included units is priced: per_unit; package, by started multiples of `overage_unit`; graduated, each unit at the '
  'price of its own tier; volume, all of them at the price of the tier that they reach together.';
comment on column public.plan_price_meters.tiers is
  'Of graduated and volume: [{"up_to","unit_minor","flat_minor"?}, …], counted from the first unit beyond the included ones. A tier''s price is '
  'for `overage_unit` units, its flat fee is owed once it is reached, and nothing owes none. `overage_price_minor` says what is shown as '
  'the price, and that it is sold.';
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
  base_billed_minor    bigint,
  base_billed_from     timestamptz,
  paused_at            timestamptz,
  past_due_since       timestamptz,
  constraint subscriptions_tenant_key unique (organization_id, id),
  constraint subscriptions_period_ordered check (current_period_start < current_period_end),
  constraint subscriptions_period_no_range check (period_no >= -1),
  constraint subscriptions_trial_has_end check (status <> 'trialing' or trial_ends_at is not null),
  constraint subscriptions_base_whole check ((base_billed_minor is null) = (base_billed_from is null)),
  constraint subscriptions_base_in_period check (base_billed_from >= current_period_start and base_billed_from < current_period_end),
  constraint subscriptions_pause_has_time check ((status::text = 'paused') = (paused_at is not null))
);

create index idx_subscriptions_org_id on public.subscriptions (organization_id);
create index idx_subscriptions_plan on public.subscriptions (plan_id);
create index idx_subscriptions_price on public.subscriptions (plan_price_id);
create index idx_subscriptions_next_price on public.subscriptions (next_plan_price_id) where next_plan_price_id is not null;
create index idx_subscriptions_due on public.subscriptions (next_invoice_at, id) where billing_hold is null;
create index idx_subscriptions_past_due on public.subscriptions (past_due_since) where status = 'past_due';
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
  for each row when (new.updated_at is not distinct from old.updated_at) execute function private.update_modified_column();

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
comment on column public.subscriptions.base_billed_minor is
  'What the base price from base_billed_from to the period''s end comes to, where an invoice has it or it waits for one; null while the '
  'base price of the current period is still to be billed.';
comment on column public.subscriptions.paused_at is 'Since when it is paused: nothing is dialled, and a period that begins meanwhile is not billed.';
comment on column public.subscriptions.past_due_since is 'Since when invoices of it are overdue; null when none is.';
comment on column public.subscriptions.billing_hold is
  'Why billing stopped for this subscription, for a person to look at; null while all is well.';

-- A plan made for one customer is not on offer, but its subscriber reads it; which subscriptions a user sees is decided above.
create policy "Signed-in users see the plans on offer and their own" on public.subscription_plans
  for select to authenticated using (
    (is_active and is_public)
    or id in (select subscription.plan_id from public.subscriptions as subscription)
  );

-- What a plan has room for --------------------------------------------------------------------------------------------------------
-- max_users, max_leads, max_projects, max_campaigns and max_stores of the plan, or of subscriptions.metadata.custom_limits. A plan that
-- names none, and -1, limit nothing; what is archived takes no room. Counted behind a lock, so that two at once do not both take the
-- last place.

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

create function private.count_standing(organization uuid, counted text, at_most bigint) returns bigint
language plpgsql stable security definer set search_path = '' as $$
begin
  return case counted
    when 'users' then (
      select count(*)
      from (
        select from public.profiles as member where member.organization_id = organization and member.status <> 'archived' limit at_most
      ) as some_of_them
    )
    when 'leads' then (
      select count(*)
      from (
        select from public.leads as lead where lead.organization_id = organization and lead.archived_at is null limit at_most
      ) as some_of_them
    )
    when 'projects' then (
      select count(*)
      from (
        select from public.projects as project where project.organization_id = organization and project.status <> 'archived' limit at_most
      ) as some_of_them
    )
    when 'campaigns' then (
      select count(*)
      from (
        select
        from public.campaigns as campaign
        where campaign.organization_id = organization and campaign.status <> 'archived'
        limit at_most
      ) as some_of_them
    )
    when 'stores' then (
      select count(*)
      from (select from public.stores as store where store.organization_id = organization limit at_most) as some_of_them
    )
  end;
end
$$;
comment on function private.count_standing(uuid, text, bigint) is
  'How many users, leads, projects, campaigns or stores an organization has now; counting stops at so many, null counts them all.';

create function private.check_limit(organization uuid, counted text) returns void
language plpgsql volatile security definer set search_path = '' as $$
declare
  allowed bigint := private.plan_limit(organization, 'max_' || counted);
begin
  if allowed is null then
    return;
  end if;
  perform pg_advisory_xact_lock(hashtextextended('trunkline.plan_limit ' || organization::text, 0));
  -- One more than there may be is enough to know.
  if private.count_standing(organization, counted, allowed + 1) > allowed then
    perform private.raise_error(402, 'quota_exhausted', format('The plan has room for %s %s', allowed, counted));
  end if;
end
$$;
comment on function private.check_limit(uuid, text) is
  'Ends the request with 402 when an organization has more users, leads, projects, campaigns or stores than its plan has room for.';

create function private.enforce_limit() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  tenant uuid;
  counted constant text := case tg_table_name when 'profiles' then 'users' else tg_table_name end;
begin
  if tg_level = 'ROW' then
    perform private.check_limit(new.organization_id, counted);
    return null;
  end if;
  for tenant in
    select distinct added.organization_id from added where added.organization_id is not null order by added.organization_id
  loop
    perform private.check_limit(tenant, counted);
  end loop;
  return null;
end
$$;
comment on function private.enforce_limit() is 'Trigger: what is added, or taken out of the archive, fits into the plan.';
revoke execute on function
  private.plan_limit(uuid, text), private.count_standing(uuid, text, bigint), private.check_limit(uuid, text), private.enforce_limit()
from public;

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
create trigger enforce_limit after insert on public.stores
  referencing new table as added for each statement execute function private.enforce_limit();
create trigger enforce_limit after insert on public.profiles
  referencing new table as added for each statement execute function private.enforce_limit();
create trigger enforce_limit_again after update of organization_id, status on public.profiles
  for each row
  when (
    new.organization_id is not null and new.status <> 'archived'
    and (old.organization_id is distinct from new.organization_id or old.status = 'archived')
  )
  execute function private.enforce_limit();


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
  plan_price_id   uuid references public.plan_prices (id) on delete restrict,
  billed_count    bigint,
  constraint usage_logs_tenant_key unique (organization_id, id),
  constraint usage_logs_period_key unique (organization_id, feature_key, period_start),
  constraint usage_logs_periods_apart exclude using gist (
    organization_id with =, feature_key with =, daterange(period_start, period_end) with &&
  ),
  constraint usage_logs_period_ordered check (period_start < period_end),
  constraint usage_logs_count_not_negative check (usage_count >= 0),
  constraint usage_logs_reserved_not_negative check (reserved >= 0),
  constraint usage_logs_prepaid_range check (prepaid between 0 and usage_count),
  constraint usage_logs_billed_at_a_price check ((plan_price_id is null) = (billed_count is null))
) with (fillfactor = 50);

create index idx_usage_logs_org_period on public.usage_logs (organization_id, period_start, period_end);
create index idx_usage_logs_meter on public.usage_logs (feature_key);
create index idx_usage_logs_price on public.usage_logs (plan_price_id) where plan_price_id is not null;

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
comment on column public.usage_logs.closed_at is 'Since when the period is billed: usage that arrives later still counts here, and an adjustment '
  'on the next invoice bills it.';
comment on column public.usage_logs.plan_price_id is 'The price at which the period was billed, and at which what comes late is.';
comment on column public.usage_logs.billed_count is 'Units that invoices have billed of it so far, without what was prepaid; null until it is closed.';

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
  organization_id uuid not null,
  source          text collate "C" not null,
  key             text collate "C" not null,
  body_hash       bytea,
  meter_key       text,
  occurred_at     timestamptz,
  quantity        bigint,
  reported        bigint,
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
  'Every idempotency key ever counted, for ever: not split by time, since uniqueness would then depend on the event''s time. Its '
  'organization cannot go while its counters or its calls are there, which saves a look at it for every event.';
comment on column private.usage_keys.source is
  'Who counted: `call` is the platform itself, anything else is an organization''s own system.';
comment on column private.usage_keys.key is 'The event''s id in its source; for a call the attempt''s id.';
comment on column private.usage_keys.body_hash is
  'First 16 bytes of the SHA-256 of what was said under this key; null for a call that ended without a billed second.';
comment on column private.usage_keys.meter_key is 'What was counted, of a call its seconds; null for a correction and while nothing was counted.';
comment on column private.usage_keys.occurred_at is 'When it happened, which is where its event is found.';
comment on column private.usage_keys.quantity is
  'What was counted under this key, with all that corrected it: never less than zero. Null for a correction itself.';
comment on column private.usage_keys.reported is
  'What was reported under this key, with all that corrected it, where its meter counts in pulses and that is another number.';

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
  corrects        text,
  value_hash      bytea,
  constraint usage_events_pkey primary key (occurred_at, id),
  constraint usage_events_quantity_signed check (quantity >= 0 or corrects is not null)
) partition by range (occurred_at);

select private.close_table('private.usage_events');

comment on table private.usage_events is
  'Every event that was counted, append-only, split by month of occurrence (UTC). Its key row ties it to the organization.';
comment on column private.usage_events.occurred_at is 'When it happened, in business time.';
comment on column private.usage_events.day is
  'The local day on which it counts, by the time zone of the subscription when it came.';
comment on column private.usage_events.corrects is
  'The key, in the same source, of the event whose quantity this one changes; only such an event may be negative. It counts on that '
  'event''s day.';
comment on column private.usage_events.recorded_at is 'When it was counted, in business time.';
comment on column private.usage_events.value_hash is
  'First 16 bytes of the SHA-256 of its value, for a meter that counts different values: the value itself is nobody''s business here.';

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

create table private.usage_readings (
  organization_id uuid not null,
  meter_key       text not null,
  source          text collate "C" not null,
  key             text collate "C" not null,
  day             date not null,
  occurred_at     timestamptz not null,
  quantity        bigint not null,
  value_hash      bytea,
  constraint usage_readings_pkey primary key (organization_id, source, key),
  constraint usage_readings_quantity_not_negative check (quantity >= 0)
);

create index idx_usage_readings_largest on private.usage_readings (organization_id, meter_key, day, quantity) where value_hash is null;
create index idx_usage_readings_latest on private.usage_readings (organization_id, meter_key, day, occurred_at, source, key)
  where value_hash is null;
create index idx_usage_readings_value on private.usage_readings (organization_id, meter_key, value_hash, day)
  where value_hash is not null and quantity > 0;
select private.close_table('private.usage_readings');

comment on table private.usage_readings is
  'The events of meters that are not sums, as corrections left them: the largest, the latest and the different ones of a day are found '
  'here. Written under the lock of the period''s counter.';
comment on column private.usage_readings.day is 'The local day on which it counts.';
comment on column private.usage_readings.quantity is 'Its quantity with all that corrected it; a value that was taken back is 0.';
comment on column private.usage_readings.value_hash is 'As in its event; null where quantities are compared.';

create table private.usage_seals (
  organization_id uuid not null,
  meter_key       text not null,
  day             date not null,
  quantity        bigint not null,
  events          bigint not null,
  constraint usage_seals_pkey primary key (organization_id, meter_key, day),
  constraint usage_seals_events_positive check (events > 0)
);

select private.close_table('private.usage_seals');

comment on table private.usage_seals is
  'What the events of months past their retention came to, by day: written by the transaction that drops them, so that keys, days and '
  'counters can be compared with it for ever.';
comment on column private.usage_seals.quantity is 'The sum of their quantities, corrections with their sign.';
comment on column private.usage_seals.events is 'How many they were.';


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

create table private.usage_holds (
  organization_id uuid not null,
  source          text collate "C" not null,
  key             text collate "C" not null,
  meter_key       text not null,
  quantity        bigint not null,
  counted         bigint not null,
  held_at         timestamptz not null,
  expires_at      timestamptz not null,
  constraint usage_holds_pkey primary key (organization_id, source, key),
  constraint usage_holds_quantity_positive check (quantity > 0 and counted >= quantity),
  constraint usage_holds_end_after_their_start check (expires_at > held_at)
);

create index idx_usage_holds_due on private.usage_holds (expires_at);
create index idx_usage_holds_meter on private.usage_holds (organization_id, meter_key, expires_at);
select private.close_table('private.usage_holds');

comment on table private.usage_holds is
  'Units that an organization''s own system holds for what it is about to do. Gone when the event of the same source and id is counted, when '
  'they are given back, or when their time is over. The counters'' `reserved` are the sums of these rows, and of the calls'' for their meters.';
comment on column private.usage_holds.key is 'The id of the event that will tell what was used.';
comment on column private.usage_holds.quantity is 'What was asked for.';
comment on column private.usage_holds.counted is 'What is held: the same, up to started pulses where the meter counts each event so.';
comment on column private.usage_holds.expires_at is 'From when on they are no longer held, in business time.';

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

create table private.call_corrections (
  correction_id   text not null,
  organization_id uuid not null,
  call_log_id     uuid not null,
  seconds         bigint not null,
  credit_seconds  bigint not null,
  overage_seconds bigint not null,
  charged_minor   bigint not null,
  transaction_id  uuid,
  created_at      timestamptz not null,
  constraint call_corrections_pkey primary key (correction_id),
  constraint call_corrections_charge_fkey foreign key (organization_id, call_log_id)
    references public.call_charges (organization_id, call_log_id) on delete restrict,
  constraint call_corrections_transaction_fkey foreign key (organization_id, transaction_id)
    references public.credit_transactions (organization_id, id) on delete restrict,
  constraint call_corrections_change_something check (seconds <> 0)
);

create index idx_call_corrections_call on private.call_corrections (organization_id, call_log_id);
create index idx_call_corrections_transaction on private.call_corrections (organization_id, transaction_id) where transaction_id is not null;
select private.close_table('private.call_corrections');

create trigger call_corrections_is_append_only before update or delete or truncate on private.call_corrections
  for each statement execute function private.refuse_money_change();

comment on table private.call_corrections is
  'How a charge changed when the carrier corrected the seconds of its call, append-only: what a call cost is its charge and all of these.';
comment on column private.call_corrections.correction_id is 'The key of the usage event that corrected the seconds.';
comment on column private.call_corrections.seconds is 'By how much the call became longer, or, negative, shorter.';
comment on column private.call_corrections.credit_seconds is 'Of this, what credit pays for, or gets back.';
comment on column private.call_corrections.overage_seconds is 'Of this, what the invoice bills, or no longer bills.';
comment on column private.call_corrections.charged_minor is 'What was taken from prepaid credit; negative is given back.';
