-- Who sees and writes what: sign-up, two organizations side by side, owner, admin and member, and what nobody may do to themselves.
begin;
set local search_path = public, extensions, tap;
select plan(57);

insert into private.clock_offset (shift) values (timestamptz '2026-11-24 10:00+05:30' - now())
on conflict (single) do update set shift = excluded.shift;
insert into public.subscription_plans (slug, name) values ('free', 'Free') on conflict (slug) do nothing;
insert into public.plan_prices (plan_id, version)
select plan.id, 1 from public.subscription_plans as plan
where plan.slug = 'free' and not exists (select from public.plan_prices as price where price.plan_id = plan.id);

-- Runs one statement as a user and gives its first value, or what it was refused with: a status and a code, or an SQLSTATE.
create function pg_temp.run_as(who text, query text) returns text
language plpgsql as $$
declare
  result text;
  told   text;
  detail text;
begin
  perform set_config('request.jwt.claims', case when who <> 'anon' then json_build_object(
    'sub', '00000000-0000-4000-8000-' || lpad(who, 12, '0'), 'role', 'authenticated')::text else '' end, true);
  perform set_config('role', case when who = 'anon' then 'anon' else 'authenticated' end, true);
  execute query into result;
  perform set_config('role', session_user::text, true), set_config('request.jwt.claims', '', true);
  return result;
exception when others then
  get stacked diagnostics told = message_text, detail = pg_exception_detail;
  return case when sqlstate = 'PGRST' then (detail::json ->> 'status') || ' ' || (told::json ->> 'code') else sqlstate end;
end
$$;
create function pg_temp.rows_as(who text, query text) returns text
language plpgsql as $$
begin
  return pg_temp.run_as(who, format('with changed as (%s returning 1) select count(*) from changed', query));
end
$$;

-- Sign-up. a1 owns A; a2 is its admin, a3 a member, a4 has a role of their own; b1 owns B; c1 belongs nowhere.
insert into auth.users (id, email, raw_user_meta_data)
select ('00000000-0000-4000-8000-' || lpad(who, 12, '0'))::uuid, who || '@example.test', jsonb_build_object('full_name', 'User ' || who)
from unnest(array['a1', 'a2', 'a3', 'a4', 'b1', 'c1']) as who;
select results_eq(
  $$select full_name, email, system_role::text, organization_id from public.profiles where id = '00000000-0000-4000-8000-0000000000a1'$$,
  $$values ('User a1', 'a1@example.test', 'member', null::uuid)$$,
  'Whoever signs up has a profile, and belongs nowhere yet'
);
select is(pg_temp.run_as('anon', $$select public.create_organization('X')$$), '42501', 'A visitor makes no organization');
select is(pg_temp.run_as('a1', $$select public.create_organization('  ')$$), '422 invalid_name', 'An organization has a name');
select is(pg_temp.run_as('a1', $$select public.create_organization('A', 'Asia/Atlantis')$$), '422 invalid_timezone', 'and a zone that exists');
select is(pg_temp.run_as('a1', $$select public.create_organization('A', 'Asia/Kolkata', 'India')$$), '422 invalid_country', 'and a country');
select is(
  (select organization_id from public.profiles where id = '00000000-0000-4000-8000-0000000000a1'), null,
  'What was refused has left nothing'
);
select matches(
  pg_temp.run_as('a1', $$select public.create_organization('Acme Homes', 'Asia/Kolkata', 'IN', '29')$$), '^\{"organization_id": "[0-9a-f-]{36}"\}$',
  'An organization is made'
);
select matches(pg_temp.run_as('b1', $$select public.create_organization('Bolt')$$), 'organization_id', 'and another one');
select is(pg_temp.run_as('a1', $$select public.create_organization('Second')$$), '409 already_in_organization', 'One user, one organization');

create table pg_temp.ids as
select
  (select organization_id from public.profiles where id = '00000000-0000-4000-8000-0000000000a1') as a,
  (select organization_id from public.profiles where id = '00000000-0000-4000-8000-0000000000b1') as b;
grant select on pg_temp.ids to authenticated, anon;
select results_eq(
  $$select profile.system_role::text, role.name, subscription.status::text, plan.slug,
      subscription.trial_ends_at = private.clock_now() + interval '14 days'
    from public.profiles as profile
    join public.roles as role on role.id = profile.role_id
    join public.subscriptions as subscription on subscription.organization_id = profile.organization_id
    join public.subscription_plans as plan on plan.id = subscription.plan_id
    where profile.id = '00000000-0000-4000-8000-0000000000a1'$$,
  $$values ('owner', 'Owner', 'trialing', 'free', true)$$,
  'Its maker owns it, and it is on trial'
);
select results_eq(
  $$select string_agg(stage.name, ' > ' order by stage.position)
    from public.pipeline_stages as stage join public.pipelines as pipeline on pipeline.id = stage.pipeline_id
    where pipeline.is_default and pipeline.organization_id = (select a from pg_temp.ids)$$,
  array['New Lead > Contacted > Qualified > Negotiation > Won > Lost'],
  'It has its default pipeline'
);
select results_eq(
  $$select name, jsonb_array_length(permissions) from public.roles where organization_id = (select a from pg_temp.ids) order by name$$,
  $$values ('Admin', 23), ('Member', 9), ('Owner', 24)$$,
  'and three roles: an admin has all but organization.manage, a member views and edits leads'
);
select is(
  (select count(*) from public.audit_logs where action = 'organization.created' and organization_id = (select a from pg_temp.ids)), 1::bigint,
  'and it is on record'
);

insert into public.roles (id, organization_id, name, permissions)
select '00000000-0000-4000-9000-0000000000a4', a, 'Caller', '["campaign.view", "campaign.run", "role.manage"]' from pg_temp.ids;
-- Four are one more than Free has room for.
update public.subscriptions set metadata = '{"custom_limits": {"max_users": 4}}' where organization_id = (select a from pg_temp.ids);
update public.profiles
set organization_id = (select a from pg_temp.ids),
  system_role = case right(id::text, 2) when 'a2' then 'admin' else 'member' end::public.system_role,
  role_id = case right(id::text, 2) when 'a4' then '00000000-0000-4000-9000-0000000000a4'::uuid end
where id in ('00000000-0000-4000-8000-0000000000a2', '00000000-0000-4000-8000-0000000000a3', '00000000-0000-4000-8000-0000000000a4');

-- Permissions.
select is(pg_temp.run_as('a1', $$select string_agg(public.auth_has_permission(key)::text, '') ~ '^(true)+$' from public.permissions$$), 'true', 'An owner holds every permission');
select is(
  pg_temp.run_as('a2', $$select string_agg(key, ',') from public.permissions where not public.auth_has_permission(key)$$), 'organization.manage',
  'An admin all but one'
);
select is(
  pg_temp.run_as('a3', $$select string_agg(key, ' ' order by key) from public.permissions where public.auth_has_permission(key)$$),
  'audit.view billing.view call.view campaign.view lead.edit lead.view property.view store.view usage.view', 'A member what members do'
);
select is(
  pg_temp.run_as('a4', $$select string_agg(key, ' ' order by key) from public.permissions where public.auth_has_permission(key)$$),
  'campaign.run campaign.view role.manage', 'A role of one''s own decides instead'
);
select is(pg_temp.run_as('c1', $$select public.auth_has_permission('lead.view')$$), 'false', 'Without an organization there is nothing to hold');
select is(pg_temp.run_as('a1', $$select public.auth_has_permission('no.such')$$), 'true', 'An owner needs no list');
select is(pg_temp.run_as('a1', $$select public.get_auth_org_id() = (select a from pg_temp.ids)$$), 'true', 'Who asks is known by the token');
select is(pg_temp.run_as('a1', $$select public.get_auth_system_role()$$), 'owner', 'and what they are');

-- Leads come in without an organization.
select is(
  pg_temp.rows_as('a1', $$insert into public.leads (name, phone, email) values ('Uma', '+919800000001', 'uma@example.test'), ('Vik', '+919800000002', null)$$),
  '2', 'An import names no organization'
);
select is(
  (select count(*) from public.leads where organization_id = (select a from pg_temp.ids)), 2::bigint, 'and the leads are the importer''s'
);
select is(pg_temp.rows_as('a3', $$insert into public.leads (name, phone) values ('Wes', '+919800000003')$$), '1', 'A member adds a lead');
select is(pg_temp.rows_as('a4', $$insert into public.leads (name, phone) values ('Xia', '+919800000004')$$), '42501', 'who may not edit leads adds none');
select is(pg_temp.rows_as('c1', $$insert into public.leads (name, phone) values ('Xia', '+919800000004')$$), '42501', 'nor who belongs nowhere');
select is(
  pg_temp.run_as('a1', $$insert into public.leads (organization_id, name) select b, 'Trojan' from pg_temp.ids$$), '42501',
  'Nobody names an organization, not even a foreign one'
);
select is(pg_temp.rows_as('a1', $$insert into public.leads (name, phone) values ('Yan', '98000 00005')$$), '23514', 'A phone number is E.164');
select is(pg_temp.run_as('b1', $$select count(*) from public.leads$$), '0', 'Another organization sees none of them');
select is(pg_temp.rows_as('b1', $$update public.leads set name = 'Mine'$$), '0', 'changes none');
select is(pg_temp.rows_as('b1', $$delete from public.leads$$), '0', 'and deletes none');
select is(pg_temp.run_as('a4', $$select count(*) from public.leads$$), '0', 'Nor does a colleague without lead.view');
select is(pg_temp.rows_as('a3', $$delete from public.leads where name = 'Wes'$$), '0', 'A member deletes none');
select is(pg_temp.rows_as('a2', $$delete from public.leads where name = 'Wes'$$), '1', 'An admin does');
select is(pg_temp.run_as('anon', $$select count(*) from public.leads$$), '42501', 'A visitor is turned away');
select is(pg_temp.rows_as('a1', $$update public.leads set organization_id = (select b from pg_temp.ids)$$), '42501', 'A lead is not given away');

-- A reference across organizations is refused whoever writes it.
insert into public.projects (id, organization_id, name)
select '00000000-0000-4000-a000-0000000000b1', b, 'Theirs' from pg_temp.ids;
select is(
  pg_temp.rows_as('a1', $$update public.leads set project_id = '00000000-0000-4000-a000-0000000000b1'$$), '23503',
  'A lead is in no project of another organization'
);
select throws_ok(
  $$update public.leads set project_id = '00000000-0000-4000-a000-0000000000b1' where organization_id = (select a from pg_temp.ids)$$,
  '23503', null, 'not even by the hand of the system'
);

-- What nobody may do to themselves.
select is(pg_temp.rows_as('a3', $$update public.profiles set system_role = 'owner' where id = auth.uid()$$), '42501', 'Nobody raises themselves');
select is(pg_temp.rows_as('a3', $$update public.profiles set system_role = 'platform_admin'$$), '42501', 'nor without a filter');
select is(pg_temp.rows_as('a3', $$update public.profiles set organization_id = (select b from pg_temp.ids)$$), '42501', 'Nobody moves to another organization');
select is(pg_temp.rows_as('a3', $$update public.profiles set role_id = '00000000-0000-4000-9000-0000000000a4'$$), '42501', 'Nobody takes a role');
select is(pg_temp.rows_as('a3', $$update public.profiles set status = 'active'$$), '42501', 'or lifts their suspension');
select is(pg_temp.rows_as('a3', $$update public.profiles set full_name = 'Me'$$), '1', 'They describe themselves, and nobody else');
select is(
  pg_temp.rows_as('a4', $$insert into public.roles (name, permissions) values ('Wide', '["billing.manage"]')$$), '42501',
  'Nobody makes a role of permissions they lack'
);
select is(
  pg_temp.rows_as('a4', $$update public.roles set permissions = '["organization.manage"]' where id = '00000000-0000-4000-9000-0000000000a4'$$), '42501',
  'or widens their own'
);
select is(pg_temp.rows_as('a4', $$insert into public.roles (name, permissions) values ('Narrow', '["campaign.view"]')$$), '1', 'One of what they hold, they do');
select is(pg_temp.rows_as('a1', $$insert into public.roles (name, permissions) values ('Odd', '["lead.paint"]')$$), '422 unknown_permission', 'A permission exists');
select is(pg_temp.rows_as('a1', $$update public.roles set permissions = '[]' where name = 'Owner'$$), '0', 'The roles that came with the organization stay');
select is(
  pg_temp.run_as('a1', $$update public.organizations set max_concurrent_calls = 1000$$), '42501', 'Nobody widens their own limits'
);
select is(pg_temp.rows_as('a2', $$update public.organizations set name = 'Ours'$$), '0', 'An admin does not change the organization');
select is(pg_temp.rows_as('a1', $$update public.organizations set name = 'Acme'$$), '1', 'its owner does');

update public.profiles set status = 'suspended' where id = '00000000-0000-4000-8000-0000000000a2';
select is(pg_temp.run_as('a2', $$select count(*) from public.leads$$), '0', 'Who is suspended sees nothing');

-- Keys.
select is(pg_temp.run_as('a3', $$select public.create_api_key('Sync', array['usage.write'])$$), '403 permission_denied', 'A member makes no API key');
select is(pg_temp.run_as('a1', $$select public.create_api_key('Sync', array['all'])$$), '422 unknown_scope', 'A key has scopes that exist');
create table pg_temp.made as select pg_temp.run_as('a1', $$select public.create_api_key('Sync', array['usage.write'])$$)::jsonb as key;
select results_eq(
  $$select (made.key ->> 'key') ~ '^tlk_[0-9a-f]{8}_[0-9a-f]{40}$', starts_with(made.key ->> 'key', stored.prefix || '_'),
      stored.sha256 = sha256(convert_to(made.key ->> 'key', 'utf8')), stored.organization_id = (select a from pg_temp.ids), stored.scopes
    from pg_temp.made as made join public.api_keys as stored on stored.id = (made.key ->> 'id')::uuid$$,
  $$values (true, true, true, true, array['usage.write'])$$,
  'A key is shown once, and only its hash is kept'
);
select is(pg_temp.run_as('b1', $$select count(*) from public.api_keys$$), '0', 'Nobody else sees it');

select * from finish();
rollback;
