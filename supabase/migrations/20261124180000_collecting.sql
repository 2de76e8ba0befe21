-- Who owes is asked for money by itself: charges by mandate and payment links, once each, and what became of them.
set local lock_timeout = '5s';
set local statement_timeout = '60s';

-- Where we ask --------------------------------------------------------------------------------------------------------------------

create table private.payment_accounts (
  id                 uuid primary key default gen_random_uuid(),
  gateway            public.payment_gateway not null,
  name               text,
  credentials_sealed text not null,
  api_base           text not null,
  return_url         text,
  currencies         text[],
  priority           integer not null default 100,
  is_active          boolean not null default true,
  created_at         timestamptz not null default private.clock_now(),
  constraint payment_accounts_gateway_key unique (gateway),
  constraint payment_accounts_gateway_asked check (gateway <> 'manual'),
  constraint payment_accounts_sealed check (credentials_sealed like 'v1.%'),
  constraint payment_accounts_api_base_format check (api_base ~ '^https?://'),
  constraint payment_accounts_return_url_format check (return_url ~ '^https?://'),
  constraint payment_accounts_return_url_given check (gateway <> 'stripe' or return_url is not null)
);
select private.close_table('private.payment_accounts');

comment on table private.payment_accounts is 'The platform''s account at each payment gateway, its keys sealed for the row''s id.';
comment on column private.payment_accounts.credentials_sealed is
  'Stripe''s {"secret_key"}, Razorpay''s {"key_id","key_secret"}: a JSON object, sealed as a carrier account''s.';
comment on column private.payment_accounts.return_url is 'Where somebody is sent who has paid or agreed at the gateway; Stripe asks for one.';
comment on column private.payment_accounts.currencies is 'Which currencies it takes; null is all.';
comment on column private.payment_accounts.priority is 'Of several that take a currency, the lowest makes the payment link.';

create table private.mandate_rules (
  gateway       public.payment_gateway not null,
  type          public.payment_method_type not null,
  currency      text not null default '*',
  notice_hours  integer not null default 0,
  limit_minor   bigint,
  attempts      integer not null,
  spacing_hours integer not null,
  closed_hours  text[] not null default '{}',
  timezone      text not null default 'UTC',
  source        text not null,
  constraint mandate_rules_pkey primary key (gateway, type, currency),
  constraint mandate_rules_currency_format check (currency = '*' or currency ~ '^[A-Z]{3}$'),
  constraint mandate_rules_notice_range check (notice_hours between 0 and 240),
  constraint mandate_rules_limit_positive check (limit_minor > 0),
  constraint mandate_rules_attempts_range check (attempts between 1 and 15),
  constraint mandate_rules_spacing_range check (spacing_hours between 1 and 720),
  constraint mandate_rules_closed_hours_format check (
    array_to_string(closed_hours, ',') ~ '^((^|,)[0-2][0-9]:[0-5][0-9]-[0-2][0-9]:[0-5][0-9])*$'
  ),
  constraint mandate_rules_source_named check (btrim(source) <> '')
);
select private.close_table('private.mandate_rules');
create trigger check_timezone before insert or update of timezone on private.mandate_rules
  for each row execute function private.check_timezone();

comment on table private.mandate_rules is
  'How a saved payment method may be charged without its holder. What has no row here is not charged: a payment link is sent.';
comment on column private.mandate_rules.currency is '* is every currency that has no row of its own.';
comment on column private.mandate_rules.notice_hours is
  'How long before the debit the gateway has to be told of it, so that it tells the holder; 0 where the gateway sees to that by itself.';
comment on column private.mandate_rules.limit_minor is 'Above it the holder has to take part; null is no limit.';
comment on column private.mandate_rules.attempts is 'How often one invoice is charged at most, the first time included.';
comment on column private.mandate_rules.spacing_hours is 'How long after one attempt the next may be.';
comment on column private.mandate_rules.closed_hours is 'In which hours nothing is debited, as 10:00-13:00, in timezone.';
comment on column private.mandate_rules.source is 'Who says so. Have a professional confirm it.';

insert into private.mandate_rules (gateway, type, currency, notice_hours, limit_minor, attempts, spacing_hours, closed_hours, timezone, source)
values
  ('razorpay', 'upi', 'INR', 25, 1500000, 4, 24, '{10:00-13:00,17:00-21:30}', 'Asia/Kolkata',
    'RBI e-mandate framework (notice of 24 hours, INR 15,000 without additional factor); NPCI, from 1 August 2025: one attempt and three '
    'retries, outside peak hours; Razorpay: debits 25 hours after the notification'),
  ('razorpay', 'card', 'INR', 37, 1500000, 4, 24, '{}', 'Asia/Kolkata',
    'RBI e-mandate framework (notice of 24 hours, INR 15,000 without additional factor); Razorpay: debits cards 36 hours and 5 minutes '
    'after the notification'),
  ('razorpay', 'bank_transfer', 'INR', 25, 1500000, 3, 72, '{}', 'Asia/Kolkata',
    'RBI e-mandate framework, taken for bank mandates too, as the stricter rule'),
  ('razorpay', 'razorpay', 'INR', 37, 1500000, 3, 24, '{10:00-13:00,17:00-21:30}', 'Asia/Kolkata',
    'Of a token whose method is not known the strictest of the rules above'),
  ('stripe', 'card', 'INR', 0, 1500000, 1, 24, '{}', 'Asia/Kolkata',
    'RBI e-mandate framework; Stripe sends the notice itself and holds the debit for it, and does not retry cards issued in India'),
  ('stripe', 'upi', 'INR', 0, 1500000, 1, 24, '{10:00-13:00,17:00-21:30}', 'Asia/Kolkata',
    'RBI e-mandate framework; NPCI peak hours; Stripe sends the notice itself'),
  ('stripe', 'stripe', 'INR', 0, 1500000, 1, 24, '{}', 'Asia/Kolkata', 'As a card of India'),
  ('stripe', 'card', '*', 0, null, 4, 24, '{}', 'UTC',
    'Visa and Mastercard allow more than four in 30 days; a code of category 1 (never try again) is a hard decline'),
  ('stripe', 'stripe', '*', 0, null, 4, 24, '{}', 'UTC', 'As a card'),
  ('stripe', 'bank_transfer', '*', 0, null, 3, 72, '{}', 'UTC', 'Nacha: a returned debit is presented again twice at most')
on conflict do nothing;

create table private.decline_codes (
  gateway public.payment_gateway not null,
  code    text not null,
  kind    text not null,
  constraint decline_codes_pkey primary key (gateway, code),
  constraint decline_codes_kind_known check (kind in ('hard', 'authentication'))
);
select private.close_table('private.decline_codes');

comment on table private.decline_codes is
  'What a refusal means. hard: this method is never charged again, a new one is asked for; authentication: its holder has to take part, '
  'by a payment link. Any other code is soft: it may go better another day.';

insert into private.decline_codes (gateway, code, kind)
select 'stripe'::public.payment_gateway, code, 'hard'
from unnest(array[
  'account_closed', 'card_not_supported', 'debit_not_authorized', 'expired_card', 'fraudulent', 'incorrect_number', 'invalid_account',
  'invalid_number', 'lost_card', 'mandate_invalid', 'merchant_blacklist', 'new_account_information_available', 'payment_intent_mandate_invalid',
  'payment_method_not_available', 'pickup_card', 'resource_missing', 'restricted_card', 'revocation_of_all_authorizations',
  'revocation_of_authorization', 'security_violation', 'stolen_card', 'stop_payment_order'
]) as code
union all
select 'stripe'::public.payment_gateway, code, 'authentication'
from unnest(array['authentication_required', 'authentication_not_handled', 'approve_with_id', 'offline_pin_required', 'online_or_offline_pin_required']) as code
union all
select 'razorpay'::public.payment_gateway, code, 'hard'
from unnest(array[
  'bank_account_invalid', 'card_blocked', 'card_expired', 'card_lost_or_stolen', 'card_number_invalid', 'debit_instrument_blocked',
  'debit_instrument_inactive', 'mandate_cancelled', 'mandate_expired', 'mandate_paused', 'mandate_revoked', 'token_cancelled',
  'token_expired', 'token_not_found', 'token_rejected'
]) as code
union all
select 'razorpay'::public.payment_gateway, code, 'authentication'
from unnest(array['authentication_failed', 'amount_exceeds_mandate_limit', 'payment_declined_afa_required']) as code
on conflict do nothing;


-- What we ask ---------------------------------------------------------------------------------------------------------------------

create table private.gateway_requests (
  id                uuid primary key default private.uuid_v7(),
  organization_id   uuid not null references public.organizations (id) on delete restrict,
  kind              text not null,
  gateway           public.payment_gateway not null,
  invoice_id        uuid,
  payment_method_id uuid,
  payment_id        uuid,
  credit_note_id    uuid,
  retry_number      integer,
  method            text,
  amount_minor      bigint,
  currency          text,
  state             text not null default 'waiting',
  not_before        timestamptz not null,
  notify_at         timestamptz,
  noticed_at        timestamptz,
  submitted_at      timestamptz,
  asked_at          timestamptz,
  submission        integer not null default 0,
  lease_until       timestamptz,
  cancel_wanted     boolean not null default false,
  order_ref         text,
  reference         text,
  url               text,
  url_expires_at    timestamptz,
  failure_code      text,
  failure_kind      text,
  created_by        uuid,
  created_at        timestamptz not null,
  finished_at       timestamptz,
  constraint gateway_requests_invoice_fkey foreign key (organization_id, invoice_id)
    references public.invoices (organization_id, id) on delete restrict,
  constraint gateway_requests_payment_method_fkey foreign key (organization_id, payment_method_id)
    references public.payment_methods (organization_id, id) on delete restrict,
  constraint gateway_requests_payment_fkey foreign key (organization_id, payment_id)
    references public.payments (organization_id, id) on delete restrict,
  constraint gateway_requests_credit_note_fkey foreign key (organization_id, credit_note_id)
    references public.credit_notes (organization_id, id) on delete restrict,
  constraint gateway_requests_kind_fits check (
    case kind
      when 'charge' then invoice_id is not null and payment_method_id is not null
      when 'link' then invoice_id is not null
      when 'refund' then payment_id is not null
      when 'setup' then invoice_id is null
      when 'revoke' then payment_method_id is not null
      else false
    end
  ),
  constraint gateway_requests_amount_fits check (
    kind in ('setup', 'revoke') or amount_minor > 0 and currency is not null and currency ~ '^[A-Z]{3}$'
  ),
  constraint gateway_requests_state_known check (
    state in ('waiting', 'submitting', 'open', 'unknown', 'succeeded', 'failed', 'cancelled')
  ),
  constraint gateway_requests_finished check ((finished_at is not null) = (state in ('succeeded', 'failed', 'cancelled'))),
  constraint gateway_requests_submitted check (state not in ('submitting', 'open', 'unknown') or submission > 0),
  constraint gateway_requests_failure_known check (failure_kind in ('hard', 'authentication', 'soft', 'refused'))
);

-- While the gateway may take money for an invoice by one way, it is not asked by another: whatever a handler believes.
create unique index idx_gateway_requests_asked on private.gateway_requests (organization_id, invoice_id)
  where kind in ('charge', 'link') and state in ('submitting', 'open', 'unknown');
create unique index idx_gateway_requests_live on private.gateway_requests (organization_id, invoice_id, kind)
  where kind in ('charge', 'link') and state in ('waiting', 'submitting', 'open', 'unknown');
create unique index idx_gateway_requests_retry on private.gateway_requests (organization_id, invoice_id, retry_number)
  where kind = 'charge' and retry_number is not null and state <> 'cancelled';
create unique index idx_gateway_requests_credit_note on private.gateway_requests (organization_id, credit_note_id, payment_id)
  where kind = 'refund' and state not in ('failed', 'cancelled');
create index idx_gateway_requests_invoice on private.gateway_requests (organization_id, invoice_id, created_at);
create index idx_gateway_requests_payment_method on private.gateway_requests (organization_id, payment_method_id)
  where payment_method_id is not null;
create index idx_gateway_requests_payment on private.gateway_requests (organization_id, payment_id) where payment_id is not null;
create index idx_gateway_requests_note on private.gateway_requests (organization_id, credit_note_id) where credit_note_id is not null;
create index idx_gateway_requests_waiting on private.gateway_requests (not_before) where state = 'waiting';
create index idx_gateway_requests_setups on private.gateway_requests (organization_id) where kind = 'setup' and finished_at is null;
create index idx_gateway_requests_leased on private.gateway_requests (lease_until) where state in ('submitting', 'open', 'unknown');
select private.close_table('private.gateway_requests');

comment on table private.gateway_requests is
  'What a payment gateway is asked for, a row before it hears of it: to charge a saved method, to make a payment link, to pay back, to save '
  'a method or to forget one. Its id is the key by which the gateway knows the same request again.';
comment on column private.gateway_requests.retry_number is 'Which of an invoice''s payment_retries it is; 0 is the charge on its due date, null one by hand.';
comment on column private.gateway_requests.state is
  'waiting until its time; submitting while a handler asks; open: the gateway has it; unknown: it may have it, and is asked what it knows '
  'before anything is sent again; then succeeded, failed or cancelled for good.';
comment on column private.gateway_requests.not_before is 'In business time: the moment of the debit.';
comment on column private.gateway_requests.notify_at is 'When the gateway is told of the debit, so that it tells the holder; null where nobody has to be.';
comment on column private.gateway_requests.asked_at is 'In real time: when it was last sent to the gateway.';
comment on column private.gateway_requests.submission is 'Which sending this is: what a handler says of an earlier one is too late.';
comment on column private.gateway_requests.lease_until is 'In real time: until then a handler has it, or the gateway''s news is waited for.';
comment on column private.gateway_requests.order_ref is 'The order at Razorpay that the charge is tied to: it is paid once at most.';
comment on column private.gateway_requests.reference is 'The gateway''s id: of the payment, the link, the refund.';

alter table private.payment_retries add column planned_at timestamptz;
-- Before the first release no installation is in use: the table is small.
-- squawk-ignore require-concurrent-index-creation
create index idx_payment_retries_unplanned on private.payment_retries (due_at) where planned_at is null;
comment on column private.payment_retries.planned_at is 'When a charge or a link was planned for it; also set once nothing is due any more.';

create table private.payment_customers (
  gateway         public.payment_gateway not null,
  customer_id     text not null,
  organization_id uuid not null references public.organizations (id) on delete cascade,
  created_at      timestamptz not null,
  constraint payment_customers_pkey primary key (gateway, customer_id),
  constraint payment_customers_id_format check (customer_id ~ '^[A-Za-z0-9_.:-]{1,255}$')
);
create index idx_payment_customers_organization on private.payment_customers (organization_id);
select private.close_table('private.payment_customers');
comment on table private.payment_customers is
  'As whom a gateway knows an organization since it was asked for a mandate: a token that comes later names the customer and not us.';


-- What may be charged -------------------------------------------------------------------------------------------------------------

create function private.after_closed_hours(moment timestamptz, closed text[], zone text) returns timestamptz
language plpgsql stable set search_path = ''
as $$
declare
  hours text;
  wall timestamp;
begin
  foreach hours in array closed loop
    wall := moment at time zone zone;
    if wall::time >= split_part(hours, '-', 1)::time and wall::time < split_part(hours, '-', 2)::time then
      moment := (wall::date + split_part(hours, '-', 2)::time) at time zone zone;
    end if;
  end loop;
  return moment;
end
$$;
comment on function private.after_closed_hours(timestamptz, text[], text) is
  'The first moment from then on that lies in none of the closed hours, which are in order and do not touch.';

create type private.mandate_way as (method public.payment_methods, rule private.mandate_rules, obstacle text);
comment on type private.mandate_way is 'By which saved method an invoice may be charged and under which rule, or why not.';

create function private.mandate_of(invoice public.invoices, at timestamptz) returns private.mandate_way
language plpgsql stable set search_path = ''
as $$
declare
  due bigint := invoice.total_minor - invoice.amount_paid_minor - invoice.credited_minor;
  most bigint := (select (own.mandate_limits ->> invoice.currency)::bigint from private.dunning_policy as own);
  method public.payment_methods;
  rule private.mandate_rules;
  obstacle text;
begin
  select own.* into method
  from public.payment_methods as own
  where own.organization_id = invoice.organization_id and own.is_default and own.removed_at is null;
  select own.* into rule
  from private.mandate_rules as own
  where own.gateway = method.gateway and own.type = method.type and own.currency in (invoice.currency, '*')
  order by own.currency desc
  limit 1;
  obstacle := case
    when invoice.status <> 'open' or due <= 0 then 'nothing_due'
    when method.gateway_customer_id is null or rule.gateway is null or not exists (
      select
      from private.payment_accounts as account
      where account.gateway = method.gateway and account.is_active
        and (account.currencies is null or invoice.currency = any (account.currencies))
    ) then 'no_mandate'
    when method.expiry_year * 12 + method.expiry_month < extract(year from at) * 12 + extract(month from at) then 'method_expired'
    when due > coalesce(most, 0) or due > rule.limit_minor then 'above_mandate_limit'
    when rule.attempts <= (
      select count(*)
      from private.gateway_requests as past
      where past.organization_id = invoice.organization_id and past.invoice_id = invoice.id and past.kind = 'charge' and past.submission > 0
        and past.failure_kind is distinct from 'refused'
    ) then 'attempts_used'
  end;
  return row(method, rule, obstacle)::private.mandate_way;
end
$$;
comment on function private.mandate_of(public.invoices, timestamptz) is
  'The saved method by which what is due on an invoice may be charged, and the rule that holds for it; or why it may not.';

create function private.plan_charge(invoice public.invoices, number integer, wanted timestamptz, person uuid, at timestamptz)
returns private.gateway_requests
language plpgsql set search_path = ''
as $$
declare
  found_way private.mandate_way := private.mandate_of(invoice, at);
  rule private.mandate_rules;
  method public.payment_methods;
  debit timestamptz := greatest(wanted, at);
  planned private.gateway_requests;
begin
  if found_way.obstacle is not null then
    return null;
  end if;
  rule := found_way.rule;
  method := found_way.method;
  debit := greatest(debit, at + make_interval(hours => rule.notice_hours), (
    select max(past.submitted_at) + make_interval(hours => rule.spacing_hours)
    from private.gateway_requests as past
    where past.organization_id = invoice.organization_id and past.invoice_id = invoice.id and past.kind = 'charge'
  ));
  debit := private.after_closed_hours(debit, rule.closed_hours, rule.timezone);
  insert into private.gateway_requests (
    organization_id, kind, gateway, invoice_id, payment_method_id, retry_number, amount_minor, currency, not_before, notify_at, created_by,
    created_at
  )
  values (
    invoice.organization_id, 'charge', method.gateway, invoice.id, method.id, number,
    invoice.total_minor - invoice.amount_paid_minor - invoice.credited_minor, invoice.currency, debit,
    case when rule.notice_hours > 0 then greatest(at, debit - make_interval(hours => rule.notice_hours + 12)) end, person, at
  )
  on conflict do nothing
  returning * into planned;
  return planned;
end
$$;
comment on function private.plan_charge(public.invoices, integer, timestamptz, uuid, timestamptz) is
  'Plans to charge what is due on an invoice by its organization''s mandate, not before it is wanted, noticed and allowed; null where it may '
  'not be, or where it is planned already.';

create function private.noticed_debit(charge private.gateway_requests, at timestamptz) returns timestamptz
language sql stable set search_path = ''
as $$
  select coalesce((
    select private.after_closed_hours(
      greatest(charge.not_before, at + make_interval(hours => rule.notice_hours)), rule.closed_hours, rule.timezone
    )
    from public.payment_methods as method
    join private.mandate_rules as rule
      on rule.gateway = method.gateway and rule.type = method.type and rule.currency in (charge.currency, '*')
    where method.organization_id = charge.organization_id and method.id = charge.payment_method_id
    order by rule.currency desc
    limit 1
  ), charge.not_before)
$$;
comment on function private.noticed_debit(private.gateway_requests, timestamptz) is
  'When a charge may be debited whose notice is given only now.';

create function private.plan_link(invoice public.invoices, person uuid, at timestamptz) returns private.gateway_requests
language plpgsql set search_path = ''
as $$
declare
  due bigint := invoice.total_minor - invoice.amount_paid_minor - invoice.credited_minor;
  via public.payment_gateway;
  link private.gateway_requests;
begin
  select own.* into link
  from private.gateway_requests as own
  where own.organization_id = invoice.organization_id and own.invoice_id = invoice.id and own.kind = 'link'
    and own.state in ('waiting', 'submitting', 'open', 'unknown');
  if found then
    return case when link.amount_minor = due and not link.cancel_wanted and (link.url_expires_at is null or link.url_expires_at > now()) then link end;
  end if;
  select account.gateway into via
  from private.payment_accounts as account
  where account.is_active and (account.currencies is null or invoice.currency = any (account.currencies))
  order by account.priority, account.gateway
  limit 1;
  if not found then
    return null;
  end if;
  insert into private.gateway_requests (
    organization_id, kind, gateway, invoice_id, amount_minor, currency, not_before, created_by, created_at
  )
  values (invoice.organization_id, 'link', via, invoice.id, due, invoice.currency, at, person, at)
  on conflict do nothing
  returning * into link;
  return link;
end
$$;
comment on function private.plan_link(public.invoices, uuid, timestamptz) is
  'The payment link for what is due on an invoice: the one that there is, or a new one to be made; null while one for another amount has '
  'still to go, and where no gateway takes the currency.';

create function private.plan_collections(batch integer, at timestamptz) returns integer
language plpgsql set search_path = ''
as $$
declare
  policy private.dunning_policy;
  item record;
  invoice public.invoices;
  planned integer := 0;
begin
  if not exists (select from private.payment_accounts as account where account.is_active) then
    return 0;
  end if;
  select own.* into policy from private.dunning_policy as own;

  -- On its due date, for whoever has a mandate.
  for invoice in
    select own.*
    from public.invoices as own
    join public.payment_methods as saved
      on saved.organization_id = own.organization_id and saved.is_default and saved.removed_at is null
    cross join lateral private.mandate_of(own, at) as way
    where own.status = 'open' and own.past_due_at is null and own.due_date <= (at + interval '3 days')::date and way.obstacle is null
      and not exists (
        select
        from private.gateway_requests as known
        where known.organization_id = own.organization_id and known.invoice_id = own.id and known.kind = 'charge'
          and (known.state <> 'cancelled' or known.finished_at > at - interval '1 hour')
      )
    order by own.due_date, own.id
    limit batch
  loop
    perform private.plan_charge(invoice, 0, (invoice.due_date + policy.retry_time) at time zone (invoice.issuer ->> 'timezone'), null, at);
    planned := planned + 1;
  end loop;

  -- As the dunning schedule says; a link is not sent before its day, and nothing is planned while a charge is on its way.
  for item in
    select retry.number, retry.due_at, own as invoice, way.obstacle
    from private.payment_retries as retry
    join public.invoices as own on own.organization_id = retry.organization_id and own.id = retry.invoice_id
    cross join lateral private.mandate_of(own, at) as way
    where retry.planned_at is null and retry.due_at <= at + interval '49 hours'
      and (
        way.obstacle = 'nothing_due'
        or (way.obstacle is null or retry.due_at <= at) and not exists (
          select
          from private.gateway_requests as known
          where known.organization_id = own.organization_id and known.invoice_id = own.id and known.kind = 'charge'
            and known.state in ('waiting', 'submitting', 'open', 'unknown')
        )
      )
    order by retry.due_at, retry.invoice_id, retry.number
    limit batch
    for no key update of retry skip locked
  loop
    invoice := item.invoice;
    if item.obstacle is null then
      -- The one before may have been planned in this very run.
      continue when (private.plan_charge(invoice, item.number, item.due_at, null, at)).id is null;
    elsif item.obstacle <> 'nothing_due' then
      perform private.plan_link(invoice, null, at);
    end if;
    update private.payment_retries as retry
    set planned_at = at
    where retry.organization_id = invoice.organization_id and retry.invoice_id = invoice.id and retry.number = item.number;
    planned := planned + 1;
  end loop;
  return planned;
end
$$;
comment on function private.plan_collections(integer, timestamptz) is
  'Plans the charges and links that the due dates and the dunning schedule ask for: by mandate where the rules allow it, else by a link.';


-- How it ends ---------------------------------------------------------------------------------------------------------------------

create function private.end_charge(request_id uuid, code text, at timestamptz) returns void
language plpgsql set search_path = ''
as $$
declare
  ended private.gateway_requests;
  invoice public.invoices;
begin
  update private.gateway_requests as own
  set
    state = 'failed', finished_at = at, lease_until = null, failure_code = left(coalesce(code, 'unknown'), 100),
    failure_kind = coalesce((
      select known.kind from private.decline_codes as known where known.gateway = own.gateway and known.code = end_charge.code
    ), 'soft')
  where own.id = request_id and own.state in ('submitting', 'open', 'unknown')
  returning own.* into ended;
  if not found or ended.kind <> 'charge' then
    return;
  end if;
  if ended.failure_kind = 'hard' then
    update public.payment_methods as method set is_default = false where method.id = ended.payment_method_id and method.is_default;
    perform private.emit(
      ended.organization_id, 'payment_method.failed', ended.id::text,
      jsonb_build_object('payment_method_id', ended.payment_method_id, 'invoice_id', ended.invoice_id, 'code', ended.failure_code), at
    );
  end if;
  if ended.failure_kind in ('hard', 'authentication') then
    -- Its holder is needed, and is asked at once: for another method, or to take part.
    select own.* into invoice
    from public.invoices as own
    where own.organization_id = ended.organization_id and own.id = ended.invoice_id and own.status = 'open'
      and own.total_minor > own.amount_paid_minor + own.credited_minor;
    if found then
      perform private.plan_link(invoice, null, at);
    end if;
  end if;
end
$$;
comment on function private.end_charge(uuid, text, timestamptz) is
  'A charge was declined. Hard: the method is charged no more; hard or for its holder: a link is made; soft: the schedule goes on.';

create function private.follow_payment() returns trigger
language plpgsql security definer set search_path = ''
as $$
declare
  item record;
begin
  -- Whoever records the same outcome has the row already, and ends it.
  for item in
    select own.id, own.kind, own.state
    from private.gateway_requests as own
    where own.organization_id = new.organization_id and own.invoice_id = new.invoice_id
      and own.gateway = new.gateway and own.kind in ('charge', 'link') and own.state in ('submitting', 'open', 'unknown')
      and (own.reference in (new.gateway_payment_id, new.gateway_order_id) or own.order_ref = new.gateway_order_id)
    for no key update skip locked
  loop
    if new.status >= 'captured' then
      update private.gateway_requests as own
      set state = 'succeeded', finished_at = new.captured_at, lease_until = null
      where own.id = item.id;
    elsif new.status = 'failed' and item.kind = 'charge' then
      perform private.end_charge(item.id, new.failure_code, new.status_at);
    end if;
  end loop;
  -- By whatever way it was paid: what else is asked for is looked at now, and not when its lease ends.
  if new.status in ('captured', 'failed') then
    update private.gateway_requests as own
    set lease_until = now()
    where own.id in (
      select other.id
      from private.gateway_requests as other
      where other.organization_id = new.organization_id and other.invoice_id = new.invoice_id and other.kind in ('charge', 'link')
        and other.state in ('open', 'unknown') and other.lease_until > now()
      for no key update skip locked
    );
  end if;
  return null;
end
$$;
comment on function private.follow_payment() is
  'Trigger: a gateway''s news of a payment ends the request that it answers, and has the others of its invoice looked at.';
create trigger follow_payment_inserted after insert on public.payments
  for each row when (new.invoice_id is not null and new.status <> 'pending') execute function private.follow_payment();
create trigger follow_payment_changed after update of status on public.payments
  for each row when (new.invoice_id is not null and new.status <> old.status) execute function private.follow_payment();

create function private.follow_refund() returns trigger
language plpgsql security definer set search_path = ''
as $$
begin
  update private.gateway_requests as own
  set
    state = case new.status when 'processed' then 'succeeded' else 'failed' end, finished_at = private.clock_now(), lease_until = null,
    failure_code = case new.status when 'failed' then 'refund_failed' end
  where own.id in (
    select known.id
    from private.gateway_requests as known
    where known.organization_id = new.organization_id and known.payment_id = new.payment_id and known.kind = 'refund'
      and known.reference = new.gateway_refund_id and known.state in ('submitting', 'open', 'unknown')
    for no key update skip locked
  );
  return null;
end
$$;
comment on function private.follow_refund() is 'Trigger: a gateway''s news of a refund ends the request for it.';
create trigger follow_refund_inserted after insert on public.refunds
  for each row when (new.status <> 'pending') execute function private.follow_refund();
create trigger follow_refund_changed after update of status on public.refunds
  for each row when (new.status <> old.status) execute function private.follow_refund();


create function private.follow_payment_method() returns trigger
language plpgsql security definer set search_path = ''
as $$
begin
  update private.gateway_requests as own
  set state = 'succeeded', finished_at = new.created_at, lease_until = null
  where own.id in (
    select setup.id
    from private.gateway_requests as setup
    where setup.organization_id = new.organization_id and setup.gateway = new.gateway and setup.kind = 'setup'
      and setup.state in ('submitting', 'open', 'unknown')
    for no key update skip locked
  );
  return null;
end
$$;
comment on function private.follow_payment_method() is 'Trigger: a method that was saved ends the request for a page to save it on.';
create trigger follow_payment_method after insert on public.payment_methods
  for each row execute function private.follow_payment_method();

create function private.plan_retry_again() returns trigger
language plpgsql security definer set search_path = ''
as $$
begin
  update private.payment_retries as retry
  set planned_at = null
  where retry.organization_id = new.organization_id and retry.invoice_id = new.invoice_id and retry.number = new.retry_number;
  return null;
end
$$;
comment on function private.plan_retry_again() is
  'Trigger: a charge of the dunning schedule that was called off before it was sent is planned again, as things are now.';
create trigger plan_retry_again after update of state on private.gateway_requests
  for each row when (new.state = 'cancelled' and new.kind = 'charge' and new.retry_number > 0)
  execute function private.plan_retry_again();


-- What the handler does -----------------------------------------------------------------------------------------------------------

create function private.describe_request(own private.gateway_requests, action text, at timestamptz) returns jsonb
language sql stable set search_path = ''
as $$
  select jsonb_build_object(
    'id', own.id, 'do', action, 'kind', own.kind, 'gateway', own.gateway, 'organization_id', own.organization_id,
    'account', jsonb_build_object(
      'id', account.id, 'credentials_sealed', account.credentials_sealed, 'api_base', account.api_base, 'return_url', account.return_url
    ),
    'submission', own.submission, 'invoice_id', own.invoice_id, 'invoice_number', invoice.invoice_number,
    'amount_minor', own.amount_minor, 'currency', own.currency, 'method', coalesce(method.type::text, own.method),
    'customer_id', method.gateway_customer_id, 'token', method.gateway_payment_method_id,
    'reference', own.reference, 'order_ref', own.order_ref, 'refund_of', payment.gateway_payment_id,
    'earlier_orders', coalesce((
      select jsonb_agg(past.order_ref order by past.created_at desc)
      from private.gateway_requests as past
      where past.organization_id = own.organization_id and past.invoice_id = own.invoice_id and past.kind = 'charge'
        and past.id <> own.id and past.order_ref is not null and past.gateway = own.gateway
    ), '[]'),
    -- Gateways live in real time.
    'debit_at', extract(epoch from now() + (own.not_before - at))::bigint,
    'since', extract(epoch from now() + (own.created_at - at))::bigint - 86400,
    'expires_at', extract(epoch from now())::bigint + case own.gateway when 'stripe' then 82800 else 604800 end,
    'name', organization.name,
    'contact', organization.contact_number,
    'email', (
      select profile.email
      from public.profiles as profile
      where profile.organization_id = own.organization_id and profile.system_role = 'owner' and profile.status = 'active'
      order by profile.created_at
      limit 1
    ),
    'mandate_limit', (
      select max(rule.limit_minor) from private.mandate_rules as rule where rule.gateway = own.gateway and rule.currency = 'INR'
    )
  )
  from private.payment_accounts as account
  join public.organizations as organization on organization.id = own.organization_id
  left join public.invoices as invoice on invoice.organization_id = own.organization_id and invoice.id = own.invoice_id
  left join public.payment_methods as method on method.organization_id = own.organization_id and method.id = own.payment_method_id
  left join public.payments as payment on payment.organization_id = own.organization_id and payment.id = own.payment_id
  where account.gateway = own.gateway
$$;
comment on function private.describe_request(private.gateway_requests, text, timestamptz) is
  'All that it takes to do one thing at a gateway, the account''s keys still sealed.';

create function private.claim_collections(request jsonb, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  batch integer := least(greatest(coalesce((request ->> 'limit')::integer, 10), 1), 50);
  only_one uuid := private.read_uuid(request, 'id');
  candidate record;
  own private.gateway_requests;
  claimed jsonb := jsonb_build_array();
begin
  if only_one is null then
    perform private.plan_collections(batch * 5, at);
    -- What is no longer due, or no longer so much, or would come from a method that is used no more, is not asked for.
    update private.gateway_requests as late
    set state = 'cancelled', finished_at = at, lease_until = null
    where late.id in (
      select waiting.id
      from private.gateway_requests as waiting
      join public.invoices as invoice on invoice.organization_id = waiting.organization_id and invoice.id = waiting.invoice_id
      where waiting.state = 'waiting' and waiting.kind in ('charge', 'link')
        and (
          invoice.status <> 'open' or invoice.total_minor - invoice.amount_paid_minor - invoice.credited_minor <> waiting.amount_minor
          or waiting.kind = 'charge' and not exists (
            select
            from public.payment_methods as method
            where method.organization_id = waiting.organization_id and method.id = waiting.payment_method_id and method.is_default
          )
        )
        and (waiting.lease_until is null or waiting.lease_until <= now())
      for no key update of waiting skip locked
    );
    -- A page on which nobody agreed in time, or that nobody was ever shown.
    update private.gateway_requests as setup
    set state = 'cancelled', finished_at = at, lease_until = null
    where setup.id in (
      select old.id
      from private.gateway_requests as old
      where old.kind = 'setup' and old.state in ('submitting', 'open', 'unknown')
        and coalesce(old.url_expires_at, old.asked_at + interval '1 day') <= now()
      for no key update skip locked
    );
    update private.gateway_requests as link
    set cancel_wanted = true, lease_until = now()
    where link.id in (
      select open.id
      from private.gateway_requests as open
      join public.invoices as invoice on invoice.organization_id = open.organization_id and invoice.id = open.invoice_id
      where open.kind = 'link' and open.state = 'open' and not open.cancel_wanted
        and (
          invoice.status <> 'open' or invoice.total_minor - invoice.amount_paid_minor - invoice.credited_minor <> open.amount_minor
          -- Where a debit is due, a link that somebody could pay at the same time goes first.
          or exists (
            select
            from private.gateway_requests as charge
            where charge.organization_id = open.organization_id and charge.invoice_id = open.invoice_id and charge.kind = 'charge'
              and charge.state = 'waiting' and charge.not_before <= at
          )
        )
      for no key update of open skip locked
    );
  end if;

  for candidate in
    with ready_ones as (
      select
        ready.id,
        case when ready.not_before <= at and (ready.notify_at is null or ready.noticed_at is not null) then 'submit' else 'notify' end as action
      from private.gateway_requests as ready
      where ready.state = 'waiting' and (only_one is null or ready.id = only_one)
        and (ready.lease_until is null or ready.lease_until <= now())
        and (
          ready.notify_at is not null and ready.noticed_at is null and ready.notify_at <= at
          or ready.not_before <= at and (ready.notify_at is null or ready.noticed_at is not null)
        )
        and not (ready.kind in ('charge', 'link') and ready.not_before <= at and exists (
          select
          from private.gateway_requests as other
          where other.organization_id = ready.organization_id and other.invoice_id = ready.invoice_id and other.id <> ready.id
            and other.kind in ('charge', 'link') and other.state in ('submitting', 'open', 'unknown')
        ))
      order by ready.not_before
      limit batch
      for no key update skip locked
    ),
    silent_ones as (
      select silent.id, case when silent.cancel_wanted and silent.state = 'open' then 'cancel' else 'look_up' end as action
      from private.gateway_requests as silent
      where silent.state in ('submitting', 'open', 'unknown') and silent.lease_until <= now() and (only_one is null or silent.id = only_one)
        and silent.kind <> 'setup'
      order by silent.lease_until
      limit batch
      for no key update skip locked
    )
    select one.id, one.action from silent_ones as one union all select one.id, one.action from ready_ones as one
  loop
    begin
      update private.gateway_requests as mine
      set
        state = case candidate.action when 'submit' then 'submitting' else mine.state end,
        submission = mine.submission + (candidate.action = 'submit')::integer,
        submitted_at = case candidate.action when 'submit' then coalesce(mine.submitted_at, at) else mine.submitted_at end,
        asked_at = case candidate.action when 'submit' then now() else mine.asked_at end,
        not_before = case candidate.action when 'notify' then private.noticed_debit(mine, at) else mine.not_before end,
        lease_until = now() + interval '2 minutes'
      where mine.id = candidate.id
      returning mine.* into own;
    exception when unique_violation then
      -- Another way of paying the same invoice was taken at this moment.
      continue;
    end;
    claimed := claimed || coalesce(private.describe_request(own, candidate.action, at), '[]');
  end loop;
  return jsonb_build_object('requests', claimed, 'more', jsonb_array_length(claimed) >= batch);
end
$$;
comment on function private.claim_collections(jsonb, timestamptz) is
  'Plans what is due, and hands a handler what is to be done at the gateways: announced, sent, looked up or taken back. Nobody else has it '
  'for two minutes; what was sent and not answered is looked up, and never sent again before.';

create function private.record_collection(result jsonb, at timestamptz) returns text
language plpgsql set search_path = ''
as $$
declare
  outcome text := private.read_choice(result, 'outcome', array[
    'notified', 'accepted', 'paid', 'declined', 'refused', 'deferred', 'unknown', 'not_found', 'cancelled', 'processed'
  ]);
  code text := result ->> 'code';
  own private.gateway_requests;
  payment public.payments;
  paid jsonb;
begin
  select known.* into own
  from private.gateway_requests as known
  where known.id = private.read_uuid(result, 'id')
  for no key update;
  if not found or own.state in ('succeeded', 'failed', 'cancelled') and outcome <> 'paid' then
    return 'ignored';
  end if;
  -- Money that came is told whoever tells it; anything else only of the sending that it is about.
  if own.submission <> (result ->> 'submission')::integer and outcome <> 'paid' then
    return 'ignored';
  end if;
  update private.gateway_requests as known
  set
    reference = coalesce(result ->> 'reference', known.reference),
    order_ref = coalesce(result ->> 'order_ref', known.order_ref),
    url = coalesce(result ->> 'url', known.url),
    url_expires_at = coalesce(to_timestamp((result ->> 'expires_at')::bigint), known.url_expires_at)
  where known.id = own.id
  returning known.* into own;
  if result ->> 'customer_id' is not null and own.kind = 'setup' then
    insert into private.payment_customers (gateway, customer_id, organization_id, created_at)
    values (own.gateway, private.read_token(result, 'customer_id'), own.organization_id, at)
    on conflict do nothing;
  end if;

  case outcome
    when 'notified' then
      if own.state = 'waiting' then
        update private.gateway_requests as known set noticed_at = at, lease_until = null where known.id = own.id;
        perform private.emit(
          own.organization_id, 'invoice.debit_notice', own.id::text,
          jsonb_build_object(
            'invoice_id', own.invoice_id, 'amount_minor', own.amount_minor, 'currency', own.currency, 'debit_at', own.not_before
          ), at
        );
      end if;

    when 'accepted' then
      update private.gateway_requests as known
      set
        state = case when known.kind = 'revoke' then 'succeeded' else 'open' end,
        finished_at = case when known.kind = 'revoke' then at end,
        lease_until = case when known.kind <> 'revoke' then now() + case known.kind when 'charge' then interval '15 minutes' else interval '1 hour' end end
      where known.id = own.id;
      if own.kind = 'link' then
        perform private.emit(
          own.organization_id, 'invoice.payment_link', own.id::text,
          jsonb_build_object(
            'invoice_id', own.invoice_id, 'url', own.url, 'amount_minor', own.amount_minor, 'currency', own.currency,
            'expires_at', own.url_expires_at
          ), at
        );
      end if;

    when 'paid' then
      paid := private.record_payment(
        jsonb_build_object(
          'gateway', own.gateway, 'payment_id', coalesce(result ->> 'payment_id', own.reference),
          'order_id', coalesce(own.order_ref, result ->> 'payment_id', own.reference), 'invoice_id', own.invoice_id, 'status', 'captured',
          'amount_minor', result -> 'amount_minor', 'currency', result -> 'currency'
        ), at
      );
      update private.gateway_requests as known
      set state = 'succeeded', finished_at = at, lease_until = null, failure_code = null, failure_kind = null
      where known.id = own.id and known.state <> 'succeeded';

    when 'declined' then
      if own.kind = 'charge' and result ->> 'payment_id' is not null then
        perform private.record_payment(
          jsonb_build_object(
            'gateway', own.gateway, 'payment_id', result ->> 'payment_id',
            'order_id', coalesce(own.order_ref, result ->> 'payment_id'), 'invoice_id', own.invoice_id, 'status', 'failed',
            'amount_minor', own.amount_minor, 'currency', own.currency,
            'failure', jsonb_build_object('code', code, 'message', result ->> 'message')
          ), at
        );
      elsif own.kind = 'charge' then
        perform private.emit(
          own.organization_id, 'invoice.payment_failed', own.id::text,
          jsonb_build_object('invoice_id', own.invoice_id, 'payment_id', null, 'code', left(code, 100)), at
        );
      end if;
      perform private.end_charge(own.id, code, at);

    when 'refused' then
      -- The gateway did not take the request at all: ours to mend.
      update private.gateway_requests as known
      set
        state = 'failed', finished_at = at, lease_until = null, failure_kind = 'refused',
        failure_code = left(coalesce(code, 'refused'), 100)
      where known.id = own.id;

    when 'deferred' then
      update private.gateway_requests as known
      set state = 'waiting', lease_until = now() + interval '1 minute'
      where known.id = own.id and known.state in ('submitting', 'waiting');
      update private.gateway_requests as known
      set lease_until = now() + interval '5 minutes'
      where known.id = own.id and known.state in ('open', 'unknown');

    when 'unknown' then
      update private.gateway_requests as known
      set state = case known.state when 'submitting' then 'unknown' else known.state end, lease_until = now() + interval '1 minute'
      where known.id = own.id;

    when 'not_found' then
      -- What is on its way may still arrive; after ten minutes nothing is, and the same key is sent again.
      update private.gateway_requests as known
      set
        state = case when known.asked_at < now() - interval '10 minutes' then 'waiting' else 'unknown' end,
        lease_until = case when known.asked_at >= now() - interval '10 minutes' then now() + interval '1 minute' end
      where known.id = own.id and known.state <> 'waiting';

    when 'cancelled' then
      update private.gateway_requests as known
      set state = 'cancelled', finished_at = at, lease_until = null
      where known.id = own.id;

    when 'processed' then
      select known.* into payment from public.payments as known where known.id = own.payment_id;
      perform private.record_refund(
        jsonb_build_object(
          'gateway', own.gateway, 'refund_id', own.reference, 'payment_id', payment.gateway_payment_id, 'status', 'processed',
          'amount_minor', own.amount_minor, 'currency', own.currency
        ), at
      );
      update private.gateway_requests as known
      set state = 'succeeded', finished_at = at, lease_until = null
      where known.id = own.id and known.state <> 'succeeded';
  end case;
  return coalesce(paid ->> 'result', 'applied');
end
$$;
comment on function private.record_collection(jsonb, timestamptz) is
  'What one request came to, as the handler saw it; a payment is written down as the gateway''s own webhook writes it, whichever is first.';

create function private.record_collections(request jsonb, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  item jsonb;
  results jsonb := jsonb_build_array();
begin
  for item in select given.value from jsonb_array_elements(request -> 'results') as given (value) order by given.value ->> 'id' loop
    results := results || jsonb_build_array(jsonb_build_object('id', item ->> 'id', 'result', private.record_collection(item, at)));
  end loop;
  return jsonb_build_object('results', results);
end
$$;
comment on function private.record_collections(jsonb, timestamptz) is 'What a handler''s requests came to, all of them or none.';

create function private.request_refund(request jsonb, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  note public.credit_notes;
  invoice public.invoices;
  payment public.payments;
  owed bigint;
  share bigint;
  asked jsonb := jsonb_build_array();
  made uuid;
begin
  select own.* into note
  from public.credit_notes as own
  where own.id = private.read_uuid(request, 'credit_note_id') and own.status = 'issued';
  if not found then
    perform private.raise_error(404, 'credit_note_not_found', 'There is no such credit note', 'credit_note_id');
  end if;
  select own.* into invoice
  from public.invoices as own
  where own.organization_id = note.organization_id and own.id = note.invoice_id
  for no key update;
  -- What was paid and is not owed any more, less what is on its way back or was sent back.
  owed := least(note.total_minor, invoice.amount_paid_minor + invoice.credited_minor - invoice.total_minor);
  owed := owed - coalesce((
    select sum(known.amount_minor)
    from private.gateway_requests as known
    where known.organization_id = note.organization_id and known.credit_note_id = note.id and known.kind = 'refund'
      and known.state not in ('failed', 'cancelled')
  ), 0);
  if owed <= 0 then
    return jsonb_build_object('requests', asked, 'amount_minor', 0);
  end if;
  for payment in
    select own.*
    from public.payments as own
    join private.payment_accounts as account on account.gateway = own.gateway and account.is_active
    where own.organization_id = note.organization_id and own.invoice_id = note.invoice_id and own.status = 'captured' and own.applied_minor > 0
    order by own.captured_at desc, own.id
  loop
    share := least(owed, payment.amount_minor - payment.refunded_minor - coalesce((
      select sum(known.amount_minor)
      from private.gateway_requests as known
      where known.organization_id = payment.organization_id and known.payment_id = payment.id and known.kind = 'refund'
        and known.state in ('waiting', 'submitting', 'open', 'unknown')
    ), 0));
    continue when share <= 0;
    insert into private.gateway_requests (
      organization_id, kind, gateway, invoice_id, payment_id, credit_note_id, amount_minor, currency, not_before, created_at
    )
    values (
      note.organization_id, 'refund', payment.gateway, note.invoice_id, payment.id, note.id, share, note.currency, at, at
    )
    on conflict do nothing
    returning id into made;
    if found then
      asked := asked || to_jsonb(made);
      owed := owed - share;
    end if;
    exit when owed <= 0;
  end loop;
  perform private.audit(
    note.organization_id, 'credit_note.refund_requested', 'credit_note', note.id,
    jsonb_build_object('requests', jsonb_array_length(asked), 'left_minor', owed), at
  );
  return jsonb_build_object('requests', asked, 'left_minor', owed);
end
$$;
comment on function private.request_refund(jsonb, timestamptz) is
  'Asks for the money of a credit note to be paid back by the way it came, as far as more was paid than is owed now; once, however often.';


-- What users do -------------------------------------------------------------------------------------------------------------------

create function private.open_invoice_of(organization uuid, invoice_id uuid) returns public.invoices
language plpgsql set search_path = ''
as $$
declare
  invoice public.invoices;
begin
  select own.* into invoice
  from public.invoices as own
  where own.organization_id = open_invoice_of.organization and own.id = open_invoice_of.invoice_id and own.status <> 'draft'
  for no key update;
  if not found then
    perform private.raise_error(404, 'not_found', 'There is no such invoice, or it is not yours to see', 'id');
  end if;
  if invoice.status <> 'open' or invoice.total_minor <= invoice.amount_paid_minor + invoice.credited_minor then
    perform private.raise_error(409, 'invoice_not_open', 'Nothing is due on the invoice', 'id');
  end if;
  return invoice;
end
$$;
comment on function private.open_invoice_of(uuid, uuid) is 'An invoice of an organization on which something is due, locked; else the request ends with 404 or 409.';

create function private.request_payment_link(invoice_id uuid, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  organization uuid := private.require_org('billing.manage');
  invoice public.invoices := private.open_invoice_of(organization, invoice_id);
  link private.gateway_requests;
begin
  if exists (
    select
    from private.gateway_requests as charge
    where charge.organization_id = organization and charge.invoice_id = invoice.id and charge.kind = 'charge'
      and charge.state in ('submitting', 'open', 'unknown')
  ) then
    perform private.raise_error(409, 'collection_in_progress', 'The saved payment method is being charged', 'id');
  end if;
  link := private.plan_link(invoice, (select auth.uid()), at);
  if link.id is null and exists (
    select
    from private.gateway_requests as old
    where old.organization_id = organization and old.invoice_id = invoice.id and old.kind = 'link'
      and old.state in ('waiting', 'submitting', 'open', 'unknown')
  ) then
    perform private.raise_error(409, 'collection_in_progress', 'An older link is being taken back', 'id');
  end if;
  if link.id is null then
    perform private.raise_error(422, 'no_payment_gateway', 'No payment gateway takes this currency here', 'id');
  end if;
  return jsonb_build_object(
    'id', link.id, 'state', link.state, 'url', link.url, 'expires_at', link.url_expires_at, 'amount_minor', link.amount_minor,
    'currency', link.currency
  );
end
$$;
comment on function private.request_payment_link(uuid, timestamptz) is
  'The link by which an invoice of the caller''s organization is paid: the one that there is, or one that the handler makes now. Needs billing.manage.';

create function private.collect_invoice(invoice_id uuid, idempotency_key text, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  organization uuid := private.require_org('billing.manage');
  request jsonb := jsonb_build_object('action', 'collect', 'invoice_id', collect_invoice.invoice_id);
  answer jsonb := private.repeated_request(organization, idempotency_key, request);
  invoice public.invoices;
  obstacle text;
  charge private.gateway_requests;
begin
  if answer is not null then
    return answer;
  end if;
  invoice := private.open_invoice_of(organization, collect_invoice.invoice_id);
  if exists (
    select
    from private.gateway_requests as known
    where known.organization_id = organization and known.invoice_id = invoice.id and known.kind = 'charge'
      and known.state in ('waiting', 'submitting', 'open', 'unknown')
  ) then
    perform private.raise_error(409, 'collection_in_progress', 'The saved payment method is being charged', 'id');
  end if;
  obstacle := (private.mandate_of(invoice, at)).obstacle;
  if obstacle = 'no_mandate' then
    perform private.raise_error(422, 'no_mandate', 'There is no payment method that may be charged', 'id');
  elsif obstacle = 'method_expired' then
    perform private.raise_error(422, 'method_expired', 'The payment method has expired', 'id');
  elsif obstacle = 'above_mandate_limit' then
    perform private.raise_error(422, 'above_mandate_limit', 'The amount is above what a mandate pays without its holder', 'id');
  elsif obstacle is not null then
    perform private.raise_error(422, 'attempts_used', 'The payment method was tried as often as its rules allow', 'id');
  end if;
  charge := private.plan_charge(invoice, null, at, (select auth.uid()), at);
  return private.answer_request(organization, idempotency_key, request, jsonb_build_object(
    'id', charge.id, 'state', charge.state, 'debit_at', charge.not_before, 'amount_minor', charge.amount_minor, 'currency', charge.currency
  ), at);
end
$$;
comment on function private.collect_invoice(uuid, text, timestamptz) is
  'Plans to charge an invoice of the caller''s organization by its mandate, as soon as the mandate''s rules allow. Needs billing.manage.';

create function private.request_mandate(gateway text, method text, idempotency_key text, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  organization uuid := private.require_org('billing.manage');
  request jsonb := jsonb_build_object('action', 'mandate', 'gateway', request_mandate.gateway, 'method', request_mandate.method);
  answer jsonb := private.repeated_request(organization, idempotency_key, request);
  money text := (select tenant.currency from public.organizations as tenant where tenant.id = organization);
  via public.payment_gateway;
  setup private.gateway_requests;
begin
  if answer is not null then
    return answer;
  end if;
  if coalesce(request_mandate.method, 'card') not in ('card', 'upi', 'emandate') then
    perform private.raise_error(400, 'invalid_request', 'method must be one of card, upi, emandate', 'method');
  end if;
  select account.gateway into via
  from private.payment_accounts as account
  where account.is_active and (account.currencies is null or money = any (account.currencies))
    and (request_mandate.gateway is null or account.gateway::text = request_mandate.gateway)
  order by account.priority, account.gateway
  limit 1;
  if not found then
    perform private.raise_error(422, 'no_payment_gateway', 'No payment gateway takes this currency here', 'gateway');
  end if;
  insert into private.gateway_requests (organization_id, kind, gateway, method, currency, not_before, created_by, created_at)
  values (organization, 'setup', via, coalesce(request_mandate.method, 'card'), money, at, (select auth.uid()), at)
  returning * into setup;
  return private.answer_request(
    organization, idempotency_key, request, jsonb_build_object('id', setup.id, 'gateway', setup.gateway, 'method', setup.method), at
  );
end
$$;
comment on function private.request_mandate(text, text, text, timestamptz) is
  'Begins to save a payment method of the caller''s organization: the handler makes the page on which its holder agrees. Needs billing.manage.';

create function private.forget_payment_method(payment_method_id uuid, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  organization uuid := private.require_org('billing.manage');
  gone public.payment_methods;
  revocation uuid;
begin
  select own.* into gone
  from public.payment_methods as own
  where own.organization_id = organization and own.id = forget_payment_method.payment_method_id
  for no key update;
  if not found then
    perform private.raise_error(404, 'not_found', 'There is no such payment method, or it is not yours', 'id');
  end if;
  if exists (
    select
    from private.gateway_requests as known
    where known.organization_id = organization and known.payment_method_id = gone.id and known.kind = 'charge'
      and known.state in ('submitting', 'open', 'unknown')
  ) then
    perform private.raise_error(409, 'collection_in_progress', 'The saved payment method is being charged', 'id');
  end if;
  if gone.removed_at is null then
    update public.payment_methods as own set removed_at = at, is_default = false where own.id = gone.id;
    update private.gateway_requests as known
    set state = 'cancelled', finished_at = at, lease_until = null
    where known.organization_id = organization and known.payment_method_id = gone.id and known.kind = 'charge' and known.state = 'waiting';
    insert into private.gateway_requests (organization_id, kind, gateway, payment_method_id, not_before, created_by, created_at)
    select organization, 'revoke', gone.gateway, gone.id, at, (select auth.uid()), at
    where exists (select from private.payment_accounts as account where account.gateway = gone.gateway)
    returning id into revocation;
    perform private.audit(organization, 'payment_method.removed', 'payment_method', gone.id, '{}', at);
  end if;
  return jsonb_build_object('removed', gone.removed_at is null, 'id', revocation);
end
$$;
comment on function private.forget_payment_method(uuid, timestamptz) is
  'A payment method of the caller''s organization is used no more, and the gateway is told. Needs billing.manage.';

create function private.payment_link_of(invoice_id uuid) returns jsonb
language sql stable set search_path = ''
as $$
  select jsonb_build_object('url', link.url, 'expires_at', link.url_expires_at)
  from private.gateway_requests as link
  join public.invoices as invoice on invoice.organization_id = link.organization_id and invoice.id = link.invoice_id
  where link.invoice_id = $1 and link.kind = 'link' and link.state = 'open' and not link.cancel_wanted
    and invoice.status = 'open' and (link.url_expires_at is null or link.url_expires_at > now())
$$;
comment on function private.payment_link_of(uuid) is 'Where an invoice is paid online now; null without a link.';

create function public.claim_collections(jsonb) returns jsonb
language sql set search_path = ''
as $$
  select private.claim_collections($1, private.clock_now())
$$;
comment on function public.claim_collections(jsonb) is
  'For invoice-generation. {"v":1,"limit":10,"id"?} gives {"requests":[{"id","do":"notify|submit|look_up|cancel","kind","gateway","account",…}],"more":bool}.';

create function public.record_collections(jsonb) returns jsonb
language sql set search_path = ''
as $$
  select private.record_collections($1, private.clock_now())
$$;
comment on function public.record_collections(jsonb) is
  'For invoice-generation. {"v":1,"results":[{"id","submission","outcome":"notified|accepted|paid|declined|refused|deferred|unknown|not_found|'
  'cancelled|processed","reference"?,"order_ref"?,"payment_id"?,"amount_minor"?,"currency"?,"url"?,"expires_at"?,"code"?,"message"?}]} gives {"results"}.';

create function public.request_refund(jsonb) returns jsonb
language sql set search_path = ''
as $$
  select private.request_refund($1, private.clock_now())
$$;
comment on function public.request_refund(jsonb) is
  'For the operator''s own systems. {"v":1,"credit_note_id"} gives {"requests":[ids],"left_minor"}: what no gateway can pay back is left.';

create function public.request_payment_link(invoice_id uuid) returns jsonb
language sql set search_path = ''
as $$
  select private.request_payment_link(invoice_id, private.clock_now())
$$;
comment on function public.request_payment_link(uuid) is
  'The link by which an invoice is paid: {"id","state","url","expires_at","amount_minor","currency"}. Called by POST invoices/{id}/payment-link, '
  'which makes it. Needs billing.manage.';

create function public.collect_invoice(invoice_id uuid, idempotency_key text default null) returns jsonb
language sql set search_path = ''
as $$
  select private.collect_invoice(invoice_id, idempotency_key, private.clock_now())
$$;
comment on function public.collect_invoice(uuid, text) is
  'Charges an invoice by the organization''s mandate: {"id","state","debit_at","amount_minor","currency"}. Needs billing.manage.';

create function public.request_mandate(gateway text default null, method text default null, idempotency_key text default null) returns jsonb
language sql set search_path = ''
as $$
  select private.request_mandate(gateway, method, idempotency_key, private.clock_now())
$$;
comment on function public.request_mandate(text, text, text) is
  'Begins to save a payment method: {"id","gateway","method"}. Called by POST payment-methods, which makes the page. Needs billing.manage.';

create function public.forget_payment_method(payment_method_id uuid) returns jsonb
language sql set search_path = ''
as $$
  select private.forget_payment_method(payment_method_id, private.clock_now())
$$;
comment on function public.forget_payment_method(uuid) is 'A payment method is used no more: {"removed","id"}. Needs billing.manage.';

insert into private.personal_data (table_name, column_name, found_by, via, treatment, reason)
values
  ('private.payment_accounts', '*', 'none', null, 'kept', 'A secret or its hash.'),
  ('private.mandate_rules', '*', 'none', null, 'kept', 'Reference data.'),
  ('private.decline_codes', '*', 'none', null, 'kept', 'Reference data.'),
  ('private.payment_customers', '*', 'none', null, 'kept', 'Names a thing in another system, not a person.'),
  ('private.gateway_requests', '*', 'none', null, 'kept', 'A fiscal row: what was asked for the organization''s own bill.');

revoke all on function
  private.after_closed_hours(timestamptz, text[], text), private.mandate_of(public.invoices, timestamptz),
  private.plan_charge(public.invoices, integer, timestamptz, uuid, timestamptz),
  private.noticed_debit(private.gateway_requests, timestamptz), private.plan_link(public.invoices, uuid, timestamptz),
  private.plan_collections(integer, timestamptz), private.end_charge(uuid, text, timestamptz), private.follow_payment(),
  private.follow_refund(), private.follow_payment_method(), private.plan_retry_again(),
  private.describe_request(private.gateway_requests, text, timestamptz),
  private.claim_collections(jsonb, timestamptz), private.record_collection(jsonb, timestamptz),
  private.record_collections(jsonb, timestamptz), private.request_refund(jsonb, timestamptz), private.open_invoice_of(uuid, uuid),
  private.request_payment_link(uuid, timestamptz), private.collect_invoice(uuid, text, timestamptz),
  private.request_mandate(text, text, text, timestamptz), private.forget_payment_method(uuid, timestamptz), private.payment_link_of(uuid),
  public.claim_collections(jsonb), public.record_collections(jsonb), public.request_refund(jsonb), public.request_payment_link(uuid),
  public.collect_invoice(uuid, text), public.request_mandate(text, text, text), public.forget_payment_method(uuid)
from public, anon, authenticated, service_role;
grant execute on function
  private.claim_collections(jsonb, timestamptz), private.record_collections(jsonb, timestamptz), private.request_refund(jsonb, timestamptz),
  public.claim_collections(jsonb), public.record_collections(jsonb), public.request_refund(jsonb)
to service_role;
grant execute on function
  private.request_payment_link(uuid, timestamptz), private.collect_invoice(uuid, text, timestamptz),
  private.request_mandate(text, text, text, timestamptz), private.forget_payment_method(uuid, timestamptz),
  public.request_payment_link(uuid), public.collect_invoice(uuid, text), public.request_mandate(text, text, text),
  public.forget_payment_method(uuid)
to authenticated;

create or replace function private.apply_payment_event(
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

create or replace function private.get_invoice(invoice_id uuid) returns jsonb
language plpgsql stable security definer set search_path = ''
as $$
declare
  document jsonb := private.invoice_document(private.require_org('billing.view'), invoice_id);
begin
  if document is null then
    perform private.raise_error(404, 'not_found', 'There is no such invoice, or it is not yours to see', 'id');
  end if;
  return document || jsonb_strip_nulls(jsonb_build_object('payment_link', private.payment_link_of(invoice_id)));
end
$$;

create or replace function private.open_document(request jsonb) returns jsonb
language plpgsql stable security definer set search_path = ''
as $$
declare
  wanted uuid := private.read_uuid(request, 'id');
  document jsonb := case private.read_choice(request, 'document', array['invoice', 'credit_note'])
    when 'invoice' then private.invoice_document(null, wanted) || jsonb_strip_nulls(jsonb_build_object('payment_link', private.payment_link_of(wanted)))
    else private.credit_note_document(null, wanted)
  end;
begin
  if document is null then
    perform private.raise_error(404, 'not_found', 'There is no such document', 'id');
  end if;
  return document;
end
$$;
