-- Analytics of calls: by day and hour of the store's own zone, from the calls alone, as often as one likes.
begin;
set local search_path = public, extensions, tap;
select plan(36);

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

-- Store 1 is in Kolkata: 1 June there is from 31 May 18:30 to 1 June 18:30 UTC.
insert into public.conversations (id, organization_id, store_id, conversation_key, channel, status, start_time, end_time, escalated_to_human, resolution_status)
values
  (pg_temp.id('9000', 1), pg_temp.id('8000', 1), pg_temp.id('a000', 1), '1', 'voice', 'resolved', '2026-05-31T18:30Z', '2026-05-31T18:40Z', false, 'answered'),
  (pg_temp.id('9000', 2), pg_temp.id('8000', 1), pg_temp.id('a000', 1), '2', 'voice', 'completed', '2026-06-01T04:00Z', '2026-06-01T04:10Z', true, 'handed over'),
  (pg_temp.id('9000', 3), pg_temp.id('8000', 1), pg_temp.id('a000', 1), '3', 'voice', 'active', '2026-06-01T04:00Z', null, false, null),
  (pg_temp.id('9000', 4), pg_temp.id('8000', 1), pg_temp.id('a000', 1), '4', 'voice', 'abandoned', '2026-06-01T04:00Z', '2026-06-01T04:10Z', false, 'answered');
insert into public.conversation_messages (organization_id, store_id, conversation_id, role, content, processing_time_ms)
values
  (pg_temp.id('8000', 1), pg_temp.id('a000', 1), pg_temp.id('9000', 1), 'ai_assistant', 'Hi', 100),
  (pg_temp.id('8000', 1), pg_temp.id('a000', 1), pg_temp.id('9000', 2), 'ai_assistant', 'Hi', 201),
  (pg_temp.id('8000', 1), pg_temp.id('a000', 1), pg_temp.id('9000', 2), 'customer', 'Hi', 9999);
insert into public.calls (
  organization_id, store_id, conversation_id, from_phone, to_phone, direction, start_time, attempt_status, call_outcome, end_time, dropped_call,
  quality_score, satisfaction_rating, intent_detected
)
select
  pg_temp.id('8000', 1), pg_temp.id('a000', v.store), pg_temp.id('9000', v.talk), 'anonymous', '+15550002', v.direction::public.call_direction, v.start_time::timestamptz,
  case when v.outcome is null then 'in_progress' else 'ended' end::public.attempt_status, v.outcome::public.call_outcome,
  case when v.outcome is not null then v.start_time::timestamptz + v.seconds * interval '1 second' end, v.dropped, v.quality, v.rating, v.intent
from (
  values
    (1, null, 'inbound', '2026-05-31T18:29:59Z', 'answered', 1000, false, 0.1, 1, 'before'),
    (1, 1, 'inbound', '2026-05-31T18:30Z', 'answered', 60, false, 0.9, 5, 'refund'),
    (1, 2, 'inbound', '2026-06-01T04:00Z', 'answered', 120, true, 0.8, 4, 'refund'),
    (1, 3, 'inbound', '2026-06-01T04:15Z', null, null, false, null, null, 'order status'),
    (1, 4, 'inbound', '2026-06-01T04:20Z', 'no_answer', 30, false, null, null, null),
    (1, 2, 'outbound', '2026-06-01T18:29:59Z', 'busy', 5, false, null, null, 'refund'),
    (1, null, 'outbound', '2026-06-01T18:30Z', 'answered', 1000, false, 0.1, 1, 'after'),
    (2, null, 'outbound', '2026-06-01T04:00Z', 'answered', 1000, false, 0.1, 1, 'other store')
) as v (store, talk, direction, start_time, outcome, seconds, dropped, quality, rating, intent);

create function pg_temp.row(hour integer) returns text
language sql stable as $$
  select concat_ws(' ', total_calls, inbound_calls, outbound_calls, answered_calls, missed_calls, dropped_calls, coalesce(average_call_duration::text, '-'),
    coalesce(average_quality_score::text, '-'), coalesce(average_satisfaction_rating::text, '-'), coalesce(ai_resolution_rate::text, '-'),
    coalesce(human_escalation_rate::text, '-'), coalesce(average_response_time_ms::text, '-'), top_intents, resolution_categories)
  from public.call_analytics
  where store_id = pg_temp.id('a000', 1) and date_period = '2026-06-01' and hour_period is not distinct from hour
$$;

select is(private.roll_up_call_analytics(pg_temp.id('a000', 1), '2026-06-01'), 4, 'a day of three hours is four rows');
select is(
  pg_temp.row(null),
  '5 4 1 3 2 1 90.00 0.85 4.50 33.33 25.00 151 [{"calls": 3, "intent": "refund"}, {"calls": 1, "intent": "order status"}] {"answered": 2, "handed over": 1}',
  'the day: from midnight to midnight in Kolkata'
);
select is(pg_temp.row(0), '1 1 0 1 0 0 60.00 0.90 5.00 100.00 0.00 100 [{"calls": 1, "intent": "refund"}] {"answered": 1}', 'its first hour');
select is(
  pg_temp.row(9), '3 3 0 2 1 1 120.00 0.80 4.00 0.00 33.33 201 [{"calls": 1, "intent": "order status"}, {"calls": 1, "intent": "refund"}] {"answered": 1, "handed over": 1}',
  'from half past nine on: a call under way is neither missed nor in the average'
);
select is(pg_temp.row(23), '1 0 1 0 1 0 - - - 0.00 100.00 201 [{"calls": 1, "intent": "refund"}] {"handed over": 1}', 'its last hour');
select is((select count(*)::integer from public.call_analytics), 4, 'nothing of another day or store');

-- Again, and after corrections.
update public.call_analytics set updated_at = '2020-01-01T00:00Z';
select is(private.roll_up_call_analytics(pg_temp.id('a000', 1), '2026-06-01'), 0, 'again: nothing changes');
select is((select count(*)::integer from public.call_analytics where updated_at = '2020-01-01T00:00Z'), 4, 'not even a timestamp');
update public.calls set attempt_status = 'ended', call_outcome = 'answered', end_time = '2026-06-01T04:16Z' where intent_detected = 'order status';
select is(private.roll_up_call_analytics(pg_temp.id('a000', 1), '2026-06-01'), 2, 'a call that ended changes its hour and its day');
select is((select average_call_duration from public.call_analytics where hour_period is null), 80.00, 'and the average');
delete from public.calls where intent_detected = 'refund' and direction = 'outbound';
select is(private.roll_up_call_analytics(pg_temp.id('a000', 1), '2026-06-01'), 2, 'a call that is gone changes its day and takes its hour along');
select is(pg_temp.row(23), null, 'no hour without a call');
select is(
  (select sum(total_calls) filter (where hour_period is not null) from public.call_analytics), (select total_calls::bigint from public.call_analytics where hour_period is null),
  'the hours add up to the day'
);

-- One row a day, one an hour; ranges.
select throws_ok(
  format('insert into public.call_analytics (organization_id, store_id, date_period, hour_period) values (%L, %L, ''2026-06-01'', %s)', pg_temp.id('8000', 1), pg_temp.id('a000', 1), hour),
  '23505', null, format('there is no second row of hour %s', hour)
)
from unnest(array['null', '9']) as hour;
select throws_ok(format('update public.call_analytics set %s where hour_period is null', change), '23514', null, format('no %s', change))
from unnest(array[
  'ai_resolution_rate = 500', 'ai_resolution_rate = -1', 'human_escalation_rate = 100.01', 'human_escalation_rate = -0.01', 'total_calls = -1',
  'hour_period = 24', 'average_quality_score = 1.1', 'average_satisfaction_rating = 0.9', 'missed_calls = 100', 'dropped_calls = 100',
  'inbound_calls = inbound_calls + 1'
]) as change;

-- The schedule: yesterday and today of every store that had calls, in its own zone, in pages.
delete from public.call_analytics;
select is(
  private.roll_up_call_analytics('{"v": 1}', '2026-06-01T20:00Z'), '{"stores": 2, "rows": 7, "next": null}'::jsonb, 'both stores that had calls'
);
select is(
  (select string_agg(format('%s %s', right(store_id::text, 1), date_period), ', ' order by store_id, date_period) from public.call_analytics where hour_period is null),
  '1 2026-06-01, 1 2026-06-02, 2 2026-06-01', 'at 20:00 UTC it is the second in Kolkata and the first elsewhere'
);
select is(private.roll_up_call_analytics('{"v": 1}', '2026-06-01T20:00Z') ->> 'rows', '0', 'again: nothing changes');
select is(private.roll_up_call_analytics('{"v": 1, "limit": 1}', '2026-06-01T20:00Z') ->> 'next', pg_temp.id('a000', 1)::text, 'a page of one store');
select is(
  private.roll_up_call_analytics(jsonb_build_object('v', 1, 'limit', 1, 'after', pg_temp.id('a000', 1)), '2026-06-01T20:00Z') ->> 'stores', '1', 'and the next'
);
select is(private.roll_up_call_analytics(gen_random_uuid(), '2026-06-01'), 0, 'a store that there is not has nothing');

-- A day on which the clock goes back has one hour of two.
update public.stores set timezone = 'Europe/London' where id = pg_temp.id('a000', 2);
insert into public.calls (organization_id, store_id, from_phone, to_phone, direction, start_time)
select pg_temp.id('8000', 1), pg_temp.id('a000', 2), 'anonymous', '+15550002', 'inbound', timestamptz '2026-10-24T23:00Z' + n * interval '30 minutes'
from generate_series(0, 49) as n;
select is(private.roll_up_call_analytics(pg_temp.id('a000', 2), '2026-10-25'), 25, 'it has twenty-four rows of hours and its own');
select is(
  (select format('%s %s', total_calls, (select total_calls from public.call_analytics where date_period = '2026-10-25' and hour_period = 1)) from public.call_analytics where date_period = '2026-10-25' and hour_period is null),
  '50 4', 'twenty-five hours, of which one in the morning counts twice'
);

-- A call that was answered and dropped was not missed.
insert into public.calls (organization_id, store_id, from_phone, to_phone, direction, start_time, attempt_status, call_outcome, answered_at, end_time, dropped_call)
values (pg_temp.id('8000', 1), pg_temp.id('a000', 1), 'anonymous', '+15550002', 'inbound', '2026-07-01T04:00Z', 'ended', 'carrier_transient', '2026-07-01T04:00:05Z', '2026-07-01T04:00:50Z', true);
select is(private.roll_up_call_analytics(pg_temp.id('a000', 1), '2026-07-01'), 2, 'its day and its hour');
select is(
  (select concat_ws(' ', answered_calls, missed_calls, dropped_calls, average_call_duration) from public.call_analytics where date_period = '2026-07-01' and hour_period is null),
  '1 0 1 50.00', 'it is answered and dropped'
);

select * from finish();
rollback;
