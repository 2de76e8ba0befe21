-- Operating the intake: recordings handed to workers, events found and sent through again, old months dropped.
begin;
set local search_path = public, extensions, tap;
select plan(61);

insert into private.clock_offset (shift) values (timestamptz '2026-11-24 10:00+05:30' - now())
on conflict (single) do update set shift = excluded.shift;
create function pg_temp.id(kind text, n integer) returns uuid
language sql immutable strict as $$ select format('00000000-0000-4000-%s-%s', kind, lpad(n::text, 12, '0'))::uuid $$;
grant execute on function pg_temp.id(text, integer) to public;
create function pg_temp.as_user(number integer, query text) returns text
language plpgsql as $$
declare
  before text := current_setting('role');
  answer text;
begin
  perform set_config('request.jwt.claims', jsonb_build_object('sub', pg_temp.id('c000', number), 'role', 'authenticated')::text, true);
  perform set_config('role', 'authenticated', true);
  begin
    execute query into answer;
  exception
    when sqlstate 'PGRST' then answer := sqlerrm::jsonb ->> 'code';
    when others then answer := sqlstate || ' ' || sqlerrm;
  end;
  perform set_config('role', before, true);
  perform set_config('request.jwt.claims', '', true);
  return answer;
end
$$;
insert into auth.users (id, email) select pg_temp.id('c000', n), format('user%s@example.com', n) from generate_series(1, 3) as n;
insert into public.organizations (id, name) values (pg_temp.id('8000', 1), 'Near'), (pg_temp.id('8000', 2), 'Far');
update public.profiles as profile set organization_id = pg_temp.id('8000', v.org), system_role = v.system::public.system_role
from (values (1, 1, 'owner'), (2, 1, 'member'), (3, 2, 'owner')) as v (person, org, system) where profile.id = pg_temp.id('c000', v.person);
insert into public.carrier_accounts (id, provider, account_sid, credentials_sealed, api_base)
values (pg_temp.id('9000', 1), 'plivo', 'MAOPERATE', 'sealed', 'https://carrier.example.test');
create function pg_temp.leg(number integer, consents boolean default true) returns uuid
language sql as $$
  insert into public.call_logs (id, organization_id, carrier_account_id, call_sid, caller_number, callee_number, status, call_status, dialled, ended_at, record_call)
  values (pg_temp.id('b000', number), pg_temp.id('8000', 1), pg_temp.id('9000', 1), 'leg' || number, '+918044440000', '+9170000000' || lpad(number::text, 2, '0'), 'ended', 'answered', true, private.clock_now(), consents)
  returning id
$$;
create function pg_temp.tell(number integer, kind text, key text, payload jsonb) returns jsonb
language sql as $$
  select public.apply_event(
    jsonb_build_object('v', 1, 'source', 'plivo', 'source_id', pg_temp.id('9000', 1), 'verified', true, 'headers', '{}'::jsonb, 'body', 'raw ' || key,
      'events', jsonb_build_array(jsonb_build_object('kind', kind, 'attempt_id', pg_temp.id('b000', number), 'dedupe_key', key, 'payload', payload || '{"type":"call"}'))))
$$;
create function pg_temp.recording(number integer) returns text
language sql as $$
  select concat_ws(' ', copy.state, copy.reason, 'tries=' || copy.tries, case when copy.next_try_at > now() then 'later' when copy.next_try_at is not null then 'due' end)
  from private.recordings as copy where copy.attempt_id = pg_temp.id('b000', number)
$$;
create function pg_temp.claim(worker integer, variadic numbers integer[]) returns text
language sql as $$
  select coalesce(string_agg(right(claimed ->> 'id', 1), ' ' order by claimed ->> 'id'), 'none')
  from jsonb_array_elements(private.claim_recordings(
    jsonb_build_object('v', 1, 'lease_token', pg_temp.id('7000', worker), 'ids', (select jsonb_agg(pg_temp.id('b000', number)) from unnest(numbers) as number)), private.clock_now()
  ) -> 'recordings') as claimed
$$;
create function pg_temp.settle(worker integer, number integer, result jsonb) returns text
language sql as $$
  select private.record_recordings(
    jsonb_build_object('v', 1, 'lease_token', pg_temp.id('7000', worker), 'results', jsonb_build_array(jsonb_build_object('id', pg_temp.id('b000', number)) || result)), private.clock_now()
  ) ->> 'settled'
$$;

-- A recording that is told of is work, in the same transaction.
select pg_temp.leg(n, n <> 3) from generate_series(1, 6) as n;
select is(pg_temp.tell(1, 'recording', 'r1', '{"recording":{"url":"https://media.plivo.com/1.mp3","id":"R1"}}') -> 'recordings',
  jsonb_build_array(jsonb_build_object('organization_id', pg_temp.id('8000', 1), 'id', pg_temp.id('b000', 1))), 'The answer names the recording, for the queue');
select is(pg_temp.recording(1), 'pending tries=0 due', 'It waits to be copied');
select is(pg_temp.tell(1, 'recording', 'r1', '{"recording":{"url":"https://media.plivo.com/1.mp3","id":"R1"}}') -> 'recordings', null, 'A repetition names nothing');
select is(pg_temp.tell(2, 'hangup', 'h2', '{"cause_name":"x"}') -> 'recordings', null, 'nor does an event without one');
select is(pg_temp.tell(3, 'recording', 'r3', '{"recording":{"url":"https://media.plivo.com/3.mp3","id":"R3"}}') -> 'recordings', null, 'nor one of a call that was not to be recorded');
select is(pg_temp.recording(3), 'refused no_consent tries=0', 'which is refused');
select is(pg_temp.claim(1, 3), 'none', 'and never copied');
select is(pg_temp.claim(1, 1, 2, 9), '1', 'A worker gets what is there');
select is(pg_temp.claim(2, 1), 'none', 'alone');
select is(pg_temp.claim(1, 1), '1', 'again when its answer was lost');
select is(pg_temp.recording(1), 'pending tries=1 later', 'which is the same try');
select is(pg_temp.settle(2, 1, '{"result":"failed","reason":"x"}'), '0', 'Nobody else says what became of it');
select is(pg_temp.settle(1, 1, '{"result":"failed","reason":"503"}'), '1', 'A copy fails');
select is(pg_temp.recording(1), 'pending 503 tries=1 later', 'and comes again later');
select is(pg_temp.claim(2, 1), 'none', 'not at once');
update private.recordings set next_try_at = now() - interval '2 minutes' where attempt_id = pg_temp.id('b000', 1);
select is(jsonb_array_length(private.due_recordings(10)), 1, 'The sweep puts it on the queue again');
select is(jsonb_array_length(private.due_recordings(10)), 0, 'once in a while');
select is(pg_temp.claim(2, 1), '1', 'Then another worker gets it');
select is(pg_temp.settle(2, 1, '{"result":"copied","path":"o/1.mp3","bytes":10,"content_type":"audio/mpeg"}'), '1', 'and copies it');
select is((select recording_url from public.call_logs where id = pg_temp.id('b000', 1)), 'o/1.mp3', 'The call says where it is now');
select is(pg_temp.recording(1), 'copied tries=2', 'and that is that');
select is(pg_temp.settle(2, 1, '{"result":"failed"}'), '0', 'Once');
select pg_temp.tell(4, 'recording', 'r4', '{"recording":{"url":"https://media.plivo.com/4.mp3","id":"R4"}}');
update private.recordings set tries = 7 where attempt_id = pg_temp.id('b000', 4);
select is(pg_temp.claim(1, 4) || pg_temp.settle(1, 4, '{"result":"failed","reason":"gone"}') || pg_temp.recording(4), '41failed gone tries=8', 'After eight tries it is over');
select is((select count(*) from private.outbox where topic = 'alarm.recording_failed'), 1::bigint, 'and a person is told');
select pg_temp.tell(5, 'recording', 'r5', '{"recording":{"url":"https://evil.example/5.mp3","id":"R5"}}');
select is(pg_temp.claim(1, 5) || pg_temp.settle(1, 5, '{"result":"refused","reason":"host"}') || pg_temp.recording(5), '51refused host tries=1', 'What may not be fetched is over at once');
select pg_temp.tell(6, 'recording', 'r6', '{"recording":{"url":"https://media.plivo.com/6.mp3","id":"R6"}}');
update public.call_logs set record_call = false where id = pg_temp.id('b000', 6);
select is(pg_temp.claim(1, 6) || ' ' || pg_temp.recording(6), 'none refused no_consent tries=1', 'Consent that was withdrawn meanwhile is respected');

-- Who may listen.
select is(pg_temp.as_user(1, format($$select public.open_recording(%L) ->> 'path'$$, pg_temp.id('b000', 1))), 'o/1.mp3', 'Who may listen is told where it is');
select is((select count(*) from public.audit_logs where action = 'recording.opened' and entity_id = pg_temp.id('b000', 1)), 1::bigint, 'which is on record');
select is(pg_temp.as_user(1, format($$select public.open_recording(%L)$$, pg_temp.id('b000', 3))), 'recording_not_found', 'One that was refused is not there');
select is(pg_temp.as_user(2, format($$select public.open_recording(%L)$$, pg_temp.id('b000', 1))), 'permission_denied', 'A member does not listen');
select is(pg_temp.as_user(3, format($$select public.open_recording(%L)$$, pg_temp.id('b000', 1))), 'recording_not_found', 'Nobody of another organization does');

-- Events, found again.
create function private.break() returns trigger language plpgsql as $$ begin raise 'out of paper'; end $$;
create trigger break before update on public.call_logs for each row execute function private.break();
select is(pg_temp.tell(2, 'hangup', 'f1', '{"cost_micros":5,"cost_currency":"USD"}') ->> 'result', 'failed', 'An event fails');
drop trigger break on public.call_logs;
update private.webhook_events set organization_id = pg_temp.id('8000', 1) where dedupe_key = 'f1';
select is(pg_temp.as_user(1, $$select (public.list_webhook_events('{"status":"failed,dead"}') -> 'events' -> 0 ->> 'error')$$) , 'P0001 out of paper', 'and is listed with its error');
select is(pg_temp.as_user(1, $$select public.list_webhook_events('{"status":"failed"}') -> 'events' -> 0 ? 'body'$$), 'false', 'not with what it carried');
select is(pg_temp.as_user(3, $$select jsonb_array_length(public.list_webhook_events() -> 'events')$$), '0', 'to its own organization');
select is(pg_temp.as_user(2, $$select public.list_webhook_events()$$), 'permission_denied', 'and to those who manage webhooks');
select is(pg_temp.as_user(1, $$select public.list_webhook_events('{"since":"yesterday-ish"}')$$), 'malformed_request', 'A filter that is none is refused');
create temporary table walked as
with recursive page (number, list) as (
  select 1, private.list_events(pg_temp.id('8000', 1), '{"limit":2}')
  union all
  select number + 1, private.list_events(pg_temp.id('8000', 1), jsonb_build_object('limit', 2, 'before', list ->> 'before'))
  from page where list ->> 'before' is not null and number < 20
)
select event ->> 'id' as id from page cross join jsonb_array_elements(list -> 'events') as event;
select results_eq($$select count(*), count(distinct id) from walked$$,
  $$select count(*), count(*) from private.webhook_events where organization_id = pg_temp.id('8000', 1)$$, 'Page by page all are seen, once');
select is(pg_temp.as_user(1, format($$select public.get_webhook_event(%L) ->> 'body'$$, (select id from private.webhook_events where dedupe_key = 'f1'))), 'raw f1', 'One is shown whole');
select is(pg_temp.as_user(3, format($$select public.get_webhook_event(%L)$$, (select id from private.webhook_events where dedupe_key = 'f1'))), 'event_not_found', 'not to others');
select ok(pg_temp.as_user(1, $$select public.count_webhook_events() -> 'events'$$) like '%"status": "failed"%', 'They are counted');

-- And sent through again.
update private.webhook_events set status = 'dead', tries = 8, next_try_at = null where dedupe_key = 'f1';
select is(pg_temp.as_user(3, format($$select public.redrive_webhook_events(array[%L]::uuid[])$$, (select id from private.webhook_events where dedupe_key = 'f1'))), '{"redriven": 0}', 'Another organization redrives nothing');
select is(pg_temp.as_user(1, $$select public.redrive_webhook_events()$$), 'filter_required', 'Nor is everything meant by nothing');
select is(pg_temp.as_user(1, $$select public.redrive_webhook_events(filter => '{"source":"plivo"}')$$), '{"redriven": 1}', 'A dead one is due again');
select is(private.sweep_events('{"v":1}', private.clock_now()) ->> 'applied', '1', 'The sweep applies it');
select is((select carrier_cost_micros from public.call_logs where id = pg_temp.id('b000', 2)), 5::bigint, 'to its row');
select is(pg_temp.as_user(1, $$select public.redrive_webhook_events(filter => '{"source":"plivo"}')$$), '{"redriven": 0}', 'What was applied is not applied again');
select is((select metadata ->> 'events' from public.audit_logs where action = 'webhook_events.redriven'), '1', 'That it was redriven is on record');

-- Old months.
select private.ensure_partitions('private.webhook_events', '2025-09-05 00:00+00', 0), private.ensure_partitions('private.webhook_events', '2025-10-05 00:00+00', 1);
insert into private.webhook_events (received_at, source, source_id, dedupe_key, kind, payload_type, payload, body, headers, status, organization_id)
select v.at::timestamptz, 'plivo', 'x', v.key, 'ring', 'call', '{}', 'body', '{}', v.status::public.event_status, null
from (values
  ('2025-08-30 12:00+00', 'unforeseen', 'applied'), ('2025-09-30 23:00+00', 'september', 'applied'), ('2025-10-01 00:00+00', 'october', 'applied'),
  ('2025-11-11 12:00+00', 'dead', 'dead'), ('2026-11-20 12:00+00', 'fresh', 'applied')
) as v (at, key, status);
insert into private.webhook_event_keys (source, source_id, dedupe_key, event_id, received_at) values ('plivo', 'x', 'september', gen_random_uuid(), '2025-09-30');
create temporary table kept as select private.apply_retention('{"v":1,"days":366}', private.clock_now()) as told;
select is((select told -> 'dropped' from kept), '["private.webhook_events_202509"]', 'Thirteen months are kept, older ones dropped');
select is((select told ->> 'deleted' from kept), '1', 'with what was in no month');
select is((select string_agg(dedupe_key, ' ' order by received_at) from private.webhook_events where source_id = 'x'), 'october dead fresh', 'The rest stays');
select is((select string_agg(dedupe_key, ' ' order by received_at) from private.webhook_events where source_id = 'x' and body is not null), 'dead fresh', 'After thirty days without what it carried, unless it waits for a person');
select is((select count(*) from private.webhook_event_keys where dedupe_key = 'september'), 1::bigint, 'Keys stay: a repetition is one however late it comes');
select is(private.apply_retention('{"v":1,"days":366}', private.clock_now()), '{"dropped":[],"deleted":0,"stripped":0,"unplaced":{},"more":false}', 'Again there is nothing to do');
insert into private.webhook_events (received_at, source, source_id, dedupe_key, kind, payload_type, status) values ('2031-01-01', 'plivo', 'x', 'future', 'ring', 'call', 'applied');
select is(private.apply_retention('{"v":1}', private.clock_now()) -> 'unplaced', '{"private.webhook_events":1}', 'A row that no month takes is told of');
select is(private.redrive_events(null, null, '{"source":"plivo","status":"dead"}', private.clock_now()) ->> 'redriven', '1', 'A dead one that still carries something may be redriven');
update private.webhook_events set status = 'dead', next_try_at = null, body = null, payload = null where dedupe_key = 'dead';
select is(private.redrive_events(null, null, '{"source":"plivo","status":"dead"}', private.clock_now()) ->> 'redriven', '0', 'one that carries nothing may not');

-- The service alone.
select is(has_function_privilege(v.role, v.name || '(jsonb)', 'execute'), v.role = 'service_role', v.role || ' and ' || v.name)
from (values ('service_role', 'public.erase'), ('authenticated', 'public.claim_recordings'), ('authenticated', 'public.list_events'), ('anon', 'public.redrive_events')) as v (role, name);
select * from finish();
rollback;
