-- Leads that are due, over some organizations of which the first has half. It is Tuesday, ten in the morning in Kolkata.
insert into private.clock_offset (shift) values (timestamptz '2026-11-24 10:00+05:30' - now())
on conflict (single) do update set shift = excluded.shift;

create function pg_temp.fill(organizations integer, leads integer) returns void
language plpgsql as $$
declare
  account  uuid := gen_random_uuid();
  tenant   uuid;
  project  uuid;
  campaign uuid;
  plan     uuid;
  from_one integer := 0;
  share    integer;
begin
  insert into public.subscription_plans (slug, name) values ('plenty', 'Plenty') returning id into plan;
  insert into public.plan_prices (plan_id, version) values (plan, 1);
  insert into public.carrier_accounts (id, provider, account_sid, credentials_sealed, api_base, max_concurrent_calls)
  values (account, 'plivo', 'MABENCH', 'sealed', 'https://carrier.example.com', 10000);
  for number in 1..organizations loop
    share := case number when 1 then leads / 2 else leads / 2 / (organizations - 1) end;
    insert into public.organizations (name, state_code, max_concurrent_calls) values ('Tenant ' || number, 'KA', 10000) returning id into tenant;
    perform private.subscribe_organization(tenant, 'plenty', 'active', private.clock_now());
    insert into public.caller_numbers (organization_id, carrier_account_id, phone_number)
    values (tenant, account, '+9180990000' || lpad(number::text, 2, '0'));
    insert into public.projects (organization_id, name) values (tenant, 'Project') returning id into project;
    insert into public.campaigns (organization_id, project_id, name, max_concurrent_calls, status, open_leads)
    values (tenant, project, 'Campaign', 10000, 'running', share) returning id into campaign;
    -- What is told and checked lead by lead is not what is measured.
    set local session_replication_role = replica;
    insert into public.leads (organization_id, project_id, name, phone)
    select tenant, project, 'Lead', '+917' || lpad((from_one + n)::text, 9, '0') from generate_series(1, share) as n;
    insert into public.campaign_leads (organization_id, campaign_id, lead_id, status)
    select tenant, campaign, lead.id, 'queued' from public.leads as lead where lead.organization_id = tenant;
    insert into public.call_queue (organization_id, campaign_id, lead_id, next_retry_at, max_attempts)
    select tenant, campaign, lead.id, private.clock_now() - random() * interval '1 hour', 3
    from public.leads as lead
    where lead.organization_id = tenant;
    set local session_replication_role = origin;
    from_one := from_one + share;
  end loop;
end
$$;
