-- Dialling: begun once, by one caller; what became of it; and who asks the carrier when nobody says.
begin;
set local search_path = public, extensions, tap;
select plan(64);

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

-- Begun once.
select pg_temp.campaign(pg_temp.tenant(1), array[1, 2, 3, 4, 5, 6, 7, 8, 9]);
select pg_temp.release();
select is(pg_temp.begin(1, 2), '1 2', 'Whoever begins an attempt dials it');
select results_eq(
  $$select status::text, dialled, submitted_at, lease_until - now(), begun_at from public.call_logs where id = (pg_temp.attempt(1)).id$$,
  $$values ('submitting', true, private.clock_now(), interval '60 seconds', now())$$,
  'which counts as dialled from now on'
);
select is(
  private.begin_dials(
    jsonb_build_object('v', 1, 'lease_token', '00000000-0000-4000-d000-000000000001', 'attempts', jsonb_build_array((pg_temp.attempt(1)).id)),
    private.clock_now()
  ) #> '{dials,0}',
  jsonb_build_object(
    'attempt_id', (pg_temp.attempt(1)).id, 'organization_id', '00000000-0000-4000-8000-0000000000c1', 'provider', 'plivo',
    'carrier_account_id', '00000000-0000-4000-c000-000000000001', 'account_sid', 'MATEST', 'credentials_sealed', 'sealed',
    'api_base', 'https://carrier.example.test', 'from', '+91809900001', 'to', '+917000000001', 'ring_timeout_seconds', 45,
    'time_limit_seconds', 600, 'record', false, 'agent_id', null,
    'not_after', floor(extract(epoch from now() + interval '10 minutes'))::bigint
  ),
  'The same caller, whose answer was lost, is told the same again: all it takes to dial'
);
select is(
  private.begin_dials(
    jsonb_build_object('v', 1, 'lease_token', gen_random_uuid(), 'attempts', jsonb_build_array((pg_temp.attempt(1)).id)), private.clock_now()
  ),
  jsonb_build_object('dials', '[]'::jsonb, 'skipped', jsonb_build_array(jsonb_build_object('attempt_id', (pg_temp.attempt(1)).id, 'reason', 'already_begun'))),
  'Another caller dials nobody'
);
update public.call_logs set lease_until = now() - interval '1 second' where id = (pg_temp.attempt(1)).id;
select is(pg_temp.begin(1), 'already_begun', 'nor does the same one when its minute is over');
select is(
  private.begin_dials('{"v": 1, "lease_token": "00000000-0000-4000-d000-000000000001", "attempts": ["00000000-0000-4000-d000-00000000dead"]}', now()),
  '{"dials": [], "skipped": [{"reason": "unknown_attempt", "attempt_id": "00000000-0000-4000-d000-00000000dead"}]}', 'Nobody knows an attempt that is none'
);
select is(pg_temp.release(), 'none', 'What was begun is never released again, whatever its lease');

-- A gate that closed in between.
update public.call_logs set not_after = now() - interval '1 second' where id = (pg_temp.attempt(3)).id;
select is(pg_temp.begin(3, 4), '4 expired', 'Past its time an attempt is not begun');
select results_eq(
  $$select status::text, call_status::text, dialled, refusal_reason from public.call_logs where id = (pg_temp.attempt(3)).id$$,
  $$values ('ended', 'expired', false, 'expired')$$,
  'it ends'
);
select is(pg_temp.queue(3), 'queued expired expired 24 10:01', 'and its lead waits for the next');
select is((select attempt_count::integer from public.call_queue where id = (pg_temp.attempt(3)).queue_id), 0, 'with no attempt counted');
insert into public.suppressions (organization_id, phone_number) values ('00000000-0000-4000-8000-0000000000c1', '+917000000005');
select is(pg_temp.begin(5), 'opted_out', 'Who opts out between release and dialling is not dialled');
select is(pg_temp.member(5), 'opted_out opted_out', 'nor ever again');
update public.leads set do_not_call = true where phone = '+917000000006';
select is(pg_temp.begin(6), 'opted_out', 'however they did');
update public.leads set phone = '+917000000099' where phone = '+917000000007';
select is(pg_temp.begin(7), 'number_changed', 'A number that is no longer the lead''s is not dialled');
update public.campaigns set status = 'paused' where organization_id = '00000000-0000-4000-8000-0000000000c1';
select is(pg_temp.begin(8), 'campaign_paused', 'A pause stops what is not begun');
select is(pg_temp.queue(8), 'queued campaign_paused campaign_paused 24 10:00', 'It goes when the pause is over');
select is(pg_temp.member(8), 'queued', 'its lead waits');
update public.campaigns set status = 'running' where organization_id = '00000000-0000-4000-8000-0000000000c1';
select is(pg_temp.release(), '8 99', 'and goes');
select is((pg_temp.attempt(8)).attempt_no, 2, 'as another attempt');
update public.organizations set dialling_enabled = false where id = '00000000-0000-4000-8000-0000000000c1';
select is(pg_temp.begin(8), 'dialling_disabled', 'The operator''s switch stops it too');
update public.organizations set dialling_enabled = true where id = '00000000-0000-4000-8000-0000000000c1';
update public.campaigns set status = 'cancelled' where organization_id = '00000000-0000-4000-8000-0000000000c1';
select is(pg_temp.begin(9), 'campaign_cancelled', 'A campaign that was cancelled');
select is(pg_temp.member(9), 'skipped campaign_cancelled', 'takes its leads along');
select is(
  (select reserved from public.usage_logs where organization_id = '00000000-0000-4000-8000-0000000000c1' and feature_key = 'ai_calls'), 4::bigint,
  'What is not dialled gives back what was held for it'
);
select is((select count(*) from public.call_logs where organization_id = '00000000-0000-4000-8000-0000000000c1' and dialled), 3::bigint, 'and is no dial');

-- What became of it.
select pg_temp.campaign(pg_temp.tenant(2), array[11, 12, 13, 14, 15, 16, 17, 18]);
select pg_temp.release();
select pg_temp.begin(11, 12, 13, 14, 15, 16, 17, 18);
select is(pg_temp.record(11, '{"outcome": "accepted", "provider_call_id": "call-11"}'), '1', 'An accepted dial');
select results_eq(
  $$select status::text, call_sid, lease_until - now() from public.call_logs where id = (pg_temp.attempt(11)).id$$,
  $$values ('queued', 'call-11', interval '105 seconds')$$,
  'is bound to the carrier''s call, and has the time to ring out'
);
select is(pg_temp.record(12, '{"outcome": "refused", "reason": "invalid_number", "code": "400"}'), '1', 'A refused one');
select results_eq(
  $$select status::text, call_status::text, dialled, hangup_cause_code from public.call_logs where id = (pg_temp.attempt(12)).id$$,
  $$values ('ended', 'invalid_number', false, '400')$$,
  'is over, and nobody was called'
);
select is(pg_temp.queue(12), 'failed invalid_number', 'For a number that is none there is no other try');
select is(pg_temp.record(13, '{"outcome": "refused", "reason": "carrier_transient"}'), '1', 'Refused for a moment');
select is(pg_temp.queue(13), 'queued retry_carrier_transient carrier_transient 24 10:05', 'it is tried again');
select is(pg_temp.record(14, '{"outcome": "deferred", "retry_after_seconds": 90}'), '1', 'One put off');
select is(pg_temp.queue(14), 'queued capacity capacity 24 10:01', 'is tried when the carrier says');
select is((select attempt_count::integer from public.call_queue where id = (pg_temp.attempt(14)).queue_id), 0, 'and does not count');
select is(pg_temp.record(15, '{"outcome": "unknown"}'), '1', 'One of which nobody knows');
select results_eq(
  $$select status::text, dialled, lease_until - now() from public.call_logs where id = (pg_temp.attempt(15)).id$$,
  $$values ('submission_unknown', true, interval '60 seconds')$$,
  'keeps its place'
);
select is(pg_temp.record(16, '{"outcome": "refused", "reason": "answered"}'), '1', 'A refusal cannot have been an answer');
select is((pg_temp.attempt(16)).call_status::text, 'failed', 'it is a failure');

-- A callback that is faster than the answer to the request.
select is(pg_temp.event(17, 'ring', '{"provider_call_id": "call-17", "status": "ringing"}'), 'applied', 'The callback comes first');
select is(pg_temp.record(17, '{"outcome": "accepted", "provider_call_id": "call-17"}'), '1', 'then the answer');
select is((pg_temp.attempt(17)).status::text, 'ringing', 'which takes nothing back');
select is(pg_temp.event(18, 'hangup', '{"provider_call_id": "call-18", "status": "ended", "outcome": "busy"}'), 'applied', 'Even the end');
select is(pg_temp.record(18, '{"outcome": "unknown"}'), '0', 'stands against an answer that was lost');
select is(pg_temp.record(18, '{"outcome": "accepted", "provider_call_id": "call-18"}'), '1', 'and one that comes late');
select is((pg_temp.attempt(18)).status::text, 'ended', 'ends nothing again');
select is(pg_temp.record(11, '{"outcome": "accepted", "provider_call_id": "call-11b"}'), '1', 'A second call for one attempt');
select is((pg_temp.attempt(11)).call_sid, 'call-11', 'is not bound');
select is(
  (select payload ->> 'provider_call_id' from private.outbox where topic = 'alarm.duplicate_dial' and payload ->> 'attempt_id' = (pg_temp.attempt(11)).id::text),
  'call-11b', 'and raises an alarm'
);
select throws_ok(
  $$select pg_temp.record(11, '{"outcome": "perhaps"}')$$, 'PGRST', null, 'An outcome that is none is refused'
);
select throws_ok(
  $$update public.call_logs set status = 'submitting' where id = (pg_temp.attempt(11)).id$$, '23514', null, 'An attempt never goes back'
);
select throws_ok(
  $$update public.call_logs set call_sid = 'other' where id = (pg_temp.attempt(11)).id$$, '23514', null, 'or to another call'
);

-- Nobody says: the carrier is asked.
create function pg_temp.reconcile() returns text
language sql as $$
  select coalesce(
    string_agg(right(attempt ->> 'to', 4)::integer || ' ' || (attempt ->> 'status') || ' ' || coalesce(attempt ->> 'provider_call_id', '-'), ', ' order by attempt ->> 'to'),
    'none'
  )
  from jsonb_array_elements(private.reconcile_calls('{"v": 1, "limit": 500}', private.clock_now()) -> 'attempts') as attempt
  where attempt ->> 'to' like '+91700000%'
$$;
update public.call_logs set lease_until = now() + interval '1 minute' where organization_id = '00000000-0000-4000-8000-0000000000c1' and status <> 'ended';
select is(pg_temp.reconcile(), 'none', 'Within its lease an attempt is left alone');
update public.call_logs set lease_until = now() - interval '1 second', begun_at = now() - interval '700 seconds'
where organization_id = '00000000-0000-4000-8000-0000000000c2' and status <> 'ended';
select is(pg_temp.reconcile(), '11 queued call-11, 15 submission_unknown -, 17 ringing call-17', 'then the carrier is asked');
select is(pg_temp.reconcile(), 'none', 'once a minute');
update public.call_logs set lease_until = now() - interval '1 second' where id = (pg_temp.attempt(15)).id;
select is(
  private.reconcile_calls('{"v": 1}', private.clock_now()) #>> '{attempts,0,age_seconds}', '700', 'It knows how long ago, in real time, that was'
);
insert into public.call_logs (
  id, organization_id, carrier_account_id, caller_number, callee_number, call_sid, status, call_status, dialled, created_at, submitted_at, ended_at
)
select
  '00000000-0000-7000-8000-000000000015', log.organization_id, log.carrier_account_id, log.caller_number, log.callee_number, 'earlier-15', 'ended', 'busy', true, at, at, at
from (select (pg_temp.attempt(15)).*) as log
cross join (select private.clock_now() - interval '2 days' as at) as earlier;
update public.call_logs set lease_until = now() - interval '1 second' where callee_number = '+917000000015' and status <> 'ended';
select is(
  private.reconcile_calls('{"v": 1}', private.clock_now()) #>> '{attempts,0,others}', '["earlier-15"]', 'and which calls to the number are others'
);
select is(
  pg_temp.event(15, 'reconcile', '{"provider_call_id": "earlier-15", "status": "ended", "outcome": "busy"}', source => 'reconcile'), 'orphan',
  'A call that is another attempt''s is not this one''s'
);
select is(
  (select status::text from public.call_logs where callee_number = '+917000000015' and call_sid is null), 'submission_unknown', 'which is asked for again'
);
select is((select count(*) from private.outbox where topic = 'alarm.call_id_reused' and payload ->> 'provider_call_id' = 'earlier-15'), 1::bigint, 'and is an alarm');
select is(pg_temp.event(15, 'reconcile', '{"status": "ended", "outcome": "lost"}', source => 'reconcile'), 'applied', 'An attempt the carrier knows nothing of');
select is(pg_temp.queue(15), 'queued retry_lost lost 24 11:00', 'is lost, counts as a dial, and is tried again after an hour');
-- The account was full and faulty above, and is not any more.
update private.carrier_pace set ceiling = null, ceiling_at = private.clock_now();
insert into private.breakers (scope, is_open, since)
select scope.id, false, private.clock_now() from (select id from public.carrier_accounts union all select id from public.campaigns) as scope
on conflict (scope) do update set is_open = false, since = excluded.since;
select pg_temp.campaign(pg_temp.tenant(3), array[21]);
select pg_temp.release();
update public.call_logs set lease_until = now() - interval '1 second', not_after = now() where id = (pg_temp.attempt(21)).id;
select is(pg_temp.reconcile(), 'none', 'What was never begun is not asked about');
select is((pg_temp.attempt(21)).call_status::text, 'expired', 'it ends');

select * from finish();
rollback;
