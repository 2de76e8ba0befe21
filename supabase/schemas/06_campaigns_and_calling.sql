-- Campaigns, their queue, every dial attempt, and what decides whether a number may be dialled.
--
-- Whoever changes several of these rows locks them in this order, and within one table by id, so that no two transactions wait for
-- each other: call_logs, call_queue, campaign_leads, leads, campaigns, usage counters, wallets.


-- carrier_accounts ----------------------------------------------------------------------------------------------------------------

create table public.carrier_accounts (
  id                   uuid primary key default gen_random_uuid(),
  organization_id      uuid references public.organizations (id) on delete restrict,
  provider             public.carrier_provider not null,
  name                 text,
  account_sid          text not null check (account_sid <> ''),
  credentials_sealed    text not null,
  api_base             text not null check (api_base ~ '^https?://'),
  max_concurrent_calls integer not null default 50 check (max_concurrent_calls >= 0),
  dialling_enabled     boolean not null default true,
  is_active            boolean not null default true,
  created_at           timestamptz not null default private.clock_now(),
  updated_at           timestamptz not null default private.clock_now(),
  unique (provider, account_sid)
);
create index idx_carrier_accounts_organization_id on public.carrier_accounts (organization_id);

revoke all on public.carrier_accounts from anon, authenticated, service_role;
grant select on public.carrier_accounts to service_role;
alter table public.carrier_accounts enable row level security;
alter table public.carrier_accounts force row level security;
create policy "No user sees a carrier account" on public.carrier_accounts
  for all to anon, authenticated using (false) with check (false);
create function private.keep_account_owner() returns trigger
language plpgsql set search_path = '' as $$
begin
  raise exception 'a carrier account stays with whom it is' using errcode = 'check_violation';
end
$$;
comment on function private.keep_account_owner() is 'Trigger: numbers and legs hang on an account, which no other organization takes over.';
revoke execute on function private.keep_account_owner() from public;
create trigger keep_account_owner before update of organization_id on public.carrier_accounts
  for each row when (old.organization_id is distinct from new.organization_id) execute function private.keep_account_owner();
create trigger update_modified_column before update on public.carrier_accounts
  for each row execute function private.update_modified_column();
comment on table public.carrier_accounts is
  'An account with a phone carrier; without an organization it is the platform''s own. Seen by handlers alone, its secrets sealed.';
comment on column public.carrier_accounts.credentials_sealed is
  'What the carrier knows us by and what it signs with, as a JSON object of the carrier''s own keys or a bare auth token; sealed for this row''s id.';
comment on column public.carrier_accounts.max_concurrent_calls is 'Calls in flight at once on this account, over all organizations.';


-- caller_numbers ------------------------------------------------------------------------------------------------------------------

create table public.caller_numbers (
  id                 uuid primary key default gen_random_uuid(),
  organization_id    uuid not null references public.organizations (id) on delete restrict,
  carrier_account_id uuid not null references public.carrier_accounts (id) on delete restrict,
  phone_number       text not null unique check (phone_number ~ '^\+[1-9][0-9]{1,14}$'),
  is_active          boolean not null default true,
  created_at         timestamptz not null default private.clock_now(),
  updated_at         timestamptz not null default private.clock_now(),
  unique (organization_id, id)
);
create index idx_caller_numbers_carrier_account on public.caller_numbers (carrier_account_id);

revoke all on public.caller_numbers from anon, authenticated, service_role;
grant select on public.caller_numbers to authenticated, service_role;
alter table public.caller_numbers enable row level security;
alter table public.caller_numbers force row level security;
create policy "Who views campaigns may see the numbers it calls from" on public.caller_numbers
  for select to authenticated using (organization_id = (select private.org_with('campaign.view')));

create function private.check_caller_number() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  if exists (
    select
    from public.carrier_accounts as account
    where account.id = new.carrier_account_id and account.organization_id <> new.organization_id
  ) then
    perform private.raise_error(422, 'foreign_account', 'The carrier account belongs to another organization', 'carrier_account_id');
  end if;
  return new;
end
$$;
comment on function private.check_caller_number() is
  'Trigger: a number hangs on its organization''s own carrier account, or on the platform''s; so does a leg.';
create trigger check_caller_number before insert or update of organization_id, carrier_account_id on public.caller_numbers
  for each row execute function private.check_caller_number();
create trigger update_modified_column before update on public.caller_numbers
  for each row execute function private.update_modified_column();
comment on table public.caller_numbers is 'The numbers an organization calls from. The operator assigns them, on proof that they are its own.';


-- suppressions --------------------------------------------------------------------------------------------------------------------

create table public.suppressions (
  organization_id uuid not null default public.get_auth_org_id() references public.organizations (id) on delete cascade,
  phone_number    text not null check (phone_number ~ '^\+[1-9][0-9]{6,14}$'),
  source          text not null default 'user' check (source in ('user', 'lead', 'call', 'complaint')),
  reason          text,
  created_at      timestamptz not null default private.clock_now(),
  primary key (organization_id, phone_number)
);

revoke all on public.suppressions from anon, authenticated, service_role;
grant select on public.suppressions to authenticated, service_role;
grant insert (phone_number, reason) on public.suppressions to authenticated;
alter table public.suppressions enable row level security;
alter table public.suppressions force row level security;
create policy "Who views leads may see who must not be called" on public.suppressions
  for select to authenticated using (organization_id = (select private.org_with('lead.view')));
create policy "Who edits leads may suppress a number" on public.suppressions
  for insert to authenticated with check (organization_id = (select private.org_with('lead.edit')));
comment on table public.suppressions is
  'Numbers that an organization must not call, whatever lead or campaign they are in. No user takes one back.';


-- campaigns -----------------------------------------------------------------------------------------------------------------------

create table public.campaigns (
  id                   uuid primary key default gen_random_uuid(),
  organization_id      uuid not null default public.get_auth_org_id() references public.organizations (id) on delete restrict,
  project_id           uuid,
  name                 text not null check (length(btrim(name)) between 1 and 200),
  description          text,
  status               public.campaign_status not null default 'draft',
  timezone             text not null default 'Asia/Kolkata',
  start_date           date,
  end_date             date,
  time_start           time not null default '09:00',
  time_end             time not null default '21:00',
  max_concurrent_calls integer not null default 10 check (max_concurrent_calls between 1 and 10000),
  max_attempts         smallint not null default 3 check (max_attempts between 1 and 10),
  ring_timeout_seconds integer not null default 45 check (ring_timeout_seconds between 15 and 120),
  max_call_seconds     integer not null default 600 check (max_call_seconds between 30 and 14400),
  agent_id             uuid,
  record_calls         boolean not null default false,
  auto_complete        boolean not null default true,
  ai_script            text,
  call_settings        jsonb not null default '{}' check (jsonb_typeof(call_settings) = 'object'),
  metadata             jsonb not null default '{}' check (jsonb_typeof(metadata) = 'object'),
  open_leads           integer not null default 0 check (open_leads >= 0),
  total_enrolled       integer not null default 0 check (total_enrolled >= 0),
  total_calls          integer not null default 0 check (total_calls >= 0),
  answered_calls       integer not null default 0 check (answered_calls >= 0),
  transferred_calls    integer not null default 0 check (transferred_calls >= 0),
  started_at           timestamptz,
  paused_at            timestamptz,
  completed_at         timestamptz,
  cancelled_at         timestamptz,
  archived_at          timestamptz,
  created_by           uuid default private.acting_user_id(),
  created_at           timestamptz not null default private.clock_now(),
  updated_at           timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  check (start_date <= end_date),
  foreign key (organization_id, project_id) references public.projects (organization_id, id) on delete set null (project_id),
  foreign key (organization_id, created_by) references public.profiles (organization_id, id) on delete set null (created_by)
) with (fillfactor = 70);
create index idx_campaigns_organization_id on public.campaigns (organization_id, created_at desc);
create index idx_campaigns_project on public.campaigns (organization_id, project_id);
create index idx_campaigns_created_by on public.campaigns (organization_id, created_by);
create index idx_campaigns_running on public.campaigns (id) where status = 'running';

revoke all on public.campaigns from anon, authenticated, service_role;
grant select on public.campaigns to authenticated, service_role;
grant
  insert (
    project_id, name, description, timezone, start_date, end_date, time_start, time_end, max_concurrent_calls, max_attempts, agent_id,
    record_calls, auto_complete, ai_script, call_settings, metadata
  ),
  update (
    name, description, timezone, start_date, end_date, time_start, time_end, max_concurrent_calls, agent_id, record_calls, auto_complete,
    ai_script, call_settings, metadata
  )
on public.campaigns to authenticated;
alter table public.campaigns enable row level security;
alter table public.campaigns force row level security;
create policy "Who views campaigns may see them" on public.campaigns
  for select to authenticated using (organization_id = (select private.org_with('campaign.view')));
create policy "Who edits campaigns may draft one" on public.campaigns
  for insert to authenticated with check (organization_id = (select private.org_with('campaign.edit')));
create policy "Who edits campaigns may change one that is not over" on public.campaigns
  for update to authenticated
  using (
    organization_id = (select private.org_with('campaign.edit')) and status in ('draft', 'scheduled', 'running', 'paused')
  )
  with check (organization_id = (select private.org_with('campaign.edit')));
create trigger update_modified_column before update on public.campaigns
  for each row execute function private.update_modified_column();
create trigger check_timezone before insert or update of timezone on public.campaigns
  for each row execute function private.check_timezone();
comment on table public.campaigns is
  'Leads to be called, when and how. Users describe it; its status and its counters change only through functions.';
comment on column public.campaigns.time_start is
  'From this local time of the callee on, this minute included; together with time_end clamped to 09:00-21:00. Later than time_end: overnight.';
comment on column public.campaigns.open_leads is 'Leads of this campaign that are not yet in a terminal state; at 0 the campaign completes.';
comment on column public.campaigns.total_calls is 'Attempts that rang out to the carrier and ended, each once.';
comment on column public.campaigns.answered_calls is 'Of these, the ones that a person answered.';
comment on column public.campaigns.agent_id is 'Which voice agent speaks; its websocket origin is configuration of the answering function.';

create table private.campaign_transitions (
  from_status public.campaign_status not null,
  to_status   public.campaign_status not null,
  primary key (from_status, to_status)
);
select private.close_table('private.campaign_transitions');
comment on table private.campaign_transitions is 'Every change of a campaign''s status that there is. Reference data.';
insert into private.campaign_transitions (from_status, to_status)
values
  ('draft', 'scheduled'), ('draft', 'running'), ('draft', 'cancelled'),
  ('scheduled', 'draft'), ('scheduled', 'running'), ('scheduled', 'cancelled'),
  ('running', 'paused'), ('running', 'completed'), ('running', 'cancelled'), ('running', 'failed'),
  ('paused', 'running'), ('paused', 'completed'), ('paused', 'cancelled'), ('paused', 'failed'),
  ('completed', 'archived'), ('cancelled', 'archived'), ('failed', 'archived'),
  ('archived', 'draft');

create function private.check_campaign_status() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  if not exists (
    select
    from private.campaign_transitions as allowed
    where allowed.from_status = old.status and allowed.to_status = new.status
  ) then
    perform private.raise_error(
      409, 'invalid_transition', format('A campaign that is %s cannot become %s', old.status, new.status), 'status'
    );
  end if;
  return new;
end
$$;
comment on function private.check_campaign_status() is 'Trigger: a campaign''s status changes only along private.campaign_transitions.';
create trigger check_campaign_status before update of status on public.campaigns
  for each row when (old.status is distinct from new.status) execute function private.check_campaign_status();

create function private.nudge_dispatch() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  perform private.nudge('call-dispatch');
  return null;
end
$$;
comment on function private.nudge_dispatch() is 'Trigger: there may be calls to release; the dispatcher looks now instead of within the minute.';
create trigger nudge_dispatch after update of status on public.campaigns
  for each row when (old.status is distinct from new.status and new.status = 'running') execute function private.nudge_dispatch();


-- campaign_leads ------------------------------------------------------------------------------------------------------------------

create table public.campaign_leads (
  id                   uuid primary key default gen_random_uuid(),
  organization_id      uuid not null references public.organizations (id) on delete restrict,
  campaign_id          uuid not null,
  lead_id              uuid not null,
  status               public.campaign_lead_status not null default 'enrolled',
  attempt_count        smallint not null default 0,
  last_call_attempt_at timestamptz,
  call_log_id          uuid,
  skip_reason          text,
  opted_out_at         timestamptz,
  opt_out_reason       text,
  enrolled_by          uuid,
  enrolled_at          timestamptz not null default private.clock_now(),
  created_at           timestamptz not null default private.clock_now(),
  updated_at           timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  unique (organization_id, campaign_id, lead_id),
  foreign key (organization_id, campaign_id) references public.campaigns (organization_id, id) on delete restrict,
  foreign key (organization_id, lead_id) references public.leads (organization_id, id) on delete restrict,
  foreign key (organization_id, enrolled_by) references public.profiles (organization_id, id) on delete set null (enrolled_by)
) with (fillfactor = 80);
create index idx_campaign_leads_status on public.campaign_leads (campaign_id, status);
create index idx_campaign_leads_lead on public.campaign_leads (organization_id, lead_id);
create index idx_campaign_leads_enrolled_by on public.campaign_leads (organization_id, enrolled_by);

revoke all on public.campaign_leads from anon, authenticated, service_role;
grant select on public.campaign_leads to authenticated, service_role;
alter table public.campaign_leads enable row level security;
alter table public.campaign_leads force row level security;
create policy "Who views campaigns may see their leads" on public.campaign_leads
  for select to authenticated using (organization_id = (select private.org_with('campaign.view')));
create trigger update_modified_column before update on public.campaign_leads
  for each row execute function private.update_modified_column();
comment on table public.campaign_leads is 'A lead''s way through one campaign: enrolled, queued, calling, and back or to an end.';
comment on column public.campaign_leads.attempt_count is 'Attempts that counted: neither for want of capacity nor past their time.';


-- call_queue ----------------------------------------------------------------------------------------------------------------------

create table public.call_queue (
  id              uuid primary key default private.uuid_v7(),
  organization_id uuid not null references public.organizations (id) on delete restrict,
  campaign_id     uuid not null,
  lead_id         uuid not null,
  status          public.queue_status not null default 'queued',
  priority        smallint not null default 5 check (priority between 0 and 9),
  next_retry_at   timestamptz not null,
  wait_reason     text,
  attempt_count   smallint not null default 0 check (attempt_count >= 0),
  max_attempts    smallint not null default 3 check (max_attempts >= 1),
  dispatch_count  integer not null default 0 check (dispatch_count >= 0),
  last_error      text,
  metadata        jsonb not null default '{}' check (jsonb_typeof(metadata) = 'object'),
  created_at      timestamptz not null default private.clock_now(),
  updated_at      timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  unique (organization_id, campaign_id, lead_id),
  foreign key (organization_id, campaign_id) references public.campaigns (organization_id, id) on delete restrict,
  foreign key (organization_id, lead_id) references public.leads (organization_id, id) on delete restrict
) with (fillfactor = 80);
-- Nulls first, though there are none: so that no query takes it for an order in which it would have to pass by other classes and priorities.
create index idx_call_queue_due on public.call_queue (campaign_id, next_retry_at nulls first) where status = 'queued';
create index idx_call_queue_lead on public.call_queue (organization_id, lead_id);

revoke all on public.call_queue from anon, authenticated, service_role;
grant select on public.call_queue to authenticated, service_role;
alter table public.call_queue enable row level security;
alter table public.call_queue force row level security;
create policy "Who views campaigns may see their queue" on public.call_queue
  for select to authenticated using (organization_id = (select private.org_with('campaign.view')));
create trigger update_modified_column before update on public.call_queue
  for each row execute function private.update_modified_column();
create trigger nudge_dispatch after insert on public.call_queue
  for each statement execute function private.nudge_dispatch();
comment on table public.call_queue is
  'The queue of record: one row a lead and campaign. queued waits for next_retry_at, processing has an attempt under way, the rest is over.';
comment on column public.call_queue.priority is '9 first, 0 last, within a campaign.';
comment on column public.call_queue.next_retry_at is 'Business time from which the row may be released.';
comment on column public.call_queue.wait_reason is
  'Why it waits: outside_window, bad_timezone, campaign_over, min_gap, daily_cap, monthly_cap, number_in_call, caller_number_cap, register_stale, credit_cap, no_caller_series, quota_exhausted, credit_exhausted, callback, retry_<outcome>.';
comment on column public.call_queue.dispatch_count is 'Attempts made of this row, counted or not; numbers them.';

create table private.dispatch_holds (
  organization_id uuid primary key references public.organizations (id) on delete cascade,
  held_until      timestamptz not null,
  reason          text not null
);
select private.close_table('private.dispatch_holds');
comment on table private.dispatch_holds is
  'Organizations that a release need not look at until then (business time), and why: their plan''s quota was used up.';

create table private.retry_rules (
  outcome public.call_outcome not null,
  nth     smallint not null check (nth >= 1),
  delay   interval not null check (delay > interval '0'),
  primary key (outcome, nth)
);
select private.close_table('private.retry_rules');
comment on table private.retry_rules is
  'How long to wait after the nth attempt of a lead that ended so; no row: not again. The window, the gap and the caps come on top. Reference data.';
insert into private.retry_rules (outcome, nth, delay)
values
  ('busy', 1, '15 minutes'), ('busy', 2, '45 minutes'), ('busy', 3, '2 hours'),
  ('no_answer', 1, '2 hours'), ('no_answer', 2, '1 day'), ('no_answer', 3, '2 days'),
  ('machine', 1, '4 hours'), ('machine', 2, '4 hours'),
  ('rejected', 1, '1 day'),
  ('carrier_transient', 1, '5 minutes'), ('carrier_transient', 2, '20 minutes'),
  ('our_fault', 1, '5 minutes'), ('our_fault', 2, '20 minutes'),
  ('lost', 1, '5 minutes'), ('lost', 2, '20 minutes'),
  ('failed', 1, '5 minutes'), ('failed', 2, '20 minutes');


-- call_logs -----------------------------------------------------------------------------------------------------------------------

create table public.call_logs (
  id                      uuid primary key default private.uuid_v7(),
  organization_id         uuid not null references public.organizations (id) on delete restrict,
  campaign_id             uuid,
  lead_id                 uuid,
  project_id              uuid,
  queue_id                uuid,
  attempt_no              integer not null default 1 check (attempt_no >= 1),
  direction               public.call_direction not null default 'outbound',
  carrier_account_id      uuid not null references public.carrier_accounts (id) on delete restrict,
  call_sid                text unique,
  caller_number           text not null,
  callee_number           text not null,
  status                  public.attempt_status not null default 'created',
  call_status             public.call_outcome,
  refusal_reason          text,
  dialled                 boolean not null default false,
  agent_id                uuid,
  record_call             boolean not null default false,
  ring_timeout_seconds    integer not null default 45,
  time_limit_seconds      integer not null default 600,
  lease_until             timestamptz,
  lease_token             uuid,
  not_after               timestamptz,
  begun_at                timestamptz,
  created_at              timestamptz not null default private.clock_now(),
  submitted_at            timestamptz,
  ringing_at              timestamptz,
  answered_at             timestamptz,
  ended_at                timestamptz,
  duration                integer check (duration >= 0),
  bill_duration_seconds   integer check (bill_duration_seconds >= 0),
  carrier_cost_micros     bigint check (carrier_cost_micros >= 0),
  carrier_cost_currency   text check (carrier_cost_currency ~ '^[A-Z]{3}$'),
  hangup_cause_code       text,
  hangup_cause_name       text,
  hangup_source           text,
  machine                 boolean,
  recording_url           text,
  recording_id            text,
  recording_seconds       integer check (recording_seconds >= 0),
  conversation_transcript text,
  ai_analysis             jsonb,
  summary                 text,
  sentiment_score         numeric(3, 2) check (sentiment_score between -1 and 1),
  interest_level          text,
  transferred             boolean not null default false,
  transferred_at          timestamptz,
  transfer_reason         text,
  transfer_department     text,
  disconnect_reason       text,
  disconnect_notes        text,
  notes                   text,
  metadata                jsonb not null default '{}' check (jsonb_typeof(metadata) = 'object'),
  updated_at              timestamptz not null default private.clock_now(),
  caller_id               uuid,
  unique (organization_id, id),
  unique (organization_id, queue_id, attempt_no),
  foreign key (organization_id, campaign_id) references public.campaigns (organization_id, id) on delete restrict,
  foreign key (organization_id, lead_id) references public.leads (organization_id, id) on delete restrict,
  foreign key (organization_id, project_id) references public.projects (organization_id, id) on delete set null (project_id),
  foreign key (organization_id, queue_id) references public.call_queue (organization_id, id) on delete restrict,
  foreign key (organization_id, caller_id) references public.profiles (organization_id, id) on delete set null (caller_id),
  check ((status = 'ended') = (call_status is not null)),
  check ((status = 'ended') = (ended_at is not null)),
  check (answered_at >= created_at and ended_at >= answered_at),
  check (status = 'created' or status = 'ended' or dialled or direction = 'inbound')
) with (fillfactor = 70);
create index idx_call_logs_organization_id on public.call_logs (organization_id, created_at desc);
create index idx_call_logs_campaign_id on public.call_logs (organization_id, campaign_id, created_at desc);
create index idx_call_logs_lead_id on public.call_logs (organization_id, lead_id);
create index idx_call_logs_project_id on public.call_logs (organization_id, project_id) where project_id is not null;
create index idx_call_logs_caller_id on public.call_logs (organization_id, caller_id) where caller_id is not null;
-- Nobody is called twice at once, from whichever organization: the last wall behind every other check.
create unique index idx_call_logs_live_callee on public.call_logs (callee_number) where direction = 'outbound' and status <> 'ended';
create index idx_call_logs_live on public.call_logs (carrier_account_id, organization_id, campaign_id) where status <> 'ended';
create index idx_call_logs_lease on public.call_logs (lease_until) where status <> 'ended';
create index idx_call_logs_dialled on public.call_logs (callee_number, submitted_at desc) where dialled and direction = 'outbound';

revoke all on public.call_logs from anon, authenticated, service_role;
grant select on public.call_logs to authenticated, service_role;
grant update (notes) on public.call_logs to authenticated;
alter table public.call_logs enable row level security;
alter table public.call_logs force row level security;
create policy "Who views calls may see them" on public.call_logs
  for select to authenticated using (organization_id = (select private.org_with('call.view')));
create policy "Who controls calls may note something on one" on public.call_logs
  for update to authenticated
  using (organization_id = (select private.org_with('call.control')))
  with check (organization_id = (select private.org_with('call.control')));

create function private.check_attempt() returns trigger
language plpgsql set search_path = '' as $$
begin
  if new.status < old.status then
    raise exception 'attempt % is %, it does not go back to %', old.id, old.status, new.status using errcode = 'check_violation';
  end if;
  if old.call_sid is not null and new.call_sid is distinct from old.call_sid then
    raise exception 'attempt % is bound to another call of the carrier', old.id using errcode = 'check_violation';
  end if;
  return new;
end
$$;
comment on function private.check_attempt() is 'Trigger: an attempt moves only forward, and stays with the call that it was bound to first.';
create trigger check_carrier_account before insert or update of organization_id, carrier_account_id on public.call_logs
  for each row execute function private.check_caller_number();
create trigger check_attempt before update of status, call_sid on public.call_logs
  for each row execute function private.check_attempt();
create trigger update_modified_column before update on public.call_logs
  for each row execute function private.update_modified_column();
comment on table public.call_logs is
  'One row a leg, in or out: the attempt. Committed before the carrier hears of it, ended exactly once, and alone metered. Its id is the attempt id.';
comment on column public.call_logs.caller_id is 'The user who placed it by hand; null for a campaign''s. The number it is made from is caller_number.';
comment on column public.call_logs.call_sid is 'The carrier''s id of the call; the first callback or answer that names one binds it.';
comment on column public.call_logs.call_status is 'How it ended; null until it has.';
comment on column public.call_logs.dialled is
  'The carrier may have rung the callee. False until begun, and again once it is proved that it did not. Counts for gap and caps.';
comment on column public.call_logs.lease_until is 'Real time until which somebody is expected to move the attempt on; then it is reconciled.';
comment on column public.call_logs.lease_token is 'Who began it: a lost answer to the same caller is given again.';
comment on column public.call_logs.not_after is 'Real time after which it may no longer be begun.';
comment on column public.call_logs.begun_at is 'Real time at which it was begun.';
comment on column public.call_logs.created_at is 'Business time, as submitted_at, ringing_at, answered_at and ended_at.';
comment on column public.call_logs.duration is 'Seconds from answer to end, as the carrier says.';
comment on column public.call_logs.bill_duration_seconds is 'Seconds the carrier bills, and so what the call counts.';
comment on column public.call_logs.carrier_cost_micros is 'What the carrier charges us, in millionths of carrier_cost_currency.';
comment on column public.call_logs.machine is 'An answering machine was heard.';
comment on column public.call_logs.record_call is 'The campaign records and the lead consents.';


-- What follows from a change of another row ---------------------------------------------------------------------------------------
-- A queue row that is locked is being moved by somebody who looks again; waiting for it here could close a circle of waiters.

create function private.wake_campaign() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  update public.call_queue as queue
  set next_retry_at = private.clock_now()
  where queue.id in (
    select waiting.id
    from public.call_queue as waiting
    where waiting.campaign_id = new.id
      and waiting.status = 'queued'
      and waiting.wait_reason in ('outside_window', 'bad_timezone', 'campaign_over')
    order by waiting.id
    for no key update skip locked
  );
  return null;
end
$$;
comment on function private.wake_campaign() is
  'Trigger: what waited for a campaign''s window or dates is judged again at the next release, since they have changed.';
create trigger wake_campaign after update of timezone, time_start, time_end, start_date, end_date on public.campaigns
  for each row when (
    (old.timezone, old.time_start, old.time_end, old.start_date, old.end_date)
      is distinct from (new.timezone, new.time_start, new.time_end, new.start_date, new.end_date)
  ) execute function private.wake_campaign();

create function private.wake_lead() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  update public.call_queue as queue
  set next_retry_at = private.clock_now()
  where queue.id in (
    select waiting.id
    from public.call_queue as waiting
    where waiting.organization_id = new.organization_id and waiting.lead_id = new.id and waiting.status = 'queued'
      and (
        waiting.wait_reason in ('outside_window', 'bad_timezone')
        or new.do_not_call or new.abuse_flag or new.archived_at is not null
      )
    order by waiting.id
    for no key update skip locked
  );
  return null;
end
$$;
comment on function private.wake_lead() is
  'Trigger: a lead that is elsewhere now, or must not be called any more, is judged again at the next release.';
create trigger wake_lead after update of timezone, do_not_call, abuse_flag, archived_at on public.leads
  for each row when (
    (old.timezone, old.do_not_call, old.abuse_flag, old.archived_at)
      is distinct from (new.timezone, new.do_not_call, new.abuse_flag, new.archived_at)
  ) execute function private.wake_lead();

create function private.suppress_lead() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  insert into public.suppressions (organization_id, phone_number, source, reason)
  values (new.organization_id, new.phone, 'lead', new.opt_out_reason)
  on conflict (organization_id, phone_number) do nothing;
  return null;
end
$$;
comment on function private.suppress_lead() is 'Trigger: who must not be called is not called as another lead either.';
create trigger suppress_new_lead after insert on public.leads
  for each row when (new.do_not_call and new.phone is not null) execute function private.suppress_lead();
create trigger suppress_lead after update of do_not_call, phone on public.leads
  for each row when (new.do_not_call and new.phone is not null) execute function private.suppress_lead();

create function private.wake_number() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  update public.call_queue as queue
  set next_retry_at = private.clock_now()
  where queue.id in (
    select waiting.id
    from public.leads as lead
    join public.call_queue as waiting on waiting.organization_id = lead.organization_id and waiting.lead_id = lead.id
    where lead.organization_id = new.organization_id and lead.phone = new.phone_number and waiting.status = 'queued'
    order by waiting.id
    for no key update of waiting skip locked
  );
  return null;
end
$$;
comment on function private.wake_number() is
  'Trigger: whatever waits to call a suppressed number, in any campaign, is ended at the next release.';
create trigger wake_number after insert on public.suppressions
  for each row execute function private.wake_number();

-- What a screen watches live, where there is Realtime.
do $$
begin
  if exists (select from pg_catalog.pg_publication where pubname = 'supabase_realtime' and not puballtables) then
    alter publication supabase_realtime add table public.campaigns, public.campaign_leads, public.call_logs;
  end if;
end
$$;


-- The store's view of a leg -------------------------------------------------------------------------------------------------------
-- calls and store_phone_numbers are in files before this one, which a person may paste without it: what joins them is here.

alter table public.store_phone_numbers
  add foreign key (carrier_account_id) references public.carrier_accounts (id) on delete restrict;
create trigger check_caller_number before insert or update of organization_id, carrier_account_id on public.store_phone_numbers
  for each row when (new.carrier_account_id is not null) execute function private.check_caller_number();

alter table public.calls
  add foreign key (organization_id, call_log_id) references public.call_logs (organization_id, id) on delete set null (call_log_id);

create function private.is_dropped(leg public.call_logs) returns boolean
language sql immutable parallel safe set search_path = '' as $$
  select leg.answered_at is not null and coalesce(leg.call_status in ('carrier_transient', 'our_fault', 'failed'), false)
$$;
comment on function private.is_dropped(public.call_logs) is
  'Whether a leg was answered and then ended by a fault, of the carrier or of ours.';

create function private.attach_leg() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  leg public.call_logs;
begin
  -- Shared with nobody who moves the leg on: either that move is seen here, or it sees this call and tells it.
  select log.* into leg
  from public.call_logs as log
  where log.organization_id = new.organization_id and log.id = new.call_log_id
  for share;
  if leg.id is null then
    -- The foreign key says so, in its own words.
    return new;
  end if;
  new.direction := leg.direction;
  new.from_phone := private.to_call_party(leg.caller_number);
  new.to_phone := private.to_call_party(leg.callee_number);
  new.start_time := leg.created_at;
  new.attempt_status := leg.status;
  new.call_outcome := leg.call_status;
  new.twilio_call_sid := leg.call_sid;
  new.answered_at := leg.answered_at;
  new.end_time := case when leg.ended_at is not null then greatest(leg.ended_at, leg.created_at) end;
  new.dropped_call := private.is_dropped(leg);
  new.recording_url := coalesce(leg.recording_url, new.recording_url);
  new.recording_sid := coalesce(leg.recording_id, new.recording_sid);
  new.transcript := coalesce(leg.conversation_transcript, new.transcript);
  new.ai_summary := coalesce(leg.summary, new.ai_summary);
  new.sentiment_score := coalesce(leg.sentiment_score, new.sentiment_score);
  return new;
end
$$;
comment on function private.attach_leg() is 'Trigger: a call that names its leg says what the leg says.';
create trigger attach_leg before insert or update of call_log_id on public.calls
  for each row when (new.call_log_id is not null) execute function private.attach_leg();

create function private.update_store_call() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  update public.calls as call
  set
    attempt_status = new.status,
    call_outcome = new.call_status,
    twilio_call_sid = new.call_sid,
    answered_at = new.answered_at,
    end_time = case when new.ended_at is not null then greatest(new.ended_at, call.start_time) end,
    dropped_call = private.is_dropped(new),
    recording_url = coalesce(new.recording_url, call.recording_url),
    recording_sid = coalesce(new.recording_id, call.recording_sid),
    transcript = coalesce(new.conversation_transcript, call.transcript),
    ai_summary = coalesce(new.summary, call.ai_summary),
    sentiment_score = coalesce(new.sentiment_score, call.sentiment_score)
  where call.organization_id = new.organization_id and call.call_log_id = new.id;
  return null;
end
$$;
comment on function private.update_store_call() is 'Trigger: a leg that moves on takes its store''s call along; most legs have none.';
create trigger update_store_call after update on public.call_logs
  for each row when (
    (
      old.status, old.call_status, old.call_sid, old.answered_at, old.ended_at, old.recording_url, old.recording_id,
      old.conversation_transcript, old.summary, old.sentiment_score
    ) is distinct from (
      new.status, new.call_status, new.call_sid, new.answered_at, new.ended_at, new.recording_url, new.recording_id,
      new.conversation_transcript, new.summary, new.sentiment_score
    )
  ) execute function private.update_store_call();

revoke execute on function private.is_dropped(public.call_logs), private.attach_leg(), private.update_store_call() from public;



-- What the voice agent calls a call ------------------------------------------------------------------------------------------------

alter table public.call_logs add column agent_call_id text check (length(agent_call_id) between 1 and 200);
create index idx_call_logs_agent_call_id on public.call_logs (agent_call_id) where agent_call_id is not null;
comment on column public.call_logs.agent_call_id is 'The voice agent''s own id of the conversation; its first event that names both binds it.';


-- How a lead's last call went -----------------------------------------------------------------------------------------------------

create function private.settle_lead() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  if tg_op = 'INSERT' or old.status <> 'ended' then
    -- Calls may be settled in another order than they ended in: the one that ended last stays.
    update public.leads as lead
    set call_log_id = new.id, call_status = new.call_status, last_contacted_at = new.ended_at
    where lead.organization_id = new.organization_id and lead.id = new.lead_id
      and (lead.last_contacted_at is null or (lead.last_contacted_at, coalesce(lead.call_log_id, new.id)) <= (new.ended_at, new.id));
    return null;
  end if;

  -- A correction may also take the place away: then all calls of the lead are looked at, with nobody else at it.
  perform from public.leads as lead where lead.organization_id = new.organization_id and lead.id = new.lead_id for no key update;
  update public.leads as lead
  set call_log_id = last.id, call_status = last.call_status, last_contacted_at = last.ended_at
  from (
    select log.id, log.call_status, log.ended_at
    from public.call_logs as log
    where log.organization_id = new.organization_id and log.lead_id = new.lead_id and log.status = 'ended' and log.dialled
    order by log.ended_at desc, log.id desc
    limit 1
  ) as last
  where lead.organization_id = new.organization_id and lead.id = new.lead_id
    and (lead.call_log_id, lead.call_status, lead.last_contacted_at) is distinct from (last.id, last.call_status, last.ended_at);
  return null;
end
$$;
comment on function private.settle_lead() is
  'Trigger: leads.call_status, call_log_id and last_contacted_at are those of the call that ended last, in whatever order the ends become known.';
revoke execute on function private.settle_lead() from public;
create trigger settle_new_lead after insert on public.call_logs
  for each row when (new.lead_id is not null and new.status = 'ended' and new.dialled) execute function private.settle_lead();
create trigger settle_lead after update of status, call_status, ended_at, dialled on public.call_logs
  for each row when (
    new.lead_id is not null and new.status = 'ended' and new.dialled
    and (old.status, old.call_status, old.ended_at, old.dialled) is distinct from (new.status, new.call_status, new.ended_at, new.dialled)
  ) execute function private.settle_lead();


-- Registers of numbers not to be called -------------------------------------------------------------------------------------------
-- Public registers, for every organization alike: beside suppressions, which are an organization's own. A number is on a register
-- from one version on and until before another, so that it can be said of any call which list it was checked against.

create table private.dnc_registers (
  key          text primary key check (key ~ '^[a-z][a-z0-9_]{1,30}$'),
  name         text not null,
  country_code text not null check (country_code ~ '^[A-Z]{2}$'),
  phone_prefix text not null check (phone_prefix ~ '^\+[1-9][0-9]{0,5}$'),
  max_age      interval not null default '31 days' check (max_age > interval '0'),
  is_enforced  boolean not null default false
);
select private.close_table('private.dnc_registers');
comment on table private.dnc_registers is 'The registers there are. One that is enforced and older than max_age admits no call at all.';
comment on column private.dnc_registers.phone_prefix is 'Which numbers it is about.';
comment on column private.dnc_registers.max_age is 'How old its last version may be: 31 days by 47 CFR 64.1200(c)(2).';
comment on column private.dnc_registers.is_enforced is 'Set by the operator once the first version is loaded; until then the register is only looked at.';
insert into private.dnc_registers (key, name, country_code, phone_prefix)
values
  ('us_national', 'US National Do Not Call Registry', 'US', '+1'),
  ('in_ncpr', 'India National Customer Preference Register', 'IN', '+91');

create table private.dnc_versions (
  register_key text not null references private.dnc_registers (key) on delete restrict,
  number       integer not null check (number > 0),
  label        text not null,
  is_full      boolean not null,
  obtained_at  timestamptz not null,
  published_at timestamptz,
  entries      bigint,
  sha256       bytea check (length(sha256) = 32),
  primary key (register_key, number),
  unique (register_key, label)
);
select private.close_table('private.dnc_versions');
comment on table private.dnc_versions is 'Every version of a register that was loaded. In use from published_at on, and judged by obtained_at.';
comment on column private.dnc_versions.is_full is 'The whole list; otherwise only what came and went since the version before.';
comment on column private.dnc_versions.obtained_at is 'Business time at which the register gave it out: from then on it ages.';
comment on column private.dnc_versions.sha256 is 'Of the file that was loaded.';

create table private.dnc_staged (
  register_key text not null,
  number       integer not null,
  phone_number text not null check (phone_number ~ '^\+[1-9][0-9]{6,14}$'),
  is_removed   boolean not null default false,
  primary key (register_key, number, phone_number),
  foreign key (register_key, number) references private.dnc_versions (register_key, number) on delete cascade
);
select private.close_table('private.dnc_staged');
comment on table private.dnc_staged is 'A version being loaded, by copy; empty again once it is published.';

create table private.dnc_entries (
  phone_number text not null,
  register_key text not null references private.dnc_registers (key) on delete restrict,
  listed_in    integer not null,
  removed_in   integer check (removed_in > listed_in),
  primary key (phone_number, register_key, listed_in)
);
create index idx_dnc_entries_register on private.dnc_entries (register_key, phone_number) where removed_in is null;
select private.close_table('private.dnc_entries');
comment on table private.dnc_entries is 'A number''s stretches on a register: from version listed_in on, and no longer from removed_in on.';

create function private.open_dnc_version(register text, label text, is_full boolean, obtained_at timestamptz) returns integer
language plpgsql volatile security definer set search_path = '' as $$
declare
  opened integer;
begin
  perform from private.dnc_registers as known where known.key = register for no key update;
  if not found then
    raise exception 'there is no register %', register using errcode = 'no_data_found';
  end if;
  insert into private.dnc_versions (register_key, number, label, is_full, obtained_at)
  select register, coalesce(max(version.number), 0) + 1, open_dnc_version.label, open_dnc_version.is_full, open_dnc_version.obtained_at
  from private.dnc_versions as version
  where version.register_key = register
  returning number into opened;
  return opened;
end
$$;
comment on function private.open_dnc_version(text, text, boolean, timestamptz) is
  'Begins a new version of a register and returns its number: its list is then copied into private.dnc_staged.';

create function private.publish_dnc_version(register text, version integer, at timestamptz) returns bigint
language plpgsql volatile security definer set search_path = '' as $$
declare
  opened private.dnc_versions;
  held   bigint;
begin
  perform from private.dnc_registers as known where known.key = register for no key update;
  select candidate.* into opened
  from private.dnc_versions as candidate
  where candidate.register_key = register and candidate.number = publish_dnc_version.version;
  if opened.number is null or opened.published_at is not null then
    raise exception 'version % of % is not open', version, register using errcode = 'no_data_found';
  end if;
  if exists (
    select
    from private.dnc_versions as later
    where later.register_key = register and later.number > opened.number and later.published_at is not null
  ) then
    raise exception 'a later version of % is published already', register using errcode = 'object_not_in_prerequisite_state';
  end if;
  -- An empty full list is a broken download, not a country that may be called.
  if opened.is_full and not exists (
    select from private.dnc_staged as staged where staged.register_key = register and staged.number = opened.number
  ) then
    raise exception 'version % of % is empty', version, register using errcode = 'object_not_in_prerequisite_state';
  end if;

  update private.dnc_entries as entry
  set removed_in = opened.number
  where entry.register_key = register and entry.removed_in is null
    and case
      when opened.is_full then not exists (
        select
        from private.dnc_staged as staged
        where staged.register_key = register and staged.number = opened.number
          and staged.phone_number = entry.phone_number and not staged.is_removed
      )
      else exists (
        select
        from private.dnc_staged as staged
        where staged.register_key = register and staged.number = opened.number
          and staged.phone_number = entry.phone_number and staged.is_removed
      )
    end;
  insert into private.dnc_entries (phone_number, register_key, listed_in)
  select staged.phone_number, register, opened.number
  from private.dnc_staged as staged
  where staged.register_key = register and staged.number = opened.number and not staged.is_removed
    and not exists (
      select
      from private.dnc_entries as entry
      where entry.phone_number = staged.phone_number and entry.register_key = register and entry.removed_in is null
    );
  delete from private.dnc_staged as staged where staged.register_key = register and staged.number = opened.number;
  held := (select count(*) from private.dnc_entries as entry where entry.register_key = register and entry.removed_in is null);
  update private.dnc_versions as published
  set published_at = at, entries = held
  where published.register_key = register and published.number = opened.number;
  return held;
end
$$;
comment on function private.publish_dnc_version(text, integer, timestamptz) is
  'Puts a loaded version in use, all at once, and returns how many numbers the register now holds. Refuses an empty full list.';

create function private.check_dnc(phone text, at timestamptz, out verdict text, out register_key text, out version integer)
language plpgsql stable security definer set search_path = '' as $$
declare
  register record;
begin
  for register in
    select known.key, known.max_age, latest.number, latest.obtained_at
    from private.dnc_registers as known
    left join lateral (
      select published.number, published.obtained_at
      from private.dnc_versions as published
      where published.register_key = known.key and published.published_at <= check_dnc.at
      order by published.number desc
      limit 1
    ) as latest on true
    where known.is_enforced and starts_with(phone, known.phone_prefix)
    order by known.key
  loop
    register_key := register.key;
    version := register.number;
    if register.number is null or register.obtained_at < at - register.max_age then
      verdict := 'register_stale';
      return;
    end if;
    if exists (
      select
      from private.dnc_entries as entry
      where entry.phone_number = phone and entry.register_key = register.key
        and entry.listed_in <= register.number and (entry.removed_in is null or entry.removed_in > register.number)
    ) then
      verdict := 'registered';
      return;
    end if;
  end loop;
end
$$;
comment on function private.check_dnc(text, timestamptz) is
  'Whether a register forbids to call a number: registered, or register_stale when its list is too old to say; null when it may be called. '
  'Names the register and the version that was looked at, for the record.';


-- Calling hours by law ------------------------------------------------------------------------------------------------------------

create table public.calling_hours (
  jurisdiction text not null check (jurisdiction ~ '^[A-Z]{2}(-[A-Z0-9]{1,3})?$'),
  purpose      text not null check (purpose in ('service', 'promotional')),
  weekday      smallint not null check (weekday between 1 and 7),
  opens        time,
  closes       time,
  on_holidays  boolean not null default true,
  daily_calls  smallint check (daily_calls > 0),
  basis        text not null,
  evidence     text not null default 'operator' check (
    evidence in ('rule', 'secondary', 'not verified; stricter default', 'operator')
  ),
  primary key (jurisdiction, purpose, weekday),
  check ((opens is null) = (closes is null)),
  check (opens < closes)
);

revoke all on public.calling_hours from anon, authenticated, service_role;
grant select on public.calling_hours to authenticated, service_role;
alter table public.calling_hours enable row level security;
alter table public.calling_hours force row level security;
create policy "Anyone signed in may read the legal hours" on public.calling_hours
  for select to authenticated using (true);
comment on table public.calling_hours is
  'When the law of a country, and of a state within it, lets somebody be called, in their own local time; both must. Reference data, to be '
  'checked by a lawyer before launch. A country without rows: nobody is called there.';
comment on column public.calling_hours.jurisdiction is 'ISO 3166: a country, or country-state.';
comment on column public.calling_hours.weekday is 'ISO: 1 is Monday, 7 is Sunday.';
comment on column public.calling_hours.opens is 'The opening minute belongs to it, the closing one does not; null is not at all that day.';
comment on column public.calling_hours.on_holidays is 'Whether these hours also hold on a public holiday; otherwise nobody is called on one.';
comment on column public.calling_hours.daily_calls is 'Calls to one person in 24 hours, where the law counts them.';
comment on column public.calling_hours.basis is 'What law or rule it is taken from, as far as that is known.';
comment on column public.calling_hours.evidence is
  'How well it is known. rule: the text of the rule was read; secondary: guides that agree, and not the text itself; not verified: it could not be '
  'confirmed, or guides disagree, and the stricter reading is taken; operator: whoever runs this answers for it.';
insert into public.calling_hours (jurisdiction, purpose, weekday, opens, closes, on_holidays, daily_calls, basis, evidence)
select
  law.jurisdiction, purpose.name, day.number,
  case when day.number = 7 then law.sunday_opens when day.number = 6 then law.saturday_opens else law.opens end::time,
  case when day.number = 7 then law.sunday_closes when day.number = 6 then law.saturday_closes else law.closes end::time,
  law.on_holidays, law.daily_calls, law.basis,
  case law.evidence when 'no' then 'not verified; stricter default' else law.evidence end
from (
  values
    ('US', 'service promotional', '08:00', '21:00', '08:00', '21:00', '08:00', '21:00', true, null::smallint, '47 CFR 64.1200(c)(1)', 'rule'),
    ('US-AL', 'service promotional', '08:00', '20:00', '08:00', '20:00', null, null, false, null, 'Alabama; section not known', 'secondary'),
    ('US-CT', 'service promotional', '09:00', '20:00', '09:00', '20:00', '09:00', '20:00', true, null, 'Conn. Gen. Stat. 42-288a', 'secondary'),
    ('US-FL', 'service promotional', '08:00', '20:00', '08:00', '20:00', '08:00', '20:00', true, 3, 'Fla. Stat. 501.616(6)', 'rule'),
    ('US-KY', 'service promotional', '10:00', '21:00', '10:00', '21:00', '10:00', '21:00', true, null, 'KRS 367.46955', 'secondary'),
    ('US-LA', 'service promotional', '08:00', '20:00', '08:00', '20:00', null, null, false, null, 'LPSC General Order R-29617', 'secondary'),
    ('US-MA', 'service promotional', '08:00', '20:00', '08:00', '20:00', '08:00', '20:00', true, null, 'M.G.L. c. 159C', 'secondary'),
    ('US-MD', 'service promotional', '08:00', '20:00', '08:00', '20:00', '08:00', '20:00', true, 3, 'Md. Com. Law 14-4502', 'secondary'),
    ('US-MI', 'service promotional', '09:00', '21:00', '09:00', '21:00', '09:00', '21:00', true, null, 'Michigan; section not known', 'secondary'),
    ('US-MN', 'service promotional', '09:00', '21:00', '09:00', '21:00', '09:00', '21:00', true, null, 'Minnesota; section not known', 'secondary'),
    -- One guide ends the day at 20:00, the statute at 21:00; the holiday rule is said to be repealed, and is still listed.
    ('US-MS', 'service promotional', '08:00', '20:00', '08:00', '20:00', null, null, false, null, 'Miss. Code 77-3-603, 77-3-723', 'no'),
    -- On Sundays and holidays it is recorded messages that are restricted; a voice that is made counts as one here.
    ('US-NE', 'service promotional', '08:00', '21:00', '08:00', '21:00', '13:00', '21:00', false, null, '291 Neb. Admin. Code 11', 'secondary'),
    ('US-NM', 'service promotional', '09:00', '21:00', '09:00', '21:00', '09:00', '21:00', true, null, 'New Mexico; section not known', 'secondary'),
    ('US-NV', 'service promotional', '09:00', '20:00', '09:00', '20:00', '09:00', '20:00', true, null, 'NRS 597.814; guides', 'secondary'),
    -- From nine on by the rule for automatic announcing devices, to eight by the newer one for automatic selection.
    ('US-OK', 'service promotional', '09:00', '20:00', '09:00', '20:00', '09:00', '20:00', true, 3, 'Okla. Stat. 15-755.1, 15-775C.4', 'secondary'),
    ('US-PA', 'service promotional', '08:00', '21:00', '08:00', '12:00', '08:00', '21:00', false, null, '73 P.S. 2245(a); Saturday by one guide', 'no'),
    ('US-RI', 'service promotional', '09:00', '18:00', '10:00', '17:00', null, null, false, null, 'R.I. Gen. Laws 5-61-2, 5-61-3.6', 'rule'),
    -- Automated dialling on weekdays alone.
    ('US-SD', 'service promotional', '09:00', '21:00', null, null, null, null, true, null, 'S.D. Codified Laws 37-30-28', 'rule'),
    ('US-TX', 'service promotional', '09:00', '21:00', '09:00', '21:00', '12:00', '21:00', true, null, 'Texas; section not known', 'no'),
    ('US-UT', 'service promotional', '08:00', '21:00', '08:00', '21:00', null, null, false, null, 'Utah Code 13-25a-103(3)', 'rule'),
    ('US-WA', 'service promotional', '08:00', '20:00', '08:00', '20:00', '08:00', '20:00', true, null, 'RCW 19.158.040(2)', 'rule'),
    ('US-WY', 'service promotional', '08:00', '20:00', '08:00', '20:00', '08:00', '20:00', true, null, 'Wyoming; section not known', 'no'),
    ('IN', 'service', '09:00', '21:00', '09:00', '21:00', '09:00', '21:00', true, null, 'TRAI TCCCPR 2010', 'secondary'),
    ('IN', 'promotional', '10:00', '21:00', '10:00', '21:00', '10:00', '21:00', true, null, 'India; common practice', 'no')
) as law (
  jurisdiction, purposes, opens, closes, saturday_opens, saturday_closes, sunday_opens, sunday_closes, on_holidays, daily_calls, basis,
  evidence
)
cross join lateral unnest(string_to_array(law.purposes, ' ')) as purpose (name)
cross join generate_series(1, 7) as day (number);

create table public.calling_holidays (
  jurisdiction text not null check (jurisdiction ~ '^[A-Z]{2}(-[A-Z0-9]{1,3})?$'),
  day          date not null,
  name         text not null,
  evidence     text not null default 'operator' check (
    evidence in ('rule', 'secondary', 'not verified; stricter default', 'operator')
  ),
  primary key (jurisdiction, day)
);

revoke all on public.calling_holidays from anon, authenticated, service_role;
grant select on public.calling_holidays to authenticated, service_role;
alter table public.calling_holidays enable row level security;
alter table public.calling_holidays force row level security;
create policy "Anyone signed in may read the holidays" on public.calling_holidays
  for select to authenticated using (true);
comment on table public.calling_holidays is
  'Public holidays, of a country or of a state alone; the operator adds each year''s. They matter where calling_hours says so: there nobody is '
  'called after the last one that is known of the country.';
comment on column public.calling_holidays.evidence is
  'As in calling_hours. rule is 5 U.S.C. 6103; the Friday before a Saturday and the Monday after a Sunday are taken along.';
insert into public.calling_holidays (jurisdiction, day, name, evidence)
values
  ('US', '2026-11-26', 'Thanksgiving Day', 'rule'), ('US', '2026-12-25', 'Christmas Day', 'rule'),
  ('US', '2027-01-01', 'New Year''s Day', 'rule'), ('US', '2027-01-18', 'Martin Luther King Jr. Day', 'rule'),
  ('US', '2027-02-15', 'Washington''s Birthday', 'rule'), ('US', '2027-05-31', 'Memorial Day', 'rule'),
  ('US', '2027-06-18', 'Juneteenth (observed)', 'rule'), ('US', '2027-06-19', 'Juneteenth', 'rule'),
  ('US', '2027-07-04', 'Independence Day', 'rule'), ('US', '2027-07-05', 'Independence Day (observed)', 'rule'),
  ('US', '2027-09-06', 'Labor Day', 'rule'), ('US', '2027-10-11', 'Columbus Day', 'rule'), ('US', '2027-11-11', 'Veterans Day', 'rule'),
  ('US', '2027-11-25', 'Thanksgiving Day', 'rule'), ('US', '2027-12-24', 'Christmas Day (observed)', 'rule'),
  ('US', '2027-12-25', 'Christmas Day', 'rule'), ('US', '2027-12-31', 'New Year''s Day (observed)', 'rule'),
  ('US', '2028-01-01', 'New Year''s Day', 'rule'),
  ('US-AL', '2027-02-09', 'Mardi Gras', 'not verified; stricter default'),
  ('US-AL', '2027-04-26', 'Confederate Memorial Day', 'not verified; stricter default'),
  ('US-AL', '2027-06-07', 'Jefferson Davis'' Birthday', 'not verified; stricter default'),
  ('US-LA', '2027-01-08', 'Battle of New Orleans', 'secondary'), ('US-LA', '2027-01-19', 'Robert E. Lee Day', 'secondary'),
  ('US-LA', '2027-02-09', 'Mardi Gras', 'not verified; stricter default'),
  ('US-LA', '2027-03-26', 'Good Friday', 'not verified; stricter default'),
  ('US-MS', '2027-04-26', 'Confederate Memorial Day', 'not verified; stricter default'),
  ('US-PA', '2027-03-26', 'Good Friday', 'not verified; stricter default'),
  ('US-PA', '2027-06-14', 'Flag Day', 'not verified; stricter default'),
  ('US-RI', '2027-08-09', 'Victory Day', 'secondary'),
  ('US-UT', '2027-07-23', 'Pioneer Day (observed)', 'not verified; stricter default'), ('US-UT', '2027-07-24', 'Pioneer Day', 'secondary');

create function private.legal_hours(
  country text, region text, wanted text, day date, out opens time, out closes time, out daily_calls smallint
)
language plpgsql stable security definer set search_path = '' as $$
begin
  -- The country's and the state's hours at once; what either forbids is forbidden.
  select max(law.opens), min(law.closes), min(law.daily_calls)
  into opens, closes, daily_calls
  from public.calling_hours as law
  where law.jurisdiction in (country, country || '-' || region) and law.purpose = wanted and law.weekday = extract(isodow from day);
  if opens >= closes
    or not exists (
      select from public.calling_hours as law where law.jurisdiction = country and law.purpose = wanted
    )
    or exists (
      select
      from public.calling_hours as law
      where law.jurisdiction in (country, country || '-' || region) and law.purpose = wanted and law.weekday = extract(isodow from day)
        and (
          law.opens is null
          or not law.on_holidays and (
            exists (
              select
              from public.calling_holidays as holiday
              where holiday.jurisdiction in (country, country || '-' || region) and holiday.day = legal_hours.day
            )
            -- Of a year whose holidays nobody entered it is not known which days they are.
            or legal_hours.day > coalesce(
              (select max(holiday.day) from public.calling_holidays as holiday where holiday.jurisdiction = country), '-infinity'
            )
          )
        )
    )
  then
    opens := null;
    closes := null;
  end if;
end
$$;
comment on function private.legal_hours(text, text, text, date) is
  'The local hours in which the law of a country and state allows a call on a day; null when it does not, or when nothing is known of the country.';

revoke execute on function
  private.open_dnc_version(text, text, boolean, timestamptz), private.publish_dnc_version(text, integer, timestamptz),
  private.check_dnc(text, timestamptz), private.legal_hours(text, text, text, date)
from public;


-- websocket_sessions --------------------------------------------------------------------------------------------------------------

create table public.websocket_sessions (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null references public.organizations (id) on delete cascade,
  kind            text not null check (kind in ('dashboard', 'agent')),
  user_id         uuid,
  call_log_id     uuid,
  agent_id        uuid,
  connection_id   text not null unique check (length(connection_id) between 1 and 255),
  metadata        jsonb not null default '{}' check (jsonb_typeof(metadata) = 'object'),
  created_at      timestamptz not null default private.clock_now(),
  last_ping_at    timestamptz not null default now(),
  unique (organization_id, id),
  foreign key (organization_id, user_id) references public.profiles (organization_id, id) on delete cascade,
  foreign key (organization_id, call_log_id) references public.call_logs (organization_id, id) on delete cascade,
  check (case kind when 'dashboard' then user_id is not null and call_log_id is null else call_log_id is not null and user_id is null end)
) with (fillfactor = 70);
create index idx_websocket_sessions_user on public.websocket_sessions (organization_id, user_id) where user_id is not null;
-- A call has one voice: the second socket of a leg is refused while the first lives.
create unique index idx_websocket_sessions_call on public.websocket_sessions (organization_id, call_log_id) where call_log_id is not null;
create index idx_websocket_sessions_last_ping on public.websocket_sessions (last_ping_at);

revoke all on public.websocket_sessions from anon, authenticated, service_role;
-- Not the connection's id: whoever has it could speak on it.
grant select (id, organization_id, kind, user_id, call_log_id, agent_id, metadata, created_at, last_ping_at)
on public.websocket_sessions to authenticated;
grant select on public.websocket_sessions to service_role;
alter table public.websocket_sessions enable row level security;
alter table public.websocket_sessions force row level security;
create policy "Users see their own sockets, and who views calls their agents'" on public.websocket_sessions
  for select to authenticated
  using (
    organization_id = (select private.get_auth_org_id()) and user_id = (select auth.uid())
    or organization_id = (select private.org_with('call.view')) and kind = 'agent'
  );
comment on table public.websocket_sessions is
  'Sockets that are open now: a user''s dashboard, or the voice agent of one leg. Written by handlers, kept by pings, reaped without them.';
comment on column public.websocket_sessions.connection_id is 'What the socket server or gateway calls it.';
comment on column public.websocket_sessions.last_ping_at is 'Real time.';

create function private.open_websocket(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  socket public.websocket_sessions;
  leg    public.call_logs;
begin
  if coalesce(request ->> 'connection_id', '') = '' or length(request ->> 'connection_id') > 255
    or request ->> 'kind' not in ('dashboard', 'agent') or request ->> 'kind' is null
  then
    perform private.raise_error(400, 'malformed_request', 'connection_id and kind are required');
  end if;
  -- Whose it is follows from the user or the leg; no caller names an organization.
  if request ->> 'kind' = 'dashboard' then
    select profile.organization_id, profile.id into socket.organization_id, socket.user_id
    from public.profiles as profile
    where profile.id = (request ->> 'user_id')::uuid and profile.status = 'active' and profile.organization_id is not null
    for key share;
    if socket.user_id is null then
      perform private.raise_error(403, 'no_organization', 'The user belongs to no organization', 'user_id');
    end if;
  else
    select log.* into leg from public.call_logs as log where log.id = (request ->> 'attempt_id')::uuid for key share;
    if leg.id is null then
      perform private.raise_error(404, 'call_not_found', 'There is no such call', 'attempt_id');
    end if;
    if leg.status = 'ended' then
      perform private.raise_error(409, 'call_ended', 'The call has ended', 'attempt_id');
    end if;
  end if;
  delete from public.websocket_sessions as lapsed
  where (lapsed.connection_id = request ->> 'connection_id' or lapsed.organization_id = leg.organization_id and lapsed.call_log_id = leg.id)
    and lapsed.last_ping_at < now() - interval '90 seconds';
  insert into public.websocket_sessions (organization_id, kind, user_id, call_log_id, agent_id, connection_id, metadata, created_at, last_ping_at)
  values (
    coalesce(leg.organization_id, socket.organization_id), request ->> 'kind', socket.user_id, leg.id, leg.agent_id,
    request ->> 'connection_id', coalesce(request -> 'metadata', '{}'), at, now()
  )
  on conflict do nothing
  returning * into socket;
  if socket.id is null then
    perform private.raise_error(409, 'already_connected', 'There is a live socket of this connection or call', 'connection_id');
  end if;
  return jsonb_build_object('id', socket.id, 'organization_id', socket.organization_id);
end
$$;
comment on function private.open_websocket(jsonb, timestamptz) is 'Writes down a socket that was opened, for the tenant of its user or leg.';

create function public.open_websocket(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.open_websocket($1, private.clock_now())
$$;
comment on function public.open_websocket(jsonb) is
  '{"v":1,"connection_id":text,"kind":"dashboard","user_id":uuid} or {…"kind":"agent","attempt_id":uuid} -> {"id","organization_id"}. '
  '409 while another socket of the call or connection lives.';

create function private.ping_websockets(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  asked text[] := array(select jsonb_array_elements_text(request -> 'connection_ids'));
  alive text[];
begin
  with pinged as (
    select socket.id
    from public.websocket_sessions as socket
    where socket.connection_id = any (asked)
    order by socket.id
    for no key update
  ),
  moved as (
    update public.websocket_sessions as socket
    set last_ping_at = greatest(socket.last_ping_at, now())
    from pinged
    where socket.id = pinged.id
    returning socket.connection_id
  )
  select coalesce(array_agg(moved.connection_id), '{}') into alive from moved;
  return jsonb_build_object('gone', (
    select coalesce(jsonb_agg(missing.id), '[]') from unnest(asked) as missing (id) where missing.id <> all (alive)
  ));
end
$$;
comment on function private.ping_websockets(jsonb, timestamptz) is 'Keeps sockets alive, and names those that are no longer known: their server closes them.';

create function public.ping_websockets(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.ping_websockets($1, private.clock_now())
$$;
comment on function public.ping_websockets(jsonb) is
  '{"v":1,"connection_ids":[text]} -> {"gone":[text]}: reaped, or of a user who may no longer see anything. At least once in 60 seconds.';

create function private.close_websocket(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  closed integer;
begin
  delete from public.websocket_sessions as socket where socket.connection_id = request ->> 'connection_id';
  get diagnostics closed = row_count;
  return jsonb_build_object('closed', closed);
end
$$;
comment on function private.close_websocket(jsonb, timestamptz) is 'Forgets a socket that was closed; again changes nothing.';

create function public.close_websocket(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.close_websocket($1, private.clock_now())
$$;
comment on function public.close_websocket(jsonb) is '{"v":1,"connection_id":text} -> {"closed":0|1}.';

create function private.reap_websockets(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  most   constant integer := least(greatest(coalesce((request ->> 'limit')::integer, 1000), 1), 10000);
  reaped jsonb;
begin
  with lapsed as (
    select socket.id
    from public.websocket_sessions as socket
    where socket.last_ping_at < now() - interval '90 seconds'
    order by socket.last_ping_at
    limit most
    for update skip locked
  ),
  gone as (
    delete from public.websocket_sessions as socket
    using lapsed
    where socket.id = lapsed.id
    returning socket.kind, socket.organization_id, socket.call_log_id, socket.connection_id
  )
  select jsonb_build_object(
    'reaped', count(*),
    'calls', coalesce(
      jsonb_agg(jsonb_build_object('organization_id', gone.organization_id, 'attempt_id', gone.call_log_id))
        filter (where gone.kind = 'agent' and exists (
          select from public.call_logs as log where log.id = gone.call_log_id and log.status <> 'ended'
        )),
      '[]'
    )
  )
  into reaped
  from gone;
  return reaped;
end
$$;
comment on function private.reap_websockets(jsonb, timestamptz) is
  'Forgets sockets that have not been heard of for 90 seconds, and names the calls that go on without their agent.';

create function public.reap_websockets(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.reap_websockets($1, private.clock_now())
$$;
comment on function public.reap_websockets(jsonb) is
  '{"v":1,"limit":1000} -> {"reaped":n,"calls":[{"organization_id","attempt_id"}]}: calls under way whose agent is gone. Every minute.';

create function private.drop_websockets() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  delete from public.websocket_sessions as socket where socket.organization_id = old.organization_id and socket.user_id = old.id;
  return new;
end
$$;
comment on function private.drop_websockets() is
  'Trigger: who is suspended, removed or in another organization has no socket of the old one; the next ping tells its server.';
create trigger drop_websockets before update of status, organization_id on public.profiles
  for each row when (
    old.organization_id is not null and (new.status <> 'active' or new.organization_id is distinct from old.organization_id)
  ) execute function private.drop_websockets();

revoke execute on function private.drop_websockets() from public;
revoke execute on function
  public.open_websocket(jsonb), public.ping_websockets(jsonb), public.close_websocket(jsonb), public.reap_websockets(jsonb),
  private.open_websocket(jsonb, timestamptz), private.ping_websockets(jsonb, timestamptz),
  private.close_websocket(jsonb, timestamptz), private.reap_websockets(jsonb, timestamptz)
from public, anon, authenticated, service_role;
grant execute on function
  public.open_websocket(jsonb), public.ping_websockets(jsonb), public.close_websocket(jsonb), public.reap_websockets(jsonb),
  private.open_websocket(jsonb, timestamptz), private.ping_websockets(jsonb, timestamptz),
  private.close_websocket(jsonb, timestamptz), private.reap_websockets(jsonb, timestamptz)
to service_role;


-- The agent's stream, and where a call was transferred to ---------------------------------------------------------------------------
-- The words stand in the order of their rank: whichever report comes first, the later word stays.

alter table public.call_logs
  add column stream_id text,
  add column stream_status text check (stream_status in ('started', 'degraded', 'stopped', 'failed')),
  add column stream_error text,
  add column transfer_sid text,
  add column transfer_status text check (
    transfer_status in ('initiated', 'ringing', 'cancelled', 'failed', 'no_answer', 'busy', 'answered', 'completed')
  );
comment on column public.call_logs.stream_id is 'The carrier''s id of the agent''s audio stream.';
comment on column public.call_logs.stream_status is 'How the agent''s audio stream fares, as the carrier says.';
comment on column public.call_logs.stream_error is 'What broke the stream, in the carrier''s words.';
comment on column public.call_logs.transfer_sid is 'The carrier''s id of the leg to the person that the call was transferred to.';
comment on column public.call_logs.transfer_status is 'How the transfer fared: of two tries one that was answered counts.';


-- Switches, pace and turns ---------------------------------------------------------------------------------------------------------
-- Four switches stop dialling at once: the platform's, a carrier account's, an organization's and a campaign's. None is a user's.

create table private.platform_dialling (
  single           boolean primary key default true check (single),
  dialling_enabled boolean not null default true,
  reason           text,
  retry_jitter     numeric not null default 0.2 check (retry_jitter between 0 and 0.5)
);
select private.close_table('private.platform_dialling');
comment on table private.platform_dialling is 'What holds for every dial of the platform: one row, which the operator changes.';
comment on column private.platform_dialling.dialling_enabled is 'Off: no call is begun for anybody; those under way go on to their end.';
comment on column private.platform_dialling.reason is 'Why it is off, for whoever finds it so.';
comment on column private.platform_dialling.retry_jitter is
  'By which part a retry may come sooner or later than its rule says, so that what failed together does not return together.';
insert into private.platform_dialling (single)
values
  (true);
alter table private.platform_dialling
  add column monthly_dials smallint not null default 15,
  add column lifetime_dials smallint not null default 60;
alter table private.platform_dialling
  add constraint platform_dialling_dials_range check (monthly_dials between 1 and 60 and lifetime_dials between monthly_dials and 1000);
comment on column private.platform_dialling.monthly_dials is 'Dials of one number by one organization in any 30 days at most, over all its campaigns.';
comment on column private.platform_dialling.lifetime_dials is 'Dials of one number by one organization at most, ever; beyond, the lead is over.';

alter table public.campaigns add column dialling_enabled boolean not null default true;
comment on column public.campaigns.dialling_enabled is 'The operator''s switch: off, nothing of this campaign is begun, whatever its users do.';

alter table public.organizations add column dispatch_weight smallint not null default 1;
alter table public.organizations add constraint organizations_dispatch_weight_range check (dispatch_weight between 1 and 100);
comment on column public.organizations.dispatch_weight is 'Calls it is given for each one of an organization of weight 1, while both have some due.';

alter table public.carrier_accounts add column max_calls_per_second numeric(7, 3);
alter table public.carrier_accounts add constraint carrier_accounts_pace_positive check (max_calls_per_second > 0);
comment on column public.carrier_accounts.max_calls_per_second is
  'Dials a second, to be set below what the carrier admits, since it queues what is above without a word; null is without limit.';

alter table public.caller_numbers add column daily_calls integer;
alter table public.caller_numbers add constraint caller_numbers_daily_calls_positive check (daily_calls > 0);
comment on column public.caller_numbers.daily_calls is 'Calls from it in 24 hours before it rests; null is without limit.';

alter table public.call_queue add column dial_class smallint not null default 0;
alter table public.call_queue add constraint call_queue_dial_class_range check (dial_class between 0 and 2);
comment on column public.call_queue.dial_class is
  '2: somebody asked to be called at a time; 1: a retry; 0: never called. Promised ones go first, retries get no more than every other place while there are fresh ones.';
create index idx_call_queue_poll on public.call_queue (campaign_id, dial_class, priority desc, next_retry_at) where status = 'queued';
create index idx_call_logs_caller_number on public.call_logs (caller_number, created_at desc) where direction = 'outbound';

create table private.carrier_pace (
  carrier_account_id uuid primary key references public.carrier_accounts (id) on delete cascade,
  tokens             numeric(12, 6) not null,
  refilled_at        timestamptz not null,
  turn               numeric(20, 6) not null default 0
);
select private.close_table('private.carrier_pace');
comment on table private.carrier_pace is 'How much of a carrier account''s pace is left, and whose turn it is. Written under the lock of releases alone.';
comment on column private.carrier_pace.tokens is 'Calls that might have been begun at refilled_at, a second''s worth at most.';
comment on column private.carrier_pace.refilled_at is 'Real time.';
comment on column private.carrier_pace.turn is 'The turn of the call that was last given out: who comes back from having nothing due begins here, and saves up nothing.';

create table private.dispatch_turns (
  organization_id    uuid not null references public.organizations (id) on delete cascade,
  carrier_account_id uuid not null references public.carrier_accounts (id) on delete cascade,
  turn               numeric(20, 6) not null,
  primary key (organization_id, carrier_account_id)
);
create index idx_dispatch_turns_carrier_account on private.dispatch_turns (carrier_account_id);
select private.close_table('private.dispatch_turns');
comment on table private.dispatch_turns is
  'The turn at which an organization gets its next call on an account; each call moves it on by one over its weight, and the lowest goes first.';

-- Retries of a campaign's own, and what stops a failing line ------------------------------------------------------------------------

alter table public.campaigns add column retry_rules jsonb not null default '{}';
alter table public.campaigns add constraint campaigns_retry_rules_object check (jsonb_typeof(retry_rules) = 'object');
comment on column public.campaigns.retry_rules is
  'Its own waits in minutes by outcome, as {"busy":[30,90]}; of an outcome that is not named the platform''s hold. No more and no sooner '
  'than these allow: window, gap and caps come on top.';
grant insert (retry_rules), update (retry_rules) on public.campaigns to authenticated;

alter table private.retry_rules add column other_part boolean not null default false;
comment on column private.retry_rules.other_part is 'At another time of the day than the attempt that failed: morning, afternoon or evening.';
update private.retry_rules set other_part = true where outcome = 'no_answer' and nth > 1 or outcome = 'machine';

create function private.check_retry_rules() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  rule record;
begin
  for rule in select wanted.key, wanted.value from jsonb_each(new.retry_rules) as wanted loop
    if not exists (select from private.retry_rules as known where known.outcome::text = rule.key) then
      perform private.raise_error(422, 'invalid_setting', format('Nobody is called again after %L', rule.key), 'retry_rules');
    end if;
    if jsonb_typeof(rule.value) <> 'array'
      or jsonb_array_length(rule.value) > (select count(*) from private.retry_rules as known where known.outcome::text = rule.key)
      or exists (
        select
        from jsonb_array_elements(rule.value) as wait
        where case when jsonb_typeof(wait.value) = 'number' then wait.value::numeric not between 5 and 20160 or wait.value::numeric % 1 <> 0 else true end
      )
    then
      perform private.raise_error(
        422, 'invalid_setting', format('%s takes as many whole minutes from 5 to 20160 as there are retries, or fewer', rule.key), 'retry_rules'
      );
    end if;
  end loop;
  return new;
end
$$;
comment on function private.check_retry_rules() is 'Trigger: a campaign''s own retries are of outcomes that have any, and no more than those.';
revoke execute on function private.check_retry_rules() from public;
create trigger check_retry_rules before insert or update of retry_rules on public.campaigns
  for each row when (new.retry_rules <> '{}') execute function private.check_retry_rules();

create table private.breakers (
  scope    uuid primary key,
  is_open  boolean not null,
  since    timestamptz not null,
  retry_at timestamptz
);
select private.close_table('private.breakers');
comment on table private.breakers is
  'Carrier accounts and campaigns whose calls failed by a fault of carrier or ours, half of ten or more in two minutes. Written under the lock of releases alone.';
comment on column private.breakers.scope is 'The id of the account or campaign.';
comment on column private.breakers.since is 'Business time at which it opened or closed; what ended before is not counted again.';
comment on column private.breakers.retry_at is 'Business time from which one call at a time tries whether it is over.';

alter table private.carrier_pace
  add column ceiling integer check (ceiling > 0),
  add column ceiling_at timestamptz;
comment on column private.carrier_pace.ceiling is 'Calls in flight for now, since the carrier had no room for more: halved each time, and one more for each minute without; null is none.';
comment on column private.carrier_pace.ceiling_at is 'Business time at which the ceiling last changed.';

create index idx_call_logs_ended on public.call_logs (ended_at desc) where status = 'ended' and direction = 'outbound';
create index idx_call_logs_faults on public.call_logs (ended_at desc)
  where direction = 'outbound' and call_status in ('carrier_transient', 'our_fault', 'lost', 'capacity');

-- Where a number is, and whether it may be called at all -----------------------------------------------------------------------------

create table private.destinations (
  prefix  text primary key check (prefix ~ '^\+[1-9][0-9]{0,6}$'),
  country text check (country ~ '^[A-Z]{2}$'),
  region  text check (region ~ '^[A-Z0-9]{1,3}$'),
  zones   text[] check (cardinality(zones) > 0),
  kind    text not null default 'ordinary' check (kind in ('ordinary', 'premium', 'shared_cost', 'satellite')),
  digits  smallint check (digits between 7 and 15)
);
select private.close_table('private.destinations');
comment on table private.destinations is
  'What the longest prefix of a number says of it. A number of no prefix, of no country, of other digits than its prefix has, or of another kind '
  'than ordinary is never called. Reference data, to be checked before launch and kept up to date: of an area code that is not listed it is not '
  'known which law holds, and nobody is called there.';
comment on column private.destinations.region is
  'The state, whose law holds besides the country''s (calling_hours). Of a person who moved and kept the number it is not true: their zone decides besides.';
comment on column private.destinations.zones is
  'Every zone of the state or country: of somebody whose own zone is not known it must be a legal hour in all of them. Null is not known either.';
comment on column private.destinations.digits is 'How many a whole number has; what is shorter is a short code.';
insert into private.destinations (prefix, country, zones, kind, digits)
values
  -- What begins with +1 and an area code that is not listed, free of charge for the callee or new, is of no state.
  ('+1', null, null, 'ordinary', 11), ('+1900', 'US', null, 'premium', 11), ('+91', 'IN', '{Asia/Kolkata}', 'ordinary', 12),
  ('+911860', 'IN', null, 'shared_cost', 11), ('+911900', 'IN', null, 'premium', null), ('+808', null, null, 'shared_cost', null),
  ('+870', null, null, 'satellite', null), ('+878', null, null, 'premium', null), ('+881', null, null, 'satellite', null),
  ('+882', null, null, 'satellite', null), ('+883', null, null, 'satellite', null), ('+979', null, null, 'premium', null);
insert into private.destinations (prefix, country, region, zones, digits)
select '+1' || area.code, area.country, area.region, area.zones, 11
from (
  select
    split_part(listed.place, '-', 1) as country, nullif(split_part(listed.place, '-', 2), '') as region,
    string_to_array(listed.zones, ' ') as zones, unnest(string_to_array(listed.codes, ' ')) as code
  from (
    values
      ('US-AK', 'America/Anchorage America/Adak', '907'),
      ('US-AL', 'America/Chicago', '205 251 256 334 659 938'),
      ('US-AR', 'America/Chicago', '327 479 501 870'),
      ('US-AZ', 'America/Phoenix America/Denver', '480 520 602 623 928'),
      (
        'US-CA', 'America/Los_Angeles',
        '209 213 279 323 341 350 369 408 415 424 442 510 530 559 562 619 626 628 650 657 661 669 707 714 738 747 760 805 818 820 831 '
        '840 858 909 916 925 949 951'
      ),
      ('US-CO', 'America/Denver', '303 719 720 748 970 983'),
      ('US-CT', 'America/New_York', '203 475 860 959'),
      ('US-DC', 'America/New_York', '202 771'),
      ('US-DE', 'America/New_York', '302'),
      ('US-FL', 'America/New_York America/Chicago', '239 305 321 324 352 386 407 448 561 645 656 689 727 728 754 772 786 813 850 863 904 941 954'),
      ('US-GA', 'America/New_York', '229 404 470 478 678 706 762 770 912 943'),
      ('US-HI', 'Pacific/Honolulu', '808'),
      ('US-IA', 'America/Chicago', '319 515 563 641 712'),
      ('US-ID', 'America/Boise America/Los_Angeles', '208 986'),
      ('US-IL', 'America/Chicago', '217 224 309 312 331 447 464 618 630 708 730 773 779 815 847 872'),
      ('US-IN', 'America/Indiana/Indianapolis America/Chicago', '219 260 317 463 574 765 812 930'),
      ('US-KS', 'America/Chicago America/Denver', '316 620 785 913'),
      ('US-KY', 'America/New_York America/Chicago', '270 364 502 606 859'),
      ('US-LA', 'America/Chicago', '225 318 337 457 504 985'),
      ('US-MA', 'America/New_York', '339 351 413 508 617 774 781 857 978'),
      ('US-MD', 'America/New_York', '227 240 301 410 443 667'),
      ('US-ME', 'America/New_York', '207'),
      ('US-MI', 'America/Detroit America/Chicago', '231 248 269 313 517 586 616 679 734 810 906 947 989'),
      ('US-MN', 'America/Chicago', '218 320 507 612 651 763 924 952'),
      ('US-MO', 'America/Chicago', '235 314 417 557 573 636 660 816 975'),
      ('US-MS', 'America/Chicago', '228 471 601 662 769'),
      ('US-MT', 'America/Denver', '406'),
      ('US-NC', 'America/New_York', '252 336 472 704 743 828 910 919 980 984'),
      ('US-ND', 'America/Chicago America/Denver', '701'),
      ('US-NE', 'America/Chicago America/Denver', '308 402 531'),
      ('US-NH', 'America/New_York', '603'),
      ('US-NJ', 'America/New_York', '201 551 609 640 732 848 856 862 908 973'),
      ('US-NM', 'America/Denver', '505 575'),
      ('US-NV', 'America/Los_Angeles America/Denver', '702 725 775'),
      ('US-NY', 'America/New_York', '212 315 329 332 347 363 516 518 585 607 631 646 680 716 718 838 845 914 917 929 934'),
      ('US-OH', 'America/New_York', '216 220 234 283 326 330 380 419 440 513 567 614 740 937'),
      ('US-OK', 'America/Chicago', '405 539 572 580 918'),
      ('US-OR', 'America/Los_Angeles America/Boise', '458 503 541 971'),
      ('US-PA', 'America/New_York', '215 223 267 272 412 445 484 570 582 610 717 724 814 835 878'),
      ('US-RI', 'America/New_York', '401'),
      ('US-SC', 'America/New_York', '803 821 839 843 854 864'),
      ('US-SD', 'America/Chicago America/Denver', '605'),
      ('US-TN', 'America/Chicago America/New_York', '423 615 629 731 865 901 931'),
      (
        'US-TX', 'America/Chicago America/Denver',
        '210 214 254 281 325 346 361 409 430 432 469 512 682 713 726 737 806 817 830 832 903 915 936 940 945 956 972 979'
      ),
      ('US-UT', 'America/Denver', '385 435 801'),
      ('US-VA', 'America/New_York', '276 434 540 571 686 703 757 804 826 948'),
      ('US-VT', 'America/New_York', '802'),
      ('US-WA', 'America/Los_Angeles', '206 253 360 425 509 564'),
      ('US-WI', 'America/Chicago', '262 274 353 414 534 608 715 920'),
      ('US-WV', 'America/New_York', '304 681'),
      ('US-WY', 'America/Denver', '307'),
      (
        'CA', null,
        '204 226 236 249 250 257 263 273 289 306 343 354 365 367 368 382 403 416 418 428 431 437 438 450 460 468 474 506 514 519 548 579 581 584 '
        '587 604 613 639 647 672 683 705 709 742 753 778 780 782 807 819 825 867 873 879 902 905 942'
      ),
      ('AG', null, '268'), ('AI', null, '264'), ('AS', null, '684'), ('BB', null, '246'), ('BM', null, '441'), ('BS', null, '242'),
      ('DM', null, '767'), ('DO', null, '809 829 849'), ('GD', null, '473'), ('GU', null, '671'), ('JM', null, '658 876'), ('KN', null, '869'),
      ('KY', null, '345'), ('LC', null, '758'), ('MP', null, '670'), ('MS', null, '664'), ('PR', null, '787 939'), ('SX', null, '721'),
      ('TC', null, '649'), ('TT', null, '868'), ('VC', null, '784'), ('VG', null, '284'), ('VI', null, '340')
  ) as listed (place, zones, codes)
) as area;

alter table public.organizations add column dial_countries text[];
comment on column public.organizations.dial_countries is
  'Countries it may call, as ISO 3166 codes, set by the operator; null is every country whose calling hours are known.';
alter table public.campaigns add column purpose text not null default 'service';
alter table public.campaigns add constraint campaigns_purpose_known check (purpose in ('service', 'promotional'));
comment on column public.campaigns.purpose is 'Which of the legal hours hold (calling_hours): service or promotional.';
grant insert (purpose), update (purpose) on public.campaigns to authenticated;

create function private.destination(
  phone text, allowed text[], out country text, out region text, out zones text[], out is_callable boolean
)
language plpgsql stable security definer set search_path = '' as $$
begin
  select
    known.country, known.region, known.zones,
    known.kind = 'ordinary' and (known.digits is null or length(phone) = known.digits + 1)
      and (allowed is null or known.country = any (allowed))
      and exists (select from public.calling_hours as law where law.jurisdiction = known.country)
  into country, region, zones, is_callable
  from private.destinations as known
  where known.prefix = any (array(select left(phone, size) from generate_series(2, 8) as size))
  order by length(known.prefix) desc
  limit 1;
  is_callable := coalesce(is_callable, false);
end
$$;
comment on function private.destination(text, text[]) is
  'Which country, state and zones a number is of, and whether it may be called: never premium, satellite or short, nor where the hours are not known.';
revoke execute on function private.destination(text, text[]) from public;

-- Why a call was allowed -------------------------------------------------------------------------------------------------------------

create table private.dial_evidence (
  attempt_id       uuid primary key,
  organization_id  uuid not null,
  consent_id       uuid,
  register_key     text,
  register_version integer,
  country          text,
  region           text,
  purpose          text not null,
  zones            text[] not null,
  zone_source      text not null check (zone_source in ('lead', 'number', 'campaign')),
  dials_before     timestamptz[],
  foreign key (organization_id, attempt_id) references public.call_logs (organization_id, id) on delete cascade
);
create index idx_dial_evidence_attempt on private.dial_evidence (organization_id, attempt_id);
select private.close_table('private.dial_evidence');
comment on table private.dial_evidence is 'What the release saw when it allowed an attempt, written in its transaction and never changed.';
comment on column private.dial_evidence.consent_id is 'The consent for the campaign''s purpose that held, where there was one.';
comment on column private.dial_evidence.register_version is 'The version of the register of numbers not to be called that was looked at, where one is enforced.';
comment on column private.dial_evidence.zone_source is 'Whose time zones they are: the lead''s own, else those of the number''s state or country, else the campaign''s.';
comment on column private.dial_evidence.dials_before is 'When the number was last called, by whomever: gap and caps were judged by these.';

-- What a campaign may cost, and when it starts by itself -----------------------------------------------------------------------------

alter table public.campaigns
  add column credit_cap bigint,
  add column credit_spent bigint not null default 0;
alter table public.campaigns add constraint campaigns_credit_cap_positive check (credit_cap > 0);
comment on column public.campaigns.credit_cap is
  'Prepaid credit that its calls may use at most, in minor units of the plan''s currency; what calls under way may still cost counts. Null is without limit.';
comment on column public.campaigns.credit_spent is
  'Prepaid credit that its calls have used, in minor units: what the ledger says of them, corrections included. Written at settlement alone.';
grant insert (credit_cap), update (credit_cap) on public.campaigns to authenticated;
create index idx_campaigns_scheduled on public.campaigns (start_date) where status = 'scheduled';

-- What a call needs beside an open window: consent, and a number of the right series --------------------------------------------------

create table private.consent_rules (
  country text not null check (country ~ '^[A-Z]{2}$'),
  purpose text not null check (purpose in ('service', 'promotional')),
  basis   text not null,
  primary key (country, purpose)
);
select private.close_table('private.consent_rules');
comment on table private.consent_rules is
  'Where nobody is called for a purpose without having agreed to it: a consent of scope call_<purpose> that holds at the time. Reference data, to '
  'be checked by a lawyer before launch.';
insert into private.consent_rules (country, purpose, basis)
values
  ('US', 'promotional', '47 CFR 64.1200(a)(2): a voice that is made is an artificial one'),
  ('IN', 'promotional', 'TRAI TCCCPR 2018, second amendment of 2025: explicit consent');

create table private.caller_series (
  country            text not null check (country ~ '^[A-Z]{2}$'),
  purpose            text not null check (purpose in ('service', 'promotional')),
  prefix             text not null check (prefix ~ '^\+[1-9][0-9]{0,7}$'),
  is_allowed         boolean not null,
  needs_registration boolean not null default false,
  basis              text not null,
  primary key (country, purpose, prefix)
);
select private.close_table('private.caller_series');
comment on table private.caller_series is
  'Which numbers people of a country may be called from for a purpose: the longest prefix of the caller''s number decides. Of a country and purpose '
  'without rows any number will do. Reference data, to be checked before launch.';
comment on column private.caller_series.needs_registration is 'Only a number that says under which registration it is used (caller_numbers.registration_id).';
insert into private.caller_series (country, purpose, prefix, is_allowed, needs_registration, basis)
values
  ('IN', 'service', '+91', true, false, 'Numbers of the organization''s own'),
  ('IN', 'service', '+91140', false, false, 'TRAI: the series of promotion'),
  ('IN', 'service', '+91160', true, true, 'TRAI: the series of banks, insurers and government'),
  ('IN', 'promotional', '+91140', true, true, 'TRAI: the series of promotion');

alter table public.caller_numbers add column registration_id text;
alter table public.caller_numbers add constraint caller_numbers_registration_length check (length(registration_id) between 1 and 100);
comment on column public.caller_numbers.registration_id is
  'Under which registration it is used, where its series asks for one: of the entity at the operators'' register in India. The operator enters it.';

create function private.lacks_consent(organization uuid, phone text, country text, purpose text, at timestamptz) returns boolean
language plpgsql stable security definer set search_path = '' as $$
begin
  return exists (
      select
      from private.consent_rules as rule
      where rule.country = lacks_consent.country and rule.purpose = lacks_consent.purpose
    )
    and not exists (
      select
      from public.consents as known
      where known.organization_id = organization and known.phone_number = phone and known.scope = 'call_' || lacks_consent.purpose
        and known.granted_at <= at and (known.expires_at is null or known.expires_at > at) and (known.revoked_at is null or known.revoked_at > at)
    );
end
$$;
comment on function private.lacks_consent(uuid, text, text, text, timestamptz) is
  'Whether a number may not be called for a purpose because nobody there has agreed to it, where that is asked for. Who takes it back is suppressed.';
revoke execute on function private.lacks_consent(uuid, text, text, text, timestamptz) from public;

create function private.may_call_from(number text, registration_id text, country text, purpose text) returns boolean
language plpgsql stable security definer set search_path = '' as $$
declare
  series private.caller_series;
begin
  select known.* into series
  from private.caller_series as known
  where known.country = may_call_from.country and known.purpose = may_call_from.purpose and starts_with(number, known.prefix)
  order by length(known.prefix) desc
  limit 1;
  if series.prefix is null then
    return not exists (
      select from private.caller_series as known where known.country = may_call_from.country and known.purpose = may_call_from.purpose
    );
  end if;
  return series.is_allowed and (registration_id is not null or not series.needs_registration);
end
$$;
comment on function private.may_call_from(text, text, text, text) is
  'Whether people of a country may be called from a number for a purpose: its series is the right one, and registered where that is asked for.';
revoke execute on function private.may_call_from(text, text, text, text) from public;

alter table private.dial_evidence
  add column caller_series text,
  add column registration_id text;
comment on column private.dial_evidence.caller_series is 'The prefix of private.caller_series that allowed the number it was made from; null where any will do.';
comment on column private.dial_evidence.registration_id is 'The registration that the number was used under at the time.';
alter table private.dial_evidence
  add column dials_in_30_days smallint,
  add column dials_ever integer;
comment on column private.dial_evidence.dials_in_30_days is 'How often the organization had called the number in the 30 days before: monthly_dials was judged by this.';
comment on column private.dial_evidence.dials_ever is 'How often the organization had called the number at all: lifetime_dials was judged by this.';

-- Ceilings on what calls cost, and calls that nobody speaks on -----------------------------------------------------------------------

alter table private.destinations add column price_micros bigint;
alter table private.destinations add constraint destinations_price_not_negative check (price_micros >= 0);
comment on column private.destinations.price_micros is
  'What a carrier asks at most for a minute there, in millionths of a US dollar, as the operator has entered it; null is not known.';
alter table public.organizations
  add column max_price_micros bigint,
  add column max_hourly_cost_micros bigint,
  add column hourly_cost_currency text not null default 'USD';
alter table public.organizations add constraint organizations_max_price_positive check (max_price_micros > 0);
alter table public.organizations add constraint organizations_max_hourly_cost_positive check (max_hourly_cost_micros > 0);
alter table public.organizations add constraint organizations_hourly_cost_currency_is_iso check (hourly_cost_currency ~ '^[A-Z]{3}$');
comment on column public.organizations.max_price_micros is
  'What a minute of a call may cost at the carrier at most, in millionths of a US dollar; with one, nobody is called where the price is not known. '
  'Null is without limit. Set by the operator.';
comment on column public.organizations.max_hourly_cost_micros is
  'What its calls of the last 60 minutes may have cost at the carrier before no more are begun, in millionths of hourly_cost_currency; a cost in another '
  'currency cannot be compared and stops them too. Null is without limit. Set by the operator.';
comment on column public.organizations.hourly_cost_currency is 'The currency of max_hourly_cost_micros.';

create function private.destination_price(phone text) returns bigint
language plpgsql stable security definer set search_path = '' as $$
begin
  return (
    select known.price_micros
    from private.destinations as known
    where known.prefix = any (array(select left(phone, size) from generate_series(2, 8) as size))
    order by length(known.prefix) desc
    limit 1
  );
end
$$;
comment on function private.destination_price(text) is 'What a minute to a number costs at most, in millionths of a US dollar; null is not known.';
revoke execute on function private.destination_price(text) from public;

alter table public.call_logs add column first_audio_ms integer;
-- Nothing is in it yet.
alter table public.call_logs add constraint call_logs_first_audio_not_negative check (first_audio_ms >= 0);
comment on column public.call_logs.first_audio_ms is
  'Milliseconds from the answer, when the agent''s stream was opened, until its first audio, as the agent measured them.';
alter table public.campaigns add column pause_reason text;
alter table public.campaigns add constraint campaigns_pause_reason_known check (pause_reason in ('abandoned_calls'));
comment on column public.campaigns.pause_reason is 'Why it paused by itself; null when somebody paused it.';

-- Four rings, for whoever is called.
alter table public.campaigns add constraint campaigns_rings_long_enough check (ring_timeout_seconds >= 20);

create table private.campaign_days (
  organization_id uuid not null,
  campaign_id     uuid not null,
  day             date not null,
  answered        integer not null default 0 check (answered >= 0),
  abandoned       integer not null default 0 check (abandoned >= 0),
  primary key (organization_id, campaign_id, day),
  foreign key (organization_id, campaign_id) references public.campaigns (organization_id, id) on delete cascade
);
select private.close_table('private.campaign_days');
comment on table private.campaign_days is
  'Of each UTC day, how many calls of a campaign a person answered, and on how many of these nobody spoke within two seconds.';

create function private.is_live_answer(leg public.call_logs) returns boolean
language sql immutable parallel safe set search_path = '' as $$
  select leg.status = 'ended' and leg.answered_at is not null and not coalesce(leg.machine, false)
    and coalesce(leg.call_status in ('answered', 'our_fault'), false)
$$;
comment on function private.is_live_answer(public.call_logs) is 'Whether a call is over that a person answered.';

create function private.is_abandoned(leg public.call_logs) returns boolean
language sql immutable parallel safe set search_path = '' as $$
  select private.is_live_answer(leg) and case
    when leg.first_audio_ms is not null then leg.first_audio_ms > 2000
    else leg.call_status = 'our_fault' or coalesce(leg.stream_status = 'failed', false)
  end
$$;
comment on function private.is_abandoned(public.call_logs) is
  'Whether a person answered and heard nobody within two seconds: by what the agent measured, and without that, when the agent''s stream failed.';

create function private.tally_answer() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  more_answered  constant integer := private.is_live_answer(new)::integer - private.is_live_answer(old)::integer;
  more_abandoned constant integer := private.is_abandoned(new)::integer - private.is_abandoned(old)::integer;
  campaign       public.campaigns;
  recent         record;
begin
  if more_answered = 0 and more_abandoned = 0 then
    return null;
  end if;
  select mine.* into campaign from public.campaigns as mine where mine.id = new.campaign_id for no key update;
  insert into private.campaign_days as tally (campaign_id, day, organization_id, answered, abandoned)
  values (
    new.campaign_id, (new.ended_at at time zone 'UTC')::date, new.organization_id, greatest(more_answered, 0), greatest(more_abandoned, 0)
  )
  on conflict (organization_id, campaign_id, day) do update
  set answered = greatest(tally.answered + more_answered, 0), abandoned = greatest(tally.abandoned + more_abandoned, 0);
  if more_abandoned <= 0 or campaign.status <> 'running' then
    return null;
  end if;
  select sum(tally.answered)::integer as answered, sum(tally.abandoned)::integer as abandoned into recent
  from private.campaign_days as tally
  where tally.organization_id = new.organization_id and tally.campaign_id = new.campaign_id and tally.day > (new.ended_at at time zone 'UTC')::date - 30;
  -- Of fewer than 34 a single one would be more than three in a hundred.
  if recent.answered >= 34 and recent.abandoned * 100 > recent.answered * 3 then
    update public.campaigns as mine
    set status = 'paused', paused_at = new.ended_at, pause_reason = 'abandoned_calls'
    where mine.id = campaign.id;
    perform private.audit(
      campaign.organization_id, 'campaign.paused', 'campaign', campaign.id,
      jsonb_build_object('reason', 'abandoned_calls', 'answered', recent.answered, 'abandoned', recent.abandoned), private.clock_now()
    );
    perform private.raise_alarm(
      new, 'abandoned_calls', jsonb_build_object('campaign_id', campaign.id, 'answered', recent.answered, 'abandoned', recent.abandoned),
      private.clock_now()
    );
  end if;
  return null;
end
$$;
comment on function private.tally_answer() is
  'Trigger: counts what people answered and where nobody spoke; above three in a hundred of the last 30 days the campaign pauses (47 CFR 64.1200(a)(7)).';
revoke execute on function private.is_live_answer(public.call_logs), private.is_abandoned(public.call_logs), private.tally_answer() from public;
-- After settle_lead by its name: leads are locked before campaigns.
create trigger tally_answer after update of status, answered_at, machine, call_status, first_audio_ms, stream_status on public.call_logs
  for each row when (
    new.direction = 'outbound' and new.campaign_id is not null and new.status = 'ended' and new.answered_at is not null
    and (old.status, old.machine, old.call_status, old.first_audio_ms, old.stream_status, old.answered_at)
      is distinct from (new.status, new.machine, new.call_status, new.first_audio_ms, new.stream_status, new.answered_at)
  ) execute function private.tally_answer();

-- What the carrier says of a day -----------------------------------------------------------------------------------------------------

create table private.carrier_checks (
  carrier_account_id uuid not null references public.carrier_accounts (id) on delete cascade,
  day                date not null,
  next_page          text,
  pages              integer not null default 0 check (pages >= 0),
  lease_until        timestamptz,
  finished_at        timestamptz,
  differences        integer check (differences >= 0),
  primary key (carrier_account_id, day)
);
select private.close_table('private.carrier_checks');
comment on table private.carrier_checks is 'Days of a carrier account, in UTC, whose call records are fetched page by page and then compared with our attempts, once.';
comment on column private.carrier_checks.next_page is 'Where the carrier goes on; null before the first page and after the last.';
comment on column private.carrier_checks.lease_until is 'Real time until which somebody fetches it.';

create table private.carrier_records (
  carrier_account_id    uuid not null,
  day                   date not null,
  provider_call_id      text not null,
  started_at            timestamptz,
  bill_duration_seconds integer check (bill_duration_seconds >= 0),
  cost_micros           bigint check (cost_micros >= 0),
  cost_currency         text check (cost_currency ~ '^[A-Z]{3}$'),
  primary key (carrier_account_id, day, provider_call_id),
  foreign key (carrier_account_id, day) references private.carrier_checks (carrier_account_id, day) on delete cascade
);
select private.close_table('private.carrier_records');
comment on table private.carrier_records is 'A day''s call records as the carrier has them, while they are fetched; empty again once they are compared.';

create table private.carrier_differences (
  id                 uuid primary key default private.uuid_v7(),
  carrier_account_id uuid not null references public.carrier_accounts (id) on delete cascade,
  day                date not null,
  kind               text not null check (kind in ('call_without_attempt', 'attempt_without_record', 'other_seconds', 'other_cost')),
  provider_call_id   text,
  attempt_id         uuid,
  organization_id    uuid,
  our_seconds        integer,
  their_seconds      integer,
  our_cost_micros    bigint,
  their_cost_micros  bigint,
  cost_currency      text,
  is_corrected       boolean not null default false,
  found_at           timestamptz not null
);
create index idx_carrier_differences_day on private.carrier_differences (carrier_account_id, day);
select private.close_table('private.carrier_differences');
comment on table private.carrier_differences is
  'Where a carrier''s records of a day are other than our attempts. Other seconds and costs are corrected, at the price of the call; a call that '
  'nobody made and a call that the carrier does not know are for a person.';
create index idx_call_logs_begun on public.call_logs (carrier_account_id, begun_at) where dialled and direction = 'outbound';
