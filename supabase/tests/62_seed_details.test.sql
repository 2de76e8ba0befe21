-- Fields that follow, limits that are kept, hours that say how well they are known, and privileged changes that leave a line.
begin;
set local search_path = public, extensions, tap;
select plan(62);

create function pg_temp.person(number integer) returns uuid
language sql immutable as $$ select ('00000000-0000-4000-8000-0000000e' || lpad((9000 + number)::text, 4, '0'))::uuid $$;
create function pg_temp.as_user(number integer, query text) returns text
language plpgsql as $$
declare
  before text := current_setting('role');
  answer text;
begin
  perform set_config('request.jwt.claims', jsonb_build_object('sub', pg_temp.person(number), 'role', 'authenticated')::text, true);
  perform set_config('role', 'authenticated', true);
  begin
    execute query into answer;
  exception
    when sqlstate 'PGRST' then answer := (sqlerrm::jsonb ->> 'code') || ' ' || (pg_catalog.current_setting('role'));
    when others then answer := sqlstate;
  end;
  perform set_config('role', before, true);
  perform set_config('request.jwt.claims', '', true);
  return split_part(answer, ' authenticated', 1);
end
$$;
create function pg_temp.org() returns uuid
language sql as $$ select organization_id from public.profiles where id = pg_temp.person(1) $$;
insert into auth.users (id, email) select pg_temp.person(n), format('details%s@example.com', n) from generate_series(1, 2) as n;
insert into public.subscription_plans (slug, name) values ('free', 'Free') on conflict (slug) do nothing;
select pg_temp.as_user(1, $$select public.create_organization('Details')$$);

-- The tier is the plan's.
create function pg_temp.tier() returns text
language sql as $$ select tier::text from public.organizations where id = pg_temp.org() $$;
create function pg_temp.buy(plan text) returns void
language sql as $$
  update public.subscriptions set plan_id = (select id from public.subscription_plans where slug = plan)
  where organization_id = pg_temp.org() and status not in ('cancelled', 'inactive')
$$;
insert into public.subscription_plans (slug, name, tier)
values ('details-big', 'Big', 'enterprise'), ('details-odd', 'Odd', null);
insert into public.subscription_plans (slug, name) values ('starter', 'Starter') on conflict do nothing;
select is((select tier::text from public.subscription_plans where slug = 'starter'), 'starter', 'A plan called like a tier is of it');
select is((select tier from public.subscription_plans where slug = 'details-odd'), null, 'and another one of none');
select is(pg_temp.tier(), 'free', 'Who begins is on Free');
select pg_temp.buy('details-big');
select is(pg_temp.tier(), 'enterprise', 'The tier follows the subscription');
select pg_temp.buy('details-odd');
select is(pg_temp.tier(), 'enterprise', 'and stays where a plan says nothing of it');
update public.subscription_plans set tier = 'pro' where slug = 'details-odd';
select is(pg_temp.tier(), 'pro', 'A plan that is given a tier gives it to its subscribers');
update public.subscriptions set status = 'past_due' where organization_id = pg_temp.org();
select is(pg_temp.tier(), 'pro', 'Who is late has not lost it');
update public.subscriptions set status = 'cancelled', next_invoice_at = null where organization_id = pg_temp.org();
select is(pg_temp.tier(), 'free', 'Who cancelled has');
update public.subscriptions set status = 'active' where organization_id = pg_temp.org();
select is(pg_temp.tier(), 'pro', 'and whoever comes back has it again');
select is(pg_temp.as_user(1, $$update public.organizations set tier = 'enterprise' returning 'made'$$), '42501', 'Nobody gives it to themselves');

-- Limits.
update public.subscription_plans set features = '{"max_leads": 3, "max_projects": 1, "max_campaigns": 2}' where slug = 'details-odd';
select is(pg_temp.as_user(1, $$insert into public.leads (name) values ('a'), ('b'), ('c') returning 'made'$$), 'made', 'Three leads fit into a plan of three');
select is(pg_temp.as_user(1, $$insert into public.leads (name) values ('d') returning 'made'$$), 'quota_exhausted', 'a fourth does not');
select is((select count(*) from public.leads where organization_id = pg_temp.org()), 3::bigint, 'nor do four at once leave three behind');
select throws_ok(format($$insert into public.leads (organization_id, name) values (%L, 'e')$$, pg_temp.org()), 'PGRST', null, 'whoever adds it');
select is(pg_temp.as_user(1, $$update public.leads set archived_at = now() where name = 'a' returning 'made'$$), 'made', 'What is archived');
select is(pg_temp.as_user(1, $$insert into public.leads (name) values ('d') returning 'made'$$), 'made', 'makes room');
select is(pg_temp.as_user(1, $$update public.leads set archived_at = null where name = 'a' returning 'made'$$), 'quota_exhausted', 'and comes back only where there is some');
select is(pg_temp.as_user(1, $$insert into public.projects (name) values ('p') returning 'made'$$), 'made', 'One project');
select is(pg_temp.as_user(1, $$insert into public.projects (name) values ('q') returning 'made'$$), 'quota_exhausted', 'is one');
select is(pg_temp.as_user(1, $$update public.projects set status = 'archived' where name = 'p' returning 'made'$$), 'made', 'until it is put away');
select is(pg_temp.as_user(1, $$insert into public.projects (name) values ('q') returning 'made'$$), 'made', 'then there is another');
select is(pg_temp.as_user(1, $$update public.projects set status = 'active' where name = 'p' returning 'made'$$), 'quota_exhausted', 'and not both');
select isnt(pg_temp.as_user(1, $$select public.create_campaign('one') ->> 'id'$$), 'quota_exhausted', 'Two campaigns');
select is(pg_temp.as_user(1, $$insert into public.campaigns (name) values ('two') returning 'made'$$), 'made', 'are two');
select is(pg_temp.as_user(1, $$select public.create_campaign('three') ->> 'id'$$), 'quota_exhausted', 'however a third is made');
update public.subscriptions set metadata = '{"custom_limits": {"max_campaigns": 3, "max_leads": -1}}' where organization_id = pg_temp.org();
select isnt(pg_temp.as_user(1, $$select public.create_campaign('three') ->> 'id'$$), 'quota_exhausted', 'but for a customer who was given more');
select is(pg_temp.as_user(1, $$insert into public.leads (name) select 'many' from generate_series(1, 50) returning 'made'$$), 'made', '-1 is no limit');
update public.subscription_plans set features = '{}' where slug = 'details-odd';
select is(pg_temp.as_user(1, $$insert into public.projects (name) values ('r'), ('s') returning 'made'$$), 'made', 'and a plan that names none sets none');

-- Units.
select is(pg_temp.as_user(1, $$insert into public.properties (project_id, title, price_minor, type, tower, floor_number, unit_number)
  select id, 'Flat', 1, 'apartment', 'A', 3, '301' from public.projects where name = 'q' returning 'made'$$), 'made', 'A unit of a development');
select is(pg_temp.as_user(1, $$insert into public.properties (project_id, title, price_minor, type, tower, unit_number)
  select id, 'The same', 1, 'apartment', 'A', '301' from public.projects where name = 'q' returning 'made'$$), '23505', 'is there once');
select is(pg_temp.as_user(1, $$insert into public.properties (project_id, title, price_minor, type, tower, unit_number)
  select id, 'Other', 1, 'apartment', 'B', '301' from public.projects where name = 'q' returning 'made'$$), 'made', 'in its tower');
select is(pg_temp.as_user(1, $$insert into public.properties (title, price_minor, type) values ('House', 1, 'villa'), ('House', 1, 'villa') returning 'made'$$), 'made', 'and what has no number is no unit');

-- Leaving.
update public.profiles set organization_id = pg_temp.org() where id = pg_temp.person(2);
insert into public.user_settings (organization_id, user_id) values (pg_temp.org(), pg_temp.person(2));
insert into public.websocket_sessions (organization_id, kind, user_id, connection_id) values (pg_temp.org(), 'dashboard', pg_temp.person(2), 'details');
insert into public.leads (organization_id, name, created_by) values (pg_temp.org(), 'made by who left', pg_temp.person(2));
select is(pg_temp.as_user(2, $$select public.leave_organization() ->> 'left'$$), pg_temp.org()::text, 'Whoever has settings and an open dashboard may leave');
select is((select (select count(*) from public.user_settings where user_id = pg_temp.person(2)) + (select count(*) from public.websocket_sessions where connection_id = 'details')),
  0::bigint, 'and takes them along');
select is((select created_by from public.leads where name = 'made by who left'), null, 'but not what they made');

-- Legal hours.
select is_empty(
  $$select jurisdiction, evidence from public.calling_hours
    where evidence = 'rule' and jurisdiction not in ('US', 'US-FL', 'US-RI', 'US-SD', 'US-UT', 'US-WA')$$,
  'Hours are called known where the rule was read, and nowhere else'
);
select is_empty($$select jurisdiction from public.calling_hours where evidence = 'operator'$$, 'and none that came with the system are called the operator''s');
select is((select string_agg(distinct evidence, ' ') from public.calling_hours where jurisdiction = 'IN' and purpose = 'promotional'),
  'not verified; stricter default', 'What is common practice is not called a rule');
create function pg_temp.hours(region text, day date) returns text
language sql as $$ select coalesce(to_char(opens, 'HH24:MI') || '-' || to_char(closes, 'HH24:MI'), 'closed') from private.legal_hours('US', region, 'service', day) $$;
select is(pg_temp.hours(v.region, v.day::date), v.hours, format('%s on %s: %s', v.region, v.day, v.hours))
from (values
  ('SD', '2026-11-28', 'closed'), ('SD', '2026-11-27', '09:00-21:00'), ('UT', '2027-07-24', 'closed'), ('KY', '2026-11-24', '10:00-21:00'),
  ('OK', '2026-11-24', '09:00-20:00'), ('RI', '2027-06-18', 'closed'), ('LA', '2027-01-08', 'closed'), ('TX', '2027-01-08', '09:00-21:00'),
  -- Nobody entered the holidays of 2028.
  ('RI', '2028-03-01', 'closed'), ('TX', '2028-03-01', '09:00-21:00')
) as v (region, day, hours);
insert into public.calling_hours (jurisdiction, purpose, weekday, opens, closes, basis) values ('FR', 'service', 1, '10:00', '13:00', 'our lawyer');
select is((select evidence from public.calling_hours where jurisdiction = 'FR'), 'operator', 'For what an operator adds the operator answers');

select is_empty($$select polrelid::regclass, polname from pg_catalog.pg_policy where length(polname) >= 63$$, 'No policy''s name was cut off');

-- Privileged changes are on record, whoever makes them.
select is_empty(
  $$select name from unnest(array[
      'public.organizations', 'public.profiles', 'public.roles', 'public.permissions', 'public.api_keys', 'public.invitations',
      'public.carrier_accounts', 'public.caller_numbers', 'public.store_phone_numbers', 'public.calling_hours', 'public.calling_holidays',
      'private.dnc_registers', 'public.subscription_plans', 'public.plan_prices', 'public.plan_price_meters', 'public.meters',
      'public.tax_rates', 'private.billing_issuer', 'public.subscriptions', 'public.credit_transactions', 'public.invoices', 'public.stores',
      'private.store_credentials', 'public.campaigns', 'public.leads', 'public.impersonation_sessions'
    ]) as name
    where not exists (
      select from pg_catalog.pg_trigger as trigger
      join pg_catalog.pg_proc as routine on routine.oid = trigger.tgfoid
      where trigger.tgrelid = name::regclass and trigger.tgenabled <> 'D'
        and routine.proname in ('audit_change', 'audit_member', 'follow_impersonation')
    )$$,
  'Every table of privileged rows has a trigger that writes the line'
);
create function pg_temp.last_line(log text) returns text
language plpgsql as $$
declare
  line text;
begin
  execute format('select action || '' '' || metadata from public.%I order by id desc limit 1', log) into line;
  return line;
end
$$;
update public.calling_hours set opens = '11:00' where jurisdiction = 'FR';
select is(pg_temp.last_line('platform_audit_logs'),
  'calling_hours.changed {"opens": {"to": "11:00:00", "from": "10:00:00"}, "purpose": "service", "weekday": 1, "jurisdiction": "FR"}',
  'A line says which row it was, where no id does');
insert into public.calling_holidays (jurisdiction, day, name) values ('FR', '2027-07-14', 'Fete');
select is(pg_temp.last_line('platform_audit_logs'),
  'calling_holiday.created {"day": "2027-07-14", "name": "Fete", "evidence": "operator", "jurisdiction": "FR"}', 'A holiday');
select pg_temp.as_user(1, $$update public.campaigns set time_end = '20:00' where name = 'two' returning 'made'$$);
select is(pg_temp.last_line('audit_logs'), 'campaign.changed {"time_end": {"to": "20:00:00", "from": "21:00:00"}}', 'A campaign''s hours');
update public.campaigns set total_calls = total_calls + 1 where name = 'two';
select is(pg_temp.last_line('audit_logs'), 'campaign.changed {"time_end": {"to": "20:00:00", "from": "21:00:00"}}', 'and not what it counts');
select pg_temp.as_user(1, $$delete from public.leads where name = 'many' returning 'made'$$);
select is(pg_temp.last_line('audit_logs'), 'lead.deleted {"source": "manual", "status": "new", "project_id": null}', 'A lead that is deleted, and not who it was');
insert into public.stores (organization_id, name, domain, platform) values (pg_temp.org(), 'Shop', 'shop.details.example', 'shopify');
update public.stores set status = 'connected' where name = 'Shop';
select is(pg_temp.last_line('audit_logs'), 'store.changed {"status": {"to": "connected", "from": "pending"}}', 'A store that is connected');
insert into private.store_credentials (organization_id, store_id, access_token_sealed) select organization_id, id, 'sealed' from public.stores where name = 'Shop';
update private.store_credentials set access_token_sealed = 'other' where store_id = (select id from public.stores where name = 'Shop');
select is(pg_temp.last_line('audit_logs'),
  format('store_credentials.changed {"store_id": "%s", "access_token_sealed": "changed"}', (select id from public.stores where name = 'Shop')),
  'its token, unseen');
insert into public.store_phone_numbers (organization_id, store_id, phone_number) select organization_id, id, '+918012345678' from public.stores where name = 'Shop';
select ok(pg_temp.last_line('audit_logs') like 'store_phone_number.created %"+918012345678"%', 'and its number');
select throws_ok(statement, '23001', null, statement)
from unnest(array['truncate public.audit_logs', 'truncate public.platform_audit_logs', 'delete from public.platform_audit_logs'])
  as statement;

select * from finish();
rollback;
