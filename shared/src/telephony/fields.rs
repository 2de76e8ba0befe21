//! Fields of a callback, whether it is a form or JSON.

use chrono::{DateTime, SecondsFormat};
use serde_json::Value;
use std::collections::HashMap;

/// A form, by name. Of a name that comes twice the last value counts.
pub(super) struct Form(HashMap<String, String>);

impl Form {
    pub fn read(body: &[u8]) -> Self {
        Self(form_urlencoded::parse(body).into_owned().collect())
    }

    /// A value that is not blank.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    pub fn owned(&self, name: &str) -> Option<String> {
        self.text(name).map(storable)
    }

    /// A count that may be: carriers write -1 for what they do not know yet.
    pub fn count(&self, name: &str) -> Option<i64> {
        self.text(name).and_then(count)
    }
}

/// A value of a JSON object, by path.
pub(super) fn text<'v>(value: &'v Value, path: &str) -> Option<&'v str> {
    value.pointer(path)?.as_str().filter(|text| !text.is_empty())
}

/// As [`text`], to be kept.
pub(super) fn owned(value: &Value, path: &str) -> Option<String> {
    text(value, path).map(storable)
}

/// Text that PostgreSQL stores: it has no NUL.
fn storable(text: &str) -> String {
    text.replace('\0', "")
}

/// A count that is written as a number or as text.
pub(super) fn json_count(value: &Value, path: &str) -> Option<i64> {
    match value.pointer(path)? {
        Value::Number(number) => number.as_i64().or_else(|| number.as_f64().map(|n| n as i64)).filter(bounded),
        Value::String(text) => count(text),
        _ => None,
    }
}

fn count(text: &str) -> Option<i64> {
    text.parse().ok().filter(bounded)
}

/// What a column of seconds takes; a carrier that says more says nothing.
fn bounded(count: &i64) -> bool {
    (0..=i64::from(i32::MAX)).contains(count)
}

/// RFC 3339 as RFC 3339; `None` without an offset.
pub(super) fn rfc3339(text: &str) -> Option<String> {
    let instant = DateTime::parse_from_rfc3339(text).ok()?;
    Some(instant.to_utc().to_rfc3339_opts(SecondsFormat::AutoSi, true))
}

/// RFC 2822, as Twilio writes times, as RFC 3339.
pub(super) fn rfc2822(text: &str) -> Option<String> {
    let instant = DateTime::parse_from_rfc2822(text).ok()?;
    Some(instant.to_utc().to_rfc3339_opts(SecondsFormat::AutoSi, true))
}

/// Seconds from one RFC 3339 time to another.
pub(super) fn seconds_between(from: &str, to: &str) -> Option<i64> {
    let instant = |text| DateTime::parse_from_rfc3339(text).ok();
    Some((instant(to)? - instant(from)?).num_seconds()).filter(bounded)
}

/// A piece of a carrier's text that may stand in a notice: short, and without what breaks a line.
pub(super) fn excerpt(text: &str) -> String {
    text.chars().filter(|character| !character.is_control()).take(80).collect()
}
