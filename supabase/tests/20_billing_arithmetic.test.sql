-- Money and calendar: rounding, tax, periods from the anchor, invoice numbers. Figures are those of tests/vectors/billing.json.
begin;
set local search_path = public, extensions, tap;
select plan(49);

-- Rounding, half away from zero.
select is(private.divide_half_away(a::numeric * b, d), r::bigint, format('%s × %s / %s = %s', a, b, d, r))
from (
  values
    (7410, 600, 60, 74100), (20717, 300, 60, 103585), (40000, 400, 60, 266667), (5000, 24, 31, 3871), (118800, 243, 366, 78875),
    (699900, 20, 29, 482690), (699900, 19, 28, 474932), (-249900, 16, 31, -128981), (699900, 16, 31, 361239),
    (120000, 265, 365, 87123), (-2995, 24, 30, -2396), (2995, 10, 30, 998), (200000, 26, 29, 179310), (900000, 5, 7, 642857),
    (1, 1, 2, 1), (-1, 1, 2, -1), (1, 1, 3, 0), (0, 5, 7, 0)
) as v (a, b, d, r);
select is(
  private.divide_half_away(9007199254740993::numeric * 1000003, 1000003), 9007199254740993,
  'no digit is lost beyond what a float holds'
);

-- GST by component: each is rounded alone.
select is(private.divide_half_away(net::numeric * bp, 10000), tax::bigint, format('%s at %s bp is %s', net, bp, tax))
from (values (249905, 900, 22491), (249905, 1800, 44983), (239805, 900, 21582), (239805, 1800, 43165), (5, 900, 0), (5, 1800, 1))
  as v (net, bp, tax);

-- Periods are computed from the anchor, never from the last boundary.
select is(private.period_boundary(anchor::date, cycle::public.billing_cycle, n), boundary::date, format('%s + %s × %s', anchor, n, cycle))
from (
  values
    ('2024-01-31', 'monthly', 1, '2024-02-29'), ('2024-01-31', 'monthly', 2, '2024-03-31'), ('2024-01-31', 'monthly', 3, '2024-04-30'),
    ('2026-01-30', 'monthly', 1, '2026-02-28'), ('2026-01-30', 'monthly', 2, '2026-03-30'), ('2025-07-31', 'monthly', 2, '2025-09-30'),
    ('2024-02-29', 'yearly', 1, '2025-02-28'), ('2024-02-29', 'yearly', 4, '2028-02-29')
) as v (anchor, cycle, n, boundary);
select is(
  private.local_midnight('2023-04-01', 'America/New_York') - private.local_midnight('2023-03-01', 'America/New_York'),
  interval '743 hours', 'March 2023 has 743 hours in New York'
);

-- The numbers of a month.
select is(private.invoice_number('202601', n), number, format('number %s', n))
from (
  values
    (1, 'INV-202601-00001'), (42, 'INV-202601-00042'), (99999, 'INV-202601-99999'), (100000, 'INA-202601-00000'),
    (199999, 'INA-202601-99999'), (200000, 'INB-202601-00000'), (2199999, 'INU-202601-99999')
) as v (n, number);
select is(private.invoice_number('202601', 2200000), null, 'a month has an end');
select ok(
  length(private.invoice_number('202601', 99999)) = 16 and length(private.invoice_number('202601', 100000)) = 16,
  'never more than the 16 characters of Rule 46'
);

-- Quantities as a line says them.
select is(private.describe_quantity(quantity, unit), text, text)
from (
  values (7410::bigint, 'second', '123 min 30 s'), (59, 'second', '0 min 59 s'), (7, 'call', '7'), (null, 'call', 'unlimited')
) as v (quantity, unit, text);

-- A month, by the issuer's calendar.
select is(to_char(instant::timestamptz at time zone 'Asia/Kolkata', 'YYYYMM'), month, instant)
from (values ('2026-01-31T18:29:59Z', '202601'), ('2026-01-31T18:30:00Z', '202602')) as v (instant, month);

select * from finish();
rollback;
