-- Closing billing periods: what an ended period used becomes lines, taxes and one numbered invoice, and the subscription moves on.

create function private.divide_half_away(dividend numeric, divisor numeric) returns bigint
language plpgsql immutable set search_path = ''
as $$
begin
  return (sign(dividend) * div(2 * abs(dividend) + divisor, 2 * divisor))::bigint;
end
$$;
comment on function private.divide_half_away(numeric, numeric) is
  'An exact quotient rounded to a whole number, half away from zero; the divisor is positive. The one rounding of money.';

create function private.describe_quantity(quantity bigint, unit text) returns text
language plpgsql immutable set search_path = ''
as $$
begin
  return case
    when quantity is null then 'unlimited'
    when unit = 'second' then quantity / 60 || ' min ' || lpad((quantity % 60)::text, 2, '0') || ' s'
    when unit = 'sixtieth of a millionth' then trim_scale(round(quantity / 60000000.0, 6))::text
    else quantity::text
  end;
end
$$;
comment on function private.describe_quantity(bigint, text) is 'A quantity as an invoice line says it; null is unlimited.';

create function private.billable_units(quantity bigint, meter public.meters) returns bigint
language plpgsql immutable set search_path = ''
as $$
begin
  return case when meter.rounding = 'period' then private.whole_pulses(quantity, meter.pulse) else quantity end;
end
$$;
comment on function private.billable_units(bigint, public.meters) is
  'What a period''s quantity is on its bill: up to started pulses where its meter says so, else as it is.';

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

create type private.priced_line as (
  position integer, kind text, meter_key text, description text, quantity bigint, unit text, unit_price_minor bigint, price_units bigint,
  amount_minor bigint, line_id uuid, first_day date, last_day date, discount_minor bigint, item_id uuid, rest_minor bigint
);
comment on type private.priced_line is
  'A line of an invoice that may be made; what of it waits for the next one is its rest.';

create type private.priced_tax as (
  position integer, name text, rate_bp integer, taxable_minor bigint, amount_minor bigint, treatment text, note text
);
comment on type private.priced_tax is 'A component of the tax of an invoice that may be made.';

create type private.priced_adjustment as (meter_key text, period_start date, line_id uuid);
comment on type private.priced_adjustment is
  'A period billed before that an invoice which may be made settles, with the line that says so; without one it comes to nothing.';

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

create function private.open_invoices(drafts uuid[], issuer private.billing_issuer, at timestamptz) returns jsonb
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
comment on function private.open_invoices(uuid[], private.billing_issuer, timestamptz) is
  'Drafts become invoices, with consecutive numbers of the issuer''s month, and are told of. The series is locked from here to the end of '
  'the transaction: to be called last.';

create function private.close_periods(request jsonb, at timestamptz) returns jsonb
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
comment on function private.close_periods(jsonb, timestamptz) is
  'Ends trials that are over, bills every ended period of the subscriptions it claims, once, and moves them to the period that `at` '
  'is in. Several may run at once.';

create function public.close_periods(jsonb) returns jsonb
language sql set search_path = ''
as $$
  select private.close_periods($1, private.clock_now())
$$;
comment on function public.close_periods(jsonb) is
  'For invoice-generation. {"v":1,"limit":1000} gives {"closed":n,"invoices":[{"id","organization_id","number"}],"more":bool}.';

revoke all on function
  private.divide_half_away(numeric, numeric), private.describe_quantity(bigint, text), private.billable_units(bigint, public.meters),
  private.cycle_unit(public.billing_cycle), private.describe_part(integer, timestamptz, timestamptz, text),
  private.following_period(public.subscriptions, public.billing_cycle), private.settle_lines(uuid, text, boolean, private.priced_line[]),
  private.price_periods(uuid[], private.billing_issuer, timestamptz, boolean),
  private.bill_periods(uuid[], private.billing_issuer, timestamptz, boolean),
  private.open_invoices(uuid[], private.billing_issuer, timestamptz), private.close_periods(jsonb, timestamptz), public.close_periods(jsonb)
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
