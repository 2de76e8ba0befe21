-- Shops, payment gateways and leads come in by webhook-intake.

set local lock_timeout = '5s';
set local statement_timeout = '60s';


-- An API key may be one that writes leads.

create or replace function private.create_api_key(name text, scopes text[], at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('organization.manage');
  known        constant text[] := array['lead.write', 'usage.write'];
  key_id       uuid := gen_random_uuid();
  key_prefix   text := 'tlk_' || encode(extensions.gen_random_bytes(4), 'hex');
  plain        text := key_prefix || '_' || encode(extensions.gen_random_bytes(20), 'hex');
begin
  if length(btrim(coalesce(name, ''))) not between 1 and 100 then
    perform private.raise_error(422, 'invalid_name', 'A name of 1 to 100 characters is required', 'name');
  end if;
  if coalesce(cardinality(scopes), 0) = 0 or not scopes <@ known then
    perform private.raise_error(422, 'unknown_scope', format('Scopes are: %s', array_to_string(known, ', ')), 'scopes');
  end if;
  insert into public.api_keys (id, organization_id, name, prefix, sha256, scopes, created_by, created_at)
  values (
    key_id, organization, btrim(create_api_key.name), key_prefix, extensions.digest(plain, 'sha256'),
    array(select distinct scope from unnest(create_api_key.scopes) as scope order by scope), private.acting_user_id(), at
  );
  perform private.audit(organization, 'api_key.created', 'api_key', key_id, jsonb_build_object('prefix', key_prefix), at);
  return jsonb_build_object('id', key_id, 'prefix', key_prefix, 'key', plain);
end
$$;


-- Before the first release no installation is in use: the table is small.
-- squawk-ignore require-concurrent-index-creation
create index idx_orders_customer_external_id on public.orders (organization_id, store_id, customer_external_id)
  where customer_external_id is not null;


-- store_tombstones ----------------------------------------------------------------------------------------------------------------

create table private.store_tombstones (
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

create table public.privacy_requests (
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
create index idx_privacy_requests_store on public.privacy_requests (organization_id, store_id, requested_at desc);
create index idx_privacy_requests_customer on public.privacy_requests (organization_id, store_id, customer_id)
  where customer_id is not null;

revoke all on public.privacy_requests from anon, authenticated, service_role;
grant select on public.privacy_requests to authenticated, service_role;
alter table public.privacy_requests enable row level security;
alter table public.privacy_requests force row level security;
create policy "Who views stores may see what people asked of them" on public.privacy_requests
  for select to authenticated using (organization_id = (select private.org_with('store.view')));
create trigger update_modified_column before update on public.privacy_requests
  for each row execute function private.update_modified_column();
comment on table public.privacy_requests is
  'What people and shops asked about their data: to be given it, or to be forgotten. The latter is done at once, the former by a person.';
comment on column public.privacy_requests.external_id is 'The platform''s id of the request.';
comment on column public.privacy_requests.due_at is 'Thirty days after it was asked, which is what the platforms allow.';


alter table public.lead_forms
  add column consent_scopes text[] not null default '{call_service}'
    check (consent_scopes <@ array['call_service', 'call_promotional', 'recording', 'sms', 'whatsapp']),
  add column rate_per_minute integer not null default 30 check (rate_per_minute between 1 and 6000);
grant insert (consent_scopes, rate_per_minute), update (consent_scopes, rate_per_minute) on public.lead_forms to authenticated;


comment on table public.lead_forms is
  'A form by which leads come in of themselves. The public never reads it here: intake takes submissions by the form''s id, which is no secret.';
comment on column public.lead_forms.consent_scopes is 'What consent_text is a consent to.';
comment on column public.lead_forms.rate_per_minute is 'Submissions a minute that are taken; of more the sender is told to wait.';


-- What intake remembers of those who send leads -------------------------------------------------------------------------------------

create table private.rate_limits (
  subject     text primary key check (length(subject) between 1 and 200),
  tokens      numeric not null,
  refilled_at timestamptz not null
);
select private.close_table('private.rate_limits');
comment on table private.rate_limits is 'A bucket a sender: what it may still send now, in whatever process it is served. Real time.';

create table private.lead_requests (
  organization_id uuid not null references public.organizations (id) on delete cascade,
  subject         text not null,
  key             text not null check (length(key) between 1 and 255),
  body_sha256     text not null,
  answer          jsonb,
  created_at      timestamptz not null,
  primary key (organization_id, subject, key)
);
create index idx_lead_requests_created_at on private.lead_requests (created_at);
select private.close_table('private.lead_requests');
comment on table private.lead_requests is
  'Requests that came with an idempotency key, and what they were answered: ids and codes, nobody''s particulars. Kept for a week.';


-- What a payer's bank says against it, as the gateway reports it.
alter table public.payments
  add column dispute_status text,
  add column disputed_minor bigint,
  add column disputed_at timestamptz,
  -- The table is new or small: it is read in no time.
  -- squawk-ignore constraint-missing-not-valid
  add constraint payments_dispute_whole check (
    (dispute_status is null) = (disputed_at is null) and (dispute_status is null) = (disputed_minor is null)
  );
comment on column public.payments.dispute_status is 'The gateway''s word: of an open dispute, or how it ended. It moves no money by itself.';
comment on column public.payments.disputed_at is 'When the gateway said so; older news does not change it.';


create or replace function private.guard_payment() returns trigger
language plpgsql set search_path = ''
as $$
declare
  news constant text[] := array[
    'status', 'status_at', 'applied_minor', 'refunded_minor', 'problem', 'failure_code', 'failure_message', 'captured_at',
    'payment_method_id', 'updated_at', 'dispute_status', 'disputed_minor', 'disputed_at'
  ];
  -- What the order's row learns from the first payment of the order.
  identity constant text[] := array['gateway_payment_id', 'amount_minor', 'currency'];
  open text[] := case when old.gateway_payment_id is null then news || identity else news end;
begin
  if to_jsonb(new) - open is distinct from to_jsonb(old) - open then
    raise exception 'payment %: what was paid does not change', old.id using errcode = '23514';
  end if;
  if old.status >= 'captured' and (new.status < old.status or new.captured_at is distinct from old.captured_at)
    or new.refunded_minor < old.refunded_minor or new.applied_minor < old.applied_minor then
    raise exception 'payment % does not go from % to %', old.id, old.status, new.status using errcode = '23514';
  end if;
  return new;
end
$$;


create or replace function private.save_payment_method(request jsonb, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  via public.payment_gateway := private.read_choice(request, 'gateway', array['razorpay', 'stripe'])::public.payment_gateway;
  kind public.payment_method_type :=
    private.read_choice(request, 'type', array['card', 'upi', 'bank_transfer', 'razorpay', 'stripe'])::public.payment_method_type;
  token text := private.read_token(request, 'payment_method_id');
  customer text := case when request ->> 'customer_id' is not null then private.read_token(request, 'customer_id') end;
  owner uuid := private.read_uuid(request, 'organization_id');
  method public.payment_methods;
begin
  -- The organization's row is what decides between two that become the default at once.
  perform from public.organizations as organization where organization.id = owner for no key update;
  if not found then
    perform private.raise_error(404, 'organization_not_found', 'There is no such organization', 'organization_id');
  end if;
  if coalesce(request ->> 'last4', '0000') !~ '^[0-9]{4}$' then
    perform private.raise_error(422, 'invalid_last4', 'last4 must be the last four digits', 'last4');
  end if;
  select known.* into method
  from public.payment_methods as known
  where known.gateway = via and known.gateway_payment_method_id = token;
  if found and method.organization_id <> owner then
    perform private.raise_error(409, 'payment_method_in_use', 'The payment method belongs to somebody else', 'payment_method_id');
  end if;

  if coalesce((request ->> 'is_default')::boolean, false) or not exists (
    select
    from public.payment_methods as other
    where other.organization_id = owner and other.is_default and other.id is distinct from method.id
  ) then
    update public.payment_methods as other
    set is_default = false
    where other.organization_id = owner and other.is_default and other.id is distinct from method.id;
    method.is_default := true;
  end if;
  insert into public.payment_methods as known (
    organization_id, type, gateway, gateway_customer_id, gateway_payment_method_id, last4, brand, expiry_month, expiry_year, is_default,
    created_at, updated_at
  )
  values (
    owner, kind, via, customer, token, request ->> 'last4', request ->> 'brand', (request ->> 'expiry_month')::integer,
    (request ->> 'expiry_year')::integer, coalesce(method.is_default, false), at, at
  )
  on conflict on constraint payment_methods_token_key do update
  set
    -- What it is by name says more than that it is the gateway's, whichever is told first.
    type = case when excluded.type in ('razorpay', 'stripe') then known.type else excluded.type end,
    gateway_customer_id = coalesce(excluded.gateway_customer_id, known.gateway_customer_id),
    last4 = coalesce(excluded.last4, known.last4),
    brand = coalesce(excluded.brand, known.brand),
    expiry_month = coalesce(excluded.expiry_month, known.expiry_month),
    expiry_year = coalesce(excluded.expiry_year, known.expiry_year),
    is_default = excluded.is_default,
    removed_at = null
  where known.organization_id = excluded.organization_id
  returning known.* into method;
  if method.id is null then
    perform private.raise_error(409, 'payment_method_in_use', 'The payment method belongs to somebody else', 'payment_method_id');
  end if;
  perform private.audit(
    owner, 'payment_method.saved', 'payment_method', method.id, jsonb_build_object('type', kind, 'is_default', method.is_default), at
  );
  return jsonb_build_object('id', method.id, 'is_default', method.is_default);
end
$$;


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


-- What webhook-intake calls when somebody sends leads: one request, one transaction, an outcome for each lead.


-- Phone numbers -------------------------------------------------------------------------------------------------------------------

create function private.to_e164(written text, country text) returns text
language plpgsql immutable parallel safe set search_path = '' as $$
declare
  -- Country: calling code, trunk prefix, shortest and longest national number. Where a country is not here, numbers come with their +.
  plans  constant jsonb := '{
    "IN":["91","0",10,10],"US":["1","1",10,10],"CA":["1","1",10,10],"GB":["44","0",9,10],"IE":["353","0",7,9],"AU":["61","0",9,9],
    "NZ":["64","0",8,10],"SG":["65","",8,8],"MY":["60","0",8,10],"ID":["62","0",8,12],"PH":["63","0",8,10],"TH":["66","0",8,9],
    "VN":["84","0",9,10],"HK":["852","",8,8],"CN":["86","0",10,11],"JP":["81","0",9,10],"KR":["82","0",8,10],"TW":["886","0",8,9],
    "BD":["880","0",8,10],"PK":["92","0",9,10],"LK":["94","0",9,9],"NP":["977","0",8,10],"AE":["971","0",8,9],"SA":["966","0",8,9],
    "QA":["974","",8,8],"KW":["965","",8,8],"BH":["973","",8,8],"OM":["968","",8,8],"IL":["972","0",8,9],"TR":["90","0",10,10],
    "EG":["20","0",8,10],"ZA":["27","0",9,9],"NG":["234","0",8,10],"KE":["254","0",9,9],"GH":["233","0",9,9],"TZ":["255","0",9,9],
    "UG":["256","0",9,9],"DE":["49","0",7,11],"FR":["33","0",9,9],"ES":["34","",9,9],"PT":["351","",9,9],"NL":["31","0",9,9],
    "BE":["32","0",8,9],"LU":["352","",6,11],"AT":["43","0",7,13],"CH":["41","0",9,9],"DK":["45","",8,8],"NO":["47","",8,8],
    "SE":["46","0",7,10],"FI":["358","0",6,11],"PL":["48","",9,9],"CZ":["420","",9,9],"GR":["30","",10,10],"RO":["40","0",9,9],
    "HU":["36","06",8,9],"BR":["55","0",10,11],"MX":["52","",10,10],"AR":["54","0",10,11],"CL":["56","",9,9],"CO":["57","",8,10],
    "PE":["51","0",8,9]
  }'::jsonb;
  plan   constant jsonb := plans -> upper(country);
  code   constant text := plan ->> 0;
  trunk  constant text := plan ->> 1;
  digits text := regexp_replace(written, '[^0-9]', '', 'g');
  inner_ text;
begin
  if written is null or written !~ '^\s*\+?[0-9 ().\-/\u00a0]+\s*$' or length(written) > 40 then
    return null;
  end if;
  if written ~ '^\s*(\+|00)' then
    digits := regexp_replace(digits, '^00', '');
    return case when digits ~ '^[1-9][0-9]{6,14}$' then '+' || digits end;
  end if;
  if plan is null then
    return null;
  end if;
  inner_ := case when trunk <> '' and digits like trunk || '%' then substr(digits, length(trunk) + 1) else digits end;
  if length(inner_) between (plan ->> 2)::integer and (plan ->> 3)::integer and inner_ !~ '^0' then
    return '+' || code || inner_;
  end if;
  inner_ := substr(digits, length(code) + 1);
  if digits like code || '%' and length(inner_) between (plan ->> 2)::integer and (plan ->> 3)::integer and inner_ !~ '^0' then
    return '+' || digits;
  end if;
  return null;
end
$$;
comment on function private.to_e164(text, text) is
  'A number as a person writes it, in E.164: with + or 00 it says its country, else it is one of the country given. Null when it is neither.';


-- Limits --------------------------------------------------------------------------------------------------------------------------

create function private.take_tokens(subject text, cost integer, per_minute integer, burst integer) returns void
language plpgsql volatile security definer set search_path = '' as $$
declare
  moment constant timestamptz := clock_timestamp();
  left_  numeric;
  wait   integer;
begin
  insert into private.rate_limits as bucket (subject, tokens, refilled_at)
  values (take_tokens.subject, burst - cost, moment)
  on conflict on constraint rate_limits_pkey do update
  set
    tokens = least(
      burst, bucket.tokens + greatest(extract(epoch from excluded.refilled_at - bucket.refilled_at), 0) * per_minute / 60.0
    ) - cost,
    refilled_at = greatest(bucket.refilled_at, excluded.refilled_at)
  returning bucket.tokens into left_;
  if left_ >= 0 then
    return;
  end if;
  -- The refusal undoes the withdrawal: whoever is told to wait has not used up what they wait for.
  wait := greatest(ceil(-left_ * 60.0 / per_minute), 1);
  raise sqlstate 'PGRST' using
    message = json_build_object(
      'code', 'rate_limited',
      'message', format('Too many at once; the next are taken in %s seconds', wait),
      'details', json_build_object('retry_after', wait)::text,
      'hint', null
    )::text,
    detail = json_build_object('status', 429, 'headers', json_build_object('Retry-After', wait::text))::text;
end
$$;
comment on function private.take_tokens(text, integer, integer, integer) is
  'Takes from a sender''s bucket, which refills by the minute; empty, the request ends with 429 and says when to come again.';


-- ingest_leads --------------------------------------------------------------------------------------------------------------------

create function private.first_stage(organization uuid, project uuid) returns uuid
language sql stable security definer set search_path = '' as $$
  select stage.id
  from public.pipelines as pipeline
  join public.pipeline_stages as stage on stage.organization_id = pipeline.organization_id and stage.pipeline_id = pipeline.id
  where pipeline.organization_id = organization
    and pipeline.is_default
    and (stage.project_id is null or stage.project_id = project)
  order by stage.order_index, stage.id
  limit 1
$$;
comment on function private.first_stage(uuid, uuid) is 'Where a lead of a project begins in its organization''s default pipeline.';

create function private.read_lead(item jsonb, form public.lead_forms, country text) returns jsonb
language plpgsql stable security definer set search_path = '' as $$
declare
  lead    jsonb := '{}'::jsonb;
  missing text;
  field   text;
begin
  if jsonb_typeof(item) <> 'object' then
    return jsonb_build_object('code', 'invalid_lead', 'message', 'A lead is an object');
  end if;
  if form.id is not null then
    select asked.value ->> 'name' into missing
    from jsonb_array_elements(form.fields) with ordinality as asked (value, place)
    where asked.value -> 'required' = 'true' and coalesce(btrim(item ->> (asked.value ->> 'name')), '') = ''
    order by asked.place
    limit 1;
    if missing is not null then
      return jsonb_build_object('code', 'missing_field', 'field', missing, 'message', format('%s is required', missing));
    end if;
    lead := jsonb_build_object('project_id', form.project_id, 'raw_data', (
      select coalesce(jsonb_object_agg(asked.name, left(item ->> asked.name, 2000)), '{}')
      from (
        select distinct entry.value ->> 'name' as name from jsonb_array_elements(form.fields) as entry (value)
      ) as asked
      where asked.name not in ('name', 'phone', 'email') and item ->> asked.name is not null
    ));
  else
    if item ->> 'project_id' is not null and private.to_uuid(item ->> 'project_id') is null then
      return jsonb_build_object('code', 'unknown_project', 'field', 'project_id', 'message', 'There is no such project');
    end if;
    if item ->> 'timezone' is not null and not exists (select from private.timezones as zone where zone.name = item ->> 'timezone') then
      return jsonb_build_object('code', 'invalid_timezone', 'field', 'timezone', 'message', 'This is not a time zone');
    end if;
    if jsonb_typeof(coalesce(item -> 'fields', '{}')) <> 'object' or length((item -> 'fields')::text) > 16384 then
      return jsonb_build_object('code', 'invalid_fields', 'field', 'fields', 'message', 'fields is an object of at most 16 KiB');
    end if;
    lead := jsonb_build_object(
      'project_id', item ->> 'project_id', 'timezone', item ->> 'timezone', 'notes', left(item ->> 'notes', 10000),
      'external_lead_id', left(item ->> 'external_lead_id', 255), 'lead_source', left(item ->> 'source', 100),
      'raw_data', item -> 'fields'
    );
    if coalesce(jsonb_typeof(item -> 'consents'), 'null') not in ('array', 'null') then
      return jsonb_build_object('code', 'invalid_consent', 'field', 'consents', 'message', 'consents is an array');
    end if;
    if exists (
      select
      from jsonb_array_elements(coalesce(nullif(item -> 'consents', 'null'), '[]')) as given (value)
      where coalesce(given.value ->> 'scope', '') not in ('call_service', 'call_promotional', 'recording', 'sms', 'whatsapp')
        or coalesce(btrim(given.value ->> 'text'), '') = ''
        or given.value ->> 'source' is not null
          and given.value ->> 'source' not in ('form', 'call', 'import', 'written', 'message', 'in_person')
        or given.value ->> 'granted_at' is not null and private.parse_instant(given.value ->> 'granted_at') is null
        or coalesce(jsonb_typeof(given.value -> 'proof'), 'null') not in ('object', 'null')
    ) then
      return jsonb_build_object(
        'code', 'invalid_consent', 'field', 'consents', 'message', 'A consent has a known scope and the text that was agreed to'
      );
    end if;
  end if;

  foreach field in array array['name', 'phone', 'email'] loop
    if coalesce(jsonb_typeof(item -> field), 'null') not in ('string', 'number', 'null') then
      return jsonb_build_object('code', 'invalid_lead', 'field', field, 'message', format('%s must be a text', field));
    end if;
  end loop;
  lead := lead || jsonb_build_object(
    'phone', private.to_e164(item ->> 'phone', coalesce(nullif(item ->> 'country', ''), country)),
    'email', private.plain_email(item ->> 'email'),
    'name', left(btrim(regexp_replace(item ->> 'name', '\s+', ' ', 'g')), 200)
  );
  if lead ->> 'phone' is null then
    return jsonb_build_object(
      'code', 'invalid_phone', 'field', 'phone', 'message', 'A phone number with its country code, or one of the country, is required'
    );
  end if;
  if coalesce(btrim(item ->> 'email'), '') <> '' and lead ->> 'email' is null then
    return jsonb_build_object('code', 'invalid_email', 'field', 'email', 'message', 'This is not an e-mail address');
  end if;
  if coalesce(lead ->> 'name', '') = '' then
    lead := lead || jsonb_build_object('name', lead ->> 'phone', 'unnamed', true);
  end if;
  return lead;
end
$$;
comment on function private.read_lead(jsonb, public.lead_forms, text) is
  'What a lead says, in our words, or {"code","field","message"}: what is wrong with it concerns that lead alone.';

create function private.write_lead(
  organization uuid, lead jsonb, form public.lead_forms, at timestamptz, out lead_id uuid, out is_new boolean
)
language plpgsql volatile security definer set search_path = '' as $$
declare
  project constant uuid := (lead ->> 'project_id')::uuid;
begin
  -- Without a project no constraint tells two of a number apart; the caller holds the lock under which one may look.
  if project is null then
    select known.id into lead_id
    from public.leads as known
    where known.organization_id = organization and known.project_id is null and known.phone = lead ->> 'phone'
    order by known.archived_at is not null, known.created_at, known.id
    limit 1
    for no key update;
  end if;
  is_new := false;
  if lead_id is null then
    insert into public.leads as known (
      organization_id, project_id, stage_id, name, email, phone, timezone, source, lead_source, external_lead_id, raw_data, notes,
      recording_consent, created_by, created_at, updated_at
    )
    values (
      organization, project, coalesce(form.stage_id, private.first_stage(organization, project)), lead ->> 'name', lead ->> 'email',
      lead ->> 'phone', lead ->> 'timezone', case when form.id is null then 'api' else 'form' end,
      coalesce(lead ->> 'lead_source', form.name), lead ->> 'external_lead_id', nullif(lead -> 'raw_data', 'null'), lead ->> 'notes',
      private.has_consent(organization, lead ->> 'phone', 'recording', at), null, at, at
    )
    on conflict (organization_id, project_id, phone) do nothing
    returning known.id into lead_id;
    is_new := lead_id is not null;
  end if;
  if is_new then
    return;
  end if;
  -- A stranger's form adds what was not known; the organization's own system corrects what was.
  update public.leads as known
  set
    name = case when form.id is null and lead -> 'unnamed' is null then lead ->> 'name' else known.name end,
    email = case when form.id is null then coalesce(lead ->> 'email', known.email) else coalesce(known.email, lead ->> 'email') end,
    timezone = coalesce(lead ->> 'timezone', known.timezone),
    lead_source = coalesce(known.lead_source, lead ->> 'lead_source'),
    external_lead_id = coalesce(lead ->> 'external_lead_id', known.external_lead_id),
    notes = coalesce(lead ->> 'notes', known.notes),
    raw_data = case
      when form.id is null then coalesce(known.raw_data, '{}') || coalesce(nullif(lead -> 'raw_data', 'null'), '{}')
      else coalesce(nullif(lead -> 'raw_data', 'null'), '{}') || coalesce(known.raw_data, '{}')
    end
  where known.organization_id = organization
    and known.phone = lead ->> 'phone'
    and (known.id = lead_id or lead_id is null and known.project_id = project)
  returning known.id into lead_id;
end
$$;
comment on function private.write_lead(uuid, jsonb, public.lead_forms, timestamptz) is
  'One lead a number and project of an organization: made, or told what is new. Stage, status and who must not be called stay.';

create function private.ingest_leads(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  given        constant jsonb := request -> 'leads';
  request_key  constant text := request ->> 'idempotency_key';
  key          public.api_keys;
  form         public.lead_forms;
  organization public.organizations;
  sender       text;
  earlier      private.lead_requests;
  reply        jsonb;
  results      jsonb := '{}'::jsonb;
  item         record;
  written      record;
  consent      record;
begin
  if request ->> 'form_id' is not null then
    select known.* into form from public.lead_forms as known where known.id = private.to_uuid(request ->> 'form_id') and known.is_active;
    if form.id is null then
      perform private.raise_error(404, 'form_not_found', 'There is no such form', 'form_id');
    end if;
    sender := 'form ' || form.id;
  else
    select known.* into key
    from public.api_keys as known
    where known.prefix = request #>> '{api_key,prefix}'
      and encode(known.sha256, 'hex') = lower(request #>> '{api_key,sha256}')
      and known.revoked_at is null;
    if key.id is null then
      perform private.raise_error(401, 'invalid_api_key', 'The API key is unknown or revoked');
    end if;
    if not 'lead.write' = any (key.scopes) then
      perform private.raise_error(403, 'missing_scope', 'The API key lacks the scope lead.write');
    end if;
    sender := 'key ' || key.prefix;
  end if;
  if given is null or jsonb_typeof(given) <> 'array' or jsonb_array_length(given) = 0 then
    perform private.raise_error(400, 'invalid_request', 'leads must be an array of at least one lead', 'leads');
  end if;
  if jsonb_array_length(given) > (case when form.id is null then 500 else 1 end) then
    perform private.raise_error(413, 'too_many_leads', 'At most 500 leads are taken at once, and one by a form', 'leads');
  end if;
  if request_key is not null and length(request_key) not between 1 and 255 then
    perform private.raise_error(400, 'invalid_request', 'An idempotency key has 1 to 255 characters', 'idempotency-key');
  end if;
  select tenant.* into organization
  from public.organizations as tenant
  where tenant.id = coalesce(form.organization_id, key.organization_id);

  perform private.take_tokens(
    'leads ' || sender, jsonb_array_length(given), coalesce(form.rate_per_minute, 600), coalesce(form.rate_per_minute, 1000)
  );

  if request_key is not null then
    insert into private.lead_requests (organization_id, subject, key, body_sha256, created_at)
    values (organization.id, sender, request_key, coalesce(request ->> 'body_sha256', ''), at)
    on conflict on constraint lead_requests_pkey do nothing;
    if not found then
      select known.* into earlier
      from private.lead_requests as known
      where known.organization_id = organization.id and known.subject = sender and known.key = request_key;
      if earlier.body_sha256 <> coalesce(request ->> 'body_sha256', '') then
        perform private.raise_error(409, 'idempotency_conflict', 'Another request came with this key', 'idempotency-key');
      end if;
      return earlier.answer || jsonb_build_object('replayed', true);
    end if;
    delete from private.lead_requests as old
    where old.ctid in (
      select stale.ctid from private.lead_requests as stale where stale.created_at < at - interval '7 days'
      order by stale.created_at limit 100 for update skip locked
    );
  end if;

  -- One at a time for leads without a project, and in order of number with one: two batches never wait for each other in a circle.
  perform pg_advisory_xact_lock(hashtextextended('trunkline.ingest_leads' || organization.id, 0));
  for item in
    select judged.place, judged.value, judged.lead
    from (
      select
        entry.place, entry.value, private.read_lead(entry.value, form, coalesce(organization.country_code, 'IN')) as lead
      from jsonb_array_elements(given) with ordinality as entry (value, place)
    ) as judged
    order by judged.lead ->> 'phone', judged.place
  loop
    if item.lead ? 'code' then
      results := results || jsonb_build_object(item.place, item.lead || '{"status": "rejected"}');
      continue;
    end if;
    if item.lead ->> 'project_id' is not null and not exists (
      select
      from public.projects as project
      where project.organization_id = organization.id and project.id = (item.lead ->> 'project_id')::uuid
    ) then
      results := results || jsonb_build_object(
        item.place,
        jsonb_build_object(
          'status', 'rejected', 'code', 'unknown_project', 'field', 'project_id', 'message', 'There is no such project'
        )
      );
      continue;
    end if;
    select * into written from private.write_lead(organization.id, item.lead, form, at);
    insert into public.lead_activities (organization_id, lead_id, type, content, created_by, created_at)
    values (
      organization.id, written.lead_id, case when written.is_new then 'lead_created' else 'lead_received_again' end,
      jsonb_strip_nulls(jsonb_build_object('form_id', form.id, 'api_key', key.prefix)), null, at
    );

    for consent in
      select given_.scope, given_.words, given_.source, given_.proof, least(coalesce(given_.granted_at, at), at) as granted_at
      from (
        select scope.name as scope, form.consent_text as words, 'form' as source, '{}'::jsonb as proof, null::timestamptz as granted_at
        from unnest(form.consent_scopes) as scope (name)
        where coalesce(btrim(form.consent_text), '') <> ''
        union all
        select
          said.value ->> 'scope', left(said.value ->> 'text', 5000), coalesce(said.value ->> 'source', 'import'),
          coalesce(nullif(said.value -> 'proof', 'null'), '{}'), private.to_business(private.parse_instant(said.value ->> 'granted_at'))
        from jsonb_array_elements(
          case when form.id is null then coalesce(nullif(item.value -> 'consents', 'null'), '[]') else '[]' end
        ) as said (value)
      ) as given_
      where not exists (
        select
        from public.consents as known
        where known.organization_id = organization.id
          and known.phone_number = item.lead ->> 'phone'
          and known.scope = given_.scope
          and known.consent_text = given_.words
          and known.revoked_at is null
          and (known.expires_at is null or known.expires_at > at)
      )
    loop
      insert into public.consents (
        organization_id, lead_id, phone_number, scope, consent_text, source, proof, granted_at, created_by, created_at
      )
      values (
        organization.id, written.lead_id, item.lead ->> 'phone', consent.scope, consent.words, consent.source,
        consent.proof || jsonb_strip_nulls(jsonb_build_object('form_id', form.id, 'api_key', key.prefix, 'received_at', at)),
        consent.granted_at, null, at
      );
    end loop;

    if written.is_new then
      perform private.emit(
        organization.id, 'lead.created', written.lead_id::text,
        jsonb_strip_nulls(jsonb_build_object(
          'lead_id', written.lead_id, 'project_id', item.lead ->> 'project_id', 'form_id', form.id
        )), at
      );
    end if;
    results := results || jsonb_build_object(
      item.place, jsonb_build_object('status', case when written.is_new then 'created' else 'updated' end, 'id', written.lead_id)
    );
  end loop;

  reply := jsonb_build_object(
    'organization_id', organization.id,
    'results', (
      select jsonb_agg(jsonb_build_object('index', outcome.key::integer - 1) || outcome.value order by outcome.key::integer)
      from jsonb_each(results) as outcome
    )
  );
  if request_key is not null then
    update private.lead_requests as mine
    set answer = reply
    where mine.organization_id = organization.id and mine.subject = sender and mine.key = request_key;
  end if;
  return reply;
end
$$;
comment on function private.ingest_leads(jsonb, timestamptz) is
  'Takes leads from an organization''s own system, or one from its form: into its projects, at the first stage of its pipeline.';

create function public.ingest_leads(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.ingest_leads($1, private.clock_now())
$$;
comment on function public.ingest_leads(jsonb) is
  'For webhook-intake. {"v":1,"api_key":{"prefix","sha256"} or "form_id","leads":[{"name","phone","email","project_id","country","timezone",'
  '"source","external_lead_id","notes","fields":{},"consents":[{"scope","text","source"?,"granted_at"?,"proof"?}]}],"idempotency_key"?,'
  '"body_sha256"?} -> {"organization_id","results":[{"index","status":"created|updated|rejected","id"?,"code"?,"field"?,"message"?}],'
  '"replayed"?}; 429 with Retry-After for too many.';


revoke execute on function
  private.to_e164(text, text), private.take_tokens(text, integer, integer, integer), private.first_stage(uuid, uuid),
  private.read_lead(jsonb, public.lead_forms, text), private.write_lead(uuid, jsonb, public.lead_forms, timestamptz),
  private.ingest_leads(jsonb, timestamptz), public.ingest_leads(jsonb)
from public, anon, authenticated, service_role;
grant execute on function private.ingest_leads(jsonb, timestamptz), public.ingest_leads(jsonb) to service_role;
