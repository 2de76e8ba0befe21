-- The invoice run works on whole statements, and invoices know discounts, coupons, credits in part, and why nothing is charged.

set local lock_timeout = '5s';
set local statement_timeout = '60s';

-- Who is billed -------------------------------------------------------------------------------------------------------------------

alter table public.organizations add column tax_id text;
-- The table is new or small: it is read in no time.
-- squawk-ignore constraint-missing-not-valid
alter table public.organizations add constraint organizations_tax_id_format check (tax_id ~ '^[A-Z0-9][A-Z0-9 .-]{1,29}$');
grant update (tax_id) on public.organizations to authenticated;
comment on column public.organizations.tax_id is 'The number of a business abroad, as its VAT number; India''s is gstin. Printed on invoices.';

alter table public.tax_rates add column buyer text not null default 'any';
alter table public.tax_rates add column supplier_country_code text;
alter table public.tax_rates add column treatment text not null default 'standard';
alter table public.tax_rates add column note text;
-- A wider one takes its place in this transaction.
-- squawk-ignore ban-drop-constraint
alter table public.tax_rates drop constraint tax_rates_version_key;
-- The table is new or small: it is read in no time.
-- squawk-ignore constraint-missing-not-valid, disallowed-unique-constraint
alter table public.tax_rates add constraint tax_rates_version_key unique nulls not distinct (country_code, scope, buyer, supplier_country_code, name, valid_from);
-- A wider one takes its place in this transaction.
-- squawk-ignore ban-drop-constraint
alter table public.tax_rates drop constraint tax_rates_scope_known;
-- The table is new or small: it is read in no time.
-- squawk-ignore constraint-missing-not-valid
alter table public.tax_rates add constraint tax_rates_scope_known check (scope in ('any', 'intra_state', 'inter_state', 'domestic', 'cross_border'));
-- The table is new or small: it is read in no time.
-- squawk-ignore constraint-missing-not-valid
alter table public.tax_rates add constraint tax_rates_buyer_known check (buyer in ('any', 'business', 'consumer'));
-- The table is new or small: it is read in no time.
-- squawk-ignore constraint-missing-not-valid
alter table public.tax_rates add constraint tax_rates_supplier_format check (supplier_country_code ~ '^[A-Z]{2}$');
-- The table is new or small: it is read in no time.
-- squawk-ignore constraint-missing-not-valid
alter table public.tax_rates add constraint tax_rates_treatment_known check (treatment in ('standard', 'zero_rated', 'reverse_charge', 'exempt'));
-- The table is new or small: it is read in no time.
-- squawk-ignore constraint-missing-not-valid
alter table public.tax_rates add constraint tax_rates_treatment_charges check (treatment = 'standard' or rate_bp = 0 and btrim(note) <> '');
-- The table is new or small: it is read in no time.
-- squawk-ignore constraint-missing-not-valid
alter table public.tax_rates add constraint tax_rates_note_length check (length(note) <= 300);
comment on table public.tax_rates is
  'Tax by the customer''s country: one row a component. ZZ holds for every country that has no row of its own that fits; where that has none '
  'either, nothing is taxed and nothing is said.';
comment on column public.tax_rates.scope is
  'any; in a country that taxes by state, intra_state (customer in the issuer''s state) and inter_state; domestic (customer in the issuer''s '
  'country) and cross_border.';
comment on column public.tax_rates.buyer is 'business: a customer that gave a tax number (tax_id, or gstin in India); consumer: one that did not; or any.';
comment on column public.tax_rates.supplier_country_code is 'Holds for an issuer in this country alone; null for any.';
comment on column public.tax_rates.treatment is
  'standard: the rate is charged. zero_rated (an export), reverse_charge (the customer owes it), exempt: nothing is, and the note says why.';
comment on column public.tax_rates.note is 'Printed on the invoice: what the law wants said where nothing is charged.';

-- What an invoice says ------------------------------------------------------------------------------------------------------------

alter table public.invoices add column discount_minor bigint not null default 0;
alter table public.invoices add column discounts jsonb not null default '[]';
-- A wider one takes its place in this transaction.
-- squawk-ignore ban-drop-constraint
alter table public.invoices drop constraint invoices_total_adds_up;
-- The table is new or small: it is read in no time.
-- squawk-ignore constraint-missing-not-valid
alter table public.invoices add constraint invoices_total_adds_up check (total_minor = subtotal_minor - discount_minor + tax_minor);
-- The table is new or small: it is read in no time.
-- squawk-ignore constraint-missing-not-valid
alter table public.invoices add constraint invoices_discounts_array check (jsonb_typeof(discounts) = 'array');
comment on column public.invoices.subtotal_minor is 'Sum of the lines before discounts, in the currency''s minor unit.';
comment on column public.invoices.discount_minor is 'Sum of the lines'' discounts: taken off before tax.';
comment on column public.invoices.discounts is
  'Which discounts they are: [{"name","percent_bp","amount_minor","discount_id"}]. Their amounts make discount_minor.';

alter table public.invoice_lines add column discount_minor bigint not null default 0;
-- The table is new or small: it is read in no time.
-- squawk-ignore constraint-missing-not-valid
alter table public.invoice_lines add constraint invoice_lines_discount_within check (case when amount_minor < 0 then discount_minor between amount_minor and 0 else discount_minor between 0 and amount_minor end);
comment on column public.invoice_lines.discount_minor is
  'What of the amount is taken off, before tax: its part of the invoice''s discounts, and of a credit the discount of the line that it gives back.';

alter table public.invoice_taxes add column treatment text not null default 'standard';
alter table public.invoice_taxes add column note text;
-- The table is new or small: it is read in no time.
-- squawk-ignore constraint-missing-not-valid
alter table public.invoice_taxes add constraint invoice_taxes_treatment_known check (treatment in ('standard', 'zero_rated', 'reverse_charge', 'exempt'));
-- The table is new or small: it is read in no time.
-- squawk-ignore constraint-missing-not-valid
alter table public.invoice_taxes add constraint invoice_taxes_treatment_charges check (treatment = 'standard' or amount_minor = 0);
comment on column public.invoice_taxes.taxable_minor is 'What the rate was applied to: the subtotal less discounts.';
comment on column public.invoice_taxes.treatment is 'As in tax_rates; where it is not standard, nothing is charged and the note is printed.';

alter table private.invoice_items add column taken_minor bigint not null default 0;
alter table private.invoice_items add column discount_minor bigint;
alter table private.invoice_items add column discount_taken_minor bigint not null default 0;
-- The table is new or small: it is read in no time.
-- squawk-ignore constraint-missing-not-valid
alter table private.invoice_items add constraint invoice_items_taken_within check (case when amount_minor < 0 then taken_minor between amount_minor and 0 else taken_minor between 0 and amount_minor end);
-- The table is new or small: it is read in no time.
-- squawk-ignore constraint-missing-not-valid
alter table private.invoice_items add constraint invoice_items_discount_within check (discount_minor between amount_minor and 0 and discount_taken_minor between discount_minor and 0);
update private.invoice_items set taken_minor = amount_minor where settled_at is not null;
comment on table private.invoice_items is
  'What waits for the next invoice of a subscription and becomes a line of it, with the same id: the two sides of a plan that changed within '
  'its period, and what an operator adds once. Of a credit an invoice takes no more than it charges; the rest waits for the next one.';
comment on column private.invoice_items.settled_at is 'When an invoice took it, or the last of it; null while it waits.';
comment on column private.invoice_items.taken_minor is 'What invoices have taken of it so far.';
comment on column private.invoice_items.discount_minor is
  'Of a credit for what an earlier invoice charged: the discount that was taken off there, given back with it. Null takes part in the '
  'discounts of the invoice that it comes on.';
comment on column private.invoice_items.discount_taken_minor is 'What invoices have taken of that so far.';

alter type private.priced_line add attribute discount_minor bigint;
alter type private.priced_line add attribute item_id uuid;
alter type private.priced_line add attribute rest_minor bigint;
comment on type private.priced_line is
  'A line of an invoice that may be made; what of it waits for the next one is its rest.';
alter type private.priced_tax add attribute treatment text;
alter type private.priced_tax add attribute note text;

-- Discounts -----------------------------------------------------------------------------------------------------------------------

create table private.coupons (
  code            text primary key,
  name            text not null,
  percent_bp      integer,
  amount_minor    bigint,
  currency        text,
  invoices        integer,
  max_redemptions integer,
  redeemed        integer not null default 0,
  valid_from      timestamptz not null,
  valid_to        timestamptz,
  created_at      timestamptz not null,
  constraint coupons_code_format check (code ~ '^[A-Z0-9][A-Z0-9_-]{0,39}$'),
  constraint coupons_name_present check (btrim(name) <> '' and length(name) <= 100),
  constraint coupons_percent_or_amount check ((percent_bp is null) <> (amount_minor is null)),
  constraint coupons_percent_range check (percent_bp between 1 and 10000),
  constraint coupons_amount_positive check (amount_minor > 0),
  constraint coupons_amount_has_currency check ((amount_minor is null) = (currency is null)),
  constraint coupons_currency_format check (currency ~ '^[A-Z]{3}$'),
  constraint coupons_invoices_positive check (invoices > 0),
  constraint coupons_redeemed_range check (redeemed between 0 and coalesce(max_redemptions, redeemed)),
  constraint coupons_validity_ordered check (valid_from < valid_to)
);
select private.close_table('private.coupons');

comment on table private.coupons is
  'What a code takes off: a percentage, or an amount of one currency. Its row counts redemptions, and is what two of them wait for.';
comment on column private.coupons.percent_bp is 'Hundredths of a percent.';
comment on column private.coupons.invoices is 'Of how many invoices: 1 is once; null is for ever.';
comment on column private.coupons.max_redemptions is 'How many organizations may redeem it; null is any number.';

create table private.discounts (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null,
  subscription_id uuid not null,
  coupon_code     text references private.coupons (code) on delete restrict,
  name            text not null,
  percent_bp      integer,
  amount_minor    bigint,
  currency        text,
  invoices        integer,
  applied         integer not null default 0,
  idempotency_key text,
  number          bigint generated always as identity,
  created_at      timestamptz not null,
  ended_at        timestamptz,
  constraint discounts_subscription_fkey foreign key (organization_id, subscription_id)
    references public.subscriptions (organization_id, id) on delete restrict,
  constraint discounts_coupon_key unique (organization_id, coupon_code),
  constraint discounts_key unique (organization_id, idempotency_key),
  constraint discounts_name_present check (btrim(name) <> '' and length(name) <= 100),
  constraint discounts_percent_or_amount check ((percent_bp is null) <> (amount_minor is null)),
  constraint discounts_percent_range check (percent_bp between 1 and 10000),
  constraint discounts_amount_positive check (amount_minor > 0),
  constraint discounts_amount_has_currency check ((amount_minor is null) = (currency is null)),
  constraint discounts_invoices_positive check (invoices > 0),
  constraint discounts_applied_range check (applied between 0 and coalesce(invoices, applied))
);
create index idx_discounts_live on private.discounts (subscription_id, number) where ended_at is null;
create index idx_discounts_subscription on private.discounts (organization_id, subscription_id);
create index idx_discounts_coupon on private.discounts (coupon_code) where coupon_code is not null;
select private.close_table('private.discounts');

comment on table private.discounts is
  'What is taken off a subscription''s invoices, in this order, before tax: from a coupon, or given by the operator. An amount on one invoice '
  'is one with `invoices` 1.';
comment on column private.discounts.invoices is 'Of how many invoices; null is for ever.';
comment on column private.discounts.applied is 'Of how many it was taken off. Invoices of a change within a period take percentages and do not count.';
comment on column private.discounts.ended_at is 'Since when nothing more is taken off.';

insert into private.personal_data (table_name, column_name, found_by, via, treatment, reason)
values
  ('private.coupons', '*', 'none', null, 'kept', 'Reference data.'),
  ('private.discounts', '*', 'none', null, 'kept', 'A fiscal row: what is taken off the organization''s own bills.');

-- Functions -----------------------------------------------------------------------------------------------------------------------

-- Only functions call it, and this migration makes it again.
-- squawk-ignore ban-drop-function
drop function private.price_periods(uuid[], private.billing_issuer, timestamptz, boolean);
-- Only functions call it, and this migration makes it again.
-- squawk-ignore ban-drop-function
drop function private.bill_periods(uuid[], private.billing_issuer, timestamptz, boolean);

create or replace function private.invoice_number(month text, number integer) returns text
language plpgsql immutable set search_path = ''
as $$
begin
  return case
    when number between 1 and 99999 then 'INV-' || month || '-' || lpad(number::text, 5, '0')
    -- A sixth digit would break the 16 characters of Rule 46, so the month goes on in further series: INA, INB, to INU.
    when number between 100000 and 2199999 then
      'IN' || chr(64 + number / 100000) || '-' || month || '-' || lpad((number % 100000)::text, 5, '0')
  end;
end
$$;

create function private.named_discounts(discounts jsonb) returns bigint
language plpgsql immutable set search_path = ''
as $$
begin
  return coalesce((select sum((given.item ->> 'amount_minor')::bigint) from jsonb_array_elements(discounts) as given (item)), 0)::bigint;
end
$$;
comment on function private.named_discounts(jsonb) is 'What the discounts that an invoice names come to.';

create or replace function private.check_invoice_sums() returns trigger
language plpgsql set search_path = ''
as $$
declare
  lines bigint;
  discounts bigint;
  taxes bigint;
begin
  select coalesce(sum(line.amount_minor), 0)::bigint, coalesce(sum(line.discount_minor), 0)::bigint
  into lines, discounts
  from public.invoice_lines as line
  where line.organization_id = new.organization_id and line.invoice_id = new.id;
  select coalesce(sum(tax.amount_minor), 0)::bigint
  into taxes
  from public.invoice_taxes as tax
  where tax.organization_id = new.organization_id and tax.invoice_id = new.id;
  if lines <> new.subtotal_minor or taxes <> new.tax_minor or discounts <> new.discount_minor
    or new.discount_minor <> private.named_discounts(new.discounts) then
    raise exception 'invoice %: lines of %, discounts of % and taxes of % do not make a subtotal of %, a discount of % and a tax of %',
      new.invoice_number, lines, discounts, taxes, new.subtotal_minor, new.discount_minor, new.tax_minor using errcode = '23514';
  end if;
  return null;
end
$$;
comment on function private.check_invoice_sums() is
  'Trigger, at the end of the transaction: an open invoice''s lines make its subtotal and its discount, and its taxes its tax.';

create function private.check_changed_sums() returns trigger
language plpgsql set search_path = ''
as $$
declare
  wrong record;
begin
  -- An invoice is a draft when it is made and its lines change only while it is one, so that it adds up when the statement that opens it
  -- ends, or never.
  select changed.invoice_number, line.amount, line.discount, tax.amount as tax, changed.subtotal_minor, changed.discount_minor, changed.tax_minor
  into wrong
  from changed
  cross join lateral (
    select coalesce(sum(own.amount_minor), 0) as amount, coalesce(sum(own.discount_minor), 0) as discount
    from public.invoice_lines as own
    where own.organization_id = changed.organization_id and own.invoice_id = changed.id
  ) as line
  cross join lateral (
    select coalesce(sum(own.amount_minor), 0) as amount
    from public.invoice_taxes as own
    where own.organization_id = changed.organization_id and own.invoice_id = changed.id
  ) as tax
  where changed.status <> 'draft'
    and (
      (line.amount, line.discount, tax.amount) <> (changed.subtotal_minor, changed.discount_minor, changed.tax_minor)
      or changed.discounts <> '[]' and changed.discount_minor <> private.named_discounts(changed.discounts)
      or changed.discounts = '[]' and changed.discount_minor <> 0
    )
  limit 1;
  if found then
    raise exception 'invoice %: lines of %, discounts of % and taxes of % do not make a subtotal of %, a discount of % and a tax of %',
      wrong.invoice_number, wrong.amount, wrong.discount, wrong.tax, wrong.subtotal_minor, wrong.discount_minor, wrong.tax_minor
      using errcode = '23514';
  end if;
  return null;
end
$$;
comment on function private.check_changed_sums() is 'Trigger, of a whole statement: as check_invoice_sums, for all that it opened or changed.';

create or replace function private.check_credit_note_sums() returns trigger
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
        or billed.amount_minor - billed.discount_minor < (
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
      'price', jsonb_build_object('id', price.id, 'version', price.version, 'currency', price.currency, 'base_minor', price.base_minor),
      'discounts', private.live_discounts(subscription.id)
    )
    from public.subscription_plans as plan
    join public.plan_prices as price on price.id = subscription.plan_price_id
    where plan.id = subscription.plan_id
  );
end
$$;

create or replace function private.divide_half_away(dividend numeric, divisor numeric) returns bigint
language plpgsql immutable set search_path = ''
as $$
begin
  return (sign(dividend) * div(2 * abs(dividend) + divisor, 2 * divisor))::bigint;
end
$$;

create or replace function private.describe_quantity(quantity bigint, unit text) returns text
language plpgsql immutable set search_path = ''
as $$
begin
  return case
    when quantity is null then 'unlimited'
    when unit = 'second' then quantity / 60 || ' min ' || lpad((quantity % 60)::text, 2, '0') || ' s'
    else quantity::text
  end;
end
$$;

create function private.settle_lines(
  subscription_id uuid, currency text, is_change boolean, inout lines private.priced_line[],
  out subtotal_minor bigint, out discount_minor bigint, out discounts jsonb
)
language plpgsql stable set search_path = ''
as $$
declare
  line private.priced_line;
  given private.discounts[];
  kept private.priced_line[] := array[]::private.priced_line[];
  room bigint := (select coalesce(sum(own.amount_minor) filter (where own.amount_minor > 0), 0) from unnest(lines) as own);
  weights bigint[];
  shares bigint[];
  cuts bigint[];
  net bigint;
  part bigint;
  returned bigint := 0;
begin
  discounts := '[]';
  -- What is given back within the invoice's own discounts: no more than is charged.
  for place in 1 .. cardinality(lines) loop
    line := lines[place];
    if line.amount_minor < 0 and line.discount_minor is null then
      part := -least(-line.amount_minor, room);
      room := room + part;
      line.rest_minor := line.amount_minor - part;
      line.amount_minor := part;
    end if;
    kept := kept || line;
  end loop;

  -- What is left is what discounts are taken off, one after the other, and no line goes below nothing.
  weights := array(
    select case when own.discount_minor is null then greatest(own.amount_minor, 0) else 0 end
    from unnest(kept) with ordinality as own
    order by own.ordinality
  );
  given := array(
    select own
    from private.discounts as own
    where own.subscription_id = settle_lines.subscription_id and own.ended_at is null
      and (own.currency is null or own.currency = settle_lines.currency)
      and (own.percent_bp is not null or not is_change)
    order by own.number
  );
  select taken.shares, taken.cuts into shares, cuts
  from private.discount_shares(
    room, weights,
    array(select own.percent_bp from unnest(given) as own order by own.number),
    array(select own.amount_minor from unnest(given) as own order by own.number)
  ) as taken;
  for place in 1 .. cardinality(given) loop
    if cuts[place] > 0 then
      room := room - cuts[place];
      discounts := discounts || jsonb_build_object(
        'discount_id', given[place].id, 'name', given[place].name, 'percent_bp', given[place].percent_bp, 'amount_minor', cuts[place]);
    end if;
  end loop;

  -- What an earlier invoice charged comes back less the discount that it had there.
  lines := array[]::private.priced_line[];
  for place in 1 .. cardinality(kept) loop
    line := kept[place];
    if line.discount_minor is null then
      line.discount_minor := shares[place];
    else
      net := line.discount_minor - line.amount_minor;
      part := least(net, room);
      room := room - part;
      if part < net then
        line.rest_minor := line.amount_minor;
        line.amount_minor := -private.divide_half_away(-line.amount_minor::numeric * part, net);
        line.rest_minor := line.rest_minor - line.amount_minor;
        line.discount_minor := line.amount_minor + part;
      end if;
      returned := returned + line.discount_minor;
    end if;
    if line.rest_minor <> 0 then
      line.description := line.description || ', in part';
    end if;
    -- What finds no room waits whole.
    if line.amount_minor <> 0 or coalesce(line.rest_minor, 0) = 0 then
      line.position := cardinality(lines) + 1;
      lines := lines || line;
    end if;
  end loop;
  if returned <> 0 then
    discounts := discounts || jsonb_build_object('name', 'Discounts given back with what they were on', 'amount_minor', returned);
  end if;
  select coalesce(sum(own.amount_minor), 0), coalesce(sum(own.discount_minor), 0)
  into subtotal_minor, discount_minor
  from unnest(lines) as own;
end
$$;
comment on function private.settle_lines(uuid, text, boolean, private.priced_line[]) is
  'Of the lines of an invoice, what it takes of credits, which is no more than it charges, and what discounts take off each line; the rest '
  'of a credit waits. Called only where there is one or the other.';

create function private.price_periods(
  subscription_ids uuid[], issuer private.billing_issuer, at timestamptz, items_only boolean default false
)
returns table (
  organization_id uuid, subscription_id uuid, kind text, currency text, period_start timestamptz, period_end timestamptz, timezone text,
  first_day date, last_day date, subtotal_minor bigint, tax_minor bigint, issuer_particulars jsonb, customer jsonb,
  lines private.priced_line[], taxes private.priced_tax[], adjustments private.priced_adjustment[], discount_minor bigint, discounts jsonb,
  is_billed boolean, agrees boolean
)
language plpgsql stable set search_path = ''
as $$
#variable_conflict use_column
declare
  supplier private.gst_states;
  today date := (at at time zone issuer.timezone)::date;
  particulars jsonb;
begin
  if issuer.country_code = 'IN' then
    select state.* into supplier
    from private.gst_states as state
    where state.code = coalesce(left(issuer.gstin, 2), issuer.state_code) or issuer.gstin is null and state.letters = issuer.state_code;
  end if;
  particulars := jsonb_strip_nulls(
    to_jsonb(issuer) - 'singleton' || jsonb_build_object('place_of_supply', supplier.code || '-' || supplier.name)
  );

  return query
  with own as materialized (
    select subscription.* from public.subscriptions as subscription where subscription.id = any (subscription_ids)
  ),
  whole as materialized (
    -- Most have the same anchor, so that few periods are worked out.
    select
      period.*,
      private.local_midnight(private.period_boundary(period.anchor_on, period.billing_cycle, period.period_no), period.timezone) as period_from,
      private.local_midnight(private.period_boundary(period.anchor_on, period.billing_cycle, period.period_no + 1), period.timezone) as period_to
    from (select distinct own.anchor_on, own.billing_cycle, own.period_no, own.timezone from own) as period
  ),
  tenant as materialized (
    select
      organization.*,
      case when organization.country_code = 'IN' then coalesce(left(organization.gstin, 2), organization.state_code, '') end as place
    from public.organizations as organization
    where organization.id in (select own.organization_id from own)
  ),
  place as materialized (
    -- A state may be written in two ways, so India's are compared by the code that both have.
    select named.place, state.code, state.name
    from (select distinct tenant.place from tenant where tenant.place is not null) as named
    join private.gst_states as state on named.place in (state.code, state.letters)
  ),
  ended as materialized (
    select
      own.*,
      plan.name as plan_name,
      price.currency,
      price.base_minor,
      price.minimum_minor,
      case
        when items_only then 'change'
        when own.next_invoice_at < own.current_period_end then 'advance'
        else 'period'
      end as mode,
      whole.period_from, whole.period_to,
      -- What the base price comes to in the period as it is: cut short, or begun late.
      case
        when own.period_no < 0 then 0
        when (own.current_period_start, own.current_period_end) = (whole.period_from, whole.period_to) then price.base_minor
        else private.prorate(
          price.base_minor, extract(epoch from own.current_period_end - own.current_period_start),
          extract(epoch from whole.period_to - whole.period_from)
        )
      end as base_amount,
      (own.current_period_start at time zone own.timezone)::date as first_day,
      (own.current_period_end at time zone own.timezone)::date as next_day,
      jsonb_strip_nulls(jsonb_build_object(
        'organization_id', organization.id,
        'name', coalesce(organization.company_name, organization.name),
        'gstin', organization.gstin,
        'tax_id', organization.tax_id,
        'address_line_1', organization.address_line_1,
        'address_line_2', organization.address_line_2,
        'city', organization.city,
        'state', organization.state,
        'state_code', organization.state_code,
        'pincode', organization.pincode,
        'country', organization.country,
        'country_code', organization.country_code,
        'place_of_supply', case
          when organization.country_code = 'IN' then place.code || '-' || place.name
          -- What India calls a buyer abroad.
          when issuer.country_code = 'IN' then '96-Other Countries'
        end
      )) as customer,
      organization.country_code,
      case when coalesce(organization.gstin, organization.tax_id) is null then 'consumer' else 'business' end as buyer,
      case when organization.country_code = issuer.country_code then 'domestic' else 'cross_border' end as border_scope,
      case
        when organization.country_code = issuer.country_code
          and coalesce(place.code = supplier.code, organization.state_code = issuer.state_code) then 'intra_state'
        else 'inter_state'
      end as state_scope
    from own
    join whole using (anchor_on, billing_cycle, period_no, timezone)
    join public.subscription_plans as plan on plan.id = own.plan_id
    join public.plan_prices as price on price.id = own.plan_price_id
    join tenant as organization on organization.id = own.organization_id
    left join place on place.place = organization.place
  ),
  used as materialized (
    -- From the days, which are the evidence, and not from the counter that quotas were judged by.
    select
      ended.id, term, term.meter_key, term.pricing_model, term.overage_price_minor, term.overage_unit, meter.name, meter.unit,
      meter.position,
      nullif(term.included_units, -1) as allowance,
      -- What prepaid credit paid is settled: it is neither included nor billed again.
      case when meter.rounding = 'period' then private.billable_units(counted.quantity, meter) else counted.quantity end as quantity,
      case
        when log.id is null then true
        when meter.aggregation in ('sum', 'count') then (log.usage_count, log.prepaid) = (summed.quantity, summed.prepaid)
        else log.usage_count = counted.quantity
      end as agrees
    from ended
    join public.plan_price_meters as term on term.plan_price_id = ended.plan_price_id
    join public.meters as meter on meter.key = term.meter_key
    left join public.usage_logs as log
      on log.organization_id = ended.organization_id and log.feature_key = term.meter_key and log.period_start = ended.first_day
    cross join lateral (
      select coalesce(sum(total.quantity), 0)::bigint as quantity, coalesce(sum(total.prepaid), 0)::bigint as prepaid
      from public.usage_days as total
      where meter.aggregation in ('sum', 'count')
        and total.organization_id = ended.organization_id
        and total.meter_key = term.meter_key
        and total.day >= ended.first_day and total.day < ended.next_day
    ) as summed
    cross join lateral (
      select case
        when meter.aggregation in ('sum', 'count') then summed.quantity - summed.prepaid
        else private.period_usage(ended.organization_id, term.meter_key, ended.first_day, ended.next_day)
      end as quantity
    ) as counted
    where ended.mode = 'period'
  ),
  doubtful as materialized (
    select used.id from used where not used.agrees
    union all
    -- Also of what was counted and is on no plan.
    select ended.id
    from ended
    join public.usage_logs as log on log.organization_id = ended.organization_id and log.period_start = ended.first_day
    join public.meters as meter on meter.key = log.feature_key
    where ended.mode = 'period'
      and not exists (
        select
        from public.plan_price_meters as term
        where term.plan_price_id = ended.plan_price_id and term.meter_key = log.feature_key
      )
      and case
        when meter.aggregation in ('sum', 'count') then (log.usage_count, log.prepaid) <> (
          select coalesce(sum(total.quantity), 0), coalesce(sum(total.prepaid), 0)
          from public.usage_days as total
          where total.organization_id = log.organization_id
            and total.meter_key = log.feature_key
            and total.day >= ended.first_day and total.day < ended.next_day
        )
        else log.usage_count <> private.period_usage(log.organization_id, log.feature_key, log.period_start, log.period_end)
      end
  ),
  beyond as materialized (
    select
      used.id, used.position, used.meter_key, 1 as number, 'overage' as kind, used.quantity - used.allowance as units,
      used.overage_price_minor as unit_price_minor, used.overage_unit as price_units,
      private.rate_units(used.quantity - used.allowance, used.overage_price_minor, used.overage_unit) as amount_minor, used.unit,
      used.name || ' beyond the plan: ' || private.describe_quantity(used.quantity - used.allowance, used.unit) as description
    from used
    where used.quantity > used.allowance and used.overage_price_minor is not null and used.pricing_model = 'per_unit'
    union all
    select
      used.id, used.position, used.meter_key, rated.number, rated.kind, rated.units, rated.unit_price_minor, rated.price_units,
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
      ended.id, log.organization_id, log.feature_key, log.period_start, gen_random_uuid() as line_id, meter.name, meter.unit, meter.position,
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
  item as (
    select
      ended.id, null::uuid as line_id, null::uuid as item_id, 0 as rank, 0 as meter_position, 1::bigint as place, 'base' as kind,
      null::text as meter_key,
      ended.plan_name || ' plan, ' || ended.billing_cycle || case
        when ended.period_no < 0 then ' (trial)'
        when (ended.current_period_start, ended.current_period_end) <> (ended.period_from, ended.period_to) then ', ' || private.describe_part(
          ended.next_day - ended.first_day, ended.period_from, ended.period_to, ended.timezone)
        else ''
      end as description,
      1::bigint as quantity,
      case ended.billing_cycle when 'monthly' then 'month' else private.cycle_unit(ended.billing_cycle) end as unit,
      case when ended.period_no < 0 then 0 else ended.base_minor end as unit_price_minor, 1::bigint as price_units,
      ended.base_amount as amount_minor, null::date as first_day, null::date as last_day, null::bigint as discount_minor
    from ended
    where ended.mode <> 'change' and ended.base_billed_from is null
    union all
    -- The next period's base price, where it is billed in advance and there will be one.
    select
      ended.id, null, null, 7, 0, 1, 'base', null, taking_over.name || ' plan, ' || next_price.billing_cycle || ', in advance', 1,
      private.cycle_unit(next_price.billing_cycle), next_price.base_minor, 1, next_price.base_minor, ended.next_day, following.period_end - 1,
      null
    from ended
    join public.subscriptions as own on own.id = ended.id
    join public.plan_prices as next_price on next_price.id = coalesce(ended.next_plan_price_id, ended.plan_price_id)
    join public.subscription_plans as taking_over on taking_over.id = next_price.plan_id
    cross join lateral private.following_period(own, next_price.billing_cycle) as following
    where ended.mode = 'period' and not ended.cancel_at_period_end and ended.status <> 'paused'
      and next_price.billed_in = 'advance' and next_price.base_minor > 0 and next_price.currency = ended.currency
    union all
    select
      used.id, null, null, 1, used.position, 1, 'included', used.meter_key,
      used.name || ' included: ' || private.describe_quantity(least(used.quantity, used.allowance), used.unit)
        || case when used.allowance is null then ', unlimited' else ' of ' || private.describe_quantity(used.allowance, used.unit) end,
      least(used.quantity, used.allowance), used.unit, 0, 1, 0, null, null, null
    from used
    where used.allowance is null or used.allowance > 0
    union all
    select
      beyond.id, null, null, 2, beyond.position, beyond.number, beyond.kind, beyond.meter_key, beyond.description, beyond.units, beyond.unit,
      beyond.unit_price_minor, beyond.price_units, beyond.amount_minor, null, null, null
    from beyond
    union all
    -- What is missing to the minimum, of the time in which its price held.
    select
      committed.id, null, null, 4, 0, 1, 'commitment', null, 'Minimum commitment, the difference to it', 1, 'commitment', committed.missing, 1,
      committed.missing, null, null, null
    from (
      select
        ended.id,
        private.prorate(
          ended.minimum_minor, extract(epoch from ended.current_period_end - coalesce(ended.base_billed_from, ended.current_period_start)),
          extract(epoch from ended.period_to - ended.period_from)
        ) - coalesce(ended.base_billed_minor, ended.base_amount)
          - coalesce((select sum(beyond.amount_minor) from beyond where beyond.id = ended.id), 0)::bigint as missing
      from ended
      where ended.mode = 'period' and ended.minimum_minor is not null and ended.period_no >= 0
    ) as committed
    where committed.missing > 0
    union all
    select
      late.id, late.line_id, null, 5, late.position, 1, 'adjustment', late.feature_key,
      late.name || ' beyond the plan, ' || late.period_start || ' to ' || late.period_end - 1 || ', told later: '
        || case when late.quantity < 0 then '-' else '' end || private.describe_quantity(abs(late.quantity), late.unit),
      late.quantity, late.unit, late.overage_price_minor, late.overage_unit, late.amount_minor, null, null, null
    from late
    where late.amount_minor <> 0
    union all
    select
      ended.id, case when waiting.taken_minor = 0 then waiting.id end, waiting.id, case waiting.kind when 'item' then 6 else 0 end, 0,
      1 + waiting.number, waiting.kind, null, waiting.description, waiting.quantity, waiting.unit, waiting.unit_price_minor,
      waiting.price_units, waiting.amount_minor - waiting.taken_minor, waiting.first_day, waiting.last_day,
      waiting.discount_minor - waiting.discount_taken_minor
    from ended
    join private.invoice_items as waiting
      on waiting.organization_id = ended.organization_id
      and waiting.subscription_id = ended.id
      and waiting.currency = ended.currency
      and waiting.settled_at is null
  ),
  bill as materialized (
    select
      numbered.id, sum(numbered.amount_minor)::bigint as subtotal_minor, bool_or(numbered.amount_minor > 0) as is_billed,
      bool_or(numbered.amount_minor < 0) as has_credit,
      array_agg(
        (
          numbered.number, numbered.kind, numbered.meter_key, numbered.description, numbered.quantity, numbered.unit,
          numbered.unit_price_minor, numbered.price_units, numbered.amount_minor, numbered.line_id, numbered.first_day, numbered.last_day,
          numbered.discount_minor, numbered.item_id, null
        )::private.priced_line
        order by numbered.number) as lines
    from (
      select
        item.*,
        (row_number() over (partition by item.id order by item.rank, item.meter_position, item.meter_key, item.place, item.description))::integer as number
      from item
    ) as numbered
    group by numbered.id
  ),
  discounted as materialized (
    select distinct discount.subscription_id as id
    from private.discounts as discount
    where discount.subscription_id = any (subscription_ids) and discount.ended_at is null
  ),
  finished as materialized (
    select
      ended.*, coalesce(settled.lines, '{}') as lines, coalesce(settled.subtotal_minor, 0) as subtotal_minor,
      coalesce(settled.discount_minor, 0) as discount_minor, coalesce(settled.discounts, '[]') as discounts,
      coalesce(bill.is_billed, false) as is_billed
    from ended
    left join bill using (id)
    cross join lateral (
      select bill.has_credit or exists (select from discounted where discounted.id = ended.id) as is_slow
    ) as way
    left join lateral (
      select bill.lines, bill.subtotal_minor, 0::bigint as discount_minor, '[]'::jsonb as discounts
      where not way.is_slow
      union all
      select changed.lines, changed.subtotal_minor, changed.discount_minor, changed.discounts
      from private.settle_lines(ended.id, ended.currency, ended.mode = 'change', bill.lines) as changed
      where way.is_slow
    ) as settled on true
  ),
  rate as materialized (
    select known.*
    from public.tax_rates as known
    where known.valid_from <= today and (known.valid_to is null or known.valid_to > today)
      and (known.supplier_country_code is null or known.supplier_country_code = issuer.country_code)
  ),
  taxed as materialized (
    -- Which rates hold is the same for all customers of a place.
    select place.*, rate.name, rate.rate_bp, rate.position, rate.treatment, rate.note
    from (select distinct ended.country_code, ended.buyer, ended.border_scope, ended.state_scope from ended) as place
    join rate
      on rate.scope in ('any', place.border_scope, place.state_scope)
      and rate.buyer in ('any', place.buyer)
      and rate.country_code = case
        when exists (
          select
          from rate as fitting
          where fitting.country_code = place.country_code and fitting.buyer in ('any', place.buyer)
            and fitting.scope in ('any', place.border_scope, place.state_scope)
        ) then place.country_code
        else 'ZZ'
      end
  )
  select
    finished.organization_id, finished.id, finished.mode, finished.currency,
    case finished.mode
      when 'change' then greatest(at, (
        select max(changed.period_start) + interval '1 microsecond'
        from public.invoices as changed
        where changed.organization_id = finished.organization_id and changed.subscription_id = finished.id and changed.kind = 'change'
      ))
      else finished.current_period_start
    end,
    finished.current_period_end, finished.timezone,
    case finished.mode when 'change' then (at at time zone finished.timezone)::date else finished.first_day end, finished.next_day - 1,
    finished.subtotal_minor, coalesce(levied.amount_minor, 0), particulars, finished.customer, finished.lines,
    coalesce(levied.taxes, '{}'),
    case
      when exists (select from late) then array(
        select
          (late.feature_key, late.period_start, case when late.amount_minor <> 0 then late.line_id end)::private.priced_adjustment
        from late
        where late.id = finished.id
          and (late.amount_minor = 0 or exists (select from unnest(finished.lines) as line where line.line_id = late.line_id))
      )
      else '{}'
    end,
    finished.discount_minor, finished.discounts, finished.is_billed,
    not exists (select from doubtful where doubtful.id = finished.id)
  from finished
  cross join lateral (
    select
      sum(tax.amount_minor)::bigint as amount_minor,
      array_agg(
        (tax.number, tax.name, tax.rate_bp, tax.taxable_minor, tax.amount_minor, tax.treatment, tax.note)::private.priced_tax order by tax.number
      ) as taxes
    from (
      select
        taxed.name, taxed.rate_bp, taxed.treatment, taxed.note, finished.subtotal_minor - finished.discount_minor as taxable_minor,
        private.tax_amount(finished.subtotal_minor - finished.discount_minor, taxed.rate_bp) as amount_minor,
        (row_number() over (order by taxed.position, taxed.name))::integer as number
      from taxed
      where (taxed.country_code, taxed.buyer, taxed.border_scope, taxed.state_scope)
        = (finished.country_code, finished.buyer, finished.border_scope, finished.state_scope)
    ) as tax
  ) as levied;
end
$$;
comment on function private.price_periods(uuid[], private.billing_issuer, timestamptz, boolean) is
  'What the next invoice of each subscription says: the one place where an invoice is priced, for the run and for who asks beforehand. The '
  'current period''s base price, where it is not billed yet, what was used, the minimum, what came late to earlier periods, what waits, and '
  'the next period''s base price where it is billed in advance; then what is given back, discounts, and tax. The first base price in advance '
  'comes alone, and so does, if that is asked for, what waits. A trial period has no base price. It `agrees` if the days come to what the '
  'counters say.';

create function private.bill_periods(
  subscription_ids uuid[], issuer private.billing_issuer, at timestamptz, items_only boolean default false,
  out drafts uuid[], out doubtful uuid[]
)
language plpgsql set search_path = ''
as $$
begin
  with period as materialized (
    select gen_random_uuid() as id, priced.* from private.price_periods(subscription_ids, issuer, at, items_only) as priced
  ),
  priced as materialized (
    -- A period that charges nothing makes no invoice: a number and a document for zero would only be noise.
    select period.* from period where period.is_billed and period.agrees
  ),
  draft as (
    insert into public.invoices (
      id, organization_id, subscription_id, kind, currency, period_start, period_end, timezone, first_day, last_day, subtotal_minor,
      discount_minor, discounts, tax_minor, total_minor, issuer, customer, created_at, updated_at
    )
    select
      priced.id, priced.organization_id, priced.subscription_id, priced.kind, priced.currency, priced.period_start, priced.period_end,
      priced.timezone, priced.first_day, priced.last_day, priced.subtotal_minor, priced.discount_minor, priced.discounts, priced.tax_minor,
      priced.subtotal_minor - priced.discount_minor + priced.tax_minor, priced.issuer_particulars, priced.customer, at, at
    from priced
    returning invoices.id
  ),
  item as materialized (
    select priced.organization_id, priced.subscription_id, priced.currency, priced.id as invoice_id, line.*
    from priced
    cross join lateral unnest(priced.lines) as line
  ),
  line as (
    insert into public.invoice_lines (
      id, organization_id, invoice_id, position, kind, meter_key, description, quantity, unit, unit_price_minor, price_units, amount_minor,
      first_day, last_day, discount_minor
    )
    select
      coalesce(item.line_id, gen_random_uuid()), item.organization_id, item.invoice_id, item.position, item.kind, item.meter_key,
      item.description, item.quantity, item.unit, item.unit_price_minor, item.price_units, item.amount_minor, item.first_day, item.last_day,
      coalesce(item.discount_minor, 0)
    from item
  ),
  taken as (
    update private.invoice_items as waiting
    set
      taken_minor = waiting.taken_minor + item.amount_minor,
      discount_taken_minor = waiting.discount_taken_minor
        + case when waiting.discount_minor is not null then item.discount_minor else 0 end,
      settled_at = case when coalesce(item.rest_minor, 0) = 0 then at end
    from item
    where waiting.organization_id = item.organization_id and waiting.id = item.item_id and waiting.settled_at is null
  ),
  kept as (
    -- An adjustment that gives back more than there is to charge is settled, and what is left of it waits as a credit.
    insert into private.invoice_items (
      organization_id, subscription_id, kind, currency, description, unit, unit_price_minor, amount_minor, created_at
    )
    select
      item.organization_id, item.subscription_id, 'credit', item.currency, item.description || ', the rest', 'adjustment', item.rest_minor,
      item.rest_minor, at
    from item
    where item.kind = 'adjustment' and item.rest_minor <> 0
  ),
  levied as (
    insert into public.invoice_taxes (
      organization_id, invoice_id, position, name, rate_bp, taxable_minor, amount_minor, treatment, note
    )
    select
      priced.organization_id, priced.id, tax.position, tax.name, tax.rate_bp, tax.taxable_minor, tax.amount_minor, tax.treatment, tax.note
    from priced
    cross join lateral unnest(priced.taxes) as tax
  ),
  taken_off as (
    update private.discounts as discount
    set
      applied = discount.applied + 1,
      ended_at = case when discount.applied + 1 >= discount.invoices then at end
    from priced
    cross join lateral jsonb_array_elements(priced.discounts) as given (item)
    where priced.kind <> 'change' and priced.discounts <> '[]' and discount.id = (given.item ->> 'discount_id')::uuid
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
      and period.agrees
      and (change.line_id is null or period.is_billed)
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
  select
    coalesce((select array_agg(draft.id) from draft), '{}'),
    coalesce((select array_agg(period.subscription_id) from period where not period.agrees), '{}')
  into drafts, doubtful;
end
$$;
comment on function private.bill_periods(uuid[], private.billing_issuer, timestamptz, boolean) is
  'Drafts the next invoice of each subscription, as price_periods has it; none for a period that charges nothing. What came late to periods '
  'that were billed before is adjusted, and of credits and discounts what it took is taken. Nothing is done for those whose days and counters '
  'disagree.';

create or replace function private.open_invoices(drafts uuid[], issuer private.billing_issuer, at timestamptz) returns jsonb
language plpgsql set search_path = ''
as $$
declare
  month text;
  invoices jsonb;
  covered record;
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
      updated_at = at,
      invoice_date = (at at time zone issuer.timezone)::date,
      due_date = (at at time zone issuer.timezone)::date + issuer.payment_terms_days
    from numbered
    where invoice.id = numbered.id
    returning invoice.id, invoice.organization_id, invoice.invoice_number, invoice.total_minor, invoice.currency
  ),
  counted as (
    -- What number_event would do, for all of them at once.
    insert into private.event_sequences as counter (organization_id, object, last)
    select opened.organization_id, 'invoice:' || opened.id, 1
    from opened
    on conflict on constraint event_sequences_pkey do update set last = counter.last + 1
    returning counter.organization_id, counter.object, counter.last
  ),
  announced as (
    insert into private.outbox (organization_id, topic, key, payload, created_at, dispatched_at, object, sequence)
    select
      opened.organization_id, 'invoice.finalized', opened.id::text,
      jsonb_build_object(
        'invoice_id', opened.id, 'invoice_number', opened.invoice_number, 'total_minor', opened.total_minor,
        'currency', opened.currency
      ),
      at, case when listening.organization_id is null then at end, counted.object, counted.last
    from opened
    join counted on counted.object = 'invoice:' || opened.id
    left join (
      select distinct endpoint.organization_id from public.webhook_endpoints as endpoint where endpoint.enabled
    ) as listening on listening.organization_id = opened.organization_id
  )
  select jsonb_agg(
    jsonb_build_object('id', opened.id, 'organization_id', opened.organization_id, 'number', opened.invoice_number)
    order by opened.invoice_number)
  into invoices
  from opened;

  -- Nothing is due on one that credits and discounts cover.
  for covered in
    select invoice.organization_id, invoice.id
    from public.invoices as invoice
    where invoice.id = any (drafts) and invoice.total_minor = 0
    order by invoice.invoice_number
  loop
    perform private.settle_invoice(covered.organization_id, covered.id, at);
  end loop;
  return coalesce(invoices, '[]');
end
$$;

create or replace function private.close_periods(request jsonb, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  batch integer := least(greatest(coalesce((request ->> 'limit')::integer, 1000), 1), 2000);
  issuer private.billing_issuer;
  claimed uuid[];
  due uuid[];
  held uuid[];
  made uuid[];
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
      drafts := drafts || (private.bill_periods(opening, issuer, at)).drafts;
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

    select billed.drafts, billed.doubtful into made, held from private.bill_periods(due, issuer, at) as billed;
    drafts := drafts || made;

    -- Days and counters were written together, so they agree. If ever they do not, a person decides, not a bill.
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

    update public.usage_logs as log
    set closed_at = at, plan_price_id = subscription.plan_price_id, billed_count = log.usage_count - log.prepaid
    from public.subscriptions as subscription
    where subscription.id = any (due)
      and log.organization_id = subscription.organization_id
      and log.period_start = (subscription.current_period_start at time zone subscription.timezone)::date;

    with moving as materialized (
      select
        subscription.id, subscription.timezone, subscription.status, subscription.current_period_end, old.currency as old_currency,
        price.id as plan_price_id, price.plan_id, price.billing_cycle, price.billed_in, price.base_minor, price.currency,
        -- The next from the anchor, or, where the cycle changes, the first from a new one.
        case
          when price.billing_cycle = subscription.billing_cycle then subscription.anchor_on
          else (subscription.current_period_end at time zone subscription.timezone)::date
        end as anchor_on,
        case when price.billing_cycle = subscription.billing_cycle then subscription.period_no + 1 else 0 end as period_no
      from public.subscriptions as subscription
      join public.plan_prices as old on old.id = subscription.plan_price_id
      join public.plan_prices as price on price.id = coalesce(subscription.next_plan_price_id, subscription.plan_price_id)
      where subscription.id = any (due)
    ),
    ending as materialized (
      select
        period.*,
        private.local_midnight(private.period_boundary(period.anchor_on, period.billing_cycle, period.period_no + 1), period.timezone) as period_end
      from (select distinct moving.anchor_on, moving.billing_cycle, moving.period_no, moving.timezone from moving) as period
    ),
    following as (
      select
        moving.*, ending.period_end,
        case
          -- The invoice that was just made has it, unless it is in another currency: then it comes alone.
          when moving.billed_in <> 'advance' or moving.base_minor = 0 or moving.status = 'paused' then 'later'
          when moving.currency = moving.old_currency then 'billed'
          else 'now'
        end as base
      from moving
      join ending using (anchor_on, billing_cycle, period_no, timezone)
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
      updated_at = at,
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

create or replace function public.close_periods(jsonb) returns jsonb
language sql set search_path = ''
as $$
  select private.close_periods($1, private.clock_now())
$$;
comment on function public.close_periods(jsonb) is
  'For invoice-generation. {"v":1,"limit":1000} gives {"closed":n,"invoices":[{"id","organization_id","number"}],"more":bool}.';

create or replace function private.issue_credit_note(request jsonb, at timestamptz) returns jsonb
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
      coalesce(asked.amount, billed.amount_minor - billed.discount_minor - credited.amount) as amount
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
      and (
        given is null and billed.amount_minor - billed.discount_minor > credited.amount
        or asked.amount <= billed.amount_minor - billed.discount_minor - credited.amount
      )
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
  if credited_before + subtotal > invoice.subtotal_minor - invoice.discount_minor then
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
      private.divide_half_away(billed.amount_minor::numeric * (credited_before + subtotal), invoice.subtotal_minor - invoice.discount_minor)
        - private.divide_half_away(billed.amount_minor::numeric * credited_before, invoice.subtotal_minor - invoice.discount_minor)
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

create or replace function private.tell_subscription() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  at  constant timestamptz := private.clock_now();
  same constant text := private.key_at(new.id, at);
  was public.subscriptions;
  kind text := 'subscription.changed';
  told bigint;
begin
  if tg_op = 'INSERT' then
    kind := 'subscription.created';
  else
    was := old;
    if new.status in ('cancelled', 'inactive') and was.status not in ('cancelled', 'inactive') then
      kind := 'subscription.cancelled';
    end if;
  end if;
  -- Whoever changes it holds its row, so that two changes of one moment are counted one after the other.
  select count(*) into told
  from private.outbox as known
  where known.organization_id = new.organization_id and known.topic = kind
    and (known.key = same or known.key like same || ' %');
  perform private.emit(
    new.organization_id,
    kind,
    same || case when told > 0 then ' ' || told + 1 else '' end,
    (
      select jsonb_build_object(
        'subscription_id', new.id, 'plan', plan.slug, 'plan_price_id', new.plan_price_id, 'status', new.status, 'previous_status', was.status,
        'current_period_start', new.current_period_start, 'current_period_end', new.current_period_end,
        'cancel_at_period_end', new.cancel_at_period_end
      )
      from public.subscription_plans as plan
      where plan.id = new.plan_id
    ),
    at
  );
  return null;
end
$$;

create or replace function private.credit_note_document(organization_id uuid, credit_note_id uuid) returns jsonb
language sql stable set search_path = ''
as $$
  select to_jsonb(note) - array['idempotency_key', 'created_by', 'created_at'] || jsonb_build_object(
    'document', 'credit_note',
    'logo', private.billing_logo(note.issuer ->> 'logo_id'),
    'invoice_number', invoice.invoice_number,
    'invoice_date', invoice.invoice_date,
    'timezone', invoice.timezone,
    'lines', coalesce((
      select jsonb_agg(
        to_jsonb(line) - array['id', 'organization_id', 'credit_note_id', 'invoice_line_id']
          || jsonb_build_object('invoice_position', billed.position)
        order by line.position)
      from public.credit_note_lines as line
      join public.invoice_lines as billed on billed.organization_id = line.organization_id and billed.id = line.invoice_line_id
      where line.organization_id = note.organization_id and line.credit_note_id = note.id
    ), '[]'),
    'taxes', coalesce((
      select jsonb_agg(
        to_jsonb(tax) - array['id', 'organization_id', 'credit_note_id']
          || jsonb_build_object('treatment', billed.treatment, 'note', billed.note)
        order by tax.position)
      from public.credit_note_taxes as tax
      join public.invoice_taxes as billed
        on billed.organization_id = note.organization_id and billed.invoice_id = note.invoice_id and billed.name = tax.name
      where tax.organization_id = note.organization_id and tax.credit_note_id = note.id
    ), '[]')
  )
  from public.credit_notes as note
  join public.invoices as invoice on invoice.organization_id = note.organization_id and invoice.id = note.invoice_id
  where note.id = $2 and note.status <> 'draft' and (note.organization_id = $1 or $1 is null)
$$;

create or replace function private.preview_document(organization_id uuid, at timestamptz) returns jsonb
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
    'discount_minor', bill.discount_minor,
    'discounts', bill.discounts,
    'tax_minor', bill.tax_minor,
    'total_minor', bill.subtotal_minor - bill.discount_minor + bill.tax_minor,
    'invoice_date', dated,
    'due_date', dated + issuer.payment_terms_days,
    'as_of', at,
    -- What charges nothing makes no invoice.
    'is_billed', bill.is_billed,
    'issuer', bill.issuer_particulars,
    'customer', bill.customer,
    'lines', (
      select coalesce(
        jsonb_agg(
          to_jsonb(item) - array['line_id', 'item_id', 'rest_minor'] || jsonb_build_object('discount_minor', coalesce(item.discount_minor, 0))
          order by item.position
        ), '[]')
      from unnest(bill.lines) as item
    ),
    'taxes', to_jsonb(bill.taxes)
  );
end
$$;

create or replace function private.export_invoices(from_day date, to_day date) returns jsonb
language plpgsql stable security definer set search_path = ''
as $$
declare
  organization uuid := private.require_org('billing.view');
begin
  perform private.check_export_days(from_day, to_day);
  return jsonb_build_object(
    'columns', jsonb_build_array(
      'document', 'number', 'date', 'due_date', 'status', 'against', 'customer', 'customer_gstin', 'place_of_supply', 'first_day',
      'last_day', 'currency', 'subtotal', 'discount', 'cgst', 'sgst', 'igst', 'other_tax', 'tax', 'total', 'paid', 'credited', 'due', 'id'
    ),
    'rows', coalesce((
      select jsonb_agg(
        jsonb_build_array(
          item.document, item.number, item.dated, item.due_date, item.status, item.against, item.customer ->> 'name',
          item.customer ->> 'gstin', item.customer ->> 'place_of_supply', item.first_day, item.last_day, item.currency,
          private.decimal_amount(item.subtotal_minor, item.currency)::text,
          private.decimal_amount(item.discount_minor, item.currency)::text, private.decimal_amount(item.cgst, item.currency)::text,
          private.decimal_amount(item.sgst, item.currency)::text, private.decimal_amount(item.igst, item.currency)::text,
          private.decimal_amount(item.tax_minor - item.cgst - item.sgst - item.igst, item.currency)::text,
          private.decimal_amount(item.tax_minor, item.currency)::text, private.decimal_amount(item.total_minor, item.currency)::text,
          private.decimal_amount(item.amount_paid_minor, item.currency)::text,
          private.decimal_amount(item.credited_minor, item.currency)::text,
          private.decimal_amount(
            case when item.document = 'invoice' and item.status in ('open', 'uncollectible')
              then item.total_minor - item.amount_paid_minor - item.credited_minor else 0 end, item.currency)::text,
          item.id
        )
        order by item.dated, item.number)
      from (
        select every.*
        from (
          select
            'invoice' as document, invoice.invoice_number as number, invoice.invoice_date as dated, invoice.due_date,
            invoice.status::text, null::text as against, invoice.customer, invoice.first_day, invoice.last_day, invoice.currency,
            invoice.subtotal_minor, invoice.discount_minor, invoice.tax_minor, invoice.total_minor, invoice.amount_paid_minor,
            invoice.credited_minor,
            invoice.id, levied.cgst, levied.sgst, levied.igst
          from public.invoices as invoice
          cross join lateral (
            select
              coalesce(sum(tax.amount_minor) filter (where tax.name = 'CGST'), 0)::bigint as cgst,
              coalesce(sum(tax.amount_minor) filter (where tax.name = 'SGST'), 0)::bigint as sgst,
              coalesce(sum(tax.amount_minor) filter (where tax.name = 'IGST'), 0)::bigint as igst
            from public.invoice_taxes as tax
            where tax.organization_id = invoice.organization_id and tax.invoice_id = invoice.id
          ) as levied
          where invoice.organization_id = organization and invoice.status <> 'draft'
            and invoice.invoice_date between from_day and to_day
          union all
          select
            'credit_note', note.credit_note_number, note.credit_note_date, null, note.status::text, invoice.invoice_number,
            note.customer, null, null, note.currency, -note.subtotal_minor, 0, -note.tax_minor, -note.total_minor, 0, 0, note.id,
            -levied.cgst, -levied.sgst, -levied.igst
          from public.credit_notes as note
          join public.invoices as invoice on invoice.organization_id = note.organization_id and invoice.id = note.invoice_id
          cross join lateral (
            select
              coalesce(sum(tax.amount_minor) filter (where tax.name = 'CGST'), 0)::bigint as cgst,
              coalesce(sum(tax.amount_minor) filter (where tax.name = 'SGST'), 0)::bigint as sgst,
              coalesce(sum(tax.amount_minor) filter (where tax.name = 'IGST'), 0)::bigint as igst
            from public.credit_note_taxes as tax
            where tax.organization_id = note.organization_id and tax.credit_note_id = note.id
          ) as levied
          where note.organization_id = organization and note.status <> 'draft' and note.credit_note_date between from_day and to_day
        ) as every
        order by every.dated, every.number
        limit 10001
      ) as item
    ), '[]')
  );
end
$$;

create or replace function private.export_invoice_lines(from_day date, to_day date) returns jsonb
language plpgsql stable security definer set search_path = ''
as $$
declare
  organization uuid := private.require_org('billing.view');
begin
  perform private.check_export_days(from_day, to_day);
  return jsonb_build_object(
    'columns', jsonb_build_array(
      'document', 'number', 'date', 'line', 'kind', 'meter', 'description', 'sac', 'quantity', 'unit', 'unit_price', 'price_units',
      'currency', 'amount', 'discount'
    ),
    'rows', coalesce((
      select jsonb_agg(
        jsonb_build_array(
          item.document, item.number, item.dated, item.position, item.kind, item.meter_key, item.description, item.sac, item.quantity,
          item.unit, private.decimal_amount(item.unit_price_minor, item.currency)::text, item.price_units, item.currency,
          private.decimal_amount(item.amount_minor, item.currency)::text, private.decimal_amount(item.discount_minor, item.currency)::text
        )
        order by item.dated, item.number, item.position)
      from (
        select every.*
        from (
          select
            'invoice' as document, invoice.invoice_number as number, invoice.invoice_date as dated, line.position, line.kind,
            line.meter_key, line.description, invoice.issuer ->> 'sac_code' as sac, line.quantity, line.unit, line.unit_price_minor,
            line.price_units, invoice.currency, line.amount_minor, line.discount_minor
          from public.invoices as invoice
          join public.invoice_lines as line on line.organization_id = invoice.organization_id and line.invoice_id = invoice.id
          where invoice.organization_id = organization and invoice.status <> 'draft'
            and invoice.invoice_date between from_day and to_day
          union all
          select
            'credit_note', note.credit_note_number, note.credit_note_date, line.position, 'credit', null, line.description,
            note.issuer ->> 'sac_code', null, null, null, null, note.currency, -line.amount_minor, 0
          from public.credit_notes as note
          join public.credit_note_lines as line on line.organization_id = note.organization_id and line.credit_note_id = note.id
          where note.organization_id = organization and note.status <> 'draft' and note.credit_note_date between from_day and to_day
        ) as every
        order by every.dated, every.number, every.position
        limit 10001
      ) as item
    ), '[]')
  );
end
$$;

create or replace function private.gstr1(organization uuid, from_day date, to_day date) returns jsonb
language sql stable set search_path = ''
as $$
  with given as (
    select
      'invoice' as document, invoice.invoice_number as number, invoice.invoice_date as dated, invoice.issuer, invoice.customer,
      invoice.currency, invoice.subtotal_minor - invoice.discount_minor as subtotal_minor, invoice.total_minor,
      invoice.total_minor as invoice_total, 1 as sign, invoice.organization_id, invoice.id as invoice_id, levied.*
    from public.invoices as invoice
    cross join lateral (
      select
        coalesce(sum(tax.rate_bp), 0)::integer as rate_bp,
        coalesce(sum(tax.amount_minor) filter (where tax.name = 'CGST'), 0)::bigint as camt,
        coalesce(sum(tax.amount_minor) filter (where tax.name = 'SGST'), 0)::bigint as samt,
        coalesce(sum(tax.amount_minor) filter (where tax.name = 'IGST'), 0)::bigint as iamt
      from public.invoice_taxes as tax
      where tax.organization_id = invoice.organization_id and tax.invoice_id = invoice.id
    ) as levied
    where invoice.status not in ('draft', 'void')
      and (invoice.organization_id = $1 or $1 is null)
      and invoice.invoice_date between $2 and $3
    union all
    select
      'credit_note', note.credit_note_number, note.credit_note_date, note.issuer, note.customer, note.currency, note.subtotal_minor,
      note.total_minor, invoice.total_minor, -1, invoice.organization_id, invoice.id, levied.*
    from public.credit_notes as note
    join public.invoices as invoice on invoice.organization_id = note.organization_id and invoice.id = note.invoice_id
    cross join lateral (
      select
        coalesce(sum(tax.rate_bp), 0)::integer,
        coalesce(sum(tax.amount_minor) filter (where tax.name = 'CGST'), 0)::bigint,
        coalesce(sum(tax.amount_minor) filter (where tax.name = 'SGST'), 0)::bigint,
        coalesce(sum(tax.amount_minor) filter (where tax.name = 'IGST'), 0)::bigint
      from public.credit_note_taxes as tax
      where tax.organization_id = note.organization_id and tax.credit_note_id = note.id
    ) as levied
    where note.status <> 'draft'
      and (note.organization_id = $1 or $1 is null)
      and note.credit_note_date between $2 and $3
  ),
  placed as (
    select
      given.*, given.customer ->> 'gstin' as ctin, receiver.code as pos,
      receiver.code is distinct from supplier.code as is_inter_state,
      given.issuer ->> 'country_code' = 'IN' and given.customer ->> 'country_code' = 'IN' and given.currency = 'INR'
        and receiver.code is not null as is_domestic,
      -- Where nothing says how its tax is treated, a person does.
      given.issuer ->> 'country_code' = 'IN' and given.customer ->> 'country_code' <> 'IN' and given.currency = 'INR' and exists (
        select
        from public.invoice_taxes as tax
        where tax.organization_id = given.organization_id and tax.invoice_id = given.invoice_id and tax.name = 'IGST'
      ) as is_export,
      case when exists (
        select
        from public.invoice_taxes as tax
        where tax.organization_id = given.organization_id and tax.invoice_id = given.invoice_id and tax.treatment = 'reverse_charge'
      ) then 'Y' else 'N' end as rchrg
    from given
    -- Documents of before the place of supply was written on them say it by their codes.
    left join private.gst_states as receiver
      on receiver.code = coalesce(left(given.customer ->> 'gstin', 2), left(given.customer ->> 'place_of_supply', 2), given.customer ->> 'state_code')
      or not given.customer ?| array['gstin', 'place_of_supply'] and receiver.letters = given.customer ->> 'state_code'
    left join private.gst_states as supplier
      on supplier.code = coalesce(left(given.issuer ->> 'gstin', 2), left(given.issuer ->> 'place_of_supply', 2), given.issuer ->> 'state_code')
      or not given.issuer ?| array['gstin', 'place_of_supply'] and supplier.letters = given.issuer ->> 'state_code'
  ),
  sorted as (
    select
      placed.*,
      case
        when placed.is_export then case placed.document when 'invoice' then 'exp' else 'cdnur' end
        when not placed.is_domestic then 'left_out'
        when placed.ctin is not null then case placed.document when 'invoice' then 'b2b' else 'cdnr' end
        -- A large one to an unregistered buyer of another state is told alone: above a lakh of rupees.
        when placed.is_inter_state and placed.invoice_total > 10000000 then case placed.document when 'invoice' then 'b2cl' else 'cdnur' end
        else 'b2cs'
      end as section,
      jsonb_build_array(jsonb_build_object('num', 1, 'itm_det', jsonb_build_object(
        'txval', private.decimal_amount(placed.subtotal_minor, 'INR'), 'rt', round(placed.rate_bp / 100.0, 2),
        'camt', private.decimal_amount(placed.camt, 'INR'), 'samt', private.decimal_amount(placed.samt, 'INR'),
        'iamt', private.decimal_amount(placed.iamt, 'INR'), 'csamt', 0
      ))) as itms,
      to_char(placed.dated, 'DD-MM-YYYY') as idt,
      private.decimal_amount(placed.total_minor, 'INR') as val
    from placed
  )
  select jsonb_build_object(
    'gstin', (select issuer.gstin from private.billing_issuer as issuer),
    'fp', to_char($3, 'MMYYYY'),
    'b2b', coalesce((
      select jsonb_agg(jsonb_build_object('ctin', buyer.ctin, 'inv', buyer.inv) order by buyer.ctin)
      from (
        select
          sorted.ctin,
          jsonb_agg(
            jsonb_build_object(
              'inum', sorted.number, 'idt', sorted.idt, 'val', sorted.val, 'pos', sorted.pos, 'rchrg', sorted.rchrg, 'inv_typ', 'R', 'itms', sorted.itms
            )
            order by sorted.number) as inv
        from sorted
        where sorted.section = 'b2b'
        group by sorted.ctin
      ) as buyer
    ), '[]'),
    'b2cl', coalesce((
      select jsonb_agg(jsonb_build_object('pos', place.pos, 'inv', place.inv) order by place.pos)
      from (
        select
          sorted.pos,
          jsonb_agg(
            jsonb_build_object('inum', sorted.number, 'idt', sorted.idt, 'val', sorted.val, 'itms', sorted.itms)
            order by sorted.number) as inv
        from sorted
        where sorted.section = 'b2cl'
        group by sorted.pos
      ) as place
    ), '[]'),
    'b2cs', coalesce((
      select jsonb_agg(
        jsonb_build_object(
          'sply_ty', case when rest.is_inter_state then 'INTER' else 'INTRA' end, 'pos', rest.pos, 'typ', 'OE',
          'rt', round(rest.rate_bp / 100.0, 2), 'txval', private.decimal_amount(rest.txval, 'INR'),
          'camt', private.decimal_amount(rest.camt, 'INR'), 'samt', private.decimal_amount(rest.samt, 'INR'),
          'iamt', private.decimal_amount(rest.iamt, 'INR'), 'csamt', 0
        )
        order by rest.pos, rest.rate_bp)
      from (
        select
          sorted.is_inter_state, sorted.pos, sorted.rate_bp, sum(sorted.sign * sorted.subtotal_minor)::bigint as txval,
          sum(sorted.sign * sorted.camt)::bigint as camt, sum(sorted.sign * sorted.samt)::bigint as samt,
          sum(sorted.sign * sorted.iamt)::bigint as iamt
        from sorted
        where sorted.section = 'b2cs'
        group by sorted.is_inter_state, sorted.pos, sorted.rate_bp
      ) as rest
    ), '[]'),
    'cdnr', coalesce((
      select jsonb_agg(jsonb_build_object('ctin', buyer.ctin, 'nt', buyer.nt) order by buyer.ctin)
      from (
        select
          sorted.ctin,
          jsonb_agg(
            jsonb_build_object(
              'ntty', 'C', 'nt_num', sorted.number, 'nt_dt', sorted.idt, 'val', sorted.val, 'pos', sorted.pos, 'rchrg', sorted.rchrg, 'inv_typ', 'R',
              'itms', sorted.itms
            )
            order by sorted.number) as nt
        from sorted
        where sorted.section = 'cdnr'
        group by sorted.ctin
      ) as buyer
    ), '[]'),
    'cdnur', coalesce((
      select jsonb_agg(
        jsonb_build_object(
          'typ', case when not sorted.is_export then 'B2CL' when sorted.iamt = 0 then 'EXPWOP' else 'EXPWP' end, 'ntty', 'C', 'nt_num', sorted.number, 'nt_dt', sorted.idt, 'val', sorted.val, 'pos', sorted.pos, 'itms', sorted.itms
        )
        order by sorted.number)
      from sorted
      where sorted.section = 'cdnur'
    ), '[]'),
    'exp', coalesce((
      select jsonb_agg(jsonb_build_object('exp_typ', way.exp_typ, 'inv', way.inv) order by way.exp_typ)
      from (
        select
          case when sorted.iamt = 0 then 'WOPAY' else 'WPAY' end as exp_typ,
          jsonb_agg(
            jsonb_build_object('inum', sorted.number, 'idt', sorted.idt, 'val', sorted.val, 'itms', jsonb_build_array(
              jsonb_build_object(
                'txval', private.decimal_amount(sorted.subtotal_minor, 'INR'), 'rt', round(sorted.rate_bp / 100.0, 2),
                'iamt', private.decimal_amount(sorted.iamt, 'INR'), 'csamt', 0
              )
            ))
            order by sorted.number) as inv
        from sorted
        where sorted.section = 'exp'
        group by 1
      ) as way
    ), '[]'),
    'left_out', coalesce((
      select jsonb_agg(sorted.number order by sorted.number)
      from sorted
      where sorted.section = 'left_out'
    ), '[]')
  )
$$;
comment on function private.gstr1(uuid, date, date) is
  'What was billed in a range of days in the sections and field names of India''s GSTR-1, for one organization or, with null, for all: '
  'the operator''s own return. left_out names what is not in rupees, without a known place, or abroad without a word on its tax, for a person to '
  'report.';

create function private.discount_shares(
  room bigint, weights bigint[], percents integer[], amounts bigint[], out shares bigint[], out cuts bigint[]
)
language plpgsql immutable set search_path = ''
as $$
declare
  cut bigint;
begin
  shares := array_fill(0::bigint, array[cardinality(weights)]);
  cuts := '{}';
  for number in 1 .. cardinality(percents) loop
    cut := coalesce(private.divide_half_away(room::numeric * percents[number], 10000), least(amounts[number], room));
    if cut > 0 then
      -- No line goes below nothing: what one has lost already is no weight any more.
      shares := array(
        select share.before + share.more
        from unnest(
          shares,
          private.allocate_largest_remainder(cut, array(
            select (line.whole - line.gone)::numeric
            from unnest(weights, shares) with ordinality as line (whole, gone, number)
            order by line.number
          ))
        ) with ordinality as share (before, more, number)
        order by share.number
      );
      room := room - cut;
    end if;
    cuts := cuts || cut;
  end loop;
end
$$;
comment on function private.discount_shares(bigint, bigint[], integer[], bigint[]) is
  'Percentages (in hundredths, null for an amount) and amounts taken off one after the other, each of what is left of `room`, which is no '
  'more than the weights come to: what each takes off in all, and what it takes off each line, split by what is left of the lines.';

create function private.billed_base(live public.subscriptions) returns public.invoice_lines
language sql stable set search_path = ''
as $$
  select line
  from public.invoices as invoice
  join public.invoice_lines as line on line.organization_id = invoice.organization_id and line.invoice_id = invoice.id
  where invoice.organization_id = live.organization_id and invoice.subscription_id = live.id
    and invoice.status in ('open', 'paid', 'uncollectible')
    and line.kind in ('base', 'charge') and line.amount_minor = live.base_billed_minor
    and coalesce(line.last_day, invoice.last_day) = (live.current_period_end at time zone live.timezone)::date - 1
  order by invoice.period_start desc, line.position desc
  limit 1
$$;
comment on function private.billed_base(public.subscriptions) is
  'The line that charged the base price of what is left of the current period; null where no invoice has one.';

create or replace function private.apply_plan_change(
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
  billed public.invoice_lines;
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
    billed := private.billed_base(live);
    insert into private.invoice_items (
      organization_id, subscription_id, kind, currency, description, unit, unit_price_minor, amount_minor, first_day, last_day, created_at,
      discount_minor
    )
    select
      live.organization_id, live.id, item.kind, old.currency, item.description, private.cycle_unit(cycle), item.price_minor, item.amount_minor,
      (item.from_time at time zone live.timezone)::date, last_day, at,
      -- The discount of the line that is given back goes back with it.
      case
        when item.kind = 'credit' and billed.id is not null
          then -private.prorate(
            billed.discount_minor, extract(epoch from live.current_period_end - moment),
            extract(epoch from live.current_period_end - stretch_from))
      end
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
    invoices := private.open_invoices((private.bill_periods(array[live.id], issuer, at, true)).drafts, issuer, at);
  end if;
  return jsonb_build_object(
    'result', 'changed', 'timing', timing, 'effective_at', moment, 'credit_minor', -credit, 'charge_minor', charge, 'invoices', invoices
  );
end
$$;

create or replace function private.apply_cancellation(organization uuid, timing text, reason text, at timestamptz) returns jsonb
language plpgsql set search_path = ''
as $$
declare
  live public.subscriptions;
  ends timestamptz;
  unused bigint := 0;
  given_back bigint := 0;
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
    billed := private.billed_base(live);
    if billed.id is not null then
      given_back := unused - private.prorate(
        billed.discount_minor, extract(epoch from live.current_period_end - ends),
        extract(epoch from live.current_period_end - live.base_billed_from));
    end if;
    if given_back > 0 then
      perform private.issue_credit_note(
        jsonb_build_object(
          'invoice_id', billed.invoice_id, 'idempotency_key', 'cancelled ' || live.id, 'reason', 'Cancelled before the end of the period',
          'lines', jsonb_build_array(jsonb_build_object('invoice_line_id', billed.id, 'amount_minor', given_back))
        ), at);
    elsif billed.id is null then
      given_back := unused;
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
  return jsonb_build_object('result', 'cancelled', 'ends_at', ends, 'credit_minor', given_back);
end
$$;

create function private.discount_summary(discount private.discounts) returns jsonb
language plpgsql immutable set search_path = ''
as $$
begin
  return jsonb_build_object(
    'id', discount.id, 'name', discount.name, 'coupon', discount.coupon_code, 'percent_bp', discount.percent_bp,
    'amount_minor', discount.amount_minor, 'currency', discount.currency,
    'invoices_left', discount.invoices - discount.applied
  );
end
$$;
comment on function private.discount_summary(private.discounts) is 'A discount as answers say it; `invoices_left` null is for ever.';

create function private.live_discounts(subscription_id uuid) returns jsonb
language sql stable set search_path = ''
as $$
  select coalesce(jsonb_agg(private.discount_summary(discount) order by discount.number), '[]')
  from private.discounts as discount
  where discount.subscription_id = $1 and discount.ended_at is null
$$;
comment on function private.live_discounts(uuid) is 'What is taken off a subscription''s next invoice, in its order.';

create function private.check_discount_terms(terms jsonb) returns void
language plpgsql immutable set search_path = ''
as $$
begin
  if jsonb_typeof(terms) is distinct from 'object'
    or coalesce(btrim(terms ->> 'name'), '') = '' or length(terms ->> 'name') > 100
    or (terms ->> 'percent_bp' is null) = (terms ->> 'amount_minor' is null)
    or (terms ->> 'amount_minor' is null) <> (terms ->> 'currency' is null)
    or terms ->> 'percent_bp' !~ '^[0-9]{1,5}$' or (terms ->> 'percent_bp')::numeric not between 1 and 10000
    or terms ->> 'amount_minor' !~ '^[0-9]{1,15}$' or (terms ->> 'amount_minor')::numeric = 0
    or terms ->> 'currency' !~ '^[A-Z]{3}$'
    or terms ->> 'invoices' !~ '^[0-9]{1,4}$' or (terms ->> 'invoices')::numeric = 0 then
    perform private.raise_error(
      400, 'invalid_request', 'A discount has a name and either percent_bp, or amount_minor and currency; invoices is a number or left out',
      'terms');
  end if;
end
$$;
comment on function private.check_discount_terms(jsonb) is 'Ends the request with 400 unless it says a discount.';

create function private.set_coupon(code text, terms jsonb, at timestamptz) returns text
language plpgsql security definer set search_path = ''
as $$
declare
  known private.coupons;
begin
  perform private.check_discount_terms(terms);
  if coalesce(code, '') !~ '^[A-Z0-9][A-Z0-9_-]{0,39}$' then
    perform private.raise_error(400, 'invalid_request', 'A code is of capitals, digits, - and _, 40 at most', 'code');
  end if;
  insert into private.coupons as own (
    code, name, percent_bp, amount_minor, currency, invoices, max_redemptions, valid_from, valid_to, created_at
  )
  values (
    set_coupon.code, terms ->> 'name', (terms ->> 'percent_bp')::integer, (terms ->> 'amount_minor')::bigint, terms ->> 'currency',
    (terms ->> 'invoices')::integer, (terms ->> 'max_redemptions')::integer, coalesce((terms ->> 'valid_from')::timestamptz, at),
    (terms ->> 'valid_to')::timestamptz, at
  )
  on conflict on constraint coupons_pkey do update
  set name = excluded.name, max_redemptions = excluded.max_redemptions, valid_to = excluded.valid_to
  returning own.* into known;
  if (known.percent_bp, known.amount_minor, known.currency, known.invoices) is distinct from (
    (terms ->> 'percent_bp')::integer, (terms ->> 'amount_minor')::bigint, terms ->> 'currency', (terms ->> 'invoices')::integer
  ) then
    perform private.raise_error(409, 'coupon_in_use', 'What a code takes off does not change: choose another code', 'code');
  end if;
  return known.code;
end
$$;
comment on function private.set_coupon(text, jsonb, timestamptz) is
  'For the operator: a code that takes off {"name","percent_bp"|"amount_minor","currency","invoices","max_redemptions","valid_to"}. Again '
  'under the same code, its name, its limit and its end change; what it takes off does not.';

create function private.add_discount(organization_id uuid, terms jsonb, idempotency_key text, at timestamptz) returns uuid
language plpgsql security definer set search_path = ''
as $$
declare
  subscription public.subscriptions := private.live_subscription(organization_id);
  money text := (select price.currency from public.plan_prices as price where price.id = subscription.plan_price_id);
  discount private.discounts;
begin
  perform private.check_discount_terms(terms);
  if subscription.id is null then
    perform private.raise_error(402, 'subscription_inactive', 'There is no live subscription, so nothing will be billed');
  end if;
  if coalesce(length(idempotency_key), 0) not between 1 and 255 then
    perform private.raise_error(400, 'invalid_request', 'idempotency_key must be a text of 1 to 255 characters', 'idempotency_key');
  end if;
  if terms ->> 'currency' <> money then
    perform private.raise_error(422, 'currency_differs', 'The subscription is billed in another currency', 'currency');
  end if;
  insert into private.discounts as known (
    organization_id, subscription_id, name, percent_bp, amount_minor, currency, invoices, idempotency_key, created_at
  )
  values (
    add_discount.organization_id, subscription.id, terms ->> 'name', (terms ->> 'percent_bp')::integer, (terms ->> 'amount_minor')::bigint,
    terms ->> 'currency', (terms ->> 'invoices')::integer, add_discount.idempotency_key, at
  )
  on conflict on constraint discounts_key do nothing
  returning known.* into discount;
  if discount.id is null then
    select known.* into discount
    from private.discounts as known
    where known.organization_id = add_discount.organization_id and known.idempotency_key = add_discount.idempotency_key;
    if (discount.name, discount.percent_bp, discount.amount_minor, discount.invoices) is distinct from (
      terms ->> 'name', (terms ->> 'percent_bp')::integer, (terms ->> 'amount_minor')::bigint, (terms ->> 'invoices')::integer
    ) then
      perform private.raise_error(409, 'idempotency_conflict', 'Another discount was given under this key', 'idempotency_key');
    end if;
    return discount.id;
  end if;
  perform private.audit(
    discount.organization_id, 'discount.given', 'discount', discount.id, private.discount_summary(discount) - 'id', at
  );
  return discount.id;
end
$$;
comment on function private.add_discount(uuid, jsonb, text, timestamptz) is
  'For the operator: takes {"name","percent_bp"|"amount_minor","currency","invoices"} off an organization''s next invoices, once a key; '
  '`invoices` 1 is the next one alone, left out is all.';

create function private.end_discount(discount_id uuid, at timestamptz) returns boolean
language plpgsql security definer set search_path = ''
as $$
declare
  ended private.discounts;
begin
  update private.discounts as own
  set ended_at = at
  where own.id = discount_id and own.ended_at is null
  returning own.* into ended;
  if not found then
    return false;
  end if;
  perform private.audit(ended.organization_id, 'discount.ended', 'discount', ended.id, private.discount_summary(ended) - 'id', at);
  return true;
end
$$;
comment on function private.end_discount(uuid, timestamptz) is 'For the operator: nothing more is taken off; whether there was anything to end.';

create function private.apply_coupon(organization uuid, code text, at timestamptz) returns jsonb
language plpgsql set search_path = ''
as $$
declare
  live public.subscriptions := private.lock_subscription(organization, at);
  money text := (select price.currency from public.plan_prices as price where price.id = live.plan_price_id);
  wanted text := upper(btrim(code));
  coupon private.coupons;
  discount private.discounts;
begin
  if live.id is null then
    perform private.raise_error(402, 'subscription_inactive', 'There is no live subscription');
  end if;
  if exists (select from private.discounts as known where known.organization_id = organization and known.coupon_code = wanted) then
    perform private.raise_error(409, 'coupon_redeemed', 'The coupon was redeemed already', 'code');
  end if;
  -- Others who redeem it wait here, and see what is left of it.
  select own.* into coupon from private.coupons as own where own.code = wanted and own.valid_from <= at for no key update;
  if not found then
    perform private.raise_error(404, 'coupon_not_found', 'There is no such coupon', 'code');
  end if;
  if coupon.valid_to <= at or coupon.redeemed >= coupon.max_redemptions then
    perform private.raise_error(409, 'coupon_exhausted', 'The coupon has ended', 'code');
  end if;
  if coupon.currency <> money then
    perform private.raise_error(422, 'currency_differs', 'The coupon is of another currency than the subscription', 'code');
  end if;
  update private.coupons as own set redeemed = own.redeemed + 1 where own.code = wanted;
  insert into private.discounts as own (
    organization_id, subscription_id, coupon_code, name, percent_bp, amount_minor, currency, invoices, created_at
  )
  values (
    organization, live.id, coupon.code, coupon.name, coupon.percent_bp, coupon.amount_minor, coupon.currency, coupon.invoices, at
  )
  returning own.* into discount;
  perform private.audit(
    organization, 'coupon.redeemed', 'discount', discount.id, private.discount_summary(discount) - 'id', at
  );
  return jsonb_build_object('result', 'redeemed', 'discount', private.discount_summary(discount));
end
$$;
comment on function private.apply_coupon(uuid, text, timestamptz) is
  'Takes what a coupon says off the subscription''s invoices from the next one on. An organization redeems a coupon once, and all of them '
  'together as often as it may be redeemed.';

create function private.redeem_coupon(code text, idempotency_key text, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  organization uuid := private.require_org('billing.manage');
  request jsonb := jsonb_build_object('action', 'redeem_coupon', 'code', code);
  answer jsonb := private.repeated_request(organization, idempotency_key, request);
begin
  return coalesce(answer, private.answer_request(
    organization, idempotency_key, request, private.apply_coupon(organization, code, at), at));
end
$$;
comment on function private.redeem_coupon(text, text, timestamptz) is 'apply_coupon for the caller''s organization. Needs billing.manage.';

create function public.redeem_coupon(code text, idempotency_key text default null) returns jsonb
language sql set search_path = ''
as $$
  select private.redeem_coupon(code, idempotency_key, private.clock_now())
$$;
comment on function public.redeem_coupon(text, text) is
  'Redeems a coupon for the caller''s subscription: {"result":"redeemed","discount":{"name","percent_bp","amount_minor","currency",'
  '"invoices_left"}}. Needs billing.manage.';

-- Triggers ------------------------------------------------------------------------------------------------------------------------

drop trigger guard_invoice on public.invoices;
drop trigger set_invoice_number_trigger on public.invoices;
drop trigger update_modified_column on public.invoices;
drop trigger invoices_add_up on public.invoices;
-- What the run does to its own drafts, thousands at a time, is judged by the statement; whatever else happens, row by row.
create trigger guard_invoice before update on public.invoices
  for each row when (old.status <> 'draft' or new.status not in ('draft', 'open')) execute function private.guard_invoice();
create trigger guard_deleted_invoice before delete on public.invoices
  for each row execute function private.guard_invoice();
create trigger set_invoice_number_trigger before insert or update of status on public.invoices
  for each row when (new.status <> 'draft' and new.invoice_number is null) execute function private.set_invoice_number();
create trigger update_modified_column before update on public.invoices
  for each row when (old.status <> 'draft') execute function private.update_modified_column();
create trigger changed_invoices_add_up after update on public.invoices
  referencing new table as changed for each statement execute function private.check_changed_sums();
create constraint trigger invoices_add_up after insert on public.invoices
  deferrable initially deferred
  for each row when (new.status <> 'draft') execute function private.check_invoice_sums();
drop trigger update_modified_column on public.subscriptions;
create trigger update_modified_column before update on public.subscriptions
  for each row when (new.updated_at is not distinct from old.updated_at) execute function private.update_modified_column();

-- Who may call them ---------------------------------------------------------------------------------------------------------------

revoke all on function
  private.named_discounts(jsonb), private.check_changed_sums(), private.settle_lines(uuid, text, boolean, private.priced_line[]),
  private.price_periods(uuid[], private.billing_issuer, timestamptz, boolean),
  private.bill_periods(uuid[], private.billing_issuer, timestamptz, boolean)
from public, anon, authenticated;
revoke all on function private.billed_base(public.subscriptions), private.discount_shares(bigint, bigint[], integer[], bigint[])
from public, anon, authenticated, service_role;
revoke all on function
  private.discount_summary(private.discounts), private.live_discounts(uuid), private.check_discount_terms(jsonb),
  private.set_coupon(text, jsonb, timestamptz), private.add_discount(uuid, jsonb, text, timestamptz),
  private.end_discount(uuid, timestamptz), private.apply_coupon(uuid, text, timestamptz), private.redeem_coupon(text, text, timestamptz),
  public.redeem_coupon(text, text)
from public, anon, authenticated, service_role;
grant execute on function private.redeem_coupon(text, text, timestamptz), public.redeem_coupon(text, text) to authenticated;
