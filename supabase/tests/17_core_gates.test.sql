-- Gates: switches, pace, weights, classes of calls, and the numbers they are made from.
begin;
set local search_path = public, extensions, tap;
select plan(42);

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

-- Switches.
select pg_temp.campaign(pg_temp.tenant(1), array[1, 2, 3, 4, 5]);
update private.platform_dialling set dialling_enabled = false;
select is(pg_temp.release(), 'none', 'The platform''s switch stops everybody');
select is(pg_temp.waiting(1), '{"platform_disabled": 5}', 'and a campaign says that it is why');
delete from private.platform_dialling;
select is(pg_temp.release(), 'none', 'A switch that is not there is off');
insert into private.platform_dialling (single) values (true);
update public.carrier_accounts set dialling_enabled = false;
select is(pg_temp.release(), 'none', 'An account''s stops those who call through it');
select is(pg_temp.waiting(1), '{"account_disabled": 5}', 'which is another reason');
update public.carrier_accounts set dialling_enabled = true;
update public.organizations set dialling_enabled = false where id = pg_temp.org(1);
select is(pg_temp.release(), 'none', 'An organization''s stops it');
select is(pg_temp.waiting(1), '{"dialling_disabled": 5}', 'for a reason of its own');
update public.organizations set dialling_enabled = true where id = pg_temp.org(1);
update public.campaigns set dialling_enabled = false where organization_id = pg_temp.org(1);
select is(pg_temp.release(), 'none', 'A campaign''s stops it');
select is(pg_temp.waiting(1), '{"campaign_disabled": 5}', 'as well');
update public.campaigns set dialling_enabled = true where organization_id = pg_temp.org(1);
select is(pg_temp.release(), '1 2 3 4 5', 'With all of them on, calls are made');
update private.platform_dialling set dialling_enabled = false;
select is(pg_temp.begin(1), 'platform_disabled', 'Every switch is looked at again at the last moment: the platform''s');
update private.platform_dialling set dialling_enabled = true;
update public.carrier_accounts set dialling_enabled = false;
select is(pg_temp.begin(2), 'account_disabled', 'the account''s');
update public.carrier_accounts set dialling_enabled = true;
update public.organizations set dialling_enabled = false where id = pg_temp.org(1);
select is(pg_temp.begin(3), 'dialling_disabled', 'the organization''s');
update public.organizations set dialling_enabled = true where id = pg_temp.org(1);
update public.campaigns set dialling_enabled = false where organization_id = pg_temp.org(1);
select is(pg_temp.begin(4), 'campaign_disabled', 'the campaign''s');
update public.campaigns set dialling_enabled = true where organization_id = pg_temp.org(1);
select is(pg_temp.begin(5), '5', 'and with all of them on it is dialled');
select is(pg_temp.queue(1), 'queued platform_disabled platform_disabled 24 10:01', 'What was stopped waits');
select is((select sum(attempt_count)::integer from public.call_queue), 0, 'and was no attempt');

-- Pace.
update public.campaigns set status = 'paused';
update public.carrier_accounts set max_calls_per_second = 3;
update private.carrier_pace set refilled_at = clock_timestamp() - interval '1 hour';
select pg_temp.campaign(pg_temp.tenant(2), array(select generate_series(101, 130)));
select is(pg_temp.release(), '101 102 103', 'An account begins so many calls a second');
-- However long this test takes, no second passes for the account.
update private.carrier_pace set refilled_at = clock_timestamp() + interval '1 hour';
select is(pg_temp.release(), 'none', 'and then no more');
select is(private.release_calls('{"v": 1}', private.clock_now()) ->> 'paced', 'true', 'which the dispatcher is told');
update public.carrier_accounts set max_calls_per_second = 0.001;
update private.carrier_pace set refilled_at = clock_timestamp() - interval '800 seconds', tokens = 0;
select is(pg_temp.release(), 'none', 'A part of a call is none');
update private.carrier_pace set refilled_at = clock_timestamp() - interval '1100 seconds', tokens = 0;
select is(pg_temp.release(), '104', 'By and by there is one');
update public.carrier_accounts set max_calls_per_second = 3;
update private.carrier_pace set refilled_at = clock_timestamp() - interval '1 hour';
select is(pg_temp.release(), '105 106 107', 'A pause is not made up for');
update public.carrier_accounts set max_calls_per_second = null;
select is(private.release_calls('{"v": 1, "limit": 500}', private.clock_now()) ->> 'paced', 'false', 'Without a pace nothing waits for it');

-- Classes.
update public.campaigns set status = 'paused' where status = 'running';
select pg_temp.campaign(pg_temp.tenant(3), array(select generate_series(201, 240)));
update public.call_queue as queue
set dial_class = case when right(lead.phone, 2)::integer <= 2 then 2 when right(lead.phone, 2)::integer <= 20 then 1 else 0 end,
  next_retry_at = queue.next_retry_at - case when right(lead.phone, 2)::integer <= 20 then interval '1 hour' else interval '0' end
from public.leads as lead
where lead.id = queue.lead_id and queue.organization_id = pg_temp.org(3);
create table pg_temp.first_ten as select unnest(string_to_array(pg_temp.release(calls => 10), ' '))::integer as number;
select is((select count(*) from pg_temp.first_ten where number <= 202), 2::bigint, 'Promised calls go first');
select is((select count(*) from pg_temp.first_ten where number between 203 and 220), 4::bigint, 'Retries get half of the rest, long as they have waited');
select is((select count(*) from pg_temp.first_ten where number > 220), 4::bigint, 'and fresh leads the other half');
select private.release_calls('{"v": 1, "limit": 28}', private.clock_now());
select is(length(pg_temp.release()) > 4, true, 'Without fresh leads the retries get all');

-- Numbers to call from.
update public.campaigns set status = 'paused' where status = 'running';
select pg_temp.campaign(pg_temp.tenant(4), array(select generate_series(301, 310)));
insert into public.caller_numbers (organization_id, carrier_account_id, phone_number)
values (pg_temp.org(4), '00000000-0000-4000-c000-000000000001', '+918099000044');
update public.organizations set caller_id = '+918099000044' where id = pg_temp.org(4);
insert into public.call_logs (
  organization_id, carrier_account_id, caller_number, callee_number, status, call_status, dialled, created_at, submitted_at, ended_at
)
select pg_temp.org(4), '00000000-0000-4000-c000-000000000001', '+918099000044', '+917000000310', 'ended', 'busy', true, moment, moment, moment
from (values (pg_temp.at('22 10:00'))) as call (moment);
select pg_temp.release();
select is((pg_temp.attempt(301)).caller_number, '+91809900004', 'The general number is the last to be used');
select is((pg_temp.attempt(310)).caller_number, '+918099000044', 'but by who was called from it before');

update public.campaigns set status = 'paused' where status = 'running';
select pg_temp.campaign(pg_temp.tenant(5), array(select generate_series(401, 410)));
update public.caller_numbers set daily_calls = 4 where organization_id = pg_temp.org(5);
select is(pg_temp.release(calls => 3), '401 402 403', 'A number makes its calls');
select is(pg_temp.release(), '404', 'up to those of a day');
select is(pg_temp.release(), 'none', 'and then rests');
select is(pg_temp.queue(410), 'queued 24 10:00', 'Its leads are left where they are');
select is(pg_temp.waiting(5), '{"caller_number_cap": 6}', 'and told why they wait');
select is(pg_temp.release(pg_temp.at('25 10:00:01')), '405 406 407 408', 'until the next day');

-- Ten organizations, with one to two thousand leads and weights from one to three, sixty calls at a time.
update public.campaigns set status = 'paused' where status = 'running';
update public.call_logs set status = 'ended', call_status = 'cancelled', ended_at = created_at where status <> 'ended';
update public.carrier_accounts set max_concurrent_calls = 10000;
select pg_temp.campaign(pg_temp.tenant(20 + size.place::integer), array(select generate_series(size.place::integer * 2000 - 1000, size.place::integer * 2000 - 1001 + size.leads)), 10000)
from unnest(array[1, 3, 40, 100, 500, 600, 600, 800, 800, 800]) with ordinality as size (leads, place);
update public.organizations set dispatch_weight = 1 + right(name, 1)::integer % 3 where name ~ '^Tenant 2[0-9]|^Tenant 30';
create table pg_temp.given as select 0 as round, pg_temp.org(21) as organization_id, 0::bigint as calls limit 0;
do $$
begin
  for round in 1..30 loop
    insert into pg_temp.given
    select round, (attempt ->> 'organization_id')::uuid, count(*)
    from jsonb_array_elements(private.release_calls('{"v": 1, "limit": 60}', private.clock_now()) -> 'attempts') as attempt
    group by 2;
  end loop;
end
$$;
select is((select sum(calls)::integer from pg_temp.given), 1800, 'Thirty releases are full');
select is(
  (select count(*) from pg_temp.given where organization_id = pg_temp.org(21) and round <= 2), 1::bigint, 'The smallest has its call at once'
);
select is(
  (
    select max(abs(share.calls - share.due) / share.due) <= 0.05
    from (
      select
        sum(given.calls) as calls,
        sum(sum(given.calls)) over (partition by span.first) * tenant.dispatch_weight / sum(tenant.dispatch_weight) over (partition by span.first) as due
      from generate_series(1, 21) as span (first)
      join pg_temp.given on given.round between span.first and span.first + 9
      join public.organizations as tenant on tenant.id = given.organization_id
      -- Those who had calls due all the while.
      where exists (select from public.call_queue as queue where queue.organization_id = tenant.id and queue.status = 'queued')
      group by span.first, tenant.id, tenant.dispatch_weight
    ) as share
  ),
  true, 'Over any six hundred calls each with work due has its share by weight, within five parts of a hundred'
);
select is(
  (select count(distinct organization_id) > 4 from pg_temp.given where round = 30), true, 'of which there are several to the end'
);
select pg_temp.campaign(pg_temp.tenant(31), array[25001, 25002]);
select is(
  (
    select bool_or((attempt ->> 'organization_id')::uuid = pg_temp.org(31))
    from generate_series(1, 2) as round
    cross join lateral jsonb_array_elements(private.release_calls('{"v": 1, "limit": 2}', private.clock_now() + round * interval '0') -> 'attempts') as attempt
  ),
  true, 'Who comes new has its first within two releases of two calls'
);
select is(pg_temp.release(calls => 1) <> 'none', true, 'and the others go on');
select * from finish();
rollback;
