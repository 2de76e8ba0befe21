-- What shops tell: products, customers and orders by source version, in whatever order they come; deletions that last; who asks to be
-- forgotten is. Events are given as the handler gives them.
begin;
set local search_path = public, extensions, tap;
select plan(72);

create function pg_temp.id(kind text, n integer) returns uuid
language sql immutable strict as $$ select format('00000000-0000-4000-%s-%s', kind, lpad(n::text, 12, '0'))::uuid $$;
-- Near has a shop at Shopify (1) and one at WooCommerce (2), Far has one at Shopify (3); a source each, 9 has no store.
insert into public.organizations (id, name, currency) values (pg_temp.id('8000', 1), 'Near', 'INR'), (pg_temp.id('8000', 2), 'Far', 'EUR');
insert into public.stores (id, organization_id, name, domain, platform, currency_code, status)
values
  (pg_temp.id('a000', 1), pg_temp.id('8000', 1), 'Shop', 'shop.example.com', 'shopify', 'INR', 'connected'),
  (pg_temp.id('a000', 2), pg_temp.id('8000', 1), 'Woo', 'woo.example.com', 'woocommerce', 'JPY', 'connected'),
  (pg_temp.id('a000', 3), pg_temp.id('8000', 2), 'Far shop', 'far.example.com', 'shopify', 'EUR', 'connected');
insert into public.webhook_sources (id, organization_id, store_id, provider, name, secrets_sealed, settings)
values
  (pg_temp.id('f000', 1), pg_temp.id('8000', 1), pg_temp.id('a000', 1), 'shopify', 'Shop', array['v1.x'], '{"shop_domain": "near.myshopify.com"}'),
  (pg_temp.id('f000', 2), pg_temp.id('8000', 1), pg_temp.id('a000', 2), 'woocommerce', 'Woo', array['v1.x'], '{}'),
  (pg_temp.id('f000', 3), pg_temp.id('8000', 2), pg_temp.id('a000', 3), 'shopify', 'Far', array['v1.x'], '{}'),
  (pg_temp.id('f000', 9), pg_temp.id('8000', 1), null, 'shopify', 'No store', array['v1.x'], '{}'),
  (pg_temp.id('f000', 8), pg_temp.id('8000', 1), pg_temp.id('a000', 1), 'woocommerce', 'Wrong kind', array['v1.x'], '{}');
insert into private.store_credentials (organization_id, store_id, access_token_sealed) values (pg_temp.id('8000', 1), pg_temp.id('a000', 1), 'v1.x');

create sequence pg_temp.keys;
create function pg_temp.tell(payload jsonb, source integer default 1, key text default null) returns text
language sql volatile as $$
  select private.apply_event(
    jsonb_build_object(
      'v', 1, 'source', coalesce((select provider from public.webhook_sources where id = pg_temp.id('f000', source)), 'shopify'),
      'source_id', pg_temp.id('f000', source), 'verified', true, 'body', payload::text,
      'events', jsonb_build_array(jsonb_build_object(
        'kind', payload ->> 'event', 'dedupe_key', coalesce(key, nextval('pg_temp.keys')::text), 'payload', '{"type": "store"}' || payload
      ))
    ), '2026-02-01T00:00Z'
  ) ->> 'result'
$$;
create function pg_temp.last_error() returns text
language sql stable as $$ select error from private.webhook_events order by id desc limit 1 $$;

-- Amounts.
select is(private.to_minor('199.00', 'INR'), 19900::bigint, 'two decimals');
select is(private.to_minor('1000.00', 'JPY'), 1000::bigint, 'none');
select is(private.to_minor('1.2345', 'KWD'), 1235::bigint, 'three, and what is finer is rounded half away from zero');
select is(private.to_minor('0.29', 'USD'), 29::bigint, 'exactly: in floating point this is 28.999999999999996');
select is(private.to_minor('90071992547409.93', 'USD'), 9007199254740993::bigint, 'beyond 2^53 too');
select is(private.plain_phone(' +91 98123-45678 '), '+919812345678', 'a number with its country');
select is(private.plain_phone('98123 45678'), null, 'one without is nobody''s guess');

-- Products.
create function pg_temp.product(at text, title text, price text default '10.00', images jsonb default '[]', extra jsonb default '{}') returns jsonb
language sql as $$
  select jsonb_build_object('event', 'product', 'version_at', at, 'product', jsonb_build_object(
    'external_id', '788032119674292922', 'title', title, 'price', price, 'images', images, 'tags', '["a", "b"]'::jsonb,
    'inventory_quantity', -3, 'inventory_tracked', true, 'availability', 'backorder', 'platform', '{"inventory_quantity": -3}'::jsonb) || extra)
$$;
select is(pg_temp.tell(pg_temp.product('2026-01-02T10:00:00-05:00', 'Second', '12.50',
  '[{"external_id": "1", "url": "https://x/1"}, {"external_id": "2", "url": "https://x/2", "position": 2}]')), 'applied', 'a product');
select results_eq(
  $$select title, price_minor, currency_code, inventory_quantity, platform_data ->> 'inventory_quantity', tags from public.products$$,
  $$values ('Second', 1250::bigint, 'INR', 0, '-3', array['a', 'b'])$$, 'in its store''s currency; less than nothing is nothing');
select is(pg_temp.tell(pg_temp.product('2026-01-02T14:59:59Z', 'First')), 'ignored', 'an older version');
select is((select title from public.products), 'Second', 'changes nothing');
select is(pg_temp.tell(pg_temp.product('2026-01-02T15:00:01Z', 'Third', images => '[{"external_id": "2", "url": "https://x/3"}, {"external_id": "3", "url": "ftp://x"}]')),
  'applied', 'a newer one');
select results_eq($$select external_id, url from public.product_images order by 1$$, $$values ('2', 'https://x/3')$$,
  'has its images: one changed, one gone, and what is no address is none');
select is(pg_temp.tell(pg_temp.product('2026-01-02T15:00:02Z', 'Odd', extra => '{"status": null, "title": ""}')), 'applied', 'a word that nobody mapped');
select is((select status || ' ' || title from public.products), 'active Product 788032119674292922', 'leaves what was known');

-- Orders and customers.
create function pg_temp.purchase(at text, total text, rank integer default 0, extra jsonb default '{}', buyer text default '207119551', number text default '1') returns jsonb
language sql as $$
  select jsonb_build_object('event', 'order', 'version_at', at, 'rank', rank, 'order', jsonb_build_object(
    'external_id', number, 'customer_external_id', buyer, 'customer_email', 'Bob@Example.com', 'customer_phone', '+91 98123 45678',
    'customer_first_name', 'Bob', 'currency', 'USD', 'subtotal', total, 'total', total, 'status', 'pending', 'payment_status', 'pending',
    'ordered_at', '2026-01-01T00:00:00Z', 'shipping_address', '{"city": "Pune"}'::jsonb,
    'lines', '[{"external_id": "11", "title": "Gun", "price": "10.00", "quantity": 2, "external_product_id": "p1"},
               {"external_id": "12", "title": "Ink", "price": "1.00", "quantity": 1, "discount": "0.50"}]'::jsonb) || extra)
$$;
select is(pg_temp.tell(pg_temp.purchase('2026-01-03T00:00:00Z', '21.00')), 'applied', 'an order');
select results_eq(
  $$select known.external_id, known.email, known.phone, purchase.total_price_minor, purchase.currency_code
    from public.orders as purchase join public.customers as known on known.id = purchase.customer_id$$,
  $$values ('207119551', 'bob@example.com', '+919812345678', 2100::bigint, 'USD')$$, 'has its customer, of whom no event has come');
select results_eq($$select external_id, price_minor, total_price_minor from public.order_line_items order by 1$$,
  $$values ('11', 1000::bigint, 2000::bigint), ('12', 100::bigint, 50::bigint)$$, 'and its lines, discounts taken off');
select results_eq($$select currency_code, total_spent_minor from public.customer_totals$$, $$values ('USD', 2100::bigint)$$, 'which counts');
select is(pg_temp.tell(pg_temp.purchase('2026-01-02T00:00:00Z', '99.00', extra => '{"lines": []}')), 'ignored', 'an older version');
select results_eq($$select count(*), max((select total_price_minor from public.orders)) from public.order_line_items$$,
  $$values (2::bigint, 2100::bigint)$$, 'takes no line away');
select is(pg_temp.tell(pg_temp.purchase('2026-01-04T00:00:00Z', '20.00', 13,
  '{"payment_status": "paid", "status": "confirmed", "lines": [{"external_id": "11", "title": "Gun", "price": "10.00", "quantity": 2, "external_product_id": "p1"}]}')),
  'applied', 'a newer one');
select results_eq($$select external_id from public.order_line_items$$, $$values ('11')$$, 'does');
select is((select status || ' ' || payment_status from public.orders), 'confirmed paid', 'and moves the statuses');
select is(pg_temp.tell(pg_temp.purchase('2026-01-04T00:00:00Z', '20.00', 76, '{"status": "cancelled", "payment_status": "cancelled"}')), 'applied',
  'of two versions of one second the one that is further on');
select is(pg_temp.tell(pg_temp.purchase('2026-01-04T00:00:00Z', '20.00', 13, '{"status": "confirmed"}')), 'ignored', 'stands');
select is((select count(*) from public.customer_totals), 0::bigint, 'and a cancelled order counts for nothing');
select is(pg_temp.tell(pg_temp.purchase('2026-01-05T00:00:00Z', '20.00', 13, '{"status": null, "payment_status": "paid"}')), 'applied', 'an unknown word');
select is((select status || ' ' || payment_status from public.orders), 'cancelled paid', 'leaves what was known');

create function pg_temp.person(at text, extra jsonb default '{}', external text default '207119551') returns jsonb
language sql as $$
  select jsonb_build_object('event', 'customer', 'version_at', at, 'customer', jsonb_build_object(
    'external_id', external, 'email', 'bob@home.example', 'phone', '98123', 'first_name', 'Robert', 'tags', '["vip"]'::jsonb) || extra)
$$;
select is(pg_temp.tell(pg_temp.person('2025-01-01T00:00:00Z')), 'applied', 'the customer comes after their order, and with an older time');
select results_eq($$select email, phone, first_name, tags from public.customers$$,
  $$values ('bob@home.example', null, 'Robert', array['vip'])$$, 'and says more than it; a number without a country is none');
select is(pg_temp.tell(pg_temp.purchase('2026-01-06T00:00:00Z', '20.00', 13)), 'applied', 'what the order says of them then');
select is((select first_name from public.customers), 'Robert', 'is no news');
insert into public.orders (organization_id, store_id, external_id, customer_external_id, subtotal_price_minor, total_price_minor, currency_code, order_date)
values (pg_temp.id('8000', 1), pg_temp.id('a000', 1), 'early', '42', 500, 500, 'USD', '2026-01-01');
select is(pg_temp.tell(pg_temp.person('2026-01-01T00:00:00Z', external => '42')), 'applied', 'an order that names a customer');
select is((select known.external_id from public.orders as o join public.customers as known on known.id = o.customer_id where o.external_id = 'early'), '42',
  'is linked when they come');
select is((select total_orders from public.customers where external_id = '42'), 1, 'and counts then');
select is(pg_temp.tell(jsonb_build_object('event', 'product', 'version_at', '2026-01-01T00:00:00Z', 'product',
  '{"external_id": "p1", "title": "Gun", "price": "10"}'::jsonb)), 'applied', 'a product that comes after its order');
select is((select p.external_id from public.order_line_items as l join public.products as p on p.id = l.product_id), 'p1', 'is linked to its line');

-- Refunds.
select is(pg_temp.tell('{"event": "refund", "order_external_id": "77", "refund": {"external_id": "r1", "amount": "5.00"}}'), 'failed',
  'a refund before its order is kept, and tried again');
select is(pg_temp.tell('{"event": "refund", "order_external_id": "1", "refund": {"external_id": "r1", "amount": "5.00"}}'), 'applied', 'a refund');
select is(pg_temp.tell(pg_temp.purchase('2026-01-07T00:00:00Z', '20.00', 14,
  '{"status": "confirmed", "payment_status": "partially_refunded", "refunds": [{"external_id": "r1", "amount": "5.00"}, {"external_id": "r2", "amount": "1.00"}]}')), 'applied',
  'and the order that tells it too, and another');
select is((select total_refunded_minor from public.orders where external_id = '1'), 600::bigint, 'count once each');
select is(pg_temp.tell('{"event": "refund", "order_external_id": "1", "refund": {"external_id": "r2", "amount": "1.00"}}'), 'ignored', 'told again');
select is((select lifetime_value_minor from public.customer_totals join public.customers on id = customer_id where external_id = '207119551'), 1400::bigint,
  'what is left counts');

-- Whose event it is.
select is(pg_temp.tell(pg_temp.purchase('2026-01-08T00:00:00Z', '1.00'), 9), 'orphan', 'a source without a store');
select is(pg_temp.tell(pg_temp.purchase('2026-01-08T00:00:00Z', '1.00'), 8), 'orphan', 'one of another platform than its store''s');
select is(pg_temp.tell('{"shop": "other.myshopify.com"}' || pg_temp.purchase('2026-01-08T00:00:00Z', '1.00')), 'orphan', 'another shop''s');
select is(pg_temp.last_error(), 'other_shop', 'and it says so');
select is(pg_temp.tell('{"shop": "Near.myshopify.com"}' || pg_temp.purchase('2026-01-08T00:00:00Z', '20.00', 13)), 'applied', 'the name at the platform is set');
select is(pg_temp.tell('{"shop": "near.myshopify.com", "signed_shops": ["far.example.com"], "event": "uninstalled"}'), 'orphan', 'the body is believed before the header');
select is(pg_temp.tell('{"event": "order_deleted", "external_id": "1"}', 3), 'applied', 'another organization''s deletion');
select is((select count(*) from public.orders where external_id = '1'), 1::bigint, 'reaches only its own');

-- Deletions last.
select is(pg_temp.tell('{"event": "order_deleted", "external_id": "1"}'), 'applied', 'an order is deleted');
select is(pg_temp.tell(pg_temp.purchase('2026-03-01T00:00:00Z', '20.00')), 'ignored', 'and no event brings it back');
select is((select count(*) from public.orders where external_id = '1'), 0::bigint, 'indeed');
select is(pg_temp.tell('{"event": "order_deleted", "external_id": "5"}', 2), 'applied', 'a shop that has a bin');
select is(pg_temp.tell('{"restored": true}' || pg_temp.purchase('2026-03-01T00:00:00Z', '1000', number => '5') || '{"order": {"external_id": "5", "total": "1000", "subtotal": "1000", "currency": "JPY"}}', 2), 'applied',
  'takes one out again');
select is((select total_price_minor from public.orders where external_id = '5'), 1000::bigint, 'in its currency, which has no cents');
select is(pg_temp.tell('{"event": "customer_deleted", "external_id": "42"}'), 'applied', 'a customer is deleted');
select is((select customer_id from public.orders where external_id = 'early'), null, 'their order stays');

-- Privacy. What erases elsewhere is another function's; here it is only asked.
create table pg_temp.erased (request jsonb);
grant all on pg_temp.erased to public;
create or replace function private.erase(request jsonb, at timestamptz) returns jsonb
language plpgsql as $$ begin insert into pg_temp.erased values (request); return '{}'; end $$;
select pg_temp.tell(pg_temp.purchase('2026-03-02T00:00:00Z', '20.00', number => '8'));
select is(pg_temp.tell('{"event": "data_request", "request_id": "9", "customer": {"external_id": "207119551", "email": "bob@home.example"}, "order_external_ids": ["8"]}'),
  'applied', 'a customer wants their data');
select results_eq($$select kind, external_id, customer_external_id, due_at from public.privacy_requests$$,
  $$values ('data_request', '9', '207119551', timestamptz '2026-03-03T00:00Z')$$, 'which somebody has to give them within thirty days');
select is(pg_temp.tell('{"event": "customer_redact", "customer": {"external_id": "207119551", "email": "bob@home.example", "phone": "+14155550123"}, "order_external_ids": ["8"]}'),
  'applied', 'a customer wants to be forgotten');
select set_eq($$select request ->> 'phone' as phone, request ->> 'email' as email from pg_temp.erased$$,
  $$values ('+14155550123', 'bob@home.example'), (null, 'bob@home.example'), ('+919812345678', 'bob@example.com')$$,
  'under every number and address that is known of them');
select results_eq(
  $$select customer_id, customer_email, customer_phone, customer_first_name, customer_external_id, shipping_address, total_price_minor
    from public.orders where external_id = '8'$$,
  $$values (null::uuid, null, null, null, null, null::jsonb, 2000::bigint)$$, 'their order keeps its amount alone');
select is((select count(*) from public.customers where external_id = '207119551'), 0::bigint, 'their row is gone');
select is(
  (select string_agg(kind || ' ' || status || ' ' || coalesce(payload::text, ''), '; ') from private.webhook_events where source_id = pg_temp.id('f000', 1)::text and coalesce(body, '') || coalesce(payload::text, '') ~* 'bob@example|207119551' and kind <> 'data_request'), null,
  'and no event tells of them, nor the one that asked');
select pg_temp.tell(pg_temp.purchase('2026-03-09T00:00:00Z', '20.00', number => '8'));
select is((select coalesce(customer_email, customer_external_id, customer_first_name) from public.orders where external_id = '8'), null, 'nor does a later one');

select is(pg_temp.tell('{"event": "uninstalled", "signed_shops": ["near.myshopify.com"]}'), 'applied', 'the app is taken out');
select is((select status || ' ' || (select count(*) from private.store_credentials) from public.stores where id = pg_temp.id('a000', 1)), 'disconnected 0',
  'the store is disconnected, what opened it is dropped');
select is(pg_temp.tell('{"event": "shop_redact", "signed_shops": ["near.myshopify.com"]}'), 'applied', 'the shop wants to be forgotten');
select is(
  (select count(*) from public.orders where store_id = pg_temp.id('a000', 1)) + (select count(*) from public.customers where store_id = pg_temp.id('a000', 1))
    + (select count(*) from public.products where store_id = pg_temp.id('a000', 1))
    + (select count(*) from private.webhook_events where source_id = pg_temp.id('f000', 1)::text and body is not null), 0::bigint,
  'nothing of it is left');

select * from finish();
rollback;
