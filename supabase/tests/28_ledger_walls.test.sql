-- Walls: who sees and writes credit, payments and credit notes; what a payment method may hold; usage periods.
begin;
set local search_path = public, extensions, tap;
select plan(247);

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
insert into auth.users (id, email)
select ('00000000-0000-4000-c000-00000000000' || n)::uuid, format('user%s@example.com', n) from generate_series(1, 5) as n;
update public.profiles set organization_id = '00000000-0000-4000-8000-000000000001', system_role = 'owner'
where id = '00000000-0000-4000-c000-000000000001';
update public.profiles set organization_id = '00000000-0000-4000-8000-000000000002', system_role = 'owner'
where id = '00000000-0000-4000-c000-000000000002';
insert into public.roles (id, organization_id, name, permissions)
values ('00000000-0000-4000-d000-000000000001', '00000000-0000-4000-8000-000000000001', 'Caller', '["lead.view"]');
update public.profiles
set organization_id = '00000000-0000-4000-8000-000000000001', role_id = '00000000-0000-4000-d000-000000000001'
where id = '00000000-0000-4000-c000-000000000003';
update public.profiles set organization_id = '00000000-0000-4000-8000-000000000001', system_role = 'owner', status = 'suspended'
where id = '00000000-0000-4000-c000-000000000005';
create function pg_temp.as_role(role text, person integer, query text) returns text
language plpgsql as $$
declare
  before text := current_setting('role');
  answer text;
begin
  perform set_config('request.jwt.claims',
    coalesce(jsonb_build_object('sub', '00000000-0000-4000-c000-00000000000' || person, 'role', role)::text, ''), true);
  perform set_config('role', role, true);
  begin
    execute query into answer;
  exception
    when sqlstate 'PGRST' then answer := sqlerrm::jsonb ->> 'code';
    when others then answer := sqlstate;
  end;
  perform set_config('role', before, true);
  return answer;
end
$$;

-- Both organizations have rows everywhere, three at least.
select pg_temp.bill(org * 10 + n, org) from generate_series(1, 2) as org, generate_series(1, 3) as n;
select private.save_payment_method(jsonb_build_object('gateway', 'razorpay', 'type', 'card', 'organization_id', '00000000-0000-4000-8000-00000000000' || org,
  'payment_method_id', format('token_%s_%s', org, n), 'last4', '1111', 'brand', 'Visa', 'expiry_month', 12, 'expiry_year', 2030), now())
from generate_series(1, 2) as org, generate_series(1, 3) as n;
select private.record_payment(jsonb_build_object('gateway', 'razorpay', 'payment_id', format('pay_%s_%s', org, n), 'status', 'captured', 'amount_minor', 2359,
  'currency', 'INR', 'invoice_id', format('00000000-0000-4000-e000-0000000000%s%s', org, n)), now())
from generate_series(1, 2) as org, generate_series(1, 3) as n;
select private.record_refund(jsonb_build_object('gateway', 'razorpay', 'refund_id', format('rf_%s_%s', org, n), 'payment_id', format('pay_%s_%s', org, n),
  'status', 'processed', 'amount_minor', 10, 'currency', 'INR'), now())
from generate_series(1, 2) as org, generate_series(1, 3) as n;
select private.issue_credit_note(jsonb_build_object('invoice_id', format('00000000-0000-4000-e000-0000000000%s%s', org, n), 'idempotency_key', 'k' || n,
  'reason', 'x'), now())
from generate_series(1, 2) as org, generate_series(1, 3) as n;
select private.post_credit(('00000000-0000-4000-8000-00000000000' || org)::uuid, 'purchase', currency, 100, currency, now())
from generate_series(1, 2) as org, unnest(array['INR', 'USD', 'GBP']) as currency;

create temporary table walled as
select unnest(array['call_credits', 'credit_accounts', 'credit_transactions', 'credit_ledger', 'payment_methods', 'payments', 'refunds', 'credit_notes',
  'credit_note_lines', 'credit_note_taxes']) as name;
grant select on walled to public;

select ok(class.relrowsecurity and class.relforcerowsecurity, format('row level security is on and forced: %s', walled.name))
from walled
join pg_catalog.pg_class as class on class.oid = ('public.' || walled.name)::regclass;
select is(
  pg_temp.as_role('authenticated', person, format('select count(distinct organization_id) || '' '' || (count(*) >= 3) from public.%I', name)),
  '1 true', format('owner %s sees their organization''s %s alone', person, name)
)
from walled, unnest(array[1, 2]) as person;
select is(
  pg_temp.as_role('authenticated', person, format('select count(*) from public.%I', name)), '0',
  format('%s sees no %s', case person when 3 then 'a member without the permission' when 4 then 'a user without an organization' else 'a suspended owner' end, name)
)
from walled, unnest(array[3, 4, 5]) as person;
select is(pg_temp.as_role('anon', null, format('select count(*) from public.%I', name)), '42501', format('a visitor may not ask for %s', name)) from walled;
select is(
  pg_temp.as_role(role, case role when 'authenticated' then 1 end, format(statement, name)), '42501', format('%s: %s', role, format(statement, name))
)
from walled, unnest(array['authenticated', 'service_role', 'anon']) as role,
  unnest(array['insert into public.%I default values', 'delete from public.%I', 'truncate public.%I', 'update public.%I set organization_id = null']) as statement;
select is(pg_temp.as_role(role, 1, 'select count(*) from private.credit_note_series'), '42501', format('%s does not read the series', role))
from unnest(array['authenticated', 'service_role', 'anon']) as role;

-- A draft is nobody's business.
insert into public.credit_notes (organization_id, invoice_id, idempotency_key, reason, currency, subtotal_minor, tax_minor, total_minor, issuer, customer)
values ('00000000-0000-4000-8000-000000000001', '00000000-0000-4000-e000-000000000011', 'draft', 'x', 'INR', 1, 0, 1, '{}', '{}');
select is(pg_temp.as_role('authenticated', 1, 'select count(*) from public.credit_notes'), '3', 'an owner does not see a draft credit note');

-- Who calls what: no user any function that moves money, a handler the wrappers alone. What reads cannot write: it is not volatile.
select is_empty(
  $$ select role, fn.oid::regprocedure
     from pg_catalog.pg_proc as fn, unnest(array['anon', 'authenticated']) as role
     where fn.pronamespace in ('public'::regnamespace, 'private'::regnamespace)
       and fn.proname ~ '(credit|payment|refund|wallet|expired|invoice|card_number|read_)'
       and fn.prorettype <> 'trigger'::regtype
       -- To ask for one's own invoice to be paid, or for no more charges, is told what to do and never an amount.
       and (role = 'anon' or fn.proname not in ('request_payment_link', 'collect_invoice', 'forget_payment_method'))
       and (fn.provolatile = 'v' or role = 'anon')
       and has_function_privilege(role, fn.oid, 'execute') $$,
  'no user calls a function that moves money, and no visitor one that shows it'
);
select set_eq(
  $$ select fn.proname::text
     from pg_catalog.pg_proc as fn
     where fn.pronamespace = 'public'::regnamespace and fn.proname ~ '(credit|payment|refund)' and has_function_privilege('service_role', fn.oid, 'execute') $$,
  array['open_payment', 'record_payment', 'record_refund', 'save_payment_method', 'remove_payment_method', 'issue_credit_note', 'expire_credit', 'renew_credit',
    'request_refund'],
  'a handler calls these'
);
select is(has_function_privilege('service_role', signature, 'execute'), false, format('a handler does not call %s', signature))
from unnest(array[
  'private.post_credit(uuid, public.credit_transaction_type, text, bigint, text, timestamptz, timestamptz, text, uuid, text)',
  'private.debit_credit(uuid, text, bigint, text, timestamptz, boolean, public.credit_transaction_type, text, uuid, text)',
  'private.refund_credit(uuid, uuid, bigint, text, timestamptz, text)', 'private.settle_invoice(uuid, uuid, timestamptz)'
]) as signature;
select is(
  pg_temp.as_role('service_role', null, $$ select public.record_payment('{"v": 1, "gateway": "razorpay", "payment_id": "pay_1_1", "status": "captured",
    "amount_minor": 2359, "currency": "INR"}') ->> 'result' $$), 'duplicate', 'it records a payment'
);
select is(pg_temp.as_role('authenticated', 1, $$ select public.record_payment('{}') $$), '42501', 'an owner does not');

-- Payment methods: a token, and never a card.
select results_eq(
  $$ select is_default from public.payment_methods where organization_id = '00000000-0000-4000-8000-000000000001' order by gateway_payment_method_id $$,
  'values (true), (false), (false)', 'the first is the default'
);
select is(
  pg_temp.code(format('select private.save_payment_method(%L, now())', jsonb_build_object('gateway', 'razorpay', 'type', 'card', 'last4', '1111',
    'organization_id', '00000000-0000-4000-8000-000000000001', 'payment_method_id', 'token_x') || bad)), expected, bad::text
)
from (
  values
    ('{"payment_method_id": "4111111111111111"}'::jsonb, 'invalid_request'), ('{"payment_method_id": "tok_4111-1111-1111-1111"}', 'invalid_request'),
    ('{"customer_id": "5555.5555.5555.4444"}', 'invalid_request'), ('{"last4": "4111111111111111"}', 'invalid_last4'), ('{"last4": "111"}', 'invalid_last4'),
    ('{"type": "cash"}', 'invalid_request'), ('{"gateway": "manual"}', 'invalid_request'), ('{"brand": "4111111111111111"}', '23514'),
    ('{"expiry_month": 13, "expiry_year": 2030}', '23514'), ('{"expiry_month": 1}', '23514'), ('{"last4": null}', '23514'),
    ('{"payment_method_id": "token_2_1"}', 'payment_method_in_use'), ('{"organization_id": "00000000-0000-4000-8000-000000000009"}', 'organization_not_found')
) as refused (bad, expected);
select is(private.has_card_number(given), expected, format('%s: %s', given, expected))
from (
  values
    ('4111111111111111', true), ('4111 1111 1111 1111', true), ('x4111-1111-1111-1111y', true), ('378282246310005', true), ('30569309025904', true),
    ('6304000000000000000', true), ('12345678901234567890', true), ('4111111111111112', false), ('1700000000000', false), ('pm_1NqWkZ2eZvKYlo2CAbCdEfGh', false),
    ('00000000-0000-4000-8000-000000000001', false), ('token_EeroOjvOvorT5L', false), ('', false)
) as number (given, expected);
select throws_ok(
  format($$ update public.payment_methods set metadata = %L where gateway_payment_method_id = 'token_1_1' $$, metadata), '23514', null, metadata
)
from unnest(array['{"note": "4111 1111 1111 1111"}', '{"nested": {"deep": [4111111111111111]}}', '{"cvv": "123"}', '[]']) as metadata;
select throws_ok(
  $$ update public.payment_methods set is_default = true where gateway_payment_method_id = 'token_1_2' $$, '23505', null, 'one default an organization'
);
select is(private.remove_payment_method('{"gateway": "razorpay", "payment_method_id": "token_1_1"}', now()), '{"removed": true}', 'one is removed');
select is(private.remove_payment_method('{"gateway": "razorpay", "payment_method_id": "token_1_1"}', now()), '{"removed": false}', 'once');
select is(pg_temp.as_role('authenticated', 1, 'select count(*) from public.payment_methods'), '2', 'and not seen any more');

-- Usage periods: neither overlapping, nor reversed, nor negative.
insert into public.usage_logs (organization_id, feature_key, usage_count, period_start, period_end)
values ('00000000-0000-4000-8000-000000000001', 'ai_calls', 1, '2026-01-01', '2026-02-01');
select is(pg_temp.code(format('insert into public.usage_logs (organization_id, feature_key, usage_count, period_start, period_end) values (%L, ''ai_calls'', %s, %L, %L)',
  '00000000-0000-4000-8000-000000000001', used, starts, ends)), expected, format('%s to %s with %s', starts, ends, used))
from (
  values
    (1, '2026-01-31', '2026-03-01', '23P01'), (1, '2025-12-01', '2026-01-02', '23P01'), (1, '2026-01-10', '2026-01-11', '23P01'),
    (1, '2026-03-01', '2026-02-01', '23514'), (1, '2026-02-01', '2026-02-01', '23514'), (-1, '2026-02-01', '2026-03-01', '23514'),
    (1, '2026-02-01', '2026-03-01', 'no error')
) as period (used, starts, ends, expected);

select lives_ok('set constraints all immediate', 'all of it adds up');
select is_empty('select * from private.check_credit()', 'and all balances agree');
select throws_ok($$ delete from public.organizations where id = '00000000-0000-4000-8000-000000000001' $$, '23503', null,
  'an organization with records of money is not deleted');

select * from finish();
rollback;
