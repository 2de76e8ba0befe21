-- Money that is asked for: when a mandate may be charged, one way at a time, once each, and what an outcome means.
begin;
set local search_path = public, extensions, tap;
select plan(63);

select is(private.after_closed_hours(('2026-02-16 ' || given || '+05:30')::timestamptz, '{10:00-13:00,17:00-21:30}', 'Asia/Kolkata')
  at time zone 'Asia/Kolkata', ('2026-02-16 ' || wanted)::timestamp, 'At ' || given)
from (values ('09:59', '09:59'), ('10:00', '13:00'), ('12:59', '13:00'), ('13:00', '13:00'), ('17:00', '21:30'), ('21:30', '21:30')) as v (given, wanted);
select throws_ok($$ update private.mandate_rules set source = ' ' $$, '23514', null, 'A rule names its source');
select throws_ok($$ update private.mandate_rules set closed_hours = '{ten to one}' $$, '23514', null, 'Hours are hours');
select throws_ok(
  $$ insert into private.payment_accounts (gateway, credentials_sealed, api_base) values ('razorpay', '{"key_secret":"x"}', 'https://api.razorpay.com') $$,
  '23514', null, 'A key is sealed or not kept'
);

update private.dunning_policy set mandate_limits = '{"INR": 1500000}', retry_time = '08:00';
update public.invoices set due_date = '2099-01-01' where status = 'draft';
delete from private.payment_accounts;
insert into private.payment_accounts (gateway, credentials_sealed, api_base, return_url, priority)
values ('razorpay', 'v1.1.x', 'https://api.razorpay.com', null, 1), ('stripe', 'v1.1.x', 'https://api.stripe.com', 'https://example.com', 2);

create function pg_temp.org(n integer) returns uuid
language sql as $$ select ('00000000-0000-4000-8000-0000000076' || lpad(n::text, 2, '0'))::uuid $$;
create function pg_temp.bill(n integer) returns public.invoices
language sql as $$ select invoice from public.invoices as invoice where invoice.organization_id = pg_temp.org(n) $$;
create function pg_temp.obstacle(n integer, at timestamptz default '2026-02-10') returns text
language sql as $$ select (private.mandate_of(pg_temp.bill(n), at)).obstacle $$;
create function pg_temp.claim(at timestamptz, one uuid default null) returns jsonb
language sql as $$ select private.claim_collections(jsonb_strip_nulls(jsonb_build_object('v', 1, 'limit', 50, 'id', one)), at) -> 'requests' $$;
-- What is to be done for an organization.
create function pg_temp.todo(claimed jsonb, n integer) returns text
language sql as $$
  select string_agg(concat_ws(' ', item ->> 'do', item ->> 'kind'), ', ' order by item ->> 'kind')
  from jsonb_array_elements(claimed) as item where item ->> 'organization_id' = pg_temp.org(n)::text
$$;
create function pg_temp.live(n integer, kind text default 'charge') returns private.gateway_requests
language sql as $$
  select own from private.gateway_requests as own
  where own.organization_id = pg_temp.org(n) and own.kind = $2 order by own.created_at desc, own.id desc limit 1
$$;
create function pg_temp.say(n integer, outcome text, more jsonb default '{}', kind text default 'charge', at timestamptz default '2026-02-16 08:10+05:30') returns text
language sql as $$
  select private.record_collections(jsonb_build_object('v', 1, 'results', jsonb_build_array(
    jsonb_build_object('id', (pg_temp.live(n, kind)).id, 'submission', (pg_temp.live(n, kind)).submission, 'outcome', outcome) || more
  )), at) #>> '{results,0,result}'
$$;

insert into public.organizations (id, name) select pg_temp.org(n), 'Owes ' || n from generate_series(1, 5) as n;
do $$
declare
  made uuid;
begin
  for n in 1..5 loop
    insert into public.invoices (organization_id, currency, period_start, period_end, timezone, first_day, last_day, subtotal_minor, tax_minor,
      total_minor, issuer, customer)
    values (pg_temp.org(n), 'INR', '2026-01-01', '2026-02-01', 'Asia/Kolkata', '2026-01-01', '2026-01-31', 100000, 0, 100000,
      '{"timezone": "Asia/Kolkata", "payment_terms_days": 15}', '{}')
    returning id into made;
    insert into public.invoice_lines (organization_id, invoice_id, position, kind, description, quantity, unit, unit_price_minor, amount_minor)
    values (pg_temp.org(n), made, 1, 'base', 'Line', 1, 'month', 100000, 100000);
    update public.invoices set status = 'open', finalized_at = '2026-02-01 00:00+05:30' where id = made;
  end loop;
end
$$;
select is(pg_temp.obstacle(1), 'no_mandate', 'Without a saved method nothing is charged');
insert into public.payment_methods (organization_id, type, gateway, gateway_payment_method_id, gateway_customer_id, is_default, last4, expiry_month, expiry_year)
values
  (pg_temp.org(1), 'upi', 'razorpay', 'token_76_1', 'cust_1', true, null, null, null),
  (pg_temp.org(2), 'card', 'stripe', 'pm_76_2', 'cus_2', true, '4242', 2, 2026),
  (pg_temp.org(3), 'upi', 'razorpay', 'token_76_3', null, true, null, null, null),
  (pg_temp.org(4), 'card', 'stripe', 'pm_76_4', 'cus_4', true, '4242', 8, 2035);
select is(pg_temp.obstacle(1), null, 'with one it is');
select is(pg_temp.obstacle(3), 'no_mandate', 'not with one that no customer holds');
select is(pg_temp.obstacle(2), null, 'In the month of its expiry a card is good');
select is(pg_temp.obstacle(2, '2026-03-01'), 'method_expired', 'and then not');
update private.mandate_rules set limit_minor = 99999 where gateway = 'razorpay' and type = 'upi';
select is(pg_temp.obstacle(1), 'above_mandate_limit', 'Above the limit its holder has to take part');
update private.mandate_rules set limit_minor = 1500000 where gateway = 'razorpay' and type = 'upi';
update private.dunning_policy set mandate_limits = '{"USD": 1500000}';
select is(pg_temp.obstacle(1), 'above_mandate_limit', 'and in a currency that the operator did not name');
update private.dunning_policy set mandate_limits = '{"INR": 1500000}';

-- A day of two: the notice, then the debit.
select is(pg_temp.todo(pg_temp.claim('2026-02-10 08:00+05:30'), 1), null, 'Long before the due date nothing is done');
select is(pg_temp.todo(pg_temp.claim('2026-02-14 18:00+05:30'), 1), null, 'What is planned waits for its notice');
select is((pg_temp.live(1)).not_before, '2026-02-16 08:00+05:30'::timestamptz, 'The debit is on the due date, at the policy''s hour');
select is(pg_temp.todo(pg_temp.claim('2026-02-14 19:00+05:30'), 1), 'notify charge', 'The gateway is told long enough before');
select is(pg_temp.say(1, 'deferred', at => '2026-02-14 19:00+05:30'), 'applied', 'It could not be told');
update private.gateway_requests set lease_until = now() where organization_id = pg_temp.org(1);
select is(pg_temp.todo(pg_temp.claim('2026-02-15 10:00+05:30'), 1), 'notify charge', 'and is told late');
select is((pg_temp.live(1)).not_before, '2026-02-16 13:00+05:30'::timestamptz, 'so the debit waits, and not into a peak hour');
select is(pg_temp.say(1, 'notified', '{"order_ref": "order_1"}', at => '2026-02-15 10:00+05:30'), 'applied', 'The gateway knows it');
select is(pg_temp.todo(pg_temp.claim('2026-02-16 12:59+05:30'), 1), null, 'Before its time');
select is(pg_temp.todo(pg_temp.claim('2026-02-16 12:59+05:30'), 2), null, 'a card that needs no notice was asked for at eight');
select is((pg_temp.live(2)).state, 'submitting', 'and is at its gateway');
select is(pg_temp.todo(pg_temp.claim('2026-02-16 13:00+05:30'), 1), 'submit charge', 'At its time it is sent');
select is(pg_temp.todo(pg_temp.claim('2026-02-16 13:00+05:30'), 1), null, 'to one handler');

-- One way at a time.
select throws_ok(
  $$ insert into private.gateway_requests (organization_id, kind, gateway, invoice_id, amount_minor, currency, not_before, created_at, state, submission)
  values (pg_temp.org(1), 'link', 'stripe', (pg_temp.bill(1)).id, 1, 'INR', now(), now(), 'open', 1) $$,
  '23505', null, 'While a charge is at the gateway, no link can be'
);
select is((private.plan_charge(pg_temp.bill(1), null, now(), null, now())).id, null, 'nor another charge be planned');
select is(pg_temp.say(1, 'unknown'), 'applied', 'The answer does not come');
select is(pg_temp.todo(pg_temp.claim('2026-02-16 13:01+05:30'), 1), null, 'it is waited for');
update private.gateway_requests set lease_until = now() where organization_id = pg_temp.org(1);
select is(pg_temp.todo(pg_temp.claim('2026-02-16 13:05+05:30'), 1), 'look_up charge', 'and then looked up');
select is(pg_temp.say(1, 'not_found'), 'applied', 'It is not there');
select is((pg_temp.live(1)).state, 'unknown', 'which may change');
update private.gateway_requests set lease_until = now(), asked_at = now() - interval '11 minutes' where organization_id = pg_temp.org(1);
select is(pg_temp.todo(pg_temp.claim('2026-02-16 13:15+05:30'), 1), 'look_up charge', 'After ten minutes');
select is(pg_temp.say(1, 'not_found'), 'applied', 'it does not any more');
select is(pg_temp.todo(pg_temp.claim('2026-02-16 13:16+05:30'), 1), 'submit charge', 'and is sent again');
select is(
  private.record_collections(jsonb_build_object('v', 1, 'results', jsonb_build_array(jsonb_build_object(
    'id', (pg_temp.live(1)).id, 'submission', 1, 'outcome', 'declined', 'code', 'insufficient_funds'))), now()) #>> '{results,0,result}',
  'ignored', 'What is said of the first sending is too late'
);
select is(pg_temp.say(1, 'paid', '{"payment_id": "pay_76_1", "amount_minor": 100000, "currency": "INR"}'), 'applied', 'Paid');
select is((pg_temp.bill(1)).status::text || ' ' || (pg_temp.live(1)).state, 'paid succeeded', 'is paid');
select is(
  private.record_payment('{"gateway": "razorpay", "payment_id": "pay_76_1", "order_id": "order_1", "status": "captured", "amount_minor": 100000, "currency": "INR"}', now()) ->> 'result',
  'duplicate', 'and its webhook says nothing new'
);

-- A hard decline, told by the webhook before the handler can.
update private.gateway_requests set reference = 'pi_76_2' where organization_id = pg_temp.org(2);
select is(
  private.record_payment(jsonb_build_object('gateway', 'stripe', 'payment_id', 'pi_76_2', 'order_id', 'pi_76_2', 'invoice_id', (pg_temp.bill(2)).id,
    'status', 'failed', 'amount_minor', 100000, 'currency', 'INR', 'failure', '{"code": "stolen_card"}'::jsonb), '2026-02-16 13:20+05:30') ->> 'result',
  'applied', 'A card is declined'
);
select is((pg_temp.live(2)).state || ' ' || (pg_temp.live(2)).failure_kind, 'failed hard', 'for good');
select is(pg_temp.obstacle(2), 'no_mandate', 'It is charged no more');
select is((pg_temp.live(2, 'link')).state, 'waiting', 'A link goes out instead');
select is(pg_temp.say(4, 'declined', '{"code": "do_not_honor"}'), 'applied', 'Another is declined softly');
select is(pg_temp.obstacle(4), 'attempts_used', 'An Indian card is not tried again at Stripe');

-- A debit goes before a link, and what is paid ends both.
select is(pg_temp.todo(pg_temp.claim('2026-02-16 13:30+05:30'), 2), 'submit link', 'The link is made');
select is(pg_temp.say(2, 'accepted', jsonb_build_object('reference', 'plink_1', 'url', 'https://rzp.io/i/1', 'expires_at', extract(epoch from now())::bigint + 1000), 'link'), 'applied', 'by the gateway of the lowest priority number');
select is(private.payment_link_of((pg_temp.bill(2)).id) ->> 'url', 'https://rzp.io/i/1', 'and is where the invoice is paid');
update public.invoices set status = 'void' where organization_id = pg_temp.org(2);
select is(pg_temp.todo(pg_temp.claim('2026-02-16 13:40+05:30'), 2), 'cancel link', 'A link of what is void is taken back');

-- What was planned is called off with its method, and planned anew as things are.
insert into private.payment_retries (organization_id, invoice_id, number, due_at)
select pg_temp.org(5), (pg_temp.bill(5)).id, 1, '2026-02-20 08:00+05:30';
insert into public.payment_methods (organization_id, type, gateway, gateway_payment_method_id, gateway_customer_id, is_default)
values (pg_temp.org(5), 'upi', 'razorpay', 'token_76_5', 'cust_5', true);
update public.invoices set past_due_at = '2026-02-17 00:00+05:30' where organization_id = pg_temp.org(5);
select is(pg_temp.todo(pg_temp.claim('2026-02-18 10:00+05:30'), 5), null, 'A retry is planned two days ahead');
select is((pg_temp.live(5)).state || ' ' || (pg_temp.live(5)).retry_number, 'waiting 1', 'as a charge');
select is(private.remove_payment_method('{"v": 1, "gateway": "razorpay", "payment_method_id": "token_76_5"}', '2026-02-19') ->> 'removed', 'true', 'Its mandate is revoked');
select is(pg_temp.todo(pg_temp.claim('2026-02-19 10:00+05:30'), 5), null, 'Then');
select is((pg_temp.live(5)).state, 'cancelled', 'it is called off');
select is(pg_temp.todo(pg_temp.claim('2026-02-20 08:00+05:30'), 5), 'submit link', 'and a link is sent on its day');
select is(pg_temp.say(5, 'unknown', kind => 'link'), 'applied', 'of which the answer is lost');
select is(pg_temp.say(5, 'accepted', '{"reference": "plink_5", "url": "https://rzp.io/i/5"}', 'link'), 'applied', 'and found');
select is(
  (select count(*) from private.outbox where organization_id = pg_temp.org(5) and topic = 'invoice.payment_link' and payload ->> 'url' = 'https://rzp.io/i/5'),
  1::bigint, 'It is told'
);

select lives_ok('set constraints all immediate', 'Every invoice of this test adds up');
select * from finish();
rollback;
