-- What users do with campaigns: draft, start, pause, resume, cancel; who may; and how a campaign ends, once.
begin;
set local search_path = public, extensions, tap;
select plan(72);

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

-- A draft.
select is(pg_temp.run_as('a3', $$select public.create_campaign('C')$$), '403 permission_denied', 'A member drafts no campaign');
select is(pg_temp.run_as('zz', $$select public.create_campaign('C')$$), '22P02', 'A token names a user');
select is(pg_temp.run_as('a9', $$select public.create_campaign('C')$$), '403 no_organization', 'who belongs somewhere');
select is(pg_temp.run_as('a1', $$select public.create_campaign('  ')$$), '422 invalid_name name', 'A campaign has a name');
select is(pg_temp.run_as('a1', $$select public.create_campaign('C', '00000000-0000-4000-a000-0000000000e2')$$), '404 project_not_found project_id', 'and no project of others');
select is(pg_temp.run_as('a1', $$select public.create_campaign('C', settings => '{"timezone": "Mars/Olympus"}')$$), '422 invalid_timezone timezone', 'A zone exists');
select is(pg_temp.run_as('a1', $$select public.create_campaign('C', settings => '{"time_start": "25:00"}')$$), '422 invalid_setting time_start', 'a time too');
select is(pg_temp.run_as('a1', $$select public.create_campaign('C', settings => '{"max_attempts": "many"}')$$), '422 invalid_setting max_attempts', 'A number is one');
select is(pg_temp.run_as('a1', $$select public.create_campaign('C', settings => '{"max_attempts": 11}')$$), '422 invalid_setting max_attempts', 'within its bounds');
select is(pg_temp.run_as('a1', $$select public.create_campaign('C', settings => '{"max_concurrent_calls": 0}')$$), '422 invalid_setting max_concurrent_calls', 'all of them');
select is(pg_temp.run_as('a1', $$select public.create_campaign('C', settings => '{"start_date": "2026-12-02", "end_date": "2026-12-01"}')$$), '422 invalid_setting end_date', 'Days are in order');
select is(pg_temp.run_as('a1', $$select public.create_campaign('C', settings => '[]')$$), '422 invalid_setting settings', 'Settings are an object');
insert into pg_temp.made
select (pg_temp.run_as('a1', $$select public.create_campaign('Spring', '00000000-0000-4000-a000-0000000000e1',
  '{"time_start": "10:00", "max_attempts": 2, "record_calls": true, "unknown": 1}')$$)::jsonb ->> 'id')::uuid;
select is(
  pg_temp.run_as('a1', $$select public.get_campaign((select id from pg_temp.made)) - array['id', 'created_at']$$)::jsonb,
  '{"name": "Spring", "description": null, "status": "draft", "project_id": "00000000-0000-4000-a000-0000000000e1", "agent_id": null,
    "timezone": "Asia/Kolkata", "start_date": null, "end_date": null, "time_start": "10:00:00", "time_end": "21:00:00",
    "max_concurrent_calls": 10, "max_attempts": 2, "record_calls": true, "auto_complete": true, "purpose": "service", "retry_rules": {}, "lead_filter": {}, "credit_cap": null, "credit_spent": 0, "pause_reason": null, "total_enrolled": 2, "open_leads": 2,
    "total_calls": 0, "answered_calls": 0, "started_at": null, "paused_at": null, "completed_at": null, "cancelled_at": null,
    "counts": {"enrolled": 2, "queued": 0, "calling": 0, "called": 0, "failed": 0, "opted_out": 0, "skipped": 0, "archived": 0},
    "waiting": {}, "skipped": {}, "next_due_at": null}',
  'A draft has enrolled the leads of its project, but not the archived one'
);
select is(
  (pg_temp.run_as('a1', $$select public.create_campaign('All')$$)::jsonb ->> 'total_enrolled'), '3', 'Without a project, those of the organization'
);
select is(pg_temp.run_as('a3', $$select public.get_campaign((select id from pg_temp.made)) ->> 'name'$$), 'Spring', 'A member sees it');
select is(pg_temp.run_as('b1', $$select public.get_campaign((select id from pg_temp.made))$$), '404 campaign_not_found campaign_id', 'another organization does not');
select is(pg_temp.run_as('a1', $$select public.get_campaign(gen_random_uuid())$$), '404 campaign_not_found campaign_id', 'and what is not there looks the same');

-- Start.
select is(pg_temp.does('a3', 'start'), '403 permission_denied', 'A member starts none');
select is(pg_temp.does('b1', 'start'), '404 campaign_not_found campaign_id', 'nor does another organization');
select is(pg_temp.does('a1', 'pause'), '409 invalid_transition status', 'A draft is not paused');
select is(pg_temp.does('a1', 'resume'), '409 invalid_transition status', 'or resumed');
update public.subscriptions set status = 'suspended' where organization_id = '00000000-0000-4000-8000-0000000000c1';
select is(pg_temp.does('a1', 'start'), '402 subscription_inactive', 'It takes a subscription');
update public.subscriptions set status = 'active' where organization_id = '00000000-0000-4000-8000-0000000000c1';
update public.caller_numbers set is_active = false where organization_id = '00000000-0000-4000-8000-0000000000c1';
select is(pg_temp.does('a1', 'start'), '422 no_caller_number', 'a number to call from');
update public.caller_numbers set is_active = true where organization_id = '00000000-0000-4000-8000-0000000000c1';
update public.campaigns set time_start = '22:00', time_end = '08:00' where id = (select id from pg_temp.made);
select is(pg_temp.does('a1', 'start'), '422 window_never_opens time_start', 'hours in which anybody may be called');
update public.campaigns set time_start = '10:00', time_end = '21:00' where id = (select id from pg_temp.made);
insert into public.campaigns (id, organization_id, project_id, name)
values ('00000000-0000-4000-e000-000000000001', '00000000-0000-4000-8000-0000000000c2', null, 'Empty');
update public.leads set archived_at = now() where organization_id = '00000000-0000-4000-8000-0000000000c2';
select is(pg_temp.does('b1', 'start', '00000000-0000-4000-e000-000000000001'), '422 no_leads', 'and leads');
update public.leads set archived_at = null where organization_id = '00000000-0000-4000-8000-0000000000c2';
select is(pg_temp.does('b1', 'start', '00000000-0000-4000-e000-000000000001'), 'running', 'which a draft without any enrols when it starts');
delete from vault.secrets where name in ('trunkline_functions_url', 'trunkline_nudge_key');
delete from net.http_request_queue;
select vault.create_secret('https://api.example.test', 'trunkline_functions_url'), vault.create_secret('whsec_' || encode('0123456789abcdef0123456789abcdef', 'base64'), 'trunkline_nudge_key');
select set_config('trunkline.nudged_call_dispatch', '', true);
select is(pg_temp.does('a1', 'start'), 'running', 'Then it runs');
select is((select count(*) from net.http_request_queue where url = 'https://api.example.test/call-dispatch/nudge'), 1::bigint, 'and the dispatcher is told, once');
select is(pg_temp.does('a1', 'start'), '409 invalid_transition status', 'It starts once');
select results_eq(
  $$select queue.status::text, queue.max_attempts::integer, queue.next_retry_at from public.call_queue as queue where campaign_id = (select id from pg_temp.made)$$,
  $$values ('queued', 2, private.clock_now()), ('queued', 2, private.clock_now())$$,
  'Its leads are queued, due at once'
);
select is(
  pg_temp.run_as('a1', $$select public.get_campaign((select id from pg_temp.made)) -> 'waiting'$$), '{"capacity": 2}', 'and wait for a free line'
);
select is((select count(*) from public.audit_logs where entity_id = (select id from pg_temp.made) and action = 'campaign.started' and user_id = '00000000-0000-4000-8000-0000000000a1'), 1::bigint, 'Who started it is on record');

-- What users may and may not write.
create function pg_temp.writes(who text, query text) returns text
language sql as $$ select pg_temp.run_as(who, format('with changed as (%s returning 1) select count(*) from changed', query)) $$;
select is(pg_temp.writes('a1', $$update public.campaigns set status = 'completed'$$), '42501', 'Nobody writes a status');
select is(pg_temp.writes('a1', $$update public.campaigns set open_leads = 0$$), '42501', 'or a counter');
select is(pg_temp.writes('a1', $$update public.call_queue set status = 'failed'$$), '42501', 'or the queue');
select is(pg_temp.writes('a1', $$insert into public.call_queue (campaign_id) values (gen_random_uuid())$$), '42501', 'not even into it');
select is(pg_temp.writes('a1', $$update public.call_logs set bill_duration_seconds = 0$$), '42501', 'or what a call cost');
select is(pg_temp.writes('a3', $$update public.campaigns set name = 'Mine'$$), '0', 'A member renames none');
select is(pg_temp.writes('b1', $$update public.campaigns set name = 'Mine' where name = 'Spring'$$), '0', 'nor a stranger');
select is(pg_temp.writes('a1', $$update public.campaigns set name = 'Summer' where name = 'Spring'$$), '1', 'Its own do');
select is(pg_temp.writes('a1', $$insert into public.campaigns (name, timezone) values ('X', 'Mars/Olympus')$$), '422 invalid_timezone timezone', 'A zone exists here too');
select is(pg_temp.writes('a1', $$insert into public.campaigns (name) values ('By hand')$$), '1', 'A draft may be made by hand');
select throws_ok($$update public.campaigns set status = 'archived' where id = (select id from pg_temp.made)$$, 'PGRST', null, 'Even the system changes a status only as there is a way');
select is(pg_temp.run_as('a1', $$select count(*) from public.carrier_accounts$$), '42501', 'Carrier accounts are no user''s business');
select is(pg_temp.run_as('b1', $$select count(*) from public.call_queue where campaign_id = (select id from pg_temp.made)$$), '0', 'The queue is seen by its own');
select is(pg_temp.run_as('a3', $$select count(*) from public.call_queue$$), '2', 'all of them');

-- Pause and resume.
select is(pg_temp.does('a1', 'pause'), 'paused', 'A running campaign is paused');
select is(pg_temp.release(), '5', 'Paused, nobody is called for it');
select is(pg_temp.run_as('a1', $$select public.get_campaign((select id from pg_temp.made)) -> 'waiting'$$), '{"campaign_paused": 2}', 'which its users see');
select is(pg_temp.does('a1', 'resume'), 'running', 'and resumed');
select is(pg_temp.release(), '1 2', 'Then its leads are called');

-- The end: two last leads.
select pg_temp.begin(1, 2);
select is(pg_temp.event(1, 'hangup', '{"provider_call_id": "c-1", "status": "ended", "outcome": "answered", "bill_duration_seconds": 9}'), 'applied', 'One call ends');
select is(pg_temp.run_as('a1', $$select public.get_campaign((select id from pg_temp.made)) ->> 'status'$$), 'running', 'the campaign runs on');
select is(pg_temp.event(2, 'hangup', '{"provider_call_id": "c-2", "status": "ended", "outcome": "invalid_number"}'), 'applied', 'The other ends');
select is(
  pg_temp.run_as('a1', $$select public.get_campaign((select id from pg_temp.made))$$)::jsonb - array['id', 'created_at', 'started_at', 'name'] @>
    '{"status": "completed", "open_leads": 0, "total_calls": 2, "answered_calls": 1, "waiting": {}, "counts": {"called": 1, "failed": 1}}', true,
  'and the campaign is complete'
);
select is((select count(*) from private.outbox where topic = 'campaign.completed' and key = (select id from pg_temp.made)::text), 1::bigint, 'which is told once');
select is(pg_temp.does('a1', 'cancel'), '409 invalid_transition status', 'What is over is not cancelled');
select is(pg_temp.writes('a1', $$update public.campaigns set name = 'Late' where name = 'Summer'$$), '0', 'and not changed');

-- Cancel, with one call in the air and two leads waiting.
select pg_temp.campaign('00000000-0000-4000-8000-0000000000c1', array[11, 12, 13], calls => 1);
create table pg_temp.second as select id from public.campaigns where organization_id = '00000000-0000-4000-8000-0000000000c1' and name = 'Campaign';
select is(pg_temp.release(), '11', 'One is called');
select pg_temp.begin(11);
select is(pg_temp.does('a3', 'cancel', (select id from pg_temp.second)), '403 permission_denied', 'A member cancels nothing');
select is(pg_temp.does('b1', 'cancel', (select id from pg_temp.second)), '404 campaign_not_found campaign_id', 'nor a stranger');
select is(pg_temp.member(12), 'queued', 'and nothing has changed by that');
select is(pg_temp.does('a1', 'cancel', (select id from pg_temp.second)), 'cancelled', 'The owner cancels it');
select is(pg_temp.member(12), 'skipped campaign_cancelled', 'Who waits is not called any more');
select is(pg_temp.queue(13), 'failed campaign_cancelled', 'nobody of them');
select is(pg_temp.event(11, 'hangup', '{"provider_call_id": "c-11", "status": "ended", "outcome": "busy"}'), 'applied', 'The call in the air ends by itself');
select is(pg_temp.member(11), 'skipped campaign_cancelled', 'and is not tried again');
select results_eq(
  $$select status::text, open_leads, total_calls, completed_at from public.campaigns where id = (select id from pg_temp.second)$$,
  $$values ('cancelled', 0, 1, null::timestamptz)$$,
  'A cancelled campaign does not pass through completed'
);

-- Opting out reaches every campaign of the organization at once.
select pg_temp.campaign('00000000-0000-4000-8000-0000000000c1', array[21, 22]);
update public.call_queue set next_retry_at = pg_temp.at('27 10:00') where status = 'queued' and organization_id = '00000000-0000-4000-8000-0000000000c1';
select is(pg_temp.writes('a3', $$insert into public.suppressions (phone_number) values ('+917000000021')$$), '1', 'A number is suppressed while its lead waits for days');
select is(pg_temp.release(), 'none', 'The next release');
select is(pg_temp.member(21), 'opted_out opted_out', 'ends it');
select is(pg_temp.writes('a1', $$delete from public.suppressions$$), '42501', 'Nobody takes an opt-out back');

select * from finish();
rollback;
