//! `dialling`: the switches that stop calling. Every turn of one is in the audit log, with who turned it and why.

use super::{
    database::{Place, cells, said},
    table,
};
use anyhow::{Result, ensure};
use clap::{Args, Subcommand};
use uuid::Uuid;

/// What to do with the switches.
#[derive(Debug, Subcommand)]
pub enum Dialling {
    /// Show everything that is switched off, and every breaker that is open.
    Show {
        /// Where the database is.
        #[command(flatten)]
        place: Place,
    },
    /// Begin no more calls. Those under way go on to their end.
    Stop(Turn),
    /// Begin calls again.
    Start(Turn),
}

/// Which switch is turned, and why.
#[derive(Debug, Args)]
pub struct Turn {
    /// Whose calls.
    #[command(flatten)]
    scope: Scope,
    /// Why: for whoever finds it so, and for the audit log.
    #[arg(long)]
    reason: String,
    /// Say what would be done, and do nothing.
    #[arg(long)]
    dry_run: bool,
    /// Where the database is.
    #[command(flatten)]
    place: Place,
}

/// Whose calls: one of these.
#[derive(Debug, Default, Args)]
#[group(required = true, multiple = false)]
pub struct Scope {
    /// Everybody's.
    #[arg(long)]
    all: bool,
    /// Those through a carrier account.
    #[arg(long, value_name = "ID")]
    account: Option<Uuid>,
    /// An organization's.
    #[arg(long, value_name = "ID")]
    organization: Option<Uuid>,
    /// A campaign's.
    #[arg(long, value_name = "ID")]
    campaign: Option<Uuid>,
}

impl Turn {
    /// Turns the switch of an organization, in the database at `database_url`.
    pub fn of_organization(organization: Uuid, reason: &str, dry_run: bool, database_url: &str) -> Self {
        let scope = Scope { organization: Some(organization), ..Scope::default() };
        Self { scope, reason: reason.to_owned(), dry_run, place: Place::of(database_url) }
    }

    /// Turns everybody's.
    pub fn of_all(reason: &str, dry_run: bool, database_url: &str) -> Self {
        let scope = Scope { all: true, ..Scope::default() };
        Self { scope, reason: reason.to_owned(), dry_run, place: Place::of(database_url) }
    }
}

const OFF: &str = "
    select 'everybody', '', switch.reason
    from (values (true)) as wanted (single)
    left join private.platform_dialling as switch on switch.single = wanted.single
    where not coalesce(switch.dialling_enabled, false)
    union all
    select 'carrier account', account.id::text, format('%s %s', account.provider, coalesce(account.name, account.account_sid))
    from public.carrier_accounts as account where not account.dialling_enabled
    union all
    select 'organization', organization.id::text, organization.name
    from public.organizations as organization where not organization.dialling_enabled
    union all
    select 'campaign', campaign.id::text, campaign.name
    from public.campaigns as campaign where not campaign.dialling_enabled and campaign.status in ('scheduled', 'running', 'paused')
    union all
    select 'breaker', breaker.scope::text, format('tries again at %s', breaker.retry_at)
    from private.breakers as breaker where breaker.is_open";

/// Does it, and says what to print.
pub async fn run(command: &Dialling) -> Result<String> {
    match command {
        Dialling::Show { place } => show(place).await,
        Dialling::Stop(turn) => turned(turn, false).await,
        Dialling::Start(turn) => turned(turn, true).await,
    }
}

async fn show(place: &Place) -> Result<String> {
    let rows = place.connect().await?.query(OFF, &[]).await?;
    if rows.is_empty() {
        return Ok("nothing is switched off, and no breaker is open\n".to_owned());
    }
    Ok(table(&["off", "id", "what"], &cells(&rows)))
}

async fn turned(turn: &Turn, on: bool) -> Result<String> {
    let reason = turn.reason.trim();
    ensure!(!reason.is_empty(), "say why: --reason");
    let client = turn.place.connect().await?;
    let (relation, id, kind) = match &turn.scope {
        Scope { account: Some(id), .. } => ("public.carrier_accounts", Some(*id), "carrier_account"),
        Scope { organization: Some(id), .. } => ("public.organizations", Some(*id), "organization"),
        Scope { campaign: Some(id), .. } => ("public.campaigns", Some(*id), "campaign"),
        _ => ("private.platform_dialling", None, "platform"),
    };
    let under_way = "
        select count(*) from public.call_logs as attempt
        where attempt.status <> 'ended' and attempt.dialled
          and ($1::uuid is null or $1 in (attempt.organization_id, attempt.carrier_account_id, attempt.campaign_id))";
    let live: i64 = client.query_one(under_way, &[&id]).await?.get(0);
    if turn.dry_run {
        let word = if on { "on" } else { "off" };
        return Ok(format!("would switch dialling {word} for {}; {live} calls are under way\n", whose(kind, id)));
    }
    // The change and its line in the audit log are one statement, and so one transaction.
    let statement = match id {
        None => "
            with changed as (
              insert into private.platform_dialling (single, dialling_enabled, reason)
              values (true, $1, case when $1 then null else $2 end)
              on conflict (single) do update set dialling_enabled = excluded.dialling_enabled, reason = excluded.reason
              returning single
            )
            select private.audit(null, $3, 'platform', null, jsonb_build_object('reason', $2::text), private.clock_now()) from changed"
            .to_owned(),
        Some(_) => {
            let organization = match kind {
                "organization" => "changed.id",
                _ => "changed.organization_id",
            };
            format!(
                "with changed as (update {relation} as own set dialling_enabled = $1 where own.id = $4 returning own.*)
                 select private.audit({organization}, $3, '{kind}', changed.id, jsonb_build_object('reason', $2::text), private.clock_now())
                 from changed"
            )
        }
    };
    let action = if on { "dialling.started" } else { "dialling.stopped" };
    let changed = match id {
        None => client.query(&statement, &[&on, &reason, &action]).await,
        Some(id) => client.query(&statement, &[&on, &reason, &action, &id]).await,
    }
    .map_err(said)?;
    ensure!(!changed.is_empty(), "there is no {}", whose(kind, id));
    let word = if on { "on" } else { "off" };
    Ok(format!("dialling is {word} for {}; {live} calls are under way and go on to their end\n", whose(kind, id)))
}

fn whose(kind: &str, id: Option<Uuid>) -> String {
    match id {
        Some(id) => format!("{} {id}", kind.replace('_', " ")),
        None => "everybody".to_owned(),
    }
}
