-- What carriers tell of calls: no order of events ends in another row, and a call to a number of ours opens its rows once.
begin;
set local search_path = public, extensions, tap;
select plan(44);

insert into private.clock_offset (shift) values (timestamptz '2026-11-24 10:00+05:30' - now())
on conflict (single) do update set shift = excluded.shift;
create function pg_temp.id(kind text, n integer) returns uuid
language sql immutable strict as $$ select format('00000000-0000-4000-%s-%s', kind, lpad(n::text, 12, '0'))::uuid $$;
insert into public.organizations (id, name) values (pg_temp.id('8051', 1), 'Near'), (pg_temp.id('8051', 2), 'Far');
insert into public.stores (id, organization_id, name, domain, platform)
values (pg_temp.id('a051', 1), pg_temp.id('8051', 1), 'Shop', 'shop51.example.com', 'shopify');
insert into public.customers (id, organization_id, store_id, external_id, phone)
values
  (pg_temp.id('b051', 1), pg_temp.id('8051', 1), pg_temp.id('a051', 1), '1', '+15551110001'),
  (pg_temp.id('b051', 2), pg_temp.id('8051', 1), pg_temp.id('a051', 1), '2', '+15551110002'),
  (pg_temp.id('b051', 3), pg_temp.id('8051', 1), pg_temp.id('a051', 1), '3', '+15551110002');
insert into public.carrier_accounts (id, organization_id, provider, account_sid, credentials_sealed, api_base)
values
  (pg_temp.id('9451', 1), null, 'plivo', 'P51', 'sealed', 'https://api.example.com'),
  (pg_temp.id('9451', 2), pg_temp.id('8051', 2), 'twilio', 'T51', 'sealed', 'https://api.example.com'),
  (pg_temp.id('9451', 3), null, 'plivo', 'P52', 'sealed', 'https://api.example.com');
insert into public.store_phone_numbers (organization_id, store_id, carrier_account_id, phone_number, is_active)
values
  (pg_temp.id('8051', 1), pg_temp.id('a051', 1), pg_temp.id('9451', 1), '+15550000001', true),
  (pg_temp.id('8051', 1), pg_temp.id('a051', 1), pg_temp.id('9451', 1), '+15550000003', false);
insert into public.caller_numbers (organization_id, carrier_account_id, phone_number)
values (pg_temp.id('8051', 1), pg_temp.id('9451', 1), '+15550000002');
insert into public.leads (id, organization_id, name, phone) values (pg_temp.id('e051', 1), pg_temp.id('8051', 1), 'Lead', '+15552220001');

-- The request of one event; what it is called is its key.
create function pg_temp.event(key text, call jsonb, attempt uuid default null, account integer default 1, source text default 'plivo')
returns jsonb language sql as $$
  select jsonb_build_object(
    'v', 1, 'source', source, 'source_id', pg_temp.id('9451', account), 'verified', true, 'headers', '{}'::jsonb, 'body', '',
    'events', jsonb_build_array(jsonb_strip_nulls(jsonb_build_object(
      'kind', 'status', 'dedupe_key', key, 'attempt_id', attempt, 'payload', call || '{"type": "call"}'
    )))
  )
$$;
create function pg_temp.inbound(key text, call jsonb, account integer default 1, source text default 'plivo') returns jsonb
language sql as $$
  select private.open_inbound_call(pg_temp.event(key, call || '{"inbound": true}', null, account, source), private.clock_now())
$$;


-- A call to a store's number.
create temporary table told on commit drop as
select pg_temp.inbound('in1', '{"provider_call_id": "I1", "status": "ringing", "from": "+15551110001", "to": "+15550000001"}') as answer;
select is((select answer ->> 'result' from told), 'applied', 'a call to a store''s number is taken down');
select is(
  (select (answer -> 'call') - 'attempt_id' from told),
  jsonb_build_object('carrier_account_id', pg_temp.id('9451', 1), 'record', false), 'its answer has what a document is made of'
);
select is(
  (select concat_ws(' ', direction, status, caller_number, callee_number, call_sid) from public.call_logs where id = (select (answer #>> '{call,attempt_id}')::uuid from told)),
  'inbound ringing +15551110001 +15550000001 I1', 'the leg'
);
select is(
  (select concat_ws(' ', direction, status, from_phone, to_phone, twilio_call_sid, customer_id = pg_temp.id('b051', 1)) from public.calls where store_id = pg_temp.id('a051', 1)),
  'inbound ringing +15551110001 +15550000001 I1 t', 'the store''s call, with the customer of that number'
);
select is(
  (select attempt_id from private.webhook_events where dedupe_key = 'in1'), (select (answer #>> '{call,attempt_id}')::uuid from told),
  'the event says which leg it was about'
);
select is(
  pg_temp.inbound('in1', '{"provider_call_id": "I1", "status": "ringing", "from": "+15551110001", "to": "+15550000001"}'),
  (select answer || '{"result": "duplicate"}' from told) - 'organization_id', 'the same request again gives the same rows'
);
select is(
  pg_temp.inbound('in1b', '{"provider_call_id": "I1", "status": "ringing", "from": "+15551110001", "to": "+15550000001"}') -> 'call',
  (select answer -> 'call' from told), 'and so does another request of the same call'
);
select is((select count(*) from public.calls where store_id = pg_temp.id('a051', 1)), 1::bigint, 'there is one call');

-- The call goes on, and the store's view with it.
select is(
  private.apply_event(pg_temp.event('in2', '{"provider_call_id": "I1", "status": "in_progress", "stream": {"id": "S", "status": "started"}}', (select (answer #>> '{call,attempt_id}')::uuid from told)), private.clock_now()) ->> 'result',
  'applied', 'a callback with the leg''s token is applied'
);
select is((select status::text from public.calls where twilio_call_sid = 'I1'), 'answered', 'the store''s call is answered when the agent hears the caller');
select is(
  pg_temp.inbound('in3', '{"provider_call_id": "I1", "status": "ended", "outcome": "answered", "duration_seconds": 37, "bill_duration_seconds": 60, "to": "+15550000001"}') -> 'call',
  null, 'who is told of the end has nothing to connect'
);
select is(
  (select concat_ws(' ', status, call_outcome, twilio_call_sid) from public.calls where twilio_call_sid = 'I1'), 'completed answered I1', 'the store''s call is completed'
);
select is(
  (select jsonb_object_agg(meter_key, quantity) from private.usage_events where key = (select answer #>> '{call,attempt_id}' from told)),
  '{"ai_calls": 1, "call_seconds": 60}', 'it is metered like any leg'
);
select is(
  (select payload ->> 'outcome' from private.outbox where topic = 'call.ended' and key = (select answer #>> '{call,attempt_id}' from told)), 'answered', 'who listens hears of its end'
);

-- Other numbers, other callers.
select is(
  pg_temp.inbound('in4', '{"provider_call_id": "I4", "status": "ringing", "to": "+15550000001"}') -> 'call' ->> 'record', 'false', 'who withholds a number is taken too'
);
select is(
  (select log.caller_number || ' ' || call.from_phone from public.call_logs as log join public.calls as call on call.call_log_id = log.id where log.call_sid = 'I4'),
  'anonymous anonymous', 'as anonymous'
);
select ok(
  pg_temp.inbound('in5', '{"provider_call_id": "I5", "status": "ringing", "from": "+15551110002", "to": "+15550000001"}') ? 'call', 'a number of two customers'
);
select is((select customer_id from public.calls where twilio_call_sid = 'I5'), null, 'is nobody''s in particular');
select ok(
  pg_temp.inbound('in6', '{"provider_call_id": "I6", "status": "ringing", "from": "+15552220001", "to": "+15550000002"}') ? 'call', 'a number that an organization calls from'
);
select is(
  (select (log.lead_id = pg_temp.id('e051', 1))::text || ' ' || (select count(*) from public.calls where call_log_id = log.id) from public.call_logs as log where log.call_sid = 'I6'),
  'true 0', 'the lead calls back, and no store is called'
);
select is(pg_temp.inbound(to_number || account, jsonb_build_object('provider_call_id', 'X' || to_number || account, 'status', 'ringing', 'to', to_number), account, source), '{"result": "orphan"}'::jsonb, why)
from (
  values
    ('+15559999999', 1, 'plivo', 'a number that is nobody''s'),
    ('+15550000003', 1, 'plivo', 'a number that is off'),
    ('+15550000001', 2, 'twilio', 'a store''s number on another organization''s account'),
    ('+15550000001', 3, 'plivo', 'a store''s number on another account of the platform'),
    ('+15550000002', 2, 'twilio', 'a caller number on another account'),
    ('+15550000001', 1, 'twilio', 'an account of another carrier'),
    ('+15550000001', 9, 'plivo', 'an account that is not there')
) as v (to_number, account, source, why);
select is(
  (select string_agg(distinct error, ' ' order by error) from private.webhook_events where status = 'orphan' and dedupe_key like '+1555%'),
  'unknown_account unknown_number', 'each is kept, with what is wrong with it'
);
select is((select count(*) from public.call_logs where call_sid like 'X%'), 0::bigint, 'and opens nothing');
select is(
  (pg_temp.inbound('in7', '{"provider_call_id": "I1", "status": "ringing", "to": "+15550000001"}', 2, 'twilio')) ->> 'result', 'orphan',
  'another account knows nothing of a call'
);


-- Any order. Each set of events is told in every order, each order to a leg of its own; all legs must be the same but for their times.
create function pg_temp.orders(n integer) returns setof integer[]
language sql as $$
  with recursive longer (picked) as (
    select array[]::integer[]
    union all
    select picked || next from longer, generate_series(1, n) as next where cardinality(picked) < n and next <> all (picked)
  )
  select picked from longer where cardinality(picked) = n
$$;
create function pg_temp.rows(events jsonb, direction public.call_direction default 'outbound') returns setof jsonb
language plpgsql as $$
declare
  picked integer[];
  place  integer;
  leg    uuid;
  sid    text;
begin
  for picked in select pg_temp.orders(jsonb_array_length(events)) loop
    sid := 'O' || gen_random_uuid();
    insert into public.call_logs (organization_id, carrier_account_id, caller_number, callee_number, direction, status, dialled, submitted_at, created_at)
    values (
      pg_temp.id('8051', 1), pg_temp.id('9451', 1), '+15550000002', '+1666' || lpad((random() * 99999999)::integer::text, 8, '0'), rows.direction, 'queued', true,
      private.clock_now() - interval '90 seconds', private.clock_now() - interval '100 seconds'
    )
    returning id into leg;
    foreach place in array picked || picked loop
      perform private.apply_event(
        pg_temp.event(sid || place, (events -> (place - 1)) || jsonb_build_object('provider_call_id', sid), leg), private.clock_now()
      );
    end loop;
    return query
    select
      to_jsonb(log) - array['id', 'callee_number', 'call_sid', 'submitted_at', 'ringing_at', 'answered_at', 'ended_at', 'transferred_at', 'created_at', 'updated_at']
        || jsonb_build_object(
          'times', array[log.ringing_at is not null, log.answered_at is not null, log.ended_at is not null, log.transferred_at is not null],
          'usage', (select jsonb_object_agg(usage.meter_key, usage.quantity) from private.usage_events as usage where usage.source = 'call' and usage.key = log.id::text),
          'failed', (select count(*) from private.webhook_events as event where event.attempt_id = log.id and event.status = 'failed'),
          'kept', (select count(*) from private.webhook_events as event where event.attempt_id = log.id)
        )
    from public.call_logs as log
    where log.id = leg;
  end loop;
end
$$;
-- How many different rows there are, and what one of them says.
create function pg_temp.summary(events jsonb) returns text
language sql as $$
  select concat_ws(
    ' ', count(distinct told.told), min(told.told ->> 'status'), min(told.told ->> 'call_status'), min(told.told ->> 'duration'), min(told.told ->> 'bill_duration_seconds'),
    min(told.told ->> 'hangup_cause_name'), min(told.told ->> 'machine'), min(told.told ->> 'stream_status'), min(told.told ->> 'transfer_status'),
    min(told.told ->> 'usage'), 'failed ' || max(told.told ->> 'failed')
  )
  from pg_temp.rows(events) as told (told)
$$;
select is(
  pg_temp.summary($$[
    {"status": "ringing"}, {"status": "in_progress", "stream": {"id": "s", "status": "started"}}, {"machine": false},
    {"recording": {"id": "r", "url": "https://r", "duration_seconds": 36}},
    {"status": "ended", "outcome": "answered", "duration_seconds": 37, "bill_duration_seconds": 60, "cause_name": "Normal Hangup", "cost_micros": 1, "cost_currency": "USD"}
  ]$$),
  '1 ended answered 37 60 Normal Hangup false started {"ai_calls": 1, "call_seconds": 60} failed 0', 'an answered call'
);
select is(
  pg_temp.summary('[{"status": "ringing"}, {"machine": true}, {"status": "in_progress"}, {"status": "ended", "outcome": "answered", "duration_seconds": 9, "bill_duration_seconds": 60}]'),
  '1 ended machine 9 60 true {"ai_calls": 1, "call_seconds": 60} failed 0', 'a machine that is heard before or after the end'
);
select is(
  pg_temp.summary('[{"status": "initiated"}, {"status": "ended", "outcome": "busy", "cause_name": "busy"}, {"status": "ended", "outcome": "answered", "duration_seconds": 0, "bill_duration_seconds": 0}]'),
  '1 ended busy 0 0 busy failed 0', 'a busy line, and the plain end that follows it'
);
select is(
  pg_temp.summary('[{"status": "ended", "outcome": "no_answer", "cause_name": "unanswered"}, {"status": "in_progress"}, {"status": "ended", "outcome": "answered", "duration_seconds": 12, "bill_duration_seconds": 12, "cause_name": "completed"}]'),
  '1 ended answered 12 12 completed {"ai_calls": 1, "call_seconds": 12} failed 0', 'talk says more than a reason why there was none'
);
select is(
  pg_temp.summary('[{"status": "ended", "outcome": "answered", "duration_seconds": 2, "bill_duration_seconds": 2}, {"status": "in_progress"}, {"stream": {"id": "s", "status": "failed", "error": "refused"}}]'),
  '1 ended our_fault 2 2 failed {"ai_calls": 1, "call_seconds": 2} failed 0', 'whom no agent spoke to was not answered by us'
);
select is(
  pg_temp.summary('[{"status": "in_progress"}, {"transfer": {"leg": "b", "status": "initiated"}}, {"transfer": {"leg": "b", "status": "answered"}}, {"transfer": {"leg": "b", "status": "completed"}}, {"status": "ended", "outcome": "answered", "duration_seconds": 90, "bill_duration_seconds": 120}]'),
  '1 ended answered 90 120 completed {"ai_calls": 1, "call_seconds": 120} failed 0', 'a transfer'
);
select is(
  pg_temp.summary(format(
    '[{"status": "in_progress", "bill_talk": true, "answered_at": %s}, {"status": "ended", "outcome": "answered", "bill_talk": true, "ended_at": %s}, {"cost_micros": 4200, "cost_currency": "usd"}]',
    to_json(clock_timestamp() - interval '60 seconds'), to_json(clock_timestamp() - interval '20 seconds')
  )::jsonb),
  '1 ended answered 40 40 {"ai_calls": 1, "call_seconds": 40} failed 0', 'a carrier that tells no seconds, its answer told before or after the end'
);
select is(
  pg_temp.summary('[{"recording": {"id": "r", "url": "https://r"}}, {"recording": {"id": "r", "url": "https://r", "duration_seconds": 36}}, {"status": "ended", "outcome": "failed", "cause_name": "solar_flare"}]'),
  '1 ended failed solar_flare failed 0', 'a recording whose length is told later, and an end that has no name'
);

-- What a person should see.
select is(
  (
    select private.apply_event(pg_temp.event('notice', '{"provider_call_id": "I4", "notice": "call.recording.error disk full"}', log.id), private.clock_now()) ->> 'result'
    from public.call_logs as log where log.call_sid = 'I4'
  ),
  'ignored', 'a fault that the carrier reports changes no leg'
);
select is((select error from private.webhook_events where dedupe_key = 'notice'), 'call.recording.error disk full', 'it is kept with the event');
select is((select count(*) from private.outbox where topic = 'alarm.carrier_fault'), 1::bigint, 'and somebody is told');

-- The mapping of ends is total.
select is(
  (select count(*) from unnest(enum_range(null::public.call_outcome)) as outcome where private.outcome_rank(outcome, true) is null or private.outcome_rank(outcome, false) is null),
  0::bigint, 'every end has a rank'
);

-- Walls. pgTAP's own functions are not everybody's: who asks is played inside.
create function pg_temp.told(who name, request text) returns text
language plpgsql as $$
begin
  execute format('set local role %I', who);
  perform public.open_inbound_call(request::jsonb);
  reset role;
  return 'taken';
exception when others then
  reset role;
  return sqlstate;
end
$$;
select is(pg_temp.told('authenticated', '{}'), '42501', 'no user takes a call down');
select is(pg_temp.told('service_role', '{"v": 1}'), 'PGRST', 'an event is verified before it is stored');

select * from finish();
rollback;
