//! `doctor`: what is wrong with an installation, why, and what puts it right. It reads, and changes nothing.

mod api;
mod checks;
mod messages;

use super::table;
use crate::{parts::postgres, schema};
use anyhow::{Context, Result};
use clap::Args;
use std::fmt::Write;
use tokio_postgres::Client;
use url::Url;

/// What is looked at.
#[derive(Debug, Args)]
pub struct Doctor {
    /// The database, as its owner: the session pooler's or the direct address, of the project's settings.
    #[arg(long, value_name = "URL", env = "DATABASE_URL", hide_env_values = true)]
    database_url: String,
    /// The project's address, to look at its keys too.
    #[arg(long, value_name = "URL", env = "NEXT_PUBLIC_SUPABASE_URL")]
    supabase_url: Option<Url>,
    /// The key that apps have: `sb_publishable_…`, or the old `anon`.
    #[arg(long, value_name = "KEY", env = "NEXT_PUBLIC_SUPABASE_ANON_KEY", hide_env_values = true)]
    publishable_key: Option<String>,
    /// The key that functions have: `sb_secret_…`, or the old `service_role`.
    #[arg(long, value_name = "KEY", env = "SUPABASE_SERVICE_ROLE_KEY", hide_env_values = true)]
    secret_key: Option<String>,
    /// A message that somebody got, to be told what it comes from here.
    #[arg(long, value_name = "MESSAGE")]
    error: Option<String>,
}

impl Doctor {
    /// Looks at a database alone, and at a message that somebody got from it.
    pub fn of(database_url: &str, error: Option<&str>) -> Self {
        let database_url = database_url.to_owned();
        Self {
            database_url,
            supabase_url: None,
            publishable_key: None,
            secret_key: None,
            error: error.map(str::to_owned),
        }
    }
}

/// How bad something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Grade {
    /// Nothing is wrong.
    Good,
    /// It may be meant so.
    Note,
    /// Something does not work until it is put right.
    Fault,
}

/// What one look found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub grade: Grade,
    /// What was looked at.
    pub subject: String,
    /// What is so, and what it causes.
    pub cause: String,
    /// What to do.
    pub cure: String,
}

impl Finding {
    fn fault(subject: &str, cause: impl Into<String>, cure: impl Into<String>) -> Self {
        Self { grade: Grade::Fault, subject: subject.to_owned(), cause: cause.into(), cure: cure.into() }
    }

    fn good(subject: &str) -> Self {
        Self { grade: Grade::Good, subject: subject.to_owned(), cause: String::new(), cure: String::new() }
    }
}

/// Looks at everything, and says what to print and whether all is well.
pub async fn run(command: &Doctor) -> Result<(String, bool)> {
    let findings = examine(command).await?;
    let healthy = findings.iter().all(|finding| finding.grade != Grade::Fault);
    Ok((page(&findings), healthy))
}

/// Looks at everything. Fails only where a look itself is not possible.
pub async fn examine(command: &Doctor) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    match postgres::connect(&command.database_url).await {
        Ok(client) => {
            findings.extend(look(&client, command.error.as_deref()).await?);
        }
        Err(error) => {
            let said = format!("{error:#}");
            findings.push(messages::of_connecting(&said));
        }
    }
    if let Some(url) = &command.supabase_url {
        findings.extend(api::look(url, command.publishable_key.as_deref(), command.secret_key.as_deref()).await?);
    }
    Ok(findings)
}

async fn look(client: &Client, error: Option<&str>) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    if let Some(message) = error {
        findings.push(messages::explain(client, message).await?);
    }
    let schema = schema_state(client).await?;
    let is_whole = schema.grade == Grade::Good;
    findings.push(schema);
    // Every other look reads tables that the migrations make.
    if is_whole {
        for check in checks::ALL {
            findings.push(check.run(client).await?);
        }
    }
    Ok(findings)
}

/// Whether the schema is that of this checkout: by the record of migrations, or by what `master_schema.sql` wrote down where it was pasted.
async fn schema_state(client: &Client) -> Result<Finding> {
    let subject = "migrations";
    let row = client
        .query_one(
            "select to_regclass('supabase_migrations.schema_migrations') is not null,
               (select obj_description(space.oid, 'pg_namespace') from pg_namespace as space where space.nspname = 'private')",
            &[],
        )
        .await
        .context("the catalog")?;
    let (is_recorded, comment): (bool, Option<String>) = (row.get(0), row.get(1));
    if let Some(pasted) = comment.as_deref().and_then(|comment| comment.strip_prefix("Trunkline ")) {
        let ours = schema::master::version(&schema::files()?);
        return Ok(if pasted == ours {
            Finding::good(subject)
        } else {
            let cause = format!("the schema was pasted, in another version ({pasted}) than this checkout's ({ours})");
            let cure = "git checkout the version that was pasted, record its migrations with `npx supabase migration repair --status applied …`, \
                        come back, and npx supabase db push";
            Finding::fault(subject, cause, cure)
        });
    }
    let mut applied: Vec<String> = Vec::new();
    if is_recorded {
        let rows = client.query("select version from supabase_migrations.schema_migrations", &[]).await?;
        applied = rows.iter().map(|row| row.get(0)).collect();
    }
    let missing: Vec<String> = schema::migrations()?.into_iter().filter(|version| !applied.contains(version)).collect();
    if missing.is_empty() {
        return Ok(Finding::good(subject));
    }
    let cause = format!("not applied: {}; what they make is missing (`relation … does not exist`)", missing.join(", "));
    let cure = "npx supabase db push --yes --remote=\"$DATABASE_URL\"; is this the right project?";
    Ok(Finding::fault(subject, cause, cure))
}

/// What a person reads: what is wrong first, then what may be meant so, then how much is well.
pub fn page(findings: &[Finding]) -> String {
    let mut page = String::new();
    for (grade, heading) in [(Grade::Fault, "Wrong"), (Grade::Note, "To know")] {
        let those: Vec<&Finding> = findings.iter().filter(|finding| finding.grade == grade).collect();
        if those.is_empty() {
            continue;
        }
        let _fits = writeln!(page, "{heading}");
        for finding in those {
            let _fits = writeln!(page, "  {}: {}\n      {}", finding.subject, finding.cause, finding.cure);
        }
        page.push('\n');
    }
    let good: Vec<Vec<String>> = findings
        .iter()
        .filter(|finding| finding.grade == Grade::Good)
        .map(|finding| vec![finding.subject.clone(), "✓".to_owned()])
        .collect();
    if !good.is_empty() {
        page += &table(&["looked at", "well"], &good);
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_stands_first_with_its_cure() {
        let note = Finding { grade: Grade::Note, ..Finding::fault("users", "two have none", "invite them") };
        let text =
            page(&[Finding::good("migrations"), note, Finding::fault("keys", "the key is old", "take the new one")]);
        assert_eq!(
            text,
            "Wrong\n  keys: the key is old\n      take the new one\n\nTo know\n  users: two have none\n      invite them\n\n\
             LOOKED AT   WELL\nmigrations  ✓\n"
        );
    }
}
