-- What an organization sells or lets itself: properties, their reservations, images and features.
--
-- price -> price_minor, in the minor unit of currency_code.
-- Whoever changes several of these rows locks the property first.


-- properties ----------------------------------------------------------------------------------------------------------------------

create table public.properties (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null default public.get_auth_org_id() references public.organizations (id) on delete cascade,
  project_id      uuid,
  title           text not null check (length(btrim(title)) between 1 and 500),
  description     text,
  address         text,
  price_minor     bigint not null check (price_minor >= 0),
  currency_code   text not null check (currency_code ~ '^[A-Z]{3}$'),
  size_sqft       integer check (size_sqft > 0),
  bedrooms        smallint check (bedrooms >= 0),
  bathrooms       smallint check (bathrooms >= 0),
  type            text not null check (type in ('apartment', 'villa', 'plot', 'commercial')),
  status          text not null default 'available' check (status in ('available', 'reserved', 'sold', 'rented')),
  archived_at     timestamptz,
  created_by      uuid default private.acting_user_id(),
  created_at      timestamptz not null default private.clock_now(),
  updated_at      timestamptz not null default private.clock_now(),
  tower           text check (length(btrim(tower)) between 1 and 100),
  floor_number    smallint,
  unit_number     text check (length(btrim(unit_number)) between 1 and 50),
  unique (organization_id, id),
  foreign key (organization_id, project_id) references public.projects (organization_id, id) on delete set null (project_id),
  foreign key (organization_id, created_by) references public.profiles (organization_id, id) on delete set null (created_by)
);
create index idx_properties_organization_id on public.properties (organization_id, created_at desc);
create index idx_properties_status on public.properties (organization_id, status, type);
create index idx_properties_project on public.properties (organization_id, project_id);
-- A flat of a development is there once.
create unique index idx_properties_unit on public.properties (organization_id, project_id, tower, unit_number) nulls not distinct
  where unit_number is not null and archived_at is null;
create index idx_properties_created_by on public.properties (organization_id, created_by);

revoke all on public.properties from anon, authenticated, service_role;
grant select, delete on public.properties to authenticated;
grant
  insert (
    id, project_id, title, description, address, price_minor, currency_code, size_sqft, bedrooms, bathrooms, type,
    tower, floor_number, unit_number
  ),
  update (
    project_id, title, description, address, price_minor, currency_code, size_sqft, bedrooms, bathrooms, type, archived_at,
    tower, floor_number, unit_number
  )
on public.properties to authenticated;
grant select on public.properties to service_role;
alter table public.properties enable row level security;
alter table public.properties force row level security;
create policy "Who views properties may see them" on public.properties
  for select to authenticated using (organization_id = (select private.org_with('property.view')));
create policy "Who edits properties may add one" on public.properties
  for insert to authenticated with check (organization_id = (select private.org_with('property.edit')));
create policy "Who edits properties may change one" on public.properties
  for update to authenticated
  using (organization_id = (select private.org_with('property.edit')))
  with check (organization_id = (select private.org_with('property.edit')));
create policy "Who edits properties may delete one that is free" on public.properties
  for delete to authenticated using (organization_id = (select private.org_with('property.edit')) and status = 'available');

create function private.fill_organization_currency() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  new.currency_code := (select organization.currency from public.organizations as organization where organization.id = new.organization_id);
  return new;
end
$$;
comment on function private.fill_organization_currency() is 'Trigger: an amount that names no currency is in its organization''s.';
create trigger fill_organization_currency before insert on public.properties
  for each row when (new.currency_code is null) execute function private.fill_organization_currency();
create trigger update_modified_column before update on public.properties
  for each row execute function private.update_modified_column();
comment on table public.properties is
  'A flat, a house, a plot. Users describe it; its status moves by reserve_property() and set_property_status() alone. Archived once it had a reservation.';
comment on column public.properties.price_minor is 'In the minor unit of currency_code.';
comment on column public.properties.currency_code is 'ISO 4217, upper case; the organization''s when not given.';
comment on column public.properties.tower is 'The building of the project that it is in, where there are several.';
comment on column public.properties.unit_number is 'What the door says; once a project and tower, of those that are not archived.';
comment on column public.properties.status is 'reserved exactly while a row of property_reservations holds it.';


-- property_reservations -----------------------------------------------------------------------------------------------------------

create table public.property_reservations (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null,
  property_id     uuid not null,
  lead_id         uuid,
  status          text not null default 'held' check (status in ('held', 'released', 'expired', 'sold', 'rented')),
  reserved_by     uuid,
  held_until      timestamptz,
  created_at      timestamptz not null default private.clock_now(),
  ended_at        timestamptz,
  updated_at      timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  foreign key (organization_id, property_id) references public.properties (organization_id, id) on delete restrict,
  foreign key (organization_id, lead_id) references public.leads (organization_id, id) on delete set null (lead_id),
  foreign key (organization_id, reserved_by) references public.profiles (organization_id, id) on delete set null (reserved_by),
  check ((status = 'held') = (ended_at is null)),
  check (held_until > created_at)
);
-- Of two who reserve at once one wins, whatever code they come by.
create unique index idx_property_reservations_held on public.property_reservations (organization_id, property_id) where status = 'held';
create index idx_property_reservations_property on public.property_reservations (organization_id, property_id, created_at desc);
create index idx_property_reservations_lead on public.property_reservations (organization_id, lead_id);
create index idx_property_reservations_reserved_by on public.property_reservations (organization_id, reserved_by);
create index idx_property_reservations_due on public.property_reservations (held_until) where status = 'held';

revoke all on public.property_reservations from anon, authenticated, service_role;
grant select on public.property_reservations to authenticated, service_role;
alter table public.property_reservations enable row level security;
alter table public.property_reservations force row level security;
create policy "Who views properties may see their reservations" on public.property_reservations
  for select to authenticated using (organization_id = (select private.org_with('property.view')));
create trigger update_modified_column before update on public.property_reservations
  for each row execute function private.update_modified_column();
comment on table public.property_reservations is
  'Who held a property, for whom, until when, and what came of it. At most one holds it. Written by functions alone.';
comment on column public.property_reservations.held_until is 'Business time at which the hold ends by itself; null: when somebody ends it.';


-- property_images -----------------------------------------------------------------------------------------------------------------

create table public.property_images (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null default public.get_auth_org_id(),
  property_id     uuid not null,
  url             text not null check (url ~ '^https?://'),
  is_featured     boolean not null default false,
  order_index     integer not null default 0 check (order_index >= 0),
  position        integer generated always as (order_index) stored,
  created_at      timestamptz not null default private.clock_now(),
  updated_at      timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  foreign key (organization_id, property_id) references public.properties (organization_id, id) on delete cascade
);
create index idx_property_images_property on public.property_images (organization_id, property_id, order_index);
create unique index idx_property_images_featured on public.property_images (organization_id, property_id) where is_featured;

revoke all on public.property_images from anon, authenticated, service_role;
grant select, delete on public.property_images to authenticated;
grant insert (property_id, url, is_featured, order_index), update (url, is_featured, order_index)
on public.property_images to authenticated;
grant select on public.property_images to service_role;
alter table public.property_images enable row level security;
alter table public.property_images force row level security;
create policy "Who views properties may see their images" on public.property_images
  for select to authenticated using (organization_id = (select private.org_with('property.view')));
create policy "Who edits properties may add an image" on public.property_images
  for insert to authenticated with check (organization_id = (select private.org_with('property.edit')));
create policy "Who edits properties may change an image" on public.property_images
  for update to authenticated
  using (organization_id = (select private.org_with('property.edit')))
  with check (organization_id = (select private.org_with('property.edit')));
create policy "Who edits properties may delete an image" on public.property_images
  for delete to authenticated using (organization_id = (select private.org_with('property.edit')));

create function private.keep_one_featured_image() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  -- The property's row makes two choices at once into one after the other; the later one stands.
  perform from public.properties as property
  where property.organization_id = new.organization_id and property.id = new.property_id
  for no key update;
  update public.property_images as other
  set is_featured = false
  where other.organization_id = new.organization_id
    and other.property_id = new.property_id
    and other.id <> new.id
    and other.is_featured;
  return new;
end
$$;
comment on function private.keep_one_featured_image() is 'Trigger: an image that is featured takes that from the property''s other one.';
create trigger keep_one_featured_image before insert or update of is_featured on public.property_images
  for each row when (new.is_featured) execute function private.keep_one_featured_image();
create trigger update_modified_column before update on public.property_images
  for each row execute function private.update_modified_column();
comment on table public.property_images is 'Pictures of a property, in order; at most one stands for it.';
comment on column public.property_images.position is 'The same as order_index, under the name that other tables use.';


-- property_features ---------------------------------------------------------------------------------------------------------------

create table public.property_features (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null default public.get_auth_org_id(),
  property_id     uuid not null,
  feature_name    text not null check (length(btrim(feature_name)) between 1 and 200),
  created_at      timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  unique (organization_id, property_id, feature_name),
  foreign key (organization_id, property_id) references public.properties (organization_id, id) on delete cascade
);

revoke all on public.property_features from anon, authenticated, service_role;
grant select, delete on public.property_features to authenticated;
grant insert (property_id, feature_name) on public.property_features to authenticated;
grant select on public.property_features to service_role;
alter table public.property_features enable row level security;
alter table public.property_features force row level security;
create policy "Who views properties may see their features" on public.property_features
  for select to authenticated using (organization_id = (select private.org_with('property.view')));
create policy "Who edits properties may add a feature" on public.property_features
  for insert to authenticated with check (organization_id = (select private.org_with('property.edit')));
create policy "Who edits properties may delete a feature" on public.property_features
  for delete to authenticated using (organization_id = (select private.org_with('property.edit')));
comment on table public.property_features is 'What a property has: a lift, a pool, parking. Each once.';


-- What users do with them ---------------------------------------------------------------------------------------------------------

create function private.end_reservation(property public.properties, outcome text, at timestamptz) returns void
language plpgsql volatile security definer set search_path = '' as $$
begin
  update public.property_reservations as hold
  set status = outcome, ended_at = greatest(at, hold.created_at)
  where hold.organization_id = property.organization_id and hold.property_id = property.id and hold.status = 'held';
end
$$;
comment on function private.end_reservation(public.properties, text, timestamptz) is
  'Ends the hold on a property, if there is one; whoever calls has locked the property and sets its status.';

create function private.lock_property(organization uuid, property_id uuid, at timestamptz) returns public.properties
language plpgsql volatile security definer set search_path = '' as $$
declare
  property public.properties;
begin
  select asked.* into property
  from public.properties as asked
  where asked.organization_id = organization and asked.id = lock_property.property_id
  for no key update;
  if property.id is null then
    perform private.raise_error(404, 'property_not_found', 'There is no such property', 'property_id');
  end if;
  if property.status = 'reserved' and exists (
    select
    from public.property_reservations as hold
    where hold.organization_id = organization and hold.property_id = property.id and hold.status = 'held' and hold.held_until <= at
  ) then
    perform private.end_reservation(property, 'expired', at);
    update public.properties as freed set status = 'available' where freed.id = property.id returning freed.* into property;
  end if;
  return property;
end
$$;
comment on function private.lock_property(uuid, uuid, timestamptz) is
  'A property of an organization, locked, and free again if the hold on it has run out; 404 if there is none.';

create function private.reserve_property(property_id uuid, lead_id uuid, held_until timestamptz, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('property.edit');
  property     public.properties;
  hold         public.property_reservations;
begin
  if held_until <= at then
    perform private.raise_error(422, 'invalid_time', 'A reservation ends in the future', 'held_until');
  end if;
  property := private.lock_property(organization, property_id, at);
  if property.status <> 'available' or property.archived_at is not null then
    perform private.raise_error(
      409, 'property_not_available',
      format('The property is %s', case when property.archived_at is not null then 'archived' else property.status end), 'property_id'
    );
  end if;
  if lead_id is not null and not exists (
    select from public.leads as lead where lead.organization_id = organization and lead.id = reserve_property.lead_id
  ) then
    perform private.raise_error(404, 'lead_not_found', 'There is no such lead', 'lead_id');
  end if;
  insert into public.property_reservations (organization_id, property_id, lead_id, reserved_by, held_until, created_at)
  values (organization, property.id, reserve_property.lead_id, private.acting_user_id(), reserve_property.held_until, at)
  returning * into hold;
  update public.properties as reserved set status = 'reserved' where reserved.id = property.id;
  perform private.audit(
    organization, 'property.reserved', 'property', property.id,
    jsonb_build_object('reservation_id', hold.id, 'lead_id', hold.lead_id, 'held_until', hold.held_until), at
  );
  return to_jsonb(hold);
end
$$;
comment on function private.reserve_property(uuid, uuid, timestamptz, timestamptz) is
  'Holds a property: whoever comes second, however soon, is told that it is reserved.';

create function public.reserve_property(property_id uuid, lead_id uuid default null, held_until timestamptz default null) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.reserve_property(property_id, lead_id, held_until, private.clock_now())
$$;
comment on function public.reserve_property(uuid, uuid, timestamptz) is
  'Reserves an available property, for a lead if one is named, and returns the reservation; 409 property_not_available. Needs property.edit.';

create function private.set_property_status(property_id uuid, status text, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('property.edit');
  property     public.properties;
  changed      public.properties;
begin
  property := private.lock_property(organization, property_id, at);
  if status is null or not (property.status, status) in (
    ('reserved', 'available'), ('reserved', 'sold'), ('reserved', 'rented'),
    ('available', 'sold'), ('available', 'rented'),
    ('sold', 'available'), ('rented', 'available')
  ) then
    perform private.raise_error(
      409, 'invalid_transition', format('A property that is %s cannot become %s', property.status, coalesce(status, 'nothing')), 'status'
    );
  end if;
  if property.status = 'reserved' then
    perform private.end_reservation(property, case when status = 'available' then 'released' else status end, at);
  end if;
  update public.properties as moved
  set status = set_property_status.status
  where moved.id = property.id
  returning moved.* into changed;
  perform private.audit(
    organization, 'property.status_changed', 'property', property.id,
    jsonb_build_object('from', property.status, 'to', changed.status), at
  );
  return to_jsonb(changed);
end
$$;
comment on function private.set_property_status(uuid, text, timestamptz) is
  'Moves a property along: reserved to available, sold or rented, available to sold or rented, and either back. The hold ends with it.';

create function public.set_property_status(property_id uuid, status text) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.set_property_status(property_id, status, private.clock_now())
$$;
comment on function public.set_property_status(uuid, text) is
  'Releases, sells, lets or offers a property again, and returns it; 409 invalid_transition. Reserving is reserve_property(). Needs property.edit.';

create function private.order_property_images(property_id uuid, image_ids uuid[], at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('property.edit');
  property     public.properties;
begin
  -- Two drags at once are one after the other: the result is the later one's order, whole.
  property := private.lock_property(organization, property_id, at);
  if exists (
    select
    from unnest(image_ids) as named (id)
    where not exists (
      select
      from public.property_images as image
      where image.organization_id = organization and image.property_id = property.id and image.id = named.id
    )
  ) then
    perform private.raise_error(422, 'unknown_image', 'An image is not one of this property', 'image_ids');
  end if;
  update public.property_images as image
  set order_index = wanted.place
  from (
    select
      present.id,
      (row_number() over (order by named.place nulls last, present.order_index, present.created_at, present.id) - 1)::integer as place
    from public.property_images as present
    left join (
      select listed.id, min(listed.place) as place from unnest(image_ids) with ordinality as listed (id, place) group by listed.id
    ) as named on named.id = present.id
    where present.organization_id = organization and present.property_id = property.id
  ) as wanted
  where image.id = wanted.id and image.order_index <> wanted.place;
  return coalesce(
    (
      select jsonb_agg(jsonb_build_object('id', image.id, 'order_index', image.order_index) order by image.order_index)
      from public.property_images as image
      where image.organization_id = organization and image.property_id = property.id
    ),
    '[]'
  );
end
$$;
comment on function private.order_property_images(uuid, uuid[], timestamptz) is
  'Numbers a property''s images from 0: those named, in their order, then the others as they were.';

create function public.order_property_images(property_id uuid, image_ids uuid[]) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.order_property_images(property_id, image_ids, private.clock_now())
$$;
comment on function public.order_property_images(uuid, uuid[]) is
  'Puts a property''s images in order and returns [{"id","order_index"}]; images not named follow. Needs property.edit.';

create function private.expire_reservations(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  due     record;
  expired integer := 0;
  wanted  integer := least(greatest(coalesce((request ->> 'limit')::integer, 500), 1), 5000);
begin
  for due in
    select property.organization_id, property.id
    from public.property_reservations as hold
    join public.properties as property on property.organization_id = hold.organization_id and property.id = hold.property_id
    where hold.status = 'held' and hold.held_until <= at
    order by property.id
    limit wanted
    for no key update of property skip locked
  loop
    perform private.lock_property(due.organization_id, due.id, at);
    expired := expired + 1;
  end loop;
  return jsonb_build_object('expired', expired, 'more', expired = wanted);
end
$$;
comment on function private.expire_reservations(jsonb, timestamptz) is 'Frees the properties whose hold has run out.';

create function public.expire_reservations(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.expire_reservations($1, private.clock_now())
$$;
comment on function public.expire_reservations(jsonb) is '{"v":1,"limit":500} -> {"expired":n,"more":bool}.';

revoke execute on function
  private.fill_organization_currency(), private.keep_one_featured_image(),
  private.end_reservation(public.properties, text, timestamptz), private.lock_property(uuid, uuid, timestamptz)
from public;
revoke execute on function
  private.reserve_property(uuid, uuid, timestamptz, timestamptz), public.reserve_property(uuid, uuid, timestamptz),
  private.set_property_status(uuid, text, timestamptz), public.set_property_status(uuid, text),
  private.order_property_images(uuid, uuid[], timestamptz), public.order_property_images(uuid, uuid[]),
  private.expire_reservations(jsonb, timestamptz), public.expire_reservations(jsonb)
from public, anon, authenticated, service_role;
grant execute on function
  private.reserve_property(uuid, uuid, timestamptz, timestamptz), public.reserve_property(uuid, uuid, timestamptz),
  private.set_property_status(uuid, text, timestamptz), public.set_property_status(uuid, text),
  private.order_property_images(uuid, uuid[], timestamptz), public.order_property_images(uuid, uuid[])
to authenticated;
grant execute on function private.expire_reservations(jsonb, timestamptz), public.expire_reservations(jsonb) to service_role;
