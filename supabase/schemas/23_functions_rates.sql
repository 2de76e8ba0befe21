-- What a call is sold for by where it goes, what it costs, and what is left.
--
-- A rate deck prices calls by the longest prefix of the number: one of its versions holds at each moment, and never changes. A call is
-- rated when it ends, by the version that held when it was released, which is the one that the gate looked at. Its amount is kept whole, in
-- sixtieths of a millionth of the currency, since prices are for a minute and pulses are of seconds: the line of the invoice sums them
-- and is rounded once. What a carrier and an agent ask is kept in their own currency, with the exchange rate of the call's day.

-- Rate decks ----------------------------------------------------------------------------------------------------------------------

create table private.rate_decks (
  key        text primary key check (key ~ '^[a-z0-9]+(-[a-z0-9]+)*$'),
  kind       text not null check (kind in ('sell', 'cost')),
  currency   text not null check (currency ~ '^[A-Z]{3}$'),
  created_at timestamptz not null
);
select private.close_table('private.rate_decks');
comment on table private.rate_decks is 'Price lists of calls by prefix: what organizations pay (sell), and what carriers ask (cost).';

create table private.rate_deck_versions (
  id         uuid primary key default gen_random_uuid(),
  deck_key   text not null references private.rate_decks (key) on delete restrict,
  version    integer not null check (version > 0),
  valid_from timestamptz not null,
  created_at timestamptz not null,
  unique (deck_key, version)
);
select private.close_table('private.rate_deck_versions');
comment on table private.rate_deck_versions is
  'What a deck said from a moment on. Of those that have begun the latest version holds, so one that begins earlier replaces another that waits.';

create table private.rates (
  version_id        uuid not null references private.rate_deck_versions (id) on delete restrict,
  prefix            text collate "C" not null check (prefix ~ '^\+[1-9][0-9]{0,14}$'),
  destination       text not null check (btrim(destination) <> ''),
  price_micros      bigint check (price_micros between 0 and 1000000000000),
  connection_micros bigint not null default 0 check (connection_micros between 0 and 1000000000000),
  minimum_micros    bigint not null default 0 check (minimum_micros between 0 and 1000000000000),
  initial_pulse     integer not null default 1 check (initial_pulse between 1 and 3600),
  next_pulse        integer not null default 1 check (next_pulse between 1 and 3600),
  primary key (version_id, prefix)
);
select private.close_table('private.rates');
comment on table private.rates is 'The prices of a version of a deck: the longest prefix of a number decides.';
comment on column private.rates.price_micros is
  'What a minute costs, in millionths of the deck''s currency; null is not sold: nobody is called there, whatever shorter prefix has a price.';
comment on column private.rates.connection_micros is 'What an answered call costs besides.';
comment on column private.rates.minimum_micros is 'What an answered call costs at least.';
comment on column private.rates.initial_pulse is 'How many seconds an answered call is charged for at least: the 60 of 60/1, the 30 of 30/6.';
comment on column private.rates.next_pulse is 'What it is charged in after that: the 6 of 30/6.';

create trigger rate_deck_versions_are_kept before update or delete or truncate on private.rate_deck_versions
  for each statement execute function private.refuse_money_change();
create trigger rates_are_kept before update or delete or truncate on private.rates
  for each statement execute function private.refuse_money_change();

create table private.organization_rate_decks (
  organization_id uuid not null references public.organizations (id) on delete cascade,
  valid_from      timestamptz not null,
  deck_key        text references private.rate_decks (key) on delete restrict,
  primary key (organization_id, valid_from)
);
create index idx_organization_rate_decks_deck on private.organization_rate_decks (deck_key);
select private.close_table('private.organization_rate_decks');
comment on table private.organization_rate_decks is
  'Decks that were agreed with one customer: from then on instead of the plan''s. Only where the plan sells calls by deck.';
comment on column private.organization_rate_decks.deck_key is 'Null is the plan''s again.';

create table private.carrier_rate_decks (
  carrier_account_id uuid not null references public.carrier_accounts (id) on delete cascade,
  valid_from         timestamptz not null,
  deck_key           text references private.rate_decks (key) on delete restrict,
  primary key (carrier_account_id, valid_from)
);
create index idx_carrier_rate_decks_deck on private.carrier_rate_decks (deck_key);
select private.close_table('private.carrier_rate_decks');
comment on table private.carrier_rate_decks is
  'What a carrier account''s calls cost by its price list: an estimate that stands until the carrier says what a call did cost.';

-- One meter for what rated calls come to, so that it is counted, corrected, billed late and checked as everything else.
insert into public.meters (key, name, unit, is_reserved, position, aggregation, source)
values ('rated_calls', 'Calls by destination', 'sixtieth of a millionth', true, 25, 'sum', 'rates')
on conflict (key) do nothing;

alter table public.plan_price_meters add column rate_deck text;
alter table public.plan_price_meters add constraint plan_price_meters_rate_deck_fkey foreign key (rate_deck) references private.rate_decks (key) on delete restrict;
alter table public.plan_price_meters add constraint plan_price_meters_deck_prices_calls check (
  case when meter_key = 'rated_calls'
    then rate_deck is not null and included_units = 0 and overage_price_minor = 1 and pricing_model = 'per_unit' and limit_units is null
      and overage_unit in (60000, 600000, 60000000)
    else rate_deck is null
  end
);
create index idx_plan_price_meters_rate_deck on public.plan_price_meters (rate_deck) where rate_deck is not null;
comment on column public.plan_price_meters.rate_deck is
  'Of rated_calls alone: the deck that prices outbound calls, each when it ends. Its line is their sum, so a minor unit is `overage_unit` of the meter.';

create function private.currency_digits(currency text) returns integer
language sql immutable set search_path = ''
as $$
  select scale(private.decimal_amount(0, currency))
$$;
comment on function private.currency_digits(text) is 'How many decimals amounts of a currency have.';

create function private.deck_term(terms jsonb, currency text) returns jsonb
language plpgsql stable set search_path = ''
as $$
begin
  if terms ->> 'rate_deck' is null then
    return jsonb_build_object();
  end if;
  if not exists (
    select
    from private.rate_decks as deck
    where deck.key = terms ->> 'rate_deck' and deck.kind = 'sell' and deck.currency = deck_term.currency
  ) then
    perform private.raise_error(422, 'unknown_rate_deck', 'There is no such deck that sells in this currency', 'rate_deck');
  end if;
  return jsonb_build_object('overage_price_minor', 1, 'overage_unit', 60 * (10 ^ (6 - private.currency_digits(currency)))::bigint);
end
$$;
comment on function private.deck_term(jsonb, text) is 'What a price says of rated_calls besides the deck that it names: nothing for other meters.';

create function private.set_rates(deck text, kind text, currency text, valid_from timestamptz, rates jsonb, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  known  private.rate_decks;
  newest private.rate_deck_versions;
  given  private.rates[];
begin
  insert into private.rate_decks (key, kind, currency, created_at)
  values (set_rates.deck, set_rates.kind, set_rates.currency, at)
  on conflict (key) do nothing;
  -- Whoever loads another version of it at once waits.
  select own.* into known from private.rate_decks as own where own.key = set_rates.deck for no key update;
  if (known.kind, known.currency) <> (set_rates.kind, set_rates.currency) then
    perform private.raise_error(409, 'rate_deck_differs', 'The deck is of another kind or in another currency: it stays so', 'deck');
  end if;
  given := array(
    select row(
      null, told.prefix, told.destination, told.price_micros, coalesce(told.connection_micros, 0), coalesce(told.minimum_micros, 0),
      coalesce(told.initial_pulse, 1), coalesce(told.next_pulse, 1)
    )::private.rates
    from jsonb_to_recordset(rates) as told (
      prefix text, destination text, price_micros bigint, connection_micros bigint, minimum_micros bigint, initial_pulse integer, next_pulse integer
    )
    order by told.prefix
  );
  if cardinality(given) = 0 then
    perform private.raise_error(422, 'rates_missing', 'A deck without prices would call nobody', 'rates');
  end if;
  select own.* into newest
  from private.rate_deck_versions as own
  where own.deck_key = known.key
  order by own.version desc
  limit 1;
  if newest.valid_from = set_rates.valid_from
    and given = array(
      select row(
        null, own.prefix, own.destination, own.price_micros, own.connection_micros, own.minimum_micros, own.initial_pulse, own.next_pulse
      )::private.rates
      from private.rates as own
      where own.version_id = newest.id
      order by own.prefix
    ) then
    return jsonb_build_object('deck', known.key, 'version', newest.version, 'rates', cardinality(given), 'result', 'unchanged');
  end if;
  insert into private.rate_deck_versions (deck_key, version, valid_from, created_at)
  values (known.key, coalesce(newest.version, 0) + 1, set_rates.valid_from, at)
  returning * into newest;
  insert into private.rates
  select
    newest.id, told.prefix, told.destination, told.price_micros, told.connection_micros, told.minimum_micros, told.initial_pulse, told.next_pulse
  from unnest(given) as told;
  return jsonb_build_object('deck', known.key, 'version', newest.version, 'rates', cardinality(given), 'result', 'added');
end
$$;
comment on function private.set_rates(text, text, text, timestamptz, jsonb, timestamptz) is
  'For the operator: what a deck says from a moment on, all of it: [{"prefix","destination","price_micros","connection_micros","minimum_micros",'
  '"initial_pulse","next_pulse"}]. The same again is no version; calls that were rated keep theirs.';

create function private.set_organization_deck(organization_id uuid, deck text, valid_from timestamptz) returns void
language plpgsql security definer set search_path = ''
as $$
begin
  if deck is not null and not exists (
    select
    from private.rate_decks as own
    join public.plan_prices as price on price.currency = own.currency
    where own.key = deck and own.kind = 'sell'
      and price.id = (private.live_subscription(set_organization_deck.organization_id)).plan_price_id
  ) then
    perform private.raise_error(422, 'unknown_rate_deck', 'There is no such deck that sells in the currency of the subscription', 'deck');
  end if;
  insert into private.organization_rate_decks as own (organization_id, valid_from, deck_key)
  values (set_organization_deck.organization_id, set_organization_deck.valid_from, deck)
  on conflict on constraint organization_rate_decks_pkey do update set deck_key = excluded.deck_key;
end
$$;
comment on function private.set_organization_deck(uuid, text, timestamptz) is
  'For the operator: an organization''s calls are priced by this deck from then on, instead of by its plan''s; null is the plan''s again.';

-- What a call comes to ------------------------------------------------------------------------------------------------------------

create function private.deck_version(deck text, at timestamptz) returns uuid
language plpgsql stable set search_path = ''
as $$
begin
  return (
    select own.id
    from private.rate_deck_versions as own
    where own.deck_key = deck and own.valid_from <= at
    order by own.version desc
    limit 1
  );
end
$$;
comment on function private.deck_version(text, timestamptz) is 'The version of a deck that holds at a moment; null before the first one does.';

create function private.find_rate(version_id uuid, phone text) returns private.rates
language plpgsql stable set search_path = ''
as $$
declare
  found_rate private.rates;
begin
  -- Fifteen looks into the key, however many prices the deck has.
  select own.* into found_rate
  from private.rates as own
  where own.version_id = find_rate.version_id
    and own.prefix = any (array(select left(phone, size) from generate_series(2, least(length(phone), 16)) as size))
  order by length(own.prefix) desc
  limit 1;
  return found_rate;
end
$$;
comment on function private.find_rate(uuid, text) is 'The price of a number: that of its longest prefix; null where there is none.';

create function private.rate_seconds(rate private.rates, seconds bigint, out charged_seconds bigint, out amount bigint)
language plpgsql immutable set search_path = ''
as $$
begin
  if rate.price_micros is null or coalesce(seconds, 0) <= 0 then
    charged_seconds := 0;
    amount := 0;
    return;
  end if;
  charged_seconds := rate.initial_pulse
    + private.started_units(greatest(seconds - rate.initial_pulse, 0), rate.next_pulse)::bigint * rate.next_pulse;
  amount := greatest(60 * rate.connection_micros + charged_seconds * rate.price_micros, 60 * rate.minimum_micros);
end
$$;
comment on function private.rate_seconds(private.rates, bigint) is
  'What billed seconds cost at a price, in sixtieths of a millionth of the currency, and for how many seconds: the first pulse, then started next ones.';

create function private.deck_of(organization_id uuid, plan_price_id uuid, at timestamptz, out is_by_deck boolean, out deck_key text, out currency text)
language plpgsql stable security definer set search_path = ''
as $$
#variable_conflict use_column
declare
  term text;
begin
  select own.rate_deck, price.currency
  into term, currency
  from public.plan_price_meters as own
  join public.plan_prices as price on price.id = own.plan_price_id
  where own.plan_price_id = deck_of.plan_price_id and own.meter_key = 'rated_calls';
  is_by_deck := term is not null;
  if is_by_deck then
    deck_key := (
      select own.key
      from private.rate_decks as own
      where own.currency = deck_of.currency and own.key = coalesce((
          select agreed.deck_key
          from private.organization_rate_decks as agreed
          where agreed.organization_id = deck_of.organization_id and agreed.valid_from <= deck_of.at
          order by agreed.valid_from desc
          limit 1
        ), term)
    );
  end if;
end
$$;
comment on function private.deck_of(uuid, uuid, timestamptz) is
  'Whether a price sells calls by deck, and which deck holds for an organization: the one agreed with it, else the price''s; none that is in '
  'another currency.';

create function private.selling_version(organization_id uuid, at timestamptz) returns uuid
language plpgsql stable security definer set search_path = ''
as $$
begin
  return private.deck_version(
    (
      private.deck_of(
        selling_version.organization_id, (private.live_subscription(selling_version.organization_id)).plan_price_id, selling_version.at
      )
    ).deck_key,
    selling_version.at
  );
end
$$;
comment on function private.selling_version(uuid, timestamptz) is
  'By which version of a deck an organization''s calls are sold now; where none holds, no number has a price and nobody is called.';

create table private.call_ratings (
  call_log_id     uuid not null,
  number          integer not null default 0,
  organization_id uuid not null,
  deck_key        text not null references private.rate_decks (key) on delete restrict,
  version_id      uuid references private.rate_deck_versions (id) on delete restrict,
  prefix          text collate "C",
  seconds         bigint not null,
  charged_seconds bigint not null,
  amount          bigint not null,
  currency        text not null,
  rated_at        timestamptz not null,
  constraint call_ratings_pkey primary key (call_log_id, number),
  constraint call_ratings_call_fkey foreign key (organization_id, call_log_id)
    references public.call_logs (organization_id, id) on delete restrict,
  constraint call_ratings_rate_fkey foreign key (version_id, prefix) references private.rates (version_id, prefix) on delete restrict,
  constraint call_ratings_amounts_not_negative check (seconds >= 0 and charged_seconds >= 0 and amount >= 0),
  constraint call_ratings_free_without_rate check (prefix is not null or amount = 0)
);
create index idx_call_ratings_call on private.call_ratings (organization_id, call_log_id);
create index idx_call_ratings_version on private.call_ratings (version_id, prefix);
create index idx_call_ratings_deck on private.call_ratings (deck_key);
select private.close_table('private.call_ratings');
create trigger call_ratings_is_append_only before update or delete or truncate on private.call_ratings
  for each statement execute function private.refuse_money_change();
comment on table private.call_ratings is
  'What each call that was sold by deck came to, and by which version and prefix, append-only: its last row holds. The first is written when '
  'the call ends; the others when the carrier corrects its seconds, at the same price.';
comment on column private.call_ratings.prefix is 'Null where the deck had no price, which the gate lets happen only when the plan changed meanwhile.';
comment on column private.call_ratings.charged_seconds is 'By the pulses of the price.';
comment on column private.call_ratings.amount is 'In sixtieths of a millionth of the currency, exact.';

create function private.rate_call(attempt public.call_logs, billed bigint, at timestamptz) returns bigint
language plpgsql security definer set search_path = ''
as $$
declare
  subscription public.subscriptions;
  counted_on date;
  selling record;
  version uuid;
  rate private.rates;
  rated record;
begin
  if attempt.direction <> 'outbound' or billed <= 0 then
    return null;
  end if;
  subscription := private.live_subscription(attempt.organization_id);
  counted_on := (attempt.ended_at at time zone coalesce(subscription.timezone, 'UTC'))::date;
  -- A period that was billed keeps its price, also for a call that is told of later.
  selling := private.deck_of(
    attempt.organization_id,
    coalesce(
      (
        select log.plan_price_id
        from public.usage_logs as log
        where log.organization_id = attempt.organization_id
          and log.feature_key = 'call_seconds'
          and log.period_start <= counted_on and counted_on < log.period_end
      ),
      subscription.plan_price_id
    ),
    attempt.created_at
  );
  if not selling.is_by_deck or selling.deck_key is null then
    return null;
  end if;
  version := private.deck_version(selling.deck_key, attempt.created_at);
  rate := private.find_rate(version, attempt.callee_number);
  rated := private.rate_seconds(rate, billed);
  insert into private.call_ratings (
    call_log_id, organization_id, deck_key, version_id, prefix, seconds, charged_seconds, amount, currency, rated_at
  )
  values (
    attempt.id, attempt.organization_id, selling.deck_key, version, rate.prefix, billed, rated.charged_seconds, rated.amount,
    selling.currency, at
  );
  insert into private.usage_keys (organization_id, source, key, body_hash, meter_key, occurred_at, quantity)
  values (
    attempt.organization_id, 'call_rate', attempt.id::text, private.usage_hash(rated.amount::text), 'rated_calls', attempt.ended_at, rated.amount
  );
  return rated.amount;
end
$$;
comment on function private.rate_call(public.call_logs, bigint, timestamptz) is
  'Rates a call that has just ended by the deck that held when it was released, and says what it came to; null where calls are not sold by '
  'deck. Inbound calls are not. The caller counts the amount.';

create function private.correct_rating(attempt public.call_logs, billed bigint, correction text, at timestamptz) returns bigint
language plpgsql security definer set search_path = ''
as $$
declare
  last_rating private.call_ratings;
  rate private.rates;
  rated record;
begin
  select own.* into last_rating
  from private.call_ratings as own
  where own.call_log_id = attempt.id
  order by own.number desc
  limit 1
  for no key update;
  if last_rating.call_log_id is null then
    return null;
  end if;
  select own.* into rate from private.rates as own where own.version_id = last_rating.version_id and own.prefix = last_rating.prefix;
  rated := private.rate_seconds(rate, billed);
  insert into private.call_ratings (
    call_log_id, number, organization_id, deck_key, version_id, prefix, seconds, charged_seconds, amount, currency, rated_at
  )
  values (
    attempt.id, last_rating.number + 1, attempt.organization_id, last_rating.deck_key, last_rating.version_id, last_rating.prefix, billed,
    rated.charged_seconds, rated.amount, last_rating.currency, at
  );
  if rated.amount = last_rating.amount then
    return null;
  end if;
  update private.usage_keys as own
  set quantity = rated.amount
  where own.organization_id = attempt.organization_id and own.source = 'call_rate' and own.key = attempt.id::text;
  insert into private.usage_keys (organization_id, source, key, body_hash)
  values (
    attempt.organization_id, 'call_rate', correction,
    private.usage_hash(concat_ws(e'\x1f', attempt.id, last_rating.amount, rated.amount))
  );
  return rated.amount - last_rating.amount;
end
$$;
comment on function private.correct_rating(public.call_logs, bigint, text, timestamptz) is
  'Rates a call anew whose seconds the carrier corrected, at its own price, and says what it came to more or less; null where that is nothing.';

-- What a call costs ---------------------------------------------------------------------------------------------------------------

create table private.exchange_rates (
  from_currency text not null check (from_currency ~ '^[A-Z]{3}$'),
  to_currency   text not null check (to_currency ~ '^[A-Z]{3}$'),
  day           date not null,
  rate          numeric not null check (rate > 0),
  loaded_at     timestamptz not null,
  primary key (from_currency, to_currency, day),
  check (from_currency <> to_currency)
);
select private.close_table('private.exchange_rates');
comment on table private.exchange_rates is
  'What a unit of one currency is in another from a day on, as the operator has loaded it. XEL are ElevenLabs'' credits. Calls keep the rate that they were converted at.';

create function private.exchange_rate(from_currency text, to_currency text, day date, out rate numeric, out rate_day date)
language plpgsql stable set search_path = ''
as $$
begin
  if from_currency = to_currency then
    rate := 1;
    rate_day := day;
    return;
  end if;
  select known.rate, known.day into rate, rate_day
  from private.exchange_rates as known
  where known.from_currency = exchange_rate.from_currency and known.to_currency = exchange_rate.to_currency
    -- An older one says too little; the cost waits for one that is loaded.
    and known.day <= exchange_rate.day and known.day > exchange_rate.day - 31
  order by known.day desc
  limit 1;
end
$$;
comment on function private.exchange_rate(text, text, date) is 'The exchange rate of a day: its own, or the last one within a month before; null without.';

create table private.call_costs (
  call_log_id      uuid not null,
  kind             text not null,
  organization_id  uuid not null,
  day              date not null,
  amount_micros    bigint not null,
  currency         text not null,
  first_micros     bigint not null,
  is_estimated     boolean not null default false,
  into_currency    text not null,
  exchange_rate    numeric,
  rate_day         date,
  converted_micros bigint generated always as (round(amount_micros * exchange_rate)) stored,
  told_at       timestamptz not null,
  constraint call_costs_pkey primary key (call_log_id, kind),
  constraint call_costs_call_fkey foreign key (organization_id, call_log_id)
    references public.call_logs (organization_id, id) on delete restrict,
  constraint call_costs_kind_known check (kind in ('carrier', 'agent')),
  constraint call_costs_amounts_not_negative check (amount_micros >= 0 and first_micros >= 0),
  constraint call_costs_currencies_format check (currency ~ '^[A-Z]{3}$' and into_currency ~ '^[A-Z]{3}$'),
  constraint call_costs_rate_has_day check ((exchange_rate is null) = (rate_day is null))
);
create index idx_call_costs_call on private.call_costs (organization_id, call_log_id);
create index idx_call_costs_waiting on private.call_costs (currency, into_currency, day) where exchange_rate is null;
select private.close_table('private.call_costs');
comment on table private.call_costs is
  'What the carrier and the voice agent ask for a call, in their currency and in the one that its organization pays in.';
comment on column private.call_costs.day is 'The call''s day in UTC, whose exchange rate is taken.';
comment on column private.call_costs.first_micros is 'What it was first; a correction changes amount_micros, at the same exchange rate.';
comment on column private.call_costs.is_estimated is 'By the carrier account''s own deck: the carrier has not said yet.';
comment on column private.call_costs.exchange_rate is 'Null while none of the day is loaded: the cost counts in no margin until then.';
comment on column private.call_costs.converted_micros is 'In millionths of into_currency, rounded half away from zero.';

create function private.put_call_cost(
  attempt public.call_logs, kind text, amount_micros bigint, currency text, is_estimated boolean, at timestamptz
) returns void
language plpgsql security definer set search_path = ''
as $$
declare
  counted_on constant date := (attempt.created_at at time zone 'UTC')::date;
  known private.call_costs;
  money text;
  exchange record;
begin
  select own.* into known
  from private.call_costs as own
  where own.call_log_id = attempt.id and own.kind = put_call_cost.kind
  for no key update;
  if known.call_log_id is null then
    money := coalesce(
      (
        select price.currency
        from public.plan_prices as price
        where price.id = (private.live_subscription(attempt.organization_id)).plan_price_id
      ),
      put_call_cost.currency
    );
    exchange := private.exchange_rate(put_call_cost.currency, money, counted_on);
    insert into private.call_costs as own (
      call_log_id, kind, organization_id, day, amount_micros, currency, first_micros, is_estimated, into_currency, exchange_rate, rate_day,
      told_at
    )
    values (
      attempt.id, put_call_cost.kind, attempt.organization_id, counted_on, put_call_cost.amount_micros, put_call_cost.currency,
      put_call_cost.amount_micros, put_call_cost.is_estimated, money, exchange.rate, exchange.rate_day, at
    );
    return;
  end if;
  if known.currency = put_call_cost.currency then
    update private.call_costs as own
    set amount_micros = put_call_cost.amount_micros, is_estimated = put_call_cost.is_estimated, told_at = at
    where own.call_log_id = attempt.id and own.kind = put_call_cost.kind;
  else
    -- In another currency than before: at the rate of the call's own day.
    exchange := private.exchange_rate(put_call_cost.currency, known.into_currency, known.day);
    update private.call_costs as own
    set
      amount_micros = put_call_cost.amount_micros, currency = put_call_cost.currency, is_estimated = put_call_cost.is_estimated,
      exchange_rate = exchange.rate, rate_day = exchange.rate_day, told_at = at
    where own.call_log_id = attempt.id and own.kind = put_call_cost.kind;
  end if;
end
$$;
comment on function private.put_call_cost(public.call_logs, text, bigint, text, boolean, timestamptz) is
  'Keeps what a call cost at the carrier or the agent: first at the exchange rate of its day, and corrected at that same rate.';

create function private.keep_carrier_cost() returns trigger
language plpgsql security definer set search_path = ''
as $$
declare
  deck private.rate_decks;
  rated record;
begin
  if new.carrier_cost_micros is not null then
    perform private.put_call_cost(new, 'carrier', new.carrier_cost_micros, coalesce(new.carrier_cost_currency, 'USD'), false, private.clock_now());
    return null;
  end if;
  if new.direction = 'outbound' and new.bill_duration_seconds > 0 then
    select known.* into deck
    from private.rate_decks as known
    where known.key = (
      select own.deck_key
      from private.carrier_rate_decks as own
      where own.carrier_account_id = new.carrier_account_id and own.valid_from <= new.created_at
      order by own.valid_from desc
      limit 1
    );
    if deck.key is not null then
      rated := private.rate_seconds(
        private.find_rate(private.deck_version(deck.key, new.created_at), new.callee_number), new.bill_duration_seconds
      );
      perform private.put_call_cost(new, 'carrier', private.divide_half_away(rated.amount, 60), deck.currency, true, private.clock_now());
    end if;
  end if;
  return null;
end
$$;
comment on function private.keep_carrier_cost() is
  'Trigger: what the carrier asks for an ended call, as it says, or as its price list has it until it does.';
create trigger keep_carrier_cost after update of status, carrier_cost_micros, carrier_cost_currency, bill_duration_seconds on public.call_logs
  for each row when (
    new.status = 'ended' and (new.carrier_cost_micros is not null or new.bill_duration_seconds > 0)
    and (old.status, old.carrier_cost_micros, old.carrier_cost_currency, old.bill_duration_seconds)
      is distinct from (new.status, new.carrier_cost_micros, new.carrier_cost_currency, new.bill_duration_seconds)
  ) execute function private.keep_carrier_cost();

create function private.set_exchange_rate(from_currency text, to_currency text, day date, rate numeric, at timestamptz) returns bigint
language plpgsql security definer set search_path = ''
as $$
declare
  converted bigint;
begin
  insert into private.exchange_rates as known (from_currency, to_currency, day, rate, loaded_at)
  values (set_exchange_rate.from_currency, set_exchange_rate.to_currency, set_exchange_rate.day, set_exchange_rate.rate, at)
  on conflict on constraint exchange_rates_pkey do update set rate = excluded.rate, loaded_at = excluded.loaded_at;
  update private.call_costs as own
  set exchange_rate = found_rate.rate, rate_day = found_rate.rate_day, told_at = at
  from (
    select distinct waiting.day, exchange.rate, exchange.rate_day
    from private.call_costs as waiting
    cross join lateral private.exchange_rate(
      set_exchange_rate.from_currency, set_exchange_rate.to_currency, waiting.day
    ) as exchange
    where waiting.exchange_rate is null and waiting.currency = set_exchange_rate.from_currency
      and waiting.into_currency = set_exchange_rate.to_currency and exchange.rate is not null
  ) as found_rate
  where own.exchange_rate is null and own.currency = set_exchange_rate.from_currency
    and own.into_currency = set_exchange_rate.to_currency and own.day = found_rate.day;
  get diagnostics converted = row_count;
  return converted;
end
$$;
comment on function private.set_exchange_rate(text, text, date, numeric, timestamptz) is
  'For the operator: what a unit of one currency is in another from a day on. Converts the costs that waited for it, and says how many; those '
  'that have a rate keep theirs.';

-- What is left --------------------------------------------------------------------------------------------------------------------

create view private.call_margins with (security_invoker = true) as
select
  log.organization_id, log.campaign_id, log.id as call_log_id, log.ended_at, log.bill_duration_seconds as seconds,
  coalesce(priced.destination, place.country, 'unknown') as destination,
  coalesce(rating.currency, charge.currency, carrier.into_currency, agent.into_currency) as currency,
  coalesce(rating.amount, 0) / 60.0
    + coalesce(charge.charged_minor, 0) * power(10::numeric, 6 - private.currency_digits(charge.currency)) as revenue_micros,
  carrier.converted_micros as carrier_micros,
  agent.converted_micros as agent_micros,
  coalesce(carrier.is_estimated, false) as is_estimated,
  rating.call_log_id is not null and priced.price_micros is null as is_unrated,
  carrier.call_log_id is null as lacks_cost,
  carrier.call_log_id is not null and carrier.exchange_rate is null
    or agent.call_log_id is not null and agent.exchange_rate is null as lacks_exchange
from public.call_logs as log
left join lateral (
  select own.*
  from private.call_ratings as own
  where own.call_log_id = log.id
  order by own.number desc
  limit 1
) as rating on true
left join private.rates as priced on priced.version_id = rating.version_id and priced.prefix = rating.prefix
left join lateral (
  select own.currency, own.charged_minor + coalesce((
      select sum(later.charged_minor)
      from private.call_corrections as later
      where later.organization_id = own.organization_id and later.call_log_id = own.call_log_id
    ), 0) as charged_minor
  from public.call_charges as own
  where own.call_log_id = log.id
) as charge on true
left join private.call_costs as carrier on carrier.call_log_id = log.id and carrier.kind = 'carrier'
left join private.call_costs as agent on agent.call_log_id = log.id and agent.kind = 'agent'
left join lateral private.destination(
  case log.direction when 'inbound' then log.caller_number else log.callee_number end, null
) as place on priced.prefix is null
where log.status = 'ended' and log.bill_duration_seconds > 0;
revoke all on private.call_margins from public, anon, authenticated, service_role;
comment on view private.call_margins is
  'Of each call that was billed: what it brought by deck and by prepaid credit, and what carrier and agent asked, in the organization''s currency. '
  'For the operator alone. What a plan''s base price and overage bring is no single call''s.';

create function private.margin(by text, from_time timestamptz, to_time timestamptz)
returns table (
  key text, name text, currency text, calls bigint, seconds bigint, revenue numeric, carrier_cost numeric, agent_cost numeric, margin numeric,
  margin_percent numeric, invoiced numeric, without_rate bigint, without_cost bigint, without_exchange bigint, estimated bigint
)
language plpgsql stable security definer set search_path = ''
as $$
#variable_conflict use_column
begin
  if by not in ('organization', 'campaign', 'destination') then
    perform private.raise_error(422, 'invalid_grouping', 'A margin is by organization, campaign or destination', 'by');
  end if;
  return query
  with grouped as (
    select
      case margin.by when 'organization' then call.organization_id::text when 'campaign' then coalesce(call.campaign_id::text, '') else call.destination end as key,
      call.currency, count(*) as calls, sum(call.seconds)::bigint as seconds, sum(call.revenue_micros) as revenue,
      coalesce(sum(call.carrier_micros), 0) as carrier, coalesce(sum(call.agent_micros), 0) as agent,
      count(*) filter (where call.is_unrated) as without_rate, count(*) filter (where call.lacks_cost) as without_cost,
      count(*) filter (where call.lacks_exchange) as without_exchange, count(*) filter (where call.is_estimated) as estimated
    from private.call_margins as call
    where call.ended_at >= from_time and call.ended_at < to_time
    group by 1, call.currency
  )
  select
    grouped.key,
    case margin.by
      when 'organization' then (select tenant.name from public.organizations as tenant where tenant.id = grouped.key::uuid)
      when 'campaign' then (select campaign.name from public.campaigns as campaign where campaign.id = nullif(grouped.key, '')::uuid)
      else grouped.key
    end,
    grouped.currency, grouped.calls, grouped.seconds, round(grouped.revenue / 1000000, 6), round(grouped.carrier / 1000000, 6),
    round(grouped.agent / 1000000, 6), round((grouped.revenue - grouped.carrier - grouped.agent) / 1000000, 6),
    round(100 * (grouped.revenue - grouped.carrier - grouped.agent) / nullif(grouped.revenue, 0), 2),
    case margin.by when 'organization' then (
      select sum(private.decimal_amount(bill.subtotal_minor, bill.currency))
      from public.invoices as bill
      where bill.organization_id = grouped.key::uuid and bill.currency = grouped.currency and bill.status not in ('draft', 'void')
        and bill.finalized_at >= from_time and bill.finalized_at < to_time
    ) end,
    grouped.without_rate, grouped.without_cost, grouped.without_exchange, grouped.estimated
  from grouped
  order by grouped.revenue - grouped.carrier - grouped.agent, grouped.key, grouped.currency;
end
$$;
comment on function private.margin(text, timestamptz, timestamptz) is
  'For the operator: what calls that ended in a stretch of time brought and cost, by organization, campaign or destination and by currency, the '
  'worst first; what is missing is counted. Invoiced is what the organization''s invoices of that time say before tax, base prices and all.';

revoke all on function
  private.currency_digits(text), private.deck_term(jsonb, text), private.set_rates(text, text, text, timestamptz, jsonb, timestamptz),
  private.set_organization_deck(uuid, text, timestamptz), private.deck_version(text, timestamptz), private.find_rate(uuid, text),
  private.rate_seconds(private.rates, bigint), private.deck_of(uuid, uuid, timestamptz), private.selling_version(uuid, timestamptz),
  private.rate_call(public.call_logs, bigint, timestamptz), private.correct_rating(public.call_logs, bigint, text, timestamptz),
  private.exchange_rate(text, text, date), private.put_call_cost(public.call_logs, text, bigint, text, boolean, timestamptz),
  private.keep_carrier_cost(), private.set_exchange_rate(text, text, date, numeric, timestamptz),
  private.margin(text, timestamptz, timestamptz)
from public, anon, authenticated, service_role;
