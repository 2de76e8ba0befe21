-- Units held ahead of their use: an organization's own system asks for room, works, and then reports the event, which settles the hold.
--
-- A hold has the source and the id of the event that it is for, so that a repetition holds nothing twice and the event finds it. The locks
-- are the event's key, the hold, then the counters by meter and period, as everywhere.

create function private.usage_reporter(request jsonb) returns uuid
language plpgsql stable security definer set search_path = ''
as $$
declare
  reporter record;
begin
  if request ? 'organization_id' and not request ? 'api_key' then
    -- From the platform itself.
    select tenant.id as organization_id, array['usage.write'] as scopes
    into reporter
    from public.organizations as tenant
    where tenant.id = private.read_uuid(request, 'organization_id');
    if not found then
      perform private.raise_error(404, 'organization_not_found', 'There is no such organization', 'organization_id');
    end if;
  else
    select key.organization_id, key.scopes
    into reporter
    from public.api_keys as key
    where key.prefix = request #>> '{api_key,prefix}'
      and encode(key.sha256, 'hex') = lower(request #>> '{api_key,sha256}')
      and key.revoked_at is null;
    if not found then
      perform private.raise_error(401, 'invalid_api_key', 'The API key is unknown or revoked');
    end if;
  end if;
  if not 'usage.write' = any (reporter.scopes) then
    perform private.raise_error(403, 'missing_scope', 'The API key lacks the scope usage.write');
  end if;
  return reporter.organization_id;
end
$$;
revoke all on function private.usage_reporter(jsonb) from public;
comment on function private.usage_reporter(jsonb) is
  'Whose usage a request reports: the organization of its API key, which has to have the scope usage.write, or the one that the platform names.';

create function private.lock_usage_counters(organizations uuid[], meters text[]) returns void
language plpgsql set search_path = ''
as $$
begin
  perform
  from public.usage_logs as log
  where (log.organization_id, log.feature_key) in (
      select wanted.organization_id, wanted.meter from unnest(organizations, meters) as wanted (organization_id, meter)
    )
  order by log.organization_id, log.feature_key, log.period_start
  for no key update;
end
$$;
revoke all on function private.lock_usage_counters(uuid[], text[]) from public;
comment on function private.lock_usage_counters(uuid[], text[]) is
  'Locks every counter of some meters in the order that all keep, before some of them are changed in another.';

create function private.give_back_usage(holds private.usage_holds[], at timestamptz) returns void
language plpgsql set search_path = ''
as $$
declare
  part record;
begin
  perform private.lock_usage_counters(array_agg(held.organization_id), array_agg(held.meter_key)) from unnest(holds) as held;
  for part in
    select held.organization_id, held.meter_key, sum(held.counted)::bigint as counted
    from unnest(holds) as held
    group by held.organization_id, held.meter_key
    order by held.organization_id, held.meter_key
  loop
    perform private.release_usage(part.organization_id, part.meter_key, part.counted, at);
  end loop;
end
$$;
revoke all on function private.give_back_usage(private.usage_holds[], timestamptz) from public;
comment on function private.give_back_usage(private.usage_holds[], timestamptz) is
  'Gives back the units of holds whose rows the caller has taken out: whoever takes a row out is the one who gives it back.';

create function private.settle_usage_holds(organization_id uuid, sources text[], keys text[], meters text[], at timestamptz) returns void
language plpgsql set search_path = ''
as $$
declare
  settled private.usage_holds[];
begin
  if not exists (select from private.usage_holds as held where held.organization_id = settle_usage_holds.organization_id) then
    return;
  end if;
  with gone as (
    delete from private.usage_holds as held
    using unnest(sources, keys, meters) as event (source, key, meter)
    where held.organization_id = settle_usage_holds.organization_id
      and held.source = event.source and held.key = event.key and held.meter_key = event.meter
    returning held.*
  )
  select array_agg(gone::private.usage_holds) into settled from gone;
  if settled is null then
    return;
  end if;
  -- With those of the other events of the batch, which are counted next.
  perform private.lock_usage_counters(array_agg(settle_usage_holds.organization_id), array_agg(event.meter))
  from (select distinct given.meter from unnest(meters) as given (meter)) as event;
  perform private.give_back_usage(settled, at);
end
$$;
revoke all on function private.settle_usage_holds(uuid, text[], text[], text[], timestamptz) from public;
comment on function private.settle_usage_holds(uuid, text[], text[], text[], timestamptz) is
  'Lets go of what was held for events that are counted in the same transaction: whoever asks what is left sees the one or the other.';

create function private.hold_usage(request jsonb, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  owner constant uuid := private.usage_reporter(request);
  said_source constant text := case when jsonb_typeof(request -> 'source') = 'string' then request ->> 'source' end;
  said_id constant text := case when jsonb_typeof(request -> 'id') = 'string' then request ->> 'id' end;
  said_type constant text := case when jsonb_typeof(request -> 'type') = 'string' then request ->> 'type' end;
  units constant bigint := case
    when jsonb_typeof(request -> 'quantity') = 'number' and request ->> 'quantity' ~ '^[0-9]{1,15}$' then (request ->> 'quantity')::bigint
  end;
  seconds constant integer := case
    when coalesce(jsonb_typeof(request -> 'seconds'), 'null') = 'null' then 600
    when jsonb_typeof(request -> 'seconds') = 'number' and request ->> 'seconds' ~ '^[0-9]{1,5}$' then (request ->> 'seconds')::integer
  end;
  meter public.meters;
  wanted bigint;
  held private.usage_holds;
begin
  if coalesce(said_source, '') = '' or length(said_source) > 255 then
    perform private.raise_error(422, 'invalid_source', 'source must be a text of 1 to 255 characters', 'source');
  end if;
  if said_source in ('call', 'call_rate') then
    perform private.raise_error(422, 'reserved_source', 'The sources "call" and "call_rate" belong to the platform', 'source');
  end if;
  if coalesce(said_id, '') = '' or length(said_id) > 255 then
    perform private.raise_error(422, 'invalid_id', 'id must be a text of 1 to 255 characters', 'id');
  end if;
  select known.* into meter from public.meters as known where known.key = said_type and known.is_active;
  if meter.key is null then
    perform private.raise_error(422, 'unknown_type', 'type is not the key of an active meter', 'type');
  end if;
  if meter.is_reserved or meter.aggregation not in ('sum', 'count') then
    perform private.raise_error(422, 'reserved_type', 'Units are held of meters whose events add up, and the platform holds its own itself', 'type');
  end if;
  if coalesce(units, 0) = 0 then
    perform private.raise_error(422, 'invalid_quantity', 'quantity must be a whole number from 1 to 999999999999999', 'quantity');
  end if;
  if seconds is null or seconds not between 1 and 86400 then
    perform private.raise_error(422, 'invalid_seconds', 'seconds must be a whole number from 1 to 86400, or be left out', 'seconds');
  end if;
  wanted := case meter.rounding when 'event' then private.whole_pulses(units, meter.pulse) else units end;

  -- The row is the lock of its key. One that is over is as good as gone, whoever has not swept it up yet.
  for try in 1..3 loop
    insert into private.usage_holds as own (organization_id, source, key, meter_key, quantity, counted, held_at, expires_at)
    values (owner, said_source, said_id, meter.key, units, wanted, at, at + make_interval(secs => seconds))
    on conflict on constraint usage_holds_pkey do nothing
    returning own.* into held;
    exit when held.key is not null;
    select known.*
    into held
    from private.usage_holds as known
    where known.organization_id = owner and known.source = said_source and known.key = said_id
    for update;
    continue when held.key is null;
    if held.expires_at > at then
      if (held.meter_key, held.quantity) <> (meter.key, units) then
        perform private.raise_error(409, 'idempotency_conflict', 'Other units are held under this source and id', 'id');
      end if;
      return jsonb_build_object('status', 'held', 'expires_at', held.expires_at);
    end if;
    perform private.drop_usage_hold(held, at);
    held := null;
  end loop;
  if held.key is null then
    raise exception 'a hold came and went' using errcode = '40001';
  end if;

  if not private.reserve_usage(owner, meter.key, wanted, at) then
    -- What is over and still counts as held makes room first.
    if private.give_back_due_usage(owner, meter.key, 500, at) = 0 or not private.reserve_usage(owner, meter.key, wanted, at) then
      perform private.raise_error(402, 'quota_exhausted', 'The plan leaves no room for so many units', 'quantity');
    end if;
  end if;
  if exists (
    select
    from private.usage_keys as known
    where known.organization_id = owner and known.source = said_source and known.key = said_id
  ) then
    perform private.raise_error(409, 'already_counted', 'The event of this source and id is counted: there is nothing to hold for it', 'id');
  end if;
  return jsonb_build_object('status', 'held', 'expires_at', held.expires_at);
end
$$;
revoke all on function private.hold_usage(jsonb, timestamptz) from public;
grant execute on function private.hold_usage(jsonb, timestamptz) to service_role;
comment on function private.hold_usage(jsonb, timestamptz) is
  'Holds units for an event to come, for as long as it says. Errors: 402 quota_exhausted, 409 idempotency_conflict and already_counted, 422.';

create function private.drop_usage_hold(hold private.usage_holds, at timestamptz) returns void
language plpgsql set search_path = ''
as $$
begin
  delete from private.usage_holds as held
  where held.organization_id = hold.organization_id and held.source = hold.source and held.key = hold.key;
  if found then
    perform private.give_back_usage(array[hold], at);
  end if;
end
$$;
revoke all on function private.drop_usage_hold(private.usage_holds, timestamptz) from public;
comment on function private.drop_usage_hold(private.usage_holds, timestamptz) is 'Takes one hold out, whose row the caller has locked, and gives its units back.';

create function private.give_back_due_usage(organization_id uuid, meter text, batch integer, at timestamptz) returns integer
language plpgsql set search_path = ''
as $$
declare
  gone private.usage_holds[];
begin
  -- Whoever has one locked is settling it or giving it back.
  with due as (
    select held.organization_id, held.source, held.key
    from private.usage_holds as held
    where held.expires_at <= at
      and (held.organization_id = give_back_due_usage.organization_id or give_back_due_usage.organization_id is null)
      and (held.meter_key = meter or meter is null)
    order by held.expires_at
    limit batch
    for update skip locked
  ),
  taken as (
    delete from private.usage_holds as held
    using due
    where held.organization_id = due.organization_id and held.source = due.source and held.key = due.key
    returning held.*
  )
  select array_agg(taken::private.usage_holds) into gone from taken;
  if gone is not null then
    perform private.give_back_usage(gone, at);
  end if;
  return coalesce(cardinality(gone), 0);
end
$$;
revoke all on function private.give_back_due_usage(uuid, text, integer, timestamptz) from public;
comment on function private.give_back_due_usage(uuid, text, integer, timestamptz) is
  'Gives back what was held and never used, of one organization and meter or of all, so many at once, and says how many it was.';

create function private.expire_usage_holds(request jsonb, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  batch constant integer := least(greatest(coalesce((request ->> 'limit')::integer, 500), 1), 2000);
  expired constant integer := private.give_back_due_usage(null, null, batch, at);
begin
  return jsonb_build_object('expired', expired, 'more', expired = batch);
end
$$;
revoke all on function private.expire_usage_holds(jsonb, timestamptz) from public;
grant execute on function private.expire_usage_holds(jsonb, timestamptz) to service_role;
comment on function private.expire_usage_holds(jsonb, timestamptz) is 'Gives back what was held for longer than was said, of all organizations.';

create function private.release_usage_hold(request jsonb, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  owner constant uuid := private.usage_reporter(request);
  held private.usage_holds;
begin
  select known.*
  into held
  from private.usage_holds as known
  where known.organization_id = owner and known.source = request ->> 'source' and known.key = request ->> 'id'
  for update;
  if held.key is not null then
    perform private.drop_usage_hold(held, at);
  end if;
  return jsonb_build_object('released', held.key is not null);
end
$$;
revoke all on function private.release_usage_hold(jsonb, timestamptz) from public;
grant execute on function private.release_usage_hold(jsonb, timestamptz) to service_role;
comment on function private.release_usage_hold(jsonb, timestamptz) is
  'Gives back what is held under a source and id, and says whether anything was: not after its event, not twice, and not after its time.';

create function private.check_usage_holds(organization_id uuid default null) returns table (organization uuid, problem text)
language sql stable security definer set search_path = ''
as $$
  with held as (
    select own.organization_id, own.meter_key, sum(own.counted) as units
    from private.usage_holds as own
    where own.organization_id = $1 or $1 is null
    group by own.organization_id, own.meter_key
  ),
  counted as (
    select log.organization_id, log.feature_key as meter_key, sum(log.reserved) as units
    from public.usage_logs as log
    join public.meters as meter on meter.key = log.feature_key and not meter.is_reserved
    where log.organization_id = $1 or $1 is null
    group by log.organization_id, log.feature_key
  )
  select
    coalesce(held.organization_id, counted.organization_id),
    format('%s of %s held, %s counted', coalesce(held.units, 0), coalesce(held.meter_key, counted.meter_key), coalesce(counted.units, 0))
  from held
  full join counted on counted.organization_id = held.organization_id and counted.meter_key = held.meter_key
  where coalesce(held.units, 0) <> coalesce(counted.units, 0)
$$;
revoke all on function private.check_usage_holds(uuid) from public;
comment on function private.check_usage_holds(uuid) is
  'Compares what is held for events with the counters and returns what disagrees: nothing, ever. For one organization or all.';

create function public.hold_usage(jsonb) returns jsonb
language sql set search_path = ''
as $$
  select private.hold_usage($1, private.clock_now())
$$;
comment on function public.hold_usage(jsonb) is
  'For usage-metering. {"v":1,"api_key":{"prefix","sha256"} or "organization_id","source","id","type","quantity","seconds"?} gives '
  '{"status":"held","expires_at"}.';

create function public.release_usage_hold(jsonb) returns jsonb
language sql set search_path = ''
as $$
  select private.release_usage_hold($1, private.clock_now())
$$;
comment on function public.release_usage_hold(jsonb) is
  'For usage-metering. {"v":1,"api_key":{"prefix","sha256"} or "organization_id","source","id"} gives {"released":bool}.';

create function public.expire_usage_holds(jsonb) returns jsonb
language sql set search_path = ''
as $$
  select private.expire_usage_holds($1, private.clock_now())
$$;
comment on function public.expire_usage_holds(jsonb) is 'For usage-metering, by schedule. {"v":1,"limit":500} gives {"expired":n,"more":bool}.';

revoke all on function public.hold_usage(jsonb), public.release_usage_hold(jsonb), public.expire_usage_holds(jsonb)
from public, anon, authenticated;
grant execute on function public.hold_usage(jsonb), public.release_usage_hold(jsonb), public.expire_usage_holds(jsonb) to service_role;
