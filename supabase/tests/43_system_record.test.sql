-- Support sessions, the audit log, and the names that the documents give.
begin;
set local search_path = public, extensions, tap;
select plan(74);

create function pg_temp.person(number integer) returns uuid
language sql immutable as $$ select ('00000000-0000-4000-8000-0000000e' || lpad(number::text, 4, '0'))::uuid $$;
create function pg_temp.sign_up(number integer, email text, confirmed boolean default true, metadata jsonb default '{}') returns void
language sql as $$
  insert into auth.users (id, email, email_confirmed_at, raw_user_meta_data)
  values (pg_temp.person(number), email, case when confirmed then now() end, metadata)
$$;
-- What a query gives as somebody: one value, or the code of the error.
create function pg_temp.as_user(number integer, query text, role text default 'authenticated') returns text
language plpgsql as $$
declare
  before text := current_setting('role');
  answer text;
begin
  perform set_config('request.jwt.claims',
    case when number is null then jsonb_build_object('role', role) else jsonb_build_object('sub', pg_temp.person(number), 'role', role) end::text, true);
  perform set_config('role', role, true);
  begin
    execute query into answer;
  exception
    when sqlstate 'PGRST' then answer := sqlerrm::jsonb ->> 'code';
    when others then answer := sqlstate;
  end;
  perform set_config('role', before, true);
  perform set_config('request.jwt.claims', '', true);
  return answer;
end
$$;
create function pg_temp.org(number integer) returns uuid
language sql as $$ select organization_id from public.profiles where id = pg_temp.person(number) $$;
select pg_temp.sign_up(1, 'owner@one.test');
select pg_temp.sign_up(2, 'owner@two.test');
select pg_temp.sign_up(3, 'member@one.test');
select pg_temp.sign_up(9, 'staff@platform.test');
select pg_temp.as_user(1, $$select public.create_organization('One')$$);
select pg_temp.as_user(2, $$select public.create_organization('Two')$$);
update public.profiles set organization_id = pg_temp.org(1) where id = pg_temp.person(3);
update public.profiles set system_role = 'platform_admin' where id = pg_temp.person(9);
insert into public.leads (organization_id, name) values (pg_temp.org(1), 'L1'), (pg_temp.org(1), 'L2'), (pg_temp.org(2), 'M1');
select results_eq($$select action, metadata #>> '{to,system_role}' from public.platform_audit_logs where entity_id = pg_temp.person(9)$$,
  $$values ('platform_admin.changed', 'platform_admin')$$, 'Who becomes staff is on record');
select is(pg_temp.as_user(9, $$select count(*) from public.leads$$), '0', 'Staff sees no organization');
select is(pg_temp.as_user(9, $$select public.get_auth_system_role()$$), 'platform_admin', 'and is what it is');
select is(pg_temp.as_user(9, $$select public.create_organization('Mine')$$), 'platform_admin', 'It makes no organization');
select throws_ok($$update public.profiles set organization_id = pg_temp.org(1), system_role = 'member' where id = pg_temp.person(9)$$, 'PGRST', null, 'and joins none');
select throws_ok($$insert into public.profiles (id, organization_id, system_role) select gen_random_uuid(), pg_temp.org(1), 'platform_admin'$$, '23514', null, 'No member is staff');

-- A session.
select is(pg_temp.as_user(1, format($$select public.start_impersonation(%L, 'A long enough reason')$$, pg_temp.person(3))), 'permission_denied', 'An owner acts for nobody');
select is(pg_temp.as_user(9, format($$select public.start_impersonation(%L, 'short')$$, pg_temp.person(1))), 'reason_required', 'A session has a reason');
select is(pg_temp.as_user(9, format($$select public.start_impersonation(%L, 'A long enough reason', 1000)$$, pg_temp.person(1))), 'invalid_minutes', 'and is short');
select is(pg_temp.as_user(9, format($$select public.start_impersonation(%L, 'A long enough reason')$$, pg_temp.person(9))), 'user_not_found', 'and is for a user of an organization');
select is(pg_temp.as_user(9, $$insert into public.impersonation_sessions (organization_id) values (gen_random_uuid()) returning 'made'$$), '42501', 'Nobody writes one by hand');
select ok(pg_temp.as_user(9, format($$select public.start_impersonation(%L, 'Ticket 4711: leads missing')$$, pg_temp.person(1))) like '%"is_read_only": true%', 'A session begins, to read');
select is(pg_temp.as_user(9, $$select public.get_auth_org_id()$$), pg_temp.org(1)::text, 'The helpers honour it: the organization');
select is(pg_temp.as_user(9, $$select public.get_auth_system_role()$$), 'owner', 'the system role');
select is(pg_temp.as_user(9, $$select public.get_auth_role_id()$$), (select role_id::text from public.profiles where id = pg_temp.person(1)), 'the role');
select is(pg_temp.as_user(9, $$select public.auth_has_permission('lead.view')$$), 'true', 'what may be seen');
select is(pg_temp.as_user(9, $$select public.auth_has_permission('lead.edit')$$), 'false', 'and not what may be done');
select is(pg_temp.as_user(9, $$select string_agg(name, ' ' order by name) from public.leads$$), 'L1 L2', 'It sees that organization''s leads and no other''s');
select is(pg_temp.as_user(9, $$insert into public.leads (name) values ('No') returning 'made'$$), '42501', 'and writes nothing');
select is(pg_temp.as_user(9, $$with gone as (delete from public.leads returning 1) select count(*) from gone$$), '0', 'and deletes nothing');
select is(pg_temp.as_user(9, $$select public.create_api_key('k', array['usage.write'])$$), 'permission_denied', 'and makes no key');
select is(pg_temp.as_user(9, format($$select public.set_member_role(%L, 'owner')$$, pg_temp.person(3))), 'permission_denied', 'and no owner');
select is(pg_temp.as_user(1, $$select string_agg(reason, '') from public.impersonation_sessions where active$$), 'Ticket 4711: leads missing', 'The organization sees who is there and why');
select is(pg_temp.as_user(2, $$select count(*) from public.impersonation_sessions$$), '0', 'another does not');
select results_eq(
  $$select user_id, impersonator_user_id, is_impersonated, metadata ->> 'reason' from public.audit_logs where action = 'impersonation.started'$$,
  $$values (pg_temp.person(1), pg_temp.person(9), true, 'Ticket 4711: leads missing')$$, 'and its audit log says so');
-- A session that may write.
select pg_temp.as_user(9, format($$select public.start_impersonation(%L, 'Ticket 4711: repair', 10, false)$$, pg_temp.person(1)));
select is((select count(*) from public.impersonation_sessions where ended_at is null), 1::bigint, 'One session at a time');
select is(pg_temp.as_user(9, $$insert into public.leads (name) values ('L3') returning created_by = auth.uid()$$), 'false', 'One that may write writes in the user''s name');
select is((select created_by from public.leads where name = 'L3'), pg_temp.person(1), 'as author');
select results_eq(
  $$select user_id, impersonator_user_id, impersonation_session_id, entity_id from public.audit_logs where action = 'leads.insert'$$,
  $$select pg_temp.person(1), pg_temp.person(9), (select id from public.impersonation_sessions where ended_at is null), (select id from public.leads where name = 'L3')$$,
  'and every row of it is on record, tagged');
select is(pg_temp.as_user(1, $$insert into public.leads (name) values ('L4') returning 'made'$$), 'made', 'What the user writes');
select is((select count(*) from public.audit_logs where action = 'leads.insert'), 1::bigint, 'is not');
select ok(pg_temp.as_user(9, $$select public.create_campaign('C1')$$) like '{%', 'Functions work in a session too');
select ok((select is_impersonated from public.audit_logs where action = 'campaign.created'), 'and their lines are tagged');
select ok(pg_temp.as_user(9, $$select public.create_api_key('k', array['usage.write'])$$) like '{%', 'all of them');
select is(pg_temp.as_user(9, $$select count(*) from public.leads where organization_id <> public.get_auth_org_id()$$), '0', 'never beyond that organization');
update public.profiles set acting_until = now() - interval '1 second' where id = pg_temp.person(9);
select is(pg_temp.as_user(9, $$select count(*) from public.leads$$), '0', 'When its time is over it is over, without anybody''s doing');
select is(pg_temp.as_user(9, $$select public.get_auth_system_role()$$), 'platform_admin', 'and staff is staff again');
update public.profiles set acting_until = now() + interval '1 minute' where id = pg_temp.person(9);
update public.profiles set status = 'suspended' where id = pg_temp.person(1);
select is(pg_temp.as_user(9, $$select count(*) from public.leads$$), '0', 'For a user who is suspended nobody sees anything');
update public.profiles set status = 'active' where id = pg_temp.person(1);
select is(pg_temp.as_user(9, $$select count(*) from public.leads$$), '4', 'but else');
select ok(pg_temp.as_user(9, $$select public.end_impersonation() ->> 'ended'$$) is not null, 'Ended');
select is(pg_temp.as_user(9, $$select count(*) from public.leads$$), '0', 'it is over at once');
select is((select count(*) from public.audit_logs where action = 'impersonation.ended' and is_impersonated), 2::bigint, 'and on record');
select throws_ok($$update public.impersonation_sessions set reason = 'Something else entirely'$$, '23001', null, 'What it was for is not rewritten');
select throws_ok($$update public.impersonation_sessions set ended_at = null$$, '23001', null, 'nor is it opened again');
select throws_ok($$delete from public.impersonation_sessions$$, '23001', null, 'nor forgotten');
select throws_ok($$insert into public.impersonation_sessions (organization_id, admin_id, target_user_id, reason, expires_at)
  values (pg_temp.org(2), pg_temp.person(9), pg_temp.person(1), 'A long enough reason', now() + interval '1 hour')$$, '23514', null, 'No session is for a user of another organization');
select throws_ok($$insert into public.impersonation_sessions (organization_id, admin_id, target_user_id, reason, expires_at)
  values (pg_temp.org(1), pg_temp.person(2), pg_temp.person(1), 'A long enough reason', now() + interval '1 hour')$$, '23514', null, 'nor by anybody but staff');
select pg_temp.as_user(9, format($$select public.start_impersonation(%L, 'Ticket 4712: again')$$, pg_temp.person(1)));
update public.profiles set system_role = 'member' where id = pg_temp.person(9);
select is((select count(*) from public.impersonation_sessions where active), 0::bigint, 'Who is no longer staff acts for nobody');

-- The audit log.
select throws_ok($$update public.audit_logs set action = 'x'$$, '23001', null, 'Nobody changes a line, not even the owner of the table');
select throws_ok($$delete from public.audit_logs$$, '23001', null, 'or deletes one');
select throws_ok($$truncate public.audit_logs$$, '23001', null, 'or all');
select is(pg_temp.as_user(null, $$delete from public.audit_logs returning 'gone'$$, 'service_role'), '42501', 'The handlers neither');
select is(pg_temp.as_user(null, $$insert into public.audit_logs (organization_id, action) values (gen_random_uuid(), 'x') returning 'made'$$, 'service_role'), '42501', 'nor do they forge one');
select is((select tgenabled from pg_trigger where tgrelid = 'public.audit_logs'::regclass and tgname = 'refuse_change'), 'A'::"char", 'and no replica');
create function pg_temp.last() returns text
language sql as $$ select action || ' ' || coalesce(metadata::text, '') from public.audit_logs order by id desc limit 1 $$;
update public.organizations set dialling_enabled = false where id = pg_temp.org(1);
select is(pg_temp.last(), 'organization.dialling_disabled {"dialling_enabled": {"to": false, "from": true}}', 'A kill switch is on record');
select pg_temp.as_user(1, $$insert into public.roles (name, permissions) values ('R', '["lead.view"]') returning 'made'$$);
select is((select action || ' ' || user_id from public.audit_logs order by id desc limit 1), 'role.created ' || pg_temp.person(1), 'a role, by the user who made it');
select pg_temp.as_user(1, $$update public.roles set permissions = '["lead.view", "lead.edit"]' where name = 'R' returning 'made'$$);
select is(pg_temp.last(), 'role.changed {"permissions": {"to": ["lead.view", "lead.edit"], "from": ["lead.view"]}}', 'and what it may');
update public.profiles set role_id = (select id from public.roles where name = 'R') where id = pg_temp.person(3);
select is((select action from public.audit_logs order by id desc limit 1), 'member.role_changed', 'a member''s role');
update public.profiles set full_name = 'New name' where id = pg_temp.person(3);
select is((select action from public.audit_logs order by id desc limit 1), 'member.role_changed', 'and not their name');
update public.subscriptions set status = 'suspended' where organization_id = pg_temp.org(1);
select is(pg_temp.last(), 'subscription.changed {"status": {"to": "suspended", "from": "trialing"}}', 'a subscription');
insert into public.carrier_accounts (id, organization_id, provider, account_sid, credentials_sealed, api_base)
values ('00000000-0000-4000-c000-0000000e0001', pg_temp.org(1), 'plivo', 'MASYSTEM', 'sealed', 'https://carrier.example.test');
update public.carrier_accounts set credentials_sealed = 'resealed' where account_sid = 'MASYSTEM';
select is(pg_temp.last(), 'carrier_account.changed {"credentials_sealed": "changed"}', 'a carrier account, and no secret');
update public.subscription_plans set features = features || '{"max_users": 4}' where slug = 'free';
select is((select action from public.platform_audit_logs order by id desc limit 1), 'plan.changed', 'a plan');
insert into public.plan_prices (plan_id, version, base_minor) select id, 77, 100 from public.subscription_plans where slug = 'free';
select is((select action from public.platform_audit_logs order by id desc limit 1), 'plan_price.created', 'a price');
update public.permissions set member = true where key = 'call.listen';
select is((select action from public.platform_audit_logs order by id desc limit 1), 'permission.changed', 'a permission');
select is(pg_temp.as_user(1, $$select count(*) from public.platform_audit_logs$$), '0', 'The operator''s own record is the operator''s');
select is_empty(
  $$select class.relname from pg_class as class
    where class.relnamespace = 'public'::regnamespace and class.relkind in ('r', 'p')
      and exists (select from pg_attribute as a where a.attrelid = class.oid and a.attname = 'organization_id' and not a.attisdropped)
      and (has_any_column_privilege('authenticated', class.oid, 'insert, update') or has_table_privilege('authenticated', class.oid, 'delete'))
      and not exists (
        select from pg_trigger as t where t.tgrelid = class.oid
          and t.tgfoid in ('private.audit_impersonated()'::regprocedure, 'private.audit_change()'::regprocedure, 'private.audit_member()'::regprocedure)
      )$$, 'Whatever a user may write to is on record in a support session');

-- The documents' names.
select set_eq(
  $$select tablename::text from pg_publication_tables where pubname = 'supabase_realtime' and schemaname = 'public' and tablename <> 'conversations'$$,
  array['call_logs', 'call_queue', 'campaigns', 'campaign_leads'], 'What a screen watches is published');
select ok(to_regclass('public.conversations') is null or exists (
  select from pg_publication_tables where pubname = 'supabase_realtime' and tablename = 'conversations'), 'conversations too, where they are');
create table public.leads_of_mine (id integer primary key, organization_id uuid not null);
alter table public.leads_of_mine enable row level security;
grant select on public.leads_of_mine to authenticated, anon;
insert into public.leads_of_mine values (1, pg_temp.org(1)), (2, pg_temp.org(1)), (3, pg_temp.org(2)), (4, gen_random_uuid());
set local search_path = public, extensions;
CREATE POLICY "View org leads" ON public.leads_of_mine
  FOR SELECT USING (organization_id = get_auth_org_id());
set local search_path = public, extensions, tap;
select is(pg_temp.as_user(1, $$select string_agg(id::text, ' ' order by id) from public.leads_of_mine$$), '1 2', 'The document''s policy, pasted, shows one''s own');
select is(pg_temp.as_user(2, $$select string_agg(id::text, ' ' order by id) from public.leads_of_mine$$), '3', 'and nobody else''s');
select is(pg_temp.as_user(9, $$select count(*) from public.leads_of_mine$$), '0', 'and nothing without an organization');
select is(pg_temp.as_user(null, $$select count(*) from public.leads_of_mine$$, 'anon'), '42501', 'or a user');
select is(pg_temp.as_user(2, $$select public.get_org_subscription() #>> '{plan,slug}'$$), 'free', 'get_org_subscription() gives the caller''s');
select is(pg_temp.as_user(2, $$select public.check_feature_quota('max_leads', 499)::text || public.check_feature_quota('max_leads', 500) || public.check_feature_quota('nonsense', 0)$$),
  'truefalsefalse', 'check_feature_quota() judges by the caller''s plan');

select * from finish();
rollback;
