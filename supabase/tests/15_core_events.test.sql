-- Events: applied once, in whatever order they come, and what the end of a call settles.
begin;
set local search_path = public, extensions, tap;
select plan(80);

-- The business time is Tuesday, 24 November 2026, 10:00 in Kolkata. One plan without limits, one of three calls, one carrier account.
insert into private.clock_offset (shift) values (timestamptz '2026-11-24 10:00+05:30' - now())
on conflict (single) do update set shift = excluded.shift;
update private.platform_dialling set retry_jitter = 0;
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
  select tenant, made.project_id, 'Lead ' || number, '+91700000' || lpad(number::text, 4, '0') from unnest(numbers) as number;
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
    select coalesce(string_agg(right(log.callee_number, 4)::integer::text, ' ' order by log.callee_number), 'none')
    from jsonb_array_elements(released -> 'attempts') as attempt
    join public.call_logs as log on log.id = (attempt ->> 'id')::uuid and log.callee_number like '+91700000%'
  );
end
$$;
create function pg_temp.attempt(number integer) returns public.call_logs
language sql as $$
  select log from public.call_logs as log where log.callee_number = '+91700000' || lpad(number::text, 4, '0') order by log.id desc limit 1
$$;
-- A queue row in words: its state, why it waits, and until when in Kolkata.
create function pg_temp.queue(number integer) returns text
language sql as $$
  select concat_ws(' ', queue.status, queue.wait_reason, queue.last_error,
    case when queue.status = 'queued' then to_char(queue.next_retry_at at time zone 'Asia/Kolkata', 'DD HH24:MI') end)
  from public.call_queue as queue
  join public.leads as lead on lead.id = queue.lead_id
  where lead.phone = '+91700000' || lpad(number::text, 4, '0')
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
      select right(dial ->> 'to', 4)::integer::text as word from jsonb_array_elements(begun -> 'dials') as dial
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
  where lead.phone = '+91700000' || lpad(number::text, 4, '0')
$$;
create function pg_temp.at(moment text) returns timestamptz
language sql as $$ select ('2026-11-' || moment || '+05:30')::timestamptz $$;
-- Business time goes on; the real time of this transaction stands still.
create function pg_temp.set_clock(moment text) returns void
language sql as $$ update private.clock_offset set shift = pg_temp.at(moment) - now() $$;

create function pg_temp.call(number integer) returns text
language sql as $$
  select concat_ws(' ', log.status, log.call_status, 'sid=' || log.call_sid, 'bill=' || log.bill_duration_seconds)
  from (select (pg_temp.attempt(number)).*) as log
$$;
create function pg_temp.usage(tenant integer) returns text
language sql as $$
  select string_agg(format('%s %s+%s', feature_key, usage_count, reserved), ', ' order by feature_key)
  from public.usage_logs where organization_id = ('00000000-0000-4000-8000-' || lpad('c' || tenant, 12, '0'))::uuid
$$;
create function pg_temp.dial(variadic numbers integer[]) returns void
language plpgsql as $$
begin
  perform pg_temp.begin(variadic numbers);
  perform pg_temp.record(number, jsonb_build_object('outcome', 'accepted', 'provider_call_id', 'call-' || number)) from unnest(numbers) as number;
end
$$;
select pg_temp.campaign(pg_temp.tenant(1), array[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
select pg_temp.release();
select pg_temp.dial(1, 2, 3, 4, 5, 6, 7, 8, 9, 10);

-- One call, step by step.
select is(pg_temp.event(1, 'ring', '{"provider_call_id": "call-1", "status": "ringing"}', 'ring-1'), 'applied', 'It rings');
select is(pg_temp.call(1), 'ringing sid=call-1', 'and so it is');
select is(pg_temp.event(1, 'ring', '{"provider_call_id": "call-1", "status": "ringing"}', 'ring-1'), 'duplicate', 'The same again is a duplicate');
select is(pg_temp.event(1, 'ring', '{"provider_call_id": "call-1", "status": "ringing"}', 'ring-1b'), 'ignored', 'and under another key changes nothing');
select is((select count(*) from private.webhook_events where dedupe_key = 'ring-1'), 1::bigint, 'A duplicate leaves no row');
select is(pg_temp.event(1, 'answer', '{"provider_call_id": "call-1", "status": "in_progress"}'), 'applied', 'Somebody answers');
select is((pg_temp.attempt(1)).lease_until - now(), interval '720 seconds', 'and may talk as long as the campaign lets them');
select is(pg_temp.event(1, 'ring', '{"provider_call_id": "call-1", "status": "ringing"}'), 'ignored', 'A late ring does not take that back');
select is(pg_temp.call(1), 'in_progress sid=call-1', 'The call goes on');
select pg_temp.set_clock('24 10:02');
select is(
  pg_temp.event(1, 'hangup', jsonb_build_object(
    'provider_call_id', 'call-1', 'status', 'ended', 'outcome', 'answered', 'duration_seconds', 47, 'bill_duration_seconds', 60,
    'cost_micros', 450000, 'cost_currency', 'inr', 'cause_code', '4000', 'cause_name', 'Normal Hangup', 'cause_source', 'Callee',
    'answered_at', now() - interval '1 minute', 'ended_at', now() - interval '10 seconds'
  ), 'end-1'),
  'applied', 'It ends'
);
select results_eq(
  $$select status::text, call_status::text, duration, bill_duration_seconds, carrier_cost_micros, carrier_cost_currency, hangup_cause_code,
      answered_at, ended_at, lease_until is null
    from public.call_logs where id = (pg_temp.attempt(1)).id$$,
  $$values ('ended', 'answered', 47, 60, 450000::bigint, 'INR', '4000', pg_temp.at('24 10:00'), pg_temp.at('24 10:01:50'), true)$$,
  'with all that the carrier said, in business time'
);
select is(pg_temp.queue(1), 'completed', 'The queue row is done');
select is(pg_temp.member(1), 'called', 'the lead was called');
select results_eq(
  $$select call_status::text, last_contacted_at, call_log_id from public.leads where phone = '+917000000001'$$,
  $$select 'answered', pg_temp.at('24 10:01:50'), (pg_temp.attempt(1)).id$$,
  'and knows it'
);
select results_eq(
  $$select open_leads, total_calls, answered_calls from public.campaigns where organization_id = '00000000-0000-4000-8000-0000000000c1'$$,
  $$values (9, 1, 1)$$,
  'The campaign has counted it'
);
select is(pg_temp.usage(1), 'ai_calls 1+9, call_seconds 60+0', 'the plan too: the hold became a call of sixty seconds');
select is((select payload ->> 'outcome' from private.outbox where topic = 'call.ended' and key = (pg_temp.attempt(1)).id::text), 'answered', 'and it will be told');
select is(pg_temp.event(1, 'hangup', '{"provider_call_id": "call-1", "status": "ended", "outcome": "answered", "bill_duration_seconds": 60}', 'end-1'), 'duplicate', 'The end again');
select is(pg_temp.event(1, 'hangup', '{"provider_call_id": "call-1", "status": "ended", "outcome": "busy", "bill_duration_seconds": 90}'), 'ignored', 'or another end');
select is(pg_temp.call(1), 'ended answered sid=call-1 bill=60', 'changes nothing');
select is(pg_temp.usage(1), 'ai_calls 1+9, call_seconds 60+0', 'and is not billed');
select is(
  pg_temp.event(1, 'recording', '{"provider_call_id": "call-1", "recording": {"id": "rec", "url": "https://carrier.example.test/rec.mp3", "duration_seconds": 47}}'),
  'applied', 'A recording that comes late'
);
select is((pg_temp.attempt(1)).recording_url, 'https://carrier.example.test/rec.mp3', 'is kept');
select is(
  pg_temp.event(1, 'recording', '{"provider_call_id": "call-1", "recording": {"id": "rec2", "url": "https://elsewhere.test/x", "duration_seconds": 1}}'), 'ignored',
  'the first one'
);

-- The end first, everything else after it.
select is(pg_temp.event(2, 'hangup', '{"provider_call_id": "call-2", "status": "ended", "outcome": "answered", "bill_duration_seconds": 30, "duration_seconds": 12}'), 'applied', 'The end may come first');
select is(pg_temp.event(2, 'answer', '{"provider_call_id": "call-2", "status": "in_progress"}'), 'ignored', 'the answer then tells nothing: the seconds of talk told when it was');
select is(pg_temp.event(2, 'ring', '{"provider_call_id": "call-2", "status": "ringing"}'), 'applied', 'and the ring another');
select is(pg_temp.call(2), 'ended answered sid=call-2 bill=30', 'The end stays the end');
select ok(
  (select ringing_at <= answered_at and answered_at <= ended_at from public.call_logs where id = (pg_temp.attempt(2)).id), 'and nothing comes after it'
);

-- A carrier's clock is not ours.
select is(
  pg_temp.event(3, 'hangup', jsonb_build_object(
    'provider_call_id', 'call-3', 'status', 'ended', 'outcome', 'answered', 'bill_duration_seconds', 10,
    'answered_at', now() - interval '5 days', 'ended_at', now() + interval '3 hours')),
  'applied', 'Times that cannot be'
);
select results_eq(
  $$select answered_at = created_at, ended_at = private.clock_now() from public.call_logs where id = (pg_temp.attempt(3)).id$$,
  $$values (true, true)$$, 'are brought between the beginning and now'
);

-- How each end is followed up.
select is(pg_temp.event(4, 'hangup', '{"provider_call_id": "call-4", "status": "ended", "outcome": "busy", "bill_duration_seconds": 0}'), 'applied', 'Busy');
select is(pg_temp.queue(4), 'queued retry_busy busy 24 11:02', 'is tried again, not within the hour that lies between two dials');
select is(pg_temp.event(5, 'hangup', '{"provider_call_id": "call-5", "status": "ended", "outcome": "no_answer"}'), 'applied', 'No answer');
select is(pg_temp.queue(5), 'queued retry_no_answer no_answer 24 12:02', 'two hours later');
select is(pg_temp.event(6, 'machine', '{"provider_call_id": "call-6", "machine": true}'), 'applied', 'A machine is heard');
select is(pg_temp.event(6, 'hangup', '{"provider_call_id": "call-6", "status": "ended", "outcome": "answered", "bill_duration_seconds": 15}'), 'applied', 'and the call ends as answered');
select is(pg_temp.queue(6), 'queued retry_machine machine 24 14:02', 'but nobody was reached: four hours later');
select is(pg_temp.event(7, 'hangup', '{"provider_call_id": "call-7", "status": "ended", "outcome": "rejected"}'), 'applied', 'Rejected');
select is(pg_temp.queue(7), 'queued retry_rejected rejected 25 10:02', 'a day later, once');
select is(pg_temp.event(8, 'hangup', '{"provider_call_id": "call-8", "status": "ended", "outcome": "invalid_number"}'), 'applied', 'A number that is none');
select is(pg_temp.queue(8), 'failed invalid_number', 'never');
select is(pg_temp.member(8), 'failed', 'The lead has failed');
select is(pg_temp.event(9, 'hangup', '{"provider_call_id": "call-9", "status": "ended"}'), 'applied', 'An end that does not say why');
select is(pg_temp.call(9), 'ended failed sid=call-9', 'is a failure');
select is(pg_temp.usage(1), 'ai_calls 4+1, call_seconds 115+0', 'What was billed counts, a machine too, and all holds but the last are settled');
select pg_temp.set_clock('24 20:30');
select is(pg_temp.event(10, 'hangup', '{"provider_call_id": "call-10", "status": "ended", "outcome": "no_answer"}'), 'applied', 'No answer in the evening');
select is(pg_temp.queue(10), 'queued retry_no_answer no_answer 25 09:00', 'is tried in the morning');

-- Until it is enough.
select pg_temp.set_clock('25 10:02');
select is(pg_temp.release(), '4 5 6 7 9 10', 'Retries come when they are due');
select pg_temp.begin(7), pg_temp.event(7, 'hangup', '{"provider_call_id": "call-7b", "status": "ended", "outcome": "rejected"}');
select is(pg_temp.queue(7), 'failed rejected', 'Who rejects twice is left in peace');
select pg_temp.begin(4), pg_temp.event(4, 'hangup', '{"provider_call_id": "call-4b", "status": "ended", "outcome": "busy"}');
select is(pg_temp.queue(4), 'queued retry_busy busy 25 11:02', 'The second time busy');
update public.call_queue set attempt_count = 2, next_retry_at = pg_temp.at('25 10:02'), status = 'processing' where id = (pg_temp.attempt(5)).queue_id;
select pg_temp.begin(5), pg_temp.event(5, 'hangup', '{"provider_call_id": "call-5b", "status": "ended", "outcome": "no_answer"}');
select is(pg_temp.queue(5), 'failed no_answer', 'The third attempt is the last');
select is((select attempt_count::integer from public.call_queue where id = (pg_temp.attempt(5)).queue_id), 3, 'of three');

-- Which attempt, which account, which call.
select is(
  private.apply_event(
    '{"v": 1, "source": "plivo", "source_id": "00000000-0000-4000-c000-000000000001", "kind": "ring", "attempt_id": "00000000-0000-4000-d000-00000000dead",
      "dedupe_key": "orphan-1", "verified": true, "call": {"status": "ringing", "provider_call_id": "x"}}', private.clock_now()
  ) ->> 'result',
  'orphan', 'An event of no attempt is an orphan'
);
select is((select error from private.webhook_events where dedupe_key = 'orphan-1'), 'unknown_attempt', 'that is kept');
insert into public.carrier_accounts (id, provider, account_sid, credentials_sealed, api_base)
values ('00000000-0000-4000-c000-000000000002', 'plivo', 'MAOTHER', 'sealed', 'https://carrier.example.test');
select is(
  private.apply_event(
    jsonb_build_object('v', 1, 'source', 'plivo', 'source_id', '00000000-0000-4000-c000-000000000002', 'kind', 'hangup', 'attempt_id', (pg_temp.attempt(9)).id,
      'dedupe_key', 'foreign', 'verified', true, 'call', '{"status": "ended", "outcome": "answered"}'::jsonb), private.clock_now()
  ) ->> 'result',
  'orphan', 'Another account ends no call of this one'
);
select is((pg_temp.attempt(9)).status::text, 'created', 'and changes nothing');
select pg_temp.begin(9), pg_temp.record(9, '{"outcome": "accepted", "provider_call_id": "call-9b"}');
select is(pg_temp.event(9, 'hangup', '{"provider_call_id": "second", "status": "ended", "outcome": "answered", "bill_duration_seconds": 9}'), 'orphan', 'A second call for one attempt is an orphan');
select is((pg_temp.attempt(9)).status::text, 'queued', 'that ends nothing');
select is(
  (select payload ->> 'provider_call_id' from private.outbox where topic = 'alarm.duplicate_dial' and payload ->> 'attempt_id' = (pg_temp.attempt(9)).id::text),
  'second', 'and is an alarm: somebody was dialled twice'
);
select throws_ok(
  $$select private.apply_event('{"v": 1, "source": "plivo", "source_id": "x", "kind": "ring", "dedupe_key": "unverified"}', now())$$, 'PGRST', null,
  'What is not verified is not stored'
);
select is((select count(*) from private.webhook_event_keys where dedupe_key = 'unverified'), 0::bigint, 'nor remembered');

-- What turns out later.
select is(pg_temp.event(9, 'reconcile', '{"status": "ended", "outcome": "lost"}', source => 'reconcile'), 'applied', 'A call that is given up');
select is(pg_temp.queue(9), 'queued retry_lost lost 25 11:02', 'would be tried again');
select is(
  pg_temp.event(9, 'hangup', jsonb_build_object('provider_call_id', 'call-9b', 'status', 'ended', 'outcome', 'answered', 'bill_duration_seconds', 33,
    'answered_at', now())),
  'applied', 'until its end comes after all'
);
select is(pg_temp.call(9), 'ended answered sid=call-9b bill=33', 'It was answered');
select is(pg_temp.queue(9), 'completed', 'so nobody calls again');
select is(pg_temp.member(9), 'called', 'the lead was called');
select is(pg_temp.usage(1), 'ai_calls 5+2, call_seconds 148+0', 'and it is billed, once');
select is(pg_temp.event(9, 'hangup', '{"provider_call_id": "call-9b", "status": "ended", "outcome": "answered", "bill_duration_seconds": 44}'), 'ignored', 'Seconds that were counted stand');
select pg_temp.begin(10), pg_temp.record(10, '{"outcome": "refused", "reason": "carrier_transient"}');
select is((pg_temp.attempt(10)).dialled, false, 'A dial that the carrier refused');
select is(pg_temp.event(10, 'ring', '{"provider_call_id": "call-10b", "status": "ringing"}'), 'applied', 'and rings all the same');
select is((pg_temp.attempt(10)).dialled, true, 'counts as a dial');
select is((select count(*) from private.outbox where topic = 'alarm.dialled_after_refusal'), 1::bigint, 'and is an alarm');

-- What fails.
create function pg_temp.fail() returns trigger language plpgsql as $$ begin raise exception 'out of order'; end $$;
create trigger fail before update on public.leads for each row execute function pg_temp.fail();
select pg_temp.begin(6);
select is(pg_temp.event(6, 'hangup', '{"provider_call_id": "call-6b", "status": "ended", "outcome": "answered", "bill_duration_seconds": 20}', 'failing'), 'failed', 'An event that cannot be applied');
select is(
  (select status || ' ' || error || ' ' || (next_try_at - now()) from private.webhook_events where dedupe_key = 'failing'), 'failed P0001 out of order 00:01:00',
  'is kept with what went wrong'
);
select is(pg_temp.call(6), 'submitting', 'and has changed nothing');
update private.webhook_events set next_try_at = now() where dedupe_key = 'failing';
select private.sweep_events('{"v": 1}', private.clock_now());
select is((select status || ' ' || tries || ' ' || (next_try_at - now()) from private.webhook_events where dedupe_key = 'failing'), 'failed 2 00:02:00', 'It is tried again, ever more seldom');
update private.webhook_events set next_try_at = now(), tries = 7 where dedupe_key = 'failing';
select private.sweep_events('{"v": 1}', private.clock_now());
select is((select status::text from private.webhook_events where dedupe_key = 'failing'), 'dead', 'and at last waits for a person');
drop trigger fail on public.leads;
update private.webhook_events set status = 'failed', next_try_at = now() where dedupe_key = 'failing';
select private.sweep_events('{"v": 1}', private.clock_now());
select is(pg_temp.call(6), 'ended answered sid=call-6b bill=20', 'Put right, it is applied');

select * from finish();
rollback;
