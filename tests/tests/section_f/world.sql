-- Where the experiments of section F take place: two organizations, a store, a property, a carrier account, and short ways to say what
-- a dispatcher, a carrier and a payment gateway say. It is Tuesday, 24 November 2026, 10:00 in Kolkata.
create schema scene;
grant usage on schema scene to authenticated;

insert into private.clock_offset (shift) values (timestamptz '2026-11-24 10:00+05:30' - now())
on conflict (single) do update set shift = excluded.shift;

create function scene.id(kind text, n integer) returns uuid
language sql immutable strict as $$ select format('00000000-0000-4000-%s-%s', kind, lpad(n::text, 12, '0'))::uuid $$;


-- Who there is --------------------------------------------------------------------------------------------------------------------

insert into private.billing_issuer (legal_name, state_code, country_code, timezone)
values ('Issuer', 'KA', 'IN', 'Asia/Kolkata')
on conflict on constraint billing_issuer_pkey do update
set legal_name = 'Issuer', state_code = 'KA', country_code = 'IN', timezone = 'Asia/Kolkata', payment_terms_days = 15;

-- Plenty has no limits, Five allows five calls, Metered costs 999.00 a month, Minute stops after 60 seconds, Prepaid is paid with
-- credit from the first second on, Mixed has three calls and then takes credit; each has three seats.
insert into public.subscription_plans (id, slug, name, features)
select scene.id('a100', number::integer), slug, initcap(slug), '{"max_users": 3}'
from unnest(array['plenty', 'five', 'metered', 'minute', 'prepaid', 'mixed']) with ordinality as plan (slug, number);
insert into public.plan_prices (id, plan_id, version, base_minor)
select scene.id('a200', number), scene.id('a100', number), 1, case number when 3 then 99900 else 0 end
from generate_series(1, 6) as number;
insert into public.plan_price_meters (plan_price_id, meter_key, included_units, overage_price_minor, overage_unit, limit_units, hard)
values
  (scene.id('a200', 2), 'ai_calls', 5, null, 1, 5, true),
  (scene.id('a200', 3), 'ai_calls', -1, null, 1, -1, false),
  (scene.id('a200', 3), 'call_seconds', 60, 600, 60, -1, false),
  (scene.id('a200', 4), 'call_seconds', 60, null, 1, 60, true);
insert into public.plan_price_meters (plan_price_id, meter_key, included_units, credit_price_minor, credit_unit)
values (scene.id('a200', 5), 'call_seconds', 0, 600, 60), (scene.id('a200', 6), 'ai_calls', 3, 600, 60);

insert into public.carrier_accounts (id, provider, account_sid, credentials_sealed, api_base, max_concurrent_calls)
values (scene.id('c100', 1), 'plivo', 'MATEST', 'sealed', 'https://carrier.example.com', 1000);
insert into public.organizations (id, name, state_code, max_concurrent_calls)
values (scene.id('8000', 1), 'Near', 'KA', 1000), (scene.id('8000', 2), 'Far', 'MH', 1000);
insert into public.caller_numbers (organization_id, carrier_account_id, phone_number)
values (scene.id('8000', 1), scene.id('c100', 1), '+918099000001'), (scene.id('8000', 2), scene.id('c100', 1), '+918099000002');
insert into auth.users (id, email) values (scene.id('c000', 1), 'near@example.com'), (scene.id('c000', 2), 'far@example.com');
update public.profiles as profile
set organization_id = scene.id('8000', n), system_role = 'owner'
from generate_series(1, 2) as n
where profile.id = scene.id('c000', n);

insert into public.stores (id, organization_id, name, domain, platform, currency_code)
values (scene.id('a000', 1), scene.id('8000', 1), 'Shop', 'shop.example.com', 'shopify', 'USD');
insert into public.customers (id, organization_id, store_id, external_id)
select scene.id('b000', n), scene.id('8000', 1), scene.id('a000', 1), n::text from generate_series(1, 2) as n;
insert into public.conversations (id, organization_id, store_id, conversation_key, channel, start_time, last_activity_at)
values (scene.id('9000', 1), scene.id('8000', 1), scene.id('a000', 1), 'one', 'chat', private.clock_now() - interval '1 hour', private.clock_now() - interval '1 hour');
insert into public.properties (id, organization_id, title, price_minor, type)
values (scene.id('9300', 1), scene.id('8000', 1), 'Flat', 1, 'apartment');
insert into public.property_images (id, organization_id, property_id, url, order_index)
select scene.id('9700', n), scene.id('8000', 1), scene.id('9300', 1), 'https://i.example.com/' || n, n from generate_series(0, 4) as n;


-- What happens in a store ---------------------------------------------------------------------------------------------------------

create function scene.place(number text, customer integer, amount bigint, currency text default 'USD') returns void
language sql as $$
  insert into public.orders (
    organization_id, store_id, customer_id, external_id, subtotal_price_minor, total_price_minor, currency_code, payment_status, order_date
  )
  values (scene.id('8000', 1), scene.id('a000', 1), scene.id('b000', customer), number, amount, amount, currency, 'paid', private.clock_now())
$$;
-- "USD 2 2000 1500" is two orders of 20.00 dollars together, 5.00 paid back; then the orders of all currencies.
create function scene.totals(customer integer) returns text
language sql as $$
  select coalesce(
      (
        select string_agg(concat_ws(' ', total.currency_code, total.total_orders, total.total_spent_minor, total.lifetime_value_minor), ', ' order by total.currency_code)
        from public.customer_totals as total
        where total.customer_id = buyer.id
      ),
      'nothing'
    ) || '; ' || buyer.total_orders
  from public.customers as buyer
  where buyer.id = scene.id('b000', customer)
$$;
create function scene.say(words text, ago interval) returns integer
language sql as $$
  insert into public.conversation_messages (organization_id, store_id, conversation_id, role, content, timestamp)
  values (scene.id('8000', 1), scene.id('a000', 1), scene.id('9000', 1), 'customer', words, private.clock_now() - ago)
  returning message_index
$$;


-- Calls ---------------------------------------------------------------------------------------------------------------------------

create function scene.subscribe(tenant integer, plan text) returns uuid
language sql as $$ select private.subscribe_organization(scene.id('8000', tenant), plan, 'active', private.clock_now()) $$;

-- A running campaign of leads with the numbers +9170000NNNNN, in a project of its own.
create function scene.campaign(tenant integer, variadic numbers integer[]) returns uuid
language plpgsql as $$
declare
  made public.campaigns;
begin
  insert into public.projects (organization_id, name) values (scene.id('8000', tenant), 'Project') returning id into made.project_id;
  insert into public.leads (organization_id, project_id, name, phone)
  select scene.id('8000', tenant), made.project_id, 'Lead ' || number, scene.phone(number) from unnest(numbers) as number;
  insert into public.campaigns (organization_id, project_id, name, max_concurrent_calls)
  values (scene.id('8000', tenant), made.project_id, 'Campaign of ' || numbers[1], 1000)
  returning * into made;
  perform private.enrol_leads(made, null, private.clock_now());
  insert into public.call_queue (organization_id, campaign_id, lead_id, next_retry_at, max_attempts)
  select made.organization_id, made.id, member.lead_id, private.clock_now(), made.max_attempts
  from public.campaign_leads as member
  where member.campaign_id = made.id;
  update public.campaign_leads set status = 'queued' where campaign_id = made.id;
  update public.campaigns set status = 'running' where id = made.id;
  return made.id;
end
$$;
create function scene.phone(number integer) returns text
language sql immutable as $$ select '+9170000' || lpad(number::text, 5, '0') $$;
create function scene.number(phone text) returns integer
language sql immutable as $$ select right(phone, 5)::integer $$;
-- How long calls may last from now on.
create function scene.longest(seconds integer) returns void
language sql as $$ update public.campaigns set max_call_seconds = seconds $$;
-- The latest attempt of a number.
create function scene.attempt(number integer) returns uuid
language sql as $$ select log.id from public.call_logs as log where log.callee_number = scene.phone(number) order by log.id desc limit 1 $$;

-- Whom a release calls, as numbers.
create function scene.release() returns text
language plpgsql as $$
declare
  released jsonb := public.release_calls('{"v": 1, "limit": 500}');
begin
  return (
    select coalesce(string_agg(scene.number(log.callee_number)::text, ' ' order by log.callee_number), 'none')
    from jsonb_array_elements(released -> 'attempts') as attempt
    join public.call_logs as log on log.id = (attempt ->> 'id')::uuid
  );
end
$$;
-- Whom a worker is told to dial, as numbers, and why it is not told the others.
create function scene.begin_dials(worker integer, variadic numbers integer[]) returns text
language plpgsql as $$
declare
  begun jsonb := public.begin_dials(jsonb_build_object(
    'v', 1, 'lease_token', scene.id('d000', worker), 'attempts', (select jsonb_agg(scene.attempt(number)) from unnest(numbers) as number)
  ));
begin
  return (
    select coalesce(string_agg(told.word, ' ' order by told.word), 'none')
    from (
      select scene.number(dial ->> 'to')::text as word from jsonb_array_elements(begun -> 'dials') as dial
      union all
      select skip ->> 'reason' from jsonb_array_elements(begun -> 'skipped') as skip
    ) as told
  );
end
$$;
create function scene.record_dial(number integer, outcome text, extra jsonb default '{}') returns text
language sql as $$
  select public.record_dials(jsonb_build_object('v', 1, 'results', jsonb_build_array(
    jsonb_build_object('attempt_id', scene.attempt(number), 'outcome', outcome, 'provider_call_id', case outcome when 'accepted' then 'call-' || scene.attempt(number) end)
      || extra
  ))) ->> 'recorded'
$$;
-- What the carrier tells of an attempt: of a number's latest one, or of the one that is named.
create function scene.tell(number integer, call jsonb, key text default null, attempt uuid default null) returns text
language sql as $$
  select public.apply_event(jsonb_build_object(
    'v', 1, 'source', 'plivo', 'source_id', scene.id('c100', 1), 'kind', 'call', 'attempt_id', told.attempt,
    'dedupe_key', coalesce(key, gen_random_uuid()::text), 'verified', true, 'headers', '{}'::jsonb, 'body', '',
    'call', jsonb_build_object('provider_call_id', 'call-' || told.attempt) || call
  )) ->> 'result'
  from (select coalesce(attempt, scene.attempt(number)) as attempt) as told
$$;
create function scene.hang_up(number integer, outcome text default 'answered', seconds integer default 30, key text default null) returns text
language sql as $$
  select scene.tell(
    number,
    jsonb_build_object('status', 'ended', 'outcome', outcome, 'bill_duration_seconds', case outcome when 'answered' then seconds else 0 end),
    key
  )
$$;
-- Everything up to ringing.
create function scene.dial(variadic numbers integer[]) returns void
language plpgsql as $$
begin
  perform scene.release();
  perform scene.begin_dials(1, variadic numbers);
  perform scene.record_dial(number, 'accepted') from unnest(numbers) as number;
end
$$;

create function scene.call(number integer) returns text
language sql as $$ select concat_ws(' ', log.status, log.call_status) from public.call_logs as log where log.id = scene.attempt(number) $$;
-- A queue row and its lead's way: "queued retry_busy 1, queued".
create function scene.waits(number integer) returns text
language sql as $$
  select concat_ws(' ', queue.status, queue.wait_reason, queue.attempt_count) || ', ' || concat_ws(' ', member.status, member.skip_reason)
  from public.leads as lead
  join public.call_queue as queue on queue.lead_id = lead.id
  join public.campaign_leads as member on member.campaign_id = queue.campaign_id and member.lead_id = lead.id
  where lead.phone = scene.phone(number)
$$;
-- "completed, 0 open, 2 calls, 1 answered".
create function scene.campaign_of(number integer) returns text
language sql as $$
  select format('%s, %s open, %s calls, %s answered', campaign.status, campaign.open_leads, campaign.total_calls, campaign.answered_calls)
  from public.leads as lead
  join public.campaigns as campaign on campaign.project_id = lead.project_id
  where lead.phone = scene.phone(number)
$$;
-- "ai_calls 1+2, call_seconds 30+0": used, and held.
create function scene.usage(tenant integer) returns text
language sql as $$
  select string_agg(format('%s %s+%s', log.feature_key, log.used, log.held), ', ' order by log.feature_key)
  from (
    select own.feature_key, sum(own.usage_count) as used, sum(own.reserved) as held
    from public.usage_logs as own
    where own.organization_id = scene.id('8000', tenant)
    group by own.feature_key
  ) as log
$$;
create function scene.told(wanted text) returns bigint
language sql as $$ select count(*) from private.outbox where topic = wanted $$;


-- Money ---------------------------------------------------------------------------------------------------------------------------

-- A draft invoice of 1000, which costs no tax.
create function scene.draft(n integer, tenant integer default 1) returns void
language sql as $$
  with draft as (
    insert into public.invoices (
      id, organization_id, currency, period_start, period_end, timezone, first_day, last_day, subtotal_minor, tax_minor, total_minor, issuer, customer
    )
    values (
      scene.id('e000', n), scene.id('8000', tenant), 'INR', '2026-10-01', '2026-11-01', 'Asia/Kolkata', '2026-10-01', '2026-10-31', 1000, 0, 1000,
      '{"timezone": "Asia/Kolkata"}', '{}'
    )
    returning id, organization_id
  )
  insert into public.invoice_lines (organization_id, invoice_id, position, kind, description, quantity, unit, unit_price_minor, amount_minor)
  select draft.organization_id, draft.id, 1, 'base', 'Line', 1, 'month', 1000, 1000 from draft
$$;
create function scene.open(n integer) returns text
language sql as $$ update public.invoices set status = 'open' where id = scene.id('e000', n) returning right(invoice_number, 5)::integer::text $$;
create function scene.invoice(n integer) returns text
language sql as $$ select format('%s, %s paid', status, amount_paid_minor) from public.invoices where id = scene.id('e000', n) $$;
create function scene.pay(payment text, news text, amount bigint default 1000, n integer default 1) returns text
language sql as $$
  select public.record_payment(jsonb_build_object(
    'v', 1, 'gateway', 'razorpay', 'payment_id', payment, 'invoice_id', scene.id('e000', n), 'status', news, 'amount_minor', amount, 'currency', 'INR'
  )) ->> 'result'
$$;
create function scene.credit(amount bigint) returns uuid
language sql as $$ select private.post_credit(scene.id('8000', 1), 'purchase', 'INR', amount, 'bought', private.clock_now()) $$;
create function scene.debit(amount bigint, key text, partial boolean default false) returns bigint
language sql as $$ select private.debit_credit(scene.id('8000', 1), 'INR', amount, key, private.clock_now(), partial) $$;
create function scene.close_periods(at timestamptz) returns text
language sql as $$
  select format('%s closed, %s invoices', answer ->> 'closed', jsonb_array_length(answer -> 'invoices'))
  from private.close_periods('{"v": 1}', at) as answer
$$;
create function scene.use(seconds bigint, key text, at timestamptz) returns void
language sql as $$
  select private.count_usage(scene.id('8000', 1), array['test'], array[key], array['call_seconds'], array[seconds], array[at], at)
$$;

grant execute on all functions in schema scene to authenticated;
