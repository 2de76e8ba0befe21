//! What an organization has used, as a page: one file, no script, a chart for each meter against its limit, good on a phone.

use crate::usage::{Daily, Meter, Standing, Usage};
use chrono::{Days, NaiveDate};
use std::{collections::BTreeMap, fmt::Write};

const STYLE: &str = include_str!("page.css");

/// The drawing's size, in units of its own; it is scaled to the width of its card.
const WIDTH: f64 = 340.0;
const HEIGHT: f64 = 178.0;
/// Room for the days below, and for the label of the highest above.
const FOOT: f64 = 16.0;
const TOP: f64 = 16.0;
/// Where the sum so far stands when each day has its own bars below it, and how far below they begin.
const MIDDLE: f64 = 100.0;
const APART: f64 = 24.0;
/// From which part of a limit on it is near, in hundredths.
const NEAR: i128 = 80;

/// The page. Every text that comes from the database is escaped.
pub fn html(usage: &Usage, daily: &Daily) -> String {
    let mut page = String::with_capacity(16 * 1024);
    let days = usage.period.days().max(1);
    let last = daily.from + Days::new(days - 1);
    let gone = (daily.to - daily.from).num_days() + 1;
    let plan = usage.plan.as_ref().map_or_else(|| "No plan".to_owned(), |plan| format!("{} plan", escape(&plan.name)));
    // Writing to a String does not fail.
    let _ = write!(
        page,
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<meta name=\"robots\" content=\"noindex\">\n\
         <title>Usage</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>Usage</h1>\n\
         <p class=\"quiet\">{plan} \u{b7} {} to {} \u{b7} day {gone} of {days} \u{b7} {}</p>\n<div class=\"meters\">\n",
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
    page.push_str("</div>\n");
    page.push_str(&room(&usage.standing));
    page.push_str("</main>\n</body>\n</html>\n");
    page
}

/// How much of a limit is used, in whole hundredths.
fn part(used: i64, limit: i64) -> i128 {
    i128::from(used) * 100 / i128::from(limit.max(1))
}

/// How a figure stands to its limit, as a class of the page.
fn state(used: i64, limit: Option<i64>) -> &'static str {
    match limit {
        Some(limit) if used >= limit => " over",
        Some(limit) if part(used, limit) >= NEAR => " near",
        _ => "",
    }
}

fn card(meter: &Meter, daily: &Daily, days: u64) -> String {
    // What the plan refuses or sells beyond is the line that matters.
    let (limit, word) = match (meter.limit, meter.included) {
        (Some(limit), _) => (Some(limit), "limit"),
        (None, Some(included)) => (Some(included), "included"),
        (None, None) => (None, "unlimited"),
    };
    let mut notes = Vec::new();
    if meter.reserved > 0 {
        notes.push(format!("{} held for what is under way", quantity(meter.reserved, &meter.unit)));
    }
    if meter.overage > 0 {
        notes.push(format!("{} beyond the plan", quantity(meter.overage, &meter.unit)));
    }
    let mut card = format!(
        "<section class=\"meter{}\">\n<div class=\"head\"><h2>{}</h2>",
        state(meter.used, limit),
        escape(&meter.name)
    );
    if let Some(limit) = limit.filter(|limit| *limit > 0) {
        let _ = write!(card, "<p class=\"part\">{} %</p>", part(meter.used, limit));
    }
    let of = limit.map_or_else(|| "unlimited".to_owned(), |limit| format!("of {}", quantity(limit, &meter.unit)));
    let _ = write!(
        card,
        "</div>\n<p class=\"figure\"><b>{}</b> {}</p>\n",
        escape(&quantity(meter.used, &meter.unit)),
        escape(&of)
    );
    if let Some(limit) = limit.filter(|limit| *limit > 0) {
        card.push_str(&bar(&meter.name, meter.used, limit));
    }
    if !notes.is_empty() {
        let _ = writeln!(card, "<p class=\"quiet\">{}</p>", escape(&notes.join(", ")));
    }
    // Of nothing there is nothing to see.
    if meter.used != 0 || daily.days.iter().any(|day| day.meter == meter.meter) {
        card.push_str(&chart(meter, daily, days, limit.map(|limit| (limit, word))));
    }
    card.push_str("</section>\n");
    card
}

fn bar(name: &str, used: i64, limit: i64) -> String {
    format!(
        "<progress max=\"100\" value=\"{}\" aria-label=\"{}\"></progress>\n",
        part(used, limit).clamp(0, 100),
        escape(name)
    )
}

/// What there is now of what the plan has room for.
fn room(standing: &[Standing]) -> String {
    if standing.is_empty() {
        return String::new();
    }
    let mut room = String::from("<section class=\"standing\">\n<h2>In your plan now</h2>\n<dl>\n");
    for one in standing {
        let limit = one.limit.filter(|limit| *limit >= 0);
        let of = limit.map_or_else(|| "unlimited".to_owned(), |limit| format!("of {}", quantity(limit, &one.unit)));
        let _ = writeln!(
            room,
            "<div class=\"{}\"><dt>{}</dt><dd><span class=\"figure\"><b>{}</b> {}</span>{}</dd></div>",
            state(one.used, limit).trim_start(),
            escape(&one.name),
            grouped(one.used),
            escape(&of),
            limit.filter(|limit| *limit > 0).map_or_else(String::new, |limit| bar(&one.name, one.used, limit)),
        );
    }
    room.push_str("</dl>\n</section>\n");
    room
}

/// A part of the drawing, from its floor up to a height: quantities become places.
struct Panel {
    floor: f64,
    height: f64,
    highest: i64,
}

impl Panel {
    fn y(&self, units: i64) -> f64 {
        self.floor - self.height * units as f64 / self.highest.max(1) as f64
    }

    fn line(&self) -> String {
        format!("<line class=\"axis\" x1=\"0\" x2=\"{WIDTH}\" y1=\"{0}\" y2=\"{0}\"/>", self.floor)
    }

    /// The limit, dashed, and what it is.
    fn limit(&self, limit: i64, word: &str, unit: &str) -> String {
        let y = self.y(limit);
        format!(
            "<line class=\"limit\" x1=\"0\" x2=\"{WIDTH}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
             <text class=\"at-limit\" x=\"{WIDTH}\" y=\"{:.1}\" text-anchor=\"end\">{word} {}</text>",
            y - 4.0,
            escape(&quantity(limit, unit))
        )
    }
}

/// A bar a day. Where days add up, the sum so far stands above them, on the limit's scale; else the limit is over the bars.
fn chart(meter: &Meter, daily: &Daily, days: u64, limit: Option<(i64, &str)>) -> String {
    let by_day: BTreeMap<NaiveDate, i64> =
        daily.days.iter().filter(|day| day.meter == meter.meter).map(|day| (day.day, day.quantity)).collect();
    let most = by_day.values().copied().max().unwrap_or(0);
    let total: i64 = by_day.values().sum();
    let ceiling = limit.map_or(0, |(limit, _)| limit);
    let adds_up = meter.aggregation.adds_up();
    let sums = Panel { floor: MIDDLE, height: MIDDLE - TOP, highest: ceiling.max(total) };
    let bars = if adds_up {
        Panel { floor: HEIGHT - FOOT, height: HEIGHT - FOOT - MIDDLE - APART, highest: most }
    } else {
        Panel { floor: HEIGHT - FOOT, height: HEIGHT - FOOT - TOP, highest: ceiling.max(most) }
    };
    let step = WIDTH / days as f64;
    let (mut marks, mut line) = (String::new(), format!("0,{:.1} ", sums.floor));
    let (mut sum, mut right) = (0, 0.0);
    for (place, day) in daily.from.iter_days().take(days as usize).enumerate().take_while(|(_, day)| *day <= daily.to) {
        let units = by_day.get(&day).copied().unwrap_or(0);
        sum += units;
        let x = step * place as f64;
        right = x + step;
        if units > 0 {
            let height = (bars.floor - bars.y(units)).max(1.0);
            let _ = write!(
                marks,
                "<rect class=\"bar\" x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{height:.1}\" rx=\"1\"><title>{}: {}</title></rect>",
                x + step * 0.15,
                bars.floor - height,
                step * 0.7,
                time_text(day),
                escape(&quantity(units, &meter.unit)),
            );
        }
        let _ = write!(line, "{right:.1},{:.1} ", sums.y(sum));
    }
    let mut drawing = String::new();
    if adds_up {
        let _ = write!(
            drawing,
            "<polygon class=\"area\" points=\"{line}{right:.1},{:.1}\"/><polyline class=\"sum\" points=\"{}\"/>{}",
            sums.floor,
            line.trim_end(),
            sums.line()
        );
    }
    if most > 0 && (adds_up || limit.is_none()) {
        let _ = write!(
            drawing,
            "<text x=\"0\" y=\"{:.1}\">by day, at most {}</text>",
            bars.floor - bars.height - 4.0,
            escape(&quantity(most, &meter.unit))
        );
    }
    if let Some((limit, word)) = limit {
        drawing.push_str(&if adds_up { &sums } else { &bars }.limit(limit, word, &meter.unit));
    }
    let last = daily.from + Days::new(days - 1);
    format!(
        "<figure>\n<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{name}: {used} so far, day by day\">\
         {drawing}{marks}{floor}<text x=\"0\" y=\"{foot}\">{first}</text>\
         <text x=\"{WIDTH}\" y=\"{foot}\" text-anchor=\"end\">{last}</text></svg>\n</figure>\n",
        name = escape(&meter.name),
        used = escape(&quantity(meter.used, &meter.unit)),
        floor = bars.line(),
        foot = HEIGHT - 3.0,
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
                {"meter": "lines", "name": "Lines at once", "unit": "line", "aggregation": "max", "used": 17, "reserved": 0, "included": null, "limit": 20, "overage": 0},
            ],
            "standing": [
                {"meter": "users", "name": "Users", "unit": "user", "used": 10, "limit": 10},
                {"meter": "leads", "name": "Leads", "unit": "lead", "used": 1234, "limit": null},
            ],
        }));
        let daily = serde_json::from_value(json!({
            "timezone": "America/New_York", "from": "2026-03-08", "to": "2026-03-10",
            "days": [
                {"day": "2026-03-08", "meter": "ai_calls", "quantity": 5000, "events": 5},
                {"day": "2026-03-10", "meter": "ai_calls", "quantity": 230, "events": 1},
                {"day": "2026-03-08", "meter": "lines", "quantity": 17, "events": 9}, {"day": "2026-03-09", "meter": "lines", "quantity": 4, "events": 9},
            ],
        }));
        html(&usage.unwrap(), &daily.unwrap())
    }

    #[test]
    fn each_meter_has_its_figure_and_a_bar_for_each_day_that_was_used() {
        let page = page("Pro");
        assert!(
            page.contains("<b>5,230 calls</b> of 5,000 calls")
                && page.contains("104 %")
                && page.contains("3 calls held for what is under way, 230 calls beyond the plan")
        );
        assert!(page.contains("<b>1 h 06 min</b> unlimited"));
        assert_eq!(
            (page.matches("<rect").count(), page.matches("class=\"limit\"").count(), page.matches("<svg").count()),
            (4, 2, 3)
        );
        // Thirty-one days, although an hour is missing.
        assert!(page.contains(">7 Apr<") && page.contains("day 3 of 31") && !page.contains("<script"));
    }

    #[test]
    fn only_days_that_add_up_have_a_sum() {
        let page = page("Pro");
        assert_eq!(page.matches("class=\"sum\"").count(), 2, "of the largest there is none");
        assert!(page.contains("at most 5,000 calls") && !page.contains("at most 17 lines"));
    }

    #[test]
    fn what_is_near_its_limit_or_over_it_looks_so() {
        let page = page("Pro");
        assert_eq!((page.matches("meter over\"").count(), page.matches("meter near\"").count()), (1, 1));
        assert!(page.contains("<div class=\"over\"><dt>Users</dt>") && page.contains("<b>1,234</b> unlimited"));
    }

    #[test]
    fn no_text_becomes_markup() {
        let page = page("<i>\"&'");
        assert!(!page.contains("<i>") && page.contains("&lt;i&gt;&quot;&amp;&#39;"));
    }

    #[test]
    fn quantities_are_said_as_people_say_them() {
        let said: Vec<String> = [0, 59, 61, 3_600, 7_265_000].map(|units| quantity(units, "second")).to_vec();
        assert_eq!(said, ["0 s", "59 s", "1 min 01 s", "1 h 00 min", "2,018 h 03 min"]);
        assert_eq!(quantity(1, "call"), "1 call");
    }
}
