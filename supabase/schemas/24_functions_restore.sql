-- A database that came back from a backup does not know what was dialled and numbered since. Until it does, nobody is called.

create table private.restores (
  id             uuid primary key default private.uuid_v7(),
  since          timestamptz not null,
  began_at       timestamptz not null default now(),
  settles_at     timestamptz not null,
  invoices_seen  boolean not null default false,
  credits_seen   boolean not null default false,
  was_enabled    boolean not null,
  reason_before  text,
  finished_at    timestamptz,
  check (since <= began_at)
);
create unique index idx_restores_one_open on private.restores ((true)) where finished_at is null;
select private.close_table('private.restores');
comment on table private.restores is 'Times the database was restored from a backup, and how far it has learnt since then what it does not know. At most one is open.';
comment on column private.restores.since is 'Real time up to which the backup knows everything.';
comment on column private.restores.settles_at is 'Real time at which every call that was under way when dialling stopped is over, so that a record of it is found.';
comment on column private.restores.invoices_seen is 'The operator has named the highest invoice number of the archive, or that there is none since.';
comment on column private.restores.credits_seen is 'The same for credit notes.';
comment on column private.restores.was_enabled is 'Whether the backup had dialling on; what it had is put back at the end.';

create table private.restore_accounts (
  restore_id         uuid not null references private.restores (id) on delete cascade,
  carrier_account_id uuid not null references public.carrier_accounts (id) on delete cascade,
  next_page          text,
  reading_since      timestamptz,
  read_at            timestamptz,
  lease_until        timestamptz,
  calls_booked       integer not null default 0 check (calls_booked >= 0),
  primary key (restore_id, carrier_account_id)
);
create index idx_restore_accounts_account on private.restore_accounts (carrier_account_id);
select private.close_table('private.restore_accounts');
comment on table private.restore_accounts is 'Carrier accounts whose calls since the backup are read, page by page, and again until a reading began after every call was over.';
comment on column private.restore_accounts.reading_since is 'When the reading that is under way began; null between readings.';
comment on column private.restore_accounts.read_at is 'When the last reading that came to its end began.';

create function private.begin_restore(since timestamptz) returns jsonb
language plpgsql security definer set search_path = '' as $$
declare
  before   private.platform_dialling;
  restored private.restores;
begin
  if since is null or since > now() then
    perform private.raise_error(422, 'invalid_time', 'Say from when the backup is, a time in the past', 'since');
  end if;
  -- Whoever releases or begins a call reads this row; from here on nobody does.
  select switch.* into before from private.platform_dialling as switch for update;
  insert into private.restores (since, settles_at, was_enabled, reason_before)
  values (
    since,
    now() + interval '2 minutes' + make_interval(secs => coalesce((
      select max(campaign.max_call_seconds) from public.campaigns as campaign where campaign.status in ('running', 'paused')
    ), 600)),
    coalesce(before.dialling_enabled, false), before.reason
  )
  on conflict do nothing
  returning * into restored;
  if restored.id is null then
    perform private.raise_error(409, 'restore_open', 'A restore is open already: finish it first');
  end if;
  insert into private.platform_dialling (single, dialling_enabled, reason)
  values (true, false, format('restored to %s: the carriers'' calls since then are being booked', since))
  on conflict (single) do update set dialling_enabled = false, reason = excluded.reason;
  insert into private.restore_accounts (restore_id, carrier_account_id)
  select restored.id, account.id from public.carrier_accounts as account where account.is_active;
  perform private.audit(null, 'restore.begun', 'platform', null, jsonb_build_object('since', since), private.clock_now());
  return to_jsonb(restored);
end
$$;
comment on function private.begin_restore(timestamptz) is
  'For the operator, first thing after a backup was restored: stops all dialling, and has the carriers asked for their calls since then.';

create function private.claim_restore_page() returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  claimed jsonb;
begin
  with due as (
    select waiting.restore_id, waiting.carrier_account_id
    from private.restore_accounts as waiting
    join private.restores as restored on restored.id = waiting.restore_id and restored.finished_at is null
    where (waiting.lease_until is null or waiting.lease_until < now())
      and (waiting.read_at is null or waiting.read_at < restored.settles_at)
      -- What was read is read again a little later, and not all the time.
      and (waiting.read_at is null or waiting.reading_since is not null or waiting.read_at < now() - interval '2 minutes')
    order by waiting.read_at nulls first, waiting.carrier_account_id
    limit 1
    for no key update of waiting skip locked
  ),
  taken as (
    update private.restore_accounts as own
    set lease_until = now() + interval '5 minutes', reading_since = coalesce(own.reading_since, now())
    from due
    where own.restore_id = due.restore_id and own.carrier_account_id = due.carrier_account_id
    returning own.*
  )
  select jsonb_build_object(
    'since', restored.since, 'until', taken.reading_since, 'next_page', taken.next_page, 'provider', account.provider,
    'carrier_account_id', account.id, 'account_sid', account.account_sid, 'credentials_sealed', account.credentials_sealed,
    'api_base', account.api_base
  )
  into claimed
  from taken
  join private.restores as restored on restored.id = taken.restore_id
  join public.carrier_accounts as account on account.id = taken.carrier_account_id;
  return claimed;
end
$$;
comment on function private.claim_restore_page() is
  'While a restore is open, gives out one account whose calls since the backup are to be read on, for five minutes.';

create function public.claim_restore_page(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.claim_restore_page()
$$;
comment on function public.claim_restore_page(jsonb) is
  '{"v":1} -> {"since","until","next_page","provider","carrier_account_id","account_sid","credentials_sealed","api_base"}, or null when nothing is to be read.';

create function private.book_call(account uuid, call jsonb, at timestamptz) returns boolean
language plpgsql volatile security definer set search_path = '' as $$
declare
  call_id constant text := call ->> 'provider_call_id';
  callee  constant text := call ->> 'to';
  seconds constant integer := greatest(coalesce((call ->> 'bill_duration_seconds')::integer, 0), 0);
  -- As business time stands now, for a demonstration's clock.
  shift   constant interval := at - now();
  outcome constant public.call_outcome := coalesce(
    (call ->> 'outcome')::public.call_outcome, case when seconds > 0 then 'answered' else 'no_answer' end::public.call_outcome
  );
  began   constant timestamptz := coalesce((call ->> 'started_at')::timestamptz, now());
  number  public.caller_numbers;
  attempt public.call_logs;
  waiting public.call_queue;
  lead    public.leads;
begin
  if call_id is null or callee !~ '^\+[1-9][0-9]{1,14}$' or exists (
    select from public.call_logs as known where known.call_sid = call_id or known.transfer_sid = call_id
  ) then
    return false;
  end if;
  select own.* into number
  from public.caller_numbers as own
  where own.phone_number = call ->> 'from' and own.carrier_account_id = account;
  if number.id is null then
    -- Somebody called us, or it is not our call: the daily comparison tells of it.
    return false;
  end if;

  -- An attempt of before the backup that was dialled after it.
  select log.* into attempt
  from public.call_logs as log
  where log.carrier_account_id = account and log.callee_number = callee and log.caller_number = number.phone_number
    and log.direction = 'outbound' and log.status <> 'ended' and log.call_sid is null and log.created_at - shift <= began;
  if attempt.id is null then
    select own.* into lead
    from public.leads as own
    where own.organization_id = number.organization_id and own.phone = callee
    order by own.archived_at is not null, own.created_at desc
    limit 1;
    select queue.* into waiting
    from public.call_queue as queue
    join public.campaigns as campaign on campaign.id = queue.campaign_id and campaign.status in ('running', 'paused')
    where queue.organization_id = number.organization_id and queue.lead_id = lead.id and queue.status = 'queued'
    order by queue.next_retry_at, queue.id
    limit 1
    for no key update of queue;
    insert into public.call_logs (
      organization_id, campaign_id, lead_id, project_id, queue_id, attempt_no, carrier_account_id, call_sid, caller_number, callee_number,
      status, dialled, begun_at, created_at, submitted_at, lease_until, metadata
    )
    values (
      number.organization_id, waiting.campaign_id, lead.id, lead.project_id, waiting.id, coalesce(waiting.dispatch_count, 0) + 1, account,
      call_id, number.phone_number, callee, 'initiated', true, began, began + shift, began + shift, now(), '{"restored": true}'
    )
    -- While a call to the number is open another one cannot be; the next reading books this one.
    on conflict (callee_number) where direction = 'outbound' and status <> 'ended' do nothing
    returning * into attempt;
    if attempt.id is null then
      return false;
    end if;
    update public.call_queue as queue
    set status = 'processing', dispatch_count = queue.dispatch_count + 1, wait_reason = null
    where queue.id = waiting.id;
    update public.campaign_leads as member
    set status = 'calling'
    where member.organization_id = attempt.organization_id and member.campaign_id = attempt.campaign_id and member.lead_id = attempt.lead_id;
  end if;

  perform private.lock_attempts(array[attempt.id]);
  select log.* into attempt from public.call_logs as log where log.id = attempt.id;
  attempt.call_sid := call_id;
  attempt.dialled := true;
  attempt.begun_at := coalesce(attempt.begun_at, began);
  attempt.submitted_at := coalesce(attempt.submitted_at, began + shift);
  attempt.bill_duration_seconds := seconds;
  attempt.duration := coalesce((call ->> 'duration_seconds')::integer, seconds);
  attempt.carrier_cost_micros := (call ->> 'cost_micros')::bigint;
  attempt.carrier_cost_currency := case when attempt.carrier_cost_micros is not null then call ->> 'cost_currency' end;
  if outcome = 'answered' then
    attempt.answered_at := greatest(coalesce((call ->> 'answered_at')::timestamptz, began) + shift, attempt.created_at);
  end if;
  attempt.ended_at := greatest(coalesce((call ->> 'ended_at')::timestamptz, began + make_interval(secs => seconds)) + shift, attempt.created_at);
  perform private.end_attempt(attempt, outcome, at);
  return true;
end
$$;
comment on function private.book_call(uuid, jsonb, timestamptz) is
  'Writes down one call that the carrier made and the restored database does not know: as the end of the attempt that it was, or as an attempt of '
  'its own, for gap and caps, usage and the lead''s way through its campaign. Whether it did.';

create function private.book_calls(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  account constant uuid := (request ->> 'carrier_account_id')::uuid;
  is_last constant boolean := request ->> 'next_page' is null;
  booked  integer := 0;
  call    jsonb;
begin
  perform
  from private.restore_accounts as own
  join private.restores as restored on restored.id = own.restore_id and restored.finished_at is null
  where own.carrier_account_id = account
  for no key update of own;
  if not found then
    return jsonb_build_object('booked', 0, 'done', true);
  end if;
  for call in
    select told.call
    from jsonb_array_elements(coalesce(request -> 'calls', '[]')) as told (call)
    order by told.call ->> 'started_at', told.call ->> 'provider_call_id'
  loop
    booked := booked + private.book_call(account, call, at)::integer;
  end loop;
  update private.restore_accounts as own
  set
    calls_booked = own.calls_booked + booked, next_page = request ->> 'next_page',
    read_at = case when is_last then own.reading_since else own.read_at end,
    reading_since = case when not is_last then own.reading_since end,
    lease_until = case when not is_last then now() + interval '5 minutes' end
  from private.restores as restored
  where own.carrier_account_id = account and restored.id = own.restore_id and restored.finished_at is null;
  return jsonb_build_object('booked', booked, 'done', is_last);
end
$$;
comment on function private.book_calls(jsonb, timestamptz) is 'Books a page of an account''s calls since the backup; a call that is known is left as it is.';

create function public.book_calls(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.book_calls($1, private.clock_now())
$$;
comment on function public.book_calls(jsonb) is
  '{"v":1,"carrier_account_id","next_page":text|null,"calls":[{"provider_call_id","from","to","started_at","answered_at","ended_at","outcome",'
  '"duration_seconds","bill_duration_seconds","cost_micros","cost_currency"}]} -> {"booked":n,"done":bool}.';

create function private.pass_number(number text) returns text
language plpgsql security definer set search_path = '' as $$
declare
  parts  constant text[] := regexp_match(upper(btrim(number)), '^(?:IN|CR)[A-Z]-([0-9]{6})-([0-9]{5})$');
  month  constant text := parts[1];
  nth    integer;
begin
  -- By the functions that write numbers, so that every series they know is known here.
  for place in 0..22 loop
    nth := place * 100000 + parts[2]::integer;
    exit when nth > 0 and nth <= 2199999 and private.invoice_number(month, nth) = upper(btrim(number));
    nth := null;
  end loop;
  if nth is not null then
    insert into private.invoice_series as known (month, last_number)
    values (month, nth)
    on conflict on constraint invoice_series_pkey do update set last_number = greatest(known.last_number, excluded.last_number);
    return 'invoice';
  end if;
  for place in 0..14 loop
    nth := place * 100000 + parts[2]::integer;
    exit when nth > 0 and nth <= 1399999 and private.credit_note_number(month, nth) = upper(btrim(number));
    nth := null;
  end loop;
  if nth is null then
    perform private.raise_error(422, 'invalid_number', 'That is no number of an invoice or credit note', 'number');
  end if;
  insert into private.credit_note_series as known (month, last_number)
  values (month, nth)
  on conflict on constraint credit_note_series_pkey do update set last_number = greatest(known.last_number, excluded.last_number);
  return 'credit_note';
end
$$;
comment on function private.pass_number(text) is
  'Takes the number of a document in the archive, and lets its month''s series go on after it. Returns invoice or credit_note. A series never goes back.';

create function private.see_archive(invoices text[], credit_notes text[]) returns jsonb
language plpgsql security definer set search_path = '' as $$
declare
  given text;
begin
  foreach given in array coalesce(invoices, '{}') loop
    if private.pass_number(given) <> 'invoice' then
      perform private.raise_error(422, 'invalid_number', format('%s is no invoice', given), 'invoices');
    end if;
  end loop;
  foreach given in array coalesce(credit_notes, '{}') loop
    if private.pass_number(given) <> 'credit_note' then
      perform private.raise_error(422, 'invalid_number', format('%s is no credit note', given), 'credit_notes');
    end if;
  end loop;
  update private.restores as restored
  set
    invoices_seen = restored.invoices_seen or invoices is not null,
    credits_seen = restored.credits_seen or credit_notes is not null
  where restored.finished_at is null;
  return private.restore_state();
end
$$;
comment on function private.see_archive(text[], text[]) is
  'The highest numbers of each month that the archive has since the backup; an empty list says that there are none, and null says nothing.';

create function private.restore_state() returns jsonb
language sql stable security definer set search_path = '' as $$
  select jsonb_build_object(
    'since', restored.since, 'began_at', restored.began_at, 'settles_at', restored.settles_at,
    'invoices_seen', restored.invoices_seen, 'credits_seen', restored.credits_seen,
    'open_calls', (select count(*) from public.call_logs as log where log.status <> 'ended' and log.direction = 'outbound'),
    'accounts', coalesce((
      select jsonb_agg(
        jsonb_build_object(
          'carrier_account_id', own.carrier_account_id, 'provider', account.provider, 'calls_booked', own.calls_booked,
          'read_at', own.read_at, 'done', coalesce(own.read_at >= restored.settles_at, false)
        )
        order by own.carrier_account_id
      )
      from private.restore_accounts as own
      join public.carrier_accounts as account on account.id = own.carrier_account_id
      where own.restore_id = restored.id
    ), '[]')
  )
  from private.restores as restored
  where restored.finished_at is null
$$;
comment on function private.restore_state() is 'How far the open restore is; null when there is none.';

create function private.finish_restore() returns jsonb
language plpgsql security definer set search_path = '' as $$
declare
  state    jsonb;
  restored private.restores;
begin
  select own.* into restored from private.restores as own where own.finished_at is null for update;
  state := private.restore_state();
  if restored.id is null then
    perform private.raise_error(404, 'not_found', 'No restore is open');
  elsif not (restored.invoices_seen and restored.credits_seen) then
    perform private.raise_error(409, 'restore_unfinished', 'Name the highest numbers of the archive first, or that there are none since');
  elsif jsonb_path_exists(state, '$.accounts[*] ? (@.done == false)') then
    perform private.raise_error(409, 'restore_unfinished', 'Not every carrier account was read to its end after its last call was over');
  elsif (state ->> 'open_calls')::bigint > 0 then
    perform private.raise_error(409, 'restore_unfinished', 'Calls are open still: the reconciler asks the carrier for them');
  end if;
  update private.restores as own set finished_at = now() where own.id = restored.id;
  update private.platform_dialling set dialling_enabled = restored.was_enabled, reason = restored.reason_before;
  perform private.audit(
    null, 'restore.finished', 'platform', null,
    jsonb_build_object('since', restored.since, 'accounts', state -> 'accounts'), private.clock_now()
  );
  return state;
end
$$;
comment on function private.finish_restore() is
  'Lets dialling be again what it was in the backup, once every account was read, every call is over and the series of numbers have passed the archive''s.';

revoke all on function
  private.begin_restore(timestamptz), private.claim_restore_page(), public.claim_restore_page(jsonb), private.book_call(uuid, jsonb, timestamptz),
  private.book_calls(jsonb, timestamptz), public.book_calls(jsonb), private.pass_number(text), private.see_archive(text[], text[]),
  private.restore_state(), private.finish_restore()
from public, anon, authenticated, service_role;
grant execute on function
  private.claim_restore_page(), public.claim_restore_page(jsonb), private.book_calls(jsonb, timestamptz), public.book_calls(jsonb)
to service_role;
