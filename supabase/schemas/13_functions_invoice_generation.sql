-- Closing billing periods: what an ended period used becomes lines, taxes and one numbered invoice, and the subscription moves on.

create function private.divide_half_away(dividend numeric, divisor numeric) returns bigint
language sql immutable set search_path = ''
as $$
  select (sign(dividend) * div(2 * abs(dividend) + divisor, 2 * divisor))::bigint
$$;
comment on function private.divide_half_away(numeric, numeric) is
  'An exact quotient rounded to a whole number, half away from zero; the divisor is positive. The one rounding of money.';

create function private.describe_quantity(quantity bigint, unit text) returns text
language sql immutable set search_path = ''
as $$
  select case
    when quantity is null then 'unlimited'
    when unit = 'second' then quantity / 60 || ' min ' || lpad((quantity % 60)::text, 2, '0') || ' s'
    else quantity::text
  end
$$;
comment on function private.describe_quantity(bigint, text) is 'A quantity as an invoice line says it; null is unlimited.';

create function private.bill_periods(subscription_ids uuid[], issuer private.billing_issuer, at timestamptz) returns uuid[]
language plpgsql set search_path = ''
as $$
declare
  drafts uuid[];
begin
  with ended as materialized (
    select
      gen_random_uuid() as invoice_id,
      subscription.*,
      plan.name as plan_name,
      price.currency,
      price.base_minor,
      (subscription.current_period_start at time zone subscription.timezone)::date as first_day,
      (subscription.current_period_end at time zone subscription.timezone)::date as next_day,
      jsonb_strip_nulls(jsonb_build_object(
        'organization_id', organization.id,
        'name', coalesce(organization.company_name, organization.name),
        'gstin', organization.gstin,
        'address_line_1', organization.address_line_1,
        'address_line_2', organization.address_line_2,
        'city', organization.city,
        'state', organization.state,
        'state_code', organization.state_code,
        'pincode', organization.pincode,
        'country', organization.country,
        'country_code', organization.country_code
      )) as customer,
      organization.country_code,
      case
        when organization.country_code = issuer.country_code and organization.state_code = issuer.state_code then 'intra_state'
        else 'inter_state'
      end as tax_scope
    from public.subscriptions as subscription
    join public.subscription_plans as plan on plan.id = subscription.plan_id
    join public.plan_prices as price on price.id = subscription.plan_price_id
    join public.organizations as organization on organization.id = subscription.organization_id
    where subscription.id = any (subscription_ids)
  ),
  used as materialized (
    -- From the days, which are the evidence, and not from the counter that quotas were judged by.
    select
      ended.invoice_id, term.*, meter.name, meter.unit, meter.position,
      nullif(term.included_units, -1) as allowance,
      coalesce((
        select sum(total.quantity)
        from public.usage_days as total
        where total.organization_id = ended.organization_id
          and total.meter_key = term.meter_key
          and total.day >= ended.first_day and total.day < ended.next_day
      ), 0)::bigint as quantity
    from ended
    join public.plan_price_meters as term on term.plan_price_id = ended.plan_price_id
    join public.meters as meter on meter.key = term.meter_key
  ),
  item as materialized (
    select
      ended.invoice_id, 0 as rank, 0 as meter_position, 'base' as kind, null::text as meter_key,
      ended.plan_name || ' plan, ' || ended.billing_cycle || case when ended.period_no < 0 then ' (trial)' else '' end as description,
      1::bigint as quantity, case ended.billing_cycle when 'yearly' then 'year' else 'month' end as unit,
      case when ended.period_no < 0 then 0 else ended.base_minor end as unit_price_minor, 1::bigint as price_units,
      case when ended.period_no < 0 then 0 else ended.base_minor end as amount_minor
    from ended
    union all
    select
      used.invoice_id, 1, used.position, 'included', used.meter_key,
      used.name || ' included: ' || private.describe_quantity(least(used.quantity, used.allowance), used.unit)
        || case when used.allowance is null then ', unlimited' else ' of ' || private.describe_quantity(used.allowance, used.unit) end,
      least(used.quantity, used.allowance), used.unit, 0, 1, 0
    from used
    where used.allowance is null or used.allowance > 0
    union all
    select
      used.invoice_id, 2, used.position, 'overage', used.meter_key,
      used.name || ' beyond the plan: ' || private.describe_quantity(used.quantity - used.allowance, used.unit),
      used.quantity - used.allowance, used.unit, used.overage_price_minor, used.overage_unit,
      private.divide_half_away((used.quantity - used.allowance)::numeric * used.overage_price_minor, used.overage_unit)
    from used
    where used.quantity > used.allowance and used.overage_price_minor is not null
  ),
  subtotal as materialized (
    select item.invoice_id, sum(item.amount_minor)::bigint as amount_minor
    from item
    group by item.invoice_id
  ),
  tax as materialized (
    select
      ended.invoice_id, rate.name, rate.rate_bp, rate.position, subtotal.amount_minor as taxable_minor,
      private.divide_half_away(subtotal.amount_minor::numeric * rate.rate_bp, 10000) as amount_minor
    from ended
    join subtotal using (invoice_id)
    join public.tax_rates as rate
      on rate.country_code = ended.country_code
      and rate.scope in ('any', ended.tax_scope)
      and rate.valid_from <= (at at time zone issuer.timezone)::date
      and (rate.valid_to is null or rate.valid_to > (at at time zone issuer.timezone)::date)
  ),
  bill as materialized (
    -- A period that costs nothing makes no invoice: a number and a document for zero would only be noise.
    select
      ended.invoice_id, subtotal.amount_minor as subtotal_minor,
      coalesce((select sum(tax.amount_minor) from tax where tax.invoice_id = ended.invoice_id), 0)::bigint as tax_minor
    from ended
    join subtotal using (invoice_id)
    where subtotal.amount_minor > 0
  ),
  draft as (
    insert into public.invoices (
      id, organization_id, subscription_id, currency, period_start, period_end, timezone, first_day, last_day, subtotal_minor,
      tax_minor, total_minor, issuer, customer, created_at, updated_at
    )
    select
      ended.invoice_id, ended.organization_id, ended.id, ended.currency, ended.current_period_start, ended.current_period_end,
      ended.timezone, ended.first_day, ended.next_day - 1, bill.subtotal_minor, bill.tax_minor, bill.subtotal_minor + bill.tax_minor,
      jsonb_strip_nulls(to_jsonb(issuer) - 'singleton'), ended.customer, at, at
    from ended
    join bill using (invoice_id)
    returning invoices.id, invoices.organization_id
  ),
  line as (
    insert into public.invoice_lines (
      organization_id, invoice_id, position, kind, meter_key, description, quantity, unit, unit_price_minor, price_units, amount_minor
    )
    select
      draft.organization_id, draft.id,
      row_number() over (partition by draft.id order by item.rank, item.meter_position, item.meter_key),
      item.kind, item.meter_key, item.description, item.quantity, item.unit, item.unit_price_minor, item.price_units, item.amount_minor
    from draft
    join item on item.invoice_id = draft.id
  ),
  levied as (
    insert into public.invoice_taxes (organization_id, invoice_id, position, name, rate_bp, taxable_minor, amount_minor)
    select
      draft.organization_id, draft.id, row_number() over (partition by draft.id order by tax.position, tax.name), tax.name,
      tax.rate_bp, tax.taxable_minor, tax.amount_minor
    from draft
    join tax on tax.invoice_id = draft.id
  )
  select array_agg(draft.id) into drafts from draft;
  return coalesce(drafts, '{}');
end
$$;
comment on function private.bill_periods(uuid[], private.billing_issuer, timestamptz) is
  'Drafts one invoice for the current period of each subscription, from its price and its days; none for a period that costs '
  'nothing. In arrears, base included; a trial period has no base price.';

create function private.close_periods(request jsonb, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  batch integer := least(greatest(coalesce((request ->> 'limit')::integer, 500), 1), 2000);
  issuer private.billing_issuer;
  claimed uuid[];
  due uuid[];
  held uuid[];
  drafts uuid[] := '{}';
  closed integer := 0;
  patience text := current_setting('lock_timeout');
  month text;
  invoices jsonb := '[]';
begin
  select * into issuer from private.billing_issuer;
  if not found then
    perform private.raise_error(409, 'billing_issuer_missing', 'Nothing is billed before private.billing_issuer says who bills');
  end if;

  update public.subscriptions as subscription
  set status = 'active'
  where subscription.id in (
    select ended.id
    from public.subscriptions as ended
    where ended.status = 'trialing' and ended.trial_ends_at <= at
    order by ended.trial_ends_at, ended.id
    limit batch
    for no key update skip locked
  );

  claimed := array(
    select subscription.id
    from public.subscriptions as subscription
    where subscription.next_invoice_at <= at and subscription.billing_hold is null
    order by subscription.next_invoice_at, subscription.id
    limit batch
    for no key update skip locked
  );

  -- One round bills one period of each; missed periods take further rounds, oldest first.
  loop
    due := array(
      select subscription.id
      from public.subscriptions as subscription
      where subscription.id = any (claimed) and subscription.next_invoice_at <= at and subscription.billing_hold is null
    );
    exit when cardinality(due) = 0 or closed >= 4 * batch;

    -- The counters are the gate. Whoever still writes into the period holds one of them and is waited for; whoever comes after
    -- finds it closed. So each has to exist.
    insert into public.usage_logs (organization_id, feature_key, period_start, period_end)
    select
      subscription.organization_id, term.meter_key,
      (subscription.current_period_start at time zone subscription.timezone)::date,
      (subscription.current_period_end at time zone subscription.timezone)::date
    from public.subscriptions as subscription
    join public.plan_price_meters as term on term.plan_price_id = subscription.plan_price_id
    where subscription.id = any (due)
      and not exists (
        select
        from public.usage_logs as log
        where log.organization_id = subscription.organization_id
          and log.feature_key = term.meter_key
          and log.period_start = (subscription.current_period_start at time zone subscription.timezone)::date
      )
    order by subscription.organization_id, term.meter_key
    on conflict do nothing;

    perform
    from public.usage_logs as log
    join public.subscriptions as subscription
      on subscription.organization_id = log.organization_id
      and log.period_start = (subscription.current_period_start at time zone subscription.timezone)::date
    where subscription.id = any (due)
    order by log.organization_id, log.feature_key, log.period_start
    for no key update of log;

    -- Days and counters were written together, so they agree. If ever they do not, a person decides, not a bill.
    held := array(
      select subscription.id
      from public.subscriptions as subscription
      join public.usage_logs as log
        on log.organization_id = subscription.organization_id
        and log.period_start = (subscription.current_period_start at time zone subscription.timezone)::date
      where subscription.id = any (due)
        and log.usage_count <> (
          select coalesce(sum(total.quantity), 0)
          from public.usage_days as total
          where total.organization_id = log.organization_id
            and total.meter_key = log.feature_key
            and total.day >= log.period_start and total.day < log.period_end
        )
    );
    if cardinality(held) > 0 then
      update public.subscriptions as subscription
      set billing_hold = 'days and counter disagree in the period that began '
        || to_char(subscription.current_period_start at time zone subscription.timezone, 'YYYY-MM-DD')
      where subscription.id = any (held);
      insert into private.outbox (organization_id, topic, key, payload, created_at)
      select
        subscription.organization_id, 'billing.held', subscription.id || ' ' || subscription.period_no,
        jsonb_build_object('subscription_id', subscription.id, 'reason', subscription.billing_hold), at
      from public.subscriptions as subscription
      where subscription.id = any (held)
      on conflict do nothing;
      due := array(select ready.id from unnest(due) as ready (id) where ready.id <> all (held));
    end if;

    drafts := drafts || private.bill_periods(due, issuer, at);

    update public.usage_logs as log
    set closed_at = at
    from public.subscriptions as subscription
    where subscription.id = any (due)
      and log.organization_id = subscription.organization_id
      and log.period_start = (subscription.current_period_start at time zone subscription.timezone)::date;

    with following as (
      select
        subscription.id,
        coalesce(price.id, subscription.plan_price_id) as plan_price_id,
        coalesce(price.plan_id, subscription.plan_id) as plan_id,
        private.local_midnight(
          private.period_boundary(subscription.anchor_on, subscription.billing_cycle, subscription.period_no + 2),
          subscription.timezone
        ) as period_end
      from public.subscriptions as subscription
      left join public.plan_prices as price on price.id = subscription.next_plan_price_id
      where subscription.id = any (due)
    )
    update public.subscriptions as subscription
    set
      plan_price_id = following.plan_price_id,
      plan_id = following.plan_id,
      next_plan_price_id = null,
      period_no = subscription.period_no + 1,
      current_period_start = subscription.current_period_end,
      current_period_end = following.period_end,
      next_invoice_at = following.period_end
    from following
    where subscription.id = following.id and not subscription.cancel_at_period_end;

    -- What was cancelled stops in its last period.
    update public.subscriptions as subscription
    set status = 'cancelled', cancelled_at = subscription.current_period_end, next_invoice_at = null
    where subscription.id = any (due) and subscription.cancel_at_period_end;
    closed := closed + cardinality(due);
  end loop;

  -- Next months' partitions, before they are needed. If somebody is in the way or makes them too, the next run looks again.
  begin
    perform set_config('lock_timeout', '1s', true);
    perform private.ensure_partitions('private.usage_events', at);
  exception when lock_not_available or deadlock_detected or duplicate_table or unique_violation then
    null;
  end;
  perform set_config('lock_timeout', patience, true);

  -- Numbers come last: the series is locked from here to the end of the transaction and not a moment longer.
  if cardinality(drafts) > 0 then
    month := to_char(at at time zone issuer.timezone, 'YYYYMM');
    with block as materialized (
      select private.take_invoice_numbers(month, cardinality(drafts)) as first
    ),
    numbered as (
      select draft.id, block.first + (row_number() over (order by draft.period_start, draft.id))::integer - 1 as number
      from public.invoices as draft, block
      where draft.id = any (drafts)
    ),
    opened as (
      update public.invoices as invoice
      set
        status = 'open',
        invoice_number = private.invoice_number(month, numbered.number),
        finalized_at = at,
        invoice_date = (at at time zone issuer.timezone)::date,
        due_date = (at at time zone issuer.timezone)::date + issuer.payment_terms_days
      from numbered
      where invoice.id = numbered.id
      returning invoice.id, invoice.organization_id, invoice.invoice_number, invoice.total_minor, invoice.currency
    ),
    announced as (
      insert into private.outbox (organization_id, topic, key, payload, created_at)
      select
        opened.organization_id, 'invoice.finalized', opened.id::text,
        jsonb_build_object(
          'invoice_id', opened.id, 'invoice_number', opened.invoice_number, 'total_minor', opened.total_minor,
          'currency', opened.currency
        ),
        at
      from opened
    )
    select jsonb_agg(
      jsonb_build_object('id', opened.id, 'organization_id', opened.organization_id, 'number', opened.invoice_number)
      order by opened.invoice_number)
    into invoices
    from opened;
  end if;

  return jsonb_build_object(
    'closed', closed, 'invoices', invoices, 'more', cardinality(claimed) = batch or cardinality(due) > 0
  );
end
$$;
comment on function private.close_periods(jsonb, timestamptz) is
  'Ends trials that are over, bills every ended period of the subscriptions it claims, once, and moves them to the period that `at` '
  'is in. Several may run at once.';

create function public.close_periods(jsonb) returns jsonb
language sql set search_path = ''
as $$
  select private.close_periods($1, private.clock_now())
$$;
comment on function public.close_periods(jsonb) is
  'For invoice-generation. {"v":1,"limit":500} gives {"closed":n,"invoices":[{"id","organization_id","number"}],"more":bool}.';

revoke all on function
  private.divide_half_away(numeric, numeric), private.describe_quantity(bigint, text),
  private.bill_periods(uuid[], private.billing_issuer, timestamptz), private.close_periods(jsonb, timestamptz),
  public.close_periods(jsonb)
from public, anon, authenticated;
grant execute on function private.close_periods(jsonb, timestamptz), public.close_periods(jsonb) to service_role;
