-- Plans name every kind of price, subscriptions are changed, cancelled, paused and taken up again, and what is not paid has consequences.

set local lock_timeout = '5s';
set local statement_timeout = '60s';

-- Words ---------------------------------------------------------------------------------------------------------------------------

alter type public.billing_cycle add value if not exists 'quarterly' before 'yearly';
alter type public.subscription_status add value if not exists 'paused' before 'cancelled';

-- Prices --------------------------------------------------------------------------------------------------------------------------

alter table public.plan_prices
  add column billed_in text not null default 'arrears',
  add column minimum_minor bigint,
  -- The table is new or small: it is read in no time.
  -- squawk-ignore constraint-missing-not-valid
  add constraint plan_prices_billed_in_known check (billed_in in ('advance', 'arrears')),
  -- The table is new or small: it is read in no time.
  -- squawk-ignore constraint-missing-not-valid
  add constraint plan_prices_minimum_positive check (minimum_minor > 0);
comment on column public.plan_prices.base_minor is
  'The price of one billing period, in the currency''s minor unit, billed as `billed_in` says.';
comment on column public.plan_prices.billed_in is
  'advance: the base price is billed when its period begins; arrears: when it has ended. What was used is always billed afterwards.';
comment on column public.plan_prices.minimum_minor is
  'What base price and usage of a whole period come to at least; what is missing is a line of its own. Null is no commitment.';

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

alter table public.plan_price_meters
  add column pricing_model text not null default 'per_unit',
  add column tiers jsonb,
  -- The table is new or small: it is read in no time.
  -- squawk-ignore constraint-missing-not-valid
  add constraint plan_price_meters_model_known check (pricing_model in ('per_unit', 'graduated', 'volume', 'package')),
  -- The table is new or small: it is read in no time.
  -- squawk-ignore constraint-missing-not-valid
  add constraint plan_price_meters_tiers_fit check ((pricing_model in ('graduated', 'volume')) = (tiers is not null)),
  -- The table is new or small: it is read in no time.
  -- squawk-ignore constraint-missing-not-valid
  add constraint plan_price_meters_tiers_valid check (private.are_tiers(tiers)),
  -- The table is new or small: it is read in no time.
  -- squawk-ignore constraint-missing-not-valid
  add constraint plan_price_meters_model_is_sold check (pricing_model = 'per_unit' or overage_price_minor is not null);
comment on column public.plan_price_meters.pricing_model is
  'How what is beyond the included units is priced: per_unit; package, by started multiples of `overage_unit`; graduated, each unit at the '
  'price of its own tier; volume, all of them at the price of the tier that they reach together.';
comment on column public.plan_price_meters.tiers is
  'Of graduated and volume: [{"up_to","unit_minor","flat_minor"?}, …], counted from the first unit beyond the included ones. A tier''s price is '
  'for `overage_unit` units, its flat fee is owed once it is reached, and nothing owes none. `overage_price_minor` says what is shown as '
  'the price, and that it is sold.';

-- Subscriptions -------------------------------------------------------------------------------------------------------------------

alter table public.subscriptions
  add column base_billed_minor bigint,
  add column base_billed_from timestamptz,
  add column paused_at timestamptz,
  add column past_due_since timestamptz,
  -- The table is new or small: it is read in no time.
  -- squawk-ignore constraint-missing-not-valid
  add constraint subscriptions_base_whole check ((base_billed_minor is null) = (base_billed_from is null)),
  -- The table is new or small: it is read in no time.
  -- squawk-ignore constraint-missing-not-valid
  add constraint subscriptions_base_in_period check (base_billed_from >= current_period_start and base_billed_from < current_period_end),
  -- The table is new or small: it is read in no time.
  -- squawk-ignore constraint-missing-not-valid
  add constraint subscriptions_pause_has_time check ((status::text = 'paused') = (paused_at is not null));
-- Before the first release no installation is in use: the table is small.
-- squawk-ignore require-concurrent-index-creation
create index idx_subscriptions_past_due on public.subscriptions (past_due_since) where status = 'past_due';
comment on column public.subscriptions.base_billed_minor is
  'What the base price from base_billed_from to the period''s end comes to, where an invoice has it or it waits for one; null while the '
  'base price of the current period is still to be billed.';
comment on column public.subscriptions.paused_at is 'Since when it is paused: nothing is dialled, and a period that begins meanwhile is not billed.';
comment on column public.subscriptions.past_due_since is 'Since when invoices of it are overdue; null when none is.';

-- Invoices ------------------------------------------------------------------------------------------------------------------------

alter table public.invoices
  add column past_due_at timestamptz,
  -- A wider one takes its place in this transaction.
  -- squawk-ignore ban-drop-constraint
  drop constraint invoices_kind_known,
  -- The table is new or small: it is read in no time.
  -- squawk-ignore constraint-missing-not-valid
  add constraint invoices_kind_known check (kind in ('period', 'advance', 'change'));
comment on column public.invoices.kind is
  'period: what one billing period of a subscription cost, and in advance the next one''s base price. advance: the first base price of a '
  'subscription that is billed in advance. change: what changing the plan within a period costs. Each is billed once.';
comment on column public.invoices.past_due_at is 'Since when it is overdue, as the schedule found it and told.';

alter table public.invoice_lines
  add column first_day date,
  add column last_day date,
  -- A wider one takes its place in this transaction.
  -- squawk-ignore ban-drop-constraint
  drop constraint invoice_lines_kind_known,
  -- The table is new or small: it is read in no time.
  -- squawk-ignore constraint-missing-not-valid
  add constraint invoice_lines_kind_known check (kind in ('base', 'included', 'overage', 'fee', 'commitment', 'adjustment', 'credit', 'charge', 'item')),
  -- The table is new or small: it is read in no time.
  -- squawk-ignore constraint-missing-not-valid
  add constraint invoice_lines_days_ordered check (first_day <= last_day);
comment on column public.invoice_lines.kind is 'base: the plan; included: used within the allowance, amount 0; overage: used beyond it; fee: the flat fee of a tier; '
  'commitment: what is missing to the minimum; credit and charge: the rest of a period on the plan that was left, given back, and on the one '
  'that was taken; item: something of its own; adjustment: what a period that was billed '
  'before used more or less beyond its allowance, at its own price.';
comment on column public.invoice_lines.first_day is 'The first day that it is for, where that is not the invoice''s.';
comment on column public.invoice_lines.amount_minor is 'quantity × unit_price_minor / price_units, rounded once; of packages, by started ones; of a part of a period, its part; of an adjustment the difference of two such amounts, so that a period costs '
  'the same however late its usage comes.';

-- What waits for the next invoice -------------------------------------------------------------------------------------------------

create table private.invoice_items (
  id               uuid primary key default gen_random_uuid(),
  organization_id  uuid not null,
  subscription_id  uuid not null,
  kind             text not null,
  currency         text not null,
  description      text not null,
  quantity         bigint not null default 1,
  unit             text not null,
  unit_price_minor bigint not null,
  price_units      bigint not null default 1,
  amount_minor     bigint not null,
  first_day        date,
  last_day         date,
  idempotency_key  text,
  number           bigint generated always as identity,
  created_at       timestamptz not null,
  settled_at       timestamptz,
  constraint invoice_items_subscription_fkey foreign key (organization_id, subscription_id)
    references public.subscriptions (organization_id, id) on delete restrict,
  constraint invoice_items_key unique (organization_id, idempotency_key),
  constraint invoice_items_kind_known check (kind in ('base', 'credit', 'charge', 'item')),
  constraint invoice_items_currency_format check (currency ~ '^[A-Z]{3}$'),
  constraint invoice_items_description_present check (btrim(description) <> ''),
  constraint invoice_items_price_units_positive check (price_units > 0),
  constraint invoice_items_days_ordered check (first_day <= last_day),
  constraint invoice_items_sign_fits check (case kind when 'credit' then amount_minor <= 0 else amount_minor >= 0 end)
);

create index idx_invoice_items_open on private.invoice_items (organization_id, subscription_id) where settled_at is null;
create index idx_invoice_items_subscription on private.invoice_items (organization_id, subscription_id);
select private.close_table('private.invoice_items');

comment on table private.invoice_items is
  'What waits for the next invoice of a subscription and becomes a line of it, with the same id: the two sides of a plan that changed within '
  'its period, and what an operator adds once. What an invoice would have to give back more than it charges waits for the next one.';
comment on column private.invoice_items.number is 'Their order on the invoice.';
comment on column private.invoice_items.idempotency_key is 'Whoever adds the same again under this key adds nothing.';
comment on column private.invoice_items.settled_at is 'When an invoice took it; null while it waits.';

create table private.billing_requests (
  organization_id uuid not null references public.organizations (id) on delete cascade,
  key             text not null,
  request         jsonb not null,
  answer          jsonb not null,
  created_at      timestamptz not null,
  constraint billing_requests_pkey primary key (organization_id, key),
  constraint billing_requests_key_length check (length(key) between 1 and 255)
);
select private.close_table('private.billing_requests');

comment on table private.billing_requests is
  'What users asked of their subscription under an Idempotency-Key, and what they were answered: for thirty days the same again is '
  'answered the same and does nothing.';

-- When somebody does not pay ------------------------------------------------------------------------------------------------------

create table private.dunning_policy (
  singleton                boolean primary key default true,
  grace_days               integer not null default 0,
  retry_days               integer[] not null default '{1,3,7}',
  retry_time               time not null default '08:00',
  mandate_limits           jsonb not null default '{"INR": 1500000}',
  suspend_after_days       integer default 14,
  uncollectible_after_days integer,
  constraint dunning_policy_one_row check (singleton),
  constraint dunning_policy_grace_range check (grace_days between 0 and 90),
  constraint dunning_policy_retries_range check (
    cardinality(retry_days) <= 3 and 1 <= all (retry_days) and 90 >= all (retry_days) and array_position(retry_days, null) is null
  ),
  constraint dunning_policy_retry_time_off_peak check (
    retry_time < '10:00' or retry_time >= '13:00' and retry_time < '17:00' or retry_time >= '21:30'
  ),
  constraint dunning_policy_limits_object check (jsonb_typeof(mandate_limits) = 'object'),
  constraint dunning_policy_suspend_range check (suspend_after_days between 0 and 365),
  constraint dunning_policy_uncollectible_range check (uncollectible_after_days between 1 and 3650)
);
select private.close_table('private.dunning_policy');
insert into private.dunning_policy (singleton) values (true) on conflict do nothing;

comment on table private.dunning_policy is 'What happens to an invoice that is not paid, and when: one row, the operator''s to change.';
comment on column private.dunning_policy.grace_days is 'Days after the due date before an invoice counts as overdue.';
comment on column private.dunning_policy.retry_days is
  'On which days after that another payment is asked for: three at most, as a mandate allows, and a day''s notice before the first.';
comment on column private.dunning_policy.retry_time is
  'At which time of the issuer''s day; outside the hours in which UPI takes no automatic payments (10:00 to 13:00, 17:00 to 21:30).';
comment on column private.dunning_policy.mandate_limits is
  'By currency, up to which amount in the minor unit a mandate pays without its holder; above it, and without a mandate, a payment link is sent.';
comment on column private.dunning_policy.suspend_after_days is 'After how many overdue days the subscription is suspended; null is never.';
comment on column private.dunning_policy.uncollectible_after_days is 'After how many overdue days the invoice is given up; null is never.';

create table private.payment_retries (
  organization_id uuid not null,
  invoice_id      uuid not null,
  number          integer not null,
  due_at          timestamptz not null,
  told_at         timestamptz,
  constraint payment_retries_pkey primary key (organization_id, invoice_id, number),
  constraint payment_retries_invoice_fkey foreign key (organization_id, invoice_id)
    references public.invoices (organization_id, id) on delete restrict
);
create index idx_payment_retries_due on private.payment_retries (due_at) where told_at is null;
select private.close_table('private.payment_retries');

comment on table private.payment_retries is 'When an overdue invoice asks for another payment, and whether it did.';
comment on column private.payment_retries.told_at is 'When `invoice.payment_due` said so to whoever collects; also set once nothing is due any more.';

insert into private.personal_data (table_name, column_name, found_by, via, treatment, reason)
values
  ('private.invoice_items', '*', 'none', null, 'kept', 'A fiscal row: what a line of the organization''s own bill will say.'),
  ('private.dunning_policy', '*', 'none', null, 'kept', 'Reference data.'),
  ('private.billing_requests', '*', 'none', null, 'kept', 'What an organization asked of its own subscription, for thirty days.');

create or replace function private.guard_invoice() returns trigger
language plpgsql set search_path = ''
as $$
declare
  payment constant text[] := array[
    'status', 'amount_paid_minor', 'credited_minor', 'paid_at', 'past_due_at', 'irn', 'ack_no', 'signed_qr', 'metadata', 'updated_at'
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

-- Counting, billing and rating by them ----------------------------------------------------------------------------------------------

alter type private.priced_line add attribute first_day date, add attribute last_day date;
-- Only functions of this migration call it: another takes its place in this transaction.
-- squawk-ignore ban-drop-function
drop function private.bill_periods(uuid[], private.billing_issuer, timestamptz);
-- Only functions of this migration call it: another takes its place in this transaction.
-- squawk-ignore ban-drop-function
drop function private.price_periods(uuid[], private.billing_issuer, timestamptz);
create function private.read_tiers(tiers jsonb) returns private.price_tier[]
language plpgsql immutable set search_path = ''
as $$
begin
  return (
    select array_agg(
      (
        (tier.step ->> 'up_to')::numeric, (tier.step ->> 'unit_minor')::numeric, coalesce((tier.step ->> 'flat_minor')::bigint, 0)
      )::private.price_tier
      order by tier.number)
    from jsonb_array_elements(tiers) with ordinality as tier (step, number)
  );
end
$$;
comment on function private.read_tiers(jsonb) is 'The tiers of plan_price_meters as functions take them.';

create function private.rate_term(term public.plan_price_meters, quantity bigint)
returns table (number integer, kind text, units bigint, unit_price_minor bigint, price_units bigint, amount_minor bigint, tier integer)
language plpgsql immutable set search_path = ''
as $$
declare
  beyond bigint := quantity - nullif(term.included_units, -1);
  steps private.price_tier[];
  part record;
begin
  if coalesce(beyond, 0) <= 0 or term.overage_price_minor is null then
    return;
  end if;
  kind := 'overage';
  units := beyond;
  unit_price_minor := term.overage_price_minor;
  price_units := term.overage_unit;
  number := 1;
  if term.pricing_model = 'per_unit' then
    amount_minor := private.rate_units(beyond, term.overage_price_minor, term.overage_unit);
    return next;
    return;
  elsif term.pricing_model = 'package' then
    amount_minor := private.rate_package(beyond, 0, term.overage_unit, term.overage_price_minor);
    return next;
    return;
  end if;

  steps := private.read_tiers(term.tiers);
  for part in
    select reached.position, reached.tier_units
    from (
      select
        bounded.position, bounded.up_to, bounded.lower_bound,
        (least(coalesce(bounded.up_to, beyond), beyond) - bounded.lower_bound)::bigint as tier_units
      from (
        select given.position, given.up_to, lag(given.up_to, 1, 0::numeric) over (order by given.position) as lower_bound
        from unnest(steps) with ordinality as given (up_to, unit_price_minor, flat_minor, position)
      ) as bounded
    ) as reached
    where case term.pricing_model
      when 'volume' then reached.lower_bound < beyond and (reached.up_to is null or beyond <= reached.up_to)
      else reached.tier_units > 0
    end
    order by reached.position
  loop
    kind := 'overage';
    tier := part.position;
    units := case term.pricing_model when 'volume' then beyond else part.tier_units end;
    unit_price_minor := (steps[tier]).unit_price_minor;
    price_units := term.overage_unit;
    amount_minor := private.rate_units(units, unit_price_minor, price_units);
    return next;
    number := number + 1;
    if (steps[tier]).flat_minor > 0 then
      kind := 'fee';
      units := 1;
      unit_price_minor := (steps[tier]).flat_minor;
      price_units := 1;
      amount_minor := unit_price_minor;
      return next;
      number := number + 1;
    end if;
  end loop;
end
$$;
comment on function private.rate_term(public.plan_price_meters, bigint) is
  'What a period''s quantity of a meter costs beyond what its price includes, line by line, each rounded alone: one of per unit, packages '
  'and volume, one a tier of graduated prices, and the flat fees of tiers. Nothing where nothing is beyond, or where it is not sold.';

create function private.rate_term_total(term public.plan_price_meters, quantity bigint) returns bigint
language plpgsql immutable set search_path = ''
as $$
begin
  if term.plan_price_id is null or term.overage_price_minor is null then
    return 0;
  end if;
  return coalesce((select sum(line.amount_minor) from private.rate_term(term, quantity) as line), 0)::bigint;
end
$$;
comment on function private.rate_term_total(public.plan_price_meters, bigint) is 'The sum of rate_term''s lines.';

create function private.cycle_months(cycle public.billing_cycle) returns integer
language plpgsql immutable set search_path = ''
as $$
begin
  return case cycle when 'yearly' then 12 when 'quarterly' then 3 else 1 end;
end
$$;
revoke all on function private.cycle_months(public.billing_cycle) from public;
comment on function private.cycle_months(public.billing_cycle) is 'How many months a billing period has.';

create or replace function private.period_boundary(anchor_on date, cycle public.billing_cycle, period_no integer) returns date
language plpgsql immutable set search_path = ''
as $$
begin
  return (anchor_on + make_interval(months => period_no * private.cycle_months(cycle)))::date;
end
$$;
revoke all on function private.period_boundary(date, public.billing_cycle, integer) from public;
comment on function private.period_boundary(date, public.billing_cycle, integer) is
  'The first day of a period, always computed from the anchor: 31 January, 29 February, 31 March.';

create function private.price_charges(price_id uuid) returns boolean
language sql stable set search_path = ''
as $$
  select exists (
    select from public.plan_prices as price where price.id = $1 and (price.base_minor > 0 or price.minimum_minor > 0)
  ) or exists (
    select
    from public.plan_price_meters as term
    where term.plan_price_id = $1 and (term.overage_price_minor > 0 or term.tiers is not null)
  )
$$;
revoke all on function private.price_charges(uuid) from public;
comment on function private.price_charges(uuid) is 'Whether an invoice may come of a price.';

create or replace function private.subscribe_organization(
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
  select offer.id, offer.plan_id, offer.billing_cycle, offer.base_minor, offer.billed_in, plan.trial_days
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
    set status = subscribe_organization.status, next_plan_price_id = null, paused_at = null,
      trial_ends_at = case
        when subscribe_organization.status = 'trialing'
        then coalesce(subscription.trial_ends_at, at + make_interval(days => price.trial_days))
        else subscription.trial_ends_at
      end
    where subscription.id = live.id;
    return live.id;
  end if;

  if live.id is not null and private.price_charges(live.plan_price_id) then
    -- A period that costs something is billed as it was sold; the new price takes over when it has ended.
    if live.billing_cycle <> cycle then
      perform private.raise_error(409, 'billing_cycle_differs', 'The billing cycle changes with a new subscription only', 'cycle');
    end if;
    update public.subscriptions as subscription
    set next_plan_price_id = price.id, cancel_at_period_end = false
    where subscription.id = live.id;
    return live.id;
  end if;

  -- Never into days that are billed already, or that the last subscription still bills.
  select greatest(
    (at at time zone organization.timezone)::date,
    (
      select max(log.period_end)
      from public.usage_logs as log
      where log.organization_id = subscribe_organization.organization_id and log.closed_at is not null
    ),
    (
      select max((ended.current_period_end at time zone ended.timezone)::date)
      from public.subscriptions as ended
      where ended.organization_id = subscribe_organization.organization_id
        and ended.status = 'cancelled' and ended.next_invoice_at is not null
    )
  )
  into today;
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
    set status = 'cancelled', cancelled_at = at, next_invoice_at = null, paused_at = null
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
    trial_end,
    -- What is billed in advance is billed when it begins; a trial has no base price.
    private.local_midnight(
      case when price.billed_in = 'advance' and price.base_minor > 0 and starts = anchor then starts else ends end, organization.timezone)
  )
  returning id into subscription_id;
  perform private.grant_monthly_credit(array[subscription_id], at);
  return subscription_id;
end
$$;
revoke all on function
  private.subscribe_organization(uuid, text, public.subscription_status, timestamptz, public.billing_cycle)
from public;
comment on function private.subscribe_organization(uuid, text, public.subscription_status, timestamptz, public.billing_cycle) is
  'Puts an organization on the newest price of a plan: at once from nothing or from a plan that charges nothing, otherwise when the '
  'current period has been billed. Periods start at the local midnight of that day.';

create or replace function private.get_org_subscription() returns jsonb
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
      'paused_at', subscription.paused_at, 'past_due_since', subscription.past_due_since,
      'next_plan', (
        select following.slug
        from public.plan_prices as taking_over
        join public.subscription_plans as following on following.id = taking_over.plan_id
        where taking_over.id = subscription.next_plan_price_id
      ),
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

create function private.cycle_unit(cycle public.billing_cycle) returns text
language plpgsql immutable set search_path = ''
as $$
begin
  return case cycle when 'yearly' then 'year' when 'quarterly' then 'quarter' else 'month' end;
end
$$;
comment on function private.cycle_unit(public.billing_cycle) is 'What a billing period is called on an invoice.';

create function private.describe_part(days integer, period_from timestamptz, period_to timestamptz, timezone text) returns text
language sql stable set search_path = ''
as $$
  select days || ' of ' || (period_to at time zone timezone)::date - (period_from at time zone timezone)::date || ' days'
$$;
comment on function private.describe_part(integer, timestamptz, timestamptz, text) is 'How much of a billing period is billed, as a line says it.';

create function private.following_period(
  subscription public.subscriptions, cycle public.billing_cycle, out anchor_on date, out period_no integer, out period_end date
)
language plpgsql immutable set search_path = ''
as $$
begin
  if cycle = subscription.billing_cycle then
    anchor_on := subscription.anchor_on;
    period_no := subscription.period_no + 1;
  else
    anchor_on := (subscription.current_period_end at time zone subscription.timezone)::date;
    period_no := 0;
  end if;
  period_end := private.period_boundary(anchor_on, cycle, period_no + 1);
end
$$;
comment on function private.following_period(public.subscriptions, public.billing_cycle) is
  'The period after the current one: the next from the anchor, or, where the cycle changes, the first from a new one.';

create function private.price_periods(
  subscription_ids uuid[], issuer private.billing_issuer, at timestamptz, items_only boolean default false
)
returns table (
  organization_id uuid, subscription_id uuid, kind text, currency text, period_start timestamptz, period_end timestamptz, timezone text,
  first_day date, last_day date, subtotal_minor bigint, tax_minor bigint, issuer_particulars jsonb, customer jsonb,
  lines private.priced_line[], taxes private.priced_tax[], adjustments private.priced_adjustment[]
)
language plpgsql stable set search_path = ''
as $$
#variable_conflict use_column
declare
  supplier private.gst_states;
begin
  if issuer.country_code = 'IN' then
    select state.* into supplier
    from private.gst_states as state
    where state.code = coalesce(left(issuer.gstin, 2), issuer.state_code) or issuer.gstin is null and state.letters = issuer.state_code;
  end if;

  return query
  with ended as materialized (
    select
      gen_random_uuid() as invoice_id,
      subscription.*,
      plan.name as plan_name,
      price.currency,
      price.base_minor,
      price.minimum_minor,
      case
        when items_only then 'change'
        when subscription.next_invoice_at < subscription.current_period_end then 'advance'
        else 'period'
      end as mode,
      whole.period_from, whole.period_to,
      -- What the base price comes to in the period as it is: cut short, or begun late.
      case
        when subscription.period_no < 0 then 0
        when (subscription.current_period_start, subscription.current_period_end) = (whole.period_from, whole.period_to) then price.base_minor
        else private.prorate(
          price.base_minor, extract(epoch from subscription.current_period_end - subscription.current_period_start),
          extract(epoch from whole.period_to - whole.period_from)
        )
      end as base_amount,
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
        'country_code', organization.country_code,
        'place_of_supply', place.code || '-' || place.name
      )) as customer,
      organization.country_code,
      -- A state may be written in two ways, so India's are compared by the code that both have.
      case
        when organization.country_code = issuer.country_code
          and coalesce(place.code = supplier.code, organization.state_code = issuer.state_code) then 'intra_state'
        else 'inter_state'
      end as tax_scope
    from public.subscriptions as subscription
    join public.subscription_plans as plan on plan.id = subscription.plan_id
    join public.plan_prices as price on price.id = subscription.plan_price_id
    cross join lateral (
      select
        private.local_midnight(
          private.period_boundary(subscription.anchor_on, subscription.billing_cycle, subscription.period_no), subscription.timezone
        ) as period_from,
        private.local_midnight(
          private.period_boundary(subscription.anchor_on, subscription.billing_cycle, subscription.period_no + 1), subscription.timezone
        ) as period_to
    ) as whole
    join public.organizations as organization on organization.id = subscription.organization_id
    left join private.gst_states as place
      on organization.country_code = 'IN'
      and (
        place.code = coalesce(left(organization.gstin, 2), organization.state_code)
        or organization.gstin is null and place.letters = organization.state_code
      )
    where subscription.id = any (subscription_ids)
  ),
  used as materialized (
    -- From the days, which are the evidence, and not from the counter that quotas were judged by.
    select
      ended.invoice_id, term, term.meter_key, term.pricing_model, term.overage_price_minor, term.overage_unit, meter.name, meter.unit,
      meter.position,
      nullif(term.included_units, -1) as allowance,
      -- What prepaid credit paid is settled: it is neither included nor billed again.
      private.billable_units(
        case
          when meter.aggregation in ('sum', 'count') then coalesce((
            select sum(total.quantity - total.prepaid)
            from public.usage_days as total
            where total.organization_id = ended.organization_id
              and total.meter_key = term.meter_key
              and total.day >= ended.first_day and total.day < ended.next_day
          ), 0)::bigint
          else private.period_usage(ended.organization_id, term.meter_key, ended.first_day, ended.next_day)
        end,
        meter
      ) as quantity
    from ended
    join public.plan_price_meters as term on term.plan_price_id = ended.plan_price_id
    join public.meters as meter on meter.key = term.meter_key
    where ended.mode = 'period'
  ),
  beyond as materialized (
    select
      used.invoice_id, used.position, used.meter_key, 1 as number, 'overage' as kind, used.quantity - used.allowance as units,
      used.overage_price_minor as unit_price_minor, used.overage_unit as price_units,
      private.rate_units(used.quantity - used.allowance, used.overage_price_minor, used.overage_unit) as amount_minor, used.unit,
      used.name || ' beyond the plan: ' || private.describe_quantity(used.quantity - used.allowance, used.unit) as description
    from used
    where used.quantity > used.allowance and used.overage_price_minor is not null and used.pricing_model = 'per_unit'
    union all
    select
      used.invoice_id, used.position, used.meter_key, rated.number, rated.kind, rated.units, rated.unit_price_minor, rated.price_units,
      rated.amount_minor, case rated.kind when 'fee' then 'fee' else used.unit end,
      case
        when rated.kind = 'fee' then used.name || ', fee of tier ' || rated.tier
        else used.name || ' beyond the plan' || coalesce(', tier ' || rated.tier, '') || ': ' || private.describe_quantity(rated.units, used.unit)
      end
        || case used.pricing_model
          when 'package' then ' in ' || private.started_units(rated.units, rated.price_units) || ' × ' || rated.price_units
          else ''
        end
    from used
    cross join lateral private.rate_term(used.term, used.quantity) as rated
    where used.pricing_model <> 'per_unit'
  ),
  late as materialized (
    -- Periods that were billed before and have changed since, each at its own price.
    select
      ended.invoice_id, log.organization_id, log.feature_key, log.period_start, gen_random_uuid() as line_id, meter.name, meter.unit, meter.position,
      term.overage_price_minor, term.overage_unit,
      greatest(private.billable_units(log.usage_count - log.prepaid, meter) - nullif(term.included_units, -1), 0)
        - greatest(private.billable_units(log.billed_count, meter) - nullif(term.included_units, -1), 0) as quantity,
      private.rate_term_total(term, private.billable_units(log.usage_count - log.prepaid, meter))
        - private.rate_term_total(term, private.billable_units(log.billed_count, meter)) as amount_minor,
      log.period_end
    from ended
    join lateral (
      select distinct adjustment.organization_id, adjustment.meter_key, adjustment.period_start
      from private.usage_adjustments as adjustment
      where adjustment.organization_id = ended.organization_id and adjustment.settled_at is null
    ) as adjustment on true
    join public.usage_logs as log
      on log.organization_id = adjustment.organization_id
      and log.feature_key = adjustment.meter_key
      and log.period_start = adjustment.period_start
    join public.plan_prices as price on price.id = log.plan_price_id and price.currency = ended.currency
    join public.meters as meter on meter.key = log.feature_key
    left join public.plan_price_meters as term on term.plan_price_id = log.plan_price_id and term.meter_key = log.feature_key
    where ended.mode = 'period'
  ),
  waiting as materialized (
    select ended.invoice_id, item.*
    from ended
    join private.invoice_items as item
      on item.organization_id = ended.organization_id
      and item.subscription_id = ended.id
      and item.currency = ended.currency
      and item.settled_at is null
  ),
  current_item as materialized (
    select
      ended.invoice_id, null::uuid as line_id, 0 as rank, 0 as meter_position, 1::bigint as place, 'base' as kind, null::text as meter_key,
      ended.plan_name || ' plan, ' || ended.billing_cycle || case
        when ended.period_no < 0 then ' (trial)'
        when (ended.current_period_start, ended.current_period_end) <> (ended.period_from, ended.period_to) then ', ' || private.describe_part(
          ended.next_day - ended.first_day, ended.period_from, ended.period_to, ended.timezone)
        else ''
      end as description,
      1::bigint as quantity, private.cycle_unit(ended.billing_cycle) as unit,
      case when ended.period_no < 0 then 0 else ended.base_minor end as unit_price_minor, 1::bigint as price_units,
      ended.base_amount as amount_minor, null::date as first_day, null::date as last_day
    from ended
    where ended.mode <> 'change' and ended.base_billed_from is null
    union all
    -- The next period's base price, where it is billed in advance and there will be one.
    select
      ended.invoice_id, null, 7, 0, 1, 'base', null, taking_over.name || ' plan, ' || next_price.billing_cycle || ', in advance', 1,
      private.cycle_unit(next_price.billing_cycle), next_price.base_minor, 1, next_price.base_minor, ended.next_day, following.period_end - 1
    from ended
    join public.subscriptions as own on own.id = ended.id
    join public.plan_prices as next_price on next_price.id = coalesce(ended.next_plan_price_id, ended.plan_price_id)
    join public.subscription_plans as taking_over on taking_over.id = next_price.plan_id
    cross join lateral private.following_period(own, next_price.billing_cycle) as following
    where ended.mode = 'period' and not ended.cancel_at_period_end and ended.status <> 'paused'
      and next_price.billed_in = 'advance' and next_price.base_minor > 0 and next_price.currency = ended.currency
    union all
    select
      used.invoice_id, null, 1, used.position, 1, 'included', used.meter_key,
      used.name || ' included: ' || private.describe_quantity(least(used.quantity, used.allowance), used.unit)
        || case when used.allowance is null then ', unlimited' else ' of ' || private.describe_quantity(used.allowance, used.unit) end,
      least(used.quantity, used.allowance), used.unit, 0, 1, 0, null, null
    from used
    where used.allowance is null or used.allowance > 0
    union all
    select
      beyond.invoice_id, null, 2, beyond.position, beyond.number, beyond.kind, beyond.meter_key, beyond.description, beyond.units, beyond.unit,
      beyond.unit_price_minor, beyond.price_units, beyond.amount_minor, null, null
    from beyond
    union all
    -- What is missing to the minimum, of the time in which its price held.
    select
      committed.invoice_id, null, 4, 0, 1, 'commitment', null, 'Minimum commitment, the difference to it', 1, 'commitment', committed.missing, 1,
      committed.missing, null, null
    from (
      select
        ended.invoice_id,
        private.prorate(
          ended.minimum_minor, extract(epoch from ended.current_period_end - coalesce(ended.base_billed_from, ended.current_period_start)),
          extract(epoch from ended.period_to - ended.period_from)
        ) - coalesce(ended.base_billed_minor, ended.base_amount)
          - coalesce((select sum(beyond.amount_minor) from beyond where beyond.invoice_id = ended.invoice_id), 0)::bigint as missing
      from ended
      where ended.mode = 'period' and ended.minimum_minor is not null and ended.period_no >= 0
    ) as committed
    where committed.missing > 0
  ),
  outcome as materialized (
    select whole.invoice_id, sum(whole.amount_minor) as amount_minor
    from (
      select current_item.invoice_id, current_item.amount_minor from current_item
      union all
      select late.invoice_id, late.amount_minor from late
      union all
      select waiting.invoice_id, waiting.amount_minor from waiting
    ) as whole
    group by whole.invoice_id
  ),
  adjustable as materialized (
    -- What an invoice would have to give back more than it charges waits for the next one.
    select late.*
    from late
    join outcome using (invoice_id)
    where outcome.amount_minor > 0 or late.amount_minor = 0
  ),
  item as materialized (
    select current_item.* from current_item
    union all
    select
      adjustable.invoice_id, adjustable.line_id, 5, adjustable.position, 1, 'adjustment', adjustable.feature_key,
      adjustable.name || ' beyond the plan, ' || adjustable.period_start || ' to ' || adjustable.period_end - 1 || ', told later: '
        || case when adjustable.quantity < 0 then '-' else '' end || private.describe_quantity(abs(adjustable.quantity), adjustable.unit),
      adjustable.quantity, adjustable.unit, adjustable.overage_price_minor, adjustable.overage_unit, adjustable.amount_minor, null, null
    from adjustable
    where adjustable.amount_minor <> 0
    union all
    select
      waiting.invoice_id, waiting.id, case waiting.kind when 'item' then 6 else 0 end, 0, 1 + waiting.number, waiting.kind, null,
      waiting.description, waiting.quantity, waiting.unit, waiting.unit_price_minor, waiting.price_units, waiting.amount_minor,
      waiting.first_day, waiting.last_day
    from waiting
    join outcome using (invoice_id)
    where outcome.amount_minor > 0
  ),
  subtotal as materialized (
    select item.invoice_id, sum(item.amount_minor)::bigint as amount_minor
    from item
    group by item.invoice_id
  ),
  tax as materialized (
    select
      ended.invoice_id, rate.name, rate.rate_bp, rate.position, subtotal.amount_minor as taxable_minor,
      private.tax_amount(subtotal.amount_minor, rate.rate_bp) as amount_minor
    from ended
    join subtotal using (invoice_id)
    join public.tax_rates as rate
      on rate.country_code = ended.country_code
      and rate.scope in ('any', ended.tax_scope)
      and rate.valid_from <= (at at time zone issuer.timezone)::date
      and (rate.valid_to is null or rate.valid_to > (at at time zone issuer.timezone)::date)
  ),
  row_line as (
    select
      item.invoice_id,
      array_agg(
        (
          item.number, item.kind, item.meter_key, item.description, item.quantity, item.unit, item.unit_price_minor, item.price_units,
          item.amount_minor, item.line_id, item.first_day, item.last_day
        )::private.priced_line
        order by item.number) as lines
    from (
      select
        item.*,
        (row_number() over (partition by item.invoice_id order by item.rank, item.meter_position, item.meter_key, item.place, item.description))::integer as number
      from item
    ) as item
    group by item.invoice_id
  ),
  row_tax as (
    select
      tax.invoice_id, sum(tax.amount_minor)::bigint as amount_minor,
      array_agg((tax.number, tax.name, tax.rate_bp, tax.taxable_minor, tax.amount_minor)::private.priced_tax order by tax.number) as taxes
    from (
      select tax.*, (row_number() over (partition by tax.invoice_id order by tax.position, tax.name))::integer as number
      from tax
    ) as tax
    group by tax.invoice_id
  )
  select
    ended.organization_id, ended.id, ended.mode, ended.currency,
    case ended.mode
      when 'change' then greatest(at, (
        select max(changed.period_start) + interval '1 microsecond'
        from public.invoices as changed
        where changed.organization_id = ended.organization_id and changed.subscription_id = ended.id and changed.kind = 'change'
      ))
      else ended.current_period_start
    end,
    ended.current_period_end, ended.timezone,
    case ended.mode when 'change' then (at at time zone ended.timezone)::date else ended.first_day end, ended.next_day - 1, coalesce(subtotal.amount_minor, 0), coalesce(row_tax.amount_minor, 0),
    jsonb_strip_nulls(
      to_jsonb(issuer) - 'singleton' || jsonb_build_object('place_of_supply', supplier.code || '-' || supplier.name)
    ),
    ended.customer, coalesce(row_line.lines, '{}'), coalesce(row_tax.taxes, '{}'),
    array(
      select
        (adjustable.feature_key, adjustable.period_start, case when adjustable.amount_minor <> 0 then adjustable.line_id end)::private.priced_adjustment
      from adjustable
      where adjustable.invoice_id = ended.invoice_id
    )
  from ended
  left join subtotal using (invoice_id)
  left join row_line using (invoice_id)
  left join row_tax using (invoice_id);
end
$$;
comment on function private.price_periods(uuid[], private.billing_issuer, timestamptz, boolean) is
  'What the next invoice of each subscription says: the one place where an invoice is priced, for the run and for who asks beforehand. The '
  'current period''s base price, where it is not billed yet, what was used, the minimum, what came late to earlier periods, what waits, and '
  'the next period''s base price where it is billed in advance. The first base price in advance comes alone, and so does, if that is asked '
  'for, what waits. A trial period has no base price.';

create function private.bill_periods(
  subscription_ids uuid[], issuer private.billing_issuer, at timestamptz, items_only boolean default false
) returns uuid[]
language plpgsql set search_path = ''
as $$
declare
  drafts uuid[];
begin
  with period as materialized (
    select gen_random_uuid() as id, priced.* from private.price_periods(subscription_ids, issuer, at, items_only) as priced
  ),
  priced as materialized (
    -- A period that costs nothing makes no invoice: a number and a document for zero would only be noise.
    select period.* from period where period.subtotal_minor > 0
  ),
  draft as (
    insert into public.invoices (
      id, organization_id, subscription_id, kind, currency, period_start, period_end, timezone, first_day, last_day, subtotal_minor,
      tax_minor, total_minor, issuer, customer, created_at, updated_at
    )
    select
      priced.id, priced.organization_id, priced.subscription_id, priced.kind, priced.currency, priced.period_start, priced.period_end,
      priced.timezone, priced.first_day, priced.last_day, priced.subtotal_minor, priced.tax_minor,
      priced.subtotal_minor + priced.tax_minor, priced.issuer_particulars, priced.customer, at, at
    from priced
    returning invoices.id
  ),
  line as (
    insert into public.invoice_lines (
      id, organization_id, invoice_id, position, kind, meter_key, description, quantity, unit, unit_price_minor, price_units, amount_minor,
      first_day, last_day
    )
    select
      coalesce(item.line_id, gen_random_uuid()), priced.organization_id, priced.id, item.position, item.kind, item.meter_key,
      item.description, item.quantity, item.unit, item.unit_price_minor, item.price_units, item.amount_minor, item.first_day, item.last_day
    from priced
    cross join lateral unnest(priced.lines) as item
  ),
  taken as (
    update private.invoice_items as waiting
    set settled_at = at
    from priced
    cross join lateral unnest(priced.lines) as item
    where waiting.organization_id = priced.organization_id and waiting.id = item.line_id and waiting.settled_at is null
  ),
  levied as (
    insert into public.invoice_taxes (organization_id, invoice_id, position, name, rate_bp, taxable_minor, amount_minor)
    select priced.organization_id, priced.id, tax.position, tax.name, tax.rate_bp, tax.taxable_minor, tax.amount_minor
    from priced
    cross join lateral unnest(priced.taxes) as tax
  ),
  settled as (
    update private.usage_adjustments as adjustment
    set settled_at = at, invoice_line_id = change.line_id
    from period
    cross join lateral unnest(period.adjustments) as change
    where adjustment.organization_id = period.organization_id
      and adjustment.meter_key = change.meter_key
      and adjustment.period_start = change.period_start
      and adjustment.settled_at is null
      and (change.line_id is null or period.subtotal_minor > 0)
    returning adjustment.organization_id, adjustment.meter_key, adjustment.period_start
  ),
  rebilled as (
    update public.usage_logs as log
    set billed_count = log.usage_count - log.prepaid
    from (select distinct settled.* from settled) as past
    where log.organization_id = past.organization_id
      and log.feature_key = past.meter_key
      and log.period_start = past.period_start
  )
  select array_agg(draft.id) into drafts from draft;
  return coalesce(drafts, '{}');
end
$$;
comment on function private.bill_periods(uuid[], private.billing_issuer, timestamptz, boolean) is
  'Drafts the next invoice of each subscription, as price_periods has it; none for a period that costs nothing. What came late to periods that '
  'were billed before is adjusted.';

create function private.open_invoices(drafts uuid[], issuer private.billing_issuer, at timestamptz) returns jsonb
language plpgsql set search_path = ''
as $$
declare
  month text;
  invoices jsonb;
begin
  month := private.series_month(at, issuer.timezone);
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
  return coalesce(invoices, '[]');
end
$$;
comment on function private.open_invoices(uuid[], private.billing_issuer, timestamptz) is
  'Drafts become invoices, with consecutive numbers of the issuer''s month, and are told of. The series is locked from here to the end of '
  'the transaction: to be called last.';

create or replace function private.close_periods(request jsonb, at timestamptz) returns jsonb
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
  opening uuid[];
  alone uuid := private.read_uuid(request, 'subscription_id');
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

  if alone is null then
    perform private.dun_invoices(issuer, batch, at);
  end if;

  claimed := array(
    select subscription.id
    from public.subscriptions as subscription
    where subscription.next_invoice_at <= at and subscription.billing_hold is null
      and (alone is null or subscription.id = alone)
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

    -- What is billed in advance is billed once when it begins; from then on with the period before it.
    opening := array(
      select subscription.id
      from public.subscriptions as subscription
      where subscription.id = any (due) and subscription.next_invoice_at < subscription.current_period_end
    );
    if cardinality(opening) > 0 then
      drafts := drafts || private.bill_periods(opening, issuer, at);
      update public.subscriptions as subscription
      set
        next_invoice_at = subscription.current_period_end,
        base_billed_from = coalesce(subscription.base_billed_from, subscription.current_period_start),
        base_billed_minor = coalesce(subscription.base_billed_minor, private.period_base(subscription))
      where subscription.id = any (opening);
      due := array(select ended.id from unnest(due) as ended (id) where ended.id <> all (opening));
    end if;

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
      and (
        log.period_start = (subscription.current_period_start at time zone subscription.timezone)::date
        or log.plan_price_id is not null and exists (
          select
          from private.usage_adjustments as adjustment
          where adjustment.organization_id = log.organization_id
            and adjustment.meter_key = log.feature_key
            and adjustment.period_start = log.period_start
            and adjustment.settled_at is null
        )
      )
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
      join public.meters as meter on meter.key = log.feature_key
      where subscription.id = any (due)
        and case
          when meter.aggregation in ('sum', 'count') then (log.usage_count, log.prepaid) <> (
            select coalesce(sum(total.quantity), 0), coalesce(sum(total.prepaid), 0)
            from public.usage_days as total
            where total.organization_id = log.organization_id
              and total.meter_key = log.feature_key
              and total.day >= log.period_start and total.day < log.period_end
          )
          else log.usage_count <> private.period_usage(log.organization_id, log.feature_key, log.period_start, log.period_end)
        end
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
    set closed_at = at, plan_price_id = subscription.plan_price_id, billed_count = log.usage_count - log.prepaid
    from public.subscriptions as subscription
    where subscription.id = any (due)
      and log.organization_id = subscription.organization_id
      and log.period_start = (subscription.current_period_start at time zone subscription.timezone)::date;

    with following as (
      select
        subscription.id, price.id as plan_price_id, price.plan_id, price.billing_cycle, next_period.anchor_on, next_period.period_no,
        private.local_midnight(next_period.period_end, subscription.timezone) as period_end,
        case
          -- The invoice that was just made has it, unless it is in another currency: then it comes alone.
          when price.billed_in <> 'advance' or price.base_minor = 0 or subscription.status = 'paused' then 'later'
          when price.currency = old.currency then 'billed'
          else 'now'
        end as base,
        price.base_minor
      from public.subscriptions as subscription
      join public.plan_prices as old on old.id = subscription.plan_price_id
      join public.plan_prices as price on price.id = coalesce(subscription.next_plan_price_id, subscription.plan_price_id)
      cross join lateral private.following_period(subscription, price.billing_cycle) as next_period
      where subscription.id = any (due)
    )
    update public.subscriptions as subscription
    set
      plan_price_id = following.plan_price_id,
      plan_id = following.plan_id,
      next_plan_price_id = null,
      billing_cycle = following.billing_cycle,
      anchor_on = following.anchor_on,
      period_no = following.period_no,
      current_period_start = subscription.current_period_end,
      current_period_end = following.period_end,
      base_billed_from = case following.base when 'billed' then subscription.current_period_end end,
      base_billed_minor = case following.base when 'billed' then following.base_minor end,
      -- A paused one waits for whoever resumes it.
      next_invoice_at = case
        when subscription.status = 'paused' then null
        when following.base = 'now' then subscription.current_period_end
        else following.period_end
      end
    from following
    where subscription.id = following.id and not subscription.cancel_at_period_end;

    -- What was cancelled stops in its last period.
    update public.subscriptions as subscription
    set
      status = 'cancelled', cancelled_at = coalesce(subscription.cancelled_at, subscription.current_period_end), next_invoice_at = null,
      paused_at = null
    where subscription.id = any (due) and subscription.cancel_at_period_end;
    closed := closed + cardinality(due);
  end loop;

  perform private.grant_monthly_credit(claimed, at);

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
    invoices := private.open_invoices(drafts, issuer, at);
  end if;

  return jsonb_build_object(
    'closed', closed, 'invoices', invoices, 'more', cardinality(claimed) = batch or cardinality(due) > 0
  );
end
$$;
comment on function private.close_periods(jsonb, timestamptz) is
  'Ends trials that are over, bills every ended period of the subscriptions it claims, once, and moves them to the period that `at` '
  'is in. Several may run at once.';

create function private.record_einvoice(number text, irn text, ack_no text, signed_qr text) returns uuid
language plpgsql security definer set search_path = ''
as $$
declare
  known uuid;
begin
  if irn !~ '^[0-9a-f]{64}$' or length(signed_qr) > 2900 or signed_qr !~ '^[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+$'
    or ack_no !~ '^[0-9]{1,20}$' or irn is null or ack_no is null or signed_qr is null then
    perform private.raise_error(400, 'invalid_request', 'irn is a hash of 64 digits, ack_no a number, signed_qr what the portal signed', 'irn');
  end if;
  -- What the portal has said of a document does not change.
  update public.invoices as invoice
  set irn = record_einvoice.irn, ack_no = record_einvoice.ack_no, signed_qr = record_einvoice.signed_qr
  where invoice.invoice_number = record_einvoice.number
    and coalesce(invoice.irn, record_einvoice.irn) = record_einvoice.irn
    and coalesce(invoice.signed_qr, record_einvoice.signed_qr) = record_einvoice.signed_qr
  returning invoice.id into known;
  if not found then
    update public.credit_notes as note
    set irn = record_einvoice.irn, ack_no = record_einvoice.ack_no, signed_qr = record_einvoice.signed_qr
    where note.credit_note_number = record_einvoice.number
      and coalesce(note.irn, record_einvoice.irn) = record_einvoice.irn
      and coalesce(note.signed_qr, record_einvoice.signed_qr) = record_einvoice.signed_qr
    returning note.id into known;
  end if;
  if known is null then
    perform private.raise_error(404, 'invoice_not_found', 'There is no such document, or the portal said something else of it before', 'number');
  end if;
  return known;
end
$$;
comment on function private.record_einvoice(text, text, text, text) is
  'For the operator: what India''s portal answered for an invoice or a credit note, by its number. Printed on it from then on.';

create function private.preview_document(organization_id uuid, at timestamptz) returns jsonb
language plpgsql stable set search_path = ''
as $$
declare
  subscription public.subscriptions := private.live_subscription(organization_id);
  issuer private.billing_issuer;
  bill record;
  dated date;
begin
  if subscription.id is null then
    perform private.raise_error(402, 'subscription_inactive', 'There is no live subscription, so nothing will be billed');
  end if;
  select own.* into issuer from private.billing_issuer as own;
  if not found then
    perform private.raise_error(409, 'billing_issuer_missing', 'Nothing is billed before private.billing_issuer says who bills');
  end if;
  select priced.* into bill from private.price_periods(array[subscription.id], issuer, at) as priced;
  dated := (greatest(at, case bill.kind when 'period' then bill.period_end end) at time zone issuer.timezone)::date;
  return jsonb_build_object(
    'document', 'preview',
    'logo', private.billing_logo(issuer.logo_id),
    'organization_id', bill.organization_id,
    'subscription_id', bill.subscription_id,
    'kind', bill.kind,
    'currency', bill.currency,
    'period_start', bill.period_start,
    'period_end', bill.period_end,
    'timezone', bill.timezone,
    'first_day', bill.first_day,
    'last_day', bill.last_day,
    'subtotal_minor', bill.subtotal_minor,
    'tax_minor', bill.tax_minor,
    'total_minor', bill.subtotal_minor + bill.tax_minor,
    'invoice_date', dated,
    'due_date', dated + issuer.payment_terms_days,
    'as_of', at,
    -- What costs nothing makes no invoice.
    'is_billed', bill.subtotal_minor > 0,
    'issuer', bill.issuer_particulars,
    'customer', bill.customer,
    'lines', (select coalesce(jsonb_agg(to_jsonb(item) - 'line_id' order by item.position), '[]') from unnest(bill.lines) as item),
    'taxes', to_jsonb(bill.taxes)
  );
end
$$;
comment on function private.preview_document(uuid, timestamptz) is
  'The next invoice of an organization''s subscription, as the run would make it if its period ended now: priced by the same function.';

create or replace function private.preview_invoice(at timestamptz) returns jsonb
language plpgsql stable security definer set search_path = ''
as $$
begin
  return private.preview_document(private.require_org('billing.view'), at);
end
$$;
comment on function private.preview_invoice(timestamptz) is 'preview_document for the caller''s organization. Writes nothing. Needs billing.view.';

create or replace function private.export_line_calls(invoice_id uuid, line integer) returns jsonb
language plpgsql stable security definer set search_path = ''
as $$
declare
  organization uuid := private.require_org('billing.view');
  bill public.invoices;
  billed public.invoice_lines;
  skipped bigint;
begin
  select own.* into bill
  from public.invoices as own
  where own.organization_id = organization and own.id = invoice_id and own.status <> 'draft';
  select own.* into billed
  from public.invoice_lines as own
  where own.organization_id = organization and own.invoice_id = bill.id and own.position = line and own.meter_key is not null
    and own.kind <> 'fee';
  if billed.id is null then
    perform private.raise_error(404, 'not_found', 'There is no such invoice, or the line is not of something that was counted', 'id');
  end if;
  -- In the order in which they were counted, calls fill the meter's lines one after the other.
  select coalesce(sum(earlier.quantity), 0)::bigint into skipped
  from public.invoice_lines as earlier
  where earlier.organization_id = organization
    and earlier.invoice_id = bill.id
    and earlier.meter_key = billed.meter_key
    and earlier.kind <> 'fee'
    and earlier.position < billed.position;
  return jsonb_build_object(
    'columns', jsonb_build_array('ended_at', 'source', 'call', 'direction', 'number', 'counted', 'quantity', 'unit', 'currency', 'amount'),
    'rows', coalesce((
      select jsonb_agg(
        jsonb_build_array(
          item.occurred_at, item.source, item.key, item.direction,
          -- Who may see calls sees whom they were with; a bill shows the end of the number.
          case when item.number is not null then '…' || right(item.number, 4) end,
          item.quantity, item.share, billed.unit, bill.currency,
          private.decimal_amount(
            private.divide_half_away(item.until::numeric * billed.amount_minor, billed.quantity)
              - private.divide_half_away((item.until - item.share)::numeric * billed.amount_minor, billed.quantity), bill.currency)::text
        )
        order by item.occurred_at, item.id)
      from (
        select
          part.*, sum(part.share) over (order by part.occurred_at, part.id) as until
        from (
          select
            counted.*,
            least(counted.running, skipped + billed.quantity) - greatest(counted.running - counted.quantity, skipped) as share
          from (
            select
              event.id, event.occurred_at, event.source, event.key, event.quantity, attempt.direction,
              case attempt.direction when 'inbound' then attempt.caller_number else attempt.callee_number end as number,
              (sum(event.quantity) over (order by event.occurred_at, event.id))::bigint as running
            from private.usage_events as event
            left join public.call_logs as attempt
              on attempt.organization_id = event.organization_id and attempt.id = case event.source when 'call' then event.key::uuid end
            where event.organization_id = organization
              and event.meter_key = billed.meter_key
              and event.day between bill.first_day and bill.last_day
              and event.occurred_at < bill.period_end
          ) as counted
        ) as part
        where part.share > 0
        order by part.occurred_at, part.id
        limit 10001
      ) as item
    ), '[]')
  );
end
$$;
comment on function private.export_line_calls(uuid, integer) is
  'The counted events that a line of an invoice charges for, each with its part of the quantity and of the amount: both add up to the '
  'line''s, also where an event is partly within the plan. Needs billing.view.';

revoke all on function
  private.read_tiers(jsonb), private.rate_term(public.plan_price_meters, bigint), private.rate_term_total(public.plan_price_meters, bigint),
  private.cycle_unit(public.billing_cycle), private.describe_part(integer, timestamptz, timestamptz, text),
  private.following_period(public.subscriptions, public.billing_cycle),
  private.price_periods(uuid[], private.billing_issuer, timestamptz, boolean),
  private.bill_periods(uuid[], private.billing_issuer, timestamptz, boolean),
  private.open_invoices(uuid[], private.billing_issuer, timestamptz), private.preview_document(uuid, timestamptz),
  private.record_einvoice(text, text, text, text)
from public, anon, authenticated, service_role;

-- What a price is -----------------------------------------------------------------------------------------------------------------

create function private.period_base(subscription public.subscriptions) returns bigint
language plpgsql stable set search_path = ''
as $$
declare
  base bigint := (select price.base_minor from public.plan_prices as price where price.id = subscription.plan_price_id);
  period_from timestamptz := private.local_midnight(
    private.period_boundary(subscription.anchor_on, subscription.billing_cycle, subscription.period_no), subscription.timezone);
  period_to timestamptz := private.local_midnight(
    private.period_boundary(subscription.anchor_on, subscription.billing_cycle, subscription.period_no + 1), subscription.timezone);
begin
  return case
    when subscription.period_no < 0 then 0
    when (subscription.current_period_start, subscription.current_period_end) = (period_from, period_to) then base
    else private.prorate(
      base, extract(epoch from subscription.current_period_end - subscription.current_period_start), extract(epoch from period_to - period_from)
    )
  end;
end
$$;
comment on function private.period_base(public.subscriptions) is
  'What the base price comes to in the current period as it is: nothing in a trial, a share where it begins late or is cut short.';

create function private.set_plan_price(
  plan_slug text, cycle public.billing_cycle, currency text, terms jsonb, at timestamptz
) returns uuid
language plpgsql security definer set search_path = ''
as $$
declare
  plan uuid;
  newest public.plan_prices;
  price public.plan_prices;
  meters jsonb;
begin
  -- Whoever sets another price of the plan at once waits.
  select own.id into plan from public.subscription_plans as own where own.slug = plan_slug for no key update;
  if not found then
    perform private.raise_error(404, 'plan_not_found', 'There is no such plan', 'plan');
  end if;
  select coalesce(
    jsonb_object_agg(
      given.key,
      jsonb_build_object(
        'included_units', 0, 'overage_price_minor', null, 'overage_unit', 1, 'limit_units', null, 'hard', false, 'credit_price_minor', null,
        'credit_unit', 60, 'credit_pulse', 1, 'pricing_model', 'per_unit', 'tiers', null
      ) || given.value || jsonb_build_object('meter_key', given.key)
    ), '{}')
  into meters
  from jsonb_each(coalesce(terms -> 'meters', '{}')) as given (key, value);

  select own.* into newest
  from public.plan_prices as own
  where own.plan_id = plan and own.billing_cycle = cycle and own.currency = set_plan_price.currency
  order by own.version desc
  limit 1;
  if newest.id is not null and newest.retired_at is null
    and (newest.base_minor, newest.billed_in, newest.minimum_minor) is not distinct from (
      coalesce((terms ->> 'base_minor')::bigint, 0), coalesce(terms ->> 'billed_in', 'arrears'), (terms ->> 'minimum_minor')::bigint
    )
    and meters = coalesce((
      select jsonb_object_agg(term.meter_key, to_jsonb(term) - 'plan_price_id')
      from public.plan_price_meters as term
      where term.plan_price_id = newest.id
    ), '{}') then
    return newest.id;
  end if;

  insert into public.plan_prices (plan_id, version, billing_cycle, currency, base_minor, billed_in, minimum_minor, created_at)
  values (
    plan, coalesce(newest.version, 0) + 1, cycle, set_plan_price.currency, coalesce((terms ->> 'base_minor')::bigint, 0),
    coalesce(terms ->> 'billed_in', 'arrears'), (terms ->> 'minimum_minor')::bigint, at
  )
  returning * into price;
  insert into public.plan_price_meters
  select term.*
  from jsonb_each(meters) as given (key, value)
  cross join lateral jsonb_populate_record(
    null::public.plan_price_meters, given.value || jsonb_build_object('plan_price_id', price.id)
  ) as term
  order by given.key;
  update public.plan_prices as own
  set retired_at = at
  where own.plan_id = plan and own.billing_cycle = cycle and own.currency = set_plan_price.currency
    and own.id <> price.id and own.retired_at is null;
  return price.id;
end
$$;
comment on function private.set_plan_price(text, public.billing_cycle, text, jsonb, timestamptz) is
  'For the operator: what a plan costs from now on. {"base_minor","billed_in","minimum_minor","meters":{"call_seconds":{"included_units",'
  '"overage_price_minor","pricing_model","tiers",…}}} becomes the next version; who subscribed keeps theirs. The same again is no version.';

create function private.add_invoice_item(
  organization_id uuid, description text, quantity bigint, unit text, unit_price_minor bigint, idempotency_key text, at timestamptz
) returns uuid
language plpgsql security definer set search_path = ''
as $$
declare
  subscription public.subscriptions := private.live_subscription(organization_id);
  money text := (select price.currency from public.plan_prices as price where price.id = subscription.plan_price_id);
  item private.invoice_items;
begin
  if subscription.id is null then
    perform private.raise_error(402, 'subscription_inactive', 'There is no live subscription, so nothing will be billed');
  end if;
  if coalesce(length(idempotency_key), 0) not between 1 and 255 then
    perform private.raise_error(400, 'invalid_request', 'idempotency_key must be a text of 1 to 255 characters', 'idempotency_key');
  end if;
  insert into private.invoice_items as known (
    organization_id, subscription_id, kind, currency, description, quantity, unit, unit_price_minor, amount_minor, idempotency_key, created_at
  )
  values (
    add_invoice_item.organization_id, subscription.id, 'item', money, add_invoice_item.description, add_invoice_item.quantity,
    add_invoice_item.unit, add_invoice_item.unit_price_minor, add_invoice_item.quantity * add_invoice_item.unit_price_minor,
    add_invoice_item.idempotency_key, at
  )
  on conflict on constraint invoice_items_key do nothing
  returning known.* into item;
  if item.id is null then
    select known.* into item
    from private.invoice_items as known
    where known.organization_id = add_invoice_item.organization_id and known.idempotency_key = add_invoice_item.idempotency_key;
    if (item.description, item.quantity, item.unit, item.unit_price_minor) <> (
      add_invoice_item.description, add_invoice_item.quantity, add_invoice_item.unit, add_invoice_item.unit_price_minor
    ) then
      perform private.raise_error(409, 'idempotency_conflict', 'Another item was added under this key', 'idempotency_key');
    end if;
  end if;
  return item.id;
end
$$;
comment on function private.add_invoice_item(uuid, text, bigint, text, bigint, text, timestamptz) is
  'For the operator: a line of its own on the subscription''s next invoice, once a key.';


-- Changing ------------------------------------------------------------------------------------------------------------------------

create function private.is_overdue(organization_id uuid) returns boolean
language sql stable set search_path = ''
as $$
  select exists (
    select
    from public.invoices as invoice
    where invoice.organization_id = $1 and invoice.status = 'open' and invoice.past_due_at is not null
  )
$$;
comment on function private.is_overdue(uuid) is 'Whether an organization has an invoice that was not paid in time.';

create function private.lock_subscription(organization_id uuid, at timestamptz) returns public.subscriptions
language plpgsql set search_path = ''
as $$
declare
  live public.subscriptions;
begin
  -- The organization first, as whoever subscribes does.
  perform from public.organizations as tenant where tenant.id = lock_subscription.organization_id for no key update;
  select own.* into live
  from public.subscriptions as own
  where own.organization_id = lock_subscription.organization_id and own.status not in ('cancelled', 'inactive')
  for no key update;
  if live.next_invoice_at <= at and live.billing_hold is null then
    -- What is over is billed before anything else is said of it.
    perform private.close_periods(jsonb_build_object('subscription_id', live.id), at);
    select own.* into live from public.subscriptions as own where own.id = live.id;
    if live.status in ('cancelled', 'inactive') then
      live := null;
    end if;
  end if;
  if live.current_period_end <= at and live.status <> 'paused' then
    perform private.raise_error(409, 'billing_held', 'The last period could not be billed, and somebody has to look at it first');
  end if;
  return live;
end
$$;
comment on function private.lock_subscription(uuid, timestamptz) is
  'The live subscription, in the period that `at` is in and locked until the transaction ends; null without one.';

create function private.repeated_request(organization_id uuid, key text, request jsonb) returns jsonb
language plpgsql set search_path = ''
as $$
declare
  known private.billing_requests;
begin
  if key is null then
    return null;
  end if;
  if length(key) not between 1 and 255 then
    perform private.raise_error(400, 'invalid_request', 'Idempotency-Key must be a text of 1 to 255 characters', 'idempotency_key');
  end if;
  -- The organization's row is what the same request at once waits for.
  perform from public.organizations as tenant where tenant.id = repeated_request.organization_id for no key update;
  select own.* into known
  from private.billing_requests as own
  where own.organization_id = repeated_request.organization_id and own.key = repeated_request.key;
  if known.request <> request then
    perform private.raise_error(409, 'idempotency_conflict', 'Something else was asked under this key', 'idempotency_key');
  end if;
  return known.answer;
end
$$;
comment on function private.repeated_request(uuid, text, jsonb) is
  'What was answered when the same was asked under the same key; null the first time, and without a key. Something else under it ends the '
  'request with 409.';

create function private.answer_request(organization_id uuid, key text, request jsonb, answer jsonb, at timestamptz) returns jsonb
language plpgsql set search_path = ''
as $$
begin
  if key is not null then
    delete from private.billing_requests as old
    where old.organization_id = answer_request.organization_id and old.created_at < at - interval '30 days';
    insert into private.billing_requests (organization_id, key, request, answer, created_at)
    values (answer_request.organization_id, answer_request.key, answer_request.request, answer_request.answer, at);
  end if;
  return answer;
end
$$;
comment on function private.answer_request(uuid, text, jsonb, jsonb, timestamptz) is 'Keeps an answer under its key, and gives it.';

create function private.apply_plan_change(
  organization_id uuid, plan_slug text, cycle_name text, timing text, at timestamptz
) returns jsonb
language plpgsql set search_path = ''
as $$
declare
  live public.subscriptions;
  old public.plan_prices;
  offer public.plan_prices;
  names text[];
  cycle public.billing_cycle;
  issuer private.billing_issuer;
  is_upgrade boolean;
  moment timestamptz := date_trunc('second', at);
  stretch_from timestamptz;
  stretch_minor bigint;
  last_day date;
  whole numeric;
  credit bigint := 0;
  charge bigint := 0;
  invoices jsonb := jsonb_build_array();
begin
  if timing is not null and timing not in ('now', 'period_end') then
    perform private.raise_error(400, 'invalid_request', 'timing must be now or period_end', 'timing');
  end if;
  if cycle_name is not null and cycle_name not in ('monthly', 'quarterly', 'yearly') then
    perform private.raise_error(400, 'invalid_request', 'cycle must be monthly, quarterly or yearly', 'cycle');
  end if;
  live := private.lock_subscription(organization_id, at);
  cycle := coalesce(cycle_name::public.billing_cycle, live.billing_cycle, 'monthly');
  select price.* into old from public.plan_prices as price where price.id = live.plan_price_id;

  -- A plan that was made for one customer is nobody else's.
  select price.* into offer
  from public.plan_prices as price
  join public.subscription_plans as plan on plan.id = price.plan_id
  join public.organizations as tenant on tenant.id = apply_plan_change.organization_id
  where plan.slug = plan_slug and plan.is_active and (plan.is_public or plan.id = live.plan_id)
    and price.billing_cycle = cycle
    and (price.retired_at is null or price.retired_at > at)
  order by (price.currency = coalesce(old.currency, tenant.currency)) desc, price.version desc
  limit 1;
  if not found then
    perform private.raise_error(422, 'plan_not_on_sale', 'There is no such plan, or it has no price for this billing cycle', 'plan');
  end if;
  if private.is_overdue(organization_id) and private.price_charges(offer.id) then
    perform private.raise_error(402, 'invoice_past_due', 'An invoice is overdue: it comes first');
  end if;

  if live.id is null or not private.price_charges(live.plan_price_id) and live.plan_id <> offer.plan_id then
    perform private.subscribe_organization(organization_id, plan_slug, 'active', at, cycle);
    return jsonb_build_object('result', 'changed', 'timing', 'now', 'effective_at', at, 'credit_minor', 0, 'charge_minor', 0, 'invoices', invoices);
  end if;
  if live.status = 'paused' then
    perform private.raise_error(409, 'subscription_paused', 'A paused subscription is taken up again before it changes');
  end if;
  if live.plan_id = offer.plan_id and live.billing_cycle = cycle then
    -- Back to what there is: what was to come does not.
    update public.subscriptions as own
    set next_plan_price_id = null
    where own.id = live.id and own.next_plan_price_id is not null;
    return jsonb_build_object(
      'result', 'unchanged', 'timing', 'now', 'effective_at', at, 'credit_minor', 0, 'charge_minor', 0, 'invoices', invoices
    );
  end if;
  if offer.currency <> old.currency then
    perform private.raise_error(422, 'currency_differs', 'The plan has no price in the currency that the subscription is billed in', 'plan');
  end if;

  is_upgrade := offer.base_minor * private.cycle_months(old.billing_cycle) >= old.base_minor * private.cycle_months(cycle);
  if timing is null then
    timing := case when live.period_no < 0 or is_upgrade and cycle = live.billing_cycle then 'now' else 'period_end' end;
  end if;
  if timing = 'period_end' then
    update public.subscriptions as own
    set next_plan_price_id = offer.id, cancel_at_period_end = false
    where own.id = live.id;
    return jsonb_build_object(
      'result', 'scheduled', 'timing', timing, 'effective_at', live.current_period_end, 'credit_minor', 0, 'charge_minor', 0,
      'invoices', invoices
    );
  end if;
  if live.period_no >= 0 and cycle <> live.billing_cycle then
    perform private.raise_error(409, 'billing_cycle_differs', 'The billing cycle changes when the period ends', 'timing');
  end if;
  if old.billed_in = 'advance' and not is_upgrade and live.period_no >= 0 then
    perform private.raise_error(422, 'downgrade_waits', 'What is paid in advance is used up first: the change comes when the period ends', 'timing');
  end if;

  if live.period_no >= 0 then
    names := array(
      select plan.name
      from unnest(array[old.plan_id, offer.plan_id]) with ordinality as side (id, number)
      join public.subscription_plans as plan on plan.id = side.id
      order by side.number
    );
    last_day := (live.current_period_end at time zone live.timezone)::date - 1;
    stretch_from := coalesce(live.base_billed_from, live.current_period_start);
    stretch_minor := coalesce(live.base_billed_minor, private.period_base(live));
    moment := greatest(moment, stretch_from);
    whole := extract(epoch from
      private.local_midnight(private.period_boundary(live.anchor_on, live.billing_cycle, live.period_no + 1), live.timezone)
        - private.local_midnight(private.period_boundary(live.anchor_on, live.billing_cycle, live.period_no), live.timezone));
    credit := private.prorate(
      stretch_minor, extract(epoch from live.current_period_end - moment), extract(epoch from live.current_period_end - stretch_from));
    charge := private.prorate(offer.base_minor, extract(epoch from live.current_period_end - moment), whole);
    insert into private.invoice_items (
      organization_id, subscription_id, kind, currency, description, unit, unit_price_minor, amount_minor, first_day, last_day, created_at
    )
    select
      live.organization_id, live.id, item.kind, old.currency, item.description, private.cycle_unit(cycle), item.price_minor, item.amount_minor,
      (item.from_time at time zone live.timezone)::date, last_day, at
    from (
      values
        ('base', names[1] || ' plan, ' || cycle, old.base_minor, stretch_minor, stretch_from, live.base_billed_from is null),
        ('credit', 'Unused time on ' || names[1], -stretch_minor, -credit, moment, true),
        ('charge', 'Remaining time on ' || names[2], offer.base_minor, charge, moment, true)
    ) as item (kind, description, price_minor, amount_minor, from_time, is_new)
    where item.is_new and item.amount_minor <> 0;
  end if;

  update public.subscriptions as own
  set
    plan_price_id = offer.id, plan_id = offer.plan_id, billing_cycle = cycle, next_plan_price_id = null, cancel_at_period_end = false,
    base_billed_minor = case when live.period_no >= 0 then charge end,
    base_billed_from = case when live.period_no >= 0 then moment end
  where own.id = live.id;

  -- What was billed in advance is not on the invoice that comes when the period ends: the difference is billed now.
  if old.billed_in = 'advance' and live.period_no >= 0 and live.next_invoice_at = live.current_period_end and charge > credit then
    select own.* into issuer from private.billing_issuer as own;
    invoices := private.open_invoices(private.bill_periods(array[live.id], issuer, at, true), issuer, at);
  end if;
  return jsonb_build_object(
    'result', 'changed', 'timing', timing, 'effective_at', moment, 'credit_minor', -credit, 'charge_minor', charge, 'invoices', invoices
  );
end
$$;
comment on function private.apply_plan_change(uuid, text, text, text, timestamptz) is
  'Puts a subscription on another plan: now, where that costs at least as much, or when the period ends. A cycle changes when the period '
  'ends. Asked again, it changes nothing.';

create function private.change_subscription(plan text, cycle text, timing text, idempotency_key text, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  organization uuid := private.require_org('billing.manage');
  request jsonb := jsonb_build_object('action', 'change', 'plan', plan, 'cycle', cycle, 'timing', timing);
  answer jsonb := private.repeated_request(organization, idempotency_key, request);
begin
  if answer is null then
    answer := private.apply_plan_change(organization, plan, cycle, timing, at);
    answer := private.answer_request(
      organization, idempotency_key, request, answer || jsonb_build_object('subscription', private.subscription_summary(organization)), at);
  end if;
  return answer;
end
$$;
comment on function private.change_subscription(text, text, text, text, timestamptz) is 'apply_plan_change for the caller''s organization. Needs billing.manage.';

create function private.subscription_summary(organization_id uuid) returns jsonb
language sql stable set search_path = ''
as $$
  select jsonb_build_object(
    'id', own.id, 'status', own.status, 'plan', plan.slug, 'billing_cycle', own.billing_cycle,
    'current_period_start', own.current_period_start, 'current_period_end', own.current_period_end,
    'cancel_at_period_end', own.cancel_at_period_end, 'paused_at', own.paused_at
  )
  from private.live_subscription($1) as own
  join public.subscription_plans as plan on plan.id = own.plan_id
$$;
comment on function private.subscription_summary(uuid) is 'The live subscription as answers say it; null without one.';

create function private.preview_subscription_change(plan text, cycle text, timing text, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  organization uuid := private.require_org('billing.view');
  change jsonb;
  document jsonb;
begin
  -- The change itself, taken back: what is shown cannot differ from what would be done.
  begin
    change := private.apply_plan_change(organization, plan, cycle, timing, at);
    if jsonb_array_length(change -> 'invoices') > 0 then
      document := private.invoice_document(organization, (change #>> '{invoices,0,id}')::uuid)
        - array['id', 'invoice_number', 'status', 'amount_paid_minor', 'credited_minor', 'finalized_at', 'paid_at', 'past_due_at']
        || jsonb_build_object('document', 'preview', 'as_of', at, 'is_billed', true);
    else
      document := private.preview_document(organization, at);
    end if;
    raise exception 'taken back' using errcode = 'TL000';
  exception when sqlstate 'TL000' then
    null;
  end;
  return document || jsonb_build_object('change', change - 'invoices');
end
$$;
comment on function private.preview_subscription_change(text, text, text, timestamptz) is
  'The invoice on which a change of plan would be, and when it would hold. Nothing of it stays. Needs billing.view.';

create function private.apply_cancellation(organization uuid, timing text, reason text, at timestamptz) returns jsonb
language plpgsql set search_path = ''
as $$
declare
  live public.subscriptions;
  ends timestamptz;
  unused bigint := 0;
  billed public.invoice_lines;
begin
  if coalesce(timing, 'period_end') not in ('now', 'period_end') then
    perform private.raise_error(400, 'invalid_request', 'timing must be now or period_end', 'timing');
  end if;
  live := private.lock_subscription(organization, at);
  if live.id is null then
    perform private.raise_error(402, 'subscription_inactive', 'There is no live subscription');
  end if;
  perform private.audit(
    organization, 'subscription.cancel', 'subscription', live.id,
    jsonb_strip_nulls(jsonb_build_object('timing', coalesce(timing, 'period_end'), 'reason', left(btrim(reason), 500))), at
  );
  if coalesce(timing, 'period_end') = 'period_end' and live.next_invoice_at is not null then
    update public.subscriptions as own
    set cancel_at_period_end = true, next_plan_price_id = null
    where own.id = live.id;
    return jsonb_build_object('result', 'cancelling', 'ends_at', live.current_period_end);
  end if;

  if live.next_invoice_at is null then
    -- Paused, and billed up to then.
    update public.subscriptions as own
    set status = 'cancelled', cancelled_at = at, paused_at = null, next_plan_price_id = null
    where own.id = live.id;
    return jsonb_build_object('result', 'cancelled', 'ends_at', at, 'credit_minor', 0);
  end if;

  -- Usage is counted by days, so the day that has begun is the last.
  ends := least(
    private.local_midnight((at at time zone live.timezone)::date + 1, live.timezone), live.current_period_end
  );
  if live.base_billed_from is not null and ends < live.current_period_end then
    unused := private.prorate(
      live.base_billed_minor, extract(epoch from live.current_period_end - ends),
      extract(epoch from live.current_period_end - live.base_billed_from));
  end if;
  if unused > 0 then
    select line.* into billed
    from public.invoices as invoice
    join public.invoice_lines as line on line.organization_id = invoice.organization_id and line.invoice_id = invoice.id
    where invoice.organization_id = organization and invoice.subscription_id = live.id
      and invoice.status in ('open', 'paid', 'uncollectible')
      and line.kind in ('base', 'charge') and line.amount_minor = live.base_billed_minor
      and coalesce(line.last_day, invoice.last_day) = (live.current_period_end at time zone live.timezone)::date - 1
    order by invoice.period_start desc, line.position desc
    limit 1;
    if billed.id is not null then
      perform private.issue_credit_note(
        jsonb_build_object(
          'invoice_id', billed.invoice_id, 'idempotency_key', 'cancelled ' || live.id, 'reason', 'Cancelled before the end of the period',
          'lines', jsonb_build_array(jsonb_build_object('invoice_line_id', billed.id, 'amount_minor', unused))
        ), at);
    else
      insert into private.invoice_items (
        organization_id, subscription_id, kind, currency, description, unit, unit_price_minor, amount_minor, first_day, last_day, created_at
      )
      select
        organization, live.id, 'credit', price.currency, 'Unused time on ' || plan.name, private.cycle_unit(live.billing_cycle),
        -live.base_billed_minor, -unused, (ends at time zone live.timezone)::date,
        (live.current_period_end at time zone live.timezone)::date - 1, at
      from public.plan_prices as price
      join public.subscription_plans as plan on plan.id = price.plan_id
      where price.id = live.plan_price_id;
    end if;
  end if;
  update public.usage_logs as log
  set period_end = (ends at time zone live.timezone)::date
  where log.organization_id = organization
    and log.period_start = (live.current_period_start at time zone live.timezone)::date
    and log.closed_at is null;
  update public.subscriptions as own
  set
    status = 'cancelled', cancelled_at = at, cancel_at_period_end = true, current_period_end = ends, next_invoice_at = ends,
    next_plan_price_id = null, paused_at = null, base_billed_minor = own.base_billed_minor - unused
  where own.id = live.id;
  return jsonb_build_object('result', 'cancelled', 'ends_at', ends, 'credit_minor', unused);
end
$$;
comment on function private.apply_cancellation(uuid, text, text, timestamptz) is
  'Ends the subscription with its period, or now: then nothing is dialled any more, the day that has begun is its last, the run bills what '
  'was used, and of the base price the days until then; what was billed in advance beyond them is credited.';

create function private.apply_pause(organization uuid, at timestamptz) returns jsonb
language plpgsql set search_path = ''
as $$
declare
  live public.subscriptions := private.lock_subscription(organization, at);
begin
  if live.status = 'paused' then
    return jsonb_build_object('result', 'unchanged', 'subscription', private.subscription_summary(organization));
  end if;
  if live.status is distinct from 'active' then
    perform private.raise_error(409, 'subscription_not_active', 'Only an active subscription is paused');
  end if;
  update public.subscriptions as own set status = 'paused', paused_at = at where own.id = live.id;
  return jsonb_build_object('result', 'paused', 'subscription', private.subscription_summary(organization));
end
$$;
comment on function private.apply_pause(uuid, timestamptz) is
  'Nothing is dialled from now on. The period that has begun is billed as it was sold, those that begin meanwhile are not.';

create function private.apply_resumption(organization uuid, at timestamptz) returns jsonb
language plpgsql set search_path = ''
as $$
declare
  live public.subscriptions := private.lock_subscription(organization, at);
  last record;
  today date;
  number integer;
  ends date;
  is_advance boolean;
begin
  if live.id is null then
    select plan.slug, own.billing_cycle into last
    from public.subscriptions as own
    join public.subscription_plans as plan on plan.id = own.plan_id
    where own.organization_id = organization and own.status = 'cancelled'
    order by own.cancelled_at desc, own.created_at desc
    limit 1;
    if not found then
      perform private.raise_error(402, 'subscription_inactive', 'There is no subscription to take up again');
    end if;
    if private.is_overdue(organization) then
      perform private.raise_error(402, 'invoice_past_due', 'An invoice is overdue: it comes first');
    end if;
    perform private.subscribe_organization(organization, last.slug, 'active', at, last.billing_cycle);
    return jsonb_build_object('result', 'reactivated', 'subscription', private.subscription_summary(organization));
  end if;

  if live.status = 'paused' and live.next_invoice_at is null then
    -- It goes on in the period of its anchor that today is in, from today on.
    today := (at at time zone live.timezone)::date;
    number := live.period_no;
    while private.period_boundary(live.anchor_on, live.billing_cycle, number + 1) <= today loop
      number := number + 1;
    end loop;
    ends := private.period_boundary(live.anchor_on, live.billing_cycle, number + 1);
    today := greatest(today, private.period_boundary(live.anchor_on, live.billing_cycle, number));
    is_advance := exists (
      select from public.plan_prices as price where price.id = live.plan_price_id and price.billed_in = 'advance' and price.base_minor > 0
    );
    perform private.cut_usage_periods(organization, today, ends, at);
    update public.subscriptions as own
    set
      status = 'active', paused_at = null, cancel_at_period_end = false, period_no = number,
      current_period_start = private.local_midnight(today, live.timezone), current_period_end = private.local_midnight(ends, live.timezone),
      next_invoice_at = private.local_midnight(case when is_advance then today else ends end, live.timezone)
    where own.id = live.id;
  elsif live.status = 'paused' then
    update public.subscriptions as own
    set status = 'active', paused_at = null, cancel_at_period_end = false
    where own.id = live.id;
  elsif live.cancel_at_period_end then
    update public.subscriptions as own set cancel_at_period_end = false where own.id = live.id;
  else
    return jsonb_build_object('result', 'unchanged', 'subscription', private.subscription_summary(organization));
  end if;
  return jsonb_build_object('result', 'resumed', 'subscription', private.subscription_summary(organization));
end
$$;
comment on function private.apply_resumption(uuid, timestamptz) is
  'Takes up again what is paused or about to end, and, on the plan that it was, what is cancelled. A period that is taken up late is billed '
  'from that day on.';

create function private.cancel_subscription(timing text, reason text, idempotency_key text, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  organization uuid := private.require_org('billing.manage');
  request jsonb := jsonb_build_object('action', 'cancel', 'timing', timing, 'reason', reason);
  answer jsonb := private.repeated_request(organization, idempotency_key, request);
begin
  return coalesce(answer, private.answer_request(
    organization, idempotency_key, request, private.apply_cancellation(organization, timing, reason, at), at));
end
$$;
comment on function private.cancel_subscription(text, text, text, timestamptz) is
  'apply_cancellation for the caller''s organization. Needs billing.manage.';

create function private.pause_subscription(idempotency_key text, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  organization uuid := private.require_org('billing.manage');
  request constant jsonb := '{"action": "pause"}'::jsonb;
  answer jsonb := private.repeated_request(organization, idempotency_key, request);
begin
  return coalesce(answer, private.answer_request(organization, idempotency_key, request, private.apply_pause(organization, at), at));
end
$$;
comment on function private.pause_subscription(text, timestamptz) is 'apply_pause for the caller''s organization. Needs billing.manage.';

create function private.resume_subscription(idempotency_key text, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  organization uuid := private.require_org('billing.manage');
  request constant jsonb := '{"action": "resume"}'::jsonb;
  answer jsonb := private.repeated_request(organization, idempotency_key, request);
begin
  return coalesce(answer, private.answer_request(organization, idempotency_key, request, private.apply_resumption(organization, at), at));
end
$$;
comment on function private.resume_subscription(text, timestamptz) is 'apply_resumption for the caller''s organization. Needs billing.manage.';


-- When it is not paid -------------------------------------------------------------------------------------------------------------

create function private.dun_invoices(issuer private.billing_issuer, batch integer, at timestamptz) returns integer
language plpgsql set search_path = ''
as $$
declare
  policy private.dunning_policy;
  today date := (at at time zone issuer.timezone)::date;
  overdue uuid[];
begin
  select own.* into policy from private.dunning_policy as own;
  if not found then
    return 0;
  end if;

  overdue := array(
    select invoice.id
    from public.invoices as invoice
    where invoice.status = 'open' and invoice.due_date < today - policy.grace_days and invoice.past_due_at is null
      and invoice.total_minor > invoice.amount_paid_minor + invoice.credited_minor
    order by invoice.due_date, invoice.id
    limit batch
    for no key update skip locked
  );
  if cardinality(overdue) > 0 then
    update public.invoices as invoice set past_due_at = at where invoice.id = any (overdue);
    insert into private.outbox (organization_id, topic, key, payload, created_at)
    select
      invoice.organization_id, 'invoice.past_due', invoice.id::text,
      jsonb_build_object(
        'invoice_id', invoice.id, 'invoice_number', invoice.invoice_number, 'total_minor', invoice.total_minor,
        'due_minor', invoice.total_minor - invoice.amount_paid_minor - invoice.credited_minor, 'currency', invoice.currency,
        'due_date', invoice.due_date
      ), at
    from public.invoices as invoice
    where invoice.id = any (overdue)
    order by invoice.id
    on conflict do nothing;
    insert into private.payment_retries (organization_id, invoice_id, number, due_at)
    select
      invoice.organization_id, invoice.id, retry.number,
      ((today + retry.day)::timestamp + policy.retry_time) at time zone issuer.timezone
    from public.invoices as invoice
    cross join unnest(policy.retry_days) with ordinality as retry (day, number)
    where invoice.id = any (overdue)
    on conflict do nothing;
    update public.subscriptions as subscription
    set
      status = case subscription.status when 'active' then 'past_due' else subscription.status end,
      past_due_since = coalesce(subscription.past_due_since, at)
    where subscription.status in ('active', 'past_due', 'suspended')
      and exists (
        select from public.invoices as invoice where invoice.id = any (overdue) and invoice.subscription_id = subscription.id
      );
  end if;

  with due as (
    select retry.organization_id, retry.invoice_id, retry.number
    from private.payment_retries as retry
    where retry.due_at <= at and retry.told_at is null
    order by retry.due_at, retry.invoice_id, retry.number
    limit batch
    for no key update skip locked
  ),
  told as (
    update private.payment_retries as retry
    set told_at = at
    from due
    where retry.organization_id = due.organization_id and retry.invoice_id = due.invoice_id and retry.number = due.number
    returning retry.organization_id, retry.invoice_id, retry.number
  )
  insert into private.outbox (organization_id, topic, key, payload, created_at)
  select
    told.organization_id, 'invoice.payment_due', told.invoice_id || ' ' || told.number,
    jsonb_build_object(
      'invoice_id', told.invoice_id, 'number', told.number, 'currency', invoice.currency,
      'amount_minor', invoice.total_minor - invoice.amount_paid_minor - invoice.credited_minor,
      'by', case
        when invoice.total_minor - invoice.amount_paid_minor - invoice.credited_minor
            <= coalesce((policy.mandate_limits ->> invoice.currency)::bigint, 0)
          and exists (
            select
            from public.payment_methods as method
            where method.organization_id = invoice.organization_id and method.is_default and method.removed_at is null
          ) then 'mandate'
        else 'link'
      end
    ), at
  from told
  join public.invoices as invoice on invoice.organization_id = told.organization_id and invoice.id = told.invoice_id
  where invoice.status = 'open'
  on conflict do nothing;

  if policy.suspend_after_days is not null then
    update public.subscriptions as subscription
    set status = 'suspended'
    where subscription.id in (
      select late.id
      from public.subscriptions as late
      where late.status = 'past_due'
        and late.past_due_since <= at - make_interval(days => policy.suspend_after_days)
        and exists (
          select
          from public.invoices as invoice
          where invoice.organization_id = late.organization_id and invoice.subscription_id = late.id and invoice.status = 'open'
            and invoice.past_due_at <= at - make_interval(days => policy.suspend_after_days)
        )
      order by late.id
      limit batch
      for no key update skip locked
    );
  end if;
  if policy.uncollectible_after_days is not null then
    update public.invoices as invoice
    set status = 'uncollectible'
    where invoice.id in (
      select given_up.id
      from public.invoices as given_up
      where given_up.status = 'open' and given_up.due_date < today - policy.uncollectible_after_days
        and given_up.past_due_at <= at - make_interval(days => policy.uncollectible_after_days)
      order by given_up.due_date, given_up.id
      limit batch
      for no key update skip locked
    );
  end if;
  return cardinality(overdue);
end
$$;
comment on function private.dun_invoices(private.billing_issuer, integer, timestamptz) is
  'Finds invoices that were not paid in time, tells each once, plans when payment is asked for again and asks, and suspends or gives up as '
  'the policy says.';

create function private.recover_subscription() returns trigger
language plpgsql security definer set search_path = ''
as $$
begin
  update public.subscriptions as subscription
  set status = 'active', past_due_since = null
  where subscription.organization_id = new.organization_id
    and subscription.id = new.subscription_id
    and subscription.status in ('past_due', 'suspended')
    and subscription.past_due_since is not null
    and not exists (
      select
      from public.invoices as other
      where other.organization_id = new.organization_id
        and other.subscription_id = new.subscription_id
        and other.status in ('open', 'uncollectible')
        and other.past_due_at is not null
        and other.id <> new.id
    );
  return null;
end
$$;
comment on function private.recover_subscription() is
  'Trigger: the last overdue invoice of a subscription is paid, or void: it is active again.';
create trigger recover_subscription after update of status on public.invoices
  for each row when (new.past_due_at is not null and new.status in ('paid', 'void') and old.status <> new.status)
  execute function private.recover_subscription();


-- What users call -----------------------------------------------------------------------------------------------------------------

create function public.change_subscription(
  plan text, cycle text default null, timing text default null, idempotency_key text default null
) returns jsonb
language sql set search_path = ''
as $$
  select private.change_subscription(plan, cycle, timing, idempotency_key, private.clock_now())
$$;
comment on function public.change_subscription(text, text, text, text) is
  'Puts the caller''s organization on another plan, now or when the period ends: {"result":"changed|scheduled|unchanged","timing",'
  '"effective_at","credit_minor","charge_minor","invoices","subscription"}. Needs billing.manage.';

create function public.preview_subscription_change(plan text, cycle text default null, timing text default null) returns jsonb
language sql set search_path = ''
as $$
  select private.preview_subscription_change(plan, cycle, timing, private.clock_now())
$$;
comment on function public.preview_subscription_change(text, text, text) is
  'The invoice on which a change of plan would be, with what the change would be in `change`; writes nothing. Needs billing.view.';

create function public.cancel_subscription(
  timing text default 'period_end', reason text default null, idempotency_key text default null
) returns jsonb
language sql set search_path = ''
as $$
  select private.cancel_subscription(timing, reason, idempotency_key, private.clock_now())
$$;
comment on function public.cancel_subscription(text, text, text) is
  'Ends the caller''s subscription with its period, or now: {"result":"cancelling|cancelled","ends_at","credit_minor"?}. Needs billing.manage.';

create function public.pause_subscription(idempotency_key text default null) returns jsonb
language sql set search_path = ''
as $$
  select private.pause_subscription(idempotency_key, private.clock_now())
$$;
comment on function public.pause_subscription(text) is 'Pauses the caller''s subscription: {"result":"paused|unchanged","subscription"}. Needs billing.manage.';

create function public.resume_subscription(idempotency_key text default null) returns jsonb
language sql set search_path = ''
as $$
  select private.resume_subscription(idempotency_key, private.clock_now())
$$;
comment on function public.resume_subscription(text) is
  'Takes up again what is paused, about to end, or cancelled: {"result":"resumed|reactivated|unchanged","subscription"}. Needs billing.manage.';

revoke all on function
  private.period_base(public.subscriptions), private.set_plan_price(text, public.billing_cycle, text, jsonb, timestamptz),
  private.add_invoice_item(uuid, text, bigint, text, bigint, text, timestamptz), private.is_overdue(uuid),
  private.lock_subscription(uuid, timestamptz), private.repeated_request(uuid, text, jsonb),
  private.answer_request(uuid, text, jsonb, jsonb, timestamptz), private.apply_plan_change(uuid, text, text, text, timestamptz),
  private.apply_cancellation(uuid, text, text, timestamptz), private.apply_pause(uuid, timestamptz),
  private.apply_resumption(uuid, timestamptz), private.subscription_summary(uuid),
  private.change_subscription(text, text, text, text, timestamptz), private.preview_subscription_change(text, text, text, timestamptz),
  private.cancel_subscription(text, text, text, timestamptz), private.pause_subscription(text, timestamptz),
  private.resume_subscription(text, timestamptz), private.dun_invoices(private.billing_issuer, integer, timestamptz),
  private.recover_subscription(), public.change_subscription(text, text, text, text), public.preview_subscription_change(text, text, text),
  public.cancel_subscription(text, text, text), public.pause_subscription(text), public.resume_subscription(text)
from public, anon, authenticated, service_role;
grant execute on function
  private.change_subscription(text, text, text, text, timestamptz), private.preview_subscription_change(text, text, text, timestamptz),
  private.cancel_subscription(text, text, text, timestamptz), private.pause_subscription(text, timestamptz),
  private.resume_subscription(text, timestamptz), public.change_subscription(text, text, text, text),
  public.preview_subscription_change(text, text, text), public.cancel_subscription(text, text, text), public.pause_subscription(text),
  public.resume_subscription(text)
to authenticated;
