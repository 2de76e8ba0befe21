-- Where a call may be handed to is judged as where it may be made to; and seconds that come late, or have to be asked for, count once.
begin;
set local search_path = public, extensions, tap;
select plan(51);

insert into private.clock_offset (shift) values (timestamptz '2026-11-24 10:00+05:30' - now())
on conflict (single) do update set shift = excluded.shift;
create function pg_temp.id(kind text, n integer) returns uuid
language sql immutable strict as $$ select format('00000000-0000-4000-%s-%s', kind, lpad(n::text, 12, '0'))::uuid $$;
insert into public.organizations (id, name, dial_countries, max_price_micros)
values
  (pg_temp.id('8076', 1), 'Any', null, null), (pg_temp.id('8076', 2), 'India alone', '{IN}', null),
  (pg_temp.id('8076', 3), 'Thrifty', null, 20000);
insert into public.carrier_accounts (id, organization_id, provider, account_sid, credentials_sealed, api_base)
values (pg_temp.id('9476', 1), null, 'telnyx', 'T76', 'sealed', 'https://api.example.com');
insert into public.leads (id, organization_id, name, phone) values (pg_temp.id('e076', 1), pg_temp.id('8076', 1), 'Lead', '+919800000076');
update private.destinations set price_micros = case prefix when '+91' then 20000 else 20001 end where prefix in ('+91', '+1415');


-- What a destination is.
select is(private.transfer_number(told), number, coalesce(told, 'nothing') || ' is a number, or none')
from (
  values
    ('+918044445555', '+918044445555'), ('+91 80 4444-5555', '+918044445555'), ('tel:+918044445555', '+918044445555'),
    ('sip:+18002221111@pbx.example.com;transport=tls', '+18002221111'), ('112', '112'), ('*67#', '*67#'), ('sales', null), ('', null),
    ('sip:sales@pbx.example.com', null), (null, null)
) as v (told, number);

-- The rules of a dial, one by one.
select is(private.transfer_refusal(pg_temp.id('8076', tenant), told, private.clock_now()), reason, told || ' for organization ' || tenant)
from (
  values
    (1, '+918044445555', null), (1, '+14155550100', null), (1, 'sales', null),
    (1, '+19005550100', 'destination_blocked'), (1, '+881612345678', 'destination_blocked'), (1, '+91100', 'destination_blocked'),
    (1, '+442071838750', 'destination_blocked'), (1, '911', 'destination_blocked'), (1, '08044445555', 'destination_blocked'),
    (1, 'tel:+19005550100', 'destination_blocked'), (2, '+918044445555', null), (2, '+14155550100', 'destination_blocked'),
    (3, '+918044445555', null), (3, '+14155550100', 'price_ceiling'), (3, '+12125550100', 'price_ceiling'), (9, '+918044445555', 'destination_blocked')
) as v (tenant, told, reason);

-- An agent asks first.
create function pg_temp.leg(n integer, status public.attempt_status default 'in_progress', tenant integer default 1) returns uuid
language sql as $$
  insert into public.call_logs (
    id, organization_id, lead_id, carrier_account_id, caller_number, callee_number, direction, status, dialled, call_sid, submitted_at, created_at,
    call_status, ended_at
  )
  values (
    pg_temp.id('c076', n), pg_temp.id('8076', tenant), case tenant when 1 then pg_temp.id('e076', 1) end, pg_temp.id('9476', 1), '+15550000002',
    '+9198' || lpad(n::text, 8, '0'), 'outbound', status, true, 'T' || n, private.clock_now() - interval '90 seconds',
    private.clock_now() - interval '100 seconds', case status when 'ended' then 'busy'::public.call_outcome end, case status when 'ended' then private.clock_now() end
  )
  returning id
$$;
select pg_temp.leg(1);
create function pg_temp.judged(destination text, leg integer default 1) returns text
language plpgsql as $$
begin
  return private.judge_transfer(jsonb_build_object('v', 1, 'attempt_id', pg_temp.id('c076', leg), 'to', destination), private.clock_now());
exception when sqlstate 'PGRST' then
  return sqlerrm::jsonb ->> 'code';
end
$$;
select is(pg_temp.judged('+918044445555')::jsonb, '{"allowed": true, "reason": null}', 'it may');
select is(pg_temp.judged('+19005550100')::jsonb, '{"allowed": false, "reason": "destination_blocked"}', 'it may not, and is told why');
select is(pg_temp.judged('sales')::jsonb, '{"allowed": false, "reason": "destination_blocked"}', 'whoever asks means a number');
select is(
  (select string_agg(content ->> 'refused', ' ') from public.lead_activities where lead_id = pg_temp.id('e076', 1) and type = 'transfer'),
  'destination_blocked destination_blocked', 'each refusal is noted with the lead'
);
select is(pg_temp.judged(''), 'malformed_request', 'nothing is no destination');
select is(pg_temp.judged('+918044445555', 9), 'call_not_found', 'a call that is none');
select is(pg_temp.judged('+918044445555', 2), 'call_ended', 'a call that is over') from pg_temp.leg(2, 'ended');

-- What an hour may cost.
update public.organizations set max_hourly_cost_micros = 50000, hourly_cost_currency = 'INR' where id = pg_temp.id('8076', 1);
update public.call_logs set carrier_cost_micros = 49999, carrier_cost_currency = 'INR' where id = pg_temp.id('c076', 2);
select is(private.transfer_refusal(pg_temp.id('8076', 1), '+918044445555', private.clock_now()), null, 'there is room in the hour');
update public.call_logs set carrier_cost_micros = 50000 where id = pg_temp.id('c076', 2);
select is(private.transfer_refusal(pg_temp.id('8076', 1), '+918044445555', private.clock_now()), 'spend_ceiling', 'there is none');
update public.call_logs set carrier_cost_micros = 1, carrier_cost_currency = 'USD' where id = pg_temp.id('c076', 2);
select is(
  private.transfer_refusal(pg_temp.id('8076', 1), '+918044445555', private.clock_now()), 'spend_ceiling', 'and what cannot be compared is too much'
);
update public.organizations set max_hourly_cost_micros = null where id = pg_temp.id('8076', 1);
update public.call_logs set carrier_cost_micros = null, carrier_cost_currency = null where id = pg_temp.id('c076', 2);

-- An agent that has done it all the same.
insert into public.webhook_sources (id, organization_id, provider, name, settings, secrets_sealed)
values
  (pg_temp.id('5076', 1), pg_temp.id('8076', 1), 'vapi', 'v', '{"transfer_destination": {"type": "number", "number": "+19005550100"}}', '{v1.1.AAAA}'),
  (pg_temp.id('5076', 2), pg_temp.id('8076', 1), 'vapi', 'w', '{"transfer_destination": "+918044445555"}', '{v1.1.AAAA}');
create function pg_temp.transferred(key text, arguments jsonb) returns text
language sql as $$
  select private.apply_event(jsonb_build_object(
    'v', 1, 'source', 'vapi', 'source_id', pg_temp.id('5076', 1), 'verified', true, 'headers', '{}'::jsonb, 'body', '',
    'events', jsonb_build_array(jsonb_build_object(
      'kind', 'tool', 'dedupe_key', key, 'payload', jsonb_build_object(
        'type', 'agent', 'event', 'tool', 'attempt_id', pg_temp.id('c076', 1),
        'tools', jsonb_build_array(jsonb_build_object('id', key, 'name', 'transfer', 'called', 'transferCall', 'arguments', arguments))
      )
    ))
  ), private.clock_now()) ->> 'result'
$$;
create function pg_temp.alarms() returns bigint
language sql as $$ select count(*) from private.outbox where topic = 'alarm.transfer_refused' $$;
select is(pg_temp.transferred('a', '{"department": "sales"}'), 'applied', 'a transfer within the house is reported');
select is(pg_temp.alarms(), 0::bigint, 'which nobody has to look at');
select is(pg_temp.transferred('b', '{"destination": {"type": "number", "number": "+19005550100"}}'), 'applied', 'one to a number that is never called is reported');
select is(pg_temp.alarms(), 1::bigint, 'somebody is told');
select is(
  (select content ->> 'refused' from public.lead_activities where lead_id = pg_temp.id('e076', 1) and content ->> 'tool' = 'transferCall' and content ? 'refused'),
  'destination_blocked', 'and the lead''s history says why'
);

-- A destination that we give out ourselves.
select is(
  (private.open_source(jsonb_build_object('source_id', pg_temp.id('5076', n)), private.clock_now()) -> 'settings') ->> 'transfer_refused', reason,
  'a destination that is configured is judged whenever it is asked for'
)
from (values (1, 'destination_blocked'), (2, null)) as v (n, reason);


-- Seconds that the bill tells take the place of the talk's, in whatever order they come.
create function pg_temp.told(key text, n integer, call jsonb, source text default 'telnyx') returns text
language sql as $$
  select private.apply_event(jsonb_build_object(
    'v', 1, 'source', source, 'source_id', pg_temp.id('9476', 1), 'verified', true, 'headers', '{}'::jsonb, 'body', '',
    'events', jsonb_build_array(jsonb_build_object(
      'kind', 'status', 'dedupe_key', key || n, 'attempt_id', pg_temp.id('c076', n),
      'payload', call || jsonb_build_object('type', 'call', 'provider_call_id', 'T' || n)
    ))
  ), private.clock_now()) ->> 'result'
$$;
create function pg_temp.counted(n integer) returns text
language sql as $$
  select concat_ws(' ', log.call_status, log.bill_duration_seconds, (
    select sum(usage.quantity) from private.usage_events as usage
    where usage.organization_id = log.organization_id and usage.key like log.id || '%' and usage.meter_key = 'call_seconds'
  ))
  from public.call_logs as log where log.id = pg_temp.id('c076', n)
$$;
create temporary table life (name text primary key, call jsonb) on commit drop;
insert into life
values
  ('a', jsonb_build_object('status', 'in_progress', 'bill_talk', true, 'answered_at', clock_timestamp() - interval '60 seconds')),
  ('h', jsonb_build_object('status', 'ended', 'outcome', 'answered', 'bill_talk', true, 'ended_at', clock_timestamp() - interval '20 seconds')),
  ('c', '{"bill_duration_seconds": 60, "settles": true, "cost_micros": 4200, "cost_currency": "USD"}');
create function pg_temp.lived(n integer, orders text) returns text
language plpgsql as $$
declare
  step text;
begin
  perform pg_temp.leg(n, 'initiated', 2);
  foreach step in array string_to_array(orders, null) loop
    perform pg_temp.told(step, n, life.call) from life where life.name = step;
  end loop;
  return pg_temp.counted(n);
end
$$;
select is(
  (select string_agg(distinct pg_temp.lived(10 + place::integer, way), ', ') from unnest(array['ahc', 'ach', 'cah', 'cha', 'hac', 'hca', 'hc']) with ordinality as v (way, place)),
  'answered 60 60', 'the bill has the last word'
);
select is((select count(*) from private.unsettled_calls), 0::bigint, 'and nobody has to be asked');

-- Where neither the answer nor the bill was told, the carrier is asked, five times and no more.
select is(pg_temp.lived(20, 'h'), 'answered', 'an end without an answer has no seconds');
create function pg_temp.asked() returns text
language sql as $$
  select string_agg(concat_ws(' ', one ->> 'provider_call_id', one ->> 'status'), ', ')
  from jsonb_array_elements(private.reconcile_calls('{"v": 1}', private.clock_now()) -> 'attempts') as one
  where one ->> 'provider_call_id' = 'T20'
$$;
select is(pg_temp.asked(), null, 'they may still come');
create function pg_temp.later() returns void
language sql as $$ update private.unsettled_calls set due_at = now() - interval '1 second' $$;
select is((select string_agg(pg_temp.asked(), '; ') from (select pg_temp.later() from generate_series(1, 1)) as v), 'T20 ended', 'a minute later it is asked');
select is(pg_temp.told('r', 20, '{"status": "ended", "outcome": "answered", "duration_seconds": 41, "bill_talk": true}', 'telnyx'), 'applied', 'what it says');
select is(pg_temp.counted(20), 'answered 41 41', 'is counted');
select is((select count(*) from private.unsettled_calls), 0::bigint, 'once');

select * from finish();
rollback;
