-- Tenancy is a constraint: no reference leaves its organization or its store, whoever writes it. Everything here runs as the owner of
begin;
set local search_path = public, extensions, tap;
select plan(52);

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
-- the tables, whom no policy holds back.

insert into public.products (id, organization_id, store_id, external_id, title, price_minor)
values
  (pg_temp.id('e000', 1), pg_temp.id('8000', 1), pg_temp.id('a000', 1), '1', 'Mug', 1000),
  (pg_temp.id('e000', 2), pg_temp.id('8000', 1), pg_temp.id('a000', 2), '1', 'Cup', 1000),
  (pg_temp.id('e000', 3), pg_temp.id('8000', 2), pg_temp.id('a000', 3), '1', 'Jug', 1000);
insert into public.orders (id, organization_id, store_id, customer_id, external_id, subtotal_price_minor, total_price_minor, order_date)
values
  (pg_temp.id('f000', 1), pg_temp.id('8000', 1), pg_temp.id('a000', 1), pg_temp.id('b000', 1), '1', 1000, 1000, now()),
  (pg_temp.id('f000', 2), pg_temp.id('8000', 1), pg_temp.id('a000', 2), pg_temp.id('b000', 3), '1', 1000, 1000, now()),
  (pg_temp.id('f000', 3), pg_temp.id('8000', 2), pg_temp.id('a000', 3), pg_temp.id('b000', 4), '1', 1000, 1000, now());
insert into public.conversations (id, organization_id, store_id, conversation_key, channel)
values
  (pg_temp.id('9000', 1), pg_temp.id('8000', 1), pg_temp.id('a000', 1), 'one', 'chat'),
  (pg_temp.id('9000', 2), pg_temp.id('8000', 1), pg_temp.id('a000', 2), 'one', 'chat'),
  (pg_temp.id('9000', 3), pg_temp.id('8000', 2), pg_temp.id('a000', 3), 'one', 'chat');
insert into public.projects (id, organization_id, name) values (pg_temp.id('9100', 1), pg_temp.id('8000', 1), 'Tower'), (pg_temp.id('9100', 2), pg_temp.id('8000', 2), 'Far tower');
insert into public.leads (id, organization_id, name) values (pg_temp.id('9200', 2), pg_temp.id('8000', 2), 'Far lead');
insert into public.properties (id, organization_id, title, price_minor, type)
values (pg_temp.id('9300', 1), pg_temp.id('8000', 1), 'Flat', 1, 'apartment'), (pg_temp.id('9300', 2), pg_temp.id('8000', 2), 'Far flat', 1, 'apartment');
insert into public.carrier_accounts (id, organization_id, provider, account_sid, credentials_sealed, api_base)
values
  (pg_temp.id('9400', 1), null, 'plivo', 'PLATFORM', 'sealed', 'https://api.example.com'),
  (pg_temp.id('9400', 2), pg_temp.id('8000', 2), 'plivo', 'FAR', 'sealed', 'https://api.example.com');
insert into public.call_logs (id, organization_id, carrier_account_id, caller_number, callee_number, direction)
values (pg_temp.id('9500', 2), pg_temp.id('8000', 2), pg_temp.id('9400', 1), '+15550001', '+15550002', 'inbound');

-- What each statement would do with a row of another store (2) and of another organization (3, or 2 where there is no store).
select throws_ok(format(v.statement, pg_temp.id(v.kind, n)), '23503', null, format('%s %s is refused: %s', v.what, n, v.statement))
from (
  values
    ('order for customer', 'b000', array[3, 4], $$ insert into public.orders (organization_id, store_id, customer_id, external_id, subtotal_price_minor, total_price_minor, order_date) values (pg_temp.id('8000', 1), pg_temp.id('a000', 1), %L, 'x', 1, 1, now()) $$),
    ('order moved to customer', 'b000', array[3, 4], $$ update public.orders set customer_id = %L where id = pg_temp.id('f000', 1) $$),
    ('line of order', 'f000', array[2, 3], $$ insert into public.order_line_items (organization_id, store_id, order_id, title, price_minor, quantity, total_price_minor) values (pg_temp.id('8000', 1), pg_temp.id('a000', 1), %L, 'x', 1, 1, 1) $$),
    ('line of product', 'e000', array[2, 3], $$ insert into public.order_line_items (organization_id, store_id, order_id, product_id, title, price_minor, quantity, total_price_minor) values (pg_temp.id('8000', 1), pg_temp.id('a000', 1), pg_temp.id('f000', 1), %L, 'x', 1, 1, 1) $$),
    ('image of product', 'e000', array[2, 3], $$ insert into public.product_images (organization_id, store_id, product_id, url) values (pg_temp.id('8000', 1), pg_temp.id('a000', 1), %L, 'https://i.example.com') $$),
    ('conversation with customer', 'b000', array[3, 4], $$ insert into public.conversations (organization_id, store_id, conversation_key, channel, customer_id) values (pg_temp.id('8000', 1), pg_temp.id('a000', 1), 'x', 'chat', %L) $$),
    ('conversation about order', 'f000', array[2, 3], $$ update public.conversations set order_id = %L where id = pg_temp.id('9000', 1) $$),
    ('message of conversation', '9000', array[2, 3], $$ insert into public.conversation_messages (organization_id, store_id, conversation_id, message_index, role, content) values (pg_temp.id('8000', 1), pg_temp.id('a000', 1), %L, 0, 'customer', 'x') $$),
    ('call of conversation', '9000', array[2, 3], $$ insert into public.calls (organization_id, store_id, conversation_id, from_phone, to_phone, direction, start_time) values (pg_temp.id('8000', 1), pg_temp.id('a000', 1), %L, 'anonymous', '+15550001', 'inbound', now()) $$),
    ('call about order', 'f000', array[2, 3], $$ insert into public.calls (organization_id, store_id, order_id, from_phone, to_phone, direction, start_time) values (pg_temp.id('8000', 1), pg_temp.id('a000', 1), %L, 'anonymous', '+15550001', 'inbound', now()) $$),
    ('call of customer', 'b000', array[3, 4], $$ insert into public.calls (organization_id, store_id, customer_id, from_phone, to_phone, direction, start_time) values (pg_temp.id('8000', 1), pg_temp.id('a000', 1), %L, 'anonymous', '+15550001', 'inbound', now()) $$),
    ('call of leg', '9500', array[2], $$ insert into public.calls (organization_id, store_id, call_log_id, from_phone, to_phone, direction, start_time) values (pg_temp.id('8000', 1), pg_temp.id('a000', 1), %L, 'anonymous', '+15550001', 'inbound', now()) $$),
    ('assignment to user', 'c000', array[2, 4], $$ update public.conversations set assigned_agent_id = %L where id = pg_temp.id('9000', 1) $$),
    ('setting of store', 'a000', array[3], $$ insert into public.settings (organization_id, store_id, category, key, value) values (pg_temp.id('8000', 1), %L, 'voice', 'x', '1') $$),
    ('number of store', 'a000', array[3], $$ insert into public.store_phone_numbers (organization_id, store_id, phone_number) values (pg_temp.id('8000', 1), %L, '+15550009') $$),
    ('customer of store', 'a000', array[3], $$ insert into public.customers (organization_id, store_id, external_id) values (pg_temp.id('8000', 1), %L, 'x') $$),
    ('product of store', 'a000', array[3], $$ insert into public.products (organization_id, store_id, external_id, title, price_minor, currency_code) values (pg_temp.id('8000', 1), %L, 'x', 'x', 1, 'USD') $$),
    ('analytics of store', 'a000', array[3], $$ insert into public.call_analytics (organization_id, store_id, date_period) values (pg_temp.id('8000', 1), %L, '2026-01-01') $$),
    ('credentials of store', 'a000', array[3], $$ insert into private.store_credentials (organization_id, store_id) values (pg_temp.id('8000', 1), %L) $$),
    ('settings of user', 'c000', array[2], $$ insert into public.user_settings (organization_id, user_id) values (pg_temp.id('8000', 1), %L) $$),
    ('property of project', '9100', array[2], $$ update public.properties set project_id = %L where id = pg_temp.id('9300', 1) $$),
    ('image of property', '9300', array[2], $$ insert into public.property_images (organization_id, property_id, url) values (pg_temp.id('8000', 1), %L, 'https://i.example.com') $$),
    ('feature of property', '9300', array[2], $$ insert into public.property_features (organization_id, property_id, feature_name) values (pg_temp.id('8000', 1), %L, 'Lift') $$),
    ('reservation of property', '9300', array[2], $$ insert into public.property_reservations (organization_id, property_id) values (pg_temp.id('8000', 1), %L) $$),
    ('reservation for lead', '9200', array[2], $$ insert into public.property_reservations (organization_id, property_id, lead_id) values (pg_temp.id('8000', 1), pg_temp.id('9300', 1), %L) $$)
) as v (what, kind, others, statement)
cross join unnest(v.others) as n;
select is(
  (select string_agg(currency_code || ' ' || total_spent_minor, ', ' order by customer_id) from public.customer_totals),
  'USD 1000, INR 1000, EUR 1000', 'no refused order touched anybody''s totals'
);

-- A row does not leave its store either while something hangs on it.
select throws_ok(
  $$ update public.customers set store_id = pg_temp.id('a000', 2), external_id = 'moved' where id = pg_temp.id('b000', 1) $$, '23503', null,
  'a customer with orders does not move to another store'
);
select throws_ok(
  $$ update public.stores set organization_id = pg_temp.id('8000', 2) where id = pg_temp.id('a000', 1) $$, '23503', null,
  'a store does not move to another organization'
);
select throws_ok(
  $$ insert into public.store_phone_numbers (organization_id, store_id, carrier_account_id, phone_number)
     values (pg_temp.id('8000', 1), pg_temp.id('a000', 1), pg_temp.id('9400', 2), '+15550009') $$,
  'PGRST', null, 'a number does not hang on another organization''s carrier account'
);
select lives_ok(
  $$ insert into public.store_phone_numbers (organization_id, store_id, carrier_account_id, phone_number)
     values (pg_temp.id('8000', 1), pg_temp.id('a000', 1), pg_temp.id('9400', 1), '+15550009') $$,
  'it may hang on the platform''s'
);

-- The same name in two stores is two things; in one it is one.
select is((select count(*)::integer from public.conversations where conversation_key = 'one'), 3, 'a conversation''s key is its store''s');
select throws_ok(
  $$ insert into public.orders (organization_id, store_id, external_id, subtotal_price_minor, total_price_minor, order_date)
     values (pg_temp.id('8000', 1), pg_temp.id('a000', 1), '1', 1, 1, now()) $$,
  '23505', null, 'an order that the platform names is there once'
);
select throws_ok(
  $$ insert into public.stores (organization_id, name, domain, platform) values (pg_temp.id('8000', 1), 'Again', 'shop.example.com', 'shopify') $$,
  '23505', null, 'a domain is once in an organization'
);
select lives_ok(
  $$ insert into public.stores (id, organization_id, name, domain, platform)
     values (pg_temp.id('a000', 4), pg_temp.id('8000', 2), 'Claim', 'shop.example.com', 'shopify') $$,
  'another organization may write it down too'
);
select lives_ok($$ update public.stores set status = 'connected' where id = pg_temp.id('a000', 1) $$, 'one proves that it is theirs');
select throws_ok(
  $$ update public.stores set status = 'connected' where id = pg_temp.id('a000', 4) $$, '23505', null, 'the other is not connected to it as well'
);

-- What goes takes its own along, and leaves what only pointed at it.
delete from public.products where id = pg_temp.id('e000', 1);
delete from public.conversations where id = pg_temp.id('9000', 1);
insert into public.conversations (id, organization_id, store_id, conversation_key, channel, customer_id, order_id, assigned_agent_id)
values (pg_temp.id('9000', 4), pg_temp.id('8000', 1), pg_temp.id('a000', 1), 'four', 'voice', pg_temp.id('b000', 1), pg_temp.id('f000', 1), pg_temp.id('c000', 3));
delete from public.customers where id = pg_temp.id('b000', 1);
select is(
  (select concat_ws(' ', organization_id = pg_temp.id('8000', 1), store_id = pg_temp.id('a000', 1), customer_id is null, external_id)
   from public.orders where id = pg_temp.id('f000', 1)),
  't t t 1', 'a customer''s orders outlive them, in their store'
);
delete from public.orders where id = pg_temp.id('f000', 1);
delete from auth.users where id = pg_temp.id('c000', 3);
select is(
  (select concat_ws(' ', organization_id is not null, store_id is not null, num_nulls(customer_id, order_id, assigned_agent_id))
   from public.conversations where id = pg_temp.id('9000', 4)),
  't t 3', 'a conversation outlives its customer, its order and its agent'
);
select lives_ok($$ delete from public.stores where id = pg_temp.id('a000', 2) $$, 'a store goes');
select is(
  (select count(*)::integer from (
     select store_id from public.customers union all select store_id from public.orders union all select store_id from public.products
     union all select store_id from public.settings union all select store_id from public.customer_totals
   ) as left_over where store_id = pg_temp.id('a000', 2)),
  0, 'and everything of it'
);

select * from finish();
rollback;
