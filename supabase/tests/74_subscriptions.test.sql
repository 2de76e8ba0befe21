-- What is done with a subscription: changed with two lines, cancelled, paused, taken up again; who may; and what is shown beforehand.
begin;
set local search_path = public, extensions, tap;
select plan(136);

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
language sql as $$ select ('00000000-0000-4000-8000-0000000074' || lpad(n::text, 2, '0'))::uuid $$;
insert into public.organizations (id, name, timezone, country_code, state_code)
select pg_temp.org(n), 'Changing ' || n, 'Asia/Kolkata', 'IN', 'KA' from generate_series(1, 30) as n;
insert into auth.users (id, email) select pg_temp.org(n), format('owner%s@changing.test', n) from generate_series(1, 30) as n;
update public.profiles set organization_id = id, system_role = 'owner' where id in (select pg_temp.org(n) from generate_series(1, 29) as n);
update public.profiles set organization_id = pg_temp.org(1), system_role = 'member' where id = pg_temp.org(30);

create function pg_temp.at(instant timestamptz) returns void
language sql as $$
  insert into private.clock_offset (shift) values (instant - now()) on conflict (single) do update set shift = excluded.shift
$$;
-- What a user is answered: fields of the answer, or the error's code.
create function pg_temp.asks(n integer, query text) returns jsonb
language plpgsql as $$
declare
  answer jsonb;
begin
  perform set_config('request.jwt.claims', jsonb_build_object('sub', pg_temp.org(n), 'role', 'authenticated')::text, true);
  perform set_config('role', 'authenticated', true);
  begin
    execute 'select ' || query into answer;
  exception when sqlstate 'PGRST' then
    answer := to_jsonb(sqlerrm::jsonb ->> 'code');
  end;
  perform set_config('role', 'postgres', true);
  perform set_config('request.jwt.claims', '', true);
  return answer;
end
$$;
create function pg_temp.told(answer jsonb) returns text
language sql as $$
  select case jsonb_typeof(answer) when 'string' then answer #>> '{}'
    else concat_ws(' ', answer ->> 'result', answer ->> 'timing', answer ->> 'credit_minor', answer ->> 'charge_minor') end
$$;
create function pg_temp.subscribe(n integer, slug text, at timestamptz, cycle text default 'monthly', status text default 'active') returns uuid
language sql as $$ select private.subscribe_organization(pg_temp.org(n), slug, status::public.subscription_status, at, cycle::public.billing_cycle) $$;
create function pg_temp.use(n integer, meter text, quantity bigint, at timestamptz) returns void
language sql as $$
  select private.count_usage(pg_temp.org(n), array['test'], array[gen_random_uuid()::text], array[meter], array[quantity], array[at], at)
$$;
create function pg_temp.close(at timestamptz) returns text
language sql as $$
  select format('%s closed, %s invoices', answer ->> 'closed', jsonb_array_length(answer -> 'invoices'))
  from private.close_periods('{"v": 1, "limit": 500}', at) as answer
$$;
create function pg_temp.bills(n integer) returns setof text
language sql as $$
  select format('%s %s to %s: %s + %s', kind, first_day, last_day, subtotal_minor, tax_minor)
  from public.invoices where organization_id = pg_temp.org(n) order by invoice_number
$$;
create function pg_temp.lines(n integer, nth integer default 1) returns setof text
language sql as $$
  select format('%s %s%s', line.kind, line.amount_minor, ' ' || line.first_day || ' to ' || line.last_day)
  from (
    select id from public.invoices where organization_id = pg_temp.org(n) order by invoice_number offset nth - 1 limit 1
  ) as invoice
  join public.invoice_lines as line on line.invoice_id = invoice.id
  where line.kind <> 'included'
  order by line.position
$$;
create function pg_temp.now(n integer) returns text
language sql as $$
  select format('%s %s, %s to %s%s', plan.slug, own.status, (own.current_period_start at time zone own.timezone)::date,
    (own.current_period_end at time zone own.timezone)::date, case when own.cancel_at_period_end then ', the last' else '' end)
  from public.subscriptions as own
  join public.subscription_plans as plan on plan.id = own.plan_id
  where own.organization_id = pg_temp.org(n)
  order by own.status = 'cancelled', own.created_at desc
  limit 1
$$;
create function pg_temp.events(n integer) returns text
language sql as $$
  select string_agg(topic || coalesce(':' || (payload ->> 'status'), ''), ' ' order by sequence)
  from private.outbox where organization_id = pg_temp.org(n) and topic like 'subscription.%'
$$;

insert into public.subscription_plans (slug, name, is_public)
values ('starter', 'Starter', true), ('grown', 'Grown', true), ('early', 'Early', true), ('later', 'Later', true), ('nothing', 'Nothing', true),
  ('bespoke', 'Bespoke', false), ('bound', 'Bound', true);
select isnt(private.set_plan_price(slug, cycle::public.billing_cycle, 'INR', terms::jsonb, '2025-01-01'), null, format('%s %s', slug, cycle))
from (
  values
    ('nothing', 'monthly', '{"meters": {"ai_calls": {"included_units": 50, "limit_units": 50, "hard": true}}}'),
    ('starter', 'monthly', '{"base_minor": 249900, "meters": {"call_seconds": {"included_units": 3600, "overage_price_minor": 600, "overage_unit": 60}}}'),
    ('grown', 'monthly', '{"base_minor": 699900, "meters": {"call_seconds": {"included_units": 90000, "overage_price_minor": 600, "overage_unit": 60}}}'),
    ('grown', 'yearly', '{"base_minor": 6718800}'),
    ('early', 'monthly', '{"base_minor": 249900, "billed_in": "advance", "meters": {"call_seconds": {"included_units": 0, "overage_price_minor": 600, "overage_unit": 60}}}'),
    ('later', 'monthly', '{"base_minor": 699900, "billed_in": "advance", "meters": {"call_seconds": {"included_units": 0, "overage_price_minor": 600, "overage_unit": 60}}}'),
    ('bespoke', 'monthly', '{"base_minor": 1}'),
    ('bound', 'monthly', '{"base_minor": 0, "minimum_minor": 1000, "meters": {"ai_calls": {"overage_price_minor": 100}}}')
) as v (slug, cycle, terms);

-- Up, now: two lines ---------------------------------------------------------------------------------------------------------------
select isnt(pg_temp.subscribe(1, 'starter', '2026-01-01 00:00+05:30'), null, 'One begins on Starter');
select pg_temp.at('2026-01-16 00:00+05:30');
create temporary table before as select * from public.subscriptions;
create temporary table shown as
select pg_temp.asks(1, $$ public.preview_subscription_change('grown') $$) as document;
select is(pg_temp.told(document -> 'change'), 'changed now -128981 361239', 'What a change would be is shown') from shown;
select is_empty(
  $$ select * from before except select * from public.subscriptions $$, 'and nothing of it stays'
);
select is_empty($$ select from private.invoice_items where organization_id = pg_temp.org(1) $$, 'not a line');
select is(
  pg_temp.told(pg_temp.asks(1, $$ public.change_subscription('grown') $$)), 'changed now -128981 361239',
  '16 of 31 days are left: 2,499.00 less, 6,999.00 more'
);
select is(pg_temp.now(1), 'grown active, 2026-01-01 to 2026-02-01', 'it holds at once, in the same period');
select is(pg_temp.told(pg_temp.asks(1, $$ public.change_subscription('grown') $$)), 'unchanged now 0 0', 'Asked twice is once');
select is(pg_temp.close('2026-02-01 00:00+05:30'), '1 closed, 1 invoices', 'The month');
select results_eq(
  'select pg_temp.lines(1)',
  array['base 249900 2026-01-01 to 2026-01-31', 'credit -128981 2026-01-16 to 2026-01-31', 'charge 361239 2026-01-16 to 2026-01-31'],
  'has the original line, what of it is given back, and what is charged instead'
);
select results_eq('select pg_temp.bills(1)', array['period 2026-01-01 to 2026-01-31: 482158 + 86788'], 'and one tax on all');
select is(
  (select jsonb_agg(line -> 'amount_minor' order by line -> 'position') from shown, jsonb_array_elements(document -> 'lines') as line where line ->> 'kind' <> 'included'),
  (select jsonb_agg(line.amount_minor order by line.position) from public.invoice_lines as line where organization_id = pg_temp.org(1) and kind <> 'included'),
  'as it was shown'
);
select is(pg_temp.close('2026-03-01 00:00+05:30'), '1 closed, 1 invoices', 'The next month');
select results_eq('select pg_temp.lines(1, 2)', array['base 699900'], 'is a whole one');

-- There and back in the same instant.
select isnt(pg_temp.subscribe(2, 'starter', '2026-01-01 00:00+05:30'), null, 'Two begins on Starter');
select pg_temp.at('2026-01-10 12:34:56.7+05:30');
select is(pg_temp.told(pg_temp.asks(2, $$ public.change_subscription('grown', timing => 'now') $$)), 'changed now -173122 484867', 'There');
select is(pg_temp.told(pg_temp.asks(2, $$ public.change_subscription('starter', timing => 'now') $$)), 'changed now -484867 173122', 'and back');
select is(pg_temp.close('2026-02-01 00:00+05:30'), '1 closed, 1 invoices', 'is billed');
select results_eq('select pg_temp.bills(2)', array['period 2026-01-01 to 2026-01-31: 249900 + 44982'], 'as if nothing had been');

-- Twice in a period: the second is derived from the first's line.
select isnt(pg_temp.subscribe(3, 'nothing', '2026-01-01 00:00+05:30'), null, 'Three begins for nothing');
select pg_temp.at('2026-01-01 10:00+05:30');
select is(pg_temp.told(pg_temp.asks(3, $$ public.change_subscription('starter') $$)), 'changed now 0 0', 'and buys at once');
select is(pg_temp.now(3), 'starter active, 2026-01-01 to 2026-02-01', 'with a period of its own');
select pg_temp.at('2026-01-16 00:00+05:30');
select is(pg_temp.told(pg_temp.asks(3, $$ public.change_subscription('grown') $$)), 'changed now -128981 361239', 'then more');
select pg_temp.at('2026-01-24 00:00+05:30');
select is(pg_temp.told(pg_temp.asks(3, $$ public.change_subscription('starter', timing => 'now') $$)), 'changed now -180620 64490', 'then less: half of that line');
select is(pg_temp.close('2026-02-01 00:00+05:30'), '1 closed, 1 invoices', 'It is billed');
select results_eq('select pg_temp.bills(3)', array['period 2026-01-01 to 2026-01-31: 366028 + 65886'], '249,900 − 128,981 + 361,239 − 180,620 + 64,490');

-- Down, at the period's end -------------------------------------------------------------------------------------------------------
update public.subscriptions set next_invoice_at = null;
select isnt(pg_temp.subscribe(4, 'grown', '2026-01-31 00:00+05:30'), null, 'Four begins on Grown, on 31 January');
select pg_temp.at('2026-02-05 00:00+05:30');
select is(pg_temp.told(pg_temp.asks(4, $$ public.change_subscription('starter') $$)), 'scheduled period_end 0 0', 'Less comes when the period ends');
select is(pg_temp.now(4), 'grown active, 2026-01-31 to 2026-02-28', 'until then it is as it was');
select is(pg_temp.asks(4, $$ public.get_org_subscription() $$) ->> 'next_plan', 'starter', 'and one sees what comes');
select is(pg_temp.told(pg_temp.asks(4, $$ public.change_subscription('grown') $$)), 'unchanged now 0 0', 'It is taken back');
select is(pg_temp.asks(4, $$ public.get_org_subscription() $$) ->> 'next_plan', null, 'then nothing comes');
select is(pg_temp.told(pg_temp.asks(4, $$ public.change_subscription('starter') $$)), 'scheduled period_end 0 0', 'and asked for again');
select is(pg_temp.close('2026-03-31 00:00+05:30'), '2 closed, 2 invoices', 'Two periods');
select results_eq(
  'select pg_temp.bills(4)', array['period 2026-01-31 to 2026-02-27: 699900 + 125982', 'period 2026-02-28 to 2026-03-30: 249900 + 44982'],
  'one at the old price and one at the new, each from the anchor'
);
-- Another cycle.
select pg_temp.at('2026-04-02 00:00+05:30');
select is(pg_temp.told(pg_temp.asks(4, $$ public.change_subscription('grown', 'yearly') $$)), 'scheduled period_end 0 0', 'A year begins when the month is over');
select is(pg_temp.told(pg_temp.asks(4, $$ public.change_subscription('grown', 'yearly', 'now') $$)), 'billing_cycle_differs', 'and not within it');
select is(pg_temp.close('2026-04-30 00:00+05:30'), '1 closed, 1 invoices', 'Then');
select is(pg_temp.now(4), 'grown past_due, 2026-04-30 to 2027-04-30', 'it does, though the last invoices are overdue by now');

-- In advance ----------------------------------------------------------------------------------------------------------------------
update public.subscriptions set next_invoice_at = null;
select isnt(pg_temp.subscribe(5, 'early', '2026-01-01 00:00+05:30'), null, 'Five pays in advance');
select is(pg_temp.close('2026-01-01 00:00+05:30'), '0 closed, 1 invoices', 'and is billed');
select pg_temp.at('2026-01-16 00:00+05:30');
create temporary table ahead as
select pg_temp.asks(5, $$ public.preview_subscription_change('later') $$) as document;
select is((select count(*) from public.invoices where organization_id = pg_temp.org(5)), 1::bigint, 'A preview makes no invoice');
select is((select max(last_number) from private.invoice_series where month = '202601'), (
  select max(right(invoice_number, 5)::integer) from public.invoices where invoice_number like 'INV-202601-%'
), 'and takes no number');
select is(pg_temp.told(pg_temp.asks(5, $$ public.change_subscription('later') $$)), 'changed now -128981 361239', 'More, now');
select results_eq(
  'select pg_temp.bills(5)', array['advance 2026-01-01 to 2026-01-31: 249900 + 44982', 'change 2026-01-16 to 2026-01-31: 232258 + 41806'],
  'The difference is billed at once, 232,258 and 41,806 of tax'
);
select results_eq(
  'select pg_temp.lines(5, 2)', array['credit -128981 2026-01-16 to 2026-01-31', 'charge 361239 2026-01-16 to 2026-01-31'], 'in two lines'
);
select is(
  (select array[(document ->> 'subtotal_minor')::bigint, (document ->> 'tax_minor')::bigint, (document ->> 'total_minor')::bigint] from ahead),
  array[232258, 41806, 274064]::bigint[], 'as it was shown'
);
select is((select document ->> 'invoice_number' from ahead), null, 'without a number');
select is(pg_temp.told(pg_temp.asks(5, $$ public.change_subscription('early', timing => 'now') $$)), 'downgrade_waits', 'What is paid is used up');
select is(pg_temp.told(pg_temp.asks(5, $$ public.change_subscription('early') $$)), 'scheduled period_end 0 0', 'before there is less');
select is(pg_temp.close('2026-02-01 00:00+05:30'), '1 closed, 1 invoices', 'When the month ends');
select results_eq('select pg_temp.lines(5, 3)', array['base 249900 2026-02-01 to 2026-02-28'], 'the next one costs less');
select pg_temp.at('2026-02-10 09:00+05:30');
select is(
  pg_temp.asks(5, $$ public.cancel_subscription('now', 'moving house') $$) - 'ends_at', '{"result": "cancelled", "credit_minor": 160650}',
  'Cancelled on the tenth: 18 of 28 days are given back'
);
select results_eq(
  $$ select note.subtotal_minor, note.tax_minor, line.amount_minor, billed.amount_minor
     from public.credit_notes as note
     join public.credit_note_lines as line on line.credit_note_id = note.id
     join public.invoice_lines as billed on billed.id = line.invoice_line_id
     where note.organization_id = pg_temp.org(5) $$,
  $$ values (160650::bigint, 28918::bigint, 160650::bigint, 249900::bigint) $$, 'by a credit note against the very line that charged them'
);
select pg_temp.use(5, 'call_seconds', 60, '2026-02-10 12:00+05:30');
select is(pg_temp.close('2026-02-11 00:00+05:30'), '1 closed, 1 invoices', 'What was used until then');
select results_eq('select pg_temp.lines(5, 4)', array['overage 600'], 'is billed');

-- Ended now, in arrears -----------------------------------------------------------------------------------------------------------
update public.subscriptions set next_invoice_at = null;
select isnt(pg_temp.subscribe(6, 'bound', '2026-02-01 00:00+05:30'), null, 'Six has a minimum of 1,000');
select isnt(pg_temp.subscribe(7, 'grown', '2026-02-01 00:00+05:30'), null, 'Seven has not');
select pg_temp.use(6, 'ai_calls', 8, '2026-02-03 10:00+05:30');
select pg_temp.at('2026-02-25 15:00+05:30');
select is(pg_temp.asks(n, $$ public.cancel_subscription('now') $$) ->> 'result', 'cancelled', format('%s cancels on the 25th', n)) from generate_series(6, 7) as n;
select is(pg_temp.now(7), 'grown cancelled, 2026-02-01 to 2026-02-26, the last', 'The day that has begun is the last');
select is(pg_temp.asks(7, $$ public.get_org_subscription() $$), null, 'nothing is live any more');
select is(private.reserve_usage(pg_temp.org(7), 'ai_calls', 1, '2026-02-25 15:01+05:30'), false, 'and nobody is called');
select is(pg_temp.close('2026-02-26 00:00+05:30'), '2 closed, 2 invoices', 'They are billed');
select results_eq('select pg_temp.lines(6)', array['base 0', 'overage 800', 'commitment 93'], '25 of 28 days of the minimum, less 800');
select results_eq('select pg_temp.lines(7)', array['base 624911'], '25 of 28 days of the base price');
select is(pg_temp.close('2026-06-01 00:00+05:30'), '0 closed, 0 invoices', 'and never again');
select pg_temp.at('2026-02-25 18:00+05:30');
select isnt(pg_temp.subscribe(8, 'grown', '2026-02-01 00:00+05:30'), null, 'Eight');
select is(pg_temp.asks(8, $$ public.cancel_subscription('now') $$) ->> 'result', 'cancelled', 'cancels');
select is(pg_temp.asks(8, $$ public.resume_subscription() $$) ->> 'result', 'reactivated', 'and regrets it within the day');
select is(pg_temp.now(8), 'grown active, 2026-02-26 to 2026-03-26', 'A new one begins when the old one''s last day is over');
select is(pg_temp.close('2026-03-26 00:00+05:30'), '2 closed, 2 invoices', 'and both');
select results_eq(
  'select pg_temp.bills(8)', array['period 2026-02-01 to 2026-02-25: 624911 + 112484', 'period 2026-02-26 to 2026-03-25: 699900 + 125982'], 'are billed, no day twice'
);

-- At the period's end, and taken back.
select isnt(pg_temp.subscribe(9, 'grown', '2026-03-01 00:00+05:30'), null, 'Nine');
select pg_temp.at('2026-03-05 00:00+05:30');
select is(pg_temp.asks(9, $$ public.cancel_subscription() $$) ->> 'result', 'cancelling', 'cancels');
select is(pg_temp.now(9), 'grown active, 2026-03-01 to 2026-04-01, the last', 'has the month');
select pg_temp.at('2026-03-05 00:01+05:30');
select is(pg_temp.asks(9, $$ public.resume_subscription() $$) ->> 'result', 'resumed', 'takes it back');
select is(pg_temp.asks(9, $$ public.resume_subscription() $$) ->> 'result', 'unchanged', 'once');
select is(pg_temp.now(9), 'grown active, 2026-03-01 to 2026-04-01', 'and goes on');
select pg_temp.at('2026-03-05 00:02+05:30');
select is(pg_temp.asks(9, $$ public.cancel_subscription('period_end') $$) ->> 'result', 'cancelling', 'cancels again');
update public.subscriptions set next_invoice_at = null where organization_id <> pg_temp.org(9);
select is(pg_temp.close('2026-04-01 00:00+05:30'), '1 closed, 1 invoices', 'The month is billed');
select is(pg_temp.now(9), 'grown cancelled, 2026-03-01 to 2026-04-01, the last', 'and it is over');
select is(
  pg_temp.events(9),
  'subscription.created:active subscription.changed:active subscription.changed:active subscription.changed:active subscription.cancelled:cancelled',
  'Each is told'
);

-- Paused --------------------------------------------------------------------------------------------------------------------------
update public.subscriptions set next_invoice_at = null;
select isnt(pg_temp.subscribe(10, 'grown', '2026-01-31 00:00+05:30'), null, 'Ten');
select pg_temp.at('2026-02-10 00:00+05:30');
select is(pg_temp.asks(10, $$ public.pause_subscription() $$) ->> 'result', 'paused', 'pauses');
select is(pg_temp.asks(10, $$ public.pause_subscription() $$) ->> 'result', 'unchanged', 'once');
select is(private.reserve_usage(pg_temp.org(10), 'ai_calls', 1, '2026-02-10 10:00+05:30'), false, 'Nobody is called');
select is(pg_temp.told(pg_temp.asks(10, $$ public.change_subscription('starter') $$)), 'subscription_paused', 'nothing is changed');
select is(pg_temp.close('2026-02-28 00:00+05:30'), '1 closed, 1 invoices', 'The month that had begun is billed');
select is(pg_temp.close('2026-06-28 00:00+05:30'), '0 closed, 0 invoices', 'those that follow are not');
select pg_temp.at('2026-06-20 15:00+05:30');
select is(pg_temp.asks(10, $$ public.resume_subscription() $$) ->> 'result', 'resumed', 'Ten comes back on 20 June');
select is(pg_temp.now(10), 'grown active, 2026-06-20 to 2026-06-30', 'in the period of the anchor, from that day on');
select is(pg_temp.close('2026-07-31 00:00+05:30'), '2 closed, 2 invoices', 'It is billed');
select results_eq(
  'select pg_temp.bills(10)',
  array['period 2026-01-31 to 2026-02-27: 699900 + 125982', 'period 2026-06-20 to 2026-06-29: 233300 + 41994', 'period 2026-06-30 to 2026-07-30: 699900 + 125982'],
  'ten of 30 days, then whole months from the anchor'
);
select isnt(pg_temp.subscribe(11, 'early', '2026-07-01 00:00+05:30'), null, 'Eleven pays in advance');
update public.subscriptions set next_invoice_at = null where organization_id <> pg_temp.org(11);
select pg_temp.at('2026-07-01 10:00+05:30');
select is(pg_temp.asks(11, $$ public.pause_subscription() $$) ->> 'result', 'paused', 'pauses on the first day');
select is(pg_temp.close('2026-08-01 00:00+05:30'), '1 closed, 0 invoices', 'Nothing is billed of a month that does not come');
select pg_temp.at('2026-08-17 00:00+05:30');
select is(pg_temp.asks(11, $$ public.resume_subscription() $$) ->> 'result', 'resumed', 'Eleven comes back');
select is(pg_temp.close('2026-08-17 00:01+05:30'), '0 closed, 1 invoices', 'and is billed at once');
select results_eq(
  'select pg_temp.bills(11)', array['advance 2026-07-01 to 2026-07-31: 249900 + 44982', 'advance 2026-08-17 to 2026-08-31: 120919 + 21766'], '15 of 31 days'
);
select is(pg_temp.asks(11, $$ public.pause_subscription() $$) ->> 'result', 'paused', 'pauses');
select is(pg_temp.asks(11, $$ public.resume_subscription() $$) ->> 'result', 'resumed', 'and is back before the period is over');
select is(pg_temp.now(11), 'early active, 2026-08-17 to 2026-09-01', 'in the same one');

-- On trial ------------------------------------------------------------------------------------------------------------------------
select isnt(pg_temp.subscribe(12, 'starter', '2026-01-01 00:00+05:30', status => 'trialing'), null, 'Twelve tries Starter');
update public.subscriptions set next_invoice_at = null where organization_id <> pg_temp.org(12);
select pg_temp.at('2026-01-05 00:00+05:30');
select is(pg_temp.told(pg_temp.asks(12, $$ public.change_subscription('grown') $$)), 'changed now 0 0', 'and then Grown, for nothing');
select is(pg_temp.now(12), 'grown trialing, 2026-01-01 to 2026-01-15', 'for as long as it was');
select is(pg_temp.close('2026-02-15 00:00+05:30'), '2 closed, 1 invoices', 'Then it is billed');
select results_eq('select pg_temp.bills(12)', array['period 2026-01-15 to 2026-02-14: 699900 + 125982'], 'a whole month');

-- Under a key: what comes again, late, does nothing.
select pg_temp.at('2026-02-16 00:00+05:30');
select is(pg_temp.asks(12, $$ public.cancel_subscription(idempotency_key => 'once') $$) ->> 'result', 'cancelling', 'Cancelled under a key');
select is(pg_temp.asks(12, $$ public.resume_subscription() $$) ->> 'result', 'resumed', 'and taken back');
select is(pg_temp.asks(12, $$ public.cancel_subscription(idempotency_key => 'once') $$) ->> 'result', 'cancelling', 'When the first comes again it is answered as it was');
select is(pg_temp.now(12), 'grown active, 2026-02-15 to 2026-03-15', 'and does nothing');
select is(pg_temp.told(pg_temp.asks(12, $$ public.pause_subscription('once') $$)), 'idempotency_conflict', 'Something else is not asked under it');
select is(pg_temp.told(pg_temp.asks(12, $$ public.pause_subscription('') $$)), 'invalid_request', 'nor under none');
select is(pg_temp.told(pg_temp.asks(11, $$ public.pause_subscription('once') $$)), 'paused', 'and another''s key is another');
select pg_temp.at('2026-03-18 00:01+05:30');
select is(pg_temp.asks(12, $$ public.cancel_subscription(idempotency_key => 'later') $$) ->> 'result', 'cancelling', 'After thirty days');
select is((select count(*) from private.billing_requests where organization_id = pg_temp.org(12)), 1::bigint, 'it is forgotten');

-- Who may, and what is refused ----------------------------------------------------------------------------------------------------
select is(pg_temp.told(pg_temp.asks(30, query)), 'permission_denied', format('A member may not: %s', query))
from unnest(array[
  $$ public.change_subscription('starter') $$, 'public.cancel_subscription()', 'public.pause_subscription()', 'public.resume_subscription()'
]) as query;
select is(pg_temp.told(pg_temp.asks(1, $$ public.change_subscription('bespoke') $$)), 'plan_not_on_sale', 'Another''s plan is not for sale');
select is(pg_temp.told(pg_temp.asks(1, $$ public.change_subscription('no-such') $$)), 'plan_not_on_sale', 'nor is none');
select is(pg_temp.told(pg_temp.asks(1, $$ public.change_subscription('grown', 'weekly') $$)), 'invalid_request', 'There is no such cycle');
select is(pg_temp.told(pg_temp.asks(1, $$ public.change_subscription('grown', timing => 'tomorrow') $$)), 'invalid_request', 'no such time');
select is(pg_temp.told(pg_temp.asks(29, $$ public.cancel_subscription() $$)), 'subscription_inactive', 'and nothing to cancel');
select is(pg_temp.told(pg_temp.asks(29, $$ public.pause_subscription() $$)), 'subscription_not_active', 'to pause');
select is(pg_temp.told(pg_temp.asks(29, $$ public.resume_subscription() $$)), 'subscription_inactive', 'or to take up');

select lives_ok('set constraints all immediate', 'Every invoice of this test adds up');
select * from finish();
rollback;
