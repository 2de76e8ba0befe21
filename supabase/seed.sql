-- What a new installation starts with: plans and their prices, further meters, tax rates, and who bills.
-- Running it again adds what is missing and changes nothing that is there, so that an operator's edits stay.

insert into public.meters (key, name, unit, position)
values
  ('sms_messages', 'SMS messages', 'message', 30),
  ('whatsapp_messages', 'WhatsApp messages', 'message', 40)
on conflict (key) do nothing;

insert into public.subscription_plans (slug, name, description, sort_order, features)
values
  (
    'free', 'Free', 'To try it out', 10,
    '{
      "max_users": 3, "max_projects": 2, "max_campaigns": 5, "ai_calls_per_month": 50, "max_leads": 500,
      "support": "community"
    }'
  ),
  (
    'pro', 'Pro', 'For a team that calls every day', 20,
    '{
      "max_users": 10, "max_projects": 10, "max_campaigns": 50, "ai_calls_per_month": 5000, "max_leads": 10000,
      "support": "email", "custom_branding": true, "advanced_analytics": true
    }'
  ),
  (
    'enterprise', 'Enterprise', 'Without limits, at an agreed price', 30,
    '{
      "max_users": -1, "max_projects": -1, "max_campaigns": -1, "ai_calls_per_month": -1, "max_leads": -1,
      "support": "priority", "custom_branding": true, "advanced_analytics": true, "custom_pricing": true,
      "dedicated_account_manager": true, "sla": true, "custom_integrations": true
    }'
  )
on conflict (slug) do nothing;

-- In paise. A plan that has a price, whichever, was priced by somebody: it is left alone. Free stops at its 50 calls; on Pro a call
-- beyond the included ones is paid with prepaid credit, 6.00 for each 60 seconds of it, by the second.
with offer (slug, billing_cycle, base_minor) as (
  values
    ('free', 'monthly'::public.billing_cycle, 0),
    ('pro', 'monthly', 999900),
    ('pro', 'yearly', 9999000),
    ('enterprise', 'monthly', 0),
    ('enterprise', 'yearly', 0)
),
term (slug, billing_cycle, meter_key, included_units, limit_units, hard, credit_price_minor) as (
  values
    ('free', 'monthly'::public.billing_cycle, 'ai_calls', 50, 50, true, null::bigint),
    ('free', 'monthly', 'call_seconds', -1, -1, false, null),
    ('pro', 'monthly', 'ai_calls', 5000, -1, false, 600),
    ('pro', 'monthly', 'call_seconds', -1, -1, false, null),
    ('pro', 'yearly', 'ai_calls', 60000, -1, false, 600),
    ('pro', 'yearly', 'call_seconds', -1, -1, false, null),
    ('enterprise', 'monthly', 'ai_calls', -1, -1, false, null),
    ('enterprise', 'monthly', 'call_seconds', -1, -1, false, null),
    ('enterprise', 'yearly', 'ai_calls', -1, -1, false, null),
    ('enterprise', 'yearly', 'call_seconds', -1, -1, false, null)
),
price as (
  insert into public.plan_prices (plan_id, version, billing_cycle, currency, base_minor)
  select plan.id, 1, offer.billing_cycle, 'INR', offer.base_minor
  from offer
  join public.subscription_plans as plan using (slug)
  where not exists (
    select
    from public.plan_prices as existing
    where existing.plan_id = plan.id and existing.billing_cycle = offer.billing_cycle
  )
  returning plan_prices.id, plan_prices.plan_id, plan_prices.billing_cycle
)
insert into public.plan_price_meters (plan_price_id, meter_key, included_units, limit_units, hard, credit_price_minor)
select price.id, term.meter_key, term.included_units, term.limit_units, term.hard, term.credit_price_minor
from price
join public.subscription_plans as plan on plan.id = price.plan_id
join term on term.slug = plan.slug and term.billing_cycle = price.billing_cycle;

insert into public.tax_rates (country_code, scope, name, rate_bp, position)
values
  ('IN', 'intra_state', 'CGST', 900, 10),
  ('IN', 'intra_state', 'SGST', 900, 20),
  ('IN', 'inter_state', 'IGST', 1800, 10),
  ('GB', 'any', 'VAT', 2000, 10)
on conflict on constraint tax_rates_version_key do nothing;

-- Example particulars: an operator puts their own before the first invoice.
insert into private.billing_issuer (legal_name, address_line_1, city, state, state_code, pincode, country_code, timezone)
values ('Trunkline', '1 MG Road', 'Bengaluru', 'Karnataka', 'KA', '560001', 'IN', 'Asia/Kolkata')
on conflict on constraint billing_issuer_pkey do nothing;

-- Whoever has no subscription tries Free for fourteen days.
select private.subscribe_organization(organization.id, 'free', 'trialing', private.clock_now())
from public.organizations as organization
where not exists (
  select from public.subscriptions as subscription where subscription.organization_id = organization.id
)
order by organization.id;
