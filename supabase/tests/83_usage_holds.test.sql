-- Units held ahead of their use: they settle with their event, are given back, or are over; and never count twice.
begin;
set local search_path = public, extensions, tap;
select plan(45);

insert into public.meters (key, name, unit, aggregation, rounding, pulse)
values
  ('test_units', 'Units', 'unit', 'sum', 'none', 1), ('test_talk', 'Talk', 'second', 'sum', 'event', 60), ('test_lines', 'Lines', 'line', 'max', 'none', 1);
insert into public.subscription_plans (id, slug, name) values ('00000000-0000-4000-a000-000000000001', 'test-held', 'Held');
insert into public.plan_prices (id, plan_id, version, billing_cycle, base_minor)
values ('00000000-0000-4000-b000-000000000001', '00000000-0000-4000-a000-000000000001', 1, 'monthly', 0);
insert into public.plan_price_meters (plan_price_id, meter_key, included_units, limit_units, hard)
values
  ('00000000-0000-4000-b000-000000000001', 'test_units', 100, 100, true), ('00000000-0000-4000-b000-000000000001', 'test_talk', 600, 600, true);
insert into public.organizations (id, name, timezone, country_code)
values
  ('00000000-0000-4000-8000-000000000001', 'One', 'Asia/Kolkata', 'IN'), ('00000000-0000-4000-8000-000000000002', 'Two', 'Asia/Kolkata', 'IN');
select private.subscribe_organization(id, 'test-held', 'active', '2026-03-01T10:00+05:30')
from public.organizations where name in ('One', 'Two');
insert into public.api_keys (organization_id, name, prefix, sha256, scopes)
values
  ('00000000-0000-4000-8000-000000000001', 'writes', 'tlk_00000001', sha256('one'), array['usage.write']),
  ('00000000-0000-4000-8000-000000000001', 'leads', 'tlk_00000002', sha256('leads'), array['lead.write']);

create function pg_temp.asked(event jsonb) returns jsonb
language sql as $$ select jsonb_build_object('v', 1, 'organization_id', '00000000-0000-4000-8000-000000000001', 'source', 'crm', 'type', 'test_units') || event $$;
-- The status, or the code of the refusal and the field that it is about.
create function pg_temp.hold(event jsonb, at timestamptz) returns text
language plpgsql as $$
begin
  return private.hold_usage(pg_temp.asked(event), at) ->> 'status';
exception when sqlstate 'PGRST' then
  return (sqlerrm::jsonb ->> 'code') || coalesce(' ' || ((sqlerrm::jsonb ->> 'details')::jsonb ->> 'field'), '');
end
$$;
create function pg_temp.give_back(id text, at timestamptz) returns text
language sql as $$ select private.release_usage_hold(pg_temp.asked(jsonb_build_object('id', id)), at) ->> 'released' $$;
create function pg_temp.record(at timestamptz, variadic events jsonb[]) returns text
language sql as $$
  select string_agg(result ->> 'status', ', ')
  from jsonb_array_elements(private.record_usage(
    jsonb_build_object('v', 1, 'organization_id', '00000000-0000-4000-8000-000000000001', 'events', (
      select jsonb_agg('{"source": "crm", "type": "test_units"}'::jsonb || event order by position) from unnest(events) with ordinality as given (event, position)
    )), at) -> 'results') as result
$$;
create function pg_temp.units(meter text default 'test_units') returns text
language sql as $$
  select string_agg(log.period_start || ': ' || log.usage_count || ' used, ' || log.reserved || ' held', '; ' order by log.period_start)
  from public.usage_logs as log
  where log.organization_id = '00000000-0000-4000-8000-000000000001' and log.feature_key = meter
$$;

-- Held, used, given back ------------------------------------------------------------------------------------------------------------

select is(pg_temp.hold('{"id": "a", "quantity": 60}', '2026-03-02T10:00Z'), 'held', 'Sixty of a hundred are held');
select is(pg_temp.units(), '2026-03-01: 0 used, 60 held', 'and seen');
select is(pg_temp.hold('{"id": "b", "quantity": 41}', '2026-03-02T10:01Z'), 'quota_exhausted quantity', 'Forty-one more are refused');
select is(pg_temp.units(), '2026-03-01: 0 used, 60 held', 'and nothing changes');
select is(pg_temp.hold('{"id": "b", "quantity": 40}', '2026-03-02T10:01Z'), 'held', 'Forty are held');
select is(pg_temp.hold('{"id": "a", "quantity": 60}', '2026-03-02T10:01Z'), 'held', 'The same again is the same');
select is(pg_temp.hold('{"id": "a", "quantity": 61}', '2026-03-02T10:01Z'), 'idempotency_conflict id', 'other units are not');
select is(pg_temp.units(), '2026-03-01: 0 used, 100 held', 'and nothing is held twice');
select is(pg_temp.record('2026-03-02T10:02Z', '{"id": "a", "quantity": 25}'), 'stored', 'Less was used than was held');
select is(pg_temp.units(), '2026-03-01: 25 used, 40 held', 'and the rest is there again');
select is(pg_temp.record('2026-03-02T10:03Z', '{"id": "a", "quantity": 25}'), 'duplicate', 'told again');
select is(pg_temp.units(), '2026-03-01: 25 used, 40 held', 'it settles nothing more');
select is(pg_temp.hold('{"id": "a", "quantity": 5}', '2026-03-02T10:03Z'), 'already_counted id', 'Nothing is held for what is counted');
select is(pg_temp.units(), '2026-03-01: 25 used, 40 held', 'not for a moment');
select is(pg_temp.give_back('b', '2026-03-02T10:04Z'), 'true', 'What is not needed is given back');
select is(pg_temp.give_back('b', '2026-03-02T10:04Z'), 'false', 'once');
select is(pg_temp.units(), '2026-03-01: 25 used, 0 held', 'and is there again');
select is(pg_temp.hold('{"id": "c", "quantity": 75}', '2026-03-02T10:05Z'), 'held', 'for another');
select is(pg_temp.record('2026-03-02T10:06Z', '{"id": "c", "quantity": 80}'), 'stored', 'More was used than was held: it is recorded in full');
select is(pg_temp.units(), '2026-03-01: 105 used, 0 held', 'also over the limit');

-- Over ----------------------------------------------------------------------------------------------------------------------------------

select pg_temp.record('2026-03-02T10:07Z', '{"id": "less", "quantity": -80, "corrects": "c"}');
select is(pg_temp.hold('{"id": "d", "quantity": 70, "seconds": 30}', '2026-03-02T11:00:00Z'), 'held', 'Seventy for half a minute');
select is(pg_temp.hold('{"id": "e", "quantity": 70}', '2026-03-02T11:00:29Z'), 'quota_exhausted quantity', 'are held until then');
select is(pg_temp.hold('{"id": "e", "quantity": 70}', '2026-03-02T11:00:30Z'), 'held', 'and over when it is, swept up or not');
select is(pg_temp.units(), '2026-03-01: 25 used, 70 held', 'so that only one of the two is held');
select is(pg_temp.record('2026-03-02T11:01Z', '{"id": "d", "quantity": 3}'), 'stored', 'What comes after its time is counted all the same');
select is(pg_temp.units(), '2026-03-01: 28 used, 70 held', 'and gives nothing back a second time');
select is(private.expire_usage_holds('{"v": 1}', '2026-03-02T11:10:29Z'), '{"expired": 0, "more": false}', 'A sweep leaves what is not over');
select is(private.expire_usage_holds('{"v": 1}', '2026-03-02T11:10:30Z'), '{"expired": 1, "more": false}', 'and takes what is');
select is(pg_temp.units(), '2026-03-01: 28 used, 0 held', 'with all that it held');
select is(private.expire_usage_holds('{"v": 1}', '2026-03-02T11:10:30Z'), '{"expired": 0, "more": false}', 'once');
select is(
  array[pg_temp.hold('{"id": "f", "quantity": 9, "seconds": 1}', '2026-03-02T12:00Z'), pg_temp.hold('{"id": "f", "quantity": 4}', '2026-03-02T12:01Z')],
  array['held', 'held'], 'An id whose time is over is free for another hold'
);
select is(pg_temp.units(), '2026-03-01: 28 used, 4 held', 'which is then the only one');
select is(
  pg_temp.hold('{"id": "p", "quantity": 6}', '2026-03-02T12:02Z') || '; '
    || pg_temp.record('2026-03-02T12:03Z', '{"id": "a", "quantity": 25}', '{"id": "p", "quantity": 2}', '{"id": "f", "quantity": 0}'),
  'held; duplicate, stored, rejected', 'In a batch of which not all is counted'
);
select is(pg_temp.units(), '2026-03-01: 30 used, 4 held', 'what is counted is settled, and what is not is not');

-- Across the end of a period, and in pulses -----------------------------------------------------------------------------------------

select is(pg_temp.hold('{"id": "g", "quantity": 50, "seconds": 86400}', '2026-03-31T18:00Z'), 'held', 'Held in March');
select is(pg_temp.hold('{"id": "h", "quantity": 60}', '2026-04-01T05:00Z'), 'quota_exhausted quantity', 'is in the way in April, where it will be used');
select is(
  pg_temp.record('2026-04-01T06:00Z', '{"id": "g", "quantity": 10}', '{"id": "i", "quantity": 1, "time": "2026-03-05T10:00:00Z"}'), 'stored, stored',
  'and used there, with something late'
);
select private.expire_usage_holds('{"v": 1}', '2026-04-01T06:00Z');
select is(pg_temp.units(), '2026-03-01: 31 used, 0 held; 2026-04-01: 10 used, 0 held', 'and nothing is held in either');
select is(pg_temp.hold('{"id": "j", "type": "test_talk", "quantity": 541}', '2026-04-01T07:00Z'), 'held', 'Of started pulses');
select is(pg_temp.units('test_talk'), '2026-04-01: 0 used, 600 held', 'whole ones are held');

-- Who, and what -----------------------------------------------------------------------------------------------------------------------

select is(
  array(
    select pg_temp.hold(event::jsonb, '2026-04-01T08:00Z')
    from unnest(array[
      '{"id": "x", "quantity": 0}', '{"id": "x", "quantity": "5"}', '{"id": "x", "quantity": 1.5}', '{"quantity": 1}', '{"id": "x", "quantity": 1, "source": ""}',
      '{"id": "x", "quantity": 1, "source": "call"}', '{"id": "x", "quantity": 1, "type": "pigeons"}', '{"id": "x", "quantity": 1, "type": "ai_calls"}',
      '{"id": "x", "quantity": 1, "type": "test_lines"}', '{"id": "x", "quantity": 1, "seconds": 0}', '{"id": "x", "quantity": 1, "seconds": 86401}'
    ]) as event
  ),
  array[
    'invalid_quantity quantity', 'invalid_quantity quantity', 'invalid_quantity quantity', 'invalid_id id', 'invalid_source source', 'reserved_source source',
    'unknown_type type', 'reserved_type type', 'reserved_type type', 'invalid_seconds seconds', 'invalid_seconds seconds'
  ], 'What is wrong is said'
);
select is(
  array(
    select pg_temp.hold(
      jsonb_build_object('id', 'x', 'quantity', 1) || case when key is null then jsonb_build_object('organization_id', gen_random_uuid())
        else jsonb_build_object('api_key', jsonb_build_object('prefix', key, 'sha256', encode(sha256(secret::bytea), 'hex'))) end,
      '2026-04-01T08:00Z')
    from (values ('tlk_00000001', 'one'), ('tlk_00000002', 'leads'), ('tlk_00000001', 'other'), (null, null)) as given (key, secret)
  ),
  array['held', 'missing_scope', 'invalid_api_key', 'organization_not_found organization_id'], 'A key is needed, and its scope'
);
select is(
  private.release_usage_hold('{"v": 1, "organization_id": "00000000-0000-4000-8000-000000000002", "source": "crm", "id": "j"}', '2026-04-01T08:00Z'),
  '{"released": false}', 'Nobody gives back what another holds'
);
select is_empty('select problem from private.check_usage_holds()', 'What is held and what is counted as held agree');
update public.usage_logs set reserved = reserved + 1
where organization_id = '00000000-0000-4000-8000-000000000001' and feature_key = 'test_talk';
select is((select problem from private.check_usage_holds()), '600 of test_talk held, 601 counted', 'and it is seen where they do not');

select * from finish();
rollback;
