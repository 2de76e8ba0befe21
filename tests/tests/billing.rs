//! What is billed: each period once, for what was used.

use anyhow::{Context, Result};
use local::parts::postgres::Role;
use serde_json::{Value, json};
use tests::{
    Database, Fingerprint, Stack,
    callbacks::TALKED,
    events::{self, HttpEvent},
    proxy::Trouble,
    scene::{self, Campaign, Tenant},
    supervisor_binary,
};
use tokio::task::JoinSet;

const INVOICES: &str = "/functions/v1/invoice-generation/invoices";
/// The periods that began on the 24th of November are over.
const AFTER_A_MONTH: &str = "2026-12-24T00:05:00+05:30";

/// A tenant on a plan with a minute included, with so many calls of a minute, after its period's end.
async fn after_calls(count: u32) -> Result<(Stack, Campaign)> {
    let stack = Stack::start(supervisor_binary!()).await?;
    let campaign = scene::running_campaign(&stack, &scene::phones(1, count)).await?;
    scene::buy_plan(&stack, &campaign.tenant, 60).await?;
    let intake = stack.intake()?;
    for call in campaign.dial(&stack).await? {
        assert_eq!(campaign.carrier.hangup(&call, &TALKED)?.send(&intake).await?.status, 200);
    }
    stack.set_clock(AFTER_A_MONTH).await?;
    Ok((stack, campaign))
}

async fn close(stack: &Stack) -> Result<(u64, u64)> {
    let answer = events::job(&stack.invoicing()?, "close_periods").await?;
    let count = |key: &str| answer[key].as_u64().with_context(|| format!("{key} of {answer}"));
    Ok((count("closed")?, count("invoices")?))
}

async fn get(stack: &Stack, tenant: &Tenant, path: &str) -> Result<events::Answer> {
    HttpEvent::get(path).bearer(tenant.jwt()).send(&stack.invoicing()?).await
}

async fn only_invoice(stack: &Stack, tenant: &Tenant) -> Result<Value> {
    let list = get(stack, tenant, INVOICES).await?.json();
    let list = list["invoices"].as_array().context("a list")?;
    assert_eq!(list.len(), 1, "{list:?}");
    let id = list[0]["id"].as_str().context("an id")?;
    let shown = get(stack, tenant, &format!("{INVOICES}/{id}")).await?;
    assert_eq!(shown.status, 200, "{}", shown.body);
    Ok(shown.json())
}

#[tokio::test]
async fn an_invoice_has_what_was_used_and_adds_up() -> Result<()> {
    let (stack, campaign) = after_calls(4).await?;
    close(&stack).await?;
    let invoice = only_invoice(&stack, &campaign.tenant).await?;
    let line = |kind: &str, meter: Value| -> Result<Value> {
        let lines = invoice["lines"].as_array().context("lines")?;
        lines
            .iter()
            .find(|line| line["kind"] == kind && line["meter_key"] == meter)
            .cloned()
            .with_context(|| format!("{kind} {meter} in {invoice:#}"))
    };
    // Four calls of a minute, one minute included, 6 rupees for each of the other three.
    assert_eq!(line("base", Value::Null)?["amount_minor"], 99_900);
    assert_eq!(line("included", json!("ai_calls"))?["quantity"], 4);
    let overage = line("overage", json!("call_seconds"))?;
    assert_eq!((&overage["quantity"], &overage["amount_minor"]), (&json!(180), &json!(1_800)));
    let used: i64 = stack
        .value("select sum(quantity) from private.usage_events where meter_key = 'call_seconds'")
        .await?
        .parse()?;
    let included = line("included", json!("call_seconds"))?;
    assert_eq!(
        included["quantity"].as_i64().zip(overage["quantity"].as_i64()).map(|(a, b)| a + b),
        Some(used),
        "lines are the usage"
    );

    let sum = |list: &str| -> i64 {
        invoice[list].as_array().into_iter().flatten().filter_map(|row| row["amount_minor"].as_i64()).sum()
    };
    assert_eq!((sum("lines"), invoice["subtotal_minor"].as_i64()), (101_700, Some(101_700)));
    // 18 % between two states: 18,306 paise.
    assert_eq!((sum("taxes"), invoice["tax_minor"].as_i64()), (18_306, Some(18_306)));
    assert_eq!(invoice["total_minor"], 120_006);
    assert_eq!(
        (&invoice["first_day"], &invoice["last_day"], &invoice["currency"]),
        (&json!("2026-11-24"), &json!("2026-12-23"), &json!("INR"))
    );
    assert_eq!((&invoice["invoice_number"], &invoice["status"]), (&json!("INV-202612-00001"), &json!("open")));
    Ok(())
}

#[tokio::test]
async fn a_period_closes_once_however_often_and_by_however_many() -> Result<()> {
    let (stack, campaign) = after_calls(2).await?;
    let (one, other, third) = tokio::join!(close(&stack), close(&stack), close(&stack));
    let runs = [one?, other?, third?];
    assert_eq!(runs.iter().map(|run| run.1).sum::<u64>(), 1, "{runs:?}");
    let before = Fingerprint::of(&stack.sql).await?;
    assert_eq!(close(&stack).await?, (0, 0));
    before.assert_same(&Fingerprint::of(&stack.sql).await?);
    only_invoice(&stack, &campaign.tenant).await?;
    Ok(())
}

#[tokio::test]
async fn a_period_does_not_close_before_its_end() -> Result<()> {
    let (stack, campaign) = after_calls(1).await?;
    stack.set_clock("2026-12-23T23:50:00+05:30").await?;
    assert_eq!(close(&stack).await?, (0, 0));
    assert_eq!(get(&stack, &campaign.tenant, INVOICES).await?.json(), json!({ "invoices": [] }));
    Ok(())
}

#[tokio::test]
async fn a_lost_answer_closes_nothing_twice() -> Result<()> {
    let (stack, campaign) = after_calls(1).await?;
    stack.proxy.make(Trouble::LoseNextAnswer("/rpc/close_periods"));
    close(&stack).await?;
    only_invoice(&stack, &campaign.tenant).await?;
    Ok(())
}

#[tokio::test]
async fn a_run_that_breaks_off_leaves_no_gap_and_no_half_invoice() -> Result<()> {
    let (stack, campaign) = after_calls(1).await?;
    stack
        .sql
        .batch_execute(
            "create function private.break() returns trigger language plpgsql as $$ begin raise 'out of paper'; end $$;
             create trigger break after insert on private.outbox for each row when (new.topic = 'invoice.finalized') execute function private.break()",
        )
        .await?;
    let before = Fingerprint::of(&stack.sql).await?;
    assert!(close(&stack).await.is_err(), "the schedule's retry sees a failure");
    before.assert_same(&Fingerprint::of(&stack.sql).await?);
    stack.sql.batch_execute("drop trigger break on private.outbox").await?;
    close(&stack).await?;
    assert_eq!(only_invoice(&stack, &campaign.tenant).await?["invoice_number"], "INV-202612-00001");
    Ok(())
}

#[tokio::test]
async fn missed_periods_are_billed_one_by_one() -> Result<()> {
    let (stack, campaign) = after_calls(2).await?;
    stack.set_clock("2027-02-24T00:05:00+05:30").await?;
    let (_, invoices) = close(&stack).await?;
    assert_eq!(invoices, 3);
    let list = get(&stack, &campaign.tenant, INVOICES).await?.json();
    let rows = list["invoices"].as_array().context("a list")?;
    let days: Vec<_> = rows
        .iter()
        .filter_map(|row| {
            Some((row["first_day"].as_str()?, row["last_day"].as_str()?, row["subtotal_minor"].as_i64()?))
        })
        .collect();
    assert_eq!(
        days,
        [
            ("2027-01-24", "2027-02-23", 99_900),
            ("2026-12-24", "2027-01-23", 99_900),
            ("2026-11-24", "2026-12-23", 100_500)
        ],
        "the newest first; the calls are in the period in which they ended"
    );
    Ok(())
}

#[tokio::test]
async fn what_costs_nothing_makes_no_invoice() -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    stack.set_clock(scene::TUESDAY_TEN).await?;
    let tenant = scene::sign_up(&stack, "On Trial").await?;
    stack.set_clock(AFTER_A_MONTH).await?;
    assert_eq!(close(&stack).await?, (1, 0));
    assert_eq!(get(&stack, &tenant, INVOICES).await?.json(), json!({ "invoices": [] }));
    Ok(())
}

#[tokio::test]
async fn invoices_are_the_caller_s_own() -> Result<()> {
    let (stack, campaign) = after_calls(1).await?;
    stack.set_clock("2026-11-24T10:30:00+05:30").await?;
    let other = scene::sign_up(&stack, "Other Ltd").await?;
    scene::buy_plan(&stack, &other, 60).await?;
    let third = scene::sign_up(&stack, "Third Ltd").await?;
    stack.set_clock(AFTER_A_MONTH).await?;
    close(&stack).await?;
    let (mine, theirs) = (only_invoice(&stack, &campaign.tenant).await?, only_invoice(&stack, &other).await?);
    let mut numbers = [&mine, &theirs].map(|invoice| invoice["invoice_number"].as_str().unwrap_or_default().to_owned());
    numbers.sort();
    assert_eq!(numbers, ["INV-202612-00001", "INV-202612-00002"]);
    for (tenant, invoice) in [(&campaign.tenant, &mine), (&other, &theirs)] {
        assert_eq!(invoice["organization_id"], json!(tenant.id));
    }
    assert_eq!(get(&stack, &third, INVOICES).await?.json(), json!({ "invoices": [] }));
    let id = mine["id"].as_str().unwrap_or_default();
    for ending in ["", ".json", ".html"] {
        let foreign = get(&stack, &other, &format!("{INVOICES}/{id}{ending}")).await?;
        foreign.assert_error_at(404, "not_found", "id");
        let unknown = get(&stack, &other, &format!("{INVOICES}/{}{ending}", uuid::Uuid::new_v4())).await?;
        assert_eq!(unknown.body, foreign.body, "nobody can tell it from one that does not exist");
    }
    HttpEvent::get(INVOICES).send(&stack.invoicing()?).await?.assert_error_at(401, "unauthorized", "authorization");
    let mut expired = stack.keys.user_claims(other.owner.id, &other.owner.email);
    expired.exp -= 2 * 24 * 3_600;
    let expired = stack.keys.sign(&expired)?;
    HttpEvent::get(INVOICES).bearer(&expired).send(&stack.invoicing()?).await?.assert_error(401, "invalid_token");
    Ok(())
}

#[tokio::test]
async fn an_invoice_is_a_page_too() -> Result<()> {
    let (stack, campaign) = after_calls(4).await?;
    close(&stack).await?;
    let invoice = only_invoice(&stack, &campaign.tenant).await?;
    let id = invoice["id"].as_str().context("an id")?;
    let page = get(&stack, &campaign.tenant, &format!("{INVOICES}/{id}.html")).await?;
    assert_eq!((page.status, page.headers["content-type"].as_str()), (200, Some("text/html; charset=utf-8")));
    for told in ["INV-202612-00001", "Acme Homes", "1,200.06", "</html>"] {
        assert!(page.body.contains(told), "{told} in {}", page.body);
    }
    let asked = HttpEvent::get(&format!("{INVOICES}/{id}")).bearer(campaign.tenant.jwt()).header("accept", "text/html");
    assert_eq!(asked.send(&stack.invoicing()?).await?.body, page.body);
    let other_form = get(&stack, &campaign.tenant, &format!("{INVOICES}/{id}.exe")).await?;
    other_form.assert_error_at(404, "not_found", "id");
    Ok(())
}

const SUBSCRIPTIONS: &str = "/functions/v1/invoice-generation/subscriptions";

#[tokio::test]
async fn a_subscription_is_changed_as_it_was_shown_and_by_those_who_may() -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    let campaign = scene::running_campaign(&stack, &scene::phones(1, 1)).await?;
    let tenant = &campaign.tenant;
    scene::buy_plan(&stack, tenant, 60).await?;
    stack
        .sql
        .batch_execute(
            "insert into public.subscription_plans (slug, name) values ('more', 'More');
             select private.set_plan_price('more', 'monthly', 'INR', '{\"base_minor\": 299900}', private.clock_now())",
        )
        .await?;
    let invoicing = stack.invoicing()?;
    let send = async |path: &str, body: Value| -> Result<events::Answer> {
        HttpEvent::post(path).bearer(tenant.jwt()).json(&body)?.send(&invoicing).await
    };
    // Half of the thirty days that began on the 24th of November.
    stack.set_clock("2026-12-09T00:00:00+05:30").await?;
    let before = Fingerprint::of(&stack.sql).await?;
    let preview = send(&format!("{INVOICES}/preview"), json!({ "plan": "more" })).await?;
    assert_eq!(preview.status, 200, "{}", preview.body);
    before.assert_same(&Fingerprint::of(&stack.sql).await?);
    let preview = preview.json();
    assert_eq!(preview["change"]["credit_minor"], -49_950, "{preview:#}");
    assert_eq!(preview["change"]["charge_minor"], 149_950);
    let page = HttpEvent::post(&format!("{INVOICES}/preview")).bearer(tenant.jwt()).header("accept", "text/html");
    let page = page.json(&json!({ "plan": "more" }))?.send(&invoicing).await?;
    assert!(
        page.body.contains("Unused time on Talk, 9\u{a0}December\u{a0}2026 to 23\u{a0}December\u{a0}2026"),
        "{}",
        page.body
    );

    let changed = send(&format!("{SUBSCRIPTIONS}/change"), json!({ "plan": "more" })).await?;
    assert_eq!((changed.status, &changed.json()["result"]), (200, &json!("changed")), "{}", changed.body);
    let again = send(&format!("{SUBSCRIPTIONS}/change"), json!({ "plan": "more" })).await?;
    assert_eq!(again.json()["result"], "unchanged", "{}", again.body);
    stack.set_clock(AFTER_A_MONTH).await?;
    assert_eq!(close(&stack).await?, (1, 1));
    let invoice = only_invoice(&stack, tenant).await?;
    assert_eq!(invoice["subtotal_minor"], 199_900, "{invoice:#}");
    for field in ["subtotal_minor", "tax_minor", "total_minor", "first_day", "last_day"] {
        assert_eq!(preview[field], invoice[field], "{field}");
    }

    let paused = send(&format!("{SUBSCRIPTIONS}/pause"), json!({})).await?;
    assert_eq!(paused.json()["subscription"]["status"], "paused", "{}", paused.body);
    let resumed = send(&format!("{SUBSCRIPTIONS}/resume"), json!({})).await?;
    assert_eq!(resumed.json()["subscription"]["status"], "active", "{}", resumed.body);
    let ending = send(&format!("{SUBSCRIPTIONS}/cancel"), json!({ "reason": "moving" })).await?;
    assert_eq!(ending.json()["result"], "cancelling", "{}", ending.body);
    let shown = get(&stack, tenant, SUBSCRIPTIONS).await?.json();
    assert_eq!(shown["subscription"]["cancel_at_period_end"], true, "{shown:#}");

    send(&format!("{SUBSCRIPTIONS}/change"), json!({})).await?.assert_error_at(400, "malformed_request", "plan");
    send(&format!("{SUBSCRIPTIONS}/upgrade"), json!({})).await?.assert_error(404, "not_found");
    HttpEvent::post(&format!("{SUBSCRIPTIONS}/cancel")).send(&invoicing).await?.assert_error_at(
        401,
        "unauthorized",
        "authorization",
    );
    get(&stack, tenant, &format!("{SUBSCRIPTIONS}/cancel")).await?.assert_error(405, "method_not_allowed");
    Ok(())
}

/// Twelve at once, five times.
#[tokio::test]
async fn a_coupon_is_redeemed_exactly_as_often_as_it_may_be() -> Result<()> {
    let database = Database::migrated(supervisor_binary!()).await?;
    let owner = database.connect(Role::Owner).await?;
    owner
        .batch_execute(
            "insert into public.subscription_plans (slug, name) values ('couponed', 'Couponed');
             select private.set_plan_price('couponed', 'monthly', 'INR', '{\"base_minor\": 1000}', '2026-01-01');
             insert into public.organizations (id, name)
             select ('00000000-0000-4000-8000-0000000079' || lpad(n::text, 2, '0'))::uuid, 'Couponed ' || n from generate_series(1, 12) as n;
             select private.subscribe_organization(id, 'couponed', 'active', '2026-01-01', 'monthly')
             from public.organizations where name like 'Couponed %';
             select private.set_coupon('FIVE', '{\"name\": \"Five\", \"percent_bp\": 1000, \"max_redemptions\": 5}', '2026-01-01')",
        )
        .await?;
    let mut redeeming = JoinSet::new();
    for n in 1..=12 {
        let client = database.connect(Role::Owner).await?;
        redeeming.spawn(async move {
            let ask = format!(
                "select private.apply_coupon('00000000-0000-4000-8000-0000000079{n:02}', 'FIVE', '2026-01-02')"
            );
            client.query(&ask, &[]).await.is_ok()
        });
    }
    let redeemed = redeeming.join_all().await.into_iter().filter(|redeemed| *redeemed).count();
    assert_eq!(redeemed, 5);
    let row = owner
        .query_one(
            "select (select redeemed from private.coupons where code = 'FIVE'),
               (select count(*) from private.discounts where coupon_code = 'FIVE')",
            &[],
        )
        .await?;
    assert_eq!((row.get::<_, i32>(0), row.get::<_, i64>(1)), (5, 5));
    Ok(())
}
