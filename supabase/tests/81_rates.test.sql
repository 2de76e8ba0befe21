-- What calls are sold for by where they go: the longest prefix, pulses, versions, who is not called; what they cost, and what is left.
begin;
set local search_path = public, extensions, tap;
select plan(81);

-- Tuesday, 24 November 2026, 10:00 in Kolkata.
insert into private.clock_offset (shift) values (timestamptz '2026-11-24 10:00+05:30' - now())
on conflict (single) do update set shift = excluded.shift;
insert into private.billing_issuer (legal_name, state_code, country_code, timezone)
values ('Issuer', 'KA', 'IN', 'Asia/Kolkata')
on conflict on constraint billing_issuer_pkey do update set state_code = 'KA', country_code = 'IN', timezone = 'Asia/Kolkata';
update public.subscriptions set next_invoice_at = null, trial_ends_at = 'infinity';
update public.invoices set past_due_at = now() where status = 'open';
insert into public.carrier_accounts (id, provider, account_sid, credentials_sealed, api_base, max_concurrent_calls)
values ('00000000-0000-4000-c000-000000000076', 'plivo', 'MARATE', 'sealed', 'https://carrier.example.test', 1000);

create function pg_temp.at(instant timestamptz) returns void
language sql as $$
  insert into private.clock_offset (shift) values (instant - now()) on conflict (single) do update set shift = excluded.shift
$$;
create function pg_temp.org(n integer) returns uuid
language sql immutable as $$ select ('00000000-0000-4000-8000-0000000076' || lpad(n::text, 2, '0'))::uuid $$;
create function pg_temp.phone(number integer) returns text
language sql immutable as $$ select '+9170000' || lpad(number::text, 5, '0') $$;
create function pg_temp.refusal(query text) returns text
language plpgsql as $$
begin
  execute query;
  return 'none';
exception
  when sqlstate 'PGRST' then return sqlerrm::jsonb ->> 'code';
  when others then return sqlstate;
end
$$;
-- What a deck says: "prefix price connection minimum initial/next", a line each.
create function pg_temp.load(deck text, valid_from timestamptz, lines text[], kind text default 'sell', currency text default 'INR') returns text
language sql as $$
  select answer ->> 'result' || ' ' || (answer ->> 'version')
  from private.set_rates(deck, kind, currency, valid_from, (
    select jsonb_agg(jsonb_build_object(
      'prefix', word[1], 'destination', 'To ' || word[1], 'price_micros', nullif(word[2], '-'), 'connection_micros', word[3], 'minimum_micros', word[4],
      'initial_pulse', split_part(word[5], '/', 1), 'next_pulse', split_part(word[5], '/', 2)
    ))
    from unnest(lines) as line cross join lateral (select string_to_array(line, ' ') as word) as words
  ), private.clock_now()) as answer
$$;
create function pg_temp.charged(pulses text, seconds bigint, price bigint default 60, connection bigint default 0, minimum bigint default 0) returns text
language sql as $$
  select charged_seconds || ' ' || amount
  from private.rate_seconds(
    row(null, '+1', 'x', price, connection, minimum, split_part(pulses, '/', 1), split_part(pulses, '/', 2))::private.rates, seconds)
$$;

-- Pulses.
select is(
  (select string_agg(split_part(pg_temp.charged(pulses, seconds), ' ', 1), ' ' order by place)
   from unnest(
     array['60/60', '60/60', '60/60', '1/1', '1/1', '30/6', '30/6', '30/6', '30/6', '60/1', '60/1', '6/6', '60/60'],
     array[1, 60, 61, 1, 61, 1, 30, 31, 37, 59, 61, 7, 0]) with ordinality as call (pulses, seconds, place)),
  '60 60 120 1 61 30 30 36 42 60 61 12 0', 'An answered call is charged its first pulse, and then started next ones'
);
select is(pg_temp.charged('1/1', 61, 1000000, 100000), '61 67000000', 'What a connection costs comes on top');
select is(pg_temp.charged('1/1', 1, 1000000, 0, 50000), '1 3000000', 'and the minimum is what it costs at least');
select is(pg_temp.charged('1/1', 61, 1000000, 0, 50000), '61 61000000', 'not more');
select is(pg_temp.charged('1/1', 0, 1000000, 100000, 50000), '0 0', 'Nothing is charged for who did not answer');
-- Seven calls of 61 seconds: fourteen minutes by the call, as in the shared cases.
select is((select sum(split_part(pg_temp.charged('60/60', 61), ' ', 1)::bigint) / 60 from generate_series(1, 7))::integer, 14, 'Pulses are by the call');

-- Decks.
select is(
  pg_temp.load('retail', '2026-11-01', array['+91700000001 333333 100000 0 30/6', '+917000000013 1000000 0 50000 1/1', '+917000000014 - 0 0 1/1']),
  'added 1', 'A deck is loaded'
);
select is(
  pg_temp.load('retail', '2026-11-01', array['+917000000013 1000000 0 50000 1/1', '+91700000001 333333 100000 0 30/6', '+917000000014 - 0 0 1/1']),
  'unchanged 1', 'the same again is no version'
);
select is(
  pg_temp.load('retail', '2026-12-02 10:00+05:30', array['+91700000001 666666 100000 0 30/6', '+917000000013 2000000 0 50000 1/1']), 'added 2', 'another is one'
);
select is(pg_temp.refusal($$select pg_temp.load('retail', '2026-12-01', array['+1 1 0 0 1/1'], 'sell', 'USD')$$), 'rate_deck_differs', 'A deck keeps its currency');
select is(pg_temp.refusal($$select private.set_rates('bare', 'sell', 'INR', now(), '[]', now())$$), 'rates_missing', 'An empty deck is a mistake');
select throws_ok('delete from private.rates', '23514', null, 'What was sold does not change');
select throws_ok('update private.rate_deck_versions set valid_from = now()', '23514', null, 'nor when it began');
select is(
  (select string_agg((private.find_rate(private.deck_version('retail', at), phone)).prefix, ' ' order by place)
   from unnest(
     array['+917000000013', '+917000000012', '+9170000000130', '+917000000014', '+917000000099', '+1', ''],
     array_fill('2026-11-30'::timestamptz, array[7])) with ordinality as call (phone, at, place)),
  '+917000000013 +91700000001 +917000000013 +917000000014', 'The longest prefix decides'
);
select is(
  (select string_agg(coalesce((private.find_rate(private.deck_version('retail', at), '+917000000011')).price_micros::text, 'none'), ' ' order by at)
   from unnest(array['2026-10-31T23:59:59Z', '2026-11-01', '2026-12-02T04:29:59Z', '2026-12-02T04:30Z']::timestamptz[]) as at),
  'none 333333 333333 666666', 'of the version that holds at that moment'
);
-- A large deck is not read as a whole.
select private.set_rates('large', 'sell', 'INR', '2026-11-01', (
  select jsonb_agg(jsonb_build_object('prefix', '+' || number, 'destination', 'x', 'price_micros', number)) from generate_series(10000, 29999) as number
), private.clock_now());
analyze private.rates;
create function pg_temp.plan_of(query text) returns jsonb
language plpgsql as $$
declare
  found jsonb;
begin
  execute 'explain (format json, analyze, timing off) ' || query into found;
  return found;
end
$$;
select is(
  (select bool_and(node ->> 'Relation Name' = 'rates' and node ->> 'Index Name' = 'rates_pkey' and (node ->> 'Actual Rows')::numeric <= 15)
   from jsonb_path_query(pg_temp.plan_of($$
     select own.* from private.rates as own
     where own.version_id = private.deck_version('large', '2026-11-24')
       and own.prefix = any (array(select left('+12345678901', size) from generate_series(2, least(length('+12345678901'), 16)) as size))
     order by length(own.prefix) desc limit 1
   $$), 'strict $.** ? (exists (@."Relation Name"))') as node),
  true, 'and is found by the key'
);
select is((private.find_rate(private.deck_version('large', '2026-11-24'), '+12345678901')).prefix, '+12345', 'the longest of twenty thousand');

-- Plans: Deck is 999.00 a month and sells calls by deck.
insert into public.subscription_plans (slug, name) values ('rate-deck', 'Deck'), ('rate-dollar', 'Dollar');
create function pg_temp.price(plan text, money text, deck text) returns text
language plpgsql as $$
declare
  made uuid := private.set_plan_price(plan, 'monthly', money, jsonb_build_object(
    'base_minor', 99900, 'meters', jsonb_build_object('call_seconds', '{"included_units": -1}'::jsonb, 'rated_calls', jsonb_build_object('rate_deck', deck))
  ), private.clock_now());
begin
  return (
    select term.overage_price_minor || ' for ' || term.overage_unit || ', version ' || price.version
    from public.plan_prices as price
    join public.plan_price_meters as term on term.plan_price_id = price.id and term.meter_key = 'rated_calls'
    where price.id = made
  );
end
$$;
select pg_temp.load('dollar', '2026-11-01', array['+1 10000 0 0 1/1', '+91 20000 0 0 60/60'], 'sell', 'USD');
select pg_temp.load('yen', '2026-11-01', array['+81 1000000 0 0 1/1'], 'sell', 'JPY');
select is(pg_temp.price('rate-deck', 'INR', 'retail'), '1 for 600000, version 1', 'A price names the deck');
select is(pg_temp.price('rate-deck', 'INR', 'retail'), '1 for 600000, version 1', 'The same is no version');
select is(pg_temp.price('rate-dollar', 'JPY', 'yen'), '1 for 60000000, version 1', 'By the decimals of its currency');
select is(pg_temp.refusal($$select pg_temp.price('rate-deck', 'INR', 'dollar')$$), 'unknown_rate_deck', 'A deck is in the currency of its price');
select is(pg_temp.refusal($$select pg_temp.price('rate-deck', 'INR', 'none')$$), 'unknown_rate_deck', 'and is there');

-- An organization each: its ten leads are 10n to 10n+9.
create function pg_temp.tenant(n integer, plan text default 'rate-deck') returns void
language plpgsql as $$
declare
  made public.campaigns;
begin
  insert into public.organizations (id, name, state_code, max_concurrent_calls) values (pg_temp.org(n), 'Rated ' || n, 'KA', 1000);
  perform private.subscribe_organization(pg_temp.org(n), plan, 'active', private.clock_now());
  insert into public.caller_numbers (organization_id, carrier_account_id, phone_number)
  values (pg_temp.org(n), '00000000-0000-4000-c000-000000000076', '+91809976000' || n);
  insert into public.leads (organization_id, name, phone)
  select pg_temp.org(n), 'Lead ' || number, pg_temp.phone(number) from generate_series(10 * n, 10 * n + 9) as number;
  insert into public.campaigns (organization_id, name, max_concurrent_calls, max_call_seconds, auto_complete)
  values (pg_temp.org(n), 'Rated campaign ' || n, 1000, 600, false)
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
    select coalesce(string_agg(right(log.callee_number, 5)::integer::text, ' ' order by log.callee_number), 'none')
    from jsonb_array_elements(released -> 'attempts') as attempt
    join public.call_logs as log on log.id = (attempt ->> 'id')::uuid
  );
end
$$;
create function pg_temp.call(number integer, seconds integer, cost bigint default null, money text default 'USD') returns text
language plpgsql as $$
begin
  perform public.begin_dials(jsonb_build_object('v', 1, 'lease_token', gen_random_uuid(), 'attempts', jsonb_build_array((pg_temp.attempt(number)).id)));
  return public.apply_event(jsonb_build_object(
    'v', 1, 'source', 'plivo', 'source_id', '00000000-0000-4000-c000-000000000076', 'kind', 'call', 'attempt_id', (pg_temp.attempt(number)).id,
    'dedupe_key', gen_random_uuid(), 'verified', true, 'headers', '{}'::jsonb, 'body', '',
    'call', jsonb_strip_nulls(jsonb_build_object(
      'provider_call_id', 'call-' || (pg_temp.attempt(number)).id, 'status', 'ended', 'outcome', case when seconds > 0 then 'answered' else 'no_answer' end,
      'bill_duration_seconds', seconds, 'cost_micros', cost, 'cost_currency', case when cost is not null then money end
    ))
  )) ->> 'result';
end
$$;
create function pg_temp.correct(number integer, seconds integer) returns text
language sql as $$
  select (private.apply_call_event('reconcile', '00000000-0000-4000-c000-000000000076', (pg_temp.attempt(number)).id, jsonb_build_object(
    'provider_call_id', 'call-' || (pg_temp.attempt(number)).id, 'status', 'ended', 'outcome', 'answered', 'bill_duration_seconds', seconds
  ), private.clock_now())).result::text
$$;
create function pg_temp.rated(number integer) returns text
language sql as $$
  select string_agg(format('%s %s/%s s: %s by %s', own.prefix, own.seconds, own.charged_seconds, own.amount, version.version), '; ' order by own.number)
  from private.call_ratings as own
  left join private.rate_deck_versions as version on version.id = own.version_id
  where own.call_log_id = (pg_temp.attempt($1)).id
$$;
create function pg_temp.cost(number integer, kind text) returns text
language sql as $$
  select concat_ws(' ', own.amount_micros, own.currency, '*', own.exchange_rate, own.rate_day, '=', own.converted_micros, own.into_currency,
    case when own.is_estimated then 'estimated' end)
  from private.call_costs as own
  where own.call_log_id = (pg_temp.attempt(number)).id and own.kind = cost.kind
$$;
create function pg_temp.counted(n integer) returns text
language sql as $$
  select string_agg(format('%s: %s', log.period_start, log.usage_count), ', ' order by log.period_start)
  from public.usage_logs as log
  where log.organization_id = pg_temp.org(n) and log.feature_key = 'rated_calls'
$$;

-- Who has no price is not called.
select pg_temp.tenant(1), pg_temp.tenant(2), pg_temp.tenant(3);
select is(pg_temp.release(10, 11, 12, 13, 14, 20), '10 11 12 13', 'Nobody is called where the deck has no price');
select is(
  (select string_agg(member.status || ' ' || member.skip_reason, ', ')
   from public.campaign_leads as member join public.leads as lead on lead.id = member.lead_id
   where lead.phone in (pg_temp.phone(14), pg_temp.phone(20))),
  'skipped no_rate, skipped no_rate', 'whether it says so or says nothing, and the lead says why'
);

-- Rated when they end, in the same transaction; what the carrier asks is kept at the exchange rate of the day.
select private.set_exchange_rate('USD', 'INR', '2026-11-20', 88.5, private.clock_now());
select private.set_exchange_rate('USD', 'INR', '2026-10-01', 80, private.clock_now());
select pg_temp.load('wholesale', '2026-11-01', array['+91 6000 0 0 60/60'], 'cost', 'USD');
insert into private.carrier_rate_decks (carrier_account_id, valid_from, deck_key)
values ('00000000-0000-4000-c000-000000000076', '2026-11-01', 'wholesale');
select is(pg_temp.call(10, 61, 4000), 'applied', 'A call of 61 seconds ends');
select is(pg_temp.rated(10), '+91700000001 61/66 s: 27999978 by 1', 'and is rated by the deck''s pulses');
select is(pg_temp.call(11, 7), 'applied', 'one of 7 seconds');
select is(pg_temp.rated(11), '+91700000001 7/30 s: 15999990 by 1', 'is charged its first pulse');
select is(pg_temp.call(12, 0), 'applied', 'nobody answers');
select is(pg_temp.rated(12), null, 'and pays');
select is(pg_temp.call(13, 61, 5000, 'EUR'), 'applied', 'one by another prefix');
select is(pg_temp.rated(13), '+917000000013 61/61 s: 61000000 by 1', 'is charged by the second');
select is(pg_temp.counted(1), '2026-11-24: 104999968', 'They are counted whole');
select is_empty($$ select * from private.check_usage(pg_temp.org(1)) $$, 'and all that was counted agrees');
select is(pg_temp.cost(10, 'carrier'), '4000 USD * 88.5 2026-11-20 = 354000 INR', 'The carrier''s cost is kept with its exchange rate');
select is(pg_temp.cost(11, 'carrier'), '6000 USD * 88.5 2026-11-20 = 531000 INR estimated', 'What it has not told yet is estimated by its price list');
select is(pg_temp.cost(12, 'carrier'), null, 'A call that was not answered costs nothing');
select is(pg_temp.cost(13, 'carrier'), '5000 EUR * = INR', 'What has no exchange rate waits for one');
select is(private.set_exchange_rate('EUR', 'INR', '2026-11-24', 100.25, private.clock_now()), 1::bigint, 'A rate that comes later');
select is(pg_temp.cost(13, 'carrier'), '5000 EUR * 100.25 2026-11-24 = 501250 INR', 'is taken by what waited');
select is(private.set_exchange_rate('USD', 'INR', '2026-11-24', 90, private.clock_now()), 0::bigint, 'One that is newer');
select is(pg_temp.cost(10, 'carrier'), '4000 USD * 88.5 2026-11-20 = 354000 INR', 'changes nothing that was converted');

-- The carrier's own records: other seconds are rated at the call's price, another cost at its exchange rate.
insert into private.carrier_checks (carrier_account_id, day) values ('00000000-0000-4000-c000-000000000076', '2026-11-24');
select public.store_carrier_records(jsonb_build_object(
  'v', 1, 'carrier_account_id', '00000000-0000-4000-c000-000000000076', 'day', '2026-11-24', 'records', jsonb_build_array(
    jsonb_build_object('provider_call_id', 'call-' || (pg_temp.attempt(10)).id, 'bill_duration_seconds', 61, 'cost_micros', 5001, 'cost_currency', 'USD'),
    jsonb_build_object('provider_call_id', 'call-' || (pg_temp.attempt(11)).id, 'bill_duration_seconds', 40, 'cost_micros', 6500, 'cost_currency', 'USD'))));
select is(pg_temp.cost(10, 'carrier'), '5001 USD * 88.5 2026-11-20 = 442589 INR', 'A cost is corrected at the exchange rate that it had');
select is(
  pg_temp.cost(11, 'carrier') || ', ' || (select first_micros from private.call_costs where call_log_id = (pg_temp.attempt(11)).id and kind = 'carrier'),
  '6500 USD * 88.5 2026-11-20 = 575250 INR, 6000', 'an estimate gives way, and what it was is kept'
);
select is(
  pg_temp.rated(11), '+91700000001 7/30 s: 15999990 by 1; +91700000001 40/42 s: 19999986 by 1', 'Seconds are corrected at the price of the call'
);
select is(pg_temp.counted(1), '2026-11-24: 108999964', 'and counted');
select is_empty($$ select * from private.check_usage(pg_temp.org(1)) $$, 'where they belong');

-- What the voice agent asks.
create function pg_temp.tell(number integer, kind text, cost bigint, money text default 'USD') returns text
language sql as $$
  select (private.apply_agent_event(
    jsonb_populate_record(null::private.webhook_events, jsonb_build_object(
      'source_id', 'x', 'payload', jsonb_build_object('event', kind, 'attempt_id', (pg_temp.attempt(number)).id, 'cost_micros', cost, 'cost_currency', money))),
    jsonb_populate_record(null::public.webhook_sources, jsonb_build_object('organization_id', pg_temp.org(number / 10), 'provider', 'vapi')),
    private.clock_now())).result::text
$$;
select is(pg_temp.tell(10, 'analyzed', 120000), 'applied', 'An agent tells what it costs');
select is(pg_temp.cost(10, 'agent'), '120000 USD * 90 2026-11-24 = 10800000 INR', 'which is kept likewise');
select pg_temp.tell(10, 'ended', 90000), pg_temp.tell(10, 'analyzed', 120000);
select is(pg_temp.cost(10, 'agent'), '120000 USD * 90 2026-11-24 = 10800000 INR', 'What is told earlier in the call''s life knows less');

-- A deck that was agreed with one customer; one in another currency is none, and nobody is called.
select is(
  pg_temp.refusal($$select private.set_organization_deck(pg_temp.org(2), 'dollar', '2026-11-01')$$), 'unknown_rate_deck', 'It is in the currency of the subscription'
);
select private.set_organization_deck(pg_temp.org(2), 'large', '2026-11-24T10:00+05:30'), pg_temp.load('agreed', '2026-11-01', array['+91 120000 0 0 60/60']);
select private.set_organization_deck(pg_temp.org(2), 'agreed', '2026-11-24T10:00+05:30');
select is(pg_temp.release(21), '21', 'By its own deck they are called');
select is(pg_temp.call(21, 61) || ' ' || pg_temp.rated(21), 'applied +91 61/120 s: 14400000 by 1', 'and pay its price');
insert into private.organization_rate_decks (organization_id, valid_from, deck_key) values (pg_temp.org(3), '2026-11-01', 'dollar');
select is(pg_temp.release(30), 'none', 'By a deck of another currency nobody is');

-- December: the second version. An old call that is corrected stays with the first.
select pg_temp.at('2026-12-02 09:59+05:30');
select is(pg_temp.release(16), '16', 'A call is let through a minute before');
select pg_temp.at('2026-12-02 10:00+05:30');
select is(pg_temp.call(16, 30) || ' ' || pg_temp.rated(16), 'applied +91700000001 30/30 s: 15999990 by 1', 'and is rated by what it was let through by');
select is(pg_temp.release(15), '15', 'A call in December');
select is(pg_temp.call(15, 30) || ' ' || pg_temp.rated(15), 'applied +91700000001 30/30 s: 25999980 by 2', 'is rated by December''s version');
select pg_temp.correct(13, 62);
select is(
  pg_temp.rated(13), '+917000000013 61/61 s: 61000000 by 1; +917000000013 62/62 s: 62000000 by 1', 'One of November that is corrected by November''s'
);

-- The line is the sum of the calls, rounded once, and its sheet adds up to it.
insert into auth.users (id, email) values (pg_temp.org(1), 'owner@rated.test'), (pg_temp.org(9), 'clerk@rated.test');
insert into public.roles (id, organization_id, name, permissions) values (pg_temp.org(9), pg_temp.org(1), 'Clerk', '["billing.view"]');
update public.profiles set organization_id = pg_temp.org(1), system_role = 'owner' where id = pg_temp.org(1);
update public.profiles set organization_id = pg_temp.org(1), system_role = 'member', role_id = pg_temp.org(9) where id = pg_temp.org(9);
create function pg_temp.line(n integer, nth integer, kind text) returns public.invoice_lines
language sql as $$
  select line
  from (select id from public.invoices where organization_id = pg_temp.org(n) order by invoice_number offset nth - 1 limit 1) as invoice
  join public.invoice_lines as line on line.invoice_id = invoice.id
  where line.meter_key = 'rated_calls' and line.kind = line.kind and line.kind = $3
$$;
create function pg_temp.sheet(who uuid, line public.invoice_lines) returns jsonb
language plpgsql as $$
declare
  answer jsonb;
begin
  perform set_config('request.jwt.claims', jsonb_build_object('sub', who, 'role', 'authenticated')::text, true);
  perform set_config('role', 'authenticated', true);
  answer := public.export_line_calls(line.invoice_id, line.position);
  perform set_config('role', 'postgres', true);
  perform set_config('request.jwt.claims', '', true);
  return answer;
end
$$;
create function pg_temp.adds_up(line public.invoice_lines) returns text
language sql as $$
  select format('%s of %s, %s of %s', sum((told ->> 6)::bigint), line.quantity, sum(round((told ->> 9)::numeric * 100))::bigint, line.amount_minor)
  from jsonb_array_elements(pg_temp.sheet(pg_temp.org(1), line) -> 'rows') as told
$$;
select isnt(private.close_periods('{"v": 1, "limit": 500}', '2026-12-24T01:00+05:30') ->> 'closed', '0', 'The period is billed');
select is(
  (select format('%s, %s for %s: %s', line.description, line.unit_price_minor, line.price_units, line.amount_minor) from pg_temp.line(1, 1, 'overage') as line),
  'Calls by destination beyond the plan: 2.533332, 1 for 600000: 253', 'Its line is their sum, rounded once'
);
select is(pg_temp.adds_up(pg_temp.line(1, 1, 'overage')), '151999934 of 151999934, 253 of 253', 'The sheet of its calls adds up to it');
select is(
  (select string_agg(concat_ws(' ', told ->> 4, told ->> 5, told ->> 9, told ->> 11, told ->> 12, told ->> 13, told ->> 14), '; ' order by place)
   from jsonb_array_elements(pg_temp.sheet(pg_temp.org(1), pg_temp.line(1, 1, 'overage')) -> 'rows') with ordinality as row (told, place)
   where told ->> 5 in ('62000000', '25999980')),
  '+917000000013 62000000 1.03 +917000000013 62 1.000000 1/1; +917000000015 25999980 0.43 +91700000001 30 0.666666 30/6',
  'each with its prefix, seconds, price and pulses'
);
select is(
  pg_temp.sheet(pg_temp.org(9), pg_temp.line(1, 1, 'overage')) #>> '{rows,0,4}', '…0010', 'Who may not see calls sees the end of a number'
);

-- What is corrected after the bill is on the next one, and its sheet too.
select pg_temp.at('2026-12-26 10:00+05:30');
select pg_temp.correct(13, 122), pg_temp.correct(10, 59);
select is(pg_temp.rated(13), '+917000000013 61/61 s: 61000000 by 1; +917000000013 62/62 s: 62000000 by 1; +917000000013 122/122 s: 122000000 by 1', 'A call is corrected late');
select isnt(private.close_periods('{"v": 1, "limit": 500}', '2027-01-24T01:00+05:30') ->> 'closed', '0', 'The next period is billed');
select is(
  pg_temp.adds_up(pg_temp.line(1, 2, 'adjustment')), '58000002 of 58000002, 97 of 97', 'An adjustment is the difference, and its sheet adds up'
);
select is(pg_temp.adds_up(pg_temp.line(1, 1, 'overage')), '151999934 of 151999934, 253 of 253', 'and the first one still does');
select is_empty(
  $$ select from jsonb_array_elements(pg_temp.sheet(pg_temp.org(1), pg_temp.line(1, 1, 'overage')) -> 'rows') as told where told ->> 5 = '122000000' $$,
  'without what came later'
);
select is_empty($$ select * from private.check_usage() where organization in (pg_temp.org(1), pg_temp.org(2)) $$, 'All that was counted agrees');

-- A plan with included seconds, credit, tiers and minutes that are started by the period: each line's sheet adds up to it too.
insert into public.subscription_plans (slug, name) values ('rate-talk', 'Talk');
select private.set_plan_price('rate-talk', 'monthly', 'INR', '{"base_minor": 100, "meters": {
  "ai_calls": {"included_units": 2, "overage_price_minor": 7},
  "call_seconds": {"included_units": 100, "credit_price_minor": 600, "credit_pulse": 60, "overage_price_minor": 901, "overage_unit": 60,
    "pricing_model": "graduated", "tiers": [{"up_to": 50, "unit_minor": 901}, {"unit_minor": 799, "flat_minor": 5}]}}}', private.clock_now());
select pg_temp.tenant(4, 'rate-talk');
select private.post_credit(pg_temp.org(4), 'purchase', 'INR', 1300, 'rate', private.clock_now());
select is(pg_temp.release(40, 41, 42, 43), '40 41 42 43', 'Four are called');
select pg_temp.call(40, 70), pg_temp.call(41, 90), pg_temp.call(42, 100), pg_temp.call(43, 133);
select pg_temp.correct(43, 125);
update public.profiles set organization_id = pg_temp.org(4) where id = pg_temp.org(1);
select isnt(private.close_periods('{"v": 1, "limit": 500}', '2027-01-26T01:00+05:30') ->> 'closed', '0', 'Their period is billed');
select pg_temp.at('2027-01-27 10:00+05:30');
select pg_temp.correct(42, 130), pg_temp.correct(40, 60);
select isnt(private.close_periods('{"v": 1, "limit": 500}', '2027-02-26T01:00+05:30') ->> 'closed', '0', 'and the next, with what came late');
select results_eq(
  $$ select line.kind || ' ' || line.meter_key || ' ' || pg_temp.adds_up(line)
     from public.invoices as bill join public.invoice_lines as line on line.invoice_id = bill.id
     where bill.organization_id = pg_temp.org(4) and line.meter_key is not null and line.kind <> 'fee' and line.quantity <> 0
     order by bill.invoice_number, line.position $$,
  array[
    'included ai_calls 2 of 2, 0 of 0', 'included call_seconds 100 of 100, 0 of 0', 'overage ai_calls 2 of 2, 14 of 14',
    'overage call_seconds 50 of 50, 751 of 751', 'overage call_seconds 115 of 115, 1531 of 1531',
    'adjustment call_seconds 20 of 20, 267 of 267'
  ],
  'Whatever pays for them, the calls of a line add up to it'
);

select is(
  (select string_agg(told ->> 6, ', ' order by line.position, told ->> 2)
   from public.invoice_lines as line
   cross join lateral jsonb_array_elements(pg_temp.sheet(pg_temp.org(1), line) -> 'rows') as told
   where line.organization_id = pg_temp.org(4) and line.meter_key = 'call_seconds' and line.kind = 'overage'),
  '40, 10, 115', 'What credit paid is no part of them'
);
select is(
  (select string_agg((told ->> 6) || ' ' || (told ->> 9), ', ' order by told ->> 6)
   from public.invoice_lines as line
   cross join lateral jsonb_array_elements(pg_temp.sheet(pg_temp.org(1), line) -> 'rows') as told
   where line.organization_id = pg_temp.org(4) and line.kind = 'adjustment'),
  '-10 -1.34, 30 4.01', 'one that became longer and one that became shorter'
);

-- Margins.
select is(
  (select format('%s calls, %s - %s - %s = %s, %s without exchange, %s estimated, invoiced %s', calls, revenue, carrier_cost, agent_cost, margin,
     without_exchange, estimated, invoiced)
   from private.margin('organization', '2026-11-01', '2026-12-01') where key = pg_temp.org(1)::text),
  '3 calls, 2.799999 - 1.519089 - 10.800000 = -9.519090, 0 without exchange, 0 estimated, invoiced ', 'What is left of an organization''s calls'
);
select is(
  (select string_agg(format('%s %s %s', name, calls, revenue), ', ' order by name collate "C") from private.margin('destination', '2026-11-01', '2026-12-01')
   where name like 'To %'),
  'To +91 1 0.240000, To +91700000001 2 0.766666, To +917000000013 1 2.033333', 'of the calls to a destination'
);
select is(
  (select string_agg(format('%s %s %s', name, calls, margin), ', ' order by name) from private.margin('campaign', '2026-11-01', '2027-01-01')
   where name like 'Rated%'),
  'Rated campaign 1 5 -9.899090, Rated campaign 2 1 -0.840000, Rated campaign 4 4 12.000000', 'and of a campaign''s'
);
select is(pg_temp.refusal($$select private.margin('day', now(), now())$$), 'invalid_grouping', 'By nothing else');
select is(
  (select invoiced from private.margin('organization', '2026-12-01', '2027-01-01') where key = pg_temp.org(1)::text), 1001.53,
  'What its invoices say is told beside it'
);
select * from finish();
rollback;
