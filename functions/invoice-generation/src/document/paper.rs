//! What a document says, in order and in words, before it is given a form: so that page and PDF say the same.

use super::{
    money,
    record::{Kind, Line, Party, Record, Status, Treatment},
    words,
};
use base64::{Engine, engine::general_purpose::STANDARD};

/// The unit of calls that were rated one by one.
const RATED: &str = "sixtieth of a millionth";

/// How a document is written down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// As it was issued: what is paid later does not change it. A void one says so.
    Issued,
    /// As it stands now, with what was paid and credited.
    Now,
}

/// A document, ready to be laid out.
#[derive(Debug, Clone)]
pub struct Paper {
    pub title: &'static str,
    pub number: String,
    pub status: Option<(Mood, String)>,
    pub facts: Vec<(&'static str, String)>,
    pub from: Address,
    pub to: Address,
    pub columns: Vec<Column>,
    /// As many cells a row as there are columns.
    pub rows: Vec<Vec<String>>,
    pub totals: Vec<Total>,
    pub words: String,
    pub notes: Vec<String>,
    pub is_letter: bool,
    /// Red, green, blue.
    pub color: [u8; 3],
    /// A PNG.
    pub logo: Option<Vec<u8>>,
}

/// What a status asks of the reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mood {
    Open,
    Paid,
    Off,
}

/// One side of a document.
#[derive(Debug, Clone)]
pub struct Address {
    pub role: &'static str,
    pub name: String,
    pub rows: Vec<String>,
}

/// A column of the lines.
#[derive(Debug, Clone, Copy)]
pub struct Column {
    pub label: &'static str,
    pub is_figure: bool,
}

/// A row below the lines.
#[derive(Debug, Clone)]
pub struct Total {
    pub label: String,
    pub amount: String,
    pub is_sum: bool,
}

impl Paper {
    /// What `record` says.
    pub fn of(record: &Record, moment: Moment) -> Self {
        let currency = &record.currency;
        let is_indian = record.issuer.country_code.as_deref() == Some("IN");
        let sac = record.issuer.sac_code.as_deref().filter(|_| is_indian);
        let number = match record.document {
            Kind::Invoice => record.invoice_number.clone().unwrap_or_default(),
            Kind::CreditNote => record.credit_note_number.clone().unwrap_or_default(),
            Kind::Preview => "not an invoice yet".to_owned(),
        };
        Self {
            title: match record.document {
                Kind::CreditNote => "Credit note",
                Kind::Preview => "Preview of the next invoice",
                Kind::Invoice if record.taxes.is_empty() => "Invoice",
                Kind::Invoice => "Tax invoice",
            },
            number,
            status: status(record, moment),
            facts: facts(record, is_indian),
            from: address("From", &record.issuer),
            to: address(
                if record.document == Kind::CreditNote { "Credited to" } else { "Billed to" },
                &record.customer,
            ),
            columns: columns(record, sac.is_some()),
            rows: record.lines.iter().map(|line| row(record, line, sac)).collect(),
            totals: totals(record, moment),
            words: words::amount(record.total_minor, currency),
            notes: notes(record),
            is_letter: match record.issuer.page_size.as_deref() {
                Some(size) => size == "Letter",
                None => matches!(record.issuer.country_code.as_deref(), Some("US" | "CA" | "MX" | "PH" | "CO" | "CL")),
            },
            color: color(record.issuer.color.as_deref()),
            logo: record.logo.as_ref().and_then(|logo| STANDARD.decode(logo).ok()),
        }
    }
}

fn status(record: &Record, moment: Moment) -> Option<(Mood, String)> {
    if record.document == Kind::Preview {
        let day = record.as_of.map(|at| money::day(at.date_naive())).unwrap_or_default();
        return Some((Mood::Open, format!("As of {day}; nothing is owed yet")));
    }
    let told = match (record.status?, record.paid_at) {
        (Status::Void, _) => return Some((Mood::Off, "Void: nothing is owed".to_owned())),
        _ if moment == Moment::Issued => return None,
        (Status::Open, _) if record.past_due_at.is_some() => {
            (Mood::Open, format!("Overdue: payable by {}", record.due_date.map(money::day).unwrap_or_default()))
        }
        (Status::Open, _) => {
            (Mood::Open, format!("Payable by {}", record.due_date.map(money::day).unwrap_or_default()))
        }
        (Status::Paid, Some(at)) => (Mood::Paid, format!("Paid on {}", money::day(at.date_naive()))),
        (Status::Paid, None) => (Mood::Paid, "Paid".to_owned()),
        (Status::Uncollectible, _) => (Mood::Off, "Written off".to_owned()),
        (Status::Issued, _) => return None,
    };
    Some(told)
}

fn facts(record: &Record, is_indian: bool) -> Vec<(&'static str, String)> {
    let mut facts = Vec::new();
    let mut tell = |label, value: Option<String>| facts.extend(value.map(|value| (label, value)));
    let day = |day: Option<chrono::NaiveDate>| day.map(money::day);
    if record.document == Kind::CreditNote {
        tell("Credit note date", day(record.credit_note_date));
        tell("Against invoice", record.invoice_number.clone());
        tell("Invoice date", day(record.invoice_date));
        tell("Reason", record.reason.clone());
    } else {
        tell(if record.document == Kind::Preview { "Expected date" } else { "Invoice date" }, day(record.invoice_date));
        tell("Due date", day(record.due_date));
        tell(
            "Billing period",
            day(record.first_day)
                .zip(day(record.last_day))
                .map(|(first, last)| format!("{} to {}", unbroken(&first), unbroken(&last))),
        );
    }
    if is_indian {
        tell("Place of supply", place_of_supply(&record.customer));
    }
    if record.taxes.iter().any(|tax| tax.treatment == Treatment::ReverseCharge) {
        tell("Reverse charge", Some("Yes".to_owned()));
    } else if is_indian {
        tell("Reverse charge", (!record.taxes.is_empty()).then(|| "No".to_owned()));
    }
    tell("IRN", record.irn.clone());
    tell("Acknowledgement", record.ack_no.clone());
    facts
}

/// A text that stays on one line.
fn unbroken(text: &str) -> String {
    text.replace(' ', "\u{a0}")
}

/// India's documents name the state in which the service is received.
fn place_of_supply(customer: &Party) -> Option<String> {
    if customer.place_of_supply.is_some() || customer.country_code.as_deref() != Some("IN") {
        return customer.place_of_supply.clone();
    }
    match (&customer.state, &customer.state_code) {
        (Some(state), Some(code)) => Some(format!("{state} ({code})")),
        (Some(state), None) => Some(state.clone()),
        (None, code) => code.clone(),
    }
}

/// The name of a country of which only the code is known; the code itself for most.
fn country(code: Option<&str>) -> Option<&str> {
    Some(match code? {
        "AE" => "United Arab Emirates",
        "AU" => "Australia",
        "CA" => "Canada",
        "DE" => "Germany",
        "GB" => "United Kingdom",
        "IN" => "India",
        "SG" => "Singapore",
        "US" => "United States",
        other => other,
    })
}

fn address(role: &'static str, party: &Party) -> Address {
    let joined = |parts: [Option<&str>; 2], between| parts.into_iter().flatten().collect::<Vec<_>>().join(between);
    let rows = [
        party.address_line_1.clone(),
        party.address_line_2.clone(),
        Some(joined([party.city.as_deref(), party.pincode.as_deref()], " ")),
        Some(joined(
            [party.state.as_deref(), party.country.as_deref().or(country(party.country_code.as_deref()))],
            ", ",
        )),
        party.gstin.as_ref().map(|gstin| format!("GSTIN {gstin}")),
        party.tax_id.as_ref().map(|number| format!("Tax number {number}")),
        party.pan.as_ref().map(|pan| format!("PAN {pan}")),
        party.email.clone(),
        party.phone.clone(),
        party.website.clone(),
    ];
    let rows = rows.into_iter().flatten().filter(|row| !row.trim().is_empty()).collect();
    Address { role, name: party.name.clone(), rows }
}

fn columns(record: &Record, has_sac: bool) -> Vec<Column> {
    let text = |label| Column { label, is_figure: false };
    let figure = |label| Column { label, is_figure: true };
    let mut columns = vec![text("Description")];
    columns.extend(has_sac.then(|| text("SAC")));
    if record.document == Kind::CreditNote {
        columns.push(figure("Invoice line"));
    } else {
        columns.extend([figure("Quantity"), figure("Price")]);
    }
    columns.push(figure("Amount"));
    columns.extend(has_discounts(record).then(|| figure("Discount")));
    columns
}

/// Whether any line has a discount: without one there is no column for it.
fn has_discounts(record: &Record) -> bool {
    record.lines.iter().any(|line| line.discount_minor != 0)
}

fn row(record: &Record, line: &Line, sac: Option<&str>) -> Vec<String> {
    let currency = &record.currency;
    let mut cells = vec![match line.first_day.zip(line.last_day) {
        Some((first, last)) => {
            format!("{}, {} to {}", line.description, unbroken(&money::day(first)), unbroken(&money::day(last)))
        }
        None => line.description.clone(),
    }];
    cells.extend(sac.map(str::to_owned));
    if record.document == Kind::CreditNote {
        cells.push(line.invoice_position.map(|position| position.to_string()).unwrap_or_default());
    } else {
        let unit = line.unit.as_deref().unwrap_or_default();
        if unit == RATED {
            // Calls of many prices: what each one came to is told by the sheet of the line.
            cells.extend([String::new(), "by destination".to_owned(), money::amount(line.amount_minor, currency)]);
            return cells;
        }
        cells.push(line.quantity.map(|count| money::quantity(count, unit, currency)).unwrap_or_default());
        let price = line.unit_price_minor.map(|price| money::amount(price, currency)).unwrap_or_default();
        cells.push(match (line.kind.as_deref(), line.price_units.unwrap_or(1)) {
            (Some("included"), _) => "included".to_owned(),
            (_, 1) => price,
            (_, units) => format!("{price} per {}", money::quantity(units, unit, currency)),
        });
    }
    cells.push(money::amount(line.amount_minor, currency));
    cells.extend(has_discounts(record).then(|| match line.discount_minor {
        0 => String::new(),
        discount => money::amount(-discount, currency),
    }));
    cells
}

fn totals(record: &Record, moment: Moment) -> Vec<Total> {
    let currency = &record.currency;
    let total = |label: String, minor, is_sum| Total { label, amount: money::amount(minor, currency), is_sum };
    let mut totals = vec![total("Subtotal".to_owned(), record.subtotal_minor, false)];
    totals.extend(record.discounts.iter().map(|discount| {
        let rate = discount.percent_bp.map(|rate| format!(" ({})", money::rate(rate))).unwrap_or_default();
        total(format!("{}{rate}", discount.name), -discount.amount_minor, false)
    }));
    totals.extend(record.taxes.iter().map(|tax| {
        let taxable = money::amount(tax.taxable_minor, currency);
        let label = match tax.treatment {
            Treatment::Standard => format!("{} {} on {taxable}", tax.name, money::rate(tax.rate_bp)),
            Treatment::ZeroRated => format!("{}, zero-rated, on {taxable}", tax.name),
            Treatment::ReverseCharge => format!("{}, reverse charge, on {taxable}", tax.name),
            Treatment::Exempt => format!("{}, exempt, on {taxable}", tax.name),
        };
        total(label, tax.amount_minor, false)
    }));
    let sum = if record.document == Kind::CreditNote { "Total credited" } else { "Total" };
    totals.push(total(sum.to_owned(), record.total_minor, true));
    if moment == Moment::Now && (record.amount_paid_minor > 0 || record.credited_minor > 0) {
        if record.amount_paid_minor > 0 {
            totals.push(total("Paid".to_owned(), -record.amount_paid_minor, false));
        }
        if record.credited_minor > 0 {
            totals.push(total("Credited".to_owned(), -record.credited_minor, false));
        }
        let due = record.total_minor - record.amount_paid_minor - record.credited_minor;
        totals.push(total("Due".to_owned(), due, true));
    }
    totals
}

fn notes(record: &Record) -> Vec<String> {
    let mut notes: Vec<String> = record.taxes.iter().filter_map(|tax| tax.note.clone()).collect();
    notes.dedup();
    // How to pay is of no use on what is paid back.
    notes.extend(record.issuer.note.clone().filter(|_| record.document != Kind::CreditNote));
    let kind = match record.document {
        Kind::CreditNote => "credit note",
        Kind::Preview => "preview",
        Kind::Invoice => "invoice",
    };
    let days = match record.document {
        Kind::CreditNote => String::new(),
        _ => format!("Days are those of the time zone {}. ", record.timezone),
    };
    notes.push(format!(
        "{days}Amounts are in {}. This {kind} was made electronically and needs no signature.",
        record.currency
    ));
    notes
}

/// The issuer's colour, dark enough to be read on white (WCAG's 4.5 to 1); slate without one.
fn color(given: Option<&str>) -> [u8; 3] {
    let mut color =
        given.and_then(|text| hex::decode(text.strip_prefix('#')?).ok()?.try_into().ok()).unwrap_or([0x1f, 0x3a, 0x5f]);
    while contrast_with_white(color) < 4.5 {
        color = color.map(|part| (u16::from(part) * 9 / 10) as u8);
    }
    color
}

fn contrast_with_white(color: [u8; 3]) -> f64 {
    let linear = color.map(|part| {
        let part = f64::from(part) / 255.0;
        if part <= 0.040_45 { part / 12.92 } else { ((part + 0.055) / 1.055).powf(2.4) }
    });
    1.05 / (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_colour_that_cannot_be_read_is_darkened() {
        assert_eq!(color(Some("#0f4c81")), [0x0f, 0x4c, 0x81]);
        for light in ["#ffffff", "#ffee00", "#7fd7ff"] {
            assert!(contrast_with_white(color(Some(light))) >= 4.5, "{light}");
        }
        assert_eq!(color(Some("red")), color(None));
    }
}
