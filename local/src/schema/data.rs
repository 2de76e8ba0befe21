//! Realistic data: many organizations, leads and calls, made set-based and the same for the same seed.

use anyhow::{Context, Result, ensure};
use tokio_postgres::Client;

const SQL: &str = include_str!("../../sql/generate_data.sql");

/// How much of it.
#[derive(Debug, Clone, Copy)]
pub struct Amount {
    /// Two seeds give two worlds, which may lie in one database.
    pub seed: i64,
    /// Organizations, each with an owner, a project and a campaign.
    pub organizations: i32,
    /// Leads over all organizations.
    pub leads: i32,
    /// Ended calls over all leads, spread over the last ninety days.
    pub calls: i32,
}

/// Fills a database over a connection of its superuser, in one transaction, and gathers statistics.
pub async fn generate(client: &mut Client, amount: Amount) -> Result<()> {
    ensure!(
        amount.organizations > 0 && amount.leads > 0 && amount.calls >= 0,
        "there must be an organization and a lead at least"
    );
    let transaction = client.transaction().await?;
    transaction.batch_execute(SQL).await.context("local/sql/generate_data.sql does not apply")?;
    transaction
        .execute(
            "select pg_temp.generate($1, $2, $3, $4)",
            &[&amount.seed, &amount.organizations, &amount.leads, &amount.calls],
        )
        .await
        .context("the data cannot be made")?;
    transaction.commit().await?;
    client.batch_execute("analyze").await?;
    Ok(())
}
