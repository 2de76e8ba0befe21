-- Sockets, registers of numbers not to be called, and the law's hours.
begin;
set local search_path = public, extensions, tap;
select plan(48);

create function pg_temp.person(number integer) returns uuid
language sql immutable as $$ select ('00000000-0000-4000-8000-0000000e' || lpad(number::text, 4, '0'))::uuid $$;
create function pg_temp.sign_up(number integer, email text, confirmed boolean default true, metadata jsonb default '{}') returns void
language sql as $$
  insert into auth.users (id, email, email_confirmed_at, raw_user_meta_data)
  values (pg_temp.person(number), email, case when confirmed then now() end, metadata)
$$;
-- What a query gives as somebody: one value, or the code of the error.
create function pg_temp.as_user(number integer, query text, role text default 'authenticated') returns text
language plpgsql as $$
declare
  before text := current_setting('role');
  answer text;
begin
  perform set_config('request.jwt.claims',
    case when number is null then jsonb_build_object('role', role) else jsonb_build_object('sub', pg_temp.person(number), 'role', role) end::text, true);
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
create function pg_temp.served(query text) returns text
language sql as $$ select pg_temp.as_user(null, query, 'service_role') $$;
select pg_temp.sign_up(1, 'owner@one.test');
select pg_temp.sign_up(2, 'owner@two.test');
select pg_temp.as_user(1, $$select public.create_organization('One')$$);
select pg_temp.as_user(2, $$select public.create_organization('Two')$$);
insert into public.carrier_accounts (id, provider, account_sid, credentials_sealed, api_base)
values ('00000000-0000-4000-c000-0000000e0001', 'plivo', 'MASYSTEM', 'sealed', 'https://carrier.example.test');
insert into public.call_logs (id, organization_id, carrier_account_id, caller_number, callee_number, status, dialled, agent_id)
select '00000000-0000-4000-d000-0000000e0001', organization_id, '00000000-0000-4000-c000-0000000e0001', '+918000000000', '+917000002001',
  'in_progress', true, '00000000-0000-4000-a000-0000000e0001'
from public.profiles where id = pg_temp.person(1);

-- Sockets.
select ok(pg_temp.served(format($$select public.open_websocket(jsonb_build_object('v', 1, 'connection_id', 'd1', 'kind', 'dashboard', 'user_id', %L))$$, pg_temp.person(1))) like '{"id"%', 'A dashboard''s socket opens for its user');
select ok(pg_temp.served($$select public.open_websocket('{"v": 1, "connection_id": "a1", "kind": "agent", "attempt_id": "00000000-0000-4000-d000-0000000e0001"}')$$) like '{"id"%', 'and an agent''s for its call');
select results_eq($$select connection_id, kind, user_id, call_log_id, agent_id, organization_id = (select organization_id from public.profiles where id = pg_temp.person(1))
    from public.websocket_sessions order by connection_id desc$$,
  $$values ('d1', 'dashboard', pg_temp.person(1), null::uuid, null::uuid, true),
    ('a1', 'agent', null, '00000000-0000-4000-d000-0000000e0001', '00000000-0000-4000-a000-0000000e0001', true)$$, 'each in the tenant that follows from it');
select is(pg_temp.served($$select public.open_websocket('{"v": 1, "connection_id": "a2", "kind": "agent", "attempt_id": "00000000-0000-4000-d000-0000000e0001"}')$$), 'already_connected', 'A call has one agent at a time');
select is(pg_temp.served(format($$select public.open_websocket(jsonb_build_object('v', 1, 'connection_id', 'd1', 'kind', 'dashboard', 'user_id', %L))$$, pg_temp.person(2))), 'already_connected', 'and a connection one socket');
select is(pg_temp.served(format($$select public.open_websocket(jsonb_build_object('v', 1, 'connection_id', 'x', 'kind', 'dashboard', 'user_id', %L))$$, pg_temp.person(99))), 'no_organization', 'Nobody unknown');
select is(pg_temp.served($$select public.open_websocket('{"v": 1, "connection_id": "x", "kind": "agent", "attempt_id": "00000000-0000-4000-d000-0000000e0099"}')$$), 'call_not_found', 'no unknown call');
select is(pg_temp.served($$select public.open_websocket('{"v": 1, "connection_id": "x"}')$$), 'malformed_request', 'and of some kind');
select is(pg_temp.as_user(1, $$select public.open_websocket('{"v": 1}')$$), '42501', 'Handlers open sockets, users do not');
select is(pg_temp.as_user(1, $$select string_agg(kind, ' ' order by kind) from public.websocket_sessions$$), 'agent dashboard', 'A user sees their own and the agents');
select is(pg_temp.as_user(1, $$select connection_id from public.websocket_sessions$$), '42501', 'but not what it takes to speak on one');
select is(pg_temp.as_user(2, $$select count(id) from public.websocket_sessions$$), '0', 'Another organization sees none');
select is(pg_temp.as_user(null, $$select count(id) from public.websocket_sessions$$, 'anon'), '42501', 'nor does a visitor');
update public.websocket_sessions set last_ping_at = now() - interval '80 seconds';
select is(pg_temp.served($$select public.reap_websockets('{"v": 1}')$$), '{"calls": [], "reaped": 0}', 'A socket lives ninety seconds without a ping');
select is(pg_temp.served($$select public.ping_websockets('{"v": 1, "connection_ids": ["d1", "zz"]}')$$), '{"gone": ["zz"]}', 'a ping keeps it, and says which are unknown');
update public.websocket_sessions set last_ping_at = last_ping_at - interval '20 seconds';
select is(pg_temp.served($$select public.reap_websockets('{"v": 1}') ->> 'calls'$$),
  (select jsonb_build_array(jsonb_build_object('organization_id', organization_id, 'attempt_id', id))::text from public.call_logs where id = '00000000-0000-4000-d000-0000000e0001'),
  'A silent one is reaped, and its call is named, which goes on without its agent');
select is((select string_agg(connection_id, ' ') from public.websocket_sessions), 'd1', 'The other one stays');
select is(pg_temp.served($$select public.close_websocket('{"v": 1, "connection_id": "d1"}')$$), '{"closed": 1}', 'until it is closed');
select is(pg_temp.served($$select public.close_websocket('{"v": 1, "connection_id": "d1"}')$$), '{"closed": 0}', 'once');
select throws_ok(
  $$insert into public.websocket_sessions (organization_id, kind, user_id, connection_id)
    select organization_id, 'dashboard', pg_temp.person(1), 'cross' from public.profiles where id = pg_temp.person(2)$$, '23503', null,
  'No socket is of a user of another tenant');

-- Registers.
create function pg_temp.dnc(phone text, at timestamptz) returns text
language sql as $$ select concat_ws(' ', verdict, register_key, version) from private.check_dnc(phone, at) $$;
select is(pg_temp.dnc('+12025550101', '2026-11-24'), '', 'A register that is not enforced forbids nothing');
update private.dnc_registers set is_enforced = true;
select is(pg_temp.dnc('+12025550101', '2026-11-24'), 'register_stale us_national', 'One that is and was never loaded forbids all');
select is(pg_temp.dnc('+919800000001', '2026-11-24'), 'register_stale in_ncpr', 'of its country');
select is(pg_temp.dnc('+447700900001', '2026-11-24'), '', 'and no other');
select is(private.open_dnc_version('us_national', '2026-11-01', true, '2026-11-01'), 1, 'A version is opened');
insert into private.dnc_staged (register_key, number, phone_number) values ('us_national', 1, '+12025550101'), ('us_national', 1, '+12025550102');
select is(pg_temp.dnc('+12025550101', '2026-11-02'), 'register_stale us_national', 'loaded without being seen');
select is(private.publish_dnc_version('us_national', 1, '2026-11-02'), 2::bigint, 'and published, all at once');
select is(pg_temp.dnc('+12025550101', '2026-11-03'), 'registered us_national 1', 'Then who is on it is not called');
select is(pg_temp.dnc('+12025550199', '2026-11-03'), 'us_national 1', 'and others may be, by this version');
select is(pg_temp.dnc('+12025550199', '2026-12-01'), 'us_national 1', 'for thirty-one days');
select is(pg_temp.dnc('+12025550199', '2026-12-03'), 'register_stale us_national 1', 'and no longer');
select private.open_dnc_version('us_national', '2026-12-01', true, '2026-12-01');
insert into private.dnc_staged (register_key, number, phone_number) values ('us_national', 2, '+12025550102'), ('us_national', 2, '+12025550103');
select private.publish_dnc_version('us_national', 2, '2026-12-02');
select is(pg_temp.dnc('+12025550101', '2026-12-03'), 'us_national 2', 'The next version lets go');
select is(pg_temp.dnc('+12025550103', '2026-12-03'), 'registered us_national 2', 'and takes up');
select is(pg_temp.dnc('+12025550101', '2026-11-20'), 'registered us_national 1', 'and what was the case before stays known');
select private.open_dnc_version('us_national', '2026-12-05', false, '2026-12-05');
insert into private.dnc_staged (register_key, number, phone_number, is_removed) values ('us_national', 3, '+12025550103', true), ('us_national', 3, '+12025550104', false);
select is(private.publish_dnc_version('us_national', 3, '2026-12-05'), 2::bigint, 'A version may say only what changed');
select private.open_dnc_version('us_national', 'broken', true, '2026-12-06');
select throws_ok($$select private.publish_dnc_version('us_national', 4, '2026-12-06')$$, '55000', null, 'An empty list is not published');
select throws_ok($$select private.publish_dnc_version('us_national', 3, '2026-12-06')$$, 'P0002', null, 'and none twice');

-- Hours.
create function pg_temp.hours(country text, region text, wanted text, day date) returns text
language sql as $$ select concat_ws('-', to_char(opens, 'HH24:MI'), to_char(closes, 'HH24:MI')) from private.legal_hours(country, region, wanted, day) $$;
select is(pg_temp.hours('US', null, 'promotional', '2026-11-24'), '08:00-21:00', 'Federal hours');
select is(pg_temp.hours('US', 'FL', 'promotional', '2026-11-24'), '08:00-20:00', 'and a stricter state''s');
select is((select daily_calls from private.legal_hours('US', 'FL', 'promotional', '2026-11-24')), 3::smallint, 'which also counts calls');
select is(pg_temp.hours('US', 'TX', 'promotional', '2026-11-22'), '12:00-21:00', 'Sundays in Texas');
select is(pg_temp.hours('US', 'LA', 'promotional', '2026-11-22'), '', 'and in Louisiana');
select is(pg_temp.hours('US', 'RI', 'promotional', '2026-11-26'), '', 'Thanksgiving in Rhode Island');
select is(pg_temp.hours('US', 'NY', 'promotional', '2026-11-24'), '08:00-21:00', 'A state without hours of its own has the country''s');
select is(pg_temp.hours('IN', null, 'service', '2026-11-24') || ' ' || pg_temp.hours('IN', null, 'promotional', '2026-11-24'), '09:00-21:00 10:00-21:00', 'India, by purpose');
select is(pg_temp.hours('FR', null, 'service', '2026-11-24'), '', 'Nobody is called where nothing is known');
select is(pg_temp.as_user(1, $$select count(*) > 80 from public.calling_hours$$), 'true', 'A user reads the hours');
select is(pg_temp.as_user(1, $$update public.calling_hours set opens = '00:00' returning 'made'$$), '42501', 'and does not make them');

select * from finish();
rollback;
