-- Single calls and manual retries through the gates of a release; campaigns that start by themselves, and start again.
begin;
set local search_path = public, extensions, tap;
select plan(46);

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

create function pg_temp.run_as(who text, query text) returns text
language plpgsql as $$
declare
  result text;
  told   text;
  detail text;
begin
  perform set_config('request.jwt.claims', json_build_object('sub', '00000000-0000-4000-8000-' || lpad(who, 12, '0'), 'role', 'authenticated')::text, true);
  perform set_config('role', 'authenticated', true);
  execute query into result;
  perform set_config('role', session_user::text, true), set_config('request.jwt.claims', '', true);
  return result;
exception when others then
  get stacked diagnostics told = message_text, detail = pg_exception_detail;
  return case when sqlstate = 'PGRST'
    then concat_ws(' ', detail::json ->> 'status', told::json ->> 'code', (told::json ->> 'details')::json ->> 'field') else sqlstate end;
end
$$;
create table pg_temp.made (id uuid);
grant select on pg_temp.made to authenticated;
create function pg_temp.does(who text, action text, campaign uuid default null) returns text
language sql as $$
  select pg_temp.run_as(who, format('select public.%s_campaign(%L) ->> ''status''', action, coalesce(campaign, (select id from pg_temp.made))))
$$;
create function pg_temp.user(who text, tenant uuid, role public.system_role) returns void
language sql as $$
  insert into auth.users (id, email) values (('00000000-0000-4000-8000-' || lpad(who, 12, '0'))::uuid, who || '@example.test');
  update public.profiles set organization_id = tenant, system_role = role where id = ('00000000-0000-4000-8000-' || lpad(who, 12, '0'))::uuid;
$$;
select pg_temp.user('a1', pg_temp.tenant(1), 'owner'), pg_temp.user('b1', pg_temp.tenant(2), 'owner');
select pg_temp.user('a3', '00000000-0000-4000-8000-0000000000c1', 'member');
insert into public.projects (id, organization_id, name)
values
  ('00000000-0000-4000-a000-0000000000e1', '00000000-0000-4000-8000-0000000000c1', 'Towers'),
  ('00000000-0000-4000-a000-0000000000e2', '00000000-0000-4000-8000-0000000000c2', 'Theirs');
insert into public.leads (organization_id, project_id, name, phone, archived_at)
values
  ('00000000-0000-4000-8000-0000000000c1', '00000000-0000-4000-a000-0000000000e1', 'Uma', '+917000000001', null),
  ('00000000-0000-4000-8000-0000000000c1', '00000000-0000-4000-a000-0000000000e1', 'Vik', '+917000000002', null),
  ('00000000-0000-4000-8000-0000000000c1', '00000000-0000-4000-a000-0000000000e1', 'Wes', '+917000000003', now()),
  ('00000000-0000-4000-8000-0000000000c1', null, 'Xia', '+917000000004', null),
  ('00000000-0000-4000-8000-0000000000c2', '00000000-0000-4000-a000-0000000000e2', 'Yan', '+917000000005', null);

create function pg_temp.says(who text, query text, variadic keys text[]) returns text
language plpgsql as $$
declare
  answer jsonb;
  told   text;
  detail text;
begin
  perform set_config('request.jwt.claims', json_build_object('sub', '00000000-0000-4000-8000-' || lpad(who, 12, '0'), 'role', 'authenticated')::text, true);
  perform set_config('role', 'authenticated', true);
  execute query into answer;
  perform set_config('role', session_user::text, true), set_config('request.jwt.claims', '', true);
  return (select string_agg(answer ->> key, ' ' order by place) from unnest(keys) with ordinality as wanted (key, place));
exception when sqlstate 'PGRST' then
  get stacked diagnostics told = message_text, detail = pg_exception_detail;
  return concat_ws(
    ' ', detail::json ->> 'status', told::json ->> 'code', (told::json ->> 'details')::json ->> 'reason', (told::json ->> 'details')::json ->> 'next_at'
  );
end
$$;
create function pg_temp.lead(number integer) returns uuid
language sql as $$ select id from public.leads where phone = '+91700000' || lpad(number::text, 4, '0') $$;
create function pg_temp.place(who text, campaign uuid, number integer) returns text
language sql as $$
  select pg_temp.says(who, format('select public.place_call(%L, %L)', campaign, pg_temp.lead(number)), 'status', 'from')
$$;
create function pg_temp.retry(who text, number integer) returns text
language sql as $$ select pg_temp.says(who, format('select public.retry_call(%L)', (pg_temp.attempt(number)).id), 'status') $$;
create function pg_temp.draft(name text, settings jsonb default '{}') returns uuid
language sql as $$
  select (pg_temp.run_as('a1', format('select public.create_campaign(%L, %L, %L)', name, '00000000-0000-4000-a000-0000000000e1', settings))::jsonb ->> 'id')::uuid
$$;
create table pg_temp.drafts as select pg_temp.draft('Try') as try;
create function pg_temp.try() returns uuid language sql as $$ select drafts.try from pg_temp.drafts as drafts $$;

-- A single call.
select is(pg_temp.place('a3', pg_temp.try(), 4), '403 permission_denied', 'A member places no call');
select is(pg_temp.place('b1', pg_temp.try(), 5), '404 campaign_not_found', 'nor a stranger with this campaign');
select is(pg_temp.place('a1', pg_temp.try(), 5), '404 lead_not_found', 'nor its owner with a stranger''s lead');
select is(pg_temp.place('a1', pg_temp.try(), 3), '422 call_refused archived', 'An archived lead is not called, and the refusal says so');
select is(pg_temp.place('a1', pg_temp.try(), 4), 'created +91809900001', 'A draft''s agent may be tried on any lead');
select is((select status::text || total_enrolled || open_leads from public.campaigns where id = pg_temp.try()), 'draft22', 'which changes nothing of the draft');
select is((select count(*) from public.call_queue where campaign_id = pg_temp.try()), 0::bigint, 'and queues nobody');
select is((select queue_id is null and caller_id is not null from pg_temp.attempt(4)), true, 'The call is its user''s');
select is((select count(*) from private.call_holds where attempt_id = (pg_temp.attempt(4)).id), 1::bigint, 'It holds what it may cost');
select is((select purpose from private.dial_evidence where attempt_id = (pg_temp.attempt(4)).id), 'service', 'and keeps why it was allowed');
select is(pg_temp.place('a1', pg_temp.try(), 4), '422 call_refused number_in_call 2026-11-24T04:45:00+00:00', 'Nobody is called twice at once');
select is(pg_temp.begin(4), '4', 'It is begun though its campaign does not run');
select is(pg_temp.event(4, 'hangup', '{"provider_call_id": "c-4", "status": "ended", "outcome": "answered", "bill_duration_seconds": 9}'), 'applied', 'It ends');
select is((select total_calls from public.campaigns where id = pg_temp.try()), 0, 'and is no call of the campaign''s');
select is((select string_agg(problem, '; ') from private.check_holds()), null, 'What was held is given back');
select is(pg_temp.place('a1', pg_temp.try(), 4), '422 call_refused min_gap 2026-11-24T05:30:00+00:00', 'The gap holds for single calls too');
select is(pg_temp.retry('a1', 4), '409 invalid_transition', 'A single call is of no queue to be put back into');
insert into public.suppressions (organization_id, phone_number) values ('00000000-0000-4000-8000-0000000000c1', '+917000000001');
select is(pg_temp.place('a1', pg_temp.try(), 1), '422 call_refused opted_out', 'Who opted out is not called');
delete from public.suppressions;
update private.platform_dialling set dialling_enabled = false;
select is(pg_temp.place('a1', pg_temp.try(), 1), '422 call_refused platform_disabled', 'A switch stops single calls');
update private.platform_dialling set dialling_enabled = true;
update public.carrier_accounts set max_concurrent_calls = 0;
select is(pg_temp.place('a1', pg_temp.try(), 1), '422 call_refused capacity', 'No more are in flight than may be');
update public.carrier_accounts set max_concurrent_calls = 1000;
select pg_temp.set_clock('24 22:00');
select is(pg_temp.place('a1', pg_temp.try(), 1), '422 call_refused outside_window 2026-11-25T03:30:00+00:00', 'nor at night');
select pg_temp.set_clock('24 12:00');

-- A manual retry.
select is(pg_temp.does('a1', 'start', pg_temp.try()), 'running', 'The campaign starts');
select is(pg_temp.release(), '1 2', 'and calls its leads');
select is(pg_temp.retry('a1', 1), '409 invalid_transition', 'Who is being called is not called again');
select pg_temp.begin(1, 2);
select pg_temp.event(1, 'hangup', '{"provider_call_id": "c-1", "status": "ended", "outcome": "invalid_number"}');
select is(pg_temp.queue(1), 'failed invalid_number', 'A lead has failed');
select is(pg_temp.retry('a3', 1), '403 permission_denied', 'which a member leaves so');
select is(pg_temp.retry('b1', 1), '404 call_not_found', 'and a stranger does not find');
select is(pg_temp.retry('a1', 1), 'queued', 'Its owner has it called again');
select is(pg_temp.queue(1), 'queued 24 12:00', 'It is due');
select is((select open_leads from public.campaigns where id = pg_temp.try()), 2, 'and open');
select is(pg_temp.release(), 'none', 'but the gap is the release''s to keep');
select is(pg_temp.queue(1), 'queued min_gap 24 13:00', 'until it is over');
select pg_temp.event(2, 'hangup', '{"provider_call_id": "c-2", "status": "ended", "outcome": "answered", "bill_duration_seconds": 9}');
select is(pg_temp.retry('a1', 2), '409 invalid_transition', 'Who was reached is left in peace');

-- Over, put away, taken out again: who was reached stays so.
select is(pg_temp.does('a1', 'complete', pg_temp.try()), 'completed', 'The campaign is completed with one lead waiting');
select is(pg_temp.retry('a1', 1), '409 invalid_transition', 'Then nobody is called for it');
select pg_temp.does('a1', 'archive', pg_temp.try()), pg_temp.does('a1', 'restore', pg_temp.try());
select is(concat_ws(', ', pg_temp.member(1), pg_temp.member(2)), 'queued, called', 'Restored, whom its end took out is open again');
select is(pg_temp.does('a1', 'start', pg_temp.try()), 'running', 'and it starts again');
select pg_temp.set_clock('24 14:00');
select is(pg_temp.release(), '1', 'for them alone');

-- By its start date.
insert into public.consents (organization_id, phone_number, scope, consent_text, source, proof, granted_at)
select '00000000-0000-4000-8000-0000000000c1', '+91700000000' || number, 'call_promotional', 'Call me', 'written', '{"page": 1}', '2026-11-01'
from generate_series(1, 2) as number;
create table pg_temp.later as select pg_temp.draft('Later', '{"start_date": "2026-11-26", "purpose": "promotional", "retry_rules": {"busy": [30]}}') as id;
select is((select purpose || retry_rules::text from public.campaigns where id = (select id from pg_temp.later)), 'promotional{"busy": [30]}', 'Purpose and retries are settings');
select is(
  pg_temp.run_as('a1', $$select public.create_campaign('C', settings => '{"retry_rules": {"answered": [5]}}')$$), '422 invalid_setting retry_rules', 'checked as ever'
);
select is(pg_temp.does('a1', 'schedule', pg_temp.draft('Undated')), '422 invalid_setting start_date', 'Without a date nothing is scheduled');
select is(pg_temp.does('a1', 'schedule', (select id from pg_temp.later)), 'scheduled', 'With one it is');
select pg_temp.set_clock('25 23:59');
select pg_temp.release();
select is((select status::text from public.campaigns where id = (select id from pg_temp.later)), 'scheduled', 'The evening before it waits');
select pg_temp.set_clock('26 00:00');
select pg_temp.release();
select is((select status || ' ' || started_at from public.campaigns where id = (select id from pg_temp.later)), 'running ' || pg_temp.at('26 00:00'), 'That day it runs');
select is(
  (select count(*) from private.outbox where topic = 'campaign.started' and payload ->> 'campaign_id' = (select id::text from pg_temp.later)), 1::bigint, 'and says so once'
);
select is(pg_temp.does('a1', 'schedule', (select id from pg_temp.later)), '409 invalid_transition status', 'What runs is not scheduled');

select * from finish();
rollback;
