-- Release gates: switches, pace, turns by weight, classes of calls, and the numbers they are made from; each refusal with its reason.

set local lock_timeout = '5s';
set local statement_timeout = '60s';

-- Switches, pace and turns ---------------------------------------------------------------------------------------------------------
-- Four switches stop dialling at once: the platform's, a carrier account's, an organization's and a campaign's. None is a user's.

create table private.platform_dialling (
  single           boolean primary key default true check (single),
  dialling_enabled boolean not null default true,
  reason           text,
  retry_jitter     numeric not null default 0.2 check (retry_jitter between 0 and 0.5)
);
select private.close_table('private.platform_dialling');
comment on table private.platform_dialling is 'What holds for every dial of the platform: one row, which the operator changes.';
comment on column private.platform_dialling.dialling_enabled is 'Off: no call is begun for anybody; those under way go on to their end.';
comment on column private.platform_dialling.reason is 'Why it is off, for whoever finds it so.';
comment on column private.platform_dialling.retry_jitter is
  'By which part a retry may come sooner or later than its rule says, so that what failed together does not return together.';
insert into private.platform_dialling (single)
values
  (true);

alter table public.campaigns add column dialling_enabled boolean not null default true;
comment on column public.campaigns.dialling_enabled is 'The operator''s switch: off, nothing of this campaign is begun, whatever its users do.';

alter table public.organizations add column dispatch_weight smallint not null default 1;
-- The table is new or small: it is read in no time.
-- squawk-ignore constraint-missing-not-valid
alter table public.organizations add constraint organizations_dispatch_weight_range check (dispatch_weight between 1 and 100);
comment on column public.organizations.dispatch_weight is 'Calls it is given for each one of an organization of weight 1, while both have some due.';

alter table public.carrier_accounts add column max_calls_per_second numeric(7, 3);
-- The table is new or small: it is read in no time.
-- squawk-ignore constraint-missing-not-valid
alter table public.carrier_accounts add constraint carrier_accounts_pace_positive check (max_calls_per_second > 0);
comment on column public.carrier_accounts.max_calls_per_second is
  'Dials a second, to be set below what the carrier admits, since it queues what is above without a word; null is without limit.';

alter table public.caller_numbers add column daily_calls integer;
-- The table is new or small: it is read in no time.
-- squawk-ignore constraint-missing-not-valid
alter table public.caller_numbers add constraint caller_numbers_daily_calls_positive check (daily_calls > 0);
comment on column public.caller_numbers.daily_calls is 'Calls from it in 24 hours before it rests; null is without limit.';

alter table public.call_queue add column dial_class smallint not null default 0;
-- The table is new or small: it is read in no time.
-- squawk-ignore constraint-missing-not-valid
alter table public.call_queue add constraint call_queue_dial_class_range check (dial_class between 0 and 2);
comment on column public.call_queue.dial_class is
  '2: somebody asked to be called at a time; 1: a retry; 0: never called. Promised ones go first, retries get no more than every other place while there are fresh ones.';
-- Another index takes its place in this transaction.
-- squawk-ignore require-concurrent-index-deletion
drop index public.idx_call_queue_poll;
-- Before the first release no installation is in use: the table is small.
-- squawk-ignore require-concurrent-index-creation
create index idx_call_queue_poll on public.call_queue (campaign_id, dial_class, priority desc, next_retry_at) where status = 'queued';
-- Before the first release no installation is in use: the table is small.
-- squawk-ignore require-concurrent-index-creation
create index idx_call_logs_caller_number on public.call_logs (caller_number, created_at desc) where direction = 'outbound';

create table private.carrier_pace (
  carrier_account_id uuid primary key references public.carrier_accounts (id) on delete cascade,
  tokens             numeric(12, 6) not null,
  refilled_at        timestamptz not null,
  turn               numeric(20, 6) not null default 0
);
select private.close_table('private.carrier_pace');
comment on table private.carrier_pace is 'How much of a carrier account''s pace is left, and whose turn it is. Written under the lock of releases alone.';
comment on column private.carrier_pace.tokens is 'Calls that might have been begun at refilled_at, a second''s worth at most.';
comment on column private.carrier_pace.refilled_at is 'Real time.';
comment on column private.carrier_pace.turn is 'The turn of the call that was last given out: who comes back from having nothing due begins here, and saves up nothing.';

create table private.dispatch_turns (
  organization_id    uuid not null references public.organizations (id) on delete cascade,
  carrier_account_id uuid not null references public.carrier_accounts (id) on delete cascade,
  turn               numeric(20, 6) not null,
  primary key (organization_id, carrier_account_id)
);
create index idx_dispatch_turns_carrier_account on private.dispatch_turns (carrier_account_id);
select private.close_table('private.dispatch_turns');
comment on table private.dispatch_turns is
  'The turn at which an organization gets its next call on an account; each call moves it on by one over its weight, and the lowest goes first.';

-- Retries of a campaign's own, and what stops a failing line ------------------------------------------------------------------------

alter table public.campaigns add column retry_rules jsonb not null default '{}';
-- The table is new or small: it is read in no time.
-- squawk-ignore constraint-missing-not-valid
alter table public.campaigns add constraint campaigns_retry_rules_object check (jsonb_typeof(retry_rules) = 'object');
comment on column public.campaigns.retry_rules is
  'Its own waits in minutes by outcome, as {"busy":[30,90]}; of an outcome that is not named the platform''s hold. No more and no sooner '
  'than these allow: window, gap and caps come on top.';
grant insert (retry_rules), update (retry_rules) on public.campaigns to authenticated;

alter table private.retry_rules add column other_part boolean not null default false;
comment on column private.retry_rules.other_part is 'At another time of the day than the attempt that failed: morning, afternoon or evening.';
update private.retry_rules set other_part = true where outcome = 'no_answer' and nth > 1 or outcome = 'machine';

create function private.check_retry_rules() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  rule record;
begin
  for rule in select wanted.key, wanted.value from jsonb_each(new.retry_rules) as wanted loop
    if not exists (select from private.retry_rules as known where known.outcome::text = rule.key) then
      perform private.raise_error(422, 'invalid_setting', format('Nobody is called again after %L', rule.key), 'retry_rules');
    end if;
    if jsonb_typeof(rule.value) <> 'array'
      or jsonb_array_length(rule.value) > (select count(*) from private.retry_rules as known where known.outcome::text = rule.key)
      or exists (
        select
        from jsonb_array_elements(rule.value) as wait
        where case when jsonb_typeof(wait.value) = 'number' then wait.value::numeric not between 5 and 20160 or wait.value::numeric % 1 <> 0 else true end
      )
    then
      perform private.raise_error(
        422, 'invalid_setting', format('%s takes as many whole minutes from 5 to 20160 as there are retries, or fewer', rule.key), 'retry_rules'
      );
    end if;
  end loop;
  return new;
end
$$;
comment on function private.check_retry_rules() is 'Trigger: a campaign''s own retries are of outcomes that have any, and no more than those.';
revoke execute on function private.check_retry_rules() from public;
create trigger check_retry_rules before insert or update of retry_rules on public.campaigns
  for each row when (new.retry_rules <> '{}') execute function private.check_retry_rules();

create table private.breakers (
  scope    uuid primary key,
  is_open  boolean not null,
  since    timestamptz not null,
  retry_at timestamptz
);
select private.close_table('private.breakers');
comment on table private.breakers is
  'Carrier accounts and campaigns whose calls failed by a fault of carrier or ours, half of ten or more in two minutes. Written under the lock of releases alone.';
comment on column private.breakers.scope is 'The id of the account or campaign.';
comment on column private.breakers.since is 'Business time at which it opened or closed; what ended before is not counted again.';
comment on column private.breakers.retry_at is 'Business time from which one call at a time tries whether it is over.';

alter table private.carrier_pace
  add column ceiling integer check (ceiling > 0),
  add column ceiling_at timestamptz;
comment on column private.carrier_pace.ceiling is 'Calls in flight for now, since the carrier had no room for more: halved each time, and one more for each minute without; null is none.';
comment on column private.carrier_pace.ceiling_at is 'Business time at which the ceiling last changed.';

-- Before the first release no installation is in use: the table is small.
-- squawk-ignore require-concurrent-index-creation
create index idx_call_logs_ended on public.call_logs (ended_at desc) where status = 'ended' and direction = 'outbound';
-- Before the first release no installation is in use: the table is small.
-- squawk-ignore require-concurrent-index-creation
create index idx_call_logs_faults on public.call_logs (ended_at desc)
  where direction = 'outbound' and call_status in ('carrier_transient', 'our_fault', 'lost', 'capacity');

-- Where a number is, and whether it may be called at all -----------------------------------------------------------------------------

create table private.destinations (
  prefix  text primary key check (prefix ~ '^\+[1-9][0-9]{0,6}$'),
  country text check (country ~ '^[A-Z]{2}$'),
  region  text check (region ~ '^[A-Z0-9]{1,3}$'),
  zones   text[] check (cardinality(zones) > 0),
  kind    text not null default 'ordinary' check (kind in ('ordinary', 'premium', 'shared_cost', 'satellite')),
  digits  smallint check (digits between 7 and 15)
);
select private.close_table('private.destinations');
comment on table private.destinations is
  'What the longest prefix of a number says of it. A number of no prefix, of no country, of other digits than its prefix has, or of another kind '
  'than ordinary is never called. Reference data, to be checked before launch and kept up to date: of an area code that is not listed it is not '
  'known which law holds, and nobody is called there.';
comment on column private.destinations.region is
  'The state, whose law holds besides the country''s (calling_hours). Of a person who moved and kept the number it is not true: their zone decides besides.';
comment on column private.destinations.zones is
  'Every zone of the state or country: of somebody whose own zone is not known it must be a legal hour in all of them. Null is not known either.';
comment on column private.destinations.digits is 'How many a whole number has; what is shorter is a short code.';
insert into private.destinations (prefix, country, zones, kind, digits)
values
  -- What begins with +1 and an area code that is not listed, free of charge for the callee or new, is of no state.
  ('+1', null, null, 'ordinary', 11), ('+1900', 'US', null, 'premium', 11), ('+91', 'IN', '{Asia/Kolkata}', 'ordinary', 12),
  ('+911860', 'IN', null, 'shared_cost', 11), ('+911900', 'IN', null, 'premium', null), ('+808', null, null, 'shared_cost', null),
  ('+870', null, null, 'satellite', null), ('+878', null, null, 'premium', null), ('+881', null, null, 'satellite', null),
  ('+882', null, null, 'satellite', null), ('+883', null, null, 'satellite', null), ('+979', null, null, 'premium', null);
insert into private.destinations (prefix, country, region, zones, digits)
select '+1' || area.code, area.country, area.region, area.zones, 11
from (
  select
    split_part(listed.place, '-', 1) as country, nullif(split_part(listed.place, '-', 2), '') as region,
    string_to_array(listed.zones, ' ') as zones, unnest(string_to_array(listed.codes, ' ')) as code
  from (
    values
      ('US-AK', 'America/Anchorage America/Adak', '907'),
      ('US-AL', 'America/Chicago', '205 251 256 334 659 938'),
      ('US-AR', 'America/Chicago', '327 479 501 870'),
      ('US-AZ', 'America/Phoenix America/Denver', '480 520 602 623 928'),
      (
        'US-CA', 'America/Los_Angeles',
        '209 213 279 323 341 350 369 408 415 424 442 510 530 559 562 619 626 628 650 657 661 669 707 714 738 747 760 805 818 820 831 '
        '840 858 909 916 925 949 951'
      ),
      ('US-CO', 'America/Denver', '303 719 720 748 970 983'),
      ('US-CT', 'America/New_York', '203 475 860 959'),
      ('US-DC', 'America/New_York', '202 771'),
      ('US-DE', 'America/New_York', '302'),
      ('US-FL', 'America/New_York America/Chicago', '239 305 321 324 352 386 407 448 561 645 656 689 727 728 754 772 786 813 850 863 904 941 954'),
      ('US-GA', 'America/New_York', '229 404 470 478 678 706 762 770 912 943'),
      ('US-HI', 'Pacific/Honolulu', '808'),
      ('US-IA', 'America/Chicago', '319 515 563 641 712'),
      ('US-ID', 'America/Boise America/Los_Angeles', '208 986'),
      ('US-IL', 'America/Chicago', '217 224 309 312 331 447 464 618 630 708 730 773 779 815 847 872'),
      ('US-IN', 'America/Indiana/Indianapolis America/Chicago', '219 260 317 463 574 765 812 930'),
      ('US-KS', 'America/Chicago America/Denver', '316 620 785 913'),
      ('US-KY', 'America/New_York America/Chicago', '270 364 502 606 859'),
      ('US-LA', 'America/Chicago', '225 318 337 457 504 985'),
      ('US-MA', 'America/New_York', '339 351 413 508 617 774 781 857 978'),
      ('US-MD', 'America/New_York', '227 240 301 410 443 667'),
      ('US-ME', 'America/New_York', '207'),
      ('US-MI', 'America/Detroit America/Chicago', '231 248 269 313 517 586 616 679 734 810 906 947 989'),
      ('US-MN', 'America/Chicago', '218 320 507 612 651 763 924 952'),
      ('US-MO', 'America/Chicago', '235 314 417 557 573 636 660 816 975'),
      ('US-MS', 'America/Chicago', '228 471 601 662 769'),
      ('US-MT', 'America/Denver', '406'),
      ('US-NC', 'America/New_York', '252 336 472 704 743 828 910 919 980 984'),
      ('US-ND', 'America/Chicago America/Denver', '701'),
      ('US-NE', 'America/Chicago America/Denver', '308 402 531'),
      ('US-NH', 'America/New_York', '603'),
      ('US-NJ', 'America/New_York', '201 551 609 640 732 848 856 862 908 973'),
      ('US-NM', 'America/Denver', '505 575'),
      ('US-NV', 'America/Los_Angeles America/Denver', '702 725 775'),
      ('US-NY', 'America/New_York', '212 315 329 332 347 363 516 518 585 607 631 646 680 716 718 838 845 914 917 929 934'),
      ('US-OH', 'America/New_York', '216 220 234 283 326 330 380 419 440 513 567 614 740 937'),
      ('US-OK', 'America/Chicago', '405 539 572 580 918'),
      ('US-OR', 'America/Los_Angeles America/Boise', '458 503 541 971'),
      ('US-PA', 'America/New_York', '215 223 267 272 412 445 484 570 582 610 717 724 814 835 878'),
      ('US-RI', 'America/New_York', '401'),
      ('US-SC', 'America/New_York', '803 821 839 843 854 864'),
      ('US-SD', 'America/Chicago America/Denver', '605'),
      ('US-TN', 'America/Chicago America/New_York', '423 615 629 731 865 901 931'),
      (
        'US-TX', 'America/Chicago America/Denver',
        '210 214 254 281 325 346 361 409 430 432 469 512 682 713 726 737 806 817 830 832 903 915 936 940 945 956 972 979'
      ),
      ('US-UT', 'America/Denver', '385 435 801'),
      ('US-VA', 'America/New_York', '276 434 540 571 686 703 757 804 826 948'),
      ('US-VT', 'America/New_York', '802'),
      ('US-WA', 'America/Los_Angeles', '206 253 360 425 509 564'),
      ('US-WI', 'America/Chicago', '262 274 353 414 534 608 715 920'),
      ('US-WV', 'America/New_York', '304 681'),
      ('US-WY', 'America/Denver', '307'),
      (
        'CA', null,
        '204 226 236 249 250 257 263 273 289 306 343 354 365 367 368 382 403 416 418 428 431 437 438 450 460 468 474 506 514 519 548 579 581 584 '
        '587 604 613 639 647 672 683 705 709 742 753 778 780 782 807 819 825 867 873 879 902 905 942'
      ),
      ('AG', null, '268'), ('AI', null, '264'), ('AS', null, '684'), ('BB', null, '246'), ('BM', null, '441'), ('BS', null, '242'),
      ('DM', null, '767'), ('DO', null, '809 829 849'), ('GD', null, '473'), ('GU', null, '671'), ('JM', null, '658 876'), ('KN', null, '869'),
      ('KY', null, '345'), ('LC', null, '758'), ('MP', null, '670'), ('MS', null, '664'), ('PR', null, '787 939'), ('SX', null, '721'),
      ('TC', null, '649'), ('TT', null, '868'), ('VC', null, '784'), ('VG', null, '284'), ('VI', null, '340')
  ) as listed (place, zones, codes)
) as area;

alter table public.organizations add column dial_countries text[];
comment on column public.organizations.dial_countries is
  'Countries it may call, as ISO 3166 codes, set by the operator; null is every country whose calling hours are known.';
alter table public.campaigns add column purpose text not null default 'service';
-- The table is new or small: it is read in no time.
-- squawk-ignore constraint-missing-not-valid
alter table public.campaigns add constraint campaigns_purpose_known check (purpose in ('service', 'promotional'));
comment on column public.campaigns.purpose is 'Which of the legal hours hold (calling_hours): service or promotional.';
grant insert (purpose), update (purpose) on public.campaigns to authenticated;

create function private.destination(
  phone text, allowed text[], out country text, out region text, out zones text[], out is_callable boolean
)
language plpgsql stable security definer set search_path = '' as $$
begin
  select
    known.country, known.region, known.zones,
    known.kind = 'ordinary' and (known.digits is null or length(phone) = known.digits + 1)
      and (allowed is null or known.country = any (allowed))
      and exists (select from public.calling_hours as law where law.jurisdiction = known.country)
  into country, region, zones, is_callable
  from private.destinations as known
  where known.prefix = any (array(select left(phone, size) from generate_series(2, 8) as size))
  order by length(known.prefix) desc
  limit 1;
  is_callable := coalesce(is_callable, false);
end
$$;
comment on function private.destination(text, text[]) is
  'Which country, state and zones a number is of, and whether it may be called: never premium, satellite or short, nor where the hours are not known.';
revoke execute on function private.destination(text, text[]) from public;

-- Why a call was allowed -------------------------------------------------------------------------------------------------------------

create table private.dial_evidence (
  attempt_id       uuid primary key,
  organization_id  uuid not null,
  consent_id       uuid,
  register_key     text,
  register_version integer,
  country          text,
  region           text,
  purpose          text not null,
  zones            text[] not null,
  zone_source      text not null check (zone_source in ('lead', 'number', 'campaign')),
  dials_before     timestamptz[],
  foreign key (organization_id, attempt_id) references public.call_logs (organization_id, id) on delete cascade
);
create index idx_dial_evidence_attempt on private.dial_evidence (organization_id, attempt_id);
select private.close_table('private.dial_evidence');
comment on table private.dial_evidence is 'What the release saw when it allowed an attempt, written in its transaction and never changed.';
comment on column private.dial_evidence.consent_id is 'The consent for the campaign''s purpose that held, where there was one.';
comment on column private.dial_evidence.register_version is 'The version of the register of numbers not to be called that was looked at, where one is enforced.';
comment on column private.dial_evidence.zone_source is 'Whose time zones they are: the lead''s own, else those of the number''s state or country, else the campaign''s.';
comment on column private.dial_evidence.dials_before is 'When the number was last called, by whomever: gap and caps were judged by these.';

comment on column public.call_queue.wait_reason is
  'Why it waits: outside_window, bad_timezone, campaign_over, min_gap, daily_cap, number_in_call, caller_number_cap, register_stale, quota_exhausted, credit_exhausted, callback, retry_<outcome>.';

alter type private.candidate add attribute dial_class smallint;

-- It is called by release_calls() alone, which is replaced along with it.
-- squawk-ignore ban-drop-function
drop function private.choose_candidates(private.candidate[], integer);

-- Whoever calls it is replaced along with it, or names the argument that has a default now by leaving it out.
-- squawk-ignore ban-drop-function
drop function private.next_dial_at(public.call_logs, public.campaigns, timestamptz);

create or replace function private.legal_window(
  at timestamptz, zone text, campaign public.campaigns, country text, region text, out opens_at timestamptz, out closes_at timestamptz
)
language plpgsql stable security definer set search_path = '' as $$
declare
  stretch record;
  law     record;
  day     date;
  moment  timestamptz := at;
begin
  -- Holidays may follow on a weekend: ten days are looked through.
  for try in 1..20 loop
    stretch := private.calling_window(moment, zone, campaign.time_start, campaign.time_end, campaign.start_date, campaign.end_date);
    exit when stretch.opens_at is null or stretch.opens_at > at + interval '10 days' and try > 2;
    day := (stretch.opens_at at time zone zone)::date;
    law := private.legal_hours(country, region, campaign.purpose, day);
    if law.opens is not null then
      opens_at := greatest(stretch.opens_at, (day + law.opens)::timestamp at time zone zone);
      closes_at := least(stretch.closes_at, (day + law.closes)::timestamp at time zone zone);
      if opens_at < closes_at and closes_at > at then
        return;
      end if;
    end if;
    moment := stretch.closes_at;
  end loop;
  opens_at := null;
  closes_at := null;
end
$$;
comment on function private.legal_window(timestamptz, text, public.campaigns, text, text) is
  'The calling window of a campaign in a zone, as far as the law of the country and state leaves it open on that day; null when nothing is left.';

create function private.callee_zones(lead_zone text, number_zones text[], campaign_zone text) returns text[]
language sql stable security definer set search_path = '' as $$
  select case when count(known.name) = count(*) then array_agg(known.name order by known.name) end
  from unnest(case when lead_zone <> '' then array[lead_zone] else coalesce(number_zones, array[campaign_zone]) end) as wanted (name)
  left join private.timezones as known on known.name = wanted.name
$$;
comment on function private.callee_zones(text, text[], text) is
  'The zones that a callee may be in: the lead''s own, else those of the number, else the campaign''s; null when one of them is no zone.';

create function private.callee_window(
  at timestamptz, zones text[], campaign public.campaigns, country text, region text, out opens_at timestamptz, out closes_at timestamptz
)
language plpgsql stable security definer set search_path = '' as $$
declare
  moment timestamptz := at;
begin
  -- When the last of them opens, another may have closed meanwhile: then it is the next time.
  for try in 1..10 loop
    select case when bool_and(stretch.opens_at is not null) then max(stretch.opens_at) end, min(stretch.closes_at)
    into opens_at, closes_at
    from unnest(zones) as place (zone)
    cross join lateral private.legal_window(moment, place.zone, campaign, country, region) as stretch;
    exit when opens_at is null or opens_at <= moment;
    moment := opens_at;
  end loop;
end
$$;
comment on function private.callee_window(timestamptz, text[], public.campaigns, text, text) is
  'The stretch in which somebody who is in any of some zones may be called in all of them; null when there is none.';

create or replace function private.day_part(moment timestamptz, zone text) returns integer
language sql stable set search_path = '' as $$
  select width_bucket(extract(hour from moment at time zone zone), array[12, 17]::numeric[])
$$;
comment on function private.day_part(timestamptz, text) is 'Morning, afternoon or evening: 0, 1 or 2.';

create or replace function private.retry_wait(campaign public.campaigns, outcome public.call_outcome, nth bigint) returns interval
language plpgsql volatile security definer set search_path = '' as $$
declare
  jitter constant numeric := coalesce((select platform.retry_jitter from private.platform_dialling as platform), 0);
  wait   interval;
begin
  if campaign.retry_rules ? outcome::text then
    wait := make_interval(mins => (campaign.retry_rules -> outcome::text ->> (nth - 1)::integer)::integer);
  else
    wait := (select rule.delay from private.retry_rules as rule where rule.outcome = retry_wait.outcome and rule.nth = retry_wait.nth);
  end if;
  return wait * (1 + jitter * (2 * random() - 1));
end
$$;
comment on function private.retry_wait(public.campaigns, public.call_outcome, bigint) is
  'How long to wait after the nth attempt that ended so: by the campaign''s rules, else the platform''s, and a little sooner or later; null is not again.';

create or replace function private.next_dial_at(
  attempt public.call_logs, campaign public.campaigns, earliest timestamptz, other_part boolean default false
) returns timestamptz
language plpgsql stable security definer set search_path = '' as $$
declare
  dials timestamptz[] := private.recent_dials(attempt.callee_number, attempt.ended_at);
  free  timestamptz := greatest(earliest, dials[1] + interval '60 minutes', dials[2] + interval '24 hours');
  zones text[];
  callee record;
begin
  select found.* into callee from private.destination(attempt.callee_number, null) as found;
  select private.callee_zones(lead.timezone, callee.zones, campaign.timezone) into zones
  from public.leads as lead
  where lead.organization_id = attempt.organization_id and lead.id = attempt.lead_id;
  if zones is not null then
    -- Who was not there in the morning may be in the afternoon.
    if other_part and private.day_part(free, zones[1]) = private.day_part(coalesce(attempt.submitted_at, attempt.ended_at), zones[1]) then
      free := (
        (free at time zone zones[1])::date + (array['12:00', '17:00', '33:00']::interval[])[private.day_part(free, zones[1]) + 1]
      )::timestamp at time zone zones[1];
    end if;
    free := greatest(free, (private.callee_window(free, zones, campaign, callee.country, callee.region)).opens_at);
  end if;
  return private.whole_minute(free);
end
$$;
comment on function private.next_dial_at(public.call_logs, public.campaigns, timestamptz, boolean) is
  'When a lead may be called again, not before a given time: gap, caps and window as they look now. The release judges anew.';

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

create or replace function private.check_breakers(at timestamptz) returns void
language plpgsql volatile security definer set search_path = '' set enable_seqscan = off as $$
begin
  if exists (
      select
      from public.call_logs as log
      where log.direction = 'outbound' and log.call_status in ('carrier_transient', 'our_fault', 'lost', 'capacity')
        and log.ended_at > at - interval '2 minutes'
    )
    or exists (select from public.call_logs as log where log.status <> 'ended' and log.status = 'submission_unknown')
    or exists (select from private.breakers as breaker where breaker.is_open)
  then
    with judged as materialized (
      select scope.id, recent.ended_at, recent.is_fault
      from (
        (
          select
            log.carrier_account_id, log.campaign_id, log.ended_at,
            case
              when log.call_status in ('carrier_transient', 'our_fault', 'lost') then true
              when log.call_status in ('answered', 'machine', 'rejected') then false
            end as is_fault
          from public.call_logs as log
          where log.status = 'ended' and log.direction = 'outbound' and log.ended_at > at - interval '2 minutes'
          order by log.ended_at desc
          limit 4000
        )
        union all
        select log.carrier_account_id, log.campaign_id, at, true
        from public.call_logs as log
        where log.status <> 'ended' and log.status = 'submission_unknown' and log.submitted_at > at - interval '2 minutes'
      ) as recent
      cross join lateral (values (recent.carrier_account_id), (recent.campaign_id)) as scope (id)
      -- Busy, no answer and the like say nothing of the line.
      where recent.is_fault is not null and scope.id is not null
    ),
    told as (
      select
        judged.id, breaker.is_open, breaker.retry_at,
        count(*) filter (where judged.ended_at > coalesce(breaker.since, '-infinity')) as calls,
        count(*) filter (where judged.is_fault and judged.ended_at > coalesce(breaker.since, '-infinity')) as faults,
        bool_or(judged.is_fault) filter (where judged.ended_at >= breaker.retry_at) as probe_failed
      from judged
      left join private.breakers as breaker on breaker.scope = judged.id
      group by judged.id, breaker.is_open, breaker.retry_at
    )
    insert into private.breakers as breaker (scope, is_open, since, retry_at)
    select
      told.id, coalesce(told.probe_failed, true), at,
      -- Not all at the same time again.
      case when coalesce(told.probe_failed, true) then at + interval '1 minute' * (1 + 0.2 * random()) end
    from told
    where case when told.is_open then told.probe_failed is not null else told.calls >= 10 and told.faults * 2 >= told.calls end
    on conflict (scope) do update set is_open = excluded.is_open, since = excluded.since, retry_at = excluded.retry_at;

    insert into private.carrier_pace as pace (carrier_account_id, tokens, refilled_at, ceiling, ceiling_at)
    select
      account.id, coalesce(private.account_tokens(account), 0), clock_timestamp(),
      -- Half of what was tried to have in flight.
      greatest(least(account.max_concurrent_calls, known.ceiling, refused.calls + (
        select count(*) from public.call_logs as log where log.carrier_account_id = account.id and log.status <> 'ended'
      )) / 2, 1),
      at
    from public.carrier_accounts as account
    left join private.carrier_pace as known on known.carrier_account_id = account.id
    join (
      select log.carrier_account_id, count(*) as calls
      from public.call_logs as log
      where log.direction = 'outbound' and log.call_status in ('carrier_transient', 'our_fault', 'lost', 'capacity')
        and log.call_status = 'capacity' and log.ended_at > at - interval '1 minute'
      group by log.carrier_account_id
    ) as refused on refused.carrier_account_id = account.id
    where known.ceiling_at is null or known.ceiling_at <= at - interval '1 minute'
    on conflict (carrier_account_id) do update set ceiling = excluded.ceiling, ceiling_at = excluded.ceiling_at;
  end if;

  update private.carrier_pace as pace
  set
    ceiling = nullif(
      least(pace.ceiling + floor(extract(epoch from at - pace.ceiling_at) / 60)::integer, account.max_concurrent_calls), account.max_concurrent_calls
    ),
    ceiling_at = at
  from public.carrier_accounts as account
  where account.id = pace.carrier_account_id and pace.ceiling is not null and pace.ceiling_at <= at - interval '1 minute';
end
$$;
comment on function private.check_breakers(timestamptz) is
  'Opens and closes the breakers of carrier accounts and campaigns by how calls ended in the last two minutes, and lowers or raises the '
  'calls in flight of accounts whose carrier was full. Under the lock of releases.';

create or replace function private.is_broken(scope uuid, at timestamptz) returns boolean
language plpgsql stable security definer set search_path = '' as $$
begin
  return exists (
    select
    from private.breakers as breaker
    where breaker.scope = is_broken.scope and breaker.is_open
      and (
        breaker.retry_at > is_broken.at
        or exists (
          select
          from public.call_logs as probe
          where probe.status <> 'ended' and probe.direction = 'outbound' and probe.created_at >= breaker.retry_at
            and breaker.scope in (probe.carrier_account_id, probe.campaign_id)
        )
      )
  );
end
$$;
comment on function private.is_broken(uuid, timestamptz) is
  'Whether nothing may be begun on an account or of a campaign since too much failed; once the wait is over, one call at a time may.';

create or replace function private.caller_number_room(number text, daily_calls integer, at timestamptz) returns integer
language plpgsql stable security definer set search_path = '' as $$
begin
  return daily_calls - (
    select count(*)
    from (
      select
      from public.call_logs as log
      where log.caller_number = number
        and log.direction = 'outbound'
        and log.created_at > at - interval '24 hours'
        and (log.dialled or log.status = 'created')
      limit daily_calls
    ) as made
  )::integer;
end
$$;
comment on function private.caller_number_room(text, integer, timestamptz) is
  'How many calls more may be made from a number of ours now: its daily ones less those of the last 24 hours.';

-- It is called by release_calls() alone, which is replaced along with it.
-- squawk-ignore ban-drop-function
drop function private.judge_candidates(timestamptz, integer, uuid[]);

create or replace function private.judge_candidates(at timestamptz, budget integer, passed uuid[], sole uuid default null) returns private.candidate[]
language plpgsql volatile security definer set search_path = '' set jit = off set plan_cache_mode = force_generic_plan set enable_seqscan = off as $$
declare
  judged private.candidate[];
begin
  with calls as materialized (
    select log.organization_id, log.campaign_id, count(*) as number
    from public.call_logs as log
    where log.status <> 'ended'
    group by log.organization_id, log.campaign_id
  ),
  waiting as materialized (
    -- A campaign that may not dial now, or is full, is left alone: its rows cost nothing and hold up nobody.
    select
      campaign.id, organization.caller_id, organization.dial_countries,
      organization.dispatch_weight::numeric / count(*) over (partition by campaign.organization_id) as weight,
      row_number() over (partition by campaign.organization_id order by random()) as place,
      coalesce((
        select min(own.turn - pace.turn)
        from private.dispatch_turns as own
        join private.carrier_pace as pace on pace.carrier_account_id = own.carrier_account_id
        where own.organization_id = campaign.organization_id
      ), '-infinity'::numeric) as turn
    from public.campaigns as campaign
    join public.organizations as organization on organization.id = campaign.organization_id
    where campaign.status = 'running'
      and (sole is null or campaign.id = sole)
      and campaign.dialling_enabled
      and not private.is_broken(campaign.id, at)
      and private.dispatch_obstacle(campaign.organization_id, at) is null
      and campaign.max_concurrent_calls
        > coalesce((select sum(calls.number) from calls where calls.campaign_id = campaign.id), 0)
      and organization.max_concurrent_calls
        > coalesce((select sum(calls.number) from calls where calls.organization_id = organization.id), 0)
      and exists (
        select
        from public.call_queue as queue
        where queue.campaign_id = campaign.id and queue.status = 'queued' and queue.next_retry_at <= at
      )
    order by place, turn, random()
    limit budget
  ),
  ready as materialized (
    -- Of the budget as large a part as of the calls: no organization is short of rows when the calls are given out.
    select
      campaign.*, waiting.caller_id, waiting.dial_countries,
      greatest(ceil(budget * waiting.weight / sum(waiting.weight) over ()), 5)::integer as most
    from waiting
    join public.campaigns as campaign on campaign.id = waiting.id
  ),
  picked as materialized (
    select queue.id
    from ready
    cross join lateral (
      -- Promised calls, then retries in half of the places, then those who were never called.
      select due.id
      from (values (2, ready.most), (1, (ready.most + 1) / 2), (0, ready.most)) as kind (dial_class, most)
      cross join lateral (
        -- Priority by priority, each by an index from its oldest due row on: however many others wait.
        with recursive level (priority) as (
          select max(top.priority)::integer
          from public.call_queue as top
          where top.campaign_id = ready.id and top.status = 'queued' and top.dial_class = kind.dial_class
          union all
          select (
            select max(lower.priority)
            from public.call_queue as lower
            where lower.campaign_id = ready.id and lower.status = 'queued' and lower.dial_class = kind.dial_class
              and lower.priority < level.priority
          )::integer
          from level
          where level.priority is not null
        )
        select oldest.id
        from level
        cross join lateral (
          select queued.id
          from public.call_queue as queued
          where queued.campaign_id = ready.id
            and queued.status = 'queued'
            and queued.dial_class = kind.dial_class
            and queued.priority = level.priority
            and queued.next_retry_at <= at
            and queued.id <> all (passed)
          order by queued.next_retry_at
          limit kind.most
        ) as oldest
        limit kind.most
      ) as due
      limit ready.most
    ) as queue
  ),
  locked as materialized (
    select
      queue.id, queue.organization_id, queue.campaign_id, queue.lead_id, queue.dial_class, queue.priority, queue.next_retry_at,
      queue.dispatch_count,
      lead.project_id, lead.phone, lead.timezone, lead.recording_consent, lead.do_not_call, lead.abuse_flag, lead.archived_at
    from public.call_queue as queue
    join public.leads as lead on lead.organization_id = queue.organization_id and lead.id = queue.lead_id
    where queue.id = any (array(select picked.id from picked)) and queue.status = 'queued' and queue.next_retry_at <= at
    for no key update of queue skip locked
    for key share of lead skip locked
  ),
  numbers as materialized (
    -- What an organization may call from, without those that have rung often enough in 24 hours.
    select number.organization_id, number.phone_number, number.carrier_account_id
    from public.caller_numbers as number
    join public.carrier_accounts as account on account.id = number.carrier_account_id
    where number.organization_id in (select locked.organization_id from locked)
      and number.is_active and account.is_active and account.dialling_enabled and not private.is_broken(account.id, at)
      and (number.daily_calls is null or private.caller_number_room(number.phone_number, number.daily_calls, at) > 0)
  ),
  zoned as materialized (
    select
      locked.*, private.callee_zones(locked.timezone, callee.zones, ready.timezone) as zones, callee.country, callee.region, callee.is_callable
    from locked
    join ready on ready.id = locked.campaign_id
    cross join lateral private.destination(locked.phone, ready.dial_countries) as callee
  ),
  stretches as materialized (
    select place.campaign_id, place.zones, place.country, place.region, stretch.opens_at, stretch.closes_at
    from (
      select distinct zoned.campaign_id, zoned.zones, zoned.country, zoned.region from zoned where zoned.zones is not null and zoned.is_callable
    ) as place
    join public.campaigns as campaign on campaign.id = place.campaign_id
    cross join lateral private.callee_window(at, place.zones, campaign, place.country, place.region) as stretch
  ),
  seen as materialized (
    select
      zoned.*, stretches.opens_at, stretches.closes_at, private.recent_dials(zoned.phone, at) as dials,
      (private.check_dnc(zoned.phone, at)).verdict as register,
      exists (
        select
        from public.suppressions as suppression
        where suppression.organization_id = zoned.organization_id and suppression.phone_number = zoned.phone
      )
      or exists (
        select
        from private.erased_numbers as erased
        where erased.organization_id = zoned.organization_id and erased.phone_hash = private.hash_number(zoned.phone)
      ) as suppressed,
      exists (
        select
        from public.call_logs as live
        where live.callee_number = zoned.phone and live.direction = 'outbound' and live.status <> 'ended'
      ) as in_call
    from zoned
    left join stretches
      on stretches.campaign_id = zoned.campaign_id and stretches.zones = zoned.zones
      and stretches.country = zoned.country and stretches.region is not distinct from zoned.region
  ),
  gated as (
    select
      seen.*,
      case
        when seen.do_not_call or seen.suppressed then 'opted_out'
        when seen.abuse_flag then 'abuse'
        when seen.archived_at is not null then 'archived'
        when seen.phone is null then 'no_phone'
        when not seen.is_callable then 'destination_blocked'
        when seen.register is not null then seen.register
        when seen.zones is null then 'bad_timezone'
        when seen.opens_at is null then 'campaign_over'
        when seen.opens_at > at then 'outside_window'
        when seen.in_call then 'number_in_call'
        when seen.dials[2] + interval '24 hours' > at then 'daily_cap'
        when seen.dials[1] + interval '60 minutes' > at then 'min_gap'
      end as verdict
    from seen
  ),
  single as (
    select
      gated.*,
      case
        -- The same number twice in one batch: the second waits for the first.
        when gated.verdict is null and row_number() over (
          partition by gated.verdict, gated.phone order by gated.dial_class desc, gated.priority desc, gated.next_retry_at, gated.id
        ) > 1 then 'number_in_call'
        else gated.verdict
      end as final_verdict
    from gated
  )
  select array_agg(
    row(
      numbered.id, numbered.organization_id, numbered.campaign_id, numbered.lead_id, numbered.project_id, numbered.phone,
      numbered.caller_number, numbered.carrier_account_id, numbered.dispatch_count + 1, numbered.agent_id,
      numbered.record_call, numbered.ring_timeout_seconds, numbered.max_call_seconds,
      numbered.closes_at, numbered.final_verdict,
      case numbered.final_verdict
        when 'bad_timezone' then at + interval '1 day'
        when 'register_stale' then private.whole_minute(at + interval '1 hour')
        when 'campaign_over' then at + interval '1 day'
        when 'outside_window' then numbered.opens_at
        when 'number_in_call' then private.whole_minute(at + interval '15 minutes')
        when 'caller_number_cap' then private.whole_minute(at + interval '15 minutes')
        when 'daily_cap' then private.whole_minute(greatest(numbered.dials[2] + interval '24 hours', numbered.dials[1] + interval '60 minutes'))
        when 'min_gap' then private.whole_minute(numbered.dials[1] + interval '60 minutes')
      end,
      numbered.dial_class
    )::private.candidate
    order by numbered.dial_class desc, numbered.priority desc, numbered.next_retry_at, numbered.id
  )
  into judged
  from (
    select
      single.id, single.organization_id, single.campaign_id, single.lead_id, coalesce(single.project_id, ready.project_id) as project_id,
      single.phone, number.phone_number as caller_number, number.carrier_account_id, single.dispatch_count, ready.agent_id,
      ready.record_calls and single.recording_consent as record_call, ready.ring_timeout_seconds, ready.max_call_seconds,
      single.opens_at, single.closes_at, single.dials, single.dial_class, single.priority, single.next_retry_at,
      case when single.final_verdict is null and number.phone_number is null then 'caller_number_cap' else single.final_verdict end as final_verdict
    from single
    join ready on ready.id = single.campaign_id
    left join lateral (
      select log.caller_number
      from public.call_logs as log
      where log.callee_number = single.phone and log.organization_id = single.organization_id and log.dialled and log.direction = 'outbound'
      order by log.submitted_at desc
      limit 1
    ) as last on single.final_verdict is null
    left join lateral (
      -- The number that it last called them from, else the same one for the same callee every time; the organization's general one last.
      select number.phone_number, number.carrier_account_id
      from numbers as number
      where number.organization_id = single.organization_id
      order by
        (number.phone_number = last.caller_number) desc nulls last, (number.phone_number = ready.caller_id) nulls first,
        hashtextextended(number.phone_number || single.phone, 0)
      limit 1
    ) as number on single.final_verdict is null
  ) as numbered;
  return coalesce(judged, array[]::private.candidate[]);
end
$$;
comment on function private.judge_candidates(timestamptz, integer, uuid[], uuid) is
  'Locks due rows of campaigns that may dial, or of a sole one of them, about a budget of them and as many of each campaign, and judges each by every gate in order.';

create or replace function private.dispatch_obstacle(organization uuid, at timestamptz) returns text
language plpgsql stable security definer set search_path = '' as $$
begin
  return (
    select
      case
        -- A switch that is not there is off.
        when platform.dialling_enabled is not true then 'platform_disabled'
        when not tenant.dialling_enabled then 'dialling_disabled'
        when not exists (
          select
          from public.subscriptions as subscription
          where subscription.organization_id = tenant.id and subscription.status in ('trialing', 'active', 'past_due')
        ) then 'subscription_inactive'
        when not exists (
          select
          from public.caller_numbers as number
          join public.carrier_accounts as account on account.id = number.carrier_account_id
          where number.organization_id = tenant.id and number.is_active and account.is_active and account.dialling_enabled
        )
        then case
          when exists (
            select from public.caller_numbers as number where number.organization_id = tenant.id and number.is_active
          ) then 'account_disabled'
          else 'no_caller_number'
        end
        when not exists (
          select
          from public.caller_numbers as number
          join public.carrier_accounts as account on account.id = number.carrier_account_id
          where number.organization_id = tenant.id and number.is_active and account.is_active and account.dialling_enabled
            and not private.is_broken(account.id, at)
        ) then 'circuit_open'
        else (
          select hold.reason from private.dispatch_holds as hold where hold.organization_id = tenant.id and hold.held_until > at
        )
      end
    from public.organizations as tenant
    left join private.platform_dialling as platform on platform.single
    where tenant.id = organization
  );
end
$$;
comment on function private.dispatch_obstacle(uuid, timestamptz) is
  'Why nothing at all may be dialled for an organization now; null if something may.';

create or replace function private.account_tokens(account public.carrier_accounts) returns numeric
language plpgsql volatile security definer set search_path = '' as $$
declare
  pace constant numeric := account.max_calls_per_second;
begin
  if pace is null then
    return null;
  end if;
  return coalesce(
    (
      -- A second's worth at most, and never less than a call: a pause is not made up for by a burst.
      select least(greatest(pace, 1), known.tokens + pace * greatest(extract(epoch from clock_timestamp() - known.refilled_at), 0))
      from private.carrier_pace as known
      where known.carrier_account_id = account.id
    ),
    greatest(pace, 1)
  );
end
$$;
comment on function private.account_tokens(public.carrier_accounts) is
  'How many calls may be begun on an account at this moment of real time; null is any number. The release that asks holds the lock of releases.';

create or replace function private.choose_candidates(candidates private.candidate[], room integer, at timestamptz) returns private.candidate[]
language plpgsql volatile security definer set search_path = '' set jit = off set plan_cache_mode = force_generic_plan set enable_seqscan = off as $$
declare
  chosen private.candidate[];
begin
  with calls as materialized (
    select log.carrier_account_id, log.organization_id, log.campaign_id, count(*) as number
    from public.call_logs as log
    where log.status <> 'ended'
    group by log.carrier_account_id, log.organization_id, log.campaign_id
  ),
  ticket as materialized (
    select tenant.campaign_id, random() as number
    from (select distinct candidate.campaign_id from unnest(candidates) as candidate) as tenant
  ),
  of_number as (
    -- Two rows with one number, met in different looks: one at a time.
    select distinct on ((candidates[place]).callee_number) candidates[place] as candidate, place
    from generate_subscripts(candidates, 1) as place
    order by (candidates[place]).callee_number, place
  ),
  of_kind as (
    select
      (of_number.candidate).*, of_number.candidate,
      row_number() over (
        partition by (of_number.candidate).campaign_id, (of_number.candidate).dial_class order by of_number.place
      ) as kind_place,
      row_number() over (partition by (of_number.candidate).caller_number order by of_number.place) as number_place
    from of_number
  ),
  of_campaign as (
    -- Promised calls, then fresh ones and retries by turns; which of the two is first, is drawn.
    select
      of_kind.*, ticket.number as campaign_ticket,
      row_number() over (
        partition by of_kind.campaign_id
        order by (of_kind.dial_class = 2) desc, of_kind.kind_place, (of_kind.dial_class = 1) = (ticket.number < 0.5) desc
      ) as campaign_place
    from of_kind
    join ticket on ticket.campaign_id = of_kind.campaign_id
    join public.caller_numbers as number on number.phone_number = of_kind.caller_number
    where number.daily_calls is null
      or of_kind.number_place <= private.caller_number_room(number.phone_number, number.daily_calls, at)
  ),
  of_organization as (
    select
      of_campaign.*,
      row_number() over (
        partition by of_campaign.organization_id
        order by (of_campaign.dial_class = 2) desc, of_campaign.campaign_place, of_campaign.campaign_ticket
      ) as organization_place
    from of_campaign
    join public.campaigns as campaign on campaign.id = of_campaign.campaign_id
    left join private.breakers as breaker on breaker.scope = campaign.id and breaker.is_open
    where of_campaign.campaign_place <= coalesce(breaker.is_open::integer, 2147483647)
      and of_campaign.campaign_place <= campaign.max_concurrent_calls
      - coalesce((select sum(calls.number) from calls where calls.campaign_id = of_campaign.campaign_id), 0)
  ),
  with_turn as (
    select
      of_organization.*, own.turn is null as is_new,
      greatest(own.turn, pace.turn, 0)
        + (
          row_number() over (
            partition by of_organization.organization_id, of_organization.carrier_account_id order by of_organization.organization_place
          ) - 1
        )::numeric / organization.dispatch_weight as turn
    from of_organization
    join public.organizations as organization on organization.id = of_organization.organization_id
    left join private.carrier_pace as pace on pace.carrier_account_id = of_organization.carrier_account_id
    left join private.dispatch_turns as own
      on own.organization_id = of_organization.organization_id and own.carrier_account_id = of_organization.carrier_account_id
    where of_organization.organization_place <= organization.max_concurrent_calls
      - coalesce((select sum(calls.number) from calls where calls.organization_id = of_organization.organization_id), 0)
  ),
  of_account as (
    select
      with_turn.candidate, with_turn.carrier_account_id, with_turn.campaign_ticket,
      row_number() over (
        partition by with_turn.carrier_account_id order by with_turn.turn, with_turn.is_new desc, with_turn.campaign_ticket
      ) as account_place
    from with_turn
  ),
  room_left as materialized (
    select
      account.id,
      least(
        least(account.max_concurrent_calls, pace.ceiling)
          - coalesce((select sum(calls.number) from calls where calls.carrier_account_id = account.id), 0),
        floor(private.account_tokens(account)),
        -- One call tries whether a fault is over.
        breaker.is_open::integer
      ) as calls
    from public.carrier_accounts as account
    left join private.carrier_pace as pace on pace.carrier_account_id = account.id
    left join private.breakers as breaker on breaker.scope = account.id and breaker.is_open
    where account.id in (select of_account.carrier_account_id from of_account)
  ),
  first as (
    select of_account.candidate, of_account.account_place, of_account.campaign_ticket
    from of_account
    join room_left on room_left.id = of_account.carrier_account_id
    where of_account.account_place <= room_left.calls
    order by of_account.account_place, of_account.campaign_ticket
    limit room
  )
  select array_agg(first.candidate order by first.account_place, first.campaign_ticket) into chosen from first;
  return coalesce(chosen, array[]::private.candidate[]);
end
$$;
comment on function private.choose_candidates(private.candidate[], integer, timestamptz) is
  'Which candidates have room now: within what their campaign, organization and carrier account may have in flight and the account''s pace, '
  'each organization by its weight.';

create or replace function private.take_turns(attempts uuid[]) returns void
language plpgsql volatile security definer set search_path = '' as $$
begin
  with given as materialized (
    select
      log.carrier_account_id, log.organization_id, count(*) as calls, tenant.dispatch_weight::numeric as weight,
      greatest(own.turn, pace.turn, 0) as turn
    from public.call_logs as log
    join public.organizations as tenant on tenant.id = log.organization_id
    left join private.carrier_pace as pace on pace.carrier_account_id = log.carrier_account_id
    left join private.dispatch_turns as own
      on own.organization_id = log.organization_id and own.carrier_account_id = log.carrier_account_id
    where log.id = any (attempts)
    group by log.carrier_account_id, log.organization_id, tenant.dispatch_weight, own.turn, pace.turn
  ),
  moved as (
    insert into private.dispatch_turns as own (organization_id, carrier_account_id, turn)
    select given.organization_id, given.carrier_account_id, given.turn + given.calls / given.weight
    from given
    on conflict (organization_id, carrier_account_id) do update set turn = excluded.turn
  )
  insert into private.carrier_pace as pace (carrier_account_id, tokens, refilled_at, turn)
  select
    account.id, coalesce(private.account_tokens(account) - sum(given.calls), 0), clock_timestamp(),
    max(given.turn + (given.calls - 1) / given.weight)
  from given
  join public.carrier_accounts as account on account.id = given.carrier_account_id
  group by account.id
  on conflict (carrier_account_id) do update
  set tokens = excluded.tokens, refilled_at = excluded.refilled_at, turn = greatest(pace.turn, excluded.turn);
end
$$;
comment on function private.take_turns(uuid[]) is 'Takes from the pace of carrier accounts, and from the turns of organizations, what new attempts use of them.';

create or replace function private.write_evidence(attempts uuid[], at timestamptz) returns void
language plpgsql volatile security definer set search_path = '' as $$
begin
  insert into private.dial_evidence (
    attempt_id, organization_id, consent_id, register_key, register_version, country, region, purpose, zones, zone_source, dials_before
  )
  select
    log.id, log.organization_id, consent.id, register.register_key, register.version, callee.country, callee.region, campaign.purpose,
    private.callee_zones(lead.timezone, callee.zones, campaign.timezone),
    case when lead.timezone <> '' then 'lead' when callee.zones is not null then 'number' else 'campaign' end,
    private.recent_dials(log.callee_number, at)
  from public.call_logs as log
  join public.campaigns as campaign on campaign.organization_id = log.organization_id and campaign.id = log.campaign_id
  join public.leads as lead on lead.organization_id = log.organization_id and lead.id = log.lead_id
  cross join lateral private.destination(log.callee_number, null) as callee
  cross join lateral private.check_dnc(log.callee_number, at) as register
  left join lateral (
    select known.id
    from public.consents as known
    where known.organization_id = log.organization_id and known.phone_number = log.callee_number
      and known.scope = 'call_' || campaign.purpose
      and known.granted_at <= at and (known.expires_at is null or known.expires_at > at) and (known.revoked_at is null or known.revoked_at > at)
    order by known.granted_at desc
    limit 1
  ) as consent on true
  where log.id = any (attempts);
end
$$;
comment on function private.write_evidence(uuid[], timestamptz) is 'Keeps why new attempts were allowed.';

create or replace function private.get_dial_evidence(phone_number text, at timestamptz) returns jsonb
language plpgsql stable security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('call.view');
begin
  return jsonb_build_object('phone_number', phone_number, 'calls', (
    select coalesce(
      jsonb_agg(
        jsonb_build_object(
          'call_id', log.id, 'campaign_id', log.campaign_id, 'dialled_at', log.submitted_at, 'outcome', log.call_status,
          'caller_number', log.caller_number, 'purpose', seen.purpose, 'country', seen.country, 'region', seen.region,
          'zones', seen.zones, 'zone_source', seen.zone_source, 'register', seen.register_key, 'register_version', seen.register_version,
          'register_obtained_at', version.obtained_at, 'dials_before', seen.dials_before,
          'consent', case
            when consent.id is not null then jsonb_build_object(
              'id', consent.id, 'text', consent.consent_text, 'source', consent.source, 'granted_at', consent.granted_at, 'proof', consent.proof
            )
          end
        )
        order by log.submitted_at desc
      ),
      '[]'
    )
    from public.call_logs as log
    join private.dial_evidence as seen on seen.attempt_id = log.id
    left join private.dnc_versions as version on version.register_key = seen.register_key and version.number = seen.register_version
    left join public.consents as consent on consent.organization_id = log.organization_id and consent.id = seen.consent_id
    where log.organization_id = organization and log.callee_number = get_dial_evidence.phone_number and log.direction = 'outbound'
      and log.dialled and log.submitted_at <= at
  ));
end
$$;
comment on function private.get_dial_evidence(text, timestamptz) is 'Why each call to a number was allowed, for whoever has to show it.';

create or replace function public.get_dial_evidence(phone_number text) returns jsonb
language sql stable security invoker set search_path = '' as $$
  select private.get_dial_evidence(phone_number, private.clock_now())
$$;
comment on function public.get_dial_evidence(text) is
  'Every call of the organization to a number, with consent, register version, zone, earlier dials and caller number as the release saw them. Needs call.view.';

create or replace function private.release_calls(request jsonb, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' set jit = off set enable_seqscan = off as $$
declare
  wanted     constant integer := least(greatest(coalesce((request ->> 'limit')::integer, 100), 1), 500);
  attempts   jsonb;
  candidates private.candidate[];
  able       private.candidate[] := array[]::private.candidate[];
  over       private.candidate[] := array[]::private.candidate[];
  granted    uuid[] := array[]::uuid[];
  limits     integer[] := array[]::integer[];
  holds      private.call_holds[] := array[]::private.call_holds[];
  holding    record;
  waiting    uuid[];
  made       uuid[];
  room       integer;
  moved      integer := 0;
  given      integer;
  tenant     record;
begin
  perform private.lock_releases();
  perform private.check_breakers(at);

  -- An attempt whose message was lost is offered again, the same one.
  with lapsed as (
    select log.id
    from public.call_logs as log
    where log.status = 'created' and log.lease_until < now() and log.not_after > now()
    order by log.lease_until
    limit wanted
    for no key update skip locked
  ),
  renewed as (
    update public.call_logs as log
    set lease_until = now() + interval '60 seconds'
    from lapsed
    where log.id = lapsed.id
    returning log.id, log.organization_id, log.not_after
  )
  select jsonb_agg(jsonb_build_object('id', renewed.id, 'organization_id', renewed.organization_id, 'not_after', renewed.not_after))
  into attempts
  from renewed;
  attempts := coalesce(attempts, '[]');
  room := wanted - jsonb_array_length(attempts);

  -- Look until there are enough that may be dialled. Who must wait is told why and until when, and steps aside.
  for round in 1..5 loop
    exit when cardinality(able) >= room;
    candidates := private.judge_candidates(
      at, greatest(2 * room, 50), array(select candidate.queue_id from unnest(able || over) as candidate)
    );
    able := able || array(select candidate from unnest(candidates) as candidate where candidate.verdict is null);
    over := over || array(select candidate from unnest(candidates) as candidate where candidate.verdict is not null and candidate.due is null);
    moved := (select count(*) from unnest(candidates) as candidate where candidate.verdict is not null);
    if moved > 0 then
      update public.call_queue as queue
      set next_retry_at = candidate.due, wait_reason = candidate.verdict
      from unnest(candidates) as candidate
      where queue.id = candidate.queue_id and candidate.due is not null;
    end if;
    exit when cardinality(candidates) = 0;
  end loop;
  if cardinality(over) > 0 then
    perform private.close_leads(over, at);
  end if;
  waiting := (select array_agg(distinct candidate.carrier_account_id) from unnest(able) as candidate);
  able := private.choose_candidates(able, room, at);

  -- What the calls may cost last, organization by organization: nothing but wallets is locked after usage counters.
  for tenant in
    select
      (able[place]).organization_id as id, array_agg((able[place]).queue_id order by place) as rows,
      array_agg((able[place]).max_call_seconds order by place) as wanted
    from generate_subscripts(able, 1) as place
    group by (able[place]).organization_id
    order by (able[place]).organization_id
  loop
    holding := private.hold_calls(tenant.id, tenant.wanted, at);
    given := cardinality(holding.limits);
    if given < cardinality(tenant.rows) then
      insert into private.dispatch_holds as hold (organization_id, held_until, reason)
      values (tenant.id, at + interval '5 minutes', holding.reason)
      on conflict (organization_id) do update set held_until = excluded.held_until, reason = excluded.reason;
    end if;
    granted := granted || tenant.rows[:given];
    limits := limits || holding.limits;
    holds := holds || holding.holds;
  end loop;

  with attempt as (
    insert into public.call_logs (
      organization_id, campaign_id, lead_id, project_id, queue_id, attempt_no, carrier_account_id, caller_number, callee_number,
      agent_id, record_call, ring_timeout_seconds, time_limit_seconds, created_at, lease_until, not_after
    )
    select
      candidate.organization_id, candidate.campaign_id, candidate.lead_id, candidate.project_id, candidate.queue_id,
      candidate.attempt_no, candidate.carrier_account_id, candidate.caller_number, candidate.callee_number, candidate.agent_id,
      candidate.record_call, candidate.ring_timeout_seconds, allowed.seconds, at,
      now() + interval '60 seconds', now() + least(interval '10 minutes', candidate.closes_at - at)
    from unnest(able) as candidate
    join unnest(granted, limits) as allowed (queue_id, seconds) on allowed.queue_id = candidate.queue_id
    on conflict (callee_number) where direction = 'outbound' and status <> 'ended' do nothing
    returning id, organization_id, campaign_id, lead_id, queue_id, not_after
  ),
  held as (
    insert into private.call_holds (attempt_id, organization_id, seconds, credit_seconds, is_beyond, currency, credit_minor)
    select attempt.id, hold.organization_id, hold.seconds, hold.credit_seconds, hold.is_beyond, hold.currency, hold.credit_minor
    from generate_subscripts(granted, 1) as place
    join attempt on attempt.queue_id = granted[place]
    cross join lateral (select (holds[place]).*) as hold
  ),
  taken as (
    update public.call_queue as queue
    set status = 'processing', dispatch_count = queue.dispatch_count + 1, wait_reason = null
    from attempt
    where queue.id = attempt.queue_id
  ),
  calling as (
    update public.campaign_leads as member
    set status = 'calling'
    from attempt
    where member.organization_id = attempt.organization_id
      and member.campaign_id = attempt.campaign_id
      and member.lead_id = attempt.lead_id
  )
  select
    attempts || coalesce(
      jsonb_agg(jsonb_build_object('id', attempt.id, 'organization_id', attempt.organization_id, 'not_after', attempt.not_after)), '[]'
    ),
    count(*), array_agg(attempt.id)
  into attempts, given, made
  from attempt;
  if given > 0 then
    perform private.take_turns(made);
    perform private.write_evidence(made, at);
  end if;
  if given < cardinality(granted) then
    -- Somebody else began to call the number meanwhile: what was held for this row goes back.
    perform private.give_back_holds(
      array(
        select holds[place]
        from generate_subscripts(granted, 1) as place
        join public.call_queue as queue on queue.id = granted[place]
        where queue.status = 'queued'
      ),
      at
    );
  end if;

  -- Full hands, or rows that stepped aside in the last look: another one would find more.
  return jsonb_strip_nulls(jsonb_build_object(
    'attempts', attempts,
    'more', jsonb_array_length(attempts) >= wanted or moved > 0,
    -- Something waits for nothing but the pace of its account: in a second there is as much again.
    'paced', exists (
      select
      from public.carrier_accounts as account
      where account.id = any (waiting) and private.account_tokens(account) < 1
    )
  ));
end
$$;
comment on function private.release_calls(jsonb, timestamptz) is
  'Makes attempts of due queue rows, fairly over organizations, through every gate and within every limit, and offers lost ones again.';

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
        when platform.dialling_enabled is not true then 'platform_disabled'
        when not organization.dialling_enabled then 'dialling_disabled'
        when not campaign.dialling_enabled then 'campaign_disabled'
        when campaign.status <> 'running' then 'campaign_' || campaign.status
        when lead.do_not_call or private.is_suppressed(log.organization_id, log.callee_number) then 'opted_out'
        when lead.abuse_flag then 'abuse'
        when lead.archived_at is not null then 'archived'
        when lead.phone is distinct from log.callee_number then 'number_changed'
      end as reason
    from public.call_logs as log
    left join private.platform_dialling as platform on platform.single
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
          when reason in ('platform_disabled', 'dialling_disabled', 'account_disabled') then at + interval '1 minute'
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

create or replace function private.campaign_json(campaign_id uuid, at timestamptz) returns jsonb
language plpgsql stable security definer set search_path = '' set jit = off as $$
declare
  campaign public.campaigns;
  obstacle text;
  hold     timestamptz;
begin
  select described.* into campaign from public.campaigns as described where described.id = campaign_json.campaign_id;
  obstacle := case
    when campaign.status <> 'running' then 'campaign_' || campaign.status
    when not campaign.dialling_enabled then 'campaign_disabled'
    when private.is_broken(campaign.id, at) then 'circuit_open'
    else private.dispatch_obstacle(campaign.organization_id, at)
  end;
  select held.held_until into hold
  from private.dispatch_holds as held
  where held.organization_id = campaign.organization_id and held.held_until > at;
  return jsonb_build_object(
    'id', campaign.id, 'name', campaign.name, 'description', campaign.description, 'status', campaign.status,
    'project_id', campaign.project_id, 'agent_id', campaign.agent_id, 'timezone', campaign.timezone,
    'start_date', campaign.start_date, 'end_date', campaign.end_date, 'time_start', campaign.time_start, 'time_end', campaign.time_end,
    'max_concurrent_calls', campaign.max_concurrent_calls, 'max_attempts', campaign.max_attempts,
    'record_calls', campaign.record_calls, 'auto_complete', campaign.auto_complete,
    'total_enrolled', campaign.total_enrolled, 'open_leads', campaign.open_leads,
    'total_calls', campaign.total_calls, 'answered_calls', campaign.answered_calls,
    'created_at', campaign.created_at, 'started_at', campaign.started_at, 'paused_at', campaign.paused_at,
    'completed_at', campaign.completed_at, 'cancelled_at', campaign.cancelled_at,
    'counts', (
      select jsonb_object_agg(state.name, coalesce(counted.number, 0))
      from unnest(enum_range(null::public.campaign_lead_status)) as state (name)
      left join (
        select member.status, count(*) as number
        from public.campaign_leads as member
        where member.campaign_id = campaign.id
        group by member.status
      ) as counted on counted.status = state.name
    ),
    'waiting', (
      select coalesce(jsonb_object_agg(reasoned.reason, reasoned.number), '{}')
      from (
        select
          coalesce(obstacle, case when queue.next_retry_at > at then coalesce(queue.wait_reason, 'scheduled') else 'capacity' end) as reason,
          count(*) as number
        from public.call_queue as queue
        where queue.campaign_id = campaign.id and queue.status = 'queued'
        group by 1
      ) as reasoned
    ),
    'next_due_at', (
      select greatest(min(queue.next_retry_at), hold)
      from public.call_queue as queue
      where queue.campaign_id = campaign.id and queue.status = 'queued'
    )
  );
end
$$;
comment on function private.campaign_json(uuid, timestamptz) is
  'A campaign as its users see it: what it is, how many leads are in which state, and what the others wait for.';

create or replace function private.start_campaign(campaign_id uuid, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  campaign public.campaigns := private.claim_campaign(campaign_id, 'campaign.run');
  obstacle text;
  queued   integer;
begin
  if campaign.status not in ('draft', 'scheduled') then
    perform private.raise_error(
      409, 'invalid_transition', format('A campaign that is %s cannot be started', campaign.status), 'status'
    );
  end if;
  obstacle := private.dispatch_obstacle(campaign.organization_id, at);
  if obstacle = 'subscription_inactive' then
    perform private.raise_error(402, obstacle, 'The organization has no active subscription');
  elsif obstacle in ('no_caller_number', 'account_disabled') then
    perform private.raise_error(422, 'no_caller_number', 'The organization has no number to call from');
  elsif obstacle = 'dialling_disabled' then
    perform private.raise_error(422, obstacle, 'Dialling is disabled for the organization');
  end if;
  if (private.calling_window(at, campaign.timezone, campaign.time_start, campaign.time_end, campaign.start_date, campaign.end_date)).opens_at
    is null
  then
    perform private.raise_error(
      422, 'window_never_opens', 'Nothing is left of the calling window between 09:00 and 21:00 and the campaign''s dates', 'time_start'
    );
  end if;
  if campaign.total_enrolled = 0 then
    perform private.enrol_leads(campaign, private.acting_user_id(), at);
  end if;

  insert into public.call_queue (organization_id, campaign_id, lead_id, next_retry_at, max_attempts, created_at, updated_at)
  select member.organization_id, member.campaign_id, member.lead_id, at, campaign.max_attempts, at, at
  from public.campaign_leads as member
  where member.organization_id = campaign.organization_id and member.campaign_id = campaign.id and member.status = 'enrolled'
  on conflict do nothing;
  get diagnostics queued = row_count;
  if queued = 0 then
    perform private.raise_error(422, 'no_leads', 'The campaign has no lead to call');
  end if;
  update public.campaign_leads as member
  set status = 'queued'
  where member.organization_id = campaign.organization_id and member.campaign_id = campaign.id and member.status = 'enrolled';
  update public.campaigns as mine set status = 'running', started_at = at where mine.id = campaign.id;
  perform private.audit(
    campaign.organization_id, 'campaign.started', 'campaign', campaign.id, jsonb_build_object('queued', queued), at
  );
  return private.campaign_json(campaign.id, at);
end
$$;
comment on function private.start_campaign(uuid, timestamptz) is 'Queues every enrolled lead and lets the campaign run.';

create or replace function private.complete_campaign(campaign_id uuid, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  organization uuid := private.require_org('campaign.run');
  campaign     public.campaigns;
  skipped      integer;
begin
  perform private.lock_releases();
  perform
  from public.call_queue as queue
  where queue.organization_id = organization and queue.campaign_id = complete_campaign.campaign_id and queue.status = 'queued'
  order by queue.id
  for no key update;
  perform
  from public.campaign_leads as member
  where member.organization_id = organization
    and member.campaign_id = complete_campaign.campaign_id
    and member.status in ('enrolled', 'queued')
  order by member.id
  for no key update;
  campaign := private.claim_campaign(campaign_id, 'campaign.run');
  if campaign.status not in ('running', 'paused') then
    perform private.raise_error(
      409, 'invalid_transition', format('A campaign that is %s cannot be completed', campaign.status), 'status'
    );
  end if;
  update public.call_queue as queue
  set status = 'failed', last_error = 'campaign_completed', wait_reason = null
  where queue.organization_id = organization and queue.campaign_id = campaign.id and queue.status = 'queued';
  update public.campaign_leads as member
  set status = 'skipped', skip_reason = 'campaign_completed'
  where member.organization_id = organization and member.campaign_id = campaign.id and member.status in ('enrolled', 'queued');
  get diagnostics skipped = row_count;
  update public.campaigns as mine
  set status = 'completed', completed_at = at, open_leads = mine.open_leads - skipped
  where mine.id = campaign.id;
  perform private.campaign_completed(organization, campaign.id, at);
  return private.campaign_json(campaign.id, at);
end
$$;
comment on function private.complete_campaign(uuid, timestamptz) is
  'Ends a campaign before its last lead: who waits is called no more, calls under way go on to their end.';

create or replace function public.complete_campaign(campaign_id uuid) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.complete_campaign(campaign_id, private.clock_now())
$$;
comment on function public.complete_campaign(uuid) is 'Completes a running or paused campaign; 409 when it is neither. Needs campaign.run.';

create or replace function private.archive_campaign(campaign_id uuid, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  campaign public.campaigns := private.claim_campaign(campaign_id, 'campaign.run');
begin
  if campaign.status not in ('completed', 'cancelled', 'failed') then
    perform private.raise_error(
      409, 'invalid_transition', format('A campaign that is %s cannot be archived', campaign.status), 'status'
    );
  end if;
  update public.campaigns as mine set status = 'archived', archived_at = at where mine.id = campaign.id;
  perform private.audit(campaign.organization_id, 'campaign.archived', 'campaign', campaign.id, '{}', at);
  return private.campaign_json(campaign.id, at);
end
$$;
comment on function private.archive_campaign(uuid, timestamptz) is 'Puts a campaign that is over away; its calls stay.';

create or replace function public.archive_campaign(campaign_id uuid) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.archive_campaign(campaign_id, private.clock_now())
$$;
comment on function public.archive_campaign(uuid) is 'Archives a campaign that is over; 409 when it is not. Needs campaign.run.';

create or replace function private.restore_campaign(campaign_id uuid, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  campaign public.campaigns := private.claim_campaign(campaign_id, 'campaign.run');
begin
  if campaign.status <> 'archived' then
    perform private.raise_error(
      409, 'invalid_transition', format('A campaign that is %s cannot be restored', campaign.status), 'status'
    );
  end if;
  update public.campaigns as mine set status = 'draft', archived_at = null where mine.id = campaign.id;
  perform private.audit(campaign.organization_id, 'campaign.restored', 'campaign', campaign.id, '{}', at);
  return private.campaign_json(campaign.id, at);
end
$$;
comment on function private.restore_campaign(uuid, timestamptz) is 'Makes an archived campaign a draft again; who was called stays called.';

create or replace function public.restore_campaign(campaign_id uuid) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.restore_campaign(campaign_id, private.clock_now())
$$;
comment on function public.restore_campaign(uuid) is 'Makes an archived campaign a draft again; 409 when it is not archived. Needs campaign.run.';

create or replace function private.preview_campaign(campaign_id uuid, at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = '' as $$
declare
  campaign   public.campaigns;
  candidates private.candidate[];
  judged     private.candidate[] := array[]::private.candidate[];
  holding    record;
  obstacle   text;
  preview    jsonb;
begin
  begin
    -- It is started, judged and held for as start does and a release after it, and then none of it has been.
    perform private.start_campaign(campaign_id, at);
    select mine.* into campaign from public.campaigns as mine where mine.id = preview_campaign.campaign_id;
    obstacle := case
      when not campaign.dialling_enabled then 'campaign_disabled'
      when private.is_broken(campaign.id, at) then 'circuit_open'
      else private.dispatch_obstacle(campaign.organization_id, at)
    end;
    for round in 1..5 loop
      candidates := private.judge_candidates(
        at, 2000, array(select candidate.queue_id from unnest(judged) as candidate), campaign.id
      );
      exit when cardinality(candidates) = 0;
      judged := judged || candidates;
    end loop;
    holding := private.hold_calls(
      campaign.organization_id,
      array(select candidate.max_call_seconds from unnest(judged) as candidate where candidate.verdict is null), at
    );
    preview := jsonb_build_object(
      'queued', (select count(*) from public.call_queue as queue where queue.campaign_id = campaign.id and queue.status = 'queued'),
      'judged', cardinality(judged),
      'obstacle', obstacle,
      'callable', (select count(*) from unnest(judged) as candidate where candidate.verdict is null),
      'affordable', cardinality(holding.limits),
      'later', (
        select coalesce(jsonb_object_agg(told.verdict, told.leads), '{}')
        from (
          select candidate.verdict, count(*) as leads
          from unnest(judged) as candidate
          where candidate.verdict is not null and candidate.due is not null
          group by candidate.verdict
        ) as told
      ),
      'skipped', (
        select coalesce(jsonb_object_agg(told.verdict, told.leads), '{}')
        from (
          select candidate.verdict, count(*) as leads
          from unnest(judged) as candidate
          where candidate.verdict is not null and candidate.due is null
          group by candidate.verdict
        ) as told
      ),
      'first_call_at', case
        when obstacle is null then (
          select min(case when candidate.verdict is null then at else candidate.due end) from unnest(judged) as candidate
        )
      end,
      -- If every call lasted as long as it may, one after the other in as many lines as there are.
      'done_by', (
        select max(coalesce(candidate.due, at)) + make_interval(
          secs => ceil(count(*)::numeric / campaign.max_concurrent_calls)::integer * (campaign.ring_timeout_seconds + campaign.max_call_seconds)
        )
        from unnest(judged) as candidate
        where candidate.verdict is null or candidate.due is not null
      ),
      'cost', jsonb_build_object(
        'currency', (select max(held.currency) from unnest(holding.holds) as held),
        'credit_minor', (select coalesce(sum(held.credit_minor), 0) from unnest(holding.holds) as held)
      )
    );
    raise exception using errcode = 'TL001';
  exception when sqlstate 'TL001' then
    null;
  end;
  return preview;
end
$$;
comment on function private.preview_campaign(uuid, timestamptz) is
  'What a start would do now, by doing it and taking it back: the same gates, and what the calls may cost at most in credit. Of very many leads '
  'the first ten thousand are judged.';

create or replace function public.preview_campaign(campaign_id uuid) returns jsonb
language sql volatile security invoker set search_path = '' as $$
  select private.preview_campaign(campaign_id, private.clock_now())
$$;
comment on function public.preview_campaign(uuid) is
  'Of a draft: {"queued","judged","obstacle","callable","affordable","later":{reason:n},"skipped":{reason:n},"first_call_at","done_by",'
  '"cost":{"currency","credit_minor"}}; refused as start_campaign() would be. Needs campaign.run.';

comment on function public.release_calls(jsonb) is
  '{"v":1,"limit":100} -> {"attempts":[{"id","organization_id","not_after"}],"more":bool,"paced":bool}. Ask again while more is true, and in a '
  'second when paced is.';

insert into private.personal_data (table_name, column_name, found_by, treatment, reason)
values
  ('private.platform_dialling', '*', 'none', 'kept', 'Reference data.'),
  ('public.campaigns', 'retry_rules', 'none', 'kept', 'Minutes, and a word of a list.'),
  ('public.campaigns', 'purpose', 'none', 'kept', 'Minutes, and a word of a list.'),
  ('public.organizations', 'dial_countries', 'none', 'kept', 'Countries.'),
  ('private.destinations', '*', 'none', 'kept', 'Reference data.'),
  ('private.dial_evidence', '*', 'none', 'kept', 'Ids, and words of lists.');

revoke execute on function
  public.complete_campaign(uuid), public.archive_campaign(uuid), public.restore_campaign(uuid), public.preview_campaign(uuid)
from public, anon, authenticated, service_role;
grant execute on function
  private.complete_campaign(uuid, timestamptz), private.archive_campaign(uuid, timestamptz),
  private.restore_campaign(uuid, timestamptz), private.preview_campaign(uuid, timestamptz),
  public.complete_campaign(uuid), public.archive_campaign(uuid), public.restore_campaign(uuid), public.preview_campaign(uuid)
to authenticated;

revoke execute on function public.get_dial_evidence(text) from public, anon, authenticated, service_role;
grant execute on function private.get_dial_evidence(text, timestamptz), public.get_dial_evidence(text) to authenticated;
