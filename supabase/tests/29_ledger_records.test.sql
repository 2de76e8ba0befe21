-- The carrier's own records of a day: what differs is told, and seconds and costs are corrected at the price of the call.
begin;
set local search_path = public, extensions, tap;
select plan(14);

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

create function pg_temp.claim() returns text
language sql as $$ select concat_ws(' ', told ->> 'provider', told ->> 'next_page') from public.claim_carrier_check('{"v": 1}') as told $$;
create function pg_temp.store(records jsonb, next_page text default null) returns text
language sql as $$
  select public.store_carrier_records(jsonb_build_object(
    'v', 1, 'carrier_account_id', '00000000-0000-4000-c000-0000000000f1', 'day', ((now() - interval '4 hours') at time zone 'UTC')::date - 1, 'records', records,
    'next_page', next_page
  ))::text
$$;
create function pg_temp.record(number integer, seconds integer, cost bigint, hour integer default 12) returns jsonb
language sql as $$
  select jsonb_build_object(
    'provider_call_id', 'call-' || (pg_temp.attempt(number)).id, 'bill_duration_seconds', seconds, 'cost_micros', cost, 'cost_currency', 'USD',
    'started_at', (((now() - interval '4 hours') at time zone 'UTC')::date - 1 + make_interval(hours => hour)) at time zone 'UTC'
  )
$$;

-- Five calls of yesterday at 6.00 a minute by the second.
select pg_temp.tenant(4, 'hold-pay'), pg_temp.buy(4, 100000);
select pg_temp.release(40, 41, 42, 43, 44);
select pg_temp.call(number, 60) from generate_series(40, 43) as number;
update public.call_logs
set carrier_cost_micros = 9000, carrier_cost_currency = 'USD', begun_at = (((now() - interval '4 hours') at time zone 'UTC')::date - 1 + interval '12 hours') at time zone 'UTC'
where organization_id = pg_temp.org(4) and status = 'ended';
update public.carrier_accounts set is_active = false where id <> '00000000-0000-4000-c000-0000000000f1';
update public.carrier_accounts set created_at = private.clock_now() - interval '1 day';

select is(pg_temp.claim(), 'plivo', 'An account''s yesterday is fetched');
select is(pg_temp.claim(), '', 'by one at a time');
select is(pg_temp.store(jsonb_build_array(pg_temp.record(40, 60, 9000)), 'page-2'), '{"done": false}', 'A page is kept');
update private.carrier_checks set lease_until = now() - interval '1 second';
select is(pg_temp.claim(), 'plivo page-2', 'and gone on with by whoever comes next');
select is(
  pg_temp.store(
    jsonb_build_array(
      pg_temp.record(41, 90, 9000), pg_temp.record(42, 60, 12000), '{"provider_call_id": "stranger", "bill_duration_seconds": 5}'::jsonb,
      '{"provider_call_id": "of-another-day", "started_at": "2020-01-01T00:00:00Z"}'::jsonb
    )
  ),
  '{"done": true, "corrected": 2, "differences": 4}', 'With the last page the day is compared'
);
select results_eq(
  $$
    select kind, coalesce(attempt_id = any (array[(pg_temp.attempt(41)).id, (pg_temp.attempt(42)).id, (pg_temp.attempt(43)).id]), false), is_corrected
    from private.carrier_differences order by kind
  $$,
  $$ values ('attempt_without_record', true, false), ('call_without_attempt', false, false), ('other_cost', true, true), ('other_seconds', true, true) $$,
  'Each difference is a row'
);
select is((pg_temp.attempt(41)).bill_duration_seconds, 90, 'The seconds are the carrier''s');
select is((pg_temp.attempt(42)).carrier_cost_micros, 12000::bigint, 'and so is the cost');
select is(
  (select sum(charge.charged_minor) + (select sum(charged_minor) from private.call_corrections) from public.call_charges as charge where charge.organization_id = pg_temp.org(4)),
  2700::numeric, 'Thirty seconds more are paid at the price of the call'
);
select is((select string_agg(payload ->> 'differences', ' ') from private.outbox where topic = 'alarm.carrier_records_differ'), '3', 'The operator is told of the organization''s');
select is((select count(*) from private.carrier_records), 0::bigint, 'The records are not kept');
select is(pg_temp.claim(), '', 'A day is compared once');
select is(pg_temp.store('[{"provider_call_id": "late"}]'), '{"done": true, "corrected": 0, "differences": 0}', 'whoever comes late');
select is_empty('select * from private.check_holds()', 'What is held is untouched');

select * from finish();
rollback;
