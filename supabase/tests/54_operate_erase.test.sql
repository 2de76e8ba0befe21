-- Erasure: every column of the catalog is judged, and afterwards nothing anywhere names the person, who is still never called.
begin;
set local search_path = public, extensions, tap;
select plan(56);

-- Every column that can hold a text says what becomes of it when a person is erased: a new one is added to private.personal_data.
create view pg_temp.texts as
  select
    case when space.nspname = 'public' then 'public.' else 'private.' end || class.relname as table_name,
    attribute.attname as column_name, class.oid as class_id, format_type(attribute.atttypid, null) as type
  from pg_attribute as attribute
  join pg_class as class on class.oid = attribute.attrelid
  join pg_namespace as space on space.oid = class.relnamespace
  where space.nspname in ('public', 'private') and class.relkind in ('r', 'p') and not class.relispartition
    and attribute.attnum > 0 and not attribute.attisdropped and attribute.attgenerated = ''
    and format_type(attribute.atttypid, null) in ('text', 'character varying', 'json', 'jsonb', 'text[]');
create function pg_temp.treatment(wanted_table text, wanted_column text) returns text
language sql as $$
  select listed.treatment
  from private.personal_data as listed
  where listed.table_name = wanted_table and listed.column_name in (wanted_column, '*')
  order by listed.column_name = '*'
  limit 1
$$;
select is_empty(
  $$select table_name || '.' || column_name from pg_temp.texts where pg_temp.treatment(table_name, column_name) is null order by 1$$,
  'Every column that can hold a text is listed in private.personal_data');
select is_empty(
  $$select listed.table_name || '.' || listed.column_name
    from private.personal_data as listed
    where listed.column_name <> '*'
      and not exists (select from pg_temp.texts as known where known.table_name = listed.table_name and known.column_name = listed.column_name)$$,
  'and nothing is listed that is not there');
select is_empty(
  $$select table_name from private.personal_data where column_name = '*' and treatment <> 'kept'$$,
  'What goes is listed column by column');

-- Two organizations that know the same person; the first one also knows somebody else.
insert into private.clock_offset (shift) values (timestamptz '2026-11-24 10:00+05:30' - now())
on conflict (single) do update set shift = excluded.shift;
create function pg_temp.id(kind text, n integer) returns uuid
language sql immutable strict as $$ select format('00000000-0000-4000-%s-%s', kind, lpad(n::text, 12, '0'))::uuid $$;
grant execute on function pg_temp.id(text, integer) to public;
insert into auth.users (id, email) select pg_temp.id('c000', n), format('user%s@example.com', n) from generate_series(1, 3) as n;
insert into public.organizations (id, name) values (pg_temp.id('8000', 1), 'Near'), (pg_temp.id('8000', 2), 'Far');
insert into public.roles (id, organization_id, name, permissions) values
  (pg_temp.id('d000', 1), pg_temp.id('8000', 1), 'Viewer', '["lead.view", "lead.edit"]'), (pg_temp.id('d000', 2), pg_temp.id('8000', 1), 'Remover', '["lead.delete"]');
update public.profiles as profile set organization_id = pg_temp.id('8000', 1), role_id = pg_temp.id('d000', v.role), system_role = v.system::public.system_role
from (values (1, null, 'owner'), (2, 1, 'member'), (3, 2, 'member')) as v (person, role, system) where profile.id = pg_temp.id('c000', v.person);
insert into public.carrier_accounts (id, provider, account_sid, credentials_sealed, api_base)
values (pg_temp.id('9000', 1), 'plivo', 'MAERASE', 'sealed', 'https://carrier.example.test');
insert into public.stores (id, organization_id, name, domain, platform) values
  (pg_temp.id('a000', 1), pg_temp.id('8000', 1), 'Shop', 'shop.example.com', 'shopify'), (pg_temp.id('a000', 2), pg_temp.id('8000', 2), 'Far shop', 'far.example.com', 'shopify');

create function pg_temp.know(org integer, person integer, phone text, email text) returns void
language plpgsql as $$
declare
  tenant uuid := pg_temp.id('8000', org);
  store  uuid := pg_temp.id('a000', org);
  mine   uuid := pg_temp.id('b' || org || '00', person);
  leg    uuid;
begin
  insert into public.projects (id, organization_id, name) values (mine, tenant, 'Project ' || person);
  insert into public.leads (id, organization_id, name, phone, email, notes, raw_data)
  values (mine, tenant, 'Asha Rao', phone, email, 'Call ' || phone, jsonb_build_object('phone', phone, 'n', substr(phone, 2)::bigint));
  insert into public.lead_activities (organization_id, lead_id, type, content) values (tenant, mine, 'note', jsonb_build_object('text', 'Wrote to ' || email));
  insert into public.consents (organization_id, lead_id, phone_number, scope, consent_text, source, proof, granted_at)
  values (tenant, mine, phone, 'call_service', 'Yes, call me', 'form', jsonb_build_object('email', email), private.clock_now());
  insert into public.campaigns (id, organization_id, project_id, name) values (mine, tenant, mine, 'Campaign');
  insert into public.campaign_leads (organization_id, campaign_id, lead_id) values (tenant, mine, mine);
  insert into public.call_queue (organization_id, campaign_id, lead_id, next_retry_at, metadata) values (tenant, mine, mine, private.clock_now(), jsonb_build_object('to', phone));
  insert into public.customers (id, organization_id, store_id, external_id, phone, email, first_name) values (mine, tenant, store, '77' || person, phone, email, 'Asha');
  insert into public.orders (id, organization_id, store_id, external_id, customer_id, customer_email, customer_phone, shipping_address, currency_code, subtotal_price_minor, total_price_minor, order_date)
  values (mine, tenant, store, '88' || person, mine, email, phone, jsonb_build_object('phone', phone), 'USD', 1200, 1200, private.clock_now());
  insert into public.order_line_items (organization_id, store_id, order_id, title, price_minor, quantity, total_price_minor, properties)
  values (tenant, store, mine, 'Mug', 1200, 1, 1200, jsonb_build_object('engraving', email));
  insert into public.call_logs (organization_id, lead_id, carrier_account_id, call_sid, caller_number, callee_number, status, call_status, dialled, submitted_at, answered_at, ended_at, record_call, recording_url, conversation_transcript)
  values (tenant, mine, pg_temp.id('9000', 1), 'leg-' || org || '-' || person, '+918044440000', phone, 'ended', 'answered', true, private.clock_now(), private.clock_now(), private.clock_now(), true, 'https://media.plivo.com/x.mp3', 'My number is ' || phone)
  returning id into leg;
  insert into public.conversations (id, organization_id, store_id, customer_id, conversation_key, channel, customer_identifier)
  values (mine, tenant, store, mine, 'wa:' || phone, 'whatsapp', phone);
  insert into public.conversation_messages (organization_id, store_id, conversation_id, role, content) values (tenant, store, mine, 'customer', 'Mail me: ' || email);
  insert into public.calls (organization_id, store_id, call_log_id, customer_id, conversation_id, from_phone, to_phone, direction, start_time)
  values (tenant, store, leg, mine, mine, '+918044440000', phone, 'outbound', private.clock_now());
  insert into public.websocket_sessions (organization_id, kind, call_log_id, connection_id) values (tenant, 'agent', leg, 'socket' || org || person);
  perform private.apply_event(
    jsonb_build_object('v', 1, 'source', 'plivo', 'source_id', pg_temp.id('9000', 1), 'kind', 'hangup', 'attempt_id', leg, 'dedupe_key', leg::text, 'verified', true,
      'headers', jsonb_build_object('x-to', phone), 'body', 'To=%2B' || substr(phone, 2), 'payload', jsonb_build_object('type', 'call', 'provider_call_id', 'leg-' || org || '-' || person)),
    private.clock_now());
  perform private.emit(tenant, 'call.ended', leg::text, jsonb_build_object('to', phone), private.clock_now());
  perform private.audit(tenant, 'lead.exported', 'lead', mine, jsonb_build_object('email', upper(email), 'phone', phone), private.clock_now());
end
$$;
select pg_temp.know(1, 1, '+919812345678', 'asha@example.org');
select pg_temp.know(2, 2, '+919812345678', 'asha@example.org');
select pg_temp.know(1, 3, '+919812345679', 'joasha@example.org');
insert into public.suppressions (organization_id, phone_number, reason) values (pg_temp.id('8000', 1), '+919812345678', 'asha@example.org asked');
-- The worker has copied what was said.
select private.claim_recordings(jsonb_build_object('v', 1, 'lease_token', pg_temp.id('7000', 1), 'ids', (select jsonb_agg(attempt_id) from private.recordings)), private.clock_now());
select private.record_recordings(
  jsonb_build_object('v', 1, 'lease_token', pg_temp.id('7000', 1), 'results', (
    select jsonb_agg(jsonb_build_object(
      'id', copy.attempt_id, 'result', 'copied', 'path', copy.organization_id || '/' || copy.attempt_id || '.mp3', 'bytes', 3, 'content_type', 'audio/mpeg'))
    from private.recordings as copy)),
  private.clock_now());

-- Poison: every column that goes names the person, whatever it is meant for, as far as its table lets it.
create function pg_temp.poison() returns integer
language plpgsql as $$
declare
  target record;
  poisoned integer := 0;
  done integer;
begin
  for target in
    select known.*, pg_temp.treatment(known.table_name, known.column_name) as treatment, listed.found_by
    from pg_temp.texts as known
    join private.personal_data as listed on listed.table_name = known.table_name and listed.column_name = known.column_name
    where listed.treatment <> 'kept'
    order by known.table_name, known.column_name
  loop
    continue when target.table_name in ('public.suppressions') or target.column_name in ('phone', 'customer_phone', 'callee_number', 'caller_number', 'phone_number');
    begin
      execute format('alter table %s disable trigger user', target.table_name);
      execute format(
        'update %s set %I = %s %s', target.table_name, target.column_name,
        case target.type
          when 'text' then case when target.column_name ~ 'email' then '''asha@example.org''' when target.column_name ~ 'url' then '''https://x.example/919812345678''' else '''Asha, +91 98123-45678, or asha@example.org''' end
          when 'text[]' then 'array[''asha@example.org'']'
          else case when target.column_name in ('attachments', 'conversation_history') then '''["+919812345678", 919812345678, "asha@example.org"]''' else '''{"a": ["+919812345678", 919812345678, "ASHA@example.org"]}''' end
        end,
        case
          when target.table_name in ('private.unmapped_values', 'public.platform_audit_logs') then ''
          when target.found_by = 'customer' or target.table_name in ('public.leads', 'public.conversations', 'public.orders') then format('where id = %L', pg_temp.id('b100', 1))
          when target.table_name in ('public.lead_activities', 'public.consents', 'public.campaign_leads', 'public.call_queue', 'public.call_logs') then format('where lead_id = %L', pg_temp.id('b100', 1))
          when target.table_name = 'public.calls' then format('where customer_id = %L', pg_temp.id('b100', 1))
          when target.table_name = 'public.conversation_messages' then format('where conversation_id = %L', pg_temp.id('b100', 1))
          when target.table_name = 'public.order_line_items' then format('where order_id = %L', pg_temp.id('b100', 1))
          when target.table_name in ('private.recordings', 'private.webhook_events') then format('where attempt_id = (select id from public.call_logs where lead_id = %L)', pg_temp.id('b100', 1))
          when target.table_name = 'public.websocket_sessions' then format('where call_log_id = (select id from public.call_logs where lead_id = %L)', pg_temp.id('b100', 1))
          else format('where organization_id = %L', pg_temp.id('8000', 1))
        end
      );
      get diagnostics done = row_count;
      poisoned := poisoned + (done > 0)::integer;
      execute format('alter table %s enable trigger user', target.table_name);
      if target.table_name in ('public.audit_logs', 'public.platform_audit_logs') then
        execute format('alter table %s enable always trigger refuse_change', target.table_name);
      end if;
    exception when check_violation or unique_violation then
      null;
    end;
  end loop;
  return poisoned;
end
$$;
select cmp_ok(pg_temp.poison(), '>=', 70, 'The person is in most columns that there are');

-- Where any row of any table names somebody; of the organizations' own columns as of the private ones.
create function pg_temp.traces(pattern text, kept boolean default false) returns setof text
language plpgsql as $$
declare
  target record;
  found  bigint;
begin
  for target in select * from pg_temp.texts as known order by known.table_name, known.column_name loop
    continue when not kept and pg_temp.treatment(target.table_name, target.column_name) = 'kept'
      and target.table_name in ('public.profiles', 'public.invitations', 'private.personal_data');
    execute format('select count(*) from %s where %I::text ~* %L', target.table_name, target.column_name, pattern) into found;
    if found > 0 then
      return next format('%s.%s %s', target.table_name, target.column_name, found);
    end if;
  end loop;
end
$$;
create function pg_temp.as_user(number integer, query text) returns text
language plpgsql as $$
declare
  before text := current_setting('role');
  answer text;
begin
  perform set_config('request.jwt.claims', jsonb_build_object('sub', pg_temp.id('c000', number), 'role', 'authenticated')::text, true);
  perform set_config('role', 'authenticated', true);
  begin
    execute query into answer;
  exception
    when sqlstate 'PGRST' then answer := sqlerrm::jsonb ->> 'code';
    when others then answer := sqlstate || ' ' || sqlerrm;
  end;
  perform set_config('role', before, true);
  perform set_config('request.jwt.claims', '', true);
  return answer;
end
$$;
create temporary table seen (far bigint, other bigint);
insert into seen select
  (select count(*) from pg_temp.traces('98[ -]*1[ -]*2[ -]*3[ -]*4[ -]*5[ -]*6[ -]*7[ -]*8(?![0-9])')), (select count(*) from pg_temp.traces('9812345679|joasha@example.org'));
select cmp_ok((select other from seen), '>=', 15::bigint, 'Somebody else is in many columns too');

-- Who may.
select is(pg_temp.as_user(2, $$select public.erase_person('+919812345678')$$), 'permission_denied', 'A member who edits leads erases nobody');
select is(pg_temp.as_user(3, $$select public.erase_person()$$), 'person_required', 'Somebody is to be named');
select is(pg_temp.as_user(3, $$select public.erase_person('98123 45678')$$), 'invalid_phone', 'in full');
insert into public.call_logs (organization_id, carrier_account_id, caller_number, callee_number, status, dialled, direction)
values (pg_temp.id('8000', 1), pg_temp.id('9000', 1), '+918044440000', '+919812345678', 'ringing', true, 'outbound');
select is(pg_temp.as_user(3, $$select public.erase_person('+919812345678')$$), 'call_in_progress', 'Nobody is erased who is on the phone');
delete from public.call_logs where status = 'ringing';
select is(has_function_privilege('authenticated', 'public.erase(jsonb)', 'execute'), false, 'Users do not choose the organization');

insert into public.customers (organization_id, store_id, external_id, phone) values (pg_temp.id('8000', 1), pg_temp.id('a000', 1), '775', '+919812345678');

-- The person goes.
create temporary table other_before as select * from pg_temp.traces('9812345679|joasha@example.org') as trace;
create temporary table rows_before as select count(*) as orders, sum(total_price_minor) as money from public.orders;
select ok(pg_temp.as_user(3, $$select public.erase_person('+919812345678') ->> 'erased'$$) = 'true', 'Who deletes leads erases a person');
create temporary table hidden as
  select trace from pg_temp.traces('98[ .()-]*1[ .()-]*2[ .()-]*3[ .()-]*4[ .()-]*5[ .()-]*6[ .()-]*7[ .()-]*8(?![0-9])|(?<!jo)asha@example.org', true) as trace;
create function pg_temp.of_far() returns setof text
language sql as $$ select trace from pg_temp.traces('9812345678(?![0-9])|(?<!jo)asha@example.org') as trace $$;
-- The other organization is asked to forget too; then nothing is left.
select private.erase(jsonb_build_object('organization_id', pg_temp.id('8000', 2), 'email', 'ASHA@example.org'), private.clock_now());
select is_empty(
  $$select * from pg_temp.traces('98[ .()-]*1[ .()-]*2[ .()-]*3[ .()-]*4[ .()-]*5[ .()-]*6[ .()-]*7[ .()-]*8(?![0-9])|(?<!jo)asha@example.org', true)$$,
  'No column of any table names the person any more, in whatever spelling');
select is((select name from public.leads where id = pg_temp.id('b100', 1)), 'erased', 'The lead is a row without a person');
select is((select archived_at is not null and do_not_call from public.leads where id = pg_temp.id('b100', 1)), true, 'that is never called');
select is((select name || ' ' || phone || ' ' || email from public.leads where id = pg_temp.id('b100', 3)), 'Asha Rao +919812345679 joasha@example.org', 'Somebody else with a similar number and address is as before');
select is((select count(*) from public.leads where notes = 'Call +919812345679'), 1::bigint, 'word by word');
select is((select callee_number || ' ' || caller_number from public.call_logs where lead_id = pg_temp.id('b100', 1)), 'anonymous +918044440000', 'A leg keeps the organization''s own number');
select is((select (conversation_transcript, recording_url, summary) is null from public.call_logs where lead_id = pg_temp.id('b100', 1)), true, 'and nothing that was said');
select is((select status::text || ' ' || (ended_at is not null) from public.call_logs where lead_id = pg_temp.id('b100', 1)), 'ended true', 'What it was stays');
select is((select from_phone || ' ' || to_phone from public.calls where customer_id = pg_temp.id('b100', 1)), '+918044440000 anonymous', 'So with the store''s call');
select is((select content from public.conversation_messages where conversation_id = pg_temp.id('b100', 1)), 'erased', 'and with what was written');
select is((select (count(*), sum(total_price_minor)) from public.orders), (select (orders, money) from rows_before), 'Orders stay, for the books');
select is((select body is null and headers is null and payload is null from private.webhook_events where organization_id = pg_temp.id('8000', 1) and attempt_id = (select id from public.call_logs where lead_id = pg_temp.id('b100', 1))), true, 'Raw events are empty');
select is((select state from private.recordings where attempt_id = (select id from public.call_logs where lead_id = pg_temp.id('b100', 1))), 'erased', 'The recording is erased');
select is((select count(*) from private.storage_deletions), 2::bigint, 'and its objects wait to be deleted');
select is((private.claim_deletions('{"v":1}', private.clock_now()) ->> 'paths') like '%.mp3%', true, 'by the sweep');
select is((private.claim_deletions('{"v":1}', private.clock_now()) -> 'paths'), '[]'::jsonb, 'one at a time');
select is((private.record_deletions(jsonb_build_object('v', 1, 'paths', (select jsonb_agg(path) from private.storage_deletions)), private.clock_now()) ->> 'gone'), '2', 'until they are gone');

-- Still not called.
select is((select count(*) from public.suppressions), 0::bigint, 'The number is in no list');
select is(private.is_suppressed(pg_temp.id('8000', 1), '+919812345678'), true, 'and suppressed all the same');
select is(private.is_suppressed(pg_temp.id('8000', 1), '+919812345679'), false, 'as no other is');
insert into public.leads (id, organization_id, name, phone) values (pg_temp.id('b100', 9), pg_temp.id('8000', 1), 'Imported again', '+919812345678');
insert into public.campaign_leads (organization_id, campaign_id, lead_id) values (pg_temp.id('8000', 1), pg_temp.id('b100', 3), pg_temp.id('b100', 9));
insert into public.call_queue (organization_id, campaign_id, lead_id, next_retry_at) values (pg_temp.id('8000', 1), pg_temp.id('b100', 3), pg_temp.id('b100', 9), private.clock_now());
insert into public.caller_numbers (organization_id, carrier_account_id, phone_number) values (pg_temp.id('8000', 1), pg_temp.id('9000', 1), '+918044440000');
insert into public.subscription_plans (id, slug, name) values (pg_temp.id('a100', 1), 'erase-plan', 'Plan');
insert into public.plan_prices (id, plan_id, version) values (pg_temp.id('a200', 1), pg_temp.id('a100', 1), 1);
select private.subscribe_organization(pg_temp.id('8000', 1), 'erase-plan', 'active', private.clock_now());
update public.campaigns set status = 'running', open_leads = 2 where id = pg_temp.id('b100', 3);
select private.release_calls('{"v":1,"limit":100}', private.clock_now());
select is((select last_error from public.call_queue where lead_id = pg_temp.id('b100', 9)), 'opted_out', 'Who is imported again is not dialled');

-- What comes late.
select private.apply_event(
  jsonb_build_object('v', 1, 'source', 'plivo', 'source_id', pg_temp.id('9000', 1), 'kind', 'recording', 'attempt_id', (select id from public.call_logs where lead_id = pg_temp.id('b100', 1)),
    'dedupe_key', 'late', 'verified', true, 'headers', '{}'::jsonb, 'body', 'To=919812345678',
    'payload', '{"type":"call","recording":{"url":"https://media.plivo.com/late.mp3","id":"late"}}'::jsonb), private.clock_now());
select is((select recording_url from public.call_logs where lead_id = pg_temp.id('b100', 1)), null, 'A late recording of an erased person is not taken');
select is((select body is null and payload is null from private.webhook_events where dedupe_key = 'late'), true, 'and its event says nothing');
insert into public.conversation_messages (organization_id, store_id, conversation_id, role, content)
values (pg_temp.id('8000', 1), pg_temp.id('a000', 1), pg_temp.id('b100', 1), 'customer', 'asha@example.org again');
select is((select count(*) from public.conversation_messages where content like 'asha%'), 0::bigint, 'No message comes after');
insert into public.lead_activities (organization_id, lead_id, type, content) values (pg_temp.id('8000', 1), pg_temp.id('b100', 1), 'call', '{"said":"asha@example.org"}');
select is((select count(*) from public.lead_activities where content::text like '%asha%' and lead_id = pg_temp.id('b100', 1)), 0::bigint, 'and an activity has no words');
update public.conversations set summary = 'Asha Rao called' where id = pg_temp.id('b100', 1);
select is((select summary from public.conversations where id = pg_temp.id('b100', 1)), null, 'nor has a summary');

-- What the patterns find the index finds: numbers as people and providers write them, among other digits.
select setseed(0.4);
create temporary table spelled as
select written.phone, string_agg(
    case
      when place > 6 and place <= 6 + length(written.digits)
        then substr(written.digits, place - 6, 1) || case when random() < 0.2 then substr(' .-() ', 1 + floor(random() * 6)::integer, 1 + floor(random() * 2)::integer) else '' end
      when random() < 0.5 then substr('0123456789 .-()+x,%2b', 1 + floor(random() * 21)::integer, 1)
      else ''
    end,
    '' order by place) as text
from (
  select n, known.phone, (array[substr(known.phone, 2), right(known.phone, 10), '0' || right(known.phone, 10), '00' || substr(known.phone, 2)])[1 + n % 4] as digits
  from generate_series(1, 1500) as n
  cross join lateral (select (array['+919812345678', '+15551234567', '+4712345678', '+2901234', '+290123456'])[1 + n % 5] as phone) as known
) as written
cross join generate_series(1, 30) as place
group by written.n, written.phone;
select cmp_ok((select count(*) from spelled where text ~ private.phone_pattern(array[phone])), '>', 300::bigint, 'Numbers are found by pattern');
select is_empty(
  $$select text from spelled where text ~ private.phone_pattern(array[phone]) and not private.person_keys(text) && private.person_keys(phone)$$,
  'and each of them by its key');
select is_empty(
  $$select text
    from unnest(array['asha@example.org', 'To=Asha%40Example.org&x', '<ASHA@example.org>.', '"asha@example.org."', 'a,asha@example.org,b']) as text
    where not lower(text) ~ private.email_pattern('{asha@example.org}') or not private.person_keys(text) && private.person_keys('asha@example.org')$$,
  'So with addresses');
select is(private.person_keys(repeat('1 ', 600)), '{*}', 'What is too odd to say is always looked at');

-- What waited on a queue meanwhile. Who wrote again since the erasure did so themselves.
insert into public.webhook_sources (id, organization_id, provider, name, secrets_sealed, store_id)
values (pg_temp.id('f000', 1), pg_temp.id('8000', 1), 'shopify', 'Shop', '{v1.x}', pg_temp.id('a000', 1)),
  (pg_temp.id('f000', 2), pg_temp.id('8000', 2), 'shopify', 'Far shop', '{v1.x}', pg_temp.id('a000', 2));
create function pg_temp.customer(source integer, key text, came text, told jsonb) returns text
language plpgsql as $$
declare
  stored private.webhook_events;
begin
  perform public.apply_event(jsonb_build_object(
    'v', 1, 'source', 'shopify', 'source_id', pg_temp.id('f000', source), 'verified', true, 'received_at', now() + came::interval,
    'headers', '{}'::jsonb, 'body', 'To: ' || (told ->> 'phone'), 'events', jsonb_build_array(jsonb_build_object('kind', 'customers/update', 'dedupe_key', key, 'payload',
      jsonb_build_object('type', 'store', 'event', 'customer', 'shop', case source when 1 then 'shop' else 'far' end || '.example.com',
        'customer', jsonb_build_object('external_id', '900', 'source_version', '1') || told)))));
  select event.* into stored from private.webhook_events as event where event.dedupe_key = key;
  return concat_ws(' ', stored.status, stored.error, case when (stored.body, stored.payload, stored.headers) is null then 'empty' end);
end
$$;
select is(pg_temp.customer(1, 'q1', '-1 hour', '{"phone":"+919812345678","first_name":"Asha"}'), 'ignored erased empty', 'What was told before the erasure and comes after it is not taken');
select is(pg_temp.customer(1, 'q2', '-1 hour', '{"email":"Asha@example.org","first_name":"Asha"}'), 'ignored erased empty', 'nor is an address');
select is(pg_temp.customer(1, 'q3', '-1 hour', '{"external_id":"775","first_name":"Asha"}'), 'ignored erased empty', 'nor a name of the shop''s');
select is((select count(*) from public.customers where external_id in ('900', '775')), 0::bigint, 'Nobody is back');
select is(pg_temp.customer(1, 'q4', '-1 hour', '{"phone":"+919812345670","first_name":"Else"}'), 'applied', 'Somebody else is taken');
select is(pg_temp.customer(2, 'q5', '1 hour', '{"phone":"+919812345678","first_name":"Asha"}'), 'applied', 'and who came after the erasure');
delete from public.customers where external_id = '900';
update private.webhook_events set body = null, payload = null where dedupe_key = 'q5';

-- On record, and again.
select is((select metadata ? 'rows' and metadata::text !~ '98123' and user_id = pg_temp.id('c000', 3) from public.audit_logs where action = 'person.erased' and organization_id = pg_temp.id('8000', 1)), true, 'That it was done is on record, and not to whom');
delete from public.call_queue where lead_id = pg_temp.id('b100', 9);
delete from public.campaign_leads where lead_id = pg_temp.id('b100', 9);
delete from public.leads where id = pg_temp.id('b100', 9);
-- Who came back as a new lead was told of as one, which is a trace like any other.
select is((select count(*) > 0 from private.outbox where payload::text like '%9812345678%'), true, 'A new lead is told of by number');
select is(private.erase(jsonb_build_object('organization_id', pg_temp.id('8000', 1), 'phone', '+919812345678'), private.clock_now()) #>> '{rows,private.outbox}', '1', 'Who comes back goes from what is to be told');
select is_empty($$select * from pg_temp.traces('9812345678(?![0-9])', true)$$, 'and from everywhere');
select is(private.erase(jsonb_build_object('organization_id', pg_temp.id('8000', 1), 'phone', '+919812345678'), private.clock_now()) ->> 'erased', 'false', 'Again changes nothing');
select throws_ok($$update public.audit_logs set metadata = '{}'$$, '23001', null, 'Nobody else changes the record');
select throws_ok($$delete from public.consents$$, '23001', null, 'or deletes a consent');

-- A whole store.
select private.erase(jsonb_build_object('organization_id', pg_temp.id('8000', 1), 'store_id', pg_temp.id('a000', 1)), private.clock_now());
select is((select string_agg(coalesce(phone, '-'), ' ') from public.customers where store_id = pg_temp.id('a000', 1)), '- - -', 'A store that goes takes its customers along');
select is((select phone from public.leads where id = pg_temp.id('b100', 3)), '+919812345679', 'and not the organization''s leads');
select * from finish();
rollback;
