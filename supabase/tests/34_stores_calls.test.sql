-- Calls: the store's view of a leg. Its status is derived and never goes back, its duration is always end less start.
begin;
set local search_path = public, extensions, tap;
select plan(77);

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

-- The mapping is total: every state, every outcome.
select is(private.to_call_status(v.state::public.attempt_status, null)::text, v.status, format('%s is %s', v.state, v.status))
from (
  values ('created', 'initiated'), ('submitting', 'initiated'), ('submission_unknown', 'initiated'), ('queued', 'initiated'),
    ('initiated', 'initiated'), ('ringing', 'ringing'), ('in_progress', 'answered')
) as v (state, status);
select is(private.to_call_status('ended', outcome)::text, coalesce(v.status, 'failed'), format('ended as %s is %s', outcome, coalesce(v.status, 'failed')))
from unnest(enum_range(null::public.call_outcome)) as outcome
left join (
  values ('answered', 'completed'), ('machine', 'completed'), ('busy', 'busy'), ('rejected', 'busy'), ('no_answer', 'no_answer'),
    ('cancelled', 'cancelled'), ('expired', 'cancelled')
) as v (ending, status) on v.ending = outcome::text;
select is(private.to_call_party(number), party, format('%s is %s', coalesce(number, 'nothing'), party))
from (
  values ('+919876543210', '+919876543210'), ('anonymous', 'anonymous'), ('Restricted', 'anonymous'), ('', 'anonymous'),
    ('sip:a@example.com', 'anonymous'), ('919876543210', 'anonymous'), ('+0123456789', 'anonymous'), (null, 'anonymous')
) as v (number, party);

create function pg_temp.call(number integer, columns text default '', vals text default '') returns void
language plpgsql as $$
begin
  execute format(
    'insert into public.calls (id, organization_id, store_id, from_phone, to_phone, direction, start_time %s)
     values (%L, %L, %L, ''anonymous'', ''+15550002'', ''inbound'', ''2026-06-01T10:00Z'' %s)',
    columns, pg_temp.id('9600', number), pg_temp.id('8000', 1), pg_temp.id('a000', 1), vals
  );
end
$$;
create function pg_temp.state(number integer) returns text
language sql stable as $$
  select concat_ws(' ', status, coalesce(duration_seconds::text, '-')) from public.calls where id = pg_temp.id('9600', number)
$$;

-- A call of its own accord.
select lives_ok($$ select pg_temp.call(1) $$, 'a caller who withholds their number is taken in');
select is(pg_temp.state(1), 'initiated -', 'a call starts as initiated');
select throws_ok(
  format($$ update public.calls set %s = %L where id = pg_temp.id('9600', 1) $$, party, number), '23514', null, format('%s is not %L', party, number)
)
from unnest(array['from_phone', 'to_phone']) as party, unnest(array['Anonymous', '5550001', '', '+0123']) as number;
update public.calls set attempt_status = 'ringing' where id = pg_temp.id('9600', 1);
update public.calls set attempt_status = 'in_progress', answered_at = '2026-06-01T10:00:05Z' where id = pg_temp.id('9600', 1);
select is(pg_temp.state(1), 'answered -', 'forward');
select throws_ok(
  format('update public.calls set attempt_status = %L where id = pg_temp.id(''9600'', 1)', earlier), '23514', null, format('not back to %s', earlier)
)
from unnest(array['created', 'queued', 'initiated', 'ringing']) as earlier;
update public.calls set attempt_status = 'ended', call_outcome = 'answered', end_time = '2026-06-01T10:01:30.7Z' where id = pg_temp.id('9600', 1);
select is(pg_temp.state(1), 'completed 90', 'ended: it is completed and has its seconds');
select throws_ok(
  format('update public.calls set attempt_status = %L, call_outcome = null, end_time = null where id = pg_temp.id(''9600'', 1)', earlier), '23514', null,
  format('completed does not become %s', earlier)
)
from unnest(array['initiated', 'ringing', 'in_progress']) as earlier;
select throws_ok(
  $$ update public.calls set status = 'ringing' where id = pg_temp.id('9600', 1) $$, '428C9', null, 'nobody writes a status past the mapping'
);
update public.calls set end_time = '2026-06-01T10:02Z' where id = pg_temp.id('9600', 1);
select is(pg_temp.state(1), 'completed 120', 'a corrected end is counted again');
update public.calls set start_time = '2026-06-01T10:01Z' where id = pg_temp.id('9600', 1);
select is(pg_temp.state(1), 'completed 60', 'and a corrected start');
update public.calls set duration_seconds = 9999 where id = pg_temp.id('9600', 1);
select is(pg_temp.state(1), 'completed 60', 'seconds are counted, not written');
select pg_temp.call(2, ', attempt_status, call_outcome, end_time', $$, 'ended', 'busy', '2026-06-01T10:00:07Z'$$);
select is(pg_temp.state(2), 'busy 7', 'a call that is told of when it is over has its seconds too');
select throws_ok(statement, '23514', null, statement)
from unnest(array[
  $$ select pg_temp.call(3, ', end_time', $q$, '2026-06-01T10:00:07Z'$q$) $$,
  $$ select pg_temp.call(3, ', attempt_status, end_time', $q$, 'ended', '2026-06-01T10:00:07Z'$q$) $$,
  $$ select pg_temp.call(3, ', call_outcome', $q$, 'busy'$q$) $$,
  $$ select pg_temp.call(3, ', attempt_status, call_outcome, end_time', $q$, 'ended', 'busy', '2026-06-01T09:59Z'$q$) $$,
  $$ select pg_temp.call(3, ', sentiment_score', ', 1.01') $$,
  $$ select pg_temp.call(3, ', quality_score', ', -0.1') $$,
  $$ select pg_temp.call(3, ', satisfaction_rating', ', 6') $$,
  $$ select pg_temp.call(3, ', transcript_confidence', ', 2') $$
]) as statement;

-- A call of a leg says what the leg says.
insert into public.carrier_accounts (id, provider, account_sid, credentials_sealed, api_base)
values (pg_temp.id('9400', 1), 'plivo', 'A', 'sealed', 'https://api.example.com');
insert into public.call_logs (id, organization_id, carrier_account_id, caller_number, callee_number, direction, status, call_sid, created_at)
values
  (pg_temp.id('9500', 1), pg_temp.id('8000', 1), pg_temp.id('9400', 1), '+15550001', '+15550002', 'inbound', 'ringing', 'SID1', '2026-06-01T10:00Z'),
  (pg_temp.id('9500', 2), pg_temp.id('8000', 1), pg_temp.id('9400', 1), 'Unavailable', '+15550002', 'inbound', 'ringing', 'SID2', '2026-06-01T10:00Z'),
  (pg_temp.id('9500', 3), pg_temp.id('8000', 1), pg_temp.id('9400', 1), '+15550003', '+15550002', 'inbound', 'ringing', 'SID3', '2026-06-01T10:00Z');
create function pg_temp.view(number integer, leg integer, store integer default 1) returns void
language sql as $$
  insert into public.calls (id, organization_id, store_id, call_log_id, from_phone, to_phone, direction, start_time)
  values (pg_temp.id('9600', number), pg_temp.id('8000', 1), pg_temp.id('a000', store), pg_temp.id('9500', leg), 'anonymous', 'anonymous', 'outbound', '2000-01-01T00:00Z')
$$;
select pg_temp.view(11, 1);
select is(
  (select concat_ws(' ', status, direction, from_phone, to_phone, twilio_call_sid, start_time at time zone 'UTC') from public.calls where id = pg_temp.id('9600', 11)),
  'ringing inbound +15550001 +15550002 SID1 2026-06-01 10:00:00', 'what the writer said of a leg is not asked'
);
select lives_ok($$ select pg_temp.view(12, 2) $$, 'a leg whose caller is unavailable has a call');
select is((select from_phone from public.calls where id = pg_temp.id('9600', 12)), 'anonymous', 'of nobody known');
select throws_ok($$ select pg_temp.view(13, 1, 2) $$, '23505', null, 'a leg is one store''s call');
select throws_ok($$ select pg_temp.view(14, 99) $$, '23503', null, 'there is no call without its leg');
update public.call_logs set status = 'in_progress', answered_at = '2026-06-01T10:00:10Z' where id = pg_temp.id('9500', 1);
select is(pg_temp.state(11), 'answered -', 'the leg moves on, and its call along');
update public.call_logs
set status = 'ended', call_status = 'answered', ended_at = '2026-06-01T10:01:10Z', recording_url = 'https://r.example.com/1', recording_id = 'R1',
  conversation_transcript = 'Hello', summary = 'Said hello', sentiment_score = 0.5
where id = pg_temp.id('9500', 1);
select is(pg_temp.state(11), 'completed 70', 'to the end');
select is(
  (select concat_ws(' ', recording_url, recording_sid, transcript, ai_summary, sentiment_score) from public.calls where id = pg_temp.id('9600', 11)),
  'https://r.example.com/1 R1 Hello Said hello 0.50', 'with what is known of it'
);
update public.call_logs set status = 'ended', call_status = 'lost', ended_at = '2026-06-01T10:05Z' where id = pg_temp.id('9500', 2);
select is(pg_temp.state(12), 'failed 300', 'a leg that is lost is a failed call');
update public.call_logs set call_status = 'answered', answered_at = '2026-06-01T10:00:30Z', ended_at = '2026-06-01T10:03Z' where id = pg_temp.id('9500', 2);
select is(pg_temp.state(12), 'completed 180', 'until it turns out to have been answered');
select is((select dropped_call from public.calls where id = pg_temp.id('9600', 12)), false, 'and ended by somebody who hung up');
update public.call_logs set call_status = 'carrier_transient' where id = pg_temp.id('9500', 2);
select is(
  (select concat_ws(' ', status, dropped_call) from public.calls where id = pg_temp.id('9600', 12)), 'failed t', 'one that was answered and ended by a fault was dropped'
);
update public.call_logs set status = 'ended', call_status = 'no_answer', ended_at = '2026-06-01T10:00:45Z' where id = pg_temp.id('9500', 3);
select pg_temp.view(15, 3);
select is(pg_temp.state(15), 'no_answer 45', 'a call that is written when its leg is over');
select lives_ok($$ delete from public.call_logs where id = pg_temp.id('9500', 3) $$, 'a leg''s row may go to an archive');
select is(
  (select concat_ws(' ', status, call_log_id is null, organization_id is not null) from public.calls where id = pg_temp.id('9600', 15)), 'no_answer t t',
  'its call stays'
);

select * from finish();
rollback;
