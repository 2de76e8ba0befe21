-- Metering's scenarios by their numbers: caps, the calendar in zones of whole, half and quarter hours, missed runs, late usage, repetition.
begin;
set local search_path = public, extensions, tap;
select plan(41);

insert into private.billing_issuer (legal_name, state_code, country_code, timezone)
values ('Issuer', 'KA', 'IN', 'Asia/Kolkata')
on conflict on constraint billing_issuer_pkey do update
set legal_name = 'Issuer', state_code = 'KA', country_code = 'IN', timezone = 'Asia/Kolkata', payment_terms_days = 15;
insert into public.meters (key, name, unit) values ('test_units', 'Units', 'unit');
insert into public.subscription_plans (id, slug, name)
values
  ('00000000-0000-4000-a000-000000000001', 'test-units', 'Units'), ('00000000-0000-4000-a000-000000000002', 'test-capped', 'Capped'),
  ('00000000-0000-4000-a000-000000000004', 'test-volume', 'Volume');
insert into public.plan_prices (id, plan_id, version, billing_cycle, base_minor)
values
  ('00000000-0000-4000-b000-000000000001', '00000000-0000-4000-a000-000000000001', 1, 'monthly', 0),
  ('00000000-0000-4000-b000-000000000002', '00000000-0000-4000-a000-000000000002', 1, 'monthly', 0),
  ('00000000-0000-4000-b000-000000000004', '00000000-0000-4000-a000-000000000004', 1, 'monthly', 0);
insert into public.plan_price_meters (plan_price_id, meter_key, included_units, overage_price_minor, pricing_model, tiers)
values (
  '00000000-0000-4000-b000-000000000004', 'test_units', 0, 10, 'volume', '[{"up_to": 15, "unit_minor": 10}, {"unit_minor": 5}]');
insert into public.plan_price_meters (plan_price_id, meter_key, included_units, overage_price_minor, limit_units, hard)
values
  ('00000000-0000-4000-b000-000000000001', 'test_units', 0, 10, -1, false),
  ('00000000-0000-4000-b000-000000000002', 'call_seconds', 3000, null, 3000, true);

create function pg_temp.tenant(n integer, zone text, plan text, at timestamptz) returns uuid
language sql as $$
  insert into public.organizations (id, name, timezone, country_code, state_code)
  values (('00000000-0000-4000-8000-0000000000' || lpad(n::text, 2, '0'))::uuid, 'Tenant ' || n, zone, 'IN', 'KA');
  select private.subscribe_organization(('00000000-0000-4000-8000-0000000000' || lpad(n::text, 2, '0'))::uuid, plan, 'active', at)
$$;
create function pg_temp.org(n integer) returns uuid
language sql as $$ select ('00000000-0000-4000-8000-0000000000' || lpad(n::text, 2, '0'))::uuid $$;
create function pg_temp.record(n integer, at timestamptz, variadic events text[]) returns text
language sql as $$
  select string_agg(result.value ->> 'status', ', ' order by result.position)
  from jsonb_array_elements(private.record_usage(
    jsonb_build_object('v', 1, 'organization_id', pg_temp.org(n), 'events', (
      -- id, quantity, when
      select jsonb_agg(jsonb_build_object(
        'id', split_part(event, ' ', 1), 'source', 'crm', 'type', 'test_units', 'quantity', split_part(event, ' ', 2)::integer,
        'time', nullif(split_part(event, ' ', 3), ''), 'corrects', nullif(split_part(event, ' ', 4), '')) order by position)
      from unnest(events) with ordinality as given (event, position)
    )), at) -> 'results') with ordinality as result (value, position)
$$;
create function pg_temp.periods(n integer) returns text
language sql as $$
  select string_agg(period_start || ' ' || usage_count, ', ' order by period_start)
  from public.usage_logs where organization_id = pg_temp.org(n) and feature_key = 'test_units'
$$;
create function pg_temp.invoices(n integer) returns text
language sql as $$
  select string_agg(first_day || ' ' || subtotal_minor, ', ' order by first_day) from public.invoices where organization_id = pg_temp.org(n)
$$;
create function pg_temp.closed(at timestamptz) returns integer
language sql as $$ select (private.close_periods('{}', at) ->> 'closed')::integer $$;

-- 13. A hard cap of fifty minutes.
select isnt(pg_temp.tenant(1, 'Asia/Kolkata', 'test-capped', '2026-01-01T10:00+05:30'), null, '13. Fifty minutes, hard');
create function pg_temp.end_call(attempt integer, seconds integer, at timestamptz) returns void
language sql as $$
  select private.meter_call(
    jsonb_populate_record(null::public.call_logs, jsonb_build_object(
      'id', '00000000-0000-4000-9000-' || lpad(attempt::text, 12, '0'), 'organization_id', pg_temp.org(1), 'direction', 'outbound',
      'ended_at', at, 'bill_duration_seconds', seconds)), at)
$$;
create function pg_temp.seconds() returns text
language sql as $$
  select usage_count || ' ' || reserved from public.usage_logs where organization_id = pg_temp.org(1) and feature_key = 'call_seconds'
$$;
select pg_temp.end_call(1, 2990, '2026-01-02T10:00Z');
select ok(not private.reserve_usage(pg_temp.org(1), 'call_seconds', 60, '2026-01-02T11:00Z'), '13. 60 seconds are refused where 10 are left');
select is(pg_temp.seconds(), '2990 0', '13. and nothing changes');
select ok(private.reserve_usage(pg_temp.org(1), 'call_seconds', 10, '2026-01-02T11:00Z'), '13. 10 are held');
select private.release_usage(pg_temp.org(1), 'call_seconds', 10, '2026-01-02T11:00Z');
select pg_temp.end_call(2, 25, '2026-01-02T11:01Z');
select is(pg_temp.seconds(), '3015 0', '13. The call of 25 seconds is recorded in full');
insert into auth.users (id, email) values ('00000000-0000-4000-c000-000000000001', 'owner@example.com');
update public.profiles set organization_id = pg_temp.org(1), system_role = 'owner' where id = '00000000-0000-4000-c000-000000000001';
set local request.jwt.claims = '{"sub": "00000000-0000-4000-c000-000000000001", "role": "authenticated"}';
create function pg_temp.shown(meter text) returns text
language plpgsql as $$
declare
  told text;
begin
  perform set_config('role', 'authenticated', true);
  select concat_ws(' ', item ->> 'used', item ->> 'limit', item ->> 'over_cap') into told
  from (select public.get_usage_overview() as usage) as asked, jsonb_array_elements(usage -> 'meters' || (usage -> 'standing')) as item
  where item ->> 'meter' = shown.meter;
  perform set_config('role', 'none', true);
  return told;
end
$$;
insert into private.clock_offset (shift) values ('2026-01-03T10:00Z'::timestamptz - now())
on conflict (single) do update set shift = excluded.shift;
select is(pg_temp.shown('call_seconds'), '3015 3000 true', '13. and is shown as over the cap');
select is(pg_temp.shown('users'), '1', 'What stands there is shown with it, and a limit that there is none of is not');
set local request.jwt.claims = '';

-- 25. New York, across the change of the clock.
select isnt(pg_temp.tenant(2, 'America/New_York', 'test-units', '2023-03-01T10:00-05:00'), null, '25. In New York');
select is(
  pg_temp.record(2, '2023-05-03T12:00Z', 'a 1 2023-03-01T05:00:00Z', 'b 1 2023-03-12T06:59:59Z', 'c 1 2023-04-01T03:59:59Z', 'd 1 2023-04-01T04:00:00Z',
    'e 1 2023-04-15T12:00:00Z', 'f 1 2023-04-30T23:59:59Z', 'g 1 2023-05-01T03:59:59Z', 'h 1 2023-05-01T04:00:00Z', 'i 1 2023-05-02T04:00:00Z'),
  'stored, stored, stored, stored, stored, stored, stored, stored, stored', '25. nine events'
);
select is(pg_temp.periods(2), '2023-03-01 3, 2023-04-01 4, 2023-05-01 2', '25. are three, four and two of their months');
select is(private.hours_in_period('2023-03-01T05:00Z', '2023-04-01T04:00Z')::integer, 743, '25. of which March has 743 hours');

-- 26. The anniversary in Kolkata.
select isnt(pg_temp.tenant(3, 'Asia/Kolkata', 'test-units', '2023-01-13T10:00+05:30'), null, '26. Since the 13th of January');
select is(pg_temp.record(3, '2023-01-20T12:00Z', 'a 5'), 'stored', '26. with something to bill');
select is(
  array(
    select pg_temp.closed(at::timestamptz) || ' ' || coalesce(pg_temp.invoices(3), '')
    from unnest(array['2023-02-12T18:00Z', '2023-02-12T19:00Z', '2023-02-13T00:00Z', '2023-02-13T18:00Z', '2023-02-13T19:00Z']) as at
  )::text[],
  array['0 ', '1 2023-01-13 50', '0 2023-01-13 50', '0 2023-01-13 50', '0 2023-01-13 50'],
  '26. one invoice is made, at the first run of the 13th of February there'
);

-- 27 and 28. The last second of a month and the first of the next, where they are at half and quarter hours too.
create temporary table zones (n integer, zone text);
insert into zones
values
  (11, 'Asia/Kolkata'), (12, 'Asia/Kathmandu'), (13, 'Australia/Lord_Howe'), (14, 'America/St_Johns'), (15, 'Pacific/Chatham'), (16, 'Europe/London'),
  (17, 'Pacific/Kiritimati');
select pg_temp.tenant(n, zone, 'test-units', '2026-01-01 12:00'::timestamp at time zone zone) from zones;
select is_empty(
  $$
    select zone, month, statuses
    from zones, generate_series(1, 12) as month,
      lateral (select make_timestamp(2026, month, 1, 0, 0, 0) + interval '1 month' as local_end) as next,
      lateral (
        select pg_temp.record(
          n, '2027-01-05T12:00Z',
          format('last%s 100 %s', month, to_char(((local_end at time zone zone) - interval '1 second') at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')),
          format('first%s 7 %s', month, to_char(local_end at time zone zone at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'))
        ) as statuses
      ) as done
    where statuses <> 'stored, stored'
  $$, '27. Events at every end of a month of a year'
);
select is_empty(
  $$
    select zone, log.period_start, log.usage_count
    from zones
    join public.usage_logs as log on log.organization_id = pg_temp.org(n)
    where log.usage_count <> case log.period_start when '2026-01-01' then 100 when '2027-01-01' then 7 else 107 end
  $$, '28. belong to the month that ends, or to the one that begins, and to no two'
);
select is((select count(*) from public.usage_logs join zones on organization_id = pg_temp.org(n)), 7 * 13::bigint, 'in each of seven zones');
select isnt(pg_temp.tenant(4, 'Asia/Kolkata', 'test-units', '2026-01-01T10:00+05:30'), null, '27. In Kolkata');
select is(pg_temp.record(4, '2026-02-01T12:00Z', 'a 100 2026-01-31T18:10:00Z', 'b 7 2026-01-31T18:40:00Z'), 'stored, stored', '27. 23:40 and 00:10');
select is(pg_temp.periods(4), '2026-01-01 100, 2026-02-01 7', '27. are January and February');

-- 29. Two months that nobody closed, and a price that changed for others meanwhile.
select isnt(pg_temp.tenant(5, 'Asia/Kolkata', 'test-units', '2026-03-01T10:00+05:30'), null, '29. Since March');
select is(pg_temp.record(5, '2026-05-02T12:00Z', 'a 3 2026-03-10T10:00:00Z', 'b 4 2026-04-10T10:00:00Z'), 'stored, stored', '29. something in March and in April');
insert into public.plan_prices (id, plan_id, version, billing_cycle, base_minor)
values ('00000000-0000-4000-b000-000000000003', '00000000-0000-4000-a000-000000000001', 2, 'monthly', 0);
insert into public.plan_price_meters (plan_price_id, meter_key, included_units, overage_price_minor)
values ('00000000-0000-4000-b000-000000000003', 'test_units', 0, 99);
select ok(pg_temp.closed('2026-05-02T01:00+05:30') >= 2, '29. are closed in May');
select is(pg_temp.invoices(5), '2026-03-01 30, 2026-04-01 40', '29. as two invoices, each with its own days and the price that was sold');
select is(pg_temp.closed('2026-05-02T02:00+05:30'), 0, '29. and the next run makes none');

-- 30. Three periods, of which the first was more than was known.
update public.plan_prices set retired_at = '2026-01-01' where id = '00000000-0000-4000-b000-000000000003';
select isnt(pg_temp.tenant(6, 'Asia/Kolkata', 'test-units', '2026-06-01T10:00+05:30'), null, '30. At 10 a unit');
select pg_temp.record(6, '2026-06-02T12:00Z', 'a 3');
select pg_temp.closed('2026-07-01T01:00+05:30');
select pg_temp.record(6, '2026-07-02T12:00Z', 'b 2');
select pg_temp.closed('2026-08-01T01:00+05:30');
select is(pg_temp.invoices(6), '2026-06-01 30, 2026-07-01 20', '30. three units are 30 and two are 20');
select pg_temp.record(6, '2026-08-02T12:00Z', 'c 3', 'd 1 2026-06-20T10:00:00Z');
select pg_temp.closed('2026-09-01T01:00+05:30');
select is(pg_temp.invoices(6), '2026-06-01 30, 2026-07-01 20, 2026-08-01 40', '30. a fourth of the first month is 10 on the third invoice');
select is(
  (select string_agg(kind || ' ' || quantity || ' ' || amount_minor, ', ' order by position) from public.invoice_lines as line
   where line.invoice_id = (select id from public.invoices where organization_id = pg_temp.org(6) and first_day = '2026-08-01')),
  'base 1 0, overage 3 30, adjustment 1 10', '30. on a line of its own'
);

-- 30. By volume the sixteenth unit makes all sixteen cheaper: what was billed too much comes back.
select isnt(pg_temp.tenant(7, 'Asia/Kolkata', 'test-volume', '2026-06-01T10:00+05:30'), null, '30. By volume');
select pg_temp.record(7, '2026-06-02T12:00Z', 'a 15');
select pg_temp.closed('2026-07-01T01:00+05:30');
select pg_temp.record(7, '2026-07-02T12:00Z', 'b 1 2026-06-20T10:00:00Z', 'c 9');
select pg_temp.closed('2026-08-01T01:00+05:30');
select is(pg_temp.invoices(7), '2026-06-01 150, 2026-07-01 20', '30. fifteen are 150, sixteen are 80: the next invoice is 90 less 70');
select is(
  (select string_agg(kind || ' ' || quantity || ' ' || amount_minor, ', ' order by position) from public.invoice_lines as line
   where line.invoice_id = (select id from public.invoices where organization_id = pg_temp.org(7) and first_day = '2026-07-01')),
  'base 1 0, overage 9 90, adjustment 1 -70', '30. on a line of its own'
);
select pg_temp.record(7, '2026-08-02T12:00Z', 'd 7 2026-07-20T10:00:00Z');
select pg_temp.closed('2026-09-01T01:00+05:30');
select is(pg_temp.invoices(7), '2026-06-01 150, 2026-07-01 20', '30. Where nothing else is billed there is no invoice of less than nothing,');

-- 31 and 32. The same again.
select is(pg_temp.record(6, '2026-09-20T12:00Z', 'a 3', 'a 4', 'e 1', 'e 1', 'e 2'), 'duplicate, conflict, stored, duplicate, conflict',
  '31. Forty days later it is the same event, 32. and with another quantity it is none');
select is(pg_temp.periods(6), '2026-06-01 4, 2026-07-01 2, 2026-08-01 3, 2026-09-01 1', '32. What was stored has not changed');

-- What is corrected and corrected back was never different.
create function pg_temp.preview(n integer) returns text
language sql as $$
  select md5(string_agg(
    concat_ws('|', priced.subtotal_minor, priced.tax_minor, priced.customer,
      (select string_agg(concat_ws(' ', line.position, line.kind, line.description, line.quantity, line.amount_minor), '|' order by line.position) from unnest(priced.lines) as line)),
    '|'))
  from private.billing_issuer as issuer, public.subscriptions as subscription,
    lateral private.price_periods(array[subscription.id], issuer, '2026-09-20T12:00Z') as priced
  where subscription.organization_id = pg_temp.org(n)
$$;
create temporary table before as select pg_temp.preview(6) as bytes;
select is(pg_temp.record(6, '2026-09-20T12:00Z', 'f -2  a', 'g 5  c'), 'stored, stored', 'An event of a billed month and one of a month before are corrected');
select isnt(pg_temp.preview(6), (select bytes from before), 'which changes the next invoice');
select is(pg_temp.record(6, '2026-09-20T12:00Z', 'h 2  a', 'i -5  c'), 'stored, stored', 'and corrected back');
select is(pg_temp.preview(6), (select bytes from before), 'to the same bytes');
select pg_temp.record(7, '2026-09-21T12:00Z', 'e 4');
select pg_temp.closed('2026-10-01T01:00+05:30');
select is(
  (select string_agg(kind || ' ' || quantity || ' ' || amount_minor, ', ' order by position) from public.invoice_lines as line
   where line.invoice_id = (select id from public.invoices where organization_id = pg_temp.org(7) and first_day = '2026-09-01')),
  'base 1 0, overage 4 40, adjustment 7 -10', '30. and it is credit on the next one that there is'
);
select is_empty('select problem from private.check_usage()', 'Events, keys, days and counters agree');

select * from finish();
rollback;
