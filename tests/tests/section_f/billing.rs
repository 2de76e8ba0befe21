//! Experiments 2, 12, 20, 22 and 23: numbers without a gap, credit and quotas that are never overspent, money that is counted once.

use crate::world::{Answer, World, count, gives, meet, refused};
use anyhow::Result;
use futures::future::{join_all, try_join_all};

const NUMBERS: &str =
    "select string_agg(right(invoice_number, 5)::integer::text, ' ' order by invoice_number) from public.invoices";

#[tokio::test]
async fn f02_of_two_invoices_at_once_the_second_waits_for_the_first_one_s_number() -> Result<()> {
    let world = World::with("select scene.draft(1), scene.draft(2)").await?;
    let answers = world.meet("select scene.open(1)", "select scene.open(2)").await?;
    assert_eq!(answers, (gives("1"), gives("2")));
    Ok(())
}

#[tokio::test]
async fn f02_an_invoice_that_is_not_made_after_all_gives_its_number_to_the_next() -> Result<()> {
    let world = World::with("select scene.draft(1), scene.draft(2)").await?;
    let (first, second) = (world.session().await?, world.session().await?);
    first.done("begin").await?;
    assert_eq!(first.run("select scene.open(1)").await, gives("1"));
    let waiting = second.start("select scene.open(2)");
    waiting.waits_for(&first).await?;
    first.done("rollback").await?;
    assert_eq!(waiting.ends().await?, gives("1"));
    Ok(())
}

#[tokio::test]
async fn f02_sixteen_sessions_of_invoices_some_of_them_undone_leave_no_gap_and_no_double() -> Result<()> {
    let world = World::with("select scene.draft(n, 1 + n % 2) from generate_series(1, 48) as n").await?;
    let made = world.crowd((0..16).map(|session| {
        let invoices = (1..=3).map(|n| format!("begin; select scene.open({}); ", session * 3 + n));
        invoices.zip(0..).map(|(open, n)| open + if (session + n) % 4 == 0 { "rollback;" } else { "commit;" }).collect()
    }));
    assert!(made.await?.iter().all(Result::is_ok));
    let wanted: Vec<_> = (1..=36).map(|number| number.to_string()).collect();
    assert_eq!(world.is(NUMBERS).await?, wanted.join(" "));
    Ok(())
}

#[tokio::test]
async fn f02_a_number_comes_neither_from_what_is_left_nor_from_what_is_seen() -> Result<()> {
    let world =
        World::with("select scene.draft(n, case n when 4 then 2 else 1 end) from generate_series(1, 4) as n").await?;
    world.is("select scene.open(1), scene.open(2)").await?;
    assert_eq!(
        world.session().await?.run("delete from public.invoices where id = scene.id('e000', 2)").await,
        refused("23514")
    );
    let dropped = "delete from public.invoice_lines where invoice_id = scene.id('e000', 3); delete from public.invoices where id = scene.id('e000', 3)";
    world.is(dropped).await?;
    // Far sees none of Near's: its first invoice is number 3 all the same.
    let far = world.session_of_owner(2).await?;
    assert_eq!(far.done("select count(*) from public.invoices").await?, "0");
    assert_eq!(world.is("select scene.open(4)").await?, "3");
    assert_eq!(far.done("select right(invoice_number, 5) from public.invoices").await?, "00003");
    let forged = "insert into public.invoices (organization_id) values (scene.id('8000', 2))";
    assert_eq!(far.run(forged).await, refused("42501"));
    Ok(())
}

#[tokio::test]
async fn f12_of_two_usage_periods_that_overlap_at_once_one_is_made() -> Result<()> {
    let world = World::new().await?;
    let period = |from: &str, to: &str| {
        format!(
            "insert into public.usage_logs (organization_id, feature_key, period_start, period_end)
             values (scene.id('8000', 1), 'ai_calls', '{from}', '{to}') returning 'made'"
        )
    };
    let answers = world.meet(&period("2026-01-01", "2026-02-01"), &period("2026-01-31", "2026-03-01")).await?;
    assert_eq!(answers, (gives("made"), refused("23P01")));
    assert_eq!(world.session().await?.run(&period("2026-03-02", "2026-03-01")).await, refused("23514"));
    Ok(())
}

#[tokio::test]
async fn f20_of_two_debits_of_25_from_39_at_once_one_is_taken() -> Result<()> {
    let world = World::with("select scene.credit(39)").await?;
    let answers = world.meet("select scene.debit(25, 'one')", "select scene.debit(25, 'two')").await?;
    assert_eq!(answers, (gives("25"), gives("0")));
    assert_eq!(world.is("select balance_minor from public.call_credits").await?, "14");
    Ok(())
}

#[tokio::test]
async fn f20_the_same_debit_twice_at_once_is_taken_once() -> Result<()> {
    let world = World::with("select scene.credit(39)").await?;
    let answers = world.meet("select scene.debit(10, 'one')", "select scene.debit(10, 'one')").await?;
    assert_eq!(answers, (gives("10"), gives("10")), "both are told what was taken");
    assert_eq!(world.is("select balance_minor from public.call_credits").await?, "29");
    Ok(())
}

#[tokio::test]
async fn f20_sixteen_debits_at_once_take_no_more_than_there_is() -> Result<()> {
    let world = World::with("select scene.credit(57)").await?;
    // Five of ten, then what is left: none is taken twice, none is below zero.
    let whole = world.crowd((0..16).map(|n| format!("select scene.debit(10, 'whole-{n}')"))).await?;
    assert_eq!((count(&whole, "10"), count(&whole, "0")), (5, 11), "{whole:?}");
    let partial = world.crowd((0..16).map(|n| format!("select scene.debit(5, 'partial-{n}', true)"))).await?;
    assert_eq!((count(&partial, "5"), count(&partial, "2"), count(&partial, "0")), (1, 1, 14), "{partial:?}");
    assert_eq!(world.is("select balance_minor || ' ' || total_consumed_minor from public.call_credits").await?, "0 57");
    assert_eq!(world.is("select count(*) from private.check_credit()").await?, "0");
    Ok(())
}

#[tokio::test]
async fn f20_a_purchase_that_is_told_twice_at_once_is_credit_once() -> Result<()> {
    let world = World::new().await?;
    // The wallet is not there yet either.
    let (first, second) = world.meet("select scene.credit(10)", "select scene.credit(10)").await?;
    assert_eq!(first, second, "both are told the same transaction");
    assert_eq!(world.is("select balance_minor from public.call_credits").await?, "10");
    Ok(())
}

#[tokio::test]
async fn f20_of_two_refunds_at_once_no_more_is_given_back_than_was_taken() -> Result<()> {
    let world = World::with("select scene.credit(10); select scene.debit(10, 'call')").await?;
    let refund = |key: &str| {
        format!(
            "select private.refund_credit(organization_id, id, 6, '{key}', private.clock_now()) is not null
             from public.credit_transactions where idempotency_key = 'call'"
        )
    };
    assert_eq!(world.meet(&refund("one"), &refund("two")).await?, (gives("t"), refused("refund_too_large")));
    assert_eq!(world.is("select balance_minor from public.call_credits").await?, "6");
    Ok(())
}

#[tokio::test]
async fn f20_the_last_unit_of_a_quota_is_held_once() -> Result<()> {
    let world = World::with("select scene.subscribe(1, 'five')").await?;
    let hold = |units: u8| {
        format!("select private.reserve_usage(scene.id('8000', 1), 'ai_calls', {units}, private.clock_now())")
    };
    assert_eq!(world.is(&hold(4)).await?, "t");
    assert_eq!(world.meet(&hold(1), &hold(1)).await?, (gives("t"), gives("f")));
    assert_eq!(world.is("select scene.usage(1)").await?, "ai_calls 0+5");
    world.is("select private.release_usage(scene.id('8000', 1), 'ai_calls', 5, private.clock_now())").await?;
    let held = world.crowd((0..16).map(|_| hold(1))).await?;
    assert_eq!((count(&held, "t"), count(&held, "f")), (5, 11), "{held:?}");
    Ok(())
}

#[tokio::test]
async fn f20_sixteen_sessions_of_calls_on_a_plan_of_five_make_five() -> Result<()> {
    let world = World::with(
        "select scene.subscribe(1, 'five'); select scene.campaign(1, variadic array(select generate_series(1, 40)))",
    )
    .await?;
    // Two campaigns, so that no limit of a campaign's is what holds them.
    world.is("select scene.campaign(1, variadic array(select generate_series(41, 80)))").await?;
    let released = world.crowd((0..16).map(|_| "select scene.release()".to_owned())).await?;
    let calls = |answers: &[Answer]| -> usize {
        answers.iter().flatten().filter(|told| *told != "none").map(|told| told.split(' ').count()).sum()
    };
    assert_eq!(calls(&released), 5, "{released:?}");
    assert_eq!(world.is("select scene.usage(1)").await?, "ai_calls 0+5");
    // Some ring out and give their unit back while others look for one: used and held are never more than five.
    let numbers =
        world.is("select string_agg(scene.number(callee_number)::text, ' ' order by id) from public.call_logs").await?;
    let numbers: Vec<_> = numbers.split(' ').collect();
    world.is(&format!("select scene.begin_dials(1, {})", numbers.join(", "))).await?;
    let mut busy: Vec<_> = numbers
        .iter()
        .zip(0..)
        .map(|(number, n)| format!("select scene.hang_up({number}, '{}')", if n < 3 { "answered" } else { "busy" }))
        .collect();
    let look = "delete from private.dispatch_holds; select scene.release()";
    busy.extend((0..8).map(|_| look.to_owned()));
    let mixed = world.crowd(busy).await?;
    assert!(mixed.iter().all(Result::is_ok), "{mixed:?}");
    world.is(look).await?;
    assert_eq!(world.is("select scene.usage(1)").await?, "ai_calls 3+2, call_seconds 90+0");
    assert_eq!(world.is("select count(*) from public.call_logs where status <> 'ended'").await?, "2");
    Ok(())
}

#[tokio::test]
async fn f20_the_last_seat_is_given_once() -> Result<()> {
    let world = World::with("select scene.subscribe(1, 'plenty')").await?;
    // Three seats, one of them the owner's.
    let invite = |name: &str| format!("select public.create_invitation('{name}@example.com') ->> 'email'");
    let (one, other) = (world.session_of_owner(1).await?, world.session_of_owner(1).await?);
    one.done(&invite("first")).await?;
    let answers = meet(&one, &invite("second"), &other, &invite("third")).await?;
    assert_eq!(answers, (gives("second@example.com"), refused("quota_exhausted")));
    Ok(())
}

#[tokio::test]
async fn f20_the_last_place_of_a_plan_is_given_once() -> Result<()> {
    let world = World::with(
        "update public.subscription_plans set features = features || '{\"max_leads\": 1}' where slug = 'plenty';
         select scene.subscribe(1, 'plenty')",
    )
    .await?;
    let add = "insert into public.leads (organization_id, name) values (scene.id('8000', 1), 'x') returning name";
    assert_eq!(world.meet(add, add).await?, (gives("x"), refused("quota_exhausted")));
    assert_eq!(world.is("select count(*) from public.leads").await?, "1");
    Ok(())
}

#[tokio::test]
async fn f20_of_twenty_users_who_add_at_once_one_gets_the_last_place_of_each_kind() -> Result<()> {
    let world = World::with(
        "update public.subscription_plans
         set features = '{\"max_users\": 4, \"max_leads\": 3, \"max_projects\": 3, \"max_campaigns\": 3, \"max_stores\": 3}'
         where slug = 'plenty';
         select scene.subscribe(1, 'plenty');
         insert into public.projects (id, organization_id, name)
         select scene.id('d000', n), scene.id('8000', 1), 'Project ' || n from generate_series(1, 2) as n;
         insert into public.campaigns (organization_id, project_id, name)
         select scene.id('8000', 1), scene.id('d000', 1), 'Campaign ' || n from generate_series(1, 2) as n;
         insert into public.leads (organization_id, name) select scene.id('8000', 1), 'Lead ' || n from generate_series(1, 2) as n;
         insert into public.stores (organization_id, name, domain, platform, currency_code)
         values (scene.id('8000', 1), 'Second', 'second.example.com', 'shopify', 'USD');
         insert into auth.users (id, email)
         select scene.id('c200', n), 'user' || n || '@example.com' from generate_series(1, 22) as n;
         update public.profiles set organization_id = scene.id('8000', 1) where id in (scene.id('c200', 21), scene.id('c200', 22))",
    )
    .await?;
    let kinds: [(&str, &dyn Fn(u8) -> String); 5] = [
        ("leads", &|n| {
            format!(
                "insert into public.leads (organization_id, name) values (scene.id('8000', 1), 'x{n}') returning 'in'"
            )
        }),
        ("projects", &|n| {
            format!(
                "insert into public.projects (organization_id, name) values (scene.id('8000', 1), 'x{n}') returning 'in'"
            )
        }),
        ("campaigns", &|n| {
            format!(
                "insert into public.campaigns (organization_id, project_id, name)
                 values (scene.id('8000', 1), scene.id('d000', 1), 'x{n}') returning 'in'"
            )
        }),
        ("stores", &|n| {
            format!(
                "insert into public.stores (organization_id, name, domain, platform, currency_code)
                 values (scene.id('8000', 1), 'x', 'x{n}.example.com', 'shopify', 'USD') returning 'in'"
            )
        }),
        ("users", &|n| {
            format!(
                "update public.profiles set organization_id = scene.id('8000', 1) where id = scene.id('c200', {n}) returning 'in'"
            )
        }),
    ];
    for (kind, add) in kinds {
        let answers = world.crowd((1..=20).map(add)).await?;
        let refused = answers.iter().filter(|answer| **answer == refused("quota_exhausted")).count();
        assert_eq!((count(&answers, "in"), refused), (1, 19), "{kind}: {answers:?}");
        let there = format!("select private.count_standing(scene.id('8000', 1), '{kind}', null)");
        assert_eq!(world.is(&there).await?, if kind == "users" { "4" } else { "3" }, "{kind}");
        // One goes, and one place is there again.
        if kind == "leads" {
            world
                .is("update public.leads set archived_at = now() where id = (select id from public.leads limit 1)")
                .await?;
            let answers = world.crowd((21..=40).map(add)).await?;
            assert_eq!(count(&answers, "in"), 1, "{answers:?}");
        }
    }
    Ok(())
}

/// The period that began with the subscription, on the 24th of November, is over.
const AFTER_A_MONTH: &str = "'2026-12-24 00:05+05:30'";

#[tokio::test]
async fn f22_two_who_close_the_same_period_at_once_make_one_invoice() -> Result<()> {
    let world = World::with("select scene.subscribe(1, 'metered')").await?;
    let close = format!("select scene.close_periods({AFTER_A_MONTH})");
    let (first, second) = (world.session().await?, world.session().await?);
    first.done("begin").await?;
    assert_eq!(first.run(&close).await, gives("1 closed, 1 invoices"));
    // What somebody is closing is theirs: nobody waits for it.
    assert_eq!(second.run(&close).await, gives("0 closed, 0 invoices"));
    first.done("commit").await?;
    assert_eq!(second.run(&close).await, gives("0 closed, 0 invoices"));
    assert_eq!(world.is(NUMBERS).await?, "1");
    Ok(())
}

#[tokio::test]
async fn f22_sixteen_who_close_three_months_of_two_organizations_make_six_invoices() -> Result<()> {
    let world = World::with("select scene.subscribe(1, 'metered'), scene.subscribe(2, 'metered')").await?;
    let closed =
        world.crowd((0..16).map(|_| "select scene.close_periods('2027-02-24 00:05+05:30')".to_owned())).await?;
    assert!(closed.iter().all(Result::is_ok), "{closed:?}");
    let periods = "select count(*) || ' ' || count(distinct (subscription_id, period_start)) || ' ' || min(last_day + 1 - first_day) from public.invoices";
    assert_eq!(world.is(periods).await?, "6 6 30");
    assert_eq!(world.is(NUMBERS).await?, "1 2 3 4 5 6");
    assert_eq!(world.is("select scene.told('invoice.finalized')").await?, "6");
    Ok(())
}

#[tokio::test]
async fn f22_eight_runners_of_which_some_give_up_and_some_die_bill_every_period_once() -> Result<()> {
    // Forty organizations have missed three periods.
    let world = World::with(
        "insert into public.organizations (id, name, state_code) select scene.id('8000', n), 'Org ' || n, 'KA' from generate_series(11, 50) as n;
         select scene.subscribe(n, 'metered') from generate_series(11, 50) as n",
    )
    .await?;
    let close = "select answer ->> 'closed' from private.close_periods('{\"v\": 1, \"limit\": 5}', '2027-02-24 00:05+05:30') as answer";
    let sessions = try_join_all((0..8 * 6).map(|_| world.session())).await?;
    let mut runners: Vec<Vec<_>> = (0..8).map(|_| Vec::new()).collect();
    for (place, session) in sessions.into_iter().enumerate() {
        runners[place % 8].push(session);
    }
    // Each runner begins anew after every end, as a handler does; how it ends looks like chance and is the same in every run.
    let ends = join_all(runners.into_iter().zip(1_u64..).map(|(runs, runner)| async move {
        let (mut committed, mut lost) = (0, 0);
        for (session, run) in runs.into_iter().zip(1_u64..) {
            session.done("begin").await?;
            let closed: u32 = session.done(close).await?.parse()?;
            match (runner * 7 + run * 11 + run * runner) % 5 {
                0 => {
                    session.done("rollback").await?;
                    lost += closed;
                }
                1 => {
                    session.dies().await?;
                    lost += closed;
                }
                _ => {
                    session.done("commit").await?;
                    committed += closed;
                }
            }
        }
        anyhow::Ok((committed, lost))
    }))
    .await;
    let (mut committed, mut lost) = (0, 0);
    for end in ends {
        let (kept, gone) = end?;
        committed += kept;
        lost += gone;
    }
    assert!(committed > 0 && lost > 0, "{committed} periods were closed, {lost} given up");
    // Whoever comes next finishes what is left.
    let mut last = 0;
    loop {
        let closed: u32 = world.is(close).await?.parse()?;
        if closed == 0 {
            break;
        }
        last += closed;
    }
    assert_eq!(committed + last, 120);
    let made = "select count(*) || ' ' || count(distinct (subscription_id, period_start)) || ' ' || count(distinct invoice_number) || ' '
                || min(right(invoice_number, 5)) || ' ' || max(right(invoice_number, 5)) from public.invoices";
    assert_eq!(world.is(made).await?, "120 120 120 00001 00120", "no period twice, no number missing");
    let per = "select string_agg(distinct periods, ', ') from (
                 select string_agg(first_day::text, ' ' order by first_day) as periods from public.invoices group by subscription_id) as each";
    assert_eq!(world.is(per).await?, "2026-11-24 2026-12-24 2027-01-24", "no period missed");
    assert_eq!(world.is("select scene.told('invoice.finalized')").await?, "120");
    assert_eq!(world.is("select last_number from private.invoice_series").await?, "120");
    Ok(())
}

/// What is billed of seconds, period by period, and what is counted of them in all.
const BILLED: &str = "select coalesce((select string_agg(quantity::text, ' ' order by invoice_id) from public.invoice_lines where meter_key = 'call_seconds' and kind = 'included'), '-')
                      || ' of ' || (select sum(quantity) from public.usage_days where meter_key = 'call_seconds')";

#[tokio::test]
async fn f22_what_is_used_in_a_period_s_last_moment_is_waited_for_and_billed_in_it() -> Result<()> {
    let world =
        World::with("select scene.subscribe(1, 'metered'); select scene.use(10, 'before', private.clock_now())")
            .await?;
    let last = "select scene.use(7, 'last', '2026-12-23 23:59:59.999+05:30')";
    let answers = world.meet(last, &format!("select scene.close_periods({AFTER_A_MONTH})")).await?;
    assert_eq!(answers, (gives(""), gives("1 closed, 1 invoices")));
    assert_eq!(world.is(BILLED).await?, "17 of 17");
    Ok(())
}

#[tokio::test]
async fn f22_what_comes_while_its_period_is_being_closed_counts_in_it_and_is_billed_later() -> Result<()> {
    let world =
        World::with("select scene.subscribe(1, 'metered'); select scene.use(10, 'before', private.clock_now())")
            .await?;
    let late = "select private.count_usage(scene.id('8000', 1), array['test'], array['late'], array['call_seconds'], array[7], array[timestamptz '2026-12-23 23:59+05:30'], '2026-12-24 00:05+05:30')";
    let answers = world.meet(&format!("select scene.close_periods({AFTER_A_MONTH})"), late).await?;
    assert_eq!(answers, (gives("1 closed, 1 invoices"), gives("")));
    assert_eq!(world.is(BILLED).await?, "10 of 17");
    // The boundary itself belongs to the period that it begins.
    world.is("select scene.use(5, 'boundary', '2026-12-24 00:00+05:30')").await?;
    world.is("select scene.close_periods('2027-01-24 00:05+05:30')").await?;
    let billed = "select string_agg(line.quantity::text, ' ' order by invoice.period_start) from public.invoice_lines as line
                  join public.invoices as invoice on invoice.id = line.invoice_id where line.meter_key = 'call_seconds' and line.kind = 'included'";
    assert_eq!(world.is(billed).await?, "10 5");
    let late = "select count(*) || ' ' || sum(quantity) || ' ' || bool_and(settled_at is not null) from private.usage_adjustments";
    assert_eq!(world.is(late).await?, "1 7 true");
    Ok(())
}

#[tokio::test]
async fn f23_the_same_payment_told_twice_at_once_is_applied_once() -> Result<()> {
    // Whether it was known before or not.
    for before in ["select 1", "select scene.pay('pay_1', 'authorized')"] {
        let world = World::with("select scene.draft(1); select scene.open(1)").await?;
        world.is(before).await?;
        let captured = "select scene.pay('pay_1', 'captured')";
        assert_eq!(world.meet(captured, captured).await?, (gives("applied"), gives("duplicate")), "{before}");
        assert_eq!(world.is("select scene.invoice(1)").await?, "paid, 1000 paid");
        assert_eq!(world.is("select scene.told('invoice.paid')").await?, "1");
        assert_eq!(world.is("select count(*) from public.audit_logs where action = 'payment.captured'").await?, "1");
    }
    Ok(())
}

#[tokio::test]
async fn f23_two_payments_of_one_invoice_at_once_pay_it_once_and_the_other_is_told() -> Result<()> {
    let world = World::with("select scene.draft(1); select scene.open(1)").await?;
    let answers = world.meet("select scene.pay('pay_1', 'captured')", "select scene.pay('pay_2', 'captured')").await?;
    assert_eq!(answers, (gives("applied"), gives("unmatched")));
    assert_eq!(world.is("select scene.invoice(1)").await?, "paid, 1000 paid");
    assert_eq!(world.is("select scene.told('payment.unmatched')").await?, "1");
    Ok(())
}

#[tokio::test]
async fn f23_a_failure_that_comes_with_or_after_the_capture_takes_nothing_back_and_a_wrong_amount_pays_nothing()
-> Result<()> {
    let world = World::with("select scene.draft(n), scene.open(n) from generate_series(1, 2) as n").await?;
    let answers = world.meet("select scene.pay('pay_1', 'captured')", "select scene.pay('pay_1', 'failed')").await?;
    assert_eq!(answers, (gives("applied"), gives("ignored")));
    assert_eq!(world.is("select scene.invoice(1)").await?, "paid, 1000 paid");
    // Every story of a payment, told by all at once.
    let stories = ["pending", "authorized", "failed", "captured", "failed", "captured", "authorized", "pending"];
    let told = world.crowd(stories.map(|news| format!("select scene.pay('pay_2', '{news}', 1000, 2)"))).await?;
    assert!(told.iter().all(Result::is_ok), "{told:?}");
    assert_eq!(world.is("select scene.invoice(2)").await?, "paid, 1000 paid");
    assert_eq!(world.is("select scene.told('invoice.paid')").await?, "2");

    world.is("select scene.draft(3); select scene.open(3)").await?;
    assert_eq!(world.is("select scene.pay('pay_3', 'captured', 999, 3)").await?, "unmatched");
    assert_eq!(world.is("select scene.invoice(3)").await?, "open, 0 paid");
    Ok(())
}

#[tokio::test]
async fn f23_of_two_refunds_at_once_no_more_is_paid_back_than_was_paid() -> Result<()> {
    let world =
        World::with("select scene.draft(1); select scene.open(1); select scene.pay('pay_1', 'captured')").await?;
    let refund = |name: &str| {
        format!(
            r#"select public.record_refund('{{"v": 1, "gateway": "razorpay", "refund_id": "{name}", "payment_id": "pay_1", "status": "processed",
               "amount_minor": 600, "currency": "INR"}}') ->> 'result'"#
        )
    };
    assert_eq!(world.meet(&refund("rf_1"), &refund("rf_2")).await?, (gives("applied"), gives("conflict")));
    assert_eq!(world.meet(&refund("rf_1"), &refund("rf_1")).await?, (gives("duplicate"), gives("duplicate")));
    assert_eq!(world.is("select refunded_minor from public.payments").await?, "600");
    Ok(())
}
