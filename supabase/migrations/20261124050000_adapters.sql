-- A call under way is hung up by whoever may control calls.

set local lock_timeout = '5s';
set local statement_timeout = '60s';

create function private.hang_up_call(call_id uuid, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('call.control');
  attempt      public.call_logs;
begin
  -- A leg by its own id, or by that of the store's call.
  select log.* into attempt
  from public.call_logs as log
  where log.organization_id = organization
    and log.id = coalesce(
      (select call.call_log_id from public.calls as call where call.organization_id = organization and call.id = hang_up_call.call_id),
      hang_up_call.call_id
    );
  if attempt.id is null then
    perform private.raise_error(404, 'call_not_found', 'There is no such call', 'call_id');
  end if;
  if attempt.status not in ('submitting', 'submission_unknown', 'queued', 'initiated', 'ringing', 'in_progress') or attempt.call_sid is null then
    perform private.raise_error(
      409, 'invalid_transition', format('A call that is %s cannot be hung up', replace(attempt.status::text, '_', ' ')), 'status'
    );
  end if;
  perform private.audit(organization, 'call.hung_up', 'call_log', attempt.id, '{}', at);
  return jsonb_build_object('attempt_id', attempt.id, 'status', attempt.status);
end
$$;
comment on function private.hang_up_call(uuid, timestamptz) is
  'Whether a call may be hung up by the request''s user, who is put on record. The carrier is told by the handler; how the call ended, it tells itself.';

create function public.hang_up_call(call_id uuid) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.hang_up_call(call_id, private.clock_now())
$$;
comment on function public.hang_up_call(uuid) is
  'Allows a call under way to be hung up, by its leg''s id or the store''s call''s; 409 when the carrier has not told of it or it is over. Needs call.control.';

create function private.open_hangup(request jsonb) returns jsonb
language sql stable security definer set search_path = '' as $$
  select jsonb_build_object(
    'provider_call_id', log.call_sid,
    'provider', account.provider,
    'carrier_account_id', account.id,
    'account_sid', account.account_sid,
    'credentials_sealed', account.credentials_sealed,
    'api_base', account.api_base
  )
  from public.call_logs as log
  join public.carrier_accounts as account on account.id = log.carrier_account_id
  where log.id = (request ->> 'attempt_id')::uuid and log.call_sid is not null
$$;
comment on function private.open_hangup(jsonb) is 'What it takes to tell the carrier that a call is to end; the account''s secrets stay sealed.';

create function public.open_hangup(jsonb) returns jsonb
language sql stable security invoker set search_path = '' as $$
  select private.open_hangup($1)
$$;
comment on function public.open_hangup(jsonb) is
  '{"v":1,"attempt_id":uuid} -> {"provider_call_id","provider","carrier_account_id","account_sid","credentials_sealed","api_base"}, or null.';

revoke execute on function public.hang_up_call(uuid), public.open_hangup(jsonb) from public, anon, authenticated, service_role;
grant execute on function private.open_hangup(jsonb), public.open_hangup(jsonb) to service_role;
grant execute on function private.hang_up_call(uuid, timestamptz), public.hang_up_call(uuid) to authenticated;
