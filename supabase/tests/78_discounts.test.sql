-- What is taken off an invoice and in which order; credits that are larger than an invoice; why nothing is charged; and who redeems a coupon.
begin;
set local search_path = public, extensions, tap;
select plan(74);

insert into private.billing_issuer (legal_name, state_code, country_code, timezone)
values ('Issuer', 'KA', 'IN', 'Asia/Kolkata')
on conflict on constraint billing_issuer_pkey do update
set legal_name = 'Issuer', gstin = null, state_code = 'KA', country_code = 'IN', timezone = 'Asia/Kolkata', payment_terms_days = 15;
delete from public.tax_rates;
insert into public.tax_rates (country_code, scope, buyer, supplier_country_code, name, rate_bp, position, treatment, note)
values
  ('IN', 'intra_state', 'any', null, 'CGST', 900, 10, 'standard', null),
  ('IN', 'intra_state', 'any', null, 'SGST', 900, 20, 'standard', null),
  ('DE', 'any', 'consumer', null, 'VAT', 1900, 10, 'standard', null),
  ('DE', 'cross_border', 'business', null, 'VAT', 0, 10, 'reverse_charge', 'Reverse charge: the recipient owes the tax.'),
  ('ZZ', 'cross_border', 'any', 'IN', 'IGST', 0, 10, 'zero_rated', 'Export of services under a letter of undertaking.');
update public.subscriptions set next_invoice_at = null, trial_ends_at = 'infinity';

create function pg_temp.org(n integer) returns uuid
language sql as $$ select ('00000000-0000-4000-8000-0000000078' || lpad(n::text, 2, '0'))::uuid $$;
insert into public.organizations (id, name, timezone, country_code, state_code, tax_id)
select
  pg_temp.org(n), 'Discounted ' || n, 'Asia/Kolkata', case when n in (21, 22) then 'DE' when n = 23 then 'US' else 'IN' end,
  case when n < 21 then 'KA' end, case when n = 21 then 'DE123456789' end
from generate_series(1, 23) as n;
insert into auth.users (id, email) select pg_temp.org(n), format('owner%s@discounted.test', n) from generate_series(1, 23) as n;
update public.profiles set organization_id = id, system_role = 'owner' where id in (select pg_temp.org(n) from generate_series(1, 23) as n);

create function pg_temp.at(instant timestamptz) returns void
language sql as $$
  insert into private.clock_offset (shift) values (instant - now()) on conflict (single) do update set shift = excluded.shift
$$;
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
create function pg_temp.plan(slug text, base bigint, billed_in text default 'arrears', meters jsonb default '{}') returns void
language plpgsql as $$
begin
  insert into public.subscription_plans (slug, name) values (slug, initcap(slug));
  perform private.set_plan_price(slug, 'monthly', 'INR', jsonb_build_object('base_minor', base, 'billed_in', billed_in, 'meters', meters), '2026-01-01');
end
$$;
create function pg_temp.subscribe(n integer, slug text, at timestamptz) returns void
language sql as $$ select private.subscribe_organization(pg_temp.org(n), slug, 'active', at, 'monthly') $$;
create function pg_temp.close(at timestamptz) returns integer
language sql as $$ select jsonb_array_length(private.close_periods('{"v": 1}', at) -> 'invoices') $$;
create function pg_temp.bill(n integer, nth integer default 1) returns text
language sql as $$
  select format('%s - %s + %s = %s %s', subtotal_minor, discount_minor, tax_minor, total_minor, status)
  from public.invoices where organization_id = pg_temp.org(n) order by invoice_number offset nth - 1 limit 1
$$;
create function pg_temp.lines(n integer, nth integer default 1) returns text
language sql as $$
  select string_agg(format('%s %s %s', line.kind, line.amount_minor, line.discount_minor), ', ' order by line.position)
  from (
    select id from public.invoices where organization_id = pg_temp.org(n) order by invoice_number offset nth - 1 limit 1
  ) as invoice
  join public.invoice_lines as line on line.invoice_id = invoice.id
  where line.kind <> 'included'
$$;
create function pg_temp.give(n integer, terms jsonb, key text default 'given') returns uuid
language sql as $$ select private.add_discount(pg_temp.org(n), terms, key, private.clock_now()) $$;
select pg_temp.plan('plain', 100000), pg_temp.plan('small', 2000), pg_temp.plan('ahead', 100000, 'advance'), pg_temp.plan('further', 200000, 'advance');
insert into public.meters (key, name, unit) values ('test_notes', 'Notes', 'note');
select pg_temp.plan('metered', 0, 'arrears', '{"test_notes": {"included_units": 0, "overage_price_minor": 10}}');

-- Coupons -------------------------------------------------------------------------------------------------------------------------
select pg_temp.at('2026-02-01 00:00+05:30');
select pg_temp.subscribe(n, 'plain', '2026-02-01 00:00+05:30') from generate_series(1, 7) as n;
select is(private.set_coupon('WELCOME20', '{"name": "Welcome", "percent_bp": 2000, "invoices": 1, "max_redemptions": 2}', private.clock_now()), 'WELCOME20', 'A coupon');
select is(private.set_coupon('WELCOME20', '{"name": "Welcome back", "percent_bp": 2000, "invoices": 1, "max_redemptions": 2}', private.clock_now()), 'WELCOME20', 'is renamed');
select throws_like(
  $$ select private.set_coupon('WELCOME20', '{"name": "Welcome", "percent_bp": 3000, "invoices": 1}', private.clock_now()) $$, '%coupon_in_use%', 'and takes off what it took off'
);
select throws_like(format($$ select private.set_coupon('BAD', %L, private.clock_now()) $$, terms), '%invalid_request%', terms)
from unnest(array['{}', '{"name": "x"}', '{"name": "x", "percent_bp": 0}', '{"name": "x", "percent_bp": 10001}', '{"name": "x", "amount_minor": 5}',
  '{"name": "x", "percent_bp": 5, "amount_minor": 5, "currency": "INR"}', '{"name": "x", "percent_bp": 5, "invoices": 0}', '{"name": "x", "percent_bp": -5}']) as terms;
select private.set_coupon('DOLLARS', '{"name": "Dollars", "amount_minor": 500, "currency": "USD"}', private.clock_now());
select private.set_coupon('OVER', '{"name": "Over", "percent_bp": 500, "valid_from": "2026-01-01", "valid_to": "2026-01-31"}', private.clock_now());
select is(pg_temp.asks(1, $$ public.redeem_coupon('welcome20', 'once') $$) ->> 'result', 'redeemed', 'Whoever manages billing redeems it, however it is written');
select is(pg_temp.asks(1, $$ public.redeem_coupon('welcome20', 'once') $$) ->> 'result', 'redeemed', 'the same request again is answered the same');
select is(pg_temp.asks(1, $$ public.redeem_coupon('WELCOME20') $$), '"coupon_redeemed"', 'a second redemption is none');
select is(pg_temp.asks(2, $$ public.redeem_coupon('WELCOME20') $$) #>> '{discount,invoices_left}', '1', 'Two redeems it');
select is(pg_temp.asks(3, $$ public.redeem_coupon('WELCOME20') $$), '"coupon_exhausted"', 'the third comes too late');
select is(pg_temp.asks(3, $$ public.redeem_coupon('NOTHING') $$), '"coupon_not_found"', 'There is no such coupon');
select is(pg_temp.asks(3, $$ public.redeem_coupon('DOLLARS') $$), '"currency_differs"', 'not of another currency');
select is(pg_temp.asks(3, $$ public.redeem_coupon('OVER') $$), '"coupon_exhausted"', 'not after its end');
select is((select redeemed from private.coupons where code = 'WELCOME20'), 2, 'It was redeemed twice');
select is(pg_temp.asks(1, $$ public.get_org_subscription() $$) #>> '{discounts,0,name}', 'Welcome back', 'and is shown with the subscription');

-- Discount, then tax --------------------------------------------------------------------------------------------------------------
update private.discounts set ended_at = private.clock_now() where organization_id = pg_temp.org(2);
select isnt(pg_temp.give(3, '{"name": "Ten", "percent_bp": 1000, "invoices": 2}', 'ten'), null, 'Three has a tenth off two invoices');
select isnt(pg_temp.give(3, '{"name": "Five", "amount_minor": 500, "currency": "INR"}', 'five'), null, 'and then five rupees for ever');
select is(pg_temp.give(3, '{"name": "Five", "amount_minor": 500, "currency": "INR"}', 'five'), (select id from private.discounts where idempotency_key = 'five'), 'once a key');
select throws_like($$ select pg_temp.give(3, '{"name": "Six", "amount_minor": 600, "currency": "INR"}', 'five') $$, '%idempotency_conflict%', 'and nothing else under it');
select throws_like($$ select pg_temp.give(3, '{"name": "Five", "amount_minor": 500, "currency": "USD"}', 'usd') $$, '%currency_differs%', 'in the currency of the bill');
select isnt(pg_temp.give(4, '{"name": "Free", "percent_bp": 10000, "invoices": 1}'), null, 'Four pays nothing once');
select isnt(pg_temp.give(5, '{"name": "Much", "amount_minor": 250000, "currency": "INR", "invoices": 1}'), null, 'Five has more off than it is charged');
select is((pg_temp.asks(3, 'public.preview_invoice()') ->> 'total_minor')::bigint, 105610::bigint, 'The preview has it: (100,000 - 10,000 - 500) and 18 %');
select pg_temp.at('2026-03-01 00:00+05:30');
create temporary table previewed as select pg_temp.asks(3, 'public.preview_invoice()') as document;
select is(pg_temp.close('2026-03-01 00:00+05:30'), 7, 'March');
select is(pg_temp.bill(1), '100000 - 20000 + 14400 = 94400 open', 'A fifth off, then tax');
select is(pg_temp.bill(2), '100000 - 0 + 18000 = 118000 open', 'What was ended takes off nothing');
select is(pg_temp.bill(3), '100000 - 10500 + 16110 = 105610 open', 'One after the other');
select is(
  (select jsonb_build_object('lines', document -> 'lines', 'taxes', document -> 'taxes', 'discounts', document -> 'discounts') from previewed),
  (select jsonb_build_object('lines', document -> 'lines', 'taxes', document -> 'taxes', 'discounts', document -> 'discounts')
   from private.invoice_document(pg_temp.org(3), (select id from public.invoices where organization_id = pg_temp.org(3))) as document),
  'The preview at that moment is the invoice'
);
select is(pg_temp.bill(4), '100000 - 100000 + 0 = 0 paid', 'Nothing is due, so that it is paid');
select is((select count(*) from private.outbox where organization_id = pg_temp.org(4) and topic = 'invoice.paid'), 1::bigint, 'and told');
select is(pg_temp.bill(5), '100000 - 100000 + 0 = 0 paid', 'No more is taken off than is charged');
select is(pg_temp.close('2026-05-01 00:00+05:30'), 14, 'April and May');
select is(pg_temp.bill(1, 2), '100000 - 0 + 18000 = 118000 open', 'Once is once');
select is(pg_temp.bill(3, 2), '100000 - 10500 + 16110 = 105610 open', 'Two are two');
select is(pg_temp.bill(3, 3), '100000 - 500 + 17910 = 117410 open', 'then what is for ever goes on');
select is(pg_temp.bill(5, 2), '100000 - 0 + 18000 = 118000 open', 'What was larger than its invoice is over');
select is(
  (select string_agg(format('%s %s %s', amount, total, due), ', ')
   from (select row_ ->> 12 as amount, row_ ->> 13 as total, row_ ->> 19 as due
     from jsonb_array_elements(pg_temp.asks(1, $$ public.export_invoices('2026-03-01', '2026-03-31') $$) -> 'rows') as row_) as row_),
  '1000.00 200.00 944.00', 'An export has the discount as a figure of its own'
);

-- Split by the largest remainder.
select pg_temp.at('2026-05-01 00:00+05:30');
select pg_temp.subscribe(8, 'small', '2026-05-01 00:00+05:30');
select private.add_invoice_item(pg_temp.org(8), 'Set-up', 1, 'hour', 3000, 'a', private.clock_now()), private.add_invoice_item(pg_temp.org(8), 'Training', 1, 'hour', 2000, 'b', private.clock_now());
select isnt(pg_temp.give(8, '{"name": "Round", "amount_minor": 5783, "currency": "INR", "invoices": 1}'), null, 'Eight has 5,783 off three lines');
select pg_temp.close('2026-06-01 00:00+05:30');
select is(pg_temp.lines(8), 'base 2000 1652, item 3000 2479, item 2000 1652', 'each its part');
select is(pg_temp.bill(8), '7000 - 5783 + 220 = 1437 open', 'and tax on the rest, each component rounded alone');

-- A credit larger than the invoice ------------------------------------------------------------------------------------------------
update public.subscriptions set next_invoice_at = null where organization_id <> pg_temp.org(6);
insert into private.invoice_items (organization_id, subscription_id, kind, currency, description, unit, unit_price_minor, amount_minor, created_at)
select organization_id, id, 'credit', 'INR', 'Goodwill', 'credit', -250000, -250000, '2026-06-01' from public.subscriptions where organization_id = pg_temp.org(6);
select is(pg_temp.close('2026-09-01 00:00+05:30'), 3, 'Three months');
select is(pg_temp.lines(6, 5), 'base 100000 0, credit -100000 0', 'The first takes as much as it charges');
select is(pg_temp.bill(6, 5), '0 - 0 + 0 = 0 paid', 'so that nothing is due');
select is(pg_temp.bill(6, 6) || ', ' || pg_temp.bill(6, 7), '0 - 0 + 0 = 0 paid, 50000 - 0 + 9000 = 59000 open', 'the second too, the third what is left');
select is((select taken_minor::text || ' ' || (settled_at is not null) from private.invoice_items where description = 'Goodwill'), '-250000 true', 'and that was all of it');
select is((select count(distinct id) from public.invoice_lines where organization_id = pg_temp.org(6) and kind = 'credit'), 3::bigint, 'on three lines');

-- So with what came late: an adjustment larger than the invoice.
create function pg_temp.use(quantity integer, on_time timestamptz, at timestamptz, key text, corrects text default null) returns text
language sql as $$
  select private.record_usage(
    jsonb_build_object('v', 1, 'organization_id', pg_temp.org(12), 'events', jsonb_build_array(jsonb_strip_nulls(jsonb_build_object(
      'id', key, 'source', 'test', 'type', 'test_notes', 'quantity', quantity, 'time', on_time, 'corrects', corrects)))), at) #>> '{results,0,status}'
$$;
select pg_temp.subscribe(12, 'metered', '2026-09-01 00:00+05:30');
select is(pg_temp.use(5, '2026-09-02', '2026-09-02', 'a'), 'stored', 'Five units of 10');
select pg_temp.close('2026-10-01 00:00+05:30');
select is(pg_temp.use(-4, null, '2026-10-02', 'b', 'a') || pg_temp.use(1, '2026-10-02', '2026-10-02', 'c'), 'storedstored', 'of which four were none, and one in the next month');
select pg_temp.close('2026-11-01 00:00+05:30');
select is(pg_temp.use(10, '2026-11-02', '2026-11-02', 'd'), 'stored', 'ten in the third');
select pg_temp.close('2026-12-01 00:00+05:30');
select is(
  concat_ws('; ', pg_temp.lines(12), pg_temp.lines(12, 2), pg_temp.lines(12, 3)),
  'base 0 0, overage 50 0; base 0 0, overage 10 0, adjustment -10 0; base 0 0, credit -30 0, overage 100 0',
  'The adjustment takes what there is, and the rest is a credit'
);
select is(private.close_periods('{"v": 1}', '2026-12-01 00:00+05:30') ->> 'closed', '0', 'and that is all');
select is((select count(*) from private.usage_adjustments where organization_id = pg_temp.org(12) and settled_at is null), 0::bigint, 'Nothing is left to adjust');

-- What was charged with a discount is given back with it --------------------------------------------------------------------------
update public.subscriptions set next_invoice_at = null;
select pg_temp.at('2027-02-01 00:00+05:30');
select pg_temp.subscribe(n, 'ahead', '2027-02-01 00:00+05:30') from generate_series(9, 11) as n;
select pg_temp.give(n, '{"name": "Fifth", "percent_bp": 2000}') from unnest(array[9, 11]) as n;
select pg_temp.give(10, '{"name": "Fifth", "percent_bp": 2000, "invoices": 1}');
select is(pg_temp.close('2027-02-01 00:00+05:30'), 3, 'In advance');
select pg_temp.at('2027-02-15 00:00+05:30');
select pg_temp.asks(n, $$ public.change_subscription('further') $$) from generate_series(9, 10) as n;
select is(pg_temp.lines(9, 2), 'credit -50000 -10000, charge 100000 20000', 'The half that is left comes back less its fifth, and the other plan has its own');
select is(pg_temp.bill(9, 2), '50000 - 10000 + 7200 = 47200 open', 'four fifths of the difference');
select is(pg_temp.bill(10, 2), '50000 - -10000 + 10800 = 70800 open', 'where the discount is over, no more comes back than was paid');
select pg_temp.at('2027-02-14 12:00+05:30');
select is(pg_temp.asks(11, $$ public.cancel_subscription('now') $$) ->> 'credit_minor', '40000', 'Ended, what was paid for the rest comes back');
select is(
  (select private.issue_credit_note(jsonb_build_object('invoice_id', id, 'idempotency_key', 'all', 'reason', 'Goodwill'), '2027-03-01') ->> 'total_minor'
   from public.invoices where organization_id = pg_temp.org(11)), '47200', 'and a credit note of all the rest is of what was paid'
);

-- Why nothing is charged ----------------------------------------------------------------------------------------------------------
update public.subscriptions set next_invoice_at = null;
select pg_temp.subscribe(n, 'plain', '2027-03-01 00:00+05:30') from generate_series(21, 23) as n;
select is(pg_temp.close('2027-04-01 00:00+05:30'), 3, 'Abroad');
create function pg_temp.taxes(n integer) returns text
language sql as $$
  select concat_ws(' ', tax.name, tax.rate_bp, tax.amount_minor, tax.treatment, invoice.customer ->> 'place_of_supply')
  from public.invoices as invoice join public.invoice_taxes as tax on tax.invoice_id = invoice.id where invoice.organization_id = pg_temp.org(n)
$$;
select is(pg_temp.taxes(21), 'VAT 0 0 reverse_charge 96-Other Countries', 'A business owes the tax itself');
select is(pg_temp.taxes(22), 'VAT 1900 19000 standard 96-Other Countries', 'who is none pays it');
select is(pg_temp.taxes(23), 'IGST 0 0 zero_rated 96-Other Countries', 'and what leaves the country is zero-rated');
select is(
  (select note from public.invoice_taxes where organization_id = pg_temp.org(23)), 'Export of services under a letter of undertaking.', 'which the invoice says'
);
select is(
  (private.gstr1(pg_temp.org(23), '2027-04-01', '2027-04-30') -> 'exp') #- '{0,inv,0,inum}',
  '[{"exp_typ": "WOPAY", "inv": [{"idt": "01-04-2027", "val": 1000.00, "itms": [{"txval": 1000.00, "rt": 0.00, "iamt": 0.00, "csamt": 0}]}]}]',
  'and the return has as an export'
);

-- Walls ---------------------------------------------------------------------------------------------------------------------------
create temporary table draft as
select gen_random_uuid() as id, discount from unnest(array[10, 0, 10]) with ordinality as given (discount, n);
insert into public.invoices (id, organization_id, currency, period_start, period_end, timezone, first_day, last_day, subtotal_minor, discount_minor,
  discounts, tax_minor, total_minor, issuer, customer)
select id, pg_temp.org(1), 'INR', '2030-01-01', '2030-02-01', 'Asia/Kolkata', '2030-01-01', '2030-01-31', 100, 10,
  '[{"name": "x", "amount_minor": 10}]', 0, 90, '{"timezone": "Asia/Kolkata"}', '{}' from draft;
insert into public.invoice_lines (organization_id, invoice_id, position, kind, description, quantity, unit, unit_price_minor, amount_minor, discount_minor)
select pg_temp.org(1), id, 1, 'base', 'x', 1, 'x', 100, 100, discount from draft;
select throws_ok(
  format('update public.invoices set status = ''open'' where id = %L', (select id from draft where discount = 0)), '23514', null,
  'An invoice whose lines have not its discount does not become open'
);
select lives_ok(
  format('update public.invoices set status = ''open'' where id = %L', (select id from draft where discount = 10 limit 1)), 'one whose lines have does'
);
update public.invoices set discounts = '[{"name": "x", "amount_minor": 9}]' where id in (select id from draft) and status = 'draft';
select throws_ok(
  format('update public.invoices set status = ''open'' where id = %L', (select d.id from draft as d join public.invoices as i using (id) where d.discount = 10 and i.status = 'draft')),
  '23514', null, 'nor one that names others'
);

-- Two changes of one moment are two.
select pg_temp.at('2027-05-01 00:00+05:30');
create temporary table told as select count(*) as before from private.outbox where topic = 'subscription.changed';
update public.subscriptions set cancel_at_period_end = true where organization_id = pg_temp.org(22);
update public.subscriptions set cancel_at_period_end = false where organization_id = pg_temp.org(22);
select is((select count(*) - max(before) from private.outbox, told where topic = 'subscription.changed'), 2::bigint, 'Two changes within a microsecond are told twice');

select * from finish();
rollback;
