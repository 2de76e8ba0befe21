-- Plans that name every kind of price, and the run that bills by them: versions, tiers, packages, minimum, in advance, quarters, currencies.
begin;
set local search_path = public, extensions, tap;
select plan(82);

insert into private.billing_issuer (legal_name, state_code, country_code, timezone)
values ('Issuer', 'KA', 'IN', 'Asia/Kolkata')
on conflict on constraint billing_issuer_pkey do update
set legal_name = 'Issuer', gstin = null, state_code = 'KA', country_code = 'IN', timezone = 'Asia/Kolkata', payment_terms_days = 15;
insert into public.tax_rates (country_code, scope, name, rate_bp, position)
values ('IN', 'intra_state', 'CGST', 900, 10), ('IN', 'intra_state', 'SGST', 900, 20)
on conflict on constraint tax_rates_version_key do nothing;
update public.subscriptions set next_invoice_at = null, trial_ends_at = 'infinity';
update public.invoices set past_due_at = now() where status = 'open';

create function pg_temp.org(n integer) returns uuid
language sql as $$ select ('00000000-0000-4000-8000-0000000073' || lpad(n::text, 2, '0'))::uuid $$;
insert into public.organizations (id, name, timezone, country_code, state_code, currency)
select pg_temp.org(n), 'Priced ' || n, 'Asia/Kolkata', case when n > 20 then 'US' else 'IN' end, 'KA', case n when 21 then 'USD' when 22 then 'JPY' else 'INR' end
from generate_series(1, 25) as n;

create function pg_temp.plan(slug text, terms jsonb, cycle text default 'monthly', currency text default 'INR', at timestamptz default '2026-01-01') returns uuid
language plpgsql as $$
begin
  insert into public.subscription_plans (slug, name) values (plan.slug, initcap(plan.slug)) on conflict on constraint subscription_plans_slug_key do nothing;
  return private.set_plan_price(plan.slug, cycle::public.billing_cycle, currency, terms, at);
end
$$;
create function pg_temp.subscribe(n integer, slug text, at timestamptz, cycle text default 'monthly', status text default 'active') returns uuid
language sql as $$ select private.subscribe_organization(pg_temp.org(n), slug, status::public.subscription_status, at, cycle::public.billing_cycle) $$;
create function pg_temp.use(n integer, meter text, quantity bigint, at timestamptz, said timestamptz default null) returns void
language sql as $$
  select private.count_usage(
    pg_temp.org(n), array['test'], array[gen_random_uuid()::text], array[meter], array[quantity], array[at], coalesce(said, at))
$$;
create function pg_temp.close(at timestamptz) returns text
language sql as $$
  select format('%s closed, %s invoices', answer ->> 'closed', jsonb_array_length(answer -> 'invoices'))
  from private.close_periods('{"v": 1, "limit": 500}', at) as answer
$$;
create function pg_temp.bills(n integer) returns setof text
language sql as $$
  select format('%s %s to %s: %s %s + %s', kind, first_day, last_day, subtotal_minor, currency, tax_minor)
  from public.invoices where organization_id = pg_temp.org(n) order by invoice_number
$$;
create function pg_temp.lines(n integer, nth integer default 1) returns setof text
language sql as $$
  select format('%s %s @ %s/%s = %s%s', line.kind, line.quantity, line.unit_price_minor, line.price_units, line.amount_minor,
    ' ' || line.first_day || ' to ' || line.last_day)
  from (
    select id from public.invoices where organization_id = pg_temp.org(n) order by invoice_number offset nth - 1 limit 1
  ) as invoice
  join public.invoice_lines as line on line.invoice_id = invoice.id
  where line.kind <> 'included'
  order by line.position
$$;

-- Versions ------------------------------------------------------------------------------------------------------------------------
select isnt(pg_temp.plan('edited', '{"base_minor": 699900, "meters": {"ai_calls": {"included_units": -1}}}'), null, 'A plan is given a price');
select is(
  pg_temp.plan('edited', '{"base_minor": 699900, "meters": {"ai_calls": {"included_units": -1}}}'),
  (select id from public.plan_prices where plan_id = (select id from public.subscription_plans where slug = 'edited')), 'The same again is no version'
);
select isnt(pg_temp.subscribe(1, 'edited', '2026-01-01 10:00+05:30'), null, 'Somebody subscribes');
select isnt(
  pg_temp.plan('edited', '{"base_minor": 799900, "meters": {"ai_calls": {"included_units": -1}}}', at => '2026-01-10 00:00+05:30'), null,
  'The plan is edited on 10 January'
);
select results_eq(
  $$ select version, base_minor, retired_at is not null from public.plan_prices
     where plan_id = (select id from public.subscription_plans where slug = 'edited') order by version $$,
  $$ values (1, 699900::bigint, true), (2, 799900, false) $$, 'which makes the second version, and the first is no longer sold'
);
select isnt(pg_temp.subscribe(2, 'edited', '2026-01-11 10:00+05:30'), null, 'Somebody else subscribes');
select is(pg_temp.close('2026-02-11 00:00+05:30'), '2 closed, 2 invoices', 'Both are billed');
select results_eq('select pg_temp.bills(1)', array['period 2026-01-01 to 2026-01-31: 699900 INR + 125982'], 'who subscribed before pays the old price');
select results_eq('select pg_temp.bills(2)', array['period 2026-01-11 to 2026-02-10: 799900 INR + 143982'], 'who came after the new one');
select throws_ok(
  $$ update public.plan_prices set base_minor = 1 where plan_id = (select id from public.subscription_plans where slug = 'edited') and version = 1 $$,
  '23514', null, 'and neither is changed where it stands'
);

-- What is beyond ------------------------------------------------------------------------------------------------------------------
update public.subscriptions set next_invoice_at = null;
select isnt(
  pg_temp.plan('graduated', '{"meters": {"call_seconds": {"included_units": 60000, "overage_price_minor": 400, "overage_unit": 60, "pricing_model": "graduated",
    "tiers": [{"up_to": 60000, "unit_minor": 400}, {"unit_minor": 300}]}}}'), null, 'A plan of tiers'
);
select isnt(
  pg_temp.plan('fees', '{"meters": {"ai_calls": {"overage_price_minor": 10, "pricing_model": "graduated",
    "tiers": [{"up_to": 5, "unit_minor": 10, "flat_minor": 100}, {"unit_minor": 5, "flat_minor": 50}]}}}'), null, 'one with flat fees'
);
select isnt(
  pg_temp.plan('volume', '{"meters": {"ai_calls": {"overage_price_minor": 10, "pricing_model": "volume",
    "tiers": [{"up_to": 15, "unit_minor": 10}, {"unit_minor": 5}]}}}'), null, 'one by volume'
);
select isnt(
  pg_temp.plan('package', '{"meters": {"ai_calls": {"included_units": 5, "overage_price_minor": 100, "overage_unit": 10, "pricing_model": "package"}}}'), null,
  'one of packages'
);
select isnt(
  pg_temp.plan('committed', '{"base_minor": 100000, "minimum_minor": 500000, "meters": {"call_seconds": {"overage_price_minor": 600, "overage_unit": 60}}}'), null,
  'and one with a minimum'
);
select isnt(pg_temp.subscribe(n, slug, '2026-01-01 10:00+05:30'), null, format('%s subscribes to %s', n, slug))
from (values (3, 'graduated'), (4, 'fees'), (5, 'fees'), (6, 'volume'), (7, 'volume'), (8, 'package'), (9, 'committed'), (10, 'committed'), (11, 'fees')) as v (n, slug);
select pg_temp.use(n, meter, quantity, '2026-01-05 10:00+05:30')
from (
  values (3, 'call_seconds', 140717), (4, 'ai_calls', 3), (5, 'ai_calls', 8), (6, 'ai_calls', 15), (7, 'ai_calls', 16), (8, 'ai_calls', 27),
    (9, 'call_seconds', 6000), (10, 'call_seconds', 60000)
) as v (n, meter, quantity);
select is(pg_temp.close('2026-02-01 00:00+05:30'), '9 closed, 8 invoices', 'What nobody used costs nothing, also where there are flat fees');
select results_eq(
  'select pg_temp.lines(3)', array['base 1 @ 0/1 = 0', 'overage 60000 @ 400/60 = 400000', 'overage 20717 @ 300/60 = 103585'],
  'Graduated: a line a tier, counted from what is beyond the included'
);
select results_eq('select pg_temp.lines(4)', array['base 1 @ 0/1 = 0', 'overage 3 @ 10/1 = 30', 'fee 1 @ 100/1 = 100'], 'The first tier and its fee');
select results_eq(
  'select pg_temp.lines(5)',
  array['base 1 @ 0/1 = 0', 'overage 5 @ 10/1 = 50', 'fee 1 @ 100/1 = 100', 'overage 3 @ 5/1 = 15', 'fee 1 @ 50/1 = 50'], 'Both tiers and their fees'
);
select results_eq('select pg_temp.lines(6)', array['base 1 @ 0/1 = 0', 'overage 15 @ 10/1 = 150'], 'Volume: all at the price of the tier reached');
select results_eq('select pg_temp.lines(7)', array['base 1 @ 0/1 = 0', 'overage 16 @ 5/1 = 80'], 'also of the next tier');
select results_eq('select pg_temp.lines(8)', array['base 1 @ 0/1 = 0', 'overage 22 @ 100/10 = 300'], 'Packages: every one that was begun');
select results_eq(
  'select pg_temp.lines(9)', array['base 1 @ 100000/1 = 100000', 'overage 6000 @ 600/60 = 60000', 'commitment 1 @ 340000/1 = 340000'],
  'What is missing to the minimum is a line'
);
select results_eq(
  'select pg_temp.lines(10)', array['base 1 @ 100000/1 = 100000', 'overage 60000 @ 600/60 = 600000'], 'and none where nothing is'
);

-- Late: the period's own price says the difference, also where it falls.
select pg_temp.use(6, 'ai_calls', 1, '2026-01-31 23:00+05:30', '2026-02-10 10:00+05:30');
select pg_temp.use(6, 'ai_calls', 9, '2026-02-10 10:00+05:30');
select pg_temp.use(5, 'ai_calls', 2, '2026-01-31 23:00+05:30', '2026-02-10 10:00+05:30');
select is(pg_temp.close('2026-03-01 00:00+05:30'), '9 closed, 4 invoices', 'February');
select results_eq(
  'select pg_temp.lines(6, 2)', array['base 1 @ 0/1 = 0', 'overage 9 @ 10/1 = 90', 'adjustment 1 @ 10/1 = -70'],
  'The sixteenth call of January makes all sixteen cheaper: 80 less 150'
);
select results_eq('select pg_temp.lines(5, 2)', array['base 1 @ 0/1 = 0', 'adjustment 2 @ 10/1 = 10'], 'Two more in the second tier');

-- Who offers what makes no sense is told so.
select throws_ok(
  format('select pg_temp.plan(''broken'', %L)', jsonb_build_object('meters', jsonb_build_object('ai_calls', terms))), '23514', null, why)
from (
  values
    ('{"pricing_model": "graduated", "overage_price_minor": 1}'::jsonb, 'tiers that are missing'),
    ('{"pricing_model": "graduated", "overage_price_minor": 1, "tiers": []}', 'none'),
    ('{"pricing_model": "graduated", "overage_price_minor": 1, "tiers": [{"up_to": 5, "unit_minor": 1}]}', 'an end'),
    ('{"pricing_model": "volume", "overage_price_minor": 1, "tiers": [{"up_to": 5, "unit_minor": 1}, {"up_to": 5, "unit_minor": 1}, {"unit_minor": 1}]}', 'no rise'),
    ('{"pricing_model": "volume", "overage_price_minor": 1, "tiers": [{"unit_minor": 1.5}]}', 'a part of a minor unit'),
    ('{"pricing_model": "volume", "overage_price_minor": 1, "tiers": [{"unit_minor": -1}]}', 'a negative price'),
    ('{"pricing_model": "volume", "tiers": [{"unit_minor": 1}]}', 'not sold'),
    ('{"pricing_model": "package"}', 'a package without a price'),
    ('{"pricing_model": "per_unit", "overage_price_minor": 1, "tiers": [{"unit_minor": 1}]}', 'tiers that nothing reads'),
    ('{"pricing_model": "auction"}', 'another model')
) as v (terms, why);

-- In advance, by quarters and years, and in other currencies -----------------------------------------------------------------------
update public.subscriptions set next_invoice_at = null;
select isnt(
  pg_temp.plan('ahead', '{"base_minor": 310000, "billed_in": "advance", "meters": {"ai_calls": {"overage_price_minor": 100}}}'), null, 'A plan in advance'
);
select isnt(pg_temp.subscribe(12, 'ahead', '2026-01-31 10:00+05:30'), null, 'bought on 31 January');
select pg_temp.use(12, 'ai_calls', 3, '2026-02-03 10:00+05:30');
select is(pg_temp.close('2026-01-31 10:05+05:30'), '0 closed, 1 invoices', 'is billed at once');
select is(pg_temp.close('2026-01-31 10:05+05:30'), '0 closed, 0 invoices', 'once');
select is(pg_temp.close('2026-02-28 00:00+05:30'), '1 closed, 1 invoices', 'and then when a period ends');
select results_eq(
  'select pg_temp.bills(12)', array['advance 2026-01-31 to 2026-02-27: 310000 INR + 55800', 'period 2026-01-31 to 2026-02-27: 310300 INR + 55854'],
  'the first month''s base price, then what it used and the second''s'
);
select results_eq(
  'select pg_temp.lines(12, 2)', array['overage 3 @ 100/1 = 300', 'base 1 @ 310000/1 = 310000 2026-02-28 to 2026-03-30'],
  'with the days that it is for, recomputed from the anchor'
);
update public.subscriptions set cancel_at_period_end = true where organization_id = pg_temp.org(12);
select pg_temp.use(12, 'ai_calls', 1, '2026-03-03 10:00+05:30');
select is(pg_temp.close('2026-03-31 00:00+05:30'), '1 closed, 1 invoices', 'The last month');
select results_eq('select pg_temp.lines(12, 3)', array['overage 1 @ 100/1 = 100'], 'bills what it used, and no month that does not come');
select is(
  (select status::text from public.subscriptions where organization_id = pg_temp.org(12) order by created_at desc limit 1), 'cancelled', 'and it is over'
);

select isnt(pg_temp.subscribe(13, 'ahead', '2026-01-10 10:00+05:30', status => 'trialing'), null, 'Somebody tries it');
select is(pg_temp.close('2026-01-24 10:05+05:30'), '0 closed, 0 invoices', 'The trial ends and its last day goes on');
select is(pg_temp.close('2026-01-25 00:00+05:30'), '1 closed, 1 invoices', 'With it the first month is billed');
select results_eq(
  'select pg_temp.lines(13)', array['base 1 @ 0/1 = 0', 'base 1 @ 310000/1 = 310000 2026-01-25 to 2026-02-24'], 'in advance, and the trial is free'
);

select isnt(pg_temp.plan('terms', '{"base_minor": 91000}', 'quarterly'), null, 'A plan by the quarter');
select isnt(pg_temp.plan('terms', '{"base_minor": 360000}', 'yearly'), null, 'and by the year');
select isnt(pg_temp.subscribe(14, 'terms', '2025-11-30 10:00+05:30', 'quarterly'), null, 'From 30 November');
select isnt(pg_temp.subscribe(15, 'terms', '2024-02-29 10:00+05:30', 'yearly'), null, 'From 29 February');
select is(pg_temp.close('2026-05-30 00:00+05:30') is not null, true, 'Time goes by');
select results_eq(
  'select pg_temp.bills(14)', array['period 2025-11-30 to 2026-02-27: 91000 INR + 16380', 'period 2026-02-28 to 2026-05-29: 91000 INR + 16380'],
  'Quarters, from the anchor'
);
select results_eq(
  'select pg_temp.bills(15)', array['period 2024-02-29 to 2025-02-27: 360000 INR + 64800', 'period 2025-02-28 to 2026-02-27: 360000 INR + 64800'], 'Years'
);

update public.subscriptions set next_invoice_at = null;
select isnt(pg_temp.plan('abroad', '{"base_minor": 4900, "meters": {"call_seconds": {"overage_price_minor": 7, "overage_unit": 60}}}', currency => 'USD'), null, 'Dollars');
select isnt(pg_temp.plan('abroad', '{"base_minor": 5000, "meters": {"call_seconds": {"overage_price_minor": 7, "overage_unit": 60}}}', currency => 'JPY'), null, 'Yen');
select isnt(pg_temp.subscribe(n, 'abroad', '2026-01-01 10:00+05:30'), null, format('%s subscribes', n)) from unnest(array[21, 22]) as n;
select pg_temp.use(n, 'call_seconds', 90, '2026-01-05 10:00+05:30') from unnest(array[21, 22]) as n;
select is(pg_temp.close('2026-02-01 00:00+05:30'), '2 closed, 2 invoices', 'Each is billed in its own');
select results_eq('select pg_temp.bills(21) union all select pg_temp.bills(22)', array[
  'period 2026-01-01 to 2026-01-31: 4911 USD + 0', 'period 2026-01-01 to 2026-01-31: 5011 JPY + 0'
], '90 seconds at 7 a minute are 10.5: 11 cents, 11 yen');
select results_eq(
  $$ select private.decimal_amount(subtotal_minor, currency)::text from public.invoices where organization_id in (pg_temp.org(21), pg_temp.org(22)) order by currency $$,
  array['5011', '49.11'], 'and written with as many decimals as the currency has'
);

-- A line of its own.
select isnt(private.add_invoice_item(pg_temp.org(21), 'Set-up', 2, 'hour', 5000, 'setup', '2026-02-02'), null, 'An operator adds a line');
select is(
  private.add_invoice_item(pg_temp.org(21), 'Set-up', 2, 'hour', 5000, 'setup', '2026-02-02'),
  (select id from private.invoice_items where idempotency_key = 'setup'), 'once a key'
);
select throws_ok(
  $$ select private.add_invoice_item(pg_temp.org(21), 'Set-up', 3, 'hour', 5000, 'setup', '2026-02-02') $$, 'PGRST', null, 'and not another under it'
);
select is(pg_temp.close('2026-03-01 00:00+05:30'), '2 closed, 2 invoices', 'The next invoice');
select results_eq('select pg_temp.lines(21, 2)', array['base 1 @ 4900/1 = 4900', 'item 2 @ 5000/1 = 10000'], 'has it');
select is(pg_temp.close('2026-04-01 00:00+05:30'), '2 closed, 2 invoices', 'and the one after');
select results_eq('select pg_temp.lines(21, 3)', array['base 1 @ 4900/1 = 4900'], 'has not');

select lives_ok('set constraints all immediate', 'Every invoice of this test adds up');
select * from finish();
rollback;
