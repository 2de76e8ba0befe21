//! Invoices and credit notes as documents, the next invoice before it is due, and what an accountant takes along.

use anyhow::{Context, Result};
use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use shared::signed_link;
use tests::{
    Fingerprint, Stack,
    callbacks::TALKED,
    events::{self, Answer, HttpEvent},
    scene::{self, Campaign, Tenant},
    stack::PUBLIC_ORIGIN,
    supervisor_binary,
};
use uuid::Uuid;

const FUNCTION: &str = "/functions/v1/invoice-generation";
const DURING: &str = "2026-11-26T12:00:00+05:30";
const AFTER: &str = "2026-12-24T00:05:00+05:30";
const DECEMBER: &str = "from=2026-12-01&to=2026-12-31";

/// A registered tenant of another state with four calls of a minute, of which one is within the plan.
async fn called() -> Result<(Stack, Campaign)> {
    let stack = Stack::start(supervisor_binary!()).await?;
    let campaign = scene::running_campaign(&stack, &scene::phones(1, 4)).await?;
    scene::buy_plan(&stack, &campaign.tenant, 60).await?;
    stack
        .sql
        .execute(
            "update public.organizations set gstin = '27AAACA1111A1Z1', state = 'Maharashtra', state_code = 'MH', city = 'पुणे' where id = $1",
            &[&campaign.tenant.id],
        )
        .await?;
    let intake = stack.intake()?;
    for call in campaign.dial(&stack).await? {
        assert_eq!(campaign.carrier.hangup(&call, &TALKED)?.send(&intake).await?.status, 200);
    }
    Ok((stack, campaign))
}

async fn billed() -> Result<(Stack, Campaign, Value)> {
    let (stack, campaign) = called().await?;
    stack.set_clock(AFTER).await?;
    events::job(&stack.invoicing()?, "close_periods").await?;
    let list = get(&stack, &campaign.tenant, "invoices").await?.json();
    let id = list["invoices"][0]["id"].as_str().with_context(|| format!("an invoice in {list}"))?.to_owned();
    let invoice = get(&stack, &campaign.tenant, &format!("invoices/{id}.json")).await?.json();
    Ok((stack, campaign, invoice))
}

async fn get(stack: &Stack, tenant: &Tenant, path: &str) -> Result<Answer> {
    HttpEvent::get(&format!("{FUNCTION}/{path}")).bearer(tenant.jwt()).send(&stack.invoicing()?).await
}

async fn post(stack: &Stack, tenant: &Tenant, path: &str, body: Value) -> Result<Answer> {
    HttpEvent::post(&format!("{FUNCTION}/{path}")).bearer(tenant.jwt()).json(&body)?.send(&stack.invoicing()?).await
}

/// The rows of a CSV, its heads first.
fn rows(answer: &Answer) -> Vec<Vec<String>> {
    assert_eq!(
        (answer.status, answer.headers["content-type"].as_str()),
        (200, Some("text/csv; charset=utf-8")),
        "{}",
        answer.body
    );
    let cells = |line: &str| {
        let mut is_quoted = false;
        let outside = |letter: char| {
            is_quoted ^= letter == '"';
            letter == ',' && !is_quoted
        };
        line.split(outside).map(|cell| cell.trim_matches('"').to_owned()).collect()
    };
    answer.body.lines().map(cells).collect()
}

fn cell<'a>(rows: &'a [Vec<String>], row: usize, column: &str) -> &'a str {
    let at = rows[0].iter().position(|head| head == column).unwrap_or_else(|| panic!("no {column} in {:?}", rows[0]));
    &rows[row][at]
}

/// A plain decimal of two places in its minor unit.
fn minor(decimal: &str) -> i64 {
    let (whole, rest) = decimal.split_once('.').unwrap_or_else(|| panic!("{decimal} has no decimals"));
    assert_eq!(rest.len(), 2, "{decimal}");
    format!("{whole}{rest}").parse().unwrap_or_else(|_| panic!("{decimal} is no number"))
}

#[tokio::test]
async fn the_preview_is_the_invoice_that_the_run_makes() -> Result<()> {
    let (stack, campaign) = called().await?;
    stack.set_clock(DURING).await?;
    let during = post(&stack, &campaign.tenant, "invoices/preview", json!({})).await?;
    assert_eq!(during.status, 200, "{}", during.body);
    stack.set_clock(AFTER).await?;
    let before = Fingerprint::of(&stack.sql).await?;
    let preview = post(&stack, &campaign.tenant, "invoices/preview", json!({})).await?.json();
    let page = HttpEvent::post(&format!("{FUNCTION}/invoices/preview"))
        .bearer(campaign.tenant.jwt())
        .header("accept", "text/html");
    let page = page.send(&stack.invoicing()?).await?;
    before.assert_same(&Fingerprint::of(&stack.sql).await?);
    assert!(page.body.contains("Preview of the next invoice") && page.body.contains("1,200.06"), "{}", page.body);

    events::job(&stack.invoicing()?, "close_periods").await?;
    let id = stack.value("select id::text from public.invoices").await?;
    let invoice = get(&stack, &campaign.tenant, &format!("invoices/{id}")).await?.json();
    for field in [
        "organization_id",
        "subscription_id",
        "kind",
        "currency",
        "period_start",
        "period_end",
        "timezone",
        "first_day",
        "last_day",
        "subtotal_minor",
        "tax_minor",
        "total_minor",
        "invoice_date",
        "due_date",
        "issuer",
        "customer",
        "lines",
        "taxes",
        "discount_minor",
        "discounts",
    ] {
        assert!(!invoice[field].is_null(), "{field} of {invoice:#}");
        assert_eq!(preview[field], invoice[field], "{field}");
    }
    // Nothing was used in between, so it was the same then, but for the day of its making, which was foreseen.
    let during = during.json();
    for field in ["lines", "taxes", "total_minor", "invoice_date"] {
        assert_eq!(during[field], invoice[field], "{field}");
    }
    let next = post(&stack, &campaign.tenant, "invoices/preview", json!({})).await?.json();
    assert_eq!(next["first_day"], "2026-12-24");
    HttpEvent::post(&format!("{FUNCTION}/invoices/preview"))
        .send(&stack.invoicing()?)
        .await?
        .assert_error(401, "unauthorized");
    Ok(())
}

#[tokio::test]
async fn a_pdf_is_the_same_whenever_it_is_asked_for() -> Result<()> {
    let (stack, campaign, invoice) = billed().await?;
    let path = format!("invoices/{}.pdf", invoice["id"].as_str().context("an id")?);
    let first = get(&stack, &campaign.tenant, &path).await?;
    assert_eq!((first.status, first.headers["content-type"].as_str()), (200, Some("application/pdf")));
    assert_eq!(first.headers["content-disposition"], "inline; filename=\"INV-202612-00001.pdf\"");
    assert!(STANDARD.decode(&first.body)?.starts_with(b"%PDF-1.7"));
    // What is changed or paid afterwards does not change what was issued.
    stack
        .sql
        .batch_execute(
            "update private.billing_issuer set legal_name = 'Renamed', color = '#aa0000';
             update public.organizations set name = 'Renamed', city = 'Elsewhere';
             update public.invoices set metadata = '{\"seen\": true}'",
        )
        .await?;
    let paid = json!({"v": 1, "gateway": "razorpay", "payment_id": "pay_1", "invoice_id": invoice["id"], "status": "captured",
        "amount_minor": invoice["total_minor"], "currency": "INR"});
    stack.sql.query_one("select public.record_payment($1)", &[&paid]).await?;
    stack.set_clock("2027-06-01T12:00:00+05:30").await?;
    assert_eq!(get(&stack, &campaign.tenant, &path).await?.body, first.body);
    let page = get(&stack, &campaign.tenant, &path.replace(".pdf", ".html")).await?;
    assert!(
        page.body.contains("Paid on") && page.body.contains("27-Maharashtra") && page.body.contains("पुणे"),
        "{}",
        page.body
    );
    assert!(!page.body.contains("Renamed"));
    Ok(())
}

#[tokio::test]
async fn a_link_opens_one_document_in_one_form_for_a_quarter_of_an_hour() -> Result<()> {
    let (stack, campaign, invoice) = billed().await?;
    let id: Uuid = invoice["id"].as_str().context("an id")?.parse()?;
    let other = scene::sign_up(&stack, "Other Ltd").await?;
    let invoicing = stack.invoicing()?;
    post(&stack, &other, &format!("invoices/{id}/link"), json!({})).await?.assert_error_at(404, "not_found", "id");
    HttpEvent::post(&format!("{FUNCTION}/invoices/{id}/link"))
        .send(&invoicing)
        .await?
        .assert_error(401, "unauthorized");

    let link =
        post(&stack, &campaign.tenant, &format!("invoices/{id}/link"), json!({ "format": "html" })).await?.json();
    let url = link["url"].as_str().with_context(|| format!("an address in {link}"))?;
    let path = url.strip_prefix(PUBLIC_ORIGIN).with_context(|| format!("{url} is ours"))?.to_owned();
    let opened = HttpEvent::get(&path).send(&invoicing).await?;
    assert_eq!(opened.status, 200, "{}", opened.body);
    assert_eq!(opened.body, get(&stack, &campaign.tenant, &format!("invoices/{id}.html")).await?.body);
    let left = chrono::DateTime::parse_from_rfc3339(link["expires_at"].as_str().context("an end")?)?.timestamp();
    assert!((1..=900).contains(&(left - chrono::Utc::now().timestamp())), "in real time, whatever business time is");

    let token = path.split_once("?t=").context("a token")?.1;
    let tampered = format!("{}{}", if token.starts_with('A') { 'B' } else { 'A' }, &token[1..]);
    for changed in [
        path.replace(".html?", ".pdf?"),
        path.replace(".html?", ".json?"),
        path.replace(&id.to_string(), &Uuid::new_v4().to_string()),
        path.replace("/invoices/", "/credit-notes/"),
        path.replace(token, &tampered),
        path.replace(token, ""),
    ] {
        HttpEvent::get(&changed).send(&invoicing).await?.assert_error_at(403, "bad_token", "t");
    }
    let keys = stack.keys.secrets()?.callback_keys;
    let over = signed_link::sign(&keys, "invoices.html", id, chrono::Utc::now().timestamp() - 1).context("a key")?;
    HttpEvent::get(&path.replace(token, &over)).send(&invoicing).await?.assert_error_at(403, "link_expired", "t");
    Ok(())
}

#[tokio::test]
async fn a_credit_note_is_a_document_and_its_organization_s_own() -> Result<()> {
    let (stack, campaign, invoice) = billed().await?;
    let request = json!({"v": 1, "invoice_id": invoice["id"], "idempotency_key": "k", "reason": "An outage"});
    stack.sql.query_one("select public.issue_credit_note($1)", &[&request]).await?;
    let list = get(&stack, &campaign.tenant, "credit-notes").await?.json();
    let id = list["credit_notes"][0]["id"].as_str().with_context(|| format!("one in {list}"))?.to_owned();
    let note = get(&stack, &campaign.tenant, &format!("credit-notes/{id}")).await?.json();
    assert_eq!(
        (&note["total_minor"], &note["invoice_number"], &note["issuer"]),
        (&invoice["total_minor"], &invoice["invoice_number"], &invoice["issuer"])
    );
    let page = get(&stack, &campaign.tenant, &format!("credit-notes/{id}.html")).await?;
    for told in ["Credit note", "CRN-202612-00001", "INV-202612-00001", "An outage", "1,200.06"] {
        assert!(page.body.contains(told), "{told} in {}", page.body);
    }
    let pdf = get(&stack, &campaign.tenant, &format!("credit-notes/{id}.pdf")).await?;
    assert_eq!(pdf.headers["content-type"], "application/pdf");
    let link = post(&stack, &campaign.tenant, &format!("credit-notes/{id}/link"), json!({})).await?.json();
    let path = link["url"].as_str().and_then(|url| url.strip_prefix(PUBLIC_ORIGIN)).context("an address")?;
    assert_eq!(HttpEvent::get(path).send(&stack.invoicing()?).await?.body, pdf.body);

    let other = scene::sign_up(&stack, "Other Ltd").await?;
    assert_eq!(get(&stack, &other, "credit-notes").await?.json(), json!({ "credit_notes": [] }));
    for ending in ["", ".json", ".html", ".pdf"] {
        let foreign = get(&stack, &other, &format!("credit-notes/{id}{ending}")).await?;
        foreign.assert_error_at(404, "not_found", "id");
        let unknown = get(&stack, &other, &format!("credit-notes/{}{ending}", Uuid::new_v4())).await?;
        assert_eq!(unknown.body, foreign.body, "nobody can tell it from one that does not exist");
    }
    Ok(())
}

#[tokio::test]
async fn an_accountant_s_sheets_add_up_to_the_documents() -> Result<()> {
    let (stack, campaign, invoice) = billed().await?;
    let tenant = &campaign.tenant;
    let request = json!({"v": 1, "invoice_id": invoice["id"], "idempotency_key": "k", "reason": "An outage",
        "lines": [{"invoice_line_id": stack.value("select id::text from public.invoice_lines where kind = 'base'").await?, "amount_minor": 10_000}]});
    stack.sql.query_one("select public.issue_credit_note($1)", &[&request]).await?;
    let due = invoice["total_minor"].as_i64().context("a total")? - 11_800;
    let paid = json!({"v": 1, "gateway": "razorpay", "payment_id": "pay_1", "invoice_id": invoice["id"], "status": "captured",
        "amount_minor": due, "currency": "INR"});
    stack.sql.query_one("select public.record_payment($1)", &[&paid]).await?;

    let documents = rows(&get(&stack, tenant, &format!("invoices/export.csv?{DECEMBER}")).await?);
    assert_eq!(documents.len(), 3, "{documents:?}");
    let told = |row, column| minor(cell(&documents, row, column));
    let (bill, note) = if cell(&documents, 1, "document") == "invoice" { (1, 2) } else { (2, 1) };
    assert_eq!([told(bill, "subtotal"), told(bill, "igst"), told(bill, "total")], [101_700, 18_306, 120_006]);
    assert_eq!([told(bill, "paid"), told(bill, "credited"), told(bill, "due")], [due, 11_800, 0]);
    assert_eq!([told(note, "subtotal"), told(note, "igst"), told(note, "total")], [-10_000, -1_800, -11_800]);
    assert_eq!((cell(&documents, note, "against"), cell(&documents, bill, "status")), ("INV-202612-00001", "paid"));

    let lines = rows(&get(&stack, tenant, &format!("invoices/lines.csv?{DECEMBER}")).await?);
    let sum: i64 =
        (1..lines.len()).filter(|row| lines[*row][0] == "invoice").map(|row| minor(cell(&lines, row, "amount"))).sum();
    assert_eq!(sum, 101_700);
    let payments = rows(&get(&stack, tenant, &format!("invoices/payments.csv?{DECEMBER}")).await?);
    assert_eq!((payments.len(), minor(cell(&payments, 1, "amount"))), (2, due));
    assert_eq!(cell(&payments, 1, "invoice"), "INV-202612-00001");

    // Three of the four calls are beyond the plan, and are what its line charges for.
    let line =
        invoice["lines"].as_array().into_iter().flatten().find(|line| line["kind"] == "overage").context("overage")?;
    let id = invoice["id"].as_str().context("an id")?;
    let calls = rows(&get(&stack, tenant, &format!("invoices/{id}/lines/{}/calls.csv", line["position"])).await?);
    let quantity: i64 = (1..calls.len()).filter_map(|row| cell(&calls, row, "quantity").parse::<i64>().ok()).sum();
    let amount: i64 = (1..calls.len()).map(|row| minor(cell(&calls, row, "amount"))).sum();
    assert_eq!(
        (calls.len(), Some(quantity), Some(amount)),
        (4, line["quantity"].as_i64(), line["amount_minor"].as_i64())
    );
    // An owner sees calls, and so whole numbers; the apostrophe keeps a spreadsheet from adding them up.
    assert!(cell(&calls, 1, "number").starts_with("'+91"), "{calls:?}");

    for (query, field) in [("", "from"), ("?from=2026-12-01", "to"), ("?from=2026-13-01&to=2026-12-31", "from")] {
        let answer = get(&stack, tenant, &format!("invoices/export.csv{query}")).await?;
        answer.assert_error_at(400, "malformed_request", field);
    }
    let turned = get(&stack, tenant, "invoices/export.csv?from=2026-12-31&to=2026-12-01").await?;
    turned.assert_error_at(400, "invalid_request", "from");
    let other = scene::sign_up(&stack, "Other Ltd").await?;
    for sheet in ["export", "lines", "payments"] {
        assert_eq!(rows(&get(&stack, &other, &format!("invoices/{sheet}.csv?{DECEMBER}")).await?).len(), 1, "{sheet}");
    }
    get(&stack, &other, &format!("invoices/{id}/lines/1/calls.csv")).await?.assert_error(404, "not_found");
    Ok(())
}

#[tokio::test]
async fn the_return_has_registered_and_other_buyers_in_their_sections() -> Result<()> {
    let (stack, campaign) = called().await?;
    stack.set_clock("2026-11-24T10:30:00+05:30").await?;
    // Unregistered, in the issuer's own state, which is written in two ways.
    let near = scene::sign_up(&stack, "Near").await?;
    scene::buy_plan(&stack, &near, 60).await?;
    stack.sql.execute("update public.organizations set state_code = '29' where id = $1", &[&near.id]).await?;
    let abroad = scene::sign_up(&stack, "Abroad").await?;
    scene::buy_plan(&stack, &abroad, 60).await?;
    stack
        .sql
        .execute("update public.organizations set country_code = 'AE', country = 'UAE' where id = $1", &[&abroad.id])
        .await?;
    stack.set_clock(AFTER).await?;
    events::job(&stack.invoicing()?, "close_periods").await?;
    for (tenant, key) in [(&campaign.tenant, "a"), (&near, "b")] {
        let bill = stack
            .value(&format!("select id::text from public.invoices where organization_id = '{}'", tenant.id))
            .await?;
        let line = stack
            .value(&format!("select id::text from public.invoice_lines where invoice_id = '{bill}' and kind = 'base'"))
            .await?;
        let request = json!({"v": 1, "invoice_id": bill, "idempotency_key": key, "reason": "An outage",
            "lines": [{"invoice_line_id": line, "amount_minor": 10_000}]});
        stack.sql.query_one("select public.issue_credit_note($1)", &[&request]).await?;
    }

    let whole: Value =
        serde_json::from_str(&stack.value("select private.gstr1(null, '2026-12-01', '2026-12-31')::text").await?)?;
    let (buyer, note) = (&whole["b2b"][0], &whole["cdnr"][0]);
    assert_eq!((&buyer["ctin"], &note["ctin"]), (&json!("27AAACA1111A1Z1"), &json!("27AAACA1111A1Z1")), "{whole:#}");
    let inv = &buyer["inv"][0];
    assert_eq!(
        (&inv["idt"], &inv["val"], &inv["pos"], &inv["rchrg"], &inv["inv_typ"]),
        (&json!("24-12-2026"), &json!(1200.06), &json!("27"), &json!("N"), &json!("R"))
    );
    let item = &inv["itms"][0]["itm_det"];
    assert_eq!(
        (&item["txval"], &item["rt"], &item["iamt"], &item["camt"]),
        (&json!(1017.0), &json!(18.0), &json!(183.06), &json!(0.0))
    );
    assert_eq!((&note["nt"][0]["ntty"], &note["nt"][0]["val"]), (&json!("C"), &json!(118.0)));
    // 999.00 less the 100.00 that were credited, in the issuer's state.
    assert_eq!(
        whole["b2cs"],
        json!([{"sply_ty": "INTRA", "pos": "29", "typ": "OE", "rt": 18.0, "txval": 899.0, "camt": 80.91, "samt": 80.91, "iamt": 0.0, "csamt": 0}])
    );
    assert_eq!(whole["left_out"].as_array().map(Vec::len), Some(1), "{whole:#}");
    // An organization's own has nothing of the others.
    let own = get(&stack, &near, &format!("invoices/gstr1.json?{DECEMBER}")).await?;
    assert_eq!((own.json()["b2b"].clone(), own.json()["b2cs"].clone()), (json!([]), whole["b2cs"].clone()));
    assert!(own.body.contains("899.00"), "decimals are as the database wrote them: {}", own.body);
    Ok(())
}
