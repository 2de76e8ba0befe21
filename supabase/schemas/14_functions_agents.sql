-- What a voice agent's events mean. An event finds its attempt by our id, which the agent was given with the call, by the carrier's call,
-- or by the agent's own. Events come in any order and more than once: of two values the one that knows more stays, so that the row in
-- which a call's events end is the same. Locks are taken in the order that 06_campaigns_and_calling.sql names.


create function private.attempt_of_agent(event private.webhook_events) returns uuid
language plpgsql stable security definer set search_path = '' as $$
declare
  told   jsonb := event.payload;
  tenant uuid := (
    select source.organization_id from public.webhook_sources as source where source.id = private.to_uuid(event.source_id)
  );
  found_id uuid;
begin
  select log.id into found_id from public.call_logs as log where log.id = private.to_uuid(told ->> 'attempt_id');
  if found_id is null and told ->> 'provider_call_id' is not null then
    select log.id into found_id
    from public.call_logs as log
    where log.call_sid = told ->> 'provider_call_id' and log.organization_id = coalesce(tenant, log.organization_id);
  end if;
  if found_id is null and told ->> 'agent_call_id' is not null then
    select log.id into found_id
    from public.call_logs as log
    where log.agent_call_id = left(told ->> 'agent_call_id', 200) and log.organization_id = coalesce(tenant, log.organization_id)
    order by log.created_at desc
    limit 1;
  end if;
  return found_id;
end
$$;
comment on function private.attempt_of_agent(private.webhook_events) is
  'Which attempt an agent''s event is about, within the organization of its source; null when it is not known.';

create function private.knows_more(ranks jsonb, field text, rank integer, known text, told text) returns boolean
language sql immutable parallel safe set search_path = '' as $$
  select told is not null and (
    known is null
    or (rank, length(told), told collate "C") > (coalesce((ranks ->> field)::integer, -1), length(known), known collate "C")
  )
$$;
comment on function private.knows_more(jsonb, text, integer, text, text) is
  'Whether a value that is told replaces the one that is known: it comes of a later kind of event, or is longer. A total order, so that '
  'the order of events does not matter.';

create function private.number_of_person(attempt public.call_logs) returns text
language sql immutable parallel safe set search_path = '' as $$
  select case attempt.direction when 'inbound' then attempt.caller_number else attempt.callee_number end
$$;
comment on function private.number_of_person(public.call_logs) is 'The number of the person in a call, whoever dialled.';

create function private.lock_person(attempt public.call_logs, everywhere boolean) returns void
language plpgsql volatile security definer set search_path = '' as $$
declare
  people uuid[] := array(
    select lead.id
    from public.leads as lead
    where lead.organization_id = attempt.organization_id
      and (lead.id = attempt.lead_id or everywhere and lead.phone = private.number_of_person(attempt))
  );
begin
  perform
  from public.call_queue as queue
  where queue.organization_id = attempt.organization_id
    and (queue.id = attempt.queue_id or everywhere and queue.lead_id = any (people))
  order by queue.id
  for no key update;
  perform
  from public.campaign_leads as member
  where member.organization_id = attempt.organization_id and member.lead_id = any (people)
    and (everywhere or member.campaign_id = attempt.campaign_id)
  order by member.id
  for no key update;
  perform from public.leads as lead where lead.id = any (people) order by lead.id for no key update;
  perform
  from public.campaigns as campaign
  where campaign.id = attempt.campaign_id
    or campaign.id in (
      select queue.campaign_id
      from public.call_queue as queue
      where everywhere and queue.organization_id = attempt.organization_id and queue.lead_id = any (people)
    )
  order by campaign.id
  for no key update;
end
$$;
comment on function private.lock_person(public.call_logs, boolean) is
  'Locks what a word of the person called may change, table by table and by id: of this call''s campaign, or of all of the organization''s.';

create function private.opt_out(organization uuid, phone text, reason text, at timestamptz) returns boolean
language plpgsql volatile security definer set search_path = '' as $$
declare
  waiting  uuid[];
  closed   record;
  campaign public.campaigns;
begin
  if phone is null or phone !~ '^\+[1-9][0-9]{6,14}$' then
    return false;
  end if;
  insert into public.suppressions (organization_id, phone_number, source, reason)
  values (organization, phone, 'call', reason)
  on conflict (organization_id, phone_number) do nothing;
  waiting := array(
    select queue.id
    from public.leads as lead
    join public.call_queue as queue on queue.organization_id = lead.organization_id and queue.lead_id = lead.id
    where lead.organization_id = organization and lead.phone = opt_out.phone and queue.status = 'queued'
    order by queue.id
  );
  update public.call_queue as queue
  set status = 'failed', last_error = 'opted_out', wait_reason = null
  where queue.id = any (waiting);
  update public.campaign_leads as member
  set status = 'opted_out', skip_reason = 'opted_out', opted_out_at = at, opt_out_reason = reason
  from public.call_queue as queue
  where queue.id = any (waiting)
    and member.organization_id = queue.organization_id
    and member.campaign_id = queue.campaign_id
    and member.lead_id = queue.lead_id;
  update public.leads as lead
  set
    do_not_call = true, status = 'do_not_call', opted_out_at = coalesce(lead.opted_out_at, at),
    opt_out_reason = coalesce(lead.opt_out_reason, reason), callback_time = null
  where lead.organization_id = organization and lead.phone = opt_out.phone
    and (not lead.do_not_call or lead.status <> 'do_not_call' or lead.callback_time is not null);

  for closed in
    select queue.campaign_id as id, count(*)::integer as leads
    from public.call_queue as queue
    where queue.id = any (waiting)
    group by queue.campaign_id
    order by queue.campaign_id
  loop
    update public.campaigns as running
    set
      open_leads = running.open_leads - closed.leads,
      status = case
        when running.open_leads = closed.leads and running.auto_complete and running.status in ('running', 'paused') then 'completed'
        else running.status
      end,
      completed_at = case
        when running.open_leads = closed.leads and running.auto_complete and running.status in ('running', 'paused') then at
        else running.completed_at
      end
    where running.id = closed.id
    returning running.* into campaign;
    if campaign.status = 'completed' then
      perform private.campaign_completed(campaign.organization_id, campaign.id, at);
    end if;
  end loop;
  return true;
end
$$;
comment on function private.opt_out(uuid, text, text, timestamptz) is
  'Somebody does not want to be called: the number is suppressed, its leads are marked, and all that waits to call it in any campaign of the '
  'organization is cancelled, in one transaction. Again, and nothing changes. The caller holds the locks of private.lock_person().';

create function private.call_back(attempt public.call_logs, moment timestamptz, at timestamptz) returns void
language plpgsql volatile security definer set search_path = '' as $$
declare
  queue    public.call_queue;
  campaign public.campaigns;
  next_at  timestamptz;
begin
  if moment is null or moment <= at or moment > at + interval '90 days' or exists (
    select
    from public.suppressions as suppression
    where suppression.organization_id = attempt.organization_id
      and suppression.phone_number = private.number_of_person(attempt)
  ) then
    return;
  end if;
  update public.leads as lead
  set callback_time = moment
  where lead.organization_id = attempt.organization_id and lead.id = attempt.lead_id and lead.callback_time is distinct from moment;

  select waiting.* into queue from public.call_queue as waiting where waiting.id = attempt.queue_id;
  -- A later attempt has its own say.
  if queue.id is null or queue.dispatch_count <> attempt.attempt_no then
    return;
  end if;
  if queue.status = 'processing' then
    -- The end of the call reads it.
    update public.call_queue as waiting
    set metadata = waiting.metadata || jsonb_build_object('callback_at', moment)
    where waiting.id = queue.id;
    return;
  end if;
  select running.* into campaign from public.campaigns as running where running.id = queue.campaign_id;
  if campaign.status not in ('scheduled', 'running', 'paused') then
    return;
  end if;
  next_at := private.next_dial_at(attempt, campaign, greatest(moment, attempt.ended_at));
  update public.call_queue as waiting
  set
    status = 'queued', next_retry_at = next_at, wait_reason = 'callback',
    max_attempts = greatest(waiting.max_attempts, waiting.attempt_count + 1)
  where waiting.id = queue.id;
  if queue.status <> 'queued' then
    update public.campaign_leads as member
    set status = 'queued', skip_reason = null
    where member.organization_id = queue.organization_id
      and member.campaign_id = queue.campaign_id
      and member.lead_id = queue.lead_id;
    update public.campaigns as running set open_leads = running.open_leads + 1 where running.id = campaign.id;
  end if;
end
$$;
comment on function private.call_back(public.call_logs, timestamptz, timestamptz) is
  'Somebody asked to be called at a time: the lead says so, and the queue row of this attempt, locked already, waits for then, also when the '
  'call had closed it. A campaign that is over is not opened again.';

create function private.note_activity(
  attempt public.call_logs, key text, type text, content jsonb, happened_at timestamptz
) returns boolean
language plpgsql volatile security definer set search_path = '' as $$
begin
  if attempt.lead_id is null then
    return false;
  end if;
  insert into public.lead_activities as activity (id, organization_id, lead_id, type, content, created_by, created_at)
  values (
    md5(attempt.id || '|' || key)::uuid, attempt.organization_id, attempt.lead_id, note_activity.type,
    jsonb_strip_nulls(jsonb_build_object('call_id', attempt.id) || content), null, happened_at
  )
  on conflict (id) do update
  set content = excluded.content
  where activity.content is distinct from excluded.content;
  return found;
end
$$;
comment on function private.note_activity(public.call_logs, text, text, jsonb, timestamptz) is
  'One line in a lead''s timeline for one thing that happened in a call; told again it is the same line.';

create function private.follow_conversation(
  attempt public.call_logs, told jsonb, replaces boolean, is_over boolean, at timestamptz
) returns void
language plpgsql volatile security definer set search_path = '' as $$
declare
  call         public.calls;
  conversation public.conversations;
  agent        jsonb := attempt.metadata -> 'agent';
  ended        timestamptz;
begin
  select mine.* into call
  from public.calls as mine
  where mine.organization_id = attempt.organization_id and mine.call_log_id = attempt.id
  for no key update;
  if call.id is null then
    return;
  end if;
  select held.* into conversation
  from public.conversations as held
  where held.organization_id = call.organization_id and held.store_id = call.store_id and held.id = call.conversation_id
  for no key update;
  if conversation.id is null then
    insert into public.conversations (
      organization_id, store_id, conversation_key, order_id, customer_id, channel, customer_identifier, start_time, last_activity_at
    )
    values (
      call.organization_id, call.store_id, 'agent:' || attempt.id, call.order_id, call.customer_id, 'voice',
      private.to_call_party(private.number_of_person(attempt)), call.start_time, call.start_time
    )
    on conflict (organization_id, store_id, conversation_key) do update set channel = 'voice'
    returning * into conversation;
  end if;
  update public.calls as mine
  set conversation_id = conversation.id, call_id = coalesce(mine.call_id, left(attempt.agent_call_id, 100))
  where mine.id = call.id
    and (mine.conversation_id is distinct from conversation.id or mine.call_id is null and attempt.agent_call_id is not null);

  if replaces then
    insert into public.conversation_messages as message (
      organization_id, store_id, conversation_id, message_index, external_message_id, role, type, content, timestamp
    )
    select
      conversation.organization_id, conversation.store_id, conversation.id, (said.place - 1)::integer, 'agent:' || said.place,
      (said.value ->> 'role')::public.message_role, 'text', said.value ->> 'text',
      coalesce(private.clamp_time(said.value ->> 'at', conversation.start_time, greatest(at, conversation.start_time)), conversation.start_time)
    from jsonb_array_elements(told -> 'messages') with ordinality as said (value, place)
    on conflict (organization_id, store_id, conversation_id, external_message_id) do update
    set role = excluded.role, content = excluded.content, timestamp = excluded.timestamp
    where (message.role, message.content, message.timestamp) is distinct from (excluded.role, excluded.content, excluded.timestamp);
    delete from public.conversation_messages as message
    where message.organization_id = conversation.organization_id
      and message.store_id = conversation.store_id
      and message.conversation_id = conversation.id
      and message.external_message_id like 'agent:%'
      and substr(message.external_message_id, 7)::integer > jsonb_array_length(told -> 'messages');
  end if;

  ended := greatest(private.clamp_time(agent ->> 'ended_at', conversation.start_time, at), conversation.start_time);
  update public.conversations as held
  set
    summary = coalesce(attempt.summary, held.summary),
    sentiment_score = coalesce(attempt.sentiment_score, held.sentiment_score),
    escalated_to_human = held.escalated_to_human or attempt.transferred,
    escalation_reason = coalesce(attempt.transfer_reason, held.escalation_reason),
    ai_context = held.ai_context || jsonb_strip_nulls(jsonb_build_object('language', agent -> 'language')),
    status = case when is_over and held.status in ('active', 'paused', 'escalated') then 'completed' else held.status end,
    end_time = case when is_over or held.end_time is not null then coalesce(ended, held.end_time, greatest(at, held.start_time)) end
  where held.organization_id = conversation.organization_id
    and held.store_id = conversation.store_id
    and held.id = conversation.id;
end
$$;
comment on function private.follow_conversation(public.call_logs, jsonb, boolean, boolean, timestamptz) is
  'The conversation of a call that is a store''s: opened, its messages written, summed up and closed as the agent tells it.';

create function private.apply_agent_event(
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
comment on function private.apply_agent_event(private.webhook_events, public.webhook_sources, timestamptz) is
  'What an agent''s event means for its attempt: transcript, analysis, recording and tools land in the call, the conversation and the lead. '
  'The state of the call is the carrier''s to tell.';

revoke execute on function
  private.attempt_of_agent(private.webhook_events), private.knows_more(jsonb, text, integer, text, text),
  private.number_of_person(public.call_logs), private.lock_person(public.call_logs, boolean), private.opt_out(uuid, text, text, timestamptz),
  private.call_back(public.call_logs, timestamptz, timestamptz),
  private.note_activity(public.call_logs, text, text, jsonb, timestamptz),
  private.follow_conversation(public.call_logs, jsonb, boolean, boolean, timestamptz),
  private.apply_agent_event(private.webhook_events, public.webhook_sources, timestamptz)
from public, anon, authenticated, service_role;
