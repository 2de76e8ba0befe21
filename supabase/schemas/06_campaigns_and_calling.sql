-- Campaigns, their queue, every dial attempt, and what decides whether a number may be dialled.
--
-- Whoever changes several of these rows locks them in this order, and within one table by id, so that no two transactions wait for
-- each other: call_logs, call_queue, campaign_leads, leads, campaigns, usage counters.


-- carrier_accounts ----------------------------------------------------------------------------------------------------------------

create table public.carrier_accounts (
  id                   uuid primary key default gen_random_uuid(),
  organization_id      uuid references public.organizations (id) on delete restrict,
  provider             public.carrier_provider not null,
  name                 text,
  account_sid          text not null check (account_sid <> ''),
  auth_token_sealed    text not null,
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
create trigger update_modified_column before update on public.carrier_accounts
  for each row execute function private.update_modified_column();
comment on table public.carrier_accounts is
  'An account with a phone carrier; without an organization it is the platform''s own. Seen by handlers alone, its token sealed.';
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
  'Trigger: a number hangs on its organization''s own carrier account, or on the platform''s.';
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
  created_by           uuid default auth.uid(),
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
create index idx_call_queue_poll on public.call_queue (campaign_id, priority desc, next_retry_at) where status = 'queued';
create index idx_call_queue_due on public.call_queue (campaign_id, next_retry_at) where status = 'queued';
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
  'Why it waits: outside_window, bad_timezone, campaign_over, min_gap, daily_cap, number_in_call, quota_exhausted, retry_<outcome>.';
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
  unique (organization_id, id),
  unique (organization_id, queue_id, attempt_no),
  foreign key (organization_id, campaign_id) references public.campaigns (organization_id, id) on delete restrict,
  foreign key (organization_id, lead_id) references public.leads (organization_id, id) on delete restrict,
  foreign key (organization_id, project_id) references public.projects (organization_id, id) on delete set null (project_id),
  foreign key (organization_id, queue_id) references public.call_queue (organization_id, id) on delete restrict,
  check ((status = 'ended') = (call_status is not null)),
  check ((status = 'ended') = (ended_at is not null)),
  check (answered_at >= created_at and ended_at >= answered_at),
  check (status = 'created' or status = 'ended' or dialled or direction = 'inbound')
) with (fillfactor = 70);
create index idx_call_logs_organization_id on public.call_logs (organization_id, created_at desc);
create index idx_call_logs_campaign_id on public.call_logs (organization_id, campaign_id, created_at desc);
create index idx_call_logs_lead_id on public.call_logs (organization_id, lead_id);
create index idx_call_logs_project_id on public.call_logs (organization_id, project_id) where project_id is not null;
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
create trigger check_attempt before update of status, call_sid on public.call_logs
  for each row execute function private.check_attempt();
create trigger update_modified_column before update on public.call_logs
  for each row execute function private.update_modified_column();
comment on table public.call_logs is
  'One row a leg, in or out: the attempt. Committed before the carrier hears of it, ended exactly once, and alone metered. Its id is the attempt id.';
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
  if exists (select from pg_catalog.pg_publication where pubname = 'supabase_realtime') then
    alter publication supabase_realtime add table public.campaigns, public.campaign_leads, public.call_logs;
  end if;
end
$$;
