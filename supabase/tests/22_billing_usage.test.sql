-- Usage: counted once, on the organization's own day, in the period that is billed.
begin;
set local search_path = public, extensions, tap;
select plan(32);

-- Organizations and plans of this test alone: Metered charges 999.00 a month, includes 60 minutes and sells more at 6.00 a minute;
-- Capped allows three calls; Yearly is a year of Metered; the issuer sits in Karnataka.
insert into private.billing_issuer (legal_name, state_code, country_code, timezone)
values ('Issuer', 'KA', 'IN', 'Asia/Kolkata')
on conflict on constraint billing_issuer_pkey do update
set legal_name = 'Issuer', state_code = 'KA', country_code = 'IN', timezone = 'Asia/Kolkata', payment_terms_days = 15;
insert into public.tax_rates (country_code, scope, name, rate_bp, position)
values
  ('IN', 'intra_state', 'CGST', 900, 10), ('IN', 'intra_state', 'SGST', 900, 20), ('IN', 'inter_state', 'IGST', 1800, 10),
  ('GB', 'any', 'VAT', 2000, 10)
on conflict on constraint tax_rates_version_key do nothing;
insert into public.meters (key, name, unit) values ('test_messages', 'Test messages', 'message');
insert into public.subscription_plans (id, slug, name)
values
  ('00000000-0000-4000-a000-000000000001', 'test-metered', 'Metered'),
  ('00000000-0000-4000-a000-000000000002', 'test-capped', 'Capped'),
  ('00000000-0000-4000-a000-000000000003', 'test-seconds', 'Seconds');
insert into public.plan_prices (id, plan_id, version, billing_cycle, base_minor)
values
  ('00000000-0000-4000-b000-000000000001', '00000000-0000-4000-a000-000000000001', 1, 'monthly', 99900),
  ('00000000-0000-4000-b000-000000000002', '00000000-0000-4000-a000-000000000002', 1, 'monthly', 0),
  ('00000000-0000-4000-b000-000000000003', '00000000-0000-4000-a000-000000000003', 1, 'monthly', 0),
  ('00000000-0000-4000-b000-000000000004', '00000000-0000-4000-a000-000000000001', 1, 'yearly', 999000);
insert into public.plan_price_meters (plan_price_id, meter_key, included_units, overage_price_minor, overage_unit, limit_units, hard)
values
  ('00000000-0000-4000-b000-000000000001', 'ai_calls', -1, null, 1, -1, false),
  ('00000000-0000-4000-b000-000000000001', 'call_seconds', 3600, 600, 60, 3600, true),
  ('00000000-0000-4000-b000-000000000002', 'ai_calls', 3, null, 1, 3, true),
  ('00000000-0000-4000-b000-000000000002', 'call_seconds', -1, null, 1, null, false),
  ('00000000-0000-4000-b000-000000000003', 'call_seconds', 3000, null, 1, 3000, true),
  ('00000000-0000-4000-b000-000000000004', 'call_seconds', 43200, 600, 60, -1, false);
insert into public.organizations (id, name, timezone, country_code, state_code)
values
  ('00000000-0000-4000-8000-000000000001', 'Near', 'Asia/Kolkata', 'IN', 'KA'),
  ('00000000-0000-4000-8000-000000000002', 'Far', 'Asia/Kolkata', 'IN', 'MH'),
  ('00000000-0000-4000-8000-000000000003', 'Abroad', 'Europe/London', 'GB', null),
  ('00000000-0000-4000-8000-000000000004', 'Elsewhere', 'America/New_York', 'US', 'NY'),
  ('00000000-0000-4000-8000-000000000005', 'Small', 'Asia/Kolkata', 'IN', 'MH'),
  ('00000000-0000-4000-8000-000000000006', 'Islands', 'Europe/London', 'GB', null);

create function pg_temp.subscribe(org integer, plan text, at timestamptz, status text default 'active', cycle text default 'monthly') returns uuid
language sql as $$
  select private.subscribe_organization(
    ('00000000-0000-4000-8000-00000000000' || org)::uuid, plan, status::public.subscription_status, at, cycle::public.billing_cycle)
$$;
create function pg_temp.reserve(org integer, meter text, quantity bigint, at timestamptz) returns boolean
language sql as $$ select private.reserve_usage(('00000000-0000-4000-8000-00000000000' || org)::uuid, meter, quantity, at) $$;
create function pg_temp.end_call(org integer, attempt integer, seconds integer, ended timestamptz, at timestamptz, direction text default 'outbound')
returns void
language sql as $$
  select private.meter_call(
    jsonb_populate_record(null::public.call_logs, jsonb_build_object(
      'id', '00000000-0000-4000-9000-' || lpad(attempt::text, 12, '0'),
      'organization_id', '00000000-0000-4000-8000-00000000000' || org,
      'direction', direction, 'ended_at', ended, 'bill_duration_seconds', seconds)),
    at)
$$;
create function pg_temp.counter(org integer, meter text) returns text
language sql as $$
  select string_agg(format('%s: %s used, %s held', period_start, usage_count, reserved), '; ' order by period_start)
  from public.usage_logs
  where organization_id = ('00000000-0000-4000-8000-00000000000' || org)::uuid and feature_key = meter
$$;

create function pg_temp.record(events jsonb, at timestamptz, prefix text default 'tlk_00000001', secret text default 'one')
returns text
language sql as $$
  select string_agg(result.value ->> 'status' || coalesce(' ' || (result.value ->> 'code'), ''), ', ' order by result.position)
  from jsonb_array_elements(
    private.record_usage(
      jsonb_build_object(
        'v', 1, 'events', events,
        'api_key', jsonb_build_object('prefix', prefix, 'sha256', encode(sha256(convert_to(secret, 'utf8')), 'hex'))),
      at) -> 'results'
  ) with ordinality as result (value, position)
$$;
create function pg_temp.event(id text, quantity integer, happened text default null, source text default 'crm', type text default 'test_messages')
returns jsonb
language sql as $$
  select jsonb_build_object('id', id, 'source', source, 'type', type, 'quantity', quantity, 'time', happened)
$$;
-- The error that a request would get: its code.
create function pg_temp.refusal(query text) returns text
language plpgsql as $$
begin
  execute query;
  return 'none';
exception when sqlstate 'PGRST' then
  return sqlerrm::jsonb ->> 'code';
end
$$;
insert into public.api_keys (organization_id, name, prefix, sha256, scopes, revoked_at)
values
  ('00000000-0000-4000-8000-000000000001', 'one', 'tlk_00000001', sha256('one'), array['usage.write'], null),
  ('00000000-0000-4000-8000-000000000002', 'two', 'tlk_00000002', sha256('two'), array['usage.write'], null),
  ('00000000-0000-4000-8000-000000000002', 'old', 'tlk_00000003', sha256('old'), array['usage.write'], now()),
  ('00000000-0000-4000-8000-000000000002', 'other', 'tlk_00000004', sha256('other'), array['something.else'], null);
select isnt(pg_temp.subscribe(1, 'test-metered', '2026-01-01T10:00+05:30'), null, 'organization 1 subscribed');
select isnt(pg_temp.subscribe(2, 'test-metered', '2026-01-01T10:00+05:30'), null, 'organization 2 subscribed');

-- The key is the tenant.
select is(pg_temp.refusal($$ select pg_temp.record('[{}]', now(), 'tlk_00000001', 'wrong') $$), 'invalid_api_key', 'a wrong key');
select is(pg_temp.refusal($$ select pg_temp.record('[{}]', now(), 'tlk_00000002', 'one') $$), 'invalid_api_key', 'a key under another prefix');
select is(pg_temp.refusal($$ select pg_temp.record('[{}]', now(), 'tlk_00000003', 'old') $$), 'invalid_api_key', 'a revoked key');
select is(pg_temp.refusal($$ select pg_temp.record('[{}]', now(), 'tlk_00000004', 'other') $$), 'missing_scope', 'a key without the scope');
select is(pg_temp.refusal($$ select private.record_usage('{"v":1,"events":[{}]}', now()) $$), 'invalid_api_key', 'no key');
select is(pg_temp.refusal($$ select pg_temp.record('[]', now()) $$), 'invalid_request', 'no event');
select is(pg_temp.refusal($$ select pg_temp.record('{}', now()) $$), 'invalid_request', 'no array');
select is(
  pg_temp.refusal($$
    select pg_temp.record((select jsonb_agg(pg_temp.event('m' || i, 1)) from generate_series(1, 1001) as i), now())
  $$),
  'too_many_events', 'more than a thousand'
);

-- Once per organization, source and id; each event by itself.
select is(
  pg_temp.record(jsonb_build_array(
    pg_temp.event('a', 3), pg_temp.event('a', 3), pg_temp.event('a', 4), pg_temp.event('b', 5), pg_temp.event('a', 6, source => 'shop')
  ), '2026-01-05T10:00Z'),
  'stored, duplicate, conflict idempotency_conflict, stored, stored', 'a batch: the first of a key counts'
);
select is(pg_temp.counter(1, 'test_messages'), '2026-01-01: 14 used, 0 held', '3 + 5 + 6');
select is(
  pg_temp.record(jsonb_build_array(pg_temp.event('a', 3), pg_temp.event('a', 9), pg_temp.event('c', 1)), '2026-02-14T10:00Z'),
  'duplicate, conflict idempotency_conflict, stored', 'forty days later it is still the same event'
);
select is(
  pg_temp.record(jsonb_build_array(pg_temp.event('a', 30)), '2026-01-05T10:00Z', 'tlk_00000002', 'two'),
  'stored', 'another organization''s ids are its own'
);
select is(
  pg_temp.record(jsonb_build_array(
    pg_temp.event('t', 1, '2026-01-05T15:30:00+05:30'), pg_temp.event('t', 1, '2026-01-05T10:00:00Z'), pg_temp.event('t', 1, '2026-01-05T10:00:01Z')
  ), '2026-01-05T10:00Z'),
  'stored, duplicate, conflict idempotency_conflict', 'the same instant in another zone is the same body'
);

-- What is wrong with an event is said of that event.
select is(
  pg_temp.record(jsonb_build_array(
    pg_temp.event('', 1), pg_temp.event('x', 1, source => ''), pg_temp.event('x', 1, source => 'call'), pg_temp.event('x', 1, type => 'nothing'),
    pg_temp.event('x', 1, type => 'ai_calls'), pg_temp.event('x', 0), pg_temp.event('x', -1), pg_temp.event('x', 1, 'yesterday'),
    pg_temp.event('x', 1, '2026-02-30T10:00:00Z'), pg_temp.event('x', 1, '2026-01-05T10:05:01Z'), '7'::jsonb, '{}'::jsonb,
    '{"id": "x", "source": "crm", "type": "test_messages", "quantity": 1.5}'::jsonb,
    '{"id": "x", "source": "crm", "type": "test_messages", "quantity": "1"}'::jsonb,
    '{"id": "x", "source": "crm", "type": "test_messages", "quantity": 1, "specversion": "0.3"}'::jsonb, pg_temp.event('ok', 1, '2026-01-05T10:05:00Z')
  ), '2026-01-05T10:00Z'),
  'rejected invalid_id, rejected invalid_source, rejected reserved_source, rejected unknown_type, rejected reserved_type, '
  'rejected invalid_quantity, rejected invalid_quantity, rejected invalid_time, rejected invalid_time, rejected time_in_future, '
  'rejected invalid_id, rejected invalid_id, rejected invalid_quantity, rejected invalid_quantity, rejected invalid_specversion, stored',
  'each is refused alone'
);
select is(
  pg_temp.record(jsonb_build_array(
    pg_temp.event('day', 1, '2026-02-30T10:00:00Z'), pg_temp.event('zone', 1, '2026-01-05T10:00:00+99:99'), pg_temp.event('good', 1, '2026-01-05T10:00:00Z'),
    pg_temp.event('two', 1, '2026-01-05T10:00:00Z|2026-01-05T10:00:00Z'), pg_temp.event('fine', 1, '2026-01-05t10:00:00.123456789+05:30')
  ), '2026-01-05T10:00Z'),
  'rejected invalid_time, rejected invalid_time, stored, rejected invalid_time, stored',
  'also where the calendar has no such day, or no place has such a zone, and all looks as it should'
);
-- What lies between two keys that are there is found new, and what is there is found, in whatever order they come.
select is(
  pg_temp.record(jsonb_build_array(pg_temp.event('k9', 1), pg_temp.event('k1', 1), pg_temp.event('k5', 1)), '2026-01-05T10:00Z') || '; '
    || pg_temp.record(jsonb_build_array(pg_temp.event('k3', 1), pg_temp.event('k4', 1)), '2026-01-05T10:00Z') || '; '
    || pg_temp.record(jsonb_build_array(pg_temp.event('k8', 1), pg_temp.event('k2', 1), pg_temp.event('k5', 1), pg_temp.event('k6', 2)), '2026-01-05T10:00Z')
    || '; '
    || pg_temp.record(jsonb_build_array(pg_temp.event('m1', 1), pg_temp.event('m1', 1), pg_temp.event('m0', 1), pg_temp.event('m1', 2)), '2026-01-05T10:00Z'),
  'stored, stored, stored; stored, stored; stored, stored, duplicate, stored; stored, duplicate, stored, conflict idempotency_conflict',
  'Keys that grow, and keys that do not'
);

-- The organization's own days: 18:29:59Z is the last second of January in Kolkata.
select pg_temp.end_call(2, 1, 100, '2026-01-31T18:10Z', '2026-01-31T18:10Z');
select pg_temp.end_call(2, 2, 7, '2026-01-31T18:40Z', '2026-01-31T18:40Z');
select is(pg_temp.counter(2, 'call_seconds'), '2026-01-01: 100 used, 0 held; 2026-02-01: 7 used, 0 held',
  'a call at 00:10 on 1 February belongs to February, although no period was closed yet');
select pg_temp.end_call(2, 3, 1000, '2026-01-31T18:29:59Z', '2026-01-31T18:40Z');
select pg_temp.end_call(2, 4, 2000, '2026-01-31T18:30Z', '2026-01-31T18:40Z');
select is(pg_temp.counter(2, 'call_seconds'), '2026-01-01: 1100 used, 0 held; 2026-02-01: 2007 used, 0 held',
  'an event exactly at the boundary belongs to the next period only');
select results_eq(
  $$ select day, quantity::integer from public.usage_days
     where organization_id = '00000000-0000-4000-8000-000000000002' and meter_key = 'call_seconds' order by day $$,
  $$ values ('2026-01-31'::date, 1100), ('2026-02-01'::date, 2007) $$, 'and its day is the local one'
);

-- New York's first days of months around the changes of the clock.
select isnt(pg_temp.subscribe(4, 'test-metered', '2023-03-01T10:00-05:00'), null, 'organization 4 subscribed');
select pg_temp.end_call(4, 10 + position::integer, 1, instant, instant)
from unnest(array[
  '2023-03-01T05:00Z', '2023-03-12T06:59:59Z', '2023-03-12T07:00Z', '2023-04-01T03:59:59Z', '2023-04-01T04:00Z', '2023-05-01T03:59:59Z',
  '2023-05-01T04:00Z'
]::timestamptz[]) with ordinality as happened (instant, position);
select is(pg_temp.counter(4, 'ai_calls'), '2023-03-01: 4 used, 0 held; 2023-04-01: 2 used, 0 held; 2023-05-01: 1 used, 0 held',
  'summer time moves no event to another month');

-- Late events: their period is billed, and they count in it all the same.
select is(private.close_periods('{}', '2026-02-01T01:00+05:30') ->> 'closed' is not null, true, 'January is closed');
select pg_temp.end_call(2, 5, 5, '2026-01-31T18:00Z', '2026-02-02T10:00Z');
select is(pg_temp.counter(2, 'call_seconds'), '2026-01-01: 1105 used, 0 held; 2026-02-01: 2007 used, 0 held', 'a late event counts in its own period');
select results_eq(
  $$ select day, occurred_at from private.usage_events
     where key = '00000000-0000-4000-9000-000000000005' and meter_key = 'call_seconds' $$,
  $$ values ('2026-01-31'::date, '2026-01-31T18:00Z'::timestamptz) $$, 'on its own day'
);

-- Three ways to add up, one sum.
select is_empty(
  $$ select meter_key, organization_id, sum(quantity) from private.usage_events
     where organization_id::text like '00000000-0000-4000-8000-00000000000%' group by 1, 2
     except
     select meter_key, organization_id, sum(quantity) from public.usage_days group by 1, 2 $$,
  'events and days agree'
);
select is_empty(
  $$ select feature_key, organization_id, usage_count from public.usage_logs as log
     where organization_id::text like '00000000-0000-4000-8000-00000000000%'
       and usage_count <> (
         select coalesce(sum(quantity), 0) from public.usage_days as day
         where day.organization_id = log.organization_id and day.meter_key = log.feature_key
           and day.day >= log.period_start and day.day < log.period_end) $$,
  'days and counters agree, period by period'
);

-- Evidence does not change.
select throws_ok($$ update private.usage_events set quantity = 1 $$, '23514', null, 'no event is changed');
select throws_ok($$ delete from private.usage_events where day < '2026-02-01' $$, '23514', null, 'no event is removed');
select throws_ok(
  $$ insert into public.usage_logs (organization_id, feature_key, period_start, period_end)
     values ('00000000-0000-4000-8000-000000000002', 'call_seconds', '2026-01-15', '2026-01-20') $$,
  '23P01', null, 'usage periods do not overlap'
);
select throws_ok(
  $$ insert into public.usage_logs (organization_id, feature_key, period_start, period_end)
     values ('00000000-0000-4000-8000-000000000002', 'call_seconds', '2020-01-15', '2020-01-15') $$,
  '23514', null, 'a usage period is not empty'
);

select * from finish();
rollback;
