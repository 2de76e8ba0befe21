//! What the doctor says of the errors that people get who install this: each is provoked, and its own words are shown to the doctor.

use anyhow::{Context, Result};
use local::{
    operate::doctor::{Doctor, Finding, Grade, examine},
    parts::postgres::Role,
};
use tests::{Database, supervisor_binary};
use tokio_postgres::Client;

/// The message with which a statement is refused.
async fn refused(client: &Client, sql: &str) -> Result<String> {
    let error = client.batch_execute(sql).await.err().with_context(|| format!("not refused: {sql}"))?;
    Ok(error.as_db_error().context("not the database's error")?.message().to_owned())
}

async fn told(database: &Database, message: &str) -> Result<Finding> {
    let findings = examine(&Doctor::of(database.url(Role::Owner), Some(message))).await?;
    findings.into_iter().next().context("no finding")
}

async fn faults(database: &Database) -> Result<Vec<String>> {
    let findings = examine(&Doctor::of(database.url(Role::Owner), None)).await?;
    Ok(findings.into_iter().filter(|finding| finding.grade == Grade::Fault).map(|finding| finding.subject).collect())
}

#[tokio::test]
async fn the_three_errors_of_an_installation_are_told_with_cause_and_cure() -> Result<()> {
    let bare = Database::bare(supervisor_binary!()).await?;
    let message = refused(&bare.connect(Role::Owner).await?, "select from public.leads").await?;
    let found = told(&bare, &message).await?;
    assert_eq!(found.subject, "relation does not exist");
    assert!(found.cause.contains("migrations were not applied here") && found.cure.contains("db push"), "{found:?}");
    assert_eq!(faults(&bare).await?, ["migrations"], "nothing else can be judged then");

    let ours = Database::migrated(supervisor_binary!()).await?;
    let found = told(&ours, &message).await?;
    assert!(found.cause.contains("another project"), "the table is there: {found:?}");

    let owner = ours.connect(Role::Owner).await?;
    let message = refused(&owner, "begin; set local role anon; select * from public.leads").await?;
    owner.batch_execute("rollback").await?;
    let found = told(&ours, &message).await?;
    assert_eq!(found.subject, "permission denied");
    assert!(found.cause.contains("signed in") && found.cure.contains("organization_id"), "{found:?}");

    let again = "insert into public.subscription_plans (slug, name) select slug, name from public.subscription_plans";
    let found = told(&ours, &refused(&owner, again).await?).await?;
    assert_eq!(found.subject, "duplicate key");
    assert!(found.cause.contains("subscription_plans") && found.cure.contains("may be run again"), "{found:?}");
    Ok(())
}

#[tokio::test]
async fn what_stops_an_installation_is_found_and_is_gone_when_it_is_mended() -> Result<()> {
    let database = Database::migrated(supervisor_binary!()).await?;
    let owner = database.connect(Role::Owner).await?;
    owner
        .batch_execute("select private.connect_functions('https://f.example.com/functions/v1', 'whsec_' || encode(sha256('k'), 'base64'))")
        .await?;
    assert_eq!(faults(&database).await?, [""; 0], "a new installation is well");

    let faults_by = [
        ("plans", "update public.subscription_plans set is_active = false".to_owned()),
        ("grants", "revoke select on public.leads from authenticated".to_owned()),
        ("row-level security", "create table public.mine (id int)".to_owned()),
        (
            "registers of who must not be called",
            "update private.dnc_registers set is_enforced = true where key = 'us_national'".to_owned(),
        ),
        ("where the functions are", "delete from vault.secrets where name = 'trunkline_nudge_key'".to_owned()),
    ];
    for (_, sql) in &faults_by {
        owner.batch_execute(sql).await.with_context(|| sql.clone())?;
    }
    let expected: Vec<&str> = faults_by.iter().map(|(subject, _)| *subject).collect();
    let mut found = faults(&database).await?;
    found.sort();
    let mut expected = expected;
    expected.sort_unstable();
    assert_eq!(found, expected);

    // Every look is a query that runs: one that did not would have failed above. What may be meant so is told, and is no fault.
    owner.batch_execute("update private.platform_dialling set dialling_enabled = false, reason = 'a drill'").await?;
    let findings = examine(&Doctor::of(database.url(Role::Owner), None)).await?;
    let off = findings.iter().find(|finding| finding.subject == "dialling is on").context("not looked at")?;
    assert_eq!((off.grade, off.cause.contains("a drill")), (Grade::Note, true), "{off:?}");
    Ok(())
}

#[tokio::test]
async fn a_database_that_cannot_be_reached_is_a_finding_too() -> Result<()> {
    let findings = examine(&Doctor::of("postgresql://postgres:x@127.0.0.1:1/postgres", None)).await?;
    assert_eq!(findings.len(), 1);
    assert!(findings[0].cause.contains("nothing listens"), "{findings:?}");
    Ok(())
}
