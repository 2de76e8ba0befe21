-- Four carriers: their credentials, what their events tell beside the end of a call, and calls to our numbers.

set local lock_timeout = '5s';
set local statement_timeout = '60s';

-- Only functions read it, and this migration replaces them.
-- squawk-ignore renaming-column
alter table public.carrier_accounts rename column auth_token_sealed to credentials_sealed;
comment on table public.carrier_accounts is
  'An account with a phone carrier; without an organization it is the platform''s own. Seen by handlers alone, its secrets sealed.';
comment on column public.carrier_accounts.credentials_sealed is
  'What the carrier knows us by and what it signs with, as a JSON object of the carrier''s own keys or a bare auth token; sealed for this row''s id.';


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


-- Dialling, and what ends an attempt ------------------------------------------------------------------------------------------------

create or replace function private.write_attempt(attempt public.call_logs) returns void
language plpgsql volatile security definer set search_path = '' as $$
begin
  update public.call_logs as log
  set
    status = attempt.status,
    call_status = attempt.call_status,
    call_sid = attempt.call_sid,
    dialled = attempt.dialled,
    refusal_reason = attempt.refusal_reason,
    lease_until = attempt.lease_until,
    submitted_at = attempt.submitted_at,
    ringing_at = attempt.ringing_at,
    answered_at = attempt.answered_at,
    ended_at = attempt.ended_at,
    duration = attempt.duration,
    bill_duration_seconds = attempt.bill_duration_seconds,
    carrier_cost_micros = attempt.carrier_cost_micros,
    carrier_cost_currency = attempt.carrier_cost_currency,
    hangup_cause_code = attempt.hangup_cause_code,
    hangup_cause_name = attempt.hangup_cause_name,
    hangup_source = attempt.hangup_source,
    machine = attempt.machine,
    recording_url = attempt.recording_url,
    recording_id = attempt.recording_id,
    recording_seconds = attempt.recording_seconds,
    disconnect_reason = attempt.disconnect_reason,
    stream_id = attempt.stream_id,
    stream_status = attempt.stream_status,
    stream_error = attempt.stream_error,
    transferred = attempt.transferred,
    transferred_at = attempt.transferred_at,
    transfer_sid = attempt.transfer_sid,
    transfer_status = attempt.transfer_status
  where log.id = attempt.id;
end
$$;
comment on function private.write_attempt(public.call_logs) is 'Writes what events and dialling change of an attempt; its row is locked already.';

create or replace function private.end_attempt(
  attempt public.call_logs, outcome public.call_outcome, at timestamptz,
  due timestamptz default null, closing public.campaign_lead_status default null, reason text default null
) returns void
language plpgsql volatile security definer set search_path = '' as $$
declare
  queue    public.call_queue;
  member   public.campaign_leads;
  campaign public.campaigns;
  -- Want of capacity or time is not the lead's doing, and neither is a gate that closed.
  counted  boolean := outcome not in ('capacity', 'expired') and due is null and closing is null;
  attempts smallint;
  next_at  timestamptz := due;
  final    public.campaign_lead_status := closing;
  completes boolean;
begin
  attempt.status := 'ended';
  attempt.call_status := outcome;
  attempt.ended_at := coalesce(attempt.ended_at, greatest(at, attempt.created_at));
  attempt.refusal_reason := coalesce(reason, attempt.refusal_reason);
  attempt.lease_until := null;
  if attempt.dialled or attempt.direction = 'inbound' then
    attempt.disconnect_reason := coalesce(attempt.disconnect_reason, outcome::text);
  end if;

  select waiting.* into queue
  from public.call_queue as waiting
  where waiting.organization_id = attempt.organization_id and waiting.id = attempt.queue_id
  for no key update;
  select enrolled.* into member
  from public.campaign_leads as enrolled
  where enrolled.organization_id = attempt.organization_id
    and enrolled.campaign_id = attempt.campaign_id
    and enrolled.lead_id = attempt.lead_id
  for no key update;
  perform private.write_attempt(attempt);

  if queue.status = 'processing' then
    select running.* into campaign
    from public.campaigns as running
    where running.id = attempt.campaign_id
    for no key update;

    attempts := queue.attempt_count + counted::integer;
    -- They asked to be called at a time, which ends no lead and is no retry.
    if final is null and next_at is null and queue.metadata ? 'callback_at' then
      next_at := private.next_dial_at(
        attempt, campaign, greatest((queue.metadata ->> 'callback_at')::timestamptz, attempt.ended_at)
      );
      reason := 'callback';
    end if;
    if final is null and next_at is null then
      if outcome = 'answered' then
        final := 'called';
      elsif not counted then
        next_at := at + interval '1 minute';
      elsif attempts < queue.max_attempts then
        select private.next_dial_at(attempt, campaign, attempt.ended_at + rule.delay) into next_at
        from private.retry_rules as rule
        where rule.outcome = end_attempt.outcome
          and rule.nth = (
            select count(*)
            from public.call_logs as log
            where log.organization_id = attempt.organization_id
              and log.queue_id = queue.id
              and log.call_status = end_attempt.outcome
          );
      end if;
      if final is null and next_at is null then
        final := 'failed';
      end if;
    end if;
    if final is null and campaign.status not in ('scheduled', 'running', 'paused') then
      final := 'skipped';
      reason := 'campaign_' || campaign.status;
    end if;
    completes := final is not null and campaign.open_leads = 1 and campaign.auto_complete and campaign.status in ('running', 'paused');

    update public.call_queue as waiting
    set
      status = case when final is null then 'queued' when final = 'called' then 'completed' else 'failed' end::public.queue_status,
      attempt_count = attempts,
      next_retry_at = coalesce(next_at, waiting.next_retry_at),
      wait_reason = case when final is null then coalesce(reason, 'retry_' || outcome) end,
      last_error = case when outcome <> 'answered' then coalesce(reason, outcome::text) end,
      max_attempts = case when reason = 'callback' then greatest(waiting.max_attempts, attempts + 1) else waiting.max_attempts end,
      metadata = waiting.metadata - 'callback_at'
    where waiting.id = queue.id;
    update public.campaign_leads as enrolled
    set
      status = coalesce(final, 'queued'),
      attempt_count = attempts,
      call_log_id = attempt.id,
      last_call_attempt_at = case when attempt.dialled then attempt.submitted_at else enrolled.last_call_attempt_at end,
      skip_reason = case when final in ('skipped', 'opted_out') then coalesce(reason, outcome::text) end,
      opted_out_at = case when final = 'opted_out' then at end
    where enrolled.id = member.id;
  end if;

  if campaign.id is not null and (final is not null or attempt.dialled) then
    update public.campaigns as running
    set
      open_leads = running.open_leads - (final is not null)::integer,
      total_calls = running.total_calls + attempt.dialled::integer,
      answered_calls = running.answered_calls + (attempt.dialled and outcome = 'answered')::integer,
      status = case when completes then 'completed' else running.status end,
      completed_at = case when completes then at else running.completed_at end
    where running.id = campaign.id;
    if completes then
      perform private.campaign_completed(campaign.organization_id, campaign.id, at);
    end if;
  end if;

  perform private.meter_call(attempt, at);
  if attempt.dialled or attempt.direction = 'inbound' then
    perform private.emit(
      attempt.organization_id, 'call.ended', attempt.id::text,
      jsonb_build_object(
        'call_id', attempt.id, 'campaign_id', attempt.campaign_id, 'lead_id', attempt.lead_id, 'attempt_no', attempt.attempt_no,
        'outcome', outcome, 'answered_at', attempt.answered_at, 'ended_at', attempt.ended_at, 'duration_seconds', attempt.duration,
        'billed_seconds', attempt.bill_duration_seconds, 'lead_status', coalesce(final, 'queued'), 'next_attempt_at', next_at
      ),
      at
    );
  end if;
  -- A slot is free: whoever waits for it need not wait for the next minute.
  if not coalesce(completes, false) and campaign.status = 'running' and exists (
    select
    from public.call_queue as waiting
    where waiting.campaign_id = campaign.id and waiting.status = 'queued' and waiting.next_retry_at <= at
  ) then
    perform private.nudge('call-dispatch');
  end if;
end
$$;
comment on function private.end_attempt(
  public.call_logs, public.call_outcome, timestamptz, timestamptz, public.campaign_lead_status, text
) is
  'Ends a locked attempt, once, and settles all that hangs on it in one transaction: queue, lead, campaign, usage, outbox. '
  'due puts the lead back until then and closing ends it, both without counting the attempt; else the retry rules decide.';

create function private.has_talked(attempt public.call_logs) returns boolean
language sql immutable parallel safe set search_path = '' as $$
  select coalesce(greatest(attempt.duration, attempt.bill_duration_seconds) > 0, attempt.answered_at is not null)
$$;
comment on function private.has_talked(public.call_logs) is
  'Whether a leg had a second of talk: by the carrier''s seconds, and where it tells none, by its answer.';

create function private.settled_outcome(attempt public.call_logs, reported public.call_outcome) returns public.call_outcome
language sql immutable parallel safe set search_path = '' as $$
  select case
    when reported in ('answered', 'our_fault') and attempt.machine then 'machine'::public.call_outcome
    when reported = 'answered' and attempt.stream_status = 'failed' and coalesce(attempt.duration, 0) < 5 then 'our_fault'::public.call_outcome
    else reported
  end
$$;
comment on function private.settled_outcome(public.call_logs, public.call_outcome) is
  'What an end means beside what else is known of the leg: who answered may be a machine, and whom no agent spoke to was not answered by us.';

create function private.outcome_rank(outcome public.call_outcome, has_talked boolean) returns integer
language sql immutable parallel safe set search_path = '' as $$
  select case outcome
    when 'lost' then 0
    when 'expired' then 0
    when 'failed' then 10
    when 'answered' then case when has_talked then 90 else 20 end
    when 'cancelled' then 30
    when 'capacity' then 40
    when 'config' then 41
    when 'carrier_transient' then 42
    when 'our_fault' then case when has_talked then 95 else 43 end
    when 'no_answer' then 50
    when 'rejected' then 60
    when 'busy' then 70
    when 'invalid_number' then 80
    when 'spam_blocked' then 81
    when 'machine' then 99
  end
$$;
comment on function private.outcome_rank(public.call_outcome, boolean) is
  'Which of two ends that a carrier told of one call stays, whichever came first: the one that says more. A guess is nothing, a plain end '
  'without a second of talk says less than the reason for it, and talk says more than any reason why there was none.';

create or replace function private.amend_attempt(
  attempt public.call_logs, amended public.call_logs, outcome public.call_outcome, at timestamptz
) returns boolean
language plpgsql volatile security definer set search_path = '' as $$
declare
  queue    public.call_queue;
  member   public.campaign_leads;
  campaign public.campaigns;
  settled  constant public.call_outcome := private.settled_outcome(amended, coalesce(outcome, attempt.call_status));
  -- Who was dialled after all has no reason any more why he was not.
  corrects constant boolean := settled <> attempt.call_status and (
    outcome is not null and not attempt.dialled and amended.dialled
    or private.outcome_rank(settled, private.has_talked(amended)) > private.outcome_rank(attempt.call_status, private.has_talked(amended))
  );
  completes boolean := false;
begin
  outcome := settled;
  if corrects then
    amended.call_status := outcome;
    -- What the agent said of the end stands, whichever of the two was told first.
    if attempt.metadata #>> '{agent,ranks,disconnect_reason}' is null then
      amended.disconnect_reason := outcome;
    end if;
  end if;
  if amended is not distinct from attempt then
    return false;
  end if;

  if corrects or amended.dialled <> attempt.dialled then
    select waiting.* into queue
    from public.call_queue as waiting
    where waiting.organization_id = attempt.organization_id and waiting.id = attempt.queue_id
    for no key update;
    select enrolled.* into member
    from public.campaign_leads as enrolled
    where enrolled.organization_id = attempt.organization_id
      and enrolled.campaign_id = attempt.campaign_id
      and enrolled.lead_id = attempt.lead_id
    for no key update;
  end if;
  perform private.write_attempt(amended);

  if queue.id is not null then
    select running.* into campaign from public.campaigns as running where running.id = attempt.campaign_id for no key update;
    -- Somebody who did answer, and waits to be called again for nothing, is left in peace.
    if corrects and outcome = 'answered' and queue.status = 'queued' then
      completes := campaign.open_leads = 1 and campaign.auto_complete and campaign.status in ('running', 'paused');
      update public.call_queue as waiting
      set status = 'completed', wait_reason = null, last_error = null
      where waiting.id = queue.id;
    end if;
    if corrects and outcome = 'answered' and queue.status in ('queued', 'failed') and member.call_log_id = attempt.id then
      update public.campaign_leads as enrolled set status = 'called', skip_reason = null where enrolled.id = member.id;
    end if;
    update public.campaigns as running
    set
      open_leads = running.open_leads - (corrects and outcome = 'answered' and queue.status = 'queued')::integer,
      total_calls = running.total_calls + (amended.dialled and not attempt.dialled)::integer,
      answered_calls = running.answered_calls
        + (amended.dialled and amended.call_status = 'answered')::integer - (attempt.dialled and attempt.call_status = 'answered')::integer,
      status = case when completes then 'completed' else running.status end,
      completed_at = case when completes then at else running.completed_at end
    where running.id = campaign.id;
    if completes then
      perform private.campaign_completed(campaign.organization_id, campaign.id, at);
    end if;
  end if;
  if amended.bill_duration_seconds is distinct from attempt.bill_duration_seconds then
    perform private.meter_call(amended, at);
  end if;
  return true;
end
$$;
comment on function private.amend_attempt(public.call_logs, public.call_logs, public.call_outcome, timestamptz) is
  'Adds to an ended attempt what came late: cost, recording, seconds not yet counted, a better reason. It never ends twice. False if nothing was new.';

create or replace function private.begin_dials(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' set jit = off set enable_seqscan = off as $$
declare
  asked   uuid[] := array(select distinct item.value::uuid from jsonb_array_elements_text(request -> 'attempts') as item (value));
  token   uuid := (request ->> 'lease_token')::uuid;
  shut    jsonb;
  attempt public.call_logs;
  reason  text;
  dials   jsonb;
  skipped jsonb;
begin
  if token is null or cardinality(asked) = 0 then
    perform private.raise_error(400, 'malformed_request', 'lease_token and attempts are required');
  end if;
  perform from public.call_logs as log where log.id = any (asked) order by log.id for no key update;

  -- Every gate that can have closed since the release, once more, at the last moment.
  select jsonb_object_agg(gate.id, gate.reason) into shut
  from (
    select
      log.id,
      case
        when log.not_after <= now() then 'expired'
        when not account.is_active or not account.dialling_enabled then 'account_disabled'
        when not organization.dialling_enabled then 'dialling_disabled'
        when campaign.status <> 'running' then 'campaign_' || campaign.status
        when lead.do_not_call or exists (
          select
          from public.suppressions as suppression
          where suppression.organization_id = log.organization_id and suppression.phone_number = log.callee_number
        ) then 'opted_out'
        when lead.abuse_flag then 'abuse'
        when lead.archived_at is not null then 'archived'
        when lead.phone is distinct from log.callee_number then 'number_changed'
      end as reason
    from public.call_logs as log
    join public.organizations as organization on organization.id = log.organization_id
    join public.carrier_accounts as account on account.id = log.carrier_account_id
    join public.campaigns as campaign on campaign.organization_id = log.organization_id and campaign.id = log.campaign_id
    join public.leads as lead on lead.organization_id = log.organization_id and lead.id = log.lead_id
    where log.id = any (asked) and log.status = 'created'
  ) as gate
  where gate.reason is not null;

  if shut is not null then
    perform private.lock_attempts(array(select closed.key::uuid from jsonb_object_keys(shut) as closed (key)));
    for attempt in
      select log.*
      from public.call_logs as log
      where log.id::text = any (array(select jsonb_object_keys(shut))) and log.id = any (asked)
      order by log.organization_id, log.id
    loop
      reason := shut ->> attempt.id::text;
      perform private.end_attempt(
        attempt,
        case reason when 'expired' then 'expired' else 'cancelled' end::public.call_outcome,
        at,
        due := case
          when reason in ('dialling_disabled', 'account_disabled') then at + interval '1 minute'
          when reason = 'number_changed' or reason like 'campaign%' then at
        end,
        closing := case
          when reason = 'opted_out' then 'opted_out'
          when reason in ('abuse', 'archived') then 'skipped'
        end::public.campaign_lead_status,
        reason := reason
      );
    end loop;
  end if;

  update public.call_logs as log
  set
    status = 'submitting', dialled = true, submitted_at = greatest(at, log.created_at), begun_at = now(),
    lease_token = token, lease_until = now() + interval '60 seconds'
  where log.id = any (asked) and log.status = 'created';

  -- Also those that this very caller began before, when the answer was lost on the way.
  select
    coalesce(
      jsonb_agg(
        jsonb_build_object(
          'attempt_id', log.id,
          'organization_id', log.organization_id,
          'provider', account.provider,
          'carrier_account_id', account.id,
          'account_sid', account.account_sid,
          'credentials_sealed', account.credentials_sealed,
          'api_base', account.api_base,
          'from', log.caller_number,
          'to', log.callee_number,
          'ring_timeout_seconds', log.ring_timeout_seconds,
          'time_limit_seconds', log.time_limit_seconds,
          'record', log.record_call,
          'agent_id', log.agent_id,
          'not_after', floor(extract(epoch from log.not_after))::bigint
        )
      ) filter (where log.lease_token = token and log.status = 'submitting' and log.lease_until > now() and log.not_after > now()),
      '[]'
    )
  into dials
  from public.call_logs as log
  join public.carrier_accounts as account on account.id = log.carrier_account_id
  where log.id = any (asked);

  select coalesce(
    jsonb_agg(
      jsonb_build_object(
        'attempt_id', wanted.id,
        'reason', coalesce(
          shut ->> wanted.id::text,
          case when log.id is null then 'unknown_attempt' when log.status = 'ended' then 'ended' else 'already_begun' end
        )
      )
    ),
    '[]'
  )
  into skipped
  from unnest(asked) as wanted (id)
  left join public.call_logs as log on log.id = wanted.id
  where not jsonb_path_exists(dials, '$[*] ? (@.attempt_id == $id)', jsonb_build_object('id', wanted.id));
  return jsonb_build_object('dials', dials, 'skipped', skipped);
end
$$;
comment on function private.begin_dials(jsonb, timestamptz) is
  'Moves attempts from created to submitting, each once and only once, and says how to dial them. Whoever gets a dial here makes the one request there is.';

create or replace function private.reconcile_calls(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' set jit = off set enable_seqscan = off as $$
declare
  most    constant integer := least(greatest(coalesce((request ->> 'limit')::integer, 50), 1), 500);
  expired uuid[];
  attempt public.call_logs;
  stale   jsonb;
begin
  -- What was never begun and may not be any more, whose message never came: nobody was called.
  expired := array(
    select late.id
    from (
      select log.id
      from public.call_logs as log
      where log.status = 'created' and log.lease_until < now() and log.not_after <= now()
      order by log.lease_until
      limit most
    ) as late
    order by late.id
  );
  if cardinality(expired) > 0 then
    perform private.lock_attempts(expired);
    for attempt in
      select log.*
      from public.call_logs as log
      where log.id = any (expired) and log.status = 'created'
      order by log.organization_id, log.id
    loop
      perform private.end_attempt(attempt, 'expired', at);
    end loop;
  end if;

  with lapsed as (
    select log.id
    from public.call_logs as log
    where log.status in ('submitting', 'submission_unknown', 'queued', 'initiated', 'ringing', 'in_progress')
      -- A call to us is known by the carrier's id of it alone.
      and (log.direction = 'outbound' or log.call_sid is not null)
      and log.lease_until < now()
    order by log.lease_until
    limit most
    for no key update skip locked
  ),
  claimed as (
    update public.call_logs as log
    set lease_until = now() + interval '60 seconds'
    from lapsed
    where log.id = lapsed.id
    returning log.*
  )
  select jsonb_agg(
    jsonb_build_object(
      'attempt_id', claimed.id,
      'organization_id', claimed.organization_id,
      'provider', account.provider,
      'carrier_account_id', account.id,
      'account_sid', account.account_sid,
      'credentials_sealed', account.credentials_sealed,
      'api_base', account.api_base,
      'provider_call_id', claimed.call_sid,
      'from', claimed.caller_number,
      'to', claimed.callee_number,
      'status', claimed.status,
      'age_seconds', greatest(floor(extract(epoch from now() - claimed.begun_at)), 0)::integer
    )
  )
  into stale
  from claimed
  join public.carrier_accounts as account on account.id = claimed.carrier_account_id;
  return jsonb_build_object('attempts', coalesce(stale, '[]'));
end
$$;
comment on function private.reconcile_calls(jsonb, timestamptz) is
  'Claims for a minute the attempts that nobody has moved on in time, for the carrier to be asked. None of them is ever dialled again. '
  'Also ends those that were never begun and may not be any more.';


-- Events -----------------------------------------------------------------------------------------------------------------------------

create or replace function private.open_source(request jsonb, at timestamptz) returns jsonb
language plpgsql stable security definer set search_path = '' as $$
declare
  wanted  constant uuid := private.to_uuid(request ->> 'source_id');
  account public.carrier_accounts;
  source  public.webhook_sources;
begin
  -- What is not a UUID is simply not the name of a source: the URL is a stranger's text.
  select known.* into source from public.webhook_sources as known where known.id = wanted and known.is_active;
  if source.id is not null then
    return jsonb_build_object(
      'found', true,
      'provider', source.provider,
      'organization_id', source.organization_id,
      'store_id', source.store_id,
      'settings', source.settings,
      'secrets_sealed', case
        when source.previous_until <= now() then to_jsonb(source.secrets_sealed[1:1])
        else to_jsonb(source.secrets_sealed)
      end,
      'previous_until', case when source.previous_until > now() then floor(extract(epoch from source.previous_until))::bigint end
    );
  end if;
  select known.* into account from public.carrier_accounts as known where known.id = wanted and known.is_active;
  if account.id is not null then
    return jsonb_build_object(
      'found', true,
      'provider', account.provider,
      'organization_id', account.organization_id,
      'account_sid', account.account_sid,
      'settings', '{}'::jsonb,
      'secrets_sealed', jsonb_build_array(account.credentials_sealed)
    );
  end if;
  return jsonb_build_object('found', false);
end
$$;
comment on function private.open_source(jsonb, timestamptz) is 'What it takes to verify a source''s signature, sealed: of a webhook source or a carrier account.';

create function private.later_word(words text[], known text, told text) returns text
language sql immutable parallel safe set search_path = '' as $$
  select words[greatest(array_position(words, known), array_position(words, told))]
$$;
comment on function private.later_word(text[], text, text) is 'Of two words in the order of their rank the later; the one there is where the other is null.';

create function private.merge_call(attempt public.call_logs, call jsonb, at timestamptz) returns public.call_logs
language plpgsql stable security definer set search_path = '' as $$
declare
  streams   constant text[] := array['started', 'degraded', 'stopped', 'failed'];
  transfers constant text[] := array['initiated', 'ringing', 'cancelled', 'failed', 'no_answer', 'busy', 'answered', 'completed'];
  latest    constant timestamptz := greatest(coalesce(attempt.ended_at, at), attempt.created_at);
  status    constant public.attempt_status := (call ->> 'status')::public.attempt_status;
  machine   constant boolean := (call ->> 'machine')::boolean;
  recording constant jsonb := nullif(call -> 'recording', 'null');
  stream    constant jsonb := nullif(call -> 'stream', 'null');
  transfer  constant jsonb := nullif(call -> 'transfer', 'null');
  merged    public.call_logs := attempt;
begin
  merged.call_sid := coalesce(attempt.call_sid, call ->> 'provider_call_id');
  merged.answered_at := coalesce(
    attempt.answered_at, private.clamp_time(call ->> 'answered_at', attempt.created_at, latest), case when status = 'in_progress' then latest end
  );
  if status = 'ringing' or attempt.ringing_at > merged.answered_at then
    -- It rang before it was answered, also where we heard of it later.
    merged.ringing_at := least(coalesce(attempt.ringing_at, latest), merged.answered_at);
  end if;
  -- Seconds that were counted stand; a call given up as lost may still turn out to have had some.
  merged.duration := coalesce(nullif(attempt.duration, 0), (call ->> 'duration_seconds')::integer, attempt.duration);
  merged.bill_duration_seconds := coalesce(
    nullif(attempt.bill_duration_seconds, 0), (call ->> 'bill_duration_seconds')::integer, attempt.bill_duration_seconds
  );
  if attempt.carrier_cost_micros is null and call ->> 'cost_micros' is not null then
    merged.carrier_cost_micros := (call ->> 'cost_micros')::bigint;
    merged.carrier_cost_currency := upper(call ->> 'cost_currency');
  end if;
  merged.machine := coalesce(attempt.machine or machine, machine, attempt.machine);
  -- An agent's recording, which has no id, gives way to the carrier's, whichever is told first.
  if recording is not null and attempt.recording_id is null then
    merged.recording_url := recording ->> 'url';
    merged.recording_id := recording ->> 'id';
    merged.recording_seconds := (recording ->> 'duration_seconds')::integer;
  elsif recording ->> 'id' = attempt.recording_id then
    merged.recording_seconds := coalesce(attempt.recording_seconds, (recording ->> 'duration_seconds')::integer);
  end if;
  if stream is not null then
    merged.stream_status := private.later_word(streams, attempt.stream_status, stream ->> 'status');
    merged.stream_id := least(attempt.stream_id, stream ->> 'id');
    merged.stream_error := coalesce(attempt.stream_error, stream ->> 'error');
  end if;
  if transfer is not null then
    merged.transfer_status := private.later_word(transfers, attempt.transfer_status, transfer ->> 'status');
    merged.transfer_sid := case
      when merged.transfer_status = attempt.transfer_status then coalesce(attempt.transfer_sid, transfer ->> 'leg')
      else coalesce(transfer ->> 'leg', attempt.transfer_sid)
    end;
    if merged.transfer_status in ('answered', 'completed') then
      merged.transferred := true;
      merged.transferred_at := coalesce(attempt.transferred_at, latest);
    end if;
  end if;
  return merged;
end
$$;
comment on function private.merge_call(public.call_logs, jsonb, timestamptz) is
  'A leg with what a carrier''s event tells of it added: what is known is kept, and no order of events ends in another row.';

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

create or replace function private.store_event(request jsonb, told jsonb, at timestamptz) returns private.webhook_events
language plpgsql volatile security definer set search_path = '' set jit = off set enable_seqscan = off as $$
declare
  event   private.webhook_events;
  applied record;
begin
  event.source := request ->> 'source';
  event.source_id := request ->> 'source_id';
  event.dedupe_key := told ->> 'dedupe_key';
  event.kind := told ->> 'kind';
  if event.source is null or event.source_id is null or event.dedupe_key is null or event.kind is null then
    perform private.raise_error(400, 'malformed_event', 'source, source_id, kind and dedupe_key are required');
  end if;
  event.id := private.uuid_v7();
  event.received_at := at;
  event.headers := request -> 'headers';
  event.body := request ->> 'body';
  event.tries := 1;
  -- The call of a carrier may stand beside its event, as it did before there were other payloads.
  event.payload := case when told ? 'payload' then told -> 'payload' else nullif(told -> 'call', 'null') end;
  event.payload_type := case
    when not told ? 'payload' then 'call'
    when told -> 'payload' ->> 'type' ~ '^[a-z][a-z_]{0,30}$' then told -> 'payload' ->> 'type'
    else 'nothing'
  end;

  -- The key decides, in the transaction of the effect: the second of two at once waits here for the first.
  insert into private.webhook_event_keys (source, source_id, dedupe_key, event_id, received_at)
  values (event.source, event.source_id, event.dedupe_key, event.id, at)
  on conflict (source, source_id, dedupe_key) do nothing;
  if not found then
    return event;
  end if;

  begin
    -- Known before it is applied, so that the sweep can lock it with others in order.
    event.attempt_id := coalesce(
      (told ->> 'attempt_id')::uuid, case when event.payload_type = 'agent' then private.attempt_of_agent(event) end
    );
    select * into applied from private.apply_payload(event, at);
    if event.attempt_id is null and (event.payload ->> 'inbound')::boolean then
      event.attempt_id := (select log.id from public.call_logs as log where log.call_sid = event.payload ->> 'provider_call_id');
    end if;
    event.status := applied.result;
    event.error := coalesce(applied.error, case when applied.result = 'ignored' then told ->> 'note' end);
    event.organization_id := applied.organization_id;
  exception when others then
    event.status := 'failed';
    event.error := sqlstate || ' ' || sqlerrm;
    event.next_try_at := now() + interval '1 minute';
    event.organization_id := (
      select source.organization_id from public.webhook_sources as source where source.id = private.to_uuid(event.source_id)
    );
  end;

  insert into private.webhook_events select event.*;
  perform private.note_unmapped(event.organization_id, event.source, told -> 'unmapped', event.id, at);
  return event;
end
$$;
comment on function private.store_event(jsonb, jsonb, timestamptz) is
  'Stores one event of a request under its key and applies it; without a status it was here before.';

revoke execute on function
  private.later_word(text[], text, text), private.merge_call(public.call_logs, jsonb, timestamptz)
from public, anon, authenticated, service_role;


-- Calls to the numbers of stores and organizations. The carriers have one URL for all that happens to such a call, and their events come
-- in any order: whichever comes first opens the rows.


create function private.open_inbound_leg(
  source text, source_id text, call jsonb, at timestamptz,
  out leg_id uuid, out error text
)
language plpgsql volatile security definer set search_path = '' as $$
declare
  call_id constant text := call ->> 'provider_call_id';
  account public.carrier_accounts;
  number  public.store_phone_numbers;
  leg     public.call_logs;
begin
  if call_id is null then
    error := 'unknown_call';
    return;
  end if;
  select log.id into leg_id from public.call_logs as log where log.call_sid = call_id;
  if leg_id is not null then
    return;
  end if;
  select known.* into account
  from public.carrier_accounts as known
  where known.id = private.to_uuid(open_inbound_leg.source_id) and known.provider::text = open_inbound_leg.source and known.is_active;
  if account.id is null then
    error := 'unknown_account';
    return;
  end if;

  -- Whose number it is: a store's, or one that an organization calls from. It counts only on the account on which it rings.
  select known.* into number
  from public.store_phone_numbers as known
  where known.phone_number = call ->> 'to' and known.is_active
    and coalesce(known.carrier_account_id, account.id) = account.id
    and coalesce(account.organization_id, known.organization_id) = known.organization_id;
  leg.organization_id := number.organization_id;
  if leg.organization_id is null then
    select known.organization_id into leg.organization_id
    from public.caller_numbers as known
    where known.phone_number = call ->> 'to' and known.is_active and known.carrier_account_id = account.id;
    -- Who calls back is the lead of that number, where there is one and no other.
    select (array_agg(lead.id))[1], (array_agg(lead.project_id))[1] into leg.lead_id, leg.project_id
    from public.leads as lead
    where lead.organization_id = leg.organization_id and lead.phone = call ->> 'from' and lead.archived_at is null
    having count(*) = 1;
  end if;
  if leg.organization_id is null then
    error := 'unknown_number';
    return;
  end if;

  insert into public.call_logs (
    organization_id, lead_id, project_id, direction, carrier_account_id, call_sid, caller_number, callee_number, status,
    time_limit_seconds, begun_at, created_at, lease_until
  )
  values (
    leg.organization_id, leg.lead_id, leg.project_id, 'inbound', account.id, call_id, coalesce(call ->> 'from', 'anonymous'), call ->> 'to',
    'initiated', 3600, now(), at, now() + interval '2 minutes'
  )
  on conflict (call_sid) do nothing
  returning id into leg_id;
  if leg_id is null then
    -- Another event of the same call was faster.
    select log.id into leg_id from public.call_logs as log where log.call_sid = call_id;
    return;
  end if;
  if number.id is not null then
    insert into public.calls (organization_id, store_id, call_log_id, customer_id, from_phone, to_phone, direction, start_time)
    select
      number.organization_id, number.store_id, leg_id,
      -- The customer of that number, where there is one and no other.
      (
        select (array_agg(customer.id))[1]
        from public.customers as customer
        where customer.organization_id = number.organization_id and customer.store_id = number.store_id
          and customer.phone = call ->> 'from'
        having count(*) = 1
      ),
      'anonymous', number.phone_number, 'inbound', at;
  end if;
end
$$;
comment on function private.open_inbound_leg(text, text, jsonb, timestamptz) is
  'The leg of a call to one of our numbers, by the carrier''s id of it; the first event of a call makes it, and a store''s view of it.';

create function private.open_inbound_call(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' set jit = off set enable_seqscan = off as $$
declare
  applied constant jsonb := private.apply_event(request, at);
  leg     public.call_logs;
begin
  select log.* into leg
  from public.call_logs as log
  where log.call_sid = request #>> '{events,0,payload,provider_call_id}'
    and log.carrier_account_id = private.to_uuid(request ->> 'source_id')
    and log.direction = 'inbound'
    and log.status <> 'ended';
  return jsonb_strip_nulls(applied || jsonb_build_object(
    'call', case when leg.id is not null then jsonb_build_object(
      'attempt_id', leg.id, 'carrier_account_id', leg.carrier_account_id, 'agent_id', leg.agent_id, 'record', leg.record_call
    ) end
  ));
end
$$;
comment on function private.open_inbound_call(jsonb, timestamptz) is
  'Stores the event of a call to one of our numbers as apply_event() does, and tells what its answer is made of; without a call there is '
  'nobody to connect it with.';

create function public.open_inbound_call(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.open_inbound_call($1, private.clock_now())
$$;
comment on function public.open_inbound_call(jsonb) is
  'An apply_event request with one event of a call to us -> {"result","organization_id"?,"call"?:{"attempt_id","carrier_account_id","agent_id"?,"record"}}. '
  'The same call again gives the same rows.';

revoke execute on function
  private.open_inbound_leg(text, text, jsonb, timestamptz), private.open_inbound_call(jsonb, timestamptz), public.open_inbound_call(jsonb)
from public, anon, authenticated, service_role;
grant execute on function private.open_inbound_call(jsonb, timestamptz), public.open_inbound_call(jsonb) to service_role;
