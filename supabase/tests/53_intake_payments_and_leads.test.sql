-- What gateways and those who send leads tell. Events are given as the handler gives them.
begin;
set local search_path = public, extensions, tap;
select plan(82);

create function pg_temp.id(kind text, n integer) returns uuid
language sql immutable strict as $$ select format('00000000-0000-4000-%s-%s', kind, lpad(n::text, 12, '0'))::uuid $$;
insert into private.billing_issuer (legal_name, state_code, country_code, timezone)
values ('Issuer', 'KA', 'IN', 'Asia/Kolkata')
on conflict on constraint billing_issuer_pkey do update
set legal_name = 'Issuer', state_code = 'KA', country_code = 'IN', timezone = 'Asia/Kolkata', payment_terms_days = 15;
insert into public.organizations (id, name, state_code, country_code)
values (pg_temp.id('8000', 1), 'Near', 'KA', 'IN'), (pg_temp.id('8000', 2), 'Far', 'MH', 'GB');
create function pg_temp.bill(n integer) returns uuid
language plpgsql as $$
begin
  insert into public.invoices (id, organization_id, currency, period_start, period_end, timezone, first_day, last_day, subtotal_minor,
    tax_minor, total_minor, issuer, customer)
  values (pg_temp.id('e000', n), pg_temp.id('8000', 1), 'INR', '2026-01-01', '2026-02-01', 'Asia/Kolkata', '2026-01-01', '2026-01-31', 2359, 0,
    2359, '{"timezone": "Asia/Kolkata"}', '{}');
  insert into public.invoice_lines (organization_id, invoice_id, position, kind, description, quantity, unit, unit_price_minor, amount_minor)
  values (pg_temp.id('8000', 1), pg_temp.id('e000', n), 1, 'base', 'Line', 1, 'month', 2359, 2359);
  update public.invoices set status = 'open', finalized_at = '2026-02-01T00:00Z' where id = pg_temp.id('e000', n);
  return pg_temp.id('e000', n);
end
$$;
select pg_temp.bill(n) from generate_series(1, 6) as n;
create function pg_temp.invoice(n integer) returns text
language sql as $$ select status || ' ' || amount_paid_minor from public.invoices where id = pg_temp.id('e000', n) $$;

-- The platform's own sources, and one that an organization made for itself.
insert into public.webhook_sources (id, organization_id, provider, name, secrets_sealed)
values
  (pg_temp.id('f000', 1), null, 'razorpay', 'Razorpay', array['v1.x']), (pg_temp.id('f000', 2), null, 'stripe', 'Stripe', array['v1.x']),
  (pg_temp.id('f000', 3), pg_temp.id('8000', 1), 'stripe', 'Mine', array['v1.x']);
create sequence pg_temp.keys;
create function pg_temp.tell(payload jsonb, source integer default 1, key text default null) returns text
language sql volatile as $$
  select private.apply_event(
    jsonb_build_object(
      'v', 1, 'source', (select provider from public.webhook_sources where id = pg_temp.id('f000', source)),
      'source_id', pg_temp.id('f000', source), 'verified', true,
      'events', jsonb_build_array(jsonb_build_object(
        'kind', payload ->> 'event', 'dedupe_key', coalesce(key, nextval('pg_temp.keys')::text), 'payload', '{"type": "payment"}' || payload
      ))
    ), '2026-02-10T00:00Z'
  ) ->> 'result'
$$;
create function pg_temp.last_error() returns text
language sql stable as $$ select error from private.webhook_events order by id desc limit 1 $$;
create function pg_temp.pay(payment text, status text, invoice integer default null, extra jsonb default '{}') returns jsonb
language sql as $$
  select jsonb_build_object('event', 'payment', 'request', jsonb_build_object('payment_id', payment, 'status', status, 'amount_minor', 2359,
    'currency', 'INR', 'invoice_id', pg_temp.id('e000', invoice), 'occurred_at', '2026-02-09T00:00:00Z') || extra)
$$;

select is(pg_temp.tell(pg_temp.pay('pay_1', 'captured', 1), 3), 'orphan', 'a source of an organization''s own says nothing of money');
select is(pg_temp.last_error(), 'not_a_gateway', 'whoever signs it');
select is(pg_temp.invoice(1), 'open 0', 'and pays nothing');
select is(pg_temp.tell(pg_temp.pay('pay_1', 'authorized', 1)), 'applied', 'authorized');
select is(pg_temp.tell(pg_temp.pay('pay_1', 'captured', 1), key => 'once'), 'applied', 'captured');
select is(pg_temp.invoice(1), 'paid 2359', 'pays');
select is(pg_temp.tell(pg_temp.pay('pay_1', 'captured', 1), key => 'once'), 'duplicate', 'the same event again');
select is(pg_temp.tell(pg_temp.pay('pay_1', 'captured', 1)), 'ignored', 'another event that says the same');
select is(pg_temp.tell(pg_temp.pay('pay_1', 'failed', 1, '{"occurred_at": "2026-02-09T12:00:00Z"}')), 'ignored', 'a failure after the capture');
select is(pg_temp.invoice(1), 'paid 2359', 'takes nothing back');
select is((select count(*) from public.payments), 1::bigint, 'and there is one payment');
select is(pg_temp.tell(pg_temp.pay('pay_2', 'captured', 2, '{"amount_minor": 2358}')), 'applied', 'another amount');
select is(pg_temp.last_error() || ', ' || pg_temp.invoice(2), 'amount_differs, open 0', 'is kept, said, and pays nothing');
select is(pg_temp.tell(pg_temp.pay('pay_3', 'captured', 2, '{"currency": "USD"}')), 'applied', 'another currency');
select is(pg_temp.last_error() || ', ' || pg_temp.invoice(2), 'currency_differs, open 0', 'neither');
select is(pg_temp.tell(pg_temp.pay('pay_4', 'captured', 99)), 'orphan', 'an invoice that is not there');
select private.open_payment(jsonb_build_object('v', 1, 'gateway', 'razorpay', 'order_id', 'order_3', 'invoice_id', pg_temp.id('e000', 3)), '2026-02-02T00:00Z');
select is(pg_temp.tell(pg_temp.pay('pay_5', 'captured', 2, '{"order_id": "order_3"}')), 'applied', 'an order of one invoice with the name of another');
select is(pg_temp.last_error() || ', ' || pg_temp.invoice(2) || ', ' || pg_temp.invoice(3), 'other_invoice, open 0, paid 2359', 'pays the one that it was made for, and it is said');
select is((select count(*) from private.outbox where topic = 'payment.conflict'), 1::bigint, 'to a person too');

-- Refunds.
create function pg_temp.refund(refund text, payment text, status text, amount integer) returns jsonb
language sql as $$
  select jsonb_build_object('event', 'refunds', 'requests', jsonb_build_array(jsonb_build_object('refund_id', refund, 'payment_id', payment,
    'status', status, 'amount_minor', amount, 'currency', 'INR')))
$$;
create function pg_temp.paid_back(payment text) returns bigint
language sql as $$ select refunded_minor from public.payments where gateway_payment_id = payment $$;
select is(pg_temp.tell(pg_temp.refund('rfnd_0', 'pay_9', 'processed', 100)), 'failed', 'a refund before its payment is kept, and tried again');
select is(pg_temp.tell(pg_temp.refund('rfnd_1', 'pay_1', 'pending', 100)), 'applied', 'created');
select is(pg_temp.paid_back('pay_1'), 0::bigint, 'gives nothing back yet');
select is(pg_temp.tell(pg_temp.refund('rfnd_1', 'pay_1', 'processed', 100)), 'applied', 'processed');
select is(pg_temp.paid_back('pay_1'), 100::bigint, 'does');
select is(pg_temp.tell(pg_temp.refund('rfnd_1', 'pay_1', 'pending', 100)), 'ignored', 'older news');
select is(pg_temp.tell(pg_temp.refund('rfnd_1', 'pay_1', 'processed', 100)), 'ignored', 'the same again');
select is(pg_temp.tell(pg_temp.refund('rfnd_2', 'pay_1', 'processed', 2300)), 'applied', 'more than was paid');
select is(pg_temp.last_error() || ' ' || pg_temp.paid_back('pay_1'), 'conflict 100', 'is told, and not counted');
select is(pg_temp.tell(pg_temp.refund('rfnd_1', 'pay_1', 'failed', 100)), 'ignored', 'one that fails after it was processed');
select is(pg_temp.last_error() || ' ' || (select count(*) from private.outbox where topic = 'refund.failed_late'), 'failed_late 1', 'is told');
select is(pg_temp.invoice(1), 'paid 2359', 'what it means for the invoice, a credit note says');
select is(pg_temp.tell('{"event": "refunds", "requests": [], "payment_id": "pay_1", "refunded_minor": 100}'), 'ignored', 'a sum that agrees');
select is(pg_temp.tell('{"event": "refunds", "requests": [], "payment_id": "pay_1", "refunded_minor": 101}'), 'failed', 'one that does not waits for its refunds');

-- Disputes, expiry, methods.
create function pg_temp.dispute(status text, at text) returns jsonb
language sql as $$
  select jsonb_build_object('event', 'dispute', 'request', jsonb_build_object('dispute_id', 'dp_1', 'payment_id', 'pay_1', 'amount_minor', 2359,
    'currency', 'INR', 'status', status, 'reason', 'fraudulent', 'occurred_at', at))
$$;
select is(pg_temp.tell(pg_temp.dispute('lost', '2026-02-09T00:00:00Z')), 'applied', 'a dispute');
select is(pg_temp.tell(pg_temp.dispute('needs_response', '2026-02-08T00:00:00Z')), 'ignored', 'older news of it');
select is((select dispute_status || ' ' || disputed_minor from public.payments where gateway_payment_id = 'pay_1'), 'lost 2359', 'the latest stands');
select is((select count(*) from private.outbox where topic = 'payment.disputed'), 1::bigint, 'and is told');
select private.open_payment(jsonb_build_object('v', 1, 'gateway', 'stripe', 'order_id', 'cs_1', 'invoice_id', pg_temp.id('e000', 4)), '2026-02-02T00:00Z');
select is(pg_temp.tell('{"event": "order_expired", "request": {"order_id": "cs_1"}}', 2), 'applied', 'nobody paid in time');
select is((select status || ' ' || failure_code from public.payments where gateway_order_id = 'cs_1'), 'pending expired', 'which is seen');
select is(pg_temp.tell(jsonb_build_object('event', 'method', 'request', jsonb_build_object('payment_method_id', 'pm_1', 'type', 'stripe', 'customer_id', 'cus_1',
  'organization_id', pg_temp.id('8000', 1))), 2), 'applied', 'a payment method is set up');
select is(pg_temp.tell('{"event": "method", "request": {"payment_method_id": "pm_1", "type": "card", "customer_id": "cus_1", "last4": "4242", "brand": "visa", "expiry_month": 12, "expiry_year": 2030}}', 2),
  'applied', 'and described, whose it is being known');
select results_eq($$select type::text, last4, is_default, organization_id from public.payment_methods$$,
  $$values ('card', '4242', true, pg_temp.id('8000', 1))$$, 'is one card');
select is(pg_temp.tell('{"event": "method", "request": {"payment_method_id": "pm_2", "type": "card", "customer_id": "cus_9", "last4": "1111"}}', 2), 'orphan', 'a stranger''s');
select is(pg_temp.tell('{"event": "method_removed", "request": {"payment_method_id": "pm_1"}}', 2), 'applied', 'removed');
select isnt((select removed_at from public.payment_methods), null, 'it is used no more');

-- Leads.
create function pg_temp.code(query text) returns text
language plpgsql as $$
begin
  execute query;
  return 'no error';
exception
  when sqlstate 'PGRST' then return sqlerrm::jsonb ->> 'code';
  when others then return sqlstate || ' ' || sqlerrm;
end
$$;
select private.create_default_pipeline(pg_temp.id('8000', n)) from generate_series(1, 2) as n;
insert into public.projects (id, organization_id, name) values (pg_temp.id('9000', 1), pg_temp.id('8000', 1), 'Tower'), (pg_temp.id('9000', 2), pg_temp.id('8000', 2), 'Far');
insert into public.api_keys (organization_id, name, prefix, sha256, scopes)
values
  (pg_temp.id('8000', 1), 'one', 'tlk_00000001', sha256('one'), array['lead.write']),
  (pg_temp.id('8000', 2), 'two', 'tlk_00000002', sha256('two'), array['usage.write']),
  (pg_temp.id('8000', 2), 'far', 'tlk_00000003', sha256('far'), array['lead.write']);
insert into public.lead_forms (id, organization_id, project_id, name, fields, consent_text, consent_scopes, rate_per_minute)
values (pg_temp.id('7000', 1), pg_temp.id('8000', 1), pg_temp.id('9000', 1), 'Site',
  '[{"name": "name", "required": true}, {"name": "phone", "required": true}, {"name": "budget"}]', 'You may call me', '{call_service,recording}', 5),
  (pg_temp.id('7000', 2), pg_temp.id('8000', 1), null, 'Off', '[]', null, '{call_service}', 5);
update public.lead_forms set is_active = false where id = pg_temp.id('7000', 2);
create function pg_temp.send(leads jsonb, key text default 'one', prefix text default 'tlk_00000001', extra jsonb default '{}') returns jsonb
language sql volatile as $$
  select private.ingest_leads(jsonb_build_object('v', 1, 'leads', leads,
    'api_key', jsonb_build_object('prefix', prefix, 'sha256', encode(sha256(convert_to(key, 'utf8')), 'hex'))) || extra, '2026-02-10T00:00Z')
$$;
create function pg_temp.outcome(answer jsonb) returns text
language sql as $$ select string_agg(coalesce(r ->> 'code', r ->> 'status'), ',' order by (r ->> 'index')::integer) from jsonb_array_elements(answer -> 'results') as r $$;
select is(private.to_e164('098123 45678', 'IN'), '+919812345678', 'a number of the country, with its zero');
select is(private.to_e164('919812345678', 'IN'), '+919812345678', 'with its code but no plus');
select is(private.to_e164('(020) 7946 0958', 'GB'), '+442079460958', 'of another');
select is(private.to_e164('0039 06 698 82022', 'IN'), '+390669882022', 'from abroad');
select is(private.to_e164('12345', 'IN'), null, 'none');
select is(private.to_e164('9812345678', 'XX'), null, 'of a country that is not known');
select is(private.to_e164('call me', 'IN'), null, 'words');

select is(pg_temp.code($$select pg_temp.send('[{}]', 'wrong')$$), 'invalid_api_key', 'a wrong key');
select is(pg_temp.code($$select pg_temp.send('[{}]', 'two', 'tlk_00000002')$$), 'missing_scope', 'a key for something else');
select is(pg_temp.code($$select pg_temp.send('[]')$$), 'invalid_request', 'no lead');
select is(pg_temp.code($$select pg_temp.send((select jsonb_agg('{}'::jsonb) from generate_series(1, 501)))$$), 'too_many_leads', 'too many');
select is(pg_temp.outcome(pg_temp.send(jsonb_build_array(
    jsonb_build_object('name', ' Asha  Rao ', 'phone', '98123 45678', 'project_id', pg_temp.id('9000', 1), 'fields', '{"budget": 5}'::jsonb),
    jsonb_build_object('name', 'No number'), 7, jsonb_build_object('phone', '98123 45679', 'project_id', pg_temp.id('9000', 2)),
    jsonb_build_object('phone', '9812345670', 'email', 'nonsense'), jsonb_build_object('phone', '9812345671', 'project_id', 'x'),
    jsonb_build_object('phone', '9812345671', 'timezone', 'Mars/North'), jsonb_build_object('phone', '+919812345678', 'project_id', pg_temp.id('9000', 1)),
    jsonb_build_object('phone', '9812345672', 'consents', '[{"scope": "everything", "text": "x"}]'::jsonb)))),
  'created,invalid_phone,invalid_lead,unknown_project,invalid_email,unknown_project,invalid_timezone,updated,invalid_consent', 'each lead has its own outcome');
select results_eq(
  $$select l.name, l.phone, l.source, l.raw_data, s.name, s.order_index, l.organization_id from public.leads as l join public.pipeline_stages as s on s.id = l.stage_id$$,
  $$values ('Asha Rao', '+919812345678', 'api', '{"budget": 5}'::jsonb, 'New Lead', 0, pg_temp.id('8000', 1))$$, 'one lead, at the first stage');
select is((select count(*) from private.outbox where topic = 'lead.created'), 1::bigint, 'told once');
select is((select string_agg(type, ',' order by created_at, id) from public.lead_activities) ~ 'lead_created', true, 'and on its timeline');
select is(pg_temp.outcome(pg_temp.send('[{"phone": "9812345999", "name": "A"}, {"phone": "9812345999", "name": "B"}]')), 'created,updated', 'without a project too a number is one lead');
select is(pg_temp.outcome(pg_temp.send('[{"phone": "+447700900123"}]', 'far', 'tlk_00000003')), 'created', 'another organization''s');
select is((select name || ' ' || organization_id from public.leads where phone = '+447700900123'), '+447700900123 ' || pg_temp.id('8000', 2), 'is its own');
select is(pg_temp.outcome(pg_temp.send('[{"phone": "9812345678", "consents": [{"scope": "recording", "text": "Record me", "source": "written", "proof": {"page": 3}}]}]')), 'created', 'a consent');
select results_eq($$select scope, consent_text, source, proof ->> 'page', proof ->> 'api_key' from public.consents$$,
  $$values ('recording', 'Record me', 'written', '3', 'tlk_00000001')$$, 'word by word, with its proof');
select is((select bool_and(recording_consent) from public.leads where phone = '+919812345678'), true, 'holds for the number');

-- Idempotency.
select is(pg_temp.outcome(pg_temp.send('[{"phone": "9812340001"}]', extra => '{"idempotency_key": "k", "body_sha256": "a"}')), 'created', 'a request with a key');
select is(pg_temp.send('[{"phone": "9812340001"}]', extra => '{"idempotency_key": "k", "body_sha256": "a"}') ->> 'replayed', 'true', 'is answered once more');
select is(pg_temp.outcome(pg_temp.send('[{"phone": "9812340001"}]', extra => '{"idempotency_key": "k", "body_sha256": "a"}')), 'created', 'as it was the first time');
select is(pg_temp.code($$select pg_temp.send('[{"phone": "9812340002"}]', extra => '{"idempotency_key": "k", "body_sha256": "b"}')$$), 'idempotency_conflict', 'but not with another body');
select is(pg_temp.outcome(pg_temp.send('[{"phone": "+447700900124"}]', 'far', 'tlk_00000003', '{"idempotency_key": "k", "body_sha256": "c"}')), 'created', 'whose key it is counts');

-- Forms.
create function pg_temp.submit(lead jsonb, form integer default 1) returns jsonb
language sql volatile as $$ select private.ingest_leads(jsonb_build_object('v', 1, 'form_id', pg_temp.id('7000', form), 'leads', jsonb_build_array(lead)), '2026-02-10T00:00Z') $$;
select is(pg_temp.code($$select pg_temp.submit('{}', 9)$$), 'form_not_found', 'no form');
select is(pg_temp.code($$select pg_temp.submit('{}', 2)$$), 'form_not_found', 'one that is switched off');
select is(pg_temp.outcome(pg_temp.submit('{"phone": "9800000001"}')), 'missing_field', 'a required field');
select is(pg_temp.outcome(pg_temp.submit('{"phone": "9800000001", "name": "Kim", "budget": "5", "status": "converted", "project_id": "x"}')), 'created', 'a submission');
select results_eq($$select project_id, status, source, lead_source, raw_data from public.leads where phone = '+919800000001'$$,
  $$values (pg_temp.id('9000', 1), 'new', 'form', 'Site', '{"budget": "5"}'::jsonb)$$, 'goes where the form says, with what the form asks');
select is((select string_agg(scope || ': ' || consent_text, ', ' order by scope) from public.consents where phone_number = '+919800000001'),
  'call_service: You may call me, recording: You may call me', 'and agrees to what the form says');
select is(pg_temp.outcome(pg_temp.submit('{"phone": "9812345678", "name": "Mallory"}')), 'updated', 'a stranger who knows a number');
select is((select name from public.leads where phone = '+919812345678' and project_id is not null), 'Asha Rao', 'renames nobody');

-- Limits: a form takes five a minute, and two of them are left.
select pg_temp.submit('{"phone": "9800000002", "name": "Kim"}') from generate_series(1, 2);
select is(pg_temp.code($$select pg_temp.submit('{"phone": "9800000003", "name": "Kim"}')$$), 'rate_limited', 'more than a form takes');
select is((select count(*) from public.leads where phone = '+919800000003'), 0::bigint, 'is not taken');
update private.rate_limits set refilled_at = refilled_at - interval '1 minute';
select is(pg_temp.outcome(pg_temp.submit('{"phone": "9800000003", "name": "Kim"}')), 'created', 'a minute later it is');

select * from finish();
rollback;
