-- How a meter adds up and rounds is data; what an organization has of what its plan has room for is counted where it is made; usage
-- events have a retention; a plan may grant credit for each month; and an event costs less to count.

set local lock_timeout = '5s';
set local statement_timeout = '60s';

alter table public.meters
  add column aggregation text not null default 'sum',
  add column source text not null default 'events',
  add column rounding text not null default 'none',
  add column pulse bigint not null default 1;
update public.meters set aggregation = case key when 'ai_calls' then 'count' else 'sum' end, source = 'calls'
where key in ('ai_calls', 'call_seconds');
insert into public.meters (key, name, unit, is_reserved, position, aggregation, source)
values
  ('users', 'Users', 'user', true, 200, 'latest', 'rows'),
  ('projects', 'Projects', 'project', true, 210, 'latest', 'rows'),
  ('campaigns', 'Campaigns', 'campaign', true, 220, 'latest', 'rows'),
  ('leads', 'Leads', 'lead', true, 230, 'latest', 'rows'),
  ('stores', 'Stores', 'store', true, 240, 'latest', 'rows')
on conflict (key) do nothing;
alter table public.meters
  -- The table is new or small: it is read in no time.
  -- squawk-ignore constraint-missing-not-valid
  add constraint meters_aggregation_known check (aggregation in ('sum', 'count', 'max', 'unique', 'latest')),
  -- The table is new or small: it is read in no time.
  -- squawk-ignore constraint-missing-not-valid
  add constraint meters_source_known check (source in ('events', 'calls', 'rows')),
  -- The table is new or small: it is read in no time.
  -- squawk-ignore constraint-missing-not-valid
  add constraint meters_source_is_reserved check (source = 'events' or is_reserved),
  -- The table is new or small: it is read in no time.
  -- squawk-ignore constraint-missing-not-valid
  add constraint meters_rounding_known check (rounding in ('none', 'event', 'period')),
  -- The table is new or small: it is read in no time.
  -- squawk-ignore constraint-missing-not-valid
  add constraint meters_rounding_of_sums check (rounding = 'none' or aggregation = 'sum'),
  -- The table is new or small: it is read in no time.
  -- squawk-ignore constraint-missing-not-valid
  add constraint meters_pulse_positive check (pulse > 0);
comment on table public.meters is 'What can be counted: one row a kind of usage, with its unit and how it is added up.';
comment on column public.meters.aggregation is
  'What a day and a period make of its events: sum of their quantities, count of them, the largest quantity, how many different values, or '
  'the latest quantity.';
comment on column public.meters.source is
  'Who counts: events of an organization''s own systems, the database for each call that ends, or the rows that are there now.';
comment on column public.meters.rounding is
  'none counts by the unit, event counts each event (each call) up to started pulses, period bills the period''s sum up to started pulses.';
comment on column public.meters.pulse is 'How many units a pulse has: 60 makes started minutes of seconds.';

alter table public.plan_prices add column monthly_credit_minor bigint not null default 0;
-- The table is new or small: it is read in no time.
-- squawk-ignore constraint-missing-not-valid
alter table public.plan_prices add constraint plan_prices_monthly_credit_not_negative check (monthly_credit_minor >= 0);
comment on column public.plan_prices.monthly_credit_minor is
  'Prepaid credit that each month of a paid subscription begins with, once, in the price''s currency; what is left of it at the month''s '
  'end is gone.';

-- A wider one takes its place in this transaction.
-- squawk-ignore ban-drop-constraint
alter table private.usage_keys drop constraint usage_keys_organization_id_fkey;
alter table private.usage_keys
  -- Before the first release no installation is in use: the table is small.
  -- squawk-ignore changing-column-type
  alter column source type text collate "C",
  -- Before the first release no installation is in use: the table is small.
  -- squawk-ignore changing-column-type
  alter column key type text collate "C",
  add column reported bigint;
comment on table private.usage_keys is
  'Every idempotency key ever counted, for ever: not split by time, since uniqueness would then depend on the event''s time. Its '
  'organization cannot go while its counters or its calls are there, which saves a look at it for every event.';
comment on column private.usage_keys.reported is
  'What was reported under this key, with all that corrected it, where its meter counts in pulses and that is another number.';

alter table private.usage_events add column value_hash bytea;
-- A wider one takes its place in this transaction.
-- squawk-ignore ban-drop-constraint
alter table private.usage_events drop constraint usage_events_quantity_signed;
-- The table is new or small: it is read in no time.
-- squawk-ignore constraint-missing-not-valid
alter table private.usage_events add constraint usage_events_quantity_signed check (quantity >= 0 or corrects is not null);
comment on column private.usage_events.value_hash is
  'First 16 bytes of the SHA-256 of its value, for a meter that counts different values: the value itself is nobody''s business here.';

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

insert into private.retention_rules (table_name, strip_after, strip_columns, keep_months)
values ('private.usage_events', null, '{}', 96)
on conflict (table_name) do nothing;
insert into private.personal_data (table_name, column_name, found_by, treatment, reason)
values
  ('private.usage_readings', '*', 'none', 'kept', 'What was counted, for the bill: a key of the counting system and an amount.'),
  ('private.usage_seals', '*', 'none', 'kept', 'What was counted, for the bill: sums by day.');

-- Only functions that this migration replaces call it.
-- squawk-ignore ban-drop-function
drop function private.count_usage(uuid, text[], text[], text[], bigint[], timestamptz[], timestamptz, text[], date[]);

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

create or replace function private.check_limit(organization uuid, counted text) returns void
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

create or replace function private.enforce_limit() returns trigger
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

create or replace function private.reserve_usage(organization_id uuid, meter text, quantity bigint, at timestamptz) returns boolean
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
  summed bigint[] := quantities;
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
      select given.position, coalesce(known_days[given.position], (least(given.occurred_at, at) at time zone zone)::date) as day
      from unnest(occurred) with ordinality as given (occurred_at, position)
    ),
    -- Kept, so that a period is looked for once a day and not once an event.
    placed as materialized (
      select distinct_day.day, period.*
      from (select distinct event.day from event) as distinct_day,
        lateral private.usage_period(subscription, count_usage.organization_id, zone, distinct_day.day, at) as period
    ),
    -- Sorted once: an aggregate that is told to sort does it for itself.
    ordered as (
      select placed.counted_on, placed.period_start, placed.period_end
      from event
      join placed using (day)
      order by event.position
    )
    select array_agg(ordered.counted_on), array_agg(ordered.period_start), array_agg(ordered.period_end)
    into days, starts, ends
    from ordered;

    insert into public.usage_logs (organization_id, feature_key, period_start, period_end, closed_at)
    select
      count_usage.organization_id, event.meter, event.period_start, event.period_end,
      case when event.period_start < first_day then at end
    from (
      select distinct given.meter, given.period_start, given.period_end
      from unnest(meters, starts, ends) as given (meter, period_start, period_end)
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
          from unnest(meters, starts) as event (meter, period_start)
        )
      order by log.feature_key, log.period_start
      for no key update
    )
    select
      -- A period before the current one is closed, and takes what comes late.
      count(*) filter (where counter.closed_at is null or counter.period_start < first_day or first_day is null) = (
        select count(*)
        from (select distinct event.meter, event.period_start from unnest(meters, starts) as event (meter, period_start)) as wanted
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

  -- What is not summed changes its day and period by something else than its quantity.
  if exists (
    select from public.meters as known where known.key = any (meters) and known.aggregation in ('max', 'unique', 'latest')
  ) then
    select
      array_agg(reading.meter), array_agg(reading.day), array_agg(reading.period_start), array_agg(reading.on_day),
      array_agg(reading.in_period)
    into changed_meters, changed_days, changed_starts, changes_on_day, changes_in_period
    from private.take_readings(
      organization_id, sources, keys, meters, quantities, occurred, corrected, value_hashes, days, starts, ends
    ) as reading;
    summed := array(
      select case when known.aggregation in ('max', 'unique', 'latest') then 0 else event.quantity end
      from unnest(meters, quantities) with ordinality as event (meter, quantity, position)
      left join public.meters as known on known.key = event.meter
      order by event.position
    );
  end if;

  with added as (
    select event.meter, event.period_start, sum(event.quantity)::bigint as quantity
    from (
      select given.meter, given.period_start, given.quantity
      from unnest(meters, starts, summed) as given (meter, period_start, quantity)
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
  select count_usage.organization_id, event.meter, event.day, sum(event.quantity)::bigint, sum(event.events)
  from (
    select given.meter, given.day, given.quantity, 1 as events
    from unnest(meters, days, summed) as given (meter, day, quantity)
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
      select event.meter, event.day, sum(event.quantity)::bigint as quantity, sum(event.events) as events
      from (
        select given.meter, given.day, given.quantity, 1 as events
        from unnest(meters, days, summed) as given (meter, day, quantity)
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

create or replace function private.meter_call(attempt public.call_logs, at timestamptz) returns void
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
  'the plan, once, also when the carrier reports them later. Other seconds than were counted before settle the difference.';

create or replace function private.hold_calls(
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

create or replace function private.correct_call(attempt public.call_logs, billed bigint, at timestamptz) returns void
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
  perform private.count_usage(
    attempt.organization_id, array_fill('call'::text, array[1 + abs(calls)]), array_fill(correction, array[1 + abs(calls)]),
    array['call_seconds'] || case when calls <> 0 then array['ai_calls'] else '{}' end,
    array[delta] || case when calls <> 0 then array[calls::bigint] else '{}' end,
    array_fill(known.occurred_at, array[1 + abs(calls)]), at, array_fill(attempt.id::text, array[1 + abs(calls)]),
    array_fill(counted_on, array[1 + abs(calls)])
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

create function private.parse_instants(given text[]) returns timestamptz[]
language plpgsql stable set search_path = ''
as $$
begin
  -- All at once; one by one only where one of them names a day that the calendar does not have.
  return array(
    select case
      when text.said ~ '^\d{4}-\d{2}-\d{2}[Tt ]\d{2}:\d{2}:\d{2}(\.\d{1,9})?([Zz]|[+-]\d{2}:\d{2})$' then text.said::timestamptz
    end
    from unnest(given) with ordinality as text (said, position)
    order by text.position
  );
exception
  when datetime_field_overflow or invalid_datetime_format then
    return array(
      select private.parse_instant(text.said) from unnest(given) with ordinality as text (said, position) order by text.position
    );
end
$$;
revoke all on function private.parse_instants(text[]) from public;
comment on function private.parse_instants(text[]) is 'RFC 3339 dates and times, each null where the text is none.';

create or replace function private.record_usage(request jsonb, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  api_key record;
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
  instants timestamptz[];
  place integer;
  original private.usage_keys;
  meter public.meters;
  said_in_all bigint;
  has_corrections boolean;
begin
  if request ? 'organization_id' and not request ? 'api_key' then
    -- From the platform's own queue.
    select tenant.id as organization_id, array['usage.write'] as scopes
    into api_key
    from public.organizations as tenant
    where tenant.id = private.read_uuid(request, 'organization_id');
    if not found then
      perform private.raise_error(404, 'organization_not_found', 'There is no such organization', 'organization_id');
    end if;
  else
    select key.organization_id, key.scopes
    into api_key
    from public.api_keys as key
    where key.prefix = request #>> '{api_key,prefix}'
      and encode(key.sha256, 'hex') = lower(request #>> '{api_key,sha256}')
      and key.revoked_at is null;
    if not found then
      perform private.raise_error(401, 'invalid_api_key', 'The API key is unknown or revoked');
    end if;
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
  instants := private.parse_instants(array(
    select item.value ->> 'time' from jsonb_array_elements(given) with ordinality as item (value, position) order by item.position
  ));

  -- What is wrong with an event concerns that event alone. A count and a value that is counted need no quantity: it is one. Each step is
  -- kept, so that what it reads is read once and not wherever a later one names it.
  with event as materialized (
    select
      item.position,
      coalesce(item.value ->> 'specversion', '1.0') as specversion,
      item.value ->> 'id' as id,
      item.value ->> 'source' as source,
      item.value ->> 'type' as type,
      case
        when jsonb_typeof(item.value -> 'quantity') = 'number' and item.value ->> 'quantity' ~ '^-?[0-9]{1,15}$'
        then (item.value ->> 'quantity')::bigint
      end as quantity,
      coalesce(jsonb_typeof(item.value -> 'quantity'), 'null') = 'null' as is_unsaid,
      case when jsonb_typeof(item.value -> 'value') = 'string' then item.value ->> 'value' end as value,
      coalesce(jsonb_typeof(item.value -> 'corrects'), 'null') <> 'null' as is_correction,
      item.value -> 'corrects' as correction,
      item.value ->> 'corrects' as corrects,
      coalesce(jsonb_typeof(item.value -> 'time'), 'null') <> 'null' as is_timed,
      instants[item.position] as instant
    from jsonb_array_elements(given) with ordinality as item (value, position)
  ),
  said as materialized (
    select
      event.position, event.specversion, event.id, event.source, event.type, event.is_correction, event.correction, event.corrects,
      event.is_timed, event.instant, event.value,
      case
        when event.is_unsaid and not event.is_correction and known.aggregation in ('count', 'unique') then 1
        else event.quantity
      end as quantity,
      known.key is not null and known.is_active as is_known, known.is_reserved, known.aggregation, known.rounding, known.pulse
    from event
    left join public.meters as known on known.key = event.type
  ),
  judged as materialized (
    select
      said.*,
      case
        when said.specversion <> '1.0' then 'invalid_specversion'
        when coalesce(said.id, '') = '' or length(said.id) > 255 then 'invalid_id'
        when coalesce(said.source, '') = '' or length(said.source) > 255 then 'invalid_source'
        when said.source = 'call' then 'reserved_source'
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
        when said.instant > at + interval '5 minutes' then 'time_in_future'
      end as code
    from said
  ),
  -- Sorted once: an aggregate that is told to sort does it for itself.
  ordered as (
    select
      judged.id, judged.source, judged.type, judged.quantity, judged.corrects, judged.code,
      coalesce(judged.instant, at) as occurred_at,
      case when judged.rounding = 'event' and not judged.is_correction then private.whole_pulses(judged.quantity, judged.pulse) else judged.quantity end
        as counted,
      case when judged.aggregation = 'unique' and not judged.is_correction then judged.value end as value,
      substring(sha256(convert_to(
        concat_ws(
          e'\x1f', judged.type, judged.quantity, coalesce(extract(epoch from judged.instant)::text, 'now'), judged.corrects,
          case when judged.aggregation = 'unique' and not judged.is_correction then judged.value end
        ), 'UTF8'
      )) for 16) as body_hash
    from judged
    order by judged.position
  )
  select
    array_agg(coalesce(ordered.id, '')), array_agg(coalesce(ordered.source, '')), array_agg(ordered.type), array_agg(ordered.quantity),
    array_agg(ordered.counted), array_agg(ordered.occurred_at), array_agg(ordered.body_hash),
    array_agg(case when ordered.value is not null then substring(sha256(convert_to(ordered.value, 'UTF8')) for 16) end),
    array_agg(ordered.corrects), array_fill(null::date, array[count(*)::integer]), array_agg(ordered.code),
    array_agg(case when ordered.code is not null then 'rejected' end), bool_or(ordered.corrects is not null and ordered.code is null)
  into ids, sources, meters, quantities, counts, occurred, hashes, value_hashes, corrected, days, codes, statuses, has_corrections
  from ordered;

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
      api_key.organization_id, first.source, first.id, first.hash, case when first.corrects is null then first.meter end,
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
      where known.organization_id = api_key.organization_id and known.source = sources[place] and known.key = corrected[place]
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
        where known.organization_id = api_key.organization_id and known.source = sources[place] and known.key = corrected[place];
        occurred[place] := original.occurred_at;
        days[place] := private.day_of_key(original);
      else
        -- Nobody has seen its key yet: it is free for the same correction, once there is something to correct.
        delete from private.usage_keys as known
        where known.organization_id = api_key.organization_id and known.source = sources[place] and known.key = ids[place];
        statuses[place] := 'rejected';
        stored := array_remove(stored, place);
      end if;
    end loop;
  end if;

  if cardinality(stored) = cardinality(ids) then
    statuses := array_fill('stored'::text, array[cardinality(ids)]);
  else
    with event as (
      select given.*, given.position = any (coalesce(stored, '{}')) as is_stored
      from unnest(sources, ids, hashes, statuses) with ordinality as given (source, id, hash, status, position)
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
        and known.organization_id = api_key.organization_id and known.source = event.source and known.key = event.id
      order by event.position
    )
    select array_agg(ordered.status)
    into statuses
    from ordered;
  end if;

  if cardinality(stored) = cardinality(ids) then
    perform private.count_usage(
      api_key.organization_id, sources, ids, meters, counts, occurred, at, case when has_corrections then corrected end,
      case when has_corrections then days end, value_hashes
    );
  elsif cardinality(stored) > 0 then
    perform private.count_usage(
      api_key.organization_id, array_agg(sources[position]), array_agg(ids[position]), array_agg(meters[position]),
      array_agg(counts[position]), array_agg(occurred[position]), at, array_agg(corrected[position]), array_agg(days[position]),
      array_agg(value_hashes[position]))
    from unnest(stored) as position;
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
              when 'reserved_source' then 'The source "call" belongs to the platform'
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

create or replace function private.get_usage(at timestamptz) returns jsonb
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
      where meter.source <> 'rows' and (own.meter_key is not null or log.id is not null)
    ), '[]')
  );
end
$$;
revoke all on function private.get_usage(timestamptz) from public;
grant execute on function private.get_usage(timestamptz) to authenticated;
comment on function private.get_usage(timestamptz) is
  'Usage of the caller''s organization in the billing period of `at`, meter by meter; null in included or limit is unlimited.';

create function private.get_usage_overview(at timestamptz) returns jsonb
language plpgsql stable security definer set search_path = ''
as $$
declare
  organization uuid := private.require_org('usage.view');
begin
  return private.get_usage(at) || jsonb_build_object('standing', (
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

create or replace function private.check_usage(organization_id uuid default null) returns table (organization uuid, meter text, problem text)
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

create or replace function private.cut_usage_periods(organization_id uuid, from_day date, period_end date, at timestamptz) returns void
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

create function private.billable_units(quantity bigint, meter public.meters) returns bigint
language plpgsql immutable set search_path = ''
as $$
begin
  return case when meter.rounding = 'period' then private.whole_pulses(quantity, meter.pulse) else quantity end;
end
$$;
comment on function private.billable_units(bigint, public.meters) is
  'What a period''s quantity is on its bill: up to started pulses where its meter says so, else as it is.';

create or replace function private.price_periods(subscription_ids uuid[], issuer private.billing_issuer, at timestamptz)
returns table (
  organization_id uuid, subscription_id uuid, currency text, period_start timestamptz, period_end timestamptz, timezone text,
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
      ended.invoice_id, term.*, meter.name, meter.unit, meter.position,
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
  ),
  late as materialized (
    -- Periods that were billed before and have changed since, each at its own price.
    select
      ended.invoice_id, log.organization_id, log.feature_key, log.period_start, gen_random_uuid() as line_id, meter.name, meter.unit, meter.position,
      term.overage_price_minor, term.overage_unit,
      greatest(private.billable_units(log.usage_count - log.prepaid, meter) - nullif(term.included_units, -1), 0)
        - greatest(private.billable_units(log.billed_count, meter) - nullif(term.included_units, -1), 0) as quantity,
      private.divide_half_away(
        greatest(private.billable_units(log.usage_count - log.prepaid, meter) - nullif(term.included_units, -1), 0)::numeric * term.overage_price_minor, term.overage_unit)
        - private.divide_half_away(
          greatest(private.billable_units(log.billed_count, meter) - nullif(term.included_units, -1), 0)::numeric * term.overage_price_minor, term.overage_unit)
        as amount_minor,
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
  ),
  current_item as materialized (
    select
      ended.invoice_id, null::uuid as line_id, 0 as rank, 0 as meter_position, 'base' as kind, null::text as meter_key,
      ended.plan_name || ' plan, ' || ended.billing_cycle || case when ended.period_no < 0 then ' (trial)' else '' end as description,
      1::bigint as quantity, case ended.billing_cycle when 'yearly' then 'year' else 'month' end as unit,
      case when ended.period_no < 0 then 0 else ended.base_minor end as unit_price_minor, 1::bigint as price_units,
      case when ended.period_no < 0 then 0 else ended.base_minor end as amount_minor
    from ended
    union all
    select
      used.invoice_id, null, 1, used.position, 'included', used.meter_key,
      used.name || ' included: ' || private.describe_quantity(least(used.quantity, used.allowance), used.unit)
        || case when used.allowance is null then ', unlimited' else ' of ' || private.describe_quantity(used.allowance, used.unit) end,
      least(used.quantity, used.allowance), used.unit, 0, 1, 0
    from used
    where used.allowance is null or used.allowance > 0
    union all
    select
      used.invoice_id, null, 2, used.position, 'overage', used.meter_key,
      used.name || ' beyond the plan: ' || private.describe_quantity(used.quantity - used.allowance, used.unit),
      used.quantity - used.allowance, used.unit, used.overage_price_minor, used.overage_unit,
      private.rate_units(used.quantity - used.allowance, used.overage_price_minor, used.overage_unit)
    from used
    where used.quantity > used.allowance and used.overage_price_minor is not null
  ),
  adjustable as materialized (
    -- What an invoice would have to give back more than it charges waits for the next one.
    select late.*
    from late
    join (
      select whole.invoice_id, sum(whole.amount_minor) as amount_minor
      from (
        select current_item.invoice_id, current_item.amount_minor from current_item
        union all
        select late.invoice_id, coalesce(late.amount_minor, 0) from late
      ) as whole
      group by whole.invoice_id
    ) as outcome using (invoice_id)
    where outcome.amount_minor > 0 or coalesce(late.amount_minor, 0) = 0
  ),
  item as materialized (
    select current_item.* from current_item
    union all
    select
      adjustable.invoice_id, adjustable.line_id, 3, adjustable.position, 'adjustment', adjustable.feature_key,
      adjustable.name || ' beyond the plan, ' || adjustable.period_start || ' to ' || adjustable.period_end - 1 || ', told later: '
        || case when adjustable.quantity < 0 then '-' else '' end || private.describe_quantity(abs(adjustable.quantity), adjustable.unit),
      adjustable.quantity, adjustable.unit, adjustable.overage_price_minor, adjustable.overage_unit, adjustable.amount_minor
    from adjustable
    where adjustable.amount_minor <> 0
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
          item.amount_minor, item.line_id
        )::private.priced_line
        order by item.number) as lines
    from (
      select
        item.*,
        (row_number() over (partition by item.invoice_id order by item.rank, item.meter_position, item.meter_key, item.description))::integer as number
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
    ended.organization_id, ended.id, ended.currency, ended.current_period_start, ended.current_period_end, ended.timezone,
    ended.first_day, ended.next_day - 1, subtotal.amount_minor, coalesce(row_tax.amount_minor, 0),
    jsonb_strip_nulls(
      to_jsonb(issuer) - 'singleton' || jsonb_build_object('place_of_supply', supplier.code || '-' || supplier.name)
    ),
    ended.customer, row_line.lines, coalesce(row_tax.taxes, '{}'),
    array(
      select
        (adjustable.feature_key, adjustable.period_start, case when adjustable.amount_minor <> 0 then adjustable.line_id end)::private.priced_adjustment
      from adjustable
      where adjustable.invoice_id = ended.invoice_id
    )
  from ended
  join subtotal using (invoice_id)
  join row_line using (invoice_id)
  left join row_tax using (invoice_id);
end
$$;
comment on function private.price_periods(uuid[], private.billing_issuer, timestamptz) is
  'What the current period of each subscription costs, from its price and its days: the one place where an invoice is priced, for the '
  'run and for who asks beforehand. In arrears, base included; a trial period has no base price; what came late to earlier periods adjusts it.';

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
comment on function private.close_periods(jsonb, timestamptz) is
  'Ends trials that are over, bills every ended period of the subscriptions it claims, once, and moves them to the period that `at` '
  'is in. Several may run at once.';

create function private.seal_usage(part regclass, before timestamptz) returns void
language plpgsql volatile security definer set search_path = '' as $$
begin
  execute format(
    'insert into private.usage_seals as seal (organization_id, meter_key, day, quantity, events)
     select event.organization_id, event.meter_key, event.day, sum(event.quantity)::bigint, count(*)
     from %s as event
     where event.occurred_at < $1
     group by event.organization_id, event.meter_key, event.day
     on conflict on constraint usage_seals_pkey
     do update set quantity = seal.quantity + excluded.quantity, events = seal.events + excluded.events',
    part
  ) using before;
end
$$;
comment on function private.seal_usage(regclass, timestamptz) is
  'Writes down what the usage events of a partition came to, before the same transaction takes them away.';

create or replace function private.apply_retention(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  days     constant integer := least(greatest(coalesce((request ->> 'days')::integer, 7), 1), 366);
  rule     private.retention_rules;
  parent   text;
  key_name name;
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
          if rule.table_name = 'private.usage_events' then
            perform private.seal_usage(to_regclass(format('private.%I', part.name)), oldest);
          end if;
          perform private.drop_month(to_regclass(format('private.%I', part.name)));
          dropped := dropped || to_jsonb('private.' || part.name);
        exception when lock_not_available then
          raise notice '% is in use; it is dropped at the next run', part.name;
        end;
      end loop;
      if rule.table_name = 'private.usage_events' then
        perform private.seal_usage(to_regclass(format('private.%I', parent || '_default')), oldest);
      end if;
      deleted := deleted + private.delete_before(to_regclass(format('private.%I', parent || '_default')), key_name, oldest);
    end if;

    if rule.strip_after is not null and cardinality(rule.strip_columns) > 0 then
      if rule.stripped_until is null then
        rule.stripped_until := private.first_time(rule.table_name::regclass, key_name);
      end if;
      cutoff := least(date_trunc('hour', at - rule.strip_after), rule.stripped_until + make_interval(days => days));
      if cutoff > rule.stripped_until then
        stripped := stripped
          + private.strip_between(rule.table_name::regclass, key_name, rule.strip_columns, rule.stripped_until, cutoff);
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
    done := private.count_astray(to_regclass(format('private.%I', part.name)));
    if done > 0 then
      unplaced := unplaced || jsonb_build_object(part.parent, done);
    end if;
  end loop;
  -- No queue holds an event for so long.
  delete from private.erased_persons as known where known.erased_at < at - interval '90 days';

  -- Old usage may come at any time: its month is made for it, a few of them a run, and whoever is in the way has it done by the next.
  for oldest in
    select distinct date_trunc('month', event.occurred_at at time zone 'UTC') at time zone 'UTC' as month
    from private.usage_events_default as event
    order by month
    limit 12
  loop
    begin
      perform private.ensure_partitions('private.usage_events', oldest, 0);
    exception when lock_not_available or deadlock_detected then
      raise notice 'usage_events is in use; the month of % is made at the next run', oldest;
    end;
  end loop;
  return jsonb_build_object('dropped', dropped, 'deleted', deleted, 'stripped', stripped, 'unplaced', unplaced);
end
$$;
comment on function private.apply_retention(jsonb, timestamptz) is
  'Empties what is old enough, drops months past their time, and tells of rows that no month''s partition took. The keys of events stay: '
  'a duplicate is one however late it comes. Failed and dead events keep what they carry until their month goes.';

create trigger meters_keep_their_meaning before update of aggregation, rounding, pulse on public.meters
  for each row
  when ((old.aggregation, old.rounding, old.pulse) is distinct from (new.aggregation, new.rounding, new.pulse))
  execute function private.refuse_meter_change();
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
revoke execute on function private.count_standing(uuid, text, bigint), private.seal_usage(regclass, timestamptz) from public, anon, authenticated, service_role;
revoke all on function private.billable_units(bigint, public.meters) from public, anon, authenticated;
revoke all on function
  private.grant_monthly_credit(uuid[], timestamptz), private.renew_credit(jsonb, timestamptz), public.renew_credit(jsonb)
from public, anon, authenticated, service_role;
grant execute on function private.renew_credit(jsonb, timestamptz), public.renew_credit(jsonb) to service_role;
comment on function public.record_usage(jsonb) is
  'For usage-metering. {"v":1,"api_key":{"prefix","sha256"} or "organization_id","events":[{"specversion"?,"id","source","type","time"?,"quantity"?,"value"?,"corrects"?}]} gives '
  '{"results":[{"id","status","code"?,"message"?}]}.';
