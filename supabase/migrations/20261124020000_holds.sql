-- What a call may cost at most is held from its release to its end: of the plan's calls and seconds, and of prepaid credit, which now
-- pays for what is beyond the plan.

set local lock_timeout = '5s';
set local statement_timeout = '60s';

-- Plans: what a second costs in credit -------------------------------------------------------------------------------------------

alter table public.plan_price_meters
  add column credit_price_minor bigint,
  add column credit_unit bigint not null default 60,
  add column credit_pulse bigint not null default 1;

-- A price list is short.
-- squawk-ignore constraint-missing-not-valid
alter table public.plan_price_meters add constraint plan_price_meters_credit_price_not_negative check (credit_price_minor >= 0);

-- A price list is short.
-- squawk-ignore constraint-missing-not-valid
alter table public.plan_price_meters add constraint plan_price_meters_credit_unit_positive check (credit_unit > 0);

-- A price list is short.
-- squawk-ignore constraint-missing-not-valid
alter table public.plan_price_meters add constraint plan_price_meters_credit_pulse_positive check (credit_pulse > 0);

-- A price list is short.
-- squawk-ignore constraint-missing-not-valid
alter table public.plan_price_meters add constraint plan_price_meters_credit_buys_calling check (credit_price_minor is null or meter_key in ('ai_calls', 'call_seconds'));

-- A price list is short.
-- squawk-ignore constraint-missing-not-valid
alter table public.plan_price_meters add constraint plan_price_meters_calls_sold_one_way check (
    meter_key <> 'ai_calls' or credit_price_minor is null or overage_price_minor is null
  );

comment on column public.plan_price_meters.credit_price_minor is
  'Price of each `credit_unit` seconds in prepaid credit, for seconds beyond the included ones, or for all seconds of a call beyond the '
  'included calls; null is not paid with credit. Credit comes before overage, and where there is no overage price nothing is dialled '
  'without it. A call costs its pulses, rounded once to the minor unit, half away from zero.';
comment on column public.plan_price_meters.credit_unit is 'How many seconds the credit price is for.';
comment on column public.plan_price_meters.credit_pulse is
  'Credit pays for started multiples of this many seconds of a call: 1 is by the second, 60 by the started minute.';

-- Counters and wallets -----------------------------------------------------------------------------------------------------------

alter table public.usage_logs add column prepaid bigint not null default 0;
alter table public.usage_days add column prepaid bigint not null default 0;
alter table public.call_credits add column held_minor bigint not null default 0;

-- The column is as new as its check: in every row it is zero, and the limits above bound how long anybody waits for the scan.
-- squawk-ignore constraint-missing-not-valid
alter table public.usage_logs add constraint usage_logs_prepaid_range check (prepaid between 0 and usage_count);

-- The column is as new as its check: in every row it is zero, and the limits above bound how long anybody waits for the scan.
-- squawk-ignore constraint-missing-not-valid
alter table public.usage_days add constraint usage_days_prepaid_range check (prepaid between 0 and quantity);

-- The column is as new as its check: in every row it is zero, and the limits above bound how long anybody waits for the scan.
-- squawk-ignore constraint-missing-not-valid
alter table public.call_credits add constraint call_credits_held_not_negative check (held_minor >= 0);

comment on column public.usage_logs.prepaid is
  'Of the units used, those that were charged to prepaid credit: they use up nothing that is included, and no invoice bills them again. '
  'Equals the sum of usage_days over the period.';
comment on column public.usage_days.prepaid is 'Of the units used, those that were charged to prepaid credit and are not billed.';
comment on column public.call_credits.held_minor is
  'Of the balance, what is held for calls under way: no other call begins on it, and it is not paid back. More than the balance when '
  'credit expired meanwhile.';

-- What a call holds, and what it cost ---------------------------------------------------------------------------------------------

create table private.call_holds (
  attempt_id      uuid not null,
  organization_id uuid not null,
  seconds         bigint not null default 0,
  credit_seconds  bigint not null default 0,
  is_beyond       boolean not null default false,
  currency        text,
  credit_minor    bigint not null default 0,
  constraint call_holds_pkey primary key (attempt_id),
  constraint call_holds_attempt_fkey foreign key (organization_id, attempt_id)
    references public.call_logs (organization_id, id) on delete restrict,
  constraint call_holds_wallet_fkey foreign key (organization_id, currency)
    references public.call_credits (organization_id, currency) on delete restrict,
  constraint call_holds_seconds_not_negative check (seconds >= 0 and credit_seconds >= 0),
  constraint call_holds_credit_not_negative check (credit_minor >= 0),
  constraint call_holds_credit_has_wallet check (credit_minor = 0 or currency is not null)
);

create index idx_call_holds_attempt on private.call_holds (organization_id, attempt_id);
create index idx_call_holds_wallet on private.call_holds (organization_id, currency) where currency is not null;
select private.close_table('private.call_holds');

comment on table private.call_holds is
  'What an outbound attempt that has not ended holds: one call, so many seconds, so much credit. Made by the release, gone with the '
  'attempt''s end, whatever that end is. The counters'' `reserved` and the wallet''s `held_minor` are the sums of these rows.';
comment on column private.call_holds.seconds is 'Held of the plan''s seconds, the most that the call may last; 0 where the plan limits none.';
comment on column private.call_holds.credit_seconds is 'How many seconds of the call the held credit pays for.';
comment on column private.call_holds.is_beyond is 'The call itself was beyond the included calls when it was released.';
comment on column private.call_holds.currency is 'The wallet that the credit is held in; null without credit.';
comment on column private.call_holds.credit_minor is 'What is held of it.';

create table public.call_charges (
  call_log_id       uuid not null,
  organization_id   uuid not null,
  plan_price_id     uuid not null references public.plan_prices (id) on delete restrict,
  meter_key         text not null references public.meters (key) on delete restrict,
  day               date not null,
  seconds           bigint not null,
  credit_seconds    bigint not null,
  overage_seconds   bigint not null default 0,
  currency          text not null,
  charged_minor     bigint not null,
  uncollected_minor bigint not null default 0,
  transaction_id    uuid,
  created_at        timestamptz not null,
  constraint call_charges_pkey primary key (call_log_id),
  constraint call_charges_tenant_key unique (organization_id, call_log_id),
  constraint call_charges_call_fkey foreign key (organization_id, call_log_id)
    references public.call_logs (organization_id, id) on delete restrict,
  constraint call_charges_transaction_fkey foreign key (organization_id, transaction_id)
    references public.credit_transactions (organization_id, id) on delete restrict,
  constraint call_charges_seconds_fit check (
    seconds > 0 and credit_seconds >= 0 and overage_seconds >= 0 and credit_seconds + overage_seconds <= seconds
  ),
  constraint call_charges_amounts_not_negative check (charged_minor >= 0 and uncollected_minor >= 0),
  constraint call_charges_charge_is_in_ledger check ((charged_minor > 0) = (transaction_id is not null))
);

create index idx_call_charges_org_day on public.call_charges (organization_id, day);
create index idx_call_charges_transaction on public.call_charges (organization_id, transaction_id) where transaction_id is not null;
create index idx_call_charges_price on public.call_charges (plan_price_id);
create index idx_call_charges_meter on public.call_charges (meter_key);

revoke all on public.call_charges from anon, authenticated, service_role;
grant select on public.call_charges to authenticated, service_role;
alter table public.call_charges enable row level security;
alter table public.call_charges force row level security;
create policy "Members who may see billing see what calls cost" on public.call_charges
  for select to authenticated using (organization_id = (select private.org_with('billing.view')));

create trigger call_charges_is_append_only before update or delete or truncate on public.call_charges
  for each statement execute function private.refuse_money_change();

comment on table public.call_charges is
  'How the seconds of a call that were beyond what the plan includes were paid, once a call, append-only. Calls within the plan, and '
  'plans that take no credit, have no row.';
comment on column public.call_charges.meter_key is 'The term that priced them: ai_calls for a call beyond the included calls, else call_seconds.';
comment on column public.call_charges.day is 'The local day on which the call was counted.';
comment on column public.call_charges.seconds is 'Seconds beyond what the plan includes.';
comment on column public.call_charges.credit_seconds is 'Of these, those that credit paid for.';
comment on column public.call_charges.overage_seconds is 'Of these, those that the invoice bills, because the credit did not reach and the plan prices them.';
comment on column public.call_charges.charged_minor is 'What was taken from prepaid credit.';
comment on column public.call_charges.uncollected_minor is
  'What the call cost beyond the credit that there was, where the plan has no price for overage: recorded, and billed to nobody.';
comment on column public.call_charges.transaction_id is 'The consumption in the credit ledger; null when nothing was taken.';


-- Who is being called while this is applied holds the call, as before.
insert into private.call_holds (attempt_id, organization_id)
select log.id, log.organization_id
from public.call_logs as log
where log.direction = 'outbound' and log.status <> 'ended'
on conflict do nothing;

create or replace function private.lift_dispatch_hold(organization_id uuid, reasons text[]) returns boolean
language plpgsql security definer set search_path = ''
as $$
begin
  -- Whoever has it locked without the caller's lock is lifting it too.
  delete from private.dispatch_holds as hold
  where hold.organization_id in (
    select waiting.organization_id
    from private.dispatch_holds as waiting
    where waiting.organization_id = lift_dispatch_hold.organization_id and waiting.reason = any (reasons)
    for update skip locked
  );
  return found;
end
$$;

comment on function private.lift_dispatch_hold(uuid, text[]) is
  'Lets an organization be released for again that waits for one of these reasons, and says whether it did. The caller holds the lock '
  'of what there is more of.';

-- What a call may cost, and what it cost ------------------------------------------------------------------------------------------
--
-- A second of calling is paid by what the plan includes, then by prepaid credit, then by overage where the plan prices it. What pays
-- is decided when the call ends, by what is left then; the hold of the release only makes sure that it is there. The locks are the
-- counters of the organization, then its wallet.

create or replace function private.credit_cost(seconds bigint, term public.plan_price_meters) returns bigint
language plpgsql immutable set search_path = ''
as $$
begin
  return private.divide_half_away(
    div(seconds::numeric + term.credit_pulse - 1, term.credit_pulse) * term.credit_pulse * term.credit_price_minor, term.credit_unit);
end
$$;
comment on function private.credit_cost(bigint, public.plan_price_meters) is
  'What seconds of one call cost in prepaid credit: started pulses, rounded once.';

create or replace function private.credit_reach(amount_minor bigint, term public.plan_price_meters) returns bigint
language plpgsql immutable set search_path = ''
as $$
begin
  if term.credit_price_minor = 0 then
    return 2147483647;
  end if;
  return least(
    div(greatest(amount_minor, 0)::numeric * term.credit_unit, term.credit_price_minor::numeric * term.credit_pulse) * term.credit_pulse,
    2147483647
  )::bigint;
end
$$;
comment on function private.credit_reach(bigint, public.plan_price_meters) is 'How many seconds of one call an amount of credit pays for, in whole pulses.';

create or replace function private.shortest_call() returns integer
language sql immutable set search_path = ''
as $$
  select 30
$$;
comment on function private.shortest_call() is
  'Nobody is called for fewer seconds than these, the shortest that a campaign may ask for: where less is left, the lead waits.';

create or replace function private.hold_calls(
  organization_id uuid, wanted integer[], at timestamptz,
  out limits integer[], out holds private.call_holds[], out reason text
)
language plpgsql security definer set search_path = ''
as $$
declare
  subscription public.subscriptions;
  period record;
  calls public.plan_price_meters;
  talk public.plan_price_meters;
  term public.plan_price_meters;
  counter record;
  open_holds record;
  money text;
  wallet_id uuid;
  is_metered boolean;
  is_beyond boolean;
  calls_left bigint;
  calls_covered bigint;
  seconds_left bigint;
  seconds_covered bigint;
  credit_left bigint;
  granted bigint;
  covered bigint;
  paid bigint;
  cost bigint;
  seconds_held bigint := 0;
  credit_held bigint := 0;
begin
  limits := '{}';
  holds := '{}';

  for try in 1..3 loop
    subscription := private.live_subscription(organization_id);
    if subscription.id is null or subscription.status not in ('trialing', 'active', 'past_due') then
      reason := 'quota_exhausted';
      return;
    end if;
    period := private.usage_period(
      subscription, organization_id, subscription.timezone, (at at time zone subscription.timezone)::date, at);
    select price.currency into money from public.plan_prices as price where price.id = subscription.plan_price_id;
    select own.* into calls
    from public.plan_price_meters as own
    where own.plan_price_id = subscription.plan_price_id and own.meter_key = 'ai_calls';
    select own.* into talk
    from public.plan_price_meters as own
    where own.plan_price_id = subscription.plan_price_id and own.meter_key = 'call_seconds';
    is_metered := coalesce(talk.included_units >= 0, false) or private.meter_cap(talk) is not null;

    insert into public.usage_logs (organization_id, feature_key, period_start, period_end)
    select hold_calls.organization_id, meter.key, period.period_start, period.period_end
    from unnest(array['ai_calls', case when is_metered then 'call_seconds' end]) as meter (key)
    where meter.key is not null
      and not exists (
        select
        from public.usage_logs as log
        where log.organization_id = hold_calls.organization_id and log.feature_key = meter.key and log.period_start = period.period_start
      )
    order by meter.key
    on conflict do nothing;

    -- What is still held from earlier periods will be used in this one.
    with locked as (
      select log.*
      from public.usage_logs as log
      where log.organization_id = hold_calls.organization_id
        and log.feature_key in ('ai_calls', 'call_seconds')
        and (log.period_start = period.period_start or log.period_start < period.period_start and log.reserved > 0)
      order by log.feature_key, log.period_start
      for no key update
    )
    select
      coalesce(bool_or(locked.closed_at is not null) filter (where locked.period_start = period.period_start), true) as is_closed,
      sum(locked.usage_count) filter (where locked.feature_key = 'ai_calls' and locked.period_start = period.period_start)::bigint as calls,
      sum(locked.prepaid) filter (where locked.feature_key = 'ai_calls' and locked.period_start = period.period_start)::bigint as paid_calls,
      sum(locked.reserved) filter (where locked.feature_key = 'ai_calls')::bigint as held_calls,
      sum(locked.usage_count) filter (where locked.feature_key = 'call_seconds' and locked.period_start = period.period_start)::bigint as seconds,
      sum(locked.prepaid) filter (where locked.feature_key = 'call_seconds' and locked.period_start = period.period_start)::bigint as paid_seconds,
      sum(locked.reserved) filter (where locked.feature_key = 'call_seconds')::bigint as held_seconds
    into counter
    from locked;
    exit when not counter.is_closed;
    -- The period was closed in between: look again which one is current.
  end loop;
  if counter.is_closed then
    reason := 'quota_exhausted';
    return;
  end if;

  -- Null is without end. Calls under way use up what is included only as far as no credit is held for them.
  select count(*) filter (where held.is_beyond) as calls, coalesce(sum(held.credit_seconds) filter (where not held.is_beyond), 0) as seconds
  into open_holds
  from private.call_holds as held
  where held.organization_id = hold_calls.organization_id;
  calls_left := private.meter_cap(calls) - counter.calls - counter.held_calls;
  seconds_left := private.meter_cap(talk) - counter.seconds - counter.held_seconds;
  if calls.credit_price_minor is not null and calls.included_units >= 0 then
    calls_covered := calls.included_units - (counter.calls - counter.paid_calls) - (counter.held_calls - open_holds.calls);
  end if;
  if talk.credit_price_minor is not null and talk.included_units >= 0 then
    seconds_covered := talk.included_units - (counter.seconds - counter.paid_seconds) - (counter.held_seconds - open_holds.seconds);
  end if;

  for place in 1..cardinality(wanted) loop
    granted := least(wanted[place], seconds_left);
    if calls_left <= 0 or granted < private.shortest_call() then
      reason := 'quota_exhausted';
      exit;
    end if;

    term := null;
    covered := granted;
    is_beyond := coalesce(calls_covered <= 0, false);
    if is_beyond then
      term := calls;
      covered := 0;
    elsif seconds_covered < granted then
      term := talk;
      covered := greatest(seconds_covered, 0);
    end if;
    paid := 0;
    cost := 0;
    if covered < granted then
      if credit_left is null then
        wallet_id := private.lock_wallet(organization_id, money, at);
        credit_left := coalesce((
          select own.balance_minor - own.held_minor from public.call_credits as own where own.id = wallet_id
        ), 0);
      end if;
      paid := least(granted - covered, private.credit_reach(credit_left, term));
      cost := private.credit_cost(paid, term);
      if term.overage_price_minor is null then
        granted := covered + paid;
        if granted < private.shortest_call() then
          reason := 'credit_exhausted';
          exit;
        end if;
      end if;
    end if;

    limits := limits || granted::integer;
    holds := holds || row(
      null, organization_id, case when is_metered then granted else 0 end, paid, is_beyond,
      case when paid > 0 and wallet_id is not null then money end, cost
    )::private.call_holds;
    calls_left := calls_left - 1;
    seconds_left := seconds_left - granted;
    calls_covered := calls_covered - (not is_beyond)::integer;
    seconds_covered := seconds_covered - covered;
    credit_left := credit_left - cost;
    seconds_held := seconds_held + case when is_metered then granted else 0 end;
    credit_held := credit_held + cost;
  end loop;

  update public.usage_logs as log
  set reserved = log.reserved + case log.feature_key when 'ai_calls' then cardinality(limits) else seconds_held end
  where log.organization_id = hold_calls.organization_id
    and log.period_start = period.period_start
    and (log.feature_key = 'ai_calls' and cardinality(limits) > 0 or log.feature_key = 'call_seconds' and seconds_held > 0);
  if credit_held > 0 then
    update public.call_credits as own set held_minor = own.held_minor + credit_held where own.id = wallet_id;
  end if;
end
$$;
comment on function private.hold_calls(uuid, integer[], timestamptz) is
  'Holds what calls of one organization may cost at most, in the order of their time limits `wanted`, as many as fit: the call, its '
  'seconds, and credit for what is beyond the plan. Gives for each the limit it may last, which is less where less is left, and what it '
  'holds; where not all fit, the reason why the next one has to wait.';

create or replace function private.give_back_holds(holds private.call_holds[], at timestamptz) returns void
language plpgsql security definer set search_path = ''
as $$
declare
  tenant record;
begin
  for tenant in
    select
      held.organization_id as id, count(*) as calls, sum(held.seconds)::bigint as seconds, max(held.currency) as currency,
      sum(held.credit_minor)::bigint as credit
    from unnest(holds) as held
    group by held.organization_id
    order by held.organization_id
  loop
    perform private.release_usage(tenant.id, 'ai_calls', tenant.calls, at);
    if tenant.seconds > 0 then
      perform private.release_usage(tenant.id, 'call_seconds', tenant.seconds, at);
    end if;
    if tenant.credit > 0 then
      update public.call_credits as own
      set held_minor = own.held_minor - tenant.credit
      where own.organization_id = tenant.id and own.currency = tenant.currency;
    end if;
  end loop;
end
$$;
comment on function private.give_back_holds(private.call_holds[], timestamptz) is
  'Gives back what was held for calls that were not made after all, in the transaction that held it.';

create or replace function private.charge_call(attempt public.call_logs, billed bigint, hold private.call_holds, at timestamptz) returns bigint
language plpgsql security definer set search_path = ''
as $$
declare
  subscription public.subscriptions;
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
    subscription := private.live_subscription(attempt.organization_id);
    select own.* into calls
    from public.plan_price_meters as own
    where own.plan_price_id = subscription.plan_price_id and own.meter_key = 'ai_calls';
    select own.* into talk
    from public.plan_price_meters as own
    where own.plan_price_id = subscription.plan_price_id and own.meter_key = 'call_seconds';
  end if;

  if calls.credit_price_minor is not null and calls.included_units >= 0
    or talk.credit_price_minor is not null and talk.included_units >= 0 then
    select price.currency into money from public.plan_prices as price where price.id = subscription.plan_price_id;
    select event.day
    into strict counted_on
    from private.usage_events as event
    where event.occurred_at = attempt.ended_at
      and event.organization_id = attempt.organization_id
      and event.meter_key = 'call_seconds'
      and event.source = 'call'
      and event.key = attempt.id::text;
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
    attempt.id, attempt.organization_id, subscription.plan_price_id, term.meter_key, counted_on, beyond,
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

create or replace function private.check_holds(organization_id uuid default null) returns table (organization uuid, problem text)
language sql stable security definer set search_path = ''
as $$
  with live as (
    select log.organization_id, log.id
    from public.call_logs as log
    where log.direction = 'outbound' and log.status <> 'ended' and (log.organization_id = $1 or $1 is null)
  ),
  held as (
    select own.organization_id, count(*) as calls, sum(own.seconds) as seconds
    from private.call_holds as own
    where own.organization_id = $1 or $1 is null
    group by own.organization_id
  ),
  counted as (
    select
      log.organization_id,
      sum(log.reserved) filter (where log.feature_key = 'ai_calls') as calls,
      sum(log.reserved) filter (where log.feature_key = 'call_seconds') as seconds
    from public.usage_logs as log
    where log.organization_id = $1 or $1 is null
    group by log.organization_id
  )
  select coalesce(own.organization_id, live.organization_id), format('attempt %s', coalesce(own.attempt_id, live.id))
    || case when live.id is null then ' has ended and holds something' else ' has not ended and holds nothing' end
  from (select hold.* from private.call_holds as hold where hold.organization_id = $1 or $1 is null) as own
  full join live on live.id = own.attempt_id
  where own.attempt_id is null or live.id is null
  union all
  select
    tenant.id,
    format(
      '%s calls and %s seconds held, %s and %s counted', coalesce(held.calls, 0), coalesce(held.seconds, 0), coalesce(counted.calls, 0),
      coalesce(counted.seconds, 0)
    )
  from public.organizations as tenant
  left join held on held.organization_id = tenant.id
  left join counted on counted.organization_id = tenant.id
  where (tenant.id = $1 or $1 is null)
    and (coalesce(held.calls, 0), coalesce(held.seconds, 0)) <> (coalesce(counted.calls, 0), coalesce(counted.seconds, 0))
  union all
  select wallet.organization_id, format('%s of credit held, the wallet says %s', coalesce(sum(own.credit_minor), 0), wallet.held_minor)
  from public.call_credits as wallet
  left join private.call_holds as own on own.organization_id = wallet.organization_id and own.currency = wallet.currency
  where wallet.organization_id = $1 or $1 is null
  group by wallet.id
  having wallet.held_minor <> coalesce(sum(own.credit_minor), 0)
$$;
comment on function private.check_holds(uuid) is
  'Compares what is held with the attempts that hold it and returns what disagrees: nothing, ever. For one organization or all.';

revoke all on function
  private.credit_cost(bigint, public.plan_price_meters), private.credit_reach(bigint, public.plan_price_meters), private.shortest_call(),
  private.hold_calls(uuid, integer[], timestamptz), private.give_back_holds(private.call_holds[], timestamptz),
  private.charge_call(public.call_logs, bigint, private.call_holds, timestamptz), private.check_holds(uuid)
from public;

revoke all on function private.lift_dispatch_hold(uuid, text[]) from public;

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

  insert into private.usage_keys as known (organization_id, source, key, body_hash)
  values (attempt.organization_id, 'call', attempt.id::text, said)
  on conflict on constraint usage_keys_pkey do nothing;
  is_first := found;
  is_new := is_first and billed > 0;
  if not is_first and billed > 0 then
    -- The call had ended without a billed second, and now the carrier says how many there were.
    update private.usage_keys as known
    set body_hash = said
    where known.organization_id = attempt.organization_id
      and known.source = 'call'
      and known.key = attempt.id::text
      and known.body_hash is null;
    is_new := found;
  end if;
  if not is_first and not is_new then
    return;
  end if;

  -- Under the counters' locks a hold becomes use: whoever asks what is left sees the one or the other, never both and never neither.
  perform
  from public.usage_logs as log
  where log.organization_id = attempt.organization_id
    and log.feature_key in ('ai_calls', 'call_seconds')
    and (log.closed_at is null or log.reserved > 0)
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

comment on function private.meter_call(public.call_logs, timestamptz) is
  'Settles one ended attempt: gives back what was held for it, once, counts the call and its billed seconds and charges what is beyond '
  'the plan, once, also when the carrier reports them later.';

create or replace function private.get_usage(at timestamptz) returns jsonb
language plpgsql stable security definer set search_path = ''
as $$
declare
  organization uuid := private.require_org('usage.view');
  subscription public.subscriptions;
  zone text;
  period record;
begin
  subscription := private.live_subscription(organization);
  select coalesce(subscription.timezone, tenant.timezone) into zone from public.organizations as tenant where tenant.id = organization;
  period := private.usage_period(subscription, organization, zone, (at at time zone zone)::date, at);

  return jsonb_build_object(
    'organization_id', organization,
    'period', jsonb_build_object(
      'start', private.local_midnight(period.period_start, zone), 'end', private.local_midnight(period.period_end, zone),
      'timezone', zone
    ),
    'plan', (
      select jsonb_build_object('slug', plan.slug, 'name', plan.name, 'status', subscription.status)
      from public.subscription_plans as plan
      where plan.id = subscription.plan_id
    ),
    'meters', coalesce((
      select jsonb_agg(
        jsonb_build_object(
          'meter', meter.key,
          'name', meter.name,
          'unit', meter.unit,
          'used', coalesce(log.usage_count, 0),
          'reserved', coalesce(log.reserved, 0),
          'included', nullif(term.included_units, -1),
          'limit', nullif(term.limit_units, -1),
          'overage', case
            when term.included_units >= 0 then greatest(coalesce(log.usage_count - log.prepaid, 0) - term.included_units, 0)
            else 0
          end
        )
        order by meter.position, meter.key)
      from public.meters as meter
      left join public.plan_price_meters as term
        on term.meter_key = meter.key and term.plan_price_id = subscription.plan_price_id
      left join public.usage_logs as log
        on log.feature_key = meter.key and log.organization_id = organization and log.period_start = period.period_start
      where term.meter_key is not null or log.id is not null
    ), '[]')
  );
end
$$;

create or replace function private.cut_usage_periods(organization_id uuid, from_day date, period_end date, at timestamptz) returns void
language plpgsql set search_path = ''
as $$
declare
  log public.usage_logs;
  moved bigint;
  moved_prepaid bigint;
begin
  for log in
    select counter.*
    from public.usage_logs as counter
    where counter.organization_id = cut_usage_periods.organization_id and counter.closed_at is null
    order by counter.feature_key, counter.period_start
    for no key update
  loop
    if log.period_start = from_day then
      update public.usage_logs as counter set period_end = cut_usage_periods.period_end where counter.id = log.id;
    elsif log.period_start < from_day then
      select coalesce(sum(total.quantity), 0)::bigint, coalesce(sum(total.prepaid), 0)::bigint
      into moved, moved_prepaid
      from public.usage_days as total
      where total.organization_id = cut_usage_periods.organization_id
        and total.meter_key = log.feature_key
        and total.day >= from_day and total.day < log.period_end;
      update public.usage_logs as counter
      set
        period_end = least(counter.period_end, from_day), usage_count = counter.usage_count - moved,
        prepaid = counter.prepaid - moved_prepaid, closed_at = at
      where counter.id = log.id;
      if moved > 0 then
        insert into public.usage_logs (organization_id, feature_key, usage_count, prepaid, period_start, period_end)
        values (cut_usage_periods.organization_id, log.feature_key, moved, moved_prepaid, from_day, cut_usage_periods.period_end);
      end if;
    end if;
  end loop;
end
$$;

create or replace function private.post_credit(
  organization_id uuid, type public.credit_transaction_type, currency text, amount_minor bigint, key text, at timestamptz,
  expires_at timestamptz default null, reference_type text default null, reference_id uuid default null, description text default null
) returns uuid
language plpgsql security definer set search_path = ''
as $$
declare
  wallet_id uuid;
  known public.credit_transactions;
  source public.credit_account_kind;
  target public.credit_account_kind;
begin
  select route.source, route.target
  into source, target
  from (
    values
      ('purchase'::public.credit_transaction_type, 'payments'::public.credit_account_kind, 'purchased'::public.credit_account_kind),
      ('monthly_grant', 'grants', 'monthly'),
      ('promotional_grant', 'grants', 'promotional'),
      ('adjustment', 'adjustments', 'purchased')
  ) as route (type, source, target)
  where route.type = post_credit.type;
  if source is null then
    raise exception 'a % does not bring credit', type using errcode = '22023';
  end if;
  if coalesce(amount_minor, 0) <= 0 then
    perform private.raise_error(422, 'invalid_amount', 'An amount of credit is positive', 'amount_minor');
  end if;
  if type = 'monthly_grant' and expires_at is null or type in ('purchase', 'adjustment') and expires_at is not null then
    perform private.raise_error(422, 'invalid_expiry', 'A monthly grant expires, a purchase and an adjustment do not', 'expires_at');
  end if;

  insert into public.call_credits (organization_id, currency, created_at, updated_at)
  values (organization_id, currency, at, at)
  on conflict on constraint call_credits_currency_key do nothing;
  wallet_id := private.lock_wallet(organization_id, currency, at);
  known := private.repeated_credit(organization_id, currency, type, amount_minor, key, null);
  if known.id is not null then
    return known.id;
  end if;
  if expires_at <= at then
    perform private.raise_error(422, 'invalid_expiry', 'The credit would have expired already', 'expires_at');
  end if;
  if private.lift_dispatch_hold(organization_id, array['credit_exhausted']) then
    perform private.nudge('call-dispatch');
  end if;
  return private.write_credit(
    wallet_id, type, amount_minor, key,
    array[
      private.credit_account(organization_id, currency, source), private.credit_account(organization_id, currency, target, expires_at)
    ],
    array['debit', 'credit']::public.ledger_side[], array[amount_minor, amount_minor],
    null, reference_type, reference_id, description, at
  );
end
$$;

create or replace function private.debit_credit(
  organization_id uuid, currency text, amount_minor bigint, key text, at timestamptz, allow_partial boolean default false,
  type public.credit_transaction_type default 'consumption', reference_type text default null, reference_id uuid default null,
  description text default null
) returns bigint
language plpgsql security definer set search_path = ''
as $$
declare
  wallet_id uuid;
  known public.credit_transactions;
  accounts uuid[];
  amounts bigint[];
  taken bigint;
begin
  if type not in ('consumption', 'adjustment') then
    raise exception 'a % does not take credit', type using errcode = '22023';
  end if;
  if coalesce(amount_minor, 0) <= 0 then
    perform private.raise_error(422, 'invalid_amount', 'An amount of credit is positive', 'amount_minor');
  end if;

  wallet_id := private.lock_wallet(organization_id, currency, at);
  if wallet_id is null then
    return 0;
  end if;
  known := private.repeated_credit(organization_id, currency, type, amount_minor, key, null);
  if known.id is not null then
    return known.amount_minor;
  end if;
  -- What is held for calls under way is theirs; only a call that has ended takes from all there is.
  if not allow_partial and exists (
    select from public.call_credits as own where own.id = wallet_id and own.balance_minor - own.held_minor < debit_credit.amount_minor
  ) then
    return 0;
  end if;

  -- Monthly before promotional before purchased, and within each what expires first.
  with held as (
    select
      account.id, account.kind, account.expires_at,
      least(
        account.balance_minor,
        debit_credit.amount_minor
          - coalesce(sum(account.balance_minor) over (
            order by account.kind, account.expires_at, account.id rows between unbounded preceding and 1 preceding
          ), 0)
      )::bigint as amount
    from public.credit_accounts as account
    where account.organization_id = debit_credit.organization_id
      and account.currency = debit_credit.currency
      and account.kind <= 'purchased'
      and account.balance_minor > 0
  )
  select
    array_agg(held.id order by held.kind, held.expires_at, held.id),
    array_agg(held.amount order by held.kind, held.expires_at, held.id),
    coalesce(sum(held.amount), 0)::bigint
  into accounts, amounts, taken
  from held
  where held.amount > 0;
  if taken = 0 or taken < amount_minor and not allow_partial then
    return 0;
  end if;

  perform private.write_credit(
    wallet_id, type, amount_minor, key,
    accounts || private.credit_account(
      organization_id, currency, case type when 'consumption' then 'consumption' else 'adjustments' end::public.credit_account_kind),
    array_fill('debit'::public.ledger_side, array[cardinality(accounts)]) || 'credit'::public.ledger_side,
    amounts || taken, null, reference_type, reference_id, description, at
  );
  return taken;
end
$$;

comment on function private.debit_credit(
  uuid, text, bigint, text, timestamptz, boolean, public.credit_transaction_type, text, uuid, text
) is
  'Takes credit out of an organization''s wallet, once a key, and returns how much: all of it, or 0 and nothing changed when the balance '
  'is too small, less what is held. With `allow_partial` it takes what there is: for a call that ran over, which is recorded in full all '
  'the same.';

create or replace function private.refund_credit(
  organization_id uuid, transaction_id uuid, amount_minor bigint, key text, at timestamptz, description text default null
) returns uuid
language plpgsql security definer set search_path = ''
as $$
declare
  original public.credit_transactions;
  wallet_id uuid;
  known public.credit_transactions;
  given_back bigint;
  accounts uuid[];
  amounts bigint[];
begin
  if coalesce(amount_minor, 0) <= 0 then
    perform private.raise_error(422, 'invalid_amount', 'An amount of credit is positive', 'amount_minor');
  end if;
  select transaction.*
  into original
  from public.credit_transactions as transaction
  where transaction.organization_id = refund_credit.organization_id
    and transaction.id = refund_credit.transaction_id
    and transaction.type in ('consumption', 'purchase');
  if not found then
    perform private.raise_error(404, 'credit_transaction_not_found', 'There is no such consumption or purchase', 'transaction_id');
  end if;
  wallet_id := private.lock_wallet(organization_id, original.currency, at);
  known := private.repeated_credit(organization_id, original.currency, 'refund', amount_minor, key, transaction_id);
  if known.id is not null then
    return known.id;
  end if;
  select coalesce(sum(refund.amount_minor), 0)
  into given_back
  from public.credit_transactions as refund
  where refund.organization_id = refund_credit.organization_id and refund.reverses_id = transaction_id;
  if given_back + amount_minor > original.amount_minor then
    perform private.raise_error(422, 'refund_too_large', 'More would be given back than there was', 'amount_minor');
  end if;

  if original.type = 'purchase' then
    accounts := array[private.credit_account(organization_id, original.currency, 'purchased')];
    if not exists (
      select
      from public.credit_accounts as account, public.call_credits as own
      where account.id = accounts[1]
        and own.id = wallet_id
        and least(account.balance_minor, own.balance_minor - own.held_minor) >= refund_credit.amount_minor
    ) then
      perform private.raise_error(422, 'insufficient_credit', 'The credit that was bought is used up', 'amount_minor');
    end if;
    return private.write_credit(
      wallet_id, 'refund', amount_minor, key,
      accounts || private.credit_account(organization_id, original.currency, 'payments'),
      array['debit', 'credit']::public.ledger_side[], array[amount_minor, amount_minor], transaction_id, original.reference_type,
      original.reference_id, description, at
    );
  end if;

  -- Back to where it was taken from, what was taken last first. An account that has expired since gives it up again.
  with taken as (
    select
      entry.account_id, entry.position, entry.amount_minor as amount,
      coalesce(sum(entry.amount_minor) over (order by entry.position desc rows between unbounded preceding and 1 preceding), 0) as before
    from public.credit_ledger as entry
    where entry.organization_id = refund_credit.organization_id
      and entry.transaction_id = refund_credit.transaction_id
      and entry.side = 'debit'
  ),
  returned as (
    select
      taken.account_id, taken.position,
      least(taken.amount + taken.before, given_back + refund_credit.amount_minor) - greatest(taken.before, given_back) as amount
    from taken
  )
  select array_agg(returned.account_id order by returned.position), array_agg(returned.amount::bigint order by returned.position)
  into accounts, amounts
  from returned
  where returned.amount > 0;
  return private.write_credit(
    wallet_id, 'refund', amount_minor, key,
    private.credit_account(organization_id, original.currency, 'consumption') || accounts,
    'debit'::public.ledger_side || array_fill('credit'::public.ledger_side, array[cardinality(accounts)]),
    amount_minor || amounts, transaction_id, original.reference_type, original.reference_id, description, at
  );
end
$$;

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

create or replace function private.release_calls(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' set jit = off set enable_seqscan = off as $$
declare
  wanted     constant integer := least(greatest(coalesce((request ->> 'limit')::integer, 100), 1), 500);
  attempts   jsonb;
  candidates private.candidate[];
  able       private.candidate[] := array[]::private.candidate[];
  over       private.candidate[] := array[]::private.candidate[];
  granted    uuid[] := array[]::uuid[];
  limits     integer[] := array[]::integer[];
  holds      private.call_holds[] := array[]::private.call_holds[];
  holding    record;
  room       integer;
  moved      integer := 0;
  given      integer;
  tenant     record;
begin
  perform private.lock_releases();

  -- An attempt whose message was lost is offered again, the same one.
  with lapsed as (
    select log.id
    from public.call_logs as log
    where log.status = 'created' and log.lease_until < now() and log.not_after > now()
    order by log.lease_until
    limit wanted
    for no key update skip locked
  ),
  renewed as (
    update public.call_logs as log
    set lease_until = now() + interval '60 seconds'
    from lapsed
    where log.id = lapsed.id
    returning log.id, log.organization_id, log.not_after
  )
  select jsonb_agg(jsonb_build_object('id', renewed.id, 'organization_id', renewed.organization_id, 'not_after', renewed.not_after))
  into attempts
  from renewed;
  attempts := coalesce(attempts, '[]');
  room := wanted - jsonb_array_length(attempts);

  -- Look until there are enough that may be dialled. Who must wait is told why and until when, and steps aside.
  for round in 1..5 loop
    exit when cardinality(able) >= room;
    candidates := private.judge_candidates(
      at, greatest(2 * room, 50), array(select candidate.queue_id from unnest(able || over) as candidate)
    );
    able := able || array(select candidate from unnest(candidates) as candidate where candidate.verdict is null);
    over := over || array(select candidate from unnest(candidates) as candidate where candidate.verdict is not null and candidate.due is null);
    update public.call_queue as queue
    set next_retry_at = candidate.due, wait_reason = candidate.verdict
    from unnest(candidates) as candidate
    where queue.id = candidate.queue_id and candidate.due is not null;
    moved := (select count(*) from unnest(candidates) as candidate where candidate.verdict is not null);
    exit when moved = 0;
  end loop;
  if cardinality(over) > 0 then
    perform private.close_leads(over, at);
  end if;
  able := private.choose_candidates(able, room);

  -- What the calls may cost last, organization by organization: nothing but wallets is locked after usage counters.
  for tenant in
    select
      (able[place]).organization_id as id, array_agg((able[place]).queue_id order by place) as rows,
      array_agg((able[place]).max_call_seconds order by place) as wanted
    from generate_subscripts(able, 1) as place
    group by (able[place]).organization_id
    order by (able[place]).organization_id
  loop
    holding := private.hold_calls(tenant.id, tenant.wanted, at);
    given := cardinality(holding.limits);
    if given < cardinality(tenant.rows) then
      insert into private.dispatch_holds as hold (organization_id, held_until, reason)
      values (tenant.id, at + interval '5 minutes', holding.reason)
      on conflict (organization_id) do update set held_until = excluded.held_until, reason = excluded.reason;
    end if;
    granted := granted || tenant.rows[:given];
    limits := limits || holding.limits;
    holds := holds || holding.holds;
  end loop;

  with attempt as (
    insert into public.call_logs (
      organization_id, campaign_id, lead_id, project_id, queue_id, attempt_no, carrier_account_id, caller_number, callee_number,
      agent_id, record_call, ring_timeout_seconds, time_limit_seconds, created_at, lease_until, not_after
    )
    select
      candidate.organization_id, candidate.campaign_id, candidate.lead_id, candidate.project_id, candidate.queue_id,
      candidate.attempt_no, candidate.carrier_account_id, candidate.caller_number, candidate.callee_number, candidate.agent_id,
      candidate.record_call, candidate.ring_timeout_seconds, allowed.seconds, at,
      now() + interval '60 seconds', now() + least(interval '10 minutes', candidate.closes_at - at)
    from unnest(able) as candidate
    join unnest(granted, limits) as allowed (queue_id, seconds) on allowed.queue_id = candidate.queue_id
    on conflict (callee_number) where direction = 'outbound' and status <> 'ended' do nothing
    returning id, organization_id, campaign_id, lead_id, queue_id, not_after
  ),
  held as (
    insert into private.call_holds (attempt_id, organization_id, seconds, credit_seconds, is_beyond, currency, credit_minor)
    select attempt.id, hold.organization_id, hold.seconds, hold.credit_seconds, hold.is_beyond, hold.currency, hold.credit_minor
    from generate_subscripts(granted, 1) as place
    join attempt on attempt.queue_id = granted[place]
    cross join lateral (select (holds[place]).*) as hold
  ),
  taken as (
    update public.call_queue as queue
    set status = 'processing', dispatch_count = queue.dispatch_count + 1, wait_reason = null
    from attempt
    where queue.id = attempt.queue_id
  ),
  calling as (
    update public.campaign_leads as member
    set status = 'calling'
    from attempt
    where member.organization_id = attempt.organization_id
      and member.campaign_id = attempt.campaign_id
      and member.lead_id = attempt.lead_id
  )
  select
    attempts || coalesce(
      jsonb_agg(jsonb_build_object('id', attempt.id, 'organization_id', attempt.organization_id, 'not_after', attempt.not_after)), '[]'
    ),
    count(*)
  into attempts, given
  from attempt;
  if given < cardinality(granted) then
    -- Somebody else began to call the number meanwhile: what was held for this row goes back.
    perform private.give_back_holds(
      array(
        select holds[place]
        from generate_subscripts(granted, 1) as place
        join public.call_queue as queue on queue.id = granted[place]
        where queue.status = 'queued'
      ),
      at
    );
  end if;

  -- Full hands, or rows that stepped aside in the last look: another one would find more.
  return jsonb_build_object('attempts', attempts, 'more', jsonb_array_length(attempts) >= wanted or moved > 0);
end
$$;

comment on column public.call_queue.wait_reason is
  'Why it waits: outside_window, bad_timezone, campaign_over, min_gap, daily_cap, number_in_call, quota_exhausted, credit_exhausted, callback, retry_<outcome>.';