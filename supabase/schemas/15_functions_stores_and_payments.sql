-- What shops and payment gateways tell: each event of theirs changes the row that it names, in whatever order it comes.
-- Called by apply_event() through private.apply_payload(); users call only what is at the end.


-- Words and numbers of others -----------------------------------------------------------------------------------------------------

create function private.to_minor(amount text, currency text) returns bigint
language sql immutable parallel safe set search_path = '' as $$
  select round(
    amount::numeric * case
      when currency in (
        'BIF', 'CLP', 'DJF', 'GNF', 'ISK', 'JPY', 'KMF', 'KRW', 'PYG', 'RWF', 'UGX', 'VND', 'VUV', 'XAF', 'XOF', 'XPF'
      ) then 1
      when currency in ('BHD', 'IQD', 'JOD', 'KWD', 'LYD', 'OMR', 'TND') then 1000
      else 100
    end
  )::bigint
$$;
comment on function private.to_minor(text, text) is
  'A decimal amount in the minor unit of its currency (ISO 4217), exactly; what is finer than that is rounded half away from zero.';

create function private.plain_email(written text) returns text
language sql immutable parallel safe set search_path = '' as $$
  select case when length(written) <= 254 and btrim(written) ~ '^[^@\s]+@[^@\s]+$' then lower(btrim(written)) end
$$;
comment on function private.plain_email(text) is 'An address as it is compared and stored; null for what is none.';

create function private.plain_phone(written text) returns text
language sql immutable parallel safe set search_path = '' as $$
  select case
    when written ~ '^\s*(\+|00)[0-9 ().\-/]+$' and number.digits ~ '^[1-9][0-9]{6,14}$' then '+' || number.digits
  end
  from (select regexp_replace(regexp_replace(written, '[^0-9]', '', 'g'), '^00', '')) as number (digits)
$$;
comment on function private.plain_phone(text) is
  'The E.164 form of a number that says its country; null for any other, as nobody may guess whom to call.';

create function private.store_time(written text) returns timestamptz
language sql stable set search_path = '' as $$
  select private.to_business(private.parse_instant(written))
$$;
comment on function private.store_time(text) is 'A platform''s RFC 3339 time as business time; null for what is none.';

create function private.text_array(list jsonb) returns text[]
language sql immutable parallel safe set search_path = '' as $$
  select coalesce(array_agg(item.value order by item.place), '{}')
  from jsonb_array_elements_text(case when jsonb_typeof(list) = 'array' then list else '[]' end) with ordinality as item (value, place)
$$;
comment on function private.text_array(jsonb) is 'The texts of a JSON array; none when it is none.';


-- Versions ------------------------------------------------------------------------------------------------------------------------
-- A platform's timestamps are of a whole second, and two changes may share one. Of two versions of the same second the one that is
-- further on stands, and of two equally far the one with the greater hash: which comes first never matters.

create function private.store_version(told jsonb, rank integer) returns text
language sql immutable set search_path = '' as $$
  select lpad(least(greatest(coalesce(rank, 0), 0), 99)::text, 2, '0')
    || left(encode(extensions.digest(convert_to(told::text, 'utf8'), 'sha256'), 'hex'), 48)
$$;
comment on function private.store_version(jsonb, integer) is
  'What decides between two versions of one second, kept in sync_hash: how far on it is, then the content''s hash.';

create function private.lock_store_object(store uuid, kind text, external_id text) returns void
language sql volatile set search_path = '' as $$
  select pg_advisory_xact_lock(hashtextextended('trunkline.store.' || store || '.' || kind || '.' || external_id, 0))
$$;
comment on function private.lock_store_object(uuid, text, text) is
  'One event of a platform''s object at a time, also of one that is not there yet: an order before its customer.';

create function private.bury(source public.webhook_sources, kind text, external_id text, redacted boolean, at timestamptz) returns void
language sql volatile security definer set search_path = '' as $$
  insert into private.store_tombstones as known (organization_id, store_id, kind, external_id, is_redacted, deleted_at)
  values (source.organization_id, source.store_id, kind, external_id, redacted, at)
  on conflict (organization_id, store_id, kind, external_id) do update
  set is_redacted = known.is_redacted or excluded.is_redacted
$$;
comment on function private.bury(public.webhook_sources, text, text, boolean, timestamptz) is
  'Remembers that the platform deleted an object, so that a late event does not bring it back.';

create function private.is_buried(source public.webhook_sources, kind text, external_id text, restored boolean) returns boolean
language plpgsql volatile security definer set search_path = '' as $$
begin
  if restored then
    delete from private.store_tombstones as known
    where known.organization_id = source.organization_id
      and known.store_id = source.store_id
      and known.kind = is_buried.kind
      and known.external_id = is_buried.external_id
      and not known.is_redacted;
  end if;
  return exists (
    select
    from private.store_tombstones as known
    where known.organization_id = source.organization_id
      and known.store_id = source.store_id
      and known.kind = is_buried.kind
      and known.external_id = is_buried.external_id
  );
end
$$;
comment on function private.is_buried(public.webhook_sources, text, text, boolean) is
  'Whether the platform deleted an object; one that it took out of its bin again is not.';


-- Products ------------------------------------------------------------------------------------------------------------------------

create function private.apply_product(
  source public.webhook_sources, store public.stores, payload jsonb, at timestamptz, out result public.event_status, out error text
)
language plpgsql volatile security definer set search_path = '' as $$
declare
  told     constant jsonb := payload -> 'product';
  external constant text := told ->> 'external_id';
  version  constant timestamptz := private.parse_instant(payload ->> 'version_at');
  currency constant text := coalesce(told ->> 'currency', store.currency_code);
  product  uuid;
begin
  perform private.lock_store_object(store.id, 'product', external);
  if private.is_buried(source, 'product', external, (payload ->> 'restored')::boolean) then
    result := 'ignored';
    error := 'deleted';
    return;
  end if;
  insert into public.products as known (
    organization_id, store_id, external_id, external_variant_id, title, description, handle, product_type, vendor, tags, price_minor,
    compare_at_price_minor, currency_code, sku, barcode, inventory_quantity, inventory_tracked, availability, weight, weight_unit, status,
    is_published, published_at, platform_data, source_updated_at, last_synced_at, sync_hash
  )
  values (
    store.organization_id, store.id, external, told ->> 'external_variant_id',
    left(coalesce(nullif(btrim(told ->> 'title'), ''), 'Product ' || external), 500), told ->> 'description', told ->> 'handle',
    told ->> 'product_type', told ->> 'vendor', private.text_array(told -> 'tags'),
    greatest(coalesce(private.to_minor(told ->> 'price', currency), 0), 0),
    greatest(private.to_minor(told ->> 'compare_at_price', currency), 0), currency, told ->> 'sku', told ->> 'barcode',
    least(greatest(coalesce((told ->> 'inventory_quantity')::numeric, 0), 0), 2147483647)::integer,
    coalesce((told ->> 'inventory_tracked')::boolean, false),
    coalesce(told ->> 'availability', 'in_stock')::public.product_availability,
    case when (told ->> 'weight')::numeric between 0 and 99999 then (told ->> 'weight')::numeric end,
    coalesce(told ->> 'weight_unit', 'kg'), coalesce(told ->> 'status', 'active')::public.product_status,
    coalesce((told ->> 'is_published')::boolean, true), private.store_time(told ->> 'published_at'),
    coalesce(told -> 'platform', '{}'), version, at, private.store_version(told, 0)
  )
  on conflict (organization_id, store_id, external_id) do update
  set
    external_variant_id = excluded.external_variant_id, title = excluded.title, description = excluded.description,
    handle = excluded.handle, product_type = excluded.product_type, vendor = excluded.vendor, tags = excluded.tags,
    price_minor = excluded.price_minor, compare_at_price_minor = excluded.compare_at_price_minor,
    currency_code = excluded.currency_code, sku = excluded.sku, barcode = excluded.barcode,
    inventory_quantity = excluded.inventory_quantity, inventory_tracked = excluded.inventory_tracked,
    availability = excluded.availability, weight = excluded.weight, weight_unit = excluded.weight_unit,
    -- A word that nobody has mapped leaves what was known.
    status = coalesce((told ->> 'status')::public.product_status, known.status),
    is_published = excluded.is_published, published_at = excluded.published_at,
    platform_data = known.platform_data || excluded.platform_data, source_updated_at = excluded.source_updated_at,
    last_synced_at = excluded.last_synced_at, sync_hash = excluded.sync_hash
  where known.source_updated_at is null
    or excluded.source_updated_at > known.source_updated_at
    or excluded.source_updated_at = known.source_updated_at
      and excluded.sync_hash collate "C" > coalesce(known.sync_hash, '') collate "C"
  returning known.id into product;
  if product is null then
    result := 'ignored';
    error := 'older_version';
    return;
  end if;

  delete from public.product_images as image
  where image.organization_id = store.organization_id
    and image.store_id = store.id
    and image.product_id = product
    and image.external_id is not null
    and not exists (
      select from jsonb_array_elements(coalesce(told -> 'images', '[]')) as item (value) where item.value ->> 'external_id' = image.external_id
    );
  insert into public.product_images as known (organization_id, store_id, product_id, external_id, url, alt_text, position)
  select distinct on (item.external_id)
    store.organization_id, store.id, product, item.external_id, item.url, item.alt_text, greatest(coalesce(item.position, 0), 0)
  from jsonb_to_recordset(coalesce(told -> 'images', '[]')) as item (external_id text, url text, alt_text text, position integer)
  where item.external_id is not null and item.url ~ '^https?://'
  order by item.external_id
  on conflict (organization_id, store_id, product_id, external_id) do update
  set url = excluded.url, alt_text = excluded.alt_text, position = excluded.position
  where (known.url, known.alt_text, known.position) is distinct from (excluded.url, excluded.alt_text, excluded.position);

  -- Orders that named it before it was known.
  update public.order_line_items as line
  set product_id = product
  where line.organization_id = store.organization_id
    and line.store_id = store.id
    and line.external_product_id = external
    and line.product_id is null;
  result := 'applied';
end
$$;
comment on function private.apply_product(public.webhook_sources, public.stores, jsonb, timestamptz) is
  'A product as its platform says it: the row and its images, by source version.';


-- Customers -----------------------------------------------------------------------------------------------------------------------

create function private.apply_customer(
  source public.webhook_sources, store public.stores, payload jsonb, at timestamptz, out result public.event_status, out error text
)
language plpgsql volatile security definer set search_path = '' as $$
declare
  told     constant jsonb := payload -> 'customer';
  external constant text := told ->> 'external_id';
  version  constant timestamptz := private.parse_instant(payload ->> 'version_at');
  unlinked uuid[];
  customer uuid;
  is_newer boolean;
begin
  perform private.lock_store_object(store.id, 'customer', external);
  if private.is_buried(source, 'customer', external, (payload ->> 'restored')::boolean) then
    result := 'ignored';
    error := 'deleted';
    return;
  end if;
  -- Orders are locked before their customer.
  unlinked := array(
    select purchase.id
    from public.orders as purchase
    where purchase.organization_id = store.organization_id
      and purchase.store_id = store.id
      and purchase.customer_external_id = external
      and purchase.customer_id is null
    order by purchase.id
    for no key update
  );
  insert into public.customers as known (
    organization_id, store_id, external_id, email, phone, first_name, last_name, accepts_marketing, preferred_language, tags, platform_data,
    source_updated_at, last_synced_at, sync_hash
  )
  values (
    store.organization_id, store.id, external, private.plain_email(told ->> 'email'), private.plain_phone(told ->> 'phone'),
    left(told ->> 'first_name', 255), left(told ->> 'last_name', 255), coalesce((told ->> 'accepts_marketing')::boolean, false),
    case when told ->> 'language' ~ '^[A-Za-z]{2,3}([-_][A-Za-z0-9]{2,8})*$' then told ->> 'language' else 'en' end,
    private.text_array(told -> 'tags'), coalesce(told -> 'platform', '{}'), version, at, private.store_version(told, 0)
  )
  on conflict (organization_id, store_id, external_id) do update
  set
    email = excluded.email, phone = excluded.phone, first_name = excluded.first_name, last_name = excluded.last_name,
    accepts_marketing = excluded.accepts_marketing, preferred_language = excluded.preferred_language, tags = excluded.tags,
    platform_data = known.platform_data || excluded.platform_data, source_updated_at = excluded.source_updated_at,
    last_synced_at = excluded.last_synced_at, sync_hash = excluded.sync_hash
  where known.source_updated_at is null
    or excluded.source_updated_at > known.source_updated_at
    or excluded.source_updated_at = known.source_updated_at
      and excluded.sync_hash collate "C" > coalesce(known.sync_hash, '') collate "C"
  returning known.id into customer;
  is_newer := customer is not null;
  if cardinality(unlinked) > 0 then
    update public.orders as purchase
    set customer_id = person.id
    from public.customers as person
    where purchase.id = any (unlinked)
      and person.organization_id = store.organization_id
      and person.store_id = store.id
      and person.external_id = external;
  end if;
  result := case when is_newer or cardinality(unlinked) > 0 then 'applied' else 'ignored' end::public.event_status;
  error := case when not is_newer then 'older_version' end;
end
$$;
comment on function private.apply_customer(public.webhook_sources, public.stores, jsonb, timestamptz) is
  'A customer as their platform says it, by source version; orders that named them before they were known are linked.';


-- Orders --------------------------------------------------------------------------------------------------------------------------

create function private.order_refunds(refunds jsonb) returns bigint
language sql immutable parallel safe set search_path = '' as $$
  select coalesce(sum(entry.value::bigint), 0)::bigint
  from jsonb_each_text(case when jsonb_typeof(refunds) = 'object' then refunds else '{}' end) as entry (key, value)
$$;
comment on function private.order_refunds(jsonb) is 'The sum of an order''s refunds, each kept under its id and so counted once.';

create function private.apply_order(
  source public.webhook_sources, store public.stores, payload jsonb, at timestamptz, out result public.event_status, out error text
)
language plpgsql volatile security definer set search_path = '' as $$
declare
  told     constant jsonb := payload -> 'order';
  external constant text := told ->> 'external_id';
  buyer    constant text := told ->> 'customer_external_id';
  version  constant timestamptz := private.parse_instant(payload ->> 'version_at');
  currency constant text := coalesce(upper(told ->> 'currency'), store.currency_code);
  fresh    public.orders;
  person   private.store_tombstones;
  written  uuid;
begin
  perform private.lock_store_object(store.id, 'order', external);
  if private.is_buried(source, 'order', external, (payload ->> 'restored')::boolean) then
    result := 'ignored';
    error := 'deleted';
    return;
  end if;
  if buyer is not null then
    perform private.lock_store_object(store.id, 'customer', buyer);
    select known.* into person
    from private.store_tombstones as known
    where known.organization_id = store.organization_id
      and known.store_id = store.id
      and known.kind = 'customer'
      and known.external_id = buyer;
    if person.external_id is null then
      -- The order may come before its customer: a row that any event of theirs completes.
      insert into public.customers (organization_id, store_id, external_id)
      values (store.organization_id, store.id, buyer)
      on conflict (organization_id, store_id, external_id) do nothing;
      select known.id into fresh.customer_id
      from public.customers as known
      where known.organization_id = store.organization_id and known.store_id = store.id and known.external_id = buyer;
    end if;
  end if;

  -- Who asked to be forgotten is not written down again by their order.
  if person.is_redacted is not true then
    fresh.customer_email := private.plain_email(told ->> 'customer_email');
    fresh.customer_phone := left(told ->> 'customer_phone', 50);
    fresh.customer_first_name := left(told ->> 'customer_first_name', 255);
    fresh.customer_last_name := left(told ->> 'customer_last_name', 255);
    fresh.shipping_address := nullif(told -> 'shipping_address', 'null');
    fresh.billing_address := nullif(told -> 'billing_address', 'null');
    fresh.customer_notes := told ->> 'customer_notes';
    fresh.customer_external_id := buyer;
  end if;
  fresh.status := (told ->> 'status')::public.order_status;
  fresh.payment_status := (told ->> 'payment_status')::public.payment_status;
  fresh.fulfillment_status := (told ->> 'fulfillment_status')::public.fulfillment_status;
  fresh.platform_data := coalesce(told -> 'platform', '{}') || jsonb_build_object('refunds', (
    select coalesce(jsonb_object_agg(item.external_id, greatest(coalesce(private.to_minor(item.amount, currency), 0), 0)), '{}')
    from jsonb_to_recordset(coalesce(told -> 'refunds', '[]')) as item (external_id text, amount text)
    where item.external_id is not null
  ));

  insert into public.orders as known (
    organization_id, store_id, customer_id, external_id, order_number, customer_email, customer_phone, customer_first_name,
    customer_last_name, customer_external_id, subtotal_price_minor, total_tax_minor, total_shipping_minor, total_discounts_minor,
    total_price_minor, total_refunded_minor, currency_code, status, payment_status, fulfillment_status, shipping_address, billing_address,
    shipping_method, tracking_number, tracking_url, order_date, shipped_date, delivered_date, cancelled_date, platform_data, customer_notes,
    source_updated_at, last_synced_at, sync_hash
  )
  values (
    store.organization_id, store.id, fresh.customer_id, external, left(told ->> 'order_number', 255), fresh.customer_email,
    fresh.customer_phone, fresh.customer_first_name, fresh.customer_last_name, fresh.customer_external_id,
    greatest(coalesce(private.to_minor(told ->> 'subtotal', currency), 0), 0),
    greatest(coalesce(private.to_minor(told ->> 'tax', currency), 0), 0),
    greatest(coalesce(private.to_minor(told ->> 'shipping', currency), 0), 0),
    greatest(coalesce(private.to_minor(told ->> 'discounts', currency), 0), 0),
    greatest(private.to_minor(told ->> 'total', currency), 0), private.order_refunds(fresh.platform_data -> 'refunds'), currency,
    coalesce(fresh.status, 'pending'), coalesce(fresh.payment_status, 'pending'), coalesce(fresh.fulfillment_status, 'unfulfilled'),
    fresh.shipping_address, fresh.billing_address, told ->> 'shipping_method', told ->> 'tracking_number',
    case when told ->> 'tracking_url' ~ '^https?://' then told ->> 'tracking_url' end,
    coalesce(private.store_time(told ->> 'ordered_at'), private.to_business(version)), private.store_time(told ->> 'shipped_at'),
    private.store_time(told ->> 'delivered_at'), private.store_time(told ->> 'cancelled_at'), fresh.platform_data, fresh.customer_notes,
    version, at, private.store_version(told, (payload ->> 'rank')::integer)
  )
  on conflict (organization_id, store_id, external_id) do update
  set
    customer_id = case when buyer is null then known.customer_id else excluded.customer_id end,
    order_number = excluded.order_number, customer_email = excluded.customer_email, customer_phone = excluded.customer_phone,
    customer_first_name = excluded.customer_first_name, customer_last_name = excluded.customer_last_name,
    customer_external_id = excluded.customer_external_id, subtotal_price_minor = excluded.subtotal_price_minor,
    total_tax_minor = excluded.total_tax_minor, total_shipping_minor = excluded.total_shipping_minor,
    total_discounts_minor = excluded.total_discounts_minor, total_price_minor = excluded.total_price_minor,
    -- A refund that was told by itself is not forgotten, whichever version of the order comes after it.
    total_refunded_minor = private.order_refunds(
      coalesce(known.platform_data -> 'refunds', '{}') || (excluded.platform_data -> 'refunds')
    ),
    currency_code = excluded.currency_code, status = coalesce(fresh.status, known.status),
    payment_status = coalesce(fresh.payment_status, known.payment_status),
    fulfillment_status = coalesce(fresh.fulfillment_status, known.fulfillment_status),
    shipping_address = excluded.shipping_address, billing_address = excluded.billing_address, shipping_method = excluded.shipping_method,
    tracking_number = excluded.tracking_number, tracking_url = excluded.tracking_url, order_date = excluded.order_date,
    shipped_date = excluded.shipped_date, delivered_date = excluded.delivered_date, cancelled_date = excluded.cancelled_date,
    platform_data = known.platform_data || excluded.platform_data || jsonb_build_object(
      'refunds', coalesce(known.platform_data -> 'refunds', '{}') || (excluded.platform_data -> 'refunds')
    ),
    customer_notes = excluded.customer_notes, source_updated_at = excluded.source_updated_at, last_synced_at = excluded.last_synced_at,
    sync_hash = excluded.sync_hash
  where known.source_updated_at is null
    or excluded.source_updated_at > known.source_updated_at
    or excluded.source_updated_at = known.source_updated_at
      and excluded.sync_hash collate "C" > coalesce(known.sync_hash, '') collate "C"
  returning known.id into written;
  if written is null then
    result := 'ignored';
    error := 'older_version';
    return;
  end if;

  -- Lines that only a user wrote have no id of the platform's, and stay.
  delete from public.order_line_items as line
  where line.organization_id = store.organization_id
    and line.store_id = store.id
    and line.order_id = written
    and line.external_id is not null
    and not exists (
      select from jsonb_array_elements(coalesce(told -> 'lines', '[]')) as item (value) where item.value ->> 'external_id' = line.external_id
    );
  insert into public.order_line_items as known (
    organization_id, store_id, order_id, product_id, external_id, external_product_id, external_variant_id, title, variant_title, sku,
    price_minor, quantity, total_price_minor, properties, fulfillment_status, fulfilled_quantity
  )
  select distinct on (item.external_id)
    store.organization_id, store.id, written, product.id, item.external_id, item.external_product_id, item.external_variant_id,
    left(coalesce(nullif(btrim(item.title), ''), 'Line ' || item.external_id), 500), item.variant_title, item.sku,
    greatest(coalesce(private.to_minor(item.price, currency), 0), 0), item.quantity,
    greatest(
      coalesce(
        private.to_minor(item.total, currency),
        private.to_minor(item.price, currency) * item.quantity - coalesce(private.to_minor(item.discount, currency), 0),
        0
      ),
      0
    ),
    coalesce(item.properties, '{}'), coalesce(item.fulfillment_status, 'unfulfilled'),
    least(greatest(coalesce(item.fulfilled_quantity, 0), 0), item.quantity)
  from jsonb_to_recordset(coalesce(told -> 'lines', '[]')) as item (
    external_id text, external_product_id text, external_variant_id text, title text, variant_title text, sku text, price text, total text,
    discount text, quantity integer, properties jsonb, fulfillment_status public.fulfillment_status, fulfilled_quantity integer
  )
  left join public.products as product
    on product.organization_id = store.organization_id
    and product.store_id = store.id
    and product.external_id = item.external_product_id
  where item.external_id is not null and item.quantity > 0
  order by item.external_id
  on conflict (organization_id, store_id, order_id, external_id) do update
  set
    product_id = coalesce(excluded.product_id, known.product_id), external_product_id = excluded.external_product_id,
    external_variant_id = excluded.external_variant_id, title = excluded.title, variant_title = excluded.variant_title, sku = excluded.sku,
    price_minor = excluded.price_minor, quantity = excluded.quantity, total_price_minor = excluded.total_price_minor,
    properties = excluded.properties, fulfillment_status = excluded.fulfillment_status, fulfilled_quantity = excluded.fulfilled_quantity
  where (
    known.product_id, known.external_product_id, known.external_variant_id, known.title, known.variant_title, known.sku, known.price_minor,
    known.quantity, known.total_price_minor, known.properties, known.fulfillment_status, known.fulfilled_quantity
  ) is distinct from (
    coalesce(excluded.product_id, known.product_id), excluded.external_product_id, excluded.external_variant_id, excluded.title,
    excluded.variant_title, excluded.sku, excluded.price_minor, excluded.quantity, excluded.total_price_minor, excluded.properties,
    excluded.fulfillment_status, excluded.fulfilled_quantity
  );

  -- What the order says of a customer of whom no event has come.
  if fresh.customer_id is not null then
    update public.customers as known
    set
      email = coalesce(fresh.customer_email, known.email), phone = coalesce(private.plain_phone(fresh.customer_phone), known.phone),
      first_name = coalesce(fresh.customer_first_name, known.first_name), last_name = coalesce(fresh.customer_last_name, known.last_name)
    where known.organization_id = store.organization_id
      and known.store_id = store.id
      and known.id = fresh.customer_id
      and known.source_updated_at is null;
  end if;
  result := 'applied';
end
$$;
comment on function private.apply_order(public.webhook_sources, public.stores, jsonb, timestamptz) is
  'An order as its platform says it, with its lines and the row of its customer, by source version: an older version changes nothing.';

create function private.apply_order_refund(
  source public.webhook_sources, store public.stores, payload jsonb, at timestamptz, out result public.event_status, out error text
)
language plpgsql volatile security definer set search_path = '' as $$
declare
  external constant text := payload ->> 'order_external_id';
  known    public.orders;
  refunds  jsonb;
begin
  perform private.lock_store_object(store.id, 'order', external);
  if private.is_buried(source, 'order', external, false) then
    result := 'ignored';
    error := 'deleted';
    return;
  end if;
  select purchase.* into known
  from public.orders as purchase
  where purchase.organization_id = store.organization_id and purchase.store_id = store.id and purchase.external_id = external
  for no key update;
  if known.id is null then
    -- Kept, and tried again until the order is here.
    raise exception 'the order % of the refund has not come yet', external using errcode = 'no_data_found';
  end if;
  refunds := coalesce(known.platform_data -> 'refunds', '{}') || jsonb_build_object(
    payload #>> '{refund,external_id}', greatest(coalesce(private.to_minor(payload #>> '{refund,amount}', known.currency_code), 0), 0)
  );
  if refunds = known.platform_data -> 'refunds' then
    result := 'ignored';
    return;
  end if;
  update public.orders as purchase
  set
    total_refunded_minor = private.order_refunds(refunds),
    platform_data = known.platform_data || jsonb_build_object('refunds', refunds)
  where purchase.id = known.id;
  result := 'applied';
end
$$;
comment on function private.apply_order_refund(public.webhook_sources, public.stores, jsonb, timestamptz) is
  'A refund of a shop''s order, told by itself: counted once, also when the order tells it too.';


-- The end of things ---------------------------------------------------------------------------------------------------------------

create function private.apply_store_deletion(
  source public.webhook_sources, store public.stores, payload jsonb, at timestamptz, out result public.event_status, out error text
)
language plpgsql volatile security definer set search_path = '' as $$
declare
  kind     constant text := split_part(payload ->> 'event', '_', 1);
  external constant text := payload ->> 'external_id';
begin
  perform private.lock_store_object(store.id, kind, external);
  perform private.bury(source, kind, external, false, at);
  case kind
    when 'product' then
      delete from public.products as gone
      where gone.organization_id = store.organization_id and gone.store_id = store.id and gone.external_id = external;
    when 'order' then
      delete from public.orders as gone
      where gone.organization_id = store.organization_id and gone.store_id = store.id and gone.external_id = external;
    when 'customer' then
      -- Orders before their customer: what refers to the row is set free in that order.
      update public.orders as purchase
      set customer_id = null
      where purchase.organization_id = store.organization_id
        and purchase.store_id = store.id
        and purchase.customer_id = (
          select known.id
          from public.customers as known
          where known.organization_id = store.organization_id and known.store_id = store.id and known.external_id = external
        );
      delete from public.customers as gone
      where gone.organization_id = store.organization_id and gone.store_id = store.id and gone.external_id = external;
  end case;
  result := 'applied';
end
$$;
comment on function private.apply_store_deletion(public.webhook_sources, public.stores, jsonb, timestamptz) is
  'What the platform deleted is deleted, and stays so when an older event comes after it.';

create function private.apply_store_uninstall(
  source public.webhook_sources, store public.stores, payload jsonb, at timestamptz, out result public.event_status, out error text
)
language plpgsql volatile security definer set search_path = '' as $$
declare
  connected public.store_status;
begin
  select known.status into connected
  from public.stores as known
  where known.organization_id = store.organization_id and known.id = store.id
  for no key update;
  delete from private.store_credentials as known
  where known.organization_id = store.organization_id and known.store_id = store.id;
  update public.stores as known
  set status = 'disconnected', token_expires_at = null
  where known.organization_id = store.organization_id and known.id = store.id and known.status <> 'disconnected';
  if connected = 'disconnected' then
    result := 'ignored';
    return;
  end if;
  perform private.audit(store.organization_id, 'store.disconnected', 'store', store.id, jsonb_build_object('platform', store.platform), at);
  perform private.emit(
    store.organization_id, 'store.disconnected', store.id || ' ' || at::text, jsonb_build_object('store_id', store.id, 'platform', store.platform), at
  );
  result := 'applied';
end
$$;
comment on function private.apply_store_uninstall(public.webhook_sources, public.stores, jsonb, timestamptz) is
  'The shop took our app out: the store is disconnected and what opened it is dropped. The source stays, since the shop''s last wish comes later.';


-- Privacy -------------------------------------------------------------------------------------------------------------------------

create function private.forget_store_events(source public.webhook_sources, external_customer text, external_orders text[])
returns void
language sql volatile security definer set search_path = '' as $$
  update private.webhook_events as stored
  set body = null, payload = null
  from private.webhook_event_keys as key
  where key.source = forget_store_events.source.provider
    and key.source_id = forget_store_events.source.id::text
    and stored.id = key.event_id
    and stored.received_at = key.received_at
    and (stored.body is not null or stored.payload is not null)
    and (
      external_customer is null
      or stored.payload #>> '{customer,external_id}' = external_customer
      or stored.payload #>> '{order,customer_external_id}' = external_customer
      or stored.payload ->> 'external_id' = external_customer and stored.payload ->> 'event' = 'customer_deleted'
      or stored.payload #>> '{order,external_id}' = any (external_orders)
    )
$$;
comment on function private.forget_store_events(public.webhook_sources, text, text[]) is
  'Takes what a source told of one customer, or without one of anybody, out of the events as they came.';

create function private.note_privacy_request(
  source public.webhook_sources, wish text, payload jsonb, customer uuid, done boolean, at timestamptz
) returns void
language plpgsql volatile security definer set search_path = '' as $$
declare
  request uuid;
begin
  insert into public.privacy_requests (
    organization_id, store_id, kind, external_id, customer_id, customer_external_id, order_external_ids, requested_at, due_at, completed_at
  )
  values (
    source.organization_id, source.store_id, wish, payload ->> 'request_id', customer,
    case when not done then payload #>> '{customer,external_id}' end,
    case when not done then private.text_array(payload -> 'order_external_ids') else '{}' end,
    at, at + interval '30 days', case when done then at end
  )
  returning id into request;
  perform private.audit(source.organization_id, 'privacy.' || wish, 'privacy_request', request, '{}', at);
  perform private.emit(
    source.organization_id, 'privacy.' || wish, request::text,
    jsonb_build_object('privacy_request_id', request, 'store_id', source.store_id, 'completed', done), at
  );
end
$$;
comment on function private.note_privacy_request(public.webhook_sources, text, jsonb, uuid, boolean, timestamptz) is
  'Writes down what a person or a shop asked for, and until when it has to be done.';

create function private.apply_customer_redact(
  source public.webhook_sources, store public.stores, payload jsonb, at timestamptz, out result public.event_status, out error text
)
language plpgsql volatile security definer set search_path = '' as $$
declare
  external constant text := payload #>> '{customer,external_id}';
  orders   constant text[] := private.text_array(payload -> 'order_external_ids');
  customer public.customers;
  theirs   uuid[];
  contact  record;
begin
  perform private.lock_store_object(store.id, 'customer', external);
  perform private.bury(source, 'customer', external, true, at);
  theirs := array(
    select purchase.id
    from public.orders as purchase
    where purchase.organization_id = store.organization_id
      and purchase.store_id = store.id
      and (
        purchase.customer_external_id = external
        or purchase.external_id = any (orders)
        or purchase.customer_id = (
          select known.id
          from public.customers as known
          where known.organization_id = store.organization_id and known.store_id = store.id and known.external_id = external
        )
      )
    order by purchase.id
    for no key update
  );
  select known.* into customer
  from public.customers as known
  where known.organization_id = store.organization_id and known.store_id = store.id and known.external_id = external
  for update;

  -- By every number and address that is known of them, wherever else it is written down.
  for contact in
    select distinct known.phone, known.email
    from (
      select private.plain_phone(payload #>> '{customer,phone}') as phone, private.plain_email(payload #>> '{customer,email}') as email
      union
      select customer.phone, customer.email
      union
      select private.plain_phone(purchase.customer_phone), purchase.customer_email
      from public.orders as purchase
      where purchase.id = any (theirs) and purchase.customer_external_id = external
    ) as known
    order by known.phone, known.email
  loop
    perform private.erase(
      jsonb_strip_nulls(jsonb_build_object(
        'v', 1, 'organization_id', store.organization_id, 'store_id', store.id, 'customer_external_id', external,
        'phone', contact.phone, 'email', contact.email
      )), at
    );
  end loop;

  update public.orders as purchase
  set
    customer_id = null, customer_email = null, customer_phone = null, customer_first_name = null, customer_last_name = null,
    customer_external_id = null, shipping_address = null, billing_address = null, customer_notes = null, internal_notes = null,
    tracking_number = null, tracking_url = null
  where purchase.id = any (theirs);
  delete from public.customers as known where known.id = customer.id;
  perform private.forget_store_events(source, external, orders);
  perform private.note_privacy_request(source, 'customer_redact', payload, null, true, at);
  result := 'applied';
end
$$;
comment on function private.apply_customer_redact(public.webhook_sources, public.stores, jsonb, timestamptz) is
  'A customer who asked to be forgotten: their row goes, their orders keep amounts alone, and no late event writes them down again.';

create function private.apply_shop_redact(
  source public.webhook_sources, store public.stores, payload jsonb, at timestamptz, out result public.event_status, out error text
)
language plpgsql volatile security definer set search_path = '' as $$
begin
  perform from public.stores as known
  where known.organization_id = store.organization_id and known.id = store.id
  for no key update;
  -- Everybody of the store, wherever else they are written down; what was only the store's is then taken away.
  perform private.erase(jsonb_build_object('v', 1, 'organization_id', store.organization_id, 'store_id', store.id), at);
  delete from public.calls as gone where gone.organization_id = store.organization_id and gone.store_id = store.id;
  delete from public.conversations as gone where gone.organization_id = store.organization_id and gone.store_id = store.id;
  delete from public.orders as gone where gone.organization_id = store.organization_id and gone.store_id = store.id;
  delete from public.customers as gone where gone.organization_id = store.organization_id and gone.store_id = store.id;
  delete from public.products as gone where gone.organization_id = store.organization_id and gone.store_id = store.id;
  delete from private.store_credentials as gone where gone.organization_id = store.organization_id and gone.store_id = store.id;
  update public.stores as known
  set status = 'disconnected', token_expires_at = null, owner_email = null, owner_name = null
  where known.organization_id = store.organization_id and known.id = store.id;
  perform private.forget_store_events(source, null, '{}');
  perform private.note_privacy_request(source, 'shop_redact', payload, null, true, at);
  result := 'applied';
end
$$;
comment on function private.apply_shop_redact(public.webhook_sources, public.stores, jsonb, timestamptz) is
  'A shop that left asks to be forgotten: everything it told, and everybody it told of.';

create function private.forget_redact_event() returns trigger
language plpgsql set search_path = '' as $$
begin
  -- The wish to be forgotten names the person; once granted it need not.
  if new.status = 'applied' and new.payload ->> 'event' in ('customer_redact', 'shop_redact') then
    new.body := null;
    new.payload := new.payload - array['customer', 'order_external_ids'];
  end if;
  return new;
end
$$;
comment on function private.forget_redact_event() is 'Trigger: an event that had somebody erased keeps nothing of them itself.';
create trigger forget_redact_event before insert or update of status on private.webhook_events
  for each row when (new.payload_type = 'store') execute function private.forget_redact_event();

create function private.complete_privacy_request(request_id uuid, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('store.edit');
  done         public.privacy_requests;
begin
  update public.privacy_requests as request
  set completed_at = at, customer_external_id = null, order_external_ids = '{}'
  where request.organization_id = organization and request.id = request_id and request.completed_at is null
  returning request.* into done;
  if done.id is null then
    perform private.raise_error(404, 'privacy_request_not_found', 'There is no such request that is still open', 'request_id');
  end if;
  return jsonb_build_object('id', done.id, 'kind', done.kind, 'completed_at', done.completed_at);
end
$$;
comment on function private.complete_privacy_request(uuid, timestamptz) is 'Marks a request in the caller''s organization as done.';

create function public.complete_privacy_request(request_id uuid) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.complete_privacy_request(request_id, private.clock_now())
$$;
comment on function public.complete_privacy_request(uuid) is
  'Says that a customer was given their data; 404 unless the request is open. Needs store.edit. Returns {"id","kind","completed_at"}.';


-- apply_store_event ---------------------------------------------------------------------------------------------------------------

create function private.apply_store_event(
  event private.webhook_events, source public.webhook_sources, at timestamptz,
  out result public.event_status, out error text, out organization_id uuid
)
language plpgsql volatile security definer set search_path = '' as $$
declare
  payload constant jsonb := event.payload;
  store   public.stores;
  known   text[];
  applied record;
begin
  organization_id := source.organization_id;
  if source.provider not in ('shopify', 'woocommerce') then
    result := 'orphan';
    error := 'no_shop';
    return;
  end if;
  select mine.* into store
  from public.stores as mine
  where mine.organization_id = source.organization_id and mine.id = source.store_id and mine.platform::text = source.provider;
  if store.id is null then
    result := 'orphan';
    error := 'unknown_store';
    return;
  end if;
  -- Whose event it is, as the header says, and as the signed body says where it does. One app's secret signs for all of its shops.
  known := array[store.domain, lower(source.settings ->> 'shop_domain')];
  if payload ->> 'shop' is not null and not lower(payload ->> 'shop') = any (array_remove(known, null))
    or jsonb_array_length(coalesce(nullif(payload -> 'signed_shops', 'null'), '[]')) > 0
      and not array(select lower(said.name) from jsonb_array_elements_text(payload -> 'signed_shops') as said (name)) && known
  then
    result := 'orphan';
    error := 'other_shop';
    return;
  end if;

  case payload ->> 'event'
    when 'product' then
      select * into applied from private.apply_product(source, store, payload, at);
    when 'customer' then
      select * into applied from private.apply_customer(source, store, payload, at);
    when 'order' then
      select * into applied from private.apply_order(source, store, payload, at);
    when 'refund' then
      select * into applied from private.apply_order_refund(source, store, payload, at);
    when 'product_deleted', 'order_deleted', 'customer_deleted' then
      select * into applied from private.apply_store_deletion(source, store, payload, at);
    when 'uninstalled' then
      select * into applied from private.apply_store_uninstall(source, store, payload, at);
    when 'customer_redact' then
      select * into applied from private.apply_customer_redact(source, store, payload, at);
    when 'shop_redact' then
      select * into applied from private.apply_shop_redact(source, store, payload, at);
    when 'data_request' then
      perform private.note_privacy_request(
        source, 'data_request', payload,
        (
          select customer.id
          from public.customers as customer
          where customer.organization_id = store.organization_id
            and customer.store_id = store.id
            and customer.external_id = payload #>> '{customer,external_id}'
        ), false, at
      );
      result := 'applied';
      return;
    else
      result := 'ignored';
      error := 'unknown_event';
      return;
  end case;
  result := applied.result;
  error := applied.error;
  if result = 'applied' and payload ->> 'event' in ('product', 'customer', 'order', 'refund') then
    update public.stores as mine
    set last_sync_at = at
    where mine.organization_id = store.organization_id and mine.id = store.id
      and (mine.last_sync_at is null or mine.last_sync_at < at - interval '1 minute');
  end if;
end
$$;
comment on function private.apply_store_event(private.webhook_events, public.webhook_sources, timestamptz) is
  'What a shop''s event changes. A shop speaks for its own store alone.';


-- Payments ------------------------------------------------------------------------------------------------------------------------

create function private.apply_payment_event(
  event private.webhook_events, source public.webhook_sources, at timestamptz,
  out result public.event_status, out error text, out organization_id uuid
)
language plpgsql volatile security definer set search_path = '' as $$
declare
  request  jsonb := coalesce(nullif(event.payload -> 'request', 'null'), '{}') || jsonb_build_object('v', 1, 'gateway', source.provider);
  payment  public.payments;
  answer   jsonb;
  refund   jsonb;
  outcomes text[] := '{}'::text[];
begin
  -- Anybody may make a source of their own, and sign what they please with its secret: money is told by the platform's sources alone.
  if source.organization_id is not null or source.provider not in ('stripe', 'razorpay') then
    result := 'orphan';
    error := 'not_a_gateway';
    organization_id := source.organization_id;
    return;
  end if;

  case event.payload ->> 'event'
    when 'payment' then
      answer := private.record_payment(request, at);
      organization_id := (answer #>> '{payment,organization_id}')::uuid;
      outcomes := array[answer ->> 'result'];
      if organization_id is not null and request ->> 'invoice_id' is not null
        and (answer #>> '{invoice,id}') is distinct from lower(request ->> 'invoice_id')
      then
        -- The order is the invoice's that it was opened for, whatever is written beside it.
        outcomes := outcomes || 'other_invoice'::text;
        perform private.emit(
          organization_id, 'payment.conflict', (answer #>> '{payment,id}') || ' ' || lower(request ->> 'invoice_id'),
          jsonb_build_object('payment_id', answer #>> '{payment,id}', 'invoice_id', request ->> 'invoice_id'), at
        );
      end if;
      error := coalesce(answer #>> '{payment,problem}', nullif(nullif(outcomes[cardinality(outcomes)], 'applied'), 'duplicate'));

    when 'refunds' then
      for refund in
        select item.value from jsonb_array_elements(event.payload -> 'requests') as item (value) order by item.value ->> 'refund_id'
      loop
        refund := refund || jsonb_build_object('v', 1, 'gateway', source.provider);
        answer := private.record_refund(refund, at);
        select known.* into payment
        from public.payments as known
        where known.gateway = source.provider::public.payment_gateway and known.gateway_payment_id = refund ->> 'payment_id';
        organization_id := payment.organization_id;
        if answer ->> 'result' = 'orphan' then
          -- Kept, and tried again: gateways tell of a refund before they tell of the payment's capture.
          raise exception 'the payment of refund % has not come yet', refund ->> 'refund_id' using errcode = 'no_data_found';
        end if;
        if answer ->> 'result' = 'ignored' and refund ->> 'status' = 'failed' and answer #>> '{refund,status}' = 'processed' then
          -- Money that was counted as gone came back to us: a person has to look at it.
          perform private.emit(
            payment.organization_id, 'refund.failed_late', refund ->> 'refund_id',
            jsonb_build_object('payment_id', payment.id, 'refund_id', answer #>> '{refund,id}'), at
          );
          error := 'failed_late';
        end if;
        outcomes := outcomes || (answer ->> 'result');
      end loop;
      if event.payload ->> 'refunded_minor' is not null then
        select known.* into payment
        from public.payments as known
        where known.gateway = source.provider::public.payment_gateway
          and known.gateway_payment_id = event.payload ->> 'payment_id';
        organization_id := payment.organization_id;
        if payment.id is null or payment.refunded_minor < (event.payload ->> 'refunded_minor')::bigint then
          -- The charge says how much is gone, the refunds say which: until they have come, it waits.
          raise exception 'refunds of payment % have not come yet', event.payload ->> 'payment_id' using errcode = 'no_data_found';
        end if;
      end if;
      error := coalesce(error, case when 'conflict' = any (outcomes) then 'conflict' end);

    when 'method' then
      if request ->> 'organization_id' is null then
        request := request || jsonb_build_object('organization_id', (
          select known.organization_id
          from public.payment_methods as known
          where known.gateway = source.provider::public.payment_gateway
            and (
              known.gateway_payment_method_id = request ->> 'payment_method_id'
              or known.gateway_customer_id = request ->> 'customer_id'
            )
          order by known.gateway_payment_method_id = request ->> 'payment_method_id' desc, known.created_at
          limit 1
        ));
      end if;
      if request ->> 'organization_id' is null then
        -- The first token of a customer whom we had the gateway make.
        request := request || jsonb_build_object('organization_id', (
          select known.organization_id
          from private.payment_customers as known
          where known.gateway = source.provider::public.payment_gateway and known.customer_id = request ->> 'customer_id'
        ));
      end if;
      if not exists (select from public.organizations as tenant where tenant.id = private.to_uuid(request ->> 'organization_id')) then
        result := 'orphan';
        error := 'unknown_customer';
        return;
      end if;
      organization_id := (request ->> 'organization_id')::uuid;
      perform private.save_payment_method(request, at);
      outcomes := array['applied'];

    when 'method_removed' then
      organization_id := (
        select known.organization_id
        from public.payment_methods as known
        where known.gateway = source.provider::public.payment_gateway
          and known.gateway_payment_method_id = request ->> 'payment_method_id'
      );
      outcomes := array[
        case when (private.remove_payment_method(request, at) ->> 'removed')::boolean then 'applied' else 'ignored' end
      ];

    when 'order_expired' then
      update public.payments as known
      set failure_code = 'expired', failure_message = 'Nobody paid before the order expired'
      where known.gateway = source.provider::public.payment_gateway
        and known.gateway_order_id = request ->> 'order_id'
        and known.gateway_payment_id is null
        and known.status = 'pending'
        and known.failure_code is distinct from 'expired'
      returning known.* into payment;
      organization_id := payment.organization_id;
      outcomes := array[case when payment.id is not null then 'applied' else 'ignored' end];

    when 'dispute' then
      update public.payments as known
      set
        dispute_status = left(request ->> 'status', 50), disputed_minor = private.read_minor(request, 'amount_minor'),
        disputed_at = private.parse_instant(request ->> 'occurred_at')
      where known.gateway = source.provider::public.payment_gateway
        and known.gateway_payment_id = request ->> 'payment_id'
        and (
          known.disputed_at is null
          or known.disputed_at < private.parse_instant(request ->> 'occurred_at')
          or known.disputed_at = private.parse_instant(request ->> 'occurred_at')
            and coalesce(known.dispute_status, '') < left(request ->> 'status', 50)
        )
      returning known.* into payment;
      if payment.id is null and not exists (
        select
        from public.payments as known
        where known.gateway = source.provider::public.payment_gateway and known.gateway_payment_id = request ->> 'payment_id'
      ) then
        raise exception 'the payment of a dispute has not come yet' using errcode = 'no_data_found';
      end if;
      organization_id := payment.organization_id;
      if payment.id is not null then
        perform private.audit(
          payment.organization_id, 'payment.disputed', 'payment', payment.id,
          jsonb_build_object('status', payment.dispute_status, 'amount_minor', payment.disputed_minor, 'currency', payment.currency), at
        );
        perform private.emit(
          payment.organization_id, 'payment.disputed', payment.id || ' ' || (request ->> 'dispute_id') || ' ' || payment.dispute_status,
          jsonb_build_object(
            'payment_id', payment.id, 'status', payment.dispute_status, 'amount_minor', payment.disputed_minor,
            'currency', payment.currency, 'reason', left(request ->> 'reason', 100)
          ), at
        );
      end if;
      outcomes := array[case when payment.id is not null then 'applied' else 'ignored' end];

    else
      result := 'ignored';
      error := 'unknown_event';
      return;
  end case;

  result := case
    when outcomes && array['applied', 'conflict', 'unmatched', 'other_invoice'] then 'applied'
    when 'orphan' = any (outcomes) then 'orphan'
    else 'ignored'
  end::public.event_status;
end
$$;
comment on function private.apply_payment_event(private.webhook_events, public.webhook_sources, timestamptz) is
  'What a gateway''s event changes: payments, refunds, payment methods, disputes. Only the platform''s own sources speak of money.';


revoke execute on function
  private.to_minor(text, text), private.plain_email(text), private.plain_phone(text), private.store_time(text), private.text_array(jsonb),
  private.store_version(jsonb, integer), private.lock_store_object(uuid, text, text),
  private.bury(public.webhook_sources, text, text, boolean, timestamptz), private.is_buried(public.webhook_sources, text, text, boolean),
  private.apply_product(public.webhook_sources, public.stores, jsonb, timestamptz),
  private.apply_customer(public.webhook_sources, public.stores, jsonb, timestamptz),
  private.order_refunds(jsonb), private.apply_order(public.webhook_sources, public.stores, jsonb, timestamptz),
  private.apply_order_refund(public.webhook_sources, public.stores, jsonb, timestamptz),
  private.apply_store_deletion(public.webhook_sources, public.stores, jsonb, timestamptz),
  private.apply_store_uninstall(public.webhook_sources, public.stores, jsonb, timestamptz),
  private.forget_store_events(public.webhook_sources, text, text[]),
  private.note_privacy_request(public.webhook_sources, text, jsonb, uuid, boolean, timestamptz),
  private.apply_customer_redact(public.webhook_sources, public.stores, jsonb, timestamptz),
  private.apply_shop_redact(public.webhook_sources, public.stores, jsonb, timestamptz), private.forget_redact_event(),
  private.apply_store_event(private.webhook_events, public.webhook_sources, timestamptz),
  private.apply_payment_event(private.webhook_events, public.webhook_sources, timestamptz)
from public, anon, authenticated, service_role;
revoke execute on function private.complete_privacy_request(uuid, timestamptz), public.complete_privacy_request(uuid)
from public, anon, authenticated, service_role;
grant execute on function private.complete_privacy_request(uuid, timestamptz), public.complete_privacy_request(uuid) to authenticated;
