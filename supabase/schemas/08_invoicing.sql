-- Invoices, their lines and taxes, and what numbers them.
--
-- An invoice is a draft while it is put together, and a fiscal document from the moment it is open: then it has a number, its lines
-- add up to its subtotal and its taxes to its tax, and nothing but its payment changes. The database enforces each of these; no
-- client writes here at all.

-- Who sends the invoices ----------------------------------------------------------------------------------------------------------

create table private.billing_issuer (
  singleton          boolean primary key default true,
  legal_name         text not null,
  gstin              text,
  address_line_1     text,
  address_line_2     text,
  city               text,
  state              text,
  state_code         text,
  pincode            text,
  country_code       text not null,
  email              text,
  timezone           text not null,
  sac_code           text,
  payment_terms_days integer not null default 15,
  constraint billing_issuer_one_row check (singleton),
  constraint billing_issuer_name_present check (btrim(legal_name) <> ''),
  constraint billing_issuer_gstin_format check (gstin ~ '^[0-9]{2}[A-Z0-9]{13}$'),
  constraint billing_issuer_state_code_format check (state_code ~ '^[A-Z0-9]{1,3}$'),
  constraint billing_issuer_country_code_format check (country_code ~ '^[A-Z]{2}$'),
  constraint billing_issuer_terms_range check (payment_terms_days between 0 and 365)
);
select private.close_table('private.billing_issuer');

create trigger check_timezone before insert or update of timezone on private.billing_issuer
  for each row execute function private.check_timezone();

comment on table private.billing_issuer is 'Our own particulars, one row: copied onto every invoice when it is made.';
comment on column private.billing_issuer.state_code is 'The state we supply from, spelled as in organizations.state_code.';
comment on column private.billing_issuer.timezone is 'Decides an invoice''s date and the month in its number.';
comment on column private.billing_issuer.sac_code is 'The service accounting code printed on Indian invoices.';

-- Tax rates -----------------------------------------------------------------------------------------------------------------------

create table public.tax_rates (
  id           uuid primary key default gen_random_uuid(),
  country_code text not null,
  scope        text not null default 'any',
  name         text not null,
  rate_bp      integer not null,
  valid_from   date not null default '2000-01-01',
  valid_to     date,
  position     integer not null default 10,
  created_at   timestamptz not null default private.clock_now(),
  constraint tax_rates_version_key unique (country_code, scope, name, valid_from),
  constraint tax_rates_country_code_format check (country_code ~ '^[A-Z]{2}$'),
  constraint tax_rates_scope_known check (scope in ('any', 'intra_state', 'inter_state')),
  constraint tax_rates_name_present check (btrim(name) <> ''),
  constraint tax_rates_rate_range check (rate_bp between 0 and 10000),
  constraint tax_rates_validity_ordered check (valid_from < valid_to)
);

revoke all on public.tax_rates from anon, authenticated, service_role;
grant select on public.tax_rates to authenticated, service_role;
alter table public.tax_rates enable row level security;
alter table public.tax_rates force row level security;
create policy "Anyone signed in may read the tax rates" on public.tax_rates
  for select to authenticated using (true);

comment on table public.tax_rates is 'Tax by the customer''s country: one row a component. A country without rows is not taxed.';
comment on column public.tax_rates.scope is
  'any; or in a country that taxes by state, intra_state (customer in the issuer''s state) and inter_state.';
comment on column public.tax_rates.rate_bp is 'Hundredths of a percent: 900 is 9 %.';
comment on column public.tax_rates.valid_to is 'The first day on which it no longer holds; null as long as it holds.';

-- Invoices ------------------------------------------------------------------------------------------------------------------------

create table private.invoice_series (
  month       text primary key,
  last_number integer not null default 0,
  constraint invoice_series_month_format check (month ~ '^[0-9]{6}$'),
  constraint invoice_series_number_range check (last_number between 0 and 2199999)
);
select private.close_table('private.invoice_series');

comment on table private.invoice_series is
  'The last invoice number of each month. Its row lock makes numbers gap-free: a rolled back invoice gives its number back.';
comment on column private.invoice_series.month is 'Year and month by the issuer''s time zone: 202601.';

create table public.invoices (
  id                uuid primary key default gen_random_uuid(),
  organization_id   uuid not null references public.organizations (id) on delete restrict,
  subscription_id   uuid,
  kind              text not null default 'period',
  invoice_number    text,
  status            public.invoice_status not null default 'draft',
  currency          text not null,
  period_start      timestamptz not null,
  period_end        timestamptz not null,
  timezone          text not null,
  first_day         date not null,
  last_day          date not null,
  subtotal_minor    bigint not null,
  tax_minor         bigint not null,
  total_minor       bigint not null,
  amount_paid_minor bigint not null default 0,
  issuer            jsonb not null,
  customer          jsonb not null,
  invoice_date      date,
  due_date          date,
  finalized_at      timestamptz,
  paid_at           timestamptz,
  irn               text,
  ack_no            text,
  signed_qr         text,
  metadata          jsonb not null default '{}',
  created_at        timestamptz not null default private.clock_now(),
  updated_at        timestamptz not null default private.clock_now(),
  constraint invoices_tenant_key unique (organization_id, id),
  constraint invoices_number_key unique (invoice_number),
  constraint invoices_period_key unique (subscription_id, kind, period_start),
  constraint invoices_subscription_fkey foreign key (organization_id, subscription_id)
    references public.subscriptions (organization_id, id) on delete restrict,
  constraint invoices_kind_known check (kind in ('period')),
  constraint invoices_number_format check (invoice_number ~ '^IN[A-V]-[0-9]{6}-[0-9]{5}$'),
  constraint invoices_numbered_once_open check ((status = 'draft') = (invoice_number is null)),
  constraint invoices_dated_once_open check (
    status = 'draft' or (invoice_date is not null and due_date is not null and finalized_at is not null)
  ),
  constraint invoices_currency_format check (currency ~ '^[A-Z]{3}$'),
  constraint invoices_period_ordered check (period_start < period_end),
  constraint invoices_days_ordered check (first_day <= last_day),
  constraint invoices_total_adds_up check (total_minor = subtotal_minor + tax_minor),
  constraint invoices_total_not_negative check (total_minor >= 0),
  constraint invoices_paid_range check (amount_paid_minor between 0 and total_minor),
  constraint invoices_paid_in_full check (status <> 'paid' or (amount_paid_minor = total_minor and paid_at is not null)),
  constraint invoices_issuer_object check (jsonb_typeof(issuer) = 'object'),
  constraint invoices_customer_object check (jsonb_typeof(customer) = 'object')
) with (fillfactor = 80);

create index idx_invoices_org_period on public.invoices (organization_id, period_start desc);
create index idx_invoices_subscription on public.invoices (organization_id, subscription_id);
create index idx_invoices_status on public.invoices (status, due_date);

revoke all on public.invoices from anon, authenticated, service_role;
grant select on public.invoices to authenticated, service_role;
alter table public.invoices enable row level security;
alter table public.invoices force row level security;
create policy "Members who may see billing see the invoices" on public.invoices
  for select to authenticated using (organization_id = (select private.org_with('billing.view')) and status <> 'draft');

comment on table public.invoices is
  'One bill. From open on it is a fiscal document: numbered, adding up, and changed by its payment alone.';
comment on column public.invoices.kind is 'period: what one billing period of a subscription cost. A period is billed once.';
comment on column public.invoices.invoice_number is
  'INV-YYYYMM-NNNNN, given when the invoice becomes open; 16 characters at most, as India''s Rule 46 has it.';
comment on column public.invoices.timezone is 'The zone in which the period''s days are read.';
comment on column public.invoices.first_day is 'The first day that is billed, by that zone.';
comment on column public.invoices.last_day is 'The last day that is billed.';
comment on column public.invoices.subtotal_minor is 'Sum of the lines, in the currency''s minor unit.';
comment on column public.invoices.tax_minor is 'Sum of the taxes, each rounded alone.';
comment on column public.invoices.issuer is 'Our particulars as they were.';
comment on column public.invoices.customer is 'The organization''s particulars as they were.';
comment on column public.invoices.irn is 'Invoice reference number of India''s e-invoice portal, when it was registered there.';

create table public.invoice_lines (
  id               uuid primary key default gen_random_uuid(),
  organization_id  uuid not null,
  invoice_id       uuid not null,
  position         integer not null,
  kind             text not null,
  meter_key        text references public.meters (key) on delete restrict,
  description      text not null,
  quantity         bigint not null,
  unit             text not null,
  unit_price_minor bigint not null,
  price_units      bigint not null default 1,
  amount_minor     bigint not null,
  constraint invoice_lines_tenant_key unique (organization_id, id),
  constraint invoice_lines_position_key unique (organization_id, invoice_id, position),
  constraint invoice_lines_invoice_fkey foreign key (organization_id, invoice_id)
    references public.invoices (organization_id, id) on delete restrict,
  constraint invoice_lines_kind_known check (kind in ('base', 'included', 'overage')),
  constraint invoice_lines_description_present check (btrim(description) <> ''),
  constraint invoice_lines_price_units_positive check (price_units > 0)
);

create index idx_invoice_lines_meter on public.invoice_lines (meter_key) where meter_key is not null;

revoke all on public.invoice_lines from anon, authenticated, service_role;
grant select on public.invoice_lines to authenticated, service_role;
alter table public.invoice_lines enable row level security;
alter table public.invoice_lines force row level security;
create policy "Members who may see billing see the invoices' lines" on public.invoice_lines
  for select to authenticated using (organization_id = (select private.org_with('billing.view')));

comment on table public.invoice_lines is
  'What an invoice charges for, line by line; the one place where an amount is rounded, half away from zero.';
comment on column public.invoice_lines.kind is 'base: the plan; included: used within the allowance, amount 0; overage: used beyond it.';
comment on column public.invoice_lines.unit_price_minor is 'The price of `price_units` units, in the minor unit: 600 for 60 seconds.';
comment on column public.invoice_lines.amount_minor is 'quantity × unit_price_minor / price_units, rounded once.';

create table public.invoice_taxes (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null,
  invoice_id      uuid not null,
  position        integer not null,
  name            text not null,
  rate_bp         integer not null,
  taxable_minor   bigint not null,
  amount_minor    bigint not null,
  constraint invoice_taxes_tenant_key unique (organization_id, id),
  constraint invoice_taxes_name_key unique (organization_id, invoice_id, name),
  constraint invoice_taxes_invoice_fkey foreign key (organization_id, invoice_id)
    references public.invoices (organization_id, id) on delete restrict,
  constraint invoice_taxes_rate_range check (rate_bp between 0 and 10000)
);

revoke all on public.invoice_taxes from anon, authenticated, service_role;
grant select on public.invoice_taxes to authenticated, service_role;
alter table public.invoice_taxes enable row level security;
alter table public.invoice_taxes force row level security;
create policy "Members who may see billing see the invoices' taxes" on public.invoice_taxes
  for select to authenticated using (organization_id = (select private.org_with('billing.view')));

comment on table public.invoice_taxes is
  'The taxes of an invoice, one row a component, each rounded once and alone: CGST and SGST may differ from IGST by one paisa.';
comment on column public.invoice_taxes.taxable_minor is 'What the rate was applied to: the subtotal.';

-- Numbers -------------------------------------------------------------------------------------------------------------------------

create function private.invoice_number(month text, number integer) returns text
language sql immutable set search_path = ''
as $$
  select case
    when number between 1 and 99999 then 'INV-' || month || '-' || lpad(number::text, 5, '0')
    -- A sixth digit would break the 16 characters of Rule 46, so the month goes on in further series: INA, INB, to INU.
    when number between 100000 and 2199999 then
      'IN' || chr(64 + number / 100000) || '-' || month || '-' || lpad((number % 100000)::text, 5, '0')
  end
$$;
comment on function private.invoice_number(text, integer) is
  'The text of a month''s n-th number: INV-202601-00001 to INV-202601-99999, then INA-202601-00000 and on; null when the month is full.';

create function private.take_invoice_numbers(month text, wanted integer) returns integer
language sql set search_path = ''
as $$
  insert into private.invoice_series as series (month, last_number)
  values ($1, $2)
  on conflict on constraint invoice_series_pkey do update set last_number = series.last_number + excluded.last_number
  returning last_number - $2 + 1
$$;
comment on function private.take_invoice_numbers(text, integer) is
  'Takes a block of a month''s numbers and returns the first. Locks the month until the transaction ends: take them last.';

create function private.set_invoice_number() returns trigger
language plpgsql set search_path = ''
as $$
declare
  month text;
begin
  if new.status = 'draft' or new.invoice_number is not null then
    return new;
  end if;
  new.finalized_at := coalesce(new.finalized_at, private.clock_now());
  new.invoice_date := coalesce(new.invoice_date, (new.finalized_at at time zone (new.issuer ->> 'timezone'))::date);
  new.due_date := coalesce(new.due_date, new.invoice_date + coalesce((new.issuer ->> 'payment_terms_days')::integer, 0));
  month := to_char(new.finalized_at at time zone (new.issuer ->> 'timezone'), 'YYYYMM');
  new.invoice_number := private.invoice_number(month, private.take_invoice_numbers(month, 1));
  return new;
end
$$;
comment on function private.set_invoice_number() is
  'Trigger: an invoice that becomes open without a number gets the month''s next one, by the issuer''s time zone.';

-- Walls around what is fiscal -----------------------------------------------------------------------------------------------------

create function private.guard_invoice() returns trigger
language plpgsql set search_path = ''
as $$
declare
  payment constant text[] := array[
    'status', 'amount_paid_minor', 'paid_at', 'irn', 'ack_no', 'signed_qr', 'metadata', 'updated_at'
  ];
begin
  if tg_op = 'DELETE' then
    if old.status <> 'draft' then
      raise exception 'invoice % is final and is never deleted: void it', old.invoice_number using errcode = '23514';
    end if;
    return old;
  end if;
  if old.status = 'draft' then
    if new.status not in ('draft', 'open') then
      raise exception 'a draft invoice becomes open before it becomes %', new.status using errcode = '23514';
    end if;
    return new;
  end if;
  if to_jsonb(new) - payment is distinct from to_jsonb(old) - payment then
    raise exception 'invoice % is final: only its payment changes', old.invoice_number using errcode = '23514';
  end if;
  if new.status <> old.status and not (
    old.status = 'open' and new.status in ('paid', 'void', 'uncollectible')
    or old.status = 'uncollectible' and new.status in ('paid', 'void')
  ) then
    raise exception 'invoice % does not go from % to %', old.invoice_number, old.status, new.status using errcode = '23514';
  end if;
  return new;
end
$$;
comment on function private.guard_invoice() is
  'Trigger: draft to open, open to paid, void or uncollectible, uncollectible to paid or void; nothing else, and no other change '
  'once open.';

create function private.guard_invoice_parts() returns trigger
language plpgsql set search_path = ''
as $$
begin
  if exists (
    select
    from changed
    join public.invoices as invoice on invoice.organization_id = changed.organization_id and invoice.id = changed.invoice_id
    where invoice.status <> 'draft'
  ) then
    raise exception 'the lines and taxes of an invoice are final once it is open' using errcode = '23514';
  end if;
  return null;
end
$$;
comment on function private.guard_invoice_parts() is 'Trigger: lines and taxes change only while their invoice is a draft.';

create function private.check_invoice_sums() returns trigger
language plpgsql set search_path = ''
as $$
declare
  lines bigint;
  taxes bigint;
begin
  select coalesce(sum(line.amount_minor), 0)::bigint
  into lines
  from public.invoice_lines as line
  where line.organization_id = new.organization_id and line.invoice_id = new.id;
  select coalesce(sum(tax.amount_minor), 0)::bigint
  into taxes
  from public.invoice_taxes as tax
  where tax.organization_id = new.organization_id and tax.invoice_id = new.id;
  if lines <> new.subtotal_minor or taxes <> new.tax_minor then
    raise exception 'invoice %: lines of % and taxes of % do not make a subtotal of % and a tax of %',
      new.invoice_number, lines, taxes, new.subtotal_minor, new.tax_minor using errcode = '23514';
  end if;
  return null;
end
$$;
comment on function private.check_invoice_sums() is
  'Trigger, at the end of the transaction: an open invoice''s lines make its subtotal, and its taxes its tax.';

create trigger guard_invoice before update or delete on public.invoices
  for each row execute function private.guard_invoice();
create trigger set_invoice_number_trigger before insert or update of status on public.invoices
  for each row execute function private.set_invoice_number();
create trigger update_modified_column before update on public.invoices
  for each row execute function private.update_modified_column();
create constraint trigger invoices_add_up after insert or update on public.invoices
  deferrable initially deferred
  for each row when (new.status <> 'draft') execute function private.check_invoice_sums();

create trigger invoice_lines_inserted after insert on public.invoice_lines
  referencing new table as changed for each statement execute function private.guard_invoice_parts();
create trigger invoice_lines_updated after update on public.invoice_lines
  referencing old table as changed for each statement execute function private.guard_invoice_parts();
create trigger invoice_lines_moved after update on public.invoice_lines
  referencing new table as changed for each statement execute function private.guard_invoice_parts();
create trigger invoice_lines_deleted after delete on public.invoice_lines
  referencing old table as changed for each statement execute function private.guard_invoice_parts();
create trigger invoice_taxes_inserted after insert on public.invoice_taxes
  referencing new table as changed for each statement execute function private.guard_invoice_parts();
create trigger invoice_taxes_updated after update on public.invoice_taxes
  referencing old table as changed for each statement execute function private.guard_invoice_parts();
create trigger invoice_taxes_moved after update on public.invoice_taxes
  referencing new table as changed for each statement execute function private.guard_invoice_parts();
create trigger invoice_taxes_deleted after delete on public.invoice_taxes
  referencing old table as changed for each statement execute function private.guard_invoice_parts();

revoke all on function
  private.invoice_number(text, integer), private.take_invoice_numbers(text, integer), private.set_invoice_number(),
  private.guard_invoice(), private.guard_invoice_parts(), private.check_invoice_sums()
from public;
