-- Rating: what quantities cost. Amounts are whole minor units; a quantity may have decimals and is numeric, never a float. What is
-- summed is exact, and is rounded once a line, half away from zero. Functions that bill call these, and tests do.

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

-- What a plan's price says about a meter ------------------------------------------------------------------------------------------

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
  private.allocate_largest_remainder(bigint, numeric[]), private.discount_shares(bigint, bigint[], integer[], bigint[]),
  private.check_tiers(private.price_tier[]),
  private.graduated_tiers(private.price_tier[], numeric, numeric, numeric),
  private.rate_graduated(private.price_tier[], numeric, boolean, numeric),
  private.rate_graduated_from(private.price_tier[], numeric, numeric, boolean, numeric),
  private.rate_volume(private.price_tier[], numeric, boolean, numeric), private.rate_package(numeric, numeric, numeric, bigint),
  private.started_units(numeric, numeric), private.rate_beyond_allowance(private.price_tier[], numeric, numeric, numeric),
  private.rate_base_and_overage(bigint, numeric, numeric, numeric, numeric, numeric), private.read_tiers(jsonb),
  private.rate_term(public.plan_price_meters, bigint), private.rate_term_total(public.plan_price_meters, bigint), private.series_month(timestamptz, text),
  private.hours_in_period(timestamptz, timestamptz)
from public, anon, authenticated, service_role;
