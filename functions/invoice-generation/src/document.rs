//! An invoice as a page: one file, no script, readable by a screen reader, printed on A4.

use crate::{
    invoice::{Invoice, Line, Party, Status},
    money,
};
use std::fmt::Write;

const STYLE: &str = include_str!("document.css");

/// The page. Every text of the invoice is escaped.
pub fn html(invoice: &Invoice) -> String {
    let summary = &invoice.summary;
    let currency = &summary.currency;
    let number = escape(&summary.invoice_number);
    let title = if invoice.taxes.is_empty() { "Invoice" } else { "Tax invoice" };
    let mut page = String::with_capacity(8 * 1024);
    // Writing to a String does not fail.
    let _ = write!(
        page,
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"robots\" content=\"noindex\">\n<title>{title} {number}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n\
         <header>\n<div>\n<h1>{title}</h1>\n<p class=\"number\">{number}</p>\n</div>\n<p class=\"status {}\">{}</p>\n</header>\n",
        status_class(summary.status),
        status_text(invoice),
    );
    let _ = write!(
        page,
        "<dl class=\"facts\">\n<div><dt>Invoice date</dt><dd>{}</dd></div>\n<div><dt>Due date</dt><dd>{}</dd></div>\n\
         <div><dt>Billing period</dt><dd>{} to {}</dd></div>\n{}{}</dl>\n",
        time(summary.invoice_date),
        time(summary.due_date),
        time(summary.first_day),
        time(summary.last_day),
        fact("Place of supply", place_of_supply(&invoice.customer).as_deref()),
        fact("IRN", invoice.irn.as_deref()),
    );
    let _ = write!(
        page,
        "<div class=\"parties\">\n{}{}</div>\n",
        party("From", &invoice.issuer),
        party("Billed to", &invoice.customer)
    );
    page.push_str(
        "<table>\n<caption>What is billed</caption>\n<thead>\n<tr><th scope=\"col\">Description</th>\
         <th scope=\"col\" class=\"figure\">Quantity</th><th scope=\"col\" class=\"figure\">Price</th>\
         <th scope=\"col\" class=\"figure\">Amount</th></tr>\n</thead>\n<tbody>\n",
    );
    for each in &invoice.lines {
        page.push_str(&line(each, currency));
    }
    page.push_str("</tbody>\n<tfoot>\n");
    page.push_str(&total("Subtotal", summary.subtotal_minor, currency, ""));
    for tax in &invoice.taxes {
        let label =
            format!("{} {} on {}", escape(&tax.name), money::rate(tax.rate_bp), price(tax.taxable_minor, currency));
        page.push_str(&total(&label, tax.amount_minor, currency, ""));
    }
    page.push_str(&total("Total", summary.total_minor, currency, " class=\"total\""));
    if summary.amount_paid_minor > 0 {
        page.push_str(&total("Paid", -summary.amount_paid_minor, currency, ""));
        page.push_str(&total("Due", summary.total_minor - summary.amount_paid_minor, currency, " class=\"total\""));
    }
    let _ = write!(
        page,
        "</tfoot>\n</table>\n<footer>\n<p>Days are those of the time zone {}. Amounts are in {}.</p>\n</footer>\n</main>\n</body>\n</html>\n",
        escape(&invoice.timezone),
        escape(currency),
    );
    page
}

fn line(line: &Line, currency: &str) -> String {
    let unit_price = match (line.kind.as_str(), line.price_units) {
        ("included", _) => "included".to_owned(),
        (_, 1) => price(line.unit_price_minor, currency),
        (_, units) => format!(
            "{} per {}",
            price(line.unit_price_minor, currency),
            escape(&money::quantity(units, &line.unit, currency))
        ),
    };
    format!(
        "<tr><th scope=\"row\">{}</th><td class=\"figure\">{}</td><td class=\"figure\">{unit_price}</td><td class=\"figure\">{}</td></tr>\n",
        escape(&line.description),
        escape(&money::quantity(line.quantity, &line.unit, currency)),
        price(line.amount_minor, currency),
    )
}

/// A row of the table's foot; `label` is escaped already.
fn total(label: &str, minor: i64, currency: &str, class: &str) -> String {
    format!(
        "<tr{class}><th scope=\"row\" colspan=\"3\">{label}</th><td class=\"figure\">{}</td></tr>\n",
        price(minor, currency)
    )
}

fn party(role: &str, party: &Party) -> String {
    let town = [party.city.as_deref(), party.pincode.as_deref()].into_iter().flatten().collect::<Vec<_>>().join(" ");
    let region = [party.state.as_deref(), party.country.as_deref().or(party.country_code.as_deref())]
        .into_iter()
        .flatten()
        .collect::<Vec<_>>()
        .join(", ");
    let gstin = party.gstin.as_ref().map(|gstin| format!("GSTIN {gstin}"));
    let sac = party.sac_code.as_ref().map(|code| format!("SAC {code}"));
    let rows = [
        party.address_line_1.as_deref(),
        party.address_line_2.as_deref(),
        Some(town.as_str()),
        Some(region.as_str()),
        party.email.as_deref(),
        gstin.as_deref(),
        sac.as_deref(),
    ];
    let rows = rows
        .into_iter()
        .flatten()
        .filter(|row| !row.trim().is_empty())
        .map(|row| format!("<br>{}", escape(row)))
        .collect::<String>();
    format!(
        "<section>\n<h2>{role}</h2>\n<address><strong>{}</strong>{rows}</address>\n</section>\n",
        escape(&party.name)
    )
}

/// India's invoices name the state in which the service is received.
fn place_of_supply(customer: &Party) -> Option<String> {
    if customer.country_code.as_deref() != Some("IN") {
        return None;
    }
    match (&customer.state, &customer.state_code) {
        (Some(state), Some(code)) => Some(format!("{state} ({code})")),
        (Some(state), None) => Some(state.clone()),
        (None, code) => code.clone(),
    }
}

/// An amount, escaped: the currency's code comes from data, too.
fn price(minor: i64, currency: &str) -> String {
    escape(&money::amount(minor, currency))
}

fn fact(name: &str, value: Option<&str>) -> String {
    value.map(|value| format!("<div><dt>{name}</dt><dd>{}</dd></div>\n", escape(value))).unwrap_or_default()
}

fn time(date: chrono::NaiveDate) -> String {
    format!("<time datetime=\"{date}\">{}</time>", money::day(date))
}

fn status_class(status: Status) -> &'static str {
    match status {
        Status::Open => "open",
        Status::Paid => "paid",
        Status::Void | Status::Uncollectible => "off",
    }
}

fn status_text(invoice: &Invoice) -> String {
    match (invoice.summary.status, invoice.summary.paid_at) {
        (Status::Open, _) => format!("Payable by {}", time(invoice.summary.due_date)),
        (Status::Paid, Some(at)) => format!("Paid on {}", time(at.date_naive())),
        (Status::Paid, None) => "Paid".to_owned(),
        (Status::Void, _) => "Void: nothing is owed".to_owned(),
        (Status::Uncollectible, _) => "Written off".to_owned(),
    }
}

/// A text as HTML shows it, also inside a quoted attribute.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len() + text.len() / 8);
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn invoice(name: &str) -> Invoice {
        serde_json::from_value(json!({
            "id": "0199a000-0000-7000-8000-000000000001", "invoice_number": "INV-202602-00042", "status": "open", "kind": "period",
            "currency": "INR", "first_day": "2026-01-01", "last_day": "2026-01-31", "subtotal_minor": 774_000, "tax_minor": 139_320,
            "total_minor": 913_320, "amount_paid_minor": 0, "invoice_date": "2026-02-01", "due_date": "2026-02-16", "paid_at": null,
            "organization_id": "0199a000-0000-7000-8000-000000000002", "subscription_id": null,
            "period_start": "2025-12-31T18:30:00+00:00", "period_end": "2026-01-31T18:30:00+00:00", "timezone": "Asia/Kolkata",
            "finalized_at": "2026-02-01T03:30:00.123+00:00", "irn": null,
            "issuer": {"legal_name": "Issuer", "gstin": "29ABCDE1234F1Z5", "timezone": "Asia/Kolkata", "payment_terms_days": 15},
            "customer": {"name": name, "state": "Karnataka", "state_code": "KA", "country_code": "IN"},
            "lines": [
                {"position": 1, "kind": "base", "meter_key": null, "description": "Pro plan, monthly", "quantity": 1, "unit": "month",
                 "unit_price_minor": 699_900, "price_units": 1, "amount_minor": 699_900},
                {"position": 2, "kind": "included", "meter_key": "call_seconds", "description": "Calling time included",
                 "quantity": 90_000, "unit": "second", "unit_price_minor": 0, "price_units": 1, "amount_minor": 0},
                {"position": 3, "kind": "overage", "meter_key": "call_seconds", "description": "Calling time beyond the plan",
                 "quantity": 7_410, "unit": "second", "unit_price_minor": 600, "price_units": 60, "amount_minor": 74_100}
            ],
            "taxes": [
                {"position": 1, "name": "CGST", "rate_bp": 900, "taxable_minor": 774_000, "amount_minor": 69_660},
                {"position": 2, "name": "SGST", "rate_bp": 900, "taxable_minor": 774_000, "amount_minor": 69_660}
            ]
        }))
        .unwrap()
    }

    #[test]
    fn the_page_says_what_the_invoice_says() {
        let page = html(&invoice("Acme"));
        for text in [
            "<title>Tax invoice INV-202602-00042</title>",
            "<time datetime=\"2026-01-01\">1 January 2026</time> to <time datetime=\"2026-01-31\">31 January 2026</time>",
            "Payable by <time datetime=\"2026-02-16\">16 February 2026</time>",
            "GSTIN 29ABCDE1234F1Z5",
            "<dt>Place of supply</dt><dd>Karnataka (KA)</dd>",
            "<td class=\"figure\">7,410 seconds</td><td class=\"figure\">₹6.00 per 60 seconds</td><td class=\"figure\">₹741.00</td>",
            "<td class=\"figure\">90,000 seconds</td><td class=\"figure\">included</td><td class=\"figure\">₹0.00</td>",
            "CGST 9\u{a0}% on ₹7,740.00</th><td class=\"figure\">₹696.60</td>",
            "<tr class=\"total\"><th scope=\"row\" colspan=\"3\">Total</th><td class=\"figure\">₹9,133.20</td></tr>",
        ] {
            assert!(page.contains(text), "{text} is not in\n{page}");
        }
    }

    #[test]
    fn nothing_of_the_invoice_becomes_markup() {
        let evil = "<script>alert('x')</script>\"&";
        let mut invoice = invoice(evil);
        invoice.summary.currency = evil.to_owned();
        invoice.timezone = evil.to_owned();
        invoice.irn = Some(evil.to_owned());
        invoice.customer.city = Some(evil.to_owned());
        invoice.customer.state = Some(evil.to_owned());
        invoice.lines[2].description = evil.to_owned();
        invoice.lines[2].unit = evil.to_owned();
        invoice.taxes[0].name = evil.to_owned();
        let page = html(&invoice);
        assert!(!page.contains("<script"), "{page}");
        assert!(page.contains("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&quot;&amp;"));
    }

    #[test]
    fn what_is_paid_is_taken_off() {
        let mut invoice = invoice("Acme");
        invoice.summary.amount_paid_minor = 900_000;
        let page = html(&invoice);
        assert!(page.contains("Paid</th><td class=\"figure\">−₹9,000.00</td>"));
        assert!(page.contains("Due</th><td class=\"figure\">₹133.20</td>"));
    }

    #[test]
    fn the_json_keeps_the_issuer_s_name() {
        let json = serde_json::to_value(invoice("Acme")).unwrap();
        assert_eq!(json["issuer"]["name"], "Issuer");
        assert_eq!(
            (&json["invoice_number"], &json["lines"][2]["amount_minor"]),
            (&json!("INV-202602-00042"), &json!(74_100))
        );
    }
}
