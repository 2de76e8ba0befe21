-- Calls are priced by where they go: decks by prefix, rated when they end; what a call costs with its exchange rate; and what is left.
set local lock_timeout = '5s';
set local statement_timeout = '60s';

-- A wider one takes its place in this transaction.
-- squawk-ignore ban-drop-constraint
alter table public.meters drop constraint meters_source_known;
-- The table is new or small: it is read in no time.
-- squawk-ignore constraint-missing-not-valid
alter table public.meters add constraint meters_source_known check (source in ('events', 'calls', 'rows', 'rates'));
comment on column public.meters.source is
  'Who counts: events of an organization''s own systems, the database for each call that ends, what such a call comes to by rate deck, or the '
  'rows that are there now.';

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
-- The column is new: nothing refers yet.
-- squawk-ignore adding-foreign-key-constraint, constraint-missing-not-valid
alter table public.plan_price_meters add constraint plan_price_meters_rate_deck_fkey foreign key (rate_deck) references private.rate_decks (key) on delete restrict;
-- The table is new or small: it is read in no time.
-- squawk-ignore constraint-missing-not-valid
alter table public.plan_price_meters add constraint plan_price_meters_deck_prices_calls check (
  case when meter_key = 'rated_calls'
    then rate_deck is not null and included_units = 0 and overage_price_minor = 1 and pricing_model = 'per_unit' and limit_units is null
      and overage_unit in (60000, 600000, 60000000)
    else rate_deck is null
  end
);
-- Before the first release no installation is in use: the table is small.
-- squawk-ignore require-concurrent-index-creation
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

-- What follows from it elsewhere ---------------------------------------------------------------------------------------------------

create or replace function private.judge_candidates(at timestamptz, budget integer, passed uuid[], sole uuid default null) returns private.candidate[]
language plpgsql volatile security definer set search_path = '' set jit = off set plan_cache_mode = force_generic_plan set enable_seqscan = off as $$
declare
  judged private.candidate[];
begin
  with calls as materialized (
    select log.organization_id, log.campaign_id, count(*) as number
    from public.call_logs as log
    where log.status <> 'ended'
    group by log.organization_id, log.campaign_id
  ),
  waiting as materialized (
    -- A campaign that may not dial now, or is full, is left alone: its rows cost nothing and hold up nobody.
    select
      campaign.id, organization.caller_id, organization.dial_countries, organization.max_price_micros,
      organization.dispatch_weight::numeric / count(*) over (partition by campaign.organization_id) as weight,
      row_number() over (partition by campaign.organization_id order by random()) as place,
      coalesce((
        select min(own.turn - pace.turn)
        from private.dispatch_turns as own
        join private.carrier_pace as pace on pace.carrier_account_id = own.carrier_account_id
        where own.organization_id = campaign.organization_id
      ), '-infinity'::numeric) as turn
    from public.campaigns as campaign
    join public.organizations as organization on organization.id = campaign.organization_id
    where campaign.status = 'running'
      and (sole is null or campaign.id = sole)
      and campaign.dialling_enabled
      and not private.is_broken(campaign.id, at)
      and private.dispatch_obstacle(campaign.organization_id, at) is null
      and (campaign.credit_cap is null or private.campaign_credit_left(campaign) > 0)
      and campaign.max_concurrent_calls
        > coalesce((select sum(calls.number) from calls where calls.campaign_id = campaign.id), 0)
      and organization.max_concurrent_calls
        > coalesce((select sum(calls.number) from calls where calls.organization_id = organization.id), 0)
      and exists (
        select
        from public.call_queue as queue
        where queue.campaign_id = campaign.id and queue.status = 'queued' and queue.next_retry_at <= at
      )
    order by place, turn, random()
    limit budget
  ),
  ready as materialized (
    -- Of the budget as large a part as of the calls: no organization is short of rows when the calls are given out.
    select
      campaign.*, waiting.caller_id, waiting.dial_countries, waiting.max_price_micros,
      greatest(ceil(budget * waiting.weight / sum(waiting.weight) over ()), 5)::integer as most, selling.is_by_deck,
      case when selling.is_by_deck then private.selling_version(campaign.organization_id, at) end as version_id
    from waiting
    join public.campaigns as campaign on campaign.id = waiting.id
    cross join lateral (
      select exists (
        select
        from public.subscriptions as subscription
        join public.plan_price_meters as term on term.plan_price_id = subscription.plan_price_id and term.meter_key = 'rated_calls'
        where subscription.organization_id = campaign.organization_id and subscription.status not in ('cancelled', 'inactive')
      ) as is_by_deck
    ) as selling
  ),
  picked as materialized (
    select queue.id
    from ready
    cross join lateral (
      -- Promised calls, then retries in half of the places, then those who were never called.
      select due.id
      from (values (2, ready.most), (1, (ready.most + 1) / 2), (0, ready.most)) as kind (dial_class, most)
      cross join lateral (
        -- Priority by priority, each by an index from its oldest due row on: however many others wait.
        with recursive level (priority) as (
          select max(top.priority)::integer
          from public.call_queue as top
          where top.campaign_id = ready.id and top.status = 'queued' and top.dial_class = kind.dial_class
          union all
          select (
            select max(lower.priority)
            from public.call_queue as lower
            where lower.campaign_id = ready.id and lower.status = 'queued' and lower.dial_class = kind.dial_class
              and lower.priority < level.priority
          )::integer
          from level
          where level.priority is not null
        )
        select oldest.id
        from level
        cross join lateral (
          select queued.id
          from public.call_queue as queued
          where queued.campaign_id = ready.id
            and queued.status = 'queued'
            and queued.dial_class = kind.dial_class
            and queued.priority = level.priority
            and queued.next_retry_at <= at
            and queued.id <> all (passed)
          order by queued.next_retry_at
          limit kind.most
        ) as oldest
        where level.priority is not null
        limit kind.most
      ) as due
      limit ready.most
    ) as queue
  ),
  locked as materialized (
    select
      queue.id, queue.organization_id, queue.campaign_id, queue.lead_id, queue.dial_class, queue.priority, queue.next_retry_at,
      queue.dispatch_count, queue.wait_reason,
      lead.project_id, lead.phone, lead.timezone, lead.recording_consent, lead.do_not_call, lead.abuse_flag, lead.archived_at
    from public.call_queue as queue
    join public.leads as lead on lead.organization_id = queue.organization_id and lead.id = queue.lead_id
    where queue.id = any (array(select picked.id from picked)) and queue.status = 'queued' and queue.next_retry_at <= at
    for no key update of queue skip locked
    for key share of lead skip locked
  ),
  numbers as materialized (
    -- What an organization may call from, without those that have rung often enough in 24 hours.
    select number.organization_id, number.phone_number, number.carrier_account_id, number.registration_id
    from public.caller_numbers as number
    join public.carrier_accounts as account on account.id = number.carrier_account_id
    where number.organization_id in (select locked.organization_id from locked)
      and number.is_active and account.is_active and account.dialling_enabled and not private.is_broken(account.id, at)
      and (number.daily_calls is null or private.caller_number_room(number.phone_number, number.daily_calls, at) > 0)
  ),
  zoned as materialized (
    select
      locked.*, private.callee_zones(locked.timezone, callee.zones, ready.timezone) as zones, callee.country, callee.region, callee.is_callable,
      ready.purpose,
      case when ready.max_price_micros is not null then coalesce(private.destination_price(locked.phone) > ready.max_price_micros, true) else false end
        as is_dear,
      case when ready.is_by_deck then (private.find_rate(ready.version_id, locked.phone)).price_micros is null else false end as is_unpriced
    from locked
    join ready on ready.id = locked.campaign_id
    cross join lateral private.destination(locked.phone, ready.dial_countries) as callee
  ),
  stretches as materialized (
    select place.campaign_id, place.zones, place.country, place.region, stretch.opens_at, stretch.closes_at
    from (
      select distinct zoned.campaign_id, zoned.zones, zoned.country, zoned.region from zoned where zoned.zones is not null and zoned.is_callable
    ) as place
    join public.campaigns as campaign on campaign.id = place.campaign_id
    cross join lateral private.callee_window(at, place.zones, campaign, place.country, place.region) as stretch
  ),
  seen as materialized (
    select
      zoned.*, stretches.opens_at, stretches.closes_at, private.recent_dials(zoned.phone, at) as dials,
      capped.verdict as cap, capped.due as cap_due,
      private.lacks_consent(zoned.organization_id, zoned.phone, zoned.country, zoned.purpose, at) as lacks_consent,
      (private.check_dnc(zoned.phone, at)).verdict as register,
      exists (
        select
        from public.suppressions as suppression
        where suppression.organization_id = zoned.organization_id and suppression.phone_number = zoned.phone
      )
      or exists (
        select
        from private.erased_numbers as erased
        where erased.organization_id = zoned.organization_id and erased.phone_hash = private.hash_number(zoned.phone)
      ) as suppressed,
      exists (
        select
        from public.call_logs as live
        where live.callee_number = zoned.phone and live.direction = 'outbound' and live.status <> 'ended'
      ) as in_call
    from zoned
    cross join lateral private.dial_cap(zoned.organization_id, zoned.phone, at) as capped
    left join stretches
      on stretches.campaign_id = zoned.campaign_id and stretches.zones = zoned.zones
      and stretches.country = zoned.country and stretches.region is not distinct from zoned.region
  ),
  gated as (
    select
      seen.*,
      case
        when seen.do_not_call or seen.suppressed then 'opted_out'
        when seen.abuse_flag then 'abuse'
        when seen.archived_at is not null then 'archived'
        when seen.phone is null then 'no_phone'
        when not seen.is_callable then 'destination_blocked'
        when seen.is_dear then 'price_ceiling'
        when seen.is_unpriced then 'no_rate'
        when seen.register is not null then seen.register
        when seen.lacks_consent then 'no_consent'
        when seen.zones is null then 'bad_timezone'
        when seen.opens_at is null then 'campaign_over'
        when seen.opens_at > at then 'outside_window'
        when seen.in_call then 'number_in_call'
        when seen.cap is not null then seen.cap
        when seen.dials[2] + interval '24 hours' > at then 'daily_cap'
        when seen.dials[1] + interval '60 minutes' > at then 'min_gap'
      end as verdict
    from seen
  ),
  single as (
    select
      gated.*,
      case
        -- The same number twice in one batch: the second waits for the first.
        when gated.verdict is null and row_number() over (
          partition by gated.verdict, gated.phone order by gated.dial_class desc, gated.priority desc, gated.next_retry_at, gated.id
        ) > 1 then 'number_in_call'
        else gated.verdict
      end as final_verdict
    from gated
  )
  select array_agg(
    row(
      numbered.id, numbered.organization_id, numbered.campaign_id, numbered.lead_id, numbered.project_id, numbered.phone,
      numbered.caller_number, numbered.carrier_account_id, numbered.dispatch_count + 1, numbered.agent_id,
      numbered.record_call, numbered.ring_timeout_seconds, numbered.max_call_seconds,
      numbered.closes_at, numbered.final_verdict,
      case numbered.final_verdict
        -- A day to put it right. Once the campaign is over, or nobody else is left in it, that was the end.
        when 'bad_timezone' then case when not numbered.is_last then at + interval '1 day' end
        when 'register_stale' then private.whole_minute(at + interval '1 hour')
        when 'campaign_over' then case when not numbered.is_past then at + interval '1 day' end
        when 'monthly_cap' then private.whole_minute(numbered.cap_due)
        when 'outside_window' then numbered.opens_at
        when 'number_in_call' then private.whole_minute(at + interval '15 minutes')
        when 'caller_number_cap' then private.whole_minute(at + interval '15 minutes')
        when 'no_caller_series' then private.whole_minute(at + interval '1 hour')
        when 'daily_cap' then private.whole_minute(greatest(numbered.dials[2] + interval '24 hours', numbered.dials[1] + interval '60 minutes'))
        when 'min_gap' then private.whole_minute(numbered.dials[1] + interval '60 minutes')
      end,
      numbered.dial_class
    )::private.candidate
    order by numbered.dial_class desc, numbered.priority desc, numbered.next_retry_at, numbered.id
  )
  into judged
  from (
    select
      single.id, single.organization_id, single.campaign_id, single.lead_id, coalesce(single.project_id, ready.project_id) as project_id,
      single.phone, number.phone_number as caller_number, number.carrier_account_id, single.dispatch_count, ready.agent_id,
      ready.record_calls and single.recording_consent as record_call, ready.ring_timeout_seconds, ready.max_call_seconds,
      single.opens_at, single.closes_at, single.dials, single.cap_due, single.dial_class, single.priority, single.next_retry_at,
      -- A day later it is past everywhere.
      coalesce((at at time zone 'UTC')::date > ready.end_date + 1, false) as is_past,
      case when single.final_verdict = 'bad_timezone' then
        coalesce((at at time zone 'UTC')::date > ready.end_date + 1, false)
        or single.wait_reason = 'bad_timezone' and not exists (
          select
          from public.call_queue as other
          where other.campaign_id = single.campaign_id and other.status in ('queued', 'processing')
            and other.wait_reason is distinct from 'bad_timezone'
        )
      end as is_last,
      case
        when single.final_verdict is null and number.phone_number is null then case
          when exists (
            select
            from public.caller_numbers as own
            join public.carrier_accounts as account on account.id = own.carrier_account_id
            where own.organization_id = single.organization_id and own.is_active and account.is_active and account.dialling_enabled
              and private.may_call_from(own.phone_number, own.registration_id, single.country, single.purpose)
          )
          then 'caller_number_cap'
          else 'no_caller_series'
        end
        else single.final_verdict
      end as final_verdict
    from single
    join ready on ready.id = single.campaign_id
    left join lateral (
      select log.caller_number
      from public.call_logs as log
      where log.callee_number = single.phone and log.organization_id = single.organization_id and log.dialled and log.direction = 'outbound'
      order by log.submitted_at desc
      limit 1
    ) as last on single.final_verdict is null
    left join lateral (
      -- The number that it last called them from, else the same one for the same callee every time; the organization's general one last.
      select number.phone_number, number.carrier_account_id
      from numbers as number
      where number.organization_id = single.organization_id
        and private.may_call_from(number.phone_number, number.registration_id, single.country, single.purpose)
      order by
        (number.phone_number = last.caller_number) desc nulls last, (number.phone_number = ready.caller_id) nulls first,
        hashtextextended(number.phone_number || single.phone, 0)
      limit 1
    ) as number on single.final_verdict is null
  ) as numbered;
  return coalesce(judged, array[]::private.candidate[]);
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
  rated bigint;
begin
  if attempt.ended_at is null then
    return;
  end if;
  select case meter.rounding when 'event' then private.whole_pulses(billed, meter.pulse) else billed end
  into strict billed
  from public.meters as meter
  where meter.key = 'call_seconds';

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
    rated := private.rate_call(attempt, billed, at);
    perform private.count_usage(
      attempt.organization_id,
      array['call', 'call'] || case when rated is not null then array['call_rate'] end,
      array[attempt.id::text, attempt.id::text] || case when rated is not null then array[attempt.id::text] end,
      array['ai_calls', 'call_seconds'] || case when rated is not null then array['rated_calls'] end,
      array[1, billed] || case when rated is not null then array[rated] end,
      array[attempt.ended_at, attempt.ended_at] || case when rated is not null then array[attempt.ended_at] end,
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

create or replace function private.correct_call(attempt public.call_logs, billed bigint, at timestamptz) returns void
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
  rated bigint;
  events integer;
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
  counted_on := private.day_of_key(known);
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
  rated := private.correct_rating(attempt, billed, correction, at);
  events := 1 + abs(calls) + (rated is not null)::integer;
  perform private.count_usage(
    attempt.organization_id, array_fill('call'::text, array[1 + abs(calls)]) || case when rated is not null then array['call_rate'] end,
    array_fill(correction, array[events]),
    array['call_seconds'] || case when calls <> 0 then array['ai_calls'] else '{}' end || case when rated is not null then array['rated_calls'] end,
    array[delta] || case when calls <> 0 then array[calls::bigint] else '{}' end || case when rated is not null then array[rated] end,
    array_fill(known.occurred_at, array[events]), at, array_fill(attempt.id::text, array[events]), array_fill(counted_on, array[events])
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

create or replace function private.record_usage(request jsonb, at timestamptz) returns jsonb
language plpgsql security definer set search_path = ''
as $$
declare
  owner constant uuid := private.usage_reporter(request);
  given jsonb := request -> 'events';
  ids text[];
  sources text[];
  meters text[];
  quantities bigint[];
  counts bigint[];
  occurred timestamptz[];
  hashes bytea[];
  value_hashes bytea[];
  statuses text[];
  codes text[];
  stored integer[];
  corrected text[];
  days date[];
  horizon timestamptz := at + interval '5 minutes';
  is_careful boolean;
  is_fresh boolean;
  place integer;
  original private.usage_keys;
  meter public.meters;
  said_in_all bigint;
  has_corrections boolean;
begin
  if given is null or jsonb_typeof(given) <> 'array' or jsonb_array_length(given) = 0 then
    perform private.raise_error(400, 'invalid_request', 'events must be an array of at least one event', 'events');
  end if;
  if jsonb_array_length(given) > 1000 then
    perform private.raise_error(413, 'too_many_events', 'At most 1000 events are taken at once', 'events');
  end if;

  -- What is wrong with an event concerns that event alone. A count and a value that is counted need no quantity: it is one. Each step is
  -- fenced off (offset 0), so that what it reads is read once and not wherever a later one names it. All times are matched and read at
  -- once, and one by one only where one of them is none, or names a day that the calendar does not have.
  for is_careful in select unnest(array[false, true]) loop
    begin
      with item as materialized (
        select given_item.*
        from rows from (
          jsonb_to_recordset(given) as (
            id text, source text, type text, "time" text, quantity jsonb, value jsonb, corrects jsonb, specversion text
          )
        ) with ordinality as given_item (id, source, type, said_time, quantity, value, corrects, specversion, position)
      ),
      event as (
        select
          item.position, coalesce(item.specversion, '1.0') as specversion, item.id, item.source, item.type,
          case when jsonb_typeof(item.quantity) = 'number' then item.quantity::text end as number,
          item.quantity is null as is_unsaid,
          case when jsonb_typeof(item.value) = 'string' then item.value #>> '{}' end as value,
          item.corrects is not null as is_correction, item.corrects as correction, item.corrects #>> '{}' as corrects,
          item.said_time is not null as is_timed,
          case
            when is_careful then private.parse_instant(item.said_time)
            when item.said_time is not null and (
              select string_agg(each.said_time, '|') ~ '^(?:\d{4}-\d{2}-\d{2}[Tt ]\d{2}:\d{2}:\d{2}(?:\.\d{1,9})?(?:[Zz]|[+-]\d{2}:\d{2})(?:\||$))*$'
              from item as each
            )
            then item.said_time::timestamptz
            else private.parse_instant(item.said_time)
          end as instant,
          known.key is not null and known.is_active as is_known, known.is_reserved, known.aggregation, known.rounding, known.pulse
        from item
        left join public.meters as known on known.key = item.type
        offset 0
      ),
      said as (
        select
          event.*,
          case
            when event.is_unsaid and not event.is_correction and event.aggregation in ('count', 'unique') then 1
            -- Digits alone, or after the sign: a number of JSON has it nowhere else.
            when translate(event.number, '0123456789', '') in ('', '-') and length(ltrim(event.number, '-')) <= 15 then event.number::bigint
          end as quantity
        from event
        offset 0
      ),
      judged as (
        select
          said.*,
          case
            when said.specversion <> '1.0' then 'invalid_specversion'
            when coalesce(said.id, '') = '' or length(said.id) > 255 then 'invalid_id'
            when coalesce(said.source, '') = '' or length(said.source) > 255 then 'invalid_source'
            when said.source in ('call', 'call_rate') then 'reserved_source'
            when not said.is_known then 'unknown_type'
            when said.is_reserved then 'reserved_type'
            when said.quantity is null
              or said.quantity = 0 and (said.is_correction or said.aggregation not in ('max', 'latest'))
              or said.quantity < 0 and not said.is_correction
              or said.aggregation in ('count', 'unique') and abs(said.quantity) <> 1
              then 'invalid_quantity'
            when said.aggregation = 'unique' and not said.is_correction and (coalesce(said.value, '') = '' or length(said.value) > 255)
              then 'invalid_value'
            when said.is_correction and (jsonb_typeof(said.correction) <> 'string' or said.corrects in ('', said.id)) then 'invalid_corrects'
            when said.is_timed and (said.instant is null or said.instant < '2000-01-01') then 'invalid_time'
            when said.instant > horizon then 'time_in_future'
          end as code,
          case when said.aggregation = 'unique' and not said.is_correction then said.value end as told_apart
        from said
        offset 0
      ),
      -- Sorted once: an aggregate that is told to sort does it for itself.
      ordered as (
        select
          judged.id, judged.source, judged.type, judged.quantity, judged.corrects, judged.code,
          coalesce(judged.instant, at) as occurred_at, judged.told_apart,
          case
            when judged.rounding = 'event' and judged.pulse > 1 and not judged.is_correction
            then private.whole_pulses(judged.quantity, judged.pulse)
            else judged.quantity
          end as counted,
          substring(sha256(convert_to(
            concat_ws(
              e'\x1f', judged.type, judged.quantity, coalesce(extract(epoch from judged.instant)::text, 'now'), judged.corrects,
              judged.told_apart
            ), 'UTF8'
          )) for 16) as body_hash
        from judged
        order by judged.position
      )
      select
        array_agg(coalesce(ordered.id, '')), array_agg(coalesce(ordered.source, '')), array_agg(ordered.type), array_agg(ordered.quantity),
        array_agg(ordered.counted), array_agg(ordered.occurred_at), array_agg(ordered.body_hash),
        array_agg(case when ordered.told_apart is not null then substring(sha256(convert_to(ordered.told_apart, 'UTF8')) for 16) end),
        array_agg(ordered.corrects), array_fill(null::date, array[count(*)::integer]), array_agg(ordered.code),
        array_agg(case when ordered.code is not null then 'rejected' end), bool_or(ordered.corrects is not null and ordered.code is null),
        bool_and(ordered.code is null)
      into ids, sources, meters, quantities, counts, occurred, hashes, value_hashes, corrected, days, codes, statuses, has_corrections, is_fresh
      from ordered;
      exit;
    exception
      when datetime_field_overflow or invalid_datetime_format or invalid_time_zone_displacement_value or invalid_parameter_value then
        if is_careful then
          raise;
        end if;
        -- What is no object at all is an event that says nothing.
        select jsonb_agg(case when jsonb_typeof(item.value) = 'object' then item.value else '{}' end order by item.position)
        into given
        from jsonb_array_elements(given) with ordinality as item (value, position);
    end;
  end loop;

  -- Where the ids of a source lie together beyond all that it has, as those do that grow with time, they are put in as they are. Who
  -- was quicker with one of them, and an id that comes twice in the batch, lead to the other way.
  if is_fresh and not exists (
    select
    from (
      select event.source, min(event.id collate "C") as lowest, max(event.id collate "C") as highest
      from unnest(sources, ids) as event (source, id)
      group by event.source
    ) as own
    where private.knows_keys(owner, own.source, own.lowest, own.highest)
  ) then
    begin
      insert into private.usage_keys (organization_id, source, key, body_hash, meter_key, occurred_at, quantity, reported)
      select
        owner, event.source, event.id, event.hash, case when event.corrects is null then event.meter end,
        case when event.corrects is null then event.occurred_at end, case when event.corrects is null then event.counted end,
        case when event.corrects is null then nullif(event.quantity, event.counted) end
      from unnest(sources, ids, hashes, meters, occurred, counts, quantities, corrected)
        as event (source, id, hash, meter, occurred_at, counted, quantity, corrects)
      order by event.source collate "C", event.id collate "C";
      stored := array(select generate_series(1, cardinality(ids)));
    exception
      when unique_violation then
        null;
    end;
  end if;

  if stored is null then
    -- The first event of a batch under a key is the one that counts; the others are compared with it like any repetition.
    with first as materialized (
      select distinct on (event.source, event.id) event.*
      from (
        select
          given.source collate "C" as source, given.id collate "C" as id, given.hash, given.meter, given.occurred_at, given.counted,
          given.quantity, given.corrects, given.position
        from unnest(sources, ids, hashes, meters, occurred, counts, quantities, corrected, codes) with ordinality
          as given (source, id, hash, meter, occurred_at, counted, quantity, corrects, code, position)
        where given.code is null
      ) as event
      order by event.source, event.id, event.position
    ),
    fresh as (
      insert into private.usage_keys as known (organization_id, source, key, body_hash, meter_key, occurred_at, quantity, reported)
      select
        owner, first.source, first.id, first.hash, case when first.corrects is null then first.meter end,
        case when first.corrects is null then first.occurred_at end, case when first.corrects is null then first.counted end,
        case when first.corrects is null then nullif(first.quantity, first.counted) end
      from first
      order by first.source, first.id
      on conflict on constraint usage_keys_pkey do nothing
      returning known.source, known.key
    ),
    placed as (
      -- Looked up in a hash, which no wrong guess of their number turns into a comparison of each with each.
      select first.position::integer as position
      from first
      where case when (first.source, first.id) in (select fresh.source, fresh.key from fresh) then true end
      order by first.position
    )
    select array_agg(placed.position)
    into stored
    from placed;
  end if;

  -- A correction changes what is counted under the key that it names, on that event's day, and never to less than nothing.
  if has_corrections then
    for place in
      select item.position
      from unnest(stored) as item (position)
      where corrected[item.position] is not null
      order by sources[item.position] collate "C", corrected[item.position] collate "C", item.position
    loop
      select known.*
      into original
      from private.usage_keys as known
      where known.organization_id = owner and known.source = sources[place] and known.key = corrected[place]
      for no key update;
      select known.* into meter from public.meters as known where known.key = meters[place];
      said_in_all := coalesce(original.reported, original.quantity) + quantities[place];
      codes[place] := case
        when original.quantity is null or original.meter_key <> meters[place] then 'unknown_corrected'
        when said_in_all < 0 or said_in_all > 1 and meter.aggregation in ('count', 'unique') then 'correction_too_large'
      end;
      if codes[place] is null then
        counts[place] := case meter.rounding when 'event' then private.whole_pulses(said_in_all, meter.pulse) else said_in_all end - original.quantity;
        update private.usage_keys as known
        set quantity = original.quantity + counts[place], reported = nullif(said_in_all, original.quantity + counts[place])
        where known.organization_id = owner and known.source = sources[place] and known.key = corrected[place];
        occurred[place] := original.occurred_at;
        days[place] := private.day_of_key(original);
      else
        -- Nobody has seen its key yet: it is free for the same correction, once there is something to correct.
        delete from private.usage_keys as known
        where known.organization_id = owner and known.source = sources[place] and known.key = ids[place];
        statuses[place] := 'rejected';
        stored := array_remove(stored, place);
      end if;
    end loop;
  end if;

  if cardinality(stored) = cardinality(ids) then
    perform private.settle_usage_holds(owner, sources, ids, meters, at);
    perform private.count_usage(
      owner, sources, ids, meters, counts, occurred, at, case when has_corrections then corrected end,
      case when has_corrections then days end, value_hashes
    );
    return jsonb_build_object('results', (
      select jsonb_agg(jsonb_build_object('id', result.id, 'status', 'stored')) from unnest(ids) as result (id)
    ));
  end if;

  with event as (
    select given.*, own.position is not null as is_stored
    from unnest(sources, ids, hashes, statuses) with ordinality as given (source, id, hash, status, position)
    left join unnest(stored) as own (position) on own.position = given.position
  ),
  ordered as (
    select
      case
        when event.status is not null then event.status
        when event.is_stored then 'stored'
        when known.body_hash = event.hash then 'duplicate'
        when known.key is null then 'rejected'
        else 'conflict'
      end as status
    from event
    left join private.usage_keys as known
      on event.status is null and not event.is_stored
      and known.organization_id = owner and known.source = event.source and known.key = event.id
    order by event.position
  )
  select array_agg(ordered.status)
  into statuses
  from ordered;

  if cardinality(stored) > 0 then
    -- Taken out of the arrays in one pass: a text in the middle of one is found by counting up to it.
    perform private.settle_usage_holds(owner, array_agg(event.source), array_agg(event.id), array_agg(event.meter), at)
    from unnest(sources, ids, meters, statuses) as event (source, id, meter, status)
    where event.status = 'stored';
    perform private.count_usage(
      owner, array_agg(ordered.source), array_agg(ordered.id), array_agg(ordered.meter), array_agg(ordered.quantity),
      array_agg(ordered.occurred_at), at, array_agg(ordered.corrects), array_agg(ordered.day), array_agg(ordered.value_hash)
    )
    from (
      select event.*
      from unnest(sources, ids, meters, counts, occurred, corrected, days, value_hashes, statuses) with ordinality
        as event (source, id, meter, quantity, occurred_at, corrects, day, value_hash, status, position)
      where event.status = 'stored'
      order by event.position
    ) as ordered;
  end if;

  return jsonb_build_object('results', (
    select jsonb_agg(
      case
        when result.status in ('stored', 'duplicate') then jsonb_build_object('id', result.id, 'status', result.status)
        else jsonb_strip_nulls(jsonb_build_object(
          'id', result.id,
          'status', result.status,
          'code', case when result.status = 'conflict' then 'idempotency_conflict' else result.code end,
          'message', case
            when result.status = 'conflict' then 'An event with this source and id, but another body, was stored before'
            else case result.code
              when 'invalid_specversion' then 'specversion must be "1.0", or be left out'
              when 'invalid_id' then 'id must be a text of 1 to 255 characters'
              when 'invalid_source' then 'source must be a text of 1 to 255 characters'
              when 'reserved_source' then 'The sources "call" and "call_rate" belong to the platform'
              when 'unknown_type' then 'type is not the key of an active meter'
              when 'reserved_type' then 'The platform counts this itself, not by events'
              when 'invalid_quantity' then
                'data.quantity must be a whole number from 1 to 999999999999999, or less than 0 in a correction; 1 or nothing where events or '
                'values are counted, and 0 too where the largest or the latest counts'
              when 'invalid_value' then 'data.value must be a text of 1 to 255 characters: different values are counted'
              when 'invalid_corrects' then 'corrects must be the id of another event of the same source, or be left out'
              when 'unknown_corrected' then 'corrects names no event of this source and type that was stored before, or names a correction'
              when 'correction_too_large' then 'The event that it corrects would count less than nothing, or twice'
              when 'invalid_time' then 'time must be an RFC 3339 date and time, or be left out'
              when 'time_in_future' then 'time lies more than five minutes ahead'
            end
          end
        ))
      end)
    from unnest(ids, statuses, codes) as result (id, status, code)
  ));
end
$$;

create or replace function private.get_usage(at timestamptz) returns jsonb
language plpgsql stable security definer set search_path = ''
as $$
begin
  return private.show_usage(private.require_org('usage.view'), at);
end
$$;

create or replace function private.describe_quantity(quantity bigint, unit text) returns text
language plpgsql immutable set search_path = ''
as $$
begin
  return case
    when quantity is null then 'unlimited'
    when unit = 'second' then quantity / 60 || ' min ' || lpad((quantity % 60)::text, 2, '0') || ' s'
    when unit = 'sixtieth of a millionth' then trim_scale(round(quantity / 60000000.0, 6))::text
    else quantity::text
  end;
end
$$;

create or replace function private.apply_agent_event(
  event private.webhook_events, source public.webhook_sources, at timestamptz,
  out result public.event_status, out error text, out organization_id uuid
)
language plpgsql volatile security definer set search_path = '' as $$
declare
  told     jsonb := event.payload;
  agent_id text := left(nullif(told ->> 'agent_call_id', ''), 200);
  rank     integer := coalesce(array_position(array['status', 'tool', 'started', 'ended', 'analyzed'], told ->> 'event'), 1) - 1;
  is_over  boolean := coalesce(told ->> 'event' in ('ended', 'analyzed'), false);
  attempt  public.call_logs;
  updated  public.call_logs;
  ranks    jsonb;
  agent    jsonb;
  tool     jsonb;
  tools    jsonb := case jsonb_typeof(told -> 'tools') when 'array' then told -> 'tools' else '[]' end;
  message_count integer := case jsonb_typeof(told -> 'messages') when 'array' then jsonb_array_length(told -> 'messages') end;
  replaces boolean := false;
  noted    boolean := false;
  latest   timestamptz;
  used_at  timestamptz;
  moment   timestamptz;
  reason   text;
  refusal  text;
  orphan   private.webhook_events;
  applied  record;
begin
  organization_id := source.organization_id;
  -- Two events of one conversation, of which one tells what the other needs to find its call, see each other.
  if agent_id is not null then
    perform pg_advisory_xact_lock(hashtextextended('trunkline.agent:' || event.source_id || ':' || agent_id, 0));
  end if;
  select log.* into attempt
  from public.call_logs as log
  where log.id = private.attempt_of_agent(event)
  for no key update;
  if attempt.id is null then
    result := 'orphan';
    error := 'unknown_attempt';
    return;
  end if;
  if source.organization_id <> attempt.organization_id then
    result := 'orphan';
    error := 'other_organization';
    return;
  end if;
  organization_id := attempt.organization_id;
  if attempt.agent_call_id <> agent_id then
    result := 'orphan';
    error := 'other_conversation';
    return;
  end if;
  if jsonb_array_length(tools) > 0 then
    perform private.lock_person(attempt, tools @? '$[*] ? (@.name == "opt_out")');
  end if;

  updated := attempt;
  latest := greatest(at, attempt.created_at);
  agent := coalesce(attempt.metadata -> 'agent', '{}');
  ranks := coalesce(agent -> 'ranks', '{}');
  updated.agent_call_id := coalesce(attempt.agent_call_id, agent_id);
  if private.knows_more(ranks, 'transcript', rank, attempt.conversation_transcript, told ->> 'transcript') then
    updated.conversation_transcript := told ->> 'transcript';
    ranks := ranks || jsonb_build_object('transcript', rank);
  end if;
  if private.knows_more(ranks, 'summary', rank, attempt.summary, told ->> 'summary') then
    updated.summary := told ->> 'summary';
    ranks := ranks || jsonb_build_object('summary', rank);
  end if;
  if private.knows_more(ranks, 'analysis', rank, attempt.ai_analysis::text, nullif(told -> 'analysis', 'null')::text) then
    updated.ai_analysis := told -> 'analysis';
    ranks := ranks || jsonb_build_object('analysis', rank);
  end if;
  if private.knows_more(ranks, 'sentiment', rank, attempt.sentiment_score::text, round((told ->> 'sentiment')::numeric, 2)::text) then
    updated.sentiment_score := round((told ->> 'sentiment')::numeric, 2);
    ranks := ranks || jsonb_build_object('sentiment', rank);
  end if;
  if private.knows_more(ranks, 'interest_level', rank, attempt.interest_level, told ->> 'interest_level') then
    updated.interest_level := told ->> 'interest_level';
    ranks := ranks || jsonb_build_object('interest_level', rank);
  end if;
  if private.knows_more(ranks, 'disconnect_reason', rank,
    case when ranks ? 'disconnect_reason' then attempt.disconnect_reason end, told ->> 'disconnect_reason')
  then
    updated.disconnect_reason := told ->> 'disconnect_reason';
    updated.disconnect_notes := told ->> 'disconnect_code';
    ranks := ranks || jsonb_build_object('disconnect_reason', rank);
  end if;
  -- A recording of the carrier's has an id, and stays.
  if attempt.recording_id is null
    and private.knows_more(ranks, 'recording_url', rank, attempt.recording_url, told ->> 'recording_url')
  then
    updated.recording_url := told ->> 'recording_url';
    ranks := ranks || jsonb_build_object('recording_url', rank);
  end if;
  if told #>> '{recording,path}' is not null and private.take_object(attempt, told -> 'recording', at) then
    updated.recording_url := told #>> '{recording,path}';
    -- No link of any later event takes its place.
    ranks := ranks || jsonb_build_object('recording_url', 9);
  end if;
  -- The first word is the first, however often it is told.
  updated.first_audio_ms := coalesce(attempt.first_audio_ms, least(greatest((told ->> 'first_audio_ms')::bigint, 0), 3600000)::integer);
  -- What it costs is told more than once, the later the better; the first exchange rate stays.
  if told ->> 'cost_currency' ~ '^[A-Z]{3}$' and (told ->> 'cost_micros')::bigint >= 0
    and private.knows_more(
      ranks, 'cost', rank,
      (select own.amount_micros from private.call_costs as own where own.call_log_id = attempt.id and own.kind = 'agent')::text, told ->> 'cost_micros'
    )
  then
    ranks := ranks || jsonb_build_object('cost', rank);
    perform private.put_call_cost(attempt, 'agent', (told ->> 'cost_micros')::bigint, told ->> 'cost_currency', false, at);
  end if;
  if private.knows_more(ranks, 'language', rank, agent ->> 'language', told ->> 'language') then
    agent := agent || jsonb_build_object('language', told ->> 'language');
    ranks := ranks || jsonb_build_object('language', rank);
  end if;
  if message_count > 0 and (rank, message_count)
    > (coalesce((ranks ->> 'messages')::integer, -1), coalesce((agent ->> 'message_count')::integer, 0))
  then
    replaces := true;
    agent := agent || jsonb_build_object('message_count', message_count);
    ranks := ranks || jsonb_build_object('messages', rank);
  end if;
  agent := agent || jsonb_strip_nulls(jsonb_build_object(
    'provider', source.provider,
    'started_at', least((agent ->> 'started_at')::timestamptz, (told ->> 'started_at')::timestamptz),
    'ended_at', greatest((agent ->> 'ended_at')::timestamptz, (told ->> 'ended_at')::timestamptz),
    'duration_seconds', greatest((agent ->> 'duration_seconds')::integer, (told ->> 'duration_seconds')::integer)
  ));

  for tool in select element.value from jsonb_array_elements(tools) as element loop
    used_at := private.clamp_time(
      coalesce(tool ->> 'at', told ->> 'ended_at', told ->> 'started_at'), attempt.created_at, latest
    );
    used_at := coalesce(used_at, latest);
    moment := private.to_business((tool ->> 'when')::timestamptz);
    reason := left(coalesce(tool #>> '{arguments,reason}', tool #>> '{arguments,message}'), 500);
    refusal := case
      when tool ->> 'name' = 'transfer' then private.transfer_refusal(attempt.organization_id, private.destination_of_transfer(tool -> 'arguments'), at)
    end;
    if private.note_activity(
      attempt, 'tool|' || coalesce(tool ->> 'id', ''),
      case tool ->> 'name'
        when 'transfer' then 'transfer' when 'callback' then 'callback' when 'opt_out' then 'opt_out' when 'site_visit' then 'site_visit'
        else 'agent_tool'
      end,
      jsonb_build_object('tool', tool -> 'called', 'arguments', tool -> 'arguments', 'when', moment, 'refused', refusal), used_at
    ) then
      noted := true;
    end if;
    case tool ->> 'name'
      when 'transfer' then
        if refusal is not null then
          -- It is not in our hands any more; a person has to know.
          perform private.raise_alarm(attempt, 'transfer_refused', jsonb_build_object('reason', refusal), at);
        end if;
        updated.transferred := true;
        updated.transferred_at := least(updated.transferred_at, used_at);
        if private.knows_more(ranks, 'transfer_reason', 0, updated.transfer_reason, reason) then
          updated.transfer_reason := reason;
        end if;
        if private.knows_more(ranks, 'transfer_department', 0, updated.transfer_department,
          left(coalesce(tool #>> '{arguments,department}', tool #>> '{arguments,destination}'), 200))
        then
          updated.transfer_department := left(coalesce(tool #>> '{arguments,department}', tool #>> '{arguments,destination}'), 200);
        end if;
      when 'callback' then
        if moment is not null then
          agent := agent || jsonb_build_object('callback_at', greatest((agent ->> 'callback_at')::timestamptz, moment));
        end if;
      when 'opt_out' then
        agent := agent || jsonb_build_object('opted_out', true);
        perform private.opt_out(attempt.organization_id, private.number_of_person(attempt), coalesce(reason, 'said so in a call'), at);
      else
        null;
    end case;
  end loop;

  updated.metadata := attempt.metadata || jsonb_build_object('agent', agent || jsonb_build_object('ranks', ranks));
  if updated is distinct from attempt then
    noted := true;
    update public.call_logs as log
    set
      agent_call_id = updated.agent_call_id, conversation_transcript = updated.conversation_transcript, ai_analysis = updated.ai_analysis,
      summary = updated.summary, sentiment_score = updated.sentiment_score, interest_level = updated.interest_level,
      transferred = updated.transferred, transferred_at = updated.transferred_at, transfer_reason = updated.transfer_reason,
      transfer_department = updated.transfer_department, disconnect_reason = updated.disconnect_reason,
      disconnect_notes = updated.disconnect_notes, recording_url = updated.recording_url, metadata = updated.metadata,
      first_audio_ms = updated.first_audio_ms
    where log.id = attempt.id;
  end if;
  if updated.transferred and not attempt.transferred then
    update public.campaigns as campaign
    set transferred_calls = campaign.transferred_calls + 1
    where campaign.id = attempt.campaign_id;
  end if;
  if (agent ->> 'callback_at') is distinct from (attempt.metadata #>> '{agent,callback_at}') then
    perform private.call_back(updated, (agent ->> 'callback_at')::timestamptz, at);
  end if;
  perform private.follow_conversation(updated, told, replaces, is_over, at);
  if is_over or updated.metadata #>> '{agent,ended_at}' is not null then
    perform private.note_activity(
      updated, 'call', 'call',
      jsonb_build_object(
        'summary', updated.summary, 'sentiment', updated.sentiment_score, 'interest_level', updated.interest_level,
        'disconnect_reason', case when ranks ? 'disconnect_reason' then updated.disconnect_reason end,
        'duration_seconds', agent -> 'duration_seconds'
      ),
      coalesce(private.clamp_time(agent ->> 'ended_at', attempt.created_at, latest), latest)
    );
  end if;
  result := case when noted or replaces then 'applied' else 'ignored' end::public.event_status;

  -- What came before anybody knew whose conversation it was.
  if attempt.agent_call_id is null and updated.agent_call_id is not null then
    for orphan in
      select waiting.*
      from private.webhook_events as waiting
      where waiting.source_id = event.source_id and waiting.payload ->> 'agent_call_id' = told ->> 'agent_call_id'
        and waiting.status = 'orphan' and waiting.payload_type = 'agent' and waiting.error = 'unknown_attempt'
      order by waiting.received_at, waiting.id
      for no key update
    loop
      select * into applied from private.apply_agent_event(orphan, source, at);
      update private.webhook_events as stored
      set
        status = applied.result, error = applied.error, organization_id = applied.organization_id, attempt_id = attempt.id,
        tries = stored.tries + 1
      where stored.id = orphan.id and stored.received_at = orphan.received_at;
    end loop;
  end if;
end
$$;

create or replace function private.export_line_calls(invoice_id uuid, line integer) returns jsonb
language plpgsql stable security definer set search_path = ''
as $$
declare
  organization uuid := private.require_org('billing.view');
  sees_numbers boolean := coalesce(private.org_with('call.view') = organization, false);
  bill public.invoices;
  billed public.invoice_lines;
  by_deck boolean;
  skipped bigint;
  in_all bigint;
begin
  select own.* into bill
  from public.invoices as own
  where own.organization_id = organization and own.id = invoice_id and own.status <> 'draft';
  select own.* into billed
  from public.invoice_lines as own
  where own.organization_id = organization and own.invoice_id = bill.id and own.position = line and own.meter_key is not null
    and own.kind <> 'fee';
  if billed.id is null then
    perform private.raise_error(404, 'not_found', 'There is no such invoice, or the line is not of something that was counted', 'id');
  end if;
  by_deck := billed.meter_key = 'rated_calls';
  -- In the order in which they were counted, calls fill the meter's lines one after the other.
  select
    coalesce(sum(other.quantity) filter (where other.position < billed.position), 0)::bigint, coalesce(sum(other.quantity), 0)::bigint
  into skipped, in_all
  from public.invoice_lines as other
  where other.organization_id = organization
    and other.invoice_id = bill.id
    and other.meter_key = billed.meter_key
    and other.kind not in ('fee', 'adjustment');
  return (
    with event as (
      -- What came after the period was billed is what the adjustment charges for, on whichever invoice that is.
      select own.*
      from private.usage_events as own
      where billed.kind <> 'adjustment'
        and own.organization_id = organization
        and own.meter_key = billed.meter_key
        and own.day between bill.first_day and bill.last_day
        and own.occurred_at < bill.period_end
        and not exists (select from private.usage_adjustments as late where late.event_id = own.id)
      union all
      select own.*
      from private.usage_adjustments as late
      join private.usage_events as own on own.occurred_at = late.occurred_at and own.id = late.event_id
      where billed.kind = 'adjustment' and late.organization_id = organization and late.invoice_line_id = billed.id
    ),
    counted as (
      -- A call with all that corrected it, and without what prepaid credit paid, which no invoice bills.
      select
        event.source, coalesce(event.corrects, event.key) as key, min(event.occurred_at) as occurred_at, min(event.id::text) as id,
        sum(
          event.quantity - case
            when event.source <> 'call' then 0
            when billed.meter_key = 'ai_calls' then case when charge.meter_key = 'ai_calls' then event.quantity else 0 end
            when event.corrects is null then coalesce(charge.seconds - charge.overage_seconds, 0)
            else coalesce((select later.credit_seconds from private.call_corrections as later where later.correction_id = event.key), 0)
          end
        )::bigint as quantity
      from event
      left join public.call_charges as charge
        on charge.organization_id = organization
        and charge.call_log_id = case event.source when 'call' then coalesce(event.corrects, event.key)::uuid end
      group by event.source, coalesce(event.corrects, event.key)
    ),
    placed as (
      select
        counted.*,
        -- A sum that is billed by started pulses is more than what was counted: the last call has begun the last one.
        counted.quantity + case
          when lead(counted.key) over calls is null then greatest(in_all - (sum(counted.quantity) over ())::bigint, 0) else 0
        end as filling
      from counted
      where counted.quantity > 0 or billed.kind = 'adjustment' and counted.quantity <> 0
      window calls as (order by counted.occurred_at, counted.id)
    ),
    part as (
      select
        placed.*,
        case
          when billed.kind = 'adjustment' then placed.quantity
          else least(placed.running, skipped + billed.quantity) - greatest(placed.running - placed.filling, skipped)
        end as share
      from (
        select own.*, (sum(own.filling) over (order by own.occurred_at, own.id))::bigint as running
        from placed as own
      ) as placed
    ),
    summed as (
      select
        part.*, (sum(part.share) over (order by part.occurred_at, part.id))::numeric as until, (sum(part.share) over ())::numeric as whole
      from part
      where case billed.kind when 'adjustment' then part.share <> 0 else part.share > 0 end
    ),
    item as (
      select
        summed.*,
        private.divide_half_away(sign(summed.whole) * summed.until * billed.quantity, abs(summed.whole))
          - private.divide_half_away(sign(summed.whole) * (summed.until - summed.share) * billed.quantity, abs(summed.whole)) as units,
        private.divide_half_away(sign(summed.whole) * summed.until * billed.amount_minor, abs(summed.whole))
          - private.divide_half_away(sign(summed.whole) * (summed.until - summed.share) * billed.amount_minor, abs(summed.whole)) as amount_minor
      from summed
      order by summed.occurred_at, summed.id
      limit 10001
    )
    select jsonb_build_object(
      'columns', jsonb_build_array('ended_at', 'source', 'call', 'direction', 'number', 'counted', 'quantity', 'unit', 'currency', 'amount')
        || case when by_deck then '["destination", "prefix", "charged_seconds", "price_per_minute", "pulses"]' else '[]'::jsonb end,
      'rows', coalesce(jsonb_agg(
        jsonb_build_array(
          item.occurred_at, case item.source when 'call_rate' then 'call' else item.source end, item.key, attempt.direction,
          -- Who may not see calls sees of whom they were with the end of the number, as a bill shows it.
          case when sees_numbers then other_end.number else '…' || right(other_end.number, 4) end,
          item.quantity, item.units, billed.unit, bill.currency, private.decimal_amount(item.amount_minor, bill.currency)::text
        )
          || case when by_deck then jsonb_build_array(
            rate.destination, rating.prefix, rating.charged_seconds, (rate.price_micros / 1000000.0)::numeric(18, 6)::text,
            rate.initial_pulse || '/' || rate.next_pulse
          ) else '[]'::jsonb end
        order by item.occurred_at, item.id), '[]')
    )
    from item
    left join public.call_logs as attempt
      on attempt.organization_id = organization
      and attempt.id = case when item.source in ('call', 'call_rate') then item.key::uuid end
    left join lateral (
      select case attempt.direction when 'inbound' then attempt.caller_number else attempt.callee_number end as number
    ) as other_end on true
    left join lateral (
      select own.*
      from private.call_ratings as own
      where by_deck and own.call_log_id = attempt.id and (billed.kind = 'adjustment' or own.rated_at <= bill.finalized_at)
      order by own.number desc
      limit 1
    ) as rating on true
    left join private.rates as rate on rate.version_id = rating.version_id and rate.prefix = rating.prefix
  );
end
$$;

create or replace function private.set_plan_price(
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

comment on function private.export_line_calls(uuid, integer) is
  'The calls and other counted events that a line of an invoice charges for, each with its part of the quantity and of the amount: both add up '
  'to the line''s, also where a call is partly within the plan or was corrected. Whole numbers are for who holds call.view. Needs billing.view.';

insert into private.personal_data (table_name, column_name, found_by, via, treatment, reason)
select listed.table_name, named.column_name, listed.found_by, listed.via, listed.treatment, listed.reason
from (
  values
    ('private.call_ratings', '*', 'none', null, 'kept', 'A fiscal row: amounts, the call''s id, and the prefix of a destination.'),
    ('private.call_costs', '*', 'none', null, 'kept', 'Amounts and the call''s id.'),
    ('private.rate_decks', '*', 'none', null, 'kept', 'Reference data.'),
    ('private.rate_deck_versions', '*', 'none', null, 'kept', 'Reference data.'),
    ('private.rates', '*', 'none', null, 'kept', 'Reference data.'),
    ('private.organization_rate_decks', '*', 'none', null, 'kept', 'Which price list an organization has.'),
    ('private.carrier_rate_decks', '*', 'none', null, 'kept', 'Which price list a carrier account has.'),
    ('private.exchange_rates', '*', 'none', null, 'kept', 'Reference data.')
) as listed (table_name, columns, found_by, via, treatment, reason)
cross join lateral unnest(string_to_array(listed.columns, ' ')) as named (column_name);
