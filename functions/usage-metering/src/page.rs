//! What an organization has used, as a page: one file, no script, a chart for each meter against its limit, good on a phone.

use crate::usage::{Daily, Meter, Usage};
use chrono::{Days, NaiveDate};
use std::{collections::BTreeMap, fmt::Write};

const STYLE: &str = include_str!("page.css");

/// The drawing's size, in units of its own; it is scaled to the width of its card.
const WIDTH: f64 = 340.0;
const HEIGHT: f64 = 130.0;
/// Room above for the label of the limit, and below for the days.
const TOP: f64 = 16.0;
const FLOOR: f64 = HEIGHT - 18.0;

/// The page. Every text that comes from the database is escaped.
pub fn html(usage: &Usage, daily: &Daily) -> String {
    let mut page = String::with_capacity(16 * 1024);
    let days = usage.period.days().max(1);
    let last = daily.from + Days::new(days - 1);
    let plan = usage.plan.as_ref().map_or_else(|| "No plan".to_owned(), |plan| format!("{} plan", escape(&plan.name)));
    // Writing to a String does not fail.
    let _ = write!(
        page,
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<meta name=\"robots\" content=\"noindex\">\n\
         <title>Usage</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>Usage</h1>\n\
         <p class=\"quiet\">{plan}, {} to {}, days of {}</p>\n<div class=\"meters\">\n",
        time(daily.from),
        time(last),
        escape(&usage.period.timezone),
    );
    for meter in &usage.meters {
        page.push_str(&card(meter, daily, days));
    }
    if usage.meters.is_empty() {
        page.push_str("<p>Nothing is counted yet.</p>\n");
    }
    page.push_str("</div>\n</main>\n</body>\n</html>\n");
    page
}

fn card(meter: &Meter, daily: &Daily, days: u64) -> String {
    // What the plan refuses or sells beyond is the line that matters.
    let (limit, word) = match (meter.limit, meter.included) {
        (Some(limit), _) => (Some(limit), "limit"),
        (None, Some(included)) => (Some(included), "included"),
        (None, None) => (None, "unlimited"),
    };
    let figure = match limit {
        Some(limit) => format!("{} of {}", quantity(meter.used, &meter.unit), quantity(limit, &meter.unit)),
        None => format!("{}, unlimited", quantity(meter.used, &meter.unit)),
    };
    let is_over = limit.is_some_and(|limit| meter.used >= limit);
    let mut notes = Vec::new();
    if let Some(limit) = limit.filter(|limit| *limit > 0) {
        notes.push(format!("{} %", i128::from(meter.used) * 100 / i128::from(limit)));
    }
    if meter.reserved > 0 {
        notes.push(format!("{} held for calls under way", quantity(meter.reserved, &meter.unit)));
    }
    if meter.overage > 0 {
        notes.push(format!("{} beyond the plan", quantity(meter.overage, &meter.unit)));
    }
    format!(
        "<section>\n<h2>{}</h2>\n<p class=\"figure{}\">{}</p>\n<p class=\"quiet\">{}</p>\n{}</section>\n",
        escape(&meter.name),
        if is_over { " over" } else { "" },
        escape(&figure),
        escape(&notes.join(", ")),
        chart(meter, daily, days, limit.map(|limit| (limit, word))),
    )
}

/// A bar a day, and the sum so far as a line that meets the limit's, on one scale.
fn chart(meter: &Meter, daily: &Daily, days: u64, limit: Option<(i64, &str)>) -> String {
    let by_day: BTreeMap<NaiveDate, i64> =
        daily.days.iter().filter(|day| day.meter == meter.meter).map(|day| (day.day, day.quantity)).collect();
    let total: i64 = by_day.values().sum();
    let top = limit.map_or(0, |(limit, _)| limit).max(total).max(1);
    let y = |units: i64| FLOOR - (FLOOR - TOP) * units as f64 / top as f64;
    let step = WIDTH / days as f64;
    let mut marks = String::new();
    let mut line = String::new();
    let mut sum = 0;
    for (place, day) in daily.from.iter_days().take(days as usize).enumerate().take_while(|(_, day)| *day <= daily.to) {
        let units = by_day.get(&day).copied().unwrap_or(0);
        sum += units;
        let x = step * place as f64;
        if units > 0 {
            let height = (FLOOR - y(units)).max(1.0);
            let _ = write!(
                marks,
                "<rect class=\"bar\" x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{height:.1}\"><title>{}: {}</title></rect>",
                x + step * 0.15,
                FLOOR - height,
                step * 0.7,
                time_text(day),
                escape(&quantity(units, &meter.unit)),
            );
        }
        let _ = write!(line, "{:.1},{:.1} {:.1},{:.1} ", x, y(sum), x + step, y(sum));
    }
    let mut ceiling = String::new();
    if let Some((limit, word)) = limit {
        let _ = write!(
            ceiling,
            "<line class=\"limit\" x1=\"0\" x2=\"{WIDTH}\" y1=\"{0:.1}\" y2=\"{0:.1}\"/>\
             <text class=\"at-limit\" x=\"0\" y=\"{1:.1}\">{word} {2}</text>",
            y(limit),
            y(limit) - 4.0,
            escape(&quantity(limit, &meter.unit)),
        );
    }
    let last = daily.from + Days::new(days - 1);
    format!(
        "<figure>\n<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{name}: {total} so far, day by day\">\
         <line class=\"axis\" x1=\"0\" x2=\"{WIDTH}\" y1=\"{FLOOR}\" y2=\"{FLOOR}\"/>{marks}<polyline class=\"sum\" points=\"{line}\"/>{ceiling}\
         <text x=\"0\" y=\"{foot}\">{first}</text><text x=\"{WIDTH}\" y=\"{foot}\" text-anchor=\"end\">{last}</text></svg>\n</figure>\n",
        name = escape(&meter.name),
        total = escape(&quantity(total, &meter.unit)),
        line = line.trim_end(),
        foot = HEIGHT - 4.0,
        first = daily.from.format("%-d %b"),
        last = last.format("%-d %b"),
    )
}

/// A quantity as people say it: time in hours and minutes, all else with its unit.
fn quantity(units: i64, unit: &str) -> String {
    match unit {
        "second" if units >= 3_600 => format!("{} h {:02} min", grouped(units / 3_600), units % 3_600 / 60),
        "second" if units >= 60 => format!("{} min {:02} s", units / 60, units % 60),
        "second" => format!("{units} s"),
        _ => format!("{} {unit}{}", grouped(units), if units == 1 { "" } else { "s" }),
    }
}

/// 1234567 as 1,234,567.
fn grouped(units: i64) -> String {
    let digits = units.unsigned_abs().to_string();
    let mut text = String::from(if units < 0 { "-" } else { "" });
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn time(day: NaiveDate) -> String {
    format!("<time datetime=\"{day}\">{}</time>", time_text(day))
}

fn time_text(day: NaiveDate) -> String {
    day.format("%-d %B %Y").to_string()
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
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

    fn page(name: &str) -> String {
        let usage = serde_json::from_value(json!({
            "organization_id": "x",
            "period": {"start": "2026-03-08T00:00:00-05:00", "end": "2026-04-08T00:00:00-04:00", "timezone": "America/New_York"},
            "plan": {"slug": "pro", "name": name, "status": "active"},
            "meters": [
                {"meter": "ai_calls", "name": "AI calls", "unit": "call", "used": 5230, "reserved": 3, "included": 5000, "limit": null, "overage": 230},
                {"meter": "call_seconds", "name": name, "unit": "second", "used": 4000, "reserved": 0, "included": null, "limit": null, "overage": 0},
            ],
        }));
        let daily = serde_json::from_value(json!({
            "timezone": "America/New_York", "from": "2026-03-08", "to": "2026-03-10",
            "days": [{"day": "2026-03-08", "meter": "ai_calls", "quantity": 5000, "events": 5}, {"day": "2026-03-10", "meter": "ai_calls", "quantity": 230, "events": 1}],
        }));
        html(&usage.unwrap(), &daily.unwrap())
    }

    #[test]
    fn each_meter_has_its_figure_and_a_bar_for_each_day_that_was_used() {
        let page = page("Pro");
        assert!(
            page.contains("5,230 calls of 5,000 calls")
                && page.contains("104 %, 3 calls held for calls under way, 230 calls beyond the plan")
        );
        assert!(page.contains("1 h 06 min, unlimited"));
        assert_eq!(
            (page.matches("<rect").count(), page.matches("class=\"limit\"").count(), page.matches("<svg").count()),
            (2, 1, 2)
        );
        // Thirty-one days, although an hour is missing.
        assert!(page.contains(">7 Apr<") && !page.contains("<script"));
    }

    #[test]
    fn no_text_becomes_markup() {
        let page = page("<b>\"&'");
        assert!(!page.contains("<b>") && page.contains("&lt;b&gt;&quot;&amp;&#39;"));
    }

    #[test]
    fn quantities_are_said_as_people_say_them() {
        let said: Vec<String> = [0, 59, 61, 3_600, 7_265_000].map(|units| quantity(units, "second")).to_vec();
        assert_eq!(said, ["0 s", "59 s", "1 min 01 s", "1 h 00 min", "2,018 h 03 min"]);
        assert_eq!(quantity(1, "call"), "1 call");
    }
}
