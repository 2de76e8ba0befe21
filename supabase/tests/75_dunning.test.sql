-- An invoice that is not paid: overdue on schedule and told once, asked for again, suspended by policy, and all well again once it is paid.
begin;
set local search_path = public, extensions, tap;
select plan(56);

insert into private.billing_issuer (legal_name, state_code, country_code, timezone)
values ('Issuer', 'KA', 'IN', 'Asia/Kolkata')
on conflict on constraint billing_issuer_pkey do update
set legal_name = 'Issuer', gstin = null, state_code = 'KA', country_code = 'IN', timezone = 'Asia/Kolkata', payment_terms_days = 15;
insert into public.tax_rates (country_code, scope, name, rate_bp, position) values ('IN', 'inter_state', 'IGST', 1800, 10)
on conflict on constraint tax_rates_version_key do nothing;
update public.subscriptions set next_invoice_at = null, trial_ends_at = 'infinity', past_due_since = null;
update public.invoices set past_due_at = now() where status = 'open';
update private.payment_retries set told_at = now() where told_at is null;
update private.dunning_policy
set grace_days = 2, retry_days = '{1,3}', retry_time = '08:00', mandate_limits = '{"INR": 1500000}', suspend_after_days = 5, uncollectible_after_days = 30;

create function pg_temp.org(n integer) returns uuid
language sql as $$ select ('00000000-0000-4000-8000-0000000075' || lpad(n::text, 2, '0'))::uuid $$;
insert into public.organizations (id, name, timezone, country_code, state_code)
select pg_temp.org(n), 'Late ' || n, 'Asia/Kolkata', 'IN', null from generate_series(1, 4) as n;
insert into public.payment_methods (organization_id, type, gateway, gateway_payment_method_id, is_default)
select pg_temp.org(n), 'upi', 'razorpay', 'token_75_' || n, true from generate_series(1, 2) as n;
insert into public.subscription_plans (slug, name) values ('small', 'Small'), ('large', 'Large');
select isnt(private.set_plan_price(slug, 'monthly', 'INR', jsonb_build_object('base_minor', base), '2025-01-01'), null, format('%s is priced', slug))
from (values ('small', 699900), ('large', 1999900)) as v (slug, base);

create function pg_temp.run(at timestamptz) returns text
language sql as $$ select private.close_periods('{"v": 1, "limit": 500}', at) ->> 'closed' $$;
create function pg_temp.status(n integer) returns text
language sql as $$
  select concat_ws(', ', subscription.status, (
    select string_agg(invoice.status || case when invoice.past_due_at is null then '' else ' overdue' end, ' ' order by invoice.invoice_number)
    from public.invoices as invoice where invoice.organization_id = pg_temp.org(n)
  ))
  from public.subscriptions as subscription
  where subscription.organization_id = pg_temp.org(n)
$$;
create function pg_temp.told(n integer, asked text) returns text
language sql as $$
  select string_agg(concat_ws(' ', payload ->> 'number', payload ->> 'by', coalesce(payload ->> 'amount_minor', payload ->> 'due_minor')), ', ' order by key)
  from private.outbox where organization_id = pg_temp.org(n) and topic = asked
$$;
create function pg_temp.pay(n integer, nth integer, at timestamptz) returns text
language sql as $$
  select private.record_payment(
    jsonb_build_object('gateway', 'razorpay', 'payment_id', 'pay_75_' || n || '_' || nth, 'invoice_id', invoice.id, 'status', 'captured',
      'amount_minor', invoice.total_minor, 'currency', 'INR'), at) ->> 'result'
  from (
    select own.* from public.invoices as own where own.organization_id = pg_temp.org(n) order by own.invoice_number offset nth - 1 limit 1
  ) as invoice
$$;

select isnt(private.subscribe_organization(pg_temp.org(n), plan, 'active', '2026-01-01 10:00+05:30'), null, format('%s subscribes', n))
from (values (1, 'small'), (2, 'large'), (3, 'small'), (4, 'small')) as v (n, plan);
select is(pg_temp.run('2026-02-01 00:00+05:30'), '4', 'January is billed, payable by 16 February');
select is(pg_temp.pay(4, 1, '2026-02-10 10:00+05:30'), 'applied', 'One pays in time');
select is(pg_temp.run('2026-02-18 23:59+05:30'), '0', 'On the due date, and in the days of grace,');
select is(pg_temp.status(1), 'active, open', 'nothing happens');
select is(pg_temp.run('2026-02-19 00:00+05:30'), '0', 'Then');
select results_eq(
  'select pg_temp.status(n) from generate_series(1, 4) as n',
  array['past_due, open overdue', 'past_due, open overdue', 'past_due, open overdue', 'active, paid'], 'what is not paid is overdue, and its subscription with it'
);
select is(pg_temp.told(1, 'invoice.past_due'), '825882', 'It is told, with what is due');
select is(private.reserve_usage(pg_temp.org(1), 'ai_calls', 1, '2026-02-19 10:00+05:30'), true, 'Calls go on for now');
select is(pg_temp.run('2026-02-19 00:05+05:30'), '0', 'The next run');
select is((select count(*) from private.outbox where topic = 'invoice.past_due' and organization_id = pg_temp.org(1)), 1::bigint, 'tells nothing twice');
select is(pg_temp.told(1, 'invoice.payment_due'), null, 'and asks for nothing yet: a mandate''s holder has a day''s notice');

select is(pg_temp.run('2026-02-20 07:59+05:30'), '0', 'Before the hour of the first try nothing is asked for');
select is(pg_temp.told(1, 'invoice.payment_due'), null, 'of anybody');
select is(pg_temp.run('2026-02-20 08:00+05:30'), '0', 'Then');
select is(pg_temp.told(1, 'invoice.payment_due'), '1 mandate 825882', 'a mandate is asked within its limit');
select is(pg_temp.told(2, 'invoice.payment_due'), '1 link 2359882', 'above it a link is sent');
select is(pg_temp.told(3, 'invoice.payment_due'), '1 link 825882', 'and where there is no mandate');
select is(pg_temp.told(4, 'invoice.payment_due'), null, 'who has paid is not asked');
select is(pg_temp.pay(3, 1, '2026-02-21 10:00+05:30'), 'applied', 'One pays late');
select is(pg_temp.status(3), 'active, paid overdue', 'and all is well, at once');
select is((select past_due_since from public.subscriptions where organization_id = pg_temp.org(3)), null, 'nothing of it stays');
select is(pg_temp.run('2026-02-22 08:00+05:30'), '0', 'The second try');
select is(pg_temp.told(1, 'invoice.payment_due'), '1 mandate 825882, 2 mandate 825882', 'asks who still owes');
select is(pg_temp.told(3, 'invoice.payment_due'), '1 link 825882', 'and not who does not');

select is(pg_temp.run('2026-02-24 00:00+05:30'), '0', 'After five days');
select is(pg_temp.status(1), 'suspended, open overdue', 'the subscription is suspended');
select is(private.reserve_usage(pg_temp.org(1), 'ai_calls', 1, '2026-02-24 10:00+05:30'), false, 'Nobody is called any more');
select is(private.dispatch_obstacle(pg_temp.org(1), '2026-02-24 10:00+05:30'), 'subscription_inactive', 'the dialler''s gate is shut');
select is(pg_temp.run('2026-03-01 00:00+05:30'), '4', 'February is billed all the same');
select is(pg_temp.run('2026-03-19 00:00+05:30'), '0', 'and is overdue in its turn');
select is(pg_temp.status(1), 'suspended, open overdue open overdue', 'Two are owed');
select is(pg_temp.pay(1, 1, '2026-03-19 10:00+05:30'), 'applied', 'One of them is paid');
select is(pg_temp.status(1), 'suspended, paid overdue open overdue', 'which is not enough');
select is(pg_temp.pay(1, 2, '2026-03-19 10:01+05:30'), 'applied', 'Both are');
select is(pg_temp.status(1), 'active, paid overdue paid overdue', 'and calls may begin again');
select is(private.reserve_usage(pg_temp.org(1), 'ai_calls', 1, '2026-03-19 10:02+05:30'), true, 'at once');

select is(pg_temp.run('2026-03-21 00:00+05:30'), '0', 'After thirty days');
select is(pg_temp.status(2), 'suspended, uncollectible overdue open overdue', 'what nobody paid is given up');
select is(pg_temp.pay(2, 1, '2026-03-22 10:00+05:30'), 'applied', 'and still taken when it comes');
update public.invoices set status = 'void' where organization_id = pg_temp.org(2) and status = 'open';
select is(pg_temp.status(2), 'active, paid overdue void overdue', 'A void one owes nothing');

select throws_ok(format('update private.dunning_policy set %s', change), '23514', null, format('A policy may not say: %s', change))
from unnest(array[
  $$ retry_days = '{1,2,3,4}' $$, $$ retry_days = '{0}' $$, $$ retry_time = '11:00' $$, $$ retry_time = '19:00' $$, 'grace_days = -1'
]) as change;

-- What the portal says of an invoice is printed on it, and says it once.
create function pg_temp.register(signed text) returns uuid
language sql as $$
  select private.record_einvoice(invoice.invoice_number, repeat('0a', 32), '112010036563310', signed)
  from (select own.* from public.invoices as own where own.organization_id = pg_temp.org(1) order by own.invoice_number limit 1) as invoice
$$;
select isnt(pg_temp.register('head.body.sign'), null, 'An invoice is registered');
select is(
  private.invoice_document(null, pg_temp.register('head.body.sign')) ->> 'signed_qr', 'head.body.sign', 'once or twice, and its document has it'
);
select throws_ok($$ select pg_temp.register('head.body.other') $$, 'PGRST', null, 'It is not registered differently');
select throws_ok($$ select pg_temp.register('no code') $$, 'PGRST', null, 'nor as what is no code');

select lives_ok('set constraints all immediate', 'Every invoice of this test adds up');
select * from finish();
rollback;
