//! `billing`: whose usage does not add up, and who is not billed for it until somebody has looked.

use super::{
    database::{Place, cells, said},
    table,
};
use anyhow::Result;
use clap::Subcommand;
use uuid::Uuid;

/// What to do with billing.
#[derive(Debug, Subcommand)]
pub enum Billing {
    /// List the organizations that are not billed, and why.
    Held {
        /// Where the database is.
        #[command(flatten)]
        place: Place,
    },
    /// Compare events, keys, days and counters, and list what disagrees. Changes nothing.
    Check {
        /// Only of this organization.
        #[arg(long, value_name = "ID")]
        organization: Option<Uuid>,
        /// Where the database is.
        #[command(flatten)]
        place: Place,
    },
    /// Let an organization be billed again; refused while its usage does not add up.
    Lift {
        /// The organization.
        organization: Uuid,
        /// What was wrong and how it was mended: for the audit log.
        #[arg(long)]
        reason: String,
        /// Say what would be done, and do nothing.
        #[arg(long)]
        dry_run: bool,
        /// Where the database is.
        #[command(flatten)]
        place: Place,
    },
}

const HELD: &str = "
    select subscription.organization_id::text, organization.name, subscription.next_invoice_at::text, subscription.billing_hold
    from public.subscriptions as subscription
    join public.organizations as organization on organization.id = subscription.organization_id
    where subscription.billing_hold is not null
    order by subscription.next_invoice_at, subscription.organization_id";

/// Does it, and says what to print.
pub async fn run(command: &Billing) -> Result<String> {
    match command {
        Billing::Held { place } => {
            let rows = place.connect().await?.query(HELD, &[]).await?;
            Ok(if rows.is_empty() {
                "everybody is billed\n".to_owned()
            } else {
                table(&["organization", "name", "due", "because"], &cells(&rows))
            })
        }
        Billing::Check { organization, place } => {
            let check = "select organization::text, meter, problem from private.check_usage($1)";
            let rows = place.connect().await?.query(check, &[organization]).await?;
            Ok(if rows.is_empty() {
                "events, keys, days and counters agree\n".to_owned()
            } else {
                table(&["organization", "meter", "problem"], &cells(&rows))
            })
        }
        Billing::Lift { organization, reason, dry_run, place } => {
            let mut client = place.connect().await?;
            let transaction = client.transaction().await?;
            let lift = "select private.lift_billing_hold($1, $2, private.clock_now())";
            let was_held: bool = transaction.query_one(lift, &[organization, reason]).await.map_err(said)?.get(0);
            // A dry run is the real thing, taken back.
            if *dry_run {
                transaction.rollback().await?;
            } else {
                transaction.commit().await?;
            }
            let would = if *dry_run { "would be" } else { "is" };
            Ok(match was_held {
                true => format!("organization {organization} {would} billed again, by the next run\n"),
                false => format!("organization {organization} was billed all along\n"),
            })
        }
    }
}
