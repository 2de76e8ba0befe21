-- Closing periods: what is billed, when, once, and what the next period is.
begin;
set local search_path = public, extensions, tap;
select plan(49);

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

create function pg_temp.invoices(org integer) returns setof text
language sql as $$
  select format('%s to %s: %s + %s = %s',
    first_day, last_day + 1, subtotal_minor, tax_minor, total_minor)
  from public.invoices
  where organization_id = ('00000000-0000-4000-8000-00000000000' || org)::uuid
  order by invoice_number
$$;
create function pg_temp.lines(org integer, nth integer default 1) returns setof text
language sql as $$
  select format('%s %s %s @ %s/%s = %s', line.kind, line.quantity, line.unit, line.unit_price_minor, line.price_units, line.amount_minor)
  from (
    select id from public.invoices
    where organization_id = ('00000000-0000-4000-8000-00000000000' || org)::uuid
    order by invoice_number offset nth - 1 limit 1
  ) as invoice
  join public.invoice_lines as line on line.invoice_id = invoice.id
  order by line.position
$$;
create function pg_temp.taxes(org integer) returns setof text
language sql as $$
  select format('%s %s bp of %s = %s', tax.name, tax.rate_bp, tax.taxable_minor, tax.amount_minor)
  from public.invoice_taxes as tax
  where organization_id = ('00000000-0000-4000-8000-00000000000' || org)::uuid
  order by tax.position
$$;
create function pg_temp.close(at timestamptz) returns text
language sql as $$
  select format('%s closed, %s invoices', answer ->> 'closed', jsonb_array_length(answer -> 'invoices'))
  from private.close_periods('{"v": 1, "limit": 500}', at) as answer
$$;
-- What others left in this database is not this test's to close.
update public.subscriptions set next_invoice_at = null, trial_ends_at = 'infinity';

-- An invoice in arrears: base, allowance, overage, tax.
select isnt(pg_temp.subscribe(1, 'test-metered', '2026-01-01T10:00+05:30'), null, 'Near subscribes to Metered');
select pg_temp.end_call(1, 1, 3000, '2026-01-10T10:00Z', '2026-01-10T10:00Z');
select pg_temp.end_call(1, 2, 8010, '2026-01-11T10:00Z', '2026-01-11T10:00Z');
select is(pg_temp.close('2026-01-31T18:29:59Z'), '0 closed, 0 invoices', 'nothing is closed a second early');
select is(pg_temp.close('2026-01-31T18:30:00Z'), '1 closed, 1 invoices', 'at local midnight the period is closed');
select is(pg_temp.close('2026-01-31T18:30:00Z'), '0 closed, 0 invoices', 'once');
select results_eq(
  'select pg_temp.invoices(1)', array['2026-01-01 to 2026-02-01: 174000 + 31320 = 205320'], 'subtotal, tax and total'
);
select results_eq(
  'select pg_temp.lines(1)',
  array['base 1 month @ 99900/1 = 99900', 'included 2 call @ 0/1 = 0', 'included 3600 second @ 0/1 = 0', 'overage 7410 second @ 600/60 = 74100'],
  'a line for the plan, one for each allowance, one for what is beyond'
);
select results_eq(
  'select pg_temp.taxes(1)', array['CGST 900 bp of 174000 = 15660', 'SGST 900 bp of 174000 = 15660'],
  'CGST and SGST in the issuer''s own state'
);
select results_eq(
  $$ select status::text, left(invoice_number, 11), invoice_date, due_date, issuer ->> 'legal_name', customer ->> 'name'
     from public.invoices where organization_id = '00000000-0000-4000-8000-000000000001' $$,
  $$ values ('open', 'INV-202602-', '2026-02-01'::date, '2026-02-16'::date, 'Issuer', 'Near') $$,
  'open, numbered and dated by the issuer''s calendar, with both parties as they were'
);
select results_eq(
  $$ select (current_period_start at time zone timezone)::date, (current_period_end at time zone timezone)::date, period_no,
       next_invoice_at = current_period_end
     from public.subscriptions where organization_id = '00000000-0000-4000-8000-000000000001' $$,
  $$ values ('2026-02-01'::date, '2026-03-01'::date, 1, true) $$, 'the subscription is in the next period'
);
select is(
  (select count(*)::integer from private.outbox where topic = 'invoice.finalized' and organization_id = '00000000-0000-4000-8000-000000000001'),
  1, 'it is told once'
);
select lives_ok('set constraints all immediate', 'lines make the subtotal and taxes the tax');

-- Other places of supply.
select isnt(pg_temp.subscribe(org, 'test-metered', '2026-01-01T10:00Z'), null, format('organization %s subscribes', org))
from generate_series(2, 4) as org;
select is(pg_temp.close('2026-02-05T00:00Z'), '3 closed, 3 invoices', 'all are billed');
select results_eq('select pg_temp.taxes(2)', array['IGST 1800 bp of 99900 = 17982'], 'IGST in another state');
select results_eq('select pg_temp.taxes(3)', array['VAT 2000 bp of 99900 = 19980'], 'another country''s tax');
select is_empty('select pg_temp.taxes(4)', 'no tax where no rate is known');
select results_eq('select pg_temp.invoices(4)', array['2026-01-01 to 2026-02-01: 99900 + 0 = 99900'], 'and the total is the subtotal');

-- Missed periods: one invoice each, priced as it was sold.
insert into public.plan_prices (id, plan_id, version, billing_cycle, base_minor)
values ('00000000-0000-4000-b000-000000000009', '00000000-0000-4000-a000-000000000001', 2, 'monthly', 500000);
select pg_temp.end_call(1, 3, 3661, '2026-03-31T18:29:59Z', '2026-04-20T10:00Z');
select is(pg_temp.close('2026-04-20T10:00Z'), '8 closed, 8 invoices', 'February and March of four subscriptions');
select results_eq(
  'select pg_temp.invoices(1)',
  array['2026-01-01 to 2026-02-01: 174000 + 31320 = 205320', '2026-02-01 to 2026-03-01: 99900 + 17982 = 117882',
    '2026-03-01 to 2026-04-01: 100510 + 18092 = 118602'],
  'a price raised meanwhile does not touch those who bought the old one'
);
select results_eq(
  $$ select pg_temp.lines(1, 3) $$,
  array['base 1 month @ 99900/1 = 99900', 'included 1 call @ 0/1 = 0', 'included 3600 second @ 0/1 = 0', 'overage 61 second @ 600/60 = 610'],
  'usage is billed in the period in which it happened'
);
select is(
  (select count(distinct invoice_number) = count(*) and max(right(invoice_number, 5)::integer) - min(right(invoice_number, 5)::integer) = count(*) - 1
   from public.invoices where finalized_at = '2026-04-20T10:00Z'),
  true, 'the numbers of a run are consecutive'
);

-- Plans that charge nothing: no document, but the period goes on; a trial ends.
update public.subscriptions set next_invoice_at = null where organization_id <> '00000000-0000-4000-8000-000000000001';
select isnt(pg_temp.subscribe(5, 'test-capped', '2026-01-31T10:00+05:30', 'trialing'), null, 'Small tries Capped');
select results_eq(
  $$ select status::text, trial_ends_at from public.subscriptions
     where organization_id = '00000000-0000-4000-8000-000000000005' and status <> 'cancelled' $$,
  $$ values ('trialing', '2026-02-14T10:00+05:30'::timestamptz) $$, 'for fourteen days'
);
select is(pg_temp.close('2026-02-14T10:00+05:30'), '0 closed, 0 invoices', 'the trial ends');
select results_eq(
  $$ select status::text, (current_period_end at time zone timezone)::date from public.subscriptions
     where organization_id = '00000000-0000-4000-8000-000000000005' and status <> 'cancelled' $$,
  $$ values ('active', '2026-02-28'::date) $$, 'and the subscription is active, in the same period'
);
select is(pg_temp.close('2026-04-01T00:00+05:30'), '2 closed, 0 invoices', 'two periods are closed without a document');
select results_eq(
  $$ select (current_period_start at time zone timezone)::date, (current_period_end at time zone timezone)::date
     from public.subscriptions where organization_id = '00000000-0000-4000-8000-000000000005' and status <> 'cancelled' $$,
  $$ values ('2026-03-31'::date, '2026-04-30'::date) $$, '31 January, 28 February, 31 March, 30 April'
);

-- From a free plan to one that charges: at once; between plans that charge: when the period is billed.
select pg_temp.end_call(5, 4, 30, '2026-04-05T10:00Z', '2026-04-05T10:00Z');
select pg_temp.end_call(5, 5, 30, '2026-04-10T10:00Z', '2026-04-10T10:00Z');
select isnt(pg_temp.subscribe(5, 'test-metered', '2026-04-10T18:00+05:30'), null, 'Small buys Metered on 10 April');
select is(
  pg_temp.counter(5, 'call_seconds'),
  '2026-01-31: 0 used, 0 held; 2026-02-28: 0 used, 0 held; 2026-03-31: 30 used, 0 held; 2026-04-10: 30 used, 0 held',
  'what was used that day counts in the new period, the rest in the old'
);
select is(pg_temp.subscribe(5, 'test-metered', '2026-04-11T18:00+05:30'), (
  select id from public.subscriptions where organization_id = '00000000-0000-4000-8000-000000000005' and status = 'active'
), 'asking for the same again changes nothing');
select is(pg_temp.subscribe(5, 'test-capped', '2026-04-12T18:00+05:30'), (
  select id from public.subscriptions where organization_id = '00000000-0000-4000-8000-000000000005' and status = 'active'
), 'Small goes back to Capped');
select is(
  (select plan_price_id from public.subscriptions where organization_id = '00000000-0000-4000-8000-000000000005' and status = 'active'),
  '00000000-0000-4000-b000-000000000009', 'not before the period is billed, and at the price that is on sale now'
);
select is(pg_temp.close('2026-05-10T00:00+05:30'), '2 closed, 2 invoices', 'the month is billed, and one of Near''s');
select is(
  (select plan_price_id from public.subscriptions where organization_id = '00000000-0000-4000-8000-000000000005' and status = 'active'),
  '00000000-0000-4000-b000-000000000002', 'then the new plan holds'
);
select is(
  (select subtotal_minor from public.invoices where organization_id = '00000000-0000-4000-8000-000000000005' order by period_start desc limit 1),
  500000::bigint, 'it was billed as it was sold'
);

-- A plan that charges is tried in a period of its own.
select isnt(pg_temp.subscribe(6, 'test-metered', '2026-06-01T10:00+01:00', 'trialing', 'yearly'), null, 'Islands tries a year of Metered');
select results_eq(
  $$ select anchor_on, period_no, (current_period_start at time zone timezone)::date, (current_period_end at time zone timezone)::date
     from public.subscriptions where organization_id = '00000000-0000-4000-8000-000000000006' and status = 'trialing' $$,
  $$ values ('2026-06-16'::date, -1, '2026-06-01'::date, '2026-06-16'::date) $$, 'for fourteen days and the rest of the last'
);
update public.subscriptions set next_invoice_at = null where organization_id <> '00000000-0000-4000-8000-000000000006';
select is(pg_temp.close('2026-06-20T00:00+01:00'), '1 closed, 0 invoices', 'the trial costs nothing');
select is(pg_temp.close('2027-06-20T00:00+01:00'), '1 closed, 1 invoices', 'the year does');
select results_eq(
  'select pg_temp.lines(6, 1)', array['base 1 year @ 999000/1 = 999000', 'included 0 second @ 0/1 = 0'], 'a year''s price'
);

-- Cancelled at the end of the period: billed once more, then never.
update public.subscriptions set cancel_at_period_end = true where organization_id = '00000000-0000-4000-8000-000000000006' and status = 'active';
select is(pg_temp.close('2028-06-20T00:00+01:00'), '1 closed, 1 invoices', 'the last year is billed');
select results_eq(
  $$ select status::text, next_invoice_at from public.subscriptions
     where organization_id = '00000000-0000-4000-8000-000000000006' order by created_at desc, anchor_on desc limit 1 $$,
  $$ values ('cancelled', null::timestamptz) $$, 'then it is over'
);

-- Days and counter disagree: nothing is billed until somebody has looked.
select isnt(pg_temp.subscribe(6, 'test-metered', '2029-01-01T10:00Z'), null, 'Islands comes back');
select pg_temp.end_call(6, 6, 30, '2029-01-10T10:00Z', '2029-01-10T10:00Z');
update public.usage_days set quantity = 31 where day = '2029-01-10' and meter_key = 'call_seconds';
select is(pg_temp.close('2029-02-02T10:00Z'), '0 closed, 0 invoices', 'a period that does not add up is not billed');
select matches(
  (select billing_hold from public.subscriptions where organization_id = '00000000-0000-4000-8000-000000000006' and status = 'active'),
  'disagree in the period that began 2029-01-01', 'its subscription says why'
);
select is((select count(*)::integer from private.outbox where topic = 'billing.held'), 1, 'and somebody is told');
select lives_ok('set constraints all immediate', 'every invoice of this test adds up');

select * from finish();
rollback;
