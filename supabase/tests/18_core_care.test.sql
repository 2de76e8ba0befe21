-- Consent, the series of the caller's number, ceilings on cost, and calls that nobody speaks on.
begin;
set local search_path = public, extensions, tap;
select plan(37);

-- The business time is Tuesday, 24 November 2026, 10:00 in Kolkata. One plan without limits, one of three calls, one carrier account.
insert into private.clock_offset (shift) values (timestamptz '2026-11-24 10:00+05:30' - now())
on conflict (single) do update set shift = excluded.shift;
insert into public.subscription_plans (id, slug, name)
values ('00000000-0000-4000-a000-0000000000c1', 'core-plenty', 'Plenty'), ('00000000-0000-4000-a000-0000000000c2', 'core-three', 'Three');
insert into public.plan_prices (id, plan_id, version)
values
  ('00000000-0000-4000-b000-0000000000c1', '00000000-0000-4000-a000-0000000000c1', 1),
  ('00000000-0000-4000-b000-0000000000c2', '00000000-0000-4000-a000-0000000000c2', 1);
insert into public.plan_price_meters (plan_price_id, meter_key, included_units, limit_units, hard)
values ('00000000-0000-4000-b000-0000000000c2', 'ai_calls', 3, 3, true);
insert into public.carrier_accounts (id, provider, account_sid, credentials_sealed, api_base, max_concurrent_calls)
values ('00000000-0000-4000-c000-000000000001', 'plivo', 'MATEST', 'sealed', 'https://carrier.example.test', 1000);

create function pg_temp.tenant(number integer, plan text default 'core-plenty') returns uuid
language plpgsql as $$
declare
  tenant uuid := '00000000-0000-4000-8000-' || lpad('c' || number, 12, '0');
begin
  insert into public.organizations (id, name, max_concurrent_calls) values (tenant, 'Tenant ' || number, 1000);
  perform private.subscribe_organization(tenant, plan, 'active', private.clock_now());
  insert into public.caller_numbers (organization_id, carrier_account_id, phone_number)
  values (tenant, '00000000-0000-4000-c000-000000000001', '+9180990000' || number);
  return tenant;
end
$$;
-- A running campaign of leads with the numbers +9170000000xx, in a project of its own.
create function pg_temp.campaign(tenant uuid, numbers integer[], calls integer default 1000, attempts integer default 3) returns uuid
language plpgsql as $$
declare
  made public.campaigns;
begin
  insert into public.projects (organization_id, name) values (tenant, 'Project') returning id into made.project_id;
  insert into public.leads (organization_id, project_id, name, phone)
  select tenant, made.project_id, 'Lead ' || number, '+917000' || lpad(number::text, 6, '0') from unnest(numbers) as number;
  insert into public.campaigns (organization_id, project_id, name, max_concurrent_calls, max_attempts)
  values (tenant, made.project_id, 'Campaign', calls, attempts)
  returning * into made;
  perform private.enrol_leads(made, null, private.clock_now());
  insert into public.call_queue (organization_id, campaign_id, lead_id, next_retry_at, max_attempts)
  select tenant, made.id, member.lead_id, private.clock_now(), attempts from public.campaign_leads as member where member.campaign_id = made.id;
  update public.campaign_leads set status = 'queued' where campaign_id = made.id;
  update public.campaigns set status = 'running' where id = made.id;
  return made.id;
end
$$;
-- Releases at a business time and tells which of the test's numbers got an attempt.
create function pg_temp.release(at timestamptz default private.clock_now(), calls integer default 500) returns text
language plpgsql as $$
declare
  released jsonb := private.release_calls(jsonb_build_object('v', 1, 'limit', calls), at);
begin
  return (
    select coalesce(string_agg(right(log.callee_number, 6)::integer::text, ' ' order by log.callee_number), 'none')
    from jsonb_array_elements(released -> 'attempts') as attempt
    join public.call_logs as log on log.id = (attempt ->> 'id')::uuid and log.callee_number like '+917000%'
  );
end
$$;
create function pg_temp.attempt(number integer) returns public.call_logs
language sql as $$
  select log from public.call_logs as log where log.callee_number = '+917000' || lpad(number::text, 6, '0') order by log.id desc limit 1
$$;
-- A queue row in words: its state, why it waits, and until when in Kolkata.
create function pg_temp.queue(number integer) returns text
language sql as $$
  select concat_ws(' ', queue.status, queue.wait_reason, queue.last_error,
    case when queue.status = 'queued' then to_char(queue.next_retry_at at time zone 'Asia/Kolkata', 'DD HH24:MI') end)
  from public.call_queue as queue
  join public.leads as lead on lead.id = queue.lead_id
  where lead.phone = '+917000' || lpad(number::text, 6, '0')
$$;
create function pg_temp.begin(variadic numbers integer[]) returns text
language plpgsql as $$
declare
  begun jsonb := private.begin_dials(
    jsonb_build_object(
      'v', 1, 'lease_token', '00000000-0000-4000-d000-000000000001',
      'attempts', (select jsonb_agg((pg_temp.attempt(number)).id) from unnest(numbers) as number)
    ),
    private.clock_now()
  );
begin
  return (
    select coalesce(string_agg(told.word, ' ' order by told.word), 'none')
    from (
      select right(dial ->> 'to', 6)::integer::text as word from jsonb_array_elements(begun -> 'dials') as dial
      union all
      select skip ->> 'reason' from jsonb_array_elements(begun -> 'skipped') as skip
    ) as told
  );
end
$$;
create function pg_temp.record(number integer, result jsonb) returns text
language sql as $$
  select private.record_dials(
    jsonb_build_object('v', 1, 'results', jsonb_build_array(jsonb_build_object('attempt_id', (pg_temp.attempt(number)).id) || result)),
    private.clock_now()
  ) ->> 'recorded'
$$;
create function pg_temp.event(number integer, kind text, call jsonb, key text default null, source text default 'plivo') returns text
language sql as $$
  select private.apply_event(
    jsonb_build_object(
      'v', 1, 'source', source, 'source_id', '00000000-0000-4000-c000-000000000001', 'kind', kind, 'attempt_id', (pg_temp.attempt(number)).id,
      'dedupe_key', coalesce(key, gen_random_uuid()::text), 'verified', true, 'headers', '{}'::jsonb, 'body', 'CallUUID=1', 'call', call
    ),
    private.clock_now()
  ) ->> 'result'
$$;
create function pg_temp.member(number integer) returns text
language sql as $$
  select concat_ws(' ', member.status, member.skip_reason)
  from public.campaign_leads as member
  join public.leads as lead on lead.id = member.lead_id
  where lead.phone = '+917000' || lpad(number::text, 6, '0')
$$;
create function pg_temp.at(moment text) returns timestamptz
language sql as $$ select ('2026-11-' || moment || '+05:30')::timestamptz $$;
-- Business time goes on; the real time of this transaction stands still.
create function pg_temp.set_clock(moment text) returns void
language sql as $$ update private.clock_offset set shift = pg_temp.at(moment) - now() $$;

create function pg_temp.org(number integer) returns uuid
language sql immutable as $$ select ('00000000-0000-4000-8000-' || lpad('c' || number, 12, '0'))::uuid $$;
create function pg_temp.waiting(number integer) returns text
language sql as $$
  select private.campaign_json(campaign.id, private.clock_now()) ->> 'waiting'
  from public.campaigns as campaign where campaign.organization_id = pg_temp.org(number)
$$;
create function pg_temp.hang_up(number integer, outcome public.call_outcome, moment timestamptz default private.clock_now()) returns void
language sql as $$
  select private.end_attempt(pg_temp.attempt(number), outcome, moment)
$$;

create function pg_temp.end_all(outcome public.call_outcome) returns void
language plpgsql as $$
declare
  log public.call_logs;
begin
  for log in select live.* from public.call_logs as live where live.status <> 'ended' order by live.id loop
    log.dialled := outcome <> 'capacity';
    log.submitted_at := private.clock_now();
    perform private.end_attempt(log, outcome, private.clock_now());
  end loop;
end
$$;
create function pg_temp.live() returns integer
language sql as $$ select count(*)::integer from public.call_logs where status <> 'ended' $$;

create function pg_temp.agrees(number integer, tenant integer, until timestamptz default null) returns void
language sql as $$
  insert into public.consents (organization_id, phone_number, scope, consent_text, source, proof, granted_at, expires_at)
  values (
    pg_temp.org(tenant), '+917000' || lpad(number::text, 6, '0'), 'call_promotional', 'Call me', 'written', '{"page": 1}', '2026-11-01', until
  )
$$;

-- Consent: who sells calls nobody who has not agreed.
select pg_temp.campaign(pg_temp.tenant(1), array[1, 2, 3, 4, 5]);
update public.campaigns set purpose = 'promotional';
insert into public.caller_numbers (organization_id, carrier_account_id, phone_number, registration_id)
values (pg_temp.org(1), '00000000-0000-4000-c000-000000000001', '+911400000001', '1101');
select pg_temp.agrees(1, 1), pg_temp.agrees(2, 1, pg_temp.at('24 09:00')), pg_temp.agrees(3, 1), pg_temp.agrees(4, 1, pg_temp.at('24 10:05'));
update public.consents set revoked_at = pg_temp.at('24 09:30') where phone_number = '+917000000003';
select is(pg_temp.release(), '1 4', 'Who has agreed is called');
select is(pg_temp.member(5), 'skipped no_consent', 'who has not is not');
select is(pg_temp.member(2), 'skipped no_consent', 'nor whose consent is over');
select is(pg_temp.member(3), 'opted_out opted_out', 'nor who has taken it back');
select pg_temp.set_clock('24 10:06');
select is(pg_temp.begin(1, 4), '1 no_consent', 'Over at the last moment, it still counts');
select is(pg_temp.member(4), 'skipped no_consent', 'for good');
select is((pg_temp.attempt(1)).caller_number, '+911400000001', 'Who sells calls from the series of promotion');
select is(
  (select concat_ws(' ', caller_series, registration_id) from private.dial_evidence where attempt_id = (pg_temp.attempt(1)).id), '+91140 1101',
  'and keeps which, and under which registration'
);

select pg_temp.set_clock('24 10:00');

-- Series.
select pg_temp.end_all('answered');
select pg_temp.campaign(pg_temp.tenant(2), array[11, 12]);
update public.campaigns set purpose = 'promotional' where organization_id = pg_temp.org(2);
select pg_temp.agrees(11, 2), pg_temp.agrees(12, 2);
select is(pg_temp.release(), 'none', 'From an ordinary number nobody is called who is sold something');
select is(pg_temp.queue(11), 'queued no_caller_series 24 11:00', 'and told why');
insert into public.caller_numbers (organization_id, carrier_account_id, phone_number)
values (pg_temp.org(2), '00000000-0000-4000-c000-000000000001', '+911400000002');
select is(pg_temp.release(pg_temp.at('24 11:00')), 'none', 'nor from one of the series without a registration');
update public.caller_numbers set registration_id = '1102' where phone_number = '+911400000002';
select is(pg_temp.release(pg_temp.at('24 12:00')), '11 12', 'With one they are');
select pg_temp.end_all('answered');
select pg_temp.campaign(pg_temp.tenant(3), array[21]);
update public.caller_numbers set phone_number = '+911400000003', registration_id = '1103' where organization_id = pg_temp.org(3);
select is(pg_temp.release(), 'none', 'The series of promotion serves nobody else');
select is(private.may_call_from('+12125550100', null, 'US', 'promotional'), true, 'Where there are no series, any number will do');
select is(private.may_call_from('+12125550100', null, 'IN', 'service'), false, 'but no foreign one where there are');
select is(private.may_call_from('+911600000001', null, 'IN', 'service'), false, 'A bank''s series is registered');
select is(private.may_call_from('+911600000001', '1', 'IN', 'service'), true, 'and then may be used');

-- A breaker that opened since the release.
update public.campaigns set status = 'paused' where status = 'running';
select pg_temp.campaign(pg_temp.tenant(4), array[31, 32]);
select is(pg_temp.release(), '31 32', 'Two are released');
insert into private.breakers (scope, is_open, since, retry_at)
select id, true, private.clock_now(), private.clock_now() + interval '1 minute' from public.campaigns where organization_id = pg_temp.org(4);
select is(pg_temp.begin(31), 'circuit_open', 'and not begun if the breaker of their campaign opened meanwhile');
select is(pg_temp.queue(31), 'queued circuit_open circuit_open 24 10:01', 'They wait for it');
update private.breakers set retry_at = private.clock_now();
select is(pg_temp.begin(32), '32', 'The one that tries whether it is over is begun');
delete from private.breakers;
select pg_temp.end_all('busy');

-- Ceilings.
update public.campaigns set status = 'paused' where status = 'running';
select pg_temp.campaign(pg_temp.tenant(5), array[41, 42, 43]);
update public.organizations set max_price_micros = 20000 where id = pg_temp.org(5);
select is(pg_temp.release(calls => 1) || ' ' || pg_temp.member(41), 'none skipped price_ceiling', 'Where the price is not known, nobody is called under a ceiling');
update public.organizations set max_price_micros = null where id = pg_temp.org(5);
select pg_temp.campaign(pg_temp.tenant(6), array[51, 52, 53, 54]);
update private.destinations set price_micros = 20000 where prefix = '+91';
update public.organizations set max_price_micros = 20000, max_hourly_cost_micros = 50000, hourly_cost_currency = 'INR' where id = pg_temp.org(6);
select is(pg_temp.release(calls => 1), '51', 'What costs no more is called');
select pg_temp.begin(51);
select pg_temp.event(51, 'hangup', '{"provider_call_id": "c-51", "status": "ended", "outcome": "answered", "bill_duration_seconds": 60, "cost_micros": 60000, "cost_currency": "INR"}');
update public.call_logs set carrier_cost_micros = 60000, carrier_cost_currency = 'INR' where id = (pg_temp.attempt(51)).id;
select is(pg_temp.release(), 'none', 'An hour''s cost is reached');
select is(pg_temp.waiting(6), '{"spend_ceiling": 3}', 'and told');
update public.call_logs set carrier_cost_micros = 40000 where id = (pg_temp.attempt(51)).id;
select is(pg_temp.release(calls => 1), '52', 'Below it the calls go on');
select pg_temp.begin(52);
select pg_temp.event(52, 'hangup', '{"provider_call_id": "c-52", "status": "ended", "outcome": "answered", "bill_duration_seconds": 60}');
update public.call_logs set carrier_cost_micros = 1, carrier_cost_currency = 'USD' where id = (pg_temp.attempt(52)).id;
select is(pg_temp.waiting(6), '{"spend_ceiling": 2}', 'What cannot be compared stops them');
select is(pg_temp.release(private.clock_now() + interval '61 minutes', 1), '53', 'for an hour');
select pg_temp.end_all('answered');

-- Calls that nobody speaks on.
update public.campaigns set status = 'paused' where status = 'running';
select pg_temp.set_clock('25 10:00');
select pg_temp.campaign(pg_temp.tenant(7), array(select generate_series(61, 100)));
select throws_ok($$update public.campaigns set ring_timeout_seconds = 19$$, '23514', null, 'Nobody gets less than four rings');
select pg_temp.release(calls => 40);
create function pg_temp.answers(numbers integer[], first_audio integer, stream text default null) returns void
language plpgsql as $$
declare
  log public.call_logs;
begin
  for log in select leg.* from unnest(numbers) as number cross join lateral pg_temp.attempt(number) as leg loop
    update public.call_logs set dialled = true, answered_at = private.clock_now(), first_audio_ms = first_audio, stream_status = stream where id = log.id;
    select own.* into log from public.call_logs as own where own.id = log.id;
    perform private.end_attempt(log, 'answered', private.clock_now());
  end loop;
end
$$;
create function pg_temp.tally() returns text
language sql as $$
  select format('%s %s of %s', campaign.status, tally.abandoned, tally.answered)
  from public.campaigns as campaign
  join private.campaign_days as tally on tally.campaign_id = campaign.id
  where campaign.organization_id = pg_temp.org(7)
$$;
select pg_temp.answers(array[61], 2001);
select is(pg_temp.tally(), 'running 1 of 1', 'One call of a few says nothing yet');
select pg_temp.answers(array(select generate_series(62, 93)), 900);
select pg_temp.answers(array[94], null, 'failed');
select is(pg_temp.tally(), 'paused 2 of 34', 'Two of 34 are more than three in a hundred');
select is((select pause_reason from public.campaigns where organization_id = pg_temp.org(7)), 'abandoned_calls', 'which is why it is paused');
select is(
  (select payload ->> 'reason' from private.outbox where organization_id = pg_temp.org(7) and topic = 'campaign.paused'), 'abandoned_calls', 'and its owners are told'
);
select is((select count(*) from private.outbox where organization_id = pg_temp.org(7) and topic = 'alarm.abandoned_calls'), 1::bigint, 'the operator too');
update public.call_logs set machine = true where id = (pg_temp.attempt(94)).id;
select is(pg_temp.tally(), 'paused 1 of 33', 'A machine that is heard of later was no person');
update public.campaigns set status = 'running' where organization_id = pg_temp.org(7);
select pg_temp.answers(array[95, 96], 2000);
select is(pg_temp.tally(), 'running 1 of 35', 'Two seconds are in time');
select pg_temp.answers(array[97], null);
select is(pg_temp.tally(), 'running 1 of 36', 'What nobody measured is not held against it');

select * from finish();
rollback;
