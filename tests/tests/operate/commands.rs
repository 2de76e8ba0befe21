//! The operator's commands: what they turn is turned and on record, what they show is so, and a dry run changes nothing.

use anyhow::{Context, Result};
use local::{
    operate::{
        attempts::{self, Attempts},
        billing::{self, Billing},
        database::Place,
        dialling::{self, Dialling, Turn},
    },
    parts::postgres::Role,
};
use tests::{
    Fingerprint, Stack,
    scene::{self, phones},
    supervisor_binary,
};

#[tokio::test]
async fn a_switch_is_turned_on_record_and_shown_and_a_dry_run_turns_nothing() -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    let campaign = scene::running_campaign(&stack, &phones(1, 2)).await?;
    let url = stack.database.url(Role::Owner);
    let organization = campaign.tenant.id;

    let before = Fingerprint::of(&stack.sql).await?;
    let said = dialling::run(&Dialling::Stop(Turn::of_organization(organization, "a drill", true, url))).await?;
    assert!(said.starts_with("would switch dialling off"), "{said}");
    assert_eq!(Fingerprint::of(&stack.sql).await?, before, "a dry run");

    dialling::run(&Dialling::Stop(Turn::of_organization(organization, "a drill", false, url))).await?;
    dialling::run(&Dialling::Stop(Turn::of_all("another drill", false, url))).await?;
    let shown = dialling::run(&Dialling::Show { place: Place::of(url) }).await?;
    assert!(shown.contains("another drill") && shown.contains(&organization.to_string()), "{shown}");
    assert!(campaign.dial(&stack).await?.is_empty(), "nobody is called");

    dialling::run(&Dialling::Start(Turn::of_organization(organization, "over", false, url))).await?;
    dialling::run(&Dialling::Start(Turn::of_all("over", false, url))).await?;
    let shown = dialling::run(&Dialling::Show { place: Place::of(url) }).await?;
    assert_eq!(shown, "nothing is switched off, and no breaker is open\n");
    assert_eq!(campaign.dial(&stack).await?.len(), 2, "and again they are");

    let recorded =
        "select string_agg(action || ' ' || (metadata ->> 'reason'), ', ' order by action, metadata ->> 'reason')
        from public.audit_logs where action like 'dialling.%'";
    assert_eq!(stack.value(recorded).await?, "dialling.started over, dialling.stopped a drill");
    let recorded = recorded.replace("audit_logs", "platform_audit_logs");
    assert_eq!(stack.value(&recorded).await?, "dialling.started over, dialling.stopped another drill");

    let nobody = Turn::of_organization(uuid::Uuid::new_v4(), "a drill", false, url);
    let refused = dialling::run(&Dialling::Stop(nobody)).await.err().context("not refused")?;
    assert!(refused.to_string().starts_with("there is no organization"), "{refused}");

    // The two calls that were made have no end yet.
    let counted = attempts::run(&Attempts::Count { place: Place::of(url) }).await?;
    assert!(counted.lines().count() >= 2 && counted.contains(&organization.to_string()), "{counted}");
    let stuck = async |older| {
        attempts::run(&Attempts::Stuck { organization: None, older, limit: 50, place: Place::of(url) }).await
    };
    assert_eq!(stuck(30).await?, "no attempt is older than 30 minutes and without an end\n");
    stack.sql.batch_execute("update public.call_logs set created_at = created_at - interval '1 hour'").await?;
    let said = stuck(30).await?;
    assert_eq!(said.matches("a callback; the carrier is asked").count(), 2, "{said}");
    Ok(())
}

#[tokio::test]
async fn who_is_not_billed_is_listed_and_billed_again_once_the_sums_agree() -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    let tenant = scene::sign_up(&stack, "Held Realty").await?;
    scene::buy_plan(&stack, &tenant, 60).await?;
    let url = stack.database.url(Role::Owner);
    let held = async || billing::run(&Billing::Held { place: Place::of(url) }).await;
    let lift = async |dry_run| {
        let (organization, reason) = (tenant.id, "the drill is over".to_owned());
        billing::run(&Billing::Lift { organization, reason, dry_run, place: Place::of(url) }).await
    };
    assert_eq!(held().await?, "everybody is billed\n");
    stack.sql.batch_execute("update public.subscriptions set billing_hold = 'a drill' where status = 'active'").await?;
    assert!(held().await?.contains("a drill"));
    assert!(billing::run(&Billing::Check { organization: None, place: Place::of(url) }).await?.contains("agree"));
    assert!(lift(true).await?.contains("would be billed again"));
    assert!(held().await?.contains("a drill"), "a dry run");
    assert!(lift(false).await?.contains("is billed again"));
    assert_eq!(held().await?, "everybody is billed\n");
    Ok(())
}
