-- What Supabase adds to a cluster: its roles, their memberships and their limits.
--
-- Run once a cluster, by the superuser `supabase_admin`, before supabase_compat.sql; running it again changes nothing.
-- Roles that log in get their passwords from whoever started the server.

set client_min_messages = warning;

do $$
declare
  wanted record;
begin
  for wanted in
    select *
    from (values
      -- The API's roles: PostgREST switches to one of them by the `role` claim of a token.
      ('anon',                'nologin inherit'),
      ('authenticated',       'nologin inherit'),
      ('service_role',        'nologin inherit bypassrls'),
      -- PostgREST's own login, which may do nothing but switch.
      ('authenticator',       'login noinherit'),
      -- What a customer of Supabase is: nearly everything, and no superuser.
      ('postgres',            'login createdb createrole replication bypassrls nosuperuser'),
      ('supabase_auth_admin', 'login noinherit createrole')
    ) as role (name, options)
  loop
    if not exists (select from pg_catalog.pg_roles where rolname = wanted.name) then
      execute format('create role %I', wanted.name);
    end if;
    execute format('alter role %I %s', wanted.name, wanted.options);
  end loop;
end
$$;

grant anon, authenticated, service_role to authenticator;
grant anon, authenticated, service_role to postgres with admin option;
grant pg_monitor, pg_read_all_data, pg_signal_backend to postgres;

-- A request that takes longer is cancelled (SQLSTATE 57014), here as there.
alter role anon set statement_timeout = '3s';
alter role authenticated set statement_timeout = '8s';
alter role authenticator set statement_timeout = '8s';
alter role authenticator set lock_timeout = '8s';

alter role postgres set search_path = "$user", public, extensions;
alter role supabase_admin set search_path = "$user", public, auth, extensions;
alter role supabase_auth_admin set search_path = auth;
