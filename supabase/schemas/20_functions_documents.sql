-- Invoices and credit notes as documents: whole, as they were issued; the next one before it is due; and all of them for an accountant.
--
-- Nothing here prices anything and nothing writes, but for the issuer's logo. Amounts leave as integers of the minor unit in documents,
-- and as plain decimals in exports, which are read by spreadsheets.

create function private.set_billing_logo(png bytea) returns text
language plpgsql security definer set search_path = ''
as $$
declare
  hash text := encode(sha256(png), 'hex');
begin
  insert into private.billing_logos (id, png) values (hash, png) on conflict (id) do nothing;
  update private.billing_issuer as issuer set logo_id = hash where issuer.singleton;
  return hash;
end
$$;
comment on function private.set_billing_logo(bytea) is
  'For the operator: a PNG of at most 64 KiB becomes the logo of invoices from now on; those that there are keep theirs.';

create function private.billing_logo(id text) returns text
language sql stable set search_path = ''
as $$
  select translate(encode(logo.png, 'base64'), E'\n', '') from private.billing_logos as logo where logo.id = $1
$$;
comment on function private.billing_logo(text) is 'A logo in base64; null if there is none.';

create function private.record_einvoice(number text, irn text, ack_no text, signed_qr text) returns uuid
language plpgsql security definer set search_path = ''
as $$
declare
  known uuid;
begin
  if irn !~ '^[0-9a-f]{64}$' or length(signed_qr) > 2900 or signed_qr !~ '^[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+$'
    or ack_no !~ '^[0-9]{1,20}$' or irn is null or ack_no is null or signed_qr is null then
    perform private.raise_error(400, 'invalid_request', 'irn is a hash of 64 digits, ack_no a number, signed_qr what the portal signed', 'irn');
  end if;
  -- What the portal has said of a document does not change.
  update public.invoices as invoice
  set irn = record_einvoice.irn, ack_no = record_einvoice.ack_no, signed_qr = record_einvoice.signed_qr
  where invoice.invoice_number = record_einvoice.number
    and coalesce(invoice.irn, record_einvoice.irn) = record_einvoice.irn
    and coalesce(invoice.signed_qr, record_einvoice.signed_qr) = record_einvoice.signed_qr
  returning invoice.id into known;
  if not found then
    update public.credit_notes as note
    set irn = record_einvoice.irn, ack_no = record_einvoice.ack_no, signed_qr = record_einvoice.signed_qr
    where note.credit_note_number = record_einvoice.number
      and coalesce(note.irn, record_einvoice.irn) = record_einvoice.irn
      and coalesce(note.signed_qr, record_einvoice.signed_qr) = record_einvoice.signed_qr
    returning note.id into known;
  end if;
  if known is null then
    perform private.raise_error(404, 'invoice_not_found', 'There is no such document, or the portal said something else of it before', 'number');
  end if;
  return known;
end
$$;
comment on function private.record_einvoice(text, text, text, text) is
  'For the operator: what India''s portal answered for an invoice or a credit note, by its number. Printed on it from then on.';

-- Whole documents -----------------------------------------------------------------------------------------------------------------

create function private.invoice_document(organization_id uuid, invoice_id uuid) returns jsonb
language sql stable set search_path = ''
as $$
  select to_jsonb(invoice) - array['metadata', 'created_at', 'updated_at'] || jsonb_build_object(
    'document', 'invoice',
    'logo', private.billing_logo(invoice.issuer ->> 'logo_id'),
    'lines', coalesce((
      select jsonb_agg(
        to_jsonb(line) - array['id', 'organization_id', 'invoice_id'] order by line.position
      )
      from public.invoice_lines as line
      where line.organization_id = invoice.organization_id and line.invoice_id = invoice.id
    ), '[]'),
    'taxes', coalesce((
      select jsonb_agg(to_jsonb(tax) - array['id', 'organization_id', 'invoice_id'] order by tax.position)
      from public.invoice_taxes as tax
      where tax.organization_id = invoice.organization_id and tax.invoice_id = invoice.id
    ), '[]')
  )
  from public.invoices as invoice
  where invoice.id = $2 and invoice.status <> 'draft' and (invoice.organization_id = $1 or $1 is null)
$$;
comment on function private.invoice_document(uuid, uuid) is
  'An invoice that is no draft, with its lines, taxes and logo, of one organization or, with null, of any; null if there is none.';

create function private.credit_note_document(organization_id uuid, credit_note_id uuid) returns jsonb
language sql stable set search_path = ''
as $$
  select to_jsonb(note) - array['idempotency_key', 'created_by', 'created_at'] || jsonb_build_object(
    'document', 'credit_note',
    'logo', private.billing_logo(note.issuer ->> 'logo_id'),
    'invoice_number', invoice.invoice_number,
    'invoice_date', invoice.invoice_date,
    'timezone', invoice.timezone,
    'lines', coalesce((
      select jsonb_agg(
        to_jsonb(line) - array['id', 'organization_id', 'credit_note_id', 'invoice_line_id']
          || jsonb_build_object('invoice_position', billed.position)
        order by line.position)
      from public.credit_note_lines as line
      join public.invoice_lines as billed on billed.organization_id = line.organization_id and billed.id = line.invoice_line_id
      where line.organization_id = note.organization_id and line.credit_note_id = note.id
    ), '[]'),
    'taxes', coalesce((
      select jsonb_agg(
        to_jsonb(tax) - array['id', 'organization_id', 'credit_note_id']
          || jsonb_build_object('treatment', billed.treatment, 'note', billed.note)
        order by tax.position)
      from public.credit_note_taxes as tax
      join public.invoice_taxes as billed
        on billed.organization_id = note.organization_id and billed.invoice_id = note.invoice_id and billed.name = tax.name
      where tax.organization_id = note.organization_id and tax.credit_note_id = note.id
    ), '[]')
  )
  from public.credit_notes as note
  join public.invoices as invoice on invoice.organization_id = note.organization_id and invoice.id = note.invoice_id
  where note.id = $2 and note.status <> 'draft' and (note.organization_id = $1 or $1 is null)
$$;
comment on function private.credit_note_document(uuid, uuid) is
  'A credit note that was issued, with its lines, taxes, logo and what it names of its invoice; as invoice_document.';

create function private.get_invoice(invoice_id uuid) returns jsonb
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
comment on function private.get_invoice(uuid) is 'An invoice of the caller''s organization as a document. Needs billing.view.';

create function private.get_credit_note(credit_note_id uuid) returns jsonb
language plpgsql stable security definer set search_path = ''
as $$
declare
  document jsonb := private.credit_note_document(private.require_org('billing.view'), credit_note_id);
begin
  if document is null then
    perform private.raise_error(404, 'not_found', 'There is no such credit note, or it is not yours to see', 'id');
  end if;
  return document;
end
$$;
comment on function private.get_credit_note(uuid) is 'A credit note of the caller''s organization as a document. Needs billing.view.';

create function private.open_document(request jsonb) returns jsonb
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
comment on function private.open_document(jsonb) is 'A document for whoever holds a signed link to it; the handler has checked the link.';

-- The next invoice ----------------------------------------------------------------------------------------------------------------

create function private.preview_document(organization_id uuid, at timestamptz) returns jsonb
language plpgsql stable set search_path = ''
as $$
declare
  subscription public.subscriptions := private.live_subscription(organization_id);
  issuer private.billing_issuer;
  bill record;
  dated date;
begin
  if subscription.id is null then
    perform private.raise_error(402, 'subscription_inactive', 'There is no live subscription, so nothing will be billed');
  end if;
  select own.* into issuer from private.billing_issuer as own;
  if not found then
    perform private.raise_error(409, 'billing_issuer_missing', 'Nothing is billed before private.billing_issuer says who bills');
  end if;
  select priced.* into bill from private.price_periods(array[subscription.id], issuer, at) as priced;
  dated := (greatest(at, case bill.kind when 'period' then bill.period_end end) at time zone issuer.timezone)::date;
  return jsonb_build_object(
    'document', 'preview',
    'logo', private.billing_logo(issuer.logo_id),
    'organization_id', bill.organization_id,
    'subscription_id', bill.subscription_id,
    'kind', bill.kind,
    'currency', bill.currency,
    'period_start', bill.period_start,
    'period_end', bill.period_end,
    'timezone', bill.timezone,
    'first_day', bill.first_day,
    'last_day', bill.last_day,
    'subtotal_minor', bill.subtotal_minor,
    'discount_minor', bill.discount_minor,
    'discounts', bill.discounts,
    'tax_minor', bill.tax_minor,
    'total_minor', bill.subtotal_minor - bill.discount_minor + bill.tax_minor,
    'invoice_date', dated,
    'due_date', dated + issuer.payment_terms_days,
    'as_of', at,
    -- What charges nothing makes no invoice.
    'is_billed', bill.is_billed,
    'issuer', bill.issuer_particulars,
    'customer', bill.customer,
    'lines', (
      select coalesce(
        jsonb_agg(
          to_jsonb(item) - array['line_id', 'item_id', 'rest_minor'] || jsonb_build_object('discount_minor', coalesce(item.discount_minor, 0))
          order by item.position
        ), '[]')
      from unnest(bill.lines) as item
    ),
    'taxes', to_jsonb(bill.taxes)
  );
end
$$;
comment on function private.preview_document(uuid, timestamptz) is
  'The next invoice of an organization''s subscription, as the run would make it if its period ended now: priced by the same function.';

create function private.preview_invoice(at timestamptz) returns jsonb
language plpgsql stable security definer set search_path = ''
as $$
begin
  return private.preview_document(private.require_org('billing.view'), at);
end
$$;
comment on function private.preview_invoice(timestamptz) is 'preview_document for the caller''s organization. Writes nothing. Needs billing.view.';

-- For an accountant ---------------------------------------------------------------------------------------------------------------

create function private.decimal_amount(minor bigint, currency text) returns numeric
language sql immutable set search_path = ''
as $$
  -- ISO 4217. The same list is in the documents' money.
  select round($1 / power(10::numeric, exponent.digits), exponent.digits)
  from (
    select case
      when $2 in (
        'BIF', 'CLP', 'DJF', 'GNF', 'ISK', 'JPY', 'KMF', 'KRW', 'PYG', 'RWF', 'UGX', 'VND', 'VUV', 'XAF', 'XOF', 'XPF'
      ) then 0
      when $2 in ('BHD', 'IQD', 'JOD', 'KWD', 'LYD', 'OMR', 'TND') then 3
      else 2
    end as digits
  ) as exponent
$$;
comment on function private.decimal_amount(bigint, text) is 'An amount of the minor unit as a plain decimal of the currency: 913320 INR is 9133.20.';

create function private.check_export_days(from_day date, to_day date) returns void
language plpgsql immutable set search_path = ''
as $$
begin
  if from_day is null or to_day is null or from_day > to_day or to_day - from_day > 3660 then
    perform private.raise_error(400, 'invalid_request', 'from and to are days, the first not after the last, ten years apart at most', 'from');
  end if;
end
$$;
comment on function private.check_export_days(date, date) is 'Ends the request with 400 unless the days of an export make a range.';

create function private.export_invoices(from_day date, to_day date) returns jsonb
language plpgsql stable security definer set search_path = ''
as $$
declare
  organization uuid := private.require_org('billing.view');
begin
  perform private.check_export_days(from_day, to_day);
  return jsonb_build_object(
    'columns', jsonb_build_array(
      'document', 'number', 'date', 'due_date', 'status', 'against', 'customer', 'customer_gstin', 'place_of_supply', 'first_day',
      'last_day', 'currency', 'subtotal', 'discount', 'cgst', 'sgst', 'igst', 'other_tax', 'tax', 'total', 'paid', 'credited', 'due', 'id'
    ),
    'rows', coalesce((
      select jsonb_agg(
        jsonb_build_array(
          item.document, item.number, item.dated, item.due_date, item.status, item.against, item.customer ->> 'name',
          item.customer ->> 'gstin', item.customer ->> 'place_of_supply', item.first_day, item.last_day, item.currency,
          private.decimal_amount(item.subtotal_minor, item.currency)::text,
          private.decimal_amount(item.discount_minor, item.currency)::text, private.decimal_amount(item.cgst, item.currency)::text,
          private.decimal_amount(item.sgst, item.currency)::text, private.decimal_amount(item.igst, item.currency)::text,
          private.decimal_amount(item.tax_minor - item.cgst - item.sgst - item.igst, item.currency)::text,
          private.decimal_amount(item.tax_minor, item.currency)::text, private.decimal_amount(item.total_minor, item.currency)::text,
          private.decimal_amount(item.amount_paid_minor, item.currency)::text,
          private.decimal_amount(item.credited_minor, item.currency)::text,
          private.decimal_amount(
            case when item.document = 'invoice' and item.status in ('open', 'uncollectible')
              then item.total_minor - item.amount_paid_minor - item.credited_minor else 0 end, item.currency)::text,
          item.id
        )
        order by item.dated, item.number)
      from (
        select every.*
        from (
          select
            'invoice' as document, invoice.invoice_number as number, invoice.invoice_date as dated, invoice.due_date,
            invoice.status::text, null::text as against, invoice.customer, invoice.first_day, invoice.last_day, invoice.currency,
            invoice.subtotal_minor, invoice.discount_minor, invoice.tax_minor, invoice.total_minor, invoice.amount_paid_minor,
            invoice.credited_minor,
            invoice.id, levied.cgst, levied.sgst, levied.igst
          from public.invoices as invoice
          cross join lateral (
            select
              coalesce(sum(tax.amount_minor) filter (where tax.name = 'CGST'), 0)::bigint as cgst,
              coalesce(sum(tax.amount_minor) filter (where tax.name = 'SGST'), 0)::bigint as sgst,
              coalesce(sum(tax.amount_minor) filter (where tax.name = 'IGST'), 0)::bigint as igst
            from public.invoice_taxes as tax
            where tax.organization_id = invoice.organization_id and tax.invoice_id = invoice.id
          ) as levied
          where invoice.organization_id = organization and invoice.status <> 'draft'
            and invoice.invoice_date between from_day and to_day
          union all
          select
            'credit_note', note.credit_note_number, note.credit_note_date, null, note.status::text, invoice.invoice_number,
            note.customer, null, null, note.currency, -note.subtotal_minor, 0, -note.tax_minor, -note.total_minor, 0, 0, note.id,
            -levied.cgst, -levied.sgst, -levied.igst
          from public.credit_notes as note
          join public.invoices as invoice on invoice.organization_id = note.organization_id and invoice.id = note.invoice_id
          cross join lateral (
            select
              coalesce(sum(tax.amount_minor) filter (where tax.name = 'CGST'), 0)::bigint as cgst,
              coalesce(sum(tax.amount_minor) filter (where tax.name = 'SGST'), 0)::bigint as sgst,
              coalesce(sum(tax.amount_minor) filter (where tax.name = 'IGST'), 0)::bigint as igst
            from public.credit_note_taxes as tax
            where tax.organization_id = note.organization_id and tax.credit_note_id = note.id
          ) as levied
          where note.organization_id = organization and note.status <> 'draft' and note.credit_note_date between from_day and to_day
        ) as every
        order by every.dated, every.number
        limit 10001
      ) as item
    ), '[]')
  );
end
$$;
comment on function private.export_invoices(date, date) is
  'Invoices and credit notes dated in a range of days, both included, as rows for a spreadsheet: a credit note''s amounts are negative, so '
  'that columns add up. 10,001 rows at most: one more than is given. Needs billing.view.';

create function private.export_invoice_lines(from_day date, to_day date) returns jsonb
language plpgsql stable security definer set search_path = ''
as $$
declare
  organization uuid := private.require_org('billing.view');
begin
  perform private.check_export_days(from_day, to_day);
  return jsonb_build_object(
    'columns', jsonb_build_array(
      'document', 'number', 'date', 'line', 'kind', 'meter', 'description', 'sac', 'quantity', 'unit', 'unit_price', 'price_units',
      'currency', 'amount', 'discount'
    ),
    'rows', coalesce((
      select jsonb_agg(
        jsonb_build_array(
          item.document, item.number, item.dated, item.position, item.kind, item.meter_key, item.description, item.sac, item.quantity,
          item.unit, private.decimal_amount(item.unit_price_minor, item.currency)::text, item.price_units, item.currency,
          private.decimal_amount(item.amount_minor, item.currency)::text, private.decimal_amount(item.discount_minor, item.currency)::text
        )
        order by item.dated, item.number, item.position)
      from (
        select every.*
        from (
          select
            'invoice' as document, invoice.invoice_number as number, invoice.invoice_date as dated, line.position, line.kind,
            line.meter_key, line.description, invoice.issuer ->> 'sac_code' as sac, line.quantity, line.unit, line.unit_price_minor,
            line.price_units, invoice.currency, line.amount_minor, line.discount_minor
          from public.invoices as invoice
          join public.invoice_lines as line on line.organization_id = invoice.organization_id and line.invoice_id = invoice.id
          where invoice.organization_id = organization and invoice.status <> 'draft'
            and invoice.invoice_date between from_day and to_day
          union all
          select
            'credit_note', note.credit_note_number, note.credit_note_date, line.position, 'credit', null, line.description,
            note.issuer ->> 'sac_code', null, null, null, null, note.currency, -line.amount_minor, 0
          from public.credit_notes as note
          join public.credit_note_lines as line on line.organization_id = note.organization_id and line.credit_note_id = note.id
          where note.organization_id = organization and note.status <> 'draft' and note.credit_note_date between from_day and to_day
        ) as every
        order by every.dated, every.number, every.position
        limit 10001
      ) as item
    ), '[]')
  );
end
$$;
comment on function private.export_invoice_lines(date, date) is
  'The lines of what export_invoices gives, credit notes'' negative. Needs billing.view.';

create function private.export_payments(from_day date, to_day date) returns jsonb
language plpgsql stable security definer set search_path = ''
as $$
declare
  organization uuid := private.require_org('billing.view');
  zone text := (select tenant.timezone from public.organizations as tenant where tenant.id = organization);
begin
  perform private.check_export_days(from_day, to_day);
  return jsonb_build_object(
    'columns', jsonb_build_array(
      'date', 'payment', 'gateway', 'status', 'purpose', 'invoice', 'currency', 'amount', 'applied', 'refunded', 'problem', 'id'
    ),
    'rows', coalesce((
      select jsonb_agg(
        jsonb_build_array(
          (item.happened_at at time zone zone)::date, item.gateway_payment_id, item.gateway, item.status, item.purpose,
          item.invoice_number, item.currency, private.decimal_amount(item.amount_minor, item.currency)::text,
          private.decimal_amount(item.applied_minor, item.currency)::text,
          private.decimal_amount(item.refunded_minor, item.currency)::text, item.problem, item.id
        )
        order by item.happened_at, item.id)
      from (
        select payment.*, invoice.invoice_number, coalesce(payment.captured_at, payment.created_at) as happened_at
        from public.payments as payment
        left join public.invoices as invoice
          on invoice.organization_id = payment.organization_id and invoice.id = payment.invoice_id
        where payment.organization_id = organization
          and coalesce(payment.captured_at, payment.created_at) >= private.local_midnight(from_day, zone)
          and coalesce(payment.captured_at, payment.created_at) < private.local_midnight(to_day + 1, zone)
        order by happened_at, payment.id
        limit 10001
      ) as item
    ), '[]')
  );
end
$$;
comment on function private.export_payments(date, date) is
  'Payments captured, or else begun, in a range of the organization''s days, both included. 10,001 rows at most. Needs billing.view.';

create function private.gstr1(organization uuid, from_day date, to_day date) returns jsonb
language sql stable set search_path = ''
as $$
  with given as (
    select
      'invoice' as document, invoice.invoice_number as number, invoice.invoice_date as dated, invoice.issuer, invoice.customer,
      invoice.currency, invoice.subtotal_minor - invoice.discount_minor as subtotal_minor, invoice.total_minor,
      invoice.total_minor as invoice_total, 1 as sign, invoice.organization_id, invoice.id as invoice_id, levied.*
    from public.invoices as invoice
    cross join lateral (
      select
        coalesce(sum(tax.rate_bp), 0)::integer as rate_bp,
        coalesce(sum(tax.amount_minor) filter (where tax.name = 'CGST'), 0)::bigint as camt,
        coalesce(sum(tax.amount_minor) filter (where tax.name = 'SGST'), 0)::bigint as samt,
        coalesce(sum(tax.amount_minor) filter (where tax.name = 'IGST'), 0)::bigint as iamt
      from public.invoice_taxes as tax
      where tax.organization_id = invoice.organization_id and tax.invoice_id = invoice.id
    ) as levied
    where invoice.status not in ('draft', 'void')
      and (invoice.organization_id = $1 or $1 is null)
      and invoice.invoice_date between $2 and $3
    union all
    select
      'credit_note', note.credit_note_number, note.credit_note_date, note.issuer, note.customer, note.currency, note.subtotal_minor,
      note.total_minor, invoice.total_minor, -1, invoice.organization_id, invoice.id, levied.*
    from public.credit_notes as note
    join public.invoices as invoice on invoice.organization_id = note.organization_id and invoice.id = note.invoice_id
    cross join lateral (
      select
        coalesce(sum(tax.rate_bp), 0)::integer,
        coalesce(sum(tax.amount_minor) filter (where tax.name = 'CGST'), 0)::bigint,
        coalesce(sum(tax.amount_minor) filter (where tax.name = 'SGST'), 0)::bigint,
        coalesce(sum(tax.amount_minor) filter (where tax.name = 'IGST'), 0)::bigint
      from public.credit_note_taxes as tax
      where tax.organization_id = note.organization_id and tax.credit_note_id = note.id
    ) as levied
    where note.status <> 'draft'
      and (note.organization_id = $1 or $1 is null)
      and note.credit_note_date between $2 and $3
  ),
  placed as (
    select
      given.*, given.customer ->> 'gstin' as ctin, receiver.code as pos,
      receiver.code is distinct from supplier.code as is_inter_state,
      given.issuer ->> 'country_code' = 'IN' and given.customer ->> 'country_code' = 'IN' and given.currency = 'INR'
        and receiver.code is not null as is_domestic,
      -- Where nothing says how its tax is treated, a person does.
      given.issuer ->> 'country_code' = 'IN' and given.customer ->> 'country_code' <> 'IN' and given.currency = 'INR' and exists (
        select
        from public.invoice_taxes as tax
        where tax.organization_id = given.organization_id and tax.invoice_id = given.invoice_id and tax.name = 'IGST'
      ) as is_export,
      case when exists (
        select
        from public.invoice_taxes as tax
        where tax.organization_id = given.organization_id and tax.invoice_id = given.invoice_id and tax.treatment = 'reverse_charge'
      ) then 'Y' else 'N' end as rchrg
    from given
    -- Documents of before the place of supply was written on them say it by their codes.
    left join private.gst_states as receiver
      on receiver.code = coalesce(left(given.customer ->> 'gstin', 2), left(given.customer ->> 'place_of_supply', 2), given.customer ->> 'state_code')
      or not given.customer ?| array['gstin', 'place_of_supply'] and receiver.letters = given.customer ->> 'state_code'
    left join private.gst_states as supplier
      on supplier.code = coalesce(left(given.issuer ->> 'gstin', 2), left(given.issuer ->> 'place_of_supply', 2), given.issuer ->> 'state_code')
      or not given.issuer ?| array['gstin', 'place_of_supply'] and supplier.letters = given.issuer ->> 'state_code'
  ),
  sorted as (
    select
      placed.*,
      case
        when placed.is_export then case placed.document when 'invoice' then 'exp' else 'cdnur' end
        when not placed.is_domestic then 'left_out'
        when placed.ctin is not null then case placed.document when 'invoice' then 'b2b' else 'cdnr' end
        -- A large one to an unregistered buyer of another state is told alone: above a lakh of rupees.
        when placed.is_inter_state and placed.invoice_total > 10000000 then case placed.document when 'invoice' then 'b2cl' else 'cdnur' end
        else 'b2cs'
      end as section,
      jsonb_build_array(jsonb_build_object('num', 1, 'itm_det', jsonb_build_object(
        'txval', private.decimal_amount(placed.subtotal_minor, 'INR'), 'rt', round(placed.rate_bp / 100.0, 2),
        'camt', private.decimal_amount(placed.camt, 'INR'), 'samt', private.decimal_amount(placed.samt, 'INR'),
        'iamt', private.decimal_amount(placed.iamt, 'INR'), 'csamt', 0
      ))) as itms,
      to_char(placed.dated, 'DD-MM-YYYY') as idt,
      private.decimal_amount(placed.total_minor, 'INR') as val
    from placed
  )
  select jsonb_build_object(
    'gstin', (select issuer.gstin from private.billing_issuer as issuer),
    'fp', to_char($3, 'MMYYYY'),
    'b2b', coalesce((
      select jsonb_agg(jsonb_build_object('ctin', buyer.ctin, 'inv', buyer.inv) order by buyer.ctin)
      from (
        select
          sorted.ctin,
          jsonb_agg(
            jsonb_build_object(
              'inum', sorted.number, 'idt', sorted.idt, 'val', sorted.val, 'pos', sorted.pos, 'rchrg', sorted.rchrg, 'inv_typ', 'R', 'itms', sorted.itms
            )
            order by sorted.number) as inv
        from sorted
        where sorted.section = 'b2b'
        group by sorted.ctin
      ) as buyer
    ), '[]'),
    'b2cl', coalesce((
      select jsonb_agg(jsonb_build_object('pos', place.pos, 'inv', place.inv) order by place.pos)
      from (
        select
          sorted.pos,
          jsonb_agg(
            jsonb_build_object('inum', sorted.number, 'idt', sorted.idt, 'val', sorted.val, 'itms', sorted.itms)
            order by sorted.number) as inv
        from sorted
        where sorted.section = 'b2cl'
        group by sorted.pos
      ) as place
    ), '[]'),
    'b2cs', coalesce((
      select jsonb_agg(
        jsonb_build_object(
          'sply_ty', case when rest.is_inter_state then 'INTER' else 'INTRA' end, 'pos', rest.pos, 'typ', 'OE',
          'rt', round(rest.rate_bp / 100.0, 2), 'txval', private.decimal_amount(rest.txval, 'INR'),
          'camt', private.decimal_amount(rest.camt, 'INR'), 'samt', private.decimal_amount(rest.samt, 'INR'),
          'iamt', private.decimal_amount(rest.iamt, 'INR'), 'csamt', 0
        )
        order by rest.pos, rest.rate_bp)
      from (
        select
          sorted.is_inter_state, sorted.pos, sorted.rate_bp, sum(sorted.sign * sorted.subtotal_minor)::bigint as txval,
          sum(sorted.sign * sorted.camt)::bigint as camt, sum(sorted.sign * sorted.samt)::bigint as samt,
          sum(sorted.sign * sorted.iamt)::bigint as iamt
        from sorted
        where sorted.section = 'b2cs'
        group by sorted.is_inter_state, sorted.pos, sorted.rate_bp
      ) as rest
    ), '[]'),
    'cdnr', coalesce((
      select jsonb_agg(jsonb_build_object('ctin', buyer.ctin, 'nt', buyer.nt) order by buyer.ctin)
      from (
        select
          sorted.ctin,
          jsonb_agg(
            jsonb_build_object(
              'ntty', 'C', 'nt_num', sorted.number, 'nt_dt', sorted.idt, 'val', sorted.val, 'pos', sorted.pos, 'rchrg', sorted.rchrg, 'inv_typ', 'R',
              'itms', sorted.itms
            )
            order by sorted.number) as nt
        from sorted
        where sorted.section = 'cdnr'
        group by sorted.ctin
      ) as buyer
    ), '[]'),
    'cdnur', coalesce((
      select jsonb_agg(
        jsonb_build_object(
          'typ', case when not sorted.is_export then 'B2CL' when sorted.iamt = 0 then 'EXPWOP' else 'EXPWP' end, 'ntty', 'C', 'nt_num', sorted.number, 'nt_dt', sorted.idt, 'val', sorted.val, 'pos', sorted.pos, 'itms', sorted.itms
        )
        order by sorted.number)
      from sorted
      where sorted.section = 'cdnur'
    ), '[]'),
    'exp', coalesce((
      select jsonb_agg(jsonb_build_object('exp_typ', way.exp_typ, 'inv', way.inv) order by way.exp_typ)
      from (
        select
          case when sorted.iamt = 0 then 'WOPAY' else 'WPAY' end as exp_typ,
          jsonb_agg(
            jsonb_build_object('inum', sorted.number, 'idt', sorted.idt, 'val', sorted.val, 'itms', jsonb_build_array(
              jsonb_build_object(
                'txval', private.decimal_amount(sorted.subtotal_minor, 'INR'), 'rt', round(sorted.rate_bp / 100.0, 2),
                'iamt', private.decimal_amount(sorted.iamt, 'INR'), 'csamt', 0
              )
            ))
            order by sorted.number) as inv
        from sorted
        where sorted.section = 'exp'
        group by 1
      ) as way
    ), '[]'),
    'left_out', coalesce((
      select jsonb_agg(sorted.number order by sorted.number)
      from sorted
      where sorted.section = 'left_out'
    ), '[]')
  )
$$;
comment on function private.gstr1(uuid, date, date) is
  'What was billed in a range of days in the sections and field names of India''s GSTR-1, for one organization or, with null, for all: '
  'the operator''s own return. left_out names what is not in rupees, without a known place, or abroad without a word on its tax, for a person to '
  'report.';

create function private.export_gstr1(from_day date, to_day date) returns jsonb
language plpgsql stable security definer set search_path = ''
as $$
declare
  organization uuid := private.require_org('billing.view');
begin
  perform private.check_export_days(from_day, to_day);
  if (
    select count(*)
    from public.invoices as invoice
    where invoice.organization_id = organization and invoice.invoice_date between from_day and to_day
  ) > 10000 then
    perform private.raise_error(413, 'export_too_large', 'More than 10,000 invoices: ask for fewer days', 'to');
  end if;
  return private.gstr1(organization, from_day, to_day);
end
$$;
comment on function private.export_gstr1(date, date) is 'gstr1 for the caller''s organization. Needs billing.view.';

-- The calls of a line -------------------------------------------------------------------------------------------------------------

create function private.export_line_calls(invoice_id uuid, line integer) returns jsonb
language plpgsql stable security definer set search_path = ''
as $$
declare
  organization uuid := private.require_org('billing.view');
  sees_numbers boolean := coalesce(private.org_with('call.view') = organization, false);
  bill public.invoices;
  billed public.invoice_lines;
  by_deck boolean;
  skipped bigint;
  in_all bigint;
begin
  select own.* into bill
  from public.invoices as own
  where own.organization_id = organization and own.id = invoice_id and own.status <> 'draft';
  select own.* into billed
  from public.invoice_lines as own
  where own.organization_id = organization and own.invoice_id = bill.id and own.position = line and own.meter_key is not null
    and own.kind <> 'fee';
  if billed.id is null then
    perform private.raise_error(404, 'not_found', 'There is no such invoice, or the line is not of something that was counted', 'id');
  end if;
  by_deck := billed.meter_key = 'rated_calls';
  -- In the order in which they were counted, calls fill the meter's lines one after the other.
  select
    coalesce(sum(other.quantity) filter (where other.position < billed.position), 0)::bigint, coalesce(sum(other.quantity), 0)::bigint
  into skipped, in_all
  from public.invoice_lines as other
  where other.organization_id = organization
    and other.invoice_id = bill.id
    and other.meter_key = billed.meter_key
    and other.kind not in ('fee', 'adjustment');
  return (
    with event as (
      -- What came after the period was billed is what the adjustment charges for, on whichever invoice that is.
      select own.*
      from private.usage_events as own
      where billed.kind <> 'adjustment'
        and own.organization_id = organization
        and own.meter_key = billed.meter_key
        and own.day between bill.first_day and bill.last_day
        and own.occurred_at < bill.period_end
        and not exists (select from private.usage_adjustments as late where late.event_id = own.id)
      union all
      select own.*
      from private.usage_adjustments as late
      join private.usage_events as own on own.occurred_at = late.occurred_at and own.id = late.event_id
      where billed.kind = 'adjustment' and late.organization_id = organization and late.invoice_line_id = billed.id
    ),
    counted as (
      -- A call with all that corrected it, and without what prepaid credit paid, which no invoice bills.
      select
        event.source, coalesce(event.corrects, event.key) as key, min(event.occurred_at) as occurred_at, min(event.id::text) as id,
        sum(
          event.quantity - case
            when event.source <> 'call' then 0
            when billed.meter_key = 'ai_calls' then case when charge.meter_key = 'ai_calls' then event.quantity else 0 end
            when event.corrects is null then coalesce(charge.seconds - charge.overage_seconds, 0)
            else coalesce((select later.credit_seconds from private.call_corrections as later where later.correction_id = event.key), 0)
          end
        )::bigint as quantity
      from event
      left join public.call_charges as charge
        on charge.organization_id = organization
        and charge.call_log_id = case event.source when 'call' then coalesce(event.corrects, event.key)::uuid end
      group by event.source, coalesce(event.corrects, event.key)
    ),
    placed as (
      select
        counted.*,
        -- A sum that is billed by started pulses is more than what was counted: the last call has begun the last one.
        counted.quantity + case
          when lead(counted.key) over calls is null then greatest(in_all - (sum(counted.quantity) over ())::bigint, 0) else 0
        end as filling
      from counted
      where counted.quantity > 0 or billed.kind = 'adjustment' and counted.quantity <> 0
      window calls as (order by counted.occurred_at, counted.id)
    ),
    part as (
      select
        placed.*,
        case
          when billed.kind = 'adjustment' then placed.quantity
          else least(placed.running, skipped + billed.quantity) - greatest(placed.running - placed.filling, skipped)
        end as share
      from (
        select own.*, (sum(own.filling) over (order by own.occurred_at, own.id))::bigint as running
        from placed as own
      ) as placed
    ),
    summed as (
      select
        part.*, (sum(part.share) over (order by part.occurred_at, part.id))::numeric as until, (sum(part.share) over ())::numeric as whole
      from part
      where case billed.kind when 'adjustment' then part.share <> 0 else part.share > 0 end
    ),
    item as (
      select
        summed.*,
        private.divide_half_away(sign(summed.whole) * summed.until * billed.quantity, abs(summed.whole))
          - private.divide_half_away(sign(summed.whole) * (summed.until - summed.share) * billed.quantity, abs(summed.whole)) as units,
        private.divide_half_away(sign(summed.whole) * summed.until * billed.amount_minor, abs(summed.whole))
          - private.divide_half_away(sign(summed.whole) * (summed.until - summed.share) * billed.amount_minor, abs(summed.whole)) as amount_minor
      from summed
      order by summed.occurred_at, summed.id
      limit 10001
    )
    select jsonb_build_object(
      'columns', jsonb_build_array('ended_at', 'source', 'call', 'direction', 'number', 'counted', 'quantity', 'unit', 'currency', 'amount')
        || case when by_deck then '["destination", "prefix", "charged_seconds", "price_per_minute", "pulses"]' else '[]'::jsonb end,
      'rows', coalesce(jsonb_agg(
        jsonb_build_array(
          item.occurred_at, case item.source when 'call_rate' then 'call' else item.source end, item.key, attempt.direction,
          -- Who may not see calls sees of whom they were with the end of the number, as a bill shows it.
          case when sees_numbers then other_end.number else '…' || right(other_end.number, 4) end,
          item.quantity, item.units, billed.unit, bill.currency, private.decimal_amount(item.amount_minor, bill.currency)::text
        )
          || case when by_deck then jsonb_build_array(
            rate.destination, rating.prefix, rating.charged_seconds, (rate.price_micros / 1000000.0)::numeric(18, 6)::text,
            rate.initial_pulse || '/' || rate.next_pulse
          ) else '[]'::jsonb end
        order by item.occurred_at, item.id), '[]')
    )
    from item
    left join public.call_logs as attempt
      on attempt.organization_id = organization
      and attempt.id = case when item.source in ('call', 'call_rate') then item.key::uuid end
    left join lateral (
      select case attempt.direction when 'inbound' then attempt.caller_number else attempt.callee_number end as number
    ) as other_end on true
    left join lateral (
      select own.*
      from private.call_ratings as own
      where by_deck and own.call_log_id = attempt.id and (billed.kind = 'adjustment' or own.rated_at <= bill.finalized_at)
      order by own.number desc
      limit 1
    ) as rating on true
    left join private.rates as rate on rate.version_id = rating.version_id and rate.prefix = rating.prefix
  );
end
$$;
comment on function private.export_line_calls(uuid, integer) is
  'The calls and other counted events that a line of an invoice charges for, each with its part of the quantity and of the amount: both add up '
  'to the line''s, also where a call is partly within the plan or was corrected. Whole numbers are for who holds call.view. Needs billing.view.';

-- What users and handlers call ----------------------------------------------------------------------------------------------------

create function public.get_invoice(invoice_id uuid) returns jsonb
language sql stable set search_path = ''
as $$
  select private.get_invoice(invoice_id)
$$;
comment on function public.get_invoice(uuid) is 'An invoice of the caller''s organization, whole: particulars, lines, taxes. Needs billing.view.';

create function public.get_credit_note(credit_note_id uuid) returns jsonb
language sql stable set search_path = ''
as $$
  select private.get_credit_note(credit_note_id)
$$;
comment on function public.get_credit_note(uuid) is 'A credit note of the caller''s organization, whole. Needs billing.view.';

create function public.preview_invoice() returns jsonb
language sql stable set search_path = ''
as $$
  select private.preview_invoice(private.clock_now())
$$;
comment on function public.preview_invoice() is 'The next invoice of the caller''s organization as of now; writes nothing. Needs billing.view.';

create function public.export_invoices(from_day date, to_day date) returns jsonb
language sql stable set search_path = ''
as $$
  select private.export_invoices(from_day, to_day)
$$;
comment on function public.export_invoices(date, date) is 'Invoices and credit notes of a range of days as {"columns","rows"}. Needs billing.view.';

create function public.export_invoice_lines(from_day date, to_day date) returns jsonb
language sql stable set search_path = ''
as $$
  select private.export_invoice_lines(from_day, to_day)
$$;
comment on function public.export_invoice_lines(date, date) is 'Their lines as {"columns","rows"}. Needs billing.view.';

create function public.export_payments(from_day date, to_day date) returns jsonb
language sql stable set search_path = ''
as $$
  select private.export_payments(from_day, to_day)
$$;
comment on function public.export_payments(date, date) is 'Payments of a range of days as {"columns","rows"}. Needs billing.view.';

create function public.export_gstr1(from_day date, to_day date) returns jsonb
language sql stable set search_path = ''
as $$
  select private.export_gstr1(from_day, to_day)
$$;
comment on function public.export_gstr1(date, date) is 'What was billed in a range of days in the sections of India''s GSTR-1. Needs billing.view.';

create function public.export_line_calls(invoice_id uuid, line integer) returns jsonb
language sql stable set search_path = ''
as $$
  select private.export_line_calls(invoice_id, line)
$$;
comment on function public.export_line_calls(uuid, integer) is 'The calls that a line of an invoice charges for as {"columns","rows"}; they add up to it. Needs billing.view.';

create function public.open_document(jsonb) returns jsonb
language sql stable set search_path = ''
as $$
  select private.open_document($1)
$$;
comment on function public.open_document(jsonb) is
  'For invoice-generation. {"v":1,"document":"invoice|credit_note","id"} gives the document, of whichever organization.';

revoke all on function
  private.set_billing_logo(bytea), private.record_einvoice(text, text, text, text), private.billing_logo(text), private.invoice_document(uuid, uuid),
  private.credit_note_document(uuid, uuid), private.decimal_amount(bigint, text), private.check_export_days(date, date),
  private.gstr1(uuid, date, date), private.preview_document(uuid, timestamptz), private.get_invoice(uuid), private.get_credit_note(uuid), private.preview_invoice(timestamptz),
  private.export_invoices(date, date), private.export_invoice_lines(date, date), private.export_payments(date, date),
  private.export_gstr1(date, date), private.export_line_calls(uuid, integer), public.get_invoice(uuid), public.get_credit_note(uuid),
  public.preview_invoice(), public.export_invoices(date, date), public.export_invoice_lines(date, date),
  public.export_payments(date, date), public.export_gstr1(date, date), public.export_line_calls(uuid, integer),
  private.open_document(jsonb), public.open_document(jsonb)
from public, anon, authenticated, service_role;
grant execute on function
  private.get_invoice(uuid), private.get_credit_note(uuid), private.preview_invoice(timestamptz), private.export_invoices(date, date),
  private.export_invoice_lines(date, date), private.export_payments(date, date), private.export_gstr1(date, date),
  private.export_line_calls(uuid, integer), public.get_invoice(uuid), public.get_credit_note(uuid), public.preview_invoice(),
  public.export_invoices(date, date), public.export_invoice_lines(date, date), public.export_payments(date, date),
  public.export_gstr1(date, date), public.export_line_calls(uuid, integer)
to authenticated;
grant execute on function private.open_document(jsonb), public.open_document(jsonb) to service_role;
