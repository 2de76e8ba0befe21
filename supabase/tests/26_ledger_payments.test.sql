-- Payments: an invoice is paid by money of exactly what is due, once, whatever a gateway repeats, mixes up or says too late.
begin;
set local search_path = public, extensions, tap;
select plan(72);

insert into private.billing_issuer (legal_name, state_code, country_code, timezone)
values ('Issuer', 'KA', 'IN', 'Asia/Kolkata')
on conflict on constraint billing_issuer_pkey do update
set legal_name = 'Issuer', state_code = 'KA', country_code = 'IN', timezone = 'Asia/Kolkata', payment_terms_days = 15;
insert into public.organizations (id, name, state_code)
values ('00000000-0000-4000-8000-000000000001', 'Near', 'KA'), ('00000000-0000-4000-8000-000000000002', 'Far', 'MH');

-- An open invoice of two lines, 999 and 1000, with 9 % CGST and SGST of 180 each: 2359 in all.
create function pg_temp.bill(n integer, org integer default 1) returns uuid
language plpgsql as $$
declare
  bill uuid := ('00000000-0000-4000-e000-' || lpad(n::text, 12, '0'))::uuid;
  tenant uuid := ('00000000-0000-4000-8000-00000000000' || org)::uuid;
begin
  insert into public.invoices (id, organization_id, currency, period_start, period_end, timezone, first_day, last_day, subtotal_minor,
    tax_minor, total_minor, issuer, customer)
  values (bill, tenant, 'INR', '2026-01-01', '2026-02-01', 'Asia/Kolkata', '2026-01-01', '2026-01-31', 1999, 360, 2359,
    '{"timezone": "Asia/Kolkata"}', '{}');
  insert into public.invoice_lines (id, organization_id, invoice_id, position, kind, description, quantity, unit, unit_price_minor, amount_minor)
  select ('00000000-0000-4000-' || case position when 1 then 'a' else 'b' end || '000-' || lpad(n::text, 12, '0'))::uuid, tenant, bill,
    position, 'base', 'Line ' || position, 1, 'month', 998 + position, 998 + position
  from generate_series(1, 2) as position;
  insert into public.invoice_taxes (organization_id, invoice_id, position, name, rate_bp, taxable_minor, amount_minor)
  values (tenant, bill, 1, 'CGST', 900, 1999, 180), (tenant, bill, 2, 'SGST', 900, 1999, 180);
  update public.invoices set status = 'open', finalized_at = '2026-02-01T00:00Z' where id = bill;
  return bill;
end
$$;
create function pg_temp.invoice(n integer) returns text
language sql as $$
  select format('%s: paid %s, credited %s', status, amount_paid_minor, credited_minor)
  from public.invoices where id = ('00000000-0000-4000-e000-' || lpad(n::text, 12, '0'))::uuid
$$;
create function pg_temp.code(query text) returns text
language plpgsql as $$
begin
  execute query;
  return 'no error';
exception
  when sqlstate 'PGRST' then return sqlerrm::jsonb ->> 'code';
  when others then return sqlstate;
end
$$;
create function pg_temp.pay(payment text, news text, amount bigint default 2359, extra jsonb default '{}', at timestamptz default '2026-02-05T00:00Z')
returns text
language sql as $$
  select private.record_payment(
    jsonb_build_object('v', 1, 'gateway', 'razorpay', 'payment_id', payment, 'status', news, 'amount_minor', amount, 'currency', 'INR') || extra,
    at) ->> 'result'
$$;
create function pg_temp.refund(refund text, payment text, news text, amount bigint) returns text
language sql as $$
  select private.record_refund(
    jsonb_build_object('v', 1, 'gateway', 'razorpay', 'refund_id', refund, 'payment_id', payment, 'status', news, 'amount_minor', amount,
      'currency', 'INR'), '2026-02-09T00:00Z') ->> 'result'
$$;
select pg_temp.bill(n) from generate_series(1, 8) as n;

-- The order is known, the browser never comes back, the gateway repeats itself.
create function pg_temp.open(n integer, gateway_order text) returns jsonb
language sql as $$
  select private.open_payment(jsonb_build_object('v', 1, 'gateway', 'razorpay', 'order_id', gateway_order,
    'invoice_id', '00000000-0000-4000-e000-' || lpad(n::text, 12, '0')), '2026-02-02T00:00Z')
$$;
select is(pg_temp.open(1, 'order_1') - 'payment_id', '{"status": "pending", "amount_minor": 2359, "currency": "INR"}', 'an order asks for what is due');
select is(pg_temp.open(1, 'order_1'), pg_temp.open(1, 'order_1'), 'the same order is the same payment');
select is(pg_temp.code($$ select pg_temp.open(2, 'order_1') $$), 'order_in_use', 'and not another invoice''s');
select is(pg_temp.pay('pay_1', 'authorized', 2359, '{"order_id": "order_1"}'), 'applied', 'its payment is recognised by the order');
select is(pg_temp.invoice(1), 'open: paid 0, credited 0', 'what is only authorized pays nothing');
select is(pg_temp.pay('pay_1', 'captured', 2359, '{"order_id": "order_1"}'), 'applied', 'captured');
select is(pg_temp.invoice(1), 'paid: paid 2359, credited 0', 'the invoice is paid');
select is(pg_temp.pay('pay_1', 'captured', 2359, '{"order_id": "order_1"}'), 'duplicate', 'the same news again')
from generate_series(1, 3);
select is(pg_temp.pay('pay_1', 'failed', 2359, '{"order_id": "order_1"}'), 'ignored', 'a failure after the capture');
select is(pg_temp.pay('pay_1', 'authorized', 2359, '{"order_id": "order_1"}'), 'ignored', 'older news');
select is(pg_temp.invoice(1), 'paid: paid 2359, credited 0', 'change nothing');
select results_eq($$ select topic, count(*) from private.outbox where topic like 'invoice.p%' group by topic $$, $$ values ('invoice.paid', 1::bigint) $$,
  'one thing is told');
select is((select count(*) from public.payments), 1::bigint, 'there is one payment');
select is((select count(*) from public.audit_logs where action = 'payment.captured'), 1::bigint, 'and one line in the audit log');
select is(pg_temp.pay('pay_1', 'captured', 2000, '{"order_id": "order_1"}'), 'conflict', 'the same payment of another amount is not believed');
select is(pg_temp.code($$ select pg_temp.open(1, 'order_x') $$), 'invoice_not_open', 'nothing more is due');

-- Failures, in any order, and a further try on the same order.
select isnt(pg_temp.open(2, 'order_2'), null, 'another invoice''s order');
select is(pg_temp.pay('pay_2', 'failed', 2359, '{"order_id": "order_2", "occurred_at": "2026-02-04T10:00:00Z", "failure": {"code": "BAD"}}'), 'applied',
  'the first try fails');
select is(pg_temp.pay('pay_2', 'authorized', 2359, '{"order_id": "order_2", "occurred_at": "2026-02-04T09:00:00Z"}'), 'ignored', 'what was before is late');
select is(pg_temp.pay('pay_3', 'captured', 2359, '{"order_id": "order_2"}'), 'applied', 'the second try succeeds');
select is(pg_temp.pay('pay_2', 'failed', 2359, '{"order_id": "order_2", "occurred_at": "2026-02-04T10:00:00Z"}'), 'duplicate', 'the first is repeated');
select is(pg_temp.invoice(2), 'paid: paid 2359, credited 0', 'and the invoice stays paid');
select is(pg_temp.pay('pay_2', 'captured', 2359, '{"order_id": "order_2"}'), 'unmatched', 'should it be captured after all, it is too much');
select is((select problem from public.payments where gateway_payment_id = 'pay_2'), 'invoice_not_open', 'and waits for a person');

-- Money that does not fit.
select is(pg_temp.pay('pay_4', 'captured', 2358, '{"invoice_id": "00000000-0000-4000-e000-000000000003"}'), 'unmatched', 'a paisa too little');
select is(pg_temp.pay('pay_5', 'captured', 2359, '{"invoice_id": "00000000-0000-4000-e000-000000000003", "currency": "USD"}'), 'unmatched', 'another currency');
select is(pg_temp.pay('pay_6', 'captured', 9999, '{"invoice_id": "00000000-0000-4000-e000-000000000003"}'), 'unmatched', 'too much');
select is(pg_temp.invoice(3), 'open: paid 0, credited 0', 'none of them pays');
select results_eq($$ select problem, applied_minor from public.payments where invoice_id = '00000000-0000-4000-e000-000000000003' order by gateway_payment_id $$,
  $$ values ('amount_differs', 0::bigint), ('currency_differs', 0), ('amount_differs', 0) $$, 'all of them are kept');
select is((select count(*) from private.outbox where topic = 'payment.unmatched'), 4::bigint, 'and told');
select is(pg_temp.pay('pay_7', 'captured', 2359, '{"invoice_id": "00000000-0000-4000-e000-999999999999"}'), 'orphan', 'an unknown invoice');
select is(pg_temp.pay('pay_7', 'captured'), 'orphan', 'no invoice at all');
select is((select count(*) from public.payments where gateway_payment_id = 'pay_7'), 0::bigint, 'belongs to nobody');
select is(pg_temp.code(format('select private.record_payment(%L, now())', jsonb_build_object('gateway', 'razorpay', 'payment_id', 'p', 'status', 'captured',
  'amount_minor', 1, 'currency', 'INR') || bad)), 'invalid_request', bad::text)
from unnest(array['{"gateway": "paypal"}', '{"status": "paid"}', '{"amount_minor": -1}', '{"amount_minor": 0}', '{"amount_minor": 1.5}',
  '{"amount_minor": "1"}', '{"currency": "RUPEE"}', '{"payment_id": ""}', '{"invoice_id": "1"}', '{"payment_id": "4111 1111 1111 1111"}']::jsonb[]) as bad;

-- Refunds.
select is(pg_temp.refund('rf_0', 'pay_9', 'processed', 1), 'orphan', 'of an unknown payment');
select is(pg_temp.refund('rf_1', 'pay_1', 'pending', 1000), 'applied', 'a refund begins');
select is(pg_temp.refund('rf_1', 'pay_1', 'processed', 1000), 'applied', 'and is done');
select is(pg_temp.refund('rf_1', 'pay_1', 'processed', 1000), 'duplicate', 'once');
select is(pg_temp.refund('rf_1', 'pay_1', 'failed', 1000), 'ignored', 'for good');
select is(pg_temp.refund('rf_2', 'pay_1', 'processed', 1360), 'conflict', 'more than was paid is not believed');
select is(pg_temp.refund('rf_2', 'pay_1', 'processed', 1359), 'applied', 'the rest is');
select results_eq($$ select status::text, refunded_minor from public.payments where gateway_payment_id = 'pay_1' $$, $$ values ('refunded', 2359::bigint) $$,
  'the payment is refunded');
select is(pg_temp.pay('pay_1', 'captured', 2359), 'duplicate', 'and stays so');
select is(pg_temp.invoice(1), 'paid: paid 2359, credited 0', 'the invoice is corrected by a credit note alone');

-- Prepaid credit is bought, and given back.
select isnt(private.open_payment('{"gateway": "razorpay", "order_id": "order_c", "organization_id": "00000000-0000-4000-8000-000000000001", "amount_minor": 500,
  "currency": "INR"}', '2026-02-02T00:00Z'), null, 'credit is ordered');
select is(pg_temp.pay('pay_c', 'captured', 500, '{"order_id": "order_c"}') || ' ' || pg_temp.pay('pay_c', 'captured', 500, '{"order_id": "order_c"}'),
  'applied duplicate', 'and paid, which is told twice');
select is((select balance_minor from public.call_credits), 500::bigint, 'there is credit, once');
select is(private.debit_credit('00000000-0000-4000-8000-000000000001', 'INR', 200, 'd', '2026-02-06T00:00Z'), 200::bigint, 'some is used');
select is(pg_temp.refund('rf_c', 'pay_c', 'processed', 500), 'applied', 'it is paid back');
select results_eq('select balance_minor, total_purchased_minor, total_consumed_minor from public.call_credits', 'values (0::bigint, 200::bigint, 200::bigint)',
  'the credit that was left is gone');

-- What is written stays.
set constraints all immediate;
select throws_ok(statement, '23514', null, statement)
from unnest(array[
  'delete from public.payments', 'delete from public.refunds', 'delete from public.payment_methods',
  'update public.payments set status = ''failed'', captured_at = null where gateway_payment_id = ''pay_3''',
  'update public.payments set applied_minor = 0 where gateway_payment_id = ''pay_3''',
  'update public.payments set amount_minor = 1, applied_minor = 1 where gateway_payment_id = ''pay_3''',
  'update public.payments set applied_minor = amount_minor, problem = null where gateway_payment_id = ''pay_6''',
  'update public.invoices set amount_paid_minor = total_minor, status = ''paid'', paid_at = now() where id = ''00000000-0000-4000-e000-000000000004''',
  'update public.refunds set amount_minor = 1',
  'insert into public.payments (organization_id, purpose, gateway, gateway_payment_id, amount_minor, currency, status_at)
   values (''00000000-0000-4000-8000-000000000001'', ''credit'', ''razorpay'', ''p'', -5, ''INR'', now())'
]) as statement;
select throws_ok(
  $$ insert into public.payments (organization_id, purpose, invoice_id, gateway, gateway_payment_id, amount_minor, currency, status_at)
     values ('00000000-0000-4000-8000-000000000002', 'invoice', '00000000-0000-4000-e000-000000000004', 'razorpay', 'p', 5, 'INR', now()) $$, '23503', null,
  'no payment is for another organization''s invoice');

select * from finish();
rollback;
