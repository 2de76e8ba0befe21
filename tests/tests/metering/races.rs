//! Many at once, and a server that dies in the middle of it: nothing is granted or counted twice, and nothing that was told is lost.

use super::{amount, chance, organization, record, subscribe};
use anyhow::{Context, Result, ensure};
use futures::future::{join_all, try_join_all};
use local::parts::{
    folder::{self, RunFolder},
    postgres::{Postgres, PostgresOptions, Role, Server},
    progress::Progress,
};
use serde_json::{Value, json};
use std::{collections::BTreeMap, fs};
use tests::{Database, database::first_column, supervisor_binary};
use tokio::{
    sync::Mutex,
    time::{Duration, sleep},
};
use tokio_postgres::Client;

/// Scenario 46.
#[tokio::test]
async fn of_sixteen_thousand_who_reserve_at_once_exactly_as_many_are_granted_as_there_is_room_for() -> Result<()> {
    const CLIENTS: i64 = 8;
    const EACH: i64 = 2_000;
    let database = Database::migrated(supervisor_binary!()).await?;
    let sql = database.connect(Role::Owner).await?;
    subscribe(&sql, 1).await?;
    let reserve =
        format!("select private.reserve_usage('{}', 'ai_calls', 1, '2026-01-10T10:00+05:30')", organization(0));
    let granted = try_join_all((0..CLIENTS).map(async |_| -> Result<i64> {
        let session = database.connect(Role::Owner).await?;
        let reserve = session.prepare(&reserve).await?;
        let mut granted = 0;
        for _ in 0..EACH {
            granted += i64::from(session.query_one(&reserve, &[]).await?.get::<_, bool>(0));
        }
        Ok(granted)
    }))
    .await?;
    assert_eq!((CLIENTS * EACH, granted.iter().sum::<i64>()), (16_000, 3_600));
    assert_eq!(first_column(&sql, "select reserved from public.usage_logs").await?, ["3600"]);
    Ok(())
}

#[tokio::test]
async fn what_is_held_is_returned_once_whoever_settles_gives_back_or_sweeps_first() -> Result<()> {
    const CLIENTS: u64 = 6;
    const EACH: u64 = 80;
    const UNITS: u64 = 10;
    const OVER: &str = "2026-01-10T10:05+05:30";
    let database = Database::migrated(supervisor_binary!()).await?;
    let sql = database.connect(Role::Owner).await?;
    subscribe(&sql, 1).await?;
    let about = |id: &str, more: Value| {
        let mut asked =
            json!({ "v": 1, "organization_id": organization(0), "source": "crm", "id": id, "type": "test_room" });
        if let (Some(asked), Value::Object(more)) = (asked.as_object_mut(), more) {
            asked.extend(more);
        }
        asked
    };
    let hold = async |session: &Client, id: &str, units: u64, at: &str| {
        let asked = about(id, json!({ "quantity": units, "seconds": 60 }));
        session.query_one("select private.hold_usage($1, $2::text::timestamptz)", &[&asked, &at]).await.is_ok()
    };

    // Of 4,800 units that are asked for at once, as many are held as there are.
    let held: Vec<Vec<String>> = try_join_all((0..CLIENTS).map(async |client| -> Result<Vec<String>> {
        let session = database.connect(Role::Owner).await?;
        let mut held = Vec::new();
        for nth in 0..EACH {
            let id = format!("{client}-{nth}");
            if hold(&session, &id, UNITS, "2026-01-10T10:00+05:30").await {
                held.push(id);
            }
        }
        Ok(held)
    }))
    .await?;
    let held = held.concat();
    assert_eq!(held.len() as u64 * UNITS, 3_600);
    assert_eq!(first_column(&sql, "select reserved from public.usage_logs").await?, ["3600"]);
    assert!(!hold(&sql, "one more", 1, "2026-01-10T10:00:59+05:30").await, "nothing is left");

    // Their time is over, and everybody comes for them.
    let mixed = |seed: u64| {
        let mut ids: Vec<(u64, String)> = (0..).map(|nth| chance(seed, nth)).zip(held.iter().cloned()).collect();
        ids.sort();
        ids.into_iter().map(|(_, id)| id).collect::<Vec<_>>()
    };
    let settling = async |seed: u64| -> Result<()> {
        let session = database.connect(Role::Owner).await?;
        for ids in mixed(seed).chunks(20) {
            let events: Vec<Value> =
                ids.iter().map(|id| json!({ "id": id, "source": "crm", "type": "test_room", "quantity": 4 })).collect();
            record(&session, 0, &events, OVER).await?;
        }
        Ok(())
    };
    let giving_back = async |seed: u64| -> Result<()> {
        let session = database.connect(Role::Owner).await?;
        for id in mixed(seed) {
            let asked = about(&id, json!({}));
            session.query_one("select private.release_usage_hold($1, $2::text::timestamptz)", &[&asked, &OVER]).await?;
        }
        Ok(())
    };
    let sweeping = async || -> Result<()> {
        let session = database.connect(Role::Owner).await?;
        for _ in 0..60 {
            session
                .query_one("select private.expire_usage_holds('{\"limit\": 5}', $1::text::timestamptz)", &[&OVER])
                .await?;
        }
        Ok(())
    };
    let (settled, again, given_back, swept) = tokio::join!(settling(1), settling(2), giving_back(3), sweeping());
    settled.and(again).and(given_back).and(swept)?;

    let left = "select usage_count || ' used, ' || reserved || ' held' from public.usage_logs";
    assert_eq!(first_column(&sql, left).await?, ["1440 used, 0 held"]);
    assert!(first_column(&sql, "select problem from private.check_usage_holds()").await?.is_empty());
    assert!(first_column(&sql, "select problem from private.check_usage()").await?.is_empty());
    assert!(hold(&sql, "the rest", 2_160, OVER).await && !hold(&sql, "one more", 1, OVER).await);
    Ok(())
}

#[tokio::test]
async fn eight_who_send_the_same_at_once_count_it_once_and_tell_of_each_line_once() -> Result<()> {
    let database = Database::migrated(supervisor_binary!()).await?;
    let sql = database.connect(Role::Owner).await?;
    subscribe(&sql, 1).await?;
    let at = "2026-01-20T10:00+05:30";
    try_join_all((0..8_u64).map(async |sender| -> Result<()> {
        let session = database.connect(Role::Owner).await?;
        for round in 0..10_u64 {
            // Half of what each sends, others send too.
            let event = |n: u64| {
                let id =
                    if n.is_multiple_of(2) { format!("shared{round}-{n}") } else { format!("own{sender}-{round}-{n}") };
                json!({ "id": id, "source": "crm", "type": "test_messages", "quantity": 1 })
            };
            let mut batch: Vec<Value> = (0..20).map(event).collect();
            batch.sort_by_key(|event| chance(sender, event["id"].as_str().map_or(0, |id| id.len() as u64)));
            record(&session, 0, &batch, at).await?;
        }
        Ok(())
    }))
    .await?;
    let expected = 10 * 10 + 8 * 10 * 10;
    assert_eq!(first_column(&sql, "select usage_count from public.usage_logs").await?, [expected.to_string()]);
    assert!(first_column(&sql, "select problem from private.check_usage()").await?.is_empty());
    assert_eq!(
        first_column(&sql, "select key from private.outbox where topic = 'usage.threshold' order by id").await?,
        ["test_messages 2026-01-01 50", "test_messages 2026-01-01 80", "test_messages 2026-01-01 100"]
    );
    Ok(())
}

/// One sender of the storm: where it stands, and what it was told.
struct Sender {
    nth: u64,
    next: u64,
    /// What was answered `stored` to whom: nobody else may be told the same.
    stored: Vec<String>,
}

const ORGANIZATIONS: u64 = 4;
const PER_BATCH: u64 = 50;
const AT: &str = "2026-01-20T10:00+05:30";

/// A batch of which half is what others send too.
fn batch(sender: u64, nth: u64) -> Vec<Value> {
    let mut events: Vec<Value> = (0..PER_BATCH)
        .map(|n| {
            let id = if n < PER_BATCH / 2 { format!("shared {nth} {n}") } else { format!("own {sender} {nth} {n}") };
            let kind = ["test_messages", "test_talk", "test_visits", "test_lines"][(n % 4) as usize];
            let quantity = if kind == "test_visits" { 1 } else { 1 + n % 90 };
            json!({ "id": id, "source": "crm", "type": kind, "quantity": quantity })
        })
        .collect();
    // In an order of its own, so that two who want the same keys want them the other way round.
    events.sort_by_key(|event| chance(sender, event["id"].as_str().map_or(0, |id| id.bytes().map(u64::from).sum())));
    events
}

/// Sends until the server is gone or everything was sent; what was not answered is sent again by the next call.
async fn send(client: &Client, sender: &mut Sender, batches: u64) -> Result<()> {
    while sender.next < batches {
        let events = batch(sender.nth, sender.next);
        let organization = sender.next % ORGANIZATIONS;
        let statuses = record(client, organization, &events, AT).await?;
        ensure!(statuses.iter().all(|status| ["stored", "duplicate"].contains(&status.as_str())), "{statuses:?}");
        for (event, _) in events.iter().zip(&statuses).filter(|(_, status)| *status == "stored") {
            sender.stored.push(format!("{organization} {}", event["id"]));
        }
        sender.next += 1;
    }
    Ok(())
}

#[tokio::test]
async fn a_server_that_dies_in_the_middle_of_a_storm_has_lost_nothing_that_it_answered_and_counted_nothing_twice()
-> Result<()> {
    const SENDERS: u64 = 6;
    let batches = 20 + amount(4_000);
    // A server of its own, which nobody else is connected to, and which keeps what it was told.
    let run = RunFolder::create()?;
    let server = Server::find(&Progress::hidden()).await?;
    let options = PostgresOptions { durable: true, max_connections: 40, settings: Vec::new() };
    let postgres = Postgres::start(&server, &run, run.path(), &options).await?;
    let owner = postgres.connect(Role::Owner, "postgres").await?;
    let mut migrations: Vec<_> = fs::read_dir(folder::workspace()?.join("supabase/migrations"))?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    migrations.sort();
    for file in migrations {
        let sql = format!("begin; {} commit;", fs::read_to_string(&file)?);
        owner.batch_execute(&sql).await.with_context(|| file.display().to_string())?;
    }
    subscribe(&owner, ORGANIZATIONS).await?;
    drop(owner);

    let senders: Vec<Mutex<Sender>> =
        (0..SENDERS).map(|nth| Mutex::new(Sender { nth, next: 0, stored: Vec::new() })).collect();
    for deaths in 0..3_u64 {
        let clients = try_join_all((0..SENDERS).map(|_| postgres.connect(Role::Owner, "postgres"))).await?;
        let storm = join_all(clients.iter().zip(&senders).map(async |(client, sender)| {
            let mut sender = sender.lock().await;
            // Before the last death nobody has come to an end.
            let _gone = send(client, &mut sender, batches).await;
        }));
        let watch = postgres.connect(Role::Owner, "postgres").await?;
        let wanted = (deaths + 1) * batches * SENDERS / 5;
        let death = async {
            // In the middle of it: so many batches are there, and others are under way.
            loop {
                let there: i64 = watch
                    .query_one("select count(*) / $1::bigint from private.usage_keys", &[&(PER_BATCH as i64 / 2)])
                    .await?
                    .get(0);
                if there.unsigned_abs() >= wanted * 6 / 7 {
                    return postgres.crash_and_restart().await;
                }
                sleep(Duration::from_millis(2)).await;
            }
        };
        let (_, died) = tokio::join!(storm, death);
        died?;
        let sql = postgres.connect(Role::Owner, "postgres").await?;
        assert!(first_column(&sql, "select problem from private.check_usage()").await?.is_empty(), "death {deaths}");
    }
    ensure!(
        join_all(senders.iter().map(async |sender| sender.lock().await.next)).await.iter().any(|next| *next < batches),
        "the storm was over before the last death"
    );
    let clients = try_join_all((0..SENDERS).map(|_| postgres.connect(Role::Owner, "postgres"))).await?;
    try_join_all(clients.iter().zip(&senders).map(async |(client, sender)| {
        let mut sender = sender.lock().await;
        send(client, &mut sender, batches).await
    }))
    .await?;

    let sql = postgres.connect(Role::Owner, "postgres").await?;
    assert!(first_column(&sql, "select problem from private.check_usage()").await?.is_empty());
    let expected = batches * (PER_BATCH / 2) * (1 + SENDERS);
    for table in ["private.usage_keys", "private.usage_events"] {
        assert_eq!(
            first_column(&sql, &format!("select count(*) from {table}")).await?,
            [expected.to_string()],
            "{table}"
        );
    }
    let mut told: BTreeMap<String, u64> = BTreeMap::new();
    for sender in &senders {
        for id in &sender.lock().await.stored {
            *told.entry(id.clone()).or_default() += 1;
        }
    }
    assert!(told.values().all(|times| *times == 1), "an event was stored twice");
    postgres.stop().await
}
