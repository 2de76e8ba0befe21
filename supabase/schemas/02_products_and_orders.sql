-- What a store sells and to whom: customers and their totals, products and their images, orders and their lines.
-- May run twice: everything is created if it is not there, or replaced.
--
-- Money is bigint in the minor unit of the currency that the row, or the order of a line, names (currency_code):
--   price                        -> price_minor                  subtotal_price               -> subtotal_price_minor
--   compare_at_price             -> compare_at_price_minor       total_tax, total_shipping    -> total_tax_minor, total_shipping_minor
--   cost_per_item                -> cost_per_item_minor          total_discounts, total_price -> total_discounts_minor, total_price_minor
--   total_spent, lifetime_value  -> customer_totals.total_spent_minor, .lifetime_value_minor: one row a currency, never added up
--   (new)                        -> orders.total_refunded_minor: what was paid back of an order that stands
--
-- Whoever changes several of these rows locks them in this order, and within one table by id: orders, customers, customer_totals.


-- customers -----------------------------------------------------------------------------------------------------------------------

create table if not exists public.customers (
  id                 uuid primary key default gen_random_uuid(),
  organization_id    uuid not null default public.get_auth_org_id(),
  store_id           uuid not null,
  external_id        text not null check (length(external_id) between 1 and 255),
  email              text check (email ~ '^[^@\s]+@[^@\s]+$'),
  phone              text check (phone ~ '^\+[1-9][0-9]{1,14}$'),
  first_name         text check (length(first_name) <= 255),
  last_name          text check (length(last_name) <= 255),
  accepts_marketing  boolean not null default false,
  preferred_language text not null default 'en' check (preferred_language ~ '^[A-Za-z]{2,3}([-_][A-Za-z0-9]{2,8})*$'),
  total_orders       integer not null default 0 check (total_orders >= 0),
  last_order_date    timestamptz,
  last_contact_date  timestamptz,
  tags               text[] not null default '{}',
  platform_data      jsonb not null default '{}' check (jsonb_typeof(platform_data) = 'object'),
  source_updated_at  timestamptz,
  last_synced_at     timestamptz not null default private.clock_now(),
  sync_hash          text check (length(sync_hash) <= 64),
  created_at         timestamptz not null default private.clock_now(),
  updated_at         timestamptz not null default private.clock_now(),
  unique (organization_id, store_id, id),
  unique (organization_id, store_id, external_id),
  foreign key (organization_id, store_id) references public.stores (organization_id, id) on delete cascade
);
create index if not exists idx_customers_store_id on public.customers (organization_id, store_id, created_at desc);
create index if not exists idx_customers_email on public.customers (organization_id, store_id, email) where email is not null;
create index if not exists idx_customers_phone on public.customers (organization_id, store_id, phone) where phone is not null;
create index if not exists idx_customers_last_order_date on public.customers (organization_id, store_id, last_order_date desc);
create index if not exists idx_customers_tags on public.customers using gin (tags);

revoke all on public.customers from anon, authenticated, service_role;
grant select on public.customers to authenticated, service_role;
grant
  insert (id, store_id, external_id, email, phone, first_name, last_name, accepts_marketing, preferred_language, tags),
  update (email, phone, first_name, last_name, accepts_marketing, preferred_language, tags)
on public.customers to authenticated;
alter table public.customers enable row level security;
alter table public.customers force row level security;
drop policy if exists "Who views stores may see their customers" on public.customers;
create policy "Who views stores may see their customers" on public.customers
  for select to authenticated using (organization_id = (select private.org_with('store.view')));
drop policy if exists "Who edits stores may add a customer" on public.customers;
create policy "Who edits stores may add a customer" on public.customers
  for insert to authenticated with check (organization_id = (select private.org_with('store.edit')));
drop policy if exists "Who edits stores may change a customer" on public.customers;
create policy "Who edits stores may change a customer" on public.customers
  for update to authenticated
  using (organization_id = (select private.org_with('store.edit')))
  with check (organization_id = (select private.org_with('store.edit')));

create or replace trigger keep_newer_source before update of source_updated_at on public.customers
  for each row execute function private.keep_newer_source();
create or replace trigger update_modified_column before update on public.customers
  for each row execute function private.update_modified_column();
comment on table public.customers is
  'Who buys at a store. What they spent is counted by the database, a currency at a time, in customer_totals.';
comment on column public.customers.external_id is 'The platform''s id, as text: it may be larger than any number type.';
comment on column public.customers.phone is 'E.164. A caller is known by it.';
comment on column public.customers.total_orders is 'Orders that stand, in whatever currency: neither cancelled, returned nor refunded.';
comment on column public.customers.last_order_date is 'Of all orders, whatever became of them.';
comment on column public.customers.last_contact_date is 'Start of their latest call or conversation.';
comment on column public.customers.source_updated_at is
  'The platform''s own timestamp of what this row says; an older one changes nothing.';
comment on column public.customers.sync_hash is
  'Of what was last taken from the platform, to see without comparing whether anything changed.';


-- customer_totals -----------------------------------------------------------------------------------------------------------------

create table if not exists public.customer_totals (
  organization_id      uuid not null,
  store_id             uuid not null,
  customer_id          uuid not null,
  currency_code        text not null check (currency_code ~ '^[A-Z]{3}$'),
  total_orders         integer not null check (total_orders >= 0),
  total_spent_minor    bigint not null check (total_spent_minor >= 0),
  lifetime_value_minor bigint not null check (lifetime_value_minor between 0 and total_spent_minor),
  created_at           timestamptz not null default private.clock_now(),
  updated_at           timestamptz not null default private.clock_now(),
  primary key (organization_id, store_id, customer_id, currency_code),
  foreign key (organization_id, store_id, customer_id) references public.customers (organization_id, store_id, id) on delete cascade
);
create index if not exists idx_customer_totals_lifetime_value
  on public.customer_totals (organization_id, store_id, currency_code, lifetime_value_minor desc);

revoke all on public.customer_totals from anon, authenticated, service_role;
grant select on public.customer_totals to authenticated, service_role;
alter table public.customer_totals enable row level security;
alter table public.customer_totals force row level security;
drop policy if exists "Who views stores may see what their customers spent" on public.customer_totals;
create policy "Who views stores may see what their customers spent" on public.customer_totals
  for select to authenticated using (organization_id = (select private.org_with('store.view')));
create or replace trigger update_modified_column before update on public.customer_totals
  for each row execute function private.update_modified_column();
comment on table public.customer_totals is
  'What a customer''s standing orders come to, one row a currency that they have such an order in. Kept by the trigger on orders alone.';
comment on column public.customer_totals.total_spent_minor is 'Sum of total_price_minor.';
comment on column public.customer_totals.lifetime_value_minor is 'The same less what was paid back of orders that stand.';


-- products ------------------------------------------------------------------------------------------------------------------------

create table if not exists public.products (
  id                     uuid primary key default gen_random_uuid(),
  organization_id        uuid not null default public.get_auth_org_id(),
  store_id               uuid not null,
  external_id            text not null check (length(external_id) between 1 and 255),
  external_variant_id    text,
  title                  text not null check (length(title) between 1 and 500),
  description            text,
  handle                 text,
  product_type           text,
  vendor                 text,
  tags                   text[] not null default '{}',
  price_minor            bigint not null check (price_minor >= 0),
  compare_at_price_minor bigint check (compare_at_price_minor >= 0),
  cost_per_item_minor    bigint check (cost_per_item_minor >= 0),
  currency_code          text not null check (currency_code ~ '^[A-Z]{3}$'),
  sku                    text,
  barcode                text,
  inventory_quantity     integer not null default 0 check (inventory_quantity >= 0),
  inventory_tracked      boolean not null default false,
  availability           public.product_availability not null default 'in_stock',
  weight                 numeric(8, 3) check (weight >= 0),
  weight_unit            text not null default 'kg' check (weight_unit in ('g', 'kg', 'oz', 'lb')),
  seo_title              text,
  seo_description        text,
  platform_data          jsonb not null default '{}' check (jsonb_typeof(platform_data) = 'object'),
  status                 public.product_status not null default 'active',
  is_published           boolean not null default true,
  published_at           timestamptz,
  source_updated_at      timestamptz,
  last_synced_at         timestamptz not null default private.clock_now(),
  sync_hash              text check (length(sync_hash) <= 64),
  created_at             timestamptz not null default private.clock_now(),
  updated_at             timestamptz not null default private.clock_now(),
  unique (organization_id, store_id, id),
  unique (organization_id, store_id, external_id),
  foreign key (organization_id, store_id) references public.stores (organization_id, id) on delete cascade
);
create index if not exists idx_products_store_id on public.products (organization_id, store_id, created_at desc);
create index if not exists idx_products_sku on public.products (organization_id, store_id, sku) where sku is not null;
create index if not exists idx_products_status on public.products (organization_id, store_id, status);
create index if not exists idx_products_availability on public.products (organization_id, store_id, availability);
create index if not exists idx_products_last_synced on public.products (organization_id, store_id, last_synced_at);
create index if not exists idx_products_tags on public.products using gin (tags);

revoke all on public.products from anon, authenticated, service_role;
grant select, delete on public.products to authenticated;
grant
  insert (
    id, store_id, external_id, external_variant_id, title, description, handle, product_type, vendor, tags, price_minor,
    compare_at_price_minor, cost_per_item_minor, currency_code, sku, barcode, inventory_quantity, inventory_tracked, availability, weight,
    weight_unit, seo_title, seo_description, status, is_published, published_at
  ),
  update (
    external_variant_id, title, description, handle, product_type, vendor, tags, price_minor, compare_at_price_minor, cost_per_item_minor,
    currency_code, sku, barcode, inventory_quantity, inventory_tracked, availability, weight, weight_unit, seo_title, seo_description,
    status, is_published, published_at
  )
on public.products to authenticated;
grant select on public.products to service_role;
alter table public.products enable row level security;
alter table public.products force row level security;
drop policy if exists "Who views stores may see their products" on public.products;
create policy "Who views stores may see their products" on public.products
  for select to authenticated using (organization_id = (select private.org_with('store.view')));
drop policy if exists "Who edits stores may add a product" on public.products;
create policy "Who edits stores may add a product" on public.products
  for insert to authenticated with check (organization_id = (select private.org_with('store.edit')));
drop policy if exists "Who edits stores may change a product" on public.products;
create policy "Who edits stores may change a product" on public.products
  for update to authenticated
  using (organization_id = (select private.org_with('store.edit')))
  with check (organization_id = (select private.org_with('store.edit')));
drop policy if exists "Who edits stores may delete a product" on public.products;
create policy "Who edits stores may delete a product" on public.products
  for delete to authenticated using (organization_id = (select private.org_with('store.edit')));

create or replace function private.fill_store_currency() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  new.currency_code := (
    select store.currency_code
    from public.stores as store
    where store.organization_id = new.organization_id and store.id = new.store_id
  );
  return new;
end
$$;
comment on function private.fill_store_currency() is 'Trigger: an amount that names no currency is in its store''s.';
create or replace trigger fill_store_currency before insert on public.products
  for each row when (new.currency_code is null) execute function private.fill_store_currency();
create or replace trigger keep_newer_source before update of source_updated_at on public.products
  for each row execute function private.keep_newer_source();
create or replace trigger update_modified_column before update on public.products
  for each row execute function private.update_modified_column();
comment on table public.products is 'What a store sells, as its platform says it.';
comment on column public.products.external_id is 'The platform''s id, as text.';
comment on column public.products.price_minor is 'In the minor unit of currency_code, as every amount of this row.';
comment on column public.products.currency_code is 'ISO 4217, upper case; the store''s when not given.';
comment on column public.products.inventory_quantity is
  'What can be sold. A platform that oversells says less than nothing: that is 0 here, and as it came in platform_data.';
comment on column public.products.source_updated_at is 'The platform''s own timestamp of what this row says; an older one changes nothing.';


-- product_images ------------------------------------------------------------------------------------------------------------------

create table if not exists public.product_images (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null default public.get_auth_org_id(),
  store_id        uuid not null,
  product_id      uuid not null,
  external_id     text,
  url             text not null check (url ~ '^https?://'),
  alt_text        text,
  position        integer not null default 0 check (position >= 0),
  created_at      timestamptz not null default private.clock_now(),
  updated_at      timestamptz not null default private.clock_now(),
  unique (organization_id, store_id, id),
  unique (organization_id, store_id, product_id, external_id),
  foreign key (organization_id, store_id, product_id) references public.products (organization_id, store_id, id) on delete cascade
);
create index if not exists idx_product_images_position on public.product_images (organization_id, store_id, product_id, position);

revoke all on public.product_images from anon, authenticated, service_role;
grant select, delete on public.product_images to authenticated;
grant insert (store_id, product_id, external_id, url, alt_text, position), update (url, alt_text, position)
on public.product_images to authenticated;
grant select on public.product_images to service_role;
alter table public.product_images enable row level security;
alter table public.product_images force row level security;
drop policy if exists "Who views stores may see their products' images" on public.product_images;
create policy "Who views stores may see their products' images" on public.product_images
  for select to authenticated using (organization_id = (select private.org_with('store.view')));
drop policy if exists "Who edits stores may add an image" on public.product_images;
create policy "Who edits stores may add an image" on public.product_images
  for insert to authenticated with check (organization_id = (select private.org_with('store.edit')));
drop policy if exists "Who edits stores may change an image" on public.product_images;
create policy "Who edits stores may change an image" on public.product_images
  for update to authenticated
  using (organization_id = (select private.org_with('store.edit')))
  with check (organization_id = (select private.org_with('store.edit')));
drop policy if exists "Who edits stores may delete an image" on public.product_images;
create policy "Who edits stores may delete an image" on public.product_images
  for delete to authenticated using (organization_id = (select private.org_with('store.edit')));
create or replace trigger update_modified_column before update on public.product_images
  for each row execute function private.update_modified_column();
comment on table public.product_images is 'Pictures of a product, in order of position.';


-- orders --------------------------------------------------------------------------------------------------------------------------

create table if not exists public.orders (
  id                    uuid primary key default gen_random_uuid(),
  organization_id       uuid not null default public.get_auth_org_id(),
  store_id              uuid not null,
  customer_id           uuid,
  external_id           text not null check (length(external_id) between 1 and 255),
  order_number          text,
  customer_email        text check (customer_email ~ '^[^@\s]+@[^@\s]+$'),
  customer_phone        text,
  customer_first_name   text,
  customer_last_name    text,
  customer_external_id  text,
  subtotal_price_minor  bigint not null check (subtotal_price_minor >= 0),
  total_tax_minor       bigint not null default 0 check (total_tax_minor >= 0),
  total_shipping_minor  bigint not null default 0 check (total_shipping_minor >= 0),
  total_discounts_minor bigint not null default 0 check (total_discounts_minor >= 0),
  total_price_minor     bigint not null check (total_price_minor >= 0),
  total_refunded_minor  bigint not null default 0 check (total_refunded_minor >= 0),
  currency_code         text not null check (currency_code ~ '^[A-Z]{3}$'),
  status                public.order_status not null default 'pending',
  payment_status        public.payment_status not null default 'pending',
  fulfillment_status    public.fulfillment_status not null default 'unfulfilled',
  is_standing           boolean not null generated always as (
    status not in ('cancelled', 'refunded', 'returned') and payment_status not in ('refunded', 'failed', 'cancelled')
  ) stored,
  shipping_address      jsonb,
  billing_address       jsonb,
  shipping_method       text,
  tracking_number       text,
  tracking_url          text check (tracking_url ~ '^https?://'),
  order_date            timestamptz not null,
  shipped_date          timestamptz,
  delivered_date        timestamptz,
  cancelled_date        timestamptz,
  platform_data         jsonb not null default '{}' check (jsonb_typeof(platform_data) = 'object'),
  customer_notes        text,
  internal_notes        text,
  source_updated_at     timestamptz,
  last_synced_at        timestamptz not null default private.clock_now(),
  sync_hash             text check (length(sync_hash) <= 64),
  created_at            timestamptz not null default private.clock_now(),
  updated_at            timestamptz not null default private.clock_now(),
  unique (organization_id, store_id, id),
  unique (organization_id, store_id, external_id),
  foreign key (organization_id, store_id) references public.stores (organization_id, id) on delete cascade,
  foreign key (organization_id, store_id, customer_id) references public.customers (organization_id, store_id, id)
    on delete set null (customer_id)
);
create index if not exists idx_orders_store_id on public.orders (organization_id, store_id, order_date desc);
create index if not exists idx_orders_customer_id on public.orders (organization_id, store_id, customer_id, order_date desc)
  where customer_id is not null;
create index if not exists idx_orders_customer_email on public.orders (organization_id, store_id, customer_email)
  where customer_email is not null;
create index if not exists idx_orders_customer_phone on public.orders (organization_id, store_id, customer_phone)
  where customer_phone is not null;
create index if not exists idx_orders_status on public.orders (organization_id, store_id, status);
create index if not exists idx_orders_payment_status on public.orders (organization_id, store_id, payment_status);
create index if not exists idx_orders_fulfillment_status on public.orders (organization_id, store_id, fulfillment_status);
create index if not exists idx_orders_order_date on public.orders (organization_id, order_date desc);
create index if not exists idx_orders_last_synced on public.orders (organization_id, store_id, last_synced_at);
create index if not exists idx_orders_customer_external_id on public.orders (organization_id, store_id, customer_external_id)
  where customer_external_id is not null;

revoke all on public.orders from anon, authenticated, service_role;
grant select on public.orders to authenticated, service_role;
grant
  insert (
    id, store_id, customer_id, external_id, order_number, customer_email, customer_phone, customer_first_name, customer_last_name,
    subtotal_price_minor, total_tax_minor, total_shipping_minor, total_discounts_minor, total_price_minor, currency_code, shipping_address,
    billing_address, shipping_method, order_date, customer_notes, internal_notes
  ),
  update (
    customer_id, customer_email, customer_phone, customer_first_name, customer_last_name, shipping_address, billing_address,
    shipping_method, tracking_number, tracking_url, customer_notes, internal_notes
  )
on public.orders to authenticated;
alter table public.orders enable row level security;
alter table public.orders force row level security;
drop policy if exists "Who views stores may see their orders" on public.orders;
create policy "Who views stores may see their orders" on public.orders
  for select to authenticated using (organization_id = (select private.org_with('store.view')));
drop policy if exists "Who edits stores may add an order" on public.orders;
create policy "Who edits stores may add an order" on public.orders
  for insert to authenticated with check (organization_id = (select private.org_with('store.edit')));
drop policy if exists "Who edits stores may change an order" on public.orders;
create policy "Who edits stores may change an order" on public.orders
  for update to authenticated
  using (organization_id = (select private.org_with('store.edit')))
  with check (organization_id = (select private.org_with('store.edit')));

-- What orders do to one customer's totals in one currency.
do $$
begin
  create type private.order_effect as (
    organization_id      uuid,
    store_id             uuid,
    customer_id          uuid,
    currency_code        text,
    orders               integer,
    total_spent_minor    bigint,
    lifetime_value_minor bigint
  );
exception when duplicate_object then null;
end
$$;
comment on type private.order_effect is
  'What the orders of a statement, taken in (+) and out (-), do to one customer''s totals in one currency.';

create or replace function private.apply_order_effects(effects private.order_effect[]) returns void
language plpgsql volatile security definer set search_path = '' as $$
begin
  -- One at a time for a customer, and everybody in the same order: what follows sees all that was committed before.
  perform
  from public.customers as customer
  where (customer.organization_id, customer.store_id, customer.id) in (
    select effect.organization_id, effect.store_id, effect.customer_id from unnest(effects) as effect
  )
  order by customer.id
  for no key update;

  insert into public.customer_totals as total (
    organization_id, store_id, customer_id, currency_code, total_orders, total_spent_minor, lifetime_value_minor
  )
  select
    effect.organization_id, effect.store_id, effect.customer_id, effect.currency_code,
    effect.orders + coalesce(present.total_orders, 0),
    effect.total_spent_minor + coalesce(present.total_spent_minor, 0),
    effect.lifetime_value_minor + coalesce(present.lifetime_value_minor, 0)
  from unnest(effects) as effect
  -- A customer who is being deleted has no totals any more.
  join public.customers as customer
    on customer.organization_id = effect.organization_id
    and customer.store_id = effect.store_id
    and customer.id = effect.customer_id
  left join public.customer_totals as present
    on present.organization_id = effect.organization_id
    and present.store_id = effect.store_id
    and present.customer_id = effect.customer_id
    and present.currency_code = effect.currency_code
  where (effect.orders, effect.total_spent_minor, effect.lifetime_value_minor) <> (0, 0, 0)
  on conflict (organization_id, store_id, customer_id, currency_code) do update
  set
    total_orders = excluded.total_orders,
    total_spent_minor = excluded.total_spent_minor,
    lifetime_value_minor = excluded.lifetime_value_minor;

  if exists (select from unnest(effects) as effect where effect.orders < 0) then
    delete from public.customer_totals as total
    where total.total_orders = 0
      and (total.organization_id, total.store_id, total.customer_id) in (
        select effect.organization_id, effect.store_id, effect.customer_id from unnest(effects) as effect
      );
  end if;

  update public.customers as customer
  set total_orders = customer.total_orders + change.orders, last_order_date = change.last_order_date
  from (
    select
      touched.organization_id, touched.store_id, touched.customer_id, touched.orders,
      (
        select max(purchase.order_date)
        from public.orders as purchase
        where purchase.organization_id = touched.organization_id
          and purchase.store_id = touched.store_id
          and purchase.customer_id = touched.customer_id
      ) as last_order_date
    from (
      select effect.organization_id, effect.store_id, effect.customer_id, sum(effect.orders)::integer as orders
      from unnest(effects) as effect
      group by effect.organization_id, effect.store_id, effect.customer_id
    ) as touched
  ) as change
  where customer.organization_id = change.organization_id
    and customer.store_id = change.store_id
    and customer.id = change.customer_id
    and (change.orders <> 0 or customer.last_order_date is distinct from change.last_order_date);
end
$$;
comment on function private.apply_order_effects(private.order_effect[]) is
  'Adds the effects of orders to their customers'' totals, the customers locked in order of id. The work grows with the orders that changed.';

create or replace function private.update_customer_lifetime_value() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  effects private.order_effect[];
begin
  -- Each branch sums up, for a customer and a currency, the orders that stand: as many, their price, their price less refunds.
  case tg_op
    when 'INSERT' then
      select
        array_agg(
          row(
            effect.organization_id, effect.store_id, effect.customer_id, effect.currency_code, effect.orders, effect.spent, effect.value
          )::private.order_effect
        )
      into effects
      from (
        select
          entry.organization_id, entry.store_id, entry.customer_id, entry.currency_code,
          count(*) filter (where entry.is_standing) as orders,
          coalesce(sum(entry.total_price_minor) filter (where entry.is_standing), 0) as spent,
          coalesce(sum(greatest(entry.total_price_minor - entry.total_refunded_minor, 0)) filter (where entry.is_standing), 0) as value
        from added as entry
        where entry.customer_id is not null
        group by entry.organization_id, entry.store_id, entry.customer_id, entry.currency_code
      ) as effect;
    when 'DELETE' then
      select
        array_agg(
          row(
            effect.organization_id, effect.store_id, effect.customer_id, effect.currency_code, -effect.orders, -effect.spent, -effect.value
          )::private.order_effect
        )
      into effects
      from (
        select
          entry.organization_id, entry.store_id, entry.customer_id, entry.currency_code,
          count(*) filter (where entry.is_standing) as orders,
          coalesce(sum(entry.total_price_minor) filter (where entry.is_standing), 0) as spent,
          coalesce(sum(greatest(entry.total_price_minor - entry.total_refunded_minor, 0)) filter (where entry.is_standing), 0) as value
        from removed as entry
        where entry.customer_id is not null
        group by entry.organization_id, entry.store_id, entry.customer_id, entry.currency_code
      ) as effect;
    else
      select
        array_agg(
          row(
            effect.organization_id, effect.store_id, effect.customer_id, effect.currency_code, effect.orders, effect.spent, effect.value
          )::private.order_effect
        )
      into effects
      from (
        select
          entry.organization_id, entry.store_id, entry.customer_id, entry.currency_code,
          coalesce(sum(entry.sign) filter (where entry.is_standing), 0) as orders,
          coalesce(sum(entry.sign * entry.total_price_minor) filter (where entry.is_standing), 0) as spent,
          coalesce(
            sum(entry.sign * greatest(entry.total_price_minor - entry.total_refunded_minor, 0)) filter (where entry.is_standing), 0
          ) as value
        from removed as before
        join added as after on after.id = before.id
        cross join lateral (
          values
            (
              -1, before.organization_id, before.store_id, before.customer_id, before.currency_code, before.is_standing,
              before.total_price_minor, before.total_refunded_minor
            ),
            (
              1, after.organization_id, after.store_id, after.customer_id, after.currency_code, after.is_standing,
              after.total_price_minor, after.total_refunded_minor
            )
        ) as entry (
          sign, organization_id, store_id, customer_id, currency_code, is_standing, total_price_minor, total_refunded_minor
        )
        -- Only what an order says to a total: a note or a tracking number locks nobody.
        where entry.customer_id is not null
          and (
            before.customer_id, before.currency_code, before.is_standing, before.total_price_minor, before.total_refunded_minor,
            before.order_date
          ) is distinct from (
            after.customer_id, after.currency_code, after.is_standing, after.total_price_minor, after.total_refunded_minor,
            after.order_date
          )
        group by entry.organization_id, entry.store_id, entry.customer_id, entry.currency_code
      ) as effect;
  end case;
  if effects is not null then
    perform private.apply_order_effects(effects);
  end if;
  return null;
end
$$;
comment on function private.update_customer_lifetime_value() is
  'Trigger: customer_totals, total_orders and last_order_date follow every order that comes, changes, moves to another customer or goes.';

create or replace trigger update_customer_ltv_trigger after insert on public.orders
  referencing new table as added
  for each statement execute function private.update_customer_lifetime_value();
create or replace trigger update_customer_ltv_on_update_trigger after update on public.orders
  referencing old table as removed new table as added
  for each statement execute function private.update_customer_lifetime_value();
create or replace trigger update_customer_ltv_on_delete_trigger after delete on public.orders
  referencing old table as removed
  for each statement execute function private.update_customer_lifetime_value();
create or replace trigger fill_store_currency before insert on public.orders
  for each row when (new.currency_code is null) execute function private.fill_store_currency();
create or replace trigger keep_newer_source before update of source_updated_at on public.orders
  for each row execute function private.keep_newer_source();
create or replace trigger update_modified_column before update on public.orders
  for each row execute function private.update_modified_column();
comment on table public.orders is 'What a customer ordered. Its three statuses are moved by functions alone, as the platform reports them.';
comment on column public.orders.external_id is 'The platform''s id, as text.';
comment on column public.orders.customer_phone is 'As the platform has it, E.164 or not.';
comment on column public.orders.total_price_minor is
  'What the customer pays, in the minor unit of currency_code, as every amount of this row.';
comment on column public.orders.total_refunded_minor is 'What was paid back of it so far.';
comment on column public.orders.is_standing is
  'Counts towards what its customer has spent: neither cancelled, returned nor refunded as a whole, and its payment did not fail.';
comment on column public.orders.currency_code is 'ISO 4217, upper case; the store''s when not given.';
comment on column public.orders.source_updated_at is 'The platform''s own timestamp of what this row says; an older one changes nothing.';

create or replace function private.recompute_customer_totals(organization uuid, store uuid) returns integer
language plpgsql volatile security definer set search_path = '' as $$
declare
  corrected integer;
begin
  -- Nobody orders meanwhile: an order waits for its customer.
  perform
  from public.customers as customer
  where customer.organization_id = organization and customer.store_id = store
  order by customer.id
  for no key update;

  with truth as (
    select
      purchase.customer_id, purchase.currency_code, count(*)::integer as total_orders,
      sum(purchase.total_price_minor)::bigint as total_spent_minor,
      sum(greatest(purchase.total_price_minor - purchase.total_refunded_minor, 0))::bigint as lifetime_value_minor
    from public.orders as purchase
    where purchase.organization_id = organization
      and purchase.store_id = store
      and purchase.customer_id is not null
      and purchase.is_standing
    group by purchase.customer_id, purchase.currency_code
  ),
  gone as (
    delete from public.customer_totals as total
    where total.organization_id = organization
      and total.store_id = store
      and not exists (
        select from truth where truth.customer_id = total.customer_id and truth.currency_code = total.currency_code
      )
    returning total.customer_id
  ),
  written as (
    insert into public.customer_totals as total (
      organization_id, store_id, customer_id, currency_code, total_orders, total_spent_minor, lifetime_value_minor
    )
    select
      organization, store, truth.customer_id, truth.currency_code, truth.total_orders, truth.total_spent_minor,
      truth.lifetime_value_minor
    from truth
    on conflict (organization_id, store_id, customer_id, currency_code) do update
    set
      total_orders = excluded.total_orders,
      total_spent_minor = excluded.total_spent_minor,
      lifetime_value_minor = excluded.lifetime_value_minor
    where (total.total_orders, total.total_spent_minor, total.lifetime_value_minor)
      is distinct from (excluded.total_orders, excluded.total_spent_minor, excluded.lifetime_value_minor)
    returning total.customer_id
  ),
  counted as (
    update public.customers as customer
    set total_orders = fact.total_orders, last_order_date = fact.last_order_date
    from (
      select
        known.id,
        count(purchase.id) filter (where purchase.is_standing)::integer as total_orders,
        max(purchase.order_date) as last_order_date
      from public.customers as known
      left join public.orders as purchase
        on purchase.organization_id = known.organization_id
        and purchase.store_id = known.store_id
        and purchase.customer_id = known.id
      where known.organization_id = organization and known.store_id = store
      group by known.id
    ) as fact
    where customer.id = fact.id
      and (customer.total_orders, customer.last_order_date) is distinct from (fact.total_orders, fact.last_order_date)
    returning customer.id
  )
  select count(*)::integer
  into corrected
  from (select gone.customer_id from gone union select written.customer_id from written union select counted.id from counted) as touched;
  return corrected;
end
$$;
comment on function private.recompute_customer_totals(uuid, uuid) is
  'Counts a store''s customers'' totals anew from its orders; returns how many customers were wrong, which should be none.';


-- order_line_items ----------------------------------------------------------------------------------------------------------------

create table if not exists public.order_line_items (
  id                  uuid primary key default gen_random_uuid(),
  organization_id     uuid not null default public.get_auth_org_id(),
  store_id            uuid not null,
  order_id            uuid not null,
  product_id          uuid,
  external_id         text check (length(external_id) between 1 and 255),
  external_product_id text,
  external_variant_id text,
  title               text not null check (length(title) between 1 and 500),
  variant_title       text,
  sku                 text,
  price_minor         bigint not null check (price_minor >= 0),
  quantity            integer not null check (quantity > 0),
  total_price_minor   bigint not null check (total_price_minor >= 0),
  properties          jsonb not null default '{}',
  fulfillment_status  public.fulfillment_status not null default 'unfulfilled',
  fulfilled_quantity  integer not null default 0,
  created_at          timestamptz not null default private.clock_now(),
  updated_at          timestamptz not null default private.clock_now(),
  unique (organization_id, store_id, id),
  unique (organization_id, store_id, order_id, external_id),
  foreign key (organization_id, store_id, order_id) references public.orders (organization_id, store_id, id) on delete cascade,
  foreign key (organization_id, store_id, product_id) references public.products (organization_id, store_id, id)
    on delete set null (product_id),
  check (fulfilled_quantity between 0 and quantity)
);
create index if not exists idx_order_line_items_product_id on public.order_line_items (organization_id, store_id, product_id)
  where product_id is not null;
create index if not exists idx_order_line_items_external_product_id
  on public.order_line_items (organization_id, store_id, external_product_id) where external_product_id is not null;
create index if not exists idx_order_line_items_sku on public.order_line_items (organization_id, store_id, sku) where sku is not null;

revoke all on public.order_line_items from anon, authenticated, service_role;
grant select on public.order_line_items to authenticated, service_role;
grant
  insert (
    store_id, order_id, product_id, external_id, external_product_id, external_variant_id, title, variant_title, sku, price_minor, quantity,
    total_price_minor, properties
  ),
  update (product_id, title, variant_title, sku, properties)
on public.order_line_items to authenticated;
alter table public.order_line_items enable row level security;
alter table public.order_line_items force row level security;
drop policy if exists "Who views stores may see their orders' lines" on public.order_line_items;
create policy "Who views stores may see their orders' lines" on public.order_line_items
  for select to authenticated using (organization_id = (select private.org_with('store.view')));
drop policy if exists "Who edits stores may add a line" on public.order_line_items;
create policy "Who edits stores may add a line" on public.order_line_items
  for insert to authenticated with check (organization_id = (select private.org_with('store.edit')));
drop policy if exists "Who edits stores may describe a line" on public.order_line_items;
create policy "Who edits stores may describe a line" on public.order_line_items
  for update to authenticated
  using (organization_id = (select private.org_with('store.edit')))
  with check (organization_id = (select private.org_with('store.edit')));
create or replace trigger update_modified_column before update on public.order_line_items
  for each row execute function private.update_modified_column();
comment on table public.order_line_items is
  'The lines of an order, in its currency. A line that the platform names is one row, however often it is sent.';
comment on column public.order_line_items.external_id is
  'The platform''s id of the line; what an upsert names in on_conflict, with the order.';
comment on column public.order_line_items.price_minor is 'Of one, in the minor unit of the order''s currency_code.';
comment on column public.order_line_items.total_price_minor is 'Of the line, discounts taken off.';

revoke execute on function
  private.fill_store_currency(), private.apply_order_effects(private.order_effect[]), private.update_customer_lifetime_value(),
  private.recompute_customer_totals(uuid, uuid)
from public;


-- store_tombstones ----------------------------------------------------------------------------------------------------------------

create table if not exists private.store_tombstones (
  organization_id uuid not null,
  store_id        uuid not null,
  kind            text not null check (kind in ('product', 'order', 'customer')),
  external_id     text not null check (length(external_id) between 1 and 255),
  is_redacted     boolean not null default false,
  deleted_at      timestamptz not null,
  primary key (organization_id, store_id, kind, external_id),
  foreign key (organization_id, store_id) references public.stores (organization_id, id) on delete cascade
);
select private.close_table('private.store_tombstones');
comment on table private.store_tombstones is
  'What a platform deleted: an event that is older than the deletion and comes after it brings nothing back.';
comment on column private.store_tombstones.is_redacted is 'A customer who asked to be forgotten: their orders come without them.';


-- privacy_requests ----------------------------------------------------------------------------------------------------------------

create table if not exists public.privacy_requests (
  id                   uuid primary key default gen_random_uuid(),
  organization_id      uuid not null,
  store_id             uuid not null,
  kind                 text not null check (kind in ('data_request', 'customer_redact', 'shop_redact')),
  external_id          text check (length(external_id) <= 255),
  customer_id          uuid,
  customer_external_id text,
  order_external_ids   text[] not null default '{}',
  requested_at         timestamptz not null,
  due_at               timestamptz not null,
  completed_at         timestamptz,
  created_at           timestamptz not null default private.clock_now(),
  updated_at           timestamptz not null default private.clock_now(),
  unique (organization_id, store_id, id),
  foreign key (organization_id, store_id) references public.stores (organization_id, id) on delete cascade,
  foreign key (organization_id, store_id, customer_id) references public.customers (organization_id, store_id, id)
    on delete set null (customer_id),
  check (due_at > requested_at),
  -- Who was forgotten is not named by the record of it.
  check (completed_at is null or customer_external_id is null and order_external_ids = '{}')
);
create index if not exists idx_privacy_requests_store on public.privacy_requests (organization_id, store_id, requested_at desc);
create index if not exists idx_privacy_requests_customer on public.privacy_requests (organization_id, store_id, customer_id)
  where customer_id is not null;

revoke all on public.privacy_requests from anon, authenticated, service_role;
grant select on public.privacy_requests to authenticated, service_role;
alter table public.privacy_requests enable row level security;
alter table public.privacy_requests force row level security;
drop policy if exists "Who views stores may see what people asked of them" on public.privacy_requests;
create policy "Who views stores may see what people asked of them" on public.privacy_requests
  for select to authenticated using (organization_id = (select private.org_with('store.view')));
create or replace trigger update_modified_column before update on public.privacy_requests
  for each row execute function private.update_modified_column();
comment on table public.privacy_requests is
  'What people and shops asked about their data: to be given it, or to be forgotten. The latter is done at once, the former by a person.';
comment on column public.privacy_requests.external_id is 'The platform''s id of the request.';
comment on column public.privacy_requests.due_at is 'Thirty days after it was asked, which is what the platforms allow.';
