-- Walls: who sees and changes what of stores and what belongs to them.
begin;
set local search_path = public, extensions, tap;
select plan(416);

-- Two organizations: Near with stores 1 and 2, Far with store 3. Users: 1 owns Near, 2 owns Far, 3 views Near's stores, 4 is nowhere,
-- 5 is suspended, 6 is a member of Near who may see leads alone.
create function pg_temp.id(kind text, n integer) returns uuid
language sql immutable strict as $$ select format('00000000-0000-4000-%s-%s', kind, lpad(n::text, 12, '0'))::uuid $$;
grant execute on function pg_temp.id(text, integer) to public;
insert into public.organizations (id, name, currency) values (pg_temp.id('8000', 1), 'Near', 'INR'), (pg_temp.id('8000', 2), 'Far', 'EUR');
insert into auth.users (id, email) select pg_temp.id('c000', n), format('user%s@example.com', n) from generate_series(1, 6) as n;
insert into public.roles (id, organization_id, name, permissions)
values
  (pg_temp.id('d000', 1), pg_temp.id('8000', 1), 'Viewer', '["store.view", "call.view", "property.view"]'),
  (pg_temp.id('d000', 2), pg_temp.id('8000', 1), 'Caller', '["lead.view"]');
update public.profiles as profile
set organization_id = pg_temp.id('8000', v.org), system_role = v.role::public.system_role, status = v.status::public.user_status,
  role_id = pg_temp.id('d000', v.own_role)
from (values (1, 1, 'owner', 'active', null), (2, 2, 'owner', 'active', null), (3, 1, 'member', 'active', 1), (5, 1, 'owner', 'suspended', null), (6, 1, 'member', 'active', 2))
  as v (person, org, role, status, own_role)
where profile.id = pg_temp.id('c000', v.person);
insert into public.stores (id, organization_id, name, domain, platform, currency_code, timezone)
values
  (pg_temp.id('a000', 1), pg_temp.id('8000', 1), 'Shop', 'shop.example.com', 'shopify', 'USD', 'Asia/Kolkata'),
  (pg_temp.id('a000', 2), pg_temp.id('8000', 1), 'Second', 'second.example.com', 'custom', 'INR', 'UTC'),
  (pg_temp.id('a000', 3), pg_temp.id('8000', 2), 'Far shop', 'far.example.com', 'woocommerce', 'EUR', 'UTC');
insert into public.customers (id, organization_id, store_id, external_id)
values
  (pg_temp.id('b000', 1), pg_temp.id('8000', 1), pg_temp.id('a000', 1), '1'),
  (pg_temp.id('b000', 2), pg_temp.id('8000', 1), pg_temp.id('a000', 1), '2'),
  (pg_temp.id('b000', 3), pg_temp.id('8000', 1), pg_temp.id('a000', 2), '1'),
  (pg_temp.id('b000', 4), pg_temp.id('8000', 2), pg_temp.id('a000', 3), '1');

-- What a query gives as somebody: one value, or the code of the error.
create function pg_temp.as_role(role text, person integer, query text) returns text
language plpgsql as $$
declare
  before text := current_setting('role');
  answer text;
begin
  perform set_config('request.jwt.claims',
    coalesce(jsonb_build_object('sub', '00000000-0000-4000-c000-' || lpad(person::text, 12, '0'), 'role', role)::text, ''), true);
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
create function pg_temp.rows_of(role text, person integer, statement text) returns text
language sql as $$ select pg_temp.as_role(role, person, format('with touched as (%s returning 1) select count(*) from touched', statement)) $$;

-- Three rows of every table for both organizations.
insert into public.products (organization_id, store_id, external_id, title, price_minor)
select store.organization_id, store.id, 'p' || n, 'Mug', 100 from public.stores as store, generate_series(1, 3) as n;
insert into public.product_images (organization_id, store_id, product_id, url)
select product.organization_id, product.store_id, product.id, 'https://i.example.com' from public.products as product;
insert into public.orders (organization_id, store_id, customer_id, external_id, subtotal_price_minor, total_price_minor, currency_code, order_date)
select buyer.organization_id, buyer.store_id, buyer.id, buyer.id || '-' || n, 100, 100, (array['USD', 'EUR', 'INR'])[n], now()
from public.customers as buyer, generate_series(1, 3) as n;
insert into public.order_line_items (organization_id, store_id, order_id, title, price_minor, quantity, total_price_minor)
select purchase.organization_id, purchase.store_id, purchase.id, 'Mug', 100, 1, 100 from public.orders as purchase;
insert into public.conversations (organization_id, store_id, conversation_key, channel)
select store.organization_id, store.id, 'k' || n, 'voice' from public.stores as store, generate_series(1, 3) as n;
insert into public.conversation_messages (organization_id, store_id, conversation_id, role, content)
select talk.organization_id, talk.store_id, talk.id, 'customer', 'Hello' from public.conversations as talk;
insert into public.calls (organization_id, store_id, from_phone, to_phone, direction, start_time)
select store.organization_id, store.id, 'anonymous', '+15550001', 'inbound', now() from public.stores as store, generate_series(1, 3) as n;
insert into public.call_analytics (organization_id, store_id, date_period, hour_period)
select store.organization_id, store.id, '2026-01-01', n from public.stores as store, generate_series(1, 3) as n;
insert into public.store_phone_numbers (organization_id, store_id, phone_number)
select store.organization_id, store.id, '+1555000' || right(store.id::text, 1) || n from public.stores as store, generate_series(1, 3) as n;
insert into private.store_credentials (organization_id, store_id, access_token_sealed)
select store.organization_id, store.id, 'sealed' from public.stores as store;
insert into public.user_settings (organization_id, user_id, twilio_phone)
values (pg_temp.id('8000', 1), pg_temp.id('c000', 1), '+15550001'), (pg_temp.id('8000', 1), pg_temp.id('c000', 3), '+15550001'), (pg_temp.id('8000', 2), pg_temp.id('c000', 2), '+15550001');
insert into public.customers (organization_id, store_id, external_id) values (pg_temp.id('8000', 2), pg_temp.id('a000', 3), '2'), (pg_temp.id('8000', 2), pg_temp.id('a000', 3), '3');
insert into public.stores (organization_id, name, domain, platform) select pg_temp.id('8000', n), 'More', m || '.example.com', 'custom' from unnest(array[1, 2]) as n, generate_series(1, 2) as m;

create function pg_temp.tables() returns setof text
language sql as $$
  values ('stores'), ('settings'), ('store_phone_numbers'), ('customers'), ('customer_totals'), ('products'), ('product_images'), ('orders'),
    ('order_line_items'), ('conversations'), ('conversation_messages'), ('calls'), ('call_analytics')
$$;
create function pg_temp.count(name text, org integer) returns text
language plpgsql as $$
declare
  answer text;
begin
  execute format('select count(*) from public.%I where organization_id = %L', name, pg_temp.id('8000', org)) into answer;
  return answer;
end
$$;
select cmp_ok(pg_temp.count(name, org)::integer, '>=', 3, format('organization %s has three rows of %s', org, name)) from pg_temp.tables() as name, unnest(array[1, 2]) as org;

-- Reading: all of their own, nothing of anybody else's.
select is(
  pg_temp.as_role('authenticated', person, format('select count(*) || '' '' || count(distinct organization_id) from public.%I', name)),
  pg_temp.count(name, case person when 2 then 2 else 1 end) || ' 1', format('user %s sees all %s of their organization and no other', person, name)
)
from pg_temp.tables() as name, unnest(array[1, 2, 3]) as person;
select is(
  pg_temp.as_role('authenticated', person, format('select count(*) from public.%I', name)), '0', format('user %s, %s, sees no %s', person, why, name)
)
from pg_temp.tables() as name, (values (4, 'of no organization'), (5, 'suspended'), (6, 'without the permission')) as v (person, why);
select is(pg_temp.as_role('authenticated', null, format('select count(*) from public.%I', name)), '0', format('a token of nobody sees no %s', name)) from pg_temp.tables() as name;
select is(pg_temp.as_role('anon', null, format('select count(*) from public.%I', name)), '42501', format('a visitor may not ask for %s', name))
from (select pg_temp.tables() as name union all select 'user_settings') as v;
select is(
  pg_temp.as_role('service_role', null, format('select count(*) >= 6 from public.%I', name)), 'true', format('a handler sees all %s', name)
)
from pg_temp.tables() as name;
insert into public.roles (id, organization_id, name, permissions) values (pg_temp.id('d000', 3), pg_temp.id('8000', 1), 'Clerk', '["store.view", "store.edit"]');
update public.profiles set role_id = pg_temp.id('d000', 3) where id = pg_temp.id('c000', 6);
select is(pg_temp.as_role('authenticated', 6, 'select count(*) from public.calls'), '0', 'who sees stores and no calls sees no store''s calls');
select is(pg_temp.as_role('authenticated', 6, 'select count(*) > 0 from public.orders'), 'true', 'but its orders');

-- Writing: each statement as an editor of the row's organization, as a viewer of it, and as the owner of the other one.
select is(pg_temp.rows_of('authenticated', 1, v.statement), v.touched, format('an editor may: %s', v.statement))
from (
  values
    ($$ insert into public.stores (name, domain, platform) values ('New', 'new.example.com', 'custom') $$, '1'),
    ($$ update public.stores set name = 'Renamed', timezone = 'Asia/Tokyo' where id = pg_temp.id('a000', 1) $$, '1'),
    ($$ delete from public.stores where domain = 'new.example.com' $$, '1'),
    ($$ insert into public.settings (store_id, category, key, value) values (pg_temp.id('a000', 1), 'voice', 'extra', '1') $$, '1'),
    ($$ insert into public.settings (category, key, value) values ('voice', 'of_all', '1') $$, '1'),
    ($$ update public.settings set value = '300' where store_id = pg_temp.id('a000', 1) and key = 'max_call_duration' $$, '1'),
    ($$ delete from public.settings where key = 'extra' $$, '1'),
    ($$ update public.store_phone_numbers set is_primary = true where phone_number = '+155500011' $$, '1'),
    ($$ insert into public.customers (store_id, external_id, phone) values (pg_temp.id('a000', 1), 'new', '+15550001') $$, '1'),
    ($$ update public.customers set first_name = 'Asha' where id = pg_temp.id('b000', 1) $$, '1'),
    ($$ insert into public.products (store_id, external_id, title, price_minor) values (pg_temp.id('a000', 1), 'new', 'New', 1) $$, '1'),
    ($$ update public.products set price_minor = 2, status = 'archived' where external_id = 'new' $$, '1'),
    ($$ delete from public.products where external_id = 'new' $$, '1'),
    ($$ insert into public.orders (store_id, customer_id, external_id, subtotal_price_minor, total_price_minor, order_date) values (pg_temp.id('a000', 1), pg_temp.id('b000', 1), 'new', 1, 1, now()) $$, '1'),
    ($$ update public.orders set internal_notes = 'x', customer_id = pg_temp.id('b000', 2) where external_id = 'new' $$, '1'),
    ($$ insert into public.order_line_items (store_id, order_id, title, price_minor, quantity, total_price_minor) select store_id, id, 'x', 1, 1, 1 from public.orders where external_id = 'new' $$, '1'),
    ($$ update public.conversations set title = 'x', priority_level = 5, assigned_agent_id = pg_temp.id('c000', 3) where store_id = pg_temp.id('a000', 1) $$, '3'),
    ($$ update public.calls set customer_id = pg_temp.id('b000', 1), satisfaction_rating = 5 where store_id = pg_temp.id('a000', 1) $$, '3')
) as v (statement, touched);
select is(
  (select format('%s %s', total_orders, total_spent_minor) from public.customer_totals where customer_id = pg_temp.id('b000', 2) and currency_code = 'USD'), '2 101',
  'what an editor does to an order is counted'
);

create function pg_temp.changes() returns table (statement text, viewer text, stranger text)
language sql as $$
  values
    ($s$ update public.stores set name = 'x' where id = pg_temp.id('a000', 1) $s$, '0', '0'),
    ($s$ delete from public.stores where id = pg_temp.id('a000', 1) $s$, '0', '0'),
    ($s$ insert into public.stores (name, domain, platform) values ('x', 'x.example.com', 'custom') $s$, '42501', '1'),
    ($s$ insert into public.settings (store_id, category, key, value) values (pg_temp.id('a000', 1), 'voice', 'theirs', '1') $s$, '42501', '23503'),
    ($s$ update public.settings set value = '1' where store_id = pg_temp.id('a000', 1) $s$, '0', '0'),
    ($s$ delete from public.settings where store_id = pg_temp.id('a000', 1) $s$, '0', '0'),
    ($s$ update public.store_phone_numbers set is_active = false where store_id = pg_temp.id('a000', 1) $s$, '0', '0'),
    ($s$ insert into public.customers (store_id, external_id) values (pg_temp.id('a000', 1), 'theirs') $s$, '42501', '23503'),
    ($s$ update public.customers set first_name = 'x' where store_id = pg_temp.id('a000', 1) $s$, '0', '0'),
    ($s$ insert into public.products (store_id, external_id, title, price_minor, currency_code) values (pg_temp.id('a000', 1), 'theirs', 'x', 1, 'USD') $s$, '42501', '23503'),
    ($s$ update public.products set price_minor = 0 where store_id = pg_temp.id('a000', 1) $s$, '0', '0'),
    ($s$ delete from public.products where store_id = pg_temp.id('a000', 1) $s$, '0', '0'),
    ($s$ insert into public.product_images (store_id, product_id, url) values (pg_temp.id('a000', 1), gen_random_uuid(), 'https://x') $s$, '42501', '23503'),
    ($s$ update public.product_images set position = 7 where store_id = pg_temp.id('a000', 1) $s$, '0', '0'),
    ($s$ delete from public.product_images where store_id = pg_temp.id('a000', 1) $s$, '0', '0'),
    ($s$ insert into public.orders (store_id, external_id, subtotal_price_minor, total_price_minor, currency_code, order_date) values (pg_temp.id('a000', 1), 'theirs', 1, 1, 'USD', now()) $s$, '42501', '23503'),
    ($s$ update public.orders set internal_notes = 'x' where store_id = pg_temp.id('a000', 1) $s$, '0', '0'),
    ($s$ insert into public.order_line_items (store_id, order_id, title, price_minor, quantity, total_price_minor) values (pg_temp.id('a000', 1), gen_random_uuid(), 'x', 1, 1, 1) $s$, '42501', '23503'),
    ($s$ update public.order_line_items set title = 'x' where store_id = pg_temp.id('a000', 1) $s$, '0', '0'),
    ($s$ update public.conversations set title = 'x' where store_id = pg_temp.id('a000', 1) $s$, '0', '0'),
    ($s$ update public.calls set satisfaction_rating = 1 where store_id = pg_temp.id('a000', 1) $s$, '0', '0')
$$;
select is(pg_temp.rows_of('authenticated', 3, change.statement), change.viewer, format('a viewer may not: %s', change.statement)) from pg_temp.changes() as change;
select is(pg_temp.rows_of('authenticated', 2, change.statement), change.stranger, format('another organization''s owner does not reach: %s', change.statement))
from pg_temp.changes() as change;
select is(pg_temp.rows_of('anon', null, change.statement), '42501', format('a visitor may not: %s', change.statement)) from pg_temp.changes() as change;
select is(pg_temp.rows_of('service_role', null, change.statement), '42501', format('a handler does it by a function: %s', change.statement)) from pg_temp.changes() as change;

-- What no user writes, not even an owner: the tenant, states, counters, what functions keep.
select is(pg_temp.as_role('authenticated', 1, statement), '42501', format('an owner may not: %s', statement))
from unnest(array[
  'update public.stores set organization_id = organization_id', 'update public.stores set status = ''connected''', 'update public.stores set domain = ''x.example.com''',
  'update public.stores set last_sync_at = now()', 'insert into public.stores (name, domain, platform, status) values (''x'', ''y.example.com'', ''custom'', ''connected'')',
  'insert into public.settings (category, key, value, is_encrypted) values (''voice'', ''x'', ''{"sealed":"x"}'', true)',
  'update public.settings set is_required = true',
  'insert into public.store_phone_numbers (store_id, phone_number) values (gen_random_uuid(), ''+15559999'')', 'delete from public.store_phone_numbers',
  'update public.store_phone_numbers set phone_number = ''+15559999''', 'update public.store_phone_numbers set voice_url = ''https://x''',
  'update public.customers set total_orders = 1', 'update public.customers set store_id = store_id', 'update public.customers set source_updated_at = now()',
  'delete from public.customers', 'insert into public.customer_totals default values', 'update public.customer_totals set total_spent_minor = 1', 'delete from public.customer_totals',
  'update public.orders set status = ''delivered''', 'update public.orders set payment_status = ''paid''', 'update public.orders set fulfillment_status = ''fulfilled''',
  'update public.orders set total_price_minor = 1', 'update public.orders set total_refunded_minor = 1', 'delete from public.orders',
  'update public.order_line_items set quantity = 1', 'delete from public.order_line_items',
  'insert into public.conversations default values', 'update public.conversations set status = ''resolved''', 'update public.conversations set last_activity_at = now()',
  'update public.conversations set resolution_time_seconds = 1', 'delete from public.conversations',
  'insert into public.conversation_messages default values', 'update public.conversation_messages set content = ''x''', 'delete from public.conversation_messages',
  'insert into public.calls default values', 'update public.calls set attempt_status = ''ended''', 'update public.calls set duration_seconds = 1',
  'update public.calls set recording_url = ''https://x''', 'delete from public.calls',
  'insert into public.call_analytics default values', 'update public.call_analytics set total_calls = 1', 'delete from public.call_analytics',
  'select * from private.store_credentials', 'select * from private.user_credentials', 'select * from private.setting_types'
]) as statement;
select is(
  pg_temp.as_role('service_role', null, format('select * from private.%I', name)), '42501', format('nor a handler: private.%s', name)
)
from unnest(array['store_credentials', 'user_credentials', 'setting_types']) as name;
select is(pg_temp.rows_of('authenticated', 1, 'update public.calls set attempt_status = ''created'''), '42501', 'a call''s status is the leg''s');
update public.stores set status = 'connected' where id = pg_temp.id('a000', 1);
select is(pg_temp.rows_of('authenticated', 1, $$ delete from public.stores where id = pg_temp.id('a000', 1) $$), '0', 'a store that was connected is not deleted');

-- What is sealed or required.
insert into public.settings (organization_id, store_id, category, key, value, is_encrypted)
values (pg_temp.id('8000', 1), pg_temp.id('a000', 1), 'security', 'token', '{"sealed": "x"}', true);
update public.settings set is_required = true where store_id = pg_temp.id('a000', 1) and key = 'greeting_message';
select is(pg_temp.as_role('authenticated', 1, 'select count(*) from public.settings where is_encrypted'), '0', 'a sealed setting is seen by nobody');
select is(pg_temp.rows_of('authenticated', 1, 'update public.settings set value = ''1'' where category = ''security'''), '0', 'nor changed');
select is(pg_temp.rows_of('authenticated', 1, 'delete from public.settings where category = ''security'' or key = ''greeting_message'' and store_id = pg_temp.id(''a000'', 1)'), '0', 'nor deleted, nor is a required one');

-- A user's own settings.
select is(
  pg_temp.as_role('authenticated', person, 'select string_agg(user_id::text, '' '') from public.user_settings'), case when person < 4 then pg_temp.id('c000', person)::text end,
  format('user %s sees their own settings', person)
)
from generate_series(1, 5) as person;
select is(pg_temp.rows_of('authenticated', 1, 'update public.user_settings set elevenlabs_voice_id = ''x'''), '1', 'and changes their own');
select is(pg_temp.rows_of('authenticated', 6, 'insert into public.user_settings (elevenlabs_voice_id) values (''x'')'), '1', 'makes their own');
select is(pg_temp.rows_of('authenticated', 6, 'insert into public.user_settings (elevenlabs_voice_id) values (''x'')'), '23505', 'once');
select is(pg_temp.as_role('authenticated', 3, format('insert into public.user_settings (user_id) values (%L)', pg_temp.id('c000', 5))), '42501', 'nobody else''s');
select is(pg_temp.rows_of('authenticated', 4, 'insert into public.user_settings (elevenlabs_voice_id) values (''x'')'), '42501', 'nor in no organization');

-- Who calls what.
select is(has_function_privilege(role, signature, 'execute'), allowed, format('%s %s call %s', role, case when allowed then 'may' else 'may not' end, signature))
from (
  select role, signature, role = caller
  from unnest(array['anon', 'authenticated', 'service_role']) as role,
    (
      values
        ('public.roll_up_call_analytics(jsonb)', 'service_role'), ('private.roll_up_call_analytics(jsonb, timestamptz)', 'service_role'),
        ('public.auto_complete_inactive_conversations(jsonb)', 'service_role'), ('private.auto_complete_inactive_conversations(jsonb, timestamptz)', 'service_role'),
        ('public.expire_reservations(jsonb)', 'service_role'), ('private.expire_reservations(jsonb, timestamptz)', 'service_role'),
        ('public.reserve_property(uuid, uuid, timestamptz)', 'authenticated'), ('private.reserve_property(uuid, uuid, timestamptz, timestamptz)', 'authenticated'),
        ('public.set_property_status(uuid, text)', 'authenticated'), ('private.set_property_status(uuid, text, timestamptz)', 'authenticated'),
        ('public.order_property_images(uuid, uuid[])', 'authenticated'), ('private.order_property_images(uuid, uuid[], timestamptz)', 'authenticated'),
        ('private.roll_up_call_analytics(uuid, date)', 'nobody'), ('private.recompute_customer_totals(uuid, uuid)', 'nobody'),
        ('private.apply_order_effects(private.order_effect[])', 'nobody'), ('private.lock_property(uuid, uuid, timestamptz)', 'nobody'),
        ('private.end_reservation(public.properties, text, timestamptz)', 'nobody')
    ) as v (signature, caller)
) as v (role, signature, allowed);

-- Without a condition that a select policy could answer: whoever may write changes their own rows, and nobody else's.
create function pg_temp.run(statement text) returns void
language plpgsql as $$ begin execute statement; end $$;
grant execute on function pg_temp.run(text) to public;
create function pg_temp.reach(person integer, name text, change text) returns text
language plpgsql as $$
declare
  look   text := format('select md5(string_agg(kept::text, '','' order by kept.id)) from public.%I as kept where kept.organization_id = %L', name, pg_temp.id('8000', 1));
  before text;
  after  text;
begin
  execute look into before;
  perform pg_temp.as_role('authenticated', person, format('select pg_temp.run(%L)', format(change, name)));
  execute look into after;
  return case when before is null then 'nothing to reach' when before = after then 'untouched' else 'touched' end;
end
$$;
select is(pg_temp.reach(person, v.name, v.change), 'untouched', format('user %s does not reach Near: %s', person, format(v.change, v.name)))
from (
  values
    ('stores', 'update public.%I set name = ''x'''), ('settings', 'update public.%I set description = ''x'''), ('store_phone_numbers', 'update public.%I set is_active = false, is_primary = false'),
    ('customers', 'update public.%I set last_name = ''x'''), ('products', 'update public.%I set title = ''x'''), ('product_images', 'update public.%I set alt_text = ''x'''),
    ('orders', 'update public.%I set internal_notes = ''x'''), ('order_line_items', 'update public.%I set title = ''x'''), ('conversations', 'update public.%I set title = ''x'''),
    ('calls', 'update public.%I set satisfaction_rating = 2'), ('user_settings', 'update public.%I set elevenlabs_voice_id = ''y'''),
    ('settings', 'delete from public.%I'), ('product_images', 'delete from public.%I'), ('products', 'delete from public.%I'), ('user_settings', 'delete from public.%I'),
    ('stores', 'delete from public.%I')
) as v (name, change)
cross join unnest(array[2, 4, 5]) as person;
select is(pg_temp.reach(3, name, 'delete from public.%I'), 'untouched', format('nor does a viewer: %s', name)) from unnest(array['settings', 'product_images', 'products', 'stores']) as name;
select is(pg_temp.reach(1, 'product_images', 'update public.%I set alt_text = ''x'''), 'touched', 'an editor of Near does');

select * from finish();
rollback;
