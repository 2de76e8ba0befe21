-- Whom a campaign is about, and whom a call may be handed on to.
begin;
set local search_path = public, extensions, tap;
select plan(26);

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
create function pg_temp.user(who text, tenant uuid, role public.system_role) returns void
language sql as $$
  insert into auth.users (id, email) values (('00000000-0000-4000-8000-' || lpad(who, 12, '0'))::uuid, who || '@example.test');
  update public.profiles set organization_id = tenant, system_role = role where id = ('00000000-0000-4000-8000-' || lpad(who, 12, '0'))::uuid;
$$;

select pg_temp.user('a1', pg_temp.tenant(1), 'owner'), pg_temp.user('b1', pg_temp.tenant(2), 'owner');
select pg_temp.user('a3', '00000000-0000-4000-8000-0000000000c1', 'member');
select pg_temp.campaign('00000000-0000-4000-8000-0000000000c1', array[1, 2, 3]);
update public.leads set source = 'fair', score = 7 where phone = '+917000000001';

-- A filter of leads: how many a campaign enrols that has it.
create function pg_temp.enrolled(filter text) returns text
language sql as $$
  select case when told like '{%' then told::jsonb ->> 'total_enrolled' else told end
  from pg_temp.run_as('a1', format($f$select public.create_campaign('Some', settings => '{"leads": %s}')$f$, filter)) as told
$$;
select is(pg_temp.enrolled('{"sources": ["fair", "web"]}'), '1', 'A campaign is about the leads that its filter takes');
select is(pg_temp.enrolled('{"min_score": 7}'), '1', 'by their score');
select is(pg_temp.enrolled('{"min_score": 7, "sources": ["web"]}'), '0', 'all of it at once');
select is(pg_temp.enrolled(format('{"lead_ids": ["%s"]}', (select upper(id::text) from public.leads where source = 'fair'))), '1', 'by their ids');
select is(pg_temp.enrolled('{"stage_ids": ["00000000-0000-4000-a000-0000000000ff"]}'), '0', 'by a stage');
select is(pg_temp.enrolled('{"assigned_to": ["00000000-0000-4000-a000-0000000000ff"]}'), '0', 'by who has them');
select is(pg_temp.enrolled('{"statuses": ["new"], "never_called": true}'), '3', 'by how far they are');
update public.leads set call_status = 'busy' where source = 'fair';
select is(pg_temp.enrolled('{"never_called": true}'), '2', 'or whether they were called');
select is(pg_temp.enrolled('{}') || pg_temp.enrolled('null'), '33', 'No filter takes everybody');
select is(pg_temp.enrolled('{"scores": 7}'), '422 invalid_setting leads', 'and what is not understood nobody');
select is(pg_temp.enrolled('{"sources": []}'), '422 invalid_setting leads', 'An empty list is none');
select is(pg_temp.enrolled('{"sources": "fair"}'), '422 invalid_setting leads', 'neither is a word');
select is(pg_temp.enrolled('{"sources": [1]}'), '422 invalid_setting leads', 'nor a list of numbers');
select is(pg_temp.enrolled('{"lead_ids": ["1"]}'), '422 invalid_setting leads', 'An id is one');
select is(pg_temp.enrolled('{"min_score": "7"}') || pg_temp.enrolled('{"never_called": 1}') || pg_temp.enrolled('7'),
  '422 invalid_setting leads422 invalid_setting leads422 invalid_setting leads', 'and so is everything else');
select is(
  (select count(*) from public.campaigns where name = 'Some' and lead_filter <> '{}'), 8::bigint, 'What it was is kept with the campaign'
);

-- Transfers.
select pg_temp.release();
create function pg_temp.transfer(who text, phone text) returns text
language sql as $$
  select case when told like '{%' then coalesce(told::jsonb ->> 'reason', 'allowed') else told end
  from pg_temp.run_as(who, format('select public.check_transfer(%L, %L)', (pg_temp.attempt(1)).id, phone)) as told
$$;
select is(pg_temp.transfer('a1', '+919812345678'), 'allowed', 'A call goes on to a number that may be dialled');
select is(pg_temp.transfer('a3', '+919812345678'), '403 permission_denied', 'for whom controls calls');
select is(pg_temp.transfer('b1', '+919812345678'), '404 call_not_found call_id', 'of their own organization');
select is(pg_temp.transfer('a1', '+19005550100'), 'destination_blocked', 'never to a premium number');
select is(pg_temp.transfer('a1', '100'), 'destination_blocked', 'or to what is no number');
update public.organizations set dial_countries = '{US}' where id = '00000000-0000-4000-8000-0000000000c1';
select is(pg_temp.transfer('a1', '+919812345678'), 'destination_blocked', 'nor to a country that is not listed');
update public.organizations set dial_countries = null, max_price_micros = 1 where id = '00000000-0000-4000-8000-0000000000c1';
select is(pg_temp.transfer('a1', '+919812345678'), 'price_ceiling', 'nor where it is too dear');
update public.organizations set max_price_micros = null where id = '00000000-0000-4000-8000-0000000000c1';
update private.platform_dialling set dialling_enabled = false;
select is(pg_temp.transfer('a1', '+919812345678'), 'platform_disabled', 'nor while nobody is dialled');
update private.platform_dialling set dialling_enabled = true;
select is(
  (select count(*) || ' ' || count(*) filter (where metadata::text like '%98123%') from public.audit_logs where action = 'call.transfer_checked'), '6 0',
  'Each is on record, without the number'
);
select private.end_attempt(pg_temp.attempt(1), 'busy', private.clock_now());
select is(pg_temp.transfer('a1', '+919812345678'), '409 invalid_transition call_id', 'A call that is over goes to nobody');

select * from finish();
rollback;
