-- Usage that comes late or is corrected: it counts in its own period, and the next invoice bills the difference at that period's price.
begin;
set local search_path = public, extensions, tap;
select plan(34);

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
create function pg_temp.correct(id text, quantity integer, corrects text, type text default 'test_messages', source text default 'crm') returns jsonb
language sql as $$
  select jsonb_build_object('id', id, 'source', source, 'type', type, 'quantity', quantity, 'corrects', corrects)
$$;
create function pg_temp.lines(org integer, nth integer) returns text
language sql as $$
  select string_agg(format('%s %s %s', line.kind, line.quantity, line.amount_minor), ', ' order by line.position)
  from public.invoice_lines as line
  where line.meter_key is distinct from 'ai_calls' and line.invoice_id = (
    select own.id from public.invoices as own
    where own.organization_id = ('00000000-0000-4000-8000-00000000000' || org)::uuid
    order by own.period_start offset nth - 1 limit 1
  )
$$;
create function pg_temp.told(topic text, org integer) returns text
language sql as $$
  select string_agg(key, ', ' order by id) from private.outbox
  where outbox.topic = told.topic and organization_id = ('00000000-0000-4000-8000-00000000000' || org)::uuid
$$;

-- Near begins at a dear price, 600.00 a minute beyond the first hour, and then pays 6.00.
insert into public.plan_prices (id, plan_id, version, billing_cycle, base_minor)
values ('00000000-0000-4000-b000-000000000005', '00000000-0000-4000-a000-000000000001', 2, 'monthly', 99900);
insert into public.plan_price_meters (plan_price_id, meter_key, included_units, overage_price_minor, overage_unit)
values
  ('00000000-0000-4000-b000-000000000005', 'call_seconds', 3600, 60000, 60);
update public.plan_prices set retired_at = '2026-01-10' where id = '00000000-0000-4000-b000-000000000005';
select isnt(pg_temp.subscribe(1, 'test-metered', '2026-01-01T10:00+05:30'), null, 'Near subscribes');
select is(
  (select plan_price_id from public.subscriptions where organization_id = '00000000-0000-4000-8000-000000000001'),
  '00000000-0000-4000-b000-000000000005', 'to the dear price'
);
select pg_temp.end_call(1, 1, 3590, '2026-01-05T10:00Z', '2026-01-05T10:00Z');
select is(pg_temp.told('usage.threshold', 1), 'call_seconds 2026-01-01 50, call_seconds 2026-01-01 80', 'One call crosses two lines');
update public.subscriptions set next_plan_price_id = '00000000-0000-4000-b000-000000000001'
where organization_id = '00000000-0000-4000-8000-000000000001';
select is(private.close_periods('{}', '2026-02-01T01:00+05:30') ->> 'closed' is not null, true, 'January is closed');
select is(pg_temp.lines(1, 1), 'base 1 99900, included 3590 0', 'and billed within the plan');
select pg_temp.end_call(1, 2, 70, '2026-01-31T18:00Z', '2026-02-02T10:00Z');
select pg_temp.end_call(1, 3, 60, '2026-02-02T10:00Z', '2026-02-02T10:00Z');
select is(pg_temp.counter(1, 'call_seconds'), '2026-01-01: 3660 used, 0 held; 2026-02-01: 60 used, 0 held', 'A late call counts in January');
select is(pg_temp.told('usage.threshold', 1), 'call_seconds 2026-01-01 50, call_seconds 2026-01-01 80', 'which is nobody''s news any more');
select results_eq(
  $$ select day, occurred_at from private.usage_events
     where key = '00000000-0000-4000-9000-000000000002' and meter_key = 'call_seconds' $$,
  $$ values ('2026-01-31'::date, '2026-01-31T18:00Z'::timestamptz) $$, 'on its own day'
);
select is(private.close_periods('{}', '2026-03-01T01:00+05:30') ->> 'closed' is not null, true, 'February is closed');
select is(pg_temp.lines(1, 2), 'base 1 99900, included 60 0, adjustment 60 60000', 'The next invoice bills it at January''s price');
select is(
  (select line.kind || ' ' || line.position || ' ' || (adjustment.settled_at is not null)
   from private.usage_adjustments as adjustment
   join private.usage_events as event on event.id = adjustment.event_id and event.key = '00000000-0000-4000-9000-000000000002'
   join public.invoice_lines as line on line.id = adjustment.invoice_line_id),
  'adjustment 4 true', 'and the line is linked to the event'
);
select is(private.close_periods('{}', '2026-04-01T01:00+05:30') ->> 'closed' is not null, true, 'March is closed');
select is(pg_temp.lines(1, 3), 'base 1 99900, included 0 0', 'An adjustment is billed once');

-- The carrier corrects the seconds of a call, from 70 to 10 and then to 130.
select pg_temp.end_call(1, 2, 10, '2026-01-31T18:00Z', '2026-04-02T10:00Z');
select pg_temp.end_call(1, 2, 10, '2026-01-31T18:00Z', '2026-04-02T11:00Z');
select is(pg_temp.counter(1, 'call_seconds'),
  '2026-01-01: 3600 used, 0 held; 2026-02-01: 60 used, 0 held; 2026-03-01: 0 used, 0 held', 'Fewer seconds are taken back, once');
select is(
  (select string_agg(format('%s %s', quantity, corrects is not null), ', ' order by id) from private.usage_events
   where meter_key = 'call_seconds' and '00000000-0000-4000-9000-000000000002' in (key, corrects)),
  '70 f, -60 t', 'by an event that names what it corrects'
);
select is(private.close_periods('{}', '2026-05-01T01:00+05:30') ->> 'closed' is not null, true, 'April is closed');
select is(pg_temp.lines(1, 4), 'base 1 99900, included 0 0, adjustment -60 -60000', 'and given back at the same price');
select pg_temp.end_call(1, 2, 130, '2026-01-31T18:00Z', '2026-05-02T10:00Z');
select pg_temp.end_call(1, 2, 0, '2026-01-31T18:00Z', '2026-05-02T10:00Z');
select is(pg_temp.counter(1, 'ai_calls'), '2026-01-01: 1 used, 0 held; 2026-02-01: 1 used, 0 held; 2026-03-01: 0 used, 0 held; 2026-04-01: 0 used, 0 held',
  'A call of no seconds is none');
select is(private.close_periods('{}', '2026-06-01T01:00+05:30') ->> 'closed' is not null, true, 'May is closed');
select is(pg_temp.lines(1, 5), 'base 1 99900, included 0 0', 'What was corrected and taken back costs nothing');

-- What is given back is never more than an invoice charges.
select pg_temp.end_call(1, 4, 7200, '2026-06-05T10:00Z', '2026-06-05T10:00Z');
select is(private.close_periods('{}', '2026-07-01T01:00+05:30') ->> 'closed' is not null, true, 'June is closed');
select is(pg_temp.lines(1, 6), 'base 1 99900, included 3600 0, overage 3600 36000', 'with an hour at the later price');
update public.subscriptions set next_plan_price_id = '00000000-0000-4000-b000-000000000003'
where organization_id = '00000000-0000-4000-8000-000000000001';
select pg_temp.end_call(1, 4, 1, '2026-06-05T10:00Z', '2026-07-05T10:00Z');
select is(private.close_periods('{}', '2026-08-01T01:00+05:30') ->> 'closed' is not null, true, 'July is closed');
select is(pg_temp.lines(1, 7), 'base 1 99900, included 0 0, adjustment -3600 -36000', 'the hour is given back');
select is_empty('select from private.usage_adjustments where settled_at is null', 'Nothing is left');
select pg_temp.end_call(1, 4, 7201, '2026-06-05T10:00Z', '2026-08-05T10:00Z');
select pg_temp.end_call(1, 4, 3601, '2026-06-05T10:00Z', '2026-08-06T10:00Z');
select is(private.close_periods('{}', '2026-09-01T01:00+05:30') ->> 'closed' is not null, true, 'August costs nothing');
select is(pg_temp.lines(1, 8), 'base 1 0, included 0 0, adjustment 1 10', 'but for one second of June');

-- Corrections of an organization's own events.
select is(pg_temp.record(jsonb_build_array(pg_temp.event('a', 5, '2026-08-20T10:00:00Z')), '2026-09-02T10:00Z'), 'stored', 'An event of August comes in September');
select is(
  pg_temp.record(jsonb_build_array(
    pg_temp.correct('c1', -2, 'a'), pg_temp.correct('c1', -2, 'a'), pg_temp.correct('c2', -4, 'a'), pg_temp.correct('c3', 1, 'b'),
    pg_temp.correct('c4', 1, 'c1'), pg_temp.correct('c5', 1, 'a', source => 'shop'), pg_temp.correct('c6', 1, 'c6'), pg_temp.event('c7', -1),
    pg_temp.correct('c8', 4, 'a'), pg_temp.correct('c8', 5, 'a')
  ), '2026-09-02T10:00Z'),
  'stored, duplicate, rejected correction_too_large, rejected unknown_corrected, rejected unknown_corrected, rejected unknown_corrected, '
  'rejected invalid_corrects, rejected invalid_quantity, stored, conflict idempotency_conflict', 'Each correction is judged alone'
);
select is(pg_temp.counter(1, 'test_messages'), '2026-08-01: 7 used, 0 held', 'and counts where its event did');
select is(
  pg_temp.record(jsonb_build_array(pg_temp.correct('c2', -4, 'a'), pg_temp.correct('c1', -2, 'a')), '2026-10-20T10:00Z'),
  'stored, duplicate', 'What was refused may come again, what was stored is known for ever'
);
select is(
  (select string_agg(format('%s %s %s', day, quantity, events), ', ' order by day) from public.usage_days where meter_key = 'test_messages'),
  '2026-08-20 3 4', 'on its event''s day'
);
select is(
  (select quantity from private.usage_keys where key = 'a' and source = 'crm'), 3::bigint, 'The key knows what is left'
);
select throws_ok(
  $$ insert into private.usage_events (organization_id, meter_key, source, key, quantity, occurred_at, day, recorded_at)
     values ('00000000-0000-4000-8000-000000000001', 'test_messages', 'crm', 'x', -1, now(), '2026-08-20', now()) $$,
  '23514', null, 'Only a correction is negative'
);

select * from finish();
rollback;
