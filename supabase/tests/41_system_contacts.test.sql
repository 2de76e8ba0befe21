-- Contacts: the order of stages, how leads moved, forms, consents, and what a lead's call fields mean.
begin;
set local search_path = public, extensions, tap;
select plan(49);

create function pg_temp.person(number integer) returns uuid
language sql immutable as $$ select ('00000000-0000-4000-8000-0000000e' || lpad(number::text, 4, '0'))::uuid $$;
create function pg_temp.sign_up(number integer, email text, confirmed boolean default true, metadata jsonb default '{}') returns void
language sql as $$
  insert into auth.users (id, email, email_confirmed_at, raw_user_meta_data)
  values (pg_temp.person(number), email, case when confirmed then now() end, metadata)
$$;
-- What a query gives as somebody: one value, or the code of the error.
create function pg_temp.as_user(number integer, query text, role text default 'authenticated') returns text
language plpgsql as $$
declare
  before text := current_setting('role');
  answer text;
begin
  perform set_config('request.jwt.claims',
    case when number is null then jsonb_build_object('role', role) else jsonb_build_object('sub', pg_temp.person(number), 'role', role) end::text, true);
  perform set_config('role', role, true);
  begin
    execute query into answer;
  exception
    when sqlstate 'PGRST' then answer := sqlerrm::jsonb ->> 'code';
    when others then answer := sqlstate;
  end;
  perform set_config('role', before, true);
  perform set_config('request.jwt.claims', '', true);
  return answer;
end
$$;
create function pg_temp.stages(pipeline text default 'Default Pipeline') returns text
language sql as $$
  select string_agg(stage.name || ' ' || stage.order_index || case when stage.position <> stage.order_index then '!' else '' end, ', '
    order by stage.order_index)
  from public.pipeline_stages as stage join public.pipelines as line on line.id = stage.pipeline_id
  where line.organization_id = (select organization_id from public.profiles where id = pg_temp.person(1)) and line.name = stages.pipeline
$$;
create function pg_temp.stage(stage text, person integer default 1) returns uuid
language sql as $$
  select id from public.pipeline_stages
  where name = stage and organization_id = (select organization_id from public.profiles where id = pg_temp.person(person))
$$;
insert into private.clock_offset (shift) values (timestamptz '2026-11-24 10:00+05:30' - now())
on conflict (single) do update set shift = excluded.shift;
select pg_temp.sign_up(1, 'owner@one.test');
select pg_temp.sign_up(2, 'owner@two.test');
select pg_temp.sign_up(3, 'member@one.test');
select pg_temp.as_user(1, $$select public.create_organization('One')$$);
select pg_temp.as_user(2, $$select public.create_organization('Two')$$);
update public.profiles set organization_id = (select organization_id from public.profiles where id = pg_temp.person(1)) where id = pg_temp.person(3);

-- Stages.
select is(pg_temp.stages(), 'New Lead 0, Contacted 1, Qualified 2, Negotiation 3, Won 4, Lost 5', 'Stages are numbered from 0 on');
select is(
  pg_temp.as_user(1, format($$select string_agg(stage ->> 'name', ' ' order by (stage ->> 'position')::integer)
    from jsonb_array_elements(public.move_stage(%L, 1) -> 'stages') as stage$$, pg_temp.stage('Won'))),
  'New Lead Won Contacted Qualified Negotiation Lost', 'A stage dragged up takes the place, and the others make room');
select pg_temp.as_user(1, format($$update public.pipeline_stages set order_index = 3 where id = %L returning 'made'$$, pg_temp.stage('New Lead')));
select is(pg_temp.stages(), 'Won 0, Contacted 1, Qualified 2, New Lead 3, Negotiation 4, Lost 5', 'Dragged down, by writing order_index itself, too');
select pg_temp.as_user(1, format($$select public.move_stage(%L, 99)$$, pg_temp.stage('Contacted')));
select is(pg_temp.stages(), 'Won 0, Qualified 1, New Lead 2, Negotiation 3, Lost 4, Contacted 5', 'Beyond the end is the end');
select pg_temp.as_user(1, format($$insert into public.pipeline_stages (pipeline_id, name) select pipeline_id, 'Last' from public.pipeline_stages where id = %L returning 'made'$$, pg_temp.stage('Won')));
select is(pg_temp.stages(), 'Won 0, Qualified 1, New Lead 2, Negotiation 3, Lost 4, Contacted 5, Last 6', 'A new one without a place is the last');
select pg_temp.as_user(1, format($$insert into public.pipeline_stages (pipeline_id, name, order_index) select pipeline_id, 'Second', 1 from public.pipeline_stages where id = %L returning 'made'$$, pg_temp.stage('Won')));
select is(pg_temp.stages(), 'Won 0, Second 1, Qualified 2, New Lead 3, Negotiation 4, Lost 5, Contacted 6, Last 7', 'one with a place takes it');
delete from public.pipeline_stages where name in ('Second', 'Last');
select is(pg_temp.stages(), 'Won 0, Qualified 1, New Lead 2, Negotiation 3, Lost 4, Contacted 5', 'and one that goes leaves no gap');
select pg_temp.as_user(1, $$with moved as (update public.pipeline_stages set order_index = 5 - order_index returning 1) select count(*) from moved$$);
select is(pg_temp.stages(), 'Contacted 0, Lost 1, Negotiation 2, New Lead 3, Qualified 4, Won 5', 'All at once is all at once');
set constraints all immediate;
select is(pg_temp.as_user(3, format($$select public.move_stage(%L, 0)$$, pg_temp.stage('Won'))), 'permission_denied', 'Dragging needs project.edit');
select is(pg_temp.as_user(2, format($$select public.move_stage(%L, 0)$$, pg_temp.stage('Won'))), 'stage_not_found', 'and one''s own pipeline');
select is(pg_temp.as_user(1, format($$select public.move_stage(%L, -1)$$, pg_temp.stage('Won'))), 'invalid_position', 'and a place');
set constraints all deferred;

-- Transitions.
select pg_temp.as_user(1, format($$insert into public.leads (name, phone, stage_id) values ('Lia', '+917000001001', %L) returning 'made'$$, pg_temp.stage('New Lead')));
select pg_temp.as_user(3, format($$update public.leads set stage_id = %L where name = 'Lia' returning 'made'$$, pg_temp.stage('Contacted')));
select pg_temp.as_user(3, $$update public.leads set notes = 'x' where name = 'Lia' returning 'made'$$);
select is(
  (select string_agg(concat_ws('>', coalesce(from_stage_name, '-'), to_stage_name, right(moved_by::text, 1)), ' ' order by id) from public.stage_transitions),
  '->New Lead>1 New Lead>Contacted>3', 'Every move is written down with who made it, and nothing else is');
select is(pg_temp.as_user(1, $$select count(*) from public.stage_transitions$$), '2', 'Its organization sees it');
select is(pg_temp.as_user(2, $$select count(*) from public.stage_transitions$$), '0', 'no other');
select is(pg_temp.as_user(1, $$delete from public.stage_transitions returning 'gone'$$), '42501', 'Nobody deletes it');
delete from public.pipeline_stages where id = pg_temp.stage('Contacted');
select is(
  (select string_agg(concat_ws('>', from_stage_name, coalesce(to_stage_name, '-')), ' ' order by id) from public.stage_transitions),
  'New Lead New Lead>Contacted Contacted>-', 'A stage that is deleted leaves its name behind');
select is((select stage_id from public.leads where name = 'Lia'), null, 'and its leads without one');

-- Forms.
select is(pg_temp.as_user(1, $$insert into public.lead_forms (name, fields) values ('Site', '[{"name": "phone"}]') returning created_by = auth.uid()$$), 'true', 'Who edits projects makes a form');
select is(pg_temp.as_user(3, $$insert into public.lead_forms (name) values ('Other') returning 'made'$$), '42501', 'a member does not');
select is(pg_temp.as_user(3, $$select count(*) from public.lead_forms$$), '1', 'but sees it');
select is(pg_temp.as_user(2, $$select count(*) from public.lead_forms$$), '0', 'and another organization does not');
select throws_ok(
  $$insert into public.lead_forms (organization_id, name, stage_id)
    select organization_id, 'Cross', pg_temp.stage('Won') from public.profiles where id = pg_temp.person(2)$$, '23503', null,
  'A form of one organization leads to no stage of another');

-- Consents.
select is(pg_temp.as_user(3, $$insert into public.consents (lead_id, phone_number, scope, consent_text, source, proof)
  select id, phone, 'recording', 'Record me', 'call', '{"recording": "r1"}' from public.leads where name = 'Lia' returning 'made'$$), 'made', 'A consent is written down');
select ok((select recording_consent from public.leads where name = 'Lia'), 'and the lead may be recorded');
select is(pg_temp.as_user(3, $$insert into public.consents (phone_number, scope, consent_text, source, proof, expires_at)
  values ('+917000001001', 'call_promotional', 'Call me', 'form', '{"form": "Site"}', '2026-12-24') returning 'made'$$), 'made', 'for a scope and a time');
select is(pg_temp.as_user(3, $$insert into public.consents (phone_number, scope, consent_text, source, proof)
  values ('+917000001001', 'sms', 'Write me', 'form', '{}') returning 'made'$$), '23514', 'never without proof');
select is(pg_temp.as_user(3, $$insert into public.consents (lead_id, phone_number, scope, consent_text, source, proof)
  select id, '+917000001999', 'sms', 'Write me', 'form', '{"a": 1}' from public.leads where name = 'Lia' returning 'made'$$), 'number_of_another', 'or for somebody else''s number');
select is(pg_temp.as_user(3, $$insert into public.consents (phone_number, scope, consent_text, source, proof, granted_at)
  values ('+917000001001', 'sms', 'Write me', 'form', '{"a": 1}', '2027-01-01') returning 'made'$$), 'granted_in_future', 'or before it was given');
select ok(private.has_consent((select organization_id from public.leads where name = 'Lia'), '+917000001001', 'call_promotional', '2026-12-01'), 'It holds');
select ok(not private.has_consent((select organization_id from public.leads where name = 'Lia'), '+917000001001', 'call_promotional', '2026-12-25'), 'until it runs out');
select ok(not private.has_consent((select organization_id from public.leads where name = 'Lia'), '+917000001001', 'call_service', '2026-12-01'), 'for its scope alone');
select ok(not private.has_consent((select organization_id from public.profiles where id = pg_temp.person(2)), '+917000001001', 'call_promotional', '2026-12-01'), 'to whom it was given');
select throws_ok($$update public.consents set consent_text = 'Call me at night'$$, '23001', null, 'Its words stay as they were, whoever asks');
select throws_ok($$delete from public.consents$$, '23001', null, 'and it stays');
select is(pg_temp.as_user(2, format($$select public.revoke_consent(%L)$$, (select id from public.consents where scope = 'recording'))), 'consent_not_found', 'Another organization revokes nothing');
select pg_temp.as_user(3, format($$select public.revoke_consent(%L, 'asked')$$, (select id from public.consents where scope = 'recording')));
select ok(not (select recording_consent from public.leads where name = 'Lia'), 'Revoked, nothing is recorded');
select is((select count(*) from public.suppressions where phone_number = '+917000001001'), 0::bigint, 'but calls go on');
select pg_temp.as_user(3, format($$select public.revoke_consent(%L, 'enough')$$, (select id from public.consents where scope = 'call_promotional')));
select is((select reason from public.suppressions where phone_number = '+917000001001'), 'enough', 'until that is revoked as well: then the number is suppressed');
select is(pg_temp.as_user(3, format($$select public.revoke_consent(%L)$$, (select id from public.consents where scope = 'recording'))), 'consent_not_found', 'Nothing is revoked twice');

-- A lead's call fields.
insert into public.carrier_accounts (id, provider, account_sid, credentials_sealed, api_base)
values ('00000000-0000-4000-c000-0000000e0001', 'plivo', 'MASYSTEM', 'sealed', 'https://carrier.example.test');
create function pg_temp.call(number integer, callee text, ended timestamptz default null, outcome text default null) returns uuid
language sql as $$
  insert into public.call_logs (id, organization_id, lead_id, carrier_account_id, caller_number, callee_number, dialled, status, submitted_at, created_at, ended_at, call_status)
  select ('00000000-0000-4000-d000-0000000e' || lpad(number::text, 4, '0'))::uuid, lead.organization_id, lead.id,
    '00000000-0000-4000-c000-0000000e0001', '+918000000000', callee, true, case when ended is null then 'ringing' else 'ended' end::public.attempt_status,
    '2026-11-24 08:00+05:30', '2026-11-24 08:00+05:30', ended, outcome::public.call_outcome
  from public.leads as lead where lead.name = 'Lia' returning id
$$;
create function pg_temp.finish(number integer, ended timestamptz, outcome text) returns void
language sql as $$
  update public.call_logs set status = 'ended', ended_at = ended, call_status = outcome::public.call_outcome
  where id = ('00000000-0000-4000-d000-0000000e' || lpad(number::text, 4, '0'))::uuid
$$;
create function pg_temp.lia() returns text
language sql as $$ select concat_ws(' ', call_status, right(call_log_id::text, 1), to_char(last_contacted_at at time zone 'Asia/Kolkata', 'HH24:MI')) from public.leads where name = 'Lia' $$;
select pg_temp.call(1, '+917000002001');
select pg_temp.call(2, '+917000002002');
select is(pg_temp.lia(), '', 'No call has ended');
select pg_temp.finish(2, '2026-11-24 09:10+05:30', 'busy');
select is(pg_temp.lia(), 'busy 2 09:10', 'The call that ended says how');
select pg_temp.finish(1, '2026-11-24 09:05+05:30', 'answered');
select is(pg_temp.lia(), 'busy 2 09:10', 'One that ended before it, and is heard of later, changes nothing');
select pg_temp.call(3, '+917000002003', '2026-11-24 09:20+05:30', 'no_answer');
select is(pg_temp.lia(), 'no_answer 3 09:20', 'one that ended after it does');
update public.call_logs set call_status = 'machine' where right(id::text, 5) = 'e0003';
select is(pg_temp.lia(), 'machine 3 09:20', 'and so does its correction');
update public.call_logs set call_status = 'machine' where right(id::text, 5) = 'e0001';
select is(pg_temp.lia(), 'machine 3 09:20', 'and not that of an earlier one');
update public.call_logs set ended_at = '2026-11-24 09:01+05:30' where right(id::text, 5) = 'e0003';
select is(pg_temp.lia(), 'busy 2 09:10', 'A correction may take the place away again');
select is(pg_temp.as_user(3, $$update public.leads set call_status = 'answered' returning 'made'$$), '42501', 'Nobody writes it by hand');

select is(pg_temp.as_user(3, $$update public.leads set abuse_flag = true, abuse_details = 'shouted' where name = 'Lia' returning 'made'$$), 'made', 'Who edits leads flags abuse');
-- abuse_flag: release and begin refuse it in 13_ and 14_core; here, that it wakes what waits so that it ends at once.
insert into public.campaigns (id, organization_id, name) select '00000000-0000-4000-e000-0000000e0001', organization_id, 'C' from public.leads where name = 'Lia';
insert into public.call_queue (organization_id, campaign_id, lead_id, next_retry_at, wait_reason)
select organization_id, '00000000-0000-4000-e000-0000000e0001', id, '2026-12-24', 'retry_busy' from public.leads where name = 'Lia';
update public.leads set abuse_flag = false where name = 'Lia';
update public.call_queue set next_retry_at = '2026-12-24' where campaign_id = '00000000-0000-4000-e000-0000000e0001';
update public.leads set abuse_flag = true where name = 'Lia';
select is((select next_retry_at from public.call_queue where campaign_id = '00000000-0000-4000-e000-0000000e0001'), private.clock_now(), 'and whatever waits for them is judged anew at once');

select * from finish();
rollback;
