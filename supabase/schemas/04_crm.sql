-- The customer's own contacts: projects, pipelines and their stages, leads and their timeline.


-- projects ------------------------------------------------------------------------------------------------------------------------

create table public.projects (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null default public.get_auth_org_id() references public.organizations (id) on delete cascade,
  name            text not null check (length(btrim(name)) between 1 and 200),
  description     text,
  address         text,
  project_type    text,
  status          text not null default 'active' check (status in ('active', 'archived')),
  metadata        jsonb not null default '{}' check (jsonb_typeof(metadata) = 'object'),
  image_url       text check (image_url ~ '^https?://'),
  image_path      text,
  created_by      uuid default private.acting_user_id(),
  created_at      timestamptz not null default private.clock_now(),
  updated_at      timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  foreign key (organization_id, created_by) references public.profiles (organization_id, id) on delete set null (created_by)
);
create index idx_projects_created_by on public.projects (organization_id, created_by);

revoke all on public.projects from anon, authenticated, service_role;
grant select on public.projects to authenticated, service_role;
grant
  insert (name, description, address, project_type, status, metadata, image_url, image_path),
  update (name, description, address, project_type, status, metadata, image_url, image_path)
on public.projects to authenticated;
alter table public.projects enable row level security;
alter table public.projects force row level security;
create policy "Members may see the projects" on public.projects
  for select to authenticated using (organization_id = (select private.get_auth_org_id()));
create policy "Who creates projects may make one" on public.projects
  for insert to authenticated with check (organization_id = (select private.org_with('project.create')));
create policy "Who edits projects may change one" on public.projects
  for update to authenticated
  using (organization_id = (select private.org_with('project.edit')))
  with check (organization_id = (select private.org_with('project.edit')));
create trigger update_modified_column before update on public.projects
  for each row execute function private.update_modified_column();
comment on table public.projects is 'What leads are interested in: a development, a product line. Archived, never deleted.';


-- pipelines -----------------------------------------------------------------------------------------------------------------------

create table public.pipelines (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null default public.get_auth_org_id() references public.organizations (id) on delete cascade,
  name            text not null check (length(btrim(name)) between 1 and 200),
  is_default      boolean not null default false,
  created_at      timestamptz not null default private.clock_now(),
  updated_at      timestamptz not null default private.clock_now(),
  unique (organization_id, id)
);
create unique index idx_pipelines_default on public.pipelines (organization_id) where is_default;

revoke all on public.pipelines from anon, authenticated, service_role;
grant select, delete on public.pipelines to authenticated;
grant insert (name, is_default), update (name, is_default) on public.pipelines to authenticated;
grant select on public.pipelines to service_role;
alter table public.pipelines enable row level security;
alter table public.pipelines force row level security;
create policy "Members may see the pipelines" on public.pipelines
  for select to authenticated using (organization_id = (select private.get_auth_org_id()));
create policy "Who edits projects may make a pipeline" on public.pipelines
  for insert to authenticated with check (organization_id = (select private.org_with('project.edit')));
create policy "Who edits projects may change a pipeline" on public.pipelines
  for update to authenticated
  using (organization_id = (select private.org_with('project.edit')))
  with check (organization_id = (select private.org_with('project.edit')));
create policy "Who edits projects may delete a pipeline" on public.pipelines
  for delete to authenticated using (organization_id = (select private.org_with('project.edit')) and not is_default);
create trigger update_modified_column before update on public.pipelines
  for each row execute function private.update_modified_column();
comment on table public.pipelines is 'A way of working with leads; an organization has at most one default.';


-- pipeline_stages -----------------------------------------------------------------------------------------------------------------

create table public.pipeline_stages (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null default public.get_auth_org_id() references public.organizations (id) on delete cascade,
  pipeline_id     uuid not null,
  project_id      uuid,
  name            text not null check (length(btrim(name)) between 1 and 100),
  order_index     integer not null default 2147483647,
  position        integer generated always as (order_index) stored,
  color           text not null default '#cbd5e1' check (color ~ '^#[0-9a-fA-F]{6}$'),
  created_at      timestamptz not null default private.clock_now(),
  updated_at      timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  foreign key (organization_id, pipeline_id) references public.pipelines (organization_id, id) on delete cascade,
  foreign key (organization_id, project_id) references public.projects (organization_id, id) on delete cascade,
  constraint pipeline_stages_place_key unique (organization_id, pipeline_id, order_index) deferrable initially deferred
);
create index idx_pipeline_stages_project on public.pipeline_stages (organization_id, project_id);

revoke all on public.pipeline_stages from anon, authenticated, service_role;
grant select, delete on public.pipeline_stages to authenticated;
grant
  insert (pipeline_id, project_id, name, order_index, color),
  update (project_id, name, order_index, color)
on public.pipeline_stages to authenticated;
grant select on public.pipeline_stages to service_role;
alter table public.pipeline_stages enable row level security;
alter table public.pipeline_stages force row level security;
create policy "Members may see the stages" on public.pipeline_stages
  for select to authenticated using (organization_id = (select private.get_auth_org_id()));
create policy "Who edits projects may make a stage" on public.pipeline_stages
  for insert to authenticated with check (organization_id = (select private.org_with('project.edit')));
create policy "Who edits projects may change a stage" on public.pipeline_stages
  for update to authenticated
  using (organization_id = (select private.org_with('project.edit')))
  with check (organization_id = (select private.org_with('project.edit')));
create policy "Who edits projects may delete a stage" on public.pipeline_stages
  for delete to authenticated using (organization_id = (select private.org_with('project.edit')));
create trigger update_modified_column before update on public.pipeline_stages
  for each row execute function private.update_modified_column();
comment on table public.pipeline_stages is 'The steps of a pipeline, in order; a step of one project alone names it.';
comment on column public.pipeline_stages.order_index is
  'The place in the pipeline, from 0 on without a gap. Written to, the others make room; without one a new stage is the last.';
comment on column public.pipeline_stages.position is 'The same as order_index, under the name that older clients read.';

create function private.create_default_pipeline(organization uuid) returns uuid
language plpgsql volatile security definer set search_path = '' as $$
declare
  pipeline uuid;
begin
  insert into public.pipelines (organization_id, name, is_default)
  values (organization, 'Default Pipeline', true)
  on conflict (organization_id) where is_default do nothing
  returning id into pipeline;
  if pipeline is null then
    select existing.id into pipeline from public.pipelines as existing where existing.organization_id = organization and existing.is_default;
    return pipeline;
  end if;
  insert into public.pipeline_stages (organization_id, pipeline_id, name, order_index, color)
  select organization, pipeline, stage.name, stage.number - 1, stage.color
  from unnest(
    array['New Lead', 'Contacted', 'Qualified', 'Negotiation', 'Won', 'Lost'],
    array['#3b82f6', '#eab308', '#22c55e', '#a855f7', '#15803d', '#ef4444']
  ) with ordinality as stage (name, color, number);
  return pipeline;
end
$$;
comment on function private.create_default_pipeline(uuid) is
  'Gives an organization its default pipeline of six stages, once; returns the pipeline''s id.';


-- leads ---------------------------------------------------------------------------------------------------------------------------

create table public.leads (
  id                uuid primary key default gen_random_uuid(),
  organization_id   uuid not null default public.get_auth_org_id() references public.organizations (id) on delete cascade,
  project_id        uuid,
  stage_id          uuid,
  assigned_to       uuid,
  name              text not null check (length(btrim(name)) between 1 and 200),
  email             text check (email ~ '^[^@\s]+@[^@\s]+$'),
  phone             text check (phone ~ '^\+[1-9][0-9]{6,14}$'),
  timezone          text,
  source            text not null default 'manual',
  lead_source       text,
  external_lead_id  text,
  raw_data          jsonb,
  status            text not null default 'new'
    check (status in ('new', 'contacted', 'qualified', 'converted', 'lost', 'invalid', 'do_not_call')),
  score             integer not null default 0,
  notes             text,
  call_log_id       uuid,
  call_status       public.call_outcome,
  last_contacted_at timestamptz,
  waiting_status    text,
  callback_time     timestamptz,
  recording_consent boolean not null default false,
  do_not_call       boolean not null default false,
  opted_out_at      timestamptz,
  opt_out_reason    text,
  abuse_flag        boolean not null default false,
  abuse_details     text,
  rejection_reason  text,
  archived_at       timestamptz,
  created_by        uuid default private.acting_user_id(),
  created_at        timestamptz not null default private.clock_now(),
  updated_at        timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  -- What an import names in on_conflict: the same number twice in one project is one lead. Without a project a number may repeat, as in the
  -- seed system: a project that is deleted leaves its leads behind, and two may be of one person. Forms and ingest find the one that is there.
  unique (organization_id, project_id, phone),
  foreign key (organization_id, project_id) references public.projects (organization_id, id) on delete set null (project_id),
  foreign key (organization_id, stage_id) references public.pipeline_stages (organization_id, id) on delete set null (stage_id),
  foreign key (organization_id, assigned_to) references public.profiles (organization_id, id) on delete set null (assigned_to),
  foreign key (organization_id, created_by) references public.profiles (organization_id, id) on delete set null (created_by)
);
create index idx_leads_stage on public.leads (organization_id, stage_id);
create index idx_leads_assigned_to on public.leads (organization_id, assigned_to);
create index idx_leads_created_by on public.leads (organization_id, created_by);
create index idx_leads_created_at on public.leads (organization_id, created_at desc);
create index idx_leads_phone on public.leads (organization_id, phone);

revoke all on public.leads from anon, authenticated, service_role;
grant select, delete on public.leads to authenticated;
grant
  insert (
    id, project_id, stage_id, assigned_to, name, email, phone, timezone, source, lead_source, external_lead_id, raw_data, status, score, notes,
    callback_time, recording_consent, do_not_call, opt_out_reason
  ),
  update (
    project_id, stage_id, assigned_to, name, email, phone, timezone, source, lead_source, external_lead_id, raw_data, status, score, notes,
    callback_time, recording_consent, do_not_call, opt_out_reason, abuse_flag, abuse_details, rejection_reason, archived_at
  )
on public.leads to authenticated;
grant select on public.leads to service_role;
alter table public.leads enable row level security;
alter table public.leads force row level security;
create policy "Who views leads may see them" on public.leads
  for select to authenticated using (organization_id = (select private.org_with('lead.view')));
create policy "Who edits or imports leads may make them" on public.leads
  for insert to authenticated
  with check (organization_id in ((select private.org_with('lead.edit')), (select private.org_with('lead.import'))));
create policy "Who edits leads may change them" on public.leads
  for update to authenticated
  using (organization_id = (select private.org_with('lead.edit')))
  with check (organization_id = (select private.org_with('lead.edit')));
create policy "Who deletes leads may delete one that was in no campaign" on public.leads
  for delete to authenticated using (organization_id = (select private.org_with('lead.delete')));
create trigger update_modified_column before update on public.leads
  for each row execute function private.update_modified_column();
comment on table public.leads is
  'A person to call. The import sends no organization: it is the caller''s. Once in a campaign a lead is archived instead of deleted.';
comment on column public.leads.phone is 'E.164.';
comment on column public.leads.timezone is
  'Where the person is, an IANA zone; without one the campaign''s holds. A zone that does not exist means that nobody calls.';
comment on column public.leads.call_log_id is 'The last attempt that ended; no foreign key, because the row of an attempt may go to an archive.';
comment on column public.leads.call_status is 'How the last attempt ended.';
comment on column public.leads.recording_consent is 'Without it no call to this person is recorded, whatever the campaign says.';
comment on column public.leads.do_not_call is 'Set, and the number is suppressed for the whole organization in the same transaction.';


-- lead_activities -----------------------------------------------------------------------------------------------------------------

create table public.lead_activities (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null default public.get_auth_org_id() references public.organizations (id) on delete cascade,
  lead_id         uuid not null,
  type            text not null check (length(btrim(type)) between 1 and 50),
  content         jsonb not null default '{}' check (jsonb_typeof(content) = 'object'),
  created_by      uuid default private.acting_user_id(),
  created_at      timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  foreign key (organization_id, lead_id) references public.leads (organization_id, id) on delete cascade,
  foreign key (organization_id, created_by) references public.profiles (organization_id, id) on delete set null (created_by)
);
create index idx_lead_activities_lead on public.lead_activities (organization_id, lead_id, created_at desc);
create index idx_lead_activities_created_by on public.lead_activities (organization_id, created_by);

revoke all on public.lead_activities from anon, authenticated, service_role;
grant select on public.lead_activities to authenticated, service_role;
grant insert (lead_id, type, content) on public.lead_activities to authenticated;
alter table public.lead_activities enable row level security;
alter table public.lead_activities force row level security;
create policy "Who views leads may see their timeline" on public.lead_activities
  for select to authenticated using (organization_id = (select private.org_with('lead.view')));
create policy "Who edits leads may add to their timeline" on public.lead_activities
  for insert to authenticated with check (organization_id = (select private.org_with('lead.edit')));
comment on table public.lead_activities is 'What happened with a lead, in order. Only ever added to.';


-- The order of stages -------------------------------------------------------------------------------------------------------------
-- order_index is dense, from 0 on, and each number is taken once in a pipeline, whoever drags what at once: every statement that
-- changes stages waits for the other one of its organization, and leaves its pipelines numbered.

create function private.lock_stages() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  -- Before any row is locked: two drags that each hold a row of the other's would wait for each other.
  perform pg_advisory_xact_lock(hashtextextended('trunkline.pipeline_stages' || coalesce(private.get_auth_org_id()::text, ''), 0));
  return null;
end
$$;
comment on function private.lock_stages() is 'Trigger: one change of an organization''s stages at a time.';
create trigger lock_stages before insert or update or delete on public.pipeline_stages
  for each statement execute function private.lock_stages();

create function private.number_stages() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  -- Nothing to do ends the recursion: what is renumbered here comes by once more.
  if tg_op = 'INSERT' then
    with numbered as (
      select stage.id, row_number() over (
        partition by stage.pipeline_id order by stage.order_index, (placed.id is null), stage.created_at, stage.ctid
      ) - 1 as number
      from public.pipeline_stages as stage
      left join after as placed on placed.id = stage.id
      where stage.pipeline_id in (select after.pipeline_id from after)
    )
    update public.pipeline_stages as stage
    set order_index = numbered.number
    from numbered
    where stage.id = numbered.id and stage.order_index <> numbered.number;
  elsif tg_op = 'UPDATE' then
    if not exists (
      select
      from after
      join before on before.id = after.id
      where (after.order_index, after.pipeline_id) is distinct from (before.order_index, before.pipeline_id)
    ) then
      return null;
    end if;
    with numbered as (
      select stage.id, row_number() over (
        partition by stage.pipeline_id
        -- Dragged down it comes after the one whose place it takes, dragged up before it.
        order by stage.order_index,
          case when before.order_index < after.order_index then 1 when before.order_index > after.order_index then -1 else 0 end,
          stage.created_at, stage.id
      ) - 1 as number
      from public.pipeline_stages as stage
      left join after on after.id = stage.id
      left join before on before.id = stage.id
      where stage.pipeline_id in (select after.pipeline_id from after union select before.pipeline_id from before)
    )
    update public.pipeline_stages as stage
    set order_index = numbered.number
    from numbered
    where stage.id = numbered.id and stage.order_index <> numbered.number;
  else
    with numbered as (
      select stage.id, row_number() over (partition by stage.pipeline_id order by stage.order_index, stage.id) - 1 as number
      from public.pipeline_stages as stage
      where stage.pipeline_id in (select before.pipeline_id from before)
    )
    update public.pipeline_stages as stage
    set order_index = numbered.number
    from numbered
    where stage.id = numbered.id and stage.order_index <> numbered.number;
  end if;
  return null;
end
$$;
comment on function private.number_stages() is 'Trigger: the stages of every pipeline that a statement touched are numbered from 0 on.';
create trigger number_new_stages after insert on public.pipeline_stages
  referencing new table as after for each statement execute function private.number_stages();
create trigger number_moved_stages after update on public.pipeline_stages
  referencing old table as before new table as after for each statement execute function private.number_stages();
create trigger number_left_stages after delete on public.pipeline_stages
  referencing old table as before for each statement execute function private.number_stages();

create function private.move_stage(stage_id uuid, place integer) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('project.edit');
  pipeline     uuid;
begin
  if place is null or place < 0 then
    perform private.raise_error(422, 'invalid_position', 'A position is 0 or more', 'position');
  end if;
  update public.pipeline_stages as stage
  set order_index = least(place, 2147483646)
  where stage.organization_id = organization and stage.id = move_stage.stage_id
  returning stage.pipeline_id into pipeline;
  if pipeline is null then
    perform private.raise_error(404, 'stage_not_found', 'There is no such stage', 'stage_id');
  end if;
  return (
    select jsonb_build_object(
      'pipeline_id', pipeline,
      'stages', jsonb_agg(jsonb_build_object('id', stage.id, 'name', stage.name, 'position', stage.position) order by stage.position)
    )
    from public.pipeline_stages as stage
    where stage.organization_id = organization and stage.pipeline_id = pipeline
  );
end
$$;
comment on function private.move_stage(uuid, integer) is 'Puts a stage of the caller''s organization in another place of its pipeline.';

create function public.move_stage(stage_id uuid, "position" integer) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.move_stage($1, $2)
$$;
comment on function public.move_stage(uuid, integer) is
  'Drags a stage to a place, from 0 on; beyond the end is the end. Returns {"pipeline_id","stages":[{"id","name","position"}]}. Needs project.edit.';

revoke execute on function private.lock_stages(), private.number_stages() from public;
revoke execute on function private.move_stage(uuid, integer), public.move_stage(uuid, integer)
from public, anon, authenticated, service_role;
grant execute on function private.move_stage(uuid, integer), public.move_stage(uuid, integer) to authenticated;


-- stage_transitions ---------------------------------------------------------------------------------------------------------------

create table public.stage_transitions (
  id              uuid primary key default private.uuid_v7(),
  organization_id uuid not null references public.organizations (id) on delete cascade,
  lead_id         uuid not null,
  from_stage_id   uuid,
  to_stage_id     uuid,
  from_stage_name text,
  to_stage_name   text,
  moved_by        uuid,
  moved_at        timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  foreign key (organization_id, lead_id) references public.leads (organization_id, id) on delete cascade,
  foreign key (organization_id, from_stage_id) references public.pipeline_stages (organization_id, id) on delete set null (from_stage_id),
  foreign key (organization_id, to_stage_id) references public.pipeline_stages (organization_id, id) on delete set null (to_stage_id),
  foreign key (organization_id, moved_by) references public.profiles (organization_id, id) on delete set null (moved_by)
);
create index idx_stage_transitions_lead on public.stage_transitions (organization_id, lead_id, moved_at desc);
create index idx_stage_transitions_from_stage on public.stage_transitions (organization_id, from_stage_id);
create index idx_stage_transitions_to_stage on public.stage_transitions (organization_id, to_stage_id);
create index idx_stage_transitions_moved_by on public.stage_transitions (organization_id, moved_by);

revoke all on public.stage_transitions from anon, authenticated, service_role;
grant select on public.stage_transitions to authenticated, service_role;
alter table public.stage_transitions enable row level security;
alter table public.stage_transitions force row level security;
create policy "Who views leads may see how they moved" on public.stage_transitions
  for select to authenticated using (organization_id = (select private.org_with('lead.view')));
comment on table public.stage_transitions is 'Every move of a lead from one stage to another, written by the move itself.';
comment on column public.stage_transitions.from_stage_name is 'As it was called then; stays when the stage is deleted.';
comment on column public.stage_transitions.moved_by is 'Null when the system moved it.';

create function private.record_stage_transition() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  left_stage uuid := case when tg_op = 'UPDATE' then old.stage_id end;
begin
  -- A stage that is being deleted takes its leads along: then it is no longer there to point at.
  insert into public.stage_transitions (
    organization_id, lead_id, from_stage_id, to_stage_id, from_stage_name, to_stage_name, moved_by, moved_at
  )
  select
    new.organization_id, new.id, source.id, new.stage_id,
    case
      when left_stage is not null then coalesce(
        source.name,
        (
          select earlier.to_stage_name
          from public.stage_transitions as earlier
          where earlier.organization_id = new.organization_id and earlier.lead_id = new.id
          order by earlier.moved_at desc, earlier.id desc
          limit 1
        )
      )
    end,
    target.name,
    (
      select member.id
      from public.profiles as member
      where member.organization_id = new.organization_id and member.id = private.acting_user_id()
    ),
    private.clock_now()
  from (values (true)) as one (row)
  left join public.pipeline_stages as source on source.organization_id = new.organization_id and source.id = left_stage
  left join public.pipeline_stages as target on target.organization_id = new.organization_id and target.id = new.stage_id;
  return null;
end
$$;
comment on function private.record_stage_transition() is 'Trigger: a lead''s move is written down in the transaction that makes it.';
revoke execute on function private.record_stage_transition() from public;
create trigger record_first_stage after insert on public.leads
  for each row when (new.stage_id is not null) execute function private.record_stage_transition();
create trigger record_stage_transition after update of stage_id on public.leads
  for each row when (old.stage_id is distinct from new.stage_id) execute function private.record_stage_transition();


-- lead_forms ----------------------------------------------------------------------------------------------------------------------

create table public.lead_forms (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null default public.get_auth_org_id() references public.organizations (id) on delete cascade,
  project_id      uuid,
  stage_id        uuid,
  name            text not null check (length(btrim(name)) between 1 and 200),
  description     text,
  fields          jsonb not null default '[]' check (jsonb_typeof(fields) = 'array'),
  consent_text    text,
  is_active       boolean not null default true,
  created_by      uuid default private.acting_user_id(),
  created_at      timestamptz not null default private.clock_now(),
  updated_at      timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  foreign key (organization_id, project_id) references public.projects (organization_id, id) on delete set null (project_id),
  foreign key (organization_id, stage_id) references public.pipeline_stages (organization_id, id) on delete set null (stage_id),
  foreign key (organization_id, created_by) references public.profiles (organization_id, id) on delete set null (created_by)
);
create index idx_lead_forms_project on public.lead_forms (organization_id, project_id);
create index idx_lead_forms_stage on public.lead_forms (organization_id, stage_id);
create index idx_lead_forms_created_by on public.lead_forms (organization_id, created_by);

revoke all on public.lead_forms from anon, authenticated, service_role;
grant select, delete on public.lead_forms to authenticated;
grant
  insert (project_id, stage_id, name, description, fields, consent_text, is_active),
  update (project_id, stage_id, name, description, fields, consent_text, is_active)
on public.lead_forms to authenticated;
alter table public.lead_forms
  add column consent_scopes text[] not null default '{call_service}'
    check (consent_scopes <@ array['call_service', 'call_promotional', 'recording', 'sms', 'whatsapp']),
  add column rate_per_minute integer not null default 30 check (rate_per_minute between 1 and 6000);
grant insert (consent_scopes, rate_per_minute), update (consent_scopes, rate_per_minute) on public.lead_forms to authenticated;
grant select on public.lead_forms to service_role;
alter table public.lead_forms enable row level security;
alter table public.lead_forms force row level security;
create policy "Who views leads may see the forms" on public.lead_forms
  for select to authenticated using (organization_id = (select private.org_with('lead.view')));
create policy "Who edits projects may make a form" on public.lead_forms
  for insert to authenticated with check (organization_id = (select private.org_with('project.edit')));
create policy "Who edits projects may change a form" on public.lead_forms
  for update to authenticated
  using (organization_id = (select private.org_with('project.edit')))
  with check (organization_id = (select private.org_with('project.edit')));
create policy "Who edits projects may delete a form" on public.lead_forms
  for delete to authenticated using (organization_id = (select private.org_with('project.edit')));
create trigger update_modified_column before update on public.lead_forms
  for each row execute function private.update_modified_column();
comment on table public.lead_forms is
  'A form by which leads come in of themselves. The public never reads it here: intake takes submissions by the form''s id, which is no secret.';
comment on column public.lead_forms.consent_scopes is 'What consent_text is a consent to.';
comment on column public.lead_forms.rate_per_minute is 'Submissions a minute that are taken; of more the sender is told to wait.';
comment on column public.lead_forms.fields is 'What it asks: an array of {"name","label","type","required"}.';
comment on column public.lead_forms.stage_id is 'Where its leads begin; null is the first stage of the default pipeline.';
comment on column public.lead_forms.consent_text is 'What the person agrees to by sending it; copied to consents word by word.';


-- What intake remembers of those who send leads -------------------------------------------------------------------------------------

create table private.rate_limits (
  subject     text primary key check (length(subject) between 1 and 200),
  tokens      numeric not null,
  refilled_at timestamptz not null
);
select private.close_table('private.rate_limits');
comment on table private.rate_limits is 'A bucket a sender: what it may still send now, in whatever process it is served. Real time.';

create table private.lead_requests (
  organization_id uuid not null references public.organizations (id) on delete cascade,
  subject         text not null,
  key             text not null check (length(key) between 1 and 255),
  body_sha256     text not null,
  answer          jsonb,
  created_at      timestamptz not null,
  primary key (organization_id, subject, key)
);
create index idx_lead_requests_created_at on private.lead_requests (created_at);
select private.close_table('private.lead_requests');
comment on table private.lead_requests is
  'Requests that came with an idempotency key, and what they were answered: ids and codes, nobody''s particulars. Kept for a week.';


-- consents ------------------------------------------------------------------------------------------------------------------------

create table public.consents (
  id              uuid primary key default gen_random_uuid(),
  organization_id uuid not null default public.get_auth_org_id() references public.organizations (id) on delete cascade,
  lead_id         uuid,
  phone_number    text not null check (phone_number ~ '^\+[1-9][0-9]{6,14}$'),
  scope           text not null check (scope in ('call_service', 'call_promotional', 'recording', 'sms', 'whatsapp')),
  consent_text    text not null check (length(btrim(consent_text)) > 0),
  source          text not null check (source in ('form', 'call', 'import', 'written', 'message', 'in_person')),
  proof           jsonb not null check (jsonb_typeof(proof) = 'object' and proof <> '{}'),
  granted_at      timestamptz not null default private.clock_now(),
  expires_at      timestamptz,
  revoked_at      timestamptz,
  revoke_reason   text,
  created_by      uuid default private.acting_user_id(),
  created_at      timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  foreign key (organization_id, lead_id) references public.leads (organization_id, id) on delete set null (lead_id),
  foreign key (organization_id, created_by) references public.profiles (organization_id, id) on delete set null (created_by),
  check (expires_at > granted_at),
  check (revoked_at >= granted_at)
);
create index idx_consents_number on public.consents (organization_id, phone_number, scope, granted_at desc);
create index idx_consents_lead on public.consents (organization_id, lead_id);
create index idx_consents_created_by on public.consents (organization_id, created_by);

revoke all on public.consents from anon, authenticated, service_role;
grant select on public.consents to authenticated, service_role;
grant insert (lead_id, phone_number, scope, consent_text, source, proof, granted_at, expires_at) on public.consents to authenticated;
alter table public.consents enable row level security;
alter table public.consents force row level security;
create policy "Who views leads may see what they agreed to" on public.consents
  for select to authenticated using (organization_id = (select private.org_with('lead.view')));
create policy "Who edits leads may record that one agreed" on public.consents
  for insert to authenticated with check (organization_id = (select private.org_with('lead.edit')));

create function private.guard_consent() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  if tg_op = 'INSERT' then
    if new.granted_at > private.clock_now() + interval '5 minutes' then
      perform private.raise_error(422, 'granted_in_future', 'Nobody has agreed yet', 'granted_at');
    end if;
    if new.lead_id is not null and not exists (
      select
      from public.leads as lead
      where lead.organization_id = new.organization_id and lead.id = new.lead_id and lead.phone = new.phone_number
    ) then
      perform private.raise_error(422, 'number_of_another', 'The lead has another number', 'phone_number');
    end if;
    return new;
  end if;
  -- The organization's end takes its evidence along, and so does a person's erasure; otherwise a reference may fall away, and a consent is withdrawn once.
  if tg_op = 'DELETE' then
    if current_setting('trunkline.erasing', true) is distinct from 'on'
      and exists (select from public.organizations as tenant where tenant.id = old.organization_id)
    then
      raise exception 'a consent is evidence: it is revoked, never deleted' using errcode = 'restrict_violation';
    end if;
    return old;
  end if;
  if to_jsonb(new) - array['lead_id', 'created_by', 'revoked_at', 'revoke_reason']
      is distinct from to_jsonb(old) - array['lead_id', 'created_by', 'revoked_at', 'revoke_reason']
    or (new.lead_id is distinct from old.lead_id and new.lead_id is not null)
    or (new.created_by is distinct from old.created_by and new.created_by is not null)
    or old.revoked_at is not null and (new.revoked_at, new.revoke_reason) is distinct from (old.revoked_at, old.revoke_reason)
  then
    raise exception 'a consent is evidence: it is revoked, never changed' using errcode = 'restrict_violation';
  end if;
  return new;
end
$$;
comment on function private.guard_consent() is 'Trigger: what somebody agreed to stays as it was; it can only be withdrawn, once.';
create trigger guard_consent before insert or update or delete on public.consents
  for each row execute function private.guard_consent();

create function private.has_consent(organization uuid, phone text, wanted text, at timestamptz) returns boolean
language plpgsql stable security definer set search_path = '' as $$
begin
  return exists (
    select
    from public.consents as consent
    where consent.organization_id = organization
      and consent.phone_number = phone
      and consent.scope = wanted
      and consent.granted_at <= at
      and (consent.expires_at is null or consent.expires_at > at)
      and (consent.revoked_at is null or consent.revoked_at > at)
  );
end
$$;
comment on function private.has_consent(uuid, text, text, timestamptz) is
  'Whether a number has agreed to a scope, and has not withdrawn it, as of a moment: also of one in the past.';

create function private.follow_recording_consent() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  update public.leads as lead
  set recording_consent = private.has_consent(new.organization_id, new.phone_number, 'recording', private.clock_now())
  where lead.organization_id = new.organization_id and lead.phone = new.phone_number
    and lead.recording_consent <> private.has_consent(new.organization_id, new.phone_number, 'recording', private.clock_now());
  return null;
end
$$;
comment on function private.follow_recording_consent() is 'Trigger: leads.recording_consent says what the number last agreed to.';
create trigger follow_recording_consent after insert or update of revoked_at on public.consents
  for each row when (new.scope = 'recording') execute function private.follow_recording_consent();

create function private.suppress_revoked() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  insert into public.suppressions (organization_id, phone_number, source, reason)
  values (new.organization_id, new.phone_number, 'lead', coalesce(new.revoke_reason, 'consent revoked'))
  on conflict (organization_id, phone_number) do nothing;
  return null;
end
$$;
comment on function private.suppress_revoked() is 'Trigger: who no longer wants to be called is not called, from this transaction on.';
create trigger suppress_revoked after update of revoked_at on public.consents
  for each row when (old.revoked_at is null and new.revoked_at is not null and new.scope in ('call_service', 'call_promotional'))
  execute function private.suppress_revoked();
comment on table public.consents is
  'What a person agreed to, word by word, with the proof: one row a scope and occasion. Evidence, so only ever added to and revoked.';
comment on column public.consents.scope is 'One of calling for a service or for promotion, recording the call, or a message.';
comment on column public.consents.consent_text is 'The words that were shown or said.';
comment on column public.consents.proof is 'How it can be shown: form and address, recording and second, document and page.';
comment on column public.consents.expires_at is 'Until when it holds; null has no end of its own.';

create function private.revoke_consent(consent_id uuid, reason text, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('lead.edit');
  revoked      public.consents;
begin
  update public.consents as consent
  set revoked_at = greatest(at, consent.granted_at), revoke_reason = revoke_consent.reason
  where consent.organization_id = organization and consent.id = revoke_consent.consent_id and consent.revoked_at is null
  returning consent.* into revoked;
  if revoked.id is null then
    perform private.raise_error(404, 'consent_not_found', 'There is no such consent that still holds', 'consent_id');
  end if;
  return jsonb_build_object('id', revoked.id, 'scope', revoked.scope, 'revoked_at', revoked.revoked_at);
end
$$;
comment on function private.revoke_consent(uuid, text, timestamptz) is 'Withdraws a consent in the caller''s organization.';

create function public.revoke_consent(consent_id uuid, reason text default null) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.revoke_consent(consent_id, reason, private.clock_now())
$$;
comment on function public.revoke_consent(uuid, text) is
  'Withdraws a consent; to be called: the number is suppressed at once. Needs lead.edit. Returns {"id","scope","revoked_at"}.';

revoke execute on function
  private.guard_consent(), private.has_consent(uuid, text, text, timestamptz), private.follow_recording_consent(), private.suppress_revoked()
from public;
revoke execute on function private.revoke_consent(uuid, text, timestamptz), public.revoke_consent(uuid, text)
from public, anon, authenticated, service_role;
grant execute on function private.revoke_consent(uuid, text, timestamptz), public.revoke_consent(uuid, text) to authenticated;
