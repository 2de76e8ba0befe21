-- Prepaid credit: a double-entry ledger whose balances are never negative, and which nobody changes.
begin;
set local search_path = public, extensions, tap;
select plan(62);

insert into public.organizations (id, name)
values ('00000000-0000-4000-8000-000000000001', 'Near'), ('00000000-0000-4000-8000-000000000002', 'Far');
create function pg_temp.post(type text, amount bigint, key text, at timestamptz, expires_at timestamptz default null, org integer default 1,
  description text default null) returns uuid
language sql as $$
  select private.post_credit(('00000000-0000-4000-8000-00000000000' || org)::uuid, type::public.credit_transaction_type, 'INR', amount,
    key, at, expires_at, null, null, description)
$$;
create function pg_temp.debit(amount bigint, key text, at timestamptz, partial boolean default false, org integer default 1) returns bigint
language sql as $$
  select private.debit_credit(('00000000-0000-4000-8000-00000000000' || org)::uuid, 'INR', amount, key, at, partial)
$$;
create function pg_temp.held() returns text
language sql as $$
  select string_agg(format('%s %s', kind, balance_minor), ', ' order by kind, expires_at)
  from public.credit_accounts
  where organization_id = '00000000-0000-4000-8000-000000000001' and kind <= 'purchased' and balance_minor > 0
$$;
create function pg_temp.balance() returns text
language sql as $$
  select format('%s: bought %s, used %s', balance_minor, total_purchased_minor, total_consumed_minor)
  from public.call_credits where organization_id = '00000000-0000-4000-8000-000000000001'
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

-- What comes in.
select is(pg_temp.debit(1, 'too early', '2026-01-01T00:00Z'), 0::bigint, 'without a wallet there is nothing to take');
select isnt(pg_temp.post('purchase', 100, 'p1', '2026-01-01T00:00Z'), null, 'credit is bought');
select isnt(pg_temp.post('monthly_grant', 30, 'm1', '2026-01-01T00:00Z', '2026-02-01T00:00Z'), null, 'and granted for a month');
select isnt(pg_temp.post('promotional_grant', 20, 'g1', '2026-01-01T00:00Z', '2026-03-01T00:00Z'), null, 'and given away');
select isnt(pg_temp.post('promotional_grant', 5, 'g2', '2026-01-01T00:00Z', '2026-01-10T00:00Z'), null, 'for a short time too');
select is(pg_temp.balance(), '155: bought 100, used 0', 'all of it can be spent');
select is(pg_temp.post('purchase', 100, 'p1', '2026-01-02T00:00Z'), (select id from public.credit_transactions where idempotency_key = 'p1'),
  'the same again is the same transaction');
select is(pg_temp.balance(), '155: bought 100, used 0', 'and changes nothing');
select is(pg_temp.code($$ select pg_temp.post('purchase', 101, 'p1', '2026-01-02T00:00Z') $$), 'idempotency_conflict',
  'something else under the same key is refused');
select is(pg_temp.code(statement), expected, statement)
from (
  values
    ($$ select pg_temp.post('purchase', 0, 'x', '2026-01-01T00:00Z') $$, 'invalid_amount'),
    ($$ select pg_temp.post('purchase', -1, 'x', '2026-01-01T00:00Z') $$, 'invalid_amount'),
    ($$ select pg_temp.post('purchase', null, 'x', '2026-01-01T00:00Z') $$, 'invalid_amount'),
    ($$ select pg_temp.debit(-25, 'x', '2026-01-01T00:00Z') $$, 'invalid_amount'),
    ($$ select pg_temp.debit(0, 'x', '2026-01-01T00:00Z') $$, 'invalid_amount'),
    ($$ select pg_temp.post('purchase', 1, null, '2026-01-01T00:00Z') $$, '23502'),
    ($$ select pg_temp.post('monthly_grant', 1, 'x', '2026-01-01T00:00Z') $$, 'invalid_expiry'),
    ($$ select pg_temp.post('monthly_grant', 1, 'x', '2026-01-01T00:00Z', '2026-01-01T00:00Z') $$, 'invalid_expiry'),
    ($$ select pg_temp.post('consumption', 1, 'x', '2026-01-01T00:00Z') $$, '22023'),
    ($$ select pg_temp.post('adjustment', 1, 'x', '2026-01-01T00:00Z') $$, '23514'),
    ($$ select pg_temp.post('purchase', 1, 'x', '2026-01-01T00:00Z', null, 9) $$, '23503')
) as refused (statement, expected);

-- What goes out: monthly, then promotional by expiry, then bought.
select is(pg_temp.debit(32, 'd1', '2026-01-02T00:00Z'), 32::bigint, 'credit is used');
select is(pg_temp.held(), 'promotional 3, promotional 20, purchased 100', 'what was granted for the month first, then what expires first');
select is(pg_temp.debit(32, 'd1', '2026-01-02T00:00Z'), 32::bigint, 'the same again says the same');
select is(pg_temp.balance(), '123: bought 100, used 32', 'and takes nothing');
select is(pg_temp.debit(124, 'd2', '2026-01-02T00:00Z'), 0::bigint, 'more than there is is refused');
select is(pg_temp.held(), 'promotional 3, promotional 20, purchased 100', 'and changes nothing');
select is(pg_temp.debit(120, 'd3', '2026-01-10T00:00Z'), 120::bigint, 'all that is left is used');
select is(pg_temp.balance(), '0: bought 100, used 152', 'after what had expired by then was taken out');
select is(
  (select string_agg(format('%s %s→%s', type, balance_before_minor, balance_after_minor), ', ' order by number)
    from public.credit_transactions where number > 5),
  'expiry 123→120, consumption 120→0', 'the ledger says so'
);
select isnt(pg_temp.post('purchase', 10, 'p2', '2026-01-11T00:00Z'), null, 'credit is bought again');
select is(pg_temp.debit(25, 'd4', '2026-01-11T00:00Z', true), 10::bigint, 'a call that ran over takes what there is');
select results_eq(
  $$ select amount_minor, requested_minor, balance_after_minor from public.credit_transactions where idempotency_key = 'd4' $$,
  $$ values (10::bigint, 25::bigint, 0::bigint) $$, 'and is recorded in full'
);

-- What is given back.
create function pg_temp.refund(amount bigint, key text, original text) returns uuid
language sql as $$
  select private.refund_credit('00000000-0000-4000-8000-000000000001',
    (select id from public.credit_transactions where idempotency_key = original), amount, key, '2026-01-12T00:00Z')
$$;
select isnt(pg_temp.refund(110, 'r1', 'd3'), null, 'a consumption is given back in part');
select is(pg_temp.held(), 'promotional 10, purchased 100', 'to where it was taken from, the last first');
select is(pg_temp.refund(110, 'r1', 'd3'), (select id from public.credit_transactions where idempotency_key = 'r1'), 'once');
select is(pg_temp.code($$ select pg_temp.refund(11, 'r2', 'd3') $$), 'refund_too_large', 'and not more than was taken');
select isnt(pg_temp.refund(10, 'r2', 'd3'), null, 'the rest is given back');
select is(pg_temp.held(), 'promotional 20, purchased 100', 'to where it was taken from');
select isnt(pg_temp.refund(60, 'r3', 'p1'), null, 'a purchase is paid back in part');
select is(pg_temp.balance(), '60: bought 50, used 42', 'and its credit is gone');
select is(pg_temp.code($$ select pg_temp.refund(41, 'r4', 'p1') $$), 'refund_too_large', 'not more than was bought');
select is(pg_temp.code($$ select pg_temp.refund(1, 'r4', 'm1') $$), 'credit_transaction_not_found', 'a grant is not given back');
select isnt(pg_temp.post('adjustment', 7, 'a1', '2026-01-12T00:00Z', null, 1, 'Goodwill'), null, 'an adjustment says why');
select is(private.expire_credit('{}', '2026-03-01T00:00Z'), '{"more": false, "expired": 1}', 'the sweep takes out what expired');
select is(private.expire_credit('{}', '2026-03-01T00:00Z'), '{"more": false, "expired": 0}', 'once');
select is(pg_temp.held(), 'purchased 47', 'what was bought stays');

-- The whole is consistent, and refuses what is not.
select lives_ok('set constraints all immediate', 'every transaction adds up');
select is_empty('select * from private.check_credit()', 'every balance is what its entries make');
select is(sum(balance_minor), 0::numeric, 'all accounts together are zero') from public.credit_accounts;
create function pg_temp.forge(type text, amount bigint, before bigint, after bigint, entries text) returns void
language sql as $$
  with forged as (
    insert into public.credit_transactions (organization_id, currency, number, type, amount_minor, requested_minor, balance_before_minor,
      balance_after_minor, idempotency_key, created_at, description)
    select organization_id, currency, last_number + 1, type::public.credit_transaction_type, amount, amount, before, after, 'forged', now(), 'x'
    from public.call_credits where organization_id = '00000000-0000-4000-8000-000000000001'
    returning id, organization_id
  )
  insert into public.credit_ledger (organization_id, transaction_id, position, account_id, side, amount_minor)
  select forged.organization_id, forged.id, entry.position, account.id, split_part(entry.value, ' ', 2)::public.ledger_side,
    split_part(entry.value, ' ', 3)::bigint
  from forged, unnest(string_to_array(entries, ', ')) with ordinality as entry (value, position)
  join public.credit_accounts as account on account.kind = split_part(entry.value, ' ', 1)::public.credit_account_kind
    and account.organization_id = '00000000-0000-4000-8000-000000000001' and account.expires_at is null;
$$;
select throws_ok(statement, '23514', null, statement)
from unnest(array[
  $$ select pg_temp.forge('purchase', 5, 47, 52, 'payments debit 4, purchased credit 5') $$,
  $$ select pg_temp.forge('purchase', 5, 47, 52, 'grants debit 5, purchased credit 5') $$,
  $$ select pg_temp.forge('purchase', 5, 47, 52, 'purchased credit 5') $$,
  $$ select pg_temp.forge('purchase', 5, 40, 45, 'payments debit 5, purchased credit 5') $$,
  $$ select pg_temp.forge('consumption', 50, 47, 0, 'purchased debit 50, consumption credit 50') $$,
  $$ update public.credit_ledger set amount_minor = 1 $$,
  $$ delete from public.credit_transactions $$,
  $$ delete from public.credit_accounts $$,
  $$ delete from public.call_credits $$,
  $$ update public.call_credits set balance_minor = -1 $$,
  $$ insert into public.credit_ledger (organization_id, transaction_id, position, account_id, side, amount_minor)
     select organization_id, transaction_id, 9, account_id, side, amount_minor from public.credit_ledger limit 1 $$
]) as statement;
select is(pg_temp.code($$ insert into public.credit_ledger (organization_id, transaction_id, position, account_id, side, amount_minor)
  select '00000000-0000-4000-8000-000000000002', transaction_id, 9, account_id, side, amount_minor from public.credit_ledger limit 1 $$), '23503',
  'no entry crosses organizations');

-- Low credit is told once a period.
update public.call_credits set low_balance_minor = 40;
select pg_temp.debit(8, 'd5', '2026-03-02T00:00Z'), pg_temp.post('purchase', 10, 'p3', '2026-03-02T00:00Z'), pg_temp.debit(10, 'd6', '2026-03-02T00:00Z');
select is((select count(*) from private.outbox where topic = 'credit.low'), 1::bigint, 'low credit is told, once a period');

select * from finish();
rollback;
