//! Looks into a database that has the migrations. Each is a query whose rows are what is wrong; none means that all is well.

use super::{Finding, Grade};
use anyhow::{Context, Result};
use tokio_postgres::Client;

/// Rows told of one look; the rest is counted.
const SHOWN: usize = 5;

/// One look.
pub(super) struct Check {
    subject: &'static str,
    grade: Grade,
    /// One text a row. At most a hundred.
    sql: &'static str,
    cure: &'static str,
}

impl Check {
    pub(super) async fn run(&self, client: &Client) -> Result<Finding> {
        let rows = client.query(self.sql, &[]).await.with_context(|| self.subject)?;
        let mut told: Vec<String> = rows.iter().take(SHOWN).map(|row| row.get(0)).collect();
        if rows.len() > SHOWN {
            told.push(format!("and {} more", rows.len() - SHOWN));
        }
        Ok(match told.as_slice() {
            [] => Finding::good(self.subject),
            told => Finding {
                grade: self.grade,
                subject: self.subject.to_owned(),
                cause: told.join("; "),
                cure: self.cure.to_owned(),
            },
        })
    }
}

pub(super) const ALL: &[Check] = &[
    Check {
        subject: "plans",
        grade: Grade::Fault,
        sql: "select 'no plan is on offer, so that nobody can sign up'
              where not exists (select from public.subscription_plans where is_active)",
        cure: "psql \"$DATABASE_URL\" -f supabase/seed.sql; it may be run again, and changes nothing that is there",
    },
    Check {
        subject: "who bills",
        grade: Grade::Note,
        sql: "select 'nobody is entered as the issuer of invoices' where not exists (select from private.billing_issuer)",
        cure: "enter your company in private.billing_issuer before the first period ends (docs/billing.md)",
    },
    Check {
        subject: "users of an organization",
        grade: Grade::Note,
        sql: "select format('user %s has no organization and sees no row (`permission denied`, or empty lists)', profile.id)
              from public.profiles as profile
              where profile.organization_id is null and profile.system_role <> 'platform_admin'
                and profile.created_at < now() - interval '1 hour'
              order by profile.created_at desc limit 100",
        cure: "they call create_organization() or accept an invitation; an app should offer both right after the sign-up",
    },
    Check {
        subject: "users' profiles",
        grade: Grade::Fault,
        sql: "select format('user %s has no profile: the trigger on auth.users is missing or failed', person.id)
              from auth.users as person
              where not exists (select from public.profiles as profile where profile.id = person.id)
              order by person.id limit 100",
        cure: "apply the migrations again on this project; then insert into public.profiles (id, email) select id, email from auth.users on conflict do nothing",
    },
    Check {
        subject: "grants",
        grade: Grade::Fault,
        sql: "select format('%s cannot use the schema public (`permission denied for schema public`)', wanted.name)
              from (values ('anon'), ('authenticated'), ('service_role')) as wanted (name)
              where not has_schema_privilege(wanted.name, 'public', 'usage')
              union all
              select format('service_role cannot execute %s()', wanted.name)
              from (values ('public.apply_event(jsonb)'), ('public.release_calls(jsonb)')) as wanted (name)
              where not has_function_privilege('service_role', wanted.name, 'execute')
              union all
              select 'authenticated cannot read public.leads (`permission denied for table leads`)'
              where not has_table_privilege('authenticated', 'public.leads', 'select')",
        cure: "grant usage on schema public to anon, authenticated, service_role; the rest is in the migrations: was a dump restored without its grants?",
    },
    Check {
        subject: "row-level security",
        grade: Grade::Fault,
        sql: "select format('%s is open: row-level security is off', class.oid::regclass)
              from pg_catalog.pg_class as class
              where class.relnamespace = 'public'::regnamespace and class.relkind in ('r', 'p')
                and not (class.relrowsecurity and class.relforcerowsecurity)
                and not exists (select from pg_catalog.pg_depend as member where member.objid = class.oid and member.deptype = 'e')
              order by 1 limit 100",
        cure: "alter table … enable row level security; alter table … force row level security; a table of your own belongs into another schema",
    },
    Check {
        subject: "extensions",
        grade: Grade::Fault,
        sql: "select format('the extension %s is off: nobody is nudged, work waits for the next minute', wanted.name)
              from (values
                ('pg_net', 'net.http_post(text,jsonb,jsonb,jsonb,integer)'), ('supabase_vault', 'vault.create_secret(text,text,text,uuid)')
              ) as wanted (name, made)
              where to_regprocedure(wanted.made) is null",
        cure: "switch it on under Database, Extensions, then run `connect` again (docs/deploy.md)",
    },
    Check {
        subject: "where the functions are",
        grade: Grade::Fault,
        sql: "select 'the database does not know the functions'' address or key: nobody is nudged, work waits for the next minute'
              where to_regclass('vault.secrets') is null
                or (select count(*) from vault.secrets where name in ('trunkline_functions_url', 'trunkline_nudge_key')) < 2",
        cure: "cargo run -p local -- connect --stack \"$STACK\"",
    },
    Check {
        subject: "dialling is on",
        grade: Grade::Note,
        sql: "select case when switch.single is null then 'private.platform_dialling has no row: nobody is called'
                else format('dialling is off for everybody: %s', coalesce(switch.reason, 'no reason was given')) end
              from (values (true)) as wanted (single)
              left join private.platform_dialling as switch on switch.single = wanted.single
              where not coalesce(switch.dialling_enabled, false)
              union all
              select format('carrier account %s (%s) is switched off', account.id, account.provider)
              from public.carrier_accounts as account where not account.dialling_enabled and account.is_active
              union all
              select format('organization %s is switched off', organization.id)
              from public.organizations as organization where not organization.dialling_enabled
              limit 100",
        cure: "whoever switched it off knows why; to begin again: update … set dialling_enabled = true (docs/operate.md)",
    },
    Check {
        subject: "numbers to call from",
        grade: Grade::Note,
        sql: "select format('campaign %s of organization %s runs without a number to call from', campaign.id, campaign.organization_id)
              from public.campaigns as campaign
              where campaign.status = 'running'
                and not exists (
                  select
                  from public.caller_numbers as number
                  join public.carrier_accounts as account on account.id = number.carrier_account_id
                  where number.organization_id = campaign.organization_id and number.is_active and account.is_active
                )
              limit 100",
        cure: "enter a carrier account and a number of it for the organization (docs/deploy.md, docs/carriers.md)",
    },
    Check {
        subject: "registers of who must not be called",
        grade: Grade::Fault,
        sql: "select format('%s is enforced and %s: nobody in %s is called', register.name,
                coalesce('was last loaded on ' || latest.day::text, 'was never loaded'), register.country_code)
              from private.dnc_registers as register
              left join lateral (
                select max(version.obtained_at)::date as day from private.dnc_versions as version
                where version.register_key = register.key and version.published_at is not null
              ) as latest on true
              where register.is_enforced and (latest.day is null or latest.day < private.clock_now() - register.max_age)",
        cure: "load the current register, or set is_enforced = false if no call falls under it",
    },
    Check {
        subject: "breakers",
        grade: Grade::Note,
        sql: "select format('the breaker of %s has been open since %s', breaker.scope, breaker.since)
              from private.breakers as breaker where breaker.is_open order by breaker.since limit 100",
        cure: "it tries by itself once a minute; look at the carrier's status page and at call-dispatch's log",
    },
    Check {
        subject: "calls without an end",
        grade: Grade::Fault,
        sql: "select format('attempt %s of organization %s is %s since %s', attempt.id, attempt.organization_id, attempt.status, attempt.created_at)
              from public.call_logs as attempt
              where attempt.status <> 'ended' and attempt.created_at < private.clock_now() - interval '4 hours'
              order by attempt.created_at limit 100",
        cure: "the carrier cannot be asked: docs/runbook.md#attempt-stuck. Never end rows by hand",
    },
    Check {
        subject: "events that were given up",
        grade: Grade::Fault,
        sql: "select format('%s events of %s are dead', count(*), event.source)
              from private.webhook_events as event where event.status = 'dead'
              group by event.source order by event.source limit 100",
        cure: "cargo run -p local -- events list --status dead; mend the cause, then events redrive --status dead --source …",
    },
    Check {
        subject: "endpoints of customers",
        grade: Grade::Note,
        sql: "select format('endpoint %s of organization %s was switched off: %s', endpoint.id, endpoint.organization_id, endpoint.disabled_reason)
              from public.webhook_endpoints as endpoint
              where not endpoint.enabled and endpoint.disabled_reason <> 'user'
              order by endpoint.disabled_at desc limit 100",
        cure: "its owner mends it and switches it on again; what it missed is sent by POST endpoints/{id}/replay",
    },
    Check {
        subject: "billing on hold",
        grade: Grade::Fault,
        sql: "select format('organization %s: %s', subscription.organization_id, subscription.billing_hold)
              from public.subscriptions as subscription where subscription.billing_hold is not null
              order by subscription.organization_id limit 100",
        cure: "find why the sums differ (select * from private.check_usage('<organization>')), then lift it: docs/runbook.md#usage-mismatch",
    },
    Check {
        subject: "partitions",
        grade: Grade::Fault,
        sql: "select format('%s has rows that no month took', part.oid::regclass)
              from pg_catalog.pg_class as part
              where part.relnamespace = 'private'::regnamespace and part.relispartition and part.relname ~ '_default$'
                and (xpath('/row/n/text()', query_to_xml(format('select count(*) as n from (select from %s limit 1) as x', part.oid::regclass),
                  false, true, '')))[1]::text::int > 0",
        cure: "is the job that makes partitions (`retention`) running? Its log says; it places the rows when it does",
    },
    Check {
        subject: "the clock",
        grade: Grade::Fault,
        sql: "select format('the clock of the database is shifted by %s', shifted.shift)
              from private.clock_offset as shifted
              where shifted.shift <> interval '0' and inet_server_addr() is not null and not (inet_server_addr() <<= '127.0.0.0/8')",
        cure: "delete from private.clock_offset: only a demo's database has one",
    },
];
