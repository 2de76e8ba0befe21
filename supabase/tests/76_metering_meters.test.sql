-- Meters as data: how each adds up, how it rounds, what an agreed limit changes, what a month grants, and what retention leaves.
begin;
set local search_path = public, extensions, tap;
select plan(64);

insert into private.billing_issuer (legal_name, state_code, country_code, timezone)
values ('Issuer', 'KA', 'IN', 'Asia/Kolkata')
on conflict on constraint billing_issuer_pkey do update
set legal_name = 'Issuer', state_code = 'KA', country_code = 'IN', timezone = 'Asia/Kolkata', payment_terms_days = 15;
insert into public.meters (key, name, unit, aggregation, rounding, pulse)
values
  ('test_sum', 'Messages', 'message', 'sum', 'none', 1), ('test_count', 'Visits', 'visit', 'count', 'none', 1),
  ('test_max', 'Lines at once', 'line', 'max', 'none', 1), ('test_unique', 'Visitors', 'visitor', 'unique', 'none', 1),
  ('test_latest', 'Seats', 'seat', 'latest', 'none', 1), ('test_each', 'Talk by call', 'second', 'sum', 'event', 60),
  ('test_whole', 'Talk by month', 'second', 'sum', 'period', 60);
insert into public.subscription_plans (id, slug, name, trial_days)
values
  ('00000000-0000-4000-a000-000000000001', 'test-all', 'All', 14), ('00000000-0000-4000-a000-000000000002', 'test-credit', 'Credit', 14);
insert into public.plan_prices (id, plan_id, version, billing_cycle, base_minor, monthly_credit_minor)
values
  ('00000000-0000-4000-b000-000000000001', '00000000-0000-4000-a000-000000000001', 1, 'monthly', 0, 0),
  ('00000000-0000-4000-b000-000000000002', '00000000-0000-4000-a000-000000000002', 1, 'monthly', 1000, 500),
  ('00000000-0000-4000-b000-000000000003', '00000000-0000-4000-a000-000000000002', 1, 'yearly', 10000, 500);
insert into public.plan_price_meters (plan_price_id, meter_key, included_units, overage_price_minor, limit_units, hard)
select '00000000-0000-4000-b000-000000000001', key, 0, 1, -1, false from public.meters where key like 'test\_%' and key <> 'test_sum';
insert into public.plan_price_meters (plan_price_id, meter_key, included_units, limit_units, hard)
values ('00000000-0000-4000-b000-000000000001', 'test_sum', 100, 100, true);
insert into public.organizations (id, name, timezone, country_code, state_code)
select ('00000000-0000-4000-8000-00000000000' || n)::uuid, 'Tenant ' || n, 'Asia/Kolkata', 'IN', 'KA' from generate_series(1, 5) as n;

create function pg_temp.org(n integer) returns uuid
language sql as $$ select ('00000000-0000-4000-8000-00000000000' || n)::uuid $$;
create function pg_temp.record(n integer, events jsonb, at timestamptz default '2026-01-20T12:00+05:30') returns text
language sql as $$
  select string_agg(result.value ->> 'status' || coalesce(' ' || (result.value ->> 'code'), ''), ', ' order by result.position)
  from jsonb_array_elements(
    private.record_usage(jsonb_build_object('v', 1, 'organization_id', pg_temp.org(n), 'events', events), at) -> 'results'
  ) with ordinality as result (value, position)
$$;
create function pg_temp.event(meter text, id text, quantity integer, happened text default null, said text default null, corrects text default null)
returns jsonb
language sql as $$
  select jsonb_build_object(
    'id', id, 'source', 'crm', 'type', 'test_' || meter, 'quantity', quantity, 'time', happened, 'value', said, 'corrects', corrects)
$$;
create function pg_temp.periods(n integer, meter text) returns text
language sql as $$
  select string_agg(period_start || ' ' || usage_count, ', ' order by period_start)
  from public.usage_logs where organization_id = pg_temp.org(n) and feature_key = 'test_' || meter
$$;
create function pg_temp.days(n integer, meter text) returns text
language sql as $$
  select string_agg(to_char(day, 'DD') || ' ' || quantity || '/' || events, ', ' order by day)
  from public.usage_days where organization_id = pg_temp.org(n) and meter_key = 'test_' || meter
$$;
create function pg_temp.wrong() returns bigint
language sql as $$ select count(*) from private.check_usage() $$;

select private.subscribe_organization(pg_temp.org(n), 'test-all', 'active', '2026-01-01T10:00+05:30') from generate_series(1, 3) as n;

-- A count counts events, whatever they would say.
select is(pg_temp.record(1, jsonb_build_array(
  pg_temp.event('count', 'c1', null), pg_temp.event('count', 'c2', 1), pg_temp.event('count', 'c3', 7), pg_temp.event('count', 'c1', null)
)), 'stored, stored, rejected invalid_quantity, duplicate', 'An event that is counted is one');
select is(pg_temp.days(1, 'count'), '20 2/2', 'and two are two');
select is(pg_temp.record(1, jsonb_build_array(
  pg_temp.event('count', 'c4', -1, corrects => 'c1'), pg_temp.event('count', 'c5', -1, corrects => 'c1'), pg_temp.event('count', 'c6', 1, corrects => 'c2')
)), 'stored, rejected correction_too_large, rejected correction_too_large', 'It is taken back once, and is never two');
select is(pg_temp.periods(1, 'count'), '2026-01-01 1', 'One is left');

-- The largest of a day, and of the period.
select is(pg_temp.record(1, jsonb_build_array(
  pg_temp.event('max', 'm1', 5, '2026-01-10T10:00:00Z'), pg_temp.event('max', 'm2', 9, '2026-01-12T10:00:00Z'),
  pg_temp.event('max', 'm3', 7, '2026-01-12T11:00:00Z'), pg_temp.event('max', 'm4', 0, '2026-01-13T11:00:00Z')
)), 'stored, stored, stored, stored', 'Quantities of a meter that takes the largest');
select is(pg_temp.days(1, 'max'), '10 5/1, 12 9/2, 13 0/1', 'Each day has its own');
select is(pg_temp.periods(1, 'max'), '2026-01-01 9', 'and the period the largest of all');
select is(pg_temp.record(1, jsonb_build_array(pg_temp.event('max', 'm5', -5, corrects => 'm2'))), 'stored', 'It was less after all');
select is(pg_temp.days(1, 'max'), '10 5/1, 12 7/3, 13 0/1', 'so the second largest is that day''s');
select is(pg_temp.periods(1, 'max'), '2026-01-01 7', 'and the period''s');

-- Different values.
select is(pg_temp.record(1, jsonb_build_array(
  pg_temp.event('unique', 'u1', null, '2026-01-10T10:00:00Z', 'ann'), pg_temp.event('unique', 'u2', null, '2026-01-10T11:00:00Z', 'ann'),
  pg_temp.event('unique', 'u3', 1, '2026-01-10T12:00:00Z', 'bob'), pg_temp.event('unique', 'u4', null, '2026-01-11T10:00:00Z', 'ann'),
  pg_temp.event('unique', 'u5', null), pg_temp.event('unique', 'u3', 1, '2026-01-10T12:00:00Z', 'eve')
)), 'stored, stored, stored, stored, rejected invalid_value, conflict idempotency_conflict', 'A value is part of what was said');
select is(pg_temp.days(1, 'unique'), '10 2/3, 11 1/1', 'Each day has its different values');
select is(pg_temp.periods(1, 'unique'), '2026-01-01 2', 'and the period those of all its days, each once');
select is(pg_temp.record(1, jsonb_build_array(pg_temp.event('unique', 'u6', -1, corrects => 'u1'))), 'stored', 'One of two visits was none');
select is(pg_temp.periods(1, 'unique') || '; ' || pg_temp.days(1, 'unique'), '2026-01-01 2; 10 2/4, 11 1/1', 'which changes nothing but the events');
select is(pg_temp.record(1, jsonb_build_array(
  pg_temp.event('unique', 'u7', -1, corrects => 'u2'), pg_temp.event('unique', 'u8', -1, corrects => 'u4')
)), 'stored, stored', 'and neither were the others');
select is(pg_temp.periods(1, 'unique') || '; ' || pg_temp.days(1, 'unique'), '2026-01-01 1; 10 1/5, 11 0/2', 'so that one visitor is left');
select ok(
  not exists (select from private.usage_events where value_hash is not null and length(value_hash) <> 16)
  and (select count(*) from private.usage_readings where value_hash = substring(sha256('ann') for 16)) = 3,
  'No value is kept, only what tells it from others'
);

-- The latest.
select is(pg_temp.record(1, jsonb_build_array(
  pg_temp.event('latest', 'l2', 8, '2026-01-11T10:00:00Z'), pg_temp.event('latest', 'l1', 5, '2026-01-10T10:00:00Z'),
  pg_temp.event('latest', 'l3', 6, '2026-01-11T12:00:00Z'), pg_temp.event('latest', 'l4', 3, '2026-01-11T11:00:00Z')
)), 'stored, stored, stored, stored', 'In whatever order they come');
select is(pg_temp.days(1, 'latest') || '; ' || pg_temp.periods(1, 'latest'), '10 5/1, 11 6/3; 2026-01-01 6', 'the one that happened last counts');
select is(pg_temp.record(1, jsonb_build_array(pg_temp.event('latest', 'l5', 0, '2026-01-12T11:00:00Z'))), 'stored', 'None is a quantity too');
select is(pg_temp.periods(1, 'latest'), '2026-01-01 0', 'when it is the latest');
select is(pg_temp.record(1, jsonb_build_array(pg_temp.event('latest', 'l6', 4, corrects => 'l5'))), 'stored', 'and may be corrected');
select is(pg_temp.periods(1, 'latest'), '2026-01-01 4', 'like any');
select is(pg_temp.record(1, jsonb_build_array(pg_temp.event('latest', 'l7', -1), pg_temp.event('sum', 's0', 0))),
  'rejected invalid_quantity, rejected invalid_quantity', 'Less than nothing is no quantity, and nothing is no sum');

-- Whole pulses, of each or of all.
select is(
  pg_temp.record(1, (
    select jsonb_agg(pg_temp.event(meter, meter || n, 61)) from generate_series(1, 7) as n, unnest(array['each', 'whole']) as meter
  )),
  'stored, stored, stored, stored, stored, stored, stored, stored, stored, stored, stored, stored, stored, stored', 'Seven times 61 seconds'
);
select is(pg_temp.periods(1, 'each'), '2026-01-01 840', 'are fourteen started minutes where each is rounded');
select is(pg_temp.periods(1, 'whole'), '2026-01-01 427', 'and seven minutes and seven seconds where the month is');
select is(pg_temp.record(1, jsonb_build_array(pg_temp.event('each', 'e8', -2, corrects => 'each1'), pg_temp.event('each', 'e9', -1, corrects => 'each2'))),
  'stored, stored', 'Corrections are of what was said');
select is(pg_temp.periods(1, 'each'), '2026-01-01 720', '59 and 60 seconds are a minute each');
select is(pg_temp.record(1, jsonb_build_array(pg_temp.event('each', 'e10', 1, corrects => 'each2'))), 'stored', 'and 61 again');
select is(pg_temp.periods(1, 'each'), '2026-01-01 780', 'are two');
select is(pg_temp.wrong(), 0::bigint, 'Events, readings, keys, days and counters agree');

-- They are billed as they were counted.
select is(private.close_periods('{}', '2026-02-01T01:00+05:30') ->> 'closed', '3', 'January is closed');
create function pg_temp.lines(n integer, kind text) returns text
language sql as $$
  select string_agg(line.meter_key || ' ' || line.quantity || ' ' || line.amount_minor, ', ' order by line.meter_key)
  from public.invoice_lines as line
  where line.organization_id = pg_temp.org(n) and line.kind = lines.kind
$$;
select is(pg_temp.lines(1, 'overage'),
  'test_count 1 1, test_each 780 780, test_latest 4 4, test_max 7 7, test_unique 1 1, test_whole 480 480', 'each as it adds up, the month in started minutes');
select is(pg_temp.record(1, jsonb_build_array(
  pg_temp.event('max', 'm6', 11, '2026-01-30T10:00:00Z'), pg_temp.event('unique', 'u9', null, '2026-01-30T10:00:00Z', 'cat'),
  pg_temp.event('latest', 'l8', 2, '2026-01-30T10:00:00Z'), pg_temp.event('whole', 'w8', 60, '2026-01-30T10:00:00Z')
), '2026-02-05T12:00+05:30'), 'stored, stored, stored, stored', 'What comes late');
select is(private.close_periods('{}', '2026-03-01T01:00+05:30') ->> 'closed', '3', 'is in February''s invoice');
select is(pg_temp.lines(1, 'adjustment'), 'test_latest -2 -2, test_max 4 4, test_unique 1 1, test_whole 60 60', 'as the difference that it makes');
select throws_ok($$ update public.meters set aggregation = 'sum' where key = 'test_max' $$, '23514', null, 'A meter that has counted keeps its meaning');
select lives_ok($$ update public.meters set name = 'Lines' where key = 'test_max' $$, 'but for its name');
select throws_ok($$ insert into public.meters (key, name, unit, aggregation) values ('x', 'X', 'x', 'median') $$, '23514', null, 'There are five ways to add up');

-- Calls are rounded where their meter says so.
update public.meters set rounding = 'event', pulse = 60 where key = 'call_seconds';
create function pg_temp.end_call(n integer, attempt integer, seconds integer) returns void
language sql as $$
  select private.meter_call(
    jsonb_populate_record(null::public.call_logs, jsonb_build_object(
      'id', '00000000-0000-4000-9000-' || lpad(attempt::text, 12, '0'), 'organization_id', pg_temp.org(n), 'direction', 'inbound',
      'ended_at', '2026-03-05T10:00Z', 'bill_duration_seconds', seconds)),
    '2026-03-05T10:00Z')
$$;
select pg_temp.end_call(2, n, 61) from generate_series(1, 7) as n;
select pg_temp.end_call(2, 1, 62), pg_temp.end_call(2, 2, 60);
select is(
  (select usage_count from public.usage_logs where organization_id = pg_temp.org(2) and feature_key = 'call_seconds' and period_start = '2026-03-01'), 780::bigint,
  'Seven calls of 61 seconds, one of them of 60 after all'
);
select is(pg_temp.wrong(), 0::bigint, 'add up');

-- A limit that was agreed with one customer.
select ok(
  private.reserve_usage(pg_temp.org(3), 'test_sum', 100, '2026-03-05T10:00Z') and not private.reserve_usage(pg_temp.org(3), 'test_sum', 1, '2026-03-05T10:00Z'),
  'The plan has room for a hundred'
);
update public.subscriptions set metadata = '{"custom_limits": {"test_sum": 103}}' where organization_id = pg_temp.org(3);
select is(
  array(select private.reserve_usage(pg_temp.org(3), 'test_sum', 1, '2026-03-05T10:00Z') from generate_series(1, 5)), array[true, true, true, false, false],
  'three more were agreed'
);
update public.subscriptions set metadata = '{"custom_limits": {"test_sum": -1}}' where organization_id = pg_temp.org(3);
select ok(private.reserve_usage(pg_temp.org(3), 'test_sum', 1000, '2026-03-05T10:00Z'), 'and -1 is no limit');
update public.subscriptions set metadata = '{"custom_limits": {"test_sum": 10}}' where organization_id = pg_temp.org(3);
select is(pg_temp.record(3, jsonb_build_array(pg_temp.event('sum', 's1', 11)), '2026-03-05T12:00+05:30'), 'stored', 'What was used is counted all the same');
select is(
  (select string_agg(key, ', ' order by id) from private.outbox where organization_id = pg_temp.org(3) and topic = 'usage.threshold'),
  'test_sum 2026-03-01 50, test_sum 2026-03-01 80, test_sum 2026-03-01 100', 'and told of, by the limit that was agreed'
);

-- What a month grants: once, whoever asks how often, and gone when the next begins.
create function pg_temp.wallet(n integer) returns text
language sql as $$
  select balance_minor || ' ' || (select count(*) from public.credit_transactions as own where own.organization_id = pg_temp.org(n) and own.type = 'monthly_grant')
  from public.call_credits where organization_id = pg_temp.org(n)
$$;
select private.subscribe_organization(pg_temp.org(4), 'test-credit', 'active', '2026-01-31T10:00+05:30');
select is(pg_temp.wallet(4), '500 1', 'The first month begins with its credit');
select private.debit_credit(pg_temp.org(4), 'INR', 120, 'a', '2026-02-05T10:00+05:30');
select is(array(select private.renew_credit('{}', '2026-02-10T10:00+05:30') ->> 'granted' from generate_series(1, 2)), array['0', '0'], 'which comes once');
select is(private.close_periods('{}', '2026-02-28T00:05+05:30') ->> 'closed' is not null, true, 'A month later');
select is(pg_temp.wallet(4), '500 2', 'what was left is gone and the new month''s is there');
select is(
  array[private.close_periods('{}', '2026-02-28T00:10+05:30') ->> 'closed', private.renew_credit('{}', '2026-02-28T00:15+05:30') ->> 'granted', pg_temp.wallet(4)],
  array['0', '0', '500 2'], 'once, however often the run is repeated'
);
select is(private.close_periods('{}', '2026-07-15T00:05+05:30') ->> 'closed' is not null, true, 'Where nothing ran for months');
select is(pg_temp.wallet(4), '500 3', 'only the month that it is begins with credit');
update public.subscriptions set status = 'cancelled', next_invoice_at = null where organization_id = pg_temp.org(4);
select private.subscribe_organization(pg_temp.org(5), 'test-credit', 'active', '2026-01-31T10:00+05:30', 'yearly');
select is(
  array(
    select (private.renew_credit('{}', at::timestamptz) ->> 'granted') || ' of ' || pg_temp.wallet(5)
    from unnest(array['2026-02-27T23:59+05:30', '2026-02-28T00:00+05:30', '2026-03-30T23:59+05:30', '2026-03-31T00:00+05:30']) as at
  ),
  array['0 of 500 1', '1 of 500 2', '0 of 500 2', '1 of 500 3'], 'A year has twelve months, from the day that it began'
);
select is(
  (select count(*) from private.check_credit()) + (select count(*) from public.credit_accounts where kind = 'monthly' and balance_minor > 0 and expires_at <= '2026-03-31T00:00+05:30' and organization_id = pg_temp.org(5)),
  0::bigint, 'and the ledger adds up'
);

-- Retention: what the events of a month came to stays, and so does what is known of their keys.
select is(pg_temp.record(3, jsonb_build_array(pg_temp.event('sum', 'old', 7, '2019-05-05T10:00:00Z'), pg_temp.event('max', 'old max', 3, '2019-05-06T10:00:00Z')),
  '2026-03-06T12:00+05:30'), 'stored, stored', 'Events of years ago');
select is(private.apply_retention('{}', '2026-03-06T12:00+05:30') -> 'unplaced' ->> 'private.usage_events', '2', 'are told of, for their month was not made');
select is(
  array[(select count(*) from private.usage_events_default), (select count(*) from private.usage_events_201905)], array[0, 2]::bigint[], 'and is made then'
);
select is(
  private.apply_retention('{}', '2027-06-01T12:00+05:30') -> 'dropped' ? 'private.usage_events_201905' and to_regclass('private.usage_events_201905') is null,
  true, 'It goes when it is past its time'
);
select is(pg_temp.wrong(), 0::bigint, 'and everything adds up without it');
select is(pg_temp.record(3, jsonb_build_array(
  pg_temp.event('sum', 'old', 7, '2019-05-05T10:00:00Z'), pg_temp.event('sum', 'new', -3, corrects => 'old'), pg_temp.event('max', 'new max', 2, corrects => 'old max')
), '2027-06-01T12:00+05:30'), 'duplicate, stored, stored', 'Its keys are known for ever, and may be corrected');
select is(pg_temp.wrong(), 0::bigint, 'on their days');

select * from finish();
rollback;
