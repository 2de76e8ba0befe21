-- Whom a campaign is about, and whom one of its calls may be handed on to.


-- Lead filters --------------------------------------------------------------------------------------------------------------------

alter table public.campaigns add column lead_filter jsonb not null default '{}';
alter table public.campaigns add constraint campaigns_lead_filter_object check (jsonb_typeof(lead_filter) = 'object');
comment on column public.campaigns.lead_filter is
  'Which leads of its project it is about, as create_campaign() was told; empty is all of them. Checked by private.check_lead_filter().';

create function private.check_lead_filter(filter jsonb) returns jsonb
language plpgsql stable security definer set search_path = '' as $$
declare
  most constant integer := 5000;
  part record;
begin
  filter := coalesce(nullif(filter, 'null'), '{}');
  if jsonb_typeof(filter) <> 'object' then
    perform private.raise_error(422, 'invalid_setting', 'leads is an object', 'leads');
  end if;
  for part in select item.key, item.value from jsonb_each(filter) as item
  loop
    -- What is not understood must not mean everybody.
    if part.key <> all (array['lead_ids', 'stage_ids', 'assigned_to', 'statuses', 'sources', 'min_score', 'never_called']) then
      perform private.raise_error(422, 'invalid_setting', format('leads has no %s', left(part.key, 50)), 'leads');
    elsif part.key = 'min_score' then
      if jsonb_typeof(part.value) <> 'number' or (part.value)::numeric not between -2147483648 and 2147483647 then
        perform private.raise_error(422, 'invalid_setting', 'min_score is a number', 'leads');
      end if;
    elsif part.key = 'never_called' then
      if jsonb_typeof(part.value) <> 'boolean' then
        perform private.raise_error(422, 'invalid_setting', 'never_called is true or false', 'leads');
      end if;
    elsif jsonb_typeof(part.value) <> 'array' or jsonb_array_length(part.value) not between 1 and most
      or jsonb_path_exists(part.value, '$[*] ? (@.type() != "string")')
    then
      perform private.raise_error(422, 'invalid_setting', format('%s is a list of 1 to %s strings', part.key, most), 'leads');
    elsif part.key in ('lead_ids', 'stage_ids', 'assigned_to') and exists (
      select
      from jsonb_array_elements_text(part.value) as element (id)
      where element.id !~* '^[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}$'
    ) then
      perform private.raise_error(422, 'invalid_setting', format('%s are ids', part.key), 'leads');
    end if;
  end loop;
  return filter;
end
$$;
comment on function private.check_lead_filter(jsonb) is
  'A filter of leads: {"lead_ids","stage_ids","assigned_to","statuses","sources": lists,"min_score","never_called"}, all of which hold at once; '
  'anything else in it is 422.';


-- Transfers -----------------------------------------------------------------------------------------------------------------------

create function private.check_transfer(call_id uuid, phone_number text, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('call.control');
  attempt      public.call_logs;
  obstacle     text;
  reason       text;
begin
  select log.* into attempt from public.call_logs as log where log.organization_id = organization and log.id = check_transfer.call_id;
  if attempt.id is null then
    perform private.raise_error(404, 'call_not_found', 'There is no such call', 'call_id');
  end if;
  if attempt.status = 'ended' then
    perform private.raise_error(409, 'invalid_transition', 'A call that is over goes to nobody', 'call_id');
  end if;
  obstacle := private.dispatch_obstacle(organization, at);
  reason := case
    when private.transfer_number(phone_number) is null then 'destination_blocked'
    else coalesce(
      private.transfer_refusal(organization, phone_number, at),
      case when obstacle in ('platform_disabled', 'dialling_disabled') then obstacle end
    )
  end;
  perform private.audit(
    organization, 'call.transfer_checked', 'call_log', attempt.id,
    jsonb_strip_nulls(jsonb_build_object('allowed', reason is null, 'reason', reason)), at
  );
  return jsonb_build_object('call_id', attempt.id, 'allowed', reason is null, 'reason', reason);
end
$$;
comment on function private.check_transfer(uuid, text, timestamptz) is
  'Whether a call under way may be handed on to a number: what may be dialled may be transferred to, and nothing else. Put on record without the number.';

create function public.check_transfer(call_id uuid, phone_number text) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.check_transfer(call_id, phone_number, private.clock_now())
$$;
comment on function public.check_transfer(uuid, text) is
  'Asked before a call is transferred: {"call_id","allowed","reason"}, where the reason is destination_blocked, price_ceiling, spend_ceiling or a '
  'switch; 409 when the call is over. Needs call.control.';


-- Who may call what ---------------------------------------------------------------------------------------------------------------

revoke execute on function private.check_lead_filter(jsonb), private.check_transfer(uuid, text, timestamptz)
from public, anon, authenticated, service_role;
revoke execute on function public.check_transfer(uuid, text) from public, anon, authenticated, service_role;
grant execute on function private.check_transfer(uuid, text, timestamptz), public.check_transfer(uuid, text) to authenticated;
