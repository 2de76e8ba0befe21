//! What people ask for: a link, a charge by hand, a saved method, money back.

use super::*;
use tests::Fingerprint;

#[tokio::test]
async fn an_invoice_is_paid_by_a_link_that_is_one_however_often_it_is_asked_for() -> Result<()> {
    let stand = Stand::start().await?;
    let tenant = stand.payer("Links", None).await?;
    let other = scene::sign_up(&stand.stack, "Other").await?;
    stand.billed().await?;
    let id = stand.invoice_id(&tenant).await?;
    let path = format!("invoices/{id}/payment-link");
    let before = Fingerprint::of(&stand.stack.sql).await?;
    stand.post(&other, &path, json!({})).await?.assert_error_at(404, "not_found", "id");
    HttpEvent::post(&format!("{FUNCTION}/{path}")).send(&stand.invoicing).await?.assert_error(401, "unauthorized");
    stand.post(&tenant, "invoices/x/payment-link", json!({})).await?.assert_error_at(404, "not_found", "id");
    before.assert_same(&Fingerprint::of(&stand.stack.sql).await?);

    // The gateway makes it and its answer is lost: it is asked for the same again, and found.
    stand.razorpay.lose([Way::AnswerLost]);
    let unknown = stand.post(&tenant, &path, json!({})).await?;
    assert_eq!((unknown.status, unknown.json()["url"].is_null()), (202, true), "{}", unknown.body);
    stand.later().await?;
    stand.collect().await?;
    let link = stand.post(&tenant, &path, json!({})).await?;
    assert_eq!((link.status, &link.json()["amount_minor"]), (200, &json!(TOTAL)), "{}", link.body);
    let url = link.json()["url"].as_str().context("an address")?.to_owned();
    assert_eq!(stand.post(&tenant, &path, json!({})).await?.json()["url"], json!(url));
    let made = stand.razorpay.requests().iter().filter(|asked| *asked == "POST v1/payment_links").count();
    assert_eq!(made, 1);

    let shown = async |form: &str| {
        HttpEvent::get(&format!("{FUNCTION}/invoices/{id}.{form}")).bearer(tenant.jwt()).send(&stand.invoicing).await
    };
    assert_eq!(shown("json").await?.json()["payment_link"]["url"], json!(url));
    assert!(shown("html").await?.body.contains(&format!("<a href=\"{url}\"")));
    let printed = shown("pdf").await?.body;
    stand.razorpay.visit(&url)?;
    // Its payment is told before the link's own event, and says nothing of an invoice.
    stand.deliver().await?;
    assert_eq!(stand.invoices(&tenant).await?, "paid 825882");
    stand.collect().await?;
    assert_eq!(stand.requests(&tenant).await?, "link succeeded", "the gateway says so, not the invoice");
    assert_eq!(shown("json").await?.json()["payment_link"], Value::Null);
    assert_eq!(shown("pdf").await?.body, printed, "the paper is what it was");
    stand.post(&tenant, &path, json!({})).await?.assert_error_at(409, "invoice_not_open", "id");
    Ok(())
}

#[tokio::test]
async fn a_link_and_a_mandate_never_take_the_same_money() -> Result<()> {
    let stand = Stand::start().await?;
    let first = stand.payer("Link first", Some(("razorpay", "upi", "token_upi_1"))).await?;
    let both = stand.payer("Both at once", Some(("razorpay", "upi", "token_upi_2"))).await?;
    stand.billed().await?;
    let mut urls = Vec::new();
    for tenant in [&first, &both] {
        let path = format!("invoices/{}/payment-link", stand.invoice_id(tenant).await?);
        urls.push(stand.post(tenant, &path, json!({})).await?.json()["url"].as_str().context("an address")?.to_owned());
    }
    stand.clock("2026-02-15T05:00").await?;
    stand.collect().await?;
    // One pays by the link in the last moment, and of that we have not heard when the debit is due.
    stand.clock("2026-02-16T08:05").await?;
    stand.razorpay.visit(&urls[1])?;
    stand.collect().await?;
    stand.collect().await?;
    assert!(stand.razorpay.visit(&urls[0]).is_err(), "the link is taken back before the debit");
    stand.deliver().await?;
    for tenant in [&first, &both] {
        assert_eq!(stand.invoices(tenant).await?, "paid 825882", "{}", stand.requests(tenant).await?);
    }
    assert_eq!(stand.requests(&first).await?, "charge succeeded, link cancelled");
    stand.collect().await?;
    assert_eq!(stand.requests(&both).await?, "charge cancelled, link succeeded");
    assert_eq!(paid(&stand.razorpay.entries()), [TOTAL, TOTAL]);
    Ok(())
}

#[tokio::test]
async fn a_method_is_saved_charged_by_hand_and_forgotten_and_money_goes_back_the_way_it_came() -> Result<()> {
    let stand = Stand::start().await?;
    let tenant = stand.payer("Own", None).await?;
    let upi = stand.payer("Upi", None).await?;
    stand.billed().await?;
    let id = stand.invoice_id(&tenant).await?;
    let collect = format!("invoices/{id}/collect");
    stand.post(&tenant, &collect, json!({})).await?.assert_error_at(422, "no_mandate", "id");
    stand.post(&tenant, "payment-methods", json!({ "method": "cash" })).await?.assert_error_at(
        400,
        "invalid_request",
        "method",
    );
    let setup = stand.post(&tenant, "payment-methods", json!({ "gateway": "stripe" })).await?;
    stand.stripe.visit(setup.json()["url"].as_str().with_context(|| format!("an address: {}", setup.body))?)?;
    let mandate = stand.post(&upi, "payment-methods", json!({ "method": "upi" })).await?;
    stand.razorpay.visit(mandate.json()["url"].as_str().with_context(|| format!("an address: {}", mandate.body))?)?;
    stand.deliver().await?;
    let list = async |tenant: &Tenant| -> Result<Value> {
        let answer =
            HttpEvent::get(&format!("{FUNCTION}/payment-methods")).bearer(tenant.jwt()).send(&stand.invoicing).await?;
        Ok(answer.json()["payment_methods"].clone())
    };
    let saved = list(&tenant).await?;
    assert_eq!(
        (&saved[0]["brand"], &saved[0]["last4"], &saved[0]["is_default"]),
        (&json!("visa"), &json!("4242"), &json!(true))
    );
    assert_eq!(list(&upi).await?[0]["type"], "upi", "known by the customer whom the gateway made for us");
    assert_eq!(stand.requests(&upi).await?, "setup succeeded");

    // By hand, under a key: the same request is one charge, and another one is refused while that one is on its way.
    stand.stripe.react(
        &stand.value("select gateway_payment_method_id from public.payment_methods where gateway = 'stripe'").await?,
        [Reaction::Slow],
    );
    let event = || -> Result<HttpEvent> {
        HttpEvent::post(&format!("{FUNCTION}/{collect}"))
            .bearer(tenant.jwt())
            .header("idempotency-key", "k")
            .json(&json!({}))
    };
    let charge = event()?.send(&stand.invoicing).await?;
    assert_eq!(charge.status, 202, "{}", charge.body);
    assert_eq!(event()?.send(&stand.invoicing).await?.body, charge.body);
    stand.post(&tenant, &collect, json!({})).await?.assert_error_at(409, "collection_in_progress", "id");
    stand.post(&tenant, &format!("invoices/{id}/payment-link"), json!({})).await?.assert_error_at(
        409,
        "collection_in_progress",
        "id",
    );
    stand.stripe.settle(Reaction::Approve);
    stand.deliver().await?;
    assert_eq!(stand.invoices(&tenant).await?, "paid 825882");
    assert_eq!(paid(&stand.stripe.entries()), [TOTAL]);

    // A credit note of a paid invoice asks for its money back, once, whatever becomes of the answer.
    let line = stand
        .value(&format!("select id::text from public.invoice_lines where invoice_id = '{id}' and amount_minor > 0"))
        .await?;
    let note = json!({ "v": 1, "invoice_id": id, "idempotency_key": "n", "reason": "An outage",
        "lines": [{ "invoice_line_id": line, "amount_minor": 100_000 }] });
    let issued: Value = stand.stack.sql.query_one("select public.issue_credit_note($1)", &[&note]).await?.get(0);
    let request = json!({ "v": 1, "credit_note_id": issued["id"] });
    let mut asked = Vec::new();
    for _ in 0..2 {
        let answer: Value = stand.stack.sql.query_one("select public.request_refund($1)", &[&request]).await?.get(0);
        asked.push(answer["requests"].as_array().map_or(0, Vec::len));
    }
    assert_eq!(asked, [1, 0]);
    stand.stripe.lose([Way::AnswerLost]);
    stand.collect().await?;
    stand.later().await?;
    stand.collect().await?;
    stand.deliver().await?;
    assert_eq!(paid(&stand.stripe.entries()), [TOTAL, -118_000]);
    let back = "select string_agg(status || ' ' || amount_minor, ', ') from public.refunds";
    assert_eq!(stand.value(back).await?, "processed 118000");
    assert!(stand.requests(&tenant).await?.ends_with("refund succeeded"));

    let method = saved[0]["id"].as_str().context("an id")?;
    let forget = |tenant: &Tenant| {
        HttpEvent::new("DELETE", &format!("{FUNCTION}/payment-methods/{method}")).bearer(tenant.jwt())
    };
    forget(&upi).send(&stand.invoicing).await?.assert_error_at(404, "not_found", "id");
    assert_eq!(forget(&tenant).send(&stand.invoicing).await?.json(), json!({ "removed": true }));
    assert_eq!(list(&tenant).await?, json!([]));
    assert!(stand.stripe.requests().iter().any(|asked| asked.ends_with("/detach")), "the gateway is told");
    assert_eq!(forget(&tenant).send(&stand.invoicing).await?.json(), json!({ "removed": false }));
    Ok(())
}
