-- What customers spent: every way in which an order comes, changes, moves and goes. Concurrent orders are tested with real sessions.
begin;
set local search_path = public, extensions, tap;
select plan(34);

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

create function pg_temp.place(
  number text, customer integer, amount bigint, currency text default 'USD', status text default 'pending', payment text default 'paid',
  placed timestamptz default '2026-01-01T00:00Z', store integer default 1
) returns void
language sql as $$
  insert into public.orders (
    organization_id, store_id, customer_id, external_id, subtotal_price_minor, total_price_minor, currency_code, status, payment_status, order_date
  )
  select shop.organization_id, shop.id, pg_temp.id('b000', customer), number, amount, amount, currency,
    place.status::public.order_status, payment::public.payment_status, placed
  from public.stores as shop where shop.id = pg_temp.id('a000', store)
$$;
-- "USD 2 2000 1500" is two orders of 20.00 dollars together, 5.00 paid back; then the orders of all currencies and the last day.
create function pg_temp.totals(customer integer) returns text
language sql stable as $$
  select coalesce(
      (select string_agg(concat_ws(' ', total.currency_code, total.total_orders, total.total_spent_minor, total.lifetime_value_minor), ', ' order by total.currency_code)
       from public.customer_totals as total where total.customer_id = buyer.id),
      'nothing'
    ) || '; ' || buyer.total_orders || coalesce(' until ' || (buyer.last_order_date at time zone 'UTC')::date, '')
  from public.customers as buyer where buyer.id = pg_temp.id('b000', customer)
$$;

select is(pg_temp.totals(1), 'nothing; 0', 'who ordered nothing has no totals');
select pg_temp.place('1', 1, 1000);
select is(pg_temp.totals(1), 'USD 1 1000 1000; 1 until 2026-01-01', 'an order counts');
select pg_temp.place('2', 1, 1000, placed => '2026-02-01T00:00Z');
select is(pg_temp.totals(1), 'USD 2 2000 2000; 2 until 2026-02-01', 'a second one too');
select pg_temp.place('3', 1, 1000, 'JPY', placed => '2026-01-15T00:00Z');
select is(pg_temp.totals(1), 'JPY 1 1000 1000, USD 2 2000 2000; 3 until 2026-02-01', 'yen and dollars are not added up; an older order is not the last');

-- What does not stand does not count, but was the last order all the same.
select pg_temp.place(status || payment, 2, 500, 'USD', status, payment, '2026-03-01T00:00Z')
from (values ('cancelled', 'paid'), ('refunded', 'paid'), ('returned', 'paid'), ('delivered', 'refunded'), ('pending', 'failed'), ('pending', 'cancelled')) as v (status, payment);
select is(pg_temp.totals(2), 'nothing; 0 until 2026-03-01', 'cancelled, refunded, returned and unpaid orders come to nothing');
select pg_temp.place(status, 2, 100, 'USD', status, payment)
from (values ('confirmed', 'pending'), ('processing', 'partially_paid'), ('shipped', 'paid'), ('delivered', 'partially_refunded')) as v (status, payment);
select is(pg_temp.totals(2), 'USD 4 400 400; 4 until 2026-03-01', 'all others count');

-- Refunds.
update public.orders set total_refunded_minor = 300, payment_status = 'partially_refunded' where external_id = '1' and store_id = pg_temp.id('a000', 1);
select is(pg_temp.totals(1), 'JPY 1 1000 1000, USD 2 2000 1700; 3 until 2026-02-01', 'what was paid back is not lifetime value');
update public.orders set total_refunded_minor = 1200 where external_id = '1' and store_id = pg_temp.id('a000', 1);
select is(pg_temp.totals(1), 'JPY 1 1000 1000, USD 2 2000 1000; 3 until 2026-02-01', 'more paid back than paid takes nothing from other orders');
update public.orders set status = 'refunded' where external_id = '1' and store_id = pg_temp.id('a000', 1);
select is(pg_temp.totals(1), 'JPY 1 1000 1000, USD 1 1000 1000; 2 until 2026-02-01', 'an order that is refunded as a whole is gone');
update public.orders set status = 'delivered', total_refunded_minor = 0 where external_id = '1' and store_id = pg_temp.id('a000', 1);
select is(pg_temp.totals(1), 'JPY 1 1000 1000, USD 2 2000 2000; 3 until 2026-02-01', 'and back when that was wrong');

-- Corrections, reassignment, deletion.
update public.orders set total_price_minor = 1500, currency_code = 'EUR' where external_id = '1' and store_id = pg_temp.id('a000', 1);
select is(pg_temp.totals(1), 'EUR 1 1500 1500, JPY 1 1000 1000, USD 1 1000 1000; 3 until 2026-02-01', 'amount and currency corrected');
update public.orders set customer_id = pg_temp.id('b000', 2) where external_id = '2' and store_id = pg_temp.id('a000', 1);
select is(pg_temp.totals(1), 'EUR 1 1500 1500, JPY 1 1000 1000; 2 until 2026-01-15', 'an order that moves away is taken along, last day too');
select is(pg_temp.totals(2), 'USD 5 1400 1400; 5 until 2026-03-01', 'and is the other''s now');
update public.orders set customer_id = null where external_id = '3' and store_id = pg_temp.id('a000', 1);
select is(pg_temp.totals(1), 'EUR 1 1500 1500; 1 until 2026-01-01', 'an order of nobody is nobody''s');
delete from public.orders where external_id = '1' and store_id = pg_temp.id('a000', 1);
select is(pg_temp.totals(1), 'nothing; 0', 'a deleted order leaves nothing behind');
update public.orders set order_date = '2026-06-01T00:00Z' where external_id = 'delivered' and store_id = pg_temp.id('a000', 1);
select is(pg_temp.totals(2), 'USD 5 1400 1400; 5 until 2026-06-01', 'a corrected date is seen');

-- In bulk, and as an upsert: inserts and updates of one statement.
insert into public.orders (organization_id, store_id, customer_id, external_id, subtotal_price_minor, total_price_minor, currency_code, order_date)
select pg_temp.id('8000', 1), pg_temp.id('a000', 1), pg_temp.id('b000', 1 + n % 2), 'bulk' || n, n, n, case when n % 3 = 0 then 'INR' else 'USD' end, '2026-01-01T00:00Z'
from generate_series(1, 100) as n;
insert into public.orders (organization_id, store_id, customer_id, external_id, subtotal_price_minor, total_price_minor, currency_code, order_date)
select pg_temp.id('8000', 1), pg_temp.id('a000', 1), pg_temp.id('b000', 1 + (n + 1) % 2), 'bulk' || n, n, 2 * n, 'USD', '2026-01-02T00:00Z'
from generate_series(51, 150) as n
on conflict (organization_id, store_id, external_id) do update
set customer_id = excluded.customer_id, total_price_minor = excluded.total_price_minor, currency_code = excluded.currency_code, order_date = excluded.order_date;
select is(
  (select string_agg(concat_ws(' ', customer_id, currency_code, total_orders, total_spent_minor), ', ' order by customer_id, currency_code) from public.customer_totals),
  (
    select string_agg(concat_ws(' ', customer_id, currency_code, count, sum), ', ' order by customer_id, currency_code)
    from (
      select customer_id, currency_code, count(*), sum(total_price_minor)
      from public.orders
      where customer_id is not null and is_standing
      group by customer_id, currency_code
    ) as truth
  ),
  'a hundred orders and an upsert of a hundred, half of them moving: totals are those of the orders'
);
select is(private.recompute_customer_totals(pg_temp.id('8000', 1), pg_temp.id('a000', 1)), 0, 'a recount finds nothing to correct');
update public.customer_totals set total_spent_minor = total_spent_minor + 1 where customer_id = pg_temp.id('b000', 1);
update public.customers set total_orders = 99 where id = pg_temp.id('b000', 2);
select is(private.recompute_customer_totals(pg_temp.id('8000', 1), pg_temp.id('a000', 1)), 2, 'it corrects what somebody broke');
select is(private.recompute_customer_totals(pg_temp.id('8000', 1), pg_temp.id('a000', 1)), 0, 'once');

-- What says nothing to a total touches no customer.
update public.customers set updated_at = '2020-01-01T00:00Z' where store_id = pg_temp.id('a000', 1);
update public.orders set internal_notes = 'fragile', tracking_number = 'T1', fulfillment_status = 'fulfilled' where store_id = pg_temp.id('a000', 1);
select is(
  (select count(*)::integer from public.customers where store_id = pg_temp.id('a000', 1) and updated_at <> '2020-01-01T00:00Z'), 0,
  'a note on an order does not touch its customer'
);
select pg_temp.place('other', 3, 700, 'INR', store => 2);
select is(pg_temp.totals(3), 'INR 1 700 700; 1 until 2026-01-01', 'another store''s customer has their own');
select throws_ok(
  $$ update public.orders set total_price_minor = -1 where store_id = pg_temp.id('a000', 2) $$, '23514', null, 'no amount is negative'
);
select throws_ok(
  $$ update public.orders set currency_code = 'usd' where store_id = pg_temp.id('a000', 2) $$, '23514', null, 'a currency is three capital letters'
);
insert into public.orders (organization_id, store_id, external_id, subtotal_price_minor, total_price_minor, order_date)
values (pg_temp.id('8000', 1), pg_temp.id('a000', 2), 'plain', 1, 1, now());
select is((select currency_code from public.orders where external_id = 'plain'), 'INR', 'an order that names no currency is in its store''s');
select lives_ok($$ delete from public.customers where id = pg_temp.id('b000', 2) $$, 'a customer with orders is deleted');
select is((select count(*)::integer from public.customer_totals where customer_id = pg_temp.id('b000', 2)), 0, 'and their totals');
select is(private.recompute_customer_totals(pg_temp.id('8000', 1), pg_temp.id('a000', 1)), 0, 'the others'' are as they were');

-- Lines.
insert into public.order_line_items (organization_id, store_id, order_id, external_id, title, price_minor, quantity, total_price_minor)
select organization_id, store_id, id, 'L1', 'Mug', 100, 2, 200 from public.orders where external_id = 'bulk1';
select throws_ok(
  $$ insert into public.order_line_items (organization_id, store_id, order_id, external_id, title, price_minor, quantity, total_price_minor)
     select organization_id, store_id, id, 'L1', 'Mug', 100, 2, 200 from public.orders where external_id = 'bulk1' $$,
  '23505', null, 'a line that the platform names is there once an order'
);
select lives_ok(
  $$ insert into public.order_line_items (organization_id, store_id, order_id, external_id, title, price_minor, quantity, total_price_minor)
     select organization_id, store_id, id, 'L1', 'Mug', 100, 2, 200 from public.orders where external_id = 'bulk2' $$,
  'and again in another order'
);
select throws_ok(format('update public.order_line_items set %s', change), '23514', null, format('no line has %s', change))
from unnest(array['quantity = 0', 'price_minor = -1', 'fulfilled_quantity = 3', 'fulfilled_quantity = -1']) as change;

select * from finish();
rollback;
