-- Where a call may be transferred to, and calls that have ended while nobody has told how many seconds they had.

create table private.unsettled_calls (
  organization_id uuid not null,
  attempt_id      uuid not null,
  due_at          timestamptz not null,
  tries           smallint not null default 0 check (tries >= 0),
  primary key (organization_id, attempt_id),
  foreign key (organization_id, attempt_id) references public.call_logs (organization_id, id) on delete cascade
);
create index idx_unsettled_calls_due on private.unsettled_calls (due_at);
select private.close_table('private.unsettled_calls');
comment on table private.unsettled_calls is
  'Calls of a carrier that tells no seconds with the end, and whose answer or bill was never told: it is asked a few times while it still knows.';
comment on column private.unsettled_calls.due_at is 'Real time at which the carrier is asked.';

create function private.await_seconds(attempt public.call_logs) returns void
language sql volatile security definer set search_path = '' as $$
  insert into private.unsettled_calls as own (organization_id, attempt_id, due_at)
  values (attempt.organization_id, attempt.id, now() + interval '60 seconds')
  on conflict do nothing
$$;
comment on function private.await_seconds(public.call_logs) is 'Has the carrier asked for the seconds of a call, unless they are told within a minute.';

create function private.take_unsettled(most integer) returns setof public.call_logs
language plpgsql volatile security definer set search_path = '' as $$
begin
  -- Five times, a minute apart: what the carrier has not said by then its records of the day say.
  delete from private.unsettled_calls as own
  where own.due_at < now() and own.tries >= 5;
  return query
  with due as (
    select waiting.organization_id, waiting.attempt_id
    from private.unsettled_calls as waiting
    where waiting.due_at < now()
    order by waiting.due_at
    limit most
    for no key update skip locked
  ),
  taken as (
    update private.unsettled_calls as own
    set due_at = now() + interval '60 seconds', tries = own.tries + 1
    from due
    where own.organization_id = due.organization_id and own.attempt_id = due.attempt_id
    returning own.organization_id, own.attempt_id
  )
  select log.*
  from taken
  join public.call_logs as log on log.organization_id = taken.organization_id and log.id = taken.attempt_id
  where log.status = 'ended' and log.call_sid is not null;
end
$$;
comment on function private.take_unsettled(integer) is 'Ended calls whose seconds the carrier is to be asked for now; each is given out again a minute later, five times at most.';

create function private.transfer_number(told text) returns text
language sql immutable parallel safe set search_path = '' as $$
  select (regexp_match(
    regexp_replace(regexp_replace(regexp_replace(told, '^\s*(tel|sips?):', '', 'i'), '[@;].*$', ''), '[\s().-]', '', 'g'), '^\+?[0-9*#]{2,20}$'
  ))[1]
$$;
comment on function private.transfer_number(text) is
  'The number that a transfer''s destination is, however it is written (also as tel: or sip:); null for one that names none, as a department.';

create function private.transfer_refusal(tenant_id uuid, told text, at timestamptz) returns text
language plpgsql stable security definer set search_path = '' as $$
declare
  phone  constant text := private.transfer_number(told);
  tenant public.organizations;
begin
  if phone is null then
    return null;
  end if;
  select own.* into tenant from public.organizations as own where own.id = tenant_id;
  return case
    -- Without its country nobody knows where it leads: short codes and emergency calls are among those.
    when tenant.id is null or phone not like '+%' or not (private.destination(phone, tenant.dial_countries)).is_callable then 'destination_blocked'
    when tenant.max_price_micros is not null and coalesce(private.destination_price(phone) > tenant.max_price_micros, true) then 'price_ceiling'
    when private.spends_too_much(tenant, at) then 'spend_ceiling'
  end;
end
$$;
comment on function private.transfer_refusal(uuid, text, timestamptz) is
  'Why a call of an organization may not be transferred there, by the rules and in the words of a dial: destination_blocked, price_ceiling, spend_ceiling. '
  'Null where it may, and for a destination that is no number.';

create function private.destination_of_transfer(arguments jsonb) returns text
language sql immutable parallel safe set search_path = '' as $$
  select named.told
  from unnest(array[
    arguments ->> 'destination', arguments ->> 'phone_number', arguments ->> 'phoneNumber', arguments ->> 'transfer_to', arguments ->> 'number',
    arguments ->> 'to', arguments #>> '{destination,number}', arguments #>> '{destination,sipUri}', arguments ->> 'sip_uri'
  ]) with ordinality as named (told, place)
  where private.transfer_number(named.told) is not null
  order by named.place
  limit 1
$$;
comment on function private.destination_of_transfer(jsonb) is 'The number in what a voice agent calls its transfer with, under any of the names that agents give it.';

create function private.judge_transfer(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  destination constant text := btrim(request ->> 'to');
  attempt public.call_logs;
  refusal text;
begin
  if coalesce(destination, '') = '' or length(destination) > 200 then
    perform private.raise_error(400, 'malformed_request', 'to is the number to transfer to', 'to');
  end if;
  select log.* into attempt from public.call_logs as log where log.id = private.to_uuid(request ->> 'attempt_id') for key share;
  if attempt.id is null then
    perform private.raise_error(404, 'call_not_found', 'There is no such call', 'attempt_id');
  end if;
  if attempt.status = 'ended' then
    perform private.raise_error(409, 'call_ended', 'The call has ended', 'attempt_id');
  end if;
  -- Whoever asks means a number: what is none leads nowhere that is known.
  refusal := case
    when private.transfer_number(destination) is null then 'destination_blocked'
    else private.transfer_refusal(attempt.organization_id, destination, at)
  end;
  if refusal is not null then
    perform private.note_activity(
      attempt, 'transfer|' || destination, 'transfer', jsonb_build_object('arguments', jsonb_build_object('destination', destination), 'refused', refusal), at
    );
  end if;
  return jsonb_build_object('allowed', refusal is null, 'reason', refusal);
end
$$;
comment on function private.judge_transfer(jsonb, timestamptz) is 'Whether a call under way may be transferred to a number. A refusal is noted with its lead.';

create function public.judge_transfer(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.judge_transfer($1, private.clock_now())
$$;
comment on function public.judge_transfer(jsonb) is
  '{"v":1,"attempt_id":uuid,"to":text} -> {"allowed":bool,"reason":"destination_blocked|price_ceiling|spend_ceiling"|null}.';

revoke all on function
  private.await_seconds(public.call_logs), private.take_unsettled(integer), private.transfer_number(text),
  private.transfer_refusal(uuid, text, timestamptz), private.destination_of_transfer(jsonb), private.judge_transfer(jsonb, timestamptz),
  public.judge_transfer(jsonb)
from public, anon, authenticated, service_role;
grant execute on function private.judge_transfer(jsonb, timestamptz), public.judge_transfer(jsonb) to service_role;
