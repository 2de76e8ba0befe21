-- Release: every gate, every limit, fairness, and an attempt that is never lost.
begin;
set local search_path = public, extensions, tap;
select plan(61);

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

-- What a release does.
select pg_temp.campaign(pg_temp.tenant(1), array[1, 2, 3]);
select is(pg_temp.release(), '1 2 3', 'Due leads of a running campaign get an attempt each');
select results_eq(
  $$select status::text, dialled, attempt_no, caller_number, created_at, lease_until - now(), not_after - now(), call_status::text
    from public.call_logs where id = (pg_temp.attempt(1)).id$$,
  $$values ('created', false, 1, '+91809900001', private.clock_now(), interval '60 seconds', interval '10 minutes', null)$$,
  'with a lease of a minute, to be begun within ten'
);
select is(pg_temp.queue(1), 'processing', 'The queue row is taken');
select is(pg_temp.member(1), 'calling', 'the lead is being called');
select is(
  (select reserved from public.usage_logs where organization_id = '00000000-0000-4000-8000-0000000000c1' and feature_key = 'ai_calls'), 3::bigint,
  'and the plan holds a call for each'
);
select is(pg_temp.release(), 'none', 'Nothing is released twice');

-- A message that is lost.
update public.call_logs set lease_until = now() - interval '1 second' where id in ((pg_temp.attempt(2)).id, (pg_temp.attempt(3)).id);
update public.call_logs set not_after = now() - interval '1 second' where id = (pg_temp.attempt(3)).id;
create table pg_temp.before as select (pg_temp.attempt(2)).id;
select is(pg_temp.release(), '2', 'An attempt whose lease lapsed is offered again, one past its time is not');
select is((pg_temp.attempt(2)).id, (select id from pg_temp.before), 'and it is the same one');
select is((pg_temp.attempt(2)).lease_until, now() + interval '60 seconds', 'with a new lease');

-- Limits.
select pg_temp.campaign(pg_temp.tenant(2), array[11, 12, 13, 14, 15], calls => 2);
select is(pg_temp.release(), '11 12', 'A campaign has only so many calls in flight');
select is(pg_temp.release(), 'none', 'however often it is asked');
update public.campaigns set max_concurrent_calls = 1000 where organization_id = '00000000-0000-4000-8000-0000000000c2';
update public.organizations set max_concurrent_calls = 4 where id = '00000000-0000-4000-8000-0000000000c2';
select is(pg_temp.release(), '13 14', 'so has an organization');
update public.organizations set max_concurrent_calls = 1000 where id = '00000000-0000-4000-8000-0000000000c2';
update public.carrier_accounts
set max_concurrent_calls = (select count(*) from public.call_logs where status <> 'ended' and carrier_account_id = carrier_accounts.id)
where id = '00000000-0000-4000-c000-000000000001';
select is(pg_temp.release(), 'none', 'and so has a carrier account');
update public.carrier_accounts set max_concurrent_calls = max_concurrent_calls + 4 where id = '00000000-0000-4000-c000-000000000001';

-- Fairness: the account has room for four.
select pg_temp.campaign(pg_temp.tenant(3), array[21, 22, 23, 24, 25, 26]);
select pg_temp.campaign(pg_temp.tenant(4), array[31, 32, 33, 34, 35, 36]);
update public.campaigns set max_concurrent_calls = 4 where organization_id = '00000000-0000-4000-8000-0000000000c2';
select is(pg_temp.release(), '21 22 31 32', 'What room there is goes round the organizations');
update public.carrier_accounts set max_concurrent_calls = 1000 where id = '00000000-0000-4000-c000-000000000001';
select is(length(replace(pg_temp.release(calls => 3), ' ', '')), 6, 'No more than were asked for');
select is(private.release_calls('{"v": 1, "limit": 1}', private.clock_now()) -> 'more', 'true', 'and who asked for fewer is told that there are more');
select is(pg_temp.release() <> 'none', true, 'They are there');
select is(private.release_calls('{"v": 1}', private.clock_now()) -> 'more', 'false', 'until there are no more');

-- Priority.
select pg_temp.campaign(pg_temp.tenant(5), array[41, 42, 43, 44], calls => 1);
update public.call_queue set priority = 9 where lead_id = (select id from public.leads where phone = '+917000000043');
update public.call_queue set priority = 7, next_retry_at = next_retry_at - interval '1 hour'
where lead_id = (select id from public.leads where phone = '+917000000044');
update public.call_queue set next_retry_at = next_retry_at - interval '2 hours'
where lead_id = (select id from public.leads where phone = '+917000000042');
select is(pg_temp.release(), '43', 'The highest priority goes first');
update public.campaigns set max_concurrent_calls = 2 where organization_id = '00000000-0000-4000-8000-0000000000c5';
select is(pg_temp.release(), '44', 'then the next');
update public.campaigns set max_concurrent_calls = 3 where organization_id = '00000000-0000-4000-8000-0000000000c5';
select is(pg_temp.release(), '42', 'and among equals who has waited longest');

-- A paused campaign holds nobody up.
select pg_temp.campaign(pg_temp.tenant(6), array(select generate_series(100, 400)));
update public.call_queue set next_retry_at = next_retry_at - interval '1 day' where organization_id = '00000000-0000-4000-8000-0000000000c6';
update public.campaigns set status = 'paused' where organization_id = '00000000-0000-4000-8000-0000000000c6';
select pg_temp.campaign(pg_temp.tenant(7), array[51]);
select is(pg_temp.release(calls => 10), '51', 'Three hundred rows of a paused campaign starve no other');
select is((select count(*) from public.call_queue where wait_reason is not null and organization_id = '00000000-0000-4000-8000-0000000000c6'), 0::bigint, 'and are not touched');

-- The window.
select pg_temp.campaign(pg_temp.tenant(8), array[61, 62, 63, 64, 65]);
update public.leads set timezone = 'Europe/London' where phone = '+917000000062';
update public.leads set timezone = 'Mars/Olympus' where phone = '+917000000063';
update public.leads set timezone = 'IST' where phone = '+917000000064';
update public.leads set timezone = '' where phone = '+917000000065';
select is(pg_temp.release(), '61 65', 'Who is where it is night, or nobody knows where, is not called');
select is(pg_temp.queue(62), 'queued outside_window 24 14:30', 'but when it is nine there');
select is(pg_temp.queue(63), 'queued bad_timezone 25 10:00', 'or a zone is found');
select is(pg_temp.queue(64), 'queued bad_timezone 25 10:00', 'which an abbreviation is not');
update public.leads set timezone = 'Asia/Kolkata' where phone = '+917000000063';
select is(pg_temp.release(), '63', 'A lead whose zone is put right is called at once');
select is(pg_temp.release(pg_temp.at('24 14:29:59')), 'none', 'A window is not early');
select is(pg_temp.release(pg_temp.at('24 14:30')), '62', 'and includes its first minute');
select is((pg_temp.attempt(62)).attempt_no, 1, 'Waiting is no attempt');

select pg_temp.campaign(pg_temp.tenant(9), array[71, 72]);
update public.campaigns set time_start = '14:00', time_end = '14:05' where organization_id = '00000000-0000-4000-8000-0000000000c9';
select is(pg_temp.release(), 'none', 'A campaign has hours of its own');
update public.campaigns set start_date = '2026-11-26' where organization_id = '00000000-0000-4000-8000-0000000000c9';
select is(pg_temp.release(), 'none', 'and days');
select is(pg_temp.queue(71), 'queued outside_window 26 14:00', 'It waits for both');
update public.campaigns set start_date = null where organization_id = '00000000-0000-4000-8000-0000000000c9';
select is(pg_temp.release(pg_temp.at('24 14:02')), '71 72', 'What a change of hours opens is open at once');
select is((pg_temp.attempt(71)).not_after - now(), interval '3 minutes', 'and nothing is begun when they are over');
update public.call_logs set status = 'ended', call_status = 'expired', ended_at = private.clock_now() where organization_id = '00000000-0000-4000-8000-0000000000c9';
update public.call_queue set status = 'queued' where organization_id = '00000000-0000-4000-8000-0000000000c9';
update public.campaigns set end_date = '2026-11-23', start_date = '2026-11-20' where organization_id = '00000000-0000-4000-8000-0000000000c9';
select is(pg_temp.release(), 'none', 'After its last day nobody is called');
select is(pg_temp.queue(71), 'queued campaign_over 25 10:00', 'and that is why');

-- The callee: one call at a time, an hour between two, two a day, whoever calls.
create function pg_temp.dialled(number integer, moment timestamptz, dialled boolean default true) returns void
language sql as $$
  insert into public.call_logs (
    organization_id, carrier_account_id, caller_number, callee_number, status, call_status, dialled, created_at, submitted_at, ended_at
  )
  values (
    '00000000-0000-4000-8000-0000000000c1', '00000000-0000-4000-c000-000000000001', '+910', '+91700000' || lpad(number::text, 4, '0'),
    'ended', 'busy', dialled, moment, moment, moment + interval '30 seconds'
  )
$$;
select pg_temp.dialled(81, pg_temp.at('24 09:00:10'));
select pg_temp.dialled(82, pg_temp.at('24 08:59:30'));
select pg_temp.dialled(83, pg_temp.at('23 11:00')), pg_temp.dialled(83, pg_temp.at('23 12:00'));
select pg_temp.dialled(84, pg_temp.at('23 09:59')), pg_temp.dialled(84, pg_temp.at('23 12:00'));
select pg_temp.dialled(85, pg_temp.at('24 09:59'), dialled => false);
select pg_temp.campaign(pg_temp.tenant(10), array[81, 82, 83, 84, 85, 86]);
select pg_temp.campaign(pg_temp.tenant(11), array[86, 1]);
select is(pg_temp.release(), '82 84 85 86', 'Whom another organization just called is left alone; what was no call does not count');
select is(pg_temp.queue(81), 'queued min_gap 24 10:01', 'for an hour after the call');
select is(pg_temp.queue(83), 'queued daily_cap 24 11:01', 'or a day after the last but one');
select is(
  (select count(*) from public.call_logs where callee_number = '+917000000086'), 1::bigint, 'Two campaigns with one number: one calls'
);
select is(
  (select concat_ws(' ', queue.status, queue.wait_reason) from public.call_queue as queue join public.leads as lead on lead.id = queue.lead_id
    where lead.phone = '+917000000001' and queue.organization_id = '00000000-0000-4000-8000-000000000c11'),
  'queued number_in_call', 'and a number that is being called is busy for all others'
);
select throws_ok(
  $$insert into public.call_logs (organization_id, carrier_account_id, caller_number, callee_number)
    values ('00000000-0000-4000-8000-000000000c11', '00000000-0000-4000-c000-000000000001', '+910', '+917000000001')$$,
  '23505', null, 'which is also a constraint'
);

-- Who must not be called.
select pg_temp.campaign(pg_temp.tenant(12), array[91, 92, 93, 94, 95]);
insert into public.suppressions (organization_id, phone_number) values ('00000000-0000-4000-8000-000000000c12', '+917000000091');
update public.leads set do_not_call = true where phone = '+917000000092';
update public.leads set abuse_flag = true where phone = '+917000000093';
update public.leads set archived_at = now() where phone = '+917000000094';
update public.leads set phone = null where phone = '+917000000095';
select is(pg_temp.release(), 'none', 'Who opted out, was abusive, is archived or has no number is not called');
select is(pg_temp.member(91), 'opted_out opted_out', 'An opt-out ends the lead');
select is(pg_temp.member(92), 'opted_out opted_out', 'however it came');
select is(pg_temp.member(93), 'skipped abuse', 'The others are skipped');
select is(pg_temp.queue(94), 'failed archived', 'and never come again');
select results_eq(
  $$select status::text, open_leads, completed_at is not null from public.campaigns where organization_id = '00000000-0000-4000-8000-000000000c12'$$,
  $$values ('completed', 0, true)$$,
  'With its last lead the campaign is complete'
);
select is((select count(*) from public.suppressions where phone_number = '+917000000092'), 1::bigint, 'A lead that opts out suppresses its number');

-- The organization: its switch, its subscription, its number, its quota.
select pg_temp.campaign(pg_temp.tenant(13), array[501, 502, 503, 504, 505]);
update public.organizations set dialling_enabled = false where id = '00000000-0000-4000-8000-000000000c13';
select is(pg_temp.release(), 'none', 'Dialling can be switched off');
update public.organizations set dialling_enabled = true where id = '00000000-0000-4000-8000-000000000c13';
update public.subscriptions set status = 'suspended' where organization_id = '00000000-0000-4000-8000-000000000c13';
select is(pg_temp.release(), 'none', 'Without a subscription nobody is called');
update public.subscriptions set status = 'active' where organization_id = '00000000-0000-4000-8000-000000000c13';
update public.caller_numbers set is_active = false where organization_id = '00000000-0000-4000-8000-000000000c13';
select is(pg_temp.release(), 'none', 'nor without a number to call from');
update public.caller_numbers set is_active = true where organization_id = '00000000-0000-4000-8000-000000000c13';
select is(
  (select array_agg(queue.wait_reason) from public.call_queue as queue where organization_id = '00000000-0000-4000-8000-000000000c13' and wait_reason is not null),
  null, 'None of which moves its rows'
);
select is(pg_temp.release(), '501 502 503 504 505', 'so that they go at once when it is over');

select pg_temp.campaign(pg_temp.tenant(14, 'core-three'), array[601, 602, 603, 604, 605]);
select is(pg_temp.release(), '601 602 603', 'A plan of three calls makes three');
select is(pg_temp.release(), 'none', 'and no more');
select is(
  private.campaign_json((select id from public.campaigns where organization_id = '00000000-0000-4000-8000-000000000c14'), private.clock_now()) -> 'waiting',
  '{"quota_exhausted": 2}', 'which its users see'
);
select private.subscribe_organization('00000000-0000-4000-8000-000000000c14', 'core-plenty', 'active', private.clock_now());
select unalike(pg_temp.release(pg_temp.at('24 10:04:59')), '%604%', 'The plan is not asked at every turn');
select alike(pg_temp.release(pg_temp.at('24 10:05')), '%604 605%', 'but every five minutes');

select * from finish();
rollback;
