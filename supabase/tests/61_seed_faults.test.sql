-- What was found wrong in the two seed systems and concerns the database: where a test shows that it is right here, and the tests that
-- stand nowhere else. (A: CallAI. B, C, D: Vantage's tenancy, calls, billing.)
--
--  A1   an install order that fails              tests/install.rs, tests/schemas.rs
--  A2   two orders at once, one is counted       tests/section_f.rs
--  A3   totals on reassignment, refund, currency 32_stores_totals
--  A4   another tenant's customer                31_stores_tenancy
--  A5   a late message                           33_stores_conversations
--  A6   durations, withheld numbers, status back 34_stores_calls
--  A7   NULL in a key, 500 percent, two primary  38_stores_settings, 35_stores_analytics, 31_stores_tenancy
--  A10  duplicates                               15_core_events
--  A11  two clocks in one comparison             38_stores_settings
--  A12  lines that are interleaved               31_stores_tenancy (one row an external id)
--  A14  a function that runs any statement       60_seed_names, and here
--  A16  secrets that are read                    36_stores_walls
--  A17  floats for money                         60_seed_names
--  A18  keys of no tenant                        11_core_tenancy
--  B1   a header that says who asks              here
--  B2   raising oneself, changing tenant         11_core_tenancy, and here
--  B3   policies that admit everybody            tests/isolation.rs (opens each one)
--  B4   a table without walls                    10_core_walls, 42_system_calling
--  B5   money functions anybody may call         28_ledger_walls, and here
--  B6   a ledger anybody writes                  28_ledger_walls
--  B7   keys that leave the tenant               10_core_walls, and here
--  B8   policies on a claim that is never there  here
--  B11  mass assignment                          10_core_walls, 16_core_campaigns, and here
--  B12  impersonation, audit without tenant      43_system_record
--  C1   a crash after the carrier accepted       14_core_dials
--  C2   the callback before the answer           14_core_dials
--  C3   a failed callback again                  15_core_events
--  C5   attempts used up                         15_core_events
--  C6   an opt-out with a retry pending          here
--  C7   a paused campaign in front               13_core_release
--  C8   windows                                  12_core_basics, 13_core_release
--  C10  the last two leads; cancel by completed  tests/section_f.rs; 16_core_campaigns
--  C11  a call counted twice                     15_core_events
--  C14  recording without consent, calls deleted here
--  D1   invoice numbers                          24_billing_walls, tests/section_f.rs
--  D2   a period billed twice, 31 January        20_billing_arithmetic, 23_billing_periods, section_f/billing.rs
--  D3   what credit paid billed again            29_ledger_holds
--  D4   arithmetic                               20_billing_arithmetic
--  D5   an upgrade without paying                24_billing_walls, 74_subscriptions
--  D6   payments of another amount, again, late  26_ledger_payments
--  D7   balances overwritten                     25_ledger_credit, tests/section_f.rs
--  D8   no subscription, and the gate open       13_core_release, and here
--  D9   two live subscriptions                   here
--  D10  -1 as a limit, limits two pass at once   here, 62_seed_details, section_f/billing.rs
--  D11  a plan edited under its subscribers      24_billing_walls, 73_pricing
--  D12  a unit freed that another deal holds     37_stores_inventory
begin;
set local search_path = public, extensions, tap;
select plan(40);

create function pg_temp.person(number integer) returns uuid
language sql immutable as $$ select ('00000000-0000-4000-8000-0000000f' || lpad(number::text, 4, '0'))::uuid $$;
create function pg_temp.as_user(number integer, query text, headers text default '{}') returns text
language plpgsql as $$
declare
  before text := current_setting('role');
  answer text;
begin
  perform set_config('request.headers', headers, true);
  perform set_config('request.jwt.claims', case when number is null then '{"role": "authenticated"}'
    else jsonb_build_object('sub', pg_temp.person(number), 'role', 'authenticated')::text end, true);
  perform set_config('role', 'authenticated', true);
  begin
    execute query into answer;
  exception
    when sqlstate 'PGRST' then answer := sqlerrm::jsonb ->> 'code';
    when others then answer := sqlstate;
  end;
  perform set_config('role', before, true);
  perform set_config('request.jwt.claims', '', true);
  perform set_config('request.headers', '', true);
  return answer;
end
$$;
create function pg_temp.org(number integer) returns uuid
language sql as $$ select organization_id from public.profiles where id = pg_temp.person(number) $$;
insert into private.clock_offset (shift) values (timestamptz '2026-11-24 10:00+05:30' - now())
on conflict (single) do update set shift = excluded.shift;
insert into auth.users (id, email) select pg_temp.person(n), format('person%s@faults.test', n) from generate_series(1, 3) as n;
select pg_temp.as_user(1, $$select public.create_organization('One')$$);
select pg_temp.as_user(2, $$select public.create_organization('Two')$$);
update public.profiles set organization_id = pg_temp.org(1) where id = pg_temp.person(3);

-- A14
select is_empty(
  $$select routine.oid::regprocedure from pg_catalog.pg_proc as routine
    join pg_catalog.pg_language as language on language.oid = routine.prolang
    where routine.pronamespace in ('public'::regnamespace, 'private'::regnamespace) and language.lanname = 'plpgsql'
      and (has_function_privilege('authenticated', routine.oid, 'execute') or has_function_privilege('service_role', routine.oid, 'execute'))
      and routine.prosrc ~* '\mexecute\s+(format|''|[a-z_]+\s*(;|into|using|\|\|))'$$,
  'A14: no function that anybody may call runs a statement that it puts together'
);

-- B1
select is(
  pg_temp.as_user(null, $$select public.get_auth_org_id()$$, jsonb_build_object('x-user-id', pg_temp.person(1))::text), null,
  'B1: who asks is said by the token; a header says nothing'
);
select is(pg_temp.as_user(2, $$select count(*) from public.organizations where name = 'One'$$, jsonb_build_object('x-user-id', pg_temp.person(1))::text),
  '0', 'B1: and gives no view');

-- B2
select is(pg_temp.as_user(3, format('update public.profiles set %s%s', change, condition)), '42501', format('B2: nobody does %s%s', change, condition))
from unnest(array[
  'system_role = ''platform_admin''', 'system_role = ''owner''', format('organization_id = %L', pg_temp.org(2)), 'role_id = null', 'status = ''active''',
  format('acting_for = %L', pg_temp.person(1))
]) as change
cross join unnest(array['', ' where id = auth.uid()']) as condition;
select is((select system_role || ' ' || (organization_id = pg_temp.org(1)) from public.profiles where id = pg_temp.person(3)), 'member true', 'B2: and is what they were');

-- B5
select is_empty(
  $$select routine.oid::regprocedure
    from pg_catalog.pg_proc as routine
    where routine.pronamespace in ('public'::regnamespace, 'private'::regnamespace)
      and has_function_privilege('authenticated', routine.oid, 'execute')
      and routine.proargnames::text[] && array['organization', 'organization_id', 'org_id', 'tenant', 'tenant_id']$$,
  'B5: no function of a user takes an organization'
);
select is_empty(
  $$select routine.oid::regprocedure
    from pg_catalog.pg_proc as routine
    where routine.pronamespace in ('public'::regnamespace, 'private'::regnamespace)
      and has_function_privilege('authenticated', routine.oid, 'execute')
      and routine.proname ~ '(credit|debit|invoice|payment|refund|subscri|meter)' and routine.provolatile = 'v'
      -- What one does with one's own subscription, or so that one's own invoice is paid, is told what to do and never an amount.
      and routine.proname !~ '^(request_payment_link|collect_invoice|forget_payment_method)$'
      and routine.proname !~ '^((change|cancel|pause|resume)_subscription|preview_subscription_change)$'$$,
  'B5: and none moves money'
);
select throws_ok(format('select private.debit_credit(%L, ''INR'', -5, ''negative'', now())', pg_temp.org(1)), null, null, 'B5: a debit of less than nothing is refused');

-- B7
insert into public.leads (organization_id, name, phone) values (pg_temp.org(1), 'L', '+917000009001'), (pg_temp.org(2), 'M', '+917000009002');
insert into public.campaigns (organization_id, name) values (pg_temp.org(1), 'C'), (pg_temp.org(2), 'D');
select throws_ok(
  $$insert into public.call_queue (organization_id, campaign_id, lead_id, next_retry_at)
    select campaign.organization_id, campaign.id, lead.id, now() from public.campaigns as campaign, public.leads as lead
    where campaign.name = 'D' and lead.name = 'L'$$,
  '23503', null, 'B7: no lead is queued in another organization''s campaign'
);
select throws_ok(
  $$insert into public.campaign_leads (organization_id, campaign_id, lead_id)
    select lead.organization_id, campaign.id, lead.id from public.campaigns as campaign, public.leads as lead
    where campaign.name = 'D' and lead.name = 'L'$$,
  '23503', null, 'B7: nor enrolled'
);

insert into public.carrier_accounts (id, organization_id, provider, account_sid, credentials_sealed, api_base)
values ('00000000-0000-4000-c000-0000000000f2', pg_temp.org(2), 'plivo', 'MAOTHER', 'sealed', 'https://carrier.example.test');
select throws_ok(format(statement, pg_temp.org(1)), 'PGRST', null, 'B7: nor does anything hang on its carrier account: ' || statement)
from unnest(array[
  $$insert into public.call_logs (organization_id, carrier_account_id, caller_number, callee_number, direction)
    values (%L, '00000000-0000-4000-c000-0000000000f2', '+15550001', '+15550002', 'inbound')$$,
  $$insert into public.caller_numbers (organization_id, carrier_account_id, phone_number) values (%L, '00000000-0000-4000-c000-0000000000f2', '+15550001')$$
]) as statement;
select throws_ok(format('update public.carrier_accounts set organization_id = %L where account_sid = ''MAOTHER''', pg_temp.org(1)), '23514', null, 'B7: which moves to nobody');
select is_empty(
  $$select fk.conrelid::regclass, fk.conname
    from pg_catalog.pg_constraint as fk
    where fk.contype = 'f' and fk.conparentid = 0
      and fk.confrelid not in ('public.organizations'::regclass, 'public.carrier_accounts'::regclass)
      and exists (select from pg_catalog.pg_attribute as a where a.attrelid = fk.confrelid and a.attname = 'organization_id' and not a.attisdropped)
      and not exists (
        select
        from unnest(fk.conkey, fk.confkey) as pair (own, theirs)
        join pg_catalog.pg_attribute as own on own.attrelid = fk.conrelid and own.attnum = pair.own and own.attname = 'organization_id'
          -- Where there may be none (of a person, of a source of the platform's own), a check says that there is then no such key either.
          and (own.attnotnull or exists (
            select
            from pg_catalog.pg_constraint as rule
            join pg_catalog.pg_attribute as named
              on named.attrelid = fk.conrelid and named.attnum = any (fk.conkey) and named.attname <> 'organization_id'
            where rule.conrelid = fk.conrelid and rule.contype = 'c' and rule.convalidated
              and pg_catalog.pg_get_constraintdef(rule.oid)
                = format('CHECK (((%I IS NULL) OR (organization_id IS NOT NULL)))', named.attname)
          ))
        join pg_catalog.pg_attribute as theirs on theirs.attrelid = fk.confrelid and theirs.attnum = pair.theirs and theirs.attname = 'organization_id'
      )$$,
  'B7: every key to a tenant''s row carries the tenant, which is never null, in whatever schema'
);
select is_empty(
  $$select fk.conrelid::regclass, fk.conname
    from pg_catalog.pg_constraint as fk
    where fk.contype = 'f'
      and exists (select from pg_catalog.pg_attribute as a where a.attrelid = fk.conrelid and a.attname = 'store_id' and not a.attisdropped)
      and exists (select from pg_catalog.pg_attribute as a where a.attrelid = fk.confrelid and a.attname = 'store_id' and not a.attisdropped)
      and not exists (
        select from pg_catalog.pg_attribute as a where a.attrelid = fk.conrelid and a.attname = 'store_id' and a.attnum = any (fk.conkey)
      )$$,
  'B7: and between the rows of a store the store'
);

-- B8
select is_empty(
  $$select polrelid::regclass, polname from pg_catalog.pg_policy
    where coalesce(pg_get_expr(polqual, polrelid), '') || coalesce(pg_get_expr(polwithcheck, polrelid), '') ~ '(jwt|current_setting|raw_user_meta|user_metadata)'$$,
  'B8: no policy asks a claim or a setting'
);

-- B11
select is(pg_temp.as_user(1, format('update public.campaigns set %s where name = ''C'' returning name', change)), '42501', 'B11: a draft takes no ' || change)
from unnest(array['status = ''running''', 'total_calls = 0', format('organization_id = %L', pg_temp.org(2)), 'completed_at = now()']) as change;

-- C6: the first attempt was busy, the second one is due, and then the person opts out.
insert into public.carrier_accounts (id, provider, account_sid, credentials_sealed, api_base)
values ('00000000-0000-4000-c000-0000000000f1', 'plivo', 'MAFAULTS', 'sealed', 'https://carrier.example.test');
insert into public.caller_numbers (organization_id, carrier_account_id, phone_number)
values (pg_temp.org(1), '00000000-0000-4000-c000-0000000000f1', '+918099900001');
insert into public.leads (organization_id, name, phone, recording_consent)
values (pg_temp.org(1), 'Retry', '+917000009003', false), (pg_temp.org(1), 'Records', '+917000009004', true), (pg_temp.org(1), 'Waits', '+917000009005', false);
insert into public.campaigns (id, organization_id, name, record_calls, total_enrolled, open_leads)
values ('00000000-0000-4000-c100-0000000000f1', pg_temp.org(1), 'Runs', true, 3, 3);
insert into public.campaign_leads (organization_id, campaign_id, lead_id, status, attempt_count)
select organization_id, '00000000-0000-4000-c100-0000000000f1', id, 'queued', 1 from public.leads where name in ('Retry', 'Records', 'Waits');
insert into public.call_queue (organization_id, campaign_id, lead_id, attempt_count, dispatch_count, last_error, wait_reason, next_retry_at)
select organization_id, '00000000-0000-4000-c100-0000000000f1', id, 1, 1, 'busy', 'retry_busy', private.clock_now() - interval '1 minute'
from public.leads where name in ('Retry', 'Records', 'Waits');
update public.campaigns set status = 'running' where id = '00000000-0000-4000-c100-0000000000f1';
update public.leads set do_not_call = true where name = 'Retry';
select private.release_calls('{"v": 1}', private.clock_now());
select results_eq(
  $$select lead.name::text, queue.status::text, member.status::text
    from public.call_queue as queue
    join public.leads as lead on lead.id = queue.lead_id
    join public.campaign_leads as member on member.campaign_id = queue.campaign_id and member.lead_id = queue.lead_id
    where queue.campaign_id = '00000000-0000-4000-c100-0000000000f1' order by 1$$,
  $$values ('Records', 'processing', 'calling'), ('Retry', 'failed', 'opted_out'), ('Waits', 'processing', 'calling')$$,
  'C6: who opts out while a retry is pending is not dialled'
);

-- C14
select results_eq(
  $$select lead.name::text, log.record_call from public.call_logs as log join public.leads as lead on lead.id = log.lead_id
    where log.campaign_id = '00000000-0000-4000-c100-0000000000f1' order by 1$$,
  $$values ('Records', true), ('Waits', false)$$,
  'C14: a call is recorded when the campaign records and the person agreed'
);
select throws_ok($$delete from public.campaigns where id = '00000000-0000-4000-c100-0000000000f1'$$, '23503', null, 'C14: a campaign with calls is not deleted');
select throws_ok($$delete from public.leads where name = 'Waits'$$, '23503', null, 'C14: nor a lead that was called');

-- D8
delete from public.subscriptions where organization_id = pg_temp.org(2);
select is(pg_temp.as_user(2, $$select public.check_feature_quota('max_leads', 0)$$), 'false', 'D8: without a subscription every gate is shut');

-- D9
select lives_ok(
  format('select private.subscribe_organization(%L, ''free'', ''active'', private.clock_now())', pg_temp.org(1)), 'D9: who subscribes again'
);
select is(
  (select count(*) from public.subscriptions where organization_id = pg_temp.org(1) and status not in ('cancelled', 'inactive')), 1::bigint,
  'D9: has one live subscription'
);
select throws_ok(
  format(
    'insert into public.subscriptions select (jsonb_populate_record(s, jsonb_build_object(''id'', gen_random_uuid()))).* from public.subscriptions as s where organization_id = %L',
    pg_temp.org(1)
  ),
  '23505', null, 'D9: whatever writes it'
);

-- D10
update public.subscriptions set metadata = '{"custom_limits": {"max_leads": -1, "max_projects": 2}}' where organization_id = pg_temp.org(1);
select is(
  pg_temp.as_user(1, $$select concat_ws(' ', public.check_feature_quota('max_leads', 1000000000), public.check_feature_quota('max_projects', 1), public.check_feature_quota('max_projects', 2))$$),
  't t f', 'D10: -1 is no limit, and a limit is one'
);

select * from finish();
rollback;
