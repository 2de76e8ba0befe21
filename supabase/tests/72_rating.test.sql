-- Rating: tiers, packages, shares, taxes and periods, by what others publish; and what holds for every price.
begin;
set local search_path = public, extensions, tap;
select plan(118);

create function pg_temp.tiers(variadic text[]) returns private.price_tier[]
language sql as $$ select array_agg(tier::private.price_tier) from unnest($1) as tier $$;

-- Tiers ---------------------------------------------------------------------------------------------------------------------------

create temporary table stairs as
select *
from (
  values
    ('three', pg_temp.tiers('(5,700,0)', '(10,650,0)', '(,600,0)')),
    ('five', pg_temp.tiers('(5,500,0)', '(10,400,0)', '(15,300,0)', '(20,200,0)', '(,100,0)')),
    ('flat', pg_temp.tiers('(5,10,100)', '(,5,50)')),
    ('mixed', pg_temp.tiers('(5,0,100)', '(10,0,50)', '(15,10,0)', '(,5,0)')),
    ('blocks', pg_temp.tiers('(5,2,0)', '(,1,0)')),
    ('steep', pg_temp.tiers('(20,2,0)', '(,20,0)')),
    ('halves', pg_temp.tiers('(10,1.5,0)', '(100,1.0,0)', '(,0.5,0)'))
) as v (name, tiers);

select is(private.rate_volume(tiers, qty), price::bigint, format('%s, volume of %s', name, qty))
from (
  values
    ('three', 1, 700), ('three', 5, 3500), ('three', 6, 3900), ('three', 20, 12000), ('three', 25, 15000), ('five', 6, 2400),
    ('five', 20, 4000), ('five', 25, 2500), ('steep', 120, 2400), ('flat', 5, 150), ('flat', 8, 90), ('flat', 0, 0),
    ('halves', 111, 56)
) as v (name, qty, price)
join stairs using (name);
select is(private.rate_volume(tiers, 0, true), 100::bigint, 'volume of nothing owes the first flat fee where the plan says so')
from stairs
where name = 'flat';
select is(private.rate_graduated(tiers, qty, true), price::bigint, format('%s, graduated price of %s', name, qty))
from (
  values
    ('three', 1, 700), ('three', 5, 3500), ('three', 6, 4150), ('three', 20, 12750), ('three', 25, 15750), ('five', 6, 2900),
    ('five', 20, 7000), ('five', 25, 7500), ('flat', 0, 100), ('flat', 3, 130), ('flat', 8, 215), ('mixed', 0, 100), ('mixed', 5, 100),
    ('mixed', 5.001, 150), ('mixed', 12, 170), ('mixed', 22, 235), ('blocks', 13, 18), ('steep', 120, 2040)
) as v (name, qty, price)
join stairs using (name);
select is(private.rate_graduated(tiers, 0), 0::bigint, 'nothing owes no flat fee where the plan does not say so')
from stairs
where name = 'flat';
select is(
  private.rate_graduated(pg_temp.tiers('(1,0.5,0)', '(,0.5,0)'), 2), 1::bigint,
  'two halves of two tiers are one: rounded once, at the end'
);
select is(
  (select array_agg(part.tier_quantity order by part.tier) from private.graduated_tiers(tiers, 0, 12.5, 1) as part),
  array[5, 5, 2.5, 0]::numeric[], 'how much falls into each tier'
)
from stairs
where name = 'mixed';
select throws_ok(format('select private.rate_graduated(%L, 3)', tiers), '22023', null, why)
from (
  values
    (pg_temp.tiers('(5,1,0)'), 'tiers that end'), (pg_temp.tiers('(,1,0)', '(5,1,0)'), 'a tier behind the last'),
    (pg_temp.tiers('(5,1,0)', '(5,1,0)', '(,1,0)'), 'tiers that do not rise'), (pg_temp.tiers('(,,0)'), 'a tier without a price'),
    ('{}'::private.price_tier[], 'no tier')
) as v (tiers, why);
select throws_ok(format('select private.%s(%L, -1)', f, tiers), '22023', null, f || ' of less than nothing')
from stairs, (values ('rate_graduated'), ('rate_volume')) as v (f)
where name = 'three';

-- Packages ------------------------------------------------------------------------------------------------------------------------

select is(private.rate_package(qty, free, package, price), wanted::bigint, format('%s by %s at %s, %s free', qty, package, price, free))
from (
  values
    (3, 0, 10, 100, 100), (15, 0, 10, 100, 200), (0, 0, 10, 100, 0), (3, 5, 10, 100, 0), (12, 5, 10, 100, 100), (201, 100, 100, 500, 1000),
    (10, 0, 10, 15, 15), (10.001, 0, 10, 15, 30)
) as v (qty, free, package, price, wanted);
select throws_ok('select private.rate_package(3, 0, 0, 100)', '22023', null, 'a package of nothing');

-- What a plan includes, and pulses -------------------------------------------------------------------------------------------------

select results_eq(
  'select * from private.rate_base_and_overage(699900, 90000, 97410, 600, 60, 1800)',
  'values (7410::numeric, 774000::bigint, 139320::bigint, 913320::bigint)', 'Pro with 123 min 30 s beyond its minutes'
);
select results_eq(
  'select * from private.rate_base_and_overage(699900, 90000, 10, 600, 60, 1800)',
  'values (0::numeric, 699900::bigint, 125982::bigint, 825882::bigint)', 'Pro with hardly any'
);
select is(private.rate_beyond_allowance(pg_temp.tiers('(60000,400,0)', '(,300,0)'), used, 60000, 60), lines::bigint[], used || ' s')
from (values (140717, '{400000,103585}'), (100000, '{266667,0}'), (60000, '{0,0}'), (5, '{0,0}')) as v (used, lines);
select is(sum(private.started_units(61, 60)), 14::numeric, 'seven calls by the started minute') from generate_series(1, 7);
select is(private.started_units(7 * 61, 60), 8::numeric, 'the minute started by their sum');
select is(private.started_units(7 * 61, 1), 427::numeric, 'their seconds');
select is(private.started_units(0, 60), 0::numeric, 'nothing starts nothing');

-- Shares --------------------------------------------------------------------------------------------------------------------------

select is(private.prorate(amount, num, den), part::bigint, format('%s × %s / %s', amount, num, den))
from (
  values
    (-1000, 1, 2, -500), (2000, 1, 2, 1000), (10000, 17, 31, 5484), (20000, 17, 31, 10968), (5000, 24, 31, 3871), (1000, 25, 28, 893),
    (118800, 243, 366, 78875),
    (5000000, 17, 31, 2741935), (200000, 26, 29, 179310), (91000, 32, 91, 32000), (-249900, 16, 31, -128981), (699900, 16, 31, 361239),
    (699900, 20, 29, 482690), (699900, 19, 28, 474932), (6718800, 265, 365, 4878033), (1, 1, 2, 1), (-1, 1, 2, -1)
) as v (amount, num, den, part);
select is(private.tax_amount(private.prorate(5000, 24, 31), 2000), 774::bigint, 'tax on what was rounded');
select is(private.tax_amount(private.prorate(-249900, 16, 31) + private.prorate(699900, 16, 31), 1800), 41806::bigint, 'tax on an upgrade');
select is(
  (select count(*) from generate_series(0, 31) as day where private.prorate(699900, day, 31) + private.prorate(-699900, day, 31) <> 0),
  0::bigint, 'a change taken back in the same instant nets to nothing'
);
select throws_ok(format('select private.prorate(1, 1, %s)', den), '22023', null, 'a share of ' || den) from (values (0), (-31)) as v (den);

select is(private.allocate_largest_remainder(total, weights::numeric[]), parts::bigint[], format('%s over %s', total, weights))
from (
  values
    (10000, '{1,1,1}', '{3334,3333,3333}'), (-10000, '{1,1,1}', '{-3334,-3333,-3333}'), (5783, '{2000,3000,2000}', '{1652,2479,1652}'),
    (0, '{3,4}', '{0,0}'), (1, '{0,0.5}', '{0,1}')
) as v (total, weights, parts);
select throws_ok(
  format('select private.allocate_largest_remainder(1, %L)', weights), '22023', null, format('nothing is split over %s', weights)
)
from (values ('{}'), ('{0,0}'), ('{2,-1}'), ('{1,null}')) as v (weights);

-- Taxes, each component alone -----------------------------------------------------------------------------------------------------

select results_eq(
  format('select * from private.gst_amounts(%s, %L, 1800)', net, intra),
  format('values (%s::bigint, %s::bigint, %s::bigint)', cgst, sgst, igst), format('GST of %s, within a state: %s', net, intra)
)
from (
  values
    (249905, true, 22491, 22491, 0), (249905, false, 0, 0, 44983), (239805, true, 21582, 21582, 0), (239805, false, 0, 0, 43165),
    (5, true, 0, 0, 0), (5, false, 0, 0, 1), (774000, true, 69660, 69660, 0)
) as v (net, intra, cgst, sgst, igst);

-- Time ----------------------------------------------------------------------------------------------------------------------------

select is(private.series_month(instant::timestamptz, 'Asia/Kolkata'), month, instant)
from (values ('2026-01-31T18:29:59Z', '202601'), ('2026-01-31T18:30:00Z', '202602'), ('2026-03-31T18:30:00Z', '202604'))
  as v (instant, month);
select is(
  private.hours_in_period(private.local_midnight(starts::date, zone), private.local_midnight(ends::date, zone)), hours::numeric,
  format('%s in %s has %s h', starts, zone, hours)
)
from (
  values
    ('2023-03-01', '2023-04-01', 'America/New_York', 743), ('2023-11-01', '2023-12-01', 'America/New_York', 721),
    ('2023-03-01', '2023-04-01', 'Asia/Kolkata', 744), ('2026-10-25', '2026-10-26', 'Europe/London', 25)
) as v (starts, ends, zone, hours);
select is(
  private.period_boundary(anchor::date, 'monthly', n + 1), boundary::date, format('period %s of %s ends before %s', n, anchor, boundary))
from (
  values
    ('2024-01-31', 0, '2024-02-29'), ('2024-01-31', 1, '2024-03-31'), ('2024-01-31', 2, '2024-04-30'), ('2026-01-30', 0, '2026-02-28'),
    ('2026-01-30', 1, '2026-03-30')
) as v (anchor, n, boundary);

-- Months are the local ones, and an instant at a boundary belongs to the next one: counted as all usage is.
insert into public.organizations (id, name, timezone)
values
  ('00000000-0000-4000-8000-000000000001', 'Kolkata', 'Asia/Kolkata'),
  ('00000000-0000-4000-8000-000000000002', 'New York', 'America/New_York');
select private.count_usage(
  ('00000000-0000-4000-8000-00000000000' || org)::uuid, array_agg('test'::text), array_agg(instant), array_agg('ai_calls'::text),
  array_agg(qty::bigint), array_agg(instant::timestamptz), '2026-06-01')
from (
  values
    (1, '2026-01-31T18:10:00Z', 100), (1, '2026-01-31T18:40:00Z', 7), (1, '2026-02-28T18:30:00Z', 3), (2, '2023-03-01T05:00:00Z', 1),
    (2, '2023-03-12T07:30:00Z', 1), (2, '2023-04-01T03:59:59Z', 1), (2, '2023-04-01T04:00:00Z', 1), (2, '2023-05-01T03:59:59Z', 1),
    (2, '2023-05-01T04:00:00Z', 1)
) as v (org, instant, qty)
group by org;
select is(
  (
    select string_agg(month || ' ' || units, ', ' order by month)
    from (
      select to_char(day, 'YYYY-MM') as month, sum(quantity)::text as units
      from public.usage_days
      where organization_id = ('00000000-0000-4000-8000-00000000000' || org)::uuid
      group by 1
    ) as counted
  ),
  wanted, wanted
)
from (values (1, '2026-01 100, 2026-02 7, 2026-03 3'), (2, '2023-03 3, 2023-04 2, 2023-05 1')) as v (org, wanted);

-- For every price: four hundred by chance, the same ones in every run ----------------------------------------------------------------

select setseed(0.72);
create temporary table chance as
select
  n, own.*, round((random() * 400)::numeric, (n % 4)) as a, round((random() * 400)::numeric, (n % 4)) as b,
  (array[1, 60, 7])[1 + n % 3]::numeric as price_units, n % 2 = 0 as flat_at_zero
from generate_series(1, 400) as n,
  lateral (
    select array_agg(
      (
        case when step < 4 then step * 50 + round((random() * 40)::numeric, (n % 3)) end, round((random() * 900)::numeric, (n % 3)),
        (random() * 300)::bigint
      )::private.price_tier order by step) as tiers
    from generate_series(1, 4) as step
  ) as own;
update chance set a = 0 where n % 10 = 0;
update chance set b = 0 where n % 15 = 0;

select is_empty(
  $$
    select n, a, b from chance
    where private.rate_graduated(tiers, a + b, flat_at_zero, price_units)
      <> private.rate_graduated(tiers, a, flat_at_zero, price_units) + private.rate_graduated_from(tiers, a, b, flat_at_zero, price_units)
  $$,
  'graduated(a + b) = graduated(a) + graduated_from(a, b)'
);
select is_empty(
  $$
    select n, a, b from chance
    where (select sum(part.cost) from private.graduated_tiers(tiers, 0, a + b, price_units) as part)
      <> (select sum(part.cost) from private.graduated_tiers(tiers, 0, a, price_units) as part)
        + (select sum(part.cost) from private.graduated_tiers(tiers, a, b, price_units) as part)
  $$,
  'and the same of the exact costs, before anything is rounded'
);
select is_empty(
  $$
    select n from chance
    where (select sum(part.tier_quantity) from private.graduated_tiers(tiers, a, b, price_units) as part) <> b
  $$,
  'no unit is priced twice, and none is left out'
);
select is_empty(
  $$
    select n from chance, lateral (
      select private.allocate_largest_remainder(((a - b) * 1000)::bigint, array[a, b, n % 7, 1]) as parts
    ) as split
    where (select sum(part) from unnest(parts) as part) <> ((a - b) * 1000)::bigint
      or exists (
        select from unnest(parts, array[a, b, n % 7, 1]) as share (part, weight)
        where abs(part - ((a - b) * 1000)::bigint * weight / (a + b + n % 7 + 1)) >= 1
      )
  $$,
  'parts add up to the whole, and each is its share to less than a unit'
);
select is_empty(
  $$
    select n from chance, lateral (
      select array_agg(private.prorate((a * 1000)::bigint, day, 31) - private.prorate((a * 1000)::bigint, day - 1, 31)) as days
      from generate_series(1, 31) as day
    ) as month
    where (select sum(part) from unnest(days) as part) <> (a * 1000)::bigint
  $$,
  'the days of a month add up to its price'
);

select * from finish();
rollback;
