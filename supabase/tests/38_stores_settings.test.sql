-- Stores' settings and numbers, and rows that another system owns.
begin;
set local search_path = public, extensions, tap;
select plan(66);

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

-- A new store has its twelve settings.
select is(
  (select string_agg(format('%s.%s=%s', category, key, value), ' ' order by category::text, key) from public.settings where store_id = pg_temp.id('a000', 3) and key <> 'greeting_message'),
  'ai.max_tokens=150 ai.model_name="gpt-4" ai.model_provider="openai" ai.temperature=0.7 general.business_hours_end="17:00" '
  || 'general.business_hours_start="09:00" general.timezone="UTC" integration.auto_sync=true integration.sync_frequency=300 '
  || 'voice.max_call_duration=600 voice.voice_model="en-US-AriaNeural"',
  'with their values'
);
select is((select count(*)::integer from public.settings where store_id = pg_temp.id('a000', 1)), 12, 'twelve');
select is((select value #>> '{}' from public.settings where store_id = pg_temp.id('a000', 1) and key = 'timezone'), 'Asia/Kolkata', 'the hours are in the store''s own zone');
select ok((select jsonb_typeof(value) = 'string' from public.settings where store_id = pg_temp.id('a000', 1) and key = 'greeting_message'), 'it greets');

-- One row a setting, also where there is no store.
insert into public.settings (organization_id, category, key, value) values (pg_temp.id('8000', 1), 'voice', 'of_all', '1');
select throws_ok(
  $$ insert into public.settings (organization_id, category, key, value) values (pg_temp.id('8000', 1), 'voice', 'of_all', '2') $$, '23505', null,
  'a setting of the whole organization is there once'
);
select lives_ok(
  $$ insert into public.settings (organization_id, category, key, value) values (pg_temp.id('8000', 1), 'voice', 'of_all', '2')
     on conflict (organization_id, store_id, category, key) do update set value = excluded.value $$,
  'and can be upserted'
);
select is((select value from public.settings where key = 'of_all'), '2'::jsonb, 'so');

-- Values have a type.
select throws_ok(
  format('update public.settings set value = %L where store_id = pg_temp.id(''a000'', 1) and key = %L', v.value, v.key), 'PGRST', null, format('%s is not %s', v.key, v.value)
)
from (
  values ('max_call_duration', '"600"'), ('max_call_duration', '10'), ('max_call_duration', '600.5'), ('temperature', '2.1'), ('auto_sync', '"yes"'),
    ('business_hours_start', '"9:00"'), ('business_hours_start', '"24:00"'), ('timezone', '"Mars/Base"'), ('greeting_message', '""'), ('greeting_message', 'null'),
    ('max_tokens', '{}')
) as v (key, value);
select lives_ok(
  format('update public.settings set value = %L where store_id = pg_temp.id(''a000'', 1) and key = %L', v.value, v.key), format('%s may be %s', v.key, v.value)
)
from (
  values ('max_call_duration', '900'), ('temperature', '0'), ('auto_sync', 'false'), ('business_hours_start', '"00:00"'), ('timezone', '"Europe/Paris"'), ('greeting_message', '"Hi"')
) as v (key, value);
select lives_ok(
  $$ insert into public.settings (organization_id, store_id, category, key, value) values (pg_temp.id('8000', 1), pg_temp.id('a000', 1), 'ai', 'own_key', '{"any": ["thing"]}') $$,
  'a key that nobody knows takes anything'
);
select throws_ok(
  $$ insert into public.settings (organization_id, category, key, value, is_encrypted) values (pg_temp.id('8000', 1), 'security', 'token', '"plain"', true) $$, '23514', null,
  'what is called sealed is'
);
select throws_ok($$ update public.stores set timezone = 'Asia/Kolkatta' where id = pg_temp.id('a000', 1) $$, 'PGRST', null, 'a zone exists');
select throws_ok(
  format('insert into public.stores (organization_id, name, domain, platform) values (%L, ''x'', %L, ''custom'')', pg_temp.id('8000', 1), domain), '23514', null, format('%L is not a domain', domain)
)
from unnest(array['Shop.example.org', 'localhost', 'a b.example.org', 'https://example.org', 'example.c', '']) as domain;
select throws_ok(format('update public.stores set %s where id = pg_temp.id(''a000'', 1)', change), '23514', null, format('no %s', change))
from unnest(array['owner_email = ''nobody''', 'currency_code = ''usd''', 'store_url = ''javascript:x''']) as change;

-- Numbers.
insert into public.store_phone_numbers (organization_id, store_id, phone_number, is_primary)
values (pg_temp.id('8000', 1), pg_temp.id('a000', 1), '+15550011', true), (pg_temp.id('8000', 1), pg_temp.id('a000', 1), '+15550012', false), (pg_temp.id('8000', 1), pg_temp.id('a000', 2), '+15550021', true);
update public.store_phone_numbers set is_primary = true where phone_number = '+15550012';
select is((select string_agg(phone_number, ' ' order by phone_number) from public.store_phone_numbers where is_primary), '+15550012 +15550021', 'a store has one primary number: the one chosen last');
select throws_ok(
  $$ insert into public.store_phone_numbers (organization_id, store_id, phone_number) values (pg_temp.id('8000', 2), pg_temp.id('a000', 3), '+15550011') $$, '23505', null,
  'a number rings in one store'
);
select throws_ok(format('update public.store_phone_numbers set %s where phone_number = ''+15550012''', change), '23514', null, format('no %s', change))
from unnest(array['is_active = false', 'phone_number = ''anonymous''', 'voice_method = ''PUT''']) as change;

-- A source's own time is not ours, and late news changes nothing.
create function pg_temp.upsert(name text, title text, at timestamptz) returns integer
language plpgsql as $$
declare
  written integer;
begin
  execute case name
    when 'products' then
      'insert into public.products (organization_id, store_id, external_id, source_updated_at, title, price_minor) values ($1, $2, ''s'', $3, $4, 1)
       on conflict (organization_id, store_id, external_id) do update set title = excluded.title, source_updated_at = excluded.source_updated_at'
    when 'customers' then
      'insert into public.customers (organization_id, store_id, external_id, source_updated_at, first_name) values ($1, $2, ''s'', $3, $4)
       on conflict (organization_id, store_id, external_id) do update set first_name = excluded.first_name, source_updated_at = excluded.source_updated_at'
    else
      'insert into public.orders (organization_id, store_id, external_id, source_updated_at, internal_notes, subtotal_price_minor, total_price_minor, order_date)
       values ($1, $2, ''s'', $3, $4, 1, 1, now())
       on conflict (organization_id, store_id, external_id) do update set internal_notes = excluded.internal_notes, source_updated_at = excluded.source_updated_at'
  end using pg_temp.id('8000', 1), pg_temp.id('a000', 1), at, title;
  get diagnostics written = row_count;
  return written;
end
$$;
create function pg_temp.held(name text) returns text
language plpgsql as $$
declare
  answer text;
begin
  execute format(
    'select concat_ws('' '', %I, to_char(source_updated_at at time zone ''UTC'', ''HH24:MI''), updated_at = private.clock_now()) from public.%I where external_id = ''s''',
    case name when 'products' then 'title' when 'customers' then 'first_name' else 'internal_notes' end, name
  ) into answer;
  return answer;
end
$$;
select is(pg_temp.upsert(name, 'first', '2020-01-01T10:00Z'), 1, format('%s: first heard of at 10:00 of another clock', name)) from unnest(array['products', 'customers', 'orders']) as name;
select is(pg_temp.upsert(name, 'second', '2020-01-01T10:05Z'), 1, format('%s: news of 10:05', name)) from unnest(array['products', 'customers', 'orders']) as name;
select is(pg_temp.held(name), 'second 10:05 t', format('%s: is taken, though long before our own updated_at, which is ours', name)) from unnest(array['products', 'customers', 'orders']) as name;
select is(pg_temp.upsert(name, 'late', '2020-01-01T10:01Z'), 0, format('%s: news of 10:01 that come later', name)) from unnest(array['products', 'customers', 'orders']) as name;
select is(pg_temp.held(name), 'second 10:05 t', format('%s: change nothing', name)) from unnest(array['products', 'customers', 'orders']) as name;
select is(pg_temp.upsert(name, 'again', '2020-01-01T10:05Z'), 1, format('%s: the same time again is taken', name)) from unnest(array['products', 'customers', 'orders']) as name;
select is(pg_temp.upsert(name, 'own', null), 1, format('%s: a write without a source''s time', name)) from unnest(array['products', 'customers', 'orders']) as name;
select is(pg_temp.held(name), 'own 10:05 t', format('%s: does not take the time away', name)) from unnest(array['products', 'customers', 'orders']) as name;
update public.products set updated_at = '2019-01-01T00:00Z' where external_id = 's';
select is((select updated_at from public.products where external_id = 's'), '2019-01-01T00:00Z'::timestamptz, 'a writer who brings updated_at keeps it');

select * from finish();
rollback;
