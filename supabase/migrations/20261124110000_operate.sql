-- Events out: kept for so long and no longer, told again when they were corrected, and delivered slowly to who is slow.
set local lock_timeout = '5s';
set local statement_timeout = '60s';


-- The outbox ----------------------------------------------------------------------------------------------------------------------

-- A key is an organization's: two of them reach the same share of the same meter in the same period.
-- A wider one takes its place in this transaction.
-- squawk-ignore ban-drop-constraint
alter table private.outbox drop constraint outbox_topic_key_key;
-- The table is new or small: it is read in no time.
-- squawk-ignore constraint-missing-not-valid, disallowed-unique-constraint
alter table private.outbox add constraint outbox_organization_id_topic_key_key unique (organization_id, topic, key);
-- Before the first release no installation is in use: the table is small.
-- squawk-ignore require-concurrent-index-creation
create index idx_outbox_created_at on private.outbox (created_at);
comment on table private.outbox is
  'What happened and is to be told, written in the transaction in which it happened; one row an organization, topic and key, so that nothing is told twice.';
comment on column private.outbox.payload is 'Empty once retention has taken it; the row stays on as the key of what was told.';

insert into private.event_types (topic, description) values ('call.updated', 'What call.ended said of a call was corrected.');
update private.event_types set description = 'What the voice agent made of a call is there, or is better than before.' where topic = 'call.analyzed';

-- Before the first release no installation is in use: the table is small.
-- squawk-ignore require-concurrent-index-creation
create index idx_event_deliveries_created_at on public.event_deliveries (created_at);
alter table public.webhook_endpoints add column is_slow boolean not null default false;
comment on column public.webhook_endpoints.is_slow is 'It kept somebody waiting lately, so that it is delivered to from a queue of its own kind, and holds up nobody else.';

comment on table private.retention_rules is
  'How long the rows of a table are kept, of those that apply_retention() knows; the operator''s setting. Without a row, or with nulls, for ever.';
comment on column private.retention_rules.keep_months is 'Whole months after which a month''s partition is dropped, or its rows are deleted.';
insert into private.retention_rules (table_name, strip_after, strip_columns, keep_months)
values
  -- Longer than the longest period of a plan: its events have keys of which there is one a period.
  ('private.outbox', '90 days', '{payload}', 13),
  ('public.event_deliveries', null, '{}', 3);


-- Functions -----------------------------------------------------------------------------------------------------------------------

create or replace function private.forget_events(rule private.retention_rules, most integer, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' set enable_seqscan = off as $$
declare
  oldest   constant timestamptz := (date_trunc('month', at at time zone 'UTC') - make_interval(months => rule.keep_months)) at time zone 'UTC';
  cutoff   constant timestamptz := date_trunc('hour', at - rule.strip_after);
  reached  timestamptz;
  stripped bigint := 0;
  deleted  bigint := 0;
begin
  if rule.strip_after is not null and cutoff > coalesce(rule.stripped_until, '-infinity') then
    with old as (
      select told.id, told.organization_id
      from private.outbox as told
      where told.created_at >= coalesce(rule.stripped_until, '-infinity') and told.created_at < cutoff and told.payload <> '{}'
        -- What an endpoint still waits for keeps what it carries; one that is switched off waits no longer.
        and not exists (
          select
          from public.webhook_endpoints as endpoint
          join public.event_deliveries as delivery on delivery.endpoint_id = endpoint.id and delivery.event_id = told.id
          where endpoint.organization_id = told.organization_id and endpoint.enabled and delivery.status in ('pending', 'failed')
        )
      order by told.created_at
      limit most
    ),
    gone as (
      delete from public.event_deliveries as delivery
      using old, public.webhook_endpoints as endpoint
      where endpoint.organization_id = old.organization_id and delivery.endpoint_id = endpoint.id and delivery.event_id = old.id
        and delivery.status in ('pending', 'failed')
    ),
    emptied as (
      update private.outbox as told
      set payload = '{}', dispatched_at = case when told.sequence is not null then coalesce(told.dispatched_at, at) else told.dispatched_at end
      from old
      where told.id = old.id
      returning told.created_at
    )
    select count(*), max(emptied.created_at) into stripped, reached from emptied;
    update private.retention_rules as known
    set stripped_until = case when stripped < most then cutoff else reached end
    where known.table_name = rule.table_name;
  end if;
  if rule.keep_months is not null and rule.table_name = 'private.outbox' then
    delete from private.outbox as told
    where told.id in (select old.id from private.outbox as old where old.created_at < oldest order by old.created_at limit most);
    get diagnostics deleted = row_count;
  elsif rule.keep_months is not null then
    delete from public.event_deliveries as delivery
    where delivery.id in (
      select old.id
      from public.event_deliveries as old
      join public.webhook_endpoints as endpoint on endpoint.id = old.endpoint_id
      where old.created_at < oldest and (old.status in ('delivered', 'dead') or not endpoint.enabled)
      order by old.created_at
      limit most
    );
    get diagnostics deleted = row_count;
  end if;
  return jsonb_build_object('stripped', stripped, 'deleted', deleted, 'more', stripped = most or deleted = most);
end
$$;
comment on function private.forget_events(private.retention_rules, integer, timestamptz) is
  'Empties events out that are old enough and waited for by nobody, and deletes them, or the log of their deliveries, when their time is over; so many rows at most.';

create or replace function private.end_event(attempt public.call_logs) returns jsonb
language sql stable set search_path = '' as $$
  select jsonb_build_object(
    'call_id', attempt.id, 'campaign_id', attempt.campaign_id, 'lead_id', attempt.lead_id, 'attempt_no', attempt.attempt_no,
    'outcome', attempt.call_status, 'answered_at', attempt.answered_at, 'ended_at', attempt.ended_at, 'duration_seconds', attempt.duration,
    'billed_seconds', attempt.bill_duration_seconds
  )
$$;
comment on function private.end_event(public.call_logs) is 'The end of a call as its events carry it.';

create or replace function private.tell_corrected() returns trigger
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
  tries    bigint;
  wait     interval;
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
        tries := (
          select count(*)
          from public.call_logs as log
          where log.organization_id = attempt.organization_id
            and log.queue_id = queue.id
            and log.call_status = end_attempt.outcome
        );
        wait := private.retry_wait(campaign, outcome, tries);
        if wait is not null then
          next_at := private.next_dial_at(
            attempt, campaign, attempt.ended_at + wait,
            exists (
              select from private.retry_rules as rule where rule.outcome = end_attempt.outcome and rule.nth = tries and rule.other_part
            )
          );
        end if;
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
      dial_class = case
        when final is null and reason = 'callback' then 2
        when final is null and counted then 1
        else waiting.dial_class
      end,
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
      private.end_event(attempt) || jsonb_build_object('lead_status', coalesce(final, 'queued'), 'next_attempt_at', next_at), at
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
  -- Of a call that was never made nothing was told. It was made after all.
  if amended.dialled and not attempt.dialled and attempt.direction <> 'inbound' then
    perform private.emit(
      amended.organization_id, 'call.ended', amended.id::text,
      private.end_event(amended) || (
        select jsonb_build_object(
          'lead_status', max(enrolled.status::text), 'next_attempt_at', max(waiting.next_retry_at) filter (where waiting.status = 'queued')
        )
        from public.campaign_leads as enrolled
        left join public.call_queue as waiting on waiting.organization_id = amended.organization_id and waiting.id = amended.queue_id
        where enrolled.organization_id = amended.organization_id and enrolled.campaign_id = amended.campaign_id
          and enrolled.lead_id = amended.lead_id
      ),
      at
    );
  end if;
  return true;
end
$$;
comment on function private.amend_attempt(public.call_logs, public.call_logs, public.call_outcome, timestamptz) is
  'Adds to an ended attempt what came late: cost, recording, seconds not yet counted, a better reason. It never ends twice. False if nothing was new.';

create or replace function private.apply_retention(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  most     constant integer := least(greatest(coalesce((request ->> 'rows')::integer, 20000), 1), 100000);
  days     constant integer := least(greatest(coalesce((request ->> 'days')::integer, 7), 1), 366);
  rule     private.retention_rules;
  parent   text;
  key_name name;
  part     record;
  oldest   timestamptz;
  cutoff   timestamptz;
  done     bigint;
  stripped bigint := 0;
  deleted  bigint := 0;
  dropped  jsonb := '[]'::jsonb;
  unplaced jsonb := '{}'::jsonb;
  told     jsonb;
  more     boolean := false;
begin
  -- Whoever reads or writes the table for long is not made to wait behind this: there is a next run.
  perform set_config('lock_timeout', '2s', true);
  for rule in
    select known.* from private.retention_rules as known where to_regclass(known.table_name) is not null order by known.table_name for update
  loop
    if rule.table_name in ('private.outbox', 'public.event_deliveries') then
      told := private.forget_events(rule, most, at);
      stripped := stripped + (told ->> 'stripped')::bigint;
      deleted := deleted + (told ->> 'deleted')::bigint;
      more := more or (told ->> 'more')::boolean;
      continue;
    end if;
    select attribute.attname into key_name
    from pg_catalog.pg_partitioned_table as split
    join pg_catalog.pg_attribute as attribute on attribute.attrelid = split.partrelid and attribute.attnum = split.partattrs[0]
    where split.partrelid = rule.table_name::regclass and split.partstrat = 'r';
    continue when key_name is null;
    parent := split_part(rule.table_name, '.', 2);

    if rule.keep_months is not null then
      oldest := (date_trunc('month', at at time zone 'UTC') - make_interval(months => rule.keep_months)) at time zone 'UTC';
      for part in
        select child.relname as name
        from pg_catalog.pg_inherits as split
        join pg_catalog.pg_class as child on child.oid = split.inhrelid
        where split.inhparent = rule.table_name::regclass
          and child.relname ~ ('^' || parent || '_[0-9]{6}$')
          and to_date(right(child.relname, 6), 'YYYYMM') + interval '1 month' <= oldest at time zone 'UTC'
        order by child.relname
      loop
        begin
          if rule.table_name = 'private.usage_events' then
            perform private.seal_usage(to_regclass(format('private.%I', part.name)), oldest);
          end if;
          perform private.drop_month(to_regclass(format('private.%I', part.name)));
          dropped := dropped || to_jsonb('private.' || part.name);
        exception when lock_not_available then
          raise notice '% is in use; it is dropped at the next run', part.name;
        end;
      end loop;
      if rule.table_name = 'private.usage_events' then
        perform private.seal_usage(to_regclass(format('private.%I', parent || '_default')), oldest);
      end if;
      deleted := deleted + private.delete_before(to_regclass(format('private.%I', parent || '_default')), key_name, oldest);
    end if;

    if rule.strip_after is not null and cardinality(rule.strip_columns) > 0 then
      if rule.stripped_until is null then
        rule.stripped_until := private.first_time(rule.table_name::regclass, key_name);
      end if;
      cutoff := least(date_trunc('hour', at - rule.strip_after), rule.stripped_until + make_interval(days => days));
      if cutoff > rule.stripped_until then
        stripped := stripped
          + private.strip_between(rule.table_name::regclass, key_name, rule.strip_columns, rule.stripped_until, cutoff);
        update private.retention_rules as known set stripped_until = cutoff where known.table_name = rule.table_name;
      end if;
    end if;
  end loop;

  for part in
    select split.inhparent::regclass::text as parent, child.relname as name
    from pg_catalog.pg_inherits as split
    join pg_catalog.pg_class as child on child.oid = split.inhrelid
    where child.relnamespace = 'private'::regnamespace and pg_get_expr(child.relpartbound, child.oid) = 'DEFAULT'
    order by child.relname
  loop
    done := private.count_astray(to_regclass(format('private.%I', part.name)));
    if done > 0 then
      unplaced := unplaced || jsonb_build_object(part.parent, done);
    end if;
  end loop;
  -- No queue holds an event for so long.
  delete from private.erased_persons as known where known.erased_at < at - interval '90 days';

  -- Old usage may come at any time: its month is made for it, a few of them a run, and whoever is in the way has it done by the next.
  for oldest in
    select distinct date_trunc('month', event.occurred_at at time zone 'UTC') at time zone 'UTC' as month
    from private.usage_events_default as event
    order by month
    limit 12
  loop
    begin
      perform private.ensure_partitions('private.usage_events', oldest, 0);
    exception when lock_not_available or deadlock_detected then
      raise notice 'usage_events is in use; the month of % is made at the next run', oldest;
    end;
  end loop;
  return jsonb_build_object('dropped', dropped, 'deleted', deleted, 'stripped', stripped, 'unplaced', unplaced, 'more', more);
end
$$;
comment on function private.apply_retention(jsonb, timestamptz) is
  'Empties what is old enough, drops months past their time, and tells of rows that no month''s partition took. The keys of events stay: '
  'a duplicate is one however late it comes. Failed and dead events keep what they carry until their month goes.';

create or replace function public.apply_retention(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.apply_retention($1, private.clock_now())
$$;
comment on function public.apply_retention(jsonb) is
  '{"v":1,"days":7,"rows":20000} -> {"dropped":[partition],"deleted":n,"stripped":n,"unplaced":{table: n},"more"}. Empties at most so many days'' rows '
  'of what comes in, and so many rows of what goes out, at once; more: call again.';

create or replace function private.number_event() returns trigger
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

create or replace function private.tell_call() returns trigger
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

create or replace function private.claim_deliveries(request jsonb, at timestamptz) returns jsonb
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
    set lease_until = now() + interval '3 minutes', lease_token = null
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

create or replace function public.claim_deliveries(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.claim_deliveries($1, private.clock_now())
$$;
comment on function public.claim_deliveries(jsonb) is
  '{"v":1,"limit":n} -> {"deliveries":[{"id","organization_id","slow"}],"more"}. Each is to be put on the queue: what is slow, on that of the slow.';

create or replace function private.begin_deliveries(request jsonb, at timestamptz) returns jsonb
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

create or replace function public.begin_deliveries(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.begin_deliveries($1, private.clock_now())
$$;
comment on function public.begin_deliveries(jsonb) is
  '{"v":1,"lease_token","deliveries":[id],"slow"?} -> {"deliveries":[{"id","organization_id","endpoint_id","event_id","url","body","secret_sealed",'
  '"previous_sealed"?}],"more"}. slow: whether they came from the queue of the slow. More: some were given back, and are due.';

create or replace function private.record_deliveries(request jsonb, at timestamptz) returns jsonb
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

create or replace function private.replay_delivery(delivery_id uuid, at timestamptz) returns jsonb
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

create or replace function public.replay_delivery(delivery_id uuid) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.replay_delivery(delivery_id, private.clock_now())
$$;
comment on function public.replay_delivery(uuid) is 'Sends an event to its endpoint again; 409 when that is switched off, 410 when the event is no longer kept. Needs webhook.manage.';

create or replace function private.replay_deliveries(endpoint_id uuid, since timestamptz, until timestamptz, at timestamptz) returns jsonb
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


-- What happened -------------------------------------------------------------------------------------------------------------------

drop trigger tell_call on public.call_logs;
create trigger tell_call after update of status, answered_at, ai_analysis, summary, sentiment_score, interest_level on public.call_logs
  for each row when (
    old.status < 'queued' and new.status >= 'queued' or old.answered_at is null and new.answered_at is not null
    or new.ai_analysis is not null and (old.ai_analysis, old.summary, old.sentiment_score, old.interest_level)
      is distinct from (new.ai_analysis, new.summary, new.sentiment_score, new.interest_level)
  ) execute function private.tell_call();
create trigger tell_corrected after update of call_status, answered_at, ended_at, duration, bill_duration_seconds on public.call_logs
  for each row when (
    old.status = 'ended' and new.status = 'ended' and (old.dialled or old.direction = 'inbound')
    and (old.call_status, old.answered_at, old.ended_at, old.duration, old.bill_duration_seconds)
      is distinct from (new.call_status, new.answered_at, new.ended_at, new.duration, new.bill_duration_seconds)
  ) execute function private.tell_corrected();


-- Who may call --------------------------------------------------------------------------------------------------------------------

revoke execute on function private.end_event(public.call_logs), private.tell_corrected() from public;
revoke execute on function private.forget_events(private.retention_rules, integer, timestamptz) from public, anon, authenticated, service_role;


-- Connecting ----------------------------------------------------------------------------------------------------------------------

create or replace function private.connect_functions(functions_url text, nudge_key text) returns jsonb
language plpgsql volatile security invoker set search_path = '' as $$
declare
  wanted record;
  known  uuid;
  before text;
  told   jsonb := '{}'::jsonb;
begin
  if to_regprocedure('vault.create_secret(text,text,text,uuid)') is null
    or to_regprocedure('net.http_post(text,jsonb,jsonb,jsonb,integer)') is null
  then
    raise exception 'the extensions supabase_vault and pg_net are needed: switch both on' using errcode = 'feature_not_supported';
  end if;
  if functions_url !~ '^https?://[^/\s]+/functions/v1$' then
    raise exception 'the functions'' address ends in /functions/v1, without a slash after it' using errcode = 'invalid_parameter_value';
  end if;
  if nudge_key !~ '^whsec_[A-Za-z0-9+/]{32,}=*$' then
    raise exception 'a nudge key is whsec_ and at least 24 bytes in base64' using errcode = 'invalid_parameter_value';
  end if;
  for wanted in select * from (values ('trunkline_functions_url', functions_url), ('trunkline_nudge_key', nudge_key)) as secret (name, value) loop
    select vault.id, vault.decrypted_secret into known, before from vault.decrypted_secrets as vault where vault.name = wanted.name;
    if known is null then
      perform vault.create_secret(wanted.value, wanted.name, 'Trunkline: see docs/deploy.md');
    elsif before is distinct from wanted.value then
      perform vault.update_secret(known, wanted.value);
    end if;
    told := told || jsonb_build_object(
      wanted.name, case when known is null then 'set' when before is distinct from wanted.value then 'changed' else 'as before' end
    );
  end loop;
  return told || jsonb_build_object('database_webhooks', (
    select coalesce(jsonb_agg(format('%s on %s', hook.tgname, hook.tgrelid::regclass) order by hook.tgrelid::regclass::text, hook.tgname), '[]')
    from pg_catalog.pg_trigger as hook
    join pg_catalog.pg_proc as routine on routine.oid = hook.tgfoid
    where routine.pronamespace = 'private'::regnamespace and routine.proname ~ '^nudge_' and hook.tgenabled in ('O', 'A')
  ));
end
$$;
comment on function private.connect_functions(text, text) is
  'Says where the functions are and with what key they are nudged: both go to Vault, where the triggers that are our database webhooks read them. '
  'For the database''s owner, who runs it again after a rotation; returns what changed, and the webhooks that there are.';
revoke execute on function private.connect_functions(text, text) from public;
