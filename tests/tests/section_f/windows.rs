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

struct Case {
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
        let tz = TimeZone::get(zone)?;
        let year = rng.random_range(2015..2032);
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
        Ok(Self { at: at.as_second(), zone, tz, opens, closes, first, last })
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
        Ok(by_day && by_law && by_campaign)
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
        })
    }
}

#[tokio::test]
async fn f19_a_calling_window_is_that_of_a_model_in_every_zone_and_at_every_change_of_the_clocks() -> Result<()> {
    let world = World::new().await?;
    let mut rng = StdRng::seed_from_u64(19);
    let cases = (0..CASES).map(|_| Case::draw(&mut rng)).collect::<Result<Vec<_>>>()?;
    let asked: Vec<Value> = cases.iter().enumerate().map(|(number, case)| case.json(number)).collect();
    let told = world
        .is(&format!(
            "select jsonb_agg(jsonb_build_array(extract(epoch from stretch.opens_at)::bigint, extract(epoch from stretch.closes_at)::bigint) order by asked.number)
             from jsonb_to_recordset('{}') as asked (number integer, at bigint, zone text, opens time, closes time, first date, last date)
             cross join lateral private.calling_window(to_timestamp(asked.at), asked.zone, asked.opens, asked.closes, asked.first, asked.last) as stretch",
            Value::Array(asked)
        ))
        .await?;
    let told: Vec<Value> = serde_json::from_str(&told)?;
    assert_eq!(told.len(), CASES);
    let mut found = 0;
    for (case, told) in cases.iter().zip(&told) {
        let stretch = told[0].as_i64().zip(told[1].as_i64());
        found += usize::from(stretch.is_some());
        let complaint = case.complaint(stretch).with_context(|| case.json(0).to_string())?;
        assert_eq!(complaint, None, "{}", case.json(0));
    }
    assert!(found > CASES / 2 && found < CASES, "{found} of {CASES} windows were found");
    Ok(())
}
