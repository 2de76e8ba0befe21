-- The walls of every table and function, read from the catalog: a table or function made tomorrow is judged by the same.
begin;
set local search_path = public, extensions, tap;
select plan(20);

create view pg_temp.tables as
select class.oid, class.oid::regclass::text as name, namespace.nspname as schema, class.relrowsecurity, class.relforcerowsecurity
from pg_class as class
join pg_namespace as namespace on namespace.oid = class.relnamespace
where namespace.nspname in ('public', 'private') and class.relkind in ('r', 'p')
  and not exists (select from pg_depend as dependency where dependency.objid = class.oid and dependency.deptype = 'e');
create view pg_temp.routines as
select routine.oid, routine.oid::regprocedure::text as name, namespace.nspname as schema, routine.prosecdef, routine.proconfig
from pg_proc as routine
join pg_namespace as namespace on namespace.oid = routine.pronamespace
where namespace.nspname in ('public', 'private')
  and not exists (select from pg_depend as dependency where dependency.objid = routine.oid and dependency.deptype = 'e');

select is_empty(
  $$select name from pg_temp.tables where not (relrowsecurity and relforcerowsecurity)$$,
  'Row level security is on and forced for every table'
);
select is_empty(
  $$select name from pg_temp.tables as t where not exists (select from pg_policy as policy where policy.polrelid = t.oid)$$,
  'Every table has a policy, if only one that admits nobody'
);
select is_empty(
  $$select name, role from pg_temp.tables, unnest(array['anon', 'authenticated', 'service_role']) as role
    where schema = 'private' and has_table_privilege(role, oid, 'select, insert, update, delete, truncate, references, trigger')$$,
  'No role of the API holds anything on a private table'
);
select is_empty(
  $$select name, role, privilege from pg_temp.tables, unnest(array['anon', 'authenticated', 'service_role']) as role,
      unnest(array['truncate', 'references', 'trigger']) as privilege
    where has_table_privilege(role, oid, privilege)$$,
  'What Supabase grants by default is taken back: nobody truncates'
);
select is_empty(
  $$select name, privilege from pg_temp.tables, unnest(array['insert', 'update', 'delete']) as privilege
    where has_table_privilege('service_role', oid, privilege)
      or privilege <> 'delete' and has_any_column_privilege('service_role', oid, privilege)$$,
  'The handlers'' role writes through functions alone'
);
select set_eq(
  $$select name from pg_temp.tables where has_any_column_privilege('anon', oid, 'select, insert, update')$$,
  array['subscription_plans', 'plan_prices', 'plan_price_meters'],
  'A visitor sees the price list and nothing else'
);
select is_empty(
  $$select name, privilege from pg_temp.tables, unnest(array['insert', 'update']) as privilege
    where schema = 'public' and has_table_privilege('authenticated', oid, privilege)$$,
  'A user writes by columns that are named, never a whole row'
);
select set_eq(
  $$select t.name || '.' || attribute.attname
    from pg_temp.tables as t
    join pg_attribute as attribute on attribute.attrelid = t.oid and attribute.attnum > 0 and not attribute.attisdropped
    where attribute.attname in ('organization_id', 'status', 'system_role', 'role_id', 'created_by', 'created_at', 'updated_at', 'call_status')
      and (
        has_column_privilege('authenticated', t.oid, attribute.attnum, 'insert')
        or has_column_privilege('authenticated', t.oid, attribute.attnum, 'update')
      )$$,
  -- A project is active or archived and a lead is new or lost as its users say; no machine hangs on either.
  array['projects.status', 'leads.status', 'products.status'],
  'No user writes a tenant, a role, an author, a time or the state of anything that the system moves'
);
select is_empty(
  $$select policy.polrelid::regclass, policy.polname from pg_policy as policy
    join pg_temp.tables as t on t.oid = policy.polrelid
    where policy.polcmd in ('a', 'w', '*') and policy.polwithcheck is null$$,
  'Every policy that lets write says what may be written'
);
select is_empty(
  $$select polrelid::regclass, polcmd, role, count(*)
    from pg_policy
    join pg_temp.tables as t on t.oid = polrelid, unnest(polroles) as role
    where polpermissive
    group by 1, 2, 3 having count(*) > 1$$,
  'One permissive policy a table, action and role'
);
select is_empty(
  $$select t.name from pg_temp.tables as t
    where exists (
        select from pg_attribute as attribute
        where attribute.attrelid = t.oid and attribute.attname = 'updated_at' and not attribute.attisdropped
      )
      and not exists (
        select from pg_trigger as trigger
        where trigger.tgrelid = t.oid and trigger.tgfoid = 'private.update_modified_column()'::regprocedure
      )$$,
  'Every updated_at is kept by update_modified_column()'
);
select is_empty(
  $$select reference.conrelid::regclass, reference.conname
    from pg_constraint as reference
    join pg_temp.tables as child on child.oid = reference.conrelid and child.schema = 'public'
    where reference.contype = 'f'
      and reference.confrelid not in ('public.organizations'::regclass, 'public.carrier_accounts'::regclass)
      and exists (
        select from pg_attribute as attribute
        where attribute.attrelid = reference.conrelid and attribute.attname = 'organization_id' and not attribute.attisdropped
      )
      and exists (
        select from pg_attribute as attribute
        where attribute.attrelid = reference.confrelid and attribute.attname = 'organization_id' and not attribute.attisdropped
      )
      and not (
        select bool_or(own.attname = 'organization_id' and theirs.attname = 'organization_id')
        from unnest(reference.conkey, reference.confkey) as pair (child, parent)
        join pg_attribute as own on own.attrelid = reference.conrelid and own.attnum = pair.child
        join pg_attribute as theirs on theirs.attrelid = reference.confrelid and theirs.attnum = pair.parent
      )$$,
  'A reference from one tenant''s row to another row carries the tenant'
);
select is_empty(
  $$select t.name from pg_temp.tables as t
    where t.schema = 'public'
      and exists (select from pg_attribute as a where a.attrelid = t.oid and a.attname = 'organization_id' and not a.attisdropped)
      and not exists (
        select
        from pg_index as index
        join pg_attribute as lead on lead.attrelid = t.oid and lead.attnum = index.indkey[0]
        where index.indrelid = t.oid and lead.attname = 'organization_id'
      )$$,
  'Under every policy lies an index that starts with the tenant'
);
select is_empty(
  $$select name from pg_temp.routines where not exists (select from unnest(proconfig) as setting where setting like 'search_path=%')$$,
  'Every function names its search path'
);
select is_empty(
  $$select name from pg_temp.routines where schema = 'public' and prosecdef$$,
  'What the API exposes runs as the caller; definer bodies are private'
);
select is_empty(
  $$select name, role from pg_temp.routines, unnest(array['public', 'anon']) as role where has_function_privilege(role, oid, 'execute')$$,
  'Nobody unknown executes any function'
);
select is_empty(
  $$select name from pg_temp.routines
    where has_function_privilege('authenticated', oid, 'execute') and has_function_privilege('service_role', oid, 'execute')
      and name <> 'private.clock_now()'$$,
  'A function is for users or for handlers, never for both'
);
select set_eq(
  $$select name from pg_temp.routines where schema = 'public' and has_function_privilege('service_role', oid, 'execute')$$,
  array[
    'claim_deliveries(jsonb)', 'begin_deliveries(jsonb)', 'record_deliveries(jsonb)',
    'apply_event(jsonb)', 'open_inbound_call(jsonb)', 'open_source(jsonb)', 'sweep_events(jsonb)', 'ingest_leads(jsonb)', 'claim_carrier_check(jsonb)', 'store_carrier_records(jsonb)', 'claim_restore_page(jsonb)', 'book_calls(jsonb)', 'release_calls(jsonb)', 'begin_dials(jsonb)', 'record_dials(jsonb)',
    'reconcile_calls(jsonb)', 'open_hangup(jsonb)', 'reconcile_usage(jsonb)', 'record_usage(jsonb)', 'hold_usage(jsonb)', 'release_usage_hold(jsonb)', 'expire_usage_holds(jsonb)', 'open_usage(jsonb)', 'close_periods(jsonb)', 'open_payment(jsonb)', 'record_payment(jsonb)',
    'record_refund(jsonb)', 'save_payment_method(jsonb)', 'remove_payment_method(jsonb)', 'issue_credit_note(jsonb)', 'expire_credit(jsonb)', 'renew_credit(jsonb)',
    'open_websocket(jsonb)', 'ping_websockets(jsonb)', 'close_websocket(jsonb)', 'reap_websockets(jsonb)', 'reap_impersonations(jsonb)', 'judge_transfer(jsonb)',
    'roll_up_call_analytics(jsonb)', 'auto_complete_inactive_conversations(jsonb)', 'expire_reservations(jsonb)',
    'claim_recordings(jsonb)', 'record_recordings(jsonb)', 'claim_deletions(jsonb)', 'record_deletions(jsonb)', 'apply_retention(jsonb)',
    'list_events(jsonb)', 'get_event(jsonb)', 'redrive_events(jsonb)', 'count_events(jsonb)', 'erase(jsonb)',
    'open_document(jsonb)', 'claim_collections(jsonb)', 'record_collections(jsonb)', 'request_refund(jsonb)'
  ],
  'The handlers'' role executes the handlers'' functions and no other'
);
select is_empty(
  $$select name from pg_temp.tables where obj_description(oid, 'pg_class') is null
    union all
    select name from pg_temp.routines where obj_description(oid, 'pg_proc') is null$$,
  'Every table and function says what it is for'
);
select is_empty(
  $$select role.rolname from pg_roles as role
    where role.rolname in ('anon', 'authenticated', 'service_role') and has_schema_privilege(role.oid, 'private', 'create')
    union all
    select 'anon' where has_schema_privilege('anon', 'private', 'usage')$$,
  'Schema private is closed to visitors, and nobody makes anything in it'
);

select * from finish();
rollback;
