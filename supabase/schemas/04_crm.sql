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
  created_by      uuid default auth.uid(),
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
  order_index     integer not null default 0,
  position        integer generated always as (order_index) stored,
  color           text not null default '#cbd5e1' check (color ~ '^#[0-9a-fA-F]{6}$'),
  created_at      timestamptz not null default private.clock_now(),
  updated_at      timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  foreign key (organization_id, pipeline_id) references public.pipelines (organization_id, id) on delete cascade,
  foreign key (organization_id, project_id) references public.projects (organization_id, id) on delete cascade
);
create index idx_pipeline_stages_pipeline on public.pipeline_stages (organization_id, pipeline_id, order_index);
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
  created_by        uuid default auth.uid(),
  created_at        timestamptz not null default private.clock_now(),
  updated_at        timestamptz not null default private.clock_now(),
  unique (organization_id, id),
  -- What an import names in on_conflict: the same number twice in one project is one lead.
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
  created_by      uuid default auth.uid(),
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
