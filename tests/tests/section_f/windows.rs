//! The calling window over zones and years, against a model of its own with time zones of its own: quarter hours that are walked through.

use crate::world::World;
use anyhow::{Context, Result};
use jiff::{
    Span, Timestamp,
    civil::{Date, Time},
    tz::TimeZone,
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};

/// Where clocks are put forward and back, by an hour and by half an hour, north and south; where they are not; and where they stand
/// a quarter of an hour beside everybody else's.
const ZONES: [&str; 18] = [
    "America/New_York",
    "America/Chicago",
    "America/Los_Angeles",
    "America/Phoenix",
    "America/St_Johns",
    "America/Havana",
    "America/Santiago",
    "America/Sao_Paulo",
    "Europe/London",
    "Europe/Paris",
    "Asia/Kolkata",
    "Asia/Kathmandu",
    "Asia/Tokyo",
    "Australia/Lord_Howe",
    "Australia/Sydney",
    "Pacific/Auckland",
    "Pacific/Chatham",
    "UTC",
];
const QUARTER: i64 = 900;
/// How far the model looks ahead, in quarter hours: beyond what a window may begin in.
const AHEAD: i64 = 8 * 96;
const CASES: usize = 2_000;

/// Places with the hours of their law and a zone of theirs: the country's alone, states with a weekend of their own, and those where
/// nobody is called on a holiday. Holidays are known to the end of 2027.
const PLACES: [(&str, Option<&str>, &str); 12] = [
    ("IN", None, "Asia/Kolkata"),
    ("US", Some("NY"), "America/New_York"),
    ("US", Some("FL"), "America/New_York"),
    ("US", Some("LA"), "America/Chicago"),
    ("US", Some("TX"), "America/Chicago"),
    ("US", Some("AL"), "America/Chicago"),
    ("US", Some("UT"), "America/Denver"),
    ("US", Some("WY"), "America/Denver"),
    ("US", Some("SD"), "America/Denver"),
    ("US", Some("WA"), "America/Los_Angeles"),
    ("US", Some("RI"), "America/New_York"),
    ("US", Some("PA"), "America/New_York"),
];

/// The hours of a weekday in one jurisdiction.
struct Hours {
    jurisdiction: String,
    weekday: i8,
    open: Option<(Time, Time)>,
    on_holidays: bool,
}

/// What the law of a place says, as its tables have it.
struct Law {
    country: &'static str,
    region: Option<&'static str>,
    purpose: &'static str,
    hours: Vec<Hours>,
    /// Holidays by jurisdiction.
    holidays: Vec<(String, Date)>,
}

impl Law {
    /// Reads it for a place and a purpose.
    fn read(
        rows: &Value,
        (country, region): (&'static str, Option<&'static str>),
        purpose: &'static str,
    ) -> Result<Self> {
        let applies = |row: &&Value| {
            let jurisdiction = row["jurisdiction"].as_str().unwrap_or_default();
            jurisdiction == country || region.is_some_and(|region| jurisdiction == format!("{country}-{region}"))
        };
        let text = |row: &Value, key: &str| row[key].as_str().unwrap_or_default().to_owned();
        let all = |key: &str| rows[key].as_array().cloned().unwrap_or_default();
        let mut hours = Vec::new();
        for row in all("hours").iter().filter(applies).filter(|row| row["purpose"] == purpose) {
            let weekday = i8::try_from(row["weekday"].as_i64().context("no weekday")?)?;
            let open = match row["opens"].as_str().zip(row["closes"].as_str()) {
                Some((opens, closes)) => Some((opens.parse()?, closes.parse()?)),
                None => None,
            };
            hours.push(Hours {
                jurisdiction: text(row, "jurisdiction"),
                weekday,
                open,
                on_holidays: row["on_holidays"] == true,
            });
        }
        let holidays = all("holidays");
        let holidays = holidays.iter().filter(applies);
        let holidays = holidays.map(|row| Ok((text(row, "jurisdiction"), text(row, "day").parse()?)));
        Ok(Self { country, region, purpose, hours, holidays: holidays.collect::<Result<_>>()? })
    }

    fn allows(&self, day: Date, time: Time) -> bool {
        let weekday = day.weekday().to_monday_one_offset();
        let last = self.holidays.iter().filter(|(place, _)| place == self.country).map(|(_, day)| *day).max();
        let is_holiday = self.holidays.iter().any(|(_, holiday)| *holiday == day) || last.is_none_or(|last| day > last);
        let mut today = self.hours.iter().filter(|hours| hours.weekday == weekday);
        let allows = |hours: &Hours| {
            hours.open.is_some_and(|(opens, closes)| opens <= time && time < closes)
                && (hours.on_holidays || !is_holiday)
        };
        today.clone().any(|hours| hours.jurisdiction == self.country) && today.all(allows)
    }
}

struct Case {
    law: Option<Law>,
    at: i64,
    zone: &'static str,
    tz: TimeZone,
    opens: Time,
    closes: Time,
    first: Option<Date>,
    last: Option<Date>,
}

impl Case {
    fn draw(rng: &mut StdRng) -> Result<Self> {
        let zone = ZONES[rng.random_range(0..ZONES.len())];
        let year = rng.random_range(2015..2032);
        Self::within(rng, zone, year)
    }

    /// Where the law of a place holds too, in the year whose holidays are known.
    fn under_law(rng: &mut StdRng, rows: &Value) -> Result<Self> {
        let (country, region, zone) = PLACES[rng.random_range(0..PLACES.len())];
        let purpose = if rng.random_bool(0.5) { "service" } else { "promotional" };
        let law = Law::read(rows, (country, region), purpose)?;
        // A third is about holidays, since there are few.
        let holiday = law.holidays.get(rng.random_range(0..3 * law.holidays.len().max(1))).map(|(_, day)| *day);
        let mut case = Self::within(rng, zone, 2027)?;
        if let Some(day) = holiday {
            let shift = rng.random_range(-2 * 86_400..86_400_i64);
            case.at = day.to_zoned(case.tz.clone())?.timestamp().as_second() + shift;
            (case.first, case.last) = (None, None);
        }
        case.law = Some(law);
        Ok(case)
    }

    fn within(rng: &mut StdRng, zone: &'static str, year: i32) -> Result<Self> {
        let tz = TimeZone::get(zone)?;
        // Every other case is within four days of a change of the clocks, where there is one.
        let mut at: Timestamp = format!("{year}-01-01T00:00:00Z").parse()?;
        at += Span::new().seconds(rng.random_range(0..365 * 86_400_i64));
        if rng.random_bool(0.5)
            && let Some(change) = tz.following(at).next()
        {
            at = change.timestamp() + Span::new().seconds(rng.random_range(-4 * 86_400..4 * 86_400_i64));
        }
        let quarter = |rng: &mut StdRng| Time::new(rng.random_range(0..24), rng.random_range(0..4) * 15, 0, 0);
        let (opens, mut closes) = (quarter(rng)?, quarter(rng)?);
        if rng.random_bool(0.1) {
            closes = opens;
        }
        let today = at.to_zoned(tz.clone()).date();
        let mut day = |share: f64| -> Result<Option<Date>> {
            Ok(if rng.random_bool(share) {
                Some(today.checked_add(Span::new().days(rng.random_range(-3..=3)))?)
            } else {
                None
            })
        };
        let (first, last) = (day(0.3)?, day(0.3)?);
        Ok(Self { law: None, at: at.as_second(), zone, tz, opens, closes, first, last })
    }

    /// Whether somebody may be called in the quarter hour that begins at `at`.
    fn is_open(&self, at: i64) -> Result<bool> {
        let local = Timestamp::from_second(at)?.to_zoned(self.tz.clone());
        let (day, time) = (local.date(), local.time());
        let by_day = self.first.is_none_or(|first| day >= first) && self.last.is_none_or(|last| day <= last);
        let by_law = (9..21).contains(&time.hour());
        let by_campaign = if self.opens < self.closes {
            self.opens <= time && time < self.closes
        } else {
            time >= self.opens || time < self.closes
        };
        Ok(by_day && by_law && by_campaign && self.law.as_ref().is_none_or(|law| law.allows(day, time)))
    }

    /// What is wrong with a window that opens and closes at these seconds.
    fn complaint(&self, told: Option<(i64, i64)>) -> Result<Option<String>> {
        let from = self.at - self.at.rem_euclid(QUARTER);
        let mut open = None;
        for step in 0..AHEAD {
            if self.is_open(from + step * QUARTER)? {
                open = Some((from + step * QUARTER).max(self.at));
                break;
            }
        }
        let Some((opens, closes)) = told else {
            return Ok(open.map(|open| format!("nothing was found, and it opens at {open}")));
        };
        if open != Some(opens.max(self.at)) {
            return Ok(Some(format!("it opens at {opens}, and should at {open:?}")));
        }
        let mut at = opens.max(from);
        while at < closes {
            if !self.is_open(at)? {
                return Ok(Some(format!("{at} is in it, and closed")));
            }
            at += QUARTER;
        }
        // A window of a whole day is two that touch.
        let touches =
            self.opens == self.closes && Timestamp::from_second(closes)?.to_zoned(self.tz.clone()).time() == self.opens;
        Ok((closes <= self.at || self.is_open(closes)? && !touches)
            .then(|| format!("it closes at {closes}, too early")))
    }

    fn json(&self, number: usize) -> Value {
        json!({
            "number": number, "at": self.at, "zone": self.zone, "opens": self.opens.to_string(), "closes": self.closes.to_string(),
            "first": self.first.map(|day| day.to_string()), "last": self.last.map(|day| day.to_string()),
            "country": self.law.as_ref().map(|law| law.country), "region": self.law.as_ref().and_then(|law| law.region),
            "purpose": self.law.as_ref().map(|law| law.purpose),
        })
    }
}

/// Compares what the database finds for each case with the model; `window` is how it is asked.
async fn compare(world: &World, cases: &[Case], window: &str) -> Result<()> {
    let asked: Vec<Value> = cases.iter().enumerate().map(|(number, case)| case.json(number)).collect();
    let told = world
        .is(&format!(
            "select jsonb_agg(jsonb_build_array(extract(epoch from stretch.opens_at)::bigint, extract(epoch from stretch.closes_at)::bigint) order by asked.number)
             from jsonb_to_recordset('{}') as asked (
               number integer, at bigint, zone text, opens time, closes time, first date, last date, country text, region text, purpose text
             )
             cross join lateral {window} as stretch",
            Value::Array(asked)
        ))
        .await?;
    let told: Vec<Value> = serde_json::from_str(&told)?;
    assert_eq!(told.len(), cases.len());
    let mut found = 0;
    for (case, told) in cases.iter().zip(&told) {
        let stretch = told[0].as_i64().zip(told[1].as_i64());
        found += usize::from(stretch.is_some());
        let complaint = case.complaint(stretch).with_context(|| case.json(0).to_string())?;
        assert_eq!(complaint, None, "{}", case.json(0));
    }
    assert!(found > cases.len() / 2 && found < cases.len(), "{found} of {} windows were found", cases.len());
    Ok(())
}

#[tokio::test]
async fn f19_a_calling_window_is_that_of_a_model_in_every_zone_and_at_every_change_of_the_clocks() -> Result<()> {
    let world = World::new().await?;
    let mut rng = StdRng::seed_from_u64(19);
    let cases = (0..CASES).map(|_| Case::draw(&mut rng)).collect::<Result<Vec<_>>>()?;
    compare(
        &world,
        &cases,
        "private.calling_window(to_timestamp(asked.at), asked.zone, asked.opens, asked.closes, asked.first, asked.last)",
    )
    .await
}

#[tokio::test]
async fn f19_and_what_the_law_of_india_and_of_the_states_leaves_of_it_is_that_of_the_model() -> Result<()> {
    let world = World::new().await?;
    let rows = world
        .is("select jsonb_build_object(
               'hours', (select jsonb_agg(to_jsonb(law)) from public.calling_hours as law),
               'holidays', (select jsonb_agg(to_jsonb(holiday)) from public.calling_holidays as holiday)
             )")
        .await?;
    let rows: Value = serde_json::from_str(&rows)?;
    let mut rng = StdRng::seed_from_u64(20);
    let cases = (0..CASES).map(|_| Case::under_law(&mut rng, &rows)).collect::<Result<Vec<_>>>()?;
    let window = "private.legal_window(
        to_timestamp(asked.at), asked.zone,
        jsonb_populate_record(null::public.campaigns, jsonb_build_object(
          'time_start', asked.opens, 'time_end', asked.closes, 'start_date', asked.first, 'end_date', asked.last, 'purpose', asked.purpose
        )),
        asked.country, asked.region
      )";
    compare(&world, &cases, window).await
}
