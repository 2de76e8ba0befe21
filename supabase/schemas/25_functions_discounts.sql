-- Discounts: what the operator gives, and coupons that users redeem. What they take off an invoice is worked out where it is priced.

create function private.discount_summary(discount private.discounts) returns jsonb
language plpgsql immutable set search_path = ''
as $$
begin
  return jsonb_build_object(
    'id', discount.id, 'name', discount.name, 'coupon', discount.coupon_code, 'percent_bp', discount.percent_bp,
    'amount_minor', discount.amount_minor, 'currency', discount.currency,
    'invoices_left', discount.invoices - discount.applied
  );
end
$$;
comment on function private.discount_summary(private.discounts) is 'A discount as answers say it; `invoices_left` null is for ever.';

create function private.live_discounts(subscription_id uuid) returns jsonb
language sql stable set search_path = ''
as $$
  select coalesce(jsonb_agg(private.discount_summary(discount) order by discount.number), '[]')
  from private.discounts as discount
  where discount.subscription_id = $1 and discount.ended_at is null
$$;
comment on function private.live_discounts(uuid) is 'What is taken off a subscription''s next invoice, in its order.';

create function private.check_discount_terms(terms jsonb) returns void
language plpgsql immutable set search_path = ''
as $$
begin
  if jsonb_typeof(terms) is distinct from 'object'
    or coalesce(btrim(terms ->> 'name'), '') = '' or length(terms ->> 'name') > 100
    or (terms ->> 'percent_bp' is null) = (terms ->> 'amount_minor' is null)
    or (terms ->> 'amount_minor' is null) <> (terms ->> 'currency' is null)
    or terms ->> 'percent_bp' !~ '^[0-9]{1,5}$' or (terms ->> 'percent_bp')::numeric not between 1 and 10000
    or terms ->> 'amount_minor' !~ '^[0-9]{1,15}$' or (terms ->> 'amount_minor')::numeric = 0
    or terms ->> 'currency' !~ '^[A-Z]{3}$'
    or terms ->> 'invoices' !~ '^[0-9]{1,4}$' or (terms ->> 'invoices')::numeric = 0 then
    perform private.raise_error(
      400, 'invalid_request', 'A discount has a name and either percent_bp, or amount_minor and currency; invoices is a number or left out',
      'terms');
  end if;
end
$$;
comment on function private.check_discount_terms(jsonb) is 'Ends the request with 400 unless it says a discount.';

create function private.set_coupon(code text, terms jsonb, at timestamptz) returns text
language plpgsql security definer set search_path = ''
as $$
declare
  known private.coupons;
begin
  perform private.check_discount_terms(terms);
  if coalesce(code, '') !~ '^[A-Z0-9][A-Z0-9_-]{0,39}$' then
    perform private.raise_error(400, 'invalid_request', 'A code is of capitals, digits, - and _, 40 at most', 'code');
  end if;
  insert into private.coupons as own (
    code, name, percent_bp, amount_minor, currency, invoices, max_redemptions, valid_from, valid_to, created_at
  )
  values (
    set_coupon.code, terms ->> 'name', (terms ->> 'percent_bp')::integer, (terms ->> 'amount_minor')::bigint, terms ->> 'currency',
    (terms ->> 'invoices')::integer, (terms ->> 'max_redemptions')::integer, coalesce((terms ->> 'valid_from')::timestamptz, at),
    (terms ->> 'valid_to')::timestamptz, at
  )
  on conflict on constraint coupons_pkey do update
  set name = excluded.name, max_redemptions = excluded.max_redemptions, valid_to = excluded.valid_to
  returning own.* into known;
  if (known.percent_bp, known.amount_minor, known.currency, known.invoices) is distinct from (
    (terms ->> 'percent_bp')::integer, (terms ->> 'amount_minor')::bigint, terms ->> 'currency', (terms ->> 'invoices')::integer
  ) then
    perform private.raise_error(409, 'coupon_in_use', 'What a code takes off does not change: choose another code', 'code');
  end if;
  return known.code;
end
$$;
comment on function private.set_coupon(text, jsonb, timestamptz) is
  'For the operator: a code that takes off {"name","percent_bp"|"amount_minor","currency","invoices","max_redemptions","valid_to"}. Again '
  'under the same code, its name, its limit and its end change; what it takes off does not.';

create function private.add_discount(organization_id uuid, terms jsonb, idempotency_key text, at timestamptz) returns uuid
language plpgsql security definer set search_path = ''
as $$
declare
  subscription public.subscriptions := private.live_subscription(organization_id);
  money text := (select price.currency from public.plan_prices as price where price.id = subscription.plan_price_id);
  discount private.discounts;
begin
  perform private.check_discount_terms(terms);
  if subscription.id is null then
    perform private.raise_error(402, 'subscription_inactive', 'There is no live subscription, so nothing will be billed');
  end if;
  if coalesce(length(idempotency_key), 0) not between 1 and 255 then
    perform private.raise_error(400, 'invalid_request', 'idempotency_key must be a text of 1 to 255 characters', 'idempotency_key');
  end if;
  if terms ->> 'currency' <> money then
    perform private.raise_error(422, 'currency_differs', 'The subscription is billed in another currency', 'currency');
  end if;
  insert into private.discounts as known (
    organization_id, subscription_id, name, percent_bp, amount_minor, currency, invoices, idempotency_key, created_at
  )
  values (
    add_discount.organization_id, subscription.id, terms ->> 'name', (terms ->> 'percent_bp')::integer, (terms ->> 'amount_minor')::bigint,
    terms ->> 'currency', (terms ->> 'invoices')::integer, add_discount.idempotency_key, at
  )
  on conflict on constraint discounts_key do nothing
  returning known.* into discount;
  if discount.id is null then
    select known.* into discount
    from private.discounts as known
    where known.organization_id = add_discount.organization_id and known.idempotency_key = add_discount.idempotency_key;
    if (discount.name, discount.percent_bp, discount.amount_minor, discount.invoices) is distinct from (
      terms ->> 'name', (terms ->> 'percent_bp')::integer, (terms ->> 'amount_minor')::bigint, (terms ->> 'invoices')::integer
    ) then
      perform private.raise_error(409, 'idempotency_conflict', 'Another discount was given under this key', 'idempotency_key');
    end if;
    return discount.id;
  end if;
  perform private.audit(
    discount.organization_id, 'discount.given', 'discount', discount.id, private.discount_summary(discount) - 'id', at
  );
  return discount.id;
end
$$;
comment on function private.add_discount(uuid, jsonb, text, timestamptz) is
  'For the operator: takes {"name","percent_bp"|"amount_minor","currency","invoices"} off an organization''s next invoices, once a key; '
  '`invoices` 1 is the next one alone, left out is all.';

create function private.end_discount(discount_id uuid, at timestamptz) returns boolean
language plpgsql security definer set search_path = ''
as $$
declare
  ended private.discounts;
begin
  update private.discounts as own
  set ended_at = at
  where own.id = discount_id and own.ended_at is null
  returning own.* into ended;
  if not found then
    return false;
  end if;
  perform private.audit(ended.organization_id, 'discount.ended', 'discount', ended.id, private.discount_summary(ended) - 'id', at);
  return true;
end
$$;
comment on function private.end_discount(uuid, timestamptz) is 'For the operator: nothing more is taken off; whether there was anything to end.';

create function private.apply_coupon(organization uuid, code text, at timestamptz) returns jsonb
language plpgsql set search_path = ''
as $$
declare
  live public.subscriptions := private.lock_subscription(organization, at);
  money text := (select price.currency from public.plan_prices as price where price.id = live.plan_price_id);
  wanted text := upper(btrim(code));
  coupon private.coupons;
  discount private.discounts;
begin
  if live.id is null then
    perform private.raise_error(402, 'subscription_inactive', 'There is no live subscription');
  end if;
  if exists (select from private.discounts as known where known.organization_id = organization and known.coupon_code = wanted) then
    perform private.raise_error(409, 'coupon_redeemed', 'The coupon was redeemed already', 'code');
  end if;
  -- Others who redeem it wait here, and see what is left of it.
  select own.* into coupon from private.coupons as own where own.code = wanted and own.valid_from <= at for no key update;
  if not found then
    perform private.raise_error(404, 'coupon_not_found', 'There is no such coupon', 'code');
  end if;
  if coupon.valid_to <= at or coupon.redeemed >= coupon.max_redemptions then
    perform private.raise_error(409, 'coupon_exhausted', 'The coupon has ended', 'code');
  end if;
  if coupon.currency <> money then
    perform private.raise_error(422, 'currency_differs', 'The coupon is of another currency than the subscription', 'code');
  end if;
  update private.coupons as own set redeemed = own.redeemed + 1 where own.code = wanted;
  insert into private.discounts as own (
    organization_id, subscription_id, coupon_code, name, percent_bp, amount_minor, currency, invoices, created_at
  )
  values (
    organization, live.id, coupon.code, coupon.name, coupon.percent_bp, coupon.amount_minor, coupon.currency, coupon.invoices, at
  )
  returning own.* into discount;
  perform private.audit(
    organization, 'coupon.redeemed', 'discount', discount.id, private.discount_summary(discount) - 'id', at
  );
  return jsonb_build_object('result', 'redeemed', 'discount', private.discount_summary(discount));
end
$$;
comment on function private.apply_coupon(uuid, text, timestamptz) is
  'Takes what a coupon says off the subscription''s invoices from the next one on. An organization redeems a coupon once, and all of them '
  'together as often as it may be redeemed.';

create function private.redeem_coupon(code text, idempotency_key text, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  organization uuid := private.require_org('billing.manage');
  request jsonb := jsonb_build_object('action', 'redeem_coupon', 'code', code);
  answer jsonb := private.repeated_request(organization, idempotency_key, request);
begin
  return coalesce(answer, private.answer_request(
    organization, idempotency_key, request, private.apply_coupon(organization, code, at), at));
end
$$;
comment on function private.redeem_coupon(text, text, timestamptz) is 'apply_coupon for the caller''s organization. Needs billing.manage.';

create function public.redeem_coupon(code text, idempotency_key text default null) returns jsonb
language sql set search_path = ''
as $$
  select private.redeem_coupon(code, idempotency_key, private.clock_now())
$$;
comment on function public.redeem_coupon(text, text) is
  'Redeems a coupon for the caller''s subscription: {"result":"redeemed","discount":{"name","percent_bp","amount_minor","currency",'
  '"invoices_left"}}. Needs billing.manage.';

revoke all on function
  private.discount_summary(private.discounts), private.live_discounts(uuid), private.check_discount_terms(jsonb),
  private.set_coupon(text, jsonb, timestamptz), private.add_discount(uuid, jsonb, text, timestamptz),
  private.end_discount(uuid, timestamptz), private.apply_coupon(uuid, text, timestamptz), private.redeem_coupon(text, text, timestamptz),
  public.redeem_coupon(text, text)
from public, anon, authenticated, service_role;
grant execute on function private.redeem_coupon(text, text, timestamptz), public.redeem_coupon(text, text) to authenticated;
