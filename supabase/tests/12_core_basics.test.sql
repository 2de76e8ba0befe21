-- Ids, the clock, errors, partitions, nudges, and when somebody may be called.
begin;
set local search_path = public, extensions, tap;
select plan(57);

insert into private.clock_offset (shift) values (timestamptz '2026-11-24 10:00+05:30' - now())
on conflict (single) do update set shift = excluded.shift;

-- Ids.
select matches(private.uuid_v7()::text, '^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$', 'An id is a UUID of version 7');
select ok(
  abs(('x' || substr(replace(private.uuid_v7()::text, '-', ''), 1, 12))::bit(48)::bigint - extract(epoch from clock_timestamp()) * 1000) < 1000,
  'that begins with the real time in milliseconds'
);
select results_eq(
  $$select count(distinct id), count(*) filter (where id < earlier) from (
      select id, lag(id, 100) over (order by number) as earlier from (select number, private.uuid_v7() as id from generate_series(1, 5000) as number) as made
    ) as pair$$,
  $$values (5000::bigint, 0::bigint)$$,
  'Ids differ, and grow with time'
);

-- The clock.
select is(private.clock_now(), timestamptz '2026-11-24 10:00+05:30', 'Business time is the real time and the offset');
select is(private.to_business(now() - interval '5 seconds'), timestamptz '2026-11-24 09:59:55+05:30', 'and so is what somebody reports');
select throws_ok($$insert into private.clock_offset (shift) values ('1 day')$$, '23505', null, 'There is one offset at most');
delete from private.clock_offset;
select is(private.clock_now(), now(), 'and none in production');
insert into private.clock_offset (shift) values (timestamptz '2026-11-24 10:00+05:30' - now());

-- Errors, as PostgREST takes them.
create function pg_temp.error_of(query text) returns jsonb
language plpgsql as $$
declare
  told   text;
  detail text;
begin
  execute query;
  return null;
exception when sqlstate 'PGRST' then
  get stacked diagnostics told = message_text, detail = pg_exception_detail;
  return told::jsonb || detail::jsonb;
end
$$;
select is(
  pg_temp.error_of($$select private.raise_error(422, 'invalid_name', 'No name', 'name')$$),
  '{"code": "invalid_name", "message": "No name", "details": "{\"field\" : \"name\"}", "hint": null, "status": 422, "headers": {}}',
  'An error has a status, a code, a message and the field'
);
select is(
  pg_temp.error_of($$select private.raise_error(404, 'gone', 'Gone')$$) -> 'details', 'null', 'or no field'
);

-- Partitions.
create table private.made_for_test (id integer, moment timestamptz not null, primary key (id, moment)) partition by range (moment);
select is(private.ensure_partitions('private.made_for_test', '2026-11-24 10:00+05:30'), 5, 'Four months and a place for the rest are made');
select is(private.ensure_partitions('private.made_for_test', '2026-11-24 10:00+05:30'), 0, 'once');
insert into private.made_for_test values (1, '2026-11-30 23:59:59.999999Z'), (2, '2026-12-01 00:00Z'), (3, '2027-05-05 00:00Z');
select results_eq(
  $$select tableoid::regclass::text, id from private.made_for_test order by id$$,
  $$values ('private.made_for_test_202611', 1), ('private.made_for_test_202612', 2), ('private.made_for_test_default', 3)$$,
  'A row goes to its month, and one of no month to the rest'
);
select is(private.ensure_partitions('private.made_for_test', '2027-04-01 00:00Z'), 4, 'Later months follow');
select is((select tableoid::regclass::text from private.made_for_test where id = 3), 'private.made_for_test_202705', 'and take their rows along');
select is_empty(
  $$select relid from pg_partition_tree('private.made_for_test') join pg_class on oid = relid
    where isleaf and not (relrowsecurity and relforcerowsecurity and exists (select from pg_policy where polrelid = relid))$$,
  'A partition has its walls from the first'
);
select ok(
  to_regclass('private.webhook_events_default') is not null and (select count(*) >= 5 from pg_inherits where inhparent = 'private.webhook_events'::regclass),
  'Events have partitions for the coming months'
);

-- Nudges. Whatever an environment is configured with, here it is this.
delete from vault.secrets where name in ('trunkline_functions_url', 'trunkline_nudge_key');
delete from net.http_request_queue;
select lives_ok($$select private.nudge('call-dispatch')$$, 'Without configuration a nudge does nothing');
select is((select count(*) from net.http_request_queue), 0::bigint, 'nothing at all');
select set_config('trunkline.nudged_call_dispatch', '', true);
select vault.create_secret('https://api.example.test/functions/v1/', 'trunkline_functions_url');
select vault.create_secret('whsec_' || encode('0123456789abcdef0123456789abcdef', 'base64'), 'trunkline_nudge_key');
select private.nudge('call-dispatch'), private.nudge('call-dispatch');
select results_eq(
  $$select url, method::text, convert_from(body, 'utf8')::jsonb, timeout_milliseconds from net.http_request_queue$$,
  $$values ('https://api.example.test/functions/v1/call-dispatch/nudge', 'POST', '{"type": "nudge"}'::jsonb, 5000)$$,
  'One transaction sends one nudge'
);
select is(
  (select headers ->> 'webhook-signature' from net.http_request_queue),
  (
    select 'v1,' || encode(
      hmac(
        convert_to((headers ->> 'webhook-id') || '.' || (headers ->> 'webhook-timestamp') || '.', 'utf8') || body,
        '0123456789abcdef0123456789abcdef', 'sha256'
      ), 'base64')
    from net.http_request_queue
  ),
  'signed over the bytes that are sent, as Standard Webhooks asks'
);
select private.nudge('invoice-generation');
select is((select count(*) from net.http_request_queue), 2::bigint, 'Another function is another nudge');
select set_config('trunkline.nudged_call_dispatch', '', true);
select vault.update_secret(id, 'whsec_not base64!') from vault.secrets where name = 'trunkline_nudge_key';
select lives_ok($$select private.nudge('call-dispatch')$$, 'A nudge that fails fails nothing else');

-- Connecting a database with its functions.
delete from vault.secrets where name in ('trunkline_functions_url', 'trunkline_nudge_key');
create function pg_temp.connect(url text, key text default 'whsec_' || encode('0123456789abcdef0123456789abcdef', 'base64')) returns jsonb
language sql as $$ select private.connect_functions(url, key) $$;
select is(pg_temp.connect('https://api.example.test/functions/v1') - 'database_webhooks', '{"trunkline_functions_url": "set", "trunkline_nudge_key": "set"}', 'Address and key are put into Vault');
select is(pg_temp.connect('https://api.example.test/functions/v1', 'whsec_' || encode('fedcba9876543210fedcba9876543210', 'base64')) - 'database_webhooks',
  '{"trunkline_functions_url": "as before", "trunkline_nudge_key": "changed"}', 'and changed there after a rotation');
select is((select string_agg(decrypted_secret, ' ' order by name) from vault.decrypted_secrets where name like 'trunkline_%'),
  'https://api.example.test/functions/v1 whsec_' || encode('fedcba9876543210fedcba9876543210', 'base64'), 'each once');
select is(pg_temp.connect('https://api.example.test/functions/v1') -> 'database_webhooks',
  '["nudge_delivery on private.outbox", "nudge_dispatch on public.call_queue", "nudge_dispatch on public.campaigns"]', 'The database webhooks are the migrations'' triggers');
select throws_ok($$select pg_temp.connect('https://api.example.test/functions/v1/')$$, '22023', null, 'An address that is not the functions'' is refused');
select throws_ok($$select pg_temp.connect('https://api.example.test/functions/v1', 'whsec_short')$$, '22023', null, 'so is a key that is none');
select ok(not has_function_privilege(role, 'private.connect_functions(text, text)', 'execute'), role || ' connects nothing')
from (values ('authenticated'), ('service_role')) as one (role);

-- When somebody may be called. Times are local to the zone.
create function pg_temp.slot(
  at text, opens text default '09:00', closes text default '21:00', zone text default 'Asia/Kolkata', first text default null, last text default null
) returns text
language sql as $$
  select coalesce(
    to_char(stretch.opens_at at time zone zone, 'MM-DD HH24:MI') || ' - ' || to_char(stretch.closes_at at time zone zone, 'MM-DD HH24:MI'), 'never'
  )
  from private.calling_window(at::timestamp at time zone zone, zone, opens::time, closes::time, first::date, last::date) as stretch
$$;
select is(pg_temp.slot('2026-11-24 12:00'), '11-24 09:00 - 11-24 21:00', 'By day it is open');
select is(pg_temp.slot('2026-11-24 09:00:00'), '11-24 09:00 - 11-24 21:00', 'the opening minute belongs to it');
select is(pg_temp.slot('2026-11-24 08:59:59.999'), '11-24 09:00 - 11-24 21:00', 'before, it opens today and not tomorrow');
select is(pg_temp.slot('2026-11-24 20:59:59.999'), '11-24 09:00 - 11-24 21:00', 'to the last moment');
select is(pg_temp.slot('2026-11-24 21:00'), '11-25 09:00 - 11-25 21:00', 'at 21:00 it is over');
select is(pg_temp.slot('2026-11-24 12:00', '10:30', '18:15'), '11-24 10:30 - 11-24 18:15', 'A campaign may be narrower than the law');
select is(pg_temp.slot('2026-11-24 12:00', '06:00', '23:00'), '11-24 09:00 - 11-24 21:00', 'and not wider');
select is(pg_temp.slot('2026-11-24 12:00', '18:00', '10:00'), '11-24 18:00 - 11-24 21:00', 'Overnight, the evening');
select is(pg_temp.slot('2026-11-24 22:00', '18:00', '10:00'), '11-25 09:00 - 11-25 10:00', 'then the morning');
select is(pg_temp.slot('2026-11-24 09:30', '18:00', '10:00'), '11-24 09:00 - 11-24 10:00', 'in which it is open too');
select is(pg_temp.slot('2026-11-24 12:00', '12:00', '12:00'), '11-24 12:00 - 11-24 21:00', 'From noon to noon is the whole day, from noon on');
select is(pg_temp.slot('2026-11-24 11:00', '12:00', '12:00'), '11-24 09:00 - 11-24 12:00', 'and up to it');
select is(pg_temp.slot('2026-11-24 12:00', '22:00', '08:00'), 'never', 'What lies in the night never opens');
select is(pg_temp.slot('2026-11-24 12:00', '21:00', '23:00'), 'never', 'not even at its edge');
select is(pg_temp.slot('2026-11-24 12:00', first => '2026-12-01'), '12-01 09:00 - 12-01 21:00', 'A campaign opens on its first day');
select is(pg_temp.slot('2026-11-24 22:00', last => '2026-11-25'), '11-25 09:00 - 11-25 21:00', 'is open on its last');
select is(pg_temp.slot('2026-11-25 21:00', last => '2026-11-25'), 'never', 'and then never again');
select is(pg_temp.slot('2026-12-31 23:00'), '01-01 09:00 - 01-01 21:00', 'A year ends like a day');

-- Daylight saving: New York springs forward on 8 March 2026 and falls back on 1 November.
select is(
  (select stretch.opens_at from private.calling_window('2026-03-08 06:00Z', 'America/New_York', '09:00', '21:00', null, null) as stretch),
  timestamptz '2026-03-08 13:00Z', 'On the day that clocks go forward it opens at the new 09:00'
);
select is(
  (select stretch.opens_at from private.calling_window('2026-03-07 12:00Z', 'America/New_York', '09:00', '21:00', null, null) as stretch),
  timestamptz '2026-03-07 14:00Z', 'the day before at the old'
);
select is(
  (select stretch.closes_at from private.calling_window('2026-11-01 20:00Z', 'America/New_York', '09:00', '21:00', null, null) as stretch),
  timestamptz '2026-11-02 02:00Z', 'On the day that they go back it closes at the new 21:00'
);
select is(
  (select stretch.opens_at from private.calling_window('2026-11-24 03:29:59Z', 'Asia/Kolkata', '09:00', '21:00', null, null) as stretch),
  timestamptz '2026-11-24 03:30Z', 'Half-hour zones open at the half hour'
);
select set_config('timezone', 'America/New_York', true);
select is(
  (select stretch.opens_at from private.calling_window('2026-11-24 18:00Z', 'Asia/Kolkata', '09:00', '21:00', null, null) as stretch),
  timestamptz '2026-11-25 03:30Z', 'The zone of the session has no say'
);
select set_config('timezone', 'UTC', true);

-- Zones.
select is(
  (select array_agg(zone in (select name from private.timezones) order by zone)
    from unnest(array['America/Argentina/Buenos_Aires', 'Asia/Kolkata', 'UTC']) as zone),
  array[true, true, true], 'Zones are IANA''s'
);
select is_empty(
  $$select zone from unnest(array['Mars/Olympus', 'IST', 'asia/kolkata', 'FOO3', 'EST5EDT4', '', '+05:30', 'posix/Asia/Kolkata', 'Factory']) as zone
    where zone in (select name from private.timezones)$$,
  'Anything else is none, also what PostgreSQL would take for one'
);
select is(private.whole_minute('2026-11-24 10:00:00Z'), timestamptz '2026-11-24 10:00Z', 'A full minute stays');
select is(private.whole_minute('2026-11-24 10:00:00.000001Z'), timestamptz '2026-11-24 10:01Z', 'anything more is the next');

select * from finish();
rollback;
