-- Sources beside carriers, and what a voice agent's events mean.
begin;
set local search_path = public, extensions, tap;
select plan(58);

insert into private.clock_offset (shift) values (timestamptz '2026-11-24 10:00+05:30' - now())
on conflict (single) do update set shift = excluded.shift;

create function pg_temp.person(number integer) returns uuid
language sql immutable as $$ select ('00000000-0000-4000-8000-0000005a' || lpad(number::text, 4, '0'))::uuid $$;
create function pg_temp.id(kind text, number integer) returns uuid
language sql immutable as $$ select ('00000000-0000-4000-' || kind || '-' || lpad('5a' || number, 12, '0'))::uuid $$;
create function pg_temp.org(number integer) returns uuid
language sql as $$ select organization_id from public.profiles where id = pg_temp.person(number) $$;
create function pg_temp.as_user(number integer, query text) returns text
language plpgsql as $$
declare
  before text := current_setting('role');
  answer text;
begin
  perform set_config('request.jwt.claims', jsonb_build_object('sub', pg_temp.person(number), 'role', 'authenticated')::text, true);
  perform set_config('role', 'authenticated', true);
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
insert into auth.users (id, email, email_confirmed_at, raw_user_meta_data)
select pg_temp.person(number), 'p' || number || '@sources.test', now(), '{}' from generate_series(1, 3) as number;
select pg_temp.as_user(1, $$select public.create_organization('One')$$);
select pg_temp.as_user(2, $$select public.create_organization('Two')$$);
update public.profiles set organization_id = pg_temp.org(1), system_role = 'member', status = 'active' where id = pg_temp.person(3);

-- Who makes a source.
create function pg_temp.make(number integer, source uuid, provider text default 'retell', secret text default 'v1.1.AAAA') returns text
language sql as $$
  select pg_temp.as_user(number, format(
    $q$select public.create_webhook_source(%L, %L, ' ', %L, '{"tools": {}}') ->> 'name'$q$, source, provider, secret))
$$;
select is(pg_temp.make(1, pg_temp.id('a000', 1)), 'retell', 'An owner makes a source, which is called what it is');
select is(pg_temp.make(1, pg_temp.id('a000', 1)), 'source_exists', 'An id is taken once');
select is(pg_temp.make(2, pg_temp.id('a000', 1)), 'source_exists', 'also by another organization');
select is(pg_temp.make(3, pg_temp.id('a000', 9)), 'permission_denied', 'A member makes none');
select is(pg_temp.make(1, pg_temp.id('a000', 9), 'Re tell'), 'invalid_source', 'A provider has a name that fits a path');
select is(pg_temp.make(1, pg_temp.id('a000', 9), 'retell', 'plain'), 'invalid_secret', 'A secret is sealed');
select is(pg_temp.make(2, pg_temp.id('a000', 2), 'agent'), 'agent', 'Another organization makes its own');
select is(pg_temp.as_user(1, $$select count(*) from public.webhook_sources$$), '1', 'and sees no other');
select is(pg_temp.as_user(3, $$select count(*) from public.webhook_sources$$), '0', 'A member sees none');
select is(pg_temp.as_user(1, $$select secrets_sealed::text from public.webhook_sources$$), '42501', 'Nobody reads a secret');
select is(pg_temp.as_user(1, $$update public.webhook_sources set is_active = false returning 'x'$$), '42501', 'or changes a source by hand');
select is(
  (select metadata ->> 'secrets_sealed' from public.audit_logs where action = 'webhook_source.created' and entity_id = pg_temp.id('a000', 1)),
  'changed', 'It is on record, without its secret'
);
select is(
  pg_temp.as_user(1, format($$select public.rotate_webhook_source_secret(%L, 'v1.1.BBBB') ->> 'id'$$, pg_temp.id('a000', 2))),
  'source_not_found', 'Nobody rotates another''s'
);

-- What a handler is told.
create function pg_temp.opened(source text) returns text
language sql as $$
  select concat_ws(' ', opened ->> 'found', opened ->> 'provider', opened ->> 'secrets_sealed', (opened ->> 'previous_until') is not null)
  from private.open_source(jsonb_build_object('v', 1, 'source_id', source), private.clock_now()) as opened
$$;
select is(pg_temp.opened(pg_temp.id('a000', 1)::text), 'true retell ["v1.1.AAAA"] f', 'A source with its secret');
select is(
  pg_temp.as_user(1, format($$select public.rotate_webhook_source_secret(%L, 'v1.1.BBBB', 60) ->> 'provider'$$, pg_temp.id('a000', 1))),
  'retell', 'A secret is rotated'
);
select is(pg_temp.opened(pg_temp.id('a000', 1)::text), 'true retell ["v1.1.BBBB", "v1.1.AAAA"] t', 'and the one before holds on');
update public.webhook_sources set previous_until = now() where id = pg_temp.id('a000', 1);
select is(pg_temp.opened(pg_temp.id('a000', 1)::text), 'true retell ["v1.1.BBBB"] f', 'until its time');
select is(pg_temp.opened('x'' or true'), 'false f', 'What is no UUID is no source');
select is(pg_temp.opened(upper(pg_temp.id('a000', 2)::text)), 'true agent ["v1.1.AAAA"] f', 'A UUID may be written in capitals');
select throws_ok(
  $$update public.webhook_sources set secrets_sealed = '{a,b,c}', previous_until = now()$$, '23514', null, 'Three secrets are too many'
);
select throws_ok($$update public.webhook_sources set previous_until = null where id = pg_temp.id('a000', 1)$$, '23514', null, 'and a second has an end');

-- Events of any payload.
create function pg_temp.tell(events jsonb, source integer default 2, provider text default 'agent') returns text
language sql as $$
  select concat_ws(' ', told ->> 'result', told ->> 'results')
  from private.apply_event(
    jsonb_build_object(
      'v', 1, 'source', provider, 'source_id', pg_temp.id('a000', source), 'verified', true, 'headers', '{}'::jsonb, 'body', '{}', 'events', events
    ), private.clock_now()
  ) as told
$$;
create function pg_temp.event(key text, payload jsonb, extra jsonb default '{}') returns jsonb
language sql as $$ select jsonb_build_object('kind', 'k', 'dedupe_key', key, 'payload', payload) || extra $$;
select is(pg_temp.tell(jsonb_build_array(pg_temp.event('n', '{"type": "nothing"}', '{"note": "why"}'))), 'ignored', 'What means nothing is ignored');
select is(
  (select concat_ws(' ', status, error, payload_type, organization_id = pg_temp.org(2)) from private.webhook_events where dedupe_key = 'n'),
  'ignored why nothing t', 'and kept, with the reason and whose it is'
);
select is(
  pg_temp.tell(jsonb_build_array(pg_temp.event('n', '{"type": "nothing"}'), pg_temp.event('o', '{"type": "weather"}'), pg_temp.event('p', '{"type": "nothing"}'))),
  'ignored ["duplicate", "ignored", "ignored"]', 'Several events of a request are told one by one'
);
select is((select error from private.webhook_events where dedupe_key = 'o'), 'unknown_payload', 'A payload of no type that is known waits for one');
select is(pg_temp.tell(jsonb_build_array(pg_temp.event('q', '{"type": "nothing"}')), 1, 'agent'), 'orphan', 'A source of another provider is none');
select is(pg_temp.tell('[]'), 'ignored', 'Nothing at all is nothing');
select throws_ok(
  $$select private.apply_event('{"v": 1, "source": "agent", "source_id": "x", "events": []}', now())$$, 'PGRST', null, 'Only what is verified is taken'
);
select pg_temp.tell(jsonb_build_array(pg_temp.event('u' || number, '{"type": "nothing"}', '{"unmapped": [{"field": "f", "value": "v"}, {"field": "f", "value": "w"}]}')))
from generate_series(1, 2) as number;
select is(
  (select string_agg(value || seen, ' ' order by value) from private.unmapped_values where organization_id = pg_temp.org(2)), 'v2 w2',
  'A word that maps to nothing is counted'
);
select is(pg_temp.as_user(2, $$select jsonb_array_length(public.list_unmapped_values())$$), '2', 'and shown to its organization');
select is(pg_temp.as_user(1, $$select jsonb_array_length(public.list_unmapped_values())$$), '0', 'and to no other');
select is(pg_temp.as_user(3, $$select public.list_unmapped_values()$$), 'permission_denied', 'or to whom it is none of their business');

-- Of two values the one that knows more.
select ok(private.knows_more('{"x": 3}', 'x', 4, 'long text', 'short'), 'A later kind of event knows more');
select ok(not private.knows_more('{"x": 4}', 'x', 3, 'short', 'long text'), 'an earlier one less');
select ok(private.knows_more('{"x": 3}', 'x', 3, 'short', 'longer'), 'Of the same kind the longer one does');
select ok(not private.knows_more('{"x": 3}', 'x', 3, 'same', 'same'), 'the same not');
select ok(not private.knows_more('{}', 'x', 4, null, null), 'and nothing never');

-- Two campaigns of an organization, with the same person in both, and one of another organization.
insert into public.carrier_accounts
select (jsonb_populate_record(null::public.carrier_accounts, jsonb_build_object(
  'id', pg_temp.id('c000', 1), 'provider', 'plivo', 'account_sid', 'MASOURCES', 'auth_token_sealed', 's', 'credentials_sealed', 's',
  'api_base', 'https://carrier.example.test', 'max_concurrent_calls', 10, 'dialling_enabled', true, 'is_active', true,
  'created_at', now(), 'updated_at', now()
))).*;
create function pg_temp.campaign(number integer, tenant uuid, phones text[]) returns void
language plpgsql as $$
declare
  project uuid;
begin
  insert into public.projects (organization_id, name) values (tenant, 'Project ' || number) returning id into project;
  insert into public.campaigns (id, organization_id, project_id, name, status, open_leads, total_enrolled)
  values (pg_temp.id('d000', number), tenant, project, 'Campaign ' || number, 'running', cardinality(phones), cardinality(phones));
  insert into public.leads (id, organization_id, project_id, name, phone)
  select pg_temp.id('e000', number * 100 + place::integer), tenant, project, 'Lead', phone from unnest(phones) with ordinality as one (phone, place);
  insert into public.campaign_leads (organization_id, campaign_id, lead_id, status)
  select tenant, pg_temp.id('d000', number), lead.id, 'queued' from public.leads as lead where lead.project_id = project;
  insert into public.call_queue (organization_id, campaign_id, lead_id, next_retry_at)
  select tenant, pg_temp.id('d000', number), lead.id, private.clock_now() from public.leads as lead where lead.project_id = project;
end
$$;
select pg_temp.campaign(1, pg_temp.org(2), array['+919811100001', '+919811100002']);
select pg_temp.campaign(2, pg_temp.org(2), array['+919811100001']);
select pg_temp.campaign(3, pg_temp.org(1), array['+919811100001']);
-- The person is in a call of the first campaign.
insert into public.call_logs (
  id, organization_id, campaign_id, lead_id, queue_id, attempt_no, carrier_account_id, call_sid, caller_number, callee_number, status, dialled,
  submitted_at
)
select
  pg_temp.id('f000', 1), queue.organization_id, queue.campaign_id, queue.lead_id, queue.id, 1, pg_temp.id('c000', 1), 'sid-5a', '+918011112222',
  '+919811100001', 'in_progress', true, private.clock_now()
from public.call_queue as queue where queue.campaign_id = pg_temp.id('d000', 1) and queue.lead_id = pg_temp.id('e000', 101);
update public.call_queue set status = 'processing', dispatch_count = 1 where lead_id = pg_temp.id('e000', 101);
update public.campaign_leads set status = 'calling' where lead_id = pg_temp.id('e000', 101);
create function pg_temp.agent(key text, payload jsonb, source integer default 2, provider text default 'agent') returns text
language sql as $$
  select pg_temp.tell(jsonb_build_array(pg_temp.event(key, '{"type": "agent", "agent_call_id": "conv-5a"}'::jsonb || payload)), source, provider)
$$;
create function pg_temp.log() returns public.call_logs
language sql as $$ select log from public.call_logs as log where log.id = pg_temp.id('f000', 1) $$;

select is(pg_temp.agent('a1', '{"event": "status", "recording_url": "https://a.example/1"}'), 'orphan', 'A conversation that nobody knows is kept');
select is(
  pg_temp.agent('a2', jsonb_build_object('event', 'started', 'attempt_id', pg_temp.id('f000', 1)), 1, 'retell'), 'orphan',
  'A source of another organization finds no call of this one'
);
select is((select error from private.webhook_events where dedupe_key = 'a2'), 'other_organization', 'and that is said');
select is(
  pg_temp.agent('a3', '{"event": "ended", "provider_call_id": "sid-5a", "transcript": "Hello", "disconnect_reason": "silence", "disconnect_code": "idle"}'),
  'applied', 'The carrier''s call finds it'
);
select is(
  concat_ws(' ', (pg_temp.log()).agent_call_id, (pg_temp.log()).conversation_transcript, (pg_temp.log()).recording_url),
  'conv-5a Hello https://a.example/1', 'and with it what came before anybody knew whose it was'
);
select is((select string_agg(status || ' ' || tries, ' ') from private.webhook_events where dedupe_key = 'a1'), 'applied 2', 'which is told');
select is(pg_temp.agent('a4', '{"event": "started", "transcript": "Hello and much more"}'), 'ignored', 'An earlier kind of event takes nothing back');
select is(
  pg_temp.agent('a5', '{"event": "ended", "agent_call_id": "conv-other", "attempt_id": "00000000-0000-4000-f000-0000000005a1"}'), 'orphan',
  'A second conversation of one call is kept apart'
);
select is(pg_temp.agent('a6', '{"event": "started", "started_at": "no time"}'), 'failed', 'What cannot be applied has failed');
update private.webhook_events set next_try_at = now(), tries = 7 where dedupe_key = 'a6';
select private.sweep_events('{"v": 1}', private.clock_now());
select is((select concat_ws(' ', status, attempt_id = pg_temp.id('f000', 1)) from private.webhook_events where dedupe_key = 'a6'), 'dead t', 'and waits at last for a person');

-- The carrier's name of a call may come after the agent's word.
alter table public.call_logs disable trigger check_attempt;
update public.call_logs set agent_call_id = null, call_sid = null where id = pg_temp.id('f000', 1);
alter table public.call_logs enable trigger check_attempt;
select is(
  pg_temp.agent('a7', '{"event": "analyzed", "agent_call_id": "conv-5b", "provider_call_id": "sid-5b", "summary": "Late"}'), 'orphan',
  'A call that the carrier has not named is not known'
);
update public.call_logs set call_sid = 'sid-5b' where id = pg_temp.id('f000', 1);
select private.sweep_events('{"v": 1}', private.clock_now());
select is((pg_temp.log()).summary || ' ' || (pg_temp.log()).agent_call_id, 'Late conv-5b', 'and is found once it has');
update public.call_logs set agent_call_id = 'conv-5a' where id = pg_temp.id('f000', 1);

-- A callback at a time.
create function pg_temp.tool(name text, id text, moment timestamptz default null) returns jsonb
language sql as $$
  select jsonb_build_object('event', 'tool', 'tools', jsonb_build_array(jsonb_strip_nulls(jsonb_build_object(
    'id', id, 'name', name, 'called', name, 'arguments', '{"reason": "so they said"}'::jsonb, 'when', moment))))
$$;
select pg_temp.agent('b1', pg_temp.tool('callback', 'past', now() - interval '1 day'));
select is((select callback_time from public.leads where id = pg_temp.id('e000', 101)), null, 'Nobody is called back yesterday');
select pg_temp.agent('b2', pg_temp.tool('callback', 'soon', now() + interval '2 days'));
select is(
  (select concat_ws(' ', callback_time - private.clock_now(), queue.status, queue.metadata ? 'callback_at')
    from public.leads as lead join public.call_queue as queue on queue.lead_id = lead.id where lead.id = pg_temp.id('e000', 101)),
  '2 days processing t', 'A callback waits for the end of the call'
);

-- Not to be called again.
select is(pg_temp.agent('c1', pg_temp.tool('opt_out', 'no')), 'applied', 'They do not want to be called');
select results_eq(
  $$select queue.campaign_id, queue.status::text, coalesce(queue.last_error, ''), member.status::text
    from public.call_queue as queue
    join public.campaign_leads as member on member.campaign_id = queue.campaign_id and member.lead_id = queue.lead_id
    join public.leads as lead on lead.id = queue.lead_id
    where lead.phone = '+919811100001' order by 1$$,
  $$values
    (pg_temp.id('d000', 1), 'processing', '', 'calling'),
    (pg_temp.id('d000', 2), 'failed', 'opted_out', 'opted_out'),
    (pg_temp.id('d000', 3), 'queued', '', 'queued')$$,
  'What waits in any campaign of the organization is cancelled, the call under way goes on, and another organization''s is its own'
);
select is(
  (select string_agg(open_leads || ' ' || status, ', ' order by id) from public.campaigns where id in (pg_temp.id('d000', 1), pg_temp.id('d000', 2))),
  '2 running, 0 completed', 'A campaign that waited for them alone is complete'
);
select is(
  (select concat_ws(' ', count(*) filter (where do_not_call and opted_out_at is not null and callback_time is null), max(opt_out_reason))
    from public.leads where organization_id = pg_temp.org(2) and phone = '+919811100001'),
  '2 so they said', 'All leads with the number say so, and are not called back'
);
select is(
  (select string_agg(source || ' ' || reason, ', ') from public.suppressions where phone_number = '+919811100001'), 'call so they said',
  'The number is suppressed'
);
select pg_temp.agent('c2', pg_temp.tool('callback', 'later', now() + interval '3 days'));
select is((select callback_time from public.leads where id = pg_temp.id('e000', 101)), null, 'Who does not want to be called is not called back');
select is(
  (select string_agg(type, ' ' order by type, created_at) from public.lead_activities where lead_id = pg_temp.id('e000', 101)),
  'call callback callback callback opt_out', 'The timeline has it all, each once'
);

select * from finish();
rollback;
