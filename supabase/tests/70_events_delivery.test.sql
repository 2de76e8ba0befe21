-- Events out: numbered where they happen, one delivery an endpoint that listens, the schedule, and who is switched off.
begin;
set local search_path = public, extensions, tap;
select plan(102);

create function pg_temp.person(number integer) returns uuid
language sql immutable as $$ select ('00000000-0000-4000-8000-0000000e' || lpad(number::text, 4, '0'))::uuid $$;
create function pg_temp.sign_up(number integer, email text) returns void
language sql as $$
  insert into auth.users (id, email, email_confirmed_at) values (pg_temp.person(number), email, now())
$$;
-- What a query gives as somebody: one value, or the code of the error.
create function pg_temp.as_user(number integer, query text, role text default 'authenticated') returns text
language plpgsql as $$
declare
  before text := current_setting('role');
  answer text;
begin
  perform set_config('request.jwt.claims', jsonb_build_object('sub', pg_temp.person(number), 'role', role)::text, true);
  perform set_config('role', role, true);
  begin
    execute query into answer;
  exception
    when sqlstate 'PGRST' then answer := sqlerrm::jsonb ->> 'code';
    when others then answer := sqlstate;
  end;
  perform set_config('role', before, true);
  perform set_config('request.jwt.claims', '', true);
  return answer;
end
$$;
create function pg_temp.org(number integer) returns uuid
language sql as $$ select organization_id from public.profiles where id = pg_temp.person(number) $$;
create function pg_temp.endpoint(number integer) returns uuid
language sql immutable as $$ select ('00000000-0000-4000-8000-0000000d' || lpad(number::text, 4, '0'))::uuid $$;
create function pg_temp.listen(person integer, number integer, events text default '{}') returns text
language sql as $$
  select pg_temp.as_user(person, format(
    $q$select public.create_webhook_endpoint(%L, 'https://hooks.example.com/%s', 'sealed-%s', %L)::jsonb ->> 'enabled'$q$,
    pg_temp.endpoint(number), number, number, events))
$$;
create function pg_temp.claim(most integer default 200, ahead interval default '0') returns setof uuid
language sql as $$
  select (delivery ->> 'id')::uuid
  from jsonb_array_elements(private.claim_deliveries(jsonb_build_object('v', 1, 'limit', most), private.clock_now() + ahead) -> 'deliveries') as delivery
$$;
create function pg_temp.token() returns uuid language sql immutable as $$ select '00000000-0000-4000-8000-0000000f0001'::uuid $$;
create function pg_temp.begin_all(ahead interval default '0', token uuid default pg_temp.token()) returns jsonb
language sql as $$
  select private.begin_deliveries(jsonb_build_object('v', 1, 'lease_token', token, 'deliveries',
    coalesce((select jsonb_agg(id) from public.event_deliveries where lease_until is not null), '[]')), private.clock_now() + ahead) -> 'deliveries'
$$;
-- Claims, begins and records everything that is due, as the endpoint answered.
create function pg_temp.deliver(answer jsonb, ahead interval default '0') returns integer
language plpgsql as $$
declare
  done jsonb;
begin
  update public.event_deliveries set lease_until = null, lease_token = null;
  perform pg_temp.claim(500, ahead);
  perform pg_temp.begin_all(ahead);
  done := private.record_deliveries(jsonb_build_object('v', 1, 'lease_token', pg_temp.token(), 'results', coalesce((
    select jsonb_agg(jsonb_build_object('id', id, 'duration_ms', 5) || answer) from public.event_deliveries
    where lease_token = pg_temp.token()
  ), '[]')), private.clock_now() + ahead);
  return (done ->> 'recorded')::integer;
end
$$;

select pg_temp.sign_up(1, 'owner@one.test');
select pg_temp.sign_up(2, 'owner@two.test');
select pg_temp.sign_up(3, 'member@one.test');
select pg_temp.as_user(1, $$select public.create_organization('One')$$);
select pg_temp.as_user(2, $$select public.create_organization('Two')$$);
update public.profiles set organization_id = pg_temp.org(1), system_role = 'member' where id = pg_temp.person(3);

-- Without anybody to tell, nothing queues up.
insert into public.leads (id, organization_id, name, phone)
values ('00000000-0000-4000-8000-0000000a0001', pg_temp.org(1), 'Early', '+919000000001');
select results_eq(
  $$select topic, sequence, dispatched_at is not null from private.outbox where organization_id = pg_temp.org(1) and topic like 'lead.%'$$,
  $$values ('lead.created', 1::bigint, true)$$, 'An event without a listener is numbered and handed to nobody');
select is((select count(*) from private.outbox where organization_id = pg_temp.org(1) and topic = 'subscription.created' and dispatched_at is not null), 1::bigint, 'A trial is a subscription, and nobody hears of it');
select is((select count(*) from pg_temp.claim()), 0::bigint, 'and is never due');

-- Endpoints.
select is(pg_temp.listen(1, 1), 'true', 'An owner makes an endpoint');
select is(pg_temp.listen(1, 2, '{call.*,lead.opted_out}'), 'true', 'and one that listens to some events');
select is(pg_temp.listen(2, 3), 'true', 'so does another organization');
select is(pg_temp.listen(3, 4), 'permission_denied', 'A member makes none');
select is(pg_temp.listen(1, 3), 'idempotency_conflict', 'An id that is taken stays whose it is');
select is(pg_temp.listen(1, 5, '{call.exploded}'), 'unknown_event', 'Nobody listens to what is never told');
select is(pg_temp.listen(1, 5, '{alarm.*}'), 'unknown_event', 'nor to what is internal');
select is(pg_temp.as_user(1, $$select public.create_webhook_endpoint(gen_random_uuid(), 'ftp://x', 's')$$), 'invalid_url', 'An endpoint is a web address');
select is(pg_temp.as_user(1, $$select public.create_webhook_endpoint(gen_random_uuid(), 'https://x/', '')$$), 'invalid_request', 'with a secret');
select is(pg_temp.as_user(1, $$select count(*) from public.webhook_endpoints$$), '2', 'An organization sees its own');
select is(pg_temp.as_user(3, $$select count(*) from public.webhook_endpoints$$), '0', 'A member sees none');
select is(pg_temp.as_user(1, $$select secret_sealed from private.webhook_endpoint_secrets$$), '42501', 'Nobody reads a secret');
select is(pg_temp.as_user(1, $$select secret_sealed from private.webhook_endpoint_secrets$$, 'service_role'), '42501', 'not the handlers'' role either, but for its functions');
select is(pg_temp.as_user(1, $$update public.webhook_endpoints set url = 'https://10.0.0.1/' returning 'changed'$$), '42501', 'and changes one by hand');
select is(pg_temp.as_user(2, format($$select public.update_webhook_endpoint(%L, 'https://y/')$$, pg_temp.endpoint(1))), 'endpoint_not_found', 'nor another''s');
select is(pg_temp.as_user(1, format($$select public.update_webhook_endpoint(%L, description => 'CRM')::jsonb ->> 'url'$$, pg_temp.endpoint(1))),
  'https://hooks.example.com/1', 'What is left out stays');
select is((select count(*) from public.audit_logs where action like 'webhook_endpoint.%' and organization_id = pg_temp.org(1)), 3::bigint, 'It is on record');

-- What happens is handed to whoever listens.
insert into public.leads (id, organization_id, name, phone)
values
  ('00000000-0000-4000-8000-0000000a0002', pg_temp.org(1), 'Two', '+919000000002'),
  ('00000000-0000-4000-8000-0000000a0003', pg_temp.org(1), 'Three', '+919000000003');
insert into public.leads (id, organization_id, name, phone, do_not_call)
values ('00000000-0000-4000-8000-0000000a0004', pg_temp.org(1), 'Four', '+919000000004', true);
update public.leads set do_not_call = true where id = '00000000-0000-4000-8000-0000000a0002';
insert into public.suppressions (organization_id, phone_number) values (pg_temp.org(1), '+919000000003');
select results_eq(
  $$select payload ->> 'name', topic, sequence, dispatched_at is null, object = 'lead:' || (payload ->> 'lead_id')
    from private.outbox where organization_id = pg_temp.org(1) and topic like 'lead.%' and payload ->> 'name' <> 'Early'
    order by payload ->> 'phone', sequence$$,
  $$values
    ('Two', 'lead.created', 1::bigint, true, true), ('Two', 'lead.opted_out', 2, true, true),
    ('Three', 'lead.created', 1, true, true), ('Three', 'lead.opted_out', 2, true, true),
    ('Four', 'lead.created', 1, true, true), ('Four', 'lead.opted_out', 2, true, true)$$,
  'Leads that come, and that no longer want to be called, each once and in order');
select private.emit(pg_temp.org(1), 'alarm.something', 'a', '{}', private.clock_now());
select is((select sequence from private.outbox where topic = 'alarm.something'), null, 'An alarm is nobody''s number');
select is((select count(*) from pg_temp.claim()), 9::bigint, 'Six to who hears all, three to who hears some');
select results_eq(
  $$select endpoint_id, count(*), count(distinct event_id), bool_and(status = 'pending' and attempts = 0) from public.event_deliveries group by 1 order by 1$$,
  $$values (pg_temp.endpoint(1), 6::bigint, 6::bigint, true), (pg_temp.endpoint(2), 3, 3, true)$$, 'one delivery each');
select is((select count(*) from private.outbox where topic like 'alarm.%' and dispatched_at is null), 1::bigint, 'An alarm waits for who asks for alarms');
select is((select count(*) from pg_temp.claim()), 0::bigint, 'What is leased is not handed out again');
select is((select count(*) from public.event_deliveries where lease_until = now() + interval '30 seconds'), 9::bigint, 'for half a minute: whoever claimed it may have died on the way to the queue');
update public.event_deliveries set lease_until = now() - interval '1 second';
select is((select count(*) from pg_temp.claim()), 9::bigint, 'until the lease lapses');
select is((select count(*) from public.event_deliveries where lease_until = now() + interval '3 minutes'), 9::bigint, 'The second time it is longer, since the queue may be behind');

-- A handler takes it.
create temp table begun as select pg_temp.begin_all() as all;
select is((select jsonb_array_length("all") from begun), 9, 'The handler with the messages has them');
select is(jsonb_array_length(pg_temp.begin_all(token => gen_random_uuid())), 0, 'and another has not');
select is(jsonb_array_length(pg_temp.begin_all()), 9, 'Asked again after a lost answer, the first has them still');
select is(pg_temp.begin_all() -> 0 -> 'body', (select "all" -> 0 -> 'body' from begun), 'and the bytes are the same');
select results_eq(
  $$select distinct delivery ->> 'event_id' = (delivery ->> 'body')::jsonb ->> 'id', (delivery ->> 'body')::jsonb ->> 'version',
      delivery ->> 'url', delivery ->> 'secret_sealed', delivery -> 'previous_sealed'
    from begun, jsonb_array_elements("all") as delivery where delivery ->> 'endpoint_id' = pg_temp.endpoint(1)::text$$,
  $$values (true, '1', 'https://hooks.example.com/1', 'sealed-1', 'null'::jsonb)$$, 'Each carries what it is sent with');
select is(private.record_deliveries(jsonb_build_object('lease_token', gen_random_uuid(), 'results', (
    select jsonb_agg(jsonb_build_object('id', id, 'status', 500)) from public.event_deliveries)), private.clock_now()) ->> 'recorded', '0',
  'A failure counts for whom the delivery is');
select is((private.record_deliveries(jsonb_build_object('lease_token', gen_random_uuid(), 'results', (
    select jsonb_agg(jsonb_build_object('id', id, 'status', 204, 'duration_ms', 3)) from public.event_deliveries
    where endpoint_id = pg_temp.endpoint(2))), private.clock_now()) ->> 'recorded'), '3', 'What arrived has arrived');
select is(pg_temp.deliver('{"status": 200, "body": "ok"}'), 6, 'The rest is delivered');
select results_eq($$select distinct status, attempts, next_attempt_at is null, lease_until is null, delivered_at is not null from public.event_deliveries$$,
  $$values ('delivered', 1, true, true, true)$$, 'and is at its end');

-- The schedule.
update public.event_deliveries set status = 'dead' where false;
select is(pg_temp.as_user(1, format($$select public.test_webhook_endpoint(%L)::jsonb ? 'event_id'$$, pg_temp.endpoint(1))), 'true', 'A test is sent');
create temp table waits (attempt integer, waited interval);
do $$
declare
  ahead interval := '0';
  waited interval;
begin
  for attempt in 1..10 loop
    perform pg_temp.deliver('{"status": 500, "error": "no"}', ahead);
    select next_attempt_at - (private.clock_now() + ahead) into waited from public.event_deliveries where topic = 'endpoint.test';
    insert into waits values (attempt, waited);
    -- A moment before it is due, it is not.
    if waited is not null then
      update public.event_deliveries set lease_until = null;
      if (select count(*) from pg_temp.claim(500, ahead + waited - interval '1 millisecond')) > 0 then
        raise exception 'attempt % came early', attempt + 1;
      end if;
      ahead := ahead + waited;
    end if;
  end loop;
end
$$;
select results_eq(
  $$select wait.attempt, wait.waited between rule.delay and rule.delay * 1.2 from waits as wait
    join (values (1, interval '5 seconds'), (2, '5 minutes'), (3, '30 minutes'), (4, '2 hours'), (5, '5 hours'), (6, '10 hours'), (7, '14 hours'),
      (8, '20 hours'), (9, '24 hours')) as rule (attempt, delay) on rule.attempt = wait.attempt order by 1$$,
  $$select nth, true from generate_series(1, 9) as nth$$, 'Each failure waits as Standard Webhooks says, up to a fifth longer');
select results_eq($$select status, attempts, response_status, error from public.event_deliveries where topic = 'endpoint.test'$$,
  $$values ('dead', 10, 500, 'no')$$, 'The tenth is the last');
select results_eq($$select enabled, disabled_reason from public.webhook_endpoints where id = pg_temp.endpoint(1)$$,
  $$values (false, 'failing')$$, 'An endpoint that nothing reached for days is switched off');
select is((select count(*) from public.audit_logs where action = 'webhook_endpoint.disabled' and entity_id = pg_temp.endpoint(1)), 1::bigint, 'on record');
select results_eq($$select payload ->> 'reason', sequence, dispatched_at is null from private.outbox where topic = 'endpoint.disabled'$$,
  $$values ('failing', 2::bigint, true)$$, 'and its owner''s other endpoints are told');

-- Switched off.
insert into public.leads (organization_id, name) values (pg_temp.org(1), 'Meanwhile');
select is((select count(*) from pg_temp.claim()), 0::bigint, 'Nothing is handed to what is switched off');
select is(pg_temp.as_user(1, format($$select public.test_webhook_endpoint(%L)$$, pg_temp.endpoint(1))), 'endpoint_disabled', 'not even a test');
select is(pg_temp.as_user(1, format($$select public.replay_delivery(id) from public.event_deliveries where endpoint_id = %L limit 1$$, pg_temp.endpoint(1))),
  'endpoint_disabled', 'nor what was there before');
select is(pg_temp.as_user(3, format($$select public.set_webhook_endpoint(%L, true)$$, pg_temp.endpoint(1))), 'permission_denied', 'A member does not switch it on');
select is(pg_temp.as_user(1, format($$select (public.set_webhook_endpoint(%L, true)::jsonb ->> 'enabled')$$, pg_temp.endpoint(1))), 'true', 'Its owner does');
select is((select failing_since from public.webhook_endpoints where id = pg_temp.endpoint(1)), null, 'and it begins anew');
select is(pg_temp.deliver('{"status": 200}'), 0, 'What happened meanwhile is not sent by itself');
select is(pg_temp.as_user(1, format($$select public.replay_deliveries(%L, now() - interval '1 day')::jsonb ->> 'replayed'$$, pg_temp.endpoint(1))),
  (select count(*)::text from private.outbox where organization_id = pg_temp.org(1) and sequence is not null and topic <> 'endpoint.test' and created_at < private.clock_now()),
  'A replay has what happened in its range');
select is(pg_temp.as_user(1, format($$select public.replay_deliveries(%L, now(), now())$$, pg_temp.endpoint(1))), 'invalid_time', 'a range that has a length');
select is(pg_temp.as_user(1, format($$select public.replay_deliveries(%L, now() - interval '1 day', now() + interval '10 days')::jsonb ->> 'replayed'$$, pg_temp.endpoint(1))),
  (select count(*)::text from private.outbox where organization_id = pg_temp.org(1) and sequence is not null and topic <> 'endpoint.test'), 'to its end');
select is(
  (select count(*) from public.event_deliveries where endpoint_id = pg_temp.endpoint(1) and status = 'pending' and attempts = 0),
  (select count(*) from private.outbox where organization_id = pg_temp.org(1) and sequence is not null and topic <> 'endpoint.test'),
  'also what it was never sent, and what it has had');
select is((select count(*) from public.event_deliveries where endpoint_id = pg_temp.endpoint(1) group by event_id order by 1 desc limit 1), 1::bigint, 'each once, under its id');
select ok(pg_temp.deliver('{"status": 200}') > 0, 'and it goes out');

-- One by one.
select ok(pg_temp.as_user(1, format($$select public.replay_delivery(id) from public.event_deliveries where endpoint_id = %L and topic = 'lead.created' limit 1$$,
  pg_temp.endpoint(1)))::jsonb #>> '{request,type}' = 'lead.created', 'One is replayed, and shown with its request');
select is(pg_temp.as_user(2, format($$select public.get_event_delivery(%L)$$, (select id from public.event_deliveries limit 1))), 'delivery_not_found', 'Another''s is not there');
select is(pg_temp.deliver('{"status": 302}'), 1, 'It is sent once more, and redirected');
select results_eq($$select status, attempts, response_status from public.event_deliveries where status <> 'delivered' and endpoint_id = pg_temp.endpoint(1) and topic = 'lead.created'$$,
  $$values ('failed', 1, 302)$$, 'which is a failure');
select isnt((select failing_since from public.webhook_endpoints where id = pg_temp.endpoint(1)), null, 'since when is noted');

-- Retry-After, and 410.
select is(pg_temp.deliver('{"status": 503, "retry_after_seconds": 7200}', interval '10 seconds'), 1, 'Asked to come later');
select is(
  (select next_attempt_at - last_attempt_at from public.event_deliveries where response_status = 503), interval '2 hours', 'it is obeyed');
select is(pg_temp.deliver('{"status": 429, "retry_after_seconds": 99999999999}', interval '3 hours'), 1, 'Asked to come in a thousand years');
select is((select next_attempt_at - last_attempt_at from public.event_deliveries where response_status = 429), interval '1 day', 'it is not');
select is(pg_temp.deliver('{"status": 410}', interval '2 days'), 1, 'An endpoint says that it is gone');
select results_eq(
  $$select endpoint.enabled, endpoint.disabled_reason, delivery.status from public.webhook_endpoints as endpoint
    join public.event_deliveries as delivery on delivery.endpoint_id = endpoint.id and delivery.response_status = 410$$,
  $$values (false, 'gone', 'dead')$$, 'and is left alone');

-- Rotation.
select is(pg_temp.as_user(1, format($$select public.rotate_webhook_secret(%L, 'sealed-new')::jsonb ->> 'previous_secret_until' is not null$$, pg_temp.endpoint(2))), 'true', 'A secret is rotated');
select pg_temp.as_user(1, format($$select public.test_webhook_endpoint(%L)$$, pg_temp.endpoint(2)));
select count(*) from pg_temp.claim();
select is(
  (select (delivery ->> 'secret_sealed') || ' ' || (delivery ->> 'previous_sealed') from jsonb_array_elements(pg_temp.begin_all()) as delivery where delivery ->> 'url' like '%/2'),
  'sealed-new sealed-2', 'and both are valid');
update private.webhook_endpoint_secrets set previous_until = now() - interval '1 second' where endpoint_id = pg_temp.endpoint(2);
select is(
  (select concat_ws(' ', delivery ->> 'secret_sealed', delivery ->> 'previous_sealed') from jsonb_array_elements(pg_temp.begin_all()) as delivery where delivery ->> 'url' like '%/2'),
  'sealed-new', 'for a day');
select pg_temp.deliver('{"status": 200}');

-- Fair, and bounded: one organization has two that listen, and much to tell.
update public.webhook_endpoints set events = '{}' where id = pg_temp.endpoint(2);
insert into public.leads (organization_id, name) select pg_temp.org(1), 'Flood ' || n from generate_series(1, 100) as n;
select pg_temp.as_user(1, format($$select public.set_webhook_endpoint(%L, true)$$, pg_temp.endpoint(1)));
insert into public.leads (organization_id, name) select pg_temp.org(1), 'Flood ' || n from generate_series(101, 200) as n;
insert into public.leads (organization_id, name) select pg_temp.org(2), 'Drop ' || n from generate_series(1, 5) as n;
create temp table taken as select claimed as id from pg_temp.claim(10) as claimed;
select results_eq(
  $$select organization_id, count(*) from public.event_deliveries join taken using (id) group by 1 order by 1$$,
  $$select org, 5::bigint from (values (pg_temp.org(1)), (pg_temp.org(2))) as one (org) order by org$$, 'Who has much waits behind itself');
select ok((select max(each.claimed) from (select count(*) as claimed from pg_temp.claim(500) as id join public.event_deliveries as delivery using (id) group by delivery.endpoint_id) as each) <= 50,
  'and an endpoint is sent so much at once');
update public.event_deliveries set lease_until = null, lease_token = null;
update public.webhook_endpoints set failing_since = private.clock_now() where id = pg_temp.endpoint(1);
select is((select count(*) from pg_temp.claim(500) as id join public.event_deliveries as delivery using (id) where delivery.endpoint_id = pg_temp.endpoint(1)),
  4::bigint, 'one that nothing reaches, a few');

-- Slow: what keeps somebody waiting goes among its like, also what was on its way before that was known.
update public.event_deliveries set lease_until = null, lease_token = null;
update public.webhook_endpoints set failing_since = null;
create temp table lanes as select * from jsonb_to_recordset(private.claim_deliveries('{"v":1,"limit":10}', private.clock_now()) -> 'deliveries')
  as claimed (id uuid, organization_id uuid, slow boolean);
select is((select count(*) from lanes where slow), 0::bigint, 'Who has kept nobody waiting is fast');
create function pg_temp.begin_as(slow boolean, token uuid) returns jsonb
language sql as $$
  select private.begin_deliveries(jsonb_build_object('v', 1, 'lease_token', token, 'slow', slow, 'deliveries', (select jsonb_agg(id) from lanes)), private.clock_now())
$$;
update public.webhook_endpoints set is_slow = id = pg_temp.endpoint(3);
create temp table fast as select pg_temp.begin_as(false, '00000000-0000-4000-8000-0000000f0002') as said;
select ok((select (said ->> 'more')::boolean and jsonb_array_length(said -> 'deliveries') between 1 and 9 and said::text not like '%hooks.example.com/3%' from fast),
  'A handler of the fast gives back what turned out slow');
select is((select count(*) from public.event_deliveries where endpoint_id = pg_temp.endpoint(3) and lease_until is not null), 0::bigint, 'which is due at once');
select ok((select bool_and(slow) and count(*) > 0 from jsonb_to_recordset(private.claim_deliveries('{"v":1}', private.clock_now()) -> 'deliveries') as claimed (id uuid, slow boolean)
  join public.event_deliveries as delivery using (id) where delivery.endpoint_id = pg_temp.endpoint(3)), 'and is claimed as slow');
truncate lanes;
insert into lanes (id) select id from public.event_deliveries where endpoint_id = pg_temp.endpoint(3) and lease_until is not null limit 2;
select is(jsonb_array_length(pg_temp.begin_as(true, '00000000-0000-4000-8000-0000000f0003') -> 'deliveries'), 2, 'which a handler of the slow takes');
select private.record_deliveries(jsonb_build_object('lease_token', '00000000-0000-4000-8000-0000000f0003', 'results', (
  select jsonb_agg(jsonb_build_object('id', id, 'status', 200, 'duration_ms', 1999)) from lanes)), private.clock_now());
select is((select is_slow from public.webhook_endpoints where id = pg_temp.endpoint(3)), false, 'Quick again, it is fast again');
truncate lanes;
insert into lanes (id) select id from public.event_deliveries where endpoint_id = pg_temp.endpoint(2) and status = 'pending' limit 1;
update public.event_deliveries set lease_token = null, lease_until = null where id in (select id from lanes);
select is(jsonb_array_length(pg_temp.begin_as(null, '00000000-0000-4000-8000-0000000f0004') -> 'deliveries'), 1, 'A handler that does not say what it is takes what there is');
select private.record_deliveries(jsonb_build_object('lease_token', '00000000-0000-4000-8000-0000000f0004', 'results', (
  select jsonb_agg(jsonb_build_object('id', id, 'duration_ms', 15000)) from lanes)), private.clock_now());
select is((select is_slow from public.webhook_endpoints where id = pg_temp.endpoint(2)), true, 'Who lets a handler wait is slow');

-- A call's end is corrected, and its analysis grows.
insert into public.carrier_accounts (id, provider, account_sid, credentials_sealed, api_base)
values ('00000000-0000-4000-8000-0000000ca001', 'plivo', 'MA', 'sealed', 'https://carrier.example.com');
insert into public.call_logs (id, organization_id, carrier_account_id, caller_number, callee_number, status, call_status, dialled, ended_at, direction)
values
  ('00000000-0000-4000-8000-0000000b0001', pg_temp.org(2), '00000000-0000-4000-8000-0000000ca001', '+14155550100', '+14155550101', 'ended', 'no_answer', true, private.clock_now(), 'outbound'),
  ('00000000-0000-4000-8000-0000000b0002', pg_temp.org(2), '00000000-0000-4000-8000-0000000ca001', '+14155550100', '+14155550102', 'ended', 'expired', false, private.clock_now(), 'outbound');
create temp view about_calls as select topic, payload, sequence from private.outbox where organization_id = pg_temp.org(2) and object = 'call:00000000-0000-4000-8000-0000000b0001';
update public.call_logs set duration = 7, bill_duration_seconds = 60 where id = '00000000-0000-4000-8000-0000000b0001';
update public.call_logs set call_status = 'answered' where id = '00000000-0000-4000-8000-0000000b0001';
select results_eq($$select payload ->> 'outcome', payload ->> 'duration_seconds', payload ->> 'billed_seconds', payload -> 'previous' from about_calls where topic = 'call.updated' order by sequence$$,
  $$values ('no_answer', '7', '60', '{"duration_seconds": null, "billed_seconds": null}'::jsonb), ('answered', '7', '60', '{"outcome": "no_answer"}')$$,
  'Each correction is told, in one transaction too, with what was said before');
update public.call_logs set duration = 7, carrier_cost_micros = 5 where id = '00000000-0000-4000-8000-0000000b0001';
select is((select count(*) from about_calls where topic = 'call.updated'), 2::bigint, 'What it cost us, or what was known, is no news');
update public.call_logs set duration = 9 where id = '00000000-0000-4000-8000-0000000b0002';
select is((select count(*) from private.outbox where object = 'call:00000000-0000-4000-8000-0000000b0002'), 0::bigint, 'Of a call that was never made nothing is told');
update public.call_logs set summary = 'early' where id = '00000000-0000-4000-8000-0000000b0001';
update public.call_logs set ai_analysis = '{"intent": "visit"}' where id = '00000000-0000-4000-8000-0000000b0001';
update public.call_logs set sentiment_score = 0.5 where id = '00000000-0000-4000-8000-0000000b0001';
update public.call_logs set notes = 'x' where id = '00000000-0000-4000-8000-0000000b0001';
select results_eq($$select payload ->> 'summary', payload ->> 'sentiment_score', payload ->> 'revised' from about_calls where topic = 'call.analyzed' order by sequence$$,
  $$values ('early', null, 'false'), ('early', '0.50', 'true')$$, 'An analysis is told when it is there, and again when it says more');
update public.call_logs set ai_analysis = null, summary = null, sentiment_score = null where id = '00000000-0000-4000-8000-0000000b0001';
select is((select count(*) from about_calls where topic = 'call.analyzed'), 2::bigint, 'That it was erased is told to nobody');
select is((select count(*) from about_calls), (select max(sequence) from about_calls), 'and the numbers rise');

-- One key, two organizations.
select private.emit(org, 'usage.threshold', 'call_seconds 2026-11-01 80', '{"percent": 80}', private.clock_now()) from (values (pg_temp.org(1)), (pg_temp.org(2)), (pg_temp.org(2))) as one (org);
select is((select count(*) from private.outbox where key = 'call_seconds 2026-11-01 80'), 2::bigint, 'Two organizations reach the same share, each once');

-- How long it is kept.
delete from public.event_deliveries;
delete from private.outbox;
insert into private.outbox (id, organization_id, topic, key, payload, created_at, dispatched_at)
select ('00000000-0000-4000-8000-0000000c000' || n)::uuid, pg_temp.org(1), 'lead.created', 'kept ' || n, jsonb_build_object('lead_id', gen_random_uuid(), 'name', 'X'),
  private.clock_now() - age, private.clock_now() - age
from (values (1, interval '89 days'), (2, '91 days'), (3, '92 days'), (4, '93 days'), (5, '15 months'), (6, '13 months')) as old (n, age);
insert into public.event_deliveries (organization_id, endpoint_id, event_id, topic, status, next_attempt_at, created_at, delivered_at)
values
  (pg_temp.org(1), pg_temp.endpoint(2), '00000000-0000-4000-8000-0000000c0003', 'lead.created', 'failed', private.clock_now(), private.clock_now() - interval '92 days', null),
  (pg_temp.org(1), pg_temp.endpoint(1), '00000000-0000-4000-8000-0000000c0004', 'lead.created', 'pending', private.clock_now(), private.clock_now() - interval '93 days', null),
  (pg_temp.org(1), pg_temp.endpoint(2), '00000000-0000-4000-8000-0000000c0004', 'lead.created', 'delivered', null, private.clock_now() - interval '93 days', private.clock_now()),
  (pg_temp.org(1), pg_temp.endpoint(2), '00000000-0000-4000-8000-0000000c0005', 'lead.created', 'dead', null, private.clock_now() - interval '5 months', null),
  (pg_temp.org(1), pg_temp.endpoint(2), '00000000-0000-4000-8000-0000000c0006', 'lead.created', 'pending', private.clock_now(), private.clock_now() - interval '5 months', null);
update public.webhook_endpoints set enabled = id <> pg_temp.endpoint(1), disabled_reason = case when id = pg_temp.endpoint(1) then 'user' end,
  disabled_at = case when id = pg_temp.endpoint(1) then now() end;
select is(private.apply_retention('{"v":1,"rows":1}', private.clock_now()) ->> 'more', 'true', 'So much at a time');
do $$ begin while (private.apply_retention('{"v":1,"rows":1}', private.clock_now()) ->> 'more')::boolean loop null; end loop; end $$;
select results_eq($$select right(id::text, 1), payload = '{}' from private.outbox where key like 'kept%' order by 1$$,
  $$values ('1', false), ('2', true), ('3', false), ('4', true), ('6', false)$$,
  'After ninety days it carries nothing, unless somebody waits for it; after thirteen whole months it is not there');
select results_eq($$select right(event_id::text, 1), status from public.event_deliveries where organization_id = pg_temp.org(1) order by 1$$,
  $$values ('3', 'failed'), ('4', 'delivered'), ('6', 'pending')$$, 'The log is kept for three months, and who is switched off waits no longer than that');
select is((private.apply_retention('{"v":1}', private.clock_now()) - 'unplaced'), '{"dropped":[],"deleted":0,"stripped":0,"more":false}', 'Again there is nothing to do');
select is(pg_temp.as_user(1, $$select public.replay_delivery(id) from public.event_deliveries where status = 'delivered'$$), 'event_gone', 'What is gone is not replayed');
select is(pg_temp.as_user(1, format($$select public.replay_deliveries(%L, now() - interval '2 years')::jsonb ->> 'replayed'$$, pg_temp.endpoint(2))), '3', 'nor by a range');
select is((select count(*) from public.event_deliveries where event_id = '00000000-0000-4000-8000-0000000c0002'), 0::bigint, 'which sends nothing that is empty');
update private.retention_rules set strip_after = null, keep_months = null where table_name = 'private.outbox';
select is(private.apply_retention('{"v":1}', private.clock_now() + interval '20 years') ->> 'stripped', '0', 'A rule without a time keeps for ever');
select is((select count(*) from private.outbox where key like 'kept%'), 5::bigint, 'all of it');

-- Many, and gone.
select is(pg_temp.as_user(1, $$select count(public.create_webhook_endpoint(gen_random_uuid(), 'https://hooks.example.com/' || n, 's')) from generate_series(1, 18) as n$$),
  '18', 'An organization has twenty endpoints');
select is(pg_temp.as_user(1, $$select public.create_webhook_endpoint(gen_random_uuid(), 'https://hooks.example.com/', 's')$$), 'too_many_endpoints', 'and no more');
select is(pg_temp.as_user(1, format($$select public.delete_webhook_endpoint(%L)::jsonb ->> 'deleted'$$, pg_temp.endpoint(1))), 'true', 'One is deleted');
select is((select count(*) from public.event_deliveries where endpoint_id = pg_temp.endpoint(1)) + (select count(*) from private.webhook_endpoint_secrets where endpoint_id = pg_temp.endpoint(1)),
  0::bigint, 'with all that was its own');

select * from finish();
rollback;
