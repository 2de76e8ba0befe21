-- A preview says what a start then does, and leaves nothing; and how campaigns are ended early, put away and brought back.
begin;
set local search_path = public, extensions, tap;
select plan(17);

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
insert into auth.users (id, email, email_confirmed_at)
values ('00000000-0000-4000-8000-0000000000d1', 'owner@preview.test', now());
select pg_temp.tenant(1, 'core-three');
update public.profiles set organization_id = '00000000-0000-4000-8000-0000000000c1', system_role = 'owner' where id = '00000000-0000-4000-8000-0000000000d1';
insert into public.projects (id, organization_id, name) values ('00000000-0000-4000-8000-0000000000f1', '00000000-0000-4000-8000-0000000000c1', 'Project');
insert into public.leads (organization_id, project_id, name, phone, timezone, do_not_call)
select '00000000-0000-4000-8000-0000000000c1', '00000000-0000-4000-8000-0000000000f1', 'Lead ' || number, '+91700000' || lpad(number::text, 4, '0'),
  case number when 8 then 'Europe/London' end, number = 9
from generate_series(1, 9) as number;
insert into public.campaigns (id, organization_id, project_id, name)
values ('00000000-0000-4000-9000-0000000000f1', '00000000-0000-4000-8000-0000000000c1', '00000000-0000-4000-8000-0000000000f1', 'Campaign');
create table pg_temp.previewed as
select pg_temp.run_as('d1', $$select public.preview_campaign('00000000-0000-4000-9000-0000000000f1')$$) as told;
grant select on pg_temp.previewed to public;
select is((select told::jsonb ->> 'queued' from pg_temp.previewed), '9', 'All leads would be queued');
select is((select told::jsonb ->> 'callable' from pg_temp.previewed), '7', 'seven may be called');
select is((select told::jsonb ->> 'affordable' from pg_temp.previewed), '3', 'for three of which the plan has calls');
select is((select told::jsonb ->> 'later' from pg_temp.previewed), '{"outside_window": 1}', 'one waits for their morning');
select is((select told::jsonb ->> 'skipped' from pg_temp.previewed), '{"opted_out": 1}', 'one is never called');
select is((select (told::jsonb ->> 'first_call_at')::timestamptz from pg_temp.previewed), private.clock_now(), 'The first is called now');
select is((select (told::jsonb ->> 'done_by')::timestamptz > private.clock_now() from pg_temp.previewed), true, 'and some time all is done');
select is((select count(*) from public.call_queue), 0::bigint, 'Nothing is queued');
select is((select status::text || ' ' || total_enrolled from public.campaigns), 'draft 0', 'started or enrolled');
select is((select coalesce(sum(reserved), 0)::integer from public.usage_logs), 0, 'or held');
select is(pg_temp.run_as('d1', $$select public.start_campaign('00000000-0000-4000-9000-0000000000f1') ->> 'status'$$), 'running', 'A start then');
select is(array_length(string_to_array(pg_temp.release(), ' '), 1), 3, 'calls as many');
select is(
  (select string_agg(format('%s %s', coalesce(wait_reason, last_error), queue.status), ', ' order by status) from public.call_queue as queue
    where coalesce(wait_reason, last_error) is not null),
  'outside_window queued, opted_out failed', 'and leaves as many for the same reasons'
);
select is(pg_temp.run_as('d1', $$select public.archive_campaign('00000000-0000-4000-9000-0000000000f1') ->> 'status'$$), '409 invalid_transition status', 'What runs is not put away');
select is(pg_temp.run_as('d1', $$select public.complete_campaign('00000000-0000-4000-9000-0000000000f1') ->> 'status'$$), 'completed', 'but may be completed');
select is(pg_temp.run_as('d1', $$select public.archive_campaign('00000000-0000-4000-9000-0000000000f1') ->> 'status'$$), 'archived', 'then be put away');
select is(pg_temp.run_as('d1', $$select public.restore_campaign('00000000-0000-4000-9000-0000000000f1') ->> 'status'$$), 'draft', 'and come back as a draft');
select * from finish();
rollback;
