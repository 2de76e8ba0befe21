-- Walls: who sees and changes what of plans, usage and invoices.
begin;
set local search_path = public, extensions, tap;
select plan(191);

-- Organizations and plans of this test alone: Metered charges 999.00 a month, includes 60 minutes and sells more at 6.00 a minute;
-- Capped allows three calls; Yearly is a year of Metered; the issuer sits in Karnataka.
insert into private.billing_issuer (legal_name, state_code, country_code, timezone)
values ('Issuer', 'KA', 'IN', 'Asia/Kolkata')
on conflict on constraint billing_issuer_pkey do update
set legal_name = 'Issuer', state_code = 'KA', country_code = 'IN', timezone = 'Asia/Kolkata', payment_terms_days = 15;
insert into public.tax_rates (country_code, scope, name, rate_bp, position)
values
  ('IN', 'intra_state', 'CGST', 900, 10), ('IN', 'intra_state', 'SGST', 900, 20), ('IN', 'inter_state', 'IGST', 1800, 10),
  ('GB', 'any', 'VAT', 2000, 10)
on conflict on constraint tax_rates_version_key do nothing;
insert into public.meters (key, name, unit) values ('test_messages', 'Test messages', 'message');
insert into public.subscription_plans (id, slug, name)
values
  ('00000000-0000-4000-a000-000000000001', 'test-metered', 'Metered'),
  ('00000000-0000-4000-a000-000000000002', 'test-capped', 'Capped'),
  ('00000000-0000-4000-a000-000000000003', 'test-seconds', 'Seconds');
insert into public.plan_prices (id, plan_id, version, billing_cycle, base_minor)
values
  ('00000000-0000-4000-b000-000000000001', '00000000-0000-4000-a000-000000000001', 1, 'monthly', 99900),
  ('00000000-0000-4000-b000-000000000002', '00000000-0000-4000-a000-000000000002', 1, 'monthly', 0),
  ('00000000-0000-4000-b000-000000000003', '00000000-0000-4000-a000-000000000003', 1, 'monthly', 0),
  ('00000000-0000-4000-b000-000000000004', '00000000-0000-4000-a000-000000000001', 1, 'yearly', 999000);
insert into public.plan_price_meters (plan_price_id, meter_key, included_units, overage_price_minor, overage_unit, limit_units, hard)
values
  ('00000000-0000-4000-b000-000000000001', 'ai_calls', -1, null, 1, -1, false),
  ('00000000-0000-4000-b000-000000000001', 'call_seconds', 3600, 600, 60, 3600, true),
  ('00000000-0000-4000-b000-000000000002', 'ai_calls', 3, null, 1, 3, true),
  ('00000000-0000-4000-b000-000000000002', 'call_seconds', -1, null, 1, null, false),
  ('00000000-0000-4000-b000-000000000003', 'call_seconds', 3000, null, 1, 3000, true),
  ('00000000-0000-4000-b000-000000000004', 'call_seconds', 43200, 600, 60, -1, false);
insert into public.organizations (id, name, timezone, country_code, state_code)
values
  ('00000000-0000-4000-8000-000000000001', 'Near', 'Asia/Kolkata', 'IN', 'KA'),
  ('00000000-0000-4000-8000-000000000002', 'Far', 'Asia/Kolkata', 'IN', 'MH'),
  ('00000000-0000-4000-8000-000000000003', 'Abroad', 'Europe/London', 'GB', null),
  ('00000000-0000-4000-8000-000000000004', 'Elsewhere', 'America/New_York', 'US', 'NY'),
  ('00000000-0000-4000-8000-000000000005', 'Small', 'Asia/Kolkata', 'IN', 'MH'),
  ('00000000-0000-4000-8000-000000000006', 'Islands', 'Europe/London', 'GB', null);

create function pg_temp.subscribe(org integer, plan text, at timestamptz, status text default 'active', cycle text default 'monthly') returns uuid
language sql as $$
  select private.subscribe_organization(
    ('00000000-0000-4000-8000-00000000000' || org)::uuid, plan, status::public.subscription_status, at, cycle::public.billing_cycle)
$$;
create function pg_temp.reserve(org integer, meter text, quantity bigint, at timestamptz) returns boolean
language sql as $$ select private.reserve_usage(('00000000-0000-4000-8000-00000000000' || org)::uuid, meter, quantity, at) $$;
create function pg_temp.end_call(org integer, attempt integer, seconds integer, ended timestamptz, at timestamptz, direction text default 'outbound')
returns void
language sql as $$
  select private.meter_call(
    jsonb_populate_record(null::public.call_logs, jsonb_build_object(
      'id', '00000000-0000-4000-9000-' || lpad(attempt::text, 12, '0'),
      'organization_id', '00000000-0000-4000-8000-00000000000' || org,
      'direction', direction, 'ended_at', ended, 'bill_duration_seconds', seconds)),
    at)
$$;
create function pg_temp.counter(org integer, meter text) returns text
language sql as $$
  select string_agg(format('%s: %s used, %s held', period_start, usage_count, reserved), '; ' order by period_start)
  from public.usage_logs
  where organization_id = ('00000000-0000-4000-8000-00000000000' || org)::uuid and feature_key = meter
$$;

insert into auth.users (id, email)
select ('00000000-0000-4000-c000-00000000000' || n)::uuid, format('user%s@example.com', n) from generate_series(1, 4) as n;
update public.profiles set organization_id = '00000000-0000-4000-8000-000000000001', system_role = 'owner'
where id = '00000000-0000-4000-c000-000000000001';
update public.profiles set organization_id = '00000000-0000-4000-8000-000000000002', system_role = 'owner'
where id = '00000000-0000-4000-c000-000000000002';
insert into public.roles (id, organization_id, name, permissions)
values ('00000000-0000-4000-d000-000000000001', '00000000-0000-4000-8000-000000000001', 'Caller', '["lead.view"]');
update public.profiles
set organization_id = '00000000-0000-4000-8000-000000000001', role_id = '00000000-0000-4000-d000-000000000001'
where id = '00000000-0000-4000-c000-000000000003';

-- What a query gives as somebody: one value, or the code of the error.
create function pg_temp.as_role(role text, person integer, query text) returns text
language plpgsql as $$
declare
  before text := current_setting('role');
  answer text;
begin
  perform set_config('request.jwt.claims',
    coalesce(jsonb_build_object('sub', '00000000-0000-4000-c000-00000000000' || person, 'role', role)::text, ''), true);
  perform set_config('role', role, true);
  begin
    execute query into answer;
  exception
    when sqlstate 'PGRST' then answer := sqlerrm::jsonb ->> 'code';
    when others then answer := sqlstate;
  end;
  perform set_config('role', before, true);
  return answer;
end
$$;

select isnt(pg_temp.subscribe(org, 'test-metered', '2026-01-01T10:00Z'), null, format('organization %s subscribes', org))
from generate_series(1, 2) as org;
select pg_temp.end_call(org, org, 4000, '2026-01-10T10:00Z', '2026-01-10T10:00Z') from generate_series(1, 2) as org;
update public.subscriptions set next_invoice_at = null where organization_id not in (
  '00000000-0000-4000-8000-000000000001', '00000000-0000-4000-8000-000000000002');
select is(private.close_periods('{}', '2026-02-01T10:00Z') ->> 'closed', '2', 'both are billed');
insert into public.subscription_plans (slug, name, is_public) values ('test-private', 'Private', false);

-- Each table: an owner sees their own organization's rows, a colleague without the permission none, a stranger none.
select is(
  pg_temp.as_role('authenticated', 1, format('select count(distinct organization_id) || '' '' || (count(*) > 0) from public.%I', name)),
  '1 true', format('an owner sees their organization''s %s', name)
)
from unnest(array['subscriptions', 'usage_logs', 'usage_days', 'invoices', 'invoice_lines', 'invoice_taxes']) as name;
select is(
  pg_temp.as_role('authenticated', person, format('select count(*) from public.%I', name)),
  '0', format('%s sees no %s', case person when 3 then 'a member without the permission' else 'a user without an organization' end, name)
)
from unnest(array['subscriptions', 'usage_logs', 'usage_days', 'invoices', 'invoice_lines', 'invoice_taxes']) as name,
  unnest(array[3, 4]) as person;
select is(
  pg_temp.as_role('anon', null, format('select count(*) from public.%I', name)), '42501', format('a visitor may not ask for %s', name)
)
from unnest(array['meters', 'subscriptions', 'usage_logs', 'usage_days', 'invoices', 'invoice_lines', 'invoice_taxes', 'tax_rates']) as name;
select is(
  pg_temp.as_role('anon', null, $$ select string_agg(slug, ' ' order by slug) from public.subscription_plans where slug like 'test-%' $$),
  'test-capped test-metered test-seconds', 'a visitor sees the plans on offer'
);
select is(
  pg_temp.as_role('anon', null, $$ select count(*) from public.plan_price_meters as term join public.plan_prices as price
    on price.id = term.plan_price_id where price.plan_id = '00000000-0000-4000-a000-000000000001' $$),
  '3', 'and what they include'
);

-- Nobody writes: neither a user, nor a handler.
select is(
  pg_temp.as_role(role, case role when 'authenticated' then 1 end, format(statement, name)), '42501',
  format('%s: %s', role, format(statement, name))
)
from unnest(array['authenticated', 'service_role', 'anon']) as role,
  unnest(array[
    'meters', 'subscription_plans', 'plan_prices', 'plan_price_meters', 'subscriptions', 'usage_logs', 'usage_days', 'invoices',
    'invoice_lines', 'invoice_taxes', 'tax_rates'
  ]) as name,
  unnest(array['insert into public.%I default values', 'delete from public.%I', 'truncate public.%I']) as statement;
select is(
  pg_temp.as_role('authenticated', 1, 'update public.invoices set amount_paid_minor = total_minor, status = ''paid'''), '42501',
  'an owner does not mark their invoice as paid'
);
select is(
  pg_temp.as_role(role, 1, format('select count(*) from private.%I', name)), '42501', format('%s does not read private.%s', role, name)
)
from unnest(array['authenticated', 'service_role', 'anon']) as role,
  unnest(array['usage_keys', 'usage_events', 'invoice_series', 'billing_issuer']) as name;

-- Who calls what.
select is(
  has_function_privilege(role, signature, 'execute'), allowed, format('%s %s call %s', role, case when allowed then 'may' else 'may not' end, signature)
)
from (
  values
    ('service_role', 'public.record_usage(jsonb)', true), ('service_role', 'public.close_periods(jsonb)', true),
    ('authenticated', 'public.record_usage(jsonb)', false), ('authenticated', 'public.close_periods(jsonb)', false),
    ('anon', 'public.record_usage(jsonb)', false), ('anon', 'public.close_periods(jsonb)', false),
    ('authenticated', 'public.get_usage()', true), ('anon', 'public.get_usage()', false),
    ('authenticated', 'private.reserve_usage(uuid, text, bigint, timestamptz)', false),
    ('authenticated', 'private.release_usage(uuid, text, bigint, timestamptz)', false),
    ('authenticated', 'private.meter_call(public.call_logs, timestamptz)', false),
    ('authenticated', 'private.subscribe_organization(uuid, text, public.subscription_status, timestamptz, public.billing_cycle)', false),
    ('service_role', 'private.subscribe_organization(uuid, text, public.subscription_status, timestamptz, public.billing_cycle)', false)
) as v (role, signature, allowed);
select is(
  pg_temp.as_role('authenticated', 1, $$ select private.get_usage('2026-01-15T10:00Z') -> 'plan' ->> 'slug' $$), 'test-metered',
  'an owner reads their usage'
);
select is(
  pg_temp.as_role('authenticated', 1, $$
    select string_agg(concat_ws(' ', meter ->> 'meter', meter ->> 'used', coalesce(meter ->> 'included', 'all'), meter ->> 'overage'), ', ')
    from jsonb_array_elements(private.get_usage('2026-01-15T10:00Z') -> 'meters') as meter $$),
  'ai_calls 0 all 0, call_seconds 0 3600 0', 'of the current period: the calls of January are billed'
);
select is(pg_temp.as_role('authenticated', 3, 'select public.get_usage()'), 'permission_denied', 'a member without the permission does not');
select is(pg_temp.as_role('authenticated', 4, 'select public.get_usage()'), 'no_organization', 'nor does a user without an organization');

-- An open invoice is final.
create function pg_temp.invoice() returns uuid
language sql as $$ select id from public.invoices where organization_id = '00000000-0000-4000-8000-000000000001' $$;
set constraints all immediate;
select throws_ok(format(statement, pg_temp.invoice()), '23514', null, statement)
from unnest(array[
  'update public.invoices set subtotal_minor = 1, total_minor = 1 + tax_minor where id = %L',
  'update public.invoices set invoice_number = ''INV-202601-99999'' where id = %L',
  'update public.invoices set customer = ''{}'' where id = %L',
  'update public.invoices set status = ''draft'', invoice_number = null where id = %L',
  'update public.invoices set status = ''paid'' where id = %L',
  'update public.invoices set amount_paid_minor = total_minor + 1 where id = %L',
  'delete from public.invoices where id = %L',
  'update public.invoice_lines set amount_minor = 0 where invoice_id = %L',
  'delete from public.invoice_lines where invoice_id = %L',
  'insert into public.invoice_lines (organization_id, invoice_id, position, kind, description, quantity, unit, unit_price_minor, amount_minor)
     values (''00000000-0000-4000-8000-000000000001'', %L, 9, ''base'', ''x'', 1, ''x'', 0, 0)',
  'update public.invoice_taxes set amount_minor = 0 where invoice_id = %L',
  'delete from public.invoice_taxes where invoice_id = %L'
]) as statement;
select throws_ok(
  $$ insert into public.invoice_lines (organization_id, invoice_id, position, kind, description, quantity, unit, unit_price_minor, amount_minor)
     values ('00000000-0000-4000-8000-000000000002', pg_temp.invoice(), 9, 'base', 'x', 1, 'x', 0, 0) $$,
  '23503', null, 'no line is put on another organization''s invoice'
);
select throws_ok(
  $$ insert into public.invoices (organization_id, subscription_id, currency, period_start, period_end, timezone, first_day, last_day,
       subtotal_minor, tax_minor, total_minor, issuer, customer)
     select organization_id, subscription_id, currency, period_start, period_end, timezone, first_day, last_day, 0, 0, 0, issuer, customer
     from public.invoices where id = pg_temp.invoice() $$,
  '23505', null, 'no period is billed twice'
);
select throws_ok(
  $$ delete from public.organizations where id = '00000000-0000-4000-8000-000000000001' $$, '23503', null,
  'an organization with fiscal records is not deleted'
);
select is(
  private.record_payment(
    (select jsonb_build_object('gateway', 'manual', 'payment_id', 'transfer', 'status', 'captured', 'amount_minor', total_minor, 'currency', currency,
      'invoice_id', id) from public.invoices where id = pg_temp.invoice()), now()) #>> '{invoice,status}', 'paid', 'it can be paid'
);
select throws_ok($$ update public.invoices set status = 'void' where id = pg_temp.invoice() $$, '23514', null, 'and then not be voided');
select lives_ok(
  $$ update public.invoices set status = 'void' where organization_id = '00000000-0000-4000-8000-000000000002' $$, 'an open one can be voided'
);
select isnt(
  (select invoice_number from public.invoices where organization_id = '00000000-0000-4000-8000-000000000002'), null, 'and keeps its number'
);

-- A draft becomes open only if it adds up, and gets its number then.
with draft as (
  insert into public.invoices (id, organization_id, currency, period_start, period_end, timezone, first_day, last_day, subtotal_minor,
    tax_minor, total_minor, issuer, customer)
  select ('00000000-0000-4000-e000-00000000000' || n)::uuid, '00000000-0000-4000-8000-000000000001', 'INR', '2030-01-01', '2030-02-01',
    'Asia/Kolkata', '2030-01-01', '2030-01-31', 100, 0, 100, '{"timezone": "Asia/Kolkata", "payment_terms_days": 7}', '{}'
  from generate_series(1, 3) as n
  returning id, organization_id
)
insert into public.invoice_lines (organization_id, invoice_id, position, kind, description, quantity, unit, unit_price_minor, amount_minor)
select organization_id, id, 1, 'base', 'x', 1, 'x', 100, case when right(id::text, 1) = '1' then 99 else 100 end
from draft;
select throws_ok(
  $$ update public.invoices set status = 'open', finalized_at = '2031-01-31T18:00Z' where id = '00000000-0000-4000-e000-000000000001' $$,
  '23514', null, 'a draft whose lines miss its subtotal does not become open'
);
select throws_ok(
  $$ update public.invoices set status = 'paid', amount_paid_minor = 100, paid_at = now() where id = '00000000-0000-4000-e000-000000000002' $$,
  '23514', null, 'a draft is not paid'
);
select lives_ok(
  $$ update public.invoices set status = 'open', finalized_at = '2031-01-31T18:29:59Z' where id = '00000000-0000-4000-e000-000000000002' $$,
  'one that adds up does'
);
select lives_ok(
  $$ update public.invoices set status = 'open', finalized_at = '2031-01-31T18:30Z' where id = '00000000-0000-4000-e000-000000000003' $$,
  'and the next, a second later'
);
select results_eq(
  $$ select invoice_number, invoice_date, due_date from public.invoices where period_start = '2030-01-01' and status = 'open' order by 1 $$,
  $$ values ('INV-203101-00001', '2031-01-31'::date, '2031-02-07'::date), ('INV-203102-00001', '2031-02-01'::date, '2031-02-08'::date) $$,
  'each numbered in its own month of the issuer''s calendar: the refused one left no gap'
);

-- A price that was sold does not change.
select throws_ok(statement, '23514', null, statement)
from unnest(array[
  $$ update public.plan_prices set base_minor = 1 where id = '00000000-0000-4000-b000-000000000001' $$,
  $$ delete from public.plan_prices where id = '00000000-0000-4000-b000-000000000001' $$,
  $$ update public.plan_price_meters set included_units = 1 where plan_price_id = '00000000-0000-4000-b000-000000000001' $$,
  $$ delete from public.plan_price_meters where plan_price_id = '00000000-0000-4000-b000-000000000001' $$,
  $$ insert into public.plan_price_meters (plan_price_id, meter_key) values ('00000000-0000-4000-b000-000000000001', 'test_messages') $$
]) as statement;
select lives_ok(
  $$ update public.plan_prices set retired_at = now() where id = '00000000-0000-4000-b000-000000000001' $$, 'it can be taken off sale'
);
select lives_ok(
  $$ update public.plan_price_meters set included_units = 4 where plan_price_id = '00000000-0000-4000-b000-000000000003' $$,
  'a price that nobody bought can be corrected'
);

select * from finish();
rollback;
