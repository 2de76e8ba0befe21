-- Invoices, their lines and taxes, and what numbers them.
--
-- An invoice is a draft while it is put together, and a fiscal document from the moment it is open: then it has a number, its lines
-- add up to its subtotal and its taxes to its tax, and nothing but its payment changes. The database enforces each of these; no
-- client writes here at all.

-- Who is billed -------------------------------------------------------------------------------------------------------------------

alter table public.organizations add column tax_id text;
alter table public.organizations add constraint organizations_tax_id_format check (tax_id ~ '^[A-Z0-9][A-Z0-9 .-]{1,29}$');
grant update (tax_id) on public.organizations to authenticated;
comment on column public.organizations.tax_id is 'The number of a business abroad, as its VAT number; India''s is gstin. Printed on invoices.';

-- Who sends the invoices ----------------------------------------------------------------------------------------------------------

create table private.billing_logos (
  id  text primary key,
  png bytea not null,
  constraint billing_logos_id_is_hash check (id = encode(sha256(png), 'hex')),
  constraint billing_logos_is_png check (substring(png for 8) = '\x89504e470d0a1a0a'),
  constraint billing_logos_small check (length(png) <= 65536)
);
select private.close_table('private.billing_logos');

comment on table private.billing_logos is
  'Logos of the issuer, each kept under its hash for as long as an invoice may name it: a new logo does not change an old invoice.';

create table private.gst_states (
  code    text primary key,
  letters text not null,
  name    text not null,
  constraint gst_states_letters_key unique (letters),
  constraint gst_states_code_format check (code ~ '^[0-9]{2}$'),
  constraint gst_states_letters_format check (letters ~ '^[A-Z]{2}$')
);
select private.close_table('private.gst_states');

comment on table private.gst_states is 'India''s states as a GSTIN begins: the place of supply on an invoice and in a return.';
comment on column private.gst_states.letters is 'The two letters of ISO 3166-2:IN, as an address may give them.';

insert into private.gst_states (code, letters, name)
values
  ('01', 'JK', 'Jammu and Kashmir'), ('02', 'HP', 'Himachal Pradesh'), ('03', 'PB', 'Punjab'), ('04', 'CH', 'Chandigarh'),
  ('05', 'UK', 'Uttarakhand'), ('06', 'HR', 'Haryana'), ('07', 'DL', 'Delhi'), ('08', 'RJ', 'Rajasthan'), ('09', 'UP', 'Uttar Pradesh'),
  ('10', 'BR', 'Bihar'), ('11', 'SK', 'Sikkim'), ('12', 'AR', 'Arunachal Pradesh'), ('13', 'NL', 'Nagaland'), ('14', 'MN', 'Manipur'),
  ('15', 'MZ', 'Mizoram'), ('16', 'TR', 'Tripura'), ('17', 'ML', 'Meghalaya'), ('18', 'AS', 'Assam'), ('19', 'WB', 'West Bengal'),
  ('20', 'JH', 'Jharkhand'), ('21', 'OD', 'Odisha'), ('22', 'CG', 'Chhattisgarh'), ('23', 'MP', 'Madhya Pradesh'), ('24', 'GJ', 'Gujarat'),
  ('26', 'DH', 'Dadra and Nagar Haveli and Daman and Diu'), ('27', 'MH', 'Maharashtra'), ('29', 'KA', 'Karnataka'), ('30', 'GA', 'Goa'),
  ('31', 'LD', 'Lakshadweep'), ('32', 'KL', 'Kerala'), ('33', 'TN', 'Tamil Nadu'), ('34', 'PY', 'Puducherry'),
  ('35', 'AN', 'Andaman and Nicobar Islands'), ('36', 'TS', 'Telangana'), ('37', 'AP', 'Andhra Pradesh'), ('38', 'LA', 'Ladakh'),
  ('97', 'OT', 'Other Territory')
on conflict (code) do nothing;

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
  pan                text,
  phone              text,
  website            text,
  note               text,
  color              text,
  page_size          text,
  logo_id            text references private.billing_logos (id) on delete restrict,
  constraint billing_issuer_one_row check (singleton),
  constraint billing_issuer_name_present check (btrim(legal_name) <> ''),
  constraint billing_issuer_gstin_format check (gstin ~ '^[0-9]{2}[A-Z0-9]{13}$'),
  constraint billing_issuer_state_code_format check (state_code ~ '^[A-Z0-9]{1,3}$'),
  constraint billing_issuer_country_code_format check (country_code ~ '^[A-Z]{2}$'),
  constraint billing_issuer_terms_range check (payment_terms_days between 0 and 365),
  constraint billing_issuer_pan_format check (pan ~ '^[A-Z]{5}[0-9]{4}[A-Z]$'),
  constraint billing_issuer_note_length check (length(note) <= 600),
  constraint billing_issuer_color_format check (color ~ '^#[0-9a-f]{6}$'),
  constraint billing_issuer_page_size_known check (page_size in ('A4', 'Letter'))
);
create index idx_billing_issuer_logo on private.billing_issuer (logo_id);
select private.close_table('private.billing_issuer');

create trigger check_timezone before insert or update of timezone on private.billing_issuer
  for each row execute function private.check_timezone();

comment on table private.billing_issuer is 'Our own particulars, one row: copied onto every invoice when it is made.';
comment on column private.billing_issuer.state_code is 'The state we supply from, spelled as in organizations.state_code.';
comment on column private.billing_issuer.timezone is 'Decides an invoice''s date and the month in its number.';
comment on column private.billing_issuer.sac_code is 'The service accounting code printed on Indian invoices.';
comment on column private.billing_issuer.note is 'Printed below the total: how to pay, the bank account.';
comment on column private.billing_issuer.color is 'Of the documents'' title and rules: #0f4c81. Too light a colour is darkened until it can be read.';
comment on column private.billing_issuer.page_size is 'A4 or Letter; null follows the country.';

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
  buyer        text not null default 'any',
  supplier_country_code text,
  treatment    text not null default 'standard',
  note         text,
  constraint tax_rates_version_key unique nulls not distinct (country_code, scope, buyer, supplier_country_code, name, valid_from),
  constraint tax_rates_country_code_format check (country_code ~ '^[A-Z]{2}$'),
  constraint tax_rates_scope_known check (scope in ('any', 'intra_state', 'inter_state', 'domestic', 'cross_border')),
  constraint tax_rates_buyer_known check (buyer in ('any', 'business', 'consumer')),
  constraint tax_rates_supplier_format check (supplier_country_code ~ '^[A-Z]{2}$'),
  constraint tax_rates_treatment_known check (treatment in ('standard', 'zero_rated', 'reverse_charge', 'exempt')),
  constraint tax_rates_treatment_charges check (treatment = 'standard' or rate_bp = 0 and btrim(note) <> ''),
  constraint tax_rates_note_length check (length(note) <= 300),
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

comment on table public.tax_rates is
  'Tax by the customer''s country: one row a component. ZZ holds for every country that has no row of its own that fits; where that has none '
  'either, nothing is taxed and nothing is said.';
comment on column public.tax_rates.scope is
  'any; in a country that taxes by state, intra_state (customer in the issuer''s state) and inter_state; domestic (customer in the issuer''s '
  'country) and cross_border.';
comment on column public.tax_rates.buyer is 'business: a customer that gave a tax number (tax_id, or gstin in India); consumer: one that did not; or any.';
comment on column public.tax_rates.supplier_country_code is 'Holds for an issuer in this country alone; null for any.';
comment on column public.tax_rates.treatment is
  'standard: the rate is charged. zero_rated (an export), reverse_charge (the customer owes it), exempt: nothing is, and the note says why.';
comment on column public.tax_rates.note is 'Printed on the invoice: what the law wants said where nothing is charged.';
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
  credited_minor    bigint not null default 0,
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
  past_due_at       timestamptz,
  discount_minor    bigint not null default 0,
  discounts         jsonb not null default '[]',
  constraint invoices_tenant_key unique (organization_id, id),
  constraint invoices_number_key unique (invoice_number),
  constraint invoices_period_key unique (subscription_id, kind, period_start),
  constraint invoices_subscription_fkey foreign key (organization_id, subscription_id)
    references public.subscriptions (organization_id, id) on delete restrict,
  constraint invoices_kind_known check (kind in ('period', 'advance', 'change')),
  constraint invoices_number_format check (invoice_number ~ '^IN[A-V]-[0-9]{6}-[0-9]{5}$'),
  constraint invoices_numbered_once_open check ((status = 'draft') = (invoice_number is null)),
  constraint invoices_dated_once_open check (
    status = 'draft' or (invoice_date is not null and due_date is not null and finalized_at is not null)
  ),
  constraint invoices_currency_format check (currency ~ '^[A-Z]{3}$'),
  constraint invoices_period_ordered check (period_start < period_end),
  constraint invoices_days_ordered check (first_day <= last_day),
  constraint invoices_total_adds_up check (total_minor = subtotal_minor - discount_minor + tax_minor),
  constraint invoices_total_not_negative check (total_minor >= 0),
  constraint invoices_paid_range check (amount_paid_minor between 0 and total_minor),
  constraint invoices_credited_range check (credited_minor between 0 and total_minor),
  constraint invoices_paid_in_full check (
    status <> 'paid' or (amount_paid_minor + credited_minor >= total_minor and paid_at is not null)
  ),
  constraint invoices_void_unpaid check (status <> 'void' or (amount_paid_minor = 0 and credited_minor = 0)),
  constraint invoices_discounts_array check (jsonb_typeof(discounts) = 'array'),
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
comment on column public.invoices.kind is
  'period: what one billing period of a subscription cost, and in advance the next one''s base price. advance: the first base price of a '
  'subscription that is billed in advance. change: what changing the plan within a period costs. Each is billed once.';
comment on column public.invoices.invoice_number is
  'INV-YYYYMM-NNNNN, given when the invoice becomes open; 16 characters at most, as India''s Rule 46 has it.';
comment on column public.invoices.timezone is 'The zone in which the period''s days are read.';
comment on column public.invoices.first_day is 'The first day that is billed, by that zone.';
comment on column public.invoices.last_day is 'The last day that is billed.';
comment on column public.invoices.subtotal_minor is 'Sum of the lines before discounts, in the currency''s minor unit.';
comment on column public.invoices.discount_minor is 'Sum of the lines'' discounts: taken off before tax.';
comment on column public.invoices.discounts is
  'Which discounts they are: [{"name","percent_bp","amount_minor","discount_id"}]. Their amounts make discount_minor.';
comment on column public.invoices.tax_minor is 'Sum of the taxes, each rounded alone.';
comment on column public.invoices.amount_paid_minor is 'Sum of the payments that were counted on it (payments.applied_minor).';
comment on column public.invoices.credited_minor is 'Sum of the credit notes issued against it. What is due is the total less both.';
comment on column public.invoices.issuer is 'Our particulars as they were.';
comment on column public.invoices.customer is 'The organization''s particulars as they were.';
comment on column public.invoices.past_due_at is 'Since when it is overdue, as the schedule found it and told.';
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
  first_day        date,
  last_day         date,
  discount_minor   bigint not null default 0,
  constraint invoice_lines_tenant_key unique (organization_id, id),
  constraint invoice_lines_position_key unique (organization_id, invoice_id, position),
  constraint invoice_lines_invoice_fkey foreign key (organization_id, invoice_id)
    references public.invoices (organization_id, id) on delete restrict,
  constraint invoice_lines_kind_known check (
    kind in ('base', 'included', 'overage', 'fee', 'commitment', 'adjustment', 'credit', 'charge', 'item')
  ),
  constraint invoice_lines_description_present check (btrim(description) <> ''),
  constraint invoice_lines_price_units_positive check (price_units > 0),
  constraint invoice_lines_days_ordered check (first_day <= last_day),
  constraint invoice_lines_discount_within check (
    case when amount_minor < 0 then discount_minor between amount_minor and 0 else discount_minor between 0 and amount_minor end
  )
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
comment on column public.invoice_lines.kind is 'base: the plan; included: used within the allowance, amount 0; overage: used beyond it; fee: the flat fee of a tier; '
  'commitment: what is missing to the minimum; credit and charge: the rest of a period on the plan that was left, given back, and on the one '
  'that was taken; item: something of its own; adjustment: what a period that was billed '
  'before used more or less beyond its allowance, at its own price.';
comment on column public.invoice_lines.unit_price_minor is 'The price of `price_units` units, in the minor unit: 600 for 60 seconds.';
comment on column public.invoice_lines.discount_minor is
  'What of the amount is taken off, before tax: its part of the invoice''s discounts, and of a credit the discount of the line that it gives back.';
comment on column public.invoice_lines.first_day is 'The first day that it is for, where that is not the invoice''s.';
comment on column public.invoice_lines.amount_minor is 'quantity × unit_price_minor / price_units, rounded once; of packages, by started ones; of a part of a period, its part; of an adjustment the difference of two such amounts, so that a period costs '
  'the same however late its usage comes.';

create table public.invoice_taxes (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null,
  invoice_id      uuid not null,
  position        integer not null,
  name            text not null,
  rate_bp         integer not null,
  taxable_minor   bigint not null,
  amount_minor    bigint not null,
  treatment       text not null default 'standard',
  note            text,
  constraint invoice_taxes_tenant_key unique (organization_id, id),
  constraint invoice_taxes_name_key unique (organization_id, invoice_id, name),
  constraint invoice_taxes_invoice_fkey foreign key (organization_id, invoice_id)
    references public.invoices (organization_id, id) on delete restrict,
  constraint invoice_taxes_rate_range check (rate_bp between 0 and 10000),
  constraint invoice_taxes_treatment_known check (treatment in ('standard', 'zero_rated', 'reverse_charge', 'exempt')),
  constraint invoice_taxes_treatment_charges check (treatment = 'standard' or amount_minor = 0)
);

revoke all on public.invoice_taxes from anon, authenticated, service_role;
grant select on public.invoice_taxes to authenticated, service_role;
alter table public.invoice_taxes enable row level security;
alter table public.invoice_taxes force row level security;
create policy "Members who may see billing see the invoices' taxes" on public.invoice_taxes
  for select to authenticated using (organization_id = (select private.org_with('billing.view')));

comment on table public.invoice_taxes is
  'The taxes of an invoice, one row a component, each rounded once and alone: CGST and SGST may differ from IGST by one paisa.';
comment on column public.invoice_taxes.taxable_minor is 'What the rate was applied to: the subtotal less discounts.';
comment on column public.invoice_taxes.treatment is 'As in tax_rates; where it is not standard, nothing is charged and the note is printed.';

create table private.usage_adjustments (
  event_id        uuid not null,
  organization_id uuid not null,
  meter_key       text not null,
  period_start    date not null,
  occurred_at     timestamptz not null,
  quantity        bigint not null,
  recorded_at     timestamptz not null,
  settled_at      timestamptz,
  invoice_line_id uuid,
  constraint usage_adjustments_pkey primary key (event_id),
  constraint usage_adjustments_period_fkey foreign key (organization_id, meter_key, period_start)
    references public.usage_logs (organization_id, feature_key, period_start) on delete restrict,
  constraint usage_adjustments_line_fkey foreign key (organization_id, invoice_line_id)
    references public.invoice_lines (organization_id, id) on delete restrict,
  constraint usage_adjustments_line_settles check (invoice_line_id is null or settled_at is not null)
);

create index idx_usage_adjustments_open on private.usage_adjustments (organization_id, meter_key, period_start) where settled_at is null;
create index idx_usage_adjustments_period on private.usage_adjustments (organization_id, meter_key, period_start);
create index idx_usage_adjustments_line on private.usage_adjustments (organization_id, invoice_line_id) where invoice_line_id is not null;
select private.close_table('private.usage_adjustments');

comment on table private.usage_adjustments is
  'Events that came after their period was billed, and the invoice line that billed each: they count in their own period, and the next '
  'invoice bills the difference at that period''s price.';
comment on column private.usage_adjustments.period_start is 'The period that they belong to.';
comment on column private.usage_adjustments.settled_at is 'When the difference was settled; null while an invoice has still to.';
comment on column private.usage_adjustments.invoice_line_id is 'The line that billed it; null also where the difference cost nothing.';

-- What waits for the next invoice -------------------------------------------------------------------------------------------------

create table private.invoice_items (
  id               uuid primary key default gen_random_uuid(),
  organization_id  uuid not null,
  subscription_id  uuid not null,
  kind             text not null,
  currency         text not null,
  description      text not null,
  quantity         bigint not null default 1,
  unit             text not null,
  unit_price_minor bigint not null,
  price_units      bigint not null default 1,
  amount_minor     bigint not null,
  first_day        date,
  last_day         date,
  idempotency_key  text,
  number           bigint generated always as identity,
  created_at       timestamptz not null,
  settled_at       timestamptz,
  taken_minor      bigint not null default 0,
  discount_minor   bigint,
  discount_taken_minor bigint not null default 0,
  constraint invoice_items_subscription_fkey foreign key (organization_id, subscription_id)
    references public.subscriptions (organization_id, id) on delete restrict,
  constraint invoice_items_key unique (organization_id, idempotency_key),
  constraint invoice_items_kind_known check (kind in ('base', 'credit', 'charge', 'item')),
  constraint invoice_items_currency_format check (currency ~ '^[A-Z]{3}$'),
  constraint invoice_items_description_present check (btrim(description) <> ''),
  constraint invoice_items_price_units_positive check (price_units > 0),
  constraint invoice_items_days_ordered check (first_day <= last_day),
  constraint invoice_items_sign_fits check (case kind when 'credit' then amount_minor <= 0 else amount_minor >= 0 end),
  constraint invoice_items_taken_within check (
    case when amount_minor < 0 then taken_minor between amount_minor and 0 else taken_minor between 0 and amount_minor end
  ),
  constraint invoice_items_discount_within check (discount_minor between amount_minor and 0 and discount_taken_minor between discount_minor and 0)
);

create index idx_invoice_items_open on private.invoice_items (organization_id, subscription_id) where settled_at is null;
create index idx_invoice_items_subscription on private.invoice_items (organization_id, subscription_id);
select private.close_table('private.invoice_items');

comment on table private.invoice_items is
  'What waits for the next invoice of a subscription and becomes a line of it, with the same id: the two sides of a plan that changed within '
  'its period, and what an operator adds once. Of a credit an invoice takes no more than it charges; the rest waits for the next one.';
comment on column private.invoice_items.number is 'Their order on the invoice.';
comment on column private.invoice_items.idempotency_key is 'Whoever adds the same again under this key adds nothing.';
comment on column private.invoice_items.settled_at is 'When an invoice took it, or the last of it; null while it waits.';
comment on column private.invoice_items.taken_minor is 'What invoices have taken of it so far.';
comment on column private.invoice_items.discount_minor is
  'Of a credit for what an earlier invoice charged: the discount that was taken off there, given back with it. Null takes part in the '
  'discounts of the invoice that it comes on.';
comment on column private.invoice_items.discount_taken_minor is 'What invoices have taken of that so far.';

create table private.coupons (
  code            text primary key,
  name            text not null,
  percent_bp      integer,
  amount_minor    bigint,
  currency        text,
  invoices        integer,
  max_redemptions integer,
  redeemed        integer not null default 0,
  valid_from      timestamptz not null,
  valid_to        timestamptz,
  created_at      timestamptz not null,
  constraint coupons_code_format check (code ~ '^[A-Z0-9][A-Z0-9_-]{0,39}$'),
  constraint coupons_name_present check (btrim(name) <> '' and length(name) <= 100),
  constraint coupons_percent_or_amount check ((percent_bp is null) <> (amount_minor is null)),
  constraint coupons_percent_range check (percent_bp between 1 and 10000),
  constraint coupons_amount_positive check (amount_minor > 0),
  constraint coupons_amount_has_currency check ((amount_minor is null) = (currency is null)),
  constraint coupons_currency_format check (currency ~ '^[A-Z]{3}$'),
  constraint coupons_invoices_positive check (invoices > 0),
  constraint coupons_redeemed_range check (redeemed between 0 and coalesce(max_redemptions, redeemed)),
  constraint coupons_validity_ordered check (valid_from < valid_to)
);
select private.close_table('private.coupons');

comment on table private.coupons is
  'What a code takes off: a percentage, or an amount of one currency. Its row counts redemptions, and is what two of them wait for.';
comment on column private.coupons.percent_bp is 'Hundredths of a percent.';
comment on column private.coupons.invoices is 'Of how many invoices: 1 is once; null is for ever.';
comment on column private.coupons.max_redemptions is 'How many organizations may redeem it; null is any number.';

create table private.discounts (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null,
  subscription_id uuid not null,
  coupon_code     text references private.coupons (code) on delete restrict,
  name            text not null,
  percent_bp      integer,
  amount_minor    bigint,
  currency        text,
  invoices        integer,
  applied         integer not null default 0,
  idempotency_key text,
  number          bigint generated always as identity,
  created_at      timestamptz not null,
  ended_at        timestamptz,
  constraint discounts_subscription_fkey foreign key (organization_id, subscription_id)
    references public.subscriptions (organization_id, id) on delete restrict,
  constraint discounts_coupon_key unique (organization_id, coupon_code),
  constraint discounts_key unique (organization_id, idempotency_key),
  constraint discounts_name_present check (btrim(name) <> '' and length(name) <= 100),
  constraint discounts_percent_or_amount check ((percent_bp is null) <> (amount_minor is null)),
  constraint discounts_percent_range check (percent_bp between 1 and 10000),
  constraint discounts_amount_positive check (amount_minor > 0),
  constraint discounts_amount_has_currency check ((amount_minor is null) = (currency is null)),
  constraint discounts_invoices_positive check (invoices > 0),
  constraint discounts_applied_range check (applied between 0 and coalesce(invoices, applied))
);
create index idx_discounts_live on private.discounts (subscription_id, number) where ended_at is null;
create index idx_discounts_subscription on private.discounts (organization_id, subscription_id);
create index idx_discounts_coupon on private.discounts (coupon_code) where coupon_code is not null;
select private.close_table('private.discounts');

comment on table private.discounts is
  'What is taken off a subscription''s invoices, in this order, before tax: from a coupon, or given by the operator. An amount on one invoice '
  'is one with `invoices` 1.';
comment on column private.discounts.invoices is 'Of how many invoices; null is for ever.';
comment on column private.discounts.applied is 'Of how many it was taken off. Invoices of a change within a period take percentages and do not count.';
comment on column private.discounts.ended_at is 'Since when nothing more is taken off.';

create table private.billing_requests (
  organization_id uuid not null references public.organizations (id) on delete cascade,
  key             text not null,
  request         jsonb not null,
  answer          jsonb not null,
  created_at      timestamptz not null,
  constraint billing_requests_pkey primary key (organization_id, key),
  constraint billing_requests_key_length check (length(key) between 1 and 255)
);
select private.close_table('private.billing_requests');

comment on table private.billing_requests is
  'What users asked of their subscription under an Idempotency-Key, and what they were answered: for thirty days the same again is '
  'answered the same and does nothing.';

-- When somebody does not pay ------------------------------------------------------------------------------------------------------

create table private.dunning_policy (
  singleton                boolean primary key default true,
  grace_days               integer not null default 0,
  retry_days               integer[] not null default '{1,3,7}',
  retry_time               time not null default '08:00',
  mandate_limits           jsonb not null default '{"INR": 1500000}',
  suspend_after_days       integer default 14,
  uncollectible_after_days integer,
  constraint dunning_policy_one_row check (singleton),
  constraint dunning_policy_grace_range check (grace_days between 0 and 90),
  constraint dunning_policy_retries_range check (
    cardinality(retry_days) <= 3 and 1 <= all (retry_days) and 90 >= all (retry_days) and array_position(retry_days, null) is null
  ),
  constraint dunning_policy_retry_time_off_peak check (
    retry_time < '10:00' or retry_time >= '13:00' and retry_time < '17:00' or retry_time >= '21:30'
  ),
  constraint dunning_policy_limits_object check (jsonb_typeof(mandate_limits) = 'object'),
  constraint dunning_policy_suspend_range check (suspend_after_days between 0 and 365),
  constraint dunning_policy_uncollectible_range check (uncollectible_after_days between 1 and 3650)
);
select private.close_table('private.dunning_policy');
insert into private.dunning_policy (singleton) values (true) on conflict do nothing;

comment on table private.dunning_policy is 'What happens to an invoice that is not paid, and when: one row, the operator''s to change.';
comment on column private.dunning_policy.grace_days is 'Days after the due date before an invoice counts as overdue.';
comment on column private.dunning_policy.retry_days is
  'On which days after that another payment is asked for: three at most, as a mandate allows, and a day''s notice before the first.';
comment on column private.dunning_policy.retry_time is
  'At which time of the issuer''s day; outside the hours in which UPI takes no automatic payments (10:00 to 13:00, 17:00 to 21:30).';
comment on column private.dunning_policy.mandate_limits is
  'By currency, up to which amount in the minor unit a mandate pays without its holder; above it, and without a mandate, a payment link is sent.';
comment on column private.dunning_policy.suspend_after_days is 'After how many overdue days the subscription is suspended; null is never.';
comment on column private.dunning_policy.uncollectible_after_days is 'After how many overdue days the invoice is given up; null is never.';

create table private.payment_retries (
  organization_id uuid not null,
  invoice_id      uuid not null,
  number          integer not null,
  due_at          timestamptz not null,
  told_at         timestamptz,
  constraint payment_retries_pkey primary key (organization_id, invoice_id, number),
  constraint payment_retries_invoice_fkey foreign key (organization_id, invoice_id)
    references public.invoices (organization_id, id) on delete restrict
);
create index idx_payment_retries_due on private.payment_retries (due_at) where told_at is null;
select private.close_table('private.payment_retries');

comment on table private.payment_retries is 'When an overdue invoice asks for another payment, and whether it did.';
comment on column private.payment_retries.told_at is 'When `invoice.payment_due` said so to whoever collects; also set once nothing is due any more.';

-- Numbers -------------------------------------------------------------------------------------------------------------------------

create function private.invoice_number(month text, number integer) returns text
language plpgsql immutable set search_path = ''
as $$
begin
  return case
    when number between 1 and 99999 then 'INV-' || month || '-' || lpad(number::text, 5, '0')
    -- A sixth digit would break the 16 characters of Rule 46, so the month goes on in further series: INA, INB, to INU.
    when number between 100000 and 2199999 then
      'IN' || chr(64 + number / 100000) || '-' || month || '-' || lpad((number % 100000)::text, 5, '0')
  end;
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
  month := private.series_month(new.finalized_at, new.issuer ->> 'timezone');
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
    'status', 'amount_paid_minor', 'credited_minor', 'paid_at', 'past_due_at', 'irn', 'ack_no', 'signed_qr', 'metadata', 'updated_at'
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

create function private.named_discounts(discounts jsonb) returns bigint
language plpgsql immutable set search_path = ''
as $$
begin
  return coalesce((select sum((given.item ->> 'amount_minor')::bigint) from jsonb_array_elements(discounts) as given (item)), 0)::bigint;
end
$$;
comment on function private.named_discounts(jsonb) is 'What the discounts that an invoice names come to.';

create function private.check_invoice_sums() returns trigger
language plpgsql set search_path = ''
as $$
declare
  lines bigint;
  discounts bigint;
  taxes bigint;
begin
  select coalesce(sum(line.amount_minor), 0)::bigint, coalesce(sum(line.discount_minor), 0)::bigint
  into lines, discounts
  from public.invoice_lines as line
  where line.organization_id = new.organization_id and line.invoice_id = new.id;
  select coalesce(sum(tax.amount_minor), 0)::bigint
  into taxes
  from public.invoice_taxes as tax
  where tax.organization_id = new.organization_id and tax.invoice_id = new.id;
  if lines <> new.subtotal_minor or taxes <> new.tax_minor or discounts <> new.discount_minor
    or new.discount_minor <> private.named_discounts(new.discounts) then
    raise exception 'invoice %: lines of %, discounts of % and taxes of % do not make a subtotal of %, a discount of % and a tax of %',
      new.invoice_number, lines, discounts, taxes, new.subtotal_minor, new.discount_minor, new.tax_minor using errcode = '23514';
  end if;
  return null;
end
$$;
comment on function private.check_invoice_sums() is
  'Trigger, at the end of the transaction: an open invoice''s lines make its subtotal and its discount, and its taxes its tax.';

create function private.check_changed_sums() returns trigger
language plpgsql set search_path = ''
as $$
declare
  wrong record;
begin
  -- An invoice is a draft when it is made and its lines change only while it is one, so that it adds up when the statement that opens it
  -- ends, or never.
  select changed.invoice_number, line.amount, line.discount, tax.amount as tax, changed.subtotal_minor, changed.discount_minor, changed.tax_minor
  into wrong
  from changed
  cross join lateral (
    select coalesce(sum(own.amount_minor), 0) as amount, coalesce(sum(own.discount_minor), 0) as discount
    from public.invoice_lines as own
    where own.organization_id = changed.organization_id and own.invoice_id = changed.id
  ) as line
  cross join lateral (
    select coalesce(sum(own.amount_minor), 0) as amount
    from public.invoice_taxes as own
    where own.organization_id = changed.organization_id and own.invoice_id = changed.id
  ) as tax
  where changed.status <> 'draft'
    and (
      (line.amount, line.discount, tax.amount) <> (changed.subtotal_minor, changed.discount_minor, changed.tax_minor)
      or changed.discounts <> '[]' and changed.discount_minor <> private.named_discounts(changed.discounts)
      or changed.discounts = '[]' and changed.discount_minor <> 0
    )
  limit 1;
  if found then
    raise exception 'invoice %: lines of %, discounts of % and taxes of % do not make a subtotal of %, a discount of % and a tax of %',
      wrong.invoice_number, wrong.amount, wrong.discount, wrong.tax, wrong.subtotal_minor, wrong.discount_minor, wrong.tax_minor
      using errcode = '23514';
  end if;
  return null;
end
$$;
comment on function private.check_changed_sums() is 'Trigger, of a whole statement: as check_invoice_sums, for all that it opened or changed.';

-- What the run does to its own drafts, thousands at a time, is judged by the statement; whatever else happens, row by row.
create trigger guard_invoice before update on public.invoices
  for each row when (old.status <> 'draft' or new.status not in ('draft', 'open')) execute function private.guard_invoice();
create trigger guard_deleted_invoice before delete on public.invoices
  for each row execute function private.guard_invoice();
create trigger set_invoice_number_trigger before insert or update of status on public.invoices
  for each row when (new.status <> 'draft' and new.invoice_number is null) execute function private.set_invoice_number();
create trigger update_modified_column before update on public.invoices
  for each row when (old.status <> 'draft') execute function private.update_modified_column();
create trigger changed_invoices_add_up after update on public.invoices
  referencing new table as changed for each statement execute function private.check_changed_sums();
create constraint trigger invoices_add_up after insert on public.invoices
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
  private.guard_invoice(), private.guard_invoice_parts(), private.check_invoice_sums(), private.named_discounts(jsonb),
  private.check_changed_sums()
from public;


-- Payment methods -----------------------------------------------------------------------------------------------------------------

create function private.has_card_number(given text) returns boolean
language sql immutable set search_path = ''
as $$
  -- Every run of at least 13 digits, with single separators between them or without. A run of up to 19 is a card number if it begins
  -- as one and its check digit is right (Luhn); a longer run has no business here at all.
  select exists (
    select
    from (
      select regexp_replace(run.match[1], '[^0-9]', '', 'g') as digits
      from regexp_matches(
        -- A UUID is none, though it may be all digits.
        regexp_replace($1, '\m[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\M', '', 'gi'), '([0-9](?:[ ._/-]?[0-9]){12,})', 'g'
      ) as run (match)
    ) as run
    where length(run.digits) > 19
      or run.digits ~ '^[2-6]' and (
        select sum(
          case when (length(run.digits) - place) % 2 = 0 then digit else digit * 2 - case when digit > 4 then 9 else 0 end end
        ) % 10 = 0
        from generate_series(1, length(run.digits)) as place, substr(run.digits, place, 1) as character, cast(character as integer) as digit
      )
  )
$$;
comment on function private.has_card_number(text) is
  'Whether a text holds what may be a card number (PAN), also one written in groups. Times and ids in milliseconds begin with 1 and pass.';

create table public.payment_methods (
  id                        uuid primary key default gen_random_uuid(),
  organization_id           uuid not null references public.organizations (id) on delete restrict,
  type                      public.payment_method_type not null,
  gateway                   public.payment_gateway not null,
  gateway_customer_id       text,
  gateway_payment_method_id text not null,
  last4                     text,
  brand                     text,
  expiry_month              integer,
  expiry_year               integer,
  is_default                boolean not null default false,
  metadata                  jsonb not null default '{}',
  removed_at                timestamptz,
  created_at                timestamptz not null default private.clock_now(),
  updated_at                timestamptz not null default private.clock_now(),
  constraint payment_methods_tenant_key unique (organization_id, id),
  constraint payment_methods_token_key unique (gateway, gateway_payment_method_id),
  constraint payment_methods_token_format check (gateway_payment_method_id ~ '^[A-Za-z0-9_.:-]{1,255}$'),
  constraint payment_methods_customer_format check (gateway_customer_id ~ '^[A-Za-z0-9_.:-]{1,255}$'),
  constraint payment_methods_last4_format check (last4 ~ '^[0-9]{4}$'),
  constraint payment_methods_brand_format check (brand ~ '^[A-Za-z][A-Za-z ._-]{0,49}$'),
  constraint payment_methods_expiry_range check (expiry_month between 1 and 12 and expiry_year between 2000 and 2199),
  constraint payment_methods_expiry_whole check ((expiry_month is null) = (expiry_year is null)),
  constraint payment_methods_card_described check (type <> 'card' or last4 is not null),
  constraint payment_methods_default_kept check (not (is_default and removed_at is not null)),
  constraint payment_methods_metadata_object check (jsonb_typeof(metadata) = 'object'),
  constraint payment_methods_no_card_number check (
    not private.has_card_number(gateway_payment_method_id)
    and not private.has_card_number(coalesce(gateway_customer_id, ''))
    and not private.has_card_number(metadata::text)
  ),
  constraint payment_methods_no_card_code check (
    not metadata ?| array['number', 'card_number', 'pan', 'cvv', 'cvv2', 'cvc', 'csc', 'security_code', 'pin', 'track1', 'track2']
  )
);

create unique index idx_payment_methods_default on public.payment_methods (organization_id) where is_default;
create index idx_payment_methods_org_id on public.payment_methods (organization_id) where removed_at is null;

revoke all on public.payment_methods from anon, authenticated, service_role;
grant select on public.payment_methods to authenticated, service_role;
alter table public.payment_methods enable row level security;
alter table public.payment_methods force row level security;
create policy "Members who may see billing see the payment methods" on public.payment_methods
  for select to authenticated using (organization_id = (select private.org_with('billing.view')) and removed_at is null);

comment on table public.payment_methods is
  'How an organization pays: the gateway''s token and what a person recognises it by. Never a card number or its code: the table '
  'refuses them.';
comment on column public.payment_methods.gateway_payment_method_id is 'The gateway''s token, worth nothing without our key to that gateway.';
comment on column public.payment_methods.last4 is 'The last four digits of a card or an account.';
comment on column public.payment_methods.is_default is 'What is charged; one a organization.';
comment on column public.payment_methods.removed_at is 'Since when it is no longer used; the row stays, as payments refer to it.';

-- Payments ------------------------------------------------------------------------------------------------------------------------

create table public.payments (
  id                 uuid primary key default gen_random_uuid(),
  organization_id    uuid not null references public.organizations (id) on delete restrict,
  purpose            text not null,
  invoice_id         uuid,
  payment_method_id  uuid,
  gateway            public.payment_gateway not null,
  gateway_order_id   text,
  gateway_payment_id text,
  status             public.payment_transaction_status not null default 'pending',
  amount_minor       bigint not null,
  currency           text not null,
  applied_minor      bigint not null default 0,
  refunded_minor     bigint not null default 0,
  problem            text,
  failure_code       text,
  failure_message    text,
  status_at          timestamptz not null,
  captured_at        timestamptz,
  created_at         timestamptz not null default private.clock_now(),
  updated_at         timestamptz not null default private.clock_now(),
  constraint payments_tenant_key unique (organization_id, id),
  constraint payments_gateway_key unique (gateway, gateway_payment_id),
  constraint payments_invoice_fkey foreign key (organization_id, invoice_id)
    references public.invoices (organization_id, id) on delete restrict,
  constraint payments_payment_method_fkey foreign key (organization_id, payment_method_id)
    references public.payment_methods (organization_id, id) on delete restrict,
  constraint payments_purpose_known check (purpose in ('invoice', 'credit')),
  constraint payments_purpose_fits check ((purpose = 'invoice') = (invoice_id is not null)),
  constraint payments_order_format check (gateway_order_id ~ '^[A-Za-z0-9_.:/-]{1,255}$'),
  constraint payments_payment_format check (gateway_payment_id ~ '^[A-Za-z0-9_.:/-]{1,255}$'),
  constraint payments_identified check (gateway_payment_id is not null or gateway_order_id is not null and status = 'pending'),
  constraint payments_amount_positive check (amount_minor > 0),
  constraint payments_currency_format check (currency ~ '^[A-Z]{3}$'),
  constraint payments_applied_whole check (applied_minor = 0 or applied_minor = amount_minor and status >= 'captured'),
  constraint payments_refunded_range check (refunded_minor between 0 and amount_minor),
  constraint payments_refunded_after_capture check (refunded_minor = 0 or status >= 'captured'),
  constraint payments_refunded_in_full check ((status = 'refunded') = (refunded_minor = amount_minor)),
  constraint payments_captured_has_time check ((status >= 'captured') = (captured_at is not null)),
  constraint payments_problem_known check (problem in ('amount_differs', 'currency_differs', 'invoice_not_open')),
  constraint payments_problem_is_unapplied check (problem is null or applied_minor = 0)
);

create index idx_payments_org_time on public.payments (organization_id, created_at desc);
create index idx_payments_invoice on public.payments (organization_id, invoice_id) where invoice_id is not null;
create index idx_payments_method on public.payments (organization_id, payment_method_id) where payment_method_id is not null;
create index idx_payments_order on public.payments (gateway, gateway_order_id) where gateway_order_id is not null;

revoke all on public.payments from anon, authenticated, service_role;
grant select on public.payments to authenticated, service_role;
alter table public.payments enable row level security;
alter table public.payments force row level security;
create policy "Members who may see billing see the payments" on public.payments
  for select to authenticated using (organization_id = (select private.org_with('billing.view')));

comment on table public.payments is
  'Payments at gateways, as the gateways report them: of an invoice, or of prepaid credit. Money that came is never forgotten, also '
  'where it fits no invoice.';
comment on column public.payments.purpose is 'invoice: pays one invoice in full; credit: buys prepaid credit.';
comment on column public.payments.gateway_payment_id is 'The gateway''s id of the payment; null while only its order is known.';
comment on column public.payments.applied_minor is
  'What of it was counted on its invoice: all of it, if amount and currency were what was due, or nothing.';
comment on column public.payments.refunded_minor is 'What was paid back of it.';
comment on column public.payments.problem is
  'Why money that came was not counted on its invoice, for a person to look at: amount_differs, currency_differs, invoice_not_open.';
comment on column public.payments.status_at is 'When the gateway says that it came to this status; older news does not change it.';

-- What a payer's bank says against it, as the gateway reports it.
alter table public.payments
  add column dispute_status text,
  add column disputed_minor bigint,
  add column disputed_at timestamptz,
  add constraint payments_dispute_whole check (
    (dispute_status is null) = (disputed_at is null) and (dispute_status is null) = (disputed_minor is null)
  );
comment on column public.payments.dispute_status is 'The gateway''s word: of an open dispute, or how it ended. It moves no money by itself.';
comment on column public.payments.disputed_at is 'When the gateway said so; older news does not change it.';

create table public.refunds (
  id                uuid primary key default gen_random_uuid(),
  organization_id   uuid not null,
  payment_id        uuid not null,
  gateway           public.payment_gateway not null,
  gateway_refund_id text not null,
  status            public.refund_status not null,
  amount_minor      bigint not null,
  currency          text not null,
  processed_at      timestamptz,
  created_at        timestamptz not null default private.clock_now(),
  updated_at        timestamptz not null default private.clock_now(),
  constraint refunds_tenant_key unique (organization_id, id),
  constraint refunds_gateway_key unique (gateway, gateway_refund_id),
  constraint refunds_payment_fkey foreign key (organization_id, payment_id)
    references public.payments (organization_id, id) on delete restrict,
  constraint refunds_refund_format check (gateway_refund_id ~ '^[A-Za-z0-9_.:/-]{1,255}$'),
  constraint refunds_amount_positive check (amount_minor > 0),
  constraint refunds_currency_format check (currency ~ '^[A-Z]{3}$'),
  constraint refunds_processed_has_time check ((status = 'processed') = (processed_at is not null))
);

create index idx_refunds_payment on public.refunds (organization_id, payment_id);

revoke all on public.refunds from anon, authenticated, service_role;
grant select on public.refunds to authenticated, service_role;
alter table public.refunds enable row level security;
alter table public.refunds force row level security;
create policy "Members who may see billing see the refunds" on public.refunds
  for select to authenticated using (organization_id = (select private.org_with('billing.view')));

comment on table public.refunds is
  'Money that went back, as the gateways report it. What it means for an invoice is said by a credit note, not by a refund.';

-- Credit notes --------------------------------------------------------------------------------------------------------------------

create table private.credit_note_series (
  month       text primary key,
  last_number integer not null default 0,
  constraint credit_note_series_month_format check (month ~ '^[0-9]{6}$'),
  constraint credit_note_series_number_range check (last_number between 0 and 1399999)
);
select private.close_table('private.credit_note_series');

comment on table private.credit_note_series is
  'The last credit note number of each month, as invoice_series is for invoices. Its row lock makes numbers gap-free.';

create table public.credit_notes (
  id                 uuid primary key default gen_random_uuid(),
  organization_id    uuid not null references public.organizations (id) on delete restrict,
  invoice_id         uuid not null,
  credit_note_number text,
  status             public.credit_note_status not null default 'draft',
  idempotency_key    text not null,
  reason             text not null,
  currency           text not null,
  subtotal_minor     bigint not null,
  tax_minor          bigint not null,
  total_minor        bigint not null,
  issuer             jsonb not null,
  customer           jsonb not null,
  credit_note_date   date,
  issued_at          timestamptz,
  irn                text,
  ack_no             text,
  signed_qr          text,
  created_by         uuid,
  created_at         timestamptz not null default private.clock_now(),
  constraint credit_notes_tenant_key unique (organization_id, id),
  constraint credit_notes_number_key unique (credit_note_number),
  constraint credit_notes_idempotency_key unique (organization_id, idempotency_key),
  constraint credit_notes_invoice_fkey foreign key (organization_id, invoice_id)
    references public.invoices (organization_id, id) on delete restrict,
  constraint credit_notes_number_format check (credit_note_number ~ '^CR[A-N]-[0-9]{6}-[0-9]{5}$'),
  constraint credit_notes_numbered_once_issued check ((status = 'draft') = (credit_note_number is null)),
  constraint credit_notes_dated_once_issued check (status = 'draft' or (credit_note_date is not null and issued_at is not null)),
  constraint credit_notes_key_present check (length(idempotency_key) between 1 and 255),
  constraint credit_notes_reason_present check (btrim(reason) <> ''),
  constraint credit_notes_currency_format check (currency ~ '^[A-Z]{3}$'),
  constraint credit_notes_amounts_not_negative check (subtotal_minor > 0 and tax_minor >= 0),
  constraint credit_notes_total_adds_up check (total_minor = subtotal_minor + tax_minor),
  constraint credit_notes_issuer_object check (jsonb_typeof(issuer) = 'object'),
  constraint credit_notes_customer_object check (jsonb_typeof(customer) = 'object')
);

create index idx_credit_notes_invoice on public.credit_notes (organization_id, invoice_id);

revoke all on public.credit_notes from anon, authenticated, service_role;
grant select on public.credit_notes to authenticated, service_role;
alter table public.credit_notes enable row level security;
alter table public.credit_notes force row level security;
create policy "Members who may see billing see the credit notes" on public.credit_notes
  for select to authenticated using (organization_id = (select private.org_with('billing.view')) and status <> 'draft');

comment on table public.credit_notes is
  'What takes back an invoice, in part or in full. All credit notes of an invoice together never exceed it, line by line, tax by tax.';
comment on column public.credit_notes.credit_note_number is
  'CRN-YYYYMM-NNNNN, of a series of its own without gaps, given when it is issued; 16 characters, as India''s Rule 53 has it.';
comment on column public.credit_notes.idempotency_key is 'Whoever issues the same again under this key issues nothing.';
comment on column public.credit_notes.issuer is 'Our particulars, as they are on the invoice.';
comment on column public.credit_notes.customer is 'The organization''s particulars, as they are on the invoice.';
comment on column public.credit_notes.irn is 'Reference number of India''s e-invoice portal, when it was registered there.';
comment on column public.credit_notes.created_by is 'The user who issued it; null is the platform. No foreign key: the record outlives the user.';

create table public.credit_note_lines (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null,
  credit_note_id  uuid not null,
  invoice_line_id uuid not null,
  position        integer not null,
  description     text not null,
  amount_minor    bigint not null,
  constraint credit_note_lines_tenant_key unique (organization_id, id),
  constraint credit_note_lines_position_key unique (organization_id, credit_note_id, position),
  constraint credit_note_lines_line_key unique (organization_id, credit_note_id, invoice_line_id),
  constraint credit_note_lines_credit_note_fkey foreign key (organization_id, credit_note_id)
    references public.credit_notes (organization_id, id) on delete restrict,
  constraint credit_note_lines_invoice_line_fkey foreign key (organization_id, invoice_line_id)
    references public.invoice_lines (organization_id, id) on delete restrict,
  constraint credit_note_lines_description_present check (btrim(description) <> ''),
  constraint credit_note_lines_amount_positive check (amount_minor > 0)
);

create index idx_credit_note_lines_invoice_line on public.credit_note_lines (organization_id, invoice_line_id);

revoke all on public.credit_note_lines from anon, authenticated, service_role;
grant select on public.credit_note_lines to authenticated, service_role;
alter table public.credit_note_lines enable row level security;
alter table public.credit_note_lines force row level security;
create policy "Members who may see billing see the credit notes' lines" on public.credit_note_lines
  for select to authenticated using (organization_id = (select private.org_with('billing.view')));

comment on table public.credit_note_lines is 'What a credit note takes back, invoice line by invoice line.';
comment on column public.credit_note_lines.amount_minor is 'What is taken back of the invoice line, before tax; positive.';

create table public.credit_note_taxes (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null,
  credit_note_id  uuid not null,
  position        integer not null,
  name            text not null,
  rate_bp         integer not null,
  taxable_minor   bigint not null,
  amount_minor    bigint not null,
  constraint credit_note_taxes_tenant_key unique (organization_id, id),
  constraint credit_note_taxes_name_key unique (organization_id, credit_note_id, name),
  constraint credit_note_taxes_credit_note_fkey foreign key (organization_id, credit_note_id)
    references public.credit_notes (organization_id, id) on delete restrict,
  constraint credit_note_taxes_rate_range check (rate_bp between 0 and 10000),
  constraint credit_note_taxes_amounts_not_negative check (taxable_minor >= 0 and amount_minor >= 0)
);

revoke all on public.credit_note_taxes from anon, authenticated, service_role;
grant select on public.credit_note_taxes to authenticated, service_role;
alter table public.credit_note_taxes enable row level security;
alter table public.credit_note_taxes force row level security;
create policy "Members who may see billing see the credit notes' taxes" on public.credit_note_taxes
  for select to authenticated using (organization_id = (select private.org_with('billing.view')));

comment on table public.credit_note_taxes is
  'The taxes of a credit note, one row a component: what the invoice''s tax is on all that was credited so far, less what it was before. '
  'So that crediting an invoice piece by piece takes back its tax to the unit.';

-- Walls around payments and credit notes ------------------------------------------------------------------------------------------

create function private.credit_note_number(month text, number integer) returns text
language sql immutable set search_path = ''
as $$
  select case
    when number between 1 and 99999 then 'CRN-' || month || '-' || lpad(number::text, 5, '0')
    when number between 100000 and 1399999 then
      'CR' || chr(64 + number / 100000) || '-' || month || '-' || lpad((number % 100000)::text, 5, '0')
  end
$$;
comment on function private.credit_note_number(text, integer) is
  'The text of a month''s n-th number: CRN-202601-00001 to CRN-202601-99999, then CRA-202601-00000 and on to CRM; null when the month is '
  'full.';

create function private.take_credit_note_number(month text) returns integer
language sql set search_path = ''
as $$
  insert into private.credit_note_series as series (month, last_number)
  values ($1, 1)
  on conflict on constraint credit_note_series_pkey do update set last_number = series.last_number + 1
  returning last_number
$$;
comment on function private.take_credit_note_number(text) is
  'Takes a month''s next number. Locks the month until the transaction ends: take it last.';

create function private.guard_credit_note() returns trigger
language plpgsql set search_path = ''
as $$
begin
  if tg_op = 'DELETE' then
    if old.status <> 'draft' then
      raise exception 'credit note % is final and is never deleted', old.credit_note_number using errcode = '23514';
    end if;
    return old;
  end if;
  if tg_op = 'INSERT' then
    if new.status <> 'draft' then
      raise exception 'a credit note is a draft before it is issued' using errcode = '23514';
    end if;
    return new;
  end if;
  if old.status = 'draft' then
    if new.status = 'issued' and new.credit_note_number is null then
      new.issued_at := coalesce(new.issued_at, private.clock_now());
      new.credit_note_date := coalesce(new.credit_note_date, (new.issued_at at time zone (new.issuer ->> 'timezone'))::date);
    end if;
    return new;
  end if;
  if to_jsonb(new) - array['irn', 'ack_no', 'signed_qr'] is distinct from to_jsonb(old) - array['irn', 'ack_no', 'signed_qr'] then
    raise exception 'credit note % is final', old.credit_note_number using errcode = '23514';
  end if;
  return new;
end
$$;
comment on function private.guard_credit_note() is 'Trigger: a credit note goes from draft to issued, and is final then.';

create function private.set_credit_note_number() returns trigger
language plpgsql set search_path = ''
as $$
declare
  month text;
begin
  if new.status = 'issued' and new.credit_note_number is null then
    -- The invoice before the series, as whoever changes an invoice holds its row already.
    perform
    from public.invoices as invoice
    where invoice.organization_id = new.organization_id
      and invoice.id = new.invoice_id
      and invoice.currency = new.currency
      and invoice.status in ('open', 'paid', 'uncollectible')
    for no key update;
    if not found then
      raise exception 'a credit note is issued against a final invoice of its currency' using errcode = '23514';
    end if;
    month := private.series_month(new.issued_at, new.issuer ->> 'timezone');
    new.credit_note_number := private.credit_note_number(month, private.take_credit_note_number(month));
  end if;
  return new;
end
$$;
comment on function private.set_credit_note_number() is
  'Trigger: a credit note that is issued locks its invoice and gets the month''s next number, by the issuer''s time zone.';

create function private.count_credit_note() returns trigger
language plpgsql set search_path = ''
as $$
begin
  update public.invoices as invoice
  set credited_minor = invoice.credited_minor + new.total_minor
  where invoice.organization_id = new.organization_id and invoice.id = new.invoice_id;
  return null;
end
$$;
comment on function private.count_credit_note() is
  'Trigger: a credit note that was issued is counted on its invoice, which refuses more than its total.';

create function private.guard_credit_note_parts() returns trigger
language plpgsql set search_path = ''
as $$
begin
  if exists (
    select
    from changed
    join public.credit_notes as note on note.organization_id = changed.organization_id and note.id = changed.credit_note_id
    where note.status <> 'draft'
  ) then
    raise exception 'the lines and taxes of a credit note are final once it is issued' using errcode = '23514';
  end if;
  return null;
end
$$;
comment on function private.guard_credit_note_parts() is 'Trigger: lines and taxes change only while their credit note is a draft.';

create function private.check_credit_note_sums() returns trigger
language plpgsql set search_path = ''
as $$
declare
  lines bigint;
  taxes bigint;
begin
  select coalesce(sum(line.amount_minor), 0)::bigint
  into lines
  from public.credit_note_lines as line
  where line.organization_id = new.organization_id and line.credit_note_id = new.id;
  select coalesce(sum(tax.amount_minor), 0)::bigint
  into taxes
  from public.credit_note_taxes as tax
  where tax.organization_id = new.organization_id and tax.credit_note_id = new.id;
  if lines <> new.subtotal_minor or taxes <> new.tax_minor then
    raise exception 'credit note %: lines of % and taxes of % do not make a subtotal of % and a tax of %',
      new.credit_note_number, lines, taxes, new.subtotal_minor, new.tax_minor using errcode = '23514';
  end if;

  if exists (
    select
    from public.credit_note_lines as line
    join public.invoice_lines as billed on billed.organization_id = line.organization_id and billed.id = line.invoice_line_id
    where line.organization_id = new.organization_id
      and line.credit_note_id = new.id
      and (
        billed.invoice_id <> new.invoice_id
        or billed.amount_minor - billed.discount_minor < (
          select sum(other.amount_minor)
          from public.credit_note_lines as other
          join public.credit_notes as note on note.organization_id = other.organization_id and note.id = other.credit_note_id
          where other.organization_id = line.organization_id and other.invoice_line_id = billed.id and note.status = 'issued'
        )
      )
  ) or exists (
    select
    from public.credit_note_taxes as tax
    where tax.organization_id = new.organization_id
      and tax.credit_note_id = new.id
      and coalesce((
        select billed.amount_minor
        from public.invoice_taxes as billed
        where billed.organization_id = tax.organization_id and billed.invoice_id = new.invoice_id and billed.name = tax.name
      ), 0) < (
        select sum(other.amount_minor)
        from public.credit_notes as note
        join public.credit_note_taxes as other on other.organization_id = note.organization_id and other.credit_note_id = note.id
        where note.organization_id = new.organization_id
          and note.invoice_id = new.invoice_id
          and note.status = 'issued'
          and other.name = tax.name
      )
  ) then
    raise exception 'credit note % takes back more than was billed', new.credit_note_number using errcode = '23514';
  end if;
  return null;
end
$$;
comment on function private.check_credit_note_sums() is
  'Trigger, at the end of the transaction: an issued credit note''s lines make its subtotal and its taxes its tax, and neither a line nor '
  'a tax of the invoice is taken back more than once.';

create function private.guard_payment() returns trigger
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
comment on function private.guard_payment() is
  'Trigger: a payment that came stays paid; who paid what, and what was counted or paid back of it, is never taken back.';

create function private.apply_payment() returns trigger
language plpgsql set search_path = ''
as $$
begin
  update public.invoices as invoice
  set amount_paid_minor = invoice.amount_paid_minor + new.applied_minor - case tg_op when 'UPDATE' then old.applied_minor else 0 end
  where invoice.organization_id = new.organization_id
    and invoice.id = new.invoice_id
    and invoice.currency = new.currency
    and invoice.status in ('open', 'uncollectible');
  if not found then
    raise exception 'a payment is counted on an open invoice of its currency' using errcode = '23514';
  end if;
  return null;
end
$$;
comment on function private.apply_payment() is 'Trigger: what is counted of a payment is counted on its invoice.';

create function private.check_invoice_settlement() returns trigger
language plpgsql set search_path = ''
as $$
declare
  paid bigint;
  credited bigint;
begin
  select coalesce(sum(payment.applied_minor), 0)::bigint
  into paid
  from public.payments as payment
  where payment.organization_id = new.organization_id and payment.invoice_id = new.id;
  select coalesce(sum(note.total_minor), 0)::bigint
  into credited
  from public.credit_notes as note
  where note.organization_id = new.organization_id and note.invoice_id = new.id and note.status = 'issued';
  if exists (
    select
    from public.invoices as invoice
    where invoice.organization_id = new.organization_id
      and invoice.id = new.id
      and (invoice.amount_paid_minor, invoice.credited_minor) <> (paid, credited)
  ) then
    raise exception 'invoice %: payments make % and credit notes %', new.invoice_number, paid, credited using errcode = '23514';
  end if;
  return null;
end
$$;
comment on function private.check_invoice_settlement() is
  'Trigger, at the end of the transaction: what an invoice says was paid and credited is what its payments and credit notes say.';

create function private.guard_refund() returns trigger
language plpgsql set search_path = ''
as $$
begin
  if to_jsonb(new) - array['status', 'processed_at', 'updated_at'] is distinct from to_jsonb(old) - array['status', 'processed_at', 'updated_at']
    or old.status <> 'pending' and new.status <> old.status then
    raise exception 'refund % is final', old.id using errcode = '23514';
  end if;
  return new;
end
$$;
comment on function private.guard_refund() is 'Trigger: a refund goes from pending to processed or failed, and nothing else changes.';

create function private.apply_refund() returns trigger
language plpgsql set search_path = ''
as $$
begin
  update public.payments as payment
  set
    refunded_minor = payment.refunded_minor + new.amount_minor,
    status = case when payment.refunded_minor + new.amount_minor = payment.amount_minor then 'refunded' else payment.status end
  where payment.organization_id = new.organization_id
    and payment.id = new.payment_id
    and payment.currency = new.currency
    and payment.gateway = new.gateway;
  if not found then
    raise exception 'a refund is in the currency and of the gateway of its payment' using errcode = '23514';
  end if;
  return null;
end
$$;
comment on function private.apply_refund() is
  'Trigger: a processed refund is counted on its payment, which refuses more than was paid, or anything before it was.';

create trigger update_modified_column before update on public.payment_methods
  for each row execute function private.update_modified_column();
create trigger payment_methods_are_kept before delete or truncate on public.payment_methods
  for each statement execute function private.refuse_money_change();

create trigger guard_payment before update on public.payments
  for each row execute function private.guard_payment();
create trigger update_modified_column before update on public.payments
  for each row execute function private.update_modified_column();
create trigger payments_are_kept before delete or truncate on public.payments
  for each statement execute function private.refuse_money_change();
create trigger payment_is_counted_on_insert after insert on public.payments
  for each row when (new.applied_minor <> 0) execute function private.apply_payment();
create trigger payment_is_counted after update on public.payments
  for each row when (new.applied_minor <> old.applied_minor) execute function private.apply_payment();

create trigger guard_refund before update on public.refunds
  for each row execute function private.guard_refund();
create trigger update_modified_column before update on public.refunds
  for each row execute function private.update_modified_column();
create trigger refunds_are_kept before delete or truncate on public.refunds
  for each statement execute function private.refuse_money_change();
create trigger refund_is_counted_on_insert after insert on public.refunds
  for each row when (new.status = 'processed') execute function private.apply_refund();
create trigger refund_is_counted after update on public.refunds
  for each row when (new.status = 'processed' and old.status <> 'processed') execute function private.apply_refund();

create constraint trigger invoices_are_settled_on_insert after insert on public.invoices
  deferrable initially deferred
  for each row when (new.amount_paid_minor <> 0 or new.credited_minor <> 0) execute function private.check_invoice_settlement();
create constraint trigger invoices_are_settled after update on public.invoices
  deferrable initially deferred
  for each row when (new.amount_paid_minor <> old.amount_paid_minor or new.credited_minor <> old.credited_minor)
  execute function private.check_invoice_settlement();

create trigger guard_credit_note before insert or update or delete on public.credit_notes
  for each row execute function private.guard_credit_note();
create trigger set_credit_note_number_trigger before update of status on public.credit_notes
  for each row execute function private.set_credit_note_number();
create trigger credit_note_is_counted after update on public.credit_notes
  for each row when (new.status = 'issued' and old.status <> 'issued') execute function private.count_credit_note();
create trigger credit_notes_are_kept before truncate on public.credit_notes
  for each statement execute function private.refuse_money_change();
create constraint trigger credit_notes_add_up after insert or update on public.credit_notes
  deferrable initially deferred
  for each row when (new.status = 'issued') execute function private.check_credit_note_sums();

create trigger credit_note_lines_inserted after insert on public.credit_note_lines
  referencing new table as changed for each statement execute function private.guard_credit_note_parts();
create trigger credit_note_lines_updated after update on public.credit_note_lines
  referencing old table as changed for each statement execute function private.guard_credit_note_parts();
create trigger credit_note_lines_moved after update on public.credit_note_lines
  referencing new table as changed for each statement execute function private.guard_credit_note_parts();
create trigger credit_note_lines_deleted after delete on public.credit_note_lines
  referencing old table as changed for each statement execute function private.guard_credit_note_parts();
create trigger credit_note_taxes_inserted after insert on public.credit_note_taxes
  referencing new table as changed for each statement execute function private.guard_credit_note_parts();
create trigger credit_note_taxes_updated after update on public.credit_note_taxes
  referencing old table as changed for each statement execute function private.guard_credit_note_parts();
create trigger credit_note_taxes_moved after update on public.credit_note_taxes
  referencing new table as changed for each statement execute function private.guard_credit_note_parts();
create trigger credit_note_taxes_deleted after delete on public.credit_note_taxes
  referencing old table as changed for each statement execute function private.guard_credit_note_parts();

revoke all on function
  private.has_card_number(text), private.credit_note_number(text, integer), private.take_credit_note_number(text),
  private.guard_credit_note(), private.set_credit_note_number(), private.count_credit_note(), private.guard_credit_note_parts(),
  private.check_credit_note_sums(),
  private.guard_payment(), private.apply_payment(), private.check_invoice_settlement(), private.guard_refund(), private.apply_refund()
from public;
