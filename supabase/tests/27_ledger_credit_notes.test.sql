-- Credit notes: numbered without gaps in a series of their own, and never more than was billed, line by line and tax by tax.
begin;
set local search_path = public, extensions, tap;
select plan(46);

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
create function pg_temp.issue(n integer, key text, lines text default null, at timestamptz default '2026-03-31T18:29:59Z') returns jsonb
language sql as $$
  select private.issue_credit_note(
    jsonb_strip_nulls(jsonb_build_object('v', 1, 'invoice_id', '00000000-0000-4000-e000-' || lpad(n::text, 12, '0'), 'idempotency_key', key,
      'reason', 'Agreed', 'lines', (
        select jsonb_agg(jsonb_build_object('invoice_line_id', '00000000-0000-4000-' || split_part(line.value, ' ', 1) || '000-' || lpad(n::text, 12, '0'),
          'amount_minor', split_part(line.value, ' ', 2)::bigint) order by line.position)
        from unnest(string_to_array(lines, ', ')) with ordinality as line (value, position)))), at)
$$;
select pg_temp.bill(n) from generate_series(1, 6) as n;

-- In pieces, to the unit.
select is(pg_temp.issue(1, 'k1', 'a 333') - 'id', '{"result": "issued", "number": "CRN-202603-00001", "total_minor": 393, "currency": "INR"}', 'a part of a line');
select is(pg_temp.issue(1, 'k1', 'a 333') ->> 'result', 'duplicate', 'once a key');
select is(pg_temp.code($$ select pg_temp.issue(1, 'k1', 'a 334') $$), 'idempotency_conflict', 'another under the same key is refused');
select is(pg_temp.code($$ select pg_temp.issue(2, 'k1') $$), 'idempotency_conflict', 'also of another invoice');
select is(pg_temp.code(statement), expected, statement)
from (
  values
    ($$ select pg_temp.issue(1, 'k2', 'a 667') $$, 'credit_too_large'),
    ($$ select pg_temp.issue(1, 'k2', 'a 1, a 1') $$, 'credit_too_large'),
    ($$ select pg_temp.issue(1, 'k2', 'c 1') $$, 'credit_too_large'),
    ($$ select pg_temp.issue(1, 'k2', 'a 0') $$, 'invalid_request'),
    ($$ select pg_temp.issue(1, 'k2', 'a -5') $$, 'invalid_request'),
    ($$ select pg_temp.issue(1, '') $$, 'invalid_request'),
    ($$ select pg_temp.issue(9, 'k2') $$, 'invoice_not_found')
) as refused (statement, expected);
select is(pg_temp.issue(1, 'k2', 'a 1, b 332') ->> 'total_minor', '393', 'a part of two lines');
select is(pg_temp.invoice(1), 'open: paid 0, credited 786', 'both are counted on the invoice');
select is(pg_temp.issue(1, 'k3') ->> 'total_minor', '1573', 'and then all that is left');
select is(pg_temp.invoice(1), 'paid: paid 0, credited 2359', 'nothing is due any more');
select is(pg_temp.code($$ select pg_temp.issue(1, 'k4') $$), 'credit_too_large', 'nor to be credited');
select results_eq(
  $$ select tax.name, sum(tax.amount_minor)::bigint from public.credit_note_taxes as tax group by tax.name order by 1 $$,
  $$ values ('CGST', 180::bigint), ('SGST', 180) $$, 'the taxes of the pieces are the taxes of the invoice');
select results_eq(
  'select credit_note_number, subtotal_minor, tax_minor, credit_note_date from public.credit_notes order by 1',
  $$ values ('CRN-202603-00001', 333::bigint, 60::bigint, '2026-03-31'::date), ('CRN-202603-00002', 333, 60, '2026-03-31'),
    ('CRN-202603-00003', 1333, 240, '2026-03-31') $$, 'numbered in order, without a gap for those that were refused');
select is(pg_temp.issue(2, 'k5', null, '2026-03-31T18:30Z') ->> 'number', 'CRN-202604-00001', 'the next month begins at the issuer''s midnight');
select is((select count(*) from private.outbox where topic = 'credit_note.issued'), 4::bigint, 'each is told');
select is((select count(*) from public.audit_logs where action = 'credit_note.issued'), 4::bigint, 'and in the audit log');

-- Paid, partly credited, void.
create function pg_temp.pay(n integer, amount bigint) returns text
language sql as $$
  select private.record_payment(jsonb_build_object('gateway', 'stripe', 'payment_id', 'pi_' || n || '_' || amount, 'status', 'captured', 'amount_minor', amount,
    'currency', 'INR', 'invoice_id', '00000000-0000-4000-e000-' || lpad(n::text, 12, '0')), '2026-03-01T00:00Z') ->> 'result'
$$;
select is(pg_temp.pay(3, 2359), 'applied', 'an invoice is paid');
select is(pg_temp.issue(3, 'k6', 'a 999') ->> 'total_minor', '1179', 'and then credited in part');
select is(pg_temp.invoice(3), 'paid: paid 2359, credited 1179', 'what was paid too much is to be refunded');
select is(pg_temp.issue(4, 'k7', 'a 999') ->> 'total_minor', '1179', 'another is credited before it is paid');
select is(pg_temp.pay(4, 2359), 'unmatched', 'its total is too much then');
select is(pg_temp.pay(4, 1180), 'applied', 'the rest is what was due');
select is(pg_temp.invoice(4), 'paid: paid 1180, credited 1179', 'and it is paid');
select throws_ok($$ update public.invoices set status = 'void' where id = '00000000-0000-4000-e000-000000000004' $$, '23514', null, 'what was paid is not voided');
select lives_ok($$ update public.invoices set status = 'void' where id = '00000000-0000-4000-e000-000000000005' $$, 'what was not can be');
select is(pg_temp.code($$ select pg_temp.issue(5, 'k8') $$), 'invoice_void', 'and is not credited then');
select lives_ok('set constraints all immediate', 'all of it adds up');

-- What is issued is final, and what is written by hand has to add up as well.
select throws_ok(statement, '23514', null, statement)
from unnest(array[
  'update public.credit_notes set reason = ''x''',
  'update public.credit_notes set status = ''draft'', credit_note_number = null',
  'delete from public.credit_notes',
  'update public.credit_note_lines set amount_minor = 1',
  'delete from public.credit_note_lines',
  'update public.credit_note_taxes set amount_minor = 1',
  'delete from public.credit_note_taxes',
  'update public.invoices set credited_minor = 5 where id = ''00000000-0000-4000-e000-000000000006''',
  'insert into public.credit_notes (organization_id, invoice_id, idempotency_key, reason, currency, subtotal_minor, tax_minor, total_minor, issuer, customer)
   values (''00000000-0000-4000-8000-000000000001'', ''00000000-0000-4000-e000-000000000006'', ''x'', ''x'', ''INR'', -1, 0, -1, ''{}'', ''{}'')'
]) as statement;
create function pg_temp.by_hand(amount bigint, line text) returns void
language sql as $$
  insert into public.credit_notes (id, organization_id, invoice_id, idempotency_key, reason, currency, subtotal_minor, tax_minor, total_minor, issuer, customer)
  values ('00000000-0000-4000-f000-000000000001', '00000000-0000-4000-8000-000000000001', '00000000-0000-4000-e000-000000000006', 'hand', 'x', 'INR', amount, 0,
    amount, '{"timezone": "Asia/Kolkata"}', '{}');
  insert into public.credit_note_lines (organization_id, credit_note_id, invoice_line_id, position, description, amount_minor)
  values ('00000000-0000-4000-8000-000000000001', '00000000-0000-4000-f000-000000000001', line::uuid, 1, 'x', amount);
  update public.credit_notes set status = 'issued' where idempotency_key = 'hand';
$$;
select throws_ok(statement, '23514', null, statement)
from unnest(array[
  $$ select pg_temp.by_hand(2360, '00000000-0000-4000-a000-000000000006') $$,
  $$ select pg_temp.by_hand(1500, '00000000-0000-4000-a000-000000000006') $$,
  $$ select pg_temp.by_hand(5, '00000000-0000-4000-b000-000000000003') $$
]) as statement;
select throws_ok(
  $$ insert into public.credit_notes (organization_id, invoice_id, idempotency_key, reason, currency, subtotal_minor, tax_minor, total_minor, issuer, customer)
     values ('00000000-0000-4000-8000-000000000002', '00000000-0000-4000-e000-000000000006', 'x', 'x', 'INR', 1, 0, 1, '{}', '{}') $$, '23503', null,
  'no credit note is against another organization''s invoice');
select is(
  array(select private.credit_note_number('202601', n) from unnest(array[1, 99999, 100000, 1399999, 1400000]) as n),
  array['CRN-202601-00001', 'CRN-202601-99999', 'CRA-202601-00000', 'CRM-202601-99999', null], 'the month goes on in further series of 16 characters');

select * from finish();
rollback;
