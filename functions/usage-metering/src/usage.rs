//! What an organization has used, for one of its users: now against its limits, day by day, as JSON, CSV or a page.

use crate::{Metering, page};
use chrono::{DateTime, NaiveDate, Utc};
use http::{HeaderValue, StatusCode, header};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use shared::{
    Error, Result,
    http::{self as web, Request, Response},
};
use std::fmt::Write;

/// The answer of `get_usage_overview`, as far as the page shows it.
#[derive(Deserialize)]
pub struct Usage {
    pub period: Period,
    pub plan: Option<Plan>,
    pub meters: Vec<Meter>,
    pub standing: Vec<Standing>,
}

/// A billing period, from local midnight to local midnight.
#[derive(Deserialize)]
pub struct Period {
    start: DateTime<Utc>,
    end: DateTime<Utc>,
    pub timezone: String,
}

impl Period {
    /// How many days of the calendar it has; one of them may be an hour longer or shorter.
    pub fn days(&self) -> u64 {
        ((self.end - self.start).num_hours() + 12).max(0) as u64 / 24
    }
}

/// The plan of an organization.
#[derive(Deserialize)]
pub struct Plan {
    pub name: String,
}

/// What was used of one meter; no limit is unlimited.
#[derive(Deserialize)]
pub struct Meter {
    pub meter: String,
    pub name: String,
    pub unit: String,
    #[serde(default)]
    pub aggregation: Aggregation,
    pub used: i64,
    pub reserved: i64,
    pub included: Option<i64>,
    pub limit: Option<i64>,
    pub overage: i64,
}

/// What a period makes of its days.
#[derive(Clone, Copy, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Aggregation {
    #[default]
    Sum,
    Count,
    Max,
    Unique,
    Latest,
}

impl Aggregation {
    /// Whether the days of a period add up to it.
    pub fn adds_up(self) -> bool {
        matches!(self, Self::Sum | Self::Count)
    }
}

/// How many there are now of what the plan has room for.
#[derive(Deserialize)]
pub struct Standing {
    pub name: String,
    pub unit: String,
    pub used: i64,
    pub limit: Option<i64>,
}

/// The answer of `get_usage_daily`.
#[derive(Deserialize)]
pub struct Daily {
    pub from: NaiveDate,
    pub to: NaiveDate,
    pub days: Vec<Day>,
}

/// What was used of one meter on one day.
#[derive(Deserialize)]
pub struct Day {
    pub day: NaiveDate,
    pub meter: String,
    pub quantity: i64,
    events: i64,
}

/// What of the days is asked for; a date that is none is told as such before the database is asked.
#[derive(Default, Serialize)]
struct Wanted {
    #[serde(skip_serializing_if = "Option::is_none")]
    from_day: Option<NaiveDate>,
    #[serde(skip_serializing_if = "Option::is_none")]
    to_day: Option<NaiveDate>,
    #[serde(skip_serializing_if = "Option::is_none")]
    meter: Option<String>,
}

/// `GET usage`: the current billing period, meter by meter, and what there is of what the plan has room for, under the user's own JWT; a page for who accepts HTML before JSON.
/// Errors: 401 without a JWT, 403 without `usage.view`.
pub async fn current(metering: &Metering, request: &Request) -> Result<Response> {
    if accepts(request, "text/html") {
        return self::page(metering, request).await;
    }
    let usage: Value = metering.supabase.call_as(request.user_jwt()?, "get_usage_overview", &json!({})).await?;
    web::json(&usage)
}

/// `GET usage.html`, and `GET usage` in a browser: the current period as a page with a chart for each meter.
pub async fn page(metering: &Metering, request: &Request) -> Result<Response> {
    let jwt = request.user_jwt()?;
    let nothing = json!({});
    let (usage, daily) = tokio::try_join!(
        metering.supabase.call_as::<Usage>(jwt, "get_usage_overview", &nothing),
        metering.supabase.call_as::<Daily>(jwt, "get_usage_daily", &nothing),
    )?;
    shown(&usage, &daily)
}

/// The page as an answer, which nobody on the way keeps.
pub fn shown(usage: &Usage, daily: &Daily) -> Result<Response> {
    let mut response = web::text(StatusCode::OK, "text/html; charset=utf-8", page::html(usage, daily))?;
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_SECURITY_POLICY,
        HeaderValue::from_static("default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("private, no-store"));
    headers.insert(header::VARY, HeaderValue::from_static("accept, authorization"));
    // The address of a page that was opened by a link is as good as a key for a while.
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    Ok(response)
}

/// `GET usage/daily?from&to&meter`: day by day, both ends included; of the current period until today where no day is named. CSV for
/// who accepts it or asks for `usage/daily.csv`. Errors as above, and 400 for what is no day, no meter, or more than 400 days.
pub async fn daily(metering: &Metering, request: &Request, csv: bool) -> Result<Response> {
    let jwt = request.user_jwt()?;
    let mut wanted = Wanted::default();
    for (name, value) in request.query_pairs() {
        match name.as_str() {
            "from" => wanted.from_day = Some(day("from", &value)?),
            "to" => wanted.to_day = Some(day("to", &value)?),
            "meter" => wanted.meter = Some(value),
            _ => {}
        }
    }
    if !csv && !accepts(request, "text/csv") {
        let daily: Value = metering.supabase.call_as(jwt, "get_usage_daily", &wanted).await?;
        return web::json(&daily);
    }
    let daily: Daily = metering.supabase.call_as(jwt, "get_usage_daily", &wanted).await?;
    let mut table = String::from("day,meter,quantity,events\r\n");
    for day in &daily.days {
        // A meter's key has no character that CSV would quote.
        let _ = write!(table, "{},{},{},{}\r\n", day.day, day.meter, day.quantity, day.events);
    }
    let mut response = web::text(StatusCode::OK, "text/csv; charset=utf-8; header=present", table)?;
    response.headers_mut().insert(
        header::CONTENT_DISPOSITION,
        HeaderValue::try_from(format!("attachment; filename=\"usage-{}-to-{}.csv\"", daily.from, daily.to))
            .map_err(|_| Error::internal("a date is no header"))?,
    );
    Ok(response)
}

fn day(field: &str, given: &str) -> Result<NaiveDate> {
    given.parse().map_err(|_| Error::malformed(field, format!("{field} is a day like 2026-01-31")))
}

/// Whether a media type is named before JSON.
fn accepts(request: &Request, media: &str) -> bool {
    let accept = request.header("accept").unwrap_or_default();
    let place = |wanted: &str| {
        accept.split(',').position(|item| item.split(';').next().is_some_and(|item| item.trim() == wanted))
    };
    match (place(media), place("application/json")) {
        (Some(own), Some(json)) => own < json,
        (own, _) => own.is_some(),
    }
}
