-- Where a number is: whether it may be called, and when the law there lets it be.
begin;
set local search_path = public, extensions, tap;
select plan(30);

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
create function pg_temp.at(moment text) returns timestamptz
language sql as $$ select ('2026-11-' || moment || '+05:30')::timestamptz $$;
-- A lead with a number of its own, queued in the campaign of an organization.
create function pg_temp.lead(number text, zone text default null, organization integer default 1) returns void
language plpgsql as $$
declare
  lead public.leads;
  campaign public.campaigns;
begin
  select mine.* into campaign from public.campaigns as mine where mine.organization_id::text like '%c' || organization;
  insert into public.leads (organization_id, name, phone, timezone) values (campaign.organization_id, number, number, zone) returning * into lead;
  insert into public.campaign_leads (organization_id, campaign_id, lead_id, status) values (campaign.organization_id, campaign.id, lead.id, 'queued');
  insert into public.call_queue (organization_id, campaign_id, lead_id, next_retry_at) values (campaign.organization_id, campaign.id, lead.id, private.clock_now());
  update public.campaigns set open_leads = open_leads + 1, status = 'running' where id = campaign.id;
end
$$;
-- What becomes of a number at a moment: dialled, why not, or when (UTC).
create function pg_temp.fate(number text, moment timestamptz) returns text
language plpgsql as $$
begin
  update public.call_queue set next_retry_at = '2027-01-01' where status = 'queued';
  update public.call_queue as queue
  set next_retry_at = moment, status = 'queued'
  from public.leads as lead
  where lead.id = queue.lead_id and lead.phone = number;
  perform private.release_calls('{"v": 1, "limit": 500}', moment);
  return (
    select concat_ws(' ', queue.wait_reason, queue.last_error, queue.status, case when queue.status = 'queued' then to_char(queue.next_retry_at at time zone 'UTC', 'DD HH24:MI') end)
    from public.call_queue as queue
    join public.leads as lead on lead.id = queue.lead_id
    where lead.phone = number
  );
end
$$;
select pg_temp.campaign(pg_temp.tenant(1), array[1]);
update public.campaigns set auto_complete = false;
select pg_temp.lead(number, zone)
from (
  values
    ('+19005550100', null), ('+911900555010', null), ('+881612345678', null), ('+14165550100', 'America/Toronto'), ('+447700900001', 'Europe/London'),
    ('+91700000', null), ('+12125550100', 'America/New_York'), ('+13055550100', 'America/New_York'), ('+12255550100', 'America/Chicago'),
    ('+917000000002', null), ('+12125550111', 'America/New_York'), ('+12115550100', 'America/New_York'), ('+18005550100', 'America/New_York'),
    ('+16155550100', null), ('+16155550101', 'America/New_York')
) as made (number, zone);

select is(pg_temp.fate('+19005550100', pg_temp.at('24 20:00')), 'destination_blocked failed', 'Nobody calls a premium number');
select is(pg_temp.fate('+911900555010', pg_temp.at('24 20:00')), 'destination_blocked failed', 'in whatever country');
select is(pg_temp.fate('+881612345678', pg_temp.at('24 20:00')), 'destination_blocked failed', 'nor a satellite');
select is(pg_temp.fate('+91700000', pg_temp.at('24 20:00')), 'destination_blocked failed', 'nor a short code');
select is(pg_temp.fate('+14165550100', pg_temp.at('24 20:00')), 'destination_blocked failed', 'nor where no hours are known, with the prefix of where they are');
select is(pg_temp.fate('+447700900001', pg_temp.at('24 20:00')), 'destination_blocked failed', 'or another');
select is(pg_temp.fate('+12115550100', pg_temp.at('24 20:00')), 'destination_blocked failed', 'nor an area code of which no state is known');
select is(pg_temp.fate('+18005550100', pg_temp.at('24 20:00')), 'destination_blocked failed', 'as one free of charge is of none');
update public.organizations set dial_countries = '{IN}' where id = '00000000-0000-4000-8000-0000000000c1';
select is(pg_temp.fate('+12125550111', pg_temp.at('24 20:00')), 'destination_blocked failed', 'An organization calls the countries listed for it');
update public.organizations set dial_countries = null where id = '00000000-0000-4000-8000-0000000000c1';

-- Tennessee has two zones; the campaign's is another.
select is(pg_temp.fate('+16155550100', '2026-11-24 14:30Z'), 'outside_window queued 24 15:00', 'Who may be in either of two zones waits for the later one');
select is(pg_temp.fate('+16155550101', '2026-11-24 14:30Z'), 'processing', 'while of whom the zone is known is not made to');
select is(pg_temp.fate('+16155550100', '2026-11-25 02:30Z'), 'outside_window queued 25 15:00', 'and is left alone when the earlier one is over');
select is(pg_temp.fate('+16155550100', '2026-11-25 15:00Z'), 'processing', 'In the hours of both they are called, whatever the campaign''s zone');
select is_empty(
  $$select zone from private.destinations, unnest(zones) as zone except select name from private.timezones$$, 'Every zone of a number is one'
);
select is_empty(
  $$select prefix from private.destinations where kind = 'ordinary' and country in (select jurisdiction from public.calling_hours) and zones is null$$,
  'and where somebody may be called, it is known which'
);

-- 20:30 in New York, Tuesday.
select is(pg_temp.fate('+13055550100', '2026-11-25 01:30Z'), 'outside_window queued 25 14:00', 'Florida is over at eight');
select is(pg_temp.fate('+12125550100', '2026-11-25 01:30Z'), 'processing', 'while New York is not');
-- Sunday noon in Louisiana, and the Thursday of Thanksgiving.
select is(pg_temp.fate('+12255550100', '2026-11-22 18:00Z'), 'outside_window queued 23 15:00', 'Louisiana is left alone on a Sunday');
select is(pg_temp.fate('+12255550100', '2026-11-26 18:00Z') ~ '^outside_window queued (27|28)', true, 'and on a holiday');
select is(pg_temp.fate('+12255550100', '2026-11-24 15:00Z'), 'processing', 'and else called, from nine in its zone');
-- 09:30 in Kolkata.
insert into public.consents (organization_id, phone_number, scope, consent_text, source, proof, granted_at)
select lead.organization_id, '+91700000000' || number, 'call_promotional', 'Call me', 'written', '{"page": 1}', '2026-11-01'
from (select distinct known.organization_id from public.leads as known) as lead
cross join generate_series(2, 3) as number;
update public.campaigns set purpose = 'promotional';
select is(pg_temp.fate('+917000000002', '2026-11-25 04:00Z'), 'outside_window queued 25 04:30', 'Who sells waits until ten in India');
update public.campaigns set purpose = 'service';
select is(pg_temp.fate('+917000000002', '2026-11-25 04:00Z'), 'processing', 'who serves may call at nine');
delete from public.calling_hours where jurisdiction = 'IN' and purpose = 'promotional';
update public.campaigns set purpose = 'promotional';
select pg_temp.lead('+917000000003');
select is(pg_temp.fate('+917000000003', '2026-11-25 05:00Z') like 'campaign_over queued%', true, 'Without hours for what it is, nobody is called');
update public.campaigns set purpose = 'service';

-- Registers.
select pg_temp.lead('+917000000004');
select pg_temp.lead('+917000000005');
update private.dnc_registers set is_enforced = true where key = 'in_ncpr';
select is(pg_temp.fate('+917000000004', '2026-11-25 05:00Z'), 'register_stale queued 25 06:00', 'A register that is too old lets nobody be called');
select private.open_dnc_version('in_ncpr', 'november', true, '2026-11-20');
insert into private.dnc_staged (register_key, number, phone_number) values ('in_ncpr', 1, '+917000000004');
select private.publish_dnc_version('in_ncpr', 1, '2026-11-21');
select is(pg_temp.fate('+917000000004', '2026-11-25 05:00Z'), 'registered failed', 'Who is on one is not called');
select is(pg_temp.fate('+917000000005', '2026-11-25 05:00Z'), 'processing', 'and who is not, is');
select is((select count(*) from public.campaign_leads where skip_reason = 'registered'), 1::bigint, 'The lead says why');

-- Evidence.
insert into public.consents (id, organization_id, phone_number, scope, consent_text, source, proof, granted_at)
values ('00000000-0000-4000-b000-000000000001', '00000000-0000-4000-8000-0000000000c1', '+917000000006', 'call_service', 'Call me', 'form', '{"ip": "192.0.2.1"}', '2026-11-01');
select pg_temp.lead('+917000000006', 'Asia/Kolkata');
select pg_temp.fate('+917000000006', '2026-11-25 05:00Z');
create function pg_temp.evidence(phone text) returns text
language sql as $$
  select concat_ws(' ', right(seen.consent_id::text, 1), seen.register_key, seen.register_version, seen.country, seen.purpose, seen.zones[1], seen.zone_source)
  from private.dial_evidence as seen join public.call_logs as log on log.id = seen.attempt_id where log.callee_number = phone
$$;
select is(pg_temp.evidence('+917000000006'), '1 in_ncpr 1 IN service Asia/Kolkata lead', 'What a call was allowed by is kept');
select is(pg_temp.evidence('+917000000005'), 'in_ncpr 1 IN service Asia/Kolkata number', 'and what it was allowed without');
update public.call_logs set status = 'submitting', dialled = true, submitted_at = '2026-11-25 05:00Z' where callee_number = '+917000000006';
insert into auth.users (id, email, email_confirmed_at) values ('00000000-0000-4000-8000-0000000000d1', 'owner@law.test', now());
update public.profiles set organization_id = '00000000-0000-4000-8000-0000000000c1', system_role = 'owner' where id = '00000000-0000-4000-8000-0000000000d1';
update private.clock_offset set shift = timestamptz '2026-11-25 06:00Z' - now();
select set_config('request.jwt.claims', '{"sub": "00000000-0000-4000-8000-0000000000d1", "role": "authenticated"}', true);
set local role authenticated;
select set_config('law.evidence', public.get_dial_evidence('+917000000006')::text, true);
reset role;
select is(current_setting('law.evidence')::jsonb #>> '{calls,0,consent,text}', 'Call me', 'for whoever has to show it');
select * from finish();
rollback;
