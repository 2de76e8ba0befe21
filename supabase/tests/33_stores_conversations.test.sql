-- Conversations: activity, end and resolution time, whatever order things are told in.
begin;
set local search_path = public, extensions, tap;
select plan(33);

-- Two organizations: Near with stores 1 and 2, Far with store 3. Users: 1 owns Near, 2 owns Far, 3 views Near's stores, 4 is nowhere,
-- 5 is suspended, 6 is a member of Near who may see leads alone.
create function pg_temp.id(kind text, n integer) returns uuid
language sql immutable strict as $$ select format('00000000-0000-4000-%s-%s', kind, lpad(n::text, 12, '0'))::uuid $$;
grant execute on function pg_temp.id(text, integer) to public;
insert into public.organizations (id, name, currency) values (pg_temp.id('8000', 1), 'Near', 'INR'), (pg_temp.id('8000', 2), 'Far', 'EUR');
insert into auth.users (id, email) select pg_temp.id('c000', n), format('user%s@example.com', n) from generate_series(1, 6) as n;
insert into public.roles (id, organization_id, name, permissions)
values
  (pg_temp.id('d000', 1), pg_temp.id('8000', 1), 'Viewer', '["store.view", "call.view", "property.view"]'),
  (pg_temp.id('d000', 2), pg_temp.id('8000', 1), 'Caller', '["lead.view"]');
update public.profiles as profile
set organization_id = pg_temp.id('8000', v.org), system_role = v.role::public.system_role, status = v.status::public.user_status,
  role_id = pg_temp.id('d000', v.own_role)
from (values (1, 1, 'owner', 'active', null), (2, 2, 'owner', 'active', null), (3, 1, 'member', 'active', 1), (5, 1, 'owner', 'suspended', null), (6, 1, 'member', 'active', 2))
  as v (person, org, role, status, own_role)
where profile.id = pg_temp.id('c000', v.person);
insert into public.stores (id, organization_id, name, domain, platform, currency_code, timezone)
values
  (pg_temp.id('a000', 1), pg_temp.id('8000', 1), 'Shop', 'shop.example.com', 'shopify', 'USD', 'Asia/Kolkata'),
  (pg_temp.id('a000', 2), pg_temp.id('8000', 1), 'Second', 'second.example.com', 'custom', 'INR', 'UTC'),
  (pg_temp.id('a000', 3), pg_temp.id('8000', 2), 'Far shop', 'far.example.com', 'woocommerce', 'EUR', 'UTC');
insert into public.customers (id, organization_id, store_id, external_id)
values
  (pg_temp.id('b000', 1), pg_temp.id('8000', 1), pg_temp.id('a000', 1), '1'),
  (pg_temp.id('b000', 2), pg_temp.id('8000', 1), pg_temp.id('a000', 1), '2'),
  (pg_temp.id('b000', 3), pg_temp.id('8000', 1), pg_temp.id('a000', 2), '1'),
  (pg_temp.id('b000', 4), pg_temp.id('8000', 2), pg_temp.id('a000', 3), '1');

insert into private.clock_offset (shift) values (timestamptz '2026-06-01T12:00Z' - now());
create function pg_temp.open(number integer, status text default 'active', started timestamptz default '2026-06-01T10:00Z') returns void
language sql as $$
  insert into public.conversations (id, organization_id, store_id, conversation_key, channel, status, start_time, last_activity_at)
  values (pg_temp.id('9000', number), pg_temp.id('8000', 1), pg_temp.id('a000', 1), 'k' || number, 'chat', open.status::public.conversation_status, started, started)
$$;
create function pg_temp.say(number integer, at timestamptz, index integer default null) returns void
language sql as $$
  insert into public.conversation_messages (organization_id, store_id, conversation_id, message_index, role, content, timestamp)
  values (pg_temp.id('8000', 1), pg_temp.id('a000', 1), pg_temp.id('9000', number), index, 'customer', 'Hello', at)
$$;
create function pg_temp.state(number integer) returns text
language sql stable as $$
  select concat_ws(' ', status, to_char(last_activity_at at time zone 'UTC', 'HH24:MI'),
    coalesce(to_char(end_time at time zone 'UTC', 'HH24:MI'), 'open'), coalesce(resolution_time_seconds::text, '-'))
  from public.conversations where id = pg_temp.id('9000', number)
$$;

-- Activity.
select pg_temp.open(1);
select pg_temp.say(1, '2026-06-01T10:30Z');
select is(pg_temp.state(1), 'active 10:30 open -', 'a message is activity');
select pg_temp.say(1, '2026-06-01T10:10Z');
select is(pg_temp.state(1), 'active 10:30 open -', 'one that comes late does not move it back');
select pg_temp.say(1, '2026-06-01T09:00Z');
select is(pg_temp.state(1), 'active 10:30 open -', 'nor one from before the conversation began: it is taken in all the same');
select pg_temp.say(1, '2026-06-01T13:00Z');
select is(pg_temp.state(1), 'active 12:00 open -', 'a clock ahead of ours moves it no further than now');
select is((select max(timestamp) from public.conversation_messages), '2026-06-01T13:00Z', 'the message keeps its own time');
select is((select string_agg(message_index::text, ' ' order by created_at, message_index) from public.conversation_messages), '0 1 2 3', 'messages without a number are numbered');
select pg_temp.say(1, '2026-06-01T11:00Z', 10);
select pg_temp.say(1, '2026-06-01T11:01Z');
select is((select max(message_index) from public.conversation_messages), 11, 'after a number that was given the next one follows');
select throws_ok($$ select pg_temp.say(1, '2026-06-01T11:00Z', 10) $$, '23505', null, 'a number is taken once');
insert into public.conversation_messages (organization_id, store_id, conversation_id, external_message_id, role, content)
values (pg_temp.id('8000', 1), pg_temp.id('a000', 1), pg_temp.id('9000', 1), 'm1', 'customer', 'Hello');
select throws_ok(
  $$ insert into public.conversation_messages (organization_id, store_id, conversation_id, external_message_id, role, content)
     values (pg_temp.id('8000', 1), pg_temp.id('a000', 1), pg_temp.id('9000', 1), 'm1', 'customer', 'Hello') $$,
  '23505', null, 'the same message sent twice is one'
);
select throws_ok(
  $$ insert into public.conversation_messages (organization_id, store_id, conversation_id, role, content)
     values (pg_temp.id('8000', 1), pg_temp.id('a000', 1), pg_temp.id('9000', 1), 'customer', e' \n\t') $$,
  '23514', null, 'a message says something'
);

-- Several conversations in one statement, out of order.
select pg_temp.open(n) from generate_series(2, 4) as n;
insert into public.conversation_messages (organization_id, store_id, conversation_id, message_index, role, content, timestamp)
select pg_temp.id('8000', 1), pg_temp.id('a000', 1), pg_temp.id('9000', 2 + n % 3), n, 'ai_assistant', 'Hi', timestamptz '2026-06-01T11:30Z' - n * interval '1 minute'
from generate_series(0, 29) as n
order by random();
select is(
  (select string_agg(pg_temp.state(n), ', ' order by n) from generate_series(2, 4) as n),
  'active 11:30 open -, active 11:29 open -, active 11:28 open -', 'thirty messages of three conversations in one statement, shuffled'
);

-- The end.
update public.conversations set status = 'completed' where id = pg_temp.id('9000', 2);
select is(pg_temp.state(2), 'completed 11:30 12:00 7200', 'completed: it ends now, and took two hours');
select lives_ok($$ select pg_temp.say(2, '2026-06-01T11:45Z', 100) $$, 'a message that comes after the end is taken in');
select is(pg_temp.state(2), 'completed 11:45 12:00 7200', 'and neither opens it nor moves its end');
update public.conversations set end_time = '2026-06-01T11:45Z' where id = pg_temp.id('9000', 2);
select is(pg_temp.state(2), 'completed 11:45 11:45 6300', 'a corrected end is counted again');
update public.conversations set start_time = '2026-06-01T11:00Z' where id = pg_temp.id('9000', 2);
select is(pg_temp.state(2), 'completed 11:45 11:45 2700', 'and a corrected start');
update public.conversations set resolution_time_seconds = 1 where id = pg_temp.id('9000', 2);
select is(pg_temp.state(2), 'completed 11:45 11:45 2700', 'the seconds are counted, not written');
update public.conversations set status = 'resolved' where id = pg_temp.id('9000', 2);
select is(pg_temp.state(2), 'resolved 11:45 11:45 2700', 'resolved later: it ended when it ended');
update public.conversations set status = 'active' where id = pg_temp.id('9000', 2);
select is(pg_temp.state(2), 'active 11:45 open -', 'opened again it has not ended');
update public.conversations set status = 'abandoned' where id = pg_temp.id('9000', 2);
select is(pg_temp.state(2), 'abandoned 11:45 12:00 -', 'an abandoned one has an end and no resolution');
update public.conversations set status = 'escalated' where id = pg_temp.id('9000', 3);
select is(pg_temp.state(3), 'escalated 11:29 open -', 'an escalated one goes on');
update public.conversations set status = 'resolved' where id = pg_temp.id('9000', 3);
select is((select escalated_to_human from public.conversations where id = pg_temp.id('9000', 3)), true, 'that a person was called for stays known');
insert into public.conversations (id, organization_id, store_id, conversation_key, channel, status, start_time, end_time)
values (pg_temp.id('9000', 5), pg_temp.id('8000', 1), pg_temp.id('a000', 1), 'k5', 'email', 'resolved', '2026-06-01T08:00Z', '2026-06-01T08:01:30.9Z');
select is((select resolution_time_seconds from public.conversations where id = pg_temp.id('9000', 5)), 90, 'one that is told of when it is over has its seconds too');
select throws_ok(
  $$ update public.conversations set end_time = '2026-06-01T07:00Z' where id = pg_temp.id('9000', 5) $$, '23514', null, 'none ends before it began'
);
select throws_ok(
  $$ update public.conversations set end_time = '2026-06-01T12:00Z' where id = pg_temp.id('9000', 1) $$, '23514', null, 'none that goes on has an end'
);

-- The idle ones.
select pg_temp.open(n) from generate_series(10, 13) as n;
select pg_temp.say(11, '2026-06-01T10:59:59Z');
select pg_temp.say(12, '2026-06-01T11:00Z');
insert into public.calls (organization_id, store_id, conversation_id, from_phone, to_phone, direction, start_time, attempt_status)
values (pg_temp.id('8000', 1), pg_temp.id('a000', 1), pg_temp.id('9000', 13), '+15550001', '+15550002', 'inbound', '2026-06-01T10:00Z', 'in_progress');
update public.conversations set status = 'paused' where id = pg_temp.id('9000', 10);
select is(public.auto_complete_inactive_conversations('{"v": 1}'), '{"completed": 1, "more": false}'::jsonb, 'one was silent for more than an hour');
select is(pg_temp.state(11), 'completed 10:59 10:59 3599', 'it ended when it was last active');
select is(
  (select string_agg(pg_temp.state(n), ', ' order by n) from unnest(array[10, 12, 13]) as n),
  'paused 10:00 open -, active 11:00 open -, active 10:00 open -', 'one that is paused, one of an hour to the second, and one on an open line go on'
);
update public.calls set attempt_status = 'ended', call_outcome = 'answered', end_time = '2026-06-01T10:20Z' where conversation_id = pg_temp.id('9000', 13);
select pg_temp.open(n) from generate_series(20, 24) as n;
select is(private.auto_complete_inactive_conversations('{"v": 1, "limit": 3}', '2026-06-01T12:00Z'), '{"completed": 3, "more": true}'::jsonb, 'three at most');
select is(private.auto_complete_inactive_conversations('{"v": 1, "limit": 4}', '2026-06-01T12:00Z'), '{"completed": 3, "more": false}'::jsonb, 'the rest, and the one whose line was closed');
select is(public.auto_complete_inactive_conversations('{"v": 1}'), '{"completed": 0, "more": false}'::jsonb, 'and then there are none');

-- A customer's last contact.
update public.conversations set customer_id = pg_temp.id('b000', 1) where id in (pg_temp.id('9000', 1), pg_temp.id('9000', 5));
select is((select last_contact_date from public.customers where id = pg_temp.id('b000', 1)), '2026-06-01T10:00Z'::timestamptz, 'is the start of their latest conversation');
insert into public.calls (organization_id, store_id, customer_id, from_phone, to_phone, direction, start_time)
values (pg_temp.id('8000', 1), pg_temp.id('a000', 1), pg_temp.id('b000', 1), '+15550001', '+15550002', 'inbound', '2026-06-01T11:00Z');
select is((select last_contact_date from public.customers where id = pg_temp.id('b000', 1)), '2026-06-01T11:00Z'::timestamptz, 'or call');

select * from finish();
rollback;
