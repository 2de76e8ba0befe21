-- Realistic data, set-based, the same for the same seed: made once as pg_temp functions, then called by `cargo run -p local -- seed`.

create function pg_temp.pick(seed bigint, what text, nth bigint) returns bigint
language sql immutable as $$
  select hashtextextended(what || ':' || nth, seed) & 9223372036854775807
$$;

create function pg_temp.id(seed bigint, what text, nth bigint) returns uuid
language sql immutable as $$
  select md5(seed || ':' || what || ':' || nth)::uuid
$$;

create function pg_temp.generate(seed bigint, organizations integer, leads integer, calls integer) returns void
language plpgsql as $$
declare
  at      constant timestamptz := private.clock_now();
  tenant  uuid;
begin
  -- Nothing here was just queued for a dialler: no nudge, and no trigger that settles a call.
  perform set_config('session_replication_role', 'replica', true);

  insert into auth.users (instance_id, id, aud, role, email, email_confirmed_at, raw_app_meta_data, raw_user_meta_data, created_at, updated_at)
  select '00000000-0000-0000-0000-000000000000', pg_temp.id(seed, 'user', n), 'authenticated', 'authenticated',
    'owner' || n || '.' || seed || '@example.com', at, '{"provider": "email", "providers": ["email"]}', jsonb_build_object('full_name', 'Owner ' || n),
    at, at
  from generate_series(1, organizations) as n;

  insert into public.organizations (id, name, state_code, created_at, updated_at)
  select pg_temp.id(seed, 'organization', n),
    (array['Sunrise', 'Lotus', 'Harbour', 'Banyan', 'Crescent', 'Maple', 'Granite', 'Monsoon'])[1 + pg_temp.pick(seed, 'first', n) % 8] || ' '
      || (array['Realty', 'Homes', 'Estates', 'Motors', 'Clinics', 'Schools', 'Foods', 'Finance'])[1 + pg_temp.pick(seed, 'second', n) % 8] || ' ' || n,
    (array['KA', 'MH', 'TN', 'DL', 'TG'])[1 + pg_temp.pick(seed, 'state', n) % 5],
    at - interval '120 days', at
  from generate_series(1, organizations) as n;

  insert into public.profiles (id, organization_id, system_role, full_name, email)
  select pg_temp.id(seed, 'user', n), pg_temp.id(seed, 'organization', n), 'owner', 'Owner ' || n, 'owner' || n || '.' || seed || '@example.com'
  from generate_series(1, organizations) as n
  on conflict (id) do update set organization_id = excluded.organization_id, system_role = excluded.system_role;

  -- Also into a database of the first migration, where the sealed secret has another name.
  execute format(
    'insert into public.carrier_accounts (id, provider, account_sid, %I, api_base, max_concurrent_calls) values ($1, %L, $2, %L, %L, 1000)',
    (select attname from pg_attribute where attrelid = 'public.carrier_accounts'::regclass and attname in ('auth_token_sealed', 'credentials_sealed') and not attisdropped),
    'plivo', 'v1.1.generated', 'https://api.plivo.com'
  )
  using pg_temp.id(seed, 'account', 1), 'MA' || seed;
  insert into public.caller_numbers (organization_id, carrier_account_id, phone_number)
  select pg_temp.id(seed, 'organization', n), pg_temp.id(seed, 'account', 1), '+9180' || lpad((31000000 + n)::text, 8, '0')
  from generate_series(1, organizations) as n;

  insert into public.projects (id, organization_id, name, created_by, created_at)
  select pg_temp.id(seed, 'project', n), pg_temp.id(seed, 'organization', n), 'Project ' || n, pg_temp.id(seed, 'user', n), at - interval '110 days'
  from generate_series(1, organizations) as n;

  insert into public.leads (
    id, organization_id, project_id, name, email, phone, timezone, source, status, recording_consent, do_not_call, created_by, created_at, updated_at
  )
  select pg_temp.id(seed, 'lead', n), pg_temp.id(seed, 'organization', 1 + n % organizations), pg_temp.id(seed, 'project', 1 + n % organizations),
    (array['Asha', 'Ravi', 'Meera', 'Arjun', 'Divya', 'Karan', 'Priya', 'Vikram', 'Neha', 'Rahul'])[1 + pg_temp.pick(seed, 'given', n) % 10] || ' '
      || (array['Sharma', 'Iyer', 'Patel', 'Reddy', 'Khan', 'Das', 'Nair', 'Singh', 'Gupta', 'Rao'])[1 + pg_temp.pick(seed, 'family', n) % 10],
    'lead' || n || '@example.net',
    '+91' || (6 + pg_temp.pick(seed, 'series', n) % 4) || lpad((n % 1000000000)::text, 9, '0'), 'Asia/Kolkata',
    (array['manual', 'csv', 'website', 'referral'])[1 + pg_temp.pick(seed, 'source', n) % 4],
    (array['new', 'contacted', 'qualified', 'lost'])[1 + pg_temp.pick(seed, 'status', n) % 4],
    pg_temp.pick(seed, 'consent', n) % 3 > 0, pg_temp.pick(seed, 'dnc', n) % 50 = 0, pg_temp.id(seed, 'user', 1 + n % organizations),
    at - interval '1 second' * (pg_temp.pick(seed, 'made', n) % 8640000), at
  from generate_series(1, leads) as n;

  insert into public.campaigns (id, organization_id, project_id, name, status, open_leads, total_enrolled, started_at, completed_at, created_by, created_at)
  select pg_temp.id(seed, 'campaign', n), pg_temp.id(seed, 'organization', n), pg_temp.id(seed, 'project', n), 'Campaign ' || n,
    'completed', 0, 0, at - interval '90 days', at - interval '1 day', pg_temp.id(seed, 'user', n), at - interval '95 days'
  from generate_series(1, organizations) as n;

  insert into public.campaign_leads (id, organization_id, campaign_id, lead_id, status, attempt_count, created_at)
  select pg_temp.id(seed, 'member', n), pg_temp.id(seed, 'organization', 1 + n % organizations), pg_temp.id(seed, 'campaign', 1 + n % organizations),
    pg_temp.id(seed, 'lead', n), case when pg_temp.pick(seed, 'reached', n) % 4 > 0 then 'called' else 'failed' end::public.campaign_lead_status, 1,
    at - interval '90 days'
  from generate_series(1, leads) as n;

  insert into public.call_logs (
    id, organization_id, campaign_id, lead_id, project_id, attempt_no, carrier_account_id, call_sid, caller_number, callee_number, status, call_status,
    dialled, created_at, submitted_at, answered_at, ended_at, duration, bill_duration_seconds, carrier_cost_micros, carrier_cost_currency,
    disconnect_reason, updated_at
  )
  select made.id, pg_temp.id(seed, 'organization', 1 + made.lead % organizations), pg_temp.id(seed, 'campaign', 1 + made.lead % organizations),
    pg_temp.id(seed, 'lead', made.lead), pg_temp.id(seed, 'project', 1 + made.lead % organizations), 1, pg_temp.id(seed, 'account', 1),
    pg_temp.id(seed, 'sid', made.n)::text, '+9180' || lpad((31000001 + made.lead % organizations)::text, 8, '0'),
    '+91' || (6 + pg_temp.pick(seed, 'series', made.lead) % 4) || lpad((made.lead % 1000000000)::text, 9, '0'),
    'ended', made.outcome, true, made.began, made.began,
    case when made.talk > 0 then made.began + interval '12 seconds' end, made.began + interval '1 second' * (12 + made.talk),
    made.talk, made.talk, made.talk * 62, 'USD', made.outcome::text, made.began
  from (
    select call.n, call.lead, call.outcome, call.began,
      -- A UUIDv7 of the time of the call, so that the index grows as it does in life.
      encode(
        set_byte(set_byte(
          substring(int8send((extract(epoch from call.began) * 1000)::bigint) from 3) || substring(uuid_send(pg_temp.id(seed, 'call', call.n)) from 7),
          6, (get_byte(uuid_send(pg_temp.id(seed, 'call', call.n)), 6) & 15) | 112),
          8, (get_byte(uuid_send(pg_temp.id(seed, 'call', call.n)), 8) & 63) | 128),
        'hex')::uuid as id,
      case when call.outcome in ('answered', 'machine') then 8 + (pg_temp.pick(seed, 'talk', call.n) % 240)::integer else 0 end as talk
    from (
      select n, 1 + pg_temp.pick(seed, 'whom', n) % leads as lead,
        (array['answered', 'answered', 'answered', 'answered', 'answered', 'no_answer', 'no_answer', 'busy', 'machine', 'rejected'])
          [1 + pg_temp.pick(seed, 'outcome', n) % 10]::public.call_outcome as outcome,
        at - interval '90 days' + interval '90 days' * (n::double precision / calls) as began
      from generate_series(1, calls) as n
    ) as call
  ) as made;

  perform set_config('session_replication_role', 'origin', true);
  for tenant in select pg_temp.id(seed, 'organization', n) from generate_series(1, organizations) as n loop
    perform private.subscribe_organization(tenant, 'free', 'trialing', at);
  end loop;
end
$$;
