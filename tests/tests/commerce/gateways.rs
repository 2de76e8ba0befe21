//! Stripe and Razorpay.

use super::*;

/// What an invoice of the fixtures is called.
fn invoice(n: usize) -> String {
    format!("00000000-0000-4000-e000-{n:012}")
}

impl Stand {
    /// Six open invoices of 2359, and an organization that payment methods belong to.
    async fn bills(&self) -> Result<()> {
        let organization = self.tenant.id;
        self.stack
            .sql
            .batch_execute(&format!(
                "insert into private.billing_issuer (legal_name, state_code, country_code, timezone) values ('Issuer', 'KA', 'IN', 'Asia/Kolkata')
                 on conflict do nothing;
                 insert into public.organizations (id, name) values ('00000000-0000-4000-8000-000000000001', 'Payer');
                 do $$ begin for n in 1..6 loop
                   insert into public.invoices (id, organization_id, currency, period_start, period_end, timezone, first_day, last_day, subtotal_minor,
                     tax_minor, total_minor, issuer, customer)
                   values (('00000000-0000-4000-e000-' || lpad(n::text, 12, '0'))::uuid, '{organization}', 'INR', '2026-01-01', '2026-02-01', 'Asia/Kolkata',
                     '2026-01-01', '2026-01-31', 2359, 0, 2359, '{{\"timezone\": \"Asia/Kolkata\"}}', '{{}}');
                   insert into public.invoice_lines (organization_id, invoice_id, position, kind, description, quantity, unit, unit_price_minor, amount_minor)
                   values ('{organization}', ('00000000-0000-4000-e000-' || lpad(n::text, 12, '0'))::uuid, 1, 'base', 'Line', 1, 'month', 2359, 2359);
                   update public.invoices set status = 'open', finalized_at = now() where id = ('00000000-0000-4000-e000-' || lpad(n::text, 12, '0'))::uuid;
                 end loop; end $$;
                 select private.open_payment(jsonb_build_object('v', 1, 'gateway', 'razorpay', 'order_id', 'order_1', 'invoice_id', '{}'), now());
                 select private.open_payment(jsonb_build_object('v', 1, 'gateway', 'stripe', 'order_id', 'cs_1', 'invoice_id', '{}'), now());
                 select private.open_payment(jsonb_build_object('v', 1, 'gateway', 'stripe', 'order_id', 'cs_2', 'invoice_id', '{}'), now());",
                invoice(5), invoice(3), invoice(4)
            ))
            .await
            .context("the bills")
    }

    async fn stripe(&self, name: &str, result: &str) -> Result<()> {
        let event = stripe(self.stripe, &delivery("stripe", name)?);
        self.expect(&event, result).await.with_context(|| name.to_owned())
    }

    async fn razorpay(&self, name: &str, result: &str) -> Result<()> {
        let event = razorpay(self.razorpay, &delivery("razorpay", name)?);
        self.expect(&event, result).await.with_context(|| name.to_owned())
    }

    async fn bill(&self, n: usize) -> Result<String> {
        self.value(&format!(
            "select status || ' ' || amount_paid_minor from public.invoices where id = '{}'",
            invoice(n)
        ))
        .await
    }

    async fn payment(&self, id: &str) -> Result<String> {
        self.value(&format!(
            "select concat_ws(' ', status, amount_minor, currency, applied_minor, refunded_minor, failure_code, dispute_status)
             from public.payments where '{id}' in (gateway_payment_id, gateway_order_id)"
        ))
        .await
    }
}

#[tokio::test]
async fn every_event_of_stripe_changes_the_row_that_it_names() -> Result<()> {
    let stand = Stand::start().await?;
    stand.bills().await?;
    stand.stripe("payment_intent_processing", "applied").await?;
    assert_eq!(stand.payment("pi_1").await?, "pending 2359 INR 0 0");
    stand.stripe("payment_intent_payment_failed", "applied").await?;
    assert_eq!(stand.payment("pi_1").await?, "failed 2359 INR 0 0 insufficient_funds");
    stand.stripe("payment_intent_succeeded", "applied").await?;
    assert_eq!(
        (stand.payment("pi_1").await?, stand.bill(1).await?),
        ("captured 2359 INR 2359 0".into(), "paid 2359".into())
    );
    stand.stripe("payment_intent_canceled", "applied").await?;
    assert_eq!(stand.payment("pi_2").await?, "failed 2359 INR 0 0 abandoned");
    stand.stripe("payment_intent_amount_capturable_updated", "applied").await?;
    assert_eq!(stand.payment("pi_3").await?, "authorized 2359 INR 0 0");
    stand.stripe("checkout_session_completed", "applied").await?;
    assert_eq!(
        (stand.payment("cs_1").await?, stand.bill(3).await?),
        ("captured 2359 INR 2359 0".into(), "paid 2359".into())
    );
    stand.stripe("checkout_session_expired", "applied").await?;
    assert_eq!(stand.payment("cs_2").await?, "pending 2359 INR 0 0 expired");

    stand.stripe("refund_created", "applied").await?;
    let refund = "select string_agg(gateway_refund_id || ' ' || status || ' ' || amount_minor, ', ' order by gateway_refund_id) from public.refunds";
    assert_eq!(stand.value(refund).await?, "re_1 pending 359");
    stand.stripe("refund_updated", "applied").await?;
    assert_eq!(stand.value(refund).await?, "re_1 processed 359");
    assert_eq!(stand.payment("pi_1").await?, "captured 2359 INR 2359 359");
    stand.stripe("charge_refunded", "ignored").await?;
    stand.stripe("refund_failed", "applied").await?;
    assert_eq!(stand.value(refund).await?, "re_1 processed 359, re_2 failed 1000");
    stand.stripe("charge_dispute_created", "applied").await?;
    assert_eq!(stand.payment("pi_1").await?, "captured 2359 INR 2359 359 needs_response");
    stand.stripe("charge_dispute_closed", "applied").await?;
    assert_eq!(stand.payment("pi_1").await?, "captured 2359 INR 2359 359 lost");

    let method = "select concat_ws(' ', type, gateway_payment_method_id, last4, brand, expiry_month, expiry_year, is_default, removed_at is null) from public.payment_methods";
    stand.stripe("setup_intent_succeeded", "applied").await?;
    assert_eq!(stand.value(method).await?, "stripe pm_1 t t");
    stand.stripe("payment_method_attached", "applied").await?;
    assert_eq!(stand.value(method).await?, "card pm_1 4242 visa 8 2030 t t");
    stand.stripe("payment_method_detached", "applied").await?;
    assert_eq!(stand.value(method).await?, "card pm_1 4242 visa 8 2030 f f");
    Ok(())
}

#[tokio::test]
async fn every_event_of_razorpay_changes_the_row_that_it_names() -> Result<()> {
    let stand = Stand::start().await?;
    stand.bills().await?;
    stand.razorpay("refund_created", "failed").await?;
    stand.razorpay("payment_authorized", "applied").await?;
    assert_eq!(stand.payment("pay_1").await?, "authorized 2359 INR 0 0");
    stand.razorpay("payment_captured", "applied").await?;
    assert_eq!(
        (stand.payment("pay_1").await?, stand.bill(5).await?),
        ("captured 2359 INR 2359 0".into(), "paid 2359".into())
    );
    // A failure told late, a capture told twice, an authorisation told last.
    for late in ["payment_failed", "payment_captured", "payment_authorized"] {
        stand.razorpay(late, "ignored").await?;
    }
    assert_eq!(
        (stand.payment("pay_1").await?, stand.bill(5).await?),
        ("captured 2359 INR 2359 0".into(), "paid 2359".into())
    );
    stand.razorpay("order_paid", "applied").await?;
    assert_eq!(
        (stand.payment("pay_2").await?, stand.bill(6).await?),
        ("captured 2359 INR 2359 0".into(), "paid 2359".into())
    );

    stand.sweep().await?;
    let refund = "select string_agg(gateway_refund_id || ' ' || status || ' ' || amount_minor, ', ' order by gateway_refund_id) from public.refunds";
    assert_eq!(stand.value(refund).await?, "rfnd_1 pending 100", "the refund that came before its payment");
    stand.razorpay("refund_processed", "applied").await?;
    assert_eq!(
        stand.payment("pay_1").await?,
        "captured 2359 INR 2359 100",
        "the refund's amount, not the payment's beside it"
    );
    stand.razorpay("refund_created", "ignored").await?;
    stand.razorpay("refund_failed", "applied").await?;
    assert_eq!(stand.value(refund).await?, "rfnd_1 processed 100, rfnd_2 failed 200");
    stand.razorpay("payment_dispute_created", "applied").await?;
    assert_eq!(stand.payment("pay_1").await?, "captured 2359 INR 2359 100 open");
    let method = "select concat_ws(' ', type, gateway_payment_method_id, last4, brand, removed_at is null) from public.payment_methods";
    stand.razorpay("token_confirmed", "applied").await?;
    assert_eq!(stand.value(method).await?, "card token_1 1111 Visa t");
    stand.razorpay("token_cancelled", "applied").await?;
    assert_eq!(stand.value(method).await?, "card token_1 1111 Visa f");
    Ok(())
}

/// A recorded delivery under another of the names that the gateway documents for the same object.
fn renamed(gateway: &str, recorded: &str, name: &str, edits: &[(&str, Value)]) -> Result<Vec<u8>> {
    let mut body: Value = serde_json::from_slice(&delivery(gateway, recorded)?)?;
    let named = if gateway == "stripe" { "/type" } else { "/event" };
    for (place, value) in edits.iter().cloned().chain([(named, json!(name))]) {
        *body.pointer_mut(place).with_context(|| format!("{recorded} has no {place}"))? = value;
    }
    if gateway == "stripe" {
        body["id"] = json!(format!("evt_{name}"));
    }
    Ok(body.to_string().into_bytes())
}

#[tokio::test]
async fn the_other_names_of_stripe_s_events_change_the_row_too() -> Result<()> {
    let stand = Stand::start().await?;
    stand.bills().await?;
    let tell = async |recorded: &str, name: &str, edits: &[(&str, Value)]| -> Result<()> {
        let body = renamed("stripe", recorded, name, edits)?;
        stand.expect(&stripe(stand.stripe, &body), "applied").await.with_context(|| name.to_owned())
    };
    tell("checkout_session_completed", "checkout.session.async_payment_succeeded", &[]).await?;
    assert_eq!(
        (stand.payment("cs_1").await?, stand.bill(3).await?),
        ("captured 2359 INR 2359 0".into(), "paid 2359".into())
    );
    let failed = [("/data/object/payment_intent", json!("pi_cs2"))];
    tell("checkout_session_expired", "checkout.session.async_payment_failed", &failed).await?;
    assert!(stand.payment("cs_2").await?.starts_with("failed 2359 INR 0 0"), "{}", stand.payment("cs_2").await?);
    assert_eq!(stand.bill(4).await?, "open 0");
    stand.stripe("payment_intent_succeeded", "applied").await?;
    tell("refund_updated", "charge.refund.updated", &[]).await?;
    assert_eq!(stand.payment("pi_1").await?, "captured 2359 INR 2359 359");
    for (status, name) in [("under_review", "charge.dispute.updated"), ("won", "charge.dispute.funds_reinstated")] {
        tell("charge_dispute_created", name, &[("/data/object/status", json!(status))]).await?;
        assert_eq!(stand.payment("pi_1").await?, format!("captured 2359 INR 2359 359 {status}"));
    }
    let method =
        "select concat_ws(' ', type, gateway_payment_method_id, last4, expiry_year) from public.payment_methods";
    stand.stripe("setup_intent_succeeded", "applied").await?;
    for (year, name) in [(2031, "payment_method.updated"), (2032, "payment_method.automatically_updated")] {
        tell("payment_method_attached", name, &[("/data/object/card/exp_year", json!(year))]).await?;
        assert_eq!(stand.value(method).await?, format!("card pm_1 4242 {year}"));
    }
    Ok(())
}

#[tokio::test]
async fn the_other_names_of_razorpay_s_events_change_the_row_too() -> Result<()> {
    let stand = Stand::start().await?;
    stand.bills().await?;
    let tell = async |recorded: &str, name: &str, edits: &[(&str, Value)]| -> Result<()> {
        let body = renamed("razorpay", recorded, name, edits)?;
        stand.expect(&razorpay(stand.razorpay, &body), "applied").await.with_context(|| name.to_owned())
    };
    stand.razorpay("payment_captured", "applied").await?;
    tell("refund_created", "refund.speed_changed", &[]).await?;
    let refund =
        "select string_agg(gateway_refund_id || ' ' || status || ' ' || amount_minor, ', ') from public.refunds";
    assert_eq!(stand.value(refund).await?, "rfnd_1 pending 100");
    for (status, at) in [("under_review", 1_795_600_000), ("lost", 1_795_600_001)] {
        let edits = [("/payload/dispute/entity/status", json!(status)), ("/created_at", json!(at))];
        tell("payment_dispute_created", &format!("payment.dispute.{status}"), &edits).await?;
        assert!(stand.payment("pay_1").await?.ends_with(status), "{}", stand.payment("pay_1").await?);
    }
    for (id, name) in [("token_8", "token.rejected"), ("token_9", "token.expired")] {
        let kept =
            format!("select removed_at is null from public.payment_methods where gateway_payment_method_id = '{id}'");
        let edits = [("/payload/token/entity/id", json!(id))];
        tell("token_confirmed", "token.confirmed", &edits).await?;
        assert_eq!(stand.value(&kept).await?, "t");
        tell("token_cancelled", name, &edits).await?;
        assert_eq!(stand.value(&kept).await?, "f", "{name}");
    }
    Ok(())
}

#[tokio::test]
async fn a_payment_s_events_in_any_order_and_twice_pay_once() -> Result<()> {
    const NAMES: [&str; 4] = ["payment_authorized", "payment_captured", "payment_failed", "refund_processed"];
    for order in orders(NAMES.len()).into_iter().step_by(5) {
        let stand = Stand::start().await?;
        stand.bills().await?;
        for step in order.iter().chain(&order) {
            let event = razorpay(stand.razorpay, &delivery("razorpay", NAMES[*step])?);
            assert_eq!(event.send(&stand.intake).await?.status, 200);
        }
        stand.sweep().await?;
        assert_eq!(stand.payment("pay_1").await?, "captured 2359 INR 2359 100", "{order:?}");
        assert_eq!(stand.bill(5).await?, "paid 2359", "{order:?}");
    }
    Ok(())
}

/// The body of an event with other words in it.
fn changed(name: &str, from: &str, to: &str) -> Result<Vec<u8>> {
    let body = String::from_utf8(delivery("razorpay", name)?)?;
    assert!(body.contains(from), "{name} has no {from}");
    Ok(body.replacen(from, to, 1).into_bytes())
}

#[tokio::test]
async fn money_that_does_not_fit_pays_nothing_and_is_told() -> Result<()> {
    let stand = Stand::start().await?;
    stand.bills().await?;
    let cases = [
        ("another amount", r#""amount":2359"#, r#""amount":2358"#, "amount_differs"),
        ("another currency", r#""currency":"INR""#, r#""currency":"USD""#, "currency_differs"),
    ];
    for (number, (what, from, to, problem)) in cases.into_iter().enumerate() {
        let body = String::from_utf8(changed("order_paid", from, to)?)?
            .replace("pay_2", &format!("pay_x{number}"))
            .replace("order_2", &format!("order_x{number}"));
        stand.expect(&razorpay(stand.razorpay, body.as_bytes()), "applied").await?;
        assert_eq!(stand.bill(6).await?, "open 0", "{what}");
        let kept = format!("select problem from public.payments where gateway_payment_id = 'pay_x{number}'");
        assert_eq!(stand.value(&kept).await?, problem, "{what}");
    }
    assert_eq!(stand.value("select count(*) from private.outbox where topic = 'payment.unmatched'").await?, "2");
    let nobody = changed("order_paid", "00000000-0000-4000-e000-000000000006", "00000000-0000-4000-e000-000000000099")?;
    assert_eq!(
        razorpay(stand.razorpay, &nobody).send(&stand.intake).await?.status,
        202,
        "an invoice that is not there"
    );
    Ok(())
}

#[tokio::test]
async fn an_organization_s_own_source_says_nothing_of_money() -> Result<()> {
    let stand = Stand::start().await?;
    stand.bills().await?;
    let make = HttpEvent::post("/functions/v1/webhook-intake/sources")
        .bearer(stand.tenant.jwt())
        .json(&json!({ "provider": "stripe", "secret": SECRET }))?;
    let made = make.send(&stand.intake).await?;
    let Some(id) = made.json()["id"].as_str().map(str::to_owned) else {
        assert_eq!(made.status, 422, "{}", made.body);
        return Ok(());
    };
    let event = stripe(id.parse()?, &delivery("stripe", "payment_intent_succeeded")?);
    assert_eq!(event.send(&stand.intake).await?.status, 202);
    assert_eq!(stand.bill(1).await?, "open 0");
    Ok(())
}

#[tokio::test]
async fn stripe_s_own_minor_units_become_those_of_the_standard() -> Result<()> {
    let stand = Stand::start().await?;
    stand.bills().await?;
    for (currency, at_stripe, ours) in
        [("isk", 500, "5"), ("ugx", 1_000, "10"), ("mga", 7, "700"), ("jpy", 500, "500"), ("kwd", 1_230, "1230")]
    {
        let body = String::from_utf8(delivery("stripe", "payment_intent_succeeded")?)?
            .replace("evt_payment_intent_succeeded", &format!("evt_{currency}"))
            .replace("pi_1", &format!("pi_{currency}"))
            .replace("\"inr\"", &format!("\"{currency}\""))
            .replace("2359", &at_stripe.to_string());
        stand.expect(&stripe(stand.stripe, body.as_bytes()), "applied").await?;
        let kept = format!("select amount_minor from public.payments where gateway_payment_id = 'pi_{currency}'");
        assert_eq!(stand.value(&kept).await?, ours, "{currency}");
    }
    Ok(())
}

#[tokio::test]
async fn an_old_signature_of_stripe_s_is_refused() -> Result<()> {
    let stand = Stand::start().await?;
    let body = delivery("stripe", "payment_intent_succeeded")?;
    let now = chrono::Utc::now().timestamp();
    for (age, status) in [(310, 403), (-310, 403), (250, 202), (-250, 200)] {
        assert_eq!(
            stripe_at(stand.stripe, &body, now - age).send(&stand.intake).await?.status,
            status,
            "{age} seconds old"
        );
    }
    Ok(())
}
