-- Members: sign-up, invitations, what a member may be made, and by whom.
begin;
set local search_path = public, extensions, tap;
select plan(72);

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
create function pg_temp.member(number integer) returns text
language sql as $$
  select concat_ws(' ',
    case when profile.organization_id is null then 'nowhere' else organization.name end, profile.system_role, profile.status, role.name)
  from public.profiles as profile
  left join public.organizations as organization on organization.id = profile.organization_id
  left join public.roles as role on role.id = profile.role_id
  where profile.id = pg_temp.person(number)
$$;
create function pg_temp.role_of(number integer, role text) returns uuid
language sql as $$
  select role.id from public.roles as role
  join public.profiles as profile on profile.organization_id = role.organization_id
  where profile.id = pg_temp.person(number) and role.name = role_of.role
$$;

select pg_temp.sign_up(1, 'owner@one.test');
select pg_temp.sign_up(2, 'owner@two.test');
select pg_temp.as_user(1, $$select public.create_organization('One')$$);
select pg_temp.as_user(2, $$select public.create_organization('Two')$$);
select pg_temp.sign_up(3, 'liar@one.test', true, jsonb_build_object(
  'full_name', 'Liar', 'organization_id', (select organization_id from public.profiles where id = pg_temp.person(1)),
  'system_role', 'owner', 'role_id', pg_temp.role_of(1, 'Owner'), 'status', 'active', 'invitation', 'x'));
select is(pg_temp.member(3), 'nowhere member active', 'Sign-up takes no organization and no role from what a user says of themselves');
select is((select full_name from public.profiles where id = pg_temp.person(3)), 'Liar', 'only how they are called');

-- Invitations.
create temporary table made (name text primary key, answer jsonb);
grant all on made to authenticated;
insert into made select 'ann', pg_temp.as_user(1, $$select public.create_invitation('Ann@One.test')$$)::jsonb;
select is((select answer ->> 'email' from made where name = 'ann'), 'ann@one.test', 'An invitation is to an address in lower case');
select matches((select answer ->> 'token' from made where name = 'ann'), '^tli_[0-9a-f]{40}$', 'and its token is shown once');
select is(pg_temp.as_user(1, $$select count(token_sha256) from public.invitations$$), '42501', 'What a token hashes to is not readable');
select is(pg_temp.as_user(1, $$select count(id) from public.invitations$$), '1', 'Who manages members sees the invitation');
select is(pg_temp.as_user(2, $$select count(id) from public.invitations$$), '0', 'another organization does not');
select is(pg_temp.as_user(3, $$select count(id) from public.invitations$$), '0', 'nor does a user without one');
select is(pg_temp.as_user(1, $$insert into public.invitations (organization_id, organization_name, email, token_sha256, expires_at)
  select organization_id, 'One', 'x@y', sha256('x'), now() + interval '1 day' from public.profiles limit 1 returning 'made'$$), '42501',
  'Nobody writes one by hand');
select pg_temp.sign_up(4, 'ANN@one.test', false);
select is(pg_temp.member(4), 'nowhere member active', 'An address that is not proved takes up no invitation');
select is(pg_temp.as_user(4, format($$select public.accept_invitation(invitation_id => %L)$$, (select answer ->> 'id' from made where name = 'ann'))),
  'invitation_not_found', 'not even by its id');
select is(pg_temp.as_user(4, format($$select public.accept_invitation(%L)$$, (select answer ->> 'token' from made where name = 'ann'))),
  'invitation_of_another', 'nor by its token');
select is(pg_temp.as_user(3, format($$select public.accept_invitation(%L)$$, (select answer ->> 'token' from made where name = 'ann'))),
  'invitation_of_another', 'A token that was passed on is of no use');
update auth.users set email_confirmed_at = now() where id = pg_temp.person(4);
select is(pg_temp.member(4), 'One member active', 'Once the address is proved, its invitation holds');
select is((select accepted_by from public.invitations where email = 'ann@one.test'), pg_temp.person(4), 'and is used up');
select is(pg_temp.as_user(4, format($$select public.accept_invitation(%L)$$, (select answer ->> 'token' from made where name = 'ann'))),
  'invitation_not_found', 'once');
select is(pg_temp.as_user(1, $$select public.create_invitation('ann@one.test')$$), 'already_member', 'A member is not invited again');
select is(pg_temp.as_user(4, $$select public.create_invitation('x@one.test')$$), 'permission_denied', 'A member invites nobody');
select is(pg_temp.as_user(null, $$select public.create_invitation('x@one.test')$$), 'unauthenticated', 'nor does a request without a user');
select is(pg_temp.as_user(null, $$select public.create_invitation('x@one.test')$$, 'anon'), '42501', 'nor a visitor');
select is(pg_temp.as_user(1, $$select public.create_invitation('nonsense')$$), 'invalid_email', 'An invitation is to an address');
select is(pg_temp.as_user(1, format($$select public.create_invitation('x@one.test', 'member', %L)$$, pg_temp.role_of(2, 'Admin'))), 'role_not_found',
  'and to a role of the organization''s own');
select is(pg_temp.as_user(1, $$select public.create_invitation('x@one.test', 'platform_admin')$$), 'invalid_system_role', 'never to the operator''s staff');

-- An admin, by an invitation taken up at sign-up.
insert into made select 'adam', pg_temp.as_user(1, $$select public.create_invitation('adam@one.test', 'admin')$$)::jsonb;
select pg_temp.sign_up(5, 'adam@one.test', true, '{"system_role": "owner"}');
select is(pg_temp.member(5), 'One admin active', 'Whoever signs up with a proved address is what the invitation says, at once');
select is(pg_temp.as_user(1, $$select public.create_invitation('fourth@one.test')$$), 'quota_exhausted', 'Free has three seats');
update public.subscriptions set metadata = '{"custom_limits": {"max_users": -1}}'
where organization_id = (select organization_id from public.profiles where id = pg_temp.person(1));
select ok(pg_temp.as_user(1, $$select public.create_invitation('fourth@one.test')$$) like '{%', 'unless this customer was given more');
select is(pg_temp.as_user(5, $$select public.create_invitation('x@one.test', 'owner')$$), 'owner_required', 'Only an owner invites an owner');
select is(pg_temp.as_user(5, format($$select public.create_invitation('x@one.test', 'member', %L)$$, pg_temp.role_of(1, 'Owner'))), 'permission_denied',
  'and nobody invites to a role that may more than they');
select is(
  pg_temp.as_user(5, format($$select public.revoke_invitation(%L)$$, (select id from public.invitations where email = 'fourth@one.test'))),
  jsonb_build_object('id', (select id from public.invitations where email = 'fourth@one.test'))::text, 'An invitation is taken back');
select pg_temp.sign_up(6, 'fourth@one.test');
select is(pg_temp.member(6), 'nowhere member active', 'and then lets nobody in');
select pg_temp.as_user(1, $$select public.create_invitation('late@one.test')$$);
update public.invitations set expires_at = now() - interval '1 second' where email = 'late@one.test';
select pg_temp.sign_up(7, 'late@one.test');
select is(pg_temp.member(7), 'nowhere member active', 'An invitation that ran out lets nobody in');
select pg_temp.as_user(1, $$select public.create_invitation('two@both.test')$$);
select pg_temp.as_user(2, $$select public.create_invitation('two@both.test', 'admin')$$);
select pg_temp.sign_up(8, 'two@both.test');
select is(pg_temp.member(8), 'nowhere member active', 'Asked by two organizations, nobody decides for the user');
select is(pg_temp.as_user(8, $$select string_agg(organization_name, ' ' order by organization_name) from public.invitations$$), 'One Two', 'who sees both');
select pg_temp.as_user(8, format($$select public.accept_invitation(invitation_id => %L)$$,
  (select id from public.invitations where email = 'two@both.test' and organization_name = 'Two')));
select is(pg_temp.member(8), 'Two admin active', 'and takes one');
select is(pg_temp.as_user(8, format($$select public.accept_invitation(invitation_id => %L)$$,
  (select id from public.invitations where email = 'two@both.test' and organization_name = 'One'))), 'already_in_organization', 'and not the other as well');

-- What a member may be made.
select is(pg_temp.as_user(4, format($$select public.set_member_role(%L, 'member')$$, pg_temp.person(5))), 'permission_denied', 'A member changes nobody');
select is(pg_temp.as_user(4, format($$select public.set_member_role(%L, 'owner')$$, pg_temp.person(4))), 'permission_denied', 'least of all themselves');
select is(pg_temp.as_user(5, format($$select public.set_member_role(%L, 'owner')$$, pg_temp.person(5))), 'own_membership', 'nor does an admin');
select is(pg_temp.as_user(5, format($$select public.set_member_role(%L, 'owner')$$, pg_temp.person(4))), 'owner_required', 'An admin makes no owner');
select is(pg_temp.as_user(5, format($$select public.set_member_role(%L, 'member')$$, pg_temp.person(1))), 'owner_required', 'and unmakes none');
select is(pg_temp.as_user(5, format($$select public.set_member_status(%L, 'suspended')$$, pg_temp.person(1))), 'owner_required', 'nor suspends one');
select is(pg_temp.as_user(5, format($$select public.remove_member(%L)$$, pg_temp.person(1))), 'owner_required', 'nor removes one');
select is(pg_temp.as_user(5, format($$select public.set_member_role(%L, 'member', %L)$$, pg_temp.person(4), pg_temp.role_of(1, 'Owner'))),
  'permission_denied', 'An admin gives no role that may more than they');
select is(pg_temp.as_user(5, format($$select public.set_member_role(%L, 'platform_admin')$$, pg_temp.person(4))), 'invalid_system_role',
  'Nobody makes a platform admin');
select is(pg_temp.as_user(5, format($$select public.set_member_role(%L, 'admin')$$, pg_temp.person(2))), 'member_not_found', 'Another organization''s member is not there');
select is(pg_temp.as_user(5, format($$select public.set_member_role(%L, 'member', %L)$$, pg_temp.person(4), pg_temp.role_of(2, 'Member'))),
  'role_not_found', 'nor is its role');
select ok(pg_temp.as_user(5, format($$select public.set_member_role(%L, 'admin')$$, pg_temp.person(4))) like '{%', 'An admin makes an admin');
select is(pg_temp.member(4), 'One admin active', 'and it is so');
insert into public.roles (id, organization_id, name, permissions)
select '00000000-0000-4000-9000-00000e000001', organization_id, 'Keeper', '["organization.manage", "member.manage"]'
from public.profiles where id = pg_temp.person(1);
select ok(pg_temp.as_user(1, format($$select public.set_member_role(%L, 'member', '00000000-0000-4000-9000-00000e000001')$$, pg_temp.person(4))) like '{%',
  'An owner gives any role');
select is(pg_temp.member(4), 'One member active Keeper', 'which then decides');
select is(pg_temp.as_user(5, format($$select public.remove_member(%L)$$, pg_temp.person(4))), 'permission_denied', 'Nobody removes who may more than they');
select is(pg_temp.as_user(4, format($$select public.set_member_role(%L, 'admin')$$, pg_temp.person(5))), 'permission_denied',
  'Member management alone does not change who holds other permissions');
select is(pg_temp.as_user(4, $$select public.create_invitation('x@one.test', 'admin')$$), 'permission_denied', 'nor invite to more');
select is(pg_temp.as_user(5, $$update public.profiles set system_role = 'owner', organization_id = null returning 'made'$$), '42501', 'No column of a membership is written by hand');
select is(pg_temp.as_user(5, $$update public.profiles set acting_for = id, acting_until = 'infinity' returning 'made'$$), '42501', 'nor that one acts for somebody');

-- Suspended, removed, left.
insert into public.projects (organization_id, name, created_by) select organization_id, 'Of five', id from public.profiles where id = pg_temp.person(5);
insert into public.leads (organization_id, name, assigned_to, created_by)
select organization_id, 'Lead of five', id, id from public.profiles where id = pg_temp.person(5);
insert into public.websocket_sessions (organization_id, kind, user_id, connection_id)
select organization_id, 'dashboard', id, 'five' from public.profiles where id = pg_temp.person(5);
select is(pg_temp.as_user(5, $$select count(*) from public.leads$$), '1', 'A member sees the leads');
select pg_temp.as_user(1, format($$select public.set_member_status(%L, 'suspended')$$, pg_temp.person(5)));
select is(pg_temp.as_user(5, $$select count(*) from public.leads$$), '0', 'a suspended one nothing');
select is(pg_temp.as_user(5, $$select public.get_auth_org_id()$$), null, 'and has no organization');
select is((select count(*) from public.websocket_sessions where connection_id = 'five'), 0::bigint, 'and no socket');
select is(pg_temp.as_user(5, $$select public.leave_organization()$$), 'suspended', 'which they cannot leave');
select is(pg_temp.as_user(1, format($$select public.set_member_status(%L, 'archived')$$, pg_temp.person(5))), 'invalid_status', 'Archived is what removing does');
select pg_temp.as_user(1, format($$select public.set_member_status(%L, 'active')$$, pg_temp.person(5)));
select is(pg_temp.as_user(5, $$select count(*) from public.leads$$), '1', 'Let in again they see them again');
select pg_temp.as_user(1, format($$select public.remove_member(%L)$$, pg_temp.person(5)));
select is(pg_temp.member(5), 'One member archived', 'Who is removed keeps a place in history');
select is(pg_temp.as_user(5, $$select count(*) from public.leads$$), '0', 'and sees nothing');
select is((select assigned_to from public.leads where name = 'Lead of five'), null, 'Their leads are nobody''s');
insert into made select 'adam again', pg_temp.as_user(2, $$select public.create_invitation('adam@one.test')$$)::jsonb;
select pg_temp.as_user(5, format($$select public.accept_invitation(%L)$$, (select answer ->> 'token' from made where name = 'adam again')));
select is(pg_temp.member(5), 'Two member active', 'They can join another organization');
select is((select created_by from public.projects where name = 'Of five'), null, 'whose members the first one''s rows do not name');
select is(pg_temp.as_user(1, $$select public.leave_organization()$$), 'last_owner', 'The last owner stays');
select pg_temp.as_user(1, format($$select public.set_member_role(%L, 'owner')$$, pg_temp.person(4)));
select ok(pg_temp.as_user(1, $$select public.leave_organization()$$) like '{"left"%', 'and may leave when there is another');
select is(
  (select string_agg(action, ' ' order by created_at, id) from public.audit_logs where entity_type = 'profile' and entity_id = pg_temp.person(5)),
  'member.joined member.suspended member.reactivated member.removed member.left member.joined', 'All of it is on record');
select is(
  (select string_agg(action, ' ' order by id) from public.audit_logs where entity_type = 'invitation' and metadata::text like '%fourth@one.test%'
    or entity_type = 'invitation' and entity_id = (select id from public.invitations where email = 'fourth@one.test') and action = 'invitation.revoked'),
  'invitation.created invitation.revoked', 'invitations too');
select is(
  (select metadata -> 'token_sha256' from public.audit_logs where action = 'invitation.created' limit 1), '"changed"'::jsonb,
  'but for what is secret in them');

select * from finish();
rollback;
