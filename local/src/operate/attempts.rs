//! `attempts`: calls that have no end. They are looked at, never ended by hand: one that is under way would be dialled again.

use super::{
    database::{Place, cells},
    table,
};
use anyhow::Result;
use clap::Subcommand;
use uuid::Uuid;

/// What to do with attempts.
#[derive(Debug, Subcommand)]
pub enum Attempts {
    /// List the attempts that have no end, oldest first, and what is waited for.
    Stuck {
        /// Only of this organization.
        #[arg(long, value_name = "ID")]
        organization: Option<Uuid>,
        /// Only those older than so many minutes.
        #[arg(long, value_name = "MINUTES", default_value_t = 30)]
        older: i32,
        /// How many at most.
        #[arg(long, default_value_t = 50)]
        limit: i64,
        /// Where the database is.
        #[command(flatten)]
        place: Place,
    },
    /// Count them by organization, carrier account and state.
    Count {
        /// Where the database is.
        #[command(flatten)]
        place: Place,
    },
}

const STUCK: &str = "
    select
      to_char(attempt.created_at at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS'), attempt.id::text, attempt.organization_id::text,
      attempt.carrier_account_id::text, attempt.status::text, attempt.call_sid,
      case
        when not attempt.dialled then 'a handler to begin it; lapses at ' || coalesce(attempt.not_after::text, 'once')
        when attempt.call_sid is null then 'the carrier to say whether it took the call'
        when attempt.answered_at is not null then 'the end of a conversation'
        else 'a callback; the carrier is asked every few minutes'
      end
    from public.call_logs as attempt
    where attempt.status <> 'ended' and attempt.created_at < private.clock_now() - make_interval(mins => $1)
      and ($2::uuid is null or attempt.organization_id = $2)
    order by attempt.created_at
    limit $3";

const COUNT: &str = "
    select attempt.organization_id::text, attempt.carrier_account_id::text, attempt.status::text, count(*)::text,
      to_char(min(attempt.created_at) at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS')
    from public.call_logs as attempt
    where attempt.status <> 'ended'
    group by attempt.organization_id, attempt.carrier_account_id, attempt.status
    order by min(attempt.created_at)";

/// Does it, and says what to print.
pub async fn run(command: &Attempts) -> Result<String> {
    match command {
        Attempts::Stuck { organization, older, limit, place } => {
            let rows = place.connect().await?.query(STUCK, &[older, organization, limit]).await?;
            let headings = ["since", "attempt", "organization", "account", "state", "call", "waits for"];
            Ok(if rows.is_empty() {
                format!("no attempt is older than {older} minutes and without an end\n")
            } else {
                table(&headings, &cells(&rows))
            })
        }
        Attempts::Count { place } => {
            let rows = place.connect().await?.query(COUNT, &[]).await?;
            Ok(table(&["organization", "account", "state", "attempts", "oldest"], &cells(&rows)))
        }
    }
}
