-- Quotas: what may be held, what a call gives back, and that nothing overshoots.
begin;
set local search_path = public, extensions, tap;
select plan(40);

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

-- A hard limit on calls.
select isnt(pg_temp.subscribe(1, 'test-capped', '2026-01-10T10:00+05:30'), null, 'subscribed to Capped');
select ok(pg_temp.reserve(1, 'ai_calls', 2, '2026-01-10T10:00+05:30'), 'two of three calls are held');
select ok(not pg_temp.reserve(1, 'ai_calls', 2, '2026-01-10T10:00+05:30'), 'two more are refused');
select is(pg_temp.counter(1, 'ai_calls'), '2026-01-10: 0 used, 2 held', 'a refusal changes nothing');
select ok(pg_temp.reserve(1, 'ai_calls', 0, '2026-01-10T10:00+05:30'), 'asking for none tells that one is left');
select ok(pg_temp.reserve(1, 'ai_calls', 1, '2026-01-10T10:00+05:30'), 'the third is held');
select ok(not pg_temp.reserve(1, 'ai_calls', 0, '2026-01-10T10:00+05:30'), 'asking for none tells that none is left');
select lives_ok($$ select private.release_usage('00000000-0000-4000-8000-000000000001', 'ai_calls', 1, now()) $$, 'one is given back');
select is(pg_temp.counter(1, 'ai_calls'), '2026-01-10: 0 used, 2 held', 'and is free again');
select lives_ok($$ select private.release_usage('00000000-0000-4000-8000-000000000001', 'ai_calls', 9, now()) $$, 'more are given back than held');
select is(pg_temp.counter(1, 'ai_calls'), '2026-01-10: 0 used, 0 held', 'no hold goes below zero');
select throws_ok($$ select pg_temp.reserve(1, 'ai_calls', -1, now()) $$, '22023', null, 'a negative reservation is refused');

-- A call settles its hold once, however often it is reported.
select ok(pg_temp.reserve(1, 'ai_calls', 3, '2026-01-10T10:00+05:30'), 'three calls are under way');
select pg_temp.end_call(1, 1, 0, '2026-01-10T10:05+05:30', '2026-01-10T10:05+05:30');
select is(pg_temp.counter(1, 'ai_calls'), '2026-01-10: 0 used, 2 held', 'a call of no seconds gives its hold back and counts nothing');
select pg_temp.end_call(1, 1, null, '2026-01-10T10:05+05:30', '2026-01-10T10:06+05:30');
select is(pg_temp.counter(1, 'ai_calls'), '2026-01-10: 0 used, 2 held', 'once');
select pg_temp.end_call(1, 1, 61, '2026-01-10T10:05+05:30', '2026-01-10T10:07+05:30');
select is(pg_temp.counter(1, 'ai_calls'), '2026-01-10: 1 used, 2 held', 'seconds that are billed late count, and give nothing back again');
select pg_temp.end_call(1, 1, 61, '2026-01-10T10:05+05:30', '2026-01-10T10:08+05:30');
select pg_temp.end_call(1, 1, 70, '2026-01-10T10:05+05:30', '2026-01-10T10:08+05:30');
select is(pg_temp.counter(1, 'call_seconds'), '2026-01-10: 70 used, 0 held', 'once, as they were billed last');
select pg_temp.end_call(1, 2, 30, '2026-01-10T10:05+05:30', '2026-01-10T10:08+05:30');
select is(pg_temp.counter(1, 'ai_calls'), '2026-01-10: 2 used, 1 held', 'a hold becomes use');
select pg_temp.end_call(1, 3, 30, '2026-01-10T10:05+05:30', '2026-01-10T10:08+05:30', 'inbound');
select is(pg_temp.counter(1, 'ai_calls'), '2026-01-10: 3 used, 1 held', 'an inbound call counts and had no hold to give back');
select pg_temp.end_call(1, 4, 30, '2026-01-10T10:05+05:30', '2026-01-10T10:08+05:30');
select is(pg_temp.counter(1, 'ai_calls'), '2026-01-10: 4 used, 0 held', 'the call that ran over is counted in full');
select ok(not pg_temp.reserve(1, 'ai_calls', 1, '2026-01-10T10:10+05:30'), 'and the next is refused');
select ok(pg_temp.reserve(1, 'ai_calls', 3, '2026-02-10T00:00+05:30'), 'the next period starts afresh, also before the last one is closed');

-- What is still held from the last period counts against the next.
select ok(pg_temp.subscribe(2, 'test-capped', '2026-01-10T10:00+05:30') is not null and pg_temp.reserve(2, 'ai_calls', 2, '2026-02-09T23:59+05:30'),
  'two calls are under way at midnight');
select ok(not pg_temp.reserve(2, 'ai_calls', 2, '2026-02-10T00:00+05:30'), 'they may end in the new period, so two more are too many');
select ok(pg_temp.reserve(2, 'ai_calls', 1, '2026-02-10T00:00+05:30'), 'one more is not');
select pg_temp.end_call(2, 5, 30, '2026-02-10T00:01+05:30', '2026-02-10T00:01+05:30');
select is(pg_temp.counter(2, 'ai_calls'), '2026-01-10: 0 used, 1 held; 2026-02-10: 1 used, 1 held', 'they are counted where they end');

-- Seconds: a hard cap, and a cap that is sold beyond.
select isnt(pg_temp.subscribe(3, 'test-seconds', '2026-01-10T10:00Z'), null, 'subscribed to Seconds');
select pg_temp.end_call(3, 6, 2990, '2026-01-10T10:00Z', '2026-01-10T10:00Z');
select ok(not pg_temp.reserve(3, 'call_seconds', 60, '2026-01-10T10:00Z'), '60 seconds are refused where 10 are left');
select ok(pg_temp.reserve(3, 'call_seconds', 10, '2026-01-10T10:00Z'), '10 are not');
select ok(not pg_temp.reserve(3, 'ai_calls', 1, '2026-01-10T10:00Z'), 'a call needs a second that nobody holds');
select private.release_usage('00000000-0000-4000-8000-000000000003', 'call_seconds', 10, now());
select ok(pg_temp.reserve(3, 'ai_calls', 1, '2026-01-10T10:00Z'), 'with ten left a call may start');
select pg_temp.end_call(3, 7, 25, '2026-01-10T10:01Z', '2026-01-10T10:01Z');
select is(pg_temp.counter(3, 'call_seconds'), '2026-01-10: 3015 used, 0 held', 'its 25 seconds are counted in full');
select ok(not pg_temp.reserve(3, 'ai_calls', 1, '2026-01-10T10:02Z'), 'and no other starts');
select isnt(pg_temp.subscribe(4, 'test-metered', '2026-01-10T10:00Z'), null, 'subscribed to Metered');
select pg_temp.end_call(4, 8, 9000, '2026-01-10T10:01Z', '2026-01-10T10:01Z');
select ok(pg_temp.reserve(4, 'call_seconds', 600, '2026-01-10T10:02Z'), 'a meter with an overage price never blocks, hard or not');
select ok(pg_temp.reserve(4, 'ai_calls', 1000000, '2026-01-10T10:02Z'), '-1 is unlimited');
select ok(pg_temp.reserve(4, 'test_messages', 1, '2026-01-10T10:02Z'), 'a meter that the price does not name is not limited');

-- No subscription, no dialling; but nothing that happened is lost.
update public.subscriptions set status = 'suspended' where organization_id = '00000000-0000-4000-8000-000000000004';
select ok(not pg_temp.reserve(4, 'ai_calls', 1, '2026-01-10T10:02Z'), 'a suspended subscription grants nothing');
update public.subscriptions set status = 'cancelled', next_invoice_at = null where organization_id = '00000000-0000-4000-8000-000000000004';
select ok(not pg_temp.reserve(4, 'ai_calls', 1, '2026-01-10T10:02Z'), 'without a subscription nothing is granted');
select pg_temp.end_call(4, 9, 11, '2026-03-15T10:01Z', '2026-03-15T10:02Z');
select is(pg_temp.counter(4, 'call_seconds'), '2026-01-10: 9000 used, 600 held; 2026-03-01: 11 used, 0 held',
  'what happens without one is counted by calendar month');

select * from finish();
rollback;
