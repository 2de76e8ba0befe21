-- Properties: of two who reserve one wins, states move along their ways, images have an order. Simultaneous ones are tested with sessions.
begin;
set local search_path = public, extensions, tap;
select plan(146);

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
create function pg_temp.rows_of(person integer, statement text) returns text
language sql as $$ select pg_temp.as_role('authenticated', person, format('with touched as (%s returning 1) select count(*) from touched', statement)) $$;

insert into private.clock_offset (shift) values (timestamptz '2026-06-01T12:00Z' - now());
insert into public.projects (id, organization_id, name) values (pg_temp.id('9100', 1), pg_temp.id('8000', 1), 'Tower');
insert into public.leads (id, organization_id, name) values (pg_temp.id('9200', 1), pg_temp.id('8000', 1), 'Asha'), (pg_temp.id('9200', 2), pg_temp.id('8000', 2), 'Far');
insert into public.properties (id, organization_id, title, price_minor, type)
select pg_temp.id('9300', n), pg_temp.id('8000', case when n < 10 then 1 else 2 end), 'Flat ' || n, 100, 'apartment' from generate_series(1, 12) as n;

select is((select string_agg(distinct currency_code, ' ' order by currency_code) from public.properties), 'EUR INR', 'a price that names no currency is in its organization''s');
select throws_ok(format('update public.properties set %s where id = pg_temp.id(''9300'', 1)', change), '23514', null, format('no property has %s', change))
from unnest(array['type = ''castle''', 'status = ''haunted''', 'price_minor = -1', 'bedrooms = -1', 'size_sqft = 0', 'currency_code = ''inr''', 'title = '' ''']) as change;

-- Who sees and writes.
select is(
  pg_temp.as_role('authenticated', person, 'select count(*) || '' '' || count(distinct organization_id) from public.properties'), seen, format('user %s sees %s', person, seen)
)
from (values (1, '9 1'), (2, '3 1'), (3, '9 1'), (4, '0 0'), (5, '0 0'), (6, '0 0')) as v (person, seen);
select is(pg_temp.as_role('anon', null, format('select count(*) from public.%I', name)), '42501', format('a visitor may not ask for %s', name))
from unnest(array['properties', 'property_reservations', 'property_images', 'property_features']) as name;
select is(pg_temp.rows_of(person, v.statement), case person when 1 then v.owner when 2 then v.stranger else v.viewer end, format('user %s: %s', person, v.statement))
from (
  values
    ($$ insert into public.properties (title, price_minor, type, project_id) values ('New', 1, 'villa', pg_temp.id('9100', 1)) $$, '1', '23503', '42501'),
    ($$ update public.properties set price_minor = 5 where id = pg_temp.id('9300', 9) $$, '1', '0', '0'),
    ($$ insert into public.property_images (property_id, url) values (pg_temp.id('9300', 9), 'https://i.example.com') $$, '1', '23503', '42501'),
    ($$ insert into public.property_features (property_id, feature_name) values (pg_temp.id('9300', 9), 'Lift') $$, '1', '23503', '42501'),
    ($$ delete from public.property_features where property_id = pg_temp.id('9300', 9) $$, '1', '0', '0'),
    ($$ delete from public.properties where id = pg_temp.id('9300', 9) $$, '1', '0', '0')
) as v (statement, owner, stranger, viewer)
cross join unnest(array[2, 3, 1]) as person;
select is(pg_temp.as_role(role, 1, statement), '42501', format('%s may not: %s', role, statement))
from unnest(array['authenticated', 'service_role']) as role,
  unnest(array[
    'update public.properties set status = ''sold''', 'update public.properties set organization_id = organization_id',
    'insert into public.properties (title, price_minor, type, status) values (''x'', 1, ''plot'', ''sold'')', 'insert into public.property_reservations default values',
    'update public.property_reservations set status = ''released'', ended_at = now()', 'delete from public.property_reservations'
  ]) as statement;

-- Reserving.
create function pg_temp.state(property integer) returns text
language sql stable as $$
  select concat_ws(' ', flat.status, (
    select string_agg(hold.status || coalesce('/' || (hold.lead_id = pg_temp.id('9200', 1))::text, ''), ',' order by hold.created_at, hold.status)
    from public.property_reservations as hold where hold.property_id = flat.id))
  from public.properties as flat where flat.id = pg_temp.id('9300', property)
$$;
select is(pg_temp.as_role('authenticated', 1, $$ select public.reserve_property(pg_temp.id('9300', 1), pg_temp.id('9200', 1)) ->> 'status' $$), 'held', 'an editor reserves');
select is(pg_temp.state(1), 'reserved held/true', 'the property is reserved, for the lead');
select is(pg_temp.as_role('authenticated', 1, $$ select public.reserve_property(pg_temp.id('9300', 1)) $$), 'property_not_available', 'whoever comes second is told');
select throws_ok(
  $$ insert into public.property_reservations (organization_id, property_id) values (pg_temp.id('8000', 1), pg_temp.id('9300', 1)) $$, '23505', null,
  'the wall behind it: one hold a property'
);
select is(pg_temp.as_role('authenticated', v.person, v.query), v.code, format('user %s: %s', v.person, v.code))
from (
  values
    (2, $$ select public.reserve_property(pg_temp.id('9300', 2)) $$, 'property_not_found'),
    (2, $$ select public.set_property_status(pg_temp.id('9300', 1), 'available') $$, 'property_not_found'),
    (3, $$ select public.reserve_property(pg_temp.id('9300', 2)) $$, 'permission_denied'),
    (3, $$ select public.set_property_status(pg_temp.id('9300', 1), 'available') $$, 'permission_denied'),
    (4, $$ select public.reserve_property(pg_temp.id('9300', 2)) $$, 'no_organization'),
    (5, $$ select public.reserve_property(pg_temp.id('9300', 2)) $$, 'no_organization'),
    (null, $$ select public.reserve_property(pg_temp.id('9300', 2)) $$, 'unauthenticated'),
    (1, $$ select public.reserve_property(pg_temp.id('9300', 10)) $$, 'property_not_found'),
    (1, $$ select public.reserve_property(null) $$, 'property_not_found'),
    (1, $$ select public.reserve_property(pg_temp.id('9300', 2), pg_temp.id('9200', 2)) $$, 'lead_not_found'),
    (1, $$ select public.reserve_property(pg_temp.id('9300', 2), held_until => '2026-06-01T12:00Z') $$, 'invalid_time'),
    (1, $$ select public.set_property_status(pg_temp.id('9300', 2), 'reserved') $$, 'invalid_transition'),
    (1, $$ select public.set_property_status(pg_temp.id('9300', 2), 'available') $$, 'invalid_transition'),
    (1, $$ select public.set_property_status(pg_temp.id('9300', 2), 'haunted') $$, 'invalid_transition'),
    (1, $$ select public.set_property_status(pg_temp.id('9300', 2), null) $$, 'invalid_transition')
) as v (person, query, code);
select is(pg_temp.state(2), 'available', 'nothing of that did anything');
select is(pg_temp.as_role('authenticated', 1, $$ select public.set_property_status(pg_temp.id('9300', 1), 'available') ->> 'status' $$), 'available', 'released');
select is(pg_temp.state(1), 'available released/true', 'the hold has ended');
select is(pg_temp.as_role('authenticated', 1, $$ select public.reserve_property(pg_temp.id('9300', 1)) ->> 'status' $$), 'held', 'and it can be reserved again');
select is(pg_temp.as_role('authenticated', 1, $$ select public.set_property_status(pg_temp.id('9300', 1), 'sold') ->> 'status' $$), 'sold', 'sold');
select is((select string_agg(status, ' ' order by status) from public.property_reservations where property_id = pg_temp.id('9300', 1)), 'released sold', 'to who held it');
select is(pg_temp.as_role('authenticated', 1, $$ select public.reserve_property(pg_temp.id('9300', 1)) $$), 'property_not_available', 'what is sold is not reserved');
select is(pg_temp.as_role('authenticated', 1, $$ select public.set_property_status(pg_temp.id('9300', 1), 'rented') $$), 'invalid_transition', 'nor let');
select is(pg_temp.as_role('authenticated', 1, $$ select public.set_property_status(pg_temp.id('9300', 1), 'available') ->> 'status' $$), 'available', 'a sale falls through');
select is(pg_temp.as_role('authenticated', 1, $$ select public.set_property_status(pg_temp.id('9300', 3), 'rented') ->> 'status' $$), 'rented', 'let without a hold');
select is(pg_temp.rows_of(1, $$ delete from public.properties where id = pg_temp.id('9300', 3) $$), '0', 'what is let is not deleted');
select is(pg_temp.rows_of(1, $$ delete from public.properties where id = pg_temp.id('9300', 1) $$), '23503', 'nor what was once reserved: it is archived');
select is(pg_temp.rows_of(1, $$ update public.properties set archived_at = now() where id = pg_temp.id('9300', 1) $$), '1', 'so');
select is(pg_temp.as_role('authenticated', 1, $$ select public.reserve_property(pg_temp.id('9300', 1)) $$), 'property_not_available', 'and then not reserved');
select is(
  (select string_agg(action, ' ' order by created_at, action) from public.audit_logs where organization_id = pg_temp.id('8000', 1) and entity_id = pg_temp.id('9300', 1)),
  'property.reserved property.reserved property.status_changed property.status_changed property.status_changed', 'all of it is in the audit log'
);

-- A hold that runs out.
select is(pg_temp.as_role('authenticated', 1, format('select public.reserve_property(pg_temp.id(''9300'', %s), held_until => ''2026-06-01T13:00Z'') ->> ''status''', n)), 'held', 'held for an hour')
from generate_series(4, 6) as n;
select is(private.expire_reservations('{"v": 1}', '2026-06-01T12:59Z'), '{"expired": 0, "more": false}'::jsonb, 'not before its time');
update private.clock_offset set shift = timestamptz '2026-06-01T13:00Z' - now();
select is(pg_temp.as_role('authenticated', 1, $$ select public.reserve_property(pg_temp.id('9300', 4)) ->> 'status' $$), 'held', 'when it has run out the next one may, swept or not');
select is(pg_temp.state(4), 'reserved expired,held', 'the old hold is expired');
select is(public.expire_reservations('{"v": 1, "limit": 1}'), '{"expired": 1, "more": true}'::jsonb, 'the sweep frees the others');
select is(public.expire_reservations('{"v": 1}'), '{"expired": 1, "more": false}'::jsonb, 'all of them');
select is(pg_temp.state(5) || '; ' || pg_temp.state(6), 'available expired; available expired', 'they can be had');
select is(pg_temp.state(4), 'reserved expired,held', 'a hold without an end stays');

-- Images.
insert into public.property_images (id, organization_id, property_id, url, order_index)
select pg_temp.id('9700', n), pg_temp.id('8000', 1), pg_temp.id('9300', 7), 'https://i.example.com/' || n, 0 from generate_series(0, 4) as n;
create function pg_temp.images() returns text
language sql stable as $$ select string_agg(right(id::text, 1), '' order by order_index, created_at, id) from public.property_images where property_id = pg_temp.id('9300', 7) $$;
select is(
  pg_temp.as_role('authenticated', 1, $$ select string_agg(right(image ->> 'id', 1) || (image ->> 'order_index'), ' ') from jsonb_array_elements(
    public.order_property_images(pg_temp.id('9300', 7), array[pg_temp.id('9700', 4), pg_temp.id('9700', 2)])) as image $$),
  '40 21 02 13 34', 'those named come first, the others follow as they were'
);
select is((select count(*)::integer from public.property_images where position is distinct from order_index), 0, 'position is order_index');
select is(pg_temp.as_role('authenticated', 1, $$ select public.order_property_images(pg_temp.id('9300', 7), array[pg_temp.id('9700', 3), pg_temp.id('9700', 3)]) $$) is not null, true, 'one named twice is one');
select is(pg_temp.images(), '34201', 'and the last drag stands');
select is(pg_temp.as_role('authenticated', person, query), code, format('user %s: %s', person, code))
from (
  values
    (1, $$ select public.order_property_images(pg_temp.id('9300', 8), array[pg_temp.id('9700', 3)]) $$, 'unknown_image'),
    (1, $$ select public.order_property_images(pg_temp.id('9300', 8), '{}') $$, '[]'),
    (2, $$ select public.order_property_images(pg_temp.id('9300', 7), array[pg_temp.id('9700', 3)]) $$, 'property_not_found'),
    (3, $$ select public.order_property_images(pg_temp.id('9300', 7), array[pg_temp.id('9700', 3)]) $$, 'permission_denied')
) as v (person, query, code);
update public.property_images set is_featured = true where id = pg_temp.id('9700', 1);
update public.property_images set is_featured = true where id = pg_temp.id('9700', 2);
insert into public.property_images (organization_id, property_id, url, is_featured) values (pg_temp.id('8000', 1), pg_temp.id('9300', 8), 'https://i.example.com', true);
select is((select string_agg(right(id::text, 1), ' ') from public.property_images where is_featured and property_id = pg_temp.id('9300', 7)), '2', 'one image stands for a property: the one chosen last');
select throws_ok(
  $$ insert into public.property_features (organization_id, property_id, feature_name) values (pg_temp.id('8000', 1), pg_temp.id('9300', 7), 'Pool'), (pg_temp.id('8000', 1), pg_temp.id('9300', 7), 'Pool') $$,
  '23505', null, 'a feature is listed once'
);

-- What hangs on a property is seen and changed with it.
insert into public.property_features (organization_id, property_id, feature_name) values (pg_temp.id('8000', 1), pg_temp.id('9300', 7), 'Lift'), (pg_temp.id('8000', 2), pg_temp.id('9300', 11), 'Lift');
insert into public.property_images (organization_id, property_id, url) values (pg_temp.id('8000', 2), pg_temp.id('9300', 11), 'https://i.example.com');
insert into public.property_reservations (organization_id, property_id) values (pg_temp.id('8000', 2), pg_temp.id('9300', 11));
select is(
  pg_temp.as_role('authenticated', person, format('select coalesce(string_agg(distinct right(organization_id::text, 1), '' ''), ''none'') from public.%I', name)), seen,
  format('user %s sees of %s those of organization %s', person, name, seen)
)
from unnest(array['property_reservations', 'property_images', 'property_features']) as name,
  (values (1, '1'), (2, '2'), (3, '1'), (4, 'none'), (5, 'none'), (6, 'none')) as v (person, seen);
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
  values ('properties', 'update public.%I set title = ''x'''), ('property_images', 'update public.%I set url = ''https://x'''), ('property_features', 'delete from public.%I'),
    ('property_images', 'delete from public.%I'), ('properties', 'delete from public.%I where status = ''available''')
) as v (name, change)
cross join unnest(array[2, 3, 4, 5, 6]) as person;
select is(pg_temp.reach(1, 'property_images', 'update public.%I set url = ''https://x'''), 'touched', 'an editor of Near does');

select * from finish();
rollback;
