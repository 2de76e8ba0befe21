//! A document as a page: one file, no script, readable by a screen reader, printed on the issuer's paper.

use super::{
    code::{self, Code},
    paper::{Address, Mood, Paper},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use std::fmt::Write;

const STYLE: &str = include_str!("html.css");

/// The page, with the portal's code where there is one, and where it is paid online (which is no part of the document, whose id is made of
/// all that is in [`Paper`]). Every text of the document is escaped.
pub fn html(paper: &Paper, code: Option<&Code>, pay_at: Option<&str>) -> String {
    let (title, number) = (paper.title, escape(&paper.number));
    let [red, green, blue] = paper.color;
    let size = if paper.is_letter { "letter" } else { "A4" };
    let mut page = String::with_capacity(8 * 1024);
    // Writing to a String does not fail.
    let _ = write!(
        page,
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"robots\" content=\"noindex\">\n<title>{title} {number}</title>\n\
         <style>\n:root {{ --brand: rgb({red} {green} {blue}); }}\n@page {{ size: {size}; margin: 18mm; }}\n{STYLE}</style>\n\
         </head>\n<body>\n<main>\n<header>\n<div>\n{}<h1>{title}</h1>\n<p class=\"number\">{number}</p>\n</div>\n{}</header>\n",
        logo(paper),
        status(paper),
    );
    if let Some(url) = pay_at.filter(|url| url.starts_with("http")) {
        let _ = writeln!(page, "<p class=\"pay\"><a href=\"{}\" rel=\"noreferrer\">Pay online</a></p>", escape(url));
    }
    page.push_str("<dl class=\"facts\">\n");
    for (label, value) in &paper.facts {
        let _ = writeln!(page, "<div><dt>{label}</dt><dd>{}</dd></div>", escape(value));
    }
    let _ = write!(page, "</dl>\n<div class=\"parties\">\n{}{}</div>\n", address(&paper.from), address(&paper.to));
    page.push_str("<table>\n<caption>What it is for</caption>\n<thead>\n<tr>");
    let class = |is_figure| if is_figure { " class=\"figure\"" } else { "" };
    for column in &paper.columns {
        let _ = write!(page, "<th scope=\"col\"{}>{}</th>", class(column.is_figure), column.label);
    }
    page.push_str("</tr>\n</thead>\n<tbody>\n");
    for row in &paper.rows {
        page.push_str("<tr>");
        for (index, (cell, column)) in row.iter().zip(&paper.columns).enumerate() {
            let cell = escape(cell);
            let _ = match index {
                0 => write!(page, "<th scope=\"row\">{cell}</th>"),
                _ => write!(page, "<td{}>{cell}</td>", class(column.is_figure)),
            };
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</tbody>\n<tfoot>\n");
    for total in &paper.totals {
        let _ = writeln!(
            page,
            "<tr{}><th scope=\"row\" colspan=\"{}\">{}</th><td class=\"figure\">{}</td></tr>",
            if total.is_sum { " class=\"total\"" } else { "" },
            paper.columns.len() - 1,
            escape(&total.label),
            escape(&total.amount),
        );
    }
    let _ = write!(
        page,
        "</tfoot>\n</table>\n<p class=\"words\"><span>In words</span> {}</p>\n<footer>\n",
        escape(&paper.words)
    );
    if let Some(code) = code {
        let _ = writeln!(
            page,
            "<svg class=\"code\" role=\"img\" aria-label=\"{}\" viewBox=\"0 0 {side} {side}\"><path d=\"{}\"/></svg>",
            code::LABEL,
            code.path(),
            side = code.side(),
        );
    }
    for note in &paper.notes {
        let _ = writeln!(page, "<p>{}</p>", escape(note).replace('\n', "<br>"));
    }
    page.push_str("</footer>\n</main>\n</body>\n</html>\n");
    page
}

fn logo(paper: &Paper) -> String {
    let Some(png) = &paper.logo else { return String::new() };
    format!("<img src=\"data:image/png;base64,{}\" alt=\"{}\">\n", STANDARD.encode(png), escape(&paper.from.name))
}

fn status(paper: &Paper) -> String {
    let Some((mood, text)) = &paper.status else { return String::new() };
    let class = match mood {
        Mood::Open => "open",
        Mood::Paid => "paid",
        Mood::Off => "off",
    };
    format!("<p class=\"status {class}\">{}</p>\n", escape(text))
}

fn address(address: &Address) -> String {
    let rows = address.rows.iter().map(|row| format!("<br>{}", escape(row))).collect::<String>();
    format!(
        "<section>\n<h2>{}</h2>\n<address><strong>{}</strong>{rows}</address>\n</section>\n",
        address.role,
        escape(&address.name)
    )
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
    use crate::document::{
        examples,
        paper::Moment,
        record::{PaymentLink, Record, Status},
    };

    fn page(record: &Record) -> String {
        html(&Paper::of(record, Moment::Now), Code::of(record.signed_qr.as_deref()).as_ref(), record.pay_at())
    }

    #[test]
    fn the_page_says_what_the_invoice_says() {
        let page = page(&examples::gst());
        for text in [
            "<title>Tax invoice INV-202602-00042</title>",
            "<dt>Billing period</dt><dd>1\u{a0}January\u{a0}2026 to 31\u{a0}January\u{a0}2026</dd>",
            "Payable by 16 February 2026",
            "GSTIN 29ABCDE1234F1Z5",
            "<dt>Place of supply</dt><dd>29-Karnataka</dd>",
            "<td class=\"figure\">7,410 seconds</td><td class=\"figure\">₹6.00 per 60 seconds</td><td class=\"figure\">₹741.00</td>",
            "<td class=\"figure\">90,000 seconds</td><td class=\"figure\">included</td><td class=\"figure\">₹0.00</td>",
            "CGST 9\u{a0}% on ₹7,740.00</th><td class=\"figure\">₹696.60</td>",
            "<tr class=\"total\"><th scope=\"row\" colspan=\"4\">Total</th><td class=\"figure\">₹9,133.20</td></tr>",
            "Nine thousand one hundred thirty-three rupees and twenty paise only",
        ] {
            assert!(page.contains(text), "{text} is not in\n{page}");
        }
    }

    #[test]
    fn nothing_of_the_invoice_becomes_markup() {
        let evil = "<script>alert('x')</script>\"&";
        let mut record = examples::gst();
        record.currency = evil.to_owned();
        record.timezone = evil.to_owned();
        record.irn = Some(evil.to_owned());
        record.customer.city = Some(evil.to_owned());
        record.customer.place_of_supply = Some(evil.to_owned());
        record.issuer.note = Some(evil.to_owned());
        record.issuer.name = evil.to_owned();
        record.issuer.color = Some(evil.to_owned());
        record.lines[2].description = evil.to_owned();
        record.lines[2].unit = Some(evil.to_owned());
        record.taxes[0].name = evil.to_owned();
        let page = page(&record);
        assert!(!page.contains("<script"), "{page}");
        assert!(page.contains("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&quot;&amp;"));
    }

    #[test]
    fn a_registered_invoice_shows_what_the_portal_signed() {
        let mut record = examples::gst();
        assert!(!page(&record).contains("<svg"));
        record.signed_qr = Some("eyJhbGciOiJSUzI1NiJ9.signed".to_owned());
        assert!(page(&record).contains("aria-label=\"Signed QR code of the e-invoice\" viewBox"));
    }

    #[test]
    fn what_is_paid_and_credited_is_taken_off() {
        let mut record = examples::gst();
        record.amount_paid_minor = 900_000;
        record.credited_minor = 3_320;
        let page = page(&record);
        assert!(page.contains("Paid</th><td class=\"figure\">−₹9,000.00</td>"));
        assert!(page.contains("Credited</th><td class=\"figure\">−₹33.20</td>"));
        assert!(page.contains("Due</th><td class=\"figure\">₹100.00</td>"));
    }

    #[test]
    fn what_is_owed_can_be_paid_from_the_page_and_not_from_the_paper() {
        let mut record = examples::gst();
        assert!(!page(&record).contains("Pay online"));
        for (url, is_shown) in [("https://rzp.io/i/x?a=1&b=\"", true), ("javascript:alert(1)", false)] {
            record.payment_link = Some(PaymentLink { url: url.to_owned() });
            let page = page(&record);
            assert_eq!(page.contains("<a href=\"https://rzp.io/i/x?a=1&amp;b=&quot;\""), is_shown, "{page}");
            assert!(!page.contains("javascript"));
        }
    }

    #[test]
    fn a_void_invoice_says_so_in_every_form() {
        let mut record = examples::gst();
        record.status = Some(Status::Void);
        for moment in [Moment::Now, Moment::Issued] {
            assert!(html(&Paper::of(&record, moment), None, None).contains("Void: nothing is owed"));
        }
    }
}
