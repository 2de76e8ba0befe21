-- What a call holds and what pays for it: the plan, then credit, then overage; once, and never more than there is.
begin;
set local search_path = public, extensions, tap;
select plan(103);

-- Tuesday, 24 November 2026, 10:00 in Kolkata. Capped includes 60 seconds and stops; Calls includes two calls, then credit at 6.00 a
-- minute by the second; Talk includes a minute, then credit by the started minute, then 9.00 a minute on the invoice; Pay includes nothing,
-- Part 150 seconds, More 400.
insert into private.clock_offset (shift) values (timestamptz '2026-11-24 10:00+05:30' - now())
on conflict (single) do update set shift = excluded.shift;
insert into private.billing_issuer (legal_name, state_code, country_code, timezone)
values ('Issuer', 'KA', 'IN', 'Asia/Kolkata')
on conflict on constraint billing_issuer_pkey do nothing;
insert into public.subscription_plans (id, slug, name)
select ('00000000-0000-4000-a000-0000000000f' || n)::uuid, 'hold-' || slug, slug
from unnest(array['capped', 'calls', 'talk', 'pay', 'part', 'more']) with ordinality as plan (slug, n);
insert into public.plan_prices (id, plan_id, version, base_minor)
select ('00000000-0000-4000-b000-0000000000f' || n)::uuid, ('00000000-0000-4000-a000-0000000000f' || n)::uuid, 1, case n when 3 then 1000 else 0 end
from generate_series(1, 6) as n;
insert into public.plan_price_meters (
  plan_price_id, meter_key, included_units, limit_units, hard, overage_price_minor, overage_unit, credit_price_minor, credit_unit, credit_pulse
)
values
  ('00000000-0000-4000-b000-0000000000f1', 'call_seconds', 60, 60, true, null, 1, null, 60, 1),
  ('00000000-0000-4000-b000-0000000000f2', 'ai_calls', 2, -1, false, null, 1, 600, 60, 1),
  ('00000000-0000-4000-b000-0000000000f2', 'call_seconds', -1, -1, false, null, 1, null, 60, 1),
  ('00000000-0000-4000-b000-0000000000f3', 'call_seconds', 60, -1, false, 900, 60, 600, 60, 60),
  ('00000000-0000-4000-b000-0000000000f4', 'call_seconds', 0, -1, false, null, 1, 600, 60, 1),
  ('00000000-0000-4000-b000-0000000000f5', 'call_seconds', 150, -1, false, null, 1, 600, 60, 1),
  ('00000000-0000-4000-b000-0000000000f6', 'call_seconds', 400, -1, false, null, 1, 600, 60, 1);
insert into public.carrier_accounts (id, provider, account_sid, credentials_sealed, api_base, max_concurrent_calls)
values ('00000000-0000-4000-c000-0000000000f1', 'plivo', 'MAHOLD', 'sealed', 'https://carrier.example.test', 1000);

create function pg_temp.org(n integer) returns uuid
language sql immutable as $$ select ('00000000-0000-4000-8000-0000000000f' || n)::uuid $$;
create function pg_temp.phone(number integer) returns text
language sql immutable as $$ select '+9170000' || lpad(number::text, 5, '0') $$;
-- An organization on a plan with a running campaign of ten leads, 10n to 10n+9, whose calls last 100 seconds at most.
create function pg_temp.tenant(n integer, plan text, longest integer default 100) returns void
language plpgsql as $$
declare
  made public.campaigns;
begin
  insert into public.organizations (id, name, state_code, max_concurrent_calls) values (pg_temp.org(n), 'Tenant ' || n, 'KA', 1000);
  perform private.subscribe_organization(pg_temp.org(n), plan, 'active', private.clock_now());
  insert into public.caller_numbers (organization_id, carrier_account_id, phone_number)
  values (pg_temp.org(n), '00000000-0000-4000-c000-0000000000f1', '+91809900000' || n);
  insert into public.leads (organization_id, name, phone)
  select pg_temp.org(n), 'Lead ' || number, pg_temp.phone(number) from generate_series(10 * n, 10 * n + 9) as number;
  insert into public.campaigns (organization_id, name, max_concurrent_calls, max_call_seconds, auto_complete)
  values (pg_temp.org(n), 'Campaign', 1000, longest, false)
  returning * into made;
  perform private.enrol_leads(made, null, private.clock_now());
  insert into public.call_queue (organization_id, campaign_id, lead_id, next_retry_at, max_attempts, priority)
  select made.organization_id, made.id, member.lead_id, 'infinity', 3, 0
  from public.campaign_leads as member where member.campaign_id = made.id;
  update public.campaign_leads set status = 'queued' where campaign_id = made.id;
  update public.campaigns set status = 'running' where id = made.id;
end
$$;
create function pg_temp.attempt(number integer) returns public.call_logs
language sql as $$ select log from public.call_logs as log where log.callee_number = pg_temp.phone(number) order by log.id desc limit 1 $$;
-- What is released of these numbers, and for how many seconds: "10 for 60". They are queued in their order.
create function pg_temp.release(variadic numbers integer[]) returns text
language plpgsql as $$
declare
  released jsonb;
begin
  update public.call_queue as queue
  set next_retry_at = private.clock_now() - make_interval(secs => 1000 - place)
  from unnest(numbers) with ordinality as wanted (number, place)
  join public.leads as lead on lead.phone = pg_temp.phone(wanted.number)
  where queue.lead_id = lead.id and queue.status = 'queued';
  released := public.release_calls('{"v": 1, "limit": 500}');
  update public.call_queue set next_retry_at = 'infinity' where status = 'queued';
  return (
    select coalesce(string_agg(right(log.callee_number, 5)::integer || ' for ' || log.time_limit_seconds, ', ' order by log.callee_number), 'none')
    from jsonb_array_elements(released -> 'attempts') as attempt
    join public.call_logs as log on log.id = (attempt ->> 'id')::uuid
  );
end
$$;
create function pg_temp.begin_dials(variadic numbers integer[]) returns bigint
language sql as $$
  select jsonb_array_length(public.begin_dials(jsonb_build_object(
    'v', 1, 'lease_token', gen_random_uuid(), 'attempts', (select jsonb_agg((pg_temp.attempt(number)).id) from unnest(numbers) as number)
  )) -> 'dials')
$$;
create function pg_temp.record_dial(number integer, outcome text) returns text
language sql as $$
  select public.record_dials(jsonb_build_object('v', 1, 'results', jsonb_build_array(jsonb_build_object(
    'attempt_id', (pg_temp.attempt(number)).id, 'outcome', outcome, 'reason', 'invalid_number'
  )))) ->> 'recorded'
$$;
create function pg_temp.hang_up(number integer, seconds integer, outcome text default 'answered') returns text
language sql as $$
  select public.apply_event(jsonb_build_object(
    'v', 1, 'source', 'plivo', 'source_id', '00000000-0000-4000-c000-0000000000f1', 'kind', 'call', 'attempt_id', (pg_temp.attempt(number)).id,
    'dedupe_key', gen_random_uuid(), 'verified', true, 'headers', '{}'::jsonb, 'body', '',
    'call', jsonb_build_object(
      'provider_call_id', 'call-' || (pg_temp.attempt(number)).id, 'status', 'ended', 'outcome', outcome, 'bill_duration_seconds', seconds
    )
  )) ->> 'result'
$$;
-- The carrier's own record of a call, read after its events.
create function pg_temp.correct(number integer, seconds integer) returns text
language sql as $$
  select (private.apply_call_event('reconcile', '00000000-0000-4000-c000-0000000000f1', (pg_temp.attempt(number)).id, jsonb_build_object(
    'provider_call_id', 'call-' || (pg_temp.attempt(number)).id, 'status', 'ended', 'outcome', 'answered', 'bill_duration_seconds', seconds
  ), private.clock_now())).result::text
$$;
-- A released call from its dial to its end.
create function pg_temp.call(number integer, seconds integer, outcome text default 'answered') returns text
language plpgsql as $$
begin
  perform pg_temp.begin_dials(number);
  return pg_temp.hang_up(number, seconds, outcome);
end
$$;
create function pg_temp.buy(n integer, amount bigint) returns uuid
language sql as $$ select private.post_credit(pg_temp.org(n), 'purchase', 'INR', amount, gen_random_uuid()::text, private.clock_now()) $$;
-- "ai_calls 1+2 (1), call_seconds 30+100 (10); 500, 100 held": used, held and paid by credit; then the wallet.
create function pg_temp.books(n integer) returns text
language sql as $$
  select (
      select string_agg(format('%s %s+%s (%s)', log.feature_key, log.usage_count, log.reserved, log.prepaid), ', ' order by log.feature_key)
      from public.usage_logs as log
      where log.organization_id = pg_temp.org(n)
    )
    || coalesce((
      select format('; %s, %s held', wallet.balance_minor, wallet.held_minor)
      from public.call_credits as wallet
      where wallet.organization_id = pg_temp.org(n)
    ), '')
$$;
create function pg_temp.charge(number integer) returns text
language sql as $$
  select format(
    '%s of %s s, %s on the invoice: %s, %s not collected', charge.credit_seconds, charge.seconds, charge.overage_seconds, charge.charged_minor,
    charge.uncollected_minor
  )
  from public.call_charges as charge
  where charge.call_log_id = (pg_temp.attempt(number)).id
$$;
create function pg_temp.waiting(n integer) returns text
language sql as $$
  select private.campaign_json(campaign.id, private.clock_now()) ->> 'waiting'
  from public.campaigns as campaign
  where campaign.organization_id = pg_temp.org(n)
$$;

-- A hard cap on seconds.
select pg_temp.tenant(1, 'hold-capped');
select is(pg_temp.release(10, 11, 12), '10 for 60', 'Of 60 seconds one call that may last longer gets all');
select is(pg_temp.books(1), 'ai_calls 0+1 (0), call_seconds 0+60 (0)', 'and holds them');
select is(pg_temp.waiting(1), '{"quota_exhausted": 9}', 'The others wait, and are told why');
select is(pg_temp.release(11), 'none', 'for as long as it lasts');
select is((public.begin_dials(jsonb_build_object('v', 1, 'lease_token', gen_random_uuid(), 'attempts', jsonb_build_array((pg_temp.attempt(10)).id)))
  #>> '{dials,0,time_limit_seconds}'), '60', 'The carrier is told to end it in time');
select is(pg_temp.hang_up(10, 0, 'busy'), 'applied', 'It was busy');
select is(pg_temp.books(1), 'ai_calls 0+0 (0), call_seconds 0+0 (0)', 'and gives all back');
select is(pg_temp.release(11, 12), '11 for 60', 'at once to the next');
select is(pg_temp.call(11, 20), 'applied', 'which takes 20');
select is(pg_temp.release(12), '12 for 40', 'and leaves 40');
select is(pg_temp.call(12, 45), 'applied', 'The carrier let it run over');
select is(pg_temp.books(1), 'ai_calls 2+0 (0), call_seconds 65+0 (0)', 'which is recorded in full');
select is(pg_temp.release(13), 'none', 'and is the end');
select is_empty('select * from public.call_charges', 'A plan that takes no credit charges none');

-- Nobody is called for less than half a minute.
select pg_temp.tenant(2, 'hold-capped', 35);
select is(pg_temp.release(20, 21), '20 for 35', 'Of 60 seconds 35 go to the first');
select is(pg_temp.waiting(2), '{"quota_exhausted": 9}', 'and 25 are too few for a second');
select is(pg_temp.begin_dials(20), 1::bigint, 'It is dialled');
select is(pg_temp.record_dial(20, 'refused'), '1', 'and refused by the carrier');
select is(pg_temp.books(2), 'ai_calls 0+0 (0), call_seconds 0+0 (0)', 'which gives all back');

-- Two calls included, then credit.
select pg_temp.tenant(3, 'hold-calls');
select is(pg_temp.release(30, 31, 32), '30 for 100, 31 for 100', 'Without credit the included calls are all');
select is(pg_temp.waiting(3), '{"credit_exhausted": 8}', 'and the others wait for it');
select isnt(pg_temp.buy(3, 1500), null, 'Credit for 150 seconds is bought');
select is(pg_temp.release(32, 33, 34), '32 for 100, 33 for 50', 'One call in full, the next for what is left, no third');
select is(pg_temp.books(3), 'ai_calls 0+4 (0); 1500, 1500 held', 'All of it is held');
select is(pg_temp.waiting(3), '{"credit_exhausted": 6}', 'which the campaign says');
select is(
  private.debit_credit(pg_temp.org(3), 'INR', 1, 'fee', private.clock_now()), 0::bigint, 'Nobody else spends it meanwhile'
);
select throws_ok(
  $$ select private.refund_credit(pg_temp.org(3), (select id from public.credit_transactions where organization_id = pg_temp.org(3)), 1, 'back', private.clock_now()) $$,
  'PGRST', null, 'nor is it paid back'
);
select is_empty('select * from private.check_holds()', 'What is held is what the attempts hold');
select is(pg_temp.call(32, 30), 'applied', 'The first to end');
select is(pg_temp.call(30, 40), 'applied', 'and the second are the included ones');
select is(pg_temp.books(3), 'ai_calls 2+2 (0), call_seconds 70+0 (0); 1500, 500 held', 'and cost nothing');
select is(pg_temp.call(31, 61), 'applied', 'The third');
select is(pg_temp.charge(31), '61 of 61 s, 0 on the invoice: 610, 0 not collected', 'is paid with credit');
select is(pg_temp.books(3), 'ai_calls 3+1 (1), call_seconds 131+0 (61); 890, 500 held', 'and uses nothing that is included');
select is(
  (select format('%s %s of %s, %s', type, amount_minor, requested_minor, reference_type) from public.credit_transactions as entry
    join public.call_charges as charge on charge.transaction_id = entry.id
    where entry.reference_id = (pg_temp.attempt(31)).id),
  'consumption 610 of 610, call', 'The ledger says for which call'
);
select isnt(pg_temp.hang_up(31, 90), 'failed', 'It is told again, and longer');
select is(pg_temp.books(3), 'ai_calls 3+1 (1), call_seconds 131+0 (61); 890, 500 held', 'which changes nothing: what was billed first stands');
select is(pg_temp.correct(31, 31), 'applied', 'The carrier''s own record says that it was shorter');
select is(pg_temp.books(3), 'ai_calls 3+1 (1), call_seconds 101+0 (31); 1190, 500 held', 'and the difference is given back');
select is(pg_temp.correct(31, 31), 'ignored', 'Told again');
select is(pg_temp.books(3), 'ai_calls 3+1 (1), call_seconds 101+0 (31); 1190, 500 held', 'it is given back once');
select is(pg_temp.correct(31, 61), 'applied', 'It was longer after all');
select is(pg_temp.books(3), 'ai_calls 3+1 (1), call_seconds 131+0 (61); 890, 500 held', 'and costs what it did');
select is(
  (select string_agg(format('%s %s %s', seconds, credit_seconds, charged_minor), ', ' order by seconds) from private.call_corrections),
  '-30 -30 -300, 30 30 300', 'Both are on record'
);
select is_empty('select * from private.check_credit()', 'The ledger adds up');
select is(pg_temp.call(33, 0, 'no_answer'), 'applied', 'Nobody answers the last');
select is(pg_temp.books(3), 'ai_calls 3+0 (1), call_seconds 131+0 (61); 890, 0 held', 'which gives its credit back');
select is(pg_temp.release(34), '34 for 89', 'What is left is 89 seconds');
select is(pg_temp.call(34, 120), 'applied', 'of which the carrier makes 120');
select is(pg_temp.charge(34), '89 of 120 s, 0 on the invoice: 890, 310 not collected', 'What the balance does not reach is written down');
select is(pg_temp.books(3), 'ai_calls 4+0 (2), call_seconds 251+0 (181); 0, 0 held', 'The balance is not below zero');
select is(pg_temp.release(35), 'none', 'Nobody is called on nothing');
select is(pg_temp.waiting(3), '{"credit_exhausted": 6}', 'and that is what they wait for');
select isnt(pg_temp.buy(3, 300), null, 'Whoever buys more');
select is(pg_temp.release(35), '35 for 30', 'calls at once');

-- A call that ends without a second, and later with some.
select is(pg_temp.call(35, 0), 'applied', 'No second was billed');
select is(pg_temp.books(3), 'ai_calls 4+0 (2), call_seconds 251+0 (181); 300, 0 held', 'and nothing is held any more');
select is(pg_temp.hang_up(35, 25), 'applied', 'The carrier bills 25 after all');
select is(pg_temp.charge(35), '25 of 25 s, 0 on the invoice: 250, 0 not collected', 'which are charged');
select isnt(pg_temp.hang_up(35, 25), 'failed', 'It says so again');
select is(pg_temp.books(3), 'ai_calls 5+0 (3), call_seconds 276+0 (206); 50, 0 held', 'and they are charged once');

-- A minute included, then credit by the minute, then the invoice.
select pg_temp.tenant(4, 'hold-talk', 600);
select isnt(pg_temp.buy(4, 700), null, 'Credit for one minute, and a bit');
select is(pg_temp.release(40, 41), '40 for 600, 41 for 600', 'A plan that sells more refuses nobody');
select is(pg_temp.books(4), 'ai_calls 0+2 (0), call_seconds 0+1200 (0); 700, 600 held', 'and holds what credit there is');
select is(pg_temp.call(41, 200), 'applied', 'A call of 200 seconds');
select is(pg_temp.charge(41), '60 of 140 s, 80 on the invoice: 600, 0 not collected', 'is paid by the plan, by credit, by the invoice');
select is(pg_temp.call(40, 10), 'applied', 'Another of ten');
select is(pg_temp.charge(40), '0 of 10 s, 10 on the invoice: 0, 0 not collected', 'finds no whole minute of credit');
select is(pg_temp.books(4), 'ai_calls 2+0 (0), call_seconds 210+0 (60); 100, 0 held', 'Each second is settled once');
select is(jsonb_array_length(private.close_periods('{"v": 1}', '2026-12-24 00:05+05:30') -> 'invoices'), 1, 'The month ends');
select is(
  (select string_agg(format('%s %s %s', kind, quantity, amount_minor), ', ' order by position) from public.invoice_lines
    where organization_id = pg_temp.org(4) and (meter_key = 'call_seconds' or kind = 'base')),
  'base 1 1000, included 60 0, overage 90 1350', 'and what credit paid is not billed again'
);
select is((select count(*) from public.subscriptions where billing_hold is not null), 0::bigint, 'Days and counters agree');

-- Nothing included: credit that expires, and attempts that never come to be.
select pg_temp.tenant(5, 'hold-pay');
select isnt(
  private.post_credit(pg_temp.org(5), 'promotional_grant', 'INR', 1000, 'gift', private.clock_now(), private.clock_now() + interval '1 hour'), null,
  'A gift for an hour'
);
select is(pg_temp.release(50), '50 for 100', 'is called on');
update private.clock_offset set shift = shift + interval '2 hours';
select is(pg_temp.hang_up(50, 100), 'applied', 'but is gone when the call ends');
select is(pg_temp.charge(50), '0 of 100 s, 0 on the invoice: 0, 1000 not collected', 'and cannot be collected');
select is(pg_temp.books(5), 'ai_calls 1+0 (0), call_seconds 100+0 (100); 0, 0 held', 'Nothing is below zero');
select isnt(pg_temp.buy(5, 2000), null, 'Credit for two calls');
select is(pg_temp.release(51, 52, 53), '51 for 100, 52 for 100', 'makes two');
update public.call_logs set lease_until = now() - interval '1 second', not_after = now() - interval '1 second' where status = 'created';
select is(public.reconcile_calls('{"v": 1}'), '{"attempts": [], "agentless": []}', 'which nobody begins in time');
select is(pg_temp.books(5), 'ai_calls 1+0 (0), call_seconds 100+0 (100); 2000, 0 held', 'and which hold nothing any more');

-- What credit is held for is not taken from what is included.
select pg_temp.tenant(6, 'hold-part');
select isnt(pg_temp.buy(6, 1000), null, 'Credit for 100 seconds');
select is(pg_temp.release(60, 61, 62), '60 for 100, 61 for 100, 62 for 50', 'with the 150 of the plan makes 250');
select is(pg_temp.books(6), 'ai_calls 0+3 (0), call_seconds 0+250 (0); 1000, 1000 held', 'all of them held');
select is(pg_temp.call(60, 0, 'busy'), 'applied', 'The first is busy');
select is(pg_temp.release(63), '63 for 100', 'Its seconds go to another, which needs no credit');
select is(pg_temp.call(61, 100), 'applied', 'One that was to be paid in part');
select is(pg_temp.charge(61), null, 'finds seconds of the plan');
select is(pg_temp.call(63, 100) || pg_temp.call(62, 50), 'appliedapplied', 'The others');
select is(pg_temp.charge(63) || ', ' || pg_temp.charge(62),
  '50 of 50 s, 0 on the invoice: 500, 0 not collected, 50 of 50 s, 0 on the invoice: 500, 0 not collected', 'pay for the rest');
select is(pg_temp.books(6), 'ai_calls 3+0 (0), call_seconds 250+0 (100); 0, 0 held', 'exactly');
select isnt(private.subscribe_organization(pg_temp.org(6), 'hold-more', 'active', private.clock_now()), null, 'A larger plan');
select is(pg_temp.release(64, 65, 66), '64 for 100, 65 for 100, 66 for 50', 'includes what credit has not paid already');

select pg_temp.tenant(7, 'hold-calls');
select isnt(pg_temp.buy(7, 1000), null, 'The same of calls:');
select is(pg_temp.release(70, 71, 72, 73), '70 for 100, 71 for 100, 72 for 100', 'two are included and one is paid');
select is(pg_temp.call(70, 0, 'busy'), 'applied', 'One of the two is busy');
select is(pg_temp.release(73), '73 for 100', 'and another is included');

-- Prices.
select is(
  (select string_agg(private.credit_cost(seconds, row(null, null, 0, null, 1, null, false, price, unit, pulse, 'per_unit', null, null)::public.plan_price_meters)::text, ' ' order by place)
    from unnest(array[1, 3, 30, 20, 61, 61], array[1, 1, 100, 100, 600, 600], array[2, 2, 60, 60, 60, 60], array[1, 1, 1, 1, 60, 1])
      with ordinality as call (seconds, price, unit, pulse, place)),
  '1 2 50 33 1200 610', 'A call is rounded once, half away from zero, after its pulses'
);
insert into public.plan_prices (id, plan_id, version)
values ('00000000-0000-4000-b000-0000000000f7', '00000000-0000-4000-a000-0000000000f2', 2);
select throws_ok(statement, '23514', null, statement)
from unnest(array[
  $$ insert into public.plan_price_meters (plan_price_id, meter_key, credit_price_minor, overage_price_minor)
     values ('00000000-0000-4000-b000-0000000000f7', 'ai_calls', 1, 1) $$,
  $$ insert into public.plan_price_meters (plan_price_id, meter_key, credit_price_minor)
     select '00000000-0000-4000-b000-0000000000f7', key, 1 from public.meters where key not in ('ai_calls', 'call_seconds') limit 1 $$,
  $$ delete from public.call_charges $$
]) as statement;

select is_empty('select * from private.check_holds()', 'In the end nothing is held but by who may hold it');
select is_empty('select * from private.check_credit()', 'and every balance is what its entries make');
select * from finish();
rollback;
