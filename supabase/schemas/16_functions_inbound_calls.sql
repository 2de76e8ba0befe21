-- Calls to the numbers of stores and organizations. The carriers have one URL for all that happens to such a call, and their events come
-- in any order: whichever comes first opens the rows.


create function private.open_inbound_leg(
  source text, source_id text, call jsonb, at timestamptz,
  out leg_id uuid, out error text
)
language plpgsql volatile security definer set search_path = '' as $$
declare
  call_id constant text := call ->> 'provider_call_id';
  account public.carrier_accounts;
  number  public.store_phone_numbers;
  leg     public.call_logs;
begin
  if call_id is null then
    error := 'unknown_call';
    return;
  end if;
  select log.id into leg_id from public.call_logs as log where log.call_sid = call_id;
  if leg_id is not null then
    return;
  end if;
  select known.* into account
  from public.carrier_accounts as known
  where known.id = private.to_uuid(open_inbound_leg.source_id) and known.provider::text = open_inbound_leg.source and known.is_active;
  if account.id is null then
    error := 'unknown_account';
    return;
  end if;

  -- Whose number it is: a store's, or one that an organization calls from. It counts only on the account on which it rings.
  select known.* into number
  from public.store_phone_numbers as known
  where known.phone_number = call ->> 'to' and known.is_active
    and coalesce(known.carrier_account_id, account.id) = account.id
    and coalesce(account.organization_id, known.organization_id) = known.organization_id;
  leg.organization_id := number.organization_id;
  if leg.organization_id is null then
    select known.organization_id into leg.organization_id
    from public.caller_numbers as known
    where known.phone_number = call ->> 'to' and known.is_active and known.carrier_account_id = account.id;
    -- Who calls back is the lead of that number, where there is one and no other.
    select (array_agg(lead.id))[1], (array_agg(lead.project_id))[1] into leg.lead_id, leg.project_id
    from public.leads as lead
    where lead.organization_id = leg.organization_id and lead.phone = call ->> 'from' and lead.archived_at is null
    having count(*) = 1;
  end if;
  if leg.organization_id is null then
    error := 'unknown_number';
    return;
  end if;

  insert into public.call_logs (
    organization_id, lead_id, project_id, direction, carrier_account_id, call_sid, caller_number, callee_number, status,
    time_limit_seconds, begun_at, created_at, lease_until
  )
  values (
    leg.organization_id, leg.lead_id, leg.project_id, 'inbound', account.id, call_id, coalesce(call ->> 'from', 'anonymous'), call ->> 'to',
    'initiated', 3600, now(), at, now() + interval '2 minutes'
  )
  on conflict (call_sid) do nothing
  returning id into leg_id;
  if leg_id is null then
    -- Another event of the same call was faster.
    select log.id into leg_id from public.call_logs as log where log.call_sid = call_id;
    return;
  end if;
  if number.id is not null then
    insert into public.calls (organization_id, store_id, call_log_id, customer_id, from_phone, to_phone, direction, start_time)
    select
      number.organization_id, number.store_id, leg_id,
      -- The customer of that number, where there is one and no other.
      (
        select (array_agg(customer.id))[1]
        from public.customers as customer
        where customer.organization_id = number.organization_id and customer.store_id = number.store_id
          and customer.phone = call ->> 'from'
        having count(*) = 1
      ),
      'anonymous', number.phone_number, 'inbound', at;
  end if;
end
$$;
comment on function private.open_inbound_leg(text, text, jsonb, timestamptz) is
  'The leg of a call to one of our numbers, by the carrier''s id of it; the first event of a call makes it, and a store''s view of it.';

create function private.open_inbound_call(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' set jit = off set enable_seqscan = off as $$
declare
  applied constant jsonb := private.apply_event(request, at);
  leg     public.call_logs;
begin
  select log.* into leg
  from public.call_logs as log
  where log.call_sid = request #>> '{events,0,payload,provider_call_id}'
    and log.carrier_account_id = private.to_uuid(request ->> 'source_id')
    and log.direction = 'inbound'
    and log.status <> 'ended';
  return jsonb_strip_nulls(applied || jsonb_build_object(
    'call', case when leg.id is not null then jsonb_build_object(
      'attempt_id', leg.id, 'carrier_account_id', leg.carrier_account_id, 'agent_id', leg.agent_id, 'record', leg.record_call
    ) end
  ));
end
$$;
comment on function private.open_inbound_call(jsonb, timestamptz) is
  'Stores the event of a call to one of our numbers as apply_event() does, and tells what its answer is made of; without a call there is '
  'nobody to connect it with.';

create function public.open_inbound_call(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.open_inbound_call($1, private.clock_now())
$$;
comment on function public.open_inbound_call(jsonb) is
  'An apply_event request with one event of a call to us -> {"result","organization_id"?,"call"?:{"attempt_id","carrier_account_id","agent_id"?,"record"}}. '
  'The same call again gives the same rows.';

revoke execute on function
  private.open_inbound_leg(text, text, jsonb, timestamptz), private.open_inbound_call(jsonb, timestamptz), public.open_inbound_call(jsonb)
from public, anon, authenticated, service_role;
grant execute on function private.open_inbound_call(jsonb, timestamptz), public.open_inbound_call(jsonb) to service_role;
