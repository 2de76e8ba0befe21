-- Usage that comes late counts in its own period, and the next invoice bills the difference at that period's price; corrections name what
-- they correct.

set local lock_timeout = '5s';
set local statement_timeout = '60s';

alter table public.usage_logs
  -- The column is new: nothing refers yet.
  -- squawk-ignore adding-foreign-key-constraint
  add column plan_price_id uuid references public.plan_prices (id) on delete restrict,
  add column billed_count bigint;
update public.usage_logs as log
set plan_price_id = subscription.plan_price_id, billed_count = log.usage_count - log.prepaid
from public.subscriptions as subscription
where log.closed_at is not null
  and subscription.organization_id = log.organization_id
  and subscription.status not in ('cancelled', 'inactive')
  and exists (
    select
    from public.invoices as invoice
    where invoice.organization_id = log.organization_id and invoice.subscription_id = subscription.id and invoice.first_day = log.period_start
  );
-- The table is new or small: it is read in no time.
-- squawk-ignore constraint-missing-not-valid
alter table public.usage_logs add constraint usage_logs_billed_at_a_price check ((plan_price_id is null) = (billed_count is null));
-- Before the first release no installation is in use: the table is small.
-- squawk-ignore require-concurrent-index-creation
create index idx_usage_logs_price on public.usage_logs (plan_price_id) where plan_price_id is not null;
comment on column public.usage_logs.closed_at is 'Since when the period is billed: usage that arrives later still counts here, and an adjustment '
  'on the next invoice bills it.';
comment on column public.usage_logs.plan_price_id is 'The price at which the period was billed, and at which what comes late is.';
comment on column public.usage_logs.billed_count is 'Units that invoices have billed of it so far, without what was prepaid; null until it is closed.';

alter table private.usage_keys
  add column meter_key text,
  add column occurred_at timestamptz,
  add column quantity bigint;
alter table private.usage_events add column corrects text;
-- A wider one takes its place in this transaction.
-- squawk-ignore ban-drop-constraint
alter table private.usage_events drop constraint usage_events_quantity_positive;
-- The table is new or small: it is read in no time.
-- squawk-ignore constraint-missing-not-valid
alter table private.usage_events add constraint usage_events_quantity_signed check (quantity > 0 or corrects is not null and quantity <> 0);
update private.usage_keys as known
set meter_key = event.meter_key, occurred_at = event.occurred_at, quantity = event.quantity
from private.usage_events as event
where event.organization_id = known.organization_id
  and event.source = known.source
  and event.key = known.key
  and (event.source <> 'call' or event.meter_key = 'call_seconds');
comment on column private.usage_keys.meter_key is 'What was counted, of a call its seconds; null for a correction and while nothing was counted.';
comment on column private.usage_keys.occurred_at is 'When it happened, which is where its event is found.';
comment on column private.usage_keys.quantity is
  'What was counted under this key, with all that corrected it: never less than zero. Null for a correction itself.';
comment on column private.usage_events.day is
  'The local day on which it counts, by the time zone of the subscription when it came.';
comment on column private.usage_events.corrects is
  'The key, in the same source, of the event whose quantity this one changes; only such an event may be negative. It counts on that '
  'event''s day.';

-- The months that are there say what their table says.
do $$
declare
  part record;
begin
  for part in
    select inherited.inhrelid::regclass as name, col.attname as col, col_description(inherited.inhparent, col.attnum) as said
    from pg_catalog.pg_inherits as inherited
    join pg_catalog.pg_attribute as col on col.attrelid = inherited.inhparent and col.attname in ('day', 'corrects')
    where inherited.inhparent = 'private.usage_events'::regclass and inherited.inhrelid <> 'private.usage_events_default'::regclass
  loop
    execute format('comment on column %s.%I is %L', part.name, part.col, part.said);
  end loop;
end
$$;

-- A wider one takes its place in this transaction.
-- squawk-ignore ban-drop-constraint
alter table public.invoice_lines drop constraint invoice_lines_kind_known;
-- The table is new or small: it is read in no time.
-- squawk-ignore constraint-missing-not-valid
alter table public.invoice_lines add constraint invoice_lines_kind_known check (kind in ('base', 'included', 'overage', 'adjustment'));
comment on column public.invoice_lines.kind is 'base: the plan; included: used within the allowance, amount 0; overage: used beyond it; adjustment: what a period that was billed '
  'before used more or less beyond its allowance, at its own price.';
comment on column public.invoice_lines.amount_minor is 'quantity × unit_price_minor / price_units, rounded once; of an adjustment the difference of two such amounts, so that a period costs '
  'the same however late its usage comes.';

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

create table private.call_corrections (
  correction_id   text not null,
  organization_id uuid not null,
  call_log_id     uuid not null,
  seconds         bigint not null,
  credit_seconds  bigint not null,
  overage_seconds bigint not null,
  charged_minor   bigint not null,
  transaction_id  uuid,
  created_at      timestamptz not null,
  constraint call_corrections_pkey primary key (correction_id),
  constraint call_corrections_charge_fkey foreign key (organization_id, call_log_id)
    references public.call_charges (organization_id, call_log_id) on delete restrict,
  constraint call_corrections_transaction_fkey foreign key (organization_id, transaction_id)
    references public.credit_transactions (organization_id, id) on delete restrict,
  constraint call_corrections_change_something check (seconds <> 0)
);

create index idx_call_corrections_call on private.call_corrections (organization_id, call_log_id);
create index idx_call_corrections_transaction on private.call_corrections (organization_id, transaction_id) where transaction_id is not null;
select private.close_table('private.call_corrections');

create trigger call_corrections_is_append_only before update or delete or truncate on private.call_corrections
  for each statement execute function private.refuse_money_change();

comment on table private.call_corrections is
  'How a charge changed when the carrier corrected the seconds of its call, append-only: what a call cost is its charge and all of these.';
comment on column private.call_corrections.correction_id is 'The key of the usage event that corrected the seconds.';
comment on column private.call_corrections.seconds is 'By how much the call became longer, or, negative, shorter.';
comment on column private.call_corrections.credit_seconds is 'Of this, what credit pays for, or gets back.';
comment on column private.call_corrections.overage_seconds is 'Of this, what the invoice bills, or no longer bills.';
comment on column private.call_corrections.charged_minor is 'What was taken from prepaid credit; negative is given back.';

-- Only functions call it, and this migration replaces them.
-- squawk-ignore ban-drop-function
drop function private.count_usage(uuid, text[], text[], text[], bigint[], timestamptz[], timestamptz);

insert into private.personal_data (table_name, column_name, found_by, via, treatment, reason)
values
    ('private.usage_adjustments', '*', 'none', null, 'kept', 'What was counted, for the bill: ids and amounts.'),
    ('private.call_corrections', '*', 'none', null, 'kept', 'A fiscal row: amounts and the call''s id.');

insert into public.meters (key, name, unit, is_reserved, position)
values ('agent_tokens', 'Agent tokens', 'token', false, 30), ('recording_seconds', 'Recordings', 'second', false, 40)
on conflict (key) do nothing;

create or replace function private.apply_call_event(
  source text, source_id text, attempt_id uuid, call jsonb, at timestamptz,
  out result public.event_status, out error text, out organization_id uuid
)
language plpgsql volatile security definer set search_path = '' as $$
declare
  attempt   public.call_logs;
  updated   public.call_logs;
  wanted    uuid := apply_call_event.attempt_id;
  call_id   text := call ->> 'provider_call_id';
  status    public.attempt_status := (call ->> 'status')::public.attempt_status;
  outcome   public.call_outcome := (call ->> 'outcome')::public.call_outcome;
  latest    timestamptz;
  has_ended boolean;
  unknown   text := 'unknown_attempt';
begin
  if wanted is null and (call ->> 'inbound')::boolean then
    select opened.leg_id, coalesce(opened.error, unknown) into wanted, unknown
    from private.open_inbound_leg(apply_call_event.source, apply_call_event.source_id, call, at) as opened;
  end if;
  select log.* into attempt
  from public.call_logs as log
  where log.id = wanted
  for no key update;
  if attempt.id is null then
    result := 'orphan';
    error := unknown;
    return;
  end if;
  if attempt.carrier_account_id::text <> lower(apply_call_event.source_id) then
    result := 'orphan';
    error := 'other_account';
    return;
  end if;
  organization_id := attempt.organization_id;

  -- Two calls of the carrier for one attempt: somebody was dialled twice. The first one stays the attempt's.
  if attempt.call_sid <> call_id then
    result := 'orphan';
    error := 'duplicate_dial';
    perform private.raise_alarm(
      attempt, 'duplicate_dial', jsonb_build_object('provider_call_id', call_id, 'bound_to', attempt.call_sid), at
    );
    return;
  end if;

  -- What is known is kept, what is new is added, and the status only moves forward.
  updated := private.merge_call(attempt, call, at);
  if apply_call_event.source = 'reconcile' and status = 'ended' and call ->> 'bill_duration_seconds' is not null then
    -- Of the seconds that are billed the carrier's own record has the last word, also after an event told others.
    updated.bill_duration_seconds := (call ->> 'bill_duration_seconds')::integer;
  end if;
  has_ended := status = 'ended' and attempt.status <> 'ended';
  latest := greatest(coalesce(attempt.ended_at, at), attempt.created_at);
  if attempt.direction = 'outbound' and not attempt.dialled
    and apply_call_event.source <> 'reconcile' and (status is not null or call_id is not null)
  then
    -- The carrier knows the call, so it was dialled, whatever we believed.
    updated.dialled := true;
    updated.submitted_at := coalesce(attempt.submitted_at, latest);
    if attempt.status = 'ended' then
      perform private.raise_alarm(attempt, 'dialled_after_refusal', jsonb_build_object('provider_call_id', call_id), at);
    end if;
  end if;
  if has_ended then
    updated.ended_at := greatest(
      private.clamp_time(call ->> 'ended_at', attempt.created_at, latest), updated.ringing_at, updated.answered_at
    );
    updated.ended_at := coalesce(updated.ended_at, latest);
    -- The answer event is a hint that may be lost; the seconds of talk tell when it was.
    if updated.answered_at is null and updated.duration > 0 then
      updated.answered_at := greatest(
        updated.ended_at - make_interval(secs => updated.duration), attempt.created_at, updated.submitted_at, updated.ringing_at
      );
    end if;
    if updated.duration is null and updated.answered_at is not null then
      updated.duration := floor(extract(epoch from updated.ended_at - updated.answered_at));
    end if;
  end if;
  if (call ->> 'bill_talk')::boolean and updated.ended_at is not null then
    -- This carrier tells no seconds; the answer may be told after the end.
    updated.duration := coalesce(nullif(updated.duration, 0), floor(extract(epoch from updated.ended_at - updated.answered_at)), updated.duration);
    updated.bill_duration_seconds := coalesce(nullif(updated.bill_duration_seconds, 0), updated.duration, updated.bill_duration_seconds);
  end if;
  -- The cause goes with the end that stays.
  if coalesce(call ->> 'cause_code', call ->> 'cause_name') is not null and (
    attempt.hangup_cause_code is null and attempt.hangup_cause_name is null
    or private.outcome_rank(private.settled_outcome(updated, outcome), private.has_talked(updated))
      > private.outcome_rank(attempt.call_status, private.has_talked(updated))
  ) then
    updated.hangup_cause_code := call ->> 'cause_code';
    updated.hangup_cause_name := call ->> 'cause_name';
    updated.hangup_source := call ->> 'cause_source';
  end if;

  if has_ended then
    outcome := private.settled_outcome(updated, coalesce(
      outcome,
      case when updated.answered_at is not null or updated.bill_duration_seconds > 0 then 'answered' else 'failed' end::public.call_outcome
    ));
    perform private.end_attempt(updated, outcome, at);
    result := 'applied';
  elsif attempt.status = 'ended' then
    result := case when private.amend_attempt(attempt, updated, outcome, at) then 'applied' else 'ignored' end::public.event_status;
  else
    if status > attempt.status then
      updated.status := status;
      updated.lease_until := now() + make_interval(
        secs => case status when 'in_progress' then attempt.time_limit_seconds + 120 else attempt.ring_timeout_seconds + 60 end
      );
    end if;
    if updated is not distinct from attempt then
      result := 'ignored';
    else
      perform private.write_attempt(updated);
      result := 'applied';
    end if;
  end if;
  if call ->> 'notice' is not null then
    error := call ->> 'notice';
    perform private.raise_alarm(
      attempt, 'carrier_fault', jsonb_build_object('provider_call_id', coalesce(call_id, attempt.call_sid), 'notice', error), at
    );
  end if;
end
$$;
comment on function private.apply_call_event(text, text, uuid, jsonb, timestamptz) is
  'What one event means for its attempt: binds the carrier''s call, moves the status forward, adds what was not known, or ends it.';

create or replace function private.usage_period(
  subscription public.subscriptions, organization_id uuid, timezone text, day date, at timestamptz,
  out counted_on date, out period_start date, out period_end date
)
language plpgsql stable set search_path = ''
as $$
declare
  today date := (at at time zone timezone)::date;
  first_day date := (subscription.current_period_start at time zone subscription.timezone)::date;
  number integer;
begin
  counted_on := day;

  -- What happens now is never late, not even where a clock lags behind the period.
  if day >= first_day or day >= today and first_day is not null then
    counted_on := greatest(day, first_day);
    period_start := first_day;
    period_end := (subscription.current_period_end at time zone subscription.timezone)::date;
    if counted_on >= period_end then
      -- The period has ended but is not closed yet; the next ones are already known from the anchor.
      number := subscription.period_no;
      while private.period_boundary(subscription.anchor_on, subscription.billing_cycle, number + 1) <= counted_on loop
        number := number + 1;
      end loop;
      period_start := private.period_boundary(subscription.anchor_on, subscription.billing_cycle, number);
      period_end := private.period_boundary(subscription.anchor_on, subscription.billing_cycle, number + 1);
    end if;
    return;
  end if;

  -- Its own period, billed or not. Where there was none, nobody was billed, but nothing is lost: calendar months, cut where other
  -- periods begin or end.
  select log.period_start, log.period_end
  into period_start, period_end
  from public.usage_logs as log
  where log.organization_id = usage_period.organization_id
    and log.period_start <= day and day < log.period_end
  order by log.period_start
  limit 1;
  if not found then
    period_start := date_trunc('month', day)::date;
    period_end := least((period_start + interval '1 month')::date, first_day);
    select greatest(usage_period.period_start, max(log.period_end) filter (where log.period_end <= day)),
      least(usage_period.period_end, min(log.period_start) filter (where log.period_start > day))
    into period_start, period_end
    from public.usage_logs as log
    where log.organization_id = usage_period.organization_id;
  end if;
end
$$;
revoke all on function private.usage_period(public.subscriptions, uuid, text, date, timestamptz) from public;
comment on function private.usage_period(public.subscriptions, uuid, text, date, timestamptz) is
  'In which period usage of a local day counts, and on which day: always its own, also where that is billed already.';

create function private.count_usage(
  organization_id uuid, sources text[], keys text[], meters text[], quantities bigint[], occurred timestamptz[], at timestamptz,
  corrected text[] default null, known_days date[] default null
) returns void
language plpgsql set search_path = ''
as $$
declare
  subscription public.subscriptions;
  zone text;
  first_day date;
  days date[];
  starts date[];
  ends date[];
  is_open boolean := false;
  is_late boolean;
begin
  for try in 1..5 loop
    subscription := private.live_subscription(organization_id);
    zone := subscription.timezone;
    first_day := (subscription.current_period_start at time zone subscription.timezone)::date;
    if zone is null then
      select organization.timezone
      into strict zone
      from public.organizations as organization
      where organization.id = count_usage.organization_id;
    end if;

    -- Clocks of other systems run ahead: what is said to come from the future counts now. A correction counts on the day of what it
    -- corrects.
    with event as (
      select given.position, coalesce(known_days[given.position], (least(given.occurred_at, at) at time zone zone)::date) as day
      from unnest(occurred) with ordinality as given (occurred_at, position)
    ),
    placed as (
      select distinct_day.day, period.*
      from (select distinct event.day from event) as distinct_day,
        lateral private.usage_period(subscription, count_usage.organization_id, zone, distinct_day.day, at) as period
    )
    select array_agg(placed.counted_on order by event.position), array_agg(placed.period_start order by event.position),
      array_agg(placed.period_end order by event.position)
    into days, starts, ends
    from event
    join placed using (day);

    insert into public.usage_logs (organization_id, feature_key, period_start, period_end, closed_at)
    select distinct
      count_usage.organization_id, event.meter, event.period_start, event.period_end,
      case when event.period_start < first_day then at end
    from unnest(meters, starts, ends) as event (meter, period_start, period_end)
    where not exists (
      select
      from public.usage_logs as log
      where log.organization_id = count_usage.organization_id
        and log.feature_key = event.meter
        and log.period_start = event.period_start
    )
    order by event.meter, event.period_start
    on conflict do nothing;

    with counter as (
      select log.closed_at, log.period_start
      from public.usage_logs as log
      where log.organization_id = count_usage.organization_id
        and (log.feature_key, log.period_start) in (
          select event.meter, event.period_start
          from unnest(meters, starts) as event (meter, period_start)
        )
      order by log.feature_key, log.period_start
      for no key update
    )
    select
      -- A period before the current one is closed, and takes what comes late.
      count(*) filter (where counter.closed_at is null or counter.period_start < first_day or first_day is null) = (
        select count(distinct (event.meter, event.period_start))
        from unnest(meters, starts) as event (meter, period_start)
      ),
      coalesce(bool_or(counter.closed_at is not null), false)
    into is_open, is_late
    from counter;
    exit when is_open;
    -- The current period was closed in between: its subscription has moved on, and so does this.
  end loop;
  if not is_open then
    raise exception 'no open billing period for organization %', organization_id using errcode = '40001';
  end if;

  with added as (
    select event.meter, event.period_start, sum(event.quantity)::bigint as quantity
    from unnest(meters, starts, quantities) as event (meter, period_start, quantity)
    group by event.meter, event.period_start
  ),
  counted as (
    update public.usage_logs as log
    set usage_count = log.usage_count + added.quantity
    from added
    where log.organization_id = count_usage.organization_id
      and log.feature_key = added.meter
      and log.period_start = added.period_start
    returning log.feature_key, log.period_start, log.usage_count, log.usage_count - added.quantity as before, log.closed_at
  )
  -- Who crosses a line says so, once a period: the same line again, after a correction, is the same message.
  insert into private.outbox (organization_id, topic, key, payload, created_at)
  select
    count_usage.organization_id, 'usage.threshold', counted.feature_key || ' ' || counted.period_start || ' ' || line.percent,
    jsonb_build_object(
      'meter', counted.feature_key, 'percent', line.percent, 'used', counted.usage_count, 'limit', allowed.units,
      'period_start', counted.period_start
    ),
    at
  from counted
  join public.plan_price_meters as term on term.plan_price_id = subscription.plan_price_id and term.meter_key = counted.feature_key
  cross join lateral (
    select case when term.limit_units >= 0 then term.limit_units when term.included_units >= 0 then term.included_units end as units
  ) as allowed
  cross join (values (50), (80), (100)) as line (percent)
  where counted.closed_at is null
    and allowed.units > 0
    and counted.before::numeric * 100 < allowed.units::numeric * line.percent
    and counted.usage_count::numeric * 100 >= allowed.units::numeric * line.percent
  order by line.percent
  on conflict do nothing;

  insert into public.usage_days as total (organization_id, meter_key, day, quantity, events)
  select count_usage.organization_id, event.meter, event.day, sum(event.quantity)::bigint, count(*)
  from unnest(meters, days, quantities) as event (meter, day, quantity)
  group by event.meter, event.day
  having sum(event.quantity) >= 0
  order by event.meter, event.day
  on conflict on constraint usage_days_pkey
  do update set quantity = total.quantity + excluded.quantity, events = total.events + excluded.events;
  -- What is corrected to less is on its day already; a new row of it could not be negative.
  if corrected is not null then
    update public.usage_days as total
    set quantity = total.quantity + less.quantity, events = total.events + less.events
    from (
      select event.meter, event.day, sum(event.quantity)::bigint as quantity, count(*) as events
      from unnest(meters, days, quantities) as event (meter, day, quantity)
      group by event.meter, event.day
      having sum(event.quantity) < 0
    ) as less
    where total.organization_id = count_usage.organization_id and total.meter_key = less.meter and total.day = less.day;
  end if;

  with written as (
    insert into private.usage_events (organization_id, meter_key, source, key, quantity, occurred_at, day, recorded_at, corrects)
    select
      count_usage.organization_id, event.meter, event.source, event.key, event.quantity, event.occurred_at, event.day, at, event.corrects
    from unnest(sources, keys, meters, quantities, occurred, days, corrected)
      as event (source, key, meter, quantity, occurred_at, day, corrects)
    returning id, meter_key, day, occurred_at, quantity
  )
  insert into private.usage_adjustments (event_id, organization_id, meter_key, period_start, occurred_at, quantity, recorded_at)
  select written.id, count_usage.organization_id, written.meter_key, log.period_start, written.occurred_at, written.quantity, at
  from written
  join public.usage_logs as log
    on log.organization_id = count_usage.organization_id
    and log.feature_key = written.meter_key
    and log.period_start <= written.day and written.day < log.period_end
  where is_late and log.plan_price_id is not null;
end
$$;

create or replace function private.meter_call(attempt public.call_logs, at timestamptz) returns void
language plpgsql security definer set search_path = ''
as $$
declare
  billed bigint := greatest(coalesce(attempt.bill_duration_seconds, 0), 0);
  said bytea := case when billed > 0 then private.usage_hash(billed::text) end;
  is_first boolean;
  is_new boolean;
  hold private.call_holds;
  charged bigint := 0;
begin
  if attempt.ended_at is null then
    return;
  end if;

  insert into private.usage_keys as known (organization_id, source, key, body_hash, meter_key, occurred_at, quantity)
  values (
    attempt.organization_id, 'call', attempt.id::text, said, case when billed > 0 then 'call_seconds' end,
    case when billed > 0 then attempt.ended_at end, nullif(billed, 0)
  )
  on conflict on constraint usage_keys_pkey do nothing;
  is_first := found;
  is_new := is_first and billed > 0;
  if not is_first and billed > 0 then
    -- The call had ended without a billed second, and now the carrier says how many there were.
    update private.usage_keys as known
    set body_hash = said, meter_key = 'call_seconds', occurred_at = attempt.ended_at, quantity = billed
    where known.organization_id = attempt.organization_id
      and known.source = 'call'
      and known.key = attempt.id::text
      and known.body_hash is null;
    is_new := found;
  end if;
  if not is_first and not is_new then
    if attempt.bill_duration_seconds is not null then
      perform private.correct_call(attempt, billed, at);
    end if;
    return;
  end if;

  -- Under the counters' locks a hold becomes use: whoever asks what is left sees the one or the other, never both and never neither.
  perform
  from public.usage_logs as log
  where log.organization_id = attempt.organization_id
    and log.feature_key in ('ai_calls', 'call_seconds')
    -- The period in which it ended too, whatever the time zone makes of it.
    and (log.closed_at is null or log.reserved > 0 or (attempt.ended_at at time zone 'UTC')::date between log.period_start - 1 and log.period_end)
  order by log.feature_key, log.period_start
  for no key update;
  delete from private.call_holds as held where held.attempt_id = attempt.id returning held.* into hold;
  if is_first and attempt.direction = 'outbound' then
    perform private.release_usage(attempt.organization_id, 'ai_calls', 1, at);
  end if;
  if hold.seconds > 0 then
    perform private.release_usage(attempt.organization_id, 'call_seconds', hold.seconds, at);
  end if;
  if is_new then
    perform private.count_usage(
      attempt.organization_id,
      array['call', 'call'],
      array[attempt.id::text, attempt.id::text],
      array['ai_calls', 'call_seconds'],
      array[1, billed],
      array[attempt.ended_at, attempt.ended_at],
      at
    );
  end if;
  if is_new or hold.credit_minor > 0 then
    charged := private.charge_call(attempt, case when is_new then billed else 0 end, hold, at);
  end if;

  -- More is left than before: who waits for it is asked again.
  if hold.attempt_id is not null and (not is_new or hold.seconds > billed or hold.credit_minor > charged) then
    perform private.lift_dispatch_hold(attempt.organization_id, array['quota_exhausted', 'credit_exhausted']);
  end if;
end
$$;
revoke all on function private.meter_call(public.call_logs, timestamptz) from public;
comment on function private.meter_call(public.call_logs, timestamptz) is
  'Settles one ended attempt: gives back what was held for it, once, counts the call and its billed seconds and charges what is beyond '
  'the plan, once, also when the carrier reports them later. Other seconds than were counted before settle the difference.';

create or replace function private.charge_call(attempt public.call_logs, billed bigint, hold private.call_holds, at timestamptz) returns bigint
language plpgsql security definer set search_path = ''
as $$
declare
  price_id uuid;
  calls public.plan_price_meters;
  talk public.plan_price_meters;
  term public.plan_price_meters;
  money text;
  wallet_id uuid;
  counted_on date;
  counter record;
  beyond bigint := 0;
  paid bigint;
  cost bigint;
  taken bigint := 0;
begin
  if billed > 0 then
    select event.day
    into strict counted_on
    from private.usage_events as event
    where event.occurred_at = attempt.ended_at
      and event.organization_id = attempt.organization_id
      and event.meter_key = 'call_seconds'
      and event.source = 'call'
      and event.key = attempt.id::text
      and event.corrects is null;
    -- A period that was billed keeps its price, also for a call that is told of later.
    price_id := coalesce(
      (
        select log.plan_price_id
        from public.usage_logs as log
        where log.organization_id = attempt.organization_id
          and log.feature_key = 'call_seconds'
          and log.period_start <= counted_on and counted_on < log.period_end
      ),
      (private.live_subscription(attempt.organization_id)).plan_price_id
    );
    select own.* into calls from public.plan_price_meters as own where own.plan_price_id = price_id and own.meter_key = 'ai_calls';
    select own.* into talk from public.plan_price_meters as own where own.plan_price_id = price_id and own.meter_key = 'call_seconds';
  end if;

  if calls.credit_price_minor is not null and calls.included_units >= 0
    or talk.credit_price_minor is not null and talk.included_units >= 0 then
    select price.currency into money from public.plan_prices as price where price.id = price_id;
    -- With this call, and without what credit paid before.
    select
      sum(log.usage_count - log.prepaid) filter (where log.feature_key = 'ai_calls')::bigint as calls,
      sum(log.usage_count - log.prepaid) filter (where log.feature_key = 'call_seconds')::bigint as seconds
    into counter
    from public.usage_logs as log
    where log.organization_id = attempt.organization_id
      and log.feature_key in ('ai_calls', 'call_seconds')
      and log.period_start <= counted_on and counted_on < log.period_end;
    if calls.credit_price_minor is not null and calls.included_units >= 0 and counter.calls > calls.included_units then
      term := calls;
      beyond := billed;
    elsif talk.credit_price_minor is not null and talk.included_units >= 0 and counter.seconds > talk.included_units then
      term := talk;
      beyond := least(billed, counter.seconds - talk.included_units);
    end if;
  end if;
  if beyond = 0 and coalesce(hold.credit_minor, 0) = 0 then
    return 0;
  end if;

  -- The plan may have changed its currency since the release: then there are two wallets.
  perform
  from public.call_credits as own
  where own.organization_id = attempt.organization_id and own.currency in (hold.currency, money)
  order by own.currency
  for no key update;
  if hold.credit_minor > 0 then
    update public.call_credits as own
    set held_minor = own.held_minor - hold.credit_minor
    where own.organization_id = attempt.organization_id and own.currency = hold.currency;
  end if;
  if beyond = 0 then
    return 0;
  end if;

  paid := beyond;
  if term.overage_price_minor is not null then
    -- What credit does not pay for in whole pulses is billed.
    wallet_id := private.lock_wallet(attempt.organization_id, money, at);
    paid := least(beyond, private.credit_reach(
      coalesce((select own.balance_minor from public.call_credits as own where own.id = wallet_id), 0), term
    ));
  end if;
  cost := private.credit_cost(paid, term);
  if cost > 0 then
    taken := private.debit_credit(
      attempt.organization_id, money, cost, 'call ' || attempt.id, at, true, 'consumption', 'call', attempt.id);
  end if;
  insert into public.call_charges (
    call_log_id, organization_id, plan_price_id, meter_key, day, seconds, credit_seconds, overage_seconds, currency, charged_minor,
    uncollected_minor, transaction_id, created_at
  )
  values (
    attempt.id, attempt.organization_id, price_id, term.meter_key, counted_on, beyond,
    case when taken < cost then div(paid::numeric * taken, cost)::bigint else paid end, beyond - paid, money, taken, cost - taken,
    (
      select transaction.id
      from public.credit_transactions as transaction
      where transaction.organization_id = attempt.organization_id and transaction.idempotency_key = 'call ' || attempt.id
    ),
    at
  );
  update public.usage_logs as log
  set prepaid = log.prepaid + case log.feature_key when 'ai_calls' then 1 else paid end
  where log.organization_id = attempt.organization_id
    and log.feature_key in ('call_seconds', term.meter_key)
    and log.period_start <= counted_on and counted_on < log.period_end;
  update public.usage_days as total
  set prepaid = total.prepaid + case total.meter_key when 'ai_calls' then 1 else paid end
  where total.organization_id = attempt.organization_id
    and total.meter_key in ('call_seconds', term.meter_key)
    and total.day = counted_on;
  return taken;
end
$$;
comment on function private.charge_call(public.call_logs, bigint, private.call_holds, timestamptz) is
  'Lets go of the credit that was held for a call and takes what its seconds beyond the plan cost, as far as the balance goes, and says '
  'how much. The call is counted already, its counters are locked, and nobody charges it twice.';

create function private.shift_prepaid(organization_id uuid, meter text, day date, units bigint) returns void
language plpgsql set search_path = ''
as $$
begin
  update public.usage_logs as log
  set prepaid = log.prepaid + units
  where log.organization_id = shift_prepaid.organization_id
    and log.feature_key = meter
    and log.period_start <= shift_prepaid.day and shift_prepaid.day < log.period_end;
  update public.usage_days as total
  set prepaid = total.prepaid + units
  where total.organization_id = shift_prepaid.organization_id and total.meter_key = meter and total.day = shift_prepaid.day;
end
$$;
comment on function private.shift_prepaid(uuid, text, date, bigint) is
  'Adds to what credit paid of a day and its period. The caller holds the counter''s lock.';

create function private.correct_call(attempt public.call_logs, billed bigint, at timestamptz) returns void
language plpgsql security definer set search_path = ''
as $$
declare
  correction text := attempt.id || '/' || private.uuid_v7();
  known private.usage_keys;
  counted_on date;
  charge record;
  term public.plan_price_meters;
  delta bigint;
  calls integer;
  overage bigint := 0;
  paid bigint := 0;
  cost bigint := 0;
  entry uuid;
begin
  select own.*
  into known
  from private.usage_keys as own
  where own.organization_id = attempt.organization_id and own.source = 'call' and own.key = attempt.id::text
  for no key update;
  delta := billed - known.quantity;
  if coalesce(delta, 0) = 0 then
    return;
  end if;
  calls := (billed > 0)::integer - (known.quantity > 0)::integer;
  update private.usage_keys as own
  set quantity = billed
  where own.organization_id = attempt.organization_id and own.source = 'call' and own.key = attempt.id::text;
  insert into private.usage_keys (organization_id, source, key, body_hash)
  values (attempt.organization_id, 'call', correction, private.usage_hash(concat_ws(e'\x1f', attempt.id, known.quantity, billed)));
  select event.day
  into strict counted_on
  from private.usage_events as event
  where event.occurred_at = known.occurred_at
    and event.organization_id = attempt.organization_id
    and event.meter_key = 'call_seconds'
    and event.source = 'call'
    and event.key = attempt.id::text
    and event.corrects is null;
  perform
  from public.usage_logs as log
  where log.organization_id = attempt.organization_id
    and log.feature_key in ('ai_calls', 'call_seconds')
    and log.period_start <= counted_on and counted_on < log.period_end
  order by log.feature_key, log.period_start
  for no key update;

  -- A call within the plan changes the counters alone. One that was charged takes back what was paid last first: overage, then credit.
  select
    own.plan_price_id, own.meter_key, own.currency, own.transaction_id,
    own.credit_seconds + coalesce(sum(later.credit_seconds), 0)::bigint as credit_seconds,
    own.overage_seconds + coalesce(sum(later.overage_seconds), 0)::bigint as overage_seconds,
    own.charged_minor + coalesce(sum(later.charged_minor), 0)::bigint as charged_minor
  into charge
  from public.call_charges as own
  left join private.call_corrections as later on later.organization_id = own.organization_id and later.call_log_id = own.call_log_id
  where own.organization_id = attempt.organization_id and own.call_log_id = attempt.id
  group by own.call_log_id;
  if charge.meter_key is not null then
    select own.* into term
    from public.plan_price_meters as own
    where own.plan_price_id = charge.plan_price_id and own.meter_key = charge.meter_key;
    if delta < 0 then
      overage := greatest(delta, -charge.overage_seconds);
      paid := greatest(delta - overage, -charge.credit_seconds);
      cost := greatest(
        private.credit_cost(charge.credit_seconds + paid, term) - private.credit_cost(charge.credit_seconds, term), -charge.charged_minor
      );
    elsif term.overage_price_minor is not null then
      overage := delta;
    else
      paid := delta;
      cost := private.credit_cost(charge.credit_seconds + paid, term) - private.credit_cost(charge.credit_seconds, term);
    end if;
  end if;

  if delta < 0 and charge.meter_key is not null then
    perform private.shift_prepaid(attempt.organization_id, 'call_seconds', counted_on, paid);
    if charge.meter_key = 'ai_calls' then
      perform private.shift_prepaid(attempt.organization_id, 'ai_calls', counted_on, calls);
    end if;
  end if;
  perform private.count_usage(
    attempt.organization_id, array_fill('call'::text, array[1 + abs(calls)]), array_fill(correction, array[1 + abs(calls)]),
    array['call_seconds'] || case when calls <> 0 then array['ai_calls'] else '{}' end,
    array[delta] || case when calls <> 0 then array[calls::bigint] else '{}' end,
    array_fill(known.occurred_at, array[1 + abs(calls)]), at, array_fill(attempt.id::text, array[1 + abs(calls)]),
    array_fill(counted_on, array[1 + abs(calls)])
  );
  if charge.meter_key is null then
    return;
  end if;
  if delta > 0 then
    perform private.shift_prepaid(attempt.organization_id, 'call_seconds', counted_on, paid);
    if charge.meter_key = 'ai_calls' then
      perform private.shift_prepaid(attempt.organization_id, 'ai_calls', counted_on, calls);
    end if;
  end if;

  if cost < 0 then
    -- To the first charge as far as it goes; what a correction took on top is the platform's to keep.
    cost := -least(-cost, (
      select original.amount_minor - coalesce(sum(refund.amount_minor), 0)
      from public.credit_transactions as original
      left join public.credit_transactions as refund
        on refund.organization_id = original.organization_id and refund.reverses_id = original.id
      where original.organization_id = attempt.organization_id and original.id = charge.transaction_id
      group by original.id
    ));
    if cost < 0 then
      entry := private.refund_credit(
        attempt.organization_id, charge.transaction_id, -cost, 'call ' || correction, at, 'The carrier corrected the seconds of the call'
      );
    end if;
  elsif cost > 0 then
    cost := private.debit_credit(
      attempt.organization_id, charge.currency, cost, 'call ' || correction, at, true, 'consumption', 'call', attempt.id
    );
    select written.id
    into entry
    from public.credit_transactions as written
    where written.organization_id = attempt.organization_id and written.idempotency_key = 'call ' || correction;
  end if;
  insert into private.call_corrections (
    correction_id, organization_id, call_log_id, seconds, credit_seconds, overage_seconds, charged_minor, transaction_id, created_at
  )
  values (correction, attempt.organization_id, attempt.id, delta, paid, overage, coalesce(cost, 0), entry, at);
end
$$;
comment on function private.correct_call(public.call_logs, bigint, timestamptz) is
  'Settles the difference when a carrier corrects the seconds of a call that was counted, once: on the call''s own day, as an event that '
  'names the one it corrects, and in credit where the call was charged.';

create or replace function private.record_usage(request jsonb, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  api_key record;
  given jsonb := request -> 'events';
  ids text[];
  sources text[];
  meters text[];
  quantities bigint[];
  occurred timestamptz[];
  hashes bytea[];
  statuses text[];
  codes text[];
  stored integer[];
  corrected text[];
  days date[];
  place integer;
  original private.usage_keys;
begin
  if request ? 'organization_id' and not request ? 'api_key' then
    -- From the platform's own queue.
    select tenant.id as organization_id, array['usage.write'] as scopes
    into api_key
    from public.organizations as tenant
    where tenant.id = private.read_uuid(request, 'organization_id');
    if not found then
      perform private.raise_error(404, 'organization_not_found', 'There is no such organization', 'organization_id');
    end if;
  else
    select key.organization_id, key.scopes
    into api_key
    from public.api_keys as key
    where key.prefix = request #>> '{api_key,prefix}'
      and encode(key.sha256, 'hex') = lower(request #>> '{api_key,sha256}')
      and key.revoked_at is null;
    if not found then
      perform private.raise_error(401, 'invalid_api_key', 'The API key is unknown or revoked');
    end if;
  end if;
  if not 'usage.write' = any (api_key.scopes) then
    perform private.raise_error(403, 'missing_scope', 'The API key lacks the scope usage.write');
  end if;
  if given is null or jsonb_typeof(given) <> 'array' or jsonb_array_length(given) = 0 then
    perform private.raise_error(400, 'invalid_request', 'events must be an array of at least one event', 'events');
  end if;
  if jsonb_array_length(given) > 1000 then
    perform private.raise_error(413, 'too_many_events', 'At most 1000 events are taken at once', 'events');
  end if;

  -- What is wrong with an event concerns that event alone.
  with event as (
    select
      item.position,
      coalesce(item.value ->> 'specversion', '1.0') as specversion,
      item.value ->> 'id' as id,
      item.value ->> 'source' as source,
      item.value ->> 'type' as meter,
      case
        when jsonb_typeof(item.value -> 'quantity') = 'number' and item.value ->> 'quantity' ~ '^-?[0-9]{1,15}$'
        then (item.value ->> 'quantity')::bigint
      end as quantity,
      coalesce(jsonb_typeof(item.value -> 'corrects'), 'null') <> 'null' as is_correction,
      item.value -> 'corrects' as correction,
      item.value ->> 'corrects' as corrects,
      coalesce(jsonb_typeof(item.value -> 'time'), 'null') <> 'null' as is_timed,
      private.parse_instant(item.value ->> 'time') as instant
    from jsonb_array_elements(given) with ordinality as item (value, position)
  ),
  judged as (
    select
      event.*,
      case
        when event.specversion <> '1.0' then 'invalid_specversion'
        when coalesce(event.id, '') = '' or length(event.id) > 255 then 'invalid_id'
        when coalesce(event.source, '') = '' or length(event.source) > 255 then 'invalid_source'
        when event.source = 'call' then 'reserved_source'
        when meter.key is null or not meter.is_active then 'unknown_type'
        when meter.is_reserved then 'reserved_type'
        when event.quantity is null or event.quantity = 0 or event.quantity < 0 and not event.is_correction then 'invalid_quantity'
        when event.is_correction and (jsonb_typeof(event.correction) <> 'string' or event.corrects in ('', event.id)) then 'invalid_corrects'
        when event.is_timed and (event.instant is null or event.instant < '2000-01-01') then 'invalid_time'
        when event.instant > at + interval '5 minutes' then 'time_in_future'
      end as code
    from event
    left join public.meters as meter on meter.key = event.meter
  )
  select
    array_agg(coalesce(id, '') order by position), array_agg(coalesce(source, '') order by position),
    array_agg(meter order by position), array_agg(quantity order by position),
    array_agg(coalesce(instant, at) order by position),
    array_agg(
      private.usage_hash(concat_ws(e'\x1f', meter, quantity, coalesce(extract(epoch from instant)::text, 'now'), corrects)) order by position),
    array_agg(corrects order by position), array_fill(null::date, array[count(*)::integer]), array_agg(code order by position),
    array_agg(case when code is not null then 'rejected' end order by position)
  into ids, sources, meters, quantities, occurred, hashes, corrected, days, codes, statuses
  from judged;

  -- The first event of a batch under a key is the one that counts; the others are compared with it like any repetition.
  with fresh as (
    insert into private.usage_keys as known (organization_id, source, key, body_hash, meter_key, occurred_at, quantity)
    select
      api_key.organization_id, first.source, first.id, first.hash, case when corrected[first.position] is null then meters[first.position] end,
      case when corrected[first.position] is null then occurred[first.position] end,
      case when corrected[first.position] is null then quantities[first.position] end
    from (
      select distinct on (event.source, event.id) event.source, event.id, event.hash, event.position
      from unnest(sources, ids, hashes, codes) with ordinality as event (source, id, hash, code, position)
      where event.code is null
      order by event.source, event.id, event.position
    ) as first
    order by first.source, first.id
    on conflict on constraint usage_keys_pkey do nothing
    returning known.source, known.key
  )
  select array_agg(first.position order by first.position)
  into stored
  from fresh
  cross join lateral (
    select min(event.position)::integer as position
    from unnest(sources, ids, codes) with ordinality as event (source, id, code, position)
    where event.source = fresh.source and event.id = fresh.key and event.code is null
  ) as first;

  -- A correction changes what is counted under the key that it names, on that event's day, and never to less than nothing.
  for place in
    select item.position
    from unnest(stored) as item (position)
    where corrected[item.position] is not null
    order by sources[item.position], corrected[item.position], item.position
  loop
    select known.*
    into original
    from private.usage_keys as known
    where known.organization_id = api_key.organization_id and known.source = sources[place] and known.key = corrected[place]
    for no key update;
    codes[place] := case
      when original.quantity is null or original.meter_key <> meters[place] then 'unknown_corrected'
      when original.quantity + quantities[place] < 0 then 'correction_too_large'
    end;
    if codes[place] is null then
      update private.usage_keys as known
      set quantity = known.quantity + quantities[place]
      where known.organization_id = api_key.organization_id and known.source = sources[place] and known.key = corrected[place];
      occurred[place] := original.occurred_at;
      days[place] := (
        select event.day
        from private.usage_events as event
        where event.occurred_at = original.occurred_at
          and event.organization_id = api_key.organization_id
          and event.source = original.source
          and event.key = original.key
          and event.corrects is null
      );
    else
      -- Nobody has seen its key yet: it is free for the same correction, once there is something to correct.
      delete from private.usage_keys as known
      where known.organization_id = api_key.organization_id and known.source = sources[place] and known.key = ids[place];
      statuses[place] := 'rejected';
      stored := array_remove(stored, place);
    end if;
  end loop;

  with event as (
    select given.*, given.position = any (coalesce(stored, '{}')) as is_stored
    from unnest(sources, ids, hashes, statuses) with ordinality as given (source, id, hash, status, position)
  )
  select array_agg(
    case
      when event.status is not null then event.status
      when event.is_stored then 'stored'
      when known.body_hash = event.hash then 'duplicate'
      when known.key is null then 'rejected'
      else 'conflict'
    end order by event.position)
  into statuses
  from event
  left join private.usage_keys as known
    on known.organization_id = api_key.organization_id and known.source = event.source and known.key = event.id;

  if cardinality(stored) > 0 then
    perform private.count_usage(
      api_key.organization_id, array_agg(sources[position]), array_agg(ids[position]), array_agg(meters[position]),
      array_agg(quantities[position]), array_agg(occurred[position]), at, array_agg(corrected[position]), array_agg(days[position]))
    from unnest(stored) as position;
  end if;

  return jsonb_build_object('results', (
    select jsonb_agg(
      jsonb_strip_nulls(jsonb_build_object(
        'id', result.id,
        'status', result.status,
        'code', case when result.status = 'conflict' then 'idempotency_conflict' else result.code end,
        'message', case
          when result.status = 'conflict' then 'An event with this source and id, but another body, was stored before'
          else case result.code
            when 'invalid_specversion' then 'specversion must be "1.0", or be left out'
            when 'invalid_id' then 'id must be a text of 1 to 255 characters'
            when 'invalid_source' then 'source must be a text of 1 to 255 characters'
            when 'reserved_source' then 'The source "call" belongs to the platform'
            when 'unknown_type' then 'type is not the key of an active meter'
            when 'reserved_type' then 'Calls are counted by the platform, not by events'
            when 'invalid_quantity' then 'data.quantity must be a whole number from 1 to 999999999999999, or less than 0 in a correction'
            when 'invalid_corrects' then 'corrects must be the id of another event of the same source, or be left out'
            when 'unknown_corrected' then 'corrects names no event of this source and type that was stored before, or names a correction'
            when 'correction_too_large' then 'The event that it corrects would count less than nothing'
            when 'invalid_time' then 'time must be an RFC 3339 date and time, or be left out'
            when 'time_in_future' then 'time lies more than five minutes ahead'
          end
        end
      ))
      order by result.position)
    from unnest(ids, statuses, codes) with ordinality as result (id, status, code, position)
  ));
end
$$;
revoke all on function private.record_usage(jsonb, timestamptz) from public;
grant execute on function private.record_usage(jsonb, timestamptz) to service_role;
comment on function private.record_usage(jsonb, timestamptz) is
  'Records a batch of usage events for the organization of an API key, or one that the platform names: each one stored, duplicate, conflict or rejected, by itself.';

create or replace function public.record_usage(jsonb) returns jsonb
language sql set search_path = ''
as $$
  select private.record_usage($1, private.clock_now())
$$;
revoke all on function public.record_usage(jsonb) from public, anon, authenticated;
grant execute on function public.record_usage(jsonb) to service_role;
comment on function public.record_usage(jsonb) is
  'For usage-metering. {"v":1,"api_key":{"prefix","sha256"} or "organization_id","events":[{"specversion"?,"id","source","type","time"?,"quantity","corrects"?}]} gives '
  '{"results":[{"id","status","code"?,"message"?}]}.';

create function private.get_usage_daily(from_day date, to_day date, meter text, at timestamptz) returns jsonb
language plpgsql stable security definer set search_path = ''
as $$
declare
  organization uuid := private.require_org('usage.view');
  subscription public.subscriptions;
  zone text;
  today date;
begin
  subscription := private.live_subscription(organization);
  select coalesce(subscription.timezone, tenant.timezone) into zone from public.organizations as tenant where tenant.id = organization;
  today := (at at time zone zone)::date;
  to_day := coalesce(to_day, today);
  from_day := coalesce(
    from_day, least(coalesce((subscription.current_period_start at time zone subscription.timezone)::date, date_trunc('month', today)::date), to_day)
  );
  if from_day > to_day or to_day - from_day > 399 then
    perform private.raise_error(400, 'invalid_request', 'from is not after to, and at most 400 days are shown at once', 'from');
  end if;
  if meter is not null and not exists (select from public.meters as known where known.key = get_usage_daily.meter) then
    perform private.raise_error(400, 'invalid_request', 'meter is not the key of a meter', 'meter');
  end if;
  return jsonb_build_object(
    'organization_id', organization, 'timezone', zone, 'from', from_day, 'to', to_day,
    'days', coalesce((
      select jsonb_agg(
        jsonb_build_object('day', total.day, 'meter', total.meter_key, 'quantity', total.quantity, 'events', total.events)
        order by total.day, known.position, total.meter_key)
      from public.usage_days as total
      join public.meters as known on known.key = total.meter_key
      where total.organization_id = organization
        and total.day between from_day and to_day
        and (get_usage_daily.meter is null or total.meter_key = get_usage_daily.meter)
    ), '[]')
  );
end
$$;
revoke all on function private.get_usage_daily(date, date, text, timestamptz) from public;
grant execute on function private.get_usage_daily(date, date, text, timestamptz) to authenticated;
comment on function private.get_usage_daily(date, date, text, timestamptz) is
  'Usage of the caller''s organization day by day, both ends included, of one meter or all. A day without usage has no row. Left out, '
  'the days are those of the current period until today.';

create function public.get_usage_daily(from_day date default null, to_day date default null, meter text default null) returns jsonb
language sql stable set search_path = ''
as $$
  select private.get_usage_daily(from_day, to_day, meter, private.clock_now())
$$;
revoke all on function public.get_usage_daily(date, date, text) from public, anon;
grant execute on function public.get_usage_daily(date, date, text) to authenticated;
comment on function public.get_usage_daily(date, date, text) is
  'Usage of the caller''s organization, {"timezone","from","to","days":[{"day","meter","quantity","events"}]}, of one meter or all.';

create function private.check_usage(organization_id uuid default null) returns table (organization uuid, meter text, problem text)
language sql stable security definer set search_path = ''
as $$
  -- One statement, so that all four are seen at one moment.
  with event as (
    select own.organization_id, own.meter_key, own.day, sum(own.quantity) as quantity, count(*) as events
    from private.usage_events as own
    where own.organization_id = $1 or $1 is null
    group by own.organization_id, own.meter_key, own.day
  ),
  day as (
    select own.* from public.usage_days as own where own.organization_id = $1 or $1 is null
  ),
  known as (
    -- A call is one key of two meters.
    select
      own.organization_id, split.meter_key, sum(split.quantity) as quantity
    from private.usage_keys as own
    cross join lateral (
      values (own.meter_key, own.quantity), (case when own.source = 'call' then 'ai_calls' end, (own.quantity > 0)::integer::bigint)
    ) as split (meter_key, quantity)
    where split.meter_key is not null and own.quantity is not null and (own.organization_id = $1 or $1 is null)
    group by own.organization_id, split.meter_key
  ),
  counter as (
    select own.* from public.usage_logs as own where own.organization_id = $1 or $1 is null
  )
  select
    coalesce(event.organization_id, day.organization_id), coalesce(event.meter_key, day.meter_key),
    format(
      'on %s: %s in %s events, %s in %s by day', coalesce(event.day, day.day), coalesce(event.quantity, 0), coalesce(event.events, 0),
      coalesce(day.quantity, 0), coalesce(day.events, 0)
    )
  from event
  full join day on day.organization_id = event.organization_id and day.meter_key = event.meter_key and day.day = event.day
  where (coalesce(event.quantity, 0), coalesce(event.events, 0)) <> (coalesce(day.quantity, 0), coalesce(day.events, 0))
  union all
  select
    coalesce(total.organization_id, known.organization_id), coalesce(total.meter_key, known.meter_key),
    format('in all: %s by events, %s by keys', coalesce(total.quantity, 0), coalesce(known.quantity, 0))
  from (
    select event.organization_id, event.meter_key, sum(event.quantity) as quantity
    from event
    group by event.organization_id, event.meter_key
  ) as total
  full join known on known.organization_id = total.organization_id and known.meter_key = total.meter_key
  where coalesce(total.quantity, 0) <> coalesce(known.quantity, 0)
  union all
  select
    counter.organization_id, counter.feature_key,
    format(
      'from %s to %s: %s counted, %s prepaid, by day %s and %s', counter.period_start, counter.period_end - 1, counter.usage_count,
      counter.prepaid, coalesce(sum(day.quantity), 0), coalesce(sum(day.prepaid), 0)
    )
  from counter
  left join day
    on day.organization_id = counter.organization_id
    and day.meter_key = counter.feature_key
    and day.day >= counter.period_start and day.day < counter.period_end
  group by counter.organization_id, counter.id, counter.feature_key, counter.period_start, counter.period_end, counter.usage_count, counter.prepaid
  having (counter.usage_count, counter.prepaid) <> (coalesce(sum(day.quantity), 0), coalesce(sum(day.prepaid), 0))
  union all
  select day.organization_id, day.meter_key, format('%s belongs to no period', day.day)
  from day
  where day.quantity <> 0
    and not exists (
      select
      from public.usage_logs as log
      where log.organization_id = day.organization_id
        and log.feature_key = day.meter_key
        and log.period_start <= day.day and day.day < log.period_end
    )
$$;
comment on function private.check_usage(uuid) is
  'Compares events, keys, days and counters and returns what disagrees: nothing, ever. For one organization or all.';

create function private.reconcile_usage(request jsonb, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  wrong jsonb;
  held uuid[];
begin
  with problem as (
    select found.organization, jsonb_agg(found.meter || ' ' || found.problem order by found.meter, found.problem) as problems
    from private.check_usage() as found
    group by found.organization
  ),
  stopped as (
    update public.subscriptions as subscription
    set billing_hold = 'usage does not add up: ' || (problem.problems ->> 0)
    from problem
    where subscription.organization_id = problem.organization
      and subscription.status not in ('cancelled', 'inactive')
      and subscription.billing_hold is null
    returning subscription.id, subscription.organization_id, subscription.billing_hold
  ),
  told as (
    insert into private.outbox (organization_id, topic, key, payload, created_at)
    select
      stopped.organization_id, 'billing.held', stopped.id || ' ' || at, jsonb_build_object('subscription_id', stopped.id, 'reason', stopped.billing_hold),
      at
    from stopped
    on conflict do nothing
  )
  select
    jsonb_agg(jsonb_build_object('organization_id', problem.organization, 'problems', problem.problems) order by problem.organization),
    (select array_agg(stopped.organization_id) from stopped)
  into wrong, held
  from problem;
  return jsonb_build_object('wrong', coalesce(wrong, '[]'), 'held', coalesce(cardinality(held), 0));
end
$$;
comment on function private.reconcile_usage(jsonb, timestamptz) is
  'Stops the billing of every organization whose usage does not add up, tells of it, and returns what is wrong. Nothing else stops.';

create function public.reconcile_usage(jsonb) returns jsonb
language sql set search_path = ''
as $$
  select private.reconcile_usage($1, private.clock_now())
$$;
comment on function public.reconcile_usage(jsonb) is
  'For usage-metering, by schedule. {"v":1} gives {"wrong":[{"organization_id","problems":[…]}],"held":n}.';

create function private.lift_billing_hold(organization_id uuid, reason text, at timestamptz) returns boolean
language plpgsql security definer set search_path = ''
as $$
declare
  wrong text := (select found.meter || ' ' || found.problem from private.check_usage(lift_billing_hold.organization_id) as found limit 1);
  lifted public.subscriptions;
begin
  if coalesce(btrim(reason), '') = '' then
    perform private.raise_error(422, 'reason_missing', 'Say why billing goes on', 'reason');
  end if;
  if wrong is not null then
    perform private.raise_error(409, 'usage_disagrees', 'Usage still does not add up: ' || wrong);
  end if;
  update public.subscriptions as subscription
  set billing_hold = null
  where subscription.organization_id = lift_billing_hold.organization_id
    and subscription.status not in ('cancelled', 'inactive')
    and subscription.billing_hold is not null
  returning subscription.* into lifted;
  if not found then
    return false;
  end if;
  perform private.audit(organization_id, 'billing.resumed', 'subscription', lifted.id, jsonb_build_object('reason', reason), at);
  return true;
end
$$;
comment on function private.lift_billing_hold(uuid, text, timestamptz) is
  'Lets an organization be billed again, for an operator who has mended what was wrong: refused while usage does not add up. The periods '
  'that were missed are billed by the next run. Says whether there was a hold.';

create or replace function private.bill_periods(subscription_ids uuid[], issuer private.billing_issuer, at timestamptz) returns uuid[]
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
      -- What prepaid credit paid is settled: it is neither included nor billed again.
      coalesce((
        select sum(total.quantity - total.prepaid)
        from public.usage_days as total
        where total.organization_id = ended.organization_id
          and total.meter_key = term.meter_key
          and total.day >= ended.first_day and total.day < ended.next_day
      ), 0)::bigint as quantity
    from ended
    join public.plan_price_meters as term on term.plan_price_id = ended.plan_price_id
    join public.meters as meter on meter.key = term.meter_key
  ),
  late as materialized (
    -- Periods that were billed before and have changed since, each at its own price.
    select
      ended.invoice_id, log.organization_id, log.feature_key, log.period_start, gen_random_uuid() as line_id, meter.name, meter.unit, meter.position,
      term.overage_price_minor, term.overage_unit,
      greatest(log.usage_count - log.prepaid - nullif(term.included_units, -1), 0)
        - greatest(log.billed_count - nullif(term.included_units, -1), 0) as quantity,
      private.divide_half_away(
        greatest(log.usage_count - log.prepaid - nullif(term.included_units, -1), 0)::numeric * term.overage_price_minor, term.overage_unit)
        - private.divide_half_away(
          greatest(log.billed_count - nullif(term.included_units, -1), 0)::numeric * term.overage_price_minor, term.overage_unit)
        as amount_minor,
      log.period_end
    from ended
    join lateral (
      select distinct adjustment.organization_id, adjustment.meter_key, adjustment.period_start
      from private.usage_adjustments as adjustment
      where adjustment.organization_id = ended.organization_id and adjustment.settled_at is null
    ) as adjustment on true
    join public.usage_logs as log
      on log.organization_id = adjustment.organization_id
      and log.feature_key = adjustment.meter_key
      and log.period_start = adjustment.period_start
    join public.plan_prices as price on price.id = log.plan_price_id and price.currency = ended.currency
    join public.meters as meter on meter.key = log.feature_key
    left join public.plan_price_meters as term on term.plan_price_id = log.plan_price_id and term.meter_key = log.feature_key
  ),
  current_item as materialized (
    select
      ended.invoice_id, null::uuid as line_id, 0 as rank, 0 as meter_position, 'base' as kind, null::text as meter_key,
      ended.plan_name || ' plan, ' || ended.billing_cycle || case when ended.period_no < 0 then ' (trial)' else '' end as description,
      1::bigint as quantity, case ended.billing_cycle when 'yearly' then 'year' else 'month' end as unit,
      case when ended.period_no < 0 then 0 else ended.base_minor end as unit_price_minor, 1::bigint as price_units,
      case when ended.period_no < 0 then 0 else ended.base_minor end as amount_minor
    from ended
    union all
    select
      used.invoice_id, null, 1, used.position, 'included', used.meter_key,
      used.name || ' included: ' || private.describe_quantity(least(used.quantity, used.allowance), used.unit)
        || case when used.allowance is null then ', unlimited' else ' of ' || private.describe_quantity(used.allowance, used.unit) end,
      least(used.quantity, used.allowance), used.unit, 0, 1, 0
    from used
    where used.allowance is null or used.allowance > 0
    union all
    select
      used.invoice_id, null, 2, used.position, 'overage', used.meter_key,
      used.name || ' beyond the plan: ' || private.describe_quantity(used.quantity - used.allowance, used.unit),
      used.quantity - used.allowance, used.unit, used.overage_price_minor, used.overage_unit,
      private.divide_half_away((used.quantity - used.allowance)::numeric * used.overage_price_minor, used.overage_unit)
    from used
    where used.quantity > used.allowance and used.overage_price_minor is not null
  ),
  adjustable as materialized (
    -- What an invoice would have to give back more than it charges waits for the next one.
    select late.*
    from late
    join (
      select whole.invoice_id, sum(whole.amount_minor) as amount_minor
      from (
        select current_item.invoice_id, current_item.amount_minor from current_item
        union all
        select late.invoice_id, coalesce(late.amount_minor, 0) from late
      ) as whole
      group by whole.invoice_id
    ) as outcome using (invoice_id)
    where outcome.amount_minor > 0 or coalesce(late.amount_minor, 0) = 0
  ),
  item as materialized (
    select current_item.* from current_item
    union all
    select
      adjustable.invoice_id, adjustable.line_id, 3, adjustable.position, 'adjustment', adjustable.feature_key,
      adjustable.name || ' beyond the plan, ' || adjustable.period_start || ' to ' || adjustable.period_end - 1 || ', told later: '
        || case when adjustable.quantity < 0 then '-' else '' end || private.describe_quantity(abs(adjustable.quantity), adjustable.unit),
      adjustable.quantity, adjustable.unit, adjustable.overage_price_minor, adjustable.overage_unit, adjustable.amount_minor
    from adjustable
    where adjustable.amount_minor <> 0
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
      id, organization_id, invoice_id, position, kind, meter_key, description, quantity, unit, unit_price_minor, price_units, amount_minor
    )
    select
      coalesce(item.line_id, gen_random_uuid()), draft.organization_id, draft.id,
      row_number() over (partition by draft.id order by item.rank, item.meter_position, item.meter_key, item.description),
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
  ),
  settled as (
    update private.usage_adjustments as adjustment
    set settled_at = at, invoice_line_id = case when adjustable.amount_minor <> 0 then adjustable.line_id end
    from adjustable
    where adjustment.organization_id = adjustable.organization_id
      and adjustment.meter_key = adjustable.feature_key
      and adjustment.period_start = adjustable.period_start
      and adjustment.settled_at is null
      and (coalesce(adjustable.amount_minor, 0) = 0 or adjustable.invoice_id in (select bill.invoice_id from bill))
    returning adjustment.organization_id, adjustment.meter_key, adjustment.period_start
  ),
  rebilled as (
    update public.usage_logs as log
    set billed_count = log.usage_count - log.prepaid
    from (select distinct settled.* from settled) as period
    where log.organization_id = period.organization_id
      and log.feature_key = period.meter_key
      and log.period_start = period.period_start
  )
  select array_agg(draft.id) into drafts from draft;
  return coalesce(drafts, '{}');
end
$$;
comment on function private.bill_periods(uuid[], private.billing_issuer, timestamptz) is
  'Drafts one invoice for the current period of each subscription; none for a period that costs nothing. What came late to periods that '
  'were billed before is adjusted.';

create or replace function private.close_periods(request jsonb, at timestamptz) returns jsonb
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
      and (
        log.period_start = (subscription.current_period_start at time zone subscription.timezone)::date
        or log.plan_price_id is not null and exists (
          select
          from private.usage_adjustments as adjustment
          where adjustment.organization_id = log.organization_id
            and adjustment.meter_key = log.feature_key
            and adjustment.period_start = log.period_start
            and adjustment.settled_at is null
        )
      )
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
        and (log.usage_count, log.prepaid) <> (
          select coalesce(sum(total.quantity), 0), coalesce(sum(total.prepaid), 0)
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
    set closed_at = at, plan_price_id = subscription.plan_price_id, billed_count = log.usage_count - log.prepaid
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

revoke all on function
  private.count_usage(uuid, text[], text[], text[], bigint[], timestamptz[], timestamptz, text[], date[])
from public;
comment on function private.count_usage(uuid, text[], text[], text[], bigint[], timestamptz[], timestamptz, text[], date[]) is
  'Adds events of one organization to its periods, days and event log, and tells of 50, 80 and 100 % of a limit. The caller has made sure '
  'of their keys; nothing is refused here, also not what is over a limit or late.';
revoke all on function
  private.shift_prepaid(uuid, text, date, bigint), private.correct_call(public.call_logs, bigint, timestamptz)
from public;
revoke all on function
  private.check_usage(uuid), private.reconcile_usage(jsonb, timestamptz), public.reconcile_usage(jsonb),
  private.lift_billing_hold(uuid, text, timestamptz)
from public, anon, authenticated, service_role;
grant execute on function private.reconcile_usage(jsonb, timestamptz), public.reconcile_usage(jsonb) to service_role;
