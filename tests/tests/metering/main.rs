//! Metering that is exact: however a stream of events is cut, repeated, mixed up or late, it is counted and billed the same.

mod browser;
mod held;
mod races;

use anyhow::{Context, Result};
use local::parts::postgres::Role;
use serde_json::{Value, json};
use tests::{
    Database, Stack,
    database::first_column,
    events::{HttpEvent, invoke, job},
    scene, supervisor_binary,
};
use tokio_postgres::Client;

const FUNCTION: &str = "/functions/v1/usage-metering";
/// A plan of 1,000 a month that includes 100 messages, sells three more for 7, refuses calls beyond 3,600, and sells what other kinds of
/// meters make of their events for 1.
const PLAN: &str = "
    insert into private.billing_issuer (legal_name, state_code, country_code, timezone) values ('Issuer', 'KA', 'IN', 'Asia/Kolkata')
    on conflict do nothing;
    insert into public.meters (key, name, unit, aggregation, rounding, pulse)
    values ('test_messages', 'Test messages', 'message', 'sum', 'none', 1), ('test_talk', 'Talk', 'second', 'sum', 'event', 60),
      ('test_month', 'Talk of a month', 'second', 'sum', 'period', 60), ('test_visits', 'Visits', 'visit', 'count', 'none', 1),
      ('test_lines', 'Lines', 'line', 'max', 'none', 1), ('test_visitors', 'Visitors', 'visitor', 'unique', 'none', 1),
      ('test_seats', 'Seats', 'seat', 'latest', 'none', 1), ('test_room', 'Room', 'unit', 'sum', 'none', 1);
    insert into public.subscription_plans (id, slug, name) values ('00000000-0000-4000-a000-000000000001', 'test-exact', 'Exact');
    insert into public.plan_prices (id, plan_id, version, base_minor)
    values ('00000000-0000-4000-b000-000000000001', '00000000-0000-4000-a000-000000000001', 1, 1000);
    insert into public.plan_price_meters (plan_price_id, meter_key, included_units, overage_price_minor, overage_unit, limit_units, hard)
    values ('00000000-0000-4000-b000-000000000001', 'test_messages', 100, 7, 3, null, false),
      ('00000000-0000-4000-b000-000000000001', 'ai_calls', 3600, null, 1, 3600, true),
      ('00000000-0000-4000-b000-000000000001', 'test_room', 3600, null, 1, 3600, true);
    insert into public.plan_price_meters (plan_price_id, meter_key, included_units, overage_price_minor)
    select '00000000-0000-4000-b000-000000000001', key, 0, 1 from public.meters
    where key in ('test_talk', 'test_month', 'test_visits', 'test_lines', 'test_visitors', 'test_seats');";

/// Numbers that look like chance and are the same every time.
fn chance(seed: u64, nth: u64) -> u64 {
    let mut mixed = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ nth.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

fn organization(n: u64) -> String {
    format!("00000000-0000-4000-8000-{n:012}")
}

async fn subscribe(sql: &Client, organizations: u64) -> Result<()> {
    sql.batch_execute(PLAN).await?;
    for n in 0..organizations {
        let id = organization(n);
        sql.batch_execute(&format!(
            "insert into public.organizations (id, name, timezone, country_code, state_code) values ('{id}', 'Exact {n}', 'Asia/Kolkata', 'IN', 'KA');
             select private.subscribe_organization('{id}', 'test-exact', 'active', '2026-01-01T10:00+05:30')"
        ))
        .await?;
    }
    Ok(())
}

async fn record(sql: &Client, organization: u64, events: &[Value], at: &str) -> Result<Vec<String>> {
    let request = json!({ "v": 1, "organization_id": self::organization(organization), "events": events });
    let row = sql.query_one("select private.record_usage($1, $2::text::timestamptz)", &[&request, &at]).await?;
    let answer: Value = row.get(0);
    let results = answer["results"].as_array().context("results")?;
    Ok(results.iter().filter_map(|result| result["status"].as_str().map(str::to_owned)).collect())
}

async fn close(sql: &Client, at: &str) -> Result<()> {
    sql.query_one("select private.close_periods('{}', $1::text::timestamptz)", &[&at]).await?;
    Ok(())
}

/// Two months of events of every kind of meter, and corrections of every eighth.
fn stream(events: u64) -> (Vec<Value>, Vec<Value>) {
    const KINDS: [&str; 7] =
        ["test_messages", "test_talk", "test_month", "test_visits", "test_lines", "test_visitors", "test_seats"];
    let kind = |n: u64| KINDS[(n % 7) as usize];
    let event = |n: u64| {
        let hour = chance(7, n) % (31 * 24);
        let (day, hour) = (hour / 24, hour % 24);
        let mut event = json!({
            "id": format!("e{n}"), "source": "crm", "type": kind(n), "quantity": 1 + chance(8, n) % 90,
            "time": format!("2026-{:02}-{:02}T{hour:02}:30:00Z", 1 + day / 28, 1 + day % 28),
        });
        match kind(n) {
            "test_visits" => event["quantity"] = json!(1),
            "test_visitors" => {
                event["quantity"] = Value::Null;
                event["value"] = json!(format!("visitor {}", chance(9, n) % 12));
            }
            _ => {}
        }
        event
    };
    // Of seven kinds, every eighth is of each in turn.
    let fix = |n: u64| json!({ "id": format!("f{n}"), "source": "crm", "type": kind(n), "quantity": -1, "corrects": format!("e{n}") });
    ((0..events).map(event).collect(), (0..events).step_by(8).map(fix).collect())
}

/// How much of what takes long: a hundredth of it in CI, all with `METERING=full`.
fn amount(whole: u64) -> u64 {
    if std::env::var("METERING").is_ok_and(|asked| asked == "full") { whole } else { whole / 100 }
}

#[tokio::test]
async fn a_stream_that_is_cut_repeated_mixed_up_and_late_counts_and_costs_the_same() -> Result<()> {
    let ways = 5 + amount(100);
    let database = Database::migrated(supervisor_binary!()).await?;
    let sql = database.connect(Role::Owner).await?;
    subscribe(&sql, ways).await?;
    let (events, fixes) = stream(300);
    let (mut on_time, mut late) = (Vec::new(), Vec::new());
    for way in 0..ways {
        // The first way is the plain one: in order, nothing twice, nothing late.
        let mut order: Vec<(u64, &Value)> = (0..).zip(&events).collect();
        if way > 0 {
            order.sort_by_key(|(nth, _)| chance(way, *nth));
            let twice: Vec<(u64, &Value)> =
                order.iter().filter(|(nth, _)| chance(way + 10, *nth).is_multiple_of(3)).copied().collect();
            order.extend(twice);
        }
        let (behind, before): (Vec<_>, Vec<_>) =
            order.into_iter().partition(|(nth, _)| way > 0 && chance(way + 20, *nth).is_multiple_of(4));
        let (fixed_behind, fixed): (Vec<_>, Vec<_>) = (0..)
            .zip(&fixes)
            .partition(|(nth, _): &(u64, &Value)| way > 0 && !chance(way + 30, *nth).is_multiple_of(3));
        // What is corrected has to be there: the corrections of what is late are late too.
        let known: Vec<&Value> = before.iter().map(|(_, event)| &event["id"]).collect();
        let (fixed, waits): (Vec<_>, Vec<_>) =
            fixed.into_iter().partition(|(_, fix)| known.contains(&&fix["corrects"]));
        on_time.push((way, before, fixed));
        late.push((way, behind, [fixed_behind, waits].concat()));
    }
    for (at, deliveries) in [("2026-03-01T00:30+05:30", on_time), ("2026-03-05T10:00+05:30", late)] {
        for (way, events, fixes) in deliveries {
            for part in [events, fixes] {
                let mut rest: Vec<Value> = part.into_iter().map(|(_, event)| event.clone()).collect();
                while !rest.is_empty() {
                    let size = (1 + chance(way + 40, rest.len() as u64) as usize % 40).min(rest.len());
                    let batch: Vec<Value> = rest.drain(..size).collect();
                    let statuses = record(&sql, way, &batch, at).await?;
                    assert!(
                        statuses.iter().all(|status| ["stored", "duplicate"].contains(&status.as_str())),
                        "{statuses:?}"
                    );
                }
            }
        }
        close(&sql, "2026-03-01T01:00+05:30").await?;
    }
    close(&sql, "2026-04-01T01:00+05:30").await?;

    let totals = async |way: u64| -> Result<Vec<String>> {
        let id = organization(way);
        first_column(
            &sql,
            &format!(
                "select string_agg(meter_key || ' ' || day || ' ' || quantity || ' ' || events, ', ' order by meter_key, day) from public.usage_days where organization_id = '{id}'
                 union all select string_agg(feature_key || ' ' || period_start || ' ' || usage_count, ', ' order by feature_key, period_start)
                   from public.usage_logs where organization_id = '{id}' and usage_count > 0
                 union all select sum(amount_minor)::text from public.invoice_lines where organization_id = '{id}'"
            ),
        )
        .await
    };
    let plain = totals(0).await?;
    println!("{plain:?}");
    for way in 1..ways {
        assert_eq!(totals(way).await?, plain, "way {way}");
        let adjusted = first_column(
            &sql,
            &format!(
                "select count(*) from public.invoice_lines where kind = 'adjustment' and organization_id = '{}'",
                organization(way)
            ),
        )
        .await?;
        assert_ne!(adjusted, ["0"], "something was late");
    }
    assert_eq!(
        first_column(&sql, "select count(*) from private.usage_adjustments where settled_at is null").await?,
        ["0"]
    );
    assert!(first_column(&sql, "select problem from private.check_usage()").await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn usage_is_read_day_by_day_and_as_a_page() -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    stack.set_clock(scene::TUESDAY_TEN).await?;
    let tenant = scene::sign_up(&stack, "Acme Homes").await?;
    let other = scene::sign_up(&stack, "Other Ltd").await?;
    let metering = stack.metering()?;
    let key = scene::create_api_key(&stack, &tenant).await?;
    let event = |id: &str, quantity: i64| json!({ "id": id, "source": "crm", "type": "agent_tokens", "data": { "quantity": quantity } });
    let sent = HttpEvent::post(&format!("{FUNCTION}/usage/events"))
        .bearer(&key)
        .json(&json!([event("a", 30), event("b", 4)]))?;
    sent.send(&metering).await?;
    let mut fix = event("c", -4);
    fix["corrects"] = json!("a");
    let fixed = HttpEvent::post(&format!("{FUNCTION}/usage/events")).bearer(&key).json(&fix)?.send(&metering).await?;
    assert_eq!(fixed.json()["status"], "stored", "{}", fixed.body);
    fix["data"]["quantity"] = json!(-40);
    fix["id"] = json!("d");
    let refused = HttpEvent::post(&format!("{FUNCTION}/usage/events")).bearer(&key).json(&fix)?.send(&metering).await?;
    refused.assert_error_at(422, "correction_too_large", "data.quantity");

    let get = |path: &str| HttpEvent::get(&format!("{FUNCTION}/{path}"));
    let daily = get("usage/daily?from=2026-11-01&to=2026-11-30&meter=agent_tokens")
        .bearer(tenant.jwt())
        .send(&metering)
        .await?;
    assert_eq!(
        daily.json()["days"],
        json!([{ "day": "2026-11-24", "meter": "agent_tokens", "quantity": 30, "events": 3 }]),
        "{}",
        daily.body
    );
    let csv = get("usage/daily.csv?meter=agent_tokens").bearer(tenant.jwt()).send(&metering).await?;
    assert_eq!((csv.status, csv.body.as_str()), (200, "day,meter,quantity,events\r\n2026-11-24,agent_tokens,30,3\r\n"));
    let theirs = get("usage/daily").bearer(other.jwt()).header("accept", "text/csv").send(&metering).await?;
    assert_eq!(theirs.body, "day,meter,quantity,events\r\n", "nobody sees another's");
    get("usage/daily?from=yesterday").bearer(tenant.jwt()).send(&metering).await?.assert_error_at(
        400,
        "malformed_request",
        "from",
    );
    get("usage/daily?from=2026-02-01&to=2026-01-01").bearer(tenant.jwt()).send(&metering).await?.assert_error_at(
        400,
        "invalid_request",
        "from",
    );
    get("usage/daily?meter=pigeons").bearer(tenant.jwt()).send(&metering).await?.assert_error_at(
        400,
        "invalid_request",
        "meter",
    );
    for path in ["usage/daily", "usage.html"] {
        get(path).send(&metering).await?.assert_error_at(401, "unauthorized", "authorization");
    }

    let page = get("usage")
        .bearer(tenant.jwt())
        .header("accept", "text/html,application/xhtml+xml,*/*;q=0.8")
        .send(&metering)
        .await?;
    assert!(
        page.body.starts_with("<!doctype html>")
            && page.body.contains("30 tokens")
            && page.body.contains("of 50 calls"),
        "{}",
        page.body
    );
    assert_eq!(page.body, get("usage.html").bearer(tenant.jwt()).send(&metering).await?.body);
    browser::assert_fits(&page.body).await?;
    Ok(())
}

#[tokio::test]
async fn usage_from_the_queue_counts_as_from_the_api_and_what_is_refused_stays_there() -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    stack.set_clock(scene::TUESDAY_TEN).await?;
    let tenant = scene::sign_up(&stack, "Acme Homes").await?;
    let metering = stack.metering()?;
    let event = |id: &str, kind: &str| json!({ "id": id, "source": "agent", "type": kind, "data": { "quantity": 5 } });
    let message = |id: &str, body: &Value| json!({ "messageId": id, "body": body.to_string(), "eventSource": "aws:sqs", "attributes": {} });
    let of = |events: Value| json!({ "v": 1, "kind": "usage", "organization_id": tenant.id, "events": events });
    let batch = json!({ "Records": [
        message("good", &of(json!([event("a", "agent_tokens"), event("b", "recording_seconds")]))),
        message("again", &of(json!([event("a", "agent_tokens")]))),
        message("half", &of(json!([event("c", "agent_tokens"), event("d", "pigeons")]))),
        message("nobody", &json!({ "v": 1, "organization_id": "00000000-0000-4000-8000-000000000000", "events": [event("a", "agent_tokens")] })),
        message("newer", &json!({ "v": 9, "organization_id": tenant.id, "events": [event("e", "agent_tokens")] })),
    ] });
    let failed = json!({ "batchItemFailures": [{ "itemIdentifier": "half" }, { "itemIdentifier": "nobody" }, { "itemIdentifier": "newer" }] });
    assert_eq!(invoke(&metering, batch.clone()).await?, failed);
    assert_eq!(invoke(&metering, batch).await?, failed);
    assert_eq!(
        stack
            .value(
                "select string_agg(feature_key || ' ' || usage_count, ', ' order by feature_key) from public.usage_logs"
            )
            .await?,
        "agent_tokens 10, recording_seconds 5"
    );
    Ok(())
}

#[tokio::test]
async fn whose_usage_does_not_add_up_is_not_billed_and_all_others_are() -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    subscribe(&stack.sql, 3).await?;
    for n in 0..3 {
        record(
            &stack.sql,
            n,
            &[json!({ "id": "a", "source": "crm", "type": "test_messages", "quantity": 5 })],
            "2026-01-05T10:00+05:30",
        )
        .await?;
    }
    let metering = stack.metering()?;
    assert_eq!(job(&metering, "reconcile_usage").await?, json!({ "wrong": [], "held": 0 }));
    // A key without its event: no bill would have shown it.
    stack
        .sql
        .batch_execute(&format!(
            "update private.usage_keys set quantity = 6 where organization_id = '{}'",
            organization(1)
        ))
        .await?;
    let found = job(&metering, "reconcile_usage").await?;
    assert_eq!(
        found,
        json!({ "wrong": [{ "organization_id": organization(1), "problems": ["test_messages in all: 5 by events, 6 by keys"] }], "held": 1 })
    );
    assert_eq!(job(&metering, "reconcile_usage").await?["held"], 0, "it is told once");
    assert_eq!(stack.value("select count(*) from private.outbox where topic = 'billing.held'").await?, "1");
    close(&stack.sql, "2026-02-01T01:00+05:30").await?;
    assert_eq!(
        stack.value("select count(*) || ' ' || count(distinct organization_id) from public.invoices").await?,
        "2 2"
    );
    // Counted is it all the same, and lifted only when it is mended.
    record(
        &stack.sql,
        1,
        &[json!({ "id": "b", "source": "crm", "type": "test_messages", "quantity": 1 })],
        "2026-01-06T10:00+05:30",
    )
    .await?;
    let lift = format!("select private.lift_billing_hold('{}', 'mended by hand', now())", organization(1));
    assert!(stack.sql.batch_execute(&lift).await.is_err(), "it is still wrong");
    stack
        .sql
        .batch_execute(&format!(
            "update private.usage_keys set quantity = 5 where organization_id = '{}' and key = 'a'",
            organization(1)
        ))
        .await?;
    assert_eq!(stack.value(&lift).await?, "t");
    close(&stack.sql, "2026-02-01T02:00+05:30").await?;
    assert_eq!(stack.value("select count(*) from public.invoices").await?, "3");
    Ok(())
}
