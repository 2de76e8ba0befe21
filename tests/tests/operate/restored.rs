//! A backup is restored while a campaign ran and invoices were made: nobody is called more often than the caps allow by the carrier's own
//! log, and no number is given twice.

use anyhow::{Context, Result};
use chrono::{DateTime, TimeDelta, Utc};
use http::StatusCode;
use local::{
    operate::restored::{Restored, run},
    parts::postgres::{self, Role},
};
use serde_json::json;
use std::collections::BTreeMap;
use tests::{
    Stack,
    callbacks::{BUSY, TALKED},
    carrier::Create,
    events,
    scene::{self, phones},
    supervisor_binary,
};

/// Leads and invoices; `RESTORE_CALLS=300 RESTORE_INVOICES=20` is the same at its full size.
fn size(name: &str, small: u32) -> u32 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(small)
}

/// The database's name and the address of its server's own.
fn server_of(stack: &Stack) -> Result<(String, String)> {
    let url = stack.database.url(Role::Admin);
    let (server, name) = url.rsplit_once('/').context("no database in the URL")?;
    Ok((name.to_owned(), format!("{server}/postgres")))
}

/// Copies one database's files to another's, whoever is connected: what a physical backup is, and its restoring.
async fn copy(stack: &Stack, from: &str, to: &str) -> Result<()> {
    let (_, server) = server_of(stack)?;
    let client = postgres::connect(&server).await?;
    let alone = "select pg_terminate_backend(pid) from pg_stat_activity where datname = any ($1)";
    client.batch_execute(&format!(r#"alter database "{from}" allow_connections false"#)).await?;
    client.execute(alone, &[&vec![from, to]]).await?;
    client.batch_execute(&format!(r#"drop database if exists "{to}" with (force)"#)).await?;
    client.batch_execute(&format!(r#"create database "{to}" template "{from}" owner postgres"#)).await?;
    client.batch_execute(&format!(r#"alter database "{from}" allow_connections true"#)).await?;
    Ok(())
}

/// What the carrier writes down of a call.
fn record(call: &Create, began: DateTime<Utc>, seconds: i64) -> serde_json::Value {
    let time = |after: i64| (began + TimeDelta::seconds(after)).format("%Y-%m-%d %H:%M:%S%:z").to_string();
    json!({
        "call_uuid": call.call_uuid, "from_number": call.from.trim_start_matches('+'), "to_number": call.to.trim_start_matches('+'),
        "initiation_time": time(0), "answer_time": (seconds > 0).then(|| time(5)), "end_time": time(5 + seconds),
        "call_duration": seconds, "bill_duration": seconds, "hangup_cause_code": if seconds > 0 { 4000 } else { 3010 },
        "call_state": if seconds > 0 { "ANSWER" } else { "BUSY" },
    })
}

async fn close(stack: &Stack, time: &str) -> Result<Vec<String>> {
    stack.set_clock(time).await?;
    events::job(&stack.invoicing()?, "close_periods").await?;
    let numbers =
        stack.value("select string_agg(invoice_number, ' ' order by invoice_number) from public.invoices").await?;
    Ok(numbers.split_whitespace().map(str::to_owned).collect())
}

/// PostgREST finds out by itself that its connections are gone.
async fn answering(stack: &Stack, jwt: &str) -> Result<()> {
    for _ in 0..100 {
        if stack.rest(jwt, "GET", "organizations?select=id", None).await?.0 == StatusCode::OK {
            return Ok(());
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    anyhow::bail!("PostgREST does not come back")
}

#[tokio::test]
async fn a_restored_database_calls_nobody_until_it_knows_what_was_dialled_and_numbered_since() -> Result<()> {
    let (leads, invoices) = (size("RESTORE_CALLS", 12), size("RESTORE_INVOICES", 2));
    let mut stack = Stack::start(supervisor_binary!()).await?;
    let campaign = scene::running_campaign(&stack, &phones(1, leads)).await?;
    scene::buy_plan(&stack, &campaign.tenant, 60).await?;
    for nth in 1..invoices {
        let tenant = scene::sign_up(&stack, &format!("Tenant {nth}")).await?;
        scene::buy_plan(&stack, &tenant, 60).await?;
    }
    let (name, _) = server_of(&stack)?;
    let backup = format!("{name}_backup");
    copy(&stack, &name, &backup).await?;
    stack.sql = stack.database.connect(Role::Owner).await?;
    answering(&stack, campaign.tenant.jwt()).await?;
    let since = Utc::now();

    // What the backup knows nothing of: everybody is called, half of them are heard of, and periods end.
    let mut calls = Vec::new();
    while calls.len() < leads as usize {
        let dialled = campaign.dial(&stack).await?;
        assert!(!dialled.is_empty(), "nobody is dialled any more: {} of {leads}", calls.len());
        calls.extend(dialled);
    }
    let began = Utc::now();
    for (nth, call) in calls.iter().enumerate() {
        let (ending, seconds) = if nth % 3 == 0 { (&BUSY, 0) } else { (&TALKED, 60) };
        campaign.carrier.keep_record(record(call, began, seconds));
        if nth % 2 == 0 {
            campaign.carrier.hangup(call, ending)?.send(&stack.intake()?).await?;
        }
    }
    let archive = close(&stack, "2027-01-15T10:00:00+05:30").await?;
    assert!(archive.len() >= invoices as usize, "{archive:?}");
    let mut highest: BTreeMap<&str, &str> = BTreeMap::new();
    for number in &archive {
        let (month, _) = number.rsplit_once('-').context("no number")?;
        highest.insert(month, number);
    }
    let highest: Vec<&str> = highest.into_values().collect();

    copy(&stack, &backup, &name).await?;
    stack.sql = stack.database.connect(Role::Owner).await?;
    answering(&stack, campaign.tenant.jwt()).await?;
    assert_eq!(stack.value("select count(*) from public.call_logs").await?, "0", "it knows nothing of them");

    let url = stack.database.url(Role::Owner).to_owned();
    let restored = || Restored::of(&url);
    run(&restored().since(since)).await?;
    assert!(campaign.dial(&stack).await?.is_empty(), "nobody is called before it knows");
    let refused = async |what: &str| -> Result<()> {
        let error = run(&restored().finish()).await.err().context("it may go on")?.to_string();
        assert!(error.contains(what), "{error}");
        Ok(())
    };
    refused("the highest numbers").await?;
    run(&restored().archive(&highest)).await?;
    refused("carrier account").await?;
    events::job(&campaign.dispatch, "records").await?;
    assert_eq!(
        stack.value("select count(*) || ' ' || count(*) filter (where call_status = 'answered') from public.call_logs where dialled").await?,
        format!("{leads} {}", leads - leads.div_ceil(3)),
    );
    assert_eq!(
        stack.value("select sum(quantity) from private.usage_events where meter_key = 'call_seconds'").await?,
        ((leads - leads.div_ceil(3)) * 60).to_string(),
        "what was talked is counted"
    );
    // That reading began while calls of before may have been under way, and so does not count as the last.
    refused("carrier account").await?;
    stack
        .sql
        .batch_execute(
            "update private.restores set settles_at = began_at;
             update private.restore_accounts set read_at = read_at - interval '1 hour'",
        )
        .await?;
    events::job(&campaign.dispatch, "records").await?;
    assert_eq!(
        stack.value("select count(*) from public.call_logs").await?,
        leads.to_string(),
        "each call is booked once"
    );
    let said = run(&restored().finish()).await?;
    assert!(said.contains("the restore is finished") && said.contains("to its end"), "{said}");

    // By the carrier's log: nobody again within the gap, and those who talked not at all.
    assert!(campaign.dial(&stack).await?.is_empty(), "within the gap");
    stack.set_clock("2026-11-24T14:00:00+05:30").await?;
    stack
        .sql
        .batch_execute("update public.call_queue set next_retry_at = private.clock_now() where status = 'queued'")
        .await?;
    let again = campaign.dial(&stack).await?;
    assert_eq!(again.len(), leads.div_ceil(3) as usize, "who was busy is called a second time");
    let mut dials: BTreeMap<String, u32> = BTreeMap::new();
    for create in campaign.carrier.creates() {
        *dials.entry(create.to).or_default() += 1;
    }
    assert!(dials.values().all(|&dials| dials <= 2), "{dials:?}");

    let numbers = close(&stack, "2027-01-15T10:00:00+05:30").await?;
    assert!(numbers.len() >= invoices as usize, "{numbers:?}");
    assert!(numbers.iter().all(|number| !archive.contains(number)), "{archive:?} and again {numbers:?}");
    Ok(())
}
