-- What a comparison with both seed systems, line by line, found missing: a tier that follows the plan, limits that are kept, units of a
-- development, legal hours that say how well they are known, and privileged changes that left no line.

set local lock_timeout = '5s';
set local statement_timeout = '60s';


-- Tier ----------------------------------------------------------------------------------------------------------------------------

alter table public.subscription_plans add column tier public.org_tier;
comment on column public.subscription_plans.tier is 'What organizations.tier becomes on this plan; null leaves it as it is.';
comment on column public.organizations.tier is 'Of the plan that it is subscribed to; follows the subscription by itself.';

create function private.fill_tier() returns trigger
language plpgsql set search_path = '' as $$
begin
  if new.slug = any (enum_range(null::public.org_tier)::text[]) then
    new.tier := new.slug::public.org_tier;
  end if;
  return new;
end
$$;
comment on function private.fill_tier() is 'Trigger: a plan that is called like a tier is of that tier, unless told otherwise.';
revoke execute on function private.fill_tier() from public;
create trigger fill_tier before insert on public.subscription_plans
  for each row when (new.tier is null) execute function private.fill_tier();

-- What was there is filled in without being touched.
alter table public.subscription_plans disable trigger update_modified_column;
alter table public.organizations disable trigger update_modified_column;
update public.subscription_plans as plan
set tier = plan.slug::public.org_tier
where plan.slug = any (enum_range(null::public.org_tier)::text[]);

create function private.follow_tier() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  -- Without a live subscription an organization is on none of the plans that cost.
  update public.organizations as organization
  set tier = coalesce(live.tier, 'free')
  from (
    select
      tenant.id, subscription.id is not null as is_subscribed, plan.tier
    from public.organizations as tenant
    left join public.subscriptions as subscription
      on subscription.organization_id = tenant.id and subscription.status not in ('cancelled', 'inactive')
    left join public.subscription_plans as plan on plan.id = subscription.plan_id
    where case tg_table_name
      when 'subscriptions' then tenant.id = (to_jsonb(new) ->> 'organization_id')::uuid
      else subscription.plan_id = (to_jsonb(new) ->> 'id')::uuid
    end
  ) as live
  where organization.id = live.id
    and (live.tier is not null or not live.is_subscribed)
    and organization.tier <> coalesce(live.tier, 'free');
  return null;
end
$$;
comment on function private.follow_tier() is 'Trigger: organizations.tier is that of the plan which is subscribed to, in the same transaction.';
revoke execute on function private.follow_tier() from public;
create trigger follow_tier_of_new after insert on public.subscriptions
  for each row execute function private.follow_tier();
create trigger follow_tier after update of plan_id, status on public.subscriptions
  for each row when (old.plan_id <> new.plan_id or old.status <> new.status) execute function private.follow_tier();
create trigger follow_tier after update of tier on public.subscription_plans
  for each row when (old.tier is distinct from new.tier) execute function private.follow_tier();

update public.organizations as organization
set tier = plan.tier
from public.subscriptions as subscription
join public.subscription_plans as plan on plan.id = subscription.plan_id
where subscription.organization_id = organization.id and subscription.status not in ('cancelled', 'inactive')
  and plan.tier is not null and organization.tier <> plan.tier;

alter table public.subscription_plans enable trigger update_modified_column;
alter table public.organizations enable trigger update_modified_column;


-- What a plan has room for --------------------------------------------------------------------------------------------------------
-- max_leads, max_projects and max_campaigns of the plan, or of subscriptions.metadata.custom_limits. A plan that names none, and -1, limit
-- nothing; what is archived takes no room. Counted behind a lock, so that two at once do not both take the last place.

create function private.plan_limit(organization uuid, feature_key text) returns bigint
language plpgsql stable security definer set search_path = '' as $$
declare
  allowed jsonb := (
    select coalesce(nullif(subscription.metadata #> array['custom_limits', feature_key], 'null'), plan.features -> feature_key)
    from public.subscriptions as subscription
    join public.subscription_plans as plan on plan.id = subscription.plan_id
    where subscription.organization_id = organization and subscription.status not in ('cancelled', 'inactive')
  );
begin
  return case when jsonb_typeof(allowed) = 'number' and allowed::numeric >= 0 then floor(allowed::numeric) end;
end
$$;
comment on function private.plan_limit(uuid, text) is 'How many of something an organization''s plan has room for; null is no limit.';

create function private.check_limit(organization uuid, counted text) returns void
language plpgsql volatile security definer set search_path = '' as $$
declare
  allowed bigint := private.plan_limit(organization, 'max_' || counted);
  used    bigint;
begin
  if allowed is null then
    return;
  end if;
  perform pg_advisory_xact_lock(hashtextextended('trunkline.plan_limit ' || organization::text, 0));
  -- One more than there may be is enough to know.
  used := case counted
    when 'leads' then (
      select count(*)
      from (
        select from public.leads as lead where lead.organization_id = organization and lead.archived_at is null limit allowed + 1
      ) as some_of_them
    )
    when 'projects' then (
      select count(*)
      from (
        select from public.projects as project where project.organization_id = organization and project.status <> 'archived' limit allowed + 1
      ) as some_of_them
    )
    when 'campaigns' then (
      select count(*)
      from (
        select
        from public.campaigns as campaign
        where campaign.organization_id = organization and campaign.status <> 'archived'
        limit allowed + 1
      ) as some_of_them
    )
  end;
  if used > allowed then
    perform private.raise_error(402, 'quota_exhausted', format('The plan has room for %s %s', allowed, counted));
  end if;
end
$$;
comment on function private.check_limit(uuid, text) is
  'Ends the request with 402 when an organization has more leads, projects or campaigns than its plan has room for.';

create function private.enforce_limit() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  tenant uuid;
begin
  if tg_level = 'ROW' then
    perform private.check_limit(new.organization_id, tg_table_name);
    return null;
  end if;
  for tenant in select distinct added.organization_id from added order by added.organization_id loop
    perform private.check_limit(tenant, tg_table_name);
  end loop;
  return null;
end
$$;
comment on function private.enforce_limit() is 'Trigger: what is added, or taken out of the archive, fits into the plan.';
revoke execute on function private.plan_limit(uuid, text), private.check_limit(uuid, text), private.enforce_limit() from public;

create trigger enforce_limit after insert on public.leads
  referencing new table as added for each statement execute function private.enforce_limit();
create trigger enforce_limit_again after update of archived_at on public.leads
  for each row when (old.archived_at is not null and new.archived_at is null) execute function private.enforce_limit();
create trigger enforce_limit after insert on public.projects
  referencing new table as added for each statement execute function private.enforce_limit();
create trigger enforce_limit_again after update of status on public.projects
  for each row when (old.status = 'archived' and new.status <> 'archived') execute function private.enforce_limit();
create trigger enforce_limit after insert on public.campaigns
  referencing new table as added for each statement execute function private.enforce_limit();
create trigger enforce_limit_again after update of status on public.campaigns
  for each row when (old.status = 'archived' and new.status <> 'archived') execute function private.enforce_limit();


-- Units ---------------------------------------------------------------------------------------------------------------------------

alter table public.properties
  add column tower text check (length(btrim(tower)) between 1 and 100),
  add column floor_number smallint,
  add column unit_number text check (length(btrim(unit_number)) between 1 and 50);
-- The columns were made above: no row is in the index yet.
-- squawk-ignore require-concurrent-index-creation
create unique index idx_properties_unit on public.properties (organization_id, project_id, tower, unit_number) nulls not distinct
  where unit_number is not null and archived_at is null;
grant insert (tower, floor_number, unit_number), update (tower, floor_number, unit_number) on public.properties to authenticated;
comment on column public.properties.tower is 'The building of the project that it is in, where there are several.';
comment on column public.properties.unit_number is 'What the door says; once a project and tower, of those that are not archived.';


-- Calling hours by law ------------------------------------------------------------------------------------------------------------

alter table public.calling_hours add column evidence text;
insert into public.calling_hours (jurisdiction, purpose, weekday, opens, closes, on_holidays, daily_calls, basis, evidence)
select
  law.jurisdiction, purpose.name, day.number,
  case when day.number = 7 then law.sunday_opens when day.number = 6 then law.saturday_opens else law.opens end::time,
  case when day.number = 7 then law.sunday_closes when day.number = 6 then law.saturday_closes else law.closes end::time,
  law.on_holidays, law.daily_calls, law.basis,
  case law.evidence when 'no' then 'not verified; stricter default' else law.evidence end
from (
  values
    ('US', 'service promotional', '08:00', '21:00', '08:00', '21:00', '08:00', '21:00', true, null::smallint, '47 CFR 64.1200(c)(1)', 'rule'),
    ('US-AL', 'service promotional', '08:00', '20:00', '08:00', '20:00', null, null, false, null, 'Alabama; section not known', 'secondary'),
    ('US-CT', 'service promotional', '09:00', '20:00', '09:00', '20:00', '09:00', '20:00', true, null, 'Conn. Gen. Stat. 42-288a', 'secondary'),
    ('US-FL', 'service promotional', '08:00', '20:00', '08:00', '20:00', '08:00', '20:00', true, 3, 'Fla. Stat. 501.616(6)', 'rule'),
    ('US-KY', 'service promotional', '10:00', '21:00', '10:00', '21:00', '10:00', '21:00', true, null, 'KRS 367.46955', 'secondary'),
    ('US-LA', 'service promotional', '08:00', '20:00', '08:00', '20:00', null, null, false, null, 'LPSC General Order R-29617', 'secondary'),
    ('US-MA', 'service promotional', '08:00', '20:00', '08:00', '20:00', '08:00', '20:00', true, null, 'M.G.L. c. 159C', 'secondary'),
    ('US-MD', 'service promotional', '08:00', '20:00', '08:00', '20:00', '08:00', '20:00', true, 3, 'Md. Com. Law 14-4502', 'secondary'),
    ('US-MI', 'service promotional', '09:00', '21:00', '09:00', '21:00', '09:00', '21:00', true, null, 'Michigan; section not known', 'secondary'),
    ('US-MN', 'service promotional', '09:00', '21:00', '09:00', '21:00', '09:00', '21:00', true, null, 'Minnesota; section not known', 'secondary'),
    -- One guide ends the day at 20:00, the statute at 21:00; the holiday rule is said to be repealed, and is still listed.
    ('US-MS', 'service promotional', '08:00', '20:00', '08:00', '20:00', null, null, false, null, 'Miss. Code 77-3-603, 77-3-723', 'no'),
    -- On Sundays and holidays it is recorded messages that are restricted; a voice that is made counts as one here.
    ('US-NE', 'service promotional', '08:00', '21:00', '08:00', '21:00', '13:00', '21:00', false, null, '291 Neb. Admin. Code 11', 'secondary'),
    ('US-NM', 'service promotional', '09:00', '21:00', '09:00', '21:00', '09:00', '21:00', true, null, 'New Mexico; section not known', 'secondary'),
    ('US-NV', 'service promotional', '09:00', '20:00', '09:00', '20:00', '09:00', '20:00', true, null, 'NRS 597.814; guides', 'secondary'),
    -- From nine on by the rule for automatic announcing devices, to eight by the newer one for automatic selection.
    ('US-OK', 'service promotional', '09:00', '20:00', '09:00', '20:00', '09:00', '20:00', true, 3, 'Okla. Stat. 15-755.1, 15-775C.4', 'secondary'),
    ('US-PA', 'service promotional', '08:00', '21:00', '08:00', '12:00', '08:00', '21:00', false, null, '73 P.S. 2245(a); Saturday by one guide', 'no'),
    ('US-RI', 'service promotional', '09:00', '18:00', '10:00', '17:00', null, null, false, null, 'R.I. Gen. Laws 5-61-2, 5-61-3.6', 'rule'),
    -- Automated dialling on weekdays alone.
    ('US-SD', 'service promotional', '09:00', '21:00', null, null, null, null, true, null, 'S.D. Codified Laws 37-30-28', 'rule'),
    ('US-TX', 'service promotional', '09:00', '21:00', '09:00', '21:00', '12:00', '21:00', true, null, 'Texas; section not known', 'no'),
    ('US-UT', 'service promotional', '08:00', '21:00', '08:00', '21:00', null, null, false, null, 'Utah Code 13-25a-103(3)', 'rule'),
    ('US-WA', 'service promotional', '08:00', '20:00', '08:00', '20:00', '08:00', '20:00', true, null, 'RCW 19.158.040(2)', 'rule'),
    ('US-WY', 'service promotional', '08:00', '20:00', '08:00', '20:00', '08:00', '20:00', true, null, 'Wyoming; section not known', 'no'),
    ('IN', 'service', '09:00', '21:00', '09:00', '21:00', '09:00', '21:00', true, null, 'TRAI TCCCPR 2010', 'secondary'),
    ('IN', 'promotional', '10:00', '21:00', '10:00', '21:00', '10:00', '21:00', true, null, 'India; common practice', 'no')
) as law (
  jurisdiction, purposes, opens, closes, saturday_opens, saturday_closes, sunday_opens, sunday_closes, on_holidays, daily_calls, basis,
  evidence
)
cross join lateral unnest(string_to_array(law.purposes, ' ')) as purpose (name)
cross join generate_series(1, 7) as day (number)
on conflict (jurisdiction, purpose, weekday) do update
set
  opens = excluded.opens, closes = excluded.closes, on_holidays = excluded.on_holidays, daily_calls = excluded.daily_calls,
  basis = excluded.basis, evidence = excluded.evidence
-- What an operator has put in place of the rows that came with the system stays.
where calling_hours.basis in (
  '47 CFR 64.1200(c)(1)', 'Ala. Code 8-19A', 'Conn. Gen. Stat. 42-288a', 'Fla. Stat. 501.616', 'La. R.S. 45:844', 'Md. Com. Law 14-4501',
  'Miss. Code 77-3-723', 'Okla. Stat. 15-775C', 'R.I. Gen. Laws 5-61-3.6', 'Tex. Bus. & Com. Code 301.051', 'RCW 80.36.390', 'TCCCPR 2018'
);
update public.calling_hours set evidence = 'operator' where evidence is null;
alter table public.calling_hours
  alter column evidence set default 'operator',
  -- A table of a few dozen rows, which only operators write.
  -- squawk-ignore adding-not-nullable-field
  alter column evidence set not null,
  -- As above: read in no time.
  -- squawk-ignore constraint-missing-not-valid
  add check (evidence in ('rule', 'secondary', 'not verified; stricter default', 'operator'));
comment on column public.calling_hours.basis is 'What law or rule it is taken from, as far as that is known.';
comment on column public.calling_hours.evidence is
  'How well it is known. rule: the text of the rule was read; secondary: guides that agree, and not the text itself; not verified: it could not be '
  'confirmed, or guides disagree, and the stricter reading is taken; operator: whoever runs this answers for it.';

alter table public.calling_holidays
  add column evidence text not null default 'operator' check (
    evidence in ('rule', 'secondary', 'not verified; stricter default', 'operator')
  );
insert into public.calling_holidays (jurisdiction, day, name, evidence)
values
  ('US', '2026-11-26', 'Thanksgiving Day', 'rule'), ('US', '2026-12-25', 'Christmas Day', 'rule'),
  ('US', '2027-01-01', 'New Year''s Day', 'rule'), ('US', '2027-01-18', 'Martin Luther King Jr. Day', 'rule'),
  ('US', '2027-02-15', 'Washington''s Birthday', 'rule'), ('US', '2027-05-31', 'Memorial Day', 'rule'),
  ('US', '2027-06-18', 'Juneteenth (observed)', 'rule'), ('US', '2027-06-19', 'Juneteenth', 'rule'),
  ('US', '2027-07-04', 'Independence Day', 'rule'), ('US', '2027-07-05', 'Independence Day (observed)', 'rule'),
  ('US', '2027-09-06', 'Labor Day', 'rule'), ('US', '2027-10-11', 'Columbus Day', 'rule'), ('US', '2027-11-11', 'Veterans Day', 'rule'),
  ('US', '2027-11-25', 'Thanksgiving Day', 'rule'), ('US', '2027-12-24', 'Christmas Day (observed)', 'rule'),
  ('US', '2027-12-25', 'Christmas Day', 'rule'), ('US', '2027-12-31', 'New Year''s Day (observed)', 'rule'),
  ('US', '2028-01-01', 'New Year''s Day', 'rule'),
  ('US-AL', '2027-02-09', 'Mardi Gras', 'not verified; stricter default'),
  ('US-AL', '2027-04-26', 'Confederate Memorial Day', 'not verified; stricter default'),
  ('US-AL', '2027-06-07', 'Jefferson Davis'' Birthday', 'not verified; stricter default'),
  ('US-LA', '2027-01-08', 'Battle of New Orleans', 'secondary'), ('US-LA', '2027-01-19', 'Robert E. Lee Day', 'secondary'),
  ('US-LA', '2027-02-09', 'Mardi Gras', 'not verified; stricter default'),
  ('US-LA', '2027-03-26', 'Good Friday', 'not verified; stricter default'),
  ('US-MS', '2027-04-26', 'Confederate Memorial Day', 'not verified; stricter default'),
  ('US-PA', '2027-03-26', 'Good Friday', 'not verified; stricter default'),
  ('US-PA', '2027-06-14', 'Flag Day', 'not verified; stricter default'),
  ('US-RI', '2027-08-09', 'Victory Day', 'secondary'),
  ('US-UT', '2027-07-23', 'Pioneer Day (observed)', 'not verified; stricter default'), ('US-UT', '2027-07-24', 'Pioneer Day', 'secondary')
on conflict (jurisdiction, day) do update set evidence = excluded.evidence where calling_holidays.name = excluded.name;
comment on table public.calling_holidays is
  'Public holidays, of a country or of a state alone; the operator adds each year''s. They matter where calling_hours says so: there nobody is '
  'called after the last one that is known of the country.';
comment on column public.calling_holidays.evidence is
  'As in calling_hours. rule is 5 U.S.C. 6103; the Friday before a Saturday and the Monday after a Sunday are taken along.';

create or replace function private.legal_hours(
  country text, region text, wanted text, day date, out opens time, out closes time, out daily_calls smallint
)
language plpgsql stable security definer set search_path = '' as $$
begin
  -- The country's and the state's hours at once; what either forbids is forbidden.
  select max(law.opens), min(law.closes), min(law.daily_calls)
  into opens, closes, daily_calls
  from public.calling_hours as law
  where law.jurisdiction in (country, country || '-' || region) and law.purpose = wanted and law.weekday = extract(isodow from day);
  if opens >= closes
    or not exists (
      select from public.calling_hours as law where law.jurisdiction = country and law.purpose = wanted
    )
    or exists (
      select
      from public.calling_hours as law
      where law.jurisdiction in (country, country || '-' || region) and law.purpose = wanted and law.weekday = extract(isodow from day)
        and (
          law.opens is null
          or not law.on_holidays and (
            exists (
              select
              from public.calling_holidays as holiday
              where holiday.jurisdiction in (country, country || '-' || region) and holiday.day = legal_hours.day
            )
            -- Of a year whose holidays nobody entered it is not known which days they are.
            or legal_hours.day > coalesce(
              (select max(holiday.day) from public.calling_holidays as holiday where holiday.jurisdiction = country), '-infinity'
            )
          )
        )
    )
  then
    opens := null;
    closes := null;
  end if;
end
$$;
comment on function private.legal_hours(text, text, text, date) is
  'The local hours in which the law of a country and state allows a call on a day; null when it does not, or when nothing is known of the country.';


-- Privileged changes --------------------------------------------------------------------------------------------------------------

create or replace function private.audit_change() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  entity  constant text := tg_argv[0];
  watched constant text[] := tg_argv[1:];
  unheard constant text[] := array['created_at', 'updated_at'];
  before  jsonb := case when tg_op <> 'INSERT' then to_jsonb(old) end;
  after   jsonb := case when tg_op <> 'DELETE' then to_jsonb(new) end;
  either  jsonb := coalesce(after, before);
  changed jsonb;
  action  text;
begin
  if tg_op = 'UPDATE' and before = after then
    return null;
  end if;
  -- A secret that changed is said to have changed, and is not shown.
  select jsonb_object_agg(
    field.name,
    case
      when field.name like '%\_sealed' or field.name like '%sha256' then to_jsonb('changed'::text)
      when tg_op = 'INSERT' then after -> field.name
      when tg_op = 'DELETE' then before -> field.name
      else jsonb_build_object('from', before -> field.name, 'to', after -> field.name)
    end
  )
  into changed
  from jsonb_object_keys(either) as field (name)
  where before -> field.name is distinct from after -> field.name
    and field.name <> all (unheard)
    and (cardinality(watched) = 0 or field.name = any (watched) or tg_op = 'INSERT');
  if changed is null and tg_op = 'UPDATE' then
    return null;
  end if;
  changed := coalesce(changed, '{}');
  if not either ? 'id' then
    -- Which row it was, where no id says so.
    changed := coalesce(
      (
        select jsonb_object_agg(attribute.attname, either -> attribute.attname)
        from pg_catalog.pg_index as index
        join pg_catalog.pg_attribute as attribute
          on attribute.attrelid = index.indrelid and attribute.attnum = any (index.indkey)
        where index.indrelid = tg_relid and index.indisprimary and attribute.attname <> 'organization_id'
      ),
      '{}'
    ) || changed;
  end if;
  action := entity || '.' || case
    when tg_op = 'INSERT' then 'created'
    when tg_op = 'DELETE' then 'deleted'
    when changed ? 'dialling_enabled' then case when (after -> 'dialling_enabled')::boolean then 'dialling_enabled' else 'dialling_disabled' end
    when changed ? 'revoked_at' then 'revoked'
    when changed ? 'accepted_at' then 'accepted'
    else 'changed'
  end;
  perform private.audit(
    case tg_table_name when 'organizations' then either ->> 'id' else either ->> 'organization_id' end::uuid,
    action, entity,
    (case when either ? 'id' then either ->> 'id' else either ->> 'plan_price_id' end)::uuid,
    changed, private.clock_now()
  );
  return null;
end
$$;
comment on function private.audit_change() is
  'Trigger: what is privileged is on record when it changes, with what it was and is. Arguments: what it is called, and the columns that '
  'count in an update and are shown of what is deleted (none: all but times).';

create trigger audit_change after insert or update or delete on public.calling_holidays
  for each row execute function private.audit_change('calling_holiday');
create trigger audit_change after insert or update or delete on public.meters
  for each row execute function private.audit_change('meter');
create trigger audit_change after insert or update or delete on public.store_phone_numbers
  for each row execute function private.audit_change('store_phone_number');
create trigger audit_change after update of domain, status or delete on public.stores
  for each row execute function private.audit_change('store', 'name', 'domain', 'platform', 'status');
create trigger audit_change after insert or update or delete on private.store_credentials
  for each row execute function private.audit_change('store_credentials');
create trigger audit_change after update of
  name, project_id, timezone, start_date, end_date, time_start, time_end, max_concurrent_calls, max_attempts, ring_timeout_seconds,
  max_call_seconds, agent_id, record_calls, auto_complete, ai_script, call_settings
on public.campaigns
  for each row execute function private.audit_change(
    'campaign', 'name', 'project_id', 'timezone', 'start_date', 'end_date', 'time_start', 'time_end', 'max_concurrent_calls',
    'max_attempts', 'ring_timeout_seconds', 'max_call_seconds', 'agent_id', 'record_calls', 'auto_complete', 'ai_script', 'call_settings'
  );
-- What is deleted is gone: the line says that it was there, and not who it was.
create trigger audit_change after delete on public.leads
  for each row execute function private.audit_change('lead', 'project_id', 'source', 'status');
create trigger audit_change after update of status on public.invoices
  for each row when (old.status <> new.status and new.status in ('void', 'uncollectible'))
  execute function private.audit_change('invoice', 'status');


-- Carrier accounts ----------------------------------------------------------------------------------------------------------------
-- An account may be the platform's, so that no foreign key can carry the tenant.

create function private.keep_account_owner() returns trigger
language plpgsql set search_path = '' as $$
begin
  raise exception 'a carrier account stays with whom it is' using errcode = 'check_violation';
end
$$;
comment on function private.keep_account_owner() is 'Trigger: numbers and legs hang on an account, which no other organization takes over.';
revoke execute on function private.keep_account_owner() from public;
create trigger keep_account_owner before update of organization_id on public.carrier_accounts
  for each row when (old.organization_id is distinct from new.organization_id) execute function private.keep_account_owner();

comment on function private.check_caller_number() is
  'Trigger: a number hangs on its organization''s own carrier account, or on the platform''s; so does a leg.';
create trigger check_carrier_account before insert or update of organization_id, carrier_account_id on public.call_logs
  for each row execute function private.check_caller_number();


-- Leaving -------------------------------------------------------------------------------------------------------------------------
-- Whoever had settings of their own, or an open dashboard, could not leave.

create or replace function private.detach_member(organization uuid, user_id uuid) returns void
language plpgsql volatile security definer set search_path = '' as $$
declare
  link record;
begin
  for link in
    select
      reference.conrelid::regclass as child, reference.confdeltype = 'c' as goes_along,
      (select attribute.attname from pg_catalog.pg_attribute as attribute
        where attribute.attrelid = reference.conrelid
          and attribute.attnum = reference.conkey[array_position(reference.confkey, tenant.attnum)]) as tenant_column,
      (select attribute.attname from pg_catalog.pg_attribute as attribute
        where attribute.attrelid = reference.conrelid
          and attribute.attnum = reference.conkey[array_position(reference.confkey, person.attnum)]) as user_column
    from pg_catalog.pg_constraint as reference
    join pg_catalog.pg_attribute as tenant on tenant.attrelid = reference.confrelid and tenant.attname = 'organization_id'
    join pg_catalog.pg_attribute as person on person.attrelid = reference.confrelid and person.attname = 'id'
    where reference.contype = 'f' and reference.confrelid = 'public.profiles'::regclass
      and reference.conparentid = 0 and cardinality(reference.conkey) = 2
    order by reference.conrelid::regclass::text
  loop
    -- What is the user's own (settings, open sockets) goes; from what they did, only the name.
    if link.goes_along then
      execute format('delete from %s where %I = $1 and %I = $2', link.child, link.tenant_column, link.user_column) using organization, user_id;
    else
      execute format('update %s set %I = null where %I = $1 and %I = $2', link.child, link.user_column, link.tenant_column, link.user_column)
      using organization, user_id;
    end if;
  end loop;
end
$$;
comment on function private.detach_member(uuid, uuid) is
  'Takes a user''s name off every row of an organization, as deleting the user would, so that they can belong to another. The audit log keeps it.';


-- Names that PostgreSQL had cut off -----------------------------------------------------------------------------------------------

-- Nobody names a policy but a migration.
-- squawk-ignore renaming-object
alter policy "Who manages members sees the invitations, and the invited their" on public.invitations rename to "Who manages members sees invitations, the invited their own";
-- Nobody names a policy but a migration.
-- squawk-ignore renaming-object
alter policy "The organization sees who acted in it, and staff their own sess" on public.impersonation_sessions rename to "The organization sees who acted in it, staff their sessions";
