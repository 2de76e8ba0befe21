-- What webhook-intake calls when somebody sends leads: one request, one transaction, an outcome for each lead.


-- Phone numbers -------------------------------------------------------------------------------------------------------------------

create function private.to_e164(written text, country text) returns text
language plpgsql immutable parallel safe set search_path = '' as $$
declare
  -- Country: calling code, trunk prefix, shortest and longest national number. Where a country is not here, numbers come with their +.
  plans  constant jsonb := '{
    "IN":["91","0",10,10],"US":["1","1",10,10],"CA":["1","1",10,10],"GB":["44","0",9,10],"IE":["353","0",7,9],"AU":["61","0",9,9],
    "NZ":["64","0",8,10],"SG":["65","",8,8],"MY":["60","0",8,10],"ID":["62","0",8,12],"PH":["63","0",8,10],"TH":["66","0",8,9],
    "VN":["84","0",9,10],"HK":["852","",8,8],"CN":["86","0",10,11],"JP":["81","0",9,10],"KR":["82","0",8,10],"TW":["886","0",8,9],
    "BD":["880","0",8,10],"PK":["92","0",9,10],"LK":["94","0",9,9],"NP":["977","0",8,10],"AE":["971","0",8,9],"SA":["966","0",8,9],
    "QA":["974","",8,8],"KW":["965","",8,8],"BH":["973","",8,8],"OM":["968","",8,8],"IL":["972","0",8,9],"TR":["90","0",10,10],
    "EG":["20","0",8,10],"ZA":["27","0",9,9],"NG":["234","0",8,10],"KE":["254","0",9,9],"GH":["233","0",9,9],"TZ":["255","0",9,9],
    "UG":["256","0",9,9],"DE":["49","0",7,11],"FR":["33","0",9,9],"ES":["34","",9,9],"PT":["351","",9,9],"NL":["31","0",9,9],
    "BE":["32","0",8,9],"LU":["352","",6,11],"AT":["43","0",7,13],"CH":["41","0",9,9],"DK":["45","",8,8],"NO":["47","",8,8],
    "SE":["46","0",7,10],"FI":["358","0",6,11],"PL":["48","",9,9],"CZ":["420","",9,9],"GR":["30","",10,10],"RO":["40","0",9,9],
    "HU":["36","06",8,9],"BR":["55","0",10,11],"MX":["52","",10,10],"AR":["54","0",10,11],"CL":["56","",9,9],"CO":["57","",8,10],
    "PE":["51","0",8,9]
  }'::jsonb;
  plan   constant jsonb := plans -> upper(country);
  code   constant text := plan ->> 0;
  trunk  constant text := plan ->> 1;
  digits text := regexp_replace(written, '[^0-9]', '', 'g');
  inner_ text;
begin
  if written is null or written !~ '^\s*\+?[0-9 ().\-/\u00a0]+\s*$' or length(written) > 40 then
    return null;
  end if;
  if written ~ '^\s*(\+|00)' then
    digits := regexp_replace(digits, '^00', '');
    return case when digits ~ '^[1-9][0-9]{6,14}$' then '+' || digits end;
  end if;
  if plan is null then
    return null;
  end if;
  inner_ := case when trunk <> '' and digits like trunk || '%' then substr(digits, length(trunk) + 1) else digits end;
  if length(inner_) between (plan ->> 2)::integer and (plan ->> 3)::integer and inner_ !~ '^0' then
    return '+' || code || inner_;
  end if;
  inner_ := substr(digits, length(code) + 1);
  if digits like code || '%' and length(inner_) between (plan ->> 2)::integer and (plan ->> 3)::integer and inner_ !~ '^0' then
    return '+' || digits;
  end if;
  return null;
end
$$;
comment on function private.to_e164(text, text) is
  'A number as a person writes it, in E.164: with + or 00 it says its country, else it is one of the country given. Null when it is neither.';


-- Limits --------------------------------------------------------------------------------------------------------------------------

create function private.take_tokens(subject text, cost integer, per_minute integer, burst integer) returns void
language plpgsql volatile security definer set search_path = '' as $$
declare
  moment constant timestamptz := clock_timestamp();
  left_  numeric;
  wait   integer;
begin
  insert into private.rate_limits as bucket (subject, tokens, refilled_at)
  values (take_tokens.subject, burst - cost, moment)
  on conflict on constraint rate_limits_pkey do update
  set
    tokens = least(
      burst, bucket.tokens + greatest(extract(epoch from excluded.refilled_at - bucket.refilled_at), 0) * per_minute / 60.0
    ) - cost,
    refilled_at = greatest(bucket.refilled_at, excluded.refilled_at)
  returning bucket.tokens into left_;
  if left_ >= 0 then
    return;
  end if;
  -- The refusal undoes the withdrawal: whoever is told to wait has not used up what they wait for.
  wait := greatest(ceil(-left_ * 60.0 / per_minute), 1);
  raise sqlstate 'PGRST' using
    message = json_build_object(
      'code', 'rate_limited',
      'message', format('Too many at once; the next are taken in %s seconds', wait),
      'details', json_build_object('retry_after', wait)::text,
      'hint', null
    )::text,
    detail = json_build_object('status', 429, 'headers', json_build_object('Retry-After', wait::text))::text;
end
$$;
comment on function private.take_tokens(text, integer, integer, integer) is
  'Takes from a sender''s bucket, which refills by the minute; empty, the request ends with 429 and says when to come again.';


-- ingest_leads --------------------------------------------------------------------------------------------------------------------

create function private.first_stage(organization uuid, project uuid) returns uuid
language sql stable security definer set search_path = '' as $$
  select stage.id
  from public.pipelines as pipeline
  join public.pipeline_stages as stage on stage.organization_id = pipeline.organization_id and stage.pipeline_id = pipeline.id
  where pipeline.organization_id = organization
    and pipeline.is_default
    and (stage.project_id is null or stage.project_id = project)
  order by stage.order_index, stage.id
  limit 1
$$;
comment on function private.first_stage(uuid, uuid) is 'Where a lead of a project begins in its organization''s default pipeline.';

create function private.read_lead(item jsonb, form public.lead_forms, country text) returns jsonb
language plpgsql stable security definer set search_path = '' as $$
declare
  lead    jsonb := '{}'::jsonb;
  missing text;
  field   text;
begin
  if jsonb_typeof(item) <> 'object' then
    return jsonb_build_object('code', 'invalid_lead', 'message', 'A lead is an object');
  end if;
  if form.id is not null then
    select asked.value ->> 'name' into missing
    from jsonb_array_elements(form.fields) with ordinality as asked (value, place)
    where asked.value -> 'required' = 'true' and coalesce(btrim(item ->> (asked.value ->> 'name')), '') = ''
    order by asked.place
    limit 1;
    if missing is not null then
      return jsonb_build_object('code', 'missing_field', 'field', missing, 'message', format('%s is required', missing));
    end if;
    lead := jsonb_build_object('project_id', form.project_id, 'raw_data', (
      select coalesce(jsonb_object_agg(asked.name, left(item ->> asked.name, 2000)), '{}')
      from (
        select distinct entry.value ->> 'name' as name from jsonb_array_elements(form.fields) as entry (value)
      ) as asked
      where asked.name not in ('name', 'phone', 'email') and item ->> asked.name is not null
    ));
  else
    if item ->> 'project_id' is not null and private.to_uuid(item ->> 'project_id') is null then
      return jsonb_build_object('code', 'unknown_project', 'field', 'project_id', 'message', 'There is no such project');
    end if;
    if item ->> 'timezone' is not null and not exists (select from private.timezones as zone where zone.name = item ->> 'timezone') then
      return jsonb_build_object('code', 'invalid_timezone', 'field', 'timezone', 'message', 'This is not a time zone');
    end if;
    if jsonb_typeof(coalesce(item -> 'fields', '{}')) <> 'object' or length((item -> 'fields')::text) > 16384 then
      return jsonb_build_object('code', 'invalid_fields', 'field', 'fields', 'message', 'fields is an object of at most 16 KiB');
    end if;
    lead := jsonb_build_object(
      'project_id', item ->> 'project_id', 'timezone', item ->> 'timezone', 'notes', left(item ->> 'notes', 10000),
      'external_lead_id', left(item ->> 'external_lead_id', 255), 'lead_source', left(item ->> 'source', 100),
      'raw_data', item -> 'fields'
    );
    if coalesce(jsonb_typeof(item -> 'consents'), 'null') not in ('array', 'null') then
      return jsonb_build_object('code', 'invalid_consent', 'field', 'consents', 'message', 'consents is an array');
    end if;
    if exists (
      select
      from jsonb_array_elements(coalesce(nullif(item -> 'consents', 'null'), '[]')) as given (value)
      where coalesce(given.value ->> 'scope', '') not in ('call_service', 'call_promotional', 'recording', 'sms', 'whatsapp')
        or coalesce(btrim(given.value ->> 'text'), '') = ''
        or given.value ->> 'source' is not null
          and given.value ->> 'source' not in ('form', 'call', 'import', 'written', 'message', 'in_person')
        or given.value ->> 'granted_at' is not null and private.parse_instant(given.value ->> 'granted_at') is null
        or coalesce(jsonb_typeof(given.value -> 'proof'), 'null') not in ('object', 'null')
    ) then
      return jsonb_build_object(
        'code', 'invalid_consent', 'field', 'consents', 'message', 'A consent has a known scope and the text that was agreed to'
      );
    end if;
  end if;

  foreach field in array array['name', 'phone', 'email'] loop
    if coalesce(jsonb_typeof(item -> field), 'null') not in ('string', 'number', 'null') then
      return jsonb_build_object('code', 'invalid_lead', 'field', field, 'message', format('%s must be a text', field));
    end if;
  end loop;
  lead := lead || jsonb_build_object(
    'phone', private.to_e164(item ->> 'phone', coalesce(nullif(item ->> 'country', ''), country)),
    'email', private.plain_email(item ->> 'email'),
    'name', left(btrim(regexp_replace(item ->> 'name', '\s+', ' ', 'g')), 200)
  );
  if lead ->> 'phone' is null then
    return jsonb_build_object(
      'code', 'invalid_phone', 'field', 'phone', 'message', 'A phone number with its country code, or one of the country, is required'
    );
  end if;
  if coalesce(btrim(item ->> 'email'), '') <> '' and lead ->> 'email' is null then
    return jsonb_build_object('code', 'invalid_email', 'field', 'email', 'message', 'This is not an e-mail address');
  end if;
  if coalesce(lead ->> 'name', '') = '' then
    lead := lead || jsonb_build_object('name', lead ->> 'phone', 'unnamed', true);
  end if;
  return lead;
end
$$;
comment on function private.read_lead(jsonb, public.lead_forms, text) is
  'What a lead says, in our words, or {"code","field","message"}: what is wrong with it concerns that lead alone.';

create function private.write_lead(
  organization uuid, lead jsonb, form public.lead_forms, at timestamptz, out lead_id uuid, out is_new boolean
)
language plpgsql volatile security definer set search_path = '' as $$
declare
  project constant uuid := (lead ->> 'project_id')::uuid;
begin
  -- Without a project no constraint tells two of a number apart; the caller holds the lock under which one may look.
  if project is null then
    select known.id into lead_id
    from public.leads as known
    where known.organization_id = organization and known.project_id is null and known.phone = lead ->> 'phone'
    order by known.archived_at is not null, known.created_at, known.id
    limit 1
    for no key update;
  end if;
  is_new := false;
  if lead_id is null then
    insert into public.leads as known (
      organization_id, project_id, stage_id, name, email, phone, timezone, source, lead_source, external_lead_id, raw_data, notes,
      recording_consent, created_by, created_at, updated_at
    )
    values (
      organization, project, coalesce(form.stage_id, private.first_stage(organization, project)), lead ->> 'name', lead ->> 'email',
      lead ->> 'phone', lead ->> 'timezone', case when form.id is null then 'api' else 'form' end,
      coalesce(lead ->> 'lead_source', form.name), lead ->> 'external_lead_id', nullif(lead -> 'raw_data', 'null'), lead ->> 'notes',
      private.has_consent(organization, lead ->> 'phone', 'recording', at), null, at, at
    )
    on conflict (organization_id, project_id, phone) do nothing
    returning known.id into lead_id;
    is_new := lead_id is not null;
  end if;
  if is_new then
    return;
  end if;
  -- A stranger's form adds what was not known; the organization's own system corrects what was.
  update public.leads as known
  set
    name = case when form.id is null and lead -> 'unnamed' is null then lead ->> 'name' else known.name end,
    email = case when form.id is null then coalesce(lead ->> 'email', known.email) else coalesce(known.email, lead ->> 'email') end,
    timezone = coalesce(lead ->> 'timezone', known.timezone),
    lead_source = coalesce(known.lead_source, lead ->> 'lead_source'),
    external_lead_id = coalesce(lead ->> 'external_lead_id', known.external_lead_id),
    notes = coalesce(lead ->> 'notes', known.notes),
    raw_data = case
      when form.id is null then coalesce(known.raw_data, '{}') || coalesce(nullif(lead -> 'raw_data', 'null'), '{}')
      else coalesce(nullif(lead -> 'raw_data', 'null'), '{}') || coalesce(known.raw_data, '{}')
    end
  where known.organization_id = organization
    and known.phone = lead ->> 'phone'
    and (known.id = lead_id or lead_id is null and known.project_id = project)
  returning known.id into lead_id;
end
$$;
comment on function private.write_lead(uuid, jsonb, public.lead_forms, timestamptz) is
  'One lead a number and project of an organization: made, or told what is new. Stage, status and who must not be called stay.';

create function private.ingest_leads(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  given        constant jsonb := request -> 'leads';
  request_key  constant text := request ->> 'idempotency_key';
  key          public.api_keys;
  form         public.lead_forms;
  organization public.organizations;
  sender       text;
  earlier      private.lead_requests;
  reply        jsonb;
  results      jsonb := '{}'::jsonb;
  item         record;
  written      record;
  consent      record;
begin
  if request ->> 'form_id' is not null then
    select known.* into form from public.lead_forms as known where known.id = private.to_uuid(request ->> 'form_id') and known.is_active;
    if form.id is null then
      perform private.raise_error(404, 'form_not_found', 'There is no such form', 'form_id');
    end if;
    sender := 'form ' || form.id;
  else
    select known.* into key
    from public.api_keys as known
    where known.prefix = request #>> '{api_key,prefix}'
      and encode(known.sha256, 'hex') = lower(request #>> '{api_key,sha256}')
      and known.revoked_at is null;
    if key.id is null then
      perform private.raise_error(401, 'invalid_api_key', 'The API key is unknown or revoked');
    end if;
    if not 'lead.write' = any (key.scopes) then
      perform private.raise_error(403, 'missing_scope', 'The API key lacks the scope lead.write');
    end if;
    sender := 'key ' || key.prefix;
  end if;
  if given is null or jsonb_typeof(given) <> 'array' or jsonb_array_length(given) = 0 then
    perform private.raise_error(400, 'invalid_request', 'leads must be an array of at least one lead', 'leads');
  end if;
  if jsonb_array_length(given) > (case when form.id is null then 500 else 1 end) then
    perform private.raise_error(413, 'too_many_leads', 'At most 500 leads are taken at once, and one by a form', 'leads');
  end if;
  if request_key is not null and length(request_key) not between 1 and 255 then
    perform private.raise_error(400, 'invalid_request', 'An idempotency key has 1 to 255 characters', 'idempotency-key');
  end if;
  select tenant.* into organization
  from public.organizations as tenant
  where tenant.id = coalesce(form.organization_id, key.organization_id);

  perform private.take_tokens(
    'leads ' || sender, jsonb_array_length(given), coalesce(form.rate_per_minute, 600), coalesce(form.rate_per_minute, 1000)
  );

  if request_key is not null then
    insert into private.lead_requests (organization_id, subject, key, body_sha256, created_at)
    values (organization.id, sender, request_key, coalesce(request ->> 'body_sha256', ''), at)
    on conflict on constraint lead_requests_pkey do nothing;
    if not found then
      select known.* into earlier
      from private.lead_requests as known
      where known.organization_id = organization.id and known.subject = sender and known.key = request_key;
      if earlier.body_sha256 <> coalesce(request ->> 'body_sha256', '') then
        perform private.raise_error(409, 'idempotency_conflict', 'Another request came with this key', 'idempotency-key');
      end if;
      return earlier.answer || jsonb_build_object('replayed', true);
    end if;
    delete from private.lead_requests as old
    where old.ctid in (
      select stale.ctid from private.lead_requests as stale where stale.created_at < at - interval '7 days'
      order by stale.created_at limit 100 for update skip locked
    );
  end if;

  -- One at a time for leads without a project, and in order of number with one: two batches never wait for each other in a circle.
  perform pg_advisory_xact_lock(hashtextextended('trunkline.ingest_leads' || organization.id, 0));
  for item in
    select judged.place, judged.value, judged.lead
    from (
      select
        entry.place, entry.value, private.read_lead(entry.value, form, coalesce(organization.country_code, 'IN')) as lead
      from jsonb_array_elements(given) with ordinality as entry (value, place)
    ) as judged
    order by judged.lead ->> 'phone', judged.place
  loop
    if item.lead ? 'code' then
      results := results || jsonb_build_object(item.place, item.lead || '{"status": "rejected"}');
      continue;
    end if;
    if item.lead ->> 'project_id' is not null and not exists (
      select
      from public.projects as project
      where project.organization_id = organization.id and project.id = (item.lead ->> 'project_id')::uuid
    ) then
      results := results || jsonb_build_object(
        item.place,
        jsonb_build_object(
          'status', 'rejected', 'code', 'unknown_project', 'field', 'project_id', 'message', 'There is no such project'
        )
      );
      continue;
    end if;
    select * into written from private.write_lead(organization.id, item.lead, form, at);
    insert into public.lead_activities (organization_id, lead_id, type, content, created_by, created_at)
    values (
      organization.id, written.lead_id, case when written.is_new then 'lead_created' else 'lead_received_again' end,
      jsonb_strip_nulls(jsonb_build_object('form_id', form.id, 'api_key', key.prefix)), null, at
    );

    for consent in
      select given_.scope, given_.words, given_.source, given_.proof, least(coalesce(given_.granted_at, at), at) as granted_at
      from (
        select scope.name as scope, form.consent_text as words, 'form' as source, '{}'::jsonb as proof, null::timestamptz as granted_at
        from unnest(form.consent_scopes) as scope (name)
        where coalesce(btrim(form.consent_text), '') <> ''
        union all
        select
          said.value ->> 'scope', left(said.value ->> 'text', 5000), coalesce(said.value ->> 'source', 'import'),
          coalesce(nullif(said.value -> 'proof', 'null'), '{}'), private.to_business(private.parse_instant(said.value ->> 'granted_at'))
        from jsonb_array_elements(
          case when form.id is null then coalesce(nullif(item.value -> 'consents', 'null'), '[]') else '[]' end
        ) as said (value)
      ) as given_
      where not exists (
        select
        from public.consents as known
        where known.organization_id = organization.id
          and known.phone_number = item.lead ->> 'phone'
          and known.scope = given_.scope
          and known.consent_text = given_.words
          and known.revoked_at is null
          and (known.expires_at is null or known.expires_at > at)
      )
    loop
      insert into public.consents (
        organization_id, lead_id, phone_number, scope, consent_text, source, proof, granted_at, created_by, created_at
      )
      values (
        organization.id, written.lead_id, item.lead ->> 'phone', consent.scope, consent.words, consent.source,
        consent.proof || jsonb_strip_nulls(jsonb_build_object('form_id', form.id, 'api_key', key.prefix, 'received_at', at)),
        consent.granted_at, null, at
      );
    end loop;

    if written.is_new then
      perform private.emit(
        organization.id, 'lead.created', written.lead_id::text,
        jsonb_strip_nulls(jsonb_build_object(
          'lead_id', written.lead_id, 'project_id', item.lead ->> 'project_id', 'form_id', form.id
        )), at
      );
    end if;
    results := results || jsonb_build_object(
      item.place, jsonb_build_object('status', case when written.is_new then 'created' else 'updated' end, 'id', written.lead_id)
    );
  end loop;

  reply := jsonb_build_object(
    'organization_id', organization.id,
    'results', (
      select jsonb_agg(jsonb_build_object('index', outcome.key::integer - 1) || outcome.value order by outcome.key::integer)
      from jsonb_each(results) as outcome
    )
  );
  if request_key is not null then
    update private.lead_requests as mine
    set answer = reply
    where mine.organization_id = organization.id and mine.subject = sender and mine.key = request_key;
  end if;
  return reply;
end
$$;
comment on function private.ingest_leads(jsonb, timestamptz) is
  'Takes leads from an organization''s own system, or one from its form: into its projects, at the first stage of its pipeline.';

create function public.ingest_leads(jsonb) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.ingest_leads($1, private.clock_now())
$$;
comment on function public.ingest_leads(jsonb) is
  'For webhook-intake. {"v":1,"api_key":{"prefix","sha256"} or "form_id","leads":[{"name","phone","email","project_id","country","timezone",'
  '"source","external_lead_id","notes","fields":{},"consents":[{"scope","text","source"?,"granted_at"?,"proof"?}]}],"idempotency_key"?,'
  '"body_sha256"?} -> {"organization_id","results":[{"index","status":"created|updated|rejected","id"?,"code"?,"field"?,"message"?}],'
  '"replayed"?}; 429 with Retry-After for too many.';


revoke execute on function
  private.to_e164(text, text), private.take_tokens(text, integer, integer, integer), private.first_stage(uuid, uuid),
  private.read_lead(jsonb, public.lead_forms, text), private.write_lead(uuid, jsonb, public.lead_forms, timestamptz),
  private.ingest_leads(jsonb, timestamptz), public.ingest_leads(jsonb)
from public, anon, authenticated, service_role;
grant execute on function private.ingest_leads(jsonb, timestamptz), public.ingest_leads(jsonb) to service_role;
