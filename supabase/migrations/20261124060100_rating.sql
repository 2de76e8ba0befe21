-- What quantities cost is worked out in one place: tiers, packages, shares, taxes, and the month of a document's number.

set local lock_timeout = '5s';
set local statement_timeout = '60s';

-- A price, a tax, a share of a period ---------------------------------------------------------------------------------------------

create function private.rate_units(quantity numeric, price_minor numeric, price_units numeric) returns bigint
language plpgsql immutable set search_path = ''
as $$
begin
  return private.divide_half_away(quantity * price_minor, price_units);
end
$$;
comment on function private.rate_units(numeric, numeric, numeric) is
  'What a quantity costs when each `price_units` of it cost `price_minor`: a line.';

create function private.tax_amount(taxable_minor bigint, rate_bp numeric) returns bigint
language plpgsql immutable set search_path = ''
as $$
begin
  return private.divide_half_away(taxable_minor * rate_bp, 10000);
end
$$;
comment on function private.tax_amount(bigint, numeric) is
  'One component of tax on a net amount, rounded alone; the rate is in hundredths of a percent.';

create function private.gst_amounts(
  net_minor bigint, is_intra_state boolean, rate_bp numeric, out cgst_minor bigint, out sgst_minor bigint, out igst_minor bigint
)
language plpgsql immutable set search_path = ''
as $$
begin
  cgst_minor := case when is_intra_state then private.tax_amount(net_minor, rate_bp / 2) else 0 end;
  sgst_minor := cgst_minor;
  igst_minor := case when is_intra_state then 0 else private.tax_amount(net_minor, rate_bp) end;
end
$$;
comment on function private.gst_amounts(bigint, boolean, numeric) is
  'GST of India by component: half and half within a state, whole between states. The halves may differ from the whole by one unit.';

create function private.prorate(amount_minor bigint, numerator numeric, denominator numeric) returns bigint
language plpgsql immutable set search_path = ''
as $$
begin
  if denominator <= 0 then
    raise exception 'a share needs a positive denominator' using errcode = '22023';
  end if;
  return private.divide_half_away(amount_minor * numerator, denominator);
end
$$;
comment on function private.prorate(bigint, numeric, numeric) is
  'The part of an amount for the part of its period, rounded once; a credit is the mirror of its charge.';

create function private.allocate_largest_remainder(total_minor bigint, weights numeric[]) returns bigint[]
language plpgsql immutable set search_path = ''
as $$
declare
  whole numeric := (select sum(given.weight) from unnest(weights) as given (weight));
begin
  if whole is null or whole <= 0 or exists (select from unnest(weights) as given (weight) where coalesce(given.weight, -1) < 0) then
    raise exception 'weights are not negative, and one is positive' using errcode = '22023';
  end if;
  return (
    with share as (
      select
        given.position,
        div(abs(total_minor) * given.weight, whole) as units,
        row_number() over (order by mod(abs(total_minor) * given.weight, whole) desc, given.position) as rank
      from unnest(weights) with ordinality as given (weight, position)
    ),
    missing as (
      select abs(total_minor) - sum(share.units) as units
      from share
    )
    select array_agg(
      (sign(total_minor) * (share.units + case when share.rank <= missing.units then 1 else 0 end))::bigint order by share.position)
    from share, missing
  );
end
$$;
comment on function private.allocate_largest_remainder(bigint, numeric[]) is
  'An amount split by weights into whole units that add up to it: what is missing goes to the largest remainders, the first of equal ones.';

-- Tiers and packages --------------------------------------------------------------------------------------------------------------

create type private.price_tier as (
  up_to            numeric,
  unit_price_minor numeric,
  flat_minor       bigint
);
comment on type private.price_tier is
  'A step of a price: up to and with so many units, null without end, a unit costs so much, and whoever reaches it pays its flat fee.';

create function private.check_tiers(tiers private.price_tier[]) returns void
language plpgsql immutable set search_path = ''
as $$
begin
  if coalesce(cardinality(tiers), 0) = 0
    or exists (
      select
      from (
        select
          given.*, lag(given.up_to, 1, 0::numeric) over (order by given.position) as lower_bound,
          given.position = cardinality(tiers) as is_last
        from unnest(tiers) with ordinality as given (up_to, unit_price_minor, flat_minor, position)
      ) as tier
      where tier.unit_price_minor is null or tier.flat_minor is null or (tier.up_to is null) <> tier.is_last
        or tier.up_to <= tier.lower_bound
    ) then
    raise exception 'tiers rise, have prices, and the last one alone has no end' using errcode = '22023';
  end if;
end
$$;
comment on function private.check_tiers(private.price_tier[]) is 'Fails unless every quantity has its tier.';

create function private.graduated_tiers(tiers private.price_tier[], after_quantity numeric, quantity numeric, price_units numeric)
returns table (tier bigint, tier_quantity numeric, cost numeric)
language plpgsql immutable set search_path = ''
as $$
begin
  perform private.check_tiers(tiers);
  if coalesce(after_quantity, -1) < 0 or coalesce(quantity, -1) < 0 or coalesce(price_units, 0) <= 0 then
    raise exception 'quantities are not negative, and a price is for something' using errcode = '22023';
  end if;
  return query
    select reached.position, reached.units, reached.units * reached.unit_price_minor
      + case
        when reached.lower_bound >= after_quantity and reached.lower_bound < after_quantity + quantity then reached.flat_minor * price_units
        else 0
      end
    from (
      select
        bounded.*,
        greatest(least(bounded.up_to, after_quantity + quantity) - greatest(bounded.lower_bound, after_quantity), 0) as units
      from (
        select given.*, lag(given.up_to, 1, 0::numeric) over (order by given.position) as lower_bound
        from unnest(tiers) with ordinality as given (up_to, unit_price_minor, flat_minor, position)
      ) as bounded
    ) as reached
    order by reached.position;
end
$$;
comment on function private.graduated_tiers(private.price_tier[], numeric, numeric, numeric) is
  'How much of a quantity that follows another falls into each tier, and its exact cost times `price_units`, flat fees of tiers that it '
  'is the first to reach included.';

create function private.rate_graduated(
  tiers private.price_tier[], quantity numeric, flat_at_zero boolean default false, price_units numeric default 1
) returns bigint
language plpgsql immutable set search_path = ''
as $$
begin
  return private.divide_half_away(
    (select sum(part.cost) from private.graduated_tiers(tiers, 0, rate_graduated.quantity, price_units) as part)
      + case when quantity = 0 and flat_at_zero then tiers[1].flat_minor * price_units else 0 end,
    price_units);
end
$$;
comment on function private.rate_graduated(private.price_tier[], numeric, boolean, numeric) is
  'The graduated price: each unit at the price of its own tier, and the flat fees of the tiers reached. Whether nothing owes the first '
  'flat fee is the plan''s choice.';

create function private.rate_graduated_from(
  tiers private.price_tier[], after_quantity numeric, quantity numeric, flat_at_zero boolean default false, price_units numeric default 1
) returns bigint
language plpgsql immutable set search_path = ''
as $$
declare
  cost numeric;
  before numeric;
begin
  select sum(part.cost) into cost from private.graduated_tiers(tiers, after_quantity, rate_graduated_from.quantity, price_units) as part;
  select sum(part.cost) into before from private.graduated_tiers(tiers, 0, after_quantity, price_units) as part;
  if flat_at_zero and after_quantity = 0 then
    before := tiers[1].flat_minor * price_units;
    cost := case when quantity = 0 then 0 else cost - before end;
  end if;
  return private.divide_half_away(before + cost, price_units) - private.divide_half_away(before, price_units);
end
$$;
comment on function private.rate_graduated_from(private.price_tier[], numeric, numeric, boolean, numeric) is
  'What a quantity costs that follows another in the same period: with what that one cost, to the unit the price of both together.';

create function private.rate_volume(
  tiers private.price_tier[], quantity numeric, flat_at_zero boolean default false, price_units numeric default 1
) returns bigint
language plpgsql immutable set search_path = ''
as $$
declare
  reached private.price_tier;
begin
  perform private.check_tiers(tiers);
  if coalesce(quantity, -1) < 0 or coalesce(price_units, 0) <= 0 then
    raise exception 'quantities are not negative, and a price is for something' using errcode = '22023';
  end if;
  if quantity = 0 and not flat_at_zero then
    return 0;
  end if;
  select given.up_to, given.unit_price_minor, given.flat_minor
  into reached
  from unnest(tiers) with ordinality as given (up_to, unit_price_minor, flat_minor, position)
  where given.up_to is null or rate_volume.quantity <= given.up_to
  order by given.position
  limit 1;
  return private.divide_half_away(quantity * reached.unit_price_minor + reached.flat_minor * price_units, price_units);
end
$$;
comment on function private.rate_volume(private.price_tier[], numeric, boolean, numeric) is
  'The volume price: all units at the price of the tier that the quantity falls into, and its flat fee.';

create function private.rate_package(quantity numeric, free_units numeric, package_units numeric, price_minor bigint) returns bigint
language plpgsql immutable set search_path = ''
as $$
begin
  if coalesce(quantity, -1) < 0 or coalesce(free_units, -1) < 0 then
    raise exception 'quantities are not negative, and a price is for something' using errcode = '22023';
  end if;
  return (private.started_units(greatest(quantity - free_units, 0), package_units) * price_minor)::bigint;
end
$$;
comment on function private.rate_package(numeric, numeric, numeric, bigint) is
  'Each started package beyond the free units costs its price.';

create function private.started_units(quantity numeric, unit numeric) returns numeric
language plpgsql immutable set search_path = ''
as $$
begin
  if coalesce(unit, 0) <= 0 then
    raise exception 'what is counted by needs to be positive' using errcode = '22023';
  end if;
  return div(quantity, unit) + case when mod(quantity, unit) > 0 then 1 else 0 end;
end
$$;
comment on function private.started_units(numeric, numeric) is
  'How many units of a size a quantity begins: pulses of a call, packages. By the call or by the sum is the plan''s choice.';

-- What a plan includes ------------------------------------------------------------------------------------------------------------

create function private.rate_beyond_allowance(
  tiers private.price_tier[], quantity numeric, included_units numeric, price_units numeric default 1
) returns bigint[]
language plpgsql immutable set search_path = ''
as $$
begin
  return (
    select array_agg(private.divide_half_away(part.cost, price_units) order by part.tier)
    from private.graduated_tiers(
      tiers, 0, greatest(rate_beyond_allowance.quantity - included_units, 0), price_units
    ) as part
  );
end
$$;
comment on function private.rate_beyond_allowance(private.price_tier[], numeric, numeric, numeric) is
  'What is beyond an allowance, at graduated prices: a line a tier, each rounded alone.';

create function private.rate_base_and_overage(
  base_minor bigint, included_units numeric, quantity numeric, price_minor numeric, price_units numeric, rate_bp numeric,
  out overage_units numeric, out subtotal_minor bigint, out tax_minor bigint, out total_minor bigint
)
language plpgsql immutable set search_path = ''
as $$
begin
  overage_units := greatest(quantity - included_units, 0);
  subtotal_minor := base_minor + private.rate_units(overage_units, price_minor, price_units);
  tax_minor := private.tax_amount(subtotal_minor, rate_bp);
  total_minor := subtotal_minor + tax_minor;
end
$$;
comment on function private.rate_base_and_overage(bigint, numeric, numeric, numeric, numeric, numeric) is
  'A period of one meter: the base price, what was used beyond the included units, and one tax on both.';

-- Time ----------------------------------------------------------------------------------------------------------------------------

create function private.series_month(instant timestamptz, timezone text) returns text
language plpgsql stable set search_path = ''
as $$
begin
  return to_char(instant at time zone timezone, 'YYYYMM');
end
$$;
comment on function private.series_month(timestamptz, text) is 'The month in the number of a document, by its issuer''s time zone.';

create function private.hours_in_period(starts timestamptz, ends timestamptz) returns numeric
language plpgsql immutable set search_path = ''
as $$
begin
  return trim_scale(extract(epoch from ends - starts) / 3600);
end
$$;
comment on function private.hours_in_period(timestamptz, timestamptz) is
  'The hours that pass from one instant to another: a month in which clocks are changed has one more or less.';

revoke all on function
  private.rate_units(numeric, numeric, numeric), private.tax_amount(bigint, numeric),
  private.gst_amounts(bigint, boolean, numeric), private.prorate(bigint, numeric, numeric),
  private.allocate_largest_remainder(bigint, numeric[]), private.check_tiers(private.price_tier[]),
  private.graduated_tiers(private.price_tier[], numeric, numeric, numeric),
  private.rate_graduated(private.price_tier[], numeric, boolean, numeric),
  private.rate_graduated_from(private.price_tier[], numeric, numeric, boolean, numeric),
  private.rate_volume(private.price_tier[], numeric, boolean, numeric), private.rate_package(numeric, numeric, numeric, bigint),
  private.started_units(numeric, numeric), private.rate_beyond_allowance(private.price_tier[], numeric, numeric, numeric),
  private.rate_base_and_overage(bigint, numeric, numeric, numeric, numeric, numeric), private.series_month(timestamptz, text),
  private.hours_in_period(timestamptz, timestamptz)
from public, anon, authenticated, service_role;

-- Who bills calls them ---------------------------------------------------------------------------------------------------------

create or replace function private.set_invoice_number() returns trigger
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
  month := private.series_month(new.finalized_at, new.issuer ->> 'timezone');
  new.invoice_number := private.invoice_number(month, private.take_invoice_numbers(month, 1));
  return new;
end
$$;

create or replace function private.set_credit_note_number() returns trigger
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
    month := private.series_month(new.issued_at, new.issuer ->> 'timezone');
    new.credit_note_number := private.credit_note_number(month, private.take_credit_note_number(month));
  end if;
  return new;
end
$$;

create or replace function private.bill_periods(subscription_ids uuid[], issuer private.billing_issuer, at timestamptz) returns uuid[]
language plpgsql set search_path = ''
as $$
declare
  drafts uuid[];
begin
  with period as materialized (
    select gen_random_uuid() as id, priced.* from private.price_periods(subscription_ids, issuer, at) as priced
  ),
  priced as materialized (
    -- A period that costs nothing makes no invoice: a number and a document for zero would only be noise.
    select period.* from period where period.subtotal_minor > 0
  ),
  draft as (
    insert into public.invoices (
      id, organization_id, subscription_id, currency, period_start, period_end, timezone, first_day, last_day, subtotal_minor,
      tax_minor, total_minor, issuer, customer, created_at, updated_at
    )
    select
      priced.id, priced.organization_id, priced.subscription_id, priced.currency, priced.period_start, priced.period_end,
      priced.timezone, priced.first_day, priced.last_day, priced.subtotal_minor, priced.tax_minor,
      priced.subtotal_minor + priced.tax_minor, priced.issuer_particulars, priced.customer, at, at
    from priced
    returning invoices.id
  ),
  line as (
    insert into public.invoice_lines (
      id, organization_id, invoice_id, position, kind, meter_key, description, quantity, unit, unit_price_minor, price_units, amount_minor
    )
    select
      coalesce(item.line_id, gen_random_uuid()), priced.organization_id, priced.id, item.position, item.kind, item.meter_key,
      item.description, item.quantity, item.unit, item.unit_price_minor, item.price_units, item.amount_minor
    from priced
    cross join lateral unnest(priced.lines) as item
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
    set closed_at = at, plan_price_id = subscription.plan_price_id, billed_count = log.usage_count - log.prepaid
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
  end if;

  return jsonb_build_object(
    'closed', closed, 'invoices', invoices, 'more', cardinality(claimed) = batch or cardinality(due) > 0
  );
end
$$;
