-- What is done with a subscription: it is changed, cancelled, paused, taken up again; its prices are set; and what happens when it is
-- not paid.
--
-- The base price of a period may be on an invoice already (in advance) or not (in arrears). Either way a change within the period makes
-- two lines: what the rest of the period would have cost is given back from the very line that charged it, and the rest on the new price
-- is charged. Both are shares by the second, and mirror each other when the change is undone. What is used in a period is priced by the
-- price that holds when the period ends.


-- What a price is -----------------------------------------------------------------------------------------------------------------

create function private.period_base(subscription public.subscriptions) returns bigint
language plpgsql stable set search_path = ''
as $$
declare
  base bigint := (select price.base_minor from public.plan_prices as price where price.id = subscription.plan_price_id);
  period_from timestamptz := private.local_midnight(
    private.period_boundary(subscription.anchor_on, subscription.billing_cycle, subscription.period_no), subscription.timezone);
  period_to timestamptz := private.local_midnight(
    private.period_boundary(subscription.anchor_on, subscription.billing_cycle, subscription.period_no + 1), subscription.timezone);
begin
  return case
    when subscription.period_no < 0 then 0
    when (subscription.current_period_start, subscription.current_period_end) = (period_from, period_to) then base
    else private.prorate(
      base, extract(epoch from subscription.current_period_end - subscription.current_period_start), extract(epoch from period_to - period_from)
    )
  end;
end
$$;
comment on function private.period_base(public.subscriptions) is
  'What the base price comes to in the current period as it is: nothing in a trial, a share where it begins late or is cut short.';

create function private.set_plan_price(
  plan_slug text, cycle public.billing_cycle, currency text, terms jsonb, at timestamptz
) returns uuid
language plpgsql security definer set search_path = ''
as $$
declare
  plan uuid;
  newest public.plan_prices;
  price public.plan_prices;
  meters jsonb;
begin
  -- Whoever sets another price of the plan at once waits.
  select own.id into plan from public.subscription_plans as own where own.slug = plan_slug for no key update;
  if not found then
    perform private.raise_error(404, 'plan_not_found', 'There is no such plan', 'plan');
  end if;
  select coalesce(
    jsonb_object_agg(
      given.key,
      jsonb_build_object(
        'included_units', 0, 'overage_price_minor', null, 'overage_unit', 1, 'limit_units', null, 'hard', false, 'credit_price_minor', null,
        'credit_unit', 60, 'credit_pulse', 1, 'pricing_model', 'per_unit', 'tiers', null, 'rate_deck', null
      ) || given.value || private.deck_term(given.value, set_plan_price.currency) || jsonb_build_object('meter_key', given.key)
    ), '{}')
  into meters
  from jsonb_each(coalesce(terms -> 'meters', '{}')) as given (key, value);

  select own.* into newest
  from public.plan_prices as own
  where own.plan_id = plan and own.billing_cycle = cycle and own.currency = set_plan_price.currency
  order by own.version desc
  limit 1;
  if newest.id is not null and newest.retired_at is null
    and (newest.base_minor, newest.billed_in, newest.minimum_minor) is not distinct from (
      coalesce((terms ->> 'base_minor')::bigint, 0), coalesce(terms ->> 'billed_in', 'arrears'), (terms ->> 'minimum_minor')::bigint
    )
    and meters = coalesce((
      select jsonb_object_agg(term.meter_key, to_jsonb(term) - 'plan_price_id')
      from public.plan_price_meters as term
      where term.plan_price_id = newest.id
    ), '{}') then
    return newest.id;
  end if;

  insert into public.plan_prices (plan_id, version, billing_cycle, currency, base_minor, billed_in, minimum_minor, created_at)
  values (
    plan, coalesce(newest.version, 0) + 1, cycle, set_plan_price.currency, coalesce((terms ->> 'base_minor')::bigint, 0),
    coalesce(terms ->> 'billed_in', 'arrears'), (terms ->> 'minimum_minor')::bigint, at
  )
  returning * into price;
  insert into public.plan_price_meters
  select term.*
  from jsonb_each(meters) as given (key, value)
  cross join lateral jsonb_populate_record(
    null::public.plan_price_meters, given.value || jsonb_build_object('plan_price_id', price.id)
  ) as term
  order by given.key;
  update public.plan_prices as own
  set retired_at = at
  where own.plan_id = plan and own.billing_cycle = cycle and own.currency = set_plan_price.currency
    and own.id <> price.id and own.retired_at is null;
  return price.id;
end
$$;
comment on function private.set_plan_price(text, public.billing_cycle, text, jsonb, timestamptz) is
  'For the operator: what a plan costs from now on. {"base_minor","billed_in","minimum_minor","meters":{"call_seconds":{"included_units",'
  '"overage_price_minor","pricing_model","tiers",…}}} becomes the next version; who subscribed keeps theirs. The same again is no version.';

create function private.add_invoice_item(
  organization_id uuid, description text, quantity bigint, unit text, unit_price_minor bigint, idempotency_key text, at timestamptz
) returns uuid
language plpgsql security definer set search_path = ''
as $$
declare
  subscription public.subscriptions := private.live_subscription(organization_id);
  money text := (select price.currency from public.plan_prices as price where price.id = subscription.plan_price_id);
  item private.invoice_items;
begin
  if subscription.id is null then
    perform private.raise_error(402, 'subscription_inactive', 'There is no live subscription, so nothing will be billed');
  end if;
  if coalesce(length(idempotency_key), 0) not between 1 and 255 then
    perform private.raise_error(400, 'invalid_request', 'idempotency_key must be a text of 1 to 255 characters', 'idempotency_key');
  end if;
  insert into private.invoice_items as known (
    organization_id, subscription_id, kind, currency, description, quantity, unit, unit_price_minor, amount_minor, idempotency_key, created_at
  )
  values (
    add_invoice_item.organization_id, subscription.id, 'item', money, add_invoice_item.description, add_invoice_item.quantity,
    add_invoice_item.unit, add_invoice_item.unit_price_minor, add_invoice_item.quantity * add_invoice_item.unit_price_minor,
    add_invoice_item.idempotency_key, at
  )
  on conflict on constraint invoice_items_key do nothing
  returning known.* into item;
  if item.id is null then
    select known.* into item
    from private.invoice_items as known
    where known.organization_id = add_invoice_item.organization_id and known.idempotency_key = add_invoice_item.idempotency_key;
    if (item.description, item.quantity, item.unit, item.unit_price_minor) <> (
      add_invoice_item.description, add_invoice_item.quantity, add_invoice_item.unit, add_invoice_item.unit_price_minor
    ) then
      perform private.raise_error(409, 'idempotency_conflict', 'Another item was added under this key', 'idempotency_key');
    end if;
  end if;
  return item.id;
end
$$;
comment on function private.add_invoice_item(uuid, text, bigint, text, bigint, text, timestamptz) is
  'For the operator: a line of its own on the subscription''s next invoice, once a key.';


-- Changing ------------------------------------------------------------------------------------------------------------------------

create function private.is_overdue(organization_id uuid) returns boolean
language sql stable set search_path = ''
as $$
  select exists (
    select
    from public.invoices as invoice
    where invoice.organization_id = $1 and invoice.status = 'open' and invoice.past_due_at is not null
  )
$$;
comment on function private.is_overdue(uuid) is 'Whether an organization has an invoice that was not paid in time.';

create function private.lock_subscription(organization_id uuid, at timestamptz) returns public.subscriptions
language plpgsql set search_path = ''
as $$
declare
  live public.subscriptions;
begin
  -- The organization first, as whoever subscribes does.
  perform from public.organizations as tenant where tenant.id = lock_subscription.organization_id for no key update;
  select own.* into live
  from public.subscriptions as own
  where own.organization_id = lock_subscription.organization_id and own.status not in ('cancelled', 'inactive')
  for no key update;
  if live.next_invoice_at <= at and live.billing_hold is null then
    -- What is over is billed before anything else is said of it.
    perform private.close_periods(jsonb_build_object('subscription_id', live.id), at);
    select own.* into live from public.subscriptions as own where own.id = live.id;
    if live.status in ('cancelled', 'inactive') then
      live := null;
    end if;
  end if;
  if live.current_period_end <= at and live.status <> 'paused' then
    perform private.raise_error(409, 'billing_held', 'The last period could not be billed, and somebody has to look at it first');
  end if;
  return live;
end
$$;
comment on function private.lock_subscription(uuid, timestamptz) is
  'The live subscription, in the period that `at` is in and locked until the transaction ends; null without one.';

create function private.repeated_request(organization_id uuid, key text, request jsonb) returns jsonb
language plpgsql set search_path = ''
as $$
declare
  known private.billing_requests;
begin
  if key is null then
    return null;
  end if;
  if length(key) not between 1 and 255 then
    perform private.raise_error(400, 'invalid_request', 'Idempotency-Key must be a text of 1 to 255 characters', 'idempotency_key');
  end if;
  -- The organization's row is what the same request at once waits for.
  perform from public.organizations as tenant where tenant.id = repeated_request.organization_id for no key update;
  select own.* into known
  from private.billing_requests as own
  where own.organization_id = repeated_request.organization_id and own.key = repeated_request.key;
  if known.request <> request then
    perform private.raise_error(409, 'idempotency_conflict', 'Something else was asked under this key', 'idempotency_key');
  end if;
  return known.answer;
end
$$;
comment on function private.repeated_request(uuid, text, jsonb) is
  'What was answered when the same was asked under the same key; null the first time, and without a key. Something else under it ends the '
  'request with 409.';

create function private.answer_request(organization_id uuid, key text, request jsonb, answer jsonb, at timestamptz) returns jsonb
language plpgsql set search_path = ''
as $$
begin
  if key is not null then
    delete from private.billing_requests as old
    where old.organization_id = answer_request.organization_id and old.created_at < at - interval '30 days';
    insert into private.billing_requests (organization_id, key, request, answer, created_at)
    values (answer_request.organization_id, answer_request.key, answer_request.request, answer_request.answer, at);
  end if;
  return answer;
end
$$;
comment on function private.answer_request(uuid, text, jsonb, jsonb, timestamptz) is 'Keeps an answer under its key, and gives it.';

create function private.billed_base(live public.subscriptions) returns public.invoice_lines
language sql stable set search_path = ''
as $$
  select line
  from public.invoices as invoice
  join public.invoice_lines as line on line.organization_id = invoice.organization_id and line.invoice_id = invoice.id
  where invoice.organization_id = live.organization_id and invoice.subscription_id = live.id
    and invoice.status in ('open', 'paid', 'uncollectible')
    and line.kind in ('base', 'charge') and line.amount_minor = live.base_billed_minor
    and coalesce(line.last_day, invoice.last_day) = (live.current_period_end at time zone live.timezone)::date - 1
  order by invoice.period_start desc, line.position desc
  limit 1
$$;
comment on function private.billed_base(public.subscriptions) is
  'The line that charged the base price of what is left of the current period; null where no invoice has one.';

create function private.apply_plan_change(
  organization_id uuid, plan_slug text, cycle_name text, timing text, at timestamptz
) returns jsonb
language plpgsql set search_path = ''
as $$
declare
  live public.subscriptions;
  old public.plan_prices;
  offer public.plan_prices;
  names text[];
  cycle public.billing_cycle;
  issuer private.billing_issuer;
  is_upgrade boolean;
  moment timestamptz := date_trunc('second', at);
  stretch_from timestamptz;
  stretch_minor bigint;
  last_day date;
  whole numeric;
  credit bigint := 0;
  charge bigint := 0;
  invoices jsonb := jsonb_build_array();
  billed public.invoice_lines;
begin
  if timing is not null and timing not in ('now', 'period_end') then
    perform private.raise_error(400, 'invalid_request', 'timing must be now or period_end', 'timing');
  end if;
  if cycle_name is not null and cycle_name not in ('monthly', 'quarterly', 'yearly') then
    perform private.raise_error(400, 'invalid_request', 'cycle must be monthly, quarterly or yearly', 'cycle');
  end if;
  live := private.lock_subscription(organization_id, at);
  cycle := coalesce(cycle_name::public.billing_cycle, live.billing_cycle, 'monthly');
  select price.* into old from public.plan_prices as price where price.id = live.plan_price_id;

  -- A plan that was made for one customer is nobody else's.
  select price.* into offer
  from public.plan_prices as price
  join public.subscription_plans as plan on plan.id = price.plan_id
  join public.organizations as tenant on tenant.id = apply_plan_change.organization_id
  where plan.slug = plan_slug and plan.is_active and (plan.is_public or plan.id = live.plan_id)
    and price.billing_cycle = cycle
    and (price.retired_at is null or price.retired_at > at)
  order by (price.currency = coalesce(old.currency, tenant.currency)) desc, price.version desc
  limit 1;
  if not found then
    perform private.raise_error(422, 'plan_not_on_sale', 'There is no such plan, or it has no price for this billing cycle', 'plan');
  end if;
  if private.is_overdue(organization_id) and private.price_charges(offer.id) then
    perform private.raise_error(402, 'invoice_past_due', 'An invoice is overdue: it comes first');
  end if;

  if live.id is null or not private.price_charges(live.plan_price_id) and live.plan_id <> offer.plan_id then
    perform private.subscribe_organization(organization_id, plan_slug, 'active', at, cycle);
    return jsonb_build_object('result', 'changed', 'timing', 'now', 'effective_at', at, 'credit_minor', 0, 'charge_minor', 0, 'invoices', invoices);
  end if;
  if live.status = 'paused' then
    perform private.raise_error(409, 'subscription_paused', 'A paused subscription is taken up again before it changes');
  end if;
  if live.plan_id = offer.plan_id and live.billing_cycle = cycle then
    -- Back to what there is: what was to come does not.
    update public.subscriptions as own
    set next_plan_price_id = null
    where own.id = live.id and own.next_plan_price_id is not null;
    return jsonb_build_object(
      'result', 'unchanged', 'timing', 'now', 'effective_at', at, 'credit_minor', 0, 'charge_minor', 0, 'invoices', invoices
    );
  end if;
  if offer.currency <> old.currency then
    perform private.raise_error(422, 'currency_differs', 'The plan has no price in the currency that the subscription is billed in', 'plan');
  end if;

  is_upgrade := offer.base_minor * private.cycle_months(old.billing_cycle) >= old.base_minor * private.cycle_months(cycle);
  if timing is null then
    timing := case when live.period_no < 0 or is_upgrade and cycle = live.billing_cycle then 'now' else 'period_end' end;
  end if;
  if timing = 'period_end' then
    update public.subscriptions as own
    set next_plan_price_id = offer.id, cancel_at_period_end = false
    where own.id = live.id;
    return jsonb_build_object(
      'result', 'scheduled', 'timing', timing, 'effective_at', live.current_period_end, 'credit_minor', 0, 'charge_minor', 0,
      'invoices', invoices
    );
  end if;
  if live.period_no >= 0 and cycle <> live.billing_cycle then
    perform private.raise_error(409, 'billing_cycle_differs', 'The billing cycle changes when the period ends', 'timing');
  end if;
  if old.billed_in = 'advance' and not is_upgrade and live.period_no >= 0 then
    perform private.raise_error(422, 'downgrade_waits', 'What is paid in advance is used up first: the change comes when the period ends', 'timing');
  end if;

  if live.period_no >= 0 then
    names := array(
      select plan.name
      from unnest(array[old.plan_id, offer.plan_id]) with ordinality as side (id, number)
      join public.subscription_plans as plan on plan.id = side.id
      order by side.number
    );
    last_day := (live.current_period_end at time zone live.timezone)::date - 1;
    stretch_from := coalesce(live.base_billed_from, live.current_period_start);
    stretch_minor := coalesce(live.base_billed_minor, private.period_base(live));
    moment := greatest(moment, stretch_from);
    whole := extract(epoch from
      private.local_midnight(private.period_boundary(live.anchor_on, live.billing_cycle, live.period_no + 1), live.timezone)
        - private.local_midnight(private.period_boundary(live.anchor_on, live.billing_cycle, live.period_no), live.timezone));
    credit := private.prorate(
      stretch_minor, extract(epoch from live.current_period_end - moment), extract(epoch from live.current_period_end - stretch_from));
    charge := private.prorate(offer.base_minor, extract(epoch from live.current_period_end - moment), whole);
    billed := private.billed_base(live);
    insert into private.invoice_items (
      organization_id, subscription_id, kind, currency, description, unit, unit_price_minor, amount_minor, first_day, last_day, created_at,
      discount_minor
    )
    select
      live.organization_id, live.id, item.kind, old.currency, item.description, private.cycle_unit(cycle), item.price_minor, item.amount_minor,
      (item.from_time at time zone live.timezone)::date, last_day, at,
      -- The discount of the line that is given back goes back with it.
      case
        when item.kind = 'credit' and billed.id is not null
          then -private.prorate(
            billed.discount_minor, extract(epoch from live.current_period_end - moment),
            extract(epoch from live.current_period_end - stretch_from))
      end
    from (
      values
        ('base', names[1] || ' plan, ' || cycle, old.base_minor, stretch_minor, stretch_from, live.base_billed_from is null),
        ('credit', 'Unused time on ' || names[1], -stretch_minor, -credit, moment, true),
        ('charge', 'Remaining time on ' || names[2], offer.base_minor, charge, moment, true)
    ) as item (kind, description, price_minor, amount_minor, from_time, is_new)
    where item.is_new and item.amount_minor <> 0;
  end if;

  update public.subscriptions as own
  set
    plan_price_id = offer.id, plan_id = offer.plan_id, billing_cycle = cycle, next_plan_price_id = null, cancel_at_period_end = false,
    base_billed_minor = case when live.period_no >= 0 then charge end,
    base_billed_from = case when live.period_no >= 0 then moment end
  where own.id = live.id;

  -- What was billed in advance is not on the invoice that comes when the period ends: the difference is billed now.
  if old.billed_in = 'advance' and live.period_no >= 0 and live.next_invoice_at = live.current_period_end and charge > credit then
    select own.* into issuer from private.billing_issuer as own;
    invoices := private.open_invoices((private.bill_periods(array[live.id], issuer, at, true)).drafts, issuer, at);
  end if;
  return jsonb_build_object(
    'result', 'changed', 'timing', timing, 'effective_at', moment, 'credit_minor', -credit, 'charge_minor', charge, 'invoices', invoices
  );
end
$$;
comment on function private.apply_plan_change(uuid, text, text, text, timestamptz) is
  'Puts a subscription on another plan: now, where that costs at least as much, or when the period ends. A cycle changes when the period '
  'ends. Asked again, it changes nothing.';

create function private.change_subscription(plan text, cycle text, timing text, idempotency_key text, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  organization uuid := private.require_org('billing.manage');
  request jsonb := jsonb_build_object('action', 'change', 'plan', plan, 'cycle', cycle, 'timing', timing);
  answer jsonb := private.repeated_request(organization, idempotency_key, request);
begin
  if answer is null then
    answer := private.apply_plan_change(organization, plan, cycle, timing, at);
    answer := private.answer_request(
      organization, idempotency_key, request, answer || jsonb_build_object('subscription', private.subscription_summary(organization)), at);
  end if;
  return answer;
end
$$;
comment on function private.change_subscription(text, text, text, text, timestamptz) is 'apply_plan_change for the caller''s organization. Needs billing.manage.';

create function private.subscription_summary(organization_id uuid) returns jsonb
language sql stable set search_path = ''
as $$
  select jsonb_build_object(
    'id', own.id, 'status', own.status, 'plan', plan.slug, 'billing_cycle', own.billing_cycle,
    'current_period_start', own.current_period_start, 'current_period_end', own.current_period_end,
    'cancel_at_period_end', own.cancel_at_period_end, 'paused_at', own.paused_at
  )
  from private.live_subscription($1) as own
  join public.subscription_plans as plan on plan.id = own.plan_id
$$;
comment on function private.subscription_summary(uuid) is 'The live subscription as answers say it; null without one.';

create function private.preview_subscription_change(plan text, cycle text, timing text, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  organization uuid := private.require_org('billing.view');
  change jsonb;
  document jsonb;
begin
  -- The change itself, taken back: what is shown cannot differ from what would be done.
  begin
    change := private.apply_plan_change(organization, plan, cycle, timing, at);
    if jsonb_array_length(change -> 'invoices') > 0 then
      document := private.invoice_document(organization, (change #>> '{invoices,0,id}')::uuid)
        - array['id', 'invoice_number', 'status', 'amount_paid_minor', 'credited_minor', 'finalized_at', 'paid_at', 'past_due_at']
        || jsonb_build_object('document', 'preview', 'as_of', at, 'is_billed', true);
    else
      document := private.preview_document(organization, at);
    end if;
    raise exception 'taken back' using errcode = 'TL000';
  exception when sqlstate 'TL000' then
    null;
  end;
  return document || jsonb_build_object('change', change - 'invoices');
end
$$;
comment on function private.preview_subscription_change(text, text, text, timestamptz) is
  'The invoice on which a change of plan would be, and when it would hold. Nothing of it stays. Needs billing.view.';

create function private.apply_cancellation(organization uuid, timing text, reason text, at timestamptz) returns jsonb
language plpgsql set search_path = ''
as $$
declare
  live public.subscriptions;
  ends timestamptz;
  unused bigint := 0;
  given_back bigint := 0;
  billed public.invoice_lines;
begin
  if coalesce(timing, 'period_end') not in ('now', 'period_end') then
    perform private.raise_error(400, 'invalid_request', 'timing must be now or period_end', 'timing');
  end if;
  live := private.lock_subscription(organization, at);
  if live.id is null then
    perform private.raise_error(402, 'subscription_inactive', 'There is no live subscription');
  end if;
  perform private.audit(
    organization, 'subscription.cancel', 'subscription', live.id,
    jsonb_strip_nulls(jsonb_build_object('timing', coalesce(timing, 'period_end'), 'reason', left(btrim(reason), 500))), at
  );
  if coalesce(timing, 'period_end') = 'period_end' and live.next_invoice_at is not null then
    update public.subscriptions as own
    set cancel_at_period_end = true, next_plan_price_id = null
    where own.id = live.id;
    return jsonb_build_object('result', 'cancelling', 'ends_at', live.current_period_end);
  end if;

  if live.next_invoice_at is null then
    -- Paused, and billed up to then.
    update public.subscriptions as own
    set status = 'cancelled', cancelled_at = at, paused_at = null, next_plan_price_id = null
    where own.id = live.id;
    return jsonb_build_object('result', 'cancelled', 'ends_at', at, 'credit_minor', 0);
  end if;

  -- Usage is counted by days, so the day that has begun is the last.
  ends := least(
    private.local_midnight((at at time zone live.timezone)::date + 1, live.timezone), live.current_period_end
  );
  if live.base_billed_from is not null and ends < live.current_period_end then
    unused := private.prorate(
      live.base_billed_minor, extract(epoch from live.current_period_end - ends),
      extract(epoch from live.current_period_end - live.base_billed_from));
  end if;
  if unused > 0 then
    billed := private.billed_base(live);
    if billed.id is not null then
      given_back := unused - private.prorate(
        billed.discount_minor, extract(epoch from live.current_period_end - ends),
        extract(epoch from live.current_period_end - live.base_billed_from));
    end if;
    if given_back > 0 then
      perform private.issue_credit_note(
        jsonb_build_object(
          'invoice_id', billed.invoice_id, 'idempotency_key', 'cancelled ' || live.id, 'reason', 'Cancelled before the end of the period',
          'lines', jsonb_build_array(jsonb_build_object('invoice_line_id', billed.id, 'amount_minor', given_back))
        ), at);
    elsif billed.id is null then
      given_back := unused;
      insert into private.invoice_items (
        organization_id, subscription_id, kind, currency, description, unit, unit_price_minor, amount_minor, first_day, last_day, created_at
      )
      select
        organization, live.id, 'credit', price.currency, 'Unused time on ' || plan.name, private.cycle_unit(live.billing_cycle),
        -live.base_billed_minor, -unused, (ends at time zone live.timezone)::date,
        (live.current_period_end at time zone live.timezone)::date - 1, at
      from public.plan_prices as price
      join public.subscription_plans as plan on plan.id = price.plan_id
      where price.id = live.plan_price_id;
    end if;
  end if;
  update public.usage_logs as log
  set period_end = (ends at time zone live.timezone)::date
  where log.organization_id = organization
    and log.period_start = (live.current_period_start at time zone live.timezone)::date
    and log.closed_at is null;
  update public.subscriptions as own
  set
    status = 'cancelled', cancelled_at = at, cancel_at_period_end = true, current_period_end = ends, next_invoice_at = ends,
    next_plan_price_id = null, paused_at = null, base_billed_minor = own.base_billed_minor - unused
  where own.id = live.id;
  return jsonb_build_object('result', 'cancelled', 'ends_at', ends, 'credit_minor', given_back);
end
$$;
comment on function private.apply_cancellation(uuid, text, text, timestamptz) is
  'Ends the subscription with its period, or now: then nothing is dialled any more, the day that has begun is its last, the run bills what '
  'was used, and of the base price the days until then; what was billed in advance beyond them is credited.';

create function private.apply_pause(organization uuid, at timestamptz) returns jsonb
language plpgsql set search_path = ''
as $$
declare
  live public.subscriptions := private.lock_subscription(organization, at);
begin
  if live.status = 'paused' then
    return jsonb_build_object('result', 'unchanged', 'subscription', private.subscription_summary(organization));
  end if;
  if live.status is distinct from 'active' then
    perform private.raise_error(409, 'subscription_not_active', 'Only an active subscription is paused');
  end if;
  update public.subscriptions as own set status = 'paused', paused_at = at where own.id = live.id;
  return jsonb_build_object('result', 'paused', 'subscription', private.subscription_summary(organization));
end
$$;
comment on function private.apply_pause(uuid, timestamptz) is
  'Nothing is dialled from now on. The period that has begun is billed as it was sold, those that begin meanwhile are not.';

create function private.apply_resumption(organization uuid, at timestamptz) returns jsonb
language plpgsql set search_path = ''
as $$
declare
  live public.subscriptions := private.lock_subscription(organization, at);
  last record;
  today date;
  number integer;
  ends date;
  is_advance boolean;
begin
  if live.id is null then
    select plan.slug, own.billing_cycle into last
    from public.subscriptions as own
    join public.subscription_plans as plan on plan.id = own.plan_id
    where own.organization_id = organization and own.status = 'cancelled'
    order by own.cancelled_at desc, own.created_at desc
    limit 1;
    if not found then
      perform private.raise_error(402, 'subscription_inactive', 'There is no subscription to take up again');
    end if;
    if private.is_overdue(organization) then
      perform private.raise_error(402, 'invoice_past_due', 'An invoice is overdue: it comes first');
    end if;
    perform private.subscribe_organization(organization, last.slug, 'active', at, last.billing_cycle);
    return jsonb_build_object('result', 'reactivated', 'subscription', private.subscription_summary(organization));
  end if;

  if live.status = 'paused' and live.next_invoice_at is null then
    -- It goes on in the period of its anchor that today is in, from today on.
    today := (at at time zone live.timezone)::date;
    number := live.period_no;
    while private.period_boundary(live.anchor_on, live.billing_cycle, number + 1) <= today loop
      number := number + 1;
    end loop;
    ends := private.period_boundary(live.anchor_on, live.billing_cycle, number + 1);
    today := greatest(today, private.period_boundary(live.anchor_on, live.billing_cycle, number));
    is_advance := exists (
      select from public.plan_prices as price where price.id = live.plan_price_id and price.billed_in = 'advance' and price.base_minor > 0
    );
    perform private.cut_usage_periods(organization, today, ends, at);
    update public.subscriptions as own
    set
      status = 'active', paused_at = null, cancel_at_period_end = false, period_no = number,
      current_period_start = private.local_midnight(today, live.timezone), current_period_end = private.local_midnight(ends, live.timezone),
      next_invoice_at = private.local_midnight(case when is_advance then today else ends end, live.timezone)
    where own.id = live.id;
  elsif live.status = 'paused' then
    update public.subscriptions as own
    set status = 'active', paused_at = null, cancel_at_period_end = false
    where own.id = live.id;
  elsif live.cancel_at_period_end then
    update public.subscriptions as own set cancel_at_period_end = false where own.id = live.id;
  else
    return jsonb_build_object('result', 'unchanged', 'subscription', private.subscription_summary(organization));
  end if;
  return jsonb_build_object('result', 'resumed', 'subscription', private.subscription_summary(organization));
end
$$;
comment on function private.apply_resumption(uuid, timestamptz) is
  'Takes up again what is paused or about to end, and, on the plan that it was, what is cancelled. A period that is taken up late is billed '
  'from that day on.';

create function private.cancel_subscription(timing text, reason text, idempotency_key text, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  organization uuid := private.require_org('billing.manage');
  request jsonb := jsonb_build_object('action', 'cancel', 'timing', timing, 'reason', reason);
  answer jsonb := private.repeated_request(organization, idempotency_key, request);
begin
  return coalesce(answer, private.answer_request(
    organization, idempotency_key, request, private.apply_cancellation(organization, timing, reason, at), at));
end
$$;
comment on function private.cancel_subscription(text, text, text, timestamptz) is
  'apply_cancellation for the caller''s organization. Needs billing.manage.';

create function private.pause_subscription(idempotency_key text, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  organization uuid := private.require_org('billing.manage');
  request constant jsonb := '{"action": "pause"}'::jsonb;
  answer jsonb := private.repeated_request(organization, idempotency_key, request);
begin
  return coalesce(answer, private.answer_request(organization, idempotency_key, request, private.apply_pause(organization, at), at));
end
$$;
comment on function private.pause_subscription(text, timestamptz) is 'apply_pause for the caller''s organization. Needs billing.manage.';

create function private.resume_subscription(idempotency_key text, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  organization uuid := private.require_org('billing.manage');
  request constant jsonb := '{"action": "resume"}'::jsonb;
  answer jsonb := private.repeated_request(organization, idempotency_key, request);
begin
  return coalesce(answer, private.answer_request(organization, idempotency_key, request, private.apply_resumption(organization, at), at));
end
$$;
comment on function private.resume_subscription(text, timestamptz) is 'apply_resumption for the caller''s organization. Needs billing.manage.';


-- When it is not paid -------------------------------------------------------------------------------------------------------------

create function private.dun_invoices(issuer private.billing_issuer, batch integer, at timestamptz) returns integer
language plpgsql set search_path = ''
as $$
declare
  policy private.dunning_policy;
  today date := (at at time zone issuer.timezone)::date;
  overdue uuid[];
begin
  select own.* into policy from private.dunning_policy as own;
  if not found then
    return 0;
  end if;

  overdue := array(
    select invoice.id
    from public.invoices as invoice
    where invoice.status = 'open' and invoice.due_date < today - policy.grace_days and invoice.past_due_at is null
      and invoice.total_minor > invoice.amount_paid_minor + invoice.credited_minor
    order by invoice.due_date, invoice.id
    limit batch
    for no key update skip locked
  );
  if cardinality(overdue) > 0 then
    update public.invoices as invoice set past_due_at = at where invoice.id = any (overdue);
    insert into private.outbox (organization_id, topic, key, payload, created_at)
    select
      invoice.organization_id, 'invoice.past_due', invoice.id::text,
      jsonb_build_object(
        'invoice_id', invoice.id, 'invoice_number', invoice.invoice_number, 'total_minor', invoice.total_minor,
        'due_minor', invoice.total_minor - invoice.amount_paid_minor - invoice.credited_minor, 'currency', invoice.currency,
        'due_date', invoice.due_date
      ), at
    from public.invoices as invoice
    where invoice.id = any (overdue)
    order by invoice.id
    on conflict do nothing;
    insert into private.payment_retries (organization_id, invoice_id, number, due_at)
    select
      invoice.organization_id, invoice.id, retry.number,
      ((today + retry.day)::timestamp + policy.retry_time) at time zone issuer.timezone
    from public.invoices as invoice
    cross join unnest(policy.retry_days) with ordinality as retry (day, number)
    where invoice.id = any (overdue)
    on conflict do nothing;
    update public.subscriptions as subscription
    set
      status = case subscription.status when 'active' then 'past_due' else subscription.status end,
      past_due_since = coalesce(subscription.past_due_since, at)
    where subscription.status in ('active', 'past_due', 'suspended')
      and exists (
        select from public.invoices as invoice where invoice.id = any (overdue) and invoice.subscription_id = subscription.id
      );
  end if;

  with due as (
    select retry.organization_id, retry.invoice_id, retry.number
    from private.payment_retries as retry
    where retry.due_at <= at and retry.told_at is null
    order by retry.due_at, retry.invoice_id, retry.number
    limit batch
    for no key update skip locked
  ),
  told as (
    update private.payment_retries as retry
    set told_at = at
    from due
    where retry.organization_id = due.organization_id and retry.invoice_id = due.invoice_id and retry.number = due.number
    returning retry.organization_id, retry.invoice_id, retry.number
  )
  insert into private.outbox (organization_id, topic, key, payload, created_at)
  select
    told.organization_id, 'invoice.payment_due', told.invoice_id || ' ' || told.number,
    jsonb_build_object(
      'invoice_id', told.invoice_id, 'number', told.number, 'currency', invoice.currency,
      'amount_minor', invoice.total_minor - invoice.amount_paid_minor - invoice.credited_minor,
      'by', case
        when invoice.total_minor - invoice.amount_paid_minor - invoice.credited_minor
            <= coalesce((policy.mandate_limits ->> invoice.currency)::bigint, 0)
          and exists (
            select
            from public.payment_methods as method
            where method.organization_id = invoice.organization_id and method.is_default and method.removed_at is null
          ) then 'mandate'
        else 'link'
      end
    ), at
  from told
  join public.invoices as invoice on invoice.organization_id = told.organization_id and invoice.id = told.invoice_id
  where invoice.status = 'open'
  on conflict do nothing;

  if policy.suspend_after_days is not null then
    update public.subscriptions as subscription
    set status = 'suspended'
    where subscription.id in (
      select late.id
      from public.subscriptions as late
      where late.status = 'past_due'
        and late.past_due_since <= at - make_interval(days => policy.suspend_after_days)
        and exists (
          select
          from public.invoices as invoice
          where invoice.organization_id = late.organization_id and invoice.subscription_id = late.id and invoice.status = 'open'
            and invoice.past_due_at <= at - make_interval(days => policy.suspend_after_days)
        )
      order by late.id
      limit batch
      for no key update skip locked
    );
  end if;
  if policy.uncollectible_after_days is not null then
    update public.invoices as invoice
    set status = 'uncollectible'
    where invoice.id in (
      select given_up.id
      from public.invoices as given_up
      where given_up.status = 'open' and given_up.due_date < today - policy.uncollectible_after_days
        and given_up.past_due_at <= at - make_interval(days => policy.uncollectible_after_days)
      order by given_up.due_date, given_up.id
      limit batch
      for no key update skip locked
    );
  end if;
  return cardinality(overdue);
end
$$;
comment on function private.dun_invoices(private.billing_issuer, integer, timestamptz) is
  'Finds invoices that were not paid in time, tells each once, plans when payment is asked for again and asks, and suspends or gives up as '
  'the policy says.';

create function private.recover_subscription() returns trigger
language plpgsql security definer set search_path = ''
as $$
begin
  update public.subscriptions as subscription
  set status = 'active', past_due_since = null
  where subscription.organization_id = new.organization_id
    and subscription.id = new.subscription_id
    and subscription.status in ('past_due', 'suspended')
    and subscription.past_due_since is not null
    and not exists (
      select
      from public.invoices as other
      where other.organization_id = new.organization_id
        and other.subscription_id = new.subscription_id
        and other.status in ('open', 'uncollectible')
        and other.past_due_at is not null
        and other.id <> new.id
    );
  return null;
end
$$;
comment on function private.recover_subscription() is
  'Trigger: the last overdue invoice of a subscription is paid, or void: it is active again.';
create trigger recover_subscription after update of status on public.invoices
  for each row when (new.past_due_at is not null and new.status in ('paid', 'void') and old.status <> new.status)
  execute function private.recover_subscription();


-- What users call -----------------------------------------------------------------------------------------------------------------

create function public.change_subscription(
  plan text, cycle text default null, timing text default null, idempotency_key text default null
) returns jsonb
language sql set search_path = ''
as $$
  select private.change_subscription(plan, cycle, timing, idempotency_key, private.clock_now())
$$;
comment on function public.change_subscription(text, text, text, text) is
  'Puts the caller''s organization on another plan, now or when the period ends: {"result":"changed|scheduled|unchanged","timing",'
  '"effective_at","credit_minor","charge_minor","invoices","subscription"}. Needs billing.manage.';

create function public.preview_subscription_change(plan text, cycle text default null, timing text default null) returns jsonb
language sql set search_path = ''
as $$
  select private.preview_subscription_change(plan, cycle, timing, private.clock_now())
$$;
comment on function public.preview_subscription_change(text, text, text) is
  'The invoice on which a change of plan would be, with what the change would be in `change`; writes nothing. Needs billing.view.';

create function public.cancel_subscription(
  timing text default 'period_end', reason text default null, idempotency_key text default null
) returns jsonb
language sql set search_path = ''
as $$
  select private.cancel_subscription(timing, reason, idempotency_key, private.clock_now())
$$;
comment on function public.cancel_subscription(text, text, text) is
  'Ends the caller''s subscription with its period, or now: {"result":"cancelling|cancelled","ends_at","credit_minor"?}. Needs billing.manage.';

create function public.pause_subscription(idempotency_key text default null) returns jsonb
language sql set search_path = ''
as $$
  select private.pause_subscription(idempotency_key, private.clock_now())
$$;
comment on function public.pause_subscription(text) is 'Pauses the caller''s subscription: {"result":"paused|unchanged","subscription"}. Needs billing.manage.';

create function public.resume_subscription(idempotency_key text default null) returns jsonb
language sql set search_path = ''
as $$
  select private.resume_subscription(idempotency_key, private.clock_now())
$$;
comment on function public.resume_subscription(text) is
  'Takes up again what is paused, about to end, or cancelled: {"result":"resumed|reactivated|unchanged","subscription"}. Needs billing.manage.';

revoke all on function
  private.period_base(public.subscriptions), private.set_plan_price(text, public.billing_cycle, text, jsonb, timestamptz),
  private.add_invoice_item(uuid, text, bigint, text, bigint, text, timestamptz), private.is_overdue(uuid),
  private.lock_subscription(uuid, timestamptz), private.billed_base(public.subscriptions), private.repeated_request(uuid, text, jsonb),
  private.answer_request(uuid, text, jsonb, jsonb, timestamptz), private.apply_plan_change(uuid, text, text, text, timestamptz),
  private.apply_cancellation(uuid, text, text, timestamptz), private.apply_pause(uuid, timestamptz),
  private.apply_resumption(uuid, timestamptz), private.subscription_summary(uuid),
  private.change_subscription(text, text, text, text, timestamptz), private.preview_subscription_change(text, text, text, timestamptz),
  private.cancel_subscription(text, text, text, timestamptz), private.pause_subscription(text, timestamptz),
  private.resume_subscription(text, timestamptz), private.dun_invoices(private.billing_issuer, integer, timestamptz),
  private.recover_subscription(), public.change_subscription(text, text, text, text), public.preview_subscription_change(text, text, text),
  public.cancel_subscription(text, text, text), public.pause_subscription(text), public.resume_subscription(text)
from public, anon, authenticated, service_role;
grant execute on function
  private.change_subscription(text, text, text, text, timestamptz), private.preview_subscription_change(text, text, text, timestamptz),
  private.cancel_subscription(text, text, text, timestamptz), private.pause_subscription(text, timestamptz),
  private.resume_subscription(text, timestamptz), public.change_subscription(text, text, text, text),
  public.preview_subscription_change(text, text, text), public.cancel_subscription(text, text, text), public.pause_subscription(text),
  public.resume_subscription(text)
to authenticated;
