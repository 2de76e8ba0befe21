-- Counting: quotas that are taken and given back, usage that is recorded once, and what an organization has used.
--
-- One transaction writes an event's key, the event, its day and its period. Locks are always taken in the same order (keys, then
-- counters by meter and period, then days, then wallets), so that writers wait for each other and never deadlock. The counter of a
-- period is also its gate: closing a period locks and closes its counters, so a writer either was there before and is billed, or
-- finds the counter closed: then it counts in its own period all the same, and the next invoice bills the difference at that period's
-- price. Nothing falls between.

-- Periods -------------------------------------------------------------------------------------------------------------------------

create function private.cycle_months(cycle public.billing_cycle) returns integer
language plpgsql immutable set search_path = ''
as $$
begin
  return case cycle when 'yearly' then 12 when 'quarterly' then 3 else 1 end;
end
$$;
revoke all on function private.cycle_months(public.billing_cycle) from public;
comment on function private.cycle_months(public.billing_cycle) is 'How many months a billing period has.';

create function private.period_boundary(anchor_on date, cycle public.billing_cycle, period_no integer) returns date
language plpgsql immutable set search_path = ''
as $$
begin
  return (anchor_on + make_interval(months => period_no * private.cycle_months(cycle)))::date;
end
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
  first_day date := (subscription.current_period_start at time zone subscription.timezone)::date;
  number integer;
begin
  counted_on := day;

  -- What happens now is never late, not even where a clock lags behind the period.
  if day >= first_day or day >= today and first_day is not null then
    counted_on := greatest(day, first_day);
    period_start := first_day;
    period_end := (subscription.current_period_end at time zone subscription.timezone)::date;
    if counted_on >= period_end then
      -- The period has ended but is not closed yet; the next ones are already known from the anchor.
      number := subscription.period_no;
      while private.period_boundary(subscription.anchor_on, subscription.billing_cycle, number + 1) <= counted_on loop
        number := number + 1;
      end loop;
      period_start := private.period_boundary(subscription.anchor_on, subscription.billing_cycle, number);
      period_end := private.period_boundary(subscription.anchor_on, subscription.billing_cycle, number + 1);
    end if;
    return;
  end if;

  -- Its own period, billed or not. Where there was none, nobody was billed, but nothing is lost: calendar months, cut where other
  -- periods begin or end.
  select log.period_start, log.period_end
  into period_start, period_end
  from public.usage_logs as log
  where log.organization_id = usage_period.organization_id
    and log.period_start <= day and day < log.period_end
  order by log.period_start
  limit 1;
  if not found then
    period_start := date_trunc('month', day)::date;
    period_end := least((period_start + interval '1 month')::date, first_day);
    select greatest(usage_period.period_start, max(log.period_end) filter (where log.period_end <= day)),
      least(usage_period.period_end, min(log.period_start) filter (where log.period_start > day))
    into period_start, period_end
    from public.usage_logs as log
    where log.organization_id = usage_period.organization_id;
  end if;
end
$$;
revoke all on function private.usage_period(public.subscriptions, uuid, text, date, timestamptz) from public;
comment on function private.usage_period(public.subscriptions, uuid, text, date, timestamptz) is
  'In which period usage of a local day counts, and on which day: always its own, also where that is billed already.';

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

create function private.agreed_term(term public.plan_price_meters, subscription public.subscriptions) returns public.plan_price_meters
language plpgsql immutable set search_path = ''
as $$
declare
  agreed jsonb := subscription.metadata #> array['custom_limits', term.meter_key];
begin
  if jsonb_typeof(agreed) = 'number' then
    term.limit_units := greatest(floor(agreed::numeric), -1)::bigint;
  end if;
  return term;
end
$$;
revoke all on function private.agreed_term(public.plan_price_meters, public.subscriptions) from public;
comment on function private.agreed_term(public.plan_price_meters, public.subscriptions) is
  'What a price says about a meter, with the limit that was agreed with one customer: subscriptions.metadata.custom_limits, by meter; -1 is '
  'none.';

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
        and log.usage_count + log.reserved >= private.meter_cap(private.agreed_term(term, subscription))
    ) then
      return false;
    end if;

    select private.meter_cap(private.agreed_term(term, subscription))
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

create function private.whole_pulses(quantity bigint, pulse bigint) returns bigint
language sql immutable set search_path = ''
as $$
  select case when pulse > 1 then (quantity + pulse - 1) / pulse * pulse else quantity end
$$;
revoke all on function private.whole_pulses(bigint, bigint) from public;
comment on function private.whole_pulses(bigint, bigint) is 'A quantity up to started pulses: 61 seconds are 120 in minutes. Not for less than nothing.';

create function private.period_usage(organization_id uuid, meter text, from_day date, to_day date) returns bigint
language plpgsql stable set search_path = ''
as $$
begin
  case (select known.aggregation from public.meters as known where known.key = meter)
    when 'max' then
      return coalesce((
        select max(total.quantity)
        from public.usage_days as total
        where total.organization_id = period_usage.organization_id and total.meter_key = meter and total.day >= from_day and total.day < to_day
      ), 0);
    when 'latest' then
      return coalesce((
        select total.quantity
        from public.usage_days as total
        where total.organization_id = period_usage.organization_id
          and total.meter_key = meter
          and total.day >= from_day and total.day < to_day
          and total.events > 0
        order by total.day desc
        limit 1
      ), 0);
    when 'unique' then
      return (
        select count(distinct reading.value_hash)
        from private.usage_readings as reading
        where reading.organization_id = period_usage.organization_id
          and reading.meter_key = meter
          and reading.day >= from_day and reading.day < to_day
          and reading.value_hash is not null
          and reading.quantity > 0
      );
    else
      return coalesce((
        select sum(total.quantity)
        from public.usage_days as total
        where total.organization_id = period_usage.organization_id and total.meter_key = meter and total.day >= from_day and total.day < to_day
      ), 0)::bigint;
  end case;
end
$$;
revoke all on function private.period_usage(uuid, text, date, date) from public;
comment on function private.period_usage(uuid, text, date, date) is
  'What a meter comes to from a day on until another, by its aggregation and from its days.';

create function private.take_readings(
  organization_id uuid, sources text[], keys text[], meters text[], quantities bigint[], occurred timestamptz[], corrected text[],
  value_hashes bytea[], days date[], starts date[], ends date[]
) returns table (meter text, day date, period_start date, on_day bigint, in_period bigint)
language plpgsql set search_path = ''
as $$
#variable_conflict use_variable
declare
  place integer;
  reading private.usage_readings;
  was_on_day boolean;
  was_in_period boolean;
begin
  for place in
    select event.position
    from unnest(meters) with ordinality as event (meter, position)
    join public.meters as known on known.key = event.meter and known.aggregation in ('max', 'unique', 'latest')
    order by event.position
  loop
    if corrected[place] is null then
      reading := row(
        organization_id, meters[place], sources[place], keys[place], days[place], occurred[place], quantities[place], value_hashes[place]
      )::private.usage_readings;
    else
      select own.*
      into strict reading
      from private.usage_readings as own
      where own.organization_id = take_readings.organization_id and own.source = sources[place] and own.key = corrected[place];
    end if;
    if reading.value_hash is not null then
      select coalesce(bool_or(own.day = reading.day), false), count(*) > 0
      into was_on_day, was_in_period
      from private.usage_readings as own
      where own.organization_id = take_readings.organization_id
        and own.meter_key = reading.meter_key
        and own.value_hash = reading.value_hash
        and own.day >= starts[place] and own.day < ends[place]
        and own.quantity > 0;
    end if;

    if corrected[place] is null then
      insert into private.usage_readings select (reading).*;
    else
      update private.usage_readings as own
      set quantity = own.quantity + quantities[place]
      where own.organization_id = take_readings.organization_id and own.source = reading.source and own.key = reading.key;
    end if;

    -- Of different values it is known at once what one more or less changes: whether the value is there otherwise.
    if reading.value_hash is not null then
      select
        coalesce(bool_or(own.day = reading.day), false)::integer - was_on_day::integer, (count(*) > 0)::integer - was_in_period::integer
      into on_day, in_period
      from private.usage_readings as own
      where own.organization_id = take_readings.organization_id
        and own.meter_key = reading.meter_key
        and own.value_hash = reading.value_hash
        and own.day >= starts[place] and own.day < ends[place]
        and own.quantity > 0;
      meter := reading.meter_key;
      day := reading.day;
      period_start := starts[place];
      return next;
    end if;
  end loop;

  -- The largest and the latest are looked up once a day that was touched, and once its period.
  return query
    with touched as materialized (
      select
        event.meter, event.day, event.period_start, event.period_end, known.aggregation,
        case known.aggregation
          when 'max' then (
            select own.quantity
            from private.usage_readings as own
            where own.organization_id = take_readings.organization_id and own.meter_key = event.meter and own.day = event.day and own.value_hash is null
            order by own.quantity desc
            limit 1
          )
          else (
            select own.quantity
            from private.usage_readings as own
            where own.organization_id = take_readings.organization_id and own.meter_key = event.meter and own.day = event.day and own.value_hash is null
            order by own.occurred_at desc, own.source desc, own.key desc
            limit 1
          )
        end as quantity
      from (
        select distinct given.meter, given.day, given.period_start, given.period_end
        from unnest(meters, days, starts, ends) as given (meter, day, period_start, period_end)
      ) as event
      join public.meters as known on known.key = event.meter and known.aggregation in ('max', 'latest')
    ),
    touched_period as (
      select distinct touched.meter, touched.period_start, touched.period_end, touched.aggregation from touched
    ),
    whole as (
      select known.meter, known.period_start, known.aggregation, total.day, total.quantity
      from touched_period as known
      join public.usage_days as total
        on total.organization_id = take_readings.organization_id
        and total.meter_key = known.meter
        and total.day >= known.period_start and total.day < known.period_end
        and total.events > 0
      where not exists (
        select from touched where touched.meter = total.meter_key and touched.day = total.day
      )
      union all
      select touched.meter, touched.period_start, touched.aggregation, touched.day, touched.quantity from touched
    )
    select touched.meter, touched.day, touched.period_start, touched.quantity - coalesce(total.quantity, 0), 0::bigint
    from touched
    left join public.usage_days as total
      on total.organization_id = take_readings.organization_id and total.meter_key = touched.meter and total.day = touched.day
    union all
    select
      period.meter, null::date, period.period_start, 0::bigint,
      case period.aggregation when 'max' then max(period.quantity) else (array_agg(period.quantity order by period.day desc))[1] end
        - max(log.usage_count)
    from whole as period
    join public.usage_logs as log
      on log.organization_id = take_readings.organization_id
      and log.feature_key = period.meter
      and log.period_start = period.period_start
    group by period.meter, period.period_start, period.aggregation;
end
$$;
revoke all on function
  private.take_readings(uuid, text[], text[], text[], bigint[], timestamptz[], text[], bytea[], date[], date[], date[])
from public;
comment on function private.take_readings(uuid, text[], text[], text[], bigint[], timestamptz[], text[], bytea[], date[], date[], date[]) is
  'Takes in the events of meters that are not sums and tells by how much each of their days and periods changes; other events are passed '
  'by. The caller holds the counters'' locks.';

create function private.count_usage(
  organization_id uuid, sources text[], keys text[], meters text[], quantities bigint[], occurred timestamptz[], at timestamptz,
  corrected text[] default null, known_days date[] default null, value_hashes bytea[] default null
) returns void
language plpgsql set search_path = ''
as $$
declare
  subscription public.subscriptions;
  zone text;
  first_day date;
  days date[];
  starts date[];
  ends date[];
  part_meters text[];
  part_said_days date[];
  part_days date[];
  part_starts date[];
  part_ends date[];
  part_quantities bigint[];
  part_events bigint[];
  is_moved boolean;
  is_read boolean;
  changed_meters text[];
  changed_days date[];
  changed_starts date[];
  changes_on_day bigint[];
  changes_in_period bigint[];
  is_open boolean := false;
  is_late boolean;
  batch_id text;
begin
  for try in 1..5 loop
    subscription := private.live_subscription(organization_id);
    zone := subscription.timezone;
    first_day := (subscription.current_period_start at time zone subscription.timezone)::date;
    if zone is null then
      select organization.timezone
      into strict zone
      from public.organizations as organization
      where organization.id = count_usage.organization_id;
    end if;

    -- Clocks of other systems run ahead: what is said to come from the future counts now. A correction counts on the day of what it
    -- corrects.
    with event as (
      -- Sorted once: an aggregate that is told to sort does it for itself.
      select given.position, coalesce(given.day, (least(given.occurred_at, at) at time zone zone)::date) as day
      from unnest(occurred, known_days) with ordinality as given (occurred_at, day, position)
      order by given.position
    )
    select array_agg(event.day)
    into days
    from event;
    -- From here on it is about meters and days, of which there are few, and not about events. A period is looked for once a day.
    with placed as materialized (
      select distinct_day.day, period.*
      from (select distinct event.day from unnest(days) as event (day)) as distinct_day,
        lateral private.usage_period(subscription, count_usage.organization_id, zone, distinct_day.day, at) as period
    ),
    part as (
      select event.meter, event.day, sum(event.quantity)::bigint as quantity, count(*) as events
      from unnest(meters, days, quantities) as event (meter, day, quantity)
      group by event.meter, event.day
    )
    select
      array_agg(part.meter), array_agg(placed.day), array_agg(placed.counted_on), array_agg(placed.period_start), array_agg(placed.period_end),
      array_agg(part.quantity), array_agg(part.events), bool_or(placed.counted_on <> placed.day)
    into part_meters, part_said_days, part_days, part_starts, part_ends, part_quantities, part_events, is_moved
    from part
    join placed on placed.day = part.day;

    insert into public.usage_logs (organization_id, feature_key, period_start, period_end, closed_at)
    select
      count_usage.organization_id, event.meter, event.period_start, event.period_end,
      case when event.period_start < first_day then at end
    from (
      select distinct given.meter, given.period_start, given.period_end
      from unnest(part_meters, part_starts, part_ends) as given (meter, period_start, period_end)
    ) as event
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
      select log.closed_at, log.period_start
      from public.usage_logs as log
      where log.organization_id = count_usage.organization_id
        and (log.feature_key, log.period_start) in (
          select distinct event.meter, event.period_start
          from unnest(part_meters, part_starts) as event (meter, period_start)
        )
      order by log.feature_key, log.period_start
      for no key update
    )
    select
      -- A period before the current one is closed, and takes what comes late.
      count(*) filter (where counter.closed_at is null or counter.period_start < first_day or first_day is null) = (
        select count(*)
        from (select distinct event.meter, event.period_start from unnest(part_meters, part_starts) as event (meter, period_start)) as wanted
      ),
      coalesce(bool_or(counter.closed_at is not null), false)
    into is_open, is_late
    from counter;
    exit when is_open;
    -- The current period was closed in between: its subscription has moved on, and so does this.
  end loop;
  if not is_open then
    raise exception 'no open billing period for organization %', organization_id using errcode = '40001';
  end if;

  -- Each event is told where it counts only where that is not the day it says, or where it is needed below.
  is_read := exists (
    select from public.meters as known where known.key = any (part_meters) and known.aggregation in ('max', 'unique', 'latest')
  );
  if is_moved or is_read or is_late then
    with ordered as (
      select placed.counted_on, placed.period_start, placed.period_end
      from unnest(days) with ordinality as event (day, position)
      join (
        select distinct given.day, given.counted_on, given.period_start, given.period_end
        from unnest(part_said_days, part_days, part_starts, part_ends) as given (day, counted_on, period_start, period_end)
      ) as placed on placed.day = event.day
      order by event.position
    )
    select array_agg(ordered.counted_on), array_agg(ordered.period_start), array_agg(ordered.period_end)
    into days, starts, ends
    from ordered;
  end if;

  -- What is not summed changes its day and period by something else than its quantity.
  if is_read then
    select
      array_agg(reading.meter), array_agg(reading.day), array_agg(reading.period_start), array_agg(reading.on_day),
      array_agg(reading.in_period)
    into changed_meters, changed_days, changed_starts, changes_on_day, changes_in_period
    from private.take_readings(
      organization_id, sources, keys, meters, quantities, occurred, corrected, value_hashes, days, starts, ends
    ) as reading;
    part_quantities := array(
      select case when known.aggregation in ('max', 'unique', 'latest') then 0 else event.quantity end
      from unnest(part_meters, part_quantities) with ordinality as event (meter, quantity, position)
      left join public.meters as known on known.key = event.meter
      order by event.position
    );
  end if;

  with added as (
    select event.meter, event.period_start, sum(event.quantity)::bigint as quantity
    from (
      select given.meter, given.period_start, given.quantity
      from unnest(part_meters, part_starts, part_quantities) as given (meter, period_start, quantity)
      union all
      select change.meter, change.period_start, change.quantity
      from unnest(changed_meters, changed_starts, changes_in_period) as change (meter, period_start, quantity)
    ) as event
    group by event.meter, event.period_start
  ),
  counted as (
    update public.usage_logs as log
    set usage_count = log.usage_count + added.quantity
    from added
    where log.organization_id = count_usage.organization_id
      and log.feature_key = added.meter
      and log.period_start = added.period_start
    returning log.feature_key, log.period_start, log.usage_count, log.usage_count - added.quantity as before, log.closed_at
  )
  -- Who crosses a line says so, once a period: the same line again, after a correction, is the same message.
  insert into private.outbox (organization_id, topic, key, payload, created_at)
  select
    count_usage.organization_id, 'usage.threshold', counted.feature_key || ' ' || counted.period_start || ' ' || line.percent,
    jsonb_build_object(
      'meter', counted.feature_key, 'percent', line.percent, 'used', counted.usage_count, 'limit', allowed.units,
      'period_start', counted.period_start
    ),
    at
  from counted
  join public.plan_price_meters as own on own.plan_price_id = subscription.plan_price_id and own.meter_key = counted.feature_key
  cross join lateral private.agreed_term(own, subscription) as term
  cross join lateral (
    select case when term.limit_units >= 0 then term.limit_units when term.included_units >= 0 then term.included_units end as units
  ) as allowed
  cross join (values (50), (80), (100)) as line (percent)
  where counted.closed_at is null
    and allowed.units > 0
    and counted.before::numeric * 100 < allowed.units::numeric * line.percent
    and counted.usage_count::numeric * 100 >= allowed.units::numeric * line.percent
  order by line.percent
  on conflict do nothing;

  insert into public.usage_days as total (organization_id, meter_key, day, quantity, events)
  select count_usage.organization_id, event.meter, event.day, sum(event.quantity)::bigint, sum(event.events)::bigint
  from (
    select given.meter, given.day, given.quantity, given.events
    from unnest(part_meters, part_days, part_quantities, part_events) as given (meter, day, quantity, events)
    union all
    select change.meter, change.day, change.quantity, 0
    from unnest(changed_meters, changed_days, changes_on_day) as change (meter, day, quantity)
    where change.day is not null
  ) as event
  group by event.meter, event.day
  having sum(event.quantity) >= 0
  order by event.meter, event.day
  on conflict on constraint usage_days_pkey
  do update set quantity = total.quantity + excluded.quantity, events = total.events + excluded.events;
  -- What is corrected to less is on its day already; a new row of it could not be negative.
  if corrected is not null or changed_meters is not null then
    update public.usage_days as total
    set quantity = total.quantity + less.quantity, events = total.events + less.events
    from (
      select event.meter, event.day, sum(event.quantity)::bigint as quantity, sum(event.events)::bigint as events
      from (
        select given.meter, given.day, given.quantity, given.events
        from unnest(part_meters, part_days, part_quantities, part_events) as given (meter, day, quantity, events)
        union all
        select change.meter, change.day, change.quantity, 0
        from unnest(changed_meters, changed_days, changes_on_day) as change (meter, day, quantity)
        where change.day is not null
      ) as event
      group by event.meter, event.day
      having sum(event.quantity) < 0
    ) as less
    where total.organization_id = count_usage.organization_id and total.meter_key = less.meter and total.day = less.day;
  end if;

  -- The ids of a batch are one UUIDv7 and the next ones: its random end is counted on.
  batch_id := left(private.uuid_v7()::text, 28);
  insert into private.usage_events (
    id, organization_id, meter_key, source, key, quantity, occurred_at, day, recorded_at, corrects, value_hash
  )
  select
    (batch_id || lpad(to_hex(event.position), 8, '0'))::uuid, count_usage.organization_id, event.meter, event.source, event.key,
    event.quantity, event.occurred_at, event.day, at, event.corrects, event.value_hash
  from unnest(sources, keys, meters, quantities, occurred, days, corrected, value_hashes) with ordinality
    as event (source, key, meter, quantity, occurred_at, day, corrects, value_hash, position);
  if is_late then
    insert into private.usage_adjustments (event_id, organization_id, meter_key, period_start, occurred_at, quantity, recorded_at)
    select
      (batch_id || lpad(to_hex(event.position), 8, '0'))::uuid, count_usage.organization_id, event.meter, log.period_start,
      event.occurred_at, event.quantity, at
    from unnest(meters, quantities, occurred, starts) with ordinality as event (meter, quantity, occurred_at, period_start, position)
    join public.usage_logs as log
      on log.organization_id = count_usage.organization_id
      and log.feature_key = event.meter
      and log.period_start = event.period_start
    where log.plan_price_id is not null;
  end if;
end
$$;
revoke all on function
  private.count_usage(uuid, text[], text[], text[], bigint[], timestamptz[], timestamptz, text[], date[], bytea[])
from public;
comment on function private.count_usage(uuid, text[], text[], text[], bigint[], timestamptz[], timestamptz, text[], date[], bytea[]) is
  'Adds events of one organization to its periods, days and event log, and tells of 50, 80 and 100 % of a limit. The caller has made sure '
  'of their keys; nothing is refused here, also not what is over a limit or late.';

create function private.usage_hash(body text) returns bytea
language sql immutable set search_path = ''
as $$
  select substring(sha256(convert_to(body, 'UTF8')) for 16)
$$;
revoke all on function private.usage_hash(text) from public;
comment on function private.usage_hash(text) is 'What is kept of an event''s body to tell a repetition from a contradiction.';

create function private.day_of_key(known private.usage_keys) returns date
language plpgsql stable set search_path = ''
as $$
begin
  return coalesce(
    (
      select event.day
      from private.usage_events as event
      where event.occurred_at = known.occurred_at
        and event.organization_id = known.organization_id
        and event.meter_key = known.meter_key
        and event.source = known.source
        and event.key = known.key
        and event.corrects is null
    ),
    -- Its month was past its retention: the day as its organization's calendar has it.
    (
      select (known.occurred_at at time zone coalesce(subscription.timezone, tenant.timezone))::date
      from public.organizations as tenant
      left join public.subscriptions as subscription
        on subscription.organization_id = tenant.id and subscription.status not in ('cancelled', 'inactive')
      where tenant.id = known.organization_id
    )
  );
end
$$;
revoke all on function private.day_of_key(private.usage_keys) from public;
comment on function private.day_of_key(private.usage_keys) is 'The local day on which the event of a key counts.';

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
  rated bigint;
begin
  if attempt.ended_at is null then
    return;
  end if;
  select case meter.rounding when 'event' then private.whole_pulses(billed, meter.pulse) else billed end
  into strict billed
  from public.meters as meter
  where meter.key = 'call_seconds';

  insert into private.usage_keys as known (organization_id, source, key, body_hash, meter_key, occurred_at, quantity)
  values (
    attempt.organization_id, 'call', attempt.id::text, said, case when billed > 0 then 'call_seconds' end,
    case when billed > 0 then attempt.ended_at end, nullif(billed, 0)
  )
  on conflict on constraint usage_keys_pkey do nothing;
  is_first := found;
  is_new := is_first and billed > 0;
  if not is_first and billed > 0 then
    -- The call had ended without a billed second, and now the carrier says how many there were.
    update private.usage_keys as known
    set body_hash = said, meter_key = 'call_seconds', occurred_at = attempt.ended_at, quantity = billed
    where known.organization_id = attempt.organization_id
      and known.source = 'call'
      and known.key = attempt.id::text
      and known.body_hash is null;
    is_new := found;
  end if;
  if not is_first and not is_new then
    if attempt.bill_duration_seconds is not null then
      perform private.correct_call(attempt, billed, at);
    end if;
    return;
  end if;

  -- Under the counters' locks a hold becomes use: whoever asks what is left sees the one or the other, never both and never neither.
  perform
  from public.usage_logs as log
  where log.organization_id = attempt.organization_id
    and log.feature_key in ('ai_calls', 'call_seconds')
    -- The period in which it ended too, whatever the time zone makes of it.
    and (log.closed_at is null or log.reserved > 0 or (attempt.ended_at at time zone 'UTC')::date between log.period_start - 1 and log.period_end)
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
    rated := private.rate_call(attempt, billed, at);
    perform private.count_usage(
      attempt.organization_id,
      array['call', 'call'] || case when rated is not null then array['call_rate'] end,
      array[attempt.id::text, attempt.id::text] || case when rated is not null then array[attempt.id::text] end,
      array['ai_calls', 'call_seconds'] || case when rated is not null then array['rated_calls'] end,
      array[1, billed] || case when rated is not null then array[rated] end,
      array[attempt.ended_at, attempt.ended_at] || case when rated is not null then array[attempt.ended_at] end,
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
  'the plan, once, also when the carrier reports them later. Other seconds than were counted before settle the difference.';

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
    calls := private.agreed_term(calls, subscription);
    talk := private.agreed_term(talk, subscription);
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
  price_id uuid;
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
    select event.day
    into strict counted_on
    from private.usage_events as event
    where event.occurred_at = attempt.ended_at
      and event.organization_id = attempt.organization_id
      and event.meter_key = 'call_seconds'
      and event.source = 'call'
      and event.key = attempt.id::text
      and event.corrects is null;
    -- A period that was billed keeps its price, also for a call that is told of later.
    price_id := coalesce(
      (
        select log.plan_price_id
        from public.usage_logs as log
        where log.organization_id = attempt.organization_id
          and log.feature_key = 'call_seconds'
          and log.period_start <= counted_on and counted_on < log.period_end
      ),
      (private.live_subscription(attempt.organization_id)).plan_price_id
    );
    select own.* into calls from public.plan_price_meters as own where own.plan_price_id = price_id and own.meter_key = 'ai_calls';
    select own.* into talk from public.plan_price_meters as own where own.plan_price_id = price_id and own.meter_key = 'call_seconds';
  end if;

  if calls.credit_price_minor is not null and calls.included_units >= 0
    or talk.credit_price_minor is not null and talk.included_units >= 0 then
    select price.currency into money from public.plan_prices as price where price.id = price_id;
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
    attempt.id, attempt.organization_id, price_id, term.meter_key, counted_on, beyond,
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

create function private.shift_prepaid(organization_id uuid, meter text, day date, units bigint) returns void
language plpgsql set search_path = ''
as $$
begin
  update public.usage_logs as log
  set prepaid = log.prepaid + units
  where log.organization_id = shift_prepaid.organization_id
    and log.feature_key = meter
    and log.period_start <= shift_prepaid.day and shift_prepaid.day < log.period_end;
  update public.usage_days as total
  set prepaid = total.prepaid + units
  where total.organization_id = shift_prepaid.organization_id and total.meter_key = meter and total.day = shift_prepaid.day;
end
$$;
comment on function private.shift_prepaid(uuid, text, date, bigint) is
  'Adds to what credit paid of a day and its period. The caller holds the counter''s lock.';

create function private.correct_call(attempt public.call_logs, billed bigint, at timestamptz) returns void
language plpgsql security definer set search_path = ''
as $$
declare
  correction text := attempt.id || '/' || private.uuid_v7();
  known private.usage_keys;
  counted_on date;
  charge record;
  term public.plan_price_meters;
  delta bigint;
  calls integer;
  rated bigint;
  events integer;
  overage bigint := 0;
  paid bigint := 0;
  cost bigint := 0;
  entry uuid;
begin
  select own.*
  into known
  from private.usage_keys as own
  where own.organization_id = attempt.organization_id and own.source = 'call' and own.key = attempt.id::text
  for no key update;
  delta := billed - known.quantity;
  if coalesce(delta, 0) = 0 then
    return;
  end if;
  calls := (billed > 0)::integer - (known.quantity > 0)::integer;
  update private.usage_keys as own
  set quantity = billed
  where own.organization_id = attempt.organization_id and own.source = 'call' and own.key = attempt.id::text;
  insert into private.usage_keys (organization_id, source, key, body_hash)
  values (attempt.organization_id, 'call', correction, private.usage_hash(concat_ws(e'\x1f', attempt.id, known.quantity, billed)));
  counted_on := private.day_of_key(known);
  perform
  from public.usage_logs as log
  where log.organization_id = attempt.organization_id
    and log.feature_key in ('ai_calls', 'call_seconds')
    and log.period_start <= counted_on and counted_on < log.period_end
  order by log.feature_key, log.period_start
  for no key update;

  -- A call within the plan changes the counters alone. One that was charged takes back what was paid last first: overage, then credit.
  select
    own.plan_price_id, own.meter_key, own.currency, own.transaction_id,
    own.credit_seconds + coalesce(sum(later.credit_seconds), 0)::bigint as credit_seconds,
    own.overage_seconds + coalesce(sum(later.overage_seconds), 0)::bigint as overage_seconds,
    own.charged_minor + coalesce(sum(later.charged_minor), 0)::bigint as charged_minor
  into charge
  from public.call_charges as own
  left join private.call_corrections as later on later.organization_id = own.organization_id and later.call_log_id = own.call_log_id
  where own.organization_id = attempt.organization_id and own.call_log_id = attempt.id
  group by own.call_log_id;
  if charge.meter_key is not null then
    select own.* into term
    from public.plan_price_meters as own
    where own.plan_price_id = charge.plan_price_id and own.meter_key = charge.meter_key;
    if delta < 0 then
      overage := greatest(delta, -charge.overage_seconds);
      paid := greatest(delta - overage, -charge.credit_seconds);
      cost := greatest(
        private.credit_cost(charge.credit_seconds + paid, term) - private.credit_cost(charge.credit_seconds, term), -charge.charged_minor
      );
    elsif term.overage_price_minor is not null then
      overage := delta;
    else
      paid := delta;
      cost := private.credit_cost(charge.credit_seconds + paid, term) - private.credit_cost(charge.credit_seconds, term);
    end if;
  end if;

  if delta < 0 and charge.meter_key is not null then
    perform private.shift_prepaid(attempt.organization_id, 'call_seconds', counted_on, paid);
    if charge.meter_key = 'ai_calls' then
      perform private.shift_prepaid(attempt.organization_id, 'ai_calls', counted_on, calls);
    end if;
  end if;
  rated := private.correct_rating(attempt, billed, correction, at);
  events := 1 + abs(calls) + (rated is not null)::integer;
  perform private.count_usage(
    attempt.organization_id, array_fill('call'::text, array[1 + abs(calls)]) || case when rated is not null then array['call_rate'] end,
    array_fill(correction, array[events]),
    array['call_seconds'] || case when calls <> 0 then array['ai_calls'] else '{}' end || case when rated is not null then array['rated_calls'] end,
    array[delta] || case when calls <> 0 then array[calls::bigint] else '{}' end || case when rated is not null then array[rated] end,
    array_fill(known.occurred_at, array[events]), at, array_fill(attempt.id::text, array[events]), array_fill(counted_on, array[events])
  );
  if charge.meter_key is null then
    return;
  end if;
  if delta > 0 then
    perform private.shift_prepaid(attempt.organization_id, 'call_seconds', counted_on, paid);
    if charge.meter_key = 'ai_calls' then
      perform private.shift_prepaid(attempt.organization_id, 'ai_calls', counted_on, calls);
    end if;
  end if;

  if cost < 0 then
    -- To the first charge as far as it goes; what a correction took on top is the platform's to keep.
    cost := -least(-cost, (
      select original.amount_minor - coalesce(sum(refund.amount_minor), 0)
      from public.credit_transactions as original
      left join public.credit_transactions as refund
        on refund.organization_id = original.organization_id and refund.reverses_id = original.id
      where original.organization_id = attempt.organization_id and original.id = charge.transaction_id
      group by original.id
    ));
    if cost < 0 then
      entry := private.refund_credit(
        attempt.organization_id, charge.transaction_id, -cost, 'call ' || correction, at, 'The carrier corrected the seconds of the call'
      );
    end if;
  elsif cost > 0 then
    cost := private.debit_credit(
      attempt.organization_id, charge.currency, cost, 'call ' || correction, at, true, 'consumption', 'call', attempt.id
    );
    select written.id
    into entry
    from public.credit_transactions as written
    where written.organization_id = attempt.organization_id and written.idempotency_key = 'call ' || correction;
  end if;
  insert into private.call_corrections (
    correction_id, organization_id, call_log_id, seconds, credit_seconds, overage_seconds, charged_minor, transaction_id, created_at
  )
  values (correction, attempt.organization_id, attempt.id, delta, paid, overage, coalesce(cost, 0), entry, at);
end
$$;
comment on function private.correct_call(public.call_logs, bigint, timestamptz) is
  'Settles the difference when a carrier corrects the seconds of a call that was counted, once: on the call''s own day, as an event that '
  'names the one it corrects, and in credit where the call was charged.';


create function private.spend_campaign_credit() returns trigger
language plpgsql security definer set search_path = ''
as $$
begin
  update public.campaigns as campaign
  set credit_spent = campaign.credit_spent + new.charged_minor
  from public.call_logs as log
  where log.organization_id = new.organization_id and log.id = new.call_log_id
    and campaign.organization_id = log.organization_id and campaign.id = log.campaign_id;
  return null;
end
$$;
revoke all on function private.spend_campaign_credit() from public;
comment on function private.spend_campaign_credit() is
  'Trigger: what a call took of prepaid credit, or a correction gave back, is what its campaign has spent; a charge is there once, and so is this.';
create trigger spend_campaign_credit after insert on public.call_charges
  for each row when (new.charged_minor <> 0) execute function private.spend_campaign_credit();
create trigger spend_campaign_credit after insert on private.call_corrections
  for each row when (new.charged_minor <> 0) execute function private.spend_campaign_credit();


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
  private.charge_call(public.call_logs, bigint, private.call_holds, timestamptz), private.check_holds(uuid),
  private.shift_prepaid(uuid, text, date, bigint), private.correct_call(public.call_logs, bigint, timestamptz)
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
  when datetime_field_overflow or invalid_datetime_format or invalid_time_zone_displacement_value then
    return null;
end
$$;
revoke all on function private.parse_instant(text) from public;
comment on function private.parse_instant(text) is 'An RFC 3339 date and time; null if the text is not one.';

create function private.knows_keys(organization_id uuid, source text, lowest text, highest text) returns boolean
language plpgsql stable set search_path = '' set enable_seqscan = off
as $$
begin
  return exists (
    select
    from private.usage_keys as known
    where known.organization_id = knows_keys.organization_id
      and known.source = knows_keys.source
      and known.key between lowest and highest
  );
end
$$;
revoke all on function private.knows_keys(uuid, text, text, text) from public;
comment on function private.knows_keys(uuid, text, text, text) is
  'Whether a source has any key from one to another, found with one look at the index: ids that grow with time never do. Its plan is made '
  'when the table is small and kept when it is not, hence the setting.';

create function private.record_usage(request jsonb, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  owner constant uuid := private.usage_reporter(request);
  given jsonb := request -> 'events';
  ids text[];
  sources text[];
  meters text[];
  quantities bigint[];
  counts bigint[];
  occurred timestamptz[];
  hashes bytea[];
  value_hashes bytea[];
  statuses text[];
  codes text[];
  stored integer[];
  corrected text[];
  days date[];
  horizon timestamptz := at + interval '5 minutes';
  is_careful boolean;
  is_fresh boolean;
  place integer;
  original private.usage_keys;
  meter public.meters;
  said_in_all bigint;
  has_corrections boolean;
begin
  if given is null or jsonb_typeof(given) <> 'array' or jsonb_array_length(given) = 0 then
    perform private.raise_error(400, 'invalid_request', 'events must be an array of at least one event', 'events');
  end if;
  if jsonb_array_length(given) > 1000 then
    perform private.raise_error(413, 'too_many_events', 'At most 1000 events are taken at once', 'events');
  end if;

  -- What is wrong with an event concerns that event alone. A count and a value that is counted need no quantity: it is one. Each step is
  -- fenced off (offset 0), so that what it reads is read once and not wherever a later one names it. All times are matched and read at
  -- once, and one by one only where one of them is none, or names a day that the calendar does not have.
  for is_careful in select unnest(array[false, true]) loop
    begin
      with item as materialized (
        select given_item.*
        from rows from (
          jsonb_to_recordset(given) as (
            id text, source text, type text, "time" text, quantity jsonb, value jsonb, corrects jsonb, specversion text
          )
        ) with ordinality as given_item (id, source, type, said_time, quantity, value, corrects, specversion, position)
      ),
      event as (
        select
          item.position, coalesce(item.specversion, '1.0') as specversion, item.id, item.source, item.type,
          case when jsonb_typeof(item.quantity) = 'number' then item.quantity::text end as number,
          item.quantity is null as is_unsaid,
          case when jsonb_typeof(item.value) = 'string' then item.value #>> '{}' end as value,
          item.corrects is not null as is_correction, item.corrects as correction, item.corrects #>> '{}' as corrects,
          item.said_time is not null as is_timed,
          case
            when is_careful then private.parse_instant(item.said_time)
            when item.said_time is not null and (
              select string_agg(each.said_time, '|') ~ '^(?:\d{4}-\d{2}-\d{2}[Tt ]\d{2}:\d{2}:\d{2}(?:\.\d{1,9})?(?:[Zz]|[+-]\d{2}:\d{2})(?:\||$))*$'
              from item as each
            )
            then item.said_time::timestamptz
            else private.parse_instant(item.said_time)
          end as instant,
          known.key is not null and known.is_active as is_known, known.is_reserved, known.aggregation, known.rounding, known.pulse
        from item
        left join public.meters as known on known.key = item.type
        offset 0
      ),
      said as (
        select
          event.*,
          case
            when event.is_unsaid and not event.is_correction and event.aggregation in ('count', 'unique') then 1
            -- Digits alone, or after the sign: a number of JSON has it nowhere else.
            when translate(event.number, '0123456789', '') in ('', '-') and length(ltrim(event.number, '-')) <= 15 then event.number::bigint
          end as quantity
        from event
        offset 0
      ),
      judged as (
        select
          said.*,
          case
            when said.specversion <> '1.0' then 'invalid_specversion'
            when coalesce(said.id, '') = '' or length(said.id) > 255 then 'invalid_id'
            when coalesce(said.source, '') = '' or length(said.source) > 255 then 'invalid_source'
            when said.source in ('call', 'call_rate') then 'reserved_source'
            when not said.is_known then 'unknown_type'
            when said.is_reserved then 'reserved_type'
            when said.quantity is null
              or said.quantity = 0 and (said.is_correction or said.aggregation not in ('max', 'latest'))
              or said.quantity < 0 and not said.is_correction
              or said.aggregation in ('count', 'unique') and abs(said.quantity) <> 1
              then 'invalid_quantity'
            when said.aggregation = 'unique' and not said.is_correction and (coalesce(said.value, '') = '' or length(said.value) > 255)
              then 'invalid_value'
            when said.is_correction and (jsonb_typeof(said.correction) <> 'string' or said.corrects in ('', said.id)) then 'invalid_corrects'
            when said.is_timed and (said.instant is null or said.instant < '2000-01-01') then 'invalid_time'
            when said.instant > horizon then 'time_in_future'
          end as code,
          case when said.aggregation = 'unique' and not said.is_correction then said.value end as told_apart
        from said
        offset 0
      ),
      -- Sorted once: an aggregate that is told to sort does it for itself.
      ordered as (
        select
          judged.id, judged.source, judged.type, judged.quantity, judged.corrects, judged.code,
          coalesce(judged.instant, at) as occurred_at, judged.told_apart,
          case
            when judged.rounding = 'event' and judged.pulse > 1 and not judged.is_correction
            then private.whole_pulses(judged.quantity, judged.pulse)
            else judged.quantity
          end as counted,
          substring(sha256(convert_to(
            concat_ws(
              e'\x1f', judged.type, judged.quantity, coalesce(extract(epoch from judged.instant)::text, 'now'), judged.corrects,
              judged.told_apart
            ), 'UTF8'
          )) for 16) as body_hash
        from judged
        order by judged.position
      )
      select
        array_agg(coalesce(ordered.id, '')), array_agg(coalesce(ordered.source, '')), array_agg(ordered.type), array_agg(ordered.quantity),
        array_agg(ordered.counted), array_agg(ordered.occurred_at), array_agg(ordered.body_hash),
        array_agg(case when ordered.told_apart is not null then substring(sha256(convert_to(ordered.told_apart, 'UTF8')) for 16) end),
        array_agg(ordered.corrects), array_fill(null::date, array[count(*)::integer]), array_agg(ordered.code),
        array_agg(case when ordered.code is not null then 'rejected' end), bool_or(ordered.corrects is not null and ordered.code is null),
        bool_and(ordered.code is null)
      into ids, sources, meters, quantities, counts, occurred, hashes, value_hashes, corrected, days, codes, statuses, has_corrections, is_fresh
      from ordered;
      exit;
    exception
      when datetime_field_overflow or invalid_datetime_format or invalid_time_zone_displacement_value or invalid_parameter_value then
        if is_careful then
          raise;
        end if;
        -- What is no object at all is an event that says nothing.
        select jsonb_agg(case when jsonb_typeof(item.value) = 'object' then item.value else '{}' end order by item.position)
        into given
        from jsonb_array_elements(given) with ordinality as item (value, position);
    end;
  end loop;

  -- Where the ids of a source lie together beyond all that it has, as those do that grow with time, they are put in as they are. Who
  -- was quicker with one of them, and an id that comes twice in the batch, lead to the other way.
  if is_fresh and not exists (
    select
    from (
      select event.source, min(event.id collate "C") as lowest, max(event.id collate "C") as highest
      from unnest(sources, ids) as event (source, id)
      group by event.source
    ) as own
    where private.knows_keys(owner, own.source, own.lowest, own.highest)
  ) then
    begin
      insert into private.usage_keys (organization_id, source, key, body_hash, meter_key, occurred_at, quantity, reported)
      select
        owner, event.source, event.id, event.hash, case when event.corrects is null then event.meter end,
        case when event.corrects is null then event.occurred_at end, case when event.corrects is null then event.counted end,
        case when event.corrects is null then nullif(event.quantity, event.counted) end
      from unnest(sources, ids, hashes, meters, occurred, counts, quantities, corrected)
        as event (source, id, hash, meter, occurred_at, counted, quantity, corrects)
      order by event.source collate "C", event.id collate "C";
      stored := array(select generate_series(1, cardinality(ids)));
    exception
      when unique_violation then
        null;
    end;
  end if;

  if stored is null then
    -- The first event of a batch under a key is the one that counts; the others are compared with it like any repetition.
    with first as materialized (
      select distinct on (event.source, event.id) event.*
      from (
        select
          given.source collate "C" as source, given.id collate "C" as id, given.hash, given.meter, given.occurred_at, given.counted,
          given.quantity, given.corrects, given.position
        from unnest(sources, ids, hashes, meters, occurred, counts, quantities, corrected, codes) with ordinality
          as given (source, id, hash, meter, occurred_at, counted, quantity, corrects, code, position)
        where given.code is null
      ) as event
      order by event.source, event.id, event.position
    ),
    fresh as (
      insert into private.usage_keys as known (organization_id, source, key, body_hash, meter_key, occurred_at, quantity, reported)
      select
        owner, first.source, first.id, first.hash, case when first.corrects is null then first.meter end,
        case when first.corrects is null then first.occurred_at end, case when first.corrects is null then first.counted end,
        case when first.corrects is null then nullif(first.quantity, first.counted) end
      from first
      order by first.source, first.id
      on conflict on constraint usage_keys_pkey do nothing
      returning known.source, known.key
    ),
    placed as (
      -- Looked up in a hash, which no wrong guess of their number turns into a comparison of each with each.
      select first.position::integer as position
      from first
      where case when (first.source, first.id) in (select fresh.source, fresh.key from fresh) then true end
      order by first.position
    )
    select array_agg(placed.position)
    into stored
    from placed;
  end if;

  -- A correction changes what is counted under the key that it names, on that event's day, and never to less than nothing.
  if has_corrections then
    for place in
      select item.position
      from unnest(stored) as item (position)
      where corrected[item.position] is not null
      order by sources[item.position] collate "C", corrected[item.position] collate "C", item.position
    loop
      select known.*
      into original
      from private.usage_keys as known
      where known.organization_id = owner and known.source = sources[place] and known.key = corrected[place]
      for no key update;
      select known.* into meter from public.meters as known where known.key = meters[place];
      said_in_all := coalesce(original.reported, original.quantity) + quantities[place];
      codes[place] := case
        when original.quantity is null or original.meter_key <> meters[place] then 'unknown_corrected'
        when said_in_all < 0 or said_in_all > 1 and meter.aggregation in ('count', 'unique') then 'correction_too_large'
      end;
      if codes[place] is null then
        counts[place] := case meter.rounding when 'event' then private.whole_pulses(said_in_all, meter.pulse) else said_in_all end - original.quantity;
        update private.usage_keys as known
        set quantity = original.quantity + counts[place], reported = nullif(said_in_all, original.quantity + counts[place])
        where known.organization_id = owner and known.source = sources[place] and known.key = corrected[place];
        occurred[place] := original.occurred_at;
        days[place] := private.day_of_key(original);
      else
        -- Nobody has seen its key yet: it is free for the same correction, once there is something to correct.
        delete from private.usage_keys as known
        where known.organization_id = owner and known.source = sources[place] and known.key = ids[place];
        statuses[place] := 'rejected';
        stored := array_remove(stored, place);
      end if;
    end loop;
  end if;

  if cardinality(stored) = cardinality(ids) then
    perform private.settle_usage_holds(owner, sources, ids, meters, at);
    perform private.count_usage(
      owner, sources, ids, meters, counts, occurred, at, case when has_corrections then corrected end,
      case when has_corrections then days end, value_hashes
    );
    return jsonb_build_object('results', (
      select jsonb_agg(jsonb_build_object('id', result.id, 'status', 'stored')) from unnest(ids) as result (id)
    ));
  end if;

  with event as (
    select given.*, own.position is not null as is_stored
    from unnest(sources, ids, hashes, statuses) with ordinality as given (source, id, hash, status, position)
    left join unnest(stored) as own (position) on own.position = given.position
  ),
  ordered as (
    select
      case
        when event.status is not null then event.status
        when event.is_stored then 'stored'
        when known.body_hash = event.hash then 'duplicate'
        when known.key is null then 'rejected'
        else 'conflict'
      end as status
    from event
    left join private.usage_keys as known
      on event.status is null and not event.is_stored
      and known.organization_id = owner and known.source = event.source and known.key = event.id
    order by event.position
  )
  select array_agg(ordered.status)
  into statuses
  from ordered;

  if cardinality(stored) > 0 then
    -- Taken out of the arrays in one pass: a text in the middle of one is found by counting up to it.
    perform private.settle_usage_holds(owner, array_agg(event.source), array_agg(event.id), array_agg(event.meter), at)
    from unnest(sources, ids, meters, statuses) as event (source, id, meter, status)
    where event.status = 'stored';
    perform private.count_usage(
      owner, array_agg(ordered.source), array_agg(ordered.id), array_agg(ordered.meter), array_agg(ordered.quantity),
      array_agg(ordered.occurred_at), at, array_agg(ordered.corrects), array_agg(ordered.day), array_agg(ordered.value_hash)
    )
    from (
      select event.*
      from unnest(sources, ids, meters, counts, occurred, corrected, days, value_hashes, statuses) with ordinality
        as event (source, id, meter, quantity, occurred_at, corrects, day, value_hash, status, position)
      where event.status = 'stored'
      order by event.position
    ) as ordered;
  end if;

  return jsonb_build_object('results', (
    select jsonb_agg(
      case
        when result.status in ('stored', 'duplicate') then jsonb_build_object('id', result.id, 'status', result.status)
        else jsonb_strip_nulls(jsonb_build_object(
          'id', result.id,
          'status', result.status,
          'code', case when result.status = 'conflict' then 'idempotency_conflict' else result.code end,
          'message', case
            when result.status = 'conflict' then 'An event with this source and id, but another body, was stored before'
            else case result.code
              when 'invalid_specversion' then 'specversion must be "1.0", or be left out'
              when 'invalid_id' then 'id must be a text of 1 to 255 characters'
              when 'invalid_source' then 'source must be a text of 1 to 255 characters'
              when 'reserved_source' then 'The sources "call" and "call_rate" belong to the platform'
              when 'unknown_type' then 'type is not the key of an active meter'
              when 'reserved_type' then 'The platform counts this itself, not by events'
              when 'invalid_quantity' then
                'data.quantity must be a whole number from 1 to 999999999999999, or less than 0 in a correction; 1 or nothing where events or '
                'values are counted, and 0 too where the largest or the latest counts'
              when 'invalid_value' then 'data.value must be a text of 1 to 255 characters: different values are counted'
              when 'invalid_corrects' then 'corrects must be the id of another event of the same source, or be left out'
              when 'unknown_corrected' then 'corrects names no event of this source and type that was stored before, or names a correction'
              when 'correction_too_large' then 'The event that it corrects would count less than nothing, or twice'
              when 'invalid_time' then 'time must be an RFC 3339 date and time, or be left out'
              when 'time_in_future' then 'time lies more than five minutes ahead'
            end
          end
        ))
      end)
    from unnest(ids, statuses, codes) as result (id, status, code)
  ));
end
$$;
revoke all on function private.record_usage(jsonb, timestamptz) from public;
grant execute on function private.record_usage(jsonb, timestamptz) to service_role;
comment on function private.record_usage(jsonb, timestamptz) is
  'Records a batch of usage events for the organization of an API key, or one that the platform names: each one stored, duplicate, conflict or rejected, by itself.';

create function public.record_usage(jsonb) returns jsonb
language sql set search_path = ''
as $$
  select private.record_usage($1, private.clock_now())
$$;
revoke all on function public.record_usage(jsonb) from public, anon, authenticated;
grant execute on function public.record_usage(jsonb) to service_role;
comment on function public.record_usage(jsonb) is
  'For usage-metering. {"v":1,"api_key":{"prefix","sha256"} or "organization_id","events":[{"specversion"?,"id","source","type","time"?,"quantity"?,"value"?,"corrects"?}]} gives '
  '{"results":[{"id","status","code"?,"message"?}]}.';

-- What was used -------------------------------------------------------------------------------------------------------------------

create function private.show_usage(organization uuid, at timestamptz) returns jsonb
language plpgsql stable security definer set search_path = ''
as $$
declare
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
          'aggregation', meter.aggregation,
          'used', coalesce(log.usage_count, 0),
          'reserved', coalesce(log.reserved, 0),
          'included', nullif(term.included_units, -1),
          'limit', nullif(term.limit_units, -1),
          'overage', case
            when term.included_units >= 0 then greatest(coalesce(log.usage_count - log.prepaid, 0) - term.included_units, 0)
            else 0
          end,
          'over_cap', coalesce(log.usage_count > private.meter_cap(term), false)
        )
        order by meter.position, meter.key)
      from public.meters as meter
      left join public.plan_price_meters as own
        on own.meter_key = meter.key and own.plan_price_id = subscription.plan_price_id
      left join lateral private.agreed_term(own, subscription) as term on own.meter_key is not null
      left join public.usage_logs as log
        on log.feature_key = meter.key and log.organization_id = organization and log.period_start = period.period_start
      where meter.source in ('events', 'calls') and (own.meter_key is not null or log.id is not null)
    ), '[]')
  );
end
$$;
revoke all on function private.show_usage(uuid, timestamptz) from public;
comment on function private.show_usage(uuid, timestamptz) is
  'Usage of an organization in the billing period of `at`, meter by meter; null in included or limit is unlimited.';

create function private.get_usage(at timestamptz) returns jsonb
language plpgsql stable security definer set search_path = ''
as $$
begin
  return private.show_usage(private.require_org('usage.view'), at);
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

create function private.show_usage_overview(organization uuid, at timestamptz) returns jsonb
language plpgsql stable security definer set search_path = ''
as $$
begin
  return private.show_usage(organization, at) || jsonb_build_object('standing', (
    select jsonb_agg(
      jsonb_build_object(
        -- A glance counts no further than this.
        'meter', meter.key, 'name', meter.name, 'unit', meter.unit, 'used', private.count_standing(organization, meter.key, 100000),
        'limit', private.plan_limit(organization, 'max_' || meter.key)
      )
      order by meter.position, meter.key)
    from public.meters as meter
    where meter.source = 'rows' and meter.is_active
  ));
end
$$;
revoke all on function private.show_usage_overview(uuid, timestamptz) from public;
comment on function private.show_usage_overview(uuid, timestamptz) is
  'As show_usage(), with what the organization has now of what its plan has room for: users, projects, campaigns, leads, stores; null in limit '
  'is unlimited.';

create function private.get_usage_overview(at timestamptz) returns jsonb
language plpgsql stable security definer set search_path = ''
as $$
begin
  return private.show_usage_overview(private.require_org('usage.view'), at);
end
$$;
revoke all on function private.get_usage_overview(timestamptz) from public;
grant execute on function private.get_usage_overview(timestamptz) to authenticated;
comment on function private.get_usage_overview(timestamptz) is
  'As get_usage(), with what the caller''s organization has now of what its plan has room for: users, projects, campaigns, leads, stores; null '
  'in limit is unlimited.';

create function public.get_usage_overview() returns jsonb
language sql stable set search_path = ''
as $$
  select private.get_usage_overview(private.clock_now())
$$;
revoke all on function public.get_usage_overview() from public, anon;
grant execute on function public.get_usage_overview() to authenticated;
comment on function public.get_usage_overview() is
  'As get_usage(), with the rows of the caller''s organization against its plan: "standing": [{"meter","name","unit","used","limit"}], counted '
  'up to 100,000. Needs usage.view.';

create function private.show_usage_daily(organization uuid, from_day date, to_day date, meter text, at timestamptz) returns jsonb
language plpgsql stable security definer set search_path = ''
as $$
declare
  subscription public.subscriptions;
  zone text;
  today date;
begin
  subscription := private.live_subscription(organization);
  select coalesce(subscription.timezone, tenant.timezone) into zone from public.organizations as tenant where tenant.id = organization;
  today := (at at time zone zone)::date;
  to_day := coalesce(to_day, today);
  from_day := coalesce(
    from_day, least(coalesce((subscription.current_period_start at time zone subscription.timezone)::date, date_trunc('month', today)::date), to_day)
  );
  if from_day > to_day or to_day - from_day > 399 then
    perform private.raise_error(400, 'invalid_request', 'from is not after to, and at most 400 days are shown at once', 'from');
  end if;
  if meter is not null and not exists (select from public.meters as known where known.key = show_usage_daily.meter) then
    perform private.raise_error(400, 'invalid_request', 'meter is not the key of a meter', 'meter');
  end if;
  return jsonb_build_object(
    'organization_id', organization, 'timezone', zone, 'from', from_day, 'to', to_day,
    'days', coalesce((
      select jsonb_agg(
        jsonb_build_object('day', total.day, 'meter', total.meter_key, 'quantity', total.quantity, 'events', total.events)
        order by total.day, known.position, total.meter_key)
      from public.usage_days as total
      join public.meters as known on known.key = total.meter_key
      where total.organization_id = organization
        and total.day between from_day and to_day
        and (show_usage_daily.meter is null or total.meter_key = show_usage_daily.meter)
    ), '[]')
  );
end
$$;
revoke all on function private.show_usage_daily(uuid, date, date, text, timestamptz) from public;
comment on function private.show_usage_daily(uuid, date, date, text, timestamptz) is
  'Usage of an organization day by day, both ends included, of one meter or all. A day without usage has no row. Left out, the days are those '
  'of the current period until today.';

create function private.get_usage_daily(from_day date, to_day date, meter text, at timestamptz) returns jsonb
language plpgsql stable security definer set search_path = ''
as $$
begin
  return private.show_usage_daily(private.require_org('usage.view'), from_day, to_day, meter, at);
end
$$;
revoke all on function private.get_usage_daily(date, date, text, timestamptz) from public;
grant execute on function private.get_usage_daily(date, date, text, timestamptz) to authenticated;
comment on function private.get_usage_daily(date, date, text, timestamptz) is
  'Usage of the caller''s organization day by day, both ends included, of one meter or all. A day without usage has no row. Left out, '
  'the days are those of the current period until today.';

create function public.get_usage_daily(from_day date default null, to_day date default null, meter text default null) returns jsonb
language sql stable set search_path = ''
as $$
  select private.get_usage_daily(from_day, to_day, meter, private.clock_now())
$$;
revoke all on function public.get_usage_daily(date, date, text) from public, anon;
grant execute on function public.get_usage_daily(date, date, text) to authenticated;
comment on function public.get_usage_daily(date, date, text) is
  'Usage of the caller''s organization, {"timezone","from","to","days":[{"day","meter","quantity","events"}]}, of one meter or all.';

create function private.open_usage(request jsonb, at timestamptz) returns jsonb
language plpgsql stable security definer set search_path = ''
as $$
declare
  organization constant uuid := (
    select tenant.id from public.organizations as tenant where tenant.id = private.read_uuid(request, 'organization_id')
  );
begin
  if organization is null then
    perform private.raise_error(404, 'organization_not_found', 'There is no such organization', 'organization_id');
  end if;
  return jsonb_build_object(
    'usage', private.show_usage_overview(organization, at), 'daily', private.show_usage_daily(organization, null, null, null, at)
  );
end
$$;
revoke all on function private.open_usage(jsonb, timestamptz) from public;
grant execute on function private.open_usage(jsonb, timestamptz) to service_role;
comment on function private.open_usage(jsonb, timestamptz) is
  'What the page of usage shows, for a link that somebody who may see it has made: the link''s signature says so, not a token.';

create function public.open_usage(jsonb) returns jsonb
language sql stable set search_path = ''
as $$
  select private.open_usage($1, private.clock_now())
$$;
revoke all on function public.open_usage(jsonb) from public, anon, authenticated;
grant execute on function public.open_usage(jsonb) to service_role;
comment on function public.open_usage(jsonb) is
  'For usage-metering. {"v":1,"organization_id"} gives {"usage","daily"}, as get_usage_overview() and get_usage_daily() of the current period.';

-- Does it all add up? -------------------------------------------------------------------------------------------------------------
--
-- Keys, events, days and counters are written together and must agree for ever. Whoever finds that they do not stops the billing of
-- that organization, and nothing else: calls go on, usage is counted, and a person looks.

create function private.check_usage(organization_id uuid default null) returns table (organization uuid, meter text, problem text)
language sql stable security definer set search_path = ''
as $$
  -- One statement, so that all four are seen at one moment.
  with event as (
    select own.organization_id, own.meter_key, own.day, sum(own.quantity) as quantity, count(*) as events
    from private.usage_events as own
    where own.organization_id = $1 or $1 is null
    group by own.organization_id, own.meter_key, own.day
    union all
    -- What the events of dropped months came to.
    select own.organization_id, own.meter_key, own.day, own.quantity, own.events
    from private.usage_seals as own
    where own.organization_id = $1 or $1 is null
  ),
  by_day as (
    select event.organization_id, event.meter_key, event.day, sum(event.quantity) as quantity, sum(event.events) as events
    from event
    group by event.organization_id, event.meter_key, event.day
  ),
  day as (
    select own.* from public.usage_days as own where own.organization_id = $1 or $1 is null
  ),
  -- What is not summed is looked up again: the largest, the latest, the different ones.
  looked_up as (
    select
      reading.organization_id, reading.meter_key, reading.day,
      case known.aggregation
        when 'max' then max(reading.quantity)
        when 'unique' then count(distinct reading.value_hash) filter (where reading.quantity > 0)
        else (array_agg(reading.quantity order by reading.occurred_at desc, reading.source desc, reading.key desc))[1]
      end as quantity,
      sum(reading.quantity) as added
    from private.usage_readings as reading
    join public.meters as known on known.key = reading.meter_key
    where reading.organization_id = $1 or $1 is null
    group by reading.organization_id, reading.meter_key, reading.day, known.aggregation
  ),
  known as (
    -- A call is one key of two meters.
    select
      own.organization_id, split.meter_key, sum(split.quantity) as quantity
    from private.usage_keys as own
    cross join lateral (
      values (own.meter_key, own.quantity), (case when own.source = 'call' then 'ai_calls' end, (own.quantity > 0)::integer::bigint)
    ) as split (meter_key, quantity)
    where split.meter_key is not null and own.quantity is not null and (own.organization_id = $1 or $1 is null)
    group by own.organization_id, split.meter_key
  ),
  counter as (
    select own.* from public.usage_logs as own where own.organization_id = $1 or $1 is null
  )
  select
    coalesce(by_day.organization_id, day.organization_id), coalesce(by_day.meter_key, day.meter_key),
    format(
      'on %s: %s in %s events, %s in %s by day', coalesce(by_day.day, day.day), coalesce(looked_up.quantity, by_day.quantity, 0),
      coalesce(by_day.events, 0), coalesce(day.quantity, 0), coalesce(day.events, 0)
    )
  from by_day
  full join day on day.organization_id = by_day.organization_id and day.meter_key = by_day.meter_key and day.day = by_day.day
  left join looked_up
    on looked_up.organization_id = coalesce(by_day.organization_id, day.organization_id)
    and looked_up.meter_key = coalesce(by_day.meter_key, day.meter_key)
    and looked_up.day = coalesce(by_day.day, day.day)
  where (coalesce(looked_up.quantity, by_day.quantity, 0), coalesce(by_day.events, 0)) <> (coalesce(day.quantity, 0), coalesce(day.events, 0))
  union all
  select looked_up.organization_id, looked_up.meter_key, format('on %s: %s in events, %s in readings', looked_up.day, coalesce(by_day.quantity, 0), looked_up.added)
  from looked_up
  left join by_day
    on by_day.organization_id = looked_up.organization_id and by_day.meter_key = looked_up.meter_key and by_day.day = looked_up.day
  where looked_up.added <> coalesce(by_day.quantity, 0)
  union all
  select
    coalesce(total.organization_id, known.organization_id), coalesce(total.meter_key, known.meter_key),
    format('in all: %s by events, %s by keys', coalesce(total.quantity, 0), coalesce(known.quantity, 0))
  from (
    select by_day.organization_id, by_day.meter_key, sum(by_day.quantity) as quantity
    from by_day
    group by by_day.organization_id, by_day.meter_key
  ) as total
  full join known on known.organization_id = total.organization_id and known.meter_key = total.meter_key
  where coalesce(total.quantity, 0) <> coalesce(known.quantity, 0)
  union all
  select
    counter.organization_id, counter.feature_key,
    format(
      'from %s to %s: %s counted, %s prepaid, by day %s and %s', counter.period_start, counter.period_end - 1, counter.usage_count,
      counter.prepaid, counter.by_day, coalesce(counter.prepaid_by_day, 0)
    )
  from (
    select
      own.organization_id, own.feature_key, own.period_start, own.period_end, own.usage_count, own.prepaid, sum(day.prepaid) as prepaid_by_day,
      case
        when known_meter.aggregation in ('sum', 'count') then coalesce(sum(day.quantity), 0)
        else private.period_usage(own.organization_id, own.feature_key, own.period_start, own.period_end)
      end as by_day
    from counter as own
    join public.meters as known_meter on known_meter.key = own.feature_key
    left join day
      on day.organization_id = own.organization_id
      and day.meter_key = own.feature_key
      and day.day >= own.period_start and day.day < own.period_end
    group by
      own.organization_id, own.id, own.feature_key, own.period_start, own.period_end, own.usage_count, own.prepaid, known_meter.aggregation
  ) as counter
  where (counter.usage_count, counter.prepaid) <> (counter.by_day, coalesce(counter.prepaid_by_day, 0))
  union all
  select day.organization_id, day.meter_key, format('%s belongs to no period', day.day)
  from day
  where day.quantity <> 0
    and not exists (
      select
      from public.usage_logs as log
      where log.organization_id = day.organization_id
        and log.feature_key = day.meter_key
        and log.period_start <= day.day and day.day < log.period_end
    )
$$;
comment on function private.check_usage(uuid) is
  'Compares events, keys, days and counters and returns what disagrees: nothing, ever. For one organization or all.';

create function private.reconcile_usage(request jsonb, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  wrong jsonb;
  held uuid[];
begin
  with problem as (
    select found.organization, jsonb_agg(found.meter || ' ' || found.problem order by found.meter, found.problem) as problems
    from private.check_usage() as found
    group by found.organization
  ),
  stopped as (
    update public.subscriptions as subscription
    set billing_hold = 'usage does not add up: ' || (problem.problems ->> 0)
    from problem
    where subscription.organization_id = problem.organization
      and subscription.status not in ('cancelled', 'inactive')
      and subscription.billing_hold is null
    returning subscription.id, subscription.organization_id, subscription.billing_hold
  ),
  told as (
    insert into private.outbox (organization_id, topic, key, payload, created_at)
    select
      stopped.organization_id, 'billing.held', stopped.id || ' ' || at, jsonb_build_object('subscription_id', stopped.id, 'reason', stopped.billing_hold),
      at
    from stopped
    on conflict do nothing
  )
  select
    jsonb_agg(jsonb_build_object('organization_id', problem.organization, 'problems', problem.problems) order by problem.organization),
    (select array_agg(stopped.organization_id) from stopped)
  into wrong, held
  from problem;
  return jsonb_build_object('wrong', coalesce(wrong, '[]'), 'held', coalesce(cardinality(held), 0));
end
$$;
comment on function private.reconcile_usage(jsonb, timestamptz) is
  'Stops the billing of every organization whose usage does not add up, tells of it, and returns what is wrong. Nothing else stops.';

create function public.reconcile_usage(jsonb) returns jsonb
language sql set search_path = ''
as $$
  select private.reconcile_usage($1, private.clock_now())
$$;
comment on function public.reconcile_usage(jsonb) is
  'For usage-metering, by schedule. {"v":1} gives {"wrong":[{"organization_id","problems":[…]}],"held":n}.';

create function private.lift_billing_hold(organization_id uuid, reason text, at timestamptz) returns boolean
language plpgsql security definer set search_path = ''
as $$
declare
  wrong text := (select found.meter || ' ' || found.problem from private.check_usage(lift_billing_hold.organization_id) as found limit 1);
  lifted public.subscriptions;
begin
  if coalesce(btrim(reason), '') = '' then
    perform private.raise_error(422, 'reason_missing', 'Say why billing goes on', 'reason');
  end if;
  if wrong is not null then
    perform private.raise_error(409, 'usage_disagrees', 'Usage still does not add up: ' || wrong);
  end if;
  update public.subscriptions as subscription
  set billing_hold = null
  where subscription.organization_id = lift_billing_hold.organization_id
    and subscription.status not in ('cancelled', 'inactive')
    and subscription.billing_hold is not null
  returning subscription.* into lifted;
  if not found then
    return false;
  end if;
  perform private.audit(organization_id, 'billing.resumed', 'subscription', lifted.id, jsonb_build_object('reason', reason), at);
  return true;
end
$$;
comment on function private.lift_billing_hold(uuid, text, timestamptz) is
  'Lets an organization be billed again, for an operator who has mended what was wrong: refused while usage does not add up. The periods '
  'that were missed are billed by the next run. Says whether there was a hold.';

revoke all on function
  private.check_usage(uuid), private.reconcile_usage(jsonb, timestamptz), public.reconcile_usage(jsonb),
  private.lift_billing_hold(uuid, text, timestamptz)
from public, anon, authenticated, service_role;
grant execute on function private.reconcile_usage(jsonb, timestamptz), public.reconcile_usage(jsonb) to service_role;

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
      select coalesce(sum(total.prepaid), 0)::bigint
      into moved_prepaid
      from public.usage_days as total
      where total.organization_id = cut_usage_periods.organization_id
        and total.meter_key = log.feature_key
        and total.day >= from_day and total.day < log.period_end;
      moved := private.period_usage(log.organization_id, log.feature_key, from_day, log.period_end);
      update public.usage_logs as counter
      set
        period_end = least(counter.period_end, from_day),
        usage_count = private.period_usage(log.organization_id, log.feature_key, log.period_start, least(log.period_end, from_day)),
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

create function private.grant_monthly_credit(subscription_ids uuid[], at timestamptz) returns integer
language plpgsql security definer set search_path = ''
as $$
declare
  due record;
  granted integer := 0;
begin
  -- The month that `at` is in, from the anchor, also within a year. A month that nobody looked at is over: what it would have granted has
  -- expired. Wallets are locked in one order.
  for due in
    select
      subscription.id, subscription.organization_id, price.currency, price.monthly_credit_minor as amount_minor,
      private.local_midnight(month.starts_on, subscription.timezone) as starts_at,
      private.local_midnight(month.ends_on, subscription.timezone) as ends_at,
      'monthly ' || subscription.id || ' ' || month.starts_on as key
    from public.subscriptions as subscription
    join public.plan_prices as price on price.id = subscription.plan_price_id and price.monthly_credit_minor > 0
    cross join lateral (
      select
        private.period_boundary(subscription.anchor_on, 'monthly', number.month) as starts_on,
        private.period_boundary(subscription.anchor_on, 'monthly', number.month + 1) as ends_on
      from generate_series(
        greatest((at::date - subscription.anchor_on) / 31 - 1, 0), greatest((at::date - subscription.anchor_on) / 28 + 1, 0)
      ) as number (month)
    ) as month
    where (subscription.id = any (subscription_ids) or subscription_ids is null)
      and subscription.status in ('active', 'past_due')
      and private.local_midnight(month.starts_on, subscription.timezone) <= at
      and private.local_midnight(month.ends_on, subscription.timezone) > at
      and not exists (
        select
        from public.credit_transactions as written
        where written.organization_id = subscription.organization_id
          and written.idempotency_key = 'monthly ' || subscription.id || ' ' || month.starts_on
      )
    order by subscription.organization_id
  loop
    perform private.post_credit(
      due.organization_id, 'monthly_grant', due.currency, due.amount_minor, due.key, at, due.ends_at, 'subscription', due.id,
      'Included in the plan'
    );
    granted := granted + 1;
  end loop;
  return granted;
end
$$;
comment on function private.grant_monthly_credit(uuid[], timestamptz) is
  'Grants the credit that the prices of these subscriptions, of all where none are named, include in the month of `at`, once a month. It '
  'expires when the next month begins. A trial has none.';

create function private.renew_credit(request jsonb, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  expired jsonb := private.expire_credit(request, at);
begin
  return expired || jsonb_build_object('granted', private.grant_monthly_credit(null, at));
end
$$;
comment on function private.renew_credit(jsonb, timestamptz) is
  'Takes out what has expired and grants what the month brings: for the months of a yearly price, and for whom a month began while nothing ran.';

create function public.renew_credit(jsonb) returns jsonb
language sql set search_path = ''
as $$
  select private.renew_credit($1, private.clock_now())
$$;
comment on function public.renew_credit(jsonb) is 'For usage-metering, by schedule. {"v":1,"limit":500} gives {"granted":n,"expired":n,"more":bool}.';

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
  private.check_credit(uuid), public.expire_credit(jsonb), private.grant_monthly_credit(uuid[], timestamptz),
  private.renew_credit(jsonb, timestamptz), public.renew_credit(jsonb)
from public, anon, authenticated, service_role;
grant execute on function
  private.expire_credit(jsonb, timestamptz), public.expire_credit(jsonb), private.renew_credit(jsonb, timestamptz), public.renew_credit(jsonb)
to service_role;


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
