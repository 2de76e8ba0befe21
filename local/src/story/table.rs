//! The table that a person wants to read at the end.

use super::report::Report;
use chrono::{DateTime, FixedOffset, TimeDelta};
use std::fmt::Write as _;

/// Width of the whole.
const WIDTH: usize = 96;

/// How to emphasise, where the reader is a terminal.
#[derive(Clone, Copy)]
struct Ink {
    colour: bool,
}

impl Ink {
    fn paint(self, code: &str, text: &str) -> String {
        if self.colour { format!("\u{1b}[{code}m{text}\u{1b}[0m") } else { text.to_owned() }
    }

    fn bold(self, text: &str) -> String {
        self.paint("1", text)
    }

    fn dim(self, text: &str) -> String {
        self.paint("2", text)
    }
}

/// The report as a text. `colour` for a terminal.
pub fn render(report: &Report, colour: bool) -> String {
    let ink = Ink { colour };
    let mut out = String::new();
    head(&mut out, report, ink);
    calls(&mut out, report, ink);
    usage(&mut out, report, ink);
    invoice(&mut out, report, ink);
    events(&mut out, report, ink);
    faults(&mut out, report, ink);
    stages(&mut out, report, ink);
    checks(&mut out, report, ink);
    places(&mut out, report, ink);
    out
}

/// Writing to a text cannot fail.
macro_rules! line {
    ($out:expr, $($arguments:tt)*) => { { let _infallible = writeln!($out, $($arguments)*); } };
}

fn title(out: &mut String, ink: Ink, text: &str) {
    let rule = "─".repeat(WIDTH.saturating_sub(text.chars().count() + 5));
    line!(out, "\n  {} {}", ink.bold(text), ink.dim(&rule));
}

fn head(out: &mut String, report: &Report, ink: Ink) {
    let numbers = &report.numbers;
    let text = format!(
        "{}, {}, one invoice of {}",
        counted(numbers.leads, "lead"),
        counted(numbers.carrier_creates, "call"),
        money(numbers.invoice_total_minor, &numbers.currency)
    );
    line!(out, "\n  {}", ink.bold(&text));
    line!(out, "  {}", ink.dim(&format!("seed {}, {}", numbers.seed, seconds(numbers.elapsed_ms))));
}

fn calls(out: &mut String, report: &Report, ink: Ink) {
    title(out, ink, "Calls");
    let numbers = &report.numbers;
    let all: i64 = numbers.outcomes.values().sum();
    let most = numbers.outcomes.values().copied().max().unwrap_or(1).max(1);
    let mut outcomes: Vec<_> = numbers.outcomes.iter().collect();
    outcomes.sort_by(|one, other| other.1.cmp(one.1).then(one.0.cmp(other.0)));
    for (outcome, count) in outcomes {
        let bar = "█".repeat((count * 40 / most).max(1) as usize);
        let share = format!("{:.1} %", 100.0 * *count as f64 / all.max(1) as f64);
        line!(
            out,
            "  {:<18}{:>9}  {:>7}  {}",
            outcome.replace('_', " "),
            thousands(*count),
            share,
            ink.paint("36", &bar)
        );
    }
    line!(out, "  {:<18}{:>9}  {}", "attempts", thousands(all), ink.dim(&attempts(report)));
    line!(out, "  {:<18}{:>9}  {}", "leads", thousands(numbers.leads), ink.dim(&leads(report)));
    let minutes = format!(
        "{} billed by the carrier for {}",
        duration(numbers.carrier_bill_seconds),
        counted(numbers.billable_calls, "call")
    );
    line!(out, "  {:<18}{:>9}  {}", "minutes", thousands(numbers.carrier_bill_seconds / 60), ink.dim(&minutes));
}

fn attempts(report: &Report) -> String {
    let by_number = report.evidence.attempts.iter().map(|(number, count)| {
        let ordinal = match number {
            1 => "first".to_owned(),
            2 => "second".to_owned(),
            3 => "third".to_owned(),
            n => format!("{n}th"),
        };
        format!("{} {ordinal}", thousands(*count))
    });
    by_number.collect::<Vec<_>>().join(", ")
}

fn leads(report: &Report) -> String {
    let numbers = &report.numbers;
    let open =
        if numbers.open == 0 { "no call open".to_owned() } else { format!("{} open", counted(numbers.open, "call")) };
    format!("{} in a terminal state, {open}", thousands(numbers.terminal))
}

fn usage(out: &mut String, report: &Report, ink: Ink) {
    let usage = &report.evidence.usage;
    let plan = usage["plan"]["name"].as_str().unwrap_or("?");
    title(out, ink, &format!("Usage against the plan “{plan}”{}", period(&usage["period"])));
    line!(out, "  {}", ink.dim(&format!("{:<26}{:>20}{:>20}{:>20}", "", "used", "included", "beyond")));
    for meter in usage["meters"].as_array().into_iter().flatten() {
        let name = meter["name"].as_str().or(meter["meter"].as_str()).unwrap_or("?");
        let unit = meter["unit"].as_str().unwrap_or_default();
        let amount = |name: &str| match meter[name].as_i64() {
            Some(count) if unit == "second" => duration(count),
            Some(count) => thousands(count),
            None => "unlimited".to_owned(),
        };
        line!(out, "  {name:<26}{:>20}{:>20}{:>20}", amount("used"), amount("included"), amount("overage"));
    }
}

/// The days of a period, in its own time zone; nothing when it has none.
fn period(period: &serde_json::Value) -> String {
    let zone = FixedOffset::east_opt(if period["timezone"] == "Asia/Kolkata" { 19_800 } else { 0 });
    let day = |name: &str, less: TimeDelta| {
        let at = DateTime::parse_from_rfc3339(period[name].as_str()?).ok()?;
        Some((at.with_timezone(&zone?) - less).format("%-d %B %Y").to_string())
    };
    match (day("start", TimeDelta::zero()), day("end", TimeDelta::seconds(1))) {
        (Some(first), Some(last)) => format!(", {first} to {last}"),
        _ => String::new(),
    }
}

fn invoice(out: &mut String, report: &Report, ink: Ink) {
    for invoice in &report.evidence.invoices {
        let currency = &invoice.currency;
        title(out, ink, &format!("Invoice {}", invoice.number));
        let dates = format!("of {}, due {}", invoice.date.format("%-d %B %Y"), invoice.due.format("%-d %B %Y"));
        line!(out, "  {}", ink.dim(&dates));
        for item in &invoice.lines {
            let per =
                if item.price_units == 1 { item.unit.clone() } else { format!("{} {}s", item.price_units, item.unit) };
            let price = match item.kind.as_str() {
                "included" => "included".to_owned(),
                _ => format!("{} / {per}", money(item.unit_price_minor, currency)),
            };
            line!(out, "  {:<52}{:>24}{:>18}", item.description, price, money(item.amount_minor, currency));
        }
        line!(out, "  {}", ink.dim(&"─".repeat(WIDTH - 2)));
        line!(out, "  {:<52}{:>42}", "Subtotal", money(invoice.subtotal_minor, currency));
        for tax in &invoice.taxes {
            let name = format!("{} {}.{:02} %", tax.name, tax.rate_bp / 100, tax.rate_bp % 100);
            line!(out, "  {name:<52}{:>42}", money(tax.amount_minor, currency));
        }
        line!(out, "  {}", ink.bold(&format!("{:<52}{:>42}", "Total", money(invoice.total_minor, currency))));
    }
}

fn events(out: &mut String, report: &Report, ink: Ink) {
    let received = report.evidence.told.received.len() as i64;
    title(out, ink, &format!("Events out: {} told to the organization's own system", thousands(received)));
    let topics: Vec<_> = report
        .evidence
        .told
        .topics()
        .into_iter()
        .map(|(topic, count)| format!("{topic:<24}{:>9}", thousands(count)))
        .collect();
    for pair in topics.chunks(2) {
        line!(out, "  {}", pair.join("        "));
    }
}

fn faults(out: &mut String, report: &Report, ink: Ink) {
    let Some(injected) = &report.evidence.injected else { return };
    title(out, ink, "What went wrong on purpose");
    for (name, count) in injected.lines() {
        line!(out, "  {name:<27}{count}");
    }
}

fn stages(out: &mut String, report: &Report, ink: Ink) {
    title(out, ink, "Time");
    let longest = report.stages.iter().map(|(_, took)| took.as_millis()).max().unwrap_or(1).max(1);
    for (stage, took) in &report.stages {
        let bar = "█".repeat((took.as_millis() * 40 / longest) as usize);
        line!(out, "  {stage:<27}{:>9}  {}", seconds(took.as_millis() as u64), ink.paint("36", &bar));
    }
}

fn checks(out: &mut String, report: &Report, ink: Ink) {
    title(out, ink, "Checks");
    for check in &report.checks {
        let (one, other) = (thousands(check.sides.0), thousands(check.sides.1));
        let (mark, sides) = if check.holds() {
            (ink.paint("32", "✓"), one)
        } else {
            (ink.paint("31;1", "✗"), ink.paint("31;1", &format!("{one}, but {other}")))
        };
        line!(out, "  {mark} {:<50}{sides:>16}", check.claim);
    }
}

fn places(out: &mut String, report: &Report, ink: Ink) {
    title(out, ink, "Where to look");
    for (name, place) in &report.places {
        line!(out, "  {name:<12}{place}");
    }
}

fn seconds(milliseconds: u64) -> String {
    format!("{}.{} s", milliseconds / 1_000, milliseconds % 1_000 / 100)
}

/// Minutes and seconds.
fn duration(seconds: i64) -> String {
    format!("{} min {:02} s", thousands(seconds / 60), seconds % 60)
}

/// A whole number with commas.
fn thousands(number: i64) -> String {
    let digits = number.unsigned_abs().to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    if number < 0 { format!("-{out}") } else { out }
}

/// So many of something.
fn counted(number: i64, thing: &str) -> String {
    format!("{} {thing}{}", thousands(number), if number == 1 { "" } else { "s" })
}

/// An amount as its readers write it: rupees in lakhs and crores.
fn money(minor: i64, currency: &str) -> String {
    let (whole, rest) = (minor.unsigned_abs() / 100, minor.unsigned_abs() % 100);
    let sign = if minor < 0 { "-" } else { "" };
    if currency != "INR" {
        return format!("{sign}{} {}.{rest:02}", currency, thousands(whole as i64));
    }
    let digits = whole.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        let left = digits.len() - index;
        if index > 0 && (left == 3 || left > 3 && !left.is_multiple_of(2)) {
            out.push(',');
        }
        out.push(digit);
    }
    format!("{sign}₹ {out}.{rest:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_numbers_as_people_do() {
        assert_eq!([0, 999, 1_000, 1_234_567].map(thousands), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!(thousands(-1_000), "-1,000");
        assert_eq!(money(99_900, "INR"), "₹ 999.00");
        assert_eq!(money(123_456_789, "INR"), "₹ 12,34,567.89");
        assert_eq!(money(1_000_000_000, "INR"), "₹ 1,00,00,000.00");
        assert_eq!(money(5, "USD"), "USD 0.05");
        assert_eq!(duration(3_661), "61 min 01 s");
    }
}
