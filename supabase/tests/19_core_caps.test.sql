-- How often a number is called at most, and how a campaign ends for leads that nobody may call.
begin;
set local search_path = public, extensions, tap;
select plan(33);

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
create function pg_temp.member(number integer) returns text
language sql as $$
  select concat_ws(' ', member.status, member.skip_reason)
  from public.campaign_leads as member
  join public.leads as lead on lead.id = member.lead_id
  where lead.phone = '+917000' || lpad(number::text, 6, '0')
$$;
create function pg_temp.status(campaign uuid) returns text
language sql as $$ select concat_ws(' ', status, open_leads) from public.campaigns where id = campaign $$;
create function pg_temp.at(moment text) returns timestamptz
language sql as $$ select (moment || '+05:30')::timestamptz $$;
-- Dials that are over, each a day and an hour after the one before, the last of them at a moment.
create function pg_temp.dialled(number integer, times integer, last timestamptz, tenant integer default 1, dialled boolean default true) returns void
language sql as $$
  insert into public.call_logs (
    organization_id, carrier_account_id, caller_number, callee_number, status, call_status, dialled, created_at, submitted_at, ended_at
  )
  select
    ('00000000-0000-4000-8000-' || lpad('c' || tenant, 12, '0'))::uuid, '00000000-0000-4000-c000-000000000001', '+910',
    '+917000' || lpad(number::text, 6, '0'), 'ended', 'busy', dialled, day.at, day.at, day.at + interval '30 seconds'
  from generate_series(0, times - 1) as back
  cross join lateral (select last - back * interval '25 hours' as at) as day
$$;

-- Dials of a number in thirty days.
create temp table made as select pg_temp.campaign(pg_temp.tenant(1), array[1, 2, 3, 4, 5]) as campaign;
select pg_temp.tenant(2);
select pg_temp.dialled(1, 15, pg_temp.at('2026-11-22 10:00'));
select pg_temp.dialled(2, 14, pg_temp.at('2026-11-22 10:00'));
-- Fifteen, but the first of them more than thirty days ago.
select pg_temp.dialled(3, 14, pg_temp.at('2026-11-22 10:00')), pg_temp.dialled(3, 1, pg_temp.at('2026-10-25 09:59'));
-- Fifteen of which another organization made one, or of which one was no dial.
select pg_temp.dialled(4, 14, pg_temp.at('2026-11-22 10:00')), pg_temp.dialled(4, 1, pg_temp.at('2026-11-20 21:00'), 2);
select pg_temp.dialled(5, 14, pg_temp.at('2026-11-22 10:00')), pg_temp.dialled(5, 1, pg_temp.at('2026-11-20 21:00'), 1, false);
select is(pg_temp.release(), '2 3 4 5', 'Fifteen dials of an organization in thirty days are all that a number gets');
select is(pg_temp.queue(1), 'queued monthly_cap 07 20:00', 'until the first of them is thirty days ago');
select is(pg_temp.release(pg_temp.at('2026-12-07 19:59')), 'none', 'and not a minute earlier');
select is(pg_temp.release(pg_temp.at('2026-12-07 20:00')), '1', 'Then it is called');
select is(
  (select concat_ws(' ', seen.dials_in_30_days, seen.dials_ever) from private.dial_evidence as seen where seen.attempt_id = (pg_temp.attempt(3)).id),
  '14 15', 'How often it had been is kept as evidence'
);
select is(
  (select concat_ws(' ', seen.dials_in_30_days, seen.dials_ever) from private.dial_evidence as seen where seen.attempt_id = (pg_temp.attempt(4)).id),
  '14 14', 'by the organization itself'
);
update private.platform_dialling set monthly_dials = 3;
select pg_temp.campaign('00000000-0000-4000-8000-0000000000c1', array[6]);
select pg_temp.dialled(6, 3, pg_temp.at('2026-11-22 10:00'));
select is(pg_temp.release(), 'none', 'How many they are, the operator sets');
select is(split_part(pg_temp.queue(6), ' ', 2), 'monthly_cap', 'and the lead says so');
select throws_ok($$update private.platform_dialling set monthly_dials = 61$$, '23514', null, 'within reason');
update private.platform_dialling set monthly_dials = 15;

-- Dials of a number ever.
create temp table done as select pg_temp.campaign('00000000-0000-4000-8000-0000000000c1', array[11, 12]) as campaign;
select pg_temp.dialled(11, 60, pg_temp.at('2026-10-01 10:00'));
select pg_temp.dialled(12, 59, pg_temp.at('2026-10-01 10:00'));
select is(pg_temp.release(), '12', 'Sixty dials are all that a number gets, ever');
select is(pg_temp.member(11), 'skipped lifetime_cap', 'beyond, the lead is over, and says why');
select is(
  private.campaign_json((select campaign from done), private.clock_now()) -> 'skipped', '{"lifetime_cap": 1}', 'to whoever looks at the campaign too'
);
select is(pg_temp.status((select campaign from done)), 'running 1', 'The campaign goes on with the others');

-- A lead of no known zone ends with the campaign.
create temp table lost as select pg_temp.campaign(pg_temp.tenant(3), array[21, 22, 23]) as campaign;
update public.leads set timezone = 'Mars/Olympus' where phone in ('+917000000022', '+917000000023');
update public.leads set timezone = 'Europe/London' where phone = '+917000000021';
select is(pg_temp.release(), 'none', 'Where it is night, and where nobody knows, nobody is called');
select is(pg_temp.queue(22), 'queued bad_timezone 25 10:00', 'There is a day to put a zone right');
select is(pg_temp.release(pg_temp.at('2026-11-25 10:00')), 'none', 'When it is over,');
select is(pg_temp.queue(22), 'queued bad_timezone 26 10:00', 'there is another one while others wait for their call');
update public.leads set timezone = 'Mars/Elysium' where phone = '+917000000022';
select is(pg_temp.release(pg_temp.at('2026-11-25 14:30')), '21', 'as they are');
select is(pg_temp.release(pg_temp.at('2026-11-26 10:00')), 'none', 'And while one is being called');
select is(pg_temp.status((select campaign from lost)), 'running 3', 'the campaign has not come to its end');
select private.end_attempt(pg_temp.attempt(21), 'answered', pg_temp.at('2026-11-26 15:00'));
select is(pg_temp.release(pg_temp.at('2026-11-27 10:00')), 'none', 'Once nobody else is left in it,');
select is(pg_temp.member(22) || ', ' || pg_temp.member(23), 'skipped bad_timezone, skipped bad_timezone', 'they are skipped, which says why');
select is(pg_temp.status((select campaign from lost)), 'completed 0', 'and the campaign completes');

create temp table fresh as select pg_temp.campaign(pg_temp.tenant(4), array[31]) as campaign;
update public.leads set timezone = 'Mars/Olympus' where phone = '+917000000031';
select pg_temp.release();
select is(pg_temp.status((select campaign from fresh)), 'running 1', 'The only lead has its day too');
update public.leads set timezone = 'Asia/Kolkata' where phone = '+917000000031';
select is(pg_temp.release(), '31', 'and is called when its zone is put right');

-- And so does everybody when its last day is past.
create temp table late as select pg_temp.campaign(pg_temp.tenant(5), array[41, 42]) as campaign;
update public.leads set timezone = 'Mars/Olympus' where phone = '+917000000042';
update public.campaigns set end_date = '2026-11-23', start_date = '2026-11-20' where id = (select campaign from late);
select is(pg_temp.release(), 'none', 'After its last day nobody is called');
select is(pg_temp.queue(41), 'queued campaign_over 25 10:00', 'There is a day to give it another one');
select is(pg_temp.release(pg_temp.at('2026-11-25 10:00')), 'none', 'Then the campaign is over');
select is(pg_temp.member(41) || ', ' || pg_temp.member(42), 'skipped campaign_over, skipped bad_timezone', 'for everybody who is left');
select is(pg_temp.status((select campaign from late)), 'completed 0', 'and completes');
create temp table open_ended as select pg_temp.campaign(pg_temp.tenant(6), array[51]) as campaign;
update public.campaigns set time_start = '05:00', time_end = '06:00' where id = (select campaign from open_ended);
select is(pg_temp.release() || pg_temp.release(pg_temp.at('2026-11-26 10:00')), 'nonenone', 'Hours of which the law leaves nothing');
select is(pg_temp.queue(51), 'queued campaign_over 27 10:00', 'end no campaign without a last day: they are put right, and it goes on');

-- No row of the switch is no dialling.
delete from private.platform_dialling;
select is(private.dispatch_obstacle('00000000-0000-4000-8000-0000000000c6', private.clock_now()), 'platform_disabled', 'A switch that is not there is off');

select * from finish();
rollback;
