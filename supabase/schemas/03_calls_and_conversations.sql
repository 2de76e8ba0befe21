-- What is said between a store and its customers: conversations, their messages, calls, and the analytics of calls.
-- May run twice: everything is created if it is not there, or replaced.
--
-- Whoever changes several of these rows locks them in this order, and within one table by id: stores, call_logs, calls, conversations,
-- customers.


-- conversations -------------------------------------------------------------------------------------------------------------------

create table if not exists public.conversations (
  id                      uuid primary key default gen_random_uuid(),
  organization_id         uuid not null default public.get_auth_org_id(),
  store_id                uuid not null,
  conversation_key        text not null check (length(conversation_key) between 1 and 255),
  order_id                uuid,
  customer_id             uuid,
  channel                 public.conversation_channel not null,
  status                  public.conversation_status not null default 'active',
  customer_identifier     text check (length(customer_identifier) <= 255),
  customer_name           text,
  start_time              timestamptz not null default private.clock_now(),
  end_time                timestamptz,
  last_activity_at        timestamptz not null default private.clock_now(),
  title                   text check (length(title) <= 500),
  summary                 text,
  primary_intent          text,
  resolution_status       text,
  ai_context              jsonb not null default '{}' check (jsonb_typeof(ai_context) = 'object'),
  conversation_history    jsonb not null default '[]' check (jsonb_typeof(conversation_history) in ('array', 'object')),
  sentiment_score         numeric(3, 2) check (sentiment_score between -1 and 1),
  satisfaction_rating     smallint check (satisfaction_rating between 1 and 5),
  escalated_to_human      boolean not null default false,
  resolution_time_seconds integer check (resolution_time_seconds >= 0),
  assigned_agent_id       uuid,
  escalation_reason       text,
  tags                    text[] not null default '{}',
  priority_level          smallint not null default 1 check (priority_level between 1 and 5),
  platform_data           jsonb not null default '{}' check (jsonb_typeof(platform_data) = 'object'),
  created_at              timestamptz not null default private.clock_now(),
  updated_at              timestamptz not null default private.clock_now(),
  unique (organization_id, store_id, id),
  unique (organization_id, store_id, conversation_key),
  foreign key (organization_id, store_id) references public.stores (organization_id, id) on delete cascade,
  foreign key (organization_id, store_id, order_id) references public.orders (organization_id, store_id, id)
    on delete set null (order_id),
  foreign key (organization_id, store_id, customer_id) references public.customers (organization_id, store_id, id)
    on delete set null (customer_id),
  foreign key (organization_id, assigned_agent_id) references public.profiles (organization_id, id) on delete set null (assigned_agent_id),
  check (end_time >= start_time),
  check ((end_time is not null) = (status in ('completed', 'resolved', 'abandoned')))
) with (fillfactor = 80);
create index if not exists idx_conversations_store_id on public.conversations (organization_id, store_id, start_time desc);
create index if not exists idx_conversations_order_id on public.conversations (organization_id, store_id, order_id)
  where order_id is not null;
create index if not exists idx_conversations_customer_id on public.conversations (organization_id, store_id, customer_id)
  where customer_id is not null;
create index if not exists idx_conversations_assigned_agent on public.conversations (organization_id, assigned_agent_id)
  where assigned_agent_id is not null;
create index if not exists idx_conversations_channel on public.conversations (organization_id, store_id, channel);
create index if not exists idx_conversations_status on public.conversations (organization_id, store_id, status);
create index if not exists idx_conversations_start_time on public.conversations (organization_id, start_time desc);
create index if not exists idx_conversations_last_activity on public.conversations (last_activity_at) where status = 'active';
create index if not exists idx_conversations_customer_identifier
  on public.conversations (organization_id, store_id, customer_identifier) where customer_identifier is not null;
create index if not exists idx_conversations_tags on public.conversations using gin (tags);

revoke all on public.conversations from anon, authenticated, service_role;
grant select on public.conversations to authenticated, service_role;
grant update (
  order_id, customer_id, customer_name, title, summary, primary_intent, resolution_status, satisfaction_rating, assigned_agent_id, tags,
  priority_level
) on public.conversations to authenticated;
alter table public.conversations enable row level security;
alter table public.conversations force row level security;
drop policy if exists "Who views stores may see their conversations" on public.conversations;
create policy "Who views stores may see their conversations" on public.conversations
  for select to authenticated using (organization_id = (select private.org_with('store.view')));
drop policy if exists "Who edits stores may describe and assign a conversation" on public.conversations;
create policy "Who edits stores may describe and assign a conversation" on public.conversations
  for update to authenticated
  using (organization_id = (select private.org_with('store.edit')))
  with check (organization_id = (select private.org_with('store.edit')));

create or replace function private.calculate_resolution_time() returns trigger
language plpgsql set search_path = '' as $$
begin
  if new.status in ('completed', 'resolved', 'abandoned') then
    new.end_time := coalesce(new.end_time, greatest(private.clock_now(), new.start_time));
  elsif tg_op = 'UPDATE' and old.status in ('completed', 'resolved', 'abandoned') then
    -- Opened again: it has not ended.
    new.end_time := null;
  end if;
  new.resolution_time_seconds := case
    when new.status in ('completed', 'resolved') then floor(extract(epoch from new.end_time - new.start_time))::integer
  end;
  new.escalated_to_human := new.escalated_to_human or new.status = 'escalated';
  return new;
end
$$;
comment on function private.calculate_resolution_time() is
  'Trigger: a conversation that is over has an end, one that was resolved or completed has the seconds it took; also when corrected.';
create or replace trigger calculate_resolution_time_trigger
  before insert or update of status, start_time, end_time, resolution_time_seconds on public.conversations
  for each row execute function private.calculate_resolution_time();
create or replace function private.note_customer_contact() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  update public.customers as customer
  set last_contact_date = least(new.start_time, private.clock_now())
  where customer.organization_id = new.organization_id
    and customer.store_id = new.store_id
    and customer.id = new.customer_id
    and (customer.last_contact_date is null or customer.last_contact_date < least(new.start_time, private.clock_now()));
  return null;
end
$$;
comment on function private.note_customer_contact() is
  'Trigger: a customer''s last contact is the start of their latest call or conversation, in whatever order these become known.';
create or replace trigger note_customer_contact after insert or update of customer_id on public.conversations
  for each row when (new.customer_id is not null) execute function private.note_customer_contact();
create or replace trigger update_modified_column before update on public.conversations
  for each row execute function private.update_modified_column();
comment on table public.conversations is
  'One exchange with one customer on one channel. Its status and its times are moved by functions and triggers; users describe and assign it.';
comment on column public.conversations.conversation_key is 'The name that the channel gives it; once a store.';
comment on column public.conversations.customer_identifier is 'Who speaks, as the channel knows them: a number, an address, or anonymous.';
comment on column public.conversations.last_activity_at is
  'The latest message''s time. It never moves back, whatever order messages come in, and never into the future.';
comment on column public.conversations.end_time is
  'Set exactly when the status is completed, resolved or abandoned. A message that comes later does not move it.';
comment on column public.conversations.escalated_to_human is 'A person was called for at some time; stays true.';
comment on column public.conversations.priority_level is '1 lowest, 5 highest.';


-- conversation_messages -----------------------------------------------------------------------------------------------------------

create table if not exists public.conversation_messages (
  id                  uuid primary key default gen_random_uuid(),
  organization_id     uuid not null default public.get_auth_org_id(),
  store_id            uuid not null,
  conversation_id     uuid not null,
  message_index       integer not null check (message_index >= 0),
  external_message_id text,
  role                public.message_role not null,
  type                public.message_type not null default 'text',
  content             text not null check (content ~ '\S'),
  content_type        text not null default 'text/plain',
  attachments         jsonb not null default '[]' check (jsonb_typeof(attachments) = 'array'),
  ai_model            text,
  ai_prompt           text,
  ai_metadata         jsonb not null default '{}' check (jsonb_typeof(ai_metadata) = 'object'),
  processed_at        timestamptz,
  processing_time_ms  integer check (processing_time_ms >= 0),
  intent              text,
  entities            jsonb,
  sentiment_score     numeric(3, 2) check (sentiment_score between -1 and 1),
  platform_data       jsonb not null default '{}' check (jsonb_typeof(platform_data) = 'object'),
  timestamp           timestamptz not null default private.clock_now(),
  created_at          timestamptz not null default private.clock_now(),
  updated_at          timestamptz not null default private.clock_now(),
  unique (organization_id, store_id, id),
  unique (organization_id, conversation_id, message_index),
  unique (organization_id, store_id, conversation_id, external_message_id),
  foreign key (organization_id, store_id, conversation_id) references public.conversations (organization_id, store_id, id)
    on delete cascade
);
create index if not exists idx_messages_timestamp on public.conversation_messages (organization_id, store_id, timestamp desc);
create index if not exists idx_messages_role on public.conversation_messages (organization_id, store_id, timestamp desc)
  where role = 'human_agent';
create index if not exists idx_messages_type on public.conversation_messages (organization_id, store_id, type, timestamp desc)
  where type <> 'text';

revoke all on public.conversation_messages from anon, authenticated, service_role;
grant select on public.conversation_messages to authenticated, service_role;
alter table public.conversation_messages enable row level security;
alter table public.conversation_messages force row level security;
drop policy if exists "Who views stores may see what was said" on public.conversation_messages;
create policy "Who views stores may see what was said" on public.conversation_messages
  for select to authenticated using (organization_id = (select private.org_with('store.view')));

create or replace function private.number_message() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  perform
  from public.conversations as conversation
  where conversation.organization_id = new.organization_id
    and conversation.store_id = new.store_id
    and conversation.id = new.conversation_id
  for no key update;
  new.message_index := (
    select coalesce(max(message.message_index) + 1, 0)
    from public.conversation_messages as message
    where message.organization_id = new.organization_id
      and message.store_id = new.store_id
      and message.conversation_id = new.conversation_id
  );
  return new;
end
$$;
comment on function private.number_message() is 'Trigger: a message that comes without a number gets its conversation''s next one.';
create or replace trigger number_message before insert on public.conversation_messages
  for each row when (new.message_index is null) execute function private.number_message();

create or replace function private.update_conversation_activity() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  perform
  from public.conversations as conversation
  where (conversation.organization_id, conversation.store_id, conversation.id) in (
    select message.organization_id, message.store_id, message.conversation_id from added as message
  )
  order by conversation.id
  for no key update;

  -- Late, early or reordered, a message is taken in; only a later one moves the time, and a clock ahead of ours not beyond now.
  update public.conversations as conversation
  set last_activity_at = latest.at
  from (
    select
      message.organization_id, message.store_id, message.conversation_id,
      least(max(message.timestamp), private.clock_now()) as at
    from added as message
    group by message.organization_id, message.store_id, message.conversation_id
  ) as latest
  where conversation.organization_id = latest.organization_id
    and conversation.store_id = latest.store_id
    and conversation.id = latest.conversation_id
    and conversation.last_activity_at < latest.at;
  return null;
end
$$;
comment on function private.update_conversation_activity() is 'Trigger: a conversation was last active when its latest message was said.';
create or replace trigger update_conversation_activity_trigger after insert on public.conversation_messages
  referencing new table as added
  for each statement execute function private.update_conversation_activity();
create or replace trigger update_modified_column before update on public.conversation_messages
  for each row execute function private.update_modified_column();
comment on table public.conversation_messages is 'What was said, in order of message_index. Written by functions alone.';
comment on column public.conversation_messages.message_index is 'From 0; the next one when not given.';
comment on column public.conversation_messages.external_message_id is 'The channel''s own id: the same message twice is one.';
comment on column public.conversation_messages.timestamp is 'When it was said, as the channel says; created_at is when we heard of it.';


-- calls ---------------------------------------------------------------------------------------------------------------------------

create or replace function private.to_call_status(attempt public.attempt_status, outcome public.call_outcome)
returns public.call_status
language sql immutable parallel safe set search_path = '' as $$
  select case
    when attempt = 'ringing' then 'ringing'::public.call_status
    when attempt = 'in_progress' then 'answered'::public.call_status
    when attempt <> 'ended' then 'initiated'::public.call_status
    else case outcome
      when 'answered' then 'completed'::public.call_status
      when 'machine' then 'completed'::public.call_status
      when 'busy' then 'busy'::public.call_status
      when 'rejected' then 'busy'::public.call_status
      when 'no_answer' then 'no_answer'::public.call_status
      when 'cancelled' then 'cancelled'::public.call_status
      when 'expired' then 'cancelled'::public.call_status
      -- invalid_number, capacity, carrier_transient, spam_blocked, our_fault, config, lost, failed
      else 'failed'::public.call_status
    end
  end
$$;
comment on function private.to_call_status(public.attempt_status, public.call_outcome) is
  'A leg''s state in the words of a store''s call: the one mapping, of every state and every outcome.';
revoke execute on function private.to_call_status(public.attempt_status, public.call_outcome) from public;
-- A user who changes a note of a call computes its generated status anew.
grant execute on function private.to_call_status(public.attempt_status, public.call_outcome) to authenticated;

create or replace function private.to_call_party(number text) returns text
language sql immutable parallel safe set search_path = '' as $$
  select case when number ~ '^\+[1-9][0-9]{1,14}$' then number else 'anonymous' end
$$;
comment on function private.to_call_party(text) is
  'A number as a store''s call takes it: E.164, else anonymous. What the carrier said stays in the leg.';
revoke execute on function private.to_call_party(text) from public;

create table if not exists public.calls (
  id                    uuid primary key default gen_random_uuid(),
  organization_id       uuid not null default public.get_auth_org_id(),
  store_id              uuid not null,
  call_log_id           uuid,
  conversation_id       uuid,
  order_id              uuid,
  customer_id           uuid,
  twilio_call_sid       text check (length(twilio_call_sid) between 1 and 100),
  call_id               text check (length(call_id) between 1 and 100),
  from_phone            text not null check (from_phone ~ '^\+[1-9][0-9]{1,14}$' or from_phone = 'anonymous'),
  to_phone              text not null check (to_phone ~ '^\+[1-9][0-9]{1,14}$' or to_phone = 'anonymous'),
  direction             public.call_direction not null,
  attempt_status        public.attempt_status not null default 'initiated',
  call_outcome          public.call_outcome,
  status                public.call_status not null
    generated always as (private.to_call_status(attempt_status, call_outcome)) stored,
  start_time            timestamptz not null,
  answered_at           timestamptz,
  end_time              timestamptz,
  duration_seconds      integer check (duration_seconds >= 0),
  recording_url         text,
  recording_sid         text,
  transcript            text,
  transcript_confidence numeric(3, 2) check (transcript_confidence between 0 and 1),
  ai_summary            text,
  intent_detected       text,
  sentiment_score       numeric(3, 2) check (sentiment_score between -1 and 1),
  satisfaction_rating   smallint check (satisfaction_rating between 1 and 5),
  quality_score         numeric(3, 2) check (quality_score between 0 and 1),
  dropped_call          boolean not null default false,
  twilio_data           jsonb not null default '{}' check (jsonb_typeof(twilio_data) = 'object'),
  ai_context            jsonb not null default '{}' check (jsonb_typeof(ai_context) = 'object'),
  created_at            timestamptz not null default private.clock_now(),
  updated_at            timestamptz not null default private.clock_now(),
  unique (organization_id, store_id, id),
  unique (organization_id, call_log_id),
  unique (organization_id, twilio_call_sid),
  unique (organization_id, call_id),
  foreign key (organization_id, store_id) references public.stores (organization_id, id) on delete cascade,
  foreign key (organization_id, store_id, conversation_id) references public.conversations (organization_id, store_id, id)
    on delete set null (conversation_id),
  foreign key (organization_id, store_id, order_id) references public.orders (organization_id, store_id, id)
    on delete set null (order_id),
  foreign key (organization_id, store_id, customer_id) references public.customers (organization_id, store_id, id)
    on delete set null (customer_id),
  check (end_time >= start_time),
  check ((attempt_status = 'ended') = (call_outcome is not null)),
  check ((attempt_status = 'ended') = (end_time is not null))
) with (fillfactor = 80);
create index if not exists idx_calls_store_id on public.calls (organization_id, store_id, start_time desc);
create index if not exists idx_calls_conversation_id on public.calls (organization_id, store_id, conversation_id)
  where conversation_id is not null;
create index if not exists idx_calls_order_id on public.calls (organization_id, store_id, order_id) where order_id is not null;
create index if not exists idx_calls_customer_id on public.calls (organization_id, store_id, customer_id) where customer_id is not null;
create index if not exists idx_calls_direction on public.calls (organization_id, store_id, direction, start_time desc);
create index if not exists idx_calls_status on public.calls (organization_id, store_id, status);
create index if not exists idx_calls_start_time on public.calls (organization_id, start_time desc);
create index if not exists idx_calls_phone_numbers on public.calls (organization_id, from_phone, to_phone);

revoke all on public.calls from anon, authenticated, service_role;
grant select on public.calls to authenticated, service_role;
grant update (order_id, customer_id, satisfaction_rating) on public.calls to authenticated;
alter table public.calls enable row level security;
alter table public.calls force row level security;
drop policy if exists "Who views stores and calls may see their calls" on public.calls;
create policy "Who views stores and calls may see their calls" on public.calls
  for select to authenticated
  using (
    organization_id = (select private.org_with('store.view')) and organization_id = (select private.org_with('call.view'))
  );
drop policy if exists "Who edits stores may file and rate a call" on public.calls;
create policy "Who edits stores may file and rate a call" on public.calls
  for update to authenticated
  using (organization_id = (select private.org_with('store.edit')))
  with check (organization_id = (select private.org_with('store.edit')));

create or replace function private.calculate_call_duration() returns trigger
language plpgsql set search_path = '' as $$
begin
  new.duration_seconds := floor(extract(epoch from new.end_time - new.start_time))::integer;
  return new;
end
$$;
comment on function private.calculate_call_duration() is
  'Trigger: a call''s duration is its end less its start, whenever either is written, and nothing else.';
create or replace trigger calculate_call_duration_trigger
  before insert or update of start_time, end_time, duration_seconds on public.calls
  for each row execute function private.calculate_call_duration();

create or replace function private.check_call_status() returns trigger
language plpgsql set search_path = '' as $$
begin
  raise exception 'call % is %, it does not go back to %', old.id, old.attempt_status, new.attempt_status using errcode = 'check_violation';
end
$$;
comment on function private.check_call_status() is 'Trigger: a call moves only forward.';
create or replace trigger check_call_status before update of attempt_status on public.calls
  for each row when (new.attempt_status < old.attempt_status) execute function private.check_call_status();
create or replace trigger note_customer_contact after insert or update of customer_id on public.calls
  for each row when (new.customer_id is not null) execute function private.note_customer_contact();
create or replace trigger update_modified_column before update on public.calls
  for each row execute function private.update_modified_column();
comment on table public.calls is
  'A store''s view of a leg of call_logs: whom it was with and what came of it. The leg alone is metered, and says what happened.';
comment on column public.calls.call_log_id is 'The leg. Null once its row has gone to an archive.';
comment on column public.calls.twilio_call_sid is 'The carrier''s id of the call, whichever carrier; the leg''s call_sid.';
comment on column public.calls.call_id is 'The voice agent''s id of the call.';
comment on column public.calls.from_phone is 'E.164, or anonymous when the caller withheld it.';
comment on column public.calls.attempt_status is 'The leg''s status; moves only forward.';
comment on column public.calls.call_outcome is
  'How the leg ended; null until it has. A leg that was taken for lost may still get a better one.';
comment on column public.calls.status is 'Derived from the two by private.to_call_status(); nobody writes it.';
comment on column public.calls.duration_seconds is 'From start_time to end_time.';
comment on column public.calls.dropped_call is 'It was answered and broke off: neither side meant to end it.';
comment on column public.calls.twilio_data is 'What the carrier said beyond the columns.';


-- call_analytics ------------------------------------------------------------------------------------------------------------------

create table if not exists public.call_analytics (
  id                          uuid primary key default gen_random_uuid(),
  organization_id             uuid not null,
  store_id                    uuid not null,
  date_period                 date not null,
  hour_period                 smallint check (hour_period between 0 and 23),
  total_calls                 integer not null default 0 check (total_calls >= 0),
  inbound_calls               integer not null default 0 check (inbound_calls >= 0),
  outbound_calls              integer not null default 0 check (outbound_calls >= 0),
  answered_calls              integer not null default 0 check (answered_calls >= 0),
  missed_calls                integer not null default 0 check (missed_calls >= 0),
  dropped_calls               integer not null default 0 check (dropped_calls >= 0),
  average_call_duration       numeric(10, 2) check (average_call_duration >= 0),
  average_quality_score       numeric(3, 2) check (average_quality_score between 0 and 1),
  average_satisfaction_rating numeric(3, 2) check (average_satisfaction_rating between 1 and 5),
  ai_resolution_rate          numeric(5, 2) check (ai_resolution_rate between 0 and 100),
  human_escalation_rate       numeric(5, 2) check (human_escalation_rate between 0 and 100),
  average_response_time_ms    integer check (average_response_time_ms >= 0),
  top_intents                 jsonb not null default '[]' check (jsonb_typeof(top_intents) = 'array'),
  resolution_categories       jsonb not null default '{}' check (jsonb_typeof(resolution_categories) = 'object'),
  created_at                  timestamptz not null default private.clock_now(),
  updated_at                  timestamptz not null default private.clock_now(),
  unique (organization_id, store_id, id),
  -- The day as a whole has no hour, and is one row all the same.
  unique nulls not distinct (organization_id, store_id, date_period, hour_period),
  foreign key (organization_id, store_id) references public.stores (organization_id, id) on delete cascade,
  check (inbound_calls + outbound_calls = total_calls),
  check (answered_calls + missed_calls <= total_calls),
  check (dropped_calls <= total_calls)
);
create index if not exists idx_call_analytics_date on public.call_analytics (organization_id, date_period desc);

revoke all on public.call_analytics from anon, authenticated, service_role;
grant select on public.call_analytics to authenticated, service_role;
alter table public.call_analytics enable row level security;
alter table public.call_analytics force row level security;
drop policy if exists "Who views stores may see their analytics" on public.call_analytics;
create policy "Who views stores may see their analytics" on public.call_analytics
  for select to authenticated using (organization_id = (select private.org_with('store.view')));
create or replace trigger update_modified_column before update on public.call_analytics
  for each row execute function private.update_modified_column();
comment on table public.call_analytics is
  'A store''s calls by day and hour of its own time zone, written by roll_up_call_analytics() alone and always computable again.';
comment on column public.call_analytics.hour_period is 'The hour from which on, 0 to 23; null is the whole day.';
comment on column public.call_analytics.missed_calls is
  'Ended without an answer. A call still under way is neither answered nor missed until it is.';
comment on column public.call_analytics.average_call_duration is 'Seconds, of answered calls that have ended.';
comment on column public.call_analytics.ai_resolution_rate is
  'Of the calls'' conversations that are over, percent that no person was called for.';
comment on column public.call_analytics.human_escalation_rate is 'Of the calls'' conversations, percent that a person was called for.';
comment on column public.call_analytics.average_response_time_ms is 'Of the agent''s messages in the calls'' conversations.';
comment on column public.call_analytics.top_intents is '[{"intent","calls"}], the ten most frequent, most frequent first.';
comment on column public.call_analytics.resolution_categories is 'Conversations by resolution_status.';

create or replace function private.roll_up_call_analytics(store uuid, day date) returns integer
language plpgsql volatile security definer set search_path = '' as $$
declare
  subject public.stores;
  written integer;
begin
  -- One roll-up of a store at a time, so that the one that looked last is the one that stands.
  select shop.* into subject from public.stores as shop where shop.id = store for no key update;
  if subject.id is null then
    return 0;
  end if;

  with fact as materialized (
    select
      call.id, extract(hour from call.start_time at time zone subject.timezone)::smallint as hour_of_day,
      call.direction, call.attempt_status = 'ended' as ended,
      call.answered_at is not null or call.status in ('answered', 'completed') as answered,
      call.duration_seconds, call.dropped_call, call.quality_score, call.satisfaction_rating, call.intent_detected, call.conversation_id
    from public.calls as call
    where call.organization_id = subject.organization_id
      and call.store_id = subject.id
      and call.start_time >= day::timestamp at time zone subject.timezone
      and call.start_time < (day + 1)::timestamp at time zone subject.timezone
  ),
  -- Every call is in its hour and in its day.
  entry as materialized (
    select fact.*, slot.hour_period
    from fact
    cross join lateral (values (fact.hour_of_day), (null)) as slot (hour_period)
  ),
  counted as (
    select
      entry.hour_period,
      count(*)::integer as total_calls,
      (count(*) filter (where entry.direction = 'inbound'))::integer as inbound_calls,
      (count(*) filter (where entry.direction = 'outbound'))::integer as outbound_calls,
      (count(*) filter (where entry.answered))::integer as answered_calls,
      (count(*) filter (where entry.ended and not entry.answered))::integer as missed_calls,
      (count(*) filter (where entry.dropped_call))::integer as dropped_calls,
      round(avg(entry.duration_seconds) filter (where entry.ended and entry.answered), 2) as average_call_duration,
      round(avg(entry.quality_score), 2) as average_quality_score,
      round(avg(entry.satisfaction_rating), 2) as average_satisfaction_rating
    from entry
    group by entry.hour_period
  ),
  talk as materialized (
    select distinct entry.hour_period, conversation.id, conversation.status, conversation.escalated_to_human, conversation.resolution_status
    from entry
    join public.conversations as conversation
      on conversation.organization_id = subject.organization_id
      and conversation.store_id = subject.id
      and conversation.id = entry.conversation_id
  ),
  resolved as (
    select
      talk.hour_period,
      round(
        100.0 * count(*) filter (where talk.status in ('completed', 'resolved') and not talk.escalated_to_human)
          / nullif(count(*) filter (where talk.status in ('completed', 'resolved', 'abandoned')), 0),
        2
      ) as ai_resolution_rate,
      round(100.0 * count(*) filter (where talk.escalated_to_human) / count(*), 2) as human_escalation_rate
    from talk
    group by talk.hour_period
  ),
  category as (
    select grouped.hour_period, jsonb_object_agg(grouped.resolution_status, grouped.conversations) as resolution_categories
    from (
      select talk.hour_period, talk.resolution_status, count(*) as conversations
      from talk
      where talk.resolution_status is not null
      group by talk.hour_period, talk.resolution_status
    ) as grouped
    group by grouped.hour_period
  ),
  reply as (
    select talk.hour_period, round(avg(message.processing_time_ms))::integer as average_response_time_ms
    from talk
    join public.conversation_messages as message
      on message.organization_id = subject.organization_id
      and message.store_id = subject.id
      and message.conversation_id = talk.id
    where message.role = 'ai_assistant'
    group by talk.hour_period
  ),
  intent as (
    select
      ranked.hour_period,
      jsonb_agg(jsonb_build_object('intent', ranked.intent, 'calls', ranked.calls) order by ranked.calls desc, ranked.intent) as top_intents
    from (
      select
        entry.hour_period, entry.intent_detected as intent, count(*) as calls,
        row_number() over (partition by entry.hour_period order by count(*) desc, entry.intent_detected) as place
      from entry
      where entry.intent_detected is not null
      group by entry.hour_period, entry.intent_detected
    ) as ranked
    where ranked.place <= 10
    group by ranked.hour_period
  ),
  gone as (
    delete from public.call_analytics as old
    where old.organization_id = subject.organization_id
      and old.store_id = subject.id
      and old.date_period = day
      and not exists (select from counted where counted.hour_period is not distinct from old.hour_period)
    returning old.id
  ),
  saved as (
    insert into public.call_analytics as current (
      organization_id, store_id, date_period, hour_period, total_calls, inbound_calls, outbound_calls, answered_calls, missed_calls,
      dropped_calls, average_call_duration, average_quality_score, average_satisfaction_rating, ai_resolution_rate,
      human_escalation_rate, average_response_time_ms, top_intents, resolution_categories
    )
    select
      subject.organization_id, subject.id, day, counted.hour_period, counted.total_calls, counted.inbound_calls,
      counted.outbound_calls, counted.answered_calls, counted.missed_calls, counted.dropped_calls, counted.average_call_duration,
      counted.average_quality_score, counted.average_satisfaction_rating, resolved.ai_resolution_rate,
      resolved.human_escalation_rate, reply.average_response_time_ms, coalesce(intent.top_intents, '[]'),
      coalesce(category.resolution_categories, '{}')
    from counted
    left join resolved on resolved.hour_period is not distinct from counted.hour_period
    left join category on category.hour_period is not distinct from counted.hour_period
    left join reply on reply.hour_period is not distinct from counted.hour_period
    left join intent on intent.hour_period is not distinct from counted.hour_period
    on conflict (organization_id, store_id, date_period, hour_period) do update
    set
      total_calls = excluded.total_calls, inbound_calls = excluded.inbound_calls, outbound_calls = excluded.outbound_calls,
      answered_calls = excluded.answered_calls, missed_calls = excluded.missed_calls, dropped_calls = excluded.dropped_calls,
      average_call_duration = excluded.average_call_duration, average_quality_score = excluded.average_quality_score,
      average_satisfaction_rating = excluded.average_satisfaction_rating, ai_resolution_rate = excluded.ai_resolution_rate,
      human_escalation_rate = excluded.human_escalation_rate, average_response_time_ms = excluded.average_response_time_ms,
      top_intents = excluded.top_intents, resolution_categories = excluded.resolution_categories
    where (
      current.total_calls, current.inbound_calls, current.outbound_calls, current.answered_calls, current.missed_calls,
      current.dropped_calls, current.average_call_duration, current.average_quality_score, current.average_satisfaction_rating,
      current.ai_resolution_rate, current.human_escalation_rate, current.average_response_time_ms, current.top_intents,
      current.resolution_categories
    ) is distinct from (
      excluded.total_calls, excluded.inbound_calls, excluded.outbound_calls, excluded.answered_calls, excluded.missed_calls,
      excluded.dropped_calls, excluded.average_call_duration, excluded.average_quality_score, excluded.average_satisfaction_rating,
      excluded.ai_resolution_rate, excluded.human_escalation_rate, excluded.average_response_time_ms, excluded.top_intents,
      excluded.resolution_categories
    )
    returning current.id
  )
  select ((select count(*) from gone) + (select count(*) from saved))::integer into written;
  return written;
end
$$;
comment on function private.roll_up_call_analytics(uuid, date) is
  'Writes a store''s analytics of one day of its own time zone from its calls; again, and nothing changes. Returns the rows that changed.';


-- What a schedule calls -----------------------------------------------------------------------------------------------------------

create or replace function private.roll_up_call_analytics(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  subject record;
  last    uuid;
  stores  integer := 0;
  rows    integer := 0;
  wanted  integer := least(greatest(coalesce((request ->> 'limit')::integer, 50), 1), 1000);
begin
  for subject in
    select store.id, (at at time zone store.timezone)::date as today
    from public.stores as store
    where store.id > coalesce((request ->> 'after')::uuid, '00000000-0000-0000-0000-000000000000')
      and exists (
        select
        from public.calls as call
        where call.organization_id = store.organization_id and call.store_id = store.id and call.start_time >= at - interval '2 days'
      )
    order by store.id
    limit wanted
  loop
    last := subject.id;
    stores := stores + 1;
    rows := rows + private.roll_up_call_analytics(subject.id, subject.today - 1) + private.roll_up_call_analytics(subject.id, subject.today);
  end loop;
  return jsonb_build_object('stores', stores, 'rows', rows, 'next', case when stores = wanted then last end);
end
$$;
comment on function private.roll_up_call_analytics(jsonb, timestamptz) is
  'Rolls up yesterday and today, each in the store''s own zone, of the stores that had calls; in pages, by the id of the store.';

create or replace function public.roll_up_call_analytics(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.roll_up_call_analytics($1, private.clock_now())
$$;
comment on function public.roll_up_call_analytics(jsonb) is
  '{"v":1,"limit":50,"after":uuid|null} -> {"stores":n,"rows":n,"next":uuid|null}: next is the `after` of the next page.';

create or replace function private.auto_complete_inactive_conversations(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  completed integer;
  wanted    integer := least(greatest(coalesce((request ->> 'limit')::integer, 500), 1), 5000);
begin
  with idle as (
    select conversation.id
    from public.conversations as conversation
    where conversation.status = 'active'
      and conversation.last_activity_at < at - interval '1 hour'
      -- A long silence on a line that is open is not the end.
      and not exists (
        select
        from public.calls as call
        where call.organization_id = conversation.organization_id
          and call.store_id = conversation.store_id
          and call.conversation_id = conversation.id
          and call.attempt_status <> 'ended'
      )
    order by conversation.last_activity_at, conversation.id
    limit wanted
    for no key update skip locked
  )
  update public.conversations as conversation
  set status = 'completed', end_time = greatest(conversation.last_activity_at, conversation.start_time)
  from idle
  where conversation.id = idle.id;
  get diagnostics completed = row_count;
  return jsonb_build_object('completed', completed, 'more', completed = wanted);
end
$$;
comment on function private.auto_complete_inactive_conversations(jsonb, timestamptz) is
  'Completes conversations in which nothing was said for an hour, as of what was said last; one that somebody is writing in is left alone.';

create or replace function public.auto_complete_inactive_conversations(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.auto_complete_inactive_conversations($1, private.clock_now())
$$;
comment on function public.auto_complete_inactive_conversations(jsonb) is '{"v":1,"limit":500} -> {"completed":n,"more":bool}.';

revoke execute on function
  private.calculate_resolution_time(), private.number_message(), private.update_conversation_activity(),
  private.note_customer_contact(), private.calculate_call_duration(), private.check_call_status(),
  private.roll_up_call_analytics(uuid, date)
from public;
revoke execute on function
  private.roll_up_call_analytics(jsonb, timestamptz), public.roll_up_call_analytics(jsonb),
  private.auto_complete_inactive_conversations(jsonb, timestamptz), public.auto_complete_inactive_conversations(jsonb)
from public, anon, authenticated, service_role;
grant execute on function
  private.roll_up_call_analytics(jsonb, timestamptz), public.roll_up_call_analytics(jsonb),
  private.auto_complete_inactive_conversations(jsonb, timestamptz), public.auto_complete_inactive_conversations(jsonb)
to service_role;


-- What a screen watches live, where there is Realtime.
do $$
begin
  if exists (select from pg_catalog.pg_publication where pubname = 'supabase_realtime' and not puballtables)
    and not exists (
      select
      from pg_catalog.pg_publication_tables
      where pubname = 'supabase_realtime' and schemaname = 'public' and tablename = 'conversations'
    )
  then
    alter publication supabase_realtime add table public.conversations;
  end if;
end
$$;
