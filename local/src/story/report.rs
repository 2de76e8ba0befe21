//! The end of the story in numbers, and whether they agree with each other.
//!
//! Every number comes from the database, from the carrier's own record, or (function errors, dead letters) from the parts that counted
//! them; none from the story.

use super::{
    events::Told,
    facts::{Books, Invoice, Standing, Terms},
    faults::Injected,
    witness::{Dial, double_dials},
};
use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::Value;
use std::{collections::BTreeMap, path::PathBuf, time::Duration};

/// The table as one JSON object.
#[derive(Clone, Debug, Serialize)]
pub struct Numbers {
    /// What outcomes were drawn from.
    pub seed: u64,
    /// Leads imported.
    pub leads: i64,
    /// Leads in a state in which they stay.
    pub terminal: i64,
    /// Attempts that have not ended.
    pub open: i64,
    /// Attempts that were dialled.
    pub dials: i64,
    /// Creates that should not have been, by callee in the carrier's record.
    pub double_dials: i64,
    /// Calls counted as usage.
    pub usage_calls: i64,
    /// Calls that the carrier billed.
    pub billable_calls: i64,
    /// Seconds counted as usage.
    pub usage_seconds: i64,
    /// Creates that the carrier accepted.
    pub carrier_creates: i64,
    /// Seconds that the carrier billed.
    pub carrier_bill_seconds: i64,
    /// Invoices made.
    pub invoices: i64,
    /// Seconds that the invoice charges beyond the plan.
    pub invoice_overage_seconds: i64,
    /// Sum of the invoice's lines.
    pub invoice_lines_minor: i64,
    /// The invoice's sum before tax.
    pub subtotal_minor: i64,
    /// The invoice's tax.
    pub tax_minor: i64,
    /// What is to be paid.
    pub invoice_total_minor: i64,
    /// What went wrong and was not put right: see the other counts of errors.
    pub errors: i64,
    /// Invocations that ended in a function error. While PostgREST was away on purpose they are expected, and no errors.
    pub function_errors: i64,
    /// Messages that were given up.
    pub dead_letters: i64,
    /// Events from outside that were not applied.
    pub unapplied_events: i64,
    /// Events that the database says happened.
    pub events: i64,
    /// Of them, those that the organization's own system was told.
    pub events_received: i64,
    /// Of the attempts dialled, those that the carrier knows nothing of: whoever was to ask it died before.
    pub lost: i64,
    /// What went wrong on purpose.
    pub injected: Option<Injected>,
    /// Attempts by how they ended.
    pub outcomes: BTreeMap<String, i64>,
    /// The invoice's currency.
    pub currency: String,
    /// From the start of the stack to the table.
    pub elapsed_ms: u64,
}

/// Two numbers that must be the same.
#[derive(Clone, Debug)]
pub struct Check {
    /// What is claimed.
    pub claim: &'static str,
    /// What is, and what has to be.
    pub sides: (i64, i64),
}

impl Check {
    /// Whether they are the same.
    pub fn holds(&self) -> bool {
        self.sides.0 == self.sides.1
    }
}

/// What was read when all was over.
pub struct Evidence {
    /// What outcomes were drawn from.
    pub seed: u64,
    /// Leads that the story brought.
    pub calls: usize,
    /// Where the campaign stands.
    pub standing: Standing,
    /// Dialled attempts by their number.
    pub attempts: BTreeMap<i32, i64>,
    /// What the organization's books say.
    pub books: Books,
    /// The invoices made.
    pub invoices: Vec<Invoice>,
    /// The invoice as its reader got it from the API.
    pub shown: Option<Value>,
    /// Usage as its reader got it from the API, before the period closed.
    pub usage: Value,
    /// The carrier's record.
    pub dials: Vec<Dial>,
    /// What the organization's own system was told.
    pub told: Told,
    /// Invocations that ended in a function error.
    pub function_errors: u64,
    /// Whether function errors were to be expected.
    pub outage: bool,
    /// Messages in the dead-letter queues.
    pub dead_letters: u64,
    /// From when to when the operator had stopped all dialling, and no request to the carrier was under way any more.
    pub stopped: Option<(DateTime<Utc>, DateTime<Utc>)>,
    /// What went wrong on purpose.
    pub injected: Option<Injected>,
}

/// The story told.
pub struct Report {
    /// In numbers.
    pub numbers: Numbers,
    /// What must agree.
    pub checks: Vec<Check>,
    /// What was read.
    pub evidence: Evidence,
    /// What took how long.
    pub stages: Vec<(&'static str, Duration)>,
    /// Where things are, by name.
    pub places: Vec<(&'static str, String)>,
    /// The folder of the logs.
    pub log_dir: PathBuf,
}

impl Report {
    /// Whether everything agrees.
    pub fn holds(&self) -> bool {
        self.checks.iter().all(Check::holds)
    }
}

/// Counts and compares. `business` tells the business time of an instant.
pub fn judge(
    evidence: &Evidence,
    business: impl Fn(DateTime<Utc>) -> DateTime<Utc>,
    elapsed: Duration,
) -> (Numbers, Vec<Check>) {
    let Evidence { standing, books, invoices, dials, .. } = evidence;
    let lines = || invoices.iter().flat_map(|invoice| &invoice.lines);
    let overage = |line: &&super::facts::Line| line.kind == "overage" && line.meter.as_deref() == Some("call_seconds");
    let billed = |dial: &Dial| dial.billed_seconds as i64;
    let unapplied: i64 = books.unapplied_events.values().sum();
    let function_errors = evidence.function_errors as i64;
    let dead_letters = evidence.dead_letters as i64;
    let numbers = Numbers {
        seed: evidence.seed,
        leads: books.leads,
        terminal: standing.terminal,
        open: standing.open,
        dials: standing.dials,
        double_dials: double_dials(dials, business) as i64,
        usage_calls: books.calls.days,
        billable_calls: dials.iter().filter(|dial| billed(dial) > 0).count() as i64,
        usage_seconds: books.seconds.days,
        carrier_creates: dials.len() as i64,
        carrier_bill_seconds: dials.iter().map(billed).sum(),
        invoices: invoices.len() as i64,
        invoice_overage_seconds: lines().filter(overage).map(|line| line.quantity).sum(),
        invoice_lines_minor: lines().map(|line| line.amount_minor).sum(),
        subtotal_minor: invoices.iter().map(|invoice| invoice.subtotal_minor).sum(),
        tax_minor: invoices.iter().map(|invoice| invoice.tax_minor).sum(),
        invoice_total_minor: invoices.iter().map(|invoice| invoice.total_minor).sum(),
        errors: dead_letters + unapplied + if evidence.outage { 0 } else { function_errors },
        function_errors,
        dead_letters,
        unapplied_events: unapplied,
        events: evidence.told.happened.len() as i64,
        events_received: evidence.told.agreeing(),
        lost: standing.outcomes.get("lost").copied().unwrap_or_default(),
        injected: evidence.injected.clone(),
        outcomes: standing.outcomes.clone(),
        currency: invoices.first().map(|invoice| invoice.currency.clone()).unwrap_or_default(),
        elapsed_ms: elapsed.as_millis() as u64,
    };
    let mut checks = checks(evidence, &numbers);
    if let Some((from, to)) = evidence.stopped {
        let meanwhile = dials.iter().filter(|dial| dial.was_created_within(from, to)).count() as i64;
        checks.push(Check { claim: "nobody was called while dialling was stopped", sides: (meanwhile, 0) });
    }
    (numbers, checks)
}

fn checks(evidence: &Evidence, numbers: &Numbers) -> Vec<Check> {
    let books = &evidence.books;
    let owed = owed(&books.terms, numbers.usage_seconds);
    let taxes = || evidence.invoices.iter().flat_map(|invoice| &invoice.taxes);
    let tax = taxes().map(|tax| rounded(numbers.subtotal_minor * i64::from(tax.rate_bp), 10_000)).sum();
    let shown = |name: &str| evidence.shown.as_ref().and_then(|shown| find(shown, name)).unwrap_or(-1);
    let check = |claim, one, other| Check { claim, sides: (one, other) };
    vec![
        check("every lead was imported", numbers.leads, evidence.calls as i64),
        check("every lead is in a terminal state", numbers.terminal, numbers.leads),
        check("no call is open", numbers.open, 0),
        check("the carrier was asked for what was dialled", numbers.carrier_creates, numbers.dials - numbers.lost),
        check("nobody was dialled twice", numbers.double_dials, 0),
        check("calls counted = calls the carrier billed", numbers.usage_calls, numbers.billable_calls),
        check("seconds counted = seconds the carrier billed", numbers.usage_seconds, numbers.carrier_bill_seconds),
        check("the calls themselves say the same", books.attempt_seconds, numbers.usage_seconds),
        check(
            "events, days and counters of calls agree",
            books.calls.events,
            agreed(books.calls.days, books.calls.counter),
        ),
        check(
            "events, days and counters of seconds agree",
            books.seconds.events,
            agreed(books.seconds.days, books.seconds.counter),
        ),
        check("nothing is held for calls any more", books.reserved, 0),
        check("one invoice was made", numbers.invoices, 1),
        check("overage = usage beyond the plan", numbers.invoice_overage_seconds, owed.seconds),
        check("the lines are what usage and plan give", numbers.invoice_lines_minor, owed.subtotal_minor),
        check("subtotal = sum of the lines", numbers.subtotal_minor, numbers.invoice_lines_minor),
        check("tax = what the rates give", numbers.tax_minor, tax),
        check("total = subtotal + tax", numbers.invoice_total_minor, numbers.subtotal_minor + numbers.tax_minor),
        check("the customer is shown that total", shown("total_minor"), numbers.invoice_total_minor),
        check("events received = events that happened", numbers.events_received, numbers.events),
        check("no errors", numbers.errors, 0),
    ]
}

/// The one number that two are, or one that nothing equals.
fn agreed(one: i64, other: i64) -> i64 {
    if one == other { one } else { i64::MIN }
}

/// What a plan makes of a usage.
struct Owed {
    seconds: i64,
    subtotal_minor: i64,
}

fn owed(terms: &Terms, used_seconds: i64) -> Owed {
    let seconds = (used_seconds - terms.included_seconds).max(0);
    let overage = rounded(seconds * terms.overage_price_minor, terms.overage_unit);
    Owed { seconds, subtotal_minor: terms.base_minor + overage }
}

/// A quotient of what is not negative, half away from zero.
fn rounded(dividend: i64, divisor: i64) -> i64 {
    (2 * dividend + divisor) / (2 * divisor)
}

/// A number of a JSON object, wherever in it the object lies that has it.
fn find(value: &Value, name: &str) -> Option<i64> {
    match value {
        Value::Object(object) => {
            object.get(name).and_then(Value::as_i64).or_else(|| object.values().find_map(|value| find(value, name)))
        }
        Value::Array(array) => array.iter().find_map(|value| find(value, name)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overage_is_priced_by_the_second_and_rounded_once() {
        let terms = Terms { base_minor: 99_900, included_seconds: 3_600, overage_price_minor: 600, overage_unit: 60 };
        assert_eq!(owed(&terms, 3_600).subtotal_minor, 99_900);
        assert_eq!(owed(&terms, 100).seconds, 0);
        let owed = owed(&terms, 3_601);
        assert_eq!((owed.seconds, owed.subtotal_minor), (1, 99_910));
        assert_eq!([rounded(5, 10), rounded(4, 10), rounded(15, 10)], [1, 0, 2]);
    }

    #[test]
    fn a_number_is_found_in_whatever_it_is_wrapped() {
        let shown = serde_json::json!({"invoice": {"lines": [], "total_minor": 7}});
        assert_eq!(find(&shown, "total_minor"), Some(7));
    }
}
