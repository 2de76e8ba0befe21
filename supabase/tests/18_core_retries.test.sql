-- Retries of a campaign's own, breakers, and what a carrier without room does.
begin;
set local search_path = public, extensions, tap;
select plan(24);

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

-- Retries.
select pg_temp.campaign(pg_temp.tenant(1), array(select generate_series(1, 60)));
create table pg_temp.c as select id from public.campaigns;
select throws_like($$update public.campaigns set retry_rules = '{"answered": [60]}'$$, '%invalid_setting%', 'Nobody is called again who answered');
select throws_like($$update public.campaigns set retry_rules = '{"rejected": [60, 60]}'$$, '%invalid_setting%', 'nor more often than the platform allows');
select throws_like($$update public.campaigns set retry_rules = '{"busy": [1]}'$$, '%invalid_setting%', 'nor at once');
update private.platform_dialling set retry_jitter = 0;
update public.campaigns set retry_rules = '{"busy": [150]}';
select is(private.retry_wait(campaign, 'busy', 1), interval '150 minutes', 'A campaign waits as it likes') from public.campaigns as campaign;
select is(private.retry_wait(campaign, 'busy', 2), null, 'and as often') from public.campaigns as campaign;
select is(private.retry_wait(campaign, 'no_answer', 1), interval '2 hours', 'and else as everybody') from public.campaigns as campaign;
update private.platform_dialling set retry_jitter = 0.2;
select is(
  (
    select min(spread.wait) >= interval '96 minutes' and max(spread.wait) <= interval '144 minutes' and max(spread.wait) - min(spread.wait) > interval '30 minutes'
    from (select private.retry_wait(campaign, 'no_answer', 1) as wait from public.campaigns as campaign cross join generate_series(1, 200)) as spread
  ),
  true, 'A fifth sooner or later, so that not all come back together'
);
update private.platform_dialling set retry_jitter = 0;
create function pg_temp.next(moment text, earliest text, other boolean) returns text
language sql as $$
  select to_char(private.next_dial_at(
    jsonb_populate_record(null::public.call_logs, jsonb_build_object(
      'callee_number', '+917000009999', 'organization_id', member.organization_id, 'lead_id', member.lead_id,
      'submitted_at', pg_temp.at(moment), 'ended_at', pg_temp.at(moment))),
    campaign, pg_temp.at(earliest), other) at time zone 'Asia/Kolkata', 'DD HH24:MI')
  from public.campaigns as campaign
  cross join lateral (select enrolled.* from public.campaign_leads as enrolled where enrolled.campaign_id = campaign.id limit 1) as member
$$;
select is(pg_temp.next('24 10:00', '25 10:00', false), '25 10:00', 'A retry comes when its rule says');
select is(pg_temp.next('24 10:00', '25 10:00', true), '25 12:00', 'or at another time of the day: the morning''s in the afternoon');
select is(pg_temp.next('24 14:00', '24 16:00', true), '24 17:00', 'the afternoon''s in the evening');
select is(pg_temp.next('24 18:00', '24 20:00', true), '25 09:00', 'and the evening''s in the morning, within the window');

-- Breakers.
select pg_temp.release(calls => 10);
select pg_temp.end_all('busy');
select is(pg_temp.release(calls => 10) <> 'none', true, 'Ten that are busy say nothing of the line');
select pg_temp.end_all('carrier_transient');
select is(pg_temp.release(), 'none', 'Ten faults in two minutes stop it');
select is((select string_agg(is_open::text, ' ') from private.breakers), 'true true', 'the account and the campaign');
select is(pg_temp.waiting(1)::jsonb ? 'circuit_open', true, 'which is why the campaign waits');
select pg_temp.set_clock('24 10:01:20');
select pg_temp.release();
select is(pg_temp.live(), 1, 'A minute later one call tries');
select is(pg_temp.release(), 'none', 'and no other meanwhile');
select pg_temp.end_all('our_fault');
select is(pg_temp.release(), 'none', 'If it fails too, the wait begins again');
select pg_temp.set_clock('24 10:03');
select pg_temp.release();
select pg_temp.end_all('answered');
select pg_temp.release(calls => 8);
select is(pg_temp.live(), 8, 'If it does not, all is as before');

-- No room.
select pg_temp.end_all('capacity');
select pg_temp.set_clock('24 10:03:30');
select is((select count(*)::integer from pg_temp.c where pg_temp.release() is not null), 1, 'After a refusal for want of room');
select is(pg_temp.live() <= 4, true, 'fewer calls are in flight');
select pg_temp.set_clock('24 10:08');
select private.check_breakers(private.clock_now());
select is((select ceiling from private.carrier_pace), 8, 'one more for each minute without');

-- Of what is under way, what the carrier took speaks for its line.
select pg_temp.set_clock('24 10:30');
delete from private.breakers;
insert into public.call_logs (organization_id, carrier_account_id, caller_number, callee_number, status, dialled, submitted_at)
select
  organization.id, '00000000-0000-4000-c000-000000000001', '+918099000099', '+9170009' || lpad(number::text, 5, '0'),
  case when number <= 10 then 'submission_unknown' else 'in_progress' end::public.attempt_status, true, private.clock_now()
from generate_series(1, 21) as number
cross join (select min(id::text)::uuid as id from public.organizations) as organization;
select private.check_breakers(private.clock_now());
select is((select count(*)::integer from private.breakers), 0, 'Ten of which nothing is known beside eleven that talk stop nothing');
update public.call_logs set status = 'ended', call_status = 'busy', ended_at = private.clock_now() where callee_number = '+917000900021';
select private.check_breakers(private.clock_now());
select is((select count(*)::integer from private.breakers where is_open), 1, 'beside ten they do');
select * from finish();
rollback;
