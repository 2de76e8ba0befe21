-- Events out: what makes them, what hands them to endpoints, and what users do with their endpoints.
--
-- An event is a row of private.outbox, written in the transaction that makes it true. Most are written by the triggers here, on the
-- tables whose change they tell of, so that no function can change the state and forget to tell.


-- Numbers -------------------------------------------------------------------------------------------------------------------------

create function private.has_endpoint(organization uuid) returns boolean
language sql stable security definer set search_path = '' as $$
  select exists (select from public.webhook_endpoints as endpoint where endpoint.organization_id = organization and endpoint.enabled)
$$;
comment on function private.has_endpoint(uuid) is 'Whether there is anybody to tell: where there is not, nothing queues up.';

create function private.number_event() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  kind constant text := split_part(new.topic, '.', 1);
begin
  if not exists (select from private.event_types as type where type.topic = new.topic)
    or exists (
      select from private.outbox as told where told.organization_id = new.organization_id and told.topic = new.topic and told.key = new.key
    )
  then
    return new;
  end if;
  new.object := kind || ':' || coalesce(new.payload ->> (kind || '_id'), new.organization_id::text);
  insert into private.event_sequences as counter (organization_id, object, last)
  values (new.organization_id, new.object, 1)
  on conflict (organization_id, object) do update set last = counter.last + 1
  returning counter.last into new.sequence;
  if new.dispatched_at is null and not private.has_endpoint(new.organization_id) then
    new.dispatched_at := new.created_at;
  end if;
  return new;
end
$$;
comment on function private.number_event() is
  'Trigger: an event for outside is given its object and the object''s next number; the same topic and key again takes none.';
create trigger number_event before insert on private.outbox
  for each row when (new.sequence is null) execute function private.number_event();

create function private.nudge_delivery() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  if exists (select from fresh where fresh.sequence is not null and fresh.dispatched_at is null) then
    perform private.nudge('event-delivery');
  end if;
  return null;
end
$$;
comment on function private.nudge_delivery() is 'Trigger: there is something to tell; the deliverer looks now instead of within the minute.';
create trigger nudge_delivery after insert on private.outbox
  referencing new table as fresh for each statement execute function private.nudge_delivery();

create function private.key_at(id uuid, at timestamptz) returns text
language sql immutable set search_path = '' as $$
  select id || ' ' || (extract(epoch from at) * 1000000)::bigint
$$;
comment on function private.key_at(uuid, timestamptz) is 'The key of what may happen to an object more than once, and once a transaction.';


-- What happened -------------------------------------------------------------------------------------------------------------------

create function private.tell_call() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  at      constant timestamptz := private.clock_now();
  was     public.call_logs;
  about   constant jsonb := jsonb_build_object(
    'call_id', new.id, 'direction', new.direction, 'campaign_id', new.campaign_id, 'lead_id', new.lead_id, 'project_id', new.project_id,
    'attempt_no', new.attempt_no, 'caller_number', new.caller_number, 'callee_number', new.callee_number
  );
begin
  if tg_op = 'UPDATE' then
    was := old;
  end if;
  if coalesce(was.status, 'created') < 'queued' and new.status >= 'queued' and (new.status <> 'ended' or new.dialled) then
    perform private.emit(
      new.organization_id, 'call.started', new.id::text,
      about || jsonb_build_object('started_at', coalesce(new.submitted_at, new.created_at)), at
    );
  end if;
  if was.answered_at is null and new.answered_at is not null then
    perform private.emit(
      new.organization_id, 'call.answered', new.id::text, about || jsonb_build_object('answered_at', new.answered_at), at
    );
  end if;
  if new.ai_analysis is not null
    and (was.ai_analysis, was.summary, was.sentiment_score, was.interest_level)
      is distinct from (new.ai_analysis, new.summary, new.sentiment_score, new.interest_level)
  then
    perform private.emit(
      new.organization_id, 'call.analyzed', case when was.ai_analysis is null then new.id::text else new.id || ' ' || gen_random_uuid() end,
      about || jsonb_build_object(
        'summary', new.summary, 'sentiment_score', new.sentiment_score, 'interest_level', new.interest_level, 'analysis', new.ai_analysis,
        'revised', was.ai_analysis is not null
      ),
      at
    );
  end if;
  return null;
end
$$;
comment on function private.tell_call() is
  'Trigger: a call started, was answered, was analysed, and analysed again where more became known. That it ended is told by end_attempt().';
create trigger tell_new_call after insert on public.call_logs
  for each row when (new.status >= 'queued' or new.answered_at is not null) execute function private.tell_call();
create trigger tell_call after update of status, answered_at, ai_analysis, summary, sentiment_score, interest_level on public.call_logs
  for each row when (
    old.status < 'queued' and new.status >= 'queued' or old.answered_at is null and new.answered_at is not null
    or new.ai_analysis is not null and (old.ai_analysis, old.summary, old.sentiment_score, old.interest_level)
      is distinct from (new.ai_analysis, new.summary, new.sentiment_score, new.interest_level)
  ) execute function private.tell_call();

create function private.end_event(attempt public.call_logs) returns jsonb
language sql stable set search_path = '' as $$
  select jsonb_build_object(
    'call_id', attempt.id, 'campaign_id', attempt.campaign_id, 'lead_id', attempt.lead_id, 'attempt_no', attempt.attempt_no,
    'outcome', attempt.call_status, 'answered_at', attempt.answered_at, 'ended_at', attempt.ended_at, 'duration_seconds', attempt.duration,
    'billed_seconds', attempt.bill_duration_seconds
  )
$$;
comment on function private.end_event(public.call_logs) is 'The end of a call as its events carry it.';

create function private.tell_corrected() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  at       constant timestamptz := private.clock_now();
  previous constant jsonb := (
    select jsonb_object_agg(said.key, said.value)
    from jsonb_each(private.end_event(old)) as said
    where said.value is distinct from private.end_event(new) -> said.key
  );
begin
  perform private.emit(
    new.organization_id, 'call.updated', new.id || ' ' || gen_random_uuid(),
    private.end_event(new) || jsonb_build_object('previous', coalesce(previous, '{}')), at
  );
  return null;
end
$$;
comment on function private.tell_corrected() is 'Trigger: what was told of a call''s end was not the last word: the carrier knew better later.';
create trigger tell_corrected after update of call_status, answered_at, ended_at, duration, bill_duration_seconds on public.call_logs
  for each row when (
    old.status = 'ended' and new.status = 'ended' and (old.dialled or old.direction = 'inbound')
    and (old.call_status, old.answered_at, old.ended_at, old.duration, old.bill_duration_seconds)
      is distinct from (new.call_status, new.answered_at, new.ended_at, new.duration, new.bill_duration_seconds)
  ) execute function private.tell_corrected();

create function private.lead_event(lead public.leads) returns jsonb
language sql stable set search_path = '' as $$
  select jsonb_build_object(
    'lead_id', lead.id, 'project_id', lead.project_id, 'name', lead.name, 'phone', lead.phone, 'email', lead.email, 'source', lead.source,
    'external_lead_id', lead.external_lead_id, 'status', lead.status
  )
$$;
comment on function private.lead_event(public.leads) is 'A lead as its events carry it.';

create function private.tell_new_leads() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  at constant timestamptz := private.clock_now();
begin
  -- All at once: an import may be a hundred thousand.
  with numbered as (
    insert into private.event_sequences as counter (organization_id, object, last)
    select fresh.organization_id, 'lead:' || fresh.id, 1 from fresh
    on conflict (organization_id, object) do update set last = counter.last + 1
    returning counter.object, counter.last
  ),
  listened as (
    select tenant.organization_id, private.has_endpoint(tenant.organization_id) as is_heard
    from (select distinct fresh.organization_id from fresh) as tenant
  )
  insert into private.outbox (organization_id, topic, key, payload, created_at, dispatched_at, object, sequence)
  select
    lead.organization_id, 'lead.created', lead.id::text,
    private.lead_event(lead), at, case when not listened.is_heard then at end, numbered.object, numbered.last
  from public.leads as lead
  join fresh on fresh.organization_id = lead.organization_id and fresh.id = lead.id
  join numbered on numbered.object = 'lead:' || fresh.id
  join listened on listened.organization_id = fresh.organization_id
  on conflict do nothing;
  insert into private.outbox (organization_id, topic, key, payload, created_at)
  select
    lead.organization_id, 'lead.opted_out', private.key_at(lead.id, at),
    private.lead_event(lead) || jsonb_build_object('reason', lead.opt_out_reason), at
  from public.leads as lead
  join fresh on fresh.organization_id = lead.organization_id and fresh.id = lead.id
  where fresh.do_not_call
  on conflict do nothing;
  return null;
end
$$;
comment on function private.tell_new_leads() is 'Trigger: there are new leads.';
create trigger tell_new_leads after insert on public.leads
  referencing new table as fresh for each statement execute function private.tell_new_leads();

create function private.tell_opted_out() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  at constant timestamptz := private.clock_now();
begin
  perform private.emit(
    new.organization_id, 'lead.opted_out', private.key_at(new.id, at),
    private.lead_event(new) || jsonb_build_object('reason', new.opt_out_reason), at
  );
  return null;
end
$$;
comment on function private.tell_opted_out() is 'Trigger: a lead is not to be called any more.';
create trigger tell_opted_out after update of do_not_call on public.leads
  for each row when (new.do_not_call and not old.do_not_call) execute function private.tell_opted_out();

create function private.tell_suppressed() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  at constant timestamptz := private.clock_now();
begin
  insert into private.outbox (organization_id, topic, key, payload, created_at)
  select
    lead.organization_id, 'lead.opted_out', private.key_at(lead.id, at),
    private.lead_event(lead) || jsonb_build_object('reason', new.reason), at
  from public.leads as lead
  where lead.organization_id = new.organization_id and lead.phone = new.phone_number and not lead.do_not_call
  order by lead.id
  on conflict do nothing;
  return null;
end
$$;
comment on function private.tell_suppressed() is 'Trigger: a number is not to be called any more, as whichever lead.';
create trigger tell_suppressed after insert on public.suppressions
  for each row execute function private.tell_suppressed();

create function private.tell_campaign() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  at constant timestamptz := private.clock_now();
begin
  perform private.emit(
    new.organization_id,
    'campaign.' || case
      when new.status <> 'running' then new.status::text
      when old.status = 'paused' then 'resumed'
      else 'started'
    end,
    private.key_at(new.id, at),
    jsonb_build_object(
      'campaign_id', new.id, 'name', new.name, 'project_id', new.project_id, 'status', new.status, 'leads', new.total_enrolled,
      'open_leads', new.open_leads, 'reason', new.pause_reason
    ),
    at
  );
  return null;
end
$$;
comment on function private.tell_campaign() is 'Trigger: a campaign starts, pauses, goes on, is called off. That it is complete is told by campaign_completed().';
create trigger tell_campaign after update of status on public.campaigns
  for each row when (old.status <> new.status and new.status in ('running', 'paused', 'cancelled')) execute function private.tell_campaign();

create function private.tell_subscription() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  at  constant timestamptz := private.clock_now();
  same constant text := private.key_at(new.id, at);
  was public.subscriptions;
  kind text := 'subscription.changed';
  told bigint;
begin
  if tg_op = 'INSERT' then
    kind := 'subscription.created';
  else
    was := old;
    if new.status in ('cancelled', 'inactive') and was.status not in ('cancelled', 'inactive') then
      kind := 'subscription.cancelled';
    end if;
  end if;
  -- Whoever changes it holds its row, so that two changes of one moment are counted one after the other.
  select count(*) into told
  from private.outbox as known
  where known.organization_id = new.organization_id and known.topic = kind
    and (known.key = same or known.key like same || ' %');
  perform private.emit(
    new.organization_id,
    kind,
    same || case when told > 0 then ' ' || told + 1 else '' end,
    (
      select jsonb_build_object(
        'subscription_id', new.id, 'plan', plan.slug, 'plan_price_id', new.plan_price_id, 'status', new.status, 'previous_status', was.status,
        'current_period_start', new.current_period_start, 'current_period_end', new.current_period_end,
        'cancel_at_period_end', new.cancel_at_period_end
      )
      from public.subscription_plans as plan
      where plan.id = new.plan_id
    ),
    at
  );
  return null;
end
$$;
comment on function private.tell_subscription() is 'Trigger: a subscription begins, changes or is over. That a period went by is no change.';
create trigger tell_new_subscription after insert on public.subscriptions
  for each row execute function private.tell_subscription();
create trigger tell_subscription after update on public.subscriptions
  for each row when (
    (old.plan_id, old.plan_price_id, old.status, old.cancel_at_period_end)
    is distinct from (new.plan_id, new.plan_price_id, new.status, new.cancel_at_period_end)
  ) execute function private.tell_subscription();

create function private.order_event(placed public.orders) returns jsonb
language sql stable set search_path = '' as $$
  select jsonb_build_object(
    'order_id', placed.id, 'store_id', placed.store_id, 'external_id', placed.external_id, 'order_number', placed.order_number,
    'status', placed.status, 'payment_status', placed.payment_status, 'fulfillment_status', placed.fulfillment_status,
    'total_price_minor', placed.total_price_minor, 'total_refunded_minor', placed.total_refunded_minor,
    'currency_code', placed.currency_code, 'order_date', placed.order_date
  )
$$;
comment on function private.order_event(public.orders) is 'An order as its events carry it.';

create function private.tell_new_orders() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  at constant timestamptz := private.clock_now();
begin
  insert into private.outbox (organization_id, topic, key, payload, created_at)
  select placed.organization_id, 'order.created', placed.id::text, private.order_event(placed), at
  from public.orders as placed
  join fresh on fresh.organization_id = placed.organization_id and fresh.store_id = placed.store_id and fresh.id = placed.id
  order by placed.id
  on conflict do nothing;
  return null;
end
$$;
comment on function private.tell_new_orders() is 'Trigger: a store has new orders.';
create trigger tell_new_orders after insert on public.orders
  referencing new table as fresh for each statement execute function private.tell_new_orders();

create function private.tell_order() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  at constant timestamptz := private.clock_now();
begin
  perform private.emit(
    new.organization_id,
    'order.' || case when new.status = 'cancelled' and old.status <> 'cancelled' then 'cancelled' else 'updated' end,
    private.key_at(new.id, at), private.order_event(new), at
  );
  return null;
end
$$;
comment on function private.tell_order() is 'Trigger: an order''s state, payment or fulfilment changed.';
create trigger tell_order after update of status, payment_status, fulfillment_status, total_refunded_minor on public.orders
  for each row when (
    (old.status, old.payment_status, old.fulfillment_status, old.total_refunded_minor)
    is distinct from (new.status, new.payment_status, new.fulfillment_status, new.total_refunded_minor)
  ) execute function private.tell_order();

create function private.tell_escalated() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  at constant timestamptz := private.clock_now();
begin
  perform private.emit(
    new.organization_id, 'conversation.escalated', private.key_at(new.id, at),
    jsonb_build_object(
      'conversation_id', new.id, 'store_id', new.store_id, 'channel', new.channel, 'customer_id', new.customer_id,
      'order_id', new.order_id, 'reason', new.escalation_reason, 'assigned_agent_id', new.assigned_agent_id,
      'priority_level', new.priority_level
    ),
    at
  );
  return null;
end
$$;
comment on function private.tell_escalated() is 'Trigger: a customer is handed to a person.';
create trigger tell_new_escalated after insert on public.conversations
  for each row when (new.status = 'escalated' or new.escalated_to_human) execute function private.tell_escalated();
create trigger tell_escalated after update of status, escalated_to_human on public.conversations
  for each row when (
    (new.status = 'escalated' or new.escalated_to_human) and not (old.status = 'escalated' or old.escalated_to_human)
  ) execute function private.tell_escalated();


-- Delivering ----------------------------------------------------------------------------------------------------------------------

create function private.wants_event(events text[], topic text) returns boolean
language sql immutable parallel safe set search_path = '' as $$
  select cardinality(events) = 0 or topic = any (events) or split_part(topic, '.', 1) || '.*' = any (events)
$$;
comment on function private.wants_event(text[], text) is 'Whether an endpoint with this filter is told of a topic.';

create function private.event_body(told private.outbox) returns text
language sql stable set search_path = '' as $$
  select jsonb_build_object(
    'id', told.id, 'type', told.topic, 'version', type.version, 'organization_id', told.organization_id, 'object', told.object,
    'sequence', told.sequence, 'timestamp', to_char(told.created_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
    'data', told.payload
  )::text
  from private.event_types as type
  where type.topic = told.topic
$$;
comment on function private.event_body(private.outbox) is 'An event as it is sent: the same bytes at every attempt.';

create function private.fan_out(each integer, at timestamptz) returns integer
language plpgsql volatile security definer set search_path = '' set jit = off set enable_seqscan = off as $$
declare
  made integer;
begin
  with recursive tenants as (
    (
      select told.organization_id
      from private.outbox as told
      where told.dispatched_at is null and told.sequence is not null
      order by told.organization_id
      limit 1
    )
    union all
    select (
      select told.organization_id
      from private.outbox as told
      where told.dispatched_at is null and told.sequence is not null and told.organization_id > tenants.organization_id
      order by told.organization_id
      limit 1
    )
    from tenants
    where tenants.organization_id is not null
  ),
  chosen as (
    select event.id
    from tenants
    cross join lateral (
      select told.id
      from private.outbox as told
      where told.organization_id = tenants.organization_id and told.dispatched_at is null and told.sequence is not null
      order by told.id
      limit each
    ) as event
  ),
  locked as (
    select told.id
    from private.outbox as told
    where told.id in (select chosen.id from chosen) and told.dispatched_at is null
    order by told.id
    for no key update skip locked
  ),
  taken as (
    update private.outbox as told
    set dispatched_at = at
    from locked
    where told.id = locked.id
    returning told.id, told.organization_id, told.topic
  )
  insert into public.event_deliveries (organization_id, endpoint_id, event_id, topic, next_attempt_at, created_at)
  select taken.organization_id, endpoint.id, taken.id, taken.topic, at, at
  from taken
  join public.webhook_endpoints as endpoint
    on endpoint.organization_id = taken.organization_id and endpoint.enabled and private.wants_event(endpoint.events, taken.topic)
  order by taken.id, endpoint.id
  on conflict (endpoint_id, event_id) do nothing;
  get diagnostics made = row_count;
  return made;
end
$$;
comment on function private.fan_out(integer, timestamptz) is
  'Makes a delivery of each waiting event for each endpoint that listens to it; of each organization the oldest few, so that none waits behind another.';

create function private.claim_deliveries(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' set jit = off set enable_seqscan = off as $$
declare
  wanted  constant integer := least(greatest(coalesce((request ->> 'limit')::integer, 200), 1), 500);
  claimed jsonb;
begin
  perform private.fan_out(500, at);
  with ready as (
    -- An endpoint that nothing reaches is tried with a few at a time, so that its timeouts hold up little else.
    select
      endpoint.organization_id, endpoint.id,
      case when endpoint.failing_since is not null then 4 when endpoint.is_slow then 20 else 50 end - (
        select count(*) from public.event_deliveries as busy where busy.endpoint_id = endpoint.id and busy.lease_until > now()
      ) as room
    from public.webhook_endpoints as endpoint
    where endpoint.enabled
  ),
  candidates as (
    select
      ready.organization_id, due.id, due.next_attempt_at,
      row_number() over (partition by ready.id order by due.next_attempt_at, due.id) as nth
    from ready
    cross join lateral (
      select delivery.id, delivery.next_attempt_at
      from public.event_deliveries as delivery
      where delivery.endpoint_id = ready.id and delivery.status in ('pending', 'failed') and delivery.next_attempt_at <= at
        and (delivery.lease_until is null or delivery.lease_until <= now())
      order by delivery.next_attempt_at, delivery.id
      limit least(greatest(ready.room, 0), wanted)
    ) as due
  ),
  ranked as (
    select
      candidate.id, candidate.next_attempt_at,
      row_number() over (partition by candidate.organization_id order by candidate.nth, candidate.next_attempt_at, candidate.id) as turn
    from candidates as candidate
  ),
  chosen as (
    select ranked.id, ranked.turn from ranked order by ranked.turn, ranked.next_attempt_at, ranked.id limit wanted
  ),
  locked as (
    select delivery.id
    from public.event_deliveries as delivery
    where delivery.id in (select chosen.id from chosen) and delivery.status in ('pending', 'failed')
      and (delivery.lease_until is null or delivery.lease_until <= now())
    order by delivery.id
    for no key update skip locked
  ),
  leased as (
    update public.event_deliveries as delivery
    -- Whoever claims may die before the queue has it, and then nothing but the lease brings it back: the first one is short. What lapses
    -- all the same waits on a queue that is behind, and is not put there again and again.
    set lease_until = now() + case when delivery.lease_until is null then interval '30 seconds' else interval '3 minutes' end, lease_token = null
    from locked
    where delivery.id = locked.id
    returning delivery.id, delivery.organization_id, delivery.endpoint_id
  )
  select jsonb_agg(
    jsonb_build_object('id', leased.id, 'organization_id', leased.organization_id, 'slow', endpoint.is_slow) order by chosen.turn, leased.id
  )
  into claimed
  from leased
  join chosen on chosen.id = leased.id
  join public.webhook_endpoints as endpoint on endpoint.id = leased.endpoint_id;
  claimed := coalesce(claimed, '[]');
  return jsonb_build_object('deliveries', claimed, 'more', jsonb_array_length(claimed) = wanted);
end
$$;
comment on function private.claim_deliveries(jsonb, timestamptz) is
  'Fans out what waits, and leases what is due to the queue: one of each organization before the second of any, and of each endpoint likewise. '
  'A lease that nobody takes up lapses, and the same delivery is handed out again.';

create function public.claim_deliveries(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.claim_deliveries($1, private.clock_now())
$$;
comment on function public.claim_deliveries(jsonb) is
  '{"v":1,"limit":n} -> {"deliveries":[{"id","organization_id","slow"}],"more"}. Each is to be put on the queue: what is slow, on that of the slow.';

create function private.begin_deliveries(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' set jit = off set enable_seqscan = off as $$
declare
  token constant uuid := (request ->> 'lease_token')::uuid;
  -- A handler of the fast queue; one that does not say which it is takes everything.
  fast  constant boolean := coalesce(not (request ->> 'slow')::boolean, false);
  begun jsonb;
  moved integer;
begin
  if token is null then
    perform private.raise_error(400, 'invalid_request', 'A lease token is required', 'lease_token');
  end if;
  with locked as (
    select delivery.id
    from public.event_deliveries as delivery
    where delivery.id in (select element.id::uuid from jsonb_array_elements_text(request -> 'deliveries') as element (id))
    order by delivery.id
    for no key update
  ),
  taken as (
    update public.event_deliveries as delivery
    set lease_token = token, lease_until = now() + interval '60 seconds'
    from locked, public.webhook_endpoints as endpoint
    where delivery.id = locked.id and endpoint.id = delivery.endpoint_id and endpoint.enabled
      and delivery.status in ('pending', 'failed') and delivery.next_attempt_at <= at
      and (delivery.lease_token is null or delivery.lease_token = token or delivery.lease_until <= now())
      and not (fast and endpoint.is_slow)
    returning delivery.id, delivery.organization_id, delivery.endpoint_id, delivery.event_id, endpoint.url
  ),
  given_back as (
    update public.event_deliveries as delivery
    set lease_until = null
    from locked, public.webhook_endpoints as endpoint
    where fast and endpoint.is_slow and delivery.id = locked.id and endpoint.id = delivery.endpoint_id
      and delivery.status in ('pending', 'failed') and delivery.lease_token is null
    returning delivery.id
  )
  select (select count(*) from given_back), jsonb_agg(
    jsonb_build_object(
      'id', taken.id, 'organization_id', taken.organization_id, 'endpoint_id', taken.endpoint_id, 'event_id', taken.event_id,
      'url', taken.url, 'body', private.event_body(told),
      'secret_sealed', secret.secret_sealed,
      'previous_sealed', case when secret.previous_until > now() then secret.previous_sealed end
    )
    order by told.id
  )
  into moved, begun
  from taken
  join private.outbox as told on told.id = taken.event_id and told.payload <> '{}'
  join private.webhook_endpoint_secrets as secret on secret.organization_id = taken.organization_id and secret.endpoint_id = taken.endpoint_id;
  return jsonb_build_object('deliveries', coalesce(begun, '[]'), 'more', moved > 0);
end
$$;
comment on function private.begin_deliveries(jsonb, timestamptz) is
  'Gives a handler what it is to send. Another handler with the same message gets nothing while the first one''s lease lasts. What turned out to be '
  'slow since it was put on the fast queue is given back, and due again at once.';

create function public.begin_deliveries(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.begin_deliveries($1, private.clock_now())
$$;
comment on function public.begin_deliveries(jsonb) is
  '{"v":1,"lease_token","deliveries":[id],"slow"?} -> {"deliveries":[{"id","organization_id","endpoint_id","event_id","url","body","secret_sealed",'
  '"previous_sealed"?}],"more"}. slow: whether they came from the queue of the slow. More: some were given back, and are due.';

create function private.retry_delay(attempts integer) returns interval
language sql volatile set search_path = '' as $$
  -- The schedule of Standard Webhooks; up to a fifth later, so that what failed together does not come back together.
  select (array[
    interval '5 seconds', '5 minutes', '30 minutes', '2 hours', '5 hours', '10 hours', '14 hours', '20 hours', '24 hours'
  ])[attempts] * (1 + 0.2 * random())
$$;
comment on function private.retry_delay(integer) is 'How long after the nth failed attempt the next one is made; null when there is none.';

create function private.disable_endpoints(endpoints uuid[], reason text, at timestamptz) returns void
language plpgsql volatile security definer set search_path = '' as $$
declare
  endpoint public.webhook_endpoints;
begin
  for endpoint in
    update public.webhook_endpoints as target
    set enabled = false, disabled_reason = reason, disabled_at = at
    where target.id = any (endpoints) and target.enabled
    returning target.*
  loop
    perform private.audit(
      endpoint.organization_id, 'webhook_endpoint.disabled', 'webhook_endpoint', endpoint.id,
      jsonb_build_object('reason', reason, 'failing_since', endpoint.failing_since), at
    );
    perform private.emit(
      endpoint.organization_id, 'endpoint.disabled', private.key_at(endpoint.id, at),
      jsonb_build_object('endpoint_id', endpoint.id, 'url', endpoint.url, 'reason', reason, 'failing_since', endpoint.failing_since), at
    );
  end loop;
end
$$;
comment on function private.disable_endpoints(uuid[], text, timestamptz) is
  'Switches endpoints off, and tells: on record, and in the outbox, from where the organization''s other endpoints and its owner hear of it.';

create function private.record_deliveries(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' set jit = off set enable_seqscan = off as $$
declare
  token    constant uuid := (request ->> 'lease_token')::uuid;
  -- As long as the schedule of one event lasts, about.
  patience constant interval := interval '3 days';
  -- Whoever takes longer holds up the batch that it is in.
  quick_ms constant integer := 2000;
  recorded integer;
  slow     uuid[];
  reached  uuid[];
  missed   uuid[];
  gone     uuid[];
  given_up uuid[];
begin
  -- Endpoints before their deliveries, as whoever changes or deletes one takes them, and in one order.
  perform
  from public.webhook_endpoints as endpoint
  where endpoint.id in (
    select delivery.endpoint_id
    from public.event_deliveries as delivery
    where delivery.id in (select (result ->> 'id')::uuid from jsonb_array_elements(request -> 'results') as result)
  )
  order by endpoint.id
  for no key update;
  with results as (
    select result.*
    from jsonb_to_recordset(request -> 'results') as result (
      id uuid, status integer, error text, body text, duration_ms integer, retry_after_seconds bigint
    )
  ),
  locked as (
    select
      delivery.id, delivery.endpoint_id, delivery.attempts + 1 as attempts, result.status, result.error, result.body, result.duration_ms,
      result.retry_after_seconds, coalesce(result.status between 200 and 299, false) as is_delivered, coalesce(result.status = 410, false) as is_gone
    from public.event_deliveries as delivery
    join results as result on result.id = delivery.id
    -- What arrived has arrived, whoever holds the lease by now; a failure counts only for whom it is.
    where delivery.status in ('pending', 'failed') and (delivery.lease_token = token or result.status between 200 and 299)
    order by delivery.id
    for no key update of delivery
  ),
  judged as (
    select locked.*, case when not locked.is_delivered and not locked.is_gone then private.retry_delay(locked.attempts) end as delay
    from locked
  ),
  written as (
    update public.event_deliveries as delivery
    set
      status = case when judged.is_delivered then 'delivered' when judged.delay is null then 'dead' else 'failed' end,
      attempts = judged.attempts,
      next_attempt_at = at + greatest(
        judged.delay,
        case when judged.delay is not null then make_interval(secs => least(greatest(judged.retry_after_seconds, 0), 86400)) end
      ),
      lease_until = null,
      lease_token = null,
      last_attempt_at = at,
      response_status = judged.status,
      response_body = left(judged.body, 1024),
      duration_ms = greatest(judged.duration_ms, 0),
      error = left(judged.error, 500),
      delivered_at = case when judged.is_delivered then at end
    from judged
    where delivery.id = judged.id
    returning judged.endpoint_id, judged.is_delivered, judged.is_gone, judged.status is null or judged.duration_ms >= quick_ms as is_slow
  )
  select
    count(*),
    array_agg(distinct written.endpoint_id) filter (where written.is_delivered),
    array_agg(distinct written.endpoint_id) filter (where not written.is_delivered),
    array_agg(distinct written.endpoint_id) filter (where written.is_gone),
    coalesce(array_agg(distinct written.endpoint_id) filter (where written.is_slow), '{}')
  into recorded, reached, missed, gone, slow
  from written;

  update public.webhook_endpoints as endpoint
  set
    failing_since = case
      when endpoint.id = any (reached) then null
      when endpoint.failing_since is null then at
      else endpoint.failing_since
    end,
    is_slow = endpoint.id = any (slow)
  where endpoint.id = any (reached) and endpoint.failing_since is not null
    or endpoint.id = any (missed) and endpoint.id <> all (coalesce(reached, '{}')) and endpoint.failing_since is null
    or endpoint.id = any (reached || missed) and endpoint.is_slow <> (endpoint.id = any (slow));
  given_up := array(
    select endpoint.id
    from public.webhook_endpoints as endpoint
    where endpoint.id = any (missed) and endpoint.enabled and endpoint.failing_since <= at - patience
    order by endpoint.id
  );
  if gone is not null then
    perform private.disable_endpoints(gone, 'gone', at);
  end if;
  if cardinality(given_up) > 0 then
    perform private.disable_endpoints(given_up, 'failing', at);
  end if;
  return jsonb_build_object(
    'recorded', coalesce(recorded, 0),
    'more', exists (
      select
      from public.event_deliveries as delivery
      join public.webhook_endpoints as endpoint on endpoint.id = delivery.endpoint_id and endpoint.enabled
      where delivery.endpoint_id = any (reached || missed) and delivery.status in ('pending', 'failed')
        and delivery.next_attempt_at <= at and (delivery.lease_until is null or delivery.lease_until <= now())
    )
  );
end
$$;
comment on function private.record_deliveries(jsonb, timestamptz) is
  'What came of attempts: delivered, to be tried again, or dead. An endpoint that says it is gone, or that nothing has reached for days, is switched off.';

create function public.record_deliveries(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.record_deliveries($1, private.clock_now())
$$;
comment on function public.record_deliveries(jsonb) is
  '{"v":1,"lease_token","results":[{"id","status"?,"error"?,"body"?,"duration_ms","retry_after_seconds"?}]} -> {"recorded":n,"more"}. '
  'More: one of these endpoints has another that is due.';


-- Endpoints -----------------------------------------------------------------------------------------------------------------------

create function private.claim_endpoint(endpoint_id uuid) returns public.webhook_endpoints
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('webhook.manage');
  endpoint     public.webhook_endpoints;
begin
  select target.* into endpoint
  from public.webhook_endpoints as target
  where target.organization_id = organization and target.id = claim_endpoint.endpoint_id
  for no key update;
  if endpoint.id is null then
    perform private.raise_error(404, 'endpoint_not_found', 'There is no such endpoint', 'endpoint_id');
  end if;
  return endpoint;
end
$$;
comment on function private.claim_endpoint(uuid) is 'An endpoint of the caller''s organization, locked; needs webhook.manage.';

create function private.endpoint_json(endpoint public.webhook_endpoints) returns jsonb
language sql stable security definer set search_path = '' as $$
  select to_jsonb(endpoint) - 'organization_id' || jsonb_build_object(
    'previous_secret_until', (
      select secret.previous_until
      from private.webhook_endpoint_secrets as secret
      where secret.organization_id = endpoint.organization_id and secret.endpoint_id = endpoint.id and secret.previous_until > now()
    )
  )
$$;
comment on function private.endpoint_json(public.webhook_endpoints) is 'An endpoint as its managers see it: without its secret.';

create function private.check_endpoint(url text, events text[], description text) returns void
language plpgsql stable security definer set search_path = '' as $$
declare
  unknown text;
begin
  if url is not null and (url !~ '^https?://[^\s/]\S*$' or length(url) > 2048) then
    perform private.raise_error(422, 'invalid_url', 'An endpoint is an https address of at most 2048 characters', 'url');
  end if;
  if length(description) > 200 then
    perform private.raise_error(422, 'invalid_description', 'A description has at most 200 characters', 'description');
  end if;
  select wanted.topic into unknown
  from unnest(events) as wanted (topic)
  where wanted.topic is null or not exists (
    select from private.event_types as type where type.topic = wanted.topic or split_part(type.topic, '.', 1) || '.*' = wanted.topic
  )
  limit 1;
  if found then
    perform private.raise_error(422, 'unknown_event', format('%L is no event that is told', coalesce(unknown, '')), 'events');
  end if;
end
$$;
comment on function private.check_endpoint(text, text[], text) is 'Refuses what an endpoint cannot be. Whether its address may be reached is judged when it is.';

create function private.create_webhook_endpoint(
  endpoint_id uuid, url text, secret_sealed text, events text[], description text, at timestamptz
) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('webhook.manage');
  most         constant integer := 20;
  endpoint     public.webhook_endpoints;
begin
  if url is null then
    perform private.raise_error(422, 'invalid_url', 'An endpoint is an https address of at most 2048 characters', 'url');
  end if;
  perform private.check_endpoint(url, events, description);
  if coalesce(length(secret_sealed), 0) not between 1 and 500 then
    perform private.raise_error(400, 'invalid_request', 'A sealed secret is required', 'secret_sealed');
  end if;
  -- The organization's row is the lock behind which its endpoints are counted.
  perform from public.organizations as mine where mine.id = organization for no key update;
  if (select count(*) from public.webhook_endpoints as mine where mine.organization_id = organization) >= most then
    perform private.raise_error(422, 'too_many_endpoints', format('An organization has at most %s endpoints', most));
  end if;
  insert into public.webhook_endpoints (id, organization_id, url, events, description, created_by, created_at, updated_at)
  values (
    coalesce(create_webhook_endpoint.endpoint_id, gen_random_uuid()), organization, create_webhook_endpoint.url,
    coalesce(create_webhook_endpoint.events, '{}'), create_webhook_endpoint.description, private.acting_user_id(), at, at
  )
  on conflict (id) do nothing
  returning * into endpoint;
  if endpoint.id is null then
    perform private.raise_error(409, 'idempotency_conflict', 'There is such an endpoint already', 'endpoint_id');
  end if;
  insert into private.webhook_endpoint_secrets (endpoint_id, organization_id, secret_sealed)
  values (endpoint.id, organization, create_webhook_endpoint.secret_sealed);
  perform private.audit(
    organization, 'webhook_endpoint.created', 'webhook_endpoint', endpoint.id, jsonb_build_object('url', endpoint.url, 'events', endpoint.events), at
  );
  return private.endpoint_json(endpoint);
end
$$;
comment on function private.create_webhook_endpoint(uuid, text, text, text[], text, timestamptz) is
  'A new endpoint of the caller''s organization. Its id and its secret come from the handler, which has sealed the one for the other.';

create function public.create_webhook_endpoint(
  endpoint_id uuid, url text, secret_sealed text, events text[] default '{}', description text default null
) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.create_webhook_endpoint(endpoint_id, url, secret_sealed, events, description, private.clock_now())
$$;
comment on function public.create_webhook_endpoint(uuid, text, text, text[], text) is
  'Makes an endpoint; use POST event-delivery/endpoints, which makes its secret. Needs webhook.manage.';

create function private.update_webhook_endpoint(endpoint_id uuid, url text, events text[], description text, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  endpoint public.webhook_endpoints := private.claim_endpoint(endpoint_id);
  before   constant jsonb := jsonb_build_object('url', endpoint.url, 'events', endpoint.events);
begin
  perform private.check_endpoint(url, events, description);
  update public.webhook_endpoints as mine
  set
    url = coalesce(update_webhook_endpoint.url, mine.url),
    events = coalesce(update_webhook_endpoint.events, mine.events),
    description = coalesce(update_webhook_endpoint.description, mine.description)
  where mine.id = endpoint.id
  returning * into endpoint;
  perform private.audit(
    endpoint.organization_id, 'webhook_endpoint.changed', 'webhook_endpoint', endpoint.id,
    jsonb_build_object('from', before, 'to', jsonb_build_object('url', endpoint.url, 'events', endpoint.events)), at
  );
  return private.endpoint_json(endpoint);
end
$$;
comment on function private.update_webhook_endpoint(uuid, text, text[], text, timestamptz) is 'What is null stays as it is.';

create function public.update_webhook_endpoint(endpoint_id uuid, url text default null, events text[] default null, description text default null)
returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.update_webhook_endpoint(endpoint_id, url, events, description, private.clock_now())
$$;
comment on function public.update_webhook_endpoint(uuid, text, text[], text) is
  'Changes an endpoint''s address, filter or description; what is left out stays. Needs webhook.manage.';

create function private.delete_webhook_endpoint(endpoint_id uuid, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  endpoint public.webhook_endpoints := private.claim_endpoint(endpoint_id);
begin
  delete from public.webhook_endpoints as mine where mine.id = endpoint.id;
  perform private.audit(
    endpoint.organization_id, 'webhook_endpoint.deleted', 'webhook_endpoint', endpoint.id, jsonb_build_object('url', endpoint.url), at
  );
  return jsonb_build_object('id', endpoint.id, 'deleted', true);
end
$$;
comment on function private.delete_webhook_endpoint(uuid, timestamptz) is 'With its secrets and its log.';

create function public.delete_webhook_endpoint(endpoint_id uuid) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.delete_webhook_endpoint(endpoint_id, private.clock_now())
$$;
comment on function public.delete_webhook_endpoint(uuid) is 'Deletes an endpoint and its log. Needs webhook.manage.';

create function private.rotate_webhook_secret(endpoint_id uuid, secret_sealed text, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  endpoint public.webhook_endpoints := private.claim_endpoint(endpoint_id);
begin
  if coalesce(length(secret_sealed), 0) not between 1 and 500 then
    perform private.raise_error(400, 'invalid_request', 'A sealed secret is required', 'secret_sealed');
  end if;
  update private.webhook_endpoint_secrets as mine
  set secret_sealed = rotate_webhook_secret.secret_sealed, previous_sealed = mine.secret_sealed, previous_until = now() + interval '24 hours'
  where mine.organization_id = endpoint.organization_id and mine.endpoint_id = endpoint.id;
  perform private.audit(endpoint.organization_id, 'webhook_endpoint.secret_rotated', 'webhook_endpoint', endpoint.id, '{}', at);
  return private.endpoint_json(endpoint);
end
$$;
comment on function private.rotate_webhook_secret(uuid, text, timestamptz) is 'For a day both secrets sign.';

create function public.rotate_webhook_secret(endpoint_id uuid, secret_sealed text) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.rotate_webhook_secret(endpoint_id, secret_sealed, private.clock_now())
$$;
comment on function public.rotate_webhook_secret(uuid, text) is
  'Gives an endpoint a new secret; use POST event-delivery/endpoints/{id}/rotate, which makes it. Needs webhook.manage.';

create function private.set_webhook_endpoint(endpoint_id uuid, enabled boolean, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  endpoint public.webhook_endpoints := private.claim_endpoint(endpoint_id);
begin
  if endpoint.enabled is distinct from coalesce(set_webhook_endpoint.enabled, false) then
    update public.webhook_endpoints as mine
    set
      enabled = coalesce(set_webhook_endpoint.enabled, false),
      disabled_reason = case when not coalesce(set_webhook_endpoint.enabled, false) then 'user' end,
      disabled_at = case when not coalesce(set_webhook_endpoint.enabled, false) then at end,
      failing_since = null
    where mine.id = endpoint.id
    returning * into endpoint;
    perform private.audit(
      endpoint.organization_id, case when endpoint.enabled then 'webhook_endpoint.enabled' else 'webhook_endpoint.disabled' end,
      'webhook_endpoint', endpoint.id, jsonb_strip_nulls(jsonb_build_object('reason', endpoint.disabled_reason)), at
    );
    if endpoint.enabled then
      perform private.nudge('event-delivery');
    end if;
  end if;
  return private.endpoint_json(endpoint);
end
$$;
comment on function private.set_webhook_endpoint(uuid, boolean, timestamptz) is
  'Switched on, it goes on where it stood; what happened meanwhile is sent by a replay.';

create function public.set_webhook_endpoint(endpoint_id uuid, enabled boolean) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.set_webhook_endpoint(endpoint_id, enabled, private.clock_now())
$$;
comment on function public.set_webhook_endpoint(uuid, boolean) is 'Switches an endpoint on or off. Needs webhook.manage.';

create function private.claim_live_endpoint(endpoint_id uuid) returns public.webhook_endpoints
language plpgsql volatile security definer set search_path = '' as $$
declare
  endpoint public.webhook_endpoints := private.claim_endpoint(endpoint_id);
begin
  if not endpoint.enabled then
    perform private.raise_error(409, 'endpoint_disabled', 'The endpoint is switched off', 'endpoint_id');
  end if;
  return endpoint;
end
$$;
comment on function private.claim_live_endpoint(uuid) is 'As claim_endpoint(); 409 when it is switched off.';

create function private.test_webhook_endpoint(endpoint_id uuid, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  endpoint public.webhook_endpoints := private.claim_live_endpoint(endpoint_id);
  event    uuid := private.uuid_v7();
  delivery uuid;
begin
  -- Handed out already, to this endpoint alone.
  insert into private.outbox (id, organization_id, topic, key, payload, created_at, dispatched_at)
  values (
    event, endpoint.organization_id, 'endpoint.test', event::text,
    jsonb_build_object('endpoint_id', endpoint.id, 'message', 'A test of this endpoint.'), at, at
  );
  insert into public.event_deliveries (organization_id, endpoint_id, event_id, topic, next_attempt_at, created_at)
  values (endpoint.organization_id, endpoint.id, event, 'endpoint.test', at, at)
  returning id into delivery;
  perform private.nudge('event-delivery');
  return jsonb_build_object('event_id', event, 'delivery_id', delivery);
end
$$;
comment on function private.test_webhook_endpoint(uuid, timestamptz) is 'Sends an event of its own to one endpoint.';

create function public.test_webhook_endpoint(endpoint_id uuid) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.test_webhook_endpoint(endpoint_id, private.clock_now())
$$;
comment on function public.test_webhook_endpoint(uuid) is
  'Sends endpoint.test to the endpoint; 409 when it is switched off. Returns {"event_id","delivery_id"}. Needs webhook.manage.';

create function private.claim_delivery(delivery_id uuid) returns public.event_deliveries
language plpgsql stable security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('webhook.manage');
  delivery     public.event_deliveries;
begin
  select target.* into delivery
  from public.event_deliveries as target
  where target.organization_id = organization and target.id = claim_delivery.delivery_id;
  if delivery.id is null then
    perform private.raise_error(404, 'delivery_not_found', 'There is no such delivery', 'delivery_id');
  end if;
  return delivery;
end
$$;
comment on function private.claim_delivery(uuid) is 'A delivery of the caller''s organization; needs webhook.manage.';

create function private.delivery_json(delivery public.event_deliveries) returns jsonb
language sql stable security definer set search_path = '' as $$
  select to_jsonb(delivery) - array['organization_id', 'lease_until', 'lease_token'] || jsonb_build_object(
    'request', (select private.event_body(told)::jsonb from private.outbox as told where told.id = delivery.event_id)
  )
$$;
comment on function private.delivery_json(public.event_deliveries) is 'A line of the delivery log with what was sent.';

create function private.get_event_delivery(delivery_id uuid) returns jsonb
language plpgsql stable security definer set search_path = '' as $$
begin
  return private.delivery_json(private.claim_delivery(delivery_id));
end
$$;
comment on function private.get_event_delivery(uuid) is 'One line of the delivery log.';

create function public.get_event_delivery(delivery_id uuid) returns jsonb
language sql stable security invoker set search_path = '' as $$
  select private.get_event_delivery(delivery_id)
$$;
comment on function public.get_event_delivery(uuid) is 'One line of the delivery log, with the request''s body. Needs webhook.manage.';

create function private.replay_delivery(delivery_id uuid, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  delivery public.event_deliveries := private.claim_delivery(delivery_id);
  endpoint public.webhook_endpoints := private.claim_live_endpoint(delivery.endpoint_id);
begin
  if not exists (select from private.outbox as told where told.id = delivery.event_id and told.payload <> '{}') then
    perform private.raise_error(410, 'event_gone', 'The event is past its time and no longer kept', 'delivery_id');
  end if;
  update public.event_deliveries as mine
  set status = 'pending', attempts = 0, next_attempt_at = at, delivered_at = null
  where mine.id = delivery.id
  returning * into delivery;
  perform private.audit(
    endpoint.organization_id, 'webhook_endpoint.replayed', 'webhook_endpoint', endpoint.id, jsonb_build_object('delivery_id', delivery.id), at
  );
  perform private.nudge('event-delivery');
  return private.delivery_json(delivery);
end
$$;
comment on function private.replay_delivery(uuid, timestamptz) is 'The same event under the same id, from the schedule''s beginning.';

create function public.replay_delivery(delivery_id uuid) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.replay_delivery(delivery_id, private.clock_now())
$$;
comment on function public.replay_delivery(uuid) is 'Sends an event to its endpoint again; 409 when that is switched off, 410 when the event is no longer kept. Needs webhook.manage.';

create function private.replay_deliveries(endpoint_id uuid, since timestamptz, until timestamptz, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  endpoint public.webhook_endpoints := private.claim_live_endpoint(endpoint_id);
  most     constant integer := 10000;
  events   uuid[];
begin
  if since is null or until is null or since >= until then
    perform private.raise_error(422, 'invalid_time', 'A range begins before it ends', 'since');
  end if;
  events := array(
    select told.id
    from private.outbox as told
    where told.organization_id = endpoint.organization_id and told.sequence is not null
      and told.created_at >= since and told.created_at < until
      and told.topic <> 'endpoint.test' and told.payload <> '{}' and private.wants_event(endpoint.events, told.topic)
    order by told.created_at, told.id
    limit most + 1
  );
  if cardinality(events) > most then
    perform private.raise_error(422, 'range_too_large', format('A replay is of at most %s events', most), 'since');
  end if;
  insert into public.event_deliveries as delivery (organization_id, endpoint_id, event_id, topic, next_attempt_at, created_at)
  select endpoint.organization_id, endpoint.id, told.id, told.topic, at, at
  from private.outbox as told
  where told.id = any (events)
  order by told.id
  on conflict on constraint event_deliveries_endpoint_id_event_id_key do update
  set status = 'pending', attempts = 0, next_attempt_at = at, delivered_at = null;
  perform private.audit(
    endpoint.organization_id, 'webhook_endpoint.replayed', 'webhook_endpoint', endpoint.id,
    jsonb_build_object('since', since, 'until', until, 'events', cardinality(events)), at
  );
  perform private.nudge('event-delivery');
  return jsonb_build_object('replayed', cardinality(events));
end
$$;
comment on function private.replay_deliveries(uuid, timestamptz, timestamptz, timestamptz) is
  'Whatever the endpoint listens to and happened in a range, also what it was never sent because it was switched off or not there yet.';

create function public.replay_deliveries(endpoint_id uuid, since timestamptz, until timestamptz default null) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.replay_deliveries(endpoint_id, since, coalesce(until, private.clock_now()), private.clock_now())
$$;
comment on function public.replay_deliveries(uuid, timestamptz, timestamptz) is
  'Sends what happened in [since, until) to an endpoint again, at most 10,000 events, each under its own id. Needs webhook.manage.';


-- Who may call --------------------------------------------------------------------------------------------------------------------

revoke execute on function
  private.has_endpoint(uuid), private.number_event(), private.nudge_delivery(), private.key_at(uuid, timestamptz), private.tell_call(),
  private.end_event(public.call_logs), private.tell_corrected(),
  private.lead_event(public.leads), private.tell_new_leads(), private.tell_opted_out(), private.tell_suppressed(), private.tell_campaign(),
  private.tell_subscription(), private.order_event(public.orders), private.tell_new_orders(), private.tell_order(), private.tell_escalated(),
  private.wants_event(text[], text), private.event_body(private.outbox), private.fan_out(integer, timestamptz),
  private.retry_delay(integer), private.disable_endpoints(uuid[], text, timestamptz), private.claim_endpoint(uuid),
  private.endpoint_json(public.webhook_endpoints), private.check_endpoint(text, text[], text), private.claim_live_endpoint(uuid),
  private.claim_delivery(uuid), private.delivery_json(public.event_deliveries)
from public;
revoke execute on function
  private.claim_deliveries(jsonb, timestamptz), private.begin_deliveries(jsonb, timestamptz), private.record_deliveries(jsonb, timestamptz),
  public.claim_deliveries(jsonb), public.begin_deliveries(jsonb), public.record_deliveries(jsonb),
  private.create_webhook_endpoint(uuid, text, text, text[], text, timestamptz),
  private.update_webhook_endpoint(uuid, text, text[], text, timestamptz), private.delete_webhook_endpoint(uuid, timestamptz),
  private.rotate_webhook_secret(uuid, text, timestamptz), private.set_webhook_endpoint(uuid, boolean, timestamptz),
  private.test_webhook_endpoint(uuid, timestamptz), private.get_event_delivery(uuid), private.replay_delivery(uuid, timestamptz),
  private.replay_deliveries(uuid, timestamptz, timestamptz, timestamptz),
  public.create_webhook_endpoint(uuid, text, text, text[], text), public.update_webhook_endpoint(uuid, text, text[], text),
  public.delete_webhook_endpoint(uuid), public.rotate_webhook_secret(uuid, text), public.set_webhook_endpoint(uuid, boolean),
  public.test_webhook_endpoint(uuid), public.get_event_delivery(uuid), public.replay_delivery(uuid),
  public.replay_deliveries(uuid, timestamptz, timestamptz)
from public, anon, authenticated, service_role;
grant execute on function
  private.claim_deliveries(jsonb, timestamptz), private.begin_deliveries(jsonb, timestamptz), private.record_deliveries(jsonb, timestamptz),
  public.claim_deliveries(jsonb), public.begin_deliveries(jsonb), public.record_deliveries(jsonb)
to service_role;
grant execute on function
  private.create_webhook_endpoint(uuid, text, text, text[], text, timestamptz),
  private.update_webhook_endpoint(uuid, text, text[], text, timestamptz), private.delete_webhook_endpoint(uuid, timestamptz),
  private.rotate_webhook_secret(uuid, text, timestamptz), private.set_webhook_endpoint(uuid, boolean, timestamptz),
  private.test_webhook_endpoint(uuid, timestamptz), private.get_event_delivery(uuid), private.replay_delivery(uuid, timestamptz),
  private.replay_deliveries(uuid, timestamptz, timestamptz, timestamptz),
  public.create_webhook_endpoint(uuid, text, text, text[], text), public.update_webhook_endpoint(uuid, text, text[], text),
  public.delete_webhook_endpoint(uuid), public.rotate_webhook_secret(uuid, text), public.set_webhook_endpoint(uuid, boolean),
  public.test_webhook_endpoint(uuid), public.get_event_delivery(uuid), public.replay_delivery(uuid),
  public.replay_deliveries(uuid, timestamptz, timestamptz)
to authenticated;
